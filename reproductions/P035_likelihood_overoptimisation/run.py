"""P035: under DPO likelihood and margin go on while quality turns, and two indicators of it (2410.11677)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from worlds.enumerable import GRULM, Markov

from loglik.likelihood import LogLikelihood
from loglik.objectives.preference import dpo
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.over_optimisation import Indicators, LikelihoodMonitor
from loglik.signals.uncertainty import top_k_entropy, top_k_mass

SYMBOLS, LENGTH, WIDTH = 16, 5, 32
SFT_STEPS, SFT_LR, SFT_BATCH = 300, 5e-3, 128
PAIRS, FLIPPED, WINNER_STEPS = 300, 0.2, 1500
BETA, LR, STEPS, BATCH, EVERY, SAMPLES, TOP = 0.05, 3e-3, 600, 64, 20, 2000, 4
STARTS = ("", "low-entropy start ")
SHOWN = ("reward", "chosen", "entropy", "mass")

CLAIM = Claim(
    paper="P035",
    text=(
        "Under DPO the likelihood of chosen completions falls and the margin grows all along, while the true reward "
        "rises and then falls; the top-k entropy and top-k mass of the next token tell when to stop."
    ),
    setup=(
        "GRU of width 32 on 16 symbols, length 5, fitted to a random Markov source softmax(1.5 N(0, 1)) by 300 Adam "
        "steps (5e-3, batch 128). True reward: log-probability of the four transitions under a second such source, "
        "standardised under the reference. 300 pairs from the reference, the better one chosen, a fifth flipped. DPO "
        "with beta .05, Adam, 3e-3, 600 steps of 64. Every 20 steps: mean true reward of 2000 samples, and "
        "likelihoods, entropy and mass (k = 4) on 300 other pairs. Low-entropy start, beside the claim: the reference "
        "is first fitted to the 300 winners for 1500 steps. The monitor has its default settings."
    ),
    checks=(
        Check(
            "quality turns while the likelihood goes on falling",
            "the reward later loses at least 10 % of its peak gain, and Spearman of minus the chosen likelihood with "
            "the step is at least 0.95, in at least 4 of 5 seeds",
            lambda m: m["lost after the peak"] >= 0.1 and m["Spearman of minus chosen"] >= 0.95,
            ("lost after the peak", "Spearman of minus chosen", "peak gain"),
            share=(4, 5),
        ),
        Check(
            "and while the margin goes on growing",
            "the reward later loses at least 10 % of its peak gain, and Spearman of the training pairs' margin with "
            "the step is at least 0.95, in at least 4 of 5 seeds",
            lambda m: m["lost after the peak"] >= 0.1 and m["Spearman of margin"] >= 0.95,
            ("lost after the peak", "Spearman of margin"),
            share=(4, 5),
        ),
        Check(
            "the indicators stop in time",
            "there is an entropy or mass event, and stopping at the first one loses less than 10 % of the peak gain, "
            "in at least 4 of 5 seeds",
            lambda m: m["event"] == 1 and m["lost by stopping at the event"] < 0.1,
            ("event", "event step", "peak step", "lost by stopping at the event"),
            share=(4, 5),
        ),
        Check(
            "entropy rises and then falls",
            "top-k entropy rises by more than 0.05 bits above its first value before it falls, in at least 4 of 5 "
            "seeds",
            lambda m: m["entropy rise"] > 0.05,
            ("entropy rise",),
            share=(4, 5),
            main=False,
        ),
        Check(
            "the same from a low-entropy start",
            "top-k entropy rises by more than 0.05 bits above its first value, and stopping at the first event loses "
            "less than 10 % of the peak gain, in at least 4 of 5 seeds",
            lambda m: (
                m["low-entropy start entropy rise"] > 0.05
                and m["low-entropy start event"] == 1
                and m["low-entropy start lost by stopping at the event"] < 0.1
            ),
            (
                "low-entropy start entropy rise",
                "low-entropy start event",
                "low-entropy start lost by stopping at the event",
            ),
            share=(4, 5),
            main=False,
        ),
        Check(
            "reward is an inverted U of the likelihood",
            "a quadratic fit of reward on chosen likelihood lowers the linear fit's RMSE by at least 20 %, opening "
            "downwards, in at least 4 of 5 seeds",
            lambda m: m["RMSE saved by quadratic"] >= 0.2 and m["curvature"] < 0,
            ("RMSE saved by quadratic", "curvature"),
            share=(4, 5),
            main=False,
        ),
    ),
    seeds=5,
)


@dataclass(frozen=True)
class Judge:
    """The true reward, with mean 0 and standard deviation 1 under the reference."""

    source: Markov
    mean: float
    deviation: float

    @classmethod
    def of(cls, source: Markov, rows: Tensor) -> Judge:
        """Standardised on `rows` (B, 5)."""
        raw = source.log_prob(rows, start=1).value
        return cls(source, raw.mean().item(), raw.std().item())

    def __call__(self, rows: Tensor) -> Tensor:
        """(B,) of rows (B, 5)."""
        return (self.source.log_prob(rows, start=1).value - self.mean) / self.deviation


def fit(model: GRULM, batch: Callable[[], Tensor], steps: int) -> GRULM:
    """By maximum likelihood on what `batch` gives."""
    optimizer = torch.optim.Adam(model.parameters(), lr=SFT_LR)
    for _ in range(steps):
        loss = MaximumLikelihood("sequence_mean")(model.log_prob(batch())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def labelled(reference: GRULM, judge: Judge, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows (300, 5)."""
    first, second = (reference.sample(PAIRS, length=LENGTH, generator=generator) for _ in range(2))
    wins = (judge(first) > judge(second)) ^ (torch.rand(PAIRS, generator=generator) < FLIPPED)
    return torch.where(wins[:, None], first, second), torch.where(wins[:, None], second, first)


def per_token(likelihood: LogLikelihood) -> float:
    return likelihood.mean_per_unit().value.mean().item()


@torch.no_grad()
def indicators(policy: GRULM, chosen: Tensor, rejected: Tensor) -> Indicators:
    """Teacher-forced on the chosen completions; the conditionals are normalised logits."""
    logits = policy.conditionals(chosen)
    return Indicators(
        per_token(policy.log_prob(chosen)),
        per_token(policy.log_prob(rejected)),
        top_k_entropy(logits, TOP).mean().item(),
        top_k_mass(logits, TOP).mean().item(),
    )


def run(
    reference: GRULM,
    judge: Judge,
    pairs: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """DPO from the reference, watched."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    frozen = [reference.log_prob(side) for side in pairs]
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    monitor = LikelihoodMonitor()
    reward, margin = [], []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            monitor.update(step, indicators(policy, *validation))
            reward.append(judge(policy.sample(SAMPLES, length=LENGTH, generator=generator)).mean().item())
            with torch.no_grad():
                margin.append(per_token(policy.log_prob(pairs[0])) - per_token(policy.log_prob(pairs[1])))
        take = torch.randint(PAIRS, (BATCH,), generator=generator)
        sides = [policy.log_prob(side[take]) for side in pairs]
        loss = dpo(*sides, *(scores[take] for scores in frozen), beta=BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen = [evaluation.indicators for evaluation in monitor.history]
    curves = {
        "reward": reward,
        "margin": margin,
        "chosen": [i.chosen for i in seen],
        "entropy": [i.entropy for i in seen],
        "mass": [i.mass for i in seen],
        "validation margin": [i.margin for i in seen],
    }
    first = next((event for event in monitor.events if event.kind != "displacement"), None)
    values = judged(curves, None if first is None else first.step // EVERY)
    return values | {"event is of mass": float(first is not None and first.kind == "mass_leaking")}, curves


def judged(curves: dict[str, list[float]], event: int | None) -> dict[str, float]:
    """Figures of a run; `event` is the number of the evaluation at which the monitor says stop."""
    reward, chosen = (np.array(curves[name]) for name in ("reward", "chosen"))
    steps = np.arange(len(reward))
    peak = int(reward.argmax())
    gain = max(reward[peak] - reward[0], 0.01)  # in standard deviations; less than 0.01 is noise
    stop = len(reward) - 1 if event is None else event
    errors, curvature = [], 0.0
    for degree in (1, 2):
        coefficients = np.polyfit(chosen, reward, degree)
        errors.append(float(np.sqrt(np.mean((np.polyval(coefficients, chosen) - reward) ** 2))))
        curvature = float(coefficients[0])
    entropy = curves["entropy"]
    return {
        "peak gain": gain,
        "peak step": EVERY * peak,
        "lost after the peak": (reward[peak] - reward[peak:].min()) / gain,
        "lost at the end": (reward[peak] - reward[-1]) / gain,
        "Spearman of minus chosen": spearmanr(-chosen, steps).statistic,
        "Spearman of margin": spearmanr(curves["margin"], steps).statistic,
        "Spearman of validation margin": spearmanr(curves["validation margin"], steps).statistic,
        "Spearman of reward and chosen": spearmanr(reward, chosen).statistic,
        "chosen at the start": chosen[0],
        "chosen at the end": chosen[-1],
        "linear RMSE": errors[0],
        "RMSE saved by quadratic": 1 - errors[1] / errors[0],
        "curvature": curvature,
        "event": float(event is not None),
        "event step": EVERY * stop,
        "lead": EVERY * (peak - stop),
        "lost by stopping at the event": (reward[peak] - reward[stop]) / gain,
        "entropy rise": max(entropy) - entropy[0],
        "entropy at the start": entropy[0],
        "entropy at the end": entropy[-1],
        "mass at the start": curves["mass"][0],
        "mass at the end": curves["mass"][-1],
    }


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    source, other = (Markov(SYMBOLS, 1, scale=1.5, generator=generator) for _ in range(2))
    base = GRULM(SYMBOLS, WIDTH)
    fit(base, lambda: source.sample(SFT_BATCH, length=LENGTH, generator=generator), SFT_STEPS).requires_grad_(False)
    judge = Judge.of(other, base.sample(20_000, length=LENGTH, generator=generator))
    pairs, validation = (labelled(base, judge, generator) for _ in range(2))
    winners = copy.deepcopy(base).requires_grad_(True)

    def some() -> Tensor:
        return pairs[0][torch.randint(PAIRS, (SFT_BATCH,), generator=generator)]

    fit(winners, some, WINNER_STEPS).requires_grad_(False)
    values, curves = {}, {}
    for prefix, reference in zip(STARTS, (base, winners), strict=True):
        found, lines = run(reference, judge, pairs, validation, generator)
        values |= {prefix + name: float(value) for name, value in found.items()}
        curves |= {prefix + name: line for name, line in lines.items()}
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    for row, prefix in zip(figure.subplots(2, len(SHOWN), sharex=True), STARTS, strict=True):
        for axes, name in zip(row, SHOWN, strict=True):
            for number, measured in enumerate(report.measured):
                curve = measured.curves[prefix + name]
                axes.plot(range(0, EVERY * len(curve), EVERY), curve, color=f"C{number}", lw=0.9)
                if name == "reward" and measured.values[prefix + "event"]:
                    step = int(measured.values[prefix + "event step"])
                    axes.plot(step, curve[step // EVERY], "kx", ms=5)
            axes.tick_params(labelsize=7)
            axes.set_title(
                {"reward": "true reward (x: event)", "chosen": "chosen, nats/token"}.get(name, name), fontsize=8
            )
        row[0].set_ylabel(prefix or "plain start", fontsize=8)
    figure.supxlabel("step (a line per seed)", fontsize=8)


def notes(report: Report) -> list[str]:
    def told(prefix: str) -> str:
        fired = sum(report.per_seed(prefix + "event"))
        return (
            f"an event fires in {fired:.0f} of {len(report.seeds)} seeds (of the mass in "
            f"{sum(report.per_seed(prefix + 'event is of mass')):.0f}, else of the entropy) at step "
            f"{report.range(prefix + 'event step', '.0f')} (peak at {report.range(prefix + 'peak step', '.0f')}, lead "
            f"{report.range(prefix + 'lead', '.0f')} steps), and stopping there loses "
            f"{report.range(prefix + 'lost by stopping at the event', '.0%')} of the peak gain; entropy goes from "
            f"{report.range(prefix + 'entropy at the start', '.2f')} to "
            f"{report.range(prefix + 'entropy at the end', '.2f')} bits, rising by "
            f"{report.range(prefix + 'entropy rise', '.2f')} in between, and mass from "
            f"{report.range(prefix + 'mass at the start', '.2f')} to {report.range(prefix + 'mass at the end', '.2f')}"
        )

    peaks, lost = report.per_seed("peak step"), report.per_seed("lost after the peak")
    rising = [f"{peak:.0f}" for peak, loss in zip(peaks, lost, strict=True) if loss < 0.1]
    return [
        f"The reward turns by 10 % in {len(peaks) - len(rising)} of {len(peaks)} seeds; in the others it still rises "
        f"late (peak at step {' and '.join(rising) or 'none'}). What holds everywhere is that the likelihood and the "
        "margin go on at one pace whether the reward rises, stands still or swings.",
        f"Indicators, plain start: {told('')}. The entropy falls with healthy sharpening too, so its event is an alarm "
        "without a decline.",
        f"Indicators, low-entropy start: {told('low-entropy start ')}. The peak gain is "
        f"{report.range('low-entropy start peak gain', '.2f')} there against {report.range('peak gain', '.2f')}.",
        f"The reward has lost {report.range('lost at the end', '.0%')} of its peak gain at step 600, and "
        f"{report.range('lost after the peak', '.0%')} at its lowest after the peak; the chosen likelihood falls to "
        f"{report.range('chosen at the end', '.1f')} nats per token. The margin on validation pairs has a Spearman "
        f"correlation of {report.range('Spearman of validation margin', '.2f')} with the step.",
        "A quadratic instead of a linear fit of reward on chosen likelihood changes the RMSE by "
        f"{report.range('RMSE saved by quadratic', '.0%')} (reduction; the paper has about 25 %).",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
