"""Scaling laws that are fitted find the law of the losses; budgets pick points of the frontier; plots show them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.code_plots import plot_code_areas, plot_code_frontiers
from loglik.signals.epiplexity import Epiplexity, at_budget, epiplexity_frontier
from loglik.signals.scaling_law import ScalingLaw, fit_scaling_law

LAWS = [ScalingLaw(1.69, 5e7, 0.34, 2e9, 0.28), ScalingLaw(0.8, 3e4, 0.7, 1e5, 0.5)]


def losses_of(values, units=None) -> LogLikelihood:
    values = torch.as_tensor(np.asarray(values, dtype=float))
    units = torch.ones(len(values), dtype=torch.long) if units is None else torch.as_tensor(units)
    return LogLikelihood(-values * units, Kind.EXACT, Unit.TOKEN, units)


def grid(law, sizes=5, steps=6):
    n, d = np.meshgrid(law.parameters * np.geomspace(0.03, 30, sizes), law.tokens * np.geomspace(0.03, 300, steps))
    n, d = n.ravel(), d.ravel()
    return n, d, np.array([law.loss(a, b) for a, b in zip(n, d, strict=True)])


# ------------------------------------------------------------------ fits
@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_exact_losses_is_found(law):
    n, d, loss = grid(law)
    units = np.random.default_rng(0).integers(1, 9, len(n))
    found = fit_scaling_law(losses_of(loss, units), n, d)
    for name in ("floor", "parameters", "alpha", "tokens", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-5)
    assert found.error < 1e-8
    assert found.points == 30


def test_noise_and_an_outlier_move_the_law_little():
    law = LAWS[0]
    n, d, loss = grid(law)
    noisy = loss * np.exp(np.random.default_rng(1).normal(0, 0.002, len(loss)))
    noisy[7] *= 1.5  # a run that failed: the Huber loss counts it linearly
    found = fit_scaling_law(losses_of(noisy), n, d)
    assert found.law.alpha == pytest.approx(law.alpha, rel=0.05)
    assert found.law.beta == pytest.approx(law.beta, rel=0.05)
    assert found.law.floor == pytest.approx(law.floor, rel=0.02)
    assert found.error == pytest.approx(math.log(1.5) / math.sqrt(30), rel=0.1)


def test_units_of_parameters_and_tokens_do_not_matter():
    n, d, loss = grid(LAWS[1])
    noisy = losses_of(loss * np.exp(np.random.default_rng(2).normal(0, 0.003, len(loss))))
    one, other = fit_scaling_law(noisy, n, d).law, fit_scaling_law(noisy, 1e3 * n, d / 50).law
    assert (one.alpha, one.beta, one.floor) == pytest.approx((other.alpha, other.beta, other.floor), rel=1e-6)
    assert other.parameters == pytest.approx(1e3 * one.parameters, rel=1e-5)
    assert other.tokens == pytest.approx(one.tokens / 50, rel=1e-5)


def test_losses_without_a_law_are_refused():
    n, d, loss = grid(LAWS[1])
    with pytest.raises(InputError, match="follow no scaling law in the parameters"):
        fit_scaling_law(losses_of(np.full(30, 2.0)), n, d)
    only_tokens = 1 + (d / 1e5) ** -0.5
    with pytest.raises(InputError, match="follow no scaling law in the parameters"):
        fit_scaling_law(losses_of(only_tokens), n, d)
    with pytest.raises(InputError, match="follow no scaling law in the tokens"):
        fit_scaling_law(losses_of(1 + (n / 3e4) ** -0.7), n, d)
    for sizes, steps in ((2, 6), (5, 2)):
        n, d, loss = grid(LAWS[1], sizes, steps)
        with pytest.raises(InputError, match="of three sizes and three numbers of tokens"):
            fit_scaling_law(losses_of(loss), n, d)
    n, d, loss = grid(LAWS[1])
    with pytest.raises(InputError, match="needs six runs"):
        fit_scaling_law(losses_of(loss[:5]), n[:5], d[:5])
    with pytest.raises(InputError, match=r"tokens must have shape \(30,\)"):
        fit_scaling_law(losses_of(loss), n, d[:29])
    with pytest.raises(InputError, match=r"parameters must be positive and finite, got -1\.0 for run 3"):
        fit_scaling_law(losses_of(loss), np.where(np.arange(30) == 3, -1, n), d)
    for value in (math.nan, -0.5, math.inf):
        with pytest.raises(RowError, match=f"run 4: the loss is {value}"):
            fit_scaling_law(losses_of(np.where(np.arange(30) == 4, value, loss)), n, d)
    with pytest.raises(InputError, match="huber must be positive"):
        fit_scaling_law(losses_of(loss), n, d, huber=0.0)


# ------------------------------------------------------------------ budgets
def test_a_budget_takes_the_last_point_it_pays_for():
    points = [Epiplexity(s, h, c, 1.0, 1.0) for s, h, c in ((1, 9, 1.0), (3, 4, 5.0), (4, 2, 20.0))]
    hull = epiplexity_frontier(points)
    assert hull == tuple(points)
    for budget, which in ((1.0, 0), (4.9, 0), (5.0, 1), (19.0, 1), (20.0, 2), (1e9, 2)):
        assert at_budget(hull, budget) == points[which]
    assert at_budget(hull) == points[2]
    with pytest.raises(InputError, match=r"a budget of 0.5 FLOPs pays for no point .* costs 1"):
        at_budget(hull, 0.5)
    for budget in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="the budget must be positive"):
            at_budget(hull, budget)
    with pytest.raises(InputError, match="there are no points"):
        at_budget(())


# ------------------------------------------------------------------ plots
def test_areas_are_shaded_above_their_level():
    tokens, bits = [10, 10, 20, 20], [5.0, 3.0, 2.0, 1.0]
    figure = plot_code_areas(
        {"a $b$": (tokens, bits, 2.0), "c": (torch.tensor(tokens), torch.tensor(bits), 0.0)}, label="y"
    )
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 2
    curve = panels[0].lines[0]
    assert curve.get_xdata().tolist() == [10, 20, 40, 60]
    assert curve.get_ydata().tolist() == bits
    shaded = panels[0].collections[0].get_paths()[0].vertices
    assert shaded[:, 1].min() == 2.0
    assert shaded[:, 1].max() == 5.0
    assert shaded[:, 0].max() == 40  # behind it the curve is below the level
    assert panels[0].get_title() == "a $b$"
    many = plot_code_areas({str(i): (tokens, bits, 0.0) for i in range(8)}, label="y")
    assert len([axes for axes in many.axes if axes.lines]) == 6


def test_frontiers_are_those_of_the_points():
    r = np.random.default_rng(0)
    points = [Epiplexity(*map(float, r.uniform(1, 9, 2)), float(c), 1.0, 1.0) for c in r.uniform(1, 100, 25)]
    figure = plot_code_frontiers({"prequential": points, "requential": points[:9]})
    left, right = figure.axes
    hull = epiplexity_frontier(points)
    assert left.lines[0].get_ydata().tolist() == [p.total for p in points]
    assert left.lines[1].get_ydata().tolist() == [p.total for p in hull]
    assert right.lines[0].get_ydata().tolist() == [p.structure for p in hull]
    assert left.get_xscale() == "log"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["prequential", "requential"]


def test_plots_refuse_what_is_no_curve():
    with pytest.raises(InputError, match="there are no curves"):
        plot_code_areas({}, label="y")
    for curve, message in (
        (([1, 2], [1.0], 0.0), "a needs as many tokens as bits"),
        (([], [], 0.0), "a needs as many"),
        (([1.0], [math.nan], 0.0), "not finite"),
        (([1.0], [1.0], math.inf), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            plot_code_areas({"a": curve}, label="y")
    with pytest.raises(InputError, match="there are no points"):
        plot_code_frontiers({"a": []})
