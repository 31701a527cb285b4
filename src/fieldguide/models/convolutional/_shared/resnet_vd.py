"""ResNet-D: a ResNet that loses less information where it downsamples (He et al. 2018, arXiv:1812.01187, section 4.2).

The stem has three 3x3 convolutions instead of one 7x7, and shortcuts with stride 2 are an average pooling before the 1x1
convolution. Networks of 18 and 34 layers ("vd" in PaddlePaddle) also project the shortcut of the first block.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fieldguide.models.convolutional import resnet


def build_resnet_vd(channels: int, block: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> resnet.ResNet:
    """Return a ResNet-D without its classifier; only `features` can be used."""
    model = resnet.ResNet(resnet.Config(channels=channels, block=block, depths=depths, widths=widths))
    model.head = nn.Identity()
    half, whole = widths[0] // 2, widths[0]
    layers = OrderedDict[str, nn.Module]()
    for number, (inputs, outputs, stride) in enumerate(((channels, half, 2), (half, half, 1), (half, whole, 1))):
        layers[f"conv{number}"] = resnet.conv(inputs, outputs, 3, stride)
        layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        if number < 2:  # the last activation is that of `features`
            layers[f"act{number}"] = nn.ReLU(inplace=True)
    model.stem = nn.Sequential(layers)
    dim, growth = whole, resnet.get_growth(block)
    for level, (stage, width) in enumerate(zip(model.stages, widths)):
        assert isinstance(stage, nn.Sequential)
        shortcut = OrderedDict[str, nn.Module](pool=nn.AvgPool2d(2, ceil_mode=True)) if level else OrderedDict[str, nn.Module]()
        shortcut |= {"conv": resnet.conv(dim, growth * width, 1), "norm": nn.BatchNorm2d(growth * width)}
        stage[0].shortcut = nn.Sequential(shortcut)
        dim = growth * width
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
