"""Helpers of the sample generators: CSV files and a deterministic pseudo-random order."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of a text, used as a sort key."""
    return hashlib.sha256(text.encode()).digest()


def write_csv(file: Path, names: list[str], rows: Iterable[list[str]]) -> None:
    """Write a CSV file with a header."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
