"""Training data: rows of token ids, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from loglik.models.batch import TokenBatch

__all__ = ["Example", "StepSampler", "TokenBlocks", "collate"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: token `ids`, of which those from `scored_from` on are trained on."""

    ids: Sequence[int]
    scored_from: int = 1


def collate(examples: Sequence[Example]) -> TokenBatch:
    """Pad examples on the right into one `TokenBatch`."""
    return TokenBatch.from_lists([e.ids for e in examples], scored_from=[e.scored_from for e in examples])


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
    gives the same batches as running up to it, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, rows: int, *, batch_size: int, micro_batch_size: int, first: int, last: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("there is no row to train on")
        self.rows, self.batch_size, self.micro_batch_size = rows, batch_size, micro_batch_size
        self.first, self.last, self.seed = first, last, seed

    def __len__(self) -> int:
        return (self.last - self.first) * -(-self.batch_size // self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            batch: list[int] = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.rows != epoch:
                    epoch = position // self.rows
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
                batch.append(int(order[position % self.rows]))
            for begin in range(0, self.batch_size, self.micro_batch_size):
                yield batch[begin : begin + self.micro_batch_size]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that a resumed run needs no saved generator state."""
    entropy = np.random.SeedSequence((seed, step, rank)).generate_state(1, dtype=np.uint64)[0]
    torch.manual_seed(int(entropy >> np.uint64(1)))
