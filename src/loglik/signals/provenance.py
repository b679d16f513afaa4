r"""Palimpsestic provenance: does a model, or its text, derive from a training run? Tests on the order of its data.

Alice shuffled her data before training. Whatever Bob made independently of her run is independent of that shuffle, so
that under the null hypothesis every order of her examples is as good as the true one. Bob's model remembers late
examples better than early ones only if it comes from Alice's run: the rank correlation of its log-likelihoods with her
order is evidence, and permuting the order gives the exact error rate, whatever the data and the models are.

`query_test` asks Bob's model; `partition_test` and `reshuffle_test` have his text alone. All p-values are one-sided.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood

__all__ = [
    "OrderTest",
    "ReshuffleTest",
    "partition_counts",
    "partition_test",
    "query_test",
    "reshuffle_test",
]

Method = Literal["auto", "exact", "monte_carlo", "asymptotic"]
Floats: TypeAlias = NDArray[np.float64]
Orders: TypeAlias = NDArray[np.int64]
_EXACT_ORDERS = 50_000  # orders up to which ``auto`` enumerates
_BLOCK = 1 << 22  # entries of permutations that exist at once
_TIE = 1e-10  # values nearer than this are one value that was rounded twice


@dataclass(frozen=True, slots=True)
class OrderTest:
    """A rank correlation with training order, and how likely chance is to give as much.

    Args:
        statistic: Spearman's correlation; positive if later data are more likely.
        p_value: one-sided, of the null hypothesis that nothing derives from this order.
        n: examples (or buckets) that were correlated.
        method: where the p-value comes from: all orders, random ones, or Student's t.
        orders: how many orders it was compared with; 0 for Student's t.
    """

    statistic: float
    p_value: float
    n: int
    method: Literal["exact", "monte_carlo", "asymptotic"]
    orders: int


@dataclass(frozen=True, slots=True)
class ReshuffleTest:
    """The likelihood of a text under the true order against that under fresh random orders.

    Args:
        statistic: standard deviations by which the true order's likelihood exceeds their mean.
        p_value: rank of the true order, exact; never below 1 / (K + 1).
        p_student: from Student's t with K - 1 degrees of freedom; exact for normal likelihoods.
        p_normal: normal tail of the statistic; far too small for small K.
        n: K, the random orders.
    """

    statistic: float
    p_value: float
    p_student: float
    p_normal: float
    n: int


def query_test(
    likelihood: LogLikelihood,
    order: Tensor | ArrayLike,
    *,
    reference: LogLikelihood | None = None,
    per: Literal["token", "sequence"] = "token",
    repeated: Literal["refuse", "average"] = "refuse",
    strata: Tensor | ArrayLike | None = None,
    method: Method = "auto",
    permutations: int = 9999,
    seed: int = 0,
) -> OrderTest:
    r"""The query setting: rank correlation of Bob's log-likelihoods of Alice's examples with her training order.

    .. math:: \varphi = \rho_\text{Spearman}\bigl(o_i,\; \ell_\beta(t_i) - \ell_0(t_i)\bigr)

    The reference removes how hard each example is and makes the test stronger. It must not depend on the order itself:
    a relative of Alice's model takes the strength away.

    Args:
        likelihood: (N,) of Alice's examples under Bob's model.
        order: (N,) when each example was trained on; larger is later. Rows may stand in any order.
        reference: (N,) of the same examples under another model; none by default.
        per: mean log-probability per token, or the sum.
        repeated: ``average`` gives examples of one step their mean rank. Equal numbers are refused by default, because
            they often are one example twice, of which only one index counts.
        strata: (N,) labels; orders are permuted within a stratum only, where the data were shuffled only there.
        method: ``exact`` compares with all orders, ``monte_carlo`` with random ones, ``auto`` does the former for up to
            50,000 orders; ``asymptotic`` is Student's t, for p-values that permutations cannot reach.
        permutations: m random orders: the p-value is (1 + those at or above) / (1 + m).
        seed: of the random orders.

    Raises:
        InputError: for unequal numbers of rows, repeated orders, constant likelihoods, or options out of range.
        RowError: for a likelihood or an order that is no finite number, or a row without scored tokens.

    Source: arXiv 2510.19796.
    """
    _known("per", per, ("token", "sequence"))
    scores = _per(likelihood, per, "the model")
    if reference is not None:
        if len(reference) != len(likelihood):
            raise InputError(f"{len(likelihood)} rows need as many of the reference, got {len(reference)}")
        scores = scores - _per(reference, per, "the reference")
    _known("repeated", repeated, ("refuse", "average"))
    when = _numbers(order, "training order", len(scores))
    distinct, counts = np.unique(when, return_counts=True)
    if repeated == "refuse" and len(distinct) < len(when):
        step = distinct[counts > 1][0]
        one, other = np.flatnonzero(when == step)[:2]
        raise InputError(
            f"row {one} and row {other} have the same training order {step:g}: keep one index per example, or set "
            "repeated to average if they were in one batch"
        )
    groups = np.zeros(len(scores), dtype=np.int64)
    if strata is not None:
        labels = _array(strata)
        if labels.shape != scores.shape:
            raise InputError(f"{len(scores)} examples need as many strata, got shape {labels.shape}")
        groups = np.unique(labels, return_inverse=True)[1]
    _varied(scores, "log-likelihoods")
    _varied(when, "training orders")
    # Doubled ranks are whole numbers: sums of products are exact, and equal correlations are equal.
    ranks, places = (2 * stats.rankdata(x) for x in (scores, when))
    statistic = float(stats.pearsonr(ranks, places).statistic)

    def products(orders: Orders) -> Floats:
        return np.asarray(ranks[orders] @ places, dtype=np.float64)

    return _permuted(statistic, products, groups, method, permutations, seed, len(scores))


def partition_counts(
    transcript: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    order: Tensor | ArrayLike | None = None,
    max_n: int = 8,
) -> Tensor:
    r"""The observational setting: how often each document of the transcript has the longest n-grams of Bob's texts.

    For each position of each text the longest n-gram (n up to `max_n`) that starts there and occurs in the transcript
    is taken, and every one of its occurrences in the transcript counts 1 for the document it stands in. N-grams do not
    cross the borders of documents or texts.

    Args:
        transcript: D documents of token ids in training order, one index per document.
        texts: Bob's texts in the same tokens.
        order: (D,) training order, to make sure that the documents stand in it.
        max_n: longest n-gram.

    Returns:
        (D,) counts, long.

    Raises:
        InputError: for no documents or texts, documents that do not stand in training order, or a max_n below 1.

    Source: arXiv 2510.19796.
    """
    if not len(transcript) or not any(map(len, texts)) or max_n < 1:
        raise InputError("partition counts need a transcript, texts with tokens and n-grams of at least 1 token")
    if order is not None:
        when = _numbers(order, "training order", len(transcript))
        back = np.flatnonzero(np.diff(when) <= 0)
        if len(back):
            row = int(back[0]) + 1
            where = f"row {row} (training order {when[row]:g}) stands behind one of {when[row - 1]:g}"
            raise InputError(f"{where}: sort the documents by training order, and keep each once")
    pieces = [np.asarray(piece, dtype=np.int64) for piece in (*transcript, *texts)]
    lengths = np.array([len(piece) for piece in pieces])
    owner = np.repeat(np.arange(len(pieces)), lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # tokens to the end of the own piece
    _, tokens = np.unique(np.concatenate(pieces), return_inverse=True)
    is_text = owner >= len(transcript)
    names = tokens.astype(np.int64)  # of the n-gram that starts here
    live = is_text.copy()  # text positions whose (n - 1)-gram occurs in the transcript
    counts = np.zeros(len(transcript))
    previous: tuple[Orders, NDArray[np.bool_]] | None = None
    for n in range(1, max_n + 2):
        matched = np.zeros_like(live)
        if n <= max_n:
            whole = left >= n
            if n > 1:
                last = np.minimum(np.arange(len(names)) + n - 1, len(names) - 1)
                names = np.unique(names * (tokens.max() + 1) + tokens[last], return_inverse=True)[1]
            known = np.zeros(int(names.max()) + 1, dtype=bool)
            known[names[whole & ~is_text]] = True
            matched = live & whole & known[names]
        if previous is not None:  # what was matched with one token less and is not any more had its longest match
            older, usable = previous
            ended = live & ~matched
            weight = np.bincount(older[ended], minlength=int(older.max()) + 1)
            counts += np.bincount(owner[usable], weights=weight[older[usable]], minlength=len(transcript))
        if not matched.any():
            break
        live, previous = matched, (names, (left >= n) & ~is_text)
    return torch.from_numpy(counts).round().long()


def partition_test(
    counts: Tensor | ArrayLike,
    *,
    buckets: int | None = None,
    method: Method = "auto",
    permutations: int = 9999,
    seed: int = 0,
) -> OrderTest:
    r"""Rank correlation of the buckets of Alice's data, by training order, with how much of Bob's text each explains.

    .. math:: \varphi = \rho_\text{Spearman}(b, \chi_b), \qquad b = 1, \dots, k

    Documents are permuted, not buckets, so that the p-value is exact however they are cut.

    Args:
        counts: (D,) per document in training order, from `partition_counts`, or any other evidence, such as Bob's
            log-likelihood under an n-gram model of each bucket.
        buckets: k buckets of consecutive documents, as even as can be; one per entry of `counts` by default.
        method: as in `query_test`.
        permutations: random orders.
        seed: of the random orders.

    Raises:
        InputError: for less than 3 buckets or more than documents, equal counts in all, or options out of range.
        RowError: for a count that is no finite number.

    Source: arXiv 2510.19796.
    """
    values = _numbers(counts, "count")
    size = len(values) if buckets is None else buckets
    if not 3 <= size <= len(values):
        raise InputError(f"buckets must be from 3 to the {len(values)} entries of counts, got {size}")
    begins = np.arange(size) * len(values) // size
    places = np.arange(size, dtype=np.float64)

    def correlations(orders: Orders) -> Floats:
        ranks = stats.rankdata(np.add.reduceat(values[orders], begins, axis=1), axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        centred = places - places.mean()
        norm = np.sqrt((ranks**2).sum(1) * (centred**2).sum())
        # Where all buckets are alike there is no trend.
        return np.asarray(np.divide(ranks @ centred, norm, out=np.zeros(len(ranks)), where=norm > 0))

    _varied(np.add.reduceat(values, begins), "counts of the buckets")
    statistic = float(correlations(np.arange(len(values))[None])[0])
    groups = np.zeros(len(values), dtype=np.int64)
    return _permuted(statistic, correlations, groups, method, permutations, seed, size)


def reshuffle_test(true: LogLikelihood, shuffled: Sequence[LogLikelihood]) -> ReshuffleTest:
    r"""The observational setting with retraining: Bob's texts under the true order of the last data and random ones.

    .. math:: z = \frac{L_0 - \overline{L}}{s}, \quad p = \frac{1 + \#\{k : L_k \ge L_0\}}{K + 1}, \quad
              t = z \sqrt{\frac{K - 1}{K + 1}}

    where :math:`L_k` is the mean over texts of their log-likelihood under the run that saw the last data in the k-th
    order, and :math:`\overline L`, s are mean and population deviation of :math:`L_1, \dots, L_K`.

    Args:
        true: (B,) of Bob's texts (the completions' tokens) under the run in Alice's true order.
        shuffled: K of the same texts, under runs from the same checkpoint in fresh random orders.

    Raises:
        InputError: for less than 2 random orders, texts that differ between runs, or runs that are all alike.
        RowError: for a log-likelihood that is not finite.

    Source: arXiv 2510.19796.
    """
    if isinstance(shuffled, LogLikelihood) or len(shuffled) < 2:
        raise InputError("the reshuffle test needs two or more runs in random orders to compare with: give a list")
    for number, run in enumerate(shuffled):
        if len(run) != len(true) or not torch.equal(run.num_units.cpu(), true.num_units.cpu()):
            raise InputError(f"run {number} scored other texts than the true order's: score the same tokens under all")
    means = [float(_finite(run, f"run {number}").mean()) for number, run in enumerate(shuffled)]
    true_mean = float(_finite(true, "the true order").mean())
    spread = float(np.std(means))
    if spread <= 1e-12 * max(1.0, abs(true_mean)):
        raise InputError("all random orders give the same likelihood: train further, or on more of the data")
    k = len(means)
    z = (true_mean - float(np.mean(means))) / spread
    rank = (1 + sum(mean >= true_mean for mean in means)) / (k + 1)
    student = float(stats.t.sf(z * math.sqrt((k - 1) / (k + 1)), k - 1))
    return ReshuffleTest(z, rank, student, float(stats.norm.sf(z)), k)


def _permuted(
    rho: float, value_of: Callable[[Orders], Floats], groups: Orders, method: Method, count: int, seed: int, n: int
) -> OrderTest:
    """The p-value of a statistic that `value_of` rows of orders (m, N) gives; the identity's is the observed one."""
    _known("method", method, ("auto", "exact", "monte_carlo", "asymptotic"))
    if n < 3:
        raise InputError(f"a rank correlation needs at least 3 examples, got {n}")
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    total = math.prod(math.factorial(len(rows)) for rows in members) if len(groups) < 1000 else math.inf
    if method == "asymptotic":
        if len(members) > 1:
            raise InputError("Student's t knows no strata: set method to monte_carlo")
        t = rho * math.sqrt((n - 2) / max(1 - rho**2, 1e-300))
        # No order is rarer than one of n!, whatever the tail says.
        return OrderTest(rho, max(float(stats.t.sf(t, n - 2)), math.exp(-math.lgamma(n + 1))), n, method, 0)
    observed = value_of(np.arange(len(groups))[None])[0]
    bar = observed - _TIE * max(1.0, abs(observed))
    if method == "exact" or (method == "auto" and total <= _EXACT_ORDERS):
        if total > 100 * _EXACT_ORDERS:
            raise InputError(f"{len(groups)} examples have too many orders to compare with all: use monte_carlo")
        blocks, base = _all_orders(members), 0
    else:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"permutations must be a whole number, at least 1, got {count}")
        blocks, base = _random_orders(members, len(groups), count, np.random.default_rng(seed)), 1
    hits = tried = base
    for block in blocks:
        hits += int((value_of(block) >= bar).sum())
        tried += len(block)
    return OrderTest(rho, hits / tried, n, "monte_carlo" if base else "exact", tried - base)


def _all_orders(members: list[Orders]) -> Iterator[Orders]:
    """Every order that permutes within the groups, in blocks (m, N)."""
    size = sum(map(len, members))
    where = np.concatenate(members)
    every = itertools.product(*(itertools.permutations(rows) for rows in members))
    while chunk := list(itertools.islice(every, max(1, _BLOCK // size))):
        block = np.empty((len(chunk), size), dtype=np.int64)
        block[:, where] = [list(itertools.chain(*parts)) for parts in chunk]
        yield block


def _random_orders(members: list[Orders], size: int, count: int, random: np.random.Generator) -> Iterator[Orders]:
    step = max(1, _BLOCK // size)
    for begin in range(0, count, step):
        block = np.empty((min(step, count - begin), size), dtype=np.int64)
        for rows in members:
            block[:, rows] = random.permuted(np.broadcast_to(rows, (len(block), len(rows))), axis=1)
        yield block


def _per(likelihood: LogLikelihood, per: str, whose: str) -> Floats:
    value = _finite(likelihood, whose)
    empty = (likelihood.num_units <= 0).nonzero().flatten()
    if per == "token" and len(empty):
        raise RowError(f"has no scored {likelihood.unit} under {whose}: leave it out", row=f"row {int(empty[0])}")
    return value / likelihood.num_units.cpu().numpy() if per == "token" else value


def _finite(likelihood: LogLikelihood, whose: str) -> Floats:
    value: Floats = likelihood.value.detach().cpu().double().numpy()
    bad = np.flatnonzero(~np.isfinite(value))
    if len(bad):
        raise RowError(f"its log-likelihood under {whose} is {value[bad[0]]}: leave it out", row=f"row {bad[0]}")
    return value


def _array(values: Tensor | ArrayLike) -> NDArray[Any]:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _numbers(values: Tensor | ArrayLike, name: str, count: int | None = None) -> Floats:
    given = _array(values)
    if given.ndim != 1 or given.dtype.kind not in "iuf":
        raise InputError(f"each example needs one {name}: give numbers (N,), got shape {given.shape} of {given.dtype}")
    if count is not None and len(given) != count:
        raise InputError(f"{count} examples need as many {name}s, got {len(given)}")
    out = given.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise RowError(f"its {name} is {out[bad[0]]}: leave it out", row=f"row {int(bad[0])}")
    return out


def _varied(values: Floats, name: str) -> None:
    if bool((values[1:] == values[:-1]).all()):
        raise InputError(f"all {name} are equal, so that no correlation exists: give examples that differ")


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
