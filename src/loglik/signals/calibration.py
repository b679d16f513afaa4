r"""Do stated probabilities come true? Calibration errors, reliability diagrams, Brier score.

Most functions take a confidence per row, the probability that the row's answer is right, and whether it was: from a
classifier's log-probabilities by `top_label`, from a language model as P(True), as the probability of its answer, or as
a number that it states. Calibration asks whether 80 % means 80 %; whether surer answers are righter is another question
(`loglik.signals.metacognition`). A model can have either without the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.class_log_probs import checked_log_probs
from loglik.signals.detection import checked_pairs, proportion_interval

__all__ = [
    "BrierParts",
    "Norm",
    "ReliabilityDiagram",
    "Scheme",
    "brier_decomposition",
    "brier_score",
    "checked_confidence",
    "classwise_calibration_error",
    "expected_calibration_error",
    "multiclass_brier_score",
    "negative_log_likelihood",
    "reliability_diagram",
    "top_label",
]

Scheme = Literal["width", "mass"]
Norm = Literal["l1", "l2", "max"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def top_label(log_probs: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> tuple[Floats, Bools]:
    """Confidence and correctness of the most probable class of each row; of equal ones the first.

    Args:
        log_probs: (N, K) nats, rows normalised.
        labels: (N,) true classes, whole numbers from 0.

    Returns:
        (N,) its probability, and (N,) whether it is the true class.

    Raises:
        InputError: as `negative_log_likelihood`, but for labels of probability 0.
    """
    values, classes = checked_log_probs(log_probs, labels)
    best = values.argmax(1)
    return np.minimum(np.exp(values.max(1)), 1.0), best == classes


def expected_calibration_error(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    *,
    bins: int = 15,
    scheme: Scheme = "width",
    norm: Norm = "l1",
    debias: bool = False,
) -> float:
    r"""Gap between confidence and accuracy, bin by bin.

    .. math:: \Bigl( \sum_b \frac{n_b}{N} |\bar c_b - \bar y_b|^p \Bigr)^{1/p}, \quad p = 1, 2; \qquad
              \max_b |\bar c_b - \bar y_b|

    The plug-in value is biased upwards: even perfect confidences give about :math:`\sqrt{B / N}` times a constant. With
    `debias`, l2 subtracts :math:`\bar y_b (1 - \bar y_b) / (n_b - 1)` from each square, and l1 becomes
    :math:`2|g_b| - \mathbb{E}|\mathcal{N}(g_b, \bar y_b (1 - \bar y_b) / n_b)|` for each gap; what falls below 0 is 0.
    Where nothing is wrong, l1 keeps 59 % of its bias (:math:`2 - \sqrt 2`), and the square of l2 none.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        bins: B, at most N. Empty ones are skipped.
        scheme: ``width``: [b/B, (b+1)/B), the last with 1; ``mass``: equal numbers of rows by rank (adaptive ECE).
            Equal confidences share a bin, so that the order of rows changes nothing; bins can then differ in size.
        norm: ``l1`` (ECE), ``l2`` (root of the mean square) or ``max`` (MCE).
        debias: subtract the estimated bias; needs two rows in each bin that is not empty. Not with ``max``.

    Returns:
        In [0, 1].

    Raises:
        InputError: for probabilities outside [0, 1] or NaN (with the row), unequal lengths, fewer rows than bins, or
            options out of range.

    Source: arXiv 1706.04599 (ECE, MCE), 1909.10155 (debiasing), 2508.16889. Bins are left-closed, as in torchmetrics,
    which puts a confidence of 1 into a bin of its own; the first source closes them on the right.
    """
    if norm not in ("l1", "l2", "max"):
        raise InputError(f"norm must be one of l1, l2, max, got {norm!r}")
    values, right = checked_confidence(confidence, correct)
    count, mean, rate = _binned(values, right, bins, scheme)
    gap = np.abs(mean - rate)
    weight = count / count.sum()
    if not debias:
        if norm == "max":
            return float(gap.max())
        return float((weight * gap).sum()) if norm == "l1" else math.sqrt((weight * gap**2).sum())
    if norm == "max":
        raise InputError("the bias of the largest gap has no estimate: set debias to False, or norm to l1 or l2")
    if count.min() < 2:
        raise InputError(f"debiasing needs two rows in each bin that is not empty: use fewer than {bins} bins")
    if norm == "l2":
        square = float((weight * (gap**2 - rate * (1 - rate) / (count - 1))).sum())
        return math.sqrt(max(square, 0.0))
    return max(float((weight * (2 * gap - _folded_mean(gap, np.sqrt(rate * (1 - rate) / count)))).sum()), 0.0)


def classwise_calibration_error(
    log_probs: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    bins: int = 15,
    scheme: Scheme = "width",
    norm: Norm = "l1",
) -> float:
    r"""Mean over classes of the calibration error of :math:`p_{ik}` against :math:`1[y_i = k]`.

    Stricter than the error of the top label: every probability counts, not the largest alone. With ``mass`` bins it is
    the adaptive calibration error (ACE).

    Args:
        log_probs: (N, K) nats, rows normalised.
        labels: (N,) true classes, whole numbers from 0.
        bins: per class, at most N.
        scheme: as in `expected_calibration_error`.
        norm: as there.

    Raises:
        InputError: as `top_label` and `expected_calibration_error`.

    Source: arXiv 1910.12656 (classwise), 1904.01685 (static and adaptive).
    """
    values, classes = checked_log_probs(log_probs, labels)
    probs = np.minimum(np.exp(values), 1.0)
    errors = [
        expected_calibration_error(probs[:, k], classes == k, bins=bins, scheme=scheme, norm=norm)
        for k in range(probs.shape[1])
    ]
    return float(np.mean(errors))


@dataclass(frozen=True, slots=True)
class ReliabilityDiagram:
    """The bins that hold rows, M of them, in rising order.

    Args:
        confidence: (M,) mean confidence.
        accuracy: (M,) share of correct rows.
        count: (M,) rows.
        low: (M,) lower end of the accuracy's interval.
        high: (M,) upper end.
        level: confidence of the intervals.
    """

    confidence: Floats
    accuracy: Floats
    count: Ints
    low: Floats
    high: Floats
    level: float


def reliability_diagram(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    *,
    bins: int = 15,
    scheme: Scheme = "width",
    level: float = 0.95,
) -> ReliabilityDiagram:
    """Accuracy against confidence, with exact binomial (Clopper-Pearson) intervals.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        bins: as in `expected_calibration_error`.
        scheme: as there.
        level: confidence of each bin's interval (not of all at once), in (0, 1).

    Raises:
        InputError: as `expected_calibration_error`.
    """
    values, right = checked_confidence(confidence, correct)
    count, mean, rate = _binned(values, right, bins, scheme)
    low, high = proportion_interval(np.rint(rate * count).astype(np.int64), count, level)
    return ReliabilityDiagram(mean, rate, count, low, high, level)


def brier_score(confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike) -> float:
    r"""Mean squared error of confidences, :math:`\frac1N \sum_i (c_i - y_i)^2`; a proper score.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.

    Returns:
        In [0, 1].

    Raises:
        InputError: for probabilities outside [0, 1] or NaN, unequal lengths or no rows.

    Source: Brier 1950; equal to scikit-learn's `brier_score_loss`.
    """
    values, right = checked_confidence(confidence, correct)
    return float(np.mean((values - right) ** 2))


def multiclass_brier_score(log_probs: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> float:
    r"""Mean over rows of :math:`\sum_k (p_{ik} - 1[y_i = k])^2`, in [0, 2].

    For two classes it is twice `brier_score`.

    Args:
        log_probs: (N, K) nats, rows normalised.
        labels: (N,) true classes, whole numbers from 0.

    Raises:
        InputError: as `top_label`.

    Source: Brier 1950; equal to scikit-learn's `brier_score_loss(..., scale_by_half=False)`.
    """
    values, classes = checked_log_probs(log_probs, labels)
    error = np.exp(values)
    error[np.arange(len(classes)), classes] -= 1
    return float((error**2).sum(1).mean())


@dataclass(frozen=True, slots=True)
class BrierParts:
    """`score` = `reliability` - `resolution` + `uncertainty` + `within`.

    Args:
        score: the Brier score.
        reliability: squared gap of confidence and accuracy, of the groups; 0 is calibrated.
        resolution: variance of the groups' accuracies; the higher, the more the confidences tell apart.
        uncertainty: variance of correctness, which no confidence changes.
        within: what confidences do inside a group; 0 where each group has one confidence.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier_decomposition(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    *,
    bins: int | None = None,
    scheme: Scheme = "width",
) -> BrierParts:
    r"""Murphy's parts of the Brier score.

    .. math:: \sum_g \frac{n_g}{N} (\bar c_g - \bar y_g)^2 - \sum_g \frac{n_g}{N} (\bar y_g - \bar y)^2
              + \bar y (1 - \bar y)

    Rows are grouped by equal confidence, where this is exact. Confidences that are all different then make groups of
    one, with no more to learn from: group by bins instead; what is inside them is `within`.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        bins: None groups by equal confidence; else as in `expected_calibration_error`.
        scheme: of the bins.

    Raises:
        InputError: as `brier_score`, or for bins out of range.

    Source: Murphy 1973; Stephenson, Coelho and Jolliffe 2008 (`within`); arXiv 2508.16889.
    """
    values, right = checked_confidence(confidence, correct)
    if bins is None:
        _, group = np.unique(values, return_inverse=True)
        count, mean, rate = _groups(values, right, group)
    else:
        count, mean, rate = _binned(values, right, bins, scheme)
    weight = count / count.sum()
    overall = float(right.mean())
    score = float(np.mean((values - right) ** 2))
    reliability = float((weight * (mean - rate) ** 2).sum())
    resolution = float((weight * (rate - overall) ** 2).sum())
    uncertainty = overall * (1 - overall)
    within = score - (reliability - resolution + uncertainty) if bins is not None else 0.0
    return BrierParts(score, reliability, resolution, uncertainty, within)


def negative_log_likelihood(log_probs: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> float:
    r"""Mean of :math:`-\log p_i(y_i)`, nats; a proper score.

    Args:
        log_probs: (N, K) nats, rows normalised; -inf is probability 0.
        labels: (N,) true classes, whole numbers from 0.

    Raises:
        InputError: for rows that are no distribution, labels out of range, unequal lengths, no rows, or a label of
            probability 0, whose value is infinite.

    Source: equal to scikit-learn's `log_loss`.
    """
    values, classes = checked_log_probs(log_probs, labels)
    own = values[np.arange(len(classes)), classes]
    gone = np.flatnonzero(own == -np.inf)
    if len(gone):
        raise InputError(
            f"row {int(gone[0])} gives its label probability 0, so that the mean is infinite: smooth the probabilities"
        )
    return float(-own.mean())


def checked_confidence(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    names: tuple[str, str] = ("confidence", "correct"),
) -> tuple[NDArray[np.floating[Any]], Bools]:
    """Probabilities (N,), float32 or float64 as given, and correctness (N,) as bool; `names` are for refusals.

    Raises:
        InputError: for anything outside [0, 1] or NaN, unequal lengths or no rows.
    """
    values, right = checked_pairs(confidence, correct, names)
    if not len(right):
        raise InputError(f"there are no rows: give at least one {names[0]}")
    outside = np.flatnonzero((values < 0) | (values > 1))
    if len(outside):
        raise InputError(
            f"{names[0]} must lie in [0, 1], got {values[outside[0]]} in row {int(outside[0])}; divide percentages by "
            "100"
        )
    return (values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)), right


def _binned(values: NDArray[np.floating[Any]], right: Bools, bins: int, scheme: Scheme) -> tuple[Ints, Floats, Floats]:
    """Count, mean confidence and accuracy of the bins that hold rows."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"bins must be a whole number of at least 1, got {bins!r}")
    if bins > len(values):
        raise InputError(f"{len(values)} rows cannot fill {bins} bins: set bins to {len(values)} or less")
    if scheme == "width":
        # b / B in the confidences' own dtype: 0.3 is the edge 3/10, whether it came in float32 or float64.
        edges = (np.arange(bins) / bins).astype(values.dtype)
        group = np.searchsorted(edges, values, side="right") - 1
    elif scheme == "mass":
        _, which, count = np.unique(values, return_inverse=True, return_counts=True)
        # By the middle rank of each confidence, in whole numbers.
        group = (bins * (2 * count.cumsum() - count) // (2 * len(values)))[which]
    else:
        raise InputError(f"scheme must be one of width, mass, got {scheme!r}")
    return _groups(values, right, group)


def _groups(values: NDArray[np.floating[Any]], right: Bools, group: Ints) -> tuple[Ints, Floats, Floats]:
    """Count, mean confidence and accuracy of the groups that have members."""
    count = np.bincount(group)
    mean, rate = (np.bincount(group, weights=w)[count > 0] for w in (values.astype(np.float64), right))
    count = count[count > 0]
    return count, mean / count, rate / count


def _folded_mean(mean: Floats, deviation: Floats) -> Floats:
    """Expected absolute value of normal variables."""
    ratio = np.divide(mean, deviation, out=np.full_like(mean, np.inf), where=deviation > 0)
    tail = deviation * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2)
    return np.asarray(np.abs(mean) * erf(np.abs(ratio) / math.sqrt(2)) + tail)
