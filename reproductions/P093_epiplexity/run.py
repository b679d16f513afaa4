"""P093: constant data and noise have no structure to learn; learnable deterministic maps have much (2601.03220)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM

from loglik.likelihood import LogLikelihood
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.epiplexity import prequential_code

BITS, WIDTH, LAYERS, HEADS = 12, 64, 2, 4
STEPS, BATCH, LR, TAIL = 600, 64, 2e-3, 30
STRUCTURED, EMPTY = ("copy", "rule 15", "rule 54"), ("const", "random", "rule 30")
SOURCES = (*EMPTY[:2], *STRUCTURED, EMPTY[2])

CLAIM = Claim(
    paper="P093",
    text=(
        "Constant data and noise both have next to no structure, although their entropies are nothing and everything; "
        "deterministic maps that can be learned have much more, and chaos that cannot is like noise."
    ),
    setup=(
        "A prefix of 12 random bits and a target of 12: zeros (const), random bits, a copy, or the prefix after steps "
        "of an elementary cellular automaton on a ring (rule 15, 2 steps; rule 54, 1 step; rule 30, 8 steps). A "
        "transformer of 2 layers, width 64 and 4 heads, AdamW with constant learning rate 2e-3, 600 steps of 64 fresh "
        "sequences; the loss is on the target, 460,800 tokens. Prequential code: loss before each update, final loss "
        "the mean of the last 30 steps. S is bits of structure, H bits per token that are left."
    ),
    checks=(
        Check(
            "structure of learnable maps",
            "S of copy, rule 15 and rule 54 >= 8 x the largest of const, random and rule 30, in every seed",
            lambda m: min(m[f"{s}: S"] for s in STRUCTURED) >= 8 * max(m[f"{s}: S"] for s in EMPTY),
            tuple(f"{s}: S" for s in SOURCES),
        ),
        Check(
            "rule 54 has more than rule 15",
            "S(rule 54) >= 1.5 S(rule 15), in every seed",
            lambda m: m["rule 54: S"] >= 1.5 * m["rule 15: S"],
            ("rule 54: S", "rule 15: S"),
        ),
        Check(
            "noise is entropy",
            "H of random and rule 30 >= 0.99 bit per token, H of const <= 0.01, in every seed",
            lambda m: min(m["random: H"], m["rule 30: H"]) >= 0.99 and m["const: H"] <= 0.01,
            ("random: H", "rule 30: H", "const: H"),
        ),
        Check(
            "the learnable maps are learned",
            "H of copy, rule 15 and rule 54 <= 0.05 bit per token, in every seed",
            lambda m: max(m[f"{s}: H"] for s in STRUCTURED) <= 0.05,
            tuple(f"{s}: H" for s in STRUCTURED),
            main=False,
        ),
    ),
    seeds=3,
)


def automaton(row: Tensor, rule: int, steps: int) -> Tensor:
    """(B, W) bits on a ring after `steps` steps of an elementary cellular automaton."""
    table = torch.tensor([rule >> i & 1 for i in range(8)])
    for _ in range(steps):
        row = table[4 * row.roll(1, 1) + 2 * row + row.roll(-1, 1)]
    return row


def targets(generator: torch.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "const": torch.zeros_like,
        "random": lambda row: torch.randint(2, row.shape, generator=generator),
        "copy": lambda row: row,
        "rule 15": lambda row: automaton(row, 15, 2),
        "rule 54": lambda row: automaton(row, 54, 1),
        "rule 30": lambda row: automaton(row, 30, 8),
    }


def learn(target: Callable[[Tensor], Tensor], generator: torch.Generator) -> LogLikelihood:
    """The training curve: a row per step, before its update."""
    model = TransformerLM(2, WIDTH, length=2 * BITS, layers=LAYERS, heads=HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    steps = []
    for _ in range(STEPS):
        row = torch.randint(2, (BATCH, BITS), generator=generator)
        likelihood = model.log_prob(torch.cat([row, target(row)], 1), start=BITS)
        steps.append(likelihood.detach().total())
        loss = objective(likelihood).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return LogLikelihood.cat(steps)


def measure(seed: int) -> Measured:
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for source in SOURCES:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        curve = learn(targets(generator)[source], generator)
        code = prequential_code(curve, tail=TAIL / STEPS)
        assert code.model.stderr is not None
        values[f"{source}: S"] = code.model.item()
        values[f"{source}: standard error of S"] = float(code.model.stderr)
        values[f"{source}: H"] = code.bits_per_token
        curves[source] = (-curve.mean_per_unit().value / 0.6931472).tolist()
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, source in enumerate(SOURCES):
        for first, m in enumerate(report.measured):
            left.plot(m.curves[source], lw=0.8, color=f"C{number}", alpha=0.7, label=None if first else source)
        points = [max(s, 1.0) for s in report.per_seed(f"{source}: S")]
        right.plot([number] * len(points), points, "o", color=f"C{number}", alpha=0.7)
    left.set(title="loss before each update", xlabel="step", ylabel="bits per token")
    left.legend(fontsize=7)
    right.set_yscale("log")
    right.set_xticks(range(len(SOURCES)), SOURCES, rotation=30)
    right.set(title="structure (a point per seed)", ylabel="S (bits)")


def notes(report: Report) -> list[str]:
    errors = ", ".join(f"{s} {report.mean(f'{s}: standard error of S'):.0f}" for s in SOURCES)
    return [
        "The final loss decides what next to nothing is: its standard error, times 460,800 tokens, is in bits (means) "
        f"{errors}.",
        f"S of const is {report.range('const: S', '.0f')} bits and of random {report.range('random: S', '.0f')}: both "
        "are the price of finding out that nothing is to be learned, which depends on the initial weights and the "
        "learning rate.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
