r"""Noise schedules of absorbing diffusion: the probability :math:`\lambda(t)` that a token is hidden at time t.

Time runs from 0 (clean) to 1 (all hidden). With total noise :math:`\bar\sigma(t) = \int_0^t \sigma`,
:math:`\lambda = 1 - e^{-\bar\sigma}` and :math:`a = (1 - \lambda) / \lambda = 1 / \text{expm1}(\bar\sigma)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loglik.errors import InputError

__all__ = ["Geometric", "LogLinear", "Schedule"]


class Schedule(Protocol):
    """Noise as a function of time."""

    @property
    def is_complete(self) -> bool:
        """Whether lambda(0) = 0 and lambda(1) = 1: only then do integrals over time cover all noise levels."""

    def mask_probability(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lambda at `time`."""

    def rate(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sigma, the derivative of the total noise."""

    def odds(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """(1 - lambda) / lambda."""


@dataclass(frozen=True)
class LogLinear:
    r""":math:`\lambda(t) = (1 - \epsilon) t`.

    Args:
        eps: 0 reaches the fully hidden text at t = 1; RADD and SEDD use 1e-3, which leaves the last 1e-3 of the bound's
            integral out.
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise InputError(f"eps must lie in [0, 1), got {self.eps}")

    @property
    def is_complete(self) -> bool:
        """For eps = 0."""
        return self.eps == 0

    def mask_probability(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lambda at `time`."""
        return (1 - self.eps) * time

    def rate(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sigma."""
        return (1 - self.eps) / np.maximum(1 - self.mask_probability(time), np.finfo(np.float64).tiny)

    def odds(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """(1 - lambda) / lambda."""
        level = self.mask_probability(time)
        return np.maximum(1 - level, np.finfo(np.float64).tiny) / level


@dataclass(frozen=True)
class Geometric:
    r""":math:`\bar\sigma(t) = \sigma_\min^{1-t} \sigma_\max^t`: never quite clean, never quite hidden.

    Args:
        low: total noise at t = 0.
        high: total noise at t = 1.
    """

    low: float = 1e-3
    high: float = 20.0
    is_complete = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise InputError(f"low and high must satisfy 0 < low < high, got {self.low} and {self.high}")

    def total(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Total noise."""
        return np.asarray(self.low ** (1 - time) * self.high**time)

    def mask_probability(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lambda at `time`."""
        return -np.expm1(-self.total(time))

    def rate(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sigma."""
        return np.asarray(self.total(time) * np.log(self.high / self.low))

    def odds(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """(1 - lambda) / lambda."""
        return np.asarray(1 / np.expm1(self.total(time)))
