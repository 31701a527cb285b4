"""Diffusion and flow models: noise processes, loss weights, training times, noise levels, samplers and guidance, all independent
of the network (Karras et al. 2022, arXiv:2206.00364, table 1).

    noise_schedules.py   betas of discrete processes
    noise_process.py     signal and noise of each time, what the network receives and predicts
    time_sampling.py     the distribution of noise levels in training
    loss_weighting.py    the weight of each noise level in the loss
    objective.py         the training objective
    latent.py            the objective of latents with texts
    unclip.py            the objective of a prior and a decoder between the embeddings of CLIP
    first_frame.py       the objective of videos that may start with a known frame
    spacing.py           the noise levels of a sampling run
    boundary.py          boundary conditions of consistency models
    samplers.py          from one noise level to the next
    guidance.py          classifier-free guidance and autoguidance
    sampling.py          the loop from noise to data
    scheduler_config.py  process and sampler from the `scheduler_config.json` of diffusers
"""

from fieldguide.objectives.diffusion.boundary import Boundary, DirectBoundary, SigmaBoundary, TimeBoundary
from fieldguide.objectives.diffusion.first_frame import FirstFrame, VideoDiffusion, insert_first_frame
from fieldguide.objectives.diffusion.guidance import Guidance, predict_with_guidance
from fieldguide.objectives.diffusion.latent import LatentDiffusion
from fieldguide.objectives.diffusion.loss_weighting import MinSNR, SigmoidSNR, Uniform
from fieldguide.objectives.diffusion.noise_process import (
    PREDICTION_TYPES,
    DiscreteProcess,
    EDMProcess,
    FlowProcess,
    Level,
    NoiseProcess,
    build_process,
)
from fieldguide.objectives.diffusion.objective import EVAL_NOISE_LEVELS, Diffusion
from fieldguide.objectives.diffusion.samplers import DDIM, DDPM, Consistency, DPMSolver, Euler, Heun, Sampler, SamplingState
from fieldguide.objectives.diffusion.sampling import evaluate, sample
from fieldguide.objectives.diffusion.spacing import DynamicShift, FlowTimes, Schedule, SigmaSpacing, Spacing, Timesteps
from fieldguide.objectives.diffusion.time_sampling import LogitNormalTimes, LogNormalNoise, TimeDistribution, UniformTimes
from fieldguide.objectives.diffusion.unclip import UnCLIP

__all__ = [
    "DDIM",
    "DDPM",
    "EVAL_NOISE_LEVELS",
    "PREDICTION_TYPES",
    "Boundary",
    "Consistency",
    "DPMSolver",
    "Diffusion",
    "DirectBoundary",
    "DiscreteProcess",
    "DynamicShift",
    "EDMProcess",
    "Euler",
    "FirstFrame",
    "FlowProcess",
    "FlowTimes",
    "Guidance",
    "Heun",
    "LatentDiffusion",
    "Level",
    "LogNormalNoise",
    "LogitNormalTimes",
    "MinSNR",
    "NoiseProcess",
    "Sampler",
    "SamplingState",
    "Schedule",
    "SigmaBoundary",
    "SigmaSpacing",
    "SigmoidSNR",
    "Spacing",
    "TimeBoundary",
    "TimeDistribution",
    "Timesteps",
    "UnCLIP",
    "Uniform",
    "UniformTimes",
    "VideoDiffusion",
    "build_process",
    "evaluate",
    "insert_first_frame",
    "predict_with_guidance",
    "sample",
]
