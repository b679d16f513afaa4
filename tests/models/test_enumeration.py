"""The probabilities of all strings sum to one, for a tiny random model of every family with an exact likelihood."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, SEQ2SEQ, build

VOCABULARY, EOS, LONGEST = 5, 2, 4


def all_strings() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Strings ended by EOS of at most LONGEST tokens, and the strings of LONGEST tokens without one."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    ended = [(*s, EOS) for n in range(LONGEST) for s in product(others, repeat=n)]
    return ended, list(product(others, repeat=LONGEST))


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_all_strings_sum_to_one(name):
    """Every string either ends within LONGEST tokens or begins with one of the unended strings of that length."""
    model = CausalLM(build(CAUSAL[name], VOCABULARY)) if name in CAUSAL else Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY))
    ended, unended = all_strings()
    prompt = [1, 3]
    rows = [[*prompt, *string] for string in ended + unended]
    with torch.no_grad():
        value = model.log_prob(TokenBatch.from_lists(rows, starts=[len(prompt)] * len(rows))).value
    assert value.std() > 0.5  # a model that predicts nothing in particular would hide mistakes
    assert float(value.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_next_log_probs_are_the_terms_of_log_prob(name):
    model = CausalLM(build(CAUSAL[name], VOCABULARY)) if name in CAUSAL else Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY))
    rows, starts = [[1, 3, 4, 0], [1, 3, 3]], [2, 2]
    with torch.no_grad():
        nexts = model.next_log_probs(
            TokenBatch.from_lists([row[:-1] for row in rows], starts=starts, padding_side="left")
        )
        terms = model.log_prob(TokenBatch.from_lists(rows, starts=starts)).per_unit
    torch.testing.assert_close(nexts.exp().sum(-1), torch.ones(2), atol=1e-5, rtol=0)
    assert terms is not None
    assert nexts[0, 0].item() == pytest.approx(terms[0, 3].item(), abs=1e-5)
    assert nexts[1, 3].item() == pytest.approx(terms[1, 2].item(), abs=1e-5)


class Ends:
    """All that sampling asks of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = 1


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sampling_follows_the_scored_distribution(name):
    """Chi-square of 20,000 ancestral samples against the enumerated distribution, at level 1e-3, fixed seed."""
    from scipy.stats import chisquare

    if name in CAUSAL:
        model = CausalLM(build(CAUSAL[name], VOCABULARY), Ends())
    else:
        model = Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY), Ends())
    draws = 20_000
    prompt = TokenBatch.from_lists([[1, 3]])
    batch = model.sample(draws, prompt=prompt, max_tokens=3, generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[int, ...], int] = {}
    for ids, real in zip(batch.ids, batch.attention_mask, strict=True):
        key = tuple(ids[real].tolist()[2:])
        seen[key] = seen.get(key, 0) + 1
    others = [token for token in range(VOCABULARY) if token != EOS]
    strings = [(*s, EOS) for n in range(3) for s in product(others, repeat=n)] + list(product(others, repeat=3))
    with torch.no_grad():
        rows = [[1, 3, *string] for string in strings]
        exact = model.log_prob(TokenBatch.from_lists(rows, starts=[2] * len(rows))).value.double().exp()
    assert set(seen) <= set(strings)
    expected = exact / exact.sum() * draws
    counts = torch.tensor([seen.get(string, 0) for string in strings], dtype=torch.float64)
    # Rare strings are pooled with the rarest common one, so that the chi-square approximation holds.
    order = expected.argsort()
    pooled = int((expected < 5).sum()) + 1
    observed = torch.cat([counts[order[:pooled]].sum().reshape(1), counts[order[pooled:]]])
    wanted = torch.cat([expected[order[:pooled]].sum().reshape(1), expected[order[pooled:]]])
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_sampling_without_anything_to_start_from():
    with pytest.raises(ValueError, match="needs a tokenizer with a BOS token"):
        CausalLM(build(CAUSAL["gpt2"], VOCABULARY)).sample(1)
    with pytest.raises(ValueError, match="given a source"):
        Seq2SeqLM(build(SEQ2SEQ["t5"], VOCABULARY)).sample(1)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_double_precision_is_kept(name):
    """float64 weights give float64 distributions, normalised accordingly."""
    raw = build((CAUSAL | SEQ2SEQ)[name], VOCABULARY).double()
    model = CausalLM(raw) if name in CAUSAL else Seq2SeqLM(raw)
    with torch.no_grad():
        nexts = model.next_log_probs(TokenBatch.from_lists([[1, 3]], starts=[2]))
    assert nexts.dtype == torch.float64
    torch.testing.assert_close(nexts.exp().sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-12, rtol=0)
