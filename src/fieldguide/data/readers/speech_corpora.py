"""Reader for speech corpora: LJ Speech (metadata.csv, wavs/) and Common Voice (train.tsv, dev.tsv, clips/)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE, FileEntry, Finding, Role
from fieldguide.data.readers import delimited
from fieldguide.data.readers.recordings import AUDIO, MAX_SHOWN_PLACES, SOUND_SUFFIXES, TRANSCRIPT, note_unlisted
from fieldguide.data.source import Options, RawTable, list_visible, relative_path, sha256, split_of

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
    return 10 if is_lj(source) or find_common_voice_tables(source) else 0


def is_lj(folder: Path) -> bool:
    """Return whether the folder contains wavs/ and a metadata.csv separated by |."""
    file = folder / "metadata.csv"
    if not (file.is_file() and (folder / "wavs").is_dir()):
        return False
    with file.open("rb") as opened:
        return b"|" in opened.readline(1 << 16)


def find_common_voice_tables(folder: Path) -> dict[Path, str | None]:
    """Return Common Voice's tables and their splits: those of train, dev and test that exist, else validated.tsv."""
    if not (folder / "clips").is_dir():
        return {}
    named = {p: split_of(p.stem) for p in list_visible(folder)[0] if p.suffix.lower() == ".tsv" and split_of(p.stem)}
    return named or {p: None for p in (folder / "validated.tsv",) if p.is_file()}


def load(source: Path, options: Options) -> RawTable:
    """Read an LJ Speech or Common Voice folder."""
    if is_lj(source):
        return load_lj_speech(source)
    tables, parts = find_common_voice_tables(source), []
    for number, (path, split) in enumerate(tables.items()):
        parts.append((load_common_voice(path, source, number), split))
    others = [p for p in list_visible(source)[0] if p.suffix.lower() == ".tsv" and p not in tables]
    findings = [f for raw, _ in parts for f in raw.findings]
    if others:
        findings.append(
            Finding(
                "other-files", "note", "tables that are ignored", tuple(p.name for p in others[:MAX_SHOWN_PLACES]), len(others)
            )
        )
    rows = pl.concat([raw.rows for raw, _ in parts], how="diagonal")
    splits = np.repeat(np.array([s for _, s in parts], dtype=object), [raw.rows.height for raw, _ in parts])
    speaker: dict[str, Role] = {SPEAKER: "group"} if SPEAKER in rows.columns else {}
    raw = RawTable(
        rows,
        [f for raw, _ in parts for f in raw.files],
        source,
        findings,
        splits if len(parts) > 1 else None,
        {AUDIO: "audio", TRANSCRIPT: "text", **({SPEAKER: "identifier"} if speaker else {})},
        TRANSCRIPT,
        roles=speaker,
        unusable=sum(r.unusable for r, _ in parts),
    )
    return drop_repeated(raw, source / "clips")


def load_lj_speech(source: Path) -> RawTable:
    """Read LJ Speech. Each line holds the recording's name, the transcript, and optionally the normalized transcript
    with numbers written out, which is preferred because it matches the speech."""
    path = source / "metadata.csv"
    lines, entry, findings = read_cells(path, source, "|")
    if (
        lines
        and not find_recording(source / "wavs", lines[0][1][0])
        and lines[0][1][0].lower() in ("id", "file", "filename", "name")
    ):
        lines = lines[1:]
    rows = [
        (recording_path(source / "wavs", c[0]), next((x for x in c[:0:-1] if x.strip()), None), 0, n)
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
                tuple(wrong[:MAX_SHOWN_PLACES]),
                len(wrong),
                "Write id|transcript|normalized transcript.",
                len(wrong),
            )
        )
    return drop_repeated(build_raw(rows, source, entry, findings, len(wrong)), source / "wavs")


def load_common_voice(path: Path, root: Path, number: int) -> RawTable:
    """Read one table of Common Voice. Raises DataError if a required column is missing."""
    lines, entry, findings = read_cells(path, root, "\t")
    head = [c.strip() for c in lines[0][1]] if lines else []
    missing = [n for n in ("path", "sentence") if n not in head]
    if missing:
        raise DataError(f"{entry.path}:1: the column {missing[0]!r} is missing. The columns are: {', '.join(head)}.")
    good = [(n, c) for n, c in lines[1:] if len(c) == len(head)]
    wrong = [f"{entry.path}:{n} has {len(c)}" for n, c in lines[1:] if len(c) != len(head)]
    if wrong:
        findings.append(
            Finding(
                "wrong-cells",
                "warning",
                f"lines that do not have {len(head)} cells like the first",
                tuple(wrong[:MAX_SHOWN_PLACES]),
                len(wrong),
                "Correct them: a tab is missing, or a sentence contains one.",
                len(wrong),
            )
        )
    at, sentence = head.index("path"), head.index("sentence")
    rows = [(recording_path(root / "clips", c[at]), c[sentence].strip() or None, number, n) for n, c in good]
    raw = build_raw(rows, root, entry, findings, len(wrong))
    if SPEAKER in head:
        speaker = head.index(SPEAKER)
        raw.rows = raw.rows.with_columns(pl.Series(SPEAKER, [c[speaker] for _, c in good], dtype=pl.String))
    return raw


def build_raw(
    rows: Sequence[tuple[str | None, str | None, int, int]],
    root: Path,
    entry: FileEntry,
    findings: list[Finding],
    unusable: int,
) -> RawTable:
    """Build the raw table of one file. Raises DataError if it has no rows."""
    table = pl.DataFrame(rows, schema={AUDIO: pl.String, TRANSCRIPT: pl.String, FILE: pl.Int32, LINE: pl.Int64}, orient="row")
    if not rows:
        raise DataError(f"{entry.path}: no usable lines." + "".join(f"\n  - {f}" for f in findings))
    entry = FileEntry(entry.path, entry.bytes, entry.sha256, rows=len(rows))
    return RawTable(
        table, [entry], root, findings, kinds={AUDIO: "audio", TRANSCRIPT: "text"}, target=TRANSCRIPT, unusable=unusable
    )


def drop_repeated(raw: RawTable, folder: Path) -> RawTable:
    """Drop repeated rows of a recording, keeping the first, and report them and the recordings without a row."""
    paths = raw.rows[AUDIO]
    again = (~paths.is_first_distinct() & paths.is_not_null()).to_numpy()
    if again.any():
        rows = np.flatnonzero(again)
        where = tuple(
            f"{raw.files[raw.rows[FILE][int(i)]].path}:{raw.rows[LINE][int(i)]} ({Path(paths[int(i)]).name})"
            for i in rows[:MAX_SHOWN_PLACES]
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
    note_unlisted(raw, [p for p in list_visible(folder)[0] if p.suffix.lower() in SOUND_SUFFIXES and p.name not in named])
    return raw


def read_cells(path: Path, root: Path, mark: str) -> tuple[list[tuple[int, list[str]]], FileEntry, list[Finding]]:
    """Return (line, cells) of every non-empty line, the manifest entry and the findings.

    Quotation marks are part of the text in these corpora, unless they enclose a whole cell and inner ones are doubled.
    """
    content = path.read_bytes()
    called = relative_path(path, root)
    text, findings = delimited.decode(content, called)
    lines = [
        (n, [unquote(c) for c in line.rstrip("\r").split(mark)])
        for n, line in enumerate(text.decode().split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{called}: the file is empty.")
    return lines, FileEntry(called, len(content), sha256(content)), findings


def unquote(cell: str) -> str:
    """Remove csv quoting from a cell that uses it."""
    inner = cell[1:-1]
    whole = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole and '""' in inner else cell


def find_recording(folder: Path, called: str) -> Path | None:
    """Return the path of a recording whose name may lack the extension, or None if it does not exist."""
    called = called.strip()
    plain = folder / called
    if called and plain.suffix.lower() in SOUND_SUFFIXES and plain.is_file():
        return plain
    return next((p for s in (".wav", ".flac", ".mp3", ".ogg") if (p := folder / (called + s)).is_file()), None)


def recording_path(folder: Path, called: str) -> str | None:
    """Return the full path of a recording; if it does not exist, the path where it is expected."""
    called = called.strip()
    if not called:
        return None
    missed = folder / (called if Path(called).suffix.lower() in SOUND_SUFFIXES else f"{called}.wav")
    return str((find_recording(folder, called) or missed).absolute())
