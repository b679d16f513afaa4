"""BGPO and GDPO: bounds, on-policy identities and gradients, against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_beds import all_texts, joint_lm, random_joint, random_lm, whole
from loglik import InputError, Kind, LogLikelihood, Unit
from loglik.kinds import DrawsKey
from loglik.models.diffusion import Counts, Quadrature
from loglik.objectives.diffusion_policy import bgpo, gdpo

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 2.0, 0.5, -1.0, 0.5], dtype=torch.float64)


def likelihood(samples: torch.Tensor, key: str = "a") -> LogLikelihood:
    """A sampled bound with these draws (S, N)."""
    count = torch.full((samples.shape[1],), 4)
    return LogLikelihood.from_samples(
        samples, kind=Kind.LOWER_BOUND, unit=Unit.TOKEN, num_units=count, draws=DrawsKey.of(key)
    )


def advantages(standardise: bool) -> torch.Tensor:
    parts = [REWARDS[:3] - REWARDS[:3].mean(), REWARDS[3:] - REWARDS[3:].mean()]
    return torch.cat([p / p.std() if standardise else p for p in parts])


def test_the_bound_lies_below_the_ratio_objective():
    torch.manual_seed(0)
    for spread in (0.1, 1.0, 4.0):
        delta = spread * torch.randn(8, 6, dtype=torch.float64)
        before = torch.randn(8, 6, dtype=torch.float64)
        terms = bgpo(likelihood(before + delta), REWARDS, GROUPS, likelihood(before), standardise=False)
        ratio = delta.mean(0).exp()
        assert bool((-terms.loss <= advantages(False) * ratio + 1e-12).all())
        assert torch.allclose(terms.metrics["ratio"], ratio)


def test_where_the_bound_is_tight():
    before = torch.randn(8, 6, dtype=torch.float64)
    same = bgpo(likelihood(before), REWARDS, GROUPS, likelihood(before), standardise=False)
    assert torch.allclose(-same.loss, advantages(False))
    shifted = bgpo(likelihood(before + 0.3), REWARDS, GROUPS, likelihood(before), standardise=False)
    a = advantages(False)
    assert torch.allclose(-shifted.loss, torch.where(a >= 0, a * 1.3, a * math.exp(0.3)))
    one = bgpo(likelihood(before[:1] + 0.7), REWARDS, GROUPS, likelihood(before[:1]), standardise=False)
    negative = a < 0
    assert torch.allclose(-one.loss[negative], (a * math.exp(0.7))[negative])


def test_clipping_is_ppos_with_a_dual_clip():
    delta = torch.tensor([[0.5, 0.5, -0.5, 2.0, 2.0, -2.0]], dtype=torch.float64)
    before = torch.zeros(1, 6, dtype=torch.float64)
    got = bgpo(likelihood(delta), REWARDS, GROUPS, likelihood(before), standardise=False, clip=0.2, dual_clip=3.0)
    want = []
    for d, a in zip(delta[0].tolist(), advantages(False).tolist(), strict=True):
        g = 1 + d if a >= 0 else math.exp(d)
        value = min(g * a, min(max(g, 0.8), 1.2) * a)
        want.append(max(value, 3 * a) if a < 0 else value)
    assert (-got.loss).tolist() == pytest.approx(want)
    free = bgpo(likelihood(delta * 30), REWARDS, GROUPS, likelihood(before), standardise=False)
    assert bool(torch.isfinite(free.loss).all())


@pytest.mark.parametrize("samples", [1, 4])
def test_on_policy_gradient_is_the_advantage_times_that_of_the_bound(samples):
    lm = random_lm()
    x = whole([[0, 1, 2, 3], [0, 2, 2, 1], [0, 3, 3, 1], [1, 0, 0, 2], [1, 3, 2, 0], [1, 1, 1, 1]], prompt=1)
    weights = list(lm.model.parameters())
    want = torch.autograd.grad(
        -(advantages(True) * lm.evidence(x, num_samples=samples).likelihood.value).mean(), weights
    )
    policy = lm.evidence(x, num_samples=samples).likelihood
    at_once = torch.autograd.grad(bgpo(policy, REWARDS, GROUPS).mean(), weights)
    for a, b in zip(want, at_once, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    # One draw at a time, every graph freed before the next.
    for term in lm.terms(x, num_samples=samples):
        (bgpo(term, REWARDS, GROUPS).mean() / samples).backward()
    for a, parameter in zip(want, weights, strict=True):
        assert torch.allclose(a, parameter.grad, atol=1e-10)


def test_off_policy_accumulation_equals_one_backward():
    lm, old = random_lm(), random_lm(seed=1)
    x = whole([[0, 1, 2, 3], [0, 2, 2, 1], [0, 3, 3, 1]], prompt=1)
    rewards, groups = REWARDS[:3], GROUPS[:3]
    weights = list(lm.model.parameters())
    with torch.no_grad():
        before = old.evidence(x, num_samples=5).likelihood
        single = list(old.terms(x, num_samples=5))
    policy = lm.evidence(x, num_samples=5).likelihood
    want = torch.autograd.grad(bgpo(policy, rewards, groups, before).mean(), weights)
    for term, earlier in zip(lm.terms(x, num_samples=5), single, strict=True):
        (bgpo(term, rewards, groups, earlier).mean() / 5).backward()
    for a, parameter in zip(want, weights, strict=True):
        assert torch.allclose(a, parameter.grad, atol=1e-9)


def test_exact_conditionals_give_the_exact_policy_gradient():
    """The bound of an exact model is its likelihood: its gradient is REINFORCE's, averaged over all texts exactly."""
    texts = whole(all_texts(3, 3))
    lm = joint_lm(random_joint(3, 3), "enumeration")
    with torch.no_grad():
        value = lm.log_prob(texts).value
    leaf = value.clone().requires_grad_()
    policy = LogLikelihood(leaf, Kind.LOWER_BOUND, Unit.TOKEN, torch.full((27,), 3))
    rewards = torch.arange(27, dtype=torch.float64)
    terms = bgpo(policy, rewards, torch.zeros(27, dtype=torch.long), baseline="none", standardise=False)
    (terms.loss * value.exp()).sum().backward()
    assert torch.allclose(leaf.grad, -value.exp() * rewards)


def test_length_normalisation_divides_differences():
    before = torch.zeros(3, 6, dtype=torch.float64)
    after = likelihood(torch.full_like(before, 0.8))
    a = advantages(False)
    got = bgpo(after, REWARDS, GROUPS, likelihood(before), standardise=False, length_normalise=True)
    assert torch.allclose(-got.loss, torch.where(a >= 0, a * 1.2, a * math.exp(0.2)))


# ---------------------------------------------------------------- GDPO
def test_gdpo_is_the_clipped_sequence_ratio():
    before = torch.zeros(2, 6, dtype=torch.float64)
    delta = torch.tensor([0.1, 0.5, -0.5, 1.0, 1.0, -1.0], dtype=torch.float64)
    got = gdpo(likelihood(before + delta), REWARDS, GROUPS, likelihood(before))
    want = []
    for d, a in zip(delta.tolist(), advantages(False).tolist(), strict=True):
        r = math.exp(d)
        want.append(min(r * a, min(max(r, 0.8), 1.2) * a) / 4)
    assert (-got.loss).tolist() == pytest.approx(want)
    assert bool(torch.isfinite(gdpo(likelihood(before + 500 * delta), REWARDS, GROUPS, likelihood(before)).loss).all())


def test_gdpo_on_policy():
    lm = random_lm(estimator=Quadrature(2), num_samples=1)
    x = whole([[0, 1, 2, 3], [0, 2, 2, 1], [0, 3, 3, 1]], prompt=1)
    rewards, groups = REWARDS[:3], GROUPS[:3]
    with torch.no_grad():
        old = lm.log_prob(x)
    terms = gdpo(lm.log_prob(x), rewards, groups, old)
    assert torch.equal(terms.metrics["ratio"], torch.ones(3, dtype=torch.float64))  # shared masks: exactly 1
    a = rewards - rewards.mean()
    assert torch.allclose(-terms.loss, a / 3)
    weights = list(lm.model.parameters())
    got = torch.autograd.grad(terms.mean(), weights)
    want = torch.autograd.grad(-(a / 3 * lm.log_prob(x).value).mean(), weights)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-10)


def test_gdpo_penalty_is_k3():
    before = torch.zeros(1, 6, dtype=torch.float64)
    shift = torch.tensor([[0.0, 0.3, -0.3, 1.0, 0.0, 0.0]], dtype=torch.float64)
    policy = likelihood(before + shift)
    plain = gdpo(policy, REWARDS, GROUPS, likelihood(before + shift))
    tied = gdpo(policy, REWARDS, GROUPS, likelihood(before + shift), likelihood(before), kl_weight=0.5)
    k3 = (-shift[0]).exp() + shift[0] - 1
    assert torch.allclose(tied.loss - plain.loss, 0.5 * k3)
    assert torch.allclose(tied.metrics["kl"], k3)


# ---------------------------------------------------------------- refusals
def test_other_masks_are_refused():
    before = torch.zeros(2, 6, dtype=torch.float64)
    for objective in (bgpo, gdpo):
        with pytest.raises(InputError, match="same masks"):
            objective(likelihood(before), REWARDS, GROUPS, likelihood(before, "b"))
        with pytest.raises(InputError, match="KL penalty needs a reference"):
            objective(likelihood(before), REWARDS, GROUPS, kl_weight=0.1)
    with pytest.raises(InputError, match="2 draws, the old one 1"):
        bgpo(likelihood(before), REWARDS, GROUPS, likelihood(before[:1]))
    with pytest.raises(InputError, match="clip must lie"):
        gdpo(likelihood(before), REWARDS, GROUPS, clip=1.5)
    with pytest.raises(InputError, match="dual_clip must exceed 1"):
        bgpo(likelihood(before), REWARDS, GROUPS, dual_clip=0.5)
    with pytest.raises(InputError, match="upper bound"):
        bgpo(-likelihood(before), REWARDS, GROUPS)


def test_a_real_models_draws_must_match():
    lm = random_lm(estimator=Counts(), num_samples=2)
    x = whole([[0, 1, 2, 3], [0, 2, 2, 1], [0, 3, 3, 1]], prompt=1)
    with pytest.raises(InputError, match="same masks"):
        bgpo(lm.log_prob(x), REWARDS[:3], GROUPS[:3], lm.log_prob(x, draws=DrawsKey.of("other")))
