"""Wan's video autoencoder: the published file, parts equal to the whole, causality and latents, against diffusers."""

from __future__ import annotations

import pytest
import torch

import latents
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion.wan_vae import CARD, MEAN, STD
from fieldguide.models.registry import create
from test_models import batch, tiny
from test_parity_video import CLOSE, peer_of

WAN = {  # as published with Wan 2.1
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(MEAN),
    "latents_std": list(STD),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


def test_published_configuration_and_names():
    from tv import diffusers

    found, _, table = identify_config(WAN)
    assert found is CARD
    assert found.config(**to_config_fields(found, table, WAN, "config.json")) == found.resolve_config("wan2.1-vae")
    with torch.device("meta"):
        peer, model = diffusers.AutoencoderKLWan.from_config(WAN), create("wan2.1-vae")
        default = diffusers.AutoencoderKLWan()
    assert tuple(default.config.latents_mean) == MEAN and tuple(default.config.latents_std) == STD
    assert sum(p.numel() for p in peer.parameters()) == CARD.sizes["wan2.1-vae"].params
    renamed = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}


@pytest.mark.parametrize(
    "wrong", [{"is_residual": True}, {"patch_size": 2}, {"decoder_base_dim": 256}, {"attn_scales": [0.5]}, {"out_channels": 12}]
)
def test_other_networks_are_rejected(wrong):
    found, _, table = identify_config(WAN)
    with pytest.raises(WeightsError, match=next(iter(wrong))):
        to_config_fields(found, table, WAN | wrong, "config.json")


@torch.no_grad()
@pytest.mark.parametrize("temporal", [(True, True), (False, True), (True, False), (False, False)])
def test_parts_equal_the_whole(temporal):
    ours = tiny("wan-vae", temporal=temporal)
    (video,) = batch("wan-vae", 2)
    video = torch.cat([video, video.flip(1)], 1)[:, :17]
    mean, logvar = ours.encode(video)
    assert mean.shape == (2, 1 + 16 // ours.frame_stride, 3, 2, 3) and ours.frame_stride == 2 ** sum(temporal)
    decoded = ours.decode(mean)
    assert decoded.shape == video.shape
    for part in (1, 2, 3, 100):
        for got, want in zip(ours.encode(video, part), (mean, logvar)):
            torch.testing.assert_close(got, want, **CLOSE)
        torch.testing.assert_close(ours.decode(mean, part), decoded, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_other_lengths(frames):
    ours = tiny("wan-vae")
    peer = peer_of(ours, "wan-vae").peer
    video = torch.randn(2, frames, 2, 8, 16, dtype=torch.float64)
    with latents.keep_float64():
        their = peer.encode(video.transpose(1, 2)).latent_dist
        for got, want in zip(ours.encode(video), (their.mean, their.logvar)):
            torch.testing.assert_close(got, want.transpose(1, 2), **CLOSE)
        decoded = ours.decode(ours.encode(video)[0])
        assert decoded.abs().max() > 1  # which diffusers cuts off
        torch.testing.assert_close(decoded.clamp(-1, 1), peer.decode(their.mean).sample.transpose(1, 2), **CLOSE)


@torch.no_grad()
def test_later_frames_are_never_read():
    ours, (video,) = tiny("wan-vae"), batch("wan-vae", 2)
    changed = torch.cat([video[:, :5], 1 - video[:, 5:]], 1)
    (before, _), (after, _) = ours.encode(video), ours.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.allclose(before[:, 2], after[:, 2])
    before, after = ours.decode(before), ours.decode(after)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


@torch.no_grad()
def test_sides_and_lengths():
    ours = tiny("wan-vae")
    for shape in ((8, 2, 8, 8), (9, 2, 6, 8), (9, 2, 8, 10)):
        video = torch.randn(2, *shape, dtype=torch.float64)
        with pytest.raises(DataError, match="multiples of 4, its frames one more than a multiple of 4"):
            ours.encode(video)
        assert ours(video).shape == video.shape
    with pytest.raises(SettingsError, match="one value more"):
        create("wan-vae-test", temporal=(True,))


@torch.no_grad()
def test_latents_are_normalized_by_channel():
    ours = tiny("wan-vae")
    z = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    mean, std = torch.tensor([0.5, -0.2, 0.1]), torch.tensor([2.0, 1.5, 0.5])
    for i in range(3):
        torch.testing.assert_close(ours.normalize(z)[:, :, i], (z[:, :, i] - mean[i]) / std[i])
    torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z)


@torch.no_grad()
def test_diffusers_folders(tmp_path):
    from tv import diffusers

    ours, (video,) = tiny("wan-vae", torch.float32), batch("wan-vae", 2, torch.float32)
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    peer = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs")
    state = peer.state_dict()
    for folder in ("ours", "theirs"):
        loaded = checkpoints.load(tmp_path / folder)
        assert (loaded.config.mean, loaded.config.temporal) == (ours.config.mean, ours.config.temporal)
        torch.testing.assert_close(loaded(video), ours(video))
    back = weights.read(tmp_path / "ours")
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())
