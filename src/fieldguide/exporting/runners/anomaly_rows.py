def build_record(outputs, row, item):
    return describe_score(outputs)
