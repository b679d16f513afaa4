r"""Embers of autoregression: is a model right more often where the right answer, or the question, is probable?

A language model asked to decode a cipher answers by :math:`P(y \mid x) \propto P(x \mid y)\, P(y)`. Where it reads the
input imperfectly, the prior leaks in: probable outputs are found, improbable ones become more probable. `map_accuracy`
is that argument as a number, `probability_effects` the regression that looks for it in a model's answers,
`accuracy_by_band` its table and `paired_contrast` the comparison of a common task with a rare one on the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.special import expit, log_expit, logsumexp
from scipy.stats import binomtest, norm
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.signals.detection import Estimate, as_numbers, auroc, auroc_stderr, checked_pairs, proportion_interval

__all__ = [
    "Band",
    "Effect",
    "PairedContrast",
    "Prior",
    "ProbabilityEffects",
    "accuracy_by_band",
    "map_accuracy",
    "matched_bands",
    "paired_contrast",
    "probability_effects",
]

Prior = Literal["none", "firth", "ridge"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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
    values = _values(output, "output")
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


@dataclass(frozen=True, slots=True)
class Band:
    """Items of similar probability.

    Args:
        label: of the band; the higher, the more probable, where bands were made by rank.
        count: items.
        accuracy: share of right ones, with its exact binomial interval.
        log_prob: mean log-probability, nats.
        num_units: mean number of units: bands that differ here are not matched.
    """

    label: int
    count: int
    accuracy: Estimate
    log_prob: float
    num_units: float


def accuracy_by_band(
    correct: Tensor | ArrayLike, likelihood: LogLikelihood, bands: int | Tensor | ArrayLike = 3, *, level: float = 0.95
) -> tuple[Band, ...]:
    """Accuracy in bands of probability, the least probable band first.

    Args:
        correct: (N,) bool, or 0 and 1.
        likelihood: (N,) of the outputs (or inputs) that the bands are about.
        bands: how many bands of equal size by rank (equal values share one), or (N,) whole numbers that name the band
            of each item; items of a negative one are left out (`matched_bands`).
        level: confidence of each interval, in (0, 1).

    Raises:
        InputError: for unequal lengths, more bands than items, or options out of range.
        RowError: for a log-likelihood that is not finite.

    Source: arXiv 2309.13638.
    """
    values = _values(likelihood, "likelihood")
    _, right = checked_pairs(values, correct, ("likelihood", "correct"))
    if isinstance(bands, int) and not isinstance(bands, bool):
        if not 1 <= bands <= len(values):
            raise InputError(f"bands must be from 1 to the number of items, {len(values)}, got {bands}")
        _, which, count = np.unique(values, return_inverse=True, return_counts=True)
        labels = (bands * (2 * count.cumsum() - count) // (2 * len(values)))[which]  # by middle rank
    else:
        labels = _whole(bands, "bands", len(values))
    units = likelihood.num_units.detach().cpu().numpy()
    found = []
    for label in np.unique(labels[labels >= 0]).tolist():
        own = labels == label
        size, hits = int(own.sum()), int(right[own].sum())
        low, high = proportion_interval(np.array([hits]), np.array([size]), level)
        accuracy = Estimate(hits / size, float(low[0]), float(high[0]))
        found.append(Band(int(label), size, accuracy, float(values[own].mean()), float(units[own].mean())))
    if not found:
        raise InputError("no item is in a band: name the band of some by a number from 0")
    return tuple(found)


def matched_bands(likelihood: LogLikelihood, bands: int = 3, *, lengths: Tensor | ArrayLike | None = None) -> Tensor:
    """Choose items so that bands of probability have the same lengths, one by one.

    Within each length the items are ranked, and equally many go into each band: from the bottom, evenly spaced places
    between, and the top. The rest belongs to none.

    Args:
        likelihood: (N,) of the candidate strings.
        bands: at least 2.
        lengths: (N,) whole numbers to match on; `num_units` if None.

    Returns:
        (N,) long: 0 for the least probable band, up to ``bands - 1``, and -1 for items that are left out.

    Raises:
        InputError: for fewer than two bands, or if no length has an item for each band.
        RowError: for a log-likelihood that is not finite.

    Source: arXiv 2309.13638 (100 sentences per level, matched on length).
    """
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 2:
        raise InputError(f"bands must be at least 2, got {bands!r}")
    values = _values(likelihood, "likelihood")
    sizes = _whole(likelihood.num_units if lengths is None else lengths, "lengths", len(values))
    labels = np.full(len(values), -1, dtype=np.int64)
    for size in np.unique(sizes).tolist():
        own = np.flatnonzero(sizes == size)
        own = own[np.argsort(values[own], kind="stable")]
        each = len(own) // bands
        for band in range(bands):
            begin = band * (len(own) - each) // (bands - 1)
            labels[own[begin : begin + each]] = band
    if (labels < 0).all():
        raise InputError(f"no length has {bands} items, one for each band: give more strings, or fewer bands")
    return torch.from_numpy(labels)


@dataclass(frozen=True, slots=True)
class PairedContrast:
    """Two tasks on the same items.

    Args:
        first: accuracy on the first.
        second: accuracy on the second.
        difference: first minus second, with its interval.
        only_first: items right on the first alone.
        only_second: items right on the second alone.
        p_value: McNemar's exact two-sided test that both are equally easy.
        count: items.
    """

    first: float
    second: float
    difference: Estimate
    only_first: int
    only_second: int
    p_value: float
    count: int


def paired_contrast(first: Tensor | ArrayLike, second: Tensor | ArrayLike, *, level: float = 0.95) -> PairedContrast:
    r"""Accuracy on a common task against a rare one, on the same outputs.

    The p-value is McNemar's: of the items that only one task gets right, half should be the first's, which is a
    binomial test. The interval is Agresti and Min's: a half is added to each cell of the two-by-two table and the
    difference's normal interval is taken.

    Args:
        first: (N,) bool, or 0 and 1: whether the first task's answer is right.
        second: (N,) of the same items under the second task.
        level: confidence of the interval, in (0, 1).

    Raises:
        InputError: for unequal lengths, no items, or labels other than 0 and 1.

    Source: arXiv 2309.13638 (the contrast); McNemar 1947; Agresti and Min 2005.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    numbers, other = checked_pairs(first, second, ("first", "second"))
    _, own = checked_pairs(np.zeros(len(numbers)), numbers, ("first", "first"))
    count = len(own)
    if not count:
        raise InputError("there are no items: give at least one pair")
    b, c = int((own & ~other).sum()), int((other & ~own).sum())
    raw = (b - c) / count
    centre = (b - c) / (count + 2)
    deviation = math.sqrt((b + c + 1 - (b - c) ** 2 / (count + 2)) / (count + 2) ** 2)
    width = float(norm.ppf((1 + level) / 2)) * deviation
    low, high = max(-1.0, min(centre - width, raw)), min(1.0, max(centre + width, raw))
    p_value = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    return PairedContrast(float(own.mean()), float(other.mean()), Estimate(raw, low, high), b, c, p_value, count)


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


def _values(likelihood: LogLikelihood, name: str) -> Floats:
    """(N,) float64, all finite."""
    bad = (~torch.isfinite(likelihood.value)).nonzero().flatten()
    if len(bad):
        raise RowError(
            f"the log-likelihood of the {name} is {float(likelihood.value[bad[0]])}: leave the item out",
            row=f"row {int(bad[0])}",
        )
    found: Floats = likelihood.value.detach().cpu().double().numpy()
    return found


def _whole(given: Any, name: str, count: int) -> Ints:
    numbers = as_numbers(given, name)
    if numbers.shape != (count,) or not (numbers == np.floor(numbers)).all():
        raise InputError(f"{name} must be {count} whole numbers, one per item, got {numbers.dtype} {numbers.shape}")
    return numbers.astype(np.int64)


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
        columns[f"{name} log-probability"] = _values(likelihood, name)
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
