r"""Entropy of the next token over the whole vocabulary, at every scored token of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglik.errors import RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.protocol import ChainRule, require
from loglik.models.tokens import selected_log_probs, widened
from loglik.signals.preference import predicting_states

__all__ = ["SpanEntropy", "entropy_kind", "span_entropy", "token_entropy"]

# Logits that exist at once: positions of a chunk times the vocabulary.
_CHUNK_LOGITS = 1 << 24
# Prefixes per call of a model that gives one distribution at a time.
_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class SpanEntropy:
    """Uncertainty about the scored tokens of B rows.

    Args:
        per_token: (B, T) entropy of the distribution over the vocabulary at each scored token, nats; 0 elsewhere.
        entropy: (B,) its mean over the scored tokens, conditioned on those before them: not the joint entropy of the
            span, which averages over them.
        log_likelihood: (B,) of the scored tokens, with terms.
    """

    per_token: Tensor
    entropy: Measurement
    log_likelihood: LogLikelihood


@torch.no_grad()
def span_entropy(model: Any, batch: TokenBatch) -> SpanEntropy:
    r"""Entropy of the next token, over the whole vocabulary, at every scored token.

    .. math:: H_t = -\sum_v p(v \mid x, y_{<t}) \log p(v \mid x, y_{<t}), \qquad H = \frac1T \sum_t H_t

    A causal model of transformers reads each row once; another model with next-token distributions reads every prefix
    of the span.

    Args:
        model: anything with next-token distributions.
        batch: B rows with scored tokens. Padding changes nothing.

    Returns:
        float32 or better, without gradient.

    Raises:
        InputError: for a model without next-token distributions.
        RowError: for a row without scored tokens, one whose first token is scored, or a model that gives NaN.

    Source: arXiv 2508.20395.
    """
    chain = require(model, ChainRule, "answer entropy")  # type: ignore[type-abstract]
    scored = batch.scored_mask & batch.attention_mask
    if bool((~scored.any(1)).any()):
        raise RowError("has no scored token: give an answer", row=f"row {int((~scored.any(1)).nonzero()[0])}")
    headless = scored & (batch.attention_mask.cumsum(1) == 1)
    if bool(headless.any()):
        row = int(headless.nonzero()[0, 0])
        raise RowError("its first token has nothing before it: give BOS or a question", row=f"row {row}")
    targets = batch.ids[scored]
    taken_apart = isinstance(model, CausalLM) and model.trunk is not None
    values, terms = (_one_pass if taken_apart else _prefixes)(chain, batch, scored, targets)
    bad = (~(torch.isfinite(values) & ~terms.isnan())).nonzero().flatten()
    if len(bad):
        row, column = scored.nonzero()[int(bad[0])].tolist()
        raise RowError(f"the model gives no distribution for the token in column {column}", row=f"row {row}")
    per_token, per_unit = (values.new_zeros(scored.shape).masked_scatter(scored, part) for part in (values, terms))
    likelihood = LogLikelihood.from_per_unit(per_unit, scored, kind=model.kind, unit=model.unit)
    mean = (per_token.sum(1, dtype=torch.float64) / scored.sum(1)).to(per_token.dtype)
    return SpanEntropy(per_token, Measurement(mean, entropy_kind(model), "answer_entropy"), likelihood)


def entropy_kind(model: Any) -> Kind:
    """An entropy given a prefix is as exact as the distribution; of a bound on probabilities it is no bound."""
    return Kind.EXACT if model.kind is Kind.EXACT else Kind.SURROGATE


def token_entropy(log_p: Tensor) -> Tensor:
    """(N,) entropies of normalised log-probabilities (N, V), float32 or better; NaN where there are NaNs."""
    wide = widened(log_p)
    # p log p is 0 where p is, and 0 minus the sum because minus a sum of zeros is -0.
    return 0.0 - torch.where(wide == -torch.inf, 0.0, wide.exp() * wide).sum(-1)


def _one_pass(model: Any, batch: TokenBatch, scored: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Entropies and log-probabilities (N,) of the scored tokens, from hidden states and a chunk of logits at a time."""
    states, _ = predicting_states(model, batch, method="answer entropy")
    trunk = model.trunk
    head = trunk.head
    vocabulary = model.model.config.get_text_config().vocab_size
    size = max(1, _CHUNK_LOGITS // vocabulary)
    values, terms = [], []
    for begin in range(0, len(states), size):
        part = states[begin : begin + size]
        logits = head.logits(part) if head is not None else widened(trunk.logits(part))
        values.append(token_entropy(torch.log_softmax(widened(logits), -1)))
        terms.append(selected_log_probs(logits, targets[begin : begin + size].to(logits.device)))
    return torch.cat(values).to(scored.device), torch.cat(terms).to(scored.device)


def _prefixes(model: ChainRule, batch: TokenBatch, scored: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same from one call per chunk of prefixes, of one length each: some models take no padding."""
    starts = batch.completion_starts().tolist()
    prefixes: list[tuple[list[int], int]] = []
    for row, column in scored.nonzero().tolist():
        real = batch.attention_mask[row, :column]
        before = batch.attention_mask[row, : min(starts[row], column)].sum()
        prefixes.append((batch.ids[row, :column][real].tolist(), int(before)))
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i][0]))
    values: dict[int, Tensor] = {}
    terms: dict[int, Tensor] = {}
    begin = 0
    while begin < len(order):
        length = len(prefixes[order[begin]][0])
        part = [i for i in order[begin : begin + _CHUNK_ROWS] if len(prefixes[i][0]) == length]
        rows, counts = zip(*(prefixes[i] for i in part), strict=True)
        log_p = widened(model.next_log_probs(TokenBatch.from_lists(rows, starts=counts))).to(scored.device)
        own = log_p.gather(1, targets[part][:, None])[:, 0]
        for i, value, term in zip(part, token_entropy(log_p), own, strict=True):
            values[i], terms[i] = value, term
        begin += len(part)
    every = range(len(prefixes))
    return torch.stack([values[i] for i in every]), torch.stack([terms[i] for i in every])
