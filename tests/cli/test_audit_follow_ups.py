"""`loglik audit follow-ups`: the numbers of the functions, mined pairs, plots, one sentence for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from audit_runner import run_audit

import loglik
from loglik.cli.audits.follow_ups import AuditFollowUps
from loglik.signals.feedback import DEFAULT_FOLLOW_UPS, follow_up_likelihood, mine_pairs
from loglik.signals.intervals import mean_intervals

SIDES = {"positive": ["Yes, that works.", "Thank you."], "negative": ["No, that fails."]}
SINGLE = [
    {"prompt": "Import os.", "response": "import os"},
    {"prompt": "Import os.", "response": "zq qz"},
    {"prompt": "Add two numbers.", "response": "def add(a, b):\n    return a + b"},
    {"prompt": "Import os.", "response": "from os import path"},
    {"prompt": "Add two numbers.", "response": "pass"},
]
PAIRS = [
    {"prompt": "Import os.", "chosen": "import os", "rejected": "zq qz"},
    {"prompt": "Add two numbers.", "chosen": "def add(a, b):\n    return a + b", "rejected": "pass"},
    {"prompt": "Say no.", "chosen": "no", "rejected": "no"},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def audited(tmp_path, records, *options):
    source = write(tmp_path / "in.jsonl", records)
    sides = tmp_path / "sides.json"
    sides.write_text(json.dumps(SIDES))
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    run_audit(
        AuditFollowUps,
        *(source, "-m", "tiny", "--device", "cpu", "-o", out, "--summary", summary, "--report", page),
        *("--follow-ups", sides, *options),
    )
    return read(out), json.loads(summary.read_text()), page.read_text()


def rewards(records, *fields, **options):
    model = loglik.load("tiny", device="cpu")
    texts = [record[field] for field in fields for record in records]
    prompts = [record["prompt"] for record in records] * len(fields)
    return follow_up_likelihood(model, prompts, texts, **SIDES, **options).reward.value


def test_single_responses_are_rewarded_and_mined(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows, summary, page = audited(tmp_path, SINGLE, "--pairs", pairs)
    expected = rewards(SINGLE, "response")
    assert [row["reward"] for row in rows] == pytest.approx(expected.tolist())
    assert [row["prompt_number"] for row in rows] == [0, 0, 1, 0, 1]
    best, worst = mine_pairs(expected, torch.tensor([0, 0, 1, 0, 1]))
    found = read(pairs)
    assert [pair["chosen"] for pair in found] == [SINGLE[i]["response"] for i in best]
    assert [pair["rejected"] for pair in found] == [SINGLE[i]["response"] for i in worst]
    assert all(pair["reward_chosen"] > pair["reward_rejected"] for pair in found)
    assert summary["pairs"] == len(found) == 2
    assert summary["prompts"] == 2
    assert summary["mean_reward"] == pytest.approx(float(expected.mean()))
    assert summary["follow_ups"] == {"positive": 2, "negative": 1}
    assert page.count("<svg") == 1
    _, told, _ = audited(tmp_path, SINGLE, "--gap", 1e6)
    assert told["pairs"] == 0


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_pairs_are_judged(tmp_path, aggregate):
    rows, summary, page = audited(tmp_path, PAIRS, "--aggregate", aggregate)
    chosen, rejected = rewards(PAIRS, "chosen", "rejected", aggregate=aggregate).chunk(2)
    margin = chosen - rejected
    assert [row["margin"] for row in rows] == pytest.approx(margin.tolist())
    assert [row["correct"] for row in rows] == (margin > 0).tolist()
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    assert summary["accuracy"] == pytest.approx(float(right.mean()))
    assert summary["accuracy_interval"] == pytest.approx(mean_intervals(right).interval[0].tolist())
    assert summary["ties"] == 1  # the same response twice
    assert page.count("<svg") == 2


def test_categories_of_the_default_follow_ups(tmp_path):
    source = write(tmp_path / "in.jsonl", SINGLE[:1])
    summary = tmp_path / "summary.json"
    run_audit(AuditFollowUps, source, "-m", "tiny", "--summary", summary, "--category", "correctness", "relevance")
    chosen = [DEFAULT_FOLLOW_UPS[name] for name in ("correctness", "relevance")]
    assert json.loads(summary.read_text())["follow_ups"] == {
        "positive": sum(len(both.positive) for both in chosen),
        "negative": sum(len(both.negative) for both in chosen),
    }


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], [], "line 2 has no response, and other rows have one"),
        ([{"prompt": "a", "chosen": "b"}], [], "line 1: rejected must be a text"),
        ([{"response": "b"}], [], "line 1: prompt must be a text"),
        (PAIRS, ["--pairs", "p.jsonl"], "--pairs needs rows with one response each"),
        (SINGLE, ["--category", "colour"], "--category must be of understanding"),
        (SINGLE, ["--follow-ups", "none.json"], "none.json cannot be read"),
        (SINGLE, ["--gap", "-1"], "gap"),
        (SINGLE, ["--template", "chat"], "no chat template"),
        ([{"prompt": "a " * 3000, "response": "b"}], [], "line 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, records, options, words):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", records)
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditFollowUps, source, "-m", "tiny", "--device", "cpu", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"positive": "yes"}', '{"positive": [1]}', '{"positive": [], "negative": []}']
)
def test_follow_up_files_that_are_none(tmp_path, capsys, text):
    source, sides = write(tmp_path / "in.jsonl", SINGLE), tmp_path / "sides.json"
    sides.write_text(text)
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditFollowUps, source, "-m", "tiny", "--device", "cpu", "--follow-ups", sides)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
