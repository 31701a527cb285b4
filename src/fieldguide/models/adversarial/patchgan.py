"""PatchGAN: a critic of overlapping patches of an image (Isola et al. 2017, arXiv:1611.07004, section 3.2.2).

New here: the output is a map, one score per patch, so the critic is small, works at any image size, and judges texture. With three
halving layers a patch has 70 x 70 pixels. Pix2Pix gives it input and output, concatenated, with batch norm; CycleGAN (Zhu et al.
2017, arXiv:1703.10593) images of one domain, with instance norm without parameters. Both norms use the statistics of each image
(see `pix2pix`).

Initialization: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of the norm.
Shapes: B batch, C channels, H W height and width, h w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.key_rules import Dropped, Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C, of all concatenated images
    dim: int = 64  # channels of the first layer; each next one has twice as many, up to 8 times
    depth: int = 3  # halving layers
    scaled: bool = True  # norms have scale and offset, and convolutions before them no bias; else the reverse


def init_weights(model: nn.Module) -> None:
    """Initialize convolutions and norms as in section 6.2 of the paper."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class PatchGAN(nn.Module):
    """Images -> scores of their patches, without a sigmoid."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        widths = [c.dim * min(1 << level, 8) for level in range(c.depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(c.channels, c.dim, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, c.depth + 1):
            stride = 2 if level < c.depth else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=not c.scaled),
                nn.InstanceNorm2d(widths[level], affine=c.scaled),
                nn.LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B 1 h w
        return self.model(image)


def adapt_to_images(need: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that follow from the images of a generator.

    The critic of pairs sees input and output. On small images, patches of 70 pixels would be whole images, and a critic of full width
    would take most of the time.
    """
    paired, side = bool(need.get("paired")), need.get("image", 256)
    small = {"dim": 16, "depth": 2 if side >= 16 else 1} if side <= 32 else {"dim": 32} if side <= 64 else {}
    return {"channels": need["channels"] + (need["outputs"] if paired else 0), "scaled": paired, **small}


JUNYANZ: dict[str, Row] = {
    **{f"model.{{i}}.{name}": f"model.{{i}}.{name}" for name in ("weight", "bias")},
    **{
        f"model.{{i}}.{name}": Dropped("statistics are those of each image")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    },
}

CARD = Card(
    name="patchgan",
    model=PatchGAN,
    config=Config,
    paper="arXiv:1611.07004",
    year=2017,
    input_type="image",
    output_type="scores",
    sizes={
        "patchgan-70-pairs": Size(
            channels=6, params=2_768_705, source="junyanz/pytorch-CycleGAN-and-pix2pix, basic, batch norm"
        ),
        "patchgan-70": Size(
            scaled=False, params=2_764_737, source="junyanz/pytorch-CycleGAN-and-pix2pix, basic, instance norm"
        ),
        "patchgan-test": Size(channels=2, dim=3, depth=2),
    },
    weights={"junyanz": JUNYANZ},
    recipe={"optimizer": "adamw", "lr": 2e-4, "beta1": 0.5, "weight_decay": 0.0},
    adapt=lambda need: adapt_to_images(need) if "outputs" in need else {},
)
