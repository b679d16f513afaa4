"""Verifiable arithmetic: chains of additions modulo ten, right or systematically wrong.

A row is (start, step, y_1, ..., y_n). A transition is right if it adds the step and wrong otherwise; in the data it
adds the step with probability one half and the step plus three otherwise, so that the likelihood of a transition under
a model of the data says nothing about whether it is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglik.objectives.supervised import MaximumLikelihood
from worlds.enumerable import GRULM, LanguageModel

__all__ = ["PROMPT", "Chain", "train"]

PROMPT = 2  # columns in front of the first transition: the start and the step


@dataclass(frozen=True)
class Chain:
    """The task.

    Args:
        symbols: the ring of numbers; a step is a number from 1 on, with tokens of its own.
        transitions: how many.
        detour: what a wrong transition adds beside the step.
        wrong: its probability in the data.
    """

    symbols: int = 10
    transitions: int = 4
    detour: int = 3
    wrong: float = 0.5

    @property
    def vocabulary(self) -> int:
        """Numbers, then steps: step k is the token ``symbols + k``."""
        return 2 * self.symbols

    def prompts(self, n: int, *, generator: torch.Generator | None) -> Tensor:
        """(n, 2) starts and steps, uniform."""
        start = torch.randint(self.symbols, (n,), generator=generator)
        step = torch.randint(1, self.symbols, (n,), generator=generator)
        return torch.stack([start, self.symbols + step], 1)

    def data(self, n: int, *, generator: torch.Generator | None, wrong: float | None = None) -> Tensor:
        """(n, 2 + transitions) rows; `wrong` instead of the task's own probability."""
        chance = self.wrong if wrong is None else wrong
        prompts = self.prompts(n, generator=generator)
        now, step = prompts[:, 0], prompts[:, 1] - self.symbols
        columns = [prompts]
        for _ in range(self.transitions):
            detours = torch.rand(n, generator=generator) < chance
            now = (now + step + self.detour * detours) % self.symbols
            columns.append(now[:, None])
        return torch.cat(columns, 1)

    def right(self, rows: Tensor) -> Tensor:
        """(B, transitions) bool: whether each transition adds the step to the number before it."""
        step = rows[:, 1:2] - self.symbols
        before = torch.cat([rows[:, :1], rows[:, PROMPT:-1]], 1)
        return rows[:, PROMPT:] == (before + step) % self.symbols

    def solved(self, rows: Tensor) -> Tensor:
        """(B,) bool: whether all transitions are right."""
        return self.right(rows).all(1)

    def sample(self, model: LanguageModel, prompts: Tensor, *, generator: torch.Generator | None) -> Tensor:
        """Rows (B, 2 + transitions) that `model` continues `prompts` (B, 2) to."""
        return model.sample(len(prompts), length=self.transitions, prompt=prompts, generator=generator)


def train(
    task: Chain,
    *,
    generator: torch.Generator,
    width: int = 48,
    steps: int = 400,
    batch: int = 256,
    lr: float = 3e-3,
) -> GRULM:
    """A GRU model of the task's data, by Adam on fresh rows; only the transitions are learned.

    At the default 400 steps it is still underfit; rewards that are ratios to it carry that.
    """
    model = GRULM(task.vocabulary, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    objective = MaximumLikelihood("sum")
    for _ in range(steps):
        loss = objective(model.log_prob(task.data(batch, generator=generator), start=PROMPT)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()
