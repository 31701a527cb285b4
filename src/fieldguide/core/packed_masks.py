"""Masks of objects as run lengths, and as arrays with one row for each image, small enough to keep those of a whole data set.

    runs        N L int8: the compressed run lengths of the masks of an image, one after another; -1 is padding
    run_bytes   N M int32: how many of these bytes each of the M masks has
    size        N 2 int32: height and width of the image

The compressed run lengths are those of COCO (see `decode_run_lengths`), which pycocotools reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Runs = dict[str, Any]  # `size` (height, width) and `counts`, as pycocotools has it
Arrays = Mapping[str, np.ndarray]


def decode_run_lengths(counts: Any) -> list[int] | None:
    """Decode COCO run lengths (alternating outside and inside, column by column); return None if they are invalid.

    In the compressed string form each number, from the fourth on, is stored as the difference to the one two before
    it, in base 32 with the lowest digit first and the sign bit in the last digit. Digits are characters starting at
    "0", with 32 added if another digit follows.
    """
    if isinstance(counts, str):
        code = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
        if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
            return None
        last = np.flatnonzero(code & 32 == 0)
        first = np.r_[0, last[:-1] + 1]
        place = np.arange(len(code)) - np.repeat(first, last - first + 1)
        if place.max() > 7:  # larger than any plausible image
            return None
        numbers = np.add.reduceat((code & 31) << 5 * place, first)
        numbers -= np.where(code[last] & 16, 1 << 5 * (last - first + 1), 0)
        for begin in (1, 2):
            numbers[begin::2] = numbers[begin::2].cumsum()
    elif isinstance(counts, list) and counts and all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
        numbers = np.array(counts, dtype=object)
    else:
        return None
    return [int(n) for n in numbers] if (numbers >= 0).all() and numbers.sum() < 2**31 else None


def encode_run_lengths(mask: np.ndarray) -> list[int]:  # H W bool
    """Return the lengths of alternating runs of pixels outside and inside, column by column."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def encode_mask(mask: np.ndarray) -> bytes:  # H W bool -> compressed run lengths
    """Return the compressed run lengths of a mask."""
    from pycocotools import mask as coco

    counts: bytes = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    return counts


def decode_mask(runs: Runs) -> np.ndarray:  # -> H W bool
    """Return the mask of run lengths."""
    height, width = runs["size"]
    counts = decode_run_lengths(runs["counts"].decode("ascii"))
    assert counts is not None  # written by `encode_mask`
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def pack_masks(
    codes: Sequence[Sequence[bytes]], sizes: Sequence[tuple[int, int]], count: int | None = None
) -> dict[str, np.ndarray]:
    """Return the arrays of the masks of several images; `count` is M, by default the most masks of an image."""
    count = max((len(some) for some in codes), default=0) if count is None else count
    joined = [b"".join(some) for some in codes]
    runs = np.full((len(codes), max(map(len, joined), default=0)), -1, dtype=np.int8)
    lengths = np.zeros((len(codes), count), dtype=np.int32)
    for i, (some, whole) in enumerate(zip(codes, joined)):
        runs[i, : len(whole)] = np.frombuffer(whole, dtype=np.int8)
        lengths[i, : len(some)] = [len(code) for code in some]
    return {"runs": runs, "run_bytes": lengths, "size": np.array(sizes, dtype=np.int32).reshape(-1, 2)}


def unpack_masks(arrays: Arrays, image: int) -> list[Runs]:
    """Return the M masks of an image; those that are padding have no pixels."""
    height, width = (int(v) for v in arrays["size"][image])
    ends = np.maximum(arrays["run_bytes"][image], 0).astype(np.int64).cumsum()
    whole = arrays["runs"][image][: int(ends[-1]) if len(ends) else 0].astype(np.int8).tobytes()
    nothing = encode_mask(np.zeros((height, width), dtype=bool))
    starts = [0, *ends[:-1].tolist()]
    codes = [whole[a:b] or nothing for a, b in zip(starts, ends.tolist())]
    return [{"size": [height, width], "counts": code} for code in codes]


def overlap_masks(found: Sequence[Runs], true: Sequence[Runs], crowd: np.ndarray) -> np.ndarray:  # -> D M
    """Return the IoU of each pair; for a crowd, the part of the found mask that lies in it."""
    from pycocotools import mask as coco

    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    return np.asarray(coco.iou(list(found), list(true), [int(c) for c in crowd]), dtype=np.float64)


def number_pixels(arrays: Arrays, image: int) -> np.ndarray:  # -> H W int32
    """Return which mask of an image covers each pixel, from 1; 0 where none does. A later mask covers earlier ones."""
    height, width = (int(v) for v in arrays["size"][image])
    flat = np.zeros(height * width, dtype=np.int32)
    for number, runs in enumerate(unpack_masks(arrays, image), 1):
        counts = decode_run_lengths(runs["counts"].decode("ascii"))
        assert counts is not None  # written by `encode_mask`
        if len(counts) > 1:
            flat[np.repeat(np.arange(len(counts)) % 2 == 1, counts)] = number
    return flat.reshape(width, height).T
