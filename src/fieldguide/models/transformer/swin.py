"""Swin: attention in shifted windows on a feature pyramid (Liu et al. 2021, arXiv:2103.14030).

New here: attention is limited to windows, so the cost grows linearly with the image size; every second block shifts
the windows by half a window, which connects them. Between stages, 2 x 2 positions are merged into one of twice the
width.

Images may have any size: feature maps are zero-padded to a multiple of the window, and the padding takes part in
attention, as in the authors' code for detection; windows are at most as large as the feature map, and are not shifted
if one covers it all.
Initialization: truncated N(0, 0.02), with a standard deviation larger by sqrt(96 / width) if the width is less than
96; zero biases.
Shapes: B batch, C channels, H W height and width (of a feature map, in positions), D width, w window side, M = w^2
positions of a window, K windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.padding import pad_map, shift_cyclic
from fieldguide.models.layers.patches import Patches
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.mapping.config_rules import Expect, LabelCount, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row, strip_prefix


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # label, or vector: the features before the classifier
    num_classes: int = 1000
    channels: int = 3  # C
    patch: int = 4
    dim: int = 96  # D of the first stage; doubles with each further stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks per stage
    heads: tuple[int, ...] = (3, 6, 12, 24)  # heads per stage
    window: int = 7  # w
    dropout: float = 0.0
    drop_path: float = 0.2  # stochastic depth rate of the last block; increases linearly from 0


class Windows:
    """The window partition of a feature map of H x W positions: window sides, shift, relative position indices and
    attention mask.
    """

    def __init__(self, size: tuple[int, int], window: int, device: torch.device):
        self.size = size
        self.sides = h, w = min(size[0], window), min(size[1], window)
        self.counts = (size[0] + h - 1) // h, (size[1] + w - 1) // w  # of windows
        self.full = self.counts[0] * h, self.counts[1] * w  # padded size
        self.shift = tuple(side // 2 if length > side else 0 for side, length in zip(self.sides, size))
        # Relative positions of the pairs of positions in a window, as rows of the bias table.
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        down = (rows[:, None] - rows + window - 1)[:, None, :, None] * (2 * window - 1)
        right = (columns[:, None] - columns + window - 1)[None, :, None, :]
        self.offsets = (down + right).view(h * w, h * w)  # M M
        self.mask = self.build_shift_mask(device) if any(self.shift) else None

    def build_shift_mask(self, device: torch.device) -> Tensor:  # -> K 1 M M
        """Return the mask of a shifted partition: -inf between positions that are neighbors only because of the cyclic
        shift.
        """
        bands = [torch.arange(full, device=device) for full in self.full]
        bands = [
            (at >= full - side).int() + (at >= full - shift).int() if shift else torch.zeros_like(at)
            for at, full, side, shift in zip(bands, self.full, self.sides, self.shift)
        ]
        region = (3 * bands[0][:, None] + bands[1])[None, :, :, None]  # 1 H W 1
        region = self.partition(region)[0, ..., 0]  # K M
        return torch.zeros(*region.shape, region.shape[1], device=device).masked_fill_(
            region[:, None] != region[..., None], -torch.inf
        )[:, None]

    def partition(self, x: Tensor) -> Tensor:  # B H W D -> B K M D
        """Split a feature map into windows."""
        x = x.unflatten(2, (self.counts[1], self.sides[1])).unflatten(1, (self.counts[0], self.sides[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def unpartition(self, x: Tensor) -> Tensor:  # B K M D -> B H W D
        """Join windows to a feature map."""
        x = x.unflatten(2, self.sides).unflatten(1, self.counts)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative position (equation 4). Raises `SettingsError` if
    `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"The width {dim} of a stage must be divisible by its heads={heads}.")
        self.heads, self.window = heads, window
        self.bias = nn.Embedding((2 * window - 1) ** 2, heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:  # B K M D, M M, K 1 M M -> B K M D
        q, k, v = self.qkv(x.flatten(0, 1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B*K heads M d
        bias = self.bias(offsets).permute(2, 0, 1)[None].to(q.dtype)  # 1 heads M M
        if mask is not None:
            bias = (bias + mask.to(q.dtype)).expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)
        found = dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        return self.proj(found).unflatten(0, x.shape[:2])

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a bias table of another window size, interpolated to this one (bicubic, as in the authors' code); None
        for other tensors.
        """
        side, mine = round(len(tensor) ** 0.5) if tensor.ndim == 2 else 0, 2 * self.window - 1
        if name != "bias.weight" or not side % 2 or len(tensor) != side**2:
            return None
        grid = F.interpolate(tensor.float().mT.unflatten(1, (side, side))[None], (mine, mine), mode="bicubic")
        return grid[0].flatten(1).mT.to(tensor.dtype)


class Block(nn.Module):
    """A pre-norm block: attention in regular or shifted windows and MLP, each with a residual connection."""

    def __init__(self, c: Config, dim: int, heads: int, shifts: bool, drop_path: float):
        super().__init__()
        self.shifts = shifts
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, c.window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, c.dropout)
        self.dropout, self.drop_path = nn.Dropout(c.dropout), DropPath(drop_path)

    def attend(self, x: Tensor, windows: Windows) -> Tensor:  # B H W D -> B H W D
        """Pad, shift, attend within windows, and undo the shift and the padding."""
        (height, width), (rows, columns) = windows.size, windows.shift if self.shifts else (0, 0)
        x = pad_map(x, *windows.full)
        for dim, steps in ((1, rows), (2, columns)):
            x = shift_cyclic(x, steps, dim) if steps else x
        x = windows.unpartition(self.attn(windows.partition(x), windows.offsets, windows.mask if self.shifts else None))
        for dim, steps in ((1, rows), (2, columns)):
            x = shift_cyclic(x, windows.full[dim - 1] - steps, dim) if steps else x
        return x[:, :height, :width]

    def forward(self, x: Tensor, windows: Windows) -> Tensor:  # B H W D -> B H W D
        x = x + self.drop_path(self.dropout(self.attend(self.norm1(x), windows)))
        return x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))


class Merge(nn.Module):
    """Patch merging: 2 x 2 positions become one of twice the width; odd sides are zero-padded."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # B H W D -> B H/2 W/2 2D
        rows, columns = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        x = pad_map(x, 2 * rows, 2 * columns)
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # B H/2 2 W/2 2 D; permuted so that rows vary fastest
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    """Patch merging (except in the first stage), then blocks, every second of which uses shifted windows."""

    def __init__(self, c: Config, index: int, rates: list[float]):
        super().__init__()
        dim = c.dim * 2**index
        self.window = c.window
        self.merge = Merge(dim // 2) if index else None
        self.blocks = nn.ModuleList(Block(c, dim, c.heads[index], bool(i % 2), rate) for i, rate in enumerate(rates))

    def forward(self, x: Tensor) -> Tensor:  # B H W D -> B H W D, or B H/2 W/2 2D
        x = self.merge(x) if self.merge else x
        windows = Windows(tuple(x.shape[1:3]), self.window, x.device)
        for block in self.blocks:
            x = block(x, windows)
        return x


class Swin(nn.Module):
    """An image classifier for images of any size; `features` returns the feature maps c2, c3, ... for detection and
    segmentation.

    Raises `SettingsError` if `depths` and `heads` differ in length.
    """

    heads: ClassVar[tuple[str, ...]] = ("head",)  # parts that a checkpoint may lack or have in another shape

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.depths) != len(c.heads):
            raise SettingsError(f"depths={c.depths} and heads={c.heads} must have the same length, one entry per stage.")
        self.patch, self.norm_patch = Patches(c.channels, c.dim, c.patch), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        rates = stochastic_depth_rates(c.drop_path, sum(c.depths))
        self.stages = nn.ModuleList(Stage(c, i, rates[sum(c.depths[:i]) :][:depth]) for i, depth in enumerate(c.depths))
        width = c.dim * 2 ** (len(c.depths) - 1)
        self.norm: nn.Module = nn.LayerNorm(width)
        self.head = classifier_head(c, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * max(96 / self.config.dim, 1) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Feature name -> (channels D, stride in pixels) of what `features` returns."""
        return {f"c{i + 2}": (self.config.dim * 2**i, self.config.patch * 2**i) for i in range(len(self.stages))}

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"c2": B D H/4 W/4, "c3": ...}
        """Return the feature maps described by `levels`."""
        x = self.dropout(self.norm_patch(self.patch(image).permute(0, 2, 3, 1)))
        found = {}
        for name, stage in zip(self.levels, self.stages):
            x = stage(x)
            found[name] = x.permute(0, 3, 1, 2)
        return found

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        *_, x = self.features(image).values()
        return self.head(self.norm(x.flatten(2).mT).mean(1))


def microsoft(shift: str = "+1", head: str = "head.*") -> dict[str, Row]:
    """Return the names of the authors' files, which assign patch merging to the stage before it; timm assigns it to the
    stage after it.
    """
    stage, ours = "layers.{s}.", "stages.{s}."
    block, mine = stage + "blocks.{b}.", ours + "blocks.{b}."
    return {
        "patch_embed.proj.*": "patch.*",
        "patch_embed.norm.*": "norm_patch.*",
        stage + "downsample.norm.*": f"stages.{{s{shift}}}.merge.norm.*",
        stage + "downsample.reduction.weight": f"stages.{{s{shift}}}.merge.reduction.weight",
        block + "norm1.*": mine + "norm1.*",
        block + "attn.relative_position_bias_table": mine + "attn.bias.weight",
        block + "attn.relative_position_index": Dropped("computed from the window"),
        block + "attn_mask": Dropped("computed from the image size"),
        block + "attn.qkv.*": mine + "attn.qkv.*",
        block + "attn.proj.*": mine + "attn.proj.*",
        block + "norm2.*": mine + "norm2.*",
        block + "mlp.fc1.*": mine + "mlp.up.*",
        block + "mlp.fc2.*": mine + "mlp.down.*",
        "norm.*": "norm.*",
        head: "head.*",
    }


def huggingface() -> dict[str, Row]:
    """Return the weight names of SwinForImageClassification."""
    stage = "swin.encoder.layers.{s}."
    block, mine = stage + "blocks.{b}.", "stages.{s}.blocks.{b}."
    names: dict[str, Row] = {
        "swin.embeddings.patch_embeddings.projection.*": "patch.*",
        "swin.embeddings.norm.*": "norm_patch.*",
        stage + "downsample.norm.*": "stages.{s+1}.merge.norm.*",
        stage + "downsample.reduction.weight": "stages.{s+1}.merge.reduction.weight",
        block + "attention.self.relative_position_bias_table": mine + "attn.bias.weight",
        block + "attention.self.relative_position_index": Dropped("computed from the window"),
    }
    names |= {
        f"{block}attention.self.{part}.*": Fused(mine + "attn.qkv.*", i, 3) for i, part in enumerate(("query", "key", "value"))
    }
    return names | {
        block + "attention.output.dense.*": mine + "attn.proj.*",
        block + "layernorm_before.*": mine + "norm1.*",
        block + "layernorm_after.*": mine + "norm2.*",
        block + "intermediate.dense.*": mine + "mlp.up.*",
        block + "output.dense.*": mine + "mlp.down.*",
        "swin.layernorm.*": "norm.*",
        "classifier.*": "head.*",
    }


CONFIG = {  # keys of transformers
    "model_type": Expect("swin"),
    "architectures": architectures("Swin"),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "patch_size": "patch",
    "embed_dim": "dim",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "window",
    "mlp_ratio": Expect(4.0),
    "layer_norm_eps": Expect(1e-5),
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": Expect(0.0),
    "drop_path_rate": WithDefault("drop_path", 0.1),
    "hidden_act": Expect("gelu"),
    "qkv_bias": Expect(True),
    "use_absolute_embeddings": Expect(False),
}


def adapt(need: Mapping[str, Any]) -> dict[str, Any]:
    """Return smaller patches and windows for small images: at least 8 positions per side, and 4 windows per side where
    possible.
    """
    if need["image"] >= 128:
        return {}
    patch = 1 if need["image"] <= 16 else 2 if need["image"] <= 48 else 4
    return {"patch": patch, "window": min(max(need["image"] // patch // 4, 4), 7)}


S, B, L = (
    {"depths": (2, 2, 18, 2), "drop_path": 0.3},
    {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    {"depths": (2, 2, 18, 2), "dim": 192, "heads": (6, 12, 24, 48), "drop_path": 0.2},
)

CARD = Card(
    name="swin",
    model=Swin,
    config=Config,
    paper="arXiv:2103.14030",
    year=2021,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=adapt,
    sizes={
        "swin-t": Size(params=28_288_354, source="swin_tiny_patch4_window7_224"),
        "swin-s": Size(**S, params=49_606_258, source="swin_small_patch4_window7_224"),
        "swin-b": Size(**B, params=87_768_224, source="swin_base_patch4_window7_224"),
        "swin-l": Size(**L, params=196_532_476, source="swin_large_patch4_window7_224"),
        "swin-b-384": Size(**B, window=12, params=87_903_584, source="swin_base_patch4_window12_384"),
        "swin-l-384": Size(**L, window=12, params=196_735_516, source="swin_large_patch4_window12_384"),
        # For training from scratch on small images.
        "swin-mini": Size(dim=48, depths=(2, 2, 4), heads=(2, 4, 8), patch=2, window=4, num_classes=10, drop_path=0.1),
        "swin-test": Size(
            dim=8, depths=(2, 2, 2), heads=(1, 2, 4), patch=2, window=4, channels=2, num_classes=5, drop_path=0.0
        ),
    },
    weights={
        "timm": microsoft("", "head.fc.*"),
        "microsoft": microsoft(),
        "huggingface": huggingface(),
        "huggingface-base": strip_prefix(huggingface(), "swin."),
    },
    configs={"huggingface": CONFIG},
    aliases={
        "timm": {f"swin_{name}_patch4_window7_224": f"swin-{name[0]}" for name in ("tiny", "small", "base", "large")}
        | {f"swin_{name}_patch4_window12_384": f"swin-{name[0]}-384" for name in ("base", "large")}
    },
    # Appendix A2.1, without mixup and cutmix, which pay off after hundreds of epochs (--set mixup=0.8).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.07, "label_smoothing": 0.1, "grad_clip": 5.0},
)
