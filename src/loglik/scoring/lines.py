"""Lines of a scored text: where the bits went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ScoredLine", "scored_lines"]


@dataclass(slots=True)
class ScoredLine:
    """One line of a text and the tokens that start on it.

    Args:
        number: from 1.
        text: without its line break.
        bits: of the scored tokens that start on the line.
        num_tokens: how many they are.
        num_bytes: UTF-8 bytes of those tokens.
    """

    number: int
    text: str = ""
    bits: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def _count(self, token: str, log_prob: float | None) -> None:
        if log_prob is None:
            return
        self.bits -= log_prob / math.log(2)
        self.num_tokens += 1
        self.num_bytes += len(token.encode("utf-8", "surrogatepass"))


def scored_lines(tokens: Sequence[str], log_probs: Sequence[float | None]) -> Iterator[ScoredLine]:
    """Lines of the text that `tokens` spell; a token counts for the line that it starts on.

    Args:
        tokens: text of each token.
        log_probs: nats of each token, None where not scored.
    """
    line = ScoredLine(1)
    for token, log_prob in zip(tokens, log_probs, strict=True):
        line._count(token, log_prob)
        first, *more = token.split("\n")
        line.text += first
        for piece in more:
            yield line
            line = ScoredLine(line.number + 1, piece)
    if line.text or line.num_tokens:
        yield line
