"""Training objectives: pure functions of log-likelihoods with small typed configs."""

from loglik.objectives.base import Objective, Terms
from loglik.objectives.supervised import MaximumLikelihood

__all__ = ["MaximumLikelihood", "Objective", "Terms"]
