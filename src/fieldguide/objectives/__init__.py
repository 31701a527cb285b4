"""Training objectives: losses as modules around the networks that they train."""

from fieldguide.objectives.adversarial import Adversarial, build_adversarial
from fieldguide.objectives.adversarial_distillation import AdversarialDistillation
from fieldguide.objectives.anomaly_map import AnomalyMap
from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from fieldguide.objectives.contrastive import Contrastive, SigmoidContrastive
from fieldguide.objectives.ctc import CTC
from fieldguide.objectives.detection import Detection
from fieldguide.objectives.diffusion import (
    DDIM,
    DDPM,
    Diffusion,
    DiscreteProcess,
    DPMSolver,
    EDMProcess,
    Euler,
    FlowProcess,
    Heun,
    MinSNR,
    UnCLIP,
    Uniform,
    build_process,
)
from fieldguide.objectives.distillation import Distillation
from fieldguide.objectives.embedding import EmbeddingObjective
from fieldguide.objectives.few_steps import FewSteps
from fieldguide.objectives.forecast import Forecast
from fieldguide.objectives.gan_losses import LOSSES, GANLoss
from fieldguide.objectives.gradient_penalties import PENALTIES, GradientPenalty
from fieldguide.objectives.language import DenoisingObjective, NextToken
from fieldguide.objectives.latent_consistency import LatentConsistency
from fieldguide.objectives.masked_lm import MaskedLM, SpanPrediction, TokenClassificationObjective
from fieldguide.objectives.reconstruction import Reconstruction
from fieldguide.objectives.supervised import Classification, Regression, Supervised

__all__ = [
    "CTC",
    "DDIM",
    "DDPM",
    "LOSSES",
    "PENALTIES",
    "Adversarial",
    "AdversarialDistillation",
    "AnomalyMap",
    "Classification",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Contrastive",
    "DPMSolver",
    "DenoisingObjective",
    "Detection",
    "Diffusion",
    "DiscreteProcess",
    "Distillation",
    "EDMProcess",
    "EmbeddingObjective",
    "Euler",
    "FewSteps",
    "FlowProcess",
    "Forecast",
    "GANLoss",
    "GradientPenalty",
    "Heun",
    "LatentConsistency",
    "MaskedLM",
    "MinSNR",
    "NextToken",
    "Objective",
    "Phase",
    "Reconstruction",
    "Regression",
    "SigmoidContrastive",
    "SpanPrediction",
    "Supervised",
    "TokenClassificationObjective",
    "UnCLIP",
    "Uniform",
    "build_adversarial",
    "build_process",
]
