"""P102: the self-normalised baseline keeps the gradient's variance small, whatever the proposal (2402.02479)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import Language, Tabular, kl
from worlds.preference import PreferenceWorld

from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives.policy import brain, dpg, gdc_pp

SAMPLES, REPLICATIONS = 8, 20_000
PROPOSALS = (0.0, 0.25, 0.5, 0.75, 1.0)  # means; the posterior's is 0, the policy's 1
# N(-1, 1) with reward y has the posterior N(0, 1) at gamma = 1, and log Z = -1/2.
PRIOR_MEAN, POLICY_MEAN, LOG_Z = -1.0, 1.0, -0.5
ESTIMATORS = ("dpg", "gdc_pp", "brain")
OUTCOMES, STEPS, REFRESH, LR, GAMMA = 200, 500, 20, 0.05, 0.5

CLAIM = Claim(
    paper="P102",
    text=(
        "The self-normalised baseline makes the gradient's variance small and nearly independent of how far the "
        "proposal is from the posterior, at some bias; without it training ends farther from the posterior."
    ),
    setup=(
        "Gradient: posterior N(0, 1), policy N(1, 1), proposal N(m, 1) with m from 0 to 1, groups of 8 samples, 20,000 "
        "replications, gradient with respect to the policy's mean (exact forward KL: 1); DPG and GDC++ know Z. "
        "Training: 200 outcomes, prior softmax(N(0, 1)), reward N(0, 1), gamma = 0.5, policy from the prior, 8 fresh "
        "samples per step from a copy of the policy that is refreshed every 20 steps, 500 Adam steps at 0.05; BRAIn "
        "against its target weights alone (no baseline). KL(posterior || policy) is exact."
    ),
    checks=(
        Check(
            "smaller variance with an on-policy proposal",
            "m = 1: variance of BRAIn < 1/3 of that of DPG and of GDC++, in every seed",
            lambda m: m["m=1 brain: variance"] < min(m["m=1 dpg: variance"], m["m=1 gdc_pp: variance"]) / 3,
            tuple(f"m=1 {e}: variance" for e in ESTIMATORS),
        ),
        Check(
            "nearly independent of the proposal",
            "BRAIn's variance varies by less than 25 % over m in [0, 1] (largest over smallest < 1.25), in every seed",
            lambda m: max(_brain(m)) < 1.25 * min(_brain(m)),
            tuple(f"m={m:g} brain: variance" for m in PROPOSALS),
        ),
        Check(
            "the baseline trains closer to the posterior",
            "KL(posterior || policy) after 500 steps: BRAIn < no baseline, in 4 of 5 seeds",
            lambda m: m["training brain: kl"] < m["training no baseline: kl"],
            ("training brain: kl", "training no baseline: kl"),
            share=(4, 5),
        ),
        Check(
            "DPG is better with the posterior as proposal",
            "m = 0: variance of DPG < variance of BRAIn, in every seed",
            lambda m: m["m=0 dpg: variance"] < m["m=0 brain: variance"],
            ("m=0 dpg: variance", "m=0 brain: variance"),
            main=False,
        ),
        Check(
            "BRAIn is biased towards zero",
            "mean gradient below 0.9 at every m, where the exact one is 1, in every seed",
            lambda m: all(m[f"m={p:g} brain: mean"] < 0.9 for p in PROPOSALS),
            tuple(f"m={m:g} brain: mean" for m in PROPOSALS),
            main=False,
        ),
    ),
    seeds=5,
)


def _brain(measured: Mapping[str, float]) -> list[float]:
    return [measured[f"m={m:g} brain: variance"] for m in PROPOSALS]


def normal(y: Tensor, mean: Tensor | float) -> LogLikelihood:
    """Log-densities (N,) under N(mean, 1)."""
    value = torch.distributions.Normal(mean, 1.0).log_prob(y)
    return LogLikelihood(value, Kind.EXACT, Unit.DIM, torch.ones(len(y), dtype=torch.long))


def gradients(proposal: float, generator: torch.Generator) -> dict[str, Tensor]:
    """(replications,) gradients of each estimator, from the same samples."""
    y = proposal + torch.randn(REPLICATIONS * SAMPLES, generator=generator, dtype=torch.float64)
    groups = torch.arange(REPLICATIONS).repeat_interleave(SAMPLES)
    found = {}
    for name, estimator in (("dpg", dpg), ("gdc_pp", gdc_pp), ("brain", brain)):
        mean = torch.full((REPLICATIONS,), POLICY_MEAN, dtype=torch.float64, requires_grad=True)
        known = {} if name == "brain" else {"log_normalizer": LOG_Z}
        terms = estimator(
            normal(y, mean[groups]), normal(y, PRIOR_MEAN), normal(y, proposal).value, y, groups, gamma=1.0, **known
        )
        (found[name],) = torch.autograd.grad(terms.loss.sum(), mean)
    return found


def training(seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """KL to the posterior after training with BRAIn and without its baseline, from the same start."""
    generator = torch.Generator().manual_seed(seed)
    prior = torch.randn(OUTCOMES, generator=generator).log_softmax(0)
    world = PreferenceWorld(prior, torch.randn(OUTCOMES, generator=generator))
    posterior, space = world.optimum(GAMMA), Language(OUTCOMES, 1)
    reference = Tabular.of(prior, space).requires_grad_(False)
    values = {"training start: kl": kl(posterior, prior).item()}
    curves = {}
    groups = torch.zeros(SAMPLES, dtype=torch.long)
    # Without a given Z, DPG's weights are BRAIn's target weights: what is missing is the baseline.
    for name, objective in (("brain", brain), ("no baseline", dpg)):
        draws = torch.Generator().manual_seed(seed)
        policy, sampler = Tabular.of(prior, space), Tabular.of(prior, space)
        optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
        curve = []
        for step in range(STEPS):
            if step % REFRESH == 0:
                sampler.load_state_dict(policy.state_dict())
            rows = sampler.sample(SAMPLES, length=1, generator=draws)
            terms = objective(
                policy.log_prob(rows),
                reference.log_prob(rows),
                sampler.log_prob(rows).value.detach(),
                world.rewards[rows[:, 0]],
                groups,
                gamma=GAMMA,
            )
            optimizer.zero_grad()
            terms.mean().backward()
            optimizer.step()
            curve.append(kl(posterior, space.log_probs(policy).detach()).item())
        values[f"training {name}: kl"] = curve[-1]
        curves[name] = curve
    return values, curves


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, float] = {}
    for proposal in PROPOSALS:
        for name, gradient in gradients(proposal, generator).items():
            values[f"m={proposal:g} {name}: variance"] = gradient.var().item()
            values[f"m={proposal:g} {name}: mean"] = gradient.mean().item()
    trained, curves = training(seed)
    return Measured(values | trained, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(ESTIMATORS):
        for seed in range(len(report.seeds)):
            variances = [report.per_seed(f"m={m:g} {name}: variance")[seed] for m in PROPOSALS]
            left.semilogy(PROPOSALS, variances, "o-", color=f"C{number}", alpha=0.7, label=None if seed else name)
    left.set(title="gradient variance", xlabel="mean of the proposal")
    left.legend(fontsize=7)
    for number, name in enumerate(("brain", "no baseline")):
        for seed, measured in enumerate(report.measured):
            right.plot(measured.curves[name], color=f"C{number}", alpha=0.7, label=None if seed else name)
    right.set(title="training", xlabel="step", ylabel="KL(posterior || policy)")
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    means = [value for m in PROPOSALS for value in report.per_seed(f"m={m:g} brain: mean")]
    return [
        f"With the posterior itself as proposal (m = 0) DPG is better: variance {report.range('m=0 dpg: variance')} "
        f"against BRAIn's {report.range('m=0 brain: variance')}.",
        f"BRAIn is biased: its mean gradient is {min(means):.2f} to {max(means):.2f} where that of the forward KL is 1 "
        "(it is unbiased for its own, self-normalised KL). DPG and GDC++ are unbiased, but need Z.",
        f"Training: KL falls from {report.range('training start: kl')} to {report.range('training brain: kl')} with "
        f"BRAIn and is {report.range('training no baseline: kl')} without the baseline.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
