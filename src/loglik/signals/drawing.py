"""Drawing answers: prompts as tokens, greedy decodes and samples whose random numbers belong to their prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.encode import TextEncoder, check_text
from loglik.models.protocol import ChainRule, Sampler, require
from loglik.models.sampling import ancestral_samples

__all__ = [
    "as_text",
    "completion_ids",
    "draw_samples",
    "first_line",
    "greedy_completions",
    "greedy_texts",
    "prompt_tokens",
    "require_room",
    "sample_texts",
]


@torch.no_grad()
def greedy_completions(model: ChainRule, prompt: TokenBatch, *, max_tokens: int = 64) -> TokenBatch:
    """The likeliest token at each step until EOS or `max_tokens`; the completion (EOS included) is scored.

    Args:
        model: gives the next-token distributions; its tokenizer names EOS.
        prompt: B rows to continue.
        max_tokens: tokens of a completion at most.

    Raises:
        RowError: for a prompt after which the model gives NaN.
    """
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    rows = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True)]
    starts = [len(row) for row in rows]
    live = list(range(len(rows)))
    for _ in range(max_tokens):
        if not live:
            break
        seen = TokenBatch.from_lists([rows[i] for i in live], starts=[starts[i] for i in live])
        best = model.next_log_probs(seen).max(1)
        broken = best.values.isnan().nonzero().flatten()
        if len(broken):
            raise RowError("the model gives NaN after it: mend the weights", row=f"prompt {live[int(broken[0])]}")
        tokens = best.indices.tolist()
        for i, token in zip(live, tokens, strict=True):
            rows[i].append(token)
        live = [i for i, token in zip(live, tokens, strict=True) if token != eos]
    return TokenBatch.from_lists(rows, starts=starts)


@torch.no_grad()
def greedy_texts(model: Any, prompts: Sequence[str], *, max_tokens: int = 64) -> tuple[str, ...]:
    """The likeliest continuation of each prompt, token by token, as text.

    Args:
        model: a text model with next-token distributions; its tokenizer names EOS.
        prompts: N texts.
        max_tokens: tokens of a continuation at most, EOS included.

    Raises:
        InputError: for no prompts, a model without next-token distributions or tokenizer, or max_tokens below 1.
        RowError: for a prompt that is empty or too long, or after which the model gives NaN.
    """
    chain = require(model, ChainRule, "greedy decoding")  # type: ignore[type-abstract]
    batch = _checked_prompts(model, prompts, max_tokens)
    found = completion_ids(greedy_completions(chain, batch, max_tokens=max_tokens))
    return tuple(as_text(model.tokenizer, ids) for ids in found)


@torch.no_grad()
def sample_texts(
    model: Any, prompts: Sequence[str], *, num_samples: int, max_tokens: int = 64, seed: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Continuations of each prompt, drawn from the model at temperature 1, as texts; they may repeat.

    Args:
        model: a text model that samples, or gives next-token distributions.
        prompts: N texts.
        num_samples: per prompt, at least 1.
        max_tokens: tokens of a sample at most, EOS included.
        seed: the samples of a prompt depend on it and on the prompt alone.

    Raises:
        InputError: for no prompts, options out of range, or a model without a sampler or tokenizer.
        RowError: for a prompt that is empty or too long.
    """
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    batch = _checked_prompts(model, prompts, max_tokens)
    heads = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    drawn = (completion_ids(draw_samples(model, head, num_samples, max_tokens, seed)) for head in heads)
    return tuple(tuple(as_text(model.tokenizer, ids) for ids in own) for own in drawn)


def prompt_tokens(model: Any, prompts: Sequence[str]) -> TokenBatch:
    """Prompts as rows of tokens to continue, with the special tokens that the tokenizer puts before a text.

    Raises:
        InputError: for no prompts, one string, or a model without a tokenizer.
        RowError: for a prompt that is no Unicode, or an empty one where the tokenizer has no BOS.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts must be several texts, at least one, and not one string; give [prompt]")
    tokenizer = getattr(model, "tokenizer", None)
    encoder = TextEncoder(tokenizer, layout=model.layout if tokenizer is not None else "causal")
    assert tokenizer is not None  # the encoder has refused it
    rows = []
    for number, text in enumerate(prompts):
        try:
            check_text(text, "prompt")
        except RowError as error:
            raise error.at(f"prompt {number}") from None
        whole: list[int] = tokenizer(text, add_special_tokens=model.layout == "seq2seq")["input_ids"]
        if model.layout != "seq2seq" and (encoder.adds_bos or not whole):
            bos = tokenizer.bos_token_id
            if bos is None:
                raise RowError("is empty and the tokenizer has no BOS: give a text", row=f"prompt {number}")
            whole = whole if whole[:1] == [bos] else [bos, *whole]
        rows.append(whole)
    return TokenBatch.from_lists(rows, starts=[len(row) for row in rows])


def as_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text; as numbers where there is nothing to decode them."""
    if hasattr(tokenizer, "decode"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return " ".join(map(str, ids))


def first_line(text: str) -> str:
    """What stands before the first line break, without white space around it: an answer of a model that runs on."""
    return text.strip().partition("\n")[0].strip()


def completion_ids(batch: TokenBatch) -> list[list[int]]:
    """The scored tokens of each row."""
    scored = batch.scored_mask & batch.attention_mask
    return [ids[own].tolist() for ids, own in zip(batch.ids, scored, strict=True)]


def draw_samples(model: Any, head: list[int], count: int, max_tokens: int, seed: int) -> TokenBatch:
    """`count` samples of one prompt (token ids), from random numbers that belong to it.

    Raises:
        InputError: for a model that gives neither samples nor next-token distributions.
    """
    name = hashlib.sha256(repr((seed, head)).encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(name, "big") >> 1)
    prompt = TokenBatch.from_lists([head], starts=[len(head)])
    if isinstance(model, Sampler):
        return model.sample(count, prompt=prompt, generator=generator, max_tokens=max_tokens)
    require(model, ChainRule, "sampling without a sampler")  # type: ignore[type-abstract]
    return ancestral_samples(model, count, prompt=prompt, generator=generator, max_tokens=max_tokens)


def require_room(model: Any, heads: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Refuse prompts that are empty, or leave no room for `max_tokens` in the model's context.

    Raises:
        InputError: for no prompts.
        RowError: naming the prompt.
    """
    if not len(heads):
        raise InputError("there is no prompt: give at least one")
    for number, head in enumerate(heads):
        if not head:
            raise RowError("is empty: give BOS or a text", row=f"prompt {number}")
    limit = getattr(model, "max_length", None)
    if limit is None or getattr(model, "layout", None) == "seq2seq":
        return
    longest = max(range(len(heads)), key=lambda i: len(heads[i]))
    if len(heads[longest]) + max_tokens > limit:
        raise RowError(
            f"has {len(heads[longest])} tokens, and {max_tokens} more do not fit into the model's context of {limit}: "
            "shorten it or lower max_tokens",
            row=f"prompt {longest}",
        )


def _checked_prompts(model: Any, prompts: Sequence[str], max_tokens: int) -> TokenBatch:
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    batch = prompt_tokens(model, prompts)
    require_room(
        model, [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)], max_tokens
    )
    return batch
