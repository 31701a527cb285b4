"""gpt-oss: an open mixture of experts with attention sinks (OpenAI 2025, arXiv:2508.10925).

New here: each head has a learned sink, a score that takes part in the softmax without a value, so that a head may attend to
nothing. Layers with a window of 128 tokens alternate with layers without. The MLPs of the experts have biases; their gates are
limited from above and their other inputs from both sides, and one is added to the latter. Experts are published in 4-bit floats
(MXFP4). YaRN extends the 4,096 tokens of the first training.

Initialization: N(0, 0.02), zero biases and sinks.
Shapes: B batch, T tokens, K tokens seen so far, D width, d width of a head, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.dot_product_attention import attend_groups
from fieldguide.models.layers.gqa import CosSin, GroupedAttention, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.layers.rope_scaling import get_yarn_factor
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Row, Stacked
from fieldguide.models.transformer import gemma2, llama, mixtral
from fieldguide.models.transformer._shared.yarn import read_yarn, write_yarn, yarn_frequencies


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 201_088
    length: int = 131_072  # maximum sequence length, in tokens
    dim: int = 2880  # D
    depth: int = 24
    heads: int = 64
    kv_heads: int = 8  # number of key/value heads
    width: int = 64  # d
    hidden: int = 2880  # hidden width of an expert
    experts: int = 32  # E
    used: int = 4  # experts per token
    window: int = 128  # attention window of every other layer, including the token itself
    limit: float = 7.0  # of the inputs of the gated activation
    rope_theta: float = 150_000.0  # base of the rotary wavelengths
    rope_factor: float = 32.0  # YaRN: growth of the sequences after the first training; 1 = no scaling
    rope_fast: float = 32.0  # YaRN: more rotations than this within `rope_length` are kept
    rope_slow: float = 1.0  # YaRN: fewer are divided by `rope_factor`
    rope_length: int = 4096  # length of the first training, in tokens
    eps: float = 1e-5
    tie_embeddings: bool = False  # the output head shares the weights of the embedding
    balancing: float = 0.02  # weight of the load-balancing loss in training


class Attention(GroupedAttention):
    """Grouped-query attention with biases and a sink for each head, which torch's fused attention does not support."""

    def __init__(self, c: Config):
        super().__init__(c.dim, c.heads, c.kv_heads, c.width, bias=True)
        self.proj = nn.Linear(c.heads * c.width, c.dim)
        self.sinks = nn.Parameter(torch.zeros(c.heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:  # B heads T d, B groups K d -> B T D
        """Return the attention output, heads concatenated."""
        return attend_groups(q * self.width**-0.5, k, v, seen, self.weigh, is_causal=True)

    def weigh(self, scores: Tensor, seen: Tensor | None) -> Tensor:  # B groups heads/groups T K -> the same
        """Return the weights of the keys: a softmax in which the sink takes part."""
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        sinks = self.sinks.view(self.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        whole = torch.promote_types(scores.dtype, torch.float32)
        return torch.cat([scores, sinks], -1).softmax(-1, dtype=whole)[..., :-1].to(scores.dtype)


class Expert(nn.Module):
    """A gated MLP with biases and limited inputs; inputs of the gate and the other ones alternate."""

    def __init__(self, c: Config):
        super().__init__()
        self.up, self.down, self.limit = nn.Linear(c.dim, 2 * c.hidden), nn.Linear(c.hidden, c.dim), c.limit

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        gate, x = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        gate, x = gate.clamp(max=self.limit), x.clamp(-self.limit, self.limit)
        return self.down(gate * torch.sigmoid(1.702 * gate) * (x + 1))  # the constant approximates GELU by a sigmoid


class Experts(mixtral.Experts):
    """The experts of Mixtral with biases, also of the router."""

    def make_router(self, c: Any) -> nn.Linear:
        return nn.Linear(c.dim, c.experts)

    def make_expert(self, c: Any) -> nn.Module:
        return Expert(c)


class Block(llama.Block):
    """The LLaMA block with attention sinks and experts."""

    def make_attention(self, c: Config) -> Attention:
        return Attention(c)

    def make_mlp(self, c: Config) -> Experts:
        return Experts(c)


class GptOss(mixtral.Mixtral):
    """A decoder that returns the logits of the next token at each position; same interface as `Mixtral`."""

    block = Block

    def mask_layers(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer: with and without the window in turn."""
        kinds = causal_mask(steps, mask, cache, device, self.config.window), causal_mask(steps, mask, cache, device)
        return [kinds[layer % 2] for layer in range(self.config.depth)]

    def make_turn(self, places: Tensor, cache: Cache | None, like: Tensor) -> CosSin:  # T or B T -> (B 1) T d, twice
        """Return the cosines and sines of the rotary angles at the positions of the new tokens."""
        c = self.config
        speed = yarn_frequencies(c, c.width, like.device, truncate=False)
        return cos_sin_at(places, speed, like, get_yarn_factor(c.rope_factor))


LAYER, OURS = "model.layers.{i}.", "blocks.{i}."
ATTENTION: dict[str, Row] = {
    LAYER + "self_attn.q_proj.*": OURS + "attn.q.*",
    LAYER + "self_attn.k_proj.*": Fused(OURS + "attn.kv.*", 0, 2),
    LAYER + "self_attn.v_proj.*": Fused(OURS + "attn.kv.*", 1, 2),
    LAYER + "self_attn.o_proj.*": OURS + "attn.proj.*",
    LAYER + "self_attn.sinks": OURS + "attn.sinks",
}
EXPERTS: dict[str, Row] = {
    LAYER + "mlp.router.*": OURS + "mlp.router.*",
    LAYER + "mlp.experts.gate_up_proj": Stacked(OURS + "mlp.experts.{e}.up.weight", "e", transposed=True),
    LAYER + "mlp.experts.gate_up_proj_bias": Stacked(OURS + "mlp.experts.{e}.up.bias", "e"),
    LAYER + "mlp.experts.down_proj": Stacked(OURS + "mlp.experts.{e}.down.weight", "e", transposed=True),
    LAYER + "mlp.experts.down_proj_bias": Stacked(OURS + "mlp.experts.{e}.down.bias", "e"),
}
HUGGINGFACE = {name: row for name, row in llama.NAMES.items() if "self_attn" not in name} | ATTENTION | EXPERTS
CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("gpt_oss"),
    "architectures": Expect(["GptOssForCausalLM"]),
    **llama.SHARED,
    "head_dim": "width",
    "num_local_experts": "experts",
    "num_experts_per_tok": "used",
    "sliding_window": "window",
    "layer_types": Derived(gemma2.check_layer_types, lambda c: gemma2.layer_types(c.depth)),
    "swiglu_limit": WithDefault("limit", 7.0),
    "swiglu_alpha": Expect(1.702),
    "rope_parameters": Derived(read_yarn, lambda c: write_yarn(c, truncate=False)),
    "attention_bias": Expect(True),
    "router_aux_loss_coef": WithDefault("balancing", 0.001),
}

CARD = Card(
    name="gpt-oss",
    model=GptOss,
    config=Config,
    paper="arXiv:2508.10925",
    year=2025,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gpt-oss-20b": Size(params=20_914_757_184, source="openai/gpt-oss-20b"),
        "gpt-oss-120b": Size(depth=36, experts=128, params=116_829_156_672, source="openai/gpt-oss-120b"),
        "gpt-oss-test": Size(
            vocab_size=30,
            length=24,
            dim=12,
            depth=3,
            heads=4,
            kv_heads=2,
            width=6,
            hidden=7,
            experts=4,
            used=2,
            window=4,
            limit=0.5,
            rope_theta=50.0,
            rope_factor=4.0,
            rope_fast=0.8,
            rope_slow=0.2,
            rope_length=6,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
