r"""Embers of autoregression: is a model right more often where the right answer, or the question, is probable?

A language model asked to decode a cipher answers by :math:`P(y \mid x) \propto P(x \mid y)\, P(y)`. Where it reads the
input imperfectly, the prior leaks in: probable outputs are found, improbable ones become more probable. `map_accuracy`
is that argument as a number, `probability_effects` the regression that looks for it in a model's answers,
`loglik.signals.stimuli` has its tables: accuracy in bands of probability, and a common task against a rare one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.special import expit, log_expit, logsumexp
from scipy.stats import norm
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.signals.detection import as_numbers, auroc, auroc_stderr, checked_pairs
from loglik.signals.stimuli import finite_values

__all__ = [
    "Effect",
    "Prior",
    "ProbabilityEffects",
    "map_accuracy",
    "probability_effects",
]

Prior = Literal["none", "firth", "ridge"]
Floats = NDArray[np.float64]

_STEPS = 200  # Newton needs about ten


@dataclass(frozen=True, slots=True)
class Effect:
    """A coefficient of the regression, in logits per standard deviation of its predictor.

    Args:
        name: of the predictor.
        estimate: the coefficient; positive where more of the predictor goes with being right.
        stderr: its standard error.
        low: lower end of its Wald interval.
        high: upper end.
        p_value: two-sided, of the Wald test that it is 0.
    """

    name: str
    estimate: float
    stderr: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class ProbabilityEffects:
    """A logistic regression of correctness on probabilities and lengths.

    Args:
        effects: of the predictors, standardised.
        intercept: log-odds of being right where every predictor has its mean.
        dropped: predictors that are the same for all items, so that they have no effect to measure.
        auroc: how well the output's log-probability alone tells right from wrong.
        auroc_stderr: its standard error (DeLong); None with one right or one wrong item.
        log_likelihood: of the fit, nats, without the prior.
        prior: what kept the coefficients finite.
        level: confidence of the intervals.
        num_items: items.
    """

    effects: tuple[Effect, ...]
    intercept: Effect
    dropped: tuple[str, ...]
    auroc: float
    auroc_stderr: float | None
    log_likelihood: float
    prior: Prior
    level: float
    num_items: int

    def __getitem__(self, name: str) -> Effect:
        """The effect of a predictor, by name.

        Raises:
            InputError: for a name that no predictor has.
        """
        for effect in self.effects:
            if effect.name == name:
                return effect
        gone = " (it is the same for all items)" if name in self.dropped else ""
        raise InputError(f"there is no effect of {name!r}{gone}; there are {', '.join(e.name for e in self.effects)}")

    def record(self) -> list[dict[str, Any]]:
        """A row per coefficient, for JSON and tables."""
        names = ("name", "estimate", "stderr", "low", "high", "p_value")
        return [{name: getattr(effect, name) for name in names} for effect in (self.intercept, *self.effects)]


def probability_effects(
    correct: Tensor | ArrayLike,
    output: LogLikelihood,
    input: LogLikelihood | None = None,
    covariates: Mapping[str, Tensor | ArrayLike] | None = None,
    *,
    lengths: bool = True,
    prior: Prior = "none",
    strength: float = 1.0,
    level: float = 0.95,
) -> ProbabilityEffects:
    r"""Effect of the probability of outputs and inputs on being right, at given lengths.

    .. math:: \operatorname{logit} P(\text{correct}) = \beta_0 + \beta_1 z(\lambda_\text{in}) +
              \beta_2 z(\lambda_\text{out}) + \sum_j \beta_j z(x_j)

    where :math:`\lambda = \log p(\text{string})` is a sum over tokens and z standardises by the sample's mean and
    standard deviation. A sum is confounded with length, which is why the numbers of units come in as predictors. An
    effect is no cause: the stimuli must be matched for that (`matched_bands`).

    Args:
        correct: (N,) bool, or 0 and 1: whether the answer is right.
        output: (N,) log-likelihoods of the right outputs, in isolation, under a scoring model.
        input: (N,) of the inputs, likewise.
        covariates: further predictors (N,) by name.
        lengths: whether `num_units` of outputs and inputs are predictors.
        prior: ``none`` is maximum likelihood; ``firth`` Jeffreys' prior, which keeps coefficients finite whatever the
            data and has less bias; ``ridge`` a normal prior of variance 1 / `strength` on the standardised effects.
        strength: of ridge, positive.
        level: confidence of the intervals, in (0, 1).

    Raises:
        InputError: for one class only, predictors that are linearly dependent (with their names) or separate right from
            wrong without a prior, unequal lengths, or options out of range.
        RowError: for a predictor that is not finite.

    Source: arXiv 2309.13638, whose released code puts Cauchy priors on the coefficients.
    """
    if prior not in ("none", "firth", "ridge"):
        raise InputError(f"prior must be one of none, firth, ridge, got {prior!r}")
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if not (isinstance(strength, int | float) and 0 < strength < math.inf):
        raise InputError(f"strength must be positive and finite, got {strength}")
    values = finite_values(output, "output")
    area = auroc(values, correct)  # refuses one class only, and lengths that differ
    _, right = checked_pairs(values, correct, ("output", "correct"))
    columns = _columns(output, input, covariates or {}, lengths=lengths, count=len(right))
    dropped = tuple(name for name, column in columns.items() if (column == column[0]).all())
    kept = {name: column for name, column in columns.items() if name not in dropped}
    if "output log-probability" in dropped:
        raise InputError("all outputs have the same log-probability, so that it can have no effect: vary it")
    design = np.stack([np.ones(len(right)), *(_standardised(column) for column in kept.values())], 1)
    _require_independent(design, list(kept))
    if prior == "none" and _separates(design, right):
        raise InputError(
            "the predictors separate right from wrong, so that maximum likelihood has no finite coefficients: set "
            "prior to firth or ridge"
        )
    ridge = np.zeros(design.shape[1])
    ridge[1:] = strength if prior == "ridge" else 0.0
    found, covariance = _fit(design, right.astype(np.float64), ridge, firth=prior == "firth")
    errors = np.sqrt(np.diag(covariance))
    width = norm.ppf((1 + level) / 2) * errors
    p_values = 2 * norm.sf(np.abs(found) / errors)
    rows = [
        Effect(name, float(b), float(s), float(b - w), float(b + w), float(p))
        for name, b, s, w, p in zip(["intercept", *kept], found, errors, width, p_values, strict=True)
    ]
    few = min(int(right.sum()), int((~right).sum())) < 2
    return ProbabilityEffects(
        tuple(rows[1:]),
        rows[0],
        dropped,
        area,
        None if few else auroc_stderr(values, correct),
        float(log_expit(np.where(right, 1, -1) * (design @ found)).sum()),
        prior,
        level,
        len(right),
    )


def map_accuracy(log_prior: Tensor | ArrayLike, log_channel: Tensor | ArrayLike) -> Floats:
    r"""How often the best possible decoder of a noisy reading is right, for each output.

    .. math:: A(y) = \sum_x P(x \mid y)\, 1\bigl[y = \arg\max_{y'} P(x \mid y') P(y')\bigr]

    Even this decoder is right more often for probable outputs. Where the channel is sharp the prior changes nothing.

    Args:
        log_prior: (Y,) log P(y), nats.
        log_channel: (Y, X) log P(x | y), rows normalised.

    Returns:
        (Y,) in [0, 1]; of equally good outputs the first is chosen.

    Raises:
        InputError: for shapes that do not fit, or rows that do not sum to 1.

    Source: the Bayesian reading of arXiv 2309.13638.
    """
    prior = as_numbers(log_prior, "log_prior").astype(np.float64)
    channel = as_numbers(log_channel, "log_channel").astype(np.float64)
    if prior.ndim != 1 or channel.ndim != 2 or not channel.size or len(prior) != len(channel):
        raise InputError(f"log_prior (Y,) and log_channel (Y, X) do not fit: got {prior.shape} and {channel.shape}")
    for name, table in (("log_prior", prior[None]), ("log_channel", channel)):
        with np.errstate(invalid="ignore"):
            total = np.exp(logsumexp(table, axis=1))
        bad = np.flatnonzero(~(np.abs(total - 1) < 1e-6))
        if len(bad):
            raise InputError(f"the probabilities of {name} in row {int(bad[0])} sum to {total[bad[0]]:.4g}, not to 1")
    guess = (prior[:, None] + channel).argmax(0)
    return np.asarray((np.exp(channel) * (guess == np.arange(len(prior))[:, None])).sum(1))


def _columns(
    output: LogLikelihood,
    given: LogLikelihood | None,
    covariates: Mapping[str, Tensor | ArrayLike],
    *,
    lengths: bool,
    count: int,
) -> dict[str, Floats]:
    """Predictors (N,) by name."""
    columns: dict[str, Floats] = {}
    for name, likelihood in (("output", output), ("input", given)):
        if likelihood is None:
            continue
        if len(likelihood) != count:
            raise InputError(f"there are {len(likelihood)} {name}s for {count} answers: give one each")
        columns[f"{name} log-probability"] = finite_values(likelihood, name)
        if lengths:
            columns[f"{name} {likelihood.unit}s"] = likelihood.num_units.detach().cpu().double().numpy()
    for name, column in covariates.items():
        if name in columns or name == "intercept":
            raise InputError(f"the covariate {name!r} is already a predictor: give it another name")
        values = as_numbers(column, name).astype(np.float64)
        if values.shape != (count,):
            raise InputError(f"the covariate {name!r} must have shape ({count},), got {values.shape}")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise RowError(f"the covariate {name!r} is {values[bad[0]]}: leave the item out", row=f"row {int(bad[0])}")
        columns[name] = values
    return columns


def _standardised(column: Floats) -> Floats:
    centred = column - column.mean()
    return np.asarray(centred / centred.std(ddof=1))


def _require_independent(design: Floats, names: list[str]) -> None:
    """Refuse a predictor that the ones before it determine."""
    if len(design) <= design.shape[1]:
        raise InputError(f"{len(design)} items cannot tell {design.shape[1]} coefficients: give more items")
    # Columns are standardised, so that one tolerance fits all; each is reduced by those before it.
    remaining = np.abs(np.diag(np.linalg.qr(design, mode="r"))) / math.sqrt(len(design))
    bad = np.flatnonzero(remaining < 1e-7)
    if len(bad):
        before = ", ".join(names[: bad[0] - 1])
        raise InputError(f"{names[bad[0] - 1]!r} is determined by {before}: leave one of them out")


def _separates(design: Floats, right: NDArray[np.bool_]) -> bool:
    """Whether some direction never points the wrong way: then likelihood grows along it without end."""
    signed = design * np.where(right, 1.0, -1.0)[:, None]
    best = linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1), method="highs")
    return bool(best.status == 0 and -best.fun > 1e-7 * len(signed))


def _fit(design: Floats, right: Floats, ridge: Floats, *, firth: bool) -> tuple[Floats, Floats]:
    """Coefficients and their covariance by Newton steps, halved until the objective rises."""

    def objective(beta: Floats) -> float:
        eta = design @ beta
        total = float(log_expit(np.where(right > 0, eta, -eta)).sum() - 0.5 * (ridge * beta**2).sum())
        if firth:
            total += 0.5 * float(np.linalg.slogdet(information(beta))[1])
        return total

    def information(beta: Floats) -> Floats:
        p = expit(design @ beta)
        return np.asarray((design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge))

    beta = np.zeros(design.shape[1])
    value = objective(beta)
    for _ in range(_STEPS):
        p = expit(design @ beta)
        inverse = np.linalg.inv(information(beta))
        residual = right - p
        if firth:
            hat = np.einsum("ij,jk,ik->i", design, inverse, design) * p * (1 - p)
            residual = residual + hat * (0.5 - p)
        step = inverse @ (design.T @ residual - ridge * beta)
        scale = 1.0
        while objective(beta + scale * step) < value - 1e-12 * abs(value) and scale > 1e-10:
            scale /= 2
        beta = beta + scale * step
        value = objective(beta)
        if np.abs(step).max() < 1e-9:
            return beta, np.asarray(np.linalg.inv(information(beta)), dtype=np.float64)
    raise InputError("the regression did not converge: set prior to firth or ridge")
