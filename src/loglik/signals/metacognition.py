r"""Does a model know what it knows? Wrong answers of high confidence, risk against coverage, and a report on both axes.

A judge that states how sure it is can be over-confident although it ranks its answers well, and the other way round
(arXiv 2508.16889): `calibration_report` gives both, with intervals, and `compare_calibration` the differences of two
judges on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.calibration import Scheme, brier_score, checked_confidence, expected_calibration_error
from loglik.signals.detection import Estimate, checked_pairs, proportion_interval

__all__ = [
    "CalibrationReport",
    "RiskCoverage",
    "ThresholdFit",
    "WrongAt",
    "calibration_report",
    "compare_calibration",
    "fit_threshold",
    "risk_coverage_curve",
    "wrong_at_confidence",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class WrongAt:
    """How often answers of high confidence are wrong.

    Args:
        threshold: confidence from which on an answer counts.
        count: answers at or above it.
        wrong: the wrong ones of them.
        rate: `wrong` / `count`; None (not 0) if there is no such answer.
        low: lower end of the rate's exact binomial interval, 0 without answers.
        high: upper end, 1 without answers.
    """

    threshold: float
    count: int
    wrong: int
    rate: float | None
    low: float
    high: float


def wrong_at_confidence(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    thresholds: Sequence[float] = (0.8, 0.9, 0.95),
    *,
    level: float = 0.95,
) -> tuple[WrongAt, ...]:
    r"""Share of wrong answers among those of at least a given confidence, :math:`\#\{c \ge t, y = 0\} / \#\{c \ge t\}`.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        thresholds: t, each in [0, 1].
        level: confidence of the binomial intervals, in (0, 1).

    Raises:
        InputError: as `brier_score`, or for options out of range.

    Source: arXiv 2508.16889.
    """
    values, right = checked_confidence(confidence, correct)
    found = []
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise InputError(f"a threshold must lie in [0, 1], got {threshold}")
        # In the confidences' dtype, so that a float32 0.9 is at least 0.9.
        chosen = values >= values.dtype.type(threshold)
        count, wrong = int(chosen.sum()), int((chosen & ~right).sum())
        low, high = proportion_interval(np.array([wrong]), np.array([count]), level)
        rate = wrong / count if count else None
        found.append(WrongAt(float(threshold), count, wrong, rate, float(low[0]), float(high[0])))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Error rate among the k most confident answers, for every k.

    Args:
        coverage: (N,) k / N.
        risk: (N,) share of wrong ones among the k; within a tie its mean over all orders.
        aurc: area under the curve, the mean of `risk`.
        optimal: the least area that this many errors allow: all of them last.
    """

    coverage: Floats
    risk: Floats
    aurc: float
    optimal: float

    @property
    def excess(self) -> float:
        """E-AURC: `aurc` - `optimal`, what better ranking could save."""
        return self.aurc - self.optimal

    def at(self, coverage: float) -> float:
        """Risk when the most confident share is answered, at least `coverage` of the rows.

        Raises:
            InputError: for a coverage outside (0, 1].
        """
        if not 0 < coverage <= 1:
            raise InputError(f"coverage must be above 0 and at most 1, got {coverage}")
        answered = math.ceil(coverage * len(self.risk) * (1 - 1e-12))  # 0.7 * 10 is 7, not a little more
        return float(self.risk[answered - 1])


def risk_coverage_curve(confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike) -> RiskCoverage:
    r"""Risk against coverage: what is gained by leaving the least confident answers out.

    .. math:: r(k) = \frac1k \sum_{j \le k} (1 - y_{(j)}), \qquad \mathrm{AURC} = \frac1N \sum_k r(k)

    Only the order of the confidences counts, so that any score will do (a log-likelihood, a negative entropy).

    Args:
        confidence: (N,) the higher, the surer; infinite ones are allowed.
        correct: (N,) bool, or 0 and 1.

    Raises:
        InputError: for NaN (with the row), unequal lengths or no rows.

    Source: arXiv 1705.08500, 1805.08206 (excess), 2508.16889. The last one's code integrates by trapezoids from 1/N on,
    which differs by O(1/N).
    """
    values, right = checked_pairs(confidence, correct, ("confidence", "correct"))
    if not len(right):
        raise InputError("there are no rows: give at least one confidence")
    _, group = np.unique(values, return_inverse=True)
    count = np.bincount(group)[::-1]
    wrong = np.bincount(group, weights=~right)[::-1]
    taken = np.arange(1, len(right) + 1)
    # In a random order of a tie errors come at a constant rate.
    errors = np.repeat(wrong / count, count).cumsum()
    ends = count.cumsum() - 1
    errors[ends] = wrong.cumsum()  # whole numbers, without rounding
    total = int(wrong.sum())
    best = np.maximum(taken - (len(right) - total), 0) / taken
    risk = errors / taken
    return RiskCoverage(taken / len(right), risk, float(risk.mean()), float(best.mean()))


@dataclass(frozen=True, slots=True)
class ThresholdFit:
    """A threshold of a similarity, with its F1 (and the precision and recall behind it) on the rows that chose it."""

    threshold: float
    f1: float
    precision: float
    recall: float


def fit_threshold(similarity: Tensor | ArrayLike, human: Tensor | ArrayLike, *, steps: int = 100) -> ThresholdFit:
    r"""From which similarity on an answer counts as correct: the threshold that agrees best with human labels.

    .. math:: \tau^* = \arg\max_{\tau \in \{0, 1/n, \dots, 1\}} F_1\bigl(1[s \ge \tau], h\bigr)

    Of equal F1 the smallest threshold. Fit it once, on labelled items that are not evaluated, and keep it: a threshold
    tuned on the evaluated items makes the accuracy look better than it is.

    Args:
        similarity: (N,) in [0, 1].
        human: (N,) bool, or 0 and 1: whether a human calls the answer correct.
        steps: n, of the grid.

    Raises:
        InputError: for similarities outside [0, 1] or NaN, unequal lengths, no positive label, or steps below 1.

    Source: arXiv 2508.16889.
    """
    values, labels = checked_confidence(similarity, human, ("similarity", "human"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    if not labels.any():
        raise InputError("no human label is positive, so that F1 is 0 or undefined at every threshold: add such rows")
    grid = (np.arange(steps + 1) / steps).astype(values.dtype)  # 0.61 is the number 61/100, as users write it
    ordered, hits = np.sort(values), np.sort(values[labels])
    taken = len(ordered) - np.searchsorted(ordered, grid)
    found = len(hits) - np.searchsorted(hits, grid)
    f1 = 2 * found / (taken + len(hits))
    best = int(f1.argmax())  # the first of equal ones
    precision = found[best] / taken[best]
    return ThresholdFit(best / steps, float(f1[best]), float(precision), float(found[best] / len(hits)))


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """A judge's figures with percentile bootstrap intervals over items.

    Args:
        accuracy: share of correct rows.
        confidence: mean confidence.
        ece: expected calibration error (l1).
        brier: Brier score.
        aurc: area under the risk-coverage curve.
        excess_aurc: `aurc` less the least that this accuracy allows.
        wrong_at: per threshold the share of wrong rows among the confident ones, with exact binomial intervals.
        num_rows: N.
        level: confidence of all intervals.
        bootstrap: resamples behind them.
    """

    accuracy: Estimate
    confidence: Estimate
    ece: Estimate
    brier: Estimate
    aurc: Estimate
    excess_aurc: Estimate
    wrong_at: tuple[WrongAt, ...]
    num_rows: int
    level: float
    bootstrap: int

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON and tables."""
        flat: dict[str, Any] = {"rows": self.num_rows, "level": self.level, "bootstrap": self.bootstrap}
        for name in _METRICS:
            estimate: Estimate = getattr(self, name)
            flat |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        for at in self.wrong_at:
            name = f"wrong_at_{at.threshold:g}"
            flat |= {name: at.rate, f"{name}_low": at.low, f"{name}_high": at.high, f"{name}_count": at.count}
        return flat


def calibration_report(
    confidence: Tensor | ArrayLike,
    correct: Tensor | ArrayLike,
    *,
    bins: int = 10,
    scheme: Scheme = "width",
    thresholds: Sequence[float] = (0.8, 0.9, 0.95),
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationReport:
    """Accuracy, calibration and ranking of confidences, each with an interval.

    The calibration error of a resample is biased upwards once more than that of the sample, so that its interval leans
    upwards too.

    Args:
        confidence: (N,) probabilities that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        bins: of the calibration error.
        scheme: of the bins.
        thresholds: of `wrong_at_confidence`.
        bootstrap: resamples of items, at least 1.
        level: confidence of the intervals, in (0, 1).
        seed: of the resampling.

    Raises:
        InputError: as `expected_calibration_error`, or for options out of range.

    Source: arXiv 2508.16889 (with 10 000 resamples).
    """
    values, right = checked_confidence(confidence, correct)
    wrong = wrong_at_confidence(values, right, thresholds, level=level)
    whole, drawn = _resampled([(values, right)], bins, scheme, bootstrap, seed)
    estimates = _estimates(whole[0], drawn[:, 0], level)
    return CalibrationReport(**estimates, wrong_at=wrong, num_rows=len(right), level=level, bootstrap=bootstrap)


def compare_calibration(
    first: tuple[Tensor | ArrayLike, Tensor | ArrayLike],
    second: tuple[Tensor | ArrayLike, Tensor | ArrayLike],
    *,
    bins: int = 10,
    scheme: Scheme = "width",
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Differences of two judges on the same items, first minus second, with paired intervals.

    Both are resampled by the same items, so that what is hard for both cancels.

    Args:
        first: (confidence, correct), both (N,).
        second: the same of the other judge, in the same order of items.
        bins: of the calibration error.
        scheme: of the bins.
        bootstrap: resamples of items, at least 1.
        level: confidence of the intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        ``accuracy``, ``confidence``, ``ece``, ``brier``, ``aurc`` and ``excess_aurc``.

    Raises:
        InputError: as `calibration_report`, or for different numbers of items.

    Source: arXiv 2508.16889.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    judges = [checked_confidence(*judge) for judge in (first, second)]
    sizes = [len(right) for _, right in judges]
    if sizes[0] != sizes[1]:
        raise InputError(f"both judges must have judged the same items, got {sizes[0]} and {sizes[1]}: join them by id")
    whole, drawn = _resampled(judges, bins, scheme, bootstrap, seed)
    return _estimates(whole[0] - whole[1], drawn[:, 0] - drawn[:, 1], level)


def _figures(values: NDArray[np.floating[Any]], right: Bools, bins: int, scheme: Scheme) -> list[float]:
    curve = risk_coverage_curve(values, right)
    return [
        float(right.mean()),
        float(values.mean(dtype=np.float64)),
        expected_calibration_error(values, right, bins=bins, scheme=scheme),
        brier_score(values, right),
        curve.aurc,
        curve.excess,
    ]


_METRICS = ("accuracy", "confidence", "ece", "brier", "aurc", "excess_aurc")


def _resampled(
    judges: Sequence[tuple[NDArray[np.floating[Any]], Bools]], bins: int, scheme: Scheme, bootstrap: int, seed: int
) -> tuple[Floats, Floats]:
    """Figures of each judge (J, 6), and of its resamples (R, J, 6), the same items for all judges."""
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 1:
        raise InputError(f"bootstrap must be at least 1 resample, got {bootstrap!r}")
    whole = np.array([_figures(*judge, bins, scheme) for judge in judges])
    generator = np.random.default_rng(seed)
    size = len(judges[0][1])
    drawn = np.empty((bootstrap, *whole.shape))
    for number in range(bootstrap):
        rows = generator.integers(size, size=size)
        for j, (values, right) in enumerate(judges):
            drawn[number, j] = _figures(values[rows], right[rows], bins, scheme)
    return whole, drawn


def _estimates(values: Floats, drawn: Floats, level: float) -> dict[str, Estimate]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    rows = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Estimate(*row) for name, row in zip(_METRICS, rows, strict=True)}
