"""Aggregation against scipy and brute force over orders; fitted weights against scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.thinksum import aggregate, fit_weights, order_posterior, product_of_experts, score_matrix


def matrix(values, *, kind=Kind.EXACT, units=None, **more) -> LogLikelihood:
    flat = torch.as_tensor(values, dtype=torch.float64).flatten()
    counts = torch.ones(len(flat), dtype=torch.long) if units is None else torch.as_tensor(units).flatten()
    return LogLikelihood(flat, kind, Unit.TOKEN, counts, **more)


TABLE = 2 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 5
HOW = ["mixture", "product", "min", "max"]


# ---------------------------------------------------------------------------------------------------------- aggregation
@pytest.mark.parametrize("how", HOW)
def test_one_column_is_the_softmax(how):
    got = aggregate(matrix(TABLE[:, :1]), 1, how=how)
    torch.testing.assert_close(got.score.value, TABLE[:, 0].log_softmax(0))
    torch.testing.assert_close(got.log_probs, TABLE[:, 0].log_softmax(0))
    raw = aggregate(matrix(TABLE[:, :1]), 1, how=how, normalise=False)
    torch.testing.assert_close(raw.score.value, TABLE[:, 0])


def test_formulas_are_scipys():
    table = TABLE.numpy()
    normalised = table - logsumexp(table, axis=0)
    wanted = {
        "mixture": logsumexp(normalised, axis=1) - math.log(3),
        "product": normalised.mean(1),
        "min": normalised.min(1),
        "max": normalised.max(1),
    }
    for how, values in wanted.items():
        got = aggregate(matrix(TABLE), 3, how=how)
        np.testing.assert_allclose(got.score.value.numpy(), values, atol=1e-12)
        np.testing.assert_allclose(got.log_probs.numpy(), values - logsumexp(values), atol=1e-12)
        assert (got.best, got.odd) == (values.argmax(), values.argmin())
    raw = aggregate(matrix(TABLE), 3, normalise=False).score.value.numpy()
    np.testing.assert_allclose(raw, logsumexp(table, axis=1) - math.log(3), atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_mixture_is_above_the_product_and_that_above_the_minimum(normalise):
    mixture, product, least, most = (aggregate(matrix(TABLE), 3, how=h, normalise=normalise).score.value for h in HOW)
    assert bool((most >= mixture).all())
    assert bool((mixture >= product).all())
    assert bool((product >= least).all())


@pytest.mark.parametrize("how", HOW)
def test_copies_and_constants_of_columns_change_nothing(how):
    got = aggregate(matrix(TABLE), 3, how=how)
    twice = aggregate(matrix(torch.cat([TABLE, TABLE], 1)), 6, how=how)
    torch.testing.assert_close(twice.score.value, got.score.value)
    moved = aggregate(matrix(TABLE + torch.tensor([1.0, -30.0, 400.0])), 3, how=how)  # base rates of the columns
    torch.testing.assert_close(moved.score.value, got.score.value)


@pytest.mark.parametrize("how", ["mixture", "product"])
def test_weights_are_repeats(how):
    weighed = aggregate(matrix(TABLE), 3, how=how, weights=torch.tensor([2.0, 1.0, 0.0]))
    repeated = aggregate(matrix(TABLE[:, [0, 0, 1]]), 3, how=how)
    torch.testing.assert_close(weighed.score.value, repeated.score.value)
    hole = TABLE.clone()
    hole[1, 2] = -math.inf  # in a column of weight 0
    again = aggregate(matrix(hole), 3, how=how, weights=torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(again.score.value, repeated.score.value)


def test_an_impossible_cell_kills_products_but_not_mixtures():
    hole = TABLE.clone()
    hole[1, 2] = -math.inf
    assert aggregate(matrix(hole), 3, how="product").log_probs[1] == -math.inf
    assert aggregate(matrix(hole), 3, how="min").odd == 1
    assert bool(torch.isfinite(aggregate(matrix(hole), 3).log_probs).all())
    with pytest.raises(RowError, match="no row is left with a probability"):
        aggregate(matrix(torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])), 2, how="product")


def test_means_per_unit():
    units = torch.tensor([[1, 2], [4, 2]])
    got = aggregate(matrix([[-1.0, -4.0], [-2.0, -6.0]], units=units), 2, how="product", normalise=False, per_unit=True)
    torch.testing.assert_close(got.score.value, torch.tensor([-1.5, -1.75]).double())


def test_kinds():
    pair = [[-1.0, -2.0], [-2.0, -3.0]]
    energy = matrix(pair, kind=Kind.UNNORMALIZED, constant=ConstantKey.of("Z"))
    bound = matrix(pair, kind=Kind.LOWER_BOUND)
    drawn = matrix(pair, kind=Kind.LOWER_BOUND, stderr=torch.ones(4), draws=DrawsKey.of("a"))
    above = matrix(pair, kind=Kind.UPPER_BOUND, stderr=torch.ones(4), draws=DrawsKey.of("a"))
    assert aggregate(matrix(pair), 2).score.kind is Kind.EXACT
    assert aggregate(energy, 2).score.kind is Kind.EXACT
    assert aggregate(energy, 2, normalise=False).score.kind is Kind.SURROGATE
    assert aggregate(bound, 2).score.kind is Kind.SURROGATE
    assert aggregate(bound, 2, normalise=False).score.kind is Kind.LOWER_BOUND
    assert aggregate(drawn, 2, normalise=False).score.kind is Kind.SURROGATE
    assert aggregate(drawn, 2, how="product", normalise=False).score.kind is Kind.LOWER_BOUND
    assert aggregate(drawn, 2, how="min", normalise=False).score.kind is Kind.LOWER_BOUND
    assert aggregate(above, 2, how="max", normalise=False).score.kind is Kind.UPPER_BOUND
    assert aggregate(above, 2, how="min", normalise=False).score.kind is Kind.SURROGATE


def test_texts_and_the_trivial_substitution():
    """Examples that are the word itself give the plain ranking of the answers."""
    tiny = loglik.load("tiny")
    answers, word = ["range(10):", "banana"], "for i in"
    scores = score_matrix(tiny, answers, [word, "while"], lambda a, w: (w, " " + a))
    wanted = loglik.score(tiny, [(w, " " + a) for a in answers for w in (word, "while")])
    torch.testing.assert_close(scores.value, wanted.value)
    plain = loglik.score(tiny, [(word, " " + a) for a in answers]).value
    alone = aggregate(score_matrix(tiny, answers, [word], lambda a, w: (w, " " + a)), 1)
    torch.testing.assert_close(alone.log_probs, plain.log_softmax(0), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------------------- orders
def before(i: int, j: int):
    return lambda position: position[i] < position[j]


def at(i: int, place: int):
    return lambda position: position[i] == place


def test_certain_translations_are_a_constraint_solver():
    statements = [before(0, 1), at(2, 0), before(3, 1)]
    got = order_posterior([[s, at(0, 9)] for s in statements], [torch.tensor([0.0, -math.inf])] * 3, 4, floor=0.0)
    consistent = [p for p in itertools.permutations(range(4)) if all(s(p) for s in statements)]
    torch.testing.assert_close(got.log_probs.exp().sum(), torch.tensor(1.0).double())
    kept = [tuple(p) for p, lp in zip(got.positions.tolist(), got.log_probs, strict=True) if lp > -math.inf]
    assert kept == consistent
    assert got.probability(at(0, 1)) == pytest.approx(np.mean([p[0] == 1 for p in consistent]))
    marginal = got.marginal()
    torch.testing.assert_close(marginal.sum(0), torch.ones(4).double())
    torch.testing.assert_close(marginal.sum(1), torch.ones(4).double())
    assert marginal[2, 0].item() == pytest.approx(1)


def test_statements_that_say_nothing_leave_orders_uniform():
    """A statement and its opposite, equally likely; with readings that are satisfied unequally often it is not so."""
    got = order_posterior([[before(0, 1), before(1, 0)]], [torch.zeros(2)], 3)
    torch.testing.assert_close(got.log_probs.exp(), torch.full((6,), 1 / 6).double())
    uneven = order_posterior([[before(0, 1), at(0, 0)]], [torch.zeros(2)], 3)
    assert uneven.log_probs.exp().std() > 0.05
    none = order_posterior([], [], 3)
    torch.testing.assert_close(none.log_probs.exp(), torch.full((6,), 1 / 6).double())


def test_mixed_translations_by_hand():
    readings = [[before(0, 1), before(1, 0)], [at(2, 0), at(2, 2)]]
    chances = [torch.tensor([0.8, 0.2]).log() + 3.0, torch.tensor([0.6, 0.4]).log()]
    got = order_posterior(readings, chances, 3, floor=0.05)
    weights = []
    for p in itertools.permutations(range(3)):
        first = 0.8 if p[0] < p[1] else 0.2
        second = 0.6 if p[2] == 0 else 0.4 if p[2] == 2 else 0.05
        weights.append(first * second)
    wanted = torch.tensor(weights).double() / sum(weights)
    torch.testing.assert_close(got.log_probs.exp(), wanted, atol=1e-7, rtol=0)


# -------------------------------------------------------------------------------------------------------------- experts
def test_a_product_of_experts_is_a_weighted_sum():
    a, b, c = matrix([-1.0, -2.0]), matrix([-3.0, -0.5]), matrix([-1.0, -1.0])
    got = product_of_experts({"a": a, "b": b, "c": c}, {"b": 0.5, "c": 0.0})
    assert got.value.tolist() == [-2.5, -2.25]
    assert product_of_experts({"a": a, "b": b}, {"a": 0, "b": 1}).value.equal(b.value)
    bound = matrix([-1.0, -1.0], kind=Kind.LOWER_BOUND)
    assert product_of_experts({"a": a, "b": bound}).kind is Kind.LOWER_BOUND
    assert product_of_experts({"a": a, "b": bound}, {"b": -1}).kind is Kind.UPPER_BOUND


def test_fitted_weights_are_those_of_logistic_regression():
    """Two candidates per question: the conditional model is a logistic one of the differences, without intercept."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    question = torch.arange(200).repeat_interleave(2)
    difference = factors[0::2] - factors[1::2]
    chance = (difference @ torch.tensor([1.5, -0.5, 0.0]).double()).sigmoid()
    first = torch.rand(200, dtype=torch.float64, generator=generator) < chance
    gold = torch.stack([first, ~first], 1).flatten()
    l2 = 0.01
    got = fit_weights(factors, question, gold, l2=l2)
    peer = LogisticRegression(C=1 / (l2 * 200), fit_intercept=False, tol=1e-10, max_iter=1000)
    peer.fit(difference.numpy(), first.numpy())
    torch.testing.assert_close(got, torch.from_numpy(peer.coef_[0]), atol=1e-3, rtol=0)
    order = torch.randperm(400, generator=generator)
    torch.testing.assert_close(
        fit_weights(factors[order], question[order] + 7, gold[order], l2=l2), got, atol=1e-3, rtol=0
    )


def test_several_right_candidates_share_the_probability():
    factors = torch.tensor([[1.0], [0.0], [0.5]])
    got = fit_weights(factors, torch.zeros(3, dtype=torch.long), torch.tensor([True, True, False]), l2=0.1)

    def loss(w: float) -> float:
        scores = factors[:, 0].double() * w
        return -(scores[:2].logsumexp(0) - scores.logsumexp(0)).item() + 0.05 * w * w

    grid = np.linspace(-3, 6, 90001)
    assert got.item() == pytest.approx(grid[np.argmin([loss(w) for w in grid[::100]]) * 100], abs=0.02)


# ------------------------------------------------------------------------------------------------------------- refusals
FOUR = matrix(torch.zeros(4))
ALWAYS = [[lambda p: True]]
REFUSED = [
    (lambda: aggregate(FOUR, 2, how="sum"), "how must be one of mixture, product, min, max, got 'sum'"),
    (lambda: aggregate(FOUR, 3), "4 log-likelihoods are no table of 3 columns"),
    (lambda: aggregate(FOUR, 0), "no table of 0 columns"),
    (lambda: aggregate(matrix([0.0, math.nan, 0.0, 0.0]), 2), "row 0, column 1: is no number below infinity"),
    (lambda: aggregate(matrix([0.0, -math.inf, 0.0, -math.inf]), 2), "column 1: gives every row probability 0"),
    (lambda: aggregate(matrix(torch.zeros(4), units=[1, 1, 0, 1]), 2, per_unit=True), "row 1, column 0: has no scored"),
    (lambda: aggregate(FOUR, 2, weights=torch.tensor([1.0, -1.0])), "weights must be 2 finite numbers"),
    (lambda: aggregate(FOUR, 2, weights=torch.zeros(2)), "weights must be 2 finite numbers"),
    (lambda: aggregate(FOUR, 2, weights=torch.ones(3)), "weights must be 2 finite numbers"),
    (lambda: aggregate(FOUR, 2, how="min", weights=torch.ones(2)), "how=min takes no weights"),
    (lambda: score_matrix(None, [], ["a"], lambda a, w: (a, w)), "rows and columns must be lists"),
    (lambda: score_matrix(None, "ab", ["a"], lambda a, w: (a, w)), "rows and columns must be lists"),
    (lambda: order_posterior(ALWAYS, [torch.zeros(1)], 9), "objects must be from 2 to 8, got 9"),
    (lambda: order_posterior(ALWAYS, [torch.zeros(1)], 3, floor=1.0), r"floor must lie in \[0, 1\), got 1.0"),
    (lambda: order_posterior(ALWAYS, [], 3), "must pair by statement: got 1 and 0"),
    (lambda: order_posterior(ALWAYS, [torch.zeros(2)], 3), "statement 0: needs a log-probability for each reading"),
    (lambda: order_posterior(ALWAYS, [torch.full((1,), -math.inf)], 3), "statement 0: needs a log-probability"),
    (lambda: order_posterior([[lambda p: False]], [torch.zeros(1)], 3, floor=0), "no order satisfies the statements"),
    (lambda: product_of_experts({"a": FOUR}, {"b": 1.0}), "weights name 'b', which is no factor: the factors are a"),
    (lambda: product_of_experts({"a": FOUR, "b": matrix([0.0])}), "factors must have a row per pair"),
    (lambda: product_of_experts({"a": FOUR}, {"a": math.inf}), "weights must be finite"),
    (lambda: product_of_experts({"a": FOUR}, {"a": 0.0}), "at least one factor with a weight other than 0"),
    (lambda: fit_weights(torch.zeros(2, 1), torch.zeros(3), torch.ones(2).bool()), "need question"),
    (lambda: fit_weights(torch.full((2, 1), math.nan), torch.zeros(2), torch.ones(2).bool()), "factors finite"),
    (lambda: fit_weights(torch.zeros(2, 1), torch.zeros(2), torch.ones(2)), "gold must be bool"),
    (
        lambda: fit_weights(torch.zeros(2, 1), torch.tensor([3, 4]), torch.tensor([True, False])),
        "question 4: has no right candidate: leave it out",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
