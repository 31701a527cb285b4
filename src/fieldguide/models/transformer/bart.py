"""BART: an encoder-decoder pre-trained to reconstruct corrupted text (Lewis et al. 2019, arXiv:1910.13461).

New here: a bidirectional encoder (as BERT's) reads a text with masked, deleted or shuffled tokens, and an
autoregressive decoder (as GPT's) reconstructs the original, so one pre-training serves understanding and generation:
summarization, question answering, translation. GELU activations; learned positions on both sides; one embedding
shared by both sides and the output head; post-norm layers.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases.
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
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row, Zeros
from fieldguide.models.transformer._shared.encoder_decoder import CrossAttention, EncoderDecoder, FeedForward, Memory

OFFSET = 2  # unused first rows of the position tables: the authors' code counts from the ID of the padding token


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_265
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 6  # number of encoder layers
    decoder_depth: int = 6
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    dropout: float = 0.1
    attn_dropout: float = 0.0  # dropout of the attention weights
    mlp_dropout: float = 0.0  # dropout inside the MLPs
    begin: int = 2  # ID of the first decoder token
    end: int = 2
    pad: int = 1


class EncoderBlock(nn.Module):
    """A post-norm encoder block: attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = Attention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm2 = FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderBlock(nn.Module):
    """A post-norm decoder block: causal attention, cross-attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = CausalAttention(c.dim, c.heads, c.attn_dropout), nn.LayerNorm(c.dim)
        self.cross, self.norm2 = CrossAttention(c.dim, c.heads, dropout=c.attn_dropout), nn.LayerNorm(c.dim)
        self.mlp, self.norm3 = FeedForward(c.dim, c.hidden, F.gelu, c.mlp_dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, seen: Tensor | None, memory: Memory, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
        x = self.norm2(x + self.dropout(self.cross(x, memory, mask)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class Bart(EncoderDecoder):
    """An encoder-decoder that returns the logits of the next target token at each position; see `EncoderDecoder`.

    Positions count real tokens. `bias` is added to the logits; it is zero and not trained, but files may hold other
    values. Raises `DataError` for sequences longer than `length`.
    """

    scale = 1.0  # factor of the input embeddings
    biased = True  # whether the logits have a bias
    bias: Tensor | None  # vocab

    def __init__(self, config: Any):
        super().__init__(config)
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)  # shared by both sides and the output head
        self.encoder_pos, self.decoder_pos = self.make_positions(), self.make_positions()
        # Normalization of the input embeddings and of the output of each stack.
        (self.encoder_first, self.encoder_norm), (self.decoder_first, self.decoder_norm) = self.make_norms(), self.make_norms()
        self.encoder = nn.ModuleList(self.make_encoder_block(layer) for layer in range(c.depth))
        self.decoder = nn.ModuleList(self.make_decoder_block(layer) for layer in range(c.decoder_depth))
        self.dropout = nn.Dropout(c.dropout)
        self.register_buffer("bias", torch.zeros(c.vocab_size) if self.biased else None)
        self.reset_parameters()

    def make_positions(self) -> nn.Module:
        """Return the position embedding of one side."""
        return nn.Embedding(self.config.length + OFFSET, self.config.dim)

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        """Return the normalization of the input embeddings of one side, and of the output of its stack."""
        return nn.LayerNorm(self.config.dim), nn.Identity()

    def make_encoder_block(self, layer: int) -> nn.Module:
        """Return the encoder block of this layer."""
        return EncoderBlock(self.config)

    def make_decoder_block(self, layer: int) -> nn.Module:
        """Return the decoder block of this layer."""
        return DecoderBlock(self.config)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed_tokens(
        self, tokens: Tensor, mask: Tensor | None, pos: nn.Module, first: nn.Module, cache: Cache | None = None
    ) -> Tensor:
        """Return the embedded tokens of one side."""
        self.check_length(tokens.shape[1], cache)
        place = token_positions(tokens.shape[1], mask, cache, tokens.device)
        return self.dropout(first(self.embed(tokens) * self.scale + pos(place + OFFSET)))  # B T -> B T D

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        x = self.embed_tokens(source, mask, self.encoder_pos, self.encoder_first)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        seen = causal_mask(tokens.shape[1], mask, cache, tokens.device)
        x = self.embed_tokens(tokens, mask, self.decoder_pos, self.decoder_first, cache)
        for layer, block in enumerate(self.decoder):
            x = block(x, seen, memory[layer], source_mask, cache, layer)
        return self.decoder_norm(x)

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return F.linear(x, self.embed.weight, None if self.bias is None else self.bias.to(x.dtype))


def map_layers(before: str, cross: str = "encoder_attn", mlp: str = "", last: str = "final_layer_norm") -> dict[str, Row]:
    """Return the names of the layers of both stacks in files of transformers; the optional parts differ in NLLB."""
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


def map_embeddings(before: str) -> dict[str, Row]:
    """Return the names of the embeddings, positions and stack normalization layers."""
    shared: dict[str, Row] = {before + "shared.weight": "embed.weight"}
    return shared | {
        f"{before}{side}.{theirs}": ours
        for side in ("encoder", "decoder")
        for theirs, ours in (
            ("embed_tokens.weight", "embed.weight"),
            ("embed_positions.weight", f"{side}_pos.weight"),
            ("layernorm_embedding.*", f"{side}_first.*"),
            ("layer_norm.*", f"{side}_norm.*"),
            ("version", Dropped("version of the authors' code")),
        )
    }


HEAD: dict[str, Row] = {
    "lm_head.weight": "embed.weight",  # tied; absent from most files
    "final_logits_bias": Reshaped("bias", here=(-1,), there=(1, -1)),
    "<no bias>": Zeros("bias", like="embed.weight", column=True),  # files of the model without head
}
# Files of the model without head have no prefix.
HUGGINGFACE = {
    name: row for before in ("model.", "") for name, row in (map_embeddings(before) | map_layers(before)).items()
} | HEAD


def map_config(kind: str, name: str, act: str = "gelu", scaled: bool = False) -> dict[str, ConfigRow]:
    """Return the configuration keys of transformers, for BART and models derived from it."""
    return {
        "model_type": Expect(kind),
        "architectures": Derived(lambda t: {}, lambda c: [name]),
        "vocab_size": "vocab_size",
        "max_position_embeddings": "length",
        "d_model": "dim",
        "encoder_layers": "depth",
        "decoder_layers": "decoder_depth",
        "encoder_attention_heads": "heads",
        "decoder_attention_heads": Expect(lambda c: c.heads),
        "encoder_ffn_dim": "hidden",
        "decoder_ffn_dim": Expect(lambda c: c.hidden),
        "activation_function": Expect(act),
        "scale_embedding": Expect(scaled),
        "dropout": "dropout",
        "attention_dropout": "attn_dropout",
        "activation_dropout": "mlp_dropout",
        # LayerDrop is not implemented.
        "encoder_layerdrop": Derived(lambda t: {}, lambda c: 0.0),
        "decoder_layerdrop": Derived(lambda t: {}, lambda c: 0.0),
        "decoder_start_token_id": "begin",
        "eos_token_id": "end",
        "pad_token_id": "pad",
        "is_encoder_decoder": Derived(lambda t: {}, lambda c: True),
        "tie_word_embeddings": Expect(True),
    }


def stack_shape(depth: int, dim: int, heads: int, hidden: int) -> dict[str, Any]:
    """Return the shape parameters of an encoder and decoder of the same depth."""
    return {"depth": depth, "decoder_depth": depth, "dim": dim, "heads": heads, "hidden": hidden}


TEST: dict[str, Any] = {
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
            **stack_shape(12, 1024, 16, 4096),
            attn_dropout=0.1,
            mlp_dropout=0.1,
            params=406_291_456,
            source="facebook/bart-large",
        ),
        # Small sizes for training from scratch.
        "bart-mini": Size(vocab_size=8192, **stack_shape(4, 256, 4, 1024)),
        "bart-micro": Size(vocab_size=8192, **stack_shape(3, 128, 4, 512)),
        "bart-test": Size(**TEST),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": map_config("bart", "BartForConditionalGeneration")},
    recipe=RECIPE,
)
