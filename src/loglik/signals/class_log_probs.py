"""Class log-probabilities (N, K) and labels (N,) as the calibration signals take them: checked, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.detection import as_numbers

__all__ = ["Scale", "checked_log_probs", "checked_rows", "class_log_probs"]

Scale = Literal["logits", "log_probs", "probs"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# How far the log of a row's total probability may be from 0: float32 log-softmax passes, logits do not.
_SUM_TOLERANCE = 1e-3


def checked_log_probs(
    log_probs: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, normalised: bool = True
) -> tuple[Floats, Ints]:
    """Log-probabilities (N, K) in float64 as by `checked_rows`, and labels (N,) in 0..K-1.

    Raises:
        InputError: as `checked_rows`, and for labels out of range or unequal lengths.
    """
    values = checked_rows(log_probs, normalised=normalised)
    classes = as_numbers(labels, "labels")
    if classes.shape != values.shape[:1]:
        raise InputError(f"{len(values)} rows need labels of shape ({len(values)},), got {classes.shape}")
    classes = classes.astype(np.int64) if classes.dtype == np.bool_ else classes
    wrong = np.flatnonzero(~((classes >= 0) & (classes < values.shape[1]) & (classes == np.floor(classes))))
    if len(wrong):
        raise InputError(
            f"labels must be whole numbers from 0 to {values.shape[1] - 1}, got {classes[wrong[0]]} in row "
            f"{int(wrong[0])}"
        )
    return values, classes.astype(np.int64)


def checked_rows(log_probs: Tensor | ArrayLike, *, normalised: bool = True) -> Floats:
    """Log-probabilities (N, K) in float64.

    Args:
        log_probs: (N, K) nats; with `normalised` False logits. -inf is probability 0.
        normalised: whether rows must sum to 1.

    Raises:
        InputError: for rows that are no distribution, or no rows.
    """
    name = "log-probabilities" if normalised else "logits"
    values = as_numbers(log_probs, name).astype(np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{name} must have shape (N, K) with at least one row and class, got {values.shape}")
    with np.errstate(invalid="ignore"):
        total = logsumexp(values, axis=1)
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        raise InputError(f"the {name} in row {int(bad[0])} are no distribution: they hold NaN or +inf, or are all -inf")
    off = np.flatnonzero(np.abs(total) > _SUM_TOLERANCE) if normalised else bad
    if len(off):
        raise InputError(
            f"the probabilities in row {int(off[0])} sum to {np.exp(total[off[0]]):.4g} and not to 1: give the "
            "log-softmax of logits, or the logarithm of probabilities"
        )
    return values


def class_log_probs(values: Tensor | ArrayLike, scale: Scale) -> Floats:
    """Class scores (N, K) of any scale as normalised log-probabilities, nats, float64.

    Args:
        values: (N, K).
        scale: ``logits`` of any sum, ``log_probs``, or ``probs`` in [0, 1]; rows of the latter two sum to 1.

    Raises:
        InputError: for probabilities outside [0, 1], rows that are no distribution, no rows, or another scale.
    """
    if scale not in ("logits", "log_probs", "probs"):
        raise InputError(f"scale must be logits, log_probs or probs, got {scale!r}")
    given = as_numbers(values, scale).astype(np.float64)
    if scale == "probs":
        outside = np.argwhere(~((given >= 0) & (given <= 1)))
        if len(outside):
            place = tuple(outside[0])
            raise InputError(f"probabilities must lie in [0, 1], got {given[place]:g} in row {int(place[0])}")
        with np.errstate(divide="ignore"):
            given = np.log(given)
    return np.asarray(log_softmax(checked_rows(given, normalised=scale != "logits"), axis=1))
