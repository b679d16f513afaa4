"""The engine gives what one row at a time through transformers gives, whatever it batches, pads and cuts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow
from loglik.scoring.score import score
from zoo import CAUSAL, MASKED, SEQ2SEQ, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer, t5_tokenizer

BYTES = byte_level_tokenizer()
WORDS = ["hello", "the", "answer", "is", "so", "42", "é", "漢字", "yes,", "\n", "then", "there"]


def gpt2(tokenizer=BYTES) -> CausalLM:
    return CausalLM(build(CAUSAL["gpt2"], len(tokenizer)), tokenizer)


def texts(seed: int, count: int) -> list[tuple[str, str]]:
    """Pairs with duplicates, empty prompts and very different lengths."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    pairs = [(words(0, 4), " " + words(1, 5)) for _ in range(count)]
    return pairs + rng.sample(pairs, count // 4)


def naive(model: CausalLM, prompt: str, completion: str) -> float:
    """transformers alone: joined tokens, the completion found by comparing decoded prefixes."""
    tokenizer = model.tokenizer
    ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    covered, start = 0, 0
    while covered <= len(prompt.encode()) and start < len(ids):
        covered += len(tokenizer.convert_ids_to_tokens(ids[start]))  # byte-level: one symbol, one byte
        if covered > len(prompt.encode()):
            break
        start += 1
    if start == 0:
        ids, start = [tokenizer.bos_token_id, *ids], 1
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0].float()
    logp = torch.log_softmax(logits, -1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_equals_naive_loop_for_any_batch(budget):
    """Request order, duplicates and the batch budget change nothing (vllm #42019, lm-evaluation-harness #704)."""
    model, pairs = gpt2(), texts(0, 24)
    expected = torch.tensor([naive(model, p, c) for p, c in pairs], dtype=torch.float64)
    got = score(model, pairs, max_batch_tokens=budget)
    torch.testing.assert_close(got.value, expected, atol=1e-4, rtol=0)
    order = list(range(len(pairs)))[::-1]
    again = score(model, [pairs[i] for i in order], max_batch_tokens=budget)
    torch.testing.assert_close(again.value, expected[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "tokenizer"),
    [
        (lambda t: CausalLM(build(CAUSAL["llama"], len(t)), t), llama_tokenizer()),
        (lambda t: CausalLM(build(CAUSAL["mamba"], len(t)), t), byte_level_tokenizer(bos=False)),
        (lambda t: Seq2SeqLM(build(SEQ2SEQ["t5"], len(t)), t), t5_tokenizer()),
        (lambda t: MaskedLM(build(MASKED["bert"], len(t)), t), bert_tokenizer()),
        (lambda t: MaskedLM(build(MASKED["bert"], len(t)), t, variant="within_word_l2r"), bert_tokenizer()),
    ],
    ids=["llama", "mamba", "t5", "bert", "bert-l2r"],
)
def test_rows_do_not_depend_on_each_other(make, tokenizer):
    model = make(tokenizer)
    pairs = [pair for pair in texts(1, 12) if pair[1].strip() and len(pair[1].split()) > 1]
    together = score(model, pairs)
    for i, pair in enumerate(pairs):
        alone = score(model, [pair])
        torch.testing.assert_close(together.value[i : i + 1], alone.value, atol=1e-4, rtol=0)
        assert together.num_units[i] == alone.num_units[0]
    assert together.kind is (Kind.SURROGATE if model.kind is Kind.SURROGATE else together.kind)


def test_prompt_and_completion_obey_the_chain_rule():
    """log p(prompt) + log p(completion | prompt) = log p(prompt completion), BOS before all, at an aligned boundary."""
    model = gpt2()
    whole = score(model, ["The answer is 42"], bos="always")
    first = score(model, ["The answer"], bos="always")
    second = score(model, [("The answer", " is 42")], bos="always")
    assert (first + second).value.item() == pytest.approx(whole.value.item(), abs=1e-4)


def naive_windows(model: CausalLM, ids: list[int], stride: int) -> tuple[float, int]:
    """Every token after BOS scored once; windows of the whole context that end `stride` further each time."""
    limit = model.max_length
    total, shortened, end, scored = 0.0, 0, min(len(ids), limit), 0
    while scored < len(ids):
        left = max(0, end - limit)
        window = [model.tokenizer.bos_token_id, *ids[left:end]]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([window[:-1]])).logits[0].float()
        logp = torch.log_softmax(logits, -1)
        for t in range(scored, end):
            total += float(logp[t - left, ids[t]])
            shortened += left > 0
        scored, end = end, min(len(ids), end + stride)
    return total, shortened


@pytest.mark.parametrize("stride", [1, 7, 32, 64])
def test_windows_equal_a_naive_rolling_loop(stride):
    """BOS in every window (lm-evaluation-harness #2382), no token scored twice or lost (transformers #34138)."""
    model = gpt2()
    text = " ".join(random.Random(3).choices(WORDS, k=170))
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * model.max_length
    effective = min(stride, model.max_length - 1)
    expected, shortened = naive_windows(model, ids, effective)
    row = Scorer(model, ScoreOptions(overflow="window", stride=stride)).score_rows([InputRow("0", "", "", text)])[0]
    assert row.log_prob == pytest.approx(expected, abs=1e-3)
    assert row.num_tokens == len(ids)
    assert row.num_windowed == shortened
    assert row.num_bytes == len(text.encode())


def test_windows_score_a_completion_after_a_long_prompt():
    """Only the completion counts, and it sees the end of the prompt."""
    model = gpt2()
    prompt = " ".join(["hello the answer"] * 60)
    row = Scorer(model, ScoreOptions(overflow="window", stride=4)).score_rows([InputRow("0", "", prompt, " is 42")])[0]
    ids = BYTES(prompt + " is 42", add_special_tokens=False)["input_ids"]
    count = len(ids) - len(BYTES(prompt, add_special_tokens=False)["input_ids"])
    tail = ids[-(model.max_length + 1) :]
    with torch.no_grad():
        logp = torch.log_softmax(model.model(input_ids=torch.tensor([tail[:-1]])).logits[0].float(), -1)
    expected = sum(float(logp[t - 1, tail[t]]) for t in range(len(tail) - count, len(tail)))
    assert row.num_tokens == row.num_windowed == count
    assert row.log_prob == pytest.approx(expected, abs=1e-4)


def test_a_row_as_long_as_the_context_fits_and_one_more_does_not():
    model = gpt2()
    word = " the"
    assert len(BYTES(word * 3, add_special_tokens=False)["input_ids"]) == 3
    fits = score(model, [word * model.max_length])  # BOS, then as many tokens: the last one is only a target
    assert fits.num_units.item() == model.max_length
    with pytest.raises(RowError, match=r"row 0: has 66 tokens and the model's context is 64: shorten it, or set"):
        score(model, [word * (model.max_length + 1)])


def test_skipped_rows_say_so():
    rows = [InputRow("a", "", "", " the" * 99), InputRow("b", "", "", " the")]
    out = Scorer(gpt2(), ScoreOptions(overflow="skip")).score_rows(rows)
    assert out[0].skipped
    assert out[0].error == "skipped: has 100 tokens and the model's context is 64"
    assert out[1].error is None


def test_encoder_decoders_have_no_windows():
    tokenizer = t5_tokenizer()
    model = Seq2SeqLM(build(SEQ2SEQ["bart"], len(tokenizer)), tokenizer)
    with pytest.raises(RowError, match=r"the prompt has \d+ tokens and this encoder-decoder's context is 64: shorten"):
        score(model, [("hello " * 99, "yes")], overflow="window")


def test_units_and_bits_per_byte():
    model = gpt2()
    pairs = [("The", " answer"), ("", "漢字 é")]
    by_token, by_byte = score(model, pairs), score(model, pairs, unit="byte")
    assert by_byte.unit is Unit.BYTE
    assert by_byte.num_units.tolist() == [7, 9]
    bits = by_byte.bits_per_byte()
    expected = -by_token.value / math.log(2) / torch.tensor([7.0, 9.0])
    torch.testing.assert_close(bits.value, expected)
    assert bits.kind is Kind.EXACT
    assert by_token.per_unit is not None
    torch.testing.assert_close(by_token.per_unit.sum(-1), by_token.value)


def test_unknown_tokens_make_an_exact_value_an_upper_bound():
    """The unknown token stands for more than this text."""
    tokenizer = bert_tokenizer()
    tokenizer.bos_token = "[CLS]"
    model = CausalLM(build(CAUSAL["llama"], len(tokenizer)), tokenizer)
    known, unknown = InputRow("a", "", "hello ", "world"), InputRow("b", "", "hello ", "\u2603")
    rows = Scorer(model).score_rows([known, unknown])
    assert [row.kind for row in rows] == ["exact", "upper_bound"]
    assert score(model, [("hello ", "\u2603")]).kind is Kind.UPPER_BOUND


def test_logits_that_are_not_finite_name_the_row():
    model = gpt2()
    with torch.no_grad():
        model.model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(RowError, match="row 0: the model returned logits that are not finite"):
        score(model, ["hello world"])


def test_is_greedy():
    """All scored tokens are the model's first choice, as a naive loop finds; one that is not suffices for False."""
    model = gpt2()
    vocabulary = [BYTES.decode([i]) for i in range(len(BYTES))]
    rows, expected, rows_with_both = [], [], []
    for prompt in [" the", " the answer", "hello", " is so", " yes yes", " there", " 42", " then the", "\n", " so"]:
        ids = BYTES(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            first = vocabulary[int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        for completion in (first, first + " zq", "qz"):
            whole = BYTES(prompt + completion, add_special_tokens=False)["input_ids"]
            if whole[: len(ids)] != ids or "\ufffd" in completion:
                continue  # the chosen token would merge with the prompt
            with torch.no_grad():
                choices = model.model(input_ids=torch.tensor([whole])).logits[0].argmax(-1)
            rows.append(InputRow(str(len(rows)), "", prompt, completion))
            expected.append(all(int(choices[t - 1]) == whole[t] for t in range(len(ids), len(whole))))
            partly = any(int(choices[t - 1]) == whole[t] for t in range(len(ids), len(whole)))
            rows_with_both.append(partly and not expected[-1])
    assert sum(expected) >= 3
    assert sum(rows_with_both) >= 3
    assert [row.is_greedy for row in Scorer(model).score_rows(rows)] == expected


def test_per_token_rows_line_up():
    row = Scorer(gpt2()).score_rows([InputRow("0", "", "The", " answer is")], per_token=True)[0]
    assert row.tokens is not None
    assert row.token_log_probs is not None
    assert "".join(row.tokens) == "The answer is"
    scored = [value for value in row.token_log_probs if value is not None]
    assert len(scored) == row.num_tokens
    assert math.fsum(scored) == row.log_prob
    unconditional = Scorer(gpt2()).score_rows([InputRow("0", "", "", "The")], per_token=True)[0]
    assert unconditional.tokens is not None
    assert unconditional.tokens[0] == BYTES.bos_token
    assert unconditional.token_log_probs is not None
    assert unconditional.token_log_probs[0] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        ({"overflow": "cut"}, "overflow must be one of error, window, skip, got 'cut'"),
        ({"boundary": "apart"}, "boundary must be one of joint, separate"),
        ({"stride": 65}, "stride must not exceed the model's context of 64 tokens, got 65"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        score(gpt2(), ["hello"], **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to score"),
        (["hello", 3], "row 1: must be a text or a"),
        ([("a", "b", "c")], "row 0: must be a text or a"),
        (["hello", ("a", "")], "row 1: the completion is empty"),
    ],
)
def test_rows_that_are_no_texts(rows, message):
    with pytest.raises((InputError, RowError), match=message):
        score(gpt2(), rows)
