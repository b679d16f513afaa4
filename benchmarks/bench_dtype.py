"""How far half-precision weights move a value: float32 against bfloat16 and float16, same rows, same engine."""

from __future__ import annotations

import torch

import loglik
from loglik.models.stdlib_text import stdlib_documents

CHARACTERS = 1500


def run() -> dict[str, object]:
    texts = [d.text[:CHARACTERS] for d in stdlib_documents("held_out")]
    exact = loglik.score(loglik.load("tiny", device="cpu"), texts)
    rows = []
    for dtype in ("bfloat16", "float16"):
        half = loglik.score(loglik.load("tiny", dtype=dtype, device="cpu"), texts)
        moved = half.value - exact.value
        assert exact.per_unit is not None
        assert half.per_unit is not None
        tokens = (half.per_unit - exact.per_unit)[exact.mask].abs()
        relative = (moved / exact.value).abs()
        rows.append(
            {
                "dtype": dtype,
                "max_relative_row": float(f"{float(relative.max()):.2g}"),
                "mean_nats_per_token": float(f"{float(moved.sum() / exact.num_units.sum()):.2g}"),
                "p99_token_nats": float(f"{float(torch.quantile(tokens.float(), 0.99)):.2g}"),
                "max_token_nats": float(f"{float(tokens.max()):.2g}"),
            }
        )
    tokens_total = int(exact.num_units.sum())
    return {"what": f"{len(texts)} texts, {tokens_total:,} tokens, model tiny, difference to float32", "rows": rows}
