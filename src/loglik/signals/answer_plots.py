"""Plots of yes/no answers: how often a model says yes, and how long it stays with an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.pages import new_figure
from loglik.signals.randomness import RunLengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_probabilities", "plot_run_lengths"]

_BLUE, _RED, _GREY = "#2458c8", "#c8402a", "#888888"


def plot_probabilities(probabilities: Mapping[str, Tensor | ArrayLike], *, label: str) -> Figure:
    """Histograms of probabilities in twenty bins of [0, 1], one over the other, with a line at 1/2.

    Args:
        probabilities: (N,) in [0, 1], by name.
        label: of their axis.

    Raises:
        InputError: for no values, or one outside [0, 1].
    """
    if not probabilities:
        raise InputError("a histogram of probabilities needs one column or more")
    figure = new_figure(width=6.4)
    axes = figure.subplots()
    for number, (name, column) in enumerate(probabilities.items()):
        values = np.asarray(column.detach().cpu().numpy() if isinstance(column, Tensor) else column, dtype=np.float64)
        if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
            raise InputError(f"{name} must be one or more probabilities from 0 to 1")
        axes.hist(values, bins=np.linspace(0, 1, 21).tolist(), alpha=0.6, label=name, color=(_BLUE, _RED)[number % 2])
    axes.axvline(0.5, color=_GREY, linewidth=1, linestyle="--")
    axes.set(ylabel="rows", xlim=(0, 1))
    axes.set_xlabel(label, parse_math=False)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def plot_run_lengths(runs: RunLengths, *, title: str = "") -> Figure:
    """How many runs of equal answers have each length, beside what independent answers give.

    Args:
        runs: from `run_lengths`; what is longer than any run that is seen or expected is left out.
        title: above the plot.
    """
    seen = (runs.observed > 0) | (runs.expected >= 0.5)
    last = int(seen.nonzero().max()) + 1
    figure = new_figure(width=6.4)
    axes = figure.subplots()
    lengths = runs.lengths[:last].numpy()
    axes.bar(lengths, runs.observed[:last].numpy(), color=_BLUE, alpha=0.75, label="seen")
    axes.plot(lengths, runs.expected[:last].numpy(), "o-", color=_RED, markersize=4, label="independent answers")
    axes.set(xlabel="length of the run", ylabel="runs")
    axes.set_title(title, parse_math=False)
    axes.legend(fontsize=8)
    return figure
