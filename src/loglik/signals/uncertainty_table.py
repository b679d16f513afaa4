"""Decode answers to prompts, draw more, score all, and measure uncertainty: a table with one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, Model, require
from loglik.signals.drawing import (
    as_text,
    completion_ids,
    draw_samples,
    greedy_completions,
    prompt_tokens,
    require_room,
)
from loglik.signals.equivalence import Equivalence, exact_match, meanings
from loglik.signals.sequence_uncertainty import (
    discrete_semantic_entropy,
    greedy_nll,
    length_normalised_log_prob,
    maximum_sequence_probability,
    mode_nll,
    num_semantic_sets,
    predictive_entropy,
    semantic_entropy,
)

__all__ = ["UncertaintyTable", "sequence_uncertainty"]

Decode = Literal["greedy", "search", "sample"]


@dataclass(frozen=True, slots=True)
class UncertaintyTable:
    """Uncertainty about the outputs to Q prompts.

    Args:
        prompts: as text.
        outputs: the outputs that are judged, as text.
        decode: where they come from: ``greedy``, ``search``, or the likeliest ``sample`` of a model that gives no
            next-token probabilities.
        ended: (Q,) bool, whether the output ends with EOS and not at the limit. What is cut counts as an outcome of
            the model cut there.
        likelihood: (Q,) of the outputs.
        measures: by name, (Q,) each: ``g_nll``, ``sequence_probability``, ``mode_nll`` (of output and samples) and,
            with samples, ``predictive_entropy``, ``length_normalised_entropy``, ``semantic_entropy`` and
            ``discrete_semantic_entropy``.
        samples: N texts per prompt.
        sample_likelihood: (Q N,) of the samples, those of a prompt together; None without samples.
        sample_ended: Q shares of samples that end with EOS.
        num_semantic_sets: Q numbers of meanings.
    """

    prompts: tuple[str, ...]
    outputs: tuple[str, ...]
    decode: Decode
    ended: Tensor
    likelihood: LogLikelihood
    measures: Mapping[str, Measurement]
    samples: tuple[tuple[str, ...], ...] = ()
    sample_likelihood: LogLikelihood | None = None
    sample_ended: tuple[float, ...] = ()
    num_semantic_sets: tuple[int, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row of plain values per prompt, for JSON and tables; None stands for what has no value."""
        columns: dict[str, Sequence[Any]] = {
            "prompt": self.prompts,
            "output": self.outputs,
            "decode": [self.decode] * len(self.outputs),
            "ended": self.ended.tolist(),
            "num_tokens": self.likelihood.num_units.tolist(),
            "log_prob": self.likelihood.value.tolist(),
            "log_prob_per_token": length_normalised_log_prob(self.likelihood).value.tolist(),
            "kind": [str(self.likelihood.kind)] * len(self.outputs),
        }
        for name, measured in self.measures.items():
            columns[name] = measured.value.tolist()
            if measured.stderr is not None:
                columns[f"{name}_stderr"] = [s if math.isfinite(s) else None for s in measured.stderr.tolist()]
        if self.samples:
            columns |= {
                "num_semantic_sets": self.num_semantic_sets,
                "sample_ended": self.sample_ended,
                "samples": [list(texts) for texts in self.samples],
            }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()
def sequence_uncertainty(
    model: Any,
    prompts: Sequence[str] | TokenBatch,
    *,
    num_samples: int = 10,
    max_tokens: int = 64,
    equivalence: Equivalence = exact_match,
    search: Callable[[TokenBatch], Sequence[Sequence[int]]] | None = None,
    seed: int = 0,
) -> UncertaintyTable:
    """Decode and sample answers to prompts, and measure how unsure the model is of each.

    Args:
        model: anything with `log_prob` and `next_log_probs` (decoded greedily) or `sample`; its tokenizer names EOS.
        prompts: Q texts, or rows of tokens.
        num_samples: N per prompt, at temperature 1; 0 measures the decode alone.
        max_tokens: tokens of an output at most, EOS included.
        equivalence: which answers mean the same.
        search: from the Q prompts to the Q completions (token ids with their EOS) to judge in place of the greedy
            ones, such as ``lambda prompt: beam_search(model, prompt, width=4, max_tokens=64).best()``.
        seed: of the samples; those of a prompt depend on it and on the prompt alone.

    Raises:
        InputError: for options out of range, or a model that can neither be decoded nor sampled.
        RowError: for a prompt that is empty or too long, or after which the model gives NaN.

    Source: arXiv 2412.15176, 2302.09664.
    """
    require(model, Model, "sequence uncertainty")  # type: ignore[type-abstract]
    if num_samples < 0 or max_tokens < 1:
        raise InputError(f"num_samples must be at least 0 and max_tokens at least 1, got {num_samples}, {max_tokens}")
    batch = prompts if isinstance(prompts, TokenBatch) else prompt_tokens(model, prompts)
    heads = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    require_room(model, heads, max_tokens)
    tokenizer = getattr(model, "tokenizer", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    drawn = [draw_samples(model, head, num_samples, max_tokens, seed) for head in heads] if num_samples else []
    scored = [model.log_prob(rows).detach() for rows in drawn]
    found = [completion_ids(rows) for rows in drawn]
    decode: Decode = "search" if search is not None else "greedy" if isinstance(model, ChainRule) else "sample"
    if search is not None:
        chosen = [list(ids) for ids in search(batch)]
        if len(chosen) != len(heads) or not all(chosen):
            raise InputError(f"search must give a completion that is not empty for each of the {len(heads)} prompts")
    elif decode == "greedy":
        chosen = completion_ids(greedy_completions(model, batch, max_tokens=max_tokens))
    elif drawn:
        chosen = [own[int(values.value.argmax())] for own, values in zip(found, scored, strict=True)]
    else:
        raise InputError(f"{type(model).__name__} cannot be decoded greedily: set num_samples above 0, or give search")
    best = model.log_prob(
        TokenBatch.from_lists([a + b for a, b in zip(heads, chosen, strict=True)], starts=[len(a) for a in heads])
    ).detach()
    shown = [as_text(tokenizer, head) for head in heads] if isinstance(prompts, TokenBatch) else list(prompts)
    question = torch.arange(len(heads))
    measures = {"g_nll": greedy_nll(best), "sequence_probability": maximum_sequence_probability(best)}
    extra: dict[str, Any] = {}
    everything, owners = best, question
    if drawn:
        likelihood, owner = LogLikelihood.cat(scored), question.repeat_interleave(num_samples)
        everything, owners = LogLikelihood.cat([best, likelihood]), torch.cat([question, owner])
        answers = [[as_text(tokenizer, ids) for ids in own] for own in found]
        meaning = [m for text, own in zip(shown, answers, strict=True) for m in meanings(equivalence, text, own)]
        sequence = [number for own in found for number in _numbered([tuple(ids) for ids in own])]
        for normalised in (False, True):
            entropy = predictive_entropy(likelihood, owner, length_normalised=normalised)
            measures[entropy.name] = entropy
        measures["semantic_entropy"] = semantic_entropy(likelihood, owner, meaning, sequence)
        measures["discrete_semantic_entropy"] = discrete_semantic_entropy(owner, meaning)
        extra = {
            "samples": tuple(map(tuple, answers)),
            "sample_likelihood": likelihood,
            "sample_ended": tuple(sum(ids[-1] == eos for ids in own) / num_samples for own in found),
            "num_semantic_sets": tuple(num_semantic_sets(owner, meaning).tolist()),
        }
    measures["mode_nll"] = mode_nll(everything, owners)
    return UncertaintyTable(
        tuple(shown),
        tuple(as_text(tokenizer, ids) for ids in chosen),
        decode,
        torch.tensor([ids[-1] == eos for ids in chosen]),
        best,
        measures,
        **extra,
    )


def _numbered(items: Sequence[Hashable]) -> list[int]:
    """Equal items get equal numbers, in the order in which they appear."""
    found: dict[Hashable, int] = {}
    return [found.setdefault(item, len(found)) for item in items]
