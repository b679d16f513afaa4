"""The loss and the metrics of an objective over a whole set of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loglik.models.protocol import is_sampled
from loglik.models.trunk import evaluating
from loglik.objectives.base import Objective
from loglik.training.data import Numbered, Rows
from loglik.training.inputs import needs_of
from loglik.training.reference import ModelReference, Reference
from loglik.training.step import Loss, add_metrics, mismatched_sums

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean `loss` over all rows (the sum of all terms over the sum of all weights) and means of the `metrics`."""

    loss: float
    metrics: dict[str, float]


@torch.no_grad()
def evaluate(
    model: Any,
    objective: Objective,
    rows: Rows,
    *,
    batch_size: int,
    reference: Reference | Any | None = None,
    mismatched_reference: Reference | None = None,
) -> Evaluation:
    """Loss and metrics over `rows` in evaluation mode; neither depends on the batch size.

    Args:
        model: the policy.
        objective: as for `fit`.
        rows: to evaluate on.
        batch_size: rows per forward pass.
        reference: a model, or what gives the reference's log-likelihoods; needed if the objective does.
        mismatched_reference: the same for prompts with the completions of the row after them; `reference` by default.
    """
    needs, data = needs_of(objective), Numbered(rows)
    against = ModelReference(reference) if hasattr(reference, "log_prob") else reference
    loss = Loss(model, objective, needs)
    sums: list[list[float]] = []
    metrics: dict[str, tuple[float, int]] = {}
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    with evaluating(model.model):
        kl = _kl(model, Numbered(rows, rolled=True), batches, mismatched_reference or against) if needs.kl else None
        for indices in batches:
            batch = data.batch(indices).to(model.model.device)
            if is_sampled(model):  # the same random numbers at every evaluation
                batch = batch.with_draws("evaluation")
            terms = loss(batch, against(batch) if against is not None else None, kl)
            found = [[float(p.loss.double().sum()), float(p.weight.double().sum())] for p in terms.parts()]
            if sums:
                found = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, found, strict=True)]
            sums = found
            add_metrics(metrics, terms)
    return Evaluation(
        sum(total / weight for total, weight in sums),
        {name: total / count for name, (total, count) in metrics.items() if count},
    )


def _kl(model: Any, rolled: Numbered, batches: list[range], reference: Reference | None) -> torch.Tensor:
    """Mean log-ratio of completions of other prompts over all rows, at least 0."""
    total, count = (0.0, 0) if reference is None else mismatched_sums(model, rolled, batches, reference)
    return torch.tensor(max(total / max(count, 1), 0.0), device=model.model.device)
