"""Likelihoods of right answers: what sampling would say of knowledge, without samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import EncodedText, TextEncoder
from loglik.models.protocol import ChainRule, require
from loglik.signals.detection import checked_pairs

__all__ = ["AnswerLikelihoods", "answer_likelihoods", "check_questions", "known_probability"]

_ROWS = 64  # prompts per call of `next_log_probs`


@dataclass(frozen=True, slots=True)
class AnswerLikelihoods:
    """Right answers of N questions under one prompt each.

    Args:
        likelihood: (N,) log p of the answer's tokens. What a perturbing prompt takes away is a difference of two.
        tempered: (N,) the same of sampling at a temperature, token by token.
        greedy: (N,) bool, whether greedy decoding writes the answer (ties count).
    """

    likelihood: LogLikelihood
    tempered: LogLikelihood
    greedy: Tensor


@torch.no_grad()
def answer_likelihoods(
    model: Any, prompts: Sequence[str], answers: Sequence[str | Sequence[str]], *, temperature: float = 0.5
) -> AnswerLikelihoods:
    r"""Log-probability that a model's answer begins with the right one, as it is and at a temperature.

    .. math:: a_T = \sum_t \Bigl( \frac{z_{y_t}}{T} - \log \sum_v e^{z_v / T} \Bigr)

    Args:
        model: gives next-token distributions, and has a tokenizer.
        prompts: N prompts.
        answers: what follows each, with its leading space; tokenised together with the prompt. Of aliases, the
            probability that the answer begins with any: one that begins with another adds nothing.
        temperature: T.

    Returns:
        float64 values, exact for a model with a chain rule; with terms per token where no question has aliases.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, numbers that do not pair, or a
            temperature out of range.
        RowError: for an empty prompt or answer, or one that cannot be tokenised.

    Source: the likelihood form of arXiv 2410.22071.
    """
    chain = require(model, ChainRule, "scoring answers")  # type: ignore[type-abstract]
    check_questions(answers, prompts=prompts)
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    encoder = TextEncoder(getattr(model, "tokenizer", None), layout=getattr(model, "layout", "causal"))
    rows: list[list[int]] = []
    starts: list[int] = []
    owners: list[int] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        aliases = [answer] if isinstance(answer, str) else list(dict.fromkeys(answer))
        kept: list[tuple[list[int], int]] = []
        for found in encoder.encode_all([(prompt, alias) for alias in aliases]):
            if not isinstance(found, EncodedText):
                raise found.at(f"question {number}")
            kept.append((found.prefix + found.content, len(found.prefix) + found.scored_from))
        for row, start in _no_continuations(kept):
            rows.append(row)
            starts.append(start)
            owners.append(number)
    terms, cooled, scored, first = _forced(chain, rows, starts, temperature)
    kind, unit = getattr(model, "kind", Kind.EXACT), getattr(model, "unit", Unit.TOKEN)
    made = [LogLikelihood.from_per_unit(values, scored, kind=kind, unit=unit) for values in (terms, cooled)]
    if len(rows) == len(prompts):
        return AnswerLikelihoods(made[0], made[1], first)
    groups = [[i for i, owner in enumerate(owners) if owner == number] for number in range(len(prompts))]
    pooled = []
    for each in made:
        value = torch.stack([each.value[group].logsumexp(0) for group in groups])
        likeliest = [group[int(each.value[group].argmax())] for group in groups]
        pooled.append(LogLikelihood(value, kind, unit, each.num_units[likeliest]))
    return AnswerLikelihoods(pooled[0], pooled[1], torch.stack([first[group].any() for group in groups]))


def known_probability(
    tempered: LogLikelihood, greedy: Tensor | ArrayLike, *, samples: int = 5
) -> tuple[Tensor, Tensor]:
    r"""Probability of the labels known and unknown, over the samples that `knowledge_labels` would draw.

    .. math:: P(\text{known}) = g\, p_T^S, \qquad P(\text{unknown}) = (1 - g)(1 - p_T)^S

    where g is whether the greedy answer is right and :math:`p_T` the probability of a right sample.

    Args:
        tempered: (N,) log-probability of the right answer at the sampling temperature; of aliases, the logsumexp.
        greedy: (N,) bool.
        samples: S.

    Returns:
        (N,) and (N,), float64 in [0, 1].

    Raises:
        InputError: for unequal lengths, flags that are not 0 or 1, or a number of samples below 0.
        RowError: for a value that is no log-probability.

    Source: the likelihood form of arXiv 2410.22071. Exact for the string of the answer; containment counts more.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise InputError(f"samples must be at least 0, got {samples!r}")
    value = tempered.value.detach().double()
    bad = (~(value <= 1e-6)).nonzero().flatten()
    if len(bad):
        raise RowError(f"{float(value[bad[0]])} is no log-probability", row=f"row {int(bad[0])}")
    _, flags = checked_pairs(value, greedy, ("tempered", "greedy"))
    p, g = value.exp().clamp_max(1.0).cpu(), torch.from_numpy(flags).double()
    return g * p**samples, (1 - g) * (1 - p) ** samples


def check_questions(answers: Sequence[Any], **prompts: Sequence[str]) -> None:
    """Refuse prompts and answers that do not pair.

    Raises:
        InputError: for unequal numbers, or none.
        RowError: for an empty prompt or answer.
    """
    for name, texts in prompts.items():
        if isinstance(texts, str) or len(texts) != len(answers) or not len(answers):
            raise InputError(f"{name} must be as many prompts as there are answers, {len(answers)}, and at least one")
        for number, text in enumerate(texts):
            if not text:
                raise RowError(f"its prompt in {name} is empty", row=f"question {number}")
    for number, answer in enumerate(answers):
        aliases = [answer] if isinstance(answer, str) else list(answer)
        if not aliases or not all(alias.strip() for alias in aliases):
            raise RowError("its answer is empty: every text would contain it", row=f"question {number}")


def _no_continuations(rows: Sequence[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    """Rows of tokens of which none begins with another."""
    kept: list[tuple[list[int], int]] = []
    for row, start in sorted(rows, key=lambda pair: len(pair[0])):
        if not any(row[: len(short)] == short for short, _ in kept):
            kept.append((row, start))
    return kept


def _forced(
    chain: ChainRule, rows: list[list[int]], starts: list[int], temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, T) log-probabilities of each row's tokens from its start, plain and tempered; where; and (N,) if greedy."""
    places = [(i, t) for i, (row, start) in enumerate(zip(rows, starts, strict=True)) for t in range(start, len(row))]
    width = max(len(row) for row in rows)
    terms, cooled = torch.zeros(2, len(rows), width, dtype=torch.float64)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    first = torch.ones(len(rows), dtype=torch.bool)
    for begin in range(0, len(places), _ROWS):
        part = places[begin : begin + _ROWS]
        batch = TokenBatch.from_lists([rows[i][:t] for i, t in part], starts=[starts[i] for i, _ in part])
        table = chain.next_log_probs(batch).double().cpu()
        for (i, t), plain, cold in zip(part, table, (table / temperature).log_softmax(-1), strict=True):
            token = rows[i][t]
            terms[i, t], cooled[i, t], scored[i, t] = plain[token], cold[token], True
            first[i] &= bool(plain[token] >= plain.max())
    return terms, cooled, scored, first
