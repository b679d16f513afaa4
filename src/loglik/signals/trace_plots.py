"""Plots of reasoning traces: entropy against steps, and all traces at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loglik.errors import InputError
from loglik.signals.entropy_curve import EntropyCurve
from loglik.signals.pages import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve_matrix", "plot_entropy_curves"]

_BLUE, _RED, _GREY = "#2458c8", "#c8402a", "#888888"
_MOST_LINES = 200


def curve_matrix(curves: Sequence[EntropyCurve]) -> NDArray[np.float64]:
    """(N, K + 1) entropies, a row per trace; NaN (an empty cell of a heat map) after the end of a shorter trace.

    Raises:
        InputError: for no curves.
    """
    if not len(curves):
        raise InputError("there is no curve: give at least one")
    out = np.full((len(curves), 1 + max(curve.num_steps for curve in curves)), np.nan)
    for row, curve in zip(out, curves, strict=True):
        row[: curve.num_steps + 1] = curve.entropy.value.double().cpu().numpy()
    return out


def plot_entropy_curves(curves: Sequence[EntropyCurve], correct: Sequence[bool] | None = None) -> Figure:
    """Entropy against steps: a thin line per trace (of the first 200), and the mean of those that are still going.

    Args:
        curves: N curves.
        correct: (N,) whether the trace's answer is right; two colours and two means. None: one.

    Raises:
        InputError: for no curves, or unequal numbers.
    """
    matrix = curve_matrix(curves)
    flags = np.ones(len(matrix), dtype=bool) if correct is None else np.asarray(correct, dtype=bool)
    if flags.shape != (len(matrix),):
        raise InputError(f"correct must have a value for each of the {len(matrix)} curves, got {flags.shape}")
    figure = new_figure(width=6.4)
    axes = figure.subplots()
    steps = np.arange(matrix.shape[1])
    groups = [("mean", flags, _BLUE)]
    if correct is not None:
        groups = [("right", flags, _BLUE), ("wrong", ~flags, _RED)]
    for name, mask, colour in groups:
        own = matrix[mask]
        if not len(own):
            continue
        for row in own[:_MOST_LINES]:
            axes.plot(steps, row, color=colour, linewidth=0.6, alpha=0.25)
        there = (~np.isnan(own)).any(0)
        mean = np.nanmean(own[:, there], axis=0)
        axes.plot(steps[there], mean, "o-", color=colour, markersize=3, label=f"{name} ({len(own):,} traces)")
    axes.set(xlabel="steps read", ylabel="entropy of the answer, nats", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
