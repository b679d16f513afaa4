r"""Several rewards as one: weighted sums of calibrated scores, under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["MixedReward", "mix_rewards"]

Score = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]]
Judge = Callable[[Sequence[int], Sequence[int]], bool]
Normalise = Literal["none", "standardise", "rank"]


def mix_rewards(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    normalise: Normalise = "none",
    allowed: Tensor | None = None,
    penalty: float | None = None,
) -> Tensor:
    r"""Combined reward (N,), :math:`R_i = \sum_k w_k\, c_k(r_{ki})`; less than every allowed one where a judge objects.

    Maximising :math:`\mathbb{E}_\pi[R] - \beta\,\text{KL}(\pi \| \pi_\text{ref})` trades the rewards off by their
    weights (RLUF's P[Love] beside helpfulness and safety). Rewards on different scales need a calibration c.

    Args:
        rewards: (N,) each, by name; higher is better. What is combined must be finite.
        weights: one per reward; any sign, 0 leaves a reward out.
        normalise: c: ``none``; ``standardise`` to mean 0 and deviation 1 over the N completions; ``rank`` to the share
            of completions that score no more, ties sharing their mean.
        allowed: (N,) bool, False where a constraint is violated.
        penalty: taken off the reward of violations; by default as much as puts them below every allowed completion.

    Raises:
        InputError: for names that do not match, shapes that differ, numbers that are not finite, or options out of
            range.

    Source: arXiv 2505.14946 combines P[Love] with other rewards.
    """
    if not rewards or set(rewards) != set(weights):
        raise InputError(f"weights must name the rewards ({', '.join(rewards) or 'none'}), got {', '.join(weights)}")
    if normalise not in ("none", "standardise", "rank"):
        raise InputError(f"normalise must be 'none', 'standardise' or 'rank', got {normalise!r}")
    if penalty is not None and not 0 <= penalty < math.inf:
        raise InputError(f"penalty must be finite and at least 0, got {penalty}")
    size = next(iter(rewards.values())).shape
    total: Tensor | None = None
    for name, values in rewards.items():
        if values.dim() != 1 or values.shape != size:
            raise InputError(f"rewards must all be (N,), and {name} has shape {tuple(values.shape)}")
        bad = (~values.isfinite()).nonzero().flatten()
        if len(bad):
            raise InputError(f"the reward {name} of row {int(bad[0])} is {float(values[bad[0]])}: leave that row out")
        if not math.isfinite(weights[name]):
            raise InputError(f"the weight of {name} must be finite, got {weights[name]}")
        part = weights[name] * _calibrated(values, normalise)
        total = part if total is None else total + part
    assert total is not None
    if allowed is None:
        return total
    if allowed.shape != size or allowed.dtype != torch.bool:
        raise InputError(f"allowed must be bool of shape {tuple(size)}, got {allowed.dtype} {tuple(allowed.shape)}")
    if penalty is None:
        # One more than the whole range: a violation never beats what is allowed.
        penalty = float(total.max() - total.min()) + 1.0 if len(total) else 0.0
    return total - penalty * (~allowed)


@dataclass(frozen=True)
class MixedReward:
    """Several reward functions as one, for collectors such as `DrawGroups`: completions of one prompt are combined.

    Args:
        rewards: functions of a prompt and its completions (token ids), by name.
        weights: one per reward.
        normalise: as for `mix_rewards`, over the completions of a prompt.
        constraints: judges of (prompt, completion) that must all say True.
        penalty: taken off violations; by default they rank below every allowed completion of their prompt.
    """

    rewards: Mapping[str, Score]
    weights: Mapping[str, float]
    normalise: Normalise = "none"
    constraints: Sequence[Judge] = field(default_factory=tuple)
    penalty: float | None = None

    def __call__(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        """Combined rewards of the completions."""
        scores = {}
        for name, score in self.rewards.items():
            found = list(score(prompt, completions))
            if len(found) != len(completions):
                raise InputError(f"the reward {name} gave {len(found)} numbers for {len(completions)} completions")
            scores[name] = torch.tensor(found, dtype=torch.float64)
        allowed = None
        if self.constraints:
            allowed = torch.tensor([all(judge(prompt, c) for judge in self.constraints) for c in completions])
        mixed = mix_rewards(scores, self.weights, normalise=self.normalise, allowed=allowed, penalty=self.penalty)
        out: list[float] = mixed.tolist()
        return out


def _calibrated(values: Tensor, normalise: Normalise) -> Tensor:
    if normalise == "none" or not len(values):
        return values
    if normalise == "standardise":
        centred = values - values.mean()
        # Equal rewards tell nothing apart: 0 for all, not rounding blown up.
        flat = len(values) < 2 or bool((values == values[0]).all())
        return torch.zeros_like(values) if flat else centred / values.std()
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return ((below + (equal + 1) / 2) / len(values)).to(values.dtype)
