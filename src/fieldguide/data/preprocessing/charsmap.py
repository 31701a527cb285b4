"""Checks of the compiled character map of SentencePiece, which the tokenizers library follows without checks of its own.

The map is a trie as a double array (Yata et al. 2007, doi:10.1016/j.ipm.2006.04.004), in 32-bit units, followed by the
replacement texts, each ended by a zero byte. Invalid positions in it end the process of whoever normalizes a text.
"""

from __future__ import annotations

import numpy as np

LEAF, WIDE, VALUE = 1 << 8, 1 << 9, (1 << 31) - 1  # of a unit: has a replacement; offset in units of 256; position of the text


def check_charsmap(content: bytes) -> None:
    """Raise `ValueError` for a map in which a text can lead to a position outside it."""
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or size % 4 or not 4 <= size <= len(content) - 4:
        raise ValueError("the size of the character map is not within it")
    units = np.frombuffer(content, "<u4", size // 4, 4).astype(np.int64)
    texts = content[4 + size :]
    texts.decode("utf-8")
    starts = np.array([byte & 0xC0 != 0x80 for byte in texts] + [True])  # of characters, and the end
    reached = np.zeros(len(units), bool)
    nodes = get_offsets(units[:1])  # positions from which the byte of a text selects the next unit
    while len(nodes):
        if nodes.max() >= len(units):
            raise ValueError("the character map has a node outside of its trie")
        nodes = nodes[~reached[nodes]]
        nodes = np.unique(nodes)
        reached[nodes] = True
        following = nodes[:, None] ^ np.arange(1, 256)  # N 255
        if following.size and following.max() >= len(units):
            raise ValueError("the character map has a node outside of its trie")
        is_edge = units[following] & ((1 << 31) | 0xFF) == np.arange(1, 256)
        edges = following[is_edge]
        nodes = edges ^ get_offsets(units[edges])
        leaves = nodes[units[edges] & LEAF > 0]
        if leaves.size and leaves.max() >= len(units):
            raise ValueError("the character map has a leaf outside of its trie")
        positions = units[leaves] & VALUE
        if positions.size and (positions.max() > len(texts) or not starts[positions].all()):
            raise ValueError("the character map refers to a text that it does not have")


def get_offsets(units: np.ndarray) -> np.ndarray:
    """Return the distance from each unit to its children."""
    return (units >> 10) << np.where(units & WIDE > 0, 8, 0)
