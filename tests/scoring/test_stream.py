"""A document read in pieces scores as it does whole, token by token, and little of it is held at a time."""

from __future__ import annotations

import io
import math
import random
import tracemalloc
from functools import partial

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.causal import CausalLM
from loglik.models.encode import TextEncoder
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.models.token_stream import BLOCK, token_stream
from loglik.scoring import stream
from loglik.scoring.engine import ScoreOptions, Scorer, TokenScores
from loglik.scoring.rows import InputRow
from loglik.scoring.stream import TextScore, TokenBlock, score_text
from loglik.scoring.windows import windows
from zoo import (
    CAUSAL,
    IDS,
    MASKED,
    SEQ2SEQ,
    bert_tokenizer,
    build,
    byte_level_tokenizer,
    llama_tokenizer,
    t5_tokenizer,
)

BYTES, NO_BOS, LLAMA, T5, BERT = (
    byte_level_tokenizer(),
    byte_level_tokenizer(bos=False),
    llama_tokenizer(),
    t5_tokenizer(),
    bert_tokenizer(),
)
WORDS = ["hello", "the", "answer", "is", "so", "42", "é", "漢字", "yes,", "\n", "then", "there", "  ", "wer" * 9, "😀"]
STATE = {"vocab_size": 330, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, **IDS}


def document(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chunks(text: str, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    edges = sorted(rng.choices(range(len(text) + 1), k=len(text) // 20))
    return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]


def causal(name: str, tokenizer) -> CausalLM:
    return CausalLM(build(CAUSAL[name], len(tokenizer)), tokenizer)


def mamba2() -> CausalLM:
    config = tf.Mamba2Config(num_heads=4, head_dim=8, n_groups=2, chunk_size=4, **STATE)
    return CausalLM(build(lambda _: tf.Mamba2ForCausalLM(config)), NO_BOS)


def bloom() -> CausalLM:
    config = tf.BloomConfig(vocab_size=330, hidden_size=16, n_layer=2, n_head=2, **IDS)
    return CausalLM(build(lambda _: tf.BloomForCausalLM(config)), BYTES)


def unigram() -> CausalLM:
    tokenizer = t5_tokenizer()
    tokenizer.bos_token = "<pad>"
    return causal("llama", tokenizer)


def ngram(order: int) -> NGramLM:
    return NGramLM.train([document(9, 400)], order=order)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in short documents."""
    monkeypatch.setattr(stream, "token_stream", partial(token_stream, block=300, overlap=120))


@pytest.fixture
def usual_blocks(small_blocks, monkeypatch):
    monkeypatch.setattr(stream, "token_stream", token_stream)


def whole(model, text: str, **options) -> TokenScores:
    row = Scorer(model, ScoreOptions(overflow="window", **options)).score_pairs([("", text)])[0]
    assert isinstance(row, TokenScores)
    return row


def compare(model, text: str, *, seed: int = 0, **options) -> TextScore:
    """Streamed and whole: every token, and every figure of the row."""
    blocks: list[TokenBlock] = []
    got = score_text(model, chunks(text, seed), callback=blocks.append, **options)
    row = whole(model, text, **options)
    assert [i for block in blocks for i in block.ids] == row.text.content
    assert [piece for block in blocks for piece in block.pieces] == row.text.pieces
    assert [block.first for block in blocks] == [sum(len(b.ids) for b in blocks[:k]) for k in range(len(blocks))]
    nats = [value for block in blocks for value in block.nats]
    assert [value is not None for value in nats] == row.scored
    terms = torch.tensor([value or 0.0 for value in nats], dtype=torch.float64)
    torch.testing.assert_close(terms, torch.tensor(row.terms, dtype=torch.float64), atol=1e-4, rtol=0)
    assert got.likelihood.value.item() == pytest.approx(math.fsum(v for v in nats if v is not None), abs=1e-9)
    assert got.likelihood.kind is row.kind
    assert (got.num_tokens, got.num_bytes, got.num_windowed) == (sum(row.scored), row.text.num_bytes, row.num_windowed)
    return got


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: causal("gpt2", BYTES), 300),
        (lambda: causal("gpt2", NO_BOS), 200),
        (lambda: causal("llama", LLAMA), 200),
        (unigram, 200),
        (lambda: MaskedLM(build(MASKED["bert"], len(BERT)), BERT), 110),
        (lambda: MaskedLM(build(MASKED["bert"], len(BERT)), BERT, variant="within_word_l2r"), 110),
    ],
    ids=["byte-level", "no-bos", "metaspace", "unigram", "masked", "masked-l2r"],
)
@pytest.mark.parametrize("stride", [None, 11])
def test_windows_of_the_whole(make, words, stride):
    got = compare(make(), document(1, words), stride=stride)
    assert got.num_windowed > 0
    assert got.num_windows > 3
    assert (got.context, got.stride) == (64, stride or 32)


@pytest.mark.parametrize("path", ["packed", "cached", "padded"])
@pytest.mark.parametrize("max_batch_tokens", [1, 100])
def test_paths_and_budgets_change_nothing(path, max_batch_tokens):
    compare(causal("gpt2", BYTES), document(2, 80), path=path, max_batch_tokens=max_batch_tokens)


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_bos_policies(bos):
    model = causal("gpt2", BYTES)
    got = compare(model, document(3, 90), bos=bos)
    assert got.bos == TextEncoder(BYTES, layout="causal", bos=bos).describe_bos()


@pytest.mark.parametrize("budget", [1, 7, None])
@pytest.mark.parametrize(("make", "per_pass"), [(lambda: causal("mamba", NO_BOS), 1), (mamba2, None)])
def test_state_space_networks_carry_their_state_on(make, per_pass, budget):
    """One pass, whatever the pieces: mamba continues right token by token only, mamba2 by any number."""
    model = make()
    carry = stream._find_carry(model, 64)
    assert carry is not None
    assert carry.per_pass == (per_pass or 64)
    got = compare(model, document(4, 120), max_batch_tokens=budget)
    assert (got.num_windows, got.num_windowed, got.context, got.stride) == (1, 0, None, None)


def test_a_state_that_continues_wrongly_is_not_carried_on(monkeypatch):
    model = mamba2()
    right = stream.cached_hidden
    monkeypatch.setattr(stream, "cached_hidden", lambda trunk, ids, cache: right(trunk, ids, None))
    monkeypatch.setattr(stream, "CONTEXT_WITHOUT_LIMIT", 40)
    assert stream._find_carry(model, 64) is None
    got = score_text(model, document(4, 120))
    assert got.num_windows > 3
    assert got.context == 40


def test_keys_and_values_that_would_grow_get_windows(monkeypatch):
    """Linear biases have no limit: one window while it fits, then windows of the stated size."""
    model = bloom()
    assert model.max_length is None
    assert stream._find_carry(model, 64) is None
    short = compare(model, document(5, 60))
    assert (short.num_windows, short.num_windowed, short.context) == (1, 0, 2048)
    monkeypatch.setattr(stream, "CONTEXT_WITHOUT_LIMIT", 50)
    got = score_text(model, document(5, 60))
    monkeypatch.setattr(CausalLM, "max_length", 50)
    row = whole(model, document(5, 60))
    assert (got.context, got.stride, got.num_windowed) == (50, 25, row.num_windowed)
    assert row.num_windowed > 0
    assert got.likelihood.value.item() == pytest.approx(row.log_prob, abs=1e-3)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("bos", ["always", "never"])
def test_ngram_windows_lose_nothing(monkeypatch, order, bos):
    monkeypatch.setattr(stream, "CONTEXT_WITHOUT_LIMIT", 30)
    got = compare(ngram(order), document(6, 100), bos=bos)
    assert (got.num_windows, got.num_windowed, got.context) == (1, 0, None)


@pytest.mark.usefixtures("usual_blocks")
def test_ngram_on_three_hundred_thousand_characters():
    text = document(7, 60_000)
    assert len(text) > 300_000
    model = ngram(4)
    got = score_text(model, io.StringIO(text, newline=""))
    row = whole(model, text)
    assert got.num_tokens == len(row.terms)
    assert got.num_bytes == len(text.encode())
    assert got.likelihood.value.item() == pytest.approx(row.log_prob, abs=1e-6)
    assert got.bits_per_byte().item() == pytest.approx(-row.log_prob / math.log(2) / len(text.encode()), rel=1e-12)


class Counter:
    """A causal model that gives the token's number as its log-probability, and remembers the largest batch."""

    kind, unit, layout = Kind.EXACT, Unit.TOKEN, "causal"

    def __init__(self, max_length: int | None, tokenizer=BYTES) -> None:
        self.max_length, self.tokenizer, self.most = max_length, tokenizer, 0

    def log_prob(self, x, *, draws=None):
        return self.score_tokens(x)[0]

    def score_tokens(self, x):
        self.most = max(self.most, x.ids.numel())
        terms = -x.ids.double().masked_fill(~x.scored_mask, 0.0)
        return LogLikelihood.from_per_unit(terms, x.scored_mask), x.scored_mask


@given(
    length=st.integers(1, 150),
    context=st.integers(1, 40),
    stride=st.none() | st.integers(1, 40),
    bos=st.sampled_from(["auto", "always", "never"]),
)
@settings(max_examples=300, deadline=None)
def test_windows_are_those_of_the_whole_text(length, context, stride, bos):
    """The same `Window`s, ids, places and counts, and the same refusals."""
    text = ("the answer is so. " * 40)[:length]
    model, seen = Counter(context), []
    row = TextEncoder(BYTES, layout="causal", bos=bos)
    options = {"layout": "causal", "max_length": context, "overflow": "window", "stride": stride}
    stride_is_bad = stride is not None and stride > context

    right = stream.Executor.run

    def run(self, cut):
        seen.extend(cut)
        return right(self, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Executor, "run", run)
        patch.setattr(stream, "token_stream", partial(token_stream, block=40, overlap=30))
        try:
            expected = list(windows(row.encode("", text), **options))
        except RowError as error:
            expected = str(error)
        if stride_is_bad:
            with pytest.raises(InputError, match=f"stride must not exceed the model's context of {context} tokens"):
                score_text(model, text, stride=stride, bos=bos)
        elif isinstance(expected, str):
            with pytest.raises(RowError) as caught:
                score_text(model, text, stride=stride, bos=bos)
            assert str(caught.value) == expected
        else:
            score_text(model, text, stride=stride, bos=bos)
            assert seen == expected


@pytest.mark.usefixtures("usual_blocks")
def test_reading_stays_close_to_scoring():
    """No window waits for more than a few others, and no text is read before it is needed."""
    model, alive = Counter(64), {"read": 0, "scored": 0, "ahead": 0, "windows": 0}

    def source():
        for chunk in chunks(document(8, 60_000)):
            alive["read"] += len(chunk)
            yield chunk

    def note(block: TokenBlock) -> None:
        alive["ahead"] = max(alive["ahead"], alive["read"] - alive["scored"])
        alive["scored"] += sum(map(len, block.pieces))

    right = stream.Executor.run

    def run(self, cut):
        alive["windows"] = max(alive["windows"], len(cut))
        return right(self, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Executor, "run", run)
        score_text(model, source(), callback=note, max_batch_tokens=256)
    assert alive["scored"] == alive["read"] > 12 * BLOCK
    assert alive["ahead"] < 3 * BLOCK
    assert 2 <= alive["windows"] <= 16
    assert model.most <= 256


def peak(text_size: int, callback) -> int:
    part = document(10, 50)
    tracemalloc.start()
    try:
        score_text(Counter(128), (part for _ in range(text_size // len(part))), callback=callback)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("callback", [None, lambda block: None])
def test_memory_does_not_grow_with_the_document(callback):
    """A list of the tokens, or of their numbers, would more than double the peak."""
    peak(5_000, callback)  # what is made once
    short, long = peak(12_000, callback), peak(90_000, callback)
    assert long < 1.5 * short


def test_sources_of_one_text(tmp_path):
    text = document(11, 150)
    model = causal("gpt2", BYTES)
    file = tmp_path / "document.txt"
    file.write_text(text, encoding="utf-8", newline="")
    with file.open(encoding="utf-8", newline="") as opened:
        values = [score_text(model, source).likelihood for source in (text, opened, list(text), iter([text, ""]))]
    assert len({likelihood.value.item() for likelihood in values}) == 1
    assert len({likelihood.num_units.item() for likelihood in values}) == 1


def test_measures_and_unknown_tokens():
    model = MaskedLM(build(MASKED["bert"], len(BERT)), BERT)
    row = Scorer(model).score_rows([InputRow("0", "", "", "hello world")])[0]
    got = score_text(model, "hello world")
    assert got.likelihood.kind is Kind.SURROGATE
    assert got.bits_per_byte().item() == pytest.approx(row.bits_per_byte)
    tokenizer = bert_tokenizer()
    tokenizer.bos_token = "[CLS]"
    unknown = causal("llama", tokenizer)
    assert score_text(unknown, "hello world").likelihood.kind is Kind.EXACT
    assert score_text(unknown, "hello ☃ world " + "hello " * 99).likelihood.kind is Kind.UPPER_BOUND


def test_sums_lose_nothing():
    """Large and small terms in many windows: the sum is that of exact arithmetic."""

    class Cancelling(Counter):
        def score_tokens(self, x):
            terms = torch.where(x.ids % 2 == 0, -1e9, -0.1).double().masked_fill(~x.scored_mask, 0.0)
            return LogLikelihood.from_per_unit(terms, x.scored_mask), x.scored_mask

    blocks: list[TokenBlock] = []
    got = score_text(Cancelling(20), document(12, 4000), callback=blocks.append)
    assert len(blocks) > 500
    assert got.likelihood.value.item() == math.fsum(value for block in blocks for value in block.nats)

    class Never(Counter):
        def score_tokens(self, x):
            terms = torch.full(x.ids.shape, -math.inf, dtype=torch.float64).masked_fill(~x.scored_mask, 0.0)
            return LogLikelihood.from_per_unit(terms, x.scored_mask), x.scored_mask

    assert score_text(Never(20), document(12, 100)).likelihood.value.item() == -math.inf


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("", {}, RowError, "the document is empty: there is nothing to score"),
        (["", ""], {}, RowError, "the document is empty"),
        (["ab", "c\0d"], {}, RowError, "the document has a NUL character at character 3: remove or replace it"),
        (["x" * 999, "\ud800"], {}, RowError, r"a lone surrogate \(U\+D800\) at character 999"),
        ("abc", {"stride": 0}, InputError, "stride must be at least 1, got 0"),
        ("abc", {"stride": 65}, InputError, "stride must not exceed the model's context of 64 tokens, got 65"),
        ("abc", {"max_batch_tokens": 0}, InputError, "max_batch_tokens must be at least 1"),
        ("abc", {"bos": "maybe"}, InputError, "bos must be one of auto, always, never"),
        ("abc", {"path": "fast"}, InputError, "path must be one of"),
        (b"abc", {}, InputError, "text must be characters, got bytes; decode them first"),
        (3, {}, InputError, "text must be a string, a file opened in text mode or an iterable of strings, got int"),
        (["abc", None], {}, InputError, "chunk 1 of the document must be a string, got NoneType"),
        (io.BytesIO(b"abc"), {}, InputError, "chunk 0 of the document must be a string, got bytes; open files in text"),
        (io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"), {}, InputError, "the document is not utf-8 text"),
    ],
)
def test_documents_and_options_that_cannot_be_scored(text, options, error, message):
    with pytest.raises(error, match=message):
        score_text(causal("gpt2", BYTES), text, **options)


def test_models_that_cannot_read_a_document():
    with pytest.raises(InputError, match="an encoder-decoder reads its source whole"):
        score_text(Seq2SeqLM(build(SEQ2SEQ["bart"], len(T5)), T5), "hello")
    with pytest.raises(RowError, match="the document has no token under this tokenizer"):
        score_text(MaskedLM(build(MASKED["bert"], len(BERT)), BERT), " \n ")
    with pytest.raises(RowError, match="its only token has nothing before it"):
        score_text(causal("gpt2", NO_BOS), "hello")
    with pytest.raises(InputError, match="packed passes"):
        score_text(causal("mamba", NO_BOS), "hello world", path="packed")
    with pytest.raises(InputError, match="gives no character offsets"):
        score_text(Counter(64, tf.ByT5Tokenizer()), "hello")
    broken = causal("gpt2", BYTES)
    with torch.no_grad():
        broken.model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(RowError, match="the model returned logits that are not finite"):
        score_text(broken, "hello world")
