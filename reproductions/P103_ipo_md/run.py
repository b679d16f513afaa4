"""P103: online IPO and IPO-MD find the Nash equilibrium of the preference game, offline IPO does not (2403.08635)."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn
from worlds.enumerable import LanguageModel, total_variation

from loglik.decoding.mixture import geometric_mixture
from loglik.models.batch import TokenBatch
from loglik.objectives.preference import ipo

TAU, MIXTURE, PAIRS = 0.1, 0.125, 64
CONDORCET = torch.tensor(
    [[0.5, 0.55, 0.60], [0.45, 0.5, 0.98], [0.40, 0.02, 0.5]]
)  # A beats all, B beats ref's answers
ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
GAMES = {
    "condorcet": (CONDORCET, torch.tensor([0.2, 0.2, 0.6]), 0.02, 3000),
    "rps": (ROCK_PAPER_SCISSORS, torch.tensor([0.5, 0.3, 0.2]), 0.005, 6000),
}
# What each policy's pairs are drawn from, and the momentum of its optimiser.
RUNS = {
    "online": ("policy", 0.0),
    "ipo_md": ("mixture", 0.0),
    "offline": ("reference", 0.0),
    "online, momentum": ("policy", 0.9),
}

CLAIM = Claim(
    paper="P103",
    text=(
        "Online IPO and IPO-MD find the Nash equilibrium of the KL-regularised preference game; offline IPO on pairs "
        "from the reference does not."
    ),
    setup=(
        "Tabular softmax over three answers, tau = 0.1, 64 fresh pairs per step labelled by Bernoulli draws of "
        "P(y > y'), plain SGD. Condorcet game: reference (.2, .2, .6), P(A>B) = .55, P(A>C) = .60, P(B>C) = .98, "
        "learning rate 0.02, 3000 steps. Rock-paper-scissors: win probability .8, reference (.5, .3, .2), learning "
        "rate 0.005, 6000 steps. IPO-MD samples from the geometric mixture with coefficient 0.125. The equilibrium is "
        "computed exactly; distances are total variations of the last policy."
    ),
    checks=(
        Check(
            "online IPO finds the equilibrium",
            "condorcet: total variation to the equilibrium < 0.06, in every seed",
            lambda m: m["condorcet online: tv"] < 0.06,
            ("condorcet online: tv",),
        ),
        Check(
            "IPO-MD finds it",
            "condorcet: total variation to the equilibrium < 0.06, in every seed",
            lambda m: m["condorcet ipo_md: tv"] < 0.06,
            ("condorcet ipo_md: tv",),
        ),
        Check(
            "offline IPO does not",
            "condorcet: total variation to the equilibrium > 0.25, in every seed",
            lambda m: m["condorcet offline: tv"] > 0.25,
            ("condorcet offline: tv",),
        ),
        Check(
            "online IPO stays at a cyclic game's equilibrium",
            "rock-paper-scissors: total variation to the equilibrium < 0.05 at the end and on average over the last "
            "half of training, in every seed",
            lambda m: max(m["rps online: tv"], m["rps online: orbit"]) < 0.05,
            ("rps online: tv", "rps online: orbit"),
        ),
        Check(
            "offline IPO goes elsewhere in the cyclic game",
            "rock-paper-scissors: total variation to the equilibrium > 0.05, and < 0.05 to the offline fixed point "
            "ref exp(P(. > ref) / tau), in every seed",
            lambda m: m["rps offline: tv"] > 0.05 and m["rps offline: tv to its own fixed point"] < 0.05,
            ("rps offline: tv", "rps offline: tv to its own fixed point"),
        ),
        Check(
            "momentum makes online iterates orbit",
            "rock-paper-scissors, momentum 0.9: mean total variation over the last half is at least twice that of "
            "plain SGD, in every seed",
            lambda m: m["rps online, momentum: orbit"] > 2 * m["rps online: orbit"],
            ("rps online, momentum: orbit", "rps online: orbit"),
            main=False,
        ),
    ),
    seeds=3,
)


def equilibrium(game: Tensor, reference: Tensor) -> Tensor:
    """(3,) log-probabilities of the symmetric equilibrium: ref exp(P(. > pi) / tau), by a damped iteration."""
    game, log_ref = game.double(), reference.double().log()
    log_p = log_ref
    for _ in range(20_000):
        target = (log_ref + game @ log_p.exp() / TAU).log_softmax(0)
        log_p = (0.99 * log_p + 0.01 * target).log_softmax(0)
    assert (target - log_p).abs().max() < 1e-9
    return log_p.float()


class Policies(LanguageModel):
    """Independent tabular policies in one model: a row is (number of the policy, answer)."""

    def __init__(self, count: int, reference: Tensor) -> None:
        super().__init__()
        self.vocabulary = len(reference)
        self.logits = nn.ParameterList(nn.Parameter(reference.log()) for _ in range(count))

    def table(self) -> Tensor:
        """(policies, answers) log-probabilities."""
        return torch.stack(list(self.logits)).log_softmax(-1)

    def conditionals(self, ids: Tensor) -> Tensor:
        """Of the answer; the number is given."""
        answers = self.table()[ids[:, 0]]
        return torch.stack([torch.zeros_like(answers), answers], 1)


def learn(game: Tensor, reference: Tensor, lr: float, steps: int, seed: int) -> Tensor:
    """(steps + 1, policies, 3) log-probabilities of the policies along IPO, in the order of `RUNS`."""
    generator = torch.Generator().manual_seed(seed)
    policies, frozen = (Policies(len(RUNS), reference) for _ in range(2))
    frozen.requires_grad_(False)
    groups = [{"params": [p], "momentum": m} for p, (_, m) in zip(policies.logits, RUNS.values(), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=lr)
    samplers = {
        "policy": policies,
        "mixture": geometric_mixture(policies, frozen, beta=MIXTURE),
        "reference": frozen,
    }
    number = torch.arange(len(RUNS))
    prompts = TokenBatch.from_lists(number[:, None].tolist())
    rows = number.repeat_interleave(PAIRS)
    path = [policies.table().detach()]
    for _ in range(steps):
        with torch.no_grad():
            chances = {name: sampler.next_log_probs(prompts).exp() for name, sampler in samplers.items()}
        chance = torch.stack([chances[sampler][n] for n, (sampler, _) in enumerate(RUNS.values())])
        drawn = torch.multinomial(chance, 2 * PAIRS, replacement=True, generator=generator)
        first, second = (side.flatten() for side in drawn.chunk(2, 1))
        wins = torch.rand(len(rows), generator=generator) < game[first, second]
        pair = [torch.stack([rows, torch.where(w, first, second)], 1) for w in (wins, ~wins)]
        chosen, rejected = (policies.log_prob(side, start=1) for side in pair)
        ref_chosen, ref_rejected = (frozen.log_prob(side, start=1) for side in pair)
        loss = len(RUNS) * ipo(chosen, rejected, ref_chosen, ref_rejected, tau=TAU).mean()  # each policy has its mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(policies.table().detach())
    return torch.stack(path)


def measure(seed: int) -> Measured:
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, (game, reference, lr, steps) in GAMES.items():
        nash = equilibrium(game, reference)
        offline = (reference.log() + game @ reference / TAU).log_softmax(0)
        paths = learn(game, reference, lr, steps, seed)
        for number, label in enumerate(RUNS):
            path = paths[:, number]
            distance = total_variation(path, nash)
            values[f"{name} {label}: tv"] = distance[-1].item()
            values[f"{name} {label}: orbit"] = distance[steps // 2 :].mean().item()
            curves[f"{name} {label}"] = distance[::20].tolist()
            if label == "offline":
                values[f"{name} offline: tv to its own fixed point"] = total_variation(path[-1], offline).item()
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    for axes, game in zip(figure.subplots(1, 2, sharey=True), GAMES, strict=True):
        names = [name for name in report.measured[0].curves if name.startswith(game)]
        for number, name in enumerate(names):
            for first, measured in enumerate(report.measured):
                curve = measured.curves[name]
                steps = range(0, 20 * len(curve), 20)
                axes.plot(steps, curve, color=f"C{number}", lw=0.8, alpha=0.7, label=None if first else name)
        axes.axhline(0.06 if game == "condorcet" else 0.05, color="black", ls=":", lw=0.8)
        axes.set(title=game, xlabel="step", ylabel="total variation to the equilibrium")
        axes.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"Iterates do not come to rest: in rock-paper-scissors the mean distance over the last half is "
        f"{report.range('rps online: orbit')} with plain SGD and {report.range('rps online, momentum: orbit')} with "
        "momentum 0.9 at the same learning rate (whose steps are ten times as long).",
        "IPO-MD with a constant mixture coefficient is not exactly at the equilibrium (its fixed point is "
        "ref exp(P(. > mixture) / tau)); at 0.125 the difference is far below the noise of 64 pairs.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
