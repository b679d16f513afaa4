"""One training loop on Accelerate: any objective, any model with a differentiable `log_prob`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from loglik.errors import InputError, LoglikError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.base import Objective, Terms
from loglik.progress import bar, quiet_transformers
from loglik.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from loglik.training.config import TrainConfig
from loglik.training.data import Example, StepSampler, collate, seed_step

__all__ = ["FitResult", "Trainable", "fit"]


class Trainable(Protocol):
    """A model whose `log_prob` is differentiable in the parameters of `model`."""

    model: Any
    tokenizer: Any

    def log_prob(self, x: TokenBatch) -> LogLikelihood:
        """Labelled log-likelihoods of a batch."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run ended with: `step`, the training `loss` of the last step, `validation` loss, `seconds` of this run."""

    step: int
    loss: float
    validation: float | None
    seconds: float
    output: Path


def fit(
    model: Trainable,
    objective: Objective,
    data: Dataset[Example],
    config: TrainConfig,
    *,
    output: str | Path,
    validation: Dataset[Example] | None = None,
    resume: bool = False,
) -> FitResult:
    r"""Train `model` in place and save it, its log and its checkpoints under `output`.

    The loss of a step is :math:`\sum_b \ell_b / \sum_b w_b` over *all* its micro-batches and processes, so that it does
    not depend on how the step is cut up. Batches, learning rate and random numbers are functions of (seed, step): a
    resumed run repeats the uninterrupted one, bit for bit on a CPU.

    Args:
        model: a loglik model around a torch module in `model.model`.
        objective: maps labelled log-likelihoods to `Terms`.
        data: map-style rows.
        config: settings.
        output: directory of ``log.jsonl``, ``checkpoint-*`` and, at the end, the model for `from_pretrained`.
        validation: rows whose mean loss is logged.
        resume: continue from the newest complete checkpoint in `output`; start anew where there is none.

    Raises:
        InputError: if `output` holds another run and `resume` is not set, or its settings differ.
        LoglikError: if the loss becomes NaN or infinite; the last good checkpoint stays.
    """
    out = Path(output)
    accelerator = Accelerator(
        mixed_precision=config.precision, dataloader_config=DataLoaderConfiguration(dispatch_batches=False)
    )
    per_step, uneven = divmod(config.batch_size // config.micro, accelerator.num_processes)
    if uneven or per_step < 1:
        raise InputError(f"{accelerator.num_processes} processes cannot share batch {config.batch_size} evenly")
    module: Any = model.model
    optimizer = _optimizer(module, config)
    start, loss, log = _prepare(out, config, module, optimizer, resume=resume)
    sampler = StepSampler(
        len(data),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        micro_batch_size=config.micro,
        first=start,
        last=config.steps,
        seed=config.seed,
    )
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    model.model = wrapped
    begun, batches = time.monotonic(), iter(loader)
    measured: float | None = None
    module.train()
    try:
        with bar("training", total=config.steps - start, unit="steps") as advance:
            for step in range(start, config.steps):
                micro = [next(batches) for _ in range(per_step)]
                # After loading: opening the loader draws random numbers, and only a run's first step does that.
                seed_step(config.seed, step, accelerator.process_index)
                loss, norm, metrics = _step(model, objective, micro, optimizer, accelerator, config, step)
                advance(1, f"loss {loss:.4f}")
                last = step + 1 == config.steps
                record: dict[str, Any] = {"step": step + 1, "loss": loss, "grad_norm": norm, **metrics}
                record |= {"learning_rate": config.learning_rate_at(step), "seconds": time.monotonic() - begun}
                due = validation is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0))
                if due and validation is not None:
                    record["validation"] = measured = evaluate(model, objective, validation, batch_size=config.micro)
                if accelerator.is_main_process and (due or last or (step + 1) % config.log_every == 0):
                    with log.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps(record) + "\n")
                if accelerator.is_main_process and (last or (step + 1) % config.save_every == 0):
                    state = {"step": step + 1, "loss": loss, "config": config.fingerprint()}
                    raw = getattr(optimizer, "optimizer", optimizer)
                    save_checkpoint(out, module=module, optimizer=raw, state=state, keep=config.keep)
    finally:
        model.model = module
        module.eval()
    if validation is not None and measured is None:  # nothing was left to train; else the last step has measured
        measured = evaluate(model, objective, validation, batch_size=config.micro)
    if accelerator.is_main_process:
        with quiet_transformers():
            module.save_pretrained(out)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(out)
    return FitResult(config.steps, loss, measured, time.monotonic() - begun, out)


@torch.no_grad()
def evaluate(model: Trainable, objective: Objective, rows: Dataset[Example], *, batch_size: int) -> float:
    """Mean loss over `rows` in evaluation mode: the sum of all terms over the sum of all weights."""
    was_training = model.model.training
    model.model.eval()
    loss = weight = 0.0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
        terms = objective(model.log_prob(batch))
        loss += float(terms.loss.double().sum())
        weight += float(terms.weight.double().sum())
    model.model.train(was_training)
    return loss / weight


def _step(
    model: Trainable,
    objective: Objective,
    micro: Sequence[TokenBatch],
    optimizer: Any,
    accelerator: Accelerator,
    config: TrainConfig,
    step: int,
) -> tuple[float, float, dict[str, float]]:
    """One optimizer step; returns its loss, gradient norm and mean metrics."""
    total_weight = _total_weight(model, objective, micro, accelerator)
    loss = torch.zeros((), dtype=torch.float64)
    sums: dict[str, float] = {}
    rows = sum(len(batch) for batch in micro)
    for i, batch in enumerate(micro):
        last = i + 1 == len(micro)
        with nullcontext() if last else accelerator.no_sync(model.model):
            with accelerator.autocast():
                terms = objective(model.log_prob(batch))
            # One micro-batch in one process needs no second look at the weights: they are all here.
            scale = total_weight if total_weight is not None else float(terms.weight.sum())
            part = terms.loss.sum() / scale
            loss += part.detach().double().cpu()
            # DDP averages gradients over processes; the loss is a sum over them.
            accelerator.backward(part * accelerator.num_processes)
        for name, values in terms.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    value = float(accelerator.reduce(loss.to(accelerator.device).float(), reduction="sum"))
    if not math.isfinite(value):
        raise LoglikError(f"the loss of step {step + 1} is {value}; the last checkpoint is kept: lower learning_rate")
    limit = config.max_grad_norm or math.inf
    norm = float(accelerator.clip_grad_norm_(model.model.parameters(), limit) or 0.0)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad()
    return value, norm, {name: total / rows for name, total in sums.items()}


def _total_weight(
    model: Trainable, objective: Objective, micro: Sequence[TokenBatch], accelerator: Accelerator
) -> float | None:
    """Sum of the step's weights over micro-batches and processes; None where one forward pass has them all.

    Weights are functions of what is scored and not of the parameters, so they come from a stand-in likelihood.
    """
    if len(micro) == 1 and accelerator.num_processes == 1:
        return None
    weight = sum(float(_weights(model, objective, batch).sum()) for batch in micro)
    return float(accelerator.reduce(torch.tensor(weight, device=accelerator.device), reduction="sum"))


def _weights(model: Trainable, objective: Objective, batch: TokenBatch) -> Tensor:
    scored = batch.scored_mask & batch.attention_mask
    like: Any = model
    flat = LogLikelihood.from_per_unit(torch.zeros(scored.shape), scored.cpu(), kind=like.kind, unit=like.unit)
    terms: Terms = objective(flat)
    return terms.weight


def _optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def _prepare(
    out: Path, config: TrainConfig, module: nn.Module, optimizer: torch.optim.Optimizer, *, resume: bool
) -> tuple[int, float, Path]:
    """Make `out`, restore its newest checkpoint if asked; returns the first step, the loss so far and the log file."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    checkpoint = latest_checkpoint(out)
    if checkpoint is None:
        log.unlink(missing_ok=True)
        return 0, math.nan, log
    if not resume:
        raise InputError(f"{out} holds a run already; pass resume=True to continue it or choose another output")
    state = load_checkpoint(checkpoint, module=module, optimizer=optimizer)
    if state["config"] != config.fingerprint():
        differ = [k for k, v in config.fingerprint().items() if state["config"].get(k) != v]
        raise InputError(f"{out} was trained with other settings ({', '.join(differ)}); use them or another output")
    # Lines after the checkpoint belong to steps that will be run again.
    kept = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return int(state["step"]), float(state["loss"]), log
