"""What an objective is called with: likelihoods and numbers of a batch, by the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import INPUTS, Objective, Terms
from loglik.training.data import RowBatch, first_completions

__all__ = ["Needs", "needs_of", "objective_name", "terms_of"]

_PAIR = ("chosen", "rejected", "real", "fake", "chosen_rewards", "rejected_rewards")
_VALUES = ("labels", "rewards", "proposal", "preferences")


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective asks for, read off its arguments.

    Args:
        required: names without a default.
        optional: names with one, supplied where the rows have them.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def pairs(self) -> bool:
        """Rows must have two completions: chosen and rejected, or real and fake."""
        return any(name in _PAIR for name in self.required)

    @property
    def reference(self) -> bool:
        """Likelihoods under a frozen reference are needed."""
        return "kl" in self.required or any(name.startswith("reference") for name in self.required)

    @property
    def kl(self) -> bool:
        """An estimate of the KL divergence over the whole step is needed."""
        return "kl" in self.required

    @property
    def likelihoods(self) -> bool:
        """Log-likelihoods under the policy are needed."""
        return any(name in ("policy", "chosen", "rejected", "real") for name in self.required)

    @property
    def reward_model(self) -> bool:
        """What is trained is a reward model: rewards are asked for, and nothing else that a model gives."""
        asks = "chosen_rewards" in self.required or "rewards" in self.required
        return asks and not self.likelihoods and not self.model

    @property
    def model(self) -> bool:
        """The model itself is needed: more than log-likelihoods."""
        return "model" in self.required

    def check_rows(self, batch: RowBatch, method: str, predicted: Tensor | None = None) -> None:
        """Refuse rows that lack what is needed.

        Raises:
            InputError: naming the first such row, or the missing numbers.
        """
        if self.pairs:
            wrong = (batch.counts != 2).nonzero().flatten().tolist()
            if wrong:
                raise InputError(
                    f"{method} compares two completions (chosen and rejected) a row; {batch.names[wrong[0]]} has "
                    f"{int(batch.counts[wrong[0]])}"
                )
        for name in _VALUES:
            if name in self.required and name not in batch.values and (name != "rewards" or predicted is None):
                raise InputError(f"{method} needs {name!r} for every row, and {batch.names[0]} or a later one has none")


def objective_name(objective: Objective) -> str:
    """The name of a function, of a bound function, or of the class of a callable object."""
    inner: Any = getattr(objective, "func", objective)
    return str(getattr(inner, "__name__", type(inner).__name__))


def needs_of(objective: Objective) -> Needs:
    """What `objective` asks for.

    Raises:
        InputError: for an argument that training cannot supply.
    """
    required: list[str] = []
    optional: list[str] = []
    called: Any = objective.forward if isinstance(objective, torch.nn.Module) else objective
    for name, parameter in inspect.signature(called).parameters.items():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        if name not in INPUTS:
            raise InputError(
                f"{objective_name(objective)} asks for {name!r}, which training does not supply: bind it with "
                f"functools.partial, or ask for one of {', '.join(INPUTS)}"
            )
        (required if parameter.default is inspect.Parameter.empty else optional).append(name)
    return Needs(tuple(required), tuple(optional))


def terms_of(
    objective: Objective,
    needs: Needs,
    batch: RowBatch,
    policy: LogLikelihood | None,
    reference: LogLikelihood | None,
    extra: Mapping[str, Any],
) -> Terms:
    """The objective's terms for a batch.

    Args:
        objective: to call.
        needs: what it asks for.
        batch: the rows.
        policy: (N,) log-likelihoods of their completions; None for objectives that work on the model itself.
        reference: (N,) under the reference, or None.
        extra: `kl` and `model`, where needed, and `rewards` (N,) of a reward model.
    """
    predicted = extra.get("rewards")
    needs.check_rows(batch, objective_name(objective), predicted)
    given: dict[str, Any] = {}
    if predicted is not None:
        first = first_completions(batch.counts)
        extra = {**extra, "chosen_rewards": predicted[first]}
        if needs.pairs:
            extra["rejected_rewards"] = predicted[first + 1]
    for name in (*needs.required, *needs.optional):
        value = extra[name] if name in extra else _SUPPLY[name](batch, policy, reference)
        if value is not None:
            given[name] = value
        elif name in needs.required:
            raise InputError(
                f"{objective_name(objective)} needs {name!r}, and there is none"
                + (": it trains a RewardModel" if name.endswith("_rewards") else "")
            )
    return objective(**given)


def _rows(likelihood: LogLikelihood | None, batch: RowBatch, offset: int) -> LogLikelihood | None:
    if likelihood is None:
        return None
    return likelihood[first_completions(batch.counts) + offset]


def _weights(batch: RowBatch, offset: int) -> Tensor | None:
    return None if batch.weights is None else batch.weights[first_completions(batch.counts) + offset]


def _labels(batch: RowBatch) -> Tensor | None:
    return batch.values["labels"] > 0.5 if "labels" in batch.values else None


_Supply = Callable[[RowBatch, LogLikelihood | None, LogLikelihood | None], Any]
_SUPPLY: dict[str, _Supply] = {
    "policy": lambda batch, policy, reference: policy,
    "reference": lambda batch, policy, reference: reference,
    "old": lambda batch, policy, reference: None,  # a step on rows drawn for it is on policy
    "chosen": lambda batch, policy, reference: _rows(policy, batch, 0),
    "rejected": lambda batch, policy, reference: _rows(policy, batch, 1),
    "reference_chosen": lambda batch, policy, reference: _rows(reference, batch, 0),
    "reference_rejected": lambda batch, policy, reference: _rows(reference, batch, 1),
    "real": lambda batch, policy, reference: _rows(policy, batch, 0),
    "fake": lambda batch, policy, reference: _rows(policy, batch, 1),
    "reference_real": lambda batch, policy, reference: _rows(reference, batch, 0),
    "reference_fake": lambda batch, policy, reference: _rows(reference, batch, 1),
    "groups": lambda batch, policy, reference: torch.repeat_interleave(batch.counts),
    "labels": lambda batch, policy, reference: _labels(batch),
    "rewards": lambda batch, policy, reference: batch.values.get("rewards"),
    "chosen_rewards": lambda batch, policy, reference: None,
    "rejected_rewards": lambda batch, policy, reference: None,
    "proposal": lambda batch, policy, reference: batch.values.get("proposal"),
    "preferences": lambda batch, policy, reference: batch.values.get("preferences"),
    "chosen_weights": lambda batch, policy, reference: _weights(batch, 0),
    "rejected_weights": lambda batch, policy, reference: _weights(batch, 1),
    "kl": lambda batch, policy, reference: None,
    "model": lambda batch, policy, reference: None,
    "batch": lambda batch, policy, reference: batch.tokens,
}
