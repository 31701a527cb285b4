"""Reader for question answering data in SQuAD format, versions 1.1 and 2.0.

A JSON of paragraphs, each with a context and its questions and answers (`qas`), or of records with one context and one
question each; a single file, or a folder with one file per split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import parse_json
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.readers.table import join_splits
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

NAME = "SQuAD"
UNDERSTANDS = (
    "extractive question answering, SQuAD: a .json of paragraphs, each with a context and `qas`, or of records with a "
    "context, a question and answers; or a folder with one such file for each of train, dev and test"
)
HEAD_BYTES = 1 << 16  # bytes at the start of a file that are searched for the format's keys
SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "id": pl.String,
    "title": pl.String,
    "context": pl.String,
    "question": pl.String,
    "answers": pl.List(pl.Struct({"text": pl.String, "start": pl.Int64})),
    "is_impossible": pl.Boolean,
    LINE: pl.Int64,
}


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    files = [source] if source.is_file() else list_files(source)
    return 10 if any(p.suffix.lower() == ".json" and has_questions(p) for p in files) else 0


def list_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that are named after splits."""
    return [p for p in list_visible(folder)[0] if p.is_file() and p.suffix.lower() == ".json" and split_of(p.name)]


def has_questions(path: Path) -> bool:
    """Return whether the start of a file contains the keys of the format; a long context may precede the first question."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).replace(b"\0", b"")
    return b'"qas"' in head or b'"paragraphs"' in head or (b'"context"' in head and b'"question"' in head)


def load(source: Path, options: Options) -> RawTable:
    """Read one file or a folder with one file per split."""
    if source.is_file():
        return load_file(source, source.parent, options)
    parts = [(load_file(p, source, options), str(split_of(p.name))) for p in list_files(source)]
    if len({split for _, split in parts}) < len(parts):
        raise DataError(f"{source}: several files for one split: {', '.join(raw.files[0].path for raw, _ in parts)}.")
    raw = join_splits(parts, source)
    raw.kinds, raw.target = parts[0][0].kinds, parts[0][0].target
    return raw


def load_file(path: Path, root: Path, options: Options) -> RawTable:
    """Read one file with one row per question. The line of a row is the number of the question in the file, from 1."""
    name, content = relative_path(path, root), path.read_bytes()
    text, findings = delimited.decode(content, name)
    document = parse_json(text, name, expect=object)
    found = [*read_records(document, name)]
    if not found:
        raise DataError(f"{name}: no questions found.")
    unsaid = [i for i, row in enumerate(found) if not row["answers"] and row["is_impossible"] is None]
    if unsaid and len(unsaid) < len(found):
        findings.append(
            Finding(
                "answers-absent",
                "note",
                "questions without answers that are not marked `is_impossible`; treated as unanswerable from their context",
                tuple(f"{name}:{i + 1}" for i in unsaid[:5]),
                len(unsaid),
            )
        )
    rows = pl.DataFrame([{**row, LINE: i + 1} for i, row in enumerate(found)], schema=SCHEMA)
    if options.labels_optional and not any(row["answers"] for row in found):
        rows = rows.drop("answers")
    empty = [c for c in ("id", "title", "is_impossible") if rows[c].null_count() == rows.height]
    rows = rows.drop(empty).with_columns(pl.lit(0, pl.Int32).alias(FILE))
    return RawTable(
        rows,
        [FileEntry(name, len(content), sha256(content), rows=rows.height)],
        root,
        findings,
        kinds={"context": "text", "question": "text", **({"answers": "list"} if "answers" in rows.columns else {})},
        target="answers",
    )


def read_records(document: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield every question of a file as a row. Raises DataError with the location of a malformed entry."""
    entries, place = document, ""
    if isinstance(document, dict) and "qas" not in document:
        entries, place = require_key(document, "data", list, name, ""), "data"
    for number, entry in enumerate(require_list(entries, name, place or "the file")):
        where = f"{place}[{number}]"
        if not isinstance(entry, dict):
            raise type_error(name, where, "an object", entry)
        if "question" in entry:
            yield parse_question(entry, require_key(entry, "context", str, name, where), entry.get("title"), name, where)
            continue
        paragraphs = require_key(entry, "paragraphs", list, name, where) if "qas" not in entry else [entry]
        for n, paragraph in enumerate(paragraphs):
            inner = f"{where}.paragraphs[{n}]" if "qas" not in entry else where
            if not isinstance(paragraph, dict):
                raise type_error(name, inner, "an object", paragraph)
            context = require_key(paragraph, "context", str, name, inner)
            for m, question in enumerate(require_key(paragraph, "qas", list, name, inner)):
                if not isinstance(question, dict):
                    raise type_error(name, f"{inner}.qas[{m}]", "an object", question)
                yield parse_question(question, context, entry.get("title"), name, f"{inner}.qas[{m}]")


def parse_question(entry: dict[str, Any], context: str, title: Any, name: str, where: str) -> dict[str, Any]:
    """Return a question with its answers; answer positions are counted from the first non-blank character."""
    blanks, given = len(context) - len(context.lstrip()), entry.get("answers", [])
    if isinstance(given, dict):  # Hugging Face format: {"text": [], "answer_start": []}
        texts = require_key(given, "text", list, name, f"{where}.answers")
        starts = given.get("answer_start") or [None] * len(texts)
        if len(starts) != len(texts):
            raise DataError(f"{name}: {where}.answers has {len(texts)} texts but {len(starts)} starts; each text needs one.")
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    answers = []
    for number, answer in enumerate(require_list(given or [], name, f"{where}.answers")):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise type_error(name, f"{where}.answers[{number}]", 'an object with a "text"', answer)
        start = answer.get("answer_start")
        if start is not None and (not isinstance(start, int) or isinstance(start, bool)):
            raise type_error(name, f"{where}.answers[{number}].answer_start", "an integer", start)
        answers.append({"text": answer["text"], "start": None if start is None else start - blanks})
    impossible, key = entry.get("is_impossible"), entry.get("id")
    if impossible is not None and not isinstance(impossible, bool):
        raise type_error(name, f"{where}.is_impossible", "true or false", impossible)
    return {
        "id": None if key is None else str(key),
        "title": None if title is None else str(title),
        "context": context,
        "question": require_key(entry, "question", str, name, where),
        "answers": answers,
        "is_impossible": impossible,
    }


def require_key(entry: dict[str, Any], key: str, kind: type, name: str, where: str) -> Any:
    """Return `entry[key]`. Raises DataError if it is missing or has another type."""
    if key not in entry:
        raise DataError(
            f"{name}: {where or 'the file'} lacks the key {key!r} (it has {', '.join(map(repr, entry)) or 'no keys'}). "
            "The SQuAD format is data[...].paragraphs[...], each with a context and qas[...] of question and answers."
        )
    if not isinstance(entry[key], kind):
        raise type_error(name, f"{where}.{key}".lstrip("."), "a list" if kind is list else "text", entry[key])
    return entry[key]


def require_list(value: Any, name: str, where: str) -> list[Any]:
    """Return the value. Raises DataError if it is not a list."""
    if not isinstance(value, list):
        raise type_error(name, where, "a list", value)
    return value


def type_error(name: str, where: str, want: str, value: Any) -> DataError:
    """Return the error for a value of the wrong type."""
    return DataError(f"{name}: {where} is {json.dumps(value, ensure_ascii=False)[:60]} but must be {want}.")
