"""Incremental decoding of generated tokens to text, with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def decode_stream(
    tokens: Iterable[int], decode: Callable[[list[int]], str], eos_token_ids: Collection[int] = (), stops: Sequence[str] = ()
) -> Iterator[str]:
    """Yield pieces of text that no later token changes.

    Incomplete characters and possible beginnings of a stop string are held back. Tokens in `eos_token_ids` and
    negative tokens are skipped.
    """
    received: list[int] = []
    shown, longest = 0, max(map(len, stops), default=0)
    for token in tokens:
        if token < 0 or token in eos_token_ids:
            continue
        received.append(token)
        text = decode(received)
        final = truncate_at_stop(text, stops)
        held = max(longest - 1, 0) if len(final) == len(text) else 0
        ready = len(final) - held if not text.endswith("\ufffd") else shown
        if ready > shown:
            yield final[shown:ready]
            shown = ready
        if len(final) < len(text):
            return
    if received and (rest := truncate_at_stop(decode(received), stops)[shown:]):
        yield rest
