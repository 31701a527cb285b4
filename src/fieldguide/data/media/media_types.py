"""Media: kinds of files that stand in a table as paths, and how each is checked before anything is learnt from it.

A medium's `check` decodes files fully and never raises for what they hold. A kind of medium is one row of `MEDIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from fieldguide.data.dataset import (
    CHANNELS,
    FRAMES,
    HASH,
    HEIGHT,
    MASK_HEIGHT,
    MASK_WIDTH,
    RATE,
    SECONDS,
    WIDTH,
    Kind,
    Severity,
)
from fieldguide.data.media import audio, images, video


class Checked(Protocol):
    """What the check of one file found; `problem` is a slug of `Medium.problems`, "" where it can be used."""

    problem: str
    detail: str
    bytes: int
    sha256: str
    traits: tuple[str, ...]


@dataclass(frozen=True)
class Medium:
    """One kind of file. `facts` says which bookkeeping columns its check fills: column -> (attribute, type)."""

    check: Callable[[Sequence[str | Path]], list[Any]]
    missing: Any  # what the check says of a row without a path
    problems: Mapping[str, tuple[str, str]]  # slug: what, remedy
    traits: Mapping[str, tuple[str, Severity, str, str]] = field(default_factory=dict)  # trait: slug, severity, what, remedy
    facts: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


PICTURE_PROBLEMS = {  # slug: what, remedy
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("pictures that are not there", "Mend the paths: they start at the folder of the table."),
    "unreadable-file": ("files that may not be read", "Change their permissions."),
    "not-an-image": ("files that are no pictures", "Remove them."),
    "corrupt-image": ("corrupt pictures", "Copy them again or remove them."),
    "truncated-image": ("truncated pictures: the end of the file is missing", "Copy them again or remove them."),
    "too-many-pixels": (
        f"pictures of more than {images.PIXELS:,} pixels, which are refused (a small file can be made to fill the memory)",
        "Scale them down or remove them.",
    ),
}
PICTURE_TRAITS: dict[str, tuple[str, Severity, str, str]] = {  # trait: slug, severity, what, remedy
    "wrong-extension": (
        "wrong-extension",
        "warning",
        "files whose name says another format than their content, which is used",
        "Rename them.",
    ),
    "deep": ("deep-image", "note", "pictures of 16 or 32 bits are scaled to 8 bits by their range", ""),
    "transparent": ("transparent-image", "note", "transparent pictures are laid over white", ""),
    "cmyk": ("cmyk-image", "note", "CMYK pictures are converted to RGB", ""),
    "animated": ("animated-image", "note", "animations: only the first frame is used", ""),
    "rotated": ("rotated-image", "note", "pictures are turned as their EXIF says", ""),
}
SOUND_PROBLEMS = {
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("recordings that are not there", "Mend the paths: they start at the folder of the table."),
    "unreadable-file": ("files that may not be read", "Change their permissions."),
    "not-a-sound": ("files that are no sound, or of a format that is not read", "Convert them to FLAC or WAV, or remove them."),
    "corrupt-sound": ("corrupt recordings", "Copy them again or remove them."),
    "zero-length": ("recordings without a single sample", "Record them again or remove them."),
    "truncated-sound": ("truncated recordings: the end is missing, or cannot be decoded", "Copy them again or remove them."),
}
SOUND_TRAITS: dict[str, tuple[str, Severity, str, str]] = {
    "silent": (
        "silent-sound",
        "note",
        "recordings that are silent (no sample above -60 dB)",
        "Was the microphone on? Where somebody speaks in the transcript, remove them.",
    ),
    "clipped": (
        "clipped-sound",
        "note",
        "recordings that are clipped: over 0.1 % of the samples are at full scale",
        "Record more softly.",
    ),
    "stereo": ("stereo-sound", "note", "recordings of several channels: their mean is used", ""),
    "wrong-extension": (
        "wrong-extension",
        "warning",
        "files whose name says another format than their content, which is used",
        "Rename them.",
    ),
}

FILM_PROBLEMS = {
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("films that are not there", "Mend the paths: they start at the folder of the table."),
    "unreadable-file": ("files that may not be read", "Change their permissions."),
    "not-a-film": ("files that are no films", "Remove them."),
    "truncated-film": ("films that cannot be decoded to their end", "Copy them again or remove them."),
    "no-strip": ("pictures that do not move: neither animated nor a row of square frames", "Remove them, or export films."),
    "single-frame": ("films of one frame", "Remove them."),
    "uneven-frames": ("films whose frames differ in size", "Export them again in one size."),
}
MISSING = images.Picture("missing-file", "no path in this row")
MEDIA: dict[Kind, Medium] = {
    "image": Medium(
        images.check,
        MISSING,
        PICTURE_PROBLEMS,
        PICTURE_TRAITS,
        {
            HASH: ("pixels", pl.String),
            WIDTH: ("width", pl.Int32),
            HEIGHT: ("height", pl.Int32),
            CHANNELS: ("channels", pl.Int32),
        },
    ),
    # A mask's own form (palette, 16 bits, transparency) is read as it is, so its traits are no findings.
    "mask": Medium(
        images.check,
        MISSING,
        {slug: (what.replace("pictures", "masks"), remedy) for slug, (what, remedy) in PICTURE_PROBLEMS.items()},
        facts={MASK_WIDTH: ("width", pl.Int32), MASK_HEIGHT: ("height", pl.Int32)},
    ),
    "audio": Medium(
        audio.check,
        audio.Recording("missing-file", "no path in this row"),
        SOUND_PROBLEMS,
        SOUND_TRAITS,
        {HASH: ("samples", pl.String), SECONDS: ("seconds", pl.Float64), RATE: ("rate", pl.Int32)},
    ),
    "video": Medium(
        video.check,
        video.Film("missing-file", "no path in this row"),
        FILM_PROBLEMS,
        {},
        {
            HASH: ("pixels", pl.String),
            WIDTH: ("width", pl.Int32),
            HEIGHT: ("height", pl.Int32),
            CHANNELS: ("channels", pl.Int32),
            FRAMES: ("frames", pl.Int32),
        },
    ),
}
