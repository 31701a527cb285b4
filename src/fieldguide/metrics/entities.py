"""Entity-level counts for tagged words, as in CoNLL's scorer.

Tags are `O`, or a letter and a type (`B-PER`): B and S begin an entity, E, L, S and U end one, I continues it, in any of
the usual schemes (IOB1, IOB2, BIOES, BILOU). Tags without a letter, such as parts of speech, are entities of one word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BILOU_TO_BIOES = {"U": "S", "L": "E"}  # letters of BILOU that differ in BIOES


def parse_tags(tags: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the letter of each tag (O B I E S as 0 to 4), its type as a number from 1 (0 for O), and the type names."""
    schemed = all(tag == "O" or tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for tag in tags)
    split = [
        ("O", "") if tag == "O" else (BILOU_TO_BIOES.get(tag[0], tag[0]), tag[2:]) if schemed else ("S", tag) for tag in tags
    ]
    types = sorted({kind for letter, kind in split if letter != "O"})
    return (
        np.array(["OBIES".index(letter) for letter, _ in split]),
        np.array([0 if letter == "O" else 1 + types.index(kind) for letter, kind in split]),
        types,
    )


def find_boundaries(letter: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return from letters and types (N W) where entities begin (N W bool), and for each position the next end of an entity."""
    before = lambda x: np.pad(x, ((0, 0), (1, 0)))[:, :-1]
    after = lambda x: np.pad(x, ((0, 0), (0, 1)))[:, 1:]
    inside = letter > 0

    def breaks(first: np.ndarray, second: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return whether an entity ends or begins between two positions."""
        return (one != other) | (first == 0) | (first >= 3) | (second == 1) | (second == 4) | (second == 0)

    begins = inside & breaks(before(letter), letter, before(kind), kind)
    ends = inside & breaks(letter, after(letter), kind, after(kind))
    place = np.where(ends, np.arange(letter.shape[1]), letter.shape[1])
    return begins, np.minimum.accumulate(place[:, ::-1], 1)[:, ::-1]


def count_entities(truth: np.ndarray, predicted: np.ndarray, tags: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of correct, predicted and true entities of each type.

    `truth` and `predicted` are tag indices, N W, with -1 for padding.
    """
    letters, kinds, types = parse_tags(tags)
    letters, kinds = np.append(letters, 0), np.append(kinds, 0)  # -1 is O
    real, guess = ((letters[x], kinds[x]) for x in (truth, predicted))
    (real_begins, real_ends), (predicted_begins, predicted_ends) = find_boundaries(*real), find_boundaries(*guess)
    correct = real_begins & predicted_begins & (real[1] == guess[1]) & (real_ends == predicted_ends)
    count = lambda where, kind: np.bincount(kind[where], minlength=len(types) + 1)[1:]
    return count(correct, real[1]), count(predicted_begins, guess[1]), count(real_begins, real[1])


def extract_entities(tags: np.ndarray, names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return the entities of one row of tag indices as (first word, last word, type)."""
    letters, kinds, types = parse_tags(names)
    letter, kind = np.append(letters, 0)[tags][None], np.append(kinds, 0)[tags][None]
    begins, ends = find_boundaries(letter, kind)
    return [(int(i), int(ends[0, i]), types[kind[0, i] - 1]) for i in np.flatnonzero(begins[0])]
