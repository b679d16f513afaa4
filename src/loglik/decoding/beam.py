"""Beam search on the sum of log-probabilities, for anything with next-token distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require

__all__ = ["Beams", "beam_search"]


@dataclass(frozen=True, slots=True, eq=False)
class Beams:
    """What a beam search ended with, best first within each prompt.

    Args:
        sequences: N rows of prompt and completion; the completions are scored.
        log_prob: (N,) log-likelihoods of the completions, with per-token terms, nats.
        scores: (N,) what they were ranked by.
        groups: (N,) long, row of the prompt each belongs to, ascending.
    """

    sequences: TokenBatch
    log_prob: LogLikelihood
    scores: Tensor
    groups: Tensor

    def best(self) -> list[list[int]]:
        """Completion (token ids, EOS included) with the highest score of each prompt."""
        rows = [0, *((self.groups.diff() > 0).nonzero().flatten() + 1).tolist()] if len(self.groups) else []
        return [self.sequences.ids[row][self.sequences.scored_mask[row]].tolist() for row in rows]


class _Hypothesis(NamedTuple):
    tokens: tuple[int, ...]
    terms: tuple[float, ...]
    total: float  # sum of terms, nats
    finished: bool

    def score(self, length_penalty: float) -> float:
        return self.total / len(self.tokens) ** length_penalty if self.tokens else 0.0


@torch.no_grad()
def beam_search(
    model: ChainRule,
    prompt: TokenBatch,
    *,
    width: int,
    max_tokens: int,
    length_penalty: float = 0.0,
    eos_id: int | None = None,
) -> Beams:
    r"""The likeliest completions that a search of limited width finds.

    .. math:: \hat y = \arg\max_y \log p(y \mid x) / |y|^{\lambda}

    At each step every unfinished hypothesis is extended by every token, and the best `width` of extensions and
    finished hypotheses together stay. A hypothesis that ends with EOS keeps its place and its score; the search ends
    when all have ended or at `max_tokens`, where those without EOS count as they are. Width 1 is greedy decoding; a
    width of at least :math:`V^T` is exhaustive. Sums are float64. Each step is one forward pass over whole prefixes,
    `width` rows per prompt, without a cache of keys and values.

    Where sequences may end early this differs from transformers' ``generate(num_beams=...)``: there, finished ones
    leave the beam and make room for others. With outputs of one length both give the same.

    Args:
        model: gives the next-token distributions.
        prompt: B rows to continue.
        width: hypotheses kept per prompt.
        max_tokens: tokens of a completion at most, EOS included.
        length_penalty: :math:`\lambda`; 0 ranks by the sum of log-probabilities, 1 by their mean per token.
        eos_id: token that ends a sequence; None: that of the model's tokenizer, where it has one. -1: none.

    Returns:
        At most `width` hypotheses per prompt: fewer where there are not so many sequences of positive probability.

    Raises:
        InputError: for a width or max_tokens below 1, a length_penalty that is not finite, a model without next-token
            distributions, or a prompt that leaves the context too short.
        RowError: for a prompt after which the model gives NaN.

    Source: arXiv 2404.12358 decodes a policy of direct preference optimisation so: search by sum of log-probabilities
    is then search by partial return and value.
    """
    model = require(model, ChainRule, "beam search")  # type: ignore[type-abstract]
    if width < 1 or max_tokens < 1:
        raise InputError(f"width and max_tokens must be at least 1, got {width} and {max_tokens}")
    if not math.isfinite(length_penalty):
        raise InputError(f"length_penalty must be finite, got {length_penalty}")
    if eos_id is None:
        eos_id = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    prompts = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True)]
    _require_context(model, prompts, max_tokens)
    beams = [[_Hypothesis((), (), 0.0, False)] for _ in prompts]
    for _ in range(max_tokens):
        live = [(row, h) for row, beam in enumerate(beams) for h in beam if not h.finished]
        if not live:
            break
        nexts = model.next_log_probs(
            TokenBatch.from_lists(
                [prompts[row] + list(h.tokens) for row, h in live], starts=[len(prompts[row]) for row, _ in live]
            )
        ).double()
        broken = nexts.isnan().any(1).nonzero().flatten()
        if len(broken):
            row, h = live[int(broken[0])]
            raise RowError(f"the model gives NaN after {len(h.tokens)} tokens", row=f"prompt {row}")
        begin = 0
        for row, beam in enumerate(beams):
            open_ = [h for h in beam if not h.finished]
            ends = begin + len(open_)
            grown = _extended(open_, nexts[begin:ends], width, length_penalty, eos_id)
            kept = [h for h in beam if h.finished] + grown
            beams[row] = sorted(kept, key=lambda h: -h.score(length_penalty))[:width]
            begin = ends
    return _collected(prompts, beams, length_penalty)


def _extended(
    beam: list[_Hypothesis], nexts: Tensor, width: int, length_penalty: float, eos_id: int | None
) -> list[_Hypothesis]:
    """The best `width` extensions of hypotheses of one length by one token, given (K, V) log-probabilities."""
    if not beam:
        return []
    totals = nexts + torch.tensor([h.total for h in beam], dtype=nexts.dtype, device=nexts.device)[:, None]
    # All have one length, so that the best by sum are the best by score.
    best = totals.flatten().topk(min(width, totals.numel()))
    extended = []
    terms = nexts.flatten()[best.indices].tolist()
    for total, term, place in zip(best.values.tolist(), terms, best.indices.tolist(), strict=True):
        if total == -math.inf:
            break
        h, token = beam[place // nexts.shape[1]], place % nexts.shape[1]
        extended.append(_Hypothesis((*h.tokens, token), (*h.terms, term), total, token == eos_id))
    return extended


def _collected(prompts: list[list[int]], beams: list[list[_Hypothesis]], length_penalty: float) -> Beams:
    found = [(row, h) for row, beam in enumerate(beams) for h in beam]
    sequences = TokenBatch.from_lists(
        [prompts[row] + list(h.tokens) for row, h in found], starts=[len(prompts[row]) for row, _ in found]
    )
    terms = torch.zeros(sequences.ids.shape, dtype=torch.float64)
    terms[sequences.scored_mask] = torch.tensor([t for _, h in found for t in h.terms], dtype=torch.float64)
    return Beams(
        sequences,
        LogLikelihood.from_per_unit(terms, sequences.scored_mask),
        torch.tensor([h.score(length_penalty) for _, h in found], dtype=torch.float64),
        torch.tensor([row for row, _ in found], dtype=torch.long),
    )


def _require_context(model: ChainRule, prompts: list[list[int]], max_tokens: int) -> None:
    """A causal model reads the prompt and all but the last token; encoder-decoders count source and target apart."""
    limit = getattr(model, "max_length", None)
    if limit is None or getattr(model, "layout", None) != "causal":
        return
    for row, tokens in enumerate(prompts):
        if len(tokens) + max_tokens - 1 > limit:
            raise InputError(
                f"prompt {row} has {len(tokens)} tokens, and {max_tokens} more do not fit into the model's context of "
                f"{limit}: shorten it or lower max_tokens"
            )
