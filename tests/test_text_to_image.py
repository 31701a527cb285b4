"""Text-to-image: folders of diffusers' pipelines give the same images for the same noise."""

from __future__ import annotations

import base64
import copy
import functools
import importlib
import io
import json
import shutil
import tempfile
import tomllib
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

import diffusion_pipelines as peers
import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.cli import commands as cli
from fieldguide.core.card import Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.signature import Signature
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.inference.text_to_image import ImageRequest, TextToImage
from fieldguide.models.registry import card_of, find
from fieldguide.serving.app import build_app
from fieldguide.serving.models import LoadedModel
from fieldguide.serving.settings import ServerSettings
from fieldguide.tasks.latent_diffusion import diffusion_memory, generation, single_file_pipeline
from fieldguide.tasks.latent_diffusion.diffusion_memory import MemoryPlan, plan_memory
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import CHOICES, FAMILIES, VIDEO_FAMILIES, decode_latents

PROMPT, NEGATIVE = "A cat, the dog of", "the dog"
CLOSE = {"rtol": 0, "atol": 1e-4}
BUILD = {
    "sd": peers.stable_diffusion,
    "lcm": functools.partial(peers.stable_diffusion, time_cond_proj_dim=16),
    "painted": functools.partial(peers.stable_diffusion, "StableDiffusionInpaintPipeline", in_channels=9),
    "sdxl": peers.sdxl,
    "sd3": peers.sd3,
    "flux": peers.flux,
    "schnell": functools.partial(peers.flux, guidance=False),
    "pixart": peers.pixart,
    "sigma": functools.partial(peers.pixart, "PixArtSigmaPipeline", sized=False),
}


@functools.cache
def make(name: str):
    """Return a pipeline of diffusers and the folder that it wrote."""
    peer, folder = BUILD[name](), Path(tempfile.mkdtemp()) / name
    peer.save_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    return peer, folder


@functools.cache
def load(name: str) -> TextToImage:
    return fieldguide.pipeline(make(name)[1])


def draw(name: str, height: int = 32, width: int = 32, count: int = 1):
    channels = load(name).model.config.channels
    return torch.randn(count, channels, height // 2, width // 2, generator=torch.Generator().manual_seed(0))


def ask(name: str, noise, image=None, mask=None, prompt: str = PROMPT, **options):
    """Return our images, 0 to 1: B 3 H W."""
    predictor = load(name)
    found = predictor.parse(
        {"steps": 3, "height": 2 * noise.shape[2], "width": 2 * noise.shape[3], "count": len(noise), **options}
    )
    return predictor.generate(ImageRequest(prompt, image, mask), found, noise=noise) / 2 + 0.5


def ask_peer(name: str, noise, prompt: str = PROMPT, **options):
    """Return the images of diffusers."""
    if name in ("flux", "schnell"):
        b, c, h, w = noise.shape
        noise = noise.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        options |= {"max_sequence_length": 256} if name == "schnell" else {}
        options["height"], options["width"] = options.pop("height", 2 * h), options.pop("width", 2 * w)
    elif name in ("pixart", "sigma"):
        options["use_resolution_binning"] = False
    options.setdefault("height", 2 * noise.shape[-2]), options.setdefault("width", 2 * noise.shape[-1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers about numpy
        made = make(name)[0](
            prompt,
            latents=noise.clone(),
            output_type="pt",
            num_images_per_prompt=len(noise),
            **{"num_inference_steps": 3, **options},
        )
    return made.images


@pytest.mark.parametrize("name", [name for name in BUILD if name != "painted"])
def test_images_equal_diffusers(name):
    noise = draw(name, 32, 40, count=2)
    expected, found = ask_peer(name, noise), ask(name, noise)
    assert found.shape == expected.shape == (2, 3, 32, 40)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert expected.std() > 0.02
    other = ask(name, noise, prompt="dog")
    assert (other - found).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_samplers_equal_diffusers(sampler, monkeypatch):
    """A sampler of the request takes over the settings of the folder's own."""
    from tv import diffusers

    (peer, folder), noise = make("sd"), draw("sd")
    own = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")  # takes defaults in files for choices
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(peer, "scheduler", getattr(diffusers, sampler).from_config(own.config))
    name = next(key for key, value in CHOICES.items() if value == sampler)
    options = {"negative_prompt": NEGATIVE, "guidance_scale": 3.0}
    found = ask("sd", noise, sampler=name, negative=NEGATIVE, guidance=3.0)
    torch.testing.assert_close(found, ask_peer("sd", noise, **options), **CLOSE)
    assert (found - ask("sd", noise, sampler=name, guidance=3.0)).abs().max() > 1e-3  # the negative prompt
    assert (found - ask("sd", noise, sampler="ddim", negative=NEGATIVE, guidance=3.0)).abs().max() > 1e-3


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_sampler_of_stable_diffusion_1(steps, predicts, monkeypatch):
    """PNDM without steps of Runge and Kutta, with the settings of the published file."""
    from tv import diffusers

    peer, noise = make("sd")[0], draw("sd")
    settings = {
        **peers.BETAS,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": predicts,
    }
    monkeypatch.setattr(peer, "scheduler", diffusers.PNDMScheduler(**settings))
    published = {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        **settings,
    }
    monkeypatch.setattr(load("sd").pipeline, "scheduler", published)
    expected = ask_peer("sd", noise, num_inference_steps=steps, guidance_scale=2.0)
    torch.testing.assert_close(ask("sd", noise, steps=steps, guidance=2.0), expected, **CLOSE)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart"])
def test_negative_prompts_equal_diffusers(name):
    noise, options = draw(name), {"negative_prompt": NEGATIVE, "guidance_scale": 2.0}
    found = ask(name, noise, negative=NEGATIVE, guidance=2.0)
    torch.testing.assert_close(found, ask_peer(name, noise, **options), **CLOSE)
    assert (found - ask(name, noise, guidance=2.0)).abs().max() > 1e-4
    plain = ask(name, noise, negative=NEGATIVE, guidance=1.0)  # without guidance
    torch.testing.assert_close(plain, ask_peer(name, noise, guidance_scale=1.0), **CLOSE)


def test_guidance_of_flux():
    noise = draw("flux")
    torch.testing.assert_close(ask("flux", noise, guidance=7.0), ask_peer("flux", noise, guidance_scale=7.0), **CLOSE)
    assert (ask("flux", noise, guidance=7.0) - ask("flux", noise)).abs().max() > 1e-4
    with pytest.raises(SettingsError, match="negative: not supported"):
        ask("flux", noise, negative=NEGATIVE)


def test_networks_that_are_told_the_guidance():
    """Latent consistency models: no negative prompt, a call for each step."""
    noise, calls = draw("lcm"), []
    handle = load("lcm").model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["latent"])), with_kwargs=True
    )
    found = ask("lcm", noise, guidance=5.0)
    handle.remove()
    torch.testing.assert_close(found, ask_peer("lcm", noise, guidance_scale=5.0), **CLOSE)
    assert calls == [1, 1, 1] and (found - ask("lcm", noise, guidance=2.0)).abs().max() > 1e-4
    assert load("lcm").parse({}).steps == 4


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_signatures(name):
    signature, network = load(name).signature, load(name).model
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    assert signature.task == "text-to-image" and [field.name for field in signature.inputs] == ["prompt"]
    options = {option.name: option for option in signature.options}
    assert (
        options["steps"].default == load(name).parse({}).steps and options["guidance"].default == load(name).parse({}).guidance
    )
    assert ("negative" in options) == (name != "flux") and options["sampler"].choices
    assert set(options) <= vars(load(name).parse({})).keys()  # no option names a file
    batch = signature.example_batch(
        2, {axis: max(8, size.least) for axis, size in signature.dynamic_axes.items() if axis != "batch"}
    )
    with torch.no_grad():
        assert network(**batch).shape == batch["latent"].shape


def test_sd3_without_t5(tmp_path):
    peer = peers.sd3(text_encoder_3=None, tokenizer_3=None)
    peer.save_pretrained(tmp_path)
    peer.set_progress_bar_config(disable=True)
    ours, noise = fieldguide.pipeline(tmp_path), draw("sd3")
    assert ours.pipeline.encoders[2] is None
    options = ours.parse({"steps": 2, "height": 32, "width": 32})
    found = ours.generate(ImageRequest(PROMPT), options, noise=noise) / 2 + 0.5
    with torch.no_grad():
        expected = peer(PROMPT, latents=noise, height=32, width=32, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(found, expected, **CLOSE)


def test_long_prompts_are_truncated_and_counted():
    prompt, noise = "the cat of the dog, " * 10, draw("sd")
    torch.testing.assert_close(ask("sd", noise, prompt=prompt), ask_peer("sd", noise, prompt), **CLOSE)
    made = load("sd").predict([prompt], steps=1, width=32, height=32)
    assert f"truncated to {peers.CLIP_LENGTH} tokens" in made.notes[-1]
    assert not load("sd").predict([PROMPT], steps=1, width=32, height=32).notes


def read_png(media) -> np.ndarray:
    with Image.open(io.BytesIO(media.content)) as image:
        return np.array(image, dtype=int)


def test_noise_depends_on_seed_and_number_only():
    options = {"steps": 1, "width": 32, "height": 32}
    pictures = [read_png(record["image"]) for record in load("sd").predict([PROMPT, PROMPT], count=2, seed=3, **options)]
    apart = lambda a, b: np.abs(a - b).max()
    assert min(apart(pictures[i], pictures[j]) for i in range(4) for j in range(i)) > 10
    alone, other = (read_png(load("sd").predict(PROMPT, seed=seed, **options)[0]["image"]) for seed in (3, 4))
    assert apart(alone, pictures[0]) <= 1 < 10 < apart(other, pictures[0])  # batches of two round differently
    assert [record["input"] for record in load("sd").predict([PROMPT, "x"], **options)] == [PROMPT, "x"]


def test_tokenizer_of_clip(tmp_path):
    peers.write_clip_tokenizer(tmp_path, pad="!")
    ours, theirs = TextTokenizer.load(tmp_path), peers.clip_tokenizer("!")
    for text in ("A cat's  of THE cat!!  ", "naïve 123 éÉ 你好 <|endoftext|> x", "", "don't I'll we've; 5.0%", " 's"):
        assert ours.tokenizer.encode(text).ids == theirs(text).input_ids
    assert ours.pad == theirs.pad_token_id == 0 and ours.decode(ours.tokenizer.encode("a cat of").ids) == "a cat of"


# Images that are changed


def build_peer(name: str, kind: str, noise, monkeypatch):
    """Return a pipeline of diffusers with the networks of another, whose latents are means and whose noise is given."""
    from tv import diffusers

    parts = make(name)[0].components
    unused = ("image_encoder", "feature_extractor") if kind.startswith("Flux") else ()
    peer = getattr(diffusers, kind)(**{key: part for key, part in parts.items() if key not in unused})
    peer.set_progress_bar_config(disable=True)
    module = importlib.import_module(type(peer).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: noise.clone())
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self, generator=None: self.mode())

    def call(**options):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind != "StableDiffusion3InpaintPipeline":
                return peer(PROMPT, output_type="pt", **options).images
            latents = peer(PROMPT, output_type="latent", **options).images  # it forgets the shift of latents
            config = peer.vae.config
            images = peer.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
            return (images / 2 + 0.5).clamp(0, 1)

    return call


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def hole(width: int = 32, height: int = 32) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4:21, 10:27] = 255
    return Image.fromarray(mask)


CHANGED = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"}
CHANGED |= {"sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline"}


@pytest.mark.parametrize("name", CHANGED)
def test_image_to_image_equals_diffusers(name, monkeypatch):
    noise = draw(name)
    call = build_peer(name, CHANGED[name], noise, monkeypatch)
    for strength in (0.5, 1.0):
        more = {"height": 32, "width": 32} if name in ("sd3", "flux") else {}
        guidance = 3.0
        expected = call(image=picture(), strength=strength, num_inference_steps=4, guidance_scale=guidance, **more)
        found = ask(name, noise, picture(), steps=4, strength=strength, guidance=guidance)
        torch.testing.assert_close(found, expected, **CLOSE)
    other = ask(name, noise, picture(seed=1), steps=4, strength=0.5, guidance=guidance)
    assert (other - ask(name, noise, picture(), steps=4, strength=0.5, guidance=guidance)).abs().max() > 1e-2


def test_the_size_is_that_of_the_image(tmp_path):
    picture(45, 31).save(tmp_path / "a.png")
    made = load("sd").predict({"prompt": PROMPT, "image": tmp_path / "a.png"}, steps=2, strength=0.5)
    with Image.open(io.BytesIO(made[0]["image"].content)) as image:
        assert image.size == (44, 30)
    assert made[0]["image"] == load("sd").predict(PROMPT, image=str(tmp_path / "a.png"), steps=2, strength=0.5)[0]["image"]
    with pytest.raises(SettingsError, match="leaves none of 2 steps"):
        load("sd").predict(PROMPT, image=str(tmp_path / "a.png"), steps=2, strength=0.3)
    with pytest.raises(DataError, match="cannot be read as an image"):
        load("sd").predict(PROMPT, image=str(tmp_path / "b.png"), steps=2)


FILLED = {"sd": "StableDiffusionInpaintPipeline", "painted": "StableDiffusionInpaintPipeline"}
FILLED |= {"sdxl": "StableDiffusionXLInpaintPipeline", "sd3": "StableDiffusion3InpaintPipeline", "flux": "FluxInpaintPipeline"}


@pytest.mark.parametrize("name", FILLED)
def test_inpainting_equals_diffusers(name, monkeypatch):
    """By a network with channels for the mask (`painted`), and by those without."""
    noise = draw(name)
    call = build_peer(name, FILLED[name], noise, monkeypatch)
    for strength in (1.0, 0.75):
        options = {"strength": strength, "guidance": 3.0}
        expected = call(
            image=picture(),
            mask_image=hole(),
            strength=strength,
            num_inference_steps=4,
            guidance_scale=3.0,
            height=32,
            width=32,
        )
        found = ask(name, noise, picture(), hole(), steps=4, **options)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - ask(name, noise, picture(), hole().rotate(90), steps=4, **options)).abs().max() > 1e-2


def test_inpainting_needs_image_and_mask():
    for options, words in (({}, "Set image and mask"), ({"image": picture()}, "Set mask as well")):
        with pytest.raises(SettingsError, match=words):
            load("painted").predict(PROMPT, steps=1, height=32, width=32, **options)


# Memory and precision


def test_what_does_not_fit_is_computed_in_parts(monkeypatch):
    made = load("sd").pipeline
    assert plan_memory(made, 16, 16, 2, free=2**34) == MemoryPlan(8)
    small = plan_memory(made, 16, 16, 2, free=2**18)
    assert small.images == 1 and small.tile == 16 and not small.queries
    monkeypatch.setattr(diffusion_memory, "UNFUSED_DEVICES", ("cpu",))
    assert 64 <= plan_memory(made, 64, 64, 2, free=2**24).queries < 64 * 64
    noise, expected = draw("sd", count=2), ask("sd", draw("sd", count=2))
    monkeypatch.setattr(generation, "plan_memory", lambda *_: MemoryPlan(1, queries=50))
    torch.testing.assert_close(ask("sd", noise), expected, **CLOSE)
    monkeypatch.setattr(generation, "plan_memory", lambda *_: MemoryPlan(1, tile=8))
    tiled = ask("sd", noise)
    assert tiled.shape == expected.shape and 1e-4 < (tiled - expected).abs().mean() < 0.2  # norms of groups are those of a tile


def test_tiles_and_slices_switch_on_by_themselves(monkeypatch):
    """With little free memory, nothing else given."""
    tiles, sliced = [], []
    decode, cut = generation.decode_latents, generation.slice_attention
    monkeypatch.setattr(
        generation, "decode_latents", lambda *a, tile=0: tiles.append((len(a[1]), tile)) or decode(*a, tile=tile)
    )
    monkeypatch.setattr(generation, "slice_attention", lambda queries: sliced.append(queries) or cut(queries))
    monkeypatch.setattr(diffusion_memory, "UNFUSED_DEVICES", ("cpu",))
    calls, options, network = [], {"steps": 1, "height": 32, "width": 32, "count": 2}, load("sd").pipeline.network
    hook = network.register_forward_pre_hook(
        lambda _, inputs, named: calls.append(len(named.get("latent", *inputs[:1]))), with_kwargs=True
    )
    try:
        for free in (2**34, 2**18):
            monkeypatch.setattr(diffusion_memory, "get_free_memory", lambda device, free=free: free)
            load("sd").generate(ImageRequest(PROMPT), load("sd").parse(options))
    finally:
        hook.remove()
    side = load("sd").pipeline.vae.config.image // load("sd").pipeline.stride
    assert tiles == [(1, 0)] * 2 + [(1, side)] * 2 and calls == [4, 2, 2]  # all images at once, then one after another
    assert sliced[0] == 0 and sliced[1] >= diffusion_memory.MIN_QUERIES


def test_autoencoders_that_overflow_in_half_precision():
    vae = copy.deepcopy(load("sd").pipeline.vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e5)  # a norm follows, so that images do not
        vae.decoder.conv_in.bias.mul_(1e5)
    latents = 10 * draw("sd")
    expected = decode_latents(vae, latents)
    half = copy.deepcopy(vae).half()
    with torch.no_grad():
        assert not half.decode(half.denormalize(latents.half())).isfinite().all()
        found = decode_latents(half, latents)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05


def test_half_precision():
    noise, expected = draw("sd"), ask("sd", draw("sd"))
    ours = fieldguide.pipeline(make("sd")[1], precision="bfloat16")
    assert next(ours.model.parameters()).dtype == torch.bfloat16
    found = ours.generate(ImageRequest(PROMPT), ours.parse({"steps": 3, "height": 32, "width": 32}), noise=noise) / 2 + 0.5
    assert 0 < (found - expected).abs().max() < 0.1
    with pytest.raises(SettingsError, match="precision='int4' is unknown"):
        fieldguide.pipeline(make("sd")[1], precision="int4")


# Files


def test_the_network_alone():
    network = fieldguide.load(make("sd")[1])
    assert type(network).__name__ == "StableDiffusionUNet"
    assert type(fieldguide.load(make("flux")[1] / "text_encoder_2")).__name__ == "T5Encoder"


def test_half_precision_variants_and_shards(tmp_path):
    """Files of half precision only, in shards, with an index whose name diffusers writes."""
    peer, _ = make("sd")
    half = copy.deepcopy(peer).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names and len(names) > 3
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists() or (
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    ).exists()
    noise, expected = draw("sd"), ask("sd", draw("sd"))
    ours = fieldguide.pipeline(tmp_path)
    found = ours.generate(ImageRequest(PROMPT), ours.parse({"steps": 3, "height": 32, "width": 32}), noise=noise) / 2 + 0.5
    assert 0 < (found - expected).abs().max() < 0.02  # of rounding the weights


def write_single_file(name: str, file: Path, texts) -> None:
    """Write our networks of a pipeline to one file, under the names of the authors, and the tokenizer next to it."""
    made = load(name).pipeline
    origin = "official" if name in FLOWS else "compvis"
    prefix = "vae." if name in ("flux", "schnell") else "first_stage_model."
    networks = {"model.diffusion_model.": (made.network, origin), prefix: (made.vae, "compvis")}
    networks |= {prefix: (encoder.network, origin) for encoder, (prefix, origin) in zip(made.encoders, texts)}
    state = {
        prefix + key: x.contiguous()
        for prefix, (network, origin) in networks.items()
        for key, x in weights.translate(network.state_dict(), weights.get_tables(network)[origin], reverse=True).items()
    }
    state |= {"model_ema.decay": torch.ones(1), "betas": torch.ones(5)}
    file.parent.mkdir(exist_ok=True)
    (save_file if file.suffix == ".safetensors" else lambda x, path: torch.save({"state_dict": x}, path))(state, file)
    peers.write_clip_tokenizer(file.parent)


SINGLE = {
    "sd": [("cond_stage_model.transformer.", "huggingface")],
    "painted": [("cond_stage_model.transformer.", "huggingface")],
    "sdxl": [("conditioner.embedders.0.transformer.", "huggingface"), ("conditioner.embedders.1.model.", "openai")],
    "sd3": [(f"text_encoders.{part}.transformer.", "huggingface") for part in ("clip_l", "clip_g", "t5xxl")],
    "flux": [(f"text_encoders.{part}.transformer.", "huggingface") for part in ("clip_l", "t5xxl")],
    "schnell": [(f"text_encoders.{part}.transformer.", "huggingface") for part in ("clip_l", "t5xxl")],
}
FLOWS = {"sd3": ("text", "text_2", "text_3"), "flux": ("text", "text_3"), "schnell": ("text", "text_3")}  # parts with texts


TEXT_PARTS = ("text", "text_2", "text_3")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_files(name, suffix, tmp_path, monkeypatch):
    """Sizes are given by the width of the text's states, so those of the tiny networks take the place of the published ones."""
    made = load(name).pipeline
    write_single_file(name, tmp_path / f"model{suffix}", SINGLE[name])
    layout = single_file_pipeline.Layout("denoiser", "vae", {"text": ("text", "huggingface")}, (False,))
    parts = FLOWS.get(name, TEXT_PARTS)
    if name == "sdxl":
        layout = replace(layout, texts={**layout.texts, "text_2": ("text_2", "openai")}, pads=(False, True))
    if name in FLOWS:
        kind, variant = ("FLOW_LAYOUTS", False) if name == "sd3" else ("FLUX_LAYOUTS", name == "flux")
        published = next(layouts[variant] for layouts in getattr(single_file_pipeline, kind).values())
        assert tuple(published.texts) == parts
        texts = {part: (part, "huggingface") for part in parts}
        monkeypatch.setattr(
            single_file_pipeline, kind, {16: {variant: replace(published, denoiser="denoiser", vae="vae", texts=texts)}}
        )
        last = f"tokenizer_{len(parts)}"
        shutil.copytree(make(name)[1] / last, tmp_path / last)
    monkeypatch.setattr(single_file_pipeline, "LAYOUTS", {28 if name == "sdxl" else 16: layout})
    networks = {"denoiser": made.network, "vae": made.vae}
    networks |= {key: encoder.network for key, encoder in zip(parts, made.encoders) if encoder}

    def find_tiny(size):
        config = asdict(networks[size].config) | ({"extra": 0} if size == "denoiser" and name not in FLOWS else {})
        card = card_of(networks[size])
        return replace(card, sizes={size: Size(**config)}), size

    monkeypatch.setattr(single_file_pipeline, "find", find_tiny)
    ours = fieldguide.pipeline(tmp_path / f"model{suffix}")
    assert type(ours) is TextToImage and ours.model.config == made.network.config
    options = {"steps": 2, "height": 32, "width": 32, "guidance": 2.0, "negative": NEGATIVE, "count": 1, "seed": 3}
    options |= {"sampler": "euler"} if name not in FLOWS else {}
    options |= {"negative": ""} if parts == FLOWS["flux"] else {}
    request = ImageRequest(PROMPT, *((picture(), hole()) if name == "painted" else ()))
    found, expected = (x.generate(request, x.parse(options)) for x in (ours, load(name)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_problems_of_single_files(tmp_path):
    write_single_file("sd", tmp_path / "model.safetensors", SINGLE["sd"])
    with pytest.raises(WeightsError, match="attends to texts of width 16"):
        fieldguide.pipeline(tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="prediction_type='v' is unknown"):
        fieldguide.pipeline(tmp_path / "model.safetensors", prediction_type="v")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer found.*Set tokenizer=PATH"):
        fieldguide.pipeline(tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="tokenizer: only for single files"):
        fieldguide.pipeline(make("sd")[1], tokenizer=str(tmp_path))


def test_problems_of_single_files_of_flows(tmp_path):
    write_single_file("sd3", tmp_path / "model.safetensors", SINGLE["sd3"])
    with pytest.raises(WeightsError, match="Stable Diffusion 3 of width 16, which is unknown"):
        fieldguide.pipeline(tmp_path / "model.safetensors")


def test_single_files_without_t5(tmp_path, monkeypatch):
    """Their states are zeros, as in diffusers."""
    made = load("sd3").pipeline
    write_single_file("sd3", tmp_path / "model.safetensors", SINGLE["sd3"][:2])
    texts = {part: (part, "huggingface") for part in TEXT_PARTS}
    layout = replace(single_file_pipeline.describe_sd3("denoiser"), vae="vae", texts=texts)
    monkeypatch.setattr(single_file_pipeline, "FLOW_LAYOUTS", {16: {False: layout}})
    networks = {"denoiser": made.network, "vae": made.vae, "text": made.encoders[0].network, "text_2": made.encoders[1].network}

    def find_tiny(size):
        found = card_of(networks[size])
        return replace(found, sizes={size: Size(**asdict(networks[size].config))}), size

    monkeypatch.setattr(single_file_pipeline, "find", find_tiny)
    with pytest.raises(SettingsError, match="prediction_type: not for rectified flows"):
        fieldguide.pipeline(tmp_path / "model.safetensors", prediction_type="epsilon")
    ours, noise = fieldguide.pipeline(tmp_path / "model.safetensors"), draw("sd3")
    assert "lacks T5" in ours.get_notes()[0] and ours.pipeline.encoders[2] is None
    options = {"steps": 2, "height": 32, "width": 32}
    found = ours.generate(ImageRequest(PROMPT), ours.parse(options), noise=noise)
    monkeypatch.setattr(load("sd3").pipeline, "encoders", [*made.encoders[:2], None])
    expected = load("sd3").generate(ImageRequest(PROMPT), load("sd3").parse(options), noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    save_file(
        load_file(tmp_path / "model.safetensors") | {"text_encoders.t5xxl.transformer.shared.weight": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    networks["text_3"] = load("sd3").pipeline.network  # not reached
    with pytest.raises(WeightsError, match="no tokenizer of T5 found"):
        fieldguide.pipeline(tmp_path / "model.safetensors")


def copy_folder(name: str, folder: Path) -> Path:
    shutil.copytree(make(name)[1], folder / name)
    return folder / name


def test_problems_of_folders(tmp_path):
    folder = copy_folder("sd", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())

    def write(**changes):
        (folder / "model_index.json").write_text(json.dumps(index | changes))

    write(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert "images are not filtered" in fieldguide.pipeline(folder).get_notes()[0]
    for changes, words in (
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet.*not supported"),
        ({"vae": [None, None]}, "lists no vae"),
        ({"unet": [None, None]}, "lists neither unet nor transformer"),
        ({"tokenizer": [None, None]}, "not its tokenizer"),
        ({"text_encoder": [None, None]}, "text_encoder or its tokenizer is missing"),
    ):
        write(**changes)
        with pytest.raises(WeightsError, match=words):
            fieldguide.pipeline(folder).predict(PROMPT, steps=1, width=32, height=32)
    write()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | {"beta_schedule": "strange"}))
    with pytest.raises(SettingsError, match="beta_schedule='strange'"):
        fieldguide.pipeline(folder).predict(PROMPT, steps=1, width=32, height=32)
    scheduler.write_text(json.dumps({**settings, "_class_name": "LMSDiscreteScheduler"}))
    made = fieldguide.pipeline(folder).predict(PROMPT, steps=2, width=32, height=32)
    assert "LMSDiscreteScheduler" in made.notes[0] and "dpm-solver" in made.notes[0]
    shutil.rmtree(folder / "vae")
    with pytest.raises(WeightsError, match="lacks the folder vae"):
        fieldguide.pipeline(folder)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"width": 33}, "multiples of 2"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "pndm"}, "sampler='pndm' is unknown"),
        ({"strength": 0.5}, "only with an image"),
        ({"stepz": 5}, "Did you mean 'steps'"),
        ({"mask": "mask.png"}, "mask: only with an image"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(SettingsError, match=words):
        load("sd").predict(PROMPT, **{"steps": 1, "height": 32, **options})


def test_chosen_samplers_do_not_clip_latents():
    """The scheduler of the tiny SDXL says nothing of clipping, and that of DDIM would clip."""
    _, sampler, _ = load("sdxl").pipeline.build_sampler(2, "ddim")
    assert sampler.clip == 0 == load("sdxl").pipeline.build_sampler(2, "ddpm")[1].clip


def test_other_samplers_are_not_for_flows():
    with pytest.raises(SettingsError, match="not for rectified flows"):
        ask("sd3", draw("sd3"), sampler="ddim")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", str(make("sd")[1]), "a cat", "--set", "steps=1", "--set", "width=32", "--set", "height=48"]
    monkeypatch.setattr("sys.argv", ["fieldguide", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    with Image.open(tmp_path / "predictions" / "00001.png") as image:
        assert image.size == (32, 48)
    assert "predictions/00001.png" in capsys.readouterr().out


def test_server():
    app = build_app([LoadedModel("painter", str(make("sd")[1]), ServerSettings(), load("sd"))], ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        request = {"prompt": PROMPT, "n": 2, "seed": 3, "steps": 2, "guidance": 3.0, "negative": NEGATIVE}
        answer = client.post("/v1/images/generations", json=request | {"size": "32x48"})
        assert answer.status_code == 200, answer.text
        options = {"count": 2, "seed": 3, "steps": 2, "guidance": 3.0, "negative": NEGATIVE, "width": 32, "height": 48}
        expected = load("sd").predict(PROMPT, **options)
        images = [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]
        assert images == [record["image"].content for record in expected] and len(images) == 2
        for wrong, words in (
            ({"size": "33x32"}, "multiples of 2"),
            ({"size": "large"}, "is no size"),
            ({"image": "/etc/hosts"}, "image"),
        ):
            answer = client.post("/v1/images/generations", json=request | wrong)
            assert answer.status_code in (400, 422) and words in answer.text
        for rows, options in (([PROMPT], {"image": "/etc/hosts"}), ([{"prompt": PROMPT, "image": "/etc/hosts"}], {})):
            answer = client.post("/v1/predict", json={"rows": rows, "options": {"steps": 1} | options})
            assert answer.status_code in (400, 422), answer.text  # a request must not make the server read its files
        assert "size" in client.get("/openapi.json").text


def test_listed_pipelines():
    """The network of each pipeline in docs/checkpoints.toml has a size of its own, and its class is tested here."""
    listed = tomllib.loads((Path(__file__).parents[1] / "docs" / "checkpoints.toml").read_text("utf-8"))["pipeline"]
    tested = {type(make(name)[0]).__name__ for name in BUILD}
    rows = [(row, *find(row["size"])) for row in listed]
    rows = [(row, card, size) for row, card, size in rows if card.name not in VIDEO_FAMILIES]
    assert all(row["name"] in card.sizes[size].source and card.name in FAMILIES for row, card, size in rows)
    assert {row["class"] for row, _, _ in rows} == tested
