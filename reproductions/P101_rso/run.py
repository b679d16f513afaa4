"""P101: rejection sampling towards the reward-tilted optimum, and whether its pairs train better (2309.06657)."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import GRULM, Language, Markov, total_variation
from worlds.preference import Pairs, PreferenceWorld, bigram_rewards

from loglik.decoding.rejection import rejection_sample
from loglik.objectives.preference import sigmoid_norm
from loglik.objectives.supervised import MaximumLikelihood

OUTCOMES, PROPOSALS, REPETITIONS, BETA = 12, 200_000, 4000, 0.5
SIZES = (8, 64)
BETAS = (0.0, 0.5, 5.0, math.inf)
LANGUAGE = Language(4, 6)
PAIRS, CANDIDATES, ACCEPTED, STEPS, LR, GAMMA = 256, 64, 8, 300, 3e-3, 0.1

CLAIM = Claim(
    paper="P101",
    text=(
        "Accepted samples follow the reward-tilted policy, with beta between plain sampling and best-of-N; a policy "
        "trained on pairs of such samples earns more than one trained on pairs from another policy."
    ),
    setup=(
        "Sampler: 12 outcomes, proposal from a flat Dirichlet, rewards N(0, 1), beta = 0.5; one pass over 200,000 "
        "proposals, and 4,000 repetitions of 1 out of N = 8 and 64. Training: GRU of width 16 on 4 symbols and length "
        "6 (4,096 sequences), as initialised or, beside the claim, fitted to a random Markov source (300 Adam steps); "
        "reward random over bigrams and skip-bigrams, standardised; 256 pairs labelled by Bradley-Terry, of two "
        "uniform sequences (direct), of two samples of the reference (sft), or of samples accepted 8 out of 64 with "
        "beta = 0.5 (rso); sigmoid-norm with gamma = 0.1, 300 full-batch Adam steps at 0.003. Expected rewards are "
        "exact."
    ),
    checks=(
        Check(
            "accepted samples follow the tilted policy",
            "one pass over 200,000 proposals: total variation < 0.01, in every seed",
            lambda m: m["pass: tv"] < 0.01,
            ("pass: tv",),
        ),
        Check(
            "the acceptance rate is the predicted one",
            "within 0.005 of sum pi_sft exp((r - r_max) / beta), in every seed",
            lambda m: abs(m["pass: acceptance rate"] - m["pass: predicted rate"]) < 0.005,
            ("pass: acceptance rate", "pass: predicted rate"),
        ),
        Check(
            "8 candidates are enough",
            "1 out of 8, 4,000 repetitions: total variation < 0.03, in every seed",
            lambda m: m["1 of 8: tv"] < 0.03,
            ("1 of 8: tv",),
        ),
        Check(
            "64 candidates are enough",
            "1 out of 64, 4,000 repetitions: total variation < 0.03, in every seed",
            lambda m: m["1 of 64: tv"] < 0.03,
            ("1 of 64: tv",),
        ),
        Check(
            "rso beats direct pairs",
            "exact expected reward of rso > direct, in 4 of 5 seeds",
            lambda m: m["reward, rso"] > m["reward, direct"],
            ("reward, rso", "reward, direct"),
            share=(4, 5),
        ),
        Check(
            "rso beats sft pairs",
            "exact expected reward of rso > sft, in 4 of 5 seeds (no win was demanded)",
            lambda m: m["reward, rso"] > m["reward, sft"],
            ("reward, rso", "reward, sft"),
            share=(4, 5),
            main=False,
        ),
        Check(
            "rso beats direct pairs, fitted reference",
            "exact expected reward of rso > direct where the reference was fitted to a source, in 4 of 5 seeds",
            lambda m: m["fitted reward, rso"] > m["fitted reward, direct"],
            ("fitted reward, rso", "fitted reward, direct"),
            share=(4, 5),
            main=False,
        ),
        Check(
            "beta leads from plain sampling to best-of-N",
            "1 of 8: mean reward falls from beta = 0 over 0.5 to infinity, in every seed",
            lambda m: m["1 of 8, beta 0.0: reward"] > m["1 of 8, beta 0.5: reward"] > m["1 of 8, beta inf: reward"],
            tuple(f"1 of 8, beta {beta}: reward" for beta in BETAS),
            main=False,
        ),
    ),
    seeds=5,
)


# ---------------------------------------------------------------------- the sampler
def frequencies(outcomes: Tensor) -> Tensor:
    """Log of the shares of the outcomes."""
    return (torch.bincount(outcomes, minlength=OUTCOMES) / len(outcomes)).log()


def one_of(size: int, world: PreferenceWorld, beta: float, generator: torch.Generator) -> Tensor:
    """(repetitions,) the outcome accepted first among `size` proposals."""
    drawn = torch.multinomial(world.reference.exp(), REPETITIONS * size, replacement=True, generator=generator)
    groups = drawn.reshape(REPETITIONS, size)
    kept = [rejection_sample(world.rewards[row], 1, beta=beta, generator=generator) for row in groups]
    return groups.gather(1, torch.stack(kept)).squeeze(1)


def first_pass(world: PreferenceWorld, generator: torch.Generator) -> dict[str, float]:
    """Distribution and rate of what one pass accepts."""
    drawn = torch.multinomial(world.reference.exp(), PROPOSALS, replacement=True, generator=generator)
    predicted = (world.reference + (world.rewards - world.rewards.max()) / BETA).logsumexp(0).exp().item()
    wanted = min(PROPOSALS, int(1.05 * predicted * PROPOSALS))
    kept = rejection_sample(world.rewards[drawn], wanted, beta=BETA, generator=generator)
    # A pass goes through the candidates in order: where the numbers fall, the second pass begins.
    falls = (kept.diff() < 0).nonzero().flatten()
    looked_at = PROPOSALS if len(falls) else int(kept[-1]) + 1
    kept = kept[: int(falls[0]) + 1] if len(falls) else kept
    return {
        "pass: tv": total_variation(frequencies(drawn[kept]), world.optimum(BETA)).item(),
        "pass: acceptance rate": len(kept) / looked_at,
        "pass: predicted rate": predicted,
    }


def sampler(generator: torch.Generator) -> dict[str, float]:
    reference = torch.empty(OUTCOMES).exponential_(generator=generator).log().log_softmax(0)
    world = PreferenceWorld(reference, torch.randn(OUTCOMES, generator=generator))
    values = first_pass(world, generator)
    for size in SIZES:
        kept = one_of(size, world, BETA, generator)
        values[f"1 of {size}: tv"] = total_variation(frequencies(kept), world.optimum(BETA)).item()
    for beta in BETAS:
        values[f"1 of 8, beta {beta}: reward"] = world.rewards[one_of(8, world, beta, generator)].mean().item()
    return values


# ---------------------------------------------------------------------- training on its pairs
def fit(model: GRULM, generator: torch.Generator) -> None:
    """Likelihood training on a random Markov source, so that the reference is far from uniform."""
    source = Markov(4, 1, scale=1.0, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        rows = source.sample(128, length=6, generator=generator)
        optimizer.zero_grad()
        MaximumLikelihood("sum")(model.log_prob(rows)).mean().backward()
        optimizer.step()


def rso_pairs(world: PreferenceWorld, generator: torch.Generator) -> Pairs:
    """Pairs of what is accepted, 8 of 64 at a time, paired at random; pairs of one sequence are drawn again."""
    kept = torch.zeros(0, 2, dtype=torch.long)
    while len(kept) < PAIRS:
        drawn = torch.multinomial(world.reference.exp(), CANDIDATES, replacement=True, generator=generator)
        accepted = drawn[rejection_sample(world.rewards[drawn], ACCEPTED, beta=BETA, generator=generator)]
        pairs = accepted[torch.randperm(ACCEPTED, generator=generator)].reshape(-1, 2)
        kept = torch.cat([kept, pairs[pairs[:, 0] != pairs[:, 1]]])
    return world.label(kept[:PAIRS, 0], kept[:PAIRS, 1], generator=generator)


def train(reference: GRULM, pairs: Pairs) -> GRULM:
    model = copy.deepcopy(reference).requires_grad_()
    sides = [LANGUAGE.sequences[rows] for rows in (pairs.chosen, pairs.rejected)]
    frozen = [reference.log_prob(side) for side in sides]
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sigmoid_norm(*(model.log_prob(side) for side in sides), *frozen, gamma=GAMMA).mean().backward()
        optimizer.step()
    return model


def training(generator: torch.Generator, *, fitted: bool) -> dict[str, float]:
    """Exact expected reward and KL from the reference, for each source of pairs."""
    reference = GRULM(4, 16)
    if fitted:
        fit(reference, generator)
    reference.requires_grad_(False)
    world = PreferenceWorld(LANGUAGE.log_probs(reference), bigram_rewards(LANGUAGE, generator=generator))
    uniform = torch.full((len(LANGUAGE),), -math.log(len(LANGUAGE)))
    sources = {
        "direct": world.pairs(PAIRS, sampler=uniform, generator=generator),
        "sft": world.pairs(PAIRS, generator=generator),
        "rso": rso_pairs(world, generator),
    }
    policies = {"reference": world.reference, "optimum": world.optimum(BETA)}
    policies |= {name: LANGUAGE.log_probs(train(reference, pairs)).detach() for name, pairs in sources.items()}
    prefix = "fitted " if fitted else ""
    rewards = {f"{prefix}reward, {name}": world.expected_reward(p).item() for name, p in policies.items()}
    return rewards | {f"{prefix}kl, {name}": world.divergence(policies[name]).item() for name in sources}


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    return Measured(sampler(generator) | training(generator, fitted=False) | training(generator, fitted=True))


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = [f"1 of 8, beta {beta}: reward" for beta in BETAS]
    arms = ["reference", "direct", "sft", "rso", "optimum"]
    for seed in range(len(report.seeds)):
        left.plot([str(b) for b in BETAS], [report.per_seed(name)[seed] for name in names], "o-", alpha=0.7)
        right.plot(arms, [report.per_seed(f"reward, {arm}")[seed] for arm in arms], "o-", alpha=0.7)
    left.set(title="1 accepted of 8", xlabel="beta", ylabel="mean reward")
    right.set(title="policies trained on 256 pairs", ylabel="exact expected reward")
    right.tick_params(axis="x", labelsize=7)


def notes(report: Report) -> list[str]:
    def against(prefix: str, other: str) -> str:
        rso, others = (report.per_seed(f"{prefix}reward, {name}") for name in ("rso", other))
        gaps = [a - b for a, b in zip(rso, others, strict=True)]
        return f"better in {sum(g > 0 for g in gaps)} of {len(gaps)} seeds ({min(gaps):+.2f} to {max(gaps):+.2f})"

    return [
        "With few candidates the accepted one is biased: the largest of 8 rewards is often not the largest of all, so "
        "what is accepted lies between the proposal and the tilted policy, the more so the rarer acceptance is (rates "
        f"{report.range('pass: predicted rate', '.2f')} here; the sheet's margin came from one pilot at 0.39). Total "
        f"variation {report.range('1 of 8: tv')} with N = 8 and {report.range('1 of 64: tv')} with N = 64, where "
        "4,000 draws alone give about 0.01 to 0.02.",
        f"Expected reward of rso against plain reference samples: {against('', 'sft')}. With a fitted reference, "
        f"against direct pairs {against('fitted ', 'direct')} and against its own samples {against('fitted ', 'sft')}.",
        "All trained policies overshoot: gamma = 0.1 on 256 pairs leads far beyond the optimum at beta = 0.5 (KL "
        f"{report.range('kl, rso', '.1f')} nats for rso). Labels are Bradley-Terry draws from the true reward; the "
        "paper's come from a learned ranker.",
        "An untrained reference as the main arm, and N = 8 and N = 64 as separate checks, were settled after "
        "development seeds 0 and 1; no threshold was changed. Further seeds, beside the verdict: rso above direct "
        "pairs in 9 of 15 (seeds 16 to 30); with 2,048 pairs in 6 of 8 (seeds 16 to 23) and in 2 of 5 (seeds 11 "
        "to 15).",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
