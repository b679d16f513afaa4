r"""How well a score follows compute, item by item over the models of a family.

Means over items follow compute whatever the items do. `score_compute_correlation` looks at each item by itself, and
`ScoreCompute` at the distribution of the correlations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import energy_distance, rankdata
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.detection import as_numbers

__all__ = ["Correlation", "ScoreCompute", "checked_scores", "score_compute_correlation"]

Correlation = Literal["pearson", "spearman", "kendall"]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ScoreCompute:
    """Correlations of a score with compute over models, one per item.

    Args:
        values: (K,) correlations of the items whose score varies over the models, in the order of the items.
        kept: (Q,) bool, the items that have one.
        method: ``pearson``, ``spearman`` or ``kendall``.
    """

    values: Floats
    kept: Bools
    method: Correlation

    @property
    def constant(self) -> float:
        """Share of the items whose score is the same for all models, so that they have no correlation."""
        return float(1 - self.kept.mean())

    @property
    def mean(self) -> float:
        """Mean over the items that have one."""
        return float(self.values.mean())

    @property
    def median(self) -> float:
        """Median over the items that have one."""
        return float(np.median(self.values))

    @property
    def area(self) -> float:
        r"""Under the survival function, :math:`\int_{-1}^1 P(r > t)\, dt = 1 + \bar r`."""
        return 1 + self.mean

    @property
    def wasserstein(self) -> float:
        r"""Minus the smaller Wasserstein distance to all ones or all minus ones, :math:`-\min_\pm E|r \mp 1|`."""
        return -min(float(np.abs(self.values - end).mean()) for end in (1.0, -1.0))

    @property
    def energy(self) -> float:
        """Minus the smaller energy distance to all ones or all minus ones (as `scipy.stats.energy_distance`)."""
        return -min(float(energy_distance(self.values, [end])) for end in (1.0, -1.0))

    def survival(self, at: Tensor | ArrayLike) -> Floats:
        """Share of the items whose correlation is above each value of `at`, whatever its shape."""
        thresholds = as_numbers(at, "at").astype(np.float64)
        below = np.searchsorted(np.sort(self.values), thresholds, side="right")
        return np.asarray(1 - below / len(self.values))


def score_compute_correlation(
    scores: Tensor | ArrayLike, compute: Tensor | ArrayLike, *, method: Correlation = "spearman"
) -> ScoreCompute:
    r"""Correlation over models of each item's score with log compute.

    .. math:: r_i = \operatorname{Corr}_m(\log C_m, s_i(m))

    Spearman and Kendall (tau-b) use average ranks for ties and do not see the logarithm. Checkpoints of one run are not
    independent models: the number of models supports no p-value.

    Args:
        scores: (M, Q) of Q items under M models; minus infinity is allowed where only ranks count.
        compute: (M,) FLOPs of each model (about 6 times parameters times tokens), positive.
        method: of the correlation.

    Returns:
        The correlations of the items whose score varies; those of constant scores do not exist and are left out, with
        their share in `constant`.

    Raises:
        InputError: for fewer than three models, compute that is not positive or all the same, scores that are NaN (or
            infinite, for Pearson), an unknown method, or if no item's score varies.

    Source: arXiv 2406.04391; equal to `scipy.stats`.
    """
    if method not in ("pearson", "spearman", "kendall"):
        raise InputError(f"method must be one of pearson, spearman, kendall, got {method!r}")
    table, spent = checked_scores(scores, compute, finite=method == "pearson")
    kept = (table != table[:1]).any(0)
    if not kept.any():
        raise InputError("no item's score varies over the models, so that no correlation exists: add other models")
    table = table[:, kept]
    if method == "kendall":
        return ScoreCompute(_kendall(spent, table), kept, method)
    x, y = (np.log(spent), table) if method == "pearson" else (rankdata(spent), rankdata(table, axis=0))
    return ScoreCompute(_pearson(x, y), kept, method)


def checked_scores(scores: Tensor | ArrayLike, compute: Tensor | ArrayLike, *, finite: bool) -> tuple[Floats, Floats]:
    """Scores (M, Q) and compute (M,), float64.

    Raises:
        InputError: for shapes that do not fit, fewer than three models, compute that is not positive or all the same,
            or a score that is NaN or plus infinity (with `finite`, minus infinity too).
    """
    table = as_numbers(scores, "scores").astype(np.float64)
    spent = as_numbers(compute, "compute").astype(np.float64)
    if table.ndim != 2 or not table.size or spent.shape != table.shape[:1]:
        raise InputError(f"scores (M, Q) need compute (M,), got {table.shape} and {spent.shape}")
    if len(spent) < 3:
        raise InputError(f"a correlation needs at least three models, got {len(spent)}: two always lie on a line")
    bad = np.flatnonzero(~((spent > 0) & np.isfinite(spent)))
    if len(bad):
        raise InputError(f"compute must be positive and finite, got {spent[bad[0]]} for model {int(bad[0])}")
    if (spent == spent[0]).all():
        raise InputError("all models have the same compute, so that nothing can follow it")
    odd = np.argwhere(~np.isfinite(table) if finite else (np.isnan(table) | (table == np.inf)))
    if len(odd):
        model, item = (int(i) for i in odd[0])
        mend = "leave the item out, or use ranks" if np.isneginf(table[model, item]) else "leave the item out"
        raise InputError(f"the score of item {item} under model {model} is {table[model, item]}: {mend}")
    return table, spent


def _pearson(x: Floats, table: Floats) -> Floats:
    """(Q,) of x (M,) with the columns of `table` (M, Q), none of them constant."""
    x = x - x.mean()
    centred = table - table.mean(0)
    centred = centred / np.abs(centred).max(0)  # else squares of tiny probabilities underflow
    return np.asarray(np.clip(x @ centred / np.sqrt((x @ x) * (centred**2).sum(0)), -1.0, 1.0))


def _kendall(x: Floats, table: Floats) -> Floats:
    """(Q,) tau-b: agreeing pairs of models less disagreeing ones, over the geometric mean of the untied pairs."""
    first, second = np.triu_indices(len(x), 1)
    order = np.sign(x[first] - x[second])
    # Comparisons, because the difference of two minus infinities is no number.
    signs = (table[first] > table[second]).astype(np.float64) - (table[first] < table[second])
    untied = np.sqrt((order**2).sum() * (signs**2).sum(0))
    return np.asarray(np.clip(order @ signs / untied, -1.0, 1.0))
