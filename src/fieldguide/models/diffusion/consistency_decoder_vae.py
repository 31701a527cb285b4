"""Consistency decoder VAE: latents of Stable Diffusion decoded by two steps of denoising (OpenAI 2023).

New here: the decoder of DALL-E 3 (Betker et al. 2023, "Improving image generation with better captions") replaces that of the KL
autoencoder. Latents lose details, of which a decoder trained on pixels draws the mean; this one generates them, as a consistency model
(Song et al. 2023, arXiv:2303.01469) of images that sees the enlarged latents. The encoder is that of Stable Diffusion 1.

Initialization: as `autoencoder-kl` and `super-resolution-unet`.
Shapes: B batch, C channels of the image, H W sides of the image, h w of its 4 channels of latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.diffusion._shared.tiles import map_tiles
from fieldguide.models.diffusion.autoencoder_kl import AutoencoderKL, Encoder, diffusers_keys, parse_widths
from fieldguide.models.diffusion.super_resolution_unet import DIFFUSERS as DECODER_KEYS
from fieldguide.models.diffusion.super_resolution_unet import Config as DecoderConfig
from fieldguide.models.diffusion.super_resolution_unet import SuperResolutionUNet
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row

LATENT = 4  # channels of latents
MEANS = 0.38862467, 0.02253063, 0.07381133, -0.0171294  # of scaled latents, in the training of the decoder
STDS = 0.9654121, 1.0440036, 0.76147926, 0.77022034
TIMES, STEPS = 1024, (1008, 512)  # of the noise process, and those at which the decoder is called
SIGMA_DATA = 0.5  # standard deviation of images


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 32  # `sample_size` of the files; other sizes work, too
    dim: int = 128  # of the encoder
    growth: tuple[int, ...] = (1, 2, 4, 4)  # width of each level of the encoder, times dim
    depth: int = 2  # blocks per level of the encoder
    groups: int = 32  # of group norm
    scaling: float = 0.18215  # 1 / standard deviation of the latents
    widths: tuple[int, ...] = (320, 640, 1024, 1024)  # of each level of the decoder
    decoder_depth: int = 3  # blocks per level of the decoder on the way down; one more on the way up
    decoder_groups: int = 32
    latent = LATENT
    shift = 0.0

    @property
    def decoder(self) -> DecoderConfig:
        """The config of the decoder."""
        return DecoderConfig(
            channels=self.channels,
            condition=LATENT,
            image=self.image,
            widths=self.widths,
            depth=self.decoder_depth,
            groups=self.decoder_groups,
            variance=True,
            times=TIMES,
            scaled=True,
        )


def get_signal(time: int) -> float:
    """Return the signal at a time of the cosine schedule, the root of alpha-bar (arXiv:2102.09672, equation 17)."""
    angle = lambda t: (t / TIMES + 0.008) / 1.008 * math.pi / 2
    return math.cos(angle(time + 1)) / math.cos(angle(0))


class ConsistencyDecoderVAE(AutoencoderKL):
    """Consistency decoder VAE: image -> image, decoded from the means of its latents. Pixels are -1 to 1.

    What is decoded is the same at every call: unless it is given, the noise comes from a fixed seed, and is that of every image.
    """

    mean: Tensor  # 1 4 1 1
    std: Tensor  # 1 4 1 1

    def __init__(self, config: Config):
        nn.Module.__init__(self)  # without the decoder of `AutoencoderKL`
        c: Any = config
        self.config = c
        self.stride = 2 ** (len(c.growth) - 1)
        self.encoder, self.quant = Encoder(c, 2 * LATENT), nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.decoder = SuperResolutionUNet(c.decoder)  # type: ignore[assignment]  # in place of that of `AutoencoderKL`
        for name, values in (("mean", MEANS), ("std", STDS)):
            self.register_buffer(name, torch.tensor(values).view(1, LATENT, 1, 1), persistent=False)

    def decode(self, z: Tensor, tile: int = 0, noise: tuple[Tensor, ...] = ()) -> Tensor:  # B 4 h w -> B C H W
        """Return the images of latents as the encoder gives them. `noise` is that of both steps, B C H W each. `tile` is the side, in
        latents, of the overlapping tiles in which larger maps are decoded, with noise of their own; 0 decodes the whole map at once.
        """
        if 0 < tile < max(z.shape[2:]):
            return map_tiles(self.decode, z, tile, self.stride)
        seen = (z * self.config.scaling - self.mean) / self.std
        seen = F.interpolate(seen, scale_factor=float(self.stride), mode="nearest")
        shape = (seen.shape[0], self.config.channels, *seen.shape[2:])
        first, second = noise or (x.expand(shape).to(seen) for x in self.draw_noise(shape))
        x = first * (1 - get_signal(STEPS[0]) ** 2) ** 0.5
        x = self.denoise(x, STEPS[0], seen)
        signal = get_signal(STEPS[1])
        return self.denoise(signal * x + (1 - signal**2) ** 0.5 * second, STEPS[1], seen)

    def draw_noise(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:  # -> 1 C H W, 1 C H W
        """Return the noise of both steps for an image. Raises `SettingsError` while torch traces a graph."""
        if torch.compiler.is_exporting():
            raise SettingsError("its decoder draws noise from a seed, which graphs do not keep: they would draw other numbers.")
        source = torch.Generator().manual_seed(0)
        first, second = (torch.randn(1, *shape[1:], generator=source) for _ in STEPS)
        return first, second

    def denoise(self, x: Tensor, time: int, seen: Tensor) -> Tensor:  # B C H W, B 4 H W -> B C H W
        """Return the images that the decoder predicts at a time, with the factors of EDM (arXiv:2206.00364, table 1) for x / signal."""
        signal = get_signal(time)
        variance = (1 - signal**2) / signal**2  # of the noise in x / signal
        total = variance + SIGMA_DATA**2
        when = torch.full((x.shape[0],), time, device=x.device)
        output = self.decoder(x / (signal * total**0.5), when, seen)
        return x * SIGMA_DATA**2 / (signal * total) + output * SIGMA_DATA * (variance / total) ** 0.5

    def reconstruct(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Raise `SettingsError`: the decoder is trained as a consistency model, not by its reconstructions."""
        raise SettingsError(
            "consistency-decoder-vae has published weights only: its decoder does not learn from reconstructions. Train autoencoder-kl."
        )


DIFFUSERS: dict[str, Row] = {
    **{
        key: row
        for key, row in diffusers_keys("to_q", "to_k", "to_v", "to_out.0").items()
        if key.startswith(("encoder.", "quant_conv."))
    },
    **{f"decoder_unet.{key}": f"decoder.{row}" for key, row in DECODER_KEYS.items()},
}


def parse_encoder(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return `dim` and `growth` for a configuration of diffusers."""
    return parse_widths({"block_out_channels": raw["encoder_block_out_channels"]})


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("ConsistencyDecoderVAE", among=("ConsistencyDecoderVAE",)),
    "scaling_factor": WithDefault("scaling", 0.18215),
    "latent_channels": Expect(LATENT),
    "sample_size": "image",
    "encoder_act_fn": Expect("silu"),
    "encoder_block_out_channels": Derived(parse_encoder, lambda c: [c.dim * growth for growth in c.growth]),
    "encoder_double_z": Expect(True),
    "encoder_down_block_types": Expect(lambda c: ["DownEncoderBlock2D"] * len(c.growth)),
    "encoder_in_channels": "channels",
    "encoder_layers_per_block": "depth",
    "encoder_norm_num_groups": "groups",
    "encoder_out_channels": Expect(LATENT),
    "decoder_add_attention": Expect(False),
    "decoder_block_out_channels": Derived(
        lambda raw: {"widths": tuple(raw["decoder_block_out_channels"])}, lambda c: list(c.widths)
    ),
    "decoder_down_block_types": Expect(lambda c: ["ResnetDownsampleBlock2D"] * len(c.widths)),
    "decoder_up_block_types": Expect(lambda c: ["ResnetUpsampleBlock2D"] * len(c.widths)),
    "decoder_downsample_padding": Expect(1),
    "decoder_in_channels": Expect(lambda c: c.channels + LATENT),
    "decoder_out_channels": Expect(lambda c: 2 * c.channels),
    "decoder_layers_per_block": "decoder_depth",
    "decoder_norm_eps": Expect(1e-5),
    "decoder_norm_num_groups": "decoder_groups",
    "decoder_num_train_timesteps": Expect(TIMES),
    "decoder_resnet_time_scale_shift": Expect("scale_shift"),
    "decoder_time_embedding_type": Expect("learned"),
    "block_out_channels": Derived(lambda raw: {}, lambda c: [c.dim * growth for growth in c.growth]),
    "force_upcast": Derived(lambda raw: {}, lambda c: False),
}

CARD = Card(
    name="consistency-decoder-vae",
    model=ConsistencyDecoderVAE,
    config=Config,
    paper="arXiv:2303.01469",
    year=2023,
    input_type="image",
    output_type="reconstruction",
    sizes={
        "openai-consistency-decoder": Size(params=655_441_366, source="openai/consistency-decoder"),
        "consistency-decoder-vae-test": Size(
            image=8, dim=8, growth=(1, 2), depth=1, groups=4, widths=(8, 12), decoder_depth=1, decoder_groups=4
        ),
    },
    weights={"diffusers": DIFFUSERS},
    configs={"diffusers": CONFIG},
    scale=HALF,
)
