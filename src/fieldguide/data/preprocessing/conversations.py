"""Conversations as the chat template of a checkpoint writes them: what is read, and which of it the assistant says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing import Text
from fieldguide.data.preprocessing.chat_template import ChatTemplate

Turns = Sequence[tuple[str, str]]  # who says what


class Conversations:
    """`text` has a template. `closing` is the token that it writes behind an answer, where it is one."""

    def __init__(self, text: Text):
        self.text, self.template = text, ChatTemplate(text.template, text.special)
        self.closing = text.tokenizer.token_to_id(self.template.closing())

    def written(self, rows: Sequence[Turns], place: Callable[[int], str]) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """Each conversation as a text, and which characters of that the assistant says; None where it cannot be told. Raises
        `DataError` for one that the template refuses, by the `place` of its row."""
        found = []
        for row, turns in enumerate(rows):
            try:
                found.append(self.template.spoken(messages(turns)))
            except DataError as error:
                raise DataError(f"{place(row)}: {error}") from None
        return found

    def stream(self, rows: Sequence[Turns], place: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """All conversations as one row of tokens, int64, and which of them are to be learnt."""
        written = self.written(rows, place)
        spelt = self.text.spelt([text for text, _ in written])
        learnt = [
            np.ones(len(ids), dtype=bool) if spans is None else within(covered, spans)
            for (_, spans), (ids, covered) in zip(written, spelt)
        ]
        nothing = np.zeros(0, dtype=np.int64)
        return np.concatenate([nothing, *(ids for ids, _ in spelt)]), np.concatenate([nothing > 0, *learnt])

    def prompt(self, turns: Turns) -> list[int]:
        """What was said so far, and where the assistant begins to speak."""
        return self.text.spelt([self.template(messages(turns))])[0][0].tolist()

    def note(self, rows: Sequence[Turns], place: Callable[[int], str]) -> str:
        """What is learnt of these conversations, in words."""
        untold = sum(spans is None for _, spans in self.written(rows, place))
        how = "what the assistant says is learnt"
        if untold == len(rows):
            how = "all of them is learnt, as it does not let be told what the assistant says"
        elif untold:
            how += f", and all of {untold:,} in which it does not let that be told"
        return f"conversations are written by the checkpoint's chat template: {how}"


def messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": who, "content": text} for who, text in turns]


def unanswered(turns: Turns) -> list[tuple[str, str]]:
    """A conversation before its first answer."""
    return list(itertools.takewhile(lambda turn: turn[0] != "assistant", turns))


def within(covered: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:  # N 2 -> N bool
    """Which tokens lie in one of the pieces of a text, by the characters that each covers."""
    found = np.zeros(len(covered), dtype=bool)
    for begin, end in spans:
        found |= (covered[:, 0] >= begin) & (covered[:, 1] <= end) & (covered[:, 1] > covered[:, 0])
    return found
