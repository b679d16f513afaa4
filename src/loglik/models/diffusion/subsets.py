r"""Exact quantities of short texts: every conditional :math:`c_\theta(x_i \mid x_S)` for every set S of visible tokens.

:math:`2^L - 1` network evaluations give the bound in all its forms, the exact likelihood of the random-order model that
the bound belongs to, and the chain rule of every order. What the estimators are tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.diffusion.estimators import LONGEST_ENUMERATION, Floats
from loglik.models.diffusion.schedule import LogLinear, Schedule

if TYPE_CHECKING:
    from loglik.models.diffusion.lm import MaskedDiffusionLM

__all__ = ["SubsetTable"]


@dataclass(frozen=True, slots=True, eq=False)
class SubsetTable:
    """Log-conditionals of one text.

    Attributes:
        log_c: (2^L, L) float64, differentiable; entry (m, i) is the log-probability of token i where the tokens of the
            bit set m are hidden, and 0 where i is not in m.
    """

    log_c: Tensor

    @classmethod
    def of(cls, model: MaskedDiffusionLM, x: TokenBatch) -> list[SubsetTable]:
        """One table per row.

        Raises:
            InputError: for a row with no scored token or more than 16.
        """
        x = x.to(model.device)
        packed, _ = x.packed_left()
        out = []
        for row in range(len(packed)):
            real = packed.attention_mask[row]
            ids, columns = packed.ids[row][real], packed.scored_mask[row][real].nonzero()[:, 0]
            length = len(columns)
            if not 1 <= length <= LONGEST_ENUMERATION:
                raise InputError(f"row {row} has {length} scored tokens: enumerate texts of 1 to {LONGEST_ENUMERATION}")
            out.append(cls(_conditionals(model, ids, columns)))
        return out

    @property
    def length(self) -> int:
        """L, scored tokens of the text."""
        return self.log_c.shape[1]

    def sizes(self) -> Tensor:
        """(2^L,) hidden tokens of each mask."""
        return _bits(self.length).sum(1)

    def totals(self) -> Tensor:
        """(2^L,) S(m), the summed log-probability of the hidden tokens."""
        return self.log_c.sum(1)

    def by_count(self) -> Tensor:
        r"""(L,) :math:`g_k`, the mean log-probability of a hidden token where k are hidden, for k = 1 to L."""
        sizes, totals = self.sizes(), self.totals()
        return torch.stack([totals[sizes == k].mean() / k for k in range(1, self.length + 1)])

    def elbo(self) -> Tensor:
        r"""() the bound, :math:`\sum_k g_k`."""
        return self.by_count().sum()

    def at_level(self, level: float) -> Tensor:
        r"""() :math:`E_\lambda S`, masks that hide each token with probability `level`."""
        sizes = self.sizes().double()
        weight = level**sizes * (1 - level) ** (self.length - sizes)
        return (weight * self.totals()).sum()

    def lambda_form(self, nodes: int | None = None) -> Tensor:
        r"""() :math:`\int_0^1 E_\lambda S / \lambda\, d\lambda` by Gauss-Legendre, exact from L / 2 nodes on."""
        level, weight = _gauss(nodes or (self.length + 1) // 2)
        parts = [w / u * self.at_level(u) for u, w in zip(level.tolist(), weight.tolist(), strict=True)]
        return torch.stack(parts).sum()

    def time_form(self, schedule: Schedule | None = None, nodes: int = 64) -> Tensor:
        r"""() :math:`\int_0^1 \sigma_t a_t E_t S\, dt` by Gauss-Legendre in time."""
        time, weight = _gauss(nodes)
        schedule = schedule or LogLinear()
        level, rate, odds = schedule.mask_probability(time), schedule.rate(time), schedule.odds(time)
        factors = weight * rate * odds
        return torch.stack([f * self.at_level(u) for f, u in zip(factors.tolist(), level.tolist(), strict=True)]).sum()

    def all_orders(self) -> Tensor:
        """(L!,) log-likelihoods of the chain rule in every order of `itertools.permutations`; L <= 8."""
        if self.length > 8:
            raise InputError(f"all orders of {self.length} tokens are too many: at most 8")
        return torch.stack([self.in_order(order) for order in permutations(range(self.length))])

    def in_order(self, order: tuple[int, ...]) -> Tensor:
        """() log-likelihood of the chain rule in one order."""
        hidden, terms = (1 << self.length) - 1, []
        for position in order:
            terms.append(self.log_c[hidden, position])
            hidden &= ~(1 << position)
        return torch.stack(terms).sum()

    def mixture(self) -> Tensor:
        r"""() :math:`\log E_\pi p(x \mid \pi)`, the likelihood of the random-order sampler, by dynamic programming.

        With f(V) the mean over orders of the visible set V of their probabilities,
        :math:`f(V) = \frac{1}{|V|} \sum_{i \in V} f(V \setminus i)\, c(x_i \mid V \setminus i)`; no order is
        enumerated.
        """
        full = (1 << self.length) - 1
        by_size = sorted(range(full + 1), key=int.bit_count)
        found: dict[int, Tensor] = {0: self.log_c.new_zeros(())}
        for visible in by_size[1:]:
            members = [i for i in range(self.length) if visible >> i & 1]
            before = [visible & ~(1 << i) for i in members]
            parts = torch.stack([found[b] + self.log_c[full & ~b, i] for b, i in zip(before, members, strict=True)])
            found[visible] = parts.logsumexp(0) - math.log(len(members))
        return found[full]

    @staticmethod
    def likelihoods(tables: list[SubsetTable]) -> LogLikelihood:
        """EXACT log-likelihoods of the random-order model that `MaskedDiffusionLM.sample` draws from."""
        values = torch.stack([table.mixture() for table in tables])
        counts = torch.tensor([table.length for table in tables], device=values.device)
        return LogLikelihood(values, Kind.EXACT, Unit.TOKEN, counts)


def _conditionals(model: MaskedDiffusionLM, ids: Tensor, columns: Tensor) -> Tensor:
    """(2^L, L) of one row without padding."""
    length = len(columns)
    bits = _bits(length).to(ids.device)
    table = torch.zeros(len(bits), length, dtype=torch.float64, device=ids.device)
    per_pass = max(1, model.max_batch_tokens // len(ids))
    for begin in range(1, len(bits), per_pass):
        part = bits[begin : begin + per_pass]
        hidden = torch.zeros(len(part), len(ids), dtype=torch.bool, device=ids.device)
        hidden[:, columns] = part
        row, position = part.nonzero(as_tuple=True)
        log_probs = model.masked_log_probs(ids.expand(len(part), -1), hidden)
        chosen = log_probs.gather(1, ids[columns[position]][:, None])[:, 0].double()
        table = table.index_put((begin + row, position), chosen)
    return table


def _bits(length: int) -> Tensor:
    """(2^L, L) bool, the members of every bit set."""
    return (torch.arange(1 << length)[:, None] >> torch.arange(length) & 1).bool()


def _gauss(nodes: int) -> tuple[Floats, Floats]:
    """Nodes and weights on [0, 1]."""
    found, weights = np.polynomial.legendre.leggauss(nodes)
    return (found + 1) / 2, weights / 2
