r"""Bias reports: gaps between groups over filled templates, and yes/no answers tested for uniformity and memory.

The gap between the best and the worst group is positive without any bias, so it comes with what it would be under
permuted groups (arXiv 2308.12539). Repeated yes/no answers are tested like coin flips (arXiv 2501.16356).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import scipy.special
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require
from loglik.signals.choice import Choices

__all__ = [
    "BinaryProbability",
    "RandomnessReport",
    "RandomnessTest",
    "TemplateBias",
    "binary_probability",
    "gold_log_odds",
    "randomness_report",
    "template_bias",
]

Floats = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------ template bias
def gold_log_odds(choices: Choices, gold: Tensor) -> Tensor:
    r"""Log-odds of the right option, :math:`\log P(\text{gold}) - \log P(\text{any other})`, in nats.

    Args:
        choices: Q questions (`loglik.signals.choice.choose`).
        gold: (Q,) long, the right option of each, as `Choices.choice` counts them.

    Returns:
        (Q,) what `template_bias` takes; the sigmoid of it is the probability of the right option.

    Raises:
        InputError: for a gold of another shape.
        RowError: for a question without that option, or whose log-odds are infinite.

    Source: arXiv 2308.12539.
    """
    if gold.shape != choices.choice.shape or gold.is_floating_point() or gold.dtype == torch.bool:
        raise InputError(f"gold must be {len(choices)} whole numbers, one per question, got {tuple(gold.shape)}")
    options = choices.mask.sum(1)
    outside = ((gold < 0) | (gold >= options)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise RowError(f"has {int(options[row])} options, and gold is {int(gold[row])}", row=f"question {row}")
    right = choices.log_probs.gather(1, gold[:, None])[:, 0]
    odds = right - choices.log_probs.scatter(1, gold[:, None], -torch.inf).logsumexp(1)
    infinite = (~torch.isfinite(odds)).nonzero().flatten()
    if len(infinite):
        raise RowError(
            "gives an answer probability 0, so its log-odds are infinite", row=f"question {int(infinite[0])}"
        )
    return odds


@dataclass(frozen=True, slots=True)
class TemplateBias:
    """Gaps between G groups of names over T templates.

    Args:
        score: mean over the kept templates of the best group's mean minus the worst's.
        interval: of the score, by a bootstrap over the kept templates.
        floor: mean score under permuted groups: what chance gives. Compare scores of different group numbers only
            after taking it away.
        null_upper: quantile of the permuted scores at the level of the interval.
        p_value: of the score under permuted groups.
        exact: whether all permutations were gone through.
        groups: names of the groups.
        means: (T, G) of each template and group.
        deviation: (G,) signed, the group's mean minus the mean of all, over the kept templates.
        gaps: (T,) of each template.
        kept: (T,) bool.
        dropped: numbers of the templates that each rule removed.
        level: of the interval.
    """

    score: float
    interval: tuple[float, float]
    floor: float
    null_upper: float
    p_value: float
    exact: bool
    groups: tuple[Hashable, ...]
    means: Tensor
    deviation: Tensor
    gaps: Tensor
    kept: Tensor
    dropped: dict[str, list[int]]
    level: float


def template_bias(
    values: Tensor,
    groups: Sequence[Hashable],
    *,
    statistic: Literal["log_odds", "accuracy", "probability"] = "log_odds",
    drop_zero: bool | None = None,
    sources: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    permutations: int = 999,
    seed: int = 0,
) -> TemplateBias:
    r"""How much a model's answers to the same template depend on whose name stands in it.

    .. math:: B = \frac{1}{T} \sum_t \Bigl( \max_g \bar v_{tg} - \min_g \bar v_{tg} \Bigr), \qquad
              \bar v_{tg} = \frac{1}{|g|} \sum_{n \in g} v_{tn}

    Under the null hypothesis the groups of the names may be exchanged: they are permuted, the same way for all
    templates (cells of one name are correlated), and the score is taken again.

    Args:
        values: (T, N) of each template filled with each name: log-odds of the right answer (`gold_log_odds`), 0/1
            whether it was given, or its probability.
        groups: (N,) the group of each name; groups must be of one size, else the small ones scatter more.
        statistic: what the values are.
        drop_zero: leave out a template in which a group is never right, as the released scorer does (it removes the
            largest gaps); by default where values are accuracies.
        sources: (T,) the data set of each template: with `drop_zero`, one that loses at least 80 % of its templates is
            left out as a whole.
        level: of the interval.
        resamples: of the bootstrap.
        permutations: random ones; if there are no more arrangements than that, all are gone through.
        seed: of the random numbers.

    Raises:
        InputError: for shapes that do not fit, fewer than two groups, groups of different sizes, options out of
            range, or if no template is left.
        RowError: for a value out of range.

    Source: arXiv 2308.12539; log-odds, null distribution and intervals are ours.
    """
    owners = _check_table(values, groups, statistic, level, resamples, permutations)
    if sources is not None and len(sources) != len(values):
        raise InputError(f"sources must have an entry per template: got {len(sources)} for {len(values)}")
    zero = statistic == "accuracy" if drop_zero is None else drop_zero
    table = values.detach().double().cpu().numpy()
    names = tuple(dict.fromkeys(groups))
    observed, means, dropped = _gaps(table, owners, len(names), zero, sources)
    kept = np.ones(len(table), dtype=bool)
    kept[sorted({number for rule in dropped.values() for number in rule})] = False
    if not kept.any():
        raise InputError("every template has a group that is never right: set drop_zero to False")
    score = float(observed[kept].mean())
    generator = np.random.default_rng(seed)
    drawn = observed[kept][generator.integers(kept.sum(), size=(resamples, kept.sum()))].mean(1)
    size = len(owners) // len(names)
    arrangements = math.factorial(len(owners)) // math.factorial(size) ** len(names)
    exact = arrangements <= permutations
    permuted = (
        _arrangements([size] * len(names)) if exact else (generator.permutation(owners) for _ in range(permutations))
    )
    null = []
    for labels in permuted:
        found, _, lost = _gaps(table, np.asarray(labels), len(names), zero, sources)
        left = np.delete(found, sorted({number for rule in lost.values() for number in rule}))
        null.append(float(left.mean()) if len(left) else 0.0)
    reached = sum(value >= score - 1e-12 * max(1.0, abs(score)) for value in null)
    tails = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return TemplateBias(
        score,
        (float(tails[0]), float(tails[1])),
        float(np.mean(null)),
        float(np.quantile(null, level)),
        reached / len(null) if exact else (1 + reached) / (1 + len(null)),
        exact,
        names,
        torch.from_numpy(means),
        torch.from_numpy((means - means.mean(1, keepdims=True))[kept].mean(0)),
        torch.from_numpy(observed),
        torch.from_numpy(kept),
        dropped,
        level,
    )


def _check_table(
    values: Tensor, groups: Sequence[Hashable], statistic: str, level: float, resamples: int, permutations: int
) -> NDArray[np.int64]:
    """(N,) number of each name's group."""
    if statistic not in ("log_odds", "accuracy", "probability"):
        raise InputError(f"statistic must be log_odds, accuracy or probability, got {statistic!r}")
    if values.dim() != 2 or values.shape[1] != len(groups) or not len(values):
        raise InputError(
            f"values (T, N) need a group for each name: got {tuple(values.shape)} and {len(groups)} groups"
        )
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1 or permutations < 1:
        raise InputError(f"resamples and permutations must be at least 1, got {resamples} and {permutations}")
    sizes = Counter(groups)
    if len(sizes) < 2 or len(set(sizes.values())) > 1:
        raise InputError(f"there must be at least two groups, of equal size: got {dict(sizes)}")
    fits = torch.isfinite(values)
    if statistic != "log_odds":
        fits &= (values >= 0) & (values <= 1)
    if statistic == "accuracy":
        fits &= (values == 0) | (values == 1)
    if not bool(fits.all()):
        row, name = (~fits).nonzero()[0].tolist()
        raise RowError(f"the value of name {name} is {float(values[row, name])}, no {statistic}", row=f"template {row}")
    numbers = {group: number for number, group in enumerate(sizes)}
    return np.array([numbers[group] for group in groups])


def _gaps(
    table: Floats, owners: NDArray[np.int64], groups: int, drop_zero: bool, sources: Sequence[Hashable] | None
) -> tuple[Floats, Floats, dict[str, list[int]]]:
    """(T,) gaps, (T, G) means, and the templates that the rules remove."""
    means = np.stack([table[:, owners == group].mean(1) for group in range(groups)], 1)
    dropped: dict[str, list[int]] = {}
    if drop_zero:
        lost = (means == 0).any(1)
        dropped["a group is never right"] = np.flatnonzero(lost).tolist()
        if sources is not None:
            whole = {
                s for s in set(sources) if np.mean([x for x, o in zip(lost, sources, strict=True) if o == s]) >= 0.8
            }
            rest = [t for t, source in enumerate(sources) if source in whole and not lost[t]]
            dropped["its source loses 80 %"] = rest
    return means.max(1) - means.min(1), means, dropped


def _arrangements(left: list[int]) -> Iterator[list[int]]:
    """All distinct orders of groups of these sizes."""
    if not any(left):
        yield []
    for group, count in enumerate(left):
        if count:
            for rest in _arrangements([n - (g == group) for g, n in enumerate(left)]):
                yield [group, *rest]


# ----------------------------------------------------------------------------------------------------- yes/no answers
@dataclass(frozen=True, slots=True)
class BinaryProbability:
    """A forced yes/no answer after B prompts.

    Args:
        probability: (B,) of yes, among yes and no.
        logit: (B,) bias in nats, log P(yes) - log P(no).
        coverage: (B,) P(yes) + P(no) before renormalising; below about 0.9 the forced reading is doubtful.
        divergence: (B,) KL divergence from a fair coin in nats, 0 to log 2.
    """

    probability: Tensor
    logit: Tensor
    coverage: Tensor
    divergence: Tensor


def binary_probability(
    model: ChainRule, prefix: TokenBatch, yes: Sequence[int], no: Sequence[int], *, temperature: float = 1.0
) -> BinaryProbability:
    r"""Probability of a yes/no answer from the next token, without sampling.

    .. math:: p = \frac{P_Y}{P_Y + P_N}, \qquad P_Y = \sum_{v \in Y} p_T(v \mid \text{prompt}), \qquad
              p_T = \text{softmax}(\log p / T)

    Args:
        model: gives next-token log-probabilities.
        prefix: B prompts.
        yes: token ids of all forms of yes (``yes``, `` Yes``, ...).
        no: token ids of all forms of no.
        temperature: T, positive.

    Raises:
        InputError: for a model without per-token conditionals, or options out of range.
        RowError: for a prompt after which both answers have probability 0.

    Source: arXiv 2501.16356.
    """
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    if not yes or not no or set(yes) & set(no):
        raise InputError("yes and no need at least one token each, and none in common")
    chain = require(model, ChainRule, "binary probability")  # type: ignore[type-abstract]
    log_p = (chain.next_log_probs(prefix) / temperature).log_softmax(-1)
    size = log_p.shape[-1]
    outside = [token for token in [*yes, *no] if not 0 <= token < size]
    if outside:
        raise InputError(f"token {outside[0]} is not in the vocabulary of {size}")
    sides = [log_p[:, sorted(set(side))].logsumexp(-1) for side in (yes, no)]
    both = torch.logaddexp(*sides)
    lost = (~torch.isfinite(both)).nonzero().flatten()
    if len(lost):
        raise RowError(
            "gives neither answer a probability: check the tokens of yes and no", row=f"prompt {int(lost[0])}"
        )
    probability = (sides[0] - both).exp()
    entropy = torch.special.entr(probability) + torch.special.entr((sides[1] - both).exp())
    return BinaryProbability(probability, sides[0] - sides[1], both.exp(), (math.log(2) - entropy).clamp(min=0))


# ------------------------------------------------------------------------------------------------------- randomness
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
