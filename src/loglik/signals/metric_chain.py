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

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.signals.choice import Choices, Normalise, choose
from loglik.signals.score_compute import Correlation, ScoreCompute, checked_scores, score_compute_correlation

__all__ = [
    "LINKS",
    "ChainLink",
    "MetricChain",
    "chain_correlations",
    "chain_links",
    "mass_trend",
    "metric_chain",
]

Floats = NDArray[np.float64]

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


def chain_correlations(
    chains: Sequence[MetricChain],
    compute: Tensor | ArrayLike,
    *,
    method: Correlation = "spearman",
    skip_constant: bool = False,
) -> dict[str, ScoreCompute]:
    """`score_compute_correlation` of each of the five scores, by name in the order of `LINKS`.

    Args:
        chains: the M models' scores on the same questions.
        compute: (M,) FLOPs of each.
        method: as there.
        skip_constant: leave out a score that is the same for all models on every question (accuracy, where all are
            right), instead of refusing it.

    Raises:
        InputError: for models with other questions, or what `score_compute_correlation` refuses, with the score's name.
    """
    _require_same_questions(chains)
    found = {}
    for name in LINKS:
        table = torch.stack([getattr(chain, name).value for chain in chains])
        if skip_constant and bool((table == table[:1]).all()):
            checked_scores(table, compute, finite=method == "pearson")  # no other complaint is left out
            continue
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
    (right, spent), (wrong, _) = (checked_scores(table, compute, finite=True) for table in tables)
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
