"""The metric chain against closed forms and enumeration; correlations against scipy and their exact nulls."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.calibration import multiclass_brier_score
from loglik.signals.metric_chain import (
    LINKS,
    chain_correlations,
    chain_links,
    mass_trend,
    metric_chain,
)
from loglik.signals.score_compute import ScoreCompute, score_compute_correlation

METHODS = ("pearson", "spearman", "kendall")


def likelihood(values, units=None, kind=Kind.EXACT, **options) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    units = torch.ones(len(value), dtype=torch.long) if units is None else torch.as_tensor(units)
    return LogLikelihood(value, kind, Unit.TOKEN, units, **options)


def random_questions(seed: int, questions: int = 40, options: int = 4):
    """Log-probabilities (Q, K) of options that share less than all mass, and the right ones."""
    r = np.random.default_rng(seed)
    log_p = np.log(r.dirichlet(np.full(options + 3, 0.5), size=questions)[:, :options])
    return log_p, r.integers(options, size=questions)


def chain_of(log_p, right, **options):
    rows = np.repeat(np.arange(len(log_p)), log_p.shape[1])
    return metric_chain(likelihood(log_p.reshape(-1)), rows.tolist(), right.tolist(), **options)


# ------------------------------------------------------------------ the chain
@pytest.mark.parametrize("seed", range(3))
def test_chain_is_its_formulas(seed):
    log_p, right = random_questions(seed)
    chain = chain_of(log_p, right)
    p = np.exp(log_p)
    shares = p / p.sum(1, keepdims=True)
    every = np.arange(len(p))
    target = np.eye(4)[right]
    expected = {
        "log_p_vocab": log_p[every, right],
        "p_vocab": p[every, right],
        "p_choices": shares[every, right],
        "brier": -((shares - target) ** 2).sum(1),
        "accuracy": (log_p.argmax(1) == right).astype(float),
    }
    assert tuple(score.name for score in chain) == LINKS
    for score in chain:
        np.testing.assert_allclose(score.value.numpy(), expected[score.name], atol=1e-12)
        assert score.value.dtype == torch.float64
        assert score.kind is Kind.EXACT
        assert chain.means()[score.name] == pytest.approx(expected[score.name].mean(), abs=1e-12)
    np.testing.assert_allclose(chain.log_p_wrong.value.exp().numpy(), p.sum(1) - p[every, right], atol=1e-12)
    assert -chain.means()["brier"] == pytest.approx(multiclass_brier_score(np.log(shares), right), abs=1e-12)


def test_two_options_are_a_logistic_function_of_their_difference():
    log_p, right = random_questions(1, options=2)
    chain = chain_of(log_p, right)
    every = np.arange(len(right))
    gap = log_p[every, right] - log_p[every, 1 - right]
    share = 1 / (1 + np.exp(-gap))
    np.testing.assert_allclose(chain.p_choices.value, share, atol=1e-12)
    np.testing.assert_allclose(chain.brier.value, -2 * (1 - share) ** 2, atol=1e-12)
    np.testing.assert_array_equal(chain.accuracy.value, share > 0.5)


def test_third_score_is_the_first_less_the_wrong_mass():
    chain = chain_of(*random_questions(2))
    torch.testing.assert_close(chain.p_choices.value, (chain.log_p_vocab.value - chain.log_p_wrong.value).sigmoid())


def test_more_than_half_decides_for_options_that_exclude_each_other():
    chain = chain_of(*random_questions(3, questions=400))
    above = chain.p_vocab.value > 0.5
    assert above.any()
    assert bool((chain.accuracy.value[above] == 1).all())
    assert bool((chain.accuracy.value[chain.p_choices.value > 0.5] == 1).all())
    assert bool((chain.accuracy.value[chain.p_choices.value < 0.25] == 0).all())
    undecided = chain.accuracy.value[(chain.p_vocab.value > 0.1) & ~above]
    assert 0 < float(undecided.mean()) < 1


def test_more_than_half_does_not_decide_where_one_option_begins_another():
    """p(x) = .6 and p(x y) = .54: the longer option is right, probable, and loses."""
    chain = metric_chain(likelihood([math.log(0.6), math.log(0.54)]), [0, 0], [1])
    assert float(chain.p_vocab.value) > 0.5
    assert float(chain.accuracy.value) == 0.0


def test_a_constant_changes_the_first_two_scores_only():
    log_p, right = random_questions(4)
    shift = np.linspace(-5, -0.5, len(log_p))[:, None]
    plain, moved = chain_of(log_p, right), chain_of(log_p + shift, right)
    torch.testing.assert_close(moved.log_p_vocab.value, plain.log_p_vocab.value + torch.from_numpy(shift[:, 0]))
    for name in LINKS[2:]:
        torch.testing.assert_close(getattr(moved, name).value, getattr(plain, name).value, atol=1e-12, rtol=0)


def test_probabilities_that_underflow_keep_their_shares():
    chain = metric_chain(likelihood([-2000.0, -2001.0]), [0, 0], [0])
    assert float(chain.p_vocab.value) == 0.0
    assert float(chain.p_choices.value) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-12)


def test_options_may_stand_in_any_order_and_number():
    """Questions 7 and 2, of three and two options, shuffled: places count within a question, in row order."""
    ll = likelihood([-1.0, -5.0, -2.0, -0.5, -3.0])
    chain = metric_chain(ll, [7, 2, 7, 2, 7], [1, 0])
    assert chain.question.tolist() == [2, 7]
    assert chain.log_p_vocab.value.tolist() == [-0.5, -1.0]
    assert chain.accuracy.value.tolist() == [1.0, 1.0]
    total = sum(math.exp(x) for x in (-1.0, -2.0, -3.0))
    assert float(chain.p_choices.value[1]) == pytest.approx(math.exp(-1) / total, abs=1e-12)


def test_normalisation_changes_shares_and_choice_but_not_probabilities():
    """The harness's acc_norm: argmax of the log-likelihood by length."""
    log_p, right = random_questions(5)
    r = np.random.default_rng(0)
    lengths = r.integers(1, 30, size=log_p.shape)
    rows = np.repeat(np.arange(len(log_p)), 4)
    plain = chain_of(log_p, right)
    for normalise in ("token", "byte", "character"):
        ll = likelihood(log_p.reshape(-1), lengths.reshape(-1))
        given = None if normalise == "token" else torch.from_numpy(lengths.reshape(-1))
        chain = metric_chain(ll, rows.tolist(), right.tolist(), normalise=normalise, lengths=given)
        by_length = log_p / lengths
        np.testing.assert_array_equal(chain.accuracy.value, by_length.argmax(1) == right)
        shares = np.exp(by_length - by_length.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        np.testing.assert_allclose(chain.p_choices.value, shares[np.arange(len(right)), right], atol=1e-12)
        torch.testing.assert_close(chain.p_vocab.value, plain.p_vocab.value)


def test_kinds_say_what_scores_promise():
    bound = metric_chain(likelihood([-1.0, -2.0], kind=Kind.LOWER_BOUND), [0, 0], [0])
    assert [s.kind for s in bound] == [Kind.LOWER_BOUND, Kind.LOWER_BOUND, *[Kind.SURROGATE] * 3]
    drawn = likelihood([-1.0, -2.0], kind=Kind.LOWER_BOUND, stderr=torch.full((2,), 0.1))
    assert metric_chain(drawn, [0, 0], [0]).p_vocab.kind is Kind.SURROGATE


def test_chain_refuses_what_has_no_probability():
    two = likelihood([-1.0, -2.0])
    energy = LogLikelihood(
        two.value, Kind.UNNORMALIZED, Unit.TOKEN, two.num_units, constant=ConstantKey.of("an energy")
    )
    with pytest.raises(InputError, match="needs normalised log-likelihoods"):
        metric_chain(energy, [0, 0], [0])
    with pytest.raises(RowError, match=r"row 1: the log-likelihood is 0\.5, above 0"):
        metric_chain(likelihood([-1.0, 0.5]), [0, 0], [0])
    for correct, message in (
        ([2], "correct must be from 0 to 1 for question 0"),
        ([-1], "got -1"),
        ([0, 1], "correct must be 1 whole numbers, one per question"),
        ([0.0], "correct must be 1 whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            metric_chain(two, [0, 0], correct)
    with pytest.raises(RowError, match="every option probability 0"):
        metric_chain(likelihood([-math.inf, -math.inf]), [0, 0], [0])
    with pytest.raises(RowError, match="row 0"):
        metric_chain(likelihood([math.nan, -1.0]), [0, 0], [0])


# ------------------------------------------------------------------ correlations
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("digits", [None, 1, 0])
def test_correlations_are_those_of_scipy(method, digits):
    r = np.random.default_rng(0)
    compute = r.lognormal(3, 2, size=9)
    compute[3] = compute[4]  # a tie
    table = r.normal(size=(9, 30)) + 0.3 * np.log(compute)[:, None]
    table = table if digits is None else table.round(digits).clip(-1, 1)
    found = score_compute_correlation(table, compute, method=method)
    function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}[method]
    x = np.log(compute) if method == "pearson" else compute
    expected = [function(x, column).statistic for column in table.T[found.kept]]
    np.testing.assert_allclose(found.values, expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scale_of_scores_and_their_order_change_nothing(method):
    r = np.random.default_rng(1)
    compute, table = np.geomspace(1, 1e6, 7), r.normal(size=(7, 12))
    plain = score_compute_correlation(table, compute, method=method)
    tiny = score_compute_correlation(table * 1e-200 - 0.0, compute * 1e12, method=method)
    np.testing.assert_allclose(tiny.values, plain.values, atol=1e-12)
    np.testing.assert_allclose(score_compute_correlation(-table, compute, method=method).values, -plain.values)
    order = r.permutation(7)
    again = score_compute_correlation(table[order], compute[order], method=method)
    np.testing.assert_allclose(again.values, plain.values, atol=1e-12)
    line = score_compute_correlation(np.log(compute)[:, None] * [2.0, -3.0], compute, method=method)
    np.testing.assert_allclose(line.values, [1.0, -1.0], atol=1e-12)


def test_null_distributions_over_all_orders():
    """Every order of five distinct scores once: mean 0 and the known variances of rho and tau."""
    orders = np.array(list(itertools.permutations(range(5)))).T
    compute, m = np.arange(1.0, 6.0), 5
    rho = score_compute_correlation(orders, compute, method="spearman").values
    tau = score_compute_correlation(orders, compute, method="kendall").values
    assert rho.mean() == pytest.approx(0, abs=1e-12)
    assert tau.mean() == pytest.approx(0, abs=1e-12)
    assert rho.var() == pytest.approx(1 / (m - 1), abs=1e-12)
    assert tau.var() == pytest.approx(2 * (2 * m + 5) / (9 * m * (m - 1)), abs=1e-12)


def test_null_of_pearson_is_the_t_distribution():
    """500 items that do not depend on compute; level 0.001."""
    r = np.random.default_rng(11)
    m = 8
    values = score_compute_correlation(r.normal(size=(m, 500)), np.geomspace(1, 99, m), method="pearson").values
    t = values * np.sqrt((m - 2) / (1 - values**2))
    assert stats.kstest(t, stats.t(m - 2).cdf).pvalue > 0.001


def test_first_two_links_have_the_same_ranks():
    r = np.random.default_rng(3)
    log_p, right = random_questions(6)
    chains = [chain_of(np.minimum(log_p + r.normal(0, 0.5, log_p.shape), 0), right) for _ in range(6)]
    for method in ("spearman", "kendall"):
        found = chain_correlations(chains, np.geomspace(1, 100, 6), method=method)
        np.testing.assert_array_equal(found["log_p_vocab"].values, found["p_vocab"].values)
        assert list(found) == list(LINKS)
        link = chain_links(found)[0]
        assert (link.drop, link.lower, link.lost) == (0.0, 0.0, 0.0)


def test_infinite_scores_have_ranks_but_no_pearson():
    table = np.array([[-math.inf, -math.inf], [-math.inf, -3.0], [-2.0, -1.0], [-1.0, 0.0]])
    compute = [1.0, 2.0, 3.0, 4.0]
    for method, function in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        found = score_compute_correlation(table, compute, method=method).values
        finite = np.where(np.isinf(table), -99.0, table)
        np.testing.assert_allclose(found, [function(compute, c).statistic for c in finite.T], atol=1e-12)
    with pytest.raises(InputError, match="score of item 0 under model 0 is -inf: leave the item out, or use ranks"):
        score_compute_correlation(table, compute, method="pearson")


# ------------------------------------------------------------------ distributions over items
def test_summaries_are_their_definitions():
    r = np.random.default_rng(5)
    values = r.uniform(-1, 1, 200)
    found = ScoreCompute(values, np.ones(200, dtype=bool), "spearman")
    grid = np.linspace(-1, 1, 200_001)
    survival = found.survival(grid)
    assert np.trapezoid(survival, grid) == pytest.approx(found.area, abs=1e-4)
    assert found.area == 1 + found.mean
    for level in (-1.0, -0.3, values[7], 1.0):
        assert float(found.survival(level)) == (values > level).mean()
    ends = [stats.wasserstein_distance(values, [end]) for end in (1.0, -1.0)]
    assert found.wasserstein == pytest.approx(-min(ends), abs=1e-12)
    assert found.energy == pytest.approx(-min(stats.energy_distance(values, [e]) for e in (1.0, -1.0)), abs=1e-12)
    assert found.median == np.median(values)


def test_constant_scores_are_left_out_and_counted():
    table = np.array([[1.0, 0.1, 0.0], [1.0, 0.2, 1.0], [1.0, 0.3, 1.0]])
    found = score_compute_correlation(table, [1.0, 2.0, 3.0])
    assert found.kept.tolist() == [False, True, True]
    assert found.constant == pytest.approx(1 / 3)
    np.testing.assert_allclose(found.values, [1.0, math.sqrt(3) / 2], atol=1e-12)  # average ranks of a tie


def test_links_are_paired_over_items_that_have_both():
    first = ScoreCompute(np.array([0.9, 0.8, -0.5]), np.array([True, True, True, False]), "spearman")
    second = ScoreCompute(np.array([0.5, -0.7]), np.array([False, True, True, False]), "spearman")
    (link,) = chain_links({"a": first, "b": second})
    assert (link.before, link.after, link.items) == ("a", "b", 2)
    assert link.drop == pytest.approx(((0.8 - 0.5) + (-0.5 + 0.7)) / 2)
    assert link.stderr == pytest.approx(np.std([0.3, 0.2], ddof=1) / math.sqrt(2))
    assert link.lower == 1.0
    assert link.lost == 0.25


def test_trend_of_masses_is_the_regression():
    r = np.random.default_rng(7)
    compute = np.geomspace(10, 1e5, 6)
    exponents = r.uniform(0.1, 0.6, size=(2, 10))
    chains = []
    for c in compute:
        right, wrong = (-9 + e * np.log(c / 10) for e in exponents)
        log_p = np.stack([right, wrong - math.log(2), wrong - math.log(2)], 1)
        chains.append(chain_of(log_p, np.zeros(10, dtype=int)))
    right, wrong, covariance = mass_trend(chains, compute)
    np.testing.assert_allclose(right, exponents[0], atol=1e-10)
    np.testing.assert_allclose(wrong, exponents[1], atol=1e-10)
    np.testing.assert_allclose(covariance, exponents.prod(0) * np.log(compute).var(ddof=1), atol=1e-10)
    # Shares grow exactly where the right option's exponent is the larger one.
    shares = np.stack([chain.p_choices.value for chain in chains])
    np.testing.assert_array_equal(shares[-1] > shares[0], exponents[0] > exponents[1])


def test_correlations_refuse_what_has_none():
    table = np.random.default_rng(0).normal(size=(4, 3))
    good = [1.0, 2.0, 3.0, 4.0]
    for scores, compute, message in (
        (table[:2], good[:2], "at least three models, got 2"),
        (table, good[:3], "need compute"),
        (table[:, 0], good, "need compute"),
        (table, [0.0, 1.0, 2.0, 3.0], "compute must be positive and finite, got 0.0 for model 0"),
        (table, [math.nan, 1.0, 2.0, 3.0], "for model 0"),
        (table, [2.0] * 4, "same compute"),
        (np.where(table == table[1, 2], np.nan, table), good, "item 2 under model 1 is nan: leave the item out"),
        (np.ones((4, 3)), good, "no item's score varies"),
    ):
        with pytest.raises(InputError, match=message):
            score_compute_correlation(scores, compute)
    with pytest.raises(InputError, match="method must be one of"):
        score_compute_correlation(table, good, method="cosine")
    with pytest.raises(InputError, match="there are no models"):
        chain_correlations([], [])
    log_p, right = random_questions(0)
    one, other = chain_of(log_p, right), chain_of(log_p[:5], right[:5])
    with pytest.raises(InputError, match="model 1 has other questions than model 0"):
        chain_correlations([one, other, one], [1, 2, 3])
    with pytest.raises(InputError, match="log_p_vocab: no item's score varies"):
        chain_correlations([one, one, one], [1, 2, 3])
    found = score_compute_correlation(table, good)
    with pytest.raises(InputError, match="a link joins two scores, got 1"):
        chain_links({"a": found})
    with pytest.raises(InputError, match="same items by the same method"):
        chain_links({"a": found, "b": score_compute_correlation(table, good, method="kendall")})
    apart = [ScoreCompute(np.array([0.5]), np.array(k), "spearman") for k in ([True, False], [False, True])]
    with pytest.raises(InputError, match="no item has a correlation"):
        chain_links(dict(zip("ab", apart, strict=True)))
