"""ViT: a Transformer on a sequence of image patches (Dosovitskiy et al. 2020, arXiv:2010.11929).

New here: no convolution except the patch embedding, so locality is not built in: position embeddings are learned, and
the class is predicted from an additional class token. With little data convolutional networks are better; with much
data, or with a teacher (DeiT), ViT is.

The `eps` of the normalization layers is 1e-6 in the authors' code, timm, torchvision and here; transformers uses
1e-12 for the same weights, and `fieldguide.load` reads it from the configuration. A weights file alone does not
contain it: set `eps=1e-12`.
Initialization: truncated N(0, 0.02) as in DeiT (arXiv:2012.12877), with a standard deviation larger by sqrt(768 / D)
if D is less than 768; zero biases. The authors' Xavier initialization with position embeddings N(0, 0.02) makes the
position embeddings too small at first and trained much more slowly on small data sets.
Shapes: B batch, C channels, H W image height and width, P patch size, h w = H/P W/P, N = 1 + h w, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.patches import Patches, choose_patch_size, interpolate_pos_embed
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.mapping.config_rules import ConfigRow, Expect, LabelCount, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # label, or vector: the features before the classifier
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 224  # image side of the trained position embeddings; other sizes are interpolated
    patch: int = 16  # P
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    eps: float = 1e-6  # epsilon of the normalization layers
    dropout: float = 0.0
    drop_path: float = 0.0  # stochastic depth rate of the last block; increases linearly from 0


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, c: Config, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.eps)
        self.attn = Attention(c.dim, c.heads)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c.dim, 4 * c.dim, c.dropout)
        self.dropout, self.drop_path = nn.Dropout(c.dropout), DropPath(drop_path)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:  # B N D -> B N D, or B num_queries D
        """Return the output of all tokens, or of the first `num_queries` tokens only."""
        x = x[:, :num_queries] + self.drop_path(self.dropout(self.attn(self.norm1(x), num_queries=num_queries)))
        return x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """An image classifier for images of any size; `features` returns the patch features after four evenly spaced blocks.

    Position embeddings are interpolated for images of another size, and when weights trained at another size are
    loaded.
    """

    num_prefix_tokens = 1  # number of tokens before the patches
    heads: ClassVar[tuple[str, ...]] = ("head",)  # parts that a checkpoint may lack or have in another shape

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.patch = Patches(c.channels, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.pos = nn.Embedding(self.num_prefix_tokens + math.ceil(c.image / c.patch) ** 2, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, p) for p in stochastic_depth_rates(c.drop_path, c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        self.make_head()
        self.reset_parameters()

    def make_head(self) -> None:
        self.head = classifier_head(self.config, self.config.dim)

    def reset_parameters(self) -> None:
        std = 0.02 * max(768 / self.config.dim, 1) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for token in self.parameters(recurse=False):
            nn.init.trunc_normal_(token, std=std)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Feature name -> (channels D, stride in pixels) of what `features` returns."""
        depth = self.config.depth
        return {f"b{i}": (self.config.dim, self.config.patch) for i in sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0})}

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.
        """
        grid = math.isqrt(max(len(tensor) - self.num_prefix_tokens, 0)) if tensor.ndim == 2 else 0
        if name != "pos.weight" or not grid or len(tensor) != self.num_prefix_tokens + grid**2:
            return None
        side = math.isqrt(len(self.pos.weight) - self.num_prefix_tokens)
        return interpolate_pos_embed(tensor, (side, side), first=self.num_prefix_tokens)

    def prefix_tokens(self) -> Tensor:  # -> first D
        """Return the tokens before the patches."""
        return self.cls[None]

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:  # B C H W -> B N D, (h, w)
        """Return the embedded tokens and the size of the patch grid."""
        x = self.patch(image)
        size = tuple(x.shape[2:])
        x = torch.cat([self.prefix_tokens().to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)
        return self.dropout(x + interpolate_pos_embed(self.pos.weight, size, first=self.num_prefix_tokens)), size

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"b3": B D h w, ...}
        """Return the feature maps described by `levels`."""
        x, size = self.tokens(image)
        found = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if f"b{i}" in self.levels:
                found[f"b{i}"] = x[:, self.num_prefix_tokens :].mT.unflatten(2, size)
        return found

    def prefix_features(self, image: Tensor) -> Tensor:  # B C H W -> B first D
        """Return the normalized final features of the prefix tokens."""
        x, _ = self.tokens(image)
        for i, block in enumerate(self.blocks, 1):  # the last block computes the prefix tokens only
            x = block(x, self.num_prefix_tokens if i == len(self.blocks) else None)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        return self.head(self.prefix_features(image)[:, 0])


def map_token(name: str) -> Reshaped:
    """Return the rule for a token: D here, 1 1 D in the public file."""
    return Reshaped(name, here=(-1,), there=(1, 1, -1))


def map_pos_embed(c: Config) -> Reshaped:
    """Return the rule for the position embeddings: N D here, 1 N D in the public file."""
    return Reshaped("pos.weight", here=(-1, c.dim), there=(1, -1, c.dim))


def timm(c: Config) -> dict[str, Row]:
    """Return the weight names of timm."""
    return {
        "cls_token": map_token("cls"),
        "pos_embed": map_pos_embed(c),
        "patch_embed.proj.*": "patch.*",
        "blocks.{i}.norm1.*": "blocks.{i}.norm1.*",
        "blocks.{i}.attn.qkv.*": "blocks.{i}.attn.qkv.*",
        "blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
        "blocks.{i}.norm2.*": "blocks.{i}.norm2.*",
        "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.up.*",
        "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.down.*",
        "norm.*": "norm.*",
        "head.*": "head.*",
    }


def torchvision(c: Config) -> dict[str, Row]:
    """Return the weight names of torchvision."""
    layer = "encoder.layers.encoder_layer_{i}."
    return {
        "class_token": map_token("cls"),
        "encoder.pos_embedding": map_pos_embed(c),
        "conv_proj.*": "patch.*",
        layer + "ln_1.*": "blocks.{i}.norm1.*",
        layer + "self_attention.in_proj_weight": "blocks.{i}.attn.qkv.weight",
        layer + "self_attention.in_proj_bias": "blocks.{i}.attn.qkv.bias",
        layer + "self_attention.out_proj.*": "blocks.{i}.attn.proj.*",
        layer + "ln_2.*": "blocks.{i}.norm2.*",
        layer + "mlp.0.*": "blocks.{i}.mlp.up.*",
        layer + "mlp.3.*": "blocks.{i}.mlp.down.*",
        layer + "mlp.linear_1.*": "blocks.{i}.mlp.up.*",  # in the first published files
        layer + "mlp.linear_2.*": "blocks.{i}.mlp.down.*",
        "encoder.ln.*": "norm.*",
        "heads.head.*": "head.*",
    }


def huggingface(c: Config, root: str = "vit.") -> dict[str, Row]:
    """Return the weight names of ViTForImageClassification, ViTModel (`root` is "") and related models, except for their
    heads.
    """
    layer, block = root + "encoder.layer.{i}.", "blocks.{i}."
    names: dict[str, Row] = {
        root + "embeddings.cls_token": map_token("cls"),
        root + "embeddings.position_embeddings": map_pos_embed(c),
        root + "embeddings.patch_embeddings.projection.*": "patch.*",
        root + "layernorm.*": "norm.*",
        root + "pooler.dense.*": Dropped("unused pooling layer"),
        "classifier.*": "head.*",
    }
    names |= {
        f"{layer}attention.attention.{part}.*": Fused(block + "attn.qkv.*", i, 3)
        for i, part in enumerate(("query", "key", "value"))
    }
    return names | {
        layer + "attention.output.dense.*": block + "attn.proj.*",
        layer + "layernorm_before.*": block + "norm1.*",
        layer + "layernorm_after.*": block + "norm2.*",
        layer + "intermediate.dense.*": block + "mlp.up.*",
        layer + "output.dense.*": block + "mlp.down.*",
    }


def map_config(model_type: str, architecture: ValueMap) -> dict[str, ConfigRow]:
    """Return the configuration keys of ViT and DeiT in transformers, whose default eps differs."""
    return {
        "model_type": Expect(model_type),
        "architectures": architecture,
        "id2label": LabelCount("num_classes"),
        "num_channels": "channels",
        "image_size": "image",
        "patch_size": "patch",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": Expect(lambda c: 4 * c.dim),
        "layer_norm_eps": WithDefault("eps", 1e-12),
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": Expect(0.0),
        "drop_path_rate": WithDefault("drop_path", 0.0),  # ours only; transformers ignores it
        "hidden_act": Expect("gelu"),
        "qkv_bias": Expect(True),
    }


L = {"dim": 1024, "depth": 24, "heads": 16}
H = {"patch": 14, "dim": 1280, "depth": 32, "heads": 16}

CARD = Card(
    name="vit",
    model=ViT,
    config=Config,
    paper="arXiv:2010.11929",
    year=2020,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: {"patch": patch} if (patch := choose_patch_size(need["image"])) else {},
    sizes={
        "vit-b16": Size(params=86_567_656, source="timm vit_base_patch16_224, torchvision vit_b_16"),
        "vit-b32": Size(patch=32, params=88_224_232, source="timm vit_base_patch32_224, torchvision vit_b_32"),
        "vit-b8": Size(patch=8, params=86_576_872, source="timm vit_base_patch8_224"),
        "vit-b16-384": Size(image=384, params=86_859_496, source="timm vit_base_patch16_384"),
        "vit-b32-384": Size(patch=32, image=384, params=88_297_192, source="google/vit-base-patch32-384"),
        "vit-ti16": Size(dim=192, heads=3, params=5_717_416, source="timm vit_tiny_patch16_224, deit_tiny_patch16_224"),
        "vit-s16": Size(dim=384, heads=6, params=22_050_664, source="timm vit_small_patch16_224, deit_small_patch16_224"),
        "vit-s32": Size(dim=384, heads=6, patch=32, params=22_878_952, source="timm vit_small_patch32_224"),
        "vit-l16": Size(**L, params=304_326_632, source="timm vit_large_patch16_224, torchvision vit_l_16"),
        "vit-l32": Size(**L, patch=32, params=306_535_400, source="torchvision vit_l_32"),
        "vit-h14": Size(**H, params=632_045_800, source="torchvision vit_h_14 at 224 pixels"),
        # For training from scratch on small images.
        "vit-mini": Size(dim=128, depth=6, heads=4, image=32, patch=4, num_classes=10, drop_path=0.1),
        "vit-test": Size(dim=16, depth=3, heads=2, image=12, patch=4, channels=2, num_classes=5, drop_path=0.0),
    },
    weights={
        "timm": timm,
        "torchvision": torchvision,
        "huggingface": huggingface,
        "huggingface-base": lambda c: huggingface(c, ""),
    },
    configs={"huggingface": map_config("vit", architectures("ViT"))},
    aliases={
        "timm": {
            "vit_base_patch16_224": "vit-b16",
            "vit_base_patch32_224": "vit-b32",
            "vit_base_patch8_224": "vit-b8",
            "vit_base_patch16_384": "vit-b16-384",
            "vit_base_patch32_384": "vit-b32-384",
            "vit_tiny_patch16_224": "vit-ti16",
            "vit_small_patch16_224": "vit-s16",
            "vit_small_patch32_224": "vit-s32",
            "vit_large_patch16_224": "vit-l16",
            "vit_large_patch32_224": "vit-l32",
            "deit_base_patch16_224": "vit-b16",
            "deit_base_patch16_384": "vit-b16-384",
            "deit_tiny_patch16_224": "vit-ti16",
            "deit_small_patch16_224": "vit-s16",
            "vit_small_patch16_384": ("vit-s16", {"image": 384}),
            "vit_tiny_patch16_384": ("vit-ti16", {"image": 384}),
            "vit_large_patch16_384": ("vit-l16", {"image": 384}),
            "vit_large_patch32_384": ("vit-l32", {"image": 384}),
        }
    },
    # Table 9 of DeiT for batches of 1024, without mixup and cutmix, which pay off after hundreds of epochs (--set
    # mixup=0.8).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
)
