"""Symbols of published networks with CTC: the vocabulary of transformers' tokenizers, or a tokenizer of word pieces.

The blank is their padding token. Here it is symbol 0, and the others follow in their order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldguide.core.errors import DataError
from fieldguide.core.validation import guard, read_json
from fieldguide.data.preprocessing.transcripts import SPACE, Transcripts

VOCABULARY, TOKENIZER, SETTINGS, ADDED = "vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
SPECIAL, CONFIG, RUN = "special_tokens_map.json", "config.json", "run.json"


def has_symbols(folder: Path) -> bool:
    """Return whether a folder holds the symbols of a network with CTC, or a run."""
    return any((folder / name).is_file() for name in (VOCABULARY, TOKENIZER, RUN))


def read_symbols(folder: Path) -> Transcripts:
    """Return the symbols in the folder of a published network, in the case that they have there, or in that of an earlier run.

    Outputs of the network without a symbol mean the unknown one. Raises `DataError` if the files are damaged or belong to another
    network than config.json.
    """
    with guard(folder):
        return read_run_symbols(folder) if (folder / RUN).is_file() else read_published_symbols(folder)


def read_run_symbols(folder: Path) -> Transcripts:
    """Return the symbols of an earlier run."""
    return Transcripts.from_json(read_json(folder / "preprocess" / "task.json", DataError)["state"]["transcripts"])


def read_published_symbols(folder: Path) -> Transcripts:
    """Return the symbols of a published network."""
    config = read_json(folder / CONFIG, DataError) if (folder / CONFIG).is_file() else {}
    count, blank = config.get("vocab_size"), config.get("pad_token_id")
    settings = read_settings(folder)
    saved = None
    if (folder / VOCABULARY).is_file():
        vocabulary = read_vocabulary(folder, settings)
    else:
        saved = (folder / TOKENIZER).read_text(encoding="utf-8")
        vocabulary = read_pieces(saved, folder)
    pad = settings.get("pad_token") or next((name for name in ("<pad>", "[PAD]") if name in vocabulary), None)
    if pad not in vocabulary:
        raise DataError(f"{folder}: the padding token {pad!r}, which is the blank, is not in the vocabulary.")
    if blank is not None and vocabulary[pad] != blank:
        raise DataError(
            f"{folder}: the blank is {pad!r}, symbol {vocabulary[pad]} of the vocabulary, but pad_token_id of the network is {blank}. "
            "Use the files that were published with it."
        )
    by_place = {place: name for name, place in reversed(vocabulary.items())}
    if count is not None and max(by_place) >= count:
        raise DataError(
            f"{folder}: the vocabulary has {max(by_place) + 1} symbols, but the network {count}. It is another network's."
        )
    unknown = str(settings.get("unk_token") or "<unk>")
    symbols = [by_place.get(i, unknown) for i in range(count or max(by_place) + 1) if i != vocabulary[pad]]
    if saved is None:
        delimiter = settings.get("word_delimiter_token", "|")
        space = settings.get("replace_word_delimiter_char", " ")
        symbols = [space if symbol == delimiter else symbol for symbol in symbols]
        if settings.get("do_lower_case"):
            symbols = [symbol.lower() for symbol in symbols]
    return Transcripts(symbols, lower=False, tokenizer=saved)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a tokenizer, with tokens as text."""
    found: dict[str, Any] = {}
    for name in (SPECIAL, SETTINGS):
        if (folder / name).is_file():
            found |= read_json(folder / name, DataError)
    return {key: value["content"] if isinstance(value, dict) and "content" in value else value for key, value in found.items()}


def read_vocabulary(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Return the places of the symbols, of one language if there are several."""
    vocabulary: Any = read_json(folder / VOCABULARY, DataError)
    if any(isinstance(value, dict) for value in vocabulary.values()):
        language = settings.get("target_lang")
        if language not in vocabulary:
            raise DataError(f"{folder / VOCABULARY} holds several languages, and {SETTINGS} names none of them as target_lang.")
        vocabulary = vocabulary[language]
    if (folder / ADDED).is_file():
        vocabulary = {**read_json(folder / ADDED, DataError), **vocabulary}
    if not vocabulary or not all(type(place) is int and place >= 0 for place in vocabulary.values()):
        raise DataError(f"{folder / VOCABULARY} must map each symbol to its place.")
    return vocabulary


def read_pieces(saved: str, folder: Path) -> dict[str, int]:
    """Return the places of the word pieces of a tokenizer."""
    from tokenizers import Tokenizer

    with guard(folder / TOKENIZER):
        vocabulary = Tokenizer.from_str(saved).get_vocab()
    if not any(SPACE in piece for piece in vocabulary):
        raise DataError(
            f"{folder / TOKENIZER}: no piece has {SPACE!r}, which stands for a space. Other tokenizers are not supported."
        )
    return vocabulary
