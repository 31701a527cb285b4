"""Sequence markers: the tokens around the source and target texts of an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.data.preprocessing.tokenizer import TextTokenizer

LANGUAGE_SETTINGS = ("task.source_language", "task.target_language")  # names of the language settings


@dataclass(frozen=True)
class SequenceMarkers:
    """The tokens around a source, the tokens that a target begins with, and the end token."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    target_start: tuple[int, ...]
    end: int

    @property
    def longest(self) -> int:
        """Maximum number of tokens added to a text."""
        return max(len(self.before) + len(self.after), len(self.target_start), 1)


def resolve_markers(text: TextTokenizer, options: Any, called: tuple[str, str] = LANGUAGE_SETTINGS) -> SequenceMarkers:
    """Return the markers for a tokenizer. Tokenizers trained by fieldguide add nothing around a source.

    A given tokenizer adds the same tokens around sources and targets, and targets additionally begin with a common start
    token. These may include a language: if targets begin with a token common to all languages (mBART-50, NLLB), the
    language comes first in sources and targets; otherwise (mBART-25) it is last in the source, and targets begin with it.

    `options` has the fields tokenizer (a path), begin, source_language and target_language; `called` are the setting names
    of the last two, for messages. Raises SettingsError if a language is required and missing, or unknown.
    """
    if not options.tokenizer:
        return SequenceMarkers((), (), (text.cls,), text.end)
    seen = text.tokenizer.encode("a")
    special = np.flatnonzero(~np.array(seen.special_tokens_mask, dtype=bool))
    before = tuple(seen.ids[: special[0]]) if len(special) else ()
    after = tuple(seen.ids[special[-1] + 1 :]) if len(special) else tuple(seen.ids)
    languages = [i for i in (*before, *after) if i not in (text.cls, text.sep, text.end)]
    if not languages and not options.source_language and not options.target_language:
        begin = options.begin
        if begin is None:
            begin = text.pad if text.cls == text.unknown else text.cls
        return SequenceMarkers(before, after, (begin, *before), text.end)
    known = (text.cls, text.sep, text.end, text.pad, text.unknown)
    begin = None if options.begin in known else options.begin  # a language token: mBART-25 fine-tuned to one language
    if options.target_language is None and begin is None:
        example = f" (default: {text.tokenizer.id_to_token(languages[0])})" if languages else ""
        raise SettingsError(
            f"{options.tokenizer} requires language tokens{example}. Set the target language by its token, such as "
            f"--set {called[1]}=de_DE or deu_Latn, and the source language with {called[0]}."
        )
    source = find_language_token(text, options.source_language, called[0], options.tokenizer, languages)
    target = find_language_token(text, options.target_language, called[1], options.tokenizer, [begin])
    if options.begin is None or begin is not None:
        return SequenceMarkers((), (text.end, source), (target,), text.end)
    return SequenceMarkers((source,), (text.end,), (options.begin, target), text.end)


def find_language_token(text: TextTokenizer, name: str | None, called: str, file: str, default: list[Any]) -> int:
    """Return the id of a language token. Raises SettingsError if it does not exist."""
    if name is None and default:
        return default[0]
    if name is None or (found := text.tokenizer.token_to_id(name)) is None:
        known = [t.content for t in text.tokenizer.get_added_tokens_decoder().values()]
        raise SettingsError(f"{called}={name!r} is not a token of {file}.{nearest(str(name), known)}")
    return found
