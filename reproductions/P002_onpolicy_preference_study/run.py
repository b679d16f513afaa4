"""P002: the push on rejected answers and fresh on-policy samples, on a bandit whose reward is known (2404.14367)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import Language, Tabular
from worlds.preference import Pairs, PreferenceWorld

from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms
from loglik.objectives.preference import dpo, ipo
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.preference import likelihood_displacement

ARMS = 100
PAIRS, OFFLINE_STEPS, ONLINE_STEPS, LR, STRENGTH = 200, 400, 200, 0.05, 0.1
PROMPTS, SAMPLES = 100, 10
PEAKS = {"dense": 20, "sparse": 70}  # where the reference has much mass, and where it has little
BANDIT = Language(ARMS, 1)
Loss = Callable[[LogLikelihood, LogLikelihood, LogLikelihood, LogLikelihood], Terms]

LOSSES: dict[str, Loss] = {
    "pref_ft": lambda good, bad, ref_good, ref_bad: MaximumLikelihood("sum")(good),
    "ipo": lambda good, bad, ref_good, ref_bad: ipo(good, bad, ref_good, ref_bad, tau=STRENGTH),
    "dpo": lambda good, bad, ref_good, ref_bad: dpo(good, bad, ref_good, ref_bad, beta=STRENGTH),
    "dpo_detached": lambda good, bad, ref_good, ref_bad: dpo(good, bad.detach(), ref_good, ref_bad, beta=STRENGTH),
}

CLAIM = Claim(
    paper="P002",
    text=(
        "On offline pairs DPO and IPO beat likelihood training on the winners only because of the gradient on the "
        "rejected answer, and fresh on-policy rounds help most where the reward peaks at answers that the reference "
        "rarely gives."
    ),
    setup=(
        "Bandit of 100 arms; reference tanh(Cauchy(-0.7, 0.4)) on [-1, 1] cut into 100 bins; reward "
        "exp(-((a - peak) / 10)^2) with its peak at arm 20 (dense) or 70 (sparse); tabular softmax policy from the "
        "reference, Adam, learning rate 0.05. Offline: 200 pairs from the reference labelled by the reward, 400 steps, "
        "beta = tau = 0.1. Best-of-10 over 100 prompts, 200 steps in all: samples drawn once from the reference, or "
        "ten times from the current policy. All expected rewards are exact."
    ),
    checks=(
        Check(
            "negative gradient helps",
            "dense peak, offline: expected reward of DPO and of IPO > that of Pref-FT + 0.2, in every seed",
            lambda m: min(m["dense dpo"], m["dense ipo"]) > m["dense pref_ft"] + 0.2,
            ("dense dpo", "dense ipo", "dense pref_ft"),
        ),
        Check(
            "and it alone does",
            "dense peak, offline: DPO with the rejected log-probability detached is within 0.05 of Pref-FT, in every "
            "seed",
            lambda m: abs(m["dense dpo_detached"] - m["dense pref_ft"]) < 0.05,
            ("dense dpo_detached", "dense pref_ft"),
        ),
        Check(
            "on-policy rounds help at the sparse peak",
            "best-of-10, 10 rounds against 1: gain at the sparse peak > 0.5 and > 3 times the gain at the dense peak, "
            "in every seed",
            lambda m: m["sparse gain of rounds"] > max(0.5, 3 * m["dense gain of rounds"]),
            ("sparse gain of rounds", "dense gain of rounds"),
        ),
        Check(
            "DPO displaces the winners it learns from",
            "dense peak: mean log-probability of the chosen arms falls while the expected reward rises, in every seed",
            lambda m: m["dense dpo displacement"] < 0 and m["dense dpo"] > m["dense reference"],
            ("dense dpo displacement", "dense dpo", "dense reference"),
            main=False,
        ),
        Check(
            "offline DPO does not replace exploration",
            "sparse peak: offline DPO stays 0.5 below ten on-policy rounds of best-of-10, in every seed",
            lambda m: m["sparse dpo"] < m["sparse best_of_n, 10 rounds"] - 0.5,
            ("sparse dpo", "sparse best_of_n, 10 rounds"),
            main=False,
        ),
    ),
    seeds=5,
)


def reference() -> Tensor:
    """(100,) log of the exact mass of each bin."""
    edges = torch.linspace(-1, 1, ARMS + 1, dtype=torch.float64).atanh()
    below = torch.atan((edges + 0.7) / 0.4) / math.pi + 0.5
    return below.diff().log().float()


def world(peak: int) -> PreferenceWorld:
    arms = torch.arange(ARMS)
    return PreferenceWorld(reference(), torch.exp(-(((arms - peak) / 10) ** 2)))


def fit(w: PreferenceWorld, policy: Tabular, losses: Callable[[int], Tensor], steps: int) -> list[float]:
    """Adam for `steps`; the exact expected reward before each and after the last."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    rewards = []
    for step in range(steps):
        loss = losses(step)
        rewards.append(expected_reward(w, policy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*rewards, expected_reward(w, policy)]


@torch.no_grad()
def expected_reward(w: PreferenceWorld, policy: Tabular) -> float:
    return w.expected_reward(BANDIT.log_probs(policy)).item()


def offline(w: PreferenceWorld, pairs: Pairs, loss: Loss) -> tuple[list[float], float]:
    """Rewards along training on the pairs, and the change in the winners' mean log-probability."""
    policy, frozen = Tabular.of(w.reference, BANDIT), Tabular.of(w.reference, BANDIT).requires_grad_(False)
    chosen, rejected = pairs.chosen[:, None], pairs.rejected[:, None]
    ref_chosen, ref_rejected = frozen.log_prob(chosen), frozen.log_prob(rejected)

    def step(_: int) -> Tensor:
        return loss(policy.log_prob(chosen), policy.log_prob(rejected), ref_chosen, ref_rejected).mean()

    rewards = fit(w, policy, step, OFFLINE_STEPS)
    return rewards, likelihood_displacement(ref_chosen, policy.log_prob(chosen)).mean.item()


def best_of_n(w: PreferenceWorld, rounds: int, generator: torch.Generator) -> list[float]:
    """Rewards along likelihood training on the best of ten samples, drawn anew in each round."""
    policy = Tabular.of(w.reference, BANDIT)
    best = torch.zeros(0, 1, dtype=torch.long)

    def step(number: int) -> Tensor:
        nonlocal best
        if number % (ONLINE_STEPS // rounds) == 0:
            drawn = policy.sample(PROMPTS * SAMPLES, length=1, generator=generator).reshape(PROMPTS, SAMPLES)
            best = drawn.gather(1, w.rewards[drawn].argmax(1, keepdim=True))
        return MaximumLikelihood("sum")(policy.log_prob(best)).mean()

    return fit(w, policy, step, ONLINE_STEPS)


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, peak in PEAKS.items():
        w = world(peak)
        values[f"{name} reference"] = w.expected_reward(w.reference).item()
        pairs = w.pairs(PAIRS, generator=generator, noisy=False)
        for method, loss in LOSSES.items():
            rewards, displacement = offline(w, pairs, loss)
            values[f"{name} {method}"] = rewards[-1]
            values[f"{name} {method} displacement"] = displacement
            curves[f"{name} {method}"] = rewards
        for rounds in (1, 10):
            rewards = best_of_n(w, rounds, generator)
            values[f"{name} best_of_n, {rounds} rounds"] = rewards[-1]
            curves[f"{name} best_of_n, {rounds} rounds"] = rewards
        once, often = (values[f"{name} best_of_n, {rounds} rounds"] for rounds in (1, 10))
        values[f"{name} gain of rounds"] = often - once
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, names, title in (
        (left, [f"dense {m}" for m in LOSSES], "offline pairs, dense peak"),
        (right, [f"{p} best_of_n, {r} rounds" for p in PEAKS for r in (1, 10)], "best of 10"),
    ):
        for number, name in enumerate(names):
            for first, measured in enumerate(report.measured):
                axes.plot(measured.curves[name], color=f"C{number}", alpha=0.7, label=None if first else name)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7)
    left.set_ylabel("exact expected reward")


def notes(report: Report) -> list[str]:
    return [
        "Likelihood displacement (see P023): at the dense peak the mean log-probability of the winners changes by "
        f"{report.range('dense dpo displacement', '.1f')} nats under DPO and by "
        f"{report.range('dense ipo displacement', '.1f')} under IPO, while the reward rises.",
        f"At the sparse peak 200 offline pairs take DPO to {report.range('sparse dpo', '.2f')} and IPO to "
        f"{report.range('sparse ipo', '.2f')} only: a negative gradient does not replace exploration.",
        "Labels are noise-free here (the larger reward wins) and pairs of equal reward are left out; there is no "
        "context, so a policy is one distribution.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
