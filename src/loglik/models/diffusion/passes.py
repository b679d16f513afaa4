"""Forward passes over rows with hidden tokens: only hidden tokens reach the head, and never the mask token's logit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.models.batch import TokenBatch
from loglik.models.diffusion.estimators import Points
from loglik.models.head import LinearHead, token_log_probs
from loglik.models.tokens import selected_log_probs, widened
from loglik.models.trunk import Trunk

__all__ = ["MaskedPasses"]


class MaskedPasses:
    """A masked predictor's forward passes.

    Args:
        model: the network.
        mask_token_id: what hidden tokens are replaced by, and what is never predicted.
    """

    def __init__(self, model: Any, mask_token_id: int) -> None:
        self.model, self.mask_token_id = model, mask_token_id
        # A bare network with logits cannot be taken apart.
        self.trunk = Trunk.find(model, "input_ids") if hasattr(model, "get_output_embeddings") else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def log_probs(self, ids: Tensor, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """(N, V) log-probabilities of the hidden tokens, float32 or better; -inf at the mask token."""
        ids, hidden = ids.to(self.device), hidden.to(self.device)
        real = torch.ones_like(hidden) if real is None else real.to(self.device)
        return torch.log_softmax(self._logits(*self._states(ids, hidden, real, hidden)), dim=-1)

    def sums(
        self,
        packed: TokenBatch,
        columns: Sequence[NDArray[np.int64]],
        owners: Sequence[int],
        draws: Sequence[Points],
        *,
        max_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums (D,) of each draw, float64 sums in the terms' dtype, and contributions (B, T) of all of them.

        Args:
            packed: left-aligned rows.
            columns: scored columns of each row.
            owners: (D,) the row of each draw.
            draws: D draws.
            max_tokens: tokens per forward pass.
        """
        row = np.repeat(np.asarray(owners, dtype=np.int64), [len(part.weight) for part in draws])
        draw = np.repeat(np.arange(len(draws)), [len(part.weight) for part in draws])
        weight = np.concatenate([part.weight for part in draws]) if draws else np.zeros(0)
        rates = [part.rates for part in draws if part.rates is not None]
        hidden = np.zeros((len(row), packed.ids.shape[1]), dtype=bool)
        scored = np.zeros_like(hidden)
        begin = 0
        for owner, points in zip(owners, draws, strict=True):
            end = begin + len(points.weight)
            hidden[begin:end, columns[owner]] = points.hidden
            scored[begin:end, columns[owner]] = points.scored
            begin = end
        dtype = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        values = torch.zeros(len(draws), dtype=torch.float64, device=self.device)
        out = torch.zeros(packed.ids.numel(), dtype=dtype, device=self.device)
        for part in self._chunks(packed, row, max_tokens):
            own = torch.from_numpy(row[part]).to(self.device)
            width = int(packed.attention_mask[own].sum(1).max())
            marks, wanted = (torch.from_numpy(m[part, :width]).to(self.device) for m in (hidden, scored))
            ids, real = packed.ids[own, :width], packed.attention_mask[own, :width]
            point, column = wanted.nonzero(as_tuple=True)
            terms = self._terms(ids, marks, real, wanted, np.concatenate(rates)[part] if rates else None)
            terms = terms * torch.from_numpy(weight[part]).to(self.device, terms.dtype)[point]
            at = torch.from_numpy(draw[part]).to(self.device)[point]
            values = values.index_add(0, at, terms.double())
            out = out.index_add(0, own[point] * packed.ids.shape[1] + column, terms)
        return values.to(dtype), out.view(packed.ids.shape)

    def _chunks(self, packed: TokenBatch, row: NDArray[np.int64], max_tokens: int) -> Iterator[NDArray[np.int64]]:
        """Points of one forward pass each, those of similar rows together."""
        lengths = packed.attention_mask.sum(1).cpu().numpy()[row]
        order = np.argsort(-lengths, kind="stable")
        begin = 0
        while begin < len(order):
            count = max(1, max_tokens // max(1, int(lengths[order[begin]])))
            yield order[begin : begin + count]
            begin += count

    def _terms(
        self, ids: Tensor, hidden: Tensor, real: Tensor, wanted: Tensor, rates: NDArray[np.float64] | None
    ) -> Tensor:
        """Log-probabilities (N,) of the wanted tokens, or the negative score entropy at them."""
        states, head = self._states(ids, hidden, real, wanted)
        targets = ids[wanted]
        if rates is not None:
            log_c = torch.log_softmax(self._logits(states, head), dim=-1)
            rate, odds = torch.from_numpy(rates).to(log_c.device, log_c.dtype)[wanted.nonzero()[:, 0]].unbind(1)
            chosen = log_c.gather(1, targets[:, None])[:, 0]
            scores = (log_c + odds.log()[:, None]).exp().sum(1)
            entropy = scores - odds * (chosen + odds.log()) + odds * odds.log() - odds
            return -rate * entropy
        if head is not None:
            return token_log_probs(states, targets, head).log_probs
        return selected_log_probs(self._logits(states, head), targets)

    def _states(self, ids: Tensor, hidden: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, LinearHead | None]:
        """What the head reads at the wanted tokens, with the head; or their logits and None."""
        inputs: dict[str, Any] = {"input_ids": ids.masked_fill(hidden, self.mask_token_id)}
        if not bool(real.all()):
            inputs["attention_mask"] = real.long()
        if self.trunk is None:
            return self.model(**inputs).logits[wanted], None
        states = self.trunk.hidden(**inputs)[wanted]
        head = self.trunk.head
        if head is None or head.softcap is not None:
            return self.trunk.logits(states), None
        return states, self._without_mask(head)

    def _logits(self, states: Tensor, head: LinearHead | None) -> Tensor:
        """(N, V) logits in float32 or better, -inf at the mask token."""
        if head is not None:
            return head.logits(states)
        at_mask = torch.arange(states.shape[-1], device=states.device) == self.mask_token_id
        return widened(states).masked_fill(at_mask, -torch.inf)

    def _without_mask(self, head: LinearHead) -> LinearHead:
        """The head with a bias of -inf at the mask token: its tiles then leave it out."""
        size = head.weight.shape[0]
        at_mask = torch.arange(size, device=head.weight.device) == self.mask_token_id
        bias = head.bias if head.bias is not None else head.weight.new_zeros(size)
        return replace(head, bias=bias.masked_fill(at_mask, -torch.inf))
