"""KL autoencoder: published files, its latents, tiles and sliced attention, against diffusers."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import latents
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, WeightsError
from fieldguide.models.diffusion._shared.single_file import split_single_file
from fieldguide.models.diffusion.autoencoder_kl import CARD, LOGVAR_RANGE, compvis_keys
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.models.registry import create
from test_models import batch, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SD = {  # as published with Stable Diffusion 1.5
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL = SD | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SD3 = SDXL | {
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLUX = SD3 | {"mid_block_add_attention": True, "scaling_factor": 0.3611, "shift_factor": 0.1159}
PUBLISHED = {"sd-vae": SD, "sdxl-vae": SDXL, "sd3-vae": SD3, "flux-vae": FLUX}


def peer_of(model: nn.Module) -> nn.Module:
    """Return diffusers' network with our weights."""
    peer = latents.build(model).to(next(model.parameters()).dtype).eval()
    peer.load_state_dict(translate(model.state_dict(), CARD.weights["diffusers"], reverse=True))
    return peer


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size):
    from tv import diffusers

    found, origin, table = identify_config(PUBLISHED[size])
    assert (found.name, origin) == ("autoencoder-kl", "diffusers")
    config = found.config(**to_config_fields(found, table, PUBLISHED[size], "config.json"))
    assert config == CARD.resolve_config(size)
    with torch.device("meta"):
        peer, ours = diffusers.AutoencoderKL.from_config(PUBLISHED[size]), create(size)
    assert sum(p.numel() for p in peer.parameters()) == CARD.sizes[size].params
    renamed = translate(ours.state_dict(), CARD.weights["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}
    names = translate(ours.state_dict(), compvis_keys(config), reverse=True)
    assert names["encoder.down.0.block.0.norm1.weight"].shape == (128,) == names["decoder.up.0.block.2.norm1.weight"].shape
    assert names["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)


def test_other_networks_are_rejected():
    found, _, table = identify_config(SD)
    for wrong, words in (
        ({"use_quant_conv": False}, "use_post_quant_conv"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"block_out_channels": [128, 200, 512, 512]}, "200 is not a multiple of 128"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
    ):
        with pytest.raises(WeightsError, match=words):
            to_config_fields(found, table, SD | wrong, "config.json")


@torch.no_grad()
@pytest.mark.parametrize("quant", [True, False])
def test_means_and_variances(quant):
    ours = tiny("autoencoder-kl", quant=quant)
    peer = peer_of(ours)
    (image,) = batch("autoencoder-kl", 3)
    mean, logvar = ours.encode(image)
    theirs = peer.encode(image).latent_dist
    torch.testing.assert_close(mean, theirs.mean, **EXACT)
    torch.testing.assert_close(logvar, theirs.logvar, **EXACT)
    z = torch.randn_like(mean)
    torch.testing.assert_close(ours.decode(z), peer.decode(z).sample, **EXACT)
    high = ours.encode(100_000 * torch.randn_like(image))[1]
    with torch.no_grad():
        for part in ours.encoder.conv_out, ours.quant:
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(1000)
    low, high = LOGVAR_RANGE
    assert (ours.encode(image)[1].min(), ours.encode(image)[1].max()) == (low, high)


def test_normalized_latents():
    """As pipelines of diffusers compute them: (z - shift) * scaling, and back."""
    with torch.device("meta"):
        model = create("flux-vae")
    z = torch.tensor([0.1159, 0.1159 + 1 / 0.3611], dtype=torch.float64)
    torch.testing.assert_close(model.normalize(z), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)


@torch.no_grad()
def test_tiles_equal_those_of_diffusers():
    ours = tiny("autoencoder-kl", image=32)
    peer = peer_of(ours)
    peer.enable_tiling()
    peer.tile_sample_min_size, peer.tile_latent_min_size = 32, 32 // ours.stride
    for height, width in ((2, 3), (20, 8), (21, 27), (8, 8), (9, 8)):
        z = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(ours.decode(z, tile=8), peer.decode(z).sample, **EXACT)
    image = torch.randn(2, 2, 80, 48, dtype=torch.float64)
    torch.testing.assert_close(ours.encode(image, tile=32)[0], peer.encode(image).latent_dist.mean, **EXACT)
    assert torch.equal(ours.decode(z, tile=0), ours.decode(z)) and not torch.allclose(ours.decode(z, tile=8), ours.decode(z))


@torch.no_grad()
def test_tiles_of_a_local_network_equal_the_whole():
    """Without norms of groups and attention over the whole image, tiles differ only near the ends of a tile."""
    ours = tiny("autoencoder-kl")
    for module in ours.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: 0.3 * x
    ours.decoder.mid.attn.forward = lambda x: x
    z = torch.randn(1, 3, 60, 40, dtype=torch.float64)
    whole, tiled = ours.decode(z), ours.decode(z, tile=32)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled[..., :60, :60], whole[..., :60, :60], **EXACT)  # 17 latents before the end of the first
    assert 0 < (whole - tiled).std() < 0.05 * whole.std()


@torch.no_grad()
def test_sliced_attention_changes_nothing():
    ours, (image,) = tiny("autoencoder-kl"), batch("autoencoder-kl", 3)
    want = ours(image)
    with slice_attention(3):
        torch.testing.assert_close(ours(image), want, **EXACT)


@torch.no_grad()
def test_forward_pads_what_encode_rejects():
    ours = tiny("autoencoder-kl")
    image = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    assert ours(image).shape == image.shape
    with pytest.raises(DataError, match="multiples of 4"):
        ours.encode(image)
    padded = nn.functional.pad(image, (0, 1, 0, 3), mode="replicate")
    torch.testing.assert_close(ours(image), ours.decode(ours.encode(padded)[0])[:, :, :9, :11])


@torch.no_grad()
def test_files_of_diffusers_and_of_compvis(tmp_path):
    """Those of CompVis against diffusers' conversion."""
    from tv import diffusers

    convert = importlib.import_module(f"{diffusers.__name__}.loaders.single_file_utils").convert_ldm_vae_checkpoint
    ours = tiny("autoencoder-kl", torch.float32)
    state = peer_of(ours).state_dict()
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): x
        for key, x in state.items()
    }
    compvis = translate(ours.state_dict(), compvis_keys(ours.config), reverse=True)
    assert compvis["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    converted = convert(dict(compvis), {"down_block_types": [""] * 3, "up_block_types": [""] * 3})
    assert converted.keys() == state.keys() and all(torch.equal(converted[key], x) for key, x in state.items())
    whole = {f"first_stage_model.{name}": x for name, x in compvis.items()}
    whole |= {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(4),
    }
    parts = split_single_file(whole)
    assert {part: len(x) for part, x in parts.items()} == {"denoiser": 1, "vae": len(compvis), "text": 1}
    assert split_single_file(compvis) == {}
    for form, origin in ((state, "diffusers"), (old, "diffusers-2022"), (parts["vae"], "compvis")):
        other = create("autoencoder-kl-test")
        assert weights.load(other, form) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
        back = weights.read(weights.save(ours, tmp_path / f"{origin}.safetensors", origin))
        assert back.keys() == form.keys() and all(torch.equal(back[key], x) for key, x in form.items())
    checkpoints.save(ours, tmp_path / "folder", "diffusers")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder").eval()
    (image,) = batch("autoencoder-kl", 2, torch.float32)
    torch.testing.assert_close(again(image).sample, ours(image), rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "theirs")
    assert checkpoints.load(tmp_path / "theirs").config == ours.config


@pytest.mark.slow
def test_learns_to_rebuild_figures():
    """Smooth images come back from 32 numbers instead of 784."""
    torch.manual_seed(0)
    model = create("kl-f4-28", image=28)
    place = torch.linspace(-1, 1, 28)
    center = torch.rand(64, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    distance = (place[:, None] - center[:, :1, None]) ** 2 + (place - center[:, 1:, None]) ** 2  # B S S
    image = (torch.exp(-8 * distance) * 2 - 1)[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        mean, logvar = model.encode(image[:32])
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        loss = ((model.decode(z) - image[:32]) ** 2).mean() + 1e-4 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = ((model(image[32:]) - image[32:]) ** 2).mean() / image[32:].var()
    assert error < 0.1
