"""DeepSeek-V3: a large mixture of experts with a compressed cache (DeepSeek-AI 2024, arXiv:2412.19437).

New here: in multi-head latent attention (MLA, from DeepSeek-V2, arXiv:2405.04434), keys and values of all heads are computed from
one latent vector per token, and only that vector and one rotated key are cached. Of 256 small experts a token uses eight, from
the four best of eight groups, and one more expert that all tokens share. The router's scores are sigmoids. Experts are balanced
without a large additional loss: a bias of each expert, which only influences the choice, grows while the expert is used too little.

Initialization: N(0, 0.02), biases of experts 0. The published network has 0.006.
Shapes: B batch, T tokens, K tokens seen so far, D width, R width of the latent vector, d width of a head without positions, r
width of its rotated part, v width of its values, N = B T, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.gqa import CosSin, GatedMlp, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.layers.rope import rotate
from fieldguide.models.layers.rope_scaling import get_yarn_factor
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import llama, mixtral
from fieldguide.models.transformer._shared.yarn import get_rope, read_yarn, write_yarn, yarn_frequencies


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 129_280
    length: int = 163_840  # maximum sequence length, in tokens
    dim: int = 7168  # D
    depth: int = 61
    heads: int = 128
    q_rank: int = 1536  # width of the latent vector of queries; 0 = none
    kv_rank: int = 512  # R
    width: int = 128  # d
    rope_width: int = 64  # r
    value_width: int = 128  # v
    hidden: int = 18_432  # hidden width of the MLPs of the first layers
    dense_layers: int = 3  # first layers without experts
    expert_hidden: int = 2048  # hidden width of an expert
    experts: int = 256  # E
    used: int = 8  # experts per token
    shared: int = 1  # experts that all tokens use
    expert_groups: int = 8
    used_groups: int = 4  # groups whose experts a token may use
    route_scale: float = 2.5  # factor of the weights of the chosen experts, which add up to one before
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_factor: float = 40.0  # YaRN: growth of the sequences after the first training; 1 = no scaling
    rope_fast: float = 32.0  # YaRN: more rotations than this within `rope_length` are kept
    rope_slow: float = 1.0  # YaRN: fewer are divided by `rope_factor`
    rope_length: int = 4096  # length of the first training, in tokens
    rope_scale: float = 1.0  # factor of rotated queries and keys
    mscale: float = 1.0  # YaRN: weight of the factor of all scores; 0 = none
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding
    bias_speed: float = 0.001  # by how much a training step changes the biases of experts
    balancing: float = 0.0001  # weight of the load-balancing loss of each sequence in training


class LatentAttention(nn.Module):
    """Causal multi-head latent attention. `turn` holds the cosines and sines for the positions of the new tokens; `seen` is the
    mask returned by `causal_mask`. The cache holds the latent vectors as keys and the rotated keys as values, of one head each.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_rank = c.heads, c.kv_rank
        self.width, self.rope_width, self.value_width = c.width, c.rope_width, c.value_width
        self.scale = (c.width + c.rope_width) ** -0.5 * get_yarn_factor(c.rope_factor, c.mscale) ** 2
        queries = c.heads * (c.width + c.rope_width)
        self.q_down = nn.Linear(c.dim, c.q_rank, bias=False) if c.q_rank else None
        self.q_norm = RMSNorm(c.q_rank, 1e-6) if c.q_rank else None
        self.q_up = nn.Linear(c.q_rank or c.dim, queries, bias=False)
        self.kv_down = nn.Linear(c.dim, c.kv_rank + c.rope_width, bias=False)
        self.kv_norm = RMSNorm(c.kv_rank, 1e-6)
        self.kv_up = nn.Linear(c.kv_rank, c.heads * (c.width + c.value_width), bias=False)
        self.proj = nn.Linear(c.heads * c.value_width, c.dim, bias=False)

    def forward(
        self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # B T D -> B T D
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_up(q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads T d+r
        q, q_turned = q.split([self.width, self.rope_width], -1)
        latent, key = self.kv_down(x)[:, None].split([self.kv_rank, self.rope_width], -1)
        latent = self.kv_norm(latent)  # B 1 T R
        q_turned, key = rotate(split_pairs(q_turned), *turn), rotate(split_pairs(key), *turn)  # B heads T r, B 1 T r
        if cache is None:
            return self.proj(self.attend(q, q_turned, latent, key, seen))
        latent, key = cache.update(layer, latent, key)  # B 1 K R, B 1 K r
        attend = self.attend_latents if q.shape[2] == 1 else self.attend
        return self.proj(attend(q, q_turned, latent, key, seen))

    def attend(self, q: Tensor, q_turned: Tensor, latent: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:  # -> B T heads*v
        """Return the attention output, from the keys and values of all heads."""
        kv = self.kv_up(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads K d+v
        k, v = kv.split([self.width, self.value_width], -1)
        q, k = torch.cat([q, q_turned], -1), torch.cat([k, key.expand(-1, self.heads, -1, -1)], -1)
        whole = seen is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
        return dot_product_attention(q, k, v, seen, is_causal=whole, scale=self.scale).transpose(1, 2).flatten(2)

    def attend_latents(
        self, q: Tensor, q_turned: Tensor, latent: Tensor, key: Tensor, seen: Tensor | None
    ) -> Tensor:  # -> B 1 heads*v
        """Return the same for one new token, without computing keys and values of the tokens before it: `kv_up` is applied to
        the query and to the output instead.
        """
        up_k, up_v = self.kv_up.weight.unflatten(0, (self.heads, -1)).split([self.width, self.value_width], 1)
        scores = ((q @ up_k) @ latent.mT + q_turned @ key.mT) * self.scale  # B heads 1 K
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        share = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return ((share @ latent) @ up_v.mT).transpose(1, 2).flatten(2)


def split_pairs(x: Tensor) -> Tensor:  # ... r -> ... r
    """Return the first elements of all pairs, then the second ones: rotary pairs are adjacent in the public weights."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class Experts(mixtral.Experts):
    """Experts of which a token uses those with the highest scores in the best groups, and one that all tokens use."""

    def __init__(self, c: Config):
        super().__init__(c)
        if c.experts % c.expert_groups or c.experts < 2 * c.expert_groups:
            raise SettingsError(f"experts={c.experts} must be a multiple, at least twice, of expert_groups={c.expert_groups}.")
        if not c.used <= c.used_groups * c.experts // c.expert_groups:
            raise SettingsError(f"used={c.used} experts exceed those of used_groups={c.used_groups} groups.")
        self.groups, self.used_groups, self.route_scale = c.expert_groups, c.used_groups, c.route_scale
        self.shared = GatedMlp(c.dim, c.shared * c.expert_hidden)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(c.experts))

    def make_expert(self, c: Any) -> nn.Module:
        return GatedMlp(c.dim, c.expert_hidden)

    def score(self, x: Tensor) -> Tensor:  # N D -> N E
        """Return the logits of the experts, in float32 under autocast, too: rounding would change the choice."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            whole = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(whole), self.router.weight.to(whole))

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:  # N E -> N used, N used
        share = scores.sigmoid()
        biased = (share + self.bias).unflatten(1, (self.groups, -1))  # N groups E/groups
        best = biased.topk(2, 2).values.sum(2).topk(self.used_groups, 1).indices
        allowed = torch.zeros_like(biased[:, :, 0], dtype=torch.bool).scatter(1, best, True)
        chosen = biased.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1).topk(self.used, 1).indices
        share = share.gather(1, chosen)
        return share / (share.sum(1, keepdim=True) + 1e-20) * self.route_scale, chosen

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        return super().forward(x) + self.shared(x)

    @torch.no_grad()
    def update_bias(self, speed: float, real: Tensor | None) -> None:  # B T
        """Raise the biases of experts with less than the mean load in the last training pass, and lower the others (section 2.1.2)."""
        assert self.scores is not None
        chosen = self.route(self.scores)[1] if real is None else self.route(self.scores)[1][real.flatten()]
        load = F.one_hot(chosen.flatten(), len(self.bias)).sum(0).to(self.bias.dtype)
        self.bias.add_(torch.sign(load.mean() - load), alpha=speed)


class DenseBlock(llama.Block):
    """The LLaMA block with latent attention."""

    def make_attention(self, c: Config) -> LatentAttention:
        return LatentAttention(c)


class Block(DenseBlock):
    """The same with experts instead of the MLP."""

    def make_mlp(self, c: Config) -> nn.Module:
        return Experts(c)


class DeepSeekV3(mixtral.Mixtral):
    """A decoder that returns the logits of the next token at each position; same interface as `Mixtral`."""

    def make_block(self, c: Config, layer: int) -> nn.Module:
        return DenseBlock(c) if layer < c.dense_layers else Block(c)

    @property
    def width(self) -> int:
        """Width r of the rotated part of a head."""
        return self.config.rope_width

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` tokens per row, by default and at most the model's own `length`."""
        c, weight = self.config, self.embed.weight
        capacity, kind = min(length or c.length, c.length), weight.dtype
        return Cache(rows, capacity, c.depth, 1, c.kv_rank, value_dim=c.rope_width, dtype=kind, device=weight.device)

    def make_turn(self, places: Tensor, cache: Cache | None, like: Tensor) -> CosSin:  # T or B T -> (B 1) T r, twice
        """Return the cosines and sines of the rotary angles at the positions of the new tokens."""
        c = self.config
        return cos_sin_at(places, yarn_frequencies(c, c.rope_width, like.device), like, c.rope_scale)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        x = super().features(tokens, mask, cache)
        if self.training:
            self.rows = len(tokens)
            for layer in self.get_experts() if self.config.bias_speed else ():
                layer.update_bias(self.config.bias_speed, mask)
        return x

    def balance(self) -> Tensor:
        """Return the mean over layers of the load-balancing loss of each sequence in the last training pass."""
        layers = [layer.scores.unflatten(0, (self.rows, -1)) for layer in self.get_experts() if layer.scores is not None]
        return torch.stack([sequence_balance_loss(scores, self.config.used, self.real) for scores in layers]).mean()

    def get_experts(self) -> list[Experts]:
        """Return the layers with experts."""
        return [module for module in self.modules() if isinstance(module, Experts)]


def sequence_balance_loss(scores: Tensor, used: int, real: Tensor | None) -> Tensor:  # B T E, B T bool -> scalar
    """Return the mean over sequences of the sum over experts of (E / used) x (fraction of tokens that choose the expert) x (mean of
    its score, relative to those of all experts): equations 17 to 20. It is 1 for a uniform load.
    """
    share = scores.to(torch.promote_types(scores.dtype, torch.float32)).sigmoid()
    chosen = F.one_hot(share.topk(used, 2).indices, share.shape[2]).sum(2)  # B T E
    weight = torch.ones_like(share[:, :, :1]) if real is None else real[:, :, None].to(share.dtype)
    count = weight.sum(1).clamp(min=1)  # B 1
    load, mean = (chosen * weight).sum(1) / count, (share / share.sum(2, keepdim=True) * weight).sum(1) / count  # B E
    return (load * mean).sum(1).mean() * share.shape[2] / used


LAYER, OURS = "model.layers.{i}.", "blocks.{i}."
DENSE: dict[str, Row] = {
    "model.embed_tokens.weight": "embed.weight",
    LAYER + "input_layernorm.weight": OURS + "norm1.weight",
    LAYER + "self_attn.q_a_proj.weight": OURS + "attn.q_down.weight",
    LAYER + "self_attn.q_a_layernorm.weight": OURS + "attn.q_norm.weight",
    LAYER + "self_attn.q_b_proj.weight": OURS + "attn.q_up.weight",
    LAYER + "self_attn.kv_a_proj_with_mqa.weight": OURS + "attn.kv_down.weight",
    LAYER + "self_attn.kv_a_layernorm.weight": OURS + "attn.kv_norm.weight",
    LAYER + "self_attn.kv_b_proj.weight": OURS + "attn.kv_up.weight",
    LAYER + "self_attn.o_proj.weight": OURS + "attn.proj.weight",
    LAYER + "self_attn.rotary_emb.inv_freq": Dropped("computed from rope_theta"),
    LAYER + "post_attention_layernorm.weight": OURS + "norm2.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    **llama.GATED,
}
MOE: dict[str, Row] = {
    LAYER + "mlp.gate.weight": OURS + "mlp.router.weight",
    LAYER + "mlp.gate.e_score_correction_bias": OURS + "mlp.bias",
    LAYER + "mlp.shared_experts.gate_proj.weight": Fused(OURS + "mlp.shared.up.weight", 0, 2),
    LAYER + "mlp.shared_experts.up_proj.weight": Fused(OURS + "mlp.shared.up.weight", 1, 2),
    LAYER + "mlp.shared_experts.down_proj.weight": OURS + "mlp.shared.down.weight",
    **mixtral.map_experts(*(f"{LAYER}mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up", "down"))),
}
# Of the module that predicts one more token, after the last layer.
PREDICTION = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")


def huggingface(c: Config) -> dict[str, Row]:
    """Return the weight names of transformers and of the authors' files."""
    names = {**DENSE, **MOE}
    if not c.q_rank:
        names = {name: row for name, row in names.items() if ".q_a_" not in name}
        names[LAYER + "self_attn.q_proj.weight"] = names.pop(LAYER + "self_attn.q_b_proj.weight")
    last = f"model.layers.{c.depth}."
    dropped = [last + f"{part}.weight" for part in PREDICTION]
    dropped += [name.replace(LAYER, last) for name in names if name.startswith(LAYER)]
    return dict.fromkeys(dropped, Dropped("predicts the token after the next one; used in training only")) | names


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings with the factors of scores and of rotated queries and keys."""
    rope, values = get_rope(theirs), read_yarn(theirs)
    factor, both, all_ = values["rope_factor"], rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    scale = get_yarn_factor(factor, both) / get_yarn_factor(factor, all_) if both and all_ else get_yarn_factor(factor)
    return values | {"mscale": all_, "rope_scale": rope.get("attention_factor") or scale}


CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("deepseek_v3"),
    "architectures": Expect(["DeepseekV3ForCausalLM"]),
    **{key: row for key, row in llama.SHARED.items() if key not in ("num_key_value_heads", "rope_parameters")},
    "num_key_value_heads": Expect(lambda c: c.heads),
    "q_lora_rank": Derived(lambda t: {"q_rank": t.get("q_lora_rank", 1536) or 0}, lambda c: c.q_rank or None),
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "width",
    "qk_rope_head_dim": "rope_width",
    "v_head_dim": "value_width",
    "moe_intermediate_size": "expert_hidden",
    "n_routed_experts": "experts",
    "num_experts_per_tok": "used",
    "n_shared_experts": "shared",
    "n_group": "expert_groups",
    "topk_group": "used_groups",
    "first_k_dense_replace": "dense_layers",
    "routed_scaling_factor": "route_scale",
    "rope_parameters": Derived(read_rope, lambda c: write_yarn(c, mscale_all_dim=c.mscale, attention_factor=c.rope_scale)),
    "rope_interleave": Expect(True),
    "norm_topk_prob": Expect(True),
    "scoring_func": Expect("sigmoid"),
    "topk_method": Expect("noaux_tc"),
    "moe_layer_freq": Expect(1),
    "attention_bias": Expect(False),
}

CARD = Card(
    name="deepseek-v3",
    model=DeepSeekV3,
    config=Config,
    paper="arXiv:2412.19437",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "deepseek-v3": Size(params=671_026_404_352, source="deepseek-ai/DeepSeek-V3"),
        "moonlight-16b-a3b": Size(
            vocab_size=163_840,
            length=8192,
            dim=2048,
            depth=27,
            heads=16,
            q_rank=0,
            hidden=11_264,
            dense_layers=1,
            expert_hidden=1408,
            experts=64,
            used=6,
            shared=2,
            expert_groups=1,
            used_groups=1,
            route_scale=2.446,
            rope_theta=50_000.0,
            rope_factor=1.0,
            mscale=0.0,
            eps=1e-5,
            params=15_960_108_544,
            source="moonshotai/Moonlight-16B-A3B",
        ),
        "deepseek-v3-test": Size(
            vocab_size=30,
            length=24,
            dim=12,
            depth=3,
            heads=2,
            q_rank=6,
            kv_rank=8,
            width=4,
            rope_width=4,
            value_width=5,
            hidden=14,
            dense_layers=1,
            expert_hidden=5,
            experts=8,
            used=3,
            shared=2,
            expert_groups=4,
            used_groups=2,
            rope_factor=4.0,
            rope_length=6,
            rope_theta=50.0,
            rope_fast=0.8,
            rope_slow=0.2,
            rope_scale=0.9,
            mscale=0.7,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
