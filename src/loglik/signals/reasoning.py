r"""Credit within a completion from log-ratios of policy and reference: per token, per step, per response.

In the token-level decision process of a language model, :math:`\beta \log(\pi / \pi_\text{ref})` of a token is its
soft advantage (arXiv 2404.12358), and the running sum is the exact soft expectation of the outcome reward given the
prefix (arXiv 2412.01981): rewards of steps come free with a model that was trained on outcomes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood

__all__ = ["ProcessRewards", "implicit_process_reward", "score_steps", "token_credit"]


def token_credit(policy: LogLikelihood, reference: LogLikelihood, *, beta: float) -> LogLikelihood:
    r"""Credit of each token of a completion under a policy that was trained against a reference.

    .. math:: c_t = \beta \log \frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_\text{ref}(y_t \mid x, y_{<t})}
              = r(s_t, y_t) + V^*(s_{t+1}) - V^*(s_t)

    The second form holds for the rewards that the policy is optimal for: a credit is a soft advantage and not the
    token's reward. A right token after which success is unlikely gets a negative one.

    Args:
        policy: (B,) log-likelihoods with a term per token, of the completions' tokens (EOS included).
        reference: the same tokens under the frozen reference; detached here.
        beta: of the KL-regularised objective, positive.

    Returns:
        `per_unit` (B, T) the credits, 0 where not scored, in nats times `beta`; `value` (B,) their sum, the implicit
        reward of the response. Differentiable in the policy; nothing is averaged.

    Raises:
        InputError: for likelihoods without terms, with terms of other tokens, or a beta out of range.
        RowError: for a token that one of the two gives probability 0 or no number.

    Source: arXiv 2404.12358.
    """
    if not (isinstance(beta, int | float) and 0 < beta < math.inf):
        raise InputError(f"token credit: beta must be positive and finite, got {beta}")
    for name, likelihood in (("policy", policy), ("reference", reference)):
        if likelihood.per_unit is None:
            raise InputError(
                f"token credit needs a term per {likelihood.unit}, and the {name} gives a sum alone: use a model with "
                "a chain rule (causal or encoder-decoder)"
            )
        bad = (~torch.isfinite(likelihood.per_unit)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise RowError(
                f"the {name}'s log-probability in column {column} is {float(likelihood.per_unit[row, column])}, so its "
                "credit is undefined: remove the row",
                row=f"row {row}",
            )
    assert policy.mask is not None
    assert reference.mask is not None
    if policy.mask.shape != reference.mask.shape or not bool((policy.mask == reference.mask).all()):
        raise InputError(
            f"token credit compares the same tokens: the policy has terms for {int(policy.mask.sum())} tokens of "
            f"{tuple(policy.mask.shape)} and the reference for {int(reference.mask.sum())} of "
            f"{tuple(reference.mask.shape)}; score one batch with both"
        )
    return (policy - reference.detach()) * beta


@dataclass(frozen=True, slots=True)
class ProcessRewards:
    r"""Rewards of the steps of B responses, S steps at most.

    Args:
        single: (B, S) reward of each step by itself, :math:`q_{t_j} - q_{t_{j-1}}`; 0 where there is no step.
        cumulative: (B, S) :math:`q_{t_j}`, the reward up to the end of each step; 0 where there is no step.
        mask: (B, S) bool, True where a step is; steps stand on the left.
        ends: (B, S) long, the column of each step's last token; 0 where there is no step.
        kind: what the values promise.
    """

    single: Tensor
    cumulative: Tensor
    mask: Tensor
    ends: Tensor
    kind: Kind


def implicit_process_reward(
    policy: LogLikelihood, reference: LogLikelihood, *, beta: float, boundaries: Tensor
) -> ProcessRewards:
    r"""Rewards of steps from a model that was trained on outcomes.

    .. math:: q_t = \beta \sum_{i \le t} \log \frac{\pi_\theta(y_i \mid x, y_{<i})}{\pi_\text{ref}(y_i \mid x, y_{<i})}
              = \beta \log \mathbb{E}_{\pi_\text{ref}(y_{>t} \mid y_{\le t})} \bigl[ e^{r_\theta(y) / \beta} \bigr]

    is the exact soft expectation of the outcome reward :math:`r_\theta(y) = q_T`, for every :math:`\pi_\theta`. The
    reward of step j is :math:`q_{t_j} - q_{t_{j-1}}`; steps of a response sum to :math:`r_\theta(y)`.

    Args:
        policy: (B,) log-likelihoods with a term per token, of the responses' tokens (EOS included).
        reference: the same tokens under the frozen reference; detached here.
        beta: scale of the reward, positive.
        boundaries: (B, T) bool, aligned with the terms: True at the last token of each step (a newline or marker
            belongs to the step that it ends). A row's last scored token ends a step, marked or not.

    Returns:
        The rewards in nats times `beta`, in the terms' dtype, summed in float64 and differentiable in the policy;
        token sums, without length normalisation.

    Raises:
        InputError: for likelihoods without terms or of other tokens, a beta out of range, or boundaries of another
            shape.
        RowError: for a boundary at a token that is not scored, a row without scored tokens, or a token of probability
            0.

    Source: arXiv 2412.01981.
    """
    credit = token_credit(policy, reference, beta=beta)
    assert credit.per_unit is not None
    assert credit.mask is not None
    scored = credit.mask
    if boundaries.shape != scored.shape or boundaries.dtype != torch.bool:
        raise InputError(
            f"boundaries must be bool of shape {tuple(scored.shape)} like the terms, got {boundaries.dtype} "
            f"{tuple(boundaries.shape)}"
        )
    boundaries = boundaries.to(scored.device)
    outside = (boundaries & ~scored).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise RowError(f"a step ends in column {column}, whose token is not scored: move it", row=f"row {row}")
    _require_any(scored, "scored token")
    last = scored & (scored.flip(1).int().cumsum(1).flip(1) == 1)
    ends = boundaries | last
    count = ends.sum(1)
    width = int(count.max()) if len(count) else 0
    # A stable sort brings the ends to the front and keeps their order.
    columns = (~ends).int().argsort(dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=ends.device) < count[:, None]
    columns = columns.masked_fill(~mask, 0)
    running = credit.per_unit.double().cumsum(1).gather(1, columns)
    before = torch.nn.functional.pad(running, (1, 0))[:, :-1]
    dtype = credit.per_unit.dtype
    single, cumulative = ((q.masked_fill(~mask, 0.0)).to(dtype) for q in (running - before, running))
    return ProcessRewards(single, cumulative, mask, columns, credit.kind)


def score_steps(step_rewards: Tensor, mask: Tensor, aggregate: Literal["min", "sum", "mean"] = "min") -> Tensor:
    r"""One score per response from the rewards of its steps, for best-of-n and weighted voting.

    Args:
        step_rewards: (B, S); what stands outside `mask` is ignored.
        mask: (B, S) bool, True where a step is.
        aggregate: ``min`` the worst step, ``sum`` (of single rewards: the outcome reward), or ``mean``. The ranking by
            ``min`` and ``sum`` does not depend on `beta`.

    Returns:
        (B,) scores in the dtype of the rewards.

    Raises:
        InputError: for an unknown aggregate or a mask of another shape.
        RowError: for a response without steps, or a reward that is not finite.

    Source: arXiv 2412.01981.
    """
    if aggregate not in ("min", "sum", "mean"):
        raise InputError(f"aggregate must be one of min, sum, mean, got {aggregate!r}")
    if step_rewards.dim() != 2 or mask.shape != step_rewards.shape or mask.dtype != torch.bool:
        raise InputError(
            f"step rewards (B, S) need a bool mask of their shape, got {tuple(step_rewards.shape)} with {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    _require_any(mask, "step")
    bad = (mask & ~torch.isfinite(step_rewards)).nonzero()
    if len(bad):
        row, step = bad[0].tolist()
        raise RowError(f"the reward of step {step} is {float(step_rewards[row, step])}", row=f"row {row}")
    if aggregate == "min":
        return step_rewards.masked_fill(~mask, torch.inf).amin(1)
    total = step_rewards.masked_fill(~mask, 0.0).sum(1)
    return total if aggregate == "sum" else total / mask.sum(1)


def _require_any(mask: Tensor, what: str) -> None:
    empty = (~mask.any(1)).nonzero().flatten()
    if len(empty):
        raise RowError(f"has no {what}: remove it", row=f"row {int(empty[0])}")
