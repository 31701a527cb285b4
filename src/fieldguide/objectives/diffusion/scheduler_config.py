"""Noise process and sampler from the `scheduler_config.json` of diffusers.

A setting that is absent has the default of the scheduler's class in diffusers. Settings of other classes are ignored, as diffusers does
(files hold such leftovers). A setting that would change results and is not supported is an error, as is an unknown one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.objectives.diffusion.boundary import TimeBoundary
from fieldguide.objectives.diffusion.noise_process import DiscreteProcess, EDMProcess, FlowProcess, NoiseProcess
from fieldguide.objectives.diffusion.noise_schedules import cosine_betas, shift_snr
from fieldguide.objectives.diffusion.plms import PLMS
from fieldguide.objectives.diffusion.samplers import DDIM, DDPM, Consistency, DPMSolver, Euler, Heun, Sampler
from fieldguide.objectives.diffusion.spacing import LCM_TIMES, DynamicShift, FlowTimes, SigmaSpacing, Timesteps
from fieldguide.objectives.diffusion.unipc import UniPC

PREDICTS = {"epsilon": "eps", "sample": "x", "v_prediction": "v", "flow_prediction": "velocity"}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
SOLVERS = {"dpmsolver++": False, "sde-dpmsolver++": True}  # whether they are stochastic

# Settings of each class and their defaults.
PROCESS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
BETAS = {**PROCESS, "steps_offset": 0, "timestep_spacing": "leading"}
WITHOUT_RESCALING = {key: value for key, value in BETAS.items() if key != "rescale_betas_zero_snr"}
CLIPPING = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SOLVER = {
    "solver_order": 2,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}
EDM = {
    "num_train_timesteps": 1000,  # has no effect
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**BETAS, **CLIPPING, "variance_type": "fixed_small"},
    "DDIMScheduler": {**BETAS, **CLIPPING, "set_alpha_to_one": True},
    "CogVideoXDDIMScheduler": {
        **BETAS,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
    },
    "DPMSolverMultistepScheduler": {
        **BETAS,
        **SOLVER,
        **SIGMAS,
        "timestep_spacing": "linspace",
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": float("-inf"),
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "EulerDiscreteScheduler": {
        **BETAS,
        **SIGMAS,
        "timestep_spacing": "linspace",
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**BETAS, "timestep_spacing": "linspace"},
    "HeunDiscreteScheduler": {
        **WITHOUT_RESCALING,
        **SIGMAS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "linspace",
        "clip_sample": False,
        "clip_sample_range": 1.0,
    },
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": {**EDM, **SOLVER},
    "FlowMatchEulerDiscreteScheduler": {
        **SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "UnCLIPScheduler": {
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "epsilon",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "PNDMScheduler": {**WITHOUT_RESCALING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "UniPCMultistepScheduler": {
        **BETAS,
        **SIGMAS,
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": {
        **BETAS,
        **CLIPPING,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
        "original_inference_steps": LCM_TIMES,
    },
    # Of these, only the noise process is supported.
    "LMSDiscreteScheduler": PROCESS,
    "DEISMultistepScheduler": {**PROCESS, "use_flow_sigmas": False, "flow_shift": 1.0},
    "KDPM2DiscreteScheduler": {**PROCESS, "beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {**PROCESS, "beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverSinglestepScheduler": {**PROCESS, "use_flow_sigmas": False, "flow_shift": 1.0},
}
# Have no effect, or only with a setting that is checked.
WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "skip_prk_steps",
    "set_alpha_to_one",
}
WITHOUT_SIGNAL = {"DDPMScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler"}  # at the last time, if the betas are rescaled
SLIGHTLY_NOISY = 2.0**-24  # alpha-bar at the last time, where diffusers needs some signal to divide by
REMEDY = "Choose another sampler for its noise process."


class SchedulerSettings:
    """The settings of a scheduler, with defaults. Those that no one has read by the end must have their defaults."""

    def __init__(self, config: Mapping[str, Any]):
        self.name = config.get("_class_name", "")
        if self.name not in DEFAULTS:
            raise SettingsError(
                f"the scheduler _class_name={self.name!r} is not supported.{nearest(str(self.name), DEFAULTS)} Supported are "
                f"{', '.join(DEFAULTS)}."
            )
        known = {key for defaults in DEFAULTS.values() for key in defaults} | WITHOUT_EFFECT
        if unknown := [key for key in config if key not in known and not key.startswith("_")]:
            raise SettingsError(
                f"{self.name} has the unknown setting {unknown[0]}={config[unknown[0]]!r}, which may change results."
            )
        self.defaults = DEFAULTS[self.name]
        self.values = {**self.defaults, **{key: value for key, value in config.items() if key in self.defaults}}
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return a setting and mark it as read."""
        self.read.add(key)
        return self.values[key]

    def choose(self, key: str, choices: Mapping[Any, Any]) -> Any:
        """Return what stands for a setting. Raises `SettingsError` if it is not among the choices."""
        if self.get(key) not in choices:
            raise self.reject(key)
        return choices[self.values[key]]

    def reject(self, key: str) -> SettingsError:
        """Return the error for a setting that is not supported."""
        return SettingsError(
            f"{self.name} with {key}={self.values[key]!r} is not supported, since it would change results. {REMEDY}"
        )

    def check_rest(self) -> None:
        """Raise `SettingsError` if a setting that was not read differs from its default."""
        for key, value in self.values.items():
            if key not in self.read | WITHOUT_EFFECT and value != self.defaults[key]:
                raise self.reject(key)


def read_process(config: Mapping[str, Any]) -> NoiseProcess:
    """Return the noise process of a scheduler. Raises `SettingsError` if it is not supported."""
    return build_noise_process(SchedulerSettings(config))


def read_scheduler(config: Mapping[str, Any], steps: int, times: str | None = None) -> tuple[NoiseProcess, Sampler]:
    """Return the noise process and the sampler of a scheduler.

    Args:
        config: the content of `scheduler_config.json`.
        steps: number of steps.
        times: how the times of a rectified flow are spaced (see `FlowTimes`). By default "trailing" with dynamic shifting, where pipelines
            set the times (FLUX), and "linspace" otherwise (Stable Diffusion 3). FLUX.1-schnell needs "trailing".

    Raises:
        SettingsError: if a setting that changes results is not supported or unknown.
    """
    settings = SchedulerSettings(config)
    if settings.name not in SAMPLERS:
        raise SettingsError(f"the sampler of {settings.name} is not supported. {REMEDY}")
    process = build_noise_process(settings)
    if settings.name.startswith("FlowMatch"):
        sampler: Sampler = build_flow_sampler(settings, steps, times)
    else:
        sampler = SAMPLERS[settings.name](settings, steps)
    settings.check_rest()
    return process, sampler


def build_noise_process(settings: SchedulerSettings) -> NoiseProcess:
    """Return the noise process of the settings."""
    name = settings.name
    if name.startswith("FlowMatch") or settings.values.get("use_flow_sigmas"):
        if "prediction_type" in settings.values and settings.get("prediction_type") != "flow_prediction":
            raise settings.reject("prediction_type")
        return FlowProcess(time_scale=float(settings.get("num_train_timesteps")))
    if name.startswith("EDM"):
        settings.get("num_train_timesteps")
        sign = settings.choose("prediction_type", {"epsilon": "edm", "v_prediction": "v"})
        return EDMProcess(settings.get("sigma_min"), settings.get("sigma_max"), settings.get("sigma_data"), sign)
    if is_continuous(settings):
        low, high = settings.get("sigma_min"), settings.get("sigma_max")
        if low is None or high is None:
            raise settings.reject("timestep_type")
        return EDMProcess(low, high, 1.0, "v")  # v of data with deviation 1
    total = settings.get("num_train_timesteps")
    if name == "UnCLIPScheduler":  # has only the cosine schedule
        settings.choose("beta_schedule", {"squaredcos_cap_v2": None})
        predicts = settings.choose("prediction_type", {k: v for k, v in PREDICTS.items() if v in ("eps", "x")})
        return DiscreteProcess(predicts=predicts, betas=cosine_betas(total))
    betas, first, last = settings.get("trained_betas"), settings.get("beta_start"), settings.get("beta_end")
    schedules: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: np.linspace(first, last, total),
        "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, total) ** 2,
        "squaredcos_cap_v2": lambda: cosine_betas(total),
    }
    if betas is None:
        betas = settings.choose("beta_schedule", schedules)()
    settings.read.add("beta_schedule")
    if "snr_shift_scale" in settings.values:
        betas = shift_snr(betas, settings.get("snr_shift_scale"))
    terminal = None
    if "rescale_betas_zero_snr" in settings.values and settings.get("rescale_betas_zero_snr"):
        terminal = 0.0 if name in WITHOUT_SIGNAL else SLIGHTLY_NOISY
    predicts = settings.choose("prediction_type", {k: v for k, v in PREDICTS.items() if v != "velocity"})
    return DiscreteProcess(predicts=predicts, betas=betas, terminal=terminal)


def is_continuous(settings: SchedulerSettings) -> bool:
    """Return whether an Euler scheduler is one of EDM, as that of Stable Video Diffusion."""
    values = settings.values
    return values.get("timestep_type") == "continuous" and values["prediction_type"] == "v_prediction"


def read_spacing(settings: SchedulerSettings, **conventions: Any) -> Timesteps:
    """Return the spacing of a discrete process."""
    chosen = [kind for kind in ("karras", "exponential", "beta") if settings.values.get(f"use_{kind}_sigmas")]
    if chosen and chosen != ["karras"] and not (conventions.get("fractional") and chosen == ["exponential"]):
        raise settings.reject(f"use_{chosen[0]}_sigmas")
    settings.read |= {"use_karras_sigmas", "use_exponential_sigmas"}
    kind = settings.choose("timestep_spacing", {kind: kind for kind in ("leading", "trailing", "linspace")})
    offset = settings.get("steps_offset")
    return Timesteps(kind=kind, offset=offset if kind == "leading" else 0, sigmas="".join(chosen), **conventions)


def read_final(settings: SchedulerSettings) -> str:
    """Return the level at which sampling ends."""
    return settings.choose("final_sigmas_type", {"zero": "data", "sigma_min": "first"})


def read_clip(settings: SchedulerSettings) -> float:
    """Return the limit of x_0, 0 for none."""
    return float(settings.get("clip_sample_range")) * bool(settings.get("clip_sample"))


def build_ddpm(settings: SchedulerSettings, steps: int) -> Sampler:
    variance, spacing = settings.choose("variance_type", VARIANCES), read_spacing(settings)
    if variance != "small" and (spacing.kind == "trailing" or spacing.offset):
        raise settings.reject("variance_type")  # diffusers then adds noise to the data in the end
    return DDPM(steps=steps, clip=read_clip(settings), spacing=spacing, variance=variance)


def build_unclip(settings: SchedulerSettings, steps: int) -> Sampler:
    variance = settings.choose("variance_type", VARIANCES)
    return DDPM(steps=steps, clip=read_clip(settings), spacing=Timesteps(kind="linspace"), variance=variance)


def build_ddim(settings: SchedulerSettings, steps: int) -> Sampler:
    spacing = read_spacing(settings, stride=True, final="data" if settings.get("set_alpha_to_one") else "first")
    return DDIM(steps=steps, clip=read_clip(settings), spacing=spacing, recompute_noise=False)


def build_unclipped_ddim(settings: SchedulerSettings, steps: int) -> Sampler:
    """Build DDIM as CogVideoX uses it, which clips nothing, whatever its settings say."""
    return replace(build_ddim(settings, steps), clip=0.0)


def build_lcm(settings: SchedulerSettings, steps: int) -> Sampler:
    settings.choose("original_inference_steps", {LCM_TIMES: None})
    settings.read |= {"steps_offset", "timestep_spacing"}  # have no effect
    boundary = TimeBoundary(scale=float(settings.get("timestep_scaling")))
    return Consistency(steps=steps, clip=read_clip(settings), boundary=boundary, spacing=Timesteps(kind="lcm"))


def build_solver(settings: SchedulerSettings, steps: int) -> Sampler:
    """Build DPM-Solver++, of any process."""
    stochastic = settings.choose("algorithm_type", SOLVERS)
    if stochastic and settings.get("solver_order") == 3:
        raise settings.reject("solver_order")  # wrong in diffusers: a term there does not vanish with the length of the step
    spacing: Any
    if settings.name.startswith("EDM"):
        spacing = read_sigma_spacing(settings)
    elif settings.get("use_flow_sigmas"):
        settings.choose("final_sigmas_type", {"zero": "data"})
        spacing = FlowTimes(kind="solver", shift=settings.get("flow_shift"))
        settings.read |= {"timestep_spacing", *BETAS}
    else:
        settings.read.add("flow_shift")
        spacing = read_spacing(settings, final=read_final(settings))
        spacing = Timesteps(**{**vars(spacing), "skip_last": spacing.kind != "trailing"})
        if spacing.sigmas and settings.values["beta_schedule"] == "squaredcos_cap_v2":
            raise settings.reject("use_karras_sigmas")  # diffusers cuts off the decimals of these times
    return DPMSolver(
        steps=steps,
        clip=0.0,
        spacing=spacing,
        initial="total" if settings.name.startswith("EDM") else "",
        order=settings.get("solver_order"),
        midpoint=settings.choose("solver_type", {"midpoint": True, "heun": False}),
        stochastic=stochastic,
        low_order_end=settings.get("lower_order_final"),
        euler_end=settings.get("euler_at_final"),
    )


def build_unipc(settings: SchedulerSettings, steps: int) -> Sampler:
    settings.choose("lower_order_final", {True: None})  # else the last step divides by zero
    settings.choose("solver_type", dict.fromkeys(("bh2", "midpoint", "heun", "logrho")))  # all mean bh2 there
    final = read_final(settings)
    spacing: Any
    if settings.get("use_flow_sigmas"):
        settings.choose("final_sigmas_type", {"zero": "data"})
        spacing = FlowTimes(kind="unipc", shift=settings.get("flow_shift"), terminal=settings.get("shift_terminal") or None)
        settings.read |= {"timestep_spacing", *BETAS}
    else:
        settings.read.add("flow_shift")
        spacing = read_spacing(settings, final=final)
        spacing = Timesteps(**{**vars(spacing), "skip_last": spacing.kind != "trailing"})
        if spacing.sigmas:
            raise settings.reject(f"use_{spacing.sigmas}_sigmas")
    return UniPC(steps=steps, spacing=spacing, order=settings.get("solver_order"))


def read_sigma_spacing(settings: SchedulerSettings) -> SigmaSpacing:
    """Return the spacing of EDM."""
    kind = settings.choose("sigma_schedule", {"karras": "karras", "exponential": "exponential"})
    return SigmaSpacing(kind=kind, rho=settings.get("rho"), final=read_final(settings))


def build_edm_euler(settings: SchedulerSettings, steps: int) -> Sampler:
    return Euler(steps=steps, clip=0.0, spacing=read_sigma_spacing(settings), initial="total")


def build_euler(settings: SchedulerSettings, steps: int) -> Sampler:
    scale = "total" if settings.values["timestep_spacing"] == "leading" else "noise"
    spacing: Any
    if is_continuous(settings):
        settings.read |= {"timestep_type", "timestep_spacing", *BETAS}
        kind = (
            "karras" if settings.get("use_karras_sigmas") else "exponential" if settings.get("use_exponential_sigmas") else ""
        )
        if not kind:
            raise settings.reject("timestep_type")
        settings.choose("final_sigmas_type", {"zero": "data"})
        spacing = SigmaSpacing(kind=kind)
    else:
        settings.read.add("timestep_type")
        settings.choose("final_sigmas_type", {"zero": "data"})
        spacing = read_spacing(settings, fractional=True)
    return Euler(steps=steps, clip=0.0, spacing=spacing, initial=scale)


def build_ancestral(settings: SchedulerSettings, steps: int) -> Sampler:
    scale = "total" if settings.values["timestep_spacing"] == "leading" else "noise"
    return DDIM(steps=steps, clip=0.0, eta=1.0, spacing=read_spacing(settings, fractional=True), initial=scale)


def build_heun(settings: SchedulerSettings, steps: int) -> Sampler:
    scale = "total" if settings.values["timestep_spacing"] == "leading" else "noise"
    spacing = read_spacing(settings, fractional=True)
    return Heun(steps=steps, clip=read_clip(settings), spacing=spacing, initial=scale, bounded=False)


def build_plms(settings: SchedulerSettings, steps: int) -> Sampler:
    settings.choose("skip_prk_steps", {True: None})  # else it starts with steps of Runge and Kutta
    settings.choose("timestep_spacing", {"leading": None})  # with others, steps do not end where the next ones start
    return PLMS(
        steps=steps, spacing=read_spacing(settings, stride=True, final="data" if settings.get("set_alpha_to_one") else "first")
    )


def build_flow_sampler(settings: SchedulerSettings, steps: int, times: str | None) -> Sampler:
    if settings.name == "FlowMatchHeunDiscreteScheduler":
        return Heun(steps=steps, clip=0.0, spacing=FlowTimes(kind=times or "linspace", shift=settings.get("shift")))
    dynamic, shift = None, settings.get("shift")
    if settings.get("use_dynamic_shifting"):
        linear = settings.choose("time_shift_type", {"exponential": False, "linear": True})
        names = "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"
        base, most, first, last = map(settings.get, names)
        dynamic = DynamicShift(base_shift=base, max_shift=most, base_tokens=first, max_tokens=last, linear=linear)
        shift = 1.0
    settings.read |= {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}
    spacing = FlowTimes(
        kind=times or ("trailing" if dynamic else "linspace"),
        shift=shift,
        terminal=settings.get("shift_terminal") or None,
        dynamic=dynamic,
    )
    return Euler(steps=steps, clip=0.0, spacing=spacing)


SAMPLERS: dict[str, Callable[[SchedulerSettings, int], Sampler]] = {
    "DDPMScheduler": build_ddpm,
    "UnCLIPScheduler": build_unclip,
    "DDIMScheduler": build_ddim,
    "CogVideoXDDIMScheduler": build_unclipped_ddim,
    "LCMScheduler": build_lcm,
    "DPMSolverMultistepScheduler": build_solver,
    "EulerDiscreteScheduler": build_euler,
    "EulerAncestralDiscreteScheduler": build_ancestral,
    "HeunDiscreteScheduler": build_heun,
    "PNDMScheduler": build_plms,
    "UniPCMultistepScheduler": build_unipc,
    "EDMEulerScheduler": build_edm_euler,
    "EDMDPMSolverMultistepScheduler": build_solver,
    "FlowMatchEulerDiscreteScheduler": lambda settings, steps: build_flow_sampler(settings, steps, None),
    "FlowMatchHeunDiscreteScheduler": lambda settings, steps: build_flow_sampler(settings, steps, None),
}


def describe_lcm_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of diffusers' scheduler for a latent consistency model of the same noise process.

    Raises `SettingsError` for processes that are not discrete.
    """
    name = str(config.get("_class_name"))
    known = DEFAULTS.get(name, {})
    if lacking := [key for key in PROCESS if key not in known and key != "rescale_betas_zero_snr"]:
        raise SettingsError(
            f"task.method=lcm is for pipelines of discrete diffusion: the scheduler {name} has no {lacking[0]}."
        )
    kept = {key: config.get(key, known.get(key, default)) for key, default in PROCESS.items()}
    return {"_class_name": "LCMScheduler", **kept, "clip_sample": False, "original_inference_steps": LCM_TIMES}
