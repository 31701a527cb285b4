"""KL autoencoder: images as small maps of latents for diffusion (Rombach et al. 2022, arXiv:2112.10752).

New here: diffusion does not compute pixels, but latents with an eighth of the sides, from which details are decoded that
eyes hardly notice. The encoder gives mean and variance of each latent, kept near N(0, 1) by a weak Kullback-Leibler term, and
the latents are divided by their standard deviation. SDXL has the same network; those of Stable Diffusion 3 and FLUX have 16
channels, a shift, and no 1 x 1 convolutions around the latents.

Initialization: torch's defaults, as in the authors' code.
Shapes: B batch, C channels of the image, L of the latents, H W sides of the image, h w of the latents, D width of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import DataError, WeightsError
from fieldguide.models.diffusion._shared.tiles import map_tiles
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Reshaped, Row

LOGVAR_RANGE = -30.0, 20.0  # of the logarithms of variances


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 512  # side of the images that it was trained with; others work, too
    latent: int = 4  # L
    dim: int = 128
    growth: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, times dim
    depth: int = 2  # blocks per level of the encoder; the decoder has one more
    groups: int = 32  # of group norm
    quant: bool = True  # 1 x 1 convolutions after the encoder and before the decoder
    scaling: float = 0.18215  # 1 / standard deviation of the latents
    shift: float = 0.0  # mean of the latents


def norm(c: Any, dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(c.groups, dim, eps=1e-6)


class Block(nn.Module):
    """Residual block: twice group norm, SiLU and 3x3 convolution."""

    def __init__(self, c: Any, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c, inputs), nn.Conv2d(inputs, dim, 3, padding=1)
        self.norm2, self.conv2 = norm(c, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, dim, 1) if inputs != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H W
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, c: Any, dim: int):
        super().__init__()
        self.norm = norm(c, dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D H W
        y = self.norm(x).flatten(2).mT[:, None]  # B 1 H*W D
        y = self.proj(dot_product_attention(self.q(y), self.k(y), self.v(y))[:, 0])
        return x + y.mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks of one resolution, and a convolution that changes the resolution, except for the last level."""

    def __init__(self, c: Any, inputs: int, dim: int, depth: int, resize: nn.Conv2d | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, inputs if j == 0 else dim, dim) for j in range(depth))
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H W
        for block in self.blocks:
            x = block(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: Any, dim: int):
        super().__init__()
        self.blocks, self.attn = nn.ModuleList(Block(c, dim, dim) for _ in range(2)), Attention(c, dim)

    def forward(self, x: Tensor) -> Tensor:  # B D h w -> B D h w
        return self.blocks[1](self.attn(self.blocks[0](x)))


class Encoder(nn.Module):
    """Image -> `outputs` channels of latents, before `quant`."""

    def __init__(self, c: Any, outputs: int):
        super().__init__()
        widths = [c.dim * growth for growth in c.growth]
        self.conv_in = nn.Conv2d(c.channels, c.dim, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c, before, dim, c.depth, nn.Conv2d(dim, dim, 3, 2) if i < len(widths) - 1 else None)
            for i, (before, dim) in enumerate(zip([c.dim, *widths], widths))
        )
        self.mid = Middle(c, widths[-1])
        self.norm, self.conv_out = norm(c, widths[-1]), nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B outputs h w
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if isinstance(level.resize, nn.Conv2d):
                x = level.resize(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm(self.mid(x))))


class Decoder(nn.Module):
    """Latents, after `post_quant` -> image."""

    def __init__(self, c: Any):
        super().__init__()
        widths = [c.dim * growth for growth in reversed(c.growth)]
        self.conv_in, self.mid = nn.Conv2d(c.latent, widths[0], 3, padding=1), Middle(c, widths[0])
        self.up = nn.ModuleList(
            Level(c, before, dim, c.depth + 1, nn.Conv2d(dim, dim, 3, padding=1) if i < len(widths) - 1 else None)
            for i, (before, dim) in enumerate(zip([widths[0], *widths], widths))
        )
        self.norm, self.conv_out = norm(c, widths[-1]), nn.Conv2d(widths[-1], c.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # B L h w -> B C H W
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
            if isinstance(level.resize, nn.Conv2d):
                x = level.resize(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm(x)))


class AutoencoderKL(nn.Module):
    """KL autoencoder: image -> image, decoded from the means of its latents. Pixels are -1 to 1.

    Raises `DataError` if `encode` gets an image whose sides are not divisible by `stride`.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.stride = 2 ** (len(c.growth) - 1)  # sides of the image by those of the latents
        self.encoder, self.decoder = Encoder(c, 2 * c.latent), Decoder(c)
        self.quant = nn.Conv2d(2 * c.latent, 2 * c.latent, 1) if c.quant else nn.Identity()
        self.post_quant = nn.Conv2d(c.latent, c.latent, 1) if c.quant else nn.Identity()

    def encode(self, image: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:  # B C H W -> B L h w, B L h w
        """Return the means of the latents and the logarithms of their variances. `tile` is the side, in pixels, of the
        overlapping tiles in which larger images are encoded; 0 encodes the whole image at once.
        """
        if any(side % self.stride for side in image.shape[2:]):
            raise DataError(
                f"an image of {image.shape[3]} x {image.shape[2]} pixels cannot be encoded: its sides must be multiples of "
                f"{self.stride}. Crop or resize it."
            )
        encode = lambda part: self.quant(self.encoder(part))
        moments = map_tiles(encode, image, tile, 1 / self.stride) if 0 < tile < max(image.shape[2:]) else encode(image)
        mean, logvar = moments.chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor, tile: int = 0) -> Tensor:  # B L h w -> B C H W
        """Return the images of latents as the encoder gives them. `tile` is the side, in latents, of the overlapping tiles in
        which larger maps are decoded; 0 decodes the whole map at once.
        """
        decode = lambda part: self.decoder(self.post_quant(part))
        return map_tiles(decode, z, tile, self.stride) if 0 < tile < max(z.shape[2:]) else decode(z)

    def normalize(self, z: Tensor) -> Tensor:  # B L h w -> B L h w
        """Return latents as diffusion works on them, with a mean of about 0 and a standard deviation of about 1."""
        return (z - self.config.shift) * self.config.scaling

    def denormalize(self, z: Tensor) -> Tensor:  # B L h w -> B L h w
        """Return latents as `decode` expects them."""
        return z / self.config.scaling + self.config.shift

    def pad(self, image: Tensor) -> Tensor:  # B C H W -> B C H' W'
        """Return images with their last row and column repeated, up to multiples of the stride."""
        height, width = image.shape[2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")

    def reconstruct(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # B C H W -> B C H W, terms
        """Return images decoded from latents that are drawn, and `kl`: the divergence of their distributions from N(0, 1), added up over
        the latents of an image and divided by its number of values.
        """
        mean, logvar = self.encode(self.pad(image))
        made = self.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        return made[:, :, : image.shape[2], : image.shape[3]], {"kl": divergence.mean() / image[0].numel()}

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B C H W
        return self.decode(self.encode(self.pad(image))[0])[:, :, : image.shape[2], : image.shape[3]]


def diffusers_keys(query: str, key: str, value: str, out: str) -> dict[str, Row]:
    """Return the key table of diffusers for one of its two sets of attention names."""
    names: dict[str, Row] = {"quant_conv.*": "quant.*", "post_quant_conv.*": "post_quant.*"}
    parts = ("down_blocks.{i}", "down.{i}"), ("up_blocks.{i}", "up.{i}"), ("mid_block", "mid")
    for side, kinds in (("encoder", (parts[0], parts[2])), ("decoder", (parts[1], parts[2]))):
        names |= {
            f"{side}.conv_in.*": f"{side}.conv_in.*",
            f"{side}.conv_norm_out.*": f"{side}.norm.*",
            f"{side}.conv_out.*": f"{side}.conv_out.*",
            f"{side}.{kinds[0][0]}.{'down' if side == 'encoder' else 'up'}samplers.0.conv.*": f"{side}.{kinds[0][1]}.resize.*",
        }
        for theirs, ours in kinds:
            block, here = f"{side}.{theirs}.resnets.{{j}}.", f"{side}.{ours}.blocks.{{j}}."
            names |= {f"{block}{part}{{k}}.*": f"{here}{part}{{k}}.*" for part in ("norm", "conv")}
            names |= {f"{block}conv_shortcut.*": f"{here}shortcut.*"}
        attn, here = f"{side}.mid_block.attentions.0.", f"{side}.mid.attn."
        names |= {
            f"{attn}{theirs}.*": f"{here}{ours}.*" for theirs, ours in zip((query, key, value, out), ("q", "k", "v", "proj"))
        }
        names |= {f"{attn}group_norm.*": f"{here}norm.*"}
    return names


def compvis_keys(c: Any) -> dict[str, Row]:
    """Return the key table of CompVis, whose decoder numbers the levels from the highest resolution and whose attention has
    1 x 1 convolutions.
    """
    names: dict[str, Row] = {"quant_conv.*": "quant.*", "post_quant_conv.*": "post_quant.*"}
    last, dim = len(c.growth) - 1, c.dim * c.growth[-1]
    down = [(f"encoder.down.{i}.", f"encoder.down.{i}.", "downsample") for i in range(last + 1)]
    up = [(f"decoder.up.{last - i}.", f"decoder.up.{i}.", "upsample") for i in range(last + 1)]
    for theirs, ours, resize in (*down, *up):
        names |= {f"{theirs}block.{{j}}.{part}{{k}}.*": f"{ours}blocks.{{j}}.{part}{{k}}.*" for part in ("norm", "conv")}
        names |= {f"{theirs}block.{{j}}.nin_shortcut.*": f"{ours}blocks.{{j}}.shortcut.*"}
        names |= {f"{theirs}{resize}.conv.*": f"{ours}resize.*"}
    for side in ("encoder", "decoder"):
        names |= {
            f"{side}.conv_in.*": f"{side}.conv_in.*",
            f"{side}.norm_out.*": f"{side}.norm.*",
            f"{side}.conv_out.*": f"{side}.conv_out.*",
            f"{side}.mid.attn_1.norm.*": f"{side}.mid.attn.norm.*",
        }
        names |= {f"{side}.mid.block_{{j+1}}.{p}{{k}}.*": f"{side}.mid.blocks.{{j}}.{p}{{k}}.*" for p in ("norm", "conv")}
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "proj")):
            weight = Reshaped(f"{side}.mid.attn.{ours}.weight", (dim, dim), (dim, dim, 1, 1))
            names |= {f"{side}.mid.attn_1.{theirs}.weight": weight}
            names |= {f"{side}.mid.attn_1.{theirs}.bias": f"{side}.mid.attn.{ours}.bias"}
    return names


def parse_widths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `dim` and `growth` for a configuration of diffusers. Raises `WeightsError` if widths are not multiples."""
    first, *_ = widths = raw["block_out_channels"]
    if odd := [width for width in widths if width % first]:
        raise WeightsError(f"block_out_channels={widths} is not supported: {odd[0]} is not a multiple of {first}")
    return {"dim": first, "growth": tuple(width // first for width in widths)}


CONFIG = {  # of diffusers
    "_class_name": Expect("AutoencoderKL"),
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "sample_size": "image",
    "latent_channels": "latent",
    "block_out_channels": Derived(parse_widths, lambda c: [c.dim * growth for growth in c.growth]),
    "down_block_types": Expect(lambda c: ["DownEncoderBlock2D"] * len(c.growth)),
    "up_block_types": Expect(lambda c: ["UpDecoderBlock2D"] * len(c.growth)),
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "act_fn": Expect("silu"),
    "scaling_factor": WithDefault("scaling", 0.18215),  # missing in the first files
    "shift_factor": Derived(lambda raw: {"shift": raw.get("shift_factor") or 0.0}, lambda c: c.shift or None),
    "latents_mean": Expect(None),
    "latents_std": Expect(None),
    "use_quant_conv": WithDefault("quant", True),
    "use_post_quant_conv": Expect(lambda c: c.quant, absent=True),
    "mid_block_add_attention": Expect(True),
}

CARD = Card(
    name="autoencoder-kl",
    model=AutoencoderKL,
    config=Config,
    paper="arXiv:2112.10752",
    year=2022,
    input_type="image",
    output_type="reconstruction",
    sizes={
        "sd-vae": Size(params=83_653_863, source="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        "sdxl-vae": Size(image=1024, scaling=0.13025, params=83_653_863, source="stabilityai/stable-diffusion-xl-base-1.0"),
        "sd3-vae": Size(
            image=1024,
            latent=16,
            quant=False,
            scaling=1.5305,
            shift=0.0609,
            params=83_819_683,
            source="stabilityai/stable-diffusion-3-medium-diffusers",
        ),
        "flux-vae": Size(
            image=1024,
            latent=16,
            quant=False,
            scaling=0.3611,
            shift=0.1159,
            params=83_819_683,
            source="black-forest-labs/FLUX.1-dev",
        ),
        # For training from scratch on images of 32 and 28 pixels, with latents of a quarter of the sides.
        "kl-f4-32": Size(image=32, dim=32, growth=(1, 2, 2), depth=1, groups=8),
        "kl-f4-28": Size(channels=1, image=28, latent=2, dim=16, growth=(1, 2, 2), depth=1, groups=8),
        "autoencoder-kl-test": Size(channels=2, image=8, latent=3, dim=8, growth=(1, 2, 2), depth=1, groups=4),
    },
    weights={
        "diffusers": diffusers_keys("to_q", "to_k", "to_v", "to_out.0"),
        "diffusers-2022": diffusers_keys("query", "key", "value", "proj_attn"),
        "compvis": compvis_keys,
    },
    configs={"diffusers": CONFIG},
    scale=HALF,
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)
