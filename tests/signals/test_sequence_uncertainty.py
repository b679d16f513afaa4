"""Entropies and likelihoods of sequences against exact expectations, loops and closed forms."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.sequence_uncertainty import (
    discrete_semantic_entropy,
    greedy_nll,
    length_normalised_log_prob,
    maximum_sequence_probability,
    mode_nll,
    num_semantic_sets,
    predictive_entropy,
    semantic_entropy,
)


def ll(values, lengths=None, kind=Kind.EXACT, **more) -> LogLikelihood:
    values = torch.as_tensor(values, dtype=torch.float64)
    count = torch.ones(len(values), dtype=torch.long) if lengths is None else torch.as_tensor(lengths)
    constant = ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None
    return LogLikelihood(values, kind, Unit.TOKEN, count, constant=constant, **more)


def entropy(probabilities) -> float:
    return float(scipy.stats.entropy(list(probabilities)))


def test_predictive_entropy_is_unbiased_and_its_standard_error_is_its_spread():
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    drawn = np.random.default_rng(0).choice(5, size=(4000, 8), p=p)
    question = np.arange(4000).repeat(8)
    found = predictive_entropy(ll(np.log(p)[drawn].ravel()), question)
    spread = found.value.std().item()
    assert abs(found.value.mean().item() - entropy(p)) < 4 * spread / math.sqrt(4000)
    assert found.stderr.square().mean().sqrt().item() == pytest.approx(spread, rel=0.05)
    assert found.kind is Kind.ESTIMATE


STRINGS = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
MEANING = [0, 1, 0, 2, 2]
TRUTH = entropy([0.6, 0.25, 0.15])


def every_outcome(n=4):
    """All draws of n strings, a question each, with their probabilities."""
    draws = np.array(list(product(range(5), repeat=n)))
    return draws, STRINGS[draws].prod(1)


def naive_semantic(draw, form, power=1.0):
    mass = {}
    for s in set(draw):
        mass[MEANING[s]] = mass.get(MEANING[s], 0.0) + STRINGS[s] ** power
    if form == "normalised":
        return entropy(mass.values())
    if form == "sample_mean":
        return -np.mean([math.log(mass[MEANING[s]]) for s in draw])
    return -np.mean([math.log(m) for m in mass.values()])


@pytest.mark.parametrize("form", ["normalised", "sample_mean", "class_mean"])
def test_semantic_entropy_of_every_possible_draw(form):
    """Equal to a loop over dictionaries; what the kinds promise holds in exact expectation."""
    draws, weight = every_outcome()
    question = np.arange(len(draws)).repeat(4)
    likelihood = ll(np.log(STRINGS)[draws].ravel(), np.full(draws.size, 2))
    found = semantic_entropy(likelihood, question, np.array(MEANING)[draws].ravel(), draws.ravel(), form=form)
    expected = [naive_semantic(draw, form) for draw in draws]
    np.testing.assert_allclose(found.value.numpy(), expected, atol=1e-12)
    mean = float(weight @ found.value.numpy())
    if form == "sample_mean":
        assert found.kind is Kind.UPPER_BOUND
        assert mean > TRUTH
    assert (found.kind is Kind.ESTIMATE) == (form == "normalised")
    halved = semantic_entropy(
        likelihood, question, np.array(MEANING)[draws].ravel(), draws.ravel(), form=form, length_normalised=True
    )
    np.testing.assert_allclose(halved.value.numpy(), [naive_semantic(d, form, 0.5) for d in draws], atol=1e-12)
    assert halved.kind is Kind.SURROGATE


def test_discrete_semantic_entropy_of_every_possible_draw():
    """A lower bound in exact expectation, closer with more samples."""
    below = []
    for n in (2, 3, 4):
        draws, weight = every_outcome(n)
        meaning = np.array(MEANING)[draws]
        question = np.arange(len(draws)).repeat(n)
        found = discrete_semantic_entropy(question, meaning.ravel())
        expected = [entropy(np.array(list(Counter(row).values())) / n) for row in meaning.tolist()]
        np.testing.assert_allclose(found.value.numpy(), expected, atol=1e-12)
        assert found.kind is Kind.LOWER_BOUND
        assert num_semantic_sets(question, meaning.ravel()).tolist() == [len(set(row)) for row in meaning.tolist()]
        below.append(TRUTH - float(weight @ found.value.numpy()))
    assert below[0] > below[1] > below[2] > 0


def test_limits_of_semantic_entropy():
    """One meaning: 0. A meaning per string, all found: the entropy of strings. Duplicates change nothing."""
    values, zeros = np.log(STRINGS), [0] * 5
    for repeat in (1, 3):
        question, sequence = zeros * repeat, list(range(5)) * repeat
        likelihood = ll(np.tile(values, repeat))
        assert semantic_entropy(likelihood, question, zeros * repeat, sequence).item() == pytest.approx(0, abs=1e-12)
        own = semantic_entropy(likelihood, question, sequence, sequence).item()
        assert own == pytest.approx(entropy(STRINGS), abs=1e-12)
    # Sequences that differ but mean and weigh the same are not duplicates.
    twins = semantic_entropy(ll(np.log([0.25, 0.25, 0.5])), [0] * 3, [0, 0, 1], [0, 1, 2]).item()
    assert twins == pytest.approx(math.log(2))


def test_uniform_and_deterministic_outputs():
    k = 7
    likelihood, question = ll([-math.log(k)] * k), [0] * k
    numbers = list(range(k))
    measured = [
        predictive_entropy(likelihood, question),
        mode_nll(likelihood, question),
        semantic_entropy(likelihood, question, numbers, numbers),
        discrete_semantic_entropy(question, numbers),
    ]
    for found in measured:
        assert found.item() == pytest.approx(math.log(k), abs=1e-12)
    assert greedy_nll(likelihood).value.tolist() == pytest.approx([math.log(k)] * k)
    sure = ll([0.0] * 3)
    assert [predictive_entropy(sure, [0] * 3).item(), mode_nll(sure, [0] * 3).item()] == [0.0, 0.0]
    assert predictive_entropy(sure, [0] * 3).stderr.item() == 0.0
    assert semantic_entropy(sure, [0] * 3, [4] * 3, [1] * 3).item() == 0.0
    assert discrete_semantic_entropy([0] * 3, [4] * 3).item() == 0.0


def test_order_and_numbers_of_questions_do_not_matter():
    g = np.random.default_rng(3)
    question, meaning, sequence = g.integers(5, size=60), g.integers(3, size=60), np.arange(60)
    likelihood = ll(-g.exponential(size=60) - 1)
    order = g.permutation(60)
    for fn in (
        lambda ll_, q, m, s: predictive_entropy(ll_, q).value,
        lambda ll_, q, m, s: predictive_entropy(ll_, q).stderr,
        lambda ll_, q, m, s: mode_nll(ll_, q).value,
        lambda ll_, q, m, s: semantic_entropy(ll_, q, m, s).value,
        lambda ll_, q, m, s: discrete_semantic_entropy(q, m).value,
    ):
        plain = fn(likelihood, question, meaning, sequence)
        shuffled = fn(likelihood[order], question[order] * 7 - 3, 9 - meaning[order], sequence[order] + 5)
        torch.testing.assert_close(plain, shuffled, atol=1e-12, rtol=0)
        for q in range(5):
            own = question == q
            alone = fn(likelihood[own.nonzero()[0]], question[own], meaning[own], sequence[own])
            torch.testing.assert_close(alone, plain[q : q + 1], atol=1e-12, rtol=0)


def test_length_normalised_values_by_hand():
    likelihood = ll([-2.0, -6.0, -3.0], [1, 3, 2])
    assert length_normalised_log_prob(likelihood).value.tolist() == [-2.0, -2.0, -1.5]
    found = predictive_entropy(likelihood, [0, 0, 1], length_normalised=True)
    assert found.value.tolist() == [2.0, 1.5]
    assert found.stderr.tolist() == [0.0, math.inf]
    assert predictive_entropy(likelihood, [0, 0, 1]).value.tolist() == [4.0, 3.0]
    assert predictive_entropy(likelihood, [0, 0, 1]).stderr[0].item() == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------------------------- labels
def test_kinds():
    question, numbers = [0, 0], [0, 1]
    noise = {"stderr": torch.ones(2, dtype=torch.float64), "draws": DrawsKey.of("a")}

    def kinds(kind, **more):
        likelihood = ll([-1.0, -2.0], kind=kind, **more)
        return (
            greedy_nll(likelihood).kind,
            mode_nll(likelihood, question).kind,
            maximum_sequence_probability(likelihood).kind,
            predictive_entropy(likelihood, question).kind,
            semantic_entropy(likelihood, question, numbers, numbers).kind,
            semantic_entropy(likelihood, question, numbers, numbers, form="sample_mean").kind,
        )

    exact, lower, upper, estimate, odd = (
        Kind.EXACT,
        Kind.LOWER_BOUND,
        Kind.UPPER_BOUND,
        Kind.ESTIMATE,
        Kind.SURROGATE,
    )
    assert kinds(exact) == (exact, upper, exact, estimate, estimate, upper)
    assert kinds(lower) == (upper, upper, lower, upper, odd, odd)
    assert kinds(lower, **noise) == (upper, odd, odd, upper, odd, odd)
    assert kinds(upper) == (lower, odd, upper, lower, odd, odd)
    assert kinds(estimate, **noise) == (estimate, odd, estimate, estimate, estimate, odd)
    unnormalised = Kind.UNNORMALIZED
    assert kinds(unnormalised) == (unnormalised, odd, odd, odd, estimate, odd)


def test_an_unknown_constant_cancels_in_semantic_entropy():
    values, question, meaning = np.log(STRINGS), [0] * 5, MEANING
    plain = semantic_entropy(ll(values), question, meaning, range(5)).item()
    moved = semantic_entropy(ll(values + 11, kind=Kind.UNNORMALIZED), question, meaning, range(5)).item()
    assert moved == pytest.approx(plain, abs=1e-12)


def test_errors_that_samples_share_are_added_and_others_are_in_the_spread():
    stderr = torch.tensor([0.1, 0.3], dtype=torch.float64)
    shared = ll([-1.0, -1.0], kind=Kind.LOWER_BOUND, stderr=stderr, draws=DrawsKey.of("a", shared_by_rows=True))
    apart = ll([-1.0, -1.0], kind=Kind.LOWER_BOUND, stderr=stderr, draws=DrawsKey.of("a"))
    assert predictive_entropy(shared, [0, 0]).stderr.item() == pytest.approx(0.2)
    assert predictive_entropy(apart, [0, 0]).stderr.item() == 0.0
    found = maximum_sequence_probability(shared)
    torch.testing.assert_close(found.stderr, found.value * stderr)


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_log_likelihood_of_an_output_are_refused(value):
    likelihood, two = ll([-1.0, value]), [0, 1]
    for call in (
        lambda: greedy_nll(likelihood),
        lambda: mode_nll(likelihood, two),
        lambda: maximum_sequence_probability(likelihood),
        lambda: length_normalised_log_prob(likelihood),
        lambda: predictive_entropy(likelihood, two),
        lambda: semantic_entropy(likelihood, two, two, two),
    ):
        with pytest.raises(RowError, match=r"row 1: its log-likelihood is .*: score it with the model"):
            call()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([0], r"question must be 2 whole numbers"),
        ([0.0, 1.0], r"question must be 2 whole numbers"),
        ([True, False], r"question must be 2 whole numbers"),
        ([[0, 1]], r"question must be 2 whole numbers"),
    ],
)
def test_questions_that_do_not_fit_are_refused(question, message):
    likelihood = ll([-1.0, -2.0])
    for call in (predictive_entropy, mode_nll):
        with pytest.raises(InputError, match=message):
            call(likelihood, question)
    with pytest.raises(InputError, match=message.replace("question", "meaning")):
        semantic_entropy(likelihood, [0, 0], question, [0, 1])
    with pytest.raises(InputError, match=message.replace("question", "meaning")):
        discrete_semantic_entropy([0, 0], question)


def test_nothing_to_measure_is_refused():
    empty = ll([])
    for call in (
        lambda: predictive_entropy(empty, []),
        lambda: mode_nll(empty, []),
        lambda: discrete_semantic_entropy([], []),
        lambda: num_semantic_sets([], []),
    ):
        with pytest.raises(InputError, match="there is no sample"):
            call()
    with pytest.raises(RowError, match="row 0: has no scored token to divide by"):
        length_normalised_log_prob(ll([-1.0], [0]))
    with pytest.raises(InputError, match="form must be one of normalised, sample_mean, class_mean, got 'kuhn'"):
        semantic_entropy(ll([-1.0]), [0], [0], [0], form="kuhn")


def test_one_sequence_cannot_have_two_meanings_or_likelihoods():
    with pytest.raises(RowError, match="row 2: has the sequence of row 0 and another meaning"):
        semantic_entropy(ll([-1.0, -2.0, -1.0]), [0] * 3, [0, 1, 1], [5, 6, 5])
    with pytest.raises(RowError, match="row 2: has the sequence of row 0 and another meaning or log-likelihood"):
        semantic_entropy(ll([-1.0, -2.0, -1.5]), [0] * 3, [0, 1, 0], [5, 6, 5])
    # In another question it may, and noisy values of one sequence differ.
    semantic_entropy(ll([-1.0, -2.0, -1.5]), [0, 0, 1], [0, 1, 1], [5, 6, 5])
    noisy = ll([-1.0, -1.5], kind=Kind.ESTIMATE, stderr=torch.ones(2, dtype=torch.float64))
    semantic_entropy(noisy, [0, 0], [0, 0], [5, 5])
