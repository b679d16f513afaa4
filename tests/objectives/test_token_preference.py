"""TAB-PO against its formula token by token, TRL's length-normalised DPO, and the limits of its barrier."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
import torch

from loglik.errors import InputError
from loglik.kinds import ConstantKey, Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives.preference import length_normalised_dpo
from loglik.objectives.token_preference import tab_po
from preference_peers import SIDES, assert_same_training, random_pairs, tiny_likelihoods, trl_dpo

LOG2 = math.log(2)


def random_weights(pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [0.2 + torch.rand(mask.shape, generator=generator) for mask in (pairs.chosen_mask, pairs.rejected_mask)]


def by_the_formula(likelihoods, weights, *, beta, tau, barrier_weight):
    """Row by row and token by token."""
    losses = []
    for row in range(len(likelihoods[0])):
        means = []
        for side in range(2):
            policy, reference = likelihoods[side], likelihoods[side + 2]
            scored = policy.mask[row].nonzero().flatten().tolist()
            total = sum(float(weights[side][row, t]) for t in scored)
            w = {t: float(weights[side][row, t]) * len(scored) / total for t in scored}
            terms = [w[t] * (policy.per_unit[row, t] - reference.per_unit[row, t].detach()) for t in scored]
            means.append(sum(terms) / len(scored))
            if side == 0:
                gated = [t for t in scored if float(policy.per_unit[row, t].detach()) < math.log(tau)]
                nll = sum((-w[t] * policy.per_unit[row, t] for t in gated), torch.zeros(()))
                barrier = nll / max(1.0, sum(w[t] for t in gated))
        losses.append(-torch.log(torch.sigmoid(beta * (means[0] - means[1]))) + barrier_weight * barrier)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tau", [0.1, 0.4, 0.66, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_equal_to_the_formula_token_by_token(seed, tau):
    pairs = random_pairs(seed)
    weights = random_weights(pairs, seed)
    settings = {"beta": 0.5, "tau": tau, "barrier_weight": 0.7}
    likelihoods = pairs.likelihoods()
    pairs.assert_same(
        tab_po(*likelihoods, *weights, **settings).mean(), by_the_formula(likelihoods, weights, **settings)
    )


def test_on_a_real_model_equal_to_the_formula_token_by_token():
    likelihoods = tiny_likelihoods()
    generator = torch.Generator().manual_seed(0)
    weights = [0.2 + torch.rand(one.mask.shape, generator=generator) for one in likelihoods[:2]]
    settings = {"beta": 0.5, "tau": 0.3, "barrier_weight": 0.7}
    assert_same_training(
        tab_po(*likelihoods, *weights, **settings).mean(), by_the_formula(likelihoods, weights, **settings)
    )


@pytest.mark.parametrize("weight", [None, 0.3])
def test_without_a_barrier_and_with_equal_weights_it_is_length_normalised_dpo(weight):
    """Ours, and TRL's loss_type sigmoid_norm."""
    pairs = random_pairs(1)
    weights = [] if weight is None else [torch.full(mask.shape, weight) for mask in (pairs.chosen_mask,) * 2]
    loss = tab_po(*pairs.likelihoods(), *weights, beta=0.5, barrier_weight=0.0).mean()
    pairs.assert_same(loss, length_normalised_dpo(*pairs.likelihoods(), beta=0.5).mean())
    pairs.assert_same(loss, trl_dpo(pairs, ["sigmoid_norm"], beta=0.5)[0])


def test_the_scale_of_the_weights_changes_nothing():
    pairs = random_pairs(2)
    first, second = random_weights(pairs)
    loss = tab_po(*pairs.likelihoods(), first, second).mean()
    pairs.assert_same(loss, tab_po(*pairs.likelihoods(), 7.0 * first, 0.01 * second).mean())


def test_a_token_of_weight_zero_is_not_there():
    """As if it were not scored, in score and barrier, but for the count that the mean weight is taken over."""
    pairs = random_pairs(3)
    likelihoods = pairs.likelihoods()
    weights = pairs.chosen_mask.float()
    long = (pairs.chosen_mask.sum(-1) > 1).nonzero().flatten()
    last = pairs.chosen_mask.shape[1] - 1 - pairs.chosen_mask.flip(1).int().argmax(1)
    weights[long, last[long]] = 0
    terms = tab_po(*likelihoods, weights, None, barrier_weight=0.0)
    a, c = (LogLikelihood.from_per_unit(getattr(pairs, s), weights.bool()) for s in (SIDES[0], SIDES[2]))
    torch.testing.assert_close(terms.loss, tab_po(a, likelihoods[1], c, likelihoods[3], barrier_weight=0.0).loss)


def test_no_token_is_below_a_vanishing_threshold():
    pairs = random_pairs(4)
    terms = tab_po(*pairs.likelihoods(), tau=1e-30, barrier_weight=5.0)
    assert terms.metrics["barrier"].tolist() == [0.0] * 6
    assert terms.metrics["gated"].tolist() == [0.0] * 6
    pairs.assert_same(terms.mean(), tab_po(*pairs.likelihoods(), barrier_weight=0.0).mean())


def test_with_every_token_gated_the_barrier_is_the_mean_token_likelihood():
    """tau = 1 and equal weights: DPO plus lambda times the supervised loss of each chosen completion."""
    pairs = random_pairs(5)
    terms = tab_po(*pairs.likelihoods(), tau=1.0, barrier_weight=0.7)
    nll = -pairs.likelihoods()[0].mean_per_unit().value
    torch.testing.assert_close(terms.metrics["barrier"], nll.detach())
    assert terms.metrics["gated"].tolist() == [1.0] * 6
    pairs.assert_same(terms.mean(), length_normalised_dpo(*pairs.likelihoods(), beta=0.5).mean() + 0.7 * nll.mean())


def test_the_gate_is_constant_in_the_gradient():
    """The barrier's gradient is -w_t / max(1, sum of gated w) on gated tokens and 0 elsewhere, also near the gate."""
    per_unit = torch.tensor([[math.log(0.66) - 1e-6, math.log(0.66) + 1e-6, -3.0, -0.01]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    policy = LogLikelihood.from_per_unit(per_unit, mask)
    frozen = policy.detach()
    weights = torch.tensor([[1.0, 1.0, 2.0, 4.0]])
    terms = tab_po(policy, frozen, frozen, frozen, weights, weights, barrier_weight=1.0)
    (with_barrier,) = torch.autograd.grad(terms.mean(), per_unit, retain_graph=True)
    (without,) = torch.autograd.grad(
        tab_po(policy, frozen, frozen, frozen, weights, weights, barrier_weight=0.0).mean(), per_unit
    )
    w = weights[0] * 4 / 8
    expected = torch.where(torch.tensor([True, False, True, False]), -w / (w[0] + w[2]), 0.0)
    torch.testing.assert_close((with_barrier - without)[0], expected)
    assert terms.metrics["gated"].tolist() == [0.5]


def test_little_gated_weight_is_not_scaled_up():
    """The denominator is at least 1: one gated token of weight 1/4 counts a quarter."""
    policy = LogLikelihood.from_per_unit(torch.tensor([[-2.0, -0.01]]), torch.ones(1, 2, dtype=torch.bool))
    weights = torch.tensor([[0.25, 1.75]])
    terms = tab_po(policy, policy, policy, policy, weights, weights)
    torch.testing.assert_close(terms.metrics["barrier"], torch.tensor([0.25 * 2.0]))


def test_the_gate_looks_at_the_policy_and_at_the_chosen_side_only():
    pairs = random_pairs(6)
    a, b, c, d = pairs.likelihoods()
    first = tab_po(a, b, c, d).metrics["barrier"]
    torch.testing.assert_close(tab_po(a, b, c * 3.0, d).metrics["barrier"], first)
    torch.testing.assert_close(tab_po(a, b * 3.0, c, d).metrics["barrier"], first)
    assert bool((tab_po(a * 3.0, b, c, d).metrics["barrier"] > first).any())


def test_at_the_reference_the_preference_part_is_log_two():
    pairs = random_pairs(7)
    a, b, *_ = pairs.likelihoods()
    terms = tab_po(a, b, a, b, *random_weights(pairs), barrier_weight=0.0)
    torch.testing.assert_close(terms.loss, torch.full((6,), LOG2))


def test_equal_completions_train_only_the_barrier():
    pairs = random_pairs(8)
    a, _, c, _ = pairs.likelihoods()
    weights = random_weights(pairs)[0]
    same = tab_po(a, a, c, c, weights, weights, barrier_weight=0.0)
    torch.testing.assert_close(same.loss, torch.full((6,), LOG2))
    (gradient,) = torch.autograd.grad(same.mean(), pairs.chosen, retain_graph=True)
    assert float(gradient.abs().max()) < 1e-7
    (gradient,) = torch.autograd.grad(tab_po(a, a, c, c, weights, weights).mean(), pairs.chosen)
    assert float(gradient.abs().max()) > 1e-2


def test_metrics_and_gradients():
    pairs = random_pairs(9)
    for side in SIDES:
        getattr(pairs, side).requires_grad_()
    weights = [w.requires_grad_() for w in random_weights(pairs)]
    terms = tab_po(*pairs.likelihoods(), *weights, beta=0.3)
    a, b, c, d = (s.detach() for s in pairs.sums())
    torch.testing.assert_close(terms.metrics["log_ratio_chosen"], a - c)
    torch.testing.assert_close(terms.metrics["log_ratio_rejected"], b - d)
    torch.testing.assert_close(terms.metrics["log_prob_chosen"], a)
    torch.testing.assert_close(terms.metrics["log_prob_rejected"], b)
    score = [
        ((u * m) * (getattr(pairs, s) - getattr(pairs, f"reference_{s}"))).sum(-1) / (u * m).sum(-1)
        for s, u, m in zip(SIDES, weights, (pairs.chosen_mask, pairs.rejected_mask), strict=False)
    ]
    torch.testing.assert_close(terms.metrics["rewards_chosen"], 0.3 * score[0].detach())
    torch.testing.assert_close(terms.metrics["rewards_rejected"], 0.3 * score[1].detach())
    torch.testing.assert_close(terms.metrics["margin"], 0.3 * (score[0] - score[1]).detach())
    assert torch.equal(terms.metrics["accuracy"], (score[0] > score[1]).float())
    assert torch.equal(terms.weight, torch.ones(6))
    assert all(v.shape == (6,) and not v.requires_grad for v in (*terms.metrics.values(), terms.weight))
    terms.mean().backward()
    assert float(pairs.chosen.grad.abs().sum()) > 0
    assert float(pairs.rejected.grad.abs().sum()) > 0
    assert all(x.grad is None for x in (pairs.reference_chosen, pairs.reference_rejected, *weights))


def test_numbers_outside_the_scored_tokens_do_not_matter():
    """Weights there may be anything, even NaN."""
    pairs = random_pairs(10)
    weights = random_weights(pairs)
    odd = [w.masked_fill(~m, math.nan) for w, m in zip(weights, (pairs.chosen_mask, pairs.rejected_mask), strict=True)]
    pairs.assert_same(tab_po(*pairs.likelihoods(), *odd).mean(), tab_po(*pairs.likelihoods(), *weights).mean())


@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_a_margin_of_ten_thousand(sign):
    terms = [torch.tensor([[v * sign]], requires_grad=True) for v in (5e3, -5e3)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    first, second = (LogLikelihood.from_per_unit(t, mask) for t in terms)
    zero = LogLikelihood.from_per_unit(torch.zeros(1, 1), mask)
    result = tab_po(first, second, zero, zero, beta=1.0)
    assert result.metrics["margin"].item() == sign * 1e4
    gradients = torch.autograd.grad(result.mean(), terms)
    assert bool(torch.isfinite(result.mean()))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_arguments_are_what_training_supplies():
    parameters = inspect.signature(tab_po).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == [*SIDES, "chosen_weights", "rejected_weights"]
    assert all(p.default is None for p in list(parameters)[4:6])


def test_refusals():
    pairs = random_pairs(11, rows=3)
    a, b, c, d = pairs.likelihoods()
    good = torch.ones(3, 9)
    with pytest.raises(InputError, match="TAB-PO needs log-likelihoods under a frozen reference"):
        tab_po(a, b, None, None)
    with pytest.raises(InputError, match="TAB-PO needs a term per token"):
        tab_po(LogLikelihood(a.value, a.kind, a.unit, a.num_units), b, c, d)
    with pytest.raises(InputError, match="TAB-PO needs a term per token"):
        tab_po(a, b, c, LogLikelihood(d.value, d.kind, d.unit, d.num_units))
    with pytest.raises(InputError, match="upper bound"):
        tab_po(a, LogLikelihood.from_per_unit(pairs.rejected, pairs.rejected_mask, kind=Kind.UPPER_BOUND), c, d)
    with pytest.raises(InputError, match="3 and 2 rows"):
        tab_po(a, b[:2], c, d[:2])
    energies = [
        LogLikelihood(
            x.value, Kind.UNNORMALIZED, x.unit, x.num_units, x.per_unit, x.mask, constant=ConstantKey.of(name)
        )
        for x, name in ((a, "new"), (b, "new"), (c, "old"), (d, "old"))
    ]
    with pytest.raises(InputError, match="different unknown constants"):
        tab_po(*energies)
    moved = LogLikelihood.from_per_unit(pairs.reference_rejected.roll(1, 1), pairs.rejected_mask.roll(1, 1))
    with pytest.raises(InputError, match="scored different tokens of the rejected completions"):
        tab_po(a, b, c, moved)
    wider = LogLikelihood.from_per_unit(*(torch.nn.functional.pad(x, (0, 1)) for x in (c.per_unit, c.mask)))
    with pytest.raises(InputError, match="scored different tokens of the chosen completions"):
        tab_po(a, b, wider, d)
    none = LogLikelihood.from_per_unit(pairs.chosen, pairs.chosen_mask & (torch.arange(3) != 1)[:, None])
    with pytest.raises(InputError, match="row 1 has none"):
        tab_po(none, b, none, d)
    with pytest.raises(InputError, match=r"chosen_weights must be aligned with the terms \(3, 9\), got \(3, 8\)"):
        tab_po(a, b, c, d, good[:, :8], good)
    assert int(pairs.rejected_mask[2].sum()) > 1  # the sum stays positive
    for bad in (-0.5, math.nan, math.inf):
        wrong = good.clone()
        wrong[2, pairs.rejected_mask[2].int().argmax()] = bad
        with pytest.raises(InputError, match="rejected_weights of row 2 must be finite, at least 0 and not all 0"):
            tab_po(a, b, c, d, good, wrong)
    with pytest.raises(InputError, match="chosen_weights of row 0"):
        tab_po(a, b, c, d, good * 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau": 1.1}, "tau is a probability and must be at most 1, got 1.1"),
        ({"barrier_weight": -0.1}, "barrier_weight must be finite and at least 0, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        partial(tab_po, **settings)(*random_pairs().likelihoods())
