"""One training loop for any objective and any model with a likelihood."""

from loglik.training.collect import DrawGroups, DrawPairs, DrawRollouts, RejectionPairs
from loglik.training.config import TrainConfig
from loglik.training.data import Example, Row, TokenBlocks
from loglik.training.evaluate import Evaluation, evaluate
from loglik.training.fit import FitResult, fit
from loglik.training.online import Online

__all__ = [
    "DrawGroups",
    "DrawPairs",
    "DrawRollouts",
    "Evaluation",
    "Example",
    "FitResult",
    "Online",
    "RejectionPairs",
    "Row",
    "TokenBlocks",
    "TrainConfig",
    "evaluate",
    "fit",
]
