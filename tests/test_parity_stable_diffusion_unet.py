"""U-Nets of Stable Diffusion and SDXL: published configurations and names, guidance, masks and sizes, against diffusers."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import latents
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.models.registry import card, create
from test_models import batch, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
SD1 = {  # as published, with diffusers 0.6
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,  # which means eight heads
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": DOWN,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": UP,
}
SD2 = SD1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = SD2 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
PUBLISHED = {
    "sd1-unet": SD1,
    "sd1-inpainting-unet": SD1 | {"in_channels": 9},
    "sd2-unet": SD2,
    "sd2-base-unet": SD2 | {"sample_size": 64, "upcast_attention": False},
    "lcm-sd1-unet": SD1 | {"sample_size": 96, "time_cond_proj_dim": 256},
    "sdxl-base-unet": SDXL,
    "lcm-sdxl-unet": SDXL | {"time_cond_proj_dim": 256},
    "sdxl-refiner-unet": REFINER,
}


def peer_of(model: nn.Module) -> nn.Module:
    """Return diffusers' network with our weights."""
    peer = latents.build(model).to(next(model.parameters()).dtype).eval()
    peer.load_state_dict(translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True))
    return peer


def convert(state, config):
    """Return CompVis' names as diffusers' by diffusers' own conversion."""
    from tv import diffusers

    module = importlib.import_module(f"{diffusers.__name__}.loaders.single_file_utils")
    return module.convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": x for k, x in state.items()}, config)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_and_names(size):
    from tv import diffusers

    found, origin, table = identify_config(PUBLISHED[size])
    assert found is card(size) and origin == "diffusers"
    config = found.config(**to_config_fields(found, table, PUBLISHED[size], "config.json"))
    assert config == found.resolve_config(size)
    with torch.device("meta"):
        peer, ours = diffusers.UNet2DConditionModel.from_config(PUBLISHED[size]), create(size)
    count = sum(p.numel() for p in peer.parameters())
    assert found.sizes[size].params in (count, None) and count == sum(p.numel() for p in ours.parameters())
    theirs = {name: x.shape for name, x in peer.state_dict().items()}
    renamed = translate(ours.state_dict(), get_tables(ours)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == theirs
    single = translate(ours.state_dict(), get_tables(ours)["compvis"], reverse=True)
    assert single["input_blocks.1.0.in_layers.0.weight"].shape == (config.dim,)
    resized = {"sd1-unet": {"2.1", "5.2", "8.2"}, "sdxl-base-unet": {"2.2", "5.2"}}  # as in the published files
    if size in resized:
        found = {
            name.removeprefix("output_blocks.")[:3] for name in single if name.endswith("conv.weight") and "blocks" in name
        }
        assert found == resized[size]
    back = convert(single, PUBLISHED[size])
    assert {name: x.shape for name, x in back.items()} == {k: x for k, x in theirs.items() if ".cond_proj." not in k}
    heads = [m.heads for name, m in peer.named_modules() if name.endswith("attn1")]
    assert heads == [m.heads for name, m in sorted_modules(ours) if name.endswith("attn1")]


def sorted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return modules in the order of diffusers: down, up, middle."""
    order = {"down": 0, "up": 1, "mid": 2}
    return sorted(model.named_modules(), key=lambda pair: order.get(pair[0].partition(".")[0], 3))


def test_other_networks_are_rejected():
    found, _, table = identify_config(SD1)
    for wrong, words in (
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "SimpleCrossAttnDownBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [320, 500, 1280, 1280]}, "500 is not a multiple of 320"),
        ({"up_block_types": UP[::-1]}, "up_block_types"),
    ):
        with pytest.raises(WeightsError, match=words):
            to_config_fields(found, table, SD1 | wrong, "config.json")
    found, _, table = identify_config(SDXL)
    with pytest.raises(WeightsError, match="projection_class_embeddings_input_dim=1536"):
        to_config_fields(found, table, SDXL | {"projection_class_embeddings_input_dim": 1536}, "config.json")
    for wrong, words in (({"heads": (3, 4)}, "heads=3"), ({"layers": (1,)}, "as many numbers as levels")):
        with pytest.raises(SettingsError, match=words):
            create("stable-diffusion-unet-test", **wrong)


@torch.no_grad()
@pytest.mark.parametrize("name", ["stable-diffusion-unet", "sdxl-unet"])
def test_guidance_mask_sizes_and_odd_sides(name):
    """With every optional input, against diffusers and the embedding of its pipelines."""
    from tv import diffusers

    ours, (latent, time, text, *pooled) = tiny(name, guidance_dim=10, extra=3), batch(name, 3)
    latent = torch.randn(3, 7, 9, 6, dtype=torch.float64)  # sides that cannot be halved
    peer = peer_of(ours)
    scale = torch.tensor([1.0, 7.5, 3.0])
    module = importlib.import_module(f"{diffusers.__name__}.pipelines.stable_diffusion.pipeline_stable_diffusion")
    embedding = module.StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, 10).double()
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    sizes = torch.tensor([[512.0, 700, 0, 30, 1024, 1024], [64, 64, 1, 2, 64, 128], [5, 6, 7, 8, 9, 10]])
    more = {"sizes": sizes} if pooled else {}
    added = {"text_embeds": pooled[0], "time_ids": sizes} if pooled else None
    want = peer(latent, time, text, timestep_cond=embedding, encoder_attention_mask=mask, added_cond_kwargs=added).sample
    got = ours(latent, time, text, *pooled, text_mask=mask, guidance=scale, **more)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)  # sinusoids of large numbers are of float32
    with slice_attention(5):
        torch.testing.assert_close(ours(latent, time, text, *pooled, text_mask=mask, guidance=scale, **more), got, **CLOSE)
    for change in ({"guidance": scale + 1}, {"text_mask": None}, *([{"sizes": None}] if pooled else [])):
        given = {"text_mask": mask, "guidance": scale, **more} | change
        assert not torch.allclose(ours(latent, time, text, *pooled, **given), got)
    other = text.clone()
    other[1, 1:] = 9.0
    torch.testing.assert_close(ours(latent, time, other, *pooled, text_mask=mask, guidance=scale, **more), got, **CLOSE)


@torch.no_grad()
def test_default_sizes_are_those_of_uncropped_images():
    ours, (latent, time, text, pooled) = tiny("sdxl-unet"), batch("sdxl-unet", 2)
    latent = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    sizes = torch.tensor([[48.0, 64, 0, 0, 48, 64]]).expand(2, 6)
    torch.testing.assert_close(ours(latent, time, text, pooled), ours(latent, time, text, pooled, sizes=sizes))
    refiner, sizes = tiny("sdxl-unet", sizes=5), torch.tensor([[48.0, 64, 0, 0, 6.0]]).expand(2, 5)
    torch.testing.assert_close(refiner(latent, time, text, pooled), refiner(latent, time, text, pooled, sizes=sizes))


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["stable-diffusion-unet", "sdxl-unet"])
def test_files_of_diffusers_and_of_single_files(tmp_path, name, linear):
    from tv import diffusers

    ours, inputs = tiny(name, torch.float32, linear=linear, attend=(True, True)), batch(name, 2, torch.float32)
    peer = peer_of(ours)
    assert peer.down_blocks[0].attentions[0].proj_in.weight.ndim == (2 if linear else 4)
    state, tables = peer.state_dict(), get_tables(ours)
    single = translate(ours.state_dict(), tables["compvis"], reverse=True)
    converted = convert(single, latents.public_config(ours))
    assert converted.keys() == state.keys() and all(torch.equal(converted[key], x) for key, x in state.items())
    for form, origin in ((state, "diffusers"), (single, "compvis")):
        other = create(f"{name}-test", linear=linear, attend=(True, True))
        assert weights.load(other, form) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
        back = weights.read(weights.save(ours, tmp_path / f"{origin}.safetensors", origin))
        assert back.keys() == form.keys() and all(torch.equal(back[key], x) for key, x in form.items())
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").eval()
    again.save_pretrained(tmp_path / "theirs")
    loaded = checkpoints.load(tmp_path / "theirs")
    assert loaded.config == ours.config
    torch.testing.assert_close(loaded(*inputs), ours(*inputs))


@torch.no_grad()
def test_untrained_networks_predict_zero():
    inputs = batch("stable-diffusion-unet", 2, torch.float32)
    assert not create("stable-diffusion-unet-test")(*inputs).any()
