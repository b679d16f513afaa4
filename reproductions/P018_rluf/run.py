"""P018: predicted love rates of policies follow their true ones, and optimising them breeds farewells (2505.14946)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor

from loglik.objectives.rewards import binary_feedback, downsampling_correction
from loglik.signals.feedback import offline_policy_value

PROMPTS, RESPONSES, BYE = 200, 12, 0.1
LOGS, NEGATIVES = 200_000, 9  # and negatives kept per positive
WEIGHTS = (0.0, 0.1, 0.3, 0.6, 1.0)
BETA, SAMPLES = 0.5, 64
# Number of logs, and the interaction of helpfulness and farewell that the classifier does not know of.
VARIANTS = {
    "as claimed": (LOGS, 0.0),
    "5000 logs": (5000, 0.0),
    "500 logs": (500, 0.0),
    "interaction -1": (LOGS, -1.0),
    "interaction -2": (LOGS, -2.0),
    "interaction -3": (LOGS, -3.0),
    "interaction -6": (LOGS, -6.0),  # beyond what the checks look at
}
MILDER = tuple(name for name in VARIANTS if name != "interaction -6")

CLAIM = Claim(
    paper="P018",
    text=(
        "A classifier of love reactions predicts the love rates of policies offline; policies that weigh it more "
        "are loved more, say farewell more and help less."
    ),
    setup=(
        "200 prompts x 12 responses with helpfulness h, warmth w ~ N(0, 1) and a farewell flag b (10 %). P(love) = "
        "sigma(-4.2 + 0.9 h + 0.8 w + 1.6 b); helpfulness h - 2 b; logging policy ~ exp(0.3 h - 2 b). 200,000 logs, "
        "nine negatives kept per positive, logistic regression on (h, w, b), corrected for the sampling. Policies ~ "
        "logging exp(R / 0.5) with R = 10 weight P[love] + 0.3 (1 - weight) helpfulness, weight 0, 0.1, 0.3, 0.6 and "
        "1. All expectations are exact sums. Hard variants: fewer logs, or a true interaction of -1, -2, -3 or -6 "
        "times h b that the classifier leaves out; each optimises against its own classifier."
    ),
    checks=(
        Check(
            "offline prediction follows the true rate",
            "Pearson correlation of predicted and true love rate over the five policies >= 0.95, in every seed",
            lambda m: m["as claimed: r"] >= 0.95,
            ("as claimed: r",),
        ),
        Check(
            "love rate rises with its weight",
            "true love rate of the five policies increases strictly, in every seed",
            lambda m: increasing([m[f"love rate, weight {w:g}"] for w in WEIGHTS]),
            tuple(f"love rate, weight {w:g}" for w in WEIGHTS),
        ),
        Check(
            "farewells breed",
            "frequency of farewells at weight 1 >= 5 times that at weight 0, in every seed",
            lambda m: m["farewells, weight 1"] >= 5 * m["farewells, weight 0"],
            ("farewells, weight 1", "farewells, weight 0"),
        ),
        Check(
            "helpfulness falls",
            "helpfulness at weight 1 lies >= 0.1 below the highest of the five policies, in every seed",
            lambda m: m["helpfulness, weight 1"] <= max(m[f"helpfulness, weight {w:g}"] for w in WEIGHTS) - 0.1,
            tuple(f"helpfulness, weight {w:g}" for w in WEIGHTS),
        ),
        Check(
            "the correction makes rates of scores",
            "mean prediction under the logging policy within 5 % of the true rate with the correction, and more than "
            "twice the true rate without, in every seed",
            lambda m: (
                abs(m["mean prediction"] / m["mean truth"] - 1) < 0.05
                and m["mean prediction, uncorrected"] > 2 * m["mean truth"]
            ),
            ("mean prediction", "mean prediction, uncorrected", "mean truth"),
            main=False,
        ),
        Check(
            "a misspecified classifier flatters the policy",
            "interaction of -2 left out: the predicted gain in love rate from weight 0 to 1 exceeds the true gain by "
            "more than half of it, in every seed",
            lambda m: m["interaction -2: predicted gain"] > 1.5 * m["interaction -2: true gain"],
            ("interaction -2: predicted gain", "interaction -2: true gain"),
            main=False,
        ),
        Check(
            "correlation survives what calibration does not",
            "Pearson correlation >= 0.95 in every hard variant up to an interaction of -3, in every seed",
            lambda m: min(m[f"{name}: r"] for name in MILDER) >= 0.95,
            tuple(f"{name}: r" for name in MILDER),
            main=False,
        ),
    ),
    seeds=5,
)


def increasing(values: list[float]) -> bool:
    return all(after > before for before, after in pairwise(values))


@dataclass(frozen=True)
class World:
    """(P, R) features of the responses, float64."""

    helpful: Tensor
    warm: Tensor
    bye: Tensor
    interaction: float = 0.0

    @property
    def features(self) -> Tensor:
        """(P, R, 4), what the classifier sees."""
        return torch.stack([torch.ones_like(self.helpful), self.helpful, self.warm, self.bye], -1)

    @property
    def love(self) -> Tensor:
        """(P, R) true probability of a love reaction."""
        own = self.features @ torch.tensor([-4.2, 0.9, 0.8, 1.6], dtype=torch.float64)
        return torch.sigmoid(own + self.interaction * self.helpful * self.bye)

    @property
    def helpfulness(self) -> Tensor:
        """(P, R) what another reward model says; a farewell does not help."""
        return self.helpful - 2 * self.bye

    @property
    def logging(self) -> Tensor:
        """(P, R) log-probabilities of the policy that was in use."""
        return (0.3 * self.helpful - 2 * self.bye).log_softmax(1)

    def mean(self, log_p: Tensor, values: Tensor) -> float:
        """Exact expectation over uniform prompts and the policy's responses."""
        return (log_p.exp() * values).sum(1).mean().item()


def world(generator: torch.Generator) -> World:
    helpful, warm = torch.randn(2, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
    bye = torch.rand(PROMPTS, RESPONSES, generator=generator) < BYE
    return World(helpful, warm, bye.double())


def logs(w: World, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (n, 4) of what users saw, and whether they loved it."""
    prompt = torch.randint(PROMPTS, (n,), generator=generator)
    response = torch.multinomial(w.logging.exp()[prompt], 1, generator=generator)[:, 0]
    loved = torch.rand(n, generator=generator, dtype=torch.float64) < w.love[prompt, response]
    return w.features[prompt, response], loved


def fit(features: Tensor, loved: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Coefficients of a logistic regression on all positives and a share of the negatives, and that share."""
    positives = int(loved.sum())
    keep_rate = min(1.0, NEGATIVES * positives / (len(loved) - positives))
    kept = loved | (torch.rand(len(loved), generator=generator, dtype=torch.float64) < keep_rate)
    x, y = features[kept], loved[kept]
    coefficients = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The unit ridge on the sum keeps a flag that was never loved finite; it is nothing among thousands of logs.
        loss = binary_feedback(x @ coefficients, y).mean() + 0.5 * coefficients[1:].square().sum() / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return coefficients.detach(), keep_rate


def auroc(score: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(...) probability that a draw by weights `positive` (..., N) outscores one by `negative`; ties count half."""
    order = score.argsort(-1)
    rising, p, n = (x.gather(-1, order) for x in (score, positive, negative))
    assert (rising.diff() > 0).all()
    below = n.cumsum(-1) - n
    return ((p * below).sum(-1)) / (p.sum(-1) * n.sum(-1))


def policies(w: World, predicted: Tensor) -> list[Tensor]:
    """(P, R) log-probabilities of the optimum of E[R] - beta KL for each weight."""
    rewards = [10 * weight * predicted + 0.3 * (1 - weight) * w.helpfulness for weight in WEIGHTS]
    return [(w.logging + reward / BETA).log_softmax(1) for reward in rewards]


def covered(w: World, predicted: Tensor, chosen: list[Tensor], seed: int) -> float:
    """Share of the policies whose sampled gain over weight 0 has the exact one in its 95 % interval."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(PROMPTS, SAMPLES, generator=generator, dtype=torch.float64)  # paired: one draw for all policies
    drawn = torch.stack([torch.searchsorted(p.exp().cumsum(1), same).clamp_max(RESPONSES - 1) for p in chosen])
    values = predicted.expand(len(chosen), -1, -1).gather(2, drawn).flatten(1)
    groups = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    interval = offline_policy_value(values, groups, seed=seed).difference_interval
    exact = torch.tensor([w.mean(p, predicted) for p in chosen]) - w.mean(chosen[0], predicted)
    inside = (interval[:, 0] <= exact) & (exact <= interval[:, 1])
    return inside[1:].double().mean().item()


def correlation(predicted: list[float], true: list[float]) -> float:
    return torch.corrcoef(torch.tensor([predicted, true], dtype=torch.float64))[0, 1].item()


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    plain = world(generator)
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, (count, interaction) in VARIANTS.items():
        w = World(plain.helpful, plain.warm, plain.bye, interaction)
        coefficients, keep_rate = fit(*logs(w, count, generator), generator)
        logits = w.features @ coefficients
        predicted = torch.sigmoid(downsampling_correction(logits, keep_rate))
        chosen = policies(w, predicted)
        offline, true = ([w.mean(p, rate) for p in chosen] for rate in (predicted, w.love))
        values[f"{name}: r"] = correlation(offline, true)
        values[f"{name}: predicted gain"] = offline[-1] - offline[0]
        values[f"{name}: true gain"] = true[-1] - true[0]
        values[f"{name}: rate rises with weight"] = float(increasing(true))
        values[f"{name}: farewells at weight 1"] = w.mean(chosen[-1], w.bye)
        curves[f"{name}: predicted"], curves[f"{name}: true"] = offline, true
        if name != "as claimed":
            continue
        seen = w.logging.exp()
        loved, ignored = seen * w.love, seen * (1 - w.love)
        values["auroc"] = auroc(logits.flatten(), loved.flatten(), ignored.flatten()).item()
        values["auroc within prompts"] = auroc(logits, loved, ignored).mean().item()
        values["mean truth"] = w.mean(w.logging, w.love)
        values["mean prediction"] = w.mean(w.logging, predicted)
        values["mean prediction, uncorrected"] = w.mean(w.logging, torch.sigmoid(logits))
        values["sampled gains covered"] = covered(w, predicted, chosen, seed)
        for weight, p, rate in zip(WEIGHTS, chosen, true, strict=True):
            values[f"love rate, weight {weight:g}"] = rate
            values[f"helpfulness, weight {weight:g}"] = w.mean(p, w.helpfulness)
            values[f"farewells, weight {weight:g}"] = w.mean(p, w.bye)
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, label) in enumerate(
        (("love rate", "true love rate"), ("helpfulness", "helpfulness"), ("farewells", "share of farewells"))
    ):
        for first in range(len(report.seeds)):
            curve = [report.per_seed(f"{name}, weight {w:g}")[first] for w in WEIGHTS]
            left.plot(WEIGHTS, curve, "o-", ms=3, color=f"C{number}", alpha=0.7, label=None if first else label)
    left.set(title="optimised policies", xlabel="weight of P[love]", yscale="log")
    left.legend(fontsize=7)
    for number, name in enumerate(VARIANTS):
        for first, m in enumerate(report.measured):
            right.plot(
                m.curves[f"{name}: true"],
                m.curves[f"{name}: predicted"],
                "o-",
                ms=3,
                color=f"C{number}",
                alpha=0.6,
                label=None if first else name,
            )
    right.axline((0.05, 0.05), slope=1, color="black", ls=":", lw=0.8)
    right.set(title="five policies of each seed", xlabel="true love rate", ylabel="predicted love rate")
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    worst = {name: report.range(f"{name}: r", ".3f") for name in VARIANTS}
    return [
        "With a well-specified classifier and 200,000 logs the offline evaluator is nearly perfect by construction "
        f"(r {report.range('as claimed: r', '.5f')}): the first check says little about classifiers that miss "
        "something.",
        "Correlations of five policies in the hard variants: "
        + "; ".join(f"{name} {r}" for name, r in worst.items())
        + ". A correlation does not see that gains are exaggerated: with an interaction of -2 left out the predicted "
        f"gain is {report.range('interaction -2: predicted gain', '.3f')} and the true one "
        f"{report.range('interaction -2: true gain', '.3f')}; with 500 logs "
        f"{report.range('500 logs: predicted gain', '.3f')} and {report.range('500 logs: true gain', '.3f')}.",
        "Nothing that was tried takes the correlation below 0.95, not even an interaction of -6, where farewells are "
        "loved least of all and are predicted to be loved most: five policies on one path of weights, whose rates all "
        "rise, correlate whatever the slope. As evidence for an offline evaluator such a correlation is weak.",
        "The classifier is optimised against and then judges the result, as in the paper; policies that it did not "
        "shape would be judged better.",
        f"AUROC is {report.range('auroc', '.3f')} over all logs and {report.range('auroc within prompts', '.3f')} "
        "within prompts, both exact under the logging policy; prompts have no effect of their own here.",
        f"Of the sampled gains (64 paired responses per prompt), a share of {report.mean('sampled gains covered'):.2f} "
        "have the exact gain on these prompts in their 95 % interval; the bootstrap resamples prompts, so that it is "
        "wider than the sampling noise alone.",
        '"Down-sampled 9:1" is read as nine negatives kept per positive; the policies start from the logging policy.',
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
