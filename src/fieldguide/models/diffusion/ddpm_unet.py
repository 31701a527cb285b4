"""DDPM U-Net: predicts the noise in an image at a given time (Ho et al. 2020, arXiv:2006.11239).

New here: one network for all noise levels, with a sinusoidal time embedding in every block. It is a U-Net of residual
blocks with group norm, and with self-attention at resolution 16. A class embedding, if any, is added to the time
embedding; so is the mean over the tokens of a caption encoded by a small Transformer (GLIDE adds that of the last token,
arXiv:2112.10741), or a projected vector, such as CLIP's embedding of an image (arXiv:2204.06125, section 2.1). With `patch`
above 1, patches of pixels are processed as one position, which saves time at high resolutions (Hoogeboom et al. 2023,
arXiv:2301.11093, section 3.2).

Initialization: Glorot uniform, zero biases; the last layers of residual paths and of the network start near zero (code of
appendix B); labels and captions N(0, 1), the scale of the time embedding, because smaller ones are learned late.
Shapes: B batch, C channels, H W height and width, D width of a level, E = 4 * dim width of the time embedding, T tokens, W
width of the caption encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, WeightsError
from fieldguide.models.diffusion._shared.caption_encoder import CaptionEncoder
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 32  # side of the images
    num_classes: int = 0  # labels are 1 .. num_classes; 0 means unconditional
    patch: int = 1  # side of a patch of pixels that is processed as one position
    dim: int = 128
    growth: tuple[int, ...] = (1, 2, 2, 2)  # width of each level, times dim
    depth: int = 2  # blocks per level
    attend: tuple[int, ...] = (16,)  # resolutions with attention
    groups: int = 32  # of group norm
    dropout: float = 0.1
    vocab_size: int = 0  # size of the caption vocabulary, instead of labels; 0 means no captions
    length: int = 64  # maximum length of a caption in tokens
    words: int = 128  # W
    layers: int = 2  # of the caption encoder
    embedding: int = 0  # width of a vector that is the condition, instead of labels; zeros mean unconditional


def norm(c: Config, dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(c.groups, dim, eps=1e-6)


class Block(nn.Module):
    """Residual block: twice group norm, SiLU and 3x3 convolution, with the time embedding added in between."""

    def __init__(self, c: Config, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c, inputs), nn.Conv2d(inputs, dim, 3, padding=1)
        self.time = nn.Linear(4 * c.dim, dim)
        self.norm2, self.conv2 = norm(c, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.dropout = nn.Dropout(c.dropout)
        self.shortcut = nn.Conv2d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W, B E -> B D' H W
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(y))))


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.norm, self.qkv, self.proj = norm(c, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        q, k, v = self.qkv(self.norm(x).flatten(2).mT).chunk(3, -1)  # each B H*W D
        y = self.proj(dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return x + y.mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks of one resolution, each followed by optional attention, and a convolution that changes the resolution."""

    def __init__(self, c: Config, inputs: list[int], dim: int, attend: bool, resize: nn.Conv2d | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, n, dim) for n in inputs)
        self.attns = nn.ModuleList(Attention(c, dim) for _ in inputs) if attend else None
        self.resize = resize

    def forward(self, i: int, x: Tensor, time: Tensor) -> Tensor:  # index of a block, B D H W, B E -> B D' H W
        x = self.blocks[i](x, time)
        return x if self.attns is None else self.attns[i](x)


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, dim, dim) for _ in range(2))
        self.attns = nn.ModuleList([Attention(c, dim)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W -> B D H W
        return self.blocks[1](self.attns[0](self.blocks[0](x, time)), time)


class DDPMUNet(nn.Module):
    """DDPM U-Net: a noisy image, its time (0 .. 999 in the paper), its label or caption -> the predicted noise.

    `extra` is the number of channels that the input has in addition to those of the output (see `palette`). Raises `DataError` if a
    side of the image is not divisible by the total stride.
    """

    def __init__(self, config: Config, extra: int = 0):
        super().__init__()
        c = self.config = config
        widths = [c.dim * growth for growth in c.growth]
        self.time1, self.time2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, 4 * c.dim)
        self.label = nn.Embedding(c.num_classes + 1, 4 * c.dim) if c.num_classes else None
        self.caption = CaptionEncoder(c.vocab_size, c.length, c.words, c.layers, 4 * c.dim, c.dropout) if c.vocab_size else None
        self.embedding = nn.Linear(c.embedding, 4 * c.dim, bias=False) if c.embedding else None
        pixels, side = c.channels * c.patch**2, c.image // c.patch
        self.conv_in = nn.Conv2d(pixels + extra * c.patch**2, c.dim, 3, padding=1)
        last, dim, skips = len(widths) - 1, c.dim, [c.dim]
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            resize = nn.Conv2d(width, width, 3, 2) if i < last else None
            self.down.append(Level(c, [dim] + [width] * (c.depth - 1), width, side >> i in c.attend, resize))
            skips += [width] * (c.depth + (i < last))
            dim = width
        self.mid = Middle(c, dim)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(dim if j == 0 else width) + skips.pop() for j in range(c.depth + 1)]
            resize = nn.Conv2d(width, width, 3, padding=1) if i else None
            self.up.append(Level(c, inputs, width, side >> i in c.attend, resize))
            dim = width
        self.norm, self.conv_out = norm(c, dim), nn.Conv2d(dim, pixels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("caption."):
                for part in module.weight.chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(part, 1e-5 if name.endswith(("conv2", "proj", "conv_out")) else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight)
        if self.caption is not None:
            self.caption.reset_parameters()

    def embed_condition(self, time: Tensor, label: Tensor | None) -> Tensor:  # B, B or B T or B embedding -> B E
        """Return the embedding of the time plus that of the label, caption or vector."""
        half = self.config.dim // 2
        rate = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - 1))
        angle = time.float()[:, None] * rate  # in float32, as in training
        x = torch.cat([angle.sin(), angle.cos()], 1).to(self.time1.weight.dtype)
        x = self.time2(F.silu(self.time1(x)))
        if self.caption is not None:
            return x + self.caption(torch.zeros_like(time, dtype=torch.int64)[:, None] if label is None else label)
        if self.embedding is not None:
            return x if label is None else x + self.embedding(label.to(x.dtype))
        if self.label is None:
            return x
        return x + self.label(torch.zeros_like(time, dtype=torch.int64) if label is None else label)

    def forward(self, image: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # B C H W, B, B (T) -> B C H W
        patch = self.config.patch
        if any(side % (patch << len(self.down) - 1) for side in image.shape[2:]):
            raise DataError(
                f"images of {image.shape[3]} x {image.shape[2]} pixels cannot be halved "
                f"{len(self.down) - 1} times: the sides must be multiples of {patch << len(self.down) - 1}"
            )
        time = self.embed_condition(time, label)
        x = self.conv_in(F.pixel_unshuffle(image, patch))
        seen = [x]
        for level in self.down:
            assert isinstance(level, Level)
            for i in range(len(level.blocks)):
                seen.append(x := level(i, x, time))
            if level.resize is not None:
                seen.append(x := level.resize(F.pad(x, (0, 1, 0, 1))))
        x = self.mid(x, time)
        for level in self.up:
            assert isinstance(level, Level)
            for i in range(len(level.blocks)):
                x = level(i, torch.cat([x, seen.pop()], 1), time)
            if level.resize is not None:
                x = level.resize(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm(x))), patch)


def diffusers_keys(query: str, key: str, value: str, out: str) -> dict[str, Row]:
    """Return the key table of diffusers for one of its two sets of attention names."""
    names: dict[str, Row] = {
        "time_embedding.linear_{k}.*": "time{k}.*",
        "class_embedding.weight": "label.weight",
        "conv_in.*": "conv_in.*",
        "down_blocks.{i}.downsamplers.0.conv.*": "down.{i}.resize.*",
        "up_blocks.{i}.upsamplers.0.conv.*": "up.{i}.resize.*",
        "conv_norm_out.*": "norm.*",
        "conv_out.*": "conv_out.*",
    }
    for theirs, ours in (("down_blocks.{i}", "down.{i}"), ("mid_block", "mid"), ("up_blocks.{i}", "up.{i}")):
        names |= {
            f"{theirs}.resnets.{{j}}.norm{{k}}.*": f"{ours}.blocks.{{j}}.norm{{k}}.*",
            f"{theirs}.resnets.{{j}}.conv{{k}}.*": f"{ours}.blocks.{{j}}.conv{{k}}.*",
            f"{theirs}.resnets.{{j}}.time_emb_proj.*": f"{ours}.blocks.{{j}}.time.*",
            f"{theirs}.resnets.{{j}}.conv_shortcut.*": f"{ours}.blocks.{{j}}.shortcut.*",
            f"{theirs}.attentions.{{j}}.group_norm.*": f"{ours}.attns.{{j}}.norm.*",
            f"{theirs}.attentions.{{j}}.{query}.*": Fused(f"{ours}.attns.{{j}}.qkv.*", 0, 3),
            f"{theirs}.attentions.{{j}}.{key}.*": Fused(f"{ours}.attns.{{j}}.qkv.*", 1, 3),
            f"{theirs}.attentions.{{j}}.{value}.*": Fused(f"{ours}.attns.{{j}}.qkv.*", 2, 3),
            f"{theirs}.attentions.{{j}}.{out}.*": f"{ours}.attns.{{j}}.proj.*",
        }
    return names


DIFFUSERS = diffusers_keys("to_q", "to_k", "to_v", "to_out.0")
DIFFUSERS_2022 = diffusers_keys("query", "key", "value", "proj_attn")  # old attention names, as in google/ddpm-cifar10-32


def parse_widths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `dim` and `growth` for a configuration of diffusers. Raises `WeightsError` if widths are not multiples."""
    first, *_ = all_widths = raw["block_out_channels"]
    if odd := [width for width in all_widths if width % first]:
        raise WeightsError(f"block_out_channels={all_widths} is not supported: {odd[0]} is not a multiple of {first}")
    return {"dim": first, "growth": tuple(width // first for width in all_widths)}


def parse_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolutions with attention for a configuration of diffusers."""
    return {
        "attend": tuple(raw["sample_size"] >> i for i, kind in enumerate(raw["down_block_types"]) if kind == "AttnDownBlock2D")
    }


def block_types(direction: str, c: Config) -> list[str]:
    """Return the block types of diffusers; `direction` is "Down" or "Up"."""
    return [f"{'Attn' if c.image // c.patch >> i in c.attend else ''}{direction}Block2D" for i in range(len(c.growth))]


CONFIG = {  # of diffusers
    "_class_name": Expect("UNet2DModel"),
    "sample_size": "image",
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "block_out_channels": Derived(parse_widths, lambda c: [c.dim * growth for growth in c.growth]),
    "layers_per_block": "depth",
    "down_block_types": Derived(parse_attention, lambda c: block_types("Down", c)),
    "up_block_types": Expect(lambda c: block_types("Up", c)[::-1]),
    "mid_block_type": Expect("UNetMidBlock2D"),
    "add_attention": Expect(True),
    "norm_num_groups": "groups",
    "norm_eps": Expect(1e-6, absent=1e-5),
    "dropout": WithDefault("dropout", 0.0),  # missing in the first files
    "num_class_embeds": Derived(
        lambda raw: {"num_classes": (raw.get("num_class_embeds") or 1) - 1},
        lambda c: c.num_classes + 1 if c.num_classes else None,
    ),
    "class_embed_type": Expect(None),
    "attention_head_dim": Expect(None, absent=8),  # a single head
    "downsample_padding": Expect(0, absent=1),
    "flip_sin_to_cos": Expect(False, absent=True),
    "freq_shift": Expect(1, absent=0),
    "time_embedding_type": Expect("positional"),
    "time_embedding_dim": Expect(None),
    "downsample_type": Expect("conv", among=("conv", None)),  # "resnet" is the consistency U-Net
    "upsample_type": Expect("conv"),
    "resnet_time_scale_shift": Expect("default"),
    "mid_block_scale_factor": Expect(1),
    "attn_norm_num_groups": Expect(None),
    "center_input_sample": Expect(False),
    "act_fn": Expect("silu"),
    "<pixels enter one by one>": Constant("patch", 1),
    "<captions are unknown>": Constant("vocab_size", 0),
    "<vectors are unknown>": Constant("embedding", 0),
}

CARD = Card(
    name="ddpm-unet",
    model=DDPMUNet,
    config=Config,
    paper="arXiv:2006.11239",
    year=2020,
    input_type="noisy",
    output_type="image",
    sizes={
        "ddpm-cifar10": Size(params=35_746_307, source="google/ddpm-cifar10-32"),
        "ddpm-256": Size(
            image=256, growth=(1, 1, 2, 2, 4, 4), dropout=0.0, params=113_673_219, source="google/ddpm-celebahq-256"
        ),
        "ddpm-28": Size(image=28, channels=1, dim=32, growth=(1, 2, 2), attend=(7,), groups=8),
        "ddpm-mini": Size(
            image=28, channels=1, patch=2, dim=32, growth=(1, 2), depth=1, attend=(4, 6, 7, 8), groups=8, dropout=0.0
        ),
        "ddpm-8": Size(image=8, channels=1, dim=32, growth=(1, 2), attend=(4,), groups=8, dropout=0.0),
        "ddpm-unet-test": Size(
            image=8, channels=2, num_classes=3, dim=8, growth=(1, 2), depth=1, attend=(4,), groups=4, dropout=0.0
        ),
    },
    weights={"diffusers": DIFFUSERS, "diffusers-2022": DIFFUSERS_2022},
    configs={"diffusers": CONFIG},
    # Fashion-MNIST in 3 minutes of one core, held-out loss of a small one: adamw at 1e-3 .213, muon .172.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.999},
)
