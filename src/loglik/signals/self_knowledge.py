r"""Does a model know what it knows? Its accuracy above a threshold of its own confidence.

The confidence is P(True) of an answer (`loglik.signals.p_true`), P(IK) of a question (`loglik.signals.p_ik`), or any
other probability of being right (arXiv 2207.05221).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.calibration import checked_confidence
from loglik.signals.detection import proportion_interval

__all__ = ["Selection", "SelfKnowledgeCurve", "self_knowledge_curve"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is answered at one threshold.

    Args:
        threshold: answers of at least this confidence are given.
        count: how many.
        share: of all.
        accuracy: of them; None (not 0) if there are none.
        low: lower end of the accuracy's exact binomial interval, 0 without answers.
        high: upper end, 1 without answers.
    """

    threshold: float
    count: int
    share: float
    accuracy: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SelfKnowledgeCurve:
    """Accuracy of the answers that a model is sure of, at every threshold that occurs, in rising order.

    Args:
        threshold: (M,) the different confidences.
        count: (M,) answers of at least this confidence.
        share: (M,) of all; falls from 1.
        accuracy: (M,) of them; the first entry is the base accuracy.
        low: (M,) lower ends of exact binomial intervals.
        high: (M,) upper ends.
        level: confidence of each interval (not of all at once).
    """

    threshold: NDArray[np.floating[Any]]
    count: Ints
    share: Floats
    accuracy: Floats
    low: Floats
    high: Floats
    level: float

    @property
    def base(self) -> float:
        """Accuracy of all answers."""
        return float(self.accuracy[0])

    def at(self, threshold: float) -> Selection:
        """The answers of at least this confidence; any threshold will do.

        Raises:
            InputError: for a threshold outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must lie in [0, 1], got {threshold}")
        # In the confidences' dtype, so that a float32 0.9 is at least 0.9.
        place = int(np.searchsorted(self.threshold, self.threshold.dtype.type(threshold)))
        if place == len(self.threshold):
            return Selection(threshold, 0, 0.0, None, 0.0, 1.0)
        values = (float(part[place]) for part in (self.share, self.accuracy, self.low, self.high))
        return Selection(threshold, int(self.count[place]), *values)


def self_knowledge_curve(
    confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike, *, level: float = 0.95
) -> SelfKnowledgeCurve:
    r"""Accuracy above a threshold of confidence, for every threshold: :math:`P(y = 1 \mid c \ge t)`.

    A model that knows what it knows is more accurate above P(True) = 0.5 than overall: compare ``curve.at(0.5)`` with
    ``curve.base``. By the share of answers instead of the threshold it is `metacognition.risk_coverage_curve`.

    Args:
        confidence: (N,) P(True), P(IK) or another probability that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        level: confidence of the binomial intervals, in (0, 1).

    Raises:
        InputError: for probabilities outside [0, 1] or NaN (with the row), unequal lengths, no rows, or a level out of
            range.

    Source: arXiv 2207.05221.
    """
    values, right = checked_confidence(confidence, correct)
    distinct, which = np.unique(values, return_inverse=True)
    count = np.bincount(which)[::-1].cumsum()[::-1].astype(np.int64)
    hits = np.bincount(which[right], minlength=len(distinct))[::-1].cumsum()[::-1].astype(np.int64)
    low, high = proportion_interval(hits, count, level)
    return SelfKnowledgeCurve(distinct, count, count / len(right), hits / count, low, high, level)
