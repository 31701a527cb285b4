"""ViT: a picture as a row of patches, read by a plain Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

New here: no convolution but the cut into patches, so nothing says that neighbours belong together: places are learnt, and
the class is read at one token more. With little data convolutions win; with much, or a teacher (DeiT), this does.

The normalisations' `eps` is 1e-6 in the authors' code, timm and torchvision, and here; transformers has 1e-12 in its copies
of the same weights, which `fieldguide.load` reads in their configuration. A lone file does not say it: set `eps=1e-12`.
Initialisation: truncated N(0, 0.02) as in DeiT (arXiv:2012.12877), wider by the root where D is less than 768; zero biases.
The authors' own, Xavier with places N(0, 0.02), hardly sees places at first, and learnt far slower from small data.
Shapes: B batch, C channels, H W height and width of the picture, P side of a patch, h w = H/P W/P, N = 1 + h w, D width.
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
from fieldguide.models.layers.patches import Patches, interpolate_pos_embed, patch_for
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.mapping.config_rules import Absent, ConfigRow, Counted, Is, Known
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # or vector: what a label would be read from
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 224  # side of the pictures that places are learnt for; others may come
    patch: int = 16  # P
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    eps: float = 1e-6  # of the normalisations
    dropout: float = 0.0
    drop_path: float = 0.0  # of the last block; earlier ones less


class Block(nn.Module):
    """Attention, then a two-layer network; each normalises its input and adds its result."""

    def __init__(self, c: Config, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.eps)
        self.attn = Attention(c.dim, c.heads)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c.dim, 4 * c.dim, c.dropout)
        self.dropout, self.drop_path = nn.Dropout(c.dropout), DropPath(drop_path)

    def forward(self, x: Tensor, predict_options: int | None = None) -> Tensor:  # B N D -> B N D, or B asking D
        x = x[:, :predict_options] + self.drop_path(self.dropout(self.attn(self.norm1(x), predict_options=predict_options)))
        return x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """A picture of any size -> class logits; `features` gives the patches after four blocks, evenly spread.

    Places are spread over pictures of another size, when they come and when weights learnt at another are loaded.
    """

    first = 1  # tokens before the patches
    heads: ClassVar[tuple[str, ...]] = ("head",)  # a checkpoint may have none, or others

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.patch = Patches(c.channels, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.pos = nn.Embedding(self.first + math.ceil(c.image / c.patch) ** 2, c.dim)
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
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
        for token in self.parameters(recurse=False):
            nn.init.trunc_normal_(token, std=std)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Name -> (D, stride in pixels) of what `features` gives."""
        depth = self.config.depth
        return {f"b{i}": (self.config.dim, self.config.patch) for i in sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0})}

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Places learnt for pictures of another size, spread over those of this network."""
        grid = math.isqrt(max(len(tensor) - self.first, 0)) if tensor.ndim == 2 else 0
        if name != "pos.weight" or not grid or len(tensor) != self.first + grid**2:
            return None
        side = math.isqrt(len(self.pos.weight) - self.first)
        return interpolate_pos_embed(tensor, (side, side), first=self.first)

    def before(self) -> Tensor:  # -> first D
        """The tokens before the patches."""
        return self.cls[None]

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:  # B C H W -> B N D, (h, w)
        x = self.patch(image)
        size = tuple(x.shape[2:])
        x = torch.cat([self.before().to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)
        return self.dropout(x + interpolate_pos_embed(self.pos.weight, size, first=self.first)), size

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"b3": B D h w, ...}
        x, size = self.tokens(image)
        found = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if f"b{i}" in self.levels:
                found[f"b{i}"] = x[:, self.first :].mT.unflatten(2, size)
        return found

    def read(self, image: Tensor) -> Tensor:  # B C H W -> B first D, the tokens that answers are read at
        x, _ = self.tokens(image)
        for i, block in enumerate(self.blocks, 1):  # of the last, nobody asks for the other places
            x = block(x, self.first if i == len(self.blocks) else None)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        return self.head(self.read(image)[:, 0])


def token(name: str) -> Reshaped:
    """A token of ours, D there 1 1 D."""
    return Reshaped(name, here=(-1,), there=(1, 1, -1))


def places(c: Config) -> Reshaped:
    """Places of ours, N D there 1 N D."""
    return Reshaped("pos.weight", here=(-1, c.dim), there=(1, -1, c.dim))


def timm(c: Config) -> dict[str, Row]:
    return {
        "cls_token": token("cls"),
        "pos_embed": places(c),
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
    layer = "encoder.layers.encoder_layer_{i}."
    return {
        "class_token": token("cls"),
        "encoder.pos_embedding": places(c),
        "conv_proj.*": "patch.*",
        layer + "ln_1.*": "blocks.{i}.norm1.*",
        layer + "self_attention.in_proj_weight": "blocks.{i}.attn.qkv.weight",
        layer + "self_attention.in_proj_bias": "blocks.{i}.attn.qkv.bias",
        layer + "self_attention.out_proj.*": "blocks.{i}.attn.proj.*",
        layer + "ln_2.*": "blocks.{i}.norm2.*",
        layer + "mlp.0.*": "blocks.{i}.mlp.up.*",
        layer + "mlp.3.*": "blocks.{i}.mlp.down.*",
        layer + "mlp.linear_1.*": "blocks.{i}.mlp.up.*",  # in its first files
        layer + "mlp.linear_2.*": "blocks.{i}.mlp.down.*",
        "encoder.ln.*": "norm.*",
        "heads.head.*": "head.*",
    }


def huggingface(c: Config, root: str = "vit.") -> dict[str, Row]:
    """Names of ViTForImageClassification, of ViTModel (`root` is ""), and of its relatives but for their heads."""
    layer, block = root + "encoder.layer.{i}.", "blocks.{i}."
    names: dict[str, Row] = {
        root + "embeddings.cls_token": token("cls"),
        root + "embeddings.position_embeddings": places(c),
        root + "embeddings.patch_embeddings.projection.*": "patch.*",
        root + "layernorm.*": "norm.*",
        root + "pooler.dense.*": Dropped("a layer that ViT has not"),
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


def configuration(model_type: str, architecture: Known) -> dict[str, ConfigRow]:
    """Keys of transformers' configurations of ViT and DeiT, whose eps is another where they do not say it."""
    return {
        "model_type": Is(model_type),
        "architectures": architecture,
        "id2label": Counted("num_classes"),
        "num_channels": "channels",
        "image_size": "image",
        "patch_size": "patch",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": Is(lambda c: 4 * c.dim),
        "layer_norm_eps": Absent("eps", 1e-12),
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": Is(0.0),
        "drop_path_rate": Absent("drop_path", 0.0),  # which transformers does not have here, and does not mind
        "hidden_act": Is("gelu"),
        "qkv_bias": Is(True),
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
    adapt=lambda need: {"patch": patch} if (patch := patch_for(need["image"])) else {},
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
        # To be trained from nothing on small pictures.
        "vit-mini": Size(dim=128, depth=6, heads=4, image=32, patch=4, num_classes=10, drop_path=0.1),
        "vit-test": Size(dim=16, depth=3, heads=2, image=12, patch=4, channels=2, num_classes=5, drop_path=0.0),
    },
    weights={
        "timm": timm,
        "torchvision": torchvision,
        "huggingface": huggingface,
        "huggingface-base": lambda c: huggingface(c, ""),
    },
    configs={"huggingface": configuration("vit", architectures("ViT"))},
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
    # Table 9 of DeiT for batches of 1024, without mixing pictures, which pays in hundreds of epochs (--set mixup=0.8).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
)
