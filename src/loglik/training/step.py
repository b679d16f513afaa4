"""One optimizer step: forward, exact weights over micro-batches and processes, backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loglik.errors import InputError, LoglikError
from loglik.likelihood import LogLikelihood
from loglik.models.reward import RewardModel
from loglik.objectives.base import Objective, Terms
from loglik.training.config import TrainConfig
from loglik.training.data import Numbered, RowBatch
from loglik.training.inputs import Needs, objective_name, terms_of
from loglik.training.reference import Reference
from loglik.training.sharding import full, is_sharded

__all__ = ["Loss", "Source", "StepResult", "add_metrics", "mismatched_sums", "take_step"]


class Loss(nn.Module):
    """The objective as a function of a batch: what a wrapper for several processes sees as the network.

    Args:
        model: the policy.
        objective: to train on.
        needs: what it asks for.
    """

    def __init__(self, model: Any, objective: Objective, needs: Needs) -> None:
        super().__init__()
        self.module = model.model
        self.objective = objective if isinstance(objective, nn.Module) else None  # it has weights of its own
        self._rest = (model, objective, needs)

    def forward(self, batch: RowBatch, reference: LogLikelihood | None, kl: Tensor | None) -> Terms:
        """Terms of a batch."""
        model, objective, needs = self._rest
        extra: dict[str, Any] = {"kl": kl, "model": model}
        if isinstance(model, RewardModel):
            extra["rewards"] = model.rewards(batch.tokens)
        # An objective on the model itself makes its own forward pass, unless it asks for likelihoods too.
        policy = batch.likelihood(model) if needs.likelihoods else None
        return terms_of(objective, needs, batch, policy, reference, extra)

    def standing_in(self, batch: RowBatch) -> Terms:
        """Terms of a batch in which every log-probability is 0: their weights are those of the batch."""
        model, objective, needs = self._rest
        scored = (batch.tokens.scored_mask & batch.tokens.attention_mask).cpu()
        extra: dict[str, Any] = {"kl": torch.zeros(()), "model": model}
        flat = None
        if isinstance(model, RewardModel):
            extra["rewards"] = torch.zeros(len(scored))
        else:
            flat = LogLikelihood.from_per_unit(torch.zeros(scored.shape), scored, kind=model.kind, unit=model.unit)
        with torch.no_grad():
            return terms_of(objective, needs, batch.to("cpu"), flat, flat, extra)


class Source(Protocol):
    """Where a step's rows come from: their reference, and rows with other prompts' completions."""

    reference: Reference | None
    mismatched: Numbered | None
    mismatched_reference: Reference | None


@dataclass(slots=True)
class StepResult:
    """What a step measured: its `loss`, `grad_norm`, means of the metrics, and whether a process was asked to stop."""

    loss: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: bool = False


def take_step(
    loss: Loss,
    wrapped: nn.Module,
    micro: Sequence[RowBatch],
    segment: Source,
    optimizer: Any,
    accelerator: Accelerator,
    config: TrainConfig,
    step: int,
    *,
    stop: bool,
) -> StepResult:
    """Backward over all micro-batches, then one optimizer step.

    Raises:
        LoglikError: if the loss or the gradient is not finite, naming the rows.
    """
    _, objective, needs = loss._rest
    reference = segment.reference
    references = [reference(batch) if reference is not None else None for batch in micro]
    kl = _step_kl(loss, micro, segment, accelerator) if needs.kl else None
    totals, correction = _total_weights(loss, micro, accelerator)
    value = 0.0
    sums: dict[str, tuple[float, int]] = {}
    weight = 0.0
    bad: list[str] = []
    sharded = is_sharded(loss.module)
    for i, (batch, against) in enumerate(zip(micro, references, strict=True)):
        last = i + 1 == len(micro)
        # Sharded gradients are summed in their shards: nothing larger waits for the last micro-batch.
        with nullcontext() if last or sharded else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                terms: Terms = wrapped(batch, against, kl)
            parts = list(terms.parts())
            # One micro-batch in one process needs no second look at the weights: they are all here.
            scales = totals or [float(part.weight.sum()) for part in parts]
            if len(scales) != len(parts):
                raise InputError(
                    f"{objective_name(objective)} adds several means, each over its own weights, and works on the "
                    "model itself: train it in one process with micro_batch_size equal to batch_size"
                )
            whole = sum((p.loss.sum() / s for p, s in zip(parts, scales, strict=True)), terms.loss.new_zeros(()))
            bad += _not_finite(terms, batch)
            value += float(whole.detach().double())
            weight += float(terms.weight.sum())
            # DDP averages gradients over processes; the loss is a sum over them.
            accelerator.backward(whole * accelerator.num_processes)
        add_metrics(sums, terms)
    summary = [value, weight, float(len(bad)), float(stop), *chain.from_iterable(sums.values())]
    reduced = _all_sum(summary, accelerator)
    if correction is not None:
        factor = correction / reduced[1]
        reduced[0] *= factor
        for parameter in loss.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
    result = StepResult(reduced[0], 0.0, _means(list(sums), reduced[4:]), reduced[3] > 0)
    if reduced[2] > 0 or not math.isfinite(result.loss):
        rows = f" ({_listed(bad)})" if bad else ""
        raise LoglikError(
            f"the loss of step {step + 1} is {result.loss}{rows}; the last checkpoint is kept: lower learning_rate, or "
            "look at these rows"
        )
    limit = config.max_grad_norm or math.inf
    if sharded:
        result.grad_norm = float(full(nn.utils.clip_grad_norm_(loss.parameters(), limit)))
    else:
        result.grad_norm = float(accelerator.clip_grad_norm_(loss.parameters(), limit) or 0.0)
    if not math.isfinite(result.grad_norm) and config.precision != "fp16":  # a scaler tries larger steps on purpose
        names = [name for batch in micro for name in batch.names]
        raise LoglikError(
            f"the gradient of step {step + 1} is {result.grad_norm} ({_listed(names)}); the last checkpoint is kept: "
            "lower learning_rate, or look at these rows"
        )
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad()
    return result


def _total_weights(
    loss: Loss, micro: Sequence[RowBatch], accelerator: Accelerator
) -> tuple[list[float] | None, float | None]:
    """Sums of the step's weights over micro-batches and processes, one per mean; None where one pass has them all.

    Weights are functions of what is scored and not of the parameters, so they come from a stand-in likelihood. An
    objective on the model itself has none: its gradient is divided by the number of scored tokens first, and the
    returned correction mends it when the weights are known.
    """
    _, objective, needs = loss._rest
    if len(micro) == 1 and accelerator.num_processes == 1:
        return None, None
    if needs.model:
        tokens = sum(int((batch.tokens.scored_mask & batch.tokens.attention_mask).sum()) for batch in micro)
        total = _all_sum([float(tokens)], accelerator)[0]
        return [total], total
    sums: list[float] = []
    for batch in micro:
        weights = [float(part.weight.sum()) for part in loss.standing_in(batch).parts()]
        sums = [a + b for a, b in zip(sums, weights, strict=True)] if sums else weights
    totals = _all_sum(sums, accelerator)
    if min(totals) <= 0:
        raise InputError(f"{objective_name(objective)} gives this step no weight: its rows have nothing to train on")
    return totals, None


def _step_kl(
    loss: Loss,
    micro: Sequence[RowBatch],
    segment: Source,
    accelerator: Accelerator,
) -> Tensor:
    """Mean log-ratio of completions of other prompts over the whole step, at least 0; no gradient."""
    model, mismatched, reference = loss._rest[0], segment.mismatched, segment.mismatched_reference
    assert mismatched is not None
    assert reference is not None
    with accelerator.autocast():
        sums = mismatched_sums(model, mismatched, (batch.index.tolist() for batch in micro), reference)
    total, count = _all_sum(sums, accelerator)
    return torch.tensor(max(total / count, 0.0), device=accelerator.device)


@torch.no_grad()
def mismatched_sums(
    model: Any, rolled: Numbered, batches: Iterable[Sequence[int]], reference: Reference
) -> tuple[float, int]:
    """Sum and number of the log-ratios of completions of other prompts; no gradient."""
    total, count = 0.0, 0
    for indices in batches:
        other = rolled.batch(indices).to(model.model.device)
        ratio = other.likelihood(model).value - reference(other).value
        total, count = total + float(ratio.double().sum()), count + len(ratio)
    return total, count


def add_metrics(sums: dict[str, tuple[float, int]], terms: Terms) -> None:
    """Add the metrics of a batch to sums and counts by name."""
    for name, values in terms.metrics.items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + float(values.double().sum()), count + values.numel())


def _all_sum(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Numbers summed over processes."""
    if accelerator.num_processes == 1:
        return list(values)
    # Accelerators without float64 exist; float32 is enough for sums that are logged and for weights below 2^24.
    wide = torch.float64 if accelerator.device.type in ("cpu", "cuda") else torch.float32
    reduced = accelerator.reduce(torch.tensor(list(values), dtype=wide, device=accelerator.device), reduction="sum")
    found: list[float] = reduced.tolist()
    return found


def _means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Metrics from their sums and counts, which stand in turn."""
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {name: total / count if count else math.nan for name, total, count in pairs}


def _not_finite(terms: Terms, batch: RowBatch) -> list[str]:
    """Rows whose loss is not finite; all, where the loss is not one per row or completion."""
    wrong = (~torch.isfinite(terms.loss)).nonzero().flatten().tolist()
    if not wrong:
        return []
    if len(terms.loss) == len(batch):
        return [batch.names[i] for i in wrong]
    if len(terms.loss) == len(batch.tokens):
        owners = torch.repeat_interleave(batch.counts.cpu()).tolist()
        return sorted({batch.names[owners[i]] for i in wrong})
    return list(batch.names)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
