r"""Preference objectives with a reference: losses of B pairs of a preferred and a rejected completion.

Arguments of every function of log-likelihoods, (B,) each, in nats, summed over the scored tokens:

- ``chosen``, ``rejected``: of the two completions under the policy; gradients flow through both.
- ``reference_chosen``, ``reference_rejected``: of the same two under the frozen reference; detached.

In the formulas :math:`s_w` and :math:`s_l` are the log-ratios :math:`\log p_\theta - \log p_\text{ref}` of the chosen
and of the rejected completion, :math:`\Delta = s_w - s_l`, and :math:`\sigma` is the logistic function. Every loss is
one term per pair, averaged over pairs.

Kinds: all but an upper bound. On lower bounds the log-ratio is a surrogate, as in Diffusion-DPO. An unknown constant is
accepted where it cancels: in losses of :math:`\Delta`, not in those of a log-ratio per token or of one side alone.

Metrics (B,), detached: ``rewards_chosen`` and ``rewards_rejected`` (the scale times the score that the loss compares),
``margin`` (their difference), ``accuracy`` (1 where the margin is positive), ``log_prob_chosen``,
``log_prob_rejected``, and ``log_ratio_chosen``, ``log_ratio_rejected`` (what training has added to the log-probability;
a negative ``log_ratio_chosen`` is likelihood displacement).

Every function raises `InputError` for a missing reference, rows or lengths that do not fit, an upper bound, or an
option out of range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_between, require_positive
from loglik.objectives.pairs import (
    Scores,
    against_reference,
    hinge_terms,
    logistic_terms,
    require_vectors,
    with_likelihood,
)

__all__ = [
    "apo_down",
    "apo_zero",
    "bco_pair",
    "bradley_terry",
    "diffusion_dpo",
    "dpo",
    "exo_pair",
    "hinge_norm",
    "ipo",
    "length_normalised_dpo",
    "nca_pair",
    "robust_dpo",
    "sigmoid_norm",
    "sppo_hard",
]


def dpo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
) -> Terms:
    r"""Direct preference optimisation; conservative DPO and RPO by its options.

    .. math:: L = -(1-\epsilon) \log\sigma(\beta\Delta) - \epsilon \log\sigma(-\beta\Delta)
              + \lambda\, \text{NLL}_\theta(y_w)

    `beta` is the strength of the KL penalty that the loss stands for, `label_smoothing` :math:`\epsilon` in [0, 1/2]
    the share of labels held to be flipped, `nll_weight` :math:`\lambda \ge 0` the weight of the negative
    log-likelihood of the chosen completions, averaged over their tokens. Where policy and reference agree, the first
    part is :math:`\log 2`.

    Source: arXiv 2305.18290; the added likelihood arXiv 2404.19733.
    """
    scores = against_reference("DPO", chosen, rejected, reference_chosen, reference_rejected)
    terms = logistic_terms("DPO", scores, beta=beta, label_smoothing=label_smoothing)
    return with_likelihood("DPO", terms, chosen, nll_weight)


def robust_dpo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Terms:
    r"""DPO whose expectation over flipped labels is the loss of the clean ones; terms may be negative.

    .. math:: L = \frac{-(1-\epsilon) \log\sigma(\beta\Delta) + \epsilon \log\sigma(-\beta\Delta)}{1 - 2\epsilon}

    `label_smoothing` :math:`\epsilon` in [0, 1/2) is the rate at which labels are flipped.

    Source: arXiv 2403.00409.
    """
    require_positive("robust DPO", beta=beta)
    require_between("robust DPO", 0.0, 0.5, label_smoothing=label_smoothing)
    if label_smoothing == 0.5:
        raise InputError("robust DPO: label_smoothing must be below 0.5, at which labels say nothing")
    scores = against_reference("robust DPO", chosen, rejected, reference_chosen, reference_rejected)
    z = beta * scores.gap
    loss = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return scores.terms(loss / (1 - 2 * label_smoothing), scale=beta)


def sigmoid_norm(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    gamma: float = 0.05,
) -> Terms:
    r"""RSO's logistic loss :math:`L = -\log\sigma(\gamma\Delta)`: DPO with a slope that is not the sampler's beta.

    TRL calls another loss ``sigmoid_norm``: see `length_normalised_dpo`.

    Source: arXiv 2309.06657.
    """
    require_positive("sigmoid-norm", gamma=gamma)
    scores = against_reference("sigmoid-norm", chosen, rejected, reference_chosen, reference_rejected)
    return logistic_terms("sigmoid-norm", scores, beta=gamma)


def length_normalised_dpo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> Terms:
    r"""DPO on log-ratios per token, TRL's ``sigmoid_norm``.

    .. math:: L = -\log\sigma\!\left(\beta \left[\frac{s_w}{|y_w|} - \frac{s_l}{|y_l|}\right]\right)

    smoothed as in `dpo`. `beta` is of the size of DPO's times a length.

    Source: arXiv 2411.15124 (Tülu 3).
    """
    method = "length-normalised DPO"
    scores = against_reference(method, chosen, rejected, reference_chosen, reference_rejected, per_unit=True)
    return logistic_terms(method, scores, beta=beta, label_smoothing=label_smoothing)


def ipo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    preferences: Tensor | None = None,
    *,
    tau: float = 0.1,
    length_normalise: bool = False,
) -> Terms:
    r"""Identity preference optimisation: a regression of the gap onto the preference.

    .. math:: L = \left(\Delta - \frac{P - 1/2}{\tau}\right)^2

    `preferences` (B,) holds :math:`P(y_w \succ y_l)` in [0, 1], detached; without it :math:`P = 1` and the target is
    :math:`1/(2\tau)`. Soft and sampled labels have the same expected gradient. `tau` is the strength of the KL
    penalty; `length_normalise` takes log-ratios per token, as TRL's ``DPOTrainer`` does. Rewards are :math:`\tau`
    times the scores. With preferences, `accuracy` asks whether the margin is positive exactly where :math:`P > 1/2`.

    On pairs that the policy itself has sampled this is online IPO, on pairs from the mixture of policy and reference
    IPO-MD.

    Source: arXiv 2310.12036; online and with soft labels arXiv 2403.08635.
    """
    require_positive("IPO", tau=tau)
    scores = against_reference("IPO", chosen, rejected, reference_chosen, reference_rejected, per_unit=length_normalise)
    if preferences is None:
        return scores.terms((scores.gap - 1 / (2 * tau)).square(), scale=tau)
    probability = _probabilities("IPO", preferences, scores.gap)
    terms = scores.terms((scores.gap - (probability - 0.5) / tau).square(), scale=tau)
    right = (terms.metrics["margin"] > 0) == (probability > 0.5)
    terms.metrics["accuracy"] = right.to(probability.dtype)
    return terms


def hinge_norm(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    gamma: float = 0.05,
) -> Terms:
    r"""RSO's hinge loss on log-ratios :math:`L = \max(0,\, 1 - \gamma\Delta)`, TRL's ``hinge``.

    Source: arXiv 2309.06657.
    """
    require_positive("hinge-norm", gamma=gamma)
    scores = against_reference("hinge-norm", chosen, rejected, reference_chosen, reference_rejected)
    return hinge_terms(scores, slope=gamma, margin=1.0)


def exo_pair(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Terms:
    r"""Efficient exact optimisation: the reverse KL divergence from smoothed labels to the policy's preference.

    .. math:: L = q \log\frac{q}{1-\epsilon} + (1-q) \log\frac{1-q}{\epsilon}, \qquad q = \sigma(\beta\Delta)

    `label_smoothing` :math:`\epsilon` in (0, 1/2]; at 0 the divergence is infinite.

    Source: arXiv 2402.00856.
    """
    require_positive("EXO", beta=beta, label_smoothing=label_smoothing)
    require_between("EXO", 0.0, 0.5, label_smoothing=label_smoothing)
    scores = against_reference("EXO", chosen, rejected, reference_chosen, reference_rejected)
    z = beta * scores.gap
    loss = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    loss = loss + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return scores.terms(loss, scale=beta)


def nca_pair(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
) -> Terms:
    r"""Noise-contrastive alignment of a pair, which also holds up the chosen log-probability itself.

    .. math:: L = -\log\sigma(\beta s_w) - \tfrac12 \log\sigma(-\beta s_w) - \tfrac12 \log\sigma(-\beta s_l)

    Source: arXiv 2402.05369.
    """
    require_positive("NCA", beta=beta)
    scores = against_reference("NCA", chosen, rejected, reference_chosen, reference_rejected, absolute=True)
    good, bad = beta * scores.chosen, beta * scores.rejected
    loss = -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)
    return scores.terms(loss, scale=beta)


def bco_pair(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
) -> Terms:
    r"""Binary classifier optimisation: chosen against rejected by a logistic classifier of each side.

    .. math:: L = -\log\sigma(\beta s_w - \delta) - \log\sigma(-(\beta s_l - \delta))

    `delta` is the reward shift; the paper tracks the mean of past rewards.

    Source: arXiv 2404.04656.
    """
    require_positive("BCO", beta=beta)
    if not math.isfinite(delta):
        raise InputError(f"BCO: delta must be finite, got {delta}")
    scores = against_reference("BCO", chosen, rejected, reference_chosen, reference_rejected, absolute=True)
    loss = -F.logsigmoid(beta * scores.chosen - delta) - F.logsigmoid(delta - beta * scores.rejected)
    return scores.terms(loss, scale=beta)


def apo_zero(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
) -> Terms:
    r"""Anchored preference optimisation where the chosen ones are better than the reference's own: raise them.

    .. math:: L = \sigma(-\beta s_w) + \sigma(\beta s_l)

    Source: arXiv 2408.06266.
    """
    require_positive("APO-zero", beta=beta)
    scores = against_reference("APO-zero", chosen, rejected, reference_chosen, reference_rejected, absolute=True)
    return scores.terms(torch.sigmoid(-beta * scores.chosen) + torch.sigmoid(beta * scores.rejected), scale=beta)


def apo_down(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
) -> Terms:
    r"""Anchored preference optimisation where even the chosen ones are worse than the reference's own: lower both.

    .. math:: L = \sigma(\beta s_w) + \sigma(-\beta\Delta)

    Source: arXiv 2408.06266.
    """
    require_positive("APO-down", beta=beta)
    scores = against_reference("APO-down", chosen, rejected, reference_chosen, reference_rejected, absolute=True)
    return scores.terms(torch.sigmoid(beta * scores.chosen) + torch.sigmoid(-beta * scores.gap), scale=beta)


def sppo_hard(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    reference_chosen: LogLikelihood,
    reference_rejected: LogLikelihood,
    *,
    beta: float = 0.1,
) -> Terms:
    r"""Self-play preference optimisation with hard labels: each log-ratio is regressed onto its own target.

    .. math:: L = \left(s_w - \tfrac{1}{2\beta}\right)^2 + \left(s_l + \tfrac{1}{2\beta}\right)^2

    Source: arXiv 2405.00675.
    """
    require_positive("SPPO", beta=beta)
    scores = against_reference("SPPO", chosen, rejected, reference_chosen, reference_rejected, absolute=True)
    target = 1 / (2 * beta)
    return scores.terms((scores.chosen - target).square() + (scores.rejected + target).square(), scale=beta)


def diffusion_dpo(
    policy_chosen_errors: Tensor,
    policy_rejected_errors: Tensor,
    reference_chosen_errors: Tensor,
    reference_rejected_errors: Tensor,
    *,
    beta: float = 5000.0,
) -> Terms:
    r"""Diffusion-DPO: `dpo` where minus the denoising error, at one time and noise, stands for the log-likelihood.

    .. math:: L = -\log\sigma\!\left(-\tfrac{\beta}{2}
              \left[(e_\theta^w - e_\theta^l) - (e_\text{ref}^w - e_\text{ref}^l)\right]\right)

    Errors (B,) are squared and reduced over dimensions; their mean needs a `beta` that is larger by the number of
    dimensions than their sum does. All four of a pair must have seen the same time and noise. The reference's errors
    are detached. Equal to ``dpo(..., beta=beta / 2)`` on lower bounds :math:`-e`. Metrics are the rewards, margin and
    accuracy of `dpo`, and ``error_chosen``, ``error_rejected``.

    Source: arXiv 2311.12908.
    """
    method = "Diffusion-DPO"
    require_positive(method, beta=beta)
    good, bad, reference_good, reference_bad = require_vectors(
        method,
        policy_chosen_errors=policy_chosen_errors,
        policy_rejected_errors=policy_rejected_errors,
        reference_chosen_errors=reference_chosen_errors,
        reference_rejected_errors=reference_rejected_errors,
    )
    metrics = {"error_chosen": good.detach(), "error_rejected": bad.detach()}
    scores = Scores(reference_good.detach() - good, reference_bad.detach() - bad, metrics)
    return logistic_terms(method, scores, beta=beta / 2)


def bradley_terry(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Terms:
    r"""Bradley–Terry likelihood of a reward model: :math:`L = -\log\sigma(r_w - r_l)`, rewards (B,), any real numbers.

    Metrics are the rewards, margin and accuracy of `dpo`.
    """
    chosen, rejected = require_vectors(
        "Bradley-Terry", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return logistic_terms("Bradley-Terry", Scores(chosen, rejected, {}), beta=1.0)


def _probabilities(method: str, preferences: Tensor, like: Tensor) -> Tensor:
    if preferences.shape != like.shape:
        raise InputError(f"{method}: preferences must be ({len(like)},), got {tuple(preferences.shape)}")
    outside = (~((preferences >= 0) & (preferences <= 1))).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"{method}: preferences are probabilities, and row {row} holds {float(preferences[row])}: give [0, 1]"
        )
    return preferences.detach().to(like)
