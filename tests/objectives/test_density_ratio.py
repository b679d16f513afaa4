"""Direct discriminative optimisation by enumeration: expectations are means over rows in proportion to counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives.density_ratio import ddo
from loglik.objectives.unpaired import implicit_reward_ce
from preference_peers import assert_same_training, exact, tiny_likelihoods, tiny_sums, unnormalised

DATA = torch.tensor([6, 1, 3, 2, 1])
REFERENCES = [torch.tensor(counts) for counts in ([1, 1, 1, 1, 1], [3, 1, 2, 1, 9], [1, 7, 3, 2, 2])]


def frequencies(counts):
    return counts.double() / counts.sum()


def expected(logits, reference, data=DATA, **settings):
    """The loss whose two means are exact expectations."""
    log_p, log_q = logits.log_softmax(0), frequencies(reference).log()
    real, fake = (torch.repeat_interleave(counts) for counts in (data, reference))
    return ddo(exact(log_p[real]), exact(log_q[real]), exact(log_p[fake]), exact(log_q[fake]), **settings)


def minimiser(reference, **settings):
    logits = frequencies(reference).log().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-10, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss = expected(logits, reference, **settings).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_at_the_reference_the_loss_is_known_and_the_gradient_is_maximum_likelihoods(alpha, beta):
    """(1 + alpha) log 2, and -(beta/2) E_data grad log p: the samples add nothing in expectation."""
    for reference in REFERENCES:
        logits = frequencies(reference).log().requires_grad_()
        loss = expected(logits, reference, alpha=alpha, beta=beta).mean()
        assert loss.item() == pytest.approx((1 + alpha) * math.log(2), abs=1e-12)
        (gradient,) = torch.autograd.grad(loss, logits)
        likelihood = -(beta / 2) * (frequencies(DATA) * logits.log_softmax(0)).sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(likelihood, logits)[0], atol=1e-14, rtol=0)


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_data_is_stationary_for_every_reference(reference):
    """alpha = beta = 1."""
    logits = frequencies(DATA).log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected(logits, reference).mean(), logits)
    assert float(gradient.abs().max()) < 1e-15
    (other,) = torch.autograd.grad(expected(logits, reference, alpha=2.0).mean(), logits)
    assert float(other.abs().max()) > 1e-2


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_minimiser_is_the_data_for_every_reference(reference):
    found = minimiser(reference)
    torch.testing.assert_close(found, frequencies(DATA), atol=1e-8, rtol=0)


@pytest.mark.parametrize("settings", [{"alpha": 4.0}, {"beta": 0.5}])
def test_other_settings_have_other_minimisers(settings):
    found = minimiser(REFERENCES[1], **settings)
    assert 0.5 * float((found - frequencies(DATA)).abs().sum()) > 0.05


def test_one_maximum_likelihood_stationary_point_is_stationary_in_every_round():
    """A restricted family (two shared logits): its maximum-likelihood member, as reference, has no gradient."""
    data = torch.tensor([6, 4, 3, 2, 1])
    design = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 0]]).double()
    likely = torch.tensor([5.0, 2.5, 1.0]).double().log()  # block means of the counts
    theta = (likely[:2] - likely[2]).requires_grad_()
    logits = design @ theta
    counts = torch.tensor([10, 10, 5, 5, 2])  # the same member, as integers
    torch.testing.assert_close(logits.softmax(0), frequencies(counts))
    for alpha, beta in ((1.0, 1.0), (3.0, 0.2)):
        loss = expected(logits, counts, data, alpha=alpha, beta=beta).mean()
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        assert float(gradient.abs().max()) < 1e-15


def rows(seed=0, real=4, fake=7):
    generator = torch.Generator().manual_seed(seed)
    values = [-5 * torch.rand(n, generator=generator) for n in (real, real, fake, fake)]
    return [v.requires_grad_() for v in values]


def test_equal_to_weighted_binary_cross_entropy():
    """On logits beta R with labels 1 and 0, each label a mean of its own, the second times alpha."""
    a, b, c, d = values = rows()
    loss = ddo(*map(exact, values), alpha=3.0, beta=0.4).mean()
    data = F.binary_cross_entropy_with_logits(0.4 * (a - b), torch.ones(4))
    samples = F.binary_cross_entropy_with_logits(0.4 * (c - d), torch.zeros(7))
    plain = data + 3.0 * samples
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, c)), torch.autograd.grad(plain, (a, c)))


def test_as_many_samples_as_data_make_it_twice_the_cross_entropy_of_labels():
    values = [exact(v) for v in rows(1, 5, 5)]
    labels = torch.arange(10) < 5
    both = LogLikelihood.cat([values[0], values[2]]), LogLikelihood.cat([values[1], values[3]])
    ce = implicit_reward_ce(*both, labels, beta=0.7).mean()
    torch.testing.assert_close(ddo(*values, beta=0.7).mean(), 2 * ce)


def test_on_a_real_model_equal_to_the_formula_in_plain_torch():
    real, fake, reference_real, reference_fake = tiny_likelihoods()
    a, b, c, d = tiny_sums()
    plain = -torch.log(torch.sigmoid(0.1 * (a - c))).mean() - 2 * torch.log(1 - torch.sigmoid(0.1 * (b - d))).mean()
    assert_same_training(ddo(real, reference_real, fake, reference_fake, alpha=2.0, beta=0.1).mean(), plain)


def test_a_constant_on_all_ratios_is_seen():
    """It would stand for another alpha only in an unnormalised model."""
    a, b, c, d = rows(2)
    shifted = ddo(exact(a + 1), exact(b), exact(c + 1), exact(d)).mean()
    assert abs(float((shifted - ddo(*map(exact, (a, b, c, d))).mean()).detach())) > 0.05


def test_more_noise_draws_inside_the_logistic_tighten_the_bound():
    """Jensen: with draws averaged before the loss in groups of 1, 2, 4, 8 it falls, row by row."""
    draws = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    zero = exact(torch.zeros(5))
    losses = []
    for size in (1, 2, 4, 8):
        groups = draws.reshape(8 // size, size, 5).mean(1)
        terms = [ddo(exact(g, Kind.LOWER_BOUND), zero, exact(-g, Kind.LOWER_BOUND), zero) for g in groups]
        losses.append(torch.stack([torch.stack([part.loss for part in t.parts()]) for t in terms]).mean(0))
    for rough, fine in pairwise(losses):
        assert bool((fine < rough).all())


def test_metrics_and_gradients():
    values = rows(3)
    terms = ddo(*map(exact, values), alpha=2.0, beta=0.5)
    a, b, c, d = (v.detach() for v in values)
    torch.testing.assert_close(terms.metrics["log_ratio_real"], a - b)
    torch.testing.assert_close(terms.metrics["log_ratio_fake"], c - d)
    torch.testing.assert_close(terms.metrics["log_prob_real"], a)
    torch.testing.assert_close(terms.metrics["log_prob_fake"], c)
    assert torch.equal(terms.metrics["accuracy_real"], (a > b).float())
    assert torch.equal(terms.metrics["accuracy_fake"], (c <= d).float())
    parts = list(terms.parts())
    assert [part.weight.tolist() for part in parts] == [[1.0] * 4, [1.0] * 7]
    assert not any(v.requires_grad for v in (*terms.metrics.values(), *(part.weight for part in parts)))
    terms.mean().backward()
    assert bool((values[0].grad < 0).all())
    assert bool((values[2].grad > 0).all())
    assert values[1].grad is None
    assert values[3].grad is None


@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_a_log_ratio_of_ten_thousand(sign):
    values = [torch.tensor([v * sign], requires_grad=True) for v in (1e4, -1e4)]
    terms = ddo(exact(values[0]), exact([0.0]), exact(values[1]), exact([0.0]))
    assert terms.mean().item() == (0.0 if sign == 1 else 2e4)
    gradients = torch.autograd.grad(terms.mean(), values)
    assert [g.item() for g in gradients] == ([0.0, 0.0] if sign == 1 else [-1.0, 1.0])


def test_refusals():
    real, fake = exact([-1.0, -2.0]), exact([-1.0, -2.0, -3.0])
    with pytest.raises(InputError, match="DDO needs log-likelihoods under a frozen reference"):
        ddo(real, None, fake, fake)
    with pytest.raises(InputError, match="DDO needs log-likelihoods under a frozen reference"):
        ddo(real, real, fake, None)
    with pytest.raises(InputError, match="3 and 2 rows"):
        ddo(real, real, fake, real)
    with pytest.raises(InputError, match="upper bound"):
        ddo(exact([-1.0, -2.0], Kind.UPPER_BOUND), real, fake, fake)
    with pytest.raises(InputError, match="different unknown constants"):
        ddo(unnormalised([-1.0], "new"), unnormalised([-1.0], "old"), fake, fake)
    for name in ("alpha", "beta"):
        with pytest.raises(InputError, match=f"{name} must be positive and finite, got 0"):
            ddo(real, real, fake, fake, **{name: 0.0})
