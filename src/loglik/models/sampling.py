"""Ancestral sampling from anything that gives the distribution of the next token."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from loglik.models.batch import TokenBatch

__all__ = ["NextToken", "ancestral_samples", "bos_prompt"]


class NextToken(Protocol):
    """A model that can be sampled token by token."""

    tokenizer: Any

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) normalised log-probabilities of the token after each row of `prefix`, nats."""


@torch.no_grad()
def ancestral_samples(
    model: NextToken,
    n: int,
    *,
    prompt: TokenBatch | None = None,
    generator: torch.Generator | None = None,
    max_tokens: int = 64,
    context: int | None = None,
) -> TokenBatch:
    """Ancestral samples of the model's own distribution: `n` per prompt row, each ended by EOS or `max_tokens`.

    No temperature, no truncation: the sampled distribution is the one that `log_prob` scores. The completion (EOS
    included) is scored in the returned batch.

    Args:
        model: gives the distributions; its tokenizer names BOS and EOS.
        n: samples per prompt row.
        prompt: rows to continue; one row of BOS by default.
        generator: of the random numbers, on the CPU.
        max_tokens: tokens per sample at most, EOS included.
        context: how many tokens before the next one the model looks at, where that is limited; at least 1.

    Raises:
        ValueError: without a prompt, if the tokenizer has no BOS token.
    """
    prompt = bos_prompt(model.tokenizer) if prompt is None else prompt
    rows = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True) for _ in range(n)]
    starts = [len(row) for row in rows]
    eos = getattr(model.tokenizer, "eos_token_id", None)
    live = list(range(len(rows)))
    for _ in range(max_tokens):
        if not live:
            break
        seen = [rows[i] if context is None else rows[i][-context:] for i in live]
        batch = TokenBatch.from_lists(
            seen, starts=[min(starts[i], len(row)) for i, row in zip(live, seen, strict=True)]
        )
        probs = model.next_log_probs(batch).exp().cpu()
        drawn = torch.multinomial(probs, 1, generator=generator).flatten().tolist()
        for i, token in zip(live, drawn, strict=True):
            rows[i].append(token)
        live = [i for i, token in zip(live, drawn, strict=True) if token != eos]
    return TokenBatch.from_lists(rows, starts=starts)


def bos_prompt(tokenizer: Any) -> TokenBatch:
    """One row of BOS.

    Raises:
        ValueError: if the tokenizer has none.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise ValueError("sampling without a prompt needs a tokenizer with a BOS token; give a prompt")
    return TokenBatch.from_lists([[bos]])
