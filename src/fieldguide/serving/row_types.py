"""Types of rows and options, made from a signature: msgspec decodes a request into them strictly."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal, Union

import msgspec
import polars as pl
from msgspec import UNSET, Meta, Struct, UnsetType

from fieldguide.core.signature import InputField, OptionSpec, Signature
from fieldguide.core.signature_schema import is_number
from fieldguide.serving.errors import RequestError
from fieldguide.serving.json_values import convert_value

MEDIA_KINDS = ("image", "audio", "video", "mask")
MAX_INTEGER = (1 << 63) - 1


class Message(Struct):
    """A message of a conversation."""

    role: str
    content: str


MESSAGES = Annotated[list[Message], Meta(min_length=1)]
PLAIN: dict[str, Any] = {
    "number": float,
    "category": str,
    "boolean": bool | str | int,
    "identifier": str | int,
    "date": str,
    "text": str,
    "image": str,
    "audio": str,
    "video": str,
    "mask": str,
    "boxes": list,
    "list": list[str],
    "constant": str | float | bool,
}


def type_of_field(field: InputField) -> Any:
    """Return the type of a value of an input, as `input_schema` describes it."""
    if field.closed and field.values and field.count == len(field.values):
        kind: Any = Literal[field.values]
    elif field.kind == "messages":
        kind = Union[str, MESSAGES] if field.format.get("text") else MESSAGES  # noqa: UP007  # Annotated has no |
    else:
        kind = PLAIN[field.kind]
        if field.kind == "category" and field.values and all(map(is_number, field.values)):
            kind = kind | int | float
        if field.kind == "category" and {value.lower() for value in field.values} & {"true", "false"}:
            kind = kind | bool
        if field.kind == "date" and isinstance(field.low, int | float):
            kind = kind | float
    return Union[kind, None] if field.nullable else kind  # noqa: UP007


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of a request for one signature.

    `kind` is the type of a row; the attributes of a decoded row are `f0`, `f1`, ... in the order of `fields`. With `others`, a row
    may have further columns, and is a dictionary.
    """

    fields: tuple[InputField, ...]
    kind: Any
    others: Any = None

    @property
    def media(self) -> tuple[InputField, ...]:
        """The inputs that are files."""
        return tuple(field for field in self.fields if field.kind in MEDIA_KINDS)

    def to_columns(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        """Return decoded rows as columns of cells; columns that no row has are left out."""
        if self.others is not None:
            return self.collect_open(rows)
        columns = {}
        for i, field in enumerate(self.fields):
            cells = list(map(operator.attrgetter(f"f{i}"), rows))
            if not all(cell is UNSET for cell in cells):
                columns[field.name] = [None if cell is UNSET else cell for cell in cells]
        return columns

    def collect_open(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return rows with further columns than the signature names."""
        known = {field.name: field for field in self.fields}
        for i, row in enumerate(rows):
            for field in self.fields:
                if field.name in row:
                    convert_value(row[field.name], type_of_field(field), f"rows[{i}].{field.name}")
                elif field.required:
                    raise missing_field(field.name, i)
            for name in row.keys() - known.keys():
                convert_value(row[name], self.others, f"rows[{i}].{name}")
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def missing_field(name: str, row: int) -> RequestError:
    """Return the error for a row without a required column."""
    return RequestError(422, f"rows[{row}] lacks the column {name!r}", place=f"rows[{row}]", code="invalid_value")


def build_row_reader(signature: Signature) -> RowReader:
    """Return the reader of the rows of a signature."""
    fields = tuple(field for field in signature.inputs if field.name != "*")
    others = next((field for field in signature.inputs if field.name == "*"), None)
    if others is not None:
        return RowReader(fields, dict[str, Any], type_of_field(others))
    members: list[Any] = []
    for i, field in enumerate(fields):
        kind = type_of_field(field)
        members.append((f"f{i}", kind) if field.required else (f"f{i}", Union[kind, UnsetType], UNSET))  # noqa: UP007
    names = {f"f{i}": field.name for i, field in enumerate(fields)}
    row = msgspec.defstruct("Row", members, rename=names, forbid_unknown_fields=True, kw_only=True)
    if signature.row_form == "value" and len(fields) == 1:  # a request may also hold the value alone
        return RowReader(fields, wrap_value(row, fields[0]))
    return RowReader(fields, row)


def wrap_value(row: type[Struct], field: InputField) -> Any:
    """Return the type of a row that is an object or the value of its only input alone."""
    return Union[type_of_field(field), row]  # noqa: UP007


def build_option_type(signature: Signature) -> type[Struct]:
    """Return the type of the prediction options of a signature."""
    members: list[Any] = []
    for option in signature.options:
        kind = type_of_option(option)
        members.append((option.name, kind) if option.required else (option.name, Union[kind, UnsetType], UNSET))  # noqa: UP007
    return msgspec.defstruct("Options", members, forbid_unknown_fields=True, kw_only=True)


def type_of_option(option: OptionSpec) -> Any:
    """Return the type of an option, with its limits."""
    kind: Any = {"integer": int, "number": float, "string": str, "boolean": bool}[option.type]
    if option.choices and option.type in ("string", "integer"):
        kind = Literal[option.choices]
    elif option.type in ("integer", "number") and (option.low is not None or option.high is not None):
        cast: Callable[[float], float] = int if option.type == "integer" else float
        low = None if option.low is None else cast(option.low)
        high = None if option.high is None else min(cast(option.high), MAX_INTEGER)
        kind = Annotated[kind, Meta(ge=low, le=high)]
    return Union[kind, None] if option.nullable else kind  # noqa: UP007


def list_options(options: Struct) -> dict[str, Any]:
    """Return the options that a request sets."""
    fields = options.__struct_fields__
    return {name: value for name in fields if (value := getattr(options, name)) is not UNSET}


@dataclass(frozen=True)
class Cells:
    """The cells of a column in a request, and the type of the column; None if polars chooses it."""

    values: list[Any]
    dtype: Any


def to_cells(field: InputField | None, cells: list[Any]) -> Cells:
    """Return the cells of a column with a type that depends on the input, so that a row is read the same alone and among others.

    The type of a date, and of a column that the model does not know, depends on the cells: number or text.
    """
    kind = field.kind if field is not None else ""
    if kind == "messages":
        is_plain = lambda cell: cell is None or isinstance(cell, str)
        return Cells([cell if is_plain(cell) else [message_to_dict(m) for m in cell] for cell in cells], None)
    if kind == "list":
        return Cells(cells, pl.List(pl.String))
    if kind == "boxes":
        return Cells(cells, None)
    if kind == "number" or (kind in ("", "date") and all(type(cell) in (int, float, type(None)) for cell in cells)):
        return Cells([None if cell is None else float(cell) for cell in cells], pl.Float64)
    return Cells(list(map(to_text, cells)), pl.String)


def build_frame(tables: Sequence[Mapping[str, Cells]]) -> pl.DataFrame:
    """Return the rows of one or several requests with equal columns as one table."""
    joined = {name: [value for table in tables for value in table[name].values] for name in tables[0]}
    return pl.DataFrame(
        [
            pl.Series(name, values, tables[0][name].dtype, strict=tables[0][name].dtype is not None)
            for name, values in joined.items()
        ]
    )


def to_text(cell: Any) -> str | None:
    """Return a cell as the text that a table would hold: 10 and 10.0 as "10", true as "true"."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell):
        return str(int(cell))
    return str(cell)


def message_to_dict(message: Any) -> dict[str, str]:
    """Return a message as a dictionary."""
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    return {"role": str(message["role"]), "content": str(message["content"])}


def count_characters(cells: Sequence[Any]) -> int:
    """Return the characters of the texts among cells, and of those inside lists."""
    return reduce(lambda total, cell: total + measure(cell), cells, 0)


def measure(cell: Any) -> int:
    """Return the characters of a cell."""
    if isinstance(cell, str):
        return len(cell)
    if isinstance(cell, list):
        return sum(map(measure, cell))
    if isinstance(cell, Message):
        return len(cell.content) + len(cell.role)
    return 0
