"""Gaps between groups of names over filled templates.

The gap between the best and the worst group is positive without any bias, so it comes with what it would be under
permuted groups (arXiv 2308.12539).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.signals.choice import Choices

__all__ = [
    "TemplateBias",
    "TemplateConsistency",
    "TemplateTable",
    "gold_log_odds",
    "template_bias",
    "template_consistency",
    "template_table",
]

Floats = NDArray[np.float64]


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
class TemplateTable:
    """Filled templates in rows and columns.

    Args:
        index: (T, N) long, the row that has each template filled with each name: `values[index]` is what
            `template_bias` takes.
        templates: T, in the order they came.
        names: N, in the order they came.
        groups: (N,) the group of each name.
    """

    index: Tensor
    templates: tuple[Hashable, ...]
    names: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]


def template_table(
    templates: Sequence[Hashable], names: Sequence[Hashable], groups: Sequence[Hashable]
) -> TemplateTable:
    """Arrange rows, one for each template filled with each name, as the table that `template_bias` takes.

    Args:
        templates: (R,) of each row.
        names: (R,) of each row, that which stands in the template.
        groups: (R,) of each row's name.

    Raises:
        InputError: for no rows, or columns of unequal lengths.
        RowError: for a name of two groups, a template filled twice with one name, or one that lacks a name.

    Source: arXiv 2308.12539: the same names fill every template, so that groups differ in names alone.
    """
    if not len(templates) or len({len(templates), len(names), len(groups)}) > 1:
        raise InputError(
            f"a row needs a template, a name and a group: got {len(templates)}, {len(names)} and {len(groups)} of them"
        )
    owner: dict[Hashable, Hashable] = {}
    cells: dict[tuple[Hashable, Hashable], int] = {}
    for row, (template, name, group) in enumerate(zip(templates, names, groups, strict=True)):
        if owner.setdefault(name, group) != group:
            raise RowError(
                f"the name {name} is of group {group} here and of {owner[name]} above: call it apart", row=f"row {row}"
            )
        if (template, name) in cells:
            raise RowError(f"the template {template} is filled twice with the name {name}", row=f"row {row}")
        cells[template, name] = row
    kept = tuple(dict.fromkeys(templates))
    for template in kept:
        for name in owner:
            if (template, name) not in cells:
                first = next(row for row, found in enumerate(templates) if found == template)
                raise RowError(
                    f"the template {template} is not filled with the name {name}: fill all with the same names",
                    row=f"row {first}",
                )
    index = torch.tensor([[cells[template, name] for name in owner] for template in kept])
    return TemplateTable(index, kept, tuple(owner), tuple(owner.values()))


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
        raise InputError("every template has a group that is never right: do not drop them (drop_zero)")
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


@dataclass(frozen=True, slots=True)
class TemplateConsistency:
    """Whether answers to a template stay the same when another name stands in it.

    Args:
        agreement: (T,) probability that two different names get the same answer.
        within: (T,) the same for two names of one group; None if no group has two names.
        between: (T,) the same for names of two groups; below `within` where answers go by group.
        unanimous: share of templates in which all names get the same answer.
    """

    agreement: Tensor
    within: Tensor | None
    between: Tensor
    unanimous: float


def template_consistency(answers: Tensor, groups: Sequence[Hashable]) -> TemplateConsistency:
    """How often the answer to a template does not depend on the name in it, within groups and between them.

    Args:
        answers: (T, N) whole numbers, the option chosen for each template and name.
        groups: (N,) the group of each name.

    Raises:
        InputError: for shapes that do not fit, or fewer than two groups.

    Source: arXiv 2308.12539 has the counterfactual names; the pairwise shares are ours.
    """
    if answers.dim() != 2 or answers.shape[1] != len(groups) or not len(answers) or answers.is_floating_point():
        raise InputError(
            f"answers (T, N) must be whole numbers, with a group for each name: got {tuple(answers.shape)} and "
            f"{len(groups)} groups"
        )
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise InputError(f"there must be at least two groups: got {dict(sizes)}")
    table = answers.detach().cpu()
    owners = [torch.tensor([name == group for name in groups]) for group in sizes]
    every, kin = _same_pairs(table), sum((_same_pairs(table[:, owner]) for owner in owners), torch.zeros(len(table)))
    pairs, kin_pairs = math.comb(len(groups), 2), sum(math.comb(size, 2) for size in sizes.values())
    return TemplateConsistency(
        every / pairs,
        kin / kin_pairs if kin_pairs else None,
        (every - kin) / (pairs - kin_pairs),
        float((table == table[:, :1]).all(1).double().mean()),
    )


def _same_pairs(answers: Tensor) -> Tensor:
    """(T,) pairs of columns with the same answer."""
    counts = torch.stack([(answers == option).sum(1) for option in set(answers.flatten().tolist())]).double()
    return (counts * (counts - 1) / 2).sum(0)


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
