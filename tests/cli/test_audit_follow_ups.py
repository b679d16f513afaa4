"""`loglik audit follow-ups`: rewards and accuracies of the functions, the plots, and one sentence for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from audit_runner import run_audit

from loglik.cli.audits.follow_ups import AuditFollowUps
from loglik.signals.feedback import follow_up_likelihood, mine_pairs
from loglik.signals.follow_up_preferences import (
    category_rewards,
    pairwise_accuracy,
    rating_correlation,
    response_likelihood,
)
from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS, read_follow_ups

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "print x"},
]
PAIRS = [
    {"prompt": "add two numbers", "chosen": "def add(a, b): return a + b", "rejected": "banana"},
    {"prompt": TALK, "chosen": "print(x)", "rejected": "I do not know."},
    {"prompt": "same", "chosen": "x = 1", "rejected": "x = 1"},
]
PHRASES = {
    "right": {"positive": ["Yes, right.", "Correct."], "negative": ["No, wrong."]},
    "style": {"positive": ["Nice."], "negative": ["Dull.", "Too long."]},
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def phrases(tmp_path):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(PHRASES))
    return path


def audited(tmp_path, records, *options):
    source = write(tmp_path / "in.jsonl", records)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    arguments = [source, "-m", "tiny", "--device", "cpu", "-o", out, "--summary", summary, "--report", page, *options]
    run_audit(AuditFollowUps, *arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(summary.read_text()), page.read_text()


def judged(tiny, prompts, responses, follow_ups, **options):
    sides = [[text for each in follow_ups.values() for text in getattr(each, s)] for s in ("positive", "negative")]
    scores = follow_up_likelihood(tiny, prompts, responses, positive=sides[0], negative=sides[1], **options)
    own = response_likelihood(tiny, prompts, responses).mean_per_unit().value
    return scores.reward.value, category_rewards(scores, follow_ups), own


def test_pairs_are_judged_as_by_the_functions(tmp_path, tiny, phrases):
    rows, told, page = audited(tmp_path, PAIRS, "--follow-ups", phrases, "--batch-size", 2, "--level", 0.8)
    prompts = [record["prompt"] for record in PAIRS]
    texts = [record[side] for side in ("chosen", "rejected") for record in PAIRS]
    reward, categories, own = judged(tiny, prompts * 2, texts, read_follow_ups(phrases))
    found = {
        side: (reward[part], {name: values[part] for name, values in categories.items()}, own[part])
        for side, part in (("chosen", slice(0, 3)), ("rejected", slice(3, 6)))
    }
    for side, (reward, categories, own) in found.items():
        assert [row[f"reward_{side}"] for row in rows] == pytest.approx(reward.tolist(), abs=1e-4)
        assert [row[f"log_prob_per_token_{side}"] for row in rows] == pytest.approx(own.tolist(), abs=1e-4)
        for name, values in categories.items():
            assert [row[f"categories_{side}"][name] for row in rows] == pytest.approx(values.tolist(), abs=1e-4)
        assert told[f"mean_reward_{side}"] == pytest.approx(reward.mean().item(), abs=1e-4)
    (reward, categories, own), (other, others, rival) = found["chosen"], found["rejected"]
    assert told["accuracy_follow_ups"] == pairwise_accuracy(reward, other, level=0.8).record()
    assert told["accuracy_response_likelihood"] == pairwise_accuracy(own, rival, level=0.8).record()
    for name in PHRASES:
        wanted = pairwise_accuracy(categories[name], others[name], level=0.8).record()
        assert told[f"accuracy_category_{name}"] == wanted
    assert told["accuracy_follow_ups"]["ties"] == 1  # the same response twice
    assert rows[2]["margin"] == 0.0
    assert rows[2]["prefers_chosen"] is False
    assert told["follow_ups"] == 6
    assert page.count("<svg") == 2
    for known in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org", "https://matplotlib.org"):
        page = page.replace(known, "")
    assert "http" not in page


def test_single_responses_with_ratings(tmp_path, tiny, phrases):
    texts = ["x = 1", "no", "print(x)", "return"]
    records = [{"prompt": "x?", "response": t, "rating": r} for t, r in zip(texts, (3, 1, 4, 2), strict=True)]
    rows, told, page = audited(tmp_path, records, "--follow-ups", phrases, "--aggregate", "sum")
    reward, _, own = judged(tiny, ["x?"] * 4, texts, read_follow_ups(phrases), aggregate="sum")
    assert [row["reward_response"] for row in rows] == pytest.approx(reward.tolist(), abs=1e-3)
    assert told["rank_correlation_follow_ups"] == pytest.approx(rating_correlation(reward, [3, 1, 4, 2]))
    assert told["rank_correlation_response_likelihood"] == pytest.approx(rating_correlation(own, [3, 1, 4, 2]))
    assert page.count("<svg") == 1


def test_the_own_list_is_the_default(tmp_path, tiny):
    rows, told, _ = audited(tmp_path, [{"prompt": "x?", "response": "3"}])
    reward, categories, _ = judged(tiny, ["x?"], ["3"], DEFAULT_FOLLOW_UPS)
    assert rows[0]["reward_response"] == pytest.approx(reward.item(), abs=1e-4)
    assert set(rows[0]["categories_response"]) == set(categories) == set(DEFAULT_FOLLOW_UPS)
    assert told["follow_ups"] == 48


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"prompt": None}, [], "line 2: prompt must be a text that is not empty, or a list of messages"),
        ({"prompt": " "}, [], "line 2: prompt must be a text that is not empty, or a list of messages"),
        ({"prompt": []}, [], "line 2: prompt must be a text that is not empty, or a list of messages"),
        ({"prompt": [{"role": "user"}]}, [], "line 2: prompt must be a text that is not empty, or a list of messages"),
        ({"prompt": TALK[:2]}, [], "line 2: its conversation must end with a turn that the response answers"),
        ({"chosen": None}, [], "line 2 has no chosen, and other rows have one"),
        ({"rejected": None}, [], "line 2: rejected must be a text that is not empty, got nothing"),
        ({"rejected": " "}, [], "line 2: rejected must be a text that is not empty, got ' '"),
        ({}, ["--template", "chat"], "the tokenizer has no chat template: set template to plain"),
        ({}, ["--level", 1], "--level must lie between 0 and 1, got 1.0"),
        ({}, ["--follow-ups", "nowhere.json"], "nowhere.json cannot be read as JSON"),
        ({"prompt": "word " * 2000}, [], "line 2: with follow-up"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, change, options, sentence):
    source = write(tmp_path / "in.jsonl", [PAIRS[0], PAIRS[1] | change])
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditFollowUps, source, "-m", "tiny", "--device", "cpu", *options)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error


def test_rows_without_responses_and_bad_ratings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_audit(AuditFollowUps, write(tmp_path / "a.jsonl", [{"prompt": "x"}]), "-m", "tiny")
    assert "line 1 has neither chosen and rejected nor response" in " ".join(capsys.readouterr().err.split())
    rated = [{"prompt": "x", "response": "y", "rating": r} for r in (1, float("nan"), 3)]
    with pytest.raises(SystemExit):
        run_audit(AuditFollowUps, write(tmp_path / "b.jsonl", rated), "-m", "tiny")
    assert "line 2: rating must be a finite number, got nan" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        run_audit(AuditFollowUps, write(tmp_path / "c.jsonl", rated[:1]), "-m", "tiny", "--device", "cpu")
    assert "a correlation needs at least three" in " ".join(capsys.readouterr().err.split())


SAMPLED = [
    {"prompt": "Import os.", "response": "import os"},
    {"prompt": "Import os.", "response": "zq qz"},
    {"prompt": "Add two numbers.", "response": "def add(a, b):\n    return a + b"},
    {"prompt": "Import os.", "response": "from os import path"},
    {"prompt": "Add two numbers.", "response": "pass"},
]


def test_pairs_are_mined_from_responses_to_one_prompt(tmp_path, tiny, phrases):
    source, pairs, summary = write(tmp_path / "in.jsonl", SAMPLED), tmp_path / "pairs.jsonl", tmp_path / "s.json"
    run_audit(
        AuditFollowUps,
        *(source, "-m", "tiny", "--device", "cpu", "--follow-ups", phrases, "--pairs", pairs, "--summary", summary),
    )
    found = [json.loads(line) for line in pairs.read_text().splitlines()]
    sides = (
        [text for each in read_follow_ups(phrases).values() for text in each.positive],
        [text for each in read_follow_ups(phrases).values() for text in each.negative],
    )
    prompts, responses = [r["prompt"] for r in SAMPLED], [r["response"] for r in SAMPLED]
    reward = follow_up_likelihood(tiny, prompts, responses, positive=sides[0], negative=sides[1]).reward.value
    best, worst = mine_pairs(reward, torch.tensor([0, 0, 1, 0, 1]))
    assert [pair["chosen"] for pair in found] == [responses[i] for i in best]
    assert [pair["rejected"] for pair in found] == [responses[i] for i in worst]
    assert [pair["prompt"] for pair in found] == ["Import os.", "Add two numbers."]
    told = json.loads(summary.read_text())
    assert (told["prompts"], told["pairs"]) == (2, 2)


def test_pairs_are_not_mined_from_pairs(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditFollowUps, source, "-m", "tiny", "--pairs", tmp_path / "p.jsonl")
    assert stop.value.code == 2
    assert "--pairs needs rows with one response each" in capsys.readouterr().err
