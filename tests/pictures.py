"""Convolutional networks of torchvision, timm and transformers, built from our configs at any size.

Each function takes our network and returns theirs, untrained. If a library fixes its widths, its class is created on
the meta device and its layers are replaced by narrower ones of the same geometry, so that its forward pass is kept.
`alexnet_2012` is written from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.models.convolutional import efficientnet_v2, mobilenet_v3, mobilenet_v4
from tv import timm, torchvision, transformers

tvm = torchvision.models


class Logits(nn.Module):
    """Return the logits of a network of transformers as a tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> Tensor:
        return self.peer(x).logits


def peer(build: Callable[[nn.Module], nn.Module], origin: str) -> Callable[[nn.Module], tuple]:
    """Return the network and the function that renames our tensors, for cases.py."""

    def pair(model: nn.Module) -> tuple:
        theirs, table = build(model), get_tables(model)[origin]
        if not isinstance(theirs, transformers.PreTrainedModel):
            return theirs, lambda state: translate(state, table, reverse=True)
        return Logits(theirs), lambda state: {
            f"peer.{name}": tensor for name, tensor in translate(state, table, reverse=True).items()
        }

    return pair


# ---------------------------------------------------------------------------------------------- AlexNet, VGG


def torchvision_alexnet(model: nn.Module) -> nn.Module:
    c = model.config
    with torch.device("meta"):
        theirs = tvm.AlexNet(c.num_classes, c.dropout)
    widths, stem = (c.channels, *c.widths), {"11x11": (11, 4, 2), "3x3": (3, 1, 1)}[c.stem]
    for place, inputs, outputs in zip((0, 3, 6, 8, 10), widths, c.widths):
        old = theirs.features[place]
        shape = stem if place == 0 else (old.kernel_size, old.stride, old.padding)
        theirs.features[place] = nn.Conv2d(inputs, outputs, *shape)
    theirs.avgpool.output_size = (c.side, c.side)
    dims = (c.widths[-1] * c.side**2, c.hidden, c.hidden, c.num_classes)
    for place, inputs, outputs in zip((1, 4, 6), dims, dims[1:]):
        theirs.classifier[place] = nn.Linear(inputs, outputs)
    return theirs


def columns(c: Any) -> list:
    """Return the layers in VGG's notation."""
    return [x for s, (depth, width) in enumerate(zip(c.depths, c.widths)) for x in [width] * depth + ["M"] * (s < c.pools)]


def torchvision_vgg(model: nn.Module) -> nn.Module:
    c = model.config
    with torch.device("meta"):
        theirs = tvm.VGG(nn.Sequential(), c.num_classes, init_weights=False, dropout=c.dropout)
    theirs.features = tvm.vgg.make_layers(columns(c), batch_norm=c.norm)
    theirs.avgpool.output_size = (c.side, c.side)
    dims = (c.widths[-1] * c.side**2, c.hidden, c.hidden, c.num_classes)
    for place, inputs, outputs in zip((0, 3, 6), dims, dims[1:]):
        theirs.classifier[place] = nn.Linear(inputs, outputs)
    return theirs


def timm_vgg(model: nn.Module) -> nn.Module:
    c, vgg = model.config, timm.models.vgg
    with torch.device("meta"):
        theirs = vgg.VGG(columns(c), c.num_classes, norm_layer=nn.BatchNorm2d if c.norm else None)
    for layer in theirs.features.to_empty(device="cpu"):
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    theirs.pre_logits = vgg.ConvMlp(c.widths[-1], c.hidden, c.side, drop_rate=c.dropout)
    theirs.head = vgg.ClassifierHead(c.hidden, c.num_classes)
    return theirs


# ---------------------------------------------------------------------------------------------- EfficientNet, MobileNet


def torchvision_efficientnet(model: nn.Module) -> nn.Module:
    c, module = model.config, tvm.efficientnet
    rows = [
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    rows = [module.MBConvConfig(*row, width_mult=c.width, depth_mult=c.depth) for row in rows]
    return module.EfficientNet(rows, c.dropout, c.drop_path, c.num_classes, partial(nn.BatchNorm2d, eps=c.eps))


def timm_efficientnet(model: nn.Module) -> nn.Module:
    c = model.config
    return timm.models.efficientnet._gen_efficientnet(
        "efficientnet_b0",
        c.width,
        c.depth,
        num_classes=c.num_classes,
        in_chans=c.channels,
        drop_rate=c.dropout,
        drop_path_rate=c.drop_path,
        bn_eps=c.eps,
        pad_type="same" if c.padding == "same" else "",
    )


def timm_efficientnet_lite(model: nn.Module) -> nn.Module:
    c, builder = model.config, timm.models._efficientnet_builder
    block_args = builder.decode_arch_def(  # as in timm's _gen_efficientnet_lite, which fixes the widths of stem and top
        [
            ["ds_r1_k3_s1_e1_c16"],
            ["ir_r2_k3_s2_e6_c24"],
            ["ir_r2_k5_s2_e6_c40"],
            ["ir_r3_k3_s2_e6_c80"],
            ["ir_r3_k5_s1_e6_c112"],
            ["ir_r4_k5_s2_e6_c192"],
            ["ir_r1_k3_s1_e6_c320"],
        ],
        c.depth,
        fix_first_last=True,
    )
    return timm.models.efficientnet.EfficientNet(
        block_args,
        c.num_classes,
        num_features=c.top,
        in_chans=c.channels,
        stem_size=c.stem,
        fix_stem=True,
        pad_type="same" if c.padding == "same" else "",
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=c.eps),
        round_chs_fn=partial(builder.round_channels, multiplier=c.width),
        drop_rate=c.dropout,
        drop_path_rate=c.drop_path,
    )


def huggingface_efficientnet(model: nn.Module) -> nn.Module:
    c = model.config
    return transformers.EfficientNetForImageClassification(
        transformers.EfficientNetConfig(
            num_channels=c.channels,
            width_coefficient=c.width,
            depth_coefficient=c.depth,
            hidden_dim=model.head.in_features,
            batch_norm_eps=c.eps,
            dropout_rate=c.dropout,
            drop_connect_rate=c.drop_path,
            num_labels=c.num_classes,
        )
    )


def torchvision_efficientnet_v2(model: nn.Module) -> nn.Module:
    c, module = model.config, tvm.efficientnet
    rows, dim = [], c.widths[0]
    for s, (width, depth, growth, stride) in enumerate(zip(c.widths, c.depths, c.growths, efficientnet_v2.get_strides(c))):
        rows.append((module.FusedMBConvConfig if s < 3 else module.MBConvConfig)(growth, 3, stride, dim, width, depth))
        dim = width
    theirs = module.EfficientNet(rows, c.dropout, c.drop_path, c.num_classes, partial(nn.BatchNorm2d, eps=c.eps), c.top)
    return theirs


def timm_efficientnet_v2(model: nn.Module) -> nn.Module:
    c, module = model.config, timm.models.efficientnet
    kinds = ["cn_r{}_k3_s{}_e{}_c{}_skip", *["er_r{}_k3_s{}_e{}_c{}"] * 2, *["ir_r{}_k3_s{}_e{}_c{}_se0.25"] * 4]
    rows = [
        [kind.format(depth, stride, growth, width)]
        for kind, depth, stride, growth, width in zip(kinds, c.depths, efficientnet_v2.get_strides(c), c.growths, c.widths)
    ]
    return module.EfficientNet(
        module.decode_arch_def(rows),
        c.num_classes,
        c.top,
        c.channels,
        c.widths[0],
        fix_stem=True,
        pad_type="same" if c.padding == "same" else "",
        act_layer=nn.SiLU,
        round_chs_fn=int_channels,
        norm_layer=partial(nn.BatchNorm2d, eps=c.eps),
        drop_rate=c.dropout,
        drop_path_rate=c.drop_path,
    )


def int_channels(width: float, *_: Any) -> int:
    return int(width)


def torchvision_inception_v3(model: nn.Module) -> nn.Module:
    """Return torchvision's network with all widths divided, which its constructor cannot do, and with the pooling of FID's network."""
    c, module = model.config, tvm.inception

    class Narrow(module.BasicConv2d):
        def __init__(self, inputs: int, outputs: int, **options: Any):
            super().__init__(inputs if inputs == c.channels else inputs // c.shrink, outputs // c.shrink, **options)

    narrow = lambda block: partial(block, conv_block=Narrow)
    with torch.device("meta"):
        blocks = [Narrow, *(narrow(getattr(module, f"Inception{letter}")) for letter in "ABCDE"), module.InceptionAux]
        theirs = module.Inception3(c.num_classes, False, inception_blocks=blocks, init_weights=False, dropout=c.dropout)
    for layer in theirs.to_empty(device="cpu").modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    theirs.fc = nn.Linear(2048 // c.shrink, c.num_classes)
    theirs.Conv2d_1a_3x3.conv.stride, theirs.maxpool1.stride, theirs.maxpool2.stride = (c.early[0],) * 2, *c.early[1:]
    return theirs


def torchvision_mobilenet_v2(model: nn.Module) -> nn.Module:
    c = model.config
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    return tvm.MobileNetV2(
        c.num_classes, c.width, [[t, n, math.ceil(c.depth * deep), stride] for t, n, deep, stride in rows], dropout=c.dropout
    )


def torchvision_mobilenet_v3(model: nn.Module) -> nn.Module:
    c, module = model.config, tvm.mobilenetv3
    rows, dim = [], c.stem
    for kernel, hidden, width, gate, swish, stride in (row for group in mobilenet_v3.group_stages(c) for row in group):
        rows.append(module.InvertedResidualConfig(dim, kernel, hidden, width, gate, "HS" if swish else "RE", stride, 1, 1.0))
        dim = width
    return module.MobileNetV3(rows, c.hidden, c.num_classes, norm_layer=partial(nn.BatchNorm2d, eps=c.eps), dropout=c.dropout)


def timm_mobilenet_v3(model: nn.Module) -> nn.Module:
    c, module = model.config, timm.models.mobilenetv3
    arch, dim = [], c.stem
    for group in mobilenet_v3.group_stages(c):
        arch.append([])
        for kernel, hidden, width, gate, swish, stride in group:
            kind = "ds" if hidden == dim else "ir"
            arch[-1].append(f"{kind}_r1_k{kernel}_s{stride}_e{hidden / dim}_c{width}" + "_se0.25" * gate + "_nre" * (not swish))
            dim = width
    arch.append([f"cn_r1_k1_s1_c{6 * dim}"])
    round8 = timm.models._efficientnet_builder.round_channels
    return module.MobileNetV3(
        module.decode_arch_def(arch),
        c.num_classes,
        c.channels,
        c.stem,
        num_features=c.hidden,
        act_layer=nn.Hardswish,
        norm_layer=partial(nn.BatchNorm2d, eps=c.eps),
        drop_rate=c.dropout,
        pad_type="same" if c.padding == "same" else "",
        se_layer=partial(module.SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round8),
    )


def timm_mobilenet_v4(model: nn.Module) -> nn.Module:
    c, module = model.config, timm.models.mobilenetv3
    names = {
        "conv": "cn_r1_k{1}_s{s}_e1_c{3}",
        "fused": "er_r1_k{1}_s{s}_e{2}_c{3}",
        "universal": "uir_r1_a{0}_k{1}_s{s}_e{2}_c{3}",
        "attention": "mqa_r1_k3_h{0}_s1_v{1}_d{2}_c{3}",
    }
    hybrid = hasattr(c, "activation")
    arch = [
        [names[kind].format(*row, s=1 if i else stride) for i, (kind, *row) in enumerate(rows)]
        for rows, stride in zip(c.stages, mobilenet_v4.get_strides(c))
    ]
    return module.MobileNetV3(
        module.decode_arch_def([*arch, [f"cn_r1_k1_s1_c{c.top}"]]),
        c.num_classes,
        c.channels,
        c.stem,
        fix_stem=True,
        num_features=c.hidden,
        head_bias=False,
        head_norm=True,
        act_layer=nn.GELU if hybrid and c.activation == "gelu" else nn.ReLU,
        norm_layer=nn.BatchNorm2d,
        round_chs_fn=partial(timm.models._efficientnet_builder.round_channels, multiplier=c.width),
        drop_rate=c.dropout,
        drop_path_rate=c.drop_path,
        layer_scale_init_value=1e-5 if hybrid else None,
    )


# ---------------------------------------------------------------------------------------------- ConvNeXt


def timm_convnext(model: nn.Module) -> nn.Module:
    c = model.config
    newer = type(model).__name__ == "ConvNeXtV2"  # whose sizes below Tiny are made of 1x1 convolutions
    return timm.models.convnext.ConvNeXt(
        c.channels,
        c.num_classes,
        depths=c.depths,
        dims=c.widths,
        patch_size=c.patch,
        drop_path_rate=c.drop_path,
        use_grn=newer,
        ls_init_value=None if newer else 1e-6,
        conv_mlp=newer and c.widths[0] < 96,
    )


def torchvision_convnext(model: nn.Module) -> nn.Module:
    c, module = model.config, tvm.convnext
    widths = zip(c.widths, (*c.widths[1:], None), c.depths)
    return module.ConvNeXt([module.CNBlockConfig(*row) for row in widths], c.drop_path, num_classes=c.num_classes)


def huggingface_convnext(model: nn.Module) -> nn.Module:
    """Build the peer. Its last normalization has another epsilon than the authors' code, which is set here."""
    c = model.config
    kind = "ConvNextV2" if type(model).__name__ == "ConvNeXtV2" else "ConvNext"
    config = getattr(transformers, f"{kind}Config")(
        num_channels=c.channels,
        patch_size=c.patch,
        num_stages=len(c.depths),
        hidden_sizes=list(c.widths),
        depths=list(c.depths),
        drop_path_rate=c.drop_path,
        num_labels=c.num_classes,
        layer_norm_eps=1e-6,
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


# ---------------------------------------------------------------------------------------------- of 2012


def alexnet_2012(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """AlexNet with the small stem, computed by receptive fields; each group sees half of the channels."""

    def layer(maps: Tensor, name: str, groups: int) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        (outputs, inputs, kernel, _), side, margin = weight.shape, maps.shape[-1], weight.shape[-1] // 2
        padded = maps.new_zeros(*maps.shape[:2], side + 2 * margin, side + 2 * margin)
        padded[..., margin : margin + side, margin : margin + side] = maps
        out = []
        for k in range(outputs):
            first = k * groups // outputs * inputs  # of the maps that this group sees
            out.append(
                sum(
                    padded[:, first + m, i : i + side, j : j + side] * weight[k, m, i, j]
                    for m in range(inputs)
                    for i in range(kernel)
                    for j in range(kernel)
                )
                + bias[k]
            )
        return torch.stack(out, 1).clamp(min=0)

    def normalised(a: Tensor) -> Tensor:  # section 3.3
        last = a.shape[1] - 1
        return torch.stack(
            [
                a[:, i] / (2 + 1e-4 * sum(a[:, j] ** 2 for j in range(max(0, i - 2), min(last, i + 2) + 1))) ** 0.75
                for i in range(last + 1)
            ],
            1,
        )

    def pool(maps: Tensor) -> Tensor:  # of three by three, two apart
        side = (maps.shape[-1] - 3) // 2 + 1
        return torch.stack(
            [maps[..., i : i + 2 * side - 1 : 2, j : j + 2 * side - 1 : 2] for i in range(3) for j in range(3)]
        ).amax(0)

    x = pool(normalised(layer(pictures, "conv1", 1)))
    x = pool(normalised(layer(x, "conv2", 2)))
    x = pool(layer(layer(layer(x, "conv3", 1), "conv4", 2), "conv5", 2)).flatten(1)
    for name in ("fc1", "fc2"):
        x = (x @ p[f"{name}.weight"].T + p[f"{name}.bias"]).clamp(min=0)
    return x @ p["head.weight"].T + p["head.bias"]
