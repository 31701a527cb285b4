"""Networks of latent diffusion at reduced sizes: sampling steps and training steps, against diffusers with the same weights.

    python benchmarks/latent_diffusion.py [--only flux] [--rounds 5] [--save]

Both sides run in the same plain loop: what differs is the network. A sampling step is one call of the network without gradients; for the
autoencoder, it is encoding and decoding. A training step is the mean squared error against noise, its gradients, and a fused AdamW step,
in float32. Networks have their published layout with less width and depth, so that each fits on a small machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, run_inference, run_plain_steps
from torch import Tensor, nn

from cases import CASES
from fieldguide import create
from fieldguide.models.registry import find

TOKENS = 77  # of a text


@dataclass(frozen=True)
class Reduced:
    """A published size with changes that make it smaller, and the rows of a batch."""

    size: str
    rows: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return find(self.size)[0].name

    def build(self) -> nn.Module:
        return create(self.size, **self.changes)

    def build_peer(self, model: nn.Module | None = None) -> nn.Module:
        """Return the network of diffusers, with the weights of `model` if it is given."""
        with torch.device("meta"):
            shape = self.build()
        peer, rename = CASES[self.name].peer(shape)
        if model is not None:
            peer.load_state_dict(rename(model.state_dict()))
        return peer

    def make_inputs(self) -> tuple[Tensor, ...]:
        """Return noisy latents with times and texts, or images for an autoencoder."""
        torch.manual_seed(0)
        with torch.device("meta"):
            config = self.build().config
        found = CASES[self.name].inputs(config, self.rows)
        return tuple(torch.randn(self.rows, TOKENS, x.shape[2]) if x.ndim == 3 else x for x in found)

    def run_step(self, model: nn.Module) -> Run:
        inputs = self.make_inputs()
        return run_inference(model, lambda: model(*inputs))

    def run_training(self, model: nn.Module) -> Run:
        inputs = self.make_inputs()
        with torch.no_grad():
            target = torch.randn_like(model(*inputs))
        return run_plain_steps(model, lambda batch: F.mse_loss(model(*batch), target), [inputs], fused=True, **LIKE)

    def pairs(self) -> list[Pair]:
        return [
            Pair(
                f"{self.size}, sampling step",
                lambda: self.run_step(self.build()),
                lambda: self.run_step(self.build_peer()),
                self.rows,
            ),
            Pair(
                f"{self.size}, training step",
                lambda: self.run_training(self.build()),
                lambda: self.run_training(self.build_peer()),
                self.rows,
            ),
        ]

    def check(self) -> str:
        """Return a sentence about the difference of both outputs with the same weights, which are noisy: zeros would hide differences."""
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        peer, inputs = self.build_peer(model).eval(), self.make_inputs()
        with torch.inference_mode():
            return f"{self.size} with {self.changes}: {describe_sizes(model, peer)} {check_equal('outputs', model(*inputs), peer(*inputs))}"


TRANSFORMER = {"dim": 384, "heads": 6}
NETWORKS = (
    Reduced("sd1-unet", 2, {"dim": 64, "image": 32}),
    Reduced("sdxl-base-unet", 2, {"dim": 64, "heads": (1, 2, 4), "image": 32}),
    Reduced("sd3-medium", 2, {**TRANSFORMER, "depth": 6, "image": 32, "largest": 32, "text_dim": 1024}),
    Reduced("flux1-dev", 2, {**TRANSFORMER, "depth": 3, "single": 6, "axes": (8, 28, 28), "image": 32, "text_dim": 1024}),
    Reduced("pixart-xl2-1024", 2, {**TRANSFORMER, "depth": 8, "image": 32, "text_dim": 1024}),
    Reduced("dit-s2", 2, {"depth": 6}),
    Reduced("sd-vae", 1, {"dim": 32, "image": 128}),
)


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2, rounds=5))
    torch.manual_seed(0)
    chosen = [network for network in NETWORKS if any(options.only in pair.what for pair in network.pairs())]
    compare(
        "Networks of latent diffusion, reduced, float32",
        "images",
        "diffusers",
        [pair for network in chosen for pair in network.pairs()],
        options,
        lambda: "\n".join(network.check() for network in chosen),
    )


if __name__ == "__main__":
    main()
