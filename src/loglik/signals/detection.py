r"""How well a score tells positives from negatives: AUROC, average precision, false positives at a hit rate.

A higher score speaks for the positive class; negate a score that says the opposite. Everything depends on the order of
the scores alone, so that infinite ones are welcome. Equal scores share one point of the curve, which is the mean over
all orders of the tie (mid-ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError

__all__ = [
    "DetectorReport",
    "Estimate",
    "RocCurve",
    "as_numbers",
    "auprc",
    "auroc",
    "auroc_stderr",
    "checked_pairs",
    "detector_report",
    "fpr_at_tpr",
    "proportion_interval",
    "roc_curve",
]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def auroc(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike) -> float:
    r"""Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    .. math:: \mathrm{AUROC} = \frac{1}{n_+ n_-} \sum_{i \in +} \sum_{j \in -}
              \bigl( 1[s_i > s_j] + \tfrac12 1[s_i = s_j] \bigr)

    Args:
        scores: (N,) the higher, the more positive; infinite ones are allowed.
        positive: (N,) bool, or 0 and 1.

    Returns:
        In [0, 1]; 0.5 is a score that says nothing.

    Raises:
        InputError: for one class only, a score that is NaN (with its row), labels other than 0 and 1, or unequal
            lengths.

    Source: Hanley and McNeil 1982; equal to scikit-learn's `roc_auc_score`.
    """
    return _auroc(*_counts(scores, positive, "AUROC")[1:])


def auprc(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike) -> float:
    r"""Area under the precision-recall curve as average precision, :math:`\sum_t (R_t - R_{t-1}) P_t`.

    The sum runs over the distinct scores from above; nothing is interpolated. The value of a score that says nothing
    is the share of positives (about), so that it must be read beside it.

    Args:
        scores: (N,) the higher, the more positive.
        positive: (N,) bool, or 0 and 1.

    Returns:
        In (0, 1].

    Raises:
        InputError: as `auroc`. (Average precision exists without negatives, where it is 1 whatever the scores are.)

    Source: equal to scikit-learn's `average_precision_score`.
    """
    return _auprc(*_counts(scores, positive, "average precision")[1:])


def fpr_at_tpr(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike, *, tpr: float = 0.95) -> float:
    r"""False-positive rate of the highest threshold that finds at least a share `tpr` of the positives.

    The threshold is one of the scores: rates between two points of the curve, which no threshold attains, are not
    interpolated.

    Args:
        scores: (N,) the higher, the more positive.
        positive: (N,) bool, or 0 and 1.
        tpr: hit rate, in (0, 1]; 0.95 gives what is called FPR95.

    Returns:
        In [0, 1]; the lower, the better.

    Raises:
        InputError: as `auroc`, or for a tpr out of range.
    """
    _require_rate(tpr)
    return _fpr_at_tpr(*_counts(scores, positive, "the false-positive rate")[1:], tpr)


@dataclass(frozen=True, slots=True)
class RocCurve:
    """Points of a ROC curve, from (0, 0) to (1, 1), one per distinct score.

    Args:
        fpr: (M + 1,) share of the negatives at or above the threshold.
        tpr: (M + 1,) share of the positives at or above it.
        precision: (M + 1,) share of positives among what is at or above it; that of the first point, where nothing
            is, is 1 by convention.
        thresholds: (M + 1,) falling; the first is +inf and stands for "none".
    """

    fpr: Floats
    tpr: Floats
    precision: Floats
    thresholds: Floats


def roc_curve(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike) -> RocCurve:
    """What a plot of a detector needs: both rates and the precision at every threshold.

    No point is dropped, not even on a straight line.

    Args:
        scores: (N,) the higher, the more positive.
        positive: (N,) bool, or 0 and 1.

    Raises:
        InputError: as `auroc`.

    Source: equal to scikit-learn's `roc_curve(..., drop_intermediate=False)`.
    """
    values, hits, alarms = _counts(scores, positive, "the ROC curve")
    found, false = (np.concatenate([[0], c.cumsum()]) for c in (hits, alarms))
    precision = np.concatenate([[1.0], found[1:] / (found + false)[1:]])
    return RocCurve(false / false[-1], found / found[-1], precision, np.concatenate([[np.inf], values]))


def auroc_stderr(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike) -> float:
    r"""DeLong's standard error of the AUROC.

    .. math:: \sqrt{\frac{\operatorname{var}_{i \in +} V_i}{n_+} + \frac{\operatorname{var}_{j \in -} V_j}{n_-}}

    where :math:`V` of a positive is the share of negatives below it and that of a negative the share of positives above
    it, ties counting half. It is 0 for a perfect detector, which is no certainty: with n of each class the AUROC of the
    population can still be below 1 by a few 1/n.

    Args:
        scores: (N,) the higher, the more positive.
        positive: (N,) bool, or 0 and 1; at least two of each class.

    Raises:
        InputError: as `auroc`, or for a class with one member.

    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    _, hits, alarms = _counts(scores, positive, "the standard error of the AUROC")
    for name, counts in (("positive", hits), ("negative", alarms)):
        if counts.sum() < 2:
            raise InputError(f"the standard error of the AUROC needs two of each class, and there is one {name} row")
    return _auroc_stderr(hits, alarms)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A `value` with its interval from `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DetectorReport:
    """A detector's figures with percentile bootstrap intervals.

    Args:
        auroc: area under the ROC curve.
        auprc: average precision; `prevalence` is that of a score that says nothing.
        fpr_at_tpr: false-positive rate where the hit rate is at least `tpr`.
        auroc_stderr: DeLong's standard error of the AUROC; None if a class has one member.
        tpr: the hit rate.
        level: confidence of the intervals.
        bootstrap: resamples behind them.
        num_positive: rows of the positive class.
        num_negative: rows of the other.
    """

    auroc: Estimate
    auprc: Estimate
    fpr_at_tpr: Estimate
    auroc_stderr: float | None
    tpr: float
    level: float
    bootstrap: int
    num_positive: int
    num_negative: int

    @property
    def prevalence(self) -> float:
        """Share of positives."""
        return self.num_positive / (self.num_positive + self.num_negative)

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON and tables."""
        figures = {"auroc": self.auroc, "auprc": self.auprc, f"fpr_at_{self.tpr:g}": self.fpr_at_tpr}
        flat: dict[str, Any] = {}
        for name, estimate in figures.items():
            flat |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return flat | {
            "auroc_stderr": self.auroc_stderr,
            "level": self.level,
            "bootstrap": self.bootstrap,
            "positives": self.num_positive,
            "negatives": self.num_negative,
        }


def detector_report(
    scores: Tensor | ArrayLike,
    positive: Tensor | ArrayLike,
    *,
    tpr: float = 0.95,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> DetectorReport:
    """AUROC, average precision and FPR at a hit rate, with stratified bootstrap intervals.

    Positives and negatives are resampled each among themselves, so that every resample has both classes and the same
    prevalence. The intervals treat rows as independent: with several rows per document, resample documents instead.
    On a detector without errors every resample is without errors too, and the interval has no width; it then says
    nothing about the next sample.

    Args:
        scores: (N,) the higher, the more positive.
        positive: (N,) bool, or 0 and 1.
        tpr: hit rate of the third figure, in (0, 1].
        bootstrap: resamples, at least 1.
        level: confidence of the percentile intervals, in (0, 1).
        seed: of the resampling.

    Raises:
        InputError: as `auroc`, or for options out of range.
    """
    _require_rate(tpr)
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 1:
        raise InputError(f"bootstrap must be at least 1 resample, got {bootstrap!r}")
    _, hits, alarms = _counts(scores, positive, "AUROC")
    generator = np.random.default_rng(seed)
    groups = np.arange(len(hits))
    rows = [np.repeat(groups, counts) for counts in (hits, alarms)]  # the distinct score of each row
    drawn = np.empty((bootstrap, 3))
    for number in range(bootstrap):
        resampled = [
            np.bincount(own[generator.integers(len(own), size=len(own))], minlength=len(groups)) for own in rows
        ]
        drawn[number] = _figures(resampled[0], resampled[1], tpr)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    figures = zip(_figures(hits, alarms, tpr), low.tolist(), high.tolist(), strict=True)
    area, precision, false = (Estimate(*figure) for figure in figures)
    enough = min(len(own) for own in rows) > 1
    return DetectorReport(
        area,
        precision,
        false,
        auroc_stderr=_auroc_stderr(hits, alarms) if enough else None,
        tpr=tpr,
        level=level,
        bootstrap=bootstrap,
        num_positive=len(rows[0]),
        num_negative=len(rows[1]),
    )


def _figures(hits: Counts, alarms: Counts, tpr: float) -> tuple[float, float, float]:
    return _auroc(hits, alarms), _auprc(hits, alarms), _fpr_at_tpr(hits, alarms, tpr)


def _auroc(hits: Counts, alarms: Counts) -> float:
    """From positives and negatives per distinct score, from above. Whole numbers until the division."""
    above = hits.cumsum()
    return float((alarms * (2 * above - hits)).sum()) / (2 * int(above[-1]) * int(alarms.sum()))


def _auprc(hits: Counts, alarms: Counts) -> float:
    found = hits.cumsum()
    seen = np.maximum(found + alarms.cumsum(), 1)  # 0 only where a resample drew nothing yet, and found nothing
    return float((hits * (found / seen)).sum() / found[-1])


def _fpr_at_tpr(hits: Counts, alarms: Counts, tpr: float) -> float:
    found = hits.cumsum()
    needed = math.ceil(tpr * int(found[-1]) * (1 - 1e-12))  # 0.95 * 20 is 19, not a little more
    return float(alarms[: int(np.searchsorted(found, needed)) + 1].sum() / alarms.sum())


def _auroc_stderr(hits: Counts, alarms: Counts) -> float:
    above, below = hits.cumsum() - hits / 2, alarms.sum() - alarms.cumsum() + alarms / 2
    total = 0.0
    for own, placed in ((hits, below / alarms.sum()), (alarms, above / hits.sum())):
        n = own.sum()
        mean = (own * placed).sum() / n
        total += float((own * (placed - mean) ** 2).sum() / (n - 1) / n)
    return math.sqrt(total)


def _require_rate(tpr: float) -> None:
    if not 0 < tpr <= 1:
        raise InputError(f"tpr must be above 0 and at most 1, got {tpr}")


def _counts(scores: Tensor | ArrayLike, positive: Tensor | ArrayLike, what: str) -> tuple[Floats, Counts, Counts]:
    """Distinct scores from above, with the positives and negatives that have each."""
    values, chosen = checked_pairs(scores, positive, ("scores", "positive"))
    found = int(chosen.sum())
    if found in (0, len(chosen)):
        which = "positive" if found else "negative"
        which = f"all {len(chosen)} rows are {which}" if len(chosen) else "there are no rows"
        raise InputError(
            f"{what} is undefined with one class only: it compares positives with negatives, and {which}; add rows of "
            "the other class"
        )
    distinct, which_score = np.unique(values, return_inverse=True)
    hits, alarms = (np.bincount(which_score[c], minlength=len(distinct))[::-1] for c in (chosen, ~chosen))
    return distinct[::-1].astype(np.float64), hits, alarms


def proportion_interval(successes: Counts, count: Counts, level: float) -> tuple[Floats, Floats]:
    """Exact (Clopper-Pearson) intervals of binomial proportions, both (M,); from 0 to 1 where the count is 0.

    Raises:
        InputError: for a level outside (0, 1).
    """
    from scipy.stats import beta

    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    tail = (1 - level) / 2
    some, rest = np.maximum(successes, 1), np.maximum(count - successes, 1)
    low = np.where(successes > 0, beta.ppf(tail, some, count - successes + 1), 0.0)
    high = np.where(successes < count, beta.ppf(1 - tail, successes + 1, rest), 1.0)
    return low, high


def checked_pairs(
    scores: Tensor | ArrayLike, labels: Tensor | ArrayLike, names: tuple[str, str]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Scores (N,) in their own dtype and labels (N,) as bool, of equal number, without NaN.

    Args:
        scores: (N,) numbers; infinite ones pass.
        labels: (N,) bool, or 0 and 1.
        names: what to call the two in a refusal.

    Raises:
        InputError: for anything else, naming the rows.
    """
    values, marks = (as_numbers(given, name) for given, name in zip((scores, labels), names, strict=True))
    for name, given in zip(names, (values, marks), strict=True):
        if given.ndim != 1:
            raise InputError(f"{name} must have shape (N,), got {given.shape}")
    if len(values) != len(marks):
        raise InputError(f"{names[0]} and {names[1]} must be of one length, got {len(values)} and {len(marks)}")
    bad = np.flatnonzero(np.isnan(values))
    if len(bad):
        rows = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise InputError(f"{names[0]} holds NaN in row {rows}: remove the rows or mend the values")
    wrong = np.flatnonzero((marks != 0) & (marks != 1))
    if len(wrong):
        raise InputError(f"{names[1]} must be 0 or 1 (or bool), got {marks[wrong[0]]} in row {int(wrong[0])}")
    return values, marks == 1


def as_numbers(values: Tensor | ArrayLike, name: str) -> NDArray[Any]:
    """As a NumPy array of numbers, exactly: bfloat16, which NumPy has not, is widened."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name} must be numbers: {error}") from None
    if array.dtype.kind not in "bifu":
        raise InputError(f"{name} must be numbers, got {array.dtype}")
    return array
