"""Samplers of image generation by their names in options, and checks of options that exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fieldguide.core.errors import SettingsError
from fieldguide.objectives import DDIM, DDPM, DPMSolver, Euler, Heun
from fieldguide.objectives.diffusion import Consistency, Sampler


def build_sampler(predict_options: Any) -> Sampler:
    """Return the sampler that the options name. Raises `SettingsError` for an unknown one."""
    name, steps, eta = predict_options.sampler, predict_options.steps, predict_options.eta
    samplers: dict[str, Callable[[], Sampler]] = {
        "dpm++": lambda: DPMSolver(steps=steps),
        "dpm++-sde": lambda: DPMSolver(steps=steps, stochastic=True),
        "ddim": lambda: DDIM(steps=steps, eta=eta),
        "ddpm": lambda: DDPM(steps=steps),
        "euler": lambda: Euler(steps=steps),
        "heun": lambda: Heun(steps=steps),
        "consistency": lambda: Consistency(steps=steps),
    }
    if name not in samplers:
        raise SettingsError(f"sampler={name!r} is unknown. Choose one of {', '.join(samplers)}.")
    if eta and name != "ddim":
        raise SettingsError(
            f"eta={eta} is an option of sampler=ddim, but the sampler is {name}. Leave eta out, or choose ddim."
        )
    return samplers[name]()


def check_sampler(predict_options: Any, is_consistency: bool) -> None:
    """Raise `SettingsError` if the sampler does not suit the model."""
    name = predict_options.sampler
    if is_consistency and name != "consistency":
        raise SettingsError(
            f"sampler={name!r}: this model generates in few steps. It predicts where a path ends and not its direction. Leave the sampler "
            "out, and choose steps=1 to 4."
        )
    if is_consistency and predict_options.guidance != 1:
        raise SettingsError(
            f"guidance={predict_options.guidance}: not supported by models of few steps. The guidance of the teacher is learned: "
            "--set task.teacher_guidance in training."
        )
    if not is_consistency and name == "consistency":
        raise SettingsError(
            "sampler='consistency' needs a model of few steps, and this is a diffusion model. Distill one: fieldguide fit DATA --set "
            "teacher=RUN"
        )


def check_one_step_options(predict_options: Any) -> None:
    """Raise `SettingsError` if sampler options are set for a one-step generator."""
    usual = type(predict_options)()
    if changed := [
        name for name in ("steps", "sampler", "eta", "guidance") if getattr(predict_options, name) != getattr(usual, name)
    ]:
        raise SettingsError(f"{', '.join(changed)}: not supported. This model generates an image in one step.")
