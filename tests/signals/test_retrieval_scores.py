"""Reranking against Bayes' rule on enumerated joints, unigram retrieval by hand, metrics against random ties."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import cosine_similarity

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.evidence import noisy_channel, normalise_answer, rag_marginal, retrieval_log_probs
from loglik.signals.retrieval import (
    backtracing_distance,
    backtracing_scores,
    bidirectional_score,
    query_likelihood,
    retrieval_metrics,
    unigram_likelihood,
)


def exact(values, units=None, *, kind=Kind.EXACT, **more) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    counts = torch.ones(len(value), dtype=torch.long) if units is None else torch.as_tensor(units)
    return LogLikelihood(value, kind, Unit.TOKEN, counts, **more)


def random_joint(*shape: int, seed: int = 0) -> torch.Tensor:
    table = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.3
    return table - table.logsumexp(tuple(range(len(shape))))


# ------------------------------------------------------------------------------------------------------ both directions
def directions(table: torch.Tensor):
    """log p(c|q), log p(q|c), log p(c) of each pair (q, c)."""
    candidate, query = table - table.logsumexp(1, keepdim=True), table - table.logsumexp(0)
    return exact(candidate.flatten()), exact(query.flatten()), exact(table.logsumexp(0).expand_as(table).flatten())


@pytest.mark.parametrize("seed", range(4))
def test_bidirectional_scores_on_a_joint(seed):
    table = random_joint(5, 4, seed=seed)
    candidate, query, prior = directions(table)
    both = bidirectional_score(candidate, query, prior=prior).value.reshape(5, 4)
    by_query = (table - table.logsumexp(0)).argmax(1)
    assert both.argmax(1).equal(by_query)  # with alpha = 1 both directions rank alike
    assert bidirectional_score(candidate, query, weight=1.0).value.equal(query.value)
    assert bidirectional_score(candidate, query, weight=0.0).value.equal(candidate.value)
    got = bidirectional_score(candidate, query, prior=prior, alpha=0.3, weight=0.25).value
    torch.testing.assert_close(got, 0.25 * query.value + 0.75 * (candidate.value - 0.3 * prior.value))


def test_each_direction_has_its_own_length():
    got = bidirectional_score(exact([-6.0], [3]), exact([-8.0], [2]), prior=exact([-3.0], [3]), alpha=0.5, weight=0.5)
    assert got.item() == pytest.approx(0.5 * -4 + 0.5 * (-2 - 0.5 * -1))
    sums = bidirectional_score(exact([-6.0], [3]), exact([-8.0], [2]), normalise="sum", weight=0.25)
    assert sums.item() == pytest.approx(0.25 * -8 + 0.75 * -6)
    assert bidirectional_score(exact([-1.0], kind=Kind.LOWER_BOUND), exact([-1.0])).kind is Kind.LOWER_BOUND


# ----------------------------------------------------------------------------------------------------- query likelihood
@pytest.fixture(scope="module")
def tiny():
    return loglik.load("tiny")


def test_query_likelihood_scores_the_query_alone(tiny):
    contexts = ["for x in items:", "import os", ""]
    got = query_likelihood(tiny, "    print(x)", contexts)
    wanted = loglik.score(tiny, [(c + "\n", "    print(x)") for c in contexts])
    assert got.value.equal(wanted.value)
    for t, context in enumerate(contexts):  # batched equals one by one
        alone = query_likelihood(tiny, "    print(x)", [context])
        torch.testing.assert_close(alone.value, got.value[t : t + 1], atol=1e-4, rtol=0)


def test_backtracing_contexts(tiny):
    """The three scores see the contexts that they are defined by."""
    segments = ["a = 1", "b = 2", "c = 3"]
    seen: list[list[str]] = []

    def likelihood(contexts):
        seen.append(list(contexts))
        return query_likelihood(tiny, "print(b)", contexts)

    single = backtracing_scores(likelihood, segments, how="single")
    running = backtracing_scores(likelihood, segments, how="autoregressive", joiner="; ")
    without = backtracing_scores(likelihood, segments, how="leave_one_out")
    whole = "a = 1 b = 2 c = 3"
    assert seen == [
        segments,
        ["a = 1", "a = 1; b = 2", "a = 1; b = 2; c = 3"],
        [whole, "b = 2 c = 3", "a = 1 c = 3", "a = 1 b = 2"],
    ]
    mean = query_likelihood(tiny, "print(b)", seen[2]).mean_per_unit().value
    torch.testing.assert_close(without.value, mean[0] - mean[1:])
    torch.testing.assert_close(single.value, query_likelihood(tiny, "print(b)", segments).mean_per_unit().value)
    assert running.value.shape == (3,)
    assert without.kind is Kind.EXACT
    one = backtracing_scores(partial(query_likelihood, tiny, "x"), ["only"], how="leave_one_out")
    assert math.isfinite(one.value.item())


def test_leave_one_out_on_a_mixture_and_its_limits():
    """p(q | S) = mean over sentences of p(q | s): direct evaluation; a model that ignores the document gives 0."""
    p = {"a": 0.7, "b": 0.1, "c": 0.2}

    def mixture(contexts):
        return exact([math.log(sum(p[s] for s in c.split()) / len(c.split())) for c in contexts])

    got = backtracing_scores(mixture, list("abc"), how="leave_one_out").value
    whole = math.log(1 / 3)
    wanted = [whole - math.log(0.15), whole - math.log(0.45), whole - math.log(0.4)]
    torch.testing.assert_close(got, torch.tensor(wanted).double())
    # nested removals telescope: the sum of the steps is l(q | S) - l(q | last)
    steps = [mixture(["a b c"]).value - mixture(["b c"]).value, mixture(["b c"]).value - mixture(["c"]).value]
    torch.testing.assert_close(sum(steps), mixture(["a b c"]).value - mixture(["c"]).value)
    counts = {"x": 3, "y": 1}

    def blind(contexts):
        return unigram_likelihood(["x"], [c.split() for c in contexts], counts, smoothing="jelinek_mercer", mix=1.0)

    zero = backtracing_scores(blind, ["x x", "y", "x y"], how="leave_one_out").value
    assert zero.tolist() == [0.0, 0.0, 0.0]


def test_unigram_likelihood_by_hand():
    counts, documents = {"cat": 5, "dog": 3, "sat": 2}, [["cat", "cat", "sat"], ["dog"], []]
    everywhere = {"cat": 6 / 14, "dog": 4 / 14, "sat": 3 / 14, "new": 1 / 14}
    assert sum(everywhere.values()) == pytest.approx(1)
    query = ["cat", "new"]
    got = unigram_likelihood(query, documents, counts, mu=2.0)
    wanted = [
        math.log((2 + 2 * everywhere["cat"]) / 5) + math.log(2 * everywhere["new"] / 5),
        math.log(2 * everywhere["cat"] / 3) + math.log(2 * everywhere["new"] / 3),
        math.log(everywhere["cat"]) + math.log(everywhere["new"]),
    ]
    torch.testing.assert_close(got.value, torch.tensor(wanted).double())
    mixed = unigram_likelihood(query, documents, counts, smoothing="jelinek_mercer", mix=0.7)
    first = math.log(0.3 * 2 / 3 + 0.7 * everywhere["cat"]) + math.log(0.7 * everywhere["new"])
    assert mixed.value[0].item() == pytest.approx(first)
    assert mixed.value[2].item() == pytest.approx(wanted[2])
    for smoothing in ("dirichlet", "jelinek_mercer"):  # a distribution over all types and the unseen one
        rows = [unigram_likelihood([w], documents, counts, smoothing=smoothing).value.exp() for w in everywhere]
        torch.testing.assert_close(torch.stack(rows).sum(0), torch.ones(3).double())


# -------------------------------------------------------------------------------------------------- answers on evidence
def test_direct_equals_the_channel_and_rag_is_the_marginal():
    """On a joint P(q, e, a): Bayes' rule, and the sum over evidence."""
    table = random_joint(3, 4, 5)  # question, evidence, answer
    whole = table.logsumexp((0, 1, 2))
    assert abs(whole) < 1e-12
    p_qe, p_ea, p_e = table.logsumexp(2), table.logsumexp(0), table.logsumexp((0, 2))
    pairs = list(itertools.product(range(4), range(5)))
    for q in range(3):
        direct = exact([table[q, e, a] - p_qe[q, e] for e, a in pairs])
        channel = noisy_channel(
            exact([table[q, e, a] - p_ea[e, a] for e, a in pairs]),
            exact([p_ea[e, a] - p_e[e] for e, a in pairs]),
            exact([p_qe[q, e] - p_e[e] for e, a in pairs]),
        )
        torch.testing.assert_close(channel.value, direct.value)
        retrieval = p_qe[q] - p_qe[q].logsumexp(0)
        got = rag_marginal(direct, retrieval, torch.tensor([e for e, _ in pairs]), [f"w{a}" for _, a in pairs])
        truth = table[q].logsumexp(0) - table[q].logsumexp((0, 1))
        for name, value in zip(got.answers, got.log_prob.value, strict=True):
            assert value.item() == pytest.approx(truth[int(name[1:])].item())
        assert got.answers[0] == f"w{int(truth.argmax())}"


def test_rag_of_one_paragraph_and_of_copies():
    values, names = exact([-1.0, -2.0]), ["x", "y"]
    one = rag_marginal(values, torch.zeros(1), torch.tensor([0, 0]), names)
    torch.testing.assert_close(one.log_prob.value, values.value)
    copies = rag_marginal(
        exact([-1.0, -2.0, -1.0, -2.0]), torch.tensor([0.5, 0.5]).log(), torch.tensor([0, 0, 1, 1]), names * 2
    )
    torch.testing.assert_close(copies.log_prob.value, values.value)  # they share one paragraph's mass
    spelled = rag_marginal(
        exact([-1.0, -1.5, -1.5]), torch.zeros(1), torch.tensor([0, 0, 0]), ["Paris", "the paris.", "the paris."]
    )
    assert spelled.answers == ("paris",)
    assert spelled.log_prob.item() == pytest.approx(np.logaddexp(-1.0, -1.5))  # spellings add, repeats do not
    bound = exact([-1.0, -2.0], kind=Kind.LOWER_BOUND)
    assert rag_marginal(bound, torch.zeros(1), torch.tensor([0, 0]), names).log_prob.kind is Kind.LOWER_BOUND
    sampled = exact([-1.0, -2.0], kind=Kind.LOWER_BOUND, stderr=torch.ones(2), draws=DrawsKey.of("a"))
    assert rag_marginal(sampled, torch.zeros(1), torch.tensor([0, 0]), names).log_prob.kind is Kind.SURROGATE


def test_answers_that_are_the_same():
    assert normalise_answer("The  U.S.-Army,") == "u s army"
    assert normalise_answer("an apple a day") == "apple day"
    assert normalise_answer("Theatre") == "theatre"


def test_retrieval_probabilities_are_sklearns_cosines():
    texts = ["the cat sat", "dogs run fast", "a cat and a dog"]
    vectorizer = TfidfVectorizer().fit(texts)
    cosine = cosine_similarity(vectorizer.transform(["cat dog"]), vectorizer.transform(texts))[0]
    got = retrieval_log_probs(torch.from_numpy(cosine), floor=1e-12).exp()
    torch.testing.assert_close(got, torch.from_numpy(cosine / cosine.sum()), atol=1e-9, rtol=0)
    soft = retrieval_log_probs(torch.tensor([1.0, -2.0]), temperature=0.5)
    torch.testing.assert_close(soft, torch.tensor([2.0, -4.0]).double().log_softmax(0))
    torch.testing.assert_close(retrieval_log_probs(torch.zeros(4)).exp(), torch.full((4,), 0.25).double())


# -------------------------------------------------------------------------------------------------------------- metrics
def test_metrics_by_hand():
    scores = [torch.tensor([0.1, 0.9, 0.5]), torch.tensor([-1.0, -math.inf, -2.0, 0.0])]
    targets = [torch.tensor([True, False, False]), torch.tensor([True, True, False, False])]
    got = retrieval_metrics(scores, targets, k=(1, 2, 3))
    assert got.reciprocal_rank.tolist() == pytest.approx([1 / 3, 1 / 2])
    assert got.mrr == pytest.approx(5 / 12)
    assert got.accuracy == {1: 0.0, 2: 0.5, 3: 1.0}
    assert got.hits[2].tolist() == [0.0, 1.0]
    table = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert retrieval_metrics(table, torch.eye(2).bool()).mrr == 1.0


def test_ties_are_expectations_over_random_orders():
    generator = np.random.default_rng(0)
    for _ in range(5):
        values = torch.from_numpy(generator.integers(0, 3, 6)).double()
        right = torch.zeros(6, dtype=torch.bool)
        right[torch.from_numpy(generator.choice(6, 2, replace=False))] = True
        got = retrieval_metrics([values], [right], k=(1, 3))
        ranks = []
        for order in itertools.permutations(range(6)):
            ranked = sorted(order, key=lambda i: -values[i].item())  # stable: the permutation breaks the ties
            ranks.append(1 + min(place for place, i in enumerate(ranked) if right[i]))
        assert got.mrr == pytest.approx(np.mean([1 / r for r in ranks]))
        assert got.accuracy[1] == pytest.approx(np.mean([r <= 1 for r in ranks]))
        assert got.accuracy[3] == pytest.approx(np.mean([r <= 3 for r in ranks]))
    flat = retrieval_metrics([torch.zeros(10)], [torch.arange(10) == 4], k=(1, 3))
    many = retrieval_metrics([torch.zeros(4000)], [torch.arange(4000) < 2000], k=(1,))  # binomials overflow
    assert many.accuracy[1] == pytest.approx(0.5)
    assert many.rank.item() == pytest.approx(4001 / 2001)
    assert flat.accuracy == {1: pytest.approx(0.1), 3: pytest.approx(0.3)}


def test_recall_rank_and_ndcg_over_ties_are_scikit_learns_and_those_of_all_orders():
    generator = np.random.default_rng(1)
    for trial in range(12):
        values = torch.from_numpy(generator.integers(0, 2 if trial % 2 else 5, 6)).double()
        right = torch.zeros(6, dtype=torch.bool)
        right[torch.from_numpy(generator.choice(6, 1 + trial % 3, replace=False))] = True
        got = retrieval_metrics([values], [right], k=(1, 2, 4, 9))
        places = []
        for order in itertools.permutations(range(6)):
            ranked = sorted(order, key=lambda i: -values[i].item())
            places.append([place for place, i in enumerate(ranked, 1) if right[i]])
        assert got.rank.item() == pytest.approx(np.mean([min(found) for found in places]))
        for k in (1, 2, 4, 9):
            wanted = np.mean([np.mean([p <= k for p in found]) for found in places])
            assert got.recall[k].item() == pytest.approx(wanted)
            peer = ndcg_score(right[None].numpy(), values[None].numpy(), k=k)  # its ties are averaged too
            assert got.ndcg[k].item() == pytest.approx(peer)
        assert got.accuracy[9] == got.recall[9].item() == 1.0
    both = retrieval_metrics([torch.tensor([3.0, 2, 1])], [torch.tensor([False, True, True])], k=(2,))
    assert both.per_query().keys() == {"mrr", "accuracy_at_2", "recall_at_2", "ndcg_at_2"}
    assert both.per_query()["recall_at_2"].item() == 0.5


def test_distances_are_those_of_all_orders():
    generator = np.random.default_rng(2)
    for trial in range(10):
        values = torch.from_numpy(generator.integers(0, 2 if trial % 2 else 4, 6)).double()
        right = torch.zeros(6, dtype=torch.bool)
        right[torch.from_numpy(generator.choice(6, 1 + trial % 2, replace=False))] = True
        causes = right.nonzero().flatten().tolist()
        got = backtracing_distance([values], [right], k=(1, 2, 3, 8))
        for k in (1, 2, 3, 8):
            found = []
            for order in itertools.permutations(range(6)):
                best = sorted(order, key=lambda i: -values[i].item())[:k]
                found.append(min(abs(i - g) for i in best for g in causes))
            assert got[k].item() == pytest.approx(np.mean(found))


# ------------------------------------------------------------------------------------------------------------- refusals
ONE = exact([-1.0])
ANSWER = torch.tensor([0])
REFUSED = [
    (lambda: bidirectional_score(ONE, ONE, weight=1.5), r"weight must lie in \[0, 1\], got 1.5"),
    (lambda: bidirectional_score(ONE, ONE, normalise="byte"), "normalise must be token or sum, got 'byte'"),
    (lambda: bidirectional_score(ONE, exact([-1.0, -1.0])), "a row per pair: got 1 and 2"),
    (lambda: bidirectional_score(exact([math.nan]), ONE), "row 0: the likelihood is nan"),
    (lambda: bidirectional_score(ONE, ONE, prior=exact([-math.inf])), "row 0: the prior of the option is 0"),
    (lambda: query_likelihood(None, "q", []), "contexts must be a list of at least one text"),
    (lambda: query_likelihood(None, "q", "text"), "contexts must be a list"),
    (lambda: query_likelihood(None, " ", ["text"]), "the query is empty"),
    (lambda: backtracing_scores(lambda c: ONE, ["a"], how="end"), "how must be one of single, .* got 'end'"),
    (lambda: backtracing_scores(lambda c: ONE, []), "segments must be a list of at least one text"),
    (lambda: unigram_likelihood([], [["a"]], {"a": 1}), "must not be empty"),
    (lambda: unigram_likelihood(["a"], [["a"]], {}), "must not be empty"),
    (lambda: unigram_likelihood(["a"], [["a"]], {"a": 1}, mu=0), "mu must be positive and finite and mix in"),
    (lambda: unigram_likelihood(["a"], [["a"]], {"a": 1}, mix=0), "mu must be positive and finite and mix in"),
    (lambda: unigram_likelihood(["a"], [["a"]], {"a": 1}, smoothing="none"), "smoothing must be dirichlet or"),
    (lambda: retrieval_log_probs(torch.tensor([-0.1, 1.0])), "none negative unless there is a temperature"),
    (lambda: retrieval_log_probs(torch.tensor([math.nan, 1.0])), "a row of finite numbers"),
    (lambda: retrieval_log_probs(torch.zeros(0)), "a row of finite numbers"),
    (lambda: retrieval_log_probs(torch.ones(2), temperature=0), "temperature must be positive and finite, got 0"),
    (lambda: retrieval_log_probs(torch.ones(2), floor=0), "floor must be positive and finite, got 0"),
    (lambda: noisy_channel(ONE, ONE, exact([-1.0, -1.0])), "a row per pair is needed: got 1, 1 and 2"),
    (lambda: noisy_channel(ONE, ONE, exact([-1.0], [2])), "row 0: the prior scores 2 tokens"),
    (lambda: rag_marginal(ONE, torch.zeros(1), ANSWER, []), "a row per answer is needed: got 1, 1 and 0"),
    (lambda: rag_marginal(ONE, torch.zeros(2), ANSWER, ["a"]), "log-probabilities of the paragraphs that sum to 1"),
    (lambda: rag_marginal(ONE, torch.zeros(1), ANSWER + 1, ["a"]), "row 0: names paragraph 1 of 1"),
    (lambda: rag_marginal(exact([math.nan]), torch.zeros(1), ANSWER, ["a"]), "row 0: its log-likelihood is no number"),
    (lambda: retrieval_metrics([], []), "must pair by query: got 0 and 0"),
    (lambda: retrieval_metrics([torch.ones(2)], [torch.ones(2).bool()], k=(0,)), "k must be at least 1"),
    (lambda: retrieval_metrics([torch.ones(2)], [torch.zeros(2).bool()]), "query 0: needs scores"),
    (lambda: retrieval_metrics([torch.ones(2)], [torch.ones(3).bool()]), "query 0: needs scores"),
    (
        lambda: retrieval_metrics([torch.tensor([math.nan, 0])], [torch.ones(2).bool()]),
        "query 0: has a score",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
