"""Wan's video autoencoder: 4 x 8 x 8 pixels as one vector of latents (Wan Team 2025, arXiv:2503.20314).

New here: convolutions over time see only frames before theirs, so that a video of any length is encoded and decoded in parts, with two
frames per layer kept from the part before, and the result is that of the whole. The first frame stands alone: 1 + 4n frames give
1 + n latents, and an image is a video of one frame. Norms are root mean squares over channels, because those over groups of
positions would look ahead. Latents have a mean and standard deviation for each channel.

Layers that halve the number of frames leave the first one as it is, and combine three frames for every second one after it; layers that
double it leave the first one as it is, too, and do not see it when they compute the others.

Initialization: torch's defaults, as in the authors' code; ones for the norms.
Shapes: B batch, F frames, C channels of a video, L of the latents, H W sides of a frame, f h w frames and sides of the latents, D width of
a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.diffusion._shared.causal_video import Cache, CausalConv, VideoAutoencoder, check_video, map_frames
from fieldguide.models.diffusion.autoencoder_kl import LOGVAR_RANGE
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Reshaped, Row

EPS = 1e-12  # least length of a vector in norms
# Of the published latents, for each channel.
MEAN: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    frames: int = 81  # of the videos that it was trained with; other numbers work, too
    image: int = 640  # side of square frames of about the size that it was trained with; others work, too
    latent: int = 16  # L
    dim: int = 96
    growth: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, times dim
    depth: int = 2  # blocks per level of the encoder; the decoder has one more
    temporal: tuple[bool, ...] = (
        False,
        True,
        True,
    )  # whether the number of frames is halved, too, after each level but the last
    mean: tuple[float, ...] = MEAN  # of the latents
    std: tuple[float, ...] = STD


class Norm(nn.Module):
    """Divide each vector by its root mean square over channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F H W
        return F.normalize(x, dim=1, eps=EPS) * (len(self.weight) ** 0.5 * self.weight)[:, None, None, None]


class Block(nn.Module):
    """Residual block: twice norm, SiLU and causal convolution."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), CausalConv(inputs, dim)
        self.norm2, self.conv2 = Norm(dim), CausalConv(dim, dim)
        self.shortcut = nn.Conv3d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B D F H W -> B D' F H W
        y = self.conv1(F.silu(self.norm1(x)), cache)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)), cache)


class Attention(nn.Module):
    """Single-head self-attention over the positions of each frame, with a residual connection."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.qkv, self.proj = Norm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B D F H W -> B D F H W
        y = self.norm(x).transpose(1, 2).flatten(3).mT  # B F H*W D
        y = self.proj(dot_product_attention(*self.qkv(y).chunk(3, -1)))
        return x + y.mT.unflatten(3, x.shape[3:]).transpose(1, 2)


class Down(nn.Module):
    """Halve the sides and, if `temporal`, the number of frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, 2)
        self.time = nn.Conv3d(dim, dim, (3, 1, 1), (2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B D F H W -> B D F' H/2 W/2
        x = map_frames(self.conv, F.pad(x, (0, 1, 0, 1)))
        if self.time is None:
            return x
        past = None if cache is None else cache.get(self)
        first = x[:, :, : 1 if past is None else 0]
        x = x if past is None else torch.cat([past, x], 2)
        if cache is not None:
            cache[self] = x[:, :, -1:]
        return first if x.shape[2] == 1 else torch.cat([first, self.time(x)], 2)


class Up(nn.Module):
    """Double the sides, halve the width and, if `temporal`, double the number of frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.conv, self.time = nn.Conv2d(dim, dim // 2, 3, padding=1), CausalConv(dim, 2 * dim, 1) if temporal else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B D F H W -> B D/2 F' 2*H 2*W
        if self.time is not None:
            alone = cache is None or self not in cache  # the first frame of all
            first, x = (x[:, :, :1], x[:, :, 1:]) if alone else (x[:, :, :0], x)
            if cache is not None:
                cache[self] = x[:, :, :0]
            if x.shape[2]:
                x = self.time(x, cache).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # even, then odd frames
            x = torch.cat([first, x], 2)
        return map_frames(self.conv, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, and a layer that changes the resolution, except for the last level."""

    def __init__(self, inputs: int, dim: int, depth: int, resize: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(inputs if j == 0 else dim, dim) for j in range(depth))
        self.resize = resize

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B D F H W -> B D' F' H' W'
        for block in self.blocks:
            x = block(x, cache)
        return x if self.resize is None else self.resize(x, cache)


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, dim: int):
        super().__init__()
        self.blocks, self.attn = nn.ModuleList(Block(dim, dim) for _ in range(2)), Attention(dim)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B D f h w -> B D f h w
        return self.blocks[1](self.attn(self.blocks[0](x, cache)), cache)


class Encoder(nn.Module):
    """Video -> `outputs` channels of latents, before `quant`."""

    def __init__(self, c: Config, outputs: int):
        super().__init__()
        widths = [c.dim * growth for growth in c.growth]
        self.conv_in = CausalConv(c.channels, c.dim)
        self.down = nn.ModuleList(
            Level(before, dim, c.depth, Down(dim, c.temporal[i]) if i < len(widths) - 1 else None)
            for i, (before, dim) in enumerate(zip([c.dim, *widths], widths))
        )
        self.mid, self.norm, self.conv_out = Middle(widths[-1]), Norm(widths[-1]), CausalConv(widths[-1], outputs)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:  # B C F H W -> B outputs f h w
        x = self.conv_in(x, cache)
        for level in self.down:
            x = level(x, cache)
        return self.conv_out(F.silu(self.norm(self.mid(x, cache))), cache)


class Decoder(nn.Module):
    """Latents, after `post_quant` -> video."""

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.dim * growth for growth in reversed(c.growth)]
        self.conv_in, self.mid = CausalConv(c.latent, widths[0]), Middle(widths[0])
        inputs = [widths[0], *(width // 2 for width in widths)]  # layers that double the sides halve the width
        self.up = nn.ModuleList(
            Level(before, dim, c.depth + 1, Up(dim, c.temporal[-1 - i]) if i < len(widths) - 1 else None)
            for i, (before, dim) in enumerate(zip(inputs, widths))
        )
        self.norm, self.conv_out = Norm(widths[-1]), CausalConv(widths[-1], c.channels)

    def forward(self, z: Tensor, cache: Cache | None) -> Tensor:  # B L f h w -> B C F H W
        x = self.mid(self.conv_in(z, cache), cache)
        for level in self.up:
            x = level(x, cache)
        return self.conv_out(F.silu(self.norm(x)), cache)


class WanVAE(VideoAutoencoder):
    """Wan's autoencoder: video -> video, decoded from the means of its latents. Pixels are -1 to 1; outputs may lie beyond.

    Raises `SettingsError` for invalid sizes, and `DataError` if `encode` gets a video whose sides are not divisible by `stride` or
    that has not one frame more than a multiple of `frame_stride`.
    """

    part: ClassVar[int] = 1  # latents in a row that are decoded at once for little memory
    mean: Tensor  # L
    std: Tensor  # L

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if not len(c.growth) - 1 == len(c.temporal) or not len(c.mean) == len(c.std) == c.latent:
            raise SettingsError(
                f"growth={c.growth} must have one value more than temporal={c.temporal}, and mean and std must have latent={c.latent}"
            )
        self.stride, self.frame_stride = 2 ** len(c.temporal), 2 ** sum(c.temporal)
        self.frame_multiple = self.frame_stride
        self.encoder, self.decoder = Encoder(c, 2 * c.latent), Decoder(c)
        self.quant, self.post_quant = nn.Conv3d(2 * c.latent, 2 * c.latent, 1), nn.Conv3d(c.latent, c.latent, 1)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(c, name)), persistent=False)

    def encode(self, video: Tensor, part: int = 0) -> tuple[Tensor, Tensor]:  # B F C H W -> B f L h w, B f L h w
        """Return the means of the latents and the logarithms of their variances. `part` is the number of latents in a row, after the
        first, that are computed at once, which limits the memory; 0 computes all at once.
        """
        check_video(video, self.stride, self.frame_stride)
        x = video.transpose(1, 2)
        if part:
            cache: Cache = {}
            x = torch.cat([self.encoder(x, cache) for x in split_frames(x, part * self.frame_stride)], 2)
        else:
            x = self.encoder(x, None)
        mean, logvar = self.quant(x).transpose(1, 2).chunk(2, 2)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor, part: int = 0) -> Tensor:  # B f L h w -> B F C H W
        """Return the videos of latents as the encoder gives them. `part` is as in `encode`."""
        x = self.post_quant(z.transpose(1, 2))
        if not part:
            return self.decoder(x, None).transpose(1, 2)
        cache: Cache = {}
        return torch.cat([self.decoder(x, cache) for x in split_frames(x, part)], 2).transpose(1, 2)

    def normalize(self, z: Tensor) -> Tensor:  # B f L h w -> B f L h w
        """Return latents as diffusion works on them, with a mean of about 0 and a standard deviation of about 1."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, z: Tensor) -> Tensor:  # B f L h w -> B f L h w
        """Return latents as `decode` expects them."""
        return z * self.std[:, None, None] + self.mean[:, None, None]


def split_frames(x: Tensor, size: int) -> list[Tensor]:  # B D F H W -> tensors B D size H W
    """Return the first frame, then parts of at most `size` frames."""
    return [x[:, :, :1], *(x[:, :, 1:].split(size, 2) if x.shape[2] > 1 else ())]


def diffusers_keys(c: Any) -> dict[str, Row]:
    """Return the key table of diffusers, which numbers blocks and layers of the encoder in one sequence and whose norms and
    attention have axes of length 1.
    """
    names: dict[str, Row] = {f"{name}_conv.*": f"{name}.*" for name in ("quant", "post_quant")}

    def add_norm(theirs: str, ours: str, ones: int = 3) -> None:
        names[f"{theirs}.gamma"] = Reshaped(f"{ours}.weight", (-1,), (-1, *[1] * ones))

    def add_block(theirs: str, ours: str) -> None:
        for k in (1, 2):
            add_norm(f"{theirs}.norm{k}", f"{ours}.norm{k}")
        names.update({f"{theirs}.conv{{k}}.*": f"{ours}.conv{{k}}.*", f"{theirs}.conv_shortcut.*": f"{ours}.shortcut.*"})

    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_{end}.*": f"{side}.conv_{end}.*" for end in ("in", "out")}
        add_norm(f"{side}.norm_out", f"{side}.norm")
        add_block(f"{side}.mid_block.resnets.{{j}}", f"{side}.mid.blocks.{{j}}")
        attn, here = f"{side}.mid_block.attentions.0.", f"{side}.mid.attn."
        add_norm(f"{attn}norm", f"{here}norm", 2)
        for theirs, ours, width in (("to_qkv", "qkv", -1), ("proj", "proj", -1)):
            dim = c.dim * c.growth[-1]
            names[f"{attn}{theirs}.weight"] = Reshaped(f"{here}{ours}.weight", (width, dim), (width, dim, 1, 1))
            names[f"{attn}{theirs}.bias"] = f"{here}{ours}.bias"
    add_block("decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{i}.blocks.{j}")
    resizes = [("decoder.up_blocks.{i}.upsamplers.0.", "decoder.up.{i}.resize.")]
    place = 0
    for i in range(len(c.growth)):
        for j in range(c.depth):
            add_block(f"encoder.down_blocks.{place + j}", f"encoder.down.{i}.blocks.{j}")
        place += c.depth + 1
        resizes.append((f"encoder.down_blocks.{place - 1}.", f"encoder.down.{i}.resize."))
    for theirs, ours in resizes:
        names |= {f"{theirs}resample.1.*": f"{ours}conv.*", f"{theirs}time_conv.*": f"{ours}time.*"}
    return names


def check_decoder(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` if the decoder is wider than the encoder, as in Wan 2.2."""
    if raw.get("decoder_base_dim") not in (None, raw["base_dim"]):
        raise WeightsError(
            f"decoder_base_dim={raw['decoder_base_dim']} is not supported: it must be base_dim={raw['base_dim']}"
        )
    return {}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("AutoencoderKLWan"),
    "base_dim": "dim",
    "decoder_base_dim": Derived(check_decoder, lambda c: None),
    "z_dim": "latent",
    "dim_mult": Derived(lambda raw: {"growth": tuple(raw["dim_mult"])}, lambda c: list(c.growth)),
    "num_res_blocks": "depth",
    "attn_scales": Expect([]),
    "temperal_downsample": Derived(lambda raw: {"temporal": tuple(raw["temperal_downsample"])}, lambda c: list(c.temporal)),
    "dropout": Expect(0.0),
    "latents_mean": Derived(lambda raw: {"mean": tuple(raw["latents_mean"])}, lambda c: list(c.mean)),
    "latents_std": Derived(lambda raw: {"std": tuple(raw["latents_std"])}, lambda c: list(c.std)),
    "is_residual": Expect(False),
    "in_channels": Derived(lambda raw: {"channels": raw.get("in_channels", 3)}, lambda c: c.channels),
    "out_channels": Expect(lambda c: c.channels, absent=3),
    "patch_size": Expect(None),
    "scale_factor_temporal": Expect(lambda c: 2 ** sum(c.temporal)),
    "scale_factor_spatial": Expect(lambda c: 2 ** len(c.temporal)),
}

CARD = Card(
    name="wan-vae",
    model=WanVAE,
    config=Config,
    paper="arXiv:2503.20314",
    year=2025,
    input_type="video",
    output_type="reconstruction",
    sizes={
        "wan2.1-vae": Size(params=126_892_531, source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        "wan-vae-test": Size(
            channels=2,
            frames=9,
            image=8,
            latent=3,
            dim=4,
            growth=(1, 2, 4),
            depth=1,
            temporal=(True, True),
            mean=(0.5, -0.2, 0.1),
            std=(2.0, 1.5, 0.5),
        ),
    },
    weights={"diffusers": diffusers_keys},
    configs={"diffusers": CONFIG},
    scale=HALF,
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)
