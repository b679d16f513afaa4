"""Samplers of masked-diffusion models, with the network evaluations they needed.

`first_hitting` is exact: one token at a time in a random order. `ancestral` follows the reverse process on a grid of
times and reveals several tokens at once, each from its own marginal: fewer evaluations, another law. A network without
time conditioning need not run again where nothing changed (RADD, arXiv 2406.03736): with the cache, N steps cost
:math:`N (1 - (1 - 1/N)^L)` evaluations in expectation on a uniform grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.diffusion.schedule import LogLinear, Schedule

__all__ = [
    "Canvas",
    "DiffusionSample",
    "MaskedConditionals",
    "ancestral",
    "canvas_of",
    "expected_evaluations",
    "first_hitting",
    "in_order",
    "infilling",
]


class MaskedConditionals(Protocol):
    """Gives the distribution of every hidden token given the visible ones."""

    mask_token_id: int

    def masked_log_probs(self, ids: Tensor, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """(N, V) log-probabilities of the hidden tokens of (B, T) rows, in row order."""


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionSample:
    """Generated rows with their cost.

    Attributes:
        tokens: prompts and what was generated, which is scored.
        evaluations: (B,) long, network evaluations of each row.
    """

    tokens: TokenBatch
    evaluations: Tensor


@dataclass(slots=True)
class Canvas:
    """Rows that are being filled in.

    Args:
        ids: (B, T) tokens, the mask token where hidden.
        hidden: (B, T) bool.
        real: (B, T) bool.
        generated: (B, T) bool, what was hidden at the start.
        starts: (B,) where the generated part begins.
    """

    ids: Tensor
    hidden: Tensor
    real: Tensor
    generated: Tensor
    starts: Tensor

    def conditionals(self, model: MaskedConditionals, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, V) probabilities of the hidden tokens of some rows, float64 on the CPU, with their rows and columns."""
        hidden = self.hidden[rows]
        found = model.masked_log_probs(self.ids[rows], hidden, self.real[rows])
        row, column = hidden.nonzero(as_tuple=True)
        return found.double().exp().cpu(), rows[row], column

    def reveal(self, row: Tensor, column: Tensor, tokens: Tensor) -> None:
        """Fill in tokens."""
        self.ids[row, column] = tokens
        self.hidden[row, column] = False

    def copy(self) -> Canvas:
        """The same, to be filled in without changing this one."""
        return replace(self, ids=self.ids.clone(), hidden=self.hidden.clone())

    def sample(self, evaluations: Tensor) -> DiffusionSample:
        """The rows as they are."""
        return DiffusionSample(TokenBatch(self.ids, self.real, self.generated, self.starts), evaluations)


def canvas_of(model: MaskedConditionals, prompt: TokenBatch, *, n: int = 1, length: int) -> Canvas:
    """`n` copies of each prompt row followed by `length` hidden tokens.

    Raises:
        InputError: for a length or number below 1.
    """
    for name, value in (("n", n), ("length", length)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    rows = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True) for _ in range(n)]
    filled = TokenBatch.from_lists([[*row, *[model.mask_token_id] * length] for row in rows], starts=[*map(len, rows)])
    assert filled.starts is not None
    return Canvas(filled.ids, filled.scored_mask.clone(), filled.attention_mask, filled.scored_mask, filled.starts)


def infilling(model: MaskedConditionals, rows: Sequence[Sequence[int]]) -> Canvas:
    """Rows in which the mask token stands wherever something is to be filled in; everything else stays.

    Raises:
        InputError: naming a row without a gap.
    """
    filled = TokenBatch.from_lists(rows, starts=[0] * len(rows), scored_from=[0] * len(rows))
    gaps = (filled.ids == model.mask_token_id) & filled.attention_mask
    for i, row in enumerate(gaps):
        if not bool(row.any()):
            raise InputError(f"row {i} has no gap to fill in: put the mask token where text is missing")
    return Canvas(filled.ids, gaps.clone(), filled.attention_mask, gaps, gaps.int().argmax(1))


@torch.no_grad()
def first_hitting(
    model: MaskedConditionals,
    prompt: TokenBatch | Canvas,
    *,
    n: int = 1,
    length: int = 64,
    generator: torch.Generator | None = None,
) -> DiffusionSample:
    r"""Exact samples of :math:`E_\pi \prod_l c_\theta(x_{\pi_l} \mid x_{\pi_{<l}})`: one evaluation per token.

    Of the reverse process in continuous time only the events are simulated: the next token to appear is uniform among
    those hidden, whatever the schedule (arXiv 2409.02908).

    Args:
        model: gives conditionals.
        prompt: rows to continue, or a canvas, which stays as it is (`n` and `length` are not for it).
        n: samples per prompt row.
        length: tokens to generate.
        generator: of the random numbers, on the CPU.
    """

    def choose(hidden: Tensor) -> Tensor:
        keys = torch.rand(hidden.shape, generator=generator, dtype=torch.float64)
        return keys.masked_fill(~hidden, -1.0).argmax(1)

    return _one_by_one(model, _canvas(model, prompt, n, length), choose, generator)


@torch.no_grad()
def in_order(
    model: MaskedConditionals,
    prompt: TokenBatch | Canvas,
    *,
    n: int = 1,
    length: int = 64,
    order: Literal["left_to_right", "right_to_left"] = "left_to_right",
    generator: torch.Generator | None = None,
) -> DiffusionSample:
    """Exact samples of the chain rule in one order (`FixedOrder` scores them): one evaluation per token.

    Raises:
        InputError: for an unknown order.
    """
    if order not in ("left_to_right", "right_to_left"):
        raise InputError(f"order must be 'left_to_right' or 'right_to_left', got {order!r}")

    def choose(hidden: Tensor) -> Tensor:
        columns = torch.arange(1, hidden.shape[1] + 1)
        keys = columns if order == "right_to_left" else -columns
        return keys.expand(hidden.shape).masked_fill(~hidden, -hidden.shape[1] - 1).argmax(1)

    return _one_by_one(model, _canvas(model, prompt, n, length), choose, generator)


@torch.no_grad()
def ancestral(
    model: MaskedConditionals,
    prompt: TokenBatch | Canvas,
    *,
    n: int = 1,
    length: int = 64,
    steps: int = 64,
    method: Literal["tweedie", "euler"] = "tweedie",
    schedule: Schedule | None = None,
    cache: bool = True,
    generator: torch.Generator | None = None,
) -> DiffusionSample:
    r"""The reverse process on a uniform grid of times, several tokens at a step.

    From t to s a hidden token appears with probability :math:`(\lambda_t - \lambda_s) / \lambda_t` (``tweedie``) or
    :math:`(t - s)\, \sigma_t (1 - \lambda_t) / \lambda_t` (``euler``), each from its own marginal; the last step
    reveals what is left. Tokens that appear together are drawn independently: with few steps the law differs from the
    model's.

    Args:
        model: gives conditionals.
        prompt: rows to continue, or a canvas.
        n: samples per prompt row.
        length: tokens to generate.
        steps: of the grid.
        method: how likely a token is to appear in a step.
        schedule: noise; log-linear by default.
        cache: evaluate a row again only if it has changed; the samples are the same either way.
        generator: of the random numbers, on the CPU.

    Raises:
        InputError: for steps below 1 or an unknown method.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if method not in ("tweedie", "euler"):
        raise InputError(f"method must be 'tweedie' or 'euler', got {method!r}")
    canvas = _canvas(model, prompt, n, length)
    chances = _chances(schedule or LogLinear(), steps, method)
    size = len(canvas.ids)
    evaluations = torch.zeros(size, dtype=torch.long)
    known: Tensor | None = None
    changed = torch.ones(size, dtype=torch.bool)
    for chance in chances:
        live = canvas.hidden.any(1)
        if not bool(live.any()):
            break
        again = live & changed if cache else live
        if bool(again.any()):
            probs, row, column = canvas.conditionals(model, again.nonzero()[:, 0])
            if known is None:
                known = torch.zeros(*canvas.ids.shape, probs.shape[1], dtype=probs.dtype)
            known[row, column] = probs
            evaluations += again
        assert known is not None
        appear = (torch.rand(canvas.ids.shape, generator=generator, dtype=torch.float64) < chance) & canvas.hidden
        # One number per place and step, whatever has changed: the cache cannot alter a sample.
        uniform = torch.rand(canvas.ids.shape, generator=generator, dtype=torch.float64)
        row, column = appear.nonzero(as_tuple=True)
        canvas.reveal(row, column, _inverse(known[row, column], uniform[row, column]))
        changed = appear.any(1)
    return canvas.sample(evaluations)


def expected_evaluations(length: int, steps: int) -> float:
    r""":math:`N (1 - (1 - 1/N)^L)`: evaluations of `ancestral` with the cache, log-linear schedule, in expectation."""
    return steps * -np.expm1(length * np.log1p(-1 / steps)) if steps > 1 else 1.0


def _chances(schedule: Schedule, steps: int, method: str) -> list[float]:
    """Probability that a hidden token appears in each step; 1 in the last."""
    grid = np.linspace(1, 0, steps + 1)
    level = schedule.mask_probability(grid)
    if method == "tweedie":
        found = (level[:-1] - level[1:]) / level[:-1]
    else:
        found = np.minimum(1.0, schedule.rate(grid[:-1]) * schedule.odds(grid[:-1]) / steps)
    return [*found[:-1].tolist(), 1.0]


def _one_by_one(
    model: MaskedConditionals,
    canvas: Canvas,
    choose: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
) -> DiffusionSample:
    """Reveal the chosen token of every row that has a hidden one, until none has."""
    evaluations = torch.zeros(len(canvas.ids), dtype=torch.long)
    while bool(canvas.hidden.any()):
        live = canvas.hidden.any(1).nonzero()[:, 0]
        probs, row, column = canvas.conditionals(model, live)
        picked = choose(canvas.hidden[live])
        own = column == picked[torch.searchsorted(live, row)]
        tokens = torch.multinomial(probs[own], 1, generator=generator)[:, 0]
        canvas.reveal(live, picked, tokens)
        evaluations[live] += 1
    return canvas.sample(evaluations)


def _canvas(model: MaskedConditionals, prompt: TokenBatch | Canvas, n: int, length: int) -> Canvas:
    return prompt.copy() if isinstance(prompt, Canvas) else canvas_of(model, prompt, n=n, length=length)


def _inverse(probs: Tensor, uniform: Tensor) -> Tensor:
    """(N,) tokens by inversion of (N, V) distributions."""
    edges = probs.cumsum(1)
    found = torch.searchsorted(edges, uniform[:, None] * edges[:, -1:], right=True)[:, 0]
    return found.clamp_max(probs.shape[1] - 1)
