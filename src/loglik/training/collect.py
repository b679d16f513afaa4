"""Collectors for `Online`: completions drawn from the policy, judged, as rows to train on.

====================  ==============================================================================
collector             with an objective it is
====================  ==============================================================================
`DrawPairs`           with ``ipo`` online IPO, or IPO-MD with a `mixture`; with ``dpo`` online DPO
`DrawGroups`          with ``brain`` BRAIn; with ``reinforce`` or ``ppo_clip`` on-policy policy gradients
`DrawRollouts`        with ``sequence_match`` SequenceMatch
`RejectionPairs`      with ``sigmoid_norm`` or ``hinge_norm`` RSO (drawn from the reference, once)
====================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loglik.decoding.mixture import geometric_mixture
from loglik.decoding.rejection import Ranker, rejection_pairs
from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, Sampler, require
from loglik.training.data import Row
from loglik.training.reference import AdapterOff, ModelReference, Reference

__all__ = ["DrawGroups", "DrawPairs", "DrawRollouts", "Preference", "RejectionPairs", "Reward", "draw"]

Reward = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]]
"""A prompt's token ids and those of its completions to one number each, higher is better."""

Preference = Callable[[Sequence[int], Sequence[int], Sequence[int]], float]
"""A prompt's token ids and those of two completions to the probability that the first is preferred."""


@torch.no_grad()
def draw(
    model: Sampler, prompts: Sequence[Sequence[int]], n: int, *, generator: torch.Generator, max_tokens: int
) -> list[list[list[int]]]:
    """`n` completions of each prompt, EOS included where one was drawn, as token ids."""
    sampler = require(model, Sampler, "drawing completions")  # type: ignore[type-abstract]
    batch = TokenBatch.from_lists(prompts, starts=[len(p) for p in prompts])
    found = sampler.sample(n, prompt=batch, generator=generator, max_tokens=max_tokens)
    rows = [
        ids[real].tolist()[len(prompts[i // n]) :]
        for i, (ids, real) in enumerate(zip(found.ids, found.attention_mask, strict=True))
    ]
    return [rows[i * n : (i + 1) * n] for i in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class DrawPairs:
    r"""Pairs of fresh completions with the probability that the first is preferred.

    Args:
        prompts: token ids.
        preference: judges two completions.
        prompts_per_collection: how many prompts, drawn with replacement, a collection takes.
        mixture: weight :math:`\beta` of the reference in the geometric mixture that is sampled; 0 is the policy
            itself (online), 1 the reference.
        labels: ``soft`` keeps the probability for objectives that take ``preferences`` (`ipo`); ``sampled`` draws
            which of the two is chosen from it.
        max_tokens: per completion.

    Source: arXiv 2403.08635.
    """

    prompts: Sequence[Sequence[int]]
    preference: Preference
    prompts_per_collection: int
    mixture: float = 0.0
    labels: Literal["soft", "sampled"] = "soft"
    max_tokens: int = 64

    def __call__(self, model: Any, reference: Reference | None, generator: torch.Generator) -> Iterator[Row]:
        """Rows of two completions each; equal ones are kept, their gap is 0 for every policy."""
        chosen = _prompts(self.prompts, self.prompts_per_collection, generator)
        sampler = model if self.mixture == 0 else geometric_mixture(model, _network(reference), beta=self.mixture)
        for prompt, (first, second) in zip(
            chosen, draw(sampler, chosen, 2, generator=generator, max_tokens=self.max_tokens), strict=True
        ):
            p = float(self.preference(prompt, first, second))
            if not 0 <= p <= 1:
                raise InputError(f"the preference must be a probability, got {p}")
            if self.labels == "soft":
                yield Row(prompt, (first, second), values={"preferences": (p,)})
            else:
                won = float(torch.rand((), generator=generator)) < p
                yield Row(prompt, (first, second) if won else (second, first))


@dataclass(frozen=True, slots=True)
class DrawGroups:
    """Several fresh completions per prompt with their rewards and their log-probabilities under the sampler.

    Args:
        prompts: token ids.
        reward: judges the completions of one prompt.
        prompts_per_collection: how many prompts, drawn with replacement, a collection takes.
        n: completions per prompt.
        max_tokens: per completion.

    Source: arXiv 2402.02479 (BRAIn).
    """

    prompts: Sequence[Sequence[int]]
    reward: Reward
    prompts_per_collection: int
    n: int = 8
    max_tokens: int = 64

    def __call__(self, model: Any, reference: Reference | None, generator: torch.Generator) -> Iterator[Row]:
        """Rows of `n` completions each."""
        chosen = _prompts(self.prompts, self.prompts_per_collection, generator)
        found = draw(model, chosen, self.n, generator=generator, max_tokens=self.max_tokens)
        for prompt, completions in zip(chosen, found, strict=True):
            rewards = tuple(float(r) for r in self.reward(prompt, completions))
            values = {"rewards": rewards, "proposal": tuple(_log_probs(model, prompt, completions).tolist())}
            yield Row(prompt, tuple(completions), values=values)


@dataclass(frozen=True, slots=True)
class DrawRollouts:
    """Demonstrations beside fresh completions of the policy, for occupancy matching.

    Args:
        rows: demonstrations, one completion each.
        rows_per_collection: how many, drawn with replacement, a collection takes.
        n: rollouts beside each demonstration.
        max_tokens: per rollout.

    Source: arXiv 2306.05426.
    """

    rows: Sequence[Row]
    rows_per_collection: int
    n: int = 1
    max_tokens: int = 64

    def __call__(self, model: Any, reference: Reference | None, generator: torch.Generator) -> Iterator[Row]:
        """Rows whose first completion is the demonstration."""
        if not self.rows:
            raise InputError("there is no demonstration to draw rollouts for: give rows with one completion each")
        picked = torch.randint(len(self.rows), (self.rows_per_collection,), generator=generator).tolist()
        chosen = [self.rows[i] for i in picked]
        prompts = [row.prompt for row in chosen]
        rollouts = draw(model, prompts, self.n, generator=generator, max_tokens=self.max_tokens)
        for row, drawn in zip(chosen, rollouts, strict=True):
            yield Row(row.prompt, (row.completions[0], *drawn), name=row.name)


@dataclass(frozen=True, slots=True)
class RejectionPairs:
    r"""RSO's pairs: candidates of the reference, thinned out towards :math:`\pi_\text{ref}\,e^{r/\beta}`, then ranked.

    Args:
        prompts: token ids; every collection takes all of them.
        reward: judges the candidates of one prompt.
        beta: KL coefficient of the sampler, in units of the reward.
        candidates: drawn per prompt.
        accepted: kept per prompt.
        how: pairs of the first round or of a tournament.
        ranker: probability that one candidate is preferred to another, from (P,) and (P,) of their rewards; by default
            the logistic function of the difference (Bradley-Terry).
        max_tokens: per completion.

    Source: arXiv 2309.06657.
    """

    prompts: Sequence[Sequence[int]]
    reward: Reward
    beta: float = 0.5
    candidates: int = 64
    accepted: int = 8
    how: Literal["first_round", "tournament"] = "first_round"
    ranker: Callable[[Tensor, Tensor], Tensor] | None = None
    max_tokens: int = 64

    def __call__(self, model: Any, reference: Reference | None, generator: torch.Generator) -> Iterator[Row]:
        """Rows of a chosen and a rejected completion; pairs of equal completions say nothing and are left out."""
        source = _network(reference) if reference is not None else model
        found = draw(source, self.prompts, self.candidates, generator=generator, max_tokens=self.max_tokens)
        for prompt, completions in zip(self.prompts, found, strict=True):
            rewards = torch.tensor([float(r) for r in self.reward(prompt, completions)], dtype=torch.float64)
            pairs = rejection_pairs(
                rewards, self.accepted, _ranked(rewards, self.ranker), beta=self.beta, how=self.how, generator=generator
            )
            for won, lost in pairs.tolist():
                if completions[won] != completions[lost]:
                    yield Row(prompt, (completions[won], completions[lost]))


class _BaseModel:
    """The next-token distributions of a policy without its adapter."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        with self.model.model.disable_adapter():
            found: Tensor = self.model.next_log_probs(prefix)
        return found

    def sample(self, n: int, **options: Any) -> TokenBatch:
        with self.model.model.disable_adapter():
            found: TokenBatch = self.model.sample(n, **options)
        return found


def _network(reference: Reference | None) -> Any:
    """The model behind a reference.

    Raises:
        InputError: if the reference is only numbers.
    """
    if isinstance(reference, ModelReference):
        return require(reference.model, ChainRule, "sampling from the reference")  # type: ignore[type-abstract]
    if isinstance(reference, AdapterOff):
        return _BaseModel(reference.model)
    raise InputError(
        "sampling from the reference needs its model, not only its log-probabilities: give reference=model"
    )


def _ranked(rewards: Tensor, ranker: Callable[[Tensor, Tensor], Tensor] | None) -> Ranker:
    judge = ranker or (lambda a, b: torch.sigmoid(a - b))
    return lambda first, second: judge(rewards[first], rewards[second])


def _prompts(prompts: Sequence[Sequence[int]], count: int, generator: torch.Generator) -> list[list[int]]:
    if not prompts:
        raise InputError("there is no prompt to draw completions of")
    picked = torch.randint(len(prompts), (count,), generator=generator).tolist()
    return [[int(token) for token in prompts[i]] for i in picked]


@torch.no_grad()
def _log_probs(model: Any, prompt: Sequence[int], completions: Iterable[Sequence[int]]) -> Tensor:
    rows = [[*prompt, *completion] for completion in completions]
    batch = TokenBatch.from_lists(rows, starts=[len(prompt)] * len(rows), groups=[0] * len(rows))
    found: Tensor = model.log_prob(batch).value
    return found
