"""Samplers and `scheduler_config.json` against the schedulers of diffusers, call by call of the network, in float64.

What the network receives is compared, so that it does not matter that some schedulers scale x by the signal.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.diffusion import (
    DDIM,
    DDPM,
    DiscreteProcess,
    DPMSolver,
    EDMProcess,
    Euler,
    FlowProcess,
    FlowTimes,
    Guidance,
    Heun,
    LogitNormalTimes,
    LogNormalNoise,
    MinSNR,
    SigmaSpacing,
    SigmoidSNR,
    Timesteps,
    Uniform,
    UniformTimes,
    build_process,
    evaluate,
    sample,
    spacing,
)
from fieldguide.objectives.diffusion.loss_weighting import WEIGHTINGS
from fieldguide.objectives.diffusion.noise_process import PROCESSES
from fieldguide.objectives.diffusion.scheduler_config import DEFAULTS, SAMPLERS, read_process, read_scheduler
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.vision.image_generation_sampling import build_sampler
from fieldguide.tasks.vision.signature import SAMPLERS as SAMPLER_NAMES
from fieldguide.tasks.vision.video_generation import VideoGeneration
from tv import diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch's tensors in diffusers


class Doubled:
    """A module of which float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def double(monkeypatch):
    """Let the schedulers of diffusers compute in float64."""
    torch.set_default_dtype(torch.float64)
    for name in SAMPLERS:
        module = importlib.import_module(getattr(diffusers, name).__module__)
        for attribute, plain in (("torch", torch), ("np", np)):
            if getattr(module, attribute, None) is plain:
                monkeypatch.setattr(module, attribute, Doubled(plain))
    yield
    torch.set_default_dtype(torch.float32)


class Wavy(nn.Module):
    """An arbitrary smooth network that keeps what it receives."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.scale, self.channels = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), channels
        self.calls: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # B C ..., B, B -> B C ... or twice the channels
        self.calls.append((x.clone(), float(time[0])))
        shape = (-1, *[1] * (x.ndim - 1))
        out = self.scale * torch.tanh(x + x.flip(-1) / 2) + 0.3 * torch.sin(time.double() / 100 + label).view(shape)
        return torch.cat([out, torch.sin(3 * out)], 1) if self.channels == 2 else out


SHAPE, LABEL = (2, 3, 4), torch.tensor([0, 1, 2])


def run_peer(config: dict, steps: int, model: Wavy, dtype=torch.float64, **options) -> Tensor:
    """Return the sample of a scheduler of diffusers as its pipelines call it, with our noise."""
    kind = getattr(diffusers, config["_class_name"])
    peer = kind(**{key: value for key, value in config.items() if not key.startswith("_")})
    draw = Noise(5, range(len(LABEL)), SHAPE, torch.zeros((), dtype=dtype))
    module = importlib.import_module(kind.__module__)
    if hasattr(module, "randn_tensor"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "randn_tensor", lambda *_, **__: draw())
            return walk(peer, steps, model, draw(), **options)
    return walk(peer, steps, model, draw(), **options)


def walk(peer, steps: int, model: Wavy, x: Tensor, times: dict | None = None, **options) -> Tensor:
    peer.set_timesteps(steps, **(times or {})) if not times or "sigmas" not in times else peer.set_timesteps(**times)
    x = x * getattr(peer, "init_noise_sigma", 1.0)
    for t in peer.timesteps:
        seen = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
        with torch.no_grad():
            x = peer.step(model(seen, t.expand(len(x)), LABEL), t, x, **options).prev_sample
    return x


def compare(
    config: dict, steps: int, *, channels: int = 1, tokens: int = 0, kind: str | None = None, tolerance=1e-7, **options
):
    """Compare complete runs: what the network receives in each call, and the sample."""
    ours, theirs = Wavy(channels), Wavy(channels)
    process, sampler = read_scheduler(config, steps, kind)
    if tokens:
        sampler = replace(sampler, spacing=sampler.spacing.with_tokens(tokens))
    made = sample(ours, process, sampler, LABEL, SHAPE, seed=5)
    wanted = run_peer(config, steps, theirs, **options)
    assert len(ours.calls) == len(theirs.calls)
    for i, ((x, time), (y, wanted_time)) in enumerate(zip(ours.calls, theirs.calls)):
        assert time == pytest.approx(wanted_time, rel=1e-6, abs=1e-4), i
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"call {i}: {m}")
    torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)
    assert made.std() > 0.01


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
PREDICTIONS = pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": False, **STABLE, "steps_offset": 1, "set_alpha_to_one": False},
        {"timestep_spacing": "trailing", **ZERO},
        {"timestep_spacing": "linspace", **COSINE, "clip_sample_range": 0.8},
        {"num_train_timesteps": 400, "timestep_spacing": "trailing"},
    ],
    ids=["plain", "stable", "zero snr", "linspace", "400"],
)
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (4, 0.0), (7, 0.6), (50, 1.0)])
@PREDICTIONS
def test_ddim(double, config, steps, eta, predicts):
    if predicts == "epsilon" and config.get("rescale_betas_zero_snr"):
        pytest.skip("x_0 does not follow from noise alone")
    config = {"_class_name": "DDIMScheduler", "prediction_type": predicts, **config}
    if not eta:
        compare(config, steps)
    ours, theirs = Wavy(), Wavy()
    process, sampler = read_scheduler(config, steps)
    made = sample(ours, process, replace(sampler, eta=eta), LABEL, SHAPE, seed=5)
    # In the end, diffusers adds noise of deviation zero if data is without noise; else ours has none to add either.
    wanted = run_peer(config, steps, theirs, eta=eta)
    last = [x for x, _ in theirs.calls][-1]
    torch.testing.assert_close([x for x, _ in ours.calls][-1], last, rtol=1e-7, atol=1e-7)
    if not eta or config.get("set_alpha_to_one", True):
        torch.testing.assert_close(made, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": False, "variance_type": "fixed_large"},
        {"timestep_spacing": "trailing", **STABLE, "variance_type": "fixed_small_log"},
        {"timestep_spacing": "linspace", **COSINE, "clip_sample_range": 2.0},
        {"variance_type": "learned_range", **COSINE},
    ],
    ids=["plain", "large", "trailing", "linspace", "learned"],
)
@pytest.mark.parametrize("steps", [3, 50])
@PREDICTIONS
def test_ddpm(double, config, steps, predicts):
    config = {"_class_name": "DDPMScheduler", "prediction_type": predicts, **config}
    compare(config, steps, channels=2 if "learned" in config.get("variance_type", "") else 1)


@pytest.mark.parametrize(
    "config",
    [
        STABLE,
        {**STABLE, "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True},
        {"timestep_spacing": "trailing", **ZERO},
        {**COSINE, "solver_type": "heun", "timestep_spacing": "trailing"},
        {**STABLE, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ],
    ids=["stable", "karras", "zero snr", "heun", "sigma min", "euler end", "flow"],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver(double, config, steps, order):
    compare({"_class_name": "DPMSolverMultistepScheduler", "solver_order": order, **config}, steps)


@pytest.mark.parametrize(
    "config",
    [
        STABLE,
        {**STABLE, "timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing", **ZERO, "solver_type": "midpoint"},
        {**STABLE, "final_sigmas_type": "sigma_min"},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift_terminal": 0.1},
    ],
    ids=["stable", "leading", "zero snr", "sigma min", "flow", "terminal"],
)
@pytest.mark.parametrize(("steps", "order"), [(1, 2), (2, 3), (3, 2), (9, 1), (9, 2), (9, 3)])
def test_unipc(double, config, steps, order, monkeypatch):
    monkeypatch.setattr(spacing, "LATEST_TIME", 1 - 1e-6)  # diffusers computes in float64 here
    config = {"_class_name": "UniPCMultistepScheduler", "solver_order": order, **config}
    if steps == 1 and "shift_terminal" in config:
        with pytest.raises(SettingsError, match="cannot be reached in 1 step"):
            compare(config, steps)
        return
    compare(config, steps)


@pytest.mark.parametrize(("scale", "zero"), [(3.0, True), (1.0, True), (3.0, False)])
@pytest.mark.parametrize(("steps", "spacing"), [(3, "trailing"), (7, "leading"), (6, "linspace")])
def test_ddim_of_cogvideox(double, scale, zero, steps, spacing):
    config = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False}
    config |= {"snr_shift_scale": scale, "rescale_betas_zero_snr": zero, "timestep_spacing": spacing}
    compare(config, steps)


@pytest.mark.parametrize("steps", [14, 15])  # the last steps have full order from 15 on
def test_orders_of_the_last_steps(double, steps):
    config = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "final_sigmas_type": "sigma_min"}
    compare({**config, **STABLE}, steps)


@pytest.mark.parametrize(
    "config", [STABLE, {**STABLE, "solver_type": "heun", "use_karras_sigmas": True}], ids=["plain", "heun"]
)
@pytest.mark.parametrize("steps", [2, 8, 20])
@pytest.mark.parametrize("order", [1, 2])
@PREDICTIONS
def test_stochastic_dpm_solver(double, config, steps, order, predicts):
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": order,
        **config,
    }
    compare({**config, "prediction_type": predicts}, steps)


SPACINGS = pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])


@SPACINGS
@pytest.mark.parametrize("sigmas", ["", "use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler_and_heun_of_stable_diffusion(double, name, steps, spacing, sigmas):
    if sigmas and (name.startswith("EulerA") or (steps == 1 and spacing != "leading")):
        pytest.skip("has no such sigmas")
    config = {"_class_name": name, **STABLE, "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    if spacing == "leading":
        config["steps_offset"] = 1
    compare(config | ({sigmas: True} if sigmas else {}), steps)
    if not sigmas and not name.startswith("Heun"):
        compare({**config, "rescale_betas_zero_snr": True}, steps)


def test_euler_of_data(double):
    compare({"_class_name": "EulerDiscreteScheduler", **STABLE, "prediction_type": "sample"}, 9)


def test_clipped_heun(double):
    compare({"_class_name": "HeunDiscreteScheduler", "clip_sample": True, "clip_sample_range": 0.6}, 9)


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_euler_of_stable_video_diffusion(double, kind):
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0}
    config |= {"_class_name": "EulerDiscreteScheduler", **STABLE, f"use_{kind}_sigmas": True, "timestep_spacing": "leading"}
    compare(config, 9)


@pytest.mark.parametrize("config", [{}, {"sigma_schedule": "exponential", "sigma_data": 1.0, "sigma_max": 20.0, "rho": 5.0}])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["", "dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("steps", [3, 18])
def test_edm(double, config, predicts, final, solver, steps):
    if solver and final == "sigma_min" and "sigma_schedule" in config and steps > 15:
        pytest.skip("diffusers divides by the last step's length, which is 0")
    config = {"final_sigmas_type": final, "prediction_type": predicts, **config}
    if not solver:
        compare({"_class_name": "EDMEulerScheduler", **config}, steps)
    else:
        for order in (1, 2, 3)[: 2 if "sde" in solver else 3]:
            config |= {"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": solver, "solver_order": order}
            compare(config, steps)


@pytest.mark.parametrize("name", ["Euler", "Heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_of_stable_diffusion_3(double, name, shift, steps):
    compare({"_class_name": f"FlowMatch{name}DiscreteScheduler", "shift": shift}, steps)


@pytest.mark.parametrize("config", [{}, {"time_shift_type": "linear"}, {"shift_terminal": 0.1}])
def test_flow_with_dynamic_shift(double, config):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0, **config}
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)  # as FluxPipeline computes it for 1024 tokens
    times = {"sigmas": np.linspace(1.0, 1 / 9, 9), "mu": mu}
    compare(config, 9, tokens=1024, times=times)


def test_flow_with_the_times_of_pipelines(double):
    times = {"sigmas": np.linspace(1.0, 1 / 4, 4)}  # FLUX.1-schnell
    compare({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4, kind="trailing", times=times)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith(("DDPM", "UnCLIP"))])
def test_files_in_float32(name):
    """Diffusers without the fixture `double`: its tables are rounded to float32. UnCLIPScheduler is compared in tests/test_unclip.py,
    because only its pipeline passes the next time step to it."""
    config = {"_class_name": name, **(STABLE if "beta_start" in DEFAULTS[name] else {})}
    config |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    model, draw = Wavy().float(), Noise(5, range(3), SHAPE, torch.zeros(()))
    process, sampler = read_scheduler(config, 8)
    made = sample(model, process, sampler, LABEL, SHAPE, seed=5)
    kind = getattr(diffusers, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(kind.__module__), "randn_tensor", lambda *_, **__: draw(), raising=False)
        wanted = walk(kind(**{k: v for k, v in config.items() if k != "_class_name"}), 8, Wavy(), draw())
    torch.testing.assert_close(made, wanted.float(), rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------------ reading of files

XL = {  # the file of Stable Diffusion XL, with settings of other classes
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
    **STABLE,
}


def test_settings_of_other_classes_are_ignored(double):
    ours, theirs = Wavy(), Wavy()
    process, sampler = read_scheduler(XL, 6)
    assert sampler == Euler(steps=6, clip=0.0, spacing=Timesteps(kind="leading", offset=1, fractional=True), initial="total")
    peer = diffusers.EulerDiscreteScheduler.from_config(XL)
    made = sample(ours, process, sampler, LABEL, SHAPE, seed=5)
    torch.testing.assert_close(made, walk(peer, 6, theirs, Noise(5, range(3), SHAPE, made)()), rtol=1e-7, atol=1e-7)


def test_process_is_read_where_the_sampler_is_not_supported():
    config = {"_class_name": "PNDMScheduler", **STABLE, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    process = read_process(config)
    assert process.predicts == "eps" and process.alpha_bar == pytest.approx(DiscreteProcess("scaled-linear").alpha_bar)
    peer = diffusers.PNDMScheduler(**{k: v for k, v in config.items() if k != "_class_name"})
    torch.testing.assert_close(torch.tensor(process.alpha_bar), peer.alphas_cumprod, rtol=1e-4, atol=1e-7)
    with pytest.raises(SettingsError, match="sampler of LMSDiscreteScheduler is not supported"):
        read_scheduler({"_class_name": "LMSDiscreteScheduler", **STABLE}, 5)
    for changes, words in (({"skip_prk_steps": False}, "skip_prk_steps=False"), ({"timestep_spacing": "trailing"}, "trailing")):
        with pytest.raises(SettingsError, match=words):
            read_scheduler(config | changes, 5)
    betas = np.linspace(0.001, 0.3, 20).tolist()
    assert read_process({"_class_name": "DDPMScheduler", "trained_betas": betas}).steps == 20
    assert isinstance(read_process({"_class_name": "UniPCMultistepScheduler", **FLOW}), FlowProcess)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMSchedule"}, "DDIMSchedule' is not supported.*DDIMScheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "solver_type='bh1'"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final"),
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector"),
        ({"_class_name": "DDIMScheduler", "magic": 3}, "unknown setting magic=3"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "timestep_spacing": "trailing"}, "fixed_large"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.1}, "sigma_min=0.1"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, **COSINE}, "use_karras_sigmas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "order=3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "prediction_type='epsilon'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "without signal at the last time"),
    ],
)
def test_settings_that_are_not_supported_are_errors(config, words):
    with pytest.raises(SettingsError, match=words):
        read_scheduler(config, 5)


def test_defaults_are_those_of_diffusers():
    import inspect

    for name, defaults in DEFAULTS.items():
        known = {key: p.default for key, p in inspect.signature(getattr(diffusers, name).__init__).parameters.items()}
        for key, value in defaults.items():
            if name in SAMPLERS or key in known:
                assert known[key] == value, (name, key)
        if name in SAMPLERS:
            assert set(known) - {"self"} <= set(defaults), name


# ------------------------------------------------------------------------------------------------ equations of papers


def test_edm_sampling_equals_algorithm_2():
    """Algorithm 2 of arXiv:2206.00364, written down again; diffusers churns after the network was called."""
    process, model, steps = EDMProcess(), Wavy(), 7
    data, churn, low, high, loud = 0.5, 5.0, 0.05, 50.0, 1.003
    sampler = Heun(steps=steps, clip=0, churn=churn, churn_min=low, churn_max=high, churn_noise=loud)
    made = sample(model, process, sampler, LABEL, SHAPE, seed=5)
    draw = Noise(5, range(3), SHAPE, made)

    def denoise(x, sigma):
        c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
        c_in, c_noise = 1 / math.sqrt(sigma**2 + data**2), math.log(sigma) / 4
        with torch.no_grad():
            return c_skip * x + c_out * model(c_in * x, torch.full((3,), c_noise), LABEL)

    times = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]
    x = draw() * times[0]
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= times[i] <= high else 0
        raised = times[i] * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - times[i] ** 2) * loud * draw()
        slope = (x - denoise(x, raised)) / raised
        after = x + (times[i + 1] - raised) * slope
        if times[i + 1]:
            slope = (slope + (after - denoise(after, times[i + 1])) / times[i + 1]) / 2
            after = x + (times[i + 1] - raised) * slope
        x = after
    torch.testing.assert_close(made, x, rtol=1e-6, atol=1e-7)  # the network receives times in float32


def test_edm_loss_equals_the_paper():
    """Equation 8 of arXiv:2206.00364 with the weights of table 1; c_out cancels in ours."""
    from fieldguide.objectives import Diffusion

    torch.manual_seed(0)
    model, clean, noise = Wavy(), torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    sigma, data = torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64), 0.5
    found = Diffusion(model, EDMProcess()).compute_errors(clean, noise, sigma, torch.zeros(4))
    s = sigma[:, None, None]
    c_skip, c_out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    x = clean + s * noise
    denoised = c_skip * x + c_out * model(x / (s**2 + data**2).sqrt(), sigma.log() / 4, torch.zeros(4))
    want = ((s**2 + data**2) / (s * data) ** 2 * (denoised - clean) ** 2).mean((1, 2))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_flow_loss_equals_the_paper():
    """Equations 13 and 14 of arXiv:2403.03206 with a constant weight: the network predicts eps - x_0 at (1 - t) x_0 + t eps."""
    from fieldguide.objectives import Diffusion

    torch.manual_seed(0)
    model, clean, noise = Wavy(), torch.randn(3, 2, 3, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    found = Diffusion(model, FlowProcess()).compute_errors(clean, noise, t, torch.zeros(3))
    x = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
    want = ((model(x, 1000 * t, torch.zeros(3)) - (noise - clean)) ** 2).mean((1, 2))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def list_processes():
    yield from (build_process(name, predicts) for name in ("cosine", "linear") for predicts in ("eps", "v", "x", "velocity"))
    yield from (build_process("edm", predicts) for predicts in ("edm", "eps", "v", "x", "velocity"))
    yield from (build_process("flow", predicts) for predicts in ("velocity", "v", "x"))


@pytest.mark.parametrize("process", list(list_processes()), ids=lambda p: f"{type(p).__name__} {p.predicts}")
def test_data_follows_from_targets(process):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    for sigma in (0.02, 0.4, 3.0, 20.0):
        level = process.level_at_sigma(sigma)
        assert level.sigma == pytest.approx(sigma)
        x = process.add_noise(clean, noise, level)
        found = process.predict_clean(x, process.compute_target(clean, noise, level), level)
        torch.testing.assert_close(found, clean, rtol=1e-9, atol=1e-9)
        # Weights of the loss: an error of x_0 of 1 is an error of the output of `get_error_scale`.
        wrong = process.compute_target(clean + 1, (x - level.signal * (clean + 1)) / level.noise, level)
        gap = (wrong - process.compute_target(clean, noise, level)).abs()
        torch.testing.assert_close(gap, torch.full_like(gap, process.get_error_scale(level)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("predicts", ["eps", "v", "x", "velocity"])
def test_weightings_mean_the_same_for_every_prediction(predicts):
    process = build_process("linear", predicts).double()
    time = torch.tensor([1, 100, 300, 500, 700, 900])
    level = process.get_level(time, 2)
    signal, noise = (x[:, 0] for x in (level.signal, level.noise))
    ratio, scale = (signal / noise) ** 2, process.get_error_scale(level)[:, 0]
    torch.testing.assert_close(MinSNR(5.0)(process, level)[:, 0] * scale**2, ratio.clamp(max=5))
    # The error of eps is that of x_0 times signal / noise.
    want = torch.sigmoid(-1.0 - ratio.log()) * ratio
    torch.testing.assert_close(SigmoidSNR(-1.0)(process, level)[:, 0] * scale**2, want)
    assert (Uniform()(process, level) == 1).all()
    by_hand = {"eps": ratio.clamp(max=5) / ratio, "v": ratio.clamp(max=5) / (ratio + 1), "x": ratio.clamp(max=5)}
    if predicts in by_hand:  # section 3.4 of arXiv:2303.09556
        torch.testing.assert_close(MinSNR(5.0)(process, level)[:, 0], by_hand[predicts], rtol=1e-4, atol=1e-6)
    assert set(WEIGHTINGS) == {"uniform", "min-snr", "sigmoid"}


def test_training_times():
    torch.manual_seed(0)
    device, flow, edm = torch.device("cpu"), FlowProcess(), EDMProcess()
    for times, process, transform in (
        (LogNormalNoise(-1.2, 1.2), edm, lambda t: (t.log() + 1.2) / 1.2),
        (LogitNormalTimes(0.5, 2.0), flow, lambda t: (torch.logit(t.double()) - 0.5) / 2),
        (LogitNormalTimes(0.0, 1.0, shift=3.0), flow, lambda t: torch.logit(t.double() / (3 - 2 * t.double()))),
    ):
        found = transform(times.draw(process, 20_000, device))
        assert abs(float(found.mean())) < 0.03 and abs(float(found.std()) - 1) < 0.03
        assert float(transform(times.get_quantile(process, 0.975))) == pytest.approx(1.95996, abs=1e-3)
    even = UniformTimes().draw(flow, 20_000, device)
    assert abs(float(even.mean()) - 0.5) < 0.01 and 0 <= even.min() < even.max() <= 1
    assert float(UniformTimes().get_quantile(edm, 0.5)) == pytest.approx((0.002 * 80) ** 0.5)
    discrete = build_process("cosine")
    assert UniformTimes().get_quantile(discrete, 0.125).tolist() == [125]
    drawn = LogitNormalTimes().draw(discrete, 1000, device)
    assert drawn.dtype == torch.int64 and 0 <= drawn.min() < 300 < 700 < drawn.max() <= 999


# ------------------------------------------------------------------------------------------------ what is solved


class Gaussian(nn.Module):
    """The optimal network for normal data with mean 0.3 and deviation `spread`."""

    def __init__(self, process, spread=0.4):
        super().__init__()
        self.process, self.spread, self.still = process, spread, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time, label):
        level = self.find_level(float(time[0]))
        x = x / self.process.get_input_scale(level)
        gain = level.signal * self.spread**2 / (level.signal**2 * self.spread**2 + level.noise**2)
        clean = 0.3 + gain * (x - level.signal * 0.3)
        return self.process.compute_target(clean, (x - level.signal * clean) / level.noise, level)

    def find_level(self, time):
        if isinstance(self.process, EDMProcess):
            return self.process.level_at_sigma(math.exp(4 * time))
        return self.process.level_at(time / 1000 if isinstance(self.process, FlowProcess) else round(time, 3))

    def solve(self, x, level):
        """Return the end of the path of the ordinary differential equation, which only scales the distance from the mean."""
        return 0.3 + self.spread * (x - level.signal * 0.3) / math.sqrt(level.signal**2 * self.spread**2 + level.noise**2)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDIM(clip=0), 1),
        (Euler(clip=0), 1),
        (DPMSolver(order=1, clip=0), 1),
        (DPMSolver(clip=0, low_order_end=False), 2),
        (DPMSolver(clip=0, low_order_end=False, midpoint=False), 2),
        (Heun(clip=0), 2),
        (DPMSolver(order=3, clip=0, low_order_end=False), 3),
    ],
)
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_error_falls_with_the_order_of_the_solver(sampler, order, name):
    """Between two fixed noise levels, where all is smooth, twice the steps divide the error by 2 to the power of the order."""
    process = EDMProcess(0.2, 4.0) if name == "edm" else FlowProcess()
    model, errors = Gaussian(process), []
    spacing = SigmaSpacing(kind="exponential", final="first")
    x, errors = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], []
    for steps in (40, 80):
        levels = spacing.build_schedule(EDMProcess(0.2, 4.0), steps).levels
        path = Fixed([process.level_at_sigma(level.sigma) for level in levels])
        state = replace(sampler, steps=steps, spacing=path).start(process, lambda: x)
        start, first = state.x.clone(), state.level
        with torch.no_grad():
            while not state.done:
                replace(sampler, steps=steps).step(state, evaluate(model, process, state, torch.zeros(5)))
        end = path.levels[-1]
        # Both lie on the path that ends in the same data.
        errors.append(float((model.solve(state.x, end) - model.solve(start, first)).abs().max()))
    assert errors[1] < 1e-2 and order - 0.35 < math.log2(errors[0] / errors[1]) < order + 0.75


class Fixed:
    """Given levels; the last one is the end."""

    def __init__(self, levels):
        self.levels = levels

    def build_schedule(self, process, steps):
        from fieldguide.objectives.diffusion import Schedule

        return Schedule(self.levels[:-1], self.levels[1:])


EVERY = [
    DDPM(steps=200),
    DDIM(steps=100),
    DDIM(steps=200, eta=1.0),
    Euler(steps=100),
    Heun(steps=60, churn=10.0),
    Heun(steps=50),
]
EVERY += [DPMSolver(steps=40), DPMSolver(steps=40, order=3), DPMSolver(steps=100, stochastic=True)]
EVERY += [DPMSolver(steps=100, stochastic=True, order=3)]


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: f"{type(s).__name__} {s.steps}")
@pytest.mark.parametrize("name", ["cosine", "edm", "flow"])
def test_every_sampler_samples_every_process(sampler, name):
    process, source = build_process(name), torch.Generator().manual_seed(1)
    model, sampler = Gaussian(process), replace(sampler, clip=0.0)
    state = sampler.start(process, lambda: torch.randn(20_000, 1, generator=source, dtype=torch.float64))
    with torch.no_grad():
        while not state.done:
            sampler.step(state, evaluate(model, process, state, LABEL))
    assert abs(float(state.x.mean()) - 0.3) < 0.02 and float(state.x.std()) == pytest.approx(0.4, rel=0.05)


def test_a_step_to_the_same_level_changes_nothing():
    process, sampler = EDMProcess(), DPMSolver(steps=20, spacing=SigmaSpacing(kind="exponential", final="first"))
    made = sample(Wavy(), process, sampler, LABEL, SHAPE)
    levels = Fixed([*sampler.build_schedule(process).levels, process.level_at_sigma(0.002)][:20])
    last = sample(Wavy(), process, replace(sampler, spacing=levels), LABEL, SHAPE)
    torch.testing.assert_close(made, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "scaled-linear", "edm", "flow"])
def test_euler_equals_ddim(name):
    process = build_process(name)
    ddim, euler, first = (
        sample(Wavy(), process, sampler, LABEL, SHAPE, seed=2)
        for sampler in (DDIM(steps=9), Euler(steps=9), DPMSolver(steps=9, order=1))
    )
    torch.testing.assert_close(ddim, euler, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ddim, first, rtol=1e-9, atol=1e-9)


def test_start_from_data():
    process, clean = FlowProcess(), torch.full((2, 3), 0.5, dtype=torch.float64)
    sampler = DDIM(steps=10)
    state = sampler.start(process, lambda: torch.ones(2, 3, dtype=torch.float64), clean=clean, skip=6)
    assert state.index == 6 and state.level == process.level_at(0.4)
    torch.testing.assert_close(state.x, torch.full_like(clean, 0.6 * 0.5 + 0.4))
    steps = 0
    while not state.done:
        sampler.step(state, torch.zeros_like(clean))
        steps += 1
    assert steps == 4
    with pytest.raises(SettingsError, match="cannot skip 10 of 10 steps"):
        sampler.start(process, lambda: clean, clean=clean, skip=10)


# ------------------------------------------------------------------------------------------------ guidance


def test_autoguidance_and_intervals():
    torch.manual_seed(0)
    model, weak, x = Wavy(), Wavy(), torch.randn(3, *SHAPE, dtype=torch.float64)
    weak.scale.data.fill_(0.2)
    time, level = torch.full((3,), 300.0), build_process("cosine").level_at(300)
    own, other = model(x, time, LABEL), weak(x, time, LABEL)
    free = model(x, time, 0 * LABEL)
    said = lambda **options: Guidance(**options).predict(model, x, time, LABEL, level)
    torch.testing.assert_close(said(scale=2.5, guide=weak), 2.5 * own - 1.5 * other)
    torch.testing.assert_close(said(scale=2.5), 2.5 * own - 1.5 * free)
    torch.testing.assert_close(said(scale=0.0), free)
    torch.testing.assert_close(said(scale=2.5, low=level.sigma * 1.01), own)
    torch.testing.assert_close(said(scale=2.5, high=level.sigma * 0.99), own)
    torch.testing.assert_close(said(scale=2.5, low=level.sigma * 0.99, high=level.sigma * 1.01), 2.5 * own - 1.5 * free)
    torch.testing.assert_close(said(), own)


def test_guide_is_evaluated_in_evaluation_mode_and_restored():
    model, weak = Wavy().train(), Wavy().train()
    seen = []
    weak.register_forward_hook(lambda module, *_: seen.append(module.training))
    sample(model, FlowProcess(), DDIM(steps=2), LABEL, SHAPE, guidance=Guidance(1.5, guide=weak))
    assert seen == [False, False] and weak.training and model.training


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build_process("square"), "schedule='square' is unknown"),
        (lambda: build_process("flow", "eps"), "predicts='eps'"),
        (lambda: EDMProcess(sigma_min=3.0, sigma_max=2.0), "sigma_min below sigma_max"),
        (lambda: DiscreteProcess(terminal=0.0), "without signal at the last time"),
        (lambda: DDIM(spacing=Timesteps()).build_schedule(FlowProcess()), "FlowProcess has other noise levels"),
        (lambda: DDIM(spacing=FlowTimes()).build_schedule(EDMProcess()), "EDMProcess has other noise levels"),
        (lambda: DDIM(spacing=SigmaSpacing()).build_schedule(FlowProcess()), "no finite range"),
        (lambda: DDIM(spacing=Timesteps(kind="middle")).build_schedule(DiscreteProcess()), "timestep spacing='middle'"),
        (lambda: DDIM(steps=1000, spacing=Timesteps(kind="leading", offset=1)).build_schedule(DiscreteProcess()), "offset=1"),
        (lambda: DDIM(steps=0).build_schedule(FlowProcess()), "0 steps"),
        (lambda: DDIM(steps=0).build_schedule(EDMProcess()), "0 steps"),
        (lambda: DDIM(initial="loud").start(FlowProcess(), lambda: torch.zeros(1)), "initial noise='loud'"),
        (lambda: sample(Wavy(), FlowProcess(), DPMSolver(order=4), LABEL, SHAPE), "order=4"),
        (lambda: sample(Wavy(), FlowProcess(), DDPM(variance="learned"), LABEL, SHAPE), "twice the channels"),
        (lambda: sample(Wavy(), FlowProcess(), DDPM(variance="huge"), LABEL, SHAPE), "variance='huge'"),
        (lambda: sample(Wavy(), build_zero(), Heun(bounded=False), LABEL, SHAPE), "bounded=False needs some signal"),
    ],
)
def test_invalid_settings_are_rejected(make, words):
    with pytest.raises(SettingsError, match=words):
        make()


def build_zero():
    return DiscreteProcess("scaled-linear", predicts="v", terminal=0.0)


@pytest.mark.parametrize(
    "sampler", [Heun(steps=9), DPMSolver(steps=9, order=3), DPMSolver(steps=9, stochastic=True), DDPM(steps=9)]
)
def test_zero_terminal_signal_is_sampled(sampler):
    process = build_zero()
    assert process.alpha_bar[-1] == 0 and sample(Wavy(), process, sampler, LABEL, SHAPE).isfinite().all()
    with pytest.raises(ZeroDivisionError):
        1 / process.alpha_bar[-1]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_of_the_options_exists(name):
    options = VideoGeneration.PredictOptions(sampler=name, steps=4)
    for schedule in PROCESSES:
        assert sample(Wavy(), build_process(schedule), build_sampler(options), LABEL, SHAPE).abs().max() <= 1
    with pytest.raises(SettingsError, match=r"eta=0\.5 is an option of sampler=ddim"):
        build_sampler(replace(options, eta=0.5, sampler="heun"))


class Still(nn.Module):
    """The optimal network for still videos of normal frames with deviation 0.4: all frames tell what each is."""

    def __init__(self, process):
        super().__init__()
        self.still = Gaussian(process)

    def forward(self, x, time, label):  # B F C H W
        process, level = self.still.process, self.still.find_level(float(time[0]))
        x, frames = x / process.get_input_scale(level), x.shape[1]
        mean = x.mean(1, keepdim=True)
        gain = level.signal * 0.16 / (level.signal**2 * 0.16 + level.noise**2 / frames)
        clean = (0.3 + gain * (mean - level.signal * 0.3)).expand_as(x)
        return process.compute_target(clean, (x - level.signal * clean) / level.noise, level)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
def test_last_frames_are_predicted_by_every_sampler(name, schedule):
    process, task = build_process(schedule), object.__new__(VideoGeneration)
    task.predict_options = VideoGeneration.PredictOptions(sampler=name, steps=50)
    frame = 0.3 + 0.4 * torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 1, 1, 2, 2)
    batch = {"video": frame.expand(3, 5, 1, 2, 2).clone(), "label": LABEL, "row": torch.arange(3)}
    last = task.predict_last_frame(SimpleNamespace(process=process, model=Still(process)), batch)
    torch.testing.assert_close(last, frame[:, 0], rtol=0, atol=0.12)
    assert torch.equal(batch["video"], frame.expand(3, 5, 1, 2, 2))
