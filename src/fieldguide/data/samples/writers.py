"""What makers of samples share: tables as CSV, and an order by chance that is always the same."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write(file: Path, names: list[str], rows: Iterator[list[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
