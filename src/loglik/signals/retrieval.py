r"""Retrieval and reranking by likelihood: of the candidate, of the query, of both, and of answers over evidence.

Candidates are ranked by :math:`\log p(c \mid q)` with their prior taken off, by :math:`\log p(q \mid c)`, or by both
(arXiv 2507.23284); sentences by what they do for the likelihood of a query (arXiv 2403.03956); answers by products of
probabilities in several directions over retrieved paragraphs (arXiv 2203.05115).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import scipy.special
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy
from loglik.signals.choice import Normalise, normalised_score
from loglik.signals.thinksum import mixture_kind

__all__ = [
    "AnswerScores",
    "RetrievalMetrics",
    "backtracing_scores",
    "bidirectional_score",
    "noisy_channel",
    "normalise_answer",
    "query_likelihood",
    "rag_marginal",
    "retrieval_log_probs",
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


# -------------------------------------------------------------------------------------------------- answers on evidence
def retrieval_log_probs(similarity: Tensor, *, temperature: float | None = None, floor: float = 1e-9) -> Tensor:
    r"""Log-probabilities of n paragraphs from similarities: shares :math:`c_i / \sum_j c_j`, or a softmax of c / T.

    Args:
        similarity: (n,) such as TF-IDF cosines; not negative without a temperature.
        temperature: T of the softmax; None: shares.
        floor: added to each similarity before shares are taken, so that none has probability 0.

    Raises:
        InputError: for values that give no distribution, or options out of range.

    Source: arXiv 2203.05115.
    """
    fits = similarity.dim() == 1 and len(similarity) > 0 and bool(torch.isfinite(similarity).all())
    if not fits or (temperature is None and bool((similarity < 0).any())):
        raise InputError("similarity must be a row of finite numbers, none negative unless there is a temperature")
    if temperature is not None:
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        return (similarity.double() / temperature).log_softmax(0)
    if not 0 < floor < math.inf:
        raise InputError(f"floor must be positive and finite, got {floor}")
    raised = similarity.double() + floor
    return (raised / raised.sum()).log()


def noisy_channel(question: LogLikelihood, answer: LogLikelihood, evidence: LogLikelihood) -> LogLikelihood:
    r"""Channel score of pairs of paragraph and answer.

    .. math:: \log p(q \mid a, e) + \log p(a \mid e) - \log p(q \mid e)

    By Bayes' rule this is :math:`\log p(a \mid q, e)` for a coherent joint; prompts of a language model are not one.

    Args:
        question: (N,) log p(q | a, e).
        answer: (N,) log p(a | e).
        evidence: (N,) log p(q | e), of the same question tokens as `question`.

    Raises:
        InputError: for rows that do not pair.
        RowError: where the two likelihoods of the question count other tokens.

    Source: arXiv 2203.05115.
    """
    if not len(question) == len(answer) == len(evidence):
        raise InputError(f"a row per pair is needed: got {len(question)}, {len(answer)} and {len(evidence)}")
    return normalised_score(question, prior=evidence) + replace(answer, per_unit=None, mask=None)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks: what counts as the same answer."""
    bare = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Different answers with their log-probabilities (A,), best first."""

    answers: tuple[str, ...]
    log_prob: Measurement


def rag_marginal(
    direct: LogLikelihood,
    retrieval: Tensor,
    paragraph: Tensor,
    answers: Sequence[str],
    *,
    normalise: Callable[[str], str] = normalise_answer,
) -> AnswerScores:
    r"""Probability of each answer over paragraphs, :math:`\log \sum_i p(e_i \mid q)\, p(a \mid q, e_i)`.

    Probabilities of spellings that `normalise` makes equal are added; a spelling that was generated twice from one
    paragraph counts once.

    Args:
        direct: (N,) log p(answer | question, paragraph).
        retrieval: (n,) log-probabilities of the paragraphs (`retrieval_log_probs`).
        paragraph: (N,) long, the paragraph each answer was scored with.
        answers: (N,) texts.
        normalise: what counts as the same answer.

    Raises:
        InputError: for rows that do not pair, or retrieval probabilities that do not sum to 1.
        RowError: for a row of no paragraph, or a value that is no log-likelihood.

    Source: arXiv 2203.05115.
    """
    if not len(direct) == len(paragraph) == len(answers) or not len(direct):
        raise InputError(f"a row per answer is needed: got {len(direct)}, {len(paragraph)} and {len(answers)}")
    if retrieval.dim() != 1 or not abs(float(retrieval.exp().sum()) - 1) < 1e-4:
        raise InputError("retrieval must be log-probabilities of the paragraphs that sum to 1")
    outside = ((paragraph < 0) | (paragraph >= len(retrieval))).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise RowError(f"names paragraph {int(paragraph[row])} of {len(retrieval)}", row=f"row {row}")
    if direct.non_finite_rows():
        raise RowError("its log-likelihood is no number below infinity", row=f"row {direct.non_finite_rows()[0]}")
    terms: dict[str, list[Tensor]] = {}
    seen: set[Hashable] = set()
    for row, (where, text) in enumerate(zip(paragraph.tolist(), answers, strict=True)):
        if (where, text) not in seen:
            seen.add((where, text))
            terms.setdefault(normalise(text), []).append(direct.value[row] + retrieval[where])
    totals = torch.stack([torch.stack(parts).logsumexp(0) for parts in terms.values()])
    order = totals.argsort(descending=True, stable=True)
    names = list(terms)
    return AnswerScores(
        tuple(names[i] for i in order.tolist()), Measurement(totals[order], mixture_kind(direct), "rag_marginal")
    )


# -------------------------------------------------------------------------------------------------------------- metrics
@dataclass(frozen=True, slots=True)
class RetrievalMetrics:
    """How well targets were ranked, means over Q queries; `reciprocal_rank` (Q,) and `hits` by k (Q,) per query."""

    mrr: float
    accuracy: dict[int, float]
    reciprocal_rank: Tensor
    hits: dict[int, Tensor]


def retrieval_metrics(
    scores: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], *, k: Sequence[int] = (1, 3)
) -> RetrievalMetrics:
    r"""Mean reciprocal rank and top-k accuracy of the best-ranked target of each query.

    Equal scores stand in random order: with m others and n targets tied after g better candidates, the first target
    comes at place g + j with probability :math:`\binom{m + n - j}{n - 1} / \binom{m + n}{n}`, and expectations are
    taken. A scorer that says the same of everything gets what chance gets.

    Args:
        scores: for each of Q queries (C,) scores of its candidates, higher is better; minus infinity: not scored.
        targets: for each query (C,) bool, at least one True.
        k: of the accuracies.

    Raises:
        InputError: for no queries, rows that do not pair, or a k below 1.
        RowError: for a query without a target, or scores that are NaN or infinite.

    Source: arXiv 2403.03956.
    """
    if len(scores) != len(targets) or not len(scores):
        raise InputError(f"scores and targets must pair by query: got {len(scores)} and {len(targets)}")
    if not k or any(isinstance(n, bool) or n < 1 for n in k):
        raise InputError(f"k must be at least 1, got {list(k)}")
    reciprocal: list[float] = []
    hits: dict[int, list[float]] = {n: [] for n in k}
    for number, (row, right) in enumerate(zip(scores, targets, strict=True)):
        if row.dim() != 1 or right.shape != row.shape or right.dtype != torch.bool or not bool(right.any()):
            raise RowError("needs scores (C,) and bool targets (C,), one of them True", row=f"query {number}")
        if bool((torch.isnan(row) | torch.isposinf(row)).any()):
            raise RowError("has a score that is NaN or infinite", row=f"query {number}")
        best = row[right].max()
        above, tied = int((row > best).sum()), row == best
        good = int((tied & right).sum())
        others = int(tied.sum()) - good
        places = np.arange(1, others + 2)
        chances = scipy.special.comb(others + good - places, good - 1) / scipy.special.comb(others + good, good)
        reciprocal.append(float(chances @ (1 / (above + places))))
        for n in k:
            hits[n].append(float(chances[above + places <= n].sum()))
    per_query = {n: torch.tensor(values, dtype=torch.float64) for n, values in hits.items()}
    ranks = torch.tensor(reciprocal, dtype=torch.float64)
    return RetrievalMetrics(float(ranks.mean()), {n: float(v.mean()) for n, v in per_query.items()}, ranks, per_query)
