"""``loglik audit template-bias``: its numbers are those of template_bias; bad input is one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from cli.audit_runner import run_audit
from loglik.cli.audits.template_bias import AuditTemplateBias
from loglik.signals.choice import score_options
from loglik.signals.template_bias import gold_log_odds, template_bias, template_consistency

NAMES = {"Ann": "f", "Bob": "m", "Eve": "f", "Tom": "m"}
TEMPLATES = {"{} = []\nlen({}) ==": 0, "import {}\n{} is": 1, "def {}(x):\n    return {}": 0}
ON = ["-m", "tiny", "--device", "cpu"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records():
    return [
        {
            "template": template,
            "name": name,
            "group": group,
            "question": template.replace("{}", name),
            "options": ["0", "None"],
            "answer": gold,
        }
        for template, gold in TEMPLATES.items()
        for name, group in NAMES.items()
    ]


def scored(tiny):
    rows = records()
    choices = score_options(tiny, [row["question"] for row in rows], [row["options"] for row in rows]).choose(alpha=0.0)
    gold = torch.tensor([row["answer"] for row in rows])
    return choices, gold, gold_log_odds(choices, gold).reshape(3, 4)


def test_the_numbers_are_those_of_the_functions(tmp_path, tiny):
    shuffled = [records()[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()]
    out, summary, page, templates = (tmp_path / n for n in ("out.jsonl", "summary.json", "page.html", "t.jsonl"))
    source = write(tmp_path / "in.jsonl", shuffled)
    run_audit(
        AuditTemplateBias, source, *ON, "-o", out, "--summary", summary, "--report", page, "--templates", templates
    )
    choices, _, odds = scored(tiny)
    want = template_bias(odds, list(NAMES.values()))
    told = json.loads(summary.read_text())
    assert told["score"] == pytest.approx(want.score, abs=1e-5)
    assert told["p_value"] == want.p_value
    assert told["chance"] == pytest.approx(want.floor, abs=1e-5)
    assert told["exact"] is True
    deviation = dict(zip(want.groups, want.deviation.tolist(), strict=True))
    assert told["groups"] == pytest.approx(deviation, abs=1e-5)
    same = template_consistency(choices.choice.reshape(3, 4), list(NAMES.values()))
    assert told["unanimous"] == same.unanimous
    assert told["same_answer_between_groups"] == pytest.approx(same.between.mean().item())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    by_question = {row["question"]: value for row, value in zip(records(), odds.flatten().tolist(), strict=True)}
    for row, given in zip(rows, shuffled, strict=True):
        assert row["template"] == given["template"]
        assert row["log_odds"] == pytest.approx(by_question[given["question"]], abs=1e-4)
        assert row["correct"] == (row["choice"] == given["answer"])
    listed = {row["template"]: row for row in map(json.loads, templates.read_text().splitlines())}
    for t, template in enumerate(TEMPLATES):
        assert listed[template]["gap"] == pytest.approx(want.gaps[t].item(), abs=1e-4)
        means = {group: want.means[t, g].item() for g, group in enumerate(want.groups)}
        assert {g: listed[template][f"mean_{g}"] for g in "fm"} == pytest.approx(means, abs=1e-4)
        assert next(row for row in rows if row["template"] == template)["template_gap"] == listed[template]["gap"]
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "<script" not in text


def test_accuracy_and_the_rule_of_zeros(tmp_path, tiny):
    choices, gold, _ = scored(tiny)
    right = (choices.choice == gold).double().reshape(3, 4)
    groups = list(NAMES.values())
    summary = tmp_path / "s.json"
    source = write(tmp_path / "in.jsonl", [row | {"source": "one"} for row in records()])
    more = ["--statistic", "accuracy", "--drop-zero", "no"]
    run_audit(AuditTemplateBias, source, *ON, *more, "--summary", summary)
    want = template_bias(right, groups, statistic="accuracy", drop_zero=False)
    told = json.loads(summary.read_text())
    assert (told["score"], told["p_value"]) == (pytest.approx(want.score), want.p_value)
    assert told["accuracy"] == pytest.approx(float(right.mean()))
    assert told["dropped"] == {}


ROWS = records()
BAD = [
    (ROWS[:3], [], "there must be at least two groups, of equal size: got {'f': 2, 'm': 1}"),
    ([row for row in ROWS if row["group"] == "f"], [], "at least two groups"),
    (ROWS[:-1], [], "line 9: the template def {}(x): return {} is not filled with the name Tom"),
    ([*ROWS, ROWS[0]], [], "line 13: the template {} = [] len({}) == is filled twice with the name Ann"),
    ([ROWS[0], ROWS[1], ROWS[4] | {"group": "m"}], [], "line 3: the name Ann is of group m here and of f above"),
    ([ROWS[0] | {"options": ["0"]}], [], "line 1: options must be at least two texts that are not empty, got ['0']"),
    ([ROWS[0] | {"options": ["0", ""]}], [], "line 1: options must be at least two texts that are not empty"),
    ([ROWS[0] | {"answer": 2}], [], "line 1: answer must be an option's number from 0 to 1, got 2"),
    ([ROWS[0] | {"answer": float("nan")}], [], "line 1"),
    ([{k: v for k, v in ROWS[0].items() if k != "answer"}], [], "line 1: answer must be a finite number, got nothing"),
    ([{k: v for k, v in ROWS[0].items() if k != "group"}], [], "line 1: group must be a text that is not empty"),
    ([ROWS[0] | {"name": 3}], [], "line 1: name must be a text that is not empty, got 3"),
    ([ROWS[0], ROWS[1] | {"question": "word " * 3000}], [], "line 2: "),
    (ROWS, ["--level", "1"], "level must lie between 0 and 1"),
    (ROWS, ["--permutations", "0"], "resamples and permutations must be at least 1"),
    ([*[row | {"source": "x"} for row in ROWS[:4]], *ROWS[4:]], [], "line 5 has no source, and other rows have one"),
    ([], [], "has no rows"),
]


@pytest.mark.parametrize(("rows", "more", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_templates_are_refused(tmp_path, capsys, rows, more, sentence):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditTemplateBias, write(tmp_path / "in.jsonl", rows), *ON, *more)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error
