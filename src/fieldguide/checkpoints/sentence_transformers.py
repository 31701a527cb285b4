"""What sentence-transformers publishes next to an encoder: pooling, dense layers, and the prompt before each text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fieldguide.checkpoints import config_mapping, weights
from fieldguide.core.errors import WeightsError

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
POOLING_FILE = "1_Pooling/config.json"
LENGTH_FILE = "sentence_bert_config.json"  # holds the maximum number of tokens
POOLING_KEY_PREFIX = "pooling_mode_"
# Keys of the pooling configuration -> modes of `fieldguide.objectives.embedding`, in the order of concatenation.
POOLING_KEYS = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
ACTIVATIONS = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU,
}
PASSIVE = ("Transformer", "Normalize", "Dropout")  # the network itself, and what changes no direction


def read_modes(folder: Path, path: str) -> tuple[str, ...]:
    """Return the pooling modes of a configuration. Raises `WeightsError` for modes that are not supported."""
    config = config_mapping.read(folder / path)
    chosen = [
        key.removeprefix(POOLING_KEY_PREFIX) for key, on in config.items() if key.startswith(POOLING_KEY_PREFIX) and on is True
    ]
    if isinstance(mode := config.get("pooling_mode"), str):  # one string, since version 5
        chosen = [next((key for key, ours in POOLING_KEYS.items() if mode in (key, ours)), mode)]
    if not chosen or set(chosen) - POOLING_KEYS.keys():
        raise WeightsError(
            f"{folder / path}: the pooling {' and '.join(chosen) or 'mode'} is not supported. Supported are "
            f"{', '.join(POOLING_KEYS)}."
        )
    return tuple(ours for key, ours in POOLING_KEYS.items() if key in chosen)


def read_modules(folder: Path) -> tuple[tuple[str, ...], nn.Module | None, bool]:
    """Return the pooling modes, the layers after the pooling, and whether the prompt is part of the pooling.

    Without files of sentence-transformers: the mean, no layers. Raises `WeightsError` for modules that are not supported.
    """
    if not (folder / MODULES_FILE).is_file():
        return (read_modes(folder, POOLING_FILE) if (folder / POOLING_FILE).is_file() else ("mean",)), None, True
    try:
        modules: list[dict[str, Any]] = weights.json.loads((folder / MODULES_FILE).read_text())
    except ValueError as error:
        raise WeightsError(f"{folder / MODULES_FILE} is not valid JSON: {error}. Download it again.") from None
    modes: tuple[str, ...] = ("mean",)
    layers: list[nn.Module] = []
    has_prompt = True
    for module in modules:
        kind, path = module["type"].rpartition(".")[2], module.get("path", "")
        if kind == "Pooling":
            modes = read_modes(folder, f"{path}/config.json")
            has_prompt = config_mapping.read(folder / path / "config.json").get("include_prompt", True)
        elif kind == "Dense":
            layers.append(read_dense(folder / path))
        elif kind == "LayerNorm":
            state = weights.read(folder / path)
            norm = nn.LayerNorm(len(state["norm.weight"]))
            norm.load_state_dict({name.removeprefix("norm."): tensor.float() for name, tensor in state.items()})
            layers.append(norm)
        elif kind not in PASSIVE:
            raise WeightsError(f"{folder / MODULES_FILE}: the module {module['type']} is not supported.")
    return modes, nn.Sequential(*layers) if layers else None, has_prompt


def read_dense(folder: Path) -> nn.Module:
    """Return a linear layer with its activation. Raises `WeightsError` for an unknown activation."""
    config, state = config_mapping.read(folder / "config.json"), weights.read(folder)
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise WeightsError(f"{folder}: the activation {name} is not supported. Supported are {', '.join(ACTIVATIONS)}.")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    linear.load_state_dict({name.removeprefix("linear."): tensor.to(torch.float32) for name, tensor in state.items()})
    return nn.Sequential(linear, ACTIVATIONS[name]())


def read_prompt(folder: Path) -> str:
    """Return the prompt that is put before each text by default, or an empty string."""
    config = config_mapping.read(folder / PROMPTS_FILE) if (folder / PROMPTS_FILE).is_file() else {}
    name = config.get("default_prompt_name")
    return (config.get("prompts") or {}).get(name, "") if name else ""
