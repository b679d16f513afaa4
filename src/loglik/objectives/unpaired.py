r"""Objectives on single completions with a yes or no: no pair is needed.

Arguments, N completions each: ``policy`` and ``reference`` log-likelihoods (N,) in nats, the second one detached;
``labels`` (N,) bool, whether a completion is desirable (correct, loved). In the formulas :math:`s` is the log-ratio
:math:`\log p_\theta - \log p_\text{ref}`. Every loss is one term per completion, averaged over completions.

Metrics, detached: ``rewards`` (:math:`\beta s`), ``margin`` (how far the classifier is on the label's side),
``accuracy`` (1 where the margin is positive), ``log_prob``, ``log_ratio``, (N,) each, and ``rewards_desirable`` and
``rewards_undesirable``, which hold the rewards of one label only.

Every function raises `InputError` for a missing reference, rows or lengths that do not fit, an upper bound, an unknown
constant that does not cancel, labels that are not bool, or an option out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_positive
from loglik.objectives.pairs import reference_ratio, require_non_negative

__all__ = ["implicit_reward_ce", "kl_estimate", "kto"]


def kto(
    policy: LogLikelihood,
    reference: LogLikelihood,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Terms:
    r"""Kahneman–Tversky optimisation: gains and losses against the policy's mean reward.

    .. math:: L = \begin{cases} \lambda_D\, \sigma(-\beta (s - \text{kl})) & \text{desirable} \\
                                \lambda_U\, \sigma(\beta (s - \text{kl})) & \text{not} \end{cases}

    `kl` () is an estimate of :math:`\text{KL}(p_\theta \| p_\text{ref})` in nats over the whole step, see
    `kl_estimate`; it is detached and taken as 0 where it is negative. The weights :math:`\lambda \ge 0` make up for
    unequal numbers of the two labels; the mean is over completions, not over weights. The metric ``kl`` is what was
    used.

    Source: arXiv 2402.01306.
    """
    require_positive("KTO", beta=beta)
    require_non_negative("KTO", desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    ratio, sign = _labelled("KTO", policy, reference, labels)
    if not isinstance(kl, Tensor) or kl.numel() != 1:
        raise InputError(
            "KTO needs kl, one number over the whole step: give kl_estimate(...) of mismatched completions"
        )
    reference_point = kl.detach().reshape(()).clamp(min=0)
    margin = sign * beta * (ratio - reference_point)
    weight = torch.where(labels, desirable_weight, undesirable_weight).to(margin)
    metrics = _metrics(policy, ratio, labels, margin, beta)
    metrics["kl"] = reference_point.to(margin).expand_as(margin)
    return Terms(weight * torch.sigmoid(-margin), torch.ones_like(margin.detach()), metrics)


def kl_estimate(mismatched: LogLikelihood, reference_mismatched: LogLikelihood) -> Tensor:
    r"""KTO's estimate () of :math:`\text{KL}(p_\theta \| p_\text{ref})` in nats: :math:`\max(0, \bar s)`, detached.

    The mean is over completions paired with other rows' prompts. Over several micro-batches, `LogLikelihood.cat` them
    first: the maximum does not commute with the mean.

    Args:
        mismatched: (N,) log-likelihoods of completions of other prompts under the policy.
        reference_mismatched: (N,) the same under the reference.

    Raises:
        InputError: for no rows, a missing reference, or kinds that have no log-ratio.

    Source: arXiv 2402.01306.
    """
    ratio = reference_ratio("the KL estimate of KTO", mismatched, reference_mismatched, absolute=True)
    if not len(ratio):
        raise InputError("the KL estimate of KTO is a mean and needs at least one completion")
    return ratio.value.detach().mean().clamp(min=0)


def implicit_reward_ce(policy: LogLikelihood, reference: LogLikelihood, labels: Tensor, *, beta: float = 0.05) -> Terms:
    r"""Cross-entropy of outcome labels under the implicit reward, whose running sums are process rewards.

    .. math:: L = -\log\sigma(\pm\beta s), \qquad + \text{ where the outcome is desirable}

    There is no bias: the log-ratio itself takes up a base rate other than 1/2.

    Source: arXiv 2412.01981.
    """
    require_positive("implicit-reward cross-entropy", beta=beta)
    ratio, sign = _labelled("implicit-reward cross-entropy", policy, reference, labels)
    margin = sign * beta * ratio
    metrics = _metrics(policy, ratio, labels, margin, beta)
    return Terms(F.softplus(-margin), torch.ones_like(margin.detach()), metrics)


def _labelled(method: str, policy: LogLikelihood, reference: LogLikelihood, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratios (N,), and +1 or -1 by label."""
    ratio = reference_ratio(method, policy, reference, absolute=True).value
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool or labels.shape != ratio.shape:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"{method} needs labels, a bool tensor ({len(ratio)},): True where desirable; got {got}")
    return ratio, torch.where(labels, 1.0, -1.0).to(ratio)


def _metrics(policy: LogLikelihood, ratio: Tensor, labels: Tensor, margin: Tensor, beta: float) -> dict[str, Tensor]:
    rewards, margin = beta * ratio.detach(), margin.detach()
    return {
        "rewards": rewards,
        "rewards_desirable": rewards[labels],
        "rewards_undesirable": rewards[~labels],
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
        "log_prob": policy.value.detach(),
        "log_ratio": ratio.detach(),
    }
