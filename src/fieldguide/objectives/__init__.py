"""What training minimises."""

from fieldguide.objectives.adversarial import Adversarial
from fieldguide.objectives.base import Objective, Phase
from fieldguide.objectives.supervised import Classification, Regression, Supervised

__all__ = ["Adversarial", "Classification", "Objective", "Phase", "Regression", "Supervised"]
