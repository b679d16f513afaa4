r"""Retrieval by likelihood: of the candidate, of the query, of both; causes of a query; and how well it goes.

Candidates are ranked by :math:`\log p(c \mid q)` with their prior taken off, by :math:`\log p(q \mid c)`, or by both
(arXiv 2507.23284); sentences by what they do for the likelihood of a query (arXiv 2403.03956).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy
from loglik.signals.choice import Normalise, normalised_score

__all__ = [
    "RetrievalMetrics",
    "backtracing_distance",
    "backtracing_scores",
    "bidirectional_score",
    "query_likelihood",
    "retrieval_metrics",
    "unigram_likelihood",
]


# ------------------------------------------------------------------------------------------------------ both directions
def bidirectional_score(
    candidate: LogLikelihood,
    query: LogLikelihood,
    *,
    prior: LogLikelihood | None = None,
    alpha: float = 1.0,
    weight: float = 0.5,
    normalise: Normalise = "token",
) -> Measurement:
    r"""Score of pairs of query and candidate from the likelihoods of both.

    .. math:: s(q, c) = w \log p(q \mid c) + (1 - w) \bigl( \log p(c \mid q) - \alpha \log p(c) \bigr)

    each divided by its own length. The query needs no prior: it is the same for all candidates.

    Args:
        candidate: (N,) log p(candidate | query).
        query: (N,) log p(query | candidate) of the same pairs.
        prior: (N,) log p(candidate); None: no correction.
        alpha: of the prior. Choose it and `weight` on data that is not reported.
        weight: w in [0, 1].
        normalise: ``token`` (the paper's) or ``sum``.

    Raises:
        InputError: for a weight out of range or rows that do not pair, and as `normalised_score`.
        RowError: for a pair whose candidate or query cannot be scored.

    Source: arXiv 2507.23284.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"weight must lie in [0, 1], got {weight}")
    if normalise not in ("token", "sum"):
        raise InputError(f"normalise must be token or sum, got {normalise!r}")
    if len(candidate) != len(query):
        raise InputError(f"candidate and query must have a row per pair: got {len(candidate)} and {len(query)}")
    parts = []
    if weight < 1:
        corrected = normalised_score(candidate, normalise=normalise, prior=prior, alpha=alpha)
        parts.append(corrected * (1.0 - weight))
    if weight > 0:
        parts.append(normalised_score(query, normalise=normalise) * float(weight))
    found = reduce(add, parts)
    return Measurement(found.value, found.kind, "bidirectional_score", found.stderr)


# ---------------------------------------------------------------------------------------------------- query likelihood
def query_likelihood(
    model: TextModel, query: str, contexts: Sequence[str], *, separator: str = "\n", overflow: OverflowPolicy = "error"
) -> LogLikelihood:
    r""":math:`\log p(\text{query} \mid \text{context}, \text{separator})` for each context, the query's tokens alone.

    Args:
        model: any text model.
        query: a text.
        contexts: T texts; an empty one leaves the separator.
        separator: stands between context and query and is part of the context.
        overflow: a context longer than the model's is an error, or is read in windows.

    Returns:
        (T,) nats; `mean_per_unit` gives nats per token, the score of the paper.

    Raises:
        InputError: for no contexts or an empty query.
        RowError: for a context that cannot be scored.

    Source: arXiv 2403.03956 (one of its scripts divides by the length of the context, which favours long ones).
    """
    if isinstance(contexts, str) or not len(contexts):
        raise InputError("contexts must be a list of at least one text")
    if not query.strip():
        raise InputError("the query is empty: there is nothing to score")
    return score(model, [(context + separator, query) for context in contexts], overflow=overflow)


def backtracing_scores(
    likelihood: Callable[[Sequence[str]], LogLikelihood],
    segments: Sequence[str],
    *,
    how: Literal["single", "autoregressive", "leave_one_out"] = "single",
    joiner: str = " ",
) -> LogLikelihood:
    r"""How much each segment of a document accounts for a query.

    With :math:`\ell` nats per unit of the query,

    .. math:: \text{single: } \ell(q \mid s_t), \qquad \text{autoregressive: } \ell(q \mid s_{\le t}), \qquad
              \text{leave one out: } \ell(q \mid S) - \ell(q \mid S \setminus s_t)

    The last is the pointwise evidence of a segment given the rest (the paper's average treatment effect).

    Args:
        likelihood: of the query given each of several contexts, such as ``partial(query_likelihood, model, query)``.
        segments: T texts in order.
        how: which of the three.
        joiner: stands between segments.

    Returns:
        (T,) labelled scores, nats per unit.

    Raises:
        InputError: for no segments or an unknown score.

    Source: arXiv 2403.03956.
    """
    if how not in ("single", "autoregressive", "leave_one_out"):
        raise InputError(f"how must be one of single, autoregressive, leave_one_out, got {how!r}")
    if isinstance(segments, str) or not len(segments):
        raise InputError("segments must be a list of at least one text")
    parts = list(segments)
    if how == "single":
        return likelihood(parts).mean_per_unit()
    if how == "autoregressive":
        return likelihood([joiner.join(parts[: t + 1]) for t in range(len(parts))]).mean_per_unit()
    without = [joiner.join(parts[:t] + parts[t + 1 :]) for t in range(len(parts))]
    found = likelihood([joiner.join(parts), *without]).mean_per_unit()
    return found[[0] * len(parts)] - found[1:]


def unigram_likelihood(
    query: Sequence[str],
    documents: Sequence[Sequence[str]],
    collection: Mapping[str, int],
    *,
    smoothing: Literal["dirichlet", "jelinek_mercer"] = "dirichlet",
    mu: float = 100.0,
    mix: float = 0.7,
) -> LogLikelihood:
    r"""Likelihood of a query under the smoothed unigram model of each document: classical query-likelihood retrieval.

    .. math:: p_\mu(w \mid d) = \frac{c(w, d) + \mu\, p(w)}{|d| + \mu}, \qquad
              p_\lambda(w \mid d) = (1 - \lambda) \frac{c(w, d)}{|d|} + \lambda\, p(w), \qquad
              p(w) = \frac{c(w) + 1}{C + V + 1}

    The collection's counts are raised by one, and one type stands for all unseen words, so that no query is
    impossible; such words add the same to all documents of one length.

    Args:
        query: its tokens.
        documents: T lists of tokens; an empty one is the collection's model alone.
        collection: how often each of the V word types stands in the whole collection.
        smoothing: ``dirichlet`` or ``jelinek_mercer``.
        mu: weight of the collection in tokens, positive.
        mix: :math:`\lambda`, weight of the collection, in (0, 1]; 1 ignores the document.

    Raises:
        InputError: for an empty query or collection, no documents, or options out of range.

    Source: arXiv 2403.03956 ranks with such models as baselines.
    """
    if not query or not documents or not collection:
        raise InputError("the query, the documents and the collection must not be empty")
    if smoothing not in ("dirichlet", "jelinek_mercer"):
        raise InputError(f"smoothing must be dirichlet or jelinek_mercer, got {smoothing!r}")
    if not 0 < mu < math.inf or not 0 < mix <= 1:
        raise InputError(f"mu must be positive and finite and mix in (0, 1], got {mu} and {mix}")
    total = sum(collection.values()) + len(collection) + 1
    everywhere = np.array([(collection.get(word, 0) + 1) / total for word in query])
    terms = np.empty((len(documents), len(query)))
    for row, document in enumerate(documents):
        counts = Counter(document)
        here = np.array([counts[word] for word in query], dtype=float)
        share = mu / (len(document) + mu) if smoothing == "dirichlet" else mix
        share = share if document else 1.0
        terms[row] = np.log((1 - share) * here / max(1, len(document)) + share * everywhere)
    per_unit = torch.from_numpy(terms)
    return LogLikelihood.from_per_unit(per_unit, torch.ones_like(per_unit, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------------------- metrics
@dataclass(frozen=True, slots=True)
class RetrievalMetrics:
    """How well targets were ranked; equal scores stand in random order, and expectations are taken over it.

    Args:
        mrr: mean reciprocal rank of the first target of each query.
        accuracy: by k, the share of queries with a target among the first k.
        reciprocal_rank: (Q,) of the first target of each query.
        hits: by k, (Q,) whether a target is among the first k.
        rank: (Q,) place of the first target, from 1.
        recall: by k, (Q,) share of the targets among the first k.
        ndcg: by k, (Q,) discounted gain of the targets among the first k, over the best possible.
    """

    mrr: float
    accuracy: dict[int, float]
    reciprocal_rank: Tensor
    hits: dict[int, Tensor]
    rank: Tensor
    recall: dict[int, Tensor]
    ndcg: dict[int, Tensor]

    def per_query(self) -> dict[str, Tensor]:
        """All figures (Q,) by name, such as ``mrr`` and ``recall_at_3``; their means are those of the queries."""
        found = {"mrr": self.reciprocal_rank}
        for name, values in (("accuracy", self.hits), ("recall", self.recall), ("ndcg", self.ndcg)):
            found |= {f"{name}_at_{k}": value for k, value in values.items()}
        return found


def retrieval_metrics(
    scores: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], *, k: Sequence[int] = (1, 3)
) -> RetrievalMetrics:
    r"""Mean reciprocal rank, top-k accuracy, recall and nDCG of the targets of each query.

    .. math:: \mathrm{nDCG}@k = \frac{\sum_{\text{targets at places } r \le k} 1 / \log_2(1 + r)}
              {\sum_{r = 1}^{\min(k, n)} 1 / \log_2(1 + r)}

    Equal scores stand in random order: with m others and n targets tied after g better candidates, the first target
    comes at place g + j with probability :math:`\binom{m + n - j}{n - 1} / \binom{m + n}{n}`, each target at one of
    their m + n places, and expectations are taken. A scorer that says the same of everything gets what chance gets.

    Args:
        scores: for each of Q queries (C,) scores of its candidates, higher is better; minus infinity: not scored.
        targets: for each query (C,) bool, at least one True.
        k: of accuracy, recall and nDCG; those of a query with fewer candidates than k count all of them.

    Raises:
        InputError: for no queries, rows that do not pair, or a k below 1.
        RowError: for a query without a target, or scores that are NaN or infinite.

    Source: arXiv 2403.03956 (accuracy); nDCG is that of scikit-learn's `ndcg_score`.
    """
    reciprocal, rank = [], []
    hits: dict[int, list[float]] = {n: [] for n in k}
    recall: dict[int, list[float]] = {n: [] for n in k}
    ndcg: dict[int, list[float]] = {n: [] for n in k}
    for row, right in _ranked(scores, targets, k):
        best = row[right].max()
        above, tied = int((row > best).sum()), row == best
        good = int((tied & right).sum())
        others = int(tied.sum()) - good
        places = np.arange(1, others + 2)
        # ratios of neighbouring binomials: the binomials themselves overflow where a thousand scores are equal
        steps = (others - places[:-1] + 1) / (others + good - places[:-1])
        chances = good / (others + good) * np.concatenate([[1.0], steps.cumprod()])
        reciprocal.append(float(chances @ (1 / (above + places))))
        rank.append(float(chances @ (above + places)))
        before, size = _places(row[right], row)
        discounts = np.concatenate([[0.0], (1 / np.log2(np.arange(2, len(row) + 2))).cumsum()])
        for n, hit in hits.items():
            cut = min(n, len(row))
            hit.append(1.0 if above + places[-1] <= n else float(chances[above + places <= n].sum()))
            inside = (np.minimum(before + size, cut) - before).clip(min=0) / size
            recall[n].append(float(inside.mean()))
            gained = discounts[np.minimum(before + size, cut)] - discounts[np.minimum(before, cut)]
            ndcg[n].append(float((gained / size).sum() / discounts[min(cut, len(before))]))
    found = [{n: torch.tensor(v, dtype=torch.float64) for n, v in part.items()} for part in (hits, recall, ndcg)]
    ranks = torch.tensor(reciprocal, dtype=torch.float64)
    return RetrievalMetrics(
        float(ranks.mean()),
        {n: float(v.mean()) for n, v in found[0].items()},
        ranks,
        found[0],
        torch.tensor(rank, dtype=torch.float64),
        found[1],
        found[2],
    )


def backtracing_distance(
    scores: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], *, k: Sequence[int] = (1, 3)
) -> dict[int, Tensor]:
    r"""How far the k best segments of a document miss: :math:`\min_{t \in \text{top } k} \min_{g \in G} |t - g|`.

    Equal scores stand in random order, and the expectation is taken.

    Args:
        scores: for each of Q queries (T,) scores of the segments in order, higher is better.
        targets: for each query (T,) bool, the segments that caused it, at least one.
        k: how many of the best segments may come close.

    Returns:
        By k, (Q,) distances in segments; 0 where a target is found.

    Raises:
        InputError: as `retrieval_metrics`.
        RowError: likewise.

    Source: arXiv 2403.03956.
    """
    found: dict[int, list[float]] = {n: [] for n in k}
    for row, right in _ranked(scores, targets, k):
        where, causes = np.arange(len(row)), np.flatnonzero(right.numpy())
        distance = np.abs(where[:, None] - causes).min(1)
        values = row.numpy()
        for n, into in found.items():
            last = np.sort(values)[::-1][min(n, len(values)) - 1]
            certain = distance[values > last]
            limit = float(certain.min()) if len(certain) else np.inf
            tied = np.sort(distance[values == last])
            drawn = min(n, len(values)) - len(certain)  # so many of the equal ones come in; the nearest counts
            places = np.arange(1, len(tied) - drawn + 1)
            steps = (len(tied) - places - drawn + 1) / (len(tied) - places)
            chances = drawn / len(tied) * np.concatenate([[1.0], steps.cumprod()])
            into.append(float(chances @ np.minimum(tied[: len(chances)], limit)))
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in found.items()}


def _ranked(
    scores: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], k: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and targets of each query, checked."""
    if len(scores) != len(targets) or not len(scores):
        raise InputError(f"scores and targets must pair by query: got {len(scores)} and {len(targets)}")
    if not k or any(isinstance(n, bool) or n < 1 for n in k):
        raise InputError(f"k must be at least 1, got {list(k)}")
    for number, (row, right) in enumerate(zip(scores, targets, strict=True)):
        if row.dim() != 1 or right.shape != row.shape or right.dtype != torch.bool or not bool(right.any()):
            raise RowError("needs scores (C,) and bool targets (C,), one of them True", row=f"query {number}")
        if bool((torch.isnan(row) | torch.isposinf(row)).any()):
            raise RowError("has a score that is NaN or infinite", row=f"query {number}")
        yield row.detach().double().cpu(), right.cpu()


def _places(chosen: Tensor, every: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of `every` stand before each of `chosen`, and how many share its score."""
    ordered = np.sort(-every.numpy())
    first, last = (np.searchsorted(ordered, -chosen.numpy(), side=side) for side in ("left", "right"))
    return first, last - first
