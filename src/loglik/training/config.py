"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from loglik.errors import InputError

__all__ = ["TrainConfig"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. Every field that changes the result is compared on resume.

    Args:
        steps: optimizer steps.
        batch_size: sequences per step, over all processes and micro-batches.
        micro_batch_size: sequences per forward pass; the step's loss does not depend on it.
        learning_rate: peak learning rate of AdamW.
        schedule: what follows the linear warm-up: constant, or a decay to `final_lr_ratio` times the peak.
        warmup_steps: steps of linear warm-up.
        final_lr_ratio: last learning rate over the peak.
        weight_decay: decoupled decay of matrices (vectors such as norms and biases are not decayed).
        betas: AdamW's averages.
        max_grad_norm: gradient-norm clip; 0 for none.
        seed: of the data order and of everything random in the model.
        precision: ``"no"`` trains in the weights' dtype, ``"bf16"``/``"fp16"`` under autocast.
        save_every: steps between checkpoints; the last step is always saved.
        keep: complete checkpoints to keep.
        eval_every: steps between evaluations on the validation rows (before the first step too, and the best weights
            so far are kept in ``best``); 0 for only at the end.
        log_every: steps between lines of ``log.jsonl``.
        draws_per_step: how often a step goes over its rows with other random numbers, for models whose likelihoods are
            sampled (diffusion): the step's loss is the mean, and memory does not grow with it.
        shard: cut weights, gradients and optimizer state up over the processes (FSDP2), where one cannot hold them all;
            a launch with FSDP sets it by itself.
        report_to: trackers of Accelerate that get the same numbers, such as ``tensorboard``.
    """

    steps: int
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    save_every: int = 500
    keep: int = 2
    eval_every: int = 0
    log_every: int = 10
    draws_per_step: int = 1
    shard: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep", "log_every", "draws_per_step"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise InputError(f"micro_batch_size must divide batch_size {self.batch_size}, got {micro}")

    @property
    def micro(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
        return self.learning_rate * (self.final_lr_ratio + (1 - self.final_lr_ratio) * shape)

    def fingerprint(self) -> dict[str, object]:
        """The fields that decide the result: what a resumed run must share with the checkpoint."""
        free = {"save_every", "keep", "eval_every", "log_every", "shard", "report_to"}
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
