"""Consistency U-Net: from any noise level to the image in one step (Song et al. 2023, arXiv:2303.01469).

New here: the network is trained to give the same image for all noise levels of a path, so that one call is enough; it learns this from
a diffusion model or from scratch. It is the U-Net of ADM (Dhariwal and Nichol 2021, arXiv:2105.05233): attention with several heads at
several resolutions, residual blocks that also change the resolution, and, for ImageNet, times and classes that scale and shift
normalized features. The factors by which a sampler combines input and output at a noise level are not part of it.

Initialization: torch's defaults; zero for the last layers of residual paths and of the network, as in the authors' code.
Shapes: B batch, C channels, H W height and width, D width of a level, E = 4 * dim width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion._shared.attention import Attention as Heads
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.levels import run_levels
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 64  # side of the images that it was trained with; others work, too
    num_classes: int = 0  # labels are 1 .. num_classes; 0 means unconditional
    dim: int = 192
    growth: tuple[int, ...] = (1, 2, 3, 4)  # width of each level, times dim
    depth: int = 3  # blocks per level on the way down; one more on the way up
    attend: tuple[bool, ...] = (False, True, True, True)  # levels with attention after the blocks
    head_dim: int = 64  # width of a head of attention
    groups: int = 32  # of group norm
    scaled: bool = True  # whether times and classes scale and shift features, instead of being added to them
    dropout: float = 0.0


class Block(nn.Module):
    """Residual block: twice group norm, SiLU and 3x3 convolution, with the time embedding in between.

    `resize` halves ("down") or doubles ("up") the sides of both paths.
    """

    def __init__(self, c: Config, inputs: int, dim: int, resize: str = ""):
        super().__init__()
        self.scaled, self.resize_as = c.scaled, resize
        self.norm1, self.conv1 = nn.GroupNorm(c.groups, inputs), nn.Conv2d(inputs, dim, 3, padding=1)
        self.time = nn.Linear(4 * c.dim, dim * (1 + c.scaled))
        self.norm2, self.conv2 = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.dropout = nn.Dropout(c.dropout)
        self.shortcut = nn.Conv2d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def resize(self, x: Tensor) -> Tensor:  # B D H W -> B D H' W'
        if self.resize_as == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resize_as == "up" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W, B E -> B D' H' W'
        y = self.conv1(self.resize(F.silu(self.norm1(x))))
        parts = self.time(F.silu(time))[:, :, None, None]
        if self.scaled:
            scale, shift = parts.chunk(2, 1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + parts)
        return self.shortcut(self.resize(x)) + self.conv2(self.dropout(F.silu(y)))


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        if dim % c.head_dim:
            raise SettingsError(f"the width {dim} of a level with attention must be a multiple of head_dim={c.head_dim}")
        self.norm, self.heads = nn.GroupNorm(c.groups, dim), Heads(dim, dim, dim // c.head_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.norm(x).flatten(2).mT
        return x + self.heads(y, y).mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks of one resolution, each followed by optional attention, and a block that changes the resolution."""

    def __init__(self, c: Config, inputs: list[int], dim: int, attend: bool, resize: Block | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, n, dim) for n in inputs)
        self.attns = nn.ModuleList(Attention(c, dim) for _ in (inputs if attend else []))
        self.resize = resize

    def forward(self, i: int, x: Tensor, time: Tensor) -> Tensor:  # index of a block, B D H W, B E -> B D' H W
        x = self.blocks[i](x, time)
        return self.attns[i](x) if len(self.attns) else x


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, dim, dim) for _ in range(2))
        self.attns = nn.ModuleList([Attention(c, dim)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W, B E -> B D H W
        return self.blocks[1](self.attns[0](self.blocks[0](x, time)), time)


class ConsistencyUNet(nn.Module):
    """Consistency U-Net: a noisy image, a function of its noise level (in the paper 250 times its logarithm), its label -> the image,
    before the sampler mixes it with the input.

    Raises `SettingsError` for invalid sizes, and `DataError` if a side of the image is not divisible by the total stride.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.growth) != len(c.attend):
            raise SettingsError(f"growth={c.growth} and attend={c.attend} must have as many values as levels")
        widths, last = [c.dim * growth for growth in c.growth], len(c.growth) - 1
        self.time1, self.time2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, 4 * c.dim)
        self.label = nn.Embedding(c.num_classes, 4 * c.dim) if c.num_classes else None
        self.conv_in = nn.Conv2d(c.channels, c.dim, 3, padding=1)
        self.down, self.up, dim, skips = nn.ModuleList(), nn.ModuleList(), c.dim, [c.dim]
        for i, width in enumerate(widths):
            resize = Block(c, width, width, "down") if i < last else None
            self.down.append(Level(c, [dim] + [width] * (c.depth - 1), width, c.attend[i], resize))
            skips += [width] * (c.depth + (i < last))
            dim = width
        self.mid = Middle(c, dim)
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(dim if j == 0 else width) + skips.pop() for j in range(c.depth + 1)]
            self.up.append(Level(c, inputs, width, c.attend[i], Block(c, width, width, "up") if i else None))
            dim = width
        self.norm, self.conv_out = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, c.channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if name.endswith(("conv2", "heads.proj", "conv_out")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def embed_condition(self, time: Tensor, label: Tensor | None) -> Tensor:  # B, B -> B E
        """Return the embedding of the time plus that of the label; nothing is added for label 0."""
        x = self.time2(F.silu(self.time1(embed_time(time, self.config.dim).to(self.time1.weight.dtype))))
        if self.label is None or label is None:
            return x
        return x + self.label((label - 1).clamp(min=0)) * (label > 0)[:, None]

    def forward(self, image: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # B C H W, B, B -> B C H W
        stride = 2 ** (len(self.down) - 1)
        if any(side % stride for side in image.shape[2:]):
            raise DataError(
                f"images of {image.shape[3]} x {image.shape[2]} pixels cannot be halved {len(self.down) - 1} times: the sides must be "
                f"multiples of {stride}"
            )
        condition = self.embed_condition(time, label)
        x = run_levels(self.down, self.mid, self.up, self.conv_in(image), condition)
        return self.conv_out(F.silu(self.norm(x)))


DIFFUSERS: dict[str, Row] = {
    "time_embedding.linear_{k}.*": "time{k}.*",
    "class_embedding.weight": "label.weight",
    "conv_in.*": "conv_in.*",
    "conv_norm_out.*": "norm.*",
    "conv_out.*": "conv_out.*",
}
for _theirs, _ours in (
    ("down_blocks.{i}.resnets.{j}.", "down.{i}.blocks.{j}."),
    ("down_blocks.{i}.downsamplers.0.", "down.{i}.resize."),
    ("up_blocks.{i}.resnets.{j}.", "up.{i}.blocks.{j}."),
    ("up_blocks.{i}.upsamplers.0.", "up.{i}.resize."),
    ("mid_block.resnets.{j}.", "mid.blocks.{j}."),
):
    DIFFUSERS |= {
        f"{_theirs}norm{{k}}.*": f"{_ours}norm{{k}}.*",
        f"{_theirs}conv{{k}}.*": f"{_ours}conv{{k}}.*",
        f"{_theirs}time_emb_proj.*": f"{_ours}time.*",
        f"{_theirs}conv_shortcut.*": f"{_ours}shortcut.*",
    }
for _theirs, _ours in (("down_blocks.{i}", "down.{i}"), ("up_blocks.{i}", "up.{i}"), ("mid_block", "mid")):
    DIFFUSERS |= {
        f"{_theirs}.attentions.{{j}}.{theirs}.*": f"{_ours}.attns.{{j}}.{ours}.*"
        for theirs, ours in {
            "group_norm": "norm",
            "to_q": "heads.q",
            "to_k": "heads.k",
            "to_v": "heads.v",
            "to_out.0": "heads.proj",
        }.items()
    }


def parse_levels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the levels for a configuration of diffusers. Raises `WeightsError` for unsupported values."""
    first, *_ = widths = raw["block_out_channels"]
    if odd := [width for width in widths if width % first]:
        raise WeightsError(f"block_out_channels={widths} is not supported: {odd[0]} is not a multiple of {first}")
    groups, scaled = raw.get("attn_norm_num_groups"), raw.get("resnet_time_scale_shift") == "scale_shift"
    if groups != raw["norm_num_groups"] and (scaled or groups is not None):
        raise WeightsError(
            f"attn_norm_num_groups={groups} is not supported: the attention in the middle has a norm of norm_num_groups="
            f"{raw['norm_num_groups']}, which diffusers leaves out if the first is missing"
        )
    return {
        "dim": first,
        "growth": tuple(width // first for width in widths),
        "attend": tuple(kind == "AttnDownBlock2D" for kind in raw["down_block_types"]),
    }


def block_types(direction: str, c: Config) -> list[str]:
    """Return the block types of diffusers; `direction` is "Down" or "Up"."""
    return [f"Attn{direction}Block2D" if attend else f"Resnet{direction}sampleBlock2D" for attend in c.attend]


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("UNet2DModel"),
    "downsample_type": Expect("resnet", among=("resnet",)),
    "upsample_type": Expect("resnet"),
    "sample_size": "image",
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "attention_head_dim": "head_dim",
    "dropout": "dropout",
    "block_out_channels": Derived(parse_levels, lambda c: [c.dim * growth for growth in c.growth]),
    "attn_norm_num_groups": Derived(lambda raw: {}, lambda c: c.groups),
    "down_block_types": Expect(lambda c: block_types("Down", c)),
    "up_block_types": Expect(lambda c: block_types("Up", c)[::-1]),
    "mid_block_type": Expect("UNetMidBlock2D"),
    "resnet_time_scale_shift": ValueMap("scaled", {"default": False, "scale_shift": True}),
    "num_class_embeds": Derived(lambda raw: {"num_classes": raw.get("num_class_embeds") or 0}, lambda c: c.num_classes or None),
    "class_embed_type": Expect(None),
    "add_attention": Expect(True),
    "norm_eps": Expect(1e-5),
    "flip_sin_to_cos": Expect(True),
    "freq_shift": Expect(0),
    "time_embedding_type": Expect("positional"),
    "time_embedding_dim": Expect(None),
    "mid_block_scale_factor": Expect(1),
    "center_input_sample": Expect(False),
    "act_fn": Expect("silu"),
}

CARD = Card(
    name="consistency-unet",
    model=ConsistencyUNet,
    config=Config,
    paper="arXiv:2303.01469",
    year=2023,
    input_type="noisy",
    output_type="image",
    sizes={
        "consistency-imagenet64": Size(num_classes=1000, params=295_899_267, source="openai/diffusers-cd_imagenet64_l2"),
        "consistency-lsun256": Size(
            image=256,
            dim=256,
            growth=(1, 1, 2, 2, 4, 4),
            depth=2,
            attend=(False, False, False, True, True, True),
            scaled=False,
            params=526_304_771,
            source="openai/diffusers-cd_cat256_l2",
        ),
        "consistency-unet-test": Size(
            image=8, channels=2, num_classes=3, dim=8, growth=(1, 2), depth=1, attend=(False, True), head_dim=8, groups=4
        ),
    },
    weights={"diffusers": DIFFUSERS},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.9999},
)
