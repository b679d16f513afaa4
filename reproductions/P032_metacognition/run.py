"""P032: over-confidence is mended without touching accuracy or ranking, so it is an axis of its own (2508.16889)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from loglik.signals.calibration import reliability_diagram, top_label
from loglik.signals.metacognition import calibration_report, compare_calibration, risk_coverage_curve
from loglik.signals.recalibration import TemperatureScaling

TRAIN, HIDDEN, NOISE, THRESHOLD = 700, 256, 0.45, 0.9

CLAIM = Claim(
    paper="P032",
    text=(
        "Over-confidence is a different axis from accuracy and from ranking: temperature scaling repairs calibration "
        "error, Brier score and Wrong@0.9 at unchanged accuracy and almost unchanged AURC."
    ),
    setup=(
        "Digits of scikit-learn with Gaussian noise of 0.45 of the pixel range on all images; a network with 256 "
        "hidden units is over-fitted on 700 of them (300 epochs at most; it knows them all by heart). The other 1097 "
        "are halved: one half fits a temperature by likelihood, the other is judged. Confidence: largest probability. "
        "ECE in 10 bins of equal width."
    ),
    checks=(
        Check(
            "calibration error falls",
            "ECE falls by >= 60 %, in every seed",
            lambda m: m["scaled: ECE"] <= 0.4 * m["raw: ECE"],
            ("raw: ECE", "scaled: ECE"),
        ),
        Check(
            "wrong answers of high confidence fall",
            "Wrong@0.9 falls by >= 60 %, in every seed",
            lambda m: m["scaled: wrong at 0.9"] <= 0.4 * m["raw: wrong at 0.9"],
            ("raw: wrong at 0.9", "scaled: wrong at 0.9"),
        ),
        Check(
            "ranking stays",
            "|change of AURC| <= 0.015, in every seed",
            lambda m: abs(m["scaled: AURC"] - m["raw: AURC"]) <= 0.015,
            ("raw: AURC", "scaled: AURC"),
        ),
        Check(
            "Brier score falls",
            "the paired 95 % interval of its change lies below 0, in every seed",
            lambda m: m["change of Brier: high"] < 0,
            ("raw: Brier", "scaled: Brier", "change of Brier: high"),
            main=False,
        ),
        Check(
            "accuracy stays",
            "exactly, in every seed",
            lambda m: m["scaled: accuracy"] == m["raw: accuracy"],
            ("raw: accuracy", "scaled: accuracy"),
            main=False,
        ),
    ),
    seeds=3,
)


def measure(seed: int) -> Measured:
    digits = load_digits()
    r = np.random.default_rng(seed)
    order = r.permutation(len(digits.data))
    images, labels = digits.data[order] / 16, digits.target[order]
    images = images + r.normal(size=images.shape) * NOISE
    network = MLPClassifier((HIDDEN,), max_iter=300, random_state=seed)
    network.fit(images[:TRAIN], labels[:TRAIN])
    hidden = np.maximum(images[TRAIN:] @ network.coefs_[0] + network.intercepts_[0], 0)
    logits = torch.from_numpy(hidden @ network.coefs_[1] + network.intercepts_[1])
    own, judged = slice(0, len(logits) // 2), slice(len(logits) // 2, None)
    scaling = TemperatureScaling().fit(logits[own], labels[TRAIN:][own])
    answers = labels[TRAIN:][judged]
    judges = {
        "raw": top_label(logits[judged].log_softmax(1), answers),
        "scaled": top_label(scaling.predict_log_proba(logits[judged]), answers),
    }
    values: dict[str, float] = {
        "temperature": scaling.temperature_,
        "accuracy on the training images": float(network.score(images[:TRAIN], labels[:TRAIN])),
    }
    curves: dict[str, list[float]] = {}
    for name, judge in judges.items():
        report = calibration_report(*judge, bins=10, thresholds=(THRESHOLD,), seed=seed)
        (at,) = report.wrong_at
        if at.rate is None:
            raise ValueError(f"no answer of the {name} judge has a confidence of {THRESHOLD}")
        values |= {
            f"{name}: accuracy": report.accuracy.value,
            f"{name}: mean confidence": report.confidence.value,
            f"{name}: ECE": report.ece.value,
            f"{name}: Brier": report.brier.value,
            f"{name}: wrong at {THRESHOLD}": at.rate,
            f"{name}: answers at {THRESHOLD}": float(at.count),
            f"{name}: AURC": report.aurc.value,
            f"{name}: excess AURC": report.excess_aurc.value,
        }
        diagram, curve = reliability_diagram(*judge, bins=10), risk_coverage_curve(*judge)
        curves |= {
            f"{name}: confidence": diagram.confidence.tolist(),
            f"{name}: accuracy": diagram.accuracy.tolist(),
            f"{name}: coverage": curve.coverage.tolist(),
            f"{name}: risk": curve.risk.tolist(),
        }
    change = compare_calibration(judges["scaled"], judges["raw"], bins=10, seed=seed)
    for name, key in (("ECE", "ece"), ("Brier", "brier"), ("AURC", "aurc")):
        values |= {f"change of {name}: low": change[key].low, f"change of {name}: high": change[key].high}
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="black", lw=0.6)
    for number, name in enumerate(("raw", "scaled")):
        for first, m in enumerate(report.measured):
            label = None if first else name
            left.plot(
                m.curves[f"{name}: confidence"],
                m.curves[f"{name}: accuracy"],
                "o-",
                ms=3,
                lw=0.8,
                color=f"C{number}",
                label=label,
            )
            right.plot(
                m.curves[f"{name}: coverage"], m.curves[f"{name}: risk"], lw=0.9, color=f"C{number}", label=label
            )
    left.set(title="calibration moves", xlabel="confidence", ylabel="accuracy")
    right.set(title="ranking hardly does", xlabel="coverage", ylabel="risk")
    left.legend()


def notes(report: Report) -> list[str]:
    return [
        f"Temperatures are {report.range('temperature', '.2f')}. Before scaling "
        f"{report.range('raw: answers at 0.9', '.0f')} answers reach a confidence of 0.9, after it "
        f"{report.range('scaled: answers at 0.9', '.0f')}: fewer of them are wrong partly because fewer are left.",
        "The order of confidences of different rows can change with the temperature (that of the classes of one row "
        "cannot), so that AURC moves a little.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
