"""P026 on text: the embedded model, fine-tuned on a support desk's questions, meets questions out of its scope."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure

from loglik.errors import InputError
from loglik.models.load import load
from loglik.models.stdlib_text import stdlib_documents
from loglik.signals.detection import auroc, fpr_at_tpr
from loglik.signals.ood import ood_scores
from loglik.signals.texts import text_rows
from loglik.training import Example, TrainConfig, fit

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STEPS, BATCH, LR = 350, 64, 5e-4
TESTED = 500  # texts of each kind
FAR = ("encyclopedia", "code")
KINDS = ("out of scope", *FAR)
SCORES = ("likelihood_ratio", "likelihood", "perplexity", "typicality")


def key(score: str, kind: str) -> str:
    return f"AUROC against {kind}: {score.replace('_', ' ')}"


CLAIM = Claim(
    paper="P026",
    text=(
        "The log-likelihood ratio of a pretrained model to its fine-tuned version tells out-of-distribution inputs "
        "better than the fine-tuned likelihood alone: here for texts and the embedded model."
    ),
    setup=(
        "The embedded model (4.3 million parameters, trained on Python's library), fine-tuned on the 15,000 training "
        "questions of CLINC150 (350 AdamW steps of 64, learning rate 5e-4). 500 test questions of the 150 intents "
        "against 500 out-of-scope questions, 500 pieces of WikiText-2 and 500 lines of held-out Python, both of at "
        "most 80 characters. Ratios and likelihoods are sums over each text."
    ),
    checks=(
        Check(
            "out of scope",
            "AUROC of the ratio - AUROC of the likelihood >= 0.05 for out-of-scope questions, in every seed",
            lambda m: m[key("likelihood_ratio", KINDS[0])] - m[key("likelihood", KINDS[0])] >= 0.05,
            (key("likelihood_ratio", KINDS[0]), key("likelihood", KINDS[0])),
        ),
        Check(
            "another domain",
            "AUROC of the ratio >= 0.90 for the encyclopedia and for code, in every seed",
            lambda m: all(m[key("likelihood_ratio", kind)] >= 0.90 for kind in FAR),
            tuple(key("likelihood_ratio", kind) for kind in FAR),
        ),
        Check(
            "code is what the base knows",
            "AUROC of the ratio - AUROC of the likelihood >= 0.05 for code, in every seed",
            lambda m: m[key("likelihood_ratio", "code")] - m[key("likelihood", "code")] >= 0.05,
            (key("likelihood_ratio", "code"), key("likelihood", "code")),
            main=False,
        ),
    ),
    seeds=3,
)


def texts(seed: int) -> dict[str, list[str]]:
    """Texts of every kind, in an order drawn by the seed."""
    if not DATA.is_dir():
        raise InputError(f"this reproduction needs the data of {DATA}: put CLINC150 and WikiText-2 there")
    random = np.random.default_rng(seed)

    def some(found: list[str], count: int) -> list[str]:
        return [found[i] for i in random.permutation(len(found))[:count]]

    questions = json.loads((DATA / "clinc150_full.json").read_text(encoding="utf-8"))
    pages = [line.strip()[:80] for line in (DATA / "wikitext2_test.txt").read_text(encoding="utf-8").splitlines()]
    code = [line.strip()[:80] for d in stdlib_documents("held_out") for line in d.text.splitlines()]
    return {
        "train": [text for text, _ in questions["train"]],
        "inside": some([text for text, _ in questions["test"]], TESTED),
        "usual": some([text for text, _ in questions["val"]], TESTED),
        "out of scope": some([text for text, _ in questions["oos_test"]], TESTED),
        "encyclopedia": some([line for line in pages if len(line) >= 40 and not line.startswith("=")], TESTED),
        "code": some([line for line in code if len(line) >= 20], TESTED),
    }


def measure(seed: int) -> Measured:
    found = texts(seed)
    base, tuned = load("tiny", device="cpu"), load("tiny", device="cpu")
    batch = text_rows(tuned, found["train"])
    rows = [Example(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.attention_mask, strict=True)]
    settings = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=LR, seed=seed, save_every=STEPS)
    with TemporaryDirectory() as folder:
        fit(tuned, "mle", rows, settings, output=folder)
    tuned.model.eval()
    with torch.no_grad():
        usual = tuned.log_prob(text_rows(tuned, found["usual"]))
        inside = ood_scores(tuned, text_rows(tuned, found["inside"]), base=base, held_out=usual)
        values: dict[str, float] = {}
        for kind in KINDS:
            outside = ood_scores(tuned, text_rows(tuned, found[kind]), base=base, held_out=usual)
            labels = torch.arange(2 * TESTED) >= TESTED
            for score in SCORES:
                both = torch.cat([inside[score].value, outside[score].value])
                values[key(score, kind)] = auroc(both, labels)
                if kind == KINDS[0]:
                    values[f"FPR at 95 % TPR: {score.replace('_', ' ')}"] = fpr_at_tpr(both, labels)
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        for number, score in enumerate(SCORES):
            axes.plot([number] * len(report.seeds), report.per_seed(key(score, kind)), "o", ms=4, alpha=0.6)
        axes.axhline(0.5, color="black", ls=":", lw=0.8)
        axes.set_xticks(range(len(SCORES)), [score.replace("_", "\n") for score in SCORES], fontsize=7)
        axes.set_title(kind, fontsize=9)
    figure.axes[0].set_ylabel("AUROC")


def notes(report: Report) -> list[str]:
    told = []
    for kind in KINDS:
        parts = ", ".join(f"{score.replace('_', ' ')} {report.range(key(score, kind), '.3f')}" for score in SCORES)
        told.append(f"AUROC against {kind}: {parts}.")
    return told


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
