r"""Two-dimensional diffusion models small enough to train in seconds, and data whose manifold is known.

A `Denoiser` predicts the noise of :math:`x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon` (DDPM, linear
betas from 1e-4 to 0.2). Its stand-in for a log-likelihood is one draw of :math:`-\|\epsilon_\theta - \epsilon\|^2`: a
reweighted evidence bound, hence a surrogate. Two models are compared on the same `Draws`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loglik.likelihood import Kind, LogLikelihood, Unit

__all__ = ["Denoiser", "Draws", "distance_and_coverage", "fit", "moons", "noise_errors"]

_CENTRE, _SCALE = torch.tensor([0.5, 0.25]), torch.tensor([0.87, 0.5])  # of the two moons


@dataclass(frozen=True)
class Draws:
    """The random numbers of one term per row: `times` (B,) and `noise` (B, 2)."""

    times: Tensor
    noise: Tensor


class Denoiser(nn.Module):
    """An MLP of three hidden layers on a point and its time."""

    def __init__(self, width: int = 128, *, times: int = 50) -> None:
        super().__init__()
        self.times = times
        betas = torch.linspace(1e-4, 0.2, times)
        self.register_buffer("betas", betas)
        self.register_buffer("signal", (1 - betas).cumprod(0))
        self.register_buffer("frequencies", torch.linspace(0, math.log(50), 8).exp() / times)
        layers: list[nn.Module] = []
        for inputs in (2 + 16, width, width):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """(B, 2) predicted noise of `x` (B, 2) at `times` (B,)."""
        angles = times[:, None] * self.frequencies
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))

    def draws(self, n: int, generator: torch.Generator) -> Draws:
        """Uniform times and standard normal noise."""
        times = torch.randint(self.times, (n,), generator=generator)
        return Draws(times, torch.randn(n, 2, generator=generator))

    def noised(self, x: Tensor, draws: Draws) -> Tensor:
        """(B, 2) the points at their times."""
        signal = self.signal[draws.times][:, None]
        return signal.sqrt() * x + (1 - signal).sqrt() * draws.noise

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """(n, 2) ancestral samples."""
        x = torch.randn(n, 2, generator=generator)
        for t in reversed(range(self.times)):
            beta = self.betas[t]
            predicted = self(x, torch.full((n,), t))
            x = (x - beta / (1 - self.signal[t]).sqrt() * predicted) / (1 - beta).sqrt()
            if t > 0:
                x = x + beta.sqrt() * torch.randn(n, 2, generator=generator)
        return x


def noise_errors(model: Denoiser, x: Tensor, draws: Draws) -> LogLikelihood:
    r""":math:`-\|\epsilon_\theta(x_t, t) - \epsilon\|^2` (B,), one draw per row with weight one: a surrogate, nats."""
    errors = (model(model.noised(x, draws), draws.times) - draws.noise).square().sum(1)
    return LogLikelihood(-errors, Kind.SURROGATE, Unit.DIM, torch.full((len(x),), 2))


def fit(model: Denoiser, loss: Callable[[Denoiser], Tensor], steps: int, *, lr: float, decay: float = 0.98) -> Denoiser:
    """Adam on ``loss(model)``, in place; returns the exponential moving average of the weights as a model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    average = copy.deepcopy(model).requires_grad_(False)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
    return average


def moons(n: int, *, generator: torch.Generator, noise: float = 0.05) -> Tensor:
    """(n, 2) points of two interleaved half circles, about standardised; `noise` in units of the radius."""
    angles, upper = math.pi * torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
    points = torch.where(upper[:, None], _upper(angles), _lower(angles))
    return (points + noise * torch.randn(n, 2, generator=generator) - _CENTRE) / _SCALE


def distance_and_coverage(x: Tensor) -> tuple[float, float]:
    """Mean distance of points (N, 2) to the moons, and the share of the moons with one of the points within 0.05.

    Both in units of the radius; 200 points stand for each moon.
    """
    angles = torch.linspace(0, math.pi, 200)
    distances = torch.cdist(x * _SCALE + _CENTRE, torch.cat([_upper(angles), _lower(angles)]))
    return distances.amin(1).mean().item(), (distances.amin(0) < 0.05).float().mean().item()


def _upper(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], 1)


def _lower(angles: Tensor) -> Tensor:
    return torch.stack([1 - angles.cos(), 0.5 - angles.sin()], 1)
