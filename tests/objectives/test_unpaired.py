"""Objectives on labelled completions against TRL's KTO, torch's cross-entropy and one another."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives.preference import apo_zero, bco_pair, nca_pair
from loglik.objectives.unpaired import implicit_reward_ce, kl_estimate, kto
from preference_peers import (
    assert_same_training,
    exact,
    random_pairs,
    tiny_likelihoods,
    tiny_sums,
    trl_kto,
    unnormalised,
)

ZERO = torch.zeros(())
LABELS = torch.tensor([True, False, False, True, True, False])
OBJECTIVES = [partial(kto, kl=ZERO), implicit_reward_ce]
IDS = ["kto", "ce"]


# ------------------------------------------------------------------ KTO
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", [LABELS, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)])
def test_kto_is_trls_in_value_gradient_and_metrics(labels, seed):
    """With an estimate that is positive and one that is negative (clamped), and with one label missing."""
    pairs, other = random_pairs(seed), random_pairs(seed + 10)
    settings = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    policy, _, reference, _ = pairs.likelihoods()
    for mismatched in (other.likelihoods()[0::2], other.likelihoods()[2::-2]):
        kl = kl_estimate(*mismatched)
        terms = kto(policy, reference, labels, kl, **settings)
        expected, metrics = trl_kto(
            pairs.chosen,
            pairs.chosen_mask,
            reference.value,
            labels,
            (mismatched[0].value, mismatched[1].value.detach()),
            **settings,
        )
        torch.testing.assert_close(terms.mean(), expected, atol=1e-5, rtol=1e-5)
        got, wanted = (torch.autograd.grad(x, pairs.chosen, retain_graph=True)[0] for x in (terms.mean(), expected))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert float(terms.metrics["kl"].mean()) == pytest.approx(metrics["kl"], abs=1e-5)
        for ours, theirs in (("rewards_desirable", "rewards/chosen"), ("rewards_undesirable", "rewards/rejected")):
            assert len(terms.metrics[ours]) == 0 or float(terms.metrics[ours].mean()) == pytest.approx(
                metrics[theirs], abs=1e-5
            )
    assert {float(kl_estimate(*m)) > 0 for m in (other.likelihoods()[0::2], other.likelihoods()[2::-2])} == {
        True,
        False,
    }


def test_kto_without_kl_on_balanced_pairs_is_half_of_apo_zero():
    a, b, c, d = random_pairs(1).likelihoods()
    labels = torch.arange(12) < 6
    loss = kto(LogLikelihood.cat([a, b]), LogLikelihood.cat([c, d]), labels, ZERO, beta=0.3).mean()
    torch.testing.assert_close(loss, apo_zero(a, b, c, d, beta=0.3).mean() / 2)


def test_kto_at_the_reference_is_half_the_mean_weight():
    one = exact([-1.0, -2.0, -3.0])
    terms = kto(one, one, torch.tensor([True, True, False]), ZERO, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(terms.loss, torch.tensor([1.0, 1.0, 1.5]))
    assert torch.equal(terms.weight, torch.ones(3))


def test_the_reference_point_is_constant_and_not_negative():
    """It lowers desirable rewards and raises the other loss; it gets no gradient."""
    values = exact([-1.0, -2.0]), exact([-1.5, -1.0]), torch.tensor([True, False])
    kl = torch.tensor(0.7, requires_grad=True)
    value = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = kto(exact(value), *values[1:], kl, beta=1.0)
    torch.testing.assert_close(terms.loss, torch.sigmoid(torch.tensor([-(0.5 - 0.7), -1.0 - 0.7])))
    assert torch.autograd.grad(terms.mean(), (value, kl), allow_unused=True)[1] is None
    below = kto(*values, torch.tensor(-5.0), beta=1.0)
    torch.testing.assert_close(below.loss, kto(*values, ZERO, beta=1.0).loss)
    assert below.metrics["kl"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(kto(*values, torch.tensor([0.7]), beta=1.0).loss, terms.loss)


def test_kl_estimate_of_samples_is_the_divergence():
    """Outcomes in proportion to the policy's probabilities give KL(policy || reference)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    rows = torch.repeat_interleave(torch.tensor([5, 3, 2]))
    value = policy.log()[rows].requires_grad_()
    kl = kl_estimate(exact(value), exact(reference.log()[rows]))
    expected = (policy * (policy.log() - reference.log())).sum()
    torch.testing.assert_close(kl, expected)
    assert kl.shape == ()
    assert not kl.requires_grad
    assert float(kl_estimate(exact([-2.0, -1.0]), exact([-1.0, -1.5]))) == 0.0


# ------------------------------------------------------------------ implicit-reward cross-entropy
def test_cross_entropy_is_torchs_on_logits():
    pairs = random_pairs(2)
    policy, _, reference, _ = pairs.likelihoods()
    loss = implicit_reward_ce(policy, reference, LABELS, beta=0.3).mean()
    a, _, c, _ = pairs.sums()
    expected = F.binary_cross_entropy_with_logits(0.3 * (a - c), LABELS.float())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, pairs.chosen)[0] for x in (loss, expected)))


def test_cross_entropy_at_the_reference_is_log_two():
    one = exact([-1.0, -2.0])
    terms = implicit_reward_ce(one, one, torch.tensor([True, False]))
    torch.testing.assert_close(terms.loss, torch.full((2,), math.log(2)))
    assert terms.metrics["rewards"].tolist() == [0.0, 0.0]


def test_cross_entropy_raises_the_right_and_lowers_the_wrong():
    value = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = implicit_reward_ce(exact(value), exact([-1.0, -1.0]), torch.tensor([True, False]), beta=0.05)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), value)
    torch.testing.assert_close(gradient, torch.tensor([-0.025, 0.025]))


def test_cross_entropy_of_pairs_is_bco_and_part_of_nca():
    a, b, c, d = random_pairs(3).likelihoods()
    yes, no = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    ce = partial(implicit_reward_ce, beta=0.3)
    torch.testing.assert_close(ce(a, c, yes).loss + ce(b, d, no).loss, bco_pair(a, b, c, d, beta=0.3).loss)
    nca = ce(a, c, yes).loss + 0.5 * ce(a, c, no).loss + 0.5 * ce(b, d, no).loss
    torch.testing.assert_close(nca, nca_pair(a, b, c, d, beta=0.3).loss)


def test_cross_entropy_recovers_the_log_odds_of_the_label():
    """3 of 4 right: beta s = log 3; the log-ratio takes up the base rate."""
    start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([start], max_iter=50, tolerance_grad=1e-12, tolerance_change=0)
    labels = torch.tensor([True, True, True, False])

    def closure():
        optimiser.zero_grad()
        loss = implicit_reward_ce(exact(start.expand(4)), exact(torch.zeros(4).double()), labels, beta=0.5).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert start.item() * 0.5 == pytest.approx(math.log(3), abs=1e-6)


# ------------------------------------------------------------------ both
@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (
            partial(kto, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5),
            lambda s, label, kl: torch.where(
                label, 1.5 * (1 - torch.sigmoid(0.2 * (s - kl))), 0.5 * (1 - torch.sigmoid(0.2 * (kl - s)))
            ),
        ),
        (
            lambda p, r, label, kl: implicit_reward_ce(p, r, label, beta=0.2),
            lambda s, label, kl: -torch.log(torch.where(label, torch.sigmoid(0.2 * s), 1 - torch.sigmoid(0.2 * s))),
        ),
    ],
    ids=IDS,
)
def test_on_a_real_model_equal_to_the_formula_in_plain_torch(ours, expected):
    policy, reference = (LogLikelihood.cat(tiny_likelihoods()[i : i + 2]) for i in (0, 2))
    sums = tiny_sums()
    ratio = torch.cat(sums[:2]) - torch.cat(sums[2:])
    kl = torch.tensor(0.4)
    assert_same_training(ours(policy, reference, LABELS, kl).mean(), expected(ratio, LABELS, kl).mean())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_metrics_are_per_completion_and_detached(objective):
    pairs = random_pairs(4)
    pairs.reference_chosen.requires_grad_()
    policy, _, reference, _ = pairs.likelihoods()
    terms = objective(policy, reference, LABELS, beta=0.3)
    a, _, c, _ = (s.detach() for s in pairs.sums())
    metrics = terms.metrics
    torch.testing.assert_close(metrics["log_ratio"], a - c)
    torch.testing.assert_close(metrics["log_prob"], a)
    torch.testing.assert_close(metrics["rewards"], 0.3 * (a - c))
    torch.testing.assert_close(metrics["rewards_desirable"], 0.3 * (a - c)[LABELS])
    torch.testing.assert_close(metrics["rewards_undesirable"], 0.3 * (a - c)[~LABELS])
    torch.testing.assert_close(metrics["margin"], 0.3 * (a - c) * torch.where(LABELS, 1.0, -1.0))
    assert torch.equal(metrics["accuracy"], ((a > c) == LABELS).float())
    assert not any(v.requires_grad for v in (*metrics.values(), terms.weight))
    terms.mean().backward()
    assert pairs.reference_chosen.grad is None
    assert float(pairs.chosen.grad.abs().sum()) > 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_finite_at_a_log_ratio_of_ten_thousand(objective):
    value = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    terms = objective(exact(value), exact([0.0] * 4), torch.tensor([True, True, False, False]), beta=1.0)
    (gradient,) = torch.autograd.grad(terms.mean(), value)
    assert bool(torch.isfinite(terms.loss).all())
    assert bool(torch.isfinite(gradient).all())


def test_arguments_are_what_training_supplies():
    def positional(f):
        return [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(kto) == ["policy", "reference", "labels", "kl"]
    assert positional(implicit_reward_ce) == ["policy", "reference", "labels"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_refusals(objective):
    good, labels = exact([-1.0, -2.0]), torch.tensor([True, False])
    with pytest.raises(InputError, match="needs log-likelihoods under a frozen reference"):
        objective(good, None, labels)
    with pytest.raises(InputError, match="upper bound"):
        objective(exact([-1.0, -2.0], Kind.UPPER_BOUND), good, labels)
    with pytest.raises(InputError, match="2 and 1 rows"):
        objective(good, exact([-1.0]), labels)
    with pytest.raises(InputError, match="different unknown constants"):
        objective(unnormalised([-1.0, -2.0], "new"), unnormalised([-1.0, -2.0], "old"), labels)
    with pytest.raises(InputError, match=r"labels, a bool tensor \(2,\).* got torch.float32 \(2,\)"):
        objective(good, good, labels.float())
    with pytest.raises(InputError, match=r"got torch.bool \(1,\)"):
        objective(good, good, labels[:1])
    with pytest.raises(InputError, match="got list"):
        objective(good, good, [True, False])
    with pytest.raises(InputError, match="beta must be positive"):
        objective(good, good, labels, beta=0.0)
    longer = LogLikelihood(good.value, good.kind, good.unit, torch.tensor([1, 2]))
    with pytest.raises(InputError, match="row 1 has 2 scored tokens under the policy and 1 under the reference"):
        objective(longer, good, labels)


def test_refusals_of_kto():
    good, labels = exact([-1.0, -2.0]), torch.tensor([True, False])
    for kl in (None, 0.3, torch.zeros(2)):
        with pytest.raises(InputError, match=r"KTO needs kl, one number over the whole step: give kl_estimate"):
            kto(good, good, labels, kl)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(InputError, match=f"{name} must be finite and at least 0, got -1"):
            kto(good, good, labels, ZERO, **{name: -1.0})
    with pytest.raises(InputError, match="needs at least one completion"):
        kl_estimate(exact([]), exact([]))
    with pytest.raises(InputError, match="frozen reference"):
        kl_estimate(good, None)
    with pytest.raises(InputError, match="different unknown constants"):
        kl_estimate(unnormalised([-1.0], "new"), unnormalised([-1.0], "old"))
