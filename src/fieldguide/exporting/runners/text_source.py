def encode_source(row):
    """Return what the encoder reads: the token ids of a source in its frame of special tokens, and the most tokens of an answer."""
    text = CONFIG["prefix"] + to_text(row[CONFIG["column"]])
    room = CONFIG["length"] - len(CONFIG["before"]) - len(CONFIG["after"])
    ids = encode(text, CONFIG["exact"]).ids or [CONFIG["unknown"]]
    ids = [*CONFIG["before"], *ids[:room], *CONFIG["after"]]
    return {"source": np.array([ids])}, CONFIG["limits"][len(ids)]
