"""Delimited text: detection of encoding, delimiter and header, and errors that name the malformed line."""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass, field
from itertools import islice

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_types import MISSING_MARKERS, as_numbers, blank_missing
from fieldguide.data.dataset import BOOKKEEPING, LINE, Finding

DELIMITERS = ",\t;|"
CHUNK_BYTES = 1 << 22
csv.field_size_limit(1 << 30)  # the default of 128 KiB rejects long texts


@dataclass
class Table:
    """A delimited file as text columns, with the line number on which each row begins."""

    rows: pl.DataFrame
    findings: list[Finding] = field(default_factory=list)


def decode(raw: bytes, name: str) -> tuple[bytes, list[Finding]]:
    """Return the content as UTF-8 without a byte order mark. Raises DataError for NUL bytes (a binary file)."""
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if raw.startswith(mark):
            try:
                raw = raw[3:] if encoding == "utf-8" else raw.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}: has a {encoding} byte order mark, but byte {error.start} is invalid. Save the file as UTF-8."
                ) from error
            break
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(
            f"{name}:{line_at(raw, at)}: NUL byte at position {at}. The file "
            "is binary or damaged, or is UTF-16 without a byte order mark. Save it as UTF-8."
        )
    invalid = find_invalid_utf8(raw)
    if invalid is None:
        return raw, []
    try:
        text, encoding = raw.decode("cp1252"), "Windows-1252"
    except UnicodeDecodeError:
        text, encoding = raw.decode("latin-1"), "Latin-1"
    return text.encode(), [
        Finding(
            "encoding",
            "warning",
            f"{name} is not UTF-8: read as {encoding}",
            (f"{name}:{line_at(raw, invalid)}, the first occurrence",),
            1,
            "Check the accented letters, or save the file as UTF-8.",
        )
    ]


def line_at(raw: bytes, at: int) -> int:
    """Return the line number (from 1) of byte `at`."""
    return raw.count(b"\n", 0, at) + 1


def find_invalid_utf8(raw: bytes) -> int | None:
    """Return the position of the first byte that is not UTF-8, or None. Works in chunks to avoid copying the content."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    while start < len(raw):
        stop = start + CHUNK_BYTES
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(raw[start:stop], final=stop >= len(raw))
        except UnicodeDecodeError as error:
            return start - pending + error.start
        start = stop
    return None


def detect_delimiter(raw: bytes) -> str:
    """Detect the delimiter: the one that gives the most consistent number of columns in the first lines."""
    text = raw[: 1 << 16].decode(errors="replace")
    if len(raw) > 1 << 16:
        text = text[: text.rfind("\n") + 1] or text
    best, score = ",", (0.0, 0)
    for mark in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
        widths = [len(row) for row in islice(reader, 50) if row]
        if not widths or max(widths) < 2:
            continue
        common = max(set(widths), key=widths.count)
        if common > 1 and (widths.count(common) / len(widths), common) > score:
            best, score = mark, (widths.count(common) / len(widths), common)
    return best


def parse(raw: bytes, name: str, *, header: bool | None, names: tuple[str, ...] = (), target: str | None = None) -> Table:
    """Parse delimited UTF-8 text as a table of strings. `names` are the columns of a known schema, including `target`.

    Raises DataError, naming the line, for broken quoting, lines of the wrong length, and invalid column names.
    """
    if not raw.strip():
        raise DataError(f"{name}: the file is empty.")
    if name.lower().endswith((".tsv", ".tab")):
        mark = "\t"
    else:
        mark = detect_delimiter(raw)
    rows = read_cells(raw, name, mark)
    findings: list[Finding] = []
    lines = line_numbers(rows, raw)
    width, empty = rows.width, find_blank_rows(rows.get_columns())
    # Built without expressions, which would rechunk and thereby copy the whole table.
    rows = pl.DataFrame([*rows.get_columns(), lines])
    if width > 1 and empty.any():
        rows = rows.filter(~empty)
        if int(empty.sum()) > 1 or not raw.endswith(b"\n\n"):
            count = int(empty.sum())
            findings.append(Finding("empty-lines", "note", f"empty lines skipped in {name}", (), count))
    first = ["" if v is None else v.strip() for v in rows.row(0)[:width]]
    has = header if header is not None else has_header(rows[1:1001].drop(LINE), first, names)
    if has:
        columns, rows = first, rows[1:]
        check_names(columns, name, int(rows[LINE][0]) - 1 if rows.height else 1)
    else:
        columns = default_names(width, names, target)
        if header is None:
            findings.append(
                Finding(
                    "no-header",
                    "warning",
                    f"{name}: the first line looks like data, so the columns are named {columns[0]} to {columns[-1]}",
                    (f"{name}:1",),
                    1,
                    "Add a line of column names, or pass header=True if the first line is one.",
                )
            )
    if rows.height == 0:
        raise DataError(f"{name}: the file has column names but no rows.")
    rows.columns = [*columns, LINE]
    return Table(rows, findings)


def read_cells(raw: bytes, name: str, mark: str) -> pl.DataFrame:
    """Return all cells as text, empty ones as null. Input that polars rejects is parsed by `slow_cells`."""
    try:
        rows = pl.read_csv(raw, infer_schema=False, has_header=False, separator=mark)
    except pl.exceptions.PolarsError:
        return read_cells_with_csv(raw, name, mark)
    # Polars silently pads short lines with nulls. They are detected by counting delimiters outside of cells: each line
    # must have one less than there are columns.
    quoted = b'"' in raw
    inside = sum(rows[c].str.count_matches(mark, literal=True).sum() for c in rows.columns) if quoted else 0
    marks = raw.count(mark.encode()) - inside
    each = rows.width - 1
    if marks != each * rows.height and marks != each * (rows.height - int(find_blank_rows(rows.get_columns()).sum())):
        return read_cells_with_csv(raw, name, mark)
    return rows


def find_blank_rows(columns: list[pl.Series]) -> pl.Series:
    """Return which rows have no values. Works column by column, since one expression over all would copy the table."""
    empty = pl.repeat(True, columns[0].len(), eager=True)
    for column in columns:
        if not empty.any():
            break
        empty = empty & column.is_null()
    return empty


def read_cells_with_csv(raw: bytes, name: str, mark: str) -> pl.DataFrame:
    """Parse the table with Python's csv module. Raises DataError listing the malformed lines.

    In tab-separated files quotation marks usually are direct speech: if they do not form valid quoted cells, they are
    taken literally.
    """
    if mark == "\t" and (spoken := read_unquoted(raw)) is not None:
        return spoken
    reader = csv.reader(io.StringIO(raw.decode(), newline=""), delimiter=mark, strict=True)
    width, wrong, line = 0, [], 0
    out: list[list[str | None]] = []
    try:
        for row in reader:
            start, line = line + 1, reader.line_num
            if not row:
                out.append([None] * max(width, 1))
                continue
            width = width or len(row)
            if len(row) != width:
                wrong.append((start, len(row)))
            else:
                out.append([v or None for v in row])
    except csv.Error as error:
        ends = "end of data" in str(error)
        what = "a quotation mark is not closed" if ends else "text follows a closing quotation mark"
        at = line + 1 if ends else reader.line_num
        raise DataError(
            f'{name}:{at}: broken quoting: {what}. Close it, or write "" for a quotation mark inside a quoted cell.'
        ) from error
    if wrong:
        places = ", ".join(f"{name}:{l} has {n}" for l, n in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"{name}: {len(wrong)} of {len(out) + len(wrong)} lines do not have {width} cells "
            f"like the first: {places}. Quote cells that contain {mark!r}, or add the missing cells."
        )
    return pl.DataFrame(out, schema={f"c{i}": pl.String for i in range(width)}, orient="row")


def read_unquoted(raw: bytes) -> pl.DataFrame | None:
    """Parse tab-separated text with literal quotation marks, such as `"Well," he said.`.

    Returns None if the quotation marks are valid csv quoting, or if lines differ in width.
    """
    text = raw.decode().replace("\r\n", "\n").removesuffix("\n")  # splitlines would also split at U+2028
    lines = [line.split("\t") for line in text.split("\n")]
    odd = any(cell.startswith('"') and (cell.count('"') % 2 or not cell.endswith('"')) for line in lines for cell in line)
    widths = {len(line) for line in lines if line != [""]}
    if not odd or len(widths) != 1:
        return None
    width = widths.pop()
    return pl.DataFrame(
        [[v or None for v in line] if len(line) == width else [None] * width for line in lines],
        schema={f"c{i}": pl.String for i in range(width)},
        orient="row",
    )


def line_numbers(rows: pl.DataFrame, raw: bytes) -> pl.Series:
    """Return the line number on which each row begins; cells may contain line breaks."""
    first = pl.Series(LINE, range(1, rows.height + 1), dtype=pl.Int64)
    if b'"' not in raw:
        return first
    breaks = pl.repeat(0, rows.height, dtype=pl.Int64, eager=True)
    for column in rows.get_columns():
        breaks = breaks + column.str.count_matches("\n", literal=True).fill_null(0).cast(pl.Int64)
    return (first + breaks.cum_sum().shift(1, fill_value=0)).rename(LINE)


def has_header(body: pl.DataFrame, first: list[str], names: tuple[str, ...]) -> bool:
    """Return whether the first line holds column names.

    It does not if it has numbers in numeric columns, values that occur again below, or sentences in columns of sentences.
    """
    if names:
        known = sum(f in names for f in first)
        return known > 0 or not len(names) - 1 <= len(first) <= len(names)
    if body.height == 0:
        return not any(is_number(f) for f in first)
    votes = []
    for value, column in zip(first, body.columns):
        text = blank_missing(body[column])
        present = text.drop_nulls()
        if present.len() and as_numbers(text).drop_nulls().len() >= 0.9 * present.len():
            votes.append(is_number(value) or value.lower() in MISSING_MARKERS[1:])
    if votes:
        return not all(votes)
    if any(v in set(body[c].str.strip_chars().drop_nulls()) for v, c in zip(first, body.columns)):
        return False
    return not all(" " in v and 1 / 2 < len(v) / (median_length(body[c]) or 1) < 3 for v, c in zip(first, body.columns))


def median_length(values: pl.Series) -> float:
    """Return the median number of characters; 0 without values."""
    median = values.str.len_chars().median()
    return float(median) if isinstance(median, int | float) else 0.0


def default_names(width: int, names: tuple[str, ...], target: str | None) -> list[str]:
    """Return names for columns without a header: those of the schema if their number matches, else c0, c1, ..."""
    for known in (list(names), [n for n in names if n != target]):
        if len(known) == width:
            return known
    return [f"c{i}" for i in range(width)]


def is_number(text: str) -> bool:
    """Return whether the text parses as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_names(columns: list[str], name: str, line: int) -> None:
    """Raise DataError for missing, duplicate or reserved column names."""
    empty = [i + 1 for i, c in enumerate(columns) if not c]
    at = {c: [i + 1 for i, d in enumerate(columns) if d == c] for c in columns if c}
    twice = {c: where for c, where in at.items() if len(where) > 1}
    hidden = [c for c in columns if c in BOOKKEEPING]
    problems = [f"column {', '.join(map(str, empty))} has no name"] if empty else []
    problems += [f"{c!r} is the name of several columns ({', '.join(map(str, where))})" for c, where in twice.items()]
    problems += [f"{c!r} is a reserved name" for c in hidden]
    if problems:
        hint = " (An unnamed first column is often an index: export with index=False.)" if empty == [1] else ""
        raise DataError(f"{name}:{line}: {'; '.join(problems)}. Every column needs a unique name.{hint}")
