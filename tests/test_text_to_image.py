"""Text-to-image: folders of diffusers' pipelines give the same images for the same noise."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffusion_pipelines as peers
import fieldguide
from fieldguide.cli import commands as cli
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.inference.diffusion_pipeline import CHOICES
from fieldguide.inference.text_to_image import ImageRequest, TextToImage

PROMPT, NEGATIVE = "A cat, the dog of", "the dog"
CLOSE = {"rtol": 0, "atol": 1e-4}
BUILD = {
    "sd": peers.stable_diffusion,
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


@pytest.mark.parametrize("name", BUILD)
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


def test_noise_depends_on_seed_and_number_only():
    options = {"steps": 1, "width": 32, "height": 32}
    pictures = [record["image"].content for record in load("sd").predict([PROMPT, PROMPT], count=2, seed=3, **options)]
    assert len(set(pictures)) == 4
    assert load("sd").predict(PROMPT, seed=3, **options)[0]["image"].content == pictures[0]
    assert load("sd").predict(PROMPT, seed=4, **options)[0]["image"].content != pictures[0]
    assert [record["input"] for record in load("sd").predict([PROMPT, "x"], **options)] == [PROMPT, "x"]


def test_tokenizer_of_clip(tmp_path):
    peers.write_clip_tokenizer(tmp_path, pad="!")
    ours, theirs = TextTokenizer.load(tmp_path), peers.clip_tokenizer("!")
    for text in ("A cat's  of THE cat!!  ", "naïve 123 éÉ 你好 <|endoftext|> x", "", "don't I'll we've; 5.0%", " 's"):
        assert ours.tokenizer.encode(text).ids == theirs(text).input_ids
    assert ours.pad == theirs.pad_token_id == 0 and ours.decode(ours.tokenizer.encode("a cat of").ids) == "a cat of"


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
        ({"sampler": "pndm"}, "sampler='pndm' is unknown"),
        ({"strength": 0.5}, "only with an image"),
        ({"stepz": 5}, "Did you mean 'steps'"),
        ({"mask": "mask.png"}, "mask: only with an image"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(SettingsError, match=words):
        load("sd").predict(PROMPT, **{"steps": 1, "height": 32, **options})


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
