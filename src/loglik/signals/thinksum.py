r"""Think and sum: combine many small likelihoods by explicit formulas instead of one long prompt.

A matrix of log-likelihoods has answers in rows and what was thought of (examples, facts, paragraphs, orders) in
columns. A mixture asks whether some column explains the answer, a product or minimum whether all agree
(arXiv 2210.01293). `product_of_experts` weighs named factors instead (arXiv 2203.05115).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import permutations
from operator import add
from typing import Literal

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.score import score

__all__ = [
    "Aggregated",
    "Constraint",
    "OrderPosterior",
    "aggregate",
    "choose_by_column",
    "fill_templates",
    "fit_weights",
    "mixture_kind",
    "order_posterior",
    "product_of_experts",
    "score_matrix",
]

Floats = NDArray[np.float64]
How = Literal["mixture", "product", "min", "max"]
Constraint = Callable[[Sequence[int]], bool]
_MOST_OBJECTS = 8


def score_matrix(
    model: TextModel, rows: Sequence[str], columns: Sequence[str], pair: Callable[[str, str], tuple[str, str]]
) -> LogLikelihood:
    """Score every row with every column.

    Args:
        model: any text model.
        rows: A answers or items.
        columns: W examples, facts or substitutions.
        pair: makes the (prompt, completion) that is scored of a row and a column; what differs between rows must be
            scored, or be normalised over rows by `aggregate`.

    Returns:
        (A W,) nats, the columns of a row together; what `aggregate` takes.

    Raises:
        InputError: for no rows or no columns.
        RowError: for a pair that cannot be scored.

    Source: arXiv 2210.01293.
    """
    if isinstance(rows, str) or isinstance(columns, str) or not len(rows) or not len(columns):
        raise InputError("rows and columns must be lists of at least one text each")
    return score(model, [pair(row, column) for row in rows for column in columns])


def fill_templates(prompt: str, completion: str) -> Callable[[str], Callable[[str, str], tuple[str, str]]]:
    """The `pair` of `score_matrix` from two texts with ``{think}``, ``{candidate}`` and ``{question}``.

    Args:
        prompt: what stands before the scored text.
        completion: what is scored; one of the two names ``{candidate}``, one ``{think}``.

    Returns:
        From a question the function of a candidate (row) and a thought (column).

    Raises:
        InputError: for a text that names anything else, or two that leave the candidate or the thought out.

    Example:
        >>> fill_templates("{question} {think} is", " {candidate}")("In the sentence, a wug")("a bird", "a sparrow")
        ('In the sentence, a wug a sparrow is', ' a bird')
    """
    named: set[str] = set()
    for text in (prompt, completion):
        try:
            named |= {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError:
            raise InputError(f"{text!r} has a brace that is not closed: double it if it is meant as it is") from None
    if not {"think", "candidate"} <= named <= {"think", "candidate", "question"}:
        raise InputError(
            "the prompt and the completion must name {think} and {candidate}, and may name {question}: got "
            f"{prompt!r} and {completion!r}"
        )

    def for_question(question: str) -> Callable[[str, str], tuple[str, str]]:
        def pair(candidate: str, think: str) -> tuple[str, str]:
            names = {"think": think, "candidate": candidate, "question": question}
            return prompt.format(**names), completion.format(**names)

        return pair

    return for_question


def choose_by_column(
    likelihood: LogLikelihood, columns: int, *, per_unit: bool = False, odd: bool = False
) -> list[int]:
    """The row that each column alone chooses: what summing has to be better than.

    Args:
        likelihood: (A W,), the columns of a row together.
        columns: W.
        per_unit: as in `aggregate`.
        odd: the least likely row instead of the likeliest.

    Raises:
        InputError: for a shape that does not fit.
        RowError: as `aggregate`.

    Source: arXiv 2210.01293.
    """
    if isinstance(columns, bool) or columns < 1 or len(likelihood) % columns or not len(likelihood):
        raise InputError(f"{len(likelihood)} log-likelihoods are no table of {columns} columns")
    found = [aggregate(likelihood[w::columns], 1, normalise=False, per_unit=per_unit) for w in range(columns)]
    return [one.odd if odd else one.best for one in found]


@dataclass(frozen=True, slots=True)
class Aggregated:
    """A rows with their evidence from all columns.

    Args:
        score: (A,) labelled log-score.
        log_probs: (A,) the score, normalised over rows.
        best: the row of the highest score.
        odd: the row of the lowest: the odd one out, where columns are facts and rows items.
    """

    score: Measurement
    log_probs: Tensor
    best: int
    odd: int


def aggregate(
    likelihood: LogLikelihood,
    columns: int,
    *,
    how: How = "mixture",
    normalise: bool = True,
    per_unit: bool = False,
    weights: Tensor | None = None,
) -> Aggregated:
    r"""Sum a matrix of log-likelihoods :math:`L_{aw}` to a score for each row.

    .. math:: \text{mixture: } \log \sum_w \lambda_w\, e^{\hat L_{aw}}, \qquad
              \text{product: } \sum_w \lambda_w \hat L_{aw}, \qquad
              \text{min, max: over } w, \qquad
              \hat L_{aw} = L_{aw} - \log \sum_{a'} e^{L_{a'w}}

    Without normalising, :math:`\hat L = L`, and a product is governed by how likely each text is anywhere.

    Args:
        likelihood: (A W,), the columns of a row together (`score_matrix`).
        columns: W.
        how: ``mixture`` (some column explains the row), ``product`` (all columns agree, a geometric mean), ``min`` or
            ``max``.
        normalise: over the rows of each column first.
        per_unit: use nats per token, so that long texts do not count for more; they are then no probabilities of
            texts.
        weights: (W,) of the columns, not negative; scaled to sum 1, equal by default. Where columns were sampled,
            duplicates raise a weight: leave them out if that is not meant.

    Raises:
        InputError: for shapes that do not fit, unknown options, or weights for a minimum or maximum.
        RowError: for a value that is no log-likelihood, a column that gives every row probability 0, or a result
            that does so.

    Source: arXiv 2210.01293.
    """
    if how not in ("mixture", "product", "min", "max"):
        raise InputError(f"how must be one of mixture, product, min, max, got {how!r}")
    if isinstance(columns, bool) or columns < 1 or len(likelihood) % columns or not len(likelihood):
        raise InputError(f"{len(likelihood)} log-likelihoods are no table of {columns} columns")
    bad = likelihood.non_finite_rows()
    if bad:
        raise RowError("is no number below infinity", row=f"row {bad[0] // columns}, column {bad[0] % columns}")
    found = likelihood
    if per_unit:
        empty = (likelihood.num_units <= 0).nonzero().flatten().tolist()
        if empty:
            raise RowError("has no scored unit", row=f"row {empty[0] // columns}, column {empty[0] % columns}")
        found = likelihood.mean_per_unit()
    table = found.value.reshape(-1, columns)
    if normalise:
        lost = torch.isinf(table.amax(0)).nonzero().flatten()
        if len(lost):
            raise RowError("gives every row probability 0: leave it out or smooth", row=f"column {int(lost[0])}")
        table = table.log_softmax(0)
    share = _shares(weights, columns, how).to(table)
    if how == "mixture":
        total = (table + share.log()).logsumexp(1)
    elif how == "product":
        # a weight of 0 leaves a column out, whatever it says: 0 times minus infinity would be NaN
        total = (
            torch.where(share > 0, table * share, 0.0).masked_fill((share > 0) & torch.isinf(table), -torch.inf).sum(1)
        )
    else:
        total = table.amin(1) if how == "min" else table.amax(1)
    if not bool(torch.isfinite(total.amax())):
        raise RowError("no row is left with a probability: smooth, or take the mixture", row=f"all {len(table)} rows")
    kind = _kind(found, how, normalised=normalise)
    values = total.detach()
    measured = Measurement(total, kind, f"{how}_score")
    return Aggregated(measured, total.log_softmax(0), int(values.argmax()), int(values.argmin()))


def mixture_kind(likelihood: LogLikelihood) -> Kind:
    r"""What :math:`\log \sum e^{\ell}` of these values promises; it is convex, so sampled lower bounds give none."""
    if likelihood.kind is Kind.UNNORMALIZED:
        return Kind.SURROGATE
    sampled = likelihood.stderr is not None or likelihood.draws is not None
    return Kind.SURROGATE if likelihood.kind is Kind.LOWER_BOUND and sampled else likelihood.kind


def _kind(likelihood: LogLikelihood, how: How, *, normalised: bool) -> Kind:
    if normalised:  # the rows of a column are compared with each other: an unknown constant cancels
        return Kind.EXACT if likelihood.kind is Kind.UNNORMALIZED else likelihood.kind - likelihood.kind
    kind = mixture_kind(likelihood)
    if how == "product":
        return Kind.SURROGATE if likelihood.kind is Kind.UNNORMALIZED else likelihood.kind
    if how == "min":  # concave: sampled upper bounds give none, lower bounds stay
        sampled = likelihood.stderr is not None or likelihood.draws is not None
        plain = Kind.SURROGATE if likelihood.kind is Kind.UNNORMALIZED else likelihood.kind
        return Kind.SURROGATE if plain is Kind.UPPER_BOUND and sampled else plain
    return kind


def _shares(weights: Tensor | None, columns: int, how: How) -> Tensor:
    if weights is None:
        return torch.full((columns,), 1 / columns, dtype=torch.float64)
    if how in ("min", "max"):
        raise InputError(f"how={how} takes no weights: leave columns out instead")
    fits = weights.shape == (columns,) and bool((torch.isfinite(weights) & (weights >= 0)).all())
    if not fits or not float(weights.sum()) > 0:
        raise InputError(f"weights must be {columns} finite numbers, none negative and not all 0")
    return weights.double() / weights.sum()


# ------------------------------------------------------------------------------------------------------------- orders
@dataclass(frozen=True, slots=True)
class OrderPosterior:
    """Probabilities of orders of n objects: `positions` (n!, n), where each object stands, and `log_probs` (n!,)."""

    positions: Tensor
    log_probs: Tensor

    def probability(self, holds: Constraint) -> float:
        """Total probability of the orders for which `holds`, a function of the positions, is true."""
        chosen = torch.tensor([bool(holds(row)) for row in self.positions.tolist()])
        return float(self.log_probs[chosen].exp().sum())

    def marginal(self) -> Tensor:
        """(n, n) probability of each object (row) at each position (column)."""
        places = torch.nn.functional.one_hot(self.positions).double()
        return (places * self.log_probs.exp()[:, None, None]).sum(0)


def order_posterior(
    constraints: Sequence[Sequence[Constraint]], log_probs: Sequence[Tensor], objects: int, *, floor: float = 1e-3
) -> OrderPosterior:
    r"""Posterior over the orders of n objects, when each statement means one of several constraints.

    .. math:: p(\pi) \propto \prod_t \max\Bigl( \epsilon, \sum_k p(k \mid t)\, 1[\pi \text{ satisfies } k] \Bigr)

    Args:
        constraints: for each statement its readings, functions of the positions of the objects (from 0).
        log_probs: for each statement (K,) log-likelihoods of its readings, normalised here.
        objects: n, from 2 to 8.
        floor: :math:`\epsilon` in [0, 1): a statement that was misread cannot rule out everything.

    Raises:
        InputError: for numbers that do not fit or are out of range, or statements that no order satisfies.
        RowError: for a statement whose readings do not pair with its log-probabilities, or have none.

    Source: arXiv 2210.01293 (recipe as in its text; the floor is ours).
    """
    if isinstance(objects, bool) or not 2 <= objects <= _MOST_OBJECTS:
        raise InputError(f"objects must be from 2 to {_MOST_OBJECTS}, got {objects}: all orders are gone through")
    if not 0 <= floor < 1:
        raise InputError(f"floor must lie in [0, 1), got {floor}")
    if len(constraints) != len(log_probs):
        raise InputError(
            f"constraints and log_probs must pair by statement: got {len(constraints)} and {len(log_probs)}"
        )
    orders = list(permutations(range(objects)))
    total = torch.zeros(len(orders), dtype=torch.float64)
    for number, (readings, scores) in enumerate(zip(constraints, log_probs, strict=True)):
        if scores.shape != (len(readings),) or not len(readings) or not bool(torch.isfinite(scores.max())):
            raise RowError("needs a log-probability for each reading, one of them possible", row=f"statement {number}")
        satisfied = torch.tensor([[bool(reading(order)) for reading in readings] for order in orders])
        chance = (satisfied * scores.double().softmax(0)).sum(1)
        total += chance.clamp(min=floor).log()
    if not bool(torch.isfinite(total.max())):
        raise InputError("no order satisfies the statements: raise the floor above 0")
    return OrderPosterior(torch.tensor(orders), total.log_softmax(0))


# ------------------------------------------------------------------------------------------------------------ experts
def product_of_experts(
    factors: Mapping[str, LogLikelihood], weights: Mapping[str, float] | None = None
) -> LogLikelihood:
    r"""Log-linear combination :math:`\sum_m \lambda_m \log p_m` of factors of the same (paragraph, answer) pairs.

    Args:
        factors: by name, (N,) each, such as ``direct``, ``channel``, ``answer``, ``retrieval``.
        weights: by name, 1 by default; 0 leaves a factor out.

    Raises:
        InputError: for rows that do not pair, unknown names, or no factor with a weight.

    Source: arXiv 2203.05115 (which factors and weights the paper takes is not stated: choose weights by `fit_weights`).
    """
    unknown = sorted(set(weights or ()) - set(factors))
    if unknown:
        raise InputError(
            f"weights name {unknown[0]!r}, which is no factor: the factors are {', '.join(sorted(factors))}"
        )
    if len({len(factor) for factor in factors.values()}) > 1:
        raise InputError(f"factors must have a row per pair: got { {n: len(f) for n, f in factors.items()} }")
    chosen = {name: float((weights or {}).get(name, 1.0)) for name in factors}
    if any(not math.isfinite(weight) for weight in chosen.values()):
        raise InputError(f"weights must be finite, got {chosen}")
    parts = [replace(factors[n], per_unit=None, mask=None) * w for n, w in chosen.items() if w != 0]
    if not parts:
        raise InputError("there must be at least one factor with a weight other than 0")
    return reduce(add, parts)


def fit_weights(factors: Tensor, question: Tensor, gold: Tensor, *, l2: float = 1e-4) -> Tensor:
    r"""Weights of a product of experts that make the gold candidates of a validation set likeliest.

    .. math:: \max_\lambda \frac{1}{Q} \sum_q \log \sum_{i \in \text{gold}_q} \mathrm{softmax}_q(F \lambda)_i
              - \frac{l_2}{2} |\lambda|^2

    Args:
        factors: (N, M) log-factors of the candidates of all questions, finite.
        question: (N,) the question of each candidate.
        gold: (N,) bool, whether it is right; each question needs one that is.
        l2: of the penalty, at least 0 (without one, separable data drive weights to infinity).

    Returns:
        (M,) weights.

    Raises:
        InputError: for shapes that do not fit or factors that are not finite.
        RowError: for a question without a right candidate: leave it out.

    Source: arXiv 2203.05115.
    """
    if factors.dim() != 2 or question.shape != factors.shape[:1] or gold.shape != question.shape or not len(gold):
        shapes = f"{tuple(factors.shape)}, {tuple(question.shape)} and {tuple(gold.shape)}"
        raise InputError(f"factors (N, M) need question (N,) and gold (N,), got {shapes}")
    if gold.dtype != torch.bool or not bool(torch.isfinite(factors).all()) or not 0 <= l2 < math.inf:
        raise InputError("gold must be bool, factors finite, and l2 at least 0")
    numbers, which = np.unique(question.cpu().numpy(), return_inverse=True)
    right, table = gold.cpu().numpy(), factors.detach().double().cpu().numpy()
    lacking = np.setdiff1d(np.arange(len(numbers)), which[right])
    if len(lacking):
        raise RowError("has no right candidate: leave it out", row=f"question {numbers[lacking[0]]}")

    def by_question(scores: Floats) -> Floats:
        top = np.full(len(numbers), -np.inf)
        np.maximum.at(top, which, scores)
        top = np.where(np.isfinite(top), top, 0.0)
        total: Floats = np.log(np.bincount(which, np.exp(scores - top[which]), len(numbers))) + top
        return total

    def loss(weights: Floats) -> tuple[float, Floats]:
        scores = table @ weights
        masked = np.where(right, scores, -np.inf)
        every, good = by_question(scores), by_question(masked)
        pull = np.exp(masked - good[which]) - np.exp(scores - every[which])
        value = -(good - every).mean() + 0.5 * l2 * float(weights @ weights)
        return value, -(table.T @ pull) / len(numbers) + l2 * weights

    found = scipy.optimize.minimize(loss, np.ones(table.shape[1]), jac=True, method="L-BFGS-B")
    return torch.from_numpy(found.x)
