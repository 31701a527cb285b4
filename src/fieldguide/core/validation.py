"""Checked reading of files that others wrote: limits on size and depth, expected types, one clear error for each fault.

Readers parse such files through these functions, `core.yaml_reader` and `core.archives`, or inside `guard`. All raise the
error class of their caller, with a message that names the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fieldguide.core.errors import DataError, FieldguideError

MAX_CONFIG_BYTES = 64 << 20  # of files that describe a model, a tokenizer or a run; data may be larger
MAX_DEPTH = 100  # levels of nested lists and objects
MAX_REASON_CHARACTERS = 200  # of a parser's message that is quoted
AGAIN = "Download or export it again."
KIND_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


@contextmanager
def guard(
    place: object, error: type[FieldguideError] = DataError, remedy: str = AGAIN, problem_is: str = "is damaged or malformed"
) -> Iterator[None]:
    """Raise `error`, which names `place`, for whatever parsing a damaged or hostile file raises inside the block.

    Errors of this library, warnings and missing names or packages, which no file can cause, pass unchanged. Panics of
    libraries in Rust, which are not subclasses of `Exception`, are included.
    """
    try:
        yield
    except (FieldguideError, Warning, NameError, ImportError):
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and not is_panic(problem):
            raise  # Ctrl-C, exit
        if isinstance(problem, OSError) and problem.strerror:
            file = f" ({problem.filename})" if problem.filename and str(problem.filename) != str(place) else ""
            raise error(f"{place} cannot be read: {problem.strerror}{file}.") from problem
        raise error(f"{place} {problem_is}: {describe(problem)}. {remedy}".rstrip()) from problem


def is_panic(problem: BaseException) -> bool:
    """Return whether an exception reports a fault in a library written in Rust."""
    return type(problem).__name__ == "PanicException"


def describe(problem: BaseException) -> str:
    """Return the reason that an exception gives, as one short line without a full stop."""
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, MemoryError):
        return "reading it would take more memory than there is"
    text = " ".join("".join(c if c.isprintable() else " " for c in str(problem)).split())
    if isinstance(problem, KeyError):
        text = f"it lacks {text}"
    if is_panic(problem):
        text = f"its parser failed ({text})"
    text = text or type(problem).__name__
    return f"{text[:MAX_REASON_CHARACTERS]} ..." if len(text) > MAX_REASON_CHARACTERS else text.rstrip(".")


def read_bytes(path: Path, error: type[FieldguideError] = DataError, max_bytes: int | None = MAX_CONFIG_BYTES) -> bytes:
    """Return the content of a regular file of at most `max_bytes`. A missing file raises `FileNotFoundError`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file.")
        if max_bytes is not None and status.st_size > max_bytes:
            raise error(f"{path} has {status.st_size:,} bytes, but such a file has at most {max_bytes:,}. {AGAIN}")
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from problem


def read_text(path: Path, error: type[FieldguideError] = DataError, max_bytes: int | None = MAX_CONFIG_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark."""
    return decode(read_bytes(path, error, max_bytes), path, error)


def decode(content: bytes, place: object, error: type[FieldguideError] = DataError) -> str:
    """Return UTF-8 text without a byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{place}: not UTF-8 text. Save it as UTF-8.") from None


def read_json(path: Path, error: type[FieldguideError] = DataError, expect: type = dict) -> Any:
    """Return the value in a JSON file, an instance of `expect`. A missing file raises `FileNotFoundError`."""
    return parse_json(read_bytes(path, error), path, error, expect)


def parse_json(
    content: bytes | str, place: object, error: type[FieldguideError] = DataError, expect: type = dict, remedy: str = AGAIN
) -> Any:
    """Return the value in JSON text, an instance of `expect`.

    Raises `error` for invalid JSON, another type, deep nesting, and half of a surrogate pair, which is no text.
    """
    text = decode(content, place, error) if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        check_depth(value)
        if "\\ud" in text or "\\uD" in text:  # only an escape can produce half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{place} is not valid JSON: a text holds half of a surrogate pair. {remedy}".rstrip()) from None
    except (ValueError, RecursionError, MemoryError) as problem:
        raise error(f"{place} is not valid JSON: {describe(problem)}. {remedy}".rstrip()) from None
    if not isinstance(value, expect):
        raise error(f"{place} must hold {name_kind(expect)}, but holds {name_kind(type(value))}. {remedy}".rstrip())
    return value


def check_depth(value: Any) -> None:
    """Raise `RecursionError` if lists and objects are nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)] if isinstance(level[0], dict | list) else []
        if not level:
            return
    raise RecursionError


def get_checked(
    values: Mapping[str, Any],
    key: str,
    kind: type,
    place: object,
    error: type[FieldguideError] = DataError,
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """Return the value of a key, or None if it is missing or null.

    Raises `error` if it is not of the type `kind` (`float` includes integers), or a number that is not finite or out of range.
    """
    value: Any = values.get(key)
    if value is None:
        return None
    is_bool = isinstance(value, bool)
    allowed: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if is_bool != (kind is bool) or not isinstance(value, allowed):
        raise error(f"{place}: {key} must be {name_kind(kind)}, but is {name_kind(type(value))}. {AGAIN}")
    number: Any = value  # not narrowed to object by the check above
    if kind in (int, float) and not (least <= number <= most and math.isfinite(number)):
        limits = [f"at least {least:,}"] * math.isfinite(least) + [f"at most {most:,}"] * math.isfinite(most)
        raise error(f"{place}: {key}={describe(ValueError(value))} must be {' and '.join(limits) or 'finite'}. {AGAIN}")
    return value


def name_kind(kind: type) -> str:
    """Return the name of a JSON type with its article."""
    return KIND_NAMES.get(kind, "an integer" if kind is int else "a number")
