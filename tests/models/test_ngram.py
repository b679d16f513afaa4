"""The n-gram model against a reference with dictionaries, enumeration, a worked example and its own files."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import textwrap
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.models.batch import TokenBatch
from loglik.models.kneser_ney import FALLBACK_DISCOUNTS, KneserNey, NGramCounts, count_ngrams, estimate_discounts
from loglik.models.ngram import NGramLM, byte_tokenizer
from loglik.models.protocol import ChainRule, Model, Sampler, TextModel


# ---------------------------------------------------------------------- tools
def word_tokenizer(vocab_size: int, *, bos: str | None = "0", eos: str | None = "0") -> PreTrainedTokenizerFast:
    """Words "0", "1", ... with these ids."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def model_of(documents: list[list[int]], *, vocab_size: int, order: int, eos: str = "0") -> NGramLM:
    arrays = [np.array(document) for document in documents]
    counts = count_ngrams(arrays, vocab_size=vocab_size, order=order)
    return NGramLM(KneserNey(counts), word_tokenizer(vocab_size, eos=eos))


def random_documents(seed: int, *, vocab_size: int, eos: int) -> list[list[int]]:
    """Documents from BOS = 0 to EOS, with skewed and repetitive words, so that counts from 1 to 10 occur."""
    rng = np.random.default_rng(seed)
    words = np.arange(1, vocab_size) if eos == 0 else np.arange(1, vocab_size - 1)
    weights = 1.0 / np.arange(1, len(words) + 1) ** 1.5
    table = rng.dirichlet(weights, size=vocab_size)
    documents = []
    for length in rng.integers(0, 12, size=40):
        row = [0]
        for _ in range(length):
            row.append(int(rng.choice(words, p=table[row[-1]])))
        documents.append([*row, eos])
    return documents


class Reference:
    """Modified Kneser-Ney with dictionaries and recursion, straight from the formulas."""

    def __init__(self, documents: list[list[int]], *, vocab_size: int, order: int) -> None:
        self.vocab_size = vocab_size
        raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 2)]
        for document in documents:
            for k in range(1, order + 1):
                for end in range(1, len(document)):  # BOS itself is never predicted
                    if end - k + 1 >= 0:
                        raw[k][tuple(document[end - k + 1 : end + 1])] += 1
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for k in range(2, order + 1):
            for gram in raw[k]:
                before[gram[1:]].add(gram[0])
        self.followers: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        self.discounts = {}
        for k in range(1, order + 1):
            adjusted = {}
            for gram, count in raw[k].items():
                starts = k > 1 and gram[0] == 0
                adjusted[gram] = count if k == order or starts else len(before[gram])
                self.followers[gram[:-1]][gram[-1]] = adjusted[gram]
            n = Counter(adjusted.values())
            self.discounts[k] = (0.5, 1.0, 1.5)
            if n[1] and n[2] and n[3]:
                y = n[1] / (n[1] + 2 * n[2])
                triple = tuple(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))
                if all(1e-12 < d <= j for j, d in enumerate(triple, start=1)):
                    self.discounts[k] = triple
        self.order = order

    def prob(self, token: int, context: tuple[int, ...]) -> float:
        context = context[len(context) - min(len(context), self.order - 1) :]
        followers = self.followers.get(context)
        below = self.prob(token, context[1:]) if context else 1.0 / self.vocab_size
        if not followers:
            return below
        discount = self.discounts[len(context) + 1]
        total = sum(followers.values())
        held = sum(discount[min(count, 3) - 1] for count in followers.values())
        count = followers.get(token, 0)
        own = count - discount[min(count, 3) - 1] if count else 0.0
        return own / total + held / total * below


def all_contexts(vocab_size: int, longest: int) -> list[list[int]]:
    return [list(c) for k in range(1, longest + 1) for c in itertools.product(range(vocab_size), repeat=k)]


def distributions(model: NGramLM, contexts: list[list[int]]) -> torch.Tensor:
    return model.next_log_probs(TokenBatch.from_lists(contexts)).exp()


# ---------------------------------------------------------------------- the estimate
def test_bigrams_worked_by_hand():
    # "a b" and "a" with e = 0 (BOS and EOS), a = 1, b = 2. Bigrams ea:2, ab:1, be:1, ae:1; a(e) = 2, a(a) = a(b) = 1.
    # No bigram or unigram has count 3: both orders discount by 1/2, 1, 3/2.
    model = model_of([[0, 1, 2, 0], [0, 1, 0]], vocab_size=3, order=2)
    assert model.smoothing.discounts == [FALLBACK_DISCOUNTS] * 2
    expected = torch.tensor([[10, 31, 7], [22, 7, 19], [34, 7, 7]], dtype=torch.float64) / 48
    torch.testing.assert_close(distributions(model, [[0], [1], [2]]), expected, rtol=0, atol=1e-15)
    scored = model.log_prob(TokenBatch.from_lists([[0, 1, 2, 0], [0, 1, 0]]))
    by_hand = [math.log(31 / 48 * 19 / 48 * 34 / 48), math.log(31 / 48 * 22 / 48)]
    torch.testing.assert_close(scored.value, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-14, atol=0)


def test_adjusted_counts_by_hand():
    # e a b e and e b b e: "b" follows a, b, e; "e" follows b; "ab" and "bb" follow e, a or b; "ea", "eb" start.
    counts = count_ngrams(
        [np.array([0, 1, 2, 0]), np.array([0, 2, 2, 0]), np.array([0, 2, 2, 0])], vocab_size=3, order=3
    )
    assert counts.unigrams.tolist() == [1, 1, 3]
    bigrams = {divmod(int(key), 3): int(count) for key, count in zip(counts.keys[0], counts.counts[0], strict=True)}
    assert bigrams == {(0, 1): 1, (0, 2): 2, (1, 2): 1, (2, 0): 2, (2, 2): 1}
    assert counts.counts[1].tolist() == [1, 2, 1, 2]  # eab, ebb twice, abe, bbe twice


def test_discounts_follow_the_formula():
    # n1..n4 = 4, 2, 1, 1: Y = 1/2, so D1 = 1 - 2/2 * 2/4, D2 = 2 - 3/2 * 1/2, D3 = 3 - 4/2 * 1.
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 4, 9, 0, 0])
    assert estimate_discounts(counts) == (0.5, 1.25, 1.0)


@pytest.mark.parametrize(
    "counts",
    [
        [2, 2, 3],  # no singletons
        [1, 1, 3],  # no doubletons
        [1, 2, 2],  # no count of 3
        [1] * 2 + [2] + [3] * 4,  # D2 = 2 - 3/2 * 4 < 0
        [1] * 4 + [2] * 3 + [3] * 5,  # D2 = 2 - 3 * 4/10 * 5/3 = 0: a context could keep nothing for unseen tokens
        [],
    ],
)
def test_undefined_discounts_fall_back(counts):
    assert estimate_discounts(np.array(counts, dtype=np.int64)) == FALLBACK_DISCOUNTS


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("seed", "vocab_size", "eos"), [(0, 4, 0), (1, 5, 4), (2, 7, 0), (3, 12, 11)])
def test_equals_the_reference(order, seed, vocab_size, eos):
    documents = random_documents(seed, vocab_size=vocab_size, eos=eos)
    model = model_of(documents, vocab_size=vocab_size, order=order, eos=str(eos))
    reference = Reference(documents, vocab_size=vocab_size, order=order)
    for k in range(order):
        assert model.smoothing.discounts[k] == pytest.approx(reference.discounts[k + 1], abs=1e-12)
    rng = np.random.default_rng(seed)
    contexts = [document[:cut] for document in documents[:12] for cut in range(1, len(document) + 1)]
    contexts += [rng.integers(0, vocab_size, size=n).tolist() for n in rng.integers(1, 7, size=60)]
    got = distributions(model, contexts)
    expected = [[reference.prob(w, tuple(c)) for w in range(vocab_size)] for c in contexts]
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10)
    rows = [c for c in contexts if len(c) > 1]
    terms = model.log_prob(TokenBatch.from_lists(rows)).per_unit
    for row, got_terms in zip(rows, terms, strict=True):
        by_token = [math.log(reference.prob(row[t], tuple(row[:t]))) for t in range(1, len(row))]
        np.testing.assert_allclose(got_terms[1 : len(row)].numpy(), by_token, rtol=0, atol=1e-10)


def test_the_reference_corpora_use_estimated_discounts():
    """The comparison above would be blind to the estimates if every order fell back."""
    model = model_of(random_documents(3, vocab_size=12, eos=11), vocab_size=12, order=4)
    assert sum(triple != FALLBACK_DISCOUNTS for triple in model.smoothing.discounts) >= 3


# ---------------------------------------------------------------------- a distribution
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("seed", "eos"), [(5, 0), (6, 3)])
def test_every_context_has_a_positive_distribution(order, seed, eos):
    model = model_of(random_documents(seed, vocab_size=4, eos=eos), vocab_size=4, order=order, eos=str(eos))
    probs = distributions(model, all_contexts(4, 4))  # BOS in the middle, after EOS, never seen: all of them
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs), dtype=torch.float64), rtol=0, atol=1e-12)
    assert (probs > 0).all()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("documents", [[[0, 0]], [[0, 1, 0]], [[0, 1, 0], [0, 0]], [[0, 1, 1, 1, 1, 1, 1, 0]] * 7])
def test_tiny_data_stays_normalised(order, documents):
    model = model_of(documents, vocab_size=3, order=order)
    probs = distributions(model, all_contexts(3, 4))
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs), dtype=torch.float64), rtol=0, atol=1e-12)
    assert (probs > 0).all()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_all_strings_and_unfinished_prefixes_have_total_probability_one(order):
    model = model_of(random_documents(7, vocab_size=3, eos=0), vocab_size=3, order=order)
    longest = 7
    ended = [[0, *s, 0] for n in range(longest) for s in itertools.product((1, 2), repeat=n)]
    unfinished = [[0, *s] for s in itertools.product((1, 2), repeat=longest)]
    total = model.log_prob(TokenBatch.from_lists(ended + unfinished)).value.exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_order_one_is_the_discounted_unigram():
    # Counts a: 3, e: 2, BOS not counted; discounts fall back: (2 - 1 + ...)/5. Held back 1 + 1.5 of 5, shared by three.
    model = model_of([[0, 1, 1, 0], [0, 1, 0]], vocab_size=3, order=1)
    expected = torch.tensor([1.0, 1.5, 0.0], dtype=torch.float64) / 5 + 2.5 / 5 / 3
    torch.testing.assert_close(distributions(model, [[0], [2, 1]]), expected.expand(2, 3), rtol=0, atol=1e-15)


# ---------------------------------------------------------------------- the protocol
@pytest.fixture(scope="module")
def small() -> NGramLM:
    return model_of(random_documents(8, vocab_size=6, eos=0), vocab_size=6, order=3)


def test_has_the_capabilities_it_names(small):
    for capability in (Model, TextModel, ChainRule, Sampler):
        assert isinstance(small, capability)
    scored = small.log_prob(TokenBatch.from_lists([[0, 1, 2]]))
    assert (scored.kind, scored.unit, scored.value.dtype) == (Kind.EXACT, Unit.TOKEN, torch.float64)
    assert scored.num_units.tolist() == [2]
    assert small.max_length is None


def test_padding_and_batch_change_nothing(small):
    rng = np.random.default_rng(0)
    rows = [[0, *rng.integers(1, 6, size=n).tolist()] for n in (1, 3, 9, 20)]
    alone = [small.score_tokens(TokenBatch.from_lists([row])) for row in rows]
    for side in ("left", "right"):
        batch = TokenBatch.from_lists(rows, padding_side=side, pad_id=5)
        together, greedy = small.score_tokens(batch)
        # The terms are the same to the last bit; torch orders the sum of a longer row differently.
        torch.testing.assert_close(together.value, torch.cat([a.value for a, _ in alone]), rtol=1e-14, atol=0)
        for i, (single, first) in enumerate(alone):
            assert torch.equal(together.per_unit[i][batch.attention_mask[i]], single.per_unit[0])
            assert torch.equal(greedy[i][batch.attention_mask[i]], first[0])
        assert not together.per_unit[~batch.scored_mask].any()
        assert torch.equal(
            small.next_log_probs(batch), torch.cat([small.next_log_probs(TokenBatch.from_lists([r])) for r in rows])
        )


def test_holes_inside_a_row_do_not_exist(small):
    ids = torch.tensor([[0, 9, 2, 77, 3, 1]])
    real = torch.tensor([[True, False, True, False, True, True]])
    scored = torch.tensor([[False, True, True, True, False, True]])  # a padding token cannot be scored
    got = small.log_prob(TokenBatch(ids, real, scored))
    plain = small.log_prob(TokenBatch.from_lists([[0, 2, 3, 1]])).per_unit[0]
    assert got.per_unit[0].tolist() == [0, 0, plain[1], 0, 0, plain[3]]
    assert got.num_units.tolist() == [2]


def test_scoring_starts_where_asked(small):
    row = [0, 1, 2, 3, 0]
    whole = small.log_prob(TokenBatch.from_lists([row])).per_unit[0]
    completion = small.log_prob(TokenBatch.from_lists([row], starts=[3]))
    assert float(completion.value) == pytest.approx(float(whole[3:].sum()), abs=1e-14)


def test_first_choice_is_the_argmax_with_ties(small):
    rng = np.random.default_rng(1)
    rows = [[0, *rng.integers(0, 6, size=12).tolist()] for _ in range(40)]
    likelihood, greedy = small.score_tokens(TokenBatch.from_lists(rows))
    prefixes = TokenBatch.from_lists([row[:t] for row in rows for t in range(1, 13)])
    conditionals = small.next_log_probs(prefixes).reshape(40, 12, 6)
    targets = torch.tensor(rows)[:, 1:, None]
    chosen = conditionals.gather(-1, targets).squeeze(-1)
    assert torch.equal(likelihood.per_unit[:, 1:], chosen)
    assert torch.equal(greedy[:, 1:], chosen == conditionals.max(-1).values)
    assert not greedy[:, 0].any()
    assert 0 < greedy.float().mean() < 1
    tied = model_of([[0, 1, 0], [0, 2, 0]], vocab_size=3, order=2)  # "a" and "b" are equally probable after BOS
    assert tied.score_tokens(TokenBatch.from_lists([[0, 1], [0, 2], [0, 0]]))[1][:, 1].tolist() == [True, True, False]


def test_an_empty_batch_and_rows_without_scores(small):
    assert len(small.log_prob(TokenBatch.from_lists([]))) == 0
    assert small.next_log_probs(TokenBatch.from_lists([])).shape == (0, 6)
    nothing = small.log_prob(TokenBatch.from_lists([[0], []], scored_from=[1, 0]))
    assert nothing.value.tolist() == [0, 0]
    assert nothing.num_units.tolist() == [0, 0]


def test_what_cannot_be_scored_is_refused(small):
    with pytest.raises(
        ValueError, match=r"^row 1: the first token cannot be scored, nothing stands before it; prepend"
    ):
        small.log_prob(TokenBatch.from_lists([[0, 1], [0, 1]], scored_from=[1, 0]))
    with pytest.raises(ValueError, match=r"^row 1: token id 6 is outside the vocabulary of 6 tokens$"):
        small.log_prob(TokenBatch.from_lists([[0, 1], [0, 6]]))
    with pytest.raises(ValueError, match="a prefix is empty"):
        small.next_log_probs(TokenBatch.from_lists([[0], []]))


# ---------------------------------------------------------------------- sampling
@pytest.mark.parametrize("prompt", [None, [0, 2]])
def test_samples_have_the_enumerated_distribution(prompt):
    """Chi-square over all outcomes of up to four tokens, level 1e-3, fixed seed."""
    model = model_of(random_documents(9, vocab_size=4, eos=0), vocab_size=4, order=3)
    start = [0] if prompt is None else prompt
    outcomes = [(*s, 0) for n in range(4) for s in itertools.product((1, 2, 3), repeat=n)]
    outcomes += list(itertools.product((1, 2, 3), repeat=4))
    scored = TokenBatch.from_lists([[*start, *o] for o in outcomes], starts=[len(start)] * len(outcomes))
    probs = model.log_prob(scored).value.exp().numpy()
    assert probs.sum() == pytest.approx(1.0, abs=1e-12)
    draws = 20_000
    given = None if prompt is None else TokenBatch.from_lists([prompt])
    samples = model.sample(draws, prompt=given, generator=torch.Generator().manual_seed(20), max_tokens=4)
    assert len(samples) == draws
    assert torch.equal(samples.scored_mask.sum(1), samples.attention_mask.sum(1) - len(start))
    drawn = Counter(
        tuple(ids[real].tolist()[len(start) :]) for ids, real in zip(samples.ids, samples.attention_mask, strict=True)
    )
    assert set(drawn) <= set(outcomes)
    common = probs * draws >= 5
    observed = np.array([drawn[o] for o in outcomes], dtype=float)
    merged = np.append(observed[common], observed[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * draws
    keep = expected > 0
    assert stats.chisquare(merged[keep], expected[keep]).pvalue > 1e-3


# ---------------------------------------------------------------------- text
def test_byte_tokenizer_is_the_bytes_with_offsets():
    tokenizer = byte_tokenizer()
    text = "".join(chr(c) for c in (*range(1, 0x800), 0x20AC, 0xFFFD, 0x1F600, 0x10FFFF)) + "  é\r\n"
    encoding = tokenizer.backend_tokenizer.encode(text)
    assert encoding.ids == list(text.encode())
    assert [text[a:b] for a, b in encoding.offsets] == [c for c in text for _ in c.encode()]
    assert tokenizer.decode(encoding.ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 256, 257)
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(list(range(257)))) == list(range(257))


def test_training_reads_text_as_the_tokenizer_does():
    texts = ["héllo world", "", "a<|endoftext|>b<|endoftext|>", " щ\n\n", "hello there"]
    fast, plain = NGramLM.train(texts, order=3), NGramLM.train(texts, order=3, tokenizer=byte_tokenizer())
    by_hand = [np.array([256, *byte_tokenizer()(t)["input_ids"], 256]) for t in texts]
    expected = count_ngrams(by_hand, vocab_size=257, order=3)
    for model in (fast, plain):
        got = model.smoothing.counts
        assert np.array_equal(got.unigrams, expected.unigrams)
        for a, b in zip((*got.keys, *got.counts), (*expected.keys, *expected.counts), strict=True):
            assert np.array_equal(a, b)


def test_another_tokenizer_gives_bos_and_eos():
    model = NGramLM.train(["1 2", "1"], order=2, tokenizer=word_tokenizer(3))
    hand = model_of([[0, 1, 2, 0], [0, 1, 0]], vocab_size=3, order=2)
    everything = all_contexts(3, 2)
    assert torch.equal(distributions(model, everything), distributions(hand, everything))
    without_bos = NGramLM.train(["1 2", "1"], order=2, tokenizer=word_tokenizer(3, bos=None))
    assert torch.equal(distributions(without_bos, everything), distributions(hand, everything))
    assert without_bos.sample(2, max_tokens=1).ids[:, 0].tolist() == [0, 0]


def test_longer_contexts_predict_text_better():
    train = [inspect.getsource(module) for module in (argparse, inspect, json, json.decoder)]
    held_out = inspect.getsource(textwrap)
    batch = TokenBatch.from_lists([[256, *held_out.encode()]])
    rates = [
        NGramLM.train(train, order=order).log_prob(batch).bits_per_byte(torch.tensor([len(held_out.encode())])).item()
        for order in (1, 2, 3)
    ]
    assert math.log2(257) > rates[0] > rates[1] > rates[2] > 1.0


def test_scores_text_through_the_library(tmp_path):
    NGramLM.train(["the cat sat", "the dog sat", "a cat ran"], order=4).save_pretrained(tmp_path)
    model = loglik.load(tmp_path)
    scored = loglik.score(model, ["the cat", ("the", " dög")])
    rows = TokenBatch.from_lists([[256, *b"the cat"], [*b"the", *" dög".encode()]], starts=[1, 3])
    torch.testing.assert_close(scored.value.double(), model.log_prob(rows).value, rtol=1e-6, atol=0)
    assert scored.num_units.tolist() == [7, 5]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is nothing to train on: no text has a token"),
        (["", ""], {}, "there is nothing to train on: no text has a token"),
        (["a"], {"order": 0}, "order must be at least 1, got 0"),
        ("a text", {}, r"texts must be several documents, not one string; give \[text\]"),
        (["a"], {"tokenizer": word_tokenizer(3, eos=None)}, "the tokenizer has no EOS token, .*; add one to it"),
        (["a", 3], {}, "text 1: a document must be a string, got int"),
        (
            ["a", "b\ud800"],
            {},
            r"text 1: the text has a lone surrogate \(U\+D800\) at character 1: remove or replace it",
        ),
    ],
)
def test_training_refuses_in_one_sentence(texts, options, message):
    with pytest.raises((InputError, RowError), match=f"^{message}$"):
        NGramLM.train(texts, **options)


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize(("texts", "order"), [(["the cat sat", "the dog sat", "a cat"], 4), (["a"], 6), (["ab"], 1)])
def test_saved_and_loaded_is_the_same_to_the_last_bit(tmp_path, texts, order):
    model = NGramLM.train(texts, order=order)
    model.save_pretrained(tmp_path / "new" / "model")
    again = NGramLM.from_pretrained(tmp_path / "new" / "model")
    assert again.smoothing.discounts == model.smoothing.discounts
    assert (again.order, again.vocab_size) == (order, 257)
    batch = TokenBatch.from_lists([[256, *b"the dog"], [256, *b"zzz", 256]])
    assert torch.equal(again.log_prob(batch).per_unit, model.log_prob(batch).per_unit)
    assert torch.equal(again.next_log_probs(batch), model.next_log_probs(batch))
    assert again.tokenizer("é<|endoftext|>")["input_ids"] == [195, 169, 256]
    again.save_pretrained(tmp_path / "copy")
    for path in (tmp_path / "new" / "model").glob("loglik_ngram.*"):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_saved_discounts_are_used(tmp_path):
    model = NGramLM.train(["the cat sat", "the dog sat"], order=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "loglik_ngram.json"
    settings = json.loads(path.read_text())
    settings["discounts"] = [[0.1, 0.2, 0.3]] * 2
    path.write_text(json.dumps(settings))
    other = KneserNey(model.smoothing.counts, [[0.1, 0.2, 0.3]] * 2)
    context = np.array([[256, ord("t")]])
    assert np.array_equal(NGramLM.from_pretrained(tmp_path).smoothing.next_probs(context), other.next_probs(context))


def _cut(path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "loglik_ngram.json").unlink(), "has no loglik_ngram.json, so it holds no n-gram model"),
        (
            lambda d: (d / "loglik_ngram.safetensors").unlink(),
            "has no loglik_ngram.safetensors; copy the whole directory",
        ),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; copy the whole directory"),
        (
            lambda d: _cut(d / "loglik_ngram.json", 0.5),
            "loglik_ngram.json in .* is damaged or truncated; copy it again",
        ),
        (lambda d: _cut(d / "loglik_ngram.safetensors", 0.7), "loglik_ngram.safetensors in .* is damaged or truncated"),
        (lambda d: _cut(d / "loglik_ngram.safetensors", 0), "loglik_ngram.safetensors in .* is damaged or truncated"),
        (lambda d: _cut(d / "tokenizer.json", 0.5), "the tokenizer in .* is damaged or truncated"),
        (
            lambda d: _edit(d / "loglik_ngram.json", format_version=2),
            "has format version 2, and .* reads 1; train the mod",
        ),
        (lambda d: _edit(d / "loglik_ngram.json", order=None), "gives no usable 'order'"),
        (lambda d: _edit(d / "loglik_ngram.json", order=2), r"is damaged \(counts.3 does not fit the settings\)"),
        (lambda d: _edit(d / "loglik_ngram.json", vocab_size=9), r"is damaged \(counts.1 does not fit the settings\)"),
        (
            lambda d: _edit(d / "loglik_ngram.json", discounts=[[2, 2, 2]] * 3),
            r"is damaged \(give 3 times three discou",
        ),
        (lambda d: _edit(d / "loglik_ngram.json", discounts=[3, 4, None]), "is damaged"),
        (lambda d: word_tokenizer(3).save_pretrained(d), "has 3 tokens and the n-gram model has 257; put back"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage, message):
    NGramLM.train(["the cat sat", "the dog sat"], order=3).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        NGramLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is or lies below a file; give a directory to save to"):
        NGramLM.train(["a"]).save_pretrained(tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("unigrams", "keys", "counts", "message"),
    [
        ([0, 0], [[0]], [[1]], "not all zero"),
        ([1, -1], [[0]], [[1]], "must not be negative"),
        ([1, 1], [[0, 1]], [[1]], "every 2-gram needs one positive count"),
        ([1, 1], [[0, 1]], [[1, 0]], "every 2-gram needs one positive count"),
        ([1, 1], [[1, 1]], [[1, 1]], "must rise from 0 to below 4"),
        ([1, 1], [[1, 4]], [[1, 1]], "must rise from 0 to below 4"),
        ([1, 1], [[-1, 3]], [[1, 1]], "must rise from 0 to below 4"),
        ([1, 1], [[0], [1]], [[1], [1]], "a 3-gram ends in 2 tokens that are not in their table"),
    ],
)
def test_tables_that_do_not_fit_are_refused(unigrams, keys, counts, message):
    with pytest.raises(ValueError, match=message):
        KneserNey(NGramCounts(np.array(unigrams), tuple(map(np.array, keys)), tuple(map(np.array, counts))))
