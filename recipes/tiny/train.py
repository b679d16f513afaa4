"""Train loglik.load("tiny"): a small Llama-shaped causal LM on the standard library's own text.

    make tiny-models            # about an hour on two idle cores; resumes where it stopped

Two phases of one maximum-likelihood run: short contexts at a constant learning rate, then the full context while the
learning rate decays to zero. Everything is seeded; data, steps, time and the curve are written to ``record.json``.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loglik.models.causal import CausalLM
from loglik.models.load import load
from loglik.models.stdlib_text import HELD_OUT, Document, stdlib_documents
from loglik.objectives import MaximumLikelihood
from loglik.scoring.score import score
from loglik.training import TokenBlocks, TrainConfig, fit

SPECIAL = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """The settings of the shipped model.

    Args:
        output: working directory of the run.
        install: where the finished model goes; nothing is installed if None.
        vocabulary: tokens of the BPE vocabulary.
        steps: optimizer steps of the two phases.
        contexts: tokens per row in the two phases.
        tokens_per_step: tokens per optimizer step.
        learning_rate: peak.
        seed: of initialisation and data order.
    """

    output: Path = Path("runs/tiny")
    install: Path | None = None
    vocabulary: int = 4096
    steps: tuple[int, int] = (2000, 600)
    contexts: tuple[int, int] = (512, 1024)
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    seed: int = 0


def train_tokenizer(documents: list[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string has a tokenisation, and every token a byte string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL,
        eos_token=SPECIAL,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """All documents as one stream, each after one separator."""
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([tokenizer.bos_token_id, *ids], dtype=np.int32) for ids in encoded])


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    """A seeded order, so that neighbouring documents are unrelated."""
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def main(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    train = shuffled(list(stdlib_documents("train")), recipe.seed)
    held_out = list(stdlib_documents("held_out"))
    recipe.output.mkdir(parents=True, exist_ok=True)
    vocabulary = recipe.output / "tokenizer"
    if not vocabulary.exists():
        train_tokenizer(train, recipe.vocabulary).save_pretrained(vocabulary)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(vocabulary)
    streams = {"train": token_stream(tokenizer, train), "held_out": token_stream(tokenizer, held_out)}
    sizes = {name: len(stream) for name, stream in streams.items()}
    print({"documents": len(train), "tokens": sizes}, flush=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(recipe.contexts),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = CausalLM(LlamaForCausalLM(config), tokenizer)
    seconds = []
    for phase, (steps, context) in enumerate(zip(recipe.steps, recipe.contexts, strict=True)):
        rows = recipe.tokens_per_step // context
        settings = TrainConfig(
            steps=steps,
            batch_size=rows,
            learning_rate=recipe.learning_rate,
            schedule="constant" if phase == 0 else "linear",
            warmup_steps=100 if phase == 0 else 20,
            weight_decay=0.1,
            seed=recipe.seed + phase,
            save_every=100,
            eval_every=250,
        )
        output = recipe.output / f"phase{phase + 1}"
        done = output / "done.json"
        if done.exists():
            model = CausalLM(LlamaForCausalLM.from_pretrained(output), tokenizer)
        else:
            result = fit(
                model,
                MaximumLikelihood(),
                TokenBlocks(streams["train"], context),
                settings,
                output=output,
                validation=TokenBlocks(streams["held_out"], context),
                resume=True,
            )
            done.write_text(json.dumps({"seconds": result.seconds, "validation": result.validation}))
        seconds.append(json.loads(done.read_text())["seconds"])
    final = save_final(model, recipe.output / "final")
    curve = curve_of([recipe.output / f"phase{phase}" for phase in (1, 2)])
    record = {
        "recipe": {k: v for k, v in asdict(recipe).items() if not isinstance(v, Path) and v is not None},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "documents": len(train),
        "characters": sum(len(d.text) for d in train),
        "corpus_sha256": hashlib.sha256("\0".join(d.name + "\0" + d.text for d in train).encode()).hexdigest(),
        "held_out_modules": list(HELD_OUT),
        "tokens": sizes,
        "epochs": round(sum(recipe.steps) * recipe.tokens_per_step / sizes["train"], 3),
        "minutes": [round(s / 60, 1) for s in seconds],
        "held_out_bits_per_byte": held_out_bits_per_byte(final),
        "curve": curve,
    }
    (recipe.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    if recipe.install is not None:
        recipe.install.mkdir(parents=True, exist_ok=True)
        names = (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
        for name in names:
            shutil.copyfile(final / name, recipe.install / name)
        here = Path(__file__).parent
        shutil.copyfile(recipe.output / "record.json", here / "record.json")
        (here.parents[1] / "docs" / "_tiny_record.md").write_text(describe(record), encoding="utf-8")


def save_final(model: Any, where: Path) -> Path:
    """The finished model in bfloat16, with its tokenizer."""
    model.model.to(torch.bfloat16).save_pretrained(where)
    model.tokenizer.save_pretrained(where)
    # The name that older versions of transformers know, too.
    settings_file = where / "tokenizer_config.json"
    settings_file.write_text(
        json.dumps(json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
        + "\n"
    )
    return where


def curve_of(phases: list[Path]) -> list[dict[str, Any]]:
    """Every fiftieth line of the logs of a run's phases."""
    return [
        {"phase": phase, **{k: line[k] for k in ("step", "loss", "validation") if k in line}}
        for phase, folder in enumerate(phases, start=1)
        for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        if line["step"] % 50 == 0
    ]


def describe(record: dict[str, Any]) -> str:
    """The record as the documentation shows it."""
    recipe, curve = record["recipe"], record["curve"]
    measured = [point for point in curve if "validation" in point]
    lines = [
        f"- {record['parameters']:,} parameters (Llama layout, {recipe['vocabulary']:,} BPE tokens, "
        f"context {max(recipe['contexts']):,}), stored in bfloat16.",
        f"- Data: {record['documents']:,} documents of Python {record['python']}'s standard library and help topics, "
        f"{record['characters']:,} characters, {record['tokens']['train']:,} tokens; "
        f"{record['tokens']['held_out']:,} tokens held out.",
        f"- {sum(recipe['steps']):,} steps of {recipe['tokens_per_step']:,} tokens, {record['epochs']:.2f} epochs, "
        f"{sum(record['minutes']):.0f} minutes.",
        f"- Held-out bits per byte of the shipped weights: **{record['held_out_bits_per_byte']:.4f}**.",
        "",
        "| phase | step | training loss (nats/token) | held-out loss (nats/token) |",
        "|---|---|---|---|",
        *(f"| {p['phase']} | {p['step']} | {p['loss']:.3f} | {p['validation']:.3f} |" for p in measured),
    ]
    return "\n".join(lines) + "\n"


def held_out_bits_per_byte(directory: Path) -> float:
    """Of the weights as they are shipped, in float32, with windows of half the context."""
    texts = [d.text for d in stdlib_documents("held_out")]
    return score(load(directory, device="cpu"), texts, unit="byte", overflow="window").total().bits_per_byte().item()


if __name__ == "__main__":
    main(tyro.cli(Recipe))
