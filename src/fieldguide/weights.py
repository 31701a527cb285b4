"""Weights: public checkpoints in, ours out. The only code that renames parameters.

`load` reads a file or folder of fieldguide, or of any origin whose names a card lists, into a network.
`save` writes safetensors under our names or those of an origin. `translate` renames a dictionary of tensors.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldguide.blocks.renaming import Dropped, Fused, Reshaped, Row, Transposed, Zeros
from fieldguide.errors import WeightsError, WeightsWarning, nearest

State = Mapping[str, Tensor]
Table = Mapping[str, Row]

OURS = "fieldguide"
LISTED = 20                                                          # keys shown of each kind in an error
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")        # keys that hold the tensors
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")               # of DDP, torch.compile, wrappers
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
FILES = ("model.safetensors", "model.safetensors.index.json",        # what a folder of Hugging Face may hold
         "pytorch_model.bin", "pytorch_model.bin.index.json",
         "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


# ------------------------------------------------------------------------------------------------ names

@cache
def _compile(pattern: str) -> tuple[re.Pattern, tuple[tuple[str, int], ...]]:
    """A pattern as a regular expression, with the name and offset of each of its groups."""
    groups, text = [], ""
    for piece in re.split(r"(\{\w+(?:[+-]\d+)?\}|\*)", pattern):
        if piece == "*":
            groups.append(("*", 0))
            text += r"([^.]+)"
        elif piece.startswith("{"):
            name, offset = re.fullmatch(r"\{(\w+)([+-]\d+)?\}", piece).groups()
            groups.append((name, int(offset or 0)))
            text += r"(\d+)"
        else:
            text += re.escape(piece)
    return re.compile(text), tuple(groups)


def _match(pattern: str, name: str) -> dict[str, int | str] | None:
    """The values of a pattern's groups in a name; None where it does not match."""
    expression, groups = _compile(pattern)
    if not (found := expression.fullmatch(name)):
        return None
    values: dict[str, int | str] = {}
    for (group, offset), text in zip(groups, found.groups()):
        value = text if group == "*" else int(text) - offset
        if values.setdefault(group, value) != value or (group != "*" and value < 0):
            return None
    return values


def _fill(pattern: str, values: Mapping[str, int | str]) -> str:
    """A name from a pattern and the values of its groups."""
    def text(found: re.Match) -> str:
        if found[0] == "*":
            return str(values["*"])
        return str(values[found[1]] + int(found[2] or 0))
    return re.sub(r"\{(\w+)([+-]\d+)?\}|\*", text, pattern)


def _zeros(table: Table) -> list[Zeros]:
    return [row for row in table.values() if isinstance(row, Zeros)]


def _ours(row: Row) -> str | None:
    return row if isinstance(row, str) else getattr(row, "ours", None)


def _turned(tensor: Tensor, row: Row, side: Literal["here", "there"]) -> Tensor:
    """The tensor as it lies on our side or on theirs."""
    if isinstance(row, Reshaped):
        return tensor.reshape(getattr(row, side))
    if pairs := getattr(row, "pairs", 0):
        parts = (pairs // 2, 2) if side == "here" else (2, pairs // 2)
        return tensor.unflatten(0, (-1, *parts)).transpose(1, 2).flatten(0, 2)
    return tensor.mT if isinstance(row, Transposed) and tensor.ndim == 2 else tensor


def _holds(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a shape, in which one length may be open, has room for exactly this tensor."""
    known = math.prod(length for length in shape if length != -1)
    return tensor.numel() % known == 0 if -1 in shape else tensor.numel() == known


@dataclass
class _Translated:
    state: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)                      # new name -> old name(s)
    unknown: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def put(self, name: str, tensor: Tensor, old: str) -> None:
        if name in self.state and not tensor.is_meta and not torch.equal(self.state[name], tensor):
            self.faults.append(f"{old} and {self.origin[name]} both mean {name}, with different values")
        self.state[name], self.origin[name] = tensor, old


def inwards(state: State, table: Table) -> _Translated:
    """Public names -> ours."""
    done, parts = _Translated(), {}
    for name, tensor in state.items():
        hit = next(((row, values) for public, row in table.items()
                    if (values := _match(public, name)) is not None), None)
        if hit is None:
            done.unknown.append(name)
            continue
        row, values = hit
        if isinstance(row, Dropped):
            continue
        ours = _fill(_ours(row), values)
        if isinstance(row, Fused):
            parts.setdefault((ours, row.parts), {})[row.part] = (name, _turned(tensor, row, "here"))
        elif isinstance(row, Reshaped) and not _holds(tensor, row.here):
            done.faults.append(f"{name} ({_shape(tensor)}) cannot be read in the shape {row.here} of {ours}")
        else:
            done.put(ours, _turned(tensor, row, "here"), name)
    for (ours, count), found in parts.items():
        names = ", ".join(found[i][0] for i in sorted(found))
        tensors = [found[i][1] for i in sorted(found)]
        if len(found) < count:
            done.faults.append(f"{ours} is made of {count} tensors, the file has only {names}")
        elif len({t.shape for t in tensors}) > 1:
            done.faults.append(f"{ours} is made of {names}, whose shapes differ")
        else:
            done.put(ours, torch.cat(tensors), names)
    for row in _zeros(table):
        if row.like in done.state and row.ours not in done.state:
            other = done.state[row.like]
            like = other[:, 0] if row.column else other[:row.length]
            done.put(row.ours, torch.zeros_like(like), "what such files do without")
    return done


def _outwards(state: State, table: Table) -> _Translated:
    """Our names -> public ones. Of several public names for one tensor, the first row counts."""
    done = _Translated()
    for name, tensor in state.items():
        hits = [(public, row, values) for public, row in table.items()
                if _ours(row) and (values := _match(_ours(row), name)) is not None]
        if not hits:
            done.unknown.append(name)
        elif isinstance(hits[0][1], Fused):
            parts = {row.part: (public, row, values) for public, row, values in reversed(hits) if isinstance(row, Fused)}
            for public, row, values in parts.values():
                done.put(_fill(public, values), _turned(tensor.chunk(row.parts)[row.part], row, "there"), name)
        elif isinstance(hits[0][1], Zeros):
            if tensor.any():
                done.faults.append(f"{name} must be zeros to be written so, and is not")
        else:
            public, row, values = hits[0]
            done.put(_fill(public, values), _turned(tensor, row, "there"), name)
    return done


def translate(state: State, table: Table, reverse: bool = False) -> dict[str, Tensor]:
    """Rename tensors by a table: public names to ours, or back with `reverse`.

    Raises `WeightsError` that lists all names without a row, and tensors that contradict each other.
    """
    done = (_outwards if reverse else inwards)(state, table)
    if done.unknown or done.faults:
        raise WeightsError("\n".join([f"{len(done.unknown)} of {len(state)} names have no row in the table:",
                                      *_listed("unknown", done.unknown), *done.faults]))
    return done.state


# ------------------------------------------------------------------------------------------------ files

def _pickled(path: Path) -> object:
    """A file of torch.save, read without running any code in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # remarks on the protocol of the pickle
            # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        text = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\w+\.[\w.]+)", text):
            raise WeightsError(f"{path} holds a Python object besides tensors: {found[1]}. Reading it could "
                               "run any code, so the file is not read. Where you trust it, save its "
                               "state_dict as safetensors and give that.") from None
        reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()[0]
        raise WeightsError(f"{path} is damaged, cut short or no file of torch.save: {reason}") from None


def _sharded(path: Path) -> dict[str, Tensor]:
    """All shards that an index names."""
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of shards: it has no readable weight_map ({error})") from None
    if outside := [name for name in shards if Path(name).name != name]:
        raise WeightsError(f"{path} names files outside its folder: {', '.join(outside)}")
    if lost := [name for name in shards if not (path.parent / name).is_file()]:
        raise WeightsError(f"{path} names {len(shards)} files, of which {len(lost)} are not there: "
                           f"{', '.join(lost)}. Download them into {path.parent}.")
    return {name: tensor for shard in shards for name, tensor in read(path.parent / shard).items()}


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: .safetensors, .gguf, .pth/.pt/.bin/.ckpt, an index of shards, or a folder.

    Raises `WeightsError` where nothing can be read, or only by running code that the file contains.
    """
    path = Path(path)
    if path.is_dir():
        known = [path / name for name in FILES if (path / name).is_file()]
        single = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
        if not known and len(single) != 1:
            raise WeightsError(f"{path} has none of {', '.join(FILES)}, and {len(single)} other checkpoints; "
                               "name one file")
        return read((known or single)[0])
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or cut short: {error}") from None
    if path.suffix == ".gguf":
        from fieldguide.ggml import tensors
        return tensors(path)
    return _tensors(_pickled(path), str(path))


def _tensors(content: object, where: str) -> dict[str, Tensor]:
    """The dictionary of tensors in what people save: itself, or under a usual key."""
    while isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        held = f"the keys {', '.join(map(str, list(content)[:10]))}" if isinstance(content, Mapping) \
            else f"a {type(content).__name__}"
        raise WeightsError(f"{where} holds no named tensors but {held}")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


# ------------------------------------------------------------------------------------------------ networks

def tables(model: nn.Module) -> dict[str, Table]:
    """The tables of public names of a network's card, by origin."""
    from fieldguide.registry import cards
    found = next((card.weights for card in cards().values() if card.model is type(model)), {})
    return {origin: table(model.config) if callable(table) else table for origin, table in found.items()}


def forms(state: State) -> list[State]:
    """The state itself, then without each prefix that all its names share."""
    forms = [state]
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in forms[-1])), ""):
        forms.append({name.removeprefix(prefix): tensor for name, tensor in forms[-1].items()})
    return forms


def _recognise(model: nn.Module, state: State, origin: str | None) -> tuple[str, _Translated]:
    """The origin, and the form of its names, that fills most of the network."""
    wanted, known = model.state_dict().keys(), tables(model)
    if origin not in (None, OURS, *known):
        raise WeightsError(f"{type(model).__name__} knows no origin {origin!r}.{nearest(str(origin), known)} "
                           f"Known are {', '.join((OURS, *known))}.")
    best, score = ("", _Translated()), 0
    for name in (OURS, *known) if origin is None else (origin,):
        for form in forms(state):
            if name == OURS:
                done = _Translated(dict(form), {key: key for key in form})
            else:
                done = inwards(form, known[name])
            filled = len(done.state.keys() & wanted)
            if filled > score:
                best, score = (name, done), filled
    if not score:
        raise WeightsError(f"no name in the checkpoint belongs to {type(model).__name__} "
                           f"(tried {', '.join((OURS, *known)) if origin is None else origin}). "
                           f"It begins {', '.join(list(state)[:3])}; "
                           f"the network {', '.join(list(wanted)[:3])}.")
    return best


def _listed(kind: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = [f"  {kind}: and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return [f"  {kind}: {line}" for line in lines[:LISTED]] + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def load(model: nn.Module, source: str | Path | State, origin: str | None = None,
         head: Literal["load", "skip"] = "load") -> list[str]:
    """Fill a network from a checkpoint; returns the names that were left as they were.

    `source` is a path for `read`, or tensors by name. The origin is recognised by its names unless given.
    `head="skip"` keeps the network's own last layer where the checkpoint's has another shape or is missing.
    Raises one `WeightsError` with every missing, unknown and misshaped key; the network is then unchanged.
    Numbers are converted to the network's precision. Batch counters of normalisation may be missing. Where a tensor has
    another shape and the module that holds it has a method `refit(name, tensor)`, that says what to take in its place
    (places learnt for another size of picture); None refuses.

    Parts of a network that belong to one of several heads (its class names them in `heads`) may differ as a whole: what a
    file has for other heads is left out, with a `WeightsWarning` that names it, and `head="skip"` keeps all of the
    network's own head that the file lacks or has in another shape.
    """
    if not isinstance(model, nn.Module):
        raise WeightsError(f"load fills a network, and {model!r} is none: make one first with "
                           "fieldguide.create('resnet18').")
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = _tensors(source, where) if isinstance(source, Mapping) else read(source)
    found, done = _recognise(model, state, origin)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise WeightsError("the network is on the meta device and holds no numbers: create it on a real one")

    loaded = done.state.keys() & wanted.keys()
    for name, holder, part in _refitting(model):
        if name in loaded and done.state[name].shape != wanted[name].shape:
            fitted = holder.refit(part, done.state[name])
            done.state[name] = done.state[name] if fitted is None else fitted
    filled = {_place(wanted[name]) for name in loaded}   # a tied tensor is filled by any of its names
    missing = [name for name in wanted if name not in loaded and _place(wanted[name]) not in filled
               and not name.endswith("num_batches_tracked")]
    heads = getattr(type(model), "heads", ())
    spare = [done.origin[name] for name in done.state if name not in wanted and name.partition(".")[0] in heads]
    unknown = [*done.unknown, *(done.origin[name] for name in done.state
                                if name not in wanted and name.partition(".")[0] not in heads)]
    misshaped = [name for name in wanted if name in loaded and (
        done.state[name].shape != wanted[name].shape
        or done.state[name].is_floating_point() != wanted[name].is_floating_point())]

    # What may be skipped: the parameters of one layer, with another shape or absent from the end.
    layer = {name.rpartition(".")[0] or name for name in (*misshaped, *missing)}
    last = next(reversed(wanted)).rpartition(".")[0]
    skippable = len(layer) == 1 and (misshaped or layer == {last}) and not (unknown or done.faults)
    if layer and {name.partition(".")[0] for name in layer} <= set(heads):
        layer, skippable = {" and ".join(sorted({name.partition(".")[0] for name in layer}))}, not (unknown or done.faults)
    if skippable and head == "skip":
        fresh, misshaped, missing = [*misshaped, *missing], [], []
    else:
        fresh = []

    if missing or unknown or misshaped or done.faults:
        taken = set(wanted) - loaded
        lines = [f"{where} does not fit {type(model).__name__} (names read as those of {found}): "
                 f"{len(missing)} missing, {len(unknown)} unknown, {len(misshaped)} misshaped"]
        lines += _listed("missing", (f"{name} ({_shape(wanted[name])})" for name in missing))
        lines += _listed("unknown", (name + nearest(name, taken) for name in unknown))
        lines += _listed("misshaped", (
            f"{name}: {_shape(done.state[name])} {_kind(done.state[name])} in the checkpoint as "
            f"{done.origin[name]}, {_shape(wanted[name])} {_kind(wanted[name])} in the network"
            for name in misshaped))
        lines += [f"  {fault}" for fault in done.faults]
        if skippable:
            lines.append(f'  Only the layer {layer.pop()!r} differs: load(..., head="skip") keeps it fresh, '
                         "to be trained on your classes.")
        raise WeightsError("\n".join(lines))

    if spare:
        lines = [f"{where} holds {len(spare)} tensors of heads that this network has not; they are not used:"]
        warnings.warn("\n".join([*lines, *_listed("not used", spare)]), WeightsWarning, stacklevel=2)
    model.load_state_dict({name: done.state[name] for name in loaded if name not in fresh}, strict=False)
    return fresh


def _refitting(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Every tensor of a module that can make others fit: its name, the module, its name there."""
    return [(f"{prefix}.{part}".removeprefix("."), module, part) for prefix, module in model.named_modules()
            if hasattr(module, "refit") for part in module.state_dict()]


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> object:
    """The same for two names of one tensor."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def save(model: nn.Module, path: str | Path, format: str = OURS) -> Path:
    """Write a network's tensors as safetensors, under our names or those of an origin (`"torchvision"`).

    Tied tensors are written once. The file appears whole or not at all: it is written beside `path`, synced,
    then renamed. Raises `WeightsError` for an unknown format or a tensor that has no public name.
    """
    state = model.state_dict()
    if format != OURS:
        known = tables(model)
        if format not in known:
            raise WeightsError(f"{type(model).__name__} cannot be written as {format!r}."
                               f"{nearest(format, known)} Known are {', '.join((OURS, *known))}.")
        state = translate(state, known[format], reverse=True)
    once = {_place(tensor): name for name, tensor in reversed(state.items())}
    # Views of a part of another tensor are not allowed in a safetensors file: such are copied.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()
               if once[_place(tensor)] == name}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    tensors = {name: tensor.clone() if uses[tensor.untyped_storage().data_ptr()] > 1 else tensor
               for name, tensor in tensors.items()}

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)                               # the folder holds the new name
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
