"""The lm-evaluation-harness plug-in against the harness's own ``hf`` model and against plain forward passes."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the plug-in needs lm-eval (install loglik[eval])")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import zoo
from loglik.errors import InputError, RowError
from loglik.integrations.lm_eval import LoglikLM
from loglik.integrations.lm_eval_generation import StopStrings
from loglik.models.causal import CausalLM
from loglik.models.load import embedded_directory, load
from loglik.models.seq2seq import Seq2SeqLM

TASKS = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
TINY = embedded_directory("tiny")
METRICS = {
    "loglik_gsm8k_choice": {"acc,none", "acc_norm,none"},
    "loglik_gsm8k_generate": {"exact_match,first-number"},
    "loglik_wikitext2": {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"},
}
NATS = 1e-4


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory) -> Path:
    """GPT-2 with a byte-level vocabulary: BOS is EOS, there is no padding token, a context of 64."""
    home = tmp_path_factory.mktemp("byte_bpe")
    tokenizer = zoo.byte_level_tokenizer()
    zoo.build(zoo.CAUSAL["gpt2"], vocabulary=len(tokenizer)).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def adds_bos(tmp_path_factory) -> Path:
    """Llama whose tokenizer adds BOS itself, a context of 64."""
    home = tmp_path_factory.mktemp("adds_bos")
    tokenizer = zoo.llama_tokenizer()
    zoo.build(zoo.CAUSAL["llama"], vocabulary=len(tokenizer)).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def byte_lm(byte_bpe) -> LoglikLM:
    return LoglikLM(str(byte_bpe), device="cpu")


@pytest.fixture(scope="module")
def bos_lm(adds_bos) -> LoglikLM:
    return LoglikLM(str(adds_bos), device="cpu")


@functools.cache
def hf(home: Path | str, **options) -> HFLM:
    """The harness's own model, without its cache for continuations of one token.

    That cache scores a continuation at the wrong position if a longer one leads to the same context.
    """
    return HFLM(str(home), dtype="float32", device="cpu", logits_cache=False, **options)


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i, metadata=("made", i, 1)) for i, args in enumerate(arguments)]


def score(lm, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)


def plain(lm: LoglikLM, context: list[int], continuation: list[int]) -> float:
    """One unpadded forward pass in transformers."""
    with torch.no_grad():
        logits = lm.text_model.model(torch.tensor([context + continuation])).logits[0].double()
    terms = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return float(terms.gather(1, torch.tensor(continuation)[:, None]).sum())


def close(one, other) -> bool:
    return len(one) == len(other) and all(
        a[0] == pytest.approx(b[0], abs=NATS) and a[1] == b[1] for a, b in zip(one, other, strict=True)
    )


# Whole tasks


def write_made_data(folder: Path) -> None:
    things = ["eggs", "bolts of fibre", "houses", "marbles", "trains", "pages"]
    rows = [
        {
            "question": f"Ann has {a} {things[a % 6]} and buys {b} more. How many {things[a % 6]} has she?",
            "answer": f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {1000 * a + b:,}",
        }
        for a, b in zip(range(3, 11), range(40, 48), strict=True)
    ]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    article = (
        " = {0} = \n \n {0} was a village of the north . It had {1} houses , a mill and a school . \n = = Name = = \n"
    )
    text = "".join(article.format(name, n) * 3 + " \n" for n, name in enumerate(["Åsby", "Old Mill", "漢字 <unk>"]))
    (folder / "wikitext2_test.txt").write_text(text, encoding="utf-8")


def evaluate(model: str, arguments: str, folder: Path, patch: pytest.MonkeyPatch, limit: int):
    """Run the example tasks on the files in `folder`; nothing is written outside it."""
    patch.chdir(folder)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists packages for seconds
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(METRICS),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        device="cpu",
        batch_size=4,
        limit=limit,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize(
    ("home", "options", "data", "limit"),
    [
        ("tiny", "max_length=192", "made", 3),
        ("adds_bos", "", "made", 8),
        pytest.param("tiny", "", "shared", 12, marks=pytest.mark.slow),
    ],
    ids=["tiny-made", "zoo-made", "tiny-shared"],
)
def test_tasks_equal_hf(home, options, data, limit, tmp_path, monkeypatch, request):
    """Every metric and every answer of three YAML tasks, with windows that slide and prompts that do not fit."""
    if data == "shared":
        source = request.getfixturevalue("shared_data")
        shutil.copy(source / "gsm8k_test.jsonl", tmp_path)
        lines = (source / "wikitext2_test.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / "wikitext2_test.txt").write_text("\n".join(lines[:40]), encoding="utf-8")
    else:
        write_made_data(tmp_path)
    where = TINY if home == "tiny" else request.getfixturevalue(home)
    arguments = f"pretrained={where},dtype=float32" + (f",{options}" if options else "")
    theirs = evaluate("hf", arguments, tmp_path, monkeypatch, limit)
    ours = evaluate("loglik", arguments, tmp_path, monkeypatch, limit)
    for task, metrics in METRICS.items():
        for metric in metrics:
            value = theirs["results"][task][metric]
            exact = metric.startswith(("acc", "exact_match"))
            assert ours["results"][task][metric] == (value if exact else pytest.approx(value, rel=1e-4)), metric
        for one, other in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            for a, b in zip(one["resps"], other["resps"], strict=True):
                if task == "loglik_gsm8k_generate":
                    assert a == b
                elif task == "loglik_gsm8k_choice":
                    assert close(a, b)
                else:
                    assert b[0] == pytest.approx(a[0], rel=1e-5)
    assert len(ours["samples"]["loglik_gsm8k_choice"]) == limit
    assert math.isclose(
        ours["results"]["loglik_wikitext2"]["bits_per_byte,none"],
        math.log2(ours["results"]["loglik_wikitext2"]["byte_perplexity,none"]),
        rel_tol=1e-9,
    )


# The pairs that break others


def test_token_across_the_join_is_scored_with_the_continuation(byte_lm):
    """The cut at the context's own token count leaves nothing; the joint tokens exist and have a probability."""
    tokens = byte_lm.tokenizer.convert_tokens_to_ids
    the, answer, hello, world = (tokens(piece) for piece in ("The", "ĠAnswer", "hello", "Ġworld"))
    cases = {
        ("The Ans", "wer"): ([the], [answer]),
        ("hello wor", "ld"): ([hello], [world]),
        ("hel", "lo"): ([byte_lm.prefix_token_id], [hello]),  # the whole text is one token
    }
    for (context, continuation), (before, after) in cases.items():
        assert byte_lm.tokenizer.encode(context + continuation) in (before + after, after)
        ((got, _),) = score(byte_lm, (context, continuation))
        assert got == pytest.approx(plain(byte_lm, before, after), abs=NATS)
    together = score(byte_lm, *cases, ("The answer is", " 42"))
    assert close(together[:3], [score(byte_lm, pair)[0] for pair in cases])


def test_bos_stays_before_a_token_across_the_join(bos_lm):
    bos = bos_lm.tokenizer.bos_token_id
    pieces = bos_lm.tokenizer.tokenize("The Answer")
    pair = next(
        (text[:i], text[i:])
        for text in ["".join(pieces[:k]).replace("▁", " ").strip() for k in range(1, len(pieces) + 1)] + zoo.CORPUS[:1]
        for i in range(1, len(text))
        if text[i - 1] != " " and not super(LoglikLM, bos_lm)._encode_pair(text[:i], text[i:])[1]
    )
    whole = bos_lm.tokenizer.encode("".join(pair))
    before, after = bos_lm._encode_pair(*pair)
    assert before + after == whole
    assert before[0] == bos
    assert len(after) >= 1
    assert score(bos_lm, pair)[0][0] == pytest.approx(plain(bos_lm, before, after), abs=NATS)


def test_context_of_spaces_has_the_prefix_token_before_it(byte_lm):
    yes = byte_lm.tokenizer.encode(" yes")
    assert score(byte_lm, (" ", "yes"))[0][0] == pytest.approx(plain(byte_lm, [0], yes), abs=NATS)


@pytest.mark.parametrize("pair", [("", ""), ("yes", ""), ("", zoo.END)])
def test_nothing_to_score_names_the_request(byte_lm, pair):
    with pytest.raises(RowError, match=r"request 1 \(task made, document 1\): the continuation has no token"):
        score(byte_lm, ("a", "b"), pair)


def test_continuation_longer_than_the_context_names_the_request(byte_lm):
    with pytest.raises(RowError, match=r"request 0 .*the continuation has 65 tokens and the model's context is 64"):
        score(byte_lm, ("yes", "!" * 65))
    assert score(byte_lm, ("yes", "!" * 64))[0][0] < 0


def test_context_longer_than_the_window_loses_its_left(byte_bpe, byte_lm, caplog):
    pairs = [("yes " * 30 + "é" * 40, " so"), ("The", " answer"), ("漢字" * 40, " it is so."), ("a" * 64, "b")]
    expected = score(hf(byte_bpe), *pairs)
    with caplog.at_level(logging.WARNING, logger="loglik.integrations.lm_eval"):
        got = score(byte_lm, *pairs)
    assert close(got, expected)
    sizes = [sum(map(len, byte_lm._encode_pair(*pair))) for pair in pairs]
    assert byte_lm.truncated == [max(0, size - 65) for size in sizes]  # the last token is a target only
    assert byte_lm.truncated[1::2] == [0, 0]
    (record,) = (record for record in caplog.records if record.name.startswith("loglik."))
    assert record.getMessage().startswith("2 of 4 requests exceed the context of 64 tokens")
    assert f"{sum(byte_lm.truncated)} tokens were cut" in record.getMessage()


# Batches, order, padding, BOS

PAIRS = [
    ("", "hello world"),
    ("The Answer", " is 42, yes"),
    ("yes yes, it is so.", " the then there"),
    ("é", "漢字 ñandú"),
    ("hello", " world"),
    ("hello", " wor"),
    ("The answer is ", "42"),
    ("hello", " world"),  # asked twice
    (f"yes{zoo.END}The", " answer"),  # EOS, which is also the padding, within the text
    ("", f"{zoo.END}hello"),  # begins with the prefix token, which stands once
    ("x " * 28, "y" * 5),
]


def scored_by_hf(lm, pairs) -> list[int]:
    """Those where the joint tokens leave something to the continuation; `hf` stops at the others."""
    return [i for i, (a, b) in enumerate(pairs) if not a or super(LoglikLM, lm)._encode_pair(a, b)[1]]


@pytest.mark.parametrize("model", ["byte_lm", "bos_lm"])
def test_scores_do_not_depend_on_the_batch_or_the_order(model, request):
    lm = request.getfixturevalue(model)
    alone = [score(lm, pair)[0] for pair in PAIRS]
    home = lm.pretrained
    for tokens in (1, 64, 10_000):
        batched = LoglikLM(home, device="cpu", max_batch_tokens=tokens)
        assert close(score(batched, *PAIRS), alone)
        order = random.Random(tokens).sample(range(len(PAIRS)), len(PAIRS))
        assert close(score(batched, *(PAIRS[i] for i in order)), [alone[i] for i in order])
    kept = scored_by_hf(lm, PAIRS)
    assert len(kept) >= 7
    assert close(score(hf(home, batch_size=3), *(PAIRS[i] for i in kept)), [alone[i] for i in kept])
    assert alone[4] == alone[7]


def test_requests_that_share_a_beginning_keep_their_positions(byte_bpe):
    """("", "hello world") and ("hello", " world") meet at one context, and differ in what they score."""
    lm = LoglikLM(str(byte_bpe), device="cpu", add_bos_token=True)
    bos, hello, world = [0], lm.tokenizer.encode("hello", add_special_tokens=False), lm.tok_encode(" world", False)
    (whole, _), (end, _) = score(lm, ("", "hello world"), ("hello", " world"))
    assert whole == pytest.approx(plain(lm, bos, hello + world), abs=NATS)
    assert end == pytest.approx(plain(lm, bos + hello, world), abs=NATS)


def test_first_choices_equal_an_argmax(byte_lm):
    """Greedy continuations are greedy, beside longer rows too, until one token of them is another."""
    ids = byte_lm.tokenizer.encode("The Answer is")
    made = list(ids)
    for _ in range(3):
        with torch.no_grad():
            made.append(int(byte_lm.text_model.model(torch.tensor([made])).logits[0, -1].argmax()))
    best = made[len(ids) :]
    other = (best[1] + 1) % len(byte_lm.tokenizer)
    requests = [
        (None, ids, best),
        (None, ids, best[:1]),
        (None, ids, [best[0], other]),
        (None, ids, [other, *best[1:]]),
        (None, ids * 3, [other, other + 1]),
    ]
    greedy = [choice for _, choice in byte_lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert greedy[:3] == [True, True, False]


def test_bos_is_decided_for_each_text(bos_lm):
    """A first text that spells BOS must not take it away from the others, nor theirs double its own."""
    contexts = ["<s>hello", "hello world", "The Answer is", "<s>The Answer is"]
    bos = bos_lm.tokenizer.bos_token_id
    settings = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    together = bos_lm.generate_until(ask("generate_until", *((c, settings) for c in contexts)))
    assert together == [bos_lm.generate_until(ask("generate_until", (c, settings)))[0] for c in contexts]
    assert close(score(bos_lm, *((c, " yes") for c in contexts)), [score(bos_lm, (c, " yes"))[0] for c in contexts])
    assert all(bos_lm.tok_encode(c).count(bos) == 1 for c in contexts)


def test_rolling_equals_hf_and_restores_the_order(byte_bpe, byte_lm):
    texts = [(" ".join(zoo.CORPUS[:n]),) for n in (3, 0, 1, 5)] + [("hello",), ("x" * 64,), ("x" * 65,)]
    expected = hf(byte_bpe, batch_size=3).loglikelihood_rolling(ask("loglikelihood_rolling", *texts), disable_tqdm=True)
    got = byte_lm.loglikelihood_rolling(ask("loglikelihood_rolling", *texts))
    assert got == pytest.approx(expected, abs=NATS * 5)
    assert got[1] == 0.0
    assert got[4] == pytest.approx(plain(byte_lm, [0], byte_lm.tokenizer.encode("hello")), abs=NATS)


def test_tokenizer_is_left_alone(byte_bpe):
    lm = LoglikLM(str(byte_bpe), device="cpu")
    before = lm.tokenizer.padding_side, lm.tokenizer.pad_token, len(lm.tokenizer), str(lm.tokenizer.backend_tokenizer)
    score(lm, *PAIRS)
    lm.generate_until(ask("generate_until", ("yes", {"max_gen_toks": 2})))
    after = lm.tokenizer.padding_side, lm.tokenizer.pad_token, len(lm.tokenizer), str(lm.tokenizer.backend_tokenizer)
    assert before == after
    assert before[1] is None


# Generation

PROMPTS = ["hello world", "The Answer is", "yes", f"yes{zoo.END}The", "漢字 é", "the then there", "wer wer", "yes"]


@pytest.mark.parametrize("model", ["byte_lm", "bos_lm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_gen_toks": 6},
        {"until": ["e", "q"], "max_gen_toks": 6, "do_sample": False},
        {"until": "\n", "max_new_tokens": 5, "temperature": 0.0},
        {"max_gen_toks": 4, "do_sample": True, "top_k": 1, "temperature": 0.7},
    ],
    ids=["plain", "stops", "aliases", "sampling"],
)
def test_generation_equals_hf_one_by_one(model, settings, request):
    lm = request.getfixturevalue(model)
    theirs = hf(lm.pretrained, batch_size=1)
    asked = ask("generate_until", *((prompt, dict(settings)) for prompt in PROMPTS))
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert lm.generate_until(asked) == expected
    batched = LoglikLM(lm.pretrained, device="cpu", batch_size=8)
    assert batched.generate_until(asked, disable_tqdm=True) == expected
    assert batched.generate_until(asked[3::-1]) == expected[3::-1]


def test_long_prompts_lose_their_left(bos_lm):
    lm = LoglikLM(bos_lm.pretrained, device="cpu", max_length=10)
    asked = ask("generate_until", *((prompt, {"max_gen_toks": 6}) for prompt in PROMPTS))
    assert lm.generate_until(asked) == hf(lm.pretrained, max_length=10).generate_until(asked, disable_tqdm=True)
    assert lm.truncated == [max(0, len(lm.tokenizer.encode(prompt)) - 4) for prompt in PROMPTS]
    assert 0 < sum(count > 0 for count in lm.truncated) < len(PROMPTS)


def test_rows_of_a_batch_end_by_themselves(byte_lm):
    """The first row of a batch meets the stop string, the second never does; each is as if it were alone."""
    prompts = ["é so", "yes yes yes"]
    assert [len(byte_lm.tokenizer.encode(prompt)) for prompt in prompts] == [3, 3]
    free = byte_lm.generate_until(ask("generate_until", *((prompt, {"max_gen_toks": 8}) for prompt in prompts)))
    stop = free[0][4:6]
    assert stop not in free[1]
    assert free[0].count(stop) >= 2
    batched = LoglikLM(byte_lm.pretrained, device="cpu", batch_size=2)
    settings = {"max_gen_toks": 8, "until": [stop]}
    got = batched.generate_until(ask("generate_until", *((prompt, settings) for prompt in prompts)))
    assert got == [free[0].split(stop)[0], free[1]]
    assert got[0]


def test_stop_strings_are_found_however_they_are_cut(byte_lm):
    tokenizer = byte_lm.tokenizer
    stop = "hello world"
    pieces = [tokenizer.convert_tokens_to_ids(c) for c in "helloĠworld"]  # eleven tokens for a text of two
    rows = torch.tensor([[7, *pieces], [7, *tokenizer.encode(stop), *[9] * 9]])
    assert StopStrings(tokenizer, [stop], 1)(rows, None).tolist() == [True, True]
    assert StopStrings(tokenizer, [stop], 2)(rows, None).tolist() == [False, False]  # prompts are not searched
    criterion = StopStrings(tokenizer, [stop], 1)
    assert criterion(rows[:, :4], None).tolist() == [False, True]
    assert criterion(rows, None).tolist() == [True, True]
    assert criterion(rows[:, :2], None).tolist() == [True, True]  # what has ended stays so


def test_thoughts_are_cut_off(byte_lm):
    asked = ask("generate_until", ("é so", {"max_gen_toks": 8}))
    (whole,) = byte_lm.generate_until(asked)
    prompt = torch.tensor([byte_lm.tok_encode("é so")])
    model = byte_lm.text_model.model
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    assert byte_lm.tok_decode(ids) == whole
    assert ids[0] not in ids[1:]
    for marker in (ids[0], whole[:3]):  # the first token, as an id and as text
        lm = LoglikLM(byte_lm.pretrained, device="cpu", think_end_token=marker)
        assert lm.generate_until(asked) == [byte_lm.tok_decode(ids[1:])] != [whole]
        theirs = HFLM(byte_lm.pretrained, device="cpu", think_end_token=marker)
        assert lm.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    assert LoglikLM(byte_lm.pretrained, think_end_token=str(ids[0])).think_end_token == ids[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_gen_toks": 64}, r"request 0 .*max_gen_toks 64 leaves no room for a prompt in the context of 64 tokens"),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 2}, "do_sample needs a temperature above 0"),
    ],
)
def test_generation_settings_are_refused_in_a_sentence(byte_lm, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        byte_lm.generate_until(ask("generate_until", ("yes", settings)))


# The model that the harness sees


@pytest.mark.parametrize(
    "options",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}, {"max_length": 20}],
    ids=str,
)
@pytest.mark.parametrize("home", ["byte_bpe", "adds_bos"])
def test_attributes_and_options_equal_hf(home, options, request):
    where = request.getfixturevalue(home)
    ours, theirs = LoglikLM(str(where), device="cpu", **options), hf(where, **options)
    for name in (
        "max_length",
        "prefix_token_id",
        "eot_token_id",
        "rank",
        "world_size",
        "tokenizer_name",
        "max_gen_toks",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in ("hello world", "<s>yes", f"{zoo.END}yes", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    assert ours.tok_encode("yes yes, it", left_truncate_len=2) == theirs.tok_encode("yes yes, it", left_truncate_len=2)
    assert ours.tok_decode([3, 0, 5]) == theirs.tok_decode([3, 0, 5])
    pairs = [PAIRS[i] for i in scored_by_hf(ours, PAIRS)]
    assert close(score(ours, *pairs), score(theirs, *pairs))
    texts = ask("loglikelihood_rolling", *((text,) for text in zoo.CORPUS[:2]))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts, True), abs=5 * NATS)


def test_chat_template_equals_hf(byte_bpe, tmp_path):
    shutil.copytree(byte_bpe, tmp_path / "chat")
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}{{ tone }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (tmp_path / "chat" / "chat_template.jinja").write_text(template, encoding="utf-8")
    options = {"chat_template_args": {"tone": "!"}}
    ours, theirs = (
        LoglikLM(str(tmp_path / "chat"), device="cpu", **options),
        HFLM(str(tmp_path / "chat"), device="cpu", **options),
    )
    history = [{"role": "user", "content": "hello"}]
    for messages in (history, [{"role": "system", "content": "be"}, *history]):
        text = ours.apply_chat_template(messages)
        assert text == theirs.apply_chat_template(messages) == "[user!] hello\n[assistant] "
    assistant = [*history, {"role": "assistant", "content": "yes"}]
    assert ours.apply_chat_template(assistant, False) == theirs.apply_chat_template(assistant, False)
    assert ours.chat_template(True) == theirs.chat_template(True) == template
    assert ours.chat_template(False) is None


def test_loaded_model_and_name_give_equal_scores(byte_bpe, byte_lm):
    loaded = load(byte_bpe, device="cpu")
    assert close(score(LoglikLM(model=loaded), *PAIRS), score(byte_lm, *PAIRS))
    assert get_model("loglik") is LoglikLM
    assert get_model("hf") is HFLM
    made = LoglikLM.create_from_arg_string(
        f"pretrained={byte_bpe},max_batch_tokens=32", {"device": "cpu", "batch_size": "auto", "max_batch_size": 8}
    )
    assert close(score(made, *PAIRS), score(byte_lm, *PAIRS))
    assert made.get_model_info()["model_num_parameters"] == sum(p.numel() for p in loaded.model.parameters())


def test_cache_hook_sees_every_answer(byte_lm):
    seen = []

    class Hook:
        def add_partial(self, kind, arguments, answer):
            seen.append((kind, tuple(arguments), answer))

    lm = LoglikLM(model=byte_lm.text_model)
    lm.set_cache_hook(Hook())
    answers = score(lm, *PAIRS[:3])
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("hello",)))
    (text,) = lm.generate_until(ask("generate_until", ("yes", {"max_gen_toks": 2})))
    expected = [("loglikelihood", pair, answer) for pair, answer in zip(PAIRS[:3], answers, strict=True)]
    expected += [
        ("loglikelihood_rolling", ("hello",), total),
        ("generate_until", ("yes", {"max_gen_toks": 2}), text),
    ]
    assert seen == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give the loglik model either pretrained=DIR"),
        ({"pretrained": "tiny", "peft": "x"}, "the loglik model has no option 'peft'"),
        ({"pretrained": "tiny", "max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
        ({"pretrained": "tiny", "max_length": 0}, "max_length must be at least 1"),
        ({"pretrained": "tiny", "enable_thinking": True}, "enable_thinking needs think_end_token"),
        ({"pretrained": "/nowhere/at all"}, "/nowhere/at all"),
    ],
    ids=str,
)
def test_options_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        LoglikLM(**options)


def test_other_models_are_refused_in_a_sentence():
    tokenizer = zoo.byte_level_tokenizer()
    seq2seq = Seq2SeqLM(zoo.build(zoo.SEQ2SEQ["t5"]), zoo.t5_tokenizer())
    with pytest.raises(InputError, match="scores causal language models, not Seq2SeqLM"):
        LoglikLM(model=seq2seq)
    model = zoo.build(zoo.CAUSAL["gpt2"], vocabulary=len(tokenizer))
    with pytest.raises(InputError, match="no tokenizer"):
        LoglikLM(model=CausalLM(model))
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        LoglikLM(model=CausalLM(model, tokenizer))


def test_not_a_number_is_refused(byte_bpe):
    model = load(byte_bpe, device="cpu")
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(RowError, match="not finite"):
        score(LoglikLM(model=model), ("yes", " yes"))


# The command line


def run_cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "loglik.integrations.lm_eval", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_command_line_prints_the_table(tmp_path, byte_bpe):
    write_made_data(tmp_path)
    done = run_cli(
        tmp_path,
        *("run", "--model", "loglik", "--model_args", f"pretrained={byte_bpe}", "--device", "cpu"),
        *("--tasks", "loglik_gsm8k_choice", "--include_path", str(TASKS), "--limit", "4"),
    )
    assert done.returncode == 0, done.stderr
    assert "|loglik_gsm8k_choice|" in done.stdout.replace(" ", "")
    assert "|acc_norm" in done.stdout.replace(" ", "")
    assert f"loglik ({{'pretrained': '{byte_bpe}'}})" in done.stdout


@pytest.mark.slow
def test_command_line_refuses_in_a_sentence(tmp_path):
    write_made_data(tmp_path)
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    done = run_cli(
        tmp_path,
        *("--model", "loglik", "--model_args", f"pretrained={nowhere}"),
        *("--tasks", "loglik_gsm8k_choice", "--include_path", str(TASKS)),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("loglik: "))
    assert "has no config.json" in sentence
