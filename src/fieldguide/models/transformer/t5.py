"""T5: every task as text-to-text (Raffel et al. 2019, arXiv:1910.10683; v1.1 and FLAN: arXiv:2210.11416).

New here: one model, one loss and one format for translation, summarization and classification, pre-trained by span
corruption. There are no position embeddings: a learned bias for the relative distance of two tokens is added to the
attention score, by buckets that grow with the distance, the same in all layers. Scores are not scaled; RMS
normalization without bias, pre-norm. Version 1.1 has GELU-gated MLPs and an untied output head.

Initialization: embeddings N(0, 1); matrices N(0, 1/inputs), queries additionally divided by sqrt(d) in place of score
scaling; in version 1.1 the head too, as its logits are not scaled.
Shapes: B batch, S source tokens, T target tokens, D width, d width of a head, H heads, K target tokens seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, EncoderDecoder, FeedForward, Memory


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_128
    length: int = 512  # sequence length in pre-training, in tokens; longer inputs are possible
    dim: int = 512  # D
    depth: int = 6  # number of encoder layers
    decoder_depth: int = 6
    heads: int = 8
    width: int = 64  # d
    hidden: int = 2048  # hidden width of the MLPs
    buckets: int = 32  # number of relative position buckets
    far: int = 128  # distances from this one on share a bucket
    gated: bool = False  # version 1.1: gated MLPs
    tie_embeddings: bool = True  # the output head shares the weights of the embedding
    scaled: bool = True  # logits are divided by sqrt(D); False in version 1.1
    dropout: float = 0.1
    eps: float = 1e-6
    begin: int = 0  # ID of the first decoder token
    end: int = 1
    pad: int = 0


def relative_position_bucket(distance: Tensor, both: bool, buckets: int, far: int) -> Tensor:  # int64 -> int64
    """Return the bucket of each distance (key position minus query position).

    Half of the buckets hold one distance each, the others logarithmically growing ranges up to `far`. If `both` is
    True, keys after the query have buckets of their own; otherwise they are treated as distance 0.
    """
    buckets, ahead = (buckets // 2, (distance > 0) * (buckets // 2)) if both else (buckets, 0)
    distance = distance.abs() if both else (-distance).clamp(min=0)
    exact = buckets // 2
    # In float32, as in training: the edges of the buckets depend on the rounding of the logarithm.
    large = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact) * (buckets - exact)).long()
    return ahead + torch.where(distance < exact, distance, large.clamp(max=buckets - 1))


class SelfAttention(nn.Module):
    """Attention with unscaled scores plus a position bias, which is minus infinity for masked keys."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.qkv = nn.Linear(c.dim, 3 * c.heads * c.width, bias=False)
        self.proj = nn.Linear(c.heads * c.width, c.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:  # B T D -> B T D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B H T d
        if cache is not None:
            k, v = cache.update(layer, k, v)  # B H K d
        x = dot_product_attention(q, k, v, bias.to(q.dtype), self.dropout if self.training else 0.0, scale=1.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """An MLP with tanh-GELU gate (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        gate, x = self.up(x).chunk(2, -1)
        return self.down(self.dropout(F.gelu(gate, approximate="tanh") * x))


def make_mlp(c: Config) -> nn.Module:
    """Return the MLP of a block."""
    return Gated(c.dim, c.hidden, c.dropout) if c.gated else FeedForward(c.dim, c.hidden, F.relu, c.dropout, bias=False)


class EncoderBlock(nn.Module):
    """A pre-norm encoder block: attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = RMSNorm(c.dim, c.eps), SelfAttention(c)
        self.norm2, self.mlp = RMSNorm(c.dim, c.eps), make_mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attn(self.norm1(x), bias))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """A pre-norm decoder block: causal attention, cross-attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = RMSNorm(c.dim, c.eps), SelfAttention(c)
        self.norm2 = RMSNorm(c.dim, c.eps)
        self.cross = CrossAttention(c.dim, c.heads, c.width, bias=False, scale=1.0, dropout=c.dropout)
        self.norm3, self.mlp = RMSNorm(c.dim, c.eps), make_mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, bias: Tensor, memory: Memory, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), bias, cache, layer))
        x = x + self.dropout(self.cross(self.norm2(x), memory, mask))
        return x + self.dropout(self.mlp(self.norm3(x)))


class T5(EncoderDecoder):
    """An encoder-decoder that returns the logits of the next target token at each position; sequences may have any length.

    Raises `SettingsError` for position buckets that cannot hold the distances.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.buckets < 4 or c.far <= c.buckets // 2:
            raise SettingsError(
                f"T5: buckets={c.buckets} and far={c.far}, but at least 4 buckets are needed, and far must be above half of them"
            )
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.encoder_bias = nn.Embedding(c.buckets, c.heads)
        self.decoder_bias = nn.Embedding(c.buckets, c.heads)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.depth))
        self.decoder = nn.ModuleList(DecoderBlock(c) for _ in range(c.decoder_depth))
        self.encoder_norm, self.decoder_norm = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.reset_parameters()
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        c = self.config
        init_matrices(self)
        nn.init.normal_(self.embed.weight)
        for table in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(table.weight, std=c.dim**-0.5)

    @property
    def width(self) -> int:
        """Width d of a head."""
        return self.config.width

    @property
    def max_target_length(self) -> None:
        """None: relative positions allow any length."""
        return None

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` target tokens per row; the default is the length of pre-training."""
        return self.make_cache(rows, length or self.config.length)

    def bias(self, table: nn.Embedding, steps: int, keys: int, both: bool) -> Tensor:  # -> 1 H T K
        return position_bias(self.config, table, steps, keys, both)

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        return encode(self, source, mask)

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        steps = tokens.shape[1]
        bias = self.bias(self.decoder_bias, steps, cache.used if cache else steps, False)
        seen = causal_mask(steps, mask, cache, tokens.device)
        if seen is None and steps > 1:
            seen = torch.ones(steps, steps, dtype=torch.bool, device=tokens.device).tril()
        if seen is not None:
            bias = bias.masked_fill(~seen, -torch.inf)
        x = self.dropout(self.embed(tokens))
        for layer, block in enumerate(self.decoder):
            x = block(x, bias, memory[layer], source_mask, cache, layer)
        return self.dropout(self.decoder_norm(x))

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return self.head(x * self.config.dim**-0.5 if self.config.scaled else x)


def init_matrices(model: Any) -> None:
    """Initialize the linear layers of T5, or of its encoder."""
    c = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if name.endswith(("attn.qkv", "cross.q")):  # query weights, alone or in front of those of keys and values
                with torch.no_grad():
                    module.weight[: c.heads * c.width] *= c.width**-0.5


def position_bias(c: Any, table: nn.Embedding, steps: int, keys: int, both: bool) -> Tensor:  # -> 1 H T K
    """Return the position bias of the last `steps` of `keys` tokens for each key."""
    distance = torch.arange(1 - keys, steps, device=table.weight.device)  # for the last token; the earlier ones are shifted
    line = table(relative_position_bucket(distance, both, c.buckets, c.far)).T
    return spread_distances(line, steps, keys)[None]


def spread_distances(line: Tensor, steps: int, keys: int) -> Tensor:  # H K+T-1 -> H T K
    """Return the value of the distance from each of the last `steps` tokens to each key; `line` has those of distances from 1 - T up."""
    place = lambda size: torch.arange(size, device=line.device)
    return line[:, place(keys) - place(steps)[:, None] + steps - 1]


def encode(model: Any, source: Tensor, mask: Tensor | None) -> Tensor:  # B S, B S bool -> B S D
    """Return the states of a source by T5, or by its encoder."""
    bias = position_bias(model.config, model.encoder_bias, source.shape[1], source.shape[1], True)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
    x = model.dropout(model.embed(source))
    for block in model.encoder:
        x = block(x, bias)
    return model.dropout(model.encoder_norm(x))


def huggingface(c: Config) -> dict[str, Row]:
    """Return the weight names of transformers."""
    names: dict[str, Row] = {
        "shared.weight": "embed.weight",
        "encoder.embed_tokens.weight": "embed.weight",
        "decoder.embed_tokens.weight": "embed.weight",
        "lm_head.weight": "head.weight",  # absent if tied to the embedding
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": Dropped(
            "unused: cross-attention has no position bias"
        ),
    }
    for side, last in (("encoder", 1), ("decoder", 2)):
        layer, ours = f"{side}.block.{{i}}.layer.", f"{side}.{{i}}."
        names |= {
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": f"{side}_bias.weight",
            f"{side}.final_layer_norm.weight": f"{side}_norm.weight",
            f"{layer}0.layer_norm.weight": ours + "norm1.weight",
            f"{layer}0.SelfAttention.o.weight": ours + "attn.proj.weight",
            f"{layer}{last}.layer_norm.weight": f"{ours}norm{last + 1}.weight",
            f"{layer}{last}.DenseReluDense.wo.weight": ours + "mlp.down.weight",
        } | {f"{layer}0.SelfAttention.{part}.weight": Fused(ours + "attn.qkv.weight", i, 3) for i, part in enumerate("qkv")}
        up = {f"wi_{i}": Fused(ours + "mlp.up.weight", i, 2) for i in range(2)} if c.gated else {"wi": ours + "mlp.up.weight"}
        names |= {f"{layer}{last}.DenseReluDense.{theirs}.weight": row for theirs, row in up.items()}
    cross = "decoder.block.{i}.layer.1."
    return names | {
        cross + "layer_norm.weight": "decoder.{i}.norm2.weight",
        cross + "EncDecAttention.q.weight": "decoder.{i}.cross.q.weight",
        cross + "EncDecAttention.k.weight": Fused("decoder.{i}.cross.kv.weight", 0, 2),
        cross + "EncDecAttention.v.weight": Fused("decoder.{i}.cross.kv.weight", 1, 2),
        cross + "EncDecAttention.o.weight": "decoder.{i}.cross.proj.weight",
    }


def read_begin_token(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder start token, by default the padding token."""
    begin = theirs.get("decoder_start_token_id")
    return {"begin": theirs.get("pad_token_id", 0) if begin is None else begin}


def read_scaled(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether logits are scaled.

    Files of version 1.1 imply it by an untied head; transformers 5 ties that head and writes this key instead.
    """
    return {"scaled": theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True)) is not False}


CONFIG = {
    "model_type": Expect("t5"),
    "chronos_config": Expect(None, written=False, among=(None,)),  # has another network
    "architectures": Derived(lambda t: {}, lambda c: ["T5ForConditionalGeneration"]),
    "vocab_size": "vocab_size",
    "n_positions": "length",
    "d_model": "dim",
    "num_layers": "depth",
    "num_decoder_layers": Derived(
        lambda t: {"decoder_depth": t.get("num_decoder_layers") or t["num_layers"]}, lambda c: c.decoder_depth
    ),
    "num_heads": "heads",
    "d_kv": "width",
    "d_ff": "hidden",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "far",
    "feed_forward_proj": ValueMap("gated", {"relu": False, "gated-gelu": True}),
    "tie_word_embeddings": WithDefault("tie_embeddings", True),
    "scale_decoder_outputs": Derived(read_scaled, lambda c: c.scaled),
    "dropout_rate": "dropout",
    "layer_norm_epsilon": "eps",
    "decoder_start_token_id": Derived(read_begin_token, lambda c: c.begin),
    "eos_token_id": "end",
    "pad_token_id": "pad",
    "is_encoder_decoder": Derived(lambda t: {}, lambda c: True),
}
# (dim, depth, heads, width, hidden, parameter count) of each size
FIRST = {
    "small": (512, 6, 8, 64, 2048, 60_506_624),
    "base": (768, 12, 12, 64, 3072, 222_903_552),
    "large": (1024, 24, 16, 64, 4096, 737_668_096),
    "3b": (1024, 24, 32, 128, 16_384, 2_851_598_336),
    "11b": (1024, 24, 128, 128, 65_536, 11_307_321_344),
}
SECOND = {
    "small": (512, 8, 6, 64, 1024, 76_961_152),
    "base": (768, 12, 12, 64, 2048, 247_577_856),
    "large": (1024, 24, 16, 64, 2816, 783_150_080),
    "xl": (2048, 24, 32, 64, 5120, 2_849_757_184),
    "xxl": (4096, 24, 64, 64, 10_240, 11_135_332_352),
}
NEW = {"gated": True, "tie_embeddings": False, "scaled": False}


def make_size(numbers: tuple[int, ...], source: str, **other: Any) -> Size:
    """Return the size of a row of the tables above."""
    dim, depth, heads, width, hidden, params = numbers
    return Size(
        dim=dim,
        depth=depth,
        decoder_depth=depth,
        heads=heads,
        width=width,
        hidden=hidden,
        **other,
        params=params,
        source=source,
    )


CARD = Card(
    name="t5",
    model=T5,
    config=Config,
    paper="arXiv:1910.10683",
    year=2019,
    input_type="pair",
    output_type="tokens",
    endless=True,
    sizes={
        **{f"t5-{name}": make_size(n, f"google-t5/t5-{name}") for name, n in FIRST.items()},
        # Counts are those of the published files; transformers 5 would tie their heads to the embedding.
        **{f"t5-v1.1-{name}": make_size(n, f"google/t5-v1_1-{name}", **NEW) for name, n in SECOND.items()},
        **{f"flan-t5-{name}": make_size(n, f"google/flan-t5-{name}", **NEW) for name, n in SECOND.items()},
        # Small sizes for training from scratch.
        "t5-mini": Size(vocab_size=8192, dim=256, depth=4, decoder_depth=4, heads=4, hidden=704, gated=True, scaled=True),
        "t5-micro": Size(vocab_size=8192, dim=128, depth=3, decoder_depth=3, heads=4, width=32, hidden=384, gated=True),
        "t5-test": Size(
            vocab_size=30,
            length=12,
            dim=16,
            depth=2,
            decoder_depth=3,
            heads=2,
            width=6,
            hidden=24,
            buckets=6,
            far=5,
            dropout=0.0,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={
        "optimizer": "muon",
        "lr": 4e-3,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "warmup": 0.04,
        "label_smoothing": 0.1,
    },
)
