"""CogVideoX's video autoencoder: norms of the decoder see the latents (Yang et al. 2024, arXiv:2408.06072).

New here: convolutions over time see only frames before theirs, and the first frame is repeated before it; the number of frames is halved by
averages of two and doubled by repetition, and the first frame stands alone, so that 1 + 4n frames give 1 + n latents. Norms of the decoder
are scaled and shifted at each position by a map of the latents (spatially adaptive normalization, Zheng et al. 2022, arXiv:2209.09002).

Norms over groups of positions look at all frames that are computed at once, so the parts in which a video is computed belong to the
definition: 8 frames or 2 latents, the first part with the frame that stands alone. Convolutions keep two frames of the part before.

Initialization: torch's defaults, as in the authors' code.
Shapes: B batch, F frames, C channels of a video, L of the latents, H W sides of a frame, f h w frames and sides of the latents, D width of
a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.diffusion._shared.causal_video import Cache, CausalConv, VideoAutoencoder, check_video, map_frames
from fieldguide.models.diffusion.autoencoder_kl import LOGVAR_RANGE, norm, parse_widths
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row

TEMPORAL_LEVELS = 2  # after which the number of frames is halved, too
FRAMES_PER_LATENT = 2**TEMPORAL_LEVELS


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    frames: int = 49  # of the videos that it was trained with; other numbers work, too
    image: int = 480  # height of their frames; others work, too
    width: int = 720  # of their frames
    latent: int = 16  # L
    dim: int = 128
    growth: tuple[int, ...] = (1, 2, 2, 4)  # width of each level, times dim
    depth: int = 3  # blocks per level of the encoder; the decoder has one more
    groups: int = 32  # of group norm
    scaling: float = 1.15258426  # 1 / standard deviation of the latents


class Norm(nn.Module):
    """Group norm; in the decoder with a scale and a shift for each position, computed from the latents there."""

    def __init__(self, c: Config, dim: int, adaptive: bool):
        super().__init__()
        self.norm = norm(c, dim)
        self.scale, self.shift = (nn.Conv3d(c.latent, dim, 1) if adaptive else None for _ in range(2))

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:  # B D F H W, B L f h w -> B D F H W
        x = self.norm(x)
        if z is None or self.scale is None or self.shift is None:
            return x
        return x * stretch(self.scale(z), x.shape[2:]) + stretch(self.shift(z), x.shape[2:])


def stretch(z: Tensor, size: torch.Size) -> Tensor:  # B D f h w -> B D F H W
    """Return maps of another size by repetition. Of an odd number of frames, the first one stands alone."""
    frames, *sides = size
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, size=(frames, *sides))
    return torch.cat([F.interpolate(z[:, :, :1], size=(1, *sides)), F.interpolate(z[:, :, 1:], size=(frames - 1, *sides))], 2)


class Block(nn.Module):
    """Residual block: twice norm, SiLU and causal convolution."""

    def __init__(self, c: Config, inputs: int, dim: int, adaptive: bool):
        super().__init__()
        self.norm1, self.conv1 = Norm(c, inputs, adaptive), CausalConv(inputs, dim, repeats_first=True)
        self.norm2, self.conv2 = Norm(c, dim, adaptive), CausalConv(dim, dim, repeats_first=True)
        self.shortcut = nn.Conv3d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None, cache: Cache) -> Tensor:  # B D F H W, B L f h w -> B D' F H W
        y = self.conv1(F.silu(self.norm1(x, z)), cache)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y, z)), cache)


class Down(nn.Module):
    """Halve the sides and, if `temporal`, the number of frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.conv, self.temporal = nn.Conv2d(dim, dim, 3, 2), temporal

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F' H/2 W/2
        if self.temporal:
            alone = x.shape[2] % 2
            first, rest = x[:, :, :alone], x[:, :, alone:]
            x = torch.cat([first, (rest[:, :, ::2] + rest[:, :, 1::2]) / 2], 2)
        return map_frames(self.conv, F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the sides and, if `temporal`, the number of frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.conv, self.temporal = nn.Conv2d(dim, dim, 3, padding=1), temporal

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F' 2*H 2*W
        frames, *sides = x.shape[2:]
        if self.temporal:
            frames = 2 * frames - frames % 2
        return map_frames(self.conv, stretch(x, torch.Size((frames, *(2 * side for side in sides)))))


class Level(nn.Module):
    """Blocks of one resolution, and a layer that changes the resolution, except for the last level."""

    def __init__(self, c: Config, inputs: int, dim: int, depth: int, resize: nn.Module | None, adaptive: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, inputs if j == 0 else dim, dim, adaptive) for j in range(depth))
        self.resize = resize

    def forward(self, x: Tensor, z: Tensor | None, cache: Cache) -> Tensor:  # B D F H W, B L f h w -> B D' F' H' W'
        for block in self.blocks:
            x = block(x, z, cache)
        return x if self.resize is None else self.resize(x)


class Encoder(nn.Module):
    """Video -> means and logarithms of variances of latents."""

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.dim * growth for growth in c.growth]
        self.conv_in = CausalConv(c.channels, c.dim, repeats_first=True)
        self.down = nn.ModuleList(
            Level(c, before, dim, c.depth, Down(dim, i < TEMPORAL_LEVELS) if i < len(widths) - 1 else None, False)
            for i, (before, dim) in enumerate(zip([c.dim, *widths], widths))
        )
        self.mid = Level(c, widths[-1], widths[-1], 2, None, False)
        self.norm, self.conv_out = norm(c, widths[-1]), CausalConv(widths[-1], 2 * c.latent, repeats_first=True)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # B C F H W -> B 2*L f h w
        x = self.conv_in(x, cache)
        for level in (*self.down, self.mid):
            x = level(x, None, cache)
        return self.conv_out(F.silu(self.norm(x)), cache)


class Decoder(nn.Module):
    """Latents -> video."""

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.dim * growth for growth in reversed(c.growth)]
        self.conv_in = CausalConv(c.latent, widths[0], repeats_first=True)
        self.mid = Level(c, widths[0], widths[0], 2, None, True)
        self.up = nn.ModuleList(
            Level(c, before, dim, c.depth + 1, Up(dim, i < TEMPORAL_LEVELS) if i < len(widths) - 1 else None, True)
            for i, (before, dim) in enumerate(zip([widths[0], *widths], widths))
        )
        self.norm, self.conv_out = Norm(c, widths[-1], True), CausalConv(widths[-1], c.channels, repeats_first=True)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:  # B L f h w -> B C F H W
        x = self.conv_in(z, cache)
        for level in (self.mid, *self.up):
            x = level(x, z, cache)
        return self.conv_out(F.silu(self.norm(x, z)), cache)


class CogVideoXVAE(VideoAutoencoder):
    """CogVideoX's autoencoder: video -> video, decoded from the means of its latents. Pixels are -1 to 1; outputs may lie beyond.

    Raises `SettingsError` for too few levels, and `DataError` if `encode` gets a video whose sides are not divisible by `stride` or
    that has not one frame more than a multiple of 8.
    """

    part: ClassVar[int] = 2  # latents in a row that are computed at once
    frame_stride = FRAMES_PER_LATENT

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.growth) <= TEMPORAL_LEVELS:
            raise SettingsError(f"growth={c.growth} must have at least {TEMPORAL_LEVELS + 1} values")
        self.stride, self.frame_multiple = 2 ** (len(c.growth) - 1), self.part * FRAMES_PER_LATENT
        self.encoder, self.decoder = Encoder(c), Decoder(c)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:  # B F C H W -> B f L h w, B f L h w
        """Return the means of the latents and the logarithms of their variances."""
        check_video(video, self.stride, self.frame_multiple)
        cache: Cache = {}
        x = torch.cat([self.encoder(x, cache) for x in split_frames(video.transpose(1, 2), self.frame_multiple)], 2)
        mean, logvar = x.transpose(1, 2).chunk(2, 2)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor, part: int = part) -> Tensor:  # B f L h w -> B F C H W
        """Return the videos of latents as the encoder gives them. `part` is the number of latents that are computed at once; with
        others than in training, norms change.
        """
        cache: Cache = {}
        return torch.cat([self.decoder(z, cache) for z in split_frames(z.transpose(1, 2), part)], 2).transpose(1, 2)


def split_frames(x: Tensor, size: int) -> list[Tensor]:  # B D F H W -> tensors B D size H W
    """Return parts of `size` frames; the first part also has what remains."""
    frames = x.shape[2]
    count = max(frames // size, 1)
    return list(x.split([frames - size * (count - 1), *[size] * (count - 1)], 2))


def list_keys() -> dict[str, Row]:
    """Return the key table of diffusers, which wraps convolutions over time."""
    names: dict[str, Row] = {}
    levels = {
        "encoder.down_blocks.{i}.": "encoder.down.{i}.",
        "decoder.up_blocks.{i}.": "decoder.up.{i}.",
        "encoder.mid_block.": "encoder.mid.",
        "decoder.mid_block.": "decoder.mid.",
    }
    norms = {"encoder.norm_out.": "encoder.norm."}
    adaptive = {"decoder.norm_out.": "decoder.norm."}
    for theirs, ours in levels.items():
        (adaptive if theirs.startswith("decoder") else norms)[f"{theirs}resnets.{{j}}.norm{{k}}."] = (
            f"{ours}blocks.{{j}}.norm{{k}}."
        )
        names[f"{theirs}resnets.{{j}}.conv{{k}}.conv.*"] = f"{ours}blocks.{{j}}.conv{{k}}.*"
        names[f"{theirs}resnets.{{j}}.conv_shortcut.*"] = f"{ours}blocks.{{j}}.shortcut.*"
        names[f"{theirs}{'down' if 'down' in theirs else 'up'}samplers.0.conv.*"] = f"{ours}resize.conv.*"
    for theirs, ours in norms.items():
        names[f"{theirs}*"] = f"{ours}*" if ours == "encoder.norm." else f"{ours}norm.*"
    for theirs, ours in adaptive.items():
        names |= {f"{theirs}norm_layer.*": f"{ours}norm.*", f"{theirs}conv_y.conv.*": f"{ours}scale.*"}
        names[f"{theirs}conv_b.conv.*"] = f"{ours}shift.*"
    for end in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"):
        names[f"{end}.conv.*"] = f"{end}.*"
    return names


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("AutoencoderKLCogVideoX"),
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "sample_height": "image",
    "sample_width": "width",
    "latent_channels": "latent",
    "block_out_channels": Derived(parse_widths, lambda c: [c.dim * growth for growth in c.growth]),
    "down_block_types": Expect(lambda c: ["CogVideoXDownBlock3D"] * len(c.growth)),
    "up_block_types": Expect(lambda c: ["CogVideoXUpBlock3D"] * len(c.growth)),
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "norm_eps": Expect(1e-6),
    "act_fn": Expect("silu"),
    "scaling_factor": WithDefault("scaling", 1.15258426),
    "shift_factor": Expect(None),
    "latents_mean": Expect(None),
    "latents_std": Expect(None),
    "temporal_compression_ratio": Expect(FRAMES_PER_LATENT),
    "use_quant_conv": Expect(False),
    "use_post_quant_conv": Expect(False),
    "invert_scale_latents": Expect(False),
}

CARD = Card(
    name="cogvideox-vae",
    model=CogVideoXVAE,
    config=Config,
    paper="arXiv:2408.06072",
    year=2024,
    input_type="video",
    output_type="reconstruction",
    sizes={
        "cogvideox-2b-vae": Size(params=215_583_907, source="THUDM/CogVideoX-2b"),
        "cogvideox-5b-vae": Size(scaling=0.7, params=215_583_907, source="THUDM/CogVideoX-5b"),
        "cogvideox-vae-test": Size(
            channels=2, frames=9, image=8, width=12, latent=3, dim=4, growth=(1, 2, 2), depth=1, groups=2
        ),
    },
    weights={"diffusers": list_keys()},
    configs={"diffusers": CONFIG},
    scale=HALF,
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)
