r"""Objectives on sampled completions: distribution matching (BRAIn, DPG, GDC++) and policy gradients.

Completions :math:`y_1 \dots y_n` of one prompt form a group; `groups` (N,) names the prompt of each. Every value is a
sum over the completion in nats. What was drawn is data: rewards, proposal and reference carry no gradient, and neither
do the weights and advantages made of them. The proposal is the sampler that drew the completions, temperature and
truncation included. Importance ratios are held at :math:`e^{40}`, so that sums stay finite in float32. A policy value
that is not finite gives a loss that is not finite, which a training loop reports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, log_ratio, require_kinds, require_positive, require_rows
from loglik.objectives.groups import Baseline, Groups, finite_reference, numbers

__all__ = ["Baseline", "brain", "dpg", "gdc_pp", "nash_md_pg", "ppo_clip", "reinforce"]

_LARGEST = 40.0  # nats; far beyond any ratio that still carries information


def brain(
    policy: LogLikelihood,
    reference: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    gamma: float = 1.0,
) -> Terms:
    r"""BRAIn: self-normalised KL from the reward-tilted reference to the policy, over the samples of each prompt.

    .. math::

        \hat\alpha = \operatorname{softmax}_i\bigl(\log p(y_i) + r_i/\gamma - \log q'(y_i)\bigr),\quad
        \hat\beta = \operatorname{softmax}_i\bigl(\log q_\theta(y_i) - \log q'(y_i)\bigr),\quad
        \ell = \sum_i \hat\alpha_i (\log\hat\alpha_i - \log\hat\beta_i)

    Its gradient is :math:`-\sum_i (\hat\alpha_i - \hat\beta_i)\,\nabla\log q_\theta(y_i)`, which vanishes on every set
    of samples once the policy is the posterior :math:`\propto p\,e^{r/\gamma}`. It is unbiased for the expected
    self-normalised KL and biased for KL(posterior || policy). Only differences within a prompt enter.

    Args:
        policy: (N,) :math:`\log q_\theta`; the only one with a gradient, through the log-softmax.
        reference: (N,) :math:`\log p`, the frozen prior (the SFT model); detached.
        proposal: (N,) :math:`\log q'`, of the sampler that drew the completions; detached.
        rewards: (N,) :math:`r`; detached.
        groups: (N,) prompt of each completion, ascending; groups may differ in size.
        gamma: temperature of the posterior, reward per nat; large values distil the prior, small ones the best sample.

    Returns:
        (G,) losses in nats, averaged over prompts; metrics per prompt: mean `reward`, `effective_sample_size`
        :math:`1/\sum\hat\alpha_i^2` of the target and `policy_effective_sample_size` of :math:`\hat\beta`.

    Raises:
        InputError: for an upper bound, rows that do not pair, numbers that are not finite, a prompt without any
            completion the reference can give, or a gamma that is not positive.

    Source: arXiv 2402.02479.
    """
    parts, log_alpha = _target("BRAIn", policy, reference, proposal, rewards, groups, gamma)
    log_beta = parts.log_softmax(policy.value - numbers("BRAIn", "proposal", proposal, policy))
    alpha = log_alpha.exp()
    # A sample without mass under the target adds 0 log 0 = 0.
    gap = log_alpha.masked_fill(alpha == 0, 0.0) - log_beta.masked_fill(alpha == 0, 0.0)
    metrics = _matching_metrics(parts, rewards, alpha)
    metrics["policy_effective_sample_size"] = 1 / parts.sum(log_beta.detach().exp().square())
    return parts.terms(alpha * gap, metrics)


def dpg(
    policy: LogLikelihood,
    reference: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    gamma: float = 1.0,
    log_normalizer: float | Tensor | None = None,
) -> Terms:
    r"""Distributional policy gradient: importance-weighted likelihood of samples under the reward-tilted reference.

    .. math::

        \ell = -\frac1n\sum_i \frac{p^*(y_i)}{q'(y_i)} \log q_\theta(y_i),\qquad
        p^*(y) = p(y)\,e^{r(y)/\gamma} / Z

    The weights are held constant: with a given Z the gradient is an unbiased estimate of that of KL(p* || policy).
    Without it Z is estimated by the group's mean importance weight, and the weights are BRAIn's :math:`\hat\alpha`
    (biased, consistent in n): BRAIn without its baseline.

    Args:
        policy: (N,) :math:`\log q_\theta`; the only one with a gradient.
        reference: (N,) :math:`\log p`; detached.
        proposal: (N,) :math:`\log q'`; detached.
        rewards: (N,) :math:`r`; detached.
        groups: (N,) prompt of each completion, ascending.
        gamma: temperature of the posterior, reward per nat.
        log_normalizer: :math:`\log Z` in nats, one number or (G,) in the order of the prompts; None: estimated.

    Returns:
        (G,) surrogate losses, averaged over prompts; metrics per prompt: mean `reward` and `effective_sample_size`.

    Raises:
        InputError: as for `brain`, and for an unnormalised policy, whose constant moves with its parameters.

    Source: arXiv 2402.02479, which compares with it.
    """
    return _weighted("DPG", policy, reference, proposal, rewards, groups, gamma, log_normalizer, baseline=False)


def gdc_pp(
    policy: LogLikelihood,
    reference: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    gamma: float = 1.0,
    log_normalizer: float | Tensor | None = None,
) -> Terms:
    r"""GDC++: the distributional policy gradient with the policy's own importance weight as baseline.

    .. math::

        \ell = -\frac1n\sum_i \Bigl(\frac{p^*(y_i)}{q'(y_i)} - \frac{q_\theta(y_i)}{q'(y_i)}\Bigr) \log q_\theta(y_i)

    The bracket is held constant: the gradient has the expectation of `dpg`, the value means nothing by itself.
    Arguments, estimate of Z, metrics and refusals are those of `dpg`.

    Source: arXiv 2402.02479, which compares with it.
    """
    return _weighted("GDC++", policy, reference, proposal, rewards, groups, gamma, log_normalizer, baseline=True)


def reinforce(
    policy: LogLikelihood,
    rewards: Tensor,
    groups: Tensor,
    reference: LogLikelihood | None = None,
    *,
    baseline: Baseline = "leave_one_out",
    standardise: bool = False,
    kl_weight: float = 0.0,
) -> Terms:
    r"""REINFORCE on completions drawn from the policy, with an optional KL penalty inside the reward.

    .. math::

        \ell_i = -A_i \log\pi_\theta(y_i),\qquad
        A_i = r_i - \lambda \log\frac{\pi_\theta(y_i)}{\pi_\text{ref}(y_i)} - b_i

    A is held constant. The mean of the gradient is that of
    :math:`-\mathbb{E}_\pi[r] + \lambda\,\mathrm{KL}(\pi\|\pi_\text{ref})`, exactly so with ``"none"`` and
    ``"leave_one_out"``, and times (n - 1)/n with ``"group"``.

    Args:
        policy: (N,) :math:`\log\pi_\theta` of its own samples, differentiable.
        rewards: (N,); detached.
        groups: (N,) prompt of each completion, ascending.
        reference: (N,) :math:`\log\pi_\text{ref}`; detached; needed for a KL penalty only.
        baseline: :math:`b_i`: nothing, the mean penalised reward of the prompt, or that of its other completions.
        standardise: divide by the standard deviation of the prompt's penalised rewards (n - 1 in its denominator); a
            prompt whose completions all score the same gives no gradient. For statistics of a whole batch, as in
            arXiv 2404.14367, give one group.
        kl_weight: :math:`\lambda \ge 0`, reward per nat.

    Returns:
        (N,) surrogate losses, averaged over completions; metrics `reward` and, with a reference, `kl`: the log-ratio,
        whose mean estimates KL(policy || reference).

    Raises:
        InputError: for a penalty without reference, a prompt with one completion where a baseline needs two,
            standardising without baseline, an upper bound, an unknown constant without baseline, rows that do not
            pair, or numbers that are not finite.

    Source: arXiv 2404.14367.
    """
    method = "REINFORCE"
    if baseline == "none":  # with a baseline the advantages of a prompt sum to zero, and a constant drops out
        _require_normalised(method, policy)
    require_kinds(method, policy)
    parts = Groups.of(method, groups, policy)
    score = numbers(method, "rewards", rewards, policy)
    metrics = {"reward": score}
    _require_penalty(method, kl_weight, reference)
    if reference is not None:
        finite_reference(method, reference, policy)
        metrics["kl"] = log_ratio(method, policy, reference, absolute=baseline == "none").value.detach()
        score = score - kl_weight * metrics["kl"]
    advantage = parts.advantages(method, score, baseline, standardise=standardise)
    return _per_completion(-advantage * policy.value, metrics)


def ppo_clip(
    policy: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    reference: LogLikelihood | None = None,
    *,
    clip: float = 0.2,
    baseline: Baseline = "leave_one_out",
    standardise: bool = False,
    kl_weight: float = 0.0,
) -> Terms:
    r"""PPO's clipped surrogate with one ratio per sequence, for several steps on the samples of an earlier policy.

    .. math::

        \ell_i = -\min\bigl(\rho_i A_i,\ \operatorname{clip}(\rho_i, 1-\epsilon, 1+\epsilon) A_i\bigr),\qquad
        \rho_i = \pi_\theta(y_i) / q'(y_i)

    Args:
        policy: (N,) :math:`\log\pi_\theta`, differentiable.
        proposal: (N,) :math:`\log q'`, of the earlier policy that drew the completions; detached.
        rewards: (N,); detached.
        groups: (N,) prompt of each completion, ascending.
        reference: (N,) :math:`\log\pi_\text{ref}`; detached. The penalty is that of the samples as they were drawn,
            :math:`\lambda(\log q' - \log\pi_\text{ref})`.
        clip: :math:`\epsilon` in (0, 1).
        baseline: as for `reinforce`.
        standardise: as for `reinforce`.
        kl_weight: :math:`\lambda \ge 0`, reward per nat.

    Returns:
        (N,) losses, averaged over completions; metrics `reward`, `clip_fraction` (1 where the clipped branch holds and
        no gradient flows), `proposal_kl` (:math:`\log q' - \log\pi_\theta`) and, with a reference, `kl`
        (:math:`\log q' - \log\pi_\text{ref}`).

    Raises:
        InputError: as for `reinforce`, for an unnormalised policy with any baseline, and for a clip outside (0, 1).

    Source: arXiv 2404.14367, which re-uses samples with it; the loss is that of arXiv 1707.06347.
    """
    method = "PPO"
    _require_normalised(method, policy)
    if not 0 < clip < 1:
        raise InputError(f"{method}: clip must lie strictly between 0 and 1, got {clip}")
    parts = Groups.of(method, groups, policy)
    score = numbers(method, "rewards", rewards, policy)
    drawn = numbers(method, "proposal", proposal, policy)
    metrics = {"reward": score}
    _require_penalty(method, kl_weight, reference)
    if reference is not None:
        log_ratio(method, policy, reference, absolute=baseline == "none")  # for its refusals
        metrics["kl"] = drawn - finite_reference(method, reference, policy)
        score = score - kl_weight * metrics["kl"]
    advantage = parts.advantages(method, score, baseline, standardise=standardise)
    log_rho = policy.value - drawn
    # The excess is taken off as a constant: the value stops growing, the gradient keeps its direction.
    rho = (log_rho - (log_rho - _LARGEST).clamp(min=0).detach()).exp()
    free, clipped = rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage
    metrics["clip_fraction"] = (clipped < free).detach().to(score.dtype)
    metrics["proposal_kl"] = -log_rho.detach()
    return _per_completion(-torch.minimum(free, clipped), metrics)


def nash_md_pg(policy: LogLikelihood, reference: LogLikelihood, rewards: Tensor, *, tau: float = 0.1) -> Terms:
    r"""Nash-MD-PG: policy gradient of the KL-regularised preference game, by REINFORCE over whole sequences.

    .. math::

        \ell_i = -\bigl(P(y_i \succ y'_i) - \tfrac12 - \tau s(y_i)\bigr) \log\pi_\theta(y_i),\qquad
        s = \log\pi_\theta - \log\pi_\text{ref}

    with :math:`y \sim \pi_\theta` and the opponent :math:`y'` from the geometric mixture
    :math:`\pi_\theta^{1-\beta}\pi_\text{ref}^{\beta}` (`loglik.decoding.mixture`). The bracket is held constant; the
    mean gradient is that of :math:`-P(\pi \succ \pi') + \tau\,\mathrm{KL}(\pi\|\pi_\text{ref})` at a fixed opponent.

    *Online IPO* and *IPO-MD* need no function of their own: they are `ipo` on fresh pairs, both drawn from the policy,
    or both from the mixture, with :math:`P(y \succ y')` as soft label. With both from the policy

    .. math::

        \nabla\,\mathbb{E}\bigl[(s(y) - s(y') - (P - \tfrac12)/\tau)^2\bigr]
        = -\tfrac4\tau\,\nabla_\pi\bigl[P(\pi \succ \pi') - \tau\,\mathrm{KL}(\pi\|\pi_\text{ref})\bigr]_{\pi'=\pi}:

    in expectation online IPO is :math:`4/\tau` times this objective with beta = 0.

    Args:
        policy: (N,) :math:`\log\pi_\theta` of its own samples, differentiable.
        reference: (N,) :math:`\log\pi_\text{ref}`; detached.
        rewards: (N,) probability that each sample is preferred to its opponent; detached.
        tau: weight of the KL term, preference per nat.

    Returns:
        (N,) surrogate losses, averaged over completions; metrics `preferred` (the rewards) and `kl` (the log-ratio,
        whose mean estimates KL(policy || reference)).

    Raises:
        InputError: for rewards outside [0, 1], an upper bound, unknown constants, rows that do not pair, numbers that
            are not finite, or a tau that is not positive.

    Source: arXiv 2403.08635 and 2312.00886.
    """
    method = "Nash-MD"
    require_positive(method, tau=tau)
    _require_normalised(method, policy)
    preferred = numbers(method, "rewards", rewards, policy)
    outside = ((preferred < 0) | (preferred > 1)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"{method} takes the probability of being preferred as reward, and that of row {row} is "
            f"{float(preferred[row]):g}: give numbers in [0, 1]"
        )
    finite_reference(method, reference, policy)
    ratio = log_ratio(method, policy, reference, absolute=True).value.detach()
    advantage = preferred - 0.5 - tau * ratio
    return _per_completion(-advantage * policy.value, {"preferred": preferred, "kl": ratio})


def _target(
    method: str,
    policy: LogLikelihood,
    reference: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    gamma: float,
    log_normalizer: float | Tensor | None = None,
) -> tuple[Groups, Tensor]:
    """The groups and (N,) log of the posterior's weights p* / (n q'), detached; -inf where the prior is 0."""
    require_positive(method, gamma=gamma)
    require_rows(method, policy, reference)
    require_kinds(method, policy, reference)
    parts = Groups.of(method, groups, policy)
    tilted = (
        finite_reference(method, reference, policy, zero=True) + numbers(method, "rewards", rewards, policy) / gamma
    )
    weights = tilted - numbers(method, "proposal", proposal, policy)
    empty = torch.isneginf(parts.max(weights)).nonzero().flatten()
    if len(empty):
        raise InputError(
            f"{method}: the reference gives no completion of the prompt of row {parts.first_row(int(empty[0]))} any "
            "probability; leave that prompt out"
        )
    if log_normalizer is None:
        return parts, parts.log_softmax(weights)
    known = torch.as_tensor(log_normalizer).detach().to(weights)
    if known.shape not in ((), parts.sizes.shape) or not bool(known.isfinite().all()):
        raise InputError(
            f"{method}: log_normalizer must be one finite number or {len(parts.sizes)}, one per prompt; got "
            f"{log_normalizer}"
        )
    return parts, weights - (known + parts.sizes.to(weights).log())[parts.index]


def _weighted(
    method: str,
    policy: LogLikelihood,
    reference: LogLikelihood,
    proposal: Tensor,
    rewards: Tensor,
    groups: Tensor,
    gamma: float,
    log_normalizer: float | Tensor | None,
    *,
    baseline: bool,
) -> Terms:
    _require_normalised(method, policy)
    parts, log_weights = _target(method, policy, reference, proposal, rewards, groups, gamma, log_normalizer)
    weights = log_weights.clamp(max=_LARGEST).exp()
    metrics = _matching_metrics(parts, rewards, parts.log_softmax(log_weights).exp())
    if baseline:
        own = policy.value.detach() - numbers(method, "proposal", proposal, policy)
        weights = weights - (own - parts.sizes.to(own).log()[parts.index]).clamp(max=_LARGEST).exp()
    return parts.terms(-weights * policy.value, metrics)


def _matching_metrics(parts: Groups, rewards: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    return {
        "reward": parts.mean(rewards.detach().to(alpha)),
        "effective_sample_size": 1 / parts.sum(alpha.square()),
    }


def _per_completion(loss: Tensor, metrics: dict[str, Tensor]) -> Terms:
    return Terms(loss, torch.ones_like(loss), metrics)


def _require_penalty(method: str, kl_weight: float, reference: LogLikelihood | None) -> None:
    if kl_weight != 0:
        require_positive(method, kl_weight=kl_weight)
        if reference is None:
            raise InputError(f"{method}: kl_weight needs the log-likelihoods of a reference; give one or set it to 0")


def _require_normalised(method: str, policy: LogLikelihood) -> None:
    require_kinds(method, policy)
    if policy.kind is Kind.UNNORMALIZED:
        raise InputError(
            f"{method} weighs the log-likelihood itself, and the unknown constant of an unnormalised model moves with "
            "its parameters: use an objective of differences within a prompt (BRAIn), or a normalised model"
        )
