"""Ranking of texts: both directions against plain scores, words by hand, intervals against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.signals.intervals import mean_intervals
from loglik.signals.reranking import (
    agreement,
    compare_rankers,
    score_pairs,
    score_segments,
    word_likelihood,
    word_tokens,
)
from loglik.signals.retrieval import retrieval_metrics

QUERIES = ["print(total)", "import"]
CANDIDATES = [["total = 3", "while True:"], ["os", "return", "sys"]]


# ------------------------------------------------------------------------------------------------------------- scoring
def test_both_directions_and_the_prior_are_plain_scores(tiny):
    found = score_pairs(tiny, QUERIES, CANDIDATES, separator=" | ", query_label="Q", candidate_label="C")
    flat = [(q, c) for q, texts in zip(QUERIES, CANDIDATES, strict=True) for c in texts]
    for got, pairs in (
        (found.candidate, [(f"Q{q} | C", c) for q, c in flat]),
        (found.query, [(f"C{c} | Q", q) for q, c in flat]),
        (found.prior, [(" | C", c) for _, c in flat]),
    ):
        torch.testing.assert_close(got.value, loglik.score(tiny, pairs).value, atol=1e-4, rtol=0)
    other = score_pairs(tiny, QUERIES, CANDIDATES, separator=" | ", query_label="Q", candidate_label="C", premise="#")
    torch.testing.assert_close(
        other.prior.value, loglik.score(tiny, [("#", c) for _, c in flat]).value, atol=1e-4, rtol=0
    )
    scores = found.scores(alpha=0.5, weight=0.25)
    assert list(scores) == ["query", "candidate", "candidate_prior", "bidirectional", "words"]
    own = found.candidate.mean_per_unit().value - 0.5 * found.prior.mean_per_unit().value
    torch.testing.assert_close(scores["candidate_prior"].value, own)
    mixed = 0.25 * found.query.mean_per_unit().value + 0.75 * own
    torch.testing.assert_close(scores["bidirectional"].value, mixed)
    assert [len(part) for part in found.by_query(mixed)] == [2, 3]
    assert torch.cat(found.by_query(mixed)).equal(mixed)
    # neither direction's weight of 0 or 1 lets the other in, and alpha 0 leaves the prior out
    ends = found.scores(alpha=0.0, weight=1.0, normalise="sum"), found.scores(alpha=0.0, weight=0.0, normalise="sum")
    assert ends[0]["bidirectional"].value.equal(found.query.value)
    assert ends[1]["bidirectional"].value.equal(found.candidate.value)
    assert ends[0]["candidate_prior"].value.equal(found.candidate.value)


def test_segments_are_read_in_their_places(tiny):
    document = ["a = 1", "b = 2"]
    found = score_segments(
        tiny, ["print(b)"], [document], separator="\n", joiner="; ", query_label="> ", segment_label="# "
    )

    def mean(*contexts):
        return loglik.score(tiny, [(f"# {c}\n> ", "print(b)") for c in contexts]).mean_per_unit().value

    torch.testing.assert_close(found["single"][0].value, mean("a = 1", "b = 2"), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["autoregressive"][0].value, mean("a = 1", "a = 1; b = 2"), atol=1e-4, rtol=0)
    whole, without_a, without_b = mean("a = 1; b = 2", "b = 2", "a = 1").tolist()
    assert found["leave_one_out"][0].value.tolist() == pytest.approx([whole - without_a, whole - without_b], abs=1e-4)
    assert found["words"][0].value[1] > found["words"][0].value[0]


def test_word_likelihood_by_hand():
    assert word_tokens("The cat_1, the DOG's 2 — é!") == ["the", "cat_1", "the", "dog", "s", "2", "é"]
    candidates = [["a a b", "b c"], ["b c", "d"]]  # the collection counts "b c" once: a 2, b 2, c 1, d 1
    found = word_likelihood(["A c", "?!"], candidates, mu=2.0)
    everywhere = {"a": 3 / 11, "b": 3 / 11, "c": 2 / 11, "d": 2 / 11}
    first = math.log((2 + 2 * everywhere["a"]) / 5) + math.log(2 * everywhere["c"] / 5)
    second = math.log(2 * everywhere["a"] / 4) + math.log((1 + 2 * everywhere["c"]) / 4)
    assert found[0].value.tolist() == pytest.approx([first, second])
    assert found[1].value.tolist() == [0.0, 0.0]  # a query without words
    assert word_likelihood(["a"], [["!", "?"]])[0].value.tolist() == [0.0, 0.0]  # a collection without words


# ---------------------------------------------------------------------------------------------------------- comparison
def test_agreement_by_hand():
    one = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])]
    other = [torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0]), torch.tensor([1.0, 1.0])]
    got = agreement({"one": one, "other": other})
    torch.testing.assert_close(got, torch.tensor([[1, 2 / 3], [2 / 3, 1]]).double())


def test_comparison_gives_the_means_and_paired_gains():
    generator = torch.Generator().manual_seed(0)
    targets = [torch.arange(5) == int(torch.randint(5, (), generator=generator)) for _ in range(40)]
    noise = [torch.randn(5, generator=generator) for _ in targets]
    good = [n + 1.5 * t for n, t in zip(noise, targets, strict=True)]
    metrics = {name: retrieval_metrics(s, targets, k=(1,)) for name, s in (("base", noise), ("good", good))}
    found = compare_rankers(metrics, seed=1)
    assert found["base"]["mrr"] == pytest.approx(metrics["base"].mrr)
    assert found["good"]["accuracy_at_1"] == pytest.approx(metrics["good"].accuracy[1])
    assert found["good"]["mrr_gain"] == pytest.approx(metrics["good"].mrr - metrics["base"].mrr)
    assert "mrr_gain" not in found["base"]
    values = torch.stack([m.reciprocal_rank for m in metrics.values()])
    wanted = mean_intervals(values, seed=1)
    got = found["good"]["mrr_gain_low"], found["good"]["mrr_gain_high"]
    assert got == pytest.approx(wanted.difference_interval[1].tolist())
    assert found["good"]["mrr_gain_low"] > 0
    alone = compare_rankers({"base": retrieval_metrics(noise[:1], targets[:1], k=(1,))})
    assert set(alone["base"]) == {"mrr", "accuracy_at_1", "recall_at_1", "ndcg_at_1"}


# ----------------------------------------------------------------------------------------------------------- intervals
def test_intervals_are_scipys():
    values = np.random.default_rng(0).exponential(size=60)
    got = mean_intervals(torch.from_numpy(values), resamples=20_000, level=0.9)
    peer = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert got.mean.item() == pytest.approx(values.mean())
    spread = values.std() / math.sqrt(60)
    assert got.interval[0, 0].item() == pytest.approx(peer.low, abs=0.05 * spread)
    assert got.interval[0, 1].item() == pytest.approx(peer.high, abs=0.05 * spread)


def test_pairing_takes_the_common_part_out():
    """A constant gain has an interval without width, whatever the rows are."""
    base = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = mean_intervals(torch.stack([base, base + 0.25]), resamples=200)
    torch.testing.assert_close(got.difference, torch.tensor([0.0, 0.25]).double())
    torch.testing.assert_close(got.difference_interval[1], torch.tensor([0.25, 0.25]).double())
    assert got.interval[0, 1] - got.interval[0, 0] > 0.3


def test_intervals_cover_the_mean():
    """Coverage of 400 normal samples of 50: from .90 to .98, more than 3 standard deviations about .94."""
    generator = torch.Generator().manual_seed(11)
    samples = torch.randn(400, 50, dtype=torch.float64, generator=generator)
    covered = 0
    for number, row in enumerate(samples):
        low, high = mean_intervals(row, resamples=400, seed=number).interval[0].tolist()
        covered += low <= 0 <= high
    assert 0.90 <= covered / 400 <= 0.98


# ------------------------------------------------------------------------------------------------------------ refusals
TWO = torch.zeros(2)
REFUSED = [
    (lambda: score_pairs(None, [], []), "must pair: got 0 and 0"),
    (lambda: score_pairs(None, ["q"], []), "queries and lists of candidates must pair"),
    (lambda: score_pairs(None, [" "], [["a"]]), "query 0: is empty"),
    (lambda: score_pairs(None, ["q", "r"], [["a"], []]), "query 1: has no candidates"),
    (lambda: score_pairs(None, ["q"], ["text"]), "query 0: has no candidates"),
    (lambda: score_pairs(None, ["q"], [["a", ""]]), "query 0: candidate 1 must be a text that is not empty"),
    (lambda: score_segments(None, ["q"], [[]]), "query 0: has no segments"),
    (lambda: word_likelihood(["q"], [[3]]), "query 0: candidate 0 must be a text"),
    (lambda: word_likelihood(["q"], [["a"]], mu=-1), "mu must be positive"),
    (lambda: agreement({}), "the same queries for each scorer"),
    (lambda: agreement({"a": [TWO], "b": []}), "the same queries for each scorer"),
    (lambda: agreement({"a": [torch.zeros(0)]}), "the same queries for each scorer"),
    (lambda: compare_rankers({}), "one or more scorers with the same queries"),
    (lambda: mean_intervals(torch.zeros(1)), "at least two rows, got 1"),
    (lambda: mean_intervals(TWO, level=1.0), "level must lie between 0 and 1, got 1.0"),
    (lambda: mean_intervals(TWO, resamples=0), "resamples must be at least 1, got 0"),
    (lambda: mean_intervals(torch.zeros(2, 2, 2)), "values must have shape"),
    (lambda: mean_intervals(torch.tensor([0.0, math.nan])), "row 1: the value of scorer 0 is nan"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError)) as refused:
        call()
    assert message in str(refused.value)


def test_a_pair_that_is_too_long_is_named(tiny):
    with pytest.raises(RowError, match="query 1, candidate 2"):
        score_pairs(tiny, ["a", "b"], [["c"], ["d", "e", "word " * 2000]])
    with pytest.raises(RowError, match="query 1: "):
        score_segments(tiny, ["a", "b"], [["c"], ["word " * 2000]])
