"""P026: the ratio of a fine-tuned model to its base detects what the likelihood alone does not (2404.08679)."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.signals.detection import auroc, roc_curve
from loglik.signals.ood import likelihood_score, ood_scores
from loglik.training import Example, TrainConfig, fit

LEVELS, BOS, PIXELS, TRAINING = 4, 4, 64, 1100
WIDTH, LAYERS, HEADS, BATCH = 48, 2, 4, 64
PRETRAIN, FINETUNE = (500, 2e-3), (150, 5e-4)  # steps and learning rate
INSIDE = 5  # digits 0 to 4

CLAIM = Claim(
    paper="P026",
    text=(
        "The log-likelihood ratio of a pretrained model to its fine-tuned version tells out-of-distribution inputs "
        "much better than the fine-tuned likelihood alone."
    ),
    setup=(
        "scikit-learn's digits, 8 x 8 pixels in 4 grey levels, as sequences of BOS and 64 tokens; 1100 for training. "
        "GPT-2 with 2 layers, width 48 and 4 heads: pretrained on all ten digits (500 AdamW steps of 64, learning rate "
        "2e-3), a copy fine-tuned on digits 0 to 4 (150 steps, 5e-4). Test: held-out 0 to 4 against held-out 5 to 9."
    ),
    checks=(
        Check(
            "the ratio detects",
            "AUROC of the ratio >= 0.90, mean over seeds",
            lambda m: m["AUROC: ratio"] >= 0.90,
            ("AUROC: ratio",),
            on_mean=True,
        ),
        Check(
            "better than the likelihood",
            "AUROC of the ratio - AUROC of the likelihood >= 0.05, in every seed",
            lambda m: m["AUROC: ratio"] - m["AUROC: likelihood"] >= 0.05,
            ("AUROC: ratio", "AUROC: likelihood"),
        ),
        Check(
            "an empty image",
            "more in-distribution images score above the all-blank one by the likelihood than by the ratio, mean over "
            "seeds",
            lambda m: m["above blank: likelihood"] > m["above blank: ratio"],
            ("above blank: likelihood", "above blank: ratio"),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=3,
)


def images(seed: int) -> tuple[Tensor, Tensor]:
    """(N, 64) grey levels and (N,) digits, in random order."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    levels = np.minimum(data.data[order] * LEVELS // 17, LEVELS - 1).astype(np.int64)  # 0 to 16 to four even parts
    return torch.from_numpy(levels), torch.from_numpy(data.target[order])


def trained(model: CausalLM, rows: Tensor, steps: int, lr: float, seed: int) -> CausalLM:
    settings = TrainConfig(
        steps=steps, batch_size=BATCH, learning_rate=lr, schedule="constant", seed=seed, save_every=steps
    )
    with TemporaryDirectory() as folder:
        fit(model, "mle", [Example([BOS, *row]) for row in rows.tolist()], settings, output=folder)
    model.model.eval()
    return model


def batch(rows: Tensor) -> TokenBatch:
    return TokenBatch.from_lists([[BOS, *row] for row in rows.tolist()])


def measure(seed: int) -> Measured:
    torch.manual_seed(seed)
    rows, digits = images(seed)
    config = GPT2Config(
        vocab_size=LEVELS + 1,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=PIXELS + 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    base = trained(CausalLM(GPT2LMHeadModel(config)), rows[:TRAINING], *PRETRAIN, seed)
    own = rows[:TRAINING][digits[:TRAINING] < INSIDE]
    tuned = trained(CausalLM(copy.deepcopy(base.model)), own, *FINETUNE, seed)
    test, outside = rows[TRAINING:], digits[TRAINING:] >= INSIDE
    cut = len(own) // 2
    with torch.no_grad():
        usual = tuned.log_prob(batch(own[:cut]))
        before = likelihood_score(base.log_prob(batch(test)))
    found = ood_scores(tuned, batch(test), base=base, held_out=usual)
    blank = ood_scores(tuned, batch(torch.zeros(1, PIXELS, dtype=torch.long)), base=base, held_out=usual)
    scores = {
        "ratio": found["likelihood_ratio"].value,
        "likelihood": found["likelihood"].value,
        "typicality": found["typicality"].value,
        "base likelihood": before.value,
    }
    values = {f"AUROC: {name}": auroc(score, outside) for name, score in scores.items()}
    for name, key in (("ratio", "likelihood_ratio"), ("likelihood", "likelihood"), ("typicality", "typicality")):
        values[f"above blank: {name}"] = float((scores[name][~outside] > blank[key].value).double().mean())
    curves: dict[str, list[float]] = {}
    for name in ("ratio", "likelihood"):
        curve = roc_curve(scores[name], outside)
        curves[f"{name}: fpr"], curves[f"{name}: tpr"] = curve.fpr.tolist(), curve.tpr.tolist()
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = [name for name in report.measured[0].values if name.startswith("AUROC")]
    for number, name in enumerate(names):
        left.plot([number] * len(report.seeds), report.per_seed(name), "o", ms=4, alpha=0.6)
    left.axhline(0.5, color="black", ls=":", lw=0.8)
    left.set_xticks(range(len(names)), [name.removeprefix("AUROC: ").replace(" ", "\n") for name in names], fontsize=8)
    left.set(title="digits 5 to 9 against 0 to 4", ylabel="AUROC")
    for number, name in enumerate(("ratio", "likelihood")):
        for first, measured in enumerate(report.measured):
            fpr, tpr = measured.curves[f"{name}: fpr"], measured.curves[f"{name}: tpr"]
            right.plot(fpr, tpr, color=f"C{number}", lw=0.9, label=None if first else name)
    right.plot([0, 1], [0, 1], "k:", lw=0.8)
    right.set(title="a curve per seed", xlabel="false alarms", ylabel="found")
    right.legend(fontsize=8)


def notes(report: Report) -> list[str]:
    return [
        f"AUROC: ratio {report.range('AUROC: ratio', '.3f')}, fine-tuned likelihood "
        f"{report.range('AUROC: likelihood', '.3f')}, base likelihood {report.range('AUROC: base likelihood', '.3f')}, "
        f"typicality {report.range('AUROC: typicality', '.3f')}.",
        "An all-blank image: the share of in-distribution images that count as further out is "
        f"{report.range('above blank: likelihood', '.2f')} by the likelihood, "
        f"{report.range('above blank: ratio', '.2f')} by the ratio and "
        f"{report.range('above blank: typicality', '.2f')} by typicality. Neither model ever saw such "
        "an image, so that the argument for the ratio says nothing about it.",
        "All test images have 64 scored tokens: ratio and ratio per token rank alike.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
