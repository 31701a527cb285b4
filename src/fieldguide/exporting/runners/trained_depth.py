def to_8_bit(array, mode):  # by the range of the training images
    low, high = CONFIG["scale"]
    scaled = (np.nan_to_num(array.astype(np.float64)).clip(low, high) - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
