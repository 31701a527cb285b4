"""Text-to-video: folders of diffusers' pipelines give the same frames for the same noise."""

from __future__ import annotations

import base64
import functools
import importlib
import io
import json
import shutil
import tempfile
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import diffusion_pipelines as peers
import fieldguide
from fieldguide.checkpoints.pipeline_parts import read_pipeline
from fieldguide.cli import commands as cli
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.signature import Signature
from fieldguide.inference.text_to_video import TextToVideo
from fieldguide.models.registry import find
from fieldguide.objectives.noise import Noise
from fieldguide.serving.app import build_app
from fieldguide.serving.models import LoadedModel
from fieldguide.serving.settings import ServerSettings
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import VIDEO_FAMILIES, check_family
from fieldguide.tasks.latent_diffusion.video_generation import VideoRequest

PROMPT, NEGATIVE = "A cat, the &amp;  dog of", "the dog"
CLOSE = {"rtol": 0, "atol": 1e-4}


def published_wan():
    """Return Wan with the scheduler of its published files."""
    from tv import diffusers

    return peers.wan(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))


BUILD = {
    "wan": peers.wan,
    "wan-unipc": published_wan,
    "cogvideox": peers.cogvideox,
    "cogvideox-rotary": functools.partial(peers.cogvideox, rotary=True, shift=1.0),
    "cogvideox-image": functools.partial(peers.cogvideox, rotary=True, shift=1.0, kind="CogVideoXImageToVideoPipeline"),
}
IMAGE_TO_VIDEO = ("cogvideox-image",)
TINY = {"steps": 3, "frames": 9, "width": 32, "height": 16}


@functools.cache
def make(name: str):
    """Return a pipeline of diffusers and the folder that it wrote."""
    peer, folder = BUILD[name](), Path(tempfile.mkdtemp()) / name
    peer.save_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    return peer, folder


@functools.cache
def load(name: str) -> TextToVideo:
    return fieldguide.pipeline(make(name)[1])


def draw(frames: int = 9, name: str = "") -> torch.Tensor:  # 1 f C h w
    columns = 6 if name in IMAGE_TO_VIDEO else 8  # stored positions have one size
    return torch.randn(1, 1 + (frames - 1) // 4, 3, 4, columns, generator=torch.Generator().manual_seed(0))


def picture(turned: int = 0) -> Image.Image:
    """Return an image of another size than the videos."""
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((40, 22), Image.Resampling.BICUBIC).rotate(turned)


@pytest.fixture(autouse=True)
def latents_are_means(monkeypatch):
    """diffusers draws the latents of a given image at random."""
    importlib.import_module("tv")  # before diffusers
    distribution = importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self, generator=None: self.mode())


def ask(name: str, noise, prompt: str = PROMPT, **options):
    """Return our video, 0 to 1: F 3 H W."""
    predictor, frames = load(name), 4 * (noise.shape[1] - 1) + 1
    request = VideoRequest(prompt, picture() if name in IMAGE_TO_VIDEO else None)
    chosen = predictor.parse(TINY | {"frames": frames, "width": 4 * noise.shape[4]} | options)
    return predictor.generate(request, chosen, noise=noise) / 2 + 0.5


def ask_peer(name: str, noise, prompt: str = PROMPT, **options):
    """Return the video of diffusers."""
    options = {
        "num_inference_steps": 3,
        "num_frames": 4 * (noise.shape[1] - 1) + 1,
        "height": 16,
        "width": 4 * noise.shape[4],
    } | options
    options |= {"max_sequence_length": 12} if name.startswith("cogvideox") else {}
    options |= {"image": picture()} if name in IMAGE_TO_VIDEO else {}
    latents = noise.transpose(1, 2) if name.startswith("wan") else noise
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(name)[0](prompt=prompt, latents=latents.clone(), output_type="pt", **options).frames[0]


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("name", BUILD)
def test_videos_equal_diffusers(name, frames):
    noise = draw(frames, name)
    expected, found = ask_peer(name, noise), ask(name, noise)
    assert found.shape == expected.shape == (frames, 3, 16, 4 * noise.shape[4])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert expected.std() > 0.02 and (ask(name, noise, prompt="dog") - found).abs().max() > 1e-3


def test_images_begin_videos(tmp_path):
    """Of a path or Pillow's; the network needs one, and others have none."""
    ours, noise = load("cogvideox-image"), draw(9, "cogvideox-image")
    options = ours.parse(TINY | {"width": 24})
    found = ours.generate(VideoRequest(PROMPT, picture()), options, noise=noise)
    assert (found - ours.generate(VideoRequest(PROMPT, picture(90)), options, noise=noise)).abs().max() > 1e-2
    picture().save(tmp_path / "image.png")
    whole = {**TINY, "width": 24}
    made = ours.predict([{"prompt": PROMPT, "image": str(tmp_path / "image.png")}], **whole)
    assert made[0]["video"] == ours.predict(PROMPT, image=picture(), **whole)[0]["video"]
    with pytest.raises(SettingsError, match=r"begins videos with an image\. Set image"):
        ours.predict(PROMPT, **whole)
    with pytest.raises(SettingsError, match="begins videos with noise only"):
        load("cogvideox").predict(PROMPT, image=picture(), **TINY)
    with pytest.raises(DataError, match="the latents have 4 x 8 elements, but the stored positions are for 4 x 6"):
        ours.predict(PROMPT, image=picture(), **TINY)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_guidance_and_negative_prompts(name):
    noise, options = draw(), {"negative_prompt": NEGATIVE, "guidance_scale": 2.0}
    found = ask(name, noise, negative=NEGATIVE, guidance=2.0)
    torch.testing.assert_close(found, ask_peer(name, noise, **options), **CLOSE)
    assert (found - ask(name, noise, guidance=2.0)).abs().max() > 1e-4
    plain = ask(name, noise, negative=NEGATIVE, guidance=1.0)  # without guidance
    torch.testing.assert_close(plain, ask_peer(name, noise, guidance_scale=1.0), **CLOSE)


def test_defaults_are_those_of_the_published_pipelines():
    """diffusers' defaults of a call, and of the sizes of the networks."""
    assert load("wan").parse({}).steps == 50 and load("wan").parse({}).guidance == 5.0
    assert load("wan").pipeline.size == (832, 480) and load("wan").pipeline.frames == 81
    assert load("cogvideox").parse({}).guidance == 6.0 and load("cogvideox").pipeline.size == (24, 16)
    assert load("cogvideox").pipeline.frames == 9


def read_frames(content: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(content)) as video:
        return [copy_frame(video, i) for i in range(video.n_frames)]


def copy_frame(video: Image.Image, number: int) -> Image.Image:
    video.seek(number)
    return video.convert("RGB")


def test_predict_writes_videos():
    made = load("wan").predict([PROMPT, "dog"], count=2, seed=3, frames_per_second=10, **TINY)
    assert [record["input"] for record in made] == [PROMPT, PROMPT, "dog", "dog"] and not made.notes
    contents = [record["video"].content for record in made]
    assert made[0]["video"].suffix == ".webp" and len(set(contents)) == 4
    again = load("wan").predict({"prompt": PROMPT}, num_videos_per_prompt=2, seed=3, fps=10, **TINY)
    assert contents[:2] == [record["video"].content for record in again]
    frames = read_frames(contents[0])
    assert len(frames) == 9 and frames[0].size == (32 * 6, 16 * 6)  # small videos are enlarged
    noise = Noise(3, [0], (3, 3, 4, 8), torch.empty(0))()
    pixels = ask("wan", noise)[0].permute(1, 2, 0)
    shown = torch.from_numpy(np.array(frames[0].resize((32, 16), Image.Resampling.NEAREST), dtype=np.float32)) / 255
    torch.testing.assert_close(shown, pixels, rtol=0, atol=1 / 255)


def test_frames_of_long_prompts_are_noted():
    noise, prompt = draw(1), "the cat of the dog, " * 10
    made = load("cogvideox").predict([prompt], **TINY | {"frames": 1, "steps": 1})
    assert "truncated to 12 tokens" in made.notes[-1]
    torch.testing.assert_close(ask("cogvideox", noise, prompt), ask_peer("cogvideox", noise, prompt), **CLOSE)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wan", {"width": 20}, "width=20, height=16: both must be multiples of 8 for wan"),
        ("wan", {"frames": 4}, "frames=4: must be one more than a multiple of 4 for wan"),
        ("cogvideox", {"frames": 5}, "frames=5: must be one more than a multiple of 8 for cogvideox"),
        ("wan", {"frames": 0}, "frames"),
        ("wan", {"sampler": "ddim"}, "sampler"),
    ],
)
def test_wrong_options(name, options, words):
    with pytest.raises(SettingsError, match=words):
        load(name).predict(PROMPT, **TINY | options)


def test_wrong_prompts():
    with pytest.raises(SettingsError, match="no prompt"):
        load("wan").predict([])
    for value in (3, {"prompt": 3}, {"prompt": "a", "mask": "b"}):
        with pytest.raises(DataError, match="no prompt: give a text"):
            load("wan").predict([value])


def change(folder: Path, target: Path, file: str, **changes) -> Path:
    """Return a copy of a folder with other settings in a file."""
    shutil.copytree(folder, target)
    settings = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({k: v for k, v in {**settings, **changes}.items() if v is not ...}))
    return target


def test_other_pipelines_are_rejected(tmp_path):
    folder = make("wan")[1]
    wrong = change(folder, tmp_path / "expanded", "model_index.json", expand_timesteps=True)
    with pytest.raises(WeightsError, match="expand_timesteps=True is not supported"):
        fieldguide.pipeline(wrong)
    wrong = change(folder, tmp_path / "two", "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(WeightsError, match="transformer_2"):
        fieldguide.pipeline(wrong)
    peer = peers.wan(in_channels=7)
    peer.save_pretrained(tmp_path / "image")
    with pytest.raises(WeightsError, match="begins videos with a given image"):
        fieldguide.pipeline(tmp_path / "image")
    with pytest.raises(SettingsError, match="tokenizer"):
        fieldguide.pipeline(folder, tokenizer="x")


def test_samplers_that_are_not_supported_are_replaced(tmp_path):
    """By the sampler of the same settings."""
    folder, noise = make("cogvideox")[1], draw()
    other = change(folder, tmp_path / "dpm", "scheduler/scheduler_config.json", _class_name="CogVideoXDPMScheduler")
    ours, notes = fieldguide.pipeline(other), list[str]()
    found = ours.generate(VideoRequest(PROMPT), ours.parse(TINY), noise=noise, notes=notes) / 2 + 0.5
    assert "CogVideoXDPMScheduler" in notes[0] and "CogVideoXDDIMScheduler is used in its place" in notes[0]
    assert torch.equal(found, ask("cogvideox", noise))


def test_video_networks_are_not_trained_as_image_pipelines():
    with pytest.raises(WeightsError, match="with the network wan is not supported"):
        check_family(load("wan").card, read_pipeline(make("wan")[1]))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_signatures(name):
    predictor = load(name)
    signature, network = predictor.signature, predictor.model
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    assert signature.task == "text-to-video" and [field.name for field in signature.inputs] == ["prompt"]
    options = {option.name: option for option in signature.options}
    assert options["steps"].default == 50 and options["guidance"].default == predictor.parse({}).guidance
    width, height = predictor.pipeline.size
    assert (options["width"].default, options["height"].default) == (width, height)
    assert options["frames"].default == predictor.pipeline.frames and options["frames_per_second"].default in (8, 16)
    assert set(options) <= vars(predictor.parse({})).keys()
    if name == "wan":  # whose latents have the published size here
        return
    batch = signature.example_batch(
        2, {axis: max(8, size.least) for axis, size in signature.dynamic_axes.items() if axis != "batch"}
    )
    with torch.no_grad():
        assert network(**batch).shape == batch["latent"].shape


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]
    monkeypatch.setattr("sys.argv", ["fieldguide", "predict", str(make("wan")[1]), "a cat", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert len(read_frames((tmp_path / "predictions" / "00001.webp").read_bytes())) == 9
    assert "predictions/00001.webp" in capsys.readouterr().out


def test_server():
    app = build_app([LoadedModel("film", str(make("wan")[1]), ServerSettings(), load("wan"))], ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/predict", json={"rows": [{"prompt": PROMPT}], "options": {"seed": 3, **TINY}})
        assert answer.status_code == 200, answer.text
        (record,) = answer.json()["predictions"]
        kind, content = record["video"].removeprefix("data:").split(";base64,")
        expected = load("wan").predict(PROMPT, seed=3, **TINY)[0]["video"].content
        assert kind == "image/webp" and base64.b64decode(content) == expected
        answer = client.post("/v1/predict", json={"rows": [{"prompt": PROMPT}], "options": TINY | {"frames": 2}})
        assert answer.status_code in (400, 422) and "one more than a multiple of 4" in answer.text


def test_listed_pipelines():
    """The network of each pipeline in docs/checkpoints.toml has a size of its own, and its class is tested here."""
    listed = tomllib.loads((Path(__file__).parents[1] / "docs" / "checkpoints.toml").read_text("utf-8"))["pipeline"]
    rows = [(row, *find(row["size"])) for row in listed]
    rows = [(row, card, size) for row, card, size in rows if card.name in VIDEO_FAMILIES]
    assert all(row["name"] in card.sizes[size].source for row, card, size in rows)
    assert {row["class"] for row, _, _ in rows} == {type(make(name)[0]).__name__ for name in BUILD}
