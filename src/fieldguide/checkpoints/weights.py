"""Reading and writing of weights.

`load` reads a file or folder of fieldguide, or of any origin in a card's tables, into a network. `save` writes
safetensors under our names or those of an origin.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldguide.checkpoints import torchscript
from fieldguide.checkpoints.key_mapping import State, Table, Translated, forms, inwards, listed, shape_of, translate
from fieldguide.checkpoints.names import WEIGHT_SUFFIXES
from fieldguide.core.errors import WeightsError, WeightsWarning, nearest
from fieldguide.core.files import atomic_path

OURS = "fieldguide"
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys that hold the tensors
PLAIN = [argparse.Namespace]  # classes that hold values and run nothing: fairseq keeps its arguments in one
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",  # what a folder of Hugging Face may hold
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


# ------------------------------------------------------------------------------------------------ files


def _pickled(path: Path) -> object:
    """Read a file of torch.save without running any code in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the protocol of the pickle
            # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
            with torch.serialization.safe_globals(PLAIN):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        text = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\w+\.[\w.]+)", text):
            raise WeightsError(
                f"{path} holds a Python object besides tensors: {found[1]}. Reading it could "
                "run any code, so the file is not read. Where you trust it, save its "
                "state_dict as safetensors and give that."
            ) from None
        reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()[0]
        raise WeightsError(f"{path} is damaged, cut short or no file of torch.save: {reason}") from None


def _sharded(path: Path) -> dict[str, Tensor]:
    """Read all shards that an index lists."""
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of shards: it has no readable weight_map ({error})") from None
    if outside := [name for name in shards if Path(name).name != name]:
        raise WeightsError(f"{path} names files outside its folder: {', '.join(outside)}")
    if lost := [name for name in shards if not (path.parent / name).is_file()]:
        raise WeightsError(
            f"{path} names {len(shards)} files, of which {len(lost)} are not there: "
            f"{', '.join(lost)}. Download them into {path.parent}."
        )
    return {name: tensor for shard in shards for name, tensor in read(path.parent / shard).items()}


def read(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: .safetensors, .gguf, .pth/.pt/.bin/.ckpt, an index of shards, or a
    folder.

    Raises `WeightsError` if nothing can be read, or only by running code that the file contains.
    """
    path = Path(path)
    if path.is_dir():
        known = [path / name for name in FILES if (path / name).is_file()]
        single = [p for p in sorted(path.iterdir()) if p.suffix in WEIGHT_SUFFIXES]
        if not known and len(single) != 1:
            raise WeightsError(f"{path} has none of {', '.join(FILES)}, and {len(single)} other checkpoints; name one file")
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
        from fieldguide.core.gguf import tensors

        return tensors(path)
    if torchscript.is_archive(path):
        return torchscript.tensors(path)
    return _tensors(_pickled(path), str(path))


def _tensors(content: object, where: str) -> dict[str, Tensor]:
    """Return the dictionary of tensors in a loaded object: the object itself, or its value under a usual key."""
    while isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        held = (
            f"the keys {', '.join(map(str, list(content)[:10]))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise WeightsError(f"{where} holds no named tensors but {held}")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


# ------------------------------------------------------------------------------------------------ networks


def tables(model: nn.Module) -> dict[str, Table]:
    """Return the tables of public names of a network's card, by origin."""
    from fieldguide.models.registry import card_of

    card = card_of(model)
    return card.tables(model.config) if card and card.weights else {}


def _recognise(model: nn.Module, state: State, origin: str | None) -> tuple[str, Translated]:
    """Return the origin, and the form of its names, that matches most parameters of the network."""
    wanted, known = model.state_dict().keys(), tables(model)
    if origin not in (None, OURS, *known):
        raise WeightsError(
            f"{type(model).__name__} knows no origin {origin!r}.{nearest(str(origin), known)} "
            f"Known are {', '.join((OURS, *known))}."
        )
    best, score = ("", Translated()), 0
    for name in (OURS, *known) if origin is None else (origin,):
        for form in forms(state):
            if name == OURS:
                done = Translated(dict(form), {key: key for key in form})
            else:
                done = inwards(form, known[name])
            filled = len(done.state.keys() & wanted)
            if filled > score:
                best, score = (name, done), filled
    if not score:
        raise WeightsError(
            f"no name in the checkpoint belongs to {type(model).__name__} "
            f"(tried {', '.join((OURS, *known)) if origin is None else origin}). "
            f"It begins {', '.join(list(state)[:3])}; "
            f"the network {', '.join(list(wanted)[:3])}."
        )
    return best


def load(
    model: nn.Module, source: str | Path | State, origin: str | None = None, head: Literal["load", "skip"] = "load"
) -> list[str]:
    """Load a checkpoint into a network and return the names of the parameters that keep their values.

    `source` is a path for `read`, or tensors by name. The origin is identified by its names unless given.
    `head="skip"` keeps the network's own last layer if the checkpoint's has another shape or is missing. Raises
    one `WeightsError` with every missing, unknown and mismatched key; the network is then unchanged.

    Tensors are converted to the network's precision. Batch counters of normalization layers may be missing. If
    a tensor has another shape and the module that holds it has a method `resize_weight(name, tensor)`, its
    result is used (such as position embeddings for another image size); None rejects the tensor. Tensors of
    heads that the network does not have are skipped with a `WeightsWarning`, and `head="skip"` keeps all of the
    network's own head that the file lacks or has in another shape.
    """
    if not isinstance(model, nn.Module):
        raise WeightsError(
            f"load needs a network, but got {model!r} is none: make one first with fieldguide.create('resnet18')."
        )
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = _tensors(source, where) if isinstance(source, Mapping) else read(source)
    found, done = _recognise(model, state, origin)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise WeightsError("the network is on the meta device and holds no numbers: create it on a real one")

    loaded = done.state.keys() & wanted.keys()
    for name, holder, part in _refitting(model):
        if name in loaded and done.state[name].shape != wanted[name].shape:
            fitted = holder.resize_weight(part, done.state[name])
            done.state[name] = done.state[name] if fitted is None else fitted
    filled = {_place(wanted[name]) for name in loaded}  # a tied tensor is filled by any of its names
    missing = [
        name
        for name in wanted
        if name not in loaded and _place(wanted[name]) not in filled and not name.endswith("num_batches_tracked")
    ]
    heads = getattr(type(model), "heads", ())
    spare = [done.origin[name] for name in done.state if name not in wanted and name.partition(".")[0] in heads]
    unknown = [
        *done.unknown,
        *(done.origin[name] for name in done.state if name not in wanted and name.partition(".")[0] not in heads),
    ]
    misshaped = [
        name
        for name in wanted
        if name in loaded
        and (
            done.state[name].shape != wanted[name].shape
            or done.state[name].is_floating_point() != wanted[name].is_floating_point()
        )
    ]

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
        lines = [
            f"{where} does not fit {type(model).__name__} (names read as those of {found}): "
            f"{len(missing)} missing, {len(unknown)} unknown, {len(misshaped)} misshaped"
        ]
        lines += listed("missing", (f"{name} ({shape_of(wanted[name])})" for name in missing))
        lines += listed("unknown", (name + nearest(name, taken) for name in unknown))
        lines += listed(
            "misshaped",
            (
                f"{name}: {shape_of(done.state[name])} {_kind(done.state[name])} in the checkpoint as "
                f"{done.origin[name]}, {shape_of(wanted[name])} {_kind(wanted[name])} in the network"
                for name in misshaped
            ),
        )
        lines += [f"  {fault}" for fault in done.faults]
        if skippable:
            lines.append(
                f'  Only the layer {layer.pop()!r} differs: load(..., head="skip") keeps it fresh, '
                "to be trained on your classes."
            )
        raise WeightsError("\n".join(lines))

    if spare:
        lines = [f"{where} holds {len(spare)} tensors of heads that this network has not; they are not used:"]
        warnings.warn("\n".join([*lines, *listed("not used", spare)]), WeightsWarning, stacklevel=2)
    model.load_state_dict({name: done.state[name] for name in loaded if name not in fresh}, strict=False)
    return fresh


def _refitting(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the tensors of modules that can resize: name, module, name there."""
    return [
        (f"{prefix}.{part}".removeprefix("."), module, part)
        for prefix, module in model.named_modules()
        if hasattr(module, "resize_weight")
        for part in module.state_dict()
    ]


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> object:
    """Return this for two names of one tensor."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def save(model: nn.Module, path: str | Path, format: str = OURS) -> Path:
    """Write a network's tensors as safetensors, under our names or those of an origin (`"torchvision"`).

    Tied tensors are written once. The file is written atomically. Raises `WeightsError` for an unknown format
    or a tensor without a public name.
    """
    state = model.state_dict()
    if format != OURS:
        known = tables(model)
        if format not in known:
            raise WeightsError(
                f"{type(model).__name__} cannot be written as {format!r}."
                f"{nearest(format, known)} Known are {', '.join((OURS, *known))}."
            )
        state = translate(state, known[format], reverse=True)
    once = {_place(tensor): name for name, tensor in reversed(state.items())}
    # Views of a part of another tensor are not allowed in a safetensors file: such are copied.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if once[_place(tensor)] == name}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    tensors = {
        name: tensor.clone() if uses[tensor.untyped_storage().data_ptr()] > 1 else tensor for name, tensor in tensors.items()
    }

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path
