"""`loglik audit uncertainty --equivalence`: meanings by equality or by embeddings, and what is refused."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from audit_runner import run_audit

from loglik.cli.audits.uncertainty import AuditUncertainty
from loglik.models.ngram import NGramLM
from loglik.signals.equivalence import by_hidden_states, exact_match
from loglik.signals.uncertainty_table import sequence_uncertainty

PROMPTS = ["import os\nimport ", "for i in range(", "def add(a, b):\n    return "]
CHEAP = ["-m", "tiny", "--device", "cpu", "--num-samples", 4, "--max-tokens", 3, "--batch-size", 2]


@pytest.fixture(autouse=True)
def loaded_once(tiny, monkeypatch):
    """`-m tiny` is read once for all tests."""
    monkeypatch.setattr(sys.modules["loglik.models.load"], "load", lambda name, **options: tiny)


def source(tmp_path, prompts=PROMPTS):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def run(tmp_path, *arguments):
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    run_audit(AuditUncertainty, source(tmp_path), *CHEAP, *arguments, "-o", out, "--summary", summary)
    return [json.loads(line) for line in out.read_text().splitlines()], json.loads(summary.read_text())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditUncertainty, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def test_meanings_are_those_of_the_equivalence(tmp_path, tiny):
    for options, equivalence in (
        ([], exact_match),
        (["--equivalence", "embedding"], by_hidden_states(tiny, threshold=0.9, centre=PROMPTS)),
        (["--equivalence", "embedding", "--threshold", 0.2], by_hidden_states(tiny, threshold=0.2, centre=PROMPTS)),
    ):
        rows, told = run(tmp_path, *options)
        table = sequence_uncertainty(tiny, PROMPTS, num_samples=4, max_tokens=3, equivalence=equivalence)
        assert [row["num_semantic_sets"] for row in rows] == list(table.num_semantic_sets)
        for name in ("semantic_entropy", "discrete_semantic_entropy", "g_nll"):
            expected = table.measures[name].value.tolist()
            assert [row[name] for row in rows] == pytest.approx(expected, abs=1e-4)
        assert told["mean_num_semantic_sets"] == pytest.approx(np.mean(table.num_semantic_sets))
        assert told["equivalence"] == ("embedding" if options else "exact")


def test_a_directory_of_sentence_transformers(tmp_path, monkeypatch):
    class SentenceTransformer:
        def __init__(self, path, **options):
            pass

        def encode(self, texts, **options):
            return np.ones((len(texts), 2))

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    rows, _ = run(tmp_path, "--equivalence", "embedding", "--embedder", tmp_path)
    visible = [len({not text.strip() for text in row["samples"]}) for row in rows]
    assert [row["num_semantic_sets"] for row in rows] == visible


def test_refusals(tmp_path, capsys, monkeypatch):
    given = source(tmp_path)
    assert "--embedder is for --equivalence embedding" in refused(capsys, given, *CHEAP, "--embedder", tmp_path)
    embedding = [*CHEAP, "--equivalence", "embedding"]
    assert "is no directory" in refused(capsys, given, *embedding, "--embedder", tmp_path / "nowhere")
    assert "threshold must lie in [-1, 1], got 2" in refused(capsys, given, *embedding, "--threshold", 2)
    long = source(tmp_path, ["a", "b", "zq " * 2000])
    assert "line 3: has" in refused(capsys, long, *CHEAP)
    assert "a prompt, read for the embeddings (text 2): has" in refused(capsys, long, *embedding)
    grams = NGramLM.train(["import os"], order=1)
    monkeypatch.setattr(AuditUncertainty, "load", lambda self: grams)
    assert "equivalence by hidden states needs hidden states" in refused(capsys, source(tmp_path), *embedding)
