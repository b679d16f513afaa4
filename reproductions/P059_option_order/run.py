"""P059: naive survey answers show position bias, averages over orders do not; weak models look uniform (2306.07951)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM, categorical

from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.option_order import (
    alignment_entropy,
    average_orders,
    normalised_entropy,
    option_orders,
    order_effects,
)

QUESTIONS, OPTIONS = 20, 4
CONCENTRATION, BIAS = 0.7, (1.2, 0.3, 0.0, 0.0)
WIDTH, STEPS, BATCH, LR = 64, 700, 256, 2e-3
LOOKED = (30, 100, 700)
ANSWER = QUESTIONS + QUESTIONS * OPTIONS  # the token before the letter; letters follow it
LETTERS = torch.arange(OPTIONS) + ANSWER + 1
SURVEYED, GROUPS, DRAWS = 25, 50, 20

CLAIM = Claim(
    paper="P059",
    text=(
        "Naive answers by option letters are biased to positions, and the average over all orders removes that; a weak "
        "model shows the bias and uniform adjusted answers although its population is far from uniform. A near-uniform "
        "model seems aligned with whichever subgroup is closest to uniform."
    ),
    setup=(
        "20 questions with 4 option tokens each, population Dirichlet(0.7); training shows options in random order, "
        "and the answer is the letter drawn from softmax(log population + b), b = (1.2, 0.3, 0, 0) by position. A "
        "transformer (2 layers, width 64, 4 heads) learns the letter in 700 AdamW steps of 256, learning rate 2e-3 "
        "decayed to 0. All 24 orders are asked after 30, 100 and 700 steps. Second, without a model: 20 draws of 25 "
        "questions with 50 subgroups, each Dirichlet(0.7) of its own; the near-uniform model is softmax(0.1 N(0, 1)), "
        "the other one is a further such subgroup. Beside it: subgroups that share opinions and differ in how sure "
        "they are, softmax(s (base + N(0, 0.5^2))) with s uniform in [0.3, 2]."
    ),
    checks=(
        Check(
            "a weak model is biased and looks uniform",
            "after 30 steps A-bias > 0.08 and normalised entropy of adjusted answers > 0.98, while that of the "
            "population < 0.85, in every seed",
            lambda m: m["30: A-bias"] > 0.08 and m["30: H adjusted"] > 0.98 and m["H population"] < 0.85,
            ("30: A-bias", "30: H adjusted", "H population"),
        ),
        Check(
            "adjusting recovers the population",
            "after 700 steps KL(population || adjusted) < 0.25 KL(population || naive), in every seed",
            lambda m: m["700: KL adjusted"] < 0.25 * m["700: KL naive"],
            ("700: KL adjusted", "700: KL naive"),
        ),
        Check(
            "the geometric mean does it at least as well",
            "after 700 steps KL(population || geometric) <= KL(population || arithmetic), in every seed",
            lambda m: m["700: KL geometric"] <= m["700: KL adjusted"],
            ("700: KL geometric", "700: KL adjusted"),
        ),
        Check(
            "alignment is entropy",
            "mean correlation of divergence and subgroup entropy < -0.5 for the near-uniform model, and lower than for "
            "the other by > 0.25, in every seed",
            lambda m: m["correlation, near-uniform"] < min(-0.5, m["correlation, subgroup"] - 0.25),
            ("correlation, near-uniform", "correlation, subgroup"),
        ),
        Check(
            "alignment is entropy, shared opinions",
            "the same where subgroups share opinions and differ in how sure they are",
            lambda m: (
                m["correlation, near-uniform, shared opinions"]
                < min(-0.5, m["correlation, subgroup, shared opinions"] - 0.25)
            ),
            ("correlation, near-uniform, shared opinions", "correlation, subgroup, shared opinions"),
            main=False,
        ),
    ),
    seeds=3,
)


def rows(questions: Tensor, orders: Tensor) -> Tensor:
    """(N, 7) the question, its options in this order, the answer's token, and a place for the letter."""
    options = QUESTIONS + questions[:, None] * OPTIONS + orders
    answer = torch.full((len(questions), 1), ANSWER)
    return torch.cat([questions[:, None], options, answer, answer], 1)


def survey(network: TransformerLM, population: Tensor, step: int) -> dict[str, float]:
    """All questions in all orders."""
    orders = option_orders(OPTIONS)
    found: dict[str, list[float]] = {}
    for question in range(QUESTIONS):
        asked = rows(torch.full((len(orders),), question), orders)
        with torch.no_grad():
            letters = network.conditionals(asked)[:, -1, LETTERS].double()
        likelihood = categorical(letters.flatten())
        adjusted, geometric = (average_orders(likelihood, orders, mean=m) for m in ("arithmetic", "geometric"))
        pi = population[question]
        effects = order_effects(likelihood, orders)
        values = {
            "A-bias": adjusted.first_bias,
            "coverage": adjusted.coverage or 0.0,
            "H naive": normalised_entropy(adjusted.naive).item(),
            "H adjusted": normalised_entropy(adjusted.probs).item(),
            "KL naive": divergence(pi, adjusted.naive),
            "KL adjusted": divergence(pi, adjusted.probs),
            "KL geometric": divergence(pi, geometric.probs),
            "first position, nats": effects.position[0].item(),
            "residual share": effects.residual_share,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {f"{step}: {name}": float(np.mean(values)) for name, values in found.items()}


def divergence(p: Tensor, q: Tensor) -> float:
    return torch.xlogy(p, p / q).sum().item()


def alignment(generator: np.random.Generator, *, shared: bool) -> tuple[float, float]:
    """Correlations for a near-uniform model and for one that is such a subgroup."""
    base = generator.normal(size=(SURVEYED, OPTIONS))

    def subgroup() -> Tensor:
        if shared:
            scale = generator.uniform(0.3, 2)
            return torch.from_numpy(scale * (base + generator.normal(scale=0.5, size=base.shape))).softmax(-1)
        drawn = torch.from_numpy(generator.dirichlet([CONCENTRATION] * OPTIONS, SURVEYED)).clamp(min=1e-6)
        return drawn / drawn.sum(1, keepdim=True)

    groups = torch.stack([subgroup() for _ in range(GROUPS)], 1)
    near = torch.from_numpy(0.1 * generator.normal(size=base.shape)).softmax(-1)
    models = near, subgroup()
    first, second = (alignment_entropy(list(model), list(groups)).correlation for model in models)
    return first, second


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    drawn = np.random.default_rng(seed)
    population = torch.from_numpy(drawn.dirichlet([CONCENTRATION] * OPTIONS, QUESTIONS)).clamp(min=1e-12)
    population /= population.sum(1, keepdim=True)
    network = TransformerLM(int(LETTERS[-1]) + 1, WIDTH, length=7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    objective = MaximumLikelihood()
    bias = torch.tensor(BIAS)
    uniform = torch.full((OPTIONS,), 1 / OPTIONS).double()
    values = {
        "H population": normalised_entropy(population).mean().item(),
        "KL uniform": float(np.mean([divergence(pi, uniform) for pi in population])),
    }
    for step in range(1, STEPS + 1):
        questions = torch.randint(QUESTIONS, (BATCH,), generator=generator)
        orders = torch.rand(BATCH, OPTIONS, generator=generator).argsort(1)
        chances = (population[questions].gather(1, orders).log() + bias).softmax(1)
        batch = rows(questions, orders)
        batch[:, -1] = LETTERS[torch.multinomial(chances, 1, generator=generator)[:, 0]]
        loss = objective(network.log_prob(batch, start=6)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in LOOKED:
            values |= survey(network, population, step)
    for name, shared in (("", False), (", shared opinions", True)):
        near, other = np.mean([alignment(drawn, shared=shared) for _ in range(DRAWS)], 0)
        values |= {f"correlation, near-uniform{name}": float(near), f"correlation, subgroup{name}": float(other)}
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(("KL naive", "KL adjusted", "KL geometric")):
        for first, measured in enumerate(report.measured):
            points = [measured.values[f"{step}: {name}"] for step in LOOKED]
            left.loglog(LOOKED, points, "o-", color=f"C{number}", ms=4, label=None if first else name)
    left.set(title="divergence from the population", xlabel="training steps", ylabel="nats")
    left.legend(fontsize=7)
    for number, name in enumerate(("H naive", "H adjusted", "A-bias")):
        for first, measured in enumerate(report.measured):
            points = [measured.values[f"{step}: {name}"] for step in LOOKED]
            right.semilogx(LOOKED, points, "o-", color=f"C{number}", ms=4, label=None if first else name)
    right.axhline(report.mean("H population"), color="black", ls=":", lw=0.8, label="H population")
    right.set(title="entropy (share of its maximum) and bias", xlabel="training steps")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.set_xticks(LOOKED, [str(step) for step in LOOKED])
        axes.minorticks_off()


def notes(report: Report) -> list[str]:
    return [
        f"The first position is worth {report.range('700: first position, nats', '.2f')} nats at the end; the planted "
        f"bias gives it {BIAS[0] - sum(BIAS) / OPTIONS:.2f} above the mean position.",
        f"Effects of option and position leave {report.range('700: residual share', '.3f')} of the variance.",
        f"After 100 steps adjusted answers are {report.range('100: KL adjusted')} nats from the population, and the "
        f"uniform answer {report.range('KL uniform')}.",
        "Where subgroups share opinions, the correlation is "
        f"{report.range('correlation, subgroup, shared opinions', '.2f')} for a model that is one of them too: entropy "
        "then explains alignment whatever the model is.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
