"""Images in conversations: columns `image`, `image_2`, ... of paths, and `<image>` in the messages that they belong to, in this order.

Read are parts of messages ({"type": "image", "path" or "url" or "image": ...} and {"type": "image_url", "image_url": {"url": ...}}),
parts without a file with a column `image` or `images` next to the messages, and `<image>` in the texts (LLaVA) with such a column.
Without any mark, images belong to the first message of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlparse

import polars as pl

IMAGE_MARK = "<image>"
IMAGE, COLUMNS = "image", ("image", "images")  # name of the column of paths; names of the columns that are read
PART_TYPES = ("image", "image_url", "input_image")
PATH_KEYS = ("path", "image", "url", "image_url", "file_name", "filename")  # of parts and of values of a column
MAX_IMAGES = 16  # of a conversation, each of which has a column
TOO_MANY = f"more than {MAX_IMAGES} images"
REMOTE = "images at web addresses"
EMBEDDED = "images that are no files"
UNPLACED = "another number of images than places for them"


def find_column(rows: pl.DataFrame) -> str | None:
    """Return the column with the images of conversations, or None."""
    return next((name for name in rows.columns if name.lower() in COLUMNS), None)


def name_columns(count: int) -> list[str]:
    """Return the names of the columns of paths of conversations with at most `count` images, at least one."""
    return [IMAGE, *(f"{IMAGE}_{number}" for number in range(2, count + 1))]


def find_path(value: Any) -> Any:
    """Return the path or address that a part, or a value of a column, holds; None if there is none."""
    if isinstance(value, str):
        return value or None
    if not isinstance(value, Mapping):
        return value
    if value.get("bytes") is not None:
        return value["bytes"]
    found = (find_path(value.get(key)) for key in PATH_KEYS)
    return next((path for path in found if path is not None), None)


def list_paths(value: Any) -> list[Any]:
    """Return the paths in a value of a column, which holds one image or a list of them."""
    if isinstance(value, str) and value.startswith(("[", "{")):  # polars keeps mixed values as JSON
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    values = value if isinstance(value, list) else [value]
    return [path for path in map(find_path, values) if path is not None]


def check_path(path: Any) -> tuple[str | None, str | None]:
    """Return the path of a file, or None and the problem."""
    if not isinstance(path, str) or path.startswith("data:"):
        return None, EMBEDDED
    address = urlparse(path)
    if address.scheme in ("http", "https", "s3", "gs"):
        return None, REMOTE
    return (unquote(address.path) if address.scheme == "file" else path), None


def place_images(
    turns: list[dict[str, Any]], parts: list[Any], given: list[Any]
) -> tuple[list[dict[str, Any]], list[str], str | None]:
    """Return the messages of a conversation with `IMAGE_MARK` where its images are, their paths, and the problem, if there is one.

    `parts` holds the path of each part that is an image, or None; their texts are marks already. `given` are the paths of the column.
    """
    marks = sum((turn["content"] or "").count(IMAGE_MARK) for turn in turns)
    if parts and all(path is not None for path in parts):
        found = parts
    elif not given:
        return turns, [], UNPLACED if parts else None
    else:
        found = given
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if not marks and first is not None:
            first["content"] = "\n".join([*[IMAGE_MARK] * len(given), first["content"] or ""])
            marks = len(given)
        if marks != len(given):
            return turns, [], UNPLACED
    if len(found) > MAX_IMAGES:
        return turns, [], TOO_MANY
    checked = [check_path(path) for path in found]
    problem = next((problem for _, problem in checked if problem), None)
    return turns, [] if problem else [path for path, _ in checked if path is not None], problem
