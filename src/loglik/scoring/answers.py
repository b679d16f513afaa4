"""Answers of the engine: a place for every number that is asked for, each filled exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import RowError
from loglik.scoring.batches import BatchPlan
from loglik.scoring.plan import Plan
from loglik.scoring.windows import Window

__all__ = ["Answers", "Demand", "WindowScores", "check_log_probs", "joined"]


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Numbers of one window.

    Args:
        terms: nats of tokens `scored_from` to `scored_to`.
        greedy: whether each of them is the model's first choice.
        masses: log-mass of the subset after each of the window's probes.
        branches: nats of each of the window's branches.
        total: nats of all scored tokens together, where the model gives no terms: then `terms` and `greedy` are empty.
        stderr: Monte-Carlo standard error of `total`, where it is sampled.
    """

    terms: list[float]
    greedy: list[bool]
    masses: list[float]
    branches: list[float]
    total: float | None = None
    stderr: float | None = None


def check_log_probs(values: Sequence[float]) -> None:
    """Refuse what is no log-probability: NaN and +inf; -inf is a legal log 0.

    Raises:
        RowError: for the row that the values belong to.
    """
    if any(math.isnan(value) or value == math.inf for value in values):
        raise RowError("the model returned logits that are not finite (NaN): check its weights and dtype")


class Demand(NamedTuple):
    """Columns of a pass that are read: `flat` are the answers' places, `target` -1 asks for a mass."""

    column: NDArray[np.int64]
    flat: NDArray[np.int64]
    target: NDArray[np.int64]


class Answers:
    """A place for every number that is asked for, each filled exactly once."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        counts = np.array([w.scored_to - w.scored_from for w in windows], dtype=np.int64)
        probes = np.array([len(w.probes) for w in windows], dtype=np.int64)
        self.terms_at = np.concatenate([[0], np.cumsum(counts)])
        branches = np.array([len(w.branches) for w in windows], dtype=np.int64)
        # Masses stand behind all terms, branches behind all masses.
        self.masses_at = self.terms_at[-1] + np.concatenate([[0], np.cumsum(probes)])
        self.branches_at = self.masses_at[-1] + np.concatenate([[0], np.cumsum(branches)])
        self.values = np.full(self.branches_at[-1], np.nan)
        self.greedy = np.zeros(self.branches_at[-1], dtype=bool)
        self.filled = np.zeros(self.branches_at[-1], dtype=np.int64)

    def demands(self, plan: Plan | BatchPlan) -> dict[int, Demand]:
        """What is read from each pass."""
        parts: dict[int, list[Demand]] = {}
        for i, window in enumerate(self.windows):
            if window.scored_from < 1 and (window.scored_to > window.scored_from or not window.ids):
                raise ValueError(f"row {i}: the first token cannot be scored, nothing stands before it; prepend BOS")
            scored = (window.scored_from - 1, window.scored_to - 1) if window.scored_to > window.scored_from else (0, 0)
            for number, column, first, count in plan.columns(i, *scored):
                flat = self.terms_at[i] + first + 1 - window.scored_from
                target = np.asarray(window.ids[first + 1 : first + 1 + count], dtype=np.int64)
                steps = np.arange(count)
                parts.setdefault(number, []).append(Demand(column + steps, flat + steps, target))
            for j, probe in enumerate(window.probes):
                for number, column, _, _ in plan.columns(i, probe, probe + 1):
                    flat = self.masses_at[i] + j
                    parts.setdefault(number, []).append(Demand(*(np.array([v]) for v in (column, flat, -1))))
            if window.branches:
                count = len(window.branches)
                for number, column, _, _ in plan.columns(i, len(window.ids) - 1, len(window.ids)):
                    flat = self.branches_at[i] + np.arange(count)
                    target = np.asarray(window.branches, dtype=np.int64)
                    parts.setdefault(number, []).append(Demand(np.full(count, column), flat, target))
        return {number: joined(found) for number, found in parts.items()}

    def fill(self, flat: NDArray[np.int64], values: Tensor, greedy: Tensor | None) -> None:
        """Put numbers where they belong."""
        self.values[flat] = values.double().cpu().numpy()
        if greedy is not None:
            self.greedy[flat] = greedy.cpu().numpy()
        np.add.at(self.filled, flat, 1)

    def collect(self) -> list[WindowScores]:
        """Numbers by window."""
        if not bool((self.filled == 1).all()):
            wrong = int((self.filled != 1).sum())
            raise AssertionError(f"{wrong} of {len(self.filled)} answers were not computed exactly once")
        out = []
        for i in range(len(self.windows)):
            terms, masses, branches = (
                slice(int(at[i]), int(at[i + 1])) for at in (self.terms_at, self.masses_at, self.branches_at)
            )
            values = (self.values[part].tolist() for part in (masses, branches))
            out.append(WindowScores(self.values[terms].tolist(), self.greedy[terms].tolist(), *values))
        return out


def joined(parts: Sequence[Demand]) -> Demand:
    """The same as one, part after part."""
    return Demand(*(np.concatenate(column) for column in zip(*parts, strict=True)))
