"""DINOv3: a self-supervised ViT with rotary positions (Siméoni et al. 2025, arXiv:2508.10104).

New here: self-supervision at 7 billion parameters, whose patch features stay sharp in long training because they are held close
to those of an earlier network (Gram anchoring); smaller sizes are distilled from it. Positions are rotations of queries and keys
by the coordinates of the patches, between -1 and 1 in each image, so that no table of position embeddings has to be
interpolated. In training, all coordinates are multiplied by one random factor up to `rescale`, or divided by it.
`features` returns the patch features after the last normalization.

The class token and the registers are not rotated, and keys have no bias. The first half of the rotated pairs belongs to rows, the
second to columns. The public files are encoders; the head here reads the class token and the mean of the patches, as the linear
classifier of the authors does.
Initialization: truncated N(0, 0.02), with a standard deviation larger by sqrt(768 / D) if D is less than 768; LayerScale with
`scale`; zero biases.
Shapes: B batch, C channels, H W image height and width, P patch size, R registers, h w = H/P W/P, N = 1 + R + h w, D width, d
width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, classifier_head
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.patches import Patches, choose_patch_size
from fieldguide.models.layers.rope import rotate
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.config_rules import Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Reshaped, Row, Zeros

EPS = 1e-5  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # label, or vector: the class token
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 224  # image side of the training; other sizes need no change
    patch: int = 16  # P
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width of the MLP
    gated: bool = False  # SwiGLU instead of the MLP
    bias: bool = True  # biases of queries and values; keys have none
    registers: int = 4  # R
    rope_theta: float = 100.0  # wavelengths are 1 to nearly rope_theta, where an image is 2 wide
    rescale: float = 2.0  # maximum random factor of the coordinates in training; 1: none
    scale: float = 1e-5  # initial LayerScale value
    drop_path: float = 0.0  # stochastic depth rate, equal for all blocks


class SwiGLU(nn.Module):
    """A SwiGLU MLP (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RotaryAttention(nn.Module):
    """Self-attention with rotated queries and keys, and without a bias of keys."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.bias = nn.Parameter(torch.empty(2 * c.dim)) if c.bias else None  # of queries and values
        self.proj = nn.Linear(c.dim, c.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # B N D, N d, N d -> B N D
        bias = None
        if self.bias is not None:
            q, v = self.bias.chunk(2)
            bias = torch.cat([q, torch.zeros_like(q), v])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm Transformer block with LayerScale (arXiv:2103.17239) on both residual branches."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=EPS), nn.LayerNorm(c.dim, eps=EPS)
        self.attn, self.mlp = RotaryAttention(c), (SwiGLU if c.gated else Mlp)(c.dim, c.hidden)
        self.scale1, self.scale2 = nn.Parameter(torch.empty(c.dim)), nn.Parameter(torch.empty(c.dim))
        self.drop_path = DropPath(c.drop_path)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # B N D, N d, N d -> B N D
        x = x + self.drop_path(self.scale1 * self.attn(self.norm1(x), cos, sin))
        return x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))


class DINOv3(nn.Module):
    """An image classifier for images of any size, on the class token and the mean of the patches; or the class token itself.

    Raises `SettingsError` if the width of a head is not a multiple of 4, or `rescale` is less than 1.
    """

    heads: ClassVar[tuple[str, ...]] = ("head",)  # parts that a checkpoint may lack or have in another shape

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % (4 * c.heads):
            raise SettingsError(f"dim={c.dim} must be divisible by 4*heads={4 * c.heads}: rows and columns rotate pairs.")
        if c.rescale < 1:
            raise SettingsError(f"rescale={c.rescale} must be at least 1.")
        self.patch = Patches(c.channels, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.register_buffer("mask", torch.zeros(1, c.dim))  # mask token of the pre-training; kept for export
        self.registers = nn.Embedding(c.registers, c.dim) if c.registers else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=EPS)
        self.head = classifier_head(c, 2 * c.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * max(768 / self.config.dim, 1) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d | RotaryAttention) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Block):
                nn.init.constant_(module.scale1, self.config.scale)
                nn.init.constant_(module.scale2, self.config.scale)
        nn.init.trunc_normal_(self.cls, std=std)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Feature name -> (channels D, stride in pixels) of what `features` returns."""
        depth = self.config.depth
        return {f"b{i}": (self.config.dim, self.config.patch) for i in sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0})}

    def rotations(self, size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:  # (h, w) -> N d, N d
        """Return cosines and sines for `rotate`, computed in at least float32; the prefix tokens are not rotated.

        The angles are the coordinates of the centers of the patches, in units of the wavelengths.
        """
        c, wide = self.config, torch.promote_types(like.dtype, torch.float32)
        single: Any = {"dtype": torch.float32, "device": like.device}
        sides = [2 * (torch.arange(0.5, n, **single) / n) - 1 for n in size]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)  # h w, 2
        if self.training and c.rescale > 1:
            most = math.log(c.rescale)
            places = places * torch.empty(1, **single).uniform_(-most, most).exp()
        speed = 1 / c.rope_theta ** torch.arange(0, 1, 4 * c.heads / c.dim, **single)  # d/4
        angle = ((2 * math.pi * places).to(wide)[:, :, None] * speed.to(wide)).flatten(1)  # h w, d/2
        angle = F.pad(angle, (0, 0, 1 + c.registers, 0))
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], 1).to(like.dtype), torch.cat([-sin, sin], 1).to(like.dtype)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:  # B C H W -> B N D, (h, w)
        """Return the embedded tokens and the size of the patch grid."""
        x = self.patch(image)
        first = self.cls[None] if self.registers is None else torch.cat([self.cls[None], self.registers.weight])
        return torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(2).mT], 1), tuple(x.shape[2:])

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"b3": B D h w, ...}
        """Return the feature maps described by `levels`."""
        x, size = self.tokens(image)
        cos, sin = self.rotations(size, x)
        found = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x, cos, sin)
            if f"b{i}" in self.levels:
                found[f"b{i}"] = self.norm(x[:, 1 + self.config.registers :]).mT.unflatten(2, size)
        return found

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        x, size = self.tokens(image)
        cos, sin = self.rotations(size, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        if self.config.output_type == "vector":
            return self.norm(x[:, 0])
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 1 + self.config.registers :].mean(1)], 1))


def map_tokens(c: Config, cls: str, registers: str) -> dict[str, Row]:
    """Return the rules for the class token and the registers."""
    return {
        cls: Reshaped("cls", here=(-1,), there=(1, 1, -1)),
        registers: Reshaped("registers.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
    }


def huggingface(c: Config) -> dict[str, Row]:
    """Return the names of DINOv3ViTModel, and those of a head that it lacks."""
    layer, block = "layer.{i}.", "blocks.{i}."
    names: dict[str, Row] = {
        **map_tokens(c, "embeddings.cls_token", "embeddings.register_tokens"),
        "embeddings.mask_token": Reshaped("mask", here=(1, -1), there=(1, 1, -1)),
        "embeddings.patch_embeddings.*": "patch.*",
        "norm.*": "norm.*",
        "classifier.*": "head.*",
    }
    for i, part in enumerate(("q", "k", "v")):
        names[f"{layer}attention.{part}_proj.weight"] = Fused(block + "attn.qkv.weight", i, 3)
    return names | {
        layer + "attention.q_proj.bias": Fused(block + "attn.bias", 0, 2),
        layer + "attention.v_proj.bias": Fused(block + "attn.bias", 1, 2),
        layer + "attention.o_proj.*": block + "attn.proj.*",
        layer + "layer_scale{k}.lambda1": block + "scale{k}",
        layer + "norm{k}.*": block + "norm{k}.*",
        layer + "mlp.gate_proj.*": block + "mlp.gate.*",
        layer + "mlp.up_proj.*": block + "mlp.up.*",
        layer + "mlp.down_proj.*": block + "mlp.down.*",
    }


def timm(c: Config) -> dict[str, Row]:
    """Return the names of timm, whose networks have no mask token."""
    block = "blocks.{i}."
    return {
        **map_tokens(c, "cls_token", "reg_token"),
        "patch_embed.proj.*": "patch.*",
        "norm.*": "norm.*",
        "head.*": "head.*",
        "<no mask token>": Zeros("mask", like="blocks.0.attn.qkv.weight"),
        block + "attn.qkv.weight": block + "attn.qkv.weight",
        block + "attn.q_bias": Fused(block + "attn.bias", 0, 2),
        block + "attn.v_bias": Fused(block + "attn.bias", 1, 2),
        block + "attn.proj.*": block + "attn.proj.*",
        block + "gamma_{k}": block + "scale{k}",
        block + "norm{k}.*": block + "norm{k}.*",
        block + "mlp.fc1_g.*": block + "mlp.gate.*",
        block + ("mlp.fc1_x.*" if c.gated else "mlp.fc1.*"): block + "mlp.up.*",
        block + "mlp.fc2.*": block + "mlp.down.*",
    }


CONFIG = {  # keys of transformers
    "model_type": Expect("dinov3_vit"),
    "architectures": ValueMap("output_type", {"DINOv3ViTModel": "vector"}),
    "num_channels": "channels",
    "image_size": "image",
    "patch_size": "patch",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "use_gated_mlp": "gated",
    "hidden_act": Expect(lambda c: "silu" if c.gated else "gelu"),
    "query_bias": WithDefault("bias", True),
    "value_bias": Expect(lambda c: c.bias),
    "key_bias": Expect(False),
    "proj_bias": Expect(True),
    "mlp_bias": Expect(True),
    "num_register_tokens": WithDefault("registers", 0),
    "rope_theta": WithDefault("rope_theta", 100.0),
    "pos_embed_rescale": Derived(
        lambda theirs: {"rescale": theirs.get("pos_embed_rescale", 2.0) or 1.0}, lambda c: c.rescale if c.rescale > 1 else None
    ),
    "pos_embed_shift": Expect(None),
    "pos_embed_jitter": Expect(None),
    "layerscale_value": WithDefault("scale", 1.0),
    "drop_path_rate": WithDefault("drop_path", 0.0),
    "layer_norm_eps": Expect(EPS),
    "attention_dropout": Expect(0.0),
}
SIZES = {  # name, name at timm, fields, parameters without the mask token
    "s16": ("small", {"dim": 384, "heads": 6, "hidden": 1536}, 21_596_160),
    "s16-plus": ("small_plus", {"dim": 384, "heads": 6, "hidden": 1536, "gated": True}, 28_692_480),
    "b16": ("base", {}, 85_659_648),
    "l16": ("large", {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096}, 303_128_576),
    "h16-plus": ("huge_plus", {"dim": 1280, "depth": 32, "heads": 20, "hidden": 5120, "gated": True}, 840_591_360),
    "7b16": (
        "7b",
        {"dim": 4096, "depth": 40, "heads": 32, "hidden": 8192, "gated": True, "bias": False},
        6_716_030_976,
    ),
}
NAMES = {name: f"facebook/dinov3-vit{name.replace('-', '')}-pretrain-lvd1689m" for name in SIZES}
BUT = "without the mask token of D parameters, which only pre-training uses"

CARD = Card(
    name="dinov3",
    model=DINOv3,
    config=Config,
    paper="arXiv:2508.10104",
    year=2025,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: {"patch": patch} if (patch := choose_patch_size(need["image"])) else {},
    sizes={
        **{
            f"dinov3-{name}": Size(output_type="vector", **fields, params=params, source=f"{NAMES[name]}, {BUT}")
            for name, (_, fields, params) in SIZES.items()
        },
        # For training from scratch on small images.
        "dinov3-mini": Size(dim=128, depth=6, heads=4, hidden=512, image=32, patch=4, num_classes=10),
        "dinov3-test": Size(
            dim=16,
            depth=3,
            heads=2,
            hidden=24,
            image=12,
            patch=4,
            channels=2,
            num_classes=5,
            gated=True,
            registers=3,
            rescale=1.0,
        ),
    },
    weights={"huggingface": huggingface, "timm": timm},
    configs={"huggingface": CONFIG},
    aliases={
        "timm": {
            f"vit_{theirs}_patch16_dinov3{end}": (f"dinov3-{name}", {"bias": bool(end)})
            for name, (theirs, _, _) in SIZES.items()
            for end in (("",) if name == "7b16" else ("", "_qkvb"))  # without biases, where those of the authors are zeros
        }
    },
    # As for a ViT trained on labels from scratch (DeiT, arXiv:2012.12877, table 9).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
)
