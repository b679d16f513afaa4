"""One training loop for any objective and any model with a likelihood."""

from loglik.training.config import TrainConfig
from loglik.training.data import Example, TokenBlocks
from loglik.training.fit import FitResult, evaluate, fit

__all__ = ["Example", "FitResult", "TokenBlocks", "TrainConfig", "evaluate", "fit"]
