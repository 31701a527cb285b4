"""Reader for videos: a folder per class, optionally below train, val and test; or no classes; or a single file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fieldguide.data.media.video import VIDEO_SUFFIXES
from fieldguide.data.readers.image_folder import build_table, is_hidden, load_classes
from fieldguide.data.source import Options, RawTable

NAME = "videos"
UNDERSTANDS = "videos: .mp4, .avi, .mov, .mkv or .webm files in a folder, optionally in one folder per class"


def accepts(source: Any, options: Options) -> int:
    """Return the priority of this reader for the source, 0 if not supported."""
    if not isinstance(source, Path):
        return 0
    if source.is_file():
        return 10 if source.suffix.lower() in VIDEO_SUFFIXES else 0
    for _, folders, files in os.walk(source):
        folders[:] = [f for f in folders if not is_hidden(f)]
        if any(os.path.splitext(f)[1].lower() in VIDEO_SUFFIXES and not is_hidden(f) for f in files):
            return 7
    return 0


def load(source: Path, options: Options) -> RawTable:
    """Read one video or a folder of them."""
    if source.is_file():
        return build_table([(source, None, None)], source.parent, [], options, "video")
    return load_classes(source, options, VIDEO_SUFFIXES, "video")
