"""P023: DPO can destroy the answer it prefers, and CHES tells which pairs suffer most (2410.08847)."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from worlds.enumerable import GRULM, Markov, categorical

from loglik.objectives.preference import dpo
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.preference import ches_score, edit_similarity, last_state_similarity, likelihood_displacement

BETA = 0.1
TOKENS, WIDTH, STEPS, LR, ALIKE = 10, 16, 300, 0.5, 0.8
NO, NEVER, YES = 0, 1, 2
VOCABULARY, PROMPT, RESPONSE, PAIRS, PAIR_STEPS, PAIR_LR = 16, 4, 8, 80, 10, 0.1
MUTATIONS = (0, 1, 3, 6)  # tokens changed in the chosen answer; 0 stands for an independent sample

CLAIM = Claim(
    paper="P023",
    text=(
        "DPO on a similar pair drives the preferred answer's probability towards zero while its loss shrinks, with the "
        "mass going to the opposite answer, and pairs with higher CHES scores are displaced more."
    ),
    setup=(
        "One prompt, 10 tokens, d = 16, hidden state and unembedding trained by SGD (0.5, 300 steps, beta 0.1): No "
        "preferred over Never, whose unembeddings have cosine 0.8, and Yes along their difference (control: orthogonal "
        "to both). Ranking: GRU of width 64 fitted to an order-2 Markov source over 16 tokens (600 Adam steps), 80 "
        "pairs (prompt 4, response 8; rejected: an independent sample, or the chosen one with 1, 3 or 6 tokens "
        "changed), 10 SGD steps of DPO (0.1, beta 0.1) on each from the same checkpoint."
    ),
    checks=(
        Check(
            "catastrophic displacement",
            "p(No) falls below a tenth of its start while the loss is < 0.05, in every seed",
            lambda m: m["p(No) after"] < m["p(No) before"] / 10 and m["loss after"] < 0.05,
            ("p(No) before", "p(No) after", "loss after"),
        ),
        Check(
            "only where a probable token lies along the difference",
            "control with Yes orthogonal: p(No) rises, in every seed",
            lambda m: m["control p(No) after"] > m["control p(No) before"],
            ("control p(No) before", "control p(No) after"),
        ),
        Check(
            "CHES ranks displacement",
            "Spearman correlation of CHES with the change of log p(chosen) <= -0.4, in 4 of 5 seeds",
            lambda m: m["rho ches"] <= -0.4,
            ("rho ches",),
            share=(4, 5),
        ),
        Check(
            "the mass goes to the opposite answer",
            "p(Yes) ends above 0.9, in every seed",
            lambda m: m["p(Yes) after"] > 0.9,
            ("p(Yes) after",),
            main=False,
        ),
        Check(
            "CHES ranks better than the edit distance",
            "its Spearman correlation is below that of minus the edit distance, in 4 of 5 seeds (not claimed here)",
            lambda m: m["rho ches"] < m["rho edit similarity"],
            ("rho ches", "rho edit similarity"),
            share=(4, 5),
            main=False,
        ),
        Check(
            "CHES ranks pairs of equal edit distance",
            "mean Spearman correlation within the four kinds of pairs <= -0.2, in 4 of 5 seeds",
            lambda m: m["rho ches within kinds"] <= -0.2,
            ("rho ches within kinds",),
            share=(4, 5),
            main=False,
        ),
        Check(
            "pairs are displaced in absolute terms",
            "at least one pair in ten has a chosen answer that became less likely, in 4 of 5 seeds",
            lambda m: m["share displaced"] >= 0.1,
            ("share displaced",),
            share=(4, 5),
            main=False,
        ),
    ),
    seeds=5,
)


# ---------------------------------------------------------------------- one token
def one_token(seed: int, *, orthogonal: bool) -> tuple[dict[str, float], list[list[float]]]:
    """Probabilities of No, Never and Yes along DPO on (No over Never), before and after; and the last loss."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator))[0].T
    b, u, other = basis
    rows = 3 * torch.randn(TOKENS, WIDTH, generator=generator) / math.sqrt(WIDTH)
    rows[NO], rows[NEVER] = 3 * b, 3 * (ALIKE * b + math.sqrt(1 - ALIKE**2) * u)
    difference = rows[NO] - rows[NEVER]
    rows[YES] = 6 * (other if orthogonal else difference / difference.norm())
    state = 0.3 * b + 0.1 * torch.randn(WIDTH, generator=generator) / math.sqrt(WIDTH)
    unembedding, hidden = rows.requires_grad_(), state.requires_grad_()

    def score(token: int) -> Tensor:
        return categorical((unembedding @ hidden).log_softmax(0), torch.tensor([token]))

    reference = [score(token).detach() for token in (NO, NEVER)]
    optimizer = torch.optim.SGD([unembedding, hidden], lr=LR)
    path = []
    for step in range(STEPS + 1):
        terms = dpo(score(NO), score(NEVER), *reference, beta=BETA)
        with torch.no_grad():
            path.append((unembedding @ hidden).softmax(0)[[NO, NEVER, YES]].tolist())
        if step < STEPS:
            optimizer.zero_grad()
            terms.mean().backward()
            optimizer.step()
    prefix = "control " if orthogonal else ""
    values = {f"{prefix}loss after": terms.mean().item()}
    for name, index in (("No", 0), ("Never", 1), ("Yes", 2)):
        values |= {f"{prefix}p({name}) before": path[0][index], f"{prefix}p({name}) after": path[-1][index]}
    values[f"{prefix}displacement of No"] = likelihood_displacement(reference[0], score(NO)).mean.item()
    return values, path


# ---------------------------------------------------------------------- which pairs are displaced
def language_model(source: Markov, generator: torch.Generator) -> GRULM:
    model = GRULM(VOCABULARY, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(600):
        rows = source.sample(128, length=PROMPT + RESPONSE, generator=generator)
        optimizer.zero_grad()
        MaximumLikelihood("sum")(model.log_prob(rows)).mean().backward()
        optimizer.step()
    return model


def pairs(source: Markov, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen and rejected rows (pairs, prompt + response), and how many tokens were changed."""
    prompts = source.sample(PAIRS, length=PROMPT, generator=generator)
    chosen, rejected = (source.sample(PAIRS, length=RESPONSE, prompt=prompts, generator=generator) for _ in range(2))
    changed = torch.tensor(MUTATIONS).repeat_interleave(PAIRS // len(MUTATIONS))
    for row, count in enumerate(changed.tolist()):
        if count:
            places = PROMPT + torch.randperm(RESPONSE, generator=generator)[:count]
            shift = torch.randint(1, VOCABULARY, (count,), generator=generator)
            rejected[row] = chosen[row]
            rejected[row, places] = (chosen[row, places] + shift) % VOCABULARY
    return chosen, rejected, changed


def displaced(model: GRULM, chosen: Tensor, rejected: Tensor) -> float:
    """Change of log p(chosen) by ten steps of DPO on this pair alone."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        reference = [model.log_prob(rows, start=PROMPT) for rows in (chosen, rejected)]
    optimizer = torch.optim.SGD(tuned.parameters(), lr=PAIR_LR)
    for _ in range(PAIR_STEPS):
        optimizer.zero_grad()
        scores = [tuned.log_prob(rows, start=PROMPT) for rows in (chosen, rejected)]
        dpo(*scores, *reference, beta=BETA).mean().backward()
        optimizer.step()
    return likelihood_displacement(reference[0], tuned.log_prob(chosen, start=PROMPT)).mean.item()


def ranking(generator: torch.Generator) -> tuple[dict[str, float], dict[str, list[float]]]:
    source = Markov(VOCABULARY, 2, scale=1.5, generator=generator)
    model = language_model(source, generator)
    chosen, rejected, changed = pairs(source, generator)
    change = [displaced(model, chosen[i : i + 1], rejected[i : i + 1]) for i in range(PAIRS)]
    with torch.no_grad():
        # Column t holds the state that predicts token t: those of the response, from the last prompt token's on.
        states = [model.states(rows)[:, PROMPT:] for rows in (chosen, rejected)]
        # One more column holds the state after the last token.
        last = [model.states(torch.nn.functional.pad(rows, (0, 1)))[:, -1:] for rows in (chosen, rejected)]
    every = torch.ones(PAIRS, RESPONSE, dtype=torch.bool)
    scores = {
        "ches": ches_score(states[0], every, states[1], every).tolist(),
        "last state similarity": last_state_similarity(last[0], every[:, :1], last[1], every[:, :1]).tolist(),
        "edit similarity": edit_similarity(chosen[:, PROMPT:].tolist(), rejected[:, PROMPT:].tolist()).tolist(),
    }
    values = {f"rho {name}": float(spearmanr(score, change).statistic) for name, score in scores.items()}
    kinds = [[i for i in range(PAIRS) if changed[i] == count] for count in MUTATIONS]
    within = [spearmanr([scores["ches"][i] for i in k], [change[i] for i in k]).statistic for k in kinds]
    values["rho ches within kinds"] = float(sum(within) / len(within))
    values["share displaced"] = sum(c < 0 for c in change) / PAIRS
    values["mean change"] = sum(change) / PAIRS
    return values, {"ches": scores["ches"], "change": change}


def measure(seed: int) -> Measured:
    hit, path = one_token(seed, orthogonal=False)
    control, control_path = one_token(seed, orthogonal=True)
    ranked, curves = ranking(torch.Generator().manual_seed(seed))
    curves |= {name: [p[i] for p in path] for i, name in enumerate(("No", "Never", "Yes"))}
    curves["control No"] = [p[0] for p in control_path]
    return Measured(hit | control | ranked, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(("No", "Never", "Yes", "control No")):
        for first, measured in enumerate(report.measured):
            style = ":" if name.startswith("control") else "-"
            left.plot(measured.curves[name], style, color=f"C{number}", alpha=0.7, label=None if first else name)
    left.set(title="DPO: No over Never", xlabel="step", ylabel="probability")
    left.legend(fontsize=7)
    for number, measured in enumerate(report.measured):
        label = f"seed {report.seeds[number]}"
        right.plot(measured.curves["ches"], measured.curves["change"], ".", alpha=0.6, label=label)
    right.axhline(0, color="black", lw=0.6)
    right.set(title="80 pairs per seed", xlabel="CHES before training", ylabel="change of log p(chosen), nats")
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"CHES correlates with the change at {report.range('rho ches', '.2f')}, minus the edit distance at "
        f"{report.range('rho edit similarity', '.2f')}, similarity of the last states at "
        f"{report.range('rho last state similarity', '.2f')}: no superiority of CHES over the edit distance is claimed "
        f"from this. Within pairs of one kind CHES stands at {report.range('rho ches within kinds', '.2f')}.",
        f"On this language model {report.range('share displaced', '.0%')} of the pairs lose likelihood of the chosen "
        "answer in absolute terms: the ranking is of how little most gain.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
