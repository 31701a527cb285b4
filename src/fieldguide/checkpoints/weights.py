"""Reading and writing of weights.

`load` reads a file or folder of fieldguide, or of any origin in a card's tables, into a network. `save` writes
safetensors under our names or those of an origin.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldguide.checkpoints import ctranslate2, torchscript
from fieldguide.checkpoints.key_mapping import (
    MAX_LISTED_KEYS,
    State,
    Table,
    TranslatedState,
    format_list,
    format_shape,
    map_to_ours,
    strip_prefixes,
    translate,
)
from fieldguide.checkpoints.names import WEIGHT_SUFFIXES, get_head_names
from fieldguide.checkpoints.pickle_check import check_pickle
from fieldguide.checkpoints.quantized_blocks import dequantize_blocks
from fieldguide.checkpoints.shard_index import read_shard_names
from fieldguide.core.archives import FREE_BYTES, check_archive
from fieldguide.core.errors import WeightsError, WeightsWarning, nearest
from fieldguide.core.files import atomic_path, make_folder
from fieldguide.core.validation import AGAIN, describe, guard

OURS = "fieldguide"
LEGACY_PICKLES = 5  # at the start of files from before torch 1.6: magic number, version, system, object, keys of the storages
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
CODE_SUFFIXES = (".pkl", ".pickle")  # pickles that were not written by torch.save
MAX_COMPARED_CHARACTERS = 100  # of an unknown name, for which similar ones are looked up
# Keys that hold the tensors. Averaged weights, if a file has them, are those that the authors publish results of.
WRAPPERS = ("ema", "state_dict", "model_state_dict", "model", "net")
AVERAGED = "g_ema"  # key of the averaged generator, in files that also hold other networks
# Classes that hold values and run nothing: fairseq keeps its arguments in one.
SAFE_CLASSES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
WEIGHT_FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",  # names used by Hugging Face
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",  # names used by diffusers
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    # Half precision, where a folder has nothing else.
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "model.fp16.safetensors.index.json",
)


# ------------------------------------------------------------------------------------------------ files


def _read_pickle(path: Path) -> object:
    """Read a file of torch.save without running any code in it."""
    is_zip = zipfile.is_zipfile(path)
    try:
        _check_pickles(path, is_zip)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the protocol of the pickle
            # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
            with torch.serialization.safe_globals(SAFE_CLASSES):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        text = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\w+\.[\w.]+)", text):
            raise WeightsError(
                f"{path} holds a Python object of type {found[1]}, and reading it could run arbitrary code. If you "
                "trust the file, save its state_dict as safetensors and load that."
            ) from None
        reason = describe(ValueError((text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0]))
        raise WeightsError(f"{path} is damaged, truncated or not a file of torch.save: {reason}. Download it again.") from None


def _check_pickles(path: Path, is_zip: bool) -> None:
    """Check what torch unpickles of a file before it does."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path, WeightsError)
            for member in archive.infolist():
                if member.filename.endswith("/data.pkl"):
                    check_pickle(io.BytesIO(archive.read(member)))
        return
    with open(path, "rb") as file:
        for _ in range(LEGACY_PICKLES):
            check_pickle(file)


def _read_shards(path: Path) -> dict[str, Tensor]:
    """Read all shards that an index lists."""
    shards = read_shard_names(path)
    if lost := [name for name in shards if not (path.parent / name).is_file()]:
        raise WeightsError(
            f"{path} lists {len(shards)} files, but {len(lost)} are missing: "
            f"{', '.join(lost[:MAX_LISTED_KEYS])}. Download them into {path.parent}."
        )
    return {name: tensor for shard in shards for name, tensor in _read(path.parent / shard).items()}


def find_shards(files: list[Path]) -> list[Path]:
    """Return the files of a checkpoint that was saved as NAME-00001-of-00002 and so on, whose index is missing.

    Returns an empty list for other files. Raises `WeightsError` if some of them are missing.
    """
    parts = {path: found for path in files if (found := re.fullmatch(r"(.+)-(\d+)-of-(\d+)", path.stem))}
    stems = {(found[1], int(found[3])) for found in parts.values()}
    if not parts or len(stems) != 1:
        return []
    stem, count = next(iter(stems))
    there = {int(found[2]) for found in parts.values()}
    if lost := sorted(set(range(1, count + 1)) - there):
        first = next(iter(parts))
        names = ", ".join(f"{stem}-{i:05d}-of-{count:05d}{first.suffix}" for i in lost)
        raise WeightsError(f"{first.parent} holds {len(there)} of {count} shards; missing: {names}. Download them.")
    return sorted(parts)


def read(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: .safetensors, .gguf, .pth/.pt/.bin/.ckpt, an index of shards, or a
    folder. Matrices that are stored as blocks with scales become floats (see `dequantize_blocks`).

    Raises `WeightsError` if nothing can be read, or only by running code that the file contains.
    """
    return dequantize_blocks(_read(Path(path)), str(path))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as they are stored."""
    if path.is_dir():
        known = [path / name for name in WEIGHT_FILE_NAMES if (path / name).is_file()]
        single = [p for p in sorted(path.iterdir()) if p.suffix in WEIGHT_SUFFIXES]
        if not known and (shards := find_shards(single)):
            return {name: tensor for shard in shards for name, tensor in _read(shard).items()}
        if not known and len(single) != 1:
            raise WeightsError(
                f"{path} holds none of {', '.join(WEIGHT_FILE_NAMES)}, and {len(single)} other weight files. Specify one file."
            )
        return _read((known or single)[0])
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Check the path.")
    if path.name.endswith((".index.json", ".index.fp16.json")):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        with guard(path, WeightsError):
            return load_file(path)
    if path.suffix == ".gguf":
        from fieldguide.core.gguf import read_tensors

        return read_tensors(path)
    if ctranslate2.find_kind(path):
        with guard(path, WeightsError):
            return ctranslate2.read_tensors(path)
    if path.suffix in CODE_SUFFIXES:
        raise WeightsError(
            f"{path} is a pickle of Python objects, such as NVIDIA's files of StyleGAN, and reading it would run the code in it. If "
            "you trust the file, convert it in an environment with the authors' code: net = pickle.load(open(PATH, 'rb'))['G_ema']; "
            "safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, 'model.safetensors'). Then load "
            "model.safetensors."
        )
    with guard(path, WeightsError):
        is_torchscript = torchscript.is_archive(path)
        state = torchscript.read_tensors(path) if is_torchscript else _extract_tensors(_read_pickle(path), str(path))
        return _check_tensors(state, path)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration that a file of torch.save holds next to its tensors, under "config" or, in those of OpenAI, "dims";
    empty if there is none.
    """
    if path.suffix not in PICKLE_SUFFIXES or ctranslate2.find_kind(path):
        return {}
    with guard(path, WeightsError):
        content = {} if torchscript.is_archive(path) else _read_pickle(path)
    found = content.get("config", content.get("dims")) if isinstance(content, Mapping) else None
    return dict(found) if isinstance(found, Mapping) and all(isinstance(key, str) for key in found) else {}


def read_shapes(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file without their numbers, on the meta device."""
    with guard(path, WeightsError), safe_open(path, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def _check_tensors(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises `WeightsError` for kinds that no network has, and for shapes much larger than the
    file, which repeat the same numbers in memory.
    """
    size = path.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path}: the name of a tensor is {type(name).__name__} instead of text. {AGAIN}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise WeightsError(f"{path}: {name} is a sparse, quantized, nested or empty tensor. Save plain tensors.")
        if tensor.numel() * tensor.element_size() > max(size, FREE_BYTES):
            raise WeightsError(
                f"{path}: {name} has the shape {format_shape(tensor)}, which is more than the whole file. {AGAIN}"
            )
    return state


def _extract_tensors(content: object, where: str) -> dict[str, Tensor]:
    """Return the dictionary of tensors in a loaded object: the object itself, or its value under a usual key."""
    if isinstance(content, Mapping) and isinstance(content.get(AVERAGED), Mapping):
        content = content[AVERAGED]
    for _ in WRAPPERS:  # a dictionary may contain itself
        if not isinstance(content, Mapping) or any(isinstance(v, Tensor) for v in content.values()):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        held = (
            f"the keys {describe(Exception(', '.join(map(str, list(content)[:10]))))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise WeightsError(f"{where} holds no named tensors, but {held}. Save a state_dict and load that.")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


# ------------------------------------------------------------------------------------------------ networks


def get_tables(model: nn.Module) -> dict[str, Table]:
    """Return the tables of public names of a network's card, by origin."""
    from fieldguide.models.registry import card_of

    card = card_of(model)
    return card.tables(model.config) if card and card.weights else {}


def _recognize(model: nn.Module, state: State, origin: str | None) -> tuple[str, TranslatedState]:
    """Return the origin, and the form of its names, that matches most parameters of the network."""
    wanted, known = model.state_dict().keys(), get_tables(model)
    if origin not in (None, OURS, *known):
        raise WeightsError(
            f"{type(model).__name__} has no weights of the origin {origin!r}.{nearest(str(origin), known)} "
            f"Origins are {', '.join((OURS, *known))}."
        )
    best, score = ("", TranslatedState()), 0
    for name in (OURS, *known) if origin is None else (origin,):
        for form in strip_prefixes(state):
            if name == OURS:
                done = TranslatedState(dict(form), {key: key for key in form})
            else:
                done = map_to_ours(form, known[name])
            filled = len(done.state.keys() & wanted)
            if filled > score:
                best, score = (name, done), filled
    if not score:
        raise WeightsError(
            f"no name in the checkpoint belongs to {type(model).__name__} "
            f"(tried {', '.join((OURS, *known)) if origin is None else origin}). "
            f"The checkpoint begins with {', '.join(list(state)[:3])}; "
            f"the network with {', '.join(list(wanted)[:3])}."
        )
    return best


def read_ours(model: nn.Module, state: State, origin: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under our names for a network."""
    return _recognize(model, state, origin)[1].state


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
            f"load needs a network, but got {model!r}. Create one first, for example with fieldguide.create('resnet18')."
        )
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = _extract_tensors(source, where) if isinstance(source, Mapping) else read(source)
    found, done = _recognize(model, state, origin)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise WeightsError("the network is on the meta device, which stores no values. Create it on the CPU or a GPU.")

    loaded = done.state.keys() & wanted.keys()
    for name, holder, part in _find_resizable(model):
        if name in loaded and done.state[name].shape != wanted[name].shape:
            fitted = holder.resize_weight(part, done.state[name])
            done.state[name] = done.state[name] if fitted is None else fitted
    filled = {_get_storage_key(wanted[name]) for name in loaded}  # a tied tensor is filled by any of its names
    missing = [
        name
        for name in wanted
        if name not in loaded and _get_storage_key(wanted[name]) not in filled and not name.endswith("num_batches_tracked")
    ]
    heads = get_head_names(type(model))
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
        lines += format_list("missing", missing, lambda name: f"{name} ({format_shape(wanted[name])})")
        lines += format_list("unknown", unknown, lambda name: name + nearest(name[:MAX_COMPARED_CHARACTERS], taken))
        lines += format_list(
            "misshaped",
            misshaped,
            lambda name: (
                f"{name}: {format_shape(done.state[name])} {_format_dtype(done.state[name])} in the checkpoint as "
                f"{done.origin[name]}, {format_shape(wanted[name])} {_format_dtype(wanted[name])} in the network"
            ),
        )
        lines += [f"  {fault}" for fault in done.faults]
        if skippable:
            lines.append(
                f'  Only the layer {layer.pop()!r} differs: load(..., head="skip") leaves it randomly initialized, '
                "to be trained on your classes."
            )
        raise WeightsError("\n".join(lines))

    if spare:
        lines = [f"{where} holds {len(spare)} tensors of heads that this network does not have; they are not used:"]
        warnings.warn("\n".join([*lines, *format_list("not used", spare)]), WeightsWarning, stacklevel=2)
    model.load_state_dict({name: done.state[name] for name in loaded if name not in fresh}, strict=False)
    return fresh


class _Resizable(Protocol):
    """A module that can change the size of its tensors."""

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None: ...


def _find_resizable(model: nn.Module) -> list[tuple[str, _Resizable, str]]:
    """Return (name, module, name in the module) of the tensors of modules with a method `resize_weight`."""
    return [
        (f"{prefix}.{part}".removeprefix("."), module, part)
        for prefix, module in model.named_modules()
        if hasattr(module, "resize_weight")
        for part in module.state_dict()
    ]


def _format_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _get_storage_key(tensor: Tensor) -> object:
    """Return a key that is equal for tensors that share the same memory."""
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
        known = get_tables(model)
        if format not in known:
            raise WeightsError(
                f"{type(model).__name__} cannot be saved in the format {format!r}."
                f"{nearest(format, known)} Supported formats: {', '.join((OURS, *known))}."
            )
        state = translate(state, known[format], reverse=True)
    once = {_get_storage_key(tensor): name for name, tensor in reversed(state.items())}
    # safetensors rejects views of other tensors, so they are copied.
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if once[_get_storage_key(tensor)] == name
    }
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    tensors = {
        name: tensor.clone() if uses[tensor.untyped_storage().data_ptr()] > 1 else tensor for name, tensor in tensors.items()
    }

    path = Path(path)
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps errors of the operating system
            raise OSError(str(error)) from error
    return path
