"""Preference objectives against TRL's own code, plain torch on a real model, closed forms and enumeration."""

from __future__ import annotations

import inspect
import math
from functools import partial

import numpy
import pytest
import torch
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives import MaximumLikelihood, preference
from loglik.objectives.preference import (
    apo_down,
    apo_zero,
    bco_pair,
    bradley_terry,
    diffusion_dpo,
    dpo,
    exo_pair,
    hinge_norm,
    ipo,
    length_normalised_dpo,
    nca_pair,
    robust_dpo,
    sigmoid_norm,
    sppo_hard,
)
from preference_peers import (
    SIDES,
    assert_same_training,
    exact,
    random_pairs,
    tiny_likelihoods,
    tiny_sums,
    trl_cpo,
    trl_dpo,
    unnormalised,
)

LOG2 = math.log(2)
IPO_PER_TOKEN = partial(ipo, length_normalise=True)
REFERENCED = [
    dpo,
    robust_dpo,
    sigmoid_norm,
    length_normalised_dpo,
    ipo,
    IPO_PER_TOKEN,
    hinge_norm,
    exo_pair,
    nca_pair,
    bco_pair,
    apo_zero,
    apo_down,
    sppo_hard,
]
PER_TOKEN = [length_normalised_dpo, IPO_PER_TOKEN]
ABSOLUTE = [nca_pair, bco_pair, apo_zero, apo_down, sppo_hard]


def name_of(objective) -> str:
    inner = getattr(objective, "func", objective)
    return inner.__name__ + ("-per-token" if isinstance(objective, partial) else "")


def scale_of(objective) -> str:
    """The setting that scales an objective's scores."""
    found = inspect.signature(objective).parameters
    return next(name for name in ("beta", "tau", "gamma") if name in found)


# ------------------------------------------------------------------ TRL
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs", "smoothing"),
    [
        (partial(dpo, beta=0.3), "sigmoid", 0.0),
        (partial(sigmoid_norm, gamma=0.3), "sigmoid", 0.0),
        (partial(hinge_norm, gamma=0.3), "hinge", 0.0),
        (partial(ipo, tau=0.3, length_normalise=True), "ipo", 0.0),
        (partial(length_normalised_dpo, beta=0.3), "sigmoid_norm", 0.0),
        (partial(robust_dpo, beta=0.3, label_smoothing=0.2), "robust", 0.2),
        (partial(exo_pair, beta=0.3, label_smoothing=0.2), "exo_pair", 0.2),
        (partial(nca_pair, beta=0.3), "nca_pair", 0.0),
        (partial(bco_pair, beta=0.3), "bco_pair", 0.0),
        (partial(sppo_hard, beta=0.3), "sppo_hard", 0.0),
        (partial(apo_zero, beta=0.3), "apo_zero", 0.0),
        (partial(apo_down, beta=0.3), "apo_down", 0.0),
    ],
)
def test_equal_to_trl_in_value_and_gradient(ours, theirs, smoothing, seed):
    pairs = random_pairs(seed)
    loss = ours(*pairs.likelihoods()).mean()
    expected, _ = trl_dpo(pairs, [theirs], beta=0.3, label_smoothing=smoothing)
    pairs.assert_same(loss, expected)


def test_dpo_with_likelihood_is_trls_mix_of_sigmoid_and_sft():
    """Pairs are averaged over pairs and the likelihood over tokens, in one loss."""
    pairs = random_pairs(3)
    loss = dpo(*pairs.likelihoods(), beta=0.2, nll_weight=0.7).mean()
    expected, _ = trl_dpo(pairs, ["sigmoid", "sft"], beta=0.2, weights=[1.0, 0.7])
    pairs.assert_same(loss, expected)


def test_metrics_are_trls():
    pairs = random_pairs(4)
    metrics = dpo(*pairs.likelihoods(), beta=0.3).metrics
    _, expected = trl_dpo(pairs, ["sigmoid"], beta=0.3)
    for ours, theirs in {
        "rewards_chosen": "rewards/chosen",
        "rewards_rejected": "rewards/rejected",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
        "log_prob_chosen": "logps/chosen",
        "log_prob_rejected": "logps/rejected",
    }.items():
        assert float(metrics[ours].mean()) == pytest.approx(expected[theirs], abs=1e-5), ours
    assert 0 < float(metrics["accuracy"].mean()) < 1


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (partial(dpo, beta=0.3, label_smoothing=0.2), "sigmoid", {"beta": 0.3, "label_smoothing": 0.2}),
        (partial(ipo, tau=0.3), "ipo", {"beta": 0.3}),
    ],
)
def test_smoothing_and_summed_ipo_equal_trls_pairwise_losses_on_log_ratios(ours, theirs, settings):
    """TRL's DPO has neither conservative DPO nor IPO on sums; its CPO has both, here on log-ratios."""
    pairs = random_pairs(5)
    loss = ours(*pairs.likelihoods()).mean()
    a, b, c, d = pairs.sums()
    expected = trl_cpo(a - c, b - d, theirs, **settings)[0].mean()
    pairs.assert_same(loss, expected)


# ------------------------------------------------------------------ plain torch on a real model
LENGTHS = torch.tensor([3.0, 5.0, 1.0]), torch.tensor([4.0, 2.0, 4.0])  # of the completions in preference_peers


def plain(loss):
    """A loss of the two log-ratios, from bare sums."""
    return lambda a, b, c, d: loss(a - c, b - d).mean()


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (partial(dpo, beta=0.2), plain(lambda w, r: -torch.log(torch.sigmoid(0.2 * (w - r))))),
        (
            partial(dpo, beta=0.2, label_smoothing=0.1),
            plain(
                lambda w, r: (
                    -0.9 * torch.log(torch.sigmoid(0.2 * (w - r))) - 0.1 * torch.log(torch.sigmoid(0.2 * (r - w)))
                )
            ),
        ),
        (
            partial(dpo, beta=0.2, nll_weight=0.5),
            lambda a, b, c, d: -torch.log(torch.sigmoid(0.2 * (a - c - b + d))).mean() - 0.5 * a.sum() / 9,
        ),
        (
            partial(robust_dpo, beta=0.2, label_smoothing=0.1),
            plain(
                lambda w, r: (
                    (-0.9 * torch.log(torch.sigmoid(0.2 * (w - r))) + 0.1 * torch.log(torch.sigmoid(0.2 * (r - w))))
                    / 0.8
                )
            ),
        ),
        (partial(sigmoid_norm, gamma=0.05), plain(lambda w, r: -torch.log(torch.sigmoid(0.05 * (w - r))))),
        (
            partial(length_normalised_dpo, beta=2.0),
            plain(lambda w, r: -torch.log(torch.sigmoid(2 * (w / LENGTHS[0] - r / LENGTHS[1])))),
        ),
        (partial(ipo, tau=0.5), plain(lambda w, r: (w - r - 1.0) ** 2)),
        (partial(ipo, tau=0.5, length_normalise=True), plain(lambda w, r: (w / LENGTHS[0] - r / LENGTHS[1] - 1) ** 2)),
        (
            partial(ipo, preferences=torch.tensor([0.9, 0.5, 0.2]), tau=0.5),
            plain(lambda w, r: (w - r - torch.tensor([0.8, 0.0, -0.6])) ** 2),
        ),
        (partial(hinge_norm, gamma=0.05), plain(lambda w, r: torch.clamp(1 - 0.05 * (w - r), min=0))),
        (
            partial(exo_pair, beta=0.2, label_smoothing=0.1),
            plain(
                lambda w, r: (
                    torch.sigmoid(0.2 * (w - r)) * torch.log(torch.sigmoid(0.2 * (w - r)) / 0.9)
                    + torch.sigmoid(0.2 * (r - w)) * torch.log(torch.sigmoid(0.2 * (r - w)) / 0.1)
                )
            ),
        ),
        (
            partial(nca_pair, beta=0.2),
            plain(
                lambda w, r: (
                    -torch.log(torch.sigmoid(0.2 * w))
                    - 0.5 * torch.log(torch.sigmoid(-0.2 * w))
                    - 0.5 * torch.log(torch.sigmoid(-0.2 * r))
                )
            ),
        ),
        (
            partial(bco_pair, beta=0.2, delta=0.3),
            plain(lambda w, r: -torch.log(torch.sigmoid(0.2 * w - 0.3)) - torch.log(torch.sigmoid(-(0.2 * r - 0.3)))),
        ),
        (partial(apo_zero, beta=0.2), plain(lambda w, r: 1 - torch.sigmoid(0.2 * w) + torch.sigmoid(0.2 * r))),
        (partial(apo_down, beta=0.2), plain(lambda w, r: torch.sigmoid(0.2 * w) + 1 - torch.sigmoid(0.2 * (w - r)))),
        (partial(sppo_hard, beta=0.5), plain(lambda w, r: (w - 1) ** 2 + (r + 1) ** 2)),
    ],
)
def test_on_a_real_model_equal_to_the_formula_in_plain_torch(ours, expected):
    """Uneven prompts and completions; gradients of every parameter."""
    assert_same_training(ours(*tiny_likelihoods()).mean(), expected(*tiny_sums()))


# ------------------------------------------------------------------ values that are known
@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (dpo, LOG2),
        (partial(dpo, label_smoothing=0.3), LOG2),
        (robust_dpo, LOG2),
        (sigmoid_norm, LOG2),
        (length_normalised_dpo, LOG2),
        (partial(ipo, tau=0.2), 2.5**2),
        (hinge_norm, 1.0),
        (partial(exo_pair, label_smoothing=0.2), -LOG2 - 0.5 * math.log(0.2 * 0.8)),
        (nca_pair, 2 * LOG2),
        (bco_pair, 2 * LOG2),
        (apo_zero, 1.0),
        (apo_down, 1.0),
        (partial(sppo_hard, beta=0.2), 2 * 2.5**2),
    ],
)
def test_where_policy_and_reference_agree(objective, value):
    """The value at initialisation is known, whatever the completions; rewards and margins are 0."""
    first, second, *_ = random_pairs().likelihoods()
    terms = objective(first, second, first, second)
    torch.testing.assert_close(terms.loss, torch.full((6,), value))
    for name in ("rewards_chosen", "rewards_rejected", "margin", "accuracy", "log_ratio_chosen", "log_ratio_rejected"):
        assert torch.equal(terms.metrics[name], torch.zeros(6)), name


@pytest.mark.parametrize(("objective", "gamma"), [(sigmoid_norm, 0.5), (hinge_norm, 1.0)])
def test_first_gradient_is_proportional_to_gamma(objective, gamma):
    """At the reference: gamma/2 and gamma times the gradient of minus the gap."""
    value = torch.tensor([-3.0, -4.0], requires_grad=True)
    for slope in (0.05, 0.4):
        terms = objective(exact(value), exact([-5.0, -1.0]), exact(value.detach()), exact([-5.0, -1.0]), gamma=slope)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), value)
        torch.testing.assert_close(gradient, torch.full((2,), -gamma * slope))


def test_gradient_of_dpo_is_its_closed_form():
    r"""-beta sigma(-beta Delta) (grad l_w - grad l_l), row by row."""
    pairs = random_pairs(6, dtype=torch.float64)
    terms = dpo(*pairs.likelihoods(), beta=0.3)
    a, b, c, d = (s.detach() for s in pairs.sums())
    push = -0.3 * torch.sigmoid(-0.3 * (a - c - b + d))[:, None] / 6
    chosen, rejected = pairs.gradients(terms.mean())
    torch.testing.assert_close(chosen, push * pairs.chosen_mask)
    torch.testing.assert_close(rejected, -push * pairs.rejected_mask)


def test_small_beta_gradient_is_half_the_difference_of_gradients():
    pairs = random_pairs(6, dtype=torch.float64)
    beta = 1e-7
    chosen, rejected = pairs.gradients(dpo(*pairs.likelihoods(), beta=beta).mean())
    torch.testing.assert_close(chosen / beta, -0.5 * pairs.chosen_mask.double() / 6, atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected / beta, 0.5 * pairs.rejected_mask.double() / 6, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_swapping_the_sides_turns_the_margin_round(objective):
    a, b, c, d = random_pairs(7).likelihoods()
    forth, back = objective(a, b, c, d).metrics, objective(b, a, d, c).metrics
    torch.testing.assert_close(forth["margin"], -back["margin"])
    torch.testing.assert_close(forth["accuracy"], 1 - back["accuracy"])
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        for name in ("rewards", "log_prob", "log_ratio"):
            torch.testing.assert_close(forth[f"{name}_{one}"], back[f"{name}_{other}"])


def test_losses_of_swapped_sides_differ_by_the_margin():
    a, b, c, d = random_pairs(7, dtype=torch.float64).likelihoods()
    forth, back = dpo(a, b, c, d, beta=0.3), dpo(b, a, d, c, beta=0.3)
    torch.testing.assert_close(back.loss - forth.loss, forth.metrics["margin"])


@pytest.mark.parametrize("objective", [f for f in REFERENCED if f not in (*PER_TOKEN, *ABSOLUTE)], ids=name_of)
def test_a_constant_per_prompt_changes_nothing(objective):
    """Of both completions under the policy, and of both under the reference."""
    a, b, c, d = (s.detach() for s in random_pairs(8, dtype=torch.float64).sums())
    shift, other = torch.linspace(-3, 4, 6, dtype=torch.float64), torch.linspace(5, -1, 6, dtype=torch.float64)
    plain_terms = objective(*(exact(s) for s in (a, b, c, d)))
    shifted = objective(*(exact(s) for s in (a + shift, b + shift, c + other, d + other)))
    torch.testing.assert_close(plain_terms.loss, shifted.loss)


# ------------------------------------------------------------------ label noise
def test_conservative_dpo_is_the_expectation_over_flipped_labels():
    a, b, c, d = random_pairs(9, dtype=torch.float64).likelihoods()
    forth, back = dpo(a, b, c, d).loss, dpo(b, a, d, c).loss
    torch.testing.assert_close(dpo(a, b, c, d, label_smoothing=0.2).loss, 0.8 * forth + 0.2 * back)
    torch.testing.assert_close(dpo(a, b, c, d, label_smoothing=0.5).loss, dpo(b, a, d, c, label_smoothing=0.5).loss)


def test_labels_that_say_nothing_hold_the_policy_where_it_is():
    """Label smoothing 1/2 has its minimum, log 2, at a gap of 0."""
    value = torch.tensor([-2.0, -4.0], dtype=torch.float64, requires_grad=True)
    for shift, sign in ((0.0, 0), (1.0, 1), (-1.0, -1)):
        terms = dpo(
            exact(value + shift), exact([-5.0, -1.0]), exact(value), exact([-5.0, -1.0]), beta=1.0, label_smoothing=0.5
        )
        (gradient,) = torch.autograd.grad(terms.loss.sum(), value)
        assert torch.equal(gradient.sign(), torch.full((2,), float(sign), dtype=torch.float64))
        assert bool((terms.loss >= LOG2 - 1e-9).all())


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """Its expectation over labels flipped at the rate epsilon is the DPO loss of the clean labels."""
    a, b, c, d = random_pairs(9, dtype=torch.float64).likelihoods()
    noisy = partial(robust_dpo, beta=0.3, label_smoothing=0.15)
    torch.testing.assert_close(
        0.85 * noisy(a, b, c, d).loss + 0.15 * noisy(b, a, d, c).loss, dpo(a, b, c, d, beta=0.3).loss
    )
    torch.testing.assert_close(robust_dpo(a, b, c, d, label_smoothing=0.0).loss, dpo(a, b, c, d).loss)


def test_exo_is_a_divergence_between_two_coins():
    a, b, c, d = random_pairs(10, dtype=torch.float64).likelihoods()
    terms = exo_pair(a, b, c, d, beta=0.7, label_smoothing=0.1)
    policy = torch.distributions.Bernoulli(logits=terms.metrics["margin"])
    label = torch.distributions.Bernoulli(torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close(terms.loss.detach(), torch.distributions.kl_divergence(policy, label))
    at_label = exact(torch.tensor([math.log(9.0)], dtype=torch.float64))
    zero = exact(torch.zeros(1, dtype=torch.float64))
    fitted = exo_pair(at_label, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    assert float(fitted.loss) == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------ optima on spaces that can be enumerated
def enumerated(seed: int, size: int = 6):
    """Log-probabilities of a policy (a leaf) and a reference over `size` answers, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    logits, other, rewards = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), other.log_softmax(0), rewards


def all_pairs(log_probs, log_reference):
    """Likelihoods of every ordered pair of answers."""
    i, j = (g.flatten() for g in torch.meshgrid(*[torch.arange(len(log_probs))] * 2, indexing="ij"))
    return exact(log_probs[i]), exact(log_probs[j]), exact(log_reference[i]), exact(log_reference[j])


def test_the_tilted_reference_maximises_reward_minus_kl():
    """argmax of E r - beta KL is pi_ref exp(r/beta)/Z."""
    _, reference, rewards = enumerated(0)
    best = (reference + rewards / 0.4).log_softmax(0)

    def objective(log_probs):
        p = log_probs.exp()
        return (p * rewards).sum() - 0.4 * (p * (log_probs - reference)).sum()

    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            near = (best + size * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
            assert objective(near) < objective(best)


@pytest.mark.parametrize("objective", [partial(dpo, beta=0.4), partial(sigmoid_norm, gamma=0.4)], ids=["dpo", "rso"])
def test_dpo_with_all_bradley_terry_labels_has_its_minimum_at_the_tilted_reference(objective):
    """Zero gradient there, and Newton steps from elsewhere end there: log-ratios differ by (r_w - r_l)/beta."""
    start, reference, rewards = enumerated(2)
    i, j = (g.flatten() for g in torch.meshgrid(*[torch.arange(6)] * 2, indexing="ij"))
    weight = torch.sigmoid(rewards[i] - rewards[j])

    def loss(logits):
        return (weight * objective(*all_pairs(logits.log_softmax(0), reference)).loss).sum()

    best = (reference + rewards / 0.4).log_softmax(0)
    leaf = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert float(gradient.abs().max()) < 1e-12
    found = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [found], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(found.detach().log_softmax(0), best, atol=1e-5, rtol=0)


def game(seed: int, size: int = 6):
    """P(y > y') of a random preference game."""
    raw = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upper = torch.triu(raw, diagonal=1)
    lower = torch.tril(torch.ones_like(raw), diagonal=-1) * (1 - upper.T)
    return upper + lower + 0.5 * torch.eye(size, dtype=torch.float64)


def ipo_under(logits, reference, preferences, sampler, tau):
    """Expected IPO loss with both answers from `sampler` and soft labels."""
    terms = ipo(*all_pairs(logits.log_softmax(0), reference), preferences.flatten(), tau=tau)
    return (torch.outer(sampler, sampler).flatten() * terms.loss).sum()


def test_online_ipo_is_self_play_on_the_regularised_game():
    """Its gradient is -(4/tau) times that of P(pi > SG[pi]) - tau KL(pi || pi_ref): 1e-12."""
    logits, reference, _ = enumerated(3)
    preferences, tau = game(0), 0.3
    policy = logits.log_softmax(0).exp()
    (gradient,) = torch.autograd.grad(ipo_under(logits, reference, preferences, policy.detach(), tau), logits)
    kl = (policy * (policy.log() - reference)).sum()
    payoff = policy @ preferences @ policy.detach() - tau * kl
    (expected,) = torch.autograd.grad(payoff, logits)
    torch.testing.assert_close(gradient, -(4 / tau) * expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("weight_of_reference", [0.0, 0.125, 1.0])
def test_fixed_points_of_ipo_on_mixtures(weight_of_reference):
    """pi = pi_ref exp(P(. > pi_b)/tau) has no gradient on pairs from pi_b ~ pi^(1-b) pi_ref^b (b = 1: offline)."""
    _, reference, _ = enumerated(4)
    preferences, tau, b = game(1), 0.5, weight_of_reference
    policy = reference.clone()
    for _ in range(2000):
        mixture = ((1 - b) * policy + b * reference).log_softmax(0).exp()
        policy = 0.5 * policy + 0.5 * (reference + preferences @ mixture / tau).log_softmax(0)
        policy = policy.log_softmax(0)
    mixture = ((1 - b) * policy + b * reference).log_softmax(0).exp()
    logits = policy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ipo_under(logits, reference, preferences, mixture, tau), logits)
    assert float(gradient.abs().max()) < 1e-12
    assert float((policy - reference).abs().max()) > 0.1


def test_a_strong_penalty_leaves_ipo_at_the_reference():
    _, reference, _ = enumerated(4)
    logits = reference.clone().requires_grad_()
    loss = ipo_under(logits, reference, game(1), reference.exp(), 1e9)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(gradient.abs().max()) < 1e-8


def test_sampled_and_soft_labels_of_ipo_differ_by_a_constant():
    """Expected hard-label loss - soft-label loss = E[P (1-P)] / tau^2; the gradients are equal."""
    logits, reference, _ = enumerated(5)
    preferences, tau = game(2), 0.3
    weights = torch.rand(36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c, d = all_pairs(logits.log_softmax(0), reference)
    p = preferences.flatten()
    soft = (weights * ipo(a, b, c, d, p, tau=tau).loss).sum()
    hard = (weights * (p * ipo(a, b, c, d, tau=tau).loss + (1 - p) * ipo(b, a, d, c, tau=tau).loss)).sum()
    torch.testing.assert_close(hard - soft, (weights * p * (1 - p)).sum() / tau**2)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (hard, soft)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_certain_preferences_are_hard_labels():
    likelihoods = random_pairs(11).likelihoods()
    torch.testing.assert_close(ipo(*likelihoods, torch.ones(6)).loss, ipo(*likelihoods).loss)
    a, b, c, d = likelihoods
    torch.testing.assert_close(ipo(*likelihoods, torch.zeros(6)).loss, ipo(b, a, d, c).loss)


def test_metrics_with_preferences_are_those_without_but_for_the_accuracy():
    likelihoods = random_pairs(11).likelihoods()
    soft, hard = ipo(*likelihoods, torch.full((6,), 0.8), tau=0.3).metrics, ipo(*likelihoods, tau=0.3).metrics
    assert soft.keys() == hard.keys()
    for name, values in hard.items():
        torch.testing.assert_close(soft[name], values)


def test_accuracy_of_soft_labels_asks_for_the_preferred_side():
    values = exact([-1.0, -1.0, -3.0, -3.0]), exact([-2.0] * 4), exact([0.0] * 4), exact([0.0] * 4)
    accuracy = ipo(*values, torch.tensor([0.9, 0.1, 0.9, 0.1])).metrics["accuracy"]
    assert accuracy.tolist() == [1.0, 0.0, 0.0, 1.0]


# ------------------------------------------------------------------ bounds: Diffusion-DPO
def errors(seed: int = 0, rows: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, generator=generator).requires_grad_(i < 2) for i in range(4)]


def test_dpo_on_lower_bounds_is_diffusion_dpo():
    """Minus the error as a lower bound, beta halved: the same loss, gradient and shared metrics."""
    values = errors()
    draws = DrawsKey.of("noise")
    bounds = [
        LogLikelihood(-e, Kind.LOWER_BOUND, Unit.DIM, torch.full((5,), 12), stderr=torch.ones(5), draws=draws)
        for e in values
    ]
    ours, theirs = dpo(*bounds, beta=3.5), diffusion_dpo(*values, beta=7.0)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=0, rtol=0)
    for name in ("rewards_chosen", "rewards_rejected", "margin", "accuracy"):
        torch.testing.assert_close(ours.metrics[name], theirs.metrics[name], atol=0, rtol=0)
    gradients = [torch.autograd.grad(t.mean(), values[:2]) for t in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    for name, error in zip(("error_chosen", "error_rejected"), values, strict=False):
        assert torch.equal(theirs.metrics[name], error)
    assert not any(v.requires_grad for v in (*theirs.metrics.values(), theirs.weight))


def test_diffusion_dpo_is_its_published_formula():
    good, bad, reference_good, reference_bad = values = errors(1)
    inside = -(5000 / 2) * ((good - bad) - (reference_good - reference_bad))
    expected = F.softplus(-inside).mean()
    loss = diffusion_dpo(*values).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, values[:2]), torch.autograd.grad(expected, values[:2]))


def test_diffusion_dpo_at_the_reference_is_supervision_on_both():
    """Loss log 2, gradient beta/4 times that of the difference of errors."""
    good, bad, *_ = errors(2)
    terms = diffusion_dpo(good, bad, good.detach(), bad.detach(), beta=8.0)
    torch.testing.assert_close(terms.loss, torch.full((5,), LOG2))
    for gradient, sign in zip(torch.autograd.grad(terms.loss.sum(), (good, bad)), (1, -1), strict=True):
        torch.testing.assert_close(gradient, torch.full((5,), sign * 8.0 / 4))


def test_errors_averaged_over_dimensions_need_a_beta_larger_by_their_number():
    values = [e.detach().double() for e in errors(3)]
    summed = diffusion_dpo(*(48 * e for e in values), beta=5.0)
    torch.testing.assert_close(diffusion_dpo(*values, beta=5.0 * 48).loss, summed.loss)
    shared = torch.linspace(0, 3, 5, dtype=torch.float64)  # what both images' noise adds
    torch.testing.assert_close(diffusion_dpo(*(48 * e + shared for e in values), beta=5.0).loss, summed.loss)


def test_expected_margin_of_a_linear_gaussian_model_is_its_closed_form():
    """x ~ N(m, 1): the exact noise predictor's mean error differs by s^2 a^2 [(x-m)^2 - (x-r)^2] / (a^2 + s^2)^2."""
    nodes, weights = (torch.from_numpy(v) for v in numpy.polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    a, s, m, r, beta = 0.8, 0.6, 0.7, -0.2, 3.0
    good, bad = torch.tensor(1.5).double(), torch.tensor(-0.4).double()

    def errors_at(x, mean):
        return (nodes - s * (a * x + s * nodes - a * mean) / (a**2 + s**2)).square()

    terms = diffusion_dpo(errors_at(good, m), errors_at(bad, m), errors_at(good, r), errors_at(bad, r), beta=beta)
    gap = [(x - m) ** 2 - (x - r) ** 2 for x in (good, bad)]
    expected = -beta / 2 * (s * a / (a**2 + s**2)) ** 2 * (gap[0] - gap[1])
    torch.testing.assert_close((weights * terms.metrics["margin"]).sum(), expected)


def test_half_precision_errors_are_widened():
    values = [e.detach().half() for e in errors(3)]
    assert diffusion_dpo(*values).loss.dtype == torch.float32
    torch.testing.assert_close(diffusion_dpo(*values).loss, diffusion_dpo(*(v.float() for v in values)).loss)


# ------------------------------------------------------------------ Bradley-Terry
def test_bradley_terry_is_a_logistic_regression_on_differences():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(7, generator=generator, requires_grad=True) for _ in range(2))
    loss = bradley_terry(chosen, rejected).mean()
    expected = F.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(7))
    torch.testing.assert_close(loss, expected)
    both = (chosen, rejected)
    torch.testing.assert_close(torch.autograd.grad(loss, both), torch.autograd.grad(expected, both))


def test_bradley_terry_recovers_the_odds_of_winning():
    """Two items, 3 wins of 4: the rewards differ by log 3."""
    reward = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [reward], max_iter=50, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = bradley_terry(reward[[0, 0, 0, 1]], reward[[1, 1, 1, 0]]).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float((reward[0] - reward[1]).detach()) == pytest.approx(math.log(3), abs=1e-6)


# ------------------------------------------------------------------ what is detached, what is added
@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_gradients_reach_the_policy_only(objective):
    pairs = random_pairs(12)
    for side in SIDES:
        getattr(pairs, side).requires_grad_()
    terms = objective(*pairs.likelihoods())
    assert not terms.weight.requires_grad
    assert torch.equal(terms.weight, torch.ones(6))
    assert terms.loss.shape == (6,)
    for values in terms.metrics.values():
        assert values.shape == (6,)
        assert not values.requires_grad
    terms.mean().backward()
    assert pairs.reference_chosen.grad is None
    assert pairs.reference_rejected.grad is None
    assert float(pairs.chosen.grad.abs().sum()) > 0
    assert float(pairs.rejected.grad.abs().sum()) > 0
    assert float((pairs.chosen.grad * ~pairs.chosen_mask).abs().sum()) == 0


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_metrics_say_what_training_changed(objective):
    """The displacement is a sum in nats; rewards are the scale times what the loss compares."""
    pairs = random_pairs(13)
    scale = 0.3
    metrics = objective(*pairs.likelihoods(), **{scale_of(objective): scale}).metrics
    a, b, c, d = (s.detach() for s in pairs.sums())
    torch.testing.assert_close(metrics["log_ratio_chosen"], a - c)
    torch.testing.assert_close(metrics["log_ratio_rejected"], b - d)
    torch.testing.assert_close(metrics["log_prob_chosen"], a)
    torch.testing.assert_close(metrics["log_prob_rejected"], b)
    lengths = pairs.lengths() if objective in PER_TOKEN else (1, 1)
    chosen, rejected = scale * (a - c) / lengths[0], scale * (b - d) / lengths[1]
    torch.testing.assert_close(metrics["rewards_chosen"], chosen)
    torch.testing.assert_close(metrics["rewards_rejected"], rejected)
    torch.testing.assert_close(metrics["margin"], chosen - rejected)
    assert torch.equal(metrics["accuracy"], (chosen > rejected).float())


def test_added_likelihood_is_maximum_likelihood_of_the_chosen():
    likelihoods = random_pairs(14).likelihoods()
    terms = dpo(*likelihoods, nll_weight=0.3)
    alone, nll = dpo(*likelihoods), MaximumLikelihood()(likelihoods[0])
    torch.testing.assert_close(terms.mean(), alone.mean() + 0.3 * nll.mean())
    torch.testing.assert_close(terms.metrics["nats_per_unit"], nll.metrics["nats_per_unit"])
    assert terms.metrics.keys() == alone.metrics.keys() | nll.metrics.keys()
    assert list(dpo(*likelihoods).parts())[1:] == []


def test_a_step_cut_in_two_has_the_same_loss():
    """Every mean over its own weights: pairs over pairs, likelihood over tokens."""
    likelihoods = random_pairs(15).likelihoods()
    objective = partial(dpo, nll_weight=0.5)
    pieces = [list(objective(*(one[rows] for one in likelihoods)).parts()) for rows in (slice(0, 2), slice(2, 6))]
    cut = sum(
        sum(p.loss.sum() for p in parts) / sum(p.weight.sum() for p in parts) for parts in zip(*pieces, strict=True)
    )
    torch.testing.assert_close(cut, objective(*likelihoods).mean())


# ------------------------------------------------------------------ extremes
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_finite_at_a_margin_of_ten_thousand(objective, sign):
    """And pushing the right way, or not at all."""
    chosen, rejected = (torch.tensor([v * sign], requires_grad=True) for v in (5e3, -5e3))
    terms = objective(exact(chosen), exact(rejected), exact([0.0]), exact([0.0]), **{scale_of(objective): 1.0})
    assert terms.metrics["margin"].tolist() == [sign * 1e4]
    gradients = torch.autograd.grad(terms.mean(), (chosen, rejected))
    assert bool(torch.isfinite(terms.loss).all())
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    if sign == -1 and objective not in (apo_zero, apo_down, exo_pair):  # these saturate
        assert float(gradients[0]) < 0 < float(gradients[1])


def test_a_rejected_completion_of_probability_zero_costs_nothing():
    chosen = torch.tensor([-1.0], requires_grad=True)
    for objective in (dpo, sigmoid_norm, length_normalised_dpo):
        terms = objective(exact(chosen), exact([-math.inf]), exact([-1.0]), exact([-2.0]))
        assert terms.loss.item() == 0.0
        assert torch.autograd.grad(terms.mean(), chosen)[0].item() == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_plain_tensors_are_finite_at_a_margin_of_ten_thousand(sign):
    values = [torch.tensor([v], requires_grad=True) for v in (5e3 * sign, -5e3 * sign, 0.0, 0.0)]
    for terms in (bradley_terry(*values[:2]), diffusion_dpo(*values, beta=2.0)):
        assert bool(torch.isfinite(terms.loss).all())
        assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(terms.mean(), values[:2]))


# ------------------------------------------------------------------ refusals
def test_arguments_are_what_training_supplies():
    for objective in (f for f in REFERENCED if not isinstance(f, partial)):
        parameters = inspect.signature(objective).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        assert names == (*SIDES, "preferences") if objective is ipo else names == SIDES
        assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)
    assert set(preference.__all__) == {f.__name__ for f in REFERENCED if not isinstance(f, partial)} | {
        "bradley_terry",
        "diffusion_dpo",
    }


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_a_missing_reference_is_named(objective):
    a, b, c, _ = random_pairs().likelihoods()
    for references in ((None, None), (c, None), (None, c)):
        with pytest.raises(InputError, match="needs log-likelihoods under a frozen reference: give a reference model"):
            objective(a, b, *references)


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_likelihoods_that_cannot_be_trained_on_are_refused(objective):
    a, b, c, d = random_pairs().likelihoods()
    upper = exact(a.value, Kind.UPPER_BOUND)
    with pytest.raises(InputError, match="upper bound"):
        objective(upper, b, c, d)
    with pytest.raises(InputError, match="upper bound"):
        objective(a, b, c, exact(d.value, Kind.UPPER_BOUND))
    with pytest.raises(InputError, match="6 and 5 rows"):
        objective(a, b[:5], c, d[:5])
    with pytest.raises(InputError, match="6 and 5 rows"):
        objective(a, b, c, d[:5])


def test_a_completion_cut_differently_for_the_reference_is_refused():
    a, b, c, d = random_pairs().likelihoods()
    shorter = LogLikelihood(c.value, c.kind, c.unit, c.num_units - torch.tensor([0, 0, 1, 0, 0, 0]))
    row = f"row 2 has {int(c.num_units[2])} scored tokens under the policy and {int(c.num_units[2]) - 1} under"
    assert int(c.num_units[2]) > 1
    with pytest.raises(InputError, match=row):
        dpo(a, b, shorter, d)
    unknown = LogLikelihood(c.value, c.kind, c.unit, torch.zeros_like(c.num_units))  # sums from a file, say
    torch.testing.assert_close(dpo(a, b, unknown, d).loss, dpo(a, b, c, d).loss)


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_lower_bounds_are_allowed(objective):
    pairs = random_pairs(dtype=torch.float64)
    bounds = [
        LogLikelihood(one.value, Kind.LOWER_BOUND, one.unit, one.num_units, stderr=torch.ones(6, dtype=torch.float64))
        for one in pairs.likelihoods()
    ]
    torch.testing.assert_close(objective(*bounds).loss, objective(*pairs.likelihoods()).loss)


@pytest.mark.parametrize("objective", REFERENCED, ids=name_of)
def test_unknown_constants_are_allowed_where_they_cancel(objective):
    a, b, c, d = (s.detach() for s in random_pairs(dtype=torch.float64).sums())
    one_model = [unnormalised(s, "energy") for s in (a, b, c, d)]
    objective(*one_model)  # policy and reference share the constant: nothing is unknown
    two_models = [unnormalised(s, name) for s, name in zip((a, b, c, d), ("new", "new", "old", "old"), strict=True)]
    if objective in (*PER_TOKEN, *ABSOLUTE):
        with pytest.raises(InputError, match="different unknown constants"):
            objective(*two_models)
    else:
        torch.testing.assert_close(objective(*two_models).loss, objective(*map(exact, (a, b, c, d))).loss)
        with pytest.raises(InputError, match="unknown constants differ"):
            objective(unnormalised(a, "new"), unnormalised(b, "newer"), *two_models[2:])


def test_added_likelihood_needs_a_normalised_model_and_tokens():
    values = [unnormalised([-1.0, -2.0], "energy") for _ in range(4)]
    with pytest.raises(InputError, match="unknown constant makes meaningless"):
        dpo(*values, nll_weight=0.1)
    a, b, c, d = random_pairs(rows=2).likelihoods()
    empty = LogLikelihood(a.value, a.kind, a.unit, torch.tensor([3, 0]))
    with pytest.raises(InputError, match="row 1 has none"):
        dpo(empty, b, LogLikelihood(c.value, c.kind, c.unit, torch.tensor([3, 0])), d, nll_weight=0.1)


@pytest.mark.parametrize("objective", PER_TOKEN, ids=name_of)
def test_means_per_token_need_tokens(objective):
    a, b, c, d = random_pairs(rows=2).likelihoods()
    empty = LogLikelihood(b.value, b.kind, b.unit, torch.tensor([0, 3]))
    with pytest.raises(InputError, match="row 0 has none"):
        objective(a, empty, c, LogLikelihood(d.value, d.kind, d.unit, torch.tensor([0, 3])))


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        *((f, {scale_of(f): 0.0}, f"{scale_of(f)} must be positive") for f in REFERENCED),
        (dpo, {"beta": math.nan}, "DPO: beta must be positive and finite, got nan"),
        (dpo, {"label_smoothing": 0.6}, "label_smoothing must lie between 0 and 0.5, got 0.6"),
        (dpo, {"nll_weight": -1.0}, "nll_weight must be finite and at least 0, got -1"),
        (dpo, {"nll_weight": math.inf}, "nll_weight must be finite"),
        (robust_dpo, {"label_smoothing": 0.5}, "must be below 0.5"),
        (robust_dpo, {"label_smoothing": -0.1}, "label_smoothing must lie between"),
        (exo_pair, {"label_smoothing": 0.0}, "label_smoothing must be positive"),
        (exo_pair, {"label_smoothing": 0.7}, "label_smoothing must lie between"),
        (length_normalised_dpo, {"label_smoothing": 0.7}, "label_smoothing must lie between"),
        (bco_pair, {"delta": math.nan}, "delta must be finite, got nan"),
    ],
)
def test_options_out_of_range_are_refused(objective, settings, message):
    with pytest.raises(InputError, match=message):
        objective(*random_pairs().likelihoods(), **settings)


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ([0.5] * 5, r"preferences must be \(6,\), got \(5,\)"),
        ([0.5] * 5 + [1.2], "row 5 holds 1.2"),
        ([0.5, -0.1] + [0.5] * 4, "row 1 holds -0.1"),
        ([0.5] * 3 + [math.nan] + [0.5] * 2, "row 3 holds nan"),
    ],
)
def test_preferences_must_be_probabilities(preferences, message):
    with pytest.raises(InputError, match=message):
        ipo(*random_pairs().likelihoods(), torch.tensor(preferences))


def test_plain_tensors_that_do_not_fit_are_refused():
    good = torch.zeros(3)
    with pytest.raises(InputError, match=r"reference_chosen_errors, a \(B,\) tensor; got None"):
        diffusion_dpo(good, good, None, None)
    with pytest.raises(InputError, match=r"policy_rejected_errors must be float \(3,\), got torch.float32 \(2,\)"):
        diffusion_dpo(good, good[:2], good, good)
    with pytest.raises(InputError, match=r"policy_chosen_errors must be float \(B,\), got torch.float32 \(3, 1\)"):
        diffusion_dpo(*[good[:, None]] * 4)
    with pytest.raises(InputError, match=r"rejected_rewards must be float \(3,\), got torch.int64"):
        bradley_terry(good, good.long())
    with pytest.raises(InputError, match="beta must be positive and finite, got -1"):
        diffusion_dpo(good, good, good, good, beta=-1.0)
