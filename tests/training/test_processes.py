"""Two processes (gloo) give the curve and the weights of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from loglik.errors import InputError
from loglik.training import TrainConfig, fit
from training import ddp_run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_processes(output: Path) -> None:
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
            [sys.executable, ddp_run.__file__, str(output)],
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


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tmp_path):
    """Uneven token counts, several means with weights of their own, and a KL estimate of the whole step."""
    ddp_run.main(str(tmp_path / "one"))
    two_processes(tmp_path / "two")
    for name in ddp_run.OBJECTIVES:
        one, two = (tmp_path / run / name for run in ("one", "two"))
        logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (one, two)]
        assert len(logs[0]) == len(logs[1]) == 7  # the evaluation before the first step, and six steps
        for single, double in zip(*logs, strict=True):
            assert set(single) == set(double)
            for key, value in single.items():
                if key != "seconds":
                    assert double[key] == pytest.approx(value, abs=2e-4), (name, key)
        weights = [load_file(path / "model.safetensors") for path in (one, two)]
        for key, value in weights[0].items():
            assert float((weights[1][key] - value).abs().max()) < 1e-4, (name, key)
        kept = sorted(path.name for path in two.glob("checkpoint-*"))
        assert kept == ["checkpoint-00000003", "checkpoint-00000006"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_shards_weights_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType[kind]))
    rows = ddp_run.pairs()
    with pytest.raises(InputError, match="shards no weights"):
        fit(ddp_run.policy(), "dpo", rows, TrainConfig(steps=1), output=tmp_path)
