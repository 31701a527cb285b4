"""Files in requests: data URLs and uploads, checked before they are decoded and stored in a folder of the request."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from fieldguide.core.signature import InputField
from fieldguide.data.media.images import DECODE_ERRORS, list_formats
from fieldguide.serving.errors import RequestError
from fieldguide.serving.settings import ServerSettings

DATA_URL = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9-]+=[^;,]*)*;base64,", re.IGNORECASE)
SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/jpg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
    "image/tiff": ".tif",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/wave": ".wav",
    "audio/vnd.wave": ".wav",
    "audio/flac": ".flac",
    "audio/x-flac": ".flac",
    "audio/ogg": ".ogg",
    "audio/mpeg": ".mp3",
    "audio/mp3": ".mp3",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "video/x-msvideo": ".avi",
    "video/x-matroska": ".mkv",
}
TYPES = {suffix: kind for kind, suffix in reversed(SUFFIXES.items())}
MAX_SHOWN = 60


class RequestFolder:
    """A temporary folder for the files of one request, which is made when the first file is stored."""

    def __init__(self, settings: ServerSettings):
        self.settings, self.path = settings, ""
        self.count = 0

    def store(self, content: bytes, suffix: str, name: str = "") -> str:
        """Write a file and return its path. The name is the number of the file, unless one is given."""
        if not self.path:
            self.path = tempfile.mkdtemp(prefix="fieldguide-request-")
        path = Path(self.path) / f"{name or self.count}{suffix}"
        self.count += 1
        path.write_bytes(content)
        return str(path)

    def remove(self, *_: Any) -> None:
        """Remove the folder."""
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)

    def store_media(self, field: InputField, content: bytes, media_type: str, place: str) -> str:
        """Store a file for an input after checking its size, type, pixels and samples. Raises `RequestError`."""
        if len(content) > self.settings.max_file_bytes:
            most = f"{self.settings.max_file_bytes >> 20} MiB"
            raise RequestError(413, f"the file has {len(content):,} bytes", place=place, remedy=f"Send at most {most}.")
        suffix = SUFFIXES.get(media_type.lower())
        allowed = {SUFFIXES[known] for known in field.media_types if known in SUFFIXES}
        if suffix is None or (allowed and suffix not in allowed):
            remedy = f"Send {', '.join(field.media_types)}."
            raise RequestError(415, f"{media_type or 'no media type'} is not read as {field.kind}", place=place, remedy=remedy)
        if field.kind in ("image", "mask"):
            check_image(content, self.settings.max_pixels, place)
        elif field.kind == "audio":
            check_audio(content, self.settings.max_samples, place)
        return self.store(content, suffix)

    def store_data_url(self, field: InputField, url: str, place: str) -> str:
        """Store the content of a data URL for an input. Raises `RequestError` for anything else, such as a path."""
        media_type, content = split_data_url(url, field.kind, place)
        return self.store_media(field, content, media_type, place)


def split_data_url(url: str, kind: str, place: str) -> tuple[str, bytes]:
    """Return the media type and the content of a data URL. Raises `RequestError` for a path or another URL, which is never opened."""
    found = DATA_URL.match(url)
    if found is None:
        shown = repr(url[:MAX_SHOWN]) + ("..." if len(url) > MAX_SHOWN else "")
        raise RequestError(
            422,
            f"{shown} is not a data URL: paths and addresses are not opened",
            place=place,
            remedy=f"Send the {kind} itself as data:TYPE;base64,CONTENT, or upload the file as multipart/form-data.",
            code="not_a_data_url",
        )
    try:
        return found.group(1), base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(422, "the content of the data URL is not base64", place=place, code="not_a_data_url") from None


def check_image(content: bytes, max_pixels: int, place: str) -> None:
    """Raise `RequestError` for an image that has too many pixels or whose header cannot be read. Nothing is decoded."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=list_formats()) as image:
            pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = max_pixels + 1
    except DECODE_ERRORS as problem:
        reason = "the content is no known image format" if "cannot identify" in str(problem) else str(problem)[:MAX_SHOWN]
        raise RequestError(422, f"the image cannot be read: {reason}", place=place, code="unusable_input") from None
    if pixels > max_pixels:
        raise RequestError(
            413, "the image has too many pixels", place=place, remedy=f"Send at most {max_pixels:,}.", code="too_many_pixels"
        )


def check_audio(content: bytes, max_samples: int, place: str) -> None:
    """Raise `RequestError` for a recording that is too long or whose header cannot be read."""
    import soundfile

    try:
        info = soundfile.info(BytesIO(content))
        samples = info.frames * info.channels
    except (soundfile.LibsndfileError, RuntimeError, ValueError, OSError) as problem:
        reason = str(problem)[:MAX_SHOWN]
        raise RequestError(422, f"the recording cannot be read: {reason}", place=place, code="unusable_input") from None
    if samples > max_samples:
        raise RequestError(
            413,
            "the recording is too long",
            place=place,
            remedy=f"Send at most {max_samples:,} samples.",
            code="too_many_samples",
        )


STARTS = (  # first bytes of files -> their media type
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"\x1aE\xdf\xa3", "video/webm"),
)
CONTAINERS = {b"WEBP": "image/webp", b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo"}


def detect_media_type(content: bytes) -> str:
    """Return the media type of a file by its first bytes; "" for an unknown one."""
    if content[:4] == b"RIFF":
        return CONTAINERS.get(content[8:12], "")
    if content[4:8] == b"ftyp":
        return "video/mp4"
    return next((kind for start, kind in STARTS if content.startswith(start)), "")


def content_to_url(content: bytes, field: InputField, place: str) -> str:
    """Return a file without a media type as a data URL. Raises `RequestError` if its first bytes are unknown."""
    kind = detect_media_type(content)
    if not kind:
        remedy = f"Send {', '.join(field.media_types)}."
        raise RequestError(422, f"the content is no known {field.kind}", place=place, remedy=remedy, code="unusable_input")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
