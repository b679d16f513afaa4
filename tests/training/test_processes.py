"""Two processes (gloo) give the curve and the weights of one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from loglik.errors import InputError
from loglik.training import TrainConfig, fit
from loglik.training.sharding import wants_sharding
from training import ddp_run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_processes(output: Path, which: str) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    started = [
        subprocess.Popen(
            [sys.executable, ddp_run.__file__, str(output), which],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)


def logs_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, *, lines: int) -> None:
    """The log within 2e-4 of each other, the final weights within 1e-4."""
    assert len(logs_of(one)) == len(logs_of(two)) == lines
    for single, double in zip(logs_of(one), logs_of(two), strict=True):
        assert set(single) == set(double)
        for key, value in single.items():
            if key != "seconds":
                assert double[key] == pytest.approx(value, abs=2e-4), (one.name, key)
    name = next(path.name for path in one.glob("*.safetensors"))
    weights = [load_file(path / name) for path in (one, two)]
    assert set(weights[0]) == set(weights[1])
    for key, value in weights[0].items():
        assert weights[1][key].dtype == value.dtype
        assert float((weights[1][key] - value).abs().max()) < 1e-4, (one.name, key)


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tmp_path):
    """Uneven token counts, several means with weights of their own, and a KL estimate of the whole step."""
    ddp_run.replicated(tmp_path / "one")
    two_processes(tmp_path / "two", "replicated")
    for name in ddp_run.OBJECTIVES:  # the evaluation before the first step, and six steps
        assert_same_run(tmp_path / "one" / name, tmp_path / "two" / name, lines=7)
        kept = sorted(path.name for path in (tmp_path / "two" / name).glob("checkpoint-*"))
        assert kept == ["checkpoint-00000003", "checkpoint-00000006"]


@pytest.mark.slow
def test_shards_give_the_run_of_whole_weights(tmp_path):
    """Prompts shared, tied embeddings, adapters with themselves as the reference, rows drawn on policy, a resume."""
    one, two = tmp_path / "one", tmp_path / "two"
    ddp_run.sharded(one)
    two_processes(two, "sharded")
    lines = {"mle": 7, "dpo": 7, "kto": 7, "tied": 3, "lora": 7, "online": 4, "resumed": 7}
    for name, count in lines.items():
        assert_same_run(one / name, two / name, lines=count)
    for name in ("weights", "optimizer"):
        files = [load_file(run / "dpo" / "checkpoint-00000006" / f"{name}.safetensors") for run in (one, two)]
        assert set(files[0]) == set(files[1])
        for key, value in files[0].items():
            assert float((files[1][key] - value).abs().max()) < 1e-4, key
    config = json.loads((two / "dpo" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # The checkpoint is that of whole weights: one process goes on from it.
    shutil.rmtree(two / "mle" / "checkpoint-00000006")
    before = load_file(two / "mle" / "model.safetensors")
    rows = ddp_run.labelled()
    fit(
        ddp_run.policy(),
        "mle",
        rows,
        ddp_run.settings(),
        output=two / "mle",
        validation=rows[:3],
        resume=True,
    )
    after = load_file(two / "mle" / "model.safetensors")
    assert all(float((after[key] - value).abs().max()) < 1e-4 for key, value in before.items())


def test_a_launch_that_cuts_weights_up_in_another_way_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
    with pytest.raises(InputError, match="does not run under DEEPSPEED: to shard weights, launch plain processes"):
        fit(ddp_run.policy(), "dpo", ddp_run.pairs(), TrainConfig(steps=1), output=tmp_path)


@pytest.mark.parametrize(("version", "shards"), [(1, None), (2, True)])
def test_a_launch_with_fsdp_shards(monkeypatch, version, shards):
    """Accelerate turns FSDP on for accelerators only, so the launch is pretended."""
    launch = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        num_processes=2,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version)),
    )
    if shards:
        assert wants_sharding(launch, TrainConfig(steps=1))
        return
    with pytest.raises(InputError, match="by FSDP version 2"):
        wants_sharding(launch, TrainConfig(steps=1))
