"""Runs of `fit` for the tests of several processes; started as ``python ddp_run.py OUTPUT WHICH``."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.objectives.base import Terms
from loglik.objectives.preference import ipo
from loglik.training import Online, Row, TrainConfig, fit
from loglik.training.collect import DrawPairs
from loglik.training.lora import LoraSettings, with_lora
from training.preference_rows import labelled, pairs, policy
from zoo import CAUSAL, MASKED, build

OBJECTIVES = {"mle": labelled, "dpo": pairs, "orpo": pairs, "kto": labelled}


def settings(**changes: Any) -> TrainConfig:
    """Six steps with everything that a run does along the way."""
    plain: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 3,
    }
    return TrainConfig(**(plain | changes))


def replicated(output: Path) -> None:
    """Every process holds all weights."""
    for name, make in OBJECTIVES.items():
        rows = make()
        fit(policy(), name, rows, settings(), output=output / name, validation=rows[:3])


def shorter(_: Any, first: list[int], second: list[int]) -> float:
    """A preference that needs no model."""
    return float(sum(first) < sum(second))


def shared(count: int = 12) -> list[Row]:
    """Pairs with prompts long enough that computing them once is worth it."""
    return [Row([5, 6, 7] * 5 + row.prompt, row.completions, name=row.name) for row in pairs(count)]


def sharded(output: Path) -> None:
    """Every process holds a part of the weights (in one process: all of them)."""
    processes = Accelerator().num_processes
    for name, make in {"mle": labelled, "dpo": shared, "kto": labelled}.items():
        rows, model = make(), policy()
        total = sum(p.numel() for p in model.model.parameters())
        fit(model, name, rows, settings(shard=True), output=output / name, validation=rows[:3])
        here = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.model.parameters())
        assert here * processes == total, "every process holds its part"
    tied = CausalLM(build(CAUSAL["gpt2"], 20))  # input and output embedding are one tensor
    for module in tied.model.modules():
        if isinstance(module, nn.Dropout):  # its masks depend on how the batch is cut
            module.p = 0.0
    fit(tied, "dpo", pairs(), settings(shard=True, steps=3), output=output / "tied", reference="initial")
    adapted = with_lora(policy(), LoraSettings(rank=2))  # the reference is the policy without its adapter
    fit(adapted, "dpo", pairs(), settings(shard=True), output=output / "lora", validation=pairs()[:3])
    collect = DrawPairs([[4, 5], [6]], shorter, 4, mixture=0.0, max_tokens=3)
    on_policy = settings(shard=True, steps=4, eval_every=0)
    fit(policy(), partial(ipo, tau=0.1), Online(collect, every=2), on_policy, output=output / "online")
    if PartialState().is_main_process:
        shutil.copytree(output / "mle", output / "resumed")
        shutil.rmtree(output / "resumed" / "checkpoint-00000006")
    PartialState().wait_for_everyone()
    rows = labelled()
    fit(policy(), "mle", rows, settings(shard=True), output=output / "resumed", validation=rows[:3], resume=True)
    if processes > 1:
        refusals(output)


def refusals(output: Path) -> None:
    """What cannot be sharded says so in every process, before anything waits for another."""
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (policy(), "mle", {"precision": "fp16"}, "not in fp16"),
        (MaskedLM(build(MASKED["bert"], 20), mask_token_id=3), "mle", {}, "not MaskedLM"),
        (policy(), Weighted(), {}, "weights of its own"),
    ]
    for model, objective, changes, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            fit(model, objective, labelled(), settings(shard=True, **changes), output=output / "refused")


class Weighted(nn.Module):
    """Maximum likelihood with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, policy: LogLikelihood) -> Terms:
        """The mean, scaled."""
        return Terms(-policy.value * self.scale, torch.ones_like(policy.value), {})


if __name__ == "__main__":
    {"replicated": replicated, "sharded": sharded}[sys.argv[2]](Path(sys.argv[1]))
