def pad(arrays, value):
    """Return arrays of different lengths as one, and where they are."""
    sizes = np.array([len(array) for array in arrays])
    mask = np.arange(max(1, sizes.max()))[None] < sizes[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = np.concatenate(arrays)
    return padded, mask
