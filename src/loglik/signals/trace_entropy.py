r"""What each step of a reasoning trace does to a model's uncertainty about the answer.

The answer is teacher-forced after every prefix of the trace. Where the entropy of its tokens falls from step to step,
the trace leads somewhere; traces of wrong answers stay flat or rise (arXiv 2508.20395). This is an oracle: from its
second token on the true answer is conditioned on. `open_entropy_curve` needs no answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.encode import TextEncoder
from loglik.models.protocol import ChainRule, require
from loglik.models.tokens import selected_log_probs, widened
from loglik.signals.preference import predicting_states
from loglik.signals.sequence_uncertainty import prompt_tokens

__all__ = [
    "EntropyCurve",
    "SpanEntropy",
    "StopAdvice",
    "answer_entropy_curve",
    "entropy_curve",
    "open_entropy_curve",
    "span_entropy",
    "split_steps",
]

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
    return SpanEntropy(per_token, Measurement(mean, _kind(model), "answer_entropy"), likelihood)


@dataclass(frozen=True, slots=True)
class StopAdvice:
    """When to stop reasoning.

    Args:
        step: number of steps after which to stop; None: not yet.
        reason: ``sure`` the entropy is low enough, ``stalled`` it has not fallen any more, ``continue``.
        saved: steps of the trace that come after `step`; 0 without one.
    """

    step: int | None
    reason: Literal["sure", "stalled", "continue"]
    saved: int


@dataclass(frozen=True, slots=True)
class EntropyCurve:
    r"""Entropy of the answer after 0, 1, ..., K steps of a trace.

    Compare descriptors between traces of different length with care: wrong traces are longer. Where the last step
    states the answer, entropy collapses for right and wrong ones alike: `until` leaves it out.

    Args:
        entropy: (K + 1,) mean over the answer's tokens, nats.
        per_token: (K + 1, T) of each token of the answer.
        log_likelihood: (K + 1,) of the true answer; None where no answer was given.
    """

    entropy: Measurement
    per_token: Tensor
    log_likelihood: LogLikelihood | None = None

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.entropy.value) - 1

    @property
    def utility(self) -> Tensor:
        r"""(K,) :math:`\Delta_k = H_{k-1} - H_k` of each step; single ones may be negative."""
        return -self.entropy.value.diff()

    @property
    def first_token(self) -> Tensor:
        """(K + 1,) entropy of the answer's first token, for which no answer is conditioned on."""
        return self.per_token[:, 0]

    @property
    def information_gain(self) -> Tensor:
        r"""(K,) fall of the mean negative log-likelihood of the true answer with each step, nats per token.

        Raises:
            InputError: without an answer.
        """
        if self.log_likelihood is None:
            raise InputError("the information gain needs the likelihood of an answer: use answer_entropy_curve")
        return self.log_likelihood.mean_per_unit().value.diff()

    def drop(self) -> float:
        r""":math:`H_0 - H_K`, what the whole trace does; negative if the model is less sure than before."""
        return float(self.entropy.value[0] - self.entropy.value[-1])

    def slope(self) -> float:
        """Least-squares slope of the entropy on the number of steps, nats per step; negative where it falls.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("a slope")
        steps = torch.arange(self.num_steps + 1, dtype=torch.float64)
        centred = steps - steps.mean()
        return float(centred @ self.entropy.value.double().cpu() / (centred @ centred))

    def share_rising(self) -> float:
        """Share of the steps after which the entropy is higher than before.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("the share of rising steps")
        return float((self.utility < 0).double().mean())

    def monotonicity(self) -> float:
        r"""Kendall's :math:`\tau_a` of entropy and steps: -1 falls at every step, 1 rises at every step; ties count 0.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("monotonicity")
        values = self.entropy.value.double().cpu()
        rises = (values[None, :] - values[:, None]).sign().triu(1)  # later minus earlier
        count = self.num_steps * (self.num_steps + 1) // 2
        return float(rises.sum() / count)

    def until(self, step: int) -> EntropyCurve:
        """The curve of the first `step` steps; a negative number leaves as many out at the end.

        Raises:
            InputError: for more steps than there are.
        """
        wanted = step if step >= 0 else self.num_steps + step
        if not 0 <= wanted <= self.num_steps:
            raise InputError(f"the trace has {self.num_steps} steps, so that there is no curve until step {step}")
        likelihood = None if self.log_likelihood is None else self.log_likelihood[: wanted + 1]
        cut = replace(self.entropy, value=self.entropy.value[: wanted + 1])
        return EntropyCurve(cut, self.per_token[: wanted + 1], likelihood)

    def early_stop(
        self, threshold: float, *, patience: int = 1, stall: int | None = None, min_fall: float = 0.0
    ) -> StopAdvice:
        """Advice that looks at no later step than the one it stops after.

        Stop as soon as the entropy has been at most `threshold` after `patience` states in a row; or, with `stall`,
        as soon as that many steps in a row have not brought it more than `min_fall` below where it last fell to.

        Args:
            threshold: nats per token, at least 0; choose it on traces of known outcome.
            patience: states in a row, at least 1.
            stall: steps without a fall that count as leading nowhere; None: never.
            min_fall: nats that count as a fall, at least 0.

        Raises:
            InputError: for options out of range.

        Source: arXiv 2508.20395 proposes to stop early and states no rule; this one is ours.
        """
        if not (0 <= threshold < math.inf and 0 <= min_fall < math.inf):
            raise InputError(f"threshold and min_fall must be at least 0 and finite, got {threshold} and {min_fall}")
        if patience < 1 or (stall is not None and stall < 1):
            raise InputError(f"patience and stall must be at least 1, got {patience} and {stall}")
        low, since, least = 0, 0, math.inf
        for step, value in enumerate(self.entropy.value.tolist()):
            low = low + 1 if value <= threshold else 0
            if low >= patience:
                return StopAdvice(step, "sure", self.num_steps - step)
            fell = value < least - min_fall
            since, least = (0, value) if fell else (since + 1, least)
            if stall is not None and since >= stall:
                return StopAdvice(step, "stalled", self.num_steps - step)
        return StopAdvice(None, "continue", 0)

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON and tables; None where a trace has no steps."""
        has_steps = self.num_steps > 0
        return {
            "steps": self.num_steps,
            "entropy": self.entropy.value.tolist(),
            "first_token_entropy": self.first_token.tolist(),
            "log_prob": None if self.log_likelihood is None else self.log_likelihood.value.tolist(),
            "kind": str(self.entropy.kind),
            "final": float(self.entropy.value[-1]),
            "drop": self.drop(),
            "slope": self.slope() if has_steps else None,
            "share_rising": self.share_rising() if has_steps else None,
            "monotonicity": self.monotonicity() if has_steps else None,
        }

    def _require_steps(self, what: str) -> None:
        if self.num_steps < 1:
            raise InputError(f"{what} needs at least one step, and the trace has none")


def answer_entropy_curve(
    model: Any, question: str, steps: Sequence[str], answer: str, *, separator: str = "\n", cue: str = "\nAnswer:"
) -> EntropyCurve:
    r"""Entropy of the true answer after each step of a trace.

    .. math:: H_k = \frac1T \sum_t H\bigl(p(\cdot \mid x, z_{\le k}, y_{<t})\bigr), \qquad k = 0, \dots, K

    The model reads ``question + separator + steps[0] + ... + cue`` and then the answer.

    Args:
        model: scores; a text model with next-token distributions, not necessarily the one that reasoned.
        question: the text that the trace starts from.
        steps: K steps in order, without the conclusion where that states the answer; may be empty.
        answer: the true one, with the white space that stands before it (after ``Answer:`` a space).
        separator: stands before each step.
        cue: stands before the answer, always the same.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, or an answer whose tokens change with
            what stands before it.
        RowError: for a step that is empty, or a text that cannot be encoded or does not fit into the context.

    Source: arXiv 2508.20395.
    """
    contexts = _contexts(question, steps, separator, cue)
    require(model, ChainRule, "answer entropy")  # type: ignore[type-abstract]
    encoder = TextEncoder(getattr(model, "tokenizer", None), layout=getattr(model, "layout", "causal"))
    rows, starts, answers = [], [], []
    for number, encoded in enumerate(encoder.encode_all([(context, answer) for context in contexts])):
        if isinstance(encoded, RowError):
            raise encoded.at(f"after {number} steps")
        row = [*encoded.prefix, *encoded.content, *encoded.suffix]
        start = len(encoded.prefix) + encoded.start
        rows.append(row)
        starts.append(start)
        answers.append(row[start:])
        if answers[0] != answers[-1]:
            raise InputError(
                f"the answer has other tokens after {number} steps than before the first: end the cue so that no token "
                "straddles it (a colon, and a space before the answer)"
            )
    _require_fit(model, rows)
    return _curve(model, TokenBatch.from_lists(rows, starts=starts), len(answers[0]))


def entropy_curve(model: Any, contexts: Sequence[Sequence[int]], answer: Sequence[int]) -> EntropyCurve:
    """`answer_entropy_curve` for tokens.

    Args:
        model: anything with next-token distributions.
        contexts: K + 1 rows of tokens, what stands before the answer after 0, 1, ..., K steps.
        answer: T tokens.

    Raises:
        InputError: for no contexts, an empty answer, or a model without next-token distributions.
        RowError: for an empty context.

    Source: arXiv 2508.20395.
    """
    if not len(contexts) or not len(answer):
        raise InputError(f"a curve needs a context and an answer: got {len(contexts)} contexts, {len(answer)} tokens")
    rows = [[*context, *answer] for context in contexts]
    _require_fit(model, rows)
    return _curve(model, TokenBatch.from_lists(rows, starts=[len(c) for c in contexts]), len(answer))


@torch.no_grad()
def open_entropy_curve(
    model: Any, question: str, steps: Sequence[str], *, separator: str = "\n", cue: str = "\nAnswer:"
) -> EntropyCurve:
    """Entropy of the token after the cue, after each step of a trace: a signal that needs no true answer.

    It is about one token. Let the cue end where the answer's first telling token stands: after a colon many
    tokenizers predict a space, or the answer with its space, as the case may be.

    Args:
        model: a text model with next-token distributions.
        question: the text that the trace starts from.
        steps: K steps in order; may be empty.
        separator: stands before each step.
        cue: stands before the answer.

    Returns:
        A curve with T = 1 and without a likelihood.

    Raises:
        InputError: for a model without next-token distributions or tokenizer.
        RowError: for a step that is empty, a context that does not fit, or a model that gives NaN.

    Source: arXiv 2508.20395, of which it is the first term.
    """
    chain = require(model, ChainRule, "answer entropy")  # type: ignore[type-abstract]
    batch = prompt_tokens(model, _contexts(question, steps, separator, cue))
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    _require_fit(model, rows)
    values = torch.cat(
        [
            _entropy(chain.next_log_probs(TokenBatch.from_lists([row], starts=[int(start)])))
            for row, start in zip(rows, batch.completion_starts(), strict=True)
        ]
    )
    if not bool(torch.isfinite(values).all()):
        raise RowError(
            "the model gives no distribution", row=f"after {int((~torch.isfinite(values)).nonzero()[0])} steps"
        )
    return EntropyCurve(Measurement(values, _kind(model), "open_entropy"), values[:, None])


def split_steps(trace: str, by: Literal["lines", "sentences"] = "lines") -> list[str]:
    """The steps of a trace: its lines that are not empty, or its sentences.

    A sentence ends with ``.``, ``!`` or ``?`` before white space, or with its line; a number keeps its point.

    Raises:
        InputError: for an unknown way to split.
    """
    if by not in ("lines", "sentences"):
        raise InputError(f"by must be lines or sentences, got {by!r}")
    pattern = r"\n" if by == "lines" else r"\n|(?<=[.!?])\s+"
    return [part.strip() for part in re.split(pattern, trace) if part.strip()]


def _contexts(question: str, steps: Sequence[str], separator: str, cue: str) -> list[str]:
    """What stands before the answer after 0, 1, ..., K steps."""
    if isinstance(steps, str):
        raise InputError("steps must be several texts, not one string; use split_steps")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise RowError("is empty: remove it", row=f"step {number}")
    prefixes = [question]
    for step in steps:
        prefixes.append(prefixes[-1] + separator + step)
    return [prefix + cue for prefix in prefixes]


def _curve(model: Any, batch: TokenBatch, width: int) -> EntropyCurve:
    found = span_entropy(model, batch)
    scored = (batch.scored_mask & batch.attention_mask).to(found.per_token.device)
    return EntropyCurve(found.entropy, found.per_token[scored].reshape(len(batch), width), found.log_likelihood)


def _kind(model: Any) -> Kind:
    """An entropy given a prefix is as exact as the distribution; of a bound on probabilities it is no bound."""
    return Kind.EXACT if model.kind is Kind.EXACT else Kind.SURROGATE


def _entropy(log_p: Tensor) -> Tensor:
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
        values.append(_entropy(torch.log_softmax(widened(logits), -1)))
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
        for i, value, term in zip(part, _entropy(log_p), own, strict=True):
            values[i], terms[i] = value, term
        begin += len(part)
    every = range(len(prefixes))
    return torch.stack([values[i] for i in every]), torch.stack([terms[i] for i in every])


def _require_fit(model: Any, rows: Sequence[Sequence[int]]) -> None:
    limit = getattr(model, "max_length", None)
    if limit is None or getattr(model, "layout", None) == "seq2seq":
        return
    longest = int(np.argmax([len(row) for row in rows]))
    if len(rows[longest]) > limit:
        raise RowError(
            f"the trace has {len(rows[longest])} tokens with its answer and the model's context is {limit}: cut it",
            row=f"after {longest} steps",
        )
