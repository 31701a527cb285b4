def to_8_bit(array, mode):
    """Scale values to 8 bits by the range of the format."""
    array = np.nan_to_num(array.astype(np.float64))
    low, high = array.min(initial=0.0), array.max(initial=0.0)
    if mode.startswith("I;16") or (mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif mode == "I" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (array.clip(low, high) - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
