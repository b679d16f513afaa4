"""The one model protocol: what has a likelihood, and the capabilities that methods ask for.

A method names the capability it needs in its signature (`ChainRule`, `Sampler`, ...) and `require` turns a missing one
into a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import Layout

__all__ = ["ChainRule", "EvidenceTerms", "HiddenStates", "Model", "Sampler", "TextModel", "is_sampled", "require"]

X_contra = TypeVar("X_contra", contravariant=True)
Out = TypeVar("Out")


@runtime_checkable
class Model(Protocol[X_contra]):
    """Everything with a likelihood: its `x` is a `TokenBatch` for text and a plain tensor elsewhere."""

    kind: Kind
    unit: Unit

    def log_prob(self, x: X_contra, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Labelled log-likelihoods (B,) of `x`, in nats; differentiable where the model is."""


@runtime_checkable
class Sampler(Protocol):
    """Draws from the distribution whose likelihood `Model.log_prob` gives."""

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        """`n` draws (per prompt row, where prompts are given)."""


@runtime_checkable
class ChainRule(Protocol):
    r"""Per-unit conditionals :math:`p(x_t \mid x_{<t}, c)` exist."""

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) normalised log-probabilities of the token after each row of `prefix`, float32 or better, nats."""


@runtime_checkable
class EvidenceTerms(Protocol):
    """A bound or estimate is a mean of terms that can be drawn, and back-propagated, one at a time."""

    def terms(self, x: TokenBatch, *, num_samples: int, draws: DrawsKey | None = None) -> Iterator[LogLikelihood]:
        """`num_samples` independent terms whose mean is the value."""


@runtime_checkable
class HiddenStates(Protocol):
    """Representations, for probes and contrastive objectives."""

    def hidden_states(self, x: TokenBatch) -> Tensor:
        """(B, T, D) last hidden states, zero at padding."""


@runtime_checkable
class TextModel(Protocol):
    """A model of token sequences with the tokenizer that makes them from text."""

    kind: Kind
    unit: Unit
    tokenizer: Any
    layout: Layout  # how prompt and completion become one row

    @property
    def max_length(self) -> int | None:
        """Tokens of context, prompt included; None: no limit."""

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Labelled log-likelihoods of the scored tokens of each row."""

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor | None]:
        """`log_prob`, and (B, T) bool whether each scored token is the model's first choice, where that has meaning."""


_SENTENCES = {
    ChainRule: "per-token conditionals (a causal, encoder-decoder or n-gram model)",
    Sampler: "a sampler (sample)",
    EvidenceTerms: "evidence terms that can be drawn one at a time (a bound or a Monte-Carlo estimate)",
    HiddenStates: "hidden states (a neural model)",
    Model: "log_prob",
}


def is_sampled(model: object) -> bool:
    """Whether a model's log-likelihoods are means over random draws, named by the ``draws`` of `Model.log_prob`."""
    estimator = getattr(model, "estimator", None)
    return isinstance(model, EvidenceTerms) and bool(getattr(estimator, "is_random", True))


def require(model: object, capability: type[Out], method: str) -> Out:
    """`model` as a `capability`, or an `InputError` that says what `method` misses."""
    if isinstance(model, capability):
        return model
    needs = _SENTENCES.get(capability, capability.__name__)
    raise InputError(f"{method} needs {needs}; {type(model).__name__} does not have it: use a model that does")
