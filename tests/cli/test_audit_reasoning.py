"""`loglik audit reasoning`: its numbers are those of the functions, and bad input is one sentence."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from audit_runner import run_audit

from loglik.cli.audits.reasoning import AuditReasoning
from loglik.models.ngram import NGramLM
from loglik.signals.detection import auroc
from loglik.signals.early_stopping import stop_outcome, stop_summary
from loglik.signals.entropy_curve import trace_scores
from loglik.signals.equivalence import exact_match, meanings
from loglik.signals.option_curve import option_entropy_curve
from loglik.signals.trace_entropy import answer_entropy_curve, open_entropy_curve, step_tokens, trace_answers

QUESTIONS = ["import os", "def add(a, b):", "class Point:", "for i in range(3):"]
TRACES = ["import sys\nimport re", "c = a + b\nd = c\nreturn d", "x = 1", "print(i)\n\nprint(2)"]
OPTIONS = [["sys", "banana"], ["a + b", "zzz", "c"], ["pass", "self"], ["i", "42"]]
NUMBERS = [0, 1, 1, 0]
TEXTS = ["sys", "a + b", "self", "i"]
CORRECT = [True, True, False, False]
CHEAP = ["-m", "tiny", "--device", "cpu", "--bootstrap", 20, "--max-tokens", 3]


@pytest.fixture(autouse=True)
def loaded_once(tiny, monkeypatch):
    """`-m tiny` is read once for all tests."""
    monkeypatch.setattr(sys.modules["loglik.models.load"], "load", lambda name, **options: tiny)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def source(tmp_path, name="in.jsonl", **columns):
    given = {"question": QUESTIONS, "trace": TRACES} | columns
    return write(tmp_path / name, [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)])


def run(tmp_path, *arguments):
    paths = [tmp_path / name for name in ("out.jsonl", "summary.json", "page.html")]
    run_audit(AuditReasoning, *arguments, "-o", paths[0], "--summary", paths[1], "--report", paths[2])
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    return rows, json.loads(paths[1].read_text()), paths[2].read_text()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditReasoning, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def assert_self_contained(text, plots):
    assert text.count("<svg") == plots
    for known in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org", "https://matplotlib.org"):
        text = text.replace(known, "")
    assert "http" not in text
    assert "<script" not in text


def steps_of(trace):
    return [line for line in trace.split("\n") if line]


def same(found, expected):
    assert found == pytest.approx(expected, abs=1e-4)


def test_options_are_followed(tmp_path, tiny):
    given = source(tmp_path, options=OPTIONS, answer=NUMBERS, correct=CORRECT)
    options = ["--threshold", 0.3, "--cue", "\n#", "--separator", "\n  "]
    rows, told, page = run(tmp_path, given, *CHEAP, *options)
    curves, outcomes = [], []
    for row, question, trace, texts, right in zip(rows, QUESTIONS, TRACES, OPTIONS, NUMBERS, strict=True):
        steps = steps_of(trace)
        found = option_entropy_curve(tiny, question, steps, texts, right=right, cue="\n#", separator="\n  ")
        same(row["entropy"], found.curve.entropy.value.tolist())
        same(row["information_gain"], found.curve.information_gain.tolist())
        assert row["choices"] == found.choice.tolist()
        tokens = step_tokens(tiny, question, steps, separator="\n  ")
        outcome = stop_outcome(
            found.curve.early_stop(0.3),
            tokens,
            answers=row["choices"],
            right=[choice == right for choice in row["choices"]],
        )
        assert {name: row[name] for name in outcome.record()} == outcome.record()
        curves.append(found.curve)
        outcomes.append(outcome)
    for name, value in stop_summary(outcomes).items():
        assert told[name] == pytest.approx(value)
    for name, values in trace_scores(curves).items():
        assert told[name]["auroc"] == pytest.approx(auroc(values, CORRECT))
    assert (told["entropy_of"], told["correct_is"], told["accuracy"]) == ("options", "the column correct", 0.5)
    assert told["mean_steps"] == 2.0
    assert_self_contained(page, 4)  # ROC, curves, heat map, trade-off


def test_true_answers_are_followed(tmp_path, tiny):
    own = [trace_answers(tiny, q, steps_of(t), max_tokens=3)[-1] for q, t in zip(QUESTIONS, TRACES, strict=True)]
    texts = [said if said and number < 2 else "zzz" for number, said in enumerate(own)]
    given = source(tmp_path, answer=texts)
    rows, told, page = run(tmp_path, given, *CHEAP, "--threshold", 2, "--patience", 2, "--stall", 1, "--min-fall", 0.1)
    hits = []
    for row, question, trace, answer in zip(rows, QUESTIONS, TRACES, texts, strict=True):
        steps = steps_of(trace)
        curve = answer_entropy_curve(tiny, question, steps, " " + answer)
        same(row["entropy"], curve.entropy.value.tolist())
        same(row["log_prob"], curve.log_likelihood.value.tolist())
        advice = curve.early_stop(2, patience=2, stall=1, min_fall=0.1)
        assert row["stop_step"] == (curve.num_steps if advice.step is None else advice.step)
        assert row["stop_reason"] == advice.reason
        said = list(trace_answers(tiny, question, steps, max_tokens=3))
        assert row["answers"] == said
        numbers = meanings(exact_match, question, [*said, answer])
        assert row["right_in_the_end"] == (numbers[-2] == numbers[-1]) == row["correct"]
        assert row["same_answer"] == (numbers[row["stop_step"]] == numbers[-2])
        hits.append(row["correct"])
    assert told["correct_is"] == "the model's answer after the whole trace"
    assert told["accuracy"] == np.mean(hits)
    assert told["entropy_of"] == "answer"
    assert set(hits) == {True, False}
    assert 0 <= told["drop"]["auroc"] <= 1
    assert_self_contained(page, 4)


def test_nothing_need_be_known(tmp_path, tiny):
    rows, told, page = run(tmp_path, source(tmp_path), *CHEAP[:-2], "--max-tokens", 0, "--steps", "sentences")
    for row, question, trace in zip(rows, QUESTIONS, TRACES, strict=True):
        same(row["entropy"], open_entropy_curve(tiny, question, steps_of(trace)).entropy.value.tolist())
        assert row["log_prob"] is None
        assert row["same_answer"] is None
    assert told["entropy_of"] == "first token"
    assert told["same_answer"] is None
    assert "accuracy" not in told
    assert_self_contained(page, 2)


def test_the_conclusion_is_left_out_of_the_curve_and_not_of_the_costs(tmp_path):
    lists = [steps_of(trace) for trace in TRACES]
    given = source(tmp_path, trace=lists, options=OPTIONS, answer=NUMBERS, correct=CORRECT)
    kept, _, _ = run(tmp_path, given, *CHEAP)
    dropped, told, _ = run(tmp_path, given, *CHEAP, "--conclusion", "drop", "--threshold", 5)
    for long, short in zip(kept, dropped, strict=True):
        assert short["entropy"] == long["entropy"][:-1]
        assert short["choices"] == long["choices"]
        assert short["tokens"] == long["tokens"]
        assert (short["stop_step"], short["tokens_saved"]) == (0, short["tokens"])
    assert told["tokens_saved"] == 1.0
    assert told["traces_without_steps"] == 1  # the third had one step
    assert told["drop"]["positives"] + told["drop"]["negatives"] == 3


def test_one_class_is_said(tmp_path):
    _, told, page = run(tmp_path, source(tmp_path, options=OPTIONS, correct=[False] * 4), *CHEAP)
    assert told["auroc"] == "undefined: all traces are wrong"
    assert told["accuracy_in_the_end"] is None
    assert_self_contained(page, 3)


def test_bad_rows_are_refused_with_a_sentence(tmp_path, capsys):
    def sentence(*options, **columns):
        return refused(capsys, source(tmp_path, **columns), *CHEAP, *options)

    assert "line 2: question must be a text that is not empty" in sentence(question=["a", "", "b", "c"])
    assert "line 3: trace must be a text that is not empty, got nothing" in sentence(trace=["a", "b", None, "c"])
    assert "line 1: trace must be a text that is not empty, got ['a']" in sentence(trace=[["a"], "b", "c", "d"])
    assert "line 4: step 1 of trace is empty: remove it" in sentence(trace=[["a"]] * 3 + [["a", " "]])
    assert "line 1: options must be a list of texts, got 'ab'" in sentence(options=["ab"] * 4)
    assert "line 3: the options: needs a list of at least two options" in sentence(
        options=[["a", "b"]] * 2 + [["a"]] * 2
    )
    assert "line 2: answer must be an option's number from 0 to 2, got 3" in sentence(
        options=OPTIONS, answer=[0, 3, 0, 0]
    )
    assert "line 1: answer must be an option's number from 0 to 1, got 0.5" in sentence(
        options=OPTIONS, answer=[0.5] * 4
    )
    assert "line 1: answer must be a finite number, got nan" in sentence(options=OPTIONS, answer=[float("nan")] * 4)
    assert "line 1: answer must be a text that is not empty, got 1" in sentence(answer=[1] * 4)
    assert "line 2 has no options, and other rows have one" in sentence(
        options=[["a", "b"], None, ["a", "b"], ["a", "b"]]
    )
    assert "line 4: correct must be true or false, got 0.5" in sentence(correct=[True, False, True, 0.5])
    assert "line 2: after 1 steps: the trace has" in sentence(answer=TEXTS, trace=["a", "zq " * 2000, "b", "c"])
    assert "line 2: after 1 steps, option 0: " in sentence(options=OPTIONS, trace=["a", "zq " * 2000, "b", "c"])


def test_bad_options_are_refused_with_a_sentence(tmp_path, capsys, monkeypatch):
    given = source(tmp_path, answer=TEXTS)
    for options, sentence in (
        (["--threshold", -1], "line 1: threshold and min_fall must be at least 0 and finite, got -1"),
        (["--patience", 0], "line 1: patience and stall must be at least 1, got 0"),
        (["--max-tokens", -1], "--max-tokens must be at least 0"),
        (["--bootstrap", 0], "--bootstrap at least 1"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
    ):
        assert sentence in refused(capsys, given, *CHEAP, *options)

    class Scorer:
        """Scores, and has no next-token distributions."""

        def __init__(self, inner):
            self.tokenizer, self.layout, self.max_length = inner.tokenizer, inner.layout, None

    grams = NGramLM.train(["import os"], order=1)
    monkeypatch.setattr(AuditReasoning, "load", lambda self: Scorer(grams))
    assert "line 1: answer entropy needs per-token conditionals" in refused(capsys, given, *CHEAP)
