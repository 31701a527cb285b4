"""Files of CTranslate2 (`model.bin`) with a Whisper network: tensors as float32.

A file is a version, the name and revision of a specification, and named values: each with its shape, a number for its type, and its
bytes. Integers of a weight are divided by the scales of its rows. Scalars are settings of the network. Projections that share an input
are stored one below the other; here they are split, under the names q, k, v and out.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import AGAIN

# The first bytes: format version, length of the name, and name of the kind of model
HEADER = re.compile(rb"[\x01-\x0f]\0\0\0.\0([A-Z][A-Za-z0-9]*)Spec\0", re.DOTALL)
HEADER_BYTES = 64
SUPPORTED = "Whisper"
VERSIONS = (5, 6)  # older ones do not store the type of values
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
GELU = 3
SETTINGS = {
    "activation": GELU,
    "pre_norm": 1,
    "alibi": 0,
    "scale_embeddings": 0,
}  # that describe this network, if they are stored
MAX_AXES = 8


def find_kind(path: Path) -> str | None:
    """Return the kind of model in a file of CTranslate2, such as "Whisper"; None for another file."""
    with open(path, "rb") as file:
        found = HEADER.match(file.read(HEADER_BYTES))
    return found[1].decode() if found else None


class Reader:
    """Reads the values of a file one after the other. Raises `WeightsError` for a file that ends too early."""

    def __init__(self, path: Path):
        self.path, self.content, self.at = path, memoryview(path.read_bytes()), 0

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        if self.at + count > len(self.content):
            raise WeightsError(f"{self.path} ends within a value, at byte {self.at:,}. {AGAIN}")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, form: str) -> int:
        """Return the next integer, in a format of `struct`."""
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        """Return the next text."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()

    def value(self) -> tuple[str, Tensor]:
        """Return the next value and its name."""
        name, rank = self.text(), self.number("B")
        if rank > MAX_AXES:
            raise WeightsError(f"{self.path}: {name} has {rank} axes. {AGAIN}")
        shape = [self.number("I") for _ in range(rank)]
        kind, size = self.number("B"), self.number("I")
        dtype = DTYPES.get(kind)
        if dtype is None or math.prod(shape) * dtype.itemsize != size:
            raise WeightsError(
                f"{self.path}: {name} has type {kind}, shape {shape} and {size:,} bytes, which do not match. {AGAIN}"
            )
        return name, torch.frombuffer(bytearray(self.take(size)), dtype=dtype).view(shape) if size else torch.empty(shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a Whisper network, float32. Raises `WeightsError` for other networks and damaged files."""
    kind = find_kind(path)
    if kind != SUPPORTED:
        raise WeightsError(
            f"{path} holds a {kind} of CTranslate2, of which only {SUPPORTED} is supported. Load the model that it was converted from."
        )
    reader = Reader(path)
    version = reader.number("I")
    if version not in VERSIONS:
        raise WeightsError(f"{path} has version {version} of CTranslate2's format; supported are {VERSIONS}. Convert it again.")
    reader.text(), reader.number("I")  # name and revision of the specification
    values = dict(reader.value() for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):  # names of the same values
        alias, name = reader.text(), reader.text()
        if name not in values:
            raise WeightsError(f"{path}: {alias} stands for {name}, which is not in the file. {AGAIN}")
    check_settings(path, values)
    return {name.replace("/", "."): tensor for key, value in scale_values(values) for name, tensor in split(path, key, value)}


def check_settings(path: Path, values: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` for settings of another network."""
    for name, value in values.items():
        wanted = SETTINGS.get(name.rpartition("/")[2])
        if wanted is not None and not value.ndim and int(value) != wanted:
            raise WeightsError(f"{path}: {name}={int(value)} is not supported; whisper requires {wanted}.")


def scale_values(values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as float32: integers divided by the scales of their rows. Settings are left out."""
    for name, value in values.items():
        if not value.ndim or name.endswith("_scale") or name.endswith(("alignment_heads", "alignment_layer")):
            continue
        scale = values.get(f"{name}_scale")
        value = value.float()
        yield name, value if scale is None else value / scale.float().reshape(-1, *[1] * (value.ndim - 1))


def split(path: Path, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the projections that a value joins, under names of their own; the keys' bias, which is zero, is left out."""
    key = key.replace("layer_norm/gamma", "layer_norm/weight").replace("layer_norm/beta", "layer_norm/bias")
    found = re.fullmatch(r"(.*attention)/linear_(\d)/(weight|bias)", key)
    if not found:
        yield key, value
        return
    before, number, kind = found[1], int(found[2]), found[3]
    own = ("q", "k", "v"), ("out",)  # of self-attention
    crossing = ("q",), ("k", "v"), ("out",)
    groups = own if before.endswith("self_attention") else crossing
    names = groups[number] if number < len(groups) else ()
    if not names or value.shape[0] % len(names):
        raise WeightsError(f"{path}: {key} with the shape {list(value.shape)} is no projection of attention. {AGAIN}")
    for name, part in zip(names, value.chunk(len(names))):
        if name == "k" and kind == "bias":
            if part.any():
                raise WeightsError(f"{path}: {key} adds a bias to the keys, which Whisper does not have.")
            continue
        yield f"{before}/{name}/{kind}", part.clone()
