"""Statistical rejection sampling against its exact distribution and its limits; pairs against known rankings."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from loglik.decoding.rejection import (
    first_round_pairs,
    ranker_rewards,
    rejection_pairs,
    rejection_sample,
    tournament_pairs,
)
from loglik.errors import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twelve outcomes: the proposal, their rewards, and the optimum at beta = 1/2."""
    generator = seeded(0)
    proposal = -torch.rand(12, dtype=torch.float64, generator=generator).log()  # Dirichlet(1)
    proposal /= proposal.sum()
    rewards = torch.randn(12, dtype=torch.float64, generator=generator)
    return proposal, rewards, (proposal.log() + rewards / 0.5).softmax(0)


def total_variation(counts: torch.Tensor, exact: torch.Tensor) -> float:
    return float((counts / counts.sum() - exact).abs().sum() / 2)


def test_the_first_pass_draws_from_the_optimum(world):
    """200,000 candidates; chi-square of the accepted at level 1e-3, total variation, and the rate of acceptance."""
    proposal, rewards, optimum = world
    drawn = torch.multinomial(proposal, 200_000, replacement=True, generator=seeded(1))
    rate = float((proposal * ((rewards - rewards.max()) / 0.5).exp()).sum())
    wanted = int(0.95 * rate * 200_000)  # all within the first pass, while the maximum is that of all outcomes
    accepted = rejection_sample(rewards[drawn], wanted, beta=0.5, generator=seeded(2))
    assert (accepted.diff() > 0).all()
    counts = torch.bincount(drawn[accepted], minlength=12).double()
    assert total_variation(counts, optimum) < 0.01
    assert stats.chisquare(counts.numpy(), (optimum * wanted).numpy()).pvalue > 1e-3
    visited = int(accepted[-1]) + 1
    assert wanted / visited == pytest.approx(rate, abs=0.005)


def law_of_one(proposal: torch.Tensor, rewards: torch.Tensor, beta: float, candidates: int) -> torch.Tensor:
    """Exact distribution of the one accepted among independent candidates, by the best reward among them."""
    law = torch.zeros_like(proposal)
    place = torch.arange(candidates)
    for best in rewards:
        chance = ((rewards - best) / beta).exp()
        # All candidates at most the best, less all strictly below it: those that contain it. Before place k none of
        # them was accepted, after it anything is allowed.
        for sign, allowed in ((1, rewards <= best), (-1, rewards < best)):
            p = torch.where(allowed, proposal, 0.0)
            passed = (p * chance).sum()
            law += sign * p * chance * ((p.sum() - passed) ** place * p.sum() ** (candidates - 1 - place)).sum()
    return law


@pytest.mark.parametrize("candidates", [2, 8, 64])
def test_one_of_few_candidates_has_its_exact_law(candidates, world):
    """Chi-square of 2,000 repetitions at level 1e-3; the law nears the optimum as candidates grow in number."""
    proposal, rewards, optimum = world
    law = law_of_one(proposal, rewards, 0.5, candidates)
    assert law.sum() == pytest.approx(1.0)
    generator, counts = seeded(3), torch.zeros(12, dtype=torch.float64)
    all_drawn = torch.multinomial(proposal, 2000 * candidates, replacement=True, generator=generator)
    for drawn in all_drawn.reshape(2000, candidates):
        counts[drawn[rejection_sample(rewards[drawn], 1, beta=0.5, generator=generator)]] += 1
    order = law.argsort()
    pooled = int((law * 2000 < 5).sum()) + 1  # what is rare, with the rarest of the rest
    observed = torch.cat([counts[order[:pooled]].sum().reshape(1), counts[order[pooled:]]])
    expected = torch.cat([law[order[:pooled]].sum().reshape(1), law[order[pooled:]]]) * 2000
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    assert total_variation(law, optimum) < {2: 0.4, 8: 0.1, 64: 0.01}[candidates]


def test_the_law_of_one_accepted_candidate():
    """Chi-square at level 1e-3 against the passes worked out by hand: each is reached if those before it failed."""
    rewards = torch.tensor([0.0, 0.7, 1.0, 0.9], dtype=torch.float64)
    chance = ((rewards - 1.0) / 0.8).exp()
    exact = chance * torch.cat([torch.ones(1), (1 - chance).cumprod(0)[:-1]])
    assert exact.sum() == pytest.approx(1.0)  # the best one ends the pass
    generator, counts = seeded(4), torch.zeros(4, dtype=torch.float64)
    for _ in range(2000):
        counts[rejection_sample(rewards, 1, beta=0.8, generator=generator)] += 1
    assert stats.chisquare(counts[:3].numpy(), (exact[:3] * 2000).numpy()).pvalue > 1e-3
    assert counts[3] == exact[3] == 0


def test_the_maximum_is_that_of_the_candidates_left():
    """After the outlier is taken, the others are judged among themselves: else hardly one of them would ever pass."""
    rewards = torch.tensor([100.0] + [0.0] * 9)
    assert rejection_sample(rewards, 10, beta=1.0, generator=seeded(5)).tolist() == list(range(10))
    # The law of the second: the best of the rest, unless the one before it passes at exp(-1).
    generator, counts = seeded(6), torch.zeros(2, dtype=torch.float64)
    for _ in range(2000):
        first, second = rejection_sample([0.0, 1.0, 50.0], 2, beta=1.0, generator=generator).tolist()
        assert first == 2
        counts[second] += 1
    exact = torch.tensor([math.exp(-1), 1 - math.exp(-1)], dtype=torch.float64)
    assert stats.chisquare(counts.numpy(), (exact * 2000).numpy()).pvalue > 1e-3


def test_beta_goes_from_best_of_n_to_plain_sampling():
    rewards = torch.randn(50, generator=seeded(7))
    best = rewards.argsort(descending=True)
    for beta in (0.0, 1e-300, 1e-9):
        assert rejection_sample(rewards, 6, beta=beta, generator=seeded(8)).tolist() == best[:6].tolist()
    for beta in (math.inf, 1e12):
        assert rejection_sample(rewards, 6, beta=beta, generator=seeded(9)).tolist() == [0, 1, 2, 3, 4, 5]
    assert rejection_sample([1.0, 3.0, 3.0, 2.0], 3, beta=0.0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("beta", [0.0, 0.5, math.inf])
def test_equal_rewards_accept_in_order(beta):
    assert rejection_sample([2.5] * 9, 4, beta=beta, generator=seeded(10)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_n_distinct_candidates_and_only_differences_of_rewards(beta):
    rewards = torch.randn(64, dtype=torch.float64, generator=seeded(11)).round(decimals=6)
    for n in (0, 1, 8, 64):
        accepted = rejection_sample(rewards, n, beta=beta, generator=seeded(12))
        assert len(set(accepted.tolist())) == len(accepted) == n
        assert accepted.equal(rejection_sample(rewards + 4096.0, n, beta=beta, generator=seeded(12)))
    assert len(rejection_sample([], 0, beta=beta)) == 0


def test_equal_texts_are_separate_candidates_unless_told():
    """Nine copies of one text and one other: keyed by number the copies weigh nine times as much."""
    texts, rewards = ["a"] * 9 + ["b"], [0.0] * 10
    shuffled = torch.randperm(10, generator=seeded(13)).tolist()
    names = [texts[i] for i in shuffled]
    assert rejection_sample(rewards, 10, beta=1.0).tolist() == list(range(10))
    once = rejection_sample(rewards, 2, beta=1.0, unique=names)
    assert once.tolist() == sorted([names.index("a"), names.index("b")])
    with pytest.raises(InputError, match="cannot accept 3 of 2 distinct candidates"):
        rejection_sample(rewards, 3, beta=1.0, unique=names)


@pytest.mark.parametrize(
    ("rewards", "n", "beta", "message"),
    [
        ([0.0, math.nan], 1, 1.0, "reward of candidate 1 is nan"),
        ([0.0, -math.inf], 1, 1.0, "reward of candidate 1 is -inf"),
        ([0.0, 1.0], 3, 1.0, "cannot accept 3 of 2 candidates"),
        ([0.0, 1.0], -1, 1.0, "cannot accept -1 of 2"),
        ([0.0, 1.0], 1, -0.5, "beta must be at least 0, got -0.5"),
        ([0.0, 1.0], 1, math.nan, "beta must be at least 0, got nan"),
        ([[0.0, 1.0]], 1, 1.0, "one number per candidate"),
    ],
)
def test_refusals(rewards, n, beta, message):
    with pytest.raises(InputError, match=message):
        rejection_sample(torch.tensor(rewards), n, beta=beta)


# ---------------------------------------------------------------------- pairs
QUALITY = torch.tensor([3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0])


def honest(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(QUALITY[first] - QUALITY[second])


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_first_round_pairs_everyone_once(n):
    candidates = torch.randperm(8, generator=seeded(14))[:n]
    pairs = first_round_pairs(candidates, honest, generator=seeded(15))
    assert pairs.shape == (n // 2, 2)
    members = pairs.flatten().tolist()
    assert len(set(members)) == len(members)
    assert set(members) <= set(candidates.tolist())
    assert (QUALITY[pairs[:, 0]] > QUALITY[pairs[:, 1]]).all()


def test_the_pairing_is_random():
    seen = {
        tuple(map(tuple, first_round_pairs(torch.arange(8), honest, generator=seeded(s)).tolist())) for s in range(9)
    }
    assert len(seen) > 5
    # Who meets whom is uniform: candidate 5 (never beaten) meets each of the others equally often; level 1e-3.
    counts = torch.zeros(8)
    for seed in range(700):
        pairs = first_round_pairs(torch.arange(8), honest, generator=seeded(seed))
        counts[pairs[pairs[:, 0] == 5, 1]] += 1
    others = counts[torch.arange(8) != 5]
    assert counts.sum() == 700
    assert stats.chisquare(others.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6, 7, 8])
def test_a_tournament_has_one_winner(n):
    """Knock-out: everyone but the best loses exactly once, and nobody plays after a defeat."""
    candidates = torch.randperm(8, generator=seeded(16))[:n]
    pairs = tournament_pairs(candidates, honest, generator=seeded(17))
    assert pairs.shape == (max(n - 1, 0), 2)
    losers = pairs[:, 1].tolist()
    assert len(set(losers)) == len(losers)
    if n:
        best = int(candidates[QUALITY[candidates].argmax()])
        assert set(losers) == set(candidates.tolist()) - {best}
    out: set[int] = set()
    for chosen, rejected in pairs.tolist():
        assert not {chosen, rejected} & out
        assert QUALITY[chosen] > QUALITY[rejected]
        out.add(rejected)


def test_a_bias_for_what_is_shown_first_cancels():
    """A ranker that adds 0.3 to the first shown would order close pairs by position; in both orders it does not."""

    def biased(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (0.5 + 0.04 * (QUALITY[first] - QUALITY[second]) + 0.15).clamp(0, 1)

    for seed in range(20):
        pairs = first_round_pairs(torch.arange(8), biased, generator=seeded(seed))
        assert (QUALITY[pairs[:, 0]] > QUALITY[pairs[:, 1]]).all()
    torch.testing.assert_close(
        ranker_rewards(biased, 2, baseline=0),
        torch.logit(torch.tensor([0.5, 0.42], dtype=torch.float64)),
        atol=1e-6,
        rtol=0,
    )


def test_ties_give_no_pair():
    def indifferent(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.full((len(first),), 0.5)

    assert first_round_pairs(torch.arange(8), indifferent, generator=seeded(18)).shape == (0, 2)
    assert tournament_pairs(torch.arange(8), indifferent, generator=seeded(18)).shape == (0, 2)

    def only_zero_is_better(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return 0.5 + 0.5 * ((first == 0).float() - (second == 0).float())

    pairs = tournament_pairs(torch.arange(8), only_zero_is_better, generator=seeded(19))
    assert pairs[:, 0].tolist() == [0, 0, 0]  # its three rounds; the other four matches are ties


def test_rejection_pairs_puts_both_together():
    rewards = torch.randn(64, generator=seeded(20))

    def by_reward(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(rewards[first] - rewards[second])

    accepted = set(rejection_sample(rewards, 8, beta=0.3, generator=seeded(21)).tolist())
    pairs = rejection_pairs(rewards, 8, by_reward, beta=0.3, generator=seeded(21))
    assert pairs.shape == (4, 2)
    assert set(pairs.flatten().tolist()) == accepted
    whole = rejection_pairs(rewards, 8, by_reward, beta=0.3, how="tournament", generator=seeded(21))
    assert whole.shape == (7, 2)
    assert set(whole.flatten().tolist()) == accepted
    names = [i % 4 for i in range(64)]
    assert set(rejection_pairs(rewards, 4, by_reward, beta=1.0, unique=names).flatten().tolist()) == {0, 1, 2, 3}
    with pytest.raises(InputError, match="how must be one of first_round, tournament, got 'all'"):
        rejection_pairs(rewards, 8, by_reward, beta=0.3, how="all")


def test_rewards_of_a_ranker():
    """A Bradley-Terry ranker gives its own rewards back, against the baseline; certainty is held at 13.9."""
    got = ranker_rewards(honest, 4, baseline=2)
    torch.testing.assert_close(got, (QUALITY[:4] - QUALITY[2]).double(), atol=1e-5, rtol=0)
    assert got[2] == 0

    def sure(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first < second).float()

    assert ranker_rewards(sure, 3, baseline=1).tolist() == pytest.approx([13.8155, 0.0, -13.8155], abs=1e-3)
    noise = seeded(23)  # a judge that never answers twice alike still finds the baseline equal to itself
    noisy = ranker_rewards(lambda a, b: torch.rand(len(a), generator=noise), 5, baseline=3)
    assert noisy[3] == 0
    assert noisy.count_nonzero() == 4
    with pytest.raises(InputError, match="one of the candidates 0 to 2, got 3"):
        ranker_rewards(sure, 3, baseline=3)


def test_a_ranker_that_gives_no_probabilities():
    with pytest.raises(InputError, match="must give probabilities; that of candidate"):
        first_round_pairs(torch.arange(4), lambda a, b: QUALITY[a] - QUALITY[b], generator=seeded(22))
    with pytest.raises(InputError, match="must give probabilities"):
        first_round_pairs(torch.arange(4), lambda a, b: torch.full((len(a),), math.nan))
    with pytest.raises(InputError, match="must give 2 probabilities for 2 pairs"):
        tournament_pairs(torch.arange(4), lambda a, b: torch.tensor(0.5))
