"""P110: the surprisal of one greedy decode ranks right and wrong answers like entropies of ten samples (2412.15176)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import Language, entropy

from loglik.likelihood import Kind, LogLikelihood, Unit
from loglik.models.load import load
from loglik.scoring.score import score
from loglik.signals.detection import auroc
from loglik.signals.sequence_uncertainty import (
    greedy_nll,
    length_normalised_log_prob,
    mode_nll,
    predictive_entropy,
    semantic_entropy,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_example_model_solutions.jsonl"
PROMPTS, SAMPLES = 3000, 10
LANGUAGE = Language(4, 4)
LOW, HIGH = 0.05, 2.0  # of the Dirichlet's parameter, log-uniform
WARMTH = (1.0, 0.6, 0.3)  # answers are drawn from p^w: 1 is a calibrated world
PREFIXES = (4, 3, 2, 1)  # outputs mean the same if so many first tokens agree; 4 is the whole string
PROBLEMS = 150  # of GSM8K

CLAIM = Claim(
    paper="P110",
    text=(
        "For predicting whether the greedy answer is right, -log p of the greedy answer is at least as good as entropy "
        "estimates from ten samples."
    ),
    setup=(
        "3000 prompts, each with an exact tree model of 4 symbols and 4 tokens (256 outputs): every next-token table "
        "is Dirichlet(a), log a uniform between log 0.05 and log 2 for each prompt. The true answer is drawn from the "
        "model itself; wrong = it is not the greedy output. AUROC of the uncertainty for wrong. Beside the claim: "
        "answers drawn from p^0.6 and p^0.3, answers that mean the same when their first 3, 2 or 1 tokens agree, and "
        "the surprisal of real solutions of GSM8K problems under the embedded model."
    ),
    checks=(
        Check(
            "better than ten samples",
            "AUROC of G-NLL >= AUROC of predictive entropy from 10 samples + 0.01, in every seed",
            lambda m: m["G-NLL"] >= m["predictive entropy, 10 samples"] + 0.01,
            ("G-NLL", "predictive entropy, 10 samples"),
        ),
        Check(
            "at least as good as the exact entropy",
            "AUROC of G-NLL >= AUROC of the enumerated entropy, in every seed",
            lambda m: m["G-NLL"] >= m["exact entropy"],
            ("G-NLL", "exact entropy"),
        ),
        Check(
            "meanings turn it round",
            "where one first token is one meaning, the exact semantic entropy beats G-NLL, in every seed",
            lambda m: m["1 token means: exact semantic entropy"] > m["1 token means: G-NLL"],
            ("1 token means: exact semantic entropy", "1 token means: G-NLL"),
            main=False,
        ),
    ),
    seeds=5,
)


def worlds(seed: int) -> list[Tensor]:
    """Tables of each depth t, (prompts, 4^t, 4) log-probabilities."""
    generator = np.random.default_rng(seed)
    size = LANGUAGE.vocabulary
    a = np.exp(generator.uniform(math.log(LOW), math.log(HIGH), size=(PROMPTS, 1, 1)))
    tables = []
    for depth in range(LANGUAGE.length):
        shape = (PROMPTS, size**depth, size)
        # log of Gamma(a) as log Gamma(a + 1) + log(U) / a: a draw for a = 0.05 itself is often 0 in floating point.
        logs = np.log(generator.standard_gamma(np.broadcast_to(a + 1, shape))) + np.log(generator.random(shape)) / a
        tables.append(torch.from_numpy(logs).log_softmax(-1))
    return tables


def outputs(tables: list[Tensor]) -> Tensor:
    """(prompts, 256) log-probabilities of all outputs."""
    log_p = torch.zeros(PROMPTS, 1, dtype=torch.float64)
    for table in tables:
        log_p = (log_p[:, :, None] + table).flatten(1)
    return log_p


def greedy(tables: list[Tensor]) -> Tensor:
    """(prompts,) number of the greedy output."""
    index = torch.zeros(PROMPTS, dtype=torch.long)
    for table in tables:
        index = index * LANGUAGE.vocabulary + table[torch.arange(PROMPTS), index].argmax(-1)
    return index


def labelled(log_p: Tensor, index: Tensor) -> LogLikelihood:
    """Of outputs (prompts, N) by number, in rows; all have as many tokens."""
    values = log_p.gather(1, index).flatten()
    return LogLikelihood(values, Kind.EXACT, Unit.TOKEN, torch.full(values.shape, LANGUAGE.length))


def measure(seed: int) -> Measured:
    tables = worlds(seed)
    log_p, best = outputs(tables), greedy(tables)
    generator = torch.Generator().manual_seed(seed)
    answer = {w: torch.multinomial((w * log_p).softmax(1), 1, generator=generator)[:, 0] for w in WARMTH}
    drawn = torch.multinomial(log_p.exp(), SAMPLES, replacement=True, generator=generator)
    question = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    samples = labelled(log_p, drawn)
    everything = labelled(log_p, torch.arange(len(LANGUAGE)).expand(PROMPTS, -1))
    scores = {
        "G-NLL": greedy_nll(labelled(log_p, best[:, None])).value,
        "exact MAP": mode_nll(everything, torch.arange(PROMPTS).repeat_interleave(len(LANGUAGE))).value,
        "predictive entropy, 10 samples": predictive_entropy(samples, question).value,
        "exact entropy": entropy(log_p),
        "one sample's NLL": -samples.value[::SAMPLES],
    }
    values = {name: auroc(found, answer[1.0] != best) for name, found in scores.items()}
    values |= {
        f"answers from p^{w:g}: {name}": auroc(scores[name], answer[w] != best)
        for w in WARMTH[1:]
        for name in ("G-NLL", "predictive entropy, 10 samples", "exact entropy")
    }
    for length in PREFIXES:
        step = LANGUAGE.vocabulary ** (LANGUAGE.length - length)
        wrong = answer[1.0] // step != best // step
        classes = log_p.reshape(PROMPTS, -1, step).logsumexp(2)
        estimate = semantic_entropy(samples, question, (drawn // step).flatten(), drawn.flatten()).value
        found = {
            "G-NLL": scores["G-NLL"],
            "exact semantic entropy": entropy(classes),
            "semantic entropy, 10 samples": estimate,
            "exact entropy": scores["exact entropy"],
            "surprisal of the likeliest meaning": -classes.amax(1),
        }
        values |= {f"{length} token{'s' * (length > 1)} means: {n}": auroc(s, wrong) for n, s in found.items()}
    values["share wrong"] = (answer[1.0] != best).double().mean().item()
    values["share of prompts whose greedy output is the mode"] = (log_p.argmax(1) == best).double().mean().item()
    return Measured(values | gsm8k(seed))


def gsm8k(seed: int) -> dict[str, float]:
    """AUROC of a solution's surprisal under the embedded model for "its answer is wrong"; nothing without the data."""
    if not DATA.is_file():
        return {}
    problems = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(seed).choice(len(problems), PROBLEMS, replace=False)
    pairs, wrong = [], []
    for number in chosen:
        problem = problems[number]
        for name, solution in problem.items():
            if name not in ("question", "ground_truth"):
                pairs.append((problem["question"] + "\n", solution["solution"]))
                wrong.append(not solution["is_correct"])
    likelihood = score(load("tiny", device="cpu"), pairs, overflow="window")
    return {
        "GSM8K, tiny: surprisal of the solution": auroc(greedy_nll(likelihood).value, wrong),
        "GSM8K, tiny: surprisal per token": auroc(-length_normalised_log_prob(likelihood).value, wrong),
        "GSM8K: tokens of the solution": auroc(likelihood.num_units, wrong),
    }


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = ["G-NLL", "exact MAP", "exact entropy", "predictive entropy, 10 samples", "one sample's NLL"]
    for at, name in enumerate(names):
        left.plot([at] * len(report.seeds), report.per_seed(name), "o", ms=4, alpha=0.6)
    left.set_xticks(range(len(names)), [n.replace(", ", "\n").replace(" ", "\n", 1) for n in names], fontsize=7)
    left.set(title="calibrated answers (a point per seed)", ylabel="AUROC for wrong")
    for name in ("G-NLL", "exact semantic entropy", "semantic entropy, 10 samples", "exact entropy"):
        curve = [report.mean(f"{n} token{'s' * (n > 1)} means: {name}") for n in PREFIXES]
        right.plot(PREFIXES, curve, "o-", ms=4, label=name)
    right.set(
        title="outputs that share a meaning", xlabel="first tokens that make the meaning", ylabel="AUROC for wrong"
    )
    right.set_xticks(PREFIXES)
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    gap = [a - b for a, b in zip(report.per_seed("G-NLL"), report.per_seed("exact entropy"), strict=True)]
    told = [
        f"G-NLL minus the exact entropy: {min(gap):+.4f} to {max(gap):+.4f}. In a calibrated world the probability of "
        "the greedy output is the probability of being right, so that no score can rank better on average; an entropy "
        "ranks the spread of the rest as well.",
        "Broken calibration: with answers from p^0.3 G-NLL reaches "
        f"{report.range('answers from p^0.3: G-NLL')}, the exact entropy "
        f"{report.range('answers from p^0.3: exact entropy')}, predictive entropy from 10 samples "
        f"{report.range('answers from p^0.3: predictive entropy, 10 samples')}.",
    ]
    ahead = [
        str(n)
        for n in PREFIXES
        if report.mean(f"{n} token{'s' * (n > 1)} means: semantic entropy, 10 samples")
        > report.mean(f"{n} token{'s' * (n > 1)} means: G-NLL")
    ]
    told.append(
        "Semantic entropy from 10 samples and the true classes is ahead of G-NLL (means) where the meaning is the "
        + ("first " + ", ".join(ahead) + " tokens: the crossover." if ahead else "whole string: no crossover at all.")
    )
    if "GSM8K: tokens of the solution" in report.measured[0].values:
        told.append(
            "Real solutions under the embedded model, which knows Python and no arithmetic: AUROC of the surprisal "
            f"{report.range('GSM8K, tiny: surprisal of the solution')}, per token "
            f"{report.range('GSM8K, tiny: surprisal per token')}, of the mere length "
            f"{report.range('GSM8K: tokens of the solution')}. They are not greedy outputs of that model: this is no "
            "test of the claim, and what it ranks is mostly length."
        )
    return told


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
