"""One training loop for any objective and any model with a likelihood."""

from loglik.training.config import TrainConfig
from loglik.training.data import Example, Row, TokenBlocks
from loglik.training.evaluate import Evaluation, evaluate
from loglik.training.fit import FitResult, fit
from loglik.training.online import Online

__all__ = ["Evaluation", "Example", "FitResult", "Online", "Row", "TokenBlocks", "TrainConfig", "evaluate", "fit"]
