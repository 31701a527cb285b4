"""Latent consistency models: a step of training by the formulas of diffusers' scripts, LoRA, whole networks, and the scheduler."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffusion_pipelines as peers
import fieldguide
from fieldguide.automl.fit import NullCallback, fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.models.registry import card_of
from fieldguide.objectives import LatentConsistency
from fieldguide.objectives.diffusion import Consistency, TimeBoundary, Timesteps
from fieldguide.objectives.diffusion.scheduler_config import describe_lcm_scheduler, read_scheduler
from fieldguide.tasks.latent_diffusion.text_to_image import TextToImage
from test_task_text_to_image import QUICK, encode_by_diffusers, fit_task, write_photos
from test_text_to_image import CLOSE, PROMPT, ask, draw, load, make


def take_step_by_diffusers(peer, name, unet, teacher, pixels, captions, low, high):
    """Return loss and gradients by the formulas of `train_lcm_distill_sd_wds.py`, with draws in our order.

    With the network's `time_cond_proj_dim`, the student is told w; the scripts for LoRA tell it nothing.
    """
    found = peer.vae.encode(pixels).latent_dist
    clean = (found.mean + found.std * torch.randn(found.mean.shape)) * peer.vae.config.scaling_factor
    index = torch.randint(50, (len(clean),))
    w = (low + (high - low) * torch.rand(len(clean))) - 1
    noise = torch.randn(clean.shape)
    alphas = peer.scheduler.alphas_cumprod.double().float()
    start = (torch.arange(1, 51) * 20 - 1)[index]
    before = torch.where(start - 20 < 0, 0, start - 20)
    wide = lambda x: x.view(-1, 1, 1, 1)

    def predict(output, time, sample):
        alpha, sigma = wide(alphas[time].sqrt()), wide((1 - alphas[time]).sqrt())
        if peer.scheduler.config.prediction_type == "epsilon":
            return (sample - sigma * output) / alpha, output
        return alpha * sample - sigma * output, alpha * output + sigma * sample

    def boundary(time):
        scaled = 10.0 * time
        return wide(0.25 / (scaled**2 + 0.25)), wide(scaled / (scaled**2 + 0.25) ** 0.5)

    size = unet.config.time_cond_proj_dim
    told = {"timestep_cond": peer.get_guidance_scale_embedding(w, size)} if size else {}
    inputs, empty = (encode_by_diffusers(peer, name, texts) for texts in (captions, [""] * len(captions)))
    noisy = wide(alphas[start].sqrt()) * clean + wide((1 - alphas[start]).sqrt()) * noise
    skip, out = boundary(start)
    model_pred = skip * noisy + out * predict(unet(noisy, start, **told, **inputs).sample, start, noisy)[0]
    with torch.no_grad():
        x_cond, e_cond = predict(teacher(noisy, start, **inputs).sample, start, noisy)
        x_none, e_none = predict(teacher(noisy, start, **empty).sample, start, noisy)
        x_0, eps = x_cond + wide(w) * (x_cond - x_none), e_cond + wide(w) * (e_cond - e_none)
        x_prev = wide(alphas[before].sqrt()) * x_0 + wide((1 - alphas[before]).sqrt()) * eps
        skip, out = boundary(before)
        target = skip * x_prev + out * predict(unet(x_prev, before, **told, **inputs).sample, before, x_prev)[0]
    loss = torch.mean(torch.sqrt((model_pred - target) ** 2 + 0.001**2) - 0.001)
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sd", "v", "told", "sdxl"])
def test_a_step_equals_the_formulas_of_diffusers(name, tmp_path, monkeypatch):
    folder, source = write_photos(tmp_path / "photos", 4), "sdxl" if name == "sdxl" else "sd"
    peer, reference = make(source)[0], fieldguide.load(make(source)[1])
    low, high = (1.0, 1.02) if name == "told" else (2.0, 6.0)  # embeddings of large scales are rounded in float32: sin(1000 w)
    task = fit_task(folder, source, method="lcm", min_guidance=low, max_guidance=high)
    scheduler = peers.ddim(prediction_type="v_prediction" if name == "v" else "epsilon")
    monkeypatch.setattr(peer, "scheduler", scheduler)
    task.examples.pipeline.scheduler = describe_lcm_scheduler(dict(scheduler.config) | {"_class_name": "DDIMScheduler"})
    card, width = card_of(reference), 16 if name == "told" else 0
    torch.manual_seed(1)
    network = card.make(replace(reference.config, guidance_dim=width))
    network.load_state_dict(reference.state_dict(), strict=False)
    table = card.tables(network.config)["diffusers"]
    with torch.no_grad():  # the student differs from its teacher
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    teacher, student = peer.unet, type(peer.unet).from_config(peer.unet.config, time_cond_proj_dim=width or None).eval()
    student.load_state_dict(weights.translate(network.state_dict(), table, reverse=True))
    data = read(folder, column_spec=TextToImage.column_spec)
    batch = task.batches(data, card, Settings()).make(np.arange(3), None)
    objective = task.objective(network, card, Settings(), reference=reference)
    assert isinstance(objective, LatentConsistency) and objective.tells_guidance == (name == "told") and task.needs_reference
    torch.manual_seed(7)
    found = objective(batch)["loss"]
    found.backward()
    captions = task.get_captions(data)[:3]
    pixels = task.examples.pictures.apply(task.examples.pictures.load(data.rows[task.column].to_list()[:3]))
    torch.manual_seed(7)
    loss, grads = take_step_by_diffusers(peer, source, student, teacher, pixels, captions, low, high)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-3, atol=1e-5)
    public = weights.translate(
        {key: p.grad for key, p in network.named_parameters() if p.grad is not None}, table, reverse=True
    )
    assert public.keys() == grads.keys() and sum(g.abs().max() > 1e-5 for g in public.values()) > len(public) // 2
    for key, gradient in public.items():
        scale = grads[key].abs().max().item()
        torch.testing.assert_close(
            gradient, grads[key], rtol=5e-3, atol=5e-3 * scale + 1e-6, msg=lambda text, key=key: key + text
        )
    assert all(p.grad is None for p in reference.parameters())


def test_scheduler_of_lcm():
    known = {"_class_name": "LCMScheduler", "timestep_scaling": 8.0, "steps_offset": 1, "prediction_type": "v_prediction"}
    process, sampler = read_scheduler(known, 4)
    assert sampler == Consistency(steps=4, clip=0.0, boundary=TimeBoundary(scale=8.0), spacing=Timesteps(kind="lcm"))
    assert process.predicts == "v"
    with pytest.raises(SettingsError, match="original_inference_steps=40"):
        read_scheduler(known | {"original_inference_steps": 40}, 4)
    with pytest.raises(SettingsError, match="pipelines of discrete diffusion"):
        describe_lcm_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    written = describe_lcm_scheduler({"_class_name": "PNDMScheduler", "beta_end": 0.012, "skip_prk_steps": True})
    assert written["beta_end"] == 0.012 and written["beta_start"] == 0.0001 and "skip_prk_steps" not in written
    assert describe_lcm_scheduler(written) == written


def test_pipelines_with_this_scheduler_equal_diffusers(monkeypatch):
    """From the same noise, also that of the steps."""
    from tv import diffusers

    peer, noise = make("lcm")[0], draw("lcm")
    scheduler = diffusers.LCMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    monkeypatch.setattr(peer, "scheduler", scheduler)
    monkeypatch.setattr(load("lcm").pipeline, "scheduler", describe_lcm_scheduler(dict(scheduler.config)))
    one = ask("lcm", noise, guidance=5.0, steps=1)
    with torch.no_grad():
        expected = peer(
            PROMPT, latents=noise.clone(), output_type="pt", num_inference_steps=1, guidance_scale=5.0, height=32, width=32
        ).images
    torch.testing.assert_close(one, expected, **CLOSE)
    assert (ask("lcm", noise, guidance=5.0, steps=4) - one).abs().max() > 1e-3


@pytest.mark.slow
def test_lora_of_a_run(tmp_path):
    """LCM-LoRA: the run takes few steps without guidance, with the scheduler that its folder names; its LoRA has public names."""
    folder = write_photos(tmp_path / "photos", 12)
    settings = QUICK | {"task.method": "lcm", "lora_rank": 3, "steps": 2, "task.max_guidance": 8.0}
    run = fit(
        folder, task="text-to-image", weights=make("sd")[1], settings=settings, out=tmp_path / "run", callback=NullCallback()
    )
    public = {key.rpartition(".lora_")[0] for key in load_file(run.path / "pytorch_lora_weights.safetensors")}
    assert public and all(key.startswith("unet.") for key in public)
    saved = json.loads((run.path / "preprocess/pipeline/scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"] == "LCMScheduler" and saved["beta_schedule"] == "scaled_linear"
    moved, calls = fieldguide.open_run(shutil.copytree(run.path, tmp_path / "moved")), []
    moved.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(kwargs["latent"])), with_kwargs=True)
    first = moved.predict(["a red cat"], count=1)
    assert calls == [1] * 4 and moved.predict(["a red cat"], count=1) == first
    assert moved.objective.frozen_teacher == () and moved.scores["held_out_loss"] > 0


@pytest.mark.slow
def test_whole_networks_are_told_the_guidance(tmp_path):
    folder = write_photos(tmp_path / "photos", 12)
    settings = QUICK | {"task.method": "lcm", "finetune": "whole", "steps": 2, "model.guidance_dim": 16}
    run = fit(
        folder, task="text-to-image", weights=make("sd")[1], settings=settings, out=tmp_path / "run", callback=NullCallback()
    )
    assert run.config.guidance_dim == 16 and run.model.guidance is not None and run.objective.tells_guidance
    scales = []
    run.model.register_forward_pre_hook(
        lambda module, args, kwargs: scales.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    run.predict(["a red cat"], count=1, steps=1), run.predict(["a red cat"], count=1, steps=1, guidance=3.0)
    assert scales == [[7.5], [3.0]]


def test_impossible_requests(tmp_path):
    folder = write_photos(tmp_path / "photos", 6)
    for options, message in (
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"method": "lcm", "weighting": "min-snr"}, "options of task.method=diffusion"),
        ({"method": "lcm", "min_guidance": 9.0, "max_guidance": 8.0}, "is above task.max_guidance"),
    ):
        with pytest.raises(SettingsError, match=message):
            fit_task(folder, "sd", **options)
    with pytest.raises(SettingsError, match="pipelines of discrete diffusion"):
        fit_task(folder, "sd3", method="lcm")
    with pytest.raises(SettingsError, match="can be no teacher"):
        fit_task(folder, "lcm", method="lcm")
