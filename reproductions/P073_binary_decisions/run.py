"""P073: a model says yes almost always when asked once, and evenly but not independently in lists (2501.16356)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import GRULM

from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.binary_decisions import binary_probability
from loglik.signals.randomness import randomness_report

ONCE, RANDOMLY, LIST, YES, NO = range(5)  # two questions, the list's prompt, two answers
CHANCES = {"Q1": (ONCE, 0.97), "Q2": (RANDOMLY, 0.60)}
ANSWERS, FIRST = 20, 0.90
WIDTH, ROWS, STEPS, BATCH, LR = 48, 6000, 350, 128, 3e-3
SAMPLED, FEW, REPEATS, FLIPS = 400, 5, 200, 2000
TEMPERATURES = (0.5, 1.0, 2.0)

CLAIM = Claim(
    paper="P073",
    text=(
        "Of one model the single answer can be extremely skewed while answers of a list are near uniform and yet "
        "serially dependent, and a battery of tests tells these apart."
    ),
    setup=(
        "A GRU of width 48 over two questions, a list prompt, yes and no learns 6000 sequences in equal parts: Q1 is "
        "answered yes with probability 0.97, Q2 with 0.60, a list has 20 answers, the first yes with 0.90, then a "
        "switch with 0.46 + 0.07 min(k, 4) after a run of k. 350 Adam steps of 128 rows, learning rate 3e-3. 400 lists "
        "are sampled at temperatures 0.5, 1 and 2; 200 draws of 5 lists give the power; 2000 pairs of lists of 100 "
        "fair coin flips give the false alarms at 5 %."
    ),
    checks=(
        Check(
            "single answers are skewed, lists are not",
            "one-shot p(yes) of Q1 > 0.93 and yes rate of all list answers within 0.05 of 0.5, in every seed",
            lambda m: m["Q1: p(yes)"] > 0.93 and abs(m["lists: yes rate"] - 0.5) <= 0.05,
            ("Q1: p(yes)", "lists: yes rate"),
        ),
        Check(
            "lists are dependent",
            "switch rate > 0.54 and p of the G-test of independence < 1e-6, in every seed",
            lambda m: m["lists: switch rate"] > 0.54 and m["lists: log10 p of independence"] < -6,
            ("lists: switch rate", "lists: log10 p of independence"),
        ),
        Check(
            "negative recency",
            "P(switch after a run of 3) - P(switch after a run of 1) > 0.07, in every seed",
            lambda m: m["lists: P(switch | 3)"] - m["lists: P(switch | 1)"] > 0.07,
            ("lists: P(switch | 1)", "lists: P(switch | 3)"),
        ),
        Check(
            "temperature",
            "switch rate at T = 0.5 > at T = 1 > at T = 2, in every seed",
            lambda m: m["T 0.5: switch rate"] > m["T 1: switch rate"] > m["T 2: switch rate"],
            ("T 0.5: switch rate", "T 1: switch rate", "T 2: switch rate"),
        ),
        Check(
            "false alarms on coin flips",
            "independence and memory of two answers are rejected at 5 % in 3 to 7 % of fair series; the exact tests "
            "in at most 7 %",
            lambda m: (
                all(0.03 <= m[f"flips: {name}"] <= 0.07 for name in ("independence", "memory of two answers"))
                and max(m["flips: uniformity"], m["flips: negative recency"]) <= 0.07
            ),
            ("flips: uniformity", "flips: independence", "flips: memory of two answers", "flips: negative recency"),
        ),
    ),
    seeds=3,
)


def one_list(generator: np.random.Generator) -> list[int]:
    """1 is yes."""
    answers, run = [int(generator.random() < FIRST)], 1
    while len(answers) < ANSWERS:
        switch = generator.random() < 0.46 + 0.07 * min(run, 4)
        answers.append(answers[-1] ^ int(switch))
        run = 1 if switch else run + 1
    return answers


def training_rows(seed: int) -> tuple[Tensor, Tensor]:
    """(ROWS, 1 + ANSWERS) ids and which of them are answers; short rows are padded on the right."""
    generator = np.random.default_rng(seed)
    ids = np.full((ROWS, 1 + ANSWERS), NO)
    scored = np.zeros(ids.shape, dtype=bool)
    for row in range(ROWS):
        kind = row % 3
        if kind < 2:
            question, chance = list(CHANCES.values())[kind]
            answers = [int(generator.random() < chance)]
        else:
            question, answers = LIST, one_list(generator)
        ids[row, 0] = question
        ids[row, 1 : 1 + len(answers)] = [YES if answer else NO for answer in answers]
        scored[row, 1 : 1 + len(answers)] = True
    return torch.from_numpy(ids), torch.from_numpy(scored)


def train(seed: int) -> GRULM:
    ids, scored = training_rows(seed)
    network = GRULM(5, WIDTH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (BATCH,), generator=generator)
        terms = network.conditionals(ids[rows]).gather(-1, ids[rows][..., None])[..., 0]
        loss = objective(LogLikelihood.from_per_unit(terms, scored[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def sampled_lists(network: GRULM, temperature: float, generator: torch.Generator) -> np.ndarray:
    """(SAMPLED, ANSWERS) of 0 and 1, each the forced choice of yes or no given those before it."""
    ids = torch.full((SAMPLED, 1), LIST)
    for _ in range(ANSWERS):
        prefix = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        chance = binary_probability(network, prefix, [YES], [NO], temperature=temperature).probability
        drawn = torch.rand(SAMPLED, generator=generator) < chance
        ids = torch.cat([ids, torch.where(drawn, YES, NO)[:, None]], 1)
    return (ids[:, 1:] == YES).int().numpy()


def measure(seed: int) -> Measured:
    network = train(seed)
    values: dict[str, float] = {}
    for name, (question, _) in {**CHANCES, "list": (LIST, 0.0)}.items():
        found = binary_probability(network, TokenBatch.from_lists([[question]]), [YES], [NO])
        values[f"{name}: p(yes)"] = found.probability.item()
        values[f"{name}: coverage"] = found.coverage.item()
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for temperature in TEMPERATURES:
        lists = sampled_lists(network, temperature, generator)
        report = randomness_report(lists)
        values[f"T {temperature:g}: switch rate"] = report.switch_rate
        if temperature != 1.0:
            continue
        values |= {
            "lists: yes rate": report.yes_rate,
            "lists: first yes rate": report.position_rates[0],
            "lists: switch rate": report.switch_rate,
            "lists: G": report["independence"].statistic,
            "lists: log10 p of independence": float(np.log10(max(report["independence"].p_value, 1e-300))),
        }
        for run in range(1, 5):
            values[f"lists: P(switch | {run})"] = report.switch_after_run[run][0]
        curves = {"position": report.position_rates, "run": [report.switch_after_run[run][0] for run in range(1, 5)]}
        chooser = np.random.default_rng(seed)
        few = [lists[chooser.choice(SAMPLED, FEW, replace=False)] for _ in range(REPEATS)]
        found = [randomness_report(rows, permutations=199)["independence"].p_value < 0.05 for rows in few]
        values[f"power with {FEW} lists"] = float(np.mean(found))
    flips = np.random.default_rng(seed).integers(0, 2, (FLIPS, 2, 100))
    reports = [randomness_report(rows) for rows in flips]
    for test in reports[0].tests:
        values[f"flips: {test.name}"] = float(np.mean([r[test.name].p_value <= 0.05 for r in reports]))
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, measured in enumerate(report.measured):
        label = f"seed {report.seeds[number]}"
        left.plot(range(1, 1 + ANSWERS), measured.curves["position"], color=f"C{number}", label=label)
        right.plot(range(1, 5), measured.curves["run"], "o-", color=f"C{number}", label=label)
    left.axhline(0.5, color="black", ls=":", lw=0.8)
    left.set(title="yes rate in 400 lists", xlabel="position", ylim=(0, 1))
    right.plot(range(1, 5), [0.46 + 0.07 * k for k in range(1, 5)], "k--", lw=0.8, label="planted")
    right.set(title="share of switches", xlabel="length of the run so far", ylim=(0.4, 0.9), xticks=range(1, 5))
    left.legend(fontsize=7)
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"With {FEW} lists of {ANSWERS} the test of independence rejects in "
        f"{report.range(f'power with {FEW} lists', '.2f')} of the draws: a short look misses the dependence.",
        f"The first answer of a list is yes in {report.range('lists: first yes rate', '.2f')}: asking for one answer "
        "would show a bias that the pooled rate hides.",
        "The exact tests are conservative by construction (their p-values are discrete).",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
