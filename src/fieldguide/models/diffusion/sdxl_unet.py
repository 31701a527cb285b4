"""SDXL U-Net: three times as large, told the sizes of images (Podell et al. 2023, arXiv:2307.01952).

New here: the states of two text encoders side by side, one vector for the whole text, and the sizes that training images had
before they were scaled and cropped, so that none had to be left out; at generation they ask for large images that are not cropped.
Most Transformer layers are at the lowest resolution, of three.

Initialization: as Stable Diffusion's U-Net.
Shapes: B batch, C channels of the latents, H W height and width, E = 4 * dim width of the time embedding, T tokens, K width of
their states, P width of the vector of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import WeightsError
from fieldguide.models.diffusion import stable_diffusion_unet as sd
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.unet_checkpoints import CONFIG, compvis_keys, diffusers_keys
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect

PIXELS_PER_LATENT = 8  # along a side
REFINER_SCORE = 6.0  # of quality, as the authors' pipeline tells the refiner for prompts
POOLED_DIM = 1280  # width of the vector of the second text encoder


@dataclass(frozen=True, kw_only=True)
class Config(sd.Config):
    image: int = 128  # side of the latents that it was trained with; others work, too
    text_dim: int = 2048  # K: 768 of the first text encoder, 1280 of the second
    pooled_dim: int = POOLED_DIM  # P
    # 6 numbers: height and width before scaling, top and left of the crop, height and width of the result. The refiner is told
    # the quality instead of the last two.
    sizes: int = 6
    size_dim: int = 256  # width of the embedding of each of these numbers
    growth: tuple[int, ...] = (1, 2, 4)  # width of each level, times dim
    attend: tuple[bool, ...] = (False, True, True)  # levels with Transformers after the blocks
    layers: tuple[int, ...] = (1, 2, 10)  # of each Transformer, by level; the last also counts for the middle
    heads: tuple[int, ...] = (5, 10, 20)  # by level
    linear: bool = True  # whether files hold the first and last matrix of a Transformer as such, not as 1 x 1 convolutions


class SDXLUNet(sd.StableDiffusionUNet):
    """SDXL U-Net: noisy latents, their time (0 .. 999), the states of a text and its vector -> the predicted noise.

    Raises `DataError` if `sizes` are missing and the network knows others than the six of `Config.sizes`.
    """

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        width = 4 * config.dim
        self.add1 = nn.Linear(config.pooled_dim + config.sizes * config.size_dim, width)
        self.add2 = nn.Linear(width, width)

    def embed_text_and_sizes(self, pooled: Tensor, sizes: Tensor) -> Tensor:  # B P, B N -> B E
        """Return what is added to the embedding of the time."""
        numbers = embed_time(sizes.flatten(), self.config.size_dim).unflatten(0, (-1, self.config.sizes)).flatten(1)
        return self.add2(F.silu(self.add1(torch.cat([pooled, numbers.to(pooled.dtype)], 1))))

    def default_sizes(self, latent: Tensor) -> Tensor:  # B C' H W -> B 6, or B 5 for the refiner
        """Return the sizes of images that are neither scaled nor cropped; the refiner is told a score instead of the last two."""
        height, width = (float(PIXELS_PER_LATENT * side) for side in latent.shape[2:])
        last = [height, width] if self.config.sizes == 6 else [REFINER_SCORE]
        return torch.tensor([height, width, 0.0, 0.0, *last], device=latent.device).expand(latent.shape[0], -1)

    def forward(  # type: ignore[override]  # the vector of the text is required
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        pooled: Tensor,
        text_mask: Tensor | None = None,
        sizes: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:  # B C' H W, B, B T K, B P, B T, B N, B -> B C H W
        sizes = self.default_sizes(latent) if sizes is None else sizes
        time = self.embed_time(time, guidance) + self.embed_text_and_sizes(pooled, sizes)
        return self.denoise(latent, time, text, text_mask)


def parse_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the width of the text's vector and the number of sizes for a configuration of diffusers, which holds only the sum of
    both widths: six numbers, or five if only that leaves the width of SDXL's text encoder. Raises `WeightsError` if nothing is left.
    """
    size_dim, total = raw["addition_time_embed_dim"], raw["projection_class_embeddings_input_dim"]
    sizes = 5 if total - 5 * size_dim == POOLED_DIM else 6
    if total <= sizes * size_dim:
        raise WeightsError(
            f"projection_class_embeddings_input_dim={total} is not supported: it must be more than {sizes} times "
            f"addition_time_embed_dim={size_dim}"
        )
    return {"pooled_dim": total - sizes * size_dim, "sizes": sizes, "size_dim": size_dim}


OWN_CONFIG: Mapping[str, ConfigRow] = {
    **CONFIG,
    "addition_embed_type": Expect("text_time", among=("text_time",)),
    "addition_time_embed_dim": Derived(parse_sizes, lambda c: c.size_dim),
    "projection_class_embeddings_input_dim": Expect(lambda c: c.pooled_dim + c.sizes * c.size_dim),
}

CARD = Card(
    name="sdxl-unet",
    model=SDXLUNet,
    config=Config,
    paper="arXiv:2307.01952",
    year=2023,
    input_type="noisy-latent-pooled",
    output_type="image",
    optional_inputs=("text_mask", "sizes", "guidance"),
    sizes={
        "sdxl-base-unet": Size(params=2_567_463_684, source="stabilityai/stable-diffusion-xl-base-1.0"),
        "sdxl-refiner-unet": Size(
            text_dim=1280,
            sizes=5,
            dim=384,
            growth=(1, 2, 4, 4),
            attend=(False, True, True, False),
            layers=(4, 4, 4, 4),
            heads=(6, 12, 24, 24),
            params=2_259_526_660,
            source="stabilityai/stable-diffusion-xl-refiner-1.0",
        ),
        "lcm-sdxl-unet": Size(guidance_dim=256, params=2_567_545_604, source="latent-consistency/lcm-sdxl"),
        "sdxl-unet-test": Size(
            image=8,
            text_dim=12,
            pooled_dim=4,
            size_dim=8,
            dim=8,
            growth=(1, 2),
            depth=1,
            attend=(False, True),
            layers=(1, 2),
            heads=(2, 4),
            groups=4,
        ),
    },
    weights={"diffusers": diffusers_keys, "compvis": compvis_keys},
    configs={"diffusers": OWN_CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
