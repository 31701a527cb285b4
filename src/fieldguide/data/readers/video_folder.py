"""Folders of films: a folder a class, maybe below train, val and test; or no classes; or one film."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fieldguide.data.media.video import FILMS
from fieldguide.data.readers.image_folder import hidden, load_classes, table
from fieldguide.data.source import Options, Raw

NAME = "films"
UNDERSTANDS = "films: .mp4, .avi, .mov, .mkv or .webm files in a folder, maybe in one folder for each class"


def accepts(source: Any, options: Options) -> int:
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if source.suffix.lower() in FILMS else 0
    for _, folders, files in os.walk(source):
        folders[:] = [f for f in folders if not hidden(f)]
        if any(os.path.splitext(f)[1].lower() in FILMS and not hidden(f) for f in files):
            return 7
    return 0


def load(source: Path, options: Options) -> Raw:
    if source.is_file():
        return table([(source, None, None)], source.parent, [], options, "video")
    return load_classes(source, options, FILMS, "video")
