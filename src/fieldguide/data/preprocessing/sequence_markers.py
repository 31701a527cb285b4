"""Frames: what stands around the texts that an encoder-decoder reads and writes, as its tokenizer and its file say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.data.preprocessing.tokenizer import Text

CALLED = ("task.source_language", "task.target_language")  # how a user names the languages


@dataclass(frozen=True)
class Frame:
    """Tokens around a source, those that an answer begins with (the last of them before its text), and that of its end."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    said: tuple[int, ...]
    end: int

    @property
    def longest(self) -> int:
        """Tokens beside those of a text, at most."""
        return max(len(self.before) + len(self.after), len(self.said), 1)


def framed(text: Text, options: Any, called: tuple[str, str] = CALLED) -> Frame:
    """How a network reads and says texts. What we learn puts nothing around a source.

    What a given tokenizer puts around a text stands around sources and answers alike, and before the latter what all begin
    with. It may name a language: of networks whose answers begin with a token for all languages (mBART-50, NLLB) it stands
    first, in sources and answers; of others (mBART of 25 languages) last in the source, and answers begin with it. `options`
    has tokenizer (a path), begin, source_language and target_language; `called` says how a user names the last two.
    """
    if not options.tokenizer:
        return Frame((), (), (text.cls,), text.end)
    seen = text.tokenizer.encode("a")
    special = np.flatnonzero(~np.array(seen.special_tokens_mask, dtype=bool))
    before = tuple(seen.ids[: special[0]]) if len(special) else ()
    after = tuple(seen.ids[special[-1] + 1 :]) if len(special) else tuple(seen.ids)
    languages = [i for i in (*before, *after) if i not in (text.cls, text.sep, text.end)]
    if not languages and not options.source_language and not options.target_language:
        begin = options.begin
        if begin is None:
            begin = text.pad if text.cls == text.unknown else text.cls
        return Frame(before, after, (begin, *before), text.end)
    known = (text.cls, text.sep, text.end, text.pad, text.unknown)
    begin = None if options.begin in known else options.begin  # a language of its own: mBART of 25, fitted to one
    if options.target_language is None and begin is None:
        example = f" (it reads {text.tokenizer.id_to_token(languages[0])})" if languages else ""
        raise SettingsError(
            f"{options.tokenizer} knows languages{example}: say the answers' by its token, such as "
            f"--set {called[1]}=de_DE or deu_Latn, and that of the sources as {called[0]}."
        )
    source = named(text, options.source_language, called[0], options.tokenizer, languages)
    target = named(text, options.target_language, called[1], options.tokenizer, [begin])
    if options.begin is None or begin is not None:
        return Frame((), (text.end, source), (target,), text.end)
    return Frame((source,), (text.end,), (options.begin, target), text.end)


def named(text: Text, name: str | None, called: str, file: str, default: list[Any]) -> int:
    """The token of a language."""
    if name is None and default:
        return default[0]
    if name is None or (found := text.tokenizer.token_to_id(name)) is None:
        known = [t.content for t in text.tokenizer.get_added_tokens_decoder().values()]
        raise SettingsError(f"{called}={name!r} is no token of {file}.{nearest(str(name), known)}")
    return found
