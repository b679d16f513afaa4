"""P005: DDO turns any reference into the data distribution; and does it help limited models? (2503.01103)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.diffusion import Denoiser, distance_and_coverage, fit, moons, noise_errors
from worlds.enumerable import GRULM, Language, categorical, expectation, total_variation

from loglik.objectives.base import Terms
from loglik.objectives.density_ratio import ddo
from loglik.objectives.supervised import MaximumLikelihood

BINS, STEPS, LR = 201, 20_000, 0.02
SETTINGS = {"1, 1": (1.0, 1.0), "4, 1": (4.0, 1.0), "1, 0.5": (1.0, 0.5)}  # alpha, beta
PALINDROMES = Language(6, 6)
ROUNDS, ROUND_STEPS = 3, 100
GRU_SETTINGS = {"1, 1": (1.0, 1.0), "4, 0.1": (4.0, 0.1)}
# Chosen on seeds 0 to 4 among alpha .5 to 4, beta .02 to 20, learning rates 1e-4 to 3e-3; the seeds here are others.
ALPHA, BETA, NET_LR, PRETRAIN, EXTRA, BATCH, POOL = 0.8, 0.1, 3e-3, 500, 300, 256, 4000
TRIPLE = "mle, 3 times the steps"

CLAIM = Claim(
    paper="P005",
    text=(
        "With alpha = beta = 1 and full capacity, telling data from reference samples by the log-ratio drives the "
        "model to the data distribution for any full-support reference; other settings do not. With limited capacity a "
        "round of DDO improves samples more than as much further likelihood training."
    ),
    setup=(
        "Exact: 201 bins on [-4, 4], data .7 N(-1, .35) + .3 N(1.8, .5), a random reference softmax(N(0, 1)) per seed, "
        "exact expectations, Adam 0.02, 20,000 steps. Limited: DDPM (50 steps, MLP of width 128) on two moons after "
        "500 Adam steps; 300 steps of DDO (alpha 0.8, beta 0.1, fixed on seeds 0 to 4; 4,000 fakes; unit weights, "
        "shared noise) against 300 further likelihood steps, both at 0.003 with averaged weights (decay .98); distance "
        "of 10,000 samples to the moons. "
        "Beside it: GRU of width 16 on palindromes (6 symbols, length 6), exact validity after 3 rounds of 100 steps "
        "against 300 further likelihood steps."
    ),
    checks=(
        Check(
            "any reference becomes the data",
            "alpha = beta = 1: total variation to the data < 0.001, in every seed",
            lambda m: m["tv, alpha beta = 1, 1"] < 1e-3,
            ("tv, alpha beta = 1, 1",),
        ),
        Check(
            "only at alpha = beta = 1",
            "alpha = 4 and beta = 0.5 end at a total variation > 0.05, in every seed",
            lambda m: min(m["tv, alpha beta = 4, 1"], m["tv, alpha beta = 1, 0.5"]) > 0.05,
            ("tv, alpha beta = 4, 1", "tv, alpha beta = 1, 0.5"),
        ),
        Check(
            "better samples under limited capacity",
            "two moons: DDO's mean distance to the data manifold is at least 10 % below that of likelihood training "
            "and its coverage loses less than 5 %, in 4 of 5 seeds",
            lambda m: (
                m["moons ddo: distance"] <= 0.9 * m["moons mle: distance"]
                and m["moons ddo: coverage"] > 0.95 * m["moons mle: coverage"]
            ),
            ("moons ddo: distance", "moons mle: distance", "moons ddo: coverage", "moons mle: coverage"),
            share=(4, 5),
        ),
        Check(
            "better palindromes under limited capacity",
            "GRU: validity after DDO (alpha = beta = 1) > that of likelihood training, in 4 of 5 seeds",
            lambda m: m["palindromes ddo 1, 1"] > m["palindromes mle"],
            ("palindromes ddo 1, 1", "palindromes mle"),
            share=(4, 5),
            main=False,
        ),
        Check(
            "more likelihood training does not catch up",
            "two moons: DDO's mean distance is below that of three times as many likelihood steps, in 4 of 5 seeds",
            lambda m: m["moons ddo: distance"] < m["moons mle, 3 times the steps: distance"],
            ("moons ddo: distance", "moons mle, 3 times the steps: distance"),
            share=(4, 5),
            main=False,
        ),
    ),
    seeds=5,
)


# ---------------------------------------------------------------------- exact
def data_log_probs() -> Tensor:
    x = torch.linspace(-4, 4, BINS, dtype=torch.float64)
    normal = torch.distributions.Normal
    parts = [
        w.log() + normal(m, s).log_prob(x) for w, m, s in torch.tensor([[0.7, -1, 0.35], [0.3, 1.8, 0.5]]).double()
    ]
    return torch.stack(parts).logsumexp(0).log_softmax(0)


def exact_mean(terms: Terms, real: Tensor, fake: Tensor) -> Tensor:
    """The loss with every outcome as a real and as a fake row, weighted by probabilities instead of averaged."""
    return sum((part.loss * w).sum() for part, w in zip(terms.parts(), (real, fake), strict=True))


def full_capacity(reference: Tensor, alpha: float, beta: float) -> list[float]:
    """Total variation to the data along training of a free distribution over the bins."""
    data = data_log_probs()
    frozen = categorical(reference)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LR)
    curve = []
    for step in range(STEPS + 1):
        model = categorical(logits.log_softmax(0))
        if step % 500 == 0:
            curve.append(total_variation(model.value.detach(), data).item())
        loss = exact_mean(ddo(model, frozen, model, frozen, alpha=alpha, beta=beta), data.exp(), reference.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


# ---------------------------------------------------------------------- a small GRU on palindromes
def palindromes(n: int, generator: torch.Generator) -> Tensor:
    half = torch.randint(6, (n, 3), generator=generator)
    return torch.cat([half, half.flip(1)], 1)


@torch.no_grad()
def validity(model: GRULM) -> float:
    """Exact probability of a palindrome."""
    ids = PALINDROMES.sequences
    return expectation(PALINDROMES.log_probs(model), (ids == ids.flip(1)).all(1).float()).item()


def descend(model: GRULM, steps: int, lr: float, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def limited_gru(generator: torch.Generator) -> dict[str, float]:
    start = GRULM(6, 16)
    likelihood = MaximumLikelihood("sum")
    descend(start, 300, 5e-3, lambda: likelihood(start.log_prob(palindromes(128, generator))).mean())
    values = {"palindromes start": validity(start)}
    more = copy.deepcopy(start)
    descend(more, ROUNDS * ROUND_STEPS, 1e-3, lambda: likelihood(more.log_prob(palindromes(128, generator))).mean())
    values["palindromes mle"] = validity(more)
    for name, settings in GRU_SETTINGS.items():
        model = copy.deepcopy(start)
        for _ in range(ROUNDS):
            round_of_ddo(model, *settings, generator)
        values[f"palindromes ddo {name}"] = validity(model)
    return values


def round_of_ddo(model: GRULM, alpha: float, beta: float, generator: torch.Generator) -> None:
    """Make the model its own reference, draw a pool of fakes from it, and tell them from the data."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    pool = frozen.sample(2000, length=6, generator=generator)

    def loss() -> Tensor:
        real, fake = palindromes(128, generator), pool[torch.randint(len(pool), (128,), generator=generator)]
        scores = [m.log_prob(rows) for rows in (real, fake) for m in (model, frozen)]
        return ddo(*scores, alpha=alpha, beta=beta).mean()

    descend(model, ROUND_STEPS, 1e-3, loss)


# ---------------------------------------------------------------------- an under-trained diffusion model
def limited_diffusion(generator: torch.Generator) -> dict[str, float]:
    def likelihood(model: Denoiser) -> Tensor:
        return -noise_errors(model, moons(BATCH, generator=generator), model.draws(BATCH, generator)).value.mean()

    def discriminate(model: Denoiser) -> Tensor:
        scores = []
        for rows in (moons(BATCH, generator=generator), pool[torch.randint(POOL, (BATCH,), generator=generator)]):
            draws = model.draws(BATCH, generator)
            scores += [noise_errors(m, rows, draws) for m in (model, start)]
        return ddo(*scores, alpha=ALPHA, beta=BETA).mean()

    start = Denoiser()
    fit(start, likelihood, PRETRAIN, lr=NET_LR)
    start.requires_grad_(False)
    pool = start.sample(POOL, generator=generator)
    values: dict[str, float] = {}
    arms = {"start": (likelihood, 0), "mle": (likelihood, 1), TRIPLE: (likelihood, 3), "ddo": (discriminate, 1)}
    for name, (loss, times) in arms.items():
        model = fit(copy.deepcopy(start).requires_grad_(), loss, times * EXTRA, lr=NET_LR)
        distance, coverage = distance_and_coverage(model.sample(10_000, generator=generator))
        values[f"moons {name}: distance"], values[f"moons {name}: coverage"] = distance, coverage
    return values


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(BINS, generator=generator, dtype=torch.float64).log_softmax(0)
    curves = {name: full_capacity(reference, alpha, beta) for name, (alpha, beta) in SETTINGS.items()}
    values = {f"tv, alpha beta = {name}": curve[-1] for name, curve in curves.items()}
    values |= limited_diffusion(generator) | limited_gru(generator)
    values["moons: distance, ddo / mle"] = values["moons ddo: distance"] / values["moons mle: distance"]
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(SETTINGS):
        for first, measured in enumerate(report.measured):
            curve = measured.curves[name]
            label = None if first else f"alpha, beta = {name}"
            left.semilogy(range(0, STEPS + 1, 500), curve, color=f"C{number}", alpha=0.7, label=label)
    left.set(title="any reference", xlabel="step", ylabel="total variation to the data")
    left.legend(fontsize=7)
    names = ["start", "mle", "ddo", "mle, 3 times the steps"]
    for seed in range(len(report.seeds)):
        right.plot(names, [report.per_seed(f"moons {name}: distance")[seed] for name in names], "o-", alpha=0.7)
    right.set(title="two moons", ylabel="mean distance to the moons")
    right.tick_params(axis="x", labelsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"Two moons: DDO's distance is {report.range('moons: distance, ddo / mle', '.2f')} of that of as many "
        "likelihood steps, but this model is far from trained: three times as many likelihood steps (a DDO step costs "
        "more than two of them) reach a distance of "
        f"{report.range('moons mle, 3 times the steps: distance', '.3f')} against DDO's "
        f"{report.range('moons ddo: distance', '.3f')}.",
        "On seeds 0 to 4 the gain depended on the setting: alpha 0.5 to 0.8 with beta 0.1 or 0.05 gained 10 to 42 % "
        "once weights were averaged (as in the paper), and noisily without; alpha >= 1 with beta >= 1 was no better "
        "than likelihood training, and alpha 4 with beta 1 diverged.",
        "The setting of the limited part was chosen among about 20 on development seeds. Without averaged weights an "
        "earlier choice (alpha 0.65) failed on four further ones (ratios 0.90 to 1.01); averaging was then added to "
        "both arms. Its scan used torch seeds 0 to 3 with generators 200 to 203. The exact part oscillates late: total "
        "variation passes 0.001 at times, and the check reads the last step.",
        "GRU on palindromes (alpha, beta as named), exact validity: start "
        f"{report.range('palindromes start')}, likelihood {report.range('palindromes mle')}, DDO 1, 1 "
        f"{report.range('palindromes ddo 1, 1')}, DDO 4, 0.1 {report.range('palindromes ddo 4, 0.1')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
