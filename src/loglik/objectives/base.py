"""What an objective returns: loss terms per sample with their weights, so that a step's mean is exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loglik.likelihood import LogLikelihood

__all__ = ["Objective", "Terms"]


@dataclass(frozen=True, slots=True)
class Terms:
    r"""Loss terms of one batch; a step's loss is :math:`\sum_b \ell_b / \sum_b w_b` over all its micro-batches.

    Args:
        loss: (B,) terms :math:`\ell_b`, differentiable.
        weight: (B,) weights :math:`w_b`, detached.
        metrics: named (B,) tensors to log, detached; logged as means over samples.
    """

    loss: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """The loss of this batch alone."""
        return self.loss.sum() / self.weight.sum()


class Objective(Protocol):
    """A function of labelled log-likelihoods."""

    def __call__(self, policy: LogLikelihood) -> Terms:
        """Loss terms of a batch."""
