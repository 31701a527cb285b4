"""Reading of an earlier run for a new fit: its network, weights and fitted preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_check import check_fields, check_network
from fieldguide.core.card import Card
from fieldguide.core.errors import RunError
from fieldguide.core.record_check import TASK, check_structure
from fieldguide.core.run_files import check_file, check_folder
from fieldguide.core.run_record import USABLE_STATUSES, read_record
from fieldguide.core.validation import guard, read_json
from fieldguide.models import registry


def is_run(folder: Path) -> bool:
    """Return whether `folder` is the folder of a run."""
    return (folder / "run.json").is_file()


def build_config(card: Card, config: dict[str, Any]) -> Any:
    """Return a network's config from its JSON form, in which tuples are lists.

    Raises `RunError` for values that no network has.
    """
    values = {key: to_tuple(value) for key, value in config.items()}
    check_fields(card, values, "run.json", error=RunError)
    with guard(f"run.json: the config of {card.name}", RunError, ""):
        return card.config(**values)


def to_tuple(value: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value


def read_network(folder: Path) -> tuple[Card, Any, dict[str, Tensor]]:
    """Return card, config and state dict of a finished run's network. Raises `RunError` if the run is not finished."""
    record = read_record(folder)
    if record["status"] not in USABLE_STATUSES:
        raise RunError(
            f"{folder} is not finished. Run `fieldguide fit --resume {folder}`, or `fieldguide fit --finish {folder}` to use it as "
            "it is."
        )
    card = registry.card(record["model"]["architecture"])
    check_file(folder, record, "model.safetensors")
    config, path = build_config(card, record["model"]["config"]), folder / "model.safetensors"
    check_network(card, config, weights.read_shapes(path), path)
    network = card.make(config)
    weights.load(network, path)
    return card, getattr(network, "config", config), network.state_dict()  # the networks of the guide's code keep none


def read_preprocessing(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fitted preprocessing state and the options of a run's task, as its task.json holds them."""
    path = folder / "preprocess" / "task.json"
    check_folder(folder, read_record(folder), path.parent.name)
    try:
        record = read_json(path, RunError)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run folder is incomplete.") from None
    check_structure(record, TASK, path)
    return record["state"], record["options"]
