"""The catalogue: which networks there are, and what one is, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.automl import profile
from fieldguide.core.card import Closed
from fieldguide.models import registry
from fieldguide.tasks import task as task_named
from fieldguide.tasks import tasks


def list_models(glob: str = "*", *, family: str | None = None, task: str | None = None) -> list[str]:
    """Names of sizes that match a glob (`resnet*`), a family, and a task that they can do."""
    names = registry.names(glob, family=family)
    if task is None:
        return names
    kind = task_named(task)
    return [
        n
        for n in names
        if registry.card(n).input_type in kind.input_types and set(registry.card(n).output_types) & set(kind.output_types)
    ]


def tasks_of(name: str) -> list[str]:
    """Tasks that a model can be trained for here."""
    card = registry.card(name)
    return [
        t.name for t in tasks().values() if card.input_type in t.input_types and set(card.output_types) & set(t.output_types)
    ]


@dataclass
class Layer:
    """One module of a network: where, what, its parameters and the shape it gives."""

    path: str
    kind: str
    parameters: int
    shape: str


@dataclass
class Description:
    """What `fieldguide show` prints."""

    name: str
    architecture: str
    family: str
    summary: str
    new: str
    paper: str
    year: int
    input_type: str
    output_type: str
    tasks: list[str]
    config: dict[str, Any]
    parameters: int
    published: int | None
    multiply_adds: int
    inputs: str
    sizes: dict[str, int]
    parts: dict[str, int] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)


def show(name: str, **overrides: Any) -> Description | Closed:
    """Describes a model without allocating it; of a closed system, says what is known. Raises `SettingsError` for an unknown
    name or field."""
    if (system := registry.closed().get(name.lower())) is not None:
        return system
    card, size = registry.find(name)
    with torch.device("meta"):
        model = registry.create(name, **overrides).eval()
        config = card.settle(size, **overrides)
    inputs = profile.example(card, config)
    parts = {n: profile.parameters(child) for n, child in model.named_children()}
    own = profile.parameters(model) - sum(parts.values())
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
        tasks=tasks_of(name),
        config=asdict(config),
        parameters=profile.parameters(model),
        published=None if overrides else card.sizes[size].params,
        multiply_adds=profile.multiply_adds(card.name, config),
        inputs=", ".join(shape(x) for x in inputs),
        sizes=sizes(card),
        parts=parts | ({"(own)": own} if own > 0 else {}),
        layers=layers(model, inputs),
    )


def sizes(card: Any) -> dict[str, int]:
    """Exact parameter counts of every named size."""
    counts = {}
    for size in card.sizes:
        if size != card.tiny:
            with torch.device("meta"):
                counts[size] = profile.parameters(card.make(card.settle(size)))
    return counts


def layers(model: nn.Module, inputs: tuple) -> list[Layer]:
    """The modules in the order in which they ran, each with the shape it gave."""
    names, ran, handles = {m: n for n, m in model.named_modules() if n}, [], []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        ran.append(Layer(names[module], type(module).__name__, profile.parameters(module), shape(output)))

    handles = [m.register_forward_hook(hook) for m in names]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    order = {name: i for i, name in enumerate(names.values())}
    return sorted({layer.path: layer for layer in ran}.values(), key=lambda layer: order[layer.path])


def shape(value: Any) -> str:
    """`2x3x4` for a tensor, comma-separated for several."""
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, dict):
        return ", ".join(f"{k} {shape(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(shape, value)))
    return ""
