"""What follow-up likelihood says about pairs: by category of follow-up, against the responses' own likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.models.protocol import TextModel
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy
from loglik.signals.detection import proportion_interval
from loglik.signals.feedback import FollowUpScores, Message
from loglik.signals.follow_ups import FollowUps

__all__ = ["PairwiseAccuracy", "category_rewards", "pairwise_accuracy", "rating_correlation", "response_likelihood"]


@dataclass(frozen=True, slots=True)
class PairwiseAccuracy:
    """How often a score prefers the chosen response.

    Args:
        accuracy: share of the pairs, ties counting half.
        low: lower end of the interval, every tie counted as wrong.
        high: its upper end, every tie counted as right.
        wins: pairs whose chosen response scores higher.
        ties: pairs with equal scores.
        count: all pairs.
        level: confidence of the interval.
        outcomes: (P,) 1 for a win, 0.5 for a tie, 0 for a loss.
    """

    accuracy: float
    low: float
    high: float
    wins: int
    ties: int
    count: int
    level: float
    outcomes: Tensor

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON and tables."""
        names = ("accuracy", "low", "high", "wins", "ties", "count", "level")
        return {name: getattr(self, name) for name in names}


def pairwise_accuracy(
    chosen: Tensor, rejected: Tensor, *, level: float = 0.95, tolerance: float = 1e-6
) -> PairwiseAccuracy:
    r"""Share of pairs in which the chosen response scores higher, :math:`\frac{1}{P} \sum_p 1[s_p^+ > s_p^-]`.

    The interval is Clopper and Pearson's. It is exact without ties and covers more than its level with them: its lower
    end counts them as wrong and its upper end as right.

    Args:
        chosen: (P,) scores of the chosen responses, finite.
        rejected: (P,) of the rejected ones.
        level: confidence of the interval, in (0, 1).
        tolerance: differences up to this are ties: what batching does to the last digits is no preference.

    Raises:
        InputError: for no pairs, scores that do not pair, or a level or tolerance out of range.
        RowError: for a score that is not finite.

    Source: arXiv 2409.13948 evaluates by this share.
    """
    if chosen.dim() != 1 or chosen.shape != rejected.shape or not len(chosen):
        raise InputError(
            f"chosen and rejected must both have shape (P,), at least one pair: got {tuple(chosen.shape)} and "
            f"{tuple(rejected.shape)}"
        )
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if len(bad):
            raise RowError(f"the score of the {name} response is {float(values[bad[0]])}", row=f"row {int(bad[0])}")
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance must be at least 0 and finite, got {tolerance}")
    gap = (chosen - rejected).detach().double().cpu()
    outcomes = torch.where(gap.abs() <= tolerance, 0.5, (gap > 0).double())
    wins, ties, count = int((outcomes == 1).sum()), int((outcomes == 0.5).sum()), len(chosen)
    totals = np.array([count])
    low = proportion_interval(np.array([wins]), totals, level)[0]
    high = proportion_interval(np.array([wins + ties]), totals, level)[1]
    return PairwiseAccuracy(
        (wins + ties / 2) / count, float(low[0]), float(high[0]), wins, ties, count, level, outcomes
    )


def rating_correlation(scores: Tensor, ratings: Sequence[float]) -> dict[str, float] | None:
    """Spearman's rank correlation of scores with human ratings, and its p-value; None where one side is constant.

    Args:
        scores: (N,) finite.
        ratings: N finite numbers.

    Raises:
        InputError: for fewer than three rows, or numbers that do not pair.
        RowError: for a score or a rating that is not finite.

    Source: arXiv 2409.13948 (rating benchmarks).
    """
    from scipy.stats import spearmanr

    given = torch.as_tensor(ratings, dtype=torch.float64)
    if scores.dim() != 1 or given.shape != scores.shape or len(given) < 3:
        raise InputError(
            f"scores and ratings must pair, and a correlation needs at least three: got {tuple(scores.shape)} and "
            f"{tuple(given.shape)}"
        )
    for name, values in (("score", scores), ("rating", given)):
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if len(bad):
            raise RowError(f"the {name} is {float(values[bad[0]])}", row=f"row {int(bad[0])}")
    if bool((scores == scores[0]).all()) or bool((given == given[0]).all()):
        return None
    found = spearmanr(scores.detach().cpu().numpy(), given.numpy())
    return {"rank_correlation": float(found.statistic), "p_value": float(found.pvalue)}


def category_rewards(scores: FollowUpScores, follow_ups: Mapping[str, FollowUps]) -> dict[str, Tensor]:
    """(N,) reward by the follow-ups of each category: mean of its positive ones minus mean of its negative ones.

    Args:
        scores: of the follow-ups of all categories, in their order, both sides.
        follow_ups: the categories, such as `DEFAULT_FOLLOW_UPS`; a side without follow-ups adds nothing.

    Raises:
        InputError: for other numbers of follow-ups than were scored.

    Source: arXiv 2409.13948.
    """
    sizes = [sum(len(getattr(each, side)) for each in follow_ups.values()) for side in ("positive", "negative")]
    if sizes != [scores.positive.shape[1], scores.negative.shape[1]]:
        raise InputError(
            f"the categories have {sizes[0]} positive and {sizes[1]} negative follow-ups, and "
            f"{scores.positive.shape[1]} and {scores.negative.shape[1]} were scored: give those that were"
        )
    found = {}
    begin, other = 0, 0
    for name, each in follow_ups.items():
        likely = scores.positive[:, begin : begin + len(each.positive)]
        unlikely = scores.negative[:, other : other + len(each.negative)]
        begin, other = begin + len(each.positive), other + len(each.negative)
        reward = torch.zeros(len(scores.positive), dtype=torch.float64)
        reward = reward + likely.mean(1) if likely.shape[1] else reward
        found[name] = reward - unlikely.mean(1) if unlikely.shape[1] else reward
    return found


def response_likelihood(
    model: TextModel,
    prompts: Sequence[str | Sequence[Message]],
    responses: Sequence[str],
    *,
    overflow: OverflowPolicy = "error",
) -> LogLikelihood:
    """Log-likelihood of the responses themselves: what follow-up likelihood has to be better than.

    A conversation is written as by `plain_template`, up to ``Assistant: ``, after which the response stands. The chat
    template is left alone, because many templates put text of their own before a response.

    Args:
        model: any text model.
        prompts: N contexts, each a user's message or a conversation.
        responses: N responses.
        overflow: a context longer than the model's is an error, or is read in windows.

    Returns:
        (N,) nats of the responses' tokens.

    Raises:
        InputError: for numbers that do not pair.
        RowError: for a row that cannot be scored.

    Source: the baseline of arXiv 2409.13948.
    """
    if isinstance(prompts, str) or isinstance(responses, str) or len(prompts) != len(responses) or not len(prompts):
        raise InputError(f"each response needs its own prompt: got {len(prompts)} and {len(responses)}")
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    heads = ["".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in turns) for turns in conversations]
    try:
        return score(
            model, [(f"{head}Assistant:", " " + r) for head, r in zip(heads, responses, strict=True)], overflow=overflow
        )
    except RowError as error:
        raise error.at((error.row or "row 0").replace("row", "response")) from None
