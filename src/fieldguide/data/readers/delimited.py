"""Delimited text: detection of encoding, delimiter and header, and errors that name the malformed line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import BOOKKEEPING, LINE, Finding
from fieldguide.data.number_formats import infer_format
from fieldguide.data.text_values import (
    AUDIO_FILE_PATTERN,
    IMAGE_FILE_PATTERN,
    MISSING_MARKERS,
    VIDEO_FILE_PATTERN,
    blank_missing,
)

INDEX_NAME = "index"  # of a first column without a name
MAX_COLUMNS = 20_000  # of a table; checks and types take some milliseconds for each
DELIMITERS = ",\t;|"
CHUNK_BYTES = 1 << 22
MIN_RECURRENCE = 5  # mean number of rows per value in columns whose first cell is a name, since it does not recur
COMMENT_MARKS = ("#", "//", "%")  # lines that begin with one of these are comments if they do not fit the table
MIN_EVEN_STEPS = 2  # minimum number of equal differences between numbers in the first line for them to be names
csv.field_size_limit(1 << 30)  # the default of 128 KiB rejects long texts


@dataclass
class Table:
    """A delimited file as text columns, with the line number on which each row begins, and its delimiter."""

    rows: pl.DataFrame
    findings: list[Finding] = field(default_factory=list)
    delimiter: str | None = None


@dataclass
class Cells:
    """All cells of a file as text, with the malformations that were repaired on the way."""

    rows: pl.DataFrame
    findings: list[Finding] = field(default_factory=list)
    blanked: int = 0  # lines that are no rows, such as comments; they are empty rows of `rows`


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
    if (other := find_other_format(raw)) is not None:
        raise DataError(f"{name}:1: the file is {other}, not delimited text. Export it as CSV, or correct its suffix.")
    raw, findings, stated = normalize_lines(raw, name)
    if stated:
        mark = stated
    elif name.lower().endswith((".tsv", ".tab")):
        mark = "\t"
    else:
        mark = detect_delimiter(raw)
    first_line = raw[: raw.find(b"\n")] if b"\n" in raw else raw
    if b'"' not in first_line:  # before the table is parsed
        check_width(first_line.count(mark.encode()) + 1, name)
    if mark.encode() not in first_line and (spaced := split_at_spaces(raw)) is not None:
        raw, mark = spaced, "\t"
        findings.append(
            Finding(
                "space-delimited", "note", f"{name}: columns are separated by spaces; runs of them are one delimiter", (), 1
            )
        )
    if b'\\"' in raw:
        raw = unescape_quotes(raw, name, mark, findings)
    cells = read_cells(raw, name, mark)
    rows, findings = cells.rows, findings + cells.findings
    lines = line_numbers(rows, raw) + (1 if stated else 0)
    width, empty = rows.width, find_blank_rows(rows.get_columns())
    # Built without expressions, which would rechunk and thereby copy the whole table.
    rows = pl.DataFrame([*rows.get_columns(), lines])
    if width > 1 and empty.any():
        rows = rows.filter(~empty)
        count = int(empty.sum()) - cells.blanked
        if count > 1 or (count and not raw.endswith(b"\n\n")):
            findings.append(Finding("empty-lines", "note", f"empty lines skipped in {name}", (), count))
    first = ["" if v is None else v.strip() for v in rows.row(0)[:width]]
    has = header if header is not None else has_header(rows[1:1001].drop(LINE), first, names)
    if has:
        at, columns, rows = int(rows[LINE][0]), first, rows[1:]
        columns, rows = drop_unnamed_column(columns, rows, f"{name}:{at}", findings)
        columns = name_index_column(columns, f"{name}:{at}", findings)
        check_names(columns, name, at)
    else:
        columns = default_names(width, names, target)
        if header is None:
            findings.append(
                Finding(
                    "no-header",
                    "warning",
                    f"{name}: the first line looks like data, not like column names; the columns are "
                    + (f"taken in order as {', '.join(columns[:8])}" if names else f"named {columns[0]} to {columns[-1]}")
                    + (", ..." if names and len(columns) > 8 else ""),
                    (f"{name}:1",),
                    1,
                    "Add a line of column names" + ("." if names else ", or pass header=True if the first line is one."),
                )
            )
    if rows.height == 0:
        raise DataError(f"{name}: the file has column names but no rows.")
    rows.columns = [*columns, LINE]
    if b'="' in raw:
        rows = strip_formulas(rows, columns, findings)
    return Table(rows, findings, mark)


def strip_formulas(rows: pl.DataFrame, columns: list[str], findings: list[Finding]) -> pl.DataFrame:
    """Replace cells such as ="00123", which keep Excel from changing codes, by their text."""
    named = [c for c in columns if bool(rows[c].str.contains(r'^="[^"]*"$').any())]
    if named:
        what = 'cells such as ="00123" are read as their text'
        findings.append(Finding("formula-text", "note", what, tuple(f"column {c!r}" for c in named), len(named)))
        rows = rows.with_columns(pl.col(named).str.replace(r'^="([^"]*)"$', "${1}"))
    return rows


def find_other_format(raw: bytes) -> str | None:
    """Return the name of a text format that is no delimited text, judged by its beginning, or None."""
    start = raw[:200].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), perhaps an error message instead of a download"
    if start.startswith(b"<?xml"):
        return "XML"
    if re.match(rb"\|.*\|\s*\n\s*\|[\s:|-]+\|\s*\n", start) or re.match(rb"\+[-+=]{2,}\+?\s*\n", start):
        return "a table drawn with lines (Markdown or the output of a database)"
    if start.startswith((b"@relation", b"@attribute")):
        return "an ARFF file (Weka)"
    if re.match(rb'[\[{]\s*[\[{"]', start):
        line = raw.lstrip().partition(b"\n")[0].strip().rstrip(b",")
        try:
            return "JSON Lines" if isinstance(json.loads(line), dict) else "JSON"
        except ValueError:
            return "JSON" if re.match(rb'(?:\[\s*)?\{\s*"[^"]*"\s*:', start) else None
    return None


def split_at_spaces(raw: bytes) -> bytes | None:
    """Return the table with tabs for runs of spaces, if these separate equally many cells, many of them numbers; else None."""
    if b'"' in raw or b"\t" in raw:
        return None
    sample = [line.split() for line in raw[:CHUNK_BYTES].splitlines()[:200] if line.strip()]
    if len(raw) > CHUNK_BYTES:
        sample = sample[:-1]
    width = len(sample[0]) if sample else 0
    if width < 2 or len(sample) < 3 or any(len(cells) != width for cells in sample):
        return None
    numbers = sum(is_number(cell.decode(errors="replace")) for cells in sample[1:] for cell in cells)
    if numbers < 0.5 * width * (len(sample) - 1):
        return None
    stripped = re.sub(rb"(?m)^ +| +$", b"", raw.replace(b"\r\n", b"\n"))
    return re.sub(rb" +", b"\t", stripped)


def unescape_quotes(raw: bytes, name: str, mark: str, findings: list[Finding]) -> bytes:
    r"""Return the content with \" inside quoted cells as "", if the file escapes quotation marks so."""
    inside = re.search(rb'"[^"\n]*[^"\\\n]?\\"(?![\r\n"' + re.escape(mark.encode()) + rb"])", raw)
    if inside is None or mark == "\t":
        return raw
    count = raw.count(b'\\"')
    line = line_at(raw, inside.start())
    findings.append(
        Finding(
            "escaped-quotes",
            "note",
            'quotation marks in cells are escaped with a backslash (\\"); they are read as quotation marks',
            (f"{name}:{line}",),
            count,
        )
    )
    return raw.replace(b'\\"', b'""')


def normalize_lines(raw: bytes, name: str) -> tuple[bytes, list[Finding], str]:
    """Return the content with LF line ends and without a line such as `sep=;`, with findings and the delimiter it names."""
    findings = []
    if b"\r" in raw[:CHUNK_BYTES] and b"\n" not in raw:
        raw = raw.replace(b"\r", b"\n")
        findings.append(
            Finding(
                "line-ends",
                "warning",
                f"{name}: lines end with CR alone, as on old Macintosh systems; they are read as line ends",
                (f"{name}:1",),
                1,
                "Save the file with LF or CRLF line ends.",
            )
        )
    end = raw.find(b"\n")
    first = raw[:end].decode(errors="replace").strip() if 0 <= end < 20 else ""
    stated = re.fullmatch(r'"?sep=(.|\\t|)"?', first)
    if stated is None:
        return raw, findings, ""
    mark = "\t" if stated[1] in ("\\t", "") else stated[1]  # a tab is stripped from the line
    findings.append(
        Finding(
            "delimiter-line",
            "note",
            f"{name}: the first line, {first!r}, names the delimiter (a convention of Excel); it is skipped",
            (f"{name}:1",),
        )
    )
    if not raw[end:].strip():
        raise DataError(f"{name}: the file has no lines after {first!r}.")
    return raw[end + 1 :], findings, mark


def drop_unnamed_column(
    columns: list[str], rows: pl.DataFrame, place: str, findings: list[Finding]
) -> tuple[list[str], pl.DataFrame]:
    """Drop a last column without a name and values: every line, the column names included, ends with a delimiter."""
    if len(columns) < 2 or columns[-1] or rows[rows.columns[len(columns) - 1]].null_count() < rows.height:
        return columns, rows
    findings.append(trailing_delimiters(place, rows.height + 1))
    return columns[:-1], rows.drop(rows.columns[len(columns) - 1])


def name_index_column(columns: list[str], place: str, findings: list[Finding]) -> list[str]:
    """Name a first column without a name: pandas and R write the names of rows this way."""
    if len(columns) < 2 or columns[0] or INDEX_NAME in columns or not all(columns[1:]):
        return columns
    note = f"the first column has no name; it is read as {INDEX_NAME!r}"
    findings.append(Finding("unnamed-index", "note", note, (place,), 1, "To leave it out, export with index=False."))
    return [INDEX_NAME, *columns[1:]]


def trailing_delimiters(place: str, count: int) -> Finding:
    """Return the finding about lines that end with a delimiter."""
    return Finding(
        "trailing-delimiter",
        "warning",
        "lines end with a delimiter after the last cell; the empty cell is dropped",
        (place,),
        count,
        "Remove the delimiters at the end of lines.",
    )


def read_cells(raw: bytes, name: str, mark: str) -> Cells:
    """Return all cells as text, empty ones as null. Input that polars rejects is parsed by Python's csv module."""
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
    if quoted and mark != "\t" and mark.encode() + b' "' in raw and holds_spaced_quotes(rows):
        return read_cells_with_csv(raw, name, mark)
    return Cells(rows)


def holds_spaced_quotes(rows: pl.DataFrame) -> bool:
    """Return whether cells are quoted after a space: `a, "b"`."""
    return any(bool(rows[c].str.contains(r'^\s+".*"\s*$').any()) for c in rows.columns[1:])


def find_blank_rows(columns: list[pl.Series]) -> pl.Series:
    """Return which rows have no values. Works column by column, since one expression over all would copy the table."""
    empty = pl.repeat(True, columns[0].len(), eager=True)
    for column in columns:
        if not empty.any():
            break
        empty = empty & column.is_null()
    return empty


def read_cells_with_csv(raw: bytes, name: str, mark: str) -> Cells:
    """Parse the table with Python's csv module. Raises DataError that names the malformed lines and the likely cause.

    In tab-separated files quotation marks usually are direct speech: if they do not form valid quoted cells, they are
    taken literally. Malformations that leave no doubt about the cells are repaired and reported.
    """
    if mark == "\t" and (spoken := read_unquoted(raw)) is not None:
        return Cells(spoken)
    text = raw.decode()
    spaced = mark != "\t" and re.search(rf'(?:^|{re.escape(mark)})[ ]+"', text, re.MULTILINE) is not None
    lines = parse_lines(text, name, mark, spaced)
    findings = []
    if spaced:
        quoted = [n for n, cells in parse_lines(text, name, mark, False) if any(is_spaced_quote(c) for c in cells)]
        findings.append(
            Finding(
                "space-before-quote",
                "warning",
                f"cells have a space between the delimiter {mark!r} and the quotation mark; they are read as quoted cells",
                tuple(f"{name}:{n}" for n in quoted[:5]),
                len(quoted),
                "Remove the spaces.",
            )
        )
    widths = [len(cells) for _, cells in lines if cells and not cells[0].lstrip().startswith(COMMENT_MARKS)]
    usual = max(set(widths), key=widths.count, default=0)
    comments = {n for n, c in lines if c and len(c) != usual and c[0].lstrip().startswith(COMMENT_MARKS)}
    if comments:
        lines = [(n, [] if n in comments else cells) for n, cells in lines]
        findings.append(
            Finding(
                "comment-lines",
                "warning",
                f"{name}: lines that begin with a comment mark are skipped",
                tuple(f"{name}:{n}" for n in sorted(comments)[:5]),
                len(comments),
                "Remove them.",
            )
        )
    width = next((len(cells) for _, cells in lines if cells), 0)
    wrong = [(n, cells) for n, cells in lines if cells and len(cells) != width]
    if wrong and all(len(cells) > width and not any(c.strip() for c in cells[width:]) for _, cells in wrong):
        findings.append(trailing_delimiters(f"{name}:{wrong[0][0]}", len(wrong)))
        lines, wrong = [(n, cells[:width]) for n, cells in lines], []
    if wrong:
        raise DataError(describe_widths(name, mark, width, lines, wrong))
    rows: list[list[str | None]] = [[v or None for v in cells] or [None] * max(width, 1) for _, cells in lines]
    return Cells(pl.DataFrame(rows, schema={f"c{i}": pl.String for i in range(width)}, orient="row"), findings, len(comments))


def is_spaced_quote(cell: str) -> bool:
    """Return whether a cell begins with a space and a quotation mark, which is then part of its text."""
    return cell.startswith(" ") and cell.lstrip(" ").startswith('"')


def parse_lines(text: str, name: str, mark: str, spaced: bool) -> list[tuple[int, list[str]]]:
    """Return the number of the first line and the cells of every row. Raises DataError for broken quoting."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=spaced)
    out, line = [], 0
    try:
        for row in reader:
            start, line = line + 1, reader.line_num
            out.append((start, row))
    except csv.Error as error:
        ends = "end of data" in str(error)
        what = "a quotation mark is not closed" if ends else "text follows a closing quotation mark"
        at = line + 1 if ends else reader.line_num
        escaped = '\\"' in "\n".join(text.split("\n")[at - 1 : reader.line_num][:50])
        raise DataError(
            f"{name}:{at}: broken quoting: {what}. "
            + (
                'A quotation mark is escaped with a backslash (\\"): write "" instead.'
                if escaped
                else 'Close it, or write "" for a quotation mark inside a quoted cell.'
            )
        ) from error
    return out


def describe_widths(
    name: str, mark: str, width: int, lines: list[tuple[int, list[str]]], wrong: list[tuple[int, list[str]]]
) -> str:
    """Return the error about lines with another number of cells than the first, with the likely cause."""
    total = sum(1 for _, cells in lines if cells)
    places = ", ".join(f"{name}:{n} has {len(cells)}" for n, cells in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    head = f"{name}: {len(wrong)} of {total} lines do not have {width} cells like the first: {places}."
    same = {len(cells) for _, cells in wrong}
    if width == 1 and len(wrong) >= total - 2 and len(same) == 1:
        return f"{head} The first line has no delimiter: perhaps a title. Remove it."
    if len(wrong) == total - 1 and same == {width + 1} and mark != "\t" and width > 1:
        names = [cells[0].strip() for _, cells in wrong]
        counted = any(names == [str(i + first) for i in range(len(names))] for first in (0, 1))
        if counted or (len(set(names)) == len(names) and not any(is_number(n) for n in names)):
            return (
                f"{head} Each line has one cell more than there are names: the first column, perhaps of row names, has no name. "
                "Add a name for it to the first line."
            )
    extra = [cells for _, cells in wrong if len(cells) > width]
    decimals = r"\d+" if len(wrong) > total / 2 else r"\d{3}"
    if mark == "," and extra and len(extra) == len(wrong) and all(splits_numbers(cells, decimals) for cells in extra[:20]):
        return (
            f"{head} Numbers with a comma, such as 1,5 or 1,299, are split at it. Put them in quotation marks, or use another "
            "delimiter, such as ';'."
        )
    if any(c.lstrip().startswith("'") and c.count("'") == 1 for cells in extra[:20] for c in cells):
        return f"{head} Cells are in single quotation marks, which do not quote: use double ones."
    broken = next((n for (n, a), (m, b) in pairwise(wrong) if n + 1 == m and len(a) + len(b) == width + 1), None)
    if broken is not None:
        return f"{head} The cell at the end of line {broken} seems to continue in the next: put cells with line breaks in quotation marks."
    if all(len(cells) == 1 for _, cells in wrong) and wrong[-1][0] == lines[-1][0] and len(wrong) <= 3:
        return f"{head} These lines have no delimiter: perhaps a title or a footer. Remove them."
    return f"{head} Quote cells that contain {mark!r}, or add the missing cells."


def splits_numbers(cells: list[str], second: str) -> bool:
    """Return whether neighbouring cells may be the parts of a number with a comma; `second` is the pattern of the second."""
    return any(
        re.fullmatch(r"\D*\d{1,3}", a.strip()) and re.fullmatch(rf"{second}(?:\.\d+)?", b.strip()) for a, b in pairwise(cells)
    )


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

    It does if one of them is a known name. It does not if it has numbers in numeric columns, values that occur again below, or
    sentences in columns of sentences. Numbers may be names too: see `has_numeric_names`.
    """
    if names:
        known = {simplify_name(n) for n in names}
        if any(simplify_name(f) in known for f in first) or not len(names) - 1 <= len(first) <= len(names):
            return True
        if body.height == 0:
            return False
    if body.height == 0:
        return not any(is_number(f) for f in first)
    votes, numeric, other = [], {}, {}
    for value, column in zip(first, body.columns):
        text = blank_missing(body[column])
        present = text.drop_nulls()
        found = infer_format(text)
        if present.len() and found.values.drop_nulls().len() >= 0.9 * present.len():
            parsed = found.format.parse(pl.Series([value]))[0]
            votes.append(parsed is not None or value.lower() in MISSING_MARKERS[1:])
            numeric[column] = parsed, found.values
        else:
            other[column] = value, body[column].str.strip_chars().drop_nulls()
    if votes:
        return not all(votes) or has_numeric_names(numeric, other)
    if any(re.search(p, v) for v in first for p in (IMAGE_FILE_PATTERN, AUDIO_FILE_PATTERN, VIDEO_FILE_PATTERN)):
        return False
    if any(v in set(body[c].str.strip_chars().drop_nulls()) for v, c in zip(first, body.columns)):
        return False
    return not all(" " in v and 1 / 2 < len(v) / (median_length(body[c]) or 1) < 3 for v, c in zip(first, body.columns))


def has_numeric_names(numeric: dict[str, tuple[float | None, pl.Series]], other: dict[str, tuple[str, pl.Series]]) -> bool:
    """Return whether a first line of numbers, such as wavelengths or years, holds names.

    The other cells must not occur below, and the numbers must be equally spaced (and those of the next line not), or lie
    outside of their columns while the other columns repeat their values, or be whole while those of the columns are not and
    the other columns repeat their values often.
    """
    if any(value in set(values) for value, values in other.values()):
        return False
    cells = [value for value, _ in numeric.values()]
    if any(value is None for value in cells):
        return False
    recur = bool(other) and all(values.n_unique() <= values.len() / MIN_RECURRENCE for _, values in other.values())
    whole = all(value == int(value) for value in cells if value is not None and abs(value) < 1e15)
    fractions = all(bool((values.drop_nulls() % 1 != 0).mean() > 0.5) for _, values in numeric.values())  # type: ignore[operator]
    if recur and whole and fractions:
        return True
    steps = np.diff(np.array(cells, dtype=float))
    next_steps = np.diff(np.array([values[0] for _, values in numeric.values()], dtype=float))
    even = len(steps) >= MIN_EVEN_STEPS and steps[0] > 0 and np.allclose(steps, steps[0])
    if even and not np.allclose(next_steps, next_steps[0]):
        return True
    ranges = [(value, values.min(), values.max()) for value, values in numeric.values()]
    outside = all(low is not None and not low <= value <= high for value, low, high in ranges)  # type: ignore[operator]
    repeats = bool(other) and all(values.n_unique() <= values.len() / 2 for _, values in other.values())
    return outside and repeats and len(numeric) >= 2


def simplify_name(name: str) -> str:
    """Normalize a column name for comparison: without case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_\-]+", "", name).casefold()


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


def check_width(count: int, name: str) -> None:
    """Raise DataError for more columns than a table may have."""
    if count > MAX_COLUMNS:
        raise DataError(
            f"{name}: {count:,} columns, but a table may have {MAX_COLUMNS:,}. Keep those that matter, or transpose it."
        )


def check_names(columns: list[str], name: str, line: int) -> None:
    """Raise DataError for missing, duplicate or reserved column names."""
    check_width(len(columns), name)
    empty = [i + 1 for i, c in enumerate(columns) if not c]
    at: dict[str, list[int]] = {}
    for i, column in enumerate(columns, 1):
        if column:
            at.setdefault(column, []).append(i)
    twice = {c: where for c, where in at.items() if len(where) > 1}
    hidden = [c for c in columns if c in BOOKKEEPING]
    problems = [f"column {', '.join(map(str, empty))} has no name"] if empty else []
    problems += [f"{c!r} is the name of several columns ({', '.join(map(str, where))})" for c, where in twice.items()]
    problems += [f"{c!r} is a reserved name" for c in hidden]
    if problems:
        raise DataError(f"{name}:{line}: {'; '.join(problems)}. Every column needs a unique name.")
