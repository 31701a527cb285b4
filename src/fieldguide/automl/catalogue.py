"""The catalogue of models, tasks and settings, built from the modules that define them."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.automl import profile
from fieldguide.automl.description import Description, Layer
from fieldguide.automl.index import compute_source_digest
from fieldguide.core.card import Closed
from fieldguide.core.option_docs import describe_fields
from fieldguide.core.options import PREDICT_ALIASES
from fieldguide.core.settings import ALIASES, Settings
from fieldguide.models import registry
from fieldguide.models.initialization import SkipInitialization, make_on_meta
from fieldguide.tasks import task as task_named
from fieldguide.tasks import tasks


def list_models(glob: str = "*", *, family: str | None = None, task: str | None = None) -> list[str]:
    """Return the names of sizes that match a glob (`resnet*`), belong to a family and can do a task."""
    names = registry.names(glob, family=family)
    if task is None:
        return names
    kind = task_named(task)
    return [
        n
        for n in names
        if registry.card(n).input_type in kind.input_types and set(registry.card(n).output_types) & set(kind.output_types)
    ]


def list_tasks_of(name: str) -> list[str]:
    """Return the names of the tasks that a model can be trained for."""
    card = registry.card(name)
    return [
        t.name for t in tasks().values() if card.input_type in t.input_types and set(card.output_types) & set(t.output_types)
    ]


def show(name: str, **overrides: Any) -> Description | Closed:
    """Describe a model without allocating its weights, or a closed system by what is published of it.

    Raises `SettingsError` for an unknown name or field.
    """
    if (system := registry.closed_systems().get(name.lower())) is not None:
        return system
    card, size = registry.find(name)
    with torch.device("meta"), SkipInitialization():
        model = registry.create(name, **overrides).eval()
        config = card.resolve_config(size, **overrides)
    inputs = profile.build_example_inputs(card, config)
    parts = {n: profile.count_parameters(child) for n, child in model.named_children()}
    own = profile.count_parameters(model) - sum(parts.values())
    parameters = profile.count_parameters(model)
    layers, multiply_adds = list_layers(model, inputs)
    return Description(
        name=size,
        architecture=card.name,
        family=card.family,
        summary=card.summary,
        new=card.new,
        paper=card.paper,
        year=card.year,
        input_type=card.input_type,
        output_type=" or ".join(card.output_types),
        tasks=list_tasks_of(name),
        config=asdict(config),
        parameters=parameters,
        published=None if overrides else card.sizes[size].params,
        multiply_adds=multiply_adds,
        inputs=", ".join(format_shape(x) for x in inputs),
        sizes=count_size_parameters(card.name),
        parts=parts | ({"(own)": own} if own > 0 else {}),
        layers=layers,
    )


@functools.cache
def count_size_parameters(architecture: str) -> dict[str, int]:
    """Return the exact parameter count of every named size."""
    counts, card = {}, registry.card(architecture)
    for size in card.sizes:
        if size != card.tiny:
            counts[size] = profile.count_parameters(make_on_meta(card, card.resolve_config(size)))
    return counts


def list_layers(model: nn.Module, inputs: tuple) -> tuple[list[Layer], int]:
    """Return the modules in the order of their definition, each with its output shape, and the multiply-adds of a pass.

    The network is not usable afterwards.
    """
    names, ran, handles = {m: n for n, m in model.named_modules() if n}, [], []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        ran.append(Layer(names[module], type(module).__name__, profile.count_parameters(module), format_shape(output)))

    handles = [m.register_forward_hook(hook) for m in names]
    multiply_adds = profile.count_forward(model, inputs)
    for handle in handles:
        handle.remove()
    order = {name: i for i, name in enumerate(names.values())}
    return sorted({layer.path: layer for layer in ran}.values(), key=lambda layer: order[layer.path]), multiply_adds


def format_shape(value: Any) -> str:
    """Return `2x3x4` for a tensor, comma-separated for several."""
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, dict):
        return ", ".join(f"{k} {format_shape(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(format_shape, value)))
    return ""


@functools.cache
def build_index() -> dict[str, Any]:
    """Return the index that `fieldguide.automl.index` stores: models, tasks and settings as plain data."""
    from fieldguide.tasks.base import OPTION_ALIASES

    models, names = {}, {}
    for card in registry.cards().values():
        names[card.name] = card.default
        for size in card.sizes:
            names[size] = size
            models[size] = {
                "name": size,
                "architecture": card.name,
                "test": size == card.tiny,
                "parameters": card.sizes[size].params,
                "family": card.family,
                "input_type": card.input_type,
                "output_types": list(card.output_types),
                "year": card.year,
                "paper": card.paper,
                "source": card.sizes[size].source,
                "summary": card.summary,
                "tasks": list_tasks_of(size),
            }
    return {
        "digest": compute_source_digest(),
        "models": models,
        "names": names,
        "closed": {name: asdict(system) for name, system in registry.closed_systems().items()},
        "tasks": {name: describe_task(kind) for name, kind in tasks().items()},
        "settings": describe_fields(Settings),
        "aliases": dict(ALIASES),
        "option_aliases": dict(OPTION_ALIASES),
        "predict_aliases": dict(PREDICT_ALIASES),
    }


def describe_task(kind: Any) -> dict[str, Any]:
    """Return what a task reads, its metrics, and its options with defaults and meanings."""
    return {
        "name": kind.name,
        "reads": kind.reads,
        "metrics": [{"name": m.name, "better": m.better, "meaning": m.words} for m in kind.metrics],
        "options": describe_fields(kind.Options),
        "predict_options": describe_fields(kind.PredictOptions),
    }
