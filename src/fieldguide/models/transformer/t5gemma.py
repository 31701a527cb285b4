"""T5Gemma: Gemma 2 as an encoder-decoder (Zhang et al. 2025, arXiv:2504.06225).

New here: an encoder and a decoder that both begin with the weights of a Gemma 2 decoder, and may differ in size; only the weights of
cross-attention are new. Attention of the encoder sees both sides. Every sublayer is normalized before and after, local and global
layers alternate, and attention logits and output logits are soft-capped, as in Gemma 2.

Initialization: N(0, 0.02), normalization weights 1.
Shapes: B batch, S source tokens, T target tokens, K target tokens seen so far, D width (of the encoder or decoder), d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import attend_groups
from fieldguide.models.layers.gqa import CosSin, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import gemma, gemma2, llama, t5
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder, Memory
from fieldguide.models.transformer.gemma3 import Norm


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256_000
    length: int = 8192  # maximum length of source and target, in tokens
    dim: int = 2304  # D of the encoder
    depth: int = 26  # number of encoder layers
    heads: int = 8
    kv_heads: int = 4  # number of key/value heads
    hidden: int = 9216  # hidden width of the gated MLPs
    decoder_dim: int = 2304  # D of the decoder
    decoder_depth: int = 26
    decoder_heads: int = 8
    decoder_kv_heads: int = 4
    decoder_hidden: int = 9216
    width: int = 256  # d
    window: int = (
        4096  # attention window of every other layer: in the decoder including the token itself, in the encoder to each side
    )
    scale: int = 256  # attention scores are divided by its square root
    attn_cap: float = 50.0  # soft cap of the attention logits
    cap: float = 30.0  # soft cap of the output logits
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    dropout: float = 0.0
    eps: float = 1e-6
    begin: int = 2  # ID of the first decoder token
    end: int = 1
    pad: int = 0


def get_decoder_part(c: Config) -> SimpleNamespace:
    """Return the sizes of the decoder under the names of those of the encoder."""
    sizes = {name: getattr(c, f"decoder_{name}") for name in ("dim", "heads", "kv_heads", "hidden")}
    return SimpleNamespace(**sizes, width=c.width, scale=c.scale, attn_cap=c.attn_cap, dropout=c.dropout, eps=c.eps)


class CrossAttention(nn.Module):
    """Grouped-query attention of target tokens to the real tokens of their source, with soft-capped logits.

    The source may have fewer rows than the target: each then serves several consecutive target rows.
    """

    def __init__(self, c: Any, source_dim: int):
        super().__init__()
        self.kv_heads, self.width, self.scale, self.cap = c.kv_heads, c.width, c.scale**-0.5, c.attn_cap
        self.q = nn.Linear(c.dim, c.heads * c.width, bias=False)
        self.kv = nn.Linear(source_dim, 2 * c.kv_heads * c.width, bias=False)
        self.proj = nn.Linear(c.heads * c.width, c.dim, bias=False)

    def project_kv(self, source: Tensor) -> Memory:  # B S D -> B kv_heads S d, twice
        """Return the keys and values of the encoded source."""
        return tuple(self.kv(source).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind())

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:  # B T D, B S -> B T D
        q = self.q(x)
        q = q.reshape(memory[0].shape[0], -1, q.shape[-1]).unflatten(-1, (-1, self.width)).transpose(1, 2)
        seen = None if mask is None else mask[:, None, None]
        y = attend_groups(q * self.scale, *memory, seen, partial(gemma2.softmax_capped, cap=self.cap))
        return self.proj(y.reshape(*x.shape[:2], -1))


class EncoderBlock(nn.Module):
    """Attention and MLP, each normalized before and after."""

    def __init__(self, c: Any):
        super().__init__()
        self.norm1, self.attn, self.post1 = Norm(c.dim, c.eps), gemma2.Attention(c), Norm(c.dim, c.eps)
        self.norm2, self.mlp, self.post2 = Norm(c.dim, c.eps), t5.Gated(c.dim, c.hidden, c.dropout), Norm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, turn: CosSin, seen: Tensor) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.post1(self.attn(self.norm1(x), turn, seen)))
        return x + self.dropout(self.post2(self.mlp(self.norm2(x))))


class DecoderBlock(nn.Module):
    """Causal attention, cross-attention and MLP, each normalized before and after."""

    def __init__(self, c: Any, source_dim: int):
        super().__init__()
        self.norm1, self.attn, self.post1 = Norm(c.dim, c.eps), gemma2.Attention(c), Norm(c.dim, c.eps)
        self.norm2, self.cross, self.post2 = Norm(c.dim, c.eps), CrossAttention(c, source_dim), Norm(c.dim, c.eps)
        self.norm3, self.mlp, self.post3 = Norm(c.dim, c.eps), t5.Gated(c.dim, c.hidden, c.dropout), Norm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(  # B T D -> B T D
        self,
        x: Tensor,
        turn: CosSin,
        seen: Tensor | None,
        memory: Memory,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        x = x + self.dropout(self.post1(self.attn(self.norm1(x), turn, seen, cache, layer)))
        x = x + self.dropout(self.post2(self.cross(self.norm2(x), memory, mask)))
        return x + self.dropout(self.post3(self.mlp(self.norm3(x))))


class T5Gemma(EncoderDecoder):
    """An encoder-decoder that returns the logits of the next target token at each position. Raises `DataError` for sequences
    longer than `length`, and `SettingsError` for a window of 0.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        c, part = config, get_decoder_part(config)
        if c.window < 1:
            raise SettingsError(f"window={c.window} must be at least 1.")
        self.encoder_embed, self.embed = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.vocab_size, part.dim)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.depth))
        self.decoder = nn.ModuleList(DecoderBlock(part, c.dim) for _ in range(c.decoder_depth))
        self.encoder_norm, self.decoder_norm = Norm(c.dim, c.eps), Norm(part.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Linear(part.dim, c.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def width(self) -> int:
        """Width d of a head."""
        return self.config.width

    def make_cache(self, rows: int, length: int) -> Cache:
        """Return a cache for `length` target tokens per row."""
        c, weight = self.config, self.embed.weight
        return Cache(rows, length, c.decoder_depth, c.decoder_kv_heads, c.width, dtype=weight.dtype, device=weight.device)

    def embed_scaled(self, table: nn.Embedding, tokens: Tensor) -> Tensor:  # B T -> B T D
        """Return embeddings times sqrt(D), in the precision of the weights."""
        return self.dropout(table(tokens) * torch.tensor(table.embedding_dim**0.5, dtype=table.weight.dtype))

    def make_turn(self, places: Tensor, like: Tensor) -> CosSin:  # T or B T -> (B 1) T d, twice
        """Return the cosines and sines of the rotary angles at these positions."""
        return cos_sin_at(places, llama.inverse_frequencies(self.config.width, self.config.rope_theta, like.device), like)

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:  # B S, B S bool -> B S D
        steps, device = source.shape[1], source.device
        self.check_length(steps)
        x = self.embed_scaled(self.encoder_embed, source)
        turn = self.make_turn(token_positions(steps, mask, None, device), x)
        index = torch.arange(steps, device=device)
        near = (index - index[:, None]).abs() <= self.config.window  # S S
        kinds = near, torch.ones_like(near)
        if mask is not None:
            real = mask[:, None, None] | torch.eye(steps, dtype=torch.bool, device=device)  # padding attends to itself
            kinds = near & real, torch.ones_like(near) & real
        for layer, block in enumerate(self.encoder):
            x = block(x, turn, kinds[layer % 2])
        return self.dropout(self.encoder_norm(x))

    def decode(
        self, tokens: Tensor, mask: Tensor | None, memory: list[Memory], source_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # B T -> B T D
        steps, device = tokens.shape[1], tokens.device
        self.check_length(steps, cache)
        x = self.embed_scaled(self.embed, tokens)
        turn = self.make_turn(token_positions(steps, mask, cache, device), x)
        kinds = causal_mask(steps, mask, cache, device, self.config.window), causal_mask(steps, mask, cache, device)
        for layer, block in enumerate(self.decoder):
            x = block(x, turn, kinds[layer % 2], memory[layer], source_mask, cache, layer)
        return self.dropout(self.decoder_norm(x))

    def forward_head(self, x: Tensor) -> Tensor:  # ... D -> ... vocab
        return gemma2.softcap(self.head(x), self.config.cap)


def name_layers(side: str, parts: tuple[str, ...]) -> dict[str, Row]:
    """Return the weight names of the layers of encoder or decoder, and of what is around them."""
    theirs, ours = f"model.{side}.layers.{{i}}.", f"{side}.{{i}}."
    names: dict[str, Row] = {
        f"model.{side}.embed_tokens.weight": "embed.weight" if side == "decoder" else "encoder_embed.weight",
        f"model.{side}.norm.weight": f"{side}_norm.weight",
        theirs + "mlp.gate_proj.weight": Fused(ours + "mlp.up.weight", 0, 2),
        theirs + "mlp.up_proj.weight": Fused(ours + "mlp.up.weight", 1, 2),
        theirs + "mlp.down_proj.weight": ours + "mlp.down.weight",
    }
    for number, part in enumerate(parts, 1):
        names |= {
            f"{theirs}pre_{part}_layernorm.weight": f"{ours}norm{number}.weight",
            f"{theirs}post_{part}_layernorm.weight": f"{ours}post{number}.weight",
        }
        if part != "feedforward":
            attn = ours + ("attn" if part == "self_attn" else "cross")
            names |= {
                f"{theirs}{part}.q_proj.weight": f"{attn}.q.weight",
                f"{theirs}{part}.k_proj.weight": Fused(f"{attn}.kv.weight", 0, 2),
                f"{theirs}{part}.v_proj.weight": Fused(f"{attn}.kv.weight", 1, 2),
                f"{theirs}{part}.o_proj.weight": f"{attn}.proj.weight",
            }
    return names


HUGGINGFACE: dict[str, Row] = {
    **name_layers("encoder", ("self_attn", "feedforward")),
    **name_layers("decoder", ("self_attn", "cross_attn", "feedforward")),
    "lm_head.out_proj.weight": "head.weight",  # tied; absent from most files
}


def read_end(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end token, the first if there are several."""
    end = theirs["decoder"].get("eos_token_id", 1)
    return {"end": end[0] if isinstance(end, list) else end}


def check_part(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` for layers or rotations of encoder or decoder that are not supported."""
    for side in ("encoder", "decoder"):
        gemma2.check_layer_types(theirs[side])
        gemma.read_rope(theirs[side])
    return {}


def configure_part(side: str, prefix: str) -> dict[str, ConfigRow]:
    """Return the rows of the configuration of encoder or decoder, whose sizes have a prefix in ours."""

    def share(name: str) -> ConfigRow:
        """Return the row of a value that is the same in both."""
        return Expect(lambda c: getattr(c, name)) if prefix else name

    depth = f"{prefix}depth"
    rows: dict[str, ConfigRow] = {
        "vocab_size": share("vocab_size"),
        "max_position_embeddings": share("length"),
        "hidden_size": f"{prefix}dim",
        "num_hidden_layers": depth,
        "num_attention_heads": f"{prefix}heads",
        "num_key_value_heads": f"{prefix}kv_heads",
        "intermediate_size": f"{prefix}hidden",
        "head_dim": share("width"),
        "sliding_window": share("window"),
        "query_pre_attn_scalar": share("scale"),
        "attn_logit_softcapping": share("attn_cap"),
        "rms_norm_eps": share("eps"),
        "hidden_activation": Expect("gelu_pytorch_tanh"),
        "attention_bias": Expect(False),
        "layer_types": Derived(check_part, lambda c: gemma2.layer_types(getattr(c, depth))),
        "rope_parameters": Derived(
            lambda t: {"rope_theta": gemma.read_rope(t[side])["rope_theta"]},
            lambda c: {"rope_type": "default", "rope_theta": c.rope_theta},
        ),
    }
    return {f"{side}.{key}": row for key, row in rows.items()}


CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("t5gemma"),
    "architectures": Derived(lambda t: {}, lambda c: ["T5GemmaForConditionalGeneration"]),
    **configure_part("encoder", ""),
    **configure_part("decoder", "decoder_"),
    "decoder.final_logit_softcapping": "cap",
    "decoder.bos_token_id": WithDefault("begin", 2),
    "decoder.eos_token_id": Derived(read_end, lambda c: c.end),
    "decoder.pad_token_id": WithDefault("pad", 0),
    "dropout_rate": "dropout",
    "attention_dropout": Expect(0.0),
    "tie_word_embeddings": Expect(True),
    "is_encoder_decoder": Expect(True),
    "vocab_size": Expect(lambda c: c.vocab_size),
}

NAMES = ("dim", "depth", "heads", "kv_heads", "hidden")
PARTS = {  # sizes of encoder or decoder
    "s": (512, 8, 8, 8, 1024),
    "b": (768, 12, 12, 12, 2048),
    "l": (1024, 24, 16, 16, 2816),
    "ml": (1152, 26, 4, 4, 6912),
    "xl": (2048, 24, 32, 32, 5120),
    "2b": (2304, 26, 8, 4, 9216),
    "9b": (3584, 42, 16, 8, 14_336),
}


def make_size(encoder: str, decoder: str, width: int, params: int) -> Size:
    """Return the size with these parts."""
    sizes = dict(zip(NAMES, PARTS[encoder])) | {f"decoder_{name}": x for name, x in zip(NAMES, PARTS[decoder])}
    return Size(**sizes, width=width, scale=width, params=params, source=f"google/t5gemma-{encoder}-{decoder}-prefixlm")


CARD = Card(
    name="t5gemma",
    model=T5Gemma,
    config=Config,
    paper="arXiv:2504.06225",
    year=2025,
    input_type="pair",
    output_type="tokens",
    sizes={
        "t5gemma-s-s": make_size("s", "s", 64, 312_517_632),
        "t5gemma-b-b": make_size("b", "b", 64, 591_490_560),
        "t5gemma-l-l": make_size("l", "l", 64, 1_241_761_792),
        "t5gemma-ml-ml": make_size("ml", "ml", 256, 2_200_345_344),
        "t5gemma-xl-xl": make_size("xl", "xl", 64, 3_766_980_608),
        "t5gemma-2b-2b": make_size("2b", "2b", 256, 5_596_853_760),
        "t5gemma-9b-2b": make_size("9b", "2b", 256, 12_292_375_296),
        "t5gemma-9b-9b": make_size("9b", "9b", 256, 20_333_401_088),
        "t5gemma-test": Size(
            vocab_size=30,
            length=12,
            dim=12,
            depth=2,
            heads=4,
            kv_heads=2,
            hidden=10,
            decoder_dim=8,
            decoder_depth=3,
            decoder_heads=2,
            decoder_kv_heads=1,
            decoder_hidden=14,
            width=6,
            window=3,
            scale=5,
            attn_cap=0.7,
            cap=20.0,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=t5.CARD.recipe,
)
