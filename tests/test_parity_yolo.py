"""YOLOv8 and YOLO11 of every published size against the original package, as a black box, and its files.

That package is AGPL-3.0 and no dependency, so these tests run only where somebody installed it: nothing is read from
it, networks are built by their public names and compared. Everywhere else test_models.py holds the network to an
independent reference (boxes.py), and the counts to what is published.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import boxes
from cases import equations
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.models.convolutional import yolo11
from fieldguide.models.convolutional.yolov8 import ultralytics_keys
from fieldguide.models.registry import create, find
from fieldguide.objectives.detection import decode, make_grid
from test_models import tiny


@pytest.fixture(scope="module")
def ultralytics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics (AGPL-3.0) is not installed: no black box")
    return lambda size, classes=80: tasks.DetectionModel(f"{size}.yaml", ch=3, nc=classes, verbose=False)


@pytest.mark.parametrize("size", [f"{name}{size}" for name in ("yolov8", "yolo11") for size in "nsmlx"])
@torch.no_grad()
def test_equals_the_original_package(ultralytics, size, tmp_path):
    """Boxes and class probabilities decoded by that package, from the same weights, and back."""
    classes = 7 if size == "yolov8s" else 80
    theirs, ours = ultralytics(size, classes).eval(), create(size, num_classes=classes).eval()
    if classes == 80:
        assert sum(p.numel() for p in theirs.parameters()) == find(size)[0].sizes[size].params + 16
    torch.manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and "dfl" not in name:
            tensor.add_(torch.randn_like(tensor) * 0.02)
    assert weights.load(ours, theirs.state_dict()) == []
    back = weights.read(weights.save(ours, tmp_path / "model.safetensors", "ultralytics"))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    x = torch.rand(2, 3, 96, 160, dtype=torch.float64)
    want, _ = theirs.double()(x)
    found, _, logits = decode(ours.double()(x), ours.bins, *make_grid(96, 160, ours.strides, x.device))
    torch.testing.assert_close(logits.sigmoid(), want[:, 4:].mT, rtol=1e-9, atol=1e-12)
    middle, side = want[:, :4].mT.chunk(2, -1)
    torch.testing.assert_close(found, torch.cat([middle - side / 2, middle + side / 2], -1), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["yolov8", "yolo11", "yolo11 nested", "yolo11 heads"])
def test_large_and_oblong_images_equal_the_equations(name):
    """Large enough that one, two and three poolings differ, and of odd sizes; blocks in blocks; several attention heads."""
    name, _, more = name.partition(" ")
    changes = {"": {}, "nested": {"nested": True, "depth": 2}, "heads": {"widths": (4, 6, 8, 12, 256)}}[more]
    model = tiny(name, **changes)
    peer, rename = equations(getattr(boxes, name))(model)
    peer.double().eval().load_state_dict(rename(model.state_dict()))
    x = torch.randn(1, 3, 130, 300, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-9, atol=1e-11)


def test_head_widths():
    """The width of the class branch grows up to 100 only; the box branch has at least four channels per bin."""
    for classes, bins, label, side in ((10, 16, 64, 64), (90, 16, 90, 64), (365, 16, 100, 64), (80, 32, 80, 128)):
        head = create("yolov8n", num_classes=classes, bins=bins).heads[0]
        assert (head.label[0].conv.out_channels, head.box[0].conv.out_channels) == (label, side)
        assert (head.label[-1].out_channels, head.box[-1].out_channels) == (classes, 4 * bins)


def test_public_file_names():
    """Names and shapes of the smallest published network."""
    with torch.device("meta"):
        state = weights.translate(create("yolov8n").state_dict(), ultralytics_keys(), reverse=True)
    assert len(state) == 355 and sum(name.endswith("num_batches_tracked") for name in state) == 57
    shapes = {
        "model.0.conv.weight": (16, 3, 3, 3),
        "model.0.bn.running_var": (16,),
        "model.2.cv2.conv.weight": (32, 48, 1, 1),
        "model.4.m.1.cv2.conv.weight": (32, 32, 3, 3),
        "model.9.cv2.conv.weight": (256, 512, 1, 1),
        "model.12.cv1.conv.weight": (128, 384, 1, 1),
        "model.15.m.0.cv1.bn.bias": (32,),
        "model.16.conv.weight": (64, 64, 3, 3),
        "model.18.cv1.conv.weight": (128, 192, 1, 1),
        "model.19.conv.weight": (128, 128, 3, 3),
        "model.21.cv1.conv.weight": (256, 384, 1, 1),
        "model.22.cv2.0.2.bias": (64,),
        "model.22.cv2.2.0.conv.weight": (64, 256, 3, 3),
        "model.22.cv3.1.1.conv.weight": (80, 80, 3, 3),
        "model.22.cv3.2.2.weight": (80, 80, 1, 1),
        "model.22.dfl.conv.weight": (1, 16, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_public_file_names_of_yolo11():
    """Names and shapes of the smallest published network, and of blocks in blocks in a larger one."""
    with torch.device("meta"):
        state = weights.translate(create("yolo11n").state_dict(), yolo11.ultralytics_keys(), reverse=True)
        large = weights.translate(create("yolo11m").state_dict(), yolo11.ultralytics_keys(), reverse=True)
    assert len(state) == 499 and sum(name.endswith("num_batches_tracked") for name in state) == 81
    shapes = {
        "model.2.cv2.conv.weight": (64, 48, 1, 1),
        "model.2.m.0.cv1.conv.weight": (8, 16, 3, 3),
        "model.6.m.0.cv3.conv.weight": (64, 64, 1, 1),
        "model.8.m.0.m.1.cv2.bn.running_var": (64,),
        "model.10.m.0.attn.qkv.conv.weight": (256, 128, 1, 1),
        "model.10.m.0.attn.pe.conv.weight": (128, 1, 3, 3),
        "model.10.m.0.ffn.1.conv.weight": (128, 256, 1, 1),
        "model.13.m.0.cv2.conv.weight": (64, 32, 3, 3),
        "model.22.m.0.m.0.cv1.conv.weight": (64, 64, 3, 3),
        "model.23.cv2.0.2.bias": (64,),
        "model.23.cv3.0.0.0.conv.weight": (64, 1, 3, 3),
        "model.23.cv3.2.0.1.conv.weight": (80, 256, 1, 1),
        "model.23.cv3.1.2.weight": (80, 80, 1, 1),
        "model.23.dfl.conv.weight": (1, 16, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert large["model.2.m.0.m.1.cv1.conv.weight"].shape == (32, 32, 3, 3)


@pytest.mark.parametrize("name", ["yolov8", "yolo11"])
def test_files_are_recognized(name, tmp_path):
    model = tiny(name, torch.float32)
    found = inspect_checkpoint(weights.save(model, tmp_path / "model.safetensors", "ultralytics"))
    assert (found.card.name, found.origin, found.size) == (name, "ultralytics", f"{name}-test")
    other = create(f"{name}-test", num_classes=9)
    assert {key.split(".")[2] for key in weights.load(other, found.state, head="skip")} == {"label"}


def test_initial_class_probability():
    """5 objects per 640-pixel image among the points of a level, over 80 classes."""
    for head, points in zip(create("yolov8n").heads, (6400, 1600, 400)):
        torch.testing.assert_close(head.label[-1].bias.sigmoid(), torch.full((80,), 5 / 80 / points), rtol=1e-3, atol=0)


def test_missing_levels_are_rejected():
    with pytest.raises(SettingsError, match="five widths"):
        create("yolov8-test", widths=(4, 8, 8, 8))
    with pytest.raises(SettingsError, match="even"):
        create("yolov8-test", widths=(4, 7, 8, 8, 8))
    with pytest.raises(SettingsError, match="five widths"):
        create("yolo11-test", widths=(4, 8, 8, 8))
