def list_tokens(text):
    """Return the token ids of a text."""
    return encode(text, True).ids[: CONFIG["length"]]
