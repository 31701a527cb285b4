"""Windows over long texts: a question and a piece of its context in one row, with the character span of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.words import WORD
from fieldguide.data.preprocessing import TextTokenizer


@dataclass
class Windows:
    """Windows of questions: the index of each window's question (`number`, sorted) and the context token at which it
    begins.
    """

    text: TextTokenizer
    frame: PairTemplate
    length: int
    contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # of each context: token ids, answer spans and character spans
    context_of_question: np.ndarray  # the context of each question
    question_ids: list[np.ndarray]  # token ids of each question
    number: np.ndarray
    first: np.ndarray

    def __post_init__(self) -> None:
        before, between, behind = self.frame.before, self.frame.between, self.frame.behind
        question_lengths = np.array([len(ids) for ids in self.question_ids], dtype=np.int64)[self.number]
        tokens = np.array([len(ids) for ids, _, _ in self.contexts], dtype=np.int64)[self.context_of_question[self.number]]
        self.begin = question_lengths + len(before) + len(between)  # the position of each window's first context token
        room = self.length - self.begin - len(behind)
        self.stop = np.minimum(tokens, self.first + room)  # one past its last context token
        self.sizes = self.begin + self.stop - self.first + len(behind)

    def context_slice(self, row: int) -> slice:
        return slice(self.first[row], self.stop[row])

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        frame = self.frame
        tokens, mask = self.text.batch(
            [
                np.concatenate(
                    [
                        frame.before,
                        self.question_ids[self.number[r]],
                        frame.between,
                        self.contexts[self.context_of_question[self.number[r]]][0][self.context_slice(r)],
                        frame.behind,
                    ]
                ).astype(np.int64)
                for r in rows
            ]
        )
        place = np.arange(tokens.shape[1])
        begin, stop = self.begin[rows, None], (self.begin + self.stop - self.first)[rows, None]
        segments = np.where(mask, np.where(place < begin, *frame.segments), 0)
        return {
            name: torch.from_numpy(x)
            for name, x in {
                "tokens": tokens,
                "mask": mask,
                "segments": segments,
                "answerable": (place >= begin) & (place < stop),
            }.items()
        }

    def characters(self, rows: np.ndarray) -> np.ndarray:  # -> B T 2
        """Return the character span in the context of each token; 0 0 for tokens outside the context."""
        found = np.zeros((len(rows), int(self.sizes[rows].max(initial=1)), 2), dtype=np.int64)
        for at, row in enumerate(rows):
            spans = self.contexts[self.context_of_question[self.number[row]]][1][self.context_slice(row)]
            found[at, self.begin[row] : self.begin[row] + len(spans)] = spans
        return found

    def answer_positions(self, right: list[list[dict[str, Any]]]) -> np.ndarray:  # -> windows 2
        """Return the positions of the first and last token of the first answer in each window that holds it; 0 0 in
        others.
        """
        found = np.array(
            [
                covering_tokens(self.contexts[context][2], *answer_span(answers[0])) if answers else (-1, -1)
                for context, answers in zip(self.context_of_question, right)
            ],
            dtype=np.int64,
        ).reshape(-1, 2)[self.number]
        inside = (found[:, 0] >= self.first) & (found[:, 1] < self.stop)
        return np.where(inside[:, None], found - self.first[:, None] + self.begin[:, None], 0)


@dataclass(frozen=True)
class PairTemplate:
    """The special tokens before a question, between question and context, and after the context; and the two segment
    ids.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    behind: tuple[int, ...]
    segments: tuple[int, int] = (0, 1)

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.behind)


def pair_template(text: TextTokenizer) -> PairTemplate:
    """Return the tokenizer's special tokens for pairs.

    If the tokenizer adds none, return BERT's: [CLS] first, [SEP] after each text.
    """
    pair = text.tokenizer.encode("a", "b")
    side = np.array([-1 if n is None else n for n in pair.sequence_ids])
    first, second = np.flatnonzero(side == 0), np.flatnonzero(side == 1)
    if not (side < 0).any() or not len(first) or not len(second):
        return PairTemplate((text.cls,), (text.sep,), (text.sep,))
    ids, kinds = pair.ids, pair.type_ids
    return PairTemplate(
        tuple(ids[: first[0]]),
        tuple(ids[first[-1] + 1 : second[0]]),
        tuple(ids[second[-1] + 1 :]),
        (kinds[first[0]], kinds[second[0]]),
    )


def join_pairs(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], frame: PairTemplate, length: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Return the token ids of each pair of texts in its frame, the segment of each token, and the number of truncated pairs.

    If a pair has more than `length` tokens, the end of the longer text is truncated (appendix A.2 of BERT).
    """
    tokens, segments, cut = [], [], 0
    room = max(2, length - frame.size)
    for a, b in zip(first, second):
        cut += len(a) + len(b) > room
        half = max(room // 2, room - len(b))  # a short text leaves its unused tokens to the other text
        a = a[:half]
        b = b[: room - len(a)]
        tokens.append(np.concatenate([frame.before, a, frame.between, b, frame.behind]).astype(np.int64))
        before = len(frame.before) + len(a) + len(frame.between)
        segments.append(np.where(np.arange(len(tokens[-1])) >= before, *frame.segments[::-1]))
    return tokens, segments, cut


def answer_span(answer: dict[str, Any]) -> tuple[int, int]:
    """Return the index of the first character of an answer and one past its last."""
    return answer["start"], answer["start"] + len(answer["text"])


def covering_tokens(spans: np.ndarray, begin: int, end: int) -> tuple[int, int]:  # N 2 -> first, last
    """Return the first and last token that overlap the characters begin to end; (-1, -1) if none does."""
    inside = np.flatnonzero((spans[:, 1] > begin) & (spans[:, 0] < end) & (spans[:, 1] > spans[:, 0]))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (-1, -1)


def widen_to_words(text: str, spans: np.ndarray) -> np.ndarray:  # N 2 -> N 2
    """Widen spans of a text to whole words."""
    words = np.array([m.span() for m in WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)
    if not len(words):
        return spans
    within = np.searchsorted(words[:, 0], spans, "right") - 1  # the last word that begins at or before it
    near = words[np.maximum(within, 0)]  # N 2 2
    begin, end = spans.T
    begins = np.where((within[:, 0] >= 0) & (begin < near[:, 0, 1]), near[:, 0, 0], begin)
    last = np.searchsorted(words[:, 0], end, "left") - 1  # of the words that begin before the end
    behind = words[np.maximum(last, 0), 1]
    return np.stack([begins, np.where((last >= 0) & (end < behind) & (end > begin), behind, end)], 1)


def is_whole_words(context: str, begin: int, end: int) -> bool:
    """Return whether a span begins and ends at word boundaries."""
    return tuple(widen_to_words(context, np.array([[begin, end]]))[0]) == (begin, end)


def window_starts(tokens: int, room: int, stride: int) -> list[int]:
    """Return the starts of windows of `room` tokens that cover a text: `stride` apart, and one at the end."""
    if tokens <= room:
        return [0]
    return [*range(0, tokens - room, min(stride, room)), tokens - room]
