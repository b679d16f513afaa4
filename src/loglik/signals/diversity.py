r"""Diversity of generated texts: distinct n-grams, adjusted for how many one expects to repeat."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from loglik.errors import InputError

__all__ = ["distinct_n_grams", "expectation_adjusted_distinct", "mean_diversity"]


def distinct_n_grams(texts: Sequence[Sequence[Hashable]], n: int) -> tuple[int, int]:
    """Distinct and all n-grams of some texts.

    Args:
        texts: token sequences; those shorter than n have none.
        n: length of the n-grams.

    Raises:
        InputError: for n below 1.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    seen: set[tuple[Hashable, ...]] = set()
    count = 0
    for text in texts:
        for begin in range(len(text) - n + 1):
            seen.add(tuple(text[begin : begin + n]))
            count += 1
    return len(seen), count


def expectation_adjusted_distinct(texts: Sequence[Sequence[Hashable]], n: int, *, vocabulary_size: int) -> float:
    r"""EAD: distinct n-grams over the number expected of as many uniform draws; does not punish longer texts.

    .. math:: \text{EAD} = \frac{\text{distinct}}{V \left[1 - \left(\frac{V - 1}{V}\right)^C\right]}

    C is the number of n-grams; for C much below V it is the plain ratio distinct / C.

    Args:
        texts: token sequences.
        n: length of the n-grams.
        vocabulary_size: V, the same for every n (as in the published score).

    Raises:
        InputError: for texts without n-grams, or a vocabulary of none.

    Source: arXiv 2202.13587; arXiv 2410.11677 watches it beside the likelihood.
    """
    if vocabulary_size < 1:
        raise InputError(f"vocabulary_size must be at least 1, got {vocabulary_size}")
    distinct, count = distinct_n_grams(texts, n)
    if not count:
        raise InputError(f"there is no {n}-gram: every text is shorter than {n} tokens")
    if vocabulary_size == 1:
        return float(distinct)
    return distinct / (-vocabulary_size * math.expm1(count * math.log1p(-1 / vocabulary_size)))


def mean_diversity(texts: Sequence[Sequence[Hashable]], *, vocabulary_size: int, longest: int = 5) -> float:
    """Mean EAD over n-grams of 1 to `longest` tokens: cross-input diversity where texts answer different prompts.

    Raises:
        InputError: if no text has `longest` tokens.
    """
    if longest < 1:
        raise InputError(f"longest must be at least 1, got {longest}")
    parts = [expectation_adjusted_distinct(texts, n, vocabulary_size=vocabulary_size) for n in range(1, longest + 1)]
    return math.fsum(parts) / len(parts)
