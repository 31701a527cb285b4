"""SegFormer: files of three origins, an encoder as a start, the decoder of OpenMMLab, images of any size."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segmenters
from fieldguide import load, save
from fieldguide.automl.fit import NullCallback, fit
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.classes import copy_classes
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import create
from test_models import batch, tiny
from test_task_segmentation import folder
from tv import transformers

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def theirs() -> nn.Module:
    model = tiny("segformer", torch.float32)
    peer, rename = segmenters.segformer(model)
    peer.load_state_dict(rename(model.state_dict()))
    return peer.eval()


@torch.no_grad()
def test_files_of_transformers_both_ways(tmp_path):
    """In files the projections are `linear_c`, in the live network `linear_projections`."""
    peer = theirs()
    peer.peer.save_pretrained(tmp_path / "theirs")
    assert "decode_head.linear_c.0.proj.weight" in weights.read(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    (x,) = batch("segformer", dtype=torch.float32)
    torch.testing.assert_close(ours(x), peer(x), **CLOSE)
    save(ours, tmp_path / "ours", "huggingface")
    back = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(segmenters.Enlarged(back)(x), peer(x), **CLOSE)
    path = weights.save(tiny("segformer", torch.float32), tmp_path / "model.safetensors", "huggingface")
    assert inspect_checkpoint(path).origin == "huggingface" and torch.equal(load(path)(x), ours(x))
    assert inspect_checkpoint(path).preprocessing_defaults()["pixels"] == "0.485,0.456,0.406/0.229,0.224,0.225"


@torch.no_grad()
def test_images_of_any_size_equal_transformers():
    peer, ours = theirs(), tiny("segformer", torch.float32)
    for size in ((64, 32), (37, 90), (65, 33)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(ours(x), peer(x), **CLOSE)


@torch.no_grad()
def test_files_of_the_authors(tmp_path):
    """Their levels are numbered from 1, keys and values are one tensor, and an unused classifier is left out."""
    ours = tiny("segformer", torch.float32)
    state = weights.translate(ours.state_dict(), weights.get_tables(ours)["nvidia"], reverse=True)
    shapes = {
        "backbone.patch_embed1.proj.weight": (4, 3, 7, 7),
        "backbone.block2.1.attn.q.weight": (6, 6),
        "backbone.block2.1.attn.kv.weight": (12, 6),
        "backbone.block3.0.attn.sr.weight": (8, 8, 2, 2),
        "backbone.block4.0.mlp.dwconv.dwconv.weight": (40, 1, 3, 3),
        "backbone.norm4.bias": (10,),
        "decode_head.linear_c4.proj.weight": (8, 10),
        "decode_head.linear_fuse.conv.weight": (8, 32, 1, 1),
        "decode_head.linear_fuse.bn.running_mean": (8,),
        "decode_head.linear_pred.weight": (3, 8, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    qkv = ours.state_dict()["levels_.1.blocks.1.attn.qkv.weight"]
    assert torch.equal(state["backbone.block2.1.attn.kv.weight"], qkv[6:])
    torch.save({"state_dict": {**state, "decode_head.conv_seg.weight": torch.zeros(3, 8, 1, 1)}}, tmp_path / "theirs.pth")
    found = inspect_checkpoint(tmp_path / "theirs.pth")
    assert (found.card.name, found.origin) == ("segformer", "nvidia")
    assert torch.equal(
        load(tmp_path / "theirs.pth")(*batch("segformer", dtype=torch.float32)), ours(*batch("segformer", dtype=torch.float32))
    )
    short = {name: t for name, t in state.items() if "block2.1.attn.kv.weight" not in name}
    with pytest.raises(WeightsError, match="built from 3 tensors"):
        weights.load(create("segformer-test"), short)


class OpenMMLab(nn.Module):
    """The decoder of OpenMMLab in torch layers: convolution, norm and ReLU of each level, enlarged, concatenated, mixed."""

    def __init__(self, encoder: nn.Module, c):
        super().__init__()
        self.encoder = (encoder,)
        step = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.convs = nn.ModuleList(step(width, c.dim) for width in c.widths)
        self.fusion_conv, self.conv_seg = step(4 * c.dim, c.dim), nn.Conv2d(c.dim, c.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(level) for conv, level in zip(self.convs, self.encoder[0].features(x).values())]
        maps = [F.interpolate(level, maps[0].shape[2:], mode="bilinear") for level in maps]
        return F.interpolate(self.conv_seg(self.fusion_conv(torch.cat(maps, 1))), x.shape[2:], mode="bilinear")


@torch.no_grad()
def test_files_of_openmmlab(tmp_path):
    ours = tiny("segformer", normalized=True)
    state = weights.translate(ours.state_dict(), weights.get_tables(ours)["openmmlab"], reverse=True)
    assert state["backbone.layers.1.1.1.ffn.layers.0.weight"].shape == (24, 6, 1, 1)
    assert state["backbone.layers.1.1.1.attn.attn.in_proj_weight"].shape == (18, 6)
    peer = OpenMMLab(ours, ours.config).double().eval()
    names = {".conv.": ".0.", ".bn.": ".1."}
    head = {n.removeprefix("decode_head."): t for n, t in state.items() if n.startswith("decode_head.")}
    for old, new in names.items():
        head = {n.replace(old, new): t for n, t in head.items()}
    peer.load_state_dict(head)
    (x,) = batch("segformer")
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-9, atol=1e-11)
    other = create("segformer-test", normalized=True).double().eval()
    assert weights.load(other, state) == [] and torch.equal(other(x), ours(x))
    with pytest.raises(WeightsError, match="OpenMMLab"):
        save(ours, tmp_path / "no", "huggingface")


@pytest.mark.parametrize(("size", "origin"), [("segformer-b0", "nvidia"), ("segformer-b0-mmseg", "openmmlab")])
def test_published_sizes_are_recognized(size, origin, tmp_path):
    """Also for other classes than those of ADE20K."""
    torch.manual_seed(0)
    model = create(size, num_classes=19)
    found = inspect_checkpoint(weights.save(model, tmp_path / "model.safetensors", origin))
    assert (found.size, found.origin, found.card.config(**found.values)) == (size, origin, model.config)


def test_an_encoder_is_a_start(tmp_path):
    """`nvidia/mit-b0` has the encoder and a classifier of ImageNet; everything else is new."""
    c = tiny("segformer").config
    torch.manual_seed(0)
    peer = transformers.SegformerForImageClassification(segmenters.segformer_config(c))
    peer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["SegformerForImageClassification"]
    found = inspect_checkpoint(tmp_path)
    model = create("segformer-test")
    fresh = weights.load(model, found.state, found.origin, head="skip")
    assert {name.partition(".")[0] for name in fresh} == {"project", "fuse", "label"}
    x = torch.randn(1, 3, 64, 64)
    want = peer.segformer(x, output_hidden_states=True).hidden_states
    for ours, other in zip(model.eval().features(x).values(), want):
        torch.testing.assert_close(ours, other, **CLOSE)


def test_classes_are_copied_by_name():
    model, old = create("segformer-test", num_classes=2), tiny("segformer", torch.float32)
    fresh = weights.load(model, old.state_dict(), head="skip")
    assert sorted(fresh) == ["label.bias", "label.weight"]
    shared = copy_classes(model, old.state_dict(), ["wall", "sky", "street sign"], ["Street_Sign", "tree"], fresh)
    assert shared == ["Street_Sign"] and torch.equal(model.label.weight[0], old.label.weight[2])


@torch.no_grad()
def test_maps_smaller_than_their_reduction_are_padded():
    model = tiny("segformer", reductions=(8, 4, 2, 1))
    assert model(torch.randn(2, 3, 5, 90, dtype=torch.float64)).isfinite().all()


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="four levels"):
        create("segformer-test", depths=(1, 1))
    with pytest.raises(SettingsError, match="heads=3"):
        create("segformer-test", heads=(3, 1, 1, 1))


def test_fit_starts_from_classes_and_pixels_of_a_checkpoint(tmp_path):
    """Classes are found by name; images are standardized as for the checkpoint, also when a run is the checkpoint."""
    torch.manual_seed(0)
    save(create("segformer-test", num_classes=4), tmp_path / "public", "huggingface")
    config = json.loads((tmp_path / "public" / "config.json").read_text())
    config["id2label"] = dict(enumerate(["sky", "Square", "wall", "car"]))
    (tmp_path / "public" / "config.json").write_text(json.dumps(config))
    images = folder(tmp_path / "data")
    (images / "masks" / "classes.txt").write_text("ground\nsquare\n")
    (images / "classes.txt").write_text("ground\nsquare\n")
    said = []
    callback = NullCallback()
    callback.log = said.append
    settings = {"steps": 2, "lr": 0.0, "batch": 4, "precision": "float32", "augment": "none", "finetune": "whole"}
    run = fit(
        str(images), weights=str(tmp_path / "public"), minutes=2, out=tmp_path / "run", settings=settings, callback=callback
    )
    assert any("1 of 2 classes start from those of the checkpoint: square" in line for line in said), said
    old = weights.read(tmp_path / "public")["decode_head.classifier.weight"]
    torch.testing.assert_close(run.model.label.weight[1], old[1])
    assert run.task.canvas.mean == (0.485, 0.456, 0.406) and run.task.canvas.std == (0.229, 0.224, 0.225)
    assert inspect_checkpoint(run.path).preprocessing_defaults()["pixels"] == "0.485,0.456,0.406/0.229,0.224,0.225"
    (answer,) = run.predict([str(images / "images" / "p0.png")])
    assert set(answer["shares"]) <= {"ground", "square"}


def test_runs_keep_the_normalization_of_their_data(tmp_path):
    """A run that started without a checkpoint has measured it; what starts from the run keeps it."""
    settings = {"steps": 1, "batch": 4, "precision": "float32"}
    run = fit(str(folder(tmp_path / "data")), model="segformer-test", minutes=2, out=tmp_path / "run", settings=settings)
    mean, std = run.task.canvas.mean, run.task.canvas.std
    assert inspect_checkpoint(run.path).preprocessing_defaults()["pixels"] == f"{mean[0]}/{std[0]}"
