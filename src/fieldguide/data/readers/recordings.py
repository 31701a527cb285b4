"""Reader for recordings: a folder with a table of transcripts or a text file per recording, or recordings alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import normalize_name
from fieldguide.data.dataset import BOOKKEEPING, FILE, LINE, FileEntry, Finding, Severity
from fieldguide.data.media.audio import SUPPORTED_SUFFIXES, UNSUPPORTED_SUFFIXES
from fieldguide.data.readers import delimited, table
from fieldguide.data.readers.image_folder import is_hidden
from fieldguide.data.source import Options, RawTable, folder_split, relative_path, sha256
from fieldguide.data.text_values import AUDIO_FILE_PATTERN, mean_value

NAME = "recordings"
UNDERSTANDS = (
    "recordings (.wav, .flac, .ogg, .mp3): a folder of them with a table of file names and transcripts, or with "
    "x.txt next to each x.wav, optionally below train, val and test; for prediction, recordings alone"
)
SOUND_SUFFIXES = SUPPORTED_SUFFIXES.union(UNSUPPORTED_SUFFIXES)
TRANSCRIPT_NAMES = (
    "transcript",
    "transcription",
    "sentence",
    "text",
    "normalized_text",
    "normalized_transcription",
    "normalized",
    "utterance",
    "words",
)
AUDIO, TRANSCRIPT = "audio", "transcript"  # column names if no table defines them
MAX_SHOWN_PLACES = 5


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if source.suffix.lower() in SOUND_SUFFIXES else 0
    if not any(True for _ in find_recordings(source)):
        return 0
    return (
        9
        if table.list_tables(table.find_table_folder(source))
        or any(p.with_suffix(".txt").is_file() for p in find_recordings(source))
        else 7
    )


def find_recordings(folder: Path) -> Iterable[Path]:
    """Yield all recordings below a folder without following symbolic links to folders."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not is_hidden(f))
        yield from (Path(at, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in SOUND_SUFFIXES and not is_hidden(f))


def load(source: Path, options: Options) -> RawTable:
    """Read one recording or a folder of them, with transcripts if there are any."""
    if source.is_file():
        text_file = source.with_suffix(".txt")
        return (
            load_with_text_files([source], source.parent, options)
            if text_file.is_file()
            else load_without_transcripts([source], source.parent)
        )
    source = table.find_table_folder(source)
    paths = list(find_recordings(source))
    if table.list_tables(source):
        raw = table.load(source, options)
        return resolve_file_names(raw, paths, source, options)
    return (
        load_with_text_files(paths, source, options)
        if any(p.with_suffix(".txt").is_file() for p in paths)
        else load_without_transcripts(paths, source)
    )


def load_without_transcripts(paths: list[Path], root: Path) -> RawTable:
    """Return recordings without transcripts."""
    return RawTable(
        pl.DataFrame({AUDIO: [str(p.absolute()) for p in paths]}),
        [],
        root,
        splits=split_by_folder(paths, root),
        kinds={AUDIO: "audio"},
    )


def split_by_folder(paths: list[Path], root: Path) -> np.ndarray | None:
    """Return the splits if every recording is below a folder named after a split, else None."""
    found = [folder_split(p.relative_to(root).parts[0]) if p.parent != root else None for p in paths]
    return np.array(found, dtype=object) if all(found) and len(set(found)) > 1 else None


# One text file per recording


def load_with_text_files(paths: list[Path], root: Path, options: Options) -> RawTable:
    """Read recordings with a text file of the same name each. Raises DataError if no transcript can be read."""
    rows, files, kept = [], [], []
    findings: list[Finding] = []
    silent: list[Path] = []
    damaged: list[str] = []
    for path in paths:
        text_file = path.with_suffix(".txt")
        text, name = None, relative_path(text_file, root)
        if text_file.is_file():
            content = text_file.read_bytes()
            try:
                decoded, found = delimited.decode(content, name)
                text, findings = decoded.decode().strip(), findings + found
            except DataError as error:
                damaged.append(f"{name} ({str(error).partition(': ')[2]})")
                continue
            files.append(FileEntry(name, len(content), sha256(content), rows=0))
        elif not options.labels_optional:
            silent.append(path)
            continue
        kept.append(path)
        rows.append((str(path.absolute()), text))
    at = Counter(p.with_suffix("") for p in paths)
    lone = [p for folder in {p.parent for p in paths} for p in sorted(folder.glob("*.txt")) if p.with_suffix("") not in at]
    several = [p for p in paths if at[p.with_suffix("")] > 1]
    problems: list[tuple[str, Severity, str, Sequence[Path | str], str, int]] = [
        (
            "no-transcript",
            "warning",
            "recordings without a transcript file",
            silent,
            "Write the transcript to a text file of the same name, or remove them.",
            len(silent),
        ),
        (
            "unreadable-text",
            "warning",
            "transcripts that cannot be read as text",
            damaged,
            "Save them again as UTF-8 text.",
            len(damaged),
        ),
        (
            "shared-transcript",
            "warning",
            "recordings that share a transcript because only their extensions differ",
            several,
            "Keep one of them.",
            0,
        ),
        ("no-recording", "note", "transcripts without a recording", lone, "", 0),
    ]
    for check, severity, what, places, remedy, unusable in problems:
        if places:
            shown = tuple(p if isinstance(p, str) else relative_path(p, root) for p in places[:MAX_SHOWN_PLACES])
            findings.append(Finding(check, severity, what, shown, len(places), remedy, unusable))
    if not rows:
        raise DataError(f"{root}: no recording has a readable transcript." + "".join(f"\n  - {f}" for f in findings))
    frame = pl.DataFrame(rows, schema={AUDIO: pl.String, TRANSCRIPT: pl.String}, orient="row")
    return RawTable(
        frame,
        files,
        root,
        findings,
        split_by_folder(kept, root),
        {AUDIO: "audio", TRANSCRIPT: "text"},
        TRANSCRIPT,
        unusable=sum(f.unusable for f in findings),
    )


# A table of file names and transcripts


def resolve_file_names(raw: RawTable, paths: list[Path], root: Path, options: Options) -> RawTable:
    """Resolve the column of file names in a table to recordings below `root`.

    The column is found by its values: relative paths, file names, or names without extension. Raises DataError if no
    column matches.
    """
    where = RecordingIndex(paths, root)
    columns = [c for c in raw.rows.columns if c not in BOOKKEEPING and raw.rows[c].dtype == pl.String]
    shares = {c: where.match_fraction(raw.rows[c]) for c in columns if c != options.target}
    name = max(shares, key=lambda c: shares[c], default=None)
    if name is None or shares[name] < 0.5:
        listed = ", ".join(columns)
        raise DataError(
            f"{root}: no column of {raw.files[0].path} ({listed}) contains the names of the recordings in the folder, "
            f"such as {relative_path(paths[0], root)}. One column must contain their file names."
        )
    rows = raw.rows
    full = [where.find(v) or v for v in rows[name].to_list()]
    raw.rows = rows.with_columns(pl.Series(name, full, dtype=pl.String))
    raw.kinds[name] = "audio"
    used = Counter(v for v in full if v)
    place = lambda i: f"{raw.files[rows[FILE][i]].path}:{rows[LINE][i]}"
    if again := [i for i, v in enumerate(full) if v and used[v] > 1]:
        raw.findings.append(
            Finding(
                "repeated-recording",
                "warning",
                "rows with a recording that another row also has",
                tuple(f"{place(i)} ({rows[name][i]})" for i in again[:MAX_SHOWN_PLACES]),
                len(again),
                "Keep one row per recording.",
            )
        )
    if several := [i for i, v in enumerate(rows[name].to_list()) if v in where.ambiguous]:
        raw.findings.append(
            Finding(
                "ambiguous-name",
                "warning",
                "file names that occur in several folders",
                tuple(f"{place(i)} ({rows[name][i]})" for i in several[:MAX_SHOWN_PLACES]),
                len(several),
                "Use paths relative to the folder of the table.",
            )
        )
    note_unlisted(raw, [p for p in paths if relative_path(p, root) not in used])
    if (
        transcript := next((c for n in TRANSCRIPT_NAMES for c in columns if normalize_name(c) == n and c != name), None)
    ) and not options.target:
        raw.target, raw.kinds[transcript] = transcript, "text"
    elif options.target in columns and normalize_name(options.target) in TRANSCRIPT_NAMES:
        raw.kinds[options.target] = "text"
    return raw


def note_unlisted(raw: RawTable, lone: list[Path]) -> None:
    """Add a note about recordings that are in no row of the table."""
    if lone:
        raw.findings.append(
            Finding(
                "file-without-row",
                "note",
                "recordings that are in no row of the table; they are ignored",
                tuple(relative_path(p, raw.root) for p in lone[:MAX_SHOWN_PLACES]),
                len(lone),
            )
        )


class RecordingIndex:
    """An index of the recordings in a folder by path, by name, and by name without extension."""

    def __init__(self, paths: list[Path], root: Path):
        self.root, self.paths = root, {relative_path(p, root) for p in paths}
        self.short: dict[str, str] = {}
        self.ambiguous: set[str] = set()
        for p in paths:
            path = relative_path(p, root)
            stems = {p.name, p.stem, path.removesuffix(p.suffix)} - {path}
            for key in stems:
                if key in self.short and self.short[key] != path:
                    self.ambiguous.add(key)
                self.short[key] = path

    def find(self, value: str | None) -> str | None:
        """Return the path relative to the root; absolute paths of existing files are returned unchanged."""
        value = (value or "").strip().replace("\\", "/").removeprefix("./")
        if value in self.paths or not value:
            return value or None
        if value in self.ambiguous:
            return None
        if os.path.isabs(value) and os.path.exists(value):
            return value
        return self.short.get(value) or self.short.get(value.rsplit("/", 1)[-1])

    def match_fraction(self, values: pl.Series) -> float:
        """Return the fraction of values that are names of recordings, or at least have an audio file extension."""
        some = values.drop_nulls()
        some = some.gather_every(max(1, some.len() // 500))
        if not some.len():
            return 0.0
        found = sum(self.find(v) is not None or v in self.ambiguous for v in some.to_list()) / some.len()
        return max(found, 0.9 * mean_value(some.str.contains(AUDIO_FILE_PATTERN)))
