"""Identification of a checkpoint by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fieldguide.checkpoints.key_mapping import TranslatedState, map_to_ours, strip_prefixes
from fieldguide.checkpoints.names import get_head_names
from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError, WeightsError
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.registry import cards

FREE_FIELDS = ("num_classes", "channels", "vocab_size", "length")  # fields in which checkpoints of one size may differ
PROBE_STEP = 8  # added to a field to find the shapes that depend on it
MAX_MISSING_TENSORS = 3  # tensors that a file may lack, because they are tied


def has_head(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> bool:
    """Return whether a file has its own head, which does not share its memory with the embedding."""
    names = {name: tensor.to("meta") for name, tensor in state.items()}
    found = map_to_ours(names, card.tables(card.config(**values))[origin]).origin
    heads = [name for name in found if name == "head.weight" or name.endswith(".head.weight")]  # or that of a part, its decoder
    embeds = [found.get(f"{name.removesuffix('head.weight')}embed.weight", "") for name in heads]
    return any(not is_same_memory(state[found[head]], state.get(embed)) for head, embed in zip(heads, embeds))


def is_same_memory(tensor: Tensor, other: Tensor | None) -> bool:
    """Return whether two tensors are one, as tied tensors are in files of torch.save."""
    return other is not None and tensor.numel() > 0 and tensor.data_ptr() == other.data_ptr() != 0


def lacks_head(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint lacks the classification head of its network, which then yields vectors."""
    given = values.get("output_type", card.output_types[0])
    best = max((done.state for _, done in iterate_translations(card, values, state)), key=len, default={})
    return given == "label" and "vector" in card.output_types and bool(best) and not any(n.startswith("head.") for n in best)


def choose_variant(card: Card, origin: str, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the variant of an origin (such as "diffusers-2022") that matches most names of a file, or the origin itself."""
    names = {name: tensor.to("meta") for name, tensor in state.items()}
    tables = {
        key: table for key, table in card.tables(card.config(**values)).items() if key == origin or key.startswith(f"{origin}-")
    }
    return min(tables, key=lambda key: len(map_to_ours(names, tables[key]).unknown))


def get_shapes(card: Card, values: Mapping[str, Any]) -> dict[str, torch.Size]:
    return compute_shapes(card.name, card.config(**values))


@lru_cache(1024)  # several tables of a card need the same shapes
def compute_shapes(name: str, config: Any) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in make_on_meta(cards()[name], config).state_dict().items()}


def iterate_translations(
    card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, TranslatedState]]:
    """Yield (origin, translated names) for each table of a card that matches at least two thirds of the first 12 names."""
    for origin, table in card.tables(card.config(**values)).items():
        for form in strip_prefixes(state):
            first = dict(list(form.items())[:12])
            if len(map_to_ours(first, table).unknown) <= len(first) // 3:
                yield origin, map_to_ours(form, table)


def find_changed_fields(card: Card, values: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the values of the fields `FREE` that differ from a config, read from the shapes they determine."""
    here, out = get_shapes(card, values), {}
    types = {field.name: str(field.type) for field in fields(card.config)}
    for word in FREE_FIELDS:
        field = card.names.get(word, word)
        if not card.accepts(word) or types[field] != "int":
            continue
        start = getattr(card.config(**values), field)
        try:
            more = get_shapes(card, {**values, field: start + PROBE_STEP})
        except (FieldguideError, RuntimeError, ValueError):  # the network does not support this value
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
        slope = (more[name][axis] - here[name][axis]) / PROBE_STEP
        value = start + (found[name].shape[axis] - here[name][axis]) / slope
        if value == int(value) and value > 0 and value != start:
            out[field] = int(value)
    return out


def infer_fields(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the fields (classes, vocabulary, ...) in which a checkpoint differs from the model that its name gives."""
    best = max((done.state for _, done in iterate_translations(card, values, state)), key=len, default=state)
    return find_changed_fields(card, values, best)


def recognize(state: Mapping[str, Tensor], where: str) -> tuple[Card, str, str, dict[str, Any]]:
    """Return card, size and origin of the tensors, and the output type if it differs from the size's.

    Raises `WeightsError` if no model matches, or several do.
    """
    fits, near = [], []
    for card in cards().values():
        for size in card.sizes:
            values = dict(card.sizes[size].overrides)
            for origin, done in iterate_translations(card, values, state):
                near.append((len(done.state), card.name, origin))
                own = card.config(**values)
                if done.unknown or done.faults or any(getattr(own, key) != value for key, value in done.means.items()):
                    continue
                there = {name: t.shape for name, t in done.state.items()}
                for given in list_output_types(card, values):
                    fit = measure_distance(card, {**values, **given}, done, there)
                    if fit:
                        fits.append((*fit, card, size, origin, given))
    if not fits:
        nearby = ", ".join(dict.fromkeys(f"{name} ({origin})" for _, name, origin in sorted(near, reverse=True)))
        raise WeightsError(
            f"{where}: the {len(state)} tensors match no model of this library"
            + (
                f". The closest are {nearby}. Specify one with name=..."
                if nearby
                else f". The first are {', '.join(list(state)[:3])}."
            )
        )
    fewest = min((apart, spare) for apart, spare, *_ in fits)
    best = sorted((fit for fit in fits if fit[:2] == fewest), key=lambda fit: fit[2])
    if len({(card.name, config) for _, _, _, config, card, *_ in best}) > 1:
        raise WeightsError(
            f"{where} could be {' or '.join(dict.fromkeys(fit[5] for fit in best))}, "
            "which have the same tensors but compute differently. Specify one with name=..."
        )
    return best[0][4:]


def list_output_types(card: Card, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of `output_type` that a network allows: first none, then each other output type."""
    if len(card.output_types) == 1:
        return [{}]
    usual = getattr(card.config(**values), "output_type", None)
    return [{}, *({"output_type": given} for given in card.output_types if given != usual)] if usual else [{}]


def measure_distance(
    card: Card, values: Mapping[str, Any], done: TranslatedState, there: Mapping[str, torch.Size]
) -> tuple[int, int, int, Any] | None:
    """Return the distance between tensors under our names and a network, with the config that fits best.

    Counts missing tensors, tensors of other heads, and the fields `FREE` that must differ. None if the tensors
    belong to another network.
    """
    wanted, heads = get_shapes(card, values), get_head_names(card.model)
    apart = [n for n in wanted if n not in there and not n.endswith("num_batches_tracked")]
    spare = there.keys() - wanted.keys()
    if len(apart) > MAX_MISSING_TENSORS or any(name.partition(".")[0] not in heads for name in spare):
        return None
    changes = find_changed_fields(card, values, done.state)
    wanted = get_shapes(card, {**values, **changes}) if changes else wanted
    if any(there.get(name, shape) != shape for name, shape in wanted.items()):
        return None
    return len(apart), len(spare), len(changes), card.config(**{**values, **changes})
