r"""What each step of a reasoning trace does to a model's uncertainty about the answer.

The answer is teacher-forced after every prefix of the trace. Where the entropy of its tokens falls from step to step,
the trace leads somewhere; traces of wrong answers stay flat or rise (arXiv 2508.20395). This is an oracle: from its
second token on the true answer is conditioned on. `open_entropy_curve` needs no answer, and
`loglik.signals.option_curve` needs options instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.encode import TextEncoder
from loglik.models.protocol import ChainRule, require
from loglik.signals.drawing import first_line, greedy_texts, prompt_tokens
from loglik.signals.entropy_curve import EntropyCurve
from loglik.signals.span_entropy import entropy_kind, span_entropy, token_entropy

__all__ = [
    "answer_entropy_curve",
    "entropy_curve",
    "open_entropy_curve",
    "split_steps",
    "step_tokens",
    "trace_answers",
    "trace_contexts",
]


def answer_entropy_curve(
    model: Any,
    question: str,
    steps: Sequence[str],
    answer: str,
    *,
    separator: str = "\n",
    cue: str = "\nAnswer:",
    batch_size: int = 16,
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
        batch_size: prefixes of the trace per forward pass; the numbers do not depend on it.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, a batch size below 1, or an answer whose
            tokens change with what stands before it.
        RowError: for a step that is empty, or a text that cannot be encoded or does not fit into the context.

    Source: arXiv 2508.20395.
    """
    contexts = trace_contexts(question, steps, separator, cue)
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
    return _curve(model, rows, starts, batch_size)


def entropy_curve(
    model: Any, contexts: Sequence[Sequence[int]], answer: Sequence[int], *, batch_size: int = 16
) -> EntropyCurve:
    """`answer_entropy_curve` for tokens.

    Args:
        model: anything with next-token distributions.
        contexts: K + 1 rows of tokens, what stands before the answer after 0, 1, ..., K steps.
        answer: T tokens.
        batch_size: contexts per forward pass; the numbers do not depend on it.

    Raises:
        InputError: for no contexts, an empty answer, a batch size below 1, or a model without next-token
            distributions.
        RowError: for an empty context.

    Source: arXiv 2508.20395.
    """
    if not len(contexts) or not len(answer):
        raise InputError(f"a curve needs a context and an answer: got {len(contexts)} contexts, {len(answer)} tokens")
    rows = [[*context, *answer] for context in contexts]
    _require_fit(model, rows)
    return _curve(model, rows, [len(context) for context in contexts], batch_size)


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
    batch = prompt_tokens(model, trace_contexts(question, steps, separator, cue))
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    _require_fit(model, rows)
    values = torch.cat(
        [
            token_entropy(chain.next_log_probs(TokenBatch.from_lists([row], starts=[int(start)])))
            for row, start in zip(rows, batch.completion_starts(), strict=True)
        ]
    )
    if not bool(torch.isfinite(values).all()):
        raise RowError(
            "the model gives no distribution", row=f"after {int((~torch.isfinite(values)).nonzero()[0])} steps"
        )
    return EntropyCurve(Measurement(values, entropy_kind(model), "open_entropy"), values[:, None])


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


def step_tokens(model: Any, question: str, steps: Sequence[str], *, separator: str = "\n") -> list[int]:
    """How many tokens each step adds to the trace, its separator included: what a stop saves.

    Args:
        model: with the tokenizer that counts.
        question: the text that the trace starts from.
        steps: K steps in order; may be empty.
        separator: stands before each step.

    Raises:
        InputError: for a model without a tokenizer.
        RowError: for a step that is empty, or a text that cannot be encoded.
    """
    counts = prompt_tokens(model, trace_contexts(question, steps, separator, "")).attention_mask.sum(1)
    return [int(count) for count in counts.diff()]


def trace_answers(
    model: Any,
    question: str,
    steps: Sequence[str],
    *,
    separator: str = "\n",
    cue: str = "\nAnswer:",
    max_tokens: int = 16,
) -> tuple[str, ...]:
    """The model's own answer after 0, 1, ..., K steps: the first line of its greedy continuation of the cue.

    Args:
        model: a text model with next-token distributions.
        question: the text that the trace starts from.
        steps: K steps in order; may be empty.
        separator: stands before each step.
        cue: stands before the answer.
        max_tokens: tokens of an answer at most.

    Returns:
        K + 1 texts, without white space around them; compare them with `loglik.signals.equivalence.meanings`.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, or max_tokens below 1.
        RowError: for a step that is empty, a context that does not fit, or a model that gives NaN.
    """
    found = greedy_texts(model, trace_contexts(question, steps, separator, cue), max_tokens=max_tokens)
    return tuple(first_line(text) for text in found)


def trace_contexts(question: str, steps: Sequence[str], separator: str, cue: str) -> list[str]:
    """What stands before the answer after 0, 1, ..., K steps: K + 1 texts.

    Raises:
        InputError: for one text instead of several.
        RowError: for a step that is empty.
    """
    if isinstance(steps, str):
        raise InputError("steps must be several texts, not one string; use split_steps")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise RowError("is empty: remove it", row=f"step {number}")
    prefixes = [question]
    for step in steps:
        prefixes.append(prefixes[-1] + separator + step)
    return [prefix + cue for prefix in prefixes]


def _curve(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], batch_size: int) -> EntropyCurve:
    """Of rows that end with the same answer."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    width = len(rows[0]) - starts[0]
    means, terms, likelihoods = [], [], []
    for begin in range(0, len(rows), batch_size):
        part = slice(begin, begin + batch_size)
        batch = TokenBatch.from_lists(rows[part], starts=starts[part])
        try:
            found = span_entropy(model, batch)
        except RowError as error:  # rows of a chunk count from its first
            number = int((error.row or "row 0").split()[1])
            raise error.at(f"row {begin + number}") from None
        scored = (batch.scored_mask & batch.attention_mask).to(found.per_token.device)
        per_unit = found.log_likelihood.per_unit
        assert per_unit is not None
        means.append(found.entropy.value)
        terms.append(found.per_token[scored].reshape(len(batch), width))
        likelihoods.append(per_unit[scored].reshape(len(batch), width))
    answer = torch.cat(likelihoods)
    everything = torch.ones(answer.shape, dtype=torch.bool, device=answer.device)
    return EntropyCurve(
        Measurement(torch.cat(means), entropy_kind(model), "answer_entropy"),
        torch.cat(terms),
        LogLikelihood.from_per_unit(answer, everything, kind=model.kind, unit=model.unit),
    )


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
