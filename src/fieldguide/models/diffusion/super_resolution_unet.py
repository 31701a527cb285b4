"""Super-resolution U-Net: images denoised next to their small version (Ramesh et al. 2022, arXiv:2204.06125).

New here: the networks of DALL-E 2 that enlarge images to 256 and 1,024 pixels are ADM's U-Net (Dhariwal and Nichol 2021, arXiv:2105.05233)
without attention, so that they can be trained on small crops; the small image, enlarged, is a further input. The decoder of DALL-E 3 is
the same network: it denoises an image next to its latents (consistency decoder, https://github.com/openai/consistencydecoder), with an
embedding for each of its times.

Initialization: torch's defaults; zero for the last layers of residual paths and of the network, as in the authors' code.
Shapes: B batch, K channels of the noisy image, C channels of the other, H W height and width, D width of a level, E = 4 * dim width of the
time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, WeightsError
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.levels import run_levels
from fieldguide.models.diffusion._shared.unet_checkpoints import block_keys
from fieldguide.models.diffusion.consistency_unet import Block, Level
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # K
    condition: int = 3  # C
    image: int = 256  # side of the images that it was trained with; others work, too
    widths: tuple[int, ...] = (320, 640, 960, 1280)  # of each level
    depth: int = 3  # blocks per level on the way down; one more on the way up
    groups: int = 32  # of group norm
    variance: bool = False  # whether the last layer also predicts variances
    times: int = 0  # learned embeddings of so many times; 0 means sines and cosines
    scaled: bool = False  # whether times scale and shift features, instead of being added to them
    dropout = 0.0

    @property
    def dim(self) -> int:
        return self.widths[0]


class Middle(nn.Module):
    """The lowest resolution: two blocks."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cast(Any, c), dim, dim) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B D H W, B E -> B D H W
        return self.blocks[1](self.blocks[0](x, time), time)


class SuperResolutionUNet(nn.Module):
    """Super-resolution U-Net: a noisy image, its time (0 .. 999) and the image that it belongs to, of the same size -> the prediction.

    Raises `DataError` if a side of the image is not divisible by the total stride.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        shared = cast(Any, c)
        widths, last = c.widths, len(c.widths) - 1
        self.times = nn.Embedding(c.times, c.dim) if c.times else None
        self.time1, self.time2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, 4 * c.dim)
        self.conv_in = nn.Conv2d(c.channels + c.condition, c.dim, 3, padding=1)
        self.down, self.up, dim, skips = nn.ModuleList(), nn.ModuleList(), c.dim, [c.dim]
        for i, width in enumerate(widths):
            resize = Block(shared, width, width, "down") if i < last else None
            self.down.append(Level(shared, [dim] + [width] * (c.depth - 1), width, False, resize))
            skips += [width] * (c.depth + (i < last))
            dim = width
        self.mid = Middle(c, dim)
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(dim if j == 0 else width) + skips.pop() for j in range(c.depth + 1)]
            self.up.append(Level(shared, inputs, width, False, Block(shared, width, width, "up") if i else None))
            dim = width
        self.norm, self.conv_out = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, c.channels * (1 + c.variance), 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if name.endswith(("conv2", "conv_out")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def predict_all(self, target: Tensor, time: Tensor, image: Tensor | None = None) -> Tensor:  # -> B K H W or B 2K H W
        """Return all channels of the last layer."""
        stride = 2 ** (len(self.down) - 1)
        if any(side % stride for side in target.shape[2:]):
            raise DataError(
                f"images of {target.shape[3]} x {target.shape[2]} pixels cannot be halved {len(self.down) - 1} times: the sides must be "
                f"multiples of {stride}"
            )
        if image is None:
            image = target.new_zeros(len(target), self.config.condition, *target.shape[2:])
        embedded = self.times(time.long()) if self.times is not None else embed_time(time, self.config.dim)
        condition = self.time2(F.silu(self.time1(embedded.to(self.time1.weight.dtype))))
        x = run_levels(self.down, self.mid, self.up, self.conv_in(torch.cat([target, image.to(target.dtype)], 1)), condition)
        return self.conv_out(F.silu(self.norm(x)))

    def forward(self, target: Tensor, time: Tensor, image: Tensor | None = None) -> Tensor:  # B K H W, B, B C H W -> B K H W
        return self.predict_all(target, time, image)[:, : self.config.channels]


DIFFUSERS: dict[str, Row] = {
    "time_proj.weight": "times.weight",
    "time_embedding.linear_{k}.*": "time{k}.*",
    "conv_in.*": "conv_in.*",
    "conv_norm_out.*": "norm.*",
    "conv_out.*": "conv_out.*",
    **block_keys("down_blocks.{i}.resnets.{j}.", "down.{i}.blocks.{j}."),
    **block_keys("down_blocks.{i}.downsamplers.0.", "down.{i}.resize."),
    **block_keys("up_blocks.{i}.resnets.{j}.", "up.{i}.blocks.{j}."),
    **block_keys("up_blocks.{i}.upsamplers.0.", "up.{i}.resize."),
    **block_keys("mid_block.resnets.{j}.", "mid.blocks.{j}."),
}


def parse_channels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the channels for a configuration of diffusers, whose images have three. Raises `WeightsError` for others."""
    outputs, inputs = raw["out_channels"], raw["in_channels"]
    channels = 3 if outputs in (3, 6) and inputs > 3 else outputs
    if inputs <= channels:
        raise WeightsError(f"in_channels={inputs}, out_channels={outputs} leaves no channels for a second image")
    return {"channels": channels, "condition": inputs - channels, "variance": outputs == 2 * channels}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("UNet2DModel"),
    "add_attention": Expect(False, among=(False,)),
    "sample_size": "image",
    "in_channels": Derived(parse_channels, lambda c: c.channels + c.condition),
    "out_channels": Derived(lambda raw: {}, lambda c: c.channels * (1 + c.variance)),
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "block_out_channels": Derived(lambda raw: {"widths": tuple(raw["block_out_channels"])}, lambda c: list(c.widths)),
    "down_block_types": Expect(lambda c: ["ResnetDownsampleBlock2D"] * len(c.widths)),
    "up_block_types": Expect(lambda c: ["ResnetUpsampleBlock2D"] * len(c.widths)),
    "mid_block_type": Expect("UNetMidBlock2D", among=("UNetMidBlock2D", None)),
    "resnet_time_scale_shift": ValueMap("scaled", {"default": False, "scale_shift": True}),
    "time_embedding_type": Derived(lambda raw: {}, lambda c: "learned" if c.times else "positional"),
    "num_train_timesteps": Derived(
        lambda raw: {"times": raw.get("num_train_timesteps") or 0 if raw.get("time_embedding_type") == "learned" else 0},
        lambda c: c.times or None,
    ),
    "num_class_embeds": Expect(None),
    "class_embed_type": Expect(None),
    "norm_eps": Expect(1e-5),
    "flip_sin_to_cos": Expect(True),
    "freq_shift": Expect(0),
    "time_embedding_dim": Expect(None),
    "mid_block_scale_factor": Expect(1),
    "center_input_sample": Expect(False),
    "act_fn": Expect("silu", among=("silu",)),
}

CARD = Card(
    name="super-resolution-unet",
    model=SuperResolutionUNet,
    config=Config,
    paper="arXiv:2204.06125",
    year=2022,
    input_type="noisy-target",
    output_type="image",
    names={"channels": "condition", "outputs": "channels"},
    sizes={
        "karlo-super-resolution": Size(
            params=691_579_523, source="kakaobrain/karlo-v1-alpha, super_res_first and super_res_last"
        ),
        "consistency-decoder": Size(
            condition=4,
            widths=(320, 640, 1024, 1024),
            variance=True,
            times=1024,
            scaled=True,
            params=621_277_702,
            source="openai/consistency-decoder",
        ),
        "super-resolution-unet-test": Size(image=8, condition=1, widths=(8, 12), depth=1, groups=4, variance=True, scaled=True),
    },
    weights={"diffusers": DIFFUSERS},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.9999},
)
