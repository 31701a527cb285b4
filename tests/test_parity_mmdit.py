"""PixArt, Stable Diffusion 3 and FLUX: published configurations, optional inputs, other sizes and files, against diffusers."""

from __future__ import annotations

import pytest
import torch

from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.dot_product_attention import slice_attention
from fieldguide.models.registry import card, create
from test_models import batch, peer_of, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
PIXART = {  # as published, before diffusers had a class for PixArt
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
LARGE = {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"}
PUBLISHED = {
    "pixart-xl2-1024": PIXART,
    "pixart-xl2-512": PIXART | {"sample_size": 64},
    "pixart-sigma-xl2-1024": PIXART | {"interpolation_scale": 2, "use_additional_conditions": False},
    "sd3-medium": SD3,
    "sd3.5-medium": SD3 | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
    "sd3.5-large": SD3 | LARGE,
    "flux1-dev": FLUX,
    "flux1-schnell": FLUX | {"guidance_embeds": False},
}
CLASSES = {"pixart": "PixArtTransformer2DModel", "sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_and_names(size):
    from tv import diffusers

    config = PUBLISHED[size]
    found, _, table = identify_config(config)
    assert found is card(size)
    ours = found.config(**to_config_fields(found, table, config, "config.json"))
    assert ours == found.resolve_config(size)
    with torch.device("meta"):
        peer = getattr(diffusers, CLASSES[found.name]).from_config(config | {"_class_name": CLASSES[found.name]})
        model = create(size)
    assert sum(p.numel() for p in peer.parameters()) == found.sizes[size].params
    renamed = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        (PIXART, {"out_channels": 5}, "out_channels=5"),
        (PIXART, {"cross_attention_dim": 1000}, "cross_attention_dim"),
        (SD3, {"dual_attention_layers": [1, 2]}, "must be the first blocks"),
        (SD3, {"caption_projection_dim": 1000}, "caption_projection_dim"),
        (SD3, {"qk_norm": "layer_norm"}, "qk_norm"),
        (FLUX, {"in_channels": 62}, "in_channels=62"),
        (FLUX, {"patch_size": 2}, "patch_size"),
    ],
)
def test_other_networks_are_rejected(config, wrong, words):
    found, _, table = identify_config(config)
    with pytest.raises(WeightsError, match=words):
        to_config_fields(found, table, config | wrong, "config.json")


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("sides", [(8, 8), (4, 12), (14, 6)])
def test_other_sizes(name, sides):
    ours, (_, time, *texts) = tiny(name), batch(name, 3)
    latent = torch.randn(3, ours.config.channels, *sides, dtype=torch.float64)
    got = ours(latent, time, *texts)
    torch.testing.assert_close(got, peer_of(ours, name)(latent, time, *texts), **CLOSE)
    with slice_attention(4):
        torch.testing.assert_close(ours(latent, time, *texts), got, **CLOSE)
    with pytest.raises(DataError, match="must be multiples of 2"):
        ours(latent[..., 1:], time, *texts)


def test_too_large_latents_have_no_positions():
    ours, (_, time, *texts) = tiny("sd3"), batch("sd3", 1)
    with pytest.raises(DataError, match="10 x 4 patches are too large: there are positions for 9 x 9"):
        ours(torch.zeros(1, 2, 20, 8, dtype=torch.float64), time, *texts)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_masked_tokens_are_as_if_they_were_not_there(name):
    ours, (latent, time, text, *pooled) = tiny(name), batch(name, 3)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    found = ours(latent, time, text, *pooled, text_mask=mask)
    for i, length in enumerate((5, 2, 3)):
        alone = ours(latent[i : i + 1], time[i : i + 1], text[i : i + 1, :length], *(x[i : i + 1] for x in pooled))
        torch.testing.assert_close(found[i : i + 1], alone, **CLOSE)
    assert not torch.allclose(found, ours(latent, time, text, *pooled))
    if name == "pixart":
        peer = peer_of(ours, name).peer
        sizes = {"resolution": torch.full((3, 2), 64.0), "aspect_ratio": torch.ones(3, 1)}
        want = peer(latent, text, time, sizes, encoder_attention_mask=mask).sample
        torch.testing.assert_close(ours.predict_all(latent, time, text, mask), want, **CLOSE)


@torch.no_grad()
def test_sizes_of_pixart():
    ours, (latent, time, text) = tiny("pixart"), batch("pixart", 3)
    peer = peer_of(ours, "pixart").peer
    sizes = torch.tensor([[512.0, 768, 0.6], [1024, 1024, 1.0], [64, 128, 0.5]])
    given = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    want = peer(latent, text, time, given).sample
    torch.testing.assert_close(ours.predict_all(latent, time, text, sizes=sizes), want, **CLOSE)
    torch.testing.assert_close(ours(latent, time, text, sizes=sizes), want[:, :2], **CLOSE)
    assert not torch.allclose(ours(latent, time, text), want[:, :2])
    plain = tiny("pixart", sizes=0, variance=False, interpolation=1.0)
    torch.testing.assert_close(plain(latent, time, text), peer_of(plain, "pixart")(latent, time, text), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [("sd3", {"normed": False, "dual": 0}), ("sd3", {"dual": 1}), ("flux", {"guidance": False}), ("flux", {"extra": 3})],
    ids=["3.0", "3.5 medium", "schnell", "inpainting"],
)
def test_variants(name, changes):
    ours, (_, time, *texts) = tiny(name, **changes), batch(name, 3)
    latent = torch.randn(3, 2 + getattr(ours.config, "extra", 0), 8, 6, dtype=torch.float64)
    got = ours(latent, time, *texts)
    assert got.shape == (3, 2, 8, 6)
    torch.testing.assert_close(got, peer_of(ours, name)(latent, time, *texts), **CLOSE)


@torch.no_grad()
def test_guidance_of_flux():
    ours, (latent, time, *texts) = tiny("flux"), batch("flux", 3)
    scale = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    got = ours(latent, time, *texts, guidance=scale)
    torch.testing.assert_close(got, peer_of(ours, "flux")(latent, time, *texts, guidance=scale), **CLOSE)
    torch.testing.assert_close(ours(latent, time, *texts), ours(latent, time, *texts, guidance=torch.full((3,), 3.5)))
    assert not torch.allclose(got, ours(latent, time, *texts))


@torch.no_grad()
def test_places_of_files_are_used():
    """Stable Diffusion 3 stores its positions; diffusers reads them, too."""
    ours, inputs = tiny("sd3"), batch("sd3", 2)
    before = ours(*inputs)
    ours.places.mul_(1.5)
    torch.testing.assert_close(ours(*inputs), peer_of(ours, "sd3")(*inputs), **CLOSE)
    assert not torch.allclose(before, ours(*inputs))


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
        loaded = checkpoints.load(tmp_path / folder)
        assert loaded.config == ours.config or name == "flux"  # whose configuration holds no size of images
        torch.testing.assert_close(loaded(*inputs), ours(*inputs))
    back = weights.read(tmp_path / "ours")
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_untrained_networks_predict_zero(name):
    assert not create(f"{name}-test")(*batch(name, 2, torch.float32)).any()


def test_invalid_sizes_are_rejected():
    for name, wrong, words in (
        ("pixart", {"dim": 20}, "with sizes, of 3"),
        ("pixart", {"sizes": 2}, "sizes=2 must be 0 or 3"),
        ("sd3", {"dual": 4}, "dual=4 at most depth=3"),
        ("sd3", {"heads": 3}, "heads=3"),
        ("flux", {"axes": (2, 2, 2)}, "whose sum is dim / heads"),
        ("flux", {"axes": (1, 3, 4)}, "even numbers"),
    ):
        with pytest.raises(SettingsError, match=words):
            create(f"{name}-test", **wrong)
