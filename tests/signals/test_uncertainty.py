"""Top-k entropy and mass against closed forms, scipy and a model's own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.signals import uncertainty
from loglik.signals.uncertainty import top_k_entropy, top_k_indicators, top_k_mass
from zoo import CAUSAL, SEQ2SEQ, build

V = 30


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(logits: torch.Tensor, k: int, base: float, renormalise: bool) -> tuple[float, float]:
    """Entropy and mass of one distribution from sorted probabilities, in numpy."""
    p = np.sort(scipy.special.softmax(logits.double().numpy()))[::-1][:k]
    q = p / p.sum() if renormalise else p
    return float(-sum(x * math.log(x, base) for x in q if x > 0)), float(p.sum())


@pytest.mark.parametrize("k", [1, 3, 16])
def test_uniform(k):
    logits = torch.full((2, 16), 7.0, dtype=torch.float64)
    torch.testing.assert_close(top_k_mass(logits, k), torch.full((2,), k / 16, dtype=torch.float64))
    torch.testing.assert_close(top_k_entropy(logits, k), torch.full((2,), math.log2(k), dtype=torch.float64))
    partial = top_k_entropy(logits, k, renormalise=False)
    torch.testing.assert_close(partial, torch.full((2,), k / 16 * math.log2(16), dtype=torch.float64))


@pytest.mark.parametrize("low", [-torch.inf, -1e4])
def test_one_hot(low):
    logits = torch.full((5,), low)
    logits[3] = 0.0
    for k in (1, 3, 5):
        assert top_k_mass(logits, k).item() == 1.0
        for renormalise in (True, False):
            assert top_k_entropy(logits, k, renormalise=renormalise).item() == 0.0


@pytest.mark.parametrize("base", [2.0, math.e, 10.0])
def test_all_tokens_give_the_shannon_entropy(base):
    logits = random_logits(20, 11)
    expected = scipy.stats.entropy(torch.softmax(logits, -1).numpy(), base=base, axis=-1)
    for renormalise in (True, False):
        got = top_k_entropy(logits, 11, base=base, renormalise=renormalise)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_sorted_probabilities(renormalise):
    logits = random_logits(4, 5, 12, seed=1)
    got, mass = top_k_entropy(logits, 4, base=3.0, renormalise=renormalise), top_k_mass(logits, 4)
    assert got.shape == mass.shape == (4, 5)
    expected = [[naive(logits[i, j], 4, 3.0, renormalise) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(got.numpy(), np.array(expected)[..., 0], atol=1e-12)
    np.testing.assert_allclose(mass.numpy(), np.array(expected)[..., 1], atol=1e-12)


def test_renormalised_entropy_follows_from_the_partial_one_and_the_mass():
    logits = random_logits(50, 12, seed=2)
    for k in (1, 4, 12):
        mass = top_k_mass(logits, k)
        expected = top_k_entropy(logits, k, renormalise=False) / mass + mass.log2()
        torch.testing.assert_close(top_k_entropy(logits, k), expected, atol=1e-12, rtol=1e-12)
        assert bool((top_k_entropy(logits, k) <= math.log2(k) + 1e-12).all())


def test_temperature_raises_the_entropy_and_lowers_the_mass():
    logits = random_logits(30, 12, seed=3)
    heat = [0.1, 0.5, 1.0, 2.0, 10.0, 1e3, 1e6]
    entropy = torch.stack([top_k_entropy(logits / t, 4) for t in heat])
    mass = torch.stack([top_k_mass(logits / t, 4) for t in heat])
    assert bool((entropy.diff(dim=0) > -1e-12).all())
    assert bool((mass.diff(dim=0) < 1e-12).all())
    torch.testing.assert_close(entropy[-1], torch.full((30,), 2.0, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(mass[-1], torch.full((30,), 1 / 3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_mass_never_exceeds_one():
    """Rounding of float32 sums would."""
    assert bool((top_k_mass(random_logits(200, 300, seed=5).float(), 300) <= 1).all())


def test_half_precision_logits_are_widened():
    logits = random_logits(40, 500, seed=4).bfloat16()
    assert top_k_entropy(logits).dtype == top_k_mass(logits).dtype == torch.float32
    torch.testing.assert_close(top_k_mass(logits).double(), top_k_mass(logits.double()), atol=1e-6, rtol=0)
    torch.testing.assert_close(top_k_entropy(logits).double(), top_k_entropy(logits.double()), atol=1e-5, rtol=0)


def test_impossible_tokens_among_the_top_count_nothing_in_value_and_gradient():
    logits = torch.tensor([0.0, 1.0, -torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
    expected = scipy.stats.entropy(scipy.special.softmax([0.0, 1.0]), base=2)
    for renormalise in (True, False):
        got = top_k_entropy(logits, 3, renormalise=renormalise)
        assert got.item() == pytest.approx(expected, abs=1e-12)
        (grad,) = torch.autograd.grad(got, logits)
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("k", [0, 13, -1, 2.0, True])
def test_k_out_of_range_is_refused(k):
    for signal in (top_k_entropy, top_k_mass):
        with pytest.raises(InputError, match="k must be from 1 to the vocabulary of 12"):
            signal(torch.zeros(2, 12), k)


@pytest.mark.parametrize("base", [1, 0.0, -2.0, math.inf, math.nan])
def test_base_out_of_range_is_refused(base):
    with pytest.raises(InputError, match="base must be"):
        top_k_entropy(torch.zeros(2, 12), 3, base=base)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_distribution_are_refused(bad):
    logits = torch.zeros(2, 3, 2)
    logits[1, 2] = torch.tensor(bad)
    with pytest.raises(InputError, match=r"the logits at \[1, 2\] are no distribution"):
        top_k_mass(logits, 1)


# --------------------------------------------------------------------------------------------------- of a model
ROWS = [[1, 5, 9, 2], [1, 7, 8, 4, 4, 11], [3, 3, 6]]


def rows(side="right"):
    return TokenBatch.from_lists(ROWS, starts=[2, 1, 1], padding_side=side)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_indicators_equal_full_logits(name):
    """Mean over the completion's positions alone; soft-capped and tied heads too."""
    model = CausalLM(build(CAUSAL[name], V))
    for side in ("left", "right"):
        got = top_k_indicators(model, rows(side), 4)
        for i, (ids, start) in enumerate(zip(ROWS, (2, 1, 1), strict=True)):
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
            values = [naive(z, 4, 2.0, True) for z in logits]
            assert got.entropy[i].item() == pytest.approx(sum(h for h, _ in values) / len(values), abs=1e-5)
            assert got.mass[i].item() == pytest.approx(sum(m for _, m in values) / len(values), abs=1e-5)


def test_options_reach_the_indicators():
    model = CausalLM(build(CAUSAL["llama"], V))
    bits, nats = (top_k_indicators(model, rows(), 4, base=b).entropy for b in (2.0, math.e))
    torch.testing.assert_close(bits * math.log(2), nats)
    one = top_k_indicators(model, TokenBatch.from_lists([[1, 5, 9]], starts=[2]), 4, renormalise=False)
    whole = top_k_indicators(model, TokenBatch.from_lists([[1, 5, 9]], starts=[2]), 4)
    assert whole.entropy.item() == pytest.approx(one.entropy.item() / one.mass.item() + math.log2(one.mass.item()))


def test_likelihood_of_the_same_pass_is_that_of_the_model():
    model = CausalLM(build(CAUSAL["llama"], V))
    for side in ("left", "right"):
        got = top_k_indicators(model, rows(side), 3).log_likelihood
        expected = model.log_prob(rows(side))
        torch.testing.assert_close(got.per_unit, expected.per_unit, atol=1e-5, rtol=1e-5)
        assert got.mask.equal(expected.mask)
        assert got.num_units.tolist() == [2, 5, 2]
        assert got.kind is Kind.EXACT
        assert not got.value.requires_grad


def test_chunks_bound_the_logits_and_change_nothing(monkeypatch):
    model = CausalLM(build(CAUSAL["llama"], V))
    whole = top_k_indicators(model, rows(), 4)
    seen = []
    plain = uncertainty._logits

    def watched(trunk, states):
        seen.append(len(states))
        return plain(trunk, states)

    monkeypatch.setattr(uncertainty, "_logits", watched)
    for positions in (1, 2, 5):
        monkeypatch.setattr(uncertainty, "_CHUNK_LOGITS", positions * V)
        seen.clear()
        cut = top_k_indicators(model, rows(), 4)
        assert max(seen) == positions
        torch.testing.assert_close(cut.entropy, whole.entropy, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(cut.mass, whole.mass, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(uncertainty, "_CHUNK_LOGITS", 1)  # less than one position: one at a time
    torch.testing.assert_close(top_k_indicators(model, rows(), 4).mass, whole.mass, atol=1e-6, rtol=1e-6)


def test_a_head_that_is_no_plain_matrix_is_used_as_it_is():
    model = CausalLM(build(CAUSAL["llama"], V))
    expected = top_k_indicators(model, rows(), 4)
    model.trunk._form = None  # what the trunk finds where the algebra is anything else
    assert model.trunk.head is None
    got = top_k_indicators(model, rows(), 4)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-6, rtol=1e-6)


def test_own_generations_are_read_like_any_batch():
    class Ends:
        eos_token_id, bos_token_id = 2, 1

    model = CausalLM(build(CAUSAL["llama"], V), Ends())
    drawn = model.sample(3, prompt=TokenBatch.from_lists([[1, 5]]), max_tokens=4, generator=torch.Generator())
    got = top_k_indicators(model, drawn)
    assert bool(((got.mass > 0) & (got.mass <= 1)).all())
    torch.testing.assert_close(got.log_likelihood.value, model.log_prob(drawn).value.detach(), atol=1e-5, rtol=1e-5)


def test_other_models_and_empty_rows_are_refused():
    with pytest.raises(InputError, match=r"top-k entropy needs a causal model.*Seq2SeqLM cannot"):
        top_k_indicators(Seq2SeqLM(build(SEQ2SEQ["t5"], V)), rows())
    model, batch = CausalLM(build(CAUSAL["llama"], V)), rows()
    batch.scored_mask[2] = False
    with pytest.raises(RowError, match="row 2: has no scored token"):
        top_k_indicators(model, batch)
    with pytest.raises(InputError, match="k must be from 1 to the vocabulary of 30, got 31"):
        top_k_indicators(model, rows(), 31)
