r"""Estimators of the evidence lower bound of an absorbing diffusion model: which tokens are hidden, with what weight.

For a text x of L tokens and a predictor :math:`c_\theta(x_i \mid \text{visible tokens})` write
:math:`S(m) = \sum_{i \in m} \log c_\theta(x_i \mid x_{\setminus m})` for the tokens hidden by m, and
:math:`g_k = E_{|m| = k} S(m) / k`. One bound on :math:`\log p(x)` has many forms (RADD, arXiv 2406.03736):

.. math:: \text{ELBO}(x) = \sum_{k=1}^{L} g_k = E_k \tfrac{L}{k} S(m_k)
   = \int_0^1 \tfrac{1}{\lambda} E_\lambda S\, d\lambda
   = \int_0^1 \tfrac{\lambda'(t)}{\lambda(t)} E_t S\, dt = E_\pi \sum_l \log c_\theta(x_{\pi_l} \mid x_{\pi_{<l}})

An estimator draws `Points` (what is hidden, what is summed, with what weight) whose weighted sum has the bound as its
mean. One draw may use several points (``points``), spread so that their errors cancel; draws are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.models.diffusion.schedule import LogLinear, Schedule

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "Canonical",
    "Counts",
    "Enumeration",
    "Estimator",
    "FixedOrder",
    "OneStep",
    "Orders",
    "Points",
    "Quadrature",
    "ScoreEntropy",
    "Times",
    "estimator_named",
]

Bools: TypeAlias = "NDArray[np.bool_]"
Floats: TypeAlias = "NDArray[np.float64]"
Spread = Literal["uniform", "stratified", "offset", "antithetic"]
LONGEST_ENUMERATION = 16


class Points(NamedTuple):
    r"""P network evaluations of one row and what is made of them.

    Attributes:
        hidden: (P, L) bool, tokens replaced by the mask.
        scored: (P, L) bool, hidden tokens whose log-probabilities are summed.
        weight: (P,) factor on the sum.
        rates: (P, 2) noise rate and :math:`a = (1 - \lambda) / \lambda` at each point, where the sum is a score
            entropy.
    """

    hidden: Bools
    scored: Bools
    weight: Floats
    rates: Floats | None = None


class Estimator(Protocol):
    """Draws points; `kind` says what the weighted sum promises about log p(x)."""

    @property
    def kind(self) -> Kind:
        """Of the mean over draws."""

    @property
    def is_random(self) -> bool:
        """Whether two draws differ."""

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw for a text of `length` tokens."""


class _Bound:
    """An unbiased draw of the bound."""

    kind = Kind.LOWER_BOUND
    is_random = True


@dataclass(frozen=True)
class Counts(_Bound):
    r"""Exactly k hidden tokens, k uniform on 1..L: :math:`\frac{L}{k} S(m_k)` (k-DCE, what LLaDA evaluates with).

    Args:
        points: counts per draw, :math:`k_j = (k_0 + \lfloor jL/n \rfloor) \bmod L + 1` for one uniform :math:`k_0`.
    """

    points: int = 1

    def __post_init__(self) -> None:
        _positive("points", self.points)

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        steps = np.arange(self.points) * length // self.points
        counts = (rng.integers(length) + steps) % length + 1
        hidden = _exactly(rng, counts, length)
        return Points(hidden, hidden, length / counts / self.points)


@dataclass(frozen=True)
class Bernoulli(_Bound):
    r"""Every token hidden with probability :math:`\lambda`, uniform on (0, 1]: :math:`S(m) / \lambda` (lambda-DCE).

    Its variance is infinite: a level near 0 hides one token with a probability in proportion to the level, and the
    squared weight is one over its square. Standard errors of a sample look finite and understate it. `Counts` has the
    same mean and a finite variance.

    Args:
        points: masks per draw.
        spread: how their probabilities are drawn: independently, one in each of equal strata, equally spaced with one
            common offset, or in pairs u and 1 - u.
    """

    points: int = 1
    spread: Spread = "stratified"

    def __post_init__(self) -> None:
        _check_spread(self.points, self.spread)

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        level = _uniforms(rng, self.points, self.spread)
        hidden = rng.random((self.points, length)) < level[:, None]
        return Points(hidden, hidden, 1 / level / self.points)


@dataclass(frozen=True)
class Times:
    r"""A time t uniform on (0, 1], masks at its noise level: :math:`\frac{\lambda'(t)}{\lambda(t)} S(m)` (t-DCE).

    Masked diffusion's usual ELBO (MDLM, SEDD). A schedule that does not reach from 0 to 1 leaves part of the integral
    out, and the value is then no bound.

    Args:
        points: masks per draw.
        spread: as for `Bernoulli`.
        schedule: mask probability as a function of time.
    """

    points: int = 1
    spread: Spread = "stratified"
    schedule: Schedule = LogLinear()  # noqa: RUF009 - frozen
    is_random = True

    def __post_init__(self) -> None:
        _check_spread(self.points, self.spread)

    @property
    def kind(self) -> Kind:
        """A bound where the schedule covers all noise levels."""
        return Kind.LOWER_BOUND if self.schedule.is_complete else Kind.SURROGATE

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        time = _uniforms(rng, self.points, self.spread)
        level = self.schedule.mask_probability(time)
        hidden = rng.random((self.points, length)) < level[:, None]
        # sigma a = lambda' / lambda
        weight = self.schedule.rate(time) * self.schedule.odds(time)
        return Points(hidden, hidden, weight / self.points)


@dataclass(frozen=True)
class ScoreEntropy(Times):
    r"""The denoising score entropy of SEDD (arXiv 2310.16834) with scores :math:`s = a\, c_\theta` (DSE).

    .. math:: -\sigma \sum_{i \in m} \Big[\sum_v s_{iv} - a \log s_{i x_i} + a \log a - a\Big]

    With normalised :math:`c_\theta` it equals `Times` draw by draw; it is computed term by term.
    """

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        time = _uniforms(rng, self.points, self.spread)
        hidden = rng.random((self.points, length)) < self.schedule.mask_probability(time)[:, None]
        rates = np.stack([self.schedule.rate(time), self.schedule.odds(time)], axis=1)
        return Points(hidden, hidden, np.full(self.points, 1 / self.points), rates)


@dataclass(frozen=True)
class Orders(_Bound):
    """Random orders of generation, one token at a time: L evaluations each (any-order autoregression).

    Args:
        points: orders per draw.
    """

    points: int = 1

    def __post_init__(self) -> None:
        _positive("points", self.points)

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        ranks = rng.permuted(np.tile(np.arange(length), (self.points, 1)), axis=1)
        parts = [_chain(rank) for rank in ranks]
        hidden, scored = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return Points(hidden, scored, np.full(len(hidden), 1 / self.points))


@dataclass(frozen=True)
class Canonical(_Bound):
    r"""Every count once: :math:`\sum_k S(m_k) / k` over L masks of 1 to L tokens.

    Args:
        points: masks per count.
    """

    points: int = 1

    def __post_init__(self) -> None:
        _positive("points", self.points)

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        counts = np.tile(np.arange(1, length + 1), self.points)
        hidden = _exactly(rng, counts, length)
        return Points(hidden, hidden, 1 / counts / self.points)


@dataclass(frozen=True)
class Quadrature:
    r"""Gauss-Legendre nodes in the noise level, one mask at each (SDMC, arXiv 2510.08554).

    :math:`\frac{1}{\lambda} E_\lambda S` is a polynomial in :math:`\lambda` of degree L - 1, so that n nodes integrate
    it exactly where :math:`2n \ge L`; for longer texts the value has a bias of unknown sign and is a SURROGATE.

    Args:
        points: nodes.
        masks: ``size-biased`` hides :math:`k = 1 + \text{Binomial}(L - 1, \lambda)` tokens with weight L / k, which has
            the mean of ``bernoulli`` and less variance; ``count`` hides :math:`k = \max(1, \text{round}(\lambda L))`
            tokens with weight L / k: no variance of counts, and one more bias.
    """

    points: int = 3
    masks: Literal["size-biased", "bernoulli", "count"] = "size-biased"
    kind = Kind.SURROGATE
    is_random = True

    def __post_init__(self) -> None:
        _positive("points", self.points)
        if self.masks not in ("size-biased", "bernoulli", "count"):
            raise InputError(f"masks must be 'size-biased', 'bernoulli' or 'count', got {self.masks!r}")

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """One draw."""
        nodes, weights = np.polynomial.legendre.leggauss(self.points)
        level, share = (nodes + 1) / 2, weights / 2
        if self.masks == "bernoulli":
            hidden = rng.random((self.points, length)) < level[:, None]
            return Points(hidden, hidden, share / level)
        if self.masks == "count":
            counts = np.maximum(1, np.rint(level * length).astype(np.int64))
        else:
            counts = 1 + rng.binomial(length - 1, level)
        hidden = _exactly(rng, counts, length)
        return Points(hidden, hidden, share * length / counts)


@dataclass(frozen=True)
class OneStep:
    """Every token predicted from none of the others, in one evaluation: a mean-field SURROGATE (diffu-GRPO)."""

    kind = Kind.SURROGATE
    is_random = False

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """The only draw."""
        hidden = np.ones((1, length), dtype=bool)
        return Points(hidden, hidden, np.ones(1))


@dataclass(frozen=True)
class FixedOrder:
    """The chain rule in one order, L evaluations: EXACT for the model that generates in that order.

    Args:
        order: ``left_to_right``, ``right_to_left``, or the positions of the scored tokens in the order of generation.
    """

    order: Literal["left_to_right", "right_to_left"] | tuple[int, ...] = "left_to_right"
    kind = Kind.EXACT
    is_random = False

    def __post_init__(self) -> None:
        if isinstance(self.order, str):
            if self.order not in ("left_to_right", "right_to_left"):
                raise InputError(f"order must be 'left_to_right', 'right_to_left' or positions, got {self.order!r}")
        elif sorted(self.order) != list(range(len(self.order))):
            raise InputError(f"order must name each position from 0 once, got {self.order}")

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """The only draw."""
        rank = np.arange(length)
        if self.order == "right_to_left":
            rank = rank[::-1]
        elif not isinstance(self.order, str):
            if len(self.order) != length:
                raise InputError(f"the order has {len(self.order)} positions and a row has {length} scored tokens")
            rank = np.argsort(np.array(self.order))
        return Points(*_chain(rank), np.ones(length))


@dataclass(frozen=True)
class Enumeration:
    """Every mask: the bound itself, :math:`2^L - 1` evaluations, no randomness; for texts of at most 16 tokens."""

    kind = Kind.LOWER_BOUND
    is_random = False

    def draw(self, rng: np.random.Generator, length: int) -> Points:
        """The only draw."""
        if length > LONGEST_ENUMERATION:
            raise InputError(
                f"all masks of {length} tokens are too many: enumerate texts of at most {LONGEST_ENUMERATION}"
            )
        masks = [chosen for k in range(1, length + 1) for chosen in combinations(range(length), k)]
        hidden = np.zeros((len(masks), length), dtype=bool)
        for row, chosen in zip(hidden, masks, strict=True):
            row[list(chosen)] = True
        weight = np.array([1 / (len(chosen) * math.comb(length, len(chosen))) for chosen in masks])
        return Points(hidden, hidden, weight)


ESTIMATORS = (
    "count",
    "bernoulli",
    "time",
    "score_entropy",
    "order",
    "canonical",
    "quadrature",
    "one_step",
    "left_to_right",
    "right_to_left",
    "enumeration",
)


def estimator_named(name: str, points: int | None = None) -> Estimator:
    """The estimator called `name` (one of `ESTIMATORS`) with its other settings at their defaults.

    Raises:
        InputError: for an unknown name, or points for an estimator that has none.
    """
    spread = {
        "count": Counts,
        "bernoulli": Bernoulli,
        "time": Times,
        "score_entropy": ScoreEntropy,
        "order": Orders,
        "canonical": Canonical,
        "quadrature": Quadrature,
    }
    if name in spread:
        made: Estimator = spread[name]() if points is None else spread[name](points=points)
        return made
    single: dict[str, Estimator] = {
        "one_step": OneStep(),
        "left_to_right": FixedOrder("left_to_right"),
        "right_to_left": FixedOrder("right_to_left"),
        "enumeration": Enumeration(),
    }
    if name not in single:
        raise InputError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    if points is not None:
        raise InputError(f"the estimator {name} has no points to choose: leave them out")
    return single[name]


def _exactly(rng: np.random.Generator, counts: NDArray[np.int64], length: int) -> Bools:
    """(P, L) masks that hide exactly `counts` tokens, uniform among those."""
    ranks = rng.random((len(counts), length)).argsort(axis=1).argsort(axis=1)
    hidden: Bools = ranks < counts[:, None]
    return hidden


def _chain(rank: NDArray[np.int64]) -> tuple[Bools, Bools]:
    """Hidden and scored tokens (L, L) of each step of an order given as (L,) ranks."""
    steps = np.arange(len(rank))[:, None]
    return rank >= steps, rank == steps


def _uniforms(rng: np.random.Generator, count: int, spread: Spread) -> Floats:
    """(count,) numbers in (0, 1], each uniform."""
    if spread == "antithetic":
        half = rng.random(count // 2)
        # (0, 1]: 1 - u of u in [0, 1), and u or, for u = 0, 1: a set of measure zero.
        return np.concatenate([1 - half, np.where(half > 0, half, 1.0)])
    if spread == "offset":
        low = (rng.random() + np.arange(count) / count) % 1
    elif spread == "stratified":
        low = (rng.random(count) + np.arange(count)) / count
    else:
        low = rng.random(count)
    return np.asarray(1 - low, dtype=np.float64)


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a positive whole number, got {value!r}")


def _check_spread(points: int, spread: Spread) -> None:
    _positive("points", points)
    if spread not in ("uniform", "stratified", "offset", "antithetic"):
        raise InputError(f"spread must be 'uniform', 'stratified', 'offset' or 'antithetic', got {spread!r}")
    if spread == "antithetic" and points % 2:
        raise InputError(f"antithetic points come in pairs: give an even number, got {points}")
