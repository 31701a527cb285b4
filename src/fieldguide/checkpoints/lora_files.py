"""LoRA files of image generators, as diffusers, peft and kohya's scripts write them, merged into the tensors of a pipeline's parts; and
written as diffusers reads them.

W + s (alpha / r) B A (Hu et al. 2021, arXiv:2106.09685, section 4.1). A convolution is split into one of its size with r outputs, and
one of 1 x 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.adapter import CONFIG, WEIGHT_FILES, read_scale
from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.checkpoints.key_mapping import map_to_ours, map_to_public
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.core.card import Card
from fieldguide.core.errors import WeightsError, nearest
from fieldguide.core.validation import guard, read_json
from fieldguide.models.initialization import make_on_meta

FILE = "pytorch_lora_weights.safetensors"  # name in folders of diffusers
DENOISER = "denoiser"  # name of the part that is `unet` or `transformer` in folders
# Prefix in a file -> part. After those that end in "_" the dots of names are written as "_", too.
PREFIXES = {
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "base_model.model.": DENOISER,  # of peft, for a network alone
}
DOWN = re.compile(r"(.+?)[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.default)?\.weight")
UP = re.compile(r"(.+?)[._](lora_B|lora_up|lora\.up|lora_linear_layer\.up)(\.default)?\.weight")
PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")  # of diffusers before 0.17
ALPHA = ".alpha"
TEXT_PREFIX = "text_model."  # of CLIP's text encoder, which files of transformers 5 leave out
METADATA = "lora_adapter_metadata"  # of files of diffusers since 0.34


@dataclass
class Factors:
    """The two matrices of a module, and alpha if the file has it."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def find_lora(source: str | Path) -> Path:
    """Return the file of a LoRA, which is a file or in a folder of diffusers or peft. Raises `WeightsError` if there is none."""
    path = Path(source)
    if path.is_dir():
        found = next((path / name for name in (FILE, *WEIGHT_FILES) if (path / name).is_file()), None)
        single = sorted(path.glob("*.safetensors"))
        if found is None and len(single) != 1:
            raise WeightsError(f"{path} holds no {FILE}, no {WEIGHT_FILES[0]}, and {len(single)} other files. Name the file.")
        return found or single[0]
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Set lora to a file, or to a folder of diffusers or peft.")
    return path


def read_updates(path: Path, scale: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """Return what a file adds to the weights of each part, by the module's name in the file.

    Raises `WeightsError` for other adapters than LoRA, and for files that are damaged.
    """
    with guard(path, WeightsError):
        found: dict[tuple[str, str], Factors] = {}
        for key, tensor in weights.read(path).items():
            part, name = split_prefix(key, path)
            module, role = parse_name(name, key, path)
            factors = found.setdefault((part, module), Factors())
            if role == "alpha":
                factors.alpha = float(tensor)
            else:
                setattr(factors, role, tensor.float())
        configs = read_configs(path)
        updates: dict[str, dict[str, Tensor]] = {}
        for (part, module), factors in found.items():
            if factors.down is None or factors.up is None:
                raise WeightsError(f"{path}: {module} lacks one of its two matrices. Download it again.")
            rank = factors.down.shape[0]
            factor = 1.0 if factors.alpha is None else factors.alpha / rank
            if factors.alpha is None and part in configs:
                factor = read_scale(configs[part], module)
            updates.setdefault(part, {})[module] = scale * factor * multiply(factors.up, factors.down, module, path)
        return updates


def split_prefix(key: str, path: Path) -> tuple[str, str]:
    """Return the part that a key belongs to, and its name there. Names without a prefix are those of the denoiser."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    if prefix is None:
        return DENOISER, key
    return PREFIXES[prefix], key.removeprefix(prefix)


def parse_name(name: str, key: str, path: Path) -> tuple[str, str]:
    """Return the module of a tensor, and what it is: "down", "up" or "alpha". Raises `WeightsError` for anything else."""
    if old := PROCESSOR.fullmatch(name):
        return f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}", old[3]
    for role, pattern in (("down", DOWN), ("up", UP)):
        if found := pattern.fullmatch(name):
            return found[1], role
    if name.endswith(ALPHA):
        return name.removesuffix(ALPHA), "alpha"
    raise WeightsError(f"{path}: {key} is no tensor of a LoRA. Other adapters (DoRA, LoHa, LoKr, IA3) are not supported.")


def read_configs(path: Path) -> dict[str, dict[str, object]]:
    """Return the settings of peft of each part, from the file itself or the configuration next to it."""
    if (path.parent / CONFIG).is_file() and path.name in WEIGHT_FILES:
        return {DENOISER: read_json(path.parent / CONFIG, WeightsError)}
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    configs: dict[str, dict[str, object]] = {}
    for key, value in (json.loads(text) if text else {}).items():
        part, name = split_prefix(key, path)
        configs.setdefault(part, {})[name] = value
    return {part: config for part, config in configs.items() if "r" in config and "lora_alpha" in config}


def multiply(up: Tensor, down: Tensor, module: str, path: Path) -> Tensor:
    """Return the update of a weight: of a linear layer out in, of a convolution out in h w."""
    if up.flatten(1).shape[1] != down.shape[0]:
        raise WeightsError(f"{path}: the matrices of {module} have {up.flatten(1).shape[1]} and {down.shape[0]} ranks.")
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def merge_updates(found: Checkpoint, updates: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return a checkpoint with the updates of a file added, whose names may be those of any origin of its card.

    Raises `WeightsError` for updates that belong to no tensor.
    """
    state = dict(found.state)
    if named := name_updates(updates, state):
        return replace(found, state=add(state, named, path))
    model = make_on_meta(found.card, found.card.config(**found.values))
    tables = found.card.tables(model.config)
    ours = map_to_ours(state, tables[found.origin]).state if found.origin in tables else state
    for table in tables.values():
        public = map_to_public({name: torch.empty(x.shape, device="meta") for name, x in ours.items()}, table).state
        if named := name_updates(updates, public):
            mapped = map_to_ours(named, table)
            if not mapped.unknown and not mapped.faults:
                return replace(found, state=add(ours, mapped.state, path), origin=weights.OURS)
    known = {name.removesuffix(".weight") for name in state}
    strange = next((module for module in updates if not name_updates({module: updates[module]}, state)), next(iter(updates)))
    raise WeightsError(
        f"{path}: {strange} belongs to no weight of {found.card.name}.{nearest(strange, known)} The LoRA was trained for another model."
    )


def name_updates(updates: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the updates by the names of the weights in a state; empty if one has none. Names may have "_" for dots."""
    names = {name.removesuffix(".weight").removeprefix(TEXT_PREFIX): name for name in state if name.endswith(".weight")}
    flat = {module.replace(".", "_"): name for module, name in names.items()}
    named = {}
    for module, update in updates.items():
        short = module.removeprefix(TEXT_PREFIX)
        named[names.get(short) or flat.get(short.removeprefix(TEXT_PREFIX.replace(".", "_")))] = update
    return {} if None in named else {str(name): update for name, update in named.items()}


def add(state: dict[str, Tensor], updates: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors with updates added. Raises `WeightsError` for another number of values."""
    for name, update in updates.items():
        weight = state[name]
        if update.numel() != weight.numel() or len(update) != len(weight):
            raise WeightsError(
                f"{path}: the update of {name} has the shape {tuple(update.shape)}, the weight {tuple(weight.shape)}. The LoRA was "
                "trained for another model."
            )
        state[name] = (weight.float() + update.reshape(weight.shape)).to(weight.dtype)
    return state


def is_writable(card: Card) -> bool:
    """Return whether `write_updates` knows the names of diffusers for a network."""
    return "diffusers" in card.weights and "diffusers" in card.configs


def write_updates(path: Path, card: Card, config: Any, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write LoRA updates of a denoiser as diffusers reads them with `load_lora_weights`.

    Args:
        updates: our name of a weight -> the two factors of its update, out x r and r x in. All have the same rank.

    Raises `WeightsError` for a weight without a public name.
    """
    table = card.tables(config)["diffusers"]
    kind = str(to_public_config(card, card.configs["diffusers"], config)["_class_name"])
    prefix = "unet" if kind.startswith("UNet") else "transformer"
    tensors = {}
    for name, (up, down) in updates.items():
        update = up @ down
        public = map_to_public({name: update}, table)
        if public.unknown or public.faults:
            raise WeightsError(f"{name} of {card.name} has no name in files of diffusers, so its update cannot be written.")
        for module, part in public.state.items():  # several if the public network divides the matrix
            factors = (up, down) if torch.equal(part, update) else factorize(part.flatten(1), len(down))
            shapes = [(x.shape[0], x.shape[1], *[1] * (part.ndim - 2)) for x in factors]  # of 1 x 1 convolutions, too
            stem = f"{prefix}.{module.removesuffix('.weight')}"
            for role, x, shape in zip(("lora_B", "lora_A"), factors, shapes):
                tensors[f"{stem}.{role}.weight"] = x.reshape(shape).cpu().contiguous()
    save_file(tensors, path, {"format": "pt"})


def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # out in -> out r, r in
    """Return two factors of a matrix of at most this rank."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(rank, len(values))
    up, down = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    root = values[:kept].sqrt()
    up[:, :kept], down[:kept] = (left[:, :kept] * root).to(up), (root[:, None] * right[:kept]).to(down)
    return up, down
