"""Completions of one prompt as a group: sums, softmaxes and advantages within it, and the checks of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms

__all__ = ["Baseline", "Groups", "finite_reference", "numbers"]

Baseline = Literal["none", "group", "leave_one_out"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which of G prompts each of N completions belongs to.

    Args:
        index: (N,) 0..G-1, ascending.
        sizes: (G,) completions of each prompt.
    """

    index: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, method: str, groups: Tensor, policy: LogLikelihood) -> Groups:
        """From (N,) labels of prompts, which may leave gaps.

        Raises:
            InputError: for another shape, labels that are no integers, or that do not ascend.
        """
        if groups.shape != policy.value.shape or not len(groups):
            raise InputError(
                f"{method} needs the prompt of every completion: got {len(policy)} rows and groups of shape "
                f"{tuple(groups.shape)}"
            )
        if groups.is_floating_point() or groups.dtype == torch.bool:
            raise InputError(f"{method}: groups must be integers, got {groups.dtype}")
        groups = groups.to(policy.value.device)
        back = (groups.diff() < 0).nonzero().flatten()
        if len(back):
            raise InputError(
                f"{method}: groups must ascend, and row {int(back[0]) + 1} goes back; sort the completions by prompt"
            )
        _, index, sizes = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
        return cls(index, sizes)

    def sum(self, values: Tensor) -> Tensor:
        """(G,) sums of (N,) values."""
        return values.new_zeros(len(self.sizes)).index_add(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        """(G,) means of (N,) values."""
        return self.sum(values) / self.sizes

    def max(self, values: Tensor) -> Tensor:
        """(G,) maxima of (N,) values, detached."""
        start = values.new_full((len(self.sizes),), -math.inf)
        return start.scatter_reduce(0, self.index, values.detach(), "amax")

    def log_softmax(self, values: Tensor) -> Tensor:
        """(N,) log-softmax over the completions of each prompt."""
        shifted = values - self.max(values)[self.index]
        return shifted - self.sum(shifted.exp()).log()[self.index]

    def first_row(self, group: int) -> int:
        """The first completion of a prompt, to name it by."""
        return int((self.index == group).nonzero()[0])

    def terms(self, per_completion: Tensor, metrics: dict[str, Tensor]) -> Terms:
        """Sums per prompt, each of weight one."""
        loss = self.sum(per_completion)
        return Terms(loss, torch.ones_like(loss), metrics)

    def advantages(self, method: str, score: Tensor, baseline: Baseline, *, standardise: bool) -> Tensor:
        """(N,) scores less their baseline and, if asked for, divided by the standard deviation within the prompt.

        Raises:
            InputError: for an unknown baseline, one that needs two completions where there is one, or standardising
                without any.
        """
        if baseline not in get_args(Baseline):
            raise InputError(f"{method}: baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}")
        if baseline == "none":
            if standardise:
                raise InputError(f"{method}: standardise also centres the rewards; choose the group baseline for it")
            return score
        alone = (self.sizes < 2).nonzero().flatten()
        if len(alone):
            raise InputError(
                f"{method}: the {baseline} baseline needs two completions of a prompt, and that of row "
                f"{self.first_row(int(alone[0]))} has one; draw more, or use none"
            )
        centred = score - self.mean(score)[self.index]
        if standardise:
            spread = (self.sum(centred.square()) / (self.sizes - 1)).sqrt()
            # Equal scores: what is left of them after centring is rounding, which must not be blown up.
            flat = self.max(score) == -self.max(-score)
            centred = (centred / spread.masked_fill(flat, 1.0)[self.index]).masked_fill(flat[self.index], 0.0)
        if baseline == "leave_one_out":
            centred = centred * (self.sizes / (self.sizes - 1)).to(centred.dtype)[self.index]
        return centred


def numbers(method: str, name: str, values: Tensor, policy: LogLikelihood) -> Tensor:
    """Data (N,) in the policy's precision, without a gradient.

    Raises:
        InputError: for another shape, or naming the first row that is not finite.
    """
    if values.shape != policy.value.shape:
        raise InputError(f"{method} needs {name} of shape ({len(policy)},), got {tuple(values.shape)}")
    values = values.detach().to(policy.value)
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        raise InputError(f"{method}: {name} of row {int(bad[0])} is {float(values[bad[0]])}; leave that completion out")
    return values


def finite_reference(method: str, reference: LogLikelihood, policy: LogLikelihood, *, zero: bool = False) -> Tensor:
    """The reference's values (N,) in the policy's precision, without a gradient; `zero` allows log 0.

    Raises:
        InputError: naming the first row that is not finite.
    """
    value = reference.value.detach().to(policy.value)
    good = value.isfinite() | (torch.isneginf(value) if zero else torch.zeros_like(value, dtype=torch.bool))
    bad = (~good).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"{method}: the reference log-likelihood of row {row} is {float(value[row])}; leave that completion out"
        )
    return value
