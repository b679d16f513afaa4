r"""Policy gradients on bounds: BGPO and GDPO, for models whose log-likelihood is a mean over random masks.

Both put a difference of evidence bounds where a policy-gradient objective has a log-ratio of likelihoods; that
difference bounds nothing (its kind is SURROGATE). Policy and old policy must be evaluated on the same masks, else the
difference is noise: give both the same `draws`. Without an old policy the step is on policy: the ratio is 1, and its
gradient that of the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_kinds, require_positive, require_rows, require_units
from loglik.objectives.groups import Baseline, Groups, finite_reference, numbers

__all__ = ["bgpo", "gdpo"]

_LARGEST = 40.0  # nats; keeps ratios finite in float32


def bgpo(
    policy: LogLikelihood,
    rewards: Tensor,
    groups: Tensor,
    old: LogLikelihood | None = None,
    reference: LogLikelihood | None = None,
    *,
    baseline: Baseline = "group",
    standardise: bool = True,
    length_normalise: bool = False,
    clip: float | None = None,
    dual_clip: float | None = None,
    kl_weight: float = 0.0,
) -> Terms:
    r"""BGPO: a lower bound on the ratio objective that is a plain mean over masks, so that memory does not grow.

    With :math:`\delta_j = \ell_\theta^j - \ell_\text{old}^j`, the terms of one mask each, and advantage A

    .. math:: \frac1n \sum_j \begin{cases} A (1 + \delta_j) & A \ge 0 \\ A\, e^{\delta_j} & A < 0 \end{cases}
       \;\le\; A \exp\Big(\frac1n \sum_j \delta_j\Big)

    is maximised. On policy its value is A and its gradient :math:`A\, \nabla \text{ELBO}`, those of the right side.
    Each summand depends on one mask: give the terms of one draw at a time (`EvidenceTerms.terms`, or
    ``draws_per_step`` in training), and every graph is freed before the next is built. Equal completions share
    their masks. Given all draws at once, ``policy.samples`` (S, N), the mean over them is taken here.

    Args:
        policy: (N,) bound on :math:`\log \pi_\theta(y)`, differentiable.
        rewards: (N,) of the completions; detached.
        groups: (N,) prompt of each completion, ascending.
        old: (N,) the policy that drew the completions, on the same draws; detached. None: the policy itself.
        reference: (N,) frozen, on the same draws, for a KL penalty inside the reward; detached.
        baseline: of the advantage, within the prompt.
        standardise: divide the advantage by the prompt's standard deviation (as GRPO).
        length_normalise: divide each difference by the completion's scored tokens (as released code does).
        clip: PPO's clipping of the two cases at 1 - clip and 1 + clip; None: none, as in the paper's formula.
        dual_clip: for A < 0, the ratio counts at most this much (3 in released code); above 1.
        kl_weight: reward per nat of :math:`\log \pi_\theta - \log \pi_\text{ref}`.

    Returns:
        (N,) losses, averaged over completions; metrics `reward`, `ratio` (exp of the mean difference) and, with
        clipping, `clip_fraction`.

    Raises:
        InputError: for other masks of the old policy, rows that do not pair, rewards that are not finite, a prompt
            with one completion where the baseline needs two, or options out of range.

    Source: arXiv 2510.11683.
    """
    method = "BGPO"
    _check_clips(method, clip, dual_clip)
    require_kinds(method, policy)
    parts = Groups.of(method, groups, policy)
    penalised = _penalised(method, policy, rewards, reference, kl_weight)
    advantage = parts.advantages(method, penalised, baseline, standardise=standardise)
    delta = _differences(method, policy, old)
    if length_normalise:
        require_units(method, policy)
        delta = delta / policy.num_units.to(delta)
    gain = torch.where(advantage >= 0, 1 + delta, _exp(delta))
    terms = gain * advantage
    metrics = {"reward": numbers(method, "rewards", rewards, policy), "ratio": _exp(delta.mean(0)).detach()}
    if clip is not None:
        terms = torch.minimum(terms, gain.clamp(1 - clip, 1 + clip) * advantage)
        metrics["clip_fraction"] = (terms < gain * advantage).detach().to(delta.dtype).mean(0)
    if dual_clip is not None:
        terms = torch.where(advantage < 0, torch.maximum(terms, dual_clip * advantage), terms)
    loss = -terms.mean(0)
    return Terms(loss, torch.ones_like(loss), metrics)


def gdpo(
    policy: LogLikelihood,
    rewards: Tensor,
    groups: Tensor,
    old: LogLikelihood | None = None,
    reference: LogLikelihood | None = None,
    *,
    baseline: Baseline = "group",
    standardise: bool = False,
    clip: float = 0.2,
    kl_weight: float = 0.0,
) -> Terms:
    r"""GDPO for diffusion language models: a clipped sequence-level ratio of evidence bounds.

    .. math:: \frac{1}{|y|} \min\big(r A,\; \text{clip}(r, 1 - \epsilon, 1 + \epsilon) A\big)
       - \lambda\,(e^{-s} + s - 1), \quad r = e^{\text{ELBO}_\theta - \text{ELBO}_\text{old}},\;
       s = \text{ELBO}_\theta - \text{ELBO}_\text{ref}

    is maximised; bounds are in nats per sequence, and the paper estimates them with `Quadrature` (SDMC) of 2 or 3
    points. Not one of the other methods of that name (flows, graphs, decoupled rewards).

    Args:
        policy: (N,) bound on :math:`\log \pi_\theta(y)`, differentiable.
        rewards: (N,) of the completions; detached.
        groups: (N,) prompt of each completion, ascending.
        old: (N,) the policy that drew the completions, on the same draws; detached. None: the policy itself.
        reference: (N,) frozen, on the same draws; detached; needed for a KL penalty.
        baseline: of the advantage, within the prompt.
        standardise: divide the advantage by the prompt's standard deviation; the paper does not.
        clip: :math:`\epsilon` in (0, 1).
        kl_weight: :math:`\lambda`, of the penalty per sequence (the k3 estimator).

    Returns:
        (N,) losses, averaged over completions; metrics `reward`, `ratio`, `clip_fraction` and, with a reference, `kl`.

    Raises:
        InputError: as `bgpo`.

    Source: arXiv 2510.08554.
    """
    method = "GDPO"
    _check_clips(method, clip, None)
    require_kinds(method, policy)
    require_units(method, policy)
    parts = Groups.of(method, groups, policy)
    score = numbers(method, "rewards", rewards, policy)
    advantage = parts.advantages(method, score, baseline, standardise=standardise)
    log_ratio = _differences(method, policy, old).mean(0)
    ratio = _exp(log_ratio)
    free, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = -torch.minimum(free, clipped) / policy.num_units.to(free)
    metrics = {
        "reward": score,
        "ratio": ratio.detach(),
        "clip_fraction": (clipped < free).detach().to(score.dtype),
    }
    if kl_weight or reference is not None:
        gap = _against_reference(method, policy, reference)
        penalty = _exp(-gap) + gap - 1
        metrics["kl"] = penalty.detach()
        loss = loss + kl_weight * penalty
    return Terms(loss, torch.ones_like(loss), metrics)


def _differences(method: str, policy: LogLikelihood, old: LogLikelihood | None) -> Tensor:
    """(S, N) differences to the old policy, draw by draw where both bring their draws, else (1, N)."""
    own = policy.samples if policy.samples is not None else policy.value[None]
    if old is None:
        return own - own.detach()
    require_rows(method, policy, old)
    _same_draws(method, "old policy", policy, old)
    finite_reference(method, old, policy)
    before = old.samples if old.samples is not None else old.value[None]
    if before.shape != own.shape:
        raise InputError(f"{method} compares mask by mask: the policy has {len(own)} draws, the old one {len(before)}")
    return own - before.detach().to(own)


def _penalised(
    method: str, policy: LogLikelihood, rewards: Tensor, reference: LogLikelihood | None, weight: float
) -> Tensor:
    score = numbers(method, "rewards", rewards, policy)
    if not weight:
        return score
    return score - weight * _against_reference(method, policy, reference).detach()


def _against_reference(method: str, policy: LogLikelihood, reference: LogLikelihood | None) -> Tensor:
    """(N,) policy minus reference."""
    if reference is None:
        raise InputError(f"{method}: a KL penalty needs a reference: give one or set kl_weight to 0")
    require_rows(method, policy, reference)
    _same_draws(method, "reference", policy, reference)
    return policy.value - finite_reference(method, reference, policy)


def _same_draws(method: str, name: str, policy: LogLikelihood, other: LogLikelihood) -> None:
    if policy.draws != other.draws:
        raise InputError(
            f"{method} compares policy and {name} on the same masks, else the difference is noise: evaluate both with "
            "the same draws"
        )


def _exp(value: Tensor) -> Tensor:
    """Exponential whose value stops growing at the largest ratio while its gradient keeps its direction."""
    return (value - (value - _LARGEST).clamp(min=0).detach()).exp()


def _check_clips(method: str, clip: float | None, dual_clip: float | None) -> None:
    if clip is not None and not 0 < clip < 1:
        raise InputError(f"{method}: clip must lie strictly between 0 and 1, got {clip}")
    if dual_clip is not None:
        require_positive(method, dual_clip=dual_clip)
        if dual_clip <= 1:
            raise InputError(f"{method}: dual_clip must exceed 1, got {dual_clip}")
