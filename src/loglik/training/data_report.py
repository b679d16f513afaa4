"""What the runs of `data_code_runs` say of a data set: points, frontiers, structure and entropy at a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.signals.epiplexity import Epiplexity, at_budget, epiplexity_frontier
from loglik.signals.scaling_law import epiplexity_from_scaling_law, fit_scaling_law
from loglik.training.data_codes import DataRun
from loglik.training.token_data import TokenData

__all__ = ["DataReport", "data_report"]


@dataclass(frozen=True, slots=True)
class DataReport:
    """Two-part codes of a data set by all estimators that were run.

    Args:
        rows: a mapping per (run, checkpoint), for tables, under ``point`` its name.
        points: by estimator, those of all seeds.
        summary: by estimator, structure and entropy of the best point of the frontier within the budget, in bits, per
            token and per byte (of several seeds the mean and the range), and ``scaling_law``, where there are
            prequential runs: its fit with the limit of unbounded compute, or a sentence that says why there is none.
    """

    rows: list[dict[str, Any]]
    points: dict[str, list[Epiplexity]]
    summary: dict[str, Any]


def data_report(
    runs: Sequence[DataRun],
    data: TokenData,
    *,
    data_tokens: float | None = None,
    budget: float = math.inf,
    overhead: bool = False,
) -> DataReport:
    """Collect runs over a data set.

    Args:
        runs: of one data set.
        data: the data set.
        data_tokens: tokens of the data set that the codes are about; those of `data` if None.
        budget: FLOPs of training and one reading.
        overhead: count the overhead of coding in requential codes.

    Raises:
        InputError: for no runs, or a budget that pays for no point.

    Source: arXiv 2601.03220.
    """
    if not runs:
        raise InputError("there are no runs: give one at least")
    size = float(len(data.ids)) if data_tokens is None else data_tokens
    groups: dict[str, dict[int, list[Epiplexity]]] = {}
    every: list[tuple[DataRun, int, Epiplexity]] = []
    for run in runs:
        for step, point in run.points(size, overhead=overhead).items():
            groups.setdefault(run.method, {}).setdefault(run.seed, []).append(point)
            every.append((run, step, point))
    hulls = {m: {seed: epiplexity_frontier(own) for seed, own in seeds.items()} for m, seeds in groups.items()}
    rows = [
        _row(run, step, point, overhead) | {"on_frontier": point in hulls[run.method][run.seed]}
        for run, step, point in every
    ]
    num_bytes = size * data.num_bytes / len(data.ids)
    summary: dict[str, Any] = {
        method: _at_budget([at_budget(hull, budget) for hull in seeds.values()], size, num_bytes)
        for method, seeds in hulls.items()
    }
    if "prequential" in hulls:
        summary["scaling_law"] = _law([run for run in runs if run.method == "prequential"], size)
    points = {method: [point for own in seeds.values() for point in own] for method, seeds in groups.items()}
    return DataReport(rows, points, summary)


def _row(run: DataRun, step: int, point: Epiplexity, overhead: bool) -> dict[str, Any]:
    code = run.codes(overhead=overhead)[step]
    return {
        "point": f"{run.method}, width {run.width}, seed {run.seed}, step {step}",
        "estimator": run.method,
        "width": run.width,
        "seed": run.seed,
        "step": step,
        "parameters": run.parameters,
        "trained_tokens": code.tokens,
        "compute": point.compute,
        "structure_bits": point.structure,
        "structure_stderr": None if code.model.stderr is None else float(code.model.stderr),
        "structure_kind": str(code.model.kind),
        "entropy_bits": point.entropy,
        "total_bits": point.total,
        "bits_per_token": code.bits_per_token,
    }


def _at_budget(chosen: Sequence[Epiplexity], size: float, num_bytes: float) -> dict[str, Any]:
    """The chosen point of each seed: means, and ranges of several."""
    told: dict[str, Any] = {}
    for part in ("structure", "entropy", "total"):
        bits = [getattr(point, part) for point in chosen]
        mean = sum(bits) / len(bits)
        told[f"{part}_bits"] = mean
        if len(bits) > 1:
            told[f"{part}_bits_range"] = [min(bits), max(bits)]
        told |= {f"{part}_bits_per_token": mean / size, f"{part}_bits_per_byte": mean / num_bytes}
    for name, part in (("compute", "compute"), ("parameters", "parameters"), ("trained_tokens", "tokens")):
        told[name] = sum(getattr(point, part) for point in chosen) / len(chosen)
    return told


def _law(runs: Sequence[DataRun], size: float) -> dict[str, float] | str:
    codes = [(float(run.parameters), code) for run in runs for code in run.codes().values()]
    finals = LogLikelihood.cat([code.final for _, code in codes])
    try:
        found = fit_scaling_law(finals, [n for n, _ in codes], [float(code.tokens) for _, code in codes])
    except InputError as error:
        return str(error)
    limit = epiplexity_from_scaling_law(found.law, data_tokens=size)
    return {
        "floor_bits_per_token": found.law.floor / math.log(2),
        "exponent_of_parameters": found.law.alpha,
        "exponent_of_tokens": found.law.beta,
        "error_of_log_loss": found.error,
        "structure_bits_at_any_compute": limit.structure,
        "entropy_bits_at_any_compute": limit.entropy,
    }
