"""Watching preference training: displacement and over-optimisation indicators at every evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.trunk import evaluating
from loglik.signals.over_optimisation import Indicators, LikelihoodMonitor, indicators, plot_monitor
from loglik.training.data import Row

__all__ = ["PreferenceMonitor", "pair_batches"]


class PreferenceMonitor:
    """A callback of `fit`: reads validation pairs with the policy and logs what it finds.

    Adds to the record ``monitor_chosen`` and ``monitor_rejected`` (mean token log-likelihoods, nats),
    ``monitor_entropy`` (top-k, bits), ``monitor_mass`` (top-k), and ``monitor_events``, one sentence each.

    Args:
        rows: validation pairs.
        batch_size: pairs per forward pass.
        k: of the two indicators.
        monitor: the reading rule; `LikelihoodMonitor` with its defaults if None.
        plot: file that the course is drawn to at every evaluation.

    Raises:
        InputError: for rows that are not pairs.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int = 8,
        k: int = 10,
        monitor: LikelihoodMonitor | None = None,
        plot: str | Path | None = None,
    ) -> None:
        wrong = [row.name or f"row {i}" for i, row in enumerate(rows) if len(row.completions) != 2]
        if wrong or not rows:
            raise InputError(
                f"the monitor reads chosen and rejected completions; {(wrong or ['the data'])[0]} has none"
            )
        self.rows, self.batch_size, self.k, self.plot = rows, batch_size, k, plot
        self.monitor = monitor or LikelihoodMonitor()

    def __call__(self, step: int, model: Any, record: dict[str, Any]) -> None:
        """Take in one evaluation."""
        with evaluating(model.model):
            found = self.measure(model)
        events = self.monitor.update(step, found)
        record |= {f"monitor_{field.name}": getattr(found, field.name) for field in fields(Indicators)}
        record["monitor_events"] = [f"{event.kind}: {event.message}" for event in events]
        if self.plot is not None:
            plot_monitor(self.monitor.history, self.plot, events=self.monitor.events)

    def measure(self, model: Any) -> Indicators:
        """Means over all pairs."""
        sums = [0.0] * len(fields(Indicators))
        for chosen, rejected in pair_batches(self.rows, self.batch_size):
            part = indicators(model, chosen, rejected, min(self.k, model.model.config.get_text_config().vocab_size))
            sums = [s + len(chosen) * getattr(part, f.name) for s, f in zip(sums, fields(Indicators), strict=True)]
        return Indicators(*(total / len(self.rows) for total in sums))


def pair_batches(rows: Sequence[Row], batch_size: int) -> Iterator[tuple[TokenBatch, TokenBatch]]:
    """Chosen and rejected completions of pairs, `batch_size` at a time."""
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        yield _side(part, 0), _side(part, 1)


def _side(rows: Sequence[Row], which: int) -> TokenBatch:
    skips = [row.unscored[which] if row.unscored else 0 for row in rows]
    return TokenBatch.from_lists(
        [[*row.prompt, *row.completions[which]] for row in rows],
        starts=[len(row.prompt) for row in rows],
        scored_from=[len(row.prompt) + skip for row, skip in zip(rows, skips, strict=True)],
    )
