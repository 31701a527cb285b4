"""Folders without a head, as backbones are published: embeddings equal to transformers, and fits that start from them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import fieldguide
from fieldguide.checkpoints import load, weights
from fieldguide.core.errors import SettingsError, WeightsError, WeightsWarning
from fieldguide.models.registry import create
from test_folders import FOLDERS, PLAIN, settled
from tv import timm, transformers

VIT = {**PLAIN, "intermediate_size": 64, "num_channels": 2, "image_size": 24, "patch_size": 4}
CLASS = "last_hidden_state"  # where a pooler of its own would change the vector: its first place
MODELS = {  # their class, its configuration, where their vector is
    "vit": ("ViTModel", VIT, CLASS),
    "deit": ("DeiTModel", VIT, CLASS),
    "swin": (
        "SwinModel",
        {
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": 3,
            "patch_size": 2,
            "image_size": 24,
            "num_channels": 2,
        },
        "pooler_output",
    ),
    **{
        kind: (FOLDERS[kind][0].replace("ForImageClassification", "Model"), FOLDERS[kind][1], "pooler_output")
        for kind in ("resnet", "convnext", "convnextv2", "dinov2", "dinov2-gated", "dinov2-registers")
    },
}


def made(kind):
    name, shape, where = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return settled(cls(cls.config_class(**{k: v for k, v in shape.items() if k != "num_labels"}))), where


def vectors(theirs, where, image):
    found = theirs(image)[where]
    return found[:, 0] if where == CLASS else found.flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_backbone_vectors_equal_transformers(kind, tmp_path):
    theirs, where = made(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    assert ours.config.output_type == "vector" and not any(name.startswith("head") for name in ours.state_dict())
    torch.manual_seed(2)
    image = torch.randn(3, 2, 24, 24)
    want, got = vectors(theirs, where, image), ours(image)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.std(0).max() > 1e-3
    fieldguide.save(ours, tmp_path / "ours", "hf")
    written, own = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    extra = {name for name in own if name.startswith("pooler.") or "relative_position_index" in name}
    assert written.keys() == own.keys() - extra and all(torch.equal(x, own[name]) for name, x in written.items())
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [type(theirs).__name__]
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(vectors(back, where, image), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "convnext"])
def test_head_can_be_added_or_omitted(kind, tmp_path):
    theirs, _ = made(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs", output_type="label", num_classes=5, head="skip")
    image = torch.randn(2, 2, 24, 24)
    assert ours(image).shape == (2, 5)
    fieldguide.save(ours, tmp_path / "labels", "hf")
    with pytest.warns(WeightsWarning, match="2 tensors of heads that this network does not have"):
        bare = fieldguide.load(tmp_path / "labels", output_type="vector")
    torch.testing.assert_close(bare(image), fieldguide.load(tmp_path / "theirs")(image))
    with pytest.raises(SettingsError, match=r"output_type='words' is not supported. Choose one of label, vector"):
        fieldguide.load(tmp_path / "theirs", output_type="words")


@torch.no_grad()
def test_backbone_files(tmp_path):
    """DINOv2's authors publish such files, and timm writes them for models without classes."""
    model = create("dinov2-small", image=28, output_type="vector", depth=1)
    path = weights.save(model, tmp_path / "x.safetensors", "facebook")
    ours = load.load(path, name="dinov2-small", image=28, depth=1)
    image = torch.randn(1, 3, 28, 28)
    assert ours.config.output_type == "vector" and torch.equal(ours(image), model.eval()(image))
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {}})
    )
    (tmp_path / "x.safetensors").unlink()
    image = torch.randn(1, 3, 224, 224)
    ours = fieldguide.load(tmp_path)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


def test_classifier_files_keep_their_head(tmp_path):
    found = load.inspect_checkpoint(weights.save(create("vit-test"), tmp_path / "x.safetensors", "timm"), "vit-test")
    assert found.values.get("output_type", "label") == "label"


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "convnext", "deit"])
def test_fit_starts_from_a_backbone(kind, tmp_path):
    """All weights but those of the new head come from the checkpoint."""
    theirs, _ = made(kind)
    theirs.save_pretrained(tmp_path)
    begun = load.inspect_checkpoint(tmp_path)
    network = begun.card.make(
        begun.build_config({"output_type": ("label",), "num_classes": 10, "image": 24, "channels": 2}, {})
    )
    fresh = weights.load(network, begun.state, begun.origin, head="skip")
    assert fresh == ["head.weight", "head.bias"] and network(torch.randn(2, 2, 24, 24)).shape[-1] == 10


TEXTS = {  # as their published folders say
    "BertModel": {},
    "RobertaModel": {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "ModernBertModel": {},
    "DebertaV2Model": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::fieldguide.core.errors.WeightsWarning")  # of their poolers
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_without_a_head(name, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("Model", "Config"))(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        cls_token_id=3,
        sep_token_id=4,
        **TEXTS[name],
    )
    theirs = settled(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    ours = fieldguide.load(tmp_path)
    tokens = torch.randint(5, 40, (2, 9))
    assert ours.config.output_type == "vector"
    torch.testing.assert_close(ours.features(tokens), theirs(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_unsupported_networks_are_named(tmp_path):
    theirs = transformers.FNetModel(
        transformers.FNetConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, intermediate_size=20)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"config.json describes FNetModel \(model_type='fnet'\), which is not supported"):
        fieldguide.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2", "swin"])
def test_complete_fit_from_a_backbone(kind, tmp_path):
    """The head is new, all else comes from the folder; the run predicts and can be exported to transformers."""
    from fieldguide.automl.fit import fit

    name, shape, _ = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    settled(
        cls(cls.config_class(**{**{k: v for k, v in shape.items() if k != "num_labels"}, "num_channels": 1}))
    ).save_pretrained(tmp_path / "theirs")
    run = fit("digits", weights=str(tmp_path / "theirs"), out=tmp_path / "run", settings={"steps": 60, "batch": 32})
    assert run.model.config.output_type == "label" and run.model.config.num_classes == 10
    assert run.scores["accuracy"] > 0.2
    fieldguide.save(run.model, tmp_path / "labels", "hf")
    assert "ForImageClassification" in (tmp_path / "labels/config.json").read_text()
