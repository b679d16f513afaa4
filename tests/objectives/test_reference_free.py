"""Preference objectives without a reference against TRL's own code, plain torch on a real model and closed forms."""

from __future__ import annotations

import inspect
import math
from decimal import Decimal, getcontext
from functools import partial

import pytest
import torch

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives import MaximumLikelihood, reference_free
from loglik.objectives.preference import dpo, hinge_norm, length_normalised_dpo
from loglik.objectives.reference_free import cpo, hinge, orpo, simpo, slic
from preference_peers import (
    assert_same_training,
    exact,
    random_pairs,
    tiny_likelihoods,
    tiny_sums,
    trl_cpo,
    trl_orpo,
    unnormalised,
)

OBJECTIVES = [hinge, slic, simpo, cpo, orpo]
MEANS = [simpo, orpo]


def means(pairs):
    """Mean log-probabilities per token of both sides, by plain torch."""
    chosen, rejected, *_ = pairs.sums()
    lengths = pairs.lengths()
    return chosen / lengths[0], rejected / lengths[1]


# ------------------------------------------------------------------ TRL
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(2))
def test_cpo_and_simpo_are_trls(seed, smoothing):
    pairs = random_pairs(seed)
    both = pairs.likelihoods()[:2]
    ours = cpo(*both, beta=0.3, nll_weight=0.0, label_smoothing=smoothing).mean()
    sums = pairs.sums()[:2]
    pairs.assert_same(ours, trl_cpo(*sums, "sigmoid", beta=0.3, label_smoothing=smoothing)[0].mean())
    ours = simpo(*both, beta=2.5, gamma=0.7, label_smoothing=smoothing).mean()
    theirs = trl_cpo(*means(pairs), "simpo", beta=2.5, gamma=0.7, label_smoothing=smoothing)[0].mean()
    pairs.assert_same(ours, theirs)


def test_cpo_adds_the_likelihood_per_token_as_trl_does():
    """TRL: the mean over pairs plus cpo_alpha times the cross-entropy of all chosen tokens."""
    pairs = random_pairs(2)
    nll = -pairs.chosen[pairs.chosen_mask].mean()
    theirs = trl_cpo(*pairs.sums()[:2], "sigmoid", beta=0.3)[0].mean() + 0.6 * nll
    pairs.assert_same(cpo(*pairs.likelihoods()[:2], beta=0.3, nll_weight=0.6).mean(), theirs)


def test_hinge_and_slic_are_trls_hinge():
    pairs = random_pairs(3)
    both = pairs.likelihoods()[:2]
    pairs.assert_same(hinge(*both, gamma=0.3).mean(), trl_cpo(*pairs.sums()[:2], "hinge", beta=0.3)[0].mean())
    pairs.assert_same(slic(*both).mean(), trl_cpo(*pairs.sums()[:2], "hinge", beta=1.0)[0].mean())


def test_orpo_is_trls():
    """TRL's likelihood part is taken over the completion here, its odds part as it is."""
    pairs = random_pairs(4)
    terms = orpo(*pairs.likelihoods()[:2], beta=0.4)
    penalty, rewards_chosen, rewards_rejected, _, odds = trl_orpo(*means(pairs), beta=0.4)
    pairs.assert_same(terms.mean(), -pairs.chosen[pairs.chosen_mask].mean() - penalty.mean())
    torch.testing.assert_close(terms.metrics["rewards_chosen"], rewards_chosen)
    torch.testing.assert_close(terms.metrics["rewards_rejected"], rewards_rejected)
    torch.testing.assert_close(terms.metrics["log_odds_ratio"].mean(), odds.detach())


# ------------------------------------------------------------------ plain torch on a real model
LENGTHS = torch.tensor([3.0, 5.0, 1.0]), torch.tensor([4.0, 2.0, 4.0])  # of the completions in preference_peers


def plain_odds(mean):
    return torch.log(mean.exp() / (1 - mean.exp()))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (partial(hinge, gamma=0.05), lambda w, r: torch.clamp(1 - 0.05 * (w - r), min=0).mean()),
        (
            partial(slic, delta=6.0, nll_weight=0.5),
            lambda w, r: torch.clamp(6 - w + r, min=0).mean() - 0.5 * w.sum() / 9,
        ),
        (
            partial(simpo, beta=2.0, gamma=1.0),
            lambda w, r: -torch.log(torch.sigmoid(2 * (w / LENGTHS[0] - r / LENGTHS[1]) - 1)).mean(),
        ),
        (cpo, lambda w, r: -torch.log(torch.sigmoid(0.1 * (w - r))).mean() - w.sum() / 9),
        (
            partial(orpo, beta=0.4),
            lambda w, r: (
                -w.sum() / 9
                - 0.4 * torch.log(torch.sigmoid(plain_odds(w / LENGTHS[0]) - plain_odds(r / LENGTHS[1]))).mean()
            ),
        ),
    ],
)
def test_on_a_real_model_equal_to_the_formula_in_plain_torch(ours, expected):
    assert_same_training(ours(*tiny_likelihoods()[:2]).mean(), expected(*tiny_sums()[:2]))


# ------------------------------------------------------------------ how they are related
def test_hinge_is_gamma_times_slic_of_margin_one_over_gamma():
    both = random_pairs(5).likelihoods()[:2]
    torch.testing.assert_close(hinge(*both, gamma=0.2).loss, 0.2 * slic(*both, delta=5.0).loss)


def test_under_a_reference_that_is_the_same_everywhere_the_losses_agree():
    """CPO is DPO, hinge is hinge-norm, SimPO without a margin is length-normalised DPO."""
    a, b, *_ = random_pairs(6).likelihoods()
    flat = [LogLikelihood(torch.full_like(x.value, -4.0), x.kind, x.unit, x.num_units) for x in (a, b)]
    torch.testing.assert_close(cpo(a, b, nll_weight=0.0).loss, dpo(a, b, *flat).loss)
    torch.testing.assert_close(hinge(a, b).loss, hinge_norm(a, b, *flat).loss)
    none = [LogLikelihood(torch.zeros_like(x.value), x.kind, x.unit, x.num_units) for x in (a, b)]
    torch.testing.assert_close(simpo(a, b, gamma=0.0).loss, length_normalised_dpo(a, b, *none, beta=2.0).loss)


def test_likelihood_is_added_over_its_own_tokens():
    both = random_pairs(7).likelihoods()[:2]
    nll = MaximumLikelihood()(both[0]).mean()
    for objective in (slic, cpo):
        alone = objective(*both, nll_weight=0.0)
        torch.testing.assert_close(objective(*both, nll_weight=0.3).mean(), alone.mean() + 0.3 * nll)
        assert list(alone.parts())[1:] == []


def test_smoothing_is_the_expectation_over_flipped_labels():
    a, b, *_ = random_pairs(8, dtype=torch.float64).likelihoods()
    for objective in (partial(cpo, nll_weight=0.0), partial(simpo, gamma=0.0)):
        mixed = 0.8 * objective(a, b).loss + 0.2 * objective(b, a).loss
        torch.testing.assert_close(objective(a, b, label_smoothing=0.2).loss, mixed)


def test_slic_stops_pushing_at_its_margin():
    chosen = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = slic(exact(chosen), exact([-2.5, -1.5]), delta=1.0)
    assert terms.loss.tolist() == [0.0, 0.5]
    assert torch.autograd.grad(terms.loss.sum(), chosen)[0].tolist() == [0.0, -1.0]


# ------------------------------------------------------------------ odds near certainty
@pytest.mark.parametrize("mean", [-1e-30, -1e-12, -1e-7, -1e-3, -0.69, -0.7, -3.0, -60.0, -2000.0])
def test_odds_are_exact_from_near_certain_to_hopeless(mean):
    """Against 60 digits: value, and gradient 1 / (1 - p) of the log-odds."""
    getcontext().prec = 60
    logp = Decimal(torch.tensor(mean).item())  # as float32 holds it
    rest = 1 - logp.exp()
    expected, slope = float(logp - rest.ln()), float(1 / rest)
    value = torch.tensor([mean], requires_grad=True)
    one = exact([-math.log(2.0)])  # odds 1
    odds = orpo(exact(value), one).metrics["log_odds_ratio"]
    torch.testing.assert_close(odds, torch.tensor([expected]), atol=1e-6, rtol=2e-6)
    terms = orpo(one, exact(value), beta=1.0)  # rejected: the gradient is sigma(odds) / (1 - p)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), value)
    push = float(1 / (1 + (-Decimal(expected)).exp()))
    torch.testing.assert_close(gradient, torch.tensor([push * slope], dtype=torch.float64).float(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("pair", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (1e-7, -1.0), (-1e4, 0.0), (0.0, -1e4)])
def test_certain_completions_have_a_finite_loss_and_gradient(pair):
    values = [torch.tensor([v], requires_grad=True) for v in pair]
    terms = orpo(*map(exact, values))
    assert bool(torch.isfinite(terms.mean()))
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(terms.mean(), values))


def test_densities_have_no_odds():
    with pytest.raises(InputError, match="row 1 has a mean log-probability of 2 > 0: densities have no odds"):
        orpo(exact([-1.0, 2.0]), exact([-1.0, -1.0]))


# ------------------------------------------------------------------ metrics, extremes, refusals
def test_metrics_say_what_the_loss_compares():
    pairs = random_pairs(9)
    both = pairs.likelihoods()[:2]
    sums = [s.detach() for s in pairs.sums()[:2]]
    averages = [m.detach() for m in means(pairs)]
    for objective, scale, scores in (
        (partial(hinge, gamma=0.3), 0.3, sums),
        (slic, 1.0, sums),
        (partial(cpo, beta=0.3), 0.3, sums),
        (partial(simpo, beta=0.3), 0.3, averages),
        (partial(orpo, beta=0.3), 0.3, averages),
    ):
        terms = objective(*both)
        metrics = terms.metrics
        torch.testing.assert_close(metrics["rewards_chosen"], scale * scores[0])
        torch.testing.assert_close(metrics["rewards_rejected"], scale * scores[1])
        torch.testing.assert_close(metrics["margin"], scale * (scores[0] - scores[1]))
        assert torch.equal(metrics["accuracy"], (scores[0] > scores[1]).float())
        torch.testing.assert_close(metrics["log_prob_chosen"], sums[0])
        torch.testing.assert_close(metrics["log_prob_rejected"], sums[1])
        assert torch.equal(terms.weight, torch.ones(6))
        assert all(v.shape == (6,) and not v.requires_grad for v in (*metrics.values(), terms.weight))
        for gradient in pairs.gradients(terms.mean()):
            assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "objective", [partial(hinge, gamma=1.0), slic, partial(simpo, beta=1.0), partial(cpo, beta=1.0), orpo]
)
def test_finite_at_a_margin_of_ten_thousand(objective, sign):
    values = [torch.tensor([v], requires_grad=True) for v in ((-1.0, -10001.0)[::sign])]
    terms = objective(*map(exact, values))
    gradients = torch.autograd.grad(terms.mean(), values, allow_unused=True)
    assert bool(torch.isfinite(terms.mean()))
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
    if sign == -1:
        assert float(gradients[0]) < 0 < float(gradients[1])


def test_arguments_are_what_training_supplies():
    assert {f.__name__ for f in OBJECTIVES} == set(reference_free.__all__)
    for objective in OBJECTIVES:
        parameters = inspect.signature(objective).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["chosen", "rejected"]
        assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_likelihoods_that_cannot_be_trained_on_are_refused(objective):
    good = exact([-1.0, -2.0])
    with pytest.raises(InputError, match="upper bound"):
        objective(good, exact([-1.0, -2.0], Kind.UPPER_BOUND))
    with pytest.raises(InputError, match="2 and 1 rows"):
        objective(good, exact([-1.0]))
    bounds = [exact([-1.0, -2.0], Kind.LOWER_BOUND), exact([-3.0, -1.0], Kind.LOWER_BOUND)]
    torch.testing.assert_close(objective(*bounds).loss, objective(exact([-1.0, -2.0]), exact([-3.0, -1.0])).loss)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unknown_constants_are_allowed_where_they_cancel(objective):
    chosen, rejected = unnormalised([-1.0], "energy"), unnormalised([-3.0], "energy")
    if objective in (hinge, slic):
        torch.testing.assert_close(objective(chosen, rejected).loss, objective(exact([-1.0]), exact([-3.0])).loss)
        with pytest.raises(InputError, match="unknown constants differ"):
            objective(chosen, unnormalised([-3.0], "another"))
    else:
        with pytest.raises(InputError, match="unknown constant makes meaningless"):
            objective(chosen, rejected)
    cpo(chosen, rejected, nll_weight=0.0)


@pytest.mark.parametrize("objective", MEANS)
@pytest.mark.parametrize("side", [0, 1])
def test_means_per_token_need_tokens(objective, side):
    both = [exact([-1.0, -2.0]), exact([-1.0, -2.0])]
    both[side] = LogLikelihood(both[side].value, both[side].kind, both[side].unit, torch.tensor([2, 0]))
    with pytest.raises(InputError, match="row 1 has none"):
        objective(*both)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (hinge, {"gamma": 0.0}, "gamma must be positive"),
        (slic, {"delta": 0.0}, "delta must be positive"),
        (slic, {"nll_weight": -0.1}, "nll_weight must be finite and at least 0"),
        (simpo, {"beta": 0.0}, "beta must be positive"),
        (simpo, {"gamma": -0.1}, "gamma must be finite and at least 0, got -0.1"),
        (simpo, {"label_smoothing": 0.6}, "label_smoothing must lie between 0 and 0.5"),
        (cpo, {"beta": math.inf}, "beta must be positive and finite, got inf"),
        (cpo, {"nll_weight": math.nan}, "nll_weight must be finite"),
        (cpo, {"label_smoothing": -0.1}, "label_smoothing must lie between"),
        (orpo, {"beta": 0.0}, "beta must be positive"),
    ],
)
def test_options_out_of_range_are_refused(objective, settings, message):
    with pytest.raises(InputError, match=message):
        objective(*random_pairs().likelihoods()[:2], **settings)
