"""Label smoothing: maximum likelihood of targets that are mixed with the uniform distribution over the vocabulary."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.dense import scored_logits
from loglik.objectives.base import Terms, require_between

__all__ = ["Reduction", "label_smoothed_nll"]

Reduction = Literal["token_mean", "sequence_mean", "sum"]


def label_smoothed_nll(
    model: object, batch: TokenBatch, *, epsilon: float = 0.1, reduction: Reduction = "token_mean"
) -> Terms:
    r"""Cross-entropy, in nats, to targets smoothed with the uniform distribution over all V tokens.

    .. math::

        \ell_t = -(1-\epsilon)\,\log p_\theta(y_t \mid y_{<t})
                 - \frac{\epsilon}{V} \sum_{v} \log p_\theta(v \mid y_{<t})

    Args:
        model: a causal or encoder-decoder network.
        batch: B rows, of which the scored tokens are trained on.
        epsilon: share of the uniform distribution, in [0, 1]; 0 is maximum likelihood.
        reduction: what the sum over tokens is divided by: ``"token_mean"`` the scored tokens of the whole step,
            ``"sequence_mean"`` the sequences after each was divided by its own tokens, ``"sum"`` the sequences.

    Returns:
        (B,) losses; metric `nats_per_unit`, the negative log-likelihood per token without the smoothing.

    Raises:
        InputError: for an epsilon outside [0, 1], an unknown reduction, another model, a row without scored tokens
            (but for ``"token_mean"``), or a network that gives tokens probability 0, of which the uniform distribution
            asks an infinite price.

    Source: arXiv 1512.00567, section 7; the token mean is that of transformers' `LabelSmoother`.
    """
    method = "label smoothing"
    require_between(method, 0.0, 1.0, epsilon=epsilon)
    if reduction not in get_args(Reduction):
        raise InputError(f"{method}: reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    logits = scored_logits(model, batch, method=method)
    scored = (batch.scored_mask & batch.attention_mask).to(logits.device)
    row = scored.nonzero()[:, 0]
    targets = batch.ids.to(logits.device)[scored]
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, targets[:, None])[:, 0]
    loss = nll
    if epsilon > 0:
        uniform = log_z - logits.mean(-1)
        endless = (~uniform.isfinite()).nonzero().flatten()
        if len(endless):
            raise InputError(
                f"{method}: the network gives tokens probability 0 in row {int(row[endless[0]])}, and the uniform "
                "distribution does not: use epsilon=0"
            )
        loss = (1 - epsilon) * nll + epsilon * uniform
    count = scored.sum(1)
    summed = loss.new_zeros(len(batch)).index_add(0, row, loss)
    plain = loss.new_zeros(len(batch)).index_add(0, row, nll.detach()) / count.clamp(min=1)
    weight: Tensor = torch.ones_like(plain)
    if reduction == "token_mean":
        weight = count.to(summed.dtype)
    else:
        empty = (count == 0).nonzero().flatten()
        if len(empty):
            raise InputError(f"{method}: row {int(empty[0])} has no scored token: remove it")
        if reduction == "sequence_mean":
            summed = summed / count
    return Terms(summed, weight, {"nats_per_unit": plain})
