r"""Signals about the next-token distribution: entropy over its k most probable tokens, and their total probability.

Beside a falling likelihood of chosen completions, these two tell healthy diversity from over-optimisation
(arXiv 2410.11677; `loglik.signals.over_optimisation` has the reading rule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.tokens import selected_log_probs, widened
from loglik.models.trunk import Trunk
from loglik.signals.preference import causal_trunk, predicting_states

__all__ = ["TopKIndicators", "top_k_entropy", "top_k_indicators", "top_k_mass"]

# Logits that exist at once: positions of a chunk times the vocabulary.
_CHUNK_LOGITS = 1 << 24


def top_k_entropy(logits: Tensor, k: int = 10, *, base: float = 2.0, renormalise: bool = True) -> Tensor:
    r"""Entropy over the k most probable tokens S, in bits unless `base` says otherwise.

    .. math:: H_k = -\sum_{v \in S} p_v \log_b p_v

    With `renormalise` the probabilities are divided by their sum :math:`M_k` first, so that
    :math:`0 \le H_k \le \log_b k` whatever the mass is:
    :math:`H_k^\text{renormalised} = H_k / M_k + \log_b M_k`. The paper does not say which of the two it means.

    Args:
        logits: (..., V), any floating dtype; the softmax is taken in float32 or better.
        k: how many tokens, from 1 to V; of equal logits the sort decides, which changes nothing here.
        base: of the logarithm; 2 gives bits, `math.e` nats.
        renormalise: whether p is divided by :math:`M_k`.

    Returns:
        (...) float32 or better; for k = V the Shannon entropy either way.

    Raises:
        InputError: for a k or base out of range, or logits that are no distribution.

    Source: arXiv 2410.11677.
    """
    return _entropy(_top_log_probs(logits, k), base, renormalise=renormalise)


def top_k_mass(logits: Tensor, k: int = 10) -> Tensor:
    r"""Total probability of the k most probable tokens, :math:`M_k = \sum_{v \in S} p_v \in (0, 1]`.

    Args:
        logits: (..., V), any floating dtype; the softmax is taken in float32 or better.
        k: how many tokens, from 1 to V.

    Returns:
        (...) float32 or better.

    Raises:
        InputError: for a k out of range, or logits that are no distribution.

    Source: arXiv 2410.11677.
    """
    return _mass(_top_log_probs(logits, k))


@dataclass(frozen=True, slots=True)
class TopKIndicators:
    """Means over the scored positions of each row.

    Args:
        entropy: (B,) top-k entropy, in the base that was asked for.
        mass: (B,) top-k mass.
        log_likelihood: (B,) of the scored tokens, with per-token terms (B, T), from the same forward pass.
    """

    entropy: Tensor
    mass: Tensor
    log_likelihood: LogLikelihood


@torch.no_grad()
def top_k_indicators(
    model: CausalLM, batch: TokenBatch, k: int = 10, *, base: float = 2.0, renormalise: bool = True
) -> TopKIndicators:
    """Top-k entropy and mass of a causal model, averaged over the scored positions of each row.

    Logits exist for a chunk of positions at a time, never for all. Fixed completions are read teacher-forced; the
    model's own generations are read the same way, from the batch that `sample` gives.

    Args:
        model: a causal model that can be taken apart into hidden states and head.
        batch: B rows; a position is scored if its token is. Padding changes nothing.
        k: how many tokens, from 1 to V.
        base: of the entropy's logarithm; 2 gives bits.
        renormalise: whether the k probabilities are divided by their sum before the entropy.

    Returns:
        (B,) means in float32 or better, and the log-likelihood of the scored tokens. No gradient.

    Raises:
        InputError: for another kind of model, or options out of range.
        RowError: for a row without scored tokens.

    Source: arXiv 2410.11677.
    """
    trunk = causal_trunk(model, "top-k entropy")
    states, mask = predicting_states(model, batch, method="top-k entropy")
    count = mask.sum(1)
    if bool((count == 0).any()):
        raise RowError("has no scored token: remove it", row=f"row {int((count == 0).nonzero()[0])}")
    targets = batch.ids.to(mask.device)[mask]
    parts = []
    size = _chunk_size(trunk, states)
    for begin in range(0, len(states), size):
        logits = _logits(trunk, states[begin : begin + size])
        top = _top_log_probs(logits, k)
        terms = selected_log_probs(logits, targets[begin : begin + size])
        parts.append(torch.stack([_entropy(top, base, renormalise=renormalise), _mass(top), terms]))
    entropy, mass, terms = torch.cat(parts, 1)
    row = mask.nonzero()[:, 0]

    def mean(values: Tensor) -> Tensor:
        total = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
        return (total.index_add_(0, row, values.double()) / count).to(values.dtype)

    per_unit = terms.new_zeros(mask.shape).masked_scatter(mask, terms)
    return TopKIndicators(
        mean(entropy), mean(mass), LogLikelihood.from_per_unit(per_unit, mask, kind=model.kind, unit=model.unit)
    )


def _top_log_probs(logits: Tensor, k: int) -> Tensor:
    """(..., k) log-probabilities of the most probable tokens, nats."""
    size = logits.shape[-1] if logits.dim() else 0
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
        raise InputError(f"k must be from 1 to the vocabulary of {size}, got {k}")
    wide = widened(logits)
    total = wide.logsumexp(-1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        where = (~torch.isfinite(total[..., 0])).nonzero()[0].tolist()
        raise InputError(f"the logits at {where} are no distribution: they hold NaN or +inf, or are all -inf")
    return wide.topk(k, -1).values - total


def _entropy(log_p: Tensor, base: float, *, renormalise: bool) -> Tensor:
    """(...) entropy of (..., k) log-probabilities."""
    if not (isinstance(base, int | float) and 0 < base < math.inf and base != 1):
        raise InputError(f"base must be positive, finite and other than 1, got {base}")
    if renormalise:
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)  # p log p is 0 where p is
    # 0 minus the sum, because minus a sum of zeros is -0.
    return (0.0 - (finite.exp() * finite).sum(-1)) / math.log(base)


def _mass(log_p: Tensor) -> Tensor:
    return log_p.exp().sum(-1).clamp(max=1.0)


def _chunk_size(trunk: Trunk, states: Tensor) -> int:
    """Positions whose logits are held at once."""
    vocabulary = _logits(trunk, states[:1]).shape[-1]
    return max(1, _CHUNK_LOGITS // vocabulary)


def _logits(trunk: Trunk, states: Tensor) -> Tensor:
    """(N, V) logits of (N, D) states, float32 or better."""
    head = trunk.head
    return head.logits(states) if head is not None else widened(trunk.logits(states))
