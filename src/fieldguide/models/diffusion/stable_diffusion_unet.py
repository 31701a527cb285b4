"""Stable Diffusion U-Net: latents denoised with attention to a text (Rombach et al. 2022, arXiv:2112.10752).

New here: besides self-attention, each Transformer layer of the U-Net attends to the states of a text encoder (CLIP's of width
768 for version 1, OpenCLIP's of width 1024 for version 2), so that any text can be a condition. Latent consistency models (Luo et
al. 2023, arXiv:2310.04378) are the same network with an embedding of the guidance scale, whose result they give in few calls
(`guidance`). For inpainting, further channels hold the mask and the masked image (`extra`).

Initialization: torch's defaults; zero for the last layer of each residual path and of the network, as in the authors' code.
Shapes: B batch, C channels of the latents, H W height and width, D width of a level, E = 4 * dim width of the time embedding, T
tokens, K width of their states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.diffusion._shared.attention import Attention
from fieldguide.models.diffusion._shared.embeddings import MAX_PERIOD, embed_time
from fieldguide.models.diffusion._shared.unet_checkpoints import CONFIG, compvis_keys, diffusers_keys
from fieldguide.models.mapping.config_rules import ConfigRow, Expect

GUIDANCE_SCALE = 1000.0  # of guidance scales in their embedding


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 4  # C
    extra: int = 0  # channels of the input that are not predicted, such as a mask
    image: int = 64  # side of the latents that it was trained with; others work, too
    text_dim: int = 768  # K
    dim: int = 320
    growth: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, times dim
    depth: int = 2  # blocks per level on the way down; one more on the way up
    attend: tuple[bool, ...] = (True, True, True, False)  # levels with Transformers after the blocks
    layers: tuple[int, ...] = (1, 1, 1, 1)  # of each Transformer, by level; the last also counts for the middle
    heads: tuple[int, ...] = (8, 8, 8, 8)  # by level
    groups: int = 32  # of group norm
    linear: bool = False  # whether files hold the first and last matrix of a Transformer as such, not as 1 x 1 convolutions
    guidance_dim: int = 0  # width of the embedding of the guidance scale; 0 means none


class Block(nn.Module):
    """Residual block: twice group norm, SiLU and 3x3 convolution, with the time embedding added in between."""

    def __init__(self, c: Config, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c.groups, inputs), nn.Conv2d(inputs, dim, 3, padding=1)
        self.time = nn.Linear(4 * c.dim, dim)
        self.norm2, self.conv2 = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W, B E -> B D' H W
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Layer(nn.Module):
    """Transformer layer: self-attention, attention to the text, and an MLP with a gated GELU."""

    def __init__(self, dim: int, text: int, heads: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, text, heads)
        self.norm3, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # B N D, B T K, B T -> B N D
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text, mask)
        y, gate = self.up(self.norm3(x)).chunk(2, -1)
        return x + self.down(y * F.gelu(gate))


class Transformer(nn.Module):
    """Transformer layers over all positions, with a residual connection around them."""

    def __init__(self, c: Config, dim: int, layers: int, heads: int):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"the width {dim} of a level must be divisible by its heads={heads}")
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(c.groups, dim, eps=1e-6), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(Layer(dim, c.text_dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # B D H W, B T K, B T -> B D H W
        y = self.proj_in(self.norm(x).flatten(2).mT)
        for layer in self.layers:
            y = layer(y, text, mask)
        return x + self.proj_out(y).mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks of one resolution, each followed by an optional Transformer, and a convolution that changes the resolution."""

    def __init__(self, c: Config, level: int, inputs: list[int], attend: bool, resize: nn.Conv2d | None):
        super().__init__()
        dim = c.dim * c.growth[level]
        self.blocks = nn.ModuleList(Block(c, n, dim) for n in inputs)
        self.attns = nn.ModuleList(Transformer(c, dim, c.layers[level], c.heads[level]) for _ in (inputs if attend else []))
        self.resize = resize

    def forward(
        self, i: int, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None
    ) -> Tensor:  # index of a block, B D H W, B E, B T K, B T -> B D' H W
        x = self.blocks[i](x, time)
        return self.attns[i](x, text, mask) if len(self.attns) else x


class Middle(nn.Module):
    """The lowest resolution: block, Transformer, block."""

    def __init__(self, c: Config):
        super().__init__()
        dim = c.dim * c.growth[-1]
        self.blocks = nn.ModuleList(Block(c, dim, dim) for _ in range(2))
        self.attns = nn.ModuleList([Transformer(c, dim, c.layers[-1], c.heads[-1])])

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None
    ) -> Tensor:  # B D H W, B E, B T K, B T -> B D H W
        return self.blocks[1](self.attns[0](self.blocks[0](x, time), text, mask), time)


class StableDiffusionUNet(nn.Module):
    """Stable Diffusion U-Net: noisy latents, their time (0 .. 999), the states of a text -> the predicted noise, or v.

    Sides may be any; if the total stride does not divide them, maps are enlarged to the sides that they had on the way down.
    """

    heads: ClassVar[tuple[str, ...]] = ("guidance",)  # which a network that becomes a latent consistency model lacks before

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len({len(x) for x in (c.growth, c.attend, c.layers, c.heads)}) > 1:
            raise SettingsError(
                f"growth={c.growth}, attend={c.attend}, layers={c.layers} and heads={c.heads} must have as many numbers as levels"
            )
        widths, last = [c.dim * growth for growth in c.growth], len(c.growth) - 1
        self.time1, self.time2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, 4 * c.dim)
        self.guidance = nn.Linear(c.guidance_dim, c.dim, bias=False) if c.guidance_dim else None
        self.conv_in = nn.Conv2d(c.channels + c.extra, c.dim, 3, padding=1)
        self.down, self.up, dim, skips = nn.ModuleList(), nn.ModuleList(), c.dim, [c.dim]
        for i, width in enumerate(widths):
            resize = nn.Conv2d(width, width, 3, 2, 1) if i < last else None
            self.down.append(Level(c, i, [dim] + [width] * (c.depth - 1), c.attend[i], resize))
            skips += [width] * (c.depth + (i < last))
            dim = width
        self.mid = Middle(c)
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(dim if j == 0 else width) + skips.pop() for j in range(c.depth + 1)]
            resize = nn.Conv2d(width, width, 3, padding=1) if i else None
            self.up.append(Level(c, i, inputs, c.attend[i], resize))
            dim = width
        self.norm, self.conv_out = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, c.channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def embed_guidance(self, scale: Tensor) -> Tensor:  # B -> B guidance_dim
        """Return sines, then cosines of guidance scales, of which 1 is no guidance."""
        half = self.config.guidance_dim // 2
        places = torch.arange(half, dtype=torch.float32, device=scale.device)
        rate = torch.exp(places * -(math.log(MAX_PERIOD) / (half - 1)))
        angle = ((scale.float() - 1) * GUIDANCE_SCALE)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], 1)

    def embed_time(self, time: Tensor, guidance: Tensor | None) -> Tensor:  # B, B -> B E
        """Return the embedding of the time, and of the guidance scale if the network has one."""
        dtype = self.time1.weight.dtype
        x = embed_time(time, self.config.dim).to(dtype)
        if self.guidance is not None and guidance is not None:
            x = x + self.guidance(self.embed_guidance(guidance).to(dtype))
        return self.time2(F.silu(self.time1(x)))

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # B C' H W, B E, B T K -> B C H W
        """Return the prediction for latents with an embedded time."""
        seen = [x := self.conv_in(x)]
        for level in cast(list[Level], list(self.down)):
            for i in range(len(level.blocks)):
                seen.append(x := level(i, x, time, text, mask))
            if level.resize is not None:
                seen.append(x := level.resize(x))
        x = self.mid(x, time, text, mask)
        for level in cast(list[Level], list(self.up)):
            for i in range(len(level.blocks)):
                x = level(i, torch.cat([x, seen.pop()], 1), time, text, mask)
            if level.resize is not None:
                x = level.resize(F.interpolate(x, size=seen[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.norm(x)))

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:  # B C' H W, B, B T K, B T, B -> B C H W
        return self.denoise(latent, self.embed_time(time, guidance), text, text_mask)


OWN_CONFIG: Mapping[str, ConfigRow] = {
    **CONFIG,
    "addition_embed_type": Expect(None, among=(None,)),
    "projection_class_embeddings_input_dim": Expect(None),
}
V2: dict[str, Any] = {"text_dim": 1024, "heads": (5, 10, 20, 20), "linear": True}

CARD = Card(
    name="stable-diffusion-unet",
    model=StableDiffusionUNet,
    config=Config,
    paper="arXiv:2112.10752",
    year=2022,
    input_type="noisy-latent",
    output_type="image",
    optional_inputs=("text_mask", "guidance"),
    sizes={
        "sd1-unet": Size(params=859_520_964, source="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        "sd1-inpainting-unet": Size(extra=5, params=859_535_364, source="stable-diffusion-v1-5/stable-diffusion-inpainting"),
        "sd2-unet": Size(image=96, **V2, params=865_910_724, source="stabilityai/stable-diffusion-2-1"),
        "sd2-base-unet": Size(**V2, params=865_910_724, source="stabilityai/stable-diffusion-2-1-base"),
        "lcm-sd1-unet": Size(image=96, guidance_dim=256, params=859_602_884, source="SimianLuo/LCM_Dreamshaper_v7"),
        "stable-diffusion-unet-test": Size(
            image=8, text_dim=12, dim=8, growth=(1, 2), depth=1, attend=(True, False), layers=(1, 2), heads=(2, 4), groups=4
        ),
    },
    weights={"diffusers": diffusers_keys, "compvis": compvis_keys},
    configs={"diffusers": OWN_CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
