"""LLaMA: an efficient GPT (Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783).

New here: a combination of known parts: RMS normalization without bias, a gated MLP (SwiGLU) instead of GELU, rotary
instead of learned positions, no biases. From Llama 2 70B on, heads share keys and values; from Llama 3.1 on, low
rotary frequencies are scaled down for sequences longer than those of the first training.

Initialization: N(0, 0.02) for all matrices and embeddings, as in the authors' later code and in transformers.
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.gqa import CosSin, GatedMlp, GroupedAttention, RotaryAttention, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, InterleavedRotary, Row
from fieldguide.models.transformer._shared.rope_kinds import (
    check_scaling,
    get_attention_factor,
    read_scaling,
    scale_frequencies,
    write_scaling,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_000
    length: int = 2048  # maximum sequence length, in tokens
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # number of key/value heads
    hidden: int = 11_008  # hidden width of the gated MLPs
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()  # see `_shared/rope_kinds.py`
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, c: Any):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn, self.mlp = self.make_attention(c), self.make_mlp(c)

    def make_attention(self, c: Any) -> nn.Module:
        """Return the attention layer. Raises `SettingsError` if `heads` does not divide `dim`."""
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        return GroupedAttention(c.dim, c.heads, c.kv_heads, c.dim // c.heads)

    def make_mlp(self, c: Any) -> nn.Module:
        """Return the MLP."""
        return GatedMlp(c.dim, c.hidden)

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # -> B T D
        x = x + self.attn(self.norm1(x), turn, seen, cache, layer)
        return x + self.mlp(self.norm2(x))


def inverse_frequencies(width: int, base: float, device: torch.device) -> Tensor:  # -> d/2
    """Return the rotary frequencies in radians per token, one for each pair of dimensions of a head."""
    return 1.0 / base ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


class Decoder(nn.Module):
    """Base class of LLaMA and related decoders: embedding, blocks, final normalization, output head and cache."""

    block: type[nn.Module] = Block

    def __init__(self, config: Any, norm: nn.Module, tie_embeddings: bool):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(self.make_block(c, layer) for layer in range(c.depth))
        self.norm = norm
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def make_block(self, c: Any, layer: int) -> nn.Module:
        """Return the block of a layer."""
        return self.block(c)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def width(self) -> int:
        """Width d of a head."""
        attn = self.blocks[0].attn
        assert isinstance(attn, RotaryAttention)
        return attn.width

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Number and width of the heads of keys and values."""
        attn = self.blocks[0].attn
        assert isinstance(attn, RotaryAttention)
        return attn.kv_heads, attn.width

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` tokens per row, by default and at most the model's own `length`."""
        c, weight = self.config, self.embed.weight
        return Cache(
            rows, min(length or c.length, c.length), c.depth, *self.cache_shape, dtype=weight.dtype, device=weight.device
        )

    def extend_cache(self, steps: int, mask: Tensor | None, cache: Cache | None) -> None:
        """Reserve room for new tokens in the cache. Raises `DataError` if the sequence exceeds the model's length."""
        if (total := steps + (cache.used if cache else 0)) > self.config.length:
            raise DataError(
                f"A sequence of {total} tokens exceeds the model's length={self.config.length}. "
                "Truncate the input or create the model with a larger length."
            )
        if cache is not None:
            cache.reserve(steps, mask)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        """Return the final hidden states."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T vocab
        return self.head(self.features(tokens, mask, cache))

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B vocab
        """Return the logits of the last position only, which is all that generation needs and saves time for long prompts."""
        return F.linear(self.features(tokens, mask, cache)[:, -1], self.head.weight)


class Llama(Decoder):
    """A decoder that returns the logits of the next token at each position.

    Padding may be on either side: positions count real tokens. With a `cache` (see `new_cache`) only the new tokens
    are passed, and the result equals that of the whole sequence. Raises `DataError` for sequences longer than
    `length`, and `SettingsError` if `heads` does not divide the width.
    """

    def __init__(self, config: Any):
        check_scaling(getattr(config, "rope_scaling", ()), config.length)
        super().__init__(config, self.make_norm(config), config.tie_embeddings)

    def make_norm(self, c: Any) -> nn.Module:
        """Return the normalization of the final hidden states."""
        return RMSNorm(c.dim, c.eps)

    def inverse_frequencies(self, device: torch.device) -> Tensor:  # -> d/2
        """Return the rotary frequencies, scaled if `rope_scaling` is set."""
        c = self.config
        return scale_frequencies(inverse_frequencies(self.width, c.rope_theta, device), c.rope_scaling, c.rope_theta)

    def mask_keys(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> Tensor | None:
        """Return which keys each new token attends to; see `causal_mask`."""
        return causal_mask(steps, mask, cache, device)

    def mask_layers(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer."""
        return [self.mask_keys(steps, mask, cache, device)] * len(self.blocks)

    def make_turn(self, places: Tensor, cache: Cache | None, like: Tensor) -> CosSin:  # T or B T -> (B 1) T d, twice
        """Return the cosines and sines of the rotary angles at the positions of the new tokens."""
        factor = get_attention_factor(getattr(self.config, "rope_scaling", ()))
        return cos_sin_at(places, self.inverse_frequencies(like.device), like, factor)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        """Return the final hidden states."""
        return self.forward_blocks(self.embed(tokens), mask, cache)

    def forward_blocks(
        self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None, places: Tensor | None = None
    ) -> Tensor:  # B T D -> B T D
        """Apply all blocks to token embeddings, or to other vectors in their place.

        `places` are the positions of the new tokens if they do not count real tokens, in a form that `make_turn` accepts.
        """
        steps = x.shape[1]
        self.extend_cache(steps, mask, cache)
        masks = self.mask_layers(steps, mask, cache, x.device)
        places = token_positions(steps, mask, cache, x.device) if places is None else places
        turn = self.make_turn(places, cache, x)
        for layer, (block, seen) in enumerate(zip(self.blocks, masks)):
            x = block(x, turn, seen, cache, layer)
        return self.norm(x)


NAMES: dict[str, Row] = {  # names of the attention and normalization layers, shared by related models
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.norm1.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attn.q.weight",
    "model.layers.{i}.self_attn.k_proj.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2),
    "model.layers.{i}.self_attn.v_proj.weight": Fused("blocks.{i}.attn.kv.weight", 1, 2),
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attn.proj.weight",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": Dropped("computed from rope_theta"),
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.norm2.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",  # absent if tied to the embedding
}
GATED: dict[str, Row] = {
    "model.layers.{i}.mlp.gate_proj.weight": Fused("blocks.{i}.mlp.up.weight", 0, 2),
    "model.layers.{i}.mlp.up_proj.weight": Fused("blocks.{i}.mlp.up.weight", 1, 2),
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
}
HUGGINGFACE = NAMES | GATED


def gguf(c: Any) -> dict[str, Row]:
    """Return the names in GGUF files, in which rotary pairs are adjacent."""
    width, layer = c.dim // c.heads, "blk.{i}."
    return {
        "token_embd.weight": "embed.weight",
        layer + "attn_norm.weight": "blocks.{i}.norm1.weight",
        layer + "attn_q.weight": InterleavedRotary("blocks.{i}.attn.q.weight", width),
        layer + "attn_k.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2, width),
        layer + "attn_v.weight": Fused("blocks.{i}.attn.kv.weight", 1, 2),
        layer + "attn_output.weight": "blocks.{i}.attn.proj.weight",
        layer + "ffn_norm.weight": "blocks.{i}.norm2.weight",
        layer + "ffn_gate.weight": Fused("blocks.{i}.mlp.up.weight", 0, 2),
        layer + "ffn_up.weight": Fused("blocks.{i}.mlp.up.weight", 1, 2),
        layer + "ffn_down.weight": "blocks.{i}.mlp.down.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "head.weight",  # absent if tied to the embedding
        "rope_freqs.weight": Dropped("computed from rope_theta and rope_scaling"),
    }


def meta(c: Config) -> dict[str, Row]:
    """Return the names in Meta's own files, in which rotary pairs are adjacent."""
    width = c.dim // c.heads
    layer, attn, mlp = "layers.{i}.", "layers.{i}.attention.w", "layers.{i}.feed_forward.w"
    return {
        "tok_embeddings.weight": "embed.weight",
        layer + "attention_norm.weight": "blocks.{i}.norm1.weight",
        attn + "q.weight": InterleavedRotary("blocks.{i}.attn.q.weight", width),
        attn + "k.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2, width),
        attn + "v.weight": Fused("blocks.{i}.attn.kv.weight", 1, 2),
        attn + "o.weight": "blocks.{i}.attn.proj.weight",
        layer + "ffn_norm.weight": "blocks.{i}.norm2.weight",
        mlp + "1.weight": Fused("blocks.{i}.mlp.up.weight", 0, 2),
        mlp + "3.weight": Fused("blocks.{i}.mlp.up.weight", 1, 2),
        mlp + "2.weight": "blocks.{i}.mlp.down.weight",
        "norm.weight": "norm.weight",
        "output.weight": "head.weight",
        "rope.freqs": Dropped("computed from rope_theta"),
    }


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from a configuration of transformers, in the current form or that of before 2025."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))}
    if scaling := read_scaling(rope, theirs.get("max_position_embeddings", 0)):
        values["rope_scaling"] = scaling
    return values


def write_rope(c: Any) -> dict[str, Any]:
    """Return the rope_parameters of a config."""
    return {"rope_theta": c.rope_theta, **write_scaling(c.rope_scaling)}


SHARED: dict[str, ConfigRow] = {  # shared by related models
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": Derived(
        lambda t: {"kv_heads": t.get("num_key_value_heads") or t["num_attention_heads"]}, lambda c: c.kv_heads
    ),
    "intermediate_size": "hidden",
    "rms_norm_eps": "eps",
    "hidden_act": Expect("silu"),
    "rope_parameters": Derived(read_rope, write_rope),
    "tie_word_embeddings": WithDefault("tie_embeddings", False),
}
CONFIG = {
    "model_type": Expect("llama"),
    "architectures": Expect(["LlamaForCausalLM"]),
    **SHARED,
    "head_dim": Expect(lambda c: c.dim // c.heads),
    "attention_bias": Expect(False),
    "mlp_bias": Expect(False),
}


def read_hidden(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hidden width of the gated MLPs, computed as in Meta's code."""
    hidden = int(params.get("ffn_dim_multiplier", 1.0) * int(8 * params["dim"] / 3))
    multiple = params["multiple_of"]
    return {"hidden": multiple * -(-hidden // multiple)}


L3 = {"vocab_size": 128_256, "length": 8192, "kv_heads": 8, "hidden": 14_336, "rope_theta": 500_000.0, "eps": 1e-5}
B70 = {"dim": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 28_672}
B405 = {"dim": 16_384, "depth": 126, "heads": 128, "kv_heads": 8, "hidden": 53_248}
LONG = {"length": 131_072, "rope_scaling": (8.0, 1.0, 4.0, 8192.0)}
SMALL = {"length": 131_072, "rope_scaling": (32.0, 1.0, 4.0, 8192.0), "tie_embeddings": True}

SIZES = {
    "llama-7b": Size(params=6_738_415_616, source="huggyllama/llama-7b"),
    "llama-13b": Size(
        dim=5120, depth=40, heads=40, kv_heads=40, hidden=13_824, params=13_015_864_320, source="huggyllama/llama-13b"
    ),
    "llama-30b": Size(
        dim=6656, depth=60, heads=52, kv_heads=52, hidden=17_920, params=32_528_943_616, source="huggyllama/llama-30b"
    ),
    "llama-65b": Size(
        dim=8192, depth=80, heads=64, kv_heads=64, hidden=22_016, params=65_285_660_672, source="huggyllama/llama-65b"
    ),
    "llama2-7b": Size(length=4096, eps=1e-5, params=6_738_415_616, source="meta-llama/Llama-2-7b-hf"),
    "llama2-13b": Size(
        length=4096,
        dim=5120,
        depth=40,
        heads=40,
        kv_heads=40,
        hidden=13_824,
        eps=1e-5,
        params=13_015_864_320,
        source="meta-llama/Llama-2-13b-hf",
    ),
    "llama2-70b": Size(length=4096, **B70, eps=1e-5, params=68_976_648_192, source="meta-llama/Llama-2-70b-hf"),
    "llama3-8b": Size(**L3, params=8_030_261_248, source="meta-llama/Meta-Llama-3-8B"),
    "llama3-70b": Size(**{**L3, **B70}, params=70_553_706_496, source="meta-llama/Meta-Llama-3-70B"),
    "llama3.1-8b": Size(**{**L3, **LONG}, params=8_030_261_248, source="meta-llama/Llama-3.1-8B"),
    "llama3.1-70b": Size(**{**L3, **B70, **LONG}, params=70_553_706_496, source="meta-llama/Llama-3.1-70B"),
    "llama3.1-405b": Size(**{**L3, **B405, **LONG}, params=405_853_388_800, source="meta-llama/Llama-3.1-405B"),
    "llama3.2-1b": Size(
        **{**L3, **SMALL, "hidden": 8192}, dim=2048, depth=16, params=1_235_814_400, source="meta-llama/Llama-3.2-1B"
    ),
    "llama3.2-3b": Size(
        **{**L3, **SMALL, "hidden": 8192}, dim=3072, depth=28, heads=24, params=3_212_749_824, source="meta-llama/Llama-3.2-3B"
    ),
    "smollm2-135m": Size(
        vocab_size=49_152,
        length=8192,
        dim=576,
        depth=30,
        heads=9,
        kv_heads=3,
        hidden=1536,
        rope_theta=100_000.0,
        eps=1e-5,
        tie_embeddings=True,
        params=134_515_008,
        source="HuggingFaceTB/SmolLM2-135M",
    ),
    "smollm2-360m": Size(
        vocab_size=49_152,
        length=8192,
        dim=960,
        depth=32,
        heads=15,
        kv_heads=5,
        hidden=2560,
        rope_theta=100_000.0,
        eps=1e-5,
        tie_embeddings=True,
        params=361_821_120,
        source="HuggingFaceTB/SmolLM2-360M",
    ),
    "smollm2-1.7b": Size(
        vocab_size=49_152,
        length=8192,
        dim=2048,
        depth=24,
        kv_heads=32,
        hidden=8192,
        rope_theta=130_000.0,
        eps=1e-5,
        tie_embeddings=True,
        params=1_711_376_384,
        source="HuggingFaceTB/SmolLM2-1.7B",
    ),
    # Small sizes for training from scratch.
    "llama-mini": Size(
        vocab_size=8192, length=512, dim=512, depth=8, heads=8, kv_heads=4, hidden=1408, eps=1e-5, tie_embeddings=True
    ),
    "llama-micro": Size(
        vocab_size=4096, length=256, dim=256, depth=4, heads=4, kv_heads=2, hidden=704, eps=1e-5, tie_embeddings=True
    ),
    "llama-nano": Size(
        vocab_size=256, length=128, dim=128, depth=4, heads=4, kv_heads=4, hidden=344, eps=1e-5, tie_embeddings=True
    ),
    "llama-test": Size(
        vocab_size=30, length=12, dim=16, depth=2, heads=4, kv_heads=2, hidden=12, rope_scaling=(4.0, 1.0, 4.0, 8.0)
    ),
}


def infer_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what params.json does not contain: the maximum length and rope_scaling.

    They are those of the published size that it describes or is closest to, by the number of equal fields, then by
    the width.
    """
    given = {
        "vocab_size": params.get("vocab_size", -1),
        "rope_theta": params.get("rope_theta", 10_000.0),
        "eps": params["norm_eps"],
        "dim": params["dim"],
        "depth": params["n_layers"],
        "heads": params["n_heads"],
        "kv_heads": params.get("n_kv_heads") or params["n_heads"],
        **read_hidden(params),
    }

    def distance(config: Config) -> tuple[int, float]:
        return (
            sum(getattr(config, key) != value for key, value in given.items() if value != -1),
            abs(math.log(config.dim / given["dim"])),
        )

    known = [Config(**size.overrides) for name, size in SIZES.items() if name.startswith("llama") and size.source]
    nearest = min((c for c in known if bool(c.rope_scaling) == bool(params.get("use_scaled_rope"))), key=distance)
    return {"length": nearest.length, "rope_scaling": nearest.rope_scaling}


PARAMS = {  # params.json of Meta's checkpoints
    "dim": "dim",
    "n_layers": "depth",
    "n_heads": "heads",
    "n_kv_heads": Derived(lambda t: {"kv_heads": t.get("n_kv_heads") or t["n_heads"]}, lambda c: c.kv_heads),
    # -1 in the first two generations: the vocabulary size is that of the tokenizer and the tensors.
    "vocab_size": Derived(
        lambda t: {"vocab_size": t["vocab_size"]} if t.get("vocab_size", -1) > 0 else {}, lambda c: c.vocab_size
    ),
    "norm_eps": "eps",
    "multiple_of": Derived(read_hidden, lambda c: c.hidden),
    "rope_theta": WithDefault("rope_theta", 10_000.0),
    "use_scaled_rope": Derived(infer_params, lambda c: bool(c.rope_scaling)),
}


def read_gguf_rope(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from the metadata of a GGUF file.

    The parameters of Llama 3.1's scaling are recovered from the factors in the file. Raises `WeightsError` for other kinds of
    scaling.
    """
    own = metadata[architecture]
    rope, scaling = own.get("rope", {}), own.get("rope", {}).get("scaling", {})
    theta = rope.get("freq_base", 10_000.0)
    if scaling.get("type", "none") != "none" and scaling.get("factor", 1.0) != 1.0:
        raise WeightsError(
            f"rope.scaling.type={scaling['type']!r} of a GGUF file is not supported. Supported are the scaling of Llama 3.1 and none."
        )
    factors = metadata.get("rope_factors")
    if not factors or max(factors) == 1:
        return {"rope_theta": theta}
    width = own.get("attention", {}).get("key_length") or own["embedding_length"] // own["attention"]["head_count"]
    return {
        "rope_theta": theta,
        "rope_scaling": fit_rope_scaling(factors, theta, width, scaling.get("original_context_length")),
    }


def fit_rope_scaling(factors: Sequence[float], theta: float, width: int, original: float | None) -> tuple[float, ...]:
    """Return the rope_scaling that divides the rotary frequencies of heads of `width` by these factors.

    Raises `WeightsError` if the scaling of Llama 3.1 does not give these factors.
    """
    factor = max(factors)
    found = (factor, 1.0, 4.0, float(original or 8192))
    if len(factors) != width // 2:
        return found
    given = torch.tensor(factors, dtype=torch.float64)
    rotations = theta ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width) / (2 * math.pi)  # per token
    kept = (1 / given - 1 / factor) / (1 - 1 / factor)  # (original * rotations - low) / (high - low), in [0, 1]
    inner = (kept > 1e-3) & (kept < 1 - 1e-3)
    if inner.sum() >= 2:
        line = torch.stack([rotations[inner], torch.ones_like(rotations[inner])], 1)
        slope, offset = torch.linalg.lstsq(line, kept[inner, None]).solution.flatten().tolist()
        found = (factor, 1.0, round(1 - 1 / offset, 2), float(round(-slope / offset)))
    _, low, high, length = found
    kept = ((length * rotations - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / (kept + (1 - kept) / factor), given, rtol=0.01):
        raise WeightsError(
            "the rotary factors of this GGUF file are not those of Llama 3.1's scaling, which alone is supported."
        )
    return found


VALUE_LENGTH = Derived(lambda t: {}, lambda c: c.width)  # llama.cpp takes D / heads if the width of values is missing


def gguf_config(architecture: str, **rows: ConfigRow) -> dict[str, ConfigRow]:
    """Return the table of GGUF metadata for an architecture; `rows` are further keys of it."""
    table: dict[str, ConfigRow] = {
        "vocab_size": Derived(  # most files lack it: then the embedding tells
            lambda t: {"vocab_size": t[architecture]["vocab_size"]} if "vocab_size" in t[architecture] else {},
            lambda c: c.vocab_size,
        ),
        "context_length": "length",
        "embedding_length": "dim",
        "block_count": "depth",
        "attention.head_count": "heads",
        "attention.head_count_kv": Derived(
            lambda t: {
                "kv_heads": t[architecture]["attention"].get("head_count_kv") or t[architecture]["attention"]["head_count"]
            },
            lambda c: c.kv_heads,
        ),
        "feed_forward_length": "hidden",
        "attention.layer_norm_rms_epsilon": "eps",
        "rope.freq_base": Derived(lambda t: read_gguf_rope(t, architecture), lambda c: c.rope_theta),
        **rows,
    }
    return {"general.architecture": Expect(architecture), **{f"{architecture}.{key}": row for key, row in table.items()}}


CARD = Card(
    name="llama",
    model=Llama,
    config=Config,
    paper="arXiv:2302.13971",
    year=2023,
    input_type="tokens",
    output_type="tokens",
    sizes=SIZES,
    weights={"huggingface": HUGGINGFACE, "meta": meta, "gguf": gguf},
    configs={"huggingface": CONFIG, "meta": PARAMS, "gguf": gguf_config("llama")},
    recipe={
        "optimizer": "muon",
        "lr": 1e-2,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "warmup": 0.05,
        "schedule": "linear",
    },
)
