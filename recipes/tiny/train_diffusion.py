"""Train loglik.load("tiny-diffusion"): the masked-diffusion sibling of "tiny".

    make tiny-models            # resumes where it stopped

Same tokenizer, same documents and held-out modules, same width and depth as "tiny"; attention in both directions and
one more token, the mask. Trained by maximum likelihood on the bound (`MaskedDiffusionLM`, exact mask counts), first on
short blocks, then on long ones, so that short texts are no strangers to it.
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from train import curve_of, save_final, shuffled, token_stream

from loglik import load, score
from loglik.models.diffusion import BidirectionalLlama, BidirectionalLlamaConfig, MaskedDiffusionLM
from loglik.models.stdlib_text import HELD_OUT, stdlib_documents
from loglik.objectives import MaximumLikelihood
from loglik.training import TokenBlocks, TrainConfig, fit

EXAMPLE = "bisect.py"  # one short document whose bound the tests measure again: masks are a function of the text


@dataclass(frozen=True)
class Recipe:
    """The settings of the shipped model.

    Args:
        output: working directory of the run.
        install: where the finished model goes; nothing is installed if None.
        steps: optimizer steps of each phase.
        contexts: tokens per row in each phase.
        tokens_per_step: tokens per optimizer step.
        learning_rate: peak.
        seed: of initialisation, data order and masks.
        evaluation_samples: draws per window when the held-out bound is measured.
    """

    output: Path = Path("runs/tiny-diffusion")
    install: Path | None = None
    steps: tuple[int, ...] = (600, 2000)
    contexts: tuple[int, ...] = (64, 512)
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    seed: int = 0
    evaluation_samples: int = 32


def main(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    causal: Any = load("tiny", device="cpu")
    tokenizer = causal.tokenizer
    documents = shuffled(list(stdlib_documents("train")), recipe.seed)
    streams = {
        "train": token_stream(tokenizer, documents),
        "held_out": token_stream(tokenizer, list(stdlib_documents("held_out"))),
    }
    like = causal.model.config
    config = BidirectionalLlamaConfig(
        vocab_size=len(tokenizer) + 1,
        mask_token_id=len(tokenizer),
        hidden_size=like.hidden_size,
        intermediate_size=like.intermediate_size,
        num_hidden_layers=like.num_hidden_layers,
        num_attention_heads=like.num_attention_heads,
        num_key_value_heads=like.num_key_value_heads,
        max_position_embeddings=max(recipe.contexts),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = MaskedDiffusionLM(BidirectionalLlama(config), tokenizer, num_samples=1)
    seconds = []
    for phase, (steps, context) in enumerate(zip(recipe.steps, recipe.contexts, strict=True)):
        output = recipe.output / f"phase{phase + 1}"
        done = output / "done.json"
        if done.exists():
            model = MaskedDiffusionLM(BidirectionalLlama.from_pretrained(output), tokenizer, num_samples=1)
        else:
            last = phase == len(recipe.steps) - 1
            settings = TrainConfig(
                steps=steps,
                batch_size=recipe.tokens_per_step // context,
                learning_rate=recipe.learning_rate,
                schedule="linear" if last else "constant",
                warmup_steps=100 if phase == 0 else 20,
                weight_decay=0.1,
                seed=recipe.seed + phase,
                save_every=100,
                eval_every=250,
            )
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
    texts = [document.text for document in stdlib_documents("held_out")]
    shipped = load(final, device="cpu", num_samples=recipe.evaluation_samples)
    bound = score(shipped, texts, unit="byte", overflow="window").total().bits_per_byte()
    exact = score(causal, texts, unit="byte", overflow="window").total().bits_per_byte()
    document = next(d for d in stdlib_documents("held_out") if d.name == EXAMPLE)
    one = score(shipped, [document.text], unit="byte", overflow="window").bits_per_byte()
    record = {
        "recipe": {k: v for k, v in asdict(recipe).items() if not isinstance(v, Path) and v is not None},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "documents": len(documents),
        "held_out_modules": list(HELD_OUT),
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "epochs": round(sum(recipe.steps) * recipe.tokens_per_step / len(streams["train"]), 3),
        "minutes": [round(s / 60, 1) for s in seconds],
        "held_out_bits_per_byte": bound.item(),
        "standard_error": float(bound.stderr) if bound.stderr is not None else None,
        "tiny_bits_per_byte": exact.item(),
        "example": {"document": EXAMPLE, "bits_per_byte": one.item()},
        "curve": curve_of([recipe.output / f"phase{number + 1}" for number in range(len(recipe.steps))]),
    }
    (recipe.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    if recipe.install is not None:
        recipe.install.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(final / name, recipe.install / name)
        here = Path(__file__).parent
        shutil.copyfile(recipe.output / "record.json", here / "record_diffusion.json")
        (here.parents[1] / "docs" / "_tiny_diffusion_record.md").write_text(describe(record), encoding="utf-8")


def describe(record: dict[str, Any]) -> str:
    """The record as the documentation shows it."""
    recipe = record["recipe"]
    measured = [point for point in record["curve"] if "validation" in point and "loss" in point]
    lines = [
        f"- {record['parameters']:,} parameters (the layout of `tiny`, attention in both directions, one token more), "
        f"context {max(recipe['contexts']):,}, stored in bfloat16.",
        f"- Data as for `tiny`: {record['tokens']['train']:,} tokens; {record['tokens']['held_out']:,} held out.",
        f"- {sum(recipe['steps']):,} steps of {recipe['tokens_per_step']:,} tokens in blocks of "
        f"{' and '.join(map(str, recipe['contexts']))}, {record['epochs']:.2f} epochs, {sum(record['minutes']):.0f} "
        "minutes (since the last interruption of each phase).",
        f"- Held-out bits per byte, at most: **{record['held_out_bits_per_byte']:.4f}** ± "
        f"{record['standard_error']:.4f} ({recipe['evaluation_samples']} masks per window; an upper bound). `tiny`, "
        f"exactly, in windows twice as long: {record['tiny_bits_per_byte']:.4f}.",
        "",
        "| phase | step | training bound (nats/token) | held-out bound (nats/token) |",
        "|---|---|---|---|",
        *(f"| {p['phase']} | {p['step']} | {p['loss']:.3f} | {p['validation']:.3f} |" for p in measured),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Recipe))
