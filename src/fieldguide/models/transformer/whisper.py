"""Whisper: speech recognition and translation from weak supervision (Radford et al. 2022, arXiv:2212.04356).

New here: a plain encoder-decoder trained on 680,000 hours of recordings and their transcripts from the web, in 99 languages. Special
tokens at the beginning of the target name the language and the task (transcribe, or translate to English), so that one network does
both; tokens of time, every 20 ms, mark where a phrase begins and ends. The encoder sees 30 seconds of log-mel features, of which
two convolutions keep every second frame; its positions are fixed sinusoids, those of the decoder are learned. The projections of
keys have no bias. The input embedding is also the output layer.

Initialization: N(0, 0.02) for matrices and embeddings, zero biases; the paper does not specify it.
Shapes: B batch, N frames of features, F mel bands, S = ceil(N/2) encoded frames, T target tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder, FeedForward, Memory


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 51_865
    features: int = 80  # F
    source_length: int = 1500  # maximum number of encoded frames, of 20 ms
    length: int = 448  # maximum number of target tokens
    dim: int = 384  # D
    depth: int = 4  # number of encoder layers
    decoder_depth: int = 4
    heads: int = 6
    hidden: int = 1536  # hidden width of the MLPs
    dropout: float = 0.0


class WhisperAttention(nn.Module):
    """Multi-head attention whose keys have no bias, for one sequence, a causal one or a source."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def project_kv(self, source: Tensor) -> Memory:  # B S D -> B heads S d, twice
        """Return keys and values."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split(self.k(source)), split(self.v(source))

    def attend(self, x: Tensor, memory: Memory, mask: Tensor | None, is_causal: bool = False) -> Tensor:  # B T D -> B T D
        """Return the output for queries from `x`. The memory may have fewer rows: each then serves several consecutive ones."""
        q = self.q(x)
        q = q.reshape(memory[0].shape[0], -1, q.shape[-1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = dot_product_attention(q, *memory, mask, is_causal=is_causal)
        return self.proj(y.transpose(1, 2).flatten(2).reshape(*x.shape[:2], -1))

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        return self.attend(x, self.project_kv(x), None)


class EncoderBlock(nn.Module):
    """A pre-norm encoder block: attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), WhisperAttention(c.dim, c.heads)
        self.norm2, self.mlp = nn.LayerNorm(c.dim), FeedForward(c.dim, c.hidden, F.gelu)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """A pre-norm decoder block: causal attention, cross-attention and MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim), WhisperAttention(c.dim, c.heads)
        self.norm2, self.cross = nn.LayerNorm(c.dim), WhisperAttention(c.dim, c.heads)
        self.norm3, self.mlp = nn.LayerNorm(c.dim), FeedForward(c.dim, c.hidden, F.gelu)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self, x: Tensor, seen: Tensor | None, memory: Memory, cache: Cache | None, layer: int
    ) -> Tensor:
        y = self.norm1(x)
        k, v = self.attn.project_kv(y)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # B heads K d
        x = x + self.dropout(self.attn.attend(y, (k, v), seen, is_causal=seen is None and y.shape[1] == k.shape[2]))
        x = x + self.dropout(self.cross.attend(self.norm2(x), memory, None))
        return x + self.dropout(self.mlp(self.norm3(x)))


class Whisper(EncoderDecoder):
    """Log-mel features and target tokens -> logits of the next token at each position; see `EncoderDecoder`.

    Features are those of `data.preprocessing.whisper_features`: 30 seconds, padded with silence, are 2 * `source_length` frames. Fewer
    frames are accepted, but public weights were trained with silence up to 30 seconds. Raises `DataError` for more
    frames, another number of bands and too many tokens, and `SettingsError` if `heads` does not divide `dim`.
    """

    encoder_pos: Tensor

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.dim % c.heads or c.dim % 2:
            raise SettingsError(f"dim={c.dim} must be even and divisible by heads={c.heads}.")
        self.conv1 = nn.Conv1d(c.features, c.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(c.dim, c.dim, 3, stride=2, padding=1)
        self.register_buffer("encoder_pos", build_sinusoids(c.source_length, c.dim))  # files hold it
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.depth))
        self.encoder_norm = nn.LayerNorm(c.dim)
        self.embed = nn.Embedding(c.vocab_size, c.dim)  # also the output layer
        self.decoder_pos = nn.Parameter(torch.empty(c.length, c.dim))
        self.decoder = nn.ModuleList(DecoderBlock(c) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decoder_pos, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B N F -> B S D
        c = self.config
        if source.shape[-1] != c.features:
            raise DataError(f"The frames have {source.shape[-1]} features, but the model expects features={c.features}.")
        if source.shape[1] > 2 * c.source_length:
            raise DataError(
                f"{source.shape[1]} frames exceed the {2 * c.source_length} that the model reads at once. Split the recording."
            )
        x = F.gelu(self.conv1(source.transpose(1, 2)))  # B D N
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # B S D
        x = self.dropout(x + self.encoder_pos[: x.shape[1]].to(x.dtype))
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        self.check_length(tokens.shape[1], cache)
        seen = causal_mask(tokens.shape[1], mask, cache, tokens.device)
        x = self.embed(tokens) + self.decoder_pos[token_positions(tokens.shape[1], mask, cache, tokens.device)]
        x = self.dropout(x)
        for layer, block in enumerate(self.decoder):
            x = block(x, seen, memory[layer], cache, layer)
        return self.decoder_norm(x)

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return F.linear(x, self.embed.weight)

    def forward(  # type: ignore[override]  # B N F, B T, B T bool -> B T vocab
        self, features: Tensor | None, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        return super().forward(features, None, tokens, mask, cache)


def build_sinusoids(length: int, dim: int, longest: float = 10_000.0) -> Tensor:  # -> length D
    """Return sines, then cosines, of positions at geometric frequencies, as in the authors' code."""
    rate = torch.exp(-math.log(longest) / (dim // 2 - 1) * torch.arange(dim // 2))
    angle = torch.arange(length)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


def map_names(layer: str, parts: dict[str, str], rest: dict[str, Row]) -> dict[str, Row]:
    """Return a table of names: those of the blocks of both sides by part, and the rest."""
    names: dict[str, Row] = {}
    for theirs, ours in parts.items():
        names[layer.format(side="decoder") + theirs] = f"decoder.{{i}}.{ours}"
        if not ours.startswith(("cross", "norm2")):  # the encoder has no cross-attention
            names[layer.format(side="encoder") + theirs] = f"encoder.{{i}}.{ours}".replace("norm3", "norm2")
    return names | rest


HUGGINGFACE = map_names(
    "model.{side}.layers.{{i}}.",
    {
        "self_attn_layer_norm.*": "norm1.*",
        **{f"self_attn.{x}_proj.*": f"attn.{x}.*" for x in "qkv"},
        "self_attn.out_proj.*": "attn.proj.*",
        "encoder_attn_layer_norm.*": "norm2.*",
        **{f"encoder_attn.{x}_proj.*": f"cross.{x}.*" for x in "qkv"},
        "encoder_attn.out_proj.*": "cross.proj.*",
        "final_layer_norm.*": "norm3.*",
        "fc1.*": "mlp.up.*",
        "fc2.*": "mlp.down.*",
    },
    {
        "model.encoder.conv1.*": "conv1.*",
        "model.encoder.conv2.*": "conv2.*",
        "model.encoder.embed_positions.weight": "encoder_pos",
        "model.encoder.layer_norm.*": "encoder_norm.*",
        "model.decoder.embed_tokens.weight": "embed.weight",
        "model.decoder.embed_positions.weight": "decoder_pos",
        "model.decoder.layer_norm.*": "decoder_norm.*",
        "proj_out.weight": "embed.weight",  # tied; absent from most files
    },
)
OPENAI = map_names(
    "{side}.blocks.{{i}}.",
    {
        "attn_ln.*": "norm1.*",
        **{f"attn.{name}.*": f"attn.{name[0]}.*" for name in ("query", "key", "value")},
        "attn.out.*": "attn.proj.*",
        "cross_attn_ln.*": "norm2.*",
        **{f"cross_attn.{name}.*": f"cross.{name[0]}.*" for name in ("query", "key", "value")},
        "cross_attn.out.*": "cross.proj.*",
        "mlp_ln.*": "norm3.*",
        "mlp.0.*": "mlp.up.*",
        "mlp.2.*": "mlp.down.*",
    },
    {
        "encoder.conv1.*": "conv1.*",
        "encoder.conv2.*": "conv2.*",
        "encoder.positional_embedding": "encoder_pos",
        "encoder.ln_post.*": "encoder_norm.*",
        "decoder.token_embedding.weight": "embed.weight",
        "decoder.positional_embedding": "decoder_pos",
        "decoder.ln.*": "decoder_norm.*",
        "alignment_heads": Dropped("which heads give the times of words"),
    },
)
# As `checkpoints.ctranslate2` reads them, which splits joined projections. There are no heads in a name or shape: the size tells them.
CTRANSLATE2 = map_names(
    "{side}.layer_{{i}}.",
    {
        "self_attention.layer_norm.*": "norm1.*",
        **{f"self_attention.{x}.*": f"attn.{x}.*" for x in "qkv"},
        "self_attention.out.*": "attn.proj.*",
        "attention.layer_norm.*": "norm2.*",
        **{f"attention.{x}.*": f"cross.{x}.*" for x in "qkv"},
        "attention.out.*": "cross.proj.*",
        "ffn.layer_norm.*": "norm3.*",
        "ffn.linear_0.*": "mlp.up.*",
        "ffn.linear_1.*": "mlp.down.*",
    },
    {
        "encoder.conv1.*": "conv1.*",
        "encoder.conv2.*": "conv2.*",
        "encoder.position_encodings.encodings": "encoder_pos",
        "encoder.layer_norm.*": "encoder_norm.*",
        "decoder.embeddings.weight": "embed.weight",
        "decoder.position_encodings.encodings": "decoder_pos",
        "decoder.layer_norm.*": "decoder_norm.*",
        "decoder.projection.weight": "embed.weight",
        "decoder.scale_embeddings": Dropped("whether embeddings are scaled: they are not"),
    },
)


def find_end(vocab_size: int) -> int:
    """Return the token that ends a text: of several languages, of English, or the last one of a small vocabulary."""
    return min(50_257 if vocab_size >= 51_865 else 50_256, vocab_size - 1)


HUGGINGFACE_CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("whisper"),
    "architectures": Derived(lambda t: {}, lambda c: ["WhisperForConditionalGeneration"]),
    "vocab_size": "vocab_size",
    "num_mel_bins": "features",
    "max_source_positions": "source_length",
    "max_target_positions": "length",
    "d_model": "dim",
    "encoder_layers": "depth",
    "decoder_layers": "decoder_depth",
    "encoder_attention_heads": "heads",
    "decoder_attention_heads": Expect(lambda c: c.heads),
    "encoder_ffn_dim": "hidden",
    "decoder_ffn_dim": Expect(lambda c: c.hidden),
    "activation_function": Expect("gelu"),
    "scale_embedding": Expect(False),
    "dropout": "dropout",
    "eos_token_id": Derived(lambda t: {}, lambda c: find_end(c.vocab_size)),
    "pad_token_id": Derived(lambda t: {}, lambda c: find_end(c.vocab_size)),
    "decoder_start_token_id": Derived(lambda t: {}, lambda c: min(find_end(c.vocab_size) + 1, c.vocab_size - 1)),
    "is_encoder_decoder": Derived(lambda t: {}, lambda c: True),
    "tie_word_embeddings": Derived(lambda t: {}, lambda c: True),
}
OPENAI_CONFIG: dict[str, ConfigRow] = {  # the dictionary `dims` in the authors' files
    "n_mels": "features",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "source_length",
    "n_audio_state": "dim",
    "n_audio_head": "heads",
    "n_audio_layer": "depth",
    "n_text_ctx": "length",
    "n_text_state": Expect(lambda c: c.dim),
    "n_text_head": Expect(lambda c: c.heads),
    "n_text_layer": "decoder_depth",
    "<hidden>": Derived(lambda t: {"hidden": 4 * int(t.get("n_audio_state", 0))}, lambda c: None),
}


def size_of(dim: int, depth: int, heads: int, params: int, **more: Any) -> Size:
    """Return a published size, whose MLPs are four times as wide as the network."""
    shape = {"dim": dim, "depth": depth, "decoder_depth": depth, "heads": heads, "hidden": 4 * dim}
    return Size(params=params, source="openai/whisper, without the fixed sinusoids", **{**shape, **more})


CARD = Card(
    name="whisper",
    model=Whisper,
    config=Config,
    paper="arXiv:2212.04356",
    year=2022,
    input_type="speech-text",
    output_type="tokens",
    # transformers counts the fixed sinusoids too: 1,500 x D more.
    sizes={
        "whisper-tiny": size_of(384, 4, 6, 37_184_640),
        "whisper-base": size_of(512, 6, 8, 71_825_920),
        "whisper-small": size_of(768, 12, 12, 240_582_912),
        "whisper-medium": size_of(1024, 24, 16, 762_321_920),
        "whisper-large-v2": size_of(1280, 32, 20, 1_541_384_960),
        "whisper-large-v3": size_of(1280, 32, 20, 1_541_570_560, features=128, vocab_size=51_866),
        "whisper-turbo": size_of(1280, 32, 20, 806_958_080, features=128, vocab_size=51_866, decoder_depth=4),
        "whisper-tiny-en": size_of(384, 4, 6, 37_184_256, vocab_size=51_864),
        "whisper-base-en": size_of(512, 6, 8, 71_825_408, vocab_size=51_864),
        "whisper-small-en": size_of(768, 12, 12, 240_582_144, vocab_size=51_864),
        "whisper-medium-en": size_of(1024, 24, 16, 762_320_896, vocab_size=51_864),
        "whisper-test": Size(
            vocab_size=30,
            features=6,
            source_length=10,
            length=12,
            dim=16,
            depth=2,
            decoder_depth=3,
            heads=2,
            hidden=24,
        ),
    },
    weights={"huggingface": HUGGINGFACE, "openai": OPENAI, "ctranslate2": CTRANSLATE2},
    configs={"huggingface": HUGGINGFACE_CONFIG, "openai": OPENAI_CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)
