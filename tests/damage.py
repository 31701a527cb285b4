"""Helpers for tests of data: copies of real samples to damage, and findings by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fieldguide.data import BadData, Data, Finding, samples


def digits(folder: Path, classes: int = 3, each: int = 40, split: str = "") -> Path:
    """Copy the first images of the first classes of the sample `digits`."""
    for name in map(str, range(classes)):
        (folder / split / name).mkdir(parents=True)
        for file in sorted((samples.path("digits") / name).iterdir())[:each]:
            shutil.copy(file, folder / split / name)
    return folder


def lines(name: str) -> list[str]:
    """Return the lines of a sample that is a CSV file, header first."""
    return samples.path(name).read_text(encoding="utf-8").splitlines()


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def finding(source: Data | BadData | list[Finding], check: str) -> Finding:
    """Return the only finding of a check."""
    found = [f for f in (source if isinstance(source, list) else source.findings) if f.check == check]
    assert len(found) == 1, f"{check}: {found}"
    return found[0]


def checks(data: Data) -> set[str]:
    return {f.check for f in data.findings}


def refused(check: str, *words: str):
    """Return pytest.raises for a BadData error that names a check and contains these words."""
    return Refused(check, words)


class Refused:
    def __init__(self, check: str, words: tuple[str, ...]) -> None:
        self.check, self.words = check, words

    def __enter__(self):
        self.raises = pytest.raises(BadData)
        self.info = self.raises.__enter__()
        return self.info

    def __exit__(self, *args) -> bool:
        caught = self.raises.__exit__(*args)
        text = str(self.info.value)
        assert f"[{self.check}]" in text, text
        for word in self.words:
            assert word in text, f"{word!r} is not in: {text}"
        return bool(caught)
