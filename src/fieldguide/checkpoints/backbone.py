"""Checkpoints of classifiers as the backbone of a network that describes images with their features."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.models.registry import cards

COMPONENTS = 256  # of the features of a backbone; more add little


def use_as_backbone(checkpoint: Checkpoint, output_types: Collection[str]) -> Checkpoint:
    """Return the checkpoint of a network with one of these outputs whose backbone is the given checkpoint.

    It is returned as it is if it has such an output itself, or if no network can use it: it needs feature maps (`levels`).
    """
    card = checkpoint.card
    if set(card.output_types) & set(output_types):
        return checkpoint
    config = card.config(**checkpoint.values)
    for other in cards().values():
        fits = other.fits_network and other.accepts("backbone") and other.input_type == card.input_type
        if not fits or not set(other.output_types) & set(output_types) or not hasattr(card.model, "levels"):
            continue
        state = weights.read_ours(card.make(config), checkpoint.state, checkpoint.origin)
        values = {
            "backbone": card.name,
            "values": tuple(asdict(config).items()),
            "channels": checkpoint.channels,
            "dims": COMPONENTS,
        }
        return Checkpoint(
            checkpoint.path, other, weights.OURS, values, {f"backbone.{name}": tensor for name, tensor in state.items()}
        )
    return checkpoint
