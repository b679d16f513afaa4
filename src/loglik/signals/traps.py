r"""Copyright traps: sequences that stand nowhere else, put into a document many times, and found again in a model.

A publisher draws fictitious sequences of a chosen perplexity (`generate_traps`), keeps some of them unused
(`assign_repetitions`), puts the others into documents (`inject`) and asks of a suspect model whether it finds them
likelier than the unused ones (`trap_test`, `repetition_curve`). Chance alone decided which were used, so that members
and non-members differ in nothing else.

The score is `loglik.signals.membership.reference_score`, the log of the ratio of two perplexities. Removing duplicates
from the training data removes repeated traps; a model that shows none of them may still have seen the document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require
from loglik.models.sampling import bos_prompt
from loglik.signals.detection import DetectorReport, auroc, detector_report

__all__ = [
    "TrapTest",
    "Traps",
    "assign_repetitions",
    "generate_traps",
    "inject",
    "inject_tokens",
    "jaccard",
    "repetition_curve",
    "trap_test",
]

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)


@dataclass(frozen=True, slots=True)
class Traps:
    """N trap sequences of one length.

    Args:
        ids: tokens of each, without the prompt that they were drawn after.
        perplexity: (N,) under the model that drew them, at temperature 1, float64.
        bucket: (N,) which range of perplexity each belongs to; bucket b is (edges[b], edges[b + 1]].
        temperature: (N,) that each was drawn at.
        edges: of the buckets.
        drawn: sequences that were drawn for these.
    """

    ids: list[list[int]]
    perplexity: Tensor
    bucket: Tensor
    temperature: Tensor
    edges: tuple[float, ...]
    drawn: int

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def generate_traps(
    model: Any,
    length: int,
    *,
    per_bucket: int,
    edges: Sequence[float] = tuple(range(1, 102, 10)),
    temperatures: Sequence[float] = TEMPERATURES,
    max_similarity: float = 0.2,
    exclude: Sequence[int] | None = None,
    accept: Callable[[list[int]], bool] | None = None,
    prompt: TokenBatch | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    max_draws: int = 20_000,
) -> Traps:
    r"""Draw sequences at several temperatures until every range of perplexity has its number of them.

    .. math:: x_t \sim \operatorname{softmax}\bigl(\log p(\cdot \mid x_{<t}) / \tau\bigr), \qquad
              \mathrm{PPL}(x) = \exp\Bigl(-\frac1L \sum_t \log p(x_t \mid x_{<t})\Bigr)

    Args:
        model: the reference model, with next-token distributions.
        length: L, tokens of each sequence.
        per_bucket: sequences per range of perplexity.
        edges: rising perplexities between which the ranges lie.
        temperatures: :math:`\tau`, taken in turn; higher ones give higher perplexities.
        max_similarity: a sequence that shares a larger part of its tokens with an accepted one is dropped (`jaccard`);
            1 drops repeated sequences only.
        exclude: tokens that are never drawn; the tokenizer's special ones by default. The perplexity is that of the
            whole vocabulary all the same.
        accept: whether to keep a sequence, such as one that survives decoding and encoding.
        prompt: one row to draw after; BOS by default.
        generator: of the random numbers, on the CPU.
        batch_size: sequences per draw.
        max_draws: sequences after which to give up.

    Raises:
        InputError: for options out of range, a model without next-token distributions, or ranges that do not fill.

    Source: arXiv 2402.09363.
    """
    chain = require(model, ChainRule, "drawing traps at a temperature")  # type: ignore[type-abstract]
    counts = {"length": length, "per_bucket": per_bucket, "batch_size": batch_size, "max_draws": max_draws}
    _check_options(counts, edges, temperatures, max_similarity)
    tokenizer = getattr(model, "tokenizer", None)
    if prompt is None and getattr(tokenizer, "bos_token_id", None) is None:
        raise InputError("traps are drawn after BOS, and the model's tokenizer has none: give a prompt")
    prompt = bos_prompt(tokenizer) if prompt is None else prompt
    if len(prompt) != 1:
        raise InputError(f"traps are drawn after one prompt, got {len(prompt)} rows")
    start = prompt.ids[:, prompt.attention_mask[0]].cpu().expand(batch_size, -1)
    never = torch.tensor(list(getattr(tokenizer, "all_special_ids", ()) if exclude is None else exclude)).long()
    bounds = torch.tensor([float(edge) for edge in edges], dtype=torch.float64)
    kept: list[tuple[int, float, float, list[int]]] = []  # bucket, perplexity, temperature, tokens
    missing = [per_bucket] * (len(bounds) - 1)
    drawn = 0
    while any(missing):
        temperature = float(temperatures[drawn // batch_size % len(temperatures)])
        if drawn + batch_size > max_draws:
            bucket = next(b for b, count in enumerate(missing) if count)
            raise InputError(
                f"{drawn} draws left the perplexities from {edges[bucket]:g} to {edges[bucket + 1]:g} short of "
                f"{missing[bucket]} traps: allow more draws, other temperatures or more similar sequences"
            )
        ids, log_p = _draw(chain, start, length, temperature, never, generator)
        drawn += batch_size
        perplexities = (-log_p / length).exp()
        # (a, b]: a perplexity on an edge belongs to the range below it.
        for row, perplexity, bucket in zip(
            ids.tolist(), perplexities.tolist(), (torch.bucketize(perplexities, bounds) - 1).tolist(), strict=True
        ):
            if not 0 <= bucket < len(missing) or not missing[bucket] or (accept is not None and not accept(row)):
                continue
            if any(jaccard(row, other) > max_similarity or row == other for *_, other in kept):
                continue
            missing[bucket] -= 1
            kept.append((bucket, perplexity, temperature, row))
    kept.sort(key=lambda trap: trap[0])
    return Traps(
        [row for *_, row in kept],
        torch.tensor([perplexity for _, perplexity, _, _ in kept], dtype=torch.float64),
        torch.tensor([bucket for bucket, *_ in kept]),
        torch.tensor([temperature for _, _, temperature, _ in kept], dtype=torch.float64),
        tuple(float(edge) for edge in edges),
        drawn,
    )


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    r"""Shared part of two sets of tokens, :math:`|A \cap B| / |A \cup B|`; 1 for two empty ones."""
    first, second = set(a), set(b)
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def assign_repetitions(bucket: Tensor, repetitions: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """How often each trap is to be injected (N,), by lot within each bucket; 0 keeps it as an unused control.

    Args:
        bucket: (N,) of the traps.
        repetitions: R different numbers, 0 among them.
        generator: of the lot, on the CPU.

    Raises:
        InputError: for repetitions that are negative, repeated or without 0, or a bucket that they do not divide.

    Source: arXiv 2402.09363.
    """
    numbers = list(repetitions)
    if 0 not in numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0 or len(numbers) < 2:
        raise InputError(f"repetitions must be different, not negative, and 0 one of several, got {numbers}")
    out = torch.zeros(len(bucket), dtype=torch.long)
    for name in torch.unique(bucket).tolist():
        rows = (bucket == name).nonzero().flatten()
        if len(rows) % len(numbers):
            raise InputError(
                f"bucket {int(name)} has {len(rows)} traps, which {len(numbers)} numbers of repetitions do not divide"
            )
        lot = rows[torch.randperm(len(rows), generator=generator)]
        out[lot] = torch.tensor(numbers).repeat_interleave(len(rows) // len(numbers))
    return out


def inject(document: str, trap: str, times: int, *, generator: torch.Generator) -> tuple[str, list[int]]:
    """Put a trap into a document behind different spaces, drawn at random: never inside a word.

    Args:
        document: has at least `times` spaces; the paper takes documents of 5000 tokens and more, one trap each.
        trap: the sequence as text.
        times: copies.
        generator: of the places, on the CPU.

    Returns:
        The new document, and the character at which each copy begins.

    Raises:
        InputError: for an empty trap, less than one copy, or a document with too few spaces.

    Source: arXiv 2402.09363.
    """
    if not trap.strip():
        raise InputError("the trap is empty: there is nothing to inject")
    spaces = [place for place, character in enumerate(document) if character == " "]
    parts, starts, length, done = [], [], 0, 0
    for place in _places(len(spaces), times, "spaces", generator):
        piece = document[done : spaces[place] + 1]
        starts.append(length + len(piece))
        parts += [piece, trap, " "]
        length += len(piece) + len(trap) + 1
        done = spaces[place] + 1
    return "".join([*parts, document[done:]]), starts


def inject_tokens(
    document: Sequence[int], trap: Sequence[int], times: int, *, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The same with tokens, at different places between tokens: the new document and where each copy begins.

    Raises:
        InputError: for an empty trap, less than one copy, or a document with too few places.
    """
    if not len(trap):
        raise InputError("the trap is empty: there is nothing to inject")
    out: list[int] = []
    starts: list[int] = []
    done = 0
    for place in _places(len(document) + 1, times, "places", generator):
        out += document[done:place]
        starts.append(len(out))
        out += trap
        done = place
    return [*out, *document[done:]], starts


@dataclass(frozen=True, slots=True)
class TrapTest:
    """What the scores of injected traps say against those of unused ones.

    Args:
        auroc: probability that an injected trap scores above an unused one; 0.5 under the null hypothesis.
        p_value: of all injected traps together (Mann-Whitney, one-sided; exact for few scores without ties).
        p_values: (B,) of each injected trap alone, its rank among the unused ones; never below 1 / (m + 1).
    """

    auroc: float
    p_value: float
    p_values: Tensor


def trap_test(injected: Tensor, unused: Tensor) -> TrapTest:
    r"""Whether injected traps score higher than unused ones of the same generator, length and perplexity.

    .. math:: p_i = \frac{1 + \#\{j : u_j \ge s_i\}}{m + 1}

    Valid if chance decided which traps were injected (`assign_repetitions`): where the model has not seen the document,
    all scores are exchangeable and :math:`P(p_i \le u) \le u`.

    Args:
        injected: (B,) scores, higher for members, such as `reference_score`'s.
        unused: (m,) scores of traps that were never published.

    Raises:
        InputError: for no scores on one side, or scores that are NaN.

    Source: arXiv 2402.09363.
    """
    from scipy.stats import mannwhitneyu

    for name, scores in (("injected", injected), ("unused", unused)):
        if scores.dim() != 1 or not len(scores):
            raise InputError(f"{name} must be one or more scores, got shape {tuple(scores.shape)}")
    both = torch.cat([injected, unused])
    area = auroc(both, torch.arange(len(both)) < len(injected))
    at_least = (unused[None] >= injected[:, None]).sum(1)
    values = both.detach().cpu().double().numpy()
    together = mannwhitneyu(values[: len(injected)], values[len(injected) :], alternative="greater")
    return TrapTest(area, float(together.pvalue), (1 + at_least).double() / (len(unused) + 1))


def repetition_curve(
    scores: Tensor, repetitions: Tensor, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[int, DetectorReport]:
    """AUC against repetitions, for traps of one length.

    Look at the curve of the reference model's own `loss_score` too: it never saw a trap, so that anything but 0.5 says
    that injected and unused traps differ in more than membership.

    Args:
        scores: (N,) higher for members.
        repetitions: (N,) how often each trap was injected; 0 for the unused ones, which every point is held against.
        bootstrap: resamples behind the intervals.
        level: confidence of the intervals.
        seed: of the resamples.

    Returns:
        A report per number of repetitions above 0, rising.

    Raises:
        InputError: for shapes that differ, negative numbers, no unused traps or no injected ones.

    Source: arXiv 2402.09363.
    """
    if scores.dim() != 1 or scores.shape != repetitions.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(repetitions.shape)}"
        raise InputError(f"scores and repetitions must both have shape (N,), got {shapes}")
    if bool((repetitions < 0).any()):
        raise InputError("repetitions must not be negative: 0 stands for a trap that was never injected")
    unused = repetitions == 0
    if not bool(unused.any()) or bool(unused.all()):
        raise InputError("the curve needs injected traps and unused ones (0 repetitions): score both")
    out = {}
    for count in torch.unique(repetitions[~unused]).tolist():
        rows = unused | (repetitions == count)
        labels = repetitions[rows] > 0
        out[int(count)] = detector_report(scores[rows], labels, bootstrap=bootstrap, level=level, seed=seed)
    return out


def _draw(
    chain: ChainRule, ids: Tensor, length: int, temperature: float, never: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(n, L) sequences after prompts (n, P), and their log-probabilities (n,) at temperature 1 from the same tables."""
    before = ids.shape[1]
    total = torch.zeros(len(ids), dtype=torch.float64)
    for _ in range(length):
        real = torch.ones_like(ids, dtype=torch.bool)
        prefix = TokenBatch(ids, real, torch.zeros_like(real), torch.full((len(ids),), before))
        log_p = chain.next_log_probs(prefix).double().cpu()
        chances = (log_p / temperature).index_fill(1, never, -torch.inf)
        if not bool(torch.isfinite(chances).any(1).all()):
            raise InputError("every token that the model allows is excluded: exclude fewer")
        token = torch.multinomial(chances.softmax(-1), 1, generator=generator)
        total += log_p.gather(1, token)[:, 0]
        ids = torch.cat([ids, token], 1)
    return ids[:, before:], total


def _places(available: int, times: int, name: str, generator: torch.Generator) -> list[int]:
    """Different places, rising."""
    if not 1 <= times <= available:
        raise InputError(f"times must be from 1 to the {available} {name} of the document, got {times}")
    return sorted(torch.randperm(available, generator=generator)[:times].tolist())


def _check_options(
    numbers: Mapping[str, int], edges: Sequence[float], temperatures: Sequence[float], similarity: float
) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number, at least 1, got {value}")
    if len(edges) < 2 or any(not a < b for a, b in pairwise(edges)) or not edges[0] >= 1:
        raise InputError(f"edges must be two or more rising perplexities from 1 on, got {list(edges)}")
    if not len(temperatures) or not all(0 < t < math.inf for t in temperatures):
        raise InputError(f"temperatures must be positive and finite, got {list(temperatures)}")
    if not 0 <= similarity <= 1:
        raise InputError(f"max_similarity must be from 0 to 1, got {similarity}")
