"""Plots of two-part codes: the area of a training curve that is structure, and the frontier of bits against compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.detection import as_numbers
from loglik.signals.epiplexity import Epiplexity, epiplexity_frontier
from loglik.signals.pages import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_code_areas", "plot_code_frontiers"]

_COLOURS = ("#2458c8", "#c8402a", "#2a8a4a", "#8a5ac8")
_MOST_PANELS = 6


def plot_code_areas(
    curves: Mapping[str, tuple[Tensor | ArrayLike, Tensor | ArrayLike, float]], *, label: str
) -> Figure:
    """One panel per run: bits per token against tokens read, and the area above a level shaded. The area is structure.

    Args:
        curves: by name, the (S,) tokens of each step, the (S,) bits per token at it, and the level: the final loss of a
            prequential code, 0 for divergences. Of more than six the first six are drawn.
        label: of the bits.

    Raises:
        InputError: for no curves, or one that is empty, not finite, or of unequal lengths.
    """
    if not curves:
        raise InputError("there are no curves: give that of one run at least")
    shown = list(curves.items())[:_MOST_PANELS]
    figure = new_figure(width=min(11.0, 1.2 + 2.8 * min(3, len(shown))), height=2.8 * -(-len(shown) // 3))
    panels = figure.subplots(-(-len(shown) // 3), min(3, len(shown)), squeeze=False, sharey=True).flatten()
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, (name, (tokens, bits, level)) in zip(panels, shown, strict=False):
        step, height = (as_numbers(part, name).astype(np.float64) for part in (tokens, bits))
        if step.ndim != 1 or not len(step) or step.shape != height.shape:
            raise InputError(f"{name} needs as many tokens as bits, got shapes {step.shape} and {height.shape}")
        if not (np.isfinite(step).all() and np.isfinite(height).all() and np.isfinite(level)):
            raise InputError(f"{name} has values that are not finite: leave them out")
        right = step.cumsum()
        panel.plot(right, height, color=_COLOURS[0], linewidth=1.2)
        panel.fill_between(right, level, height, where=(height >= level).tolist(), color=_COLOURS[0], alpha=0.25)
        panel.axhline(level, color=_COLOURS[1], linewidth=0.8)
        panel.set_title(name, fontsize=9, parse_math=False)
        panel.set_xlabel("tokens read", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel(label, parse_math=False)
    return figure


def plot_code_frontiers(points: Mapping[str, Sequence[Epiplexity]]) -> Figure:
    """Bits against compute: every point, the falling hull through the best, and below it the part that is structure.

    Args:
        points: codes of one data set by the name of their estimator.

    Raises:
        InputError: as `epiplexity_frontier`.
    """
    figure = new_figure(width=8.6, height=3.8)
    left, right = figure.subplots(1, 2, sharex=True)
    for number, (name, own) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        hull = epiplexity_frontier(own)
        left.plot([p.compute for p in own], [p.total for p in own], ".", color=colour, alpha=0.4)
        for axes, part in ((left, "total"), (right, "structure")):
            axes.plot([p.compute for p in hull], [getattr(p, part) for p in hull], "o-", color=colour, markersize=4)
            axes.lines[-1].set_label(name)
    for axes, part in ((left, "bits of model and data"), (right, "bits of structure on the hull")):
        axes.set_xscale("log")
        axes.set(xlabel="FLOPs", ylabel=part)
    for text in left.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure
