"""Repeated yes/no answers, tested like coin flips for uniformity and memory (arXiv 2501.16356)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.special
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError

__all__ = [
    "RandomnessReport",
    "RandomnessTest",
    "RunLengths",
    "randomness_power",
    "randomness_report",
    "run_lengths",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RandomnessTest:
    """One test: `p_value` by itself, `adjusted` by Holm over the battery; `undefined` says why there is no evidence."""

    name: str
    statistic: float
    p_value: float
    adjusted: float
    method: str
    undefined: str = ""


@dataclass(frozen=True, slots=True)
class RandomnessReport:
    """Repeated yes/no answers, as M lists.

    Args:
        tests: uniformity, independence, memory of two answers, negative recency.
        yes_rate: over all answers.
        transitions: (2, 2) counts, previous answer by next one, inside lists only.
        switch_rate: share of answers that differ from the one before.
        expected_switch_rate: 2 r (1 - r), what independent answers of this yes rate give.
        runs_z: Wald-Wolfowitz statistic, pooled over lists; positive: too many switches. 0 where undefined.
        switch_after_run: by length of the run so far, (share of switches, how often); a rising share is the human
            bias.
        position_rates: yes rate at each position of the lists.
        num_lists: M.
        num_answers: of all lists.
    """

    tests: tuple[RandomnessTest, ...]
    yes_rate: float
    transitions: Tensor
    switch_rate: float
    expected_switch_rate: float
    runs_z: float
    switch_after_run: dict[int, tuple[float, int]]
    position_rates: tuple[float, ...]
    num_lists: int
    num_answers: int

    def __getitem__(self, name: str) -> RandomnessTest:
        return next(test for test in self.tests if test.name == name)


def randomness_report(
    answers: Sequence[Sequence[int]] | Tensor, *, skip: int = 0, permutations: int = 1999, seed: int = 0
) -> RandomnessReport:
    r"""Test repeated yes/no answers for uniformity, independence and negative recency.

    - uniformity: exact binomial test of the yes rate against 1/2;
    - independence: :math:`G = 2 \sum_{ab} C_{ab} \log \frac{C_{ab} C}{C_a C_b}` of transitions, chi-square with 1
      degree of freedom, or permutations inside lists where an expected count is below 5;
    - memory of two answers: the same for order 2 against order 1, chi-square with 2;
    - negative recency: exact one-sided runs test, too many switches given how often each list says yes.

    Args:
        answers: M lists of 0 and 1 (1 is yes), or one; transitions are counted inside lists only. Independent calls
            make one list whose order means nothing.
        skip: first answers of each list to leave out: they are often far from the rest.
        permutations: for small counts.
        seed: of the permutations.

    Returns:
        The battery. A test that the answers cannot feed (all of them equal) has p = 1 and says why.

    Raises:
        InputError: for no lists, or options out of range.
        RowError: for an answer that is neither 0 nor 1, or a list of fewer than two answers after `skip`.

    Source: arXiv 2501.16356 (the tests are the standard ones; the paper's own definitions are not stated).
    """
    if skip < 0 or permutations < 1:
        raise InputError(f"skip must be at least 0 and permutations at least 1, got {skip} and {permutations}")
    lists = _answer_lists(answers, skip)
    every = np.concatenate(lists)
    pairs = np.concatenate([row[:-1] * 2 + row[1:] for row in lists])
    triples = np.concatenate([row[:-2] * 4 + row[1:-1] * 2 + row[2:] for row in lists])
    counts = np.bincount(pairs, minlength=4).reshape(2, 2)
    thirds = np.bincount(triples, minlength=8).reshape(2, 2, 2)
    rate = float(every.mean())
    switches, chances = int(counts[0, 1] + counts[1, 0]), np.ones(1)
    for row in lists:
        chances = np.convolve(chances, _switch_chances(int(row.sum()), int(len(row) - row.sum())))
    places = np.arange(len(chances))
    mean = float(places @ chances)
    spread = math.sqrt(max(0.0, float((places - mean) ** 2 @ chances)))
    constant = "" if 0 < rate < 1 else "all answers are the same"
    fixed = constant or ("" if spread > 1e-9 else "no list leaves the number of switches open")
    g, degrees = _g_test(counts)
    memory = [_g_test(thirds[:, middle]) for middle in (0, 1)]
    g2, degrees2 = sum(found for found, _ in memory), sum(df for _, df in memory)
    small = degrees > 0 and float(scipy.stats.contingency.expected_freq(counts).min()) < 5
    binomial = scipy.stats.binomtest(int(every.sum()), len(every))
    rows = [
        ("uniformity", rate, float(binomial.pvalue), "exact", ""),
        (
            "independence",
            g,
            _permuted_p(lists, g, permutations, seed) if small else float(scipy.stats.chi2.sf(g, 1)),
            "permutation" if small else "chi-square",
            "" if degrees else constant or "one answer is never followed by another",
        ),
        (
            "memory of two answers",
            g2,
            float(scipy.stats.chi2.sf(g2, degrees2)) if degrees2 else 1.0,
            "chi-square",
            "" if degrees2 else constant or "there are too few different triples",
        ),
        ("negative recency", switches / len(pairs), min(1.0, float(chances[switches:].sum())), "exact", fixed),
    ]
    rows = [(n, s, 1.0 if why else p, m, why) for n, s, p, m, why in rows]
    adjusted = _holm([row[2] for row in rows])
    length = max(len(row) for row in lists)
    return RandomnessReport(
        tuple(RandomnessTest(n, s, p, a, m, why) for (n, s, p, m, why), a in zip(rows, adjusted, strict=True)),
        rate,
        torch.from_numpy(counts),
        switches / len(pairs),
        2 * rate * (1 - rate),
        0.0 if fixed else (switches - mean) / spread,
        _after_runs(lists),
        tuple(float(np.mean([row[t] for row in lists if len(row) > t])) for t in range(length)),
        len(lists),
        len(every),
    )


@dataclass(frozen=True, slots=True)
class RunLengths:
    """Runs of equal answers by their length.

    Args:
        lengths: (L,) long, 1, 2, ...
        observed: (L,) long, how many runs have each length.
        expected: (L,) how many there are on average over all orders of the same answers inside each list.
    """

    lengths: Tensor
    observed: Tensor
    expected: Tensor


def run_lengths(answers: Sequence[Sequence[int]] | Tensor, *, skip: int = 0) -> RunLengths:
    r"""Lengths of runs against what independent answers of the same numbers give.

    Of a list with a answers of one sort and b of the other in random order, the expected number of runs of length k of
    the first sort is exactly

    .. math:: (b + 1) \binom{a - k + b - 1}{b - 1} \Big/ \binom{a + b}{a}

    Args:
        answers: as `randomness_report`.
        skip: first answers of each list to leave out.

    Raises:
        InputError, RowError: as `randomness_report`.

    Source: arXiv 2501.16356; the expectation is the standard one.
    """
    if skip < 0:
        raise InputError(f"skip must be at least 0, got {skip}")
    lists = _answer_lists(answers, skip)
    longest = max(len(row) for row in lists)
    observed, expected = np.zeros(longest, dtype=np.int64), np.zeros(longest)
    for row in lists:
        edges = np.flatnonzero(np.diff(row, prepend=1 - row[0], append=1 - row[-1]))
        np.add.at(observed, np.diff(edges) - 1, 1)
        ones = int(row.sum())
        for a, b in ((ones, len(row) - ones), (len(row) - ones, ones)):
            if not b:
                expected[a - 1] += 1
                continue
            total = math.comb(a + b, a)
            for k in range(1, a + 1):
                expected[k - 1] += (b + 1) * math.comb(a - k + b - 1, b - 1) / total
    return RunLengths(torch.arange(1, longest + 1), torch.from_numpy(observed), torch.from_numpy(expected))


def randomness_power(
    lengths: Sequence[int], switch_rate: float = 0.6, *, level: float = 0.05, repeats: int = 200, seed: int = 0
) -> dict[str, float]:
    """How often each test would find answers that switch too often, or too rarely.

    Even answers, each different from the one before with probability `switch_rate`, are simulated in lists of these
    lengths; a test finds them where its p-value, by itself, is at most `level`.

    Args:
        lengths: of the lists, each at least 2.
        switch_rate: 1/2 is independence, about 0.6 is what people do.
        level: of the tests.
        repeats: simulations.
        seed: of the simulations.

    Returns:
        The share of simulations by test.

    Raises:
        InputError: for options out of range.

    Source: arXiv 2501.16356.
    """
    if not len(lengths) or min(lengths) < 2 or repeats < 1:
        raise InputError("power needs at least one list, of two answers or more, and at least one repeat")
    if not 0 <= switch_rate <= 1 or not 0 < level < 1:
        raise InputError(f"switch_rate and level must lie between 0 and 1, got {switch_rate} and {level}")
    generator = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for repeat in range(repeats):
        lists = []
        for length in lengths:
            steps = generator.random(length) < switch_rate
            steps[0] = generator.random() < 0.5
            lists.append((np.cumsum(steps) % 2).tolist())
        report = randomness_report(lists, permutations=199, seed=repeat)
        found.update({test.name: int(test.p_value <= level) for test in report.tests})
    return {name: count / repeats for name, count in found.items()}


def _answer_lists(answers: Sequence[Sequence[int]] | Tensor, skip: int) -> list[NDArray[np.int64]]:
    given = answers.tolist() if isinstance(answers, Tensor) else list(answers)
    if not given:
        raise InputError("there are no answers: give at least one list of 0 and 1")
    rows = [given] if not isinstance(given[0], Sequence | Tensor | np.ndarray) else given
    lists = []
    for number, row in enumerate(rows):
        values = np.asarray(row)
        if values.ndim != 1 or not np.isin(values, (0, 1)).all():
            raise RowError("answers must be 0 or 1: parse them, and count refusals apart", row=f"list {number}")
        if len(values) - skip < 2:
            raise RowError(
                f"has {len(values)} answers, too few with skip={skip}: two must be left", row=f"list {number}"
            )
        lists.append(values[skip:].astype(np.int64))
    return lists


def _switch_chances(ones: int, zeros: int) -> Floats:
    """Probabilities of 0, 1, ... switches in a random order of so many ones and zeros."""
    if not ones or not zeros:
        return np.ones(1)
    total = math.comb(ones + zeros, ones)
    chances = []
    for runs in range(1, 2 * min(ones, zeros) + 2):
        half, odd = divmod(runs, 2)
        ways = 2 * math.comb(ones - 1, half - 1) * math.comb(zeros - 1, half - 1) if half and not odd else 0
        if half and odd:
            ways = math.comb(ones - 1, half) * math.comb(zeros - 1, half - 1)
            ways += math.comb(ones - 1, half - 1) * math.comb(zeros - 1, half)
        chances.append(ways / total)
    return np.array(chances)


def _g_test(counts: NDArray[np.int64]) -> tuple[float, int]:
    """G and its degrees of freedom, 0 where rows or columns are missing."""
    if (counts.sum(0) == 0).any() or (counts.sum(1) == 0).any():
        return 0.0, 0
    found = scipy.stats.chi2_contingency(counts, correction=False, lambda_="log-likelihood")
    return max(0.0, float(found.statistic)), int(found.dof)


def _permuted_p(lists: list[NDArray[np.int64]], observed: float, permutations: int, seed: int) -> float:
    """Share of orders inside lists whose G is as large."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((permutations, 4))
    for row in lists:
        drawn = generator.permuted(np.tile(row, (permutations, 1)), axis=1)
        pairs = drawn[:, :-1] * 2 + drawn[:, 1:]
        counts += np.stack([(pairs == pair).sum(1) for pair in range(4)], 1)
    table = counts.reshape(-1, 2, 2)
    parts = [table.reshape(-1, 4), -table.sum(1), -table.sum(2), table.sum((1, 2))[:, None]]
    found = 2 * sum((np.sign(part) * scipy.special.xlogy(abs(part), abs(part))).sum(1) for part in parts)
    return float(1 + (found >= observed - 1e-9).sum()) / (1 + permutations)


def _after_runs(lists: list[NDArray[np.int64]]) -> dict[int, tuple[float, int]]:
    """By length of the run so far: how often the next answer switches, and how often there was one."""
    seen: Counter[int] = Counter()
    switched: Counter[int] = Counter()
    for row in lists:
        run = 1
        for before, after in pairwise(row.tolist()):
            seen[run] += 1
            switched[run] += before != after
            run = run + 1 if before == after else 1
    return {run: (switched[run] / count, count) for run, count in sorted(seen.items())}


def _holm(p_values: Sequence[float]) -> list[float]:
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate([(len(order) - rank) * p_values[i] for rank, i in enumerate(order)])
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted.tolist()
