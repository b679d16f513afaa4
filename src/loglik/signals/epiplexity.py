r"""How much of a data set can be learned, and how much is noise, for a learner of bounded compute?

The shortest two-part code of the data by models that fit a compute budget splits its bits into those of the model
(epiplexity :math:`S_T`, structure) and those of the data given the model (time-bounded entropy :math:`H_T`, noise).
Constant data and random data both have no structure; entropy alone cannot tell random from learnable.

Both estimators read what any training loop records. `prequential_code` takes the area of the one-epoch training loss
above its final value. `requential_code` takes the divergences of a student that learns from a teacher's samples: a code
from which the student can be rebuilt. Fresh data, losses before the update, a constant learning rate; the tokens that
count are those that carry loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.tokens import widened

__all__ = [
    "CodeLength",
    "Epiplexity",
    "at_budget",
    "code_compute",
    "epiplexity_frontier",
    "prequential_code",
    "requential_code",
    "require_positive",
    "step_divergence",
]

_LN2 = math.log(2)


@dataclass(frozen=True, slots=True)
class Epiplexity:
    """A two-part code of a data set: totals, not per token.

    Args:
        structure: bits of the model, S.
        entropy: bits of the data given the model, H.
        compute: FLOPs to train the model and read the data once; infinite for the limit of a scaling law.
        parameters: of the model; infinite likewise.
        tokens: it was trained on.
    """

    structure: float
    entropy: float
    compute: float
    parameters: float
    tokens: float

    @property
    def total(self) -> float:
        """Bits of both parts."""
        return self.structure + self.entropy


def code_compute(parameters: float, tokens: float, data_tokens: float) -> float:
    r"""FLOPs of a two-part code, :math:`6 N D + 2 N \mathcal D`: training, and one reading of the data.

    Raises:
        InputError: for a number that is not positive and finite.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("data_tokens", data_tokens)):
        require_positive(name, value)
    return 6.0 * parameters * tokens + 2.0 * parameters * data_tokens


@dataclass(frozen=True, slots=True)
class CodeLength:
    """Bits of a model, from how it was trained.

    Args:
        model: (1,) bits of the model. A prequential one may be negative where the loss rose.
        stream: (1,) bits of the training stream, coded while learning; None for the requential code, whose stream
            nobody keeps.
        final: (1,) log-likelihood per token of the final model on fresh data, nats.
        tokens: trained on.
        method: ``prequential`` or ``requential``.
    """

    model: Measurement
    stream: Measurement | None
    final: LogLikelihood
    tokens: int
    method: Literal["prequential", "requential"]

    @property
    def bits_per_token(self) -> float:
        """Of fresh data given the final model."""
        return -float(self.final.value) / _LN2

    def two_part(self, *, parameters: float, data_tokens: float) -> Epiplexity:
        """The code of a data set of `data_tokens` tokens, by a model of this many parameters.

        Raises:
            InputError: for a number that is not positive and finite.
        """
        compute = code_compute(parameters, self.tokens, data_tokens)
        return Epiplexity(
            self.model.item(), self.bits_per_token * data_tokens, compute, float(parameters), float(self.tokens)
        )


def prequential_code(curve: LogLikelihood, *, final: LogLikelihood | None = None, tail: float = 0.05) -> CodeLength:
    r"""Bits that a model learned, as the area of its training loss above the final loss.

    .. math:: S = \frac{1}{\ln 2} \sum_i n_i (\ell_i - \ell_M), \qquad
              \frac{1}{\ln 2} \sum_i n_i \ell_i = S + \frac{D\, \ell_M}{\ln 2}

    The stream's bits are those of a real code, which updates the model as it goes. The model's are an estimate: what
    was paid beyond the final model's price.

    Args:
        curve: a row per training step, in order: the log-likelihood of the step's tokens BEFORE the update, and their
            number. The data must be fresh (one epoch), or it is no code.
        final: any number of rows of held-out data under the final (or averaged) weights, which give the final loss;
            if None it is that of the last steps.
        tail: share of the steps that count as last, in (0, 1].

    Returns:
        Labelled bits. The model's standard error is the final loss's, times the tokens: it decides how far from zero is
        zero. It is missing where one row alone gives the final loss.

    Raises:
        InputError: for no steps, or a tail out of range.
        RowError: for a step without tokens, or a log-likelihood that is not finite.

    Source: arXiv 2601.03220.
    """
    if not 0 < tail <= 1:
        raise InputError(f"tail must be a share of the steps above 0 and at most 1, got {tail}")
    _check_rows(curve, "step")
    last = curve[-max(1, math.ceil(tail * len(curve) * (1 - 1e-12))) :] if final is None else final
    mean, error = _per_token(last)
    tokens = int(curve.num_units.sum())
    nats = -float(curve.value.detach().double().sum())
    bits = (nats + tokens * float(mean.value)) / _LN2
    exact = curve.kind is Kind.EXACT and last.kind is Kind.EXACT
    stderr = None if error is None else torch.tensor([error * tokens / _LN2], dtype=torch.float64)
    return CodeLength(
        Measurement(_one(bits), Kind.ESTIMATE if exact else Kind.SURROGATE, "epiplexity_bits", stderr),
        Measurement(_one(nats / _LN2), -curve.kind, "stream_bits"),
        mean,
        tokens,
        "prequential",
    )


def step_divergence(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Divergence of a step of requential training, summed over its positions.

    .. math:: \sum_t \sum_v p^t(v \mid z_{<t}) \bigl[\log p^t(v \mid z_{<t}) - \log p^s(v \mid z_{<t})\bigr]

    The prefixes z are sampled from the teacher, and the student is the one before its update on them.

    Args:
        teacher_logits: (..., V), any floating dtype.
        student_logits: (..., V) at the same positions.
        mask: (...) bool, True at the positions that carry loss; all if None.

    Returns:
        () nats, float64, never below 0; no gradient.

    Raises:
        InputError: for other shapes, logits that are no distribution, or a token that the teacher can say and the
            student cannot.

    Source: arXiv 2601.03220 (whose code adds 1e-9 inside the logarithm; this one does not).
    """
    if teacher_logits.shape != student_logits.shape or not teacher_logits.dim():
        shapes = f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        raise InputError(f"teacher and student must have logits (..., V) of the same positions, got {shapes}")
    if mask is not None and (mask.shape != teacher_logits.shape[:-1] or mask.dtype != torch.bool):
        raise InputError(
            f"mask must be bool of shape {tuple(teacher_logits.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    teacher, student = (widened(x.detach()).log_softmax(-1) for x in (teacher_logits, student_logits))
    ratio = torch.where(teacher == -torch.inf, 0.0, teacher.exp() * (teacher - student))
    each = ratio.sum(-1).clamp_min(0.0)
    each = each if mask is None else each.masked_fill(~mask, 0.0)
    if not bool(torch.isfinite(each).all()):
        where = (~torch.isfinite(each)).nonzero()[0].tolist()
        raise InputError(
            f"the divergence at position {where} is {float(each[tuple(where)])}: mend the logits, or let the student "
            "give every token of the teacher some probability"
        )
    return each.sum(dtype=torch.float64)


def requential_code(
    divergences: Tensor, tokens: Tensor, final: LogLikelihood, *, overhead: bool = False, constant: float = 4.0
) -> CodeLength:
    r"""Bits from which a student can be rebuilt that learned from its teacher's samples alone.

    .. math:: S = \frac{1}{\ln 2} \sum_i K_i \quad \Bigl[ + \sum_i \log_2 \Bigl(1 + \frac{K_i}{\ln 2}\Bigr) + c \Bigr]

    A decoder that has the student regenerates the teacher's i-th batch by relative-entropy coding at the cost of
    :math:`K_i` nats and the overhead in brackets, and trains the student on it. The student's teacher is not paid for.

    Args:
        divergences: (S,) :math:`K_i` of each step, nats, summed over its tokens (`step_divergence`).
        tokens: (S,) sampled tokens of each step that carry loss.
        final: any number of rows of REAL held-out data under the final student.
        overhead: whether to add that of coding each step's batch as one message.
        constant: c in bits, per step.

    Returns:
        Labelled bits: an upper bound with the overhead, an estimate of it without.

    Raises:
        InputError: for shapes that do not fit, no steps, a divergence that is negative or not finite, or a step without
            tokens.
        RowError: for a row of `final` without tokens, or a log-likelihood that is not finite.

    Source: arXiv 2601.03220; the overhead 1701.02827.
    """
    if divergences.dim() != 1 or tokens.shape != divergences.shape or not len(divergences):
        shapes = f"{tuple(divergences.shape)} and {tuple(tokens.shape)}"
        raise InputError(f"divergences and tokens must have shape (S,) with a step at least, got {shapes}")
    nats = divergences.detach().double().cpu()
    for name, bad in (("divergence", ~((nats >= 0) & torch.isfinite(nats))), ("number of tokens", ~(tokens.cpu() > 0))):
        if bool(bad.any()):
            step = int(bad.nonzero()[0])
            value = float((nats if name == "divergence" else tokens)[step])
            raise InputError(f"the {name} of step {step} is {value:g}: it must be {_RULES[name]}")
    if not 0 <= constant < math.inf:
        raise InputError(f"constant must be at least 0 bits and finite, got {constant}")
    bits = float(nats.sum()) / _LN2
    if overhead:
        bits += float((1 + nats / _LN2).log2().sum()) + constant * len(nats)
    mean, _ = _per_token(final)
    kind = Kind.UPPER_BOUND if overhead else Kind.ESTIMATE
    return CodeLength(Measurement(_one(bits), kind, "epiplexity_bits"), None, mean, int(tokens.sum()), "requential")


def epiplexity_frontier(points: Sequence[Epiplexity]) -> tuple[Epiplexity, ...]:
    """The falling part of the lower convex hull of total bits against compute.

    Structure and entropy of a compute budget are read off these points; those above the hull spend compute or bits for
    nothing. Take every run (size of model) at every checkpoint.

    Args:
        points: codes of ONE data set.

    Returns:
        The points on the hull by rising compute and falling total.

    Raises:
        InputError: for no points, or a point that is not finite.

    Source: arXiv 2601.03220.
    """
    if not points:
        raise InputError("there are no points: give the code of at least one run")
    bad = next((i for i, p in enumerate(points) if not math.isfinite(p.total) or not math.isfinite(p.compute)), None)
    if bad is not None:
        raise InputError(f"point {bad} has {points[bad].total} bits at compute {points[bad].compute}: leave it out")
    hull: list[Epiplexity] = []
    for point in sorted(points, key=lambda p: (p.compute, p.total)):
        if hull and point.total >= hull[-1].total:
            continue
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def at_budget(frontier: Sequence[Epiplexity], compute: float = math.inf) -> Epiplexity:
    """The code that a budget of compute should choose: the last point of the frontier that it pays for.

    Args:
        frontier: from `epiplexity_frontier`.
        compute: FLOPs; infinite for the shortest code of all.

    Raises:
        InputError: for no points, a budget that is not positive, or one that pays for none of them.
    """
    if not frontier:
        raise InputError("there are no points: give the code of at least one run")
    if not compute > 0:
        raise InputError(f"the budget must be positive, got {compute}")
    paid = [point for point in frontier if point.compute <= compute]
    if not paid:
        raise InputError(
            f"a budget of {compute:.4g} FLOPs pays for no point of the frontier, whose cheapest costs "
            f"{frontier[0].compute:.4g}: give more, or train smaller models"
        )
    return paid[-1]


_RULES = {"divergence": "at least 0 and finite", "number of tokens": "positive"}


def require_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite, by its name."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise InputError(f"{name} must be positive and finite, got {value}")


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _check_rows(rows: LogLikelihood, name: str) -> None:
    if not len(rows):
        raise InputError(f"there are no {name}s: record at least one")
    if rows.kind is Kind.UNNORMALIZED:
        raise InputError("a code length needs normalised log-likelihoods, and these have an unknown constant")
    bad = (~torch.isfinite(rows.value)).nonzero().flatten()
    if len(bad):
        raise RowError(f"the log-likelihood is {float(rows.value[bad[0]])}", row=f"{name} {int(bad[0])}")
    empty = (rows.num_units <= 0).nonzero().flatten()
    if len(empty):
        raise RowError("has no scored token: leave it out", row=f"{name} {int(empty[0])}")


def _per_token(rows: LogLikelihood) -> tuple[LogLikelihood, float | None]:
    """The mean over all tokens as one row, and its standard error over rows (that of a ratio), if there are two."""
    _check_rows(rows, "row")
    value, units = rows.value.detach().double().cpu().numpy(), rows.num_units.cpu().double().numpy()
    mean = value.sum() / units.sum()
    label = LogLikelihood(_one(mean), rows.kind, rows.unit, torch.ones(1, dtype=torch.long))
    if len(value) < 2:
        return label, None
    off = value - mean * units
    return label, float(np.sqrt(len(value) / (len(value) - 1) * (off**2).sum()) / units.sum())


def _turns_up(a: Epiplexity, b: Epiplexity, c: Epiplexity) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.total - a.total) * (c.compute - a.compute) >= (c.total - a.total) * (b.compute - a.compute)
