"""P127: traps are found the better the more often they were repeated and the longer they are (2402.09363)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.signals.detection import auroc
from loglik.signals.membership import membership_scores
from loglik.training import Example, TrainConfig, fit

V, BOS = 64, 64
DOCUMENTS, LENGTH = 4000, 33
WIDTH, LAYERS, HEADS, LR, BATCH = 64, 2, 4, 1e-3, 32
STEPS, REFERENCE_STEPS = 900, 450
LENGTHS, REPETITIONS, TRAPS, UNUSED = (8, 32), (1, 4, 16), 20, 200
SCORES = ("ratio", "loss", "min_k", "min_k_plus_plus")
CELLS = tuple((length, times) for length in LENGTHS for times in REPETITIONS)


def cell(score: str, length: int, times: int) -> str:
    return f"{score} AUC, length {length}, {times} times"


def open_cells(m: Mapping[str, float]) -> list[tuple[int, int]]:
    """Cells in which the ratio still has something to gain."""
    return [c for c in CELLS if m[cell("ratio", *c)] < 0.98]


def gain(m: Mapping[str, float], other: str) -> float:
    """Mean AUC of the ratio minus that of another score over these cells."""
    cells = open_cells(m)
    return statistics.fmean(m[cell("ratio", *c)] - m[cell(other, *c)] for c in cells) if cells else 0.0


CLAIM = Claim(
    paper="P127",
    text=(
        "Whether a model was trained on a document shows in traps put into it: the better the more often they were "
        "repeated and the longer they are, and best by the ratio to a reference model."
    ),
    setup=(
        "A first-order Markov language over 64 symbols (rows Dirichlet 0.1); 4000 documents of BOS and 33 symbols. "
        "Traps come from the flattened chain (rows to the power 0.5), of length 8 or 32, each written 1, 4 or 16 times "
        "over random slices of random documents; 20 traps per cell, 200 unused ones per length. Target: Llama, 2 "
        "layers, width 64, 900 steps of AdamW on batches of 32, learning rate 1e-3 (7 epochs); reference: the same, "
        "450 steps on other documents without traps. Traps are scored after BOS. AUC of injected against unused."
    ),
    checks=(
        Check(
            "repetition",
            "ratio AUC at length 8: 16 times - once >= 0.25, means over seeds",
            lambda m: m[cell("ratio", 8, 16)] - m[cell("ratio", 8, 1)] >= 0.25,
            (cell("ratio", 8, 16), cell("ratio", 8, 1)),
            on_mean=True,
        ),
        Check(
            "length",
            "ratio AUC of traps seen once: length 32 - length 8 >= 0.2, means over seeds",
            lambda m: m[cell("ratio", 32, 1)] - m[cell("ratio", 8, 1)] >= 0.2,
            (cell("ratio", 32, 1), cell("ratio", 8, 1)),
            on_mean=True,
        ),
        Check(
            "reference",
            "mean of ratio AUC - loss AUC over the cells with a ratio AUC < 0.98 is >= 0.03, means over seeds",
            lambda m: gain(m, "loss") >= 0.03,
            tuple(cell(score, *c) for score in ("ratio", "loss") for c in CELLS),
            on_mean=True,
        ),
        Check(
            "Min-K% is not better",
            "mean of ratio AUC - Min-K% AUC over the same cells is > 0, means over seeds",
            lambda m: gain(m, "min_k") > 0,
            tuple(cell("min_k", *c) for c in CELLS),
            main=False,
            on_mean=True,
        ),
        Check(
            "control: the reference knows nothing",
            "AUC of the reference model's own loss within 0.1 of 0.5 in every cell, means over seeds",
            lambda m: all(abs(m[cell("reference loss", *c)] - 0.5) <= 0.1 for c in CELLS),
            tuple(cell("reference loss", *c) for c in CELLS),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=3,
)


def strings(chances: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """(n, length) symbols of a Markov chain that starts anywhere."""
    columns = [torch.randint(V, (n,), generator=generator)]
    for _ in range(length - 1):
        columns.append(torch.multinomial(chances[columns[-1]], 1, generator=generator)[:, 0])
    return torch.stack(columns, 1)


def with_traps(documents: Tensor, traps: Mapping[tuple[int, int], Tensor], generator: torch.Generator) -> Tensor:
    """Every copy of every trap written over a random slice of a document; no document is written over twice."""
    copies = [trap for (_, times), rows in traps.items() for trap in rows for _ in range(times)]
    chosen = torch.randperm(len(documents), generator=generator)[: len(copies)]
    out = documents.clone()
    for number, trap in zip(chosen.tolist(), copies, strict=True):
        begin = int(torch.randint(LENGTH - len(trap) + 1, (1,), generator=generator))
        out[number, begin : begin + len(trap)] = trap
    return out


def train(documents: Tensor, steps: int, seed: int) -> CausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH + 1,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    model = CausalLM(LlamaForCausalLM(config))
    settings = TrainConfig(
        steps=steps, batch_size=BATCH, learning_rate=LR, schedule="constant", seed=seed, save_every=steps
    )
    rows = [Example([BOS, *row]) for row in documents.tolist()]
    with TemporaryDirectory() as folder:
        fit(model, "mle", rows, settings, output=folder)
    model.model.eval()
    return model


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    rows = np.random.default_rng(seed).dirichlet(np.full(V, 0.1), size=V) + 1e-12  # no row without support
    chances = torch.from_numpy(rows / rows.sum(1, keepdims=True))
    flat = chances.sqrt() / chances.sqrt().sum(1, keepdim=True)
    traps = {c: strings(flat, TRAPS, c[0], generator) for c in CELLS}
    unused = {length: strings(flat, UNUSED, length, generator) for length in LENGTHS}
    documents = strings(chances, 2 * DOCUMENTS, LENGTH, generator)
    target = train(with_traps(documents[:DOCUMENTS], traps, generator), STEPS, seed)
    reference = train(documents[DOCUMENTS:], REFERENCE_STEPS, 1000 + seed)
    values: dict[str, float] = {}
    for length in LENGTHS:
        every = torch.cat([*(traps[length, times] for times in REPETITIONS), unused[length]])
        batch = TokenBatch.from_lists([[BOS, *row] for row in every.tolist()])
        scores = {name: score.value for name, score in membership_scores(target, batch, reference=reference).items()}
        scores["reference loss"] = membership_scores(reference, batch)["loss"].value
        for number, times in enumerate(REPETITIONS):
            own = torch.arange(number * TRAPS, (number + 1) * TRAPS)
            picked = torch.cat([own, torch.arange(len(REPETITIONS) * TRAPS, len(every))])
            labels = torch.arange(len(picked)) < TRAPS
            for name in (*SCORES, "reference loss"):
                values[cell(name, length, times)] = auroc(scores[name][picked], labels)
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    for axes, length in zip(figure.subplots(1, len(LENGTHS), sharey=True), LENGTHS, strict=True):
        for number, score in enumerate((*SCORES, "reference loss")):
            for first in range(len(report.seeds)):
                curve = [report.per_seed(cell(score, length, times))[first] for times in REPETITIONS]
                label = None if first else score.replace("_", " ")
                axes.plot(REPETITIONS, curve, "o-", ms=3, color=f"C{number}", alpha=0.7, label=label)
        axes.axhline(0.5, color="black", ls=":", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(REPETITIONS, [str(times) for times in REPETITIONS])
        axes.set(title=f"length {length}", xlabel="repetitions", ylabel="AUC")
    axes.legend(fontsize=7, loc="lower right")


def notes(report: Report) -> list[str]:
    means = {name: report.mean(name) for name in report.measured[0].values}
    cells = open_cells(means)
    shown = "; ".join(
        f"({length}, {times}) {report.range(cell('ratio', length, times), '.2f')}" for length, times in CELLS
    )
    return [
        f"Ratio AUC by (length, repetitions): {shown}.",
        f"Over the {len(cells)} cells with a mean ratio AUC below 0.98 the ratio gains {gain(means, 'loss'):.3f} on "
        f"the loss, {gain(means, 'min_k'):.3f} on Min-K% and {gain(means, 'min_k_plus_plus'):.3f} on "
        "Min-K%++ (k = 0.2).",
        "Traps are scored after BOS, where none of them stood in training: the true context before a trap is not used.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
