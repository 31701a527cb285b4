"""BEiT: a ViT pre-trained to predict hidden patches, as BERT does words (Bao et al. 2021, arXiv:2106.08254).

New here: masked image modeling. Images are also tokens of a discrete autoencoder, and the network predicts those of hidden
patches, so that it needs no labels. The network itself has no position embeddings; each layer adds a learned bias to the
attention scores, one for each head and each offset between two patches, and three more for pairs with the class token. Keys have
no bias, residual branches are scaled (LayerScale), and the classifier reads the normalized mean of the patches.
BEiT v2 (Peng et al. 2022, arXiv:2208.06366) has the same network and better tokens.

At other image sizes, the biases are interpolated bilinearly, as in MiDaS and transformers. The `eps` is 1e-6 in timm and the
authors' code; transformers uses 1e-12 for the same weights. Images have values from -1 to 1 (BEiT v2: as for ImageNet).
Initialization: truncated N(0, 0.02), with a standard deviation larger by sqrt(768 / D) if D is less than 768; the last layer of
both branches of block i is divided by sqrt(2 i); LayerScale with `scale`; zero biases.
Shapes: B batch, C channels, H W image height and width, P patch size, h w = H/P W/P, N = 1 + h w, D width, T rows of a bias table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.patches import Patches, choose_patch_size
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.mapping.config_rules import Expect, LabelCount, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # label, or vector: the normalized mean of the patches
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 224  # image side of the trained biases; other sizes are interpolated
    patch: int = 16  # P
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    eps: float = 1e-6  # epsilon of the normalization layers
    scale: float = 0.1  # initial LayerScale value
    dropout: float = 0.0
    drop_path: float = 0.1  # stochastic depth rate of the last block; increases linearly from 0


def get_offsets(size: tuple[int, int], device: torch.device) -> Tensor:  # (h, w) -> N N
    """Return the row of the bias table for each pair of tokens: of their offset, then from the class token, to it, and itself."""
    (h, w), (rows, columns) = size, (torch.arange(n, device=device) for n in size)
    down = (rows[:, None] - rows + h - 1)[:, None, :, None] * (2 * w - 1)
    right = (columns[:, None] - columns + w - 1)[None, :, None, :]
    last = (2 * h - 1) * (2 * w - 1)
    pairs = F.pad((down + right).reshape(h * w, h * w), (1, 0, 1, 0), value=last + 1)
    pairs[0] = last
    pairs[0, 0] = last + 2
    return pairs


def interpolate_table(table: Tensor, size: tuple[int, int]) -> Tensor:  # T heads -> T' heads
    """Interpolate a bias table of a square grid of patches to a grid of another `size` (rows, columns), in at least float32."""
    side, (rows, columns) = math.isqrt(len(table) - 3), (2 * n - 1 for n in size)
    if (rows, columns) == (side, side):
        return table
    grid = table[:-3].to(torch.promote_types(table.dtype, torch.float32)).mT.unflatten(1, (side, side))[None]
    grid = F.interpolate(grid, (rows, columns), mode="bilinear")
    return torch.cat([grid[0].flatten(1).mT.to(table.dtype), table[-3:]])


class BiasedAttention(nn.Module):
    """Self-attention with a learned bias for each offset, and without a bias of keys.

    Raises `SettingsError` if `heads` does not divide `dim`.
    """

    def __init__(self, c: Config):
        super().__init__()
        if c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be divisible by heads={c.heads}.")
        self.heads = c.heads
        self.table = nn.Embedding((2 * math.ceil(c.image / c.patch) - 1) ** 2 + 3, c.heads)
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.bias = nn.Parameter(torch.empty(2 * c.dim))  # of queries and values
        self.proj = nn.Linear(c.dim, c.dim)

    def forward(self, x: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:  # B N D, N N, (h, w) -> B N D
        first, last = self.bias.chunk(2)
        bias = torch.cat([first, torch.zeros_like(first), last])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        places = F.embedding(offsets, interpolate_table(self.table.weight, size)).permute(2, 0, 1)[None]  # 1 heads N N
        return self.proj(dot_product_attention(q, k, v, places.to(q.dtype)).transpose(1, 2).flatten(2))

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a bias table trained at another image size, interpolated to the size of this model; None for other tensors."""
        side = math.isqrt(max(len(tensor) - 3, 0)) if tensor.ndim == 2 else 0
        if name != "table.weight" or not side % 2 or len(tensor) != side**2 + 3:
            return None
        return interpolate_table(tensor, ((math.isqrt(len(self.table.weight) - 3) + 1) // 2,) * 2)


class Block(nn.Module):
    """A pre-norm Transformer block with LayerScale (arXiv:2103.17239) on both residual branches."""

    def __init__(self, c: Config, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=c.eps), nn.LayerNorm(c.dim, eps=c.eps)
        self.attn, self.mlp = BiasedAttention(c), Mlp(c.dim, 4 * c.dim)
        self.scale1, self.scale2 = nn.Parameter(torch.empty(c.dim)), nn.Parameter(torch.empty(c.dim))
        self.dropout, self.drop_path = nn.Dropout(c.dropout), DropPath(drop_path)

    def forward(self, x: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:  # B N D, N N, (h, w) -> B N D
        x = x + self.drop_path(self.scale1 * self.dropout(self.attn(self.norm1(x), offsets, size)))
        return x + self.drop_path(self.scale2 * self.dropout(self.mlp(self.norm2(x))))


class BEiT(nn.Module):
    """An image classifier for images of any size; `features` returns the patch features after four evenly spaced blocks."""

    heads: ClassVar[tuple[str, ...]] = ("head",)  # parts that a checkpoint may lack or have in another shape

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.patch = Patches(c.channels, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, p) for p in stochastic_depth_rates(c.drop_path, c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        self.head = classifier_head(c, c.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * max(768 / self.config.dim, 1) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d | BiasedAttention) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls, std=std)
        for i, block in enumerate((module for module in self.modules() if isinstance(module, Block)), 1):
            nn.init.zeros_(block.attn.table.weight)
            nn.init.constant_(block.scale1, self.config.scale)
            nn.init.constant_(block.scale2, self.config.scale)
            for last in (block.attn.proj, block.mlp.down):
                nn.init.trunc_normal_(last.weight, std=std / (2 * i) ** 0.5)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Feature name -> (channels D, stride in pixels) of what `features` returns."""
        depth = self.config.depth
        return {f"b{i}": (self.config.dim, self.config.patch) for i in sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0})}

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int], Tensor]:  # B C H W -> B N D, (h, w), N N
        """Return the embedded tokens, the size of the patch grid and the rows of the bias tables."""
        x = self.patch(image)
        size = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x.flatten(2).mT], 1)
        return self.dropout(x), size, get_offsets(size, x.device)

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"b3": B D h w, ...}
        """Return the feature maps described by `levels`."""
        x, size, offsets = self.tokens(image)
        found = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x, offsets, size)
            if f"b{i}" in self.levels:
                found[f"b{i}"] = x[:, 1:].mT.unflatten(2, size)
        return found

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        x, size, offsets = self.tokens(image)
        for block in self.blocks:
            x = block(x, offsets, size)
        return self.head(self.norm(x[:, 1:].mean(1)))


CLS = Reshaped("cls", here=(-1,), there=(1, 1, -1))

TIMM: dict[str, Row] = {  # also the authors' names
    "cls_token": CLS,
    "patch_embed.proj.*": "patch.*",
    "blocks.{i}.attn.qkv.weight": "blocks.{i}.attn.qkv.weight",
    "blocks.{i}.attn.q_bias": Fused("blocks.{i}.attn.bias", 0, 2),
    "blocks.{i}.attn.v_bias": Fused("blocks.{i}.attn.bias", 1, 2),
    "blocks.{i}.attn.relative_position_bias_table": "blocks.{i}.attn.table.weight",
    "blocks.{i}.attn.relative_position_index": Dropped("computed from the size of the image"),
    "blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
    "blocks.{i}.gamma_{k}": "blocks.{i}.scale{k}",
    "blocks.{i}.norm{k}.*": "blocks.{i}.norm{k}.*",
    "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.up.*",
    "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.down.*",
    "fc_norm.*": "norm.*",
    "head.*": "head.*",
}


def huggingface(root: str = "beit.") -> dict[str, Row]:
    """Return the names of BeitForImageClassification, and of BeitModel (`root` is "")."""
    layer, block = root + "encoder.layer.{i}.", "blocks.{i}."
    names: dict[str, Row] = {
        root + "embeddings.cls_token": CLS,
        root + "embeddings.patch_embeddings.projection.*": "patch.*",
        root + "pooler.layernorm.*": "norm.*",
        "classifier.*": "head.*",
    }
    for i, part in enumerate(("query", "key", "value")):
        names[f"{layer}attention.attention.{part}.weight"] = Fused(block + "attn.qkv.weight", i, 3)
    places = layer + "attention.attention.relative_position_bias.relative_position_"
    return names | {
        layer + "attention.attention.query.bias": Fused(block + "attn.bias", 0, 2),
        layer + "attention.attention.value.bias": Fused(block + "attn.bias", 1, 2),
        places + "bias_table": block + "attn.table.weight",
        places + "index": Dropped("computed from the size of the image"),
        layer + "attention.output.dense.*": block + "attn.proj.*",
        layer + "lambda_{k}": block + "scale{k}",
        layer + "layernorm_before.*": block + "norm1.*",
        layer + "layernorm_after.*": block + "norm2.*",
        layer + "intermediate.dense.*": block + "mlp.up.*",
        layer + "output.dense.*": block + "mlp.down.*",
    }


CONFIG = {  # keys of transformers, whose defaults are those of the pre-training
    "model_type": Expect("beit"),
    "architectures": architectures("Beit"),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "image_size": "image",
    "patch_size": "patch",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": Expect(lambda c: 4 * c.dim),
    "layer_norm_eps": WithDefault("eps", 1e-12),
    "layer_scale_init_value": WithDefault("scale", 0.1),
    "hidden_dropout_prob": WithDefault("dropout", 0.0),
    "attention_probs_dropout_prob": Expect(0.0),
    "drop_path_rate": WithDefault("drop_path", 0.1),
    "hidden_act": Expect("gelu"),
    "use_mask_token": Expect(False),
    "use_absolute_position_embeddings": Expect(False),
    "use_relative_position_bias": Expect(True, absent=False),
    "use_shared_relative_position_bias": Expect(False),
    "use_mean_pooling": Expect(True),
}
L = {"dim": 1024, "depth": 24, "heads": 16, "scale": 1e-5}
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {  # name, name at timm, fields, parameters
    "base": ("base_patch16_224", {}, 86_530_984),
    "base-384": ("base_patch16_384", {"image": 384}, 86_744_104),
    "large": ("large_patch16_224", L, 304_430_568),
    "large-384": ("large_patch16_384", {**L, "image": 384}, 304_998_888),
    "large-512": ("large_patch16_512", {**L, "image": 512}, 305_674_728),
}

CARD = Card(
    name="beit",
    model=BEiT,
    config=Config,
    paper="arXiv:2106.08254",
    year=2021,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: {"patch": patch} if (patch := choose_patch_size(need["image"])) else {},
    sizes={
        **{
            f"beit-{name}": Size(**fields, params=params, source=f"microsoft/beit-{theirs.replace('_', '-')}")
            for name, (theirs, fields, params) in SIZES.items()
        },
        # For training from scratch on small images.
        "beit-mini": Size(dim=128, depth=6, heads=4, image=32, patch=4, num_classes=10),
        "beit-test": Size(dim=16, depth=3, heads=2, image=12, patch=4, channels=2, num_classes=5, drop_path=0.0),
    },
    weights={"timm": TIMM, "huggingface": huggingface(), "huggingface-base": huggingface("")},
    configs={"huggingface": CONFIG},
    aliases={
        "timm": {
            **{f"beit_{theirs}": f"beit-{name}" for name, (theirs, *_) in SIZES.items()},
            **{f"beitv2_{size}_patch16_224": (f"beit-{size}", {"scale": 1e-5}) for size in ("base", "large")},
        }
    },
    # As for a ViT trained on labels from scratch (DeiT, arXiv:2012.12877, table 9).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
    scale=HALF,
)
