"""Atomic file writes: a file appears complete or not at all. Failures name the file, the reason and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fieldguide.core.errors import WriteError

PROBE_BYTES = 1 << 20  # written to find out whether a folder can be written to

# What an error of the operating system means for the user, and what to do about it.
REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space"),
    errno.EFBIG: ("the file size limit of this process is reached (see `ulimit -f`)", "Raise the limit"),
    errno.EROFS: ("the file system is read-only", "Choose another folder"),
    errno.EACCES: ("permission denied", "Choose another folder or change its permissions"),
    errno.EPERM: ("permission denied", "Choose another folder or change its permissions"),
    errno.ENOENT: ("its folder does not exist", "If it was moved or removed, restore it"),
    errno.ENOTDIR: ("a part of the path is a file", "Choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
}


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Raise `WriteError` in place of an `OSError` of the block, which writes `path`."""
    try:
        yield
    except OSError as error:
        reason, remedy = REASONS.get(error.errno or 0, (error.strerror or str(error), "Choose another folder"))
        raise WriteError(f"could not write {path}: {reason}. {remedy}. Files written before are intact.") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is synced and renamed to `path` at the end of the block.

    If the block raises, the temporary file is removed and an existing file at `path` stays as it was. Raises `WriteError`
    if the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with report_write_errors(path):
        try:
            yield temporary
            move_into_place(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically. Raises `WriteError` if the disk is full or the folder is not writable."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def move_into_place(temporary: Path, path: Path) -> None:
    """Replace `path` by a finished file of the same file system, durably."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)  # makes the new name durable


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably. Raises `WriteError` if that is not possible."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with report_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync(folder.parent)


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home directory; a path whose home directory is unknown stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_writable(folder: Path, needed: int = 0) -> None:
    """Raise `WriteError` if files cannot be written to `folder` or to the nearest existing folder above it.

    `needed` are the bytes that must be free there, in addition to a file that is written as a trial.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    with report_write_errors(folder):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    if needed and (free := shutil.disk_usage(existing).free) < needed:
        raise WriteError(
            f"{folder}: {format_bytes(needed)} are needed for checkpoints and weights, but {format_bytes(free)} are free. "
            "Free some space or choose another --out."
        )


def format_bytes(count: float) -> str:
    """Return a number of bytes as text, such as "1.5 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if count < 1024 ** (i + 1)), len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)
