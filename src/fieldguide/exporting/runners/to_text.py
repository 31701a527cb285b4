def to_text(value):
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in CONFIG["missing"] else text
