"""Images with more than 8 bits per value that Pillow would read with 8 bits, with a wrong sign, or not at all.

Colors and gray with alpha of 16 bits (PNG, TIFF, PPM) are read with their full depth, unsigned 32-bit and signed 8-bit TIFF files
with the right sign. What Pillow cannot read without loss is named, so that it can be rejected.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
from PIL import Image

ARRAY = "array"  # key in `Image.info` of an array H W 3 with colors of more than 8 bits
MAX_TAG_VALUES = 16  # values of a TIFF tag that are read; images have fewer channels
FORMAT_NAMES = {1: "", 2: "signed ", 3: "float "}  # sample formats of TIFF
SAMPLES, BITS, EXTRA, FORMAT, PLANES, PHOTOMETRIC = 277, 258, 338, 339, 284, 262  # tags of TIFF
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC


def find_loss(image: Image.Image) -> str | None:
    """Return what a file that Pillow opens holds and would not be read as stored, or None. Call it before it is decoded."""
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits = max(tags.get(BITS) or (8,))
    if bits > 8 and image.mode == "CMYK":
        return f"CMYK with {bits} bits"
    if bits > 8 and tags.get(PLANES) == 2 and (tags.get(SAMPLES) or 1) > 1:
        return f"TIFF with {bits} bits and separate color planes"
    if image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA", "CMYK", "YCbCr"):
        depth = find_jpeg2000_bits(image)
        return f"JPEG 2000 with colors of {depth} bits" if depth > 8 else None
    return None


def find_jpeg2000_bits(image: Image.Image) -> int:
    """Return the most bits per value in the header of a JPEG 2000 image; 0 if it is not found."""
    file: Any = getattr(image, "fp", None)
    if file is None:
        return 0
    before = file.tell()
    file.seek(0)
    content = file.read(1 << 16)
    file.seek(before)
    at = content.find(b"\xff\x4f\xff\x51")  # start of the code stream and of its sizes
    if at < 0 or len(content) < at + 42:
        return 0
    count = struct.unpack_from(">H", content, at + 40)[0]
    return max(((depth & 127) + 1 for depth in content[at + 42 : at + 42 + 3 * count : 3]), default=0)


def has_other_channels(image: Image.Image) -> bool:
    """Return whether a TIFF file has channels besides gray or red, green and blue, and transparency; they are not read."""
    if image.format != "TIFF":
        return False
    tags: Any = getattr(image, "tag_v2", {})
    extra = tags.get(EXTRA) or ()
    return any(kind not in (1, 2) for kind in ((extra,) if isinstance(extra, int) else extra))


def describe_tiff(content: bytes) -> str | None:
    """Return the name of a TIFF layout that Pillow does not open, such as "TIFF with 2 channels of 16 bits", or None."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        return "BigTIFF" if content[:4] in (b"II+\0", b"MM\0+") else None
    try:
        start = struct.unpack_from(order + "I", content, 4)[0]
        tags = {}
        for number in range(struct.unpack_from(order + "H", content, start)[0]):
            tag, kind, count = struct.unpack_from(order + "HHI", content, start + 2 + 12 * number)
            code, size = {3: ("H", 2), 4: ("I", 4)}.get(kind, ("", 0))
            place = start + 10 + 12 * number
            if tag in (BITS, SAMPLES, FORMAT) and code and count > 0:
                if size * count > 4:
                    place = struct.unpack_from(order + "I", content, place)[0]
                tags[tag] = struct.unpack_from(f"{order}{min(count, MAX_TAG_VALUES)}{code}", content, place)
    except struct.error:
        return None
    bits, samples, forms = tags.get(BITS, (1,)), tags.get(SAMPLES, (1,))[0], tags.get(FORMAT, (1,))
    if forms[0] not in FORMAT_NAMES or (bits[0] <= 8 and samples in (1, 3, 4) and forms[0] == 1):
        return None  # Pillow reads this layout: the file is damaged
    channels = f"{samples} channels" if samples > 1 else "one channel"
    return f"TIFF with {channels} of {bits[0]} {FORMAT_NAMES[forms[0]]}bits"


def find_raw_mode(image: Image.Image) -> str | None:
    """Return how an image that is not yet decoded is stored if it has colors, or gray and alpha, of 16 bits, else None.

    Pillow decodes only the higher byte of such values.
    """
    tiles: list[Any] | None = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    raw = tiles[0].args if isinstance(tiles[0].args, str) else tiles[0].args[0] if tiles[0].args else None
    return raw if isinstance(raw, str) and raw.startswith(("RGB", "LA")) and ";16" in raw else None


def read_deep_values(image: Image.Image) -> np.ndarray | None:  # -> H W or H W 3
    """Return the values as stored of an image that Pillow would decode with 8 bits or with a wrong sign; None for any other image.

    Call it before the image is decoded.
    """
    if ARRAY in image.info:
        return image.info[ARRAY]
    file: Any = getattr(image, "fp", None)
    if file is None:
        return None
    if image.format == "PPM":
        return read_portable_map(image, file)
    if image.format == "TIFF" and image.mode in ("L", "I"):
        return read_signs(image)
    raw = find_raw_mode(image)
    if raw is None:
        return None
    image.load()
    if raw.startswith("LA"):  # 4 bytes per pixel, like RGBA
        parts = decode_again(image, file, "RGBA").astype(np.uint16)
        return parts[..., 0] << 8 | parts[..., 1]
    # The lower bytes are the higher bytes of the other byte order.
    name, order = raw[:-1].replace("RGBa", "RGBA"), raw[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    high, low = (decode_again(image, file, name + o).astype(np.uint16) for o in (order, "B" if order == "L" else "L"))
    values = high << 8 | low
    if raw.startswith("RGBa"):  # colors multiplied by their opacity
        opacity = np.maximum(values[..., 3:], 1).astype(np.float64)
        return np.minimum(values[..., :3] * 65535.0 / opacity, 65535).round().astype(np.uint16)
    return values[..., :3]


def read_light_values(image: Image.Image) -> np.ndarray | None:  # -> H W or H W 3
    """Return the values of `read_deep_values`, larger for lighter pixels: gray TIFF files may store white as zero.

    Pillow inverts such files of 8 bits only. Masks are read as stored.
    """
    values = read_deep_values(image)
    tags: Any = getattr(image, "tag_v2", {})
    if (
        image.format != "TIFF"
        or tags.get(PHOTOMETRIC) != WHITE_IS_ZERO
        or image.mode not in ("I;16", "I;16B", "I;16L", "I;16N", "I")
    ):
        return values
    stored = np.asarray(image) if values is None else values
    return np.iinfo(stored.dtype).max - stored if stored.dtype.kind == "u" else values


def decode_again(image: Image.Image, file: Any, raw: str) -> np.ndarray:
    """Return the pixels of an opened file, decoded as if they were stored as `raw`."""
    file.seek(0)
    with Image.open(file, formats=(image.format or "",)) as again:
        if raw.startswith("RGBA"):
            again._mode = "RGBA"
        tiles: list[Any] = again.tile
        again.tile = [t._replace(args=raw if isinstance(t.args, str) else (raw, *t.args[1:])) for t in tiles]
        return np.asarray(again)


def read_signs(image: Image.Image) -> np.ndarray | None:
    """Return the values of a gray TIFF file if Pillow gives them a wrong sign: unsigned 32 bits, or signed 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})
    bits, form = (tags.get(BITS) or (1,))[0], (tags.get(FORMAT) or (1,))[0]
    if (image.mode, bits, form) == ("I", 32, 1):
        return np.asarray(image).view(np.uint32)
    if (image.mode, bits, form) == ("L", 8, 2):
        return np.asarray(image).view(np.int8)
    return None


def read_portable_map(image: Image.Image, file: Any) -> np.ndarray | None:
    """Return the colors of a PPM file with more than 8 bits, scaled to 16 bits as Pillow scales gray ones."""
    tiles: list[Any] = getattr(image, "tile", [])
    if image.mode != "RGB" or not tiles or tiles[0].codec_name not in ("ppm", "ppm_plain") or tiles[0].args[1] <= 255:
        return None
    count = image.width * image.height * 3
    file.seek(tiles[0].offset)
    if tiles[0].codec_name == "ppm":
        values = np.frombuffer(file.read(2 * count), dtype=">u2").astype(np.float64)
    else:
        values = np.array(file.read().split()[:count], dtype=np.float64)
    if values.size < count:
        raise OSError("the image is truncated")
    image.load()
    return np.rint(values.reshape(image.height, image.width, 3) * (65535 / tiles[0].args[1])).astype(np.uint16)
