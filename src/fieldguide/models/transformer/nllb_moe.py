"""NLLB-MoE: NLLB with 128 experts in every fourth layer (NLLB Team 2022, arXiv:2207.04672).

New here: more capacity, so that high-resource languages do not crowd out low-resource ones: a router selects the two
highest-scoring experts for each token and weights their outputs by a softmax over the two scores (section 6.2;
GShard: Lepikhin et al. 2020, arXiv:2006.16668). Against overfitting on low-resource languages, the output of the
experts is dropped for some tokens in training. No expert capacity limit is used: the paper's limit only saves memory.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width, N tokens of all sequences, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.moe_balance import load_balancing_loss
from fieldguide.models.mapping.config_rules import Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import bart, nllb
from fieldguide.models.transformer._shared.encoder_decoder import FeedForward


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_206
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 2048  # D
    depth: int = 24  # number of encoder layers
    decoder_depth: int = 24
    heads: int = 16
    hidden: int = 8192  # hidden width of the MLPs
    experts: int = 128  # E
    every: int = 4  # every n-th layer has experts
    masking: float = 0.2  # fraction of tokens without expert output in training
    dropout: float = 0.1
    attn_dropout: float = 0.1  # dropout of the attention weights
    mlp_dropout: float = 0.0  # dropout inside the MLPs
    begin: int = 2  # ID of the first decoder token, before the language token
    end: int = 2
    pad: int = 1
    balancing: float = 0.01  # weight of the load-balancing loss in training


class Experts(nn.Module):
    """A sparse mixture of MLPs, two per token. `scores` keeps the router logits of the last training pass, N E."""

    def __init__(self, c: Config):
        super().__init__()
        if c.experts < 2:
            raise SettingsError(f"experts={c.experts} must be at least 2, because each token uses two experts.")
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
        if x.is_meta:  # routing depends on values, the amount of work does not
            return sum((expert(flat) for expert in self.experts[:2]), out).view_as(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out = out.index_add(0, token, (expert(flat[token]) * share[token, rank, None]).to(out.dtype))
        if self.masking:  # evaluation scales by the expected fraction kept in training
            kept = torch.rand(out.shape[0], 1, device=x.device) >= self.masking if self.training else 1 - self.masking
            out = out * kept
        return out.view_as(x)


class NLLBMoE(nllb.NLLB):
    """An encoder-decoder that returns the logits of the next target token at each position; same interface as `Bart`.
    See `auxiliary_losses` for the load-balancing loss.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.real: dict[str, Tensor | None] = {}  # side -> mask of real tokens in the last training pass

    def make_mlp(self, layer: int) -> nn.Module:
        """Return the experts or the MLP of this layer."""
        return Experts(self.config) if (layer + 1) % self.config.every == 0 else super().make_mlp(layer)

    def embed_tokens(self, tokens: Tensor, mask: Tensor | None, *parts: Any) -> Tensor:  # B T -> B T D
        """Return the embedded tokens, with zeros for padding, which the experts process like other tokens."""
        x = super().embed_tokens(tokens, mask, *parts)
        return x if mask is None else x * mask[..., None]

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        self.real = {"encoder": mask} if self.training else {}
        return super().encode(source, mask)

    def decode(self, tokens: Tensor, mask: Tensor | None, *parts: Any) -> Tensor:  # B T, B T bool -> B T D
        self.real = {**self.real, "decoder": mask} if self.training else {}
        return super().decode(tokens, mask, *parts)

    def balance(self) -> Tensor:
        """Return the load-balancing loss of the last training pass, the mean over layers, for the best expert of each
        token; 1 for a uniform load (equation 11).
        """
        real = {side: None if mask is None else mask.flatten() for side, mask in self.real.items()}
        return torch.stack(
            [
                load_balancing_loss(block.mlp.scores, 1, real.get(side))
                for side in ("encoder", "decoder")
                for block in getattr(self, side)
                if isinstance(block.mlp, Experts) and block.mlp.scores is not None
            ]
        ).mean()

    def auxiliary_losses(self) -> dict[str, tuple[Tensor, float]]:
        """Return the additional losses of the last training pass and their weights."""
        return {"balance_loss": (self.balance(), self.config.balancing)} if self.config.balancing else {}


def huggingface(c: Any) -> dict[str, Row]:
    """Return the weight names of transformers, some of which differ from those of its NLLB."""
    names = nllb.map_embeddings() | bart.map_layers("model.", "cross_attention", "ffn.", "ff_layer_norm")
    for side in ("encoder", "decoder"):
        theirs, ours = f"model.{side}.layers.{{i}}.ffn.", f"{side}.{{i}}.mlp."
        names |= {
            f"{theirs}router.classifier.weight": ours + "router.weight",
            f"{theirs}experts.expert_{{e}}.fc1.*": ours + "experts.{e}.up.*",
            f"{theirs}experts.expert_{{e}}.fc2.*": ours + "experts.{e}.down.*",
        }
    return names


CONFIG = bart.map_config("nllb-moe", "NllbMoeForConditionalGeneration", "relu", scaled=True) | {
    "num_experts": "experts",
    "encoder_sparse_step": "every",
    "decoder_sparse_step": Expect(lambda c: c.every),
    "moe_token_dropout": "masking",
    "router_bias": Expect(False),
    "router_aux_loss_coef": WithDefault("balancing", 0.001),
    "second_expert_policy": Expect("all"),
    "moe_eval_capacity_token_fraction": Expect(1.0),
    "normalize_router_prob_before_dropping": Derived(lambda t: {}, lambda c: False),  # has no effect without a capacity limit
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
        # Small sizes for training from scratch.
        "nllb-moe-mini": Size(vocab_size=8192, **bart.stack_shape(4, 256, 4, 512), experts=8, every=2, attn_dropout=0.0),
        "nllb-moe-test": Size(**bart.TEST, experts=4, every=2, masking=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=bart.RECIPE,
)
