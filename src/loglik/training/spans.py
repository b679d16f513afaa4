"""Weights of tokens from marked spans of text, for objectives that weigh tokens (TAB-PO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loglik.errors import RowError

__all__ = ["SPAN_COLUMNS", "token_weights"]

SPAN_COLUMNS = {"chosen": "chosen_spans", "rejected": "rejected_spans", "completion": "completion_spans"}


def token_weights(pieces: Sequence[str], spans: Any, *, column: str, text: str) -> list[float]:
    """One weight per token: that of the heaviest span it overlaps, else 1.

    Args:
        pieces: text of each token of the completion; together they spell `text`. A token that only continues a
            character has an empty piece and counts where its character begins.
        spans: mappings with ``start`` and ``end`` (characters of the completion) and ``weight``.
        column: where the spans were read, for the refusal.
        text: the completion.

    Raises:
        RowError: for spans of another form, outside the text, or with a weight that is negative or not finite.
    """
    if not isinstance(spans, list) or not all(isinstance(span, Mapping) for span in spans):
        raise RowError(f"column {column!r} must be a list of spans with 'start', 'end' and 'weight'")
    read = [_span(span, column, text) for span in spans]
    weights, at = [], 0
    for piece in pieces:
        begin, end = at, at + max(len(piece), 1)
        over = [weight for low, high, weight in read if low < end and begin < high]
        weights.append(max(over, default=1.0))
        at += len(piece)
    return weights


def _span(span: Mapping[str, Any], column: str, text: str) -> tuple[int, int, float]:
    values = [span.get(name) for name in ("start", "end", "weight")]
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise RowError(f"column {column!r}: a span needs the numbers 'start', 'end' and 'weight', got {dict(span)!r}")
    start, end, weight = values
    assert start is not None
    assert end is not None
    assert weight is not None
    if not 0 <= start < end <= len(text) or start != int(start) or end != int(end):
        raise RowError(
            f"column {column!r}: the span from {start} to {end} is not inside a text of {len(text)} characters"
        )
    if not 0 <= weight < math.inf:
        raise RowError(f"column {column!r}: a weight must be finite and at least 0, got {weight}")
    return int(start), int(end), float(weight)
