from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_file(str(HERE / "tokenizer.json"))


def encode(text, exact):
    """Return the encoding of a text: with the tokenizer's own special tokens, or without (`exact`)."""
    TOKENIZER.encode_special_tokens = exact
    return TOKENIZER.encode(text, add_special_tokens=not exact)


def shape_key(item):
    return None  # rows are padded


def pad(arrays, value):
    """Return arrays of different lengths as one, and where they are."""
    sizes = np.array([len(array) for array in arrays])
    mask = np.arange(max(1, sizes.max()))[None] < sizes[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = np.concatenate(arrays)
    return padded, mask
