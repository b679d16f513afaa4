r"""Maps that mend a classifier's probabilities after training: temperature, vector scaling, isotonic regression.

Each is fitted on rows that the classifier was not trained on, by the likelihood of their labels or by isotonic
regression, and then applied to others. Logits and log-probabilities serve alike: what a row's softmax does not see is
removed first. `loglik.signals.h_calibration` has maps that a windowed calibration error fits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.calibration import checked_confidence
from loglik.signals.class_log_probs import checked_log_probs, checked_rows
from loglik.signals.detection import as_numbers

__all__ = [
    "IsotonicCalibration",
    "IsotonicConfidence",
    "Recalibration",
    "StepMap",
    "TemperatureScaling",
    "VectorScaling",
    "binary_log_probs",
]

Floats = NDArray[np.float64]

# Where the likelihood rises without end, a search runs off: temperatures outside this range are refused.
_HOTTEST = 1e4


def binary_log_probs(confidence: Tensor | ArrayLike) -> Tensor:
    r"""Confidences as two classes, :math:`(\log(1 - c), \log c)`: class 1 is "correct".

    Args:
        confidence: (N,) probabilities that the rows are correct.

    Returns:
        (N, 2) float64.

    Raises:
        InputError: for anything outside [0, 1] or NaN, or no rows.
    """
    wide = torch.from_numpy(_confidences(confidence))
    return torch.stack([torch.log1p(-wide), wide.log()], 1)


class Recalibration(ABC):
    """What the maps have in common: `fit` on held-out rows, `predict_log_proba` on others.

    Subclasses give `_fit` and `_map`, both of normalised log-probabilities (N, K) in float64.
    """

    num_classes_: int

    def fit(self, logits: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> Self:
        """Learn the map.

        Args:
            logits: (N, K) logits or log-probabilities of held-out rows; -inf is probability 0.
            labels: (N,) their true classes, whole numbers from 0.

        Raises:
            InputError: for rows that are no distribution, labels out of range, unequal lengths, a label of probability
                0, or data that determine no map.
        """
        values, classes = checked_log_probs(logits, labels, normalised=False)
        if values.shape[1] < 2:
            raise InputError("recalibration needs two classes at least: with one its probability is always 1")
        log_probs = log_softmax(values, axis=1)
        gone = np.flatnonzero(log_probs[np.arange(len(classes)), classes] == -np.inf)
        if len(gone):
            raise InputError(f"row {int(gone[0])} gives its label probability 0, which no map can mend: remove the row")
        self._fit(log_probs, classes)
        self.num_classes_ = values.shape[1]
        return self

    def predict_log_proba(self, logits: Tensor | ArrayLike) -> Tensor:
        """Recalibrated log-probabilities.

        Args:
            logits: (M, K) logits or log-probabilities.

        Returns:
            (M, K) float64, nats; a class of probability 0 stays there.

        Raises:
            InputError: before `fit`, for rows that are no distribution, or another number of classes.
        """
        if not hasattr(self, "num_classes_"):
            raise InputError(f"{type(self).__name__} has no map yet: call fit first")
        values = checked_rows(logits, normalised=False)
        if values.shape[1] != self.num_classes_:
            raise InputError(f"the map was fitted on {self.num_classes_} classes, got {values.shape[1]}")
        return torch.from_numpy(self._map(log_softmax(values, axis=1)))

    def transform(self, logits: Tensor | ArrayLike) -> Tensor:
        """The same as `predict_log_proba`."""
        return self.predict_log_proba(logits)

    @abstractmethod
    def _fit(self, log_probs: Floats, classes: NDArray[np.int64]) -> None:
        """Learn from normalised rows and their classes."""

    @abstractmethod
    def _map(self, log_probs: Floats) -> Floats:
        """Map normalised rows to normalised rows."""


class TemperatureScaling(Recalibration):
    r"""One number for all: :math:`p_T = \mathrm{softmax}(z / T)` with the T of the greatest likelihood.

    Ranking and accuracy do not change. The likelihood is concave in 1/T, so that the T is unique; at it the mean of the
    label's logit equals the mean of the expected one.

    Attributes:
        temperature_: T after `fit`; above 1 the model was over-confident.

    Raises:
        InputError: (by `fit`) if the likelihood rises without end as T goes to 0 (each label is the most probable
            class) or to infinity (the logits rank the labels no better than chance).

    Source: arXiv 1706.04599.
    """

    temperature_: float

    def _fit(self, log_probs: Floats, classes: NDArray[np.int64]) -> None:
        from scipy.optimize import brentq

        own = log_probs[np.arange(len(classes)), classes]
        finite = np.where(np.isfinite(log_probs), log_probs, 0.0)  # their probability is 0 and their share of means too

        def slope(log_inverse: float) -> float:
            """Of the mean negative log-likelihood by 1/T; rises with 1/T."""
            scaled = np.exp(log_softmax(math.exp(log_inverse) * log_probs, axis=1))
            return float(((scaled * finite).sum(1) - own).mean())

        bound = math.log(_HOTTEST)
        if slope(bound) <= 0:
            raise InputError(
                f"the best temperature is below {1 / _HOTTEST:g}: each label is the most probable class, so that the "
                "likelihood rises without end; fit on more rows, with errors among them"
            )
        if slope(-bound) >= 0:
            raise InputError(
                f"the best temperature is above {_HOTTEST:g}: the logits rank the labels no better than chance; check "
                "that logits and labels belong together"
            )
        self.temperature_ = math.exp(-brentq(slope, -bound, bound, xtol=1e-13, rtol=1e-14))

    def _map(self, log_probs: Floats) -> Floats:
        return np.asarray(log_softmax(log_probs / self.temperature_, axis=1))


class VectorScaling(Recalibration):
    r"""A factor and an offset per class: :math:`p = \mathrm{softmax}(w \odot \log p_0 + b)`.

    Fitted by the greatest likelihood, less :math:`\frac{\lambda}{2} (\|w - 1\|^2 + \|b\|^2)` per row. It can change the
    ranking of classes. On log-probabilities and not on logits, so that the map depends on the distribution alone; for
    equal factors the two are one.

    Args:
        penalty: :math:`\lambda \ge 0`; with 0 each class must occur among the labels.

    Attributes:
        weight_: (K,) factors after `fit`.
        bias_: (K,) offsets, with mean 0.

    Raises:
        InputError: (by `fit`) for a class without rows, or labels that the map separates, both without penalty; for a
            penalty out of range.

    Source: arXiv 1706.04599.
    """

    weight_: Floats
    bias_: Floats

    def __init__(self, penalty: float = 0.0) -> None:
        if not 0 <= penalty < math.inf:
            raise InputError(f"penalty must be at least 0 and finite, got {penalty}")
        self.penalty = penalty

    def _fit(self, log_probs: Floats, classes: NDArray[np.int64]) -> None:
        from scipy.optimize import minimize

        rows, size = log_probs.shape
        missing = np.flatnonzero(np.bincount(classes, minlength=size) == 0)
        if len(missing) and not self.penalty:
            raise InputError(
                f"class {int(missing[0])} has no row, so that its offset would go to -inf: add rows or set a penalty"
            )
        finite = np.where(np.isfinite(log_probs), log_probs, 0.0)
        possible = np.isfinite(log_probs)
        target = np.zeros_like(log_probs)
        target[np.arange(rows), classes] = 1.0

        def objective(x: Floats) -> tuple[float, Floats]:
            weight, bias = x[:size], x[size:]
            mapped = log_softmax(np.where(possible, weight * finite + bias, -np.inf), axis=1)
            error = (np.exp(mapped) - target) / rows
            off = x - start
            value = -mapped[np.arange(rows), classes].mean() + self.penalty / 2 * (off**2).sum()
            return float(value), np.concatenate([(error * finite).sum(0), error.sum(0)]) + self.penalty * off

        start = np.concatenate([np.ones(size), np.zeros(size)])
        options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-9}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        if not (np.abs(found.jac).max() < 1e-5 and np.abs(found.x).max() < _HOTTEST and found.fun > 1e-6):
            raise InputError(
                "vector scaling has no best factors: the labels are separated by the log-probabilities, so that the "
                "likelihood rises without end; fit on more rows or set a penalty"
            )
        self.weight_, self.bias_ = found.x[:size], found.x[size:] - found.x[size:].mean()

    def _map(self, log_probs: Floats) -> Floats:
        possible = np.isfinite(log_probs)
        finite = np.where(possible, log_probs, 0.0)
        return np.asarray(log_softmax(np.where(possible, self.weight_ * finite + self.bias_, -np.inf), axis=1))


@dataclass(frozen=True, slots=True)
class StepMap:
    """A rising function, linear between its knots and constant beyond them, as isotonic regression gives it.

    Args:
        x: (S,) rising knots.
        y: (S,) its values there, rising.
    """

    x: Floats
    y: Floats

    def predict(self, values: Floats) -> Floats:
        """The values (M,) at (M,) places, as `sklearn.isotonic.IsotonicRegression` predicts them."""
        return np.asarray(np.interp(values, self.x, self.y))


class IsotonicCalibration(Recalibration):
    r"""One rising step function per class from its probability to its frequency; then rows are normalised.

    It can follow any monotone distortion and needs many rows (about a thousand per class). Ties appear, so that the
    accuracy can change. Step functions give probabilities of exactly 0, on which a single surprise costs infinitely
    many nats; `floor` keeps them off it. A row that all classes give 0 becomes uniform.

    Args:
        floor: least frequency that a class's function gives, before normalising.

    Attributes:
        maps_: the K fitted functions.

    Raises:
        InputError: for a floor outside [0, 1).

    Source: Zadrozny and Elkan 2002; with ``floor=0`` equal to scikit-learn's `CalibratedClassifierCV`.
    """

    maps_: list[StepMap]

    def __init__(self, floor: float = 1e-6) -> None:
        if not 0 <= floor < 1:
            raise InputError(f"floor must be at least 0 and below 1, got {floor}")
        self.floor = floor

    def _fit(self, log_probs: Floats, classes: NDArray[np.int64]) -> None:
        probs = np.exp(log_probs)
        self.maps_ = [_isotonic(probs[:, k], classes == k) for k in range(probs.shape[1])]

    def _map(self, log_probs: Floats) -> Floats:
        probs = np.exp(log_probs)
        # Of two classes the second decides, as in scikit-learn: one function, and not two that disagree.
        second = self.maps_[1].predict(probs[:, 1]) if len(self.maps_) == 2 else None
        columns = (
            [m.predict(p) for m, p in zip(self.maps_, probs.T, strict=True)] if second is None else [1 - second, second]
        )
        values: Floats = np.maximum(np.stack(columns, 1), self.floor)
        total = values.sum(1, keepdims=True)
        values = np.divide(values, total, out=np.full_like(values, 1 / values.shape[1]), where=total > 0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(values))


class IsotonicConfidence:
    """A rising step function from confidence to accuracy, for confidences that are one number per row.

    Attributes:
        map_: the fitted function.

    Source: Zadrozny and Elkan 2002.
    """

    map_: StepMap

    def fit(self, confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike) -> Self:
        """Learn the map from held-out rows.

        Args:
            confidence: (N,) probabilities that the rows are correct.
            correct: (N,) bool, or 0 and 1.

        Raises:
            InputError: for probabilities outside [0, 1] or NaN, unequal lengths or no rows.
        """
        values, right = checked_confidence(confidence, correct)
        self.map_ = _isotonic(values.astype(np.float64), right)
        return self

    def transform(self, confidence: Tensor | ArrayLike) -> Tensor:
        """(M,) recalibrated confidences, float64.

        Raises:
            InputError: before `fit`, or for confidences as `fit` refuses them.
        """
        if not hasattr(self, "map_"):
            raise InputError("IsotonicConfidence has no map yet: call fit first")
        return torch.from_numpy(self.map_.predict(_confidences(confidence)))


def _confidences(given: Tensor | ArrayLike) -> Floats:
    """(N,) checked, float64, of rows whose correctness is not known."""
    values = as_numbers(given, "confidence")
    return checked_confidence(values, np.zeros(values.shape))[0].astype(np.float64)


def _isotonic(probs: Floats, outcomes: NDArray[np.bool_]) -> StepMap:
    try:
        from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("isotonic regression needs scikit-learn: pip install 'loglik[stats]'") from None
    found = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(probs, outcomes.astype(np.float64))
    return StepMap(*(np.asarray(part, dtype=np.float64) for part in (found.X_thresholds_, found.y_thresholds_)))
