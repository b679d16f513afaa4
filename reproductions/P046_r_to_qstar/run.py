"""P046: credit per token from outcome-only pairs, and likelihood search as search by value (2404.12358)."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn
from worlds.arithmetic import PROMPT, Chain, train
from worlds.enumerable import GRULM, Language

from loglik.decoding.beam import beam_search
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.preference import dpo
from loglik.signals.reasoning import token_credit
from loglik.stats.mdp import SoftSolution, all_sequences, path_sums, policy_values, soft_value_iteration

# (a) credit
TASK = Chain()
BETA, LR, STEPS, BATCH, PAIRS, TEST = 0.05, 1e-3, 400, 256, 4000, 16_000
REFERENCES = {"": {}, "fitted ": {"steps": 1500, "lr": 1e-2}}
PROMPT_WIDTHS = (1, 2, 5, 10)
# (b) search
MDPS, SYMBOLS, HORIZON, MDP_BETA = 200, 4, 5, 0.5
BIGRAM, NOISE = 0.45, 0.225  # sampling from the exact policy then has a mean reward of 2, as in the sheet's pilot
WIDTHS = (1, 2, 3, 5)
LEARNED, LABELLED, MDP_STEPS, MDP_LR = 50, 200, 200, 0.05
MORE_WIDTHS = (1, 2, 3, 5, 20)
ROWS = Language(SYMBOLS, HORIZON).sequences
BEGIN = TokenBatch.from_lists([[0]])  # something to continue; the solutions do not read it

CLAIM = Claim(
    paper="P046",
    text=(
        "A DPO policy is a soft Q-function: beta log(policy / reference) of a token, learned from outcome-only pairs, "
        "points at the wrong step, and beam search by the optimal policy's likelihood finds the optimum of reward plus "
        "beta times reference log-probability."
    ),
    setup=(
        "(a) Ten symbols, prompt (start, step k), four transitions, each right (+k) or wrong (+k+3) with probability "
        ".5 in the data; reference GRU of width 48, 400 Adam steps; 4000 pairs of reference samples of one prompt of "
        "which exactly one is right throughout; DPO with beta .05, Adam, learning rate 1e-3, 400 steps of 256. "
        "Localisation: in reference samples with one wrong transition, the least credit is its (chance .25). Beside "
        "the claim, the same from a reference trained longer (1500 steps, 1e-2). (b) 200 decision processes of 4 "
        "symbols and 5 steps: Dirichlet(1) reference, reward a N(0, .45^2) bigram table plus N(0, .225^2) per prefix "
        "and token, beta .5; exact policy by soft value iteration, beam search by its likelihood. Beside the claim, "
        "tabular DPO policies of 50 processes from 200 Bradley-Terry pairs each (200 Adam steps, .05)."
    ),
    checks=(
        Check(
            "credit points at the wrong step",
            "least credit localises at least 0.7, and at least twice as often as the least reference log-probability, "
            "in every seed",
            lambda m: (
                m["credit: localisation"] >= 0.7 and m["credit: localisation"] >= 2 * m["reference: localisation"]
            ),
            ("credit: localisation", "reference: localisation"),
        ),
        Check(
            "wider beams find the optimum more often",
            "share of processes in which the optimum is found does not fall from width to width (1, 2, 3, 5), in every "
            "seed",
            lambda m: all(m[f"found, width {a}"] <= m[f"found, width {b}"] for a, b in pairwise(WIDTHS)),
            tuple(f"found, width {width}" for width in WIDTHS),
        ),
        Check(
            "width 5 finds it",
            "in at least 95 % of the processes, in every seed",
            lambda m: m["found, width 5"] >= 0.95,
            ("found, width 5",),
        ),
        Check(
            "credit with a better fitted reference",
            "reference of 1500 steps: least credit localises at least 0.7, and at least twice as often as the least "
            "reference log-probability, in every seed",
            lambda m: m["fitted credit: localisation"] >= max(0.7, 2 * m["fitted reference: localisation"]),
            ("fitted credit: localisation", "fitted reference: localisation"),
            main=False,
        ),
        Check(
            "wide beams exploit an approximate policy",
            "tabular DPO policies: mean reward at width 20 below the best of widths 1 to 5, in every seed",
            lambda m: m["DPO reward, width 20"] < max(m[f"DPO reward, width {width}"] for width in WIDTHS),
            tuple(f"DPO reward, width {width}" for width in MORE_WIDTHS),
            main=False,
        ),
    ),
    seeds=3,
)


# ---------------------------------------------------------------------- (a)
def pairs_of(reference: GRULM, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows (4000, 6): samples of one prompt of which exactly one is right."""
    good, bad = [], []
    while sum(map(len, good)) < PAIRS:
        prompts = TASK.prompts(20_000, generator=generator)
        first, second = (TASK.sample(reference, prompts, generator=generator) for _ in range(2))
        wins = TASK.solved(first)
        differ = wins != TASK.solved(second)
        good.append(torch.where(wins[:, None], first, second)[differ])
        bad.append(torch.where(wins[:, None], second, first)[differ])
    return torch.cat(good)[:PAIRS], torch.cat(bad)[:PAIRS]


def prefer(reference: GRULM, good: Tensor, bad: Tensor, generator: torch.Generator) -> GRULM:
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    frozen = [reference.log_prob(side, start=PROMPT) for side in (good, bad)]
    for _ in range(STEPS):
        take = torch.randint(PAIRS, (BATCH,), generator=generator)
        sides = [policy.log_prob(side[take], start=PROMPT) for side in (good, bad)]
        loss = dpo(*sides, *(scores[take] for scores in frozen), beta=BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.requires_grad_(False)


def localisation(numbers: Tensor, wrong: Tensor) -> float:
    """How often the least of a row's numbers (N, 4) stands in the column `wrong` (N,)."""
    return (numbers.argmin(1) == wrong).double().mean().item()


def first_low(numbers: Tensor, wrong: Tensor) -> float:
    """How often the first number below half of the row's least stands there."""
    low = numbers <= 0.5 * numbers.amin(1, keepdim=True)
    return (low.int().argmax(1) == wrong).double().mean().item()


def credit(generator: torch.Generator) -> dict[str, float]:
    values = {}
    every = torch.cartesian_prod(torch.arange(TASK.symbols), torch.arange(TASK.symbols + 1, TASK.vocabulary))
    for prefix, options in REFERENCES.items():
        reference = train(TASK, generator=generator, **options)
        policy = prefer(reference, *pairs_of(reference, generator), generator)
        rows = TASK.sample(reference, TASK.prompts(TEST, generator=generator), generator=generator)
        right = TASK.right(rows)
        one = right.sum(1) == TASK.transitions - 1
        rows, wrong = rows[one], (~right[one]).int().argmax(1)
        frozen = reference.log_prob(rows, start=PROMPT)
        credits = token_credit(policy.log_prob(rows, start=PROMPT), frozen, beta=BETA).per_unit[:, PROMPT:]
        values |= {
            f"{prefix}reference: localisation": localisation(frozen.per_unit[:, PROMPT:], wrong),
            f"{prefix}credit: localisation": localisation(credits, wrong),
            f"{prefix}credit: first low": first_low(credits, wrong),
        }
        values[f"{prefix}mean credit first, before the wrong one"] = credits[wrong > 0, 0].mean().item()
        values[f"{prefix}mean credit last, after the wrong one"] = (
            credits[wrong < credits.shape[1] - 1, -1].mean().item()
        )
        values[f"{prefix}mean credit of the wrong one"] = credits.gather(1, wrong[:, None]).mean().item()
        for width in PROMPT_WIDTHS:
            beams = beam_search(
                policy, TokenBatch.from_lists(every.tolist()), width=width, max_tokens=TASK.transitions, eos_id=-1
            )
            best = torch.cat([every, torch.tensor(beams.best())], 1)
            values[f"{prefix}solved by beam of {width}"] = TASK.solved(best).double().mean().item()
    return values


# ---------------------------------------------------------------------- (b)
class Policies(nn.Module):
    """One tabular policy per process, with tables (processes, V^t, V)."""

    def __init__(self, conditionals: list[Tensor]) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(table.clone()) for table in conditionals)

    def log_prob(self, process: Tensor, sequence: Tensor) -> LogLikelihood:
        """Of rows of `ROWS` (N,) in processes (N,)."""
        ids, terms = ROWS[sequence], []
        prefix = torch.zeros_like(sequence)
        for t, table in enumerate(self.tables):
            terms.append(table[process, prefix].log_softmax(-1).gather(1, ids[:, t, None]))
            prefix = prefix * SYMBOLS + ids[:, t]
        return LogLikelihood.from_per_unit(torch.cat(terms, 1), torch.ones_like(ids).bool())


def process(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Reference log-probabilities and rewards, a tensor (V^t, V) per step each."""
    bigram = BIGRAM * torch.randn(
        SYMBOLS + 1, SYMBOLS, generator=generator
    )  # the last row stands before the first symbol
    reference, rewards = [], []
    for t in range(HORIZON):
        shape = (SYMBOLS**t, SYMBOLS)
        reference.append(torch.empty(shape).exponential_(generator=generator).log().log_softmax(-1))
        last = torch.arange(shape[0]) % SYMBOLS if t else torch.tensor([SYMBOLS])
        rewards.append(bigram[last] + NOISE * torch.randn(shape, generator=generator))
    return reference, rewards


def approximate(references: list[list[Tensor]], returns: Tensor, generator: torch.Generator) -> Policies:
    """DPO policies of all processes; preferences are Bradley-Terry draws on returns (processes, V^T)."""
    tables = [torch.stack(steps) for steps in zip(*references, strict=True)]
    policies, frozen = Policies(tables), Policies(tables).requires_grad_(False)
    owner = torch.arange(LEARNED).repeat_interleave(len(ROWS))
    chances = frozen.log_prob(owner, torch.arange(len(ROWS)).repeat(LEARNED)).value.reshape(LEARNED, -1).exp()
    drawn = torch.multinomial(chances, 2 * LABELLED, replacement=True, generator=generator)
    first, second = (side.flatten() for side in drawn.chunk(2, 1))
    owner = torch.arange(LEARNED).repeat_interleave(LABELLED)
    odds = torch.sigmoid(returns[owner, first] - returns[owner, second])
    wins = torch.rand(len(owner), generator=generator) < odds
    sides = [torch.where(w, first, second) for w in (wins, ~wins)]
    fixed = [frozen.log_prob(owner, side) for side in sides]
    optimizer = torch.optim.Adam(policies.parameters(), lr=MDP_LR)
    for _ in range(MDP_STEPS):
        now = [policies.log_prob(owner, side) for side in sides]
        loss = LEARNED * dpo(*now, *fixed, beta=MDP_BETA).mean()  # each process has its mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policies.requires_grad_(False)


def found_by(solution: SoftSolution, width: int) -> list[int]:
    return beam_search(solution, BEGIN, width=width, max_tokens=HORIZON, eos_id=-1).best()[0]


def search(generator: torch.Generator) -> dict[str, float]:
    sequences = all_sequences(SYMBOLS, HORIZON)
    processes = [process(generator) for _ in range(MDPS)]
    returns = torch.stack([path_sums(rewards, sequences) for _, rewards in processes])
    policies = approximate([reference for reference, _ in processes[:LEARNED]], returns.float(), generator)
    place = {sequence: row for row, sequence in enumerate(sequences)}
    collected: dict[str, list[float]] = {}

    def take(name: str, value: float) -> None:
        collected.setdefault(name, []).append(value)

    for number, (reference, rewards) in enumerate(processes):
        solution = soft_value_iteration(reference, rewards, beta=MDP_BETA)
        guided = returns[number] + MDP_BETA * path_sums(reference, sequences)
        value = path_sums(solution.log_policy, sequences) * MDP_BETA + solution.values[0]
        take("identity error", (guided - value).abs().max().item())
        best = int(guided.argmax())
        take("reward of the optimum", returns[number, best].item())
        take("sampling", policy_values(solution.log_policy, rewards)[0].item())
        for width in WIDTHS:
            row = place[tuple(found_by(solution, width))]
            take(f"found, width {width}", float(row == best))
            take(f"reward, width {width}", returns[number, row].item())
        if number >= LEARNED:
            continue
        take("reward of the optimum, first 50", returns[number, best].item())
        tables = tuple(table[number].log_softmax(-1).double() for table in policies.tables)
        learned = replace(solution, log_policy=tables)
        take("DPO sampling", policy_values(tables, rewards)[0].item())
        for width in MORE_WIDTHS:
            row = place[tuple(found_by(learned, width))]
            take(f"DPO reward, width {width}", returns[number, row].item())
            take(f"DPO guided, width {width}", guided[row].item())
    return {
        name: max(numbers) if name == "identity error" else sum(numbers) / len(numbers)
        for name, numbers in collected.items()
    }


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    return Measured(credit(generator) | search(generator))


def plot(figure: Figure, report: Report) -> None:
    left, middle, right = figure.subplots(1, 3)
    bars = [prefix + name for prefix in REFERENCES for name in ("reference: localisation", "credit: localisation")]
    for number, name in enumerate(bars):
        left.bar(number, report.mean(name), color=f"C{number % 2}", alpha=0.6)
        left.plot([number] * len(report.seeds), report.per_seed(name), "k.", ms=5)
    left.axhline(0.25, color="black", ls=":", lw=0.8)
    left.axhline(0.7, color="black", ls="--", lw=0.8)
    ticks = [name.replace(": localisation", "").replace(" ", "\n") for name in bars]
    left.set_xticks(range(len(bars)), ticks, fontsize=7)
    left.set(ylim=(0, 1), title="(a) wrong step found", ylabel="share (dotted: chance, dashed: claim)")
    for axes, names, title in (
        (middle, {"found, width {}": WIDTHS}, "(b) optimum found, exact policy"),
        (right, {"reward, width {}": WIDTHS, "DPO reward, width {}": MORE_WIDTHS}, "(b) mean reward of the best beam"),
    ):
        for number, (name, widths) in enumerate(names.items()):
            for first in range(len(report.seeds)):
                curve = [report.per_seed(name.format(width))[first] for width in widths]
                label = None if first else "DPO policy" if name.startswith("DPO") else "exact policy"
                axes.plot(widths, curve, color=f"C{number}", marker=".", lw=1, label=label)
        axes.set_xscale("log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("beam width")
    left.title.set_fontsize(9)
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    def rewards(name: str, widths: tuple[int, ...]) -> str:
        return ", ".join(f"{report.mean(name.format(width)):.2f}" for width in widths)

    return [
        "The credit of (a) falls at the wrong transition and stays low after it: on average "
        f"{report.mean('mean credit first, before the wrong one'):.2f} at the first transition where the wrong one is "
        f"later, {report.mean('mean credit of the wrong one'):.2f} at the wrong one, "
        f"{report.mean('mean credit last, after the wrong one'):.2f} at the last where it was earlier, so that the "
        "least is often a right transition after the wrong one. The first credit below half of the least is the wrong "
        f"transition's in {report.range('credit: first low', '.2f')} (a rule found after the first run of P016; no "
        "check).",
        "With the better fitted reference: least credit "
        f"{report.range('fitted credit: localisation', '.2f')} (its own log-probability "
        f"{report.range('fitted reference: localisation', '.2f')}), first low credit "
        f"{report.range('fitted credit: first low', '.2f')}; the three means are "
        f"{report.mean('fitted mean credit first, before the wrong one'):.2f}, "
        f"{report.mean('fitted mean credit of the wrong one'):.2f} and "
        f"{report.mean('fitted mean credit last, after the wrong one'):.2f}.",
        f"(b) Mean reward of the exact policy: sampling {report.mean('sampling'):.2f}; beams of 1, 2, 3, 5 "
        f"{rewards('reward, width {}', WIDTHS)}; optimum {report.mean('reward of the optimum'):.2f}. The search "
        f"identity holds within {max(report.per_seed('identity error')):.1g} on all sequences.",
        f"(b) Mean reward of the DPO policies: sampling {report.mean('DPO sampling'):.2f}; beams of 1, 2, 3, 5, 20 "
        f"{rewards('DPO reward, width {}', MORE_WIDTHS)} (optimum of these processes "
        f"{report.mean('reward of the optimum, first 50'):.2f}); reward plus beta log reference of the same "
        f"{rewards('DPO guided, width {}', MORE_WIDTHS)}.",
        "(a) Share of the 90 prompts that beams of 1, 2, 5, 10 of the DPO policy solve: "
        f"{rewards('solved by beam of {}', PROMPT_WIDTHS)}; with the better fitted reference "
        f"{rewards('fitted solved by beam of {}', PROMPT_WIDTHS)} The credit ranks answers, "
        "but as a generator the policy is useless: DPO has moved probability off the data's support, so no beam helps.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
