"""Qwen3-MoE: a Qwen3 with many small experts (Yang et al. 2025, arXiv:2505.09388).

New here: 128 experts of a quarter of the usual width per layer, of which each token uses the best eight, where Mixtral has eight
and uses two; the attention is Qwen3's. The weights of the chosen experts add up to one. Experts are balanced over the whole
batch instead of each sequence, so that they can specialize.

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, d width of a head, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.layers.gqa import GroupedAttention
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import llama, mixtral, qwen3


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 151_936
    length: int = 40_960  # maximum sequence length, in tokens
    dim: int = 2048  # D
    depth: int = 48
    heads: int = 32
    kv_heads: int = 4  # number of key/value heads
    width: int = 128  # d
    hidden: int = 768  # hidden width of an expert
    experts: int = 128  # E
    used: int = 8  # experts per token
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding
    balancing: float = 0.001  # weight of the load-balancing loss in training


class Block(llama.Block):
    """The LLaMA block with query and key normalization, and experts instead of the MLP."""

    def make_attention(self, c: Config) -> GroupedAttention:
        return GroupedAttention(c.dim, c.heads, c.kv_heads, c.width, norm=lambda width: RMSNorm(width, c.eps))

    def make_mlp(self, c: Config) -> nn.Module:
        return mixtral.Experts(c)


class Qwen3MoE(mixtral.Mixtral):
    """A decoder that returns the logits of the next token at each position; same interface as `Mixtral`."""

    block = Block


MOE = "model.layers.{i}.mlp."
HUGGINGFACE: dict[str, Row] = (
    {name: row for name, row in qwen3.HUGGINGFACE.items() if ".mlp." not in name}
    | {MOE + "gate.weight": "blocks.{i}.mlp.router.weight"}
    | mixtral.map_experts(*(f"{MOE}experts.{{e}}.{part}_proj.weight" for part in ("gate", "up", "down")))
)


def read_experts(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of experts, which transformers 5 writes under Mixtral's key."""
    found = theirs.get("num_experts") or theirs.get("num_local_experts")
    return {"experts": found} if found else {}


def check_dense_layers(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` if some layers have one MLP instead of experts."""
    if layers := theirs.get("mlp_only_layers"):
        raise WeightsError(f"mlp_only_layers={layers!r} is not supported: all layers must have experts.")
    return {}


CONFIG = {
    "model_type": Expect("qwen3_moe"),
    "architectures": Expect(["Qwen3MoeForCausalLM"]),
    **{key: row for key, row in llama.SHARED.items() if key != "intermediate_size"},
    "head_dim": "width",
    "moe_intermediate_size": "hidden",
    "num_experts": Derived(read_experts, lambda c: c.experts),
    "num_experts_per_tok": "used",
    "norm_topk_prob": Expect(True, absent=False),
    "decoder_sparse_step": Expect(1),
    "mlp_only_layers": Derived(check_dense_layers, lambda c: []),
    "router_aux_loss_coef": WithDefault("balancing", 0.001),
    "attention_bias": Expect(False),
    "use_sliding_window": Expect(False),
}

CARD = Card(
    name="qwen3-moe",
    model=Qwen3MoE,
    config=Config,
    paper="arXiv:2505.09388",
    year=2025,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "qwen3-30b-a3b": Size(params=30_532_122_624, source="Qwen/Qwen3-30B-A3B"),
        "qwen3-235b-a22b": Size(
            dim=4096, depth=94, heads=64, hidden=1536, params=235_093_634_560, source="Qwen/Qwen3-235B-A22B"
        ),
        "qwen3-moe-test": Size(
            vocab_size=30, length=12, dim=8, depth=2, heads=2, kv_heads=1, width=6, hidden=6, experts=4, used=2
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
