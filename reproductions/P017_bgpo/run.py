"""P017: BGPO has the ratio objective's gradient on policy, at the memory of one mask whatever n is (2510.11683)."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn
from worlds.markov_strings import MarkovStrings, masked_network, train

from loglik.kinds import DrawsKey
from loglik.models.batch import TokenBatch
from loglik.models.diffusion import Counts, MaskedDiffusionLM, first_hitting
from loglik.objectives.diffusion_policy import bgpo

LENGTH, VOCABULARY, STEPS = 16, 5, 500
COMPLETIONS, REPEATS = 16, 10
SAMPLES, EXACT = (1, 2, 4, 8, 16), (1, 4, 16)
REFERENCE, AT_ONCE = 2048, 64  # draws of the reference gradient, and how many of them share a graph
RL_SAMPLES, RL_STEPS, RL_LR, TEST = (1, 16), 60, 3e-4, 1000


def _rises(m: Mapping[str, float]) -> bool:
    return all(m[f"n={n}: cosine"] < m[f"n={2 * n}: cosine"] for n in SAMPLES[:-1])


CLAIM = Claim(
    paper="P017",
    text=(
        "On policy, BGPO's gradient is that of the ratio objective on the same masks; accumulated mask by mask it "
        "needs the memory of one, whatever their number, where the objective's grows with it; and more masks give a "
        "more accurate gradient."
    ),
    setup=(
        "Bidirectional transformer of 2 layers and width 32, trained for 500 AdamW steps (2e-3, batch 128, k-DCE) on "
        "strings of a second-order Markov chain (L = 16, V = 5, rows softmax(2.5 N(0, 1))). 16 of its own completions "
        "from nothing, reward = number of zeros, centred. Relative difference of the two gradients in float64; cosine "
        "of the n-mask gradient to that of 2048 other masks per completion, mean over 10 repeats; peak bytes that "
        "autograd keeps for the backward pass, parameters not counted. Beside: the same with counts of hidden tokens "
        "spread over the n masks; 60 policy-gradient steps (Adam 3e-4, 16 fresh completions each) with 1 and with 16 "
        "masks, mean reward of 1000 completions afterwards."
    ),
    checks=(
        Check(
            "the same gradient on policy",
            "relative difference of the gradients < 1e-10 for n = 1, 4 and 16, in every seed",
            lambda m: all(m[f"n={n}: relative difference"] < 1e-10 for n in EXACT),
            tuple(f"n={n}: relative difference" for n in EXACT),
        ),
        Check(
            "more masks, more accurate",
            "mean cosine (10 repeats in each seed, mean over seeds) rises with every doubling of n from 1 to 16",
            _rises,
            tuple(f"n={n}: cosine" for n in SAMPLES),
            on_mean=True,
        ),
        Check(
            "by a lot",
            "mean cosine at n = 16 less that at n = 1 >= 0.2, in 4 of 5 seeds",
            lambda m: m["n=16: cosine"] - m["n=1: cosine"] >= 0.2,
            ("n=1: cosine", "n=16: cosine"),
            share=(4, 5),
        ),
        Check(
            "memory of one mask",
            "BGPO's peak at n = 2, 4, 8 and 16 <= 1.1 x that at n = 1, in every seed",
            lambda m: all(m[f"n={n}: kB, BGPO"] <= 1.1 * m["n=1: kB, BGPO"] for n in SAMPLES),
            tuple(f"n={n}: kB, BGPO" for n in SAMPLES),
        ),
        Check(
            "the ratio objective needs all",
            "its peak at n lies within 10 % of n times that at n = 1, for n = 2, 4, 8 and 16, in every seed",
            lambda m: all(0.9 < m[f"n={n}: kB, ratio"] / (n * m["n=1: kB, ratio"]) < 1.1 for n in SAMPLES),
            tuple(f"n={n}: kB, ratio" for n in SAMPLES),
        ),
        Check(
            "more accurate in single seeds",
            "mean cosine (10 repeats) rises with every doubling of n from 1 to 16, in 4 of 5 seeds",
            _rises,
            tuple(f"n={n}: cosine" for n in SAMPLES),
            share=(4, 5),
            main=False,
        ),
        Check(
            "a higher reward",
            "reward after 60 steps: mean over seeds higher with 16 masks than with 1",
            lambda m: m["n=16: reward"] > m["n=1: reward"],
            ("reward before", *(f"n={n}: {what}" for n in RL_SAMPLES for what in ("reward", "reward on the way"))),
            main=False,
            on_mean=True,
        ),
        Check(
            "spread counts are more accurate",
            "n = 16: mean cosine with spread counts above that with independent masks, in 4 of 5 seeds",
            lambda m: m["n=16, spread: cosine"] > m["n=16: cosine"],
            ("n=16, spread: cosine", "n=16: cosine"),
            share=(4, 5),
            main=False,
        ),
    ),
    seeds=5,
)


# ---------------------------------------------------------------------- gradients
def reward(x: TokenBatch) -> Tensor:
    """(N,) number of zeros."""
    return (x.ids == 0).sum(1).double()


def complete(model: MaskedDiffusionLM, n: int, generator: torch.Generator) -> TokenBatch:
    """`n` strings of the model, from nothing."""
    return first_hitting(model, TokenBatch.from_lists([[]], starts=[0]), n=n, length=LENGTH, generator=generator).tokens


def gradient(model: MaskedDiffusionLM) -> Tensor:
    """The parameters' gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])


def bgpo_backward(model: MaskedDiffusionLM, x: TokenBatch, n: int, draws: DrawsKey) -> None:
    """Add the gradient of BGPO's loss, mask by mask: each graph is freed before the next is built."""
    groups = torch.zeros(len(x), dtype=torch.long)
    for term in model.terms(x, num_samples=n, draws=draws):
        (bgpo(term, reward(x), groups, standardise=False).mean() / n).backward()


def ratio_backward(model: MaskedDiffusionLM, x: TokenBatch, n: int, draws: DrawsKey) -> None:
    """Add the gradient of minus the mean of A exp(difference of the bounds): no part of it is a mean over masks."""
    own = model.evidence(x, num_samples=n, draws=draws).likelihood.value
    advantage = (reward(x) - reward(x).mean()).to(own)
    (-(advantage * (own - own.detach()).exp()).mean()).backward()


def relative_differences(model: MaskedDiffusionLM, x: TokenBatch, seed: int) -> dict[str, float]:
    """Between the two gradients on the same masks, in float64."""
    precise = model.on(copy.deepcopy(model.model).double())
    values = {}
    for n in EXACT:
        draws, found = DrawsKey.of(f"seed {seed}, same {n}"), []
        for backward in (bgpo_backward, ratio_backward):
            precise.model.zero_grad()
            backward(precise, x, n, draws)
            found.append(gradient(precise))
        values[f"n={n}: relative difference"] = ((found[0] - found[1]).norm() / found[1].norm()).item()
    return values


def cosines(model: MaskedDiffusionLM, x: TokenBatch, seed: int) -> dict[str, float]:
    """Of the n-mask gradient to the reference, means over repeats."""
    model.model.zero_grad()
    for part in range(REFERENCE // AT_ONCE):
        ratio_backward(model, x, AT_ONCE, DrawsKey.of(f"seed {seed}, reference {part}"))
    reference = gradient(model)
    arms = {f"n={n}": (model, n) for n in SAMPLES}
    # One draw of n points whose counts of hidden tokens are spread evenly, in place of n independent ones.
    arms |= {f"n={n}, spread": (MaskedDiffusionLM(model.model, estimator=Counts(points=n)), 1) for n in SAMPLES[1:]}
    values = {}
    for name, (estimated, n) in arms.items():
        found = []
        for repeat in range(REPEATS):
            model.model.zero_grad()
            bgpo_backward(estimated, x, n, DrawsKey.of(f"seed {seed}, {name}, repeat {repeat}"))
            found.append(torch.cosine_similarity(gradient(model), reference, dim=0).item())
        values[f"{name}: cosine"] = statistics.fmean(found)
        values[f"{name}: deviation of the cosine"] = statistics.stdev(found)
    return values


# ---------------------------------------------------------------------- memory
class Saved:
    """A tensor that autograd keeps; its memory counts while it lives."""

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor.detach()  # detached: a node must not keep itself alive
        ledger.take(tensor)

    def __del__(self) -> None:
        self.ledger.release(self.tensor)


class Ledger:
    """Bytes that autograd keeps for backward passes, now and at most: each storage once, parameters not."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.users: Counter[int] = Counter()
        self.now = self.peak = 0

    def take(self, tensor: Tensor) -> None:
        """One more use of the tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.parameters:
            if not self.users[key]:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self.users[key] += 1

    def release(self, tensor: Tensor) -> None:
        """One use less."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.parameters:
            self.users[key] -= 1
            if not self.users[key]:
                self.now -= storage.nbytes()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that is saved in between counts."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: Saved(self, t), lambda kept: kept.tensor):
            yield


def peaks(model: MaskedDiffusionLM, x: TokenBatch, seed: int) -> dict[str, float]:
    """Peak kilobytes of both ways to the gradient."""
    values = {}
    for n in SAMPLES:
        for name, backward in (("BGPO", bgpo_backward), ("ratio", ratio_backward)):
            model.model.zero_grad()
            ledger = Ledger(model.model)
            with ledger.watching():
                backward(model, x, n, DrawsKey.of(f"seed {seed}, memory"))
            assert ledger.now == 0, "a graph is still alive"
            values[f"n={n}: kB, {name}"] = ledger.peak / 1000
    return values


# ---------------------------------------------------------------------- learning
def learn(model: MaskedDiffusionLM, n: int, seed: int) -> tuple[float, list[float]]:
    """Expected reward after training with `n` masks per completion, and the rewards of the completions on the way."""
    policy = model.on(copy.deepcopy(model.model))
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=RL_LR)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(RL_STEPS):
        x = complete(policy, COMPLETIONS, generator)
        curve.append(reward(x).mean().item())
        optimizer.zero_grad()
        bgpo_backward(policy, x, n, DrawsKey.of(f"seed {seed}, step {step}"))
        optimizer.step()
    return expected_reward(policy, seed), curve


def expected_reward(model: MaskedDiffusionLM, seed: int) -> float:
    return reward(complete(model, TEST, torch.Generator().manual_seed(1000 + seed))).mean().item()


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    world = MarkovStrings.random(vocabulary=VOCABULARY, length=LENGTH, generator=generator)
    network = masked_network(VOCABULARY, LENGTH, seed=seed)
    model = MaskedDiffusionLM(network, num_samples=1)
    train(model, world, steps=STEPS, generator=generator)
    x = complete(model, COMPLETIONS, generator)
    held_out = world.rows(world.sample(500, generator))
    with torch.no_grad():
        bound = -model.with_samples(16).log_prob(held_out).value.mean().item() / LENGTH
    values = {
        "bound, nats per token": bound,
        "entropy, nats per token": world.entropy() / LENGTH,
        "reward before": expected_reward(model, seed),
        "standard deviation of the 16 rewards": reward(x).std().item(),
    }
    values |= relative_differences(model, x, seed) | cosines(model, x, seed) | peaks(model, x, seed)
    curves = {}
    for n in RL_SAMPLES:
        values[f"n={n}: reward"], curves[f"n={n}"] = learn(model, n, seed)
        values[f"n={n}: reward on the way"] = statistics.fmean(curves[f"n={n}"])
    return Measured(values, curves)


# ---------------------------------------------------------------------- report
def plot(figure: Figure, report: Report) -> None:
    left, middle, right = figure.subplots(1, 3)
    for seed in range(len(report.seeds)):
        for colour, (suffix, label) in enumerate((("", "independent"), (", spread", "spread counts"))):
            counts = SAMPLES[1:] if suffix else SAMPLES
            values = [report.per_seed(f"n={n}{suffix}: cosine")[seed] for n in counts]
            left.semilogx(counts, values, "o-", base=2, ms=3, color=f"C{colour}", label=None if seed else label)
        for colour, name in enumerate(("BGPO", "ratio")):
            values = [report.per_seed(f"n={n}: kB, {name}")[seed] for n in SAMPLES]
            middle.loglog(SAMPLES, values, "o-", base=2, ms=3, color=f"C{colour}", label=None if seed else name)
        for colour, n in enumerate(RL_SAMPLES):
            curve = report.measured[seed].curves[f"n={n}"]
            right.plot(curve, color=f"C{colour}", lw=0.8, alpha=0.7, label=None if seed else f"n = {n}")
    left.set(title="cosine to 2048 masks", xlabel="masks n")
    middle.set(title="kB kept for the backward pass", xlabel="masks n")
    right.set(title="reward of the completions", xlabel="step")
    for axes in (left, middle, right):
        axes.legend(fontsize=7)


def _higher(report: Report) -> int:
    pairs: list[Mapping[str, float]] = [m.values for m in report.measured]
    return sum(m["n=16: reward"] > m["n=1: reward"] for m in pairs)


def notes(report: Report) -> list[str]:
    ratio = report.mean("n=16: kB, ratio") / report.mean("n=16: kB, BGPO")
    return [
        f"Equal completions, 60 steps: the reward rises from {report.range('reward before')} to a mean of "
        f"{report.mean('n=1: reward'):.2f} with 1 mask and {report.mean('n=16: reward'):.2f} with 16 (higher in "
        f"{_higher(report)} of {len(report.seeds)} seeds), at 16 times the passes. Both end near the most there is, "
        f"{LENGTH}; on the way the means are {report.mean('n=1: reward on the way'):.2f} and "
        f"{report.mean('n=16: reward on the way'):.2f}.",
        "Cosine to the gradient of 2048 masks, means over seeds: "
        + ", ".join(f"{report.mean(f'n={n}: cosine'):.3f} at n = {n}" for n in SAMPLES)
        + "; with spread counts "
        + ", ".join(f"{report.mean(f'n={n}, spread: cosine'):.3f} at n = {n}" for n in SAMPLES[1:])
        + ". Spread counts are one draw of n points, whose graph is kept whole. A single cosine deviates by "
        f"{report.mean('n=1: deviation of the cosine'):.2f} at n = 1 and "
        f"{report.mean('n=16: deviation of the cosine'):.2f} at n = 16 (standard deviation over repeats), so that "
        "means of 10 can cross.",
        f"At n = 16 the ratio objective keeps {ratio:.1f} times the bytes of BGPO "
        f"({report.range('n=16: kB, ratio', '.0f')} kB against {report.range('n=16: kB, BGPO', '.0f')}).",
        f"The model is far from done after 500 steps: its bound is {report.range('bound, nats per token')} nats per "
        f"token where the entropy is {report.range('entropy, nats per token')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
