"""What sentence-transformers publishes next to an encoder: pooling, dense layers, and the prompt before each text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.checkpoints import config_mapping, weights
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import AGAIN, get_checked, guard, read_json

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
SCORES = {"Sigmoid": "sigmoid", "Identity": "logit"}  # activation of a cross-encoder -> its score
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
    with guard(folder / MODULES_FILE, WeightsError):
        return build_modules(folder, read_json(folder / MODULES_FILE, WeightsError, list))


def build_modules(folder: Path, modules: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], nn.Module | None, bool]:
    """Return what `read_modules` returns for the entries of modules.json."""
    modes: tuple[str, ...] = ("mean",)
    layers: list[nn.Module] = []
    has_prompt = True
    for module in modules:
        kind, path = module["type"].rpartition(".")[2], module.get("path", "")
        if Path(path).name != path:
            raise WeightsError(f"{folder / MODULES_FILE}: {path!r} is not a folder next to it. {AGAIN}")
        if kind == "Pooling":
            modes = read_modes(folder, f"{path}/config.json")
            has_prompt = config_mapping.read(folder / path / "config.json").get("include_prompt", True)
        elif kind == "Dense":
            layers.append(read_dense(folder / path))
        elif kind == "LayerNorm":
            state = weights.read(folder / path)
            layers.append(fill(nn.LayerNorm(len(state["norm.weight"])), state, "norm."))
        elif kind not in PASSIVE:
            raise WeightsError(f"{folder / MODULES_FILE}: the module {module['type']} is not supported.")
    return modes, nn.Sequential(*layers) if layers else None, has_prompt


def read_task_options(folder: Path) -> dict[str, str]:
    """Return the options of the task text-embedding that continue the training of a published encoder; {} without such files.

    Layers after the pooling, which are not trained, are marked as "+layers".
    """
    if not any((folder / name).is_file() for name in (MODULES_FILE, POOLING_FILE)):
        return {}
    modes, head, _ = read_modules(folder)
    prompt = read_prompt(folder)
    pooling = "+".join([*modes, *(["layers"] if head is not None else [])])
    return {"pooling": pooling, **({"query_prompt": prompt, "passage_prompt": prompt} if prompt else {})}


def read_dense(folder: Path) -> nn.Module:
    """Return a linear layer with its activation. Raises `WeightsError` for an unknown activation."""
    config, state = config_mapping.read(folder / "config.json"), weights.read(folder)
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise WeightsError(f"{folder}: the activation {name} is not supported. Supported are {', '.join(ACTIVATIONS)}.")
    outputs, inputs = state["linear.weight"].shape  # the tensors are there, whatever the configuration says
    if (config["in_features"], config["out_features"]) != (inputs, outputs):
        raise WeightsError(
            f"{folder}: in_features and out_features must be {inputs} and {outputs}, the shape of linear.weight. {AGAIN}"
        )
    linear = fill(nn.Linear(inputs, outputs, bias="linear.bias" in state), state, "linear.")
    return nn.Sequential(linear, ACTIVATIONS[name]())


def fill(layer: nn.Module, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """Return a layer with the tensors of a file, as float32."""
    layer.load_state_dict({name.removeprefix(prefix): tensor.to(torch.float32) for name, tensor in state.items()})
    return layer


def write_modules(folder: Path, modes: Sequence[str], width: int, length: int, prompts: Mapping[str, str]) -> None:
    """Write what sentence-transformers reads next to an encoder: pooling, normalization, prompts by name, the longest text.

    `width` is that of the vectors of tokens. The prompt `query` is that of `encode_query`, `document` that of `encode_document`.
    """
    kinds = (("", "Transformer"), (str(Path(POOLING_FILE).parent), "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    keys = {f"{POOLING_KEY_PREFIX}{key}": ours in modes for key, ours in POOLING_KEYS.items()}
    values = {
        MODULES_FILE: modules,
        POOLING_FILE: {"word_embedding_dimension": width, **keys, "include_prompt": True},
        PROMPTS_FILE: {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
        LENGTH_FILE: {"max_seq_length": length, "do_lower_case": False},
    }
    for name, value in values.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def read_prompt(folder: Path) -> str:
    """Return the prompt that is put before each text by default, or an empty string."""
    path = folder / PROMPTS_FILE
    config = config_mapping.read(path) if path.is_file() else {}
    name = get_checked(config, "default_prompt_name", str, path, WeightsError)
    prompts = get_checked(config, "prompts", dict, path, WeightsError) or {}
    return (get_checked(prompts, name, str, path, WeightsError) or "") if name else ""


def find_score(config: Mapping[str, Any], folder: Path) -> str:
    """Return how a cross-encoder with one output scores a pair, "sigmoid" or "logit"; "" for other networks with one output.

    `config` is its config.json. Without a stated activation it is a sigmoid, as in sentence-transformers. Raises `WeightsError` for an
    unknown activation.
    """
    own = config.get("sentence_transformers")
    stated = own.get("activation_fn") if isinstance(own, Mapping) else None
    stated = stated or config.get("sbert_ce_default_activation_function")
    if stated is None:
        return "" if config.get("problem_type") == "regression" else "sigmoid"
    name = str(stated).rpartition(".")[2]
    if name not in SCORES:
        raise WeightsError(
            f"{folder}: the activation {name} of a cross-encoder is not supported. Supported are {', '.join(SCORES)}."
        )
    return SCORES[name]
