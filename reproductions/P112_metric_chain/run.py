"""P112: the correlation of scores with compute is lost where the wrong options come in (2406.04391)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from numpy.typing import NDArray

from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.metric_chain import (
    LINKS,
    MetricChain,
    chain_correlations,
    chain_links,
    mass_trend,
    metric_chain,
)

SYMBOLS, CONCENTRATION = 20, 0.3
MODELS, FEWEST, MOST = 14, 300, 300_000
ITEMS, WRONG, FLOOR, BACKOFF = 400, 3, 0.02, 5.0
BUDGETS = np.geomspace(FEWEST, MOST, MODELS).round().astype(int)
METHODS = ("spearman", "pearson", "kendall")

CLAIM = Claim(
    paper="P112",
    text=(
        "Item by item, the probability of the right option follows compute; its share among the options does so less, "
        "and accuracy not more than that: the loss is where the wrong options come in."
    ),
    setup=(
        "A Markov language of order 2 over 20 symbols, rows from Dirichlet(0.3). 14 interpolated trigram models "
        "(back-off weight 5, add-one unigrams) of the first D tokens of one text, D from 300 to 300,000 (geometric), "
        "which is the compute. 400 items: two tokens of another text, the right option from the true conditional, 3 "
        "wrong ones without replacement from the conditional + 0.02. Spearman's correlation of each item's score with "
        "compute, mean over the items that have one. Beside it Pearson's (with log D) and Kendall's."
    ),
    checks=(
        Check(
            "the share follows compute less",
            "mean r of p_vocab less that of p_choices >= 0.15, in every seed",
            lambda m: m["spearman: p_vocab"] - m["spearman: p_choices"] >= 0.15,
            ("spearman: p_vocab", "spearman: p_choices"),
        ),
        Check(
            "accuracy does not follow it more",
            "mean r of accuracy <= that of p_choices, in every seed",
            lambda m: m["spearman: accuracy"] <= m["spearman: p_choices"],
            ("spearman: accuracy", "spearman: p_choices"),
        ),
        Check(
            "the link from p_vocab to p_choices loses most",
            "of the four links it has the largest drop of the mean r, paired over items, in every seed",
            lambda m: m["spearman: largest drop is at p_choices"] == 1,
            ("spearman: largest drop is at p_choices",),
            main=False,
        ),
        Check(
            "accuracy does not follow it more, all items",
            "the same with 0 for items without a correlation, in every seed",
            lambda m: m["spearman: accuracy, 0 if none"] <= m["spearman: p_choices, 0 if none"],
            ("spearman: accuracy, 0 if none", "spearman: p_choices, 0 if none"),
            main=False,
        ),
        Check(
            "both masses rise together",
            "the covariance over models of log p of the right option and of the wrong ones is positive for more than "
            "half of the items, in every seed",
            lambda m: m["items whose masses rise together"] > 0.5,
            ("items whose masses rise together",),
            main=False,
        ),
        *(
            Check(
                f"also by {method}",
                "the two main rules hold for this correlation, in every seed",
                lambda m, method=method: (
                    m[f"{method}: p_vocab"] - m[f"{method}: p_choices"] >= 0.15
                    and m[f"{method}: accuracy"] <= m[f"{method}: p_choices"]
                ),
                tuple(f"{method}: {name}" for name in ("p_vocab", "p_choices", "accuracy")),
                main=False,
            )
            for method in METHODS[1:]
        ),
    ),
    seeds=5,
)


def text(table: NDArray[np.float64], length: int, r: np.random.Generator) -> NDArray[np.int64]:
    """A text of the language, begun anywhere."""
    sums = table.cumsum(-1)
    sums[..., -1] = 1.0
    draws = r.random(length)
    out = np.empty(length, dtype=np.int64)
    a, b = r.integers(SYMBOLS, size=2)
    for i in range(length):
        a, b = b, int(np.searchsorted(sums[a, b], draws[i], side="right"))
        out[i] = b
    return out


def trigram(data: NDArray[np.int64]) -> NDArray[np.float64]:
    """(V, V, V) conditionals of the interpolated model."""
    shape = (SYMBOLS,) * 3
    ones = np.bincount(data, minlength=SYMBOLS)
    twos = np.bincount(data[:-1] * SYMBOLS + data[1:], minlength=SYMBOLS**2).reshape(shape[:2])
    codes = (data[:-2] * SYMBOLS + data[1:-1]) * SYMBOLS + data[2:]
    threes = np.bincount(codes, minlength=SYMBOLS**3).reshape(shape)
    p1 = (ones + 1) / (len(data) + SYMBOLS)
    p2 = (twos + BACKOFF * p1) / (twos.sum(1, keepdims=True) + BACKOFF)
    return np.asarray((threes + BACKOFF * p2) / (threes.sum(2, keepdims=True) + BACKOFF))


def items(table: NDArray[np.float64], r: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Contexts (Q, 2) and options (Q, 4), of which the first is right."""
    other = text(table, 3 * ITEMS, r).reshape(ITEMS, 3)[:, :2]
    options = np.empty((ITEMS, 1 + WRONG), dtype=np.int64)
    for i, (a, b) in enumerate(other):
        options[i, 0] = r.choice(SYMBOLS, p=table[a, b])
        weights = table[a, b] + FLOOR
        weights[options[i, 0]] = 0.0
        options[i, 1:] = r.choice(SYMBOLS, size=WRONG, replace=False, p=weights / weights.sum())
    return other, options


def scores(model: NDArray[np.float64], contexts: NDArray[np.int64], options: NDArray[np.int64]) -> MetricChain:
    log_p = torch.from_numpy(np.log(model[contexts[:, :1], contexts[:, 1:], options])).flatten()
    likelihood = LogLikelihood(log_p, Kind.EXACT, Unit.TOKEN, torch.ones(len(log_p), dtype=torch.long))
    questions = torch.arange(ITEMS).repeat_interleave(1 + WRONG)
    return metric_chain(likelihood, questions, [0] * ITEMS)


def measure(seed: int) -> Measured:
    r = np.random.default_rng(seed)
    table = r.dirichlet(np.full(SYMBOLS, CONCENTRATION), size=(SYMBOLS, SYMBOLS))
    data = text(table, MOST, r)
    contexts, options = items(table, r)
    chains = [scores(trigram(data[:budget]), contexts, options) for budget in BUDGETS]
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for method in METHODS:
        found = chain_correlations(chains, BUDGETS, method=method)
        for name, one in found.items():
            values[f"{method}: {name}"] = one.mean
            values[f"{method}: {name}, absolute"] = float(np.abs(one.values).mean())
            values[f"{method}: {name}, 0 if none"] = one.mean * (1 - one.constant)
        drops = {link.after: link.drop for link in chain_links(found)}
        values[f"{method}: largest drop is at p_choices"] = float(max(drops, key=drops.__getitem__) == "p_choices")
        if method == METHODS[0]:
            curves |= {name: one.survival(np.linspace(-1, 1, 201)).tolist() for name, one in found.items()}
            values["items without a correlation of accuracy"] = found["accuracy"].constant
    _, _, covariance = mass_trend(chains, BUDGETS)
    values["items whose masses rise together"] = float((covariance > 0).mean())
    values["accuracy of the smallest model"] = chains[0].means()["accuracy"]
    values["accuracy of the largest model"] = chains[-1].means()["accuracy"]
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    at = np.linspace(-1, 1, 201)
    for number, name in enumerate(LINKS):
        if name == "p_vocab":  # the same ranks as log_p_vocab
            continue
        curve = np.mean([m.curves[name] for m in report.measured], axis=0)
        left.plot(at, curve, color=f"C{number}", label=name)
    left.set(title="items above each correlation (mean over seeds)", xlabel="Spearman's r", ylabel="share of items")
    left.legend(fontsize=7)
    for number, method in enumerate(METHODS):
        for seed in range(len(report.seeds)):
            points = [report.per_seed(f"{method}: {name}")[seed] for name in LINKS]
            right.plot(range(len(LINKS)), points, "o-", ms=3, alpha=0.6, color=f"C{number}",
                       label=None if seed else method)  # fmt: skip
    right.set_xticks(range(len(LINKS)), LINKS, fontsize=7)
    right.set(title="mean over items, by link (a line per seed)", ylabel="correlation with compute")
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        "The order of the last three is weak: mean r of p_choices "
        f"{report.mean('spearman: p_choices'):.3f}, Brier {report.mean('spearman: brier'):.3f}, accuracy "
        f"{report.mean('spearman: accuracy'):.3f}; mean |r| {report.mean('spearman: p_choices, absolute'):.3f}, "
        f"{report.mean('spearman: brier, absolute'):.3f}, {report.mean('spearman: accuracy, absolute'):.3f}.",
        f"{report.mean('items without a correlation of accuracy'):.0%} of the items are right (or wrong) under every "
        "model and have no correlation of accuracy; they are left out. With 0 in their place the mean r of accuracy is "
        f"{report.range('spearman: accuracy, 0 if none', '.3f')}.",
        f"Accuracy rises from {report.range('accuracy of the smallest model', '.2f')} to "
        f"{report.range('accuracy of the largest model', '.2f')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
