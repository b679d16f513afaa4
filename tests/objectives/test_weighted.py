"""Reward-weighted regression and best of N against loops, limits and cross-entropy to the exact target."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives import MaximumLikelihood
from loglik.objectives.weighted import best_of_n, reward_weighted_regression

GROUPS = torch.tensor([0, 0, 0, 2, 2, 7])
REWARDS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5, 4.0])
LOG_PROBS = [-3.0, -1.0, -2.0, -5.0, -0.5, -4.0]


def policy(values=LOG_PROBS, kind=Kind.EXACT, dtype=torch.float32):
    value = torch.tensor(values, dtype=dtype, requires_grad=True)
    return LogLikelihood(value, kind, Unit.TOKEN, torch.ones(len(values), dtype=torch.long))


def gradient(terms, given):
    return torch.autograd.grad(terms.mean(), given.value)[0]


def by_group(groups):
    return [(groups == g).nonzero().flatten() for g in groups.unique().tolist()]


# ------------------------------------------------------------------ reward-weighted regression
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("max_weight", [None, 0.5])
def test_normalised_weights_by_loops(beta, max_weight):
    given = policy()
    terms = reward_weighted_regression(given, REWARDS, GROUPS, beta=beta, max_weight=max_weight)
    total, want = 0.0, torch.zeros(6)
    for rows in by_group(GROUPS):
        weights = (REWARDS[rows] / beta).softmax(0)
        weights = weights if max_weight is None else weights.clamp(max=max_weight)
        total -= float((weights * given.value.detach()[rows]).sum())
        want[rows] = -weights / 3
    assert terms.mean().item() == pytest.approx(total / 3, rel=1e-6)
    torch.testing.assert_close(gradient(terms, given), want)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("max_weight", [None, 0.5])
def test_weights_against_the_best_by_loops(beta, max_weight):
    given = policy()
    terms = reward_weighted_regression(given, REWARDS, GROUPS, beta=beta, max_weight=max_weight, normalise=False)
    want = torch.zeros(6)
    for rows in by_group(GROUPS):
        weights = ((REWARDS[rows] - REWARDS[rows].max()) / beta).exp()
        want[rows] = -(weights if max_weight is None else weights.clamp(max=max_weight)) / 6
    torch.testing.assert_close(gradient(terms, given), want)
    torch.testing.assert_close(terms.mean(), (want * given.value).sum())


def test_plain_weights_up_to_a_factor_per_group():
    """Both forms are exp(r / beta) times a constant of the group."""
    plain = (REWARDS / 0.7).exp()
    for normalise in (False, True):
        terms = reward_weighted_regression(policy(), REWARDS, GROUPS, beta=0.7, normalise=normalise)
        for rows in by_group(GROUPS):
            ratio = terms.metrics["weight"][rows] / plain[rows]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_minimum_is_the_tilted_distribution():
    """Cross-entropy over all outcomes, drawn as often as q says, is least at q exp(r / beta) / Z."""
    counts, rewards, beta = torch.tensor([4, 3, 2, 1]), torch.tensor([0.0, 1.0, 2.0, 0.5]), 0.8
    outcomes = torch.repeat_interleave(torch.arange(4), counts)
    target = counts / counts.sum() * (rewards / beta).exp()
    target = target / target.sum()
    logits = target.double().log().requires_grad_()
    value = logits.log_softmax(0)[outcomes]
    given = LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(10, dtype=torch.long))
    for normalise in (True, False):
        terms = reward_weighted_regression(given, rewards[outcomes], beta=beta, normalise=normalise)
        (slope,) = torch.autograd.grad(terms.mean(), logits, retain_graph=True)
        torch.testing.assert_close(slope, torch.zeros(4, dtype=torch.float64), atol=1e-7, rtol=0)


def test_limits_of_the_temperature():
    given = policy()
    cold = reward_weighted_regression(given, REWARDS, GROUPS, beta=1e-4)
    torch.testing.assert_close(cold.mean(), best_of_n(given, REWARDS, GROUPS).mean())
    hot = reward_weighted_regression(given, REWARDS, beta=1e8, normalise=False)
    torch.testing.assert_close(hot.mean(), MaximumLikelihood("sum")(given).mean(), atol=1e-5, rtol=0)
    normalised = reward_weighted_regression(given, REWARDS, beta=1e8)
    torch.testing.assert_close(normalised.mean(), hot.mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_huge_rewards_stay_finite_and_a_constant_per_group_changes_nothing(normalise):
    shift = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, 3e3])
    plain, moved, far = (
        reward_weighted_regression(policy(dtype=torch.float64), r.double(), GROUPS, normalise=normalise)
        for r in (REWARDS, REWARDS + shift, REWARDS * 1e4)
    )
    torch.testing.assert_close(moved.loss, plain.loss, atol=1e-9, rtol=1e-9)
    assert far.loss.isfinite().all()


def test_without_groups_the_batch_is_one_group():
    alone = reward_weighted_regression(policy(), REWARDS)
    same = reward_weighted_regression(policy(), REWARDS, torch.full((6,), 3))
    torch.testing.assert_close(alone.mean(), same.mean())
    assert alone.metrics["weight"].sum().item() == pytest.approx(1.0)


def test_metrics_and_what_is_detached():
    rewards = REWARDS.clone().requires_grad_()
    terms = reward_weighted_regression(policy(), rewards, GROUPS, beta=1e9)
    torch.testing.assert_close(terms.metrics["effective_sample_size"], torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(terms.metrics["reward"], REWARDS)
    terms.mean().backward()
    assert rewards.grad is None
    assert not any(m.requires_grad for m in (terms.weight, *terms.metrics.values()))
    sharp = reward_weighted_regression(policy(), rewards, GROUPS, beta=0.01)
    torch.testing.assert_close(sharp.metrics["effective_sample_size"], torch.ones(3))


@pytest.mark.parametrize("normalise", [True, False])
def test_a_step_cut_between_groups_has_the_same_loss(normalise):
    """Limits on weights included: what the sum is divided by does not depend on them."""
    options = {"beta": 0.5, "max_weight": 0.6, "normalise": normalise}
    whole = reward_weighted_regression(policy(), REWARDS, GROUPS, **options)
    parts = [
        reward_weighted_regression(policy()[rows], REWARDS[rows], GROUPS[rows], **options) for rows in by_group(GROUPS)
    ]
    cut = sum(p.loss.sum() for p in parts) / sum(p.weight.sum() for p in parts)
    torch.testing.assert_close(cut, whole.mean())


# ------------------------------------------------------------------ best of N
@pytest.mark.parametrize("negative_weight", [0.0, 0.4, 1.0])
def test_best_of_n_by_loops(negative_weight):
    given = policy()
    terms = best_of_n(given, REWARDS, GROUPS, negative_weight=negative_weight)
    want = torch.tensor(
        [
            1.0 + negative_weight * (-3.0 - 2.0) / 2,
            0.5 + negative_weight * -5.0,
            4.0,
        ]
    )
    torch.testing.assert_close(terms.loss, want)
    slope = torch.tensor([0.5, -1.0, 0.5, 1.0, -1.0, -1.0]) / 3
    slope[[0, 2, 3]] *= negative_weight
    torch.testing.assert_close(gradient(terms, given), slope)
    torch.testing.assert_close(terms.metrics["reward"], torch.tensor([2.0, -0.25, 4.0]))
    torch.testing.assert_close(terms.metrics["best_reward"], torch.tensor([3.0, 0.5, 4.0]))
    torch.testing.assert_close(terms.metrics["best_log_prob"], torch.tensor([-1.0, -0.5, -4.0]))
    torch.testing.assert_close(terms.metrics["other_log_prob"], torch.tensor([-2.5, -5.0, 0.0]))
    assert not any(m.requires_grad for m in (terms.weight, *terms.metrics.values()))


def test_of_pairs_it_is_maximum_likelihood_of_the_chosen():
    """Pref-FT."""
    given, chosen = policy(), torch.tensor([True, False, True, False, False, True])
    terms = best_of_n(given, chosen.float(), torch.tensor([0, 0, 1, 1, 2, 2]))
    want = MaximumLikelihood("sum")(given[chosen])
    torch.testing.assert_close(terms.loss, want.loss)
    torch.testing.assert_close(terms.mean(), want.mean())


def test_ties_share_the_place():
    given = policy([-3.0, -1.0, -2.0, -5.0])
    groups = torch.zeros(4, dtype=torch.long)
    terms = best_of_n(given, torch.tensor([1.0, 1.0, 0.0, -1.0]), groups, negative_weight=0.5)
    assert terms.loss.item() == pytest.approx(2.0 + 0.5 * -3.5)
    level = best_of_n(given, torch.ones(4), groups, negative_weight=0.5)
    assert level.loss.item() == pytest.approx(11 / 4)
    torch.testing.assert_close(gradient(level, given), torch.full((4,), -0.25))


def test_order_within_groups_and_their_numbers_do_not_matter():
    order = torch.tensor([2, 0, 1, 4, 3, 5])
    values = torch.tensor(LOG_PROBS)
    for function in (best_of_n, reward_weighted_regression):
        want = function(policy(), REWARDS, GROUPS).mean()
        shuffled = function(policy(values[order].tolist()), REWARDS[order], 5 * GROUPS - 3)
        torch.testing.assert_close(shuffled.mean(), want)


def test_an_impossible_completion_that_is_not_used_does_no_harm():
    """Log 0 of a loser stays out of the plain best of N."""
    given = policy([-1.0, -math.inf])
    terms = best_of_n(given, torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    assert terms.loss.isfinite().all()
    assert gradient(terms, given).tolist() == [-1.0, 0.0]
    far = reward_weighted_regression(given, torch.tensor([1e4, 0.0]))
    assert far.mean().item() == 1.0
    assert gradient(far, given).tolist() == [-1.0, 0.0]


# ------------------------------------------------------------------ refusals
def test_refusals():
    given = policy()
    for function in (reward_weighted_regression, best_of_n):
        cases = [
            ((policy(kind=Kind.UPPER_BOUND), REWARDS, GROUPS), "upper bound"),
            ((given, REWARDS[:5], GROUPS), r"needs rewards of shape \(6,\), got \(5,\)"),
            ((given, REWARDS.log(), GROUPS), "rewards of row 3 is nan"),
            ((given, REWARDS / 0, GROUPS), "rewards of row 0 is inf"),
            ((given, REWARDS, GROUPS[:5]), r"got 6 rows and groups of shape \(5,\)"),
            ((given, REWARDS, GROUPS.float()), "groups must be integers"),
            ((given, REWARDS, GROUPS.flip(0)), "groups must ascend, and row 1 goes back"),
            ((given[:0], REWARDS[:0], GROUPS[:0]), "needs the prompt of every completion: got 0 rows"),
        ]
        for arguments, match in cases:
            with pytest.raises(InputError, match=match):
                function(*arguments)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="beta must be positive"):
            reward_weighted_regression(given, REWARDS, beta=beta)
    with pytest.raises(InputError, match="max_weight must be positive"):
        reward_weighted_regression(given, REWARDS, max_weight=0.0)
    for weight in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="negative_weight must be at least 0"):
            best_of_n(given, REWARDS, GROUPS, negative_weight=weight)
