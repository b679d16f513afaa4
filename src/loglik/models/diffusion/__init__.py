"""Masked-diffusion language models: estimators of their likelihood, and their samplers."""

from loglik.models.diffusion.estimators import (
    ESTIMATORS,
    Bernoulli,
    Canonical,
    Counts,
    Enumeration,
    Estimator,
    FixedOrder,
    OneStep,
    Orders,
    Points,
    Quadrature,
    ScoreEntropy,
    Times,
    estimator_named,
)
from loglik.models.diffusion.lm import Evidence, MaskedDiffusionLM
from loglik.models.diffusion.network import BidirectionalLlama, BidirectionalLlamaConfig
from loglik.models.diffusion.sampling import DiffusionSample, ancestral, first_hitting, in_order, infilling
from loglik.models.diffusion.schedule import Geometric, LogLinear, Schedule
from loglik.models.diffusion.subsets import SubsetTable

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "BidirectionalLlama",
    "BidirectionalLlamaConfig",
    "Canonical",
    "Counts",
    "DiffusionSample",
    "Enumeration",
    "Estimator",
    "Evidence",
    "FixedOrder",
    "Geometric",
    "LogLinear",
    "MaskedDiffusionLM",
    "OneStep",
    "Orders",
    "Points",
    "Quadrature",
    "Schedule",
    "ScoreEntropy",
    "SubsetTable",
    "Times",
    "ancestral",
    "estimator_named",
    "first_hitting",
    "in_order",
    "infilling",
]
