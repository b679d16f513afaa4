"""P084: near-identical pairs, the gold token's likelihood, and a barrier that holds it up (2603.00025)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn

from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms
from loglik.objectives.preference import dpo, length_normalised_dpo
from loglik.objectives.supervised import MaximumLikelihood
from loglik.objectives.token_preference import tab_po

CLASSES, DIMENSIONS, HIDDEN, TOKENS = 10, 8, 32, 20
SFT_ROWS, PAIRS, TEST = 200, 600, 4000
SFT_STEPS, SFT_LR, STEPS, LR, EVERY = 60, 1e-2, 300, 3e-3, 10
BETA, TAU, BARRIER = 0.5, 0.66, 0.5
LABEL_WEIGHT = 1.1 * 1.2  # a code's value, at a position where chosen and rejected differ
Loss = Callable[[LogLikelihood, LogLikelihood, LogLikelihood, LogLikelihood], Terms]

WEIGHTS = torch.ones(PAIRS, TOKENS)
WEIGHTS[:, 0] = LABEL_WEIGHT
LOSSES: dict[str, Loss] = {
    "DPO, length-normalised": lambda *four: length_normalised_dpo(*four, beta=BETA),
    "DPO, sums": lambda *four: dpo(*four, beta=BETA),
    "weights only": lambda *four: tab_po(*four, WEIGHTS, WEIGHTS, beta=BETA, tau=TAU, barrier_weight=0.0),
    "barrier only": lambda *four: tab_po(*four, beta=BETA, tau=TAU, barrier_weight=BARRIER),
    "TAB-PO": lambda *four: tab_po(*four, WEIGHTS, WEIGHTS, beta=BETA, tau=TAU, barrier_weight=BARRIER),
    "continued SFT": lambda chosen, *others: MaximumLikelihood("token_mean")(chosen),
}

CLAIM = Claim(
    paper="P084",
    text=(
        "With near-identical pairs length-normalised DPO destroys the gold token's likelihood; a likelihood term that "
        "is gated by the token's probability (TAB-PO) prevents it."
    ),
    setup=(
        "Ten Gaussian classes in 8 dimensions, means N(0, 1), noise 1; a sequence is one label token and 19 constant "
        "ones, each from its own softmax over ten symbols on a trunk of 32 tanh units. SFT: 60 Adam steps, learning "
        "rate 1e-2, on 200 rows. Then 300 Adam steps, 3e-3, full batch of 600 new rows; the rejected sequence has the "
        "label that SFT's greedy predictions confuse most often with the gold one's class. beta .5 everywhere, tau "
        ".66, barrier weight .5, label weight 1.32. Tested on 4000 rows."
    ),
    checks=(
        Check(
            "the barrier keeps the gold token likely",
            "test log-probability of the gold label under TAB-PO at least 3 nats above length-normalised DPO, in "
            "every seed",
            lambda m: m["TAB-PO: gold"] >= m["DPO, length-normalised: gold"] + 3,
            ("TAB-PO: gold", "DPO, length-normalised: gold"),
        ),
        Check(
            "and the label right",
            "test accuracy of TAB-PO at least 0.1 above length-normalised DPO, in every seed",
            lambda m: m["TAB-PO: accuracy"] >= m["DPO, length-normalised: accuracy"] + 0.1,
            ("TAB-PO: accuracy", "DPO, length-normalised: accuracy"),
        ),
        Check(
            "it is the barrier and not the weights",
            "gold log-probability at least 3 nats above length-normalised DPO with the barrier alone, and not with the "
            "weights alone, in every seed",
            lambda m: (
                m["barrier only: gold"] >= m["DPO, length-normalised: gold"] + 3
                and m["weights only: gold"] < m["DPO, length-normalised: gold"] + 3
            ),
            ("barrier only: gold", "weights only: gold", "DPO, length-normalised: gold"),
            main=False,
        ),
        Check(
            "preferences add something to continued SFT",
            "test accuracy of TAB-PO above continued SFT on the gold sequences, in every seed",
            lambda m: m["TAB-PO: accuracy"] > m["continued SFT: accuracy"],
            ("TAB-PO: accuracy", "continued SFT: accuracy", "start: accuracy"),
            main=False,
        ),
        Check(
            "DPO on sums does less harm",
            "gold log-probability of DPO on sums at least 3 nats above length-normalised DPO at the same beta, in "
            "every seed",
            lambda m: m["DPO, sums: gold"] >= m["DPO, length-normalised: gold"] + 3,
            ("DPO, sums: gold", "DPO, length-normalised: gold"),
            main=False,
        ),
    ),
    seeds=4,
)


class Tagger(nn.Module):
    """Independent tokens given features (B, 8): the label, then the scaffold."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(DIMENSIONS, HIDDEN)
        self.heads = nn.Linear(HIDDEN, TOKENS * CLASSES)

    def table(self, features: Tensor) -> Tensor:
        """(B, T, V) log-probabilities."""
        return self.heads(self.trunk(features).tanh()).reshape(-1, TOKENS, CLASSES).log_softmax(-1)

    def log_prob(self, features: Tensor, labels: Tensor) -> LogLikelihood:
        """Of the sequences with these labels (B,)."""
        return likelihood(self.table(features), labels)


def likelihood(table: Tensor, labels: Tensor) -> LogLikelihood:
    """Of the sequences that start with `labels`; the scaffold's tokens are 0."""
    ids = torch.zeros(table.shape[:2], dtype=torch.long)
    ids[:, 0] = labels
    return LogLikelihood.from_per_unit(table.gather(-1, ids[..., None]).squeeze(-1), torch.ones_like(ids).bool())


@dataclass(frozen=True)
class Rows:
    """Features (B, 8) with gold labels (B,)."""

    features: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, means: Tensor, n: int, generator: torch.Generator) -> Rows:
        """Fresh ones of the classes with these means (10, 8)."""
        labels = torch.randint(CLASSES, (n,), generator=generator)
        return cls(means[labels] + torch.randn(n, DIMENSIONS, generator=generator), labels)


@torch.no_grad()
def confusable(model: Tagger, rows: Rows) -> Tensor:
    """(10,) the wrong label that is predicted most often for each class; where none is, the most probable one."""
    table = model.table(rows.features)[:, 0]
    counts = torch.zeros(CLASSES, CLASSES)
    for label, log_p in zip(rows.labels, table, strict=True):
        counts[label, log_p.argmax()] += 1
        counts[label] += 1e-6 * log_p.exp()  # decides between equal counts
    return counts.fill_diagonal_(-1).argmax(1)


@torch.no_grad()
def tested(model: Tagger, test: Rows) -> tuple[float, float, float]:
    """Label accuracy, and log-probabilities of the gold label and of a scaffold token, nats."""
    table = model.table(test.features)
    terms = likelihood(table, test.labels).per_unit
    accuracy = (table[:, 0].argmax(-1) == test.labels).double().mean().item()
    return accuracy, terms[:, 0].mean().item(), terms[:, 1:].mean().item()


def pretrain(rows: Rows) -> Tagger:
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=SFT_LR)
    for _ in range(SFT_STEPS):
        loss = MaximumLikelihood("token_mean")(model.log_prob(rows.features, rows.labels)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, DIMENSIONS, generator=generator)
    sft, pairs, test = (Rows.draw(means, n, generator) for n in (SFT_ROWS, PAIRS, TEST))
    reference = pretrain(sft)
    wrong = confusable(reference, pairs)[pairs.labels]
    frozen = [reference.log_prob(pairs.features, labels) for labels in (pairs.labels, wrong)]
    parts = ("accuracy", "gold", "scaffold")
    values = {f"start: {part}": value for part, value in zip(parts, tested(reference, test), strict=True)}
    curves: dict[str, list[float]] = {}
    for name, loss in LOSSES.items():
        model = copy.deepcopy(reference).requires_grad_(True)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        path = [tested(model, test)]
        for step in range(1, STEPS + 1):
            table = model.table(pairs.features)
            total = loss(likelihood(table, pairs.labels), likelihood(table, wrong), *frozen).mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if step % EVERY == 0:
                path.append(tested(model, test))
        values |= {f"{name}: {part}": value for part, value in zip(parts, path[-1], strict=True)}
        curves |= {f"{name}: {part}": list(column) for part, column in zip(parts, zip(*path, strict=True), strict=True)}
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for axes, part, title in (
        (left, "gold", "log-probability of the gold label (nats)"),
        (right, "accuracy", "label accuracy"),
    ):
        for number, name in enumerate(LOSSES):
            for first, measured in enumerate(report.measured):
                curve = measured.curves[f"{name}: {part}"]
                steps = range(0, EVERY * len(curve), EVERY)
                axes.plot(steps, curve, color=f"C{number}", lw=0.8, alpha=0.8, label=None if first else name)
        axes.set(title=f"test: {title}", xlabel="step")
    left.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    shown = ("start", "DPO, length-normalised", "DPO, sums", "weights only", "barrier only", "TAB-PO", "continued SFT")
    return [
        "Continued SFT on the gold sequences alone, the control: accuracy "
        f"{report.range('continued SFT: accuracy')} against {report.range('TAB-PO: accuracy')} for TAB-PO, gold "
        f"log-probability {report.range('continued SFT: gold')} against {report.range('TAB-PO: gold')}. What TAB-PO "
        "gains over DPO is what its likelihood term brings; the preferences add nothing here.",
        "Means of accuracy / gold / scaffold log-probability: "
        + "; ".join(
            f"{name} {report.mean(f'{name}: accuracy'):.3f} / {report.mean(f'{name}: gold'):.2f} / "
            f"{report.mean(f'{name}: scaffold'):.3f}"
            for name in shown
        )
        + ".",
        "The same beta is 20 times as strong on sums as on means of 20 tokens, so DPO on sums saturates before it does "
        "the same harm.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
