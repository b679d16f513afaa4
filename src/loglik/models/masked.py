r"""Masked language models: pseudo-log-likelihood, a SURROGATE of :math:`\log p(x)`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import context_length
from loglik.models.encode import Layout
from loglik.models.tokens import labelled
from loglik.models.trunk import Trunk, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MaskedLM"]


class MaskedLM:
    r"""A masked language model of transformers: one forward pass per scored token.

    .. math:: \text{PLL}(x) = \sum_t \log p_\theta(x_t \mid x_{\setminus M_t})

    where :math:`M_t = \{t\}` (``original``, Salazar et al., arXiv 1910.14659), or :math:`t` and the later tokens of its
    own word (``within_word_l2r``, Kauf and Ivanova, arXiv 2305.10588), which removes the reward for words whose first
    pieces give the last ones away. The sum is not the logarithm of a distribution over texts: its kind is SURROGATE.

    Args:
        model: any model of `AutoModelForMaskedLM`.
        tokenizer: the tokenizer of its vocabulary; its mask token is used.
        variant: which tokens are masked together.
        max_batch_tokens: tokens per forward pass; masked copies of a row are cut into passes of this size.

    Raises:
        InputError: if no mask token is known.
    """

    kind = Kind.SURROGATE
    unit = Unit.TOKEN
    layout: Layout = "masked"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        variant: Literal["original", "within_word_l2r"] = "original",
        mask_token_id: int | None = None,
        max_batch_tokens: int = 4096,
    ) -> None:
        if variant not in ("original", "within_word_l2r"):
            raise InputError(f"variant must be 'original' or 'within_word_l2r', got {variant!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.variant = variant
        self.max_batch_tokens = max_batch_tokens
        found = mask_token_id if mask_token_id is not None else getattr(tokenizer, "mask_token_id", None)
        if found is None:
            raise InputError("a masked language model needs a mask token: the tokenizer has none, pass mask_token_id")
        self.mask_token_id: int = found

    @cached_property
    def trunk(self) -> Trunk | None:
        """The model without its head, and the head by itself; None for a network that cannot be taken apart."""
        return Trunk.find(self.model, "input_ids")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """Longest row in tokens, special tokens included."""
        positions = context_length(self.model.config)
        for name, module in self.model.named_modules():
            # RoBERTa counts positions from after the padding index.
            reserved = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and reserved is not None and positions is not None:
                return min(positions, int(module.num_embeddings) - int(reserved) - 1)
        return positions

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Pseudo-log-likelihood (B,) of the scored tokens given all others, with its terms (B, T)."""
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and (B, T) bool whether each scored token is the model's first choice."""
        x = x.to(self.device)
        packed, origin = x.packed_left()
        terms = torch.zeros(packed.ids.shape, dtype=torch.float32, device=self.device)
        greedy = torch.zeros_like(packed.attention_mask)
        rows, columns = packed.scored_mask.nonzero(as_tuple=True)
        per_pass = max(1, self.max_batch_tokens // max(1, packed.ids.shape[1]))
        for begin in range(0, len(rows), per_pass):
            row, column = rows[begin : begin + per_pass], columns[begin : begin + per_pass]
            masked = packed.ids[row].masked_fill(self._masked_together(packed, row, column), self.mask_token_id)
            real = packed.attention_mask[row]
            width = int(real.sum(1).max())
            inputs = {"input_ids": masked[:, :width], "attention_mask": real[:, :width].long()}
            at = (torch.arange(len(row), device=self.device), column)
            targets = packed.ids[row, column]
            # Only the state under the mask reaches the head.
            chosen, first = token_scores(self.trunk, self.model, inputs, at, targets)
            terms = terms.to(chosen.dtype).index_put((row, column), chosen)
            greedy[row, column] = first
        return labelled(x, packed, origin, terms, greedy, kind=self.kind)

    def _masked_together(self, packed: TokenBatch, row: Tensor, column: Tensor) -> Tensor:
        """(N, T) the tokens hidden while ``(row, column)`` is predicted."""
        positions = torch.arange(packed.ids.shape[1], device=self.device)
        this = positions == column[:, None]
        if self.variant == "original":
            return this
        if packed.words is None:
            raise ValueError("within_word_l2r needs to know words: give TokenBatch.words or score text")
        words = packed.words[row]
        own = packed.words[row, column][:, None]
        return this | ((words == own) & (own >= 0) & (positions > column[:, None]))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({type(self.model).__name__}, {count:,} parameters, {self.variant})"
