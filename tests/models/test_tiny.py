"""The embedded model: what the package ships is what its record says."""

from __future__ import annotations

import json
import math
import platform
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loglik
from loglik.models.stdlib_text import HELD_OUT, stdlib_documents
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow

HOME = Path(str(resources.files("loglik") / "models" / "embedded" / "tiny"))
RECORD = Path(__file__).parents[2] / "recipes" / "tiny" / "record.json"


def test_size_and_vocabulary(tiny):
    parameters = sum(p.numel() for p in tiny.model.parameters())
    assert 2_000_000 <= parameters <= 6_000_000
    assert sum(file.stat().st_size for file in HOME.iterdir()) < 10_000_000
    assert 3_500 <= len(tiny.tokenizer) <= 4_500
    assert tiny.kind is loglik.Kind.EXACT
    assert not list(HOME.glob("*.bin"))


def test_transformers_loads_it_alone(tiny):
    model = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(HOME)
    ids = tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "def add(a, b):\n    return a + b\n"
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
    expected = float(logp.gather(1, ids[0, 1:, None]).sum())
    got = loglik.score(tiny, ["def add(a, b):\n    return a + b\n"], bos="never")
    assert got.value.item() == pytest.approx(expected, abs=1e-4)
    assert got.num_units.item() == ids.shape[1] - 1


def test_it_has_learned_the_language(tiny):
    """The right continuation is likelier than a wrong one of the same kind."""
    cases = [
        ("for i in range(", "10):", "10]:"),
        ("import os\nimport ", "sys\n", "(((\n"),
        ("def __init__(", "self", "else"),
        ("if x is not ", "None:", "import:"),
    ]
    for prompt, right, wrong in cases:
        ll = loglik.score(tiny, [(prompt, right), (prompt, wrong)])
        assert ll.value[0] > ll.value[1] + 1, prompt


def test_held_out_bits_per_byte_are_those_of_the_record(tiny):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["held_out_modules"] == list(HELD_OUT)
    rows = [InputRow(d.name, d.name, "", d.text) for d in stdlib_documents("held_out")]
    scored = Scorer(tiny, ScoreOptions(overflow="window")).score_rows(rows)
    nats = math.fsum(row.log_prob or 0.0 for row in scored)
    measured = -nats / math.log(2) / sum(row.num_bytes or 0 for row in scored)
    same_python = record["python"] == platform.python_version()
    assert measured == pytest.approx(record["held_out_bits_per_byte"], abs=1e-3 if same_python else 0.05)


@pytest.mark.slow
def test_gsm8k_equals_a_naive_transformers_loop(shared_data, tmp_path):
    """1,319 questions and answers through the command line, against one plain forward pass per row."""
    import pyarrow.parquet as pq

    from loglik.cli import main

    source, output = shared_data / "gsm8k_test.jsonl", tmp_path / "s.parquet"
    fields = ["--prompt-field", "question", "--completion-field", "answer"]
    main(["score", str(source), *fields, "--model", "tiny", "--output", str(output)])
    table = pq.read_table(output)
    assert table.num_rows == 1319
    assert table["error"].null_count == 1319
    model = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(HOME)
    step = 11  # every eleventh row keeps the test short; `make reproduce` is for all
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    naive = 0.0
    with torch.no_grad():
        for row in rows[::step]:
            whole = row["question"] + row["answer"]
            encoded = tokenizer(whole, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(row["question"]))
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1].float(), -1)
            naive += float(logp[start - 1 :].gather(1, torch.tensor(ids[start:])[:, None]).sum())
    got = math.fsum(table["log_prob"].to_pylist()[::step])
    assert got == pytest.approx(naive, rel=1e-3)
