"""Choosing among completions that are there already: best of n, and majority weighted by score."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["best_of_n", "weighted_majority"]

Answer = TypeVar("Answer", bound=Hashable)


def best_of_n(scores: Tensor, groups: Tensor) -> Tensor:
    r"""The best completion of every prompt, :math:`\arg\max_{i \in g} s_i`; of equals the first.

    Args:
        scores: (N,) higher is better: a reward, a log-likelihood, the least step reward.
        groups: (N,) long, prompt of each completion, ascending.

    Returns:
        (G,) long, the row of the best completion of each prompt, in the order of the prompts.

    Raises:
        InputError: for a score that is NaN, or groups that do not fit or ascend.

    Source: arXiv 2412.01981 scores with implicit process rewards.
    """
    if scores.dim() != 1 or groups.shape != scores.shape:
        raise InputError(f"scores and groups must both be (N,), got {tuple(scores.shape)} and {tuple(groups.shape)}")
    bad = torch.isnan(scores).nonzero().flatten()
    if len(bad):
        raise InputError(f"the score of row {int(bad[0])} is NaN; leave that completion out")
    back = (groups.diff() < 0).nonzero().flatten()
    if len(back):
        raise InputError(f"groups must ascend, and row {int(back[0]) + 1} goes back; sort the completions by prompt")
    by_score = scores.detach().sort(descending=True, stable=True).indices
    order = by_score[groups.to(scores.device)[by_score].sort(stable=True).indices]
    sizes = torch.unique_consecutive(groups, return_counts=True)[1].to(scores.device)
    return order[sizes.cumsum(0) - sizes]


def weighted_majority(answers: Sequence[Answer | None], scores: Tensor | Sequence[float] | None = None) -> Answer:
    r"""The answer whose completions score most together; of equals the one that was given first.

    .. math:: \hat a = \arg\max_a \sum_{i:\, a_i = a} s_i

    Scores should not be negative: every completion with a negative score counts against its answer, so that for
    log-likelihoods and log-ratios a frequent answer loses. Map those to weights first, such as probabilities.

    Args:
        answers: final answer of each completion of one prompt; None (no answer found) does not vote.
        scores: (N,) weight of each completion; 1 each by default, the plain majority (self-consistency).

    Raises:
        InputError: if no completion has an answer, or the scores do not fit or are not finite.

    Source: arXiv 2412.01981.
    """
    weights = torch.ones(len(answers)) if scores is None else torch.as_tensor(scores, dtype=torch.float64).detach()
    if weights.shape != (len(answers),):
        raise InputError(
            f"there must be one score per answer: got {len(answers)} answers and scores of shape {tuple(weights.shape)}"
        )
    votes: dict[Answer, list[float]] = {}
    for row, (answer, weight) in enumerate(zip(answers, weights.tolist(), strict=True)):
        if not math.isfinite(weight):
            raise InputError(f"the score of row {row} is {weight}; leave that completion out")
        if answer is not None:
            votes.setdefault(answer, []).append(weight)
    if not votes:
        raise InputError("no completion has an answer to vote for")
    # Exactly rounded sums: which answer wins does not depend on the order of the completions, but for ties.
    return max(votes, key=lambda answer: math.fsum(votes[answer]))
