"""Greedy and drawn texts: those of transformers and of the table of uncertainties, each belonging to its prompt."""

from __future__ import annotations

import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.signals.drawing import first_line, greedy_texts, sample_texts
from loglik.signals.uncertainty_table import sequence_uncertainty

PROMPTS = ["def add(a, b):\n    return", "import os\nimport", "for"]


def test_greedy_texts_are_those_of_transformers(tiny):
    found = greedy_texts(tiny, PROMPTS, max_tokens=6)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        assert text == tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_samples_are_those_of_the_table_and_belong_to_their_prompt(tiny):
    found = sample_texts(tiny, PROMPTS, num_samples=3, max_tokens=5, seed=4)
    assert found == sequence_uncertainty(tiny, PROMPTS, num_samples=3, max_tokens=5, seed=4).samples
    assert sample_texts(tiny, PROMPTS[1:2], num_samples=3, max_tokens=5, seed=4)[0] == found[1]
    assert sample_texts(tiny, PROMPTS, num_samples=3, max_tokens=5, seed=5) != found


def test_samples_of_an_n_gram_model_have_its_frequencies():
    """b or c after a: a binomial count within four standard errors."""
    model = NGramLM.train(["ab", "ab", "ab", "ac"], order=2)
    (found,) = sample_texts(model, ["a"], num_samples=2000, max_tokens=1)
    ids = model.tokenizer("ab")["input_ids"]
    share = float(model.next_log_probs(TokenBatch.from_lists([ids[:-1]]))[0, ids[-1]].exp())
    count = sum(text == "b" for text in found)
    assert abs(count - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


def test_first_lines():
    assert [first_line(t) for t in (" 42 \nso", "\n\n a b\nc", "", " \n ")] == ["42", "a b", "", ""]


def test_refusals(tiny):
    with pytest.raises(InputError, match="num_samples must be at least 1, got 0"):
        sample_texts(tiny, PROMPTS, num_samples=0)
    for draw in (
        lambda p, **more: greedy_texts(tiny, p, **more),
        lambda p, **m: sample_texts(tiny, p, num_samples=1, **m),
    ):
        with pytest.raises(InputError, match="max_tokens must be at least 1, got 0"):
            draw(PROMPTS, max_tokens=0)
        with pytest.raises(InputError, match="prompts must be several texts"):
            draw("abc")
        with pytest.raises(RowError, match=r"prompt 1: has .* tokens, and 1023 more do not fit"):
            draw(["a", "b c d"], max_tokens=1023)

    class Mute:
        tokenizer, layout, max_length = tiny.tokenizer, "causal", None

    with pytest.raises(InputError, match="greedy decoding needs per-token conditionals"):
        greedy_texts(Mute(), ["a"])
    with pytest.raises(InputError, match="sampling without a sampler needs per-token conditionals"):
        sample_texts(Mute(), ["a"], num_samples=1)
