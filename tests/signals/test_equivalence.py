"""Meanings of answers: what exact match forgives, judges, embeddings, and a model's own states."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.signals.equivalence import (
    by_embedding,
    by_hidden_states,
    by_judge,
    exact_match,
    mean_states,
    meanings,
    sentence_embedder,
)
from zoo import CAUSAL, build, byte_level_tokenizer, llama_tokenizer


def test_exact_match_forgives_form_and_no_content():
    same = ["The answer.", "answer", "  ANSWER!", "an 'answer'", "(answer)"]
    assert exact_match("", same) == [0] * 5
    apart = ["5", "-5", "3.5", "35", "$5", ".5", "A", "?", "!", "a b", "b"]
    assert exact_match("", apart)[:9] == list(range(9))
    assert exact_match("", ["the b", "b", "a b"]) == [0] * 3
    assert exact_match("", ["ﬁne", "fine", "x  y", "x y"]) == [0, 0, 1, 1]


def test_judges_and_embeddings():
    asked = []

    def entails(prompt, first, second):
        asked.append((prompt, first, second))
        return set(second) <= set(first)

    texts = ["ab", "ba", "abc", "c"]
    assert by_judge(entails)("q", texts) == [0, 0, 1, 2]
    assert set(asked) >= {("q", "ab", "ba"), ("q", "ba", "ab")}
    assert by_judge(entails, both_ways=False)("q", ["abc", "ab", "c"]) == [0, 0, 0]

    angles = {"e": 0.0, "f": 20.0, "g": 40.0, "h": 180.0}

    def embed(given):
        return [[7 * math.cos(math.radians(angles[t])), 7 * math.sin(math.radians(angles[t]))] for t in given]

    near = math.cos(math.radians(25))
    assert by_embedding(embed, threshold=near)("", ["e", "f", "g", "h"]) == [0, 0, 1, 2]
    assert by_embedding(embed, threshold=near)("", ["f", "e", "g", "h"]) == [0, 0, 0, 1]
    assert by_embedding(embed, threshold=1)("", ["g", "g", "f"]) == [0, 0, 1]
    assert by_embedding(lambda t: np.array(embed(t)), threshold=-1)("", ["e", "h"]) == [0, 0]


def test_equivalences_that_go_wrong_are_refused():
    with pytest.raises(InputError, match=r"threshold must lie in \[-1, 1\], got 1.5"):
        by_embedding(lambda t: [[1.0]] * len(t), threshold=1.5)
    with pytest.raises(InputError, match=r"embed must give \(2, D\) numbers"):
        by_embedding(lambda t: [[1.0]])("", ["a", "b"])
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(InputError, match="the embedding of 'b' is 0 or not finite"):
            by_embedding(lambda t, bad=bad: [[1.0], [bad]])("", ["a", "b"])
    for classes in ([], [0], [0, 1, 2]):
        with pytest.raises(InputError, match=f"equivalence must give a class for each of 2 texts, got {len(classes)}"):
            meanings(lambda prompt, texts, classes=classes: classes, "", ["a", "b", "a"])


def test_blank_texts_have_a_meaning_of_their_own_and_are_not_embedded():
    seen = []

    def embed(texts):
        seen.extend(texts)
        return [[1.0, 0.0]] * len(texts)

    assert by_embedding(embed)("", ["", "a", "  ", "b"]) == [0, 1, 0, 1]
    assert seen == ["a", "b"]
    assert by_embedding(lambda texts: 1 / 0)("", [" ", ""]) == [0, 0]


# ------------------------------------------------------------------------------------------------- hidden states
def states_of(model, ids):
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


def test_mean_states_are_means_over_the_texts_own_tokens():
    texts = ["hello world", "the answer is 42", "a"]
    bare = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    for size in (1, 2, 16):
        found = mean_states(bare, texts, batch_size=size)
        for row, text in zip(found, texts, strict=True):
            expected = states_of(bare, bare.tokenizer(text)["input_ids"]).mean(0)
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    # A BOS stands before every text: it is read and not counted, but where there is nothing else.
    adds = CausalLM(build(CAUSAL["llama"], 330), llama_tokenizer())
    ids = adds.tokenizer("hello world")["input_ids"]
    assert ids[0] == adds.tokenizer.bos_token_id
    torch.testing.assert_close(
        mean_states(adds, ["hello world"])[0], states_of(adds, ids)[1:].mean(0), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        mean_states(adds, ["", "hello"])[0], states_of(adds, [adds.tokenizer.bos_token_id])[0], atol=1e-5, rtol=0
    )
    half = CausalLM(build(CAUSAL["gpt2"], 330).bfloat16(), byte_level_tokenizer())
    assert mean_states(half, texts).dtype == torch.float32


def test_meanings_by_hidden_states_are_cosines_of_centred_means(tiny):
    texts = ["import os", "import sys", "return a + b", "return b + a", "class Point:"]
    centre = ["for i in range(3):", "x = 1", "def add(a, b):"]
    raw = mean_states(tiny, texts).double()
    moved = raw - mean_states(tiny, centre).double().mean(0)
    for vectors, given in ((raw, ()), (moved, centre)):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        cosine = (unit @ unit.T).numpy()
        for threshold in (0.3, 0.9, 0.95):
            expected, heads = [], []
            for row in range(len(texts)):
                number = next((n for n, head in enumerate(heads) if cosine[head, row] >= threshold), len(heads))
                heads += [row] if number == len(heads) else []
                expected.append(number)
            assert by_hidden_states(tiny, threshold=threshold, centre=given)("any prompt", texts) == expected
    # What the default is for: near duplicates join and the rest does not.
    assert by_hidden_states(tiny, threshold=0.9, centre=centre)("", texts) == [0, 0, 1, 1, 2]
    # Without its centre everything looks alike sooner.
    spread = [float((v / v.norm(dim=1, keepdim=True)).mean(0).norm()) for v in (raw, moved)]
    assert spread[0] > spread[1]


def test_hidden_states_refuse_with_a_sentence(tiny):
    grams = NGramLM.train(["ab"], order=1)
    with pytest.raises(InputError, match="equivalence by hidden states needs hidden states"):
        by_hidden_states(grams)
    with pytest.raises(InputError, match="a mean hidden state needs hidden states"):
        mean_states(grams, ["a"])
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        mean_states(tiny, ["a"], batch_size=0)
    with pytest.raises(InputError, match="prompts must be several texts"):
        mean_states(tiny, [])
    with pytest.raises(InputError, match="centre must be several texts"):
        by_hidden_states(tiny, centre="ab")
    with pytest.raises(InputError, match=r"threshold must lie in \[-1, 1\], got 2"):
        by_hidden_states(tiny, threshold=2)
    with pytest.raises(RowError, match=r"text 1: has .* tokens and the model's context is"):
        mean_states(tiny, ["a", "zq " * 2000])
    with pytest.raises(InputError, match="the embedding of 'import os' is 0 or not finite"):
        by_hidden_states(tiny, centre=["import os"])("", ["import os", "x"])


def test_sentence_embeddings_come_from_a_directory(tmp_path, monkeypatch):
    asked = {}

    class SentenceTransformer:
        def __init__(self, path, **options):
            if "broken" in path:
                raise OSError("no weights")
            asked.update(options, path=path)

        def encode(self, texts, **options):
            assert isinstance(texts, list)
            return np.array([[1.0, float("not" in text)] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    same = by_embedding(sentence_embedder(tmp_path), threshold=0.9)
    assert same("", ["it is", "it is not", "so it is"]) == [0, 1, 0]
    # Nothing is fetched, and no pickle is opened.
    assert asked["local_files_only"] is True
    assert asked["model_kwargs"] == {"use_safetensors": True}
    with pytest.raises(InputError, match="nowhere is no directory"):
        sentence_embedder(tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    with pytest.raises(InputError, match="broken holds no sentence-transformers model that can be read: no weights"):
        sentence_embedder(tmp_path / "broken")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="need the package sentence-transformers: install it"):
        sentence_embedder(tmp_path)
