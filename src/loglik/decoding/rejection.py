"""Statistical rejection sampling: candidates thinned out towards the reward-tilted optimum, and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["Ranker", "first_round_pairs", "ranker_rewards", "rejection_pairs", "rejection_sample", "tournament_pairs"]

Ranker = Callable[[Tensor, Tensor], Tensor]
"""(P,) and (P,) candidate numbers to (P,) probabilities that the first of each pair is preferred, as presented."""


def rejection_sample(
    rewards: Tensor | Sequence[float],
    n: int,
    *,
    beta: float,
    generator: torch.Generator | None = None,
    unique: Sequence[Hashable] | None = None,
) -> Tensor:
    r"""Choose n of the N candidates of one prompt, close to draws from :math:`\pi_r \propto \pi\,e^{r/\beta}`.

    In passes: m is the largest reward among the candidates not yet accepted; each of them is visited once, in order,
    and accepted if :math:`u < \exp((r_k - m)/\beta)` with :math:`u \sim U[0, 1)`, until there are n. The best that is
    left is always accepted, so passes end. A pass accepts at the rate :math:`\mathbb{E}\,e^{(r-m)/\beta}`.

    Candidates are told apart by their number: equal texts are separate draws, which is what weighs them by the
    proposal. The n are distinct candidates, so those after the first are not independent draws. The target is tilted
    from the sampler that drew the candidates, temperature and truncation included.

    Args:
        rewards: (N,) reward of each candidate; only differences matter.
        n: how many to accept.
        beta: KL coefficient in units of the reward. 0 is the limit of best-of-N (the n largest rewards, equal ones in
            order), infinity that of plain sampling (the first n).
        generator: of the random numbers, on the CPU.
        unique: (N,) keys, such as texts; of candidates with equal keys only the first takes part.

    Returns:
        (n,) long, numbers of the accepted candidates in the order of acceptance.

    Raises:
        InputError: for a negative beta, rewards that are not finite, keys that do not fit, or fewer than n candidates.

    Source: arXiv 2309.06657.
    """
    scores = torch.as_tensor(rewards, dtype=torch.float64, device="cpu").detach()
    if scores.dim() != 1:
        raise InputError(f"rewards must be one number per candidate, got shape {tuple(scores.shape)}")
    if not beta >= 0:
        raise InputError(f"beta must be at least 0, got {beta}")
    bad = (~scores.isfinite()).nonzero().flatten()
    if len(bad):
        raise InputError(f"the reward of candidate {int(bad[0])} is {float(scores[bad[0]])}; leave that candidate out")
    left = torch.arange(len(scores)) if unique is None else _first_of_each(unique, len(scores))
    if not 0 <= n <= len(left):
        kind = "candidates" if unique is None else "distinct candidates"
        raise InputError(f"cannot accept {n} of {len(left)} {kind}; draw more or lower n")
    accepted = left[:0]
    while len(accepted) < n:
        below = scores[left] - scores[left].max()
        # beta = 0: the best has probability one, the rest none; 0/0 is kept out.
        chance = (below == 0).double() if beta == 0 else (below / beta).exp()
        taken = torch.rand(len(left), dtype=torch.float64, generator=generator) < chance
        accepted = torch.cat([accepted, left[taken][: n - len(accepted)]])
        left = left[~taken]
    return accepted


def rejection_pairs(
    rewards: Tensor | Sequence[float],
    n: int,
    ranker: Ranker,
    *,
    beta: float,
    how: Literal["first_round", "tournament"] = "first_round",
    generator: torch.Generator | None = None,
    unique: Sequence[Hashable] | None = None,
) -> Tensor:
    """(P, 2) long, numbers of chosen and rejected candidates among n accepted by `rejection_sample`.

    Args:
        rewards: (N,) of the candidates of one prompt.
        n: how many to accept.
        ranker: of pairs; see `first_round_pairs` and `tournament_pairs`.
        beta: KL coefficient of the sampler.
        how: pairs of the first round (n // 2 at most) or of the whole tournament (n - 1 at most).
        generator: of the random numbers, on the CPU.
        unique: (N,) keys of the candidates, as for `rejection_sample`.

    Raises:
        InputError: as for `rejection_sample` and the pairs, or for another `how`.

    Source: arXiv 2309.06657.
    """
    rounds = {"first_round": first_round_pairs, "tournament": tournament_pairs}
    if how not in rounds:
        raise InputError(f"how must be one of {', '.join(rounds)}, got {how!r}")
    accepted = rejection_sample(rewards, n, beta=beta, generator=generator, unique=unique)
    return rounds[how](accepted, ranker, generator=generator)


def first_round_pairs(candidates: Tensor, ranker: Ranker, *, generator: torch.Generator | None = None) -> Tensor:
    """Pair candidates at random and order each pair by the ranker.

    The ranker sees every pair in both orders of presentation, and its two answers are averaged. A pair it finds equal
    (1/2) says nothing and is left out; so is the last of an odd number of candidates.

    Args:
        candidates: (n,) long, distinct numbers of candidates.
        ranker: (P,), (P,) numbers to (P,) probabilities that the first is preferred.
        generator: of the pairing, on the CPU.

    Returns:
        (P, 2) long, chosen and rejected; P is at most n // 2.

    Raises:
        InputError: for probabilities that are none.

    Source: arXiv 2309.06657.
    """
    order = _shuffled(candidates, generator)
    half = len(order) // 2
    winners, losers, tied = _match(order[0 : 2 * half : 2], order[1 : 2 * half : 2], ranker)
    return torch.stack([winners, losers], dim=1)[~tied]


def tournament_pairs(candidates: Tensor, ranker: Ranker, *, generator: torch.Generator | None = None) -> Tensor:
    """Pairs of a knock-out tournament in random order: the winner of every match goes on, the last of an odd round too.

    Arguments, both orders of presentation and errors are those of `first_round_pairs`. Of equals the first presented
    goes on and the match gives no pair.

    Returns:
        (P, 2) long, chosen and rejected; P is at most n - 1.

    Source: arXiv 2309.06657, after SLiC-HF (arXiv 2305.10425).
    """
    order = _shuffled(candidates, generator)
    pairs = [order.new_empty(0, 2)]
    while len(order) > 1:
        half = len(order) // 2
        winners, losers, tied = _match(order[0 : 2 * half : 2], order[1 : 2 * half : 2], ranker)
        pairs.append(torch.stack([winners, losers], dim=1)[~tied])
        order = torch.cat([winners, order[2 * half :]])
    return torch.cat(pairs)


def ranker_rewards(ranker: Ranker, count: int, *, baseline: int) -> Tensor:
    r"""Rewards of candidates 0 to `count` - 1 from a pairwise ranker, against one of them.

    .. math:: r(y) = \operatorname{logit} P(y \succ y_b)

    averaged over both orders of presentation, so that :math:`r(y_b) = 0`. Probabilities are held 1e-6 away from 0 and
    1, rewards therefore within 13.9.

    Args:
        ranker: (P,), (P,) numbers to (P,) probabilities that the first is preferred.
        count: number of candidates.
        baseline: number of the candidate :math:`y_b`, a random one of the proposal.

    Returns:
        (count,) float64.

    Raises:
        InputError: for probabilities that are none, or a baseline that is not among the candidates.

    Source: arXiv 2309.06657.
    """
    if not 0 <= baseline < count:
        raise InputError(f"the baseline must be one of the candidates 0 to {count - 1}, got {baseline}")
    everyone = torch.arange(count)
    probability = _preference(everyone, torch.full_like(everyone, baseline), ranker)
    probability[baseline] = 0.5
    return torch.logit(probability, eps=1e-6)


def _match(first: Tensor, second: Tensor, ranker: Ranker) -> tuple[Tensor, Tensor, Tensor]:
    """Winners, losers, and where they are equal; of equals the first is the winner."""
    probability = _preference(first, second, ranker)
    won = probability >= 0.5
    return torch.where(won, first, second), torch.where(won, second, first), probability == 0.5


def _preference(first: Tensor, second: Tensor, ranker: Ranker) -> Tensor:
    """(P,) float64 probability that the first is preferred, averaged over both orders of presentation."""
    if not len(first):
        return torch.empty(0, dtype=torch.float64)
    answers = []
    for a, b in ((first, second), (second, first)):
        answer = torch.as_tensor(ranker(a, b)).detach().to("cpu", torch.float64)
        if answer.shape != a.shape:
            raise InputError(
                f"the ranker must give {len(a)} probabilities for {len(a)} pairs, got {tuple(answer.shape)}"
            )
        wrong = (~((answer >= 0) & (answer <= 1))).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise InputError(
                f"the ranker must give probabilities; that of candidate {int(a[i])} against {int(b[i])} is "
                f"{float(answer[i]):g}"
            )
        answers.append(answer)
    return (answers[0] + (1 - answers[1])) / 2


def _shuffled(candidates: Tensor, generator: torch.Generator | None) -> Tensor:
    return candidates.cpu()[torch.randperm(len(candidates), generator=generator)]


def _first_of_each(keys: Sequence[Hashable], count: int) -> Tensor:
    if len(keys) != count:
        raise InputError(f"unique must hold one key per candidate: got {len(keys)} for {count}")
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return torch.tensor(list(first.values()), dtype=torch.long)
