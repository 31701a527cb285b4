def prepare(row):
    """Return the token ids of a caption, 0 beyond its end, and the caption as the model reads it."""
    ids = list_tokens(row[CONFIG["column"]])
    label = np.zeros(CONFIG["length"], dtype=np.int64)
    label[: len(ids)] = ids
    return {"label": label, "record": {"caption": TOKENIZER.decode([i for i in ids if i > 0]).strip()}}
