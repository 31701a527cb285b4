"""Tensors of TorchScript archives, the format in which OpenAI published CLIP. Code in the archive is not run.

An archive is a zip file: `data.pkl` describes a tree of modules, `data/` holds the numbers, and `code/` lists
the parameters and buffers of each class, so that the names are exactly those of its `state_dict()`.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldguide.checkpoints.pickle_check import check_pickle
from fieldguide.core.archives import check_archive
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import guard

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


MAX_MODULES = 100_000  # in the tree of an archive
MAX_NAME_CHARACTERS = 2_000  # of a module


class UnsupportedObjectError(WeightsError):
    """The archive holds an object other than tensors, modules and plain values."""


class ArchivedModule:
    """A module of the archive: its attributes without its code."""

    kind = ""  # qualified name of its class
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def return_value(value: Any, *_: Any) -> Any:
    return value


class ArchiveUnpickler(pickle.Unpickler):
    """An unpickler that creates tensors, plain values and `Part`s and rejects everything else, so that no code is
    called.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("Part", (ArchivedModule,), {"kind": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name in (
            "build_intlist",
            "build_doublelist",
            "build_boollist",
            "build_tensorlist",
            "restore_type_tag",
        ):
            return return_value
        raise UnsupportedObjectError(f"it holds an object of type {module}.{name}; only tensors and modules are supported")

    def persistent_load(self, saved_id: Any) -> Tensor:
        _, dtype, key, *_ = saved_id
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_archive(path: Path) -> bool:
    """Return whether a file was written by torch.jit.save; torch.save also writes zip files, but without code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return parameters and buffers of an archive by name. Raises `WeightsError` if it is damaged or holds other
    objects.
    """
    try:
        with guard(path, WeightsError), zipfile.ZipFile(path) as archive:
            check_archive(archive, path, WeightsError)
            root = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)).partition("/")[0] + "/"
            check_pickle(io.BytesIO(archive.read(root + "data.pkl")))
            return collect_tensors(ArchiveUnpickler(archive, root).load(), read_declared_names(archive, root))
    except UnsupportedObjectError as error:
        raise WeightsError(f"{path} is a TorchScript archive that cannot be read: {error}.") from None


def read_declared_names(archive: zipfile.ZipFile, root: str) -> dict[str, set[str]]:
    """Return the names of the parameters and buffers of each class."""
    found = {}
    for name in archive.namelist():
        if name.startswith(root + "code/") and name.endswith(".py"):
            module = name.removeprefix(root + "code/").removesuffix(".py").replace("/", ".")
            for kind, body in re.findall(r"^class (\w+)\(Module\):\n((?:[ \t].*\n?|\n)*)", archive.read(name).decode(), re.M):
                lists = re.findall(r"^\s+__(?:parameters|buffers)__ = \[(.*?)\]", body, re.M)
                found[f"{module}.{kind}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
    return found


def collect_tensors(root: ArchivedModule, known: dict[str, set[str]]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a tree of modules by name.

    Raises `ValueError` for a tree without end: a module may occur at several places, even inside itself.
    """
    tensors: dict[str, Tensor] = {}
    modules = [("", root)]
    for before, module in modules:
        for name, value in module.state.items():
            if isinstance(value, ArchivedModule):
                modules.append((f"{before}{name}.", value))
            elif isinstance(value, Tensor) and name in known[module.kind]:
                tensors[before + name] = value
        if len(modules) > MAX_MODULES or len(before) > MAX_NAME_CHARACTERS:
            raise ValueError(f"it has more than {MAX_MODULES:,} modules, or modules that contain themselves")
    return tensors
