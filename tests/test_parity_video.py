"""Networks of video diffusion: published configurations, image to video, other sizes and files, against diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.models.registry import card, create
from test_models import batch, peer_of, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
WAN = {  # as published with Wan 2.1, 14B, for texts
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
COGVIDEOX = {  # as published with CogVideoX-2b
    "_class_name": "CogVideoXTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 30,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
    "use_rotary_positional_embeddings": False,
}
LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
HUNYUAN = {  # as published
    "_class_name": "HunyuanVideoTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
PUBLISHED = {
    "hunyuan-video-13b": HUNYUAN,
    "cogvideox-2b": COGVIDEOX,
    "cogvideox-5b": COGVIDEOX | LARGE,
    "cogvideox-5b-i2v": COGVIDEOX | LARGE | {"in_channels": 32, "use_learned_positional_embeddings": True},
    "wan2.1-t2v-14b": WAN,
    "wan2.1-t2v-1.3b": WAN | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
    "wan2.1-i2v-14b": WAN | {"added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36},
    "wan2.2-i2v-a14b": WAN | {"in_channels": 36},
}
CLASSES = {
    "wan": "WanTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "hunyuan-video": "HunyuanVideoTransformer3DModel",
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_and_names(size):
    from tv import diffusers

    config = PUBLISHED[size]
    found, _, table = identify_config(config)
    assert found is card(size)
    assert found.config(**to_config_fields(found, table, config, "config.json")) == found.resolve_config(size)
    with torch.device("meta"):
        peer, model = getattr(diffusers, CLASSES[found.name]).from_config(config), create(size)
    assert sum(p.numel() for p in peer.parameters()) == found.sizes[size].params
    renamed = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        (WAN, {"patch_size": [2, 2, 2]}, "patch_size"),
        (WAN, {"qk_norm": "rms_norm"}, "qk_norm"),
        (WAN, {"added_kv_proj_dim": 5120}, "added_kv_proj_dim"),
        (WAN, {"pos_embed_seq_len": 514}, "pos_embed_seq_len"),
        (COGVIDEOX, {"patch_size_t": 2}, "patch_size_t"),
        (COGVIDEOX, {"patch_bias": False}, "patch_bias"),
        (HUNYUAN, {"image_condition_type": "token_replace"}, "image_condition_type"),
        (HUNYUAN, {"mlp_ratio": 2.0}, "mlp_ratio"),
        (COGVIDEOX, {"ofs_embed_dim": 512}, "ofs_embed_dim"),
    ],
)
def test_other_networks_are_rejected(config, wrong, words):
    found, _, table = identify_config(config)
    with pytest.raises(WeightsError, match=words):
        to_config_fields(found, table, config | wrong, "config.json")


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("sides", [(1, 8, 8), (2, 4, 12), (4, 10, 6)])
def test_other_sizes(name, sides):
    ours, (_, time, *texts) = tiny(name), batch(name, 3)
    frames, *sides = sides
    latent = torch.randn(3, frames, ours.config.channels, *sides, dtype=torch.float64)
    got = ours(latent, time, *texts)
    torch.testing.assert_close(got, peer_of(ours, name)(latent, time, *texts), **CLOSE)
    with slice_attention(4):
        torch.testing.assert_close(ours(latent, time, *texts), got, **CLOSE)
    with pytest.raises(DataError, match="must be multiples of 2"):
        ours(latent[..., 1:], time, *texts)


@torch.no_grad()
def test_wan_continues_images():
    """diffusers takes the last 512 states for those of the text."""
    ours, (_, time, _) = tiny("wan", extra=3, image_dim=6), batch("wan", 2)
    peer = peer_of(ours, "wan")
    latent, text, states = (torch.randn(2, *size, dtype=torch.float64) for size in ((3, 5, 4, 6), (512, 10), (7, 6)))
    got = ours(latent, time, text, states)
    assert got.shape == (2, 3, 2, 4, 6)
    torch.testing.assert_close(got, peer(latent, time, text, states), **CLOSE)
    without = ours(latent, time, text)
    assert not torch.allclose(got, without)
    # Wan 2.2 has the channels alone.
    later = tiny("wan", extra=3)
    torch.testing.assert_close(later(latent, time, text), peer_of(later, "wan")(latent, time, text), **CLOSE)
    with pytest.raises(DataError, match="image_dim is 0"):
        later(latent, time, text, states)


@torch.no_grad()
def test_wan_attends_to_padding():
    """As in training, whose texts are padded with zeros to 512 tokens."""
    ours, (latent, time, text) = tiny("wan"), batch("wan", 2)
    padded = nn.functional.pad(text, (0, 0, 0, 4))
    got = ours(latent, time, padded)
    torch.testing.assert_close(got, peer_of(ours, "wan")(latent, time, padded), **CLOSE)
    assert not torch.allclose(got, ours(latent, time, text))


@torch.no_grad()
@pytest.mark.parametrize("sides", [(4, 6), (6, 4), (4, 16), (8, 8), (2, 2)])
def test_rotations_of_cogvideox(sides):
    """They are those of the sizes of training, stretched and moved to the middle."""
    ours, (_, time, text) = tiny("cogvideox", rotary=True, extra=1), batch("cogvideox", 3)
    latent = torch.randn(3, 4, 3, *sides, dtype=torch.float64)
    got = ours(latent, time, text)
    torch.testing.assert_close(got, peer_of(ours, "cogvideox")(latent, time, text), **CLOSE)
    assert got.shape == (3, 4, 2, *sides)


@torch.no_grad()
def test_stored_positions_of_cogvideox():
    """Of texts and patches; for other numbers of frames, diffusers adds sines and cosines in their place."""
    ours, (latent, time, text) = tiny("cogvideox", learned=True, rotary=True), batch("cogvideox", 2)
    peer = peer_of(ours, "cogvideox")
    ours.places.normal_()
    peer.peer.patch_embed.pos_embedding = ours.places[None].clone()
    for x in (latent, latent[:, :1]):
        torch.testing.assert_close(ours(x, time, text), peer(x, time, text), **CLOSE)
    with pytest.raises(DataError, match="must be padded to length=5"):
        ours(latent, time, text[:, :3])


def test_texts_of_cogvideox_have_any_length():
    """diffusers adds positions for `max_text_seq_length` tokens, whatever the text has."""
    ours, (latent, time, text) = tiny("cogvideox"), batch("cogvideox", 2)
    with pytest.raises(RuntimeError, match="must match the size"):
        peer_of(ours, "cogvideox")(latent, time, text[:, :3])
    same = create("cogvideox-test", length=3).double().eval()
    same.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(latent, time, text[:, :3]), peer_of(same, "cogvideox")(latent, time, text[:, :3]), **CLOSE)


@torch.no_grad()
def test_texts_of_hunyuan_video():
    """Padding is as if it were not there, also in the mean of the states."""
    ours, (latent, time, text, pooled) = tiny("hunyuan-video"), batch("hunyuan-video", 3)
    lengths = (5, 2, 3)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = ours(latent, time, text, pooled, mask)
    torch.testing.assert_close(found, peer_of(ours, "hunyuan-video")(latent, time, text, pooled, mask), **CLOSE)
    for i, length in enumerate(lengths):
        alone = ours(*(x[i : i + 1] for x in (latent, time, text[:, :length], pooled)))
        torch.testing.assert_close(found[i : i + 1], alone, **CLOSE)
    assert not torch.allclose(found, ours(latent, time, text, pooled))


@torch.no_grad()
def test_guidance_of_hunyuan_video():
    ours, inputs = tiny("hunyuan-video"), batch("hunyuan-video", 3)
    scale = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    got = ours(*inputs, guidance=scale)
    torch.testing.assert_close(got, peer_of(ours, "hunyuan-video")(*inputs, guidance=scale), **CLOSE)
    torch.testing.assert_close(ours(*inputs), ours(*inputs, guidance=torch.full((3,), 6.0)))
    assert not torch.allclose(got, ours(*inputs))
    for changes in ({"guidance": False}, {"rope_theta": 1e4}):
        other = tiny("hunyuan-video", **changes)
        torch.testing.assert_close(other(*inputs), peer_of(other, "hunyuan-video")(*inputs), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_diffusers_folders(tmp_path, name):
    from tv import diffusers

    ours, inputs = tiny(name, torch.float32), batch(name, 2, torch.float32)
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    peer = getattr(diffusers, CLASSES[name]).from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs")
    state = peer.state_dict()
    for folder in ("ours", "theirs"):
        torch.testing.assert_close(checkpoints.load(tmp_path / folder)(*inputs), ours(*inputs))
    back = weights.read(tmp_path / "ours")
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_untrained_networks_predict_zero(name):
    assert not create(f"{name}-test")(*batch(name, 2, torch.float32)).any()


def test_invalid_sizes_are_rejected():
    for name, wrong, words in (
        ("wan", {"heads": 3}, "heads=3"),
        ("hunyuan-video", {"axes": (2, 2, 2)}, "whose sum is dim / heads"),
        ("cogvideox", {"heads": 3}, "heads=3"),
        ("cogvideox", {"heads": 4, "rotary": True}, "16 times heads"),
    ):
        with pytest.raises(SettingsError, match=words):
            create(f"{name}-test", **wrong)


@torch.no_grad()
def test_names_and_given_frames_of_open_sora():
    with torch.device("meta"):
        model = create("open-sora-2")
    names = translate(model.state_dict(), get_tables(model)["official"], reverse=True)
    assert sum(x.numel() for x in names.values()) == card("open-sora-2").sizes["open-sora-2"].params == 11_891_390_528
    shapes = {
        "cond_in.weight": (3072, 68),
        "single_blocks.37.v_mlp.weight": (5 * 3072, 3072),
        "double_blocks.18.txt_attn.norm.key_norm.scale": (128,),
        "final_layer.linear.weight": (64, 3072),
    }
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    ours, (latent, *rest) = tiny("open-sora"), batch("open-sora", 2)
    other = latent.clone()
    other[:, :, 2:] = 0
    assert not torch.allclose(ours(latent, *rest), ours(other, *rest))
    assert not create("open-sora-test").double()(latent, *rest).any()
    with pytest.raises(DataError, match="have 2 channels, but the network takes 5"):
        ours(latent[:, :, :2], *rest)
    with pytest.raises(SettingsError, match="whose sum is dim / heads"):
        create("open-sora-test", axes=(2, 2, 2))
