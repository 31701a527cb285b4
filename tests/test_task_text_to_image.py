"""Training of text-to-image pipelines: loss and gradients of diffusers' recipes, runs from folders, LoRA files, DreamBooth."""

from __future__ import annotations

import functools
import io
import json
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import diffusion_pipelines as peers
import fieldguide
from fieldguide.automl.fit import NullCallback, fit, resume
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.models.registry import card_of
from fieldguide.objectives.diffusion import LatentDiffusion
from fieldguide.tasks.latent_diffusion.text_to_image import TextToImage
from fieldguide.training.state import Interrupted
from test_text_to_image import make

COLORS = {"a red cat": (220, 30, 30), "the blue dog of it": (30, 30, 220)}
LEARNING_STEPS = 300
QUICK = {"steps": 4, "batch_size": 2, "eval_steps": 2, "precision": "float32"}


def write_photos(folder: Path, count: int, captioned: bool = True) -> Path:
    """Write noisy images of 40 x 36 pixels in two colors, with a caption next to each."""
    folder.mkdir(parents=True)
    rng, captions = np.random.default_rng(0), list(COLORS)
    for i in range(count):
        caption = captions[i % 2]
        pixels = np.array(COLORS[caption]) + rng.integers(-20, 20, (40, 36, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        if captioned:
            (folder / f"{i}.txt").write_text(caption)
    return folder


def fit_task(folder: Path, name: str, **options) -> TextToImage:
    """Return the task fitted on photos for a pipeline."""
    data = read(folder, column_spec=TextToImage.column_spec)
    return TextToImage.fit(data, TextToImage.options_from({"pipeline": str(make(name)[1]), "side": 32, **options}))


# One step equals the scripts of diffusers


def encode_by_diffusers(peer, name: str, captions: list[str]) -> dict[str, torch.Tensor]:
    """Return what diffusers' pipelines give their networks besides latents and time."""
    more = {"prompt_2": captions, "prompt_3": captions} if name == "sd3" else {}
    found = peer.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **more)
    if name == "sdxl":
        sizes = torch.tensor([[32, 32, 0, 0, 32, 32]] * len(captions))
        return {"encoder_hidden_states": found[0], "added_cond_kwargs": {"text_embeds": found[2], "time_ids": sizes}}
    if name == "sd3":
        return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
    return {"encoder_hidden_states": found[0]}


def take_step_by_diffusers(peer, name: str, pixels, captions):
    """Return the loss of `train_text_to_image_lora*.py` and `train_dreambooth_lora_sd3.py`, with draws in our order."""
    from tv import diffusers

    vae, network = peer.vae, peer.transformer if name == "sd3" else peer.unet
    network.zero_grad()
    found = vae.encode(pixels).latent_dist
    clean = (
        found.mean + found.std * torch.randn(found.mean.shape) - (vae.config.shift_factor or 0)
    ) * vae.config.scaling_factor
    inputs = encode_by_diffusers(peer, name, captions)
    if name == "sd3":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(peer.scheduler.config)
        share = torch.sigmoid(torch.randn(len(clean)))
        shift = scheduler.config.shift
        sigma = (shift * share / (1 + (shift - 1) * share)).view(-1, 1, 1, 1)  # as the scheduler shifts its sigmas
        noise = torch.randn(clean.shape)
        output = network((1 - sigma) * clean + sigma * noise, timestep=1000 * sigma.flatten(), **inputs, return_dict=False)[0]
        target = noise - clean
    else:
        scheduler = diffusers.DDPMScheduler.from_config(peer.scheduler.config)
        time = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
        noise = torch.randn(clean.shape)
        output = network(scheduler.add_noise(clean, noise, time), time, **inputs, return_dict=False)[0]
        predicts = scheduler.config.prediction_type
        target = noise if predicts == "epsilon" else scheduler.get_velocity(clean, noise, time)
    loss = F.mse_loss(output.float(), target.float(), reduction="mean")
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sd", "v", "sdxl", "sd3"])
def test_a_step_equals_diffusers(name, tmp_path, monkeypatch):
    folder, source = write_photos(tmp_path / "photos", 4), "sd" if name == "v" else name
    peer, task, network = make(source)[0], fit_task(folder, source), fieldguide.load(make(source)[1])
    card = card_of(network)
    if name == "v":
        monkeypatch.setattr(peer, "scheduler", peers.ddim(prediction_type="v_prediction"))
        task.examples.pipeline.scheduler = {**task.examples.pipeline.scheduler, "prediction_type": "v_prediction"}
    data = read(folder, column_spec=TextToImage.column_spec)
    batch = task.batches(data, card, Settings()).make(np.arange(3), None)
    objective = task.objective(network, card, Settings())
    torch.manual_seed(7)
    found = objective(batch)["loss"]
    found.backward()
    paths, captions = data.rows[task.column].to_list()[:3], task.get_captions(data)[:3]
    pixels = task.examples.pictures.apply(task.examples.pictures.load(paths))
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, grads = take_step_by_diffusers(peer, name, pixels, captions)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-4, atol=1e-5)
    ours = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    table = card.tables(network.config)["diffusers"]
    public = weights.translate(ours, table, reverse=True)
    for key, gradient in public.items():
        torch.testing.assert_close(gradient, grads[key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert public.keys() == grads.keys() and sum(g.abs().max() > 1e-4 for g in public.values()) > len(public) // 2


def test_prior_preservation(tmp_path):
    """Equation 2 of DreamBooth: the loss of the subject plus lambda times that of the class, each a mean."""
    class_images = write_photos(tmp_path / "class", 3, captioned=False)
    options = {"prompt": "a sks cat", "class_images": str(class_images), "class_prompt": "a cat", "prior_weight": 0.3}
    folder = write_photos(tmp_path / "photos", 4, captioned=False)
    task, network = fit_task(folder, "sd", **options), fieldguide.load(make("sd")[1])
    card, data = card_of(network), read(folder, column_spec=TextToImage.column_spec)
    batch = task.train_batches(data, card, Settings()).make(np.arange(2), torch.Generator().manual_seed(0))
    assert batch["is_prior"].tolist() == [False, False, True, True]
    assert torch.equal(batch["text"][0], batch["text"][1]) and torch.equal(batch["text"][2], batch["text"][3])
    assert not torch.equal(batch["text"][0], batch["text"][2])
    known = task.examples.make([str(p) for p in sorted(class_images.glob("*.png"))], ["a cat"] * 3)
    assert all(any(torch.equal(mean, one) for one in known["mean"]) for mean in batch["mean"][2:])
    objective = task.objective(network, card, Settings())
    torch.manual_seed(3)
    found = objective(batch)
    torch.manual_seed(3)
    clean = batch["mean"] + batch["deviation"] * torch.randn_like(batch["mean"])
    time, noise = torch.randint(1000, (4,)), torch.randn_like(clean)
    alpha = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), dtype=torch.float32)[time]
    noisy = alpha.sqrt().view(-1, 1, 1, 1) * clean + (1 - alpha).sqrt().view(-1, 1, 1, 1) * noise
    errors = (network(noisy, time.float(), batch["text"]) - noise) ** 2
    torch.testing.assert_close(found["loss"], errors[:2].mean() + 0.3 * errors[2:].mean())
    plain = LatentDiffusion(network, objective.process, inputs=("text",)).outputs({k: v[:2] for k, v in batch.items()})
    assert plain["loss"].shape == (2,)


# Runs


@functools.cache
def made_run(root: Path):
    folder = write_photos(root / "photos", 12)
    settings = QUICK | {"lora_rank": 3, "lr": 0.01}
    return fit(
        folder, task="text-to-image", weights=make("sd")[1], settings=settings, out=root / "run", callback=NullCallback()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("text_to_image"))


def decode(record) -> np.ndarray:
    """Return the pixels of a predicted image."""
    return np.asarray(Image.open(io.BytesIO(record["image"].content))).astype(int)


def test_a_run_predicts_without_its_pipeline(run, tmp_path):
    """The frozen networks belong to the run; its images are those of the pipeline with its LoRA."""
    moved = shutil.copytree(run.path, tmp_path / "moved")
    copy = fieldguide.pipeline(moved)
    found = copy.predict(["a red cat", "dog"], steps=2, count=2)
    assert [record["prompt"] for record in found] == ["a red cat"] * 2 + ["dog"] * 2
    assert len({record["image"].content for record in found}) == 4
    merged = fieldguide.pipeline(make("sd")[1], lora=str(run.path))
    expected = merged.predict(["a red cat", "dog"], steps=2, count=2, width=32, height=32)
    for one, other in zip(found, expected):  # the sum of a weight and its update is rounded in another order
        assert np.abs(decode(one) - decode(other)).max() <= 1
    without = fieldguide.pipeline(make("sd")[1]).predict("a red cat", steps=2, width=32, height=32)
    assert np.abs(decode(without[0]) - decode(found[0])).max() > 3
    assert copy.predict(steps=1)[0]["prompt"] in COLORS  # without input, captions of the training images
    with pytest.raises(DataError, match="is no prompt"):
        copy.predict([3])
    scores = run.record["scores"]
    assert run.scores.keys() == {"held_out_loss"} and scores["baselines"][0]["name"] == "pipeline before"
    assert copy.signature.task == "text-to-image" and copy.signature.inputs[0].name == "prompt"
    assert "Generated images" in (run.path / "report.html").read_text()


def test_lora_files_have_the_names_of_diffusers(run):
    from tv import diffusers

    factors = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert all(x.shape[0 if "lora_A" in key else 1] == 3 for key, x in factors.items())
    theirs = dict(make("sd")[0].unet.named_parameters())
    ours = weights.translate(run.model.state_dict(), run.card.tables(run.config)["diffusers"], reverse=True)
    changed = {key for key, x in theirs.items() if not torch.equal(x, ours[key])}
    modules = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in factors}
    assert changed == {f"{module}.weight" for module in modules} and len(changed) > 20
    for module in modules:
        up, down = (factors[f"unet.{module}.lora_{side}.weight"].flatten(1) for side in "BA")
        update = (up @ down).view_as(theirs[f"{module}.weight"])
        torch.testing.assert_close(theirs[f"{module}.weight"] + update, ours[f"{module}.weight"], rtol=0, atol=1e-6)
    found = diffusers.StableDiffusionPipeline.lora_state_dict(str(run.path))
    assert (found[0] if isinstance(found, tuple) else found).keys() == factors.keys()


def test_diffusers_loads_the_lora(run):
    pytest.importorskip("peft")
    from tv import diffusers

    peer = diffusers.StableDiffusionPipeline.from_pretrained(make("sd")[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.load_lora_weights(str(run.path))
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = peer.unet(x, torch.tensor([7, 900]), text).sample
        found, before = (model(x, torch.tensor([7.0, 900.0]), text) for model in (run.model, fieldguide.load(make("sd")[1])))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


class StopAt(NullCallback):
    def on_step(self, step, losses):
        if step == 2:
            signal.raise_signal(signal.SIGINT)


def test_a_stopped_run_goes_on_exactly(run, tmp_path):
    folder = run.path.parent / "photos"
    settings = QUICK | {"lora_rank": 3, "lr": 0.01}
    with pytest.raises(Interrupted):
        fit(folder, task="text-to-image", weights=make("sd")[1], settings=settings, out=tmp_path / "run", callback=StopAt())
    again = resume(tmp_path / "run", callback=NullCallback())
    for key, x in run.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[key]), key


def test_dreambooth_from_a_few_photos(tmp_path):
    photos = write_photos(tmp_path / "photos", 5, captioned=False)
    class_images = write_photos(tmp_path / "class", 3, captioned=False)
    settings = QUICK | {"task.prompt": "a photo of sks cat", "refit": True}
    settings |= {"task.class_images": str(class_images), "task.class_prompt": "a cat", "task.prior_weight": 0.5}
    made = fit(
        photos,
        task="text-to-image",
        weights=make("sdxl")[1],
        settings=settings,
        out=tmp_path / "run",
        callback=NullCallback(),
    )
    assert made.record["refit"]["rows"] == 4
    losses = [line for line in made.losses() if "prior" in line]
    assert losses and losses[0]["loss"] == pytest.approx(losses[0]["subject"] + 0.5 * losses[0]["prior"], rel=1e-3)
    assert made.predict(steps=1)[0]["prompt"] == "a photo of sks cat"
    assert any("transformer_blocks" in key for key in load_file(made.path / "pytorch_lora_weights.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_loras_of_transformers(name, tmp_path):
    """Networks of other families train, and what they write is what the pipeline merges."""
    folder = write_photos(tmp_path / "photos", 6)
    settings = QUICK | {"lr": 0.01, "steps": 2}
    made = fit(
        folder, task="text-to-image", weights=make(name)[1], settings=settings, out=tmp_path / "run", callback=NullCallback()
    )
    merged, before = fieldguide.pipeline(make(name)[1], lora=str(tmp_path / "run")).model, fieldguide.load(make(name)[1])
    for key, x in made.model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], x, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert any(not torch.equal(x, made.model.state_dict()[key]) for key, x in before.state_dict().items())
    assert json.loads((tmp_path / "run/preprocess/pipeline/model_index.json").read_text())["_class_name"]


@pytest.mark.slow
def test_a_tiny_network_learns_its_images(tmp_path):
    """Training of the whole network on the latents of two images removes most of the loss."""
    folder = write_photos(tmp_path / "photos", 2)
    task, network = fit_task(folder, "sd"), fieldguide.load(make("sd")[1]).train()
    data = read(folder, column_spec=TextToImage.column_spec)
    batch = task.batches(data, card_of(network), Settings()).make(np.arange(2).repeat(6), None)
    pattern = torch.ones(4, 16, 16)
    pattern[:2, :, 8:], pattern[2:, 8:] = -1, -1
    real = torch.stack([pattern, -pattern])  # those of an untrained autoencoder hardly differ
    batch |= {"mean": real.repeat_interleave(6, 0), "deviation": torch.zeros(12, 4, 16, 16)}
    objective, losses = task.objective(network, card_of(network), Settings()), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    torch.manual_seed(0)
    for step in range(LEARNING_STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / LEARNING_STEPS)
        loss = objective(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-50:]) < 0.3 * np.mean(losses[:5])


def test_wrong_requests(tmp_path):
    bare, captioned = write_photos(tmp_path / "bare", 6, captioned=False), write_photos(tmp_path / "captioned", 6)
    start = lambda folder, pipeline="sd", **options: fit(
        folder,
        task="text-to-image",
        weights=make(pipeline)[1] if pipeline else None,
        settings=QUICK | {f"task.{key}": value for key, value in options.items()},
        out=tmp_path / "run",
        callback=NullCallback(),
    )
    with pytest.raises(DataError, match="has no captions"):
        start(bare)
    with pytest.raises(SettingsError, match="--weights FOLDER"):
        start(captioned, pipeline=None)
    with pytest.raises(SettingsError, match="side=33 must be a multiple of 2"):
        start(captioned, side=33)
    with pytest.raises(SettingsError, match="belong together"):
        start(captioned, class_prompt="a cat")
    with pytest.raises(SettingsError, match="Training it is not supported"):
        start(captioned, pipeline="painted")
    with pytest.raises(SettingsError, match="weighting='other' is unknown"):
        start(captioned, weighting="other")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError):
        start(captioned, class_images=str(tmp_path / "none"), class_prompt="a cat")
