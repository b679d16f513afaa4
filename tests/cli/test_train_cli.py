"""``loglik train``: from a file to a model that loads, and one sentence for everything that can go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loglik
from loglik.cli import main
from zoo import CAUSAL, build, byte_level_tokenizer

PAIRS = [{"prompt": f"{a}+{b}? ", "chosen": "yes\n", "rejected": "no\n"} for a in range(4) for b in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a tiny model and data."""
    where = tmp_path_factory.mktemp("train")
    tokenizer = byte_level_tokenizer()
    build(CAUSAL["llama"], len(tokenizer)).save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    write(where / "pairs.jsonl", PAIRS)
    return where


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def arguments(place: Path, output: Path, *more: str, objective: str = "dpo", data: str = "pairs.jsonl") -> list[str]:
    return [
        *("train", "--objective", objective, "--model", str(place / "model"), "--data", str(place / data)),
        *("--output", str(output), "--device", "cpu", "--batch-size", "4", "--lr", "1e-2", *more),
    ]


def log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def refused(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1
    return shown


def test_a_run_from_file_to_model(place, tmp_path, capsys):
    main(arguments(place, tmp_path / "run", "--set", "beta=0.5", "--log-every", "1", "--epochs", "2"))
    assert "step 8" in capsys.readouterr().out
    rows = log(tmp_path / "run")
    assert len(rows) == 8
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["accuracy"] > 0.9
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    trained = loglik.load(tmp_path / "run", device="cpu")
    before = loglik.load(place / "model", device="cpu")
    change = {
        side: loglik.score(trained, [(p["prompt"], p[side]) for p in PAIRS]).value
        - loglik.score(before, [(p["prompt"], p[side]) for p in PAIRS]).value
        for side in ("chosen", "rejected")
    }
    assert float((change["chosen"] - change["rejected"]).mean()) > 0.5


def test_an_adapter_is_saved_alone_and_loads_with_its_base(place, tmp_path):
    main(arguments(place, tmp_path / "run", "--lora", "--lora-rank", "2", "--steps", "3"))
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert not (tmp_path / "run" / "config.json").exists()
    adapted = loglik.load(tmp_path / "run", device="cpu")
    before = loglik.load(place / "model", device="cpu")
    texts = [p["prompt"] + p["chosen"] for p in PAIRS]
    assert not torch.allclose(loglik.score(adapted, texts).value, loglik.score(before, texts).value)
    with adapted.model.disable_adapter():
        off = loglik.score(adapted, texts).value
    torch.testing.assert_close(off, loglik.score(before, texts).value, atol=1e-4, rtol=0)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(by_transformers(ids).logits, adapted.model(ids).logits, atol=1e-4, rtol=0)


def test_numbers_go_to_tensorboard_too(place, tmp_path):
    main(arguments(place, tmp_path / "run", "--steps", "2", "--log-every", "1", "--report-to", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "loglik"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in log(tmp_path / "run")])


def test_bfloat16_autocast_and_gradient_checkpointing_follow_the_plain_run(place, tmp_path):
    for name, more in {"plain": (), "bf16": ("--precision", "bf16"), "saved": ("--gradient-checkpointing",)}.items():
        main(arguments(place, tmp_path / name, "--steps", "3", "--log-every", "1", *more))
    plain, bf16, saved = ([r["loss"] for r in log(tmp_path / name)] for name in ("plain", "bf16", "saved"))
    assert saved == pytest.approx(plain, abs=1e-5)
    assert bf16 == pytest.approx(plain, abs=2e-2)


def test_rows_left_out_are_named(place, tmp_path, capsys):
    write(place / "mixed.jsonl", [*PAIRS, {"prompt": "1+1=", "chosen": "2", "rejected": "2"}])
    main(arguments(place, tmp_path / "run", "--steps", "1", "--on-error", "skip", data="mixed.jsonl"))
    assert "left out: line 17: chosen and rejected are identical" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dop"}, "unknown objective 'dop'; did you mean 'dpo'?"),
        ({"more": ("--set", "bta=1")}, "did you mean 'beta'"),
        ({"more": ("--set", "beta")}, "--set takes NAME=VALUE"),
        ({"more": ("--set", "beta=-1")}, "beta must be positive"),
        ({"more": ("--set", "beta=big")}, "beta must be a number"),
        ({"more": ("--lr", "-1")}, "learning_rate must be positive"),
        ({"more": ("--batch-size", "0")}, "batch_size must be at least 1"),
        ({"more": ("--epochs", "0")}, "--epochs must be positive"),
        ({"more": ("--model", "nowhere/at-all")}, "no embedded model"),
        ({"more": ("--reference", "nowhere/at-all")}, "no embedded model"),
        ({"more": ("--monitor",)}, "give --validation"),
        ({"more": ("--lora", "--lora-targets", "no_such_layer")}, "adapter does not fit"),
        ({"more": ("--lora", "--lora-rank", "0")}, "a rank of at least 1"),
        ({"more": ("--max-length", "3")}, "more than the context of 3"),
        ({"data": "none.jsonl"}, "does not exist"),
        ({"data": "single.jsonl"}, "line 1 has 1"),
        ({"data": "columns.jsonl"}, "has the columns 'question'"),
        ({"data": "empty.jsonl"}, "no rows to train on"),
        ({"data": "same.jsonl"}, "line 1: chosen and rejected are identical"),
        ({"data": "blank.jsonl"}, "line 1: a completion is empty"),
    ],
)
def test_bad_input_is_one_sentence(place, tmp_path, capsys, change, message):
    write(place / "single.jsonl", [{"prompt": "a", "completion": "b"}])
    write(place / "columns.jsonl", [{"question": "a"}])
    write(place / "empty.jsonl", [])
    write(place / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    write(place / "blank.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}])
    options = {k: v for k, v in change.items() if k != "more"}
    assert message in refused(capsys, arguments(place, tmp_path / "run", *change.get("more", ()), **options))


def test_a_checkpoint_of_another_architecture_or_run(place, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(place, out, "--steps", "2"))
    assert "holds a run already" in refused(capsys, arguments(place, out, "--steps", "2"))
    assert "other settings (learning_rate)" in refused(
        capsys, arguments(place, out, "--steps", "2", "--lr", "1", "--resume")
    )
    tokenizer = byte_level_tokenizer()
    build(CAUSAL["gpt2"], len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    shown = refused(capsys, arguments(place, out, "--steps", "2", "--resume", "--model", str(tmp_path / "other")))
    assert "another architecture" in shown
    weights = next(out.glob("checkpoint-*")) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refused(capsys, arguments(place, out, "--steps", "2", "--resume"))


def started(place: Path, output: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = arguments(place, output, "--steps", str(steps), "--log-every", "1", "--save-every", "5", *more)
    return subprocess.Popen(
        [sys.executable, "-m", "loglik", *command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen[str], output: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "log.jsonl").is_file() and len((output / "log.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps were logged: {process.communicate()[0]}")


@pytest.mark.slow
def test_sigterm_saves_and_sigkill_loses_at_most_the_steps_since_a_checkpoint(place, tmp_path):
    """Terminated, then killed, then finished: the weights of a run that nothing interrupted."""
    steps = 400
    main(arguments(place, tmp_path / "straight", "--steps", str(steps), "--log-every", "1", "--save-every", "5"))
    out = tmp_path / "run"
    process = started(place, out, steps)
    wait_for_steps(process, out, 8)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 0, printed
    assert "as asked" in printed
    done = len(log(out))
    assert 8 <= done < steps
    assert (out / f"checkpoint-{done:08d}").is_dir()
    process = started(place, out, steps, "--resume")
    wait_for_steps(process, out, done + 20)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    main(arguments(place, out, "--steps", str(steps), "--log-every", "1", "--save-every", "5", "--resume"))
    timeless = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in log(path)] for path in (tmp_path / "straight", out)
    ]
    assert timeless[0] == timeless[1]
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "straight", out))
    assert all(torch.equal(one[name], two[name]) for name in one)
