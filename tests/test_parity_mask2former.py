"""Mask2Former against transformers: files, both backbones, the losses, semantic maps; a run of image segmentation."""

from __future__ import annotations

import pytest
import torch

import segmenters
from fieldguide import load, save
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.models.registry import create
from fieldguide.objectives.mask_set import MaskSet, MaskSetSegmentation
from test_models import batch, tiny
from test_task_segmentation import folder

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SMALL_RESNET = {"backbone": "resnet", "block": "basic", "widths": (4, 6, 8, 10)}


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
@torch.no_grad()
def test_files_of_transformers_both_ways(backbone, tmp_path):
    from tv import transformers

    model = tiny("mask2former", torch.float32, **(SMALL_RESNET if backbone == "resnet" else {}))
    torch.manual_seed(0)
    peer = transformers.Mask2FormerForUniversalSegmentation(segmenters.mask2former_config(model.config)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    (x,) = batch("mask2former")  # in float64: rounding would change which positions a mask covers
    torch.testing.assert_close(ours.double()(x), segmenters.MaskQueries(peer.double())(x), **CLOSE)
    save(model, tmp_path / "ours", "huggingface")
    back = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(segmenters.MaskQueries(back.double())(x), model.double()(x), **CLOSE)
    if backbone == "swin":
        path = weights.save(model.float(), tmp_path / "model.safetensors", "huggingface")
        found = inspect_checkpoint(path)
        model.double()
        assert (found.card.name, found.origin) == ("mask2former", "huggingface") and torch.equal(
            load(path).double()(x), model(x)
        )


def test_resnet_equals_transformers():
    model = tiny("mask2former", **SMALL_RESNET)
    peer, rename = segmenters.mask2former(model)
    peer.double().eval().load_state_dict(rename(model.state_dict()))
    (x,) = batch("mask2former")
    torch.testing.assert_close(model(x), peer(x), rtol=1e-9, atol=1e-11)


def some_segments(dtype):
    """Return logits of two layers, and two images with three and one segments."""
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 2, 5, 4, dtype=dtype), torch.randn(2, 2, 5, 24, dtype=dtype)
    labels = torch.tensor([[0, 2, 1], [1, -1, -1]])
    true = (torch.rand(2, 3, 24) > 0.5).to(dtype)
    return logits, masks, labels, true


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_losses_equal_transformers(dtype, monkeypatch):
    """At the same points, which are all positions: the matching and the three losses of each layer."""
    from transformers.models.mask2former import modeling_mask2former as theirs

    model = tiny("mask2former")
    config = segmenters.mask2former_config(model.config, train_num_points=24)
    criterion = theirs.Mask2FormerLoss(config, {}).to(dtype)
    criterion.empty_weight[-1] = 0.1  # there rounded to float32
    monkeypatch.setattr(theirs, "sample_point", lambda features, points, **_: features.flatten(2))
    monkeypatch.setattr(criterion, "sample_points_using_uncertainty", lambda *_: torch.zeros(1, 24, 2, dtype=dtype))
    logits, masks, labels, true = some_segments(dtype)
    logits.requires_grad_(), masks.requires_grad_()
    parts = MaskSet().measure(logits, masks, labels, true, torch.ones(2, 24, dtype=dtype))
    known = [row >= 0 for row in labels]
    segments = [t[k].view(-1, 4, 6) for t, k in zip(true, known)]
    classes = [row[k] for row, k in zip(labels, known)]
    want = {"label": 0.0, "mask": 0.0, "dice": 0.0}
    names = {"label": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
    for layer in range(2):
        found = criterion(masks[layer].view(2, 5, 4, 6), logits[layer], segments, classes)
        want = {name: value + found[names[name]] for name, value in want.items()}
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else CLOSE
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value, check_dtype=False, **close)
    ours = torch.autograd.grad(sum(parts.values()), [logits, masks], retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(sum(want.values()), [logits, masks])):
        torch.testing.assert_close(a, b, **close)


def test_positions_without_a_class_are_not_scored():
    logits, masks, labels, true = some_segments(torch.float64)
    known = torch.ones(2, 24, dtype=torch.float64)
    known[:, 20:] = 0
    first = MaskSet()(logits, masks, labels, true, known)
    masks[..., 20:], true[..., 20:] = 7.0, 1.0
    again = MaskSet()(logits, masks, labels, true, known)
    cut = MaskSet()(logits, masks[..., :20], labels, true[..., :20], known[:, :20])
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)
        torch.testing.assert_close(cut[name], value)


@torch.no_grad()
def test_semantic_maps_equal_transformers():
    from tv import transformers

    model = tiny("mask2former")
    (x,) = batch("mask2former", 2)
    labels, masks = model.predict_layers(x)[-1]
    made = type("Found", (), {"class_queries_logits": labels, "masks_queries_logits": masks})()
    processor = transformers.Mask2FormerImageProcessorPil()
    scores = MaskSetSegmentation(model, 3).predict_untiled(x)
    want = torch.stack(processor.post_process_semantic_segmentation(made, [(64, 96)] * 2))
    assert (scores.argmax(1) == want).double().mean() > 0.95  # there masks are enlarged in two steps
    assert MaskSetSegmentation(model, 3).predict_untiled(x[..., :50, :70]).shape == (2, 3, 50, 70)


def test_counts_of_transformers():
    """The catalogue's counts, which include a norm of Swin without use."""
    for size, unused, count in (
        ("mask2former-swin-t-ade", 2 * 768, 47_441_169),
        ("mask2former-swin-l-panoptic", 2 * 1536, 215_538_682),
        ("mask2former-resnet50", 0, 44_023_377),
        ("mask2former-resnet50-panoptic", 0, 44_036_998),
    ):
        with torch.device("meta"):
            assert sum(p.numel() for p in create(size).parameters()) + unused == count


def test_network_trains_and_predicts(tmp_path):
    settings = {"steps": 3, "batch": 4, "precision": "float32", "channels_last": False}
    data = folder(tmp_path / "data")
    run = fit(str(data), model="mask2former-test", minutes=2, out=tmp_path / "run", settings=settings)
    assert set(run.scores) == {"miou", "pixel_accuracy", "mean_accuracy"}
    (answer,) = run.predict([str(data / "images" / "p0.png")])
    assert set(answer["shares"]) <= {"background", "foreground"}


def test_impossible_widths_are_rejected():
    with pytest.raises(SettingsError, match="divisible by 32"):
        create("mask2former-test", dim=40)
    with pytest.raises(SettingsError, match="swin or"):
        create("mask2former-test", backbone="vit")
