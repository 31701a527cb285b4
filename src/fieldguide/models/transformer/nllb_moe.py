"""NLLB-MoE: 128 experts in every fourth layer, two serve each token (NLLB Team 2022, arXiv:2207.04672).

New here: languages with much data no longer crowd out those with little, as each token asks two of many networks, those
that a router scores highest, weighed by a softmax over the two (section 6.2; GShard: Lepikhin et al. 2020,
arXiv:2006.16668). So that small languages do not learn their experts by heart, the experts' answer is kept from some tokens
while it learns. No token is turned away here where an expert has many: the paper's limit only spares memory.

Initialisation: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width, N tokens of all rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.moe_balance import unevenness
from fieldguide.models.mapping.config_rules import Absent, Derived, Is
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import bart, nllb
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_206
    length: int = 1024  # longest row, tokens
    dim: int = 2048  # D
    depth: int = 24  # layers of the encoder
    decoder_depth: int = 24
    heads: int = 16
    hidden: int = 8192  # width inside the two-layer networks
    experts: int = 128  # E
    every: int = 4  # one of so many layers has experts, the last of each group
    masking: float = 0.2  # part of the tokens from which the experts' answer is kept in training
    dropout: float = 0.1
    attn_dropout: float = 0.1  # of attention weights
    mlp_dropout: float = 0.0  # inside the two-layer networks
    begin: int = 2  # the token that answers begin with, before their language
    end: int = 2
    pad: int = 1
    balancing: float = 0.01  # of the loss: what an uneven load of the experts counts in training


class Experts(nn.Module):
    """Two-layer networks, of which each token asks two. `scores` keeps the router's logits of the last training pass, N E."""

    def __init__(self, c: Config):
        super().__init__()
        if c.experts < 2:
            raise SettingsError(f"experts={c.experts}: each token asks two, so there must be two or more")
        self.masking = c.masking
        self.router = nn.Linear(c.dim, c.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(c.dim, c.hidden, F.relu, c.mlp_dropout) for _ in range(c.experts))
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        flat = x.flatten(0, 1)
        scores = self.router(flat)
        self.scores = scores if self.training else None
        best, chosen = scores.to(torch.promote_types(x.dtype, torch.float32)).topk(2, 1)
        share = best.softmax(1).to(x.dtype)
        out = torch.zeros_like(flat)
        if x.is_meta:  # who is served by whom depends on numbers, the work does not
            return sum((expert(flat) for expert in self.experts[:2]), out).view_as(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out = out.index_add(0, token, (expert(flat[token]) * share[token, rank, None]).to(out.dtype))
        if self.masking:  # what is kept in training on the average, when it is asked
            kept = torch.rand(out.shape[0], 1, device=x.device) >= self.masking if self.training else 1 - self.masking
            out = out * kept
        return out.view_as(x)


class NLLBMoE(nllb.NLLB):
    """Source and what is said so far -> logits of the token that follows each of the latter; used as BART is. Training adds
    `asides` to the loss."""

    real: ClassVar[dict[str, Tensor | None]] = {}  # tokens of a side in the last training pass that are no padding

    def network(self, layer: int) -> nn.Module:
        return Experts(self.config) if (layer + 1) % self.config.every == 0 else super().network(layer)

    def read(self, tokens: Tensor, mask: Tensor | None, *parts: Any) -> Tensor:  # B T -> B T D
        """Padding is zeros, whatever stands there: experts serve it among the rest."""
        x = super().read(tokens, mask, *parts)
        return x if mask is None else x * mask[..., None]

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        self.real = {"encoder": mask} if self.training else {}
        return super().encode(source, mask)

    def decode(self, tokens: Tensor, mask: Tensor | None, *parts: Any) -> Tensor:  # B T, B T bool -> B T D
        self.real = {**self.real, "decoder": mask} if self.training else {}
        return super().decode(tokens, mask, *parts)

    def balance(self) -> Tensor:
        """How uneven the load of the last training pass was, mean over layers, by the expert that each token likes best; 1
        where all are even (equation 11)."""
        real = {side: None if mask is None else mask.flatten() for side, mask in self.real.items()}
        return torch.stack(
            [
                unevenness(block.mlp.scores, 1, real.get(side))
                for side in ("encoder", "decoder")
                for block in getattr(self, side)
                if isinstance(block.mlp, Experts)
            ]
        ).mean()

    def auxiliary_losses(self) -> dict[str, tuple[Tensor, float]]:
        """What the last training pass adds to the loss, and how much each counts."""
        return {"balance_loss": (self.balance(), self.config.balancing)} if self.config.balancing else {}


def huggingface(c: Any) -> dict[str, Row]:
    """Names in files of transformers, which calls some layers otherwise here than in its NLLB."""
    names = nllb.tables() | bart.layers("model.", "cross_attention", "ffn.", "ff_layer_norm")
    for side in ("encoder", "decoder"):
        theirs, ours = f"model.{side}.layers.{{i}}.ffn.", f"{side}.{{i}}.mlp."
        names |= {
            f"{theirs}router.classifier.weight": ours + "router.weight",
            f"{theirs}experts.expert_{{e}}.fc1.*": ours + "experts.{e}.up.*",
            f"{theirs}experts.expert_{{e}}.fc2.*": ours + "experts.{e}.down.*",
        }
    return names


CONFIG = bart.config("nllb-moe", "NllbMoeForConditionalGeneration", "relu", scaled=True) | {
    "num_experts": "experts",
    "encoder_sparse_step": "every",
    "decoder_sparse_step": Is(lambda c: c.every),
    "moe_token_dropout": "masking",
    "router_bias": Is(False),
    "router_aux_loss_coef": Absent("balancing", 0.001),
    "second_expert_policy": Is("all"),
    "moe_eval_capacity_token_fraction": Is(1.0),
    "normalize_router_prob_before_dropping": Derived(lambda t: {}, lambda c: False),  # the same where none are dropped
}

CARD = Card(
    name="nllb-moe",
    model=NLLBMoE,
    config=Config,
    paper="arXiv:2207.04672",
    year=2022,
    input_type="pair",
    output_type="tokens",
    sizes={
        "nllb-moe-54b": Size(params=54_500_569_088, source="facebook/nllb-moe-54b"),
        # Of the same form, to be trained from nothing.
        "nllb-moe-mini": Size(vocab_size=8192, **bart.stacks(4, 256, 4, 512), experts=8, every=2, attn_dropout=0.0),
        "nllb-moe-test": Size(**bart.TEST, experts=4, every=2, masking=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=bart.RECIPE,
)
