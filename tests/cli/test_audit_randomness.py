"""``loglik audit randomness``: its numbers are those of randomness_report, per group; bad input is one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cli.audit_runner import run_audit
from loglik.cli.audits.randomness import AuditRandomness
from loglik.signals.binary_decisions import draw_answer_lists
from loglik.signals.randomness import randomness_power, randomness_report


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def flips(rows: int, length: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 2, (rows, length)).tolist()


def same(told: dict, report) -> None:
    for test in report.tests:
        found = told[test.name.replace(" ", "_")]
        assert found["p_value"] == pytest.approx(test.p_value)
        assert found["adjusted"] == pytest.approx(test.adjusted)
    assert told["yes_rate"] == pytest.approx(report.yes_rate)
    assert told["switch_rate"] == pytest.approx(report.switch_rate)
    assert told["expected_switch_rate"] == pytest.approx(report.expected_switch_rate)
    assert told["switch_after_run"] == {str(k): pytest.approx(v) for k, (v, _) in report.switch_after_run.items()}


def test_the_numbers_are_those_of_the_functions(tmp_path, capsys):
    lists = flips(8, 30, 0)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    source = write(tmp_path / "in.jsonl", [{"answers": [bool(a) for a in row]} for row in lists])
    run_audit(AuditRandomness, source, "--skip", "1", "-o", out, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    same(told, randomness_report(lists, skip=1))
    assert told["num_answers"] == 8 * 29
    assert told["power_at_0.6"] == pytest.approx(randomness_power([29] * 8))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answers"] for row in rows] == lists
    assert rows[2]["switch_rate"] == pytest.approx(randomness_report(lists[2], skip=1).switch_rate)
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "<script" not in text
    assert "negative recency" in capsys.readouterr().out


def test_groups_are_tested_alone(tmp_path):
    """Two groups of constant answers: together they would look dependent, alone there is nothing to test."""
    rows = [
        {"answers": [1] * 10, "group": "a"},
        {"answers": [0] * 10, "group": "b"},
        {"answers": [1] * 5, "group": "a"},
    ]
    summary, page = tmp_path / "s.json", tmp_path / "page.html"
    more = ["--power-repeats", "0", "--summary", summary, "--report", page]
    run_audit(AuditRandomness, write(tmp_path / "in.jsonl", rows), *more)
    told = json.loads(summary.read_text())["groups"]
    assert {*told} == {"a", "b"}
    same(told["a"], randomness_report([[1] * 10, [1] * 5]))
    assert told["a"]["independence"]["undefined"] == "all answers are the same"
    assert "power_at_0.6" not in told["a"]
    assert page.read_text().count("<svg") == 2 * 2  # no length of run was seen often enough for the third


def test_answers_are_drawn_from_a_model(tmp_path, tiny):
    out, summary = tmp_path / "out.jsonl", tmp_path / "s.json"
    source = write(tmp_path / "in.jsonl", [{"prompt": "flags = ["}])
    forms = ["--yes", "True", "--no", "False", "--separator", "", "--lists", "12", "--length", "6", "--seed", "3"]
    more = ["--power-repeats", "5", "-o", out, "--summary", summary]
    run_audit(AuditRandomness, source, "-m", "tiny", "--device", "cpu", *forms, *more)
    lists = draw_answer_lists(tiny, "flags = [", ["True"], ["False"], num_lists=12, length=6, separator="", seed=3)
    assert json.loads(out.read_text())["answers"] == lists.tolist()
    told = json.loads(summary.read_text())
    same(told, randomness_report(lists, seed=3))
    assert (told["model"], told["lists"]) == ("tiny", 12)


GOOD = {"answers": [0, 1, 1, 0]}
BAD = [
    ([GOOD, {"answers": [0, 2]}], [], "line 2: answers must be a list of 0 and 1"),
    ([{"answers": [0, None, 1]}], [], "line 1: answers must be a list of 0 and 1 or of true and false"),
    ([{"answers": [0, float("nan")]}], [], "line 1"),
    ([{"answers": "0101"}], [], "line 1: answers must be a list of 0 and 1"),
    ([{"reply": [0, 1]}], [], "line 1: answers must be a list of 0 and 1"),
    ([GOOD, {"answers": [1]}], [], "line 2: answers has 1 answers, and two must be left after --skip 0"),
    ([GOOD], ["--skip", "3"], "line 1: answers has 4 answers, and two must be left after --skip 3"),
    ([GOOD], ["--skip", "-1"], "skip must be at least 0"),
    ([GOOD], ["--power-at", "1.5"], "switch_rate and level must lie between 0 and 1, got 1.5"),
    ([GOOD | {"group": "a"}, GOOD], [], "line 2 has no group, and other rows have one"),
    ([GOOD | {"group": 3}], [], "line 1: group must be a text that is not empty, got 3"),
    ([GOOD], ["-m", "tiny"], "line 1: prompt must be a text that is not empty, got nothing"),
    ([{"prompt": "x"}], ["-m", "tiny", "--length", "1"], "--length must be at least 2 above --skip, got 1 and 0"),
    ([{"prompt": "x"}], ["-m", "tiny", "--lists", "0"], "num_lists and length must be at least 1"),
    ([{"prompt": "word " * 3000}], ["-m", "tiny"], "line 1: "),
    ([], [], "has no rows"),
]


@pytest.mark.parametrize(("rows", "more", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_answers_are_refused(tmp_path, capsys, rows, more, sentence):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditRandomness, write(tmp_path / "in.jsonl", rows), "--device", "cpu", *more)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error
