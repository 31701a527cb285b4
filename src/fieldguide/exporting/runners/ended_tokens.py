def list_tokens(text):
    """Return the token ids of a text, between a start token, if the tokenizer has one, and an end token."""
    ids = encode(text, False).ids
    ids = ids[:-1] if ids[-1:] == [CONFIG["end"]] else ids
    start = [] if ids[: len(CONFIG["start"])] == CONFIG["start"] else CONFIG["start"]
    ids = [*start, *(ids or CONFIG["unknown"])]
    return [*ids[: CONFIG["length"] - 1], CONFIG["end"]]
