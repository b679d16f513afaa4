"""Text through a diffusion model: bounds with standard errors, by function, engine and command line."""

from __future__ import annotations

import json
import math

import pytest
import torch

from loglik import Kind, RowError, Unit, load, score
from loglik.cli import main
from loglik.models.diffusion import BidirectionalLlama, BidirectionalLlamaConfig, MaskedDiffusionLM

TEXTS = ["import os\n", "def f(x):\n    return x\n", "x = 1\n"]
PAIRS = [("import ", "os\n"), ("def f(x):\n", "    return x\n")]


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """A small random model with tiny's tokenizer, saved."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("diffusion")
    config = BidirectionalLlamaConfig(
        vocab_size=len(tiny.tokenizer) + 1,
        mask_token_id=len(tiny.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
        pad_token_id=None,
    )
    BidirectionalLlama(config).save_pretrained(where)
    tiny.tokenizer.save_pretrained(where)
    return where


def test_texts_have_a_bound_and_a_standard_error(directory):
    model = load(directory, device="cpu", num_samples=8)
    assert isinstance(model, MaskedDiffusionLM)
    found = score(model, TEXTS)
    assert found.kind is Kind.LOWER_BOUND
    assert found.per_unit is None
    assert found.stderr is not None
    assert bool((found.stderr > 0).all())
    # BOS is the context of the first token, as it is for causal models, so that the same tokens are scored.
    assert found.num_units.tolist() == [len(model.tokenizer(t)["input_ids"]) for t in TEXTS]
    alone = score(model, TEXTS[1:2])
    assert float(alone.value) == pytest.approx(float(found.value[1]), abs=1e-4)
    assert score(model, TEXTS, unit="byte").num_units.tolist() == [len(t) for t in TEXTS]
    pairs = score(model, PAIRS)
    assert pairs.num_units.tolist() == [len(model.tokenizer(c)["input_ids"]) for _, c in PAIRS]
    total = found.total()
    assert float(total.stderr) == pytest.approx(float(found.stderr.square().sum().sqrt()))
    bits = score(model, TEXTS, unit=Unit.BYTE).total().bits_per_byte()
    assert bits.kind is Kind.UPPER_BOUND


def test_an_order_gives_terms(directory):
    model = load(directory, device="cpu", estimator="left_to_right")
    found = score(model, TEXTS)
    assert found.kind is Kind.EXACT
    assert found.per_unit is not None
    assert torch.allclose(found.per_unit.sum(1), found.value)
    assert found.stderr is None


def test_long_texts_are_scored_in_windows(directory):
    model = load(directory, device="cpu", num_samples=4)
    text = "x = [1, 2, 3]\n" * 8
    with pytest.raises(RowError, match="context is 24"):
        score(model, [text])
    found = score(model, [text], overflow="window")
    assert found.num_units.tolist() == [len(model.tokenizer(text)["input_ids"])]
    assert bool(torch.isfinite(found.stderr).all())


def run(arguments: list[str], capsys) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return int(code or 0), out, err


def test_command_line(directory, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    target = tmp_path / "out.jsonl"
    code, _, err = run(
        ["score", str(source), "-m", str(directory), "-o", str(target), "--num-samples", "64", "--device", "cpu"],
        capsys,
    )
    assert code == 0, err
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["lower_bound"] * 2
    assert all(0 < row["stderr"] < math.inf for row in rows)
    assert all(row["is_greedy"] is None for row in rows)
    want = score(load(directory, device="cpu", num_samples=64), PAIRS)
    assert [row["log_prob"] for row in rows] == pytest.approx(want.value.tolist(), abs=1e-4)
    close = tmp_path / "close.jsonl"
    code, _, err = run(
        ["score", str(source), "-m", str(directory), "-o", str(close), "--target-stderr", "0.2", "--device", "cpu"],
        capsys,
    )
    assert code == 0, err
    assert all(json.loads(line)["stderr"] <= 0.2 for line in close.read_text().splitlines())


def test_command_line_refusals(directory, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("import os\n")
    code, _, err = run(["score", str(source), "-m", "tiny", "--num-samples", "4"], capsys)
    assert code == 2
    assert "num_samples is an option of diffusion models" in err
    code, _, err = run(["score", str(source), "-m", str(directory), "--estimator", "elbo"], capsys)
    assert code == 2
    assert "estimator must be one of" in err


def test_training_by_command_line(directory, tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"prompt": "x = ", "chosen": "1\n", "rejected": "None\n"}) + "\n")
    arguments = ["train", "--objective", "dpo", "--model", str(directory), "--data", str(source), "--steps", "2"]
    code, out, err = run(
        [*arguments, "--output", str(tmp_path / "run"), "--batch-size", "1", "--num-samples", "2", "--device", "cpu"],
        capsys,
    )
    assert code == 0, err
    assert "step 2" in out
    assert isinstance(load(tmp_path / "run", device="cpu"), MaskedDiffusionLM)
    code, _, err = run(
        [*arguments[:4], "tiny", *arguments[5:], "--output", str(tmp_path / "b"), "--num-samples", "2"], capsys
    )
    assert code == 2
    assert "--num-samples is for models whose likelihood is sampled" in err
