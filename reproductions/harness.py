"""What every ``reproductions/PNNN_slug/run.py`` is made of: a claim with its checks, and a report with its verdict.

A run states a `Claim` before it measures anything: the sentence, the set-up, and `Check` objects with fixed rules. It
gives a function that measures one seed, and `reproduce` does the rest: it measures every seed, refuses what is not
finite, computes the verdict by rule, prints a summary and writes ``results.json`` and ``results.png`` beside
``run.py``.

The verdict is *reproduced* if every main check holds, *partly* if some do and *not reproduced* if none does.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import loglik
from loglik.errors import InputError

__all__ = ["FIRST_SEED", "Check", "Claim", "Measured", "Outcome", "Report", "reproduce", "spread"]

FIRST_SEED = 11  # the sheets' pilots used small seeds; these are none of theirs
Plot = Callable[[Figure, "Report"], None]
Notes = Callable[["Report"], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One rule, fixed before the run.

    Args:
        name: what is checked, in a few words.
        rule: the rule in words, with its margins.
        holds: the same rule as a predicate on the measured values of one seed.
        shows: names of the measured values that the rule looks at.
        share: in at least ``share[0]`` of ``share[1]`` seeds (rounded up for another number of seeds).
        main: whether the verdict depends on it; a check that does not is an observation beside the claim.
        on_mean: the rule is about the means over seeds, and is looked at once.
    """

    name: str
    rule: str
    holds: Callable[[Mapping[str, float]], bool]
    shows: tuple[str, ...]
    share: tuple[int, int] = (1, 1)
    main: bool = True
    on_mean: bool = False

    def needed(self, seeds: int) -> int:
        """In how many of `seeds` the rule must hold."""
        return 1 if self.on_mean else math.ceil(seeds * self.share[0] / self.share[1])


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed, and how it will be judged.

    Args:
        paper: catalogue number, such as ``P023``.
        text: the claim in a sentence or two.
        setup: the experiment in a few sentences, with every number that matters.
        checks: the rules.
        seeds: over how many seeds the claim is judged.

    Raises:
        InputError: without a main check, or with two checks of one name.
    """

    paper: str
    text: str
    setup: str
    checks: tuple[Check, ...]
    seeds: int

    def __post_init__(self) -> None:
        if not any(check.main for check in self.checks):
            raise InputError(f"{self.paper} has no main check: without one there is no verdict")
        names = [check.name for check in self.checks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{self.paper} has two checks named {twice!r}: name them apart")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one seed gave: named numbers, and named curves for the plot (these are not written to results.json)."""

    values: Mapping[str, float]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A check with what came of it: per seed, in how many it had to hold, and whether it did."""

    check: Check
    per_seed: tuple[bool, ...]
    needed: int

    @property
    def passed(self) -> int:
        """In how many seeds the rule held."""
        return sum(self.per_seed)

    @property
    def holds(self) -> bool:
        """Whether that is enough."""
        return self.passed >= self.needed


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (ddof 1; 0 for one value), minimum and maximum."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "min": min(values), "max": max(values)}


@dataclass(frozen=True, slots=True)
class Report:
    """A claim with what was measured.

    Args:
        claim: what was claimed.
        seeds: the seeds.
        measured: what each seed gave, in the order of the seeds.
        notes: what a reader must know beside the numbers, negatives first.
        seconds: wall-clock time of all seeds.

    Raises:
        InputError: for no seeds, for values that are not finite, for seeds that measured different things, or for a
            check that shows what was not measured.
    """

    claim: Claim
    seeds: tuple[int, ...]
    measured: tuple[Measured, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        paper = self.claim.paper
        if not self.seeds or len(self.seeds) != len(self.measured):
            raise InputError(f"{paper}: {len(self.measured)} measurements for {len(self.seeds)} seeds; one each")
        names = set(self.measured[0].values)
        for seed, measured in zip(self.seeds, self.measured, strict=True):
            if set(measured.values) != names:
                odd = sorted(names ^ set(measured.values))[0]
                raise InputError(f"{paper}: {odd!r} was not measured in every seed (seed {seed} differs)")
            for name, value in measured.values.items():
                if not math.isfinite(value):
                    raise InputError(f"{paper}: {name!r} of seed {seed} is {value}; a result must be finite")
        missing = [name for check in self.claim.checks for name in check.shows if name not in names]
        if missing:
            raise InputError(f"{paper}: a check shows {missing[0]!r}, which was not measured")

    def per_seed(self, name: str) -> list[float]:
        """The values of `name`, in the order of the seeds."""
        return [float(m.values[name]) for m in self.measured]

    def mean(self, name: str) -> float:
        """The mean of `name` over seeds."""
        return statistics.fmean(self.per_seed(name))

    def range(self, name: str, form: str = ".3g") -> str:
        """The smallest and largest value of `name`, as text for a note."""
        values = self.per_seed(name)
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What came of each check."""
        means = {name: self.mean(name) for name in self.measured[0].values}
        return tuple(
            Outcome(
                check,
                tuple(bool(check.holds(v)) for v in ([means] if check.on_mean else [m.values for m in self.measured])),
                check.needed(len(self.seeds)),
            )
            for check in self.claim.checks
        )

    @property
    def verdict(self) -> str:
        """``reproduced``, ``partly`` or ``not reproduced``, by the main checks."""
        held = [outcome.holds for outcome in self.outcomes if outcome.check.main]
        return "reproduced" if all(held) else "partly" if any(held) else "not reproduced"

    def record(self) -> dict[str, object]:
        """What ``results.json`` holds."""
        return {
            "paper": self.claim.paper,
            "claim": self.claim.text,
            "setup": self.claim.setup,
            "seeds": list(self.seeds),
            "measurements": {
                name: {"per_seed": [_short(v) for v in self.per_seed(name)]}
                | {key: _short(value) for key, value in spread(self.per_seed(name)).items()}
                for name in self.measured[0].values
            },
            "checks": [
                {
                    "name": outcome.check.name,
                    "rule": outcome.check.rule,
                    "main": outcome.check.main,
                    "shows": list(outcome.check.shows),
                    "per_seed": list(outcome.per_seed),
                    "passed": outcome.passed,
                    "needed": outcome.needed,
                    "holds": outcome.holds,
                }
                for outcome in self.outcomes
            ],
            "verdict": self.verdict,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
            "versions": {
                "python": platform.python_version(),
                "loglik": loglik.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "matplotlib": matplotlib.__version__,
            },
        }

    def write(self, folder: Path, plot: Plot) -> None:
        """Write ``results.json`` and ``results.png`` into `folder`."""
        figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")  # no pyplot: no window, no global state
        plot(figure, self)
        figure.savefig(folder / "results.png", metadata={"Software": None})
        text = json.dumps(self.record(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print the claim, the set-up, what was measured, each check and the verdict."""
        console.print(f"[bold]{self.claim.paper}[/bold] claim: {escape(self.claim.text)}")
        console.print(f"set-up: {escape(self.claim.setup)}")
        numbers = Table(title=f"measured over {len(self.seeds)} seeds ({', '.join(map(str, self.seeds))})")
        numbers.add_column("quantity", overflow="fold")
        for heading in ("mean", "std", "min", "max"):
            numbers.add_column(heading, justify="right", no_wrap=True)
        for name in self.measured[0].values:
            numbers.add_row(escape(name), *(f"{v:.4g}" for v in spread(self.per_seed(name)).values()))
        console.print(numbers)
        rules = Table(title="checks", show_lines=True)
        for heading in ("check", "rule", "seeds", "holds"):
            rules.add_column(heading, overflow="fold", no_wrap=heading in ("seeds", "holds"))
        for outcome in self.outcomes:
            seeds = "means" if outcome.check.on_mean else f"{outcome.passed}/{len(self.seeds)} (≥ {outcome.needed})"
            holds = "[green]yes[/green]" if outcome.holds else "[red]no[/red]"
            beside = "" if outcome.check.main else " (beside the claim)"
            rules.add_row(escape(outcome.check.name) + beside, escape(outcome.check.rule), seeds, holds)
        console.print(rules)
        for note in self.notes:
            console.print(f"note: {escape(note)}")
        style = {"reproduced": "green", "partly": "yellow"}.get(self.verdict, "red")
        console.print(f"verdict: [bold {style}]{self.verdict}[/bold {style}] ({self.seconds:.0f} s)")


def reproduce(
    claim: Claim,
    measure: Callable[[int], Measured],
    *,
    folder: Path,
    plot: Plot,
    notes: Notes = lambda report: (),
    seeds: int | None = None,
) -> str:
    """Measure every seed, print the summary, write the results and return the verdict.

    Args:
        claim: what is judged, and by which rules.
        measure: what one seed gives; torch's global generator is seeded with it before.
        folder: where the results go.
        plot: draws the report on a figure.
        notes: sentences about the report, from its numbers.
        seeds: how many seeds, as many as the claim says by default. With fewer nothing is written: the claim was
            stated over more.

    Raises:
        InputError: for less than one seed or values that are not finite.
    """
    count = claim.seeds if seeds is None else seeds
    if count < 1:
        raise InputError(f"--seeds must be at least 1, got {count}")
    torch.set_num_threads(1)  # the models are tiny, and sums then do not depend on the machine's cores
    console = Console()
    chosen = tuple(range(FIRST_SEED, FIRST_SEED + count))
    began = time.monotonic()
    measured = []
    for seed in chosen:
        torch.manual_seed(seed)
        started = time.monotonic()
        measured.append(measure(seed))
        console.print(f"{claim.paper} seed {seed}: {time.monotonic() - started:.1f} s")
    seconds = time.monotonic() - began
    bare = Report(claim, chosen, tuple(measured), (), seconds)
    report = Report(claim, chosen, tuple(measured), tuple(notes(bare)), seconds)
    report.show(console)
    if count < claim.seeds:
        console.print(
            f"results.json was left alone: the claim is stated over {claim.seeds} seeds, this run had {count}"
        )
    else:
        report.write(folder, plot)
    return report.verdict


def _short(value: float) -> float:
    """Six significant digits: more would only record rounding."""
    return float(f"{value:.6g}")
