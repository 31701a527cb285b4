"""Peers of detectors: networks of other libraries that take images and return what ours return."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from unittest import mock

import torch
from torch import Tensor, nn

import boxes as slow
from fieldguide.checkpoints.weights import get_tables, translate


class Queries(nn.Module):
    """A detector of transformers that returns the boxes and class logits of its queries in one tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer.requires_grad_(True)  # parts are frozen there

    def forward(self, x: Tensor) -> Tensor:
        found = self.peer(x)
        return torch.cat([found.pred_boxes, found.logits], -1)


def to_live(name: str) -> str:
    """Return the name in the live network of transformers 5 for a name in files."""
    name = name.replace("out_proj", "o_proj").replace("backbone.conv_encoder.", "backbone.")
    return re.sub(r"layers\.(\d+)\.fc", r"layers.\1.mlp.fc", name)


def detr_config(model: nn.Module, **options):
    from tv import transformers

    c = model.config
    growth = 4 if c.block == "bottleneck" else 1
    backbone = transformers.ResNetConfig(
        num_channels=c.channels,
        embedding_size=c.widths[0],
        hidden_sizes=[growth * width for width in c.widths],
        depths=list(c.depths),
        layer_type=c.block,
        out_features=[f"stage{len(c.depths)}"],
    )
    return transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        num_channels=c.channels,
        d_model=c.dim,
        encoder_layers=c.depth,
        decoder_layers=c.decoder_depth,
        encoder_ffn_dim=c.hidden,
        decoder_ffn_dim=c.hidden,
        encoder_attention_heads=c.heads,
        decoder_attention_heads=c.heads,
        num_queries=c.queries,
        num_labels=c.num_classes,
        dropout=c.dropout,
        **options,
    )


def detr(model: nn.Module):
    from tv import transformers

    peer = Queries(transformers.DetrForObjectDetection(detr_config(model)))
    live = peer.state_dict().keys()

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        done = {f"peer.{to_live(name)}": tensor for name, tensor in public.items()}
        # In files `conv_encoder.model`, in the live network one of the two.
        return {name if name in live else name.replace("backbone.model", "backbone"): t for name, t in done.items()}

    return peer, rename


def rt_detr_config(model: nn.Module, **options):
    from tv import transformers

    c = model.config
    growth = 4 if c.block == "bottleneck" else 1
    backbone = transformers.RTDetrResNetConfig(
        num_channels=c.channels,
        embedding_size=c.widths[0],
        hidden_sizes=[growth * width for width in c.widths],
        depths=list(c.depths),
        layer_type=c.block,
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers.RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=c.frozen_norm,
        encoder_in_channels=[growth * width for width in c.widths[1:]],
        encoder_hidden_dim=c.dim,
        decoder_in_channels=[c.dim] * 3,
        d_model=c.dim,
        encoder_attention_heads=c.heads,
        decoder_attention_heads=c.heads,
        encoder_ffn_dim=c.hidden,
        decoder_ffn_dim=c.hidden,
        hidden_expansion=c.fusion / c.dim,
        decoder_layers=c.decoder_depth,
        decoder_n_points=c.points,
        num_queries=c.queries,
        num_labels=c.num_classes,
        **options,
    )


def rt_detr(model: nn.Module):
    from tv import transformers

    peer = Queries(transformers.RTDetrForObjectDetection(rt_detr_config(model)))

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        done = {to_live(name).replace("encoder.encoder.0.", "encoder.aifi.0."): tensor for name, tensor in public.items()}
        return {f"peer.{name}": tensor for name, tensor in done.items()}

    return peer, rename


# ---------------------------------------------------------------------------------------------- Faster R-CNN


def slow_nms(found: Tensor, scores: Tensor, limit: float) -> Tensor:
    """Suppress boxes one after the other."""
    kept = slow.greedy(found.tolist(), scores.tolist(), [0] * len(found), limit)
    return torch.tensor(kept, dtype=torch.int64)


@contextlib.contextmanager
def python_operators() -> Iterator[None]:
    """Replace the compiled operators of torchvision, which do not fit this torch, by Python code: its own for RoIAlign."""
    from tv import torchvision

    align = torchvision.ops.roi_align.__globals__["_roi_align"].__wrapped__

    def roi_align(maps, boxes, output_size, spatial_scale, sampling_ratio):
        return align(maps, boxes, spatial_scale, *output_size, sampling_ratio, False)

    with (
        mock.patch("torchvision.ops.boxes.nms", slow_nms),
        mock.patch("torchvision.ops.poolers.roi_align", roi_align),
    ):
        yield


def torchvision_faster_rcnn(config, **options) -> nn.Module:
    """Build torchvision's network of a config, without its resizing and normalization of images."""
    from tv import torchvision

    detection, ops, resnet = torchvision.models.detection, torchvision.ops, torchvision.models.resnet
    frozen = ops.FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d
    kind = resnet.BasicBlock if config.block == "basic" else resnet.Bottleneck
    with mock.patch.object(kind, "expansion", kind.expansion):
        body = narrow_resnet(resnet, kind, config, frozen)
    norm = nn.BatchNorm2d if config.head_depth else None
    growth = kind.expansion
    neck = detection.backbone_utils.BackboneWithFPN(
        body,
        {f"layer{i + 1}": str(i) for i in range(4)},
        [growth * width for width in config.widths],
        config.dim,
        ops.feature_pyramid_network.LastLevelMaxPool(),
        norm,
    )
    anchors = detection.anchor_utils.AnchorGenerator(
        tuple((config.anchor * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
    )
    head = (
        detection.faster_rcnn.FastRCNNConvFCHead(
            (config.dim, 7, 7), [config.dim] * config.head_depth, [config.hidden], norm_layer=nn.BatchNorm2d
        )
        if config.head_depth
        else detection.faster_rcnn.TwoMLPHead(config.dim * 49, config.hidden)
    )
    pooler = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=7 * config.anchor)
    peer = detection.FasterRCNN(
        neck,
        image_mean=[0.0] * config.channels,
        image_std=[1.0] * config.channels,
        rpn_anchor_generator=anchors,
        rpn_head=detection.rpn.RPNHead(config.dim, 3, config.rpn_depth),
        box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(config.hidden, config.num_classes + 1),
        box_roi_pool=pooler,
        rpn_pre_nms_top_n_test=config.candidates,
        rpn_post_nms_top_n_test=config.proposals,
        rpn_pre_nms_top_n_train=2 * config.candidates,
        rpn_post_nms_top_n_train=2 * config.proposals,
        rpn_nms_thresh=config.overlap,
        **options,
    )
    peer.transform.resize = lambda image, target: (image, target)
    detection._utils.overwrite_eps(peer, config.norm_eps)
    return peer


def narrow_resnet(resnet, kind, config, norm) -> nn.Module:
    """Build a ResNet of torchvision with other widths than its own, which are fixed."""
    body = resnet.ResNet(kind, list(config.depths), norm_layer=norm)
    body.inplanes = config.widths[0]
    body.conv1 = nn.Conv2d(config.channels, config.widths[0], 7, 2, 3, bias=False)
    body.bn1 = norm(config.widths[0])
    for i, (width, depth) in enumerate(zip(config.widths, config.depths)):
        setattr(body, f"layer{i + 1}", body._make_layer(kind, width, depth, stride=1 + (i > 0)))
    return body


class Regions(nn.Module):
    """The steps of torchvision's Faster R-CNN up to the classified proposals, which are padded with zeros."""

    def __init__(self, peer: nn.Module, proposals: int):
        super().__init__()
        self.peer, self.proposals = peer, proposals

    def forward(self, x: Tensor) -> Tensor:
        from tv import torchvision

        peer, rpn = self.peer, self.peer.rpn
        sizes = [tuple(x.shape[-2:])] * len(x)
        maps = peer.backbone(x)
        logits, moves = rpn.head(list(maps.values()))
        anchors = rpn.anchor_generator(torchvision.models.detection.image_list.ImageList(x, sizes), list(maps.values()))
        counts = [one[0].numel() for one in logits]
        logits, moves = torchvision.models.detection.rpn.concat_box_prediction_layers(logits, moves)
        found = rpn.box_coder.decode(moves, anchors).view(len(x), -1, 4)
        training, rpn.training = rpn.training, False
        with python_operators():
            boxes, scores = rpn.filter_proposals(found, logits, sizes, counts)
            rpn.training = training
            logits, kept = logits.view(len(x), -1), []
            for row, best in zip(logits, scores):  # the logits of the scores, with gradients
                kept.append(row[(row.sigmoid()[:, None] == best).int().argmax(0)])
            pad = lambda one: nn.functional.pad(one, (0,) * 2 * (one.ndim - 1) + (0, self.proposals - len(one)))
            boxes, kept = torch.stack([pad(one) for one in boxes]), torch.stack([pad(one) for one in kept])
            pooled = peer.roi_heads.box_roi_pool(maps, list(boxes.detach()), sizes)
        labels, offsets = peer.roi_heads.box_predictor(peer.roi_heads.box_head(pooled))
        parts = [part.unflatten(0, (len(x), -1)) for part in (labels, offsets)]
        return torch.cat([boxes, kept[..., None], *parts], -1)


def faster_rcnn(model: nn.Module):
    peer = Regions(torchvision_faster_rcnn(model.config), model.config.proposals)
    table = get_tables(model)["torchvision"]
    return peer, lambda state: {f"peer.{name}": tensor for name, tensor in translate(state, table, reverse=True).items()}
