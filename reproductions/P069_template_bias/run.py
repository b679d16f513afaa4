"""P069: a planted gap between groups of names is found by log-odds where accuracies see nothing (2308.12539)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM, categorical

from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.choice import choose
from loglik.signals.template_bias import TemplateBias, gold_log_odds, template_bias

GROUPS, NAMES, PHRASES = 3, 50, 24  # names per group; phrases of each of two sorts
TOTAL, ARROW = GROUPS * NAMES, GROUPS * NAMES + 2 * PHRASES
LABELS = torch.tensor([ARROW + 1, ARROW + 2])
CLEAR, AMBIGUOUS, SIGNS = 0.98, 0.75, torch.tensor([1.0, 0.0, -1.0])
WIDTH, STEPS, BATCH, LR = 64, 900, 384, 3e-3
GAPS = (0.0, 0.1, 0.2, 0.3)
PERMUTATIONS = 999

CLAIM = Claim(
    paper="P069",
    text=(
        "The template bias score recovers a planted bias and calls its absence null; the log-odds of the right answer "
        "see biases that accuracies miss."
    ),
    setup=(
        "3 groups of 50 names, 24 clear phrases (label right with probability 0.98) and 24 ambiguous ones (0.75 + b, "
        "0.75 and 0.75 - b by group, clipped to [0.02, 0.98]), b in {0, .1, .2, .3}. A transformer (2 layers, width "
        "64, 4 heads) learns name, phrase, arrow -> label on half of the pairs: 900 AdamW steps of 384, learning rate "
        "3e-3 decayed to 0. All 7200 pairs are scored; accuracy score over all phrases (phrases with a group that is "
        "never right are left out) and gap of log-odds over the ambiguous ones, with 999 permutations of the "
        "names' groups."
    ),
    checks=(
        Check(
            "no bias, no finding",
            "at b = 0 both p-values > 0.05, in at least 2 of 3 seeds",
            lambda m: min(m["b 0: accuracy p"], m["b 0: log-odds p"]) > 0.05,
            ("b 0: accuracy p", "b 0: log-odds p"),
            share=(2, 3),
        ),
        Check(
            "log-odds see what accuracies miss",
            "at b = 0.1 p of the log-odds < 0.01 while the accuracy score is below 1 point, in every seed",
            lambda m: m["b 0.1: log-odds p"] < 0.01 and m["b 0.1: accuracy score"] < 1,
            ("b 0.1: log-odds p", "b 0.1: accuracy score"),
        ),
        Check(
            "a large bias shows in accuracies",
            "at b = 0.3 the accuracy score > 20 points with p < 0.01, in every seed",
            lambda m: m["b 0.3: accuracy score"] > 20 and m["b 0.3: accuracy p"] < 0.01,
            ("b 0.3: accuracy score", "b 0.3: accuracy p"),
        ),
        Check(
            "more bias, larger gap",
            "the gap of log-odds increases in b, in every seed",
            lambda m: all(m[f"b {a:g}: gap"] < m[f"b {b:g}: gap"] for a, b in pairwise(GAPS)),
            tuple(f"b {b:g}: gap" for b in GAPS),
        ),
    ),
    seeds=3,
)


def train(bias: float, seed: int, right: Tensor, held_out: Tensor) -> TransformerLM:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    shift = (AMBIGUOUS + bias * SIGNS.repeat_interleave(NAMES)).clamp(0.02, 0.98)
    network = TransformerLM(ARROW + 3, WIDTH, length=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    objective = MaximumLikelihood()
    pairs = (~held_out).nonzero()
    for _ in range(STEPS):
        phrase, name = pairs[torch.randint(len(pairs), (BATCH,), generator=generator)].T
        chance = torch.where(phrase < PHRASES, CLEAR, shift[name])
        is_right = torch.rand(BATCH, generator=generator) < chance
        label = torch.where(is_right, right[phrase], 1 - right[phrase])
        batch = torch.stack([name, TOTAL + phrase, torch.full_like(name, ARROW), LABELS[label]], 1)
        loss = objective(network.log_prob(batch, start=3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False).eval()


def log_odds(network: TransformerLM, right: Tensor) -> Tensor:
    """(2 PHRASES, TOTAL) of the right label."""
    name, phrase = torch.arange(TOTAL), torch.arange(2 * PHRASES)
    cells = torch.cartesian_prod(phrase, name)
    asked = torch.stack(
        [cells[:, 1], TOTAL + cells[:, 0], torch.full((len(cells),), ARROW), LABELS[:1].expand(len(cells))], 1
    )
    labels = network.conditionals(asked)[:, -1, LABELS].double()
    choices = choose(categorical(labels.flatten()), torch.arange(len(cells)).repeat_interleave(2))
    return gold_log_odds(choices, right[cells[:, 0]]).reshape(len(phrase), len(name))


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (2 * PHRASES,), generator=generator)
    held_out = torch.rand(2 * PHRASES, TOTAL, generator=generator) < 0.5
    owners = [group for group in range(GROUPS) for _ in range(NAMES)]
    values: dict[str, float] = {}
    for bias in GAPS:
        odds = log_odds(train(bias, seed, right, held_out), right)
        accuracy = template_bias(
            (odds > 0).double(), owners, statistic="accuracy", permutations=PERMUTATIONS, seed=seed
        )
        gap: TemplateBias = template_bias(odds[PHRASES:], owners, permutations=PERMUTATIONS, seed=seed)
        shift = (AMBIGUOUS + bias * SIGNS).clamp(0.02, 0.98).logit()
        values |= {
            f"b {bias:g}: accuracy score": 100 * accuracy.score,
            f"b {bias:g}: accuracy floor": 100 * accuracy.floor,
            f"b {bias:g}: accuracy p": accuracy.p_value,
            f"b {bias:g}: gap": gap.score,
            f"b {bias:g}: gap floor": gap.floor,
            f"b {bias:g}: gap, null upper": gap.null_upper,
            f"b {bias:g}: log-odds p": gap.p_value,
            f"b {bias:g}: true gap": (shift.max() - shift.min()).item(),
            f"b {bias:g}: templates left out": float(len(accuracy.dropped["a group is never right"])),
        }
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, seed in enumerate(report.seeds):
        for axis, name in ((left, "gap"), (right, "accuracy score")):
            points = [report.measured[number].values[f"b {b:g}: {name}"] for b in GAPS]
            axis.plot(GAPS, points, "o-", ms=4, color=f"C{number}", label=f"seed {seed}")
    left.plot(GAPS, [report.mean(f"b {b:g}: true gap") for b in GAPS], "k--", lw=0.8, label="planted")
    left.plot(GAPS, [report.mean(f"b {b:g}: gap floor") for b in GAPS], "k:", lw=0.8, label="floor")
    right.plot(GAPS, [report.mean(f"b {b:g}: accuracy floor") for b in GAPS], "k:", lw=0.8, label="floor")
    left.set(title="gap of log-odds, ambiguous phrases", xlabel="b", ylabel="nats")
    right.set(title="accuracy score", xlabel="b", ylabel="points")
    left.legend(fontsize=7)
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"At b = 0.2 the gap is {report.range('b 0.2: gap', '.2f')} of {report.mean('b 0.2: true gap'):.2f} nats: "
        "short training shrinks gaps.",
        f"At b = 0.3 the rule on groups that are never right left out "
        f"{report.range('b 0.3: templates left out', '.0f')} of {2 * PHRASES} phrases: it removes the largest gaps.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
