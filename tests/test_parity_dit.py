"""DiT: parameter counts, files of the authors and of diffusers, what diffusers computes differently, and learned images."""

from __future__ import annotations

import json

import pytest
import torch

import latents
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion.dit import CARD, OFFICIAL, diffusers_keys
from fieldguide.models.registry import card, create
from test_models import batch, tiny

PUBLISHED = {  # as stored in facebook/DiT-XL-2-256, before diffusers had a class for DiT
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


@pytest.mark.parametrize(
    ("size", "total"),
    [("dit-xl2", 675_129_632), ("dit-l2", 458_102_816), ("dit-b2", 130_512_416), ("dit-s2", 32_963_360)],
)
def test_counts_of_the_authors_include_fixed_positions(size, total):
    with torch.device("meta"):
        model = create(size)
    assert sum(p.numel() for p in model.parameters()) + model.places.numel() == total
    shapes = {name: tuple(x.shape) for name, x in translate(model.state_dict(), OFFICIAL, reverse=True).items()}
    depth, dim = model.config.depth, model.config.dim
    assert shapes["y_embedder.embedding_table.weight"] == (1001, dim) and shapes["final_layer.linear.weight"] == (32, dim)
    assert shapes["blocks.0.adaLN_modulation.1.weight"] == (6 * dim, dim) and len(shapes) == depth * 10 + 2 + 4 + 1 + 2 + 2


def test_diffusers_repeats_the_embeddings_in_all_blocks():
    """That explains why its class has 74.7 M parameters more."""
    with torch.device("meta"):
        model = create("dit-xl2")
        peer = latents.build(model)
    theirs = {name: x.shape for name, x in peer.state_dict().items()}
    ours = translate(model.state_dict(), diffusers_keys(model.config), reverse=True)
    assert {name: x.shape for name, x in ours.items()} == theirs
    assert sum(p.numel() for p in peer.parameters()) == 749_826_464
    repeated = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("time", "label")))
    assert sum(p.numel() for p in model.parameters()) + 27 * repeated == 749_826_464


@torch.no_grad()
def test_diffusers_differs_from_the_authors_in_the_time_and_a_norm():
    model, (image, time, label) = tiny("dit"), batch("dit", 4)
    peer, rename = latents.dit(model)
    peer = peer.double().eval()
    peer.load_state_dict(rename(model.state_dict()))
    emb = peer.peer.transformer_blocks[0].norm1.emb
    want = model(image, time, label)
    torch.testing.assert_close(peer(image, time, label), want, rtol=1e-9, atol=1e-11)
    emb.time_proj.downscale_freq_shift = 1  # as in diffusers
    assert (peer(image, time, label) - want).abs().max() > 1e-3
    emb.time_proj.downscale_freq_shift = 0
    peer.peer.transformer_blocks[0].norm3.eps = 1e-5  # as in the published configuration
    assert 1e-9 < (peer(image, time, label) - want).abs().max() < 1e-3


@torch.no_grad()
def test_variances_are_the_second_half_of_the_channels():
    model, (image, time, label) = tiny("dit"), batch("dit", 4)
    peer, rename = latents.dit(model)
    peer = peer.double().eval()
    peer.load_state_dict(rename(model.state_dict()))
    want = peer.peer(image, time, (label - 1) % 4).sample
    torch.testing.assert_close(model.predict_all(image, time, label), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model(image, time, label), want[:, :2], rtol=1e-9, atol=1e-11)
    assert tiny("dit", variance=False).predict_all(image, time, label).shape == image.shape


@torch.no_grad()
def test_author_files(tmp_path):
    ours = tiny("dit", torch.float32)
    state = translate(ours.state_dict(), OFFICIAL, reverse=True)
    other = create("dit-test")
    assert weights.load(other, state | {"pos_embed": torch.zeros(1, 16, 16)}) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
    back = weights.read(weights.save(ours, tmp_path / "x.safetensors", "official"))
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())
    torch.save({"ema": state, "args": None}, tmp_path / "checkpoint.pt")
    assert weights.load(create("dit-test"), tmp_path / "checkpoint.pt") == []


@torch.no_grad()
def test_diffusers_folders(tmp_path):
    """A folder that we write is read by diffusers, and the other way round, also with the class of old files."""
    from tv import diffusers

    ours = tiny("dit", torch.float32)
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    peer = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert peer.transformer_blocks[1].norm3.eps == 1e-6
    peer.save_pretrained(tmp_path / "theirs")
    image, time, label = batch("dit", 3, torch.float32)
    for kind in ("DiTTransformer2DModel", "Transformer2DModel"):
        path = tmp_path / "theirs" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
        back = checkpoints.load(tmp_path / "theirs")
        assert back.config == ours.config
        torch.testing.assert_close(back(image, time, label), ours(image, time, label))
    state = peer.state_dict()
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(WeightsError, match=r"both mean time1\.bias"):
        weights.load(create("dit-test"), state)


def test_published_configuration():
    found, origin, table = identify_config(PUBLISHED)
    assert found.name == "dit" and origin == "diffusers-2023"
    assert CARD.config(**to_config_fields(found, table, PUBLISHED, "config.json")) == CARD.resolve_config("dit-xl2")
    for wrong, words in (
        ({"out_channels": 6}, "out_channels=6"),
        ({"norm_eps": 0.1}, "norm_eps"),
        ({"attention_bias": False}, "attention_bias"),
    ):
        with pytest.raises(WeightsError, match=words):
            to_config_fields(found, table, PUBLISHED | wrong, "config.json")
    assert identify_config(PUBLISHED | {"norm_type": "ada_norm_single"})[0].name == "pixart"


@torch.no_grad()
def test_missing_label_and_zero_output_before_training():
    model, (image, time, label) = tiny("dit"), batch("dit", 3)
    torch.testing.assert_close(model(image, time), model(image, time, torch.zeros_like(label)))
    answers = [model(image[:1], time[:1], torch.tensor([number])) for number in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    fresh = create("dit-test")
    assert not fresh(image.float(), time.float(), label).any()
    x = torch.randn(2, 16, 16)
    assert all(torch.equal(block(x, torch.randn(2, 16)), x) for block in fresh.blocks)  # "zero": blocks begin as nothing
    plain = create("dit-test", num_classes=0)
    assert plain(image.float(), time.float()).shape == image.shape
    assert card("sit-xl2").resolve_config("sit-xl2") == card("dit-xl2").resolve_config("dit-xl2")


def test_invalid_inputs_are_rejected():
    with pytest.raises(DataError, match="image=8"):
        tiny("dit", torch.float32)(torch.zeros(1, 2, 8, 10), torch.zeros(1))
    for wrong, words in (({"image": 9}, "multiple of patch=2"), ({"dim": 18}, "multiple of 4"), ({"heads": 3}, "heads=3")):
        with pytest.raises(SettingsError, match=words):
            create("dit-test", **wrong)


@pytest.mark.slow  # 90 s
def test_learns_digits(tmp_path):
    """A CNN that is trained on its samples alone classifies real digits (.88)."""
    run = fit(
        "digits",
        task="image-generation",
        model="dit-8",
        out=tmp_path / "run",
        settings={"steps": 250, "batch": 32, "precision": "float32", "evaluate": 250, "ema": 0.98},
    )
    assert run.scores["classifier_accuracy"] > 0.7
