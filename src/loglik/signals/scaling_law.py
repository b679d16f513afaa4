r"""Scaling laws: the loss of a family of models as a function of parameters and tokens, and what it says of the data.

.. math:: L(N, D) = E + (N / N_0)^{-\alpha} + (D / D_0)^{-\beta}

Where losses follow such a law, structure and entropy of a data set (`loglik.signals.epiplexity`) have closed forms, for
any budget of compute and for none.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, least_squares
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.signals.detection import as_numbers
from loglik.signals.epiplexity import Epiplexity, require_positive

__all__ = ["ScalingFit", "ScalingLaw", "epiplexity_from_scaling_law", "fit_scaling_law"]

_LN2 = math.log(2)
_EXPONENTS = (1e-2, 3.0), (1e-2, 0.99)  # of parameters and of tokens; at an end the data do not say what it is
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    r"""Loss :math:`L(N, D) = E + (N / N_0)^{-\alpha} + (D / D_0)^{-\beta}`, nats per token.

    Args:
        floor: E, what no model can learn.
        parameters: N0.
        alpha: exponent of the parameters.
        tokens: D0.
        beta: exponent of the tokens, below 1.

    Raises:
        InputError: for constants out of range.
    """

    floor: float
    parameters: float
    alpha: float
    tokens: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("parameters", "alpha", "tokens", "beta"):
            require_positive(name, getattr(self, name))
        if self.beta >= 1 or not 0 <= self.floor < math.inf:
            raise InputError(f"beta must be below 1 and floor at least 0, got {self.beta} and {self.floor}")

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D), nats per token; infinite numbers give the limit."""
        return float(self.floor + (parameters / self.parameters) ** -self.alpha + (tokens / self.tokens) ** -self.beta)

    def structure(self, tokens: float) -> float:
        r"""Prequential bits of a model of D tokens, :math:`\frac{\beta}{1 - \beta} D_0^\beta D^{1 - \beta} / \ln 2`."""
        return float(self.beta / (1 - self.beta) * self.tokens**self.beta * tokens ** (1 - self.beta) / _LN2)


def epiplexity_from_scaling_law(law: ScalingLaw, *, data_tokens: float, compute: float = math.inf) -> Epiplexity:
    r"""Structure and entropy of a data set whose loss follows a scaling law, at the best model of a compute budget.

    The tokens D solve

    .. math:: \beta D_0^\beta (\mathcal D - D) D^{-\beta - 1} =
              3 \alpha \mathcal D N_0^\alpha 2^\alpha C^{-\alpha} (3 D + \mathcal D)^{\alpha - 1}, \qquad
              N = \frac{C}{2 (3 D + \mathcal D)}

    whose left side falls against the right one, so that there is one solution. Without a limit D is the data set.

    Args:
        law: the scaling law.
        data_tokens: :math:`\mathcal D`, of the data set.
        compute: C in FLOPs, or infinite.

    Raises:
        InputError: for numbers that are not positive, or a budget so small that less than a millionth of a token could
            be trained on.

    Source: arXiv 2601.03220.
    """
    require_positive("data_tokens", data_tokens)
    if compute == math.inf:
        entropy = data_tokens * law.loss(math.inf, data_tokens) / _LN2
        return Epiplexity(law.structure(data_tokens), entropy, math.inf, math.inf, float(data_tokens))
    require_positive("compute", compute)
    scale = 3 * law.alpha * data_tokens * (2 * law.parameters / compute) ** law.alpha

    def slope(log_tokens: float) -> float:
        """Logarithm of the left side over the right one; falls from infinity to minus infinity."""
        d = math.exp(log_tokens)
        left = math.log(law.beta * (data_tokens - d)) + law.beta * math.log(law.tokens) - (law.beta + 1) * log_tokens
        return left - math.log(scale) - (law.alpha - 1) * math.log(3 * d + data_tokens)

    low, high = math.log(1e-6), math.log(data_tokens) + math.log1p(-1e-12)
    if slope(low) < 0:
        raise InputError(f"a budget of {compute:g} FLOPs trains no model on {data_tokens:g} tokens: give more")
    # Next to all data the solution is all data, to the last digit.
    tokens = math.exp(brentq(slope, low, high, xtol=1e-13)) if slope(high) < 0 else data_tokens
    parameters = compute / (2 * (3 * tokens + data_tokens))
    entropy = data_tokens * law.loss(parameters, tokens) / _LN2
    return Epiplexity(law.structure(tokens), entropy, float(compute), parameters, tokens)


@dataclass(frozen=True, slots=True)
class ScalingFit:
    """A scaling law that was fitted to runs.

    Args:
        law: the fitted one.
        error: root mean square of the logarithms of the losses against it.
        points: how many losses it was fitted to.
    """

    law: ScalingLaw
    error: float
    points: int


def fit_scaling_law(
    final: LogLikelihood, parameters: Tensor | ArrayLike, tokens: Tensor | ArrayLike, *, huber: float = 1e-3
) -> ScalingFit:
    r"""Fit a scaling law to final losses of runs of several sizes, each at several numbers of tokens.

    .. math:: \min \sum_i \mathrm{Huber}_\delta \bigl( \log L(N_i, D_i) - \log \ell_i \bigr)

    from a grid of starting points. Extrapolate with care: exponents of a small grid are rough.

    Args:
        final: (R,) log-likelihoods of fresh data under the models, whose means per token are the losses.
        parameters: (R,) of each model.
        tokens: (R,) it was trained on.
        huber: :math:`\delta`, above which an error of the logarithm counts linearly; positive.

    Raises:
        InputError: for unequal lengths, fewer than three sizes or three numbers of tokens, or fewer than six runs, a
            number that is not positive, or losses that follow no such law (an exponent runs to the end of its range).
        RowError: for a loss that is not finite and positive.

    Source: arXiv 2203.15556 (its third approach).
    """
    require_positive("huber", huber)
    loss = -final.mean_per_unit().value.detach().double().cpu().numpy()
    sizes, seen = (
        _positive(name, given, len(loss)) for name, given in (("parameters", parameters), ("tokens", tokens))
    )
    bad = np.flatnonzero(~(np.isfinite(loss) & (loss > 0)))
    if len(bad):
        raise RowError(f"the loss is {loss[bad[0]]}: leave the run out", row=f"run {int(bad[0])}")
    if min(len(np.unique(sizes)), len(np.unique(seen))) < 3 or len(loss) < 6:
        raise InputError(
            f"a scaling law needs six runs, of three sizes and three numbers of tokens at least, got {len(loss)} of "
            f"{len(np.unique(sizes))} and {len(np.unique(seen))}"
        )
    # Centred logarithms, so that the scales of both terms are about 1 where the data are.
    centre = np.log(sizes).mean(), np.log(seen).mean()
    x, y = np.log(sizes) - centre[0], np.log(seen) - centre[1]

    def terms(theta: Floats) -> Floats:
        log_floor, a, b, alpha, beta = theta
        return np.stack([np.full_like(x, log_floor), a - alpha * x, b - beta * y])

    def misfit(theta: Floats) -> Floats:
        return np.asarray(np.logaddexp.reduce(terms(theta), axis=0) - np.log(loss))

    def slopes(theta: Floats) -> Floats:
        each = terms(theta)
        floor, a, b = np.exp(each - np.logaddexp.reduce(each, axis=0))
        return np.stack([floor, a, b, -x * a, -y * b], 1)

    low = np.array([-30.0, -30.0, -30.0, _EXPONENTS[0][0], _EXPONENTS[1][0]])
    high = np.array([math.log(loss.max()) + 1, 30.0, 30.0, _EXPONENTS[0][1], _EXPONENTS[1][1]])
    level = math.log(loss.min())
    options = {"bounds": (low, high), "loss": "huber", "f_scale": huber, "xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}
    found = [
        least_squares(misfit, [level + f, level - 1, level - 1, a, b], slopes, max_nfev=300, **options)
        for f, a, b in itertools.product((-0.1, -2.0), (0.2, 0.8), (0.2, 0.6))
    ]
    best = min(found, key=lambda result: float(result.cost))
    log_floor, a, b, alpha, beta = map(float, best.x)
    for name, value, size, (least, most) in (
        ("parameters", alpha, a, _EXPONENTS[0]),
        ("tokens", beta, b, _EXPONENTS[1]),
    ):
        if size < level - 12 or not least * 1.01 < value < most * 0.999:
            raise InputError(
                f"the losses follow no scaling law in the {name}, whose exponent runs to {value:.3g} and whose share "
                f"of the loss to {math.exp(size - level):.2g}: take a wider range of {name}"
            )
    law = ScalingLaw(math.exp(log_floor), math.exp(centre[0] + a / alpha), alpha, math.exp(centre[1] + b / beta), beta)
    return ScalingFit(law, float(np.sqrt(np.mean(misfit(best.x) ** 2))), len(loss))


def _positive(name: str, given: Tensor | ArrayLike, count: int) -> Floats:
    numbers = as_numbers(given, name).astype(np.float64)
    if numbers.shape != (count,):
        raise InputError(f"{name} must have shape ({count},), one per run, got {numbers.shape}")
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))
    if len(bad):
        raise InputError(f"{name} must be positive and finite, got {numbers[bad[0]]} for run {int(bad[0])}")
    return numbers
