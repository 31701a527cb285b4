"""Image files: checking and loading with Pillow in threads (decoding releases the GIL).

Images are loaded upright according to their EXIF orientation, transparency is composited over white, 16-bit and float
gray values are scaled by their range, CMYK and palettes become RGB, and animations contribute their first frame.
`check` records each of these conversions.
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

MAX_PIXELS = 90_000_000  # maximum pixels per image; protects against decompression bombs
THREADS = min(16, (os.cpu_count() or 2) * 2)
HIGH_BIT_DEPTH_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
GRAY_MODES = ("1", "L", "LA", *HIGH_BIT_DEPTH_MODES)
DECODE_ERRORS = (
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
FORMAT_SUFFIXES = {
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
SUPPORTED_SUFFIXES = frozenset(s for suffixes in FORMAT_SUFFIXES.values() for s in suffixes)
Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """The result of checking one file. `problem` is "" if the image can be used."""

    problem: str = ""  # name of a data check: empty-file, not-an-image, truncated-image, ...
    detail: str = ""
    bytes: int = 0
    sha256: str = ""
    pixels: str = ""  # digest of the decoded pixels
    width: int = 0
    height: int = 0
    channels: int = 3
    form: str = ""  # Pillow's name of the format
    traits: tuple[str, ...] = ()  # any of: deep transparent palette cmyk animated rotated wrong-extension


def check(paths: Sequence[str | Path]) -> list[ImageCheck]:
    """Decode every file completely, which is the only way to detect truncation. Never raises for unusable files."""
    with suppress_warnings(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(check_one, paths, chunksize=64))


def check_one(path: str | Path) -> ImageCheck:
    """Decode one file completely and return the result of the check."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        there = os.path.exists(path)
        return ImageCheck("unreadable-file" if there else "missing-file", error.strerror or str(error))
    sha = hashlib.sha256(content).hexdigest()
    size = len(content)
    if not content:
        return ImageCheck("empty-file", "0 bytes", 0, sha)
    suffix = os.path.splitext(str(path))[1].lower()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                return ImageCheck("too-many-pixels", f"{image.width} x {image.height}", size, sha)
            traits = find_traits(image, suffix)
            image.load()
            width, height, mode = *image.size, image.mode
            shape = (mode, image.size, image.getpalette() if mode == "P" else None)
            pixels = hashlib.blake2b(repr(shape).encode(), digest_size=16)
            pixels.update(image.tobytes())
            if "rotated" in traits and image.getexif().get(0x0112, 1) >= 5:  # rotated by 90 degrees
                width, height = height, width
            channels = 1 if mode in GRAY_MODES else 3
            return ImageCheck("", "", size, sha, pixels.hexdigest(), width, height, channels, image.format or "", traits)
    except UnidentifiedImageError:
        known = suffix in SUPPORTED_SUFFIXES
        return ImageCheck("corrupt-image" if known else "not-an-image", "the content is not a known image format", size, sha)
    except Image.DecompressionBombError:
        return ImageCheck("too-many-pixels", "more pixels than Pillow allows", size, sha)
    except DECODE_ERRORS as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        return ImageCheck("truncated-image" if cut else "corrupt-image", str(error)[:100], size, sha)


def find_traits(image: Image.Image, suffix: str) -> tuple[str, ...]:
    """Return the traits of an image that are reported as findings."""
    seen = []
    if image.mode in HIGH_BIT_DEPTH_MODES:
        seen.append("deep")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        seen.append("transparent")
    if image.mode == "CMYK":
        seen.append("cmyk")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        seen.append("animated")
    if image.getexif().get(0x0112, 1) not in (0, 1):
        seen.append("rotated")
    if suffix and suffix not in FORMAT_SUFFIXES.get(image.format or "", (suffix,)):
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
    """Load images as one uint8 tensor, N C S S, with 1 (gray) or 3 (RGB) channels and side S in pixels.

    `fit` selects how images that are not square are handled: "crop" scales the shorter side to S and crops the center,
    "pad" scales the longer side and pads with white, "stretch" changes the aspect ratio. `resize`, if given, replaces
    this: it returns an S x S image.

    Raises DataError naming the files that cannot be read.
    """
    import torch

    out = np.empty((len(paths), channels, side, side), dtype=np.uint8)
    problems: list[str] = []

    def one(index: int) -> None:
        try:
            out[index] = load_pixels(paths[index], side, channels, fit, resize)
        except DECODE_ERRORS as error:
            problems.append(f"{paths[index]}: {error}")

    with suppress_warnings(), ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(one, range(len(paths)), chunksize=64):
            pass
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError("images that cannot be read:\n" + "\n".join(sorted(problems)[:5]) + more)
    return torch.from_numpy(out)


def load_pixels(
    source: str | Path | Image.Image,
    side: int,
    channels: int = 3,
    fit: Fit = "crop",
    resize: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """Load one image as uint8, C S S. Raises ValueError if it has more than `PIXELS` pixels."""
    if isinstance(source, Image.Image):
        return to_array(source, side, channels, fit, resize)
    with open(source, "rb") as file, Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}")
        if resize is None and image.format == "JPEG" and min(image.size) >= 4 * side:
            image.draft(None, (2 * side, 2 * side))  # libjpeg decodes at reduced size, which is much faster
        return to_array(image, side, channels, fit, resize)


def to_array(
    image: Image.Image, side: int, channels: int, fit: Fit, resize: Callable[[Image.Image], Image.Image] | None = None
) -> np.ndarray:
    """Convert an opened image to uint8, C S S."""
    image = convert_mode(image, "L" if channels == 1 else "RGB")
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


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to 8-bit gray ("L") or "RGB", upright and composited over white."""
    image.load()
    if image.getexif().get(0x0112, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
    if image.mode in HIGH_BIT_DEPTH_MODES:
        image = to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale to 8 bits: 16-bit images by the format's range, 32-bit and float ones by 255, 65535 or their own range."""
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
def suppress_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings, which `check` reports as findings, and make it raise for truncated files."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
