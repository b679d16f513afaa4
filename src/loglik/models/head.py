r"""The LM head without its logits: token log-probabilities tile by tile, forward and backward.

For a hidden state :math:`h` and head :math:`z_v = f(h^\top w_v + b_v)` with scale and soft-cap :math:`f`,

.. math:: \log p(y \mid h) = z_y - \log \sum_v e^{z_v}

is an online log-sum-exp over tiles of the vocabulary, in float32 or better; a tile of logits is the largest thing that
ever exists. The backward pass computes the tiles again and turns each into gradients at once
(:math:`\partial \log p / \partial z_v = [v = y] - p_v`). The online log-sum-exp is Milakov and Gimelshein's
(arXiv 1805.02867); cut cross-entropy (arXiv 2411.09009) is the same idea in one GPU kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglik.models.tokens import greedy_match, selected_log_probs, widened

__all__ = ["HeadScores", "LinearHead", "plain_token_log_probs", "token_log_probs"]

# A tile of logits (rows x columns of the vocabulary): small enough to stay in a CPU's cache between the matrix product
# and the exponentials, large enough for the product to run at full speed.
_CPU_TILE = (1024, 1024)
_GPU_TILE = (4096, 32768)


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits as a function of the last hidden state: linear, then scaled, then soft-capped.

    Args:
        weight: (V, D).
        bias: (V,), or None.
        scale: factor on the logits (Cohere, Granite, Falcon-H1, tied T5).
        softcap: c in c tanh(z / c) (Gemma), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """(N, end - begin) logits of a range of the vocabulary, float32 or better."""
        bias = None if self.bias is None else self.bias[begin:end]
        out = widened(torch.nn.functional.linear(hidden, self.weight[begin:end], bias))
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


class HeadScores(NamedTuple):
    """What one pass over the vocabulary gives.

    Attributes:
        log_probs: (N,) nats, one per target.
        greedy: (N,) bool, whether the target has the highest logit.
        log_mass: (P,) log of the probability of `subset` at every hidden state, where one was given.
    """

    log_probs: Tensor
    greedy: Tensor
    log_mass: Tensor | None = None


def plain_token_log_probs(hidden: Tensor, targets: Tensor, head: LinearHead, rows: Tensor | None = None) -> HeadScores:
    """The same numbers from all logits at once: the reference that `token_log_probs` is tested against."""
    logits = head.logits(hidden)
    logits = logits if rows is None else logits[rows]
    return HeadScores(selected_log_probs(logits, targets), greedy_match(logits.detach(), targets))


def token_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: LinearHead,
    *,
    rows: Tensor | None = None,
    subset: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> HeadScores:
    """Log-probabilities of target tokens given hidden states, without ever holding their logits.

    Args:
        hidden: (P, D) last hidden states.
        targets: (N,) token ids.
        head: of the model.
        rows: (N,) which hidden state predicts each target, in ascending order; the n-th the n-th by default.
        subset: (V,) bool; log-mass of these tokens at every hidden state (no gradient).
        tile: rows and columns of logits held at a time; by device if None.

    Raises:
        ValueError: for a target outside the vocabulary.

    Returns:
        `log_probs` differentiable in the hidden states and in the head's weight and bias, by recomputation: nothing of
        size V is kept for the backward pass. `greedy` and `log_mass` carry no gradient.
    """
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < head.weight.shape[0]:
        raise ValueError(f"a target is no token of the vocabulary of {head.weight.shape[0]}")
    rows = torch.arange(len(targets), device=hidden.device) if rows is None else rows
    tile = tile or (_CPU_TILE if hidden.device.type == "cpu" else _GPU_TILE)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)):
        log_probs, greedy = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, rows, head.scale, head.softcap, tile
        )
        with torch.no_grad():
            mass = None if subset is None else _forward(hidden, targets[:0], rows[:0], head, subset, tile)[2]
        return HeadScores(log_probs, greedy, mass)
    log_probs, greedy, mass, _ = _forward(hidden, targets, rows, head, subset, tile)
    return HeadScores(log_probs, greedy, mass)


class _Tile(NamedTuple):
    """One tile of logits, and which of the targets lie in it, at what row and column."""

    begin: int
    end: int
    logits: Tensor
    which: Tensor
    row: Tensor
    column: Tensor


def _tiles(hidden: Tensor, targets: Tensor, rows: Tensor, head: LinearHead, width: int) -> Iterator[_Tile]:
    """Tiles over the vocabulary for one block of hidden states; `rows` counts from the block's first."""
    vocabulary = head.weight.shape[0]
    by_token, order = targets.sort()
    edges = torch.arange(0, vocabulary + width, width, device=targets.device)
    cuts = torch.searchsorted(by_token, edges).tolist()
    for i, begin in enumerate(range(0, vocabulary, width)):
        index = order[cuts[i] : cuts[i + 1]]
        end = min(begin + width, vocabulary)
        yield _Tile(begin, end, head.logits(hidden, begin, end), index, rows[index], targets[index] - begin)


def _blocks(hidden: Tensor, rows: Tensor, height: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of hidden states, and the targets they predict."""
    edges = [*range(0, len(hidden), height), len(hidden)]
    cuts = torch.searchsorted(rows, torch.tensor(edges, device=rows.device)).tolist()
    for i in range(len(edges) - 1):
        yield slice(edges[i], edges[i + 1]), slice(cuts[i], cuts[i + 1])


def _forward(
    hidden: Tensor, targets: Tensor, rows: Tensor, head: LinearHead, subset: Tensor | None, tile: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-probs (N,), greedy (N,), log-mass (P,) and log-sum-exp (P,)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    log_probs = torch.empty(len(targets), dtype=dtype, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    lse = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    mass = None if subset is None else torch.empty_like(lse)
    for block, wanted in _blocks(hidden, rows, tile[0]):
        count = block.stop - block.start
        own = rows[wanted] - block.start
        chosen = torch.empty(wanted.stop - wanted.start, dtype=dtype, device=hidden.device)
        top = torch.full((count,), -torch.inf, dtype=dtype, device=hidden.device)
        total = torch.zeros_like(top)
        part = torch.zeros_like(top)
        for piece in _tiles(hidden[block], targets[wanted], own, head, tile[1]):
            chosen[piece.which] = piece.logits[piece.row, piece.column]
            new = torch.maximum(top, piece.logits.amax(1))
            # Where all is -inf so far, the difference would be NaN: nothing has been summed yet.
            shift = torch.where(new == -torch.inf, 0.0, new)
            decay = torch.exp(top - shift)
            weights = piece.logits.sub_(shift[:, None]).exp_()
            total = total * decay + weights.sum(1)
            if subset is not None:
                part = part * decay + weights[:, subset[piece.begin : piece.end]].sum(1)
            top = new
        lse[block] = top + total.log()
        if mass is not None:
            mass[block] = part.log() - total.log()
        # Target minus maximum, then minus the log of a sum that holds the target's own term: never above 0.
        log_probs[wanted] = (chosen - top[own]) - total.log()[own]
        greedy[wanted] = chosen >= top[own]
    return log_probs, greedy, mass, lse


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` with its gradient by recomputation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        scale: float,
        softcap: float | None,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        log_probs, greedy, _, lse = _forward(
            hidden, targets, rows, LinearHead(weight, bias, scale, softcap), None, tile
        )
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.form = (scale, softcap, tile)
        ctx.mark_non_differentiable(greedy)
        return log_probs, greedy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, rows, lse = ctx.saved_tensors
        scale, softcap, tile = ctx.form
        head = LinearHead(weight, bias, scale, softcap)
        needs = ctx.needs_input_grad
        # Sums over many tiles are kept in float32 or better, whatever the model's dtype.
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and needs[2] else None
        for block, wanted in _blocks(hidden, rows, tile[0]):
            own = rows[wanted] - block.start
            here = hidden[block]
            total = torch.zeros(len(here), dtype=lse.dtype, device=grad.device).index_add_(0, own, grad[wanted])
            for piece in _tiles(here, targets[wanted], own, head, tile[1]):
                slope = None if softcap is None else 1 - (piece.logits / softcap).square()
                back = (piece.logits - lse[block, None]).exp_().mul_(-total[:, None])
                back.index_put_((piece.row, piece.column), grad[wanted][piece.which], accumulate=True)
                back = back if slope is None else back.mul_(slope)
                back = back.mul_(scale).to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[block] += back @ weight[piece.begin : piece.end]
                if d_weight is not None:
                    d_weight[piece.begin : piece.end] += back.T @ here
                if d_bias is not None:
                    d_bias[piece.begin : piece.end] += back.sum(0)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 5,
        )
