"""Tokens as they come into being, as text: whole characters only, and nothing of what ends the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stops in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def pieces(
    tokens: Iterable[int], decode: Callable[[list[int]], str], ends: Collection[int] = (), stops: Sequence[str] = ()
) -> Iterator[str]:
    """Parts of a text that no later token changes. Half of a character, or of a stop, is held back until it is clear."""
    said: list[int] = []
    shown, longest = 0, max(map(len, stops), default=0)
    for token in tokens:
        if token < 0 or token in ends:
            continue
        said.append(token)
        text = decode(said)
        sure = cut(text, stops)
        held = max(longest - 1, 0) if len(sure) == len(text) else 0
        ready = len(sure) - held if not text.endswith("\ufffd") else shown
        if ready > shown:
            yield sure[shown:ready]
            shown = ready
        if len(sure) < len(text):
            return
    if said and (rest := cut(decode(said), stops)[shown:]):
        yield rest
