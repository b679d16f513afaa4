"""P006: assignments that agree with their neighbours help where neighbours share labels (2201.05718)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from loglik.signals.adaptation import Affinity, lame

TRAIN, HIDDEN, NOISE, BATCH, NEIGHBOURS = 900, 64, 6 / 16, 64, 5
RUN = 16  # rows of one class in a row, in the stream between random and sorted
AFFINITIES: tuple[Affinity, ...] = ("knn", "rbf", "linear")
STREAMS = ("random", "runs", "sorted")

CLAIM = Claim(
    paper="P006",
    text=(
        "On a stream sorted by class LAME clearly improves a frozen classifier; on a random stream it costs little "
        "with the nearest-neighbour affinity."
    ),
    setup=(
        "Digits of scikit-learn; a network with 64 hidden units learns 900 clean images; the other 897 get Gaussian "
        "noise of 6/16 of the pixel range. Batches of 64, features from the hidden layer, 5 neighbours (symmetrised), "
        "weight 1, at most 100 steps. Streams: random order, runs of 16 images of one class, sorted by class."
    ),
    checks=(
        Check(
            "sorted stream",
            "knn: accuracy above the frozen one by >= 0.06, in every seed",
            lambda m: m["sorted: knn"] - m["sorted: frozen"] >= 0.06,
            ("sorted: frozen", "sorted: knn"),
        ),
        Check(
            "random stream",
            "knn: mean accuracy below the frozen one by <= 0.03",
            lambda m: m["random: frozen"] - m["random: knn"] <= 0.03,
            ("random: frozen", "random: knn"),
            on_mean=True,
        ),
        Check(
            "negative: rbf collapses on a random stream",
            "rbf: accuracy below the frozen one by >= 0.2, in every seed",
            lambda m: m["random: frozen"] - m["random: rbf"] >= 0.2,
            ("random: frozen", "random: rbf"),
            main=False,
        ),
        Check(
            "objective falls for definite affinities",
            "rbf and linear: no step raises it by more than 1e-9 nats, in every seed",
            lambda m: max(m["rbf: largest rise"], m["linear: largest rise"]) <= 1e-9,
            ("rbf: largest rise", "linear: largest rise"),
            main=False,
        ),
    ),
    seeds=5,
)


def classifier(seed: int) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Log-probabilities (897, 10), hidden features (897, 64) and labels of the noisy test images."""
    digits = load_digits()
    images, labels = digits.data / 16, digits.target
    r = np.random.default_rng(seed)
    order = r.permutation(len(images))
    network = MLPClassifier((HIDDEN,), max_iter=500, random_state=seed)
    network.fit(images[order[:TRAIN]], labels[order[:TRAIN]])
    noisy = images[order[TRAIN:]] + r.normal(size=(len(images) - TRAIN, images.shape[1])) * NOISE
    hidden = np.maximum(noisy @ network.coefs_[0] + network.intercepts_[0], 0)
    logits = torch.from_numpy(hidden @ network.coefs_[1] + network.intercepts_[1])
    return logits.log_softmax(1), torch.from_numpy(hidden), labels[order[TRAIN:]]


def streams(labels: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """The rows in each order."""
    r = np.random.default_rng(seed)
    rows = r.permutation(len(labels))
    by_class = rows[labels[rows].argsort(kind="stable")]
    runs = [
        own[begin : begin + RUN]
        for own in (by_class[labels[by_class] == c] for c in range(10))
        for begin in range(0, len(own), RUN)
    ]
    shuffled = np.concatenate([runs[i] for i in r.permutation(len(runs))])
    return dict(zip(STREAMS, (rows, shuffled, by_class), strict=True))


def measure(seed: int) -> Measured:
    log_probs, features, labels = classifier(seed)
    values: dict[str, float] = {}
    rises = dict.fromkeys(AFFINITIES, 0.0)
    steps = dict.fromkeys(AFFINITIES, 0.0)
    moving = dict.fromkeys(AFFINITIES, 0)
    for name, rows in streams(labels, seed).items():
        values[f"{name}: frozen"] = float((log_probs[rows].argmax(1).numpy() == labels[rows]).mean())
        batches = [rows[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
        for affinity in AFFINITIES:
            right = 0
            for batch in batches:
                found = lame(log_probs[batch], features[batch], affinity=affinity, k=NEIGHBOURS)
                right += int((found.log_probs.argmax(1).numpy() == labels[batch]).sum())
                rises[affinity] = max(rises[affinity], *np.diff(found.objective).tolist())
                steps[affinity] = max(steps[affinity], float(found.steps))
                moving[affinity] += not found.converged
            values[f"{name}: {affinity}"] = right / len(rows)
    for affinity in AFFINITIES:
        values[f"{affinity}: largest rise"] = rises[affinity]
        values[f"{affinity}: most steps"] = steps[affinity]
        values[f"{affinity}: batches in motion"] = float(moving[affinity])
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    for number, kind in enumerate(("frozen", *AFFINITIES)):
        for at, stream in enumerate(STREAMS):
            points = report.per_seed(f"{stream}: {kind}")
            places = [at + 0.15 * (number - 1.5)] * len(points)
            axes.plot(places, points, "o", ms=5, alpha=0.6, color=f"C{number}", label=None if at else kind)
    axes.set_xticks(range(len(STREAMS)), ["random", f"runs of {RUN}", "sorted by class"])
    axes.set(title="digits with noise, batches of 64 (a point per seed)", ylabel="accuracy", ylim=(0, 1))
    axes.legend(loc="lower right")


def notes(report: Report) -> list[str]:
    return [
        f"On a random stream the rbf affinity falls from {report.range('random: frozen', '.2f')} to "
        f"{report.range('random: rbf', '.2f')} and the linear one to {report.range('random: linear', '.2f')}: they "
        "connect every pair of rows, and the batch is pulled to few labels.",
        "A stream sorted by class is the friendliest there is: most batches hold one or two classes. With runs of "
        f"{RUN} images of one class knn reaches {report.range('runs: knn', '.2f')} against "
        f"{report.range('runs: frozen', '.2f')} frozen, rbf {report.range('runs: rbf', '.2f')}.",
        "The neighbour affinity is not definite, so that its objective may rise; most in a step: "
        f"{report.range('knn: largest rise', '.2g')} nats. Batches that were still moving after 100 steps: "
        f"{report.range('rbf: batches in motion', '.0f')} of rbf and "
        f"{report.range('linear: batches in motion', '.0f')} of linear.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
