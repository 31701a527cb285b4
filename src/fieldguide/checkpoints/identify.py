"""Identification of a checkpoint by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fieldguide.checkpoints.key_mapping import Translated, forms, inwards
from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError, WeightsError
from fieldguide.models.registry import cards

FREE = ("num_classes", "channels", "vocab_size", "length")  # what checkpoints of one size may differ in
STEP = 8  # by which a number is changed to see what shapes it decides
SPARE = 3  # tensors that a file may lack: tied ones


# Of torch.nn.init, those that a mode sees themselves, and not what they are made of.
DRAWN = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}


class Unfilled(TorchFunctionMode):
    """Skip random initialization inside the block, for networks whose tensors are all loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func not in DRAWN:
            return func(*args, **kwargs or {})
        tensor = args[0] if args else kwargs["tensor"]
        tensor.detach().zero_()  # within any bounds: torch draws a cut normal until all is
        return tensor


def headed(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> bool:
    """Return whether a file has its own head."""
    names = {name: tensor.to("meta") for name, tensor in state.items()}
    return "head.weight" in inwards(names, card.tables(card.config(**values))[origin]).state


def headless(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint lacks the classification head of its network, which then yields vectors."""
    given = values.get("output_type", card.output_types[0])
    best = max((done.state for _, done in translations(card, values, state)), key=len, default={})
    return given == "label" and "vector" in card.output_types and bool(best) and not any(n.startswith("head.") for n in best)


def sibling(card: Card, origin: str, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return, of an origin and its variants (such as "diffusers-2022"), the one that matches most names of a file."""
    names = {name: tensor.to("meta") for name, tensor in state.items()}
    tables = {
        key: table for key, table in card.tables(card.config(**values)).items() if key == origin or key.startswith(f"{origin}-")
    }
    return min(tables, key=lambda key: len(inwards(names, tables[key]).unknown))


def shapes(card: Card, values: Mapping[str, Any]) -> dict[str, torch.Size]:
    return shapes_of(card.name, card.config(**values))


@lru_cache(1024)  # several tables of a card ask for the same
def shapes_of(name: str, config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"), Unfilled():
        return {name: t.shape for name, t in cards()[name].make(config).state_dict().items()}


def translations(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Translated]]:
    """Yield a checkpoint's names as read by each table of a card that matches most of the first few."""
    for origin, table in card.tables(card.config(**values)).items():
        for form in forms(state):
            first = dict(list(form.items())[:12])
            if len(inwards(first, table).unknown) <= len(first) // 3:
                yield origin, inwards(form, table)


def differing(card: Card, values: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the values of the fields `FREE` that differ from a config, read from the shapes they determine."""
    here, out = shapes(card, values), {}
    for word in FREE:
        field = card.names.get(word, word)
        if not card.accepts(word) or str(card.config.__dataclass_fields__[field].type) != "int":
            continue
        start = getattr(card.config(**values), field)
        try:
            more = shapes(card, {**values, field: start + STEP})
        except (FieldguideError, RuntimeError, ValueError):  # a number that this network cannot have
            continue
        decided = (
            (name, i)
            for name, shape in here.items()
            if name in found and found[name].ndim == len(shape)
            for i, (a, b) in enumerate(zip(shape, more.get(name, shape)))
            if a != b
        )
        if (place := next(decided, None)) is None:
            continue
        name, axis = place
        slope = (more[name][axis] - here[name][axis]) / STEP
        value = start + (found[name].shape[axis] - here[name][axis]) / slope
        if value == int(value) and value > 0 and value != start:
            out[field] = int(value)
    return out


def seen(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how a checkpoint differs from the model it is said to be: classes, vocabulary."""
    best = max((done.state for _, done in translations(card, values, state)), key=len, default=state)
    return differing(card, values, best)


def recognised(state: Mapping[str, Tensor], where: str) -> tuple[Card, str, str, dict[str, Any]]:
    """Return card, size and origin of the tensors, and the output type if it differs from the size's.

    Raises `WeightsError` if no model matches, or several do.
    """
    fits, near = [], []
    for card in cards().values():
        for size in card.sizes:
            values = dict(card.sizes[size].overrides)
            for origin, done in translations(card, values, state):
                near.append((len(done.state), card.name, origin))
                own = card.config(**values)
                if done.unknown or done.faults or any(getattr(own, key) != value for key, value in done.means.items()):
                    continue
                there = {name: t.shape for name, t in done.state.items()}
                for given in answering(card, values):
                    fit = fitting(card, {**values, **given}, done, there)
                    if fit:
                        fits.append((*fit, card, size, origin, given))
    if not fits:
        nearby = ", ".join(dict.fromkeys(f"{name} ({origin})" for _, name, origin in sorted(near, reverse=True)))
        raise WeightsError(
            f"{where}: these {len(state)} tensors match no model of this library"
            + (
                f"; the nearest are {nearby}. Specify it with name=..."
                if nearby
                else f" (they begin {', '.join(list(state)[:3])})."
            )
        )
    fewest = min((apart, spare) for apart, spare, *_ in fits)
    best = sorted((fit for fit in fits if fit[:2] == fewest), key=lambda fit: fit[2])
    if len({(card.name, config) for _, _, _, config, card, *_ in best}) > 1:
        raise WeightsError(
            f"{where} could be {' or '.join(dict.fromkeys(fit[5] for fit in best))}: their tensors look "
            "the same, but they compute differently. Specify one with name=..."
        )
    return best[0][4:]


def answering(card: Card, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Yield the possible output types of a network: that of its size first, then the others."""
    if len(card.output_types) == 1:
        return [{}]
    usual = getattr(card.config(**values), "output_type", None)
    return [{}, *({"output_type": given} for given in card.output_types if given != usual)] if usual else [{}]


def fitting(
    card: Card, values: Mapping[str, Any], done: Translated, there: Mapping[str, torch.Size]
) -> tuple[int, int, int, Any] | None:
    """Return the distance between tensors under our names and a network, with the config that fits best.

    Counts missing tensors, tensors of other heads, and the fields `FREE` that must differ. None if the tensors
    belong to another network.
    """
    wanted, heads = shapes(card, values), getattr(card.model, "heads", ())
    apart = [n for n in wanted if n not in there and not n.endswith("num_batches_tracked")]
    spare = there.keys() - wanted.keys()
    if len(apart) > SPARE or any(name.partition(".")[0] not in heads for name in spare):
        return None
    changes = differing(card, values, done.state)
    wanted = shapes(card, {**values, **changes}) if changes else wanted
    if any(there.get(name, shape) != shape for name, shape in wanted.items()):
        return None
    return len(apart), len(spare), len(changes), card.config(**{**values, **changes})
