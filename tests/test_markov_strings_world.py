"""The world of Markov strings against enumeration, closed forms and draws that fit; and the models it trains."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproductions"))

from worlds.enumerable import Language
from worlds.markov_strings import MarkovStrings, masked_network, train

from loglik.kinds import Kind, Unit
from loglik.models.diffusion import MaskedDiffusionLM, SubsetTable

SMALL = Language(3, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(length: int = 4, seed: int = 0) -> MarkovStrings:
    return MarkovStrings.random(vocabulary=3, length=length, generator=seeded(seed))


# ------------------------------------------------------------------ strings
def test_probabilities_sum_to_one():
    for vocabulary, length in ((3, 4), (2, 7), (5, 1), (1, 3)):
        world = MarkovStrings.random(vocabulary=vocabulary, length=length, generator=seeded())
        scored = world.log_prob(Language(vocabulary, length).sequences)
        assert (scored.kind, scored.unit) == (Kind.EXACT, Unit.TOKEN)
        assert scored.value.dtype == torch.float64
        assert scored.value.logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_a_symbol_depends_on_the_last_two_in_their_order():
    world = small(5)
    table = world.table.exp()
    by_hand = world.stationary[2, 0] * table[2, 0, 1] * table[0, 1, 1] * table[1, 1, 2]
    scored = world.log_prob(torch.tensor([[2, 0, 1, 1, 2]]))
    assert scored.value.exp().item() == pytest.approx(by_hand.item(), rel=1e-12)
    terms = torch.stack([table[2, 0, 1], table[0, 1, 1], table[1, 1, 2]])
    assert torch.allclose(scored.per_unit.exp()[0, 2:], terms, atol=1e-12)
    assert not torch.allclose(table, table.transpose(0, 1), atol=0.05)  # the order of the two matters


def test_rows_of_the_chain_are_as_wide_as_said():
    table = MarkovStrings.random(vocabulary=20, generator=seeded()).table
    assert (table - table.mean(-1, keepdim=True)).std().item() == pytest.approx(2.5 * math.sqrt(19 / 20), abs=0.05)
    assert table.exp().sum(-1).sub(1).abs().max() < 1e-14


def test_every_place_is_like_every_other():
    """Neighbours have the stationary law wherever they stand."""
    world = small()
    chances = world.log_prob(SMALL.sequences).value.exp().reshape(3, 3, 3, 3)
    assert world.stationary.sum().item() == pytest.approx(1, abs=1e-12)
    for places in ((2, 3), (0, 3), (0, 1)):  # the other two
        assert torch.allclose(chances.sum(places), world.stationary, atol=1e-12)


def test_draws_have_the_distribution_of_the_likelihood():
    """Chi-square at level 1e-4."""
    world, n = small(), 20_000
    drawn = world.sample(n, seeded(1))
    assert drawn.shape == (n, 4)
    counts = torch.bincount(SMALL.index(drawn), minlength=81).double()
    expected = n * world.log_prob(SMALL.sequences).value.exp()
    enough = expected >= 5
    observed = torch.cat([counts[enough], counts[~enough].sum()[None]])
    expected = torch.cat([expected[enough], expected[~enough].sum()[None]])
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4
    other = n * small(seed=1).log_prob(SMALL.sequences).value.exp()  # the test can tell
    assert stats.chisquare(counts.numpy(), other.numpy()).pvalue < 1e-4
    alone = MarkovStrings(world.table, 1).sample(n, seeded(2))
    assert alone.shape == (n, 1)
    shares = n * world.stationary.sum(1)
    assert stats.chisquare(torch.bincount(alone[:, 0], minlength=3).numpy(), shares.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("length", [2, 4])
def test_entropy_is_the_enumerated_one(length):
    world = small(length)
    log_p = world.log_prob(Language(3, length).sequences).value
    assert world.entropy() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-12)


def test_entropy_rate_in_closed_form():
    """Two symbols that flip with probability 0.1 and 0.3 are 0 and 1 in 3/4 and 1/4 of the places."""
    by_last = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log()
    world = MarkovStrings(by_last.expand(2, 2, 2))
    assert world.stationary.sum(1).tolist() == pytest.approx([0.75, 0.25], abs=1e-12)
    expected = 0.75 * stats.entropy([0.9, 0.1]) + 0.25 * stats.entropy([0.3, 0.7])
    assert world.entropy_rate() == pytest.approx(expected, abs=1e-12)
    flat = MarkovStrings.random(vocabulary=7, scale=0.0, generator=seeded())
    assert flat.entropy_rate() == pytest.approx(math.log(7), abs=1e-12)
    assert flat.entropy() == pytest.approx(16 * math.log(7), abs=1e-11)


def test_rows_score_every_symbol():
    world = small()
    rows = world.rows(world.sample(3, seeded()))
    assert rows.scored_mask.all()
    assert rows.attention_mask.all()
    assert rows.completion_starts().tolist() == [0, 0, 0]


# ------------------------------------------------------------------ models
def test_weights_are_those_of_the_seed_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (masked_network(3, 4, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [network.lm_head.weight for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (4, 32)
    assert first.config.mask_token_id == 3


def test_symbols_see_both_sides():
    lm = MaskedDiffusionLM(masked_network(3, 4, seed=0, scale=0.5))
    hidden = torch.tensor([[False, False, True, False]]).expand(3, 4)
    with torch.no_grad():
        base, left, right = lm.masked_log_probs(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), hidden)
    assert base[3] == -torch.inf  # never the mask token
    for moved in (left, right):
        assert not torch.allclose(moved[:3], base[:3], atol=1e-2)


def exact(lm: MaskedDiffusionLM, world: MarkovStrings) -> tuple[float, float]:
    """Mean negative bound and negative log-likelihood under the strings' true law, by enumeration."""
    log_p = world.log_prob(SMALL.sequences).value
    with torch.no_grad():
        tables = SubsetTable.of(lm, world.rows(SMALL.sequences))
        bound, mixture = (torch.stack([part(t) for t in tables]) for part in (SubsetTable.elbo, SubsetTable.mixture))
    return -(log_p.exp() * bound).sum().item(), -(log_p.exp() * mixture).sum().item()


@pytest.mark.parametrize("estimator", ["count", "bernoulli"])
def test_training_brings_the_bound_towards_the_entropy_and_never_below(estimator):
    world = small()
    lm = MaskedDiffusionLM(masked_network(3, 4, seed=0), estimator=estimator, num_samples=1)
    before, _ = exact(lm, world)
    seen: list[int] = []
    train(lm, world, steps=150, generator=seeded(), batch=64, learning_rate=4e-3, watch=seen.append)
    after, mixture = exact(lm, world)
    assert seen == list(range(1, 151))
    assert world.entropy() < mixture < after
    assert after - world.entropy() < 0.75 * (before - world.entropy())


def test_training_is_a_function_of_its_seeds():
    world = small()
    found = []
    for seed in (3, 3, 4):
        lm = MaskedDiffusionLM(masked_network(3, 4, seed=0), num_samples=1)
        train(lm, world, steps=3, generator=seeded(seed), batch=8)
        found.append(lm.model.lm_head.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
