def join_columns(batch, inputs):
    """Return the arrays of a graph, in its order: columns are joined, and their texts become codes."""
    arrays = []
    for one in inputs:
        columns = one["columns"] or [one["name"]]
        parts = [encode_column(batch[column], one["codes"].get(column)) for column in columns]
        arrays.append(np.ascontiguousarray(np.stack(parts, 1) if one["columns"] else parts[0]))
    return arrays


def encode_column(values, codes):
    return values if codes is None else np.array([codes["known"].get(text, codes["unknown"]) for text in values])


def name_classes(arrays, outputs):
    """Return outputs, with names in place of numbers of classes."""
    pairs = zip(arrays, outputs)
    return [array if "names" not in one else np.array([*one["names"], ""], object)[array] for array, one in pairs]
