"""SigLIP: image and text encoders trained with a sigmoid loss for each pair (Zhai et al. 2023, arXiv:2303.15343).

New here: the softmax over a batch, as in CLIP, is replaced by one binary decision for each pairing of an image with a
text, with a learned scale and bias, so that no pair depends on the others. The image encoder has no class token: a
learned query attends to all patches. The text encoder is bidirectional, reads texts that are padded to a fixed length,
padding included, and is read at its last position. SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786) has the same
networks at fixed image sizes, with a multilingual vocabulary, and was also trained with captions and self-distillation.

Initialization: uniform (Glorot and Bengio 2010) for the blocks and the learned query, N(0, 1/width) for embeddings,
positions, the patch embedding and the text projection, by its inputs; the scale starts at 10, the bias at -10.
Shapes: B batch, C channels, S image side, N = (S/P)^2 patches, T tokens, D width, E width of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.attention_rollout import attention_weights, rollout
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.patches import interpolate_pos_embed
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row

EPS = 1e-6  # of the layer norms
CLIP_END = 49_407  # the end token of CLIP, the default in transformers
GEMMA_VOCABULARY = 256_000  # of SigLIP 2, whose tokenizer pads with token 0


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 224  # S
    patch: int = 16  # P
    dim: int = 768  # D of the image encoder; also E
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    vocab_size: int = 32_000
    length: int = 64  # length to which texts are padded, in tokens
    end: int = 1  # ID of the end token, the last of each text
    pad: int = 1  # ID of the padding token, which the text encoder reads
    text_dim: int = 768  # D of the text encoder
    text_depth: int = 12
    text_heads: int = 12
    text_hidden: int = 3072


class FeedForward(nn.Module):
    """Two linear layers with the tanh approximation of GELU in between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, EPS), FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:  # B T D -> B T D
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPooling(nn.Module):
    """A learned query that attends to all tokens, followed by an MLP with a residual connection (Lee et al. 2019,
    arXiv:1810.00825; Zhai et al. 2022, arXiv:2106.04560, section 3.3)."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = nn.LayerNorm(dim, EPS), FeedForward(dim, hidden)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B N D -> B heads 1 d, B heads N d, B heads N d
        """Return the query, and keys and values of the tokens."""
        dim = x.shape[-1]
        weights, biases = (p.split([dim, 2 * dim]) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(self.query.expand(x.shape[0], -1, -1), weights[0], biases[0]).unflatten(-1, (self.heads, -1))
        k, v = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q.transpose(1, 2), k, v

    def forward(self, x: Tensor) -> Tensor:  # B N D -> B D
        x = self.proj(dot_product_attention(*self.split_heads(x)).transpose(1, 2).flatten(2))[:, 0]
        return x + self.mlp(self.norm(x))

    def attention(self, x: Tensor) -> Tensor:  # B N D -> B heads N
        """Return the attention weights of the query; they sum to 1."""
        q, k, _ = self.split_heads(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]


def init_linear_layers(tower: nn.Module) -> None:
    """Initialize all linear layers of an encoder: uniform by both widths, biases close to zero."""
    for module in tower.modules():
        if isinstance(module, Attention | AttentionPooling):
            for part in module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.qkv.bias)
            nn.init.xavier_uniform_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, FeedForward):
            for layer in (module.up, module.down):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)


class Vision(nn.Module):
    """The image encoder: image -> embedding.

    Raises `DataError` for an image of another size than `image`, and `SettingsError` if an image has no patch.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.side, self.grid = c.image, c.image // c.patch  # a remainder of the image is not read, as at 384 with patches of 14
        if not self.grid:
            raise SettingsError(f"image={c.image} must be at least patch={c.patch}.")
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.pos = nn.Embedding(self.grid**2, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.hidden) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, EPS)
        self.pool = AttentionPooling(c.dim, c.heads, c.hidden)

    def reset_parameters(self) -> None:
        init_linear_layers(self)
        nn.init.normal_(self.patch.weight, std=self.patch.weight[0].numel() ** -0.5)
        assert self.patch.bias is not None
        nn.init.zeros_(self.patch.bias)
        nn.init.normal_(self.pos.weight, std=self.pos.embedding_dim**-0.5)
        nn.init.xavier_uniform_(self.pool.query)

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.
        """
        square = name == "pos.weight" and tensor.ndim == 2 and math.isqrt(len(tensor)) ** 2 == len(tensor)
        return interpolate_pos_embed(tensor, (self.grid, self.grid), first=0) if square else None

    def tokens(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        """Return the embedded patches, before the blocks."""
        if image.shape[2:] != (self.side, self.side):
            raise DataError(
                f"The image has {image.shape[3]} x {image.shape[2]} pixels, but the model was created with image={self.side}."
            )
        return self.patch(image).flatten(2).mT + self.pos.weight

    def features(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        """Return the normalized patches after the blocks."""
        x = self.tokens(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B D
        return self.pool(self.features(image))

    def patch_relevance(self, image: Tensor) -> Tensor:  # B C S S -> B S/P S/P
        """Return the relevance of each patch for the image embedding: attention rollout, read by the learned query."""
        x, maps = self.tokens(image), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(attention_weights(block.attn, block.norm1(x)))
            x = block(x)
        read = self.pool.attention(self.norm(x)).mean(1)  # B N
        return (read[:, None] @ rollout(maps))[:, 0].unflatten(1, (self.grid, self.grid))


class Text(nn.Module):
    """The text encoder: text -> embedding. Texts are padded to `length` here. Raises `DataError` for more tokens."""

    def __init__(self, c: Config):
        super().__init__()
        self.length, self.pad = c.length, c.pad
        self.embed, self.pos = nn.Embedding(c.vocab_size, c.text_dim), nn.Embedding(c.length, c.text_dim)
        self.blocks = nn.ModuleList(Block(c.text_dim, c.text_heads, c.text_hidden) for _ in range(c.text_depth))
        self.norm = nn.LayerNorm(c.text_dim, EPS)
        self.proj = nn.Linear(c.text_dim, c.dim)

    def reset_parameters(self) -> None:
        init_linear_layers(self)
        for weight in (self.embed.weight, self.pos.weight, self.proj.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B E
        if (steps := tokens.shape[1]) > self.length:
            raise DataError(f"The texts have up to {steps} tokens, but the model was created with length={self.length}.")
        if mask is not None:
            tokens = tokens.masked_fill(~mask, self.pad)
        x = self.embed(F.pad(tokens, (0, self.length - steps), value=self.pad)) + self.pos.weight
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, -1]))


class SigLIP(nn.Module):
    """Image and text encoders that return two vectors per pair, whose products are the logits of belonging together.

    The vectors are unit vectors times the square root of exp(`logit_scale`), with one more element: `logit_bias` for images,
    1 for texts.
    """

    heads: ClassVar[tuple[str, ...]] = ("logit_scale", "logit_bias")
    towers: ClassVar[tuple[str, ...]] = ("vision", "text")  # independent encoders

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision, self.text = Vision(config), Text(config)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.vision.reset_parameters()
        self.text.reset_parameters()
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.constant_(self.logit_bias, -10)

    def encode_image(self, image: Tensor) -> Tensor:  # B C S S -> B E
        """Return the image embeddings, of length 1."""
        return F.normalize(self.vision(image), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B E
        """Return the text embeddings, of length 1."""
        return F.normalize(self.text(tokens, mask), dim=-1)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B C S S, B T -> B 2 E+1
        x = torch.stack([self.encode_image(image), self.encode_text(tokens, mask)], 1) * (self.logit_scale / 2).exp()
        bias = torch.cat([self.logit_bias, torch.ones_like(self.logit_bias)])[:, None]  # 2 1
        return torch.cat([x, bias.expand(x.shape[0], -1, -1).to(x.dtype)], 2)

    def attention(self, image: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the relevance of each patch for the image embedding, B C S S -> B h w; sums to 1 and does not depend
        on the text.
        """
        return self.vision.patch_relevance(image)


def map_tower(theirs: str, ours: str) -> dict[str, Row]:
    """Return the weight names of the blocks and positions of one encoder in transformers."""
    layer, block = theirs + "encoder.layers.{i}.", ours + "blocks.{i}."
    names: dict[str, Row] = {
        f"{layer}self_attn.{part}_proj.*": Fused(f"{block}attn.qkv.*", i, 3) for i, part in enumerate("qkv")
    }
    return names | {
        theirs + "embeddings.position_embedding.weight": ours + "pos.weight",
        theirs + "embeddings.position_ids": Dropped("0, 1, 2, ..."),
        layer + "self_attn.out_proj.*": block + "attn.proj.*",
        layer + "layer_norm1.*": block + "norm1.*",
        layer + "layer_norm2.*": block + "norm2.*",
        layer + "mlp.fc1.*": block + "mlp.up.*",
        layer + "mlp.fc2.*": block + "mlp.down.*",
    }


HUGGINGFACE: dict[str, Row] = {
    **map_tower("vision_model.", "vision."),
    "vision_model.embeddings.patch_embedding.*": "vision.patch.*",
    "vision_model.post_layernorm.*": "vision.norm.*",
    "vision_model.head.probe": "vision.pool.query",
    "vision_model.head.attention.in_proj_weight": "vision.pool.qkv.weight",
    "vision_model.head.attention.in_proj_bias": "vision.pool.qkv.bias",
    "vision_model.head.attention.out_proj.*": "vision.pool.proj.*",
    "vision_model.head.layernorm.*": "vision.pool.norm.*",
    "vision_model.head.mlp.fc1.*": "vision.pool.mlp.up.*",
    "vision_model.head.mlp.fc2.*": "vision.pool.mlp.down.*",
    **map_tower("text_model.", "text."),
    "text_model.embeddings.token_embedding.weight": "text.embed.weight",
    "text_model.final_layer_norm.*": "text.norm.*",
    "text_model.head.*": "text.proj.*",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}


def read_padding(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the padding token. Configurations of SigLIP 2 name that of SigLIP, 1, but its texts are padded with 0."""
    text = theirs.get("text_config") or {}
    return {"pad": 0 if text.get("vocab_size") == GEMMA_VOCABULARY else text.get("pad_token_id", 1)}


def read_end(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the end token. Configurations that state none have CLIP's in transformers, but the tokenizers end texts with 1."""
    end = (theirs.get("text_config") or {}).get("eos_token_id", 1)
    return {"end": 1 if end == CLIP_END else end}


def map_tower_config(name: str, ours: str) -> dict[str, ConfigRow]:
    """Return the configuration keys of one encoder in transformers, whose files leave out what equals the base size."""
    defaults = {"hidden_size": ("dim", 768), "num_hidden_layers": ("depth", 12), "num_attention_heads": ("heads", 12)}
    return {
        f"{name}_config.model_type": Expect(f"siglip_{name}_model"),
        **{f"{name}_config.{key}": WithDefault(ours + field, value) for key, (field, value) in defaults.items()},
        f"{name}_config.intermediate_size": WithDefault(f"{ours}hidden", 3072),
        f"{name}_config.hidden_act": Expect("gelu_pytorch_tanh"),
        f"{name}_config.layer_norm_eps": Expect(EPS),
        f"{name}_config.attention_dropout": Expect(0.0),
    }


CONFIG: dict[str, ConfigRow] = {  # keys of transformers
    "model_type": Expect("siglip"),
    "architectures": Expect(["SiglipModel"]),
    **map_tower_config("vision", ""),
    "vision_config.num_channels": WithDefault("channels", 3),
    "vision_config.image_size": WithDefault("image", 224),
    "vision_config.patch_size": WithDefault("patch", 16),
    "vision_config.vision_use_head": Expect(True, written=False),
    **map_tower_config("text", "text_"),
    "text_config.vocab_size": WithDefault("vocab_size", 32_000),
    "text_config.max_position_embeddings": WithDefault("length", 64),
    "text_config.pad_token_id": Derived(read_padding, lambda c: c.pad),
    "text_config.eos_token_id": Derived(read_end, lambda c: c.end),
    "text_config.projection_size": Expect(lambda c: c.dim),
}


LARGE = {
    **{"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    **{"text_dim": 1024, "text_depth": 24, "text_heads": 16, "text_hidden": 4096},
}
SO400M_TEXT = {"text_dim": 1152, "text_depth": 27, "text_heads": 16, "text_hidden": 4304}
SO400M = {"dim": 1152, "depth": 27, "heads": 16, "hidden": 4304, **SO400M_TEXT}
GIANT = {"dim": 1536, "depth": 40, "heads": 16, "hidden": 6144, **SO400M_TEXT}
I18N = {"vocab_size": 250_000}
V2 = {"vocab_size": GEMMA_VOCABULARY, "pad": 0}
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {  # our name -> (name on the hub, parameters, config)
    "siglip-b16-224": ("siglip-base-patch16-224", 203_155_970, {}),
    "siglip-b16-256": ("siglip-base-patch16-256", 203_202_050, {"image": 256}),
    "siglip-b16-384": ("siglip-base-patch16-384", 203_447_810, {"image": 384}),
    "siglip-b16-512": ("siglip-base-patch16-512", 203_791_874, {"image": 512}),
    "siglip-b16-256-multilingual": ("siglip-base-patch16-256-multilingual", 370_626_050, {"image": 256, **I18N}),
    "siglip-l16-256": ("siglip-large-patch16-256", 652_150_786, {"image": 256, **LARGE}),
    "siglip-l16-384": ("siglip-large-patch16-384", 652_478_466, {"image": 384, **LARGE}),
    "siglip-so400m-14-224": ("siglip-so400m-patch14-224", 877_360_306, {"patch": 14, "length": 16, **SO400M}),
    "siglip-so400m-14-384": ("siglip-so400m-patch14-384", 877_960_498, {"patch": 14, "image": 384, **SO400M}),
    "siglip-so400m-16-256-i18n": ("siglip-so400m-patch16-256-i18n", 1_128_758_962, {"image": 256, **SO400M, **I18N}),
    "siglip2-b32-256": ("siglip2-base-patch32-256", 376_856_066, {"patch": 32, "image": 256, **V2}),
    "siglip2-b16-224": ("siglip2-base-patch16-224", 375_187_970, V2),
    "siglip2-b16-256": ("siglip2-base-patch16-256", 375_234_050, {"image": 256, **V2}),
    "siglip2-b16-384": ("siglip2-base-patch16-384", 375_479_810, {"image": 384, **V2}),
    "siglip2-b16-512": ("siglip2-base-patch16-512", 375_823_874, {"image": 512, **V2}),
    "siglip2-l16-256": ("siglip2-large-patch16-256", 881_526_786, {"image": 256, **LARGE, **V2}),
    "siglip2-l16-384": ("siglip2-large-patch16-384", 881_854_466, {"image": 384, **LARGE, **V2}),
    "siglip2-l16-512": ("siglip2-large-patch16-512", 882_313_218, {"image": 512, **LARGE, **V2}),
    "siglip2-so400m-14-224": ("siglip2-so400m-patch14-224", 1_135_463_602, {"patch": 14, **SO400M, **V2}),
    "siglip2-so400m-14-384": ("siglip2-so400m-patch14-384", 1_136_008_498, {"patch": 14, "image": 384, **SO400M, **V2}),
    "siglip2-so400m-16-256": ("siglip2-so400m-patch16-256", 1_135_670_962, {"image": 256, **SO400M, **V2}),
    "siglip2-so400m-16-384": ("siglip2-so400m-patch16-384", 1_136_039_602, {"image": 384, **SO400M, **V2}),
    "siglip2-so400m-16-512": ("siglip2-so400m-patch16-512", 1_136_555_698, {"image": 512, **SO400M, **V2}),
    "siglip2-giant-16-256": ("siglip2-giant-opt-patch16-256", 1_871_393_906, {"image": 256, **GIANT, **V2}),
    "siglip2-giant-16-384": ("siglip2-giant-opt-patch16-384", 1_871_885_426, {"image": 384, **GIANT, **V2}),
}
# Sizes for training from scratch on images of 64 pixels.
MINI: dict[str, Any] = {
    **{"image": 64, "patch": 8, "dim": 128, "depth": 4, "heads": 2, "hidden": 512, "vocab_size": 4096, "length": 32},
    **{"end": 3, "pad": 0, "text_dim": 128, "text_depth": 2, "text_heads": 2, "text_hidden": 512},
}
TEST: dict[str, Any] = {
    **{"channels": 2, "image": 14, "patch": 4, "dim": 16, "depth": 2, "heads": 2, "hidden": 24, "vocab_size": 30},
    **{"length": 12, "end": 29, "pad": 3, "text_dim": 12, "text_depth": 2, "text_heads": 3, "text_hidden": 20},
}

CARD = Card(
    name="siglip",
    model=SigLIP,
    config=Config,
    paper="arXiv:2303.15343",
    year=2023,
    input_type="captioned",
    output_type="sigmoid-embeddings",
    sizes={
        **{name: Size(params=count, source=f"google/{hub}", **changes) for name, (hub, count, changes) in PUBLISHED.items()},
        "siglip-mini": Size(**MINI),
        "siglip-test": Size(**TEST),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    scale=HALF,
    recipe={
        "optimizer": "muon",
        "lr": 4e-3,
        "momentum": 0.95,
        "weight_decay": 0.2,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "warmup": 0.1,
    },
)
