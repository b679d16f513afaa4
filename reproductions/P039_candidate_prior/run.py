"""P039: taking the candidate's prior off its likelihood recovers the optimum for uniform candidates (2507.23284)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn

from loglik.likelihood import LogLikelihood
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.choice import choose

ATTRIBUTES, VALUES, DIMENSIONS, NOISE = 3, 5, 8, 1.2
CAPTIONS = torch.tensor(list(itertools.product(range(VALUES), repeat=ATTRIBUTES)))
WIDTH, STEPS, BATCH, LR, DROPPED = 64, 800, 256, 3e-3, 0.2
PAIRS = 1000
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)

CLAIM = Claim(
    paper="P039",
    text=(
        "Subtracting alpha times the log-prior of a candidate, which the same model gives without the query, recovers "
        "the choice that is best when candidates are uniform."
    ),
    setup=(
        "125 captions of 3 attributes with 5 values, Zipf prior in random order; v in R^8 is the sum of its "
        "attributes' N(0, 1) vectors plus N(0, 1.2^2). A GRU of width 64 learns p(caption | v), v replaced by a "
        "learned vector in 20 % of the rows, on fresh pairs from the Zipf prior: 800 Adam steps of 256, learning rate "
        "3e-3. Test: the caption of 1000 pairs with uniform captions among all 125, by mean log-likelihood per token "
        "minus alpha times the mean log-prior, alpha in {0, .25, .5, .75, 1}. The same with exact posteriors "
        "instead of the network."
    ),
    checks=(
        Check(
            "closed form",
            "with exact probabilities alpha = 1 chooses what the Bayes classifier under the uniform prior chooses, in "
            "every pair and seed",
            lambda m: m["exact: agreement with Bayes at alpha 1"] == 1.0,
            ("exact: agreement with Bayes at alpha 1",),
        ),
        Check(
            "the correction helps",
            "R@1 of the best alpha >= 0.5 exceeds that of alpha = 0 by >= 4 points, in every seed",
            lambda m: max(m[f"R@1, alpha {a:g}"] for a in ALPHAS if a >= 0.5) - m["R@1, alpha 0"] >= 0.04,
            tuple(f"R@1, alpha {a:g}" for a in ALPHAS),
        ),
        Check(
            "a large alpha is best",
            "the best alpha lies in [0.5, 1], in every seed",
            lambda m: 0.5 <= m["best alpha"] <= 1,
            ("best alpha",),
        ),
        Check(
            "the prior is learned",
            "correlation of the model's log-prior with the true one > 0.9, in every seed",
            lambda m: m["correlation of log-priors"] > 0.9,
            ("correlation of log-priors",),
        ),
    ),
    seeds=3,
)


class Captioner(nn.Module):
    """p(caption | v) by a GRU whose first state comes from v, or from a learned vector where v is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.missing = nn.Parameter(torch.zeros(DIMENSIONS))
        self.begin = nn.Sequential(nn.Linear(DIMENSIONS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.embedding = nn.Embedding(VALUES * ATTRIBUTES + 1, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VALUES)

    def log_prob(self, captions: Tensor, v: Tensor | None = None) -> LogLikelihood:
        """Of each caption (B, 3) given v (B, 8), or without it; nats."""
        given = self.missing.expand(len(captions), -1) if v is None else v
        places = torch.arange(ATTRIBUTES) * VALUES
        start = torch.full((len(captions), 1), VALUES * ATTRIBUTES)
        inputs = self.embedding(torch.cat([start, (captions + places)[:, :-1]], 1))
        states = self.gru(inputs, self.begin(given)[None])[0]
        terms = self.head(states).log_softmax(-1).gather(-1, captions[..., None])[..., 0]
        return LogLikelihood.from_per_unit(terms, torch.ones_like(terms, dtype=torch.bool))


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(ATTRIBUTES, VALUES, DIMENSIONS, generator=generator)
    means = sum(vectors[a][CAPTIONS[:, a]] for a in range(ATTRIBUTES))
    ranks = torch.randperm(len(CAPTIONS), generator=generator) + 1
    log_prior = (1 / ranks.double()).log()
    log_prior -= log_prior.logsumexp(0)

    def seen(which: Tensor) -> Tensor:
        return means[which] + NOISE * torch.randn(len(which), DIMENSIONS, generator=generator)

    model = Captioner()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    objective = MaximumLikelihood()
    for _ in range(STEPS):
        which = torch.multinomial(log_prior.exp(), BATCH, replacement=True, generator=generator)
        missing = torch.rand(BATCH, 1, generator=generator) < DROPPED
        v = torch.where(missing, model.missing, seen(which))
        loss = objective(model.log_prob(CAPTIONS[which], v)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False).eval()

    gold = torch.randint(len(CAPTIONS), (PAIRS,), generator=generator)
    v = seen(gold)
    size = len(CAPTIONS)
    question = torch.arange(PAIRS).repeat_interleave(size)
    everything = CAPTIONS.repeat(PAIRS, 1)
    likelihood = model.log_prob(everything, v.repeat_interleave(size, 0))
    own_prior = model.log_prob(CAPTIONS)
    prior = own_prior[torch.arange(size).repeat(PAIRS)]
    values: dict[str, float] = {}
    for alpha in ALPHAS:
        found = choose(likelihood, question, normalise="token", prior=prior, alpha=alpha)
        values[f"R@1, alpha {alpha:g}"] = (found.choice == gold).double().mean().item()

    # The same choices with exact probabilities.
    log_v = -(torch.cdist(v.double(), means.double()) ** 2) / (2 * NOISE**2)
    log_v -= DIMENSIONS / 2 * math.log(2 * math.pi * NOISE**2)
    posterior = (log_v + log_prior).log_softmax(1)
    units = torch.full((PAIRS * size,), ATTRIBUTES)
    exact = LogLikelihood(posterior.flatten(), likelihood.kind, likelihood.unit, units)
    exact_prior = LogLikelihood(log_prior.repeat(PAIRS), likelihood.kind, likelihood.unit, units)
    for alpha in ALPHAS:
        found = choose(exact, question, normalise="token", prior=exact_prior, alpha=alpha)
        values[f"exact: R@1, alpha {alpha:g}"] = (found.choice == gold).double().mean().item()
        if alpha == 1:
            agreement = (found.choice == log_v.argmax(1)).double().mean().item()
            values["exact: agreement with Bayes at alpha 1"] = agreement
    values["Bayes, uniform prior: R@1"] = (log_v.argmax(1) == gold).double().mean().item()
    values["best alpha"] = max(ALPHAS, key=lambda a: values[f"R@1, alpha {a:g}"])
    values["correlation of log-priors"] = float(np.corrcoef(own_prior.value, log_prior)[0, 1])
    return Measured(values, {"own": own_prior.value.tolist(), "true": log_prior.tolist()})


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, (seed, measured) in enumerate(zip(report.seeds, report.measured, strict=True)):
        for prefix, style in (("", "o-"), ("exact: ", "s:")):
            points = [measured.values[f"{prefix}R@1, alpha {a:g}"] for a in ALPHAS]
            left.plot(ALPHAS, points, style, ms=4, color=f"C{number}", label=f"{prefix or 'network: '}seed {seed}")
        right.plot(measured.curves["true"], measured.curves["own"], ".", ms=4, color=f"C{number}", label=f"seed {seed}")
    left.set(title="right caption first, captions uniform", xlabel="alpha", ylabel="R@1")
    right.set(title="log-prior of the captions (nats)", xlabel="true", ylabel="network without v")
    left.legend(fontsize=6)
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"The network's best R@1 stays below the Bayes classifier's {report.range('Bayes, uniform prior: R@1')}: the "
        "captions that are rare under the Zipf prior are learned from few pairs.",
        f"With exact probabilities R@1 goes from {report.range('exact: R@1, alpha 0')} to "
        f"{report.range('exact: R@1, alpha 1')}.",
        "All captions have three tokens, so that means and sums rank alike here.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
