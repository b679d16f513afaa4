"""SequenceMatch as an objective that `fit` can train: a model's raw logits are its action values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.dense import target_logits
from loglik.objectives.base import Terms
from loglik.objectives.imitation import Divergence, Trajectories, sequence_match

__all__ = ["SequenceMatch"]


@dataclass(frozen=True, slots=True)
class SequenceMatch:
    """`sequence_match` on rows of a demonstration and, beside it, the model's own completions of the same prompt.

    The first completion of a row is the demonstration; any further ones are rollouts of the model, drawn recently
    (`loglik.training.DrawRollouts`). No gradient flows through the sampling. Means over demonstrations and over
    rollouts are added, so that a step is one micro-batch in one process.

    Args:
        divergence: as for `sequence_match`, as are the other settings.
        alpha: weight of the entropy.
        gamma: discount.
        discount_positions: weigh step t by gamma^t.
        max_ratio: where the loss goes on as its tangent.

    Source: arXiv 2306.05426.
    """

    divergence: Divergence = "chi2_mixture"
    alpha: float = 0.1
    gamma: float = 0.98
    discount_positions: bool = True
    max_ratio: float = 100.0

    def __call__(self, model: Any, batch: TokenBatch, groups: Tensor) -> Terms:
        """Terms of a batch.

        Args:
            model: a causal or encoder-decoder model.
            batch: N completions.
            groups: (N,) row of each, ascending.

        Raises:
            InputError: for another model, or groups that do not fit.
        """
        if groups.shape != (len(batch),):
            raise InputError(f"SequenceMatch needs the row of every completion, got groups {tuple(groups.shape)}")
        batch, groups = batch.to(model.device), groups.to(model.device)
        logits = target_logits(model, batch, method="SequenceMatch")
        every = Trajectories.from_logits(logits, batch.ids, batch.scored_mask & batch.attention_mask)
        is_first = torch.ones_like(groups, dtype=torch.bool)
        is_first[1:] = groups[1:] != groups[:-1]
        rollouts = None if bool(is_first.all()) else _rows(every, ~is_first)
        return sequence_match(
            _rows(every, is_first),
            rollouts,
            divergence=self.divergence,
            alpha=self.alpha,
            gamma=self.gamma,
            discount_positions=self.discount_positions,
            max_ratio=self.max_ratio,
        )


def _rows(every: Trajectories, keep: Tensor) -> Trajectories:
    return replace(
        every,
        action_logits=every.action_logits[keep],
        values=every.values[keep],
        next_values=every.next_values[keep],
        mask=every.mask[keep],
    )
