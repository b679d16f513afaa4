"""Masked diffusion: what each estimator of the bound costs, what shared masks, a cache and single draws save.

Estimators are held against the enumerated bound and the exact likelihood of a partly trained model (strings of 8
symbols). `memory` counts the bytes that automatic differentiation keeps, which is the same on every run.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loglik.kinds import DrawsKey
from loglik.models.batch import TokenBatch
from loglik.models.diffusion import (
    ESTIMATORS,
    Bernoulli,
    Canonical,
    Counts,
    Enumeration,
    Estimator,
    MaskedDiffusionLM,
    OneStep,
    Orders,
    Quadrature,
    ScoreEntropy,
    SubsetTable,
    Times,
    ancestral,
)
from loglik.models.diffusion.sampling import expected_evaluations
from loglik.objectives.diffusion_policy import bgpo, gdpo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproductions"))

from worlds.markov_strings import MarkovStrings, masked_network, train

LENGTH, TEXTS, STEPS, MORE_STEPS = 8, 8, 300, 20
SMALL, LARGE = 16, 64  # budgets, network evaluations
REPEATS = 200
FIXED = ("left_to_right", "right_to_left")  # exact, for another model: no estimators of the bound
Row = dict[str, Any]
CAPTIONS = {
    "estimators": (
        f"Strings of {LENGTH} symbols under a partly trained model, nats per string. `bias` and `std` are those of one "
        f"draw against the enumerated bound, `rmse` that of {SMALL} and {LARGE} network evaluations ({REPEATS} times) "
        "and `bias to exact` the distance from the exact likelihood of the random-order model."
    ),
    "differences": "One draw of policy minus reference, with the same masks for both and with masks of their own:",
    "sampler": "`ancestral` with the cache that skips steps in which nothing changes, and without:",
    "memory": "What automatic differentiation keeps in one on-policy step of 8 rows of 32 tokens:",
}

# By the name in ESTIMATORS: what is drawn with a budget of n evaluations, all in one draw or in independent draws.
ENTRIES: tuple[tuple[str, str, Callable[[int], Estimator]], ...] = (
    ("count", "independent", lambda n: Counts()),
    ("count", "spread over the budget", Counts),
    ("bernoulli", "independent", lambda n: Bernoulli()),
    ("bernoulli", "stratified over the budget", Bernoulli),
    ("bernoulli", "antithetic pairs", lambda n: Bernoulli(2, "antithetic")),
    ("time", "independent", lambda n: Times()),
    ("time", "one offset for the budget", lambda n: Times(n, "offset")),
    ("score_entropy", "independent", lambda n: ScoreEntropy()),
    ("order", "", lambda n: Orders()),
    ("canonical", "", lambda n: Canonical()),
    ("quadrature", "2 nodes, Bernoulli masks", lambda n: Quadrature(2, "bernoulli")),
    ("quadrature", "2 nodes, size-biased counts", lambda n: Quadrature(2)),
    ("quadrature", "4 nodes, size-biased counts", lambda n: Quadrature(4)),
    ("quadrature", "4 nodes, rounded counts", lambda n: Quadrature(4, "count")),
    ("one_step", "", lambda n: OneStep()),
    ("enumeration", "", lambda n: Enumeration()),
)


def model_and_rows(steps: int = STEPS) -> tuple[MaskedDiffusionLM, MarkovStrings, TokenBatch]:
    """A partly trained model in float64, its world and new strings."""
    world = MarkovStrings.random(length=LENGTH, generator=torch.Generator().manual_seed(0))
    lm = MaskedDiffusionLM(masked_network(world.vocabulary, LENGTH, seed=0), num_samples=1, max_batch_tokens=32768)
    train(lm, world, steps=steps, generator=torch.Generator().manual_seed(0))
    lm.model.double()
    return lm, world, world.rows(world.sample(TEXTS, torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------------- estimators
@torch.no_grad()
def variance(lm: MaskedDiffusionLM, rows: TokenBatch, repeats: int = REPEATS) -> list[Row]:
    """Bias, spread and RMSE of each estimator, averaged over the strings; nats per string."""
    missing = {*ESTIMATORS} - {name for name, _, _ in ENTRIES} - {*FIXED}
    assert not missing, missing
    tables = SubsetTable.of(lm, rows)
    bound, exact = (torch.stack([part(table) for table in tables]) for part in (SubsetTable.elbo, SubsetTable.mixture))
    found: list[Row] = []
    for name, how, make in ENTRIES:
        row: Row = {"estimator": name, "masks": how}
        for budget in (SMALL, LARGE):
            estimator = make(budget)
            drawn = lm.evidence(rows, estimator=estimator, num_samples=1)
            if not estimator.is_random:
                error = drawn.likelihood.value - bound
                row |= {"kind": str(estimator.kind), "evaluations": int(drawn.evaluations[0])}
                row |= {"bias": _short(error.mean()), "bias_stderr": 0.0, "std": 0.0}
                row[f"rmse_{budget}"] = _short(error.square().mean().sqrt())
                row["bias_to_exact"] = _short((drawn.likelihood.value - exact).mean())
                continue
            spread = len(estimator.draw(np.random.default_rng(0), LENGTH).weight)
            draws = max(1, budget // spread)
            drawn = lm.evidence(rows, estimator=estimator, num_samples=repeats * draws, draws=DrawsKey.of("bench"))
            samples = drawn.likelihood.samples
            assert samples is not None
            error = samples - bound
            if "kind" not in row:  # of one draw, at the smaller budget
                row |= {"kind": str(estimator.kind), "evaluations": spread}
                row |= {"bias": _short(error.mean())}
                row["bias_stderr"] = _short((error.var(0).sum() / len(error)).sqrt() / len(rows))
                row["std"] = _short(error.var(0).mean().sqrt())
            mean = error.view(repeats, draws, -1).mean(1)
            row[f"rmse_{budget}"] = _short(mean.square().mean().sqrt())
            row["bias_to_exact"] = _short((samples - exact).mean())
        row["bias_to_exact"] = row.pop("bias_to_exact")  # behind the budgets
        found.append(row)
    return found


@torch.no_grad()
def differences(
    policy: MaskedDiffusionLM, reference: MaskedDiffusionLM, rows: TokenBatch, draws: int = 2000
) -> list[Row]:
    """Spread of one draw of policy minus reference: the same masks for both, or masks of their own."""
    found = []
    for name, estimator in (
        ("count", Counts()),
        ("bernoulli", Bernoulli()),
        ("order", Orders()),
        ("quadrature, 3 nodes", Quadrature(3)),
    ):
        own, shared, other = (
            model.evidence(rows, estimator=estimator, num_samples=draws, draws=DrawsKey.of(key)).likelihood.samples
            for model, key in ((policy, "a"), (reference, "a"), (reference, "b"))
        )
        assert own is not None
        spread = [part.var(0).mean().sqrt() for part in (own, own - shared, own - other)]
        found.append(
            {
                "estimator": name,
                "std of the bound": _short(spread[0]),
                "std of the difference, same masks": _short(spread[1]),
                "std of the difference, own masks": _short(spread[2]),
                "variance ratio": _short((spread[2] / spread[1]) ** 2),
            }
        )
    return found


# ---------------------------------------------------------------------- sampler
def samplers(steps: tuple[int, ...] = (16, 64, 256), *, length: int = 64, n: int = 8) -> list[Row]:
    """Evaluations and seconds of `ancestral` with the cache and without, one row at a time and as a batch."""
    lm = MaskedDiffusionLM(masked_network(32, length, seed=0, width=128, layers=4, scale=0.2))
    nothing = TokenBatch.from_lists([[]], starts=[0])
    found = []
    for grid in steps:
        row: Row = {"tokens": length, "steps": grid, "expected": round(float(expected_evaluations(length, grid)), 1)}
        texts = []
        for name, cache in (("cache", True), ("no cache", False)):
            generator = torch.Generator().manual_seed(0)
            began = time.perf_counter()
            drawn = ancestral(lm, nothing, n=n, length=length, steps=grid, cache=cache, generator=generator)
            row[f"seconds, {n} rows, {name}"] = _short(time.perf_counter() - began)
            row[f"evaluations, {name}"] = _short(drawn.evaluations.double().mean())
            began = time.perf_counter()
            ancestral(lm, nothing, length=length, steps=grid, cache=cache, generator=generator)
            row[f"seconds, 1 row, {name}"] = _short(time.perf_counter() - began)
            texts.append(drawn.tokens.ids)
        row["same samples"] = bool(torch.equal(*texts))
        found.append(row)
    return found


# ---------------------------------------------------------------------- memory
class Saved:
    """Bytes that graphs keep for their backward passes, weights left out; each storage counts once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[Saved]:
        """Graphs that are built inside are counted."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: Held(self, t), lambda held: held.tensor):
            yield self

    def take(self, tensor: Tensor) -> None:
        """A graph keeps a tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.own:
            return
        self.now += storage.nbytes() * (not self.holders[storage.data_ptr()])
        self.holders[storage.data_ptr()] += 1
        self.peak = max(self.peak, self.now)

    def give(self, tensor: Tensor) -> None:
        """A graph has let it go."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.own:
            return
        self.holders[storage.data_ptr()] -= 1
        self.now -= storage.nbytes() * (not self.holders[storage.data_ptr()])


class Held:
    """One tensor that one node of a graph keeps."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor.detach()
        saved.take(self.tensor)

    def __del__(self) -> None:
        self.saved.give(self.tensor)


def memory(samples: tuple[int, ...] = (1, 4, 16, 64), *, length: int = 32, n: int = 8) -> list[Row]:
    """Peak bytes of one on-policy step: BGPO draw by draw, and a ratio of bounds with all draws in one graph.

    On policy both have the same gradient, up to the length by which GDPO divides: `gradient difference` is relative.
    """
    lm = MaskedDiffusionLM(masked_network(32, length, seed=0, width=64, scale=0.2).double(), estimator=Counts())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (n, length), generator=generator)
    everything = torch.ones_like(ids, dtype=torch.bool)
    rows = TokenBatch(ids, everything, everything, torch.zeros(n, dtype=torch.long))
    rewards, groups = torch.randn(n, generator=generator), torch.arange(2).repeat_interleave(n // 2)
    found = []
    for count in samples:
        draws = DrawsKey.of(f"{count} draws")
        single, whole = Saved(lm.model), Saved(lm.model)
        lm.model.zero_grad()
        with single.counting():
            for term in lm.terms(rows, num_samples=count, draws=draws):
                (bgpo(term, rewards, groups).mean() / count).backward()
        first = _gradient(lm)
        lm.model.zero_grad()
        with whole.counting():
            policy = lm.with_samples(count).log_prob(rows, draws=draws)
            gdpo(policy, rewards, groups, standardise=True).mean().backward()
        second = length * _gradient(lm)
        assert single.now == whole.now == 0  # all was let go
        found.append(
            {
                "draws": count,
                "BGPO, draw by draw: MiB": _short(single.peak / 2**20),
                "all draws at once: MiB": _short(whole.peak / 2**20),
                "ratio": _short(whole.peak / single.peak),
                "gradient difference": float(f"{float((first - second).norm() / second.norm()):.1g}"),
            }
        )
    return found


def _gradient(lm: MaskedDiffusionLM) -> Tensor:
    return torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])


# ---------------------------------------------------------------------- all of it
def run() -> dict[str, Any]:
    began = time.perf_counter()
    lm, world, rows = model_and_rows()
    policy = lm.on(copy.deepcopy(lm.model))
    train(policy, world, steps=MORE_STEPS, generator=torch.Generator().manual_seed(2), learning_rate=5e-4)
    parts = {
        "estimators": variance(lm, rows),
        "differences": differences(policy, lm, rows),
        "sampler": samplers(),
        "memory": memory(),
    }
    return {
        "what": (
            f"{TEXTS} strings of {LENGTH} symbols, model after {STEPS} steps, RMSE of {REPEATS} repeats at {SMALL} and "
            f"{LARGE} evaluations, nats per string; {time.perf_counter() - began:.0f} s"
        ),
        "rows": [{"part": name} | row for name, part in parts.items() for row in part],
        "table": "\n".join(f"{CAPTIONS[name]}\n\n{table(part)}" for name, part in parts.items()),
    }


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _short(value: Tensor | float) -> float:
    """Three significant digits; what rounding leaves of 0 is 0."""
    return float(f"{float(value):.3g}") if abs(float(value)) > 1e-12 else 0.0
