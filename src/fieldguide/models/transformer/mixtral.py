"""Mixtral: a sparse mixture of eight experts per layer (Jiang et al. 2024, arXiv:2401.04088).

New here: a router selects the two highest-scoring experts for every token and weights their outputs by a softmax over
the two scores, so the model has many more parameters than one token uses. To keep all experts in use, training adds a
load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, N = B T, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.gqa import GatedMlp
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.moe_balance import load_balancing_loss
from fieldguide.models.mapping.config_rules import Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_000
    length: int = 32_768  # maximum sequence length, in tokens
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 8  # number of key/value heads
    hidden: int = 14_336  # hidden width of an expert
    experts: int = 8  # E
    used: int = 2  # experts per token
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-5
    tie_embeddings: bool = False  # the output head shares the weights of the embedding
    balancing: float = 0.02  # weight of the load-balancing loss in training


class Experts(nn.Module):
    """A sparse mixture of gated MLPs. `scores` keeps the router logits of the last training pass, N E.

    Subclasses may replace `make_router`, `make_expert`, `score` and `route`.
    """

    def __init__(self, c: Any):
        super().__init__()
        if not 0 < c.used <= c.experts:
            raise SettingsError(f"used={c.used} must be between 1 and experts={c.experts}.")
        self.used = c.used
        self.router = self.make_router(c)
        self.experts = nn.ModuleList(self.make_expert(c) for _ in range(c.experts))
        self.scores: Tensor | None = None

    def make_router(self, c: Any) -> nn.Linear:
        """Return the layer that scores the experts."""
        return nn.Linear(c.dim, c.experts, bias=False)

    def make_expert(self, c: Any) -> nn.Module:
        """Return one expert."""
        return GatedMlp(c.dim, c.hidden)

    def score(self, x: Tensor) -> Tensor:  # N D -> N E
        """Return the logits of the experts."""
        return self.router(x)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:  # N E -> N used, N used
        """Return the weights and the numbers of the experts that each token uses."""
        # Equals a softmax over all experts, restricted to the chosen ones and renormalized.
        best, chosen = scores.topk(self.used, 1)
        return best.softmax(1), chosen

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        flat = x.flatten(0, 1)
        scores = self.score(flat)
        self.scores = scores if self.training else None
        share, chosen = self.route(scores.to(torch.promote_types(x.dtype, torch.float32)))
        share = share.to(x.dtype)
        out = torch.zeros_like(flat)
        if x.is_meta:  # routing depends on values, the amount of work does not
            return sum((expert(flat) for expert in self.experts[: self.used]), out).view_as(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out = out.index_add(0, token, expert(flat[token]) * share[token, rank, None])
        return out.view_as(x)


class Block(llama.Block):
    """The LLaMA block with experts instead of the MLP."""

    def make_mlp(self, c: Config) -> nn.Module:
        return Experts(c)


class Mixtral(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`. See
    `auxiliary_losses` for the load-balancing loss.
    """

    block: type[nn.Module] = Block
    real: Tensor | None = None  # B T, real tokens of the last training pass

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        self.real = mask if self.training else None
        return super().features(tokens, mask, cache)

    def balance(self) -> Tensor:
        """Return the load-balancing loss of the last training pass over all layers; `used` for a uniform load."""
        experts = [module for module in self.modules() if isinstance(module, Experts)]
        scores = torch.cat([layer.scores for layer in experts if layer.scores is not None])
        return load_balancing_loss(
            scores, self.config.used, None if self.real is None else self.real.flatten().repeat(len(self.blocks))
        )

    def auxiliary_losses(self) -> dict[str, tuple[Tensor, float]]:
        """Return the additional losses of the last training pass and their weights."""
        return {"balance_loss": (self.balance(), self.config.balancing)} if self.config.balancing else {}


def map_experts(gate: str, up: str, down: str) -> dict[str, Row]:
    """Return the weight names of the experts."""
    return {
        gate: Fused("blocks.{i}.mlp.experts.{e}.up.weight", 0, 2),
        up: Fused("blocks.{i}.mlp.experts.{e}.up.weight", 1, 2),
        down: "blocks.{i}.mlp.experts.{e}.down.weight",
    }


MOE = "model.layers.{i}.block_sparse_moe."
HUGGINGFACE = (
    llama.NAMES
    | {MOE + "gate.weight": "blocks.{i}.mlp.router.weight"}
    | map_experts(*(f"{MOE}experts.{{e}}.w{k}.weight" for k in (1, 3, 2)))
)
CONFIG = {
    "model_type": Expect("mixtral"),
    "architectures": Expect(["MixtralForCausalLM"]),
    **llama.SHARED,
    "num_local_experts": "experts",
    "num_experts_per_tok": "used",
    "sliding_window": Expect(None),
    "router_aux_loss_coef": WithDefault("balancing", 0.001),
}

CARD = Card(
    name="mixtral",
    model=Mixtral,
    config=Config,
    paper="arXiv:2401.04088",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "mixtral-8x7b": Size(params=46_702_792_704, source="mistralai/Mixtral-8x7B-v0.1"),
        "mixtral-8x22b": Size(
            length=65_536,
            dim=6144,
            depth=56,
            heads=48,
            hidden=16_384,
            params=140_620_634_112,
            source="mistralai/Mixtral-8x22B-v0.1",
        ),
        "mixtral-test": Size(vocab_size=30, length=12, dim=8, depth=2, heads=2, kv_heads=1, hidden=6, experts=4),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
