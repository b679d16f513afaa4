"""Mistakes that other scoring tools have made, each as a test that this one does not make it.

Several are stated below the text front or one level up as well: BOS, pad = EOS and straddled boundaries as tokens in
tests/models/test_encode.py; windows and request order on the default path in tests/scoring/test_engine.py; the start
token of encoder-decoders in tests/models/test_parity.py; bfloat16 reductions in tests/models/test_head.py.
"""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

import loglik
from loglik.cli import main
from loglik.errors import RowError
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow
from zoo import CAUSAL, END, MASKED, SEQ2SEQ, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer, t5_tokenizer

BYTES = byte_level_tokenizer()
WHOLE = byte_level_tokenizer(vocab_size=600)  # words of the corpus are single tokens
PATHS = ("packed", "cached", "padded")


def causal(name="gpt2", tokenizer=BYTES, gain=10.0, dtype=torch.float32):
    return CausalLM(build(CAUSAL[name], len(tokenizer), gain=gain).to(dtype), tokenizer)


@torch.no_grad()
def naive(model, ids, start):
    """Terms of ``ids[start:]`` by one forward pass of transformers, softmax in float64; the last is only a target."""
    logits = model.model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1)
    return [float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids))]


def encoded(text, tokenizer=BYTES):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one(model, prompt, completion, **options):
    return Scorer(model, ScoreOptions(**options)).score_rows([InputRow("0", "", prompt, completion)], per_token=True)[0]


@pytest.mark.parametrize(("prompt", "completion"), [("Ans", "wer"), ("hello wor", "ld"), ("The ans", "wer is")])
def test_empty_continuation_where_a_token_spans_the_boundary(prompt, completion):
    """lm-evaluation-harness #1322, #3297, #3336; lighteval #354: cut at len(encode(prompt)), nothing is left."""
    model = causal(tokenizer=WHOLE)
    ids = encoded(prompt + completion, WHOLE)
    pieces = [WHOLE.decode([i]) for i in ids]
    assert "".join(pieces) == prompt + completion
    start = next(i for i in range(len(ids)) if len("".join(pieces[: i + 1])) > len(prompt))
    assert len("".join(pieces[:start])) < len(prompt), "no token spans the boundary"
    row = one(model, prompt, completion)
    assert row.boundary == "straddled"
    assert row.num_tokens == len(ids) - start > 0
    with_bos = [BYTES.bos_token_id, *ids] if start == 0 else ids
    want = naive(model, with_bos, len(with_bos) - row.num_tokens)
    assert row.log_prob == pytest.approx(sum(want), abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_request_order_and_batch_size_change_nothing(path):
    """vLLM #42019; lm-evaluation-harness #704, #1645: shuffled, one by one, duplicated, under any budget."""
    model = causal()
    rng = random.Random(0)
    words = ["hello", "the", "answer", "is", "so", "42", "é", "yes,"]
    shots = "The answer is 42, so yes. The answer is so "
    pairs = [(shots + rng.choice(words), " " + " ".join(rng.choices(words, k=rng.randint(1, 4)))) for _ in range(12)]
    pairs += [("", shots), (shots, shots), *pairs[:3]]
    want = [one(model, *pair).log_prob for pair in pairs]
    order = list(range(len(pairs)))
    for budget in (1, 50, None):
        rng.shuffle(order)
        scorer = Scorer(model, ScoreOptions(path=path, max_batch_tokens=budget))
        rows = scorer.score_rows([InputRow(str(i), "", *pairs[i]) for i in order])
        assert [row.log_prob for row in rows] == pytest.approx([want[i] for i in order], abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_end_of_text_inside_a_text_is_a_token_like_any_other(path):
    """minicons drops ids equal to pad = EOS; surprisal sets that logit to -inf, which renormalises the others."""
    model = causal()
    assert BYTES.pad_token_id is None or BYTES.pad_token_id == BYTES.eos_token_id
    BYTES.pad_token = END
    try:
        text, prompt = f"hello{END}the answer{END}", f"is{END}{END}"
        ids = encoded(prompt + text)
        assert ids.count(BYTES.eos_token_id) == 4
        rows = Scorer(model, ScoreOptions(path=path)).score_rows(
            [
                InputRow("0", "", prompt, text),
                InputRow("1", "", "the answer is 42 and yes", " so"),
                InputRow("2", "", prompt, "the"),
            ]
        )
        want = naive(model, ids, len(encoded(prompt)))
        assert rows[0].num_tokens == len(want)
        assert rows[0].log_prob == pytest.approx(sum(want), abs=1e-4)
    finally:
        BYTES.pad_token = None


def test_a_distribution_is_not_renormalised():
    """All one-token continuations of a prompt, end of text included, have probability one together."""
    tokenizer = byte_level_tokenizer()
    model = causal(tokenizer=tokenizer)
    with torch.no_grad():
        last = torch.log_softmax(model.model(input_ids=torch.tensor([encoded("hello the")])).logits[0, -1].double(), -1)
    rows, covered = [], []
    for i in range(len(tokenizer)):
        piece = tokenizer.decode([i])
        if not {"\ufffd", "\0"} & set(piece) and encoded("hello the" + piece) == [*encoded("hello the"), i]:
            rows.append(("hello the", piece))
            covered.append(i)
    assert tokenizer.eos_token_id in covered
    assert len(covered) > 40
    got = loglik.score(model, rows).value
    torch.testing.assert_close(got, last[covered], atol=1e-4, rtol=0)


def test_bos_does_not_depend_on_the_row_before():
    """lm-evaluation-harness decides BOS for a whole batch from its first string."""
    tokenizer = llama_tokenizer()
    model = causal("llama", tokenizer)
    pairs = [("<s>the answer", " is"), ("the answer", " is"), ("", "the answer"), ("<s>hello", " so")]
    alone = [one(model, *pair) for pair in pairs]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        rows = Scorer(model).score_rows([InputRow(str(i), "", *pairs[i]) for i in order], per_token=True)
        for row, i in zip(rows, order, strict=True):
            assert row.tokens == alone[i].tokens
            assert row.log_prob == pytest.approx(alone[i].log_prob, abs=1e-4)
    for row in alone:
        assert row.tokens is not None
        assert row.tokens.count("<s>") == 1, "doubled or missing (lm-evaluation-harness #3333)"


@pytest.mark.parametrize("stride", [None, 1, 20])
@pytest.mark.parametrize("path", PATHS)
def test_rolling_windows_all_begin_with_bos_and_count_each_token_once(path, stride):
    """lm-evaluation-harness #2382 (BOS in the first window alone); transformers #34138 (windows averaged wrongly)."""
    model = causal()
    text = " ".join(random.Random(1).choices(["hello", "the", "answer", "is", "42", "yes"], k=120))
    ids, limit = encoded(text), model.max_length
    assert limit is not None
    assert len(ids) > 2 * limit
    row = one(model, "", text, overflow="window", stride=stride, path=path)
    total, scored, end = 0.0, 0, limit
    while scored < len(ids):
        left = max(0, end - limit)
        window = [BYTES.bos_token_id, *ids[left:end]]
        total += (
            sum(naive(model, window[:-1] + window[-1:], scored - left + 1))
            if len(window) <= limit
            else sum(naive(model, window, scored - left + 1))
        )
        scored, end = end, min(len(ids), end + (stride or limit // 2))
    assert row.num_tokens == len(ids)
    assert row.log_prob == pytest.approx(total, abs=1e-3)
    assert row.bits_per_byte == pytest.approx(-total / math.log(2) / len(text.encode()), abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_in_the_models_dtype(path, dtype):
    """lm-evaluation-harness #2921, OpenRLHF #634, maxtext #5231: float32 whatever the weights, never above zero."""
    model = causal("llama", dtype=dtype, gain=20.0)
    text = " ".join(["hello the answer is 42"] * 5)
    row = one(model, "", text, path=path, max_batch_tokens=10_000)
    terms = [term for term in row.token_log_probs if term is not None]
    ids = [BYTES.bos_token_id, *encoded(text)]
    want = naive(model, ids, 1)
    assert max(terms) <= 0
    if path == "padded":  # the same kernel over the same shapes: the softmax is all that is left to differ
        assert terms == pytest.approx(want, abs=2e-5)
    with torch.no_grad():
        half = torch.log_softmax(model.model(input_ids=torch.tensor([ids])).logits[0], -1)
    worst = max(abs(float(half[t - 1, ids[t]]) - want[t - 1]) for t in range(1, len(ids)))
    assert worst > 1e-3, "the softmax of half precision is no worse here"


def test_is_greedy_compares_with_the_whole_vocabulary():
    """catwalk takes the argmax of what was gathered at the target, so that everything is greedy or nothing."""
    model = causal()
    rows, want = [], []
    for prompt in ("hello", "the answer", "is so", "42", "yes yes", "then the", " there", "so"):
        ids = encoded(prompt)
        with torch.no_grad():
            order = model.model(input_ids=torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        for rank in range(40):
            piece = BYTES.decode([order[rank]])
            if not {"\ufffd", "\0"} & set(piece) and encoded(prompt + piece) == [*ids, order[rank]]:
                rows.append(InputRow(str(len(rows)), "", prompt, piece))
                want.append(rank == 0)
    assert 2 <= sum(want) < len(want)
    assert [row.is_greedy for row in Scorer(model).score_rows(rows)] == want


@pytest.mark.parametrize("path", PATHS)
def test_truncated_context_is_never_scored_as_continuation(path):
    """mlx-lm #1902: with a cut context, 'abc' + 'de' scored 'cde'. Here only the completion counts, or nothing does."""
    model = causal()
    prompt, completion = "hello the answer" + " so the answer" * 40, " is 42"
    ids = encoded(prompt + completion)
    count = len(ids) - len(encoded(prompt))
    row = one(model, prompt, completion, overflow="window", path=path)
    limit = model.max_length
    assert limit is not None
    tail = ids[-(limit + 1) :]
    assert row.num_tokens == count
    assert row.log_prob == pytest.approx(sum(naive(model, tail, len(tail) - count)), abs=1e-4)
    assert row.num_windowed == count
    with pytest.raises(RowError, match=r"row 0: has .* tokens and the model's context is 64"):
        loglik.score(model, [(prompt, completion)])


def test_text_is_not_cut_to_twenty_tokens():
    """Hugging Face evaluate #332: `config.max_length` = 20 shortened every text without a word."""
    model = causal()
    model.model.config.max_length = 20
    text = "the answer is 42 and yes " * 3
    count = len(encoded(text))
    assert 20 < count < 64
    likelihood = loglik.score(model, [text])
    assert likelihood.num_units.tolist() == [count]
    want = sum(naive(model, [BYTES.bos_token_id, *encoded(text)], 1))
    assert likelihood.value.item() == pytest.approx(want, abs=1e-4)


def test_sum_is_the_default_and_not_the_mean():
    """minicons' `reduction` is the mean by default: a likelihood of twice the text is twice as low, not the same."""
    model = causal()
    likelihood = loglik.score(model, ["hello the answer is 42"])
    want = naive(model, [BYTES.bos_token_id, *encoded("hello the answer is 42")], 1)
    assert likelihood.value.item() == pytest.approx(sum(want), abs=1e-4)
    assert abs(sum(want)) > 2 * abs(sum(want) / len(want))
    assert likelihood.perplexity().value.item() == pytest.approx(math.exp(-sum(want) / len(want)), rel=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_logits_are_not_shortened_by_a_shared_beginning(path):
    """Model-Optimizer #1577, SGLang #902, strands-sglang #34: prompt log-probabilities lost to a prefix cache."""
    model = causal()
    shots = "hello the answer is 42, so yes " * 2
    pairs = [("", shots), (shots, " is"), (shots, " is so"), ("hello", shots[5:]), ("", shots + " is so")]
    rows = Scorer(model, ScoreOptions(path=path)).score_rows(
        [InputRow(str(i), "", *p) for i, p in enumerate(pairs)], per_token=True
    )
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        ids = encoded(prompt + completion)
        ids = ids if prompt else [BYTES.bos_token_id, *ids]
        want = naive(model, ids, len(ids) - row.num_tokens)
        assert [t for t in row.token_log_probs if t is not None] == pytest.approx(want, abs=1e-4)
        assert row.num_tokens == len(ids) - (len(encoded(prompt)) or 1)


def test_first_token_without_bos_is_reported_and_not_dropped():
    """minicons #51, #29: the first token vanished. Here it stands in the row, without a number."""
    tokenizer = byte_level_tokenizer(bos=False)
    model = causal(tokenizer=tokenizer)
    row = one(model, "", "hello the answer")
    ids = encoded("hello the answer", tokenizer)
    assert len(row.tokens) == len(ids)
    assert row.token_log_probs[0] is None
    assert row.token_log_probs[1:] == pytest.approx(naive(model, ids, 1), abs=1e-4)
    assert row.num_tokens == len(ids) - 1
    with pytest.raises(RowError, match="nothing before it"):
        loglik.score(model, ["a"])


def test_prompt_log_probs_are_not_changed_by_generation_settings():
    """transformers #24801, #21321, lm-polygraph: logits processors (bad words, temperature) took part."""
    model = causal()
    pairs = [("hello", " the answer is 42"), ("the", f" answer{END}")]
    want = loglik.score(model, pairs).value
    settings = model.model.generation_config
    settings.min_new_tokens, settings.temperature, settings.do_sample = 30, 0.3, True
    settings.bad_words_ids = [encoded(" answer")]
    settings.suppress_tokens = encoded(" 42")
    settings.forced_bos_token_id = 5
    torch.testing.assert_close(loglik.score(model, pairs).value, want, atol=0, rtol=0)


def test_first_target_token_of_an_encoder_decoder_is_scored():
    """minicons feeds the target as decoder input and discards its first token; here the start token stands first."""
    tokenizer = t5_tokenizer()
    raw = build(SEQ2SEQ["t5"], len(tokenizer), gain=10.0)
    source, target = tokenizer("the answer")["input_ids"], tokenizer("is 42")["input_ids"]
    with torch.no_grad():
        logits = (
            raw(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *target[:-1]]]))
            .logits[0]
            .double()
        )
    want = torch.log_softmax(logits, -1)[torch.arange(len(target)), target]
    row = one(Seq2SeqLM(raw, tokenizer), "the answer", "is 42")
    assert row.num_tokens == len(target)
    scored = [term for term in row.token_log_probs if term is not None]
    assert scored == pytest.approx(want.tolist(), abs=1e-4)


def test_masked_copies_of_a_long_text_do_not_stand_in_one_batch(monkeypatch):
    """minicons #46: one batch of as many masked copies as tokens ran out of an 80 GB card."""
    tokenizer = bert_tokenizer()
    model = MaskedLM(build(MASKED["bert"], len(tokenizer)), tokenizer, max_batch_tokens=100)
    sizes = []
    forward = type(model.model).forward

    def counted(self, *args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counted)
    loglik.score(model, ["the answer is yes so the answer is yes"])
    assert max(sizes) <= 100


def test_context_only_tokens_get_no_logits():
    """lm-evaluation-harness computes logits of every context position; here the head sees scored positions alone."""
    model = causal()
    seen = []
    head = model.model.get_output_embeddings()
    assert model.forward_path().path == "packed"
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    loglik.score(model, [("hello the answer is 42, " * 4, "yes")])
    handle.remove()
    assert max(seen) == 1


def test_command_line_prints_what_one_row_at_a_time_gives(tmp_path, capsys):
    """The same through `loglik score`: BOS shown, boundary shown, sums and not means, in the order of the input."""
    raw = build(CAUSAL["gpt2"], len(BYTES), gain=10.0)
    raw.save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    pairs = [("hello", " the"), ("", "the answer is 42"), ("Th", "e"), ("hello", " the answer"), ("hello", " the")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    code = 0
    try:
        main(["score", str(rows), "--model", str(tmp_path / "model")])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert code == 0
    model = CausalLM(raw, BYTES)
    assert [row["log_prob"] for row in out] == pytest.approx([one(model, *pair).log_prob for pair in pairs], abs=1e-4)
    assert [row["boundary"] for row in out] == ["aligned", "none", "straddled", "aligned", "aligned"]
