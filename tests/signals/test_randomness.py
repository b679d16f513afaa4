"""The battery of randomness tests: scipy's figures, coin flips, planted memory, run lengths by enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.signals.randomness import randomness_power, randomness_report, run_lengths


def flips(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (rows, length))


def test_the_battery_is_scipys():
    lists = flips(5, 60, 0)
    got = randomness_report(torch.from_numpy(lists))
    counts = np.zeros((2, 2), dtype=int)
    for row in lists:
        for a, b in itertools.pairwise(row):
            counts[a, b] += 1
    assert got.transitions.tolist() == counts.tolist()
    assert got.transitions.sum() == 5 * 59  # no transition from one list to the next
    found = scipy.stats.chi2_contingency(counts, correction=False, lambda_="log-likelihood")
    assert got["independence"].statistic == pytest.approx(found.statistic)
    assert got["independence"].p_value == pytest.approx(found.pvalue)
    assert got["uniformity"].p_value == scipy.stats.binomtest(int(lists.sum()), 300).pvalue
    assert got.switch_rate == pytest.approx((counts[0, 1] + counts[1, 0]) / 295)
    assert got.yes_rate == lists.mean()
    assert got.expected_switch_rate == pytest.approx(2 * lists.mean() * (1 - lists.mean()))
    assert got.position_rates == pytest.approx(lists.mean(0))
    order = np.sort([test.p_value for test in got.tests])
    assert min(test.adjusted for test in got.tests) == pytest.approx(min(1, 4 * order[0]))
    assert all(test.adjusted >= test.p_value for test in got.tests)


def test_runs_are_wald_wolfowitz_and_the_exact_tail():
    """z by its formula; the tail by all orders of a short list."""
    row = flips(1, 40, 1)[0]
    ones, n = int(row.sum()), 40
    runs = 1 + int((np.diff(row) != 0).sum())
    mean = 2 * ones * (n - ones) / n + 1
    variance = (mean - 1) * (mean - 2) / (n - 1)
    assert randomness_report(row).runs_z == pytest.approx((runs - mean) / math.sqrt(variance))
    short = [[0, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0]]
    observed = sum(a != b for r in short for a, b in itertools.pairwise(r))
    counts = [
        sum(a != b for r in both for a, b in itertools.pairwise(r))
        for both in itertools.product(*(list(itertools.permutations(r)) for r in short))
    ]
    wanted = np.mean([c >= observed for c in counts])
    assert randomness_report(short)["negative recency"].p_value == pytest.approx(wanted)


def test_second_order_statistic_by_hand():
    row = flips(1, 200, 2)[0]
    thirds = np.zeros((2, 2, 2))
    for a, b, c in zip(row, row[1:], row[2:], strict=False):
        thirds[a, b, c] += 1
    g = 0.0
    for a, b, c in itertools.product(range(2), repeat=3):
        expected = thirds[a, b].sum() * thirds[:, b, c].sum() / thirds[:, b].sum()
        g += 2 * thirds[a, b, c] * math.log(thirds[a, b, c] / expected)
    got = randomness_report(row)["memory of two answers"]
    assert got.statistic == pytest.approx(g)
    assert got.p_value == pytest.approx(scipy.stats.chi2.sf(g, 2))


def test_coin_flips_are_called_random_as_often_as_promised():
    """Levels at 5 %: near it for the chi-square tests, at most it for the exact ones."""
    runs = [randomness_report(flips(10, 20, seed)) for seed in range(400)]
    share = {test.name: np.mean([r[test.name].p_value <= 0.05 for r in runs]) for test in runs[0].tests}
    for name in ("independence", "memory of two answers"):
        assert 0.02 <= share[name] <= 0.09, share  # +- 3 standard errors of 5 %, and the asymptotics
    for name in ("uniformity", "negative recency"):
        assert 0.01 <= share[name] <= 0.083, share
    second = np.mean([r["memory of two answers"].statistic for r in runs])
    assert second == pytest.approx(2, abs=0.35)
    family = np.mean([any(t.adjusted <= 0.05 for t in r.tests) for r in runs])
    assert family <= 0.083


def test_memory_of_order_one_is_not_taken_for_order_two():
    generator = np.random.default_rng(0)
    values = []
    for _ in range(200):
        row = [0]
        for _ in range(299):
            row.append(int(generator.random() < (0.7 if row[-1] == 0 else 0.4)))
        values.append(randomness_report(row)["memory of two answers"].statistic)
    assert scipy.stats.kstest(values, "chi2", args=(2,)).pvalue > 1e-3


def test_alternation_passes_uniformity_and_fails_the_rest():
    got = randomness_report([0, 1] * 50)
    assert got["uniformity"].p_value == 1.0
    assert got.switch_rate == 1.0
    assert got["independence"].statistic == pytest.approx(
        scipy.stats.chi2_contingency(got.transitions.numpy(), correction=False, lambda_="log-likelihood").statistic
    )
    assert got["independence"].statistic == pytest.approx(2 * 99 * math.log(2), rel=1e-3)
    assert got["negative recency"].p_value < 1e-20
    assert got.switch_after_run == {1: (1.0, 99)}


def test_negative_recency_is_seen_in_the_run_lengths():
    generator = np.random.default_rng(0)
    lists = []
    for _ in range(300):
        row, run = [int(generator.random() < 0.5)], 1
        for _ in range(19):
            switch = generator.random() < 0.46 + 0.07 * min(run, 4)
            row.append(row[-1] ^ int(switch))
            run = 1 if switch else run + 1
        lists.append(row)
    got = randomness_report(lists)
    assert got["negative recency"].p_value < 1e-6
    assert got.runs_z > 5
    for run in (1, 2, 3):
        rate, count = got.switch_after_run[run]
        planted = 0.46 + 0.07 * run
        assert abs(rate - planted) < 4 * math.sqrt(planted * (1 - planted) / count)
    sticky = randomness_report([[0] * 10 + [1] * 10])
    assert sticky["negative recency"].p_value > 0.99
    assert sticky.runs_z < -3


def test_small_counts_are_permuted_and_the_first_answers_can_be_left_out():
    got = randomness_report([[0, 1, 0, 1, 0, 1, 0, 1]])
    assert got["independence"].method == "permutation"
    # of the 70 orders of four and four, G is as large for the two that alternate and the few that are as far from even
    assert 1 / 70 <= got["independence"].p_value < 0.15
    skipped = randomness_report([[1, 1, 0, 1], [1, 0, 1, 1]], skip=1)
    assert skipped.num_answers == 6
    assert skipped.transitions.sum() == 4


def test_answers_that_never_vary_are_flagged_and_give_no_nan():
    got = randomness_report([[1] * 20, [1] * 20])
    assert got["uniformity"].p_value < 1e-9
    for name in ("independence", "memory of two answers", "negative recency"):
        assert got[name].undefined == "all answers are the same"
        assert got[name].p_value == 1.0
    assert (got.switch_rate, got.runs_z, got["independence"].statistic) == (0.0, 0.0, 0.0)
    apart = randomness_report([[1] * 5, [0] * 5])
    assert apart["negative recency"].undefined == "no list leaves the number of switches open"
    assert all(math.isfinite(t.statistic) and 0 <= t.p_value <= 1 for t in apart.tests)


# ---------------------------------------------------------------------------------------------------------- run lengths
def by_length(row) -> list[int]:
    counts = [0] * len(row)
    for _, run in itertools.groupby(row):
        counts[len(list(run)) - 1] += 1
    return counts


@pytest.mark.parametrize("row", [[0, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0], [1, 0]])
def test_expected_runs_are_the_mean_over_all_orders(row):
    got = run_lengths([row])
    assert got.lengths.tolist() == list(range(1, len(row) + 1))
    assert got.observed.tolist() == by_length(row)
    every = [by_length(order) for order in set(itertools.permutations(row))]
    assert got.expected.tolist() == pytest.approx(np.mean(every, axis=0))


def test_runs_do_not_cross_lists():
    lists = [[1, 1, 0, 1], [1, 0, 0], [0, 0]]
    got = run_lengths(lists)
    wanted = np.zeros(4)
    for row in lists:
        wanted += by_length(row) + [0] * (4 - len(row))
    assert got.observed.tolist() == wanted.tolist()
    assert got.expected.sum().item() == pytest.approx(sum(run_lengths([row]).expected.sum().item() for row in lists))
    assert (got.lengths * got.observed).sum() == 9
    assert (got.lengths * got.expected).sum().item() == pytest.approx(9)
    assert run_lengths(lists[:2], skip=1).observed.sum() == 4


# ---------------------------------------------------------------------------------------------------------------- power
def test_power_is_the_level_without_dependence_and_grows():
    none = randomness_power([100], 0.5, repeats=250, seed=1)
    assert none["independence"] == pytest.approx(0.05, abs=0.045)
    assert none["negative recency"] <= 0.085
    few = randomness_power([20] * 5, repeats=60)
    many = randomness_power([20] * 40, repeats=30)
    assert 0.2 < few["independence"] < 0.75  # a short look misses what people do about half of the time
    assert many["negative recency"] > 0.95
    sticky = randomness_power([200], 0.3, repeats=40)
    assert sticky["independence"] == 1.0
    assert sticky["negative recency"] == 0.0


# ------------------------------------------------------------------------------------------------------------- refusals
REFUSED = [
    (lambda: run_lengths([]), "there are no answers"),
    (lambda: run_lengths([[0, 1]], skip=-1), "skip must be at least 0"),
    (lambda: run_lengths([[0, 1], [0.5, 1]]), "list 1: answers must be 0 or 1"),
    (lambda: randomness_power([]), "power needs at least one list"),
    (lambda: randomness_power([5, 1]), "of two answers or more"),
    (lambda: randomness_power([5], 1.5), "switch_rate and level must lie between 0 and 1"),
    (lambda: randomness_power([5], level=0.0), "switch_rate and level must lie"),
    (lambda: randomness_report([]), "there are no answers"),
    (lambda: randomness_report([[0, 1], [2, 1]]), "list 1: answers must be 0 or 1"),
    (lambda: randomness_report([[0, 1], [1]]), "list 1: has 1 answers, too few with skip=0"),
    (lambda: randomness_report([[0, 1]], skip=1), "list 0: has 2 answers, too few with skip=1"),
    (lambda: randomness_report([[0, 1]], skip=-1), "skip must be at least 0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_lists_of_answers_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
