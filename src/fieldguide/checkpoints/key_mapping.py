"""Mapping of tensor names between public checkpoints and this library. No other module renames parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.key_rules import (
    Dropped,
    Fused,
    Joined,
    MovedRow,
    PlusOne,
    Repeated,
    Reshaped,
    Row,
    Stacked,
    Swapped,
    Transposed,
    Zeros,
)

State = Mapping[str, Tensor]
Table = Mapping[str, Row]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DDP, torch.compile, wrappers
MAX_PREFIXES = 8  # that are stripped one after the other
MAX_LISTED_KEYS = 20  # keys shown of each kind in an error


@cache
def compile_pattern(pattern: str) -> tuple[re.Pattern, tuple[tuple[str, int], ...]]:
    """Return a pattern as a regular expression, with the name and offset of each of its groups."""
    groups, text = [], ""
    for piece in re.split(r"(\{\w+(?:[+-]\d+)?\}|\*)", pattern):
        if piece == "*":
            groups.append(("*", 0))
            text += r"([^.]+)"
        elif piece.startswith("{"):
            found = re.fullmatch(r"\{(\w+)([+-]\d+)?\}", piece)
            assert found is not None  # by the split above
            groups.append((found[1], int(found[2] or 0)))
            text += r"(\d+)"
        else:
            text += re.escape(piece)
    return re.compile(text), tuple(groups)


def match_name(pattern: str, name: str) -> dict[str, int | str] | None:
    """Return the values of a pattern's groups in a name, or None if it does not match."""
    expression, groups = compile_pattern(pattern)
    if not (found := expression.fullmatch(name)):
        return None
    values: dict[str, int | str] = {}
    for (group, offset), text in zip(groups, found.groups()):
        number = 0 if group == "*" else int(text) - offset
        value = text if group == "*" else number
        if values.setdefault(group, value) != value or number < 0:
            return None
    return values


def fill_pattern(pattern: str, values: Mapping[str, int | str]) -> str:
    """Return the name for a pattern and the values of its groups."""

    def text(found: re.Match) -> str:
        if found[0] == "*":
            return str(values["*"])
        return str(int(values[found[1]]) + int(found[2] or 0))

    return re.sub(r"\{(\w+)([+-]\d+)?\}|\*", text, pattern)


def find_zero_rows(table: Table) -> list[Zeros]:
    return [row for row in table.values() if isinstance(row, Zeros)]


def list_our_names(row: Row) -> tuple[str, ...]:
    """Return our names in a row: none for tensors that are dropped."""
    names = row if isinstance(row, str) else getattr(row, "ours", ())
    return (names,) if isinstance(names, str) else tuple(names)


def convert_layout(tensor: Tensor, row: Row, side: Literal["here", "there"]) -> Tensor:
    """Return the tensor in our layout (`side` "here") or in the public one ("there")."""
    if isinstance(row, PlusOne):
        return tensor + (1 if side == "there" else -1)
    if isinstance(row, Reshaped):
        return tensor.reshape(getattr(row, side))
    if isinstance(row, Swapped):
        return torch.cat(tensor.chunk(2)[::-1])
    if isinstance(row, MovedRow):
        if side == "there":
            return move_row(tensor, 0, row.place).reshape(*tensor.shape, *[1] * row.ones)
        return move_row(tensor, row.place, 0).reshape(tensor.shape[: tensor.ndim - row.ones])
    if pairs := getattr(row, "pairs", 0):
        parts = (pairs // 2, 2) if side == "here" else (2, pairs // 2)
        return tensor.unflatten(0, (-1, *parts)).transpose(1, 2).flatten(0, 2)
    is_transposed = isinstance(row, Transposed) or (isinstance(row, Stacked) and row.transposed)
    return tensor.mT if is_transposed and tensor.ndim == 2 else tensor


def move_row(tensor: Tensor, source: int, target: int) -> Tensor:
    """Return the tensor with row `source` at the place `target`. A tensor without that row is returned as it is."""
    if source == target or max(source, target) >= len(tensor):
        return tensor
    row, others = tensor[source : source + 1], torch.cat([tensor[:source], tensor[source + 1 :]])
    return torch.cat([others[:target], row, others[target:]])


def fits_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether the tensor can be reshaped to a shape, in which one length may be -1."""
    known = math.prod(length for length in shape if length != -1)
    return tensor.numel() % known == 0 if -1 in shape else tensor.numel() == known


@dataclass
class TranslatedState:
    state: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)  # new name -> old name(s)
    unknown: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    means: dict[str, Any] = field(default_factory=dict)  # config fields implied by dropped tensors

    def put(self, name: str, tensor: Tensor, old: str) -> None:
        if name in self.state and not tensor.is_meta and not torch.equal(self.state[name], tensor):
            self.faults.append(f"{old} and {self.origin[name]} both mean {name}, with different values")
        self.state[name], self.origin[name] = tensor, old


def map_to_ours(state: State, table: Table) -> TranslatedState:
    """Map public names to ours."""
    done = TranslatedState()
    parts: dict[tuple[str, int], dict[int, tuple[str, Tensor, int]]] = {}  # by our name and number of parts
    for name, tensor in state.items():
        hit = next(((row, values) for public, row in table.items() if (values := match_name(public, name)) is not None), None)
        if hit is None:
            done.unknown.append(name)
            continue
        row, values = hit
        if isinstance(row, Dropped):
            done.means |= row.means
            continue
        if isinstance(row, Stacked):
            for number, one in enumerate(tensor.unbind()):
                done.put(fill_pattern(row.ours, values | {row.axis: number}), convert_layout(one, row, "here"), name)
            continue
        if isinstance(row, Joined):
            unit, rest = divmod(len(tensor), sum(row.sizes))
            if rest:
                done.faults.append(f"{name} ({format_shape(tensor)}) cannot be divided in parts of {row.sizes}")
                continue
            for ours, one in zip(row.ours, tensor.split([unit * size for size in row.sizes])):
                done.put(fill_pattern(ours, values), one, name)
            continue
        ours = fill_pattern(row if isinstance(row, str) else row.ours, values)
        if isinstance(row, Fused):
            parts.setdefault((ours, row.parts), {})[row.part] = (name, convert_layout(tensor, row, "here"), row.span)
        elif isinstance(row, Reshaped) and not fits_shape(tensor, row.here):
            done.faults.append(f"{name} ({format_shape(tensor)}) cannot be reshaped to {row.here}, the shape of {ours}")
        else:
            done.put(ours, convert_layout(tensor, row, "here"), name)
    for (ours, count), found in parts.items():
        names = ", ".join(found[i][0] for i in sorted(found))
        tensors = [found[i][1] for i in sorted(found)]
        if sum(span for _, _, span in found.values()) < count:
            done.faults.append(f"{ours} is built from {count} tensors, but the file has only {names}")
        elif len({(len(t) / span, *t.shape[1:]) for _, t, span in found.values()}) > 1:
            done.faults.append(f"{ours} is built from {names}, whose shapes differ")
        else:
            done.put(ours, torch.cat(tensors), names)
    for row in find_zero_rows(table):
        if row.like in done.state and row.ours not in done.state:
            other = done.state[row.like]
            like = other[:, 0] if row.column else other[: row.length]
            done.put(row.ours, torch.zeros_like(like), "no public tensor")
    return done


def map_to_public(state: State, table: Table) -> TranslatedState:
    """Map our names to public ones. If several public names mean one tensor, the first row counts."""
    done = TranslatedState()
    stacks: dict[str, dict[int, Tensor]] = {}  # by public name
    joins: dict[str, tuple[Joined, dict[int, Tensor]]] = {}  # by public name
    for name, tensor in state.items():
        hits = [
            (public, row, values)
            for public, row in table.items()
            for ours in list_our_names(row)
            if (values := match_name(ours, name)) is not None
        ]
        if not hits:
            done.unknown.append(name)
        elif isinstance(hits[0][1], Fused):
            parts = {row.part: (public, row, values) for public, row, values in reversed(hits) if isinstance(row, Fused)}
            for public, part, values in parts.values():
                some = torch.cat(tensor.chunk(part.parts)[part.part : part.part + part.span])
                done.put(fill_pattern(public, values), convert_layout(some, part, "there"), name)
        elif isinstance(stacked := hits[0][1], Stacked):
            public, values = hits[0][0], hits[0][2]
            stack = stacks.setdefault(fill_pattern(public, values), {})
            stack[int(values[stacked.axis])] = convert_layout(tensor, stacked, "there")
        elif isinstance(joined := hits[0][1], Joined):
            _, parts_here = joins.setdefault(fill_pattern(hits[0][0], hits[0][2]), (joined, {}))
            parts_here[next(i for i, ours in enumerate(joined.ours) if match_name(ours, name) is not None)] = tensor
        elif isinstance(repeated := hits[0][1], Repeated):
            for number in range(repeated.count):
                copy = tensor.clone() if number else tensor  # tensors that share memory would be written once
                done.put(fill_pattern(hits[0][0], hits[0][2] | {repeated.axis: number}), copy, name)
        elif isinstance(hits[0][1], Zeros):
            if tensor.any():
                done.faults.append(f"{name} is not zero, so it cannot be written in this format")
        else:
            public, row, values = hits[0]
            done.put(fill_pattern(public, values), convert_layout(tensor, row, "there"), name)
    for public, stack in stacks.items():
        done.put(public, torch.stack([stack[number] for number in sorted(stack)]), public)
    for public, (joined, found) in joins.items():
        if len(found) < len(joined.ours):
            done.faults.append(f"{public} is built from {len(joined.ours)} tensors, but there are only {len(found)}")
        else:
            done.put(public, torch.cat([found[i] for i in sorted(found)]), public)
    return done


def translate(state: State, table: Table, reverse: bool = False) -> dict[str, Tensor]:
    """Rename tensors by a table: public names to ours, or back with `reverse`.

    Raises `WeightsError` that lists all names without a row, and tensors that contradict each other.
    """
    done = (map_to_public if reverse else map_to_ours)(state, table)
    if done.unknown or done.faults:
        raise WeightsError(
            "\n".join(
                [
                    f"{len(done.unknown)} of {len(state)} names have no row in the table:",
                    *format_list("unknown", done.unknown),
                    *done.faults,
                ]
            )
        )
    return done.state


def strip_prefixes(state: State) -> list[State]:
    """Return the state, then the state without each prefix that all its names share."""
    forms = [state]
    while len(forms) <= MAX_PREFIXES and (prefix := next((p for p in PREFIXES if has_prefix(forms[-1], p)), "")):
        forms.append({name.removeprefix(prefix): tensor for name, tensor in forms[-1].items()})
    return forms


def has_prefix(state: State, prefix: str) -> bool:
    """Return whether there are names and all of them start with a prefix."""
    return bool(state) and all(name.startswith(prefix) for name in state)


def format_list(kind: str, names: Sequence[str], describe: Callable[[str], str] = str) -> list[str]:
    """Return a line for each of the first names, and one with the number of the others."""
    more = [f"  {kind}: and {len(names) - MAX_LISTED_KEYS} more"] if len(names) > MAX_LISTED_KEYS else []
    return [f"  {kind}: {describe(name)}" for name in names[:MAX_LISTED_KEYS]] + more


def format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
