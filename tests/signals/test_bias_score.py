"""Group gaps against hand tables, scipy's permutation test and floors; randomness tests on coin flips and others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.signals.bias import binary_probability, gold_log_odds, randomness_report, template_bias
from loglik.signals.choice import choose


def exact(values) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(len(value)))


# -------------------------------------------------------------------------------------------------------- template bias
def test_log_odds_of_the_right_option():
    choices = choose(exact([-1.0, -2.0, -3.0, -0.5, -1.5]), [0, 0, 0, 1, 1])
    got = gold_log_odds(choices, torch.tensor([1, 1]))
    assert got[0].item() == pytest.approx(-2.0 - np.logaddexp(-1.0, -3.0))
    assert got[1].item() == pytest.approx(-1.0)  # of two options: the difference
    torch.testing.assert_close(got.sigmoid(), choices.log_probs[torch.arange(2), torch.tensor([1, 1])].exp())


def by_accuracy(rates: list[list[float]], names: int = 10) -> torch.Tensor:
    """(T, G * names) of 0 and 1 with these rates."""
    rows = [[float(n < round(rate * names)) for rate in row for n in range(names)] for row in rates]
    return torch.tensor(rows)


def test_the_hand_table_with_and_without_the_zero_rule():
    values = by_accuracy([[1, 0.9, 0.8], [0.5, 0.5, 0.5], [0.7, 0, 0.9]])
    groups = [g for g in "abc" for _ in range(10)]
    on = template_bias(values, groups, statistic="accuracy", permutations=20)
    assert on.score == pytest.approx(0.1)
    assert on.dropped == {"a group is never right": [2]}
    assert on.kept.tolist() == [True, True, False]
    torch.testing.assert_close(on.means[0], torch.tensor([1, 0.9, 0.8]).double())
    torch.testing.assert_close(on.deviation, torch.tensor([0.05, 0.0, -0.05]).double())
    off = template_bias(values, groups, statistic="accuracy", drop_zero=False, permutations=20)
    assert off.score == pytest.approx(1.1 / 3)
    assert off.dropped == {}
    assert off.gaps.tolist() == pytest.approx([0.2, 0.0, 0.9])


def test_a_source_that_loses_most_of_its_templates_goes_as_a_whole():
    values = by_accuracy([[0, 1]] * 4 + [[0.5, 0.7]] + [[0.9, 1.0]] * 2)
    sources = ["first"] * 5 + ["second"] * 2
    got = template_bias(values, ["a"] * 10 + ["b"] * 10, statistic="accuracy", sources=sources, permutations=20)
    assert got.dropped == {"a group is never right": [0, 1, 2, 3], "its source loses 80 %": [4]}
    assert got.score == pytest.approx(0.1)
    alone = template_bias(values, ["a"] * 10 + ["b"] * 10, statistic="accuracy", permutations=20)
    assert alone.score == pytest.approx((0.2 + 0.1 + 0.1) / 3)


def test_names_and_groups_may_be_renamed_and_moved():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 12, generator=generator)
    groups = np.repeat(["a", "b", "c"], 4)
    score = template_bias(values, list(groups), permutations=20).score
    order = torch.randperm(12, generator=generator)
    assert template_bias(values[:, order], list(groups[order.numpy()]), permutations=20).score == pytest.approx(score)
    renamed = [{"a": 3, "b": 1, "c": 2}[g] for g in groups]
    assert template_bias(values, renamed, permutations=20).score == pytest.approx(score)
    same = template_bias(values[:, :1].expand(6, 12), list(groups), permutations=20)
    assert same.score == pytest.approx(0, abs=1e-6)
    assert same.p_value == 1.0


def test_exact_permutations_are_scipys():
    """All 20 splits of 2 x 3 names."""
    values = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = template_bias(values, list("aaabbb"), permutations=999)
    assert got.exact
    wanted = scipy.stats.permutation_test(
        (values[0, :3].numpy(), values[0, 3:].numpy()),
        lambda x, y, axis: np.abs(x.mean(axis) - y.mean(axis)),
        permutation_type="independent",
        n_resamples=np.inf,
        vectorized=True,
        alternative="greater",
    )
    assert got.p_value == pytest.approx(wanted.pvalue)
    assert got.floor == pytest.approx(wanted.null_distribution.mean())
    assert got.score == pytest.approx(abs(values[0, :3].mean() - values[0, 3:].mean()).item())


def test_one_permutation_of_names_serves_all_templates():
    """Names that are good everywhere: permuting cells would call this significant almost always."""
    hits = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        name = torch.randn(1, 20, generator=generator)
        values = name + 0.1 * torch.randn(30, 20, generator=generator)
        hits += template_bias(values, ["a"] * 10 + ["b"] * 10, permutations=99, resamples=10).p_value <= 0.1
    assert hits <= 10  # binomial(40, 0.1): above 10 with probability 0.001


def test_p_values_are_uniform_without_bias():
    p_values = []
    for seed in range(200):
        values = torch.randn(3, 12, generator=torch.Generator().manual_seed(1000 + seed))
        p_values.append(template_bias(values, list("aaaabbbbcccc"), permutations=99, resamples=2, seed=seed).p_value)
    # p takes the values 1/100 ... 1: spread each evenly over its step
    spread = np.array(p_values) - np.random.default_rng(0).random(200) / 100
    assert scipy.stats.kstest(spread, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("groups", "rate", "wanted"), [(3, 0.5, 12.0), (4, 0.5, 14.5), (3, 0.8, 9.5), (4, 0.8, 11.6), (3, 0.95, 5.1)]
)
def test_the_floor_is_what_independent_names_give(groups, rate, wanted):
    """50 names a group: mean range of binomial rates, in points; here from their distribution, not from draws."""
    cdf = scipy.stats.binom.cdf(np.arange(51), 50, rate)
    largest = 50 - (cdf**groups)[:-1].sum()
    smallest = ((1 - cdf) ** groups)[:-1].sum()
    assert 2 * (largest - smallest) == pytest.approx(wanted, abs=0.1)
    values = (torch.rand(400, 50 * groups, generator=torch.Generator().manual_seed(0)) < rate).float()
    names = [g for g in range(groups) for _ in range(50)]
    got = template_bias(values, names, statistic="accuracy", permutations=20, resamples=200)
    assert 100 * got.floor == pytest.approx(wanted, abs=0.5)
    assert got.interval[0] < got.score < got.interval[1]
    assert got.score < got.null_upper + 0.02


def test_a_planted_bias_is_found():
    shift = torch.tensor([0.6, 0.0, -0.6]).repeat_interleave(10)
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) + shift
    got = template_bias(values, [g for g in "abc" for _ in range(10)], permutations=199)
    assert got.p_value == pytest.approx(1 / 200)
    assert got.deviation.tolist() == pytest.approx([0.6, 0, -0.6], abs=0.15)
    assert got.interval[0] > got.null_upper > got.floor > 0


# --------------------------------------------------------------------------------------------------- binary probability
class Table:
    """Next-token log-probabilities that do not depend on the prefix."""

    def __init__(self, rows) -> None:
        self.rows = torch.as_tensor(rows, dtype=torch.float64).log_softmax(-1)

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        return self.rows[: len(prefix)]


PREFIX = TokenBatch.from_lists([[0], [0]])


def test_binary_probability_sums_over_forms():
    p = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0.05, 0.05, 0.8, 0.1]])
    got = binary_probability(Table(p.log()), PREFIX, yes=[0, 1, 1], no=[2])
    torch.testing.assert_close(got.probability, torch.tensor([0.5, 1 / 9]).double())
    torch.testing.assert_close(got.coverage, torch.tensor([0.6, 0.9]).double())
    torch.testing.assert_close(got.logit, (got.probability / (1 - got.probability)).log())
    wanted = [scipy.stats.entropy([q, 1 - q], [0.5, 0.5]) for q in got.probability.tolist()]
    torch.testing.assert_close(got.divergence, torch.tensor(wanted).double())


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 8.0])
def test_the_logit_times_the_temperature_is_constant_for_two_tokens(temperature):
    model = Table(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    cold, one = (binary_probability(model, PREFIX, [1], [3], temperature=t) for t in (temperature, 1.0))
    torch.testing.assert_close(cold.logit * temperature, one.logit, atol=1e-6, rtol=0)


def test_certain_answers_have_no_nan():
    got = binary_probability(Table([[0.0, -math.inf, 0.0]]), PREFIX, [0], [1])
    assert got.probability.tolist() == [1.0]
    assert got.divergence.item() == pytest.approx(math.log(2))


# ----------------------------------------------------------------------------------------------------------- randomness
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


# ------------------------------------------------------------------------------------------------------------- refusals
TWO = ["a", "b"]
CHOICES = choose(exact([-1.0, -2.0]), [0, 0])
REFUSED = [
    (lambda: gold_log_odds(CHOICES, torch.tensor([0, 1])), "gold must be 1 whole numbers"),
    (lambda: gold_log_odds(CHOICES, torch.tensor([2])), "question 0: has 2 options, and gold is 2"),
    (lambda: gold_log_odds(choose(exact([-1.0, -math.inf]), [0, 0]), torch.tensor([0])), "question 0: .* infinite"),
    (lambda: template_bias(torch.zeros(1, 2), TWO, statistic="mean"), "statistic must be log_odds, accuracy or"),
    (lambda: template_bias(torch.zeros(1, 3), TWO), r"got \(1, 3\) and 2 groups"),
    (lambda: template_bias(torch.zeros(0, 2), TWO), "need a group for each name"),
    (lambda: template_bias(torch.zeros(1, 3), list("aab")), "at least two groups, of equal size: got {'a': 2, 'b': 1}"),
    (lambda: template_bias(torch.zeros(1, 2), list("aa")), "at least two groups"),
    (lambda: template_bias(torch.zeros(1, 2), TWO, level=1.0), "level must lie between 0 and 1, got 1.0"),
    (lambda: template_bias(torch.zeros(1, 2), TWO, permutations=0), "resamples and permutations must be at least 1"),
    (
        lambda: template_bias(torch.tensor([[0.0, math.nan]]), TWO),
        "template 0: the value of name 1 is nan, no log_odds",
    ),
    (lambda: template_bias(torch.tensor([[0.0, 0.5]]), TWO, statistic="accuracy"), "name 1 is 0.5, no accuracy"),
    (lambda: template_bias(torch.tensor([[0.0, 1.5]]), TWO, statistic="probability"), "name 1 is 1.5, no probability"),
    (lambda: template_bias(torch.zeros(1, 2), TWO, statistic="accuracy"), "every template has a group that is never"),
    (lambda: template_bias(torch.zeros(1, 2), TWO, sources=["x", "y"]), "an entry per template: got 2 for 1"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [0]), "none in common"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [], [0]), "at least one token each"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [2]), "token 2 is not in the vocabulary of 2"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [1], temperature=0), "temperature must be positive"),
    (
        lambda: binary_probability(Table([[0.0, -math.inf, -math.inf]]), PREFIX, [1], [2]),
        "prompt 0: gives neither answer a probability",
    ),
    (lambda: binary_probability(object(), PREFIX, [0], [1]), "binary probability needs per-token conditionals"),
    (lambda: randomness_report([]), "there are no answers"),
    (lambda: randomness_report([[0, 1], [2, 1]]), "list 1: answers must be 0 or 1"),
    (lambda: randomness_report([[0, 1], [1]]), "list 1: has 1 answers, too few with skip=0"),
    (lambda: randomness_report([[0, 1]], skip=1), "list 0: has 2 answers, too few with skip=1"),
    (lambda: randomness_report([[0, 1]], skip=-1), "skip must be at least 0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
