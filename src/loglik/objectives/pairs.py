"""What preference objectives share: scores of both sides of a pair, their metrics, and the refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import (
    Terms,
    log_ratio,
    require_between,
    require_kinds,
    require_positive,
    require_rows,
    require_units,
)
from loglik.objectives.supervised import MaximumLikelihood

__all__ = [
    "Scores",
    "against_reference",
    "hinge_terms",
    "logistic_terms",
    "reference_ratio",
    "require_non_negative",
    "require_vectors",
    "with_likelihood",
    "without_reference",
]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a pairwise loss is a function of: a number for either side of B pairs.

    Args:
        chosen: (B,) log-ratios, log-probabilities or rewards of the preferred sides, differentiable.
        rejected: (B,) the same of the other sides.
        metrics: (B,) tensors that say more about the pairs, detached.
    """

    chosen: Tensor
    rejected: Tensor
    metrics: dict[str, Tensor]

    @property
    def gap(self) -> Tensor:
        """(B,) how much more the chosen side scores."""
        return self.chosen - self.rejected

    def terms(self, loss: Tensor, *, scale: float) -> Terms:
        """One term (B,) per pair, averaged over pairs; rewards are `scale` times the scores."""
        chosen, rejected = scale * self.chosen.detach(), scale * self.rejected.detach()
        margin = chosen - rejected
        rewards = {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": margin,
            "accuracy": (margin > 0).to(margin.dtype),
        }
        return Terms(loss, torch.ones_like(margin), rewards | self.metrics)


def logistic_terms(
    method: str, scores: Scores, *, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> Terms:
    r""":math:`-(1-\epsilon) \log\sigma(z) - \epsilon \log\sigma(-z)` with :math:`z = \beta \cdot \text{gap} - m`.

    Args:
        method: name for the refusal.
        scores: of B pairs.
        beta: scale of the gap.
        label_smoothing: :math:`\epsilon` in [0, 1/2], the share of labels held to be flipped.
        margin: :math:`m`, what the scaled gap must exceed.

    Raises:
        InputError: for an option out of range.
    """
    require_positive(method, beta=beta)
    require_between(method, 0.0, 0.5, label_smoothing=label_smoothing)
    z = beta * scores.gap - margin
    loss = -F.logsigmoid(z)
    if label_smoothing > 0:  # else a completion of probability 0 would give 0 times infinity
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-z)
    return scores.terms(loss, scale=beta)


def hinge_terms(scores: Scores, *, slope: float, margin: float) -> Terms:
    r""":math:`\max(0,\, m - s \cdot \text{gap})` of B pairs."""
    return scores.terms(torch.relu(margin - slope * scores.gap), scale=slope)


def reference_ratio(
    method: str, policy: LogLikelihood, reference: LogLikelihood | None, *, absolute: bool = False
) -> LogLikelihood:
    """`log_ratio` of likelihoods that must both be there and must have scored the same.

    Raises:
        InputError: for a missing reference, rows or lengths that do not fit, or kinds that `log_ratio` refuses.
    """
    if reference is None:
        raise InputError(
            f"{method} needs log-likelihoods under a frozen reference: give a reference model, a policy whose LoRA "
            "adapter can be switched off, or precomputed log-probabilities"
        )
    ratio = log_ratio(method, policy, reference, absolute=absolute)
    both = (policy.num_units > 0) & (reference.num_units > 0)
    differ = (both & (policy.num_units != reference.num_units)).nonzero().flatten()
    if len(differ):
        row = int(differ[0])
        raise InputError(
            f"{method}: row {row} has {int(policy.num_units[row])} scored {policy.unit}s under the policy and "
            f"{int(reference.num_units[row])} under the reference: score the same completion with both"
        )
    return ratio


def against_reference(
    method: str,
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood | None,
    reference_rejected: LogLikelihood | None,
    *,
    absolute: bool = False,
    per_unit: bool = False,
) -> Scores:
    r"""Scores :math:`\log p_\theta(y) - \log p_\text{ref}(y)`, which `per_unit` divides by the units of :math:`y`.

    Args:
        method: name for the refusals.
        chosen: (B,) under the policy.
        rejected: (B,) under the policy.
        reference_chosen: (B,) under the reference; detached.
        reference_rejected: (B,) under the reference; detached.
        absolute: the loss looks at one side alone, so that an unknown constant would not cancel.
        per_unit: divide each log-ratio by its scored units; an unknown constant would not cancel either.

    Raises:
        InputError: naming what does not fit.
    """
    require_rows(method, chosen, rejected)
    first = reference_ratio(method, chosen, reference_chosen, absolute=absolute or per_unit)
    second = reference_ratio(method, rejected, reference_rejected, absolute=absolute or per_unit)
    _require_comparable(method, first, second)
    metrics = _log_probs(chosen, rejected) | {
        "log_ratio_chosen": first.value.detach(),
        "log_ratio_rejected": second.value.detach(),
    }
    if not per_unit:
        return Scores(first.value, second.value, metrics)
    require_units(method, chosen, rejected)
    return Scores(first.value / chosen.num_units, second.value / rejected.num_units, metrics)


def without_reference(method: str, chosen: LogLikelihood, rejected: LogLikelihood, *, per_unit: bool = False) -> Scores:
    r"""Scores :math:`\log p_\theta(y)`, which `per_unit` divides by the units of :math:`y`.

    Args:
        method: name for the refusals.
        chosen: (B,) under the policy.
        rejected: (B,) under the policy.
        per_unit: divide by the scored units; an unknown constant would not cancel.

    Raises:
        InputError: naming what does not fit.
    """
    require_rows(method, chosen, rejected)
    require_kinds(method, chosen, rejected)
    metrics = _log_probs(chosen, rejected)
    if not per_unit:
        _require_comparable(method, chosen, rejected)
        return Scores(chosen.value, rejected.value, metrics)
    require_units(method, chosen, rejected)
    for side in (chosen, rejected):
        _require_known_constant(method, side, "divides log-probabilities by lengths")
    return Scores(chosen.value / chosen.num_units, rejected.value / rejected.num_units, metrics)


def with_likelihood(method: str, terms: Terms, chosen: LogLikelihood, nll_weight: float) -> Terms:
    """`terms` plus `nll_weight` times the negative log-likelihood of `chosen`, averaged over its units.

    Raises:
        InputError: for a negative weight, rows without units or a likelihood without its constant.
    """
    require_non_negative(method, nll_weight=nll_weight)
    if nll_weight == 0:
        return terms
    require_units(method, chosen)
    _require_known_constant(method, chosen, "adds a negative log-likelihood")
    return terms + nll_weight * MaximumLikelihood()(chosen)


def require_non_negative(method: str, **options: float) -> None:
    """Options that must be finite and not below 0.

    Raises:
        InputError: naming the option and its value.
    """
    for name, value in options.items():
        if not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise InputError(f"{method}: {name} must be finite and at least 0, got {value}")


def require_vectors(method: str, **tensors: Tensor | None) -> list[Tensor]:
    """Plain tensors that must be (B,) floats for one B; half precision is widened to float32.

    Raises:
        InputError: naming the tensor and its shape or dtype.
    """
    out: list[Tensor] = []
    for name, tensor in tensors.items():
        if tensor is None:
            raise InputError(f"{method} needs {name}, a (B,) tensor; got None")
        if not tensor.is_floating_point() or tensor.dim() != 1 or (out and tensor.shape != out[0].shape):
            wanted = "(B,)" if not out else f"({len(out[0])},)"
            raise InputError(f"{method}: {name} must be float {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")
        out.append(tensor if tensor.dtype == torch.float64 else tensor.float())
    return out


def _log_probs(chosen: LogLikelihood, rejected: LogLikelihood) -> dict[str, Tensor]:
    return {"log_prob_chosen": chosen.value.detach(), "log_prob_rejected": rejected.value.detach()}


def _require_comparable(method: str, first: LogLikelihood, second: LogLikelihood) -> None:
    if (first - second).kind is Kind.UNNORMALIZED:
        raise InputError(
            f"{method} compares chosen with rejected, whose unknown constants differ: score both with one model"
        )


def _require_known_constant(method: str, likelihood: LogLikelihood, use: str) -> None:
    if likelihood.kind is Kind.UNNORMALIZED:
        raise InputError(f"{method} {use}, which an unknown constant makes meaningless: use a normalised model")
