"""``loglik audit label-bias``: its numbers are those of label_bias on forced answers; bad input is one sentence."""

from __future__ import annotations

import json

import pytest

from cli.audit_runner import run_audit
from loglik.cli.audits.label_bias import AuditLabelBias
from loglik.signals.binary_decisions import binary_answers, score_forms
from loglik.signals.label_bias import label_bias

PROMPTS = ["x = 1\nassert x is not", "def ok():\n    return", "flag =", "while", "debug ="]
GOLD = [False, True, False, True, False]
ON = ["-m", "tiny", "--device", "cpu", "--yes", "True", "true", "--no", "False"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answered(tiny, prompts, temperature=1.0):
    return binary_answers(
        score_forms(tiny, prompts, ["True", "true"], ["False"]), [True, True, False], temperature=temperature
    )


@pytest.mark.parametrize("free", [[], ["N/A", "x ="]])
def test_the_numbers_are_those_of_the_functions(tmp_path, tiny, free):
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, GOLD, strict=True)]
    more = ["--content-free", *free] if free else []
    files = ["-o", out, "--summary", summary, "--report", page]
    run_audit(AuditLabelBias, write(tmp_path / "in.jsonl", rows), *ON, *more, *files)
    found = answered(tiny, PROMPTS)
    want = label_bias(found, GOLD, content_free=answered(tiny, free) if free else None)
    told = json.loads(summary.read_text())
    assert told["calibration"] == ("content-free" if free else "batch")
    for name, value in {
        "yes_share": want.raw.share,
        "calibrated_yes_share": want.calibrated.share,
        "mean_p_yes": want.raw.mean,
        "calibrated_mean_p_yes": want.calibrated.mean,
        "imbalance": want.raw.imbalance,
        "calibrated_imbalance": want.calibrated.imbalance,
        "p_value": want.raw.p_value,
        "accuracy": want.raw.accuracy,
        "gold_share": 0.4,
        "auroc": want.auroc,
        "coverage": want.coverage,
        "prior": want.prior,
    }.items():
        assert told[name] == pytest.approx(value, abs=1e-5), name
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["p_yes"] for line in lines] == pytest.approx(found.probability.tolist(), abs=1e-5)
    assert [line["log_odds"] for line in lines] == pytest.approx(found.logit.tolist(), abs=1e-4)
    assert [line["coverage"] for line in lines] == pytest.approx(found.coverage.tolist(), abs=1e-5)
    calibrated = want.calibrated.probability.tolist()
    assert [line["p_yes_calibrated"] for line in lines] == pytest.approx(calibrated, abs=1e-5)
    assert [line["correct"] for line in lines] == [
        (p > 0.5) == g for p, g in zip(found.probability.tolist(), GOLD, strict=True)
    ]
    assert page.read_text().count("<svg") == 3


def test_unknown_answers_one_class_and_temperature(tmp_path, tiny):
    summary = tmp_path / "s.json"
    rows = [{"prompt": p} for p in PROMPTS]
    run_audit(AuditLabelBias, write(tmp_path / "a.jsonl", rows), *ON, "--temperature", "0.5", "--summary", summary)
    told = json.loads(summary.read_text())
    assert told["mean_p_yes"] == pytest.approx(float(answered(tiny, PROMPTS, 0.5).probability.mean()), abs=1e-5)
    assert not {"accuracy", "imbalance", "auroc", "gold_share"} & {*told}
    page = tmp_path / "page.html"
    one = [row | {"answer": True} for row in rows]
    run_audit(AuditLabelBias, write(tmp_path / "b.jsonl", one), *ON, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    assert told["auroc"] == "undefined: the right answer is always yes"
    assert "right_no" not in told
    assert told["imbalance"] == pytest.approx(told["yes_share"] - 1)
    assert page.read_text().count("<svg") == 2


GOOD = [{"prompt": "x =", "answer": True}, {"prompt": "y =", "answer": False}]
BAD = [
    ([GOOD[0]], [], "batch calibration needs at least two prompts: give content-free prompts"),
    ([GOOD[0], {"prompt": "z ="}], [], "line 2 has no answer, and other rows have one"),
    ([GOOD[0] | {"answer": "yes"}], [], "line 1: answer must be true or false, got 'yes'"),
    ([GOOD[0] | {"prompt": " "}], [], "line 1: prompt must be a text that is not empty"),
    ([GOOD[0], {"prompt": "word " * 3000, "answer": True}], [], "line 2: "),
    (GOOD, ["--content-free", "word " * 3000], "--content-free 1: "),
    (GOOD, ["--content-free", " "], "--content-free 1: must be a text that is not empty"),
    (GOOD, ["--temperature", "0"], "temperature must be positive and finite, got 0"),
    (GOOD, ["--temperature", "nan"], "temperature must be positive and finite, got nan"),
    (GOOD, ["--no", "Falsey", "False"], "the form 'Falsey' begins with the form 'False' and would count twice"),
    (GOOD, ["--yes", "False"], "begins with the form 'False' and would count twice"),
    (GOOD, ["--no", ""], "forms of yes and no must be texts that are not empty"),
    ([], [], "has no rows"),
]


@pytest.mark.parametrize(("rows", "more", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_prompts_are_refused(tmp_path, capsys, rows, more, sentence):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditLabelBias, write(tmp_path / "in.jsonl", rows), *ON, *more)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error
