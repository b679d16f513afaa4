"""The embedded diffusion model: what the package ships is what its record says, and what it says is a bound."""

from __future__ import annotations

import json
import platform
from importlib import resources
from pathlib import Path

import pytest
import torch

import loglik
from loglik.cli import main
from loglik.models.diffusion import MaskedDiffusionLM, infilling
from loglik.models.stdlib_text import HELD_OUT, stdlib_documents

HOME = Path(str(resources.files("loglik") / "models" / "embedded" / "tiny-diffusion"))
RECORD = Path(__file__).parents[2] / "recipes" / "tiny" / "record_diffusion.json"


@pytest.fixture(scope="module")
def small() -> MaskedDiffusionLM:
    model = loglik.load("tiny-diffusion", device="cpu", num_samples=64)
    assert isinstance(model, MaskedDiffusionLM)
    return model


def test_it_is_the_sibling_of_tiny(small, tiny):
    """One more token, and the same everything else."""
    vocabulary = len(tiny.tokenizer)
    assert small.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert small.mask_token_id == vocabulary
    sizes = [sum(p.numel() for p in model.model.parameters()) for model in (small, tiny)]
    assert sizes[0] - sizes[1] == tiny.model.config.hidden_size
    assert sum(file.stat().st_size for file in HOME.iterdir()) < 10_000_000
    assert not list(HOME.glob("*.bin"))
    assert small.kind is loglik.Kind.LOWER_BOUND


def test_estimates_are_those_of_the_enumerated_bound(small):
    texts = ["import os\n", "def f(x):\n    return x\n", "for i in range(10):"]
    rows = loglik.TokenBatch.from_lists([small.tokenizer(text)["input_ids"][:9] for text in texts], starts=[0] * 3)
    with torch.no_grad():
        bound = small.evidence(rows, estimator="enumeration").likelihood.value
        found = small.evidence(rows, estimator="count", points=8, num_samples=64).likelihood
        assert found.stderr is not None
        assert bool(((found.value - bound).abs() < 4 * found.stderr).all())
        ordered = small.evidence(rows, estimator="left_to_right").likelihood.value
    assert bool((ordered < 0).all())


def test_it_sees_what_stands_after_a_gap(small):
    """The closing bracket of a call is likelier before the end of a line than the opening one."""
    tokens = small.tokenizer
    cases = [("x = len(a", ")", "(", "\n"), ("if x is None", ":", ")", "\n    return"), ("import", " os", " (", "\n")]
    for before, right, wrong, after in cases:
        ids = tokens(before)["input_ids"] + [small.mask_token_id] + tokens(after)["input_ids"]
        hole = ids.index(small.mask_token_id)
        with torch.no_grad():
            log_p = torch.log_softmax(small.model(input_ids=torch.tensor([ids])).logits[0, hole].float(), -1)
        one, other = (tokens(word)["input_ids"][0] for word in (right, wrong))
        assert float(log_p[one]) > float(log_p[other]), (before, right)
    gaps = infilling(small, [[*tokens("import")["input_ids"], small.mask_token_id]])
    filled = small.sample(1, prompt=gaps, generator=torch.Generator().manual_seed(0))
    assert small.mask_token_id not in filled.ids


def test_the_command_line_gives_a_bound_with_its_error(tmp_path, small):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["import os\n", "x = len(a)\n"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    main(["score", str(source), "--model", "tiny-diffusion", "--num-samples", "64", "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["lower_bound"] * 2
    exact = loglik.load("tiny-diffusion", device="cpu", estimator="enumeration")
    for row, text in zip(rows, texts, strict=True):
        bound = loglik.score(exact, [text]).value.item()
        assert abs(row["log_prob"] - bound) < 4 * row["stderr"]
        assert row["stderr"] < 0.2 * abs(bound)
    alone = loglik.score(loglik.load("tiny-diffusion", device="cpu", num_samples=64), texts[1:])
    assert alone.value.item() == pytest.approx(rows[1]["log_prob"], abs=1e-3)


@pytest.mark.slow
def test_a_held_out_document_has_the_bits_per_byte_of_the_record():
    """Masks are a function of the text, so that the same 32 masks per window are drawn again."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["held_out_modules"] == list(HELD_OUT)
    assert record["held_out_bits_per_byte"] > record["tiny_bits_per_byte"]
    document = next(d for d in stdlib_documents("held_out") if d.name == record["example"]["document"])
    model = loglik.load("tiny-diffusion", device="cpu", num_samples=record["recipe"]["evaluation_samples"])
    found = loglik.score(model, [document.text], unit="byte", overflow="window").bits_per_byte()
    same_python = record["python"] == platform.python_version()
    assert found.kind is loglik.Kind.UPPER_BOUND
    assert found.item() == pytest.approx(record["example"]["bits_per_byte"], abs=1e-3 if same_python else 0.3)
