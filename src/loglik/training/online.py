"""Rows that are drawn while training: completions of the policy as it is, judged and paired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from loglik.training.data import Row

__all__ = ["Collect", "Online", "rows_from_json", "rows_to_json"]


class Collect(Protocol):
    """Draws rows from the policy."""

    def __call__(self, model: Any, reference: Any, generator: torch.Generator) -> Iterable[Row]:
        """Rows to train on until the next collection.

        Args:
            model: the policy as it is now, in evaluation mode.
            reference: what gives the reference's log-likelihoods, or None if the objective needs none.
            generator: of all random numbers, seeded by the run's seed and the number of the collection.
        """


@dataclass(frozen=True, slots=True)
class Online:
    """Data that is collected anew every `every` steps.

    A collection is kept in the checkpoint, so that a run resumed between two collections goes on with the same rows.

    Args:
        collect: draws the rows.
        every: steps between collections; 1 is fully on-policy.
    """

    collect: Collect
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


def rows_to_json(rows: Any) -> list[dict[str, Any]]:
    """Rows as plain values."""
    found = []
    for i in range(len(rows)):
        row = asdict(rows[i][1])
        row["prompt"] = [int(token) for token in row["prompt"]]
        row["completions"] = [[int(token) for token in completion] for completion in row["completions"]]
        row["values"] = {name: [float(v) for v in values] for name, values in row["values"].items()}
        if row["weights"] is not None:
            row["weights"] = [[float(w) for w in weights] for weights in row["weights"]]
        found.append(row)
    return found


def rows_from_json(values: Sequence[dict[str, Any]]) -> list[Row]:
    """What `rows_to_json` wrote."""
    return [
        Row(
            v["prompt"],
            tuple(v["completions"]),
            tuple(v["unscored"]),
            v["values"],
            None if v["weights"] is None else tuple(v["weights"]),
            v["name"],
        )
        for v in values
    ]
