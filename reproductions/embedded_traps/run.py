"""P127 on text: traps drawn from the embedded model, put into plays, and the embedded model trained on the plays."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure

from loglik.errors import InputError
from loglik.models.load import load
from loglik.signals.detection import auroc
from loglik.signals.membership import membership_scores
from loglik.signals.texts import text_rows
from loglik.signals.traps import assign_repetitions, generate_traps, inject
from loglik.training import TokenBlocks, TrainConfig, fit

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"
LENGTH, EDGES = 25, (20.0, 60.0, 200.0)  # tokens; perplexities
REPETITIONS = (0, 1, 4, 16, 64)
PER_CELL = 20  # traps of each number of repetitions in each range of perplexity
DOCUMENT = 5_000  # characters
BLOCK, BATCH, LR = 256, 16, 5e-4
SCORES = ("ratio", "loss", "min_k", "min_k_plus_plus")
INJECTED = REPETITIONS[1:]


def key(score: str, times: int) -> str:
    return f"{score} AUC, {times} times"


def gain(m: Mapping[str, float], other: str) -> float:
    """Mean AUC of the ratio minus that of another score, over the numbers of repetitions where the ratio has room."""
    cells = [times for times in INJECTED if m[key("ratio", times)] < 0.98]
    return statistics.fmean(m[key("ratio", c)] - m[key(other, c)] for c in cells) if cells else 0.0


CLAIM = Claim(
    paper="P127",
    text=(
        "Whether a model was trained on a document shows in traps put into it, the better the more often they were "
        "repeated, and best by the ratio to a reference model: here for texts and the embedded model."
    ),
    setup=(
        "200 traps of 25 tokens drawn from the embedded model, half of perplexity 20 to 60 and half of 60 to 200; of "
        "each range 20 are put 1, 4, 16 and 64 times into tinyshakespeare, cut into documents of 5000 characters, and "
        "20 are kept unused. The embedded model is trained on the documents once (blocks of 256 tokens, AdamW, batches "
        "of 16, learning rate 5e-4); it is its own reference before that. Traps are scored after BOS. AUC of injected "
        "against unused."
    ),
    checks=(
        Check(
            "repetition",
            "ratio AUC at 64 times - once >= 0.25, means over seeds",
            lambda m: m[key("ratio", 64)] - m[key("ratio", 1)] >= 0.25,
            (key("ratio", 64), key("ratio", 1)),
            on_mean=True,
        ),
        Check(
            "reference",
            "mean of ratio AUC - loss AUC over the repetitions with a ratio AUC < 0.98 is >= 0.03, means over seeds",
            lambda m: gain(m, "loss") >= 0.03,
            tuple(key(score, times) for score in ("ratio", "loss") for times in INJECTED),
            on_mean=True,
        ),
        Check(
            "control: the reference knows nothing",
            "AUC of the reference model's own loss within 0.1 of 0.5 at every number of repetitions, means over seeds",
            lambda m: all(abs(m[key("reference loss", times)] - 0.5) <= 0.1 for times in INJECTED),
            tuple(key("reference loss", times) for times in INJECTED),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=3,
)


def measure(seed: int) -> Measured:
    if not DATA.is_file():
        raise InputError(f"this reproduction needs {DATA}: put tinyshakespeare there")
    generator = torch.Generator().manual_seed(seed)
    reference, target = load("tiny", device="cpu"), load("tiny", device="cpu")
    tokenizer = reference.tokenizer

    def survives(ids: list[int]) -> bool:
        """The same tokens after decoding and encoding, and words to find in a play."""
        text = tokenizer.decode(ids)
        return text == text.strip() and tokenizer.encode(text, add_special_tokens=False) == ids

    traps = generate_traps(
        reference,
        LENGTH,
        per_bucket=PER_CELL * len(REPETITIONS),
        edges=EDGES,
        accept=survives,
        max_similarity=0.5,
        generator=generator,
        max_draws=200_000,
    )
    times = assign_repetitions(traps.bucket, REPETITIONS, generator=generator)
    texts = [tokenizer.decode(ids) for ids in traps.ids]
    plays = DATA.read_text(encoding="utf-8")
    documents = [plays[first : first + DOCUMENT] for first in range(0, len(plays) - DOCUMENT + 1, DOCUMENT)]
    chosen = np.random.default_rng(seed).permutation(len(documents))
    injected = [number for number, count in enumerate(times.tolist()) if count]
    for place, number in zip(chosen, injected, strict=False):
        documents[place], _ = inject(documents[place], texts[number], int(times[number]), generator=generator)
    if len(injected) > len(documents):
        raise InputError(f"{len(injected)} traps do not fit into {len(documents)} documents of one trap each")
    stream: list[int] = []
    for document in documents:
        stream += [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)]
    blocks = TokenBlocks(np.array(stream), BLOCK)
    steps = len(blocks) // BATCH
    settings = TrainConfig(steps=steps, batch_size=BATCH, learning_rate=LR, seed=seed, save_every=steps)
    with TemporaryDirectory() as folder:
        fit(target, "mle", blocks, settings, output=folder)
    target.model.eval()
    batch = text_rows(target, texts)
    with torch.no_grad():
        scores = {name: found.value for name, found in membership_scores(target, batch, reference=reference).items()}
        scores["reference loss"] = membership_scores(reference, batch)["loss"].value
    values: dict[str, float] = {"tokens of the corpus": float(len(stream)), "steps": float(steps)}
    unused = times == 0
    for count in INJECTED:
        own = times == count
        labels = torch.cat([torch.ones(int(own.sum())), torch.zeros(int(unused.sum()))]).bool()
        for name in (*SCORES, "reference loss"):
            values[key(name, count)] = auroc(torch.cat([scores[name][own], scores[name][unused]]), labels)
        values[f"gain of a trap, {count} times"] = float(scores["ratio"][own].mean() - scores["ratio"][unused].mean())
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    for number, score in enumerate((*SCORES, "reference loss")):
        for first in range(len(report.seeds)):
            curve = [report.per_seed(key(score, times))[first] for times in INJECTED]
            label = None if first else score.replace("_", " ")
            axes.plot(INJECTED, curve, "o-", ms=3, color=f"C{number}", alpha=0.7, label=label)
    axes.axhline(0.5, color="black", ls=":", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(INJECTED, [str(times) for times in INJECTED])
    axes.set(xlabel="repetitions of a trap", ylabel="AUC")
    axes.legend(fontsize=8, loc="lower right")


def notes(report: Report) -> list[str]:
    shown = "; ".join(f"{times} times {report.range(key('ratio', times), '.2f')}" for times in INJECTED)
    plain = "; ".join(f"{times} times {report.range(key('loss', times), '.2f')}" for times in INJECTED)
    means = {name: report.mean(name) for name in report.measured[0].values}
    return [
        f"Ratio AUC: {shown}. Loss AUC: {plain}.",
        f"Where the ratio has room it gains {gain(means, 'loss'):.3f} on the loss, {gain(means, 'min_k'):.3f} on "
        f"Min-K% and {gain(means, 'min_k_plus_plus'):.3f} on Min-K%++ (k = 0.2).",
        "Traps are scored after BOS, where none of them stood in training. Their training text, Python, and the plays "
        "differ: a corpus nearer to the model's own would hide a trap better.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
