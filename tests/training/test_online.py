"""Rows drawn while training: on-policy, reproducible, and the same after a resume."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.objectives.density_ratio import ddo
from loglik.objectives.policy import brain, reinforce
from loglik.objectives.preference import ipo, sigmoid_norm
from loglik.training import Online, Row, TrainConfig, fit
from loglik.training.collect import DrawGroups, DrawPairs, RejectionPairs, draw
from loglik.training.lora import LoraSettings, with_lora
from loglik.training.reference import AdapterOff, ModelReference
from training.preference_rows import policy, weights_of
from zoo import CAUSAL, build


class Table:
    """One token after any prompt, from a table of logits: everything about it can be enumerated."""

    kind, unit, layout, tokenizer = Kind.EXACT, Unit.TOKEN, "causal", None

    def __init__(self, logits: list[float]) -> None:
        self.model = torch.nn.Module()
        self.model.logits = torch.nn.Parameter(torch.tensor(logits))
        self.model.device = torch.device("cpu")
        self.model.save_pretrained = lambda where: where.mkdir(parents=True, exist_ok=True)

    def log_prob(self, x: TokenBatch) -> LogLikelihood:
        found = torch.log_softmax(self.model.logits, 0)[x.ids] * x.scored_mask
        return LogLikelihood.from_per_unit(found, x.scored_mask)

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        return torch.log_softmax(self.model.logits.detach(), 0).expand(len(prefix), -1)

    def sample(self, n: int, **options) -> TokenBatch:
        from loglik.models.sampling import ancestral_samples

        return ancestral_samples(self, n, **options)

    def probs(self) -> Tensor:
        return torch.softmax(self.model.logits.detach(), 0)


WINS = torch.tensor([[0.5, 0.55, 0.6], [0.45, 0.5, 0.98], [0.4, 0.02, 0.5]])
START = [math.log(p) for p in (0.2, 0.2, 0.6)]


def wins(prompt, first, second) -> float:
    return float(WINS[first[0], second[0]])


def config(steps: int, rate: float, **changes) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=rate,
        schedule="constant",
        max_grad_norm=0,
        betas=(0.0, 0.99),
        **changes,
    )


def nash(tau: float = 0.1) -> Tensor:
    """Fixed point of the regularised game by damped iteration."""
    reference, p = torch.tensor(START).softmax(0).double(), torch.ones(3).double() / 3
    for _ in range(20000):
        best = reference * torch.exp(WINS.double() @ p / tau)
        p = 0.99 * p + 0.01 * best / best.sum()
    return p


def test_online_ipo_comes_near_the_nash_equilibrium(tmp_path):
    """Total variation below 0.1; IPO on the reference's own pairs ends far from it."""
    ends = {}
    for name, mixture in (("online", 0.0), ("offline", 1.0)):
        model = Table(START)
        collect = DrawPairs([[0]], wins, 64, mixture=mixture, max_tokens=1)
        fit(model, partial(ipo, tau=0.1), Online(collect), config(250, 0.02), output=tmp_path / name)
        ends[name] = float((model.probs() - nash()).abs().sum()) / 2
    assert ends["online"] < 0.1
    assert ends["offline"] > 0.25


@pytest.mark.parametrize("objective", [partial(brain, gamma=0.5), partial(reinforce, baseline="group", kl_weight=0.5)])
def test_policy_objectives_reach_the_tilted_reference(tmp_path, objective):
    """pi_ref exp(r / 0.5) / Z is where both end."""
    rewards = [0.0, 0.5, -0.5]

    def reward(prompt, completions):
        return [rewards[c[0]] for c in completions]

    model = Table(START)
    collect = DrawGroups([[0]], reward, 16, n=8, max_tokens=1)
    settings = TrainConfig(steps=150, batch_size=16, learning_rate=0.05, max_grad_norm=0, betas=(0.0, 0.99))
    fit(model, objective, Online(collect, every=2), settings, output=tmp_path, reference="initial")
    target = torch.softmax(torch.tensor(START) + torch.tensor(rewards) / 0.5, 0)
    assert float((model.probs() - target).abs().sum()) / 2 < 0.06


def test_rejection_pairs_are_drawn_from_the_reference(tmp_path):
    rewards = [0.0, 1.0, -1.0]
    seen: list[list[int]] = []

    def reward(prompt, completions):
        seen.extend(completions)
        return [rewards[c[0]] for c in completions]

    model = Table([3.0, 0.0, 0.0])
    collect = RejectionPairs([[0], [1]], reward, candidates=200, accepted=40, max_tokens=1)
    rows = list(collect(model, ModelReference(Table(START)), torch.Generator().manual_seed(0)))
    counts = torch.bincount(torch.tensor(seen).flatten(), minlength=3)
    assert chisquare(counts, 400 * torch.tensor(START).double().softmax(0)).pvalue > 1e-3
    better = sum(rewards[r.completions[0][0]] > rewards[r.completions[1][0]] for r in rows)
    assert better > 0.6 * len(rows) > 5
    fit(model, sigmoid_norm, Online(collect, every=5), TrainConfig(steps=5, batch_size=4), output=tmp_path)


def test_a_run_resumed_between_two_collections_is_the_uninterrupted_one(tmp_path):
    """The rows of the collection under way are in the checkpoint."""

    def reward(prompt, completions):
        return [float(len(c)) for c in completions]

    def run(model, out, steps=8, resume=False):
        collect = Online(DrawGroups([[3, 4], [5]], reward, 4, n=3, max_tokens=4), every=3)
        settings = TrainConfig(steps=8, batch_size=4, learning_rate=1e-2, save_every=1, log_every=1)
        log_prob, calls = model.log_prob, []

        def counted(x):
            calls.append(1)
            if torch.is_grad_enabled() and sum(calls) and len(graded) == steps:
                raise KeyboardInterrupt
            if torch.is_grad_enabled():
                graded.append(1)
            return log_prob(x)

        graded: list[int] = []
        model.log_prob = counted
        return fit(model, partial(reinforce, baseline="group"), collect, settings, output=out, resume=resume)

    straight = speaking()
    run(straight, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(speaking(), tmp_path / "b", steps=5)  # one step before its end
    resumed = speaking()
    run(resumed, tmp_path / "b", resume=True)
    for name, value in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], value), name
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / p / "log.jsonl").read_text().splitlines()] for p in "ab"
    ]
    assert losses[0] == losses[1]


def speaking() -> CausalLM:
    return CausalLM(build(CAUSAL["llama"], 20))


def test_samples_follow_the_model():
    """Two tokens after a prompt, 2000 draws: chi-square at 1e-3 against the enumerated distribution."""
    model = speaking()
    (completions,) = draw(model, [[3, 4]], 2000, generator=torch.Generator().manual_seed(1), max_tokens=1)
    probs = model.next_log_probs(TokenBatch.from_lists([[3, 4]])).exp()[0].double().detach()
    counts = torch.bincount(torch.tensor(completions).flatten(), minlength=20)
    assert chisquare(counts, 2000 * probs / probs.sum()).pvalue > 1e-3


def test_the_mixture_of_an_adapted_policy_uses_its_base():
    adapted = with_lora(policy(), LoraSettings(rank=2))
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    collect = DrawPairs([[3, 4]], lambda *_: 0.5, 5, mixture=1.0, max_tokens=3)
    rows = list(collect(adapted, AdapterOff(adapted), torch.Generator().manual_seed(0)))
    plain = DrawPairs([[3, 4]], lambda *_: 0.5, 5, mixture=0.0, max_tokens=3)
    again = list(plain(policy(), None, torch.Generator().manual_seed(0)))
    assert [r.completions for r in rows] == [r.completions for r in again]
    with pytest.raises(InputError, match="needs its model"):
        next(collect(adapted, lambda batch: None, torch.Generator()))


def test_direct_discriminative_optimisation_moves_towards_the_data(tmp_path):
    """Real rows from a table, fakes from the reference: the policy ends at the data distribution."""
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor([0.5, 0.4, 0.1])
    real = torch.multinomial(data, 2000, replacement=True, generator=generator).tolist()
    reference = Table(START)
    (fake,) = draw(reference, [[0]], 2000, generator=generator, max_tokens=1)
    rows = [Row([0], ([r], f)) for r, f in zip(real, fake, strict=True)]
    model = Table(START)
    settings = TrainConfig(steps=300, batch_size=200, learning_rate=0.03, max_grad_norm=0, schedule="linear")
    fit(model, ddo, rows, settings, output=tmp_path)
    assert float((model.probs() - data).abs().sum()) / 2 < 0.05


def test_refusals():
    with pytest.raises(ValueError, match="every must be at least 1"):
        Online(lambda *_: [], every=0)
    with pytest.raises(InputError, match="must be a probability"):
        next(DrawPairs([[0]], lambda *_: 2.0, 1, max_tokens=1)(Table(START), None, torch.Generator()))
    with pytest.raises(InputError, match="no prompt"):
        next(DrawGroups([], lambda *_: [], 1)(Table(START), None, torch.Generator()))
