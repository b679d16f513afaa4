r"""Ranking texts with a text model: every score of `loglik.signals.retrieval` for queries with lists of candidates.

A pair of query and candidate is scored in both directions and the candidate alone (arXiv 2507.23284); the segments of a
document are scored by what they do for a query (arXiv 2403.03956). A unigram model of words is the baseline of both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy
from loglik.signals.choice import Normalise, normalised_score
from loglik.signals.intervals import mean_intervals
from loglik.signals.retrieval import (
    RetrievalMetrics,
    backtracing_scores,
    bidirectional_score,
    query_likelihood,
    unigram_likelihood,
)
from loglik.signals.texts import place_in_lists, require_text_lists

__all__ = [
    "PairScores",
    "agreement",
    "compare_rankers",
    "score_pairs",
    "score_segments",
    "word_likelihood",
    "word_tokens",
]


@dataclass(frozen=True, slots=True)
class PairScores:
    """N pairs of query and candidate, those of a query together, in the order of its candidates.

    Args:
        candidate: (N,) log p(candidate | query).
        query: (N,) log p(query | candidate).
        prior: (N,) log p(candidate), its tokens alone after the same prompt without the query.
        words: (N,) log p(query's words) under the unigram model of the candidate.
        counts: how many candidates each query has.
    """

    candidate: LogLikelihood
    query: LogLikelihood
    prior: LogLikelihood
    words: LogLikelihood
    counts: tuple[int, ...]

    def scores(
        self, *, alpha: float = 1.0, weight: float = 0.5, normalise: Normalise = "token"
    ) -> dict[str, Measurement]:
        r"""(N,) of each scorer, labelled.

        ``query`` is :math:`\log p(q \mid c)`, ``candidate`` :math:`\log p(c \mid q)`, ``candidate_prior`` the latter
        minus `alpha` times :math:`\log p(c)`, ``bidirectional`` the mixture of ``query`` (by `weight`) with it, and
        ``words`` the unigram baseline; each but the last by its length where `normalise` is ``token``.

        Raises:
            InputError: for options out of range, or directions that are counted in different units.
            RowError: for a pair that cannot be compared, such as a prior of probability 0.

        Source: arXiv 2507.23284.
        """
        both = bidirectional_score(
            self.candidate, self.query, prior=self.prior, alpha=alpha, weight=weight, normalise=normalise
        )
        plain = {
            "query": normalised_score(self.query, normalise=normalise),
            "candidate": normalised_score(self.candidate, normalise=normalise),
            "candidate_prior": normalised_score(self.candidate, normalise=normalise, prior=self.prior, alpha=alpha),
        }
        found = {name: Measurement(s.value, s.kind, name, s.stderr) for name, s in plain.items()}
        return found | {"bidirectional": both, "words": Measurement(self.words.value, self.words.kind, "words")}

    def by_query(self, values: Tensor) -> list[Tensor]:
        """(N,) values as one (C,) tensor per query."""
        return list(torch.split(values, list(self.counts)))


def score_pairs(
    model: TextModel,
    queries: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    separator: str = "\n",
    query_label: str = "",
    candidate_label: str = "",
    premise: str | None = None,
    overflow: OverflowPolicy = "error",
) -> PairScores:
    r"""Score candidates for queries in both directions with any text model.

    The candidate is scored after ``query_label + query + separator + candidate_label``, the query after the same with
    the two exchanged, and the prior is that of the candidate after ``separator + candidate_label``: the prompt without
    its query.

    Args:
        model: from `loglik.load`, or any text model.
        queries: Q texts.
        candidates: the candidates of each query, at least one, none empty.
        separator: stands between the two.
        query_label: stands before the query, such as ``Question: ``.
        candidate_label: stands before the candidate, such as ``Text: ``.
        premise: what the prior is conditioned on instead.
        overflow: a prompt longer than the context is an error, or is read in windows.

    Raises:
        InputError: for numbers that do not pair, or a model without a tokenizer.
        RowError: naming the query (and candidate) that is empty or cannot be scored.

    Source: arXiv 2507.23284.
    """
    require_text_lists(queries, candidates, head="query", item="candidate")
    flat = [(q, text) for q, texts in zip(queries, candidates, strict=True) for text in texts]
    alone = separator + candidate_label if premise is None else premise
    counts = tuple(len(texts) for texts in candidates)

    def scored(pairs: Sequence[tuple[str, str]]) -> LogLikelihood:
        try:
            return score(model, pairs, overflow=overflow)
        except RowError as error:
            raise error.at(place_in_lists(error.row, counts, head="query", item="candidate")) from None

    return PairScores(
        scored([(query_label + q + separator + candidate_label, text) for q, text in flat]),
        scored([(candidate_label + text + separator + query_label, q) for q, text in flat]),
        scored([(alone, text) for _, text in flat]),
        LogLikelihood.cat(word_likelihood(queries, candidates)),
        counts,
    )


def score_segments(
    model: TextModel,
    queries: Sequence[str],
    documents: Sequence[Sequence[str]],
    *,
    separator: str = "\n",
    joiner: str = " ",
    query_label: str = "",
    segment_label: str = "",
    overflow: OverflowPolicy = "error",
) -> dict[str, list[LogLikelihood]]:
    """How much each segment of a document accounts for a query, by every score of `backtracing_scores`.

    Args:
        model: from `loglik.load`, or any text model.
        queries: Q texts.
        documents: the segments of each query's document, in order.
        separator: stands between the document and the query.
        joiner: stands between segments.
        query_label: stands before the query.
        segment_label: stands before the document, or the part of it that is read.
        overflow: a document longer than the context is an error, or is read in windows.

    Returns:
        ``single``, ``autoregressive``, ``leave_one_out`` (nats per token of the query) and ``words``: for each query
        (T,) labelled scores.

    Raises:
        InputError: for numbers that do not pair, or a model without a tokenizer.
        RowError: naming the query that is empty or cannot be scored.

    Source: arXiv 2403.03956.
    """
    require_text_lists(queries, documents, head="query", item="segment")
    found: dict[str, list[LogLikelihood]] = {"single": [], "autoregressive": [], "leave_one_out": []}
    for number, (query, segments) in enumerate(zip(queries, documents, strict=True)):
        ask = partial(query_likelihood, model, query, separator=separator + query_label, overflow=overflow)

        def likelihood(contexts: Sequence[str], ask: Any = ask) -> LogLikelihood:
            result: LogLikelihood = ask([segment_label + context for context in contexts])
            return result

        for how, scores in found.items():
            try:
                scores.append(backtracing_scores(likelihood, segments, how=how, joiner=joiner))  # type: ignore[arg-type]
            except RowError as error:
                raise error.at(f"query {number}") from None
    return found | {"words": word_likelihood(queries, documents)}


def word_tokens(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case: what a unigram model counts as words."""
    return re.findall(r"\w+", text.lower())


def word_likelihood(
    queries: Sequence[str], candidates: Sequence[Sequence[str]], *, mu: float = 100.0
) -> list[LogLikelihood]:
    r"""Unigram query likelihood of texts, with the words of all different candidates as the collection.

    A query without words says nothing about its candidates: all scores are :math:`\log 1 = 0`.

    Args:
        queries: Q texts.
        candidates: those of each query.
        mu: of the Dirichlet smoothing, in words.

    Returns:
        For each query (C,) nats.

    Raises:
        InputError: for numbers that do not pair, or mu out of range.
        RowError: for an empty query or candidate.

    Source: arXiv 2403.03956 ranks with such models as baselines.
    """
    require_text_lists(queries, candidates, head="query", item="candidate")
    collection = Counter(
        word for text in dict.fromkeys(t for texts in candidates for t in texts) for word in word_tokens(text)
    )
    found = []
    for query, texts in zip(queries, candidates, strict=True):
        words = word_tokens(query)
        if words and collection:
            found.append(unigram_likelihood(words, [word_tokens(text) for text in texts], collection, mu=mu))
        else:
            nothing = torch.zeros(len(texts), 1, dtype=torch.float64)
            found.append(LogLikelihood.from_per_unit(nothing, torch.zeros_like(nothing, dtype=torch.bool)))
    return found


def agreement(scores: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """(K, K) share of the queries for which two scorers put the same candidate first (of equal scores, the earliest).

    Args:
        scores: for each scorer, for each of Q queries (C,) scores.

    Raises:
        InputError: for no queries, scorers with different queries, or a query without scores.
    """
    lengths = {len(rows) for rows in scores.values()}
    if len(lengths) != 1 or not min(lengths) or any(not len(row) for rows in scores.values() for row in rows):
        raise InputError("scores must hold the same queries for each scorer, at least one, each with its candidates")
    best = torch.stack([torch.stack([row.argmax() for row in rows]) for rows in scores.values()])
    return (best[:, None] == best[None]).double().mean(-1)


def compare_rankers(
    metrics: Mapping[str, RetrievalMetrics], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Figures of several scorers on the same queries, with bootstrap intervals and paired differences to the first.

    Args:
        metrics: of each scorer, from `retrieval_metrics`; the first is what the others are compared with.
        level: confidence of the intervals.
        resamples: of the queries.
        seed: of the resampling.

    Returns:
        For each scorer: each figure, ``_low`` and ``_high`` of its interval, and for the others than the first
        ``_gain`` with its interval. One query gives the figures alone.

    Raises:
        InputError: for no scorers, different queries or figures, or options out of range.

    Source: percentile bootstrap over queries, the same resamples for all scorers.
    """
    tables = {name: found.per_query() for name, found in metrics.items()}
    shapes = {tuple((figure, len(values)) for figure, values in table.items()) for table in tables.values()}
    if len(shapes) != 1:
        raise InputError("metrics must hold one or more scorers with the same queries and the same k")
    found: dict[str, dict[str, float]] = {name: {} for name in tables}
    for figure, count in shapes.pop():
        values = torch.stack([table[figure] for table in tables.values()])
        if count < 2:
            for name, value in zip(found, values[:, 0].tolist(), strict=True):
                found[name][figure] = value
            continue
        means = mean_intervals(values, level=level, resamples=resamples, seed=seed)
        for place, name in enumerate(found):
            low, high = means.interval[place].tolist()
            found[name] |= {figure: means.mean[place].item(), f"{figure}_low": low, f"{figure}_high": high}
            if place:
                low, high = means.difference_interval[place].tolist()
                gain = means.difference[place].item()
                found[name] |= {f"{figure}_gain": gain, f"{figure}_gain_low": low, f"{figure}_gain_high": high}
    return found
