r"""Soft optimal control of token sequences, exact where vocabulary and length are small enough to enumerate.

A state is a prefix :math:`s_t = (x, y_{<t})`, an action the next token; a sequence ends with EOS or after T tokens.
What there is per step (the conditionals of a reference, rewards, Q) is a sequence of T tensors: number t = 0 .. T - 1
has shape :math:`(V^t, V)`, a row per prefix of t tokens in lexicographic order and a column per next token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require

__all__ = [
    "SoftSolution",
    "all_sequences",
    "enumerate_conditionals",
    "path_sums",
    "policy_values",
    "soft_value_iteration",
]

_MOST_ENTRIES = 2**24
_CHUNK = 4096  # prefixes per forward pass


@dataclass(frozen=True, slots=True, eq=False)
class SoftSolution:
    r"""The optimum of :math:`\mathbb{E}_\pi[\sum_t r(s_t, a_t)] - \beta\,\mathrm{KL}(\pi\|\pi_\text{ref})`.

    Args:
        values: :math:`V^*`, T + 1 tensors, number t of shape :math:`(V^t,)`; 0 where a sequence has ended.
        q_values: :math:`Q^*(s,a) = r(s,a) + \beta\log\pi_\text{ref}(a|s) + V^*(s')`, T tensors :math:`(V^t, V)`.
        log_policy: :math:`\log\pi^*`, T tensors :math:`(V^t, V)`, nats; that of the reference after EOS.
        credit: :math:`\beta\log(\pi^*/\pi_\text{ref}) = r(s,a) + V^*(s') - V^*(s)`, T tensors :math:`(V^t, V)`; 0 after
            EOS. Not the reward: it also holds what the token did to the chances of the rest.
        beta: KL coefficient, reward per nat.
    """

    values: tuple[Tensor, ...]
    q_values: tuple[Tensor, ...]
    log_policy: tuple[Tensor, ...]
    credit: tuple[Tensor, ...]
    beta: float

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) of the optimal policy after the completion of each row, nats: it can be decoded like a model.

        Raises:
            InputError: for a completion that has all T tokens already.
        """
        packed, _ = prefix.packed_left()
        out = []
        for row, (ids, real, start) in enumerate(
            zip(packed.ids, packed.attention_mask, packed.completion_starts().tolist(), strict=True)
        ):
            tokens = ids[real].tolist()[start:]
            if len(tokens) >= len(self.log_policy):
                raise InputError(f"row {row} has {len(tokens)} tokens, and sequences end after {len(self.log_policy)}")
            table = self.log_policy[len(tokens)]
            place = 0
            for token in tokens:
                place = place * table.shape[1] + token
            out.append(table[place])
        return torch.stack(out)


def soft_value_iteration(
    reference: Sequence[Tensor], rewards: Sequence[Tensor], *, beta: float, eos_id: int | None = None
) -> SoftSolution:
    r"""Backward induction for the KL-regularised optimum over token sequences.

    .. math::

        V^*(s) = \beta \log \sum_a \exp\bigl(Q^*(s,a)/\beta\bigr),\quad
        Q^*(s,a) = r(s,a) + \beta\log\pi_\text{ref}(a|s) + V^*(s'),\quad
        \pi^*(a|s) = \exp\bigl((Q^*(s,a) - V^*(s))/\beta\bigr)

    with V* = 0 at the end. Over whole sequences :math:`\pi^*(y) = \pi_\text{ref}(y)\,e^{r(y)/\beta}/Z` and
    :math:`V^*(s_1) = \beta\log Z`.

    Args:
        reference: :math:`\log\pi_\text{ref}`, T tensors :math:`(V^t, V)`, normalised, nats.
        rewards: r, T tensors :math:`(V^t, V)`; those after EOS are ignored.
        beta: KL coefficient, positive.
        eos_id: token that ends a sequence; None: all have T tokens.

    Returns:
        The solution in float64.

    Raises:
        InputError: for shapes that do not fit, a reference that is not normalised, rewards that are not finite, or a
            beta that is not positive.

    Source: arXiv 2404.12358.
    """
    if not 0 < beta < math.inf:
        raise InputError(f"beta must be positive and finite, got {beta}")
    log_reference, rewards = _steps("reference", reference), _steps("rewards", rewards)
    size, horizon = log_reference[0].shape[1], len(log_reference)
    if [r.shape for r in rewards] != [p.shape for p in log_reference]:
        raise InputError("reference and rewards must have the same shapes, step by step")
    for t, (p, r) in enumerate(zip(log_reference, rewards, strict=True)):
        if not bool((p.logsumexp(1).abs() < 1e-4).all()):
            row = int((~(p.logsumexp(1).abs() < 1e-4)).nonzero()[0])
            raise InputError(f"reference: the probabilities at step {t} after prefix {row} do not sum to 1")
        if not bool(r.isfinite().all()):
            raise InputError(f"rewards: those of step {t} are not all finite")
    values = [torch.zeros(size**horizon, dtype=torch.float64)]
    q_values: list[Tensor] = []
    policies: list[Tensor] = []
    credits: list[Tensor] = []
    for p, r, over in reversed(list(zip(log_reference, rewards, _ended(size, horizon, eos_id), strict=True))):
        gain = r.masked_fill(over[:, None], 0.0) + values[-1].reshape(-1, size)
        # Relative to beta, so that the largest exponent is taken out before anything is exponentiated.
        tilted = p + gain / beta
        log_z = tilted.logsumexp(1).masked_fill(over, 0.0)
        values.append(beta * log_z)
        q_values.append(beta * tilted)
        policies.append(tilted - log_z[:, None])
        credits.append(gain - values[-1][:, None])
    first_to_last = [tuple(reversed(steps)) for steps in (values, q_values, policies, credits)]
    return SoftSolution(first_to_last[0], first_to_last[1], first_to_last[2], first_to_last[3], beta)


def policy_values(
    log_policy: Sequence[Tensor], rewards: Sequence[Tensor], *, eos_id: int | None = None
) -> tuple[Tensor, ...]:
    r"""Expected return of a policy from every prefix, :math:`V^\pi(s) = \mathbb{E}_\pi[\sum_{i \ge t} r(s_i, a_i)]`.

    Args:
        log_policy: T tensors :math:`(V^t, V)`, nats.
        rewards: T tensors :math:`(V^t, V)`; those after EOS are ignored.
        eos_id: token that ends a sequence; None: all have T tokens.

    Returns:
        T + 1 tensors, number t of shape :math:`(V^t,)`, float64.

    Raises:
        InputError: for shapes that do not fit.
    """
    log_policy, rewards = _steps("log_policy", log_policy), _steps("rewards", rewards)
    if [r.shape for r in rewards] != [p.shape for p in log_policy]:
        raise InputError("log_policy and rewards must have the same shapes, step by step")
    size, horizon = log_policy[0].shape[1], len(log_policy)
    values = [torch.zeros(size**horizon, dtype=torch.float64)]
    for p, r, over in reversed(list(zip(log_policy, rewards, _ended(size, horizon, eos_id), strict=True))):
        expected = (p.exp() * (r + values[-1].reshape(-1, size))).sum(1)
        values.append(expected.masked_fill(over, 0.0))
    return tuple(reversed(values))


def all_sequences(vocab_size: int, horizon: int, *, eos_id: int | None = None) -> list[tuple[int, ...]]:
    """Every sequence that ends with EOS or has `horizon` tokens, shorter ones first, each length in order."""
    others = [token for token in range(vocab_size) if token != eos_id]
    full = list(product(others, repeat=horizon))
    if eos_id is None:
        return full
    return [(*start, eos_id) for t in range(horizon) for start in product(others, repeat=t)] + full


def path_sums(steps: Sequence[Tensor], sequences: Sequence[Sequence[int]]) -> Tensor:
    r"""What a quantity per step adds up to along sequences, :math:`\sum_t q_t(y_{<t}, y_t)`.

    Args:
        steps: T tensors :math:`(V^t, V)`.
        sequences: N sequences of at most T tokens.

    Returns:
        (N,) float64.

    Raises:
        InputError: for shapes that do not fit, or a sequence that is longer than T.
    """
    tables = _steps("steps", steps)
    size = tables[0].shape[1]
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    place = torch.zeros(len(sequences), dtype=torch.long)
    longest = max((len(sequence) for sequence in sequences), default=0)
    if longest > len(tables):
        raise InputError(f"a sequence has {longest} tokens, and there are {len(tables)} steps")
    for t in range(longest):
        rows = torch.tensor([i for i, sequence in enumerate(sequences) if len(sequence) > t])
        tokens = torch.tensor([sequence[t] for sequence in sequences if len(sequence) > t])
        sums[rows] += tables[t][place[rows], tokens]
        place[rows] = place[rows] * size + tokens
    return sums


@torch.no_grad()
def enumerate_conditionals(model: ChainRule, prompt: TokenBatch, *, horizon: int) -> tuple[Tensor, ...]:
    """A model's next-token distributions after every continuation of a prompt of up to `horizon` - 1 tokens.

    Args:
        model: of a small vocabulary.
        prompt: one row.
        horizon: T.

    Returns:
        T tensors :math:`(V^t, V)`, float64, nats.

    Raises:
        InputError: for several prompts, a horizon below 1, or more than 2^24 numbers.
    """
    model = require(model, ChainRule, "enumeration")  # type: ignore[type-abstract]
    if len(prompt) != 1 or horizon < 1:
        raise InputError(f"enumeration continues one prompt by at least one token; got {len(prompt)} by {horizon}")
    start = prompt.ids[0][prompt.attention_mask[0]].tolist()
    steps: list[Tensor] = []
    for t in range(horizon):
        size = steps[0].shape[1] if steps else 0
        if size ** (t + 1) > _MOST_ENTRIES:
            raise InputError(f"{size} tokens and {horizon} steps are too many to enumerate; shorten the sequences")
        rows = [start + list(tail) for tail in product(range(size), repeat=t)]
        chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        batches = (TokenBatch.from_lists(chunk, starts=[len(start)] * len(chunk)) for chunk in chunks)
        steps.append(torch.cat([model.next_log_probs(batch).double().cpu() for batch in batches]))
    return tuple(steps)


def _steps(name: str, steps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors in float64, checked for their shapes."""
    if not len(steps) or steps[0].dim() != 2:
        raise InputError(f"{name} needs a tensor of shape (V^t, V) for every step t")
    size = steps[0].shape[1]
    for t, step in enumerate(steps):
        if step.shape != (size**t, size):
            raise InputError(f"{name} must have shape {(size**t, size)} at step {t}, got {tuple(step.shape)}")
    return tuple(step.detach().double().cpu() for step in steps)


def _ended(size: int, horizon: int, eos_id: int | None) -> list[Tensor]:
    """(V^t,) bool for every step: whether the prefix contains EOS."""
    over = [torch.zeros(1, dtype=torch.bool)]
    is_eos = torch.tensor([token == eos_id for token in range(size)])
    for _ in range(1, horizon):
        over.append((over[-1][:, None] | is_eos).flatten())
    return over
