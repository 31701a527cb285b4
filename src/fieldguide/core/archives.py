"""ZIP archives from others: arrays of NumPy, and the sizes of members before anything is decompressed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, TYPE_CHECKING
from zipfile import ZipFile

from fieldguide.core.errors import FieldguideError, RunError
from fieldguide.core.validation import guard

if TYPE_CHECKING:
    import numpy as np

MAX_RATIO = 50  # how many times larger an archive may become when it is decompressed ...
FREE_BYTES = 64 << 20  # ... unless it stays below this size


def check_archive(archive: ZipFile, path: Path, error: type[FieldguideError] = RunError) -> None:
    """Raise `error` if the members are much larger than the file: a decompression bomb."""
    size, total = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if total > max(FREE_BYTES, MAX_RATIO * size):
        raise error(f"{path} has {size:,} bytes, but its content would take {total:,}. It is damaged or hostile.")


def read_arrays(path: Path, error: type[FieldguideError] = RunError) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name.

    Raises `error` for damaged files, pickled objects, and arrays whose shapes do not match their data.
    """
    with guard(path, error, ""), ZipFile(path) as archive:
        check_archive(archive, path, error)
        arrays = {}
        for member in archive.infolist():
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = read_array(file, member.file_size)
        return arrays


def read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Return the array of an .npy file of `size` bytes. Raises `ValueError` if its header is damaged or does not match its data."""
    from tokenize import TokenError

    import numpy as np
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"version {version} of the array format is not supported")
    try:
        shape, is_fortran, dtype = header(file)
    except (TokenError, SyntaxError) as error:  # the header is a dictionary in Python's syntax
        raise ValueError(f"its header is damaged: {error}") from None
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects")
    expected = math.prod(shape) * dtype.itemsize
    if expected > size:
        raise ValueError(f"an array of shape {shape} takes {expected:,} bytes, but the file holds {size:,}")
    values = np.frombuffer(bytearray(file.read()), dtype)
    return values[: math.prod(shape)].reshape(shape, order="F" if is_fortran else "C")
