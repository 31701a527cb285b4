"""Conversations in the format of a checkpoint's chat template: token ids, and which of them the assistant produces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.chat_template import ChatTemplate

Turns = Sequence[tuple[str, str]]  # (role, content)


class Conversations:
    """Encoder of conversations. `text` must have a template; `closing` is the token that ends an answer, or None.

    `write` returns turns in the form that the template reads.
    """

    def __init__(self, text: TextTokenizer, write: Callable[[Turns], Sequence[Mapping[str, Any]]] | None = None):
        assert text.template is not None
        self.write = write or to_messages
        self.text, self.template = text, ChatTemplate(text.template, text.special)
        self.closing = text.tokenizer.token_to_id(self.template.closing_text())

    def render(self, rows: Sequence[Turns], place: Callable[[int], str]) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """Render each conversation and return (text, character spans of the assistant, or None if unknown).

        Raises DataError with the `place` of the row if the template rejects a conversation.
        """
        found = []
        for row, turns in enumerate(rows):
            try:
                found.append(self.template.render_with_spans(self.write(turns)))
            except DataError as error:
                raise DataError(f"{place(row)}: {error}") from None
        return found

    def find_rejected(self, rows: Sequence[Turns]) -> dict[int, str]:
        """Return the conversations that the template rejects, with the reason of each."""
        rejected = {}
        for row, turns in enumerate(rows):
            try:
                self.template(self.write(turns))
            except DataError as error:
                rejected[row] = str(error)
        return rejected

    def stream(self, rows: Sequence[Turns], place: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """Return all conversations as one row of token ids, int64, and a mask of the tokens to train on."""
        rendered = self.render(rows, place)
        encoded = self.text.encode_rendered([text for text, _ in rendered])
        trained = [
            np.ones(len(ids), dtype=bool) if spans is None else find_covered_tokens(covered, spans)
            for (_, spans), (ids, covered) in zip(rendered, encoded)
        ]
        nothing = np.zeros(0, dtype=np.int64)
        return np.concatenate([nothing, *(ids for ids, _ in encoded)]), np.concatenate([nothing > 0, *trained])

    def prompt(self, turns: Turns) -> list[int]:
        """Return the token ids of a conversation up to the start of the assistant's next turn."""
        return self.text.encode_rendered([self.template(self.write(turns))])[0][0].tolist()

    def describe(self, rows: Sequence[Turns], place: Callable[[int], str]) -> str:
        """Describe which parts of these conversations are used for training."""
        unknown = sum(spans is None for _, spans in self.render(rows, place))
        note = "the assistant's turns are trained on"
        if unknown == len(rows):
            note = "all text is trained on, since the template does not identify the assistant's turns"
        elif unknown:
            note += f", and all text of {unknown:,} conversations whose turns cannot be identified"
        return f"conversations are rendered with the checkpoint's chat template: {note}"


def to_messages(turns: Turns) -> list[dict[str, str]]:
    """Return the turns as dictionaries of role and content."""
    return [{"role": who, "content": text} for who, text in turns]


def take_until_answer(turns: Turns) -> list[tuple[str, str]]:
    """Return the turns before the first answer."""
    return list(itertools.takewhile(lambda turn: turn[0] != "assistant", turns))


def find_covered_tokens(covered: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:  # N 2 -> N bool
    """Return which tokens lie within one of the spans, given the characters that each token covers."""
    found = np.zeros(len(covered), dtype=bool)
    for begin, end in spans:
        found |= (covered[:, 0] >= begin) & (covered[:, 1] <= end) & (covered[:, 1] > covered[:, 0])
    return found
