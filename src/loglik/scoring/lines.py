"""Lines of a scored text: where the bits went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ScoredLine", "scored_lines"]


@dataclass(frozen=True, slots=True)
class ScoredLine:
    """One line of a text: its `number` from 1, its `text`, and the `bits` of the tokens that begin in it."""

    number: int
    text: str
    bits: float


def scored_lines(tokens: Sequence[str], log_probs: Sequence[float | None]) -> Iterator[ScoredLine]:
    """Lines of the text that `tokens` spell; a token counts for the line in which its first visible character stands.

    Args:
        tokens: text of each token.
        log_probs: nats of each token, None where not scored (counted as 0 bits).
    """
    number, parts, bits = 1, [""], 0.0
    for token, log_prob in zip(tokens, log_probs, strict=True):
        cost = -log_prob / math.log(2) if log_prob is not None else 0.0
        pieces = token.split("\n")
        visible = next((i for i, piece in enumerate(pieces) if piece.strip()), 0)
        for i, piece in enumerate(pieces):
            if i > 0:
                yield ScoredLine(number, "".join(parts), bits)
                number, parts, bits = number + 1, [], 0.0
            parts.append(piece)
            bits += cost if i == visible else 0.0
    if "".join(parts):
        yield ScoredLine(number, "".join(parts), bits)
