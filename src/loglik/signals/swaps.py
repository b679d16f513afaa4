r"""Recall, heuristics or guesswork by likelihoods alone: what does an answer lose when its subject is swapped?

How much a prediction loses when the subject, or one part of its name, is swapped (`swap_dependence`,
`name_specificity`), and how far paraphrases agree (`template_consistency`). `likelihood_scenarios` makes kinds of them.
The kinds that prompts and popularity give are in `loglik.signals.scenarios`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.signals.scenarios import Scenario

__all__ = [
    "TemplateConsistency",
    "likelihood_scenarios",
    "name_specificity",
    "swap_dependence",
    "template_consistency",
]


def swap_dependence(
    own: LogLikelihood, swapped: LogLikelihood, *, average: Literal["log", "probability"] = "log"
) -> Measurement:
    r"""What a prediction loses when its subject, or a part of its name, is swapped for others'.

    .. math:: \Delta = \log p(a \mid t(s)) - \frac1S \sum_{s'} \log p(a \mid t(s')) \quad\text{or}\quad
              \log p(a \mid t(s)) - \log \frac1S \sum_{s'} p(a \mid t(s'))

    Near 0 the prompt alone gives the answer. The second form is the pointwise mutual information of subject and answer
    where the swaps are the whole population, s included. Read it beside p(a): swaps of a guess can hit confident wrong
    answers.

    Args:
        own: (N,) log-likelihoods of the predicted answers.
        swapped: (N * S,) of the same answers after S prompts with another subject; those of one prediction together.
        average: of ``log`` probabilities, or of ``probability``.

    Returns:
        (N,) nats, float64, labelled.

    Raises:
        InputError: for numbers that do not pair, or an unknown average.
        RowError: for a value that is not finite (minus infinity is a probability to average).

    Source: derived from the shortcut checks of arXiv 2410.14405.
    """
    if average not in ("log", "probability"):
        raise InputError(f"average must be log or probability, got {average!r}")
    if not len(own) or not len(swapped) or len(swapped) % len(own):
        raise InputError(
            f"each of {len(own)} predictions needs equally many swapped prompts, got {len(swapped)} in all"
        )
    values, others = own.value.detach().double(), swapped.value.detach().double().reshape(len(own), -1)
    mean = others.mean(1) if average == "log" else others.logsumexp(1) - math.log(others.shape[1])
    bad = (~(torch.isfinite(values) & torch.isfinite(mean))).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise RowError(
            f"log p(a) is {float(values[row])} and its mean over swaps {float(mean[row])}: average probabilities, or "
            "leave it out",
            row=f"prediction {row}",
        )
    return Measurement(values - mean, own.kind - swapped.kind, "swap_dependence")


def name_specificity(parts: Tensor) -> Tensor:
    r"""Does the prediction need the whole name? :math:`\min_w \Delta_w / \max_w \Delta_w` over parts, from 0 to 1.

    Recall of a fact needs every part (near 1), a heuristic about names needs one (near 0). Negative dependences count
    as 0, and where no part matters the answer is 0: the prompt gives it.

    Args:
        parts: (N, W) `swap_dependence` of each of W >= 2 parts of the name, nats.

    Returns:
        (N,) in [0, 1].

    Raises:
        InputError: for another shape.
        RowError: for a dependence that is not finite.

    Source: derived from the shortcut checks of arXiv 2410.14405.
    """
    if parts.dim() != 2 or parts.shape[1] < 2:
        raise InputError(f"parts must have shape (N, W) with at least two parts of a name, got {tuple(parts.shape)}")
    bad = (~torch.isfinite(parts)).nonzero()
    if len(bad):
        row, part = bad[0].tolist()
        raise RowError(f"the dependence on part {part} is {float(parts[row, part])}: leave it out", row=f"row {row}")
    least, most = parts.clamp_min(0.0).aminmax(dim=1)
    return torch.where(most > 0, least / most.masked_fill(most <= 0, 1.0), 0.0)


@dataclass(frozen=True, slots=True)
class TemplateConsistency:
    """How far P templates agree about N facts.

    Args:
        answer: (N,) long, the most frequent first choice over templates (of equal ones the lowest number).
        agreement: (N,) share of the templates whose first choice it is.
        divergence: (N,) Jensen-Shannon divergence of the templates' distributions, nats, at most log P.
    """

    answer: Tensor
    agreement: Tensor
    divergence: Tensor


def template_consistency(log_probs: Tensor) -> TemplateConsistency:
    r"""Agreement of paraphrases, counted and graded.

    .. math:: \mathrm{JSD} = H\Bigl(\frac1P \sum_t p_t\Bigr) - \frac1P \sum_t H(p_t)

    Consistency does not tell recall from a guess that is the same each time: read it beside p(a).

    Args:
        log_probs: (N, P, V) next-token log-probabilities of P paraphrases of each fact, nats.

    Raises:
        InputError: for another shape, or rows that do not sum to 1.

    Source: derived from the consistency counts of arXiv 2410.14405.
    """
    if log_probs.dim() != 3 or not log_probs.numel():
        raise InputError(f"log_probs must have shape (N, P, V), got {tuple(log_probs.shape)}")
    wide = log_probs.detach().double()
    off = (~(wide.logsumexp(-1).abs() < 1e-3)).nonzero()
    if len(off):
        fact, template = off[0].tolist()
        raise InputError(
            f"the probabilities of fact {fact} under template {template} do not sum to 1: give log-softmax"
        )
    first = wide.argmax(-1)
    votes = torch.nn.functional.one_hot(first, wide.shape[-1]).sum(1)
    most, answer = votes.max(-1)
    mixture = wide.logsumexp(1) - math.log(wide.shape[1])
    divergence = (_entropy(mixture) - _entropy(wide).mean(-1)).clamp_min(0.0)
    return TemplateConsistency(answer, most.double() / wide.shape[1], divergence)


def likelihood_scenarios(
    own: LogLikelihood, parts: Tensor, *, confident: float = 0.5, specific: float = 0.5
) -> tuple[Scenario, ...]:
    r"""Kinds of predictions by likelihoods alone, for any model and any task with parts that can be swapped.

    Less than confident: *guesswork*. Confident and specific to the whole name: *exact fact recall*. Confident without:
    *heuristics recall*. Whether an answer is right plays no part.

    Args:
        own: (N,) log-likelihoods of the predicted answers.
        parts: (N, W) `swap_dependence` of each part of the name, nats.
        confident: least p(a), in (0, 1).
        specific: least `name_specificity`, in (0, 1).

    Raises:
        InputError: for numbers that do not pair, or thresholds out of range.
        RowError: as `name_specificity`.

    Source: derived from arXiv 2410.14405; the thresholds are ours.
    """
    for name, value in (("confident", confident), ("specific", specific)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1, got {value}")
    found = name_specificity(parts)
    if len(found) != len(own):
        raise InputError(f"there are {len(own)} predictions and dependences of {len(found)}: give one row each")
    bad = own.non_finite_rows()
    if bad:
        raise RowError(f"the log-likelihood is {float(own.value[bad[0]])}: leave it out", row=f"row {bad[0]}")
    sure = (own.value.exp() >= confident).tolist()
    whole = (found >= specific).tolist()
    return tuple(
        Scenario.GUESSWORK if not s else Scenario.EXACT_RECALL if w else Scenario.HEURISTICS
        for s, w in zip(sure, whole, strict=True)
    )


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
