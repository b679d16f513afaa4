"""Plots of yes/no answers: what is drawn is what was given; bad values are refused."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.errors import InputError
from loglik.signals.answer_plots import plot_probabilities, plot_run_lengths
from loglik.signals.randomness import run_lengths


def test_histograms_count_all_values():
    figure = plot_probabilities({"raw": torch.tensor([0.0, 0.04, 0.5, 1.0]), "$other": [0.2]}, label="p")
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert (heights[0], heights[10], heights[19]) == (2, 1, 1)
    assert sum(heights) == 5
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["raw", "$other"]


def test_runs_are_drawn_beside_their_expectation():
    runs = run_lengths([[1, 1, 0, 1, 0, 0, 0, 1] * 3])
    (axes,) = plot_run_lengths(runs, title="$t").axes
    seen = [int(bar.get_height()) for bar in axes.patches]
    assert seen == runs.observed[: len(seen)].tolist()
    assert sum(seen) == int(runs.observed.sum())
    line = axes.get_lines()[0]
    assert line.get_ydata().tolist() == pytest.approx(runs.expected[: len(seen)].tolist())


@pytest.mark.parametrize("values", [[], [1.2], [math.nan], [-0.1], [[0.5]]])
def test_what_is_no_probability_is_not_drawn(values):
    with pytest.raises(InputError, match="raw must be one or more probabilities from 0 to 1"):
        plot_probabilities({"raw": values}, label="p")
    with pytest.raises(InputError, match="needs one column or more"):
        plot_probabilities({}, label="p")
