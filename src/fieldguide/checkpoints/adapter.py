"""Merging of LoRA adapters in the format of peft into the tensors of their base model.

W + s B A (Hu et al. 2021, arXiv:2106.09685, section 4.1), with s = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA
(Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fieldguide.checkpoints import config_mapping, weights
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import guard

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
MAX_REPETITIONS = 3  # in a pattern for names of modules
UNSUPPORTED = ("use_dora", "layer_replication", "alora_invocation_tokens", "megatron_config")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHT_FILES)


def has_base(folder: Path) -> bool:
    """Return whether the base model is in the same folder as its adapter."""
    return any((folder / name).is_file() for name in weights.WEIGHT_FILE_NAMES)


def read_base(folder: Path) -> str:
    """Return the base model that an adapter names. Raises `WeightsError` if it names none."""
    base = config_mapping.read(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise WeightsError(f"{folder / CONFIG} names no base model. Put the adapter into the folder of its base model.")
    return str(base)


def merge(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the base model with the adapter of a folder merged, under the base model's names.

    Raises `WeightsError` for adapters other than LoRA, and for tensors that belong to no tensor of the base model.
    """
    with guard(folder / CONFIG, WeightsError):
        return add_updates(state, folder, config_mapping.read(folder / CONFIG))


def add_updates(state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what `merge` returns for an adapter with this configuration."""
    if config.get("peft_type") != "LORA" or (used := [key for key in UNSUPPORTED if config.get(key)]):
        what = f"{', '.join(used)} of" if config.get("peft_type") == "LORA" else f"type {config.get('peft_type')} of"
        raise WeightsError(f"{folder}: {what} the adapter is not supported, only LoRA. Merge it with peft and load the result.")
    path = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    merged, factors = dict(state), dict[str, dict[str, Tensor]]()
    for key, tensor in weights.read(path).items():
        name = key.removeprefix(PREFIX)
        if found := LORA.fullmatch(name):
            factors.setdefault(found[1] + (":embedding" if found[2] else ""), {})[found[3]] = tensor
        else:  # a bias, or a module that was trained as a whole, such as a classification head
            plain = name.replace(".modules_to_save.default", "").replace(".base_layer.", ".")
            merged[find_name(plain, merged, path)] = tensor
    for module, pair in factors.items():
        plain, _, is_embedding = module.partition(":")
        if pair.keys() != {"A", "B"}:
            raise WeightsError(f"{path}: {plain} lacks lora_{'B' if 'A' in pair else 'A'}. Download it again.")
        name = find_name(f"{plain}.weight", merged, path)
        scale, weight = read_scale(config, plain), merged[name]
        update = pair["B"].float() @ pair["A"].float()  # out r, r in -> out in
        if is_embedding or config.get("fan_in_fan_out"):  # Conv1D of GPT-2 stores in out
            update = update.T
        if update.shape != weight.shape:
            raise WeightsError(
                f"{path}: the update of {name} has the shape {tuple(update.shape)}, the base model {tuple(weight.shape)}. The "
                "adapter belongs to another model."
            )
        merged[name] = (weight.float() + scale * update).to(weight.dtype)
    return merged


def read_scale(config: Mapping[str, Any], module: str) -> float:
    """Return the factor of a module's update; patterns in the configuration override rank and alpha."""
    matches = lambda pattern: re.fullmatch(rf"(.*\.)?{check_pattern(pattern)}", module) is not None
    rank = next((r for key, r in (config.get("rank_pattern") or {}).items() if matches(key)), config["r"])
    alpha = next((a for key, a in (config.get("alpha_pattern") or {}).items() if matches(key)), config["lora_alpha"])
    scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not math.isfinite(scale):
        raise ValueError(f"lora_alpha={alpha} and r={rank} give no finite factor")
    return scale


def check_pattern(pattern: str) -> str:
    """Return a regular expression for names of modules. Raises `ValueError` for one that could take very long to match."""
    if len(re.findall(r"[*+?{]", pattern)) > MAX_REPETITIONS or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"the pattern {pattern!r} has too many repetitions")
    return pattern


def find_name(name: str, state: Mapping[str, Tensor], path: Path) -> str:
    """Return the base model's name of a tensor; the two may differ in a prefix such as "model."."""
    if name in state:
        return name
    alike = [key for key in state if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(alike) != 1:
        raise WeightsError(f"{path}: {name} belongs to no tensor of the base model. The adapter belongs to another model.")
    return alike[0]
