from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_file(str(HERE / "tokenizer.json"))


def encode(text, exact):
    """Return the encoding of a text: with the tokenizer's own special tokens, or without (`exact`)."""
    TOKENIZER.encode_special_tokens = exact
    return TOKENIZER.encode(text, add_special_tokens=not exact)


def shape_key(item):
    return None  # rows are padded
