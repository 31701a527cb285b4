"""DETR against transformers: files of all three namings, the loss with auxiliary losses, positions, frozen norms."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import detectors
from fieldguide import load, save
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.boxes import giou, iou, to_centers, to_corners
from fieldguide.models.layers.frozen_norm import FrozenBatchNorm
from fieldguide.models.registry import create
from fieldguide.models.transformer.detr import build_sine_positions
from fieldguide.objectives.set_detection import SetDetection, match_costs
from test_models import batch, tiny


def statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Give the frozen norms values as in a checkpoint; some variances are small, where epsilon matters."""
    torch.manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm):
                module.weight.uniform_(0.1, 0.3)  # keeps the maps small
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.running_var[0] = 1e-2
    return model


def some_objects(rows: int, classes: int, side: int, dtype: torch.dtype = torch.float64):
    """Return padded boxes in pixels and labels of images with 0, 1, 2, ... objects."""
    torch.manual_seed(6)
    first = torch.rand(rows, rows, 2, dtype=dtype) * side / 2
    boxes = torch.cat([first, first + (0.1 + torch.rand(rows, rows, 2, dtype=dtype) * 0.4) * side], -1)
    labels = torch.randint(classes, (rows, rows))
    labels[torch.arange(rows)[:, None] <= torch.arange(rows)] = -1
    return boxes, labels


# ---------------------------------------------------------------------------------------------- files


def test_files_of_transformers_both_ways(tmp_path):
    """The names in files, which since transformers 5 are not those of the live network."""
    from tv import transformers

    torch.manual_seed(0)
    peer = transformers.DetrForObjectDetection(detectors.detr_config(tiny("detr"))).eval()
    peer.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.config == tiny("detr").config
    x = batch("detr", dtype=torch.float32)[0]
    with torch.no_grad():
        want = detectors.Queries(peer)(x)
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
        save(statistics(ours), tmp_path / "ours", "huggingface")
        back = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(detectors.Queries(back)(x), ours(x), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["dilation"] = True
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="dilation=True"):
        load(tmp_path / "ours")


@pytest.mark.parametrize("origin", ["facebookresearch", "huggingface-timm", "huggingface"])
def test_files_are_recognized_without_a_configuration(origin, tmp_path):
    model = statistics(tiny("detr", torch.float32))
    path = weights.save(model, tmp_path / "model.safetensors", origin)
    found = inspect_checkpoint(path)
    assert (found.card.name, found.origin) == ("detr", origin)
    x = batch("detr", dtype=torch.float32)[0]
    assert torch.equal(load(path)(x), model(x))


def test_public_names():
    """Names and shapes of the authors' and of the most used file (`facebook/detr-resnet-50`), whose ResNet is that of timm."""
    with torch.device("meta"):
        model = create("detr-resnet50")
    known = weights.get_tables(model)
    theirs = weights.translate(model.state_dict(), known["facebookresearch"], reverse=True)
    shapes = {
        "backbone.0.body.layer1.0.downsample.1.running_var": (256,),
        "backbone.0.body.layer4.2.conv3.weight": (2048, 512, 1, 1),
        "transformer.encoder.layers.5.self_attn.in_proj_weight": (768, 256),
        "transformer.decoder.layers.0.multihead_attn.out_proj.bias": (256,),
        "transformer.decoder.norm.weight": (256,),
        "query_embed.weight": (100, 256),
        "class_embed.weight": (92, 256),
        "bbox_embed.layers.2.weight": (4, 256),
    }
    assert {name: tuple(theirs[name].shape) for name in shapes} == shapes
    timm = weights.translate(model.state_dict(), known["huggingface-timm"], reverse=True)
    shapes = {
        "model.backbone.conv_encoder.model.bn1.weight": (64,),
        "model.encoder.layers.0.fc1.weight": (2048, 256),
        "model.decoder.layers.0.encoder_attn.q_proj.weight": (256, 256),
        "model.decoder.layers.0.self_attn.out_proj.weight": (256, 256),
        "class_labels_classifier.bias": (92,),
    }
    assert {name: tuple(timm[name].shape) for name in shapes} == shapes
    trained = [p for n, p in model.named_parameters() if not n.startswith(("backbone.stem", "backbone.stages.0"))]
    assert sum(p.numel() for p in trained) == 41_302_368  # that the authors train


def test_configuration_that_names_its_backbone(tmp_path):
    """As in the file of `facebook/detr-resnet-101`."""
    from fieldguide.checkpoints.config_mapping import to_config_fields
    from fieldguide.models.registry import card

    raw = {
        "model_type": "detr",
        "backbone": "resnet101",
        "use_timm_backbone": True,
        "backbone_config": None,
        "num_queries": 100,
    }
    raw |= {"id2label": {str(i): "" for i in range(91)}, "encoder_ffn_dim": 2048, "dilation": False}
    detr = card("detr")
    made = detr.config(**to_config_fields(detr, detr.configs["huggingface"], raw, "config.json"))
    assert made == detr.resolve_config("detr-resnet101")


def test_other_classes_keep_everything_but_the_classifier(tmp_path):
    path = weights.save(tiny("detr", torch.float32), tmp_path / "model.safetensors")
    model = create("detr-test", num_classes=7)
    assert sorted(weights.load(model, path, head="skip")) == ["label.bias", "label.weight"]
    assert torch.equal(model.box[4].weight, tiny("detr", torch.float32).box[4].weight)


# ---------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_loss_and_gradients_equal_transformers(dtype, monkeypatch):
    """Matching, class, L1 and generalized IoU losses of every layer of the decoder; one image has no object.

    With `auxiliary_loss=True` transformers 5.23 passes normalized queries to the next layer, so that the network computes
    something else than without. The authors' does not; the peer's layers are therefore read from outside.
    """
    model = statistics(tiny("detr", dtype))
    peer, rename = detectors.detr(model)
    peer.to(dtype).load_state_dict(rename(model.state_dict()))
    (x,) = batch("detr", 4, dtype)
    boxes, labels = some_objects(4, 3, 33, dtype)
    parts = SetDetection(model)({"image": x, "boxes": boxes, "labels": labels})
    parts["loss"].backward()
    truth = [{"class_labels": own[own >= 0], "boxes": to_centers(some[own >= 0] / 33)} for some, own in zip(boxes, labels)]
    monkeypatch.setattr(torch, "ones", partial(torch.ones, dtype=dtype))  # the weights of classes are in float32 there
    states = []
    for layer in peer.peer.model.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    peer(x)
    states = peer.peer.model.decoder.layernorm(torch.stack(states))
    logits, found = peer.peer.class_labels_classifier(states), peer.peer.bbox_predictor(states).sigmoid()
    peer.peer.config.auxiliary_loss = True
    loss, known, _ = peer.peer.loss_function(logits[-1], truth, x.device, found[-1], peer.peer.config, logits, found)
    loss.backward()
    close = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(parts["loss"], loss, **close)
    for ours, theirs in (("label", "loss_ce"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        torch.testing.assert_close(parts[ours], known[theirs] + known[f"{theirs}_0"], **close)
    renamed = rename({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, parameter in peer.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(renamed[name] / scale, parameter.grad / scale, **close)


def test_detections_equal_transformers():
    from tv import transformers

    model = statistics(tiny("detr"))
    (x,) = batch("detr", 3)
    with torch.no_grad():
        raw = model(x)
    made = type("Found", (), {"logits": raw[..., 4:], "pred_boxes": raw[..., :4]})()
    want = transformers.DetrImageProcessorPil().post_process_object_detection(made, 0.0, torch.tensor([[33, 33]] * 3))
    found = SetDetection(model, max_detections=8).outputs({"image": x})
    assert found["labels"].shape == (3, 8) and (found["labels"][:, 5:] == -1).all() and not found["boxes"][:, 5:].any()
    for i, one in enumerate(want):
        order = one["scores"].argsort(descending=True)
        torch.testing.assert_close(found["scores"][i, :5], one["scores"][order])
        torch.testing.assert_close(found["boxes"][i, :5], one["boxes"][order].clamp(0, 33))
        assert torch.equal(found["labels"][i, :5], one["labels"][order])


def test_matching_equals_trying_all_pairs():
    """Every object gets a query of its own, at the least total cost; padding gets none; costs that are not finite come last."""
    from itertools import permutations

    torch.manual_seed(0)
    cost = torch.rand(2, 3, 4, 3, dtype=torch.float64)
    cost[0, 0, 1] = torch.nan
    real = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    layer, image, query, item = match_costs(cost, real)
    for a in range(2):
        for b in range(3):
            objects = real[b].nonzero()[:, 0].tolist()
            table = cost[a, b].nan_to_num(1e6)
            want = min(
                (sum(float(table[q, n]) for q, n in zip(chosen, objects)), chosen)
                for chosen in permutations(range(4), len(objects))
            )
            mine = (layer == a) & (image == b)
            got = dict(zip(item[mine].tolist(), query[mine].tolist()))
            assert tuple(got[n] for n in objects) == want[1] and sorted(got) == objects
    more = match_costs(torch.rand(1, 1, 2, 5), torch.ones(1, 5, dtype=torch.bool))
    assert len(more[2]) == 2  # more objects than queries


def test_images_without_objects_only_train_the_background():
    model = tiny("detr")
    (x,) = batch("detr", 2)
    for labels in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.int64)):
        parts = SetDetection(model)({"image": x, "boxes": torch.zeros(*labels.shape, 4), "labels": labels})
        assert parts["box"] == parts["giou"] == 0 and parts["label"] > 0


# ---------------------------------------------------------------------------------------------- parts


def test_generalized_iou_by_hand():
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2]])
    b = torch.tensor([[2.0, 1, 6, 3], [0, 0, 4, 4], [3, 0, 4, 1], [1, 1, 1, 1], [0, 0, 4, 4]])
    torch.testing.assert_close(giou(a, b), torch.tensor([4 / 20 - 4 / 24, 1, -0.5, 0, 0]))
    torch.testing.assert_close(iou(a, b), torch.tensor([4 / 20, 1, 0, 0, 0]))
    torch.testing.assert_close(to_centers(a[0]), torch.tensor([2.0, 2, 4, 4]))
    torch.testing.assert_close(to_corners(to_centers(b)), b)


def test_positions_equal_their_equation():
    import math

    got = build_sine_positions(3, 2, 8, torch.device("cpu"), torch.float64)
    for y in range(3):
        for x in range(2):
            want = []
            for place, count in ((y, 3), (x, 2)):
                angle = (place + 1) / (count + 1e-6) * 2 * math.pi
                want += [f(angle / 10000 ** (2 * (i // 2) / 4)) for i, f in enumerate((math.sin, math.cos) * 2)]
            torch.testing.assert_close(got[2 * y + x], torch.tensor(want, dtype=torch.float64))


def test_frozen_norms_are_constants():
    """They are no parameters, do not change in training, and multiply as batch norm does in evaluation."""
    model = statistics(tiny("detr")).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(before) == 4 * 6 and not any("norm.weight" in name for name, _ in model.backbone.named_parameters())
    model(*batch("detr"))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    norm = torch.nn.BatchNorm2d(3).double().eval()
    norm.running_var[0] = 1e-7
    frozen = FrozenBatchNorm(3).double()
    frozen.load_state_dict({n: t for n, t in norm.state_dict().items() if n != "num_batches_tracked"})
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(frozen(x), norm(x))


def test_impossible_widths_are_rejected():
    with pytest.raises(SettingsError, match="divisible"):
        create("detr-test", dim=18)
