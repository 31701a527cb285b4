"""Videos: video files, animated images, and strips (square frames side by side in one image).

GIF, WebP, PNG and JPEG are read by Pillow; MP4, AVI, MOV, MKV and WebM by PyAV, an optional dependency.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fieldguide.core.errors import DataError
from fieldguide.core.threads import map_threads
from fieldguide.data.media import images

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))
MAX_FRAMES, MAX_PIXELS = 20_000, 1 << 32  # of one video; protects against decompression bombs (2,000 frames of 1920 x 1080)
INSTALL_HINT = "reading videos requires PyAV: pip install 'fieldguide[video]'"


@dataclass(frozen=True, slots=True)
class VideoCheck:
    """The result of checking one file. `problem` is "" if the video can be used."""

    problem: str = ""
    detail: str = ""
    bytes: int = 0
    sha256: str = ""
    pixels: str = ""  # digest of all frames
    width: int = 0
    height: int = 0
    channels: int = 3
    frames: int = 0
    traits: tuple[str, ...] = ()


def check(paths: Sequence[str | Path]) -> list[VideoCheck]:
    """Decode every file completely. Never raises for unusable files; raises DataError if PyAV is required but missing."""
    if any(Path(p).suffix.lower() in VIDEO_SUFFIXES for p in paths):
        try:
            import av  # noqa: F401
        except ImportError:
            raise DataError(INSTALL_HINT) from None
    with images.suppress_warnings():
        return map_threads(check_one, paths)


def check_one(path: str | Path) -> VideoCheck:
    """Decode one file completely and return the result of the check."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return VideoCheck("unreadable-file" if os.path.exists(path) else "missing-file", error.strerror or str(error))
    sha, size = hashlib.sha256(content).hexdigest(), len(content)
    if not content:
        return VideoCheck("empty-file", "0 bytes", 0, sha)
    digest, shapes, is_color = hashlib.blake2b(digest_size=16), [], False
    try:
        for frame in read_frames(path, content):
            digest.update(frame.tobytes())
            shapes.append(frame.size)
            is_color = is_color or frame.mode not in images.GRAY_MODES
    except UnidentifiedImageError:
        return VideoCheck("not-a-video", "the content is not a known image or video format", size, sha)
    except TooLongError as error:
        return VideoCheck("too-long", str(error), size, sha)
    except Image.DecompressionBombError:
        return VideoCheck("too-long", "more pixels in a frame than Pillow allows", size, sha)
    except NotAStripError as error:
        return VideoCheck("no-strip", str(error), size, sha)
    except (*images.DECODE_ERRORS, ValueError) as error:
        return VideoCheck("truncated-video", str(error)[:100], size, sha)
    if len(shapes) < 2:
        return VideoCheck("single-frame", f"{len(shapes)} frames", size, sha)
    if len(set(shapes)) > 1:
        return VideoCheck("uneven-frames", "frames with different sizes", size, sha)
    return VideoCheck("", "", size, sha, digest.hexdigest(), *shapes[0], 3 if is_color else 1, len(shapes))


class TooLongError(ValueError):
    """Raised for a video with more frames or pixels than are decoded."""


class NotAStripError(ValueError):
    """Raised for an image that is neither animated nor a row of square frames."""


def read_frames(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Yield the frames of a file in order. Raises `NotAStripError`, `TooLongError`, ValueError or one of `images.DECODE_ERRORS`."""
    return limit_frames(decode_frames(path, content))


def decode_frames(path: str | Path, content: bytes | None) -> Iterator[Image.Image]:
    """Yield the frames of a file in order, however many there are."""
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        import av

        try:
            with av.open(io.BytesIO(content) if content is not None else str(path), "r") as container:
                for frame in container.decode(video=0):
                    yield frame.to_image()
        except av.FFmpegError as error:
            raise ValueError(str(error)) from error
        return
    with images.open_image(io.BytesIO(content) if content is not None else path, Path(path).suffix.lower()) as image:
        if getattr(image, "is_animated", False):
            yield from read_animation(image)
            return
        image.load()
        if image.width % image.height or image.width == image.height:
            raise NotAStripError(f"{image.width} x {image.height} pixels are not a row of square frames")
        for left in range(0, image.width, image.height):
            yield image.crop((left, 0, left + image.height, image.height))


def read_animation(image: Image.Image) -> Iterator[Image.Image]:
    """Yield the frames of an animated image. Their number is not asked for, since counting them may take minutes."""
    number = 0
    while True:
        try:
            image.seek(number)
        except EOFError:
            return
        yield image.convert("RGB")
        number += 1


def limit_frames(frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """Yield frames up to `MAX_PIXELS` pixels and `MAX_FRAMES` frames. Raises `TooLongError` for more."""
    pixels = 0
    for number, frame in enumerate(frames, 1):
        pixels += frame.width * frame.height
        if number > MAX_FRAMES or pixels > MAX_PIXELS:
            raise TooLongError(f"more than {number - 1:,} frames of {frame.width} x {frame.height} pixels")
        yield frame


def load(paths: Sequence[str | Path], side: int, channels: int) -> list[np.ndarray]:
    """Load videos as uint8 arrays, F C S S each; frames are cropped to the center square and scaled."""

    def one(path: str | Path) -> np.ndarray:
        return np.stack([images.to_array(frame, side, channels, "crop") for frame in read_frames(path)])

    with images.suppress_warnings():
        return map_threads(one, paths)
