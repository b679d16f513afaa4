"""The plots that decisions are read from: reliability, risk against coverage, ROC, scores by class, order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.signals.calibration import ReliabilityDiagram
from loglik.signals.detection import checked_pairs, roc_curve
from loglik.signals.metacognition import RiskCoverage
from loglik.signals.pages import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_by_class", "plot_order", "plot_reliability", "plot_risk_coverage", "plot_roc"]

_BLUE, _RED, _GREY = "#2458c8", "#c8402a", "#888888"


def plot_reliability(diagram: ReliabilityDiagram, *, title: str = "") -> Figure:
    """Accuracy against confidence with the bins' intervals, and how many rows each bin holds.

    Args:
        diagram: from `reliability_diagram`.
        title: above the plot.
    """
    figure = new_figure(width=5.2, height=5.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    spread = np.stack([diagram.accuracy - diagram.low, diagram.high - diagram.accuracy]).clip(min=0)
    top.errorbar(diagram.confidence, diagram.accuracy, yerr=spread, fmt="o-", color=_BLUE, capsize=2, markersize=4)
    top.set(ylabel=f"share correct ({diagram.level:.0%} intervals)", xlim=(0, 1), ylim=(0, 1), title=title)
    bottom.bar(diagram.confidence, diagram.count, width=0.02, color=_BLUE)
    bottom.set(xlabel="confidence", ylabel="rows")
    return figure


def plot_risk_coverage(curves: Mapping[str, RiskCoverage]) -> Figure:
    """Error rate among the most confident share, for every share.

    Args:
        curves: from `risk_coverage_curve`, by name.
    """
    figure = new_figure(width=6.0)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve.coverage, curve.risk, label=f"{name} (AURC {curve.aurc:.3f})", linewidth=1.5)
    axes.set(xlabel="share answered, most confident first", ylabel="share wrong", xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def plot_roc(scores: Mapping[str, Tensor | ArrayLike], positive: Tensor | ArrayLike) -> Figure:
    """One ROC curve per score.

    Args:
        scores: (N,) scores by name, the higher the more positive.
        positive: (N,) bool, or 0 and 1.

    Raises:
        InputError: as `roc_curve`.
    """
    figure = new_figure(width=5.0, height=4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    for name, values in scores.items():
        curve = roc_curve(values, positive)
        area = float(np.trapezoid(curve.tpr, curve.fpr))
        axes.plot(curve.fpr, curve.tpr, label=f"{name} ({area:.3f})", linewidth=1.5)
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8, title="AUROC", loc="lower right")
    return figure


def plot_by_class(
    scores: Tensor | ArrayLike, positive: Tensor | ArrayLike, *, names: tuple[str, str], label: str
) -> Figure:
    """Histograms of a score in both classes, as shares, over common bins.

    Args:
        scores: (N,).
        positive: (N,) bool, or 0 and 1.
        names: of the positive and of the negative class.
        label: of the axis.

    Raises:
        InputError: for NaN, labels other than 0 and 1, or unequal lengths.
    """
    values, chosen = checked_pairs(scores, positive, ("scores", "positive"))
    finite = np.isfinite(values)
    figure = new_figure(width=6.0)
    axes = figure.subplots()
    edges = np.histogram_bin_edges(values[finite], bins=40) if finite.any() else np.linspace(0, 1, 41)
    for name, mask, colour in ((names[0], chosen, _BLUE), (names[1], ~chosen, _RED)):
        kept = values[mask & finite]
        weights = np.full(len(kept), 1 / max(1, int(mask.sum())))
        axes.hist(kept, bins=edges.tolist(), weights=weights, alpha=0.6, label=f"{name} ({len(kept):,})", color=colour)
    axes.set(xlabel=label, ylabel="share of the class")
    axes.legend(fontsize=8)
    return figure


def plot_order(order: Tensor | ArrayLike, values: Tensor | ArrayLike, *, label: str) -> Figure:
    """A value against the place in the training order, with the means of twenty equal parts.

    Args:
        order: (N,) places.
        values: (N,) finite.
        label: of the value's axis.
    """
    places, numbers = (np.asarray(_plain(part), dtype=np.float64) for part in (order, values))
    ranks = places.argsort(kind="stable")
    figure = new_figure(width=7.0)
    axes = figure.subplots()
    axes.scatter(places, numbers, s=6, alpha=0.35, color=_BLUE, linewidths=0)
    parts = [part for part in np.array_split(ranks, min(20, len(ranks))) if len(part)]
    axes.plot([places[p].mean() for p in parts], [numbers[p].mean() for p in parts], "o-", color=_RED, markersize=3)
    axes.set(xlabel="place in the training order", ylabel=label)
    return figure


def _plain(values: Tensor | ArrayLike) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
