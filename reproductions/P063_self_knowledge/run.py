"""P063: a probe on the question's last hidden state predicts whether the model will be right (2207.05221)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM

from loglik.models.batch import TokenBatch
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.calibration import expected_calibration_error
from loglik.signals.detection import auroc
from loglik.signals.p_ik import PIKProbe, question_states, success_counts
from loglik.signals.self_knowledge import self_knowledge_curve

TOPICS, ITEMS, PAIRS, VALUES, PERSONAS = 30, 30, 600, 20, 4
MOST, LEAST = 8.0, 0.02  # how often topics occur, relative to one another
WIDTH, LAYERS, STEPS, BATCH, LR = 64, 2, 1200, 64, 2e-3
SAMPLES, TRAINED, C, BINS = 30, 300, 0.05, 10
RUNS = {"per topic": True, "per question": False}

CLAIM = Claim(
    paper="P063",
    text="A head on the question's last hidden state predicts the model's own success on unseen questions, calibrated.",
    setup=(
        "Facts: 600 of 30 topics x 30 items have one of 20 values; a document is persona (one of 4), topic, item, "
        "value, with topics 8 to 0.02 times as frequent (geometric). A transformer of 2 layers and width 64 learns "
        "them in 1200 AdamW steps of 64 documents, learning rate 2e-3. Targets: 30 samples per question. A logistic "
        "probe (C = 0.05, standardised) is fitted on 300 questions and tested on the other 300. ECE in 10 bins of "
        "equal mass against all samples. Beside the claim, the same frequencies given to questions instead of topics."
    ),
    checks=(
        Check(
            "knows what it knows",
            "mean AUROC of P(IK) for a right greedy answer >= 0.85",
            lambda m: m["per topic: AUROC of P(IK)"] >= 0.85,
            ("per topic: AUROC of P(IK)",),
            on_mean=True,
        ),
        Check(
            "calibrated",
            "mean ECE of P(IK) against the samples <= 0.08",
            lambda m: m["per topic: ECE of P(IK)"] <= 0.08,
            ("per topic: ECE of P(IK)",),
            on_mean=True,
        ),
        Check(
            "the model's own probability is no worse",
            "AUROC of the largest answer probability >= AUROC of P(IK), in every seed",
            lambda m: m["per topic: AUROC of the largest probability"] >= m["per topic: AUROC of P(IK)"],
            ("per topic: AUROC of the largest probability", "per topic: AUROC of P(IK)"),
            main=False,
        ),
        Check(
            "what is known question by question is not read off linearly",
            "with frequencies per question, AUROC of P(IK) <= 0.65, of the largest probability >= 0.75, in every seed",
            lambda m: (
                m["per question: AUROC of P(IK)"] <= 0.65
                and m["per question: AUROC of the largest probability"] >= 0.75
            ),
            ("per question: AUROC of P(IK)", "per question: AUROC of the largest probability"),
            main=False,
        ),
    ),
    seeds=3,
)

# Tokens: personas, topics, items, values.
TOPIC, ITEM, VALUE = PERSONAS, PERSONAS + TOPICS, PERSONAS + TOPICS + ITEMS
VOCABULARY = VALUE + VALUES


class FactModel:
    """What `question_states` asks for: the state at each token, which predicts the next one."""

    def __init__(self, network: TransformerLM) -> None:
        self.network = network

    def hidden_states(self, x: TokenBatch) -> Tensor:
        """(B, T, D)."""
        blank = torch.zeros(len(x), 1, dtype=torch.long)
        return self.network.states(torch.cat([x.ids, blank], 1))[:, 1:]


def facts(by_topic: bool, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(600, 3) topic, item and value of every fact, and (600,) how often it occurs."""
    kept = generator.choice(TOPICS * ITEMS, PAIRS, replace=False)
    frequency = MOST * (LEAST / MOST) ** (np.arange(TOPICS) / (TOPICS - 1))
    which = kept // ITEMS if by_topic else generator.integers(TOPICS, size=PAIRS)
    rows = np.stack([TOPIC + kept // ITEMS, ITEM + kept % ITEMS, VALUE + generator.integers(VALUES, size=PAIRS)], 1)
    return torch.from_numpy(rows), torch.from_numpy(frequency[which])


def train(rows: Tensor, frequency: Tensor, generator: torch.Generator) -> TransformerLM:
    network = TransformerLM(VOCABULARY, WIDTH, length=4, layers=LAYERS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    for _ in range(STEPS):
        chosen = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        persona = torch.randint(PERSONAS, (BATCH, 1), generator=generator)
        loss = objective(network.log_prob(torch.cat([persona, rows[chosen]], 1))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def measure(seed: int) -> Measured:
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, by_topic in RUNS.items():
        numpy, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        rows, frequency = facts(by_topic, numpy)
        network = train(rows, frequency, generator)
        questions = torch.cat([torch.zeros(PAIRS, 1, dtype=torch.long), rows[:, :2]], 1)
        chances = network.conditionals(torch.cat([questions, rows[:, 2:]], 1))[:, -1].exp()
        answers = torch.multinomial(chances, SAMPLES, replacement=True, generator=generator)
        right = answers == rows[:, 2:]
        successes, trials = success_counts(right.flatten(), torch.arange(PAIRS).repeat_interleave(SAMPLES))
        known = (chances.argmax(1) == rows[:, 2]).numpy()
        states = question_states(FactModel(network), TokenBatch.from_lists(questions.tolist()), batch_size=PAIRS)
        order = numpy.permutation(PAIRS)
        fitted, test = order[:TRAINED], order[TRAINED:]
        probe = PIKProbe(c=C).fit(states[fitted], successes[fitted], trials[fitted])
        p_ik, largest = probe.p_ik(states[test]), chances.amax(1).numpy()[test]
        every, outcomes = np.repeat(p_ik, SAMPLES), right.numpy()[test].ravel()
        curve = self_knowledge_curve(p_ik, known[test])
        chosen = curve.at(0.5)
        values |= {
            f"{name}: greedy answers right": float(known.mean()),
            f"{name}: AUROC of P(IK)": auroc(p_ik, known[test]),
            f"{name}: AUROC of the largest probability": auroc(largest, known[test]),
            f"{name}: ECE of P(IK)": expected_calibration_error(every, outcomes, bins=BINS, scheme="mass"),
            f"{name}: ECE of P(IK), equal width": expected_calibration_error(every, outcomes, bins=BINS),
            f"{name}: mean P(IK) less share of right samples": float(p_ik.mean() - outcomes.mean()),
            f"{name}: share above P(IK) 0.5": chosen.share,
            f"{name}: accuracy above P(IK) 0.5": chosen.accuracy if chosen.accuracy is not None else curve.base,
            f"{name}: base accuracy": curve.base,
        }
        curves |= {f"{name}: P(IK)": p_ik.tolist(), f"{name}: share": (successes[test] / SAMPLES).tolist()}
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for axis, name in zip((left, right), RUNS, strict=True):
        for measured in report.measured:
            axis.plot(measured.curves[f"{name}: P(IK)"], measured.curves[f"{name}: share"], ".", ms=3, alpha=0.4)
        axis.plot([0, 1], [0, 1], color="black", lw=0.8)
        axis.set(title=f"frequencies {name}", xlabel="P(IK)", ylabel="share of right samples")


def notes(report: Report) -> list[str]:
    return [
        "P(IK) does not see the answer and needs the hidden state; the model's largest answer probability, which needs "
        f"no training, has AUROC {report.range('per topic: AUROC of the largest probability')} against "
        f"{report.range('per topic: AUROC of P(IK)')}.",
        "With frequencies per question, what is known is not a matter of the topic: the linear probe falls to "
        f"{report.range('per question: AUROC of P(IK)')}, the largest probability keeps "
        f"{report.range('per question: AUROC of the largest probability')}.",
        "The sheet leaves the number of personas open (here 4; questions are asked with the first) and the bins of the "
        f"ECE: of equal mass {report.range('per topic: ECE of P(IK)')}, of equal width "
        f"{report.range('per topic: ECE of P(IK), equal width')}.",
        f"Answers with P(IK) above 0.5 are right in {report.range('per topic: accuracy above P(IK) 0.5', '.2f')}, all "
        f"in {report.range('per topic: base accuracy', '.2f')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
