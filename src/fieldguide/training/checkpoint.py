"""Checkpoints: everything that is needed to resume a run, as safetensors and JSON.

A checkpoint consists of two files, `step-N.safetensors` and `step-N.json`. The JSON file holds the digests of the tensors and
of its own content, and is written last, so that an interrupted write leaves no partial checkpoint. The previous checkpoint is
kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from fieldguide.core.errors import TrainingError, WriteError
from fieldguide.core.files import make_folder, write_atomically
from fieldguide.core.settings import Settings
from fieldguide.objectives.base import Objective

MAX_KEPT_CHECKPOINTS = 2  # older ones are deleted


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Save a checkpoint and delete all but the newest `MAX_KEPT_CHECKPOINTS`. Raises `WriteError` if writing fails."""
    if folder.parent.is_dir():  # a run folder that was removed is not created again, without its other files
        make_folder(folder)
    content = pack_tensors(copy_to_cpu(tensors))
    path = folder / f"step-{step:08d}.json"
    write_atomically(path.with_suffix(".safetensors"), content)
    record = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), "state": state}
    record["digest"] = compute_digest(record)
    try:
        write_atomically(path, json.dumps(record, allow_nan=True).encode())
    except WriteError:
        path.with_suffix(".safetensors").unlink(missing_ok=True)  # gives its space back
        raise
    for old in sorted(folder.glob("step-*.json"))[:-MAX_KEPT_CHECKPOINTS]:
        old.unlink()
    for old in folder.glob("step-*.safetensors"):  # also those whose process was killed before it wrote the JSON part
        if not old.with_suffix(".json").exists():
            old.unlink()
    return path


def compute_digest(record: dict[str, Any]) -> str:
    """Return the SHA-256 of the JSON part of a checkpoint, except its own digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=True).encode()).hexdigest()


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU that share no memory with each other, as safetensors requires."""
    out, seen = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        out[name] = t.clone() if t.untyped_storage().data_ptr() in seen else t
        seen.add(t.untyped_storage().data_ptr())
    return out


def load(folder: Path, log: Callable[[str], None] = print) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Load the newest intact checkpoint: its step, tensors and state. Return None if there is no checkpoint.

    A damaged checkpoint is reported through `log` and the previous one is used. Raises `TrainingError` if all checkpoints
    are damaged.
    """
    records = sorted(folder.glob("step-*.json"), reverse=True)
    for path in records:
        try:
            return read(path)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            struct.error,
            SafetensorError,
        ) as error:
            reason = str(error) or type(error).__name__
        log(f"checkpoint {path.with_suffix('').name} is damaged ({reason}); using the previous one.")
    if records:
        raise TrainingError(f"all checkpoints in {folder} are damaged. Start a new run with another --out.")
    return None


def read(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Return step, tensors and state of one checkpoint. Raises `ValueError` if its content does not match its digests.

    Checkpoints of earlier versions have no digest of their JSON part.
    """
    record = json.loads(path.read_bytes())
    if record.keys() - {"digest"} != {"step", "sha256", "state"} or path.stem != f"step-{record['step']:08d}":
        raise ValueError("its fields are not those of a checkpoint of this step")
    if record.get("digest", compute_digest(record)) != compute_digest(record):
        raise ValueError(f"the content of {path.name} does not match its digest")
    content = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"the content of {path.stem}.safetensors does not match its digest")
    return record["step"], read_tensors(content), record["state"]


def estimate_bytes(objective: Objective, settings: Settings) -> int:
    """Return the bytes that a run writes at most: the checkpoints that are kept, one that is being written, and the weights."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    kept = sum(size(getattr(objective, name).state_dict().values()) for name in objective.keep)
    moments = 2 if settings.optimizer == "adamw" else 1
    one = (
        size(objective.state_dict().values())
        + moments * size(p for p in objective.parameters() if p.requires_grad)
        + kept * (2 if settings.ema else 1)
    )
    return (MAX_KEPT_CHECKPOINTS + 1) * one + kept


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer as named tensors and plain numbers."""
    tensors, numbers = {}, {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"{prefix}.{index}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                numbers[name] = value
    return tensors, numbers


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Restore the state that `pack_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in [*tensors.items(), *numbers.items()]:
        if name.startswith(prefix + "."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            like = parameters[int(index)]
            if isinstance(value, Tensor) and value.shape == like.shape:
                # Use the parameter's memory layout: fused kernels treat both as flat arrays.
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
