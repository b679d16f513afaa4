"""Finished one-pass runs on disk, as arrays (.npz, nothing pickled): an interrupted grid need not begin anew."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.training.one_pass import PrequentialRun, RequentialRun

__all__ = ["load_run", "save_run"]


def save_run(path: str | Path, run: PrequentialRun | RequentialRun) -> None:
    """Write a run, whole or not at all; its folder is made where it is missing.

    Raises:
        InputError: for a path that cannot be written, or likelihoods with more than values and units.
    """
    arrays: dict[str, Any] = {}
    for step, final in run.finals.items():
        arrays |= _arrays(f"final {step}", final)
    if isinstance(run, PrequentialRun):
        arrays |= _arrays("curve", run.curve)
    else:
        arrays |= {"divergences": run.divergences.numpy(), "tokens": run.tokens.numpy()}
        arrays["teacher_steps"] = np.array(run.teacher_steps)
    partial = f"{path}.partial"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another folder") from None


def load_run(path: str | Path) -> PrequentialRun | RequentialRun:
    """The run that `save_run` wrote.

    Raises:
        InputError: for a file that is none.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        steps = sorted({int(name.split()[1]) for name in arrays if name.startswith("final ")})
        finals = {step: _likelihood(f"final {step}", arrays) for step in steps}
        if "curve value" in arrays:
            return PrequentialRun(_likelihood("curve", arrays), finals)
        divergences, tokens = (torch.from_numpy(arrays[name]) for name in ("divergences", "tokens"))
        return RequentialRun(divergences, tokens, finals, int(arrays["teacher_steps"]))
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path} is no finished run: delete it, and it is trained again") from None


def _arrays(name: str, likelihood: LogLikelihood) -> dict[str, Any]:
    if likelihood.constant is not None or likelihood.stderr is not None:
        raise InputError("runs are kept of likelihoods that are not sampled and have no unknown constant")
    return {
        f"{name} value": likelihood.value.detach().cpu().numpy(),
        f"{name} units": likelihood.num_units.cpu().numpy(),
        f"{name} label": np.array([likelihood.kind.value, likelihood.unit.value]),
    }


def _likelihood(name: str, arrays: Mapping[str, Any]) -> LogLikelihood:
    kind, unit = (str(word) for word in arrays[f"{name} label"])
    value, units = (torch.from_numpy(arrays[f"{name} {part}"]) for part in ("value", "units"))
    return LogLikelihood(value, Kind(kind), Unit(unit), units)
