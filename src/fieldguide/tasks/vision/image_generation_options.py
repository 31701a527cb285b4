"""Options of image generation, in training and in prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.objectives.diffusion.unclip import PRIOR_GUIDANCE, PRIOR_STEPS

FEW_STEP_METHODS = ("consistency", "adversarial")
METHODS = ("diffusion", *FEW_STEP_METHODS)


@dataclass(frozen=True)
class GenerationOptions:
    """Options of training."""

    side: int | None = None  # pixels per side
    channels: int | None = None  # 1 gray, 3 color
    flip: bool = False  # mirror training images at random
    vocab_size: int | None = None  # vocabulary size of captions
    length: int | None = None  # maximum tokens of a caption; longer captions are truncated and counted
    schedule: str = "cosine"  # noise of the diffusion model: cosine | linear | scaled-linear | edm | flow
    predicts: str | None = None  # prediction target of the diffusion model: eps | v | x | velocity; of a flow velocity, else v
    weighting: str = "uniform"  # weight of noise levels in the loss: uniform | min-snr | sigmoid
    method: str = (
        "diffusion"  # diffusion | consistency | adversarial (needs a teacher): the last two make images in 1 to 4 steps
    )
    teacher_guidance: float = 1.5  # guidance of a diffusion teacher, which its student learns; 1 = none
    features: str | None = None  # image classifier whose features images are compared in: PATH, or SIZE=PATH
    clip: str | None = None  # CLIP that compares images with their captions: PATH
    unclip: str | None = None  # CLIP between whose embeddings of captions and images a prior generates (DALL-E 2): PATH
    upsamplers: str | None = (
        None  # runs of image-to-image (task.degrade=2x) that enlarge predicted images in turn: RUN or RUN,RUN
    )


@dataclass(frozen=True)
class SampleOptions:
    """Options of prediction."""

    count: Annotated[int, Limits(1, 10_000)] = 16  # images in total, or per given class or caption
    steps: Annotated[int, Limits(1, 1000)] = 12  # sampler steps
    sampler: str = "dpm++-sde"  # dpm++-sde | dpm++ | ddim | ddpm | euler | heun (calls the network twice per step)
    eta: Annotated[float, Limits(0, 1)] = 0.0  # noise that ddim adds at each step; 1 = as much as ddpm
    guidance: Annotated[float, Limits(0, 100)] = 1.5  # classifier-free guidance scale; 1 = none
    seed: Annotated[int, Limits(0, MAX_SEED)] = 0  # seed of the noise
    truncation: Annotated[float, Limits(0, 2)] = 1.0  # StyleGAN: below 1 images are more typical and less varied


@dataclass(frozen=True)
class FewStepOptions(SampleOptions):
    """Options of prediction with a model that generates in a few steps."""

    steps: Annotated[int, Limits(1, 1000)] = 4
    sampler: str = "consistency"
    guidance: Annotated[float, Limits(0, 100)] = 1.0


@dataclass(frozen=True)
class UnCLIPOptions(SampleOptions):
    """Options of prediction with embeddings of CLIP."""

    prior_steps: Annotated[int, Limits(2, 1000)] = PRIOR_STEPS  # sampler steps of the prior
    prior_guidance: Annotated[float, Limits(0, 100)] = PRIOR_GUIDANCE  # guidance scale of the prior; 1 = none


def choose_sample_options(options: Any, usual: type[Any]) -> type[Any]:
    """Return the options of prediction for a model that was trained with these options; `usual` for a plain one."""
    if options.method in FEW_STEP_METHODS:
        return FewStepOptions
    return usual if options.unclip is None else UnCLIPOptions
