"""What objectives share: loss terms with their weights, and the refusal of likelihoods they cannot use.

An objective is a function. The names of its arguments before ``*`` say what it needs, and the training loop supplies
them by name:

=====================================  ==============================================================================
``policy``                             log-likelihoods (N,) of all completions of the batch
``reference``                          the same under the frozen reference
``old``                                the same under the policy that drew them; None where that is the policy itself
``chosen``, ``rejected``               log-likelihoods (B,) of a preference pair under the policy
``reference_chosen/_rejected``         the same under the frozen reference
``real``, ``fake``                     log-likelihoods (B,) of data and of samples, the completions of one row in turn
``reference_real/_fake``               the same under the frozen reference
``groups``                             (N,) long, the row (prompt) that each completion belongs to, ascending
``labels``                             (N,) bool, whether a completion is desirable (correct, loved)
``rewards``                            (N,) float, higher is better: of the rows, or of the reward model that is trained
``chosen_rewards/rejected_rewards``    (B,) float, what the reward model that is trained gives to a pair
``proposal``                           (N,) float, log-probability of each completion under the sampler that drew it
``preferences``                        (B,) float, probability that the chosen one is preferred
``chosen_weights/rejected_weights``    (B, T) float, weights of the tokens, aligned with ``per_unit``
``kl``                                 () float, estimate of KL(policy || reference) over the whole step
``model``, ``batch``                   the policy itself and its `TokenBatch`, for objectives that need more
=====================================  ==============================================================================

Settings follow ``*`` and have defaults; other values are bound by `functools.partial`. An objective may also be a
callable object with settings as fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood

__all__ = [
    "INPUTS",
    "Objective",
    "Terms",
    "log_ratio",
    "require_between",
    "require_kinds",
    "require_positive",
    "require_rows",
    "require_terms",
    "require_units",
]

# What a training loop can supply by name.
INPUTS = (
    "policy",
    "reference",
    "old",
    "chosen",
    "rejected",
    "reference_chosen",
    "reference_rejected",
    "real",
    "fake",
    "reference_real",
    "reference_fake",
    "groups",
    "labels",
    "rewards",
    "chosen_rewards",
    "rejected_rewards",
    "proposal",
    "preferences",
    "chosen_weights",
    "rejected_weights",
    "kl",
    "model",
    "batch",
)


@dataclass(frozen=True, slots=True)
class Terms:
    r"""Loss terms of one batch; a step's loss is :math:`\sum_b \ell_b / \sum_b w_b` over all its micro-batches.

    Args:
        loss: (B,) terms :math:`\ell_b`, differentiable.
        weight: (B,) weights :math:`w_b`, detached; functions of what is scored, not of the parameters.
        metrics: named (B,) tensors to log, detached; logged as means over samples.
        also: further means that are added to this one, each over its own weights (such as a token-mean likelihood
            beside a loss per pair).
    """

    loss: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    also: tuple[Terms, ...] = ()

    def mean(self) -> Tensor:
        """The loss of this batch alone."""
        return sum((part.loss.sum() / part.weight.sum() for part in self.parts()), self.loss.new_zeros(()))

    def parts(self) -> Iterator[Terms]:
        """This mean and those added to it, one by one."""
        yield replace(self, also=())
        for part in self.also:
            yield from part.parts()

    def __add__(self, other: Terms) -> Terms:
        """The sum of two means; metrics of both."""
        return replace(self, metrics=self.metrics | other.metrics, also=(*self.also, replace(other, metrics={})))

    def __rmul__(self, factor: float) -> Terms:
        """A mean times a number; metrics stay."""
        return replace(self, loss=factor * self.loss, also=tuple(factor * part for part in self.also))


class Objective(Protocol):
    """A function of what its argument names say (see the module); settings are bound or fields."""

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        """Loss terms of a batch."""


def require_rows(method: str, first: LogLikelihood, *others: LogLikelihood) -> None:
    """Every likelihood must have as many rows as the first.

    Raises:
        InputError: with both numbers.
    """
    for other in others:
        if len(other) != len(first):
            raise InputError(f"{method} compares row by row: got {len(first)} and {len(other)} rows")


def require_kinds(method: str, *likelihoods: LogLikelihood) -> None:
    """Refuse what no objective can train on: an upper bound, whose change says nothing about the likelihood.

    Raises:
        InputError: naming the method.
    """
    for likelihood in likelihoods:
        if likelihood.kind is Kind.UPPER_BOUND:
            raise InputError(
                f"{method} cannot train on an upper bound: moving it does not move log p(x); give a lower bound or an "
                "exact value"
            )


def require_units(method: str, *likelihoods: LogLikelihood) -> None:
    """A mean per unit needs at least one scored unit in every row.

    Raises:
        InputError: naming the first row without.
    """
    for likelihood in likelihoods:
        empty = (likelihood.num_units <= 0).nonzero().flatten()
        if len(empty):
            raise InputError(
                f"{method} divides by the scored {likelihood.unit}s, and row {int(empty[0])} has none: remove it"
            )


def require_terms(method: str, *likelihoods: LogLikelihood) -> None:
    """Token-level objectives need chain-rule terms.

    Raises:
        InputError: if a likelihood is a sum without terms.
    """
    for likelihood in likelihoods:
        if likelihood.per_unit is None:
            raise InputError(
                f"{method} needs a term per {likelihood.unit}; a likelihood of kind {likelihood.kind} was given as a "
                "sum alone: use a model with a chain rule (causal or encoder-decoder)"
            )


def require_positive(method: str, **options: float) -> None:
    """Options that must be positive and finite.

    Raises:
        InputError: naming the option and its value.
    """
    for name, value in options.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise InputError(f"{method}: {name} must be positive and finite, got {value}")


def require_between(method: str, low: float, high: float, **options: float) -> None:
    """Options that must lie in [low, high].

    Raises:
        InputError: naming the option, its value and the range.
    """
    for name, value in options.items():
        if not (isinstance(value, int | float) and low <= value <= high):
            raise InputError(f"{method}: {name} must lie between {low:g} and {high:g}, got {value}")


def log_ratio(method: str, policy: LogLikelihood, reference: LogLikelihood, *, absolute: bool = False) -> LogLikelihood:
    r""":math:`\log p_\theta(x) - \log p_\text{ref}(x)` (B,), labelled; no gradient reaches the reference.

    Args:
        method: name for the refusal.
        policy: of the model that is trained.
        reference: of the frozen one; detached here.
        absolute: the value itself is used, not only differences between rows: an unknown constant is refused.

    Raises:
        InputError: for upper bounds, rows that do not pair, or a constant that does not cancel.
    """
    require_rows(method, policy, reference)
    require_kinds(method, policy, reference)
    ratio = policy - reference.detach()
    if absolute and ratio.kind is Kind.UNNORMALIZED:
        raise InputError(
            f"{method} uses the log-ratio itself, and policy and reference have different unknown constants: use an "
            "objective of differences between completions, or normalised models"
        )
    return ratio
