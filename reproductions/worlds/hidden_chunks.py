r"""Texts in chunks that follow a hidden value each: a masked language model whose conditionals are exact.

A text is C chunks of S tokens out of A symbols. Chunk b has a hidden value :math:`c_b`. One of its tokens, the carrier,
is that value; any other token j is :math:`(c_b + j) \bmod A` with probability `keep` and else one of the other symbols,
each as likely. Values are independent and uniform, or follow each other: :math:`c_b = c_{b-1} + 1 \bmod A` with
probability `follow`, else one of the other values, each as likely. Whatever is visible, the law of every hidden token
is a sum over the values, by forward and backward recursions over chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["HiddenChunks"]


@dataclass(frozen=True)
class HiddenChunks:
    """The texts and their masked language model; everything in float64 and nats.

    Args:
        chunks: C.
        size: S, tokens of a chunk.
        alphabet: A, symbols; the mask token is the next number.
        keep: probability that a token follows its chunk's value.
        follow: probability that a value follows the last one; None: values are independent.
        carrier: which token of a chunk is its value.

    Raises:
        InputError: for settings out of range.
    """

    chunks: int = 8
    size: int = 8
    alphabet: int = 8
    keep: float = 0.98
    follow: float | None = None
    carrier: int = 0

    def __post_init__(self) -> None:
        if self.chunks < 1 or self.size < 1 or self.alphabet < 2:
            raise InputError(
                "chunks and size must be at least 1 and alphabet at least 2, got "
                f"{self.chunks}, {self.size} and {self.alphabet}"
            )
        for name, value in (("keep", self.keep), ("follow", self.follow)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"{name} must lie strictly between 0 and 1, got {value}")
        if not 0 <= self.carrier < self.size:
            raise InputError(f"carrier must be one of the {self.size} tokens of a chunk, got {self.carrier}")

    @property
    def length(self) -> int:
        """T = C S, tokens of a text."""
        return self.chunks * self.size

    @property
    def mask_token_id(self) -> int:
        """What stands for a hidden token."""
        return self.alphabet

    @property
    def entropy(self) -> float:
        """Of a text: its values are known from it, so that it is that of the values and of each token's noise."""
        values = math.log(self.alphabet) + (self.chunks - 1) * self._spread(self.follow or 1 / self.alphabet)
        return values + self.chunks * (self.size - 1) * self._spread(self.keep)

    @cached_property
    def emission(self) -> Tensor:
        """(S, A, A) probability of each symbol as token j of a chunk, given its value."""
        right = (torch.arange(self.size)[:, None] + torch.arange(self.alphabet)) % self.alphabet
        table = self._others(self.keep).expand(self.size, self.alphabet, self.alphabet)
        table = table.scatter(2, right[..., None], self.keep)
        table[self.carrier] = torch.eye(self.alphabet)
        return table

    @cached_property
    def transition(self) -> Tensor:
        """(A, A) probability of each value given the last chunk's."""
        stay = self.follow or 1 / self.alphabet
        following = (torch.arange(self.alphabet)[:, None] + 1) % self.alphabet
        return self._others(stay).expand(self.alphabet, self.alphabet).scatter(1, following, stay)

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B,) log-probability of the visible tokens of (B, T) texts; by default all are."""
        hidden = torch.zeros_like(ids, dtype=torch.bool) if hidden is None else hidden
        return self._forward(self._evidence(ids, hidden))[:, -1].logsumexp(1)

    def masked_log_probs(self, ids: Tensor, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """(N, A) log-probabilities of the hidden tokens of (B, T) texts given the visible ones, in row order.

        They are rounded to 12 decimals: what is equally likely comes out equal, and rules that compare confidences do
        not turn on the last bit.

        Raises:
            InputError: for rows that are no whole texts.
        """
        if real is not None and not bool(real.all()):
            raise InputError("these rows are whole texts: pad nothing")
        posterior = self._posterior(self._evidence(ids, hidden))
        marginals = torch.einsum("bkc,jcv->bkjv", posterior, self.emission).reshape(*ids.shape, self.alphabet)
        return marginals[hidden].log().round(decimals=12)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(n, T) texts."""
        values = [torch.randint(self.alphabet, (n,), generator=generator)]
        for _ in range(1, self.chunks):
            values.append(torch.multinomial(self.transition[values[-1]], 1, generator=generator)[:, 0])
        chances = self.emission[:, torch.stack(values, 1)]  # (S, n, C, A)
        drawn = torch.multinomial(chances.flatten(0, 2), 1, generator=generator)
        return drawn.view(self.size, n, self.chunks).permute(1, 2, 0).reshape(n, self.length)

    # ------------------------------------------------------------------ recursions
    def _evidence(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, A) log-probability of the visible tokens of each chunk, given each value."""
        if ids.dim() != 2 or ids.shape[1] != self.length:
            raise InputError(f"texts have shape (B, {self.length}), got {tuple(ids.shape)}")
        by_token = self.emission.log().transpose(1, 2)  # (S, symbol, value)
        table = torch.cat([by_token, torch.zeros_like(by_token[:, :1])], 1)  # a hidden token says nothing
        tokens = ids.masked_fill(hidden, self.alphabet).view(-1, self.chunks, self.size)
        return table[torch.arange(self.size), tokens].sum(2)

    def _forward(self, evidence: Tensor) -> Tensor:
        """(B, C, A) log-probability of the visible tokens up to each chunk and of its value."""
        step = self.transition.log()
        found = [evidence[:, 0] - math.log(self.alphabet)]
        for chunk in range(1, self.chunks):
            found.append((found[-1][:, :, None] + step).logsumexp(1) + evidence[:, chunk])
        return torch.stack(found, 1)

    def _posterior(self, evidence: Tensor) -> Tensor:
        """(B, C, A) probability of each chunk's value given all visible tokens."""
        step = self.transition.log()
        behind = [torch.zeros_like(evidence[:, 0])]
        for chunk in range(self.chunks - 1, 0, -1):
            behind.append((step + (evidence[:, chunk] + behind[-1])[:, None]).logsumexp(2))
        return (self._forward(evidence) + torch.stack(behind[::-1], 1)).softmax(2)

    def _others(self, likely: float) -> Tensor:
        """() probability of each outcome but the likely one."""
        return torch.tensor((1 - likely) / (self.alphabet - 1), dtype=torch.float64)

    def _spread(self, likely: float) -> float:
        """Entropy of one likely outcome and the others, each as likely."""
        return -likely * math.log(likely) - (1 - likely) * math.log((1 - likely) / (self.alphabet - 1))
