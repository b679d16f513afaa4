r"""A world in which the reward is known, so that what preference learning should find is known too.

Answers are the outcomes of a finite set with reference log-probabilities (N,) and rewards (N,). Preferences are
Bradley-Terry, :math:`P(y \succ y') = \sigma(r(y) - r(y'))`, and the optimum of
:math:`E_\pi[r] - \beta \, \text{KL}(\pi \| \pi_\text{ref})` is
:math:`\pi^*(y) = \pi_\text{ref}(y) e^{r(y) / \beta} / Z`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worlds.enumerable import Language, expectation, kl

__all__ = ["Pairs", "PreferenceWorld", "bigram_rewards"]


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs as indices of outcomes: `chosen` (B,) and `rejected` (B,)."""

    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class PreferenceWorld:
    """A reference and a reward over N outcomes.

    Args:
        reference: (N,) normalised log-probabilities, nats.
        rewards: (N,) rewards.
    """

    reference: Tensor
    rewards: Tensor

    def optimum(self, beta: float) -> Tensor:
        """(N,) log-probabilities of the KL-regularised optimum."""
        return (self.reference + self.rewards / beta).log_softmax(-1)

    def log_partition(self, beta: float) -> Tensor:
        r""":math:`\log Z = \log E_\text{ref}[e^{r / \beta}]`."""
        return (self.reference + self.rewards / beta).logsumexp(-1)

    def expected_reward(self, log_p: Tensor) -> Tensor:
        """Of a policy (N,)."""
        return expectation(log_p, self.rewards)

    def divergence(self, log_p: Tensor) -> Tensor:
        """KL of a policy (N,) from the reference, nats."""
        return kl(log_p, self.reference)

    def objective(self, log_p: Tensor, beta: float) -> Tensor:
        """What the optimum maximises."""
        return self.expected_reward(log_p) - beta * self.divergence(log_p)

    def preference(self, first: Tensor, second: Tensor) -> Tensor:
        """Probability that `first` is preferred to `second` (indices, any shape)."""
        return torch.sigmoid(self.rewards[first] - self.rewards[second])

    def label(self, first: Tensor, second: Tensor, *, generator: torch.Generator | None, noisy: bool = True) -> Pairs:
        """Label pairs by Bradley-Terry draws, or by the larger reward; pairs of equal reward are dropped then."""
        if noisy:
            wins = torch.rand(first.shape, generator=generator) < self.preference(first, second)
        else:
            differ = self.rewards[first] != self.rewards[second]
            first, second = first[differ], second[differ]
            wins = self.rewards[first] > self.rewards[second]
        return Pairs(torch.where(wins, first, second), torch.where(wins, second, first))

    def pairs(
        self, n: int, *, sampler: Tensor | None = None, generator: torch.Generator | None, noisy: bool = True
    ) -> Pairs:
        """`n` pairs of two different outcomes drawn from `sampler` (N,), the reference by default; then labelled.

        Without noise only pairs of different reward count, so there are `n` all the same.
        """
        chances = (self.reference if sampler is None else sampler).exp()
        kept = torch.zeros(0, 2, dtype=torch.long)
        while len(kept) < n:
            drawn = torch.multinomial(chances, 2 * n, replacement=True, generator=generator).reshape(n, 2)
            differ = drawn[:, 0] != drawn[:, 1]
            if not noisy:
                differ &= self.rewards[drawn[:, 0]] != self.rewards[drawn[:, 1]]
            kept = torch.cat([kept, drawn[differ]])
        return self.label(kept[:n, 0], kept[:n, 1], generator=generator, noisy=noisy)


def bigram_rewards(language: Language, *, generator: torch.Generator) -> Tensor:
    """(V^T,) scores of the neighbours and of the pairs with one symbol between, standardised over all sequences."""
    near, far = (torch.randn(language.vocabulary, language.vocabulary, generator=generator) for _ in range(2))
    ids = language.sequences
    raw = near[ids[:, :-1], ids[:, 1:]].sum(1) + far[ids[:, :-2], ids[:, 2:]].sum(1)
    return (raw - raw.mean()) / raw.std(correction=0)
