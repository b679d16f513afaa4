"""Supervised objectives: maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_kinds

__all__ = ["MaximumLikelihood"]


@dataclass(frozen=True, slots=True)
class MaximumLikelihood:
    r"""Negative log-likelihood of the data, or of a lower bound on it.

    .. math:: L = -\sum_b \log p_\theta(x_b) \Big/ \sum_b w_b

    Args:
        reduction: what the sum over sequences is divided by: ``"token_mean"`` the scored units of the whole step
            (:math:`w_b` = units), ``"sequence_mean"`` the sequences after each was divided by its own units, ``"sum"``
            the sequences (:math:`w_b = 1`).

    Raises:
        InputError: for an upper bound, whose increase says nothing about the likelihood.
    """

    reduction: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"

    def __call__(self, policy: LogLikelihood) -> Terms:
        """Loss terms of B sequences, in nats."""
        require_kinds("maximum likelihood", policy)
        loss = -policy.value
        ones = loss.new_ones(loss.shape)
        weight: Tensor = ones
        if self.reduction == "token_mean":
            weight = policy.num_units.to(loss.dtype)
        elif self.reduction == "sequence_mean":
            loss = -policy.mean_per_unit().value
        return Terms(loss, weight, {"nats_per_unit": -policy.value.detach() / policy.num_units.clamp(min=1)})
