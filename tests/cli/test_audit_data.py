"""``loglik audit data``: its points are those of the runs, its summary that of the frontier."""

from __future__ import annotations

import json
import random

import pyarrow.parquet as pq
import pytest
from audit_runner import run_audit

from loglik.cli.audits.data import AuditData
from loglik.signals.epiplexity import at_budget, code_compute, epiplexity_frontier
from loglik.training import data_codes
from loglik.training.data_codes import CodeGrid, data_code_runs
from loglik.training.data_report import data_report
from loglik.training.token_data import token_data

SMALL = ("--widths", 16, 32, "--layers", 1, "--window", 16, "--batch-size", 8, "--checkpoints", 3)
GRID = CodeGrid(widths=(16, 32), layers=1, window=16, batch_size=8, checkpoints=3)
r = random.Random(0)
TEXTS = ["".join(r.choice("ab ") for _ in range(90)) + "é" for _ in range(30)]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditData, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def test_points_and_summary_are_those_of_the_runs(source, tmp_path, capsys):
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    run_audit(AuditData, source, *SMALL, "-o", out, "--summary", summary, "--report", page)
    rows, told = read(out), json.loads(summary.read_text())
    data = token_data(TEXTS)
    size = len(data.ids)
    assert (told["texts"], told["tokens"], told["bytes"]) == (30, size, size - 30)
    expected = {}
    for run in data_code_runs(data, GRID):
        expected |= {(run.method, run.width, step): point for step, point in run.points(size).items()}
    assert {(row["estimator"], row["width"], row["step"]) for row in rows} == set(expected)
    for row in rows:
        point = expected[row["estimator"], row["width"], row["step"]]
        assert (row["structure_bits"], row["entropy_bits"]) == (point.structure, point.entropy)
        assert row["compute"] == code_compute(row["parameters"], row["trained_tokens"], size)
        assert row["total_bits"] == row["structure_bits"] + row["entropy_bits"]
        assert (row["structure_stderr"] is None) == (row["estimator"] == "requential")
        assert row["row"] == f"{row['estimator']}, width {row['width']}, seed 0, step {row['step']}"
    for method in ("prequential", "requential"):
        own = [point for (name, _, _), point in expected.items() if name == method]
        hull = epiplexity_frontier(own)
        assert sum(row["on_frontier"] for row in rows if row["estimator"] == method) == len(hull)
        best = at_budget(hull)
        found = told[method]
        assert (found["structure_bits"], found["entropy_bits"]) == (best.structure, best.entropy)
        assert found["entropy_bits_per_token"] == best.entropy / size
        assert found["entropy_bits_per_byte"] == pytest.approx(best.entropy / (size - 30))
        assert (found["compute"], found["trained_tokens"]) == (best.compute, best.tokens)
    assert "three sizes" in told["scaling_law"]  # two widths give no law
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "<script" not in text
    assert "prequential" in capsys.readouterr().out


def test_budget_data_set_and_seeds(source, tmp_path):
    summary = tmp_path / "summary.json"
    given = (*SMALL, "--seeds", 2, "--estimator", "prequential", "--data-tokens", 1e6, "--budget", 4e10)
    run_audit(AuditData, source, *given, "--summary", summary)
    told = json.loads(summary.read_text())
    assert "requential" not in told
    data = token_data(TEXTS)
    grid = CodeGrid(**{**_fields(GRID), "seeds": 2, "methods": ("prequential",)})
    runs = list(data_code_runs(data, grid))
    found = told["prequential"]
    best = []
    for seed in (0, 1):
        hull = epiplexity_frontier([p for run in runs if run.seed == seed for p in run.points(1e6).values()])
        best.append(at_budget(hull, 4e10))
    bits = [point.structure for point in best]
    assert found["structure_bits"] == pytest.approx(sum(bits) / 2)
    assert found["structure_bits_range"] == [min(bits), max(bits)]
    assert max(point.compute for point in best) <= 4e10
    assert found == data_report(runs, data, data_tokens=1e6, budget=4e10).summary["prequential"]


def _fields(grid):
    return {name: getattr(grid, name) for name in grid.__slots__}


def test_three_widths_and_checkpoints_are_read_as_a_scaling_law_or_refused_with_a_reason(source, tmp_path):
    summary = tmp_path / "summary.json"
    run_audit(AuditData, source, *SMALL, "--widths", 16, 32, 48, "--estimator", "prequential", "--summary", summary)
    law = json.loads(summary.read_text())["scaling_law"]
    if isinstance(law, str):
        assert "follow no scaling law" in law
    else:
        assert law["entropy_bits_at_any_compute"] > 0


def test_what_is_computed_is_kept(source, tmp_path, monkeypatch, capsys):
    """The second run fails: the points of the first are in the table, and are not computed again."""
    out, keep = tmp_path / "out.parquet", tmp_path / "keep"
    own, calls = data_codes.prequential_run, []

    def failing(model, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(model, *arguments, **options)

    monkeypatch.setattr(data_codes, "prequential_run", failing)
    given = (source, *SMALL, "--estimator", "prequential", "-o", out, "--keep", keep)
    with pytest.raises(KeyboardInterrupt):
        run_audit(AuditData, *given)
    first = pq.read_table(out).to_pylist()
    assert {row["width"] for row in first} == {16}
    assert len(list(keep.iterdir())) == 1
    run_audit(AuditData, *given)
    rows = pq.read_table(out).to_pylist()
    assert {row["width"] for row in rows} == {16, 32}
    assert [row["structure_bits"] for row in rows[:3]] == [row["structure_bits"] for row in first]
    assert len(calls) == 3
    assert "prequential" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "options", "sentence"),
    [
        ([{"text": "short"}], (), "too few for one batch of 8 windows of 16"),
        ([{"text": "a" * 900}, {"text": ""}], (), "line 2: text must be a text that is not empty"),
        ([{"text": "a" * 900}, {"text": 3}], (), "line 2: text must be a text that is not empty, got 3"),
        ([{"text": "a" * 900}, {"text": "b\ud800"}], (), "line 2"),
        ([{"text": "a" * 900}], ("--text-field", "body"), "line 1: body must be a text"),
        ([{"text": "a" * 900}], ("--widths", 20), "multiples of 16"),
        ([{"text": "a" * 900}], ("--held-out", 1.5), "held_out must be a share"),
        ([{"text": "a" * 900}], ("--budget", -1), "--budget must be positive"),
        ([{"text": "a" * 900}], ("--data-tokens", 0), "--data-tokens must be positive"),
        ([{"text": "a" * 900}], ("--budget", 1, "--estimator", "prequential"), "pays for no point of the frontier"),
        ([{"text": "a" * 900}], ("--tokenizer", "nowhere"), "there is no tokenizer in nowhere"),
        ([{"text": "a" * 900}], ("-o", "out.xlsx"), "format of out.xlsx"),
        ([], (), "has no rows"),
    ],
)
def test_bad_input(tmp_path, capsys, records, options, sentence):
    source = write(tmp_path / "in.jsonl", records)
    assert sentence in refused(capsys, source, *SMALL, *options)
