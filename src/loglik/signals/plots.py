"""The plots that decisions are read from: reliability, risk against coverage, ROC, scores by class, heat maps, ...

Names that come from data are drawn as they are (never as formulas), shortened, on one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.calibration import ReliabilityDiagram
from loglik.signals.detection import checked_pairs, roc_curve
from loglik.signals.metacognition import RiskCoverage
from loglik.signals.pages import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "plot_bars",
    "plot_by_class",
    "plot_heat_map",
    "plot_lines",
    "plot_order",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_roc",
]

_BLUE, _RED, _GREY = "#2458c8", "#c8402a", "#888888"
_LONGEST_NAME = 28
_MOST_NAMES = 40  # of an axis; of more, every second, third, ... is written
_MOST_NUMBERS = 12  # rows and columns of a heat map in which the numbers are written


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


def plot_heat_map(
    matrix: Tensor | ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    title: str = "",
    diverging: bool = False,
) -> Figure:
    """A matrix as colours; up to 12 x 12 cells have their numbers written in them.

    Args:
        matrix: (R, C); NaN leaves a cell empty.
        rows: R names, from the top; long ones are shortened.
        columns: C names.
        label: of the colours.
        title: above the plot.
        diverging: two colours that meet at 0, for values of both signs.

    Raises:
        InputError: for a matrix without any value, with an infinite one, or with other numbers of names.
    """
    values = np.asarray(_plain(matrix), dtype=np.float64)
    if values.shape != (len(rows), len(columns)):
        raise InputError(
            f"a heat map of {len(rows)} rows and {len(columns)} columns needs a matrix of that shape, "
            f"got {tuple(values.shape)}"
        )
    if not np.isfinite(values).any() or np.isinf(values).any():
        raise InputError("a heat map needs finite values, and NaN where a cell is empty: it has none, or infinite ones")
    figure = new_figure(
        width=min(12.0, 3.4 + 0.42 * len(columns)),
        height=min(12.0, 1.9 + (0.34 if len(rows) <= 30 else 0.2) * len(rows)),
    )
    axes = figure.subplots()
    bound = float(np.nanmax(np.abs(values))) or 1.0
    low, high = (-bound, bound) if diverging else (float(np.nanmin(values)), float(np.nanmax(values)))
    drawn = axes.imshow(values, cmap="RdBu_r" if diverging else "viridis", vmin=low, vmax=high, aspect="auto")
    figure.colorbar(drawn, ax=axes, label=label)
    for axis, names, turned in ((axes.xaxis, columns, 90), (axes.yaxis, rows, 0)):
        places = range(0, len(names), math.ceil(len(names) / _MOST_NAMES))
        axis.set_ticks(list(places), [_short(names[i]) for i in places], fontsize=8, rotation=turned, parse_math=False)
    axes.set_title(title, parse_math=False)
    if max(values.shape) <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = drawn.to_rgba(np.asarray(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axes.text(
                    column,
                    row,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    return figure


def plot_bars(
    values: Mapping[str, float], *, label: str, intervals: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """One horizontal bar per name, from the top, with its interval where there is one.

    Args:
        values: finite, by name.
        label: of their axis.
        intervals: ends of the intervals by name, of all or of some; a value may lie outside its own.

    Raises:
        InputError: for no values, a value or an end that is not finite, an interval that falls, or one without a value.
    """
    if not values:
        raise InputError("bars need one value or more")
    spans = dict(intervals or {})
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"bars need finite values, and that of {name} is {value}")
    for name, (low, high) in spans.items():
        if name not in values or not -math.inf < low <= high < math.inf:
            raise InputError(
                f"the interval of {name} must be two rising finite numbers beside a value, got {low}, {high}"
            )
    figure = new_figure(width=7.0, height=min(14.0, 1.0 + 0.34 * len(values)))
    axes = figure.subplots()
    places = {name: place for place, name in enumerate(values)}
    axes.barh(list(places.values()), list(values.values()), color=_BLUE, alpha=0.75)
    for name, (low, high) in spans.items():
        axes.plot([low, high], [places[name]] * 2, color=_RED, marker="|", linewidth=1.5)
    names = [_short(name) for name in values]
    axes.yaxis.set_ticks(list(places.values()), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.set_xlabel(label, parse_math=False)
    return figure


def plot_lines(
    curves: Mapping[str, tuple[Tensor | ArrayLike, Tensor | ArrayLike]], *, x_label: str, y_label: str
) -> Figure:
    """One line per name.

    Args:
        curves: the (N,) places and the (N,) values of each, by name.
        x_label: of the places.
        y_label: of the values.

    Raises:
        InputError: for no curves, or one that is empty, not finite, or of unequal lengths.
    """
    if not curves:
        raise InputError("lines need one curve or more")
    figure = new_figure(width=6.4)
    axes = figure.subplots()
    for name, curve in curves.items():
        x, y = (np.asarray(_plain(part), dtype=np.float64) for part in curve)
        if x.ndim != 1 or not len(x) or x.shape != y.shape:
            raise InputError(f"{name} needs as many places as values, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError(f"{name} has places or values that are not finite: leave them out")
        mark = "o" if len(x) <= 60 else ""
        axes.plot(x, y, marker=mark, markersize=3, linewidth=1.5, label=_short(name))
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def _short(name: str) -> str:
    """One line of at most 28 characters; what is not printable as its escape."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _plain(values: Tensor | ArrayLike) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
