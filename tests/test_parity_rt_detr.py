"""RT-DETR against transformers: files, the loss with noisy objects; deformable attention and noise against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import detectors
from fieldguide import load, save
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.boxes import to_centers
from fieldguide.models.layers.deformable_attention import DeformableAttention
from fieldguide.models.registry import create
from fieldguide.objectives.denoising_detection import DenoisingDetection, add_noise
from test_models import batch, tiny
from test_parity_detr import some_objects, statistics

# ---------------------------------------------------------------------------------------------- files


def test_files_of_transformers_both_ways(tmp_path):
    from tv import transformers

    torch.manual_seed(0)
    peer = transformers.RTDetrForObjectDetection(detectors.rt_detr_config(tiny("rt-detr"))).eval()
    peer.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.config == tiny("rt-detr").config
    x = batch("rt-detr", dtype=torch.float32)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), detectors.Queries(peer)(x), rtol=1e-4, atol=1e-5)
        save(statistics(ours), tmp_path / "ours", "huggingface")
        back = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(detectors.Queries(back)(x), ours(x), rtol=1e-4, atol=1e-5)
    assert inspect_checkpoint(tmp_path / "ours").preprocessing_defaults()["pixels"] == "0.0,0.0,0.0/1.0,1.0,1.0"


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_files_are_recognized_without_a_configuration(block, tmp_path):
    """Also with blocks of three convolutions, and with the second copy of the heads that files of transformers 4 hold."""
    model = statistics(tiny("rt-detr", torch.float32, block=block))
    path = weights.save(model, tmp_path / "model.safetensors", "huggingface")
    x = batch("rt-detr", dtype=torch.float32)[0]
    if block == "basic":
        found = inspect_checkpoint(path)
        assert (found.card.name, found.origin) == ("rt-detr", "huggingface")
        assert torch.equal(load(path)(x), model(x))
    state = weights.read(path)
    twice = {n.removeprefix("model.decoder."): t for n, t in state.items() if ".class_embed." in n or ".bbox_embed." in n}
    other = create("rt-detr-test", block=block).eval()
    assert len(twice) == 16 and weights.load(other, {**state, **twice}) == []
    assert torch.equal(other(x), model(x))


def test_bottlenecks_equal_transformers():
    """The ResNet-50 of the published network: pooled shortcuts with stride 2 only."""
    model = statistics(tiny("rt-detr", block="bottleneck"))
    peer, rename = detectors.rt_detr(model)
    peer.double().eval().load_state_dict(rename(model.state_dict()))
    torch.testing.assert_close(model(*batch("rt-detr")), peer(*batch("rt-detr")), rtol=1e-9, atol=1e-11)


def test_counts_depend_on_the_number_of_classes():
    """transformers counts two classes by default; the published weights have 80."""
    with torch.device("meta"):
        two = create("rt-detr-resnet50", num_classes=2)
        state = weights.translate(create("rt-detr-resnet50").state_dict(), weights.get_tables(two)["huggingface"], reverse=True)
    assert sum(p.numel() for p in two.parameters()) == 42_731_082
    shapes = {
        "model.backbone.model.embedder.embedder.0.convolution.weight": (32, 3, 3, 3),
        "model.backbone.model.encoder.stages.0.layers.0.shortcut.convolution.weight": (256, 64, 1, 1),
        "model.backbone.model.encoder.stages.1.layers.0.shortcut.1.convolution.weight": (512, 256, 1, 1),
        "model.encoder.encoder.0.layers.0.fc1.weight": (1024, 256),
        "model.encoder.pan_blocks.1.bottlenecks.2.conv2.norm.running_var": (256,),
        "model.decoder.layers.5.encoder_attn.sampling_offsets.weight": (192, 256),
        "model.decoder.class_embed.5.weight": (80, 256),
        "model.denoising_class_embed.weight": (81, 256),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_other_classes_keep_everything_but_the_classifiers(tmp_path):
    path = weights.save(tiny("rt-detr", torch.float32), tmp_path / "model.safetensors")
    fresh = weights.load(create("rt-detr-test", num_classes=7), path, head="skip")
    assert {name.partition(".")[0] for name in fresh} == {"label", "proposal_label", "known"}


# ---------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_loss_and_gradients_equal_transformers(dtype, noisy, monkeypatch):
    """Varifocal, L1 and generalized IoU losses of all layers, of proposals and of noisy objects, which both get the same."""
    model = statistics(tiny("rt-detr", dtype)).train()
    peer, rename = detectors.rt_detr(model)
    peer.peer.config.num_denoising = 12 if noisy else 0
    peer.to(dtype).load_state_dict(rename(model.state_dict()))
    (x,) = batch("rt-detr", 3, dtype)
    boxes, labels = some_objects(3, 3, 64, dtype)
    size = boxes.new_tensor([96, 64] * 2)
    truth = [{"class_labels": own[own >= 0], "boxes": to_centers(some[own >= 0] / size)} for some, own in zip(boxes, labels)]

    def given(targets, *, class_embed, num_denoising_queries, **_):
        if not num_denoising_queries:
            return None, None, None, None
        torch.manual_seed(7)
        made = add_noise(to_centers(boxes / size), labels, 3, model.config.queries, copies=12)
        sees = torch.zeros(made.mask.shape, dtype=dtype).masked_fill(~made.mask, -torch.inf)
        split = [made.labels.shape[1], model.config.queries]
        places = tuple(made.pairs[1][made.pairs[0] == i] for i in range(3))
        about = {"dn_positive_idx": places, "dn_num_group": made.groups, "dn_num_split": split}
        return class_embed(made.labels), made.boxes, sees, about

    monkeypatch.setattr("transformers.models.rt_detr.modeling_rt_detr.get_contrastive_denoising_training_group", given)
    want = peer.train().peer(x, labels=truth)
    want.loss.backward()
    torch.manual_seed(7)
    objective = DenoisingDetection(model, copies=12 if noisy else 0)
    parts = objective({"image": x, "boxes": boxes, "labels": labels})
    parts["loss"].backward()
    close = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 1e-4}
    torch.testing.assert_close(parts["loss"], want.loss, check_dtype=False, **close)
    for ours, theirs in (("label", "loss_vfl"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        scale = objective.weights[ours]
        known = sum(v for k, v in want.loss_dict.items() if k.startswith(theirs) and "_dn_" not in k)
        torch.testing.assert_close(parts[ours] * scale, known, check_dtype=False, **close)
        if noisy:
            known = sum(v for k, v in want.loss_dict.items() if k.startswith(theirs) and "_dn_" in k)
            torch.testing.assert_close(parts[f"noisy_{ours}"] * scale, known, check_dtype=False, **close)
    grads = rename({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
    for name, parameter in peer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = grad.abs().max().clamp(min=1)
        torch.testing.assert_close(grads[name] / scale, grad / scale, **close)
    every = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert every == (set() if noisy else {"known.weight"})


def test_detections_equal_transformers():
    from tv import transformers

    model = statistics(tiny("rt-detr"))
    (x,) = batch("rt-detr", 2)
    with torch.no_grad():
        raw = model(x)
    made = type("Found", (), {"logits": raw[..., 4:], "pred_boxes": raw[..., :4]})()
    processor = transformers.RTDetrImageProcessorPil()
    want = processor.post_process_object_detection(made, 0.0, torch.tensor([[64, 96]] * 2), use_focal_loss=True)
    found = DenoisingDetection(model, max_detections=7).outputs({"image": x})
    for i, one in enumerate(want):
        torch.testing.assert_close(found["scores"][i], one["scores"])
        assert torch.equal(found["labels"][i], one["labels"])
        limit = torch.tensor([96.0, 64, 96, 64], dtype=torch.float64)
        torch.testing.assert_close(found["boxes"][i], torch.minimum(one["boxes"].clamp(min=0), limit))


def test_images_without_objects():
    model = tiny("rt-detr")
    (x,) = batch("rt-detr", 2)
    for labels in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.int64)):
        parts = DenoisingDetection(model)({"image": x, "boxes": torch.zeros(*labels.shape, 4), "labels": labels})
        assert set(parts) == {"loss", "label", "box", "giou"} and parts["box"] == 0 and parts["label"] > 0


# ---------------------------------------------------------------------------------------------- noisy objects


def theirs(targets, classes, queries, copies):
    """Return the groups of transformers, without noise in classes."""
    from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

    return get_contrastive_denoising_training_group(targets, classes, queries, lambda labels: labels, copies, 0.0, 1.0)


def test_groups_equal_transformers():
    """Classes, masks, positive copies and their objects; gaps in the padding are closed."""
    boxes, labels = some_objects(3, 5, 1, torch.float32)
    labels[2] = torch.tensor([3, -1, 1])
    truth = [{"class_labels": own[own >= 0], "boxes": to_centers(some[own >= 0])} for some, own in zip(boxes, labels)]
    for copies in (1, 4, 11):
        made = add_noise(to_centers(boxes), labels, 5, 6, copies=copies, flipped=0.0)
        known, _, mask, about = theirs(truth, 5, 6, copies)
        assert torch.equal(made.labels, known.long()) and torch.equal(made.mask, mask == 0)
        assert made.groups == about["dn_num_group"]
        image, copy, item = made.pairs
        for i in range(3):
            assert torch.equal(copy[image == i], about["dn_positive_idx"][i])
            objects = (labels[i] >= 0).nonzero()[:, 0]
            assert torch.equal(item[image == i], objects.repeat(made.groups))


def test_noise_is_less_than_half_a_side_or_more():
    torch.manual_seed(0)
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.1]]], dtype=torch.float64)
    made = add_noise(box, torch.zeros(1, 1, dtype=torch.int64), 4, 3, copies=2000, flipped=0.25)
    found = made.boxes.sigmoid()
    corners = torch.cat([found[..., :2] - found[..., 2:].abs() / 2, found[..., :2] + found[..., 2:].abs() / 2], -1)
    assert found.shape == (1, 4000, 4) and corners.isfinite().all()
    first, last = (found[0, i::2] for i in (0, 1))
    reach = torch.tensor([0.1, 0.05], dtype=torch.float64)
    # A positive center moves by less than a quarter of a side on average of two corners, so it stays within half a side.
    assert ((first[:, :2] - 0.5).abs() < reach).all() and (last[:, :2] - 0.5).abs().amax() > reach.min()
    assert 0.15 < (made.labels != 0).double().mean() < 0.23  # a quarter of the classes is drawn, one in four of these is right


# ---------------------------------------------------------------------------------------------- parts


@torch.no_grad()
def test_deformable_attention_equals_its_equation():
    """Equation 3 of the paper, point by point; points outside of the maps are zero."""
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, 3, 2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    sides = [(4, 6), (2, 3), (1, 2)]
    memory = torch.randn(2, sum(h * w for h, w in sides), 8, dtype=torch.float64)
    query, boxes = torch.randn(2, 3, 8, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    got = layer(query, boxes, memory, sides)
    value = memory @ layer.value.weight.T + layer.value.bias
    for b, q in itertools.product(range(2), range(3)):
        places = (layer.places.weight @ query[b, q] + layer.places.bias).view(2, 3, 2, 2)
        amounts = (layer.weights.weight @ query[b, q] + layer.weights.bias).view(2, 6).softmax(-1).view(2, 3, 2)
        cx, cy, width, height = boxes[b, q]
        parts = []
        for head in range(2):
            total, start = torch.zeros(4, dtype=torch.float64), 0
            for level, (rows, columns) in enumerate(sides):
                maps = value[b, start : start + rows * columns].view(rows, columns, 2, 4)[:, :, head]
                start += rows * columns
                for point in range(2):
                    x = float(cx + places[head, level, point, 0] / 2 * width / 2) * columns - 0.5
                    y = float(cy + places[head, level, point, 1] / 2 * height / 2) * rows - 0.5
                    for yy, xx in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                        if 0 <= yy < rows and 0 <= xx < columns:
                            share = (1 - abs(y - yy)) * (1 - abs(x - xx))
                            total = total + amounts[head, level, point] * share * maps[yy, xx]
            parts.append(total)
        want = layer.proj.weight @ torch.cat(parts) + layer.proj.bias
        torch.testing.assert_close(got[b, q], want, rtol=1e-9, atol=1e-11)


def test_heads_look_into_different_directions():
    """Before training, head h reads points at distances 1, 2, ... in the direction of its angle."""
    layer = DeformableAttention(8, 4, 3, 2)
    places = layer.places.bias.view(4, 3, 2, 2)
    torch.testing.assert_close(places[:, 0, 0], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(places[:, :, 1], 2 * places[:, :, 0])


@torch.no_grad()
def test_initial_predictions():
    """Classes with a probability of 0.01; boxes are those of the positions."""
    torch.manual_seed(0)
    model = create("rt-detr-test").eval()
    layers, proposals = model.predict_all(torch.randn(1, 3, 64, 96))
    assert proposals[..., 4:].sigmoid().mean() < 0.05
    torch.testing.assert_close(layers[0][..., :4], proposals[..., :4], rtol=1e-3, atol=1e-4)
    sides = proposals[0, :, 2:4]
    assert all(any(abs(float(s) - 0.05 * 2**k) < 1e-5 for k in range(3)) for s in sides.flatten())


def test_other_sizes_are_padded_at_the_right_and_bottom():
    model, x = tiny("rt-detr"), torch.randn(1, 3, 50, 70, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 26, 0, 14))
    assert torch.equal(model(x), model(padded))


def test_impossible_widths_are_rejected():
    with pytest.raises(SettingsError, match="divisible"):
        create("rt-detr-test", dim=18)
