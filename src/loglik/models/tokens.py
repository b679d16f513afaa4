"""From logits to labelled token log-probabilities, in float32 or better whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch

__all__ = ["greedy_match", "labelled", "selected_log_probs", "widened"]


def selected_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Log-softmax at the target: :math:`z_y - \log\sum_v e^{z_v}`, in float32 (float64 stays float64).

    Args:
        logits: (N, V), any floating dtype.
        targets: (N,) token ids.

    Returns:
        (N,) nats, differentiable; never above 0.
    """
    return -torch.nn.functional.cross_entropy(widened(logits), targets, reduction="none")


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 or better: half precision is widened, float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def greedy_match(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool, True where the target has the highest logit (a tie counts as a match)."""
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen >= logits.max(-1).values


def labelled(
    x: TokenBatch, packed: TokenBatch, origin: Tensor, terms: Tensor, greedy: Tensor, *, kind: Kind
) -> tuple[LogLikelihood, Tensor]:
    """Terms of left-aligned rows as the labelled log-likelihood of the batch they came from.

    Args:
        x: the batch as it was given.
        packed: its rows without padding, from `TokenBatch.packed_left`.
        origin: (B, T') the column of `x` each token of `packed` came from.
        terms: (B, T') nats, 0 where not scored.
        greedy: (B, T') bool, whether each scored token is the first choice.
        kind: of the sums.

    Returns:
        The log-likelihood with per-token terms (B, T), and (B, T) bool the first choices, at the columns of `x`.
    """
    scored = x.scored_mask & x.attention_mask
    likelihood = LogLikelihood.from_per_unit(x.unpack(terms, origin, packed), scored, kind=kind)
    return likelihood, x.unpack(greedy.int(), origin, packed).bool()
