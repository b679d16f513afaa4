"""Means with bootstrap intervals, and the paired differences of several scorers on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError

__all__ = ["MeanIntervals", "bootstrap_means", "mean_intervals"]

# Values that resampling holds at once.
_RESAMPLED = 1 << 22


@dataclass(frozen=True, slots=True)
class MeanIntervals:
    """Means of K scorers over the same N rows.

    Args:
        mean: (K,).
        interval: (K, 2) of each mean.
        difference: (K,) to the first scorer.
        difference_interval: (K, 2) of each difference, from the same resampled rows (paired).
        level: confidence of the intervals.
    """

    mean: Tensor
    interval: Tensor
    difference: Tensor
    difference_interval: Tensor
    level: float


def mean_intervals(values: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> MeanIntervals:
    r"""Mean of each scorer with a percentile bootstrap interval, :math:`\frac{1}{N} \sum_n v_{kn}`.

    Rows are resampled, the same ones for all scorers: what rows have in common cancels in the differences.

    Args:
        values: (K, N) finite, such as the reciprocal ranks of N queries under K scorers; (N,) for one scorer.
        level: confidence of the intervals, in (0, 1).
        resamples: of the bootstrap.
        seed: of its random numbers.

    Raises:
        InputError: for another shape, fewer than two rows, or options out of range.
        RowError: for a value that is not finite.

    Source: Efron and Tibshirani 1993; equal to scipy's `bootstrap` with ``method="percentile"`` up to the draws.
    """
    rows = values.reshape(1, -1) if values.dim() == 1 else values
    if rows.dim() != 2 or not len(rows):
        raise InputError(f"values must have shape (K, N) or (N,), got {tuple(values.shape)}")
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if isinstance(resamples, bool) or resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    if rows.shape[1] < 2:
        raise InputError(f"an interval needs at least two rows, got {rows.shape[1]}")
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        scorer, row = bad[0].tolist()
        raise RowError(f"the value of scorer {scorer} is {float(rows[scorer, row])}", row=f"row {row}")
    table = rows.detach().double().cpu().numpy()
    drawn = bootstrap_means(table, resamples, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    mean = torch.tensor([math.fsum(row) / len(row) for row in table.tolist()], dtype=torch.float64)
    return MeanIntervals(
        mean,
        torch.from_numpy(np.quantile(drawn, tails, axis=1).T),
        mean - mean[:1],
        torch.from_numpy(np.quantile(drawn - drawn[:1], tails, axis=1).T),
        level,
    )


def bootstrap_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(K, R) means over R resamplings of the columns of (K, N), the same columns for all rows."""
    generator = np.random.default_rng(seed)
    rows, columns = values.shape
    at_once = max(1, _RESAMPLED // (rows * columns))
    parts = []
    for begin in range(0, resamples, at_once):
        index = generator.integers(columns, size=(min(at_once, resamples - begin), columns))
        parts.append(values[:, index].mean(-1))
    return np.concatenate(parts, axis=1)
