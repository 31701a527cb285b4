"""VQGAN, the unCLIP prior and the consistency U-Net: published configurations, methods and files, against diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import CASES
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.registry import card, create
from test_models import batch, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
VQ = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
IMAGENET = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "block_out_channels": [192, 384, 576, 768],
    "center_input_sample": False,
    "class_embed_type": None,
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "downsample_padding": 1,
    "downsample_type": "resnet",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": 1000,
    "out_channels": 3,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "time_embedding_type": "positional",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "upsample_type": "resnet",
}
LSUN = IMAGENET | {
    "attn_norm_num_groups": None,
    "block_out_channels": [256, 256, 512, 512, 1024, 1024],
    "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3],
    "layers_per_block": 2,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "sample_size": 256,
    "up_block_types": [*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3],
}
PRIOR = {
    "_class_name": "PriorTransformer",
    "additional_embeddings": 4,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "embedding_dim": 768,
    "num_attention_heads": 32,
    "num_embeddings": 77,
    "num_layers": 20,
}
PUBLISHED = {
    "vq-f4": VQ,
    "consistency-imagenet64": IMAGENET,
    "consistency-lsun256": LSUN,
    "karlo-prior": PRIOR,
    "kandinsky2-prior": PRIOR | {"embedding_dim": 1280},
}
NAMES = ("vqgan", "consistency-unet", "unclip-prior")


def peer_of(model: nn.Module, name: str) -> nn.Module:
    """Return the peer of a network with its weights."""
    peer, rename = CASES[name].peer(model)
    peer = peer.to(next(model.parameters()).dtype).eval()
    peer.load_state_dict(rename(model.state_dict()))
    return peer


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_and_names(size):
    from tv import diffusers

    config = PUBLISHED[size]
    found, _, table = identify_config(config)
    assert found is card(size)
    assert found.config(**to_config_fields(found, table, config, "config.json")) == found.resolve_config(size)
    with torch.device("meta"):
        peer = getattr(diffusers, config["_class_name"]).from_config(config)
        model = create(size)
    fixed = sum(x.numel() for name, x in model.named_buffers() if name.startswith("clip_"))  # parameters in diffusers
    assert sum(p.numel() for p in peer.parameters()) == found.sizes[size].params + fixed
    renamed = translate(model.state_dict(), get_tables(model)["diffusers"], reverse=True)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in peer.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        (VQ, {"norm_type": "spatial"}, "norm_type"),
        (IMAGENET, {"attn_norm_num_groups": None}, "which diffusers leaves out if the first is missing"),
        (IMAGENET, {"up_block_types": ["AttnUpBlock2D"] * 4}, "up_block_types"),
        (PRIOR, {"added_emb_type": None}, "added_emb_type"),
        (PRIOR, {"additional_embeddings": 6}, "additional_embeddings"),
    ],
)
def test_other_networks_are_rejected(config, wrong, words):
    found, _, table = identify_config(config)
    with pytest.raises(WeightsError, match=words):
        to_config_fields(found, table, config | wrong, "config.json")


def test_diffusers_leaves_out_a_norm():
    """Without `attn_norm_num_groups`, its network for ImageNet silently lacks the norm of the attention in the middle."""
    from tv import diffusers

    counts = []
    for groups in (32, None):
        with torch.device("meta"):
            peer = diffusers.UNet2DModel.from_config(IMAGENET | {"attn_norm_num_groups": groups})
        counts.append(sum(p.numel() for p in peer.parameters()))
    assert counts == [295_899_267, 295_897_731]


@torch.no_grad()
def test_codes():
    ours, (image,) = tiny("vqgan", growth=(1, 2)), batch("vqgan", 3)
    peer = peer_of(ours, "vqgan").peer
    z = ours.encode(image)
    torch.testing.assert_close(z, peer.encode(image).latents, **CLOSE)
    want, _, (_, _, codes) = peer.quantize(z)
    quantized, commitment, codebook = ours.quantize(z)
    torch.testing.assert_close(quantized, want, **CLOSE)
    assert torch.equal(ours.find_codes(z).flatten(), codes) and len(codes.unique()) > 2
    torch.testing.assert_close(ours.look_up(ours.find_codes(z)), quantized, **CLOSE)
    loss = peer(image, return_dict=False)[1]  # with 0.25 on the wrong term, as in its first files
    torch.testing.assert_close(commitment + 0.25 * codebook, loss, **CLOSE)
    torch.testing.assert_close(ours.decode(z), peer.decode(z).sample, **CLOSE)
    torch.testing.assert_close(ours.decode(z, quantize=False), peer.decode(z, force_not_quantize=True).sample, **CLOSE)
    assert not torch.allclose(ours.decode(z), ours.decode(z, quantize=False))
    torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z)
    assert ours.decode(torch.randn(1, 3, 12, 9, dtype=torch.float64), tile=8).shape == (1, 2, 24, 18)
    with pytest.raises(DataError, match="multiples of 2"):
        ours.encode(image[..., 1:])


def test_gradients_of_the_codebook():
    ours, (image,) = tiny("vqgan"), batch("vqgan", 3)
    _, commitment, codebook = ours.quantize(ours.encode(image))
    codebook.backward(retain_graph=True)
    assert ours.codebook.weight.grad.any() and ours.quant.weight.grad is None
    commitment.backward()
    assert ours.quant.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"scaled": False}, {"num_classes": 0}, {"attend": (True, True), "depth": 2}])
def test_variants_of_the_consistency_network(changes):
    ours, (image, time, label) = tiny("consistency-unet", **changes), batch("consistency-unet", 3)
    peer = peer_of(ours, "consistency-unet")
    image = torch.randn(3, 2, 12, 6, dtype=torch.float64)
    time = time.new_tensor([-700.0, 0.5, 1100.0])  # logarithms of noise levels
    torch.testing.assert_close(ours(image, time, label), peer(image, time, label), **CLOSE)
    with pytest.raises(DataError, match="multiples of 2"):
        ours(image[..., 1:], time, label)


@torch.no_grad()
def test_missing_label_of_the_consistency_network():
    """Nothing is added to the time."""
    ours, (image, time, label) = tiny("consistency-unet"), batch("consistency-unet", 3)
    want = ours(image, time, label)
    torch.testing.assert_close(ours(image, time), ours(image, time, torch.zeros_like(label)))
    assert not torch.allclose(ours(image, time), want)
    ours.label.weight.zero_()
    torch.testing.assert_close(ours(image, time), ours(image, time, label))


@torch.no_grad()
def test_mask_of_the_prior():
    ours, (latent, time, text, pooled) = tiny("unclip-prior"), batch("unclip-prior", 3)
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    got = ours(latent, time, text, pooled, text_mask=mask)
    torch.testing.assert_close(got, peer_of(ours, "unclip-prior")(latent, time, text, pooled, mask), **CLOSE)
    assert not torch.allclose(got, ours(latent, time, text, pooled))
    with pytest.raises(DataError, match="must be padded to length=5"):
        ours(latent, time, text[:, 1:], pooled)


@torch.no_grad()
def test_normalized_embeddings():
    ours = tiny("unclip-prior")
    ours.clip_mean.normal_()
    ours.clip_std.uniform_(0.5, 1.5)
    peer, embedding = peer_of(ours, "unclip-prior").peer, torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(ours.denormalize(embedding), peer.post_process_latents(embedding), **CLOSE)
    torch.testing.assert_close(ours.normalize(ours.denormalize(embedding)), embedding)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_folders(tmp_path, name):
    from tv import diffusers

    ours, inputs = tiny(name, torch.float32), batch(name, 2, torch.float32)
    checkpoints.save(ours, tmp_path / "ours", "diffusers")
    config = PUBLISHED[next(size for size in PUBLISHED if card(size).name == name)]
    peer = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = checkpoints.load(tmp_path / folder)
        assert loaded.config == ours.config
        torch.testing.assert_close(loaded(*inputs), ours(*inputs))
    back, state = weights.read(tmp_path / "ours"), peer.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())
    for origin in get_tables(ours):
        other = create(f"{name}-test")
        assert weights.load(other, translate(ours.state_dict(), get_tables(ours)[origin], reverse=True)) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))


def test_invalid_sizes_are_rejected():
    for name, wrong, words in (
        ("consistency-unet", {"attend": (True,)}, "as many values as levels"),
        ("consistency-unet", {"head_dim": 5}, "multiple of head_dim=5"),
        ("unclip-prior", {"heads": 3}, "heads=3"),
    ):
        with pytest.raises(SettingsError, match=words):
            create(f"{name}-test", **wrong)
