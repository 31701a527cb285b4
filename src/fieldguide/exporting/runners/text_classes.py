def build_record(outputs, row, item):
    return classify(outputs)
