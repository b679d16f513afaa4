"""``loglik train``: any objective on any model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from loglik.errors import InputError
from loglik.progress import stderr_console

if TYPE_CHECKING:
    from loglik.training import FitResult
    from loglik.training.read import TrainingData

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train a model on texts, completions or preferences; the output loads with from_pretrained."""

    objective: str
    """mle, dpo, ipo, simpo, kto, ...; an unknown name lists them all."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """tiny, a directory written by save_pretrained, or a name on the model hub."""
    data: str
    """A .jsonl(.gz) or .parquet file, or a directory of datasets.save_to_disk: text, messages, prompt with completion
    (and label), chosen and rejected, or completions with rewards."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Directory of the log, the checkpoints and the final model."""
    validation: str | None = None
    """Rows whose loss and metrics are logged; the best weights so far are kept in OUTPUT/best."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Settings of the objective, such as beta=0.05."""
    reference: str = "auto"
    """The frozen reference of preference objectives: another model, or auto (the policy before training; with --lora
    the base model)."""
    reference_cache: str | None = None
    """Directory of reference log-probabilities, reused for the same weights and rows; OUTPUT/reference by default."""
    steps: int | None = None
    """Optimizer steps; by default as many as --epochs take."""
    epochs: float = 1.0
    """Passes over the data, where --steps is not given."""
    batch_size: int = 8
    """Rows per step, over all processes."""
    micro_batch_size: int | None = None
    """Rows per forward pass; the loss does not depend on it."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What follows the linear warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradient-norm clip; 0 for none."""
    seed: int = 0
    """Of the data order and of everything random in the model."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of forward and backward."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the weights."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    family: Literal["causal", "seq2seq", "diffusion"] | None = None
    """Kind of model; read from its configuration by default. A masked language model can be read as diffusion."""
    num_samples: int = 1
    """Draws of a diffusion model's bound inside the objective."""
    draws_per_step: int = 1
    """How often a step goes over its rows with other masks (diffusion models); memory does not grow with it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    max_length: int | None = None
    """Tokens per sequence; the model's context by default."""
    overflow: Literal["error", "truncate"] = "error"
    """Refuse a longer row, or cut its prompt on the left and say so."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a row that cannot be used, or leave it out and say so."""
    lora: bool = False
    """Train a low-rank adapter instead of the weights."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The adapter's update is scaled by alpha over rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter; all linear ones but the head by default."""
    monitor: bool = False
    """With --validation pairs: log displacement and over-optimisation indicators at every evaluation."""
    eval_every: int = 0
    """Steps between evaluations; 0 for only at the end."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Complete checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of OUTPUT/log.jsonl."""
    shard: bool = False
    """Cut weights, gradients and optimizer state up over the processes (FSDP2)."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate, such as tensorboard."""
    resume: bool = False
    """Continue from the newest complete checkpoint."""

    def run(self) -> None:
        """Train, and print where the result lies and what it measured."""
        from loglik.objectives.registry import objective
        from loglik.training import TrainConfig, fit
        from loglik.training.inputs import needs_of

        chosen = objective(self.objective, **dict(map(_setting, self.set)))
        model = self._model(rewards=needs_of(chosen).reward_model)
        data = self._read(self.data, model)
        validation = self._read(self.validation, model).rows if self.validation is not None else None
        steps = self.steps or self._steps(len(data.rows))
        config = TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            precision=self.precision,
            save_every=self.save_every,
            keep=self.keep,
            eval_every=self.eval_every,
            log_every=self.log_every,
            draws_per_step=self.draws_per_step,
            shard=self.shard,
            report_to=self.report_to,
        )
        result = fit(
            model,
            chosen,
            data.rows,
            config,
            output=self.output,
            reference=self._reference(),
            reference_cache=self.reference_cache,
            validation=validation,
            callbacks=self._callbacks(validation),
            resume=self.resume,
        )
        _summarise(result, data)

    def _model(self, *, rewards: bool) -> Any:
        model: Any = (
            _reward_model(self.model, self.dtype, self.device, self.seed) if rewards else self._load(self.model)
        )
        if not hasattr(getattr(model, "model", None), "parameters"):
            raise InputError(f"{self.model} has no weights that a gradient could change: give a neural model")
        if self.gradient_checkpointing:
            model.model.gradient_checkpointing_enable()
        if self.lora:
            from loglik.training.lora import LoraSettings, with_lora

            settings = LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)
            model = with_lora(model, settings, base=self.model)
        return model

    def _steps(self, rows: int) -> int:
        if not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs must be positive, got {self.epochs}")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        return max(1, math.ceil(self.epochs * rows / self.batch_size))

    def _read(self, source: str, model: Any) -> TrainingData:
        from loglik.training.read import read_training_data

        return read_training_data(
            source, model, max_length=self.max_length, overflow=self.overflow, on_error=self.on_error
        )

    def _reference(self) -> Any:
        if self.reference == "auto":
            return "auto"
        return self._load(self.reference)

    def _load(self, name: str) -> Any:
        from loglik.models.load import load
        from loglik.models.protocol import is_sampled

        model: Any = load(name, dtype=self.dtype, device=self.device, family=self.family)
        if is_sampled(model):
            model = model.with_samples(self.num_samples)
        elif self.num_samples != 1:
            raise InputError(
                f"--num-samples is for models whose likelihood is sampled, and {name} is none: leave it out"
            )
        return model

    def _callbacks(self, validation: Sequence[Any] | None) -> list[Any]:
        if not self.monitor:
            return []
        from loglik.training.monitor import PreferenceMonitor

        if validation is None:
            raise InputError("--monitor watches validation pairs: give --validation")
        return [PreferenceMonitor(validation, batch_size=self.micro_batch_size or self.batch_size)]


def _reward_model(name: str, dtype: str, device: str | None, seed: int) -> Any:
    """A reward model that was saved, or a new one on the weights of a language model."""
    from loglik.models.causal import CausalLM
    from loglik.models.load import DTYPES, load
    from loglik.models.reward import RewardModel

    saved = Path(name) / "config.json"
    if saved.is_file() and "ForSequenceClassification" in saved.read_text(encoding="utf-8"):
        return RewardModel.from_pretrained(name, dtype=DTYPES[dtype], device=device)
    base = load(name, dtype=dtype, device=device)
    if not isinstance(base, CausalLM):
        raise InputError(f"a reward model is made of a causal language model, and {name} is another kind")
    return RewardModel.from_causal(base, seed=seed)


def _setting(text: str) -> tuple[str, Any]:
    """``beta=0.05`` as a name and a value."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise InputError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _summarise(result: FitResult, data: TrainingData) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    errors = stderr_console()
    for sentence in data.skipped[:20]:
        errors.print(f"left out: {sentence}", soft_wrap=True, markup=False)
    if len(data.skipped) > 20:
        errors.print(f"left out: {len(data.skipped) - 20} rows more")
    if data.truncated:
        errors.print(f"{len(data.truncated)} prompts were cut on the left (first: {data.truncated[0]})")
    where = Path(result.output)
    console = Console(markup=False, highlight=False)
    if result.interrupted:
        console.print(f"stopped after step {result.step} as asked; --resume continues from {where}", soft_wrap=True)
        return
    parts = [f"step {result.step}", f"loss {result.loss:.4f}"]
    if result.validation is not None:
        parts.append(f"validation {result.validation:.4f}")
    if result.best_step is not None:
        parts.append(f"best at step {result.best_step} ({where / 'best'})")
    console.print(f"{', '.join(parts)}; {result.seconds:.0f} s; model in {where}", soft_wrap=True)
