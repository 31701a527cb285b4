def prepare(row):
    return {"pixels": load_pixels(row[CONFIG["column"]])[0]}


def build_record(outputs, row, item):
    return classify(outputs)
