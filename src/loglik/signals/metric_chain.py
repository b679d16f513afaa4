r"""From log-likelihoods to accuracy, link by link, and how well the score of each link follows compute.

.. math:: \log p^\text{vocab} \to p^\text{vocab} \to p^\text{choices} \to \text{Brier} \to \text{accuracy}

The first two look at the right option alone, which gains probability with compute almost item by item. From the third
on the wrong options count too: their mass grows as well, and the share that the right one keeps no longer follows
compute. A mean over items hides this; `chain_correlations` looks at each item by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import energy_distance, rankdata
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.signals.choice import Choices, Normalise, choose
from loglik.signals.detection import as_numbers

__all__ = [
    "LINKS",
    "ChainLink",
    "Correlation",
    "MetricChain",
    "ScoreCompute",
    "chain_correlations",
    "chain_links",
    "mass_trend",
    "metric_chain",
    "score_compute_correlation",
]

Correlation = Literal["pearson", "spearman", "kendall"]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LINKS = ("log_p_vocab", "p_vocab", "p_choices", "brier", "accuracy")


@dataclass(frozen=True, slots=True)
class MetricChain:
    """Scores of one model on Q questions; in all of them more is better.

    Args:
        log_p_vocab: (Q,) log-probability of the right option, nats.
        p_vocab: (Q,) its probability; 0 where it underflows.
        p_choices: (Q,) its share of the mass on the options.
        brier: (Q,) minus the squared error of the shares, in [-2, 0].
        accuracy: (Q,) 1 where the right option scores best (of equal scores the first counts), else 0.
        log_p_wrong: (Q,) log of the mass on all wrong options together, nats: what the third link brings in.
        question: (Q,) numbers of the questions, ascending.
    """

    log_p_vocab: Measurement
    p_vocab: Measurement
    p_choices: Measurement
    brier: Measurement
    accuracy: Measurement
    log_p_wrong: Measurement
    question: Tensor

    def __iter__(self) -> Iterator[Measurement]:
        """The five scores, in the order of `LINKS`."""
        return (getattr(self, name) for name in LINKS)

    def means(self) -> dict[str, float]:
        """Each score's mean over the questions: what leaderboards show."""
        return {score.name: float(score.value.mean()) for score in self}


def metric_chain(
    likelihood: LogLikelihood,
    question: Tensor | Sequence[int],
    correct: Tensor | Sequence[int],
    *,
    normalise: Normalise = "sum",
    lengths: Tensor | None = None,
) -> MetricChain:
    r"""The five scores of multiple-choice questions, from the log-likelihoods of their options.

    .. math:: L_c, \qquad e^{L_c}, \qquad \frac{e^{L_c}}{\sum_k e^{L_k}}, \qquad
              -\sum_k (p^\text{choices}_k - 1[k = c])^2, \qquad 1[c = \arg\max_k L_k]

    Only the first two are functions of the right option. Above 1/2 it wins over options that exclude it; below, nothing
    is decided.

    Args:
        likelihood: (N,) of all options of all questions, such as `OptionScores.likelihood`.
        question: (N,) the question each option belongs to, in any order.
        correct: (Q,) place of the right option among those of its question, in the order of their rows, for the
            questions in ascending order.
        normalise: what the shares and the choice are made of: sums, or means per token, byte or character
            (``acc_norm``). The first two scores are those of the whole option in any case.
        lengths: (N,) of each option, where bytes or characters are counted.

    Returns:
        float64 scores, labelled with what they promise.

    Raises:
        InputError: for an unnormalised likelihood, labels out of range or of another number, or what `choose` refuses.
        RowError: for a log-likelihood above 0 (a density), or what `choose` refuses.

    Source: arXiv 2406.04391.
    """
    if likelihood.kind is Kind.UNNORMALIZED:
        raise InputError(
            "p(vocab) needs normalised log-likelihoods, and these have an unknown constant: use choose() for the shares"
        )
    above = (likelihood.value > 1e-6).nonzero().flatten()  # rounding may take a log-probability a little above 0
    if len(above):
        value = f"{float(likelihood.value[above[0]]):.4g}"
        reason = f"the log-likelihood is {value}, above 0 and so no log-probability: score options of a discrete model"
        raise RowError(reason, row=f"row {int(above[0])}")
    wide = replace(
        likelihood.detach(), value=likelihood.value.detach().double(), per_unit=None, mask=None, samples=None
    )
    sums = choose(wide, question)
    used = sums if normalise == "sum" else choose(wide, question, normalise=normalise, lengths=lengths)
    right = _right_options(correct, sums)
    log_p = sums.scores.gather(1, right[:, None])[:, 0]
    wrong = sums.scores.scatter(1, right[:, None], -torch.inf).logsumexp(1)
    shares = used.log_probs.exp()
    error = shares - torch.zeros_like(shares).scatter(1, right[:, None], 1.0)
    # exp is convex: what a sampled lower bound gives is no bound any more.
    is_lower_draw = likelihood.kind is Kind.LOWER_BOUND and likelihood.stderr is not None
    kinds = (likelihood.kind, Kind.SURROGATE if is_lower_draw else likelihood.kind, *[used.kind] * 3)
    values = (
        log_p,
        log_p.exp(),
        shares.gather(1, right[:, None])[:, 0],
        0.0 - error.square().sum(1),  # 0 minus the sum, because minus 0 is -0
        (used.choice == right).double(),
    )
    scores = {name: Measurement(value, kind, name) for name, value, kind in zip(LINKS, values, kinds, strict=True)}
    return MetricChain(**scores, log_p_wrong=Measurement(wrong, likelihood.kind, "log_p_wrong"), question=sums.question)


@dataclass(frozen=True, slots=True)
class ScoreCompute:
    """Correlations of a score with compute over models, one per item.

    Args:
        values: (K,) correlations of the items whose score varies over the models, in the order of the items.
        kept: (Q,) bool, the items that have one.
        method: ``pearson``, ``spearman`` or ``kendall``.
    """

    values: Floats
    kept: Bools
    method: Correlation

    @property
    def constant(self) -> float:
        """Share of the items whose score is the same for all models, so that they have no correlation."""
        return float(1 - self.kept.mean())

    @property
    def mean(self) -> float:
        """Mean over the items that have one."""
        return float(self.values.mean())

    @property
    def median(self) -> float:
        """Median over the items that have one."""
        return float(np.median(self.values))

    @property
    def area(self) -> float:
        r"""Under the survival function, :math:`\int_{-1}^1 P(r > t)\, dt = 1 + \bar r`."""
        return 1 + self.mean

    @property
    def wasserstein(self) -> float:
        r"""Minus the smaller Wasserstein distance to all ones or all minus ones, :math:`-\min_\pm E|r \mp 1|`."""
        return -min(float(np.abs(self.values - end).mean()) for end in (1.0, -1.0))

    @property
    def energy(self) -> float:
        """Minus the smaller energy distance to all ones or all minus ones (as `scipy.stats.energy_distance`)."""
        return -min(float(energy_distance(self.values, [end])) for end in (1.0, -1.0))

    def survival(self, at: Tensor | ArrayLike) -> Floats:
        """Share of the items whose correlation is above each value of `at`, whatever its shape."""
        thresholds = as_numbers(at, "at").astype(np.float64)
        below = np.searchsorted(np.sort(self.values), thresholds, side="right")
        return np.asarray(1 - below / len(self.values))


def score_compute_correlation(
    scores: Tensor | ArrayLike, compute: Tensor | ArrayLike, *, method: Correlation = "spearman"
) -> ScoreCompute:
    r"""Correlation over models of each item's score with log compute.

    .. math:: r_i = \operatorname{Corr}_m(\log C_m, s_i(m))

    Spearman and Kendall (tau-b) use average ranks for ties and do not see the logarithm. Checkpoints of one run are not
    independent models: the number of models supports no p-value.

    Args:
        scores: (M, Q) of Q items under M models; minus infinity is allowed where only ranks count.
        compute: (M,) FLOPs of each model (about 6 times parameters times tokens), positive.
        method: of the correlation.

    Returns:
        The correlations of the items whose score varies; those of constant scores do not exist and are left out, with
        their share in `constant`.

    Raises:
        InputError: for fewer than three models, compute that is not positive or all the same, scores that are NaN (or
            infinite, for Pearson), an unknown method, or if no item's score varies.

    Source: arXiv 2406.04391; equal to `scipy.stats`.
    """
    if method not in ("pearson", "spearman", "kendall"):
        raise InputError(f"method must be one of pearson, spearman, kendall, got {method!r}")
    table, spent = _checked_scores(scores, compute, finite=method == "pearson")
    kept = (table != table[:1]).any(0)
    if not kept.any():
        raise InputError("no item's score varies over the models, so that no correlation exists: add other models")
    table = table[:, kept]
    if method == "kendall":
        return ScoreCompute(_kendall(spent, table), kept, method)
    x, y = (np.log(spent), table) if method == "pearson" else (rankdata(spent), rankdata(table, axis=0))
    return ScoreCompute(_pearson(x, y), kept, method)


def chain_correlations(
    chains: Sequence[MetricChain], compute: Tensor | ArrayLike, *, method: Correlation = "spearman"
) -> dict[str, ScoreCompute]:
    """`score_compute_correlation` of each of the five scores, by name in the order of `LINKS`.

    Args:
        chains: the M models' scores on the same questions.
        compute: (M,) FLOPs of each.
        method: as there.

    Raises:
        InputError: for models with other questions, or what `score_compute_correlation` refuses, with the score's name.
    """
    _require_same_questions(chains)
    found = {}
    for name in LINKS:
        table = torch.stack([getattr(chain, name).value for chain in chains])
        try:
            found[name] = score_compute_correlation(table, compute, method=method)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return found


@dataclass(frozen=True, slots=True)
class ChainLink:
    """What one step of the chain does to the correlations, over the items that have both.

    Args:
        before: name of the score before it.
        after: name of the score after it.
        drop: mean of the first correlation minus the second.
        stderr: standard error of `drop` over items (which share the models: it says nothing about other models).
        lower: share of items whose correlation falls by more than rounding.
        items: how many have both.
        lost: share of all items that had a correlation before and have none after, since their score became constant.
    """

    before: str
    after: str
    drop: float
    stderr: float
    lower: float
    items: int
    lost: float


def chain_links(correlations: Mapping[str, ScoreCompute]) -> tuple[ChainLink, ...]:
    """What breaks at each link: the fall of the correlation with compute, paired over items.

    Args:
        correlations: from `chain_correlations`; any scores of the same items, in their order.

    Raises:
        InputError: for fewer than two scores, other items or methods, or a link without an item that has both.

    Source: arXiv 2406.04391.
    """
    names = list(correlations)
    if len(names) < 2:
        raise InputError(f"a link joins two scores, got {len(names)}")
    found = []
    for before, after in pairwise(names):
        a, b = correlations[before], correlations[after]
        if a.method != b.method or a.kept.shape != b.kept.shape:
            raise InputError(f"{before} and {after} were not measured on the same items by the same method")
        both = a.kept & b.kept
        count = int(both.sum())
        if not count:
            raise InputError(f"no item has a correlation of {before} and of {after}, so that nothing can be compared")
        first, second = a.values[both[a.kept]], b.values[both[b.kept]]
        fall = first - second
        spread = float(fall.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
        shares = float((fall > 1e-12).mean()), float((a.kept & ~b.kept).mean())
        found.append(ChainLink(before, after, float(fall.mean()), spread, shares[0], count, shares[1]))
    return tuple(found)


def mass_trend(chains: Sequence[MetricChain], compute: Tensor | ArrayLike) -> tuple[Floats, Floats, Floats]:
    r"""Why shares do not follow compute: the wrong options gain mass as well.

    Least squares per item of :math:`\log p_c` and :math:`\log \sum_{k \ne c} p_k` on :math:`\log C`; the share of the
    right option is a logistic function of their difference.

    Args:
        chains: the M models' scores on the same questions.
        compute: (M,) FLOPs of each, positive.

    Returns:
        (Q,) slopes of the right option's log mass (exponents of power laws), (Q,) those of the wrong ones', and (Q,)
        covariances of the two over models, nats squared: positive where they rise together.

    Raises:
        InputError: as `chain_correlations`, or for a mass of 0, whose logarithm has no slope.

    Source: arXiv 2406.04391.
    """
    _require_same_questions(chains)
    tables = [torch.stack([getattr(c, name).value for c in chains]) for name in ("log_p_vocab", "log_p_wrong")]
    (right, spent), (wrong, _) = (_checked_scores(table, compute, finite=True) for table in tables)
    x = np.log(spent)
    x = x - x.mean()
    own, other = right - right.mean(0), wrong - wrong.mean(0)
    slopes = [(x @ table) / (x @ x) for table in (own, other)]
    return slopes[0], slopes[1], np.asarray((own * other).sum(0) / (len(x) - 1))


def _right_options(correct: Tensor | Sequence[int], found: Choices) -> Tensor:
    """(Q,) long, on the options' device."""
    right = torch.as_tensor(correct, device=found.scores.device)
    if right.shape != found.question.shape or right.is_floating_point() or right.dtype == torch.bool:
        raise InputError(
            f"correct must be {len(found)} whole numbers, one per question, got {right.dtype} {tuple(right.shape)}"
        )
    last = found.mask.sum(1) - 1
    outside = ((right < 0) | (right > last)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        which = f"question {int(found.question[row])}"
        raise InputError(f"correct must be from 0 to {int(last[row])} for {which}, got {int(right[row])}")
    return right.long()


def _require_same_questions(chains: Sequence[MetricChain]) -> None:
    if not chains:
        raise InputError("there are no models: give the chain of each")
    for number, chain in enumerate(chains):
        if not torch.equal(chain.question, chains[0].question):
            raise InputError(f"model {number} has other questions than model 0: score the same ones with all models")


def _checked_scores(scores: Tensor | ArrayLike, compute: Tensor | ArrayLike, *, finite: bool) -> tuple[Floats, Floats]:
    """Scores (M, Q) and compute (M,), float64."""
    table = as_numbers(scores, "scores").astype(np.float64)
    spent = as_numbers(compute, "compute").astype(np.float64)
    if table.ndim != 2 or not table.size or spent.shape != table.shape[:1]:
        raise InputError(f"scores (M, Q) need compute (M,), got {table.shape} and {spent.shape}")
    if len(spent) < 3:
        raise InputError(f"a correlation needs at least three models, got {len(spent)}: two always lie on a line")
    bad = np.flatnonzero(~((spent > 0) & np.isfinite(spent)))
    if len(bad):
        raise InputError(f"compute must be positive and finite, got {spent[bad[0]]} for model {int(bad[0])}")
    if (spent == spent[0]).all():
        raise InputError("all models have the same compute, so that nothing can follow it")
    odd = np.argwhere(~np.isfinite(table) if finite else (np.isnan(table) | (table == np.inf)))
    if len(odd):
        model, item = (int(i) for i in odd[0])
        mend = "leave the item out, or use ranks" if np.isneginf(table[model, item]) else "leave the item out"
        raise InputError(f"the score of item {item} under model {model} is {table[model, item]}: {mend}")
    return table, spent


def _pearson(x: Floats, table: Floats) -> Floats:
    """(Q,) of x (M,) with the columns of `table` (M, Q), none of them constant."""
    x = x - x.mean()
    centred = table - table.mean(0)
    centred = centred / np.abs(centred).max(0)  # else squares of tiny probabilities underflow
    return np.asarray(np.clip(x @ centred / np.sqrt((x @ x) * (centred**2).sum(0)), -1.0, 1.0))


def _kendall(x: Floats, table: Floats) -> Floats:
    """(Q,) tau-b: agreeing pairs of models less disagreeing ones, over the geometric mean of the untied pairs."""
    first, second = np.triu_indices(len(x), 1)
    order = np.sign(x[first] - x[second])
    # Comparisons, because the difference of two minus infinities is no number.
    signs = (table[first] > table[second]).astype(np.float64) - (table[first] < table[second])
    untied = np.sqrt((order**2).sum() * (signs**2).sum(0))
    return np.asarray(np.clip(order @ signs / untied, -1.0, 1.0))
