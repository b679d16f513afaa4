"""Order tests against all permutations, scipy, plain loops and simulated null distributions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from loglik.errors import InputError, LoglikError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals import provenance
from loglik.signals.provenance import partition_counts, partition_test, query_test, reshuffle_test


def likelihood(values: list[float] | np.ndarray | Tensor, units: list[int] | int = 1) -> LogLikelihood:
    value = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    count = torch.as_tensor(units).expand(len(value))
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, count)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------- query
def test_every_order_of_five_examples():
    """All 120 orders: the p-values are the ranks of the statistics, and P(p <= u) <= u with equality without ties."""
    values = likelihood([0.3, -1.0, 2.0, 0.9, -4.0])
    found = [query_test(values, order, method="exact") for order in itertools.permutations(range(5))]
    statistics = np.array([test.statistic for test in found]).round(9)
    for test, statistic in zip(found, statistics, strict=True):
        assert test.p_value == pytest.approx((statistics >= statistic).mean())
        assert (test.method, test.orders, test.n) == ("exact", 120, 5)
    p = np.array([test.p_value for test in found])
    for u in np.unique(p):
        assert (p <= u).mean() == pytest.approx(u)  # tied statistics have the same p-value: the levels that exist


def test_ties_keep_the_size():
    values = likelihood([1.0, 1.0, 0.0, 2.0, 1.0])
    p = np.array([query_test(values, order, method="exact").p_value for order in itertools.permutations(range(5))])
    for u in np.linspace(0, 1, 241):
        assert (p <= u + 1e-12).mean() <= u + 1e-9


@pytest.mark.parametrize("n", [3, 5, 6])
def test_exact_p_value_is_that_of_scipy(n):
    generator = random(n)
    values, order = generator.integers(0, 4, n) * 0.5, generator.permutation(n)
    values[0], values[1] = 5.0, -5.0  # not all alike
    found = query_test(likelihood(values), order, method="exact")
    want = stats.permutation_test(
        (values,),
        lambda x: stats.spearmanr(x, order).statistic,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    )
    assert found.statistic == pytest.approx(want.statistic)
    assert found.p_value == pytest.approx(want.pvalue)
    assert query_test(likelihood(values), order) == found  # few orders: auto takes them all


@pytest.mark.parametrize("seed", range(4))
def test_statistic_and_student_are_those_of_scipy(seed):
    generator = random(seed)
    order = generator.permutation(200)
    values = generator.normal(size=200).round(1) + 0.002 * order * (seed - 1)
    found = query_test(likelihood(values), order, method="asymptotic")
    want = stats.spearmanr(values, order, alternative="greater")
    assert found.statistic == pytest.approx(want.statistic)
    assert found.p_value == pytest.approx(want.pvalue, rel=1e-9)
    assert (found.method, found.orders) == ("asymptotic", 0)


def test_steps_of_a_batch_have_their_mean_rank():
    generator = random(5)
    order = np.repeat(np.arange(25), 4)
    values = generator.normal(size=100)
    found = query_test(likelihood(values), order, repeated="average", method="asymptotic")
    want = stats.spearmanr(values, order, alternative="greater")
    assert (found.statistic, found.p_value) == pytest.approx((want.statistic, want.pvalue))


def test_random_orders_come_near_all_of_them():
    values, order = likelihood(random(1).normal(size=7)), [3, 0, 6, 1, 5, 2, 4]
    exact = query_test(values, order, method="exact").p_value
    found = query_test(values, order, method="monte_carlo", permutations=20_000, seed=1)
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
    assert (found.method, found.orders) == ("monte_carlo", 20_000)
    assert query_test(values, order, method="monte_carlo", permutations=20_000, seed=1) == found


def test_random_orders_count_the_observed_one():
    rising = likelihood(np.arange(30.0))
    found = query_test(rising, np.arange(30), permutations=99)
    assert found.statistic == pytest.approx(1.0)
    assert found.p_value == 1 / 100
    assert query_test(rising, np.arange(30), method="asymptotic").p_value == pytest.approx(
        1 / math.factorial(30), rel=1e-9
    )
    assert query_test(rising, -np.arange(30), permutations=99).p_value == 1.0


def test_blocks_change_nothing(monkeypatch):
    values, order = likelihood(random(1).normal(size=7)), [3, 0, 6, 1, 5, 2, 4]
    exact = query_test(values, order, method="exact")
    monkeypatch.setattr(provenance, "_BLOCK", 100)
    assert query_test(values, order, method="exact") == exact
    found = query_test(values, order, method="monte_carlo", permutations=501)
    assert found.orders == 501
    assert 0 < found.p_value < 1


@pytest.mark.parametrize("method", ["exact", "monte_carlo", "asymptotic"])
def test_invariances(method):
    generator = random(2)
    values, order = generator.normal(size=7), generator.permutation(7)
    options = {"method": method, "permutations": 199}
    found = query_test(likelihood(values), order, **options)
    assert query_test(likelihood(np.exp(values)), order, **options) == found
    assert query_test(likelihood(values), 10.0 * order**3 - 5, **options) == found
    assert query_test(likelihood(values), torch.as_tensor(order), **options) == found
    back = query_test(likelihood(values), -order, **options)
    assert back.statistic == pytest.approx(-found.statistic)
    again = generator.permutation(7)  # rows may stand in any order
    moved = query_test(likelihood(values[again]), order[again], **options)
    assert moved.statistic == pytest.approx(found.statistic)
    if method != "monte_carlo":
        assert moved.p_value == pytest.approx(found.p_value)


def test_reference_takes_the_difficulty_out():
    generator = random(3)
    order = generator.permutation(100)
    hard = 1000 * generator.normal(size=100)
    plain = query_test(likelihood(hard + 0.01 * order), order)
    found = query_test(likelihood(hard + 0.01 * order), order, reference=likelihood(hard))
    assert found.statistic == pytest.approx(1.0)
    assert found.p_value == 1 / 10_000
    assert abs(plain.statistic) < 0.3


def test_per_token_or_per_sequence():
    units = [1, 2, 4, 5, 10]
    sums = likelihood([-1.0, -6.0, -8.0, -20.0, -50.0], units)  # per token -1, -3, -2, -4, -5
    assert query_test(sums, range(5)).statistic == pytest.approx(stats.spearmanr([-1, -3, -2, -4, -5], range(5))[0])
    assert query_test(sums, range(5), per="sequence").statistic == -1.0
    other = likelihood([-2.0, -3.0, -8.0, -9.0, -20.0], [2, 1, 2, 3, 4])  # its own tokens: -1, -3, -4, -3, -5
    found = query_test(sums, range(5), reference=other)
    assert found.statistic == pytest.approx(stats.spearmanr([0, 0, 2, -1, 0], range(5))[0])


def test_p_values_are_uniform_under_the_null():
    """500 models that know nothing of the order; Kolmogorov-Smirnov at 0.01. A p-value is spread over its step."""
    generator = random(11)
    found, student = [], []
    for seed in range(500):
        values, order = likelihood(generator.normal(size=40)), generator.permutation(40)
        p = query_test(values, order, permutations=199, seed=seed).p_value
        found.append(p - generator.random() / 200)
        student.append(query_test(values, order, method="asymptotic").p_value)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert stats.kstest(student, "uniform").pvalue > 0.01


def test_strata_are_permuted_within():
    """Two stages, later data easier in both: the order within a stage is what may vary."""
    values = [0.0, 2.0, 1.0, 10.0, 12.0, 11.0]
    order, stage = [0, 1, 2, 3, 4, 5], ["a", "a", "a", "b", "b", "b"]
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = query_test(likelihood(values), order, strata=labels, method="exact")
    rank = stats.rankdata(values)
    every = [
        np.dot([*rank[list(a)], *rank[list(b)]], order)
        for a in itertools.permutations(range(3))
        for b in itertools.permutations(range(3, 6))
    ]
    assert found.orders == 36
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= np.dot(rank, order) - 1e-9))
    assert found.p_value > query_test(likelihood(values), order, method="exact").p_value
    assert query_test(likelihood(values), order, strata=np.array(stage)).p_value == found.p_value


def test_strata_keep_the_size_where_a_curriculum_breaks_it():
    """Easy data first, no memory at all: permuting everything rejects, permuting within stages does not."""
    generator = random(4)
    stage = np.repeat([0, 1], 20)
    p, wrong = [], []
    for seed in range(200):
        values = likelihood(generator.normal(size=40) + 2 * stage)
        order = np.concatenate([generator.permutation(20), 20 + generator.permutation(20)])
        p.append(query_test(values, order, strata=stage, permutations=99, seed=seed).p_value - generator.random() / 100)
        wrong.append(query_test(values, order, method="asymptotic").p_value)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(wrong) < 0.05) > 0.9


# ---------------------------------------------------------------------- partition
def naive_counts(transcript: list[list[int]], texts: list[list[int]], max_n: int) -> list[int]:
    """Every position, every length, every occurrence, one after another."""
    counts = [0] * len(transcript)
    for text in texts:
        for start in range(len(text)):
            for n in range(min(max_n, len(text) - start), 0, -1):
                gram = text[start : start + n]
                hits = Counter(
                    number
                    for number, document in enumerate(transcript)
                    for place in range(len(document) - n + 1)
                    if document[place : place + n] == gram
                )
                if hits:
                    for number, count in hits.items():
                        counts[number] += count
                    break
    return counts


@pytest.mark.parametrize("max_n", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_a_plain_search(seed, max_n):
    generator = random(seed)
    transcript = [generator.integers(0, 3, size).tolist() for size in generator.integers(0, 12, 9)]
    texts = [generator.integers(0, 4, size).tolist() for size in generator.integers(0, 15, 4)] + [[0, 1, 2]]
    found = partition_counts(transcript, texts, max_n=max_n, order=range(9))
    assert found.tolist() == naive_counts(transcript, texts, max_n)
    assert found.dtype == torch.long


def test_counts_of_unknown_tokens_are_none():
    assert partition_counts([[1, 2], [3]], [[7, 8, 9]]).tolist() == [0, 0]


def test_the_longest_match_counts_and_no_other():
    transcript = [[1, 2, 3], [1, 2], [2]]
    assert partition_counts(transcript, [[1, 2, 3]]).tolist() == [3, 0 + 0, 0]
    # 1 2 3 once in the first; 2 3 once there; 3 once there. With bigrams at most, 1 2 stands in two documents.
    assert partition_counts(transcript, [[1, 2, 3]], max_n=2).tolist() == [1 + 1 + 1, 1, 0]


def test_partition_statistic_is_spearman_of_the_buckets():
    generator = random(0)
    counts = generator.poisson(3, 23)
    for buckets in (None, 3, 5, 23):
        found = partition_test(counts, buckets=buckets, permutations=19)
        k = buckets or 23
        sums = [counts[23 * b // k : 23 * (b + 1) // k].sum() for b in range(k)]
        assert found.statistic == pytest.approx(stats.spearmanr(range(k), sums).statistic)
        assert found.n == k


def test_partition_compares_all_orders_of_documents():
    counts = np.array([0, 1, 0, 2, 5, 3])
    found = partition_test(counts, buckets=3, method="exact")
    every = [
        stats.spearmanr(range(3), [sum(order[:2]), sum(order[2:4]), sum(order[4:])]).statistic
        for order in itertools.permutations(counts.tolist())
        if len({sum(order[:2]), sum(order[2:4]), sum(order[4:])}) > 1
    ]
    at_least = sum(value >= found.statistic - 1e-9 for value in every)
    assert found.orders == 720
    assert found.p_value == pytest.approx(at_least / 720)


def test_partition_p_values_are_uniform_under_the_null():
    """500 texts that know nothing of the order. Ties among a few buckets make p conservative, never small."""
    generator = random(7)
    p = []
    for seed in range(500):
        counts = generator.gamma(2.0, size=60)
        p.append(partition_test(counts, buckets=20, permutations=199, seed=seed).p_value - generator.random() / 200)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for u in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p) <= u) <= u + 3 * math.sqrt(u * (1 - u) / 500)


def test_later_documents_that_are_quoted_are_found():
    generator = random(8)
    transcript = [generator.integers(0, 50, 20).tolist() for _ in range(200)]
    chance = np.arange(200) / np.arange(200).sum()
    texts = [transcript[i][3:12] for i in generator.choice(200, size=150, p=chance)]
    counts = partition_counts(transcript, texts, order=range(200))
    assert partition_test(counts, buckets=20).p_value < 0.01
    assert partition_test(counts.flip(0), buckets=20).p_value > 0.9


# ---------------------------------------------------------------------- reshuffle
def runs(values: list[float] | np.ndarray, rows: int = 3) -> list[LogLikelihood]:
    """Runs whose mean log-likelihoods are these."""
    spread = np.linspace(-1, 1, rows)
    return [likelihood(value + spread, 5) for value in values]


def test_reshuffle_closed_form():
    others = np.array([-10.0, -11.0, -12.0, -11.5])
    found = reshuffle_test(runs([-9.0])[0], runs(others))
    z = (-9.0 - others.mean()) / others.std()
    t = z * math.sqrt(3 / 5)
    assert found.statistic == pytest.approx(z)
    assert (found.p_value, found.n) == (1 / 5, 4)
    assert found.p_student == pytest.approx(stats.t.sf(t, 3))
    assert found.p_normal == pytest.approx(stats.norm.sf(z))
    middle = reshuffle_test(runs([-11.0])[0], runs(others))
    assert middle.p_value == 3 / 5  # -10 is above, -11 is equal


def test_student_is_the_prediction_interval():
    """One new draw against K: the textbook statistic with the sample deviation."""
    others = random(1).normal(size=8)
    found = reshuffle_test(runs([0.7])[0], runs(others))
    textbook = (0.7 - others.mean()) / (others.std(ddof=1) * math.sqrt(1 + 1 / 8))
    assert found.p_student == pytest.approx(stats.t.sf(textbook, 7))


@pytest.mark.parametrize(("k", "tail"), [(9, 0.0139), (100, 0.0018)])
def test_tail_of_three_deviations(k, tail):
    """What the normal tail, 0.00135, would hide."""
    assert stats.t.sf(3 * math.sqrt((k - 1) / (k + 1)), k - 1) == pytest.approx(tail, abs=2e-4)
    draws = random(k).normal(size=(40_000, k + 1))
    z = (draws[:, 0] - draws[:, 1:].mean(1)) / draws[:, 1:].std(1)
    assert (z > 3).mean() == pytest.approx(tail, abs=4 * math.sqrt(tail / 40_000))


def test_reshuffle_p_values_are_uniform_under_the_null():
    generator = random(9)
    student, rank = [], []
    for _ in range(500):
        first, *others = runs(generator.normal(size=20), rows=2)
        found = reshuffle_test(first, others)
        student.append(found.p_student)
        rank.append(found.p_value - generator.random() / 20)
    assert stats.kstest(student, "uniform").pvalue > 0.01
    assert stats.kstest(rank, "uniform").pvalue > 0.01


# ---------------------------------------------------------------------- refusals
FIVE = likelihood(np.arange(5.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: query_test(FIVE, [0, 1, 1, 2, 3]), "row 1 and row 2 have the same training order 1: keep"),
        (lambda: query_test(FIVE, range(4)), "5 examples need as many training orders, got 4"),
        (lambda: query_test(FIVE, [[0, 1, 2, 3, 4]]), "each example needs one training order"),
        (lambda: query_test(FIVE, list("abcde")), "each example needs one training order"),
        (lambda: query_test(FIVE, [0, 1, 2, 3, math.nan]), "row 4: its training order is nan"),
        (
            lambda: query_test(FIVE, range(5), reference=likelihood([0.0])),
            "5 rows need as many of the reference, got 1",
        ),
        (lambda: query_test(likelihood([1.0] * 5), range(5)), "all log-likelihoods are equal"),
        (lambda: query_test(FIVE, range(5), reference=FIVE), "all log-likelihoods are equal"),
        (lambda: query_test(FIVE, [2] * 5, repeated="average"), "all training orders are equal"),
        (lambda: query_test(likelihood([0.0, 1.0]), [0, 1]), "at least 3 examples, got 2"),
        (lambda: query_test(likelihood([0.0, -math.inf, 1]), range(3)), "row 1: .* under the model is -inf"),
        (
            lambda: query_test(FIVE, range(5), reference=likelihood([math.nan] * 5)),
            "row 0: .* under the reference is nan",
        ),
        (lambda: query_test(likelihood([0.0, 1, 2], [1, 0, 1]), range(3)), "row 1: has no scored token"),
        (lambda: query_test(FIVE, range(5), per="byte"), "per must be one of token, sequence"),
        (lambda: query_test(FIVE, range(5), method="permutation"), "method must be one of"),
        (lambda: query_test(FIVE, range(5), repeated="keep"), "repeated must be one of"),
        (
            lambda: query_test(FIVE, range(5), method="monte_carlo", permutations=0),
            "permutations must be a whole number",
        ),
        (lambda: query_test(FIVE, range(5), method="monte_carlo", permutations=9.5), "permutations must be"),
        (lambda: query_test(likelihood(np.arange(20.0)), range(20), method="exact"), "too many orders"),
        (lambda: query_test(FIVE, range(5), strata=[0, 0, 1]), "5 examples need as many strata"),
        (lambda: query_test(FIVE, range(5), strata=[0, 0, 1, 1, 1], method="asymptotic"), "knows no strata"),
        (lambda: partition_counts([], [[1]]), "need a transcript"),
        (lambda: partition_counts([[1]], []), "need a transcript"),
        (lambda: partition_counts([[1]], [[]]), "need a transcript"),
        (lambda: partition_counts([[1]], [[1]], max_n=0), "at least 1 token"),
        (
            lambda: partition_counts([[1], [2], [3]], [[1]], order=[0, 5, 3]),
            r"row 2 \(training order 3\) stands behind one of 5: sort",
        ),
        (lambda: partition_counts([[1], [2]], [[1]], order=[1, 1]), r"row 1 \(training order 1\) stands behind"),
        (lambda: partition_counts([[1], [2]], [[1]], order=[1]), "2 examples need as many training orders, got 1"),
        (lambda: partition_test([1, 2, 3], buckets=2), "buckets must be from 3 to the 3 entries"),
        (lambda: partition_test([1, 2, 3], buckets=4), "buckets must be from 3 to the 3 entries"),
        (lambda: partition_test([1, 2]), "buckets must be from 3"),
        (lambda: partition_test([4, 4, 4, 4]), "all counts of the buckets are equal"),
        (lambda: partition_test([1, math.nan, 3]), "row 1: its count is nan"),
        (lambda: reshuffle_test(FIVE, []), "two or more runs in random orders"),
        (lambda: reshuffle_test(FIVE, [FIVE]), "two or more runs in random orders"),
        (lambda: reshuffle_test(FIVE, FIVE), "two or more runs in random orders"),
        (lambda: reshuffle_test(FIVE, [FIVE, likelihood([0.0])]), "run 1 scored other texts"),
        (lambda: reshuffle_test(FIVE, [FIVE, likelihood(np.arange(5.0), 2)]), "run 1 scored other texts"),
        (lambda: reshuffle_test(FIVE, [FIVE, FIVE]), "all random orders give the same likelihood"),
        (lambda: reshuffle_test(likelihood([-math.inf]), runs([0, 1], rows=1)), "other texts|the true order is -inf"),
        (
            lambda: reshuffle_test(likelihood([-math.inf]), [likelihood([1.0]), likelihood([2.0])]),
            "row 0: .* under the true order is -inf",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(LoglikError, match=says) as caught:
        call()
    assert isinstance(caught.value, InputError | RowError)
    assert "\n" not in str(caught.value)
