"""``loglik audit chain``: its correlations are those of the functions, from models or from given likelihoods."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from audit_runner import run_audit

from loglik.cli.audits.chain import AuditChain
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.load import load
from loglik.signals.choice import score_options
from loglik.signals.metric_chain import LINKS, chain_correlations, chain_links, metric_chain

COMPUTE = (1e18, 1e19, 1e20, 1e21)
QUESTIONS = [
    ("import os\nos.path.", ["join", "banana", "purple"], 0),
    ("def __init__(self", ["banana", "):"], 1),
    ("for i in ", ["range", "walrus"], 0),
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def given_rows(questions=12, options=3, seed=0):
    """Right options gain mass with every model, and so do wrong ones."""
    random = np.random.default_rng(seed)
    slopes = random.uniform(0, 1, (questions, options))
    rows = []
    for i in range(questions):
        table = -6 + slopes[i] * np.arange(len(COMPUTE))[:, None] + random.normal(0, 0.05, (len(COMPUTE), options))
        rows.append({"log_likelihoods": np.minimum(table, -0.1).tolist(), "answer": int(random.integers(options))})
    return rows


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditChain, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize("method", ["spearman", "pearson", "kendall"])
def test_given_likelihoods_give_the_functions_numbers(tmp_path, capsys, method):
    rows = given_rows()
    source = write(tmp_path / "in.jsonl", rows)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    options = ("--compute", *COMPUTE, "--method", method, "-o", out, "--summary", summary, "--report", page)
    run_audit(AuditChain, source, *options)
    chains = []
    for m in range(4):
        value = torch.tensor([x for row in rows for x in row["log_likelihoods"][m]], dtype=torch.float64)
        likelihood = LogLikelihood(value, Kind.EXACT, Unit.EVENT, torch.ones(36, dtype=torch.long))
        chains.append(metric_chain(likelihood, torch.arange(12).repeat_interleave(3), [row["answer"] for row in rows]))
    expected = chain_correlations(chains, COMPUTE, method=method)
    told, found = json.loads(summary.read_text()), read(out)
    for name in LINKS:
        assert told[f"r_{name}"]["mean"] == pytest.approx(expected[name].mean)
        assert told[f"r_{name}"]["area"] == pytest.approx(1 + expected[name].mean)
        assert told[f"r_{name}"]["constant"] == pytest.approx(expected[name].constant)
        kept = [row[f"r_{name}"] for row in found if row[f"r_{name}"] is not None]
        assert kept == pytest.approx(expected[name].values.tolist())
        assert [row[f"r_{name}"] is not None for row in found] == expected[name].kept.tolist()
    links = chain_links(expected)
    assert [link["drop"] for link in told["links"]] == pytest.approx([link.drop for link in links])
    worst = max(links, key=lambda link: link.drop)
    assert told["weakest_link"] == f"{worst.before} -> {worst.after}"
    assert [row["compute"] for row in told["means"]] == list(COMPUTE)
    assert told["means"][2]["accuracy"] == chains[2].means()["accuracy"]
    assert told["mass"]["slope_of_right"] > 0
    assert [row["log_likelihoods"] for row in found] == [row["log_likelihoods"] for row in rows]
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "<script" not in text
    assert "weakest link" in capsys.readouterr().out


def test_models_are_scored_and_their_table_can_be_read_again(tmp_path, tiny):
    models = []
    for step, noise in enumerate((0.05, 0.02, 0.0)):
        folder = tmp_path / f"step-{step}"
        other = load("tiny", device="cpu")
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        other.model.save_pretrained(folder)
        other.tokenizer.save_pretrained(folder)
        models.append(folder)
    records = [{"question": q, "options": o, "answer": a} for q, o, a in QUESTIONS]
    source = write(tmp_path / "in.jsonl", records)
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    options = ("--compute", 1, 2, 4, "--separator", "", "--device", "cpu")
    run_audit(AuditChain, source, "--models", *models, *options, "-o", out, "--summary", summary)
    scored = score_options(tiny, [q for q, _, _ in QUESTIONS], [o for _, o, _ in QUESTIONS], separator="")
    rows, told = read(out), json.loads(summary.read_text())
    assert [x for row in rows for x in row["log_likelihoods"][2]] == pytest.approx(scored.likelihood.value.tolist())
    own = metric_chain(scored.likelihood, scored.question, [a for _, _, a in QUESTIONS])
    assert told["means"][2]["p_choices"] == pytest.approx(own.means()["p_choices"])
    assert told["means"][2]["model"] == str(models[2])
    other = tmp_path / "other.json"
    run_audit(AuditChain, out, "--compute", 1, 2, 4, "--summary", other)
    for name in LINKS:
        assert json.loads(other.read_text())[f"r_{name}"] == told[f"r_{name}"]


def test_a_score_that_never_varies_is_undefined(tmp_path):
    """All models are right on every question: there is no correlation of accuracy, and the rest is told."""
    rows = [{"log_likelihoods": [[-3 + m - 0.1 * i, -9.0] for m in range(3)], "answer": 0} for i in range(4)]
    summary, page = tmp_path / "summary.json", tmp_path / "page.html"
    source = write(tmp_path / "in.jsonl", rows)
    run_audit(AuditChain, source, "--compute", 1, 2, 3, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    assert told["r_accuracy"] == "undefined: the same for all models on every question"
    assert told["r_log_p_vocab"]["mean"] == 1.0
    assert [link["after"] for link in told["links"]] == ["p_vocab", "p_choices", "brier"]
    same = write(tmp_path / "same.jsonl", [{"log_likelihoods": [[-1.0, -2.0]] * 3, "answer": 0}] * 3)
    run_audit(AuditChain, same, "--compute", 1, 2, 3, "--summary", summary, "--report", page)
    told = json.loads(summary.read_text())
    assert all(str(told[f"r_{name}"]).startswith("undefined") for name in LINKS)
    assert "links" not in told


def test_impossible_options_are_told_as_far_as_they_go(tmp_path):
    rows = [{"log_likelihoods": [[-5.0 + m + i, float("-inf")] for m in range(3)], "answer": 0} for i in range(3)]
    source, summary = write(tmp_path / "in.jsonl", rows), tmp_path / "summary.json"
    run_audit(AuditChain, source, "--compute", 1, 2, 3, "--summary", summary)
    told = json.loads(summary.read_text())
    assert told["mass"].startswith("undefined")
    assert told["r_p_vocab"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("compute", "change", "options", "sentence"),
    [
        ((1, 2), {}, (), "line 1: log_likelihoods must have a list of numbers for each of the 2 computes"),
        ((1, 2, 3, 0), {}, (), "--compute must be positive and finite, got 0"),
        ((1, 2, 3, -4), {}, (), "--compute must be positive and finite, got -4"),
        ((1, 2, 4, 3), {}, (), "--compute must rise from model to model, got 3 after 4"),
        ((1, 1, 1, 1), {}, (), "all models have the same compute"),
        (COMPUTE, {}, ("--models", "tiny", "tiny"), "--models and --compute must pair, got 2 and 4"),
        (COMPUTE, {}, ("--normalise", "byte"), "--normalise byte needs the options' lengths"),
        (COMPUTE, {"answer": 3}, (), "line 2: answer must be an option's number from 0 to 2, got 3"),
        (COMPUTE, {"answer": 0.5}, (), "line 2: answer must be a whole number"),
        (COMPUTE, {"answer": None}, (), "line 2: answer"),
        (COMPUTE, {"log_likelihoods": [[-1.0, float("nan")]] * 4}, (), "line 2: log_likelihoods must be log-prob"),
        (COMPUTE, {"log_likelihoods": [[-1.0, 0.5]] * 4}, (), "line 2: log_likelihoods must be log-prob"),
        (COMPUTE, {"log_likelihoods": [[-1.0]] * 4}, (), "line 2: log_likelihoods must have as many options"),
        (COMPUTE, {"log_likelihoods": [[-1.0, -2.0]] * 3 + [[-1.0] * 3]}, (), "as many options for each model"),
        (COMPUTE, {"log_likelihoods": [[float("-inf")] * 2] * 4, "answer": 0}, (), "line 2: gives every option"),
        (COMPUTE, {"log_likelihoods": "many"}, (), "line 2: log_likelihoods must have a list"),
    ],
)
def test_bad_input(tmp_path, capsys, compute, change, options, sentence):
    rows = given_rows()
    rows[1] |= change
    source = write(tmp_path / "in.jsonl", rows)
    assert sentence in refused(capsys, source, "--compute", *compute, *options)


def test_bad_questions(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"question": "a", "options": ["b", "c"], "answer": 0}, {"question": "a"}])
    options = ("--models", "tiny", "tiny", "tiny", "--compute", 1, 2, 3, "--device", "cpu")
    assert "line 2: options must be a list of texts" in refused(capsys, source, *options)
    one = [{"question": "a", "options": ["b", "c"], "answer": 0}, {"question": "a", "options": ["b"], "answer": 0}]
    assert "line 2" in refused(capsys, write(tmp_path / "one.jsonl", one), *options)
    two = write(tmp_path / "two.jsonl", [{"log_likelihoods": [[-1.0, -2.0], [-2.0, -1.0]], "answer": 0}])
    assert "at least three models" in refused(capsys, two, "--compute", 1, 2)
