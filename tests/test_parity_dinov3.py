"""DINOv3 against transformers and timm: files in and out, other image sizes, feature maps, published sizes."""

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
from test_parity_vit import CLOSE, logits, random
from tv import timm, transformers

PATCH, DIM, DEPTH, HEADS, HIDDEN = 4, 16, 4, 2, 24
KINDS = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "unbiased": {"query_bias": False, "value_bias": False},
}
SHAPE = {
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": 12,
    "patch_size": PATCH,
    "num_register_tokens": 3,
}
OURS = {"channels": 3, "dim": DIM, "depth": DEPTH, "heads": HEADS, "hidden": HIDDEN, "output_type": "vector"}


def huggingface(kind: str, model: str = "Model", **more) -> nn.Module:
    config = transformers.DINOv3ViTConfig(**{**SHAPE, **KINDS[kind], **more})
    return random(getattr(transformers, f"DINOv3ViT{model}")(config))


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_transformers_folders_round_trip(kind, tmp_path):
    theirs = huggingface(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    assert card_of(ours).name == "dinov3" and ours.config.rescale == 2.0 and ours.config.bias == (kind != "unbiased")
    for size in ((12, 12), (8, 24), (40, 20)):  # positions are relative to the image
        x = torch.randn(2, 3, *size)
        want = theirs(x).pooler_output
        torch.testing.assert_close(ours(x), want, **CLOSE)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    written, own = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == own.keys() and all(torch.equal(tensor, own[key]) for key, tensor in written.items())
    back = transformers.DINOv3ViTModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(x).pooler_output, want)
    assert fieldguide.load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("kind", ["plain", "gated"])
@torch.no_grad()
def test_features_equal_the_backbone_of_transformers(kind):
    theirs = huggingface(kind, "Backbone", out_features=["stage1", "stage2", "stage3", "stage4"])
    ours = create("dinov3-test", **OURS, gated=kind == "gated").eval()
    disk = transformers.core_model_loading.revert_weight_conversion(theirs, theirs.state_dict())
    assert weights.load(ours, disk) == []
    x = torch.randn(2, 3, 12, 20)
    found = ours.features(x)
    assert list(found) == list(ours.levels) == ["b1", "b2", "b3", "b4"]
    for one, level in zip(theirs(x).feature_maps, found.values(), strict=True):
        torch.testing.assert_close(level, one, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_timm_files_round_trip(gated, tmp_path):
    theirs = random(
        timm.models.eva.Eva(
            img_size=12,
            patch_size=PATCH,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=1.5,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
            init_values=1e-5,
            rope_type="dinov3",
            rope_temperature=100,
            rope_rotate_half=True,
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            swiglu_mlp=gated,
            swiglu_align_to=8,
            num_reg_tokens=3,
            use_fc_norm=False,
            norm_layer=lambda dim, **more: nn.LayerNorm(dim, eps=1e-5, **more),
        )
    )
    ours = create("dinov3-test", **OURS, gated=gated).eval()
    assert weights.load(ours, theirs.state_dict()) == []
    assert weights._recognize(ours, theirs.state_dict(), None)[0] == "timm"
    x = torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    back = weights.read(weights.save(ours, tmp_path / "back.safetensors", "timm"))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


@pytest.mark.parametrize("name", [name for name in cards()["dinov3"].sizes if cards()["dinov3"].sizes[name].params])
def test_published_sizes_have_the_names_and_shapes_of_transformers(name):
    with torch.device("meta"):
        ours = create(name)
        c = ours.config
        theirs = transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                hidden_size=c.dim,
                intermediate_size=c.hidden,
                num_hidden_layers=c.depth,
                num_attention_heads=c.heads,
                num_register_tokens=4,
                use_gated_mlp=c.gated,
                query_bias=c.bias,
                value_bias=c.bias,
            )
        )
        disk = transformers.core_model_loading.revert_weight_conversion(theirs, theirs.state_dict())
        named = weights.translate(ours.state_dict(), weights.get_tables(ours)["huggingface"], reverse=True)
    assert {key: x.shape for key, x in named.items()} == {key: x.shape for key, x in disk.items()}
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) + c.dim  # mask token


def test_default_configuration_of_transformers():
    """Its network has no registers."""
    with torch.device("meta"):
        ours = create("dinov3-s16", registers=0)
        theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig())
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts == [21_595_008, 21_595_008 - 384]


@torch.no_grad()
def test_coordinates_are_scaled_in_training_only(monkeypatch):
    """By one factor for rows and columns, as in transformers."""
    ours = random(create("dinov3-test", **OURS, rescale=2.0)).eval()
    like = torch.zeros(1)
    plain = [ours.rotations((3, 5), like) for _ in range(2)]
    assert torch.equal(*(cos for cos, _ in plain)) and plain[0][0].shape == (1 + 3 + 15, DIM // HEADS)
    assert torch.equal(plain[0][0][:4], torch.ones(4, 8)) and not plain[0][1][:4].any()
    theirs = huggingface("plain").rope_embeddings.train()
    ours.train()
    for seed in range(3):
        torch.manual_seed(seed)
        cos, sin = ours.rotations((3, 5), like)
        torch.manual_seed(seed)
        want = theirs(torch.zeros(1, 3, 3 * PATCH, 5 * PATCH))
        torch.testing.assert_close(cos[4:], want[0])
        torch.testing.assert_close(sin[4:].abs(), want[1].abs())
        assert not torch.allclose(cos, plain[0][0])


@torch.no_grad()
def test_head_can_be_added(tmp_path):
    huggingface("plain").save_pretrained(tmp_path)
    ours = fieldguide.load(tmp_path, output_type="label", num_classes=5, head="skip")
    x = torch.randn(2, 3, 12, 12)
    pooled = torch.cat([fieldguide.load(tmp_path)(x), ours.features(x)["b4"].mean((2, 3))], 1)
    torch.testing.assert_close(logits(ours, x), ours.head(pooled), **CLOSE)
    with pytest.raises(WeightsError, match=r"output_type=.label. cannot be exported.*only output_type=.vector."):
        fieldguide.save(ours, tmp_path / "labels", "hf")  # transformers has no classifier


def test_invalid_settings_are_rejected(tmp_path):
    with pytest.raises(SettingsError, match=r"dim=20 must be divisible by 4\*heads=8"):
        create("dinov3-test", dim=20)
    with pytest.raises(SettingsError, match=r"rescale=0.5"):
        create("dinov3-test", rescale=0.5)
    huggingface("plain").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pos_embed_shift": 0.1}))
    with pytest.raises(WeightsError, match="pos_embed_shift"):
        fieldguide.load(tmp_path)
