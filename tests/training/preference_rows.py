"""Preference rows and models for the tests of training."""

from __future__ import annotations

import torch

from loglik.models.causal import CausalLM
from loglik.training import Row
from zoo import CAUSAL, build


def policy() -> CausalLM:
    """A tiny model; the same weights at every call."""
    return CausalLM(build(CAUSAL["llama"], 20))


def pairs(count: int = 12, *, seed: int = 0) -> list[Row]:
    """Preference pairs of uneven length, with token weights."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 20, (size,), generator=generator).tolist()

    rows = []
    for i in range(count):
        both = (ids(1, 6), ids(1, 6))
        weights = tuple([1.0 + 0.5 * (j % 2) for j in range(len(c))] for c in both)
        rows.append(Row(ids(2, 6), both, name=f"line {i + 1}", weights=weights))
    return rows


def labelled(count: int = 12) -> list[Row]:
    """Single completions, every other one desirable."""
    return [
        Row(row.prompt, row.completions[:1], values={"labels": (float(i % 2),)}, name=row.name)
        for i, row in enumerate(pairs(count))
    ]


def weights_of(model: CausalLM) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}
