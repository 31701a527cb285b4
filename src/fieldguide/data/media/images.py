"""Pictures: full checking and loading with Pillow, in threads (it decodes without Python's lock).

What a network sees: pictures turned as their EXIF says; transparency over white; 16-bit and float greys
scaled by their range; CMYK and palettes as RGB; the first frame of an animation. `check` notes each.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fieldguide.core.errors import DataError

if TYPE_CHECKING:
    import torch

PIXELS = 90_000_000  # larger is refused: a small file can hold a picture that fills the memory
THREADS = min(16, (os.cpu_count() or 2) * 2)
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
GREY = ("1", "L", "LA", *DEEP)
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    MemoryError,
    Image.DecompressionBombError,
)
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "ICO": (".ico",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
    "MPO": (".jpg", ".jpeg", ".mpo"),
}
KNOWN = frozenset(s for suffixes in SUFFIXES.values() for s in suffixes)
Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True, slots=True)
class Picture:
    """What the check of one file found. `problem` is "" for a picture that can be used."""

    problem: str = ""  # slug of a doctor's check: empty-file, not-an-image, truncated-image, ...
    detail: str = ""
    bytes: int = 0
    sha256: str = ""
    pixels: str = ""  # digest of the decoded pixels
    width: int = 0
    height: int = 0
    channels: int = 3
    form: str = ""  # what Pillow calls its format
    traits: tuple[str, ...] = ()  # of: deep transparent palette cmyk animated rotated wrong-extension


def check(paths: Sequence[str | Path]) -> list[Picture]:
    """Decode every file fully: the only way to find truncation. Never raises for what a file holds."""
    with quiet(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(check_one, paths, chunksize=64))


def check_one(path: str | Path) -> Picture:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        there = os.path.exists(path)
        return Picture("unreadable-file" if there else "missing-file", error.strerror or str(error))
    sha = hashlib.sha256(content).hexdigest()
    size = len(content)
    if not content:
        return Picture("empty-file", "0 bytes", 0, sha)
    suffix = os.path.splitext(str(path))[1].lower()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > PIXELS:
                return Picture("too-many-pixels", f"{image.width} x {image.height}", size, sha)
            traits = traits_of(image, suffix)
            image.load()
            width, height, mode = *image.size, image.mode
            shape = (mode, image.size, image.getpalette() if mode == "P" else None)
            pixels = hashlib.blake2b(repr(shape).encode(), digest_size=16)
            pixels.update(image.tobytes())
            if "rotated" in traits and image.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                width, height = height, width
            channels = 1 if mode in GREY else 3
            return Picture("", "", size, sha, pixels.hexdigest(), width, height, channels, image.format or "", traits)
    except UnidentifiedImageError:
        known = suffix in KNOWN
        return Picture("corrupt-image" if known else "not-an-image", "no picture format begins so", size, sha)
    except Image.DecompressionBombError:
        return Picture("too-many-pixels", "more pixels than Pillow opens", size, sha)
    except BROKEN as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        return Picture("truncated-image" if cut else "corrupt-image", str(error)[:100], size, sha)


def traits_of(image: Image.Image, suffix: str) -> tuple[str, ...]:
    seen = []
    if image.mode in DEEP:
        seen.append("deep")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        seen.append("transparent")
    if image.mode == "CMYK":
        seen.append("cmyk")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        seen.append("animated")
    if image.getexif().get(0x0112, 1) not in (0, 1):
        seen.append("rotated")
    if suffix and suffix not in SUFFIXES.get(image.format or "", (suffix,)):
        seen.append("wrong-extension")
    return tuple(seen)


def load(
    paths: Sequence[str | Path],
    side: int,
    channels: int = 3,
    *,
    fit: Fit = "crop",
    resize: Callable[[Image.Image], Image.Image] | None = None,
) -> torch.Tensor:
    """Pictures as one uint8 tensor, N C S S; channels 1 (grey) or 3 (RGB), side S in pixels.

    `fit` says what becomes of pictures that are not square: "crop" scales the shorter side to S and keeps the
    middle, "pad" scales the longer side and fills up with white, "stretch" changes the proportions. `resize` makes a picture
    of S x S of each in another way.
    Raises DataError naming every file that cannot be read.
    """
    import torch

    out = np.empty((len(paths), channels, side, side), dtype=np.uint8)
    problems: list[str] = []

    def one(index: int) -> None:
        try:
            out[index] = pixels(paths[index], side, channels, fit, resize)
        except BROKEN as error:
            problems.append(f"{paths[index]}: {error}")

    with quiet(), ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(one, range(len(paths)), chunksize=64):
            pass
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError("pictures that cannot be read:\n" + "\n".join(sorted(problems)[:5]) + more)
    return torch.from_numpy(out)


def pixels(
    source: str | Path | Image.Image,
    side: int,
    channels: int = 3,
    fit: Fit = "crop",
    resize: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """One picture as uint8, C S S."""
    if isinstance(source, Image.Image):
        return as_array(source, side, channels, fit, resize)
    with open(source, "rb") as file, Image.open(file) as image:
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {PIXELS:,} allowed")
        if resize is None and image.format == "JPEG" and min(image.size) >= 4 * side:
            image.draft(None, (2 * side, 2 * side))  # libjpeg decodes at a fraction: many times faster
        return as_array(image, side, channels, fit, resize)


def as_array(
    image: Image.Image, side: int, channels: int, fit: Fit, resize: Callable[[Image.Image], Image.Image] | None = None
) -> np.ndarray:
    image = plain(image, "L" if channels == 1 else "RGB")
    if resize is not None:
        image = resize(image)
    if image.size != (side, side):
        if fit == "stretch" or image.width == image.height:
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        elif fit == "crop":
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        else:
            image = ImageOps.pad(
                image, (side, side), Image.Resampling.BILINEAR, color=255 if channels == 1 else (255, 255, 255)
            )
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def plain(image: Image.Image, mode: str) -> Image.Image:
    """A picture of any mode as 8-bit grey ("L") or "RGB", upright, over white."""
    image.load()
    if image.getexif().get(0x0112, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        image = eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def eight_bit(image: Image.Image) -> Image.Image:
    """16 bits to 8 by the range of the format; 32-bit and float greys by 255, 65535 or their own range."""
    array = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = array.min(initial=0.0), array.max(initial=0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif image.mode == "I" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return Image.fromarray(np.rint((array - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from Pillow: what they would say is reported by `check`. Truncated files are refused."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
