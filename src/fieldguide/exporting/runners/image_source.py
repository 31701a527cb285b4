def encode_source(row):
    """Return what the encoder reads: the pixels of an image, and the most tokens of a caption."""
    return {"pixels": load_pixels(row[CONFIG["column"]])[0][None]}, CONFIG["limit"]
