"""DALL-E 2 in the form of Karlo: the projection of embeddings, masks, and the layout of its folder; the decoder of DALL-E 3."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

import diffusion_pipelines as peers
import fieldguide
from fieldguide.checkpoints.key_mapping import translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion.unclip_decoder import PROJECTION_KEYS, TextProjection
from fieldguide.objectives.diffusion.noise_schedules import cosine_betas
from fieldguide.tasks.latent_diffusion.generation import ImageRequest
from fieldguide.tasks.latent_diffusion.unclip import UnCLIPOptions, generate
from latents import build


def test_projection_equals_diffusers():
    from tv import diffusers

    UnCLIPTextProjModel = diffusers.pipelines.deprecated.unclip.text_proj.UnCLIPTextProjModel
    with torch.device("meta"):
        assert sum(p.numel() for p in TextProjection().parameters()) == 7_878_400  # of Karlo
    torch.manual_seed(0)
    peer = UnCLIPTextProjModel(clip_embeddings_dim=6, time_embed_dim=8, cross_attention_dim=10, clip_extra_context_tokens=3)
    ours = TextProjection(6, 8, 10, 3)
    ours.load_state_dict(translate(peer.state_dict(), PROJECTION_KEYS))
    image, pooled, text = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 5, 6)
    found = ours(image, pooled, text)
    expected = peer(
        image_embeddings=image, prompt_embeds=pooled, text_encoder_hidden_states=text, do_classifier_free_guidance=False
    )
    for ours_part, theirs in zip(found, expected):
        torch.testing.assert_close(ours_part, theirs)


def test_masked_texts():
    """Tokens beyond the end of a text have no effect, as in diffusers; positions of the image are never masked."""
    torch.manual_seed(0)
    model = fieldguide.create("unclip-decoder-test").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    c = model.config
    latent, time, text = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 5, c.text_dim)
    pooled, mask = torch.randn(2, c.pooled_dim), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    peer = build(model).eval()
    table = fieldguide.models.registry.card("unclip-decoder").tables(c)["diffusers"]
    peer.load_state_dict(translate(model.state_dict(), table, reverse=True))
    with torch.no_grad():
        found = model.predict_all(latent, time, text, pooled, mask)
        expected = peer(latent, time, text, class_labels=pooled, attention_mask=mask).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        text[0, 3:] = 7.0
        torch.testing.assert_close(model.predict_all(latent, time, text, pooled, mask), found)
        assert (model.predict_all(latent, time, text, pooled) - found)[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["unclip-decoder-test", "super-resolution-unet-test"])
def test_folders_of_diffusers_load(name, tmp_path):
    torch.manual_seed(0)
    model = fieldguide.create(name)
    build(model).save_pretrained(tmp_path / "unet")
    assert fieldguide.load(tmp_path / "unet").config == model.config


def test_the_consistency_decoder():
    """Its times have embeddings of their own, and its second half of channels are variances."""
    from tv import diffusers

    torch.manual_seed(0)
    model = fieldguide.create("super-resolution-unet-test", times=16, condition=4, widths=(8, 12, 20)).eval()
    peer = build(model).eval()
    assert isinstance(peer, diffusers.UNet2DModel) and peer.config.time_embedding_type == "learned"
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        table = fieldguide.models.registry.card("super-resolution-unet").tables(model.config)["diffusers"]
        model.load_state_dict(translate(peer.state_dict(), table))
        target, image, time = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([3, 15])
        expected = peer(torch.cat([target, image], 1), time).sample
        found = model.predict_all(target, time.float(), image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 6, 16, 16)


def write_karlo(folder):
    """Write a tiny pipeline in the layout of Karlo, and return it."""
    from tv import diffusers

    unclip = diffusers.pipelines.deprecated.unclip
    torch.manual_seed(0)
    residual = {"block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4}
    decoder = diffusers.UNet2DConditionModel(
        **residual,
        sample_size=8,
        in_channels=3,
        out_channels=6,
        cross_attention_dim=10,
        class_embed_type="identity",
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )
    large = lambda: diffusers.UNet2DModel(
        **residual,
        sample_size=16,
        in_channels=6,
        out_channels=3,
        add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )
    encoder = peers.clip_encoder(16, 3, projected=True)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=peers.CLIP_LENGTH
    )
    prior.clip_mean.data.normal_(), prior.clip_std.data.uniform_(0.5, 2)
    projection = unclip.text_proj.UnCLIPTextProjModel(clip_embeddings_dim=16, time_embed_dim=32, cross_attention_dim=10)
    parts = {"decoder": decoder, "prior": prior, "text_proj": projection, "super_res_first": large(), "super_res_last": large()}
    scheduler = lambda **changes: diffusers.UnCLIPScheduler(**changes)
    made = unclip.UnCLIPPipeline(
        **{name: peers.randomize(part, i) for i, (name, part) in enumerate(parts.items())},
        text_encoder=encoder,
        tokenizer=peers.clip_tokenizer(),
        prior_scheduler=scheduler(prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=scheduler(variance_type="learned_range"),
        super_res_scheduler=scheduler(),
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    for used in (made.prior_scheduler, made.decoder_scheduler, made.super_res_scheduler):
        used.betas = torch.from_numpy(cosine_betas(1000))  # float32 makes x_0 at the last step wrong by a thousandth
        used.alphas = 1 - used.betas
        used.alphas_cumprod = used.alphas.cumprod(0)
    return made


def test_images_equal_diffusers(tmp_path):
    """From the same numbers of one generator, which both draw in the same order."""
    peer = write_karlo(tmp_path / "karlo")
    ours = fieldguide.pipeline(tmp_path / "karlo")
    steps = {"prior_steps": 3, "steps": 4, "enlarge_steps": 3}
    source = torch.Generator().manual_seed(5)
    noise = lambda stage, shape: lambda: torch.randn(1, *shape, generator=source)
    for guidance, prior_guidance in ((8.0, 4.0), (1.0, 1.0)):
        options = UnCLIPOptions(**steps, guidance=guidance, prior_guidance=prior_guidance)
        source.manual_seed(5)
        found, truncated = generate(ours.pipeline, "A cat, the dog", options, make_noise=noise)
        expected = peer(
            "A cat, the dog",
            prior_num_inference_steps=3,
            decoder_num_inference_steps=4,
            super_res_num_inference_steps=3,
            decoder_guidance_scale=guidance,
            prior_guidance_scale=prior_guidance,
            generator=torch.Generator().manual_seed(5),
            output_type="np",
        ).images[0]
        torch.testing.assert_close(found.permute(1, 2, 0) / 2 + 0.5, torch.from_numpy(expected), rtol=0, atol=1e-4)
        assert truncated == 0 and expected.std() > 0.05
    records = ours.predict(["cat", "dog"], count=2, **steps)
    assert [r["input"] for r in records] == ["cat", "cat", "dog", "dog"] and len({r["image"].content for r in records}) == 4
    again = ours.predict("cat", count=1, **steps)
    assert again[0]["image"].content == records[0]["image"].content
    assert ours.signature.task == "text-to-image"
    with pytest.raises(DataError, match="is no prompt"):
        ours.predict([3])
    assert ours.predict("the dog of " * 20, **steps).notes[0].endswith("was truncated")


def test_incomplete_folders(tmp_path):
    write_karlo(tmp_path / "karlo")
    (tmp_path / "karlo" / "text_proj").rename(tmp_path / "text_proj")
    with pytest.raises(WeightsError, match="lacks the folder text_proj"):
        fieldguide.pipeline(tmp_path / "karlo")
    (tmp_path / "text_proj").rename(tmp_path / "karlo" / "text_proj")
    shutil.rmtree(tmp_path / "karlo" / "decoder")
    shutil.copytree(tmp_path / "karlo" / "super_res_first", tmp_path / "karlo" / "decoder")
    with pytest.raises(WeightsError, match="is super-resolution-unet"):
        fieldguide.pipeline(tmp_path / "karlo")


def test_pipelines_with_the_consistency_decoder(tmp_path, monkeypatch):
    """A pipeline of diffusers whose autoencoder is that of DALL-E 3 loads, and gives the same images from the same noise."""
    from tv import diffusers

    whole = sys.modules[diffusers.ConsistencyDecoderVAE.__module__]
    steps = sys.modules[whole.ConsistencyDecoderScheduler.__module__]
    with torch.device("meta"):
        published = diffusers.ConsistencyDecoderVAE()
    size = fieldguide.models.registry.card("consistency-decoder-vae").sizes["openai-consistency-decoder"]
    assert sum(p.numel() for p in published.parameters()) == size.params
    peer = peers.stable_diffusion()
    small = {"encoder_block_out_channels": (8, 16), "encoder_layers_per_block": 1, "encoder_norm_num_groups": 4}
    small |= {"decoder_block_out_channels": (8, 16), "decoder_layers_per_block": 1, "decoder_norm_num_groups": 4}
    kinds = {
        "encoder_down": "DownEncoderBlock2D",
        "decoder_down": "ResnetDownsampleBlock2D",
        "decoder_up": "ResnetUpsampleBlock2D",
    }
    small |= {f"{key}_block_types": (kind,) * 2 for key, kind in kinds.items()}
    peer.register_modules(vae=peers.randomize(diffusers.ConsistencyDecoderVAE(**small), 3))
    peer.save_pretrained(tmp_path / "sd")
    peer.set_progress_bar_config(disable=True)
    ours = fieldguide.pipeline(tmp_path / "sd")
    vae = ours.pipeline.vae
    assert type(vae).__name__ == "ConsistencyDecoderVAE"
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    found, theirs = vae.encode(image), peer.vae.encode(image).latent_dist
    torch.testing.assert_close(found, (theirs.mean, theirs.logvar), rtol=1e-4, atol=1e-5)
    noise = vae.draw_noise((1, 3, 32, 32))
    source = iter(noise)
    for module in (whole, steps):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: next(source).expand(shape))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = peer(
            "cat", latents=latents, num_inference_steps=2, guidance_scale=3.0, height=32, width=32, output_type="pt"
        ).images
    options = ours.parse({"steps": 2, "guidance": 3.0, "height": 32, "width": 32})
    made = ours.generate(ImageRequest("cat"), options, noise=latents) / 2 + 0.5
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-4)
    assert expected.std() > 0.05
    other = vae.decode(torch.randn(1, 4, 16, 16), noise=tuple(torch.randn_like(x) for x in noise))
    assert other.shape == (1, 3, 32, 32)
    with pytest.raises(SettingsError, match="Train autoencoder-kl"):
        vae.reconstruct(image)
