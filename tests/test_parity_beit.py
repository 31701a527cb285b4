"""BEiT against transformers and timm: files in and out, other image sizes, feature maps, published sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import card_of, cards, create
from fieldguide.models.transformer.beit import get_offsets
from test_parity_vit import CLOSE, logits, random
from tv import timm, transformers

CLASSES, SIDE, PATCH, DIM, DEPTH, HEADS = 5, 12, 4, 16, 4, 2


def ours(side: int = SIDE, **more) -> nn.Module:
    shape = {"channels": 3, "image": side, "patch": PATCH, "dim": DIM, "depth": DEPTH, "heads": HEADS, "num_classes": CLASSES}
    return create("beit-test", **shape, **more).eval()


def huggingface(model: str = "ForImageClassification", side: int = SIDE, **more) -> nn.Module:
    config = transformers.BeitConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        image_size=side,
        patch_size=PATCH,
        num_labels=CLASSES,
        use_relative_position_bias=True,
        **more,
    )
    return random(getattr(transformers, f"Beit{model}")(config))


def timm_beit(side: int = SIDE) -> nn.Module:
    shape = {"img_size": side, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    return random(
        timm.models.beit.Beit(**shape, num_classes=CLASSES, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    )


@torch.no_grad()
def test_transformers_folders_round_trip(tmp_path):
    theirs = huggingface()
    theirs.save_pretrained(tmp_path / "theirs")
    mine = fieldguide.load(tmp_path / "theirs")
    assert card_of(mine).name == "beit" and mine.config.eps == 1e-12 and mine.config.num_classes == CLASSES
    for size in ((12, 12), (20, 20), (8, 24), (24, 8)):  # biases are interpolated
        x = torch.randn(2, 3, *size)
        want = logits(theirs, x)
        torch.testing.assert_close(mine(x), want, **CLOSE)
    fieldguide.save(mine, tmp_path / "ours", "hf")
    written, own = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == own.keys() and all(torch.equal(tensor, own[key]) for key, tensor in written.items())
    back = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(back, x), want)
    assert fieldguide.load(tmp_path / "ours").config == mine.config


@torch.no_grad()
def test_encoder_and_old_files(tmp_path):
    """The encoder gives the normalized mean of the patches; old files also hold the indices of the bias tables."""
    theirs = huggingface("Model")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    place = "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_index"
    torch.save(
        load_file(path) | {place.format(i): get_offsets((3, 3), "cpu") for i in range(DEPTH)}, tmp_path / "pytorch_model.bin"
    )
    path.unlink()
    mine, x = fieldguide.load(tmp_path), torch.randn(2, 3, 8, 20)
    assert mine.config.output_type == "vector"
    torch.testing.assert_close(mine(x), theirs(x).pooler_output, **CLOSE)


@torch.no_grad()
def test_features_equal_the_backbone_of_transformers():
    theirs = huggingface("Backbone", out_features=["stage1", "stage2", "stage3", "stage4"])
    mine = ours(eps=1e-12, output_type="vector")
    disk = transformers.core_model_loading.revert_weight_conversion(theirs, theirs.state_dict())
    state = {name.removeprefix("beit."): x for name, x in disk.items()}
    state = {name: x for name, x in state.items() if name.startswith(("embeddings.", "encoder."))}
    state |= {f"pooler.layernorm.{part}": torch.ones(DIM) for part in ("weight", "bias")}
    assert weights.load(mine, state) == []
    x = torch.randn(2, 3, 12, 20)
    found = mine.features(x)
    assert list(found) == list(mine.levels) == ["b1", "b2", "b3", "b4"]
    for one, level in zip(theirs(x).feature_maps, found.values(), strict=True):
        assert level.shape == (2, DIM, 3, 5)
        torch.testing.assert_close(level, one, **CLOSE)


@torch.no_grad()
def test_timm_files_round_trip(tmp_path):
    theirs, mine = timm_beit(), ours()
    assert weights.load(mine, theirs.state_dict()) == []
    assert weights._recognize(mine, theirs.state_dict(), None)[0] == "timm"
    x = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    back = weights.read(weights.save(mine, tmp_path / "back.safetensors", "timm"))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


@torch.no_grad()
@pytest.mark.parametrize("side", [20, 8])
def test_biases_are_interpolated_when_loaded(side):
    """A network of another image size computes the same as one that interpolates for each image."""
    theirs, mine, other = timm_beit(), ours(), ours(side)
    weights.load(mine, theirs.state_dict())
    assert weights.load(other, theirs.state_dict()) == []
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(logits(other, x), logits(mine, x), **CLOSE)
    table = other.blocks[1].attn.table.weight
    assert len(table) == (2 * side // PATCH - 1) ** 2 + 3
    assert torch.equal(table[-3:], theirs.blocks[1].attn.relative_position_bias_table[-3:])


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1)], ids=str)
def test_offsets_equal_the_definition(size):
    h, w = size
    offsets, places = get_offsets(size, "cpu"), [(i, j) for i in range(h) for j in range(w)]
    assert offsets.shape == (1 + h * w,) * 2
    last = (2 * h - 1) * (2 * w - 1)
    assert offsets[0, 0] == last + 2
    for a, (i, j) in enumerate(places, 1):
        assert (offsets[0, a], offsets[a, 0]) == (last, last + 1)
        for b, (k, m) in enumerate(places, 1):
            assert offsets[a, b] == (i - k + h - 1) * (2 * w - 1) + j - m + w - 1


@pytest.mark.parametrize("name", ["beit-base", "beit-large-384"])
def test_published_sizes_have_the_names_and_shapes_of_transformers(name):
    with torch.device("meta"):
        mine = create(name)
        c = mine.config
        theirs = transformers.BeitForImageClassification(
            transformers.BeitConfig(
                hidden_size=c.dim,
                num_hidden_layers=c.depth,
                num_attention_heads=c.heads,
                intermediate_size=4 * c.dim,
                image_size=c.image,
                num_labels=1000,
                use_relative_position_bias=True,
            )
        )
        disk = transformers.core_model_loading.revert_weight_conversion(theirs, theirs.state_dict())
        named = weights.translate(mine.state_dict(), weights.get_tables(mine)["huggingface"], reverse=True)
    assert {key: x.shape for key, x in named.items()} == {key: x.shape for key, x in disk.items()}
    assert (
        sum(p.numel() for p in theirs.parameters())
        == sum(p.numel() for p in mine.parameters())
        == cards()["beit"].sizes[name].params
    )


def test_other_networks_are_rejected(tmp_path):
    with pytest.raises(SettingsError, match="dim=18 must be divisible by heads=4"):
        create("beit-test", dim=18, heads=4)
    for key, value in (
        ("use_shared_relative_position_bias", True),
        ("use_mean_pooling", False),
        ("use_relative_position_bias", None),
    ):
        huggingface().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = {**json.loads(path.read_text()), key: value}
        path.write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
        with pytest.raises(WeightsError, match=key):
            fieldguide.load(tmp_path)
