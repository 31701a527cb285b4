"""The files of a run folder whose digests are in `run.json`: how they are written, and how damage is found.

Files are written to a staging folder first and then moved into place together with the record. A process that is killed at
any moment leaves a folder in which each file is either the old or the new one, and the record accepts both.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fieldguide.core import lock
from fieldguide.core.errors import RunError
from fieldguide.core.files import make_folder, move_into_place, report_write_errors
from fieldguide.core.run_record import write_record

STAGING_PREFIX = ".staging-"


@contextmanager
def update_run(folder: Path, record: dict[str, Any], **changes: Any) -> Iterator[Path]:
    """Yield an empty staging folder, whose files then replace those of the run folder, along with the record.

    Inside the block, write files under their paths in the run folder. At the end, `record` has their digests and the
    `changes`, and is written. Raises `WriteError` if that is not possible; the run folder is then as it was.
    """
    with report_write_errors(folder):
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
        try:
            yield staging
            names = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
            digests = {name: compute_digest(staging / name) for name in names}
            before = get_digests(folder, record)
            if (folder / "run.json").exists():
                both = {name: [*before.get(name, ()), digest] for name, digest in digests.items()}
                write_record(folder, {**record, "digests": {**before, **both}})
            for name in names:
                make_folder((folder / name).parent)
                move_into_place(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    record |= {**changes, "digests": {**before, **digests}}
    write_record(folder, record)


def check_file(folder: Path, record: dict[str, Any], name: str) -> None:
    """Raise `RunError` if a file of a run is missing or its content is not what was written.

    Runs of earlier versions have no digests; only missing files are found there.
    """
    path = folder / name
    if not path.is_file():
        raise RunError(f"{path} is missing: the run folder is incomplete. Restore the file from a copy.")
    accepted = get_digests(folder, record).get(name)
    if accepted and compute_digest(path) not in accepted:
        raise RunError(
            f"{path} is damaged or was changed: its content does not match its digest in run.json. Restore the file from a "
            "copy, or train again."
        )


def check_folder(folder: Path, record: dict[str, Any], name: str) -> None:
    """Raise `RunError` if a file of a run below the folder `name` is missing or damaged."""
    for file in sorted(get_digests(folder, record)):
        if file.startswith(f"{name}/"):
            check_file(folder, record, file)


def compute_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_digests(folder: Path, record: dict[str, Any]) -> dict[str, list[str]]:
    """Return the digests that are accepted for each file of a run: two for files that were being replaced.

    Raises `RunError` if the record holds anything else.
    """
    digests = record.get("digests", {})
    try:
        found = {name: [value] if isinstance(value, str) else list(value) for name, value in digests.items()}
        if all(".." not in Path(name).parts and not Path(name).is_absolute() for name in found):
            return found
    except (AttributeError, TypeError):
        pass
    raise RunError(f"{folder / 'run.json'} is damaged: its digests are not those of files in the folder.")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a run folder: staging folders and partial files. The folder must be locked."""
    for path in [*folder.glob(f"{STAGING_PREFIX}*"), *folder.glob("**/.*.partial")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a process left that was killed before training."""
    return all(path.name.startswith((STAGING_PREFIX, lock.NAME)) for path in folder.iterdir())
