"""Tables in JSON: JSON Lines, and a JSON file that is a list of objects, as instructions and captions are often published."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.dataset import LINE

HEAD_BYTES = 256  # bytes that tell a list of objects from other JSON


def is_list_of_objects(path: Path) -> bool:
    """Return whether a JSON file begins like a list of objects."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head[:1] == b"[" and head[1:].lstrip()[:1] == b"{"


def read_json_list(content: bytes, name: str) -> pl.DataFrame:
    """Read a JSON file that is a list of objects, numbered from 1. Raises DataError for another structure."""
    objects = parse_json(content, name, expect=list)
    other = next((i for i, one in enumerate(objects, 1) if not isinstance(one, dict)), None)
    if other is not None:
        raise DataError(f"{name}: entry {other} of the list is not a JSON object. A table has one {{...}} per row.")
    rows = parse_lines("\n".join(map(json.dumps, objects)).encode(), len(objects))
    return unnest_objects(objects_to_table(objects) if rows is None else rows, range(1, len(objects) + 1))


def read_json_lines(content: bytes, name: str) -> pl.DataFrame:
    """Read JSON Lines; nested objects become columns such as a.b. Raises DataError for the first invalid line."""
    lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    rows = parse_lines(content, len(lines))
    if rows is None:
        objects = []
        for number, line in lines:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise DataError(f"{name}:{number}: not a JSON object. JSON Lines has one {{...}} per line.")
            objects.append(found)
        rows = objects_to_table(objects)
    return unnest_objects(rows, [number for number, _ in lines])


def parse_lines(content: bytes, count: int) -> pl.DataFrame | None:
    """Return the rows of JSON Lines, or None if they are invalid or hold values of several types in one place."""
    try:
        rows = pl.read_ndjson(io.BytesIO(content), infer_schema_length=None)
    except (pl.exceptions.PolarsError, RuntimeError):
        return None
    return rows if rows.height == count else None


def unnest_objects(rows: pl.DataFrame, lines: Sequence[int]) -> pl.DataFrame:
    """Return the rows with their lines, and objects as columns: {"a": {"b": 1}} as a.b."""
    for name, kind in rows.schema.items():
        if isinstance(kind, pl.Struct):
            fields = [f"{name}.{field.name}" for field in kind.fields]
            rows = rows.with_columns(pl.col(name).struct.rename_fields(fields)).unnest(name)
    return rows.with_columns(pl.Series(LINE, lines, dtype=pl.Int64))


def objects_to_table(objects: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Return objects as rows. Where values have several types, those that are no text become JSON text."""
    names = dict.fromkeys(name for one in objects for name in one)
    columns = {name: unify([one.get(name) for one in objects]) for name in names}
    return pl.DataFrame([pl.Series(name, values, strict=False) for name, values in columns.items()])


def unify(values: list[Any]) -> list[Any]:
    """Return the values of one place in many objects with one type."""
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, dict) for v in present):
        names = dict.fromkeys(name for one in present for name in one)
        parts = {name: unify([None if v is None else v.get(name) for v in values]) for name in names}
        return [None if v is None else {name: parts[name][i] for name in names} for i, v in enumerate(values)]
    if present and all(isinstance(v, list) for v in present):
        flat = iter(unify([item for v in present for item in v]))
        return [None if v is None else [next(flat) for _ in v] for v in values]
    kinds = {float if type(v) is int else type(v) for v in present}
    if len(kinds) < 2:
        return values
    return [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
