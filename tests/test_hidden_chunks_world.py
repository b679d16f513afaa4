"""The oracle of texts with hidden values: likelihoods and marginals against enumeration, samples, decoding."""

from __future__ import annotations

import math
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproductions"))

from worlds.hidden_chunks import HiddenChunks

from loglik.decoding.parallel import MostConfident, RandomPositions, parallel_decode
from loglik.errors import InputError
from loglik.models.diffusion import infilling

WORLDS = {
    "independent": HiddenChunks(2, 2, 3, keep=0.7),
    "carrier last": HiddenChunks(2, 2, 3, keep=0.7, carrier=1),
    "dependent": HiddenChunks(2, 2, 3, keep=0.7, follow=0.8),
    "dependent, three chunks": HiddenChunks(3, 2, 3, keep=0.6, follow=0.75, carrier=1),
    "more tokens than symbols": HiddenChunks(2, 3, 2, keep=0.8, follow=0.3),
    "one token a chunk": HiddenChunks(4, 1, 3, follow=0.9),
}


def joint(world: HiddenChunks) -> np.ndarray:
    """(A, ..., A) probability of every text, by summing over all values of all chunks."""
    symbols = range(world.alphabet)
    found = np.zeros((world.alphabet,) * world.length)
    for values in product(symbols, repeat=world.chunks):
        weight = 1 / world.alphabet
        for last, value in pairwise(values):
            if world.follow is None:
                weight /= world.alphabet
            elif value == (last + 1) % world.alphabet:
                weight *= world.follow
            else:
                weight *= (1 - world.follow) / (world.alphabet - 1)
        for text in product(symbols, repeat=world.length):
            chance = weight
            for place, token in enumerate(text):
                chunk, j = divmod(place, world.size)
                if j == world.carrier:
                    chance *= token == values[chunk]
                elif token == (values[chunk] + j) % world.alphabet:
                    chance *= world.keep
                else:
                    chance *= (1 - world.keep) / (world.alphabet - 1)
            found[text] += chance
    return found


def texts_of(world: HiddenChunks) -> torch.Tensor:
    return torch.tensor(list(product(range(world.alphabet), repeat=world.length)))


@pytest.fixture(params=WORLDS, scope="module")
def world(request) -> HiddenChunks:
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def table(world) -> np.ndarray:
    return joint(world)


def test_likelihoods_are_those_of_enumeration(world, table):
    found = world.log_prob(texts_of(world))
    assert found.dtype == torch.float64
    assert np.allclose(found.exp().numpy(), table.reshape(-1), rtol=1e-12, atol=0)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert world.entropy == pytest.approx(float(-(found.exp() * found).sum()), abs=1e-12)


def test_marginals_and_visible_parts_are_those_of_enumeration(world, table):
    """Every set of hidden tokens, every text."""
    texts = texts_of(world)
    for marks in product((False, True), repeat=world.length):
        places = [i for i, mark in enumerate(marks) if mark]
        visible = table.sum(tuple(places), keepdims=True)
        hidden = torch.tensor(marks).expand(texts.shape)
        shown = texts.masked_fill(hidden, world.mask_token_id)
        log_p = world.log_prob(shown, hidden)
        assert np.allclose(log_p.exp().numpy(), np.broadcast_to(visible, table.shape).reshape(-1), rtol=1e-12, atol=0)
        if not places:
            continue
        found = world.masked_log_probs(shown, hidden).exp().view(len(texts), len(places), world.alphabet)
        for number, place in enumerate(places):
            others = tuple(other for other in places if other != place)
            alone = table.sum(others, keepdims=True) / visible
            want = np.stack([np.broadcast_to(alone.take([v], place), table.shape) for v in range(world.alphabet)], -1)
            assert np.allclose(found[:, number].numpy(), want.reshape(len(texts), -1), rtol=0, atol=1e-11)


def test_what_stands_under_hidden_tokens_is_ignored(world):
    texts = texts_of(world)
    hidden = torch.rand(texts.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    shown = texts.masked_fill(hidden, world.mask_token_id)
    assert torch.equal(world.masked_log_probs(texts, hidden), world.masked_log_probs(shown, hidden))
    assert torch.equal(world.log_prob(texts, hidden), world.log_prob(shown, hidden))


@pytest.mark.parametrize("name", ["independent", "carrier last", "dependent"])
def test_samples_follow_the_law(name):
    world, n = WORLDS[name], 20_000
    drawn = world.sample(n, generator=torch.Generator().manual_seed(0))
    powers = world.alphabet ** torch.arange(world.length - 1, -1, -1)
    found = np.bincount((drawn * powers).sum(1).numpy(), minlength=world.alphabet**world.length)
    assert chisquare(found, n * joint(world).reshape(-1)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["independent", "dependent, three chunks"])
@pytest.mark.parametrize("policy", [RandomPositions(1), MostConfident(1)])
def test_decoding_one_token_a_round_telescopes(name, policy):
    """The nats of the rounds are those of the chain rule."""
    world = WORLDS[name]
    canvas = infilling(world, [[world.mask_token_id] * world.length] * 30)
    decoded = parallel_decode(world, canvas, policy, commit="sample")
    assert decoded.evaluations.tolist() == [world.length] * 30
    assert np.allclose(-world.log_prob(decoded.tokens.ids).numpy(), decoded.nats.numpy(), atol=1e-9)


def test_the_worlds_of_the_reproduction():
    """Closed forms: 8 chunks of 8 tokens; a chunk is known from its carrier, and what follows from its value."""
    for follow in (None, 0.9):
        world = HiddenChunks(follow=follow)
        assert world.entropy / 64 == pytest.approx(0.379768 if follow is None else 0.209168, abs=1e-6)
        blank = torch.full((1, 64), world.mask_token_id)
        fresh = world.masked_log_probs(blank, blank == world.mask_token_id)
        assert fresh.unique().tolist() == [pytest.approx(-math.log(8), abs=1e-11)]  # one value: ties are ties
        shown = blank.clone()
        shown[0, 8] = 3
        hidden = shown == world.mask_token_id
        chances = torch.zeros(64, 8, dtype=torch.float64)
        chances[hidden[0]] = world.masked_log_probs(shown, hidden).exp()
        for j in range(1, 8):
            assert chances[8 + j].argmax().item() == (3 + j) % 8
            assert chances[8 + j].max().item() == pytest.approx(0.98)
        if follow is None:
            assert chances[16:].unique().tolist() == [pytest.approx(1 / 8)]
        else:
            # Backward: a value before 3 is 2; forward: one after is 4; two after, 5 follows twice or from elsewhere.
            assert chances[0].tolist() == pytest.approx([0.1 / 7] * 2 + [0.9] + [0.1 / 7] * 5)
            assert chances[16, 4].item() == pytest.approx(0.9)
            assert chances[24, 5].item() == pytest.approx(0.81 + 0.01 / 7)
            assert chances[17, 5].item() == pytest.approx(0.9 * 0.98 + 0.1 * 0.02 / 7)


def test_refusals():
    for options, match in (
        ({"chunks": 0}, "at least 1"),
        ({"alphabet": 1}, "alphabet at least 2"),
        ({"keep": 1.0}, "keep must lie"),
        ({"follow": 0.0}, "follow must lie"),
        ({"carrier": 8}, "carrier must be one of the 8"),
    ):
        with pytest.raises(InputError, match=match):
            HiddenChunks(**options)
    world = WORLDS["independent"]
    blank = torch.full((1, 4), world.mask_token_id)
    with pytest.raises(InputError, match=r"shape \(B, 4\), got \(1, 3\)"):
        world.log_prob(blank[:, :3])
    with pytest.raises(InputError, match="pad nothing"):
        world.masked_log_probs(blank, blank > 0, torch.tensor([[True, True, True, False]]))
