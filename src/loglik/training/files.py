"""What a run writes: its log, its checkpoints, the best weights so far and the final model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from loglik.errors import InputError
from loglik.progress import quiet_transformers
from loglik.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from loglik.training.sharding import full_state, is_sharded, release

__all__ = ["RunFiles"]


class RunFiles:
    """The directory of one run; only the first process writes.

    Args:
        out: the directory.
        model: whose network and tokenizer are saved at the end.
        trained: everything with weights that are trained, which checkpoints hold.
        accelerator: of the run.
        settings: everything that decides the result, as plain values; a resumed run must share them.
        keep: complete checkpoints to keep.
        trackers: whether numbers go to trackers too.
    """

    def __init__(
        self,
        out: Path,
        model: Any,
        trained: torch.nn.Module,
        accelerator: Accelerator,
        settings: Mapping[str, object],
        *,
        keep: int,
        trackers: bool,
    ) -> None:
        self.out, self.model, self.trained, self.accelerator = out, model, trained, accelerator
        self.keep, self.trackers = keep, trackers
        self.settings = json.loads(json.dumps(settings))
        self.log = out / "log.jsonl"
        self.best: tuple[float, int] | None = None

    def prepare(self, optimizer: torch.optim.Optimizer, *, resume: bool) -> tuple[int, float, Any]:
        """Make the directory and restore its newest checkpoint if asked; the next step, the loss so far, kept rows.

        Raises:
            InputError: if another run lies here, or one with other settings.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint = latest_checkpoint(self.out)
        if checkpoint is None:
            if self.accelerator.is_main_process:
                self.log.unlink(missing_ok=True)
            return 0, math.nan, None
        if not resume:
            raise InputError(
                f"{self.out} holds a run already; pass resume=True to continue it or choose another output"
            )
        state = load_checkpoint(checkpoint, module=self.trained, optimizer=optimizer)
        differ = [key for key, value in self.settings.items() if state["config"].get(key) != value]
        if differ:
            raise InputError(
                f"{self.out} was trained with other settings ({', '.join(differ)}); use them or another output"
            )
        self.best = tuple(state["best"]) if state.get("best") else None
        if self.accelerator.is_main_process:
            # Lines after the checkpoint belong to steps that will be run again.
            lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
            self.log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return int(state["step"]), float(state["loss"]), state.get("rows")

    def begin_tracking(self) -> None:
        """Open the trackers with the settings that they can show."""
        if self.trackers:
            plain = {k: v for k, v in self.settings.items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers("loglik", config=plain)

    def end_tracking(self) -> None:
        """Close the trackers."""
        if self.trackers:
            self.accelerator.end_training()

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of the log, and the same numbers to the trackers."""
        if self.accelerator.is_main_process:
            with self.log.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        if self.trackers:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(numbers, step=int(record["step"]))

    def save(self, optimizer: Any, step: int, loss: float, rows: Any = None) -> None:
        """A checkpoint from which the run goes on."""
        sharded, main = is_sharded(self.model.model), self.accelerator.is_main_process
        if main or sharded:
            release(self.trained)
            state = {"step": step, "loss": loss, "config": self.settings, "best": self.best, "rows": rows}
            raw = getattr(optimizer, "optimizer", optimizer)
            save_checkpoint(self.out, module=self.trained, optimizer=raw, state=state, keep=self.keep, write=main)
        self.accelerator.wait_for_everyone()

    def keep_best(self, loss: float, step: int) -> None:
        """Keep the weights in ``best`` if no evaluation before had a lower loss."""
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step)
            self.export(self.out / "best")

    def export(self, where: Path) -> None:
        """The model for `from_pretrained`; of an adapter, the adapter alone."""
        network = self.model.model
        gathered = {"state_dict": full_state(network)} if is_sharded(network) else {}
        if self.accelerator.is_main_process:
            with quiet_transformers():
                network.save_pretrained(where, **gathered)
            if self.model.tokenizer is not None:
                self.model.tokenizer.save_pretrained(where)
