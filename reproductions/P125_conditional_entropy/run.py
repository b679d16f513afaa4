"""P125: the fall of the answer's entropy along a chain tells chains that end right from wrong ones (2508.20395)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor

from loglik.kinds import Kind, Unit
from loglik.models.batch import TokenBatch
from loglik.models.load import load
from loglik.signals.detection import auroc
from loglik.signals.entropy_curve import EntropyCurve
from loglik.signals.trace_entropy import answer_entropy_curve, entropy_curve, split_steps

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_example_model_solutions.jsonl"
DIGITS, BASE, CHAINS = 6, 7, 600
SEEN, RELIABLE, RIGHT = 0.7, 0.6, 0.98
ADVICE = {"threshold": 0.5, "stall": 3, "min_fall": 0.05}  # of early stopping, nats and steps
PROBLEMS, CONTEXT = 60, 480  # of GSM8K; tokens of a chain at most

CLAIM = Claim(
    paper="P125",
    text="The drop of the answer's conditional entropy along a chain separates chains that end right from wrong ones.",
    setup=(
        "Six digits mod 7, answer their sum. The scorer sees each digit with probability .7, else a random one. A "
        "chain states the partial sums: with probability .6 it is reliable (each right with probability .98, else "
        "another number), otherwise random. The scorer is the exact Bayesian filter over (reliable, partial sum). 600 "
        "chains; right: the last stated sum is the answer. AUROC of the drop of the entropy. Beside the claim: without "
        "the last step, which states the answer; early stopping (below 0.5 nats, or 3 steps without a fall of 0.05); "
        "and real solutions of GSM8K problems with the embedded model as the scorer."
    ),
    checks=(
        Check(
            "the drop separates",
            "AUROC of the entropy drop for right chains >= 0.90, in every seed",
            lambda m: m["AUROC of the drop"] >= 0.90,
            ("AUROC of the drop",),
        ),
        Check(
            "and so does the slope",
            "AUROC of minus the slope >= 0.90, in every seed",
            lambda m: m["AUROC of minus the slope"] >= 0.90,
            ("AUROC of minus the slope",),
            main=False,
        ),
        Check(
            "before the answer is stated",
            "without the last step the AUROC is lower and still >= 0.70, in every seed",
            lambda m: 0.70 <= m["AUROC of the drop, last step left out"] < m["AUROC of the drop"],
            ("AUROC of the drop, last step left out", "AUROC of the drop"),
            main=False,
        ),
    ),
    seeds=3,
)


class ExactScorer:
    """The distribution of the sum given six seen digits and the first k stated partial sums, as next-token model."""

    kind, unit = Kind.EXACT, Unit.TOKEN

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, 7) log-probabilities of the sum; rows are the seen digits and then the stated sums."""
        digits = torch.full((len(prefix), DIGITS, BASE), (1 - SEEN) / BASE, dtype=torch.float64)
        digits.scatter_add_(
            2, prefix.ids[:, :DIGITS, None], torch.full((len(prefix), DIGITS, 1), SEEN, dtype=torch.float64)
        )
        stated = prefix.ids[:, DIGITS:]
        # state[b, r, s]: chain is reliable (r = 1) and the partial sum is s, together with what was stated so far.
        state = torch.zeros(len(prefix), 2, BASE, dtype=torch.float64)
        state[:, 0, 0], state[:, 1, 0] = 1 - RELIABLE, RELIABLE
        for place in range(DIGITS):
            state = added(state, digits[:, place])
            if place < stated.shape[1]:
                told = torch.full((len(prefix), 2, BASE), 1 / BASE, dtype=torch.float64)
                told[:, 1] = (1 - RIGHT) / (BASE - 1)
                told[:, 1].scatter_(1, stated[:, place : place + 1], RIGHT)
                state = state * told
                state = state / state.sum((1, 2), keepdim=True)
        return state.sum(1).log()


def added(state: Tensor, digit: Tensor) -> Tensor:
    """The state after a digit with probabilities (B, 7) has been added to the sum."""
    shifted = torch.stack([state.roll(d, 2) * digit[:, d, None, None] for d in range(BASE)])
    return shifted.sum(0)


def chains(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Seen digits and stated sums, both (600, 6), the answers, and whether each chain is reliable."""
    shape = (CHAINS, DIGITS)
    digits = generator.integers(BASE, size=shape)
    seen = np.where(generator.random(shape) < SEEN, digits, generator.integers(BASE, size=shape))
    sums = digits.cumsum(1) % BASE
    reliable = generator.random(CHAINS) < RELIABLE
    other = (sums + generator.integers(1, BASE, size=shape)) % BASE
    stated = np.where(generator.random(shape) < RIGHT, sums, other)
    stated = np.where(reliable[:, None], stated, generator.integers(BASE, size=shape))
    return seen, stated, sums[:, -1], reliable


def measure(seed: int) -> Measured:
    seen, stated, answer, reliable = chains(np.random.default_rng(seed))
    right = stated[:, -1] == answer
    scorer, curves = ExactScorer(), []
    for row in range(CHAINS):
        told = [[*seen[row].tolist(), *stated[row, :k].tolist()] for k in range(DIGITS + 1)]
        curves.append(entropy_curve(scorer, told, [int(answer[row])]))
    cut = [curve.until(-1) for curve in curves]
    advice = [curve.early_stop(**ADVICE) for curve in curves]
    stalled = np.array([a.reason == "stalled" and a.saved > 0 for a in advice])
    entropies = np.array([curve.entropy.value.tolist() for curve in curves])
    values = {
        "AUROC of the drop": auroc([c.drop() for c in curves], right),
        "AUROC of minus the slope": auroc([-c.slope() for c in curves], right),
        "AUROC of minus the share of rising steps": auroc([-c.share_rising() for c in curves], right),
        "AUROC of the gain in likelihood": auroc([float(c.information_gain.sum()) for c in curves], right),
        "AUROC of the drop, last step left out": auroc([c.drop() for c in cut], right),
        "AUROC of the drop, reliable chains alone": auroc(
            [c.drop() for c, r in zip(curves, reliable, strict=True) if r], right[reliable]
        ),
        "share of right chains": float(right.mean()),
        "share stopped early": float(stalled.mean()),
        "right, of chains stopped early": float(right[stalled].mean()),
        "right, of the other chains": float(right[~stalled].mean()),
        "steps saved by stopping early": float(np.mean([a.saved for a in advice])),
        "mean utility of a step, lowest": float(-np.diff(entropies.mean(0)).max()),
        "share of single steps that raise the entropy": float((np.diff(entropies, axis=1) > 0).mean()),
    }
    for k in range(DIGITS + 1):
        values[f"entropy after {k} steps, right"] = float(entropies[right, k].mean())
        values[f"entropy after {k} steps, wrong"] = float(entropies[~right, k].mean())
    return Measured(values | gsm8k(seed))


def gsm8k(seed: int) -> dict[str, float]:
    """The same figures for real solutions with the embedded model as the scorer; nothing without the data."""
    if not DATA.is_file():
        return {}
    model = load("tiny", device="cpu")
    problems = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(seed).choice(len(problems), PROBLEMS, replace=False)
    found: list[EntropyCurve] = []
    right: list[bool] = []
    for number in chosen:
        problem = problems[number]
        answer = problem["ground_truth"].rpartition("A:")[2].strip()
        for name, solution in problem.items():
            if name in ("question", "ground_truth"):
                continue
            steps = split_steps(solution["solution"])[:-1]  # the last line is the conclusion
            text = "\n".join([problem["question"], *steps])
            if not steps or len(model.tokenizer(text)["input_ids"]) > CONTEXT:
                continue
            found.append(answer_entropy_curve(model, problem["question"], steps, f" {answer}", cue="\nA:"))
            right.append(solution["is_correct"])
    steps_ = [curve.num_steps for curve in found]
    return {
        "GSM8K, tiny: AUROC of the drop": auroc([c.drop() for c in found], right),
        "GSM8K, tiny: AUROC of minus the slope": auroc([-c.slope() for c in found], right),
        "GSM8K, tiny: AUROC of the gain in likelihood": auroc([float(c.information_gain.sum()) for c in found], right),
        "GSM8K: AUROC of fewer steps": auroc([-n for n in steps_], right),
        "GSM8K, tiny: chains": float(len(found)),
    }


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, kind in enumerate(("right", "wrong")):
        for at, measured in enumerate(report.measured):
            curve = [measured.values[f"entropy after {k} steps, {kind}"] for k in range(DIGITS + 1)]
            left.plot(curve, "o-", ms=3, color=f"C{number}", alpha=0.7, label=None if at else f"chains that end {kind}")
    left.set(title="mean entropy of the answer", xlabel="steps", ylabel="nats", ylim=(0, None))
    left.legend(fontsize=7)
    names = [name for name in report.measured[0].values if "AUROC" in name]
    for at, name in enumerate(names):
        right.plot(report.per_seed(name), [at] * len(report.seeds), "o", ms=4, alpha=0.6)
    right.axvline(0.5, color="black", lw=0.8)
    right.axvline(0.9, color="black", ls=":", lw=0.8)
    right.set_yticks(range(len(names)), [n.replace("AUROC of ", "") for n in names], fontsize=6)
    right.set(title="AUROC for right chains")


def notes(report: Report) -> list[str]:
    told = [
        "The last step states the answer. Without it the AUROC of the drop is "
        f"{report.range('AUROC of the drop, last step left out')}: much of the figure above is the scorer's belief "
        "that the chain's last word is right. It says 'this chain can be trusted', which is the scorer's knowledge of "
        "reliability; among reliable chains alone the AUROC is "
        f"{report.range('AUROC of the drop, reliable chains alone')}.",
        "On average no step raises the entropy (the least mean utility is "
        f"{report.range('mean utility of a step, lowest')} nats), as the information inequality says; of single steps "
        f"{report.range('share of single steps that raise the entropy', '.2f')} do.",
        f"Early stopping gives up {report.range('share stopped early', '.2f')} of the chains and saves "
        f"{report.range('steps saved by stopping early', '.2f')} steps a chain; of those chains "
        f"{report.range('right, of chains stopped early', '.2f')} would have ended right, of the others "
        f"{report.range('right, of the other chains', '.2f')}. No chain gets below the threshold before its "
        "last step: the last digit alone leaves about 1 nat.",
        "The likelihood of the true answer, teacher-forced in the same pass, separates with an AUROC of "
        f"{report.range('AUROC of the gain in likelihood', '.3f')}: it compares the chain's last word with the truth, "
        "which is no finding. The entropy does not look at the true answer here, because the answer is one token.",
    ]
    if "GSM8K, tiny: chains" in report.measured[0].values:
        told.append(
            "Real solutions, conclusion left out, with the embedded model as the scorer, which has learnt Python and "
            f"no arithmetic: AUROC of the drop {report.range('GSM8K, tiny: AUROC of the drop')}, of the gain in "
            f"likelihood {report.range('GSM8K, tiny: AUROC of the gain in likelihood')}, of having fewer steps "
            f"{report.range('GSM8K: AUROC of fewer steps')}. The claim needs a scorer that can read the chain."
        )
    return told


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
