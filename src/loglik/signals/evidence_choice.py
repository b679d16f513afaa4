r"""Which answer over several passages: every way to combine the directions of `loglik.signals.reading`.

Without evidence, by the best passage, by the sum over passages (RAG), by the noisy channel, by a product of experts
with given weights or with weights fitted on other questions (arXiv 2203.05115).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.signals.evidence import noisy_channel, normalise_answer, rag_marginal
from loglik.signals.thinksum import fit_weights, product_of_experts

__all__ = ["EvidenceTable", "FittedProduct", "agreement", "choose_answers", "cross_fit_product", "join"]

_EXPERTS = ("retrieval", "direct", "question", "answer")


@dataclass(frozen=True, slots=True)
class EvidenceTable:
    """N triples of question, passage and answer with their factors, those of a question together.

    Args:
        factors: by name, (N,) each: ``direct`` log p(a | q, e), ``question`` log p(q | a, e), ``answer`` log p(a | e),
            ``evidence`` log p(q | e), ``closed`` log p(a | q) and ``retrieval`` log p(e | q).
        question: (N,) long, the question of each row, from 0.
        passage: (N,) long, the passage of each row among those of its question.
        answers: (N,) texts.
        retrieval: for each question (n,) log-probabilities of its passages.
    """

    factors: Mapping[str, LogLikelihood]
    question: Tensor
    passage: Tensor
    answers: tuple[str, ...]
    retrieval: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.retrieval)

    def rows(self, question: int) -> list[int]:
        """Row numbers of a question."""
        return [int(i) for i in (self.question == question).nonzero().flatten()]


def join(tables: Sequence[EvidenceTable]) -> EvidenceTable:
    """Several tables as one, their questions one after the other.

    Raises:
        InputError: for no tables.
    """
    if not tables:
        raise InputError("there are no tables to join: give at least one")
    before = np.concatenate([[0], np.cumsum([len(table) for table in tables])[:-1]]).tolist()
    return EvidenceTable(
        {name: LogLikelihood.cat([table.factors[name] for table in tables]) for name in tables[0].factors},
        torch.cat([table.question + start for table, start in zip(tables, before, strict=True)]),
        torch.cat([table.passage for table in tables]),
        tuple(text for table in tables for text in table.answers),
        tuple(one for table in tables for one in table.retrieval),
    )


def choose_answers(
    table: EvidenceTable,
    *,
    weights: Mapping[str, float] | None = None,
    normalise: Callable[[str], str] = normalise_answer,
) -> dict[str, tuple[str, ...]]:
    r"""The answer of each question by every score.

    ``closed`` asks without evidence, ``top_passage`` reads the likeliest passage alone, ``direct`` and ``channel``
    take the best of all passages by :math:`p(a \mid q, e)` and by `noisy_channel`, ``rag`` adds probabilities over
    passages and spellings, ``product`` is the best by `product_of_experts`.

    Args:
        table: from `score_evidence`.
        weights: of the factors in the product; 1 for ``retrieval``, ``direct``, ``question`` and ``answer`` by default,
            and 0 for the others.
        normalise: what counts as the same answer.

    Returns:
        By score, the normalised answers (Q,); of equal scores the first.

    Raises:
        InputError: for weights of unknown factors.
        RowError: for an answer of which normalising leaves nothing, or a question whose factors are no numbers.

    Source: arXiv 2203.05115.
    """
    for row, text in enumerate(table.answers):
        if not normalise(text):
            raise RowError(
                f"normalising leaves nothing of the answer {text!r}: compare answers as they stand",
                row=f"question {int(table.question[row])}",
            )
    direct, factors = table.factors["direct"], table.factors
    top = [int(one.argmax()) for one in table.retrieval]
    best = table.passage == torch.tensor(top)[table.question]
    scores = {
        "closed": factors["closed"].value,
        "top_passage": direct.value.masked_fill(~best, -torch.inf),
        "direct": direct.value,
        "channel": noisy_channel(factors["question"], factors["answer"], factors["evidence"]).value,
        "product": _product(table, weights).value,
    }
    found = {name: tuple(normalise(text) for text in _best(table, values)) for name, values in scores.items()}
    marginal = []
    for number, retrieval in enumerate(table.retrieval):
        rows = table.rows(number)
        texts = [table.answers[row] for row in rows]
        best_first = rag_marginal(direct[rows], retrieval, table.passage[rows], texts, normalise=normalise)
        marginal.append(best_first.answers[0])
    order = ("closed", "top_passage", "direct", "rag", "channel", "product")
    return {name: (found | {"rag": tuple(marginal)})[name] for name in order}


def agreement(chosen: Mapping[str, Sequence[str]]) -> Tensor:
    """(K, K) share of the questions for which two scores choose the same answer.

    Args:
        chosen: by score, answers (Q,) from `choose_answers`.

    Raises:
        InputError: for no questions, or scores with different ones.
    """
    lengths = {len(answers) for answers in chosen.values()}
    if len(lengths) != 1 or not min(lengths):
        raise InputError("chosen must hold the answers to the same questions for each score, at least one")
    table = np.array([list(answers) for answers in chosen.values()], dtype=object)
    return torch.from_numpy((table[:, None] == table[None]).mean(-1).astype(np.float64))


@dataclass(frozen=True, slots=True)
class FittedProduct:
    """A product of experts with fitted weights.

    Args:
        answers: (Q,) normalised, each by weights that were fitted without its question.
        weights: of the factors, fitted on all questions: those to use on others.
    """

    answers: tuple[str, ...]
    weights: dict[str, float]


def cross_fit_product(
    table: EvidenceTable,
    gold: Sequence[Sequence[str]],
    *,
    folds: int = 5,
    experts: Sequence[str] = _EXPERTS,
    normalise: Callable[[str], str] = normalise_answer,
    l2: float = 1e-4,
    seed: int = 0,
) -> FittedProduct:
    """Choose by a product of experts whose weights come from the other questions (cross-fitting).

    Questions none of whose candidates is right teach no weights and are chosen for like the others.

    Args:
        table: from `score_evidence`.
        gold: the right answers of each question, in any spelling.
        folds: parts of the questions; each is chosen for by weights fitted on the others.
        experts: the factors of the product.
        normalise: what counts as the same answer.
        l2: as in `fit_weights`.
        seed: of the random parts.

    Raises:
        InputError: for gold answers that do not pair, folds out of range, an unknown factor, or too few questions with
            a right candidate.

    Source: arXiv 2203.05115 (weights; the folds are ours).
    """
    if len(gold) != len(table) or isinstance(gold, str):
        raise InputError(f"gold must have the right answers of each question: got {len(gold)} for {len(table)}")
    unknown = sorted(set(experts) - set(table.factors))
    if unknown or not experts:
        raise InputError(f"experts must be some of {', '.join(table.factors)}, got {', '.join(experts) or 'none'}")
    if not 2 <= folds <= len(table):
        raise InputError(f"folds must be from 2 to the number of questions, {len(table)}, got {folds}")
    right = [{normalise(text) for text in texts} for texts in gold]
    rows = zip(table.question.tolist(), table.answers, strict=True)
    good = torch.tensor([normalise(text) in right[number] for number, text in rows])
    columns = torch.stack([table.factors[name].value.double() for name in experts], 1)
    part = torch.from_numpy(np.random.default_rng(seed).permutation(len(table)) % folds)[table.question]
    solvable = torch.isin(table.question, table.question[good])

    def fitted(chosen: Tensor) -> Tensor:
        used = chosen & solvable
        if not bool(used.any()):
            raise InputError("weights need questions with a right candidate in more than one fold: give more questions")
        return fit_weights(columns[used], table.question[used], good[used], l2=l2)

    values = torch.empty(len(good), dtype=torch.float64)
    for number in range(folds):
        own = part == number
        values[own] = columns[own] @ fitted(~own)
    whole = fitted(torch.ones_like(solvable)).tolist()
    answers = tuple(normalise(text) for text in _best(table, values))
    return FittedProduct(answers, dict(zip(experts, whole, strict=True)))


def _product(table: EvidenceTable, weights: Mapping[str, float] | None) -> LogLikelihood:
    given = dict.fromkeys(_EXPERTS, 1.0) if weights is None else dict(weights)
    return product_of_experts(table.factors, dict.fromkeys(table.factors, 0.0) | given)


def _best(table: EvidenceTable, values: Tensor) -> list[str]:
    """The text of the best row of each question."""
    found = []
    for number in range(len(table)):
        rows = table.rows(number)
        own = values[rows]
        if not bool(torch.isfinite(own.max())):
            raise RowError("no answer has a probability above 0 and below infinity", row=f"question {number}")
        found.append(table.answers[rows[int(own.argmax())]])
    return found
