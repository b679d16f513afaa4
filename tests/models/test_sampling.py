"""Ancestral sampling from a Markov chain whose distribution is known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from loglik.models.batch import TokenBatch
from loglik.models.sampling import ancestral_samples

EOS = 2


class Chain:
    """Token 0 leads to 1 and token 1 to 0, each with probability 0.6; either ends with 0.3 and repeats with 0.1."""

    table = torch.tensor([[0.1, 0.6, 0.3], [0.6, 0.1, 0.3], [0.5, 0.5, 0.0]], dtype=torch.float64)

    def __init__(self, *, bos: int | None = EOS, eos: int | None = EOS) -> None:
        self.tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
        self.widths: list[int] = []

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        self.widths.append(prefix.ids.shape[1])
        last = prefix.ids.gather(1, prefix.attention_mask.sum(1, keepdim=True) - 1).squeeze(1)
        return self.table[last].log()


def rows_of(samples: TokenBatch) -> list[list[int]]:
    return [ids[real].tolist() for ids, real in zip(samples.ids, samples.attention_mask, strict=True)]


def test_transitions_have_their_probabilities():
    """Chi-square of the transitions out of both states, level 1e-3, fixed seed."""
    prompt = TokenBatch.from_lists([[0]])
    rows = rows_of(ancestral_samples(Chain(), 4000, prompt=prompt, generator=torch.Generator().manual_seed(0)))
    observed = torch.zeros(2, 3)
    for row in rows:
        for a, b in itertools.pairwise(row):
            observed[a, b] += 1
    for state in (0, 1):
        expected = Chain.table[state] * float(observed[state].sum())
        assert stats.chisquare(observed[state].numpy(), expected.numpy()).pvalue > 1e-3


def test_rows_end_at_eos_or_the_limit_and_score_the_completion():
    prompt = TokenBatch.from_lists([[0, 1], [1]], padding_side="left")
    samples = ancestral_samples(Chain(), 50, prompt=prompt, generator=torch.Generator().manual_seed(1), max_tokens=3)
    rows = rows_of(samples)
    assert [row[:2] for row in rows[:50]] == [[0, 1]] * 50
    assert {row[0] for row in rows[50:]} == {1}
    for row, start, scored in zip(rows, [2] * 50 + [1] * 50, samples.scored_mask, strict=True):
        drawn = row[start:]
        assert EOS not in drawn[:-1]
        assert drawn[-1] == EOS or len(drawn) == 3
        assert scored.nonzero().flatten().tolist() == list(range(start, len(row)))


def test_without_eos_every_row_is_full():
    samples = ancestral_samples(Chain(eos=None), 5, generator=torch.Generator().manual_seed(2), max_tokens=6)
    assert samples.ids.shape == (5, 7)
    assert samples.attention_mask.all()


def test_a_limited_context_changes_nothing_for_a_model_that_looks_no_further():
    whole, limited = Chain(), Chain()
    a = ancestral_samples(whole, 20, generator=torch.Generator().manual_seed(3), max_tokens=8)
    b = ancestral_samples(limited, 20, generator=torch.Generator().manual_seed(3), max_tokens=8, context=1)
    assert rows_of(a) == rows_of(b)
    assert whole.widths == list(range(1, len(whole.widths) + 1))
    assert set(limited.widths) == {1}


def test_no_tokens_and_no_bos():
    samples = ancestral_samples(Chain(), 2, max_tokens=0)
    assert rows_of(samples) == [[EOS]] * 2
    assert not samples.scored_mask.any()
    with pytest.raises(ValueError, match="needs a tokenizer with a BOS token; give a prompt"):
        ancestral_samples(Chain(bos=None), 1)
