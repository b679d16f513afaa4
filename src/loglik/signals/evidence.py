r"""Answers over evidence: the same pairs of paragraph and answer, asked about in several directions.

A reader that finds an answer in every paragraph is corrected by how likely the paragraph is, how likely the question is
given the answer, and how likely the answer is anyway (arXiv 2203.05115).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.signals.choice import normalised_score
from loglik.signals.thinksum import mixture_kind

__all__ = [
    "AnswerScores",
    "noisy_channel",
    "normalise_answer",
    "rag_marginal",
    "retrieval_log_probs",
]


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
