"""The video autoencoders of CogVideoX and HunyuanVideo: published files, lengths, parts and latents, against diffusers."""

from __future__ import annotations

import pytest
import torch

import latents
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.registry import card, create
from test_models import batch, tiny
from test_parity_video import CLOSE, peer_of

COGVIDEOX = {  # as published with CogVideoX-2b
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
HUNYUAN = {  # as published
    "_class_name": "AutoencoderKLHunyuanVideo",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}
PUBLISHED = {
    "cogvideox-2b-vae": COGVIDEOX,
    "cogvideox-5b-vae": COGVIDEOX | {"scaling_factor": 0.7},
    "hunyuan-video-13b-vae": HUNYUAN,
}
NAMES = "cogvideox-vae", "hunyuan-video-vae"


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_and_names(size):
    from tv import diffusers

    config = PUBLISHED[size]
    found, _, table = identify_config(config)
    assert found is card(size)
    assert found.config(**to_config_fields(found, table, config, "config.json")) == found.resolve_config(size)
    with torch.device("meta"):
        peer, model = getattr(diffusers, config["_class_name"]).from_config(config), create(size)
    assert sum(p.numel() for p in peer.parameters()) == found.sizes[size].params
    renamed = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (COGVIDEOX, {"use_quant_conv": True}),
        (COGVIDEOX, {"invert_scale_latents": True}),
        (COGVIDEOX, {"temporal_compression_ratio": 8}),
        (COGVIDEOX, {"block_out_channels": [128, 192, 256, 512]}),
        (HUNYUAN, {"mid_block_add_attention": False}),
        (HUNYUAN, {"spatial_compression_ratio": 16}),
    ],
)
def test_other_networks_are_rejected(config, wrong):
    found, _, table = identify_config(config)
    with pytest.raises(WeightsError, match=next(iter(wrong))):
        to_config_fields(found, table, config | wrong, "config.json")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "frames"), [("cogvideox-vae", 1), ("cogvideox-vae", 25), *[(NAMES[1], n) for n in (1, 5, 17, 21, 25, 33)]]
)
def test_lengths(name, frames):
    """Compare what is computed at once, in several parts, or in parts that overlap."""
    ours = tiny(name, groups=2)
    peer = peer_of(ours, name).peer
    video = torch.randn(2, frames, 2, 8, 16, dtype=torch.float64)
    their = peer.encode(video.transpose(1, 2)).latent_dist
    mean, logvar = ours.encode(video)
    assert mean.shape == (2, 1 + (frames - 1) // ours.frame_stride, 3, 2, 4)
    for got, want in ((mean, their.mean), (logvar, their.logvar)):
        torch.testing.assert_close(got, want.transpose(1, 2), **CLOSE)
    decoded = ours.decode(mean)
    assert decoded.shape == video.shape
    torch.testing.assert_close(decoded, peer.decode(their.mean).sample.transpose(1, 2), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_four_levels(name):
    """The number of frames changes in two of three places."""
    ours = tiny(name, growth=(1, 2, 2, 2))
    peer, video = peer_of(ours, name).peer, torch.randn(1, 9, 2, 8, 16, dtype=torch.float64)
    their = peer.encode(video.transpose(1, 2)).latent_dist.mean
    torch.testing.assert_close(ours.encode(video)[0], their.transpose(1, 2), **CLOSE)
    torch.testing.assert_close(ours(video), peer.decode(their).sample.transpose(1, 2), **CLOSE)


@torch.no_grad()
def test_cogvideox_decodes_an_even_number_of_latents():
    ours = tiny("cogvideox-vae")
    peer, z = peer_of(ours, "cogvideox-vae").peer, torch.randn(1, 4, 3, 2, 3, dtype=torch.float64)
    decoded = ours.decode(z)
    assert decoded.shape[1] == 16
    torch.testing.assert_close(decoded, peer.decode(z.transpose(1, 2)).sample.transpose(1, 2), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_later_parts_are_never_read(name):
    """Norms look at all frames of a part, so that only those of earlier parts cannot change."""
    ours, (video,) = tiny(name), batch(name, 1)
    video = torch.cat([video, video[:, 1:]], 1)  # 17 frames: a part of 9, and one of 8
    changed = torch.cat([video[:, :9], 1 - video[:, 9:]], 1)
    encode = (lambda x: ours.encode(x)[0]) if name == NAMES[0] else (lambda x: ours.encode(x, 2)[0])
    before, after = encode(video), encode(changed)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3], after[:, 3])


@torch.no_grad()
def test_attention_is_causal():
    ours, x = tiny("hunyuan-video-vae").encoder.mid.attn, torch.randn(1, 16, 3, 2, 2, dtype=torch.float64)
    ours.norm = torch.nn.Identity()
    changed = torch.cat([x[:, :, :2], -x[:, :, 2:]], 2)
    before, after = ours(x), ours(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.allclose(before[:, :, 2], after[:, :, 2])


@torch.no_grad()
@pytest.mark.parametrize(("name", "unit"), [(NAMES[0], 8), (NAMES[1], 4)])
def test_sides_and_lengths(name, unit):
    ours = tiny(name)
    for shape in ((8, 2, 8, 8), (9, 2, 6, 8), (9, 2, 8, 10)):
        video = torch.randn(2, *shape, dtype=torch.float64)
        with pytest.raises(DataError, match=f"multiples of 4, its frames one more than a multiple of {unit}"):
            ours.encode(video)
        assert ours(video).shape == video.shape
    with pytest.raises(SettingsError, match="at least 3 values"):
        create(f"{name}-test", growth=(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_latents_are_normalized(name):
    ours, z = tiny(name, scaling=0.25), torch.randn(1, 3, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.normalize(z), z / 4)
    torch.testing.assert_close(ours.denormalize(z / 4), z)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_folders(name, tmp_path):
    from tv import diffusers

    ours, (video,) = tiny(name, torch.float32), batch(name, 2, torch.float32)
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    kind = getattr(diffusers, latents.public_config(ours)["_class_name"])
    peer = kind.from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs")
    state = peer.state_dict()
    for folder in ("ours", "theirs"):
        loaded = checkpoints.load(tmp_path / folder)
        assert (loaded.config.growth, loaded.config.latent) == (ours.config.growth, ours.config.latent)
        torch.testing.assert_close(loaded(video), ours(video))
    back = weights.read(tmp_path / "ours")
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())
