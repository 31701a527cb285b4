"""Names of files as annotations write them: other separators, Unicode forms, letter case, and folders of other machines."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fieldguide.data.media.images import SUPPORTED_SUFFIXES
from fieldguide.data.source import IGNORED_NAMES, is_inside, list_visible


def normalize(name: str) -> str:
    """Return a name or path in composed Unicode, lower case and with forward slashes."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/")).casefold()


def find_child(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first folder in a folder with one of these names, ignoring case; None if there is none."""
    named = {normalize(p.name): p for p in reversed(list_visible(folder)[0]) if p.is_dir()} if folder.is_dir() else {}
    return next((named[n] for n in names if n in named), None)


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first file in a folder with one of these names, ignoring case; None if there is none."""
    named = {normalize(p.name): p for p in reversed(list_visible(folder)[0]) if p.is_file()} if folder.is_dir() else {}
    return next((named[n] for n in names if n in named), None)


def map_stems(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return normalized name without suffix -> file, for the files of a folder with these suffixes."""
    if not folder.is_dir():
        return {}
    return {normalize(p.stem): p for p in list_visible(folder)[0] if p.suffix.lower() in suffixes and p.is_file()}


def resolve_folder(text: str, bases: Sequence[Path]) -> Path | None:
    """Return an existing file or folder for a path of another machine: the longest end of it that exists below a base.

    Nothing outside of the bases is returned.
    """
    parts = [p for p in text.strip().replace("\\", "/").split("/") if p not in ("", ".", "..")]
    for base in bases:
        named = base / text.strip()  # an absolute path stays as it is
        if any(is_inside(named, b) for b in bases) and named.exists():
            return named
    for start in range(len(parts)):
        for base in bases:
            found: Path | None = base
            for part in parts[start:]:
                found = found and (step(found, part))
            if found:
                return found
    return None


def step(folder: Path, name: str) -> Path | None:
    """Return the entry of a folder with a name, ignoring case and Unicode form if there is no exact match."""
    if (exact := folder / name).exists():
        return exact
    if not folder.is_dir():
        return None
    return next((p for p in list_visible(folder)[0] if normalize(p.name) == normalize(name)), None)


class ImageIndex:
    """Finds the images below a folder by the names that annotations give them.

    A name matches exactly, or ignoring case, Unicode form, separators and leading folders, or without its suffix. The image
    with the most equal folders is taken; of equally good ones, the first in `folders`.
    """

    def __init__(self, root: Path, suffixes: Collection[str] = SUPPORTED_SUFFIXES) -> None:
        self.root, self.suffixes = root, suffixes
        self.names: dict[str, list[Path]] | None = None
        self.stems: dict[str, list[Path]] = {}

    def scan(self) -> dict[str, list[Path]]:
        """Return normalized file name -> images, walking the folder the first time."""
        if self.names is None:
            self.names = {}
            for at, folders, files in os.walk(self.root):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in IGNORED_NAMES)
                for name in sorted(files):
                    stem, suffix = os.path.splitext(name)
                    if suffix.lower() in self.suffixes and not name.startswith("."):
                        path = Path(at, name)
                        self.names.setdefault(normalize(name), []).append(path)
                        self.stems.setdefault(normalize(stem), []).append(path)
        return self.names

    def find(self, name: str, folders: Sequence[Path] = ()) -> Path | None:
        """Return the image of this name or path, or None. `folders` are searched first and in this order."""
        plain = name.strip().replace("\\", "/")
        for folder in folders:
            if is_inside(path := folder / plain, self.root) and path.is_file():
                return path
        parts = normalize(plain).split("/")
        names = self.scan()
        found = names.get(parts[-1]) or self.stems.get(os.path.splitext(parts[-1])[0]) or []
        if len(found) < 2:
            return found[0] if found else None

        def rank(path: Path) -> tuple[int, int]:
            theirs = normalize(path.as_posix()).split("/")
            equal = 0
            while equal < min(len(parts), len(theirs)) - 1 and parts[-2 - equal] == theirs[-2 - equal]:
                equal += 1
            place = next((i for i, folder in enumerate(folders) if path.is_relative_to(folder)), len(folders))
            return -equal, place

        ranked = sorted(found, key=rank)
        return None if rank(ranked[0]) == rank(ranked[1]) else ranked[0]
