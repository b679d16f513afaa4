r"""Discrete vectors small enough to enumerate with all their partial states, and an Ising model among them.

A *state* of vectors with D entries of K values has at every entry 0 for "unknown" or the value plus one, so there are
:math:`(K + 1)^D` of them. `PartialStates` lists them and computes on them, exactly: the marginals of a distribution,
and what an any-order model makes of its conditionals.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loglik.errors import InputError
from loglik.models.any_order import AnyOrderMarginals

__all__ = ["Ising", "PartialStates", "Table", "tabular"]


@dataclass(frozen=True)
class PartialStates:
    r"""All :math:`N = (K + 1)^D` states of vectors with `dims` entries of `values` values, in lexicographic order."""

    dims: int
    values: int

    @cached_property
    def states(self) -> Tensor:
        """(N, D) long: 0 where unknown, value + 1 where known."""
        return torch.tensor(list(itertools.product(range(self.values + 1), repeat=self.dims)))

    @cached_property
    def known(self) -> Tensor:
        """(N, D) bool."""
        return self.states > 0

    @cached_property
    def x(self) -> Tensor:
        """(N, D) long, the values; -1 where unknown."""
        return self.states - 1

    @cached_property
    def sizes(self) -> Tensor:
        """(N,) long, |S|: how many entries are known."""
        return self.known.sum(1)

    @cached_property
    def complete(self) -> Tensor:
        """(K^D,) long, the states without unknown entries; their values are in lexicographic order."""
        return (self.sizes == self.dims).nonzero().flatten()

    @cached_property
    def powers(self) -> Tensor:
        """(D,) long, how far apart two states are that differ by one at an entry."""
        return (self.values + 1) ** torch.arange(self.dims - 1, -1, -1)

    def index(self, states: Tensor) -> Tensor:
        """(B,) which of the states the rows of `states` (B, D) are."""
        return (states * self.powers).sum(-1)

    def log_marginals(self, log_p: Tensor) -> Tensor:
        r"""(N,) :math:`\log \sum_{x \supset x_S} p(x)` of every state, from (K^D,) log-probabilities of vectors."""
        table = log_p.reshape((self.values,) * self.dims)
        for entry in range(self.dims):
            table = torch.cat([table.logsumexp(entry, keepdim=True), table], entry)
        return table.reshape(-1)

    def log_conditionals(self, log_p: Tensor) -> Tensor:
        r"""(N, D, K) :math:`\log p(x_d = k \mid x_S)` of every state and unknown entry; uniform at known ones."""
        marginals = self.log_marginals(log_p)
        own = torch.arange(len(self.states))[:, None, None]
        child = own + self.powers[:, None] * torch.arange(1, self.values + 1)
        child = torch.where(self.known[..., None], own, child)  # of a known entry there is no child
        return (marginals[child] - marginals[:, None, None]).log_softmax(-1)

    # ------------------------------------------------------------------ what conditionals make
    def chain(self, log_c: Tensor) -> Tensor:
        """(N,) log-probability of every state by the chain rule through its known entries in ascending order.

        Args:
            log_c: (N, D, K) conditionals of an any-order model in every state.
        """
        out = log_c.new_zeros(len(self.states))
        for size in range(1, self.dims + 1):
            rows = (self.sizes == size).nonzero().flatten()
            last = self.dims - 1 - self.known[rows].flip(1).long().argmax(1)
            out[rows] = self._step(log_c, out, rows, last)
        return out

    def any_order(self, log_c: Tensor) -> Tensor:
        r"""(N,) :math:`\log E_\sigma \prod p(x_{\sigma_t} \mid x_{\sigma_{<t}})`, the mean over all orders of S.

        The complete states' are those of the sampler that draws its order at random. No order is enumerated: the last
        entry of an order of S is any of S, :math:`f(x_S) = \frac{1}{|S|} \sum_{d \in S} f(x_{S \setminus d})\,
        p(x_d \mid x_{S \setminus d})`.
        """
        out = log_c.new_zeros(len(self.states))
        for size in range(1, self.dims + 1):
            rows = (self.sizes == size).nonzero().flatten()
            parts = log_c.new_full((len(rows), self.dims), -math.inf)
            for entry in range(self.dims):
                here = self.known[rows, entry]
                parts[here, entry] = self._step(log_c, out, rows[here], torch.full((int(here.sum()),), entry))
            out[rows] = parts.logsumexp(1) - math.log(size)
        return out

    def mean_order_kl(self, log_c: Tensor, log_p: Tensor) -> Tensor:
        r"""() :math:`E_\sigma \text{KL}(p_\sigma \,\|\, p)` over all D! orders, nats.

        By convexity at least the divergence of the sampler that draws its order at random. The random-order sampler is
        in state :math:`x_S` after |S| steps with probability :math:`f(x_S) / \binom{D}{|S|}`, and goes on with any of
        the other entries.
        """
        mass = self.any_order(log_c).exp()
        chosen = torch.tensor([math.comb(self.dims, int(size)) for size in self.sizes])
        negative_entropy = (log_c.exp() * log_c).sum(-1).masked_fill(self.known, 0.0).sum(-1)
        steps = (self.dims - self.sizes).clamp_min(1)
        return (mass / chosen * negative_entropy / steps).sum() - (mass[self.complete] * log_p).sum()

    def _step(self, log_c: Tensor, out: Tensor, rows: Tensor, entry: Tensor) -> Tensor:
        """(R,) log-probability of states `rows` if `entry` (R,) became known last."""
        digit = self.states[rows, entry]
        before = rows - digit * self.powers[entry]
        return out[before] + log_c[before, entry, digit - 1]


class Table(nn.Module):
    """A network that looks its output up: `entries` (N, ...) in the order of `space`."""

    def __init__(self, space: PartialStates, entries: Tensor) -> None:
        super().__init__()
        self.space = space
        self.entries = nn.Parameter(entries.clone())

    def forward(self, states: Tensor) -> Tensor:
        """(B, D) states to (B, ...)."""
        return self.entries[self.space.index(states)]


def tabular(space: PartialStates, log_p: Tensor) -> AnyOrderMarginals:
    r"""A model with one entry per state, that holds the marginals and conditionals of `log_p` (K^D,) exactly.

    Log-probabilities that sum to Z give :math:`l(\emptyset) = \log Z`.
    """
    return AnyOrderMarginals(
        space.dims,
        space.values,
        marginal_network=Table(space, space.log_marginals(log_p)),
        conditional_network=Table(space, space.log_conditionals(log_p)),
    )


@dataclass(frozen=True)
class Ising:
    r"""Spins :math:`s = 2x - 1` on a torus of `side` by `side` sites, numbered row by row.

    .. math:: f(x) = J \sum_{i \sim j} s_i s_j + b \sum_i s_i, \qquad p(x) = e^{f(x)} / Z

    over the :math:`2\,\text{side}^2` pairs of neighbours; a side below 3 would count pairs twice.
    """

    side: int = 3
    coupling: float = 0.4
    bias: float = 0.2

    def __post_init__(self) -> None:
        if self.side < 3:
            raise InputError(f"side must be at least 3, got {self.side}: on a smaller torus neighbours meet twice")

    @property
    def dims(self) -> int:
        """Sites."""
        return self.side**2

    @cached_property
    def space(self) -> PartialStates:
        """All partial states."""
        return PartialStates(self.dims, 2)

    def log_density(self, x: Tensor) -> Tensor:
        """(B,) f of the rows of `x` (B, sites) of 0 and 1, float64, nats: minus the energy."""
        spins = (2 * x - 1).double().reshape(-1, self.side, self.side)
        pairs = spins * (spins.roll(-1, 1) + spins.roll(-1, 2))
        return (self.coupling * pairs + self.bias * spins).sum((1, 2))

    @cached_property
    def configurations(self) -> Tensor:
        """(2^sites, sites) long, in lexicographic order."""
        return self.space.x[self.space.complete]

    @cached_property
    def log_z(self) -> float:
        """Log of the sum over all configurations, nats."""
        return float(self.log_density(self.configurations).logsumexp(0))

    @cached_property
    def log_p(self) -> Tensor:
        """(2^sites,) exact log-probabilities, float64."""
        return self.log_density(self.configurations) - self.log_z

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """(n, sites) exact draws."""
        return self.configurations[torch.multinomial(self.log_p.exp(), n, replacement=True, generator=generator)]
