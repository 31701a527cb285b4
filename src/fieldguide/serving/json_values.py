"""JSON of requests and responses: strict reading with a clear error, and writing of records with media."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fieldguide.core.media import Media

if TYPE_CHECKING:
    from fieldguide.serving.errors import RequestError

SUFFIX_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp4": "video/mp4",
}
PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)
NAMES = {  # of types in messages of msgspec -> in ours
    "float": "a number",
    "int": "an integer",
    "str": "a text",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
ADVICE = "Compare the request with /openapi.json."


def read_json(content: bytes | msgspec.Raw, kind: Any = Any, place: str = "") -> Any:
    """Return a JSON value of a type that msgspec knows. Raises `RequestError` (400 for no JSON, else 422), which names the place."""
    from fieldguide.serving.errors import RequestError

    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as problem:
        raise describe_invalid(problem, place) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        text = f"the body is not JSON: {problem}"
        remedy = "NaN, Infinity, comments and trailing commas are no JSON; texts must be UTF-8."
        raise RequestError(400, text, place=place, remedy=remedy, code="malformed_json") from None
    except RecursionError:
        raise deep_error(place) from None


def convert_value(value: Any, kind: Any, place: str = "") -> Any:
    """Return a value that was read from JSON as a type. Raises `RequestError` if it is not of this type."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise describe_invalid(problem, place) from None
    except RecursionError:
        raise deep_error(place) from None


def deep_error(place: str) -> RequestError:
    """Return the error for JSON that is nested too deeply."""
    from fieldguide.serving.errors import RequestError

    return RequestError(400, "the JSON is nested too deeply", place=place, remedy="Send flat values.", code="malformed_json")


def describe_invalid(problem: msgspec.ValidationError, place: str) -> RequestError:
    """Return the error for a value of another type."""
    from fieldguide.serving.errors import RequestError

    text = str(problem)
    if found := PLACE.search(text):
        text, place = text[: found.start()], f"{place}{found.group(1)}".lstrip(".")
    text = re.sub(r"`([^`]*)`", lambda match: name_types(match.group(1)), text)
    where = f" at {place}" if place else ""
    return RequestError(422, f"{text[:1].lower()}{text[1:]}{where}", place=place, remedy=ADVICE, code="invalid_value")


def name_types(text: str) -> str:
    """Return the names of types in plain words; other texts, such as names of fields, in quotes."""
    parts = text.split(" | ")
    return " or ".join(NAMES[part] for part in parts) if all(part in NAMES for part in parts) else repr(text)


def encode_json(value: Any) -> bytes:
    """Return a value as JSON: media as data URLs, numbers that are not finite as null."""
    return msgspec.json.encode(value, enc_hook=encode_special)


def encode_special(value: Any) -> Any:
    """Return what JSON has no form for as something that it has a form for."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def to_data_url(media: Media) -> str:
    """Return a file as a data URL."""
    kind = SUFFIX_TYPES.get(media.suffix, "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(media.content).decode()}"
