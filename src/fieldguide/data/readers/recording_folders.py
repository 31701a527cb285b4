"""Reader for recordings with classes: a folder of recordings per class, Speech Commands, or names such as LABEL_SPEAKER_TAKE.wav.

Speech Commands (Warden 2018, arXiv:1804.03209) names the speaker in each file (`SPEAKER_nohash_TAKE.wav`), lists the recordings for
validation and test in two files, and has long recordings of noise in `_background_noise_`, which is no class.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.core.validation import read_text
from fieldguide.data.dataset import Finding
from fieldguide.data.readers import table
from fieldguide.data.readers.image_folder import FolderWalk, find_layout, load_classes
from fieldguide.data.readers.recordings import AUDIO, MAX_SHOWN_PLACES, SOUND_SUFFIXES, find_recordings
from fieldguide.data.source import Options, RawTable, relative_path

NAME = "recordings with classes"
UNDERSTANDS = (
    "recordings with classes: a folder with a folder of recordings for each class, optionally below train, val and test; Speech "
    "Commands as distributed; a folder of recordings named LABEL_SPEAKER_TAKE.wav, such as the Free Spoken Digit Dataset"
)
LABEL, SPEAKER = "label", "speaker"
SPLIT_LISTS = {"validation_list.txt": "val", "testing_list.txt": "test"}  # of Speech Commands: one path per line
NOISE_FOLDER = "_background_noise_"
SPEAKER_PATTERN = re.compile(r"([0-9a-f]{8})_nohash_\d+$")
NAME_PATTERN = re.compile(r"([^\W_]+)_([^\W_]+)_(\d+)$")  # LABEL_SPEAKER_TAKE
DIGITS = {str(digit) for digit in range(10)}
FSDD_TEST_TAKES = 5  # the first takes of each speaker and digit are the test set, as the Free Spoken Digit Dataset says


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path) or not source.is_dir() or options.labels_optional:
        return 0
    if find_split_lists(source):
        return 11
    paths = list(find_recordings(source))
    if not paths or table.list_tables(table.find_table_folder(source)) or any(p.with_suffix(".txt").is_file() for p in paths):
        return 0
    return 8 if has_class_folders(source, paths) or read_names(paths) else 0


def find_split_lists(folder: Path) -> dict[Path, str]:
    """Return Speech Commands' lists of recordings and their splits; none if one is missing or the folder has no recordings."""
    lists = {folder / name: split for name, split in SPLIT_LISTS.items()}
    return lists if all(p.is_file() for p in lists) and any(True for _ in find_recordings(folder)) else {}


def has_class_folders(source: Path, paths: list[Path]) -> bool:
    """Return whether the recordings are in folders that can be classes: several, or below folders of splits."""
    walk = FolderWalk(source, SOUND_SUFFIXES)
    parts = find_layout(source, walk, Options(), "audio").parts
    return any(label is not None or walk.class_folders(base) for base, _, label in parts) and len({p.parent for p in paths}) > 1


def load(source: Path, options: Options) -> RawTable:
    """Read the recordings with their classes."""
    paths = list(find_recordings(source))
    if len({p.parent for p in paths}) == 1 and (found := read_names(paths)):
        return load_named(paths, found, source)
    raw = load_classes(source, options, SOUND_SUFFIXES, "audio")
    if lists := find_split_lists(source):
        apply_split_lists(raw, source, lists)
    return add_speakers(raw)


# Classes and speakers in the names of files


def read_names(paths: list[Path]) -> list[tuple[str, str, int]]:
    """Return (label, speaker, take) of each recording from its name, or an empty list if the names are not unambiguous.

    They are if all are in one folder and have the form LABEL_SPEAKER_TAKE, with several labels that each occur several times, and
    all speakers but one say several of them.
    """
    matches = [NAME_PATTERN.match(p.stem) for p in paths]
    if len({p.parent for p in paths}) != 1 or not all(matches):
        return []
    found = [(m[1], m[2], int(m[3])) for m in matches if m]
    takes = Counter(label for label, _, _ in found)
    said: dict[str, set[str]] = {}
    for label, speaker, _ in found:
        said.setdefault(speaker, set()).add(label)
    repeated = len(takes) > 1 and min(takes.values()) > 1
    return found if repeated and sum(len(labels) == 1 for labels in said.values()) <= 1 else []


def load_named(paths: list[Path], found: list[tuple[str, str, int]], root: Path) -> RawTable:
    """Return recordings whose class and speaker are in their names."""
    labels, speakers, takes = (list(values) for values in zip(*found))
    rows = pl.DataFrame({AUDIO: [str(p.absolute()) for p in paths], LABEL: labels, SPEAKER: speakers})
    example = relative_path(paths[0], root)
    what = f"classes and speakers are read from the names of the files, such as {labels[0]!r} and {speakers[0]!r}"
    findings = [Finding("labels-of-names", "note", what, (example,))]
    splits = None
    test = np.array(takes) < FSDD_TEST_TAKES
    if set(labels) == DIGITS and test.any() and not test.all():
        splits = np.where(test, "test", "train").astype(object)
        what = f"spoken digits: takes 0 to {FSDD_TEST_TAKES - 1} are the test rows, with the speakers of the training rows"
        findings.append(Finding("official-split", "note", what, (example,)))
    return RawTable(rows, [], root, findings, splits, {AUDIO: "audio", LABEL: "category", SPEAKER: "identifier"}, LABEL)


# Speech Commands


def apply_split_lists(raw: RawTable, root: Path, lists: dict[Path, str]) -> None:
    """Leave out the noise and take the splits from the lists. Raises DataError for a list that names none of the recordings."""
    noise = raw.rows[LABEL].eq_missing(NOISE_FOLDER)
    if noise.any():
        places = [relative_path(Path(p), root) for p in raw.rows.filter(noise)[AUDIO]]
        what = f"recordings in {NOISE_FOLDER} are no class and are left out"
        raw.findings.append(Finding("noise-folder", "note", what, tuple(places[:MAX_SHOWN_PLACES]), len(places)))
        raw.rows = raw.rows.filter(~noise)
    relative = [relative_path(Path(p), root.absolute()) for p in raw.rows[AUDIO]]
    where = {path: row for row, path in enumerate(relative)}
    splits = np.full(len(relative), "train", dtype=object)
    for path, split in lists.items():
        lines = read_text(path, max_bytes=None).split("\n")
        names = {line.strip(): number for number, line in enumerate(lines, 1) if line.strip()}
        missing = [f"{path.name}:{number} ({name})" for name, number in names.items() if name not in where]
        if len(missing) == len(names):
            shown = missing[0] if missing else "it is empty"
            raise DataError(
                f"{path}: the list names none of the recordings ({shown}). Paths are relative to {root}: yes/NAME.wav."
            )
        if missing:
            remedy = "Copy them again, or remove these lines."
            what = "recordings of a list that do not exist"
            raw.findings.append(
                Finding("missing-file", "warning", what, tuple(missing[:MAX_SHOWN_PLACES]), len(missing), remedy, len(missing))
            )
            raw.unusable += len(missing)
        splits[[where[name] for name in names if name in where]] = split
    raw.splits = splits


def add_speakers(raw: RawTable) -> RawTable:
    """Add the speakers as groups, which are not divided between training and test, if all names contain them."""
    matches = [SPEAKER_PATTERN.match(Path(p).stem) for p in raw.rows[AUDIO]]
    if all(matches):
        raw.rows = raw.rows.with_columns(pl.Series(SPEAKER, [m[1] for m in matches if m]))
        raw.kinds[SPEAKER], raw.roles[SPEAKER] = "identifier", "group"
    return raw
