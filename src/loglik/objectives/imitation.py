r"""SequenceMatch: imitation of demonstrated sequences by matching occupancies, with logits as soft action values.

A language model is a policy: its state is the visible prefix, an action appends a token or, with a backspace, deletes
the last one. Maximum likelihood matches the data's actions in the data's states; SequenceMatch minimises a divergence
between how often data and model *visit* states and actions, without an adversary (arXiv 2306.05426). What a backspace
does to the visible prefix is in `loglik.decoding.backspace`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.objectives.base import Terms, require_between, require_positive

__all__ = ["Divergence", "Trajectories", "insert_backspaces", "sequence_match"]

Divergence = Literal["chi2_mixture", "chi2", "le_cam", "kl", "js", "hellinger"]
_METHOD = "SequenceMatch"


@dataclass(frozen=True, slots=True)
class Trajectories:
    r"""Soft values along B action sequences.

    Args:
        action_logits: (B, T) :math:`l(a_t \mid s_t)`, raw; differentiable.
        values: (B, T) :math:`V(s_t) = \log\sum_a e^{l(a \mid s_t)}`.
        next_values: (B, T) :math:`V(s_{t+1})`, 0 after the last action.
        mask: (B, T) bool, True where an action stands; the t-th of a row is step t.
    """

    action_logits: Tensor
    values: Tensor
    next_values: Tensor
    mask: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, actions: Tensor, mask: Tensor) -> Trajectories:
        """Trajectories from the logits of all actions at each step.

        The state behind the last action of a row counts as terminal, with value 0: behind EOS, and behind a cap on the
        number of actions too. Other conventions (an absorbing state with a reward) have other optima.

        Args:
            logits: (B, T, A) unnormalised logits in the state in which each action is taken; -inf for an action that is
                impossible there (a backspace where nothing can be deleted).
            actions: (B, T) long.
            mask: (B, T) bool, True where an action stands; a row's next state is that of its next action.

        Raises:
            InputError: for shapes that do not fit, an impossible action that is taken, or log-probabilities in place of
                logits: normalised, every value is 0, and nothing is left to learn from.
        """
        if logits.dim() != 3 or actions.shape != logits.shape[:2] or mask.shape != actions.shape:
            raise InputError(
                f"{_METHOD} needs logits (B, T, A), actions (B, T) and mask (B, T), got {tuple(logits.shape)}, "
                f"{tuple(actions.shape)} and {tuple(mask.shape)}"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        values = wide.logsumexp(-1).masked_fill(~mask, 0.0)
        if bool(mask.any()) and float(values.detach()[mask].abs().max()) < 1e-5:
            raise InputError(
                f"{_METHOD} needs unnormalised logits, and the values of all states are 0: give raw logits"
            )
        taken = wide.gather(-1, actions.masked_fill(~mask, 0)[..., None])[..., 0].masked_fill(~mask, 0.0)
        width = mask.shape[1]
        columns = torch.arange(width, device=mask.device).expand_as(mask).masked_fill(~mask, width)
        # The first column with an action at or behind each one; behind the last stands the terminal state.
        following = columns.flip(1).cummin(1).values.flip(1)
        following = torch.nn.functional.pad(following, (0, 1), value=width)[:, 1:]
        next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, following)
        return cls(taken, values, next_values.masked_fill(~mask, 0.0), mask)

    def __post_init__(self) -> None:
        shapes = {tuple(part.shape) for part in (self.action_logits, self.values, self.next_values, self.mask)}
        if len(shapes) != 1 or self.mask.dim() != 2 or self.mask.dtype != torch.bool:
            raise InputError(f"{_METHOD} needs tensors of one shape (B, T) and a bool mask, got {sorted(shapes)}")
        empty = (~self.mask.any(1)).nonzero().flatten()
        if not len(self.mask) or len(empty):
            where = f"row {int(empty[0])} has" if len(empty) else "there is"
            raise InputError(f"{_METHOD}: {where} no action: remove it, or give one")
        for name in ("action_logits", "values", "next_values"):
            bad = (~getattr(self, name).detach().isfinite() & self.mask).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                raise InputError(
                    f"{_METHOD}: {name} of row {row}, column {column} is {float(getattr(self, name)[row, column])}; "
                    "leave out trajectories with impossible actions"
                )

    def discounts(self, gamma: float) -> Tensor:
        r"""(B, T) :math:`\gamma^t` of the t-th action of each row, 0 elsewhere."""
        step = self.mask.cumsum(1) - 1
        weights = torch.pow(torch.tensor(gamma, dtype=self.values.dtype, device=self.values.device), step)
        return weights.masked_fill(~self.mask, 0.0)


def sequence_match(
    data: Trajectories,
    rollouts: Trajectories | None = None,
    *,
    divergence: Divergence = "chi2_mixture",
    alpha: float = 0.1,
    gamma: float = 0.98,
    discount_positions: bool = True,
    max_ratio: float = 100.0,
) -> Terms:
    r"""SequenceMatch loss of demonstrations and of the model's own trajectories.

    With :math:`d = l(a \mid s) - \gamma V(s')` and expectations over occupancies
    (:math:`\mathbb{E}[x] = \frac1B \sum_b \sum_t \gamma^t x_{bt}`),

    .. math::

        L = -\tfrac1\alpha\,\mathbb{E}_\text{data}[\phi(\alpha d)]
            + \tfrac12\,\mathbb{E}_\text{data}[V(s) - \gamma V(s')]
            + \tfrac12\,\mathbb{E}_\text{model}[V(s) - \gamma V(s')]

    Both value terms are :math:`\mathbb{E}[V(s_0)]` (they telescope) whatever the trajectories, and their average has
    less variance. Without rollouts the data's counts alone. Minimising L minimises
    :math:`D(\rho_\text{data}, \rho_\theta) - \alpha H(\rho_\theta)` with H the causal entropy and :math:`u =
    \rho_\theta / \rho_\text{data}`:

    ================ ============================================ =============================================
    divergence       :math:`\phi(x)`                              D
    ================ ============================================ =============================================
    ``chi2``         :math:`x - x^2/4`                            :math:`\sum \rho_\text{data} (1 - u)^2`
    ``le_cam``       :math:`4\sqrt{1+x} - 4 - x`                  :math:`\sum \rho_\text{data} (1-u)^2 / (1+u)`,
                                                                  twice the chi-square distance to the mixture
    ``kl``           :math:`1 - e^{-x}`                           :math:`\sum \rho_\theta \log u - \rho_\theta +
                                                                  \rho_\text{data}`, the reverse KL divergence
    ``js``           :math:`\log(2 - e^{-x})`                     twice the Jensen-Shannon divergence
    ``hellinger``    :math:`x / (1 + x)`                          :math:`\sum \rho_\text{data} (1 - \sqrt u)^2`
    ================ ============================================ =============================================

    ``chi2_mixture`` is the paper's recommended loss: :math:`\phi(x) = x - x^2/4` and the penalty
    :math:`\frac\alpha4 \mathbb{E}_\text{model}[d^2]` on rollouts as well. At its fixed points
    :math:`\alpha d = 2 (\rho_\text{data} - \rho_\theta) / (\rho_\text{data} + \rho_\theta)`, the reward of the
    chi-square distance to the mixture; but they minimise that distance less :math:`\alpha H` only approximately, the
    better the smaller alpha, because the model's own states are held constant. ``le_cam`` does so exactly.

    At alpha = 0 every divergence is :math:`-\mathbb{E}_\text{data}[d]` and the value terms: with the data's value term
    alone, discounted maximum likelihood.

    Args:
        data: demonstrations; differentiable.
        rollouts: of the model, drawn recently; constants but for their values and logits, which are differentiable: no
            gradient flows through the sampling.
        divergence: which.
        alpha: weight of the entropy, and the scale of the reward :math:`\alpha d`; at least 0.
        gamma: discount in (0, 1]; 1 is possible since trajectories end.
        discount_positions: weigh step t by :math:`\gamma^t`; False weighs all alike, which approximates the
            occupancies for gamma near 1.
        max_ratio: :math:`\phi` goes on as its tangent where its slope, which is u at the optimum, exceeds this; but for
            the chi-square ones it would end or explode there.

    Returns:
        Means over demonstrations and over rollouts, added; metrics of the demonstrations, each (B,): `nats_per_action`,
        `start_value` :math:`V(s_0)`, `reward` :math:`\alpha d` (mean over actions), and of the rollouts
        `rollout_reward` and `rollout_start_value`.

    Raises:
        InputError: for an unknown divergence, an alpha, gamma or max_ratio out of range, or ``chi2_mixture`` without
            rollouts.

    Source: arXiv 2306.05426; IQ-Learn, arXiv 2106.12142. :math:`\phi` of ``kl`` is the sheet's :math:`-e^{-(x+1)}` with
    the reward shifted so that :math:`\phi'(0) = 1`: the same where all trajectories are of one length.
    """
    if divergence not in get_args(Divergence):
        raise InputError(f"{_METHOD}: divergence must be one of {', '.join(get_args(Divergence))}, got {divergence!r}")
    require_between(_METHOD, 0.0, 1e6, alpha=alpha)
    require_between(_METHOD, 0.0, 1.0, gamma=gamma)
    require_positive(_METHOD, gamma=gamma)
    require_between(_METHOD, 1.0 + 1e-9, 1e9, max_ratio=max_ratio)
    if divergence == "chi2_mixture" and rollouts is None and alpha > 0:
        raise InputError(f"{_METHOD}: the chi2_mixture divergence needs rollouts; give some, or take 'chi2'")
    decay = gamma if discount_positions else 1.0

    def summed(x: Tensor, of: Trajectories) -> Tensor:
        return (of.discounts(decay) * x).sum(1)

    def mean(x: Tensor, of: Trajectories) -> Tensor:
        return x.detach().masked_fill(~of.mask, 0.0).sum(1) / of.mask.sum(1)

    shaped = data.action_logits - gamma * data.next_values
    fit = shaped if alpha == 0 else _phi(divergence, alpha * shaped, max_ratio) / alpha
    value = data.values - gamma * data.next_values
    loss = summed(-fit + (1.0 if rollouts is None else 0.5) * value, data)
    metrics = {
        "nats_per_action": mean(data.values - data.action_logits, data),
        "start_value": _first(data.values, data.mask),
        "reward": mean(alpha * shaped, data),
    }
    terms = Terms(loss, torch.ones_like(loss.detach()), metrics)
    if rollouts is None:
        return terms
    own = rollouts.action_logits - gamma * rollouts.next_values
    cost = 0.5 * (rollouts.values - gamma * rollouts.next_values)
    if divergence == "chi2_mixture":
        cost = cost + 0.25 * alpha * own.square()
    loss = summed(cost, rollouts)
    terms.metrics["rollout_reward"] = mean(alpha * own, rollouts)
    terms.metrics["rollout_start_value"] = _first(rollouts.values, rollouts.mask)
    return terms + Terms(loss, torch.ones_like(loss.detach()))


def insert_backspaces(
    x: TokenBatch,
    *,
    backspace_id: int,
    tokens: Sequence[int] | Tensor,
    rate: float,
    generator: torch.Generator | None = None,
) -> TokenBatch:
    """Demonstrations of recovery: before a scored token, a wrong one and the backspace that deletes it.

    The wrong token is part of the state and no target (training on it would teach errors); the backspace is one.

    Args:
        x: B rows; padding may stand anywhere.
        backspace_id: the backspace action.
        tokens: ids that wrong tokens are drawn from, uniformly without the one that is right there; leave out EOS,
            which would end the sequence.
        rate: probability of an insertion before each scored token, in [0, 1].
        generator: on the CPU; the global one by default.

    Returns:
        Longer rows, aligned left, with `starts` where they were; `words` is dropped.

    Raises:
        InputError: for a rate outside [0, 1], fewer than two tokens, or a backspace among them or in the data.

    Source: arXiv 2306.05426, section 3.
    """
    require_between("insert_backspaces", 0.0, 1.0, rate=rate)
    choice = sorted({int(token) for token in tokens})
    if len(choice) < 2 or backspace_id in choice:
        raise InputError("insert_backspaces needs at least two tokens to insert, none of them the backspace itself")
    packed, _ = x.packed_left()
    if bool((packed.attention_mask & packed.scored_mask & (packed.ids == backspace_id)).any()):
        raise InputError(
            f"insert_backspaces: the data has the backspace (token {backspace_id}) already: give clean rows"
        )
    hit = packed.scored_mask & (torch.rand(packed.ids.shape, generator=generator) < rate).to(packed.ids.device)
    others = torch.tensor(choice, device=packed.ids.device)
    rank = torch.searchsorted(others, packed.ids)
    in_choice = others[rank.clamp(max=len(choice) - 1)] == packed.ids
    draw = torch.rand(packed.ids.shape, generator=generator, dtype=torch.float64).to(packed.ids.device)
    # One of the others: ranks from the right token's on move up by one.
    wrong = (draw * (len(choice) - in_choice.long())).long()
    wrong = others[wrong + (in_choice & (wrong >= rank)).long()]
    # Every token owns three slots, (wrong, backspace, itself); those that are not filled are padding.
    ids = torch.stack([wrong, torch.full_like(wrong, backspace_id), packed.ids], dim=-1).flatten(1)
    real = torch.stack([hit, hit, packed.attention_mask], dim=-1).flatten(1)
    scored = torch.stack([hit & False, hit, packed.scored_mask], dim=-1).flatten(1)
    first = 3 * packed.completion_starts()
    return replace(packed, ids=ids, attention_mask=real, scored_mask=scored, starts=first, words=None).packed_left()[0]


def _phi(divergence: Divergence, x: Tensor, max_ratio: float) -> Tensor:
    r""":math:`\phi(x)`, concave, with :math:`\phi(0) = 0` and :math:`\phi'(0) = 1`."""
    if divergence in ("chi2", "chi2_mixture"):
        return x - 0.25 * x.square()
    start = {
        "kl": -math.log(max_ratio),
        "js": -math.log(2 * max_ratio / (1 + max_ratio)),
        "hellinger": max_ratio**-0.5 - 1,
        "le_cam": 4 / (1 + max_ratio) ** 2 - 1,
    }[divergence]
    inner = x.clamp(min=start)
    if divergence == "kl":
        curve = -torch.expm1(-inner)
    elif divergence == "js":
        curve = torch.log1p(-torch.expm1(-inner))
    elif divergence == "hellinger":
        curve = inner / (1 + inner)
    else:
        curve = 4 * inner / (torch.sqrt(1 + inner) + 1) - inner
    return curve + max_ratio * (x - inner)


def _first(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) the value at each row's first action, detached."""
    return values.detach().gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
