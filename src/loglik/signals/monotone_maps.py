r"""Maps of log-probabilities that keep the order of classes, and so every ranking and the accuracy.

All are modules from (N, C) normalised log-probabilities to such, in float64; `loglik.signals.h_calibration` fits them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loglik.errors import InputError

__all__ = ["MonotoneNetwork", "MonotonePiecewiseLinear", "TemperatureEnsemble", "require_size"]

# Slopes of a map are at least this: what is flat would tie classes.
_FLATTEST = 1e-6


class TemperatureEnsemble(nn.Module):
    r"""A mixture of softmaxes at K temperatures, :math:`p = \sum_k w_k \, \mathrm{softmax}(|\tau_k| u)`.

    With :math:`w_k = |\omega_k| / \sum |\omega|`. The order of the classes of a row does not change. All
    :math:`\tau_k = 1` is the identity; the start spreads them around it.

    Args:
        size: K.

    Raises:
        InputError: for a size below 1.

    Source: arXiv 2506.17968 (its "linear" map).
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        require_size(size, "size")
        spread = torch.linspace(-1.0, 1.0, size, dtype=torch.float64) if size > 1 else torch.zeros(1).double()
        self.scale = nn.Parameter(spread.exp())
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, log_probs: Tensor) -> Tensor:
        """(N, C) log-probabilities to (N, C)."""
        weight = self.weight.abs().clamp(min=1e-12)
        # 0 times -inf is no number: an impossible class stays impossible at any temperature.
        scaled = self.scale.abs().clamp(min=_FLATTEST)[:, None, None] * log_probs
        return torch.logsumexp(scaled.log_softmax(-1) + (weight / weight.sum()).log()[:, None, None], 0)


class MonotonePiecewiseLinear(nn.Module):
    r""":math:`p = \mathrm{softmax}(f(u))` with one rising, continuous, piecewise-linear f for all classes.

    Knots divide [-reach, 0] evenly; below, the first slope goes on. :math:`f(0) = 0`, and slopes of 1 are the identity,
    where it starts. (The published code measures from the mapped value of a segment's left end instead of the knot,
    which is discontinuous unless the slopes sum to the identity.)

    Args:
        segments: pieces.
        reach: how far below 0 the knots go, nats.

    Raises:
        InputError: for options out of range.

    Source: arXiv 2506.17968.
    """

    def __init__(self, segments: int = 20, reach: float = 20.0) -> None:
        super().__init__()
        require_size(segments, "segments")
        if not 0 < reach < math.inf:
            raise InputError(f"reach must be positive and finite, got {reach}")
        self.slope = nn.Parameter(torch.ones(segments, dtype=torch.float64))
        self.reach = reach

    def forward(self, log_probs: Tensor) -> Tensor:
        """(N, C) log-probabilities to (N, C)."""
        slopes = self.slope.abs().clamp(min=_FLATTEST).to(log_probs.dtype)
        width = self.reach / len(slopes)
        # Down from 0: what all segments above have taken, and the share of the segment itself.
        place = (-log_probs / width).clamp(max=len(slopes) - 1).floor().clamp(min=0)
        segment = place.long()
        downwards = slopes.flip(0)
        above = torch.cat([downwards.new_zeros(1), (downwards * width).cumsum(0)])[:-1]
        values = downwards[segment] * (log_probs + place * width) - above[segment]
        return values.log_softmax(-1)


class MonotoneNetwork(nn.Module):
    r""":math:`p = \mathrm{softmax}(f(u))`, :math:`f(u) = a u + \sum_h v_h \tanh(w_h u / s + b_h)`, all of a, v, w > 0.

    Rising for all parameters, exactly. (The paper integrates a positive network, which quadrature makes rising only
    nearly.) It starts close to the identity.

    Args:
        hidden: units.
        reach: s, the scale of log-probabilities, nats.
        seed: of the start.

    Raises:
        InputError: for options out of range.

    Source: after arXiv 2506.17968 (its "non-linear" map).
    """

    def __init__(self, hidden: int = 16, reach: float = 5.0, seed: int = 0) -> None:
        super().__init__()
        require_size(hidden, "hidden")
        if not 0 < reach < math.inf:
            raise InputError(f"reach must be positive and finite, got {reach}")
        generator = torch.Generator().manual_seed(seed)
        self.slope = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.height = nn.Parameter(torch.full((hidden,), 0.01, dtype=torch.float64))
        self.steepness = nn.Parameter(torch.rand(hidden, generator=generator, dtype=torch.float64) * 2 + 1)
        self.offset = nn.Parameter(torch.rand(hidden, generator=generator, dtype=torch.float64) * 4)
        self.reach = reach

    def forward(self, log_probs: Tensor) -> Tensor:
        """(N, C) log-probabilities to (N, C)."""
        bent = torch.tanh(self.steepness.abs() * (log_probs / self.reach)[..., None] + self.offset)
        return (self.slope.abs().clamp(min=_FLATTEST) * log_probs + bent @ self.height.abs()).log_softmax(-1)


def require_size(value: int, name: str) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
