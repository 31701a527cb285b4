"""Real archives, if available: FIELDGUIDE_DATA is their folder (default ../shared/data)."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from damage import checks, finding
from fieldguide.data import read, split

FOLDER = Path(os.environ.get("FIELDGUIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def unpack(name: str, into: Path, *prefixes: str) -> Path:
    """Return the members of an archive with this prefix; skip the test if there is no archive."""
    if not (FOLDER / name).exists():
        pytest.skip(f"{FOLDER / name} is not there; set FIELDGUIDE_DATA")
    with zipfile.ZipFile(FOLDER / name) as archive:
        archive.extractall(into, [m for m in archive.namelist() if m.startswith(prefixes)])
    return into


def test_adult(tmp_path):
    data = read(unpack("tables.zip", tmp_path, "adult/") / "adult")
    assert len(data) == 48_842 and (data.splits == "test").sum() == 16_281
    assert data.target.name == "c14" and data.target.distinct == 2
    assert [c.kind for c in data.columns.values()].count("number") == 6
    assert {"no-header", "class-spelling", "duplicate-across-splits"} <= checks(data)
    assert data.columns["c13"].missing == 857  # "?"


def test_california(tmp_path):
    path = unpack("tables.zip", tmp_path, "california/") / "california" / "housing.csv"
    data = read(path, target="median_house_value")
    assert len(data) == 20_640 and data.target.kind == "number" and data.columns["total_bedrooms"].missing == 207
    assert data.columns["ocean_proximity"].kind == "category" and "leak" not in checks(data)
    assert split(data).test.size == 4128


def test_trec(tmp_path):
    data = read(unpack("texts.zip", tmp_path, "trec/") / "trec")
    assert len(data) == 5952 and (data.splits == "test").sum() == 500 and data.target.distinct == 6
    assert finding(data, "encoding").places == ("TREC.train.all:66, the first occurrence",)
    assert finding(data, "duplicate-across-splits").count == 11


@pytest.mark.slow
def test_cifar10(tmp_path):
    data = read(unpack("cifar10.zip", tmp_path, "train/", "test/"))
    assert len(data) == 60_000 and (data.splits == "train").sum() == 50_000 and data.target.distinct == 10
    assert data.manifest.summary()["dropped"] == 0
