"""Perturbed states against closed forms of a linear head, first order, and what must not move."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.errors import InputError
from loglik.models.head import LinearHead
from loglik.objectives.perturbations import kl_preserving_perturbation, likelihood_adversarial, stepped

WIDTH, VOCABULARY = 6, 9


def problem(seed=0, rows=3, length=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return hidden, weight.requires_grad_(), labels, mask


def nll(weight, hidden, labels, mask):
    logits = hidden[mask] @ weight.detach().T
    return torch.nn.functional.cross_entropy(logits, labels[mask], reduction="none")


def closed_form(weight, hidden, labels):
    """(B, T, D) gradient of each token's negative log-likelihood: W' (softmax - onehot)."""
    probs = (hidden @ weight.T).softmax(-1)
    return (probs - torch.nn.functional.one_hot(labels, VOCABULARY)) @ weight.detach()


@pytest.mark.parametrize("eps", [0.5, -0.2])
def test_adversarial_states_of_a_linear_head_in_closed_form(eps):
    hidden, weight, labels, mask = problem()
    got = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask, eps=eps)
    gradient = closed_form(weight, hidden, labels).detach()
    direction = gradient / gradient.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got[mask], (hidden + eps * direction)[mask])
    torch.testing.assert_close(got[~mask], hidden[~mask], atol=0, rtol=0)


def test_first_order_rise_is_the_norm_of_the_gradient():
    """NLL(h~) - NLL(h) = eps ||g|| + O(eps^2), token by token: a tenth of the step has a hundredth of the rest."""
    hidden, weight, labels, mask = problem(1)
    norm = closed_form(weight, hidden, labels).detach().norm(dim=-1)[mask]
    before = nll(weight, hidden, labels, mask)
    rests = []
    for eps in (1e-2, 1e-3):
        moved = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask, eps=eps)
        rests.append((nll(weight, moved, labels, mask) - before - eps * norm).abs())
    assert (rests[0] > 1e-7).any()
    assert (rests[1] < 0.02 * rests[0] + 1e-12).all()


def test_adversarial_states_do_more_than_random_ones():
    """Along its gradient a likelihood falls at least three times as much as along random directions, on average."""
    hidden, weight, labels, mask = problem(2, rows=20, length=10)
    before = nll(weight, hidden, labels, mask).mean()
    moved = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask, eps=0.3)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)
    random = hidden + 0.3 * noise / noise.norm(dim=-1, keepdim=True)
    rise = nll(weight, moved, labels, mask).mean() - before
    assert rise >= 3 * (nll(weight, random, labels, mask).mean() - before)


def test_kl_step_of_a_linear_head_in_closed_form():
    """The gradient of KL(p || p') in h' is W' (p' - p)."""
    hidden, weight, _, mask = problem(4)
    moved = hidden + 0.5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=hidden.dtype)
    got = kl_preserving_perturbation(hidden, moved, lambda h: h @ weight.T, mask, eps=0.1)
    gradient = ((moved @ weight.T).softmax(-1) - (hidden @ weight.T).softmax(-1)).detach() @ weight.detach()
    want = moved - 0.1 * gradient / gradient.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got[mask], want[mask])
    torch.testing.assert_close(got[~mask], moved[~mask], atol=0, rtol=0)


def test_kl_step_lowers_the_divergence():
    hidden, weight, _, mask = problem(6)

    def divergence(states):
        now, kept = ((h[mask] @ weight.detach().T).log_softmax(-1) for h in (states, hidden))
        return (kept.exp() * (kept - now)).sum(-1)

    moved = hidden + 0.5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7), dtype=hidden.dtype)
    back = kl_preserving_perturbation(hidden, moved, lambda h: h @ weight.T, mask, eps=0.01)
    assert (divergence(back) < divergence(moved)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_moves_where_nothing_was_moved(dtype):
    """At H' = H the gradient is rounding only, which must not be blown up to a step."""
    hidden, weight, _, mask = problem(8, dtype=dtype)
    got = kl_preserving_perturbation(hidden, hidden, lambda h: h @ weight.T, mask, eps=3.0)
    torch.testing.assert_close(got, hidden, atol=0, rtol=0)
    partly = hidden.clone()
    partly[0] += 0.1
    got = kl_preserving_perturbation(hidden, partly, lambda h: h @ weight.T, mask, eps=3.0)
    torch.testing.assert_close(got[1:], hidden[1:], atol=0, rtol=0)


def test_a_gradient_of_zero_moves_nothing():
    """A head that ignores its input, and one that is certain of the label."""
    hidden, weight, labels, mask = problem(9)
    flat = likelihood_adversarial(hidden, lambda h: (h @ weight.T) * 0, labels, mask, eps=1.0)
    torch.testing.assert_close(flat, hidden, atol=0, rtol=0)
    sure = torch.full((VOCABULARY,), -1e4, dtype=torch.float64)
    sure[2] = 1e4
    certain = likelihood_adversarial(hidden, lambda h: h @ weight.T * 0 + sure, labels * 0 + 2, mask, eps=1.0)
    torch.testing.assert_close(certain, hidden, atol=0, rtol=0)


def test_parameters_and_their_gradients_are_left_alone():
    hidden, weight, labels, mask = problem(10)
    hidden.requires_grad_()
    weight.grad = torch.full_like(weight, 7.0)

    def head(h):
        return h @ weight.T

    adversarial = likelihood_adversarial(hidden, head, labels, mask, eps=1.0)
    kept = kl_preserving_perturbation(hidden, adversarial, head, mask, eps=1.0)
    assert not adversarial.requires_grad
    assert not kept.requires_grad
    assert hidden.grad is None
    assert (weight.grad == 7.0).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_states(context):
    hidden, weight, labels, mask = problem(11)
    head = LinearHead(weight, softcap=5.0).logits
    want = likelihood_adversarial(hidden, head, labels, mask, eps=1.0)
    back = kl_preserving_perturbation(hidden, want, head, mask, eps=1.0)
    with context():
        states, given, real = hidden * 1, labels * 1, mask & True
        got = likelihood_adversarial(states, head, given, real, eps=1.0)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(kl_preserving_perturbation(states, got, head, real, eps=1.0), back)


def test_half_precision_is_moved_in_float32_and_kept():
    hidden, weight, labels, mask = problem(12, dtype=torch.bfloat16)
    got = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask, eps=1.0)
    assert got.dtype == torch.bfloat16
    length = (got.float() - hidden.float())[mask].norm(dim=-1)
    torch.testing.assert_close(length, torch.ones_like(length), atol=0.05, rtol=0)


def test_softmax_of_half_precision_logits_is_taken_in_float32():
    """A log-softmax in bfloat16 over a thousand tokens would drown a small divergence in its rounding."""
    hidden, _, _, _ = problem(12, dtype=torch.bfloat16)
    weight = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = (hidden + 0.1).bfloat16()
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    got = kl_preserving_perturbation(hidden, moved, lambda h: h @ weight.T, mask, eps=1.0)
    now, kept = ((h @ weight.T).double().softmax(-1) for h in (moved, hidden))
    want = (kept - now) @ weight.double()
    agreement = torch.nn.functional.cosine_similarity((got - moved).double(), want, dim=-1)
    assert agreement.min() > 0.999


def test_length_of_the_step_may_be_a_tensor_and_rows_do_not_touch():
    hidden, weight, labels, mask = problem(13)
    alone = likelihood_adversarial(hidden[:1], lambda h: h @ weight.T, labels[:1], mask[:1], eps=torch.tensor(0.3))
    together = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask, eps=0.3)
    torch.testing.assert_close(together[:1], alone, atol=1e-7, rtol=0)


def test_an_empty_mask_moves_nothing():
    hidden, weight, labels, mask = problem(14)
    got = likelihood_adversarial(hidden, lambda h: h @ weight.T, labels, mask & False, eps=1.0)
    torch.testing.assert_close(got, hidden, atol=0, rtol=0)


def test_a_step_of_any_function():
    """Up the squared norm: straight away from the origin."""
    hidden, _, _, mask = problem(15)
    got = stepped(hidden, mask, lambda states: states.square().sum(), 0.5)
    torch.testing.assert_close(got[mask], (hidden * (1 + 0.5 / hidden.norm(dim=-1, keepdim=True)))[mask])


def test_refusals():
    hidden, weight, labels, mask = problem(16)

    def head(h):
        return h @ weight.T

    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match="eps must be finite"):
            likelihood_adversarial(hidden, head, labels, mask, eps=wrong)
        with pytest.raises(InputError, match="eps must be finite"):
            kl_preserving_perturbation(hidden, hidden, head, mask, eps=wrong)
    with pytest.raises(InputError, match=r"needs states \(B, T, D\) and a bool mask"):
        likelihood_adversarial(hidden[0], head, labels, mask, eps=1.0)
    with pytest.raises(InputError, match="and a bool mask"):
        kl_preserving_perturbation(hidden, hidden, head, mask.float(), eps=1.0)
    with pytest.raises(InputError, match="labels must have shape"):
        likelihood_adversarial(hidden, head, labels[:, 1:], mask, eps=1.0)
    with pytest.raises(InputError, match="needs two sets of states"):
        kl_preserving_perturbation(hidden, hidden[:1], head, mask, eps=1.0)
