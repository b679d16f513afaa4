"""Preference objectives that weigh tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_positive, require_rows, require_terms, require_units
from loglik.objectives.pairs import Scores, logistic_terms, reference_ratio, require_non_negative

__all__ = ["tab_po"]

_METHOD = "TAB-PO"


def tab_po(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    chosen_weights: Tensor | None = None,
    rejected_weights: Tensor | None = None,
    *,
    beta: float = 0.5,
    tau: float = 0.66,
    barrier_weight: float = 0.5,
) -> Terms:
    r"""DPO on weighted means of token log-ratios, with a likelihood term for chosen tokens that became improbable.

    .. math:: s(y) &= \frac{\sum_t u_t \left(\log p_\theta(y_t) - \log p_\text{ref}(y_t)\right)}{\sum_t u_t} \\
              L &= -\log\sigma\!\left(\beta [s(y_w) - s(y_l)]\right) + \lambda
                   \frac{-\sum_t w_t g_t \log p_\theta(y_t)}{\max(1, \sum_t w_t g_t)}, \qquad
              g_t = [\log p_\theta(y_t) < \log\tau]

    Sums run over the scored tokens, of :math:`y_w` in the second term. :math:`w_t` are the weights :math:`u_t` divided
    by their mean over these tokens, so that their scale does not matter. The gate :math:`g_t` is constant in the
    gradient; it acts on the policy's own probability, so that a token that falls below :math:`\tau` comes back in.
    Both terms are one per pair, averaged over pairs. `beta` multiplies means per token, not sums as in DPO.

    Metrics (B,), detached: those of `loglik.objectives.preference`, ``barrier`` (nats) and ``gated`` (share of the
    chosen tokens).

    Args:
        chosen: (B,) log-likelihoods of the preferred completions with terms (B, T), nats.
        rejected: (B,) of the others, with terms (B, T').
        reference_chosen: (B,) of the same as `chosen` under the frozen reference, with terms (B, T); detached.
        reference_rejected: (B,) of the same as `rejected`, with terms (B, T'); detached.
        chosen_weights: (B, T) raw weights, at least 0, aligned with the terms; 1 where None. What they hold at tokens
            that are not scored is ignored.
        rejected_weights: (B, T') likewise.
        beta: scale of the preference.
        tau: probability in (0, 1] below which a chosen token is gated.
        barrier_weight: :math:`\lambda \ge 0`.

    Raises:
        InputError: for a missing reference, likelihoods without terms, rows without scored tokens, weights that do not
            fit or vanish, or an option out of range.

    Source: arXiv 2603.00025.
    """
    require_positive(_METHOD, tau=tau)
    if tau > 1:
        raise InputError(f"{_METHOD}: tau is a probability and must be at most 1, got {tau}")
    require_non_negative(_METHOD, barrier_weight=barrier_weight)
    require_rows(_METHOD, chosen, rejected)
    good_ratio, good_weights = _ratios_and_weights(chosen, reference_chosen, chosen_weights, "chosen")
    bad_ratio, bad_weights = _ratios_and_weights(rejected, reference_rejected, rejected_weights, "rejected")
    metrics = {
        "log_prob_chosen": chosen.value.detach(),
        "log_prob_rejected": rejected.value.detach(),
        "log_ratio_chosen": good_ratio.sum(-1).detach(),
        "log_ratio_rejected": bad_ratio.sum(-1).detach(),
    }
    scores = Scores((good_weights * good_ratio).sum(-1), (bad_weights * bad_ratio).sum(-1), metrics)
    preference = logistic_terms(_METHOD, scores, beta=beta)
    log_probs, _ = _terms(chosen)
    counts = chosen.num_units.to(log_probs)
    gate = log_probs.detach() < math.log(tau)  # never where nothing is scored: the terms are 0 there
    gated = (counts[:, None] * good_weights).masked_fill(~gate, 0.0)
    barrier = -(gated * log_probs).sum(-1) / gated.sum(-1).clamp(min=1)
    more = {"barrier": barrier.detach(), "gated": gate.sum(-1) / counts}
    return Terms(preference.loss + barrier_weight * barrier, preference.weight, preference.metrics | more)


def _ratios_and_weights(
    policy: LogLikelihood, reference: LogLikelihood, weights: Tensor | None, side: str
) -> tuple[Tensor, Tensor]:
    """Token log-ratios (B, T), and weights (B, T) that sum to 1 over the scored tokens of each row."""
    total = reference_ratio(_METHOD, policy, reference, absolute=True)
    require_terms(_METHOD, policy, reference)
    require_units(_METHOD, policy)
    mask, other = _terms(policy)[1], _terms(reference)[1]
    if mask.shape != other.shape or not torch.equal(mask, other):
        raise InputError(f"{_METHOD}: policy and reference scored different tokens of the {side} completions")
    ratio, _ = _terms(total)
    if weights is None:
        raw = mask.to(ratio.dtype)
    else:
        if weights.shape != mask.shape:
            raise InputError(
                f"{_METHOD}: {side}_weights must be aligned with the terms {tuple(mask.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        raw = weights.detach().to(ratio).masked_fill(~mask, 0.0)
    usable = torch.isfinite(raw).all(-1) & (raw >= 0).all(-1) & (raw.sum(-1) > 0)
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        raise InputError(
            f"{_METHOD}: {side}_weights of row {row} must be finite, at least 0 and not all 0 on its scored tokens"
        )
    return ratio, raw / raw.sum(-1, keepdim=True)


def _terms(likelihood: LogLikelihood) -> tuple[Tensor, Tensor]:
    """Chain-rule terms and mask, (B, T) each."""
    assert likelihood.per_unit is not None
    assert likelihood.mask is not None
    return likelihood.per_unit, likelihood.mask
