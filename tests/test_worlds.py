"""The reproductions' test beds against what defines them: enumeration, closed forms, and draws that fit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproductions"))

from worlds.arithmetic import PROMPT, Chain, train
from worlds.diffusion import Denoiser, Draws, distance_and_coverage, fit, moons, noise_errors
from worlds.enumerable import (
    GRULM,
    Language,
    Markov,
    Tabular,
    TransformerLM,
    categorical,
    entropy,
    expectation,
    kl,
    random_language,
    total_variation,
)
from worlds.preference import PreferenceWorld, bigram_rewards

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, Model

LANGUAGE = Language(3, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "tabular": random_language(LANGUAGE, generator=seeded()),
        "markov": Markov(3, 2, scale=1.5, generator=seeded()),
        "gru": GRULM(3, 8),
        "deep_gru": GRULM(3, 8, layers=2),
        "transformer": TransformerLM(3, 8, length=4, heads=2).eval(),
    }


# ------------------------------------------------------------------ enumerable languages
def test_sequences_are_all_there_and_know_their_row():
    ids = LANGUAGE.sequences
    assert ids.shape == (len(LANGUAGE), 4) == (81, 4)
    assert len({tuple(row) for row in ids.tolist()}) == 81
    assert torch.equal(LANGUAGE.index(ids), torch.arange(81))
    assert LANGUAGE.index(torch.tensor([[2, 1, 0, 2]])).item() == 2 * 27 + 9 + 2


@pytest.mark.parametrize("name", models())
def test_models_are_normalised_and_causal(name):
    model = models()[name]
    with torch.no_grad():
        scored = model.log_prob(LANGUAGE.sequences)
        assert (scored.kind, scored.unit) == (Kind.EXACT, Unit.TOKEN)
        assert isinstance(model, Model)
        assert scored.value.logsumexp(0).item() == pytest.approx(0, abs=1e-5)
        assert torch.allclose(scored.per_unit.sum(1), scored.value, atol=1e-5)
        ids = LANGUAGE.sequences[:9]
        changed = ids.clone()
        changed[:, 2:] = (changed[:, 2:] + 1) % 3
        here, there = model.conditionals(ids), model.conditionals(changed)
        assert torch.allclose(here[:, :3], there[:, :3], atol=1e-6)  # columns 0 to 2 see none of what changed
        assert not torch.allclose(here[:, 3], there[:, 3], atol=1e-4)


@pytest.mark.parametrize("name", models())
def test_scoring_from_a_start_is_conditional(name):
    model = models()[name]
    with torch.no_grad():
        rest = model.log_prob(LANGUAGE.sequences, start=2)
        assert rest.num_units.tolist() == [2] * 81
        sums = rest.value.reshape(9, 9).logsumexp(1)
    assert torch.allclose(sums, torch.zeros(9), atol=1e-5)


@pytest.mark.parametrize("name", models())
def test_draws_have_the_distribution_of_the_likelihood(name):
    """Chi-square at level 1e-4, with prompt and without."""
    model = models()[name]
    n = 5_000
    for prompt in (None, torch.tensor([[1, 2]]).expand(n, 2)):
        drawn = model.sample(n, length=4 if prompt is None else 2, prompt=prompt, generator=seeded(1))
        counts = torch.bincount(LANGUAGE.index(drawn), minlength=81).double()
        with torch.no_grad():
            chances = model.log_prob(LANGUAGE.sequences, start=0 if prompt is None else 2).value.double().exp()
        possible = (
            torch.ones(81, dtype=torch.bool) if prompt is None else (LANGUAGE.index(LANGUAGE.sequences) // 9 == 5)
        )
        assert counts[~possible].sum() == 0
        expected = n * chances[possible] / chances[possible].sum()
        enough = expected >= 5
        observed = torch.cat([counts[possible][enough], counts[possible][~enough].sum()[None]])
        expected = torch.cat([expected[enough], expected[~enough].sum()[None]])
        if expected[-1] == 0:
            observed, expected = observed[:-1], expected[:-1]
        assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", models())
def test_next_symbols_are_the_conditionals(name):
    model = models()[name]
    assert isinstance(model, ChainRule)
    prefix = TokenBatch.from_lists([[0, 1], [2, 2]])
    with torch.no_grad():
        ids = torch.tensor([[0, 1, 2], [2, 2, 0]])
        assert torch.allclose(model.next_log_probs(prefix), model.conditionals(ids)[:, 2], atol=1e-6)
        with pytest.raises(InputError, match="pad nothing"):
            model.next_log_probs(TokenBatch.from_lists([[0, 1], [2]]))


def test_tabular_models_hold_any_distribution():
    log_p = torch.randn(81, generator=seeded()).mul(3).log_softmax(0)
    assert torch.allclose(LANGUAGE.log_probs(Tabular.of(log_p, LANGUAGE)), log_p, atol=1e-5)
    one = Language(5, 1)
    flat = Tabular(5, 1)
    assert torch.allclose(one.log_probs(flat), torch.full((5,), -math.log(5)))


def test_sums_over_distributions():
    log_p, log_q = (torch.randn(2, 50, generator=seeded(), dtype=torch.float64)).log_softmax(1)
    values = torch.randn(50, generator=seeded(2), dtype=torch.float64)
    assert kl(log_p, log_q).item() == pytest.approx(stats.entropy(log_p.exp(), log_q.exp()), abs=1e-12)
    assert entropy(log_p).item() == pytest.approx(stats.entropy(log_p.exp()), abs=1e-12)
    assert expectation(log_p, values).item() == pytest.approx(float(log_p.exp() @ values), abs=1e-12)
    assert total_variation(log_p, log_q).item() == pytest.approx(float((log_p.exp() - log_q.exp()).clamp(min=0).sum()))
    impossible = torch.tensor([0.0, -math.inf])
    assert kl(impossible, torch.tensor([0.5, 0.5]).log()).item() == pytest.approx(math.log(2))
    assert entropy(impossible).item() == 0


def test_a_categorical_is_one_token():
    log_p = torch.randn(5, generator=seeded()).log_softmax(0).requires_grad_()
    one = categorical(log_p, torch.tensor([4, 4, 0]))
    assert one.num_units.tolist() == [1, 1, 1]
    assert torch.equal(one.value, log_p[[4, 4, 0]])
    one.value.sum().backward()
    assert log_p.grad.tolist() == [1, 0, 0, 0, 2]
    assert len(categorical(log_p)) == 5


def test_states_predict_through_the_head():
    for model in (GRULM(3, 8), TransformerLM(3, 8, length=4, heads=2)):
        with torch.no_grad():
            states = model.states(LANGUAGE.sequences)
            logits = states @ model.head.weight.T + model.head.bias
            assert torch.allclose(logits.log_softmax(-1), model.conditionals(LANGUAGE.sequences), atol=1e-5)


# ------------------------------------------------------------------ preferences
def world() -> PreferenceWorld:
    generator = seeded(3)
    return PreferenceWorld(
        torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(0),
        torch.randn(12, generator=generator, dtype=torch.float64),
    )


def test_optimum_is_the_tilted_reference_and_beats_its_neighbours():
    w = world()
    beta = 0.5
    best = w.optimum(beta)
    tilted = w.reference.exp() * (w.rewards / beta).exp()
    assert torch.allclose(best.exp(), tilted / tilted.sum())
    assert w.objective(best, beta).item() == pytest.approx(beta * w.log_partition(beta).item(), abs=1e-12)
    for seed in range(20):
        other = (best + 0.1 * torch.randn(12, generator=seeded(seed), dtype=torch.float64)).log_softmax(0)
        assert w.objective(other, beta) < w.objective(best, beta)
    assert w.divergence(w.optimum(1e9)).item() == pytest.approx(0, abs=1e-12)


def test_pairs_come_from_the_sampler_and_are_labelled_by_the_reward():
    """Winning rates within four standard errors of Bradley-Terry's (false alarm below 1e-3 over 66 pairs)."""
    w = world()
    n = 100_000
    pairs = w.pairs(n, sampler=torch.full((12,), -math.log(12)), generator=seeded())
    assert len(pairs) == n
    assert (pairs.chosen != pairs.rejected).all()
    uniform = torch.cat([pairs.chosen, pairs.rejected]).bincount(minlength=12)
    assert stats.chisquare(uniform.numpy()).pvalue > 1e-4
    wins = torch.zeros(12, 12).index_put_((pairs.chosen, pairs.rejected), torch.ones(n), accumulate=True)
    for i in range(12):
        for j in range(i):
            met = wins[i, j] + wins[j, i]
            p = w.preference(torch.tensor(i), torch.tensor(j)).item()
            assert abs(wins[i, j] / met - p) < 4.5 * math.sqrt(p * (1 - p) / met)
    sure = w.pairs(500, generator=seeded(), noisy=False)
    assert (w.rewards[sure.chosen] > w.rewards[sure.rejected]).all()
    drawn = torch.cat([sure.chosen, sure.rejected]).bincount(minlength=12).double()
    assert torch.corrcoef(torch.stack([drawn, w.reference.exp()]))[0, 1] > 0.9


def test_pairs_without_noise_leave_ties_out():
    w = PreferenceWorld(torch.tensor([0.25] * 4).log(), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    pairs = w.pairs(50, generator=seeded(), noisy=False)
    assert len(pairs) == 50
    assert (pairs.chosen == 3).all()


def test_bigram_rewards_are_standardised_and_local():
    rewards = bigram_rewards(LANGUAGE, generator=seeded())
    assert rewards.mean().item() == pytest.approx(0, abs=1e-6)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    row = {tuple(ids): r.item() for ids, r in zip(LANGUAGE.sequences.tolist(), rewards, strict=True)}
    # What the last symbol adds depends on the two before it alone.
    assert row[0, 1, 2, 0] - row[0, 1, 2, 1] == pytest.approx(row[2, 1, 2, 0] - row[2, 1, 2, 1], abs=1e-5)
    assert row[0, 1, 2, 0] - row[0, 1, 2, 1] != pytest.approx(row[0, 0, 2, 0] - row[0, 0, 2, 1], abs=1e-5)


# ------------------------------------------------------------------ arithmetic
def test_chains_are_labelled_by_their_transitions():
    task = Chain()
    rows = torch.tensor([[3, 12, 5, 7, 9, 1], [3, 12, 8, 0, 2, 4], [9, 13, 2, 8, 1, 4]])
    assert task.right(rows).tolist() == [[True] * 4, [False, True, True, True], [True, False, True, True]]
    assert task.solved(rows).tolist() == [True, False, False]


def test_data_are_wrong_as_often_as_said():
    task = Chain()
    rows = task.data(20_000, generator=seeded())
    assert rows.shape == (20_000, PROMPT + 4)
    assert rows[:, 0].unique().tolist() == list(range(10))
    assert rows[:, 1].unique().tolist() == list(range(11, 20))
    right = task.right(rows)
    assert right.float().mean(0) == pytest.approx([0.5] * 4, abs=0.02)
    assert task.solved(rows).float().mean().item() == pytest.approx(1 / 16, abs=0.01)
    step = rows[:, 1] - 10
    wrong = (rows[:, PROMPT] - rows[:, 0] - step - 3) % 10
    assert (wrong[~right[:, 0]] == 0).all()
    assert task.solved(task.data(100, generator=seeded(), wrong=0.0)).all()


def test_a_trained_model_knows_the_two_continuations():
    """Two continuations with probability one half each: log 2 per transition."""
    torch.manual_seed(0)
    task = Chain(symbols=5, transitions=2, detour=2)
    model = train(task, generator=seeded(), width=32, steps=300, lr=1e-2)
    rows = task.data(500, generator=seeded(1))
    with torch.no_grad():
        nats = -model.log_prob(rows, start=PROMPT).mean_per_unit().value.mean().item()
        prompts = -model.log_prob(rows[:, :PROMPT]).value.mean().item()
    assert nats == pytest.approx(math.log(2), abs=0.05)
    assert prompts > math.log(5) + math.log(4) + 0.5  # prompts are given, not learned
    drawn = task.sample(model, task.prompts(2000, generator=seeded(2)), generator=seeded(3))
    assert task.right(drawn).float().mean().item() == pytest.approx(0.5, abs=0.06)


# ------------------------------------------------------------------ diffusion
class Gaussian(Denoiser):
    """The exact denoiser of data N(mean, 1): the noise that explains where the point is."""

    mean = torch.tensor([1.0, -2.0])

    def forward(self, x, times):
        signal = self.signal[times][:, None]
        return (1 - signal).sqrt() * (x - signal.sqrt() * self.mean)


def test_an_exact_denoiser_samples_its_data():
    """Mean and covariance within five standard errors, and the noise it starts from and ends with left."""
    model = Gaussian()
    x = model.sample(20_000, generator=seeded())
    assert (x.mean(0) - model.mean).abs().max() < 5 / math.sqrt(20_000) + 0.01
    assert (torch.cov(x.T) - torch.eye(2)).abs().max() < 5 * math.sqrt(2 / 20_000) + 0.01


def test_noised_points_and_their_errors():
    model = Denoiser(8)
    x = moons(4000, generator=seeded())
    noise = torch.randn(4000, 2, generator=seeded(1))
    first, last = (Draws(torch.full((4000,), t), noise) for t in (0, 49))
    assert torch.allclose(model.noised(x, first), x, atol=0.05)
    assert torch.allclose(model.noised(x, last), noise, atol=0.3)
    middle = model.noised(torch.randn(4000, 2, generator=seeded(2)), Draws(torch.full((4000,), 20), noise))
    assert middle.std(0) == pytest.approx([1, 1], abs=0.05)  # the variance is preserved
    assert model.signal[-1].item() == pytest.approx(math.prod((1 - torch.linspace(1e-4, 0.2, 50)).tolist()), rel=1e-5)
    scored = noise_errors(model, x, last)
    assert (scored.kind, scored.unit) == (Kind.SURROGATE, Unit.DIM)
    predicted = model(model.noised(x, last), last.times)
    assert torch.allclose(scored.value, -((predicted - noise) ** 2).sum(1))


def test_moons_lie_near_their_manifold():
    """The mean distance of points moved by N(0, 0.05^2) in the plane is 0.05 sqrt(2 / pi)."""
    distance, coverage = distance_and_coverage(moons(20_000, generator=seeded()))
    assert distance == pytest.approx(0.05 * math.sqrt(2 / math.pi), abs=2e-3)
    assert coverage == 1
    distance, coverage = distance_and_coverage(moons(20_000, generator=seeded(), noise=0.0))
    assert distance < 5e-3  # 200 points stand for each moon
    one_moon = moons(20_000, generator=seeded())
    one_moon = one_moon[one_moon[:, 1] > 0.6]
    assert distance_and_coverage(one_moon)[1] < 0.6
    assert moons(20_000, generator=seeded()).mean(0) == pytest.approx([0, 0], abs=0.03)
    assert moons(20_000, generator=seeded()).std(0) == pytest.approx([1, 1], abs=0.03)


def test_fitting_lowers_the_error_and_averages_the_weights():
    torch.manual_seed(0)
    model, generator = Denoiser(16), seeded()

    def loss(of: Denoiser) -> torch.Tensor:
        return -noise_errors(of, moons(64, generator=generator), of.draws(64, generator)).value.mean()

    before = loss(model).item()
    path = [[p.detach().clone() for p in model.parameters()]]

    def watched(of: Denoiser) -> torch.Tensor:
        path.append([p.detach().clone() for p in of.parameters()])
        return loss(of)

    average = fit(model, watched, 200, lr=1e-2, decay=0.5)
    assert loss(average).item() < 0.8 * before
    path = [*path[2:], [p.detach().clone() for p in model.parameters()]]
    mean = path[0]
    for after in path[-40:]:
        mean = [0.5 * a + 0.5 * b for a, b in zip(mean, after, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(average.parameters(), mean, strict=True))
    assert not any(p.requires_grad for p in average.parameters())
