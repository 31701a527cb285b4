"""Films: files of moving pictures, animated pictures, or strips (frames side by side in one picture).

GIF, WebP, PNG and JPEG are read by Pillow; MP4, AVI, MOV, MKV and WebM by PyAV, which is an extra.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fieldguide.core.errors import DataError
from fieldguide.data.media import images

FILMS = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))
INSTALL = "films need PyAV: pip install 'fieldguide[video]'"


@dataclass(frozen=True, slots=True)
class Film:
    """What the check of one file found. `problem` is "" for a film that can be used."""

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


def check(paths: Sequence[str | Path]) -> list[Film]:
    """Decode every file fully. Never raises for what a file holds; raises `DataError` where PyAV is needed and missing."""
    if any(Path(p).suffix.lower() in FILMS for p in paths):
        try:
            import av  # noqa: F401
        except ImportError:
            raise DataError(INSTALL) from None
    with images.quiet(), ThreadPoolExecutor(images.THREADS) as pool:
        return list(pool.map(check_one, paths))


def check_one(path: str | Path) -> Film:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Film("unreadable-file" if os.path.exists(path) else "missing-file", error.strerror or str(error))
    sha, size = hashlib.sha256(content).hexdigest(), len(content)
    if not content:
        return Film("empty-file", "0 bytes", 0, sha)
    digest, shapes, colour = hashlib.blake2b(digest_size=16), [], False
    try:
        for frame in frames_of(path, content):
            digest.update(frame.tobytes())
            shapes.append(frame.size)
            colour = colour or frame.mode not in images.GREY
    except UnidentifiedImageError:
        return Film("not-a-film", "no picture or film format begins so", size, sha)
    except NoStrip as error:
        return Film("no-strip", str(error), size, sha)
    except (*images.BROKEN, ValueError) as error:
        return Film("truncated-film", str(error)[:100], size, sha)
    if len(shapes) < 2:
        return Film("single-frame", f"{len(shapes)} frames", size, sha)
    if len(set(shapes)) > 1:
        return Film("uneven-frames", "frames of different sizes", size, sha)
    return Film("", "", size, sha, digest.hexdigest(), *shapes[0], 3 if colour else 1, len(shapes))


class NoStrip(ValueError):
    """A picture that neither moves nor is a row of square frames."""


def frames_of(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """The frames of a file, one after another."""
    if Path(path).suffix.lower() in FILMS:
        import av

        try:
            with av.open(io.BytesIO(content) if content is not None else str(path)) as film:
                for frame in film.decode(video=0):
                    yield frame.to_image()
        except av.FFmpegError as error:
            raise ValueError(str(error)) from error
        return
    with Image.open(io.BytesIO(content) if content is not None else path) as image:
        count = getattr(image, "n_frames", 1)
        if count > 1:
            for number in range(count):
                image.seek(number)
                yield image.convert("RGB")
            return
        image.load()
        if image.width % image.height or image.width == image.height:
            raise NoStrip(f"{image.width} x {image.height} pixels are no row of square frames")
        for left in range(0, image.width, image.height):
            yield image.crop((left, 0, left + image.height, image.height))


def load(paths: Sequence[str | Path], side: int, channels: int) -> list[np.ndarray]:
    """Films as uint8, F C S S each: frames cut to their middle square and scaled."""

    def one(path: str | Path) -> np.ndarray:
        return np.stack([images.as_array(frame, side, channels, "crop") for frame in frames_of(path)])

    with images.quiet(), ThreadPoolExecutor(images.THREADS) as pool:
        return list(pool.map(one, paths))
