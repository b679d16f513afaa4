"""`loglik audit thinksum`: choices and log-probabilities are those of the matrix, summed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from audit_runner import run_audit

import loglik
from loglik.cli.audits.thinksum import AuditThinkSum

RECORDS = [
    {"think": ["for i", "for x", "while"], "candidates": ["in range(3):", "banana", "True:"], "answer": 0},
    {"think": ["import", "from"], "candidates": ["os", "sys", "12"], "answer": 1, "question": "# modules"},
    {"think": ["return"], "candidates": ["None", "def"], "answer": 0},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def audited(tmp_path, records, *options):
    source = write(tmp_path / "in.jsonl", records)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    run_audit(
        AuditThinkSum,
        *(source, "-m", "tiny", "--device", "cpu", "-o", out, "--summary", summary, "--report", page),
        *options,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(summary.read_text()), page.read_text()


def matrix(model, record):
    """(A, W) nats, one call per cell."""
    cells = [
        [float(loglik.score(model, [(think, " " + text)]).value[0]) for think in record["think"]]
        for text in record["candidates"]
    ]
    return torch.tensor(cells, dtype=torch.float64)


def test_sums_are_those_of_the_matrix(tmp_path, tiny):
    rows, told, page = audited(tmp_path, RECORDS)
    alone = []
    for row, record in zip(rows, RECORDS, strict=True):
        table = matrix(tiny, record)
        torch.testing.assert_close(torch.tensor(row["matrix"], dtype=torch.float64), table, atol=2e-4, rtol=0)
        posterior = table.log_softmax(0)  # the candidates, under each thought
        sums = {
            "mixture": posterior.logsumexp(1),
            "product": posterior.mean(1),
            "min": posterior.min(1).values,
            "max": posterior.max(1).values,
        }
        for way, values in sums.items():
            assert row[f"choice_{way}"] == int(values.argmax()), way
            wanted = values.log_softmax(0)
            got = torch.tensor(row[f"log_probs_{way}"], dtype=torch.float64)
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
            assert row[f"correct_{way}"] == (int(values.argmax()) == record["answer"])
        alone.append(float((table.argmax(0) == record["answer"]).double().mean()))
    for way in ("mixture", "product", "min", "max"):
        assert told[f"accuracy_{way}"] == pytest.approx(sum(row[f"correct_{way}"] for row in rows) / 3)
        assert told[f"accuracy_{way}_low"] <= told[f"accuracy_{way}"] <= told[f"accuracy_{way}_high"]
    assert told["accuracy_one_thought"] == pytest.approx(sum(alone) / 3)
    assert page.count("<svg") == 4  # a heat map of each row, and the accuracies


def test_raw_sums_templates_and_weights(tmp_path, tiny):
    record = RECORDS[1] | {"weights": [3.0, 1.0]}
    rows, _, _ = audited(
        tmp_path, [record], "--prompt", "{question}\n{think}", "--completion", " {candidate}", "--no-normalise"
    )
    table = torch.tensor(
        [
            [float(loglik.score(tiny, [(f"# modules\n{t}", f" {c}")]).value[0]) for t in record["think"]]
            for c in record["candidates"]
        ],
        dtype=torch.float64,
    )
    mixed = (table + torch.tensor([0.75, 0.25]).log()).logsumexp(1)
    assert rows[0]["choice_mixture"] == int(mixed.argmax())
    got = torch.tensor(rows[0]["log_probs_mixture"], dtype=torch.float64)
    torch.testing.assert_close(got, mixed.log_softmax(0), atol=1e-3, rtol=0)


def test_odd_one_out_is_the_lowest(tmp_path):
    usual, _, _ = audited(tmp_path, RECORDS)
    odd, _, _ = audited(tmp_path, RECORDS, "--odd")
    for one, other in zip(usual, odd, strict=True):
        values = torch.tensor(one["log_probs_product"])
        assert other["choice_product"] == int(values.argmin())


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"think": []}, [], "line 1: think must have at least one text"),
        ({"candidates": ["a"]}, [], "line 1: candidates must have at least two texts"),
        ({"candidates": "a"}, [], "line 1: candidates must be a list of texts"),
        ({"answer": 3}, [], "line 1: answer must be a candidate's number from 0 to 2, got 3"),
        ({"answer": "a"}, [], "line 1: answer must be a finite number"),
        ({"weights": [1.0, 2.0]}, [], "other rows"),
        ({"think": ["a " * 4000]}, [], "line 1"),
        ({"candidates": ["", "b"]}, [], "line 1"),
        ({}, ["--prompt", "no names"], "must name {think} and {candidate}"),
        ({}, ["--prompt", "{think} {question}"], "question must be a text"),
        ({}, ["--prompt", "{think"], "brace"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, change, options, words):
    source = write(tmp_path / "in.jsonl", [RECORDS[0] | change, RECORDS[2]])
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditThinkSum, source, "-m", "tiny", "--device", "cpu", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in " ".join(error.split())
    assert "Traceback" not in error


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], ["a", 1, 1]])
def test_weights_that_are_none(tmp_path, capsys, weights):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditThinkSum, write(tmp_path / "in.jsonl", [RECORDS[0] | {"weights": weights}]), "-m", "tiny")
    assert stop.value.code == 2
    assert "line 1: weights must be 3 finite numbers" in capsys.readouterr().err
