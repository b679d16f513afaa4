"""`audit recalibrate`: its numbers are those of the maps, on the rows that it says."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from audit_runner import run_audit

from loglik.cli.audits.recalibrate import AuditRecalibrate
from loglik.signals.adaptation import lame_stream
from loglik.signals.recalibration import IsotonicConfidence, TemperatureScaling, VectorScaling
from loglik.signals.recalibration_audit import class_figures, split_rows

G = torch.Generator().manual_seed(0)
N = 400
TRUE = (2 * torch.randn(N, 3, generator=G, dtype=torch.float64)).log_softmax(1)
LABELS = torch.multinomial(TRUE.exp(), 1, generator=G)[:, 0]
LOGITS = 2.5 * TRUE + 1.0
FEATURES = torch.eye(3)[LABELS] + 0.3 * torch.randn(N, 3, generator=G)
RECORDS = [
    {"logits": z, "label": y, "features": f, "probs": p}
    for z, y, f, p in zip(LOGITS.tolist(), LABELS.tolist(), FEATURES.tolist(), LOGITS.softmax(1).tolist(), strict=True)
]
QUICK = ["--steps", 5, "--window", 51, "--bins", 10]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditRecalibrate, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", RECORDS)


def close(found, wanted):
    assert found == {name: pytest.approx(value, abs=1e-9) for name, value in asdict(wanted).items()}


def test_maps_are_fitted_on_the_share_and_judged_on_the_rest(tmp_path, source, capsys):
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    options = ["-o", out, "--summary", summary, "--report", page, "--seed", 3, "--fit-share", 0.6, "--use", "vector"]
    run_audit(AuditRecalibrate, source, *QUICK, *options)
    told, rows = json.loads(summary.read_text()), read(out)
    fit, judge = split_rows(N, 0.6, seed=3)
    assert (told["fitted_on"], told["judged_on"], told["split_seed"], told["used"]) == (240, 160, 3, "vector")
    assert [i for i, row in enumerate(rows) if row["part"] == "fit"] == fit.tolist()
    close(told["before"], class_figures(LOGITS[judge].log_softmax(1), LABELS[judge], bins=10))
    for name, made in (("temperature", TemperatureScaling()), ("vector", VectorScaling())):
        mapped = made.fit(LOGITS[fit], LABELS[fit]).predict_log_proba(LOGITS[judge])
        close(told[name], class_figures(mapped, LABELS[judge], bins=10))
    assert {"isotonic", "h"} <= {*told}
    probs = VectorScaling().fit(LOGITS[fit], LABELS[fit]).predict_log_proba(LOGITS).exp()
    assert np.array([row["probs"] for row in rows]) == pytest.approx(probs.numpy(), abs=1e-9)
    assert [row["choice"] for row in rows] == probs.argmax(1).tolist()
    assert [row["correct"] for row in rows] == (probs.argmax(1) == LABELS).tolist()
    before = LOGITS.softmax(1).max(1).values
    assert [row["confidence_before"] for row in rows] == pytest.approx(before.tolist())
    text = page.read_text()
    assert text.count("<svg") == 4  # reliability before and after, two bar plots
    assert "<script" not in text
    assert "split seed" in capsys.readouterr().out


def test_separate_rows_to_fit_on(tmp_path, source):
    other, summary = write(tmp_path / "fit.jsonl", RECORDS[:150]), tmp_path / "summary.json"
    judged = write(tmp_path / "judge.jsonl", RECORDS[150:])
    run_audit(AuditRecalibrate, judged, "--fit", other, "--maps", "temperature", "--bins", 10, "--summary", summary)
    told = json.loads(summary.read_text())
    mapped = TemperatureScaling().fit(LOGITS[:150], LABELS[:150]).predict_log_proba(LOGITS[150:])
    close(told["temperature"], class_figures(mapped, LABELS[150:], bins=10))
    assert (told["fitted_on"], told["judged_on"]) == (150, 250)
    assert "vector" not in told


@pytest.mark.parametrize("name", ["temperature", "vector", "isotonic", "h", "h_nll"])
def test_a_saved_map_gives_the_same_probabilities_again(tmp_path, source, name):
    first, again, saved = tmp_path / "first.jsonl", tmp_path / "again.jsonl", tmp_path / "map.json"
    run_audit(AuditRecalibrate, source, *QUICK, "--maps", name, "--use", name, "-o", first, "--save-map", saved)
    summary = tmp_path / "summary.json"
    run_audit(AuditRecalibrate, source, "--apply", saved, "-o", again, "--summary", summary, "--bins", 10)
    assert [row["probs"] for row in read(again)] == [row["probs"] for row in read(first)]
    told = json.loads(summary.read_text())
    close(told["before"], class_figures(LOGITS.log_softmax(1), LABELS, bins=10))
    probs = torch.tensor([row["probs"] for row in read(again)], dtype=torch.float64)
    close(told["after"], class_figures(probs.log(), LABELS, bins=10))
    bare = write(tmp_path / "bare.jsonl", [{"logits": record["logits"]} for record in RECORDS[:5]])
    run_audit(AuditRecalibrate, bare, "--apply", saved, "-o", again)
    assert [row["probs"] for row in read(again)] == [row["probs"] for row in read(first)[:5]]
    assert "correct" not in read(again)[0]


def test_probabilities_and_log_probabilities_give_what_logits_do(tmp_path, source):
    found = []
    records = [{**r, "log_probs": torch.tensor(r["logits"]).log_softmax(0).tolist()} for r in RECORDS]
    source = write(tmp_path / "all.jsonl", records)
    for scores in ("logits", "log_probs", "probs"):
        summary = tmp_path / f"{scores}.json"
        run_audit(AuditRecalibrate, source, "--scores", scores, "--maps", "temperature", "--summary", summary)
        found.append(json.loads(summary.read_text())["temperature"]["nll"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-5)


def test_lame_on_top_of_the_map(tmp_path, source):
    summary, out = tmp_path / "summary.json", tmp_path / "out.jsonl"
    options = ["--features-field", "features", "--lame-batch", 50, "--maps", "temperature", "--summary", summary]
    run_audit(AuditRecalibrate, source, *options, "-o", out, "--bins", 10)
    fit, judge = split_rows(N, 0.5, seed=0)
    mapped = TemperatureScaling().fit(LOGITS[fit], LABELS[fit]).predict_log_proba(LOGITS[judge])
    wanted = lame_stream(mapped, FEATURES[judge].double(), batch_size=50)
    told, rows = json.loads(summary.read_text())["lame"], read(out)
    changed = told.pop("changed")
    close(told, class_figures(wanted, LABELS[judge], bins=10))
    assert changed == int((wanted.argmax(1) != mapped.argmax(1)).sum())
    assert np.array([rows[i]["lame_probs"] for i in judge]) == pytest.approx(wanted.exp().numpy(), abs=1e-6)
    assert all(rows[i]["lame_probs"] is None for i in fit)


def test_a_map_that_the_rows_do_not_determine_is_said(tmp_path):
    records = [{**r, "label": min(r["label"], 1)} for r in RECORDS]
    source, summary = write(tmp_path / "in.jsonl", records), tmp_path / "summary.json"
    run_audit(AuditRecalibrate, source, "--maps", "temperature", "vector", "--summary", summary)
    told = json.loads(summary.read_text())
    assert told["vector"].startswith("left out: class 2 has no row")
    assert told["temperature"]["nll"] > 0


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"logits": [1.0, 2.0]}, [], "line 8: logits has 2 numbers, and line 1 has 3: give each row as many"),
        ({"logits": [1.0, "a", 2.0]}, [], "line 8: logits must be a list of numbers"),
        ({"logits": []}, [], "line 8: logits must be a list of numbers"),
        ({"logits": 1.0}, [], "line 8: logits must be a list of numbers, got 1.0"),
        ({"logits": None}, [], "line 8: logits must be a list of numbers, got nothing"),
        ({"logits": [1.0, float("nan"), 0.0]}, [], "line 8: logits holds NaN"),
        ({"probs": [1.2, -0.1, -0.1]}, ["--scores", "probs"], "got 1.2 in line 8"),
        ({"probs": [0.5, 0.1, 0.1]}, ["--scores", "probs"], "line 8 sum to 0.7 and not to 1"),
        ({"label": 3}, [], "from 0 to 2, got 3 in line 8"),
        ({"label": 0.5}, [], "line 8: label must be a whole number, got 0.5"),
        ({"label": "cat"}, [], "line 8: label must be a finite number, got 'cat'"),
        ({"label": None}, [], "line 8: label must be a finite number, got nothing"),
        ({"features": [0.0, 0.0, 0.0]}, ["--features-field", "features"], "features of line 8 have norm 0"),
        ({"features": [0.0]}, ["--features-field", "features"], "line 8: features has 1 numbers"),
        ({}, ["--bins", 500], "200 rows cannot fill 500 bins"),
        ({}, ["--bins", 0], "bins must be a whole number"),
        ({}, ["--fit-share", 1.0], "must lie between 0 and 1"),
        ({}, ["--use", "h_nll"], "--use h_nll is not among --maps"),
        ({}, ["--window", 50], "window must be an odd whole number"),
        ({}, ["--penalty", -1], "penalty must be at least 0"),
        ({}, ["--apply", "nowhere.json"], "nowhere.json cannot be read"),
        ({}, ["--apply", "x.json", "--fit", "y.jsonl"], "--apply uses a saved map as it is"),
        ({}, ["--fit", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ({}, ["--save-map", "missing/map.json"], "there is no folder missing"),
        ({}, ["--scores-field", "scores"], "line 1: scores must be a list of numbers, got nothing"),
        ({}, ["--maps", "vector", "--use", "temperature"], "--use temperature is not among --maps"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, changes, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    records = [dict(record) for record in RECORDS]
    records[7] |= changes
    assert sentence in refused(
        capsys, write(tmp_path / "in.jsonl", records), "--maps", "temperature", "vector", "h", "--steps", 2, *arguments
    )


def test_impossible_labels_are_named_in_both_parts(tmp_path, capsys):
    fit, judge = split_rows(N, 0.5, seed=0)
    for row in (int(fit[3]), int(judge[3])):
        records = [dict(record) for record in RECORDS]
        records[row]["probs"] = [float(k == (records[row]["label"] + 1) % 3) for k in range(3)]
        source = write(tmp_path / "in.jsonl", records)
        error = refused(capsys, source, "--scores", "probs", "--maps", "temperature")
        assert f"line {row + 1} gives its label probability 0" in error


def test_one_class_only(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"logits": [2.0, 0.0], "label": 0}] * 40)
    assert "each label is the most probable class" in refused(capsys, source, "--maps", "temperature")


def test_maps_that_do_not_fit(tmp_path, capsys, source):
    from loglik.signals.map_files import save_map

    saved = tmp_path / "map.json"
    save_map(TemperatureScaling().fit(LOGITS[:, :2], LABELS.clamp(max=1)), saved)
    assert "fitted on 2 classes, got 3" in refused(capsys, source, "--apply", saved)
    confidence = LOGITS.softmax(1).max(1).values
    save_map(IsotonicConfidence().fit(confidence, LOGITS.argmax(1) == LABELS), saved)
    assert "maps single confidences" in refused(capsys, source, "--apply", saved)
    saved.write_text("{}")
    assert "this is no recalibration map" in refused(capsys, source, "--apply", saved)
