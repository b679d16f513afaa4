"""`score`: labelled log-likelihoods of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.encode import BosPolicy
from loglik.models.protocol import TextModel
from loglik.scoring.covers import Tokenisations
from loglik.scoring.engine import ScoreBoundary, ScoreOptions, Scorer
from loglik.scoring.pending import ByteScores, TokenScores
from loglik.scoring.windows import OverflowPolicy

__all__ = ["score"]


def score(
    model: TextModel,
    texts_or_pairs: str | Sequence[str] | Sequence[tuple[str, str]],
    *,
    unit: Unit | str = Unit.TOKEN,
    boundary: ScoreBoundary = "joint",
    bos: BosPolicy = "auto",
    overflow: OverflowPolicy = "error",
    stride: int | None = None,
    max_batch_tokens: int | None = None,
    tokenisations: Tokenisations = "canonical",
) -> LogLikelihood:
    r"""Labelled log-likelihoods of texts, or of completions given prompts, in nats.

    Args:
        model: from `loglik.load`.
        texts_or_pairs: texts, or (prompt, completion) pairs of which the completion is scored.
        unit: ``token`` counts the scored tokens and gives `per_unit` terms (B, T), aligned with the tokens of prompt
            and completion, where the model has them (a sampled bound has a standard error instead); ``byte`` counts
            the UTF-8 bytes of the scored text, so that `bits_per_byte` needs nothing more.
        boundary: ``joint`` or ``separate`` tokenisation of prompt and completion, or ``exact``: the probability of the
            completion's bytes given the prompt's bytes, over all tokenisations of their boundary; counted per byte.
        bos: when BOS is prepended.
        overflow: ``error``, or ``window`` to score text beyond the context in windows.
        stride: scored tokens per window; half the context by default.
        max_batch_tokens: tokens per forward pass; values do not depend on it.
        tokenisations: what ``exact`` is a probability of: the model restricted to ``canonical`` tokenisations (EXACT),
            or the sum over ``all`` (a LOWER_BOUND; given a prompt, a SURROGATE).

    Returns:
        A `LogLikelihood` of B rows, float64. Its kind is the model's; where a scored text holds tokens unknown to
        the vocabulary, an EXACT model's value is an UPPER_BOUND, because the unknown token stands for other texts too.

    Raises:
        RowError: a row that cannot be scored, named by its number from 0.
        InputError: for options out of range, or a model without a tokenizer.

    Example:
        >>> import loglik
        >>> model = loglik.load("tiny")
        >>> ll = loglik.score(model, [("def add(a, b):", " return a + b"), ("def add(a, b):", " return banana")])
        >>> ll.kind
        <Kind.EXACT: 'exact'>
        >>> bool(ll.value[0] > ll.value[1])
        True
    """
    options = ScoreOptions(boundary, bos, overflow, stride, max_batch_tokens, tokenisations=tokenisations)
    results: list[TokenScores | ByteScores] = []
    for index, result in enumerate(Scorer(model, options).score_pairs(_pairs(texts_or_pairs))):
        if isinstance(result, RowError):
            raise result.at(f"row {index}")
        results.append(result)
    rows = [row for row in results if isinstance(row, TokenScores)]
    if len(rows) < len(results):
        return _assemble_bytes([row for row in results if isinstance(row, ByteScores)])
    return _assemble(rows, model.kind, Unit(unit))


def _pairs(items: str | Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rows: Sequence[object] = [items] if isinstance(items, str) else items
    pairs = []
    for index, row in enumerate(rows):
        if isinstance(row, str):
            pairs.append(("", row))
        elif isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(part, str) for part in row):
            pairs.append((row[0], row[1]))
        else:
            shown = repr(row)[:80]
            raise RowError(f"must be a text or a (prompt, completion) pair of texts, got {shown}", row=f"row {index}")
    if not pairs:
        raise InputError("there is nothing to score: give at least one text or (prompt, completion) pair")
    return pairs


def _assemble_bytes(results: Sequence[ByteScores]) -> LogLikelihood:
    """Rows of bytes; of several kinds the whole promises the least."""
    kinds = {row.kind for row in results}
    value = torch.tensor([row.log_prob for row in results], dtype=torch.float64)
    count = torch.tensor([row.num_bytes for row in results])
    return LogLikelihood(value, kinds.pop() if len(kinds) == 1 else Kind.SURROGATE, Unit.BYTE, count)


def _assemble(results: Sequence[TokenScores], kind: Kind, unit: Unit) -> LogLikelihood:
    if unit not in (Unit.TOKEN, Unit.BYTE):
        raise InputError(f"text is counted per token or per byte, not per {unit}")
    if any(result.totals for result in results):
        return _assemble_totals(results, kind, unit)
    width = max(len(result.terms) for result in results)
    per_unit = torch.zeros(len(results), width, dtype=torch.float64)
    mask = torch.zeros(len(results), width, dtype=torch.bool)
    for i, result in enumerate(results):
        per_unit[i, : len(result.terms)] = torch.tensor(result.terms, dtype=torch.float64)
        mask[i, : len(result.scored)] = torch.tensor(result.scored)
    if any(result.kind is not kind for result in results):
        kind = Kind.UPPER_BOUND
    likelihood = LogLikelihood.from_per_unit(per_unit, mask, kind=kind)
    if unit is Unit.BYTE:
        return likelihood.per(unit, torch.tensor([result.text.num_bytes for result in results]))
    return likelihood


def _assemble_totals(results: Sequence[TokenScores], kind: Kind, unit: Unit) -> LogLikelihood:
    """Rows of a model without terms per token."""
    errors = [result.stderr for result in results]
    sampled = any(error is not None for error in errors)
    counts = [result.num_bytes if unit is Unit.BYTE else result.num_tokens for result in results]
    return LogLikelihood(
        torch.tensor([result.log_prob for result in results], dtype=torch.float64),
        kind,
        unit,
        torch.tensor(counts),
        stderr=torch.tensor([error or 0.0 for error in errors], dtype=torch.float64) if sampled else None,
    )
