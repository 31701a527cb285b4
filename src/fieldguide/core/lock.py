"""A lock for a folder, so that only one process at a time trains in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fieldguide.core.errors import RunError
from fieldguide.core.files import report_write_errors

NAME = ".lock"  # of the lock file; it is removed at the end, and stays behind if the process is killed
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)  # by the file system

_held: set[str] = set()  # folders locked by this process: locks of the system do not exclude other threads
_held_guard = threading.Lock()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block. Raises `RunError` if another process or thread holds it.

    The system releases the lock when its process ends, however that happens, so no lock outlives a killed process. Worker
    processes do not inherit it. On file systems without locks, nothing is locked.
    """
    key = os.path.realpath(folder)
    with _held_guard:
        if key in _held:
            raise RunError(f"{folder} is in use by another thread of this process. Wait until it has finished.")
        _held.add(key)
    try:
        handle = _acquire(folder)
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may have been removed
                (folder / NAME).unlink()
            os.close(handle)
    finally:
        _held.discard(key)


def _acquire(folder: Path) -> int:
    """Return the descriptor of the locked lock file."""
    path = folder / NAME
    while True:
        with report_write_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = _describe_owner(handle)
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise RunError(
                    f"{folder} is in use: {other} trains in it. Wait until it has finished, or stop it with Ctrl-C; its "
                    "progress is saved."
                ) from None
        if _is_current(handle, path):
            break
        os.close(handle)  # its owner removed the file after it was opened here
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # only for the message to others
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
    return handle


def _is_current(handle: int, path: Path) -> bool:
    """Return whether `path` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _describe_owner(handle: int) -> str:
    """Return who holds a lock, as far as its file says."""
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        text = f"process {int(owner['process'])} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return text if text.isprintable() else "another process"
