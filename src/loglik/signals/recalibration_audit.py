"""Which map mends a classifier's probabilities? Several are fitted on one part of the rows and judged on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.calibration import (
    classwise_calibration_error,
    expected_calibration_error,
    multiclass_brier_score,
    negative_log_likelihood,
    top_label,
)
from loglik.signals.h_calibration import HCalibration
from loglik.signals.recalibration import IsotonicCalibration, Recalibration, TemperatureScaling, VectorScaling

__all__ = [
    "ClassFigures",
    "MapName",
    "RecalibrationComparison",
    "class_figures",
    "compare_recalibrations",
    "make_map",
    "split_rows",
]

MapName = Literal["temperature", "vector", "isotonic", "h", "h_nll"]


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """How good class probabilities are; all but the accuracy are better lower.

    Args:
        nll: mean negative log-likelihood of the labels, nats.
        brier: multi-class Brier score, in [0, 2].
        ece: calibration error of the top label, bins of equal width.
        ece_mass: the same with bins of equal mass.
        classwise: mean over classes of each one's calibration error, bins of equal width.
        accuracy: share of rows whose most probable class is the label.
        confidence: mean probability of the most probable class.
    """

    nll: float
    brier: float
    ece: float
    ece_mass: float
    classwise: float
    accuracy: float
    confidence: float


def class_figures(log_probs: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, bins: int = 15) -> ClassFigures:
    """All figures of one table of class probabilities.

    Args:
        log_probs: (N, K) nats, rows normalised.
        labels: (N,) true classes, whole numbers from 0.
        bins: of the calibration errors, at most N.

    Raises:
        InputError: for rows that are no distribution, labels out of range or of probability 0, or fewer rows than bins.
    """
    confidence, correct = top_label(log_probs, labels)
    return ClassFigures(
        nll=negative_log_likelihood(log_probs, labels),
        brier=multiclass_brier_score(log_probs, labels),
        ece=expected_calibration_error(confidence, correct, bins=bins),
        ece_mass=expected_calibration_error(confidence, correct, bins=bins, scheme="mass"),
        classwise=classwise_calibration_error(log_probs, labels, bins=bins),
        accuracy=float(correct.mean()),
        confidence=float(confidence.mean()),
    )


def make_map(
    name: MapName, *, penalty: float = 0.0, window: int = 201, steps: int = 300
) -> Recalibration | HCalibration:
    """A map that is not fitted yet, by its short name.

    Args:
        name: ``temperature``, ``vector``, ``isotonic``, ``h`` (a piecewise-linear map by the windowed calibration
            error) or ``h_nll`` (the same map by the likelihood).
        penalty: of ``vector``.
        window: of ``h``.
        steps: of ``h`` and ``h_nll``.

    Raises:
        InputError: for another name, or options that the map refuses.
    """
    if name == "temperature":
        return TemperatureScaling()
    if name == "vector":
        return VectorScaling(penalty)
    if name == "isotonic":
        return IsotonicCalibration()
    if name == "h":
        return HCalibration("piecewise", window=window, steps=steps)
    if name == "h_nll":
        return HCalibration("piecewise", objective="nll", steps=steps)
    raise InputError(f"a map must be one of temperature, vector, isotonic, h, h_nll, got {name!r}")


def split_rows(rows: int, share: float, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two parts of the rows by lot, each rising: a share of them to fit on, and the others.

    Args:
        rows: N.
        share: of the first part, rounded to the nearest whole number of rows.
        seed: of the lot.

    Raises:
        InputError: for a share outside (0, 1), or one that leaves a part empty.
    """
    if not 0 < share < 1:
        raise InputError(f"the share of rows to fit on must lie between 0 and 1, got {share}")
    count = math.floor(share * rows + 0.5)
    if not 0 < count < rows:
        raise InputError(f"a share of {share:g} of {rows} rows leaves one part empty: give more rows or another share")
    lot = np.random.default_rng(seed).permutation(rows)
    return np.sort(lot[:count]), np.sort(lot[count:])


@dataclass(frozen=True, slots=True)
class RecalibrationComparison:
    """Maps side by side on rows that none was fitted on.

    Args:
        before: of the probabilities as they came.
        after: of each map's.
        maps: the fitted maps.
        log_probs: (N, K) of the judged rows under each map, nats.
        refused: why a map could not be fitted or judged, by name.
    """

    before: ClassFigures
    after: dict[str, ClassFigures]
    maps: dict[str, Recalibration | HCalibration]
    log_probs: dict[str, Tensor]
    refused: dict[str, str]


def compare_recalibrations(
    fit: tuple[Tensor | ArrayLike, Tensor | ArrayLike],
    judge: tuple[Tensor | ArrayLike, Tensor | ArrayLike],
    maps: Mapping[str, Recalibration | HCalibration] | Sequence[MapName] = ("temperature", "vector", "isotonic", "h"),
    *,
    bins: int = 15,
) -> RecalibrationComparison:
    """Fit each map on the one part and judge it on the other.

    A map that the fitting rows do not determine is left out, with the reason; the others are compared all the same.

    Args:
        fit: (N, K) log-probabilities and (N,) labels to fit on.
        judge: the same of other rows.
        maps: maps by name, or names as `make_map` knows them.
        bins: of the calibration errors.

    Raises:
        InputError: as `class_figures` for the judged rows, for parts of different numbers of classes, or no maps.
    """
    made = dict(maps) if isinstance(maps, Mapping) else {name: make_map(name) for name in maps}
    if not made:
        raise InputError("there is no map to compare: give one or more")
    sizes = [np.asarray(rows).shape for rows, _ in (fit, judge)]
    if len(sizes[0]) == 2 == len(sizes[1]) and sizes[0][1] != sizes[1][1]:
        raise InputError(
            f"both parts must have the same classes, got {sizes[0][1]} to fit on and {sizes[1][1]} to judge"
        )
    before = class_figures(*judge, bins=bins)
    out = RecalibrationComparison(before, {}, {}, {}, {})
    for name, each in made.items():
        try:
            mapped = each.fit(*fit).predict_log_proba(judge[0])
            out.after[name] = class_figures(mapped, judge[1], bins=bins)
        except InputError as error:
            out.refused[name] = str(error)
            continue
        out.maps[name], out.log_probs[name] = each, mapped
    return out
