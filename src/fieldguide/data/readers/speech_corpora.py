"""Reader for speech corpora: LJ Speech (metadata.csv, wavs/) and Common Voice (train.tsv, dev.tsv, clips/)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding
from fieldguide.data.readers import delimited
from fieldguide.data.readers.recordings import AUDIO, SAID, SHOWN, SOUNDS, unnamed
from fieldguide.data.source import Options, Raw, relative, sha256, split_of, visible

NAME = "speech corpora"
UNDERSTANDS = (
    "speech corpora: LJ Speech (metadata.csv with id|transcript|normalized transcript, and wavs/) or "
    "Common Voice (train.tsv, dev.tsv and test.tsv with path and sentence, and clips/)"
)
SPEAKER = "client_id"


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir():
        return 0
    return 10 if is_lj(source) or voice_tables(source) else 0


def is_lj(folder: Path) -> bool:
    """Return whether the folder contains wavs/ and a metadata.csv separated by |."""
    file = folder / "metadata.csv"
    if not (file.is_file() and (folder / "wavs").is_dir()):
        return False
    with file.open("rb") as opened:
        return b"|" in opened.readline(1 << 16)


def voice_tables(folder: Path) -> dict[Path, str | None]:
    """Return Common Voice's tables and their splits: those of train, dev and test that exist, else validated.tsv."""
    if not (folder / "clips").is_dir():
        return {}
    named = {p: split_of(p.stem) for p in visible(folder)[0] if p.suffix.lower() == ".tsv" and split_of(p.stem)}
    return named or {p: None for p in (folder / "validated.tsv",) if p.is_file()}


def load(source: Path, options: Options) -> Raw:
    """Read an LJ Speech or Common Voice folder."""
    if is_lj(source):
        return lj(source)
    tables, parts = voice_tables(source), []
    for number, (path, split) in enumerate(tables.items()):
        parts.append((voice(path, source, number), split))
    others = [p for p in visible(source)[0] if p.suffix.lower() == ".tsv" and p not in tables]
    findings = [f for raw, _ in parts for f in raw.findings]
    if others:
        findings.append(
            Finding("other-files", "note", "tables that are ignored", tuple(p.name for p in others[:SHOWN]), len(others))
        )
    rows = pl.concat([raw.rows for raw, _ in parts], how="diagonal")
    splits = np.repeat(np.array([s for _, s in parts], dtype=object), [raw.rows.height for raw, _ in parts])
    speaker = {SPEAKER: "group"} if SPEAKER in rows.columns else {}
    raw = Raw(
        rows,
        [f for raw, _ in parts for f in raw.files],
        source,
        findings,
        splits if len(parts) > 1 else None,
        {AUDIO: "audio", SAID: "text", **({SPEAKER: "identifier"} if speaker else {})},
        SAID,
        roles=speaker,
        unusable=sum(r.unusable for r, _ in parts),
    )
    return complete(raw, source / "clips")


def lj(source: Path) -> Raw:
    """Read LJ Speech. Each line holds the recording's name, the transcript, and optionally the normalized transcript
    with numbers written out, which is preferred because it matches the speech."""
    path = source / "metadata.csv"
    lines, entry, findings = cells(path, source, "|")
    if lines and not present(source / "wavs", lines[0][1][0]) and lines[0][1][0].lower() in ("id", "file", "filename", "name"):
        lines = lines[1:]
    rows = [
        (name(source / "wavs", c[0]), next((x for x in c[:0:-1] if x.strip()), None), 0, n)
        for n, c in lines
        if 2 <= len(c) <= 3
    ]
    wrong = [f"{path.name}:{n} has {len(c)}" for n, c in lines if not 2 <= len(c) <= 3]
    if wrong:
        findings.append(
            Finding(
                "wrong-cells",
                "warning",
                "lines that do not have 2 or 3 cells separated by |",
                tuple(wrong[:SHOWN]),
                len(wrong),
                "Write id|transcript|normalized transcript.",
                len(wrong),
            )
        )
    return complete(raw_of(rows, source, entry, findings, len(wrong)), source / "wavs")


def voice(path: Path, root: Path, number: int) -> Raw:
    """Read one table of Common Voice. Raises DataError if a required column is missing."""
    lines, entry, findings = cells(path, root, "\t")
    head = [c.strip() for c in lines[0][1]] if lines else []
    lacking = [n for n in ("path", "sentence") if n not in head]
    if lacking:
        raise DataError(f"{entry.path}:1: the column {lacking[0]!r} is missing. The columns are: {', '.join(head)}.")
    good = [(n, c) for n, c in lines[1:] if len(c) == len(head)]
    wrong = [f"{entry.path}:{n} has {len(c)}" for n, c in lines[1:] if len(c) != len(head)]
    if wrong:
        findings.append(
            Finding(
                "wrong-cells",
                "warning",
                f"lines that do not have {len(head)} cells like the first",
                tuple(wrong[:SHOWN]),
                len(wrong),
                "Correct them: a tab is missing, or a sentence contains one.",
                len(wrong),
            )
        )
    at, said = head.index("path"), head.index("sentence")
    rows = [(name(root / "clips", c[at]), c[said].strip() or None, number, n) for n, c in good]
    raw = raw_of(rows, root, entry, findings, len(wrong))
    if SPEAKER in head:
        speaker = head.index(SPEAKER)
        raw.rows = raw.rows.with_columns(pl.Series(SPEAKER, [c[speaker] for _, c in good], dtype=pl.String))
    return raw


def raw_of(rows: list[tuple], root: Path, entry: FileEntry, findings: list[Finding], unusable: int) -> Raw:
    """Build the raw table of one file. Raises DataError if it has no rows."""
    table = pl.DataFrame(rows, schema={AUDIO: pl.String, SAID: pl.String, FILE: pl.Int32, LINE: pl.Int64}, orient="row")
    if not rows:
        raise DataError(f"{entry.path}: no usable lines." + "".join(f"\n  - {f}" for f in findings))
    entry = FileEntry(entry.path, entry.bytes, entry.sha256, rows=len(rows))
    return Raw(table, [entry], root, findings, kinds={AUDIO: "audio", SAID: "text"}, target=SAID, unusable=unusable)


def complete(raw: Raw, folder: Path) -> Raw:
    """Drop repeated rows of a recording, keeping the first, and report them and the recordings without a row."""
    paths = raw.rows[AUDIO]
    again = (~paths.is_first_distinct() & paths.is_not_null()).to_numpy()
    if again.any():
        rows = np.flatnonzero(again)
        where = tuple(
            f"{raw.files[raw.rows[FILE][int(i)]].path}:{raw.rows[LINE][int(i)]} ({Path(paths[int(i)]).name})"
            for i in rows[:SHOWN]
        )
        raw.findings.append(
            Finding(
                "duplicate-id",
                "warning",
                "lines for a recording that an earlier line already contains",
                where,
                len(rows),
                "Keep one line per recording.",
                len(rows),
            )
        )
        raw.rows = raw.rows.filter(~again)
        raw.splits = None if raw.splits is None else raw.splits[~again]
        raw.unusable += len(rows)
        counts = Counter(raw.rows[FILE].to_list())
        raw.files = [FileEntry(f.path, f.bytes, f.sha256, counts[i], f.rows - counts[i]) for i, f in enumerate(raw.files)]
    named = {Path(p).name for p in paths.drop_nulls().to_list()}
    unnamed(raw, [p for p in visible(folder)[0] if p.suffix.lower() in SOUNDS and p.name not in named])
    return raw


def cells(path: Path, root: Path, mark: str) -> tuple[list[tuple[int, list[str]]], FileEntry, list[Finding]]:
    """Return (line, cells) of every non-empty line, the manifest entry and the findings.

    Quotation marks are part of the text in these corpora, unless they enclose a whole cell and inner ones are doubled.
    """
    content = path.read_bytes()
    called = relative(path, root)
    text, findings = delimited.decode(content, called)
    lines = [
        (n, [unquoted(c) for c in line.rstrip("\r").split(mark)])
        for n, line in enumerate(text.decode().split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{called}: the file is empty.")
    return lines, FileEntry(called, len(content), sha256(content)), findings


def unquoted(cell: str) -> str:
    """Remove csv quoting from a cell that uses it."""
    inner = cell[1:-1]
    whole = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole and '""' in inner else cell


def present(folder: Path, called: str) -> Path | None:
    """Return the path of a recording whose name may lack the extension, or None if it does not exist."""
    called = called.strip()
    plain = folder / called
    if called and plain.suffix.lower() in SOUNDS and plain.is_file():
        return plain
    return next((p for s in (".wav", ".flac", ".mp3", ".ogg") if (p := folder / (called + s)).is_file()), None)


def name(folder: Path, called: str) -> str | None:
    """Return the full path of a recording; if it does not exist, the path where it is expected."""
    called = called.strip()
    if not called:
        return None
    missed = folder / (called if Path(called).suffix.lower() in SOUNDS else f"{called}.wav")
    return str((present(folder, called) or missed).absolute())
