"""BART: a text that was damaged in every way is written anew (Lewis et al. 2019, arXiv:1910.13461).

New here: an encoder as BERT's reads a text of which words were hidden, lost or shuffled, a decoder as GPT's writes it as it
was, so one training prepares for understanding and for writing alike: summaries, answers, translation. The networks bend
by GELU, both sides have learnt places and share one embedding with the head, and layers add, then normalise.

Initialisation: N(0, 0.02) for matrices and embeddings, zero biases.
Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.kv_cache import Cache, causal, positions
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Is
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row, Zeros
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, EncoderDecoder, FeedForward, Memory

OFFSET = 2  # rows of the places' tables that nothing reads: in the authors' code places count from the padding's number


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_265
    length: int = 1024  # longest row, tokens
    dim: int = 768  # D
    depth: int = 6  # layers of the encoder
    decoder_depth: int = 6
    heads: int = 12
    hidden: int = 3072  # width inside the two-layer networks
    dropout: float = 0.1
    attn_dropout: float = 0.0  # of attention weights
    mlp_dropout: float = 0.0  # inside the two-layer networks
    begin: int = 2  # the token that answers begin with
    end: int = 2
    pad: int = 1


class EncoderBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = Attention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm2 = FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = CausalAttention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim)
        self.cross, self.norm2 = CrossAttention(c.dim, c.heads, dropout=c.attn_dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm3 = FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, seen: Tensor | None, memory: Memory, mask, cache, layer: int) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
        x = self.norm2(x + self.dropout(self.cross(x, memory, mask)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class Bart(EncoderDecoder):
    """Source and what is said so far -> logits of the token that follows each of the latter.

    Places count real tokens. `bias` is added to logits; it is zeros and learns nothing, but files may hold another.
    Raises `DataError` for rows longer than `length`.
    """

    scale = 1.0  # of embeddings where they are read
    biased = True  # logits have a bias

    def __init__(self, config: Any):
        super().__init__(config)
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)  # of both sides, and the head
        self.encoder_pos, self.decoder_pos = self.places(), self.places()
        # Of what is read, and after each stack.
        (self.encoder_first, self.encoder_norm), (self.decoder_first, self.decoder_norm) = self.norms(), self.norms()
        self.encoder = nn.ModuleList(self.encoder_block(layer) for layer in range(c.depth))
        self.decoder = nn.ModuleList(self.decoder_block(layer) for layer in range(c.decoder_depth))
        self.dropout = nn.Dropout(c.dropout)
        self.register_buffer("bias", torch.zeros(c.vocab_size) if self.biased else None)
        self.reset_parameters()

    def places(self) -> nn.Module:
        return nn.Embedding(self.config.length + OFFSET, self.config.dim)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """What normalises the embeddings of a side, and what comes out of its stack."""
        return nn.LayerNorm(self.config.dim), nn.Identity()

    def encoder_block(self, layer: int) -> nn.Module:
        return EncoderBlock(self.config)

    def decoder_block(self, layer: int) -> nn.Module:
        return DecoderBlock(self.config)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def read(self, tokens: Tensor, mask: Tensor | None, pos: nn.Module, first: nn.Module, cache: Cache | None = None) -> Tensor:
        self.check(tokens.shape[1], cache)
        place = positions(tokens.shape[1], mask, cache, tokens.device)
        return self.dropout(first(self.embed(tokens) * self.scale + pos(place + OFFSET)))  # B T -> B T D

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        x = self.read(source, mask, self.encoder_pos, self.encoder_first)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        seen = causal(tokens.shape[1], mask, cache, tokens.device)
        x = self.read(tokens, mask, self.decoder_pos, self.decoder_first, cache)
        for layer, block in enumerate(self.decoder):
            x = block(x, seen, memory[layer], source_mask, cache, layer)
        return self.decoder_norm(x)

    def say(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return F.linear(x, self.embed.weight, None if self.bias is None else self.bias.to(x.dtype))


def layers(before: str, cross: str = "encoder_attn", mlp: str = "", last: str = "final_layer_norm") -> dict[str, Row]:
    """Names of both stacks' layers in files of transformers; those after the first differ among NLLB's."""
    names: dict[str, Row] = {}
    for side, third in (("encoder", 2), ("decoder", 3)):
        theirs, ours = f"{before}{side}.layers.{{i}}.", f"{side}.{{i}}."
        names |= {f"{theirs}self_attn.{part}_proj.*": Fused(ours + "attn.qkv.*", i, 3) for i, part in enumerate("qkv")}
        names |= {
            f"{theirs}self_attn.out_proj.*": ours + "attn.proj.*",
            f"{theirs}self_attn_layer_norm.*": ours + "norm1.*",
            f"{theirs}{mlp}fc1.*": ours + "mlp.up.*",
            f"{theirs}{mlp}fc2.*": ours + "mlp.down.*",
            f"{theirs}{last}.*": f"{ours}norm{third}.*",
        }
    theirs = before + "decoder.layers.{i}."
    return names | {
        f"{theirs}{cross}.q_proj.*": "decoder.{i}.cross.q.*",
        f"{theirs}{cross}.k_proj.*": Fused("decoder.{i}.cross.kv.*", 0, 2),
        f"{theirs}{cross}.v_proj.*": Fused("decoder.{i}.cross.kv.*", 1, 2),
        f"{theirs}{cross}.out_proj.*": "decoder.{i}.cross.proj.*",
        f"{theirs}{cross}_layer_norm.*": "decoder.{i}.norm2.*",
    }


def tables(before: str) -> dict[str, Row]:
    """Embeddings and places, and the norms beside them."""
    return {before + "shared.weight": "embed.weight"} | {
        f"{before}{side}.{theirs}": ours
        for side in ("encoder", "decoder")
        for theirs, ours in (
            ("embed_tokens.weight", "embed.weight"),
            ("embed_positions.weight", f"{side}_pos.weight"),
            ("layernorm_embedding.*", f"{side}_first.*"),
            ("layer_norm.*", f"{side}_norm.*"),
            ("version", Dropped("of the authors' code")),
        )
    }


HEAD: dict[str, Row] = {
    "lm_head.weight": "embed.weight",  # tied; absent from most files
    "final_logits_bias": Reshaped("bias", here=(-1,), there=(1, -1)),
    "<no bias>": Zeros("bias", like="embed.weight", column=True),  # files of the stacks alone
}
# A file of the stacks alone has no prefix.
HUGGINGFACE = {name: row for before in ("model.", "") for name, row in (tables(before) | layers(before)).items()} | HEAD


def config(kind: str, name: str, act: str = "gelu", scaled: bool = False) -> dict[str, ConfigRow]:
    """Keys of transformers, of BART and of those that followed it."""
    return {
        "model_type": Is(kind),
        "architectures": Derived(lambda t: {}, lambda c: [name]),
        "vocab_size": "vocab_size",
        "max_position_embeddings": "length",
        "d_model": "dim",
        "encoder_layers": "depth",
        "decoder_layers": "decoder_depth",
        "encoder_attention_heads": "heads",
        "decoder_attention_heads": Is(lambda c: c.heads),
        "encoder_ffn_dim": "hidden",
        "decoder_ffn_dim": Is(lambda c: c.hidden),
        "activation_function": Is(act),
        "scale_embedding": Is(scaled),
        "dropout": "dropout",
        "attention_dropout": "attn_dropout",
        "activation_dropout": "mlp_dropout",
        # Whole layers that are left out while it learns: not done here.
        "encoder_layerdrop": Derived(lambda t: {}, lambda c: 0.0),
        "decoder_layerdrop": Derived(lambda t: {}, lambda c: 0.0),
        "decoder_start_token_id": "begin",
        "eos_token_id": "end",
        "pad_token_id": "pad",
        "is_encoder_decoder": Derived(lambda t: {}, lambda c: True),
        "tie_word_embeddings": Is(True),
    }


def stacks(depth: int, dim: int, heads: int, hidden: int) -> dict[str, int]:
    return {"depth": depth, "decoder_depth": depth, "dim": dim, "heads": heads, "hidden": hidden}


TEST = {
    "vocab_size": 30,
    "length": 12,
    "dim": 16,
    "depth": 2,
    "decoder_depth": 3,
    "heads": 2,
    "hidden": 24,
    "dropout": 0.0,
    "attn_dropout": 0.0,
    "mlp_dropout": 0.0,
}
RECIPE = {
    "optimizer": "muon",
    "lr": 4e-3,
    "momentum": 0.95,
    "weight_decay": 0.0,
    "beta2": 0.98,
    "grad_clip": 1.0,
    "warmup": 0.04,
    "label_smoothing": 0.1,
}

CARD = Card(
    name="bart",
    model=Bart,
    config=Config,
    paper="arXiv:1910.13461",
    year=2019,
    input_type="pair",
    output_type="tokens",
    pretraining_objective="infill",
    sizes={
        "bart-base": Size(attn_dropout=0.1, mlp_dropout=0.1, params=139_420_416, source="facebook/bart-base"),
        "bart-large": Size(
            **stacks(12, 1024, 16, 4096), attn_dropout=0.1, mlp_dropout=0.1, params=406_291_456, source="facebook/bart-large"
        ),
        # Of the same form, to be trained from nothing.
        "bart-mini": Size(vocab_size=8192, **stacks(4, 256, 4, 1024)),
        "bart-micro": Size(vocab_size=8192, **stacks(3, 128, 4, 512)),
        "bart-test": Size(**TEST),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": config("bart", "BartForConditionalGeneration")},
    recipe=RECIPE,
)
