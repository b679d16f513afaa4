"""P100: rounds that commit confident tokens reveal few nats; a few uncertain tokens each save most (2511.21103)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.hidden_chunks import HiddenChunks

from loglik.decoding.parallel import (
    DynamicThreshold,
    ExploreThenExploit,
    ParallelPolicy,
    Round,
    parallel_decode,
    rounds_lower_bound,
)
from loglik.models.diffusion import infilling

SAMPLES, FACTOR, EXPLORE, CHUNKS = 400, 0.9, 4, 8
LEVELS = (0, 1, 2, 4, 8)  # E in the dependent world
FACTORS, GIVEN, HINTED = (0.1, 0.3, 0.6, 0.9), 2, 100
COMMITS = {"likeliest": "argmax", "drawn": "sample"}
DECODERS: dict[str, ParallelPolicy] = {
    "block-wise": DynamicThreshold(FACTOR),
    "cross-block": DynamicThreshold(FACTOR, window=CHUNKS),
    "ETE": ExploreThenExploit(FACTOR, EXPLORE),
}
BASELINES = ("block-wise", "cross-block")

CLAIM = Claim(
    paper="P100",
    text=(
        "Rounds that commit confident tokens alone reveal a bounded number of nats each, so that their number grows "
        "with -log p(x); committing a few uncertain tokens in other blocks besides needs at most half the rounds at "
        "equal quality."
    ),
    setup=(
        "Oracle masked model: 8 chunks of 8 tokens out of 8 symbols; a chunk's value is uniform, its token 0 is the "
        "value c, token j is (c + j) mod 8 with probability .98 and else one of the other seven; marginals by Bayes. "
        "Confidence rule with factor .9, in one block (= chunk) or across all, against ETE (4 uncertain tokens by "
        "entropy); 400 texts each, confident tokens at their likeliest value or drawn. Budgets are measured in every "
        "round whose committed values satisfy the rule, in both worlds; the bound on rounds in 100 texts of which 2 "
        "random tokens per chunk are given, factors .1 to .9, those that never leave the rule. Beside: values that "
        "follow each other (c + 1 with probability .9), ETE with 0 to 8 uncertain tokens; and token 7 as the one "
        "that is the value."
    ),
    checks=(
        Check(
            "half the rounds",
            "likeliest values: mean rounds of ETE <= 0.5 x those of either confidence rule, in every seed",
            lambda m: m["ETE, likeliest: rounds"] <= 0.5 * min(m[f"{b}, likeliest: rounds"] for b in BASELINES),
            tuple(f"{name}, likeliest: rounds" for name in DECODERS),
        ),
        Check(
            "equal quality",
            "likeliest values: mean -log p(x) of ETE within 2 standard errors (of the difference; and 1e-9) of either "
            "confidence rule, in every seed",
            lambda m: all(_equal(m, b, "likeliest") for b in BASELINES),
            tuple(f"ETE less {b}, likeliest: {what}" for b in BASELINES for what in ("nll", "stderr")),
        ),
        Check(
            "equal quality of draws",
            "drawn values: rounds of ETE <= 0.5 x those of either confidence rule and mean -log p(x) within 2 standard "
            "errors of either, in 4 of 5 seeds",
            lambda m: (
                m["ETE, drawn: rounds"] <= 0.5 * min(m[f"{b}, drawn: rounds"] for b in BASELINES)
                and all(_equal(m, b, "drawn") for b in BASELINES)
            ),
            (
                *(f"{name}, drawn: rounds" for name in DECODERS),
                *(f"ETE less {b}, drawn: {what}" for b in BASELINES for what in ("nll", "stderr")),
            ),
            share=(4, 5),
        ),
        Check(
            "no round exceeds its budget",
            "largest excess over the budgets of a round, joint and factorised, <= 1e-9 nats over all rounds that "
            "satisfy the rule, and with likeliest values no round of the rule fails to, in every seed",
            lambda m: (
                max(m["joint budget: largest excess"], m["factorised budget: largest excess"]) <= 1e-9
                and m["rounds of the rule outside it, likeliest"] == 0
            ),
            (
                "joint budget: largest excess",
                "factorised budget: largest excess",
                "rounds of the rule outside it, likeliest",
            ),
        ),
        Check(
            "no run beats the bound",
            "runs that never left the rule: rounds >= the bound (less 1e-9), at every factor, in every seed",
            lambda m: all(m[f"f = {f}: least slack"] >= -1e-9 for f in FACTORS),
            tuple(f"f = {f}: least slack" for f in FACTORS),
        ),
        *(
            Check(
                f"exploring dependent chunks costs quality, {commit}",
                f"dependent values, {commit}: every E >= 1 with fewer rounds than E = 0 has a higher mean -log p(x), "
                "by more than 2 standard errors, in every seed",
                lambda m, commit=commit: all(
                    m[f"dependent E={e}, {commit}: loss"] > 2 * m[f"dependent E={e}, {commit}: stderr"]
                    for e in LEVELS[1:]
                    if m[f"dependent E={e}, {commit}: rounds"] < m[f"dependent E=0, {commit}: rounds"]
                ),
                tuple(f"dependent E={e}, {commit}: {what}" for e in LEVELS for what in ("rounds", "loss", "stderr")),
                main=False,
            )
            for commit in COMMITS
        ),
        Check(
            "also where the first token is not the value",
            "value in token 7, likeliest and drawn: rounds of ETE <= 0.5 x those of the confidence rule across blocks, "
            "in every seed",
            lambda m: all(
                m[f"value last, ETE, {c}: rounds"] <= 0.5 * m[f"value last, cross-block, {c}: rounds"] for c in COMMITS
            ),
            tuple(f"value last, {name}, {c}: rounds" for name in ("cross-block", "ETE") for c in COMMITS),
            main=False,
        ),
    ),
    seeds=5,
)


def _equal(m: Mapping[str, float], baseline: str, commit: str) -> bool:
    name = f"ETE less {baseline}, {commit}"
    return abs(m[f"{name}: nll"]) <= 2 * m[f"{name}: stderr"] + 1e-9


@dataclass
class Watched:
    """The oracle, and which tokens were hidden whenever it was asked."""

    world: HiddenChunks
    seen: list[Tensor] = field(default_factory=list)

    @property
    def mask_token_id(self) -> int:
        """That of the oracle."""
        return self.world.mask_token_id

    def masked_log_probs(self, ids: Tensor, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """The oracle's answer."""
        self.seen.append(hidden)
        return self.world.masked_log_probs(ids, hidden, real)


@dataclass(frozen=True)
class Decoded:
    """N texts with their rounds.

    Attributes:
        texts: (N, T).
        rounds: of each.
        joint: (R, N) -log-probability of what each round committed given what was visible, nats; 0 after a text's last.
        nats: (N,) the same as if the tokens of a round were independent, summed over rounds.
    """

    texts: Tensor
    rounds: tuple[tuple[Round, ...], ...]
    joint: Tensor
    nats: Tensor

    @property
    def nll(self) -> Tensor:
        """(N,) -log-probability of what was generated, nats."""
        return self.joint.sum(0)

    @property
    def error(self) -> Tensor:
        """(N,) approximation error, nats."""
        return self.nll - self.nats

    @property
    def counts(self) -> Tensor:
        """(N,) rounds."""
        return torch.tensor([len(row) for row in self.rounds], dtype=torch.float64)


def decode(
    world: HiddenChunks, policy: ParallelPolicy, texts: Tensor, hidden: Tensor, *, commit: str, seed: int
) -> Decoded:
    """Fill in the hidden tokens (N, T), as many in each chunk, blocks being chunks."""
    watched = Watched(world)
    rows = texts.masked_fill(hidden, world.mask_token_id).tolist()
    per_chunk = int(hidden[0, : world.size].sum())
    done = parallel_decode(
        watched, infilling(world, rows), policy, block_length=per_chunk, commit=COMMITS[commit], seed=seed
    )
    # The oracle is asked about the texts that are not finished, in their order.
    before = torch.zeros(len(watched.seen) + 1, *hidden.shape, dtype=torch.bool)
    for step, seen in enumerate(watched.seen):
        before[step, done.evaluations > step] = seen
    known = torch.stack([world.log_prob(done.tokens.ids, at) for at in before])
    return Decoded(done.tokens.ids, done.rounds, -known.diff(dim=0), done.nats)


def fresh(world: HiddenChunks, policy: ParallelPolicy, *, commit: str, seed: int) -> Decoded:
    """Texts from nothing."""
    blank = torch.zeros(SAMPLES, world.length, dtype=torch.long)
    return decode(world, policy, blank, torch.ones_like(blank, dtype=torch.bool), commit=commit, seed=seed)


def difference(first: Decoded, second: Decoded) -> tuple[float, float]:
    """Mean difference of -log p(x) and its standard error, text by text, nats."""
    gaps = first.nll - second.nll
    return gaps.mean().item(), gaps.std().item() / math.sqrt(len(gaps))


def budgets(runs: Iterable[Decoded]) -> dict[str, float]:
    """How much of its two budgets a round that satisfies the rule spends, in nats and as a share."""
    spent: dict[str, list[tuple[float, float]]] = {"joint": [], "factorised": []}
    for run in runs:
        for rounds, joint in zip(run.rounds, run.joint.T.tolist(), strict=True):
            for r, together in zip(rounds, joint, strict=False):  # the longest text has the most
                if r.within(FACTOR):
                    k = r.committed
                    spent["joint"].append((together, math.log((k + 1) / ((1 - FACTOR) * k + 1))))
                    spent["factorised"].append((r.nats, k * math.log((k + 1) / (k + 1 - FACTOR))))
    values = {"rounds within the rule": float(len(spent["joint"]))}
    for name, pairs in spent.items():
        values[f"{name} budget: largest excess"] = max(nats - budget for nats, budget in pairs)
        values[f"{name} budget: share spent"] = statistics.fmean(nats / budget for nats, budget in pairs)
        values[f"{name} budget: largest share"] = max(nats / budget for nats, budget in pairs)
    return values


def of_the_rule(runs: Sequence[Decoded]) -> list[Round]:
    """Rounds that the rule decided: neither exploration nor the most confident token for want of any other."""
    return [r for run in runs for rounds in run.rounds for r in rounds if not (r.fallback or r.explored)]


def bound(world: HiddenChunks, seed: int, generator: torch.Generator) -> dict[str, float]:
    """Rounds against their bound, where two tokens of each chunk are given: texts that never leave the rule."""
    texts = world.sample(HINTED, generator=generator)
    ranks = torch.rand(HINTED, world.chunks, world.size, generator=generator).argsort(2).argsort(2)
    hidden = (ranks >= GIVEN).view(HINTED, world.length)
    values = {}
    for f in FACTORS:
        run = decode(world, DynamicThreshold(f, window=CHUNKS), texts, hidden, commit="likeliest", seed=seed)
        found = [
            (len(rounds), rounds_lower_bound(max(nll, 0.0), int(hidden[0].sum()), f, error))
            for rounds, nll, error in zip(run.rounds, run.nll.tolist(), run.error.tolist(), strict=True)
            if all(r.within(f) for r in rounds)
        ]
        values |= {
            f"f = {f}: rounds": statistics.fmean(n for n, _ in found),
            f"f = {f}: bound": statistics.fmean(least for _, least in found),
            f"f = {f}: least slack": min(n - least for n, least in found),
            f"f = {f}: share at the bound": statistics.fmean(n == math.ceil(least - 1e-9) for n, least in found),
            f"f = {f}: runs": float(len(found)),
        }
    return values


def summary(name: str, run: Decoded, world: HiddenChunks) -> dict[str, float]:
    return {
        f"{name}: rounds": run.counts.mean().item(),
        f"{name}: nll per token": run.nll.mean().item() / world.length,
        f"{name}: error": run.error.mean().item(),
        f"{name}: different texts": float(len(run.texts.unique(dim=0))),
    }


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    independent, dependent = HiddenChunks(), HiddenChunks(follow=0.9)
    last = HiddenChunks(carrier=independent.size - 1)
    values: dict[str, float] = {
        "independent: entropy per token": independent.entropy / independent.length,
        "dependent: entropy per token": dependent.entropy / dependent.length,
    }
    runs: dict[str, list[Decoded]] = {commit: [] for commit in COMMITS}
    for commit, own in runs.items():
        found = {name: fresh(independent, policy, commit=commit, seed=seed) for name, policy in DECODERS.items()}
        for name, run in found.items():
            values |= summary(f"{name}, {commit}", run, independent)
        for name in BASELINES:
            gap, stderr = difference(found["ETE"], found[name])
            values |= {f"ETE less {name}, {commit}: nll": gap, f"ETE less {name}, {commit}: stderr": stderr}
        own.extend(found.values())
        explored = {e: fresh(dependent, ExploreThenExploit(FACTOR, e), commit=commit, seed=seed) for e in LEVELS}
        for e, run in explored.items():
            gap, stderr = difference(run, explored[0])
            name = f"dependent E={e}, {commit}"
            values |= summary(name, run, dependent) | {f"{name}: loss": gap, f"{name}: stderr": stderr}
        own.extend(explored.values())
        for name in ("cross-block", "ETE"):
            own.append(fresh(last, DECODERS[name], commit=commit, seed=seed))
            values |= summary(f"value last, {name}, {commit}", own[-1], last)
        rounds = of_the_rule(own)
        values[f"rounds of the rule outside it, {commit}"] = float(sum(not r.within(FACTOR) for r in rounds))
        values[f"rounds of the rule, {commit}"] = float(len(rounds))
    values |= budgets(run for own in runs.values() for run in own)
    # What the bound would say of the whole run, were its first tokens of chunks within the rule.
    whole = runs["likeliest"][0]
    values["block-wise, likeliest: bound without leaving the rule"] = rounds_lower_bound(
        whole.nll.mean().item(), independent.length, FACTOR, whole.error.mean().item()
    )
    values["block-wise, likeliest: rounds outside the rule"] = statistics.fmean(
        sum(not r.within(FACTOR) for r in rounds) for rounds in whole.rounds
    )
    return Measured(values | bound(independent, seed, generator))


def plot(figure: Figure, report: Report) -> None:
    left, middle, right = figure.subplots(1, 3)
    for colour, name in enumerate(DECODERS):
        for commit, marker in zip(COMMITS, "ox", strict=True):
            left.plot(
                report.per_seed(f"{name}, {commit}: rounds"),
                report.per_seed(f"{name}, {commit}: nll per token"),
                marker,
                ms=5 if colour else 9,  # both confidence rules are the same here
                color=f"C{colour}",
                label=f"{name}, {commit}",
            )
    left.axhline(report.mean("independent: entropy per token"), color="black", ls=":", lw=0.8)
    left.set(title="independent chunks", xlabel="rounds", ylabel="-log p(x) per token, nats", xlim=(0, None))
    left.legend(fontsize=6)
    for colour, commit in enumerate(COMMITS):
        rounds, nll = (
            [report.mean(f"dependent E={e}, {commit}: {what}") for e in LEVELS] for what in ("rounds", "nll per token")
        )
        middle.plot(rounds, nll, "o-", color=f"C{colour}", label=commit)
        for e, x, y in zip(LEVELS, rounds, nll, strict=True):
            middle.annotate(f"E={e}", (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    middle.axhline(report.mean("dependent: entropy per token"), color="black", ls=":", lw=0.8, label="entropy")
    middle.set(title="dependent chunks", xlabel="rounds")
    middle.legend(fontsize=6)
    for name, style in (("rounds", "o-"), ("bound", "k:")):
        right.loglog(FACTORS, [report.mean(f"f = {f}: {name}") for f in FACTORS], style, label=name)
    right.set(title="2 tokens a chunk given", xlabel="factor f", ylabel="rounds")
    right.legend(fontsize=6)


def notes(report: Report) -> list[str]:
    def rounds(name: str) -> str:
        return report.range(f"{name}: rounds")

    tight = ", ".join(
        f"{report.mean(f'f = {f}: bound'):.1f} of {report.mean(f'f = {f}: rounds'):.1f} at f = {f}" for f in FACTORS
    )
    curve = {
        commit: ", ".join(
            f"E = {e}: {report.mean(f'dependent E={e}, {commit}: rounds'):.1f} rounds, "
            f"{report.mean(f'dependent E={e}, {commit}: nll per token'):.3f}"
            for e in LEVELS
        )
        for commit in COMMITS
    }
    return [
        f"The bound says nothing about a whole run from nothing: of {rounds('block-wise, likeliest')} rounds "
        f"{report.range('block-wise, likeliest: rounds outside the rule')} leave the rule (the first token of a chunk "
        "has confidence 1/8), and the run takes fewer than the "
        f"{report.range('block-wise, likeliest: bound without leaving the rule')} that the bound asks of one that "
        "never does. Of runs that never do, the bound asks for about half of what they take: " + tight + " (means).",
        f"A round within the rule spends {report.range('joint budget: share spent', '.2f')} of its joint budget on "
        f"average and {report.range('joint budget: largest share', '.2f')} at most, and "
        f"{report.range('factorised budget: share spent', '.2f')} (at most "
        f"{report.range('factorised budget: largest share', '.2f')}) of its factorised one.",
        "Likeliest values are no samples: the confidence rules write "
        f"{report.range('cross-block, likeliest: different texts')} different text in {SAMPLES}, ETE "
        f"{report.range('ETE, likeliest: different texts')}, because what is explored is drawn; all have the same "
        "-log p(x), below the entropy.",
        f"Drawn values break the rule's promise: {report.mean('rounds of the rule outside it, drawn'):.0f} of "
        f"{report.mean('rounds of the rule, drawn'):.0f} rounds (means) commit an unlikely value, and the "
        "budgets do not cover them.",
        "All tokens of a fresh chunk are equally uncertain, and the first one, which is the value itself, is explored. "
        f"With the value in the last token ETE needs {rounds('value last, ETE, likeliest')} rounds "
        f"(drawn {rounds('value last, ETE, drawn')}) against {rounds('value last, cross-block, likeliest')}, with an "
        f"approximation error of {report.range('value last, ETE, drawn: error')} nats a text (drawn; the confidence "
        f"rule's is {report.range('value last, cross-block, drawn: error')}).",
        "Dependent chunks, likeliest values, -log p(x) per token: " + curve["likeliest"] + ". At E = 1 the "
        f"approximation error is {report.range('dependent E=1, likeliest: error')} nats a text: what is lost there "
        "comes from drawing what is explored where the rule takes the mode, not from drawing it independently; at "
        f"E = 8 the error is {report.range('dependent E=8, likeliest: error')}.",
        "Dependent chunks, drawn values (entropy "
        f"{report.mean('dependent: entropy per token'):.3f}): {curve['drawn']}. Here the confidence rule is itself "
        f"approximate (error {report.range('dependent E=0, drawn: error')} nats a text): it commits several tokens of "
        "the next chunk, each at confidence .88, before that chunk's value is known, and they contradict each other. "
        "Exploring one token of a chunk settles its value first: fewer rounds and a higher likelihood at once, until "
        "too many dependent chunks are explored in one round.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
