"""``loglik audit option-order``: its numbers are those of ask_in_orders and order_report; bad input is one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from cli.audit_runner import run_audit
from loglik.cli.audits.option_order import AuditOptionOrder
from loglik.signals.option_order import alignment_entropy
from loglik.signals.order_sensitivity import ask_in_orders, order_report

QUESTIONS = [
    ("What does len return?", ["a number", "a file", "a class"], 0),
    ("What does open return?", ["a number", "a file", "a class"], 1),
    ("Is a list ordered?", ["yes", "no"], 0),
]
ON = ["-m", "tiny", "--device", "cpu"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records():
    return [{"question": q, "options": list(o), "answer": a} for q, o, a in QUESTIONS]


def outputs(tmp_path):
    found = [tmp_path / name for name in ("out.jsonl", "summary.json", "page.html")]
    return found, ["-o", found[0], "--summary", found[1], "--report", found[2]]


def self_contained(text: str) -> bool:
    for known in ("www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"):
        text = text.replace(f"http://{known}", "").replace(f"https://{known}", "")
    return "http" not in text and "<script" not in text


def test_the_numbers_are_those_of_the_functions(tmp_path, tiny, capsys):
    (out, summary, page), options = outputs(tmp_path)
    run_audit(AuditOptionOrder, write(tmp_path / "in.jsonl", records()), *ON, "--orders", "all", *options)
    answers = [ask_in_orders(tiny, q, o, "all") for q, o, _ in QUESTIONS]
    report = order_report(answers, [a for _, _, a in QUESTIONS])
    rows, told = [json.loads(line) for line in out.read_text().splitlines()], json.loads(summary.read_text())
    for row, answer, (_, _, right) in zip(rows, answers, QUESTIONS, strict=True):
        assert row["probs"] == pytest.approx(answer.adjusted.probs.tolist())
        assert row["probs_naive"] == pytest.approx(answer.adjusted.naive.tolist())
        assert row["choice"] == answer.choice
        assert row["choice_naive"] == answer.naive_choice
        assert row["depends_on_order"] == (len(answer.sensitivity.choices.unique()) > 1)
        assert row["information"] == pytest.approx(answer.sensitivity.information)
        assert row["residual_share"] == pytest.approx(answer.effects.residual_share, abs=1e-9)
        assert row["correct"] == (answer.choice == right)
    for name in ("accuracy_naive", "accuracy", "accuracy_single", "flips", "first_bias", "coverage", "entropy"):
        assert told[name] == pytest.approx(getattr(report, name)), name
    assert told["position_probs_of_3"] == pytest.approx(report.sizes[1].probability.tolist())
    assert told["position_effects_of_2"] == pytest.approx(report.sizes[0].position_effects.tolist(), abs=1e-9)
    text = page.read_text()
    assert self_contained(text)
    assert text.count("<svg") == 1 + 3 * 2  # accuracies; positions, confusion and effects of two sizes
    assert "accuracy naive" in capsys.readouterr().out


def test_cyclic_orders_moved_labels_and_labels_of_rows(tmp_path, tiny):
    rows = [record | {"labels": ["1", "2", "3"]} for record in records()[:2]]
    for row in rows:
        del row["answer"]
    (out, summary, page), options = outputs(tmp_path)
    more = ["--move-labels", "--mean", "geometric", "--separator", ""]
    run_audit(AuditOptionOrder, write(tmp_path / "in.jsonl", rows), *ON, *more, *options)
    wanted = [
        ask_in_orders(tiny, q, o, "cyclic", labels=["1", "2", "3"], move_labels=True, mean="geometric", separator="")
        for q, o, _ in QUESTIONS[:2]
    ]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["probs"] for row in found] == [pytest.approx(a.adjusted.probs.tolist()) for a in wanted]
    assert found[0]["label_effects"] == pytest.approx(wanted[0].effects.label.tolist())
    told = json.loads(summary.read_text())
    assert "accuracy" not in told
    mean = torch.stack([a.effects.label for a in wanted]).mean(0)
    assert told["label_effects_of_3"] == pytest.approx(mean.tolist())
    assert page.read_text().count("<svg") == 3  # positions, effects of positions and labels


def test_random_orders_without_effects(tmp_path, tiny):
    (out, summary, _), options = outputs(tmp_path)
    more = ["--orders", "3", "--no-effects", "--labels", "x y z", "--seed", "4"]
    run_audit(AuditOptionOrder, write(tmp_path / "in.jsonl", records()[:1]), *ON, *more, *options[:4])
    answer = ask_in_orders(tiny, *QUESTIONS[0][:2], 3, labels=["x", "y", "z"], effects=False, seed=4)
    row = json.loads(out.read_text())
    assert row["probs"] == pytest.approx(answer.adjusted.probs.tolist())
    assert "residual_share" not in row
    assert json.loads(summary.read_text())["orders"] == 3


def test_people_are_compared(tmp_path, tiny):
    shares = {"young": [0.5, 0.5], "old": [0.9, 0.1], "all": [0.2, 0.8]}
    rows = [
        {"question": q, "options": ["yes", "no"], "subgroups": shares}
        for q in ("Is a list ordered?", "Is a set ordered?")
    ]
    (_, summary, page), options = outputs(tmp_path)
    run_audit(AuditOptionOrder, write(tmp_path / "in.jsonl", rows), *ON, *options)
    table = torch.tensor(list(shares.values())).double()
    answers = [ask_in_orders(tiny, row["question"], ["yes", "no"], "cyclic").adjusted.probs for row in rows]
    wanted = alignment_entropy(answers, [table, table])
    told = json.loads(summary.read_text())
    assert told["alignment_correlation"] == pytest.approx(wanted.correlation)
    assert told["alignment_slope"] == pytest.approx(wanted.slope)
    assert "Subgroups" in page.read_text()


GOOD = records()[0]
BAD = [
    ([GOOD | {"options": ["a"]}], [], "line 1: options must have at least two texts, got 1"),
    ([GOOD | {"options": "ab"}], [], "line 1: options must be a list of texts"),
    ([GOOD, {"question": "q", "options": ["a", "b"]}], [], "line 2 has no answer"),
    ([GOOD, {"question": "q", "answer": 0}], [], "line 2: options must be a list of texts, got nothing"),
    ([GOOD | {"options": ["a", " "], "answer": 1}], [], "line 1: options must be a list of texts that are not empty"),
    ([GOOD | {"question": ""}], [], "line 1: question must be a text that is not empty"),
    ([GOOD, GOOD | {"answer": 3}], [], "line 2: answer must be an option's number from 0 to 2, got 3"),
    ([GOOD | {"answer": 0.5}], [], "line 1: answer must be an option's number from 0 to 2, got 0.5"),
    ([GOOD | {"answer": None}, GOOD], [], "line 1 has no answer, and other rows have one"),
    ([GOOD | {"labels": ["A", "A", "B"]}], [], "line 1: labels must have 3 different labels"),
    ([GOOD], ["--labels", "AB"], "line 1: --labels must have 3 different labels that are not empty, got ['A', 'B']"),
    ([GOOD], ["--orders", "0"], "line 1: orders must be all, cyclic or a positive number, got 0"),
    ([GOOD], ["--orders", "1"], "cannot tell options, positions and labels apart"),
    ([GOOD | {"options": list("abcdefg")}], ["--orders", "all"], "line 1: 7 options have 5040 orders"),
    ([GOOD | {"subgroups": {"x": [0.5, 0.5]}}], [], "line 1: subgroups of x must be 3 probabilities, one per option"),
    ([GOOD | {"subgroups": [1]}], [], "line 1: subgroups must be an object with the same groups in every row"),
    ([GOOD | {"subgroups": {"x": [0.5, 0.2, 0.1]}}], [], "line 1: subgroups of x must be 3 probabilities"),
    ([GOOD | {"subgroups": {"x": [1.5, -0.5, 0]}}], [], "one per option, that sum to 1: got [1.5, -0.5, 0]"),
    ([GOOD | {"subgroups": {"x": [0.5, 0.5, 0], "y": [1, 0, 0]}}], [], "line 1: subgroup 0 never gives an answer"),
    ([GOOD | {"subgroups": {"x": [0.5, 0.2, 0.3], "y": [0.8, 0.1, 0.1]}}], [], "subgroups: a regression needs"),
    ([GOOD | {"question": "word " * 3000}], [], "line 1: order 0: "),
    ([], [], "has no rows"),
]


@pytest.mark.parametrize(("rows", "more", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_questions_are_refused(tmp_path, capsys, rows, more, sentence):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditOptionOrder, write(tmp_path / "in.jsonl", rows), *ON, *more)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error
