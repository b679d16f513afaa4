"""Runs of `fit` for the test of several processes; started as ``python ddp_run.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loglik.training import TrainConfig, fit
from training.preference_rows import labelled, pairs, policy

OBJECTIVES = {"mle": labelled, "dpo": pairs, "orpo": pairs, "kto": labelled}


def main(output: str) -> None:
    for name, make in OBJECTIVES.items():
        rows = make()
        settings = TrainConfig(
            steps=6,
            batch_size=4,
            micro_batch_size=1,
            learning_rate=1e-2,
            warmup_steps=1,
            log_every=1,
            eval_every=3,
            save_every=3,
        )
        fit(policy(), name, rows, settings, output=Path(output) / name, validation=rows[:3])


if __name__ == "__main__":
    main(*sys.argv[1:])
