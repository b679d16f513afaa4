r"""The geometric mixture of two models, token by token: what IPO-MD and Nash-MD sample their opponents from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require
from loglik.models.sampling import ancestral_samples

if TYPE_CHECKING:
    from loglik.models.encode import Layout

__all__ = ["GeometricMixture", "MixtureLogitsProcessor", "geometric_mixture"]


def geometric_mixture(policy: ChainRule, reference: ChainRule, *, beta: float) -> GeometricMixture:
    r"""The model whose next token has :math:`p_\beta \propto p_\theta^{1-\beta}\,p_\text{ref}^{\beta}`.

    Args:
        policy: a model with next-token distributions.
        reference: another over the same vocabulary.
        beta: weight of the reference in [0, 1]; 0 is the policy itself, 1 the reference.

    Raises:
        InputError: for a beta outside [0, 1], or a model without next-token distributions.

    Source: arXiv 2403.08635.
    """
    return GeometricMixture(policy, reference, beta=beta)


class GeometricMixture:
    r"""Two models mixed geometrically token by token, as a model of its own.

    .. math::

        \log p_\beta(x_t \mid x_{<t}) = (1-\beta) \log p_\theta(x_t \mid x_{<t})
            + \beta \log p_\text{ref}(x_t \mid x_{<t}) - \log Z_t(x_{<t})

    Mixing logits instead gives the same distribution. Every step is normalised, so `log_prob` is exact for this
    autoregressive model, the one that is sampled. It is not the mixture
    :math:`\propto p_\theta(x)^{1-\beta} p_\text{ref}(x)^\beta` of whole sequences, which lacks the factors
    :math:`Z_t` and cannot be sampled token by token. Made for sampling: values carry no gradient.

    Args:
        policy: a model with next-token distributions; its tokenizer and layout are the mixture's.
        reference: another over the same vocabulary.
        beta: weight of the reference in [0, 1].

    Raises:
        InputError: for a beta outside [0, 1], or a model without next-token distributions.
    """

    kind = Kind.EXACT
    unit = Unit.TOKEN

    def __init__(self, policy: ChainRule, reference: ChainRule, *, beta: float) -> None:
        if not 0 <= beta <= 1:
            raise InputError(f"beta, the weight of the reference, must lie in [0, 1], got {beta}")
        self.policy = require(policy, ChainRule, "a geometric mixture")  # type: ignore[type-abstract]
        self.reference = require(reference, ChainRule, "a geometric mixture")  # type: ignore[type-abstract]
        self.beta = beta
        self.tokenizer: Any = getattr(policy, "tokenizer", None)
        self.layout: Layout = getattr(policy, "layout", "causal")

    @property
    def max_length(self) -> int | None:
        """The shorter of both contexts, in tokens; None where neither has a limit."""
        limits = [getattr(model, "max_length", None) for model in (self.policy, self.reference)]
        return min((limit for limit in limits if limit is not None), default=None)

    @torch.no_grad()
    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) log-probabilities of the token after each row, nats; two forward passes.

        Raises:
            InputError: for vocabularies of different sizes, or a row for which the models have no token in common.
        """
        policy = self.policy.next_log_probs(prefix)
        return _mixed(policy, self.reference.next_log_probs(prefix), self.beta)

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Exact log-likelihood (B,) of the scored tokens, with per-token terms (B, T).

        Every scored position takes a forward pass of both models over what stands before it: this costs what sampling
        the rows did, not what scoring them with one model does.

        Raises:
            ValueError: if the first token of a row is to be scored: nothing stands before it.
        """
        packed, origin = x.packed_left()
        packed.require_context()
        starts = packed.completion_starts()
        terms: list[tuple[Tensor, int, Tensor]] = []
        for column in packed.scored_mask.any(0).nonzero().flatten().tolist():
            rows = packed.scored_mask[:, column].nonzero().flatten()
            before = TokenBatch(
                packed.ids[rows, :column],
                packed.attention_mask[rows, :column],
                torch.zeros_like(packed.attention_mask[rows, :column]),
                starts[rows].clamp(max=column),
            )
            targets = packed.ids[rows, column : column + 1]
            nexts = self.next_log_probs(before)
            terms.append((rows, column, nexts.gather(1, targets.to(nexts.device)).squeeze(1).to(x.ids.device)))
        dtype = terms[0][2].dtype if terms else torch.float32
        per_unit = torch.zeros(packed.ids.shape, dtype=dtype, device=x.ids.device)
        for rows, column, values in terms:
            per_unit[rows, column] = values
        return LogLikelihood.from_per_unit(x.unpack(per_unit, origin, packed), x.scored_mask & x.attention_mask)

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        """Ancestral samples of the mixture: `n` per prompt row, each ended by EOS or `max_tokens`; completions scored.

        Raises:
            ValueError: without a prompt, if the tokenizer has no BOS token.
        """
        return ancestral_samples(self, n, prompt=prompt, generator=generator, max_tokens=max_tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy!r}, {self.reference!r}, beta={self.beta:g})"


class MixtureLogitsProcessor(LogitsProcessor):
    """The same mixture inside transformers' ``generate`` of the policy, which keeps its own cache.

    Pass it as ``logits_processor=[MixtureLogitsProcessor(...)]``. Prompts of different lengths must be padded on the
    left, as ``generate`` wants them.

    Args:
        reference: a model with next-token distributions over the policy's vocabulary.
        beta: weight of the reference in [0, 1].
        pad_id: token on the left of shorter prompts; None where there is no padding.

    Raises:
        InputError: for a beta outside [0, 1], or a model without next-token distributions.

    Source: arXiv 2403.08635.
    """

    def __init__(self, reference: ChainRule, *, beta: float, pad_id: int | None = None) -> None:
        if not 0 <= beta <= 1:
            raise InputError(f"beta, the weight of the reference, must lie in [0, 1], got {beta}")
        self.reference = require(reference, ChainRule, "a geometric mixture")  # type: ignore[type-abstract]
        self.beta = beta
        self.pad_id = pad_id

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) normalised log-probabilities of the mixture after (B, T) `input_ids`, from the policy's logits."""
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if self.pad_id is not None:
            real = (input_ids != self.pad_id).cumsum(1) > 0
        prefix = TokenBatch(input_ids, real, torch.zeros_like(real))
        policy = torch.log_softmax(scores.float(), dim=-1)
        return _mixed(policy, self.reference.next_log_probs(prefix), self.beta).to(scores.dtype)


def _mixed(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    if policy.shape != reference.shape:
        raise InputError(
            f"policy and reference predict {policy.shape[-1]} and {reference.shape[-1]} tokens: a mixture needs one "
            "vocabulary"
        )
    reference = reference.to(policy.device)
    # The ends apart: 0 * log 0 is no number.
    if beta in (0, 1):
        return reference if beta else policy
    mixed = (1 - beta) * policy + beta * reference
    empty = torch.isneginf(mixed.max(-1).values).nonzero().flatten()
    if len(empty):
        raise InputError(f"row {int(empty[0])}: no token is possible under both policy and reference")
    return torch.log_softmax(mixed, dim=-1)
