"""``loglik audit effects``: its regression and bands are those of the functions; the model answers where nobody did."""

from __future__ import annotations

import json

import numpy as np
import pytest
from audit_runner import run_audit

import loglik
from loglik.cli.audits.effects import AuditEffects
from loglik.signals.probability_effects import probability_effects
from loglik.signals.stimuli import accuracy_by_band, greedy_answers, matched_bands, paired_contrast

WORDS = ["import", "def", "return", "zq", "wug", "print", "blicket", "for", "in", "self"]


def records(count=40, seed=0, tasks=False):
    """Outputs of two to five words; common words are right more often."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        words = random.choice(WORDS, size=random.integers(2, 6))
        right = random.random() < 0.75 - 0.25 * sum(word in ("zq", "wug", "blicket") for word in words)
        row = {"input": " ".join(words)[::-1] + "!" * int(random.integers(3)), "output": " ".join(words)}
        found.append(row | {"correct": bool(right), "rarity": float(random.integers(9))})
        if tasks:
            found[-1]["task"] = "common" if i % 2 else "rare"
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditEffects, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


COMMON = ("-m", "tiny", "--device", "cpu")


@pytest.mark.parametrize("prior", ["firth", "ridge"])
def test_numbers_are_those_of_the_functions(tmp_path, tiny, capsys, prior):
    rows = records()
    source = write(tmp_path / "in.jsonl", rows)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    options = ("--covariates", "rarity", "--prior", prior, "-o", out, "--summary", summary, "--report", page)
    run_audit(AuditEffects, source, *COMMON, *options)
    inputs, outputs = (loglik.score(tiny, [row[side] for row in rows]) for side in ("input", "output"))
    correct = [row["correct"] for row in rows]
    expected = probability_effects(correct, outputs, inputs, {"rarity": [row["rarity"] for row in rows]}, prior=prior)
    told, found = json.loads(summary.read_text()), read(out)
    assert [row["output_log_prob"] for row in found] == pytest.approx(outputs.value.tolist(), abs=1e-3)
    assert [row["input_tokens"] for row in found] == inputs.num_units.tolist()
    assert list(told["effects"]) == ["intercept", *(effect.name for effect in expected.effects)]
    for name, effect in told["effects"].items():
        own = expected.intercept if name == "intercept" else expected[name]
        assert effect["estimate"] == pytest.approx(own.estimate, abs=2e-3)
        assert effect["p_value"] == pytest.approx(own.p_value, abs=2e-3)
    assert told["auroc_of_output"] == pytest.approx(expected.auroc, abs=1e-6)
    assert told["accuracy"] == np.mean(correct)
    for band, own in zip(told["bands"], accuracy_by_band(correct, outputs, 3), strict=True):
        assert (band["items"], band["accuracy"]) == (own.count, own.accuracy.value)
        assert (band["low"], band["high"]) == pytest.approx((own.accuracy.low, own.accuracy.high))
        assert band["mean_tokens"] == pytest.approx(own.num_units)
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "<script" not in text
    assert "auroc of output" in capsys.readouterr().out


def test_matched_bands_and_no_lengths(tmp_path, tiny):
    rows = records(60)
    source, summary = write(tmp_path / "in.jsonl", rows), tmp_path / "summary.json"
    run_audit(AuditEffects, source, *COMMON, "--bands", 2, "--matched", "--no-lengths", "--summary", summary)
    told = json.loads(summary.read_text())
    outputs = loglik.score(tiny, [row["output"] for row in rows])
    bands = accuracy_by_band([row["correct"] for row in rows], outputs, matched_bands(outputs, 2))
    assert [band["items"] for band in told["bands"]] == [band.count for band in bands]
    assert told["bands"][0]["mean_tokens"] == told["bands"][1]["mean_tokens"]
    assert "output tokens" not in told["effects"]


def test_tasks_are_compared_on_the_outputs_they_share(tmp_path):
    rows = [row | {"task": "rot13"} for row in records(12)]
    rows += [row | {"task": "rot12", "correct": i == 0} for i, row in enumerate(rows[:9])]
    source = write(tmp_path / "in.jsonl", rows)
    summary, page = tmp_path / "summary.json", tmp_path / "page.html"
    run_audit(AuditEffects, source, *COMMON, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    assert told["tasks"]["rot13"]["accuracy"] == np.mean([row["correct"] for row in rows[:12]])
    assert told["tasks"]["rot12"]["items"] == 9
    (contrast,) = told["contrasts"]
    own = paired_contrast([row["correct"] for row in rows[:9]], [row["correct"] for row in rows[12:]])
    assert (contrast["first"], contrast["second"], contrast["items"]) == ("rot13", "rot12", 9)
    assert (contrast["difference"], contrast["p_value"]) == (own.difference.value, own.p_value)
    assert page.read_text().count("<svg") == 3


def test_the_model_answers_where_the_rows_do_not_say(tmp_path, tiny):
    """Half of the outputs are what the model says, the others what it does not."""
    inputs = ["import os\nos.path.", "def __init__(self", "for i in ", "return ", "print(", "class "]
    said = greedy_answers(tiny, [text + "#" for text in inputs], max_tokens=4)
    rows = [
        {"input": text, "output": said[i] if i % 2 and said[i].strip() else "zq wug"} for i, text in enumerate(inputs)
    ]
    expected = [row["output"] != "zq wug" for row in rows]
    assert 0 < sum(expected) < 6
    source, out, summary = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "summary.json"
    options = ("--template", "{input}#", "--max-tokens", 4, "--no-lengths", "-o", out, "--summary", summary)
    run_audit(AuditEffects, source, *COMMON, *options)
    found = read(out)
    assert [row["answer"] for row in found] == said
    assert [row["correct"] for row in found] == expected
    assert json.loads(summary.read_text())["answerer"] == "tiny"


@pytest.mark.parametrize("right", [True, False])
def test_one_class_only_has_no_effect_and_says_so(tmp_path, right):
    source = write(tmp_path / "in.jsonl", [row | {"correct": right} for row in records(9)])
    summary, page = tmp_path / "summary.json", tmp_path / "page.html"
    run_audit(AuditEffects, source, *COMMON, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    assert told["effects"] == "undefined: all answers are " + ("right" if right else "wrong")
    assert [band["accuracy"] for band in told["bands"]] == [float(right)] * 3
    assert "auroc_of_output" not in told
    assert page.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, ("--bands", 41), "--bands must be from 1 to the number of rows, 40, got 41"),
        ({}, ("--bands", 0), "--bands must be from 1"),
        ({"correct": "yes"}, (), "line 2: correct must be true or false"),
        ({"correct": None}, (), "line 2 has no correct"),
        ({"output": ""}, (), "line 2: output must be a text that is not empty"),
        ({"input": 3}, (), "line 2: input must be a text that is not empty, got 3"),
        ({"rarity": float("nan")}, ("--covariates", "rarity"), "line 2"),
        ({}, ("--covariates", "fame"), "line 1: fame must be a finite number, got nothing"),
        ({}, ("--template", "decode"), "--template must have {input}"),
        ({}, ("--level", 1.0), "level must lie between 0 and 1"),
        ({}, ("--prior", "ridge", "--strength", 0), "strength must be positive"),
        ({}, ("--batch-size", 0), "--batch-size must be at least 1"),
        ({"output": "word " * 3000}, (), "line 2"),
    ],
)
def test_bad_input(tmp_path, capsys, change, options, sentence):
    rows = records()
    rows[1] |= change
    assert sentence in refused(capsys, write(tmp_path / "in.jsonl", rows), *COMMON, *options)


def test_bad_answers(tmp_path, capsys):
    rows = [{"input": "a b", "output": "b"}, {"input": "word " * 3000, "output": "c"}, {"input": "c d", "output": "e"}]
    source = write(tmp_path / "in.jsonl", rows)
    assert "line 2" in refused(capsys, source, *COMMON)
    short = write(tmp_path / "short.jsonl", [rows[0], rows[2], rows[0]])
    assert "--max-tokens must be at least 1" in refused(capsys, short, *COMMON, "--max-tokens", 0)
    long = refused(capsys, short, *COMMON, "--template", "word " * 3000 + "{input}")
    assert "line 1: has" in long
    assert "do not fit" in long
