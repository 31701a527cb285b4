def join_columns(batch, inputs):
    """Return the arrays of a graph, in its order: columns are joined, and their texts become codes."""
    arrays = []
    for one in inputs:
        columns = one["columns"] or [one["name"]]
        parts = [encode_column(batch[column], one["codes"].get(column)) for column in columns]
        is_joined = one["columns"] and np.ndim(parts[0]) == 1  # a column of lists has two axes already
        arrays.append(np.ascontiguousarray(np.stack(parts, 1) if is_joined else parts[0]))
    return arrays


def encode_column(values, codes):
    if codes is None:
        return values
    found = [codes["known"].get(text, codes["unknown"]) for text in np.ravel(values)]
    return np.array(found, dtype=np.int64).reshape(np.shape(values))


def name_classes(arrays, outputs):
    """Return outputs, with names in place of numbers of classes."""
    pairs = zip(arrays, outputs)
    return [array if "names" not in one else np.array([*one["names"], ""], object)[array] for array, one in pairs]
