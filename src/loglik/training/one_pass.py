r"""One pass over fresh data, recorded as the codes of `loglik.signals.epiplexity` need it.

`prequential_run` trains a model on each batch once and keeps its log-likelihood before the update. `requential_run`
trains a teacher on the data and a student on the teacher's samples alone, and keeps the divergence of the two on each
sampled batch before the student's update: what a decoder that has the student needs to rebuild the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError, LoglikError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.dense import scored_logits
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.epiplexity import CodeLength, prequential_code, requential_code, step_divergence
from loglik.training.config import TrainConfig
from loglik.training.fit import make_optimizer

__all__ = ["PrequentialRun", "RequentialRun", "prequential_run", "requential_run"]

Advance = Callable[[int, str], object]


@dataclass(frozen=True, slots=True, eq=False)
class PrequentialRun:
    """What one pass over the data recorded.

    Args:
        curve: a row per step: the log-likelihood of its batch before the update.
        finals: held-out rows under the model after so many steps.
    """

    curve: LogLikelihood
    finals: Mapping[int, LogLikelihood]

    def code(self, step: int) -> CodeLength:
        """Bits of the model after `step` steps."""
        return prequential_code(self.curve[:step], final=self.finals[step])


@dataclass(frozen=True, slots=True, eq=False)
class RequentialRun:
    """What one pass of a teacher over the data, and of its student over samples, recorded.

    Args:
        divergences: (S,) of teacher and student on each sampled batch before the student's update, nats.
        tokens: (S,) sampled tokens of each.
        finals: held-out REAL rows under the student after so many steps.
        teacher_steps: updates of the teacher; fewer than S where it had to wait for the student.
    """

    divergences: Tensor
    tokens: Tensor
    finals: Mapping[int, LogLikelihood]
    teacher_steps: int

    def code(self, step: int, *, overhead: bool = False) -> CodeLength:
        """Bits of the student after `step` steps."""
        return requential_code(self.divergences[:step], self.tokens[:step], self.finals[step], overhead=overhead)


def prequential_run(
    model: Any,
    batches: Iterable[Any],
    config: TrainConfig,
    *,
    held_out: Sequence[Any],
    checkpoints: Collection[int] = (),
    advance: Advance | None = None,
) -> PrequentialRun:
    """Train a model once on each batch, at a constant learning rate, and keep the losses before the updates.

    Args:
        model: with `log_prob`, around a torch module in `model.model`; trained in place, without dropout.
        batches: fresh ones, each used once, at least ``config.steps``; what `model.log_prob` takes.
        config: steps, learning rate with its warm-up, AdamW's settings and the clip; its schedule must be constant.
        held_out: batches of data that are not in `batches`.
        checkpoints: numbers of steps after which the held-out data are read; after the last step they are in any case.
        advance: told of each step with a note.

    Raises:
        InputError: for another schedule, a checkpoint out of range, no held-out data, or too few batches.
        LoglikError: if a loss is not finite, with its step.

    Source: arXiv 2601.03220.
    """
    learner = _Learner(model, config)
    wanted = _checked(config, held_out, checkpoints)
    steps: list[LogLikelihood] = []
    finals: dict[int, LogLikelihood] = {}
    for batch in _exactly(batches, config.steps):
        steps.append(learner.learn(batch))
        if len(steps) in wanted:
            finals[len(steps)] = learner.read(held_out)
        if advance is not None:
            advance(1, f"loss {-float(steps[-1].mean_per_unit().value):.3f}")
    return PrequentialRun(LogLikelihood.cat(steps), finals)


def requential_run(
    teacher: Any,
    student: Any,
    batches: Iterable[Any],
    sample: Callable[[], TokenBatch],
    config: TrainConfig,
    *,
    held_out: Sequence[Any],
    checkpoints: Collection[int] = (),
    max_kl: float = 0.1,
    advance: Advance | None = None,
) -> RequentialRun:
    """Train a teacher on the data and a student on what the teacher says, and keep their divergences.

    At each step the teacher learns from the next batch, unless the last divergence per token was above `max_kl`; then
    it says a batch, on which the divergence is measured and the student learns.

    Args:
        teacher: a causal or encoder-decoder model around a torch module in `teacher.model`.
        student: another with the same weights: both must begin alike, from a seed that the decoder has.
        batches: fresh ones for the teacher, each used once, at least ``config.steps``.
        sample: draws a batch from the teacher as it is at the time, with its own tokens scored.
        config: as in `prequential_run`, for both.
        held_out: batches of REAL data that are not in `batches`.
        checkpoints: as there.
        max_kl: nats per token; infinite for a teacher that never waits.
        advance: as there.

    Raises:
        InputError: as there, for a model without a logit for every token, a teacher that is the student or begins with
            other weights, or a `max_kl` that is not positive.
        LoglikError: as there.

    Source: arXiv 2601.03220.
    """
    if not max_kl > 0:
        raise InputError(f"max_kl must be positive, got {max_kl}")
    wanted = _checked(config, held_out, checkpoints)
    _require_equal(teacher, student)
    guide, learner = _Learner(teacher, config), _Learner(student, config)
    divergences: list[Tensor] = []
    tokens: list[int] = []
    finals: dict[int, LogLikelihood] = {}
    source, last = iter(_exactly(batches, config.steps)), 0.0
    for step in range(1, config.steps + 1):
        if last <= max_kl:
            guide.learn(next(source))
        drawn = sample()
        with torch.no_grad():
            logits = [scored_logits(model, drawn, method="a requential code") for model in (teacher, student)]
        divergences.append(step_divergence(*logits).cpu())
        tokens.append(len(logits[0]))
        last = float(divergences[-1]) / tokens[-1]
        learner.learn(drawn)
        if step in wanted:
            finals[step] = learner.read(held_out)
        if advance is not None:
            advance(1, f"KL {last:.3f}")
    return RequentialRun(torch.stack(divergences), torch.tensor(tokens), finals, guide.step)


class _Learner:
    """A model with its optimizer, which learns from each batch once."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        if not hasattr(getattr(model, "model", None), "parameters"):
            raise InputError(f"{type(model).__name__} has no weights that a gradient could change: give a neural model")
        self.model, self.config, self.step = model, config, 0
        self.optimizer = make_optimizer(model.model, config)
        self.objective = MaximumLikelihood("token_mean")
        model.model.eval()  # without dropout: a code needs the model's one likelihood

    def learn(self, batch: Any) -> LogLikelihood:
        """One step; the log-likelihood of the whole batch before it, as one row."""
        likelihood = self.model.log_prob(batch)
        loss = self.objective(likelihood).mean()
        if not math.isfinite(float(loss.detach())):
            raise LoglikError(f"the loss of step {self.step + 1} is {float(loss.detach())}: lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.model.parameters(), self.config.max_grad_norm or math.inf)
        self.optimizer.step()
        self.step += 1
        return _bare(likelihood.detach().total())

    @torch.no_grad()
    def read(self, batches: Sequence[Any]) -> LogLikelihood:
        """Rows of held-out data."""
        return LogLikelihood.cat([_bare(self.model.log_prob(batch)) for batch in batches])


def _bare(likelihood: LogLikelihood) -> LogLikelihood:
    """On the CPU, without the terms per token, which nothing here reads."""
    moved = likelihood.to("cpu")
    return moved.per(moved.unit, moved.num_units)


def _checked(config: TrainConfig, held_out: Sequence[Any], checkpoints: Collection[int]) -> set[int]:
    if config.schedule != "constant":
        raise InputError(
            f"the area of a loss curve depends on how the learning rate falls: set schedule to constant, not "
            f"{config.schedule}"
        )
    if not len(held_out):
        raise InputError("there are no held-out data, which give the final loss: keep a batch aside at least")
    bad = [step for step in checkpoints if not 1 <= step <= config.steps]
    if bad:
        raise InputError(f"checkpoints must be from 1 to the number of steps, {config.steps}, got {bad[0]}")
    return {*checkpoints, config.steps}


def _exactly(batches: Iterable[Any], steps: int) -> Iterable[Any]:
    """The first `steps` batches."""
    source = iter(batches)
    for step in range(steps):
        batch = next(source, None)
        if batch is None:
            raise InputError(f"the data have {step} batches for {steps} steps, and no batch may be used twice")
        yield batch


def _require_equal(teacher: Any, student: Any) -> None:
    """Both begin with the same weights, and are not the same object."""
    mine, yours = (dict(model.model.named_parameters()) for model in (teacher, student))
    if any(value is yours.get(name) for name, value in mine.items()):
        raise InputError("teacher and student share weights: give the student a copy of its own")
    same = mine.keys() == yours.keys() and all(torch.equal(value, yours[name]) for name, value in mine.items())
    if not same:
        raise InputError("teacher and student begin with other weights: start both from one seed")
