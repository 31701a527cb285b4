"""Incremental decoding of generated tokens to text, with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


class StreamDecoder:
    """Turns tokens that arrive one by one into pieces of text that no later token changes.

    Incomplete characters and possible beginnings of a stop string are held back. `stopped` says that a stop string was
    found; it is not part of the text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops, self.longest = decode, stops, max(map(len, stops), default=0)
        self.tokens: list[int] = []
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain, which may be empty."""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        self.text = truncate_at_stop(text, self.stops)
        self.stopped = len(self.text) < len(text)
        held = 0 if self.stopped else max(self.longest - 1, 0)
        ready = len(self.text) - held if not text.endswith("\ufffd") else self.shown
        return self.advance(ready)

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        return self.advance(len(self.text))

    def advance(self, end: int) -> str:
        """Return the text up to a position that was not returned before."""
        end = max(self.shown, end)  # it is negative if less than the longest stop string is there
        piece, self.shown = self.text[self.shown : end], end
        return piece


def decode_stream(
    tokens: Iterable[int], decode: Callable[[list[int]], str], eos_token_ids: Collection[int] = (), stops: Sequence[str] = ()
) -> Iterator[str]:
    """Yield pieces of text that no later token changes (`StreamDecoder`).

    Tokens in `eos_token_ids` and negative tokens are skipped.
    """
    decoder = StreamDecoder(decode, stops)
    for token in tokens:
        if token < 0 or token in eos_token_ids:
            continue
        if piece := decoder.push(token):
            yield piece
        if decoder.stopped:
            return
    if rest := decoder.finish():
        yield rest
