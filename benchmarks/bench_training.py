"""DPO step time and peak memory beside TRL's `DPOTrainer`: same weights, same pairs in the same order, same optimizer.

Pairs have prompts of 512 tokens and responses of 64. Each run is a process of its own; memory is what the resident set
rises to during a step above weights and optimizer state. Reference log-probabilities are computed in advance on both
sides, or by a second model at every step on both sides.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring_measure import peak
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT, RESPONSE, BATCH, STEPS = 512, 64, 4, 5
SHAPES = {  # about 40 million parameters each, the head tied to the embedding
    32_000: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    128_000: {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4},
}
RATE = 1e-5


def network(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        **SHAPES[vocabulary],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pairs(vocabulary: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected token ids, EOS included."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(3, vocabulary, size=count).tolist()

    return [(ids(PROMPT), [*ids(RESPONSE - 1), 2], [*ids(RESPONSE - 1), 2]) for _ in range(BATCH * STEPS)]


def run_loglik(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Steps of `loglik.fit`."""
    from loglik.models.causal import CausalLM
    from loglik.objectives.preference import dpo
    from loglik.training import Row, TrainConfig

    module = importlib.import_module("loglik.training.fit")  # the package has a function of this name

    rows = [Row(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs(task["vocabulary"])]
    order = module.StepSampler(len(rows), batch_size=BATCH, micro_batch_size=BATCH, first=0, last=STEPS, seed=0)
    flat = [index for batch in order for index in batch]
    back = [rows[flat.index(i)] for i in range(len(rows))]  # so that the sampler's order is the pairs' own
    clock = Clock(STEPS)
    take_step = module.take_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.begin()
        result = take_step(*args, **kwargs)
        clock.end()
        return result

    module.take_step = timed
    config = TrainConfig(
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=RATE,
        schedule="constant",
        betas=(0.9, 0.999),
        log_every=1,
        save_every=10**9,
    )
    model = CausalLM(network(task["vocabulary"]))
    reference = CausalLM(network(task["vocabulary"])) if task["reference"] == "model" else None
    begun = time.perf_counter()
    options = {} if reference is None else {"reference": lambda batch: scored(reference, batch)}
    module.fit(model, dpo, back, config, output=folder / "run", **options)
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return clock.found(time.perf_counter() - begun) | {"losses": [json.loads(line)["loss"] for line in lines]}


def scored(model: Any, batch: Any) -> Any:
    """A second model at every step, prompts shared as the policy's are."""
    with torch.no_grad():
        return model.log_prob(batch.tokens).detach()


def run_trl(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Steps of TRL's `DPOTrainer`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    made = tokenizer(task["vocabulary"])
    text = lambda ids: " ".join(made.convert_ids_to_tokens(ids))  # noqa: E731
    records = [
        {"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in pairs(task["vocabulary"])
    ]
    clock = Clock(STEPS)

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=task["checkpointing"],
        precompute_ref_log_probs=task["reference"] == "stored",
        max_length=None,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    begun = time.perf_counter()
    trainer = DPOTrainer(
        model=network(task["vocabulary"]),
        ref_model=network(task["vocabulary"]) if task["reference"] == "model" else None,
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=made,
        callbacks=[Timed()],
    )
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return clock.found(time.perf_counter() - begun) | {"losses": losses}


class Clock:
    """Seconds of each step, and MiB that steps after the first need above weights and optimizer."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.above = steps, [], None
        self.peak: Any = None

    def begin(self) -> None:
        """A step begins."""
        if len(self.seconds) == 1:  # the first step has made the optimizer's state
            self.peak = peak()
            self.above = self.peak.__enter__()
        self.begun = time.perf_counter()

    def end(self) -> None:
        """A step has ended."""
        self.seconds.append(time.perf_counter() - self.begun)
        if len(self.seconds) == self.steps:
            self.peak.__exit__(None, None, None)

    def found(self, whole: float) -> dict[str, Any]:
        """What was measured."""
        assert self.above is not None
        return {"step_seconds": self.seconds, "mib": self.above(), "whole_seconds": whole}


def measure(peer: str, **task: Any) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, peer, json.dumps(task), folder, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{peer} {task}:\n{done.stderr[-3000:]}")
        out: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return out


CASES = (
    {"reference": "stored", "checkpointing": False},
    {"reference": "model", "checkpointing": False},
    {"reference": "stored", "checkpointing": True},  # TRL's own default
)


def run() -> dict[str, Any]:
    """Every case at both vocabularies, TRL and loglik in turn, twice."""
    rows: list[dict[str, Any]] = []
    details = []
    for vocabulary in SHAPES:
        ours: dict[str, list[dict[str, Any]]] = {}
        for case in CASES:
            theirs = []
            for _ in range(2):
                theirs.append(measure("trl", vocabulary=vocabulary, **case))
                ours.setdefault(case["reference"], []).append(
                    measure("loglik", vocabulary=vocabulary, reference=case["reference"])
                )
            mine = ours[case["reference"]][-2:]
            rows.append(row(vocabulary, case, mine, theirs))
            details.append({"vocabulary": vocabulary, **case, "loglik": mine, "trl": theirs})
    import trl

    return {
        "what": f"DPO steps of {BATCH} pairs, {PROMPT}-token prompts, {RESPONSE}-token responses, 40M parameters, "
        f"float32, beside TRL {trl.__version__}",
        "rows": rows,
        "runs": details,
        "table": table(rows),
    }


def row(vocabulary: int, case: dict[str, Any], mine: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """Medians over all steps but the first of both runs, their ratios, and how far the loss curves are apart."""
    step = [statistics.median(s for r in runs for s in r["step_seconds"][1:]) for runs in (mine, theirs)]
    memory = [min(r["mib"] for r in runs) for runs in (mine, theirs)]
    apart = max(abs(a - b) for a, b in zip(mine[0]["losses"], theirs[0]["losses"], strict=True))
    return {
        "vocabulary": vocabulary,
        "reference": case["reference"],
        "TRL checkpoints activations": case["checkpointing"],
        "loglik s/step": round(step[0], 2),
        "TRL s/step": round(step[1], 2),
        "times faster": round(step[1] / step[0], 2),
        "loglik MiB": memory[0],
        "TRL MiB": memory[1],
        "memory ratio": round(memory[0] / memory[1], 3),
        "largest loss difference": f"{apart:.1e}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(str(r[name]) for name in names)} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    place = Path(sys.argv[3])
    result = {"loglik": run_loglik, "trl": run_trl}[sys.argv[1]](json.loads(sys.argv[2]), place)
    (place / "result.json").write_text(json.dumps(result))
