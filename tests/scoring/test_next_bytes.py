"""The next byte against ratios of prefix masses, and what leaks against enumeration."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.scoring.covers import CoverEncoder, Tail
from loglik.scoring.next_bytes import next_byte_distributions, next_bytes
from zoo import CAUSAL, END, MASKED, SEQ2SEQ, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer

MAKE = {"byte level": byte_level_tokenizer, "characters": llama_tokenizer}


@cache
def model_of(name) -> CausalLM:
    return CausalLM(build(CAUSAL["llama"], 400, seed=1).double(), MAKE[name]())


@cache
def encoder_of(model) -> CoverEncoder:
    return CoverEncoder(model.tokenizer, bos="always", max_length=model.max_length)


def log_prob(model, rows, starts) -> torch.Tensor:
    with torch.no_grad():
        return model.log_prob(TokenBatch.from_lists(rows, starts=starts)).value


def log_mass(model, data: bytes) -> float:
    """log M of bytes: the model's probability of each cover behind BOS, one sequence at a time."""
    view = encoder_of(model).view
    rows = [[*fan.path, token] for fan in Tail(view, view.surface(data)).covers() for token in fan.tokens]
    bos = model.tokenizer.bos_token_id
    return float(torch.logsumexp(log_prob(model, [[bos, *row] for row in rows], [1] * len(rows)), 0))


TEXTS = ["hello wor", "hello ", "Ans", "a  ", "it's", "é漢", "h", "yes, it is 4", "x'"]


@pytest.mark.parametrize("name", MAKE)
def test_bytes_end_and_leak_sum_to_one(name):
    texts: list[str | bytes] = [*TEXTS, "", "é".encode()[:1], "a漢".encode()[:2], "x漢".encode()[:3]]
    for text, found in zip(texts, next_byte_distributions(model_of(name), texts, bos="always"), strict=True):
        total = torch.cat([found.log_probs, found.log_leak[None]]).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-9), text
        assert found.log_probs.shape == (257,)
        assert found.log_probs.dtype == torch.float64


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("text", ["hello ", "x'", b"x\xe6\xbc"])
def test_next_byte_is_a_ratio_of_masses(name, text):
    """Every one of the 256 bytes, each with covers of its own."""
    model = model_of(name)
    data = text.encode() if isinstance(text, str) else text
    found = next_bytes(model, text, bos="always")
    below = log_mass(model, data)
    possible = 0
    for byte in range(256):
        try:
            wanted = log_mass(model, data + bytes([byte])) - below
        except RowError:
            wanted = -math.inf  # no text goes on like this
        if byte == 0:
            continue
        possible += wanted > -math.inf
        assert float(found[byte]) == pytest.approx(wanted, abs=1e-9), byte
    assert possible > 3


@pytest.mark.parametrize("name", MAKE)
def test_first_byte_of_a_text(name):
    """M of nothing is 1, also where a space stands in front of every text."""
    model = model_of(name)
    found = next_bytes(model, "")
    for byte in b"hHaA1!\n\xc3\xf0":
        assert float(found[byte]) == pytest.approx(log_mass(model, bytes([byte])), abs=1e-9)
    tokenizer = model.tokenizer
    end = log_prob(model, [[tokenizer.bos_token_id, tokenizer.eos_token_id]], [1])
    assert float(found[256]) == pytest.approx(float(end), abs=1e-9)


@pytest.mark.parametrize("name", MAKE)
def test_end_is_eos_behind_the_encoding(name):
    model = model_of(name)
    tokenizer = model.tokenizer
    for text in TEXTS[:4]:
        ids = CoverEncoder(tokenizer).view.encode(text)
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        wanted = float(log_prob(model, [row], [1])) - log_mass(model, text.encode())
        assert float(next_bytes(model, text, bos="always")[256]) == pytest.approx(wanted, abs=1e-9)
    # Nothing ends inside a character.
    assert next_bytes(model, b"\xc3")[256] == -math.inf


@given(st.text(st.sampled_from("hel owrd'1\né漢"), min_size=1, max_size=6), st.integers(0, 2))
@settings(max_examples=6, deadline=None)
def test_the_bytes_of_any_text_multiply_to_its_mass(text, cut):
    """The chain rule, byte by byte, through characters: the product of next bytes is M."""
    model = model_of("byte level")
    data = text.encode()[: max(1, len(text.encode()) - cut)]
    texts = [data[:i] for i in range(len(data))]
    steps = [
        found.log_probs[byte]
        for found, byte in zip(next_byte_distributions(model, texts, encoder=encoder_of(model)), data, strict=True)
    ]
    assert float(torch.stack(steps).sum()) == pytest.approx(log_mass(model, data), abs=1e-8)


def test_leak_by_full_enumeration():
    """All tokens behind all covers that spell the text exactly: what is neither canonical nor EOS."""
    vocabulary = {END: 0, "a": 1, "b": 2, "ab": 3, "aba": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    model = CausalLM(build(CAUSAL["llama"], 5, seed=5).double(), tokenizer)
    [found] = next_byte_distributions(model, ["ab"])
    # Covers of "ab": [ab] and [aba]. Behind [ab] comes [ab], [aba], [b] or the end, but never [a]: that makes [aba].
    p = lambda *tokens: float(log_prob(model, [[0, *tokens]], [1]).exp())  # noqa: E731
    mass = p(3) + p(4)
    assert found.num_covers == 2
    assert float(found.log_leak.exp()) == pytest.approx(p(3, 1) / mass, rel=1e-9)
    assert float(found.log_probs[ord("b")].exp()) == pytest.approx(p(3, 2) / mass, rel=1e-9)
    assert float(found.log_probs[ord("a")].exp()) == pytest.approx((p(4) + p(3, 3) + p(3, 4)) / mass, rel=1e-9)
    assert float(found.log_probs[256].exp()) == pytest.approx(p(3, 0) / mass, rel=1e-9)


def test_the_space_in_front_leaks_where_it_never_stands_alone():
    """Every text has a space in front and begins with "a", which merges: the lone space begins no encoding."""
    backend = Tokenizer(models.BPE(vocab={END: 0, "a": 1, "Ġ": 2, "Ġa": 3}, merges=[("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    model = CausalLM(build(CAUSAL["llama"], 4, seed=5).double(), tokenizer)
    [found] = next_byte_distributions(model, [""])
    p = [float(log_prob(model, [[0, token]], [1]).exp()) for token in range(4)]
    assert float(found.log_probs[ord("a")].exp()) == pytest.approx(p[3], rel=1e-9)
    assert float(found.log_probs[256].exp()) == pytest.approx(p[0], rel=1e-9)
    assert float(found.log_leak.exp()) == pytest.approx(p[1] + p[2], rel=1e-9)


def test_a_space_at_the_end_does_not_change_the_next_word():
    """Covers of "hello " hold " world" too: its letter is not lost, as it is for the tokens behind a lone space."""
    model = model_of("byte level")
    view = CoverEncoder(model.tokenizer).view
    word = next(i for i, data in view.spelling.items() if data == b" world")
    ids = view.encode("hello")
    by_word = log_prob(model, [[model.tokenizer.bos_token_id, *ids, word]], [1])
    joint = next_bytes(model, "hello ", bos="always")[ord("w")] + log_mass(model, b"hello ")
    assert float(joint) >= float(by_word) - 1e-9


def test_bos_and_context():
    model = model_of("byte level")
    long = "hello world it is so"
    assert not torch.allclose(next_bytes(model, long, bos="always"), next_bytes(model, long, bos="never"))
    assert torch.equal(next_bytes(model, long), next_bytes(model, long, bos="never"))
    kept = encoder_of(model)
    assert torch.equal(next_bytes(model, long, encoder=kept), next_bytes(model, long, bos="always"))
    with pytest.raises(RowError, match="nothing before it"):
        next_bytes(model, "h", bos="never")
    with pytest.raises(RowError, match="nothing before it"):
        next_bytes(model, "", bos="never")
    with pytest.raises(RowError, match="the model's context is 64"):
        next_bytes(model, "x!" * 40)


def test_added_tokens_stand_fast():
    """What stands before the last of them is only conditioned on."""
    model = model_of("byte level")
    after = next_bytes(model, f"{END}hel", bos="never")
    assert torch.allclose(after, next_bytes(model, "hel", bos="always"), atol=1e-12)
    assert torch.allclose(next_bytes(model, f"hello{END}", bos="never")[256].exp() <= 1, torch.tensor(True))


def test_refusals():
    model = model_of("byte level")
    for text in (b"\x80", b"a\xff", "\ud800", "a\0"):
        with pytest.raises(RowError):
            next_bytes(model, text)
    with pytest.raises(InputError, match="per-token conditionals"):
        next_bytes(MaskedLM(build(MASKED["bert"], 70), bert_tokenizer()), "a")
    with pytest.raises(InputError, match="causal"):
        next_bytes(Seq2SeqLM(build(SEQ2SEQ["t5"], 400), byte_level_tokenizer()), "a")
