def shape_key(item):
    """Return what rows must have in common to enter the model together."""
    return tuple(array.shape for array in item.values())


def collate(items):
    """Return the arrays of a batch by name."""
    return {name: np.stack([item[name] for item in items]) for name in items[0]}
