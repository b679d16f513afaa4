r"""Interpolated modified Kneser-Ney estimates (Chen & Goodman 1999, eq. 26; conventions of Heafield et al. 2013).

For a context :math:`h` of :math:`k-1` tokens, :math:`h'` without its first token, and adjusted counts :math:`a`:

.. math::
    p_k(w \mid h) = \frac{a(hw) - D_k(a(hw))}{\sum_v a(hv)} + \gamma_k(h)\, p_{k-1}(w \mid h'), \qquad
    \gamma_k(h) = \frac{\sum_v D_k(a(hv))}{\sum_v a(hv)}, \qquad p_0(w) = \frac{1}{V}

A context without followers in the training data leaves :math:`p_k = p_{k-1}`. The adjusted count of an n-gram of the
highest order is its count; of a shorter one it is the number of distinct tokens seen before it, where every occurrence
at the start of a document counts as a token of its own. (For n-grams that start with BOS this is their plain count.)
The first token of a document, BOS, is context only: it is never counted as predicted.

The n-grams of order k are sorted integer keys ``index of the context * V + token``, where the context is an n-gram of
order k - 1: exact, without hashing, and found by binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FALLBACK_DISCOUNTS", "KneserNey", "NGramCounts", "count_ngrams", "estimate_discounts"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True, slots=True, eq=False)
class NGramCounts:
    """Adjusted counts of the n-grams of orders 1 to N over a vocabulary of V tokens.

    Args:
        unigrams: (V,) adjusted counts of single tokens, 0 where never predicted.
        keys: for each order from 2 the sorted keys (M_k,) ``context * V + token``; the context is a token for order 2
            and else the position of its n-gram in the keys of the order below.
        counts: the adjusted counts (M_k,) that belong to `keys`, at least 1.

    Raises:
        ValueError: for tables that do not fit together.
    """

    unigrams: IntArray
    keys: tuple[IntArray, ...]
    counts: tuple[IntArray, ...]

    def __post_init__(self) -> None:
        vocab_size = contexts = len(self.unigrams)
        if bool((self.unigrams < 0).any()) or not int(self.unigrams.sum()):
            raise ValueError("the unigram counts must not be negative and not all zero")
        for order, (keys, counts) in enumerate(zip(self.keys, self.counts, strict=True), start=2):
            if keys.shape != counts.shape or bool((counts < 1).any()):
                raise ValueError(f"every {order}-gram needs one positive count")
            if bool((np.diff(keys) <= 0).any()) or (len(keys) and not 0 <= keys[0] <= keys[-1] < contexts * vocab_size):
                raise ValueError(f"the keys of the {order}-grams must rise from 0 to below {contexts * vocab_size}")
            contexts = len(keys)

    @property
    def order(self) -> int:
        """Tokens of the longest n-grams, N."""
        return 1 + len(self.keys)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.unigrams)

    def of_order(self, order: int) -> IntArray:
        """The adjusted counts of one order."""
        return self.unigrams if order == 1 else self.counts[order - 2]


def count_ngrams(documents: Sequence[NDArray[np.integer]], *, vocab_size: int, order: int) -> NGramCounts:
    """Adjusted counts of all n-grams up to `order`; none crosses a document, and first tokens are context only.

    Args:
        documents: token ids (T_i,) of each document, from its BOS to its EOS.
        vocab_size: V; every id is below it.
        order: N, at least 1.
    """
    ids = np.concatenate(documents).astype(np.int64)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    depth = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # position within the document
    entry = ids  # where the n-gram that ends here stands in the table of its order
    raw = np.bincount(ids[depth >= 1], minlength=vocab_size)
    tables: list[IntArray] = [raw]
    keys: list[IntArray] = []
    for n in range(2, order + 1):
        ends = np.flatnonzero(depth >= n - 1)
        found, inverse, raw = np.unique(
            entry[ends - 1] * vocab_size + ids[ends], return_inverse=True, return_counts=True
        )
        suffix = np.empty(len(found), dtype=np.int64)
        suffix[inverse] = entry[ends]
        # Now that the longer n-grams are known, the shorter ones count what stood before them. A single token at the
        # start of a document is not a prediction.
        below = np.bincount(suffix, minlength=len(tables[-1]))
        if n > 2:
            below += np.bincount(entry[depth == n - 2], minlength=len(below))
        tables[-1] = below
        tables.append(raw)
        keys.append(found)
        entry = np.full(len(ids), -1, dtype=np.int64)
        entry[ends] = inverse
    return NGramCounts(tables[0], tuple(keys), tuple(tables[1:]))


def estimate_discounts(counts: IntArray) -> tuple[float, float, float]:
    r"""The discounts :math:`D_1, D_2, D_{3+}` of one order from how many n-grams have count 1, 2, 3 and 4.

    .. math:: D_j = j - (j+1)\, \frac{n_1}{n_1 + 2 n_2}\, \frac{n_{j+1}}{n_j}

    Where this is undefined (no n-gram of count 1, 2 or 3: tiny data, or single tokens of a small vocabulary) or not
    in (0, j], the order takes the fixed values (0.5, 1, 1.5), which are the fall-back of KenLM.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).tolist()
    if not (n[1] and n[2] and n[3]):
        return FALLBACK_DISCOUNTS
    # One division of integers: a discount that is exactly 0 is seen as such.
    scale = n[1] + 2 * n[2]
    one, two, three = ((j * scale * n[j] - (j + 1) * n[1] * n[j + 1]) / (scale * n[j]) for j in (1, 2, 3))
    valid = 0 < one <= 1 and 0 < two <= 2 and 0 < three <= 3
    return (one, two, three) if valid else FALLBACK_DISCOUNTS


class KneserNey:
    """The smoothed conditional distributions of one `NGramCounts`; all probabilities are positive, float64.

    Args:
        counts: the adjusted counts.
        discounts: for each order the three discounts, each D_j in (0, j]; estimated if not given.

    Raises:
        ValueError: for discounts out of range, or tables that do not belong together.
    """

    def __init__(self, counts: NGramCounts, discounts: Sequence[Sequence[float]] | None = None) -> None:
        self.counts = counts
        self.order = counts.order
        self.vocab_size = counts.vocab_size
        if discounts is None:
            discounts = [estimate_discounts(counts.of_order(k)) for k in range(1, self.order + 1)]
        self.discounts = [tuple(float(d) for d in triple) for triple in discounts]
        if len(self.discounts) != self.order or not all(
            len(triple) == 3 and all(0 < d <= j for j, d in enumerate(triple, start=1)) for triple in self.discounts
        ):
            raise ValueError(f"give {self.order} times three discounts D_j, each above 0 and at most j")
        held = self._held_back(1)
        total = float(counts.unigrams.sum())
        # By order: p(w | h) of every n-gram; by context its weight of the order below and its highest p. The last
        # element of each answers the index -1, "not in the table".
        self._probs = [(counts.unigrams - held) / total + held.sum() / total / self.vocab_size]
        self._weights: list[FloatArray] = []
        self._best: list[FloatArray] = []
        suffix = np.zeros(self.vocab_size, dtype=np.int64)  # where each n-gram without its first token stands
        best = self._probs[0].max(keepdims=True)
        for n in range(2, self.order + 1):
            best = best[suffix]  # of the order below, for the contexts of this order
            suffix, probs, weights = self._interpolate(n, suffix)
            best *= weights
            # The highest p(w | h) is that of a follower of h, or the highest of the order below times its weight.
            context = counts.keys[n - 2] // self.vocab_size
            if len(context):
                begins = np.flatnonzero(np.diff(context, prepend=-1))
                best[context[begins]] = np.maximum(best[context[begins]], np.maximum.reduceat(probs, begins))
            self._probs.append(np.append(probs, np.nan))
            self._weights.append(np.append(weights, 1.0))
            self._best.append(np.append(best, np.nan))

    def score(self, ids: IntArray) -> tuple[FloatArray, FloatArray]:
        """Probabilities of tokens given those before them in their row, at most order - 1 of them.

        Args:
            ids: (B, T) token ids below V.

        Returns:
            (B, T) the probability of each token (of a row's first one: without context), and (B, T) the highest
            probability of any token in its place. A token is a first choice exactly if both are equal.
        """
        probs = self._probs[0][ids]
        best = np.full(ids.shape, self._probs[0].max())
        entry = ids
        for n in range(2, self.order + 1):
            context = _shift(entry)
            entry = self._find(n, context, ids)
            probs = np.where(entry >= 0, self._probs[n - 1][entry], self._weights[n - 2][context] * probs)
            best = np.where(context >= 0, self._best[n - 2][context], best)
        return probs, best

    def next_probs(self, context: IntArray) -> FloatArray:
        """(B, V) distributions of the next token.

        Args:
            context: (B, T) the last tokens of each row, aligned right, -1 before the row's first token; only the last
                order - 1 columns count.
        """
        rows = np.arange(len(context))
        out = np.tile(self._probs[0], (len(context), 1))
        entry = context
        for n in range(2, self.order + 1):
            last = entry[:, -1]
            keys = self.counts.keys[n - 2]
            # The followers of a context are neighbours in the table; there are none for -1.
            begin = np.searchsorted(keys, last * self.vocab_size)
            count = np.searchsorted(keys, (last + 1) * self.vocab_size) - begin
            out *= self._weights[n - 2][last][:, None]
            at = np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count)
            out[np.repeat(rows, count), keys[at] % self.vocab_size] = self._probs[n - 1][at]
            entry = self._find(n, _shift(entry), context)
        return out

    def _interpolate(self, n: int, suffix_below: IntArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Suffix and p(w | h) of every n-gram of order `n`, and the weight of the order below for every context."""
        context, token = np.divmod(self.counts.keys[n - 2], self.vocab_size)
        suffix = token if n == 2 else self._find(n - 1, suffix_below[context], token)
        if bool((suffix < 0).any()):
            raise ValueError(f"a {n}-gram ends in {n - 1} tokens that are not in their table")
        contexts = len(self.counts.of_order(n - 1))
        counts, held = self.counts.of_order(n), self._held_back(n)
        totals = np.bincount(context, weights=counts, minlength=contexts)
        weights = np.ones(contexts)  # stays 1 for a context without followers
        np.divide(np.bincount(context, weights=held, minlength=contexts), totals, out=weights, where=totals > 0)
        probs = (counts - held) / totals[context] + weights[context] * self._probs[n - 2][suffix]
        return suffix, probs, weights

    def _held_back(self, n: int) -> FloatArray:
        """What the discounts take off every count of order `n`."""
        by_count = np.array([0.0, *self.discounts[n - 1]])
        held: FloatArray = by_count[np.minimum(self.counts.of_order(n), 3)]
        return held

    def _find(self, n: int, context: IntArray, token: IntArray) -> IntArray:
        """Where the n-grams of order `n` stand in their table; -1 for those that are not in it."""
        keys = self.counts.keys[n - 2]
        if not len(keys):
            return np.full(token.shape, -1, dtype=np.int64)
        wanted = context * self.vocab_size + token  # negative, and so never found, for a context of -1
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, at, -1)


def _shift(entry: IntArray) -> IntArray:
    """(B, T) the column to the left of each, -1 for the first."""
    out = np.full_like(entry, -1)
    out[:, 1:] = entry[:, :-1]
    return out
