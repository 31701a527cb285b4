"""U-Net with a ResNet encoder (Iakubovskii 2019, segmentation_models.pytorch).

New here: the encoder of U-Net (Ronneberger et al. 2015) is a ResNet, so it can use weights pretrained for
classification. The decoder upsamples each map by nearest neighbor and concatenates the ResNet's map of that size. The
output has the size of the input, which may be any.

Initialization: the encoder as ResNet; the decoder He uniform by fan-in, the head Glorot uniform.
Shapes: B batch, C channels, H W height and width, D width of a level.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.convolutional import resnet


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 1
    channels: int = 3  # C
    block: str = "basic"  # of the ResNet, or "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level of the ResNet
    widths: tuple[int, ...] = (64, 128, 256, 512)  # inner width per level of the ResNet
    up: tuple[int, ...] = (256, 128, 64, 32, 16)  # width per level of the decoder


def conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm=nn.BatchNorm2d(outputs), act=nn.ReLU(inplace=True)
        )
    )


class Up(nn.Module):
    """Decoder block: nearest-neighbor upsampling, concatenation of the skip connection, two convolutions."""

    def __init__(self, inputs: int, skip: int, width: int):
        super().__init__()
        self.conv1, self.conv2 = conv_norm_relu(inputs + skip, width), conv_norm_relu(width, width)

    def forward(self, x: Tensor, skip: Tensor | None, size: torch.Size) -> Tensor:  # B D H W -> B D' size
        x = F.interpolate(x, size=size, mode="nearest")
        x = x if skip is None else torch.cat([x, skip], 1)
        x = self.conv1(x)  # reuse the name, so that the previous map is freed
        return self.conv2(x)


class UNetResNet(nn.Module):
    """Segmentation network for images of any size: an image -> class logits of each pixel."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = resnet.ResNet(
            resnet.Config(channels=config.channels, block=config.block, depths=config.depths, widths=config.widths)
        )
        self.encoder.head = nn.Identity()  # only `features` of the encoder is used
        growth = resnet.BLOCKS[config.block].growth
        *skips, dim = [config.widths[0], *(growth * width for width in config.widths)]
        self.decoder = nn.ModuleList()
        for skip, width in zip([*reversed(skips), 0], config.up, strict=True):
            self.decoder.append(Up(dim, skip, width))
            dim = width
        self.head = nn.Conv2d(dim, config.num_classes, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.xavier_uniform_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B classes H W
        size, seen = x.shape[2:], [F.relu(self.encoder.stem(x), inplace=True)]
        x = F.max_pool2d(seen[0], 3, 2, 1)
        for stage in self.encoder.stages:
            seen.append(x := stage(x))
        skips = [*reversed(seen[:-1]), None]
        for up, skip in zip(self.decoder, skips):
            x = up(x, skip, size if skip is None else skip.shape[2:])
        return self.head(x)


SMP = {  # of segmentation_models_pytorch.Unet with ResNet encoders
    **{f"encoder.{theirs}": f"encoder.{ours}" for theirs, ours in resnet.TORCHVISION.items() if "fc." not in theirs},
    "decoder.blocks.{i}.conv{k}.0.weight": "decoder.{i}.conv{k}.conv.weight",
    "decoder.blocks.{i}.conv{k}.1.*": "decoder.{i}.conv{k}.norm.*",
    "segmentation_head.0.*": "head.*",
}

CARD = Card(
    name="unet-resnet",
    model=UNetResNet,
    config=Config,
    paper="https://github.com/qubvel-org/segmentation_models.pytorch",
    year=2019,
    input_type="image",
    output_type="mask",
    sizes={
        "unet-resnet34": Size(params=24_436_369, source="segmentation-models-pytorch"),
        "unet-resnet18": Size(depths=(2, 2, 2, 2), params=14_328_209, source="segmentation-models-pytorch"),
        "unet-resnet50": Size(block="bottleneck", params=32_521_105, source="segmentation-models-pytorch"),
        # Not published; for CPUs: one block per level and half the width.
        "unet-resnet-mini": Size(depths=(1, 1, 1, 1), widths=(32, 64, 128, 256), up=(128, 64, 32, 16, 8)),
        "unet-resnet-test": Size(num_classes=3, block="bottleneck", depths=(1, 2, 1), widths=(4, 6, 8), up=(10, 8, 6, 4)),
    },
    weights={"smp": SMP},
    # CamVid in 2.5 minutes of one core: 0.25 mIoU with adamw at 1e-3, 0.23 at 3e-3, 0.33 with muon.
    recipe={"optimizer": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.01, "warmup": 0.05},
)
