"""One training loop on Accelerate: any objective, any model with a differentiable `log_prob`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader

from loglik.errors import InputError
from loglik.models.protocol import is_sampled
from loglik.models.reward import RewardModel
from loglik.objectives.base import Objective
from loglik.objectives.registry import objective as named_objective
from loglik.progress import bar
from loglik.training.config import TrainConfig
from loglik.training.data import Numbered, RowBatch, Rows, StepSampler, collate, seed_step
from loglik.training.evaluate import Evaluation, evaluate
from loglik.training.files import RunFiles
from loglik.training.inputs import Needs, needs_of, objective_name
from loglik.training.interrupt import stop_on_sigterm
from loglik.training.online import Online, rows_from_json, rows_to_json
from loglik.training.reference import Reference, References
from loglik.training.sharding import is_sharded, shard, wants_sharding, whole
from loglik.training.step import Loss, take_step

__all__ = ["Callback", "FitResult", "Trainable", "fit", "make_optimizer"]


class Trainable(Protocol):
    """A model whose `log_prob` (or whose `rewards`) is differentiable in the parameters of `model`."""

    model: Any
    tokenizer: Any


# Called at every evaluation with the step, the model and the record that is about to be logged; may add to it.
Callback = Callable[[int, Any, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run ended with.

    Args:
        step: the last step that was taken.
        loss: of that step.
        validation: loss on the validation rows at the end, if there are any.
        seconds: of this run.
        output: where everything lies.
        interrupted: the run was asked to stop (SIGTERM) and saved a checkpoint to resume from.
        best_step: the evaluation with the lowest validation loss, whose weights are in ``best``.
    """

    step: int
    loss: float
    validation: float | None
    seconds: float
    output: Path
    interrupted: bool = False
    best_step: int | None = None


def fit(
    model: Trainable,
    objective: Objective | str,
    data: Rows | Online,
    config: TrainConfig,
    *,
    output: str | Path,
    reference: Any | Literal["auto", "initial"] = "auto",
    reference_cache: str | Path | None = None,
    validation: Rows | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> FitResult:
    r"""Train `model` in place and save it, its log and its checkpoints under `output`.

    The loss of a step is :math:`\sum_b \ell_b / \sum_b w_b` over *all* its micro-batches and processes, so that it does
    not depend on how the step is cut up. Batches, learning rate and random numbers are functions of (seed, step): a
    resumed run repeats the uninterrupted one, bit for bit on a CPU. SIGTERM ends the run after the current step with a
    checkpoint.

    Args:
        model: a loglik model around a torch module in `model.model`.
        objective: maps labelled log-likelihoods to `Terms`; a function whose argument names say what it needs, or its
            name in `loglik.objectives`. The weights of a torch module are trained, and kept in checkpoints, too.
        data: map-style rows, or `Online` for rows that are drawn from the policy as it changes.
        config: settings.
        output: directory of ``log.jsonl``, ``checkpoint-*`` and, at the end, the model for `from_pretrained`.
        reference: the frozen reference, where the objective needs one: a model, or anything callable that gives the
            log-likelihoods of a batch. ``auto``: numbers that the rows bring along, else the policy without its
            adapter, else the policy as it is now, whose log-likelihoods are computed once and kept on disk. Objectives
            that can do without get one only if it is named here; ``initial`` names the policy as it is now.
        reference_cache: directory of such log-likelihoods, keyed by weights and rows; ``output/reference`` by default.
        validation: rows whose mean loss and metrics are logged.
        callbacks: called at every evaluation with (step, model, record); may add numbers to the record.
        resume: continue from the newest complete checkpoint in `output`; start anew where there is none.

    Raises:
        InputError: if `output` holds another run and `resume` is not set, its settings differ, the rows do not have
            what the objective needs, or the reference is missing.
        LoglikError: if the loss becomes NaN or infinite, naming the rows; the last good checkpoint stays.
    """
    chosen = named_objective(objective) if isinstance(objective, str) else objective
    run = _Run(model, chosen, config, Path(output))
    if run.needs.reference or ("reference" in run.needs.optional and not _is_auto(reference)):
        cache = Path(reference_cache) if reference_cache else Path(output) / "reference"
        run.references = References(objective_name(chosen), model, reference, batch_size=config.micro, cache=cache)
    return run.train(data, validation, callbacks, resume=resume)


def _is_auto(reference: Any) -> bool:
    return reference is None or (isinstance(reference, str) and reference == "auto")


class _Run:
    """The state of one call of `fit`."""

    def __init__(self, model: Trainable, objective: Objective, config: TrainConfig, out: Path) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.needs: Needs = needs_of(objective)
        if isinstance(model, RewardModel) and (self.needs.likelihoods or self.needs.reference):
            raise InputError(f"{objective_name(objective)} needs likelihoods, and a reward model has none")
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
            AcceleratorState._reset_state()  # else a process could only ever train in the precision of its first run
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            log_with=list(config.report_to) or None,
            project_dir=str(out),
        )
        self.sharded = wants_sharding(self.accelerator, config)
        if config.draws_per_step > 1 and not is_sampled(model):
            raise InputError("draws_per_step is for models whose likelihoods are sampled; this one's are not: leave it")
        processes = self.accelerator.num_processes
        self.per_step, uneven = divmod(config.batch_size // config.micro, processes)
        if uneven or self.per_step < 1:
            raise InputError(
                f"{processes} processes cannot share a batch of {config.batch_size} in passes of {config.micro} evenly"
            )
        self.loss = Loss(model, objective, self.needs)
        self.references: References | None = None
        settings = config.fingerprint() | {"objective": _described(objective)}
        self.files = RunFiles(
            out, model, self.loss, self.accelerator, settings, keep=config.keep, trackers=bool(config.report_to)
        )
        self.begun = time.monotonic()

    def train(
        self, data: Rows | Online, validation: Rows | None, callbacks: Sequence[Callback], *, resume: bool
    ) -> FitResult:
        """All steps; see `fit`."""
        config, files, module = self.config, self.files, self.model.model
        online = data if isinstance(data, Online) else None
        if "old" in self.needs.optional and (online is None or online.every != 1):
            raise InputError(
                f"{objective_name(self.objective)} is trained on policy here: give Online data with every=1, or call "
                "it with the old policy's values in a loop of your own"
            )
        fixed = None if isinstance(data, Online) else _Segment(self, Numbered(data), kept=True)
        # While the policy is still the reference: afterwards only these numbers remember it.
        held_out = _HeldOut(self, validation, callbacks)
        if online is not None and self.references is not None:
            self.references.freeze()
        wrapped, optimizer, (start, loss, kept_rows) = self._prepared(resume=resume)
        files.begin_tracking()
        measured = held_out({"step": 0}) if start == 0 and config.eval_every else None
        done, stopped = start, False
        module.train()
        try:
            with bar("training", total=config.steps - start, unit="steps") as advance, stop_on_sigterm() as asked:
                for step, segment, micro in self._steps(start, fixed, online, kept_rows):
                    # After loading: opening the loader draws random numbers, and only a run's first step does that.
                    seed_step(config.seed, step, self.accelerator.process_index)
                    result = take_step(
                        self.loss, wrapped, micro, segment, optimizer, self.accelerator, config, step, stop=asked()
                    )
                    loss, done = result.loss, step + 1
                    advance(1, f"loss {loss:.4f}")
                    last = done == config.steps
                    record: dict[str, Any] = {"step": done, "loss": loss, "grad_norm": result.grad_norm}
                    record |= result.metrics
                    record |= {"learning_rate": config.learning_rate_at(step), "seconds": self._seconds()}
                    due = last or bool(config.eval_every and done % config.eval_every == 0)
                    if due and held_out.wanted:
                        measured = held_out(record)
                        module.train()
                    elif due or done % config.log_every == 0:
                        files.write(record)
                    stopped = result.stopped and not last
                    if last or stopped or done % config.save_every == 0:
                        files.save(optimizer, done, loss, rows_to_json(segment.rows) if online is not None else None)
                    if stopped:
                        break
        finally:
            module.eval()
        if not stopped:
            if measured is None:  # nothing was left to train; else the last step has measured
                measured = held_out.loss()
            files.export(files.out)
        files.end_tracking()
        best = files.best[1] if files.best else None
        return FitResult(done, loss, measured, self._seconds(), files.out, stopped, best)

    def _prepared(self, *, resume: bool) -> tuple[Any, Any, tuple[int, float, Any]]:
        """The network for this run's processes, its optimizer, and where the run stands."""
        self.loss.to(self.accelerator.device)
        if self.sharded:
            shard(self.model, self.objective, self.accelerator, self.config)
        optimizer = make_optimizer(self.loss, self.config)
        state = self.files.prepare(optimizer, resume=resume)
        if self.sharded:
            return self.loss, optimizer, state
        wrapped, prepared = self.accelerator.prepare(self.loss, optimizer)
        return wrapped, prepared, state

    def _steps(
        self, start: int, fixed: _Segment | None, online: Online | None, kept: Any
    ) -> Iterator[tuple[int, _Segment, list[RowBatch]]]:
        """Each step with its rows and this process's micro-batches of them."""
        config = self.config
        begin = start
        while begin < config.steps:
            segment, end = fixed, config.steps
            if online is not None:
                end = min(config.steps, (begin // online.every + 1) * online.every)
                segment, kept = _Segment(self, self._collect(online, begin, kept), kept=False), None
            assert segment is not None
            sampler = StepSampler(
                len(segment.rows),
                batch_size=config.batch_size,
                micro_batch_size=config.micro,
                first=begin,
                last=end,
                # Rows drawn anew are another data set, with an order of its own.
                seed=config.seed if online is None else (config.seed, begin // online.every),
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            )
            batches = iter(DataLoader(segment.rows, batch_sampler=sampler, collate_fn=collate))
            for step in range(begin, end):
                micro = [next(batches).to(self.accelerator.device) for _ in range(self.per_step)]
                if is_sampled(self.model):
                    names = [f"seed {config.seed} step {step} draw {i}" for i in range(config.draws_per_step)]
                    micro = [batch.with_draws(name) for name in names for batch in micro]
                yield step, segment, micro
            begin = end

    def _collect(self, online: Online, begin: int, kept: Any) -> Numbered:
        """Rows drawn from the policy as it is now, by the first process for all; or those a checkpoint kept."""
        if kept is not None and begin % online.every:
            return Numbered(rows_from_json(kept))
        found: list[Any] = [None]
        module = self.model.model
        with whole(module):
            if self.accelerator.is_main_process:
                module.eval()
                generator = torch.Generator().manual_seed((self.config.seed << 32) + begin // online.every)
                live = self.references.live if self.references is not None else None
                found = [list(online.collect(self.model, live, generator))]
                module.train()
            self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if not found[0]:
            raise InputError("the collection drew no rows to train on")
        return Numbered(found[0])

    def _seconds(self) -> float:
        return time.monotonic() - self.begun


class _Segment:
    """Rows of some steps with their reference, and those with other prompts' completions where the objective asks."""

    def __init__(self, run: _Run, rows: Numbered, *, kept: bool) -> None:
        self.rows = rows
        self.reference: Reference | None = None
        self.mismatched = Numbered(rows.rows, rolled=True) if run.needs.kl else None
        self.mismatched_reference: Reference | None = None
        if run.references is not None:
            # The others read what it has kept; a sharded policy takes all of them at once.
            together = is_sharded(run.model.model)
            with nullcontext() if together else run.accelerator.main_process_first():
                of = run.references.of if kept else run.references.of_fresh
                self.reference = of(rows)
                self.mismatched_reference = of(self.mismatched) if self.mismatched is not None else None


class _HeldOut:
    """Evaluation on the validation rows, and the callbacks."""

    def __init__(self, run: _Run, rows: Rows | None, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks = run, callbacks
        self.segment = None if rows is None else _Segment(run, Numbered(rows), kept=True)
        self.wanted = self.segment is not None or bool(callbacks)

    def __call__(self, record: dict[str, Any]) -> float | None:
        """Add what was measured to `record` and log it; the loss."""
        if not self.wanted:
            return None
        found = None
        if self.segment is not None:
            at = self._evaluation(self.segment)
            found = at.loss
            record["validation"] = found
            record |= {f"validation_{name}": value for name, value in at.metrics.items()}
            if self.run.config.eval_every:
                self.run.files.keep_best(found, int(record["step"]))
        for callback in self.callbacks:
            callback(int(record["step"]), self.run.model, record)
        self.run.files.write(record)
        return found

    def loss(self) -> float | None:
        """The loss alone."""
        return None if self.segment is None else self._evaluation(self.segment).loss

    def _evaluation(self, segment: _Segment) -> Evaluation:
        return evaluate(
            self.run.model,
            self.run.objective,
            segment.rows.rows,
            batch_size=self.run.config.micro,
            reference=segment.reference,
            mismatched_reference=segment.mismatched_reference,
        )


def _described(objective: Objective) -> dict[str, Any]:
    """An objective by its name and settings, for comparison on resume."""
    settings: dict[str, Any] = {}
    if isinstance(objective, partial):
        settings = {k: v for k, v in objective.keywords.items() if isinstance(v, int | float | str | bool | None)}
    elif is_dataclass(objective) and not isinstance(objective, type):
        settings = {f.name: getattr(objective, f.name) for f in fields(objective)}
    return {"name": objective_name(objective), **settings}


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW of everything that is trained; vectors (norms, biases) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)
