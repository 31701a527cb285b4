"""The layout of GGUF files: header, metadata and tensors, each checked against the size of the file before it is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4
STRING, ARRAY = 8, 9  # types of values other than numbers
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
PLAIN_TENSORS = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}  # types without quantization
MIN_VALUE_BYTES, MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8  # of one entry in the lists of metadata and tensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape, slowest axis first, its GGML type and the position of its data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """The parsed header of a file and its content, which stays on disk until it is used."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    content: np.ndarray  # uint8, mapped into memory


class Cursor:
    """A position in the content of a file. Its methods raise `ValueError` instead of reading behind the end."""

    def __init__(self, content: np.ndarray) -> None:
        self.content, self.position = content, 0

    def take(self, count: int) -> np.ndarray:
        """Return the next bytes."""
        if not 0 <= count <= len(self.content) - self.position:
            raise ValueError(f"{count:,} bytes are expected at position {self.position:,}, behind the end of the file")
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, form: str = "<Q") -> int:
        """Return the next number, a 64-bit count by default."""
        return struct.unpack(form, self.take(struct.calcsize(form)).tobytes())[0]

    def count(self, entry_bytes: int) -> int:
        """Return the next number as the count of entries that follow, each of at least this size."""
        count = self.number()
        if count * entry_bytes > len(self.content) - self.position:
            raise ValueError(f"the count {count:,} at position {self.position - 8:,} is larger than the file")
        return count

    def text(self) -> str:
        """Return the next string."""
        return self.take(self.number()).tobytes().decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return the next value of a type; arrays of numbers and strings are lists."""
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.take(np.dtype(NUMBERS[kind]).itemsize).view(NUMBERS[kind])[0].item()
        if kind != ARRAY:
            raise ValueError(f"type {kind} of a value at position {self.position:,} is unknown")
        inner = self.number("<I")
        if inner in NUMBERS:
            size = np.dtype(NUMBERS[inner]).itemsize
            return self.take(self.count(size) * size).view(NUMBERS[inner]).tolist()
        return [self.value(inner) for _ in range(self.count(8))]


def parse_file(path: Path) -> GGUFFile:
    """Map a file into memory and parse its header.

    Raises `ValueError` if it is another kind of file, or if a count, a length or an offset does not fit the file.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = Cursor(content)
    if cursor.take(4).tobytes() != MAGIC or cursor.number("<I") not in VERSIONS:
        raise ValueError(f"it does not begin with {MAGIC.decode()} and the version {' or '.join(map(str, VERSIONS))}")
    tensor_count, value_count = cursor.count(MIN_TENSOR_BYTES), cursor.count(MIN_VALUE_BYTES)
    metadata = {cursor.text(): cursor.value(cursor.number("<I")) for _ in range(value_count)}
    found = [parse_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r} and must be a power of two")
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = {t.name: StoredTensor(t.name, t.shape, t.type, start + t.offset) for t in found}
    if len(tensors) < tensor_count:
        raise ValueError("several tensors have the same name")
    return GGUFFile(metadata, tensors, content)


def parse_tensor(cursor: Cursor) -> StoredTensor:
    """Return the next entry of the list of tensors."""
    name, axes = cursor.text(), cursor.number("<I")
    if axes > MAX_AXES:
        raise ValueError(f"the tensor {name[:80]!r} has {axes} axes; at most {MAX_AXES} are possible")
    shape = tuple(cursor.number() for _ in range(axes))
    return StoredTensor(name, shape[::-1], cursor.number("<I"), cursor.number())


def read_tensor(file: GGUFFile, tensor: StoredTensor) -> np.ndarray:
    """Return a tensor as float32. Raises `ValueError` if its type is unknown or its data is not within the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = tensor.shape[:-1], tensor.shape[-1] if tensor.shape else 1
    if columns % block:
        raise ValueError(f"{tensor.name} has rows of {columns} numbers, but the type {kind.name} needs multiples of {block}")
    cursor = Cursor(file.content)
    cursor.take(tensor.offset)
    data = cursor.take(math.prod(rows) * (columns // block) * size)
    if tensor.type in PLAIN_TENSORS:
        return data.view(PLAIN_TENSORS[tensor.type]).reshape(tensor.shape).astype(np.float32)
    if not data.size:
        return np.zeros(tensor.shape, np.float32)
    return dequantize(data.reshape(*rows, columns // block * size), kind)
