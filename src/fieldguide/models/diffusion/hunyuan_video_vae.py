"""HunyuanVideo's video autoencoder: causal attention over frames (Kong et al. 2024, arXiv:2412.03603).

New here: the KL autoencoder of images with convolutions over time that see only frames before theirs. All borders repeat the outermost
values. Attention of the lowest resolution spans all positions of a frame and of those before it. The first frame stands alone: it is only
enlarged, so that 1 + 4n frames give 1 + n latents.

Norms look at all frames that are computed at once. As published, videos of more than 17 frames are computed in parts of 17 frames, or 5
latents, and what two parts share is blended linearly.

Initialization: torch's defaults, as in the authors' code.
Shapes: B batch, F frames, C channels of a video, L of the latents, H W sides of a frame, f h w frames and sides of the latents, D width of
a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.diffusion import autoencoder_kl
from fieldguide.models.diffusion._shared.causal_video import VideoAutoencoder, check_video
from fieldguide.models.diffusion._shared.tiles import OVERLAP, blend
from fieldguide.models.diffusion.autoencoder_kl import LOGVAR_RANGE, norm, parse_widths
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row

TEMPORAL_LEVELS = 2  # the last levels but one, after which the number of frames changes, too
FRAMES_PER_LATENT = 2**TEMPORAL_LEVELS


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    frames: int = 129  # of the videos that are generated; other numbers work, too
    image: int = 256  # side of square frames of about the size that it was trained with; others work, too
    latent: int = 16  # L
    dim: int = 128
    growth: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, times dim
    depth: int = 2  # blocks per level of the encoder; the decoder has one more
    groups: int = 32  # of group norm
    scaling: float = 0.476986  # 1 / standard deviation of the latents


class CausalConv(nn.Conv3d):
    """Convolution of 3 frames, the last of which is the one that it computes, and 3 x 3 positions."""

    def __init__(self, inputs: int, dim: int, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__(inputs, dim, 3, stride)

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D' F' H' W'
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


class Block(nn.Module):
    """Residual block: twice group norm, SiLU and causal convolution."""

    def __init__(self, c: Config, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c, inputs), CausalConv(inputs, dim)
        self.norm2, self.conv2 = norm(c, dim), CausalConv(dim, dim)
        self.shortcut = nn.Conv3d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D' F H W
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(autoencoder_kl.Attention):
    """Single-head self-attention over the positions of each frame and of those before it, with a residual connection."""

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F H W
        y = self.norm(x).flatten(2).mT[:, None]  # B 1 F*H*W D
        q, k, v = self.q(y), self.k(y), self.v(y)
        size = x.shape[3] * x.shape[4]
        ends = range(size, q.shape[2] + 1, size)
        found = [dot_product_attention(q[:, :, end - size : end], k[:, :, :end], v[:, :, :end]) for end in ends]
        return x + self.proj(torch.cat(found, 2)[:, 0]).mT.unflatten(2, x.shape[2:])


class Up(nn.Module):
    """Double the sides and, if `temporal`, the number of frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.conv, self.temporal = CausalConv(dim, dim), temporal

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F' 2*H 2*W
        if self.temporal:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, 2)], 2)
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))


class Level(nn.Module):
    """Blocks of one resolution, and a layer that changes the resolution, except for the last level."""

    def __init__(self, c: Config, inputs: int, dim: int, depth: int, resize: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, inputs if j == 0 else dim, dim) for j in range(depth))
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D' F' H' W'
        for block in self.blocks:
            x = block(x)
        return x if self.resize is None else self.resize(x)


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.blocks, self.attn = nn.ModuleList(Block(c, dim, dim) for _ in range(2)), Attention(c, dim)

    def forward(self, x: Tensor) -> Tensor:  # B D f h w -> B D f h w
        return self.blocks[1](self.attn(self.blocks[0](x)))


def is_temporal(c: Config, level: int) -> bool:
    """Return whether the number of frames changes after a level."""
    return level >= len(c.growth) - 1 - TEMPORAL_LEVELS


class Encoder(nn.Module):
    """Video -> means and logarithms of variances of latents, before `quant`."""

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.dim * growth for growth in c.growth]
        self.conv_in = CausalConv(c.channels, c.dim)
        resizes = [CausalConv(dim, dim, (1 + is_temporal(c, i), 2, 2)) for i, dim in enumerate(widths[:-1])]
        self.down = nn.ModuleList(
            Level(c, before, dim, c.depth, resize) for before, dim, resize in zip([c.dim, *widths], widths, [*resizes, None])
        )
        self.mid = Middle(c, widths[-1])
        self.norm, self.conv_out = norm(c, widths[-1]), CausalConv(widths[-1], 2 * c.latent)

    def forward(self, x: Tensor) -> Tensor:  # B C F H W -> B 2*L f h w
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm(self.mid(x))))


class Decoder(nn.Module):
    """Latents, after `post_quant` -> video."""

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.dim * growth for growth in reversed(c.growth)]
        self.conv_in, self.mid = CausalConv(c.latent, widths[0]), Middle(c, widths[0])
        self.up = nn.ModuleList(
            Level(c, before, dim, c.depth + 1, Up(dim, is_temporal(c, i)) if i < len(widths) - 1 else None)
            for i, (before, dim) in enumerate(zip([widths[0], *widths], widths))
        )
        self.norm, self.conv_out = norm(c, widths[-1]), CausalConv(widths[-1], c.channels)

    def forward(self, z: Tensor) -> Tensor:  # B L f h w -> B C F H W
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm(x)))


class HunyuanVideoVAE(VideoAutoencoder):
    """HunyuanVideo's autoencoder: video -> video, decoded from the means of its latents. Pixels are -1 to 1; outputs may lie beyond.

    Raises `SettingsError` for too few levels, and `DataError` if `encode` gets a video whose sides are not divisible by `stride` or
    that has not one frame more than a multiple of 4.
    """

    part: ClassVar[int] = 4  # latents in a row, besides the one before, that are computed at once
    frame_stride = FRAMES_PER_LATENT
    frame_multiple = FRAMES_PER_LATENT

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.growth) <= TEMPORAL_LEVELS:
            raise SettingsError(f"growth={c.growth} must have at least {TEMPORAL_LEVELS + 1} values")
        self.stride = 2 ** (len(c.growth) - 1)
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant, self.post_quant = nn.Conv3d(2 * c.latent, 2 * c.latent, 1), nn.Conv3d(c.latent, c.latent, 1)

    def encode(self, video: Tensor, part: int = part) -> tuple[Tensor, Tensor]:  # B F C H W -> B f L h w, B f L h w
        """Return the means of the latents and the logarithms of their variances. `part` is the number of latents of a part, as described
        above; 0 computes all at once.
        """
        check_video(video, self.stride, self.frame_stride)
        encode = lambda x: self.quant(self.encoder(x))
        x = map_parts(encode, video.transpose(1, 2), part, FRAMES_PER_LATENT, 1)
        mean, logvar = x.transpose(1, 2).chunk(2, 2)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor, part: int = part) -> Tensor:  # B f L h w -> B F C H W
        """Return the videos of latents as the encoder gives them. `part` is as in `encode`."""
        decode = lambda z: self.decoder(self.post_quant(z))
        return map_parts(decode, z.transpose(1, 2), part, 1, FRAMES_PER_LATENT).transpose(1, 2)


def map_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, part: int, per_input: int, per_output: int
) -> Tensor:  # B D F H W -> B D' F' H' W'
    """Return a function of a video, computed for overlapping parts of 1 + `part` latents, each with the frame before it.

    A latent is `per_input` frames of `x` and `per_output` of the result.
    """
    if not 0 < part < x.shape[2] / per_input:
        return function(x)
    step = max(1, int(part * (1 - OVERLAP)))
    found, before = list[Tensor](), None
    for at in range(0, x.shape[2] - 1, step * per_input):
        new = function(x[:, :, at : at + part * per_input + 1])
        if before is None:
            found.append(new[:, :, :1])
        new = new[:, :, 1:]
        before = new if before is None else blend(before, new, (part - step) * per_output, 2)
        found.append(before[:, :, : step * per_output])
    return torch.cat(found, 2)


def list_keys() -> dict[str, Row]:
    """Return the key table of diffusers, which wraps convolutions over time."""
    names: dict[str, Row] = {"quant_conv.*": "quant.*", "post_quant_conv.*": "post_quant.*"}
    for side, way, resize in (("encoder", "down", "downsamplers.0.conv.conv"), ("decoder", "up", "upsamplers.0.conv.conv")):
        names |= {f"{side}.conv_{end}.conv.*": f"{side}.conv_{end}.*" for end in ("in", "out")}
        names[f"{side}.conv_norm_out.*"] = f"{side}.norm.*"
        names[f"{side}.{way}_blocks.{{i}}.{resize}.*"] = f"{side}.{way}.{{i}}.resize.{'conv.' if way == 'up' else ''}*"
        for theirs, ours in ((f"{way}_blocks.{{i}}", f"{way}.{{i}}"), ("mid_block", "mid")):
            block, here = f"{side}.{theirs}.resnets.{{j}}.", f"{side}.{ours}.blocks.{{j}}."
            names |= {f"{block}norm{{k}}.*": f"{here}norm{{k}}.*", f"{block}conv{{k}}.conv.*": f"{here}conv{{k}}.*"}
            names[f"{block}conv_shortcut.conv.*"] = f"{here}shortcut.*"
        attn, here = f"{side}.mid_block.attentions.0.", f"{side}.mid.attn."
        names |= {f"{attn}group_norm.*": f"{here}norm.*", f"{attn}to_out.0.*": f"{here}proj.*"}
        names |= {f"{attn}to_{part}.*": f"{here}{part}.*" for part in "qkv"}
    return names


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("AutoencoderKLHunyuanVideo"),
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "latent_channels": "latent",
    "block_out_channels": Derived(parse_widths, lambda c: [c.dim * growth for growth in c.growth]),
    "down_block_types": Expect(lambda c: ["HunyuanVideoDownBlock3D"] * len(c.growth)),
    "up_block_types": Expect(lambda c: ["HunyuanVideoUpBlock3D"] * len(c.growth)),
    "layers_per_block": "depth",
    "act_fn": Expect("silu"),
    "norm_num_groups": "groups",
    "scaling_factor": WithDefault("scaling", 0.476986),
    "spatial_compression_ratio": Expect(lambda c: 2 ** (len(c.growth) - 1)),
    "temporal_compression_ratio": Expect(FRAMES_PER_LATENT),
    "mid_block_add_attention": Expect(True),
}

CARD = Card(
    name="hunyuan-video-vae",
    model=HunyuanVideoVAE,
    config=Config,
    paper="arXiv:2412.03603",
    year=2024,
    input_type="video",
    output_type="reconstruction",
    sizes={
        "hunyuan-video-13b-vae": Size(params=246_478_803, source="hunyuanvideo-community/HunyuanVideo"),
        "hunyuan-video-vae-test": Size(channels=2, frames=9, image=8, latent=3, dim=8, growth=(1, 2, 2), depth=1, groups=1),
    },
    weights={"diffusers": list_keys()},
    configs={"diffusers": CONFIG},
    scale=HALF,
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)
