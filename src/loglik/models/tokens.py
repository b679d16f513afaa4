"""Log-probabilities of chosen tokens from logits, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["greedy_match", "selected_log_probs"]


def selected_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Log-softmax at the target: :math:`z_y - \log\sum_v e^{z_v}`, in float32 (float64 stays float64).

    Args:
        logits: (N, V), any floating dtype.
        targets: (N,) token ids.

    Returns:
        (N,) nats, differentiable; never above 0.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -torch.nn.functional.cross_entropy(wide, targets, reduction="none")


def greedy_match(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool, True where the target has the highest logit (a tie counts as a match)."""
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen >= logits.max(-1).values
