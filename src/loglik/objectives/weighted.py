"""Weighted maximum likelihood of scored completions: reward-weighted regression and best of N.

Both raise the likelihood of good completions and, but for the negative term of best of N, never lower that of bad ones
directly: they cover the modes of their target, where policy gradients and DPO seek them (arXiv 2404.14367). For pairs,
best of N without that term is Pref-FT: maximum likelihood of the chosen completion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_kinds, require_positive
from loglik.objectives.groups import Groups, numbers

__all__ = ["best_of_n", "reward_weighted_regression"]


def reward_weighted_regression(
    policy: LogLikelihood,
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    beta: float = 1.0,
    max_weight: float | None = None,
    normalise: bool = True,
) -> Terms:
    r"""Maximum likelihood of completions weighted by their exponentiated rewards.

    .. math:: L = -\,\mathbb{E}\bigl[w_i \log\pi_\theta(y_i \mid x_i)\bigr],\qquad w_i \propto e^{r_i / \beta}

    for a prompt's completions from :math:`q` this is cross-entropy to :math:`q\,e^{r/\beta}/Z`. The factor differs from
    the plain :math:`e^{r/\beta}`, which overflows, and with it the step size:

    - normalised, the weights of a group sum to one, :math:`w_i = e^{r_i/\beta} / \sum_j e^{r_j/\beta}`, and the mean is
      over groups;
    - otherwise the best of a group has weight one, :math:`w_i = e^{(r_i - \max_j r_j)/\beta}`, and the mean is over
      completions.

    Args:
        policy: (N,) log-likelihoods of completions, nats.
        rewards: (N,) higher is better; detached.
        groups: (N,) long, the prompt that each completion belongs to, ascending; None: the whole (micro-)batch
            is one group.
        beta: temperature of the rewards, in their unit; to 0 it is best of N, to infinity maximum likelihood.
        max_weight: weights above it count as it (of the weights as defined above); None: no limit.
        normalise: which of the two.

    Returns:
        (N,) losses; metrics `reward` (N,), `weight` (N,) and `effective_sample_size` (G,), which is
        :math:`(\sum w)^2 / \sum w^2` of each group.

    Raises:
        InputError: for a beta or limit that is not positive, rewards or groups that do not fit or are not finite, or an
            upper bound.

    Source: arXiv 2404.14367, section 4 (Peters and Schaal 2007; advantage-weighted: arXiv 1910.00177).
    """
    method = "reward-weighted regression"
    require_positive(method, beta=beta)
    if max_weight is not None:
        require_positive(method, max_weight=max_weight)
    require_kinds(method, policy)
    reward = numbers(method, "rewards", rewards, policy)
    parts = _parts(method, policy, groups)
    scaled = reward / beta
    share = torch.ones_like(reward)
    if normalise:
        weight = parts.log_softmax(scaled).exp()
        share = share / parts.sizes[parts.index]
    else:
        weight = (scaled - parts.max(scaled)[parts.index]).exp()
    if max_weight is not None:
        weight = weight.clamp(max=max_weight)
    size = parts.sum(weight).square() / parts.sum(weight.square())
    metrics = {"reward": reward, "weight": weight, "effective_sample_size": size}
    # A weight may underflow, and the log-likelihood under it be -inf.
    return Terms(-weight * policy.value.masked_fill(weight == 0, 0.0), share, metrics)


def best_of_n(policy: LogLikelihood, rewards: Tensor, groups: Tensor, *, negative_weight: float = 0.0) -> Terms:
    r"""Maximum likelihood of the best completion of each prompt, with an explicit push away from the others.

    .. math::

        \ell = -\log\pi_\theta(y_{i^*} \mid x) + \lambda \,\frac{1}{N-1}\sum_{i \ne i^*} \log\pi_\theta(y_i \mid x),
        \qquad i^* = \arg\max_i r_i

    Completions that tie for the best share its place by their mean, and the others are the negatives; where all tie
    there are none. The negative term has no lower bound: with a weight near one or above, likelihoods may fall without
    end.

    Args:
        policy: (N,) log-likelihoods of completions, nats.
        rewards: (N,) higher is better; detached.
        groups: (N,) long, the prompt that each completion belongs to, ascending.
        negative_weight: :math:`\lambda \ge 0`; 0 is plain best of N.

    Returns:
        (G,) losses, one per prompt; metrics, each (G,): `reward` (the mean),
        `best_reward`, `best_log_prob` and `other_log_prob` (0 where there is no other).

    Raises:
        InputError: for a negative weight, rewards or groups that do not fit or are not finite, or an upper bound.

    Source: arXiv 2404.14367.
    """
    method = "best of N"
    if not 0 <= negative_weight < math.inf:
        raise InputError(f"{method}: negative_weight must be at least 0 and finite, got {negative_weight}")
    require_kinds(method, policy)
    reward = numbers(method, "rewards", rewards, policy)
    parts = _parts(method, policy, groups)
    best = parts.max(reward)
    is_best = reward == best[parts.index]
    # Filled, not multiplied: a log-likelihood of -inf on the other side stays there.
    chosen = parts.sum(policy.value.masked_fill(~is_best, 0.0)) / parts.sum(is_best.to(reward.dtype))
    others = parts.sum((~is_best).to(reward.dtype))
    other = parts.sum(policy.value.masked_fill(is_best, 0.0)) / others.clamp(min=1)
    loss = -chosen + negative_weight * other if negative_weight > 0 else -chosen
    metrics = {
        "reward": parts.mean(reward),
        "best_reward": best,
        "best_log_prob": chosen.detach(),
        "other_log_prob": other.detach(),
    }
    return Terms(loss, torch.ones_like(best), metrics)


def _parts(method: str, policy: LogLikelihood, groups: Tensor | None) -> Groups:
    """The groups, or all completions as one."""
    if groups is None:
        groups = torch.zeros(len(policy), dtype=torch.long, device=policy.value.device)
    return Groups.of(method, groups, policy)
