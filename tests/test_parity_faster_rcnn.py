"""Faster R-CNN against torchvision: names, both versions, losses and detections; RoIAlign, anchors and offsets against loops."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch

import detectors
from fieldguide import load
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional.faster_rcnn import build_anchors
from fieldguide.models.layers import boxes as fast
from fieldguide.models.layers.box_offsets import OFFSET_SCALES, decode_offsets, encode_offsets
from fieldguide.models.layers.frozen_norm import FrozenBatchNorm
from fieldguide.models.layers.roi_align import choose_levels, roi_align
from fieldguide.models.registry import create
from fieldguide.objectives.region_detection import IGNORED, NEGATIVE, POSITIVE, RegionDetection, match_boxes, sample
from test_detection import some_boxes
from test_models import batch, gradients, tiny

V2 = {"frozen_norm": False, "rpn_depth": 2, "head_depth": 4}
VERSIONS = pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])


def pair(changes, dtype: torch.dtype = torch.float64, **options):
    """Return our network and torchvision's with the same random weights and statistics."""
    model = tiny("faster-rcnn", dtype, **changes)
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    with torch.no_grad():
        model.label.weight.mul_(0.1)  # no saturated scores, whose order is left to chance
    peer = detectors.torchvision_faster_rcnn(model.config, **options).to(dtype)
    table = weights.get_tables(model)["torchvision"]
    peer.load_state_dict(weights.translate(model.state_dict(), table, reverse=True))
    return model, peer, table


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("version", [1, 2])
def test_public_names_and_shapes(version):
    """Of the networks whose weights are published: version 1 has frozen norms, although torchvision builds none without weights."""
    from tv import torchvision

    detection = torchvision.models.detection
    with torch.device("meta"):
        if version == 1:
            ours = create("faster-rcnn-resnet50-fpn")
            body = torchvision.models.resnet50(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
            body = detection.backbone_utils._resnet_fpn_extractor(body, 3)
            peer = detection.FasterRCNN(body, num_classes=91)
            plain = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
            assert sum(p.numel() for p in plain.parameters()) == 41_808_406
        else:
            ours = create("faster-rcnn-resnet50-fpn-v2")
            peer = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    state = weights.translate(ours.state_dict(), weights.get_tables(ours)["torchvision"], reverse=True)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in peer.state_dict().items()}


@VERSIONS
def test_files_are_recognized(changes, tmp_path):
    model, peer, _ = pair(changes, torch.float32)
    path = tmp_path / "model.pth"
    torch.save(peer.state_dict(), path)
    if not changes:
        found = inspect_checkpoint(path)
        assert (found.card.name, found.origin, found.size) == ("faster-rcnn", "torchvision", "faster-rcnn-test")
        (x,) = batch("faster-rcnn", dtype=torch.float32)
        assert torch.equal(load(path)(x), model(x))
    other = create("faster-rcnn-test", **changes)
    assert weights.load(other, path) == []
    again = weights.read(weights.save(other, tmp_path / "again.safetensors", "torchvision"))
    assert again.keys() == peer.state_dict().keys()


def test_older_files():
    """Those of torchvision before 0.13, such as the published one of version 1, number the pyramid with one number."""
    model, peer, _ = pair({}, torch.float32)
    old = {}
    for name, tensor in peer.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for block in ("inner_blocks", "layer_blocks"):
            for level in range(4):
                name = name.replace(f"{block}.{level}.0.", f"{block}.{level}.")
        old[name] = tensor
    assert "backbone.fpn.inner_blocks.0.weight" in old and "rpn.head.conv.weight" in old
    other = create("faster-rcnn-test")
    assert weights.load(other, old) == []
    (x,) = batch("faster-rcnn", dtype=torch.float32)
    assert torch.equal(other.eval()(x), model(x))


def test_published_weights_have_no_epsilon():
    """The default of frozen norms was changed after the weights of COCO were trained (`overwrite_eps` in torchvision)."""
    assert {m.eps for m in create("faster-rcnn-test", norm_eps=0.0).modules() if isinstance(m, FrozenBatchNorm)} == {0.0}
    config = create("faster-rcnn-test").config
    assert type(config)().norm_eps == 0.0 and type(config)().frozen_norm
    model, peer, _ = pair({"norm_eps": 0.0})
    with torch.no_grad():
        for name, buffer in (*model.named_buffers(), *peer.named_buffers()):
            if name.endswith("running_var"):
                buffer[0] = 1e-4  # where an epsilon of 1e-5 would be visible
    want = detectors.Regions(peer, model.config.proposals)(*batch("faster-rcnn"))
    torch.testing.assert_close(model(*batch("faster-rcnn")), want, rtol=1e-9, atol=1e-9)


def test_other_classes_keep_everything_but_the_classifier(tmp_path):
    path = weights.save(tiny("faster-rcnn", torch.float32), tmp_path / "model.safetensors")
    fresh = weights.load(create("faster-rcnn-test", num_classes=7), path, head="skip")
    assert sorted(fresh) == ["label.bias", "label.weight", "offsets.bias", "offsets.weight"]


# ---------------------------------------------------------------------------------------------- the network


def test_version_2_equals_torchvision():
    """Outputs and gradients; batch norms in the pyramid and in the second stage, two convolutions before the proposals."""
    model, peer, table = pair(V2)
    wrapped, inputs = detectors.Regions(peer, model.config.proposals).eval(), batch("faster-rcnn")
    ours, our_grads = gradients("faster-rcnn", model, inputs)
    theirs, their_grads = gradients("faster-rcnn", wrapped, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for name, grad in weights.translate(our_grads, table, reverse=True).items():
        want = their_grads[f"peer.{name}"]
        scale = want.abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, want / scale, rtol=1e-9, atol=1e-11)


@VERSIONS
@pytest.mark.parametrize("size", [(64, 96), (60, 90)])
def test_detections_equal_torchvision(changes, size):
    """From images to detections, also of sizes that are padded. Their class 0 is the background, our first class is 0."""
    options = {"box_score_thresh": 0.05, "box_nms_thresh": 0.5, "box_detections_per_img": 6}
    model, peer, _ = pair(changes, **options)
    torch.manual_seed(5)
    x = 0.3 * torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad(), detectors.python_operators():
        want = peer.eval()(list(x))
    objective = RegionDetection(model, confidence=0.05, overlap=0.5, max_detections=6)
    found = objective.outputs({"image": x})
    assert found["labels"].shape == (2, 6)
    for i, one in enumerate(want):
        count = len(one["labels"])
        assert count and found["labels"][i, :count].tolist() == (one["labels"] - 1).tolist()
        assert (found["labels"][i, count:] == -1).all()
        torch.testing.assert_close(found["scores"][i, :count], one["scores"], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found["boxes"][i, :count], one["boxes"], rtol=1e-9, atol=1e-9)


def objects(dtype: torch.dtype):
    """Return three images: with three objects, with one and with none."""
    torch.manual_seed(6)
    truth = some_boxes(3, 3, side=60).to(dtype)
    labels = torch.tensor([[0, 2, 1], [-1, 1, -1], [-1, -1, -1]])
    return truth, labels


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_losses_and_gradients_equal_torchvision(changes, dtype):
    """All four losses, with samples large enough that nothing is left to chance."""
    every = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    model, peer, table = pair(changes, dtype, **every)
    truth, labels = objects(dtype)
    (x,) = batch("faster-rcnn", 3, dtype)
    model.train()
    parts = RegionDetection(model, anchors=10**6, regions=10**6)({"image": x, "boxes": truth, "labels": labels})
    parts["loss"].backward()
    targets = [{"boxes": some[own >= 0], "labels": own[own >= 0] + 1} for some, own in zip(truth, labels)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    exact = lambda logits, target: loss(logits, target.to(dtype))  # their targets are in float32
    with detectors.python_operators(), mock.patch("torch.nn.functional.binary_cross_entropy_with_logits", exact):
        want = peer.train()(list(x), targets)
    sum(want.values()).backward()
    close = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    names = {
        "objectness": "loss_objectness",
        "proposal": "loss_rpn_box_reg",
        "label": "loss_classifier",
        "box": "loss_box_reg",
    }
    for ours, theirs in names.items():
        torch.testing.assert_close(parts[ours], want[theirs], check_dtype=False, **close)
    grads = {name: p.grad for name, p in model.named_parameters()}
    known = dict(peer.named_parameters())
    for name, grad in weights.translate(grads, table, reverse=True).items():
        scale = known[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, known[name].grad / scale, **close)


def test_images_without_objects():
    """They have negative anchors and regions only, however the labels are padded."""
    model, values = tiny("faster-rcnn"), []
    (x,) = batch("faster-rcnn", 2)
    for labels in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.int64)):
        objective = RegionDetection(model, anchors=10**6, regions=10**6)
        parts = objective({"image": x, "boxes": torch.zeros(*labels.shape, 4), "labels": labels})
        assert parts["proposal"] == parts["box"] == 0 and parts["label"] > 0
        values.append(parts["loss"])
    torch.testing.assert_close(*values)


# ---------------------------------------------------------------------------------------------- parts


def slow_roi_align(x, box, stride: float, size: int, samples: int):
    """Return the equation of RoIAlign, one point at a time; x C H W."""
    left, top, right, bottom = (side / stride for side in box)
    wide, high = max(right - left, 1.0), max(bottom - top, 1.0)
    rows, columns = x.shape[1:]
    out = torch.zeros(len(x), size, size, dtype=x.dtype)
    for row, column, i, j in itertools.product(range(size), range(size), range(samples), range(samples)):
        py = min(max(top + high * (row + (i + 0.5) / samples) / size, 0.0), rows - 1.0)
        px = min(max(left + wide * (column + (j + 0.5) / samples) / size, 0.0), columns - 1.0)
        y, x0 = min(int(py), rows - 1), min(int(px), columns - 1)
        for yy, xx in itertools.product((y, y + 1), (x0, x0 + 1)):
            if yy < rows and xx < columns:
                out[:, row, column] += x[:, yy, xx] * (1 - abs(py - yy)) * (1 - abs(px - xx)) / samples**2
    return out


def test_roi_align_equals_its_equation():
    """Boxes of all sizes at all places of the image, also empty ones; oblong maps of three levels; more than one chunk."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 16 // 2**k, 24 // 2**k, dtype=torch.float64) for k in range(3)]
    found = some_boxes(2, 12, side=64) * torch.tensor([1.5, 1, 1.5, 1], dtype=torch.float64)
    found[0, :2] = torch.tensor([[0.0, 0, 96, 64], [0, 0, 0, 0]])
    found[1, :2] = torch.tensor([[95.0, 63, 96, 64], [10, 10, 10.5, 64]])
    which = torch.randint(3, (2, 12))
    got = roi_align(maps, (4, 8, 16), found, which, 3, 2)
    for b, p in itertools.product(range(2), range(12)):
        level = int(which[b, p])
        want = slow_roi_align(maps[level][b], found[b, p].tolist(), 4 * 2**level, 3, 2)
        torch.testing.assert_close(got[b, p], want, rtol=1e-9, atol=1e-11)
    many = roi_align(maps, (4, 8, 16), found.repeat(1, 20, 1), which.repeat(1, 20), 3, 2)
    torch.testing.assert_close(many[:, -12:], got)


def test_levels_of_boxes():
    """Equation 1 of the paper on feature pyramids: 224 pixels are level 4."""
    sides = torch.tensor([[0.0, 0], [10, 10], [111, 111], [112, 112], [223.9, 223.9], [224, 224], [448, 112], [5000, 5000]])
    found = torch.cat([torch.zeros(8, 2), sides], -1)
    want = [2 if s == 0 else min(max(math.floor(4 + math.log2(s / 224) + 1e-6), 2), 5) for s in sides.prod(-1).sqrt().tolist()]
    assert choose_levels(found, 224, 2, 5).tolist() == want == [2, 2, 2, 3, 3, 4, 4, 5]


def test_anchors_equal_loops():
    like = torch.zeros((), dtype=torch.float64)
    got = build_anchors([(2, 3), (1, 2)], 32, like).tolist()
    want = []
    for level, (rows, columns) in enumerate([(2, 3), (1, 2)]):
        for y, x, ratio in itertools.product(range(rows), range(columns), (0.5, 1.0, 2.0)):
            side = 32 * 2**level
            width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
            half = [round(width / 2), round(height / 2)]
            at = [x * 4 * 2**level, y * 4 * 2**level]
            want.append([at[0] - half[0], at[1] - half[1], at[0] + half[0], at[1] + half[1]])
    assert got == want


def test_offsets_are_inverse_and_clamped():
    torch.manual_seed(0)
    found, anchors = some_boxes(20) + 1, some_boxes(20) + 2
    torch.testing.assert_close(decode_offsets(encode_offsets(found, anchors), anchors), found)
    one = decode_offsets(torch.tensor([0.5, 0, 0, 99.0]), torch.tensor([10.0, 10, 20, 26]))
    torch.testing.assert_close(one, torch.tensor([15.0, 18 - 500, 25, 18 + 500]))
    assert OFFSET_SCALES == (10, 10, 5, 5)


def test_matching_by_hand():
    """IoU with the two objects: positive from the upper limit on, negative below the lower, else ignored; best ones always."""
    truth = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]]])
    labels = torch.tensor([[4, 1, -1]])
    found = torch.tensor([[[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [20, 20, 24, 24], [50, 50, 60, 60]]])
    owner, kind = match_boxes(found, truth, labels, 0.7, 0.3, all_objects=False)
    assert kind[0].tolist() == [POSITIVE, IGNORED, NEGATIVE, NEGATIVE, NEGATIVE] and owner[0, :4].tolist() == [0, 0, 0, 1]
    _, kind = match_boxes(found, truth, labels, 0.7, 0.3, all_objects=True)
    assert kind[0].tolist() == [POSITIVE, IGNORED, NEGATIVE, POSITIVE, NEGATIVE]


def test_samples_have_at_most_their_share_of_positive_boxes():
    torch.manual_seed(0)
    kind = torch.full((3, 100), NEGATIVE)
    kind[0, :40], kind[1, :3], kind[2] = POSITIVE, POSITIVE, IGNORED
    kind[2, :5] = NEGATIVE
    seen = torch.zeros(3, 100)
    for _ in range(50):
        chosen = sample(kind, 20, 0.25)
        counts = [[int((chosen[i] & (kind[i] == one)).sum()) for one in (POSITIVE, NEGATIVE, IGNORED)] for i in range(3)]
        assert counts == [[5, 15, 0], [3, 17, 0], [0, 5, 0]]
        seen += chosen
    assert (seen[0] > 0).all()  # all have a chance


def test_suppression_with_fixed_shapes_equals_the_other():
    torch.manual_seed(0)
    for limit in (0.3, 0.7):
        found = some_boxes(4, 40, side=12)
        scores = torch.linspace(1, 0, 40).expand(4, -1).flatten()
        real = torch.rand(4, 40) < 0.8
        want = torch.zeros(4, 40, dtype=torch.bool)
        rows, places = real.nonzero(as_tuple=True)
        want[rows, places] = fast.nms(found[rows, places], scores.view(4, 40)[rows, places], rows, limit)
        assert torch.equal(fast.nms_of_sorted(found, real, limit), want)


def test_four_levels_are_needed():
    with pytest.raises(SettingsError, match="four levels"):
        create("faster-rcnn-test", depths=(1, 1), widths=(4, 4))
