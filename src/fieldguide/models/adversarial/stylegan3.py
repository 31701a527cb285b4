"""StyleGAN 3: an alias-free image generator (Karras et al. 2021, "Alias-Free GANs", arXiv:2106.12423).

New here: all maps stand for continuous, band-limited signals, so that details move with what they belong to instead of sticking to
pixels. The input are Fourier features that can be moved and turned. Nonlinearities are computed on enlarged maps and low-pass
filtered; the frequencies that layers keep grow from layer to layer. There is no noise for pixels and no sum of images. StyleGAN 3-T
is equivariant to translation; 3-R, with 1x1 convolutions and radially symmetric filters, to rotation, too. `metrics/equivariance.py`
measures both. The critic is `stylegan2-discriminator`.

Initialization: N(0, 1), scaled when used (`layers.equalized_lr`) or demodulated; biases of styles 1, other biases 0; frequencies
uniform in the circle of the first cutoff; the first style leaves the input as it is.
Shapes: B batch, Z noise, K classes, L styles (one for the input and each layer), W width of a style, C channels, S side of an
image, D channels of a map, H its side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.adversarial.stylegan2_discriminator import Discriminator
from fieldguide.models.layers.equalized_lr import EqualizedLinear
from fieldguide.models.layers.lowpass import design_lowpass
from fieldguide.models.layers.modulated_conv import modulated_conv
from fieldguide.models.layers.style_mapping import StyleMapping
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.mapping.key_rules import Dropped

__all__ = ["CARD", "Config", "Discriminator", "Generator"]

FIRST_CUTOFF, FIRST_STOPBAND, LAST_STOPBAND = 2.0, 2**2.1, 2**0.3  # the last one relative to its cutoff
CRITICAL_LAYERS = 2  # at the end, whose cutoff is half of the sampling rate
FILTER_TAPS = 6  # of a filter per pixel of the coarser side
ENLARGEMENT = 2  # of maps before a nonlinearity
MAGNITUDE_DECAY = 0.999  # of the moving average of squared inputs
CLAMP = 256.0  # largest value after a nonlinearity
OUTPUT_SCALE = 0.25


@dataclass(frozen=True, kw_only=True)
class Config:
    noise: int = 512  # Z + K: the last K values are the class, one-hot; all zero = no class
    num_classes: int = 0  # K
    channels: int = 3  # C
    image: int = 1024  # S: a power of 2
    style: int = 512  # W
    depth: int = 2  # dense layers between noise and style
    layers: int = 14  # convolutions, without that to the image
    dim: int = 512  # channels of the widest maps
    base: int = 32768  # maps with a cutoff of f cycles per image have base / 2f channels, at most `dim`
    kernel: int = 3  # side of the convolutions' kernels: 3 for T, 1 for R
    radial: bool = False  # True for R: filters are symmetric in all directions, except those of the last layers
    margin: int = 10  # pixels around the image on all maps


@dataclass(frozen=True)
class Band:
    """The maps behind a layer: their side without margin is `rate`, in pixels; frequencies are in cycles per image."""

    side: int
    rate: int
    cutoff: float
    half_width: float  # of the transition of filters
    channels: int


def plan_bands(config: Config) -> list[Band]:
    """Return the maps behind the input and each layer, of which the last makes the image (section 3.2 and appendix F)."""
    count, last = config.layers, config.image / 2
    bands = []
    for i in range(count + 1):
        share = min(i / (count - CRITICAL_LAYERS), 1)
        cutoff = FIRST_CUTOFF * (last / FIRST_CUTOFF) ** share
        stopband = FIRST_STOPBAND * (last * LAST_STOPBAND / FIRST_STOPBAND) ** share
        rate = 2 ** math.ceil(math.log2(min(2 * stopband, config.image)))
        side = config.image if i >= count - 1 else rate + 2 * config.margin
        channels = config.channels if i == count else round(min(config.base / 2 / cutoff, config.dim))
        bands.append(Band(side, rate, cutoff, max(stopband, rate / 2) - cutoff, max(1, channels)))
    return bands


class FourierInput(nn.Module):
    """Waves of random frequencies, moved and turned as the style says, and mixed (section 3.1 and appendix F)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, band: Band, style: int):
        super().__init__()
        self.band, dim = band, band.channels
        freqs = nn.init.normal_(torch.empty(dim, 2))
        radii = freqs.square().sum(1, keepdim=True).sqrt()
        # A normal distribution divided by its radius and exp(radius^2)^(1/4): uniform in the circle.
        self.register_buffer("freqs", freqs / (radii * radii.square().exp().pow(0.25)) * band.cutoff)
        self.register_buffer("phases", nn.init.uniform_(torch.empty(dim), -0.5, 0.5))
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(dim, dim)))
        self.affine = EqualizedLinear(style, 4)  # cosine, sine, and the shift
        nn.init.zeros_(self.affine.weight)
        self.affine.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(self, w: Tensor, motion: Tensor | None = None) -> Tensor:  # B W, B 3 3 -> B D H H
        """Return the waves at all pixels. `motion` maps places of the new image to places of the old one (x, y, 1)."""
        turn = self.affine(w)
        turn = turn / turn[:, :2].norm(dim=1, keepdim=True)
        cosine, sine, right, down = turn.unbind(1)
        rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # B 2 2
        shift = -(rotation @ torch.stack([right, down], 1)[:, :, None])  # B 2 1: first moved, then turned
        if motion is not None:
            shift = shift + rotation @ motion[:, :2, 2:]
            rotation = rotation @ motion[:, :2, :2]
        phases = self.phases + (self.freqs @ shift)[:, :, 0]  # B D
        freqs = self.freqs @ rotation  # B D 2
        limit = self.band.rate / 2
        amplitude = (1 - (freqs.norm(dim=2) - self.band.cutoff) / (limit - self.band.cutoff)).clamp(0, 1)
        side = self.band.side
        place = (torch.arange(side, dtype=freqs.dtype, device=freqs.device) - (side - 1) / 2) / self.band.rate
        angle = freqs[:, :, 0, None, None] * place + freqs[:, :, 1, None, None] * place[:, None] + phases[:, :, None, None]
        waves = torch.sin(2 * math.pi * angle) * amplitude[:, :, None, None]
        return torch.einsum("bdhw,ed->behw", waves, self.weight / math.sqrt(self.weight.shape[1]))


class Layer(nn.Module):
    """Modulated convolution, bias, leaky ReLU on enlarged maps, low-pass filters; `last` makes the image without nonlinearity."""

    magnitude: Tensor
    up_taps: Tensor
    down_taps: Tensor

    def __init__(self, before: Band, after: Band, config: Config, *, critical: bool, last: bool):
        super().__init__()
        self.last, kernel = last, 1 if last else config.kernel
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(after.channels, before.channels, kernel, kernel)))
        self.bias = nn.Parameter(torch.zeros(after.channels))
        self.affine = EqualizedLinear(config.style, before.channels, first_bias=1.0)
        self.register_buffer("magnitude", torch.ones(()))  # moving average of squared inputs
        rate = max(before.rate, after.rate) * (1 if last else ENLARGEMENT)
        self.up, self.down = rate // before.rate, rate // after.rate
        up = FILTER_TAPS * self.up if self.up > 1 and not last else 1
        down = FILTER_TAPS * self.down if self.down > 1 and not last else 1
        taps = design_lowpass(up, before.cutoff, 2 * before.half_width, rate) if up > 1 else torch.ones(1)
        self.register_buffer("up_taps", taps.float(), persistent=False)
        radial = config.radial and not critical
        taps = design_lowpass(down, after.cutoff, 2 * after.half_width, rate, radial=radial) if down > 1 else torch.ones(1)
        self.register_buffer("down_taps", taps.float(), persistent=False)
        # Pixels of the enlarged maps that give `after.side` pixels, minus those that there are.
        total = (after.side - 1) * self.down + 1 - (before.side + kernel - 1) * self.up + up + down - 2
        self.padding = (total + self.up) // 2, total - (total + self.up) // 2

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # B D H H, B W -> B D' H' H'
        if self.training:
            with torch.no_grad():
                size = x.detach().to(self.magnitude.dtype).square().mean()
                self.magnitude.lerp_(size, 1 - MAGNITUDE_DECAY)
        style = self.affine(w)
        style = style / math.sqrt(x.shape[1]) if self.last else style  # the last kernel has one pixel
        x = x * self.magnitude.rsqrt().to(x.dtype)
        x = modulated_conv(x, self.weight, style, demodulate=not self.last, padding=self.weight.shape[-1] - 1)
        x = upfirdn(x + self.bias[:, None, None], self.up_taps, up=self.up, padding=self.padding, gain=float(self.up**2))
        x = (x if self.last else math.sqrt(2) * F.leaky_relu(x, 0.2)).clamp(-CLAMP, CLAMP)
        return upfirdn(x, self.down_taps, down=self.down)


class Synthesis(nn.Module):
    """Styles -> image."""

    def __init__(self, config: Config):
        super().__init__()
        bands = plan_bands(config)
        self.input = FourierInput(bands[0], config.style)
        self.layers = nn.ModuleList(
            Layer(
                bands[max(0, i - 1)],
                band,
                config,
                critical=i >= config.layers - CRITICAL_LAYERS,
                last=i == config.layers,
            )
            for i, band in enumerate(bands)
        )

    def forward(self, styles: Tensor, motion: Tensor | None = None) -> Tensor:  # B L W, B 3 3 -> B C S S
        """Make images. `motion` moves the input: it maps places of the new image to those of the old one (x, y, 1).

        Places are measured from the center, in sides of the image.
        """
        x = self.input(styles[:, 0], motion)
        for i, layer in enumerate(self.layers):
            x = layer(x, styles[:, i + 1])
        return OUTPUT_SCALE * x


class Generator(nn.Module):
    """StyleGAN 3 generator: noise -> images, about -1 .. 1. Raises `SettingsError` for sides that are no power of 2."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        if config.image < 16 or config.image & (config.image - 1):
            raise SettingsError(f"image={config.image} must be a power of 2 of at least 16, such as 32. Set task.side=32.")
        if config.layers <= CRITICAL_LAYERS:
            raise SettingsError(f"layers={config.layers} must be at least {CRITICAL_LAYERS + 1}")
        if config.noise <= config.num_classes:
            raise SettingsError(f"noise={config.noise} must be larger than num_classes={config.num_classes}, which it includes")
        self.layers = config.layers + 2  # L
        self.mapping = StyleMapping(config.noise - config.num_classes, config.num_classes, config.style, config.depth)
        self.synthesis = Synthesis(config)

    def map_styles(self, z: Tensor, truncation: float = 1.0) -> Tensor:  # B Z+K -> B L W
        """Return the style of each layer. Below 1, `truncation` moves styles towards their mean, which gives more typical images."""
        return self.mapping(z, truncation)[:, None].expand(-1, self.layers, -1)

    def forward(self, z: Tensor) -> Tensor:  # B Z+K -> B C S S
        return self.synthesis(self.map_styles(z))


def nvidia(config: Config) -> dict[str, Any]:
    """Return the names of NVIDIA's files (`G_ema.state_dict()`), which hold sides and channels of the maps."""
    table: dict[str, Any] = {
        "mapping.embed.*": "mapping.embed.*",
        "mapping.fc{i}.*": "mapping.layers.{i}.*",
        "mapping.w_avg": "mapping.average",
        "synthesis.input.transform": Dropped("the images are not moved"),
        "synthesis.input.affine.*": "synthesis.input.affine.*",
        "synthesis.input.*": "synthesis.input.*",
    }
    for i, band in enumerate(plan_bands(config)):
        theirs, ours = f"synthesis.L{i}_{band.side}_{band.channels}", f"synthesis.layers.{i}"
        table |= {f"{theirs}.{name}_filter": Dropped("the filter follows from the config") for name in ("up", "down")}
        table |= {f"{theirs}.magnitude_ema": f"{ours}.magnitude", f"{theirs}.affine.*": f"{ours}.affine.*"}
        table |= {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}
    return table


R: dict[str, Any] = {"kernel": 1, "radial": True, "dim": 1024, "base": 65536}
COUNTED = "NVlabs/stylegan3"

CARD = Card(
    name="stylegan3",
    model=Generator,
    config=Config,
    paper="arXiv:2106.12423",
    year=2021,
    input_type="noise",
    output_type="image",
    sizes={
        "stylegan3-t-1024": Size(params=22_313_167, source=COUNTED),
        "stylegan3-t-512": Size(image=512, params=24_873_519, source=COUNTED),
        "stylegan3-t-256": Size(image=256, params=28_472_133, source=COUNTED),
        "stylegan3-r-1024": Size(**R, params=15_093_151, source=COUNTED),
        "stylegan3-r-512": Size(**R, image=512, params=16_665_594, source=COUNTED),
        "stylegan3-r-256": Size(**R, image=256, params=18_816_387, source=COUNTED),
        "stylegan3-mini": Size(image=32, noise=64, style=64, layers=6, dim=64, base=1024, margin=4),
        "stylegan3-r-mini": Size(image=32, noise=64, style=64, layers=6, dim=128, base=2048, margin=4, kernel=1, radial=True),
        "stylegan3-test": Size(
            noise=8, num_classes=3, image=16, style=6, layers=5, dim=5, base=40, margin=2, radial=True, channels=2
        ),
    },
    weights={"nvidia": nvidia},
    recipe={
        "loss": "non-saturating",
        "penalty": "r1",
        "penalty_weight": 1.0,
        "penalty_interval": 16,
        "optimizer": "adamw",
        "lr": 2.5e-3,
        "beta1": 0.0,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "grad_clip": 0.0,
        "warmup": 0.0,
        "schedule": "constant",
        "ema": 0.999,
    },  # appendix G of the paper; the weight of R1 for small images
    adapt=lambda need: {"noise": Config.noise + need["num_classes"]} if need.get("num_classes") else {},  # plus a one-hot class
    parts={"critic": "stylegan2-discriminator"},
)
