"""Group gaps against hand tables, scipy's permutation test and floors; consistency by counting pairs."""

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
from loglik.signals.choice import choose
from loglik.signals.template_bias import gold_log_odds, template_bias, template_consistency, template_table


def exact(values) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(len(value)))


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


# -------------------------------------------------------------------------------------------------- table, consistency
def test_rows_in_any_order_make_the_table():
    rows = [(t, n, g) for t in ("likes", "hates") for n, g in (("Ann", "f"), ("Bob", "m"), ("Eve", "f"), ("Tom", "m"))]
    values = torch.arange(8.0)
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    got = template_table(*zip(*[rows[i] for i in order], strict=True))
    assert got.templates == ("likes", "hates")
    assert got.names == ("Tom", "Ann", "Bob", "Eve")
    assert got.groups == ("m", "f", "m", "f")
    assert values[order][got.index].tolist() == [[3, 0, 1, 2], [7, 4, 5, 6]]


def test_consistency_counts_pairs_of_names():
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 3, (5, 7), generator=generator)
    groups = list("aabbbcc")
    got = template_consistency(answers, groups)
    for t in range(5):
        pairs = list(itertools.combinations(range(7), 2))
        kin = [groups[i] == groups[j] for i, j in pairs]
        same = np.array([int(answers[t, i] == answers[t, j]) for i, j in pairs])
        assert got.agreement[t].item() == pytest.approx(same.mean())
        assert got.within[t].item() == pytest.approx(same[kin].mean())
        assert got.between[t].item() == pytest.approx(same[np.logical_not(kin)].mean())
    by_group = template_consistency(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), list("aabb"))
    assert by_group.within.tolist() == [1, 1]
    assert by_group.between.tolist() == [0, 1]
    assert by_group.unanimous == 0.5
    assert template_consistency(torch.tensor([[0, 1]]), list("ab")).within is None


# ------------------------------------------------------------------------------------------------------------- refusals
TWO = ["a", "b"]
CHOICES = choose(exact([-1.0, -2.0]), [0, 0])
WHOLE = torch.zeros(1, 4, dtype=torch.long)
REFUSED = [
    (lambda: template_table([], [], []), "a row needs a template, a name and a group: got 0, 0 and 0"),
    (lambda: template_table(["t"], ["n"], ["g", "g"]), "got 1, 1 and 2 of them"),
    (lambda: template_table(["t", "u"], ["n", "n"], ["g", "h"]), "row 1: the name n is of group h here and of g above"),
    (
        lambda: template_table(["t", "t"], ["n", "n"], ["g", "g"]),
        "row 1: the template t is filled twice with the name n",
    ),
    (
        lambda: template_table(["t", "t", "u"], ["n", "m", "n"], list("ggg")),
        "row 2: the template u is not filled with the name m",
    ),
    (lambda: template_consistency(WHOLE.double(), list("aabb")), "must be whole numbers"),
    (lambda: template_consistency(WHOLE, list("aab")), r"got \(1, 4\) and 3 groups"),
    (lambda: template_consistency(WHOLE, list("aaaa")), "at least two groups"),
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
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_template_table_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
