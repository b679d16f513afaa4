"""Scoring unrelated prompt-completion pairs: loglik against two plain transformers loops with the same weights."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loglik
from loglik.models.load import embedded_directory
from loglik.models.stdlib_text import stdlib_documents

PAIRS, REPEATS = 200, 3


def pairs() -> list[tuple[str, str]]:
    """Passages of 16 to 900 characters of the held-out modules, cut at a random place."""
    rng = random.Random(0)
    text = "\n".join(document.text for document in stdlib_documents("held_out"))
    out = []
    for _ in range(PAIRS):
        begin, length = rng.randrange(len(text) - 1000), rng.randrange(16, 900)
        cut = begin + max(4, int(length * rng.uniform(0.3, 0.8)))
        out.append((text[begin:cut], text[cut : begin + length + 8]))
    return out


def one_by_one(model: torch.nn.Module, rows: list[tuple[list[int], int]]) -> list[float]:
    out = []
    with torch.inference_mode():
        for ids, start in rows:
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            out.append(float(logp[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum()))
    return out


def padded(model: torch.nn.Module, rows: list[tuple[list[int], int]]) -> list[float]:
    """Batches of 16 in input order, padded on the right with an attention mask, full logits: the usual loop."""
    out = []
    with torch.inference_mode():
        for begin in range(0, len(rows), 16):
            part = rows[begin : begin + 16]
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([r + [0] * (width - len(r)) for r, _ in part])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in part])
            logp = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
            picked = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            out += [float(picked[i, start - 1 : len(r) - 1].sum()) for i, (r, start) in enumerate(part)]
    return out


def best(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    times, values = [], []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        values = work()
        times.append(time.perf_counter() - begun)
    return min(times), values


def run() -> dict[str, object]:
    path = embedded_directory("tiny")
    work = pairs()
    ours = loglik.load("tiny", device="cpu")
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    # The peers are given loglik's boundary, so that all three do the same work.
    from loglik.models.encode import TextEncoder

    encoder = TextEncoder(tokenizer, layout="causal")
    encoded = [encoder.encode(prompt, completion) for prompt, completion in work]
    rows = [([*e.prefix, *e.content], e.start + len(e.prefix)) for e in encoded]
    own, values = best(lambda: loglik.score(ours, work).value.tolist())
    table = [{"method": "loglik.score, from text", "seconds": round(own, 3), "ratio": 1.0, "max_difference_nats": 0.0}]
    for name, loop in (("transformers, one row at a time", one_by_one), ("transformers, padded batches of 16", padded)):
        seconds, theirs = best(lambda loop=loop: loop(peer, rows))
        difference = max(abs(a - b) for a, b in zip(values, theirs, strict=True))
        table.append(
            {
                "method": f"{name}, from tokens",
                "seconds": round(seconds, 3),
                "ratio": round(seconds / own, 2),
                "max_difference_nats": float(f"{difference:.2g}"),
            }
        )
    tokens = sum(len(ids) for ids, _ in rows)
    return {"what": f"{PAIRS} pairs, {tokens:,} tokens, model tiny, float32, best of {REPEATS}", "rows": table}
