"""Media types: the kinds of files that tables refer to by path, and how each is checked before training.

The `check` of a medium decodes files completely and never raises for unusable content. Each medium is an entry of `MEDIA`.
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
    HIGH,
    LOW,
    MASK_HEIGHT,
    MASK_WIDTH,
    RATE,
    SECONDS,
    WIDTH,
    Kind,
    Severity,
)
from fieldguide.data.media import audio, images, video


class MediaCheck(Protocol):
    """The result of checking one file; `problem` is a key of `Medium.problems`, or "" if the file can be used."""

    problem: str
    detail: str
    bytes: int
    sha256: str
    traits: tuple[str, ...]


@dataclass(frozen=True)
class Medium:
    """A kind of media file. `facts` maps the bookkeeping columns filled by its check to (attribute, type)."""

    check: Callable[[Sequence[str | Path]], list[Any]]
    missing: Any  # check result for a row without a path
    problems: Mapping[str, tuple[str, str]]  # name: description, remedy
    traits: Mapping[str, tuple[str, Severity, str, str]] = field(
        default_factory=dict
    )  # trait: name, severity, description, remedy
    facts: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


PLACE_PROBLEMS = {  # of paths, found before a file is opened
    "not-a-file": ("paths that are not regular files", "Correct the paths."),
    "outside-data": (
        "files outside of the folder of the data, which are not opened",
        "Copy them into it and correct the paths.",
    ),
}
IMAGE_PROBLEMS = {  # name: description, remedy
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("image files that do not exist", "Correct the paths; they are relative to the folder of the table."),
    "unreadable-file": ("files that cannot be opened", "Change their permissions."),
    **PLACE_PROBLEMS,
    "not-an-image": ("files that are not images", "Remove them."),
    "unsupported-image": (
        "image files of a format that is not read",
        "Convert them to PNG or TIFF, which keep 16 bits, or save the pixels as a NumPy array (.npy).",
    ),
    "several-pages": (
        "TIFF files with several pages, of which it is unknown which one is meant",
        "Save each page, or their combination, as a file of its own.",
    ),
    "corrupt-image": ("corrupt images", "Copy them again or remove them."),
    "truncated-image": ("truncated images: the end of the file is missing", "Copy them again or remove them."),
    "too-many-pixels": (
        f"images with more than {images.MAX_PIXELS:,} pixels, the limit that protects against decompression bombs",
        "Scale them down or remove them.",
    ),
}
IMAGE_TRAITS: dict[str, tuple[str, Severity, str, str]] = {  # trait: name, severity, description, remedy
    "wrong-extension": (
        "wrong-extension",
        "warning",
        "files whose extension does not match their content; the content is used",
        "Rename them.",
    ),
    "deep": ("deep-image", "note", "images with more than 8 bits are scaled by the range of the training images", ""),
    "transparent": ("transparent-image", "note", "transparent images are composited over white", ""),
    "other-channels": (
        "other-channels",
        "warning",
        "TIFF files with more channels than gray or red, green and blue; the others are ignored",
        "Export the channels to use as an image.",
    ),
    "cmyk": ("cmyk-image", "note", "CMYK images are converted to RGB", ""),
    "animated": ("animated-image", "note", "animations: only the first frame is used", ""),
    "rotated": ("rotated-image", "note", "images are rotated according to their EXIF orientation", ""),
}
AUDIO_PROBLEMS = {
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("recordings that do not exist", "Correct the paths; they are relative to the folder of the table."),
    "unreadable-file": ("files that cannot be opened", "Change their permissions."),
    **PLACE_PROBLEMS,
    "not-a-sound": ("files that are not audio or have an unsupported format", "Convert them to FLAC or WAV, or remove them."),
    "corrupt-sound": ("corrupt recordings", "Copy them again or remove them."),
    "implausible-sound": (
        f"recordings with more than {audio.MAX_SAMPLES:,} samples or an implausible sample rate, which are not decoded",
        "Cut them into segments, or convert them.",
    ),
    "not-finite": ("recordings with samples that are not numbers", "Export them again."),
    "zero-length": ("recordings without samples", "Record them again or remove them."),
    "truncated-sound": ("truncated recordings: the end is missing or cannot be decoded", "Copy them again or remove them."),
}
AUDIO_TRAITS: dict[str, tuple[str, Severity, str, str]] = {
    "silent": (
        "silent-sound",
        "note",
        "recordings that are silent (no sample above -60 dB)",
        "Check the microphone. Remove them if their transcript contains speech.",
    ),
    "clipped": (
        "clipped-sound",
        "note",
        "recordings that are clipped: over 0.1 % of the samples are at full scale",
        "Record at a lower level.",
    ),
    "cancelling": ("cancelling-channels", "warning", "recordings whose channels cancel out: the loudest channel is used", ""),
    "unmarked-end": (
        "unmarked-end",
        "note",
        "Ogg recordings whose last page is not marked as the last; they look complete",
        "",
    ),
    "stereo": ("stereo-sound", "note", "recordings with several channels: the mean of the channels is used", ""),
    "wrong-extension": (
        "wrong-extension",
        "warning",
        "files whose extension does not match their content; the content is used",
        "Rename them.",
    ),
}

VIDEO_PROBLEMS = {
    "empty-file": ("empty files", "Copy them again or remove them."),
    "missing-file": ("videos that do not exist", "Correct the paths; they are relative to the folder of the table."),
    "unreadable-file": ("files that cannot be opened", "Change their permissions."),
    **PLACE_PROBLEMS,
    "not-a-video": ("files that are not videos", "Remove them."),
    "truncated-video": ("videos that cannot be decoded completely", "Copy them again or remove them."),
    "too-long": (
        f"videos with more than {video.MAX_FRAMES:,} frames or {video.MAX_PIXELS:,} pixels in all, which are not decoded",
        "Cut them into shorter ones, or scale them down.",
    ),
    "no-strip": ("images that are neither animated nor a row of square frames", "Remove them, or export them as videos."),
    "single-frame": ("videos with a single frame", "Remove them."),
    "uneven-frames": ("videos whose frames differ in size", "Export them again with one frame size."),
}
MISSING_IMAGE = images.ImageCheck("missing-file", "no path in this row")
MEDIA: dict[Kind, Medium] = {
    "image": Medium(
        images.check,
        MISSING_IMAGE,
        IMAGE_PROBLEMS,
        IMAGE_TRAITS,
        {
            HASH: ("pixels", pl.String),
            WIDTH: ("width", pl.Int32),
            HEIGHT: ("height", pl.Int32),
            CHANNELS: ("channels", pl.Int32),
            LOW: ("low", pl.Float64),
            HIGH: ("high", pl.Float64),
        },
    ),
    # Masks are read in their own format (palette, 16 bits, transparency), so these traits are not reported.
    "mask": Medium(
        images.check,
        MISSING_IMAGE,
        {slug: (what.replace("images", "masks"), remedy) for slug, (what, remedy) in IMAGE_PROBLEMS.items()},
        facts={MASK_WIDTH: ("width", pl.Int32), MASK_HEIGHT: ("height", pl.Int32)},
    ),
    "audio": Medium(
        audio.check,
        audio.AudioCheck("missing-file", "no path in this row"),
        AUDIO_PROBLEMS,
        AUDIO_TRAITS,
        {HASH: ("samples", pl.String), SECONDS: ("seconds", pl.Float64), RATE: ("rate", pl.Int32)},
    ),
    "video": Medium(
        video.check,
        video.VideoCheck("missing-file", "no path in this row"),
        VIDEO_PROBLEMS,
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
