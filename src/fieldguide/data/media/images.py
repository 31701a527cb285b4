"""Image files: checking and loading with Pillow in threads (decoding releases the GIL).

Images are loaded upright according to their EXIF orientation, transparency is composited over white, CMYK and palettes
become RGB, and animations contribute their first frame. Values of more than 8 bits (16-bit and 32-bit integers, floats, and
the colors of 16-bit PNG and TIFF files) are scaled to 8 bits by a `Scale` that is learned from the training images.
`check` records each of these conversions, and names formats that are not read.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from fieldguide.core.archives import read_array
from fieldguide.core.errors import DataError
from fieldguide.core.threads import map_threads
from fieldguide.data.media.deep_images import ARRAY, describe_tiff, find_loss, has_other_channels, read_light_values

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 90_000_000  # maximum pixels per image; protects against decompression bombs
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
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
    "MPO": (".jpg", ".jpeg", ".mpo"),
}
SUPPORTED_SUFFIXES = frozenset(s for suffixes in FORMAT_SUFFIXES.values() for s in suffixes)
ARRAY_SUFFIX = ".npy"  # arrays are read as images in class folders, tables and masks
READABLE_SUFFIXES = SUPPORTED_SUFFIXES | {ARRAY_SUFFIX}
UNSUPPORTED_FORMATS = {  # suffix -> name of an image format that is not read
    ".dcm": "DICOM",
    ".dicom": "DICOM",
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".nrrd": "NRRD",
    ".npz": "NumPy archive",
    ".mat": "MATLAB",
    ".czi": "Zeiss CZI",
    ".nd2": "Nikon ND2",
    ".lif": "Leica LIF",
    ".svs": "Aperio SVS",
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    ".pam": "PAM",
    ".dng": "camera raw",
    ".cr2": "camera raw",
    ".nef": "camera raw",
    ".arw": "camera raw",
    ".psd": "Photoshop",
    ".svg": "SVG",
}
IMAGE_LIKE_SUFFIXES = READABLE_SUFFIXES | UNSUPPORTED_FORMATS.keys()
Fit = Literal["crop", "pad", "stretch"]
Scale = tuple[float, float]  # the values that become 0 and 255
IGNORED_EXTREMES = 1e-4  # fraction of an image's values at either end that do not count for its range, such as hot pixels
OUTLIER_FACTOR, OUTLIER_FRACTION = 8, 0.02  # an image's range is an outlier if it is this often that of the 98 % lowest


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
    traits: tuple[str, ...] = ()  # any of: deep transparent other-channels cmyk animated rotated wrong-extension
    low: float | None = None  # range of the values of an image with more than 8 bits, without a few extremes
    high: float | None = None


def check(paths: Sequence[str | Path]) -> list[ImageCheck]:
    """Decode every file completely, which is the only way to detect truncation. Never raises for unusable files."""
    with suppress_warnings():
        return map_threads(check_one, paths)


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
    suffix = find_suffix(path)
    if suffix in UNSUPPORTED_FORMATS:
        return ImageCheck("unsupported-image", UNSUPPORTED_FORMATS[suffix], size, sha)
    try:
        with open_image(io.BytesIO(content), suffix) as image:
            if image.width * image.height > MAX_PIXELS:
                return ImageCheck("too-many-pixels", f"{image.width} x {image.height}", size, sha)
            if (pages := count_pages(image)) > 1:
                return ImageCheck("several-pages", f"{pages} pages", size, sha)
            if named := find_loss(image):
                return ImageCheck("unsupported-image", named, size, sha)
            deep = read_light_values(image)
            traits = find_traits(image, suffix, deep is not None)
            image.load()
            width, height, mode = *image.size, image.mode
            shape = (mode, image.size, image.getpalette() if mode == "P" else None)
            pixels = hashlib.blake2b(repr(shape).encode(), digest_size=16)
            pixels.update(image.tobytes() if deep is None else np.ascontiguousarray(deep).data)
            low, high = None, None
            if "deep" in traits:
                low, high = find_range(np.asarray(image) if deep is None else deep)
            if "rotated" in traits and image.getexif().get(0x0112, 1) >= 5:  # rotated by 90 degrees
                width, height = height, width
            channels = 1 if mode in GRAY_MODES or (deep is not None and deep.ndim == 2) else 3
            form = image.format or ""
            return ImageCheck("", "", size, sha, pixels.hexdigest(), width, height, channels, form, traits, low, high)
    except UnidentifiedImageError:
        if named := recognize_unsupported(content) or describe_tiff(content):
            return ImageCheck("unsupported-image", named, size, sha)
        known = suffix in READABLE_SUFFIXES
        return ImageCheck("corrupt-image" if known else "not-an-image", "the content is not a known image format", size, sha)
    except Image.DecompressionBombError:
        return ImageCheck("too-many-pixels", "more pixels than Pillow allows", size, sha)
    except DECODE_ERRORS as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        return ImageCheck("truncated-image" if cut else "corrupt-image", str(error)[:100], size, sha)


def find_suffix(path: str | Path) -> str:
    """Return the suffix in lower case; `.nii.gz` counts as one."""
    name = str(path).lower()
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


def recognize_unsupported(content: bytes) -> str | None:
    """Return the name of an unsupported image format by the first bytes of a file, or None."""
    if content[128:132] == b"DICM":
        return "DICOM"
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        return "HEIC"
    starts = {
        b"8BPS": "Photoshop",
        b"NRRD": "NRRD",
        b"\x76\x2f\x31\x01": "OpenEXR",
        b"#?RADIANCE": "Radiance HDR",
        b"P7\n": "PAM",
        b"<svg": "SVG",
        b"%!PS": "PostScript (EPS)",
        b"\xc5\xd0\xd3\xc6": "PostScript (EPS)",
        b"%PDF": "PDF",
    }
    return next((name for start, name in starts.items() if content.startswith(start)), None)


@cache
def list_formats() -> tuple[str, ...]:
    """Return the formats that Pillow may try to decode. Its reader of EPS, for example, would run Ghostscript."""
    Image.init()
    return tuple(form for form in FORMAT_SUFFIXES if form in Image.OPEN)


@contextmanager
def open_image(source: str | Path | io.BytesIO, suffix: str | None = None) -> Iterator[Image.Image]:
    """Open a file, or its content with the suffix of the file's name: an image, or an array (.npy) as an image.

    Raises ValueError for an array that has not the shape of an image.
    """
    if (find_suffix(str(source)) if suffix is None else suffix) == ARRAY_SUFFIX:
        with np.errstate(all="ignore"):
            yield from_array(load_array(source))
    elif isinstance(source, io.BytesIO):
        with Image.open(source, formats=list_formats()) as image:
            yield image
    else:
        with open(source, "rb") as file, Image.open(file, formats=list_formats()) as image:
            yield image


def load_array(source: str | Path | io.BytesIO) -> np.ndarray:
    """Return the array of an .npy file, or of its content. Raises `ValueError` if it is damaged."""
    if isinstance(source, io.BytesIO):
        return read_array(source, source.getbuffer().nbytes)
    with open(source, "rb") as file:
        return read_array(file, os.fstat(file.fileno()).st_size)


def from_array(array: np.ndarray) -> Image.Image:
    """Return an array as an image: H W, H W C or C H W with 1, 3 or 4 channels (4 only as 8-bit RGBA)."""
    shape = array.shape
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if (
        not array.size
        or array.dtype.kind not in "buif"
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    ):
        raise ValueError(f"an array of shape {shape} and type {array.dtype} is not an image (H W, H W 3 or 3 H W)")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint8:
        image = Image.fromarray(array)
    elif array.ndim == 3:
        if array.shape[2] == 4:
            raise ValueError(f"an array of shape {shape} and type {array.dtype} is not an image: 4 channels require uint8")
        image = to_8_bit(array)
        image.info[ARRAY] = array
    elif array.dtype == np.uint16:
        image = Image.fromarray(array)
    elif array.dtype.kind in "iu" and abs(array.astype(np.float64)).max() < 2**31:
        image = Image.fromarray(array.astype(np.int32))
    else:
        image = Image.fromarray(array.astype(np.float32))
    image.format = "NPY"
    return image


def count_pages(image: Image.Image) -> int:
    """Return the number of full-size pages of a TIFF; reduced copies of the first page, such as thumbnails, do not count."""
    if image.format != "TIFF" or getattr(image, "n_frames", 1) == 1:
        return 1
    size, pages = image.size, 1
    for number in range(1, getattr(image, "n_frames", 1)):
        image.seek(number)
        reduced = bool(getattr(image, "tag_v2", {}).get(254, 0) & 1) or (image.width < size[0] and image.height < size[1])
        pages += not reduced
    image.seek(0)
    return pages


def find_range(array: np.ndarray) -> tuple[float, float]:
    """Return the lowest and highest value of an image without `IGNORED_EXTREMES` at either end; (0, 0) without any value."""
    values = array[np.isfinite(array)] if array.dtype.kind == "f" else array.ravel()
    if not values.size:
        return 0.0, 0.0
    skipped = int(IGNORED_EXTREMES * values.size)
    if not skipped:
        return float(values.min()), float(values.max())
    ordered = np.partition(values, (skipped, values.size - 1 - skipped))
    return float(ordered[skipped]), float(ordered[values.size - 1 - skipped])


def learn_scale(lows: np.ndarray, highs: np.ndarray) -> Scale | None:
    """Return the scale of images with these ranges (NaN for those of 8 bits), or None if all have 8 bits.

    Single images with extreme values do not count: they would leave few gray levels to all others.
    """
    deep = ~np.isnan(highs)
    if not deep.any():
        return None
    low, high = float(lows[deep].min()), float(highs[deep].max())
    usual = float(np.quantile(highs[deep], 1 - OUTLIER_FRACTION, method="lower"))
    lowest = float(np.quantile(lows[deep], OUTLIER_FRACTION, method="higher"))
    if deep.sum() > 1 and usual > lowest:
        if high - lowest > OUTLIER_FACTOR * (usual - lowest):
            high = usual
        if usual - low > OUTLIER_FACTOR * (usual - lowest):
            low = lowest
    return low, max(high, low + (1.0 if high <= low else 0.0))


def find_traits(image: Image.Image, suffix: str, is_deep: bool = False) -> tuple[str, ...]:
    """Return the traits of an image that are reported as findings."""
    seen = []
    if image.mode in HIGH_BIT_DEPTH_MODES or is_deep:
        seen.append("deep")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        seen.append("transparent")
    if has_other_channels(image):
        seen.append("other-channels")
    if image.mode == "CMYK":
        seen.append("cmyk")
    if image.format not in ("MPO", "TIFF") and getattr(image, "n_frames", 1) > 1:
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
    scale: Scale | None = None,
) -> torch.Tensor:
    """Load images as one uint8 tensor, N C S S, with 1 (gray) or 3 (RGB) channels and side S in pixels.

    `fit` selects how images that are not square are handled: "crop" scales the shorter side to S and crops the center,
    "pad" scales the longer side and pads with white, "stretch" changes the aspect ratio. `resize`, if given, replaces
    this: it returns an S x S image. `scale` holds the values of more than 8 bits that become 0 and 255; without it they are
    scaled by the range of their format.

    Raises DataError naming the files that cannot be read.
    """
    import torch

    out = np.empty((len(paths), channels, side, side), dtype=np.uint8)

    def one(index: int) -> None:
        out[index] = load_pixels(paths[index], side, channels, fit, resize, scale)

    decode_all(paths, one)
    return torch.from_numpy(out)


def load_each(
    paths: Sequence[str | Path],
    channels: int,
    resize: Callable[[Image.Image], Image.Image],
    scale: Scale | None = None,
) -> list[torch.Tensor]:
    """Load images that `resize` brings to sizes of their own, as uint8, C H W each. Otherwise like `load`."""
    import torch

    out: list[np.ndarray] = [np.empty(0)] * len(paths)

    def one(index: int) -> None:
        with open_image(paths[index]) as image:
            check_pixels(image)
            array = np.asarray(resize(convert_mode(image, "L" if channels == 1 else "RGB", scale)))
            out[index] = np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))

    decode_all(paths, one)
    return [torch.from_numpy(array) for array in out]


def decode_all(paths: Sequence[str | Path], decode: Callable[[int], None]) -> None:
    """Call `decode` with the number of each file, in threads. Raises DataError naming the files that cannot be read."""
    problems: list[str] = []

    def one(index: int) -> None:
        try:
            decode(index)
        except DECODE_ERRORS as error:
            problems.append(f"{paths[index]}: {error}")

    with suppress_warnings():
        map_threads(one, range(len(paths)))
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError("images that cannot be read:\n" + "\n".join(sorted(problems)[:5]) + more)


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError for an opened image with more than `MAX_PIXELS` pixels."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}")


def load_pixels(
    source: str | Path | Image.Image,
    side: int,
    channels: int = 3,
    fit: Fit = "crop",
    resize: Callable[[Image.Image], Image.Image] | None = None,
    scale: Scale | None = None,
) -> np.ndarray:
    """Load one image as uint8, C S S. Raises ValueError if it has more than `MAX_PIXELS` pixels."""
    if isinstance(source, Image.Image):
        return to_array(source, side, channels, fit, resize, scale)
    with open_image(source) as image:
        check_pixels(image)
        if resize is None and image.format == "JPEG" and min(image.size) >= 4 * side:
            image.draft(None, (2 * side, 2 * side))  # libjpeg decodes at reduced size, which is much faster
        return to_array(image, side, channels, fit, resize, scale)


def to_array(
    image: Image.Image,
    side: int,
    channels: int,
    fit: Fit,
    resize: Callable[[Image.Image], Image.Image] | None = None,
    scale: Scale | None = None,
) -> np.ndarray:
    """Convert an opened image to uint8, C S S."""
    image = convert_mode(image, "L" if channels == 1 else "RGB", scale)
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


def convert_mode(image: Image.Image, mode: str, scale: Scale | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit gray ("L") or "RGB", upright and composited over white.

    `scale` holds the values of more than 8 bits that become 0 and 255.
    """
    deep = read_light_values(image) if scale is not None else None
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if deep is not None:
        alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
        image = to_8_bit(deep, scale)
        if alpha is not None:
            image.putalpha(alpha)
        image.getexif()[0x0112] = orientation
    if orientation not in (0, 1):
        image = ImageOps.exif_transpose(image)
    if image.mode in HIGH_BIT_DEPTH_MODES:
        image = to_8_bit(np.asarray(image), scale, image.mode)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def to_8_bit(array: np.ndarray, scale: Scale | None = None, mode: str = "") -> Image.Image:
    """Scale values to 8 bits, by `scale` if there is one.

    Without it, as in runs that were trained before scales were learned: 16-bit images by the format's range, 32-bit and
    float ones by 255, 65535 or their own range.
    """
    array = np.nan_to_num(array.astype(np.float64))
    if scale is not None:
        low, high = scale
        return Image.fromarray(np.rint((array.clip(low, high) - low) * (255.0 / (high - low))).astype(np.uint8))
    low, high = array.min(initial=0.0), array.max(initial=0.0)
    if mode.startswith("I;16") or (mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif mode == "I" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif mode == "F" and low >= 0 and high <= 1:
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
