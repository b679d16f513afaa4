"""Recalibration maps as JSON: written, read back, and applied to new rows without fitting again.

Numbers are written so that they come back bit for bit. What is read is checked; nothing in a file is ever run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loglik.errors import InputError
from loglik.signals.h_calibration import HCalibration
from loglik.signals.monotone_maps import MonotoneNetwork, MonotonePiecewiseLinear, TemperatureEnsemble
from loglik.signals.recalibration import (
    IsotonicCalibration,
    IsotonicConfidence,
    Recalibration,
    StepMap,
    TemperatureScaling,
    VectorScaling,
)

__all__ = ["RecalibrationMap", "load_map", "map_from_record", "map_record", "save_map"]

RecalibrationMap: TypeAlias = (
    TemperatureScaling | VectorScaling | IsotonicCalibration | IsotonicConfidence | HCalibration
)

_FORMAT = "loglik recalibration map"
_VERSION = 1
_MODULES: dict[str, type[nn.Module]] = {
    "piecewise": MonotonePiecewiseLinear,
    "temperatures": TemperatureEnsemble,
    "network": MonotoneNetwork,
}


def save_map(fitted: Recalibration | IsotonicConfidence | HCalibration, path: str | Path) -> None:
    """Write a fitted map as JSON.

    Args:
        fitted: a map after `fit`.
        path: of the file.

    Raises:
        InputError: as `map_record`, or for a path that cannot be written.
    """
    text = json.dumps(map_record(fitted), indent=1, allow_nan=False) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another path") from None


def load_map(path: str | Path) -> RecalibrationMap:
    """Read a map that `save_map` wrote; it maps as the fitted one did.

    Raises:
        InputError: for a file that cannot be read, or as `map_from_record`.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are such
        raise InputError(f"{path} is not JSON: give a file that a fitted map was saved to") from None
    try:
        return map_from_record(record)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def map_record(fitted: Recalibration | IsotonicConfidence | HCalibration) -> dict[str, Any]:
    """A fitted map as plain JSON values: its name, number of classes and parameters.

    Raises:
        InputError: for a map that is not fitted yet, or an `HCalibration` of a module of one's own.
    """
    name = type(fitted).__name__
    if isinstance(fitted, TemperatureScaling | VectorScaling | IsotonicCalibration) and hasattr(fitted, "num_classes_"):
        classes = fitted.num_classes_
        if isinstance(fitted, TemperatureScaling):
            parameters: dict[str, Any] = {"temperature": fitted.temperature_}
        elif isinstance(fitted, VectorScaling):
            parameters = {"weight": fitted.weight_.tolist(), "bias": fitted.bias_.tolist()}
        else:
            parameters = {"floor": fitted.floor, "maps": [_steps(each) for each in fitted.maps_]}
    elif isinstance(fitted, IsotonicConfidence) and hasattr(fitted, "map_"):
        classes, parameters = 2, _steps(fitted.map_)
    elif isinstance(fitted, HCalibration) and hasattr(fitted, "map_"):
        classes, parameters = fitted.num_classes_, _module(fitted.map_)
    elif isinstance(fitted, RecalibrationMap):
        raise InputError(f"{name} has no map yet: call fit first")
    else:
        raise InputError(f"{name} is no map that can be written: use one of loglik.signals.recalibration")
    return {"format": _FORMAT, "version": _VERSION, "map": name, "classes": classes, "parameters": parameters}


def map_from_record(record: object) -> RecalibrationMap:
    """The map of a `map_record`.

    Raises:
        InputError: for anything else, saying what is missing or out of range.
    """
    if not isinstance(record, Mapping) or record.get("format") != _FORMAT:
        raise InputError("this is no recalibration map: give a file that a fitted map was saved to")
    if record.get("version") != _VERSION:
        raise InputError(
            f"this map has version {record.get('version')!r}, and version {_VERSION} is known: save it again"
        )
    makers: dict[str, Callable[[_Fields, int], RecalibrationMap]] = {
        "TemperatureScaling": _temperature,
        "VectorScaling": _vector,
        "IsotonicCalibration": _isotonic,
        "IsotonicConfidence": _confidence,
        "HCalibration": _h_calibration,
    }
    name, classes, given = (record.get(key) for key in ("map", "classes", "parameters"))
    if not isinstance(name, str) or name not in makers:
        raise InputError(f"the map {name!r} is not known: it must be one of {', '.join(makers)}")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1 or not isinstance(given, Mapping):
        raise InputError(f"a {name} needs a number of classes and parameters: save it again")
    return makers[name](_Fields(name, given), classes)


class _Fields:
    """Parameters of a record, each checked as it is taken."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values = name, values

    def number(self, key: str, *, above: float = -math.inf, below: float = math.inf) -> float:
        found = self.values.get(key)
        if isinstance(found, bool) or not isinstance(found, int | float) or not above < found < below:
            raise InputError(f"the {key} of {self.name} is {_brief(found)}: save the map again")
        return float(found)

    def array(self, key: str, size: int | None = None) -> NDArray[np.float64]:
        found = self.values.get(key)
        good = isinstance(found, list) and len(found) > 0 and all(type(item) in (int, float) for item in found)
        out = np.array(found, dtype=np.float64) if good else np.zeros(0)
        if not good or not np.isfinite(out).all() or (size is not None and len(out) != size):
            wanted = "a list of finite numbers" if size is None else f"a list of {size} finite numbers"
            raise InputError(f"the {key} of {self.name} must be {wanted}, got {_brief(found)}: save the map again")
        return out


def _temperature(fields: _Fields, classes: int) -> TemperatureScaling:
    out = TemperatureScaling()
    out.temperature_, out.num_classes_ = fields.number("temperature", above=0.0), classes
    return out


def _vector(fields: _Fields, classes: int) -> VectorScaling:
    out = VectorScaling()
    out.weight_, out.bias_ = fields.array("weight", classes), fields.array("bias", classes)
    out.num_classes_ = classes
    return out


def _isotonic(fields: _Fields, classes: int) -> IsotonicCalibration:
    out = IsotonicCalibration(floor=fields.number("floor", above=-1e-300, below=1.0))
    maps = fields.values.get("maps")
    if not isinstance(maps, Sequence) or len(maps) != classes or not all(isinstance(each, Mapping) for each in maps):
        raise InputError(f"{fields.name} needs one map per class, {classes}: save the map again")
    out.maps_ = [_step_map(_Fields(fields.name, each)) for each in maps]
    out.num_classes_ = classes
    return out


def _confidence(fields: _Fields, classes: int) -> IsotonicConfidence:
    out = IsotonicConfidence()
    out.map_ = _step_map(fields)
    return out


def _h_calibration(fields: _Fields, classes: int) -> HCalibration:
    mapping, given = fields.values.get("mapping"), fields.values.get("parameters")
    if not isinstance(mapping, str) or mapping not in _MODULES or not isinstance(given, Mapping):
        raise InputError(
            f"{fields.name} needs a mapping of {', '.join(_MODULES)} and its parameters: save the map again"
        )
    inner = _Fields(fields.name, given)
    if mapping == "temperatures":
        module: nn.Module = TemperatureEnsemble(len(inner.array("scale")))
    elif mapping == "piecewise":
        module = MonotonePiecewiseLinear(len(inner.array("slope")), reach=fields.number("reach", above=0.0))
    else:
        module = MonotoneNetwork(len(inner.array("height")), reach=fields.number("reach", above=0.0))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.from_numpy(inner.array(name, max(1, parameter.numel())))
            parameter.copy_(values.reshape(parameter.shape))
    out = HCalibration(cast(Any, mapping))
    out.map_, out.losses_, out.num_classes_ = module, [], classes
    return out


def _steps(step: StepMap) -> dict[str, Any]:
    return {"x": step.x.tolist(), "y": step.y.tolist()}


def _step_map(fields: _Fields) -> StepMap:
    x = fields.array("x")
    y = fields.array("y", len(x))
    if (np.diff(x) < 0).any() or (np.diff(y) < 0).any() or y[0] < 0 or y[-1] > 1:
        raise InputError(f"the steps of {fields.name} must rise and lie in [0, 1]: save the map again")
    return StepMap(x, y)


def _module(module: nn.Module) -> dict[str, Any]:
    mapping = next((name for name, kind in _MODULES.items() if type(module) is kind), None)
    if mapping is None:
        raise InputError(f"{type(module).__name__} is a module of your own, which JSON cannot restore: save its state")
    values = {name: p.detach().double().flatten().tolist() for name, p in module.named_parameters()}
    reach = {} if mapping == "temperatures" else {"reach": float(module.reach)}  # type: ignore[arg-type]
    return {"mapping": mapping, **reach, "parameters": values}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
