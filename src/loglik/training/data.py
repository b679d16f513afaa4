"""Training data: rows of token ids, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from loglik.errors import InputError
from loglik.kinds import DrawsKey
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch

__all__ = ["Example", "Row", "RowBatch", "Rows", "StepSampler", "TokenBlocks", "collate"]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its completions, as tokens.

    Args:
        prompt: token ids that are conditioned on, BOS included.
        completions: token ids of each completion, EOS included where the model should learn to stop.
        unscored: leading tokens of each completion that are context too; 0 each by default.
        values: numbers per completion under the names that objectives ask for (``labels``, ``rewards``, ``proposal``),
            or one per row (``preferences``).
        weights: per completion, one weight per token.
        name: what names the row to its owner, such as ``line 3``.
    """

    prompt: Sequence[int]
    completions: tuple[Sequence[int], ...]
    unscored: tuple[int, ...] = ()
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    weights: tuple[Sequence[float], ...] | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of plain text: token `ids`, of which those from `scored_from` on are trained on."""

    ids: Sequence[int]
    scored_from: int = 1

    def as_row(self) -> Row:
        """The same as a prompt and its one completion."""
        return Row(self.ids[: self.scored_from], (self.ids[self.scored_from :],))


Rows: TypeAlias = "Dataset[Row] | Dataset[Example] | Sequence[Row] | Sequence[Example]"


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """B rows whose completions are the N rows of one `TokenBatch`, in order.

    Args:
        tokens: prompts with their completions; `groups` says whose they are.
        counts: (B,) completions of each row.
        index: (B,) number of each row in its data.
        values: numbers (N,) or (B,) by name; only names that every row has.
        weights: (N, T) token weights aligned with `tokens`, or None.
        names: of the rows.
        draws: which random numbers a likelihood that is sampled uses; policy and reference share them.
    """

    tokens: TokenBatch
    counts: Tensor
    index: Tensor
    values: Mapping[str, Tensor]
    weights: Tensor | None
    names: tuple[str, ...]
    draws: DrawsKey | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device | str, **_: object) -> RowBatch:
        """The same on another device."""
        return RowBatch(
            self.tokens.to(device),
            self.counts.to(device),
            self.index.to(device),
            {name: value.to(device) for name, value in self.values.items()},
            None if self.weights is None else self.weights.to(device),
            self.names,
            self.draws,
        )

    def with_draws(self, *names: str) -> RowBatch:
        """The same rows, whose sampled likelihoods use the random numbers of these names."""
        return replace(self, draws=DrawsKey.of(*names))

    def likelihood(self, model: Any) -> LogLikelihood:
        """Log-likelihoods (N,) of the completions under a model."""
        given = {} if self.draws is None else {"draws": self.draws}
        found: LogLikelihood = model.log_prob(self.tokens, **given)
        return found


def collate(examples: Sequence[tuple[int, Row | Example]]) -> RowBatch:
    """Numbered rows as one batch, padded on the right.

    Raises:
        InputError: naming a row without a completion, or with one that has no scored token.
    """
    numbered = [(i, e.as_row() if isinstance(e, Example) else e) for i, e in examples]
    rows = [row for _, row in numbered]
    names = tuple(row.name or f"row {index}" for index, row in numbered)
    sequences, starts, scored, groups = [], [], [], []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        skips = row.unscored or (0,) * len(row.completions)
        if not row.completions or not row.prompt:
            raise InputError(f"{name} has no {'completion' if row.prompt else 'prompt'} to train on")
        for completion, skip in zip(row.completions, skips, strict=True):
            if len(completion) <= skip:
                raise InputError(f"{name} has an empty completion: fill it or remove the row")
            sequences.append([*row.prompt, *completion])
            starts.append(len(row.prompt))
            scored.append(len(row.prompt) + skip)
            groups.append(number)
    shared = any(len(row.completions) > 1 for row in rows)
    tokens = TokenBatch.from_lists(sequences, starts=starts, scored_from=scored, groups=groups if shared else None)
    common = set.intersection(*(set(row.values) for row in rows)) if rows else set()
    values = {name: torch.tensor([v for row in rows for v in row.values[name]]).float() for name in sorted(common)}
    return RowBatch(
        tokens,
        torch.tensor([len(row.completions) for row in rows]),
        torch.tensor([index for index, _ in numbered]),
        values,
        _weights(rows, starts, tokens),
        names,
    )


def _weights(rows: Sequence[Row], starts: Sequence[int], tokens: TokenBatch) -> Tensor | None:
    if any(row.weights is None for row in rows):
        return None
    out = torch.zeros(tokens.ids.shape)
    every = [weights for row in rows for weights in row.weights or ()]
    for i, (weights, start) in enumerate(zip(every, starts, strict=True)):
        out[i, start : start + len(weights)] = torch.as_tensor(weights)
    return out


class Numbered(Dataset[tuple[int, Row]]):
    """Rows with their numbers; with `rolled`, each prompt with the completions of the row after it."""

    def __init__(self, rows: Rows, *, rolled: bool = False) -> None:
        self.rows, self.rolled = rows, rolled

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Row]:
        own = self._row(index)
        if not self.rolled:
            return index, own
        other = self._row((index + 1) % len(self))
        return index, Row(own.prompt, other.completions, other.unscored, name=own.name)

    def _row(self, index: int) -> Row:
        row = self.rows[index]
        return row.as_row() if isinstance(row, Example) else row

    def batch(self, indices: Sequence[int]) -> RowBatch:
        """Some rows, collated."""
        return collate([self[i] for i in indices])


def first_completions(counts: Tensor) -> Tensor:
    """(B,) position of each row's first completion among all."""
    return torch.tensor([0, *accumulate(counts.tolist())][:-1], device=counts.device)


class TokenBlocks(Dataset[Example]):
    """Consecutive blocks of one long token stream, as a language model is pre-trained on; the tail is dropped.

    Args:
        stream: (N,) token ids, documents separated by a special token.
        length: tokens per block. Blocks overlap by one token, so that every token but the first is predicted once.
    """

    def __init__(self, stream: np.ndarray, length: int) -> None:
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        if len(stream) < length:
            raise ValueError(f"the stream has {len(stream)} tokens, fewer than one block of {length}")
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return (len(self.stream) - 1) // (self.length - 1)

    def __getitem__(self, index: int) -> Example:
        begin = index * (self.length - 1)
        return Example(self.stream[begin : begin + self.length].tolist())


class StepSampler(Sampler[list[int]]):
    """Micro-batches of row numbers for steps `first` to `last`, each a function of the seed and the step alone.

    Every epoch is a permutation seeded by (seed, epoch); steps run over the concatenated epochs. Starting at any step
    gives the same batches as running up to it, so that a resumed run sees what an uninterrupted one would have. Of
    several processes, each takes every so manieth micro-batch of a step.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int,
        micro_batch_size: int,
        first: int,
        last: int,
        seed: int | tuple[int, ...],
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if rows < 1:
            raise InputError("there is no row to train on")
        self.rows, self.batch_size, self.micro_batch_size = rows, batch_size, micro_batch_size
        self.first, self.last = first, last
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return (self.last - self.first) * -(-self.batch_size // self.micro_batch_size) // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            batch: list[int] = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.rows != epoch:
                    epoch = position // self.rows
                    order = np.random.default_rng((*self.seed, epoch)).permutation(self.rows)
                batch.append(int(order[position % self.rows]))
            micro = [batch[i : i + self.micro_batch_size] for i in range(0, self.batch_size, self.micro_batch_size)]
            yield from micro[self.process :: self.processes]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that a resumed run needs no saved generator state."""
    entropy = np.random.SeedSequence((seed, step, rank)).generate_state(1, dtype=np.uint64)[0]
    torch.manual_seed(int(entropy >> np.uint64(1)))
