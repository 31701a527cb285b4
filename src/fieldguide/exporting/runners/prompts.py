def prepare(row):
    """Return the token ids of a prompt, or of a conversation up to the answer."""
    said, ids = row[CONFIG["column"]], list(CONFIG["begin"])
    for turn in said if isinstance(said, list) else [{"content": to_text(said)}]:
        own = encode(turn["content"], True).ids
        ids += [CONFIG["roles"][turn["role"]], *own, CONFIG["end"]] if "role" in turn else own
    ids += [CONFIG["roles"]["assistant"]] if CONFIG["roles"] else []
    return {"tokens": ids[-(CONFIG["length"] - 1) :]}
