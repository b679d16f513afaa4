"""Stimuli of similar and of different probability: bands matched on length, accuracy by band, paired contrasts.

A regression on whatever items there are shows a correlation. To say that probability does it, vary it, hold the rest:
`matched_bands` chooses strings of the same lengths, `accuracy_by_band` is the table of their accuracies, and
`paired_contrast` compares a common task with a rare one on the same outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require
from loglik.signals.detection import Estimate, as_numbers, checked_pairs, proportion_interval
from loglik.signals.drawing import as_text, completion_ids, greedy_completions, prompt_tokens, require_room

__all__ = [
    "Band",
    "PairedContrast",
    "accuracy_by_band",
    "begins_with",
    "finite_values",
    "greedy_answers",
    "matched_bands",
    "pair_items",
    "paired_contrast",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Band:
    """Items of similar probability.

    Args:
        label: of the band; the higher, the more probable, where bands were made by rank.
        count: items.
        accuracy: share of right ones, with its exact binomial interval.
        log_prob: mean log-probability, nats.
        num_units: mean number of units: bands that differ here are not matched.
    """

    label: int
    count: int
    accuracy: Estimate
    log_prob: float
    num_units: float


def accuracy_by_band(
    correct: Tensor | ArrayLike, likelihood: LogLikelihood, bands: int | Tensor | ArrayLike = 3, *, level: float = 0.95
) -> tuple[Band, ...]:
    """Accuracy in bands of probability, the least probable band first.

    Args:
        correct: (N,) bool, or 0 and 1.
        likelihood: (N,) of the outputs (or inputs) that the bands are about.
        bands: how many bands of equal size by rank (equal values share one), or (N,) whole numbers that name the band
            of each item; items of a negative one are left out (`matched_bands`).
        level: confidence of each interval, in (0, 1).

    Raises:
        InputError: for unequal lengths, more bands than items, or options out of range.
        RowError: for a log-likelihood that is not finite.

    Source: arXiv 2309.13638.
    """
    values = finite_values(likelihood, "likelihood")
    _, right = checked_pairs(values, correct, ("likelihood", "correct"))
    if isinstance(bands, int) and not isinstance(bands, bool):
        if not 1 <= bands <= len(values):
            raise InputError(f"bands must be from 1 to the number of items, {len(values)}, got {bands}")
        _, which, count = np.unique(values, return_inverse=True, return_counts=True)
        labels = (bands * (2 * count.cumsum() - count) // (2 * len(values)))[which]  # by middle rank
    else:
        labels = _whole(bands, "bands", len(values))
    units = likelihood.num_units.detach().cpu().numpy()
    found = []
    for label in np.unique(labels[labels >= 0]).tolist():
        own = labels == label
        size, hits = int(own.sum()), int(right[own].sum())
        low, high = proportion_interval(np.array([hits]), np.array([size]), level)
        accuracy = Estimate(hits / size, float(low[0]), float(high[0]))
        found.append(Band(int(label), size, accuracy, float(values[own].mean()), float(units[own].mean())))
    if not found:
        raise InputError("no item is in a band: name the band of some by a number from 0")
    return tuple(found)


def matched_bands(likelihood: LogLikelihood, bands: int = 3, *, lengths: Tensor | ArrayLike | None = None) -> Tensor:
    """Choose items so that bands of probability have the same lengths, one by one.

    Within each length the items are ranked, and equally many go into each band: from the bottom, evenly spaced places
    between, and the top. The rest belongs to none.

    Args:
        likelihood: (N,) of the candidate strings.
        bands: at least 2.
        lengths: (N,) whole numbers to match on; `num_units` if None.

    Returns:
        (N,) long: 0 for the least probable band, up to ``bands - 1``, and -1 for items that are left out.

    Raises:
        InputError: for fewer than two bands, or if no length has an item for each band.
        RowError: for a log-likelihood that is not finite.

    Source: arXiv 2309.13638 (100 sentences per level, matched on length).
    """
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 2:
        raise InputError(f"bands must be at least 2, got {bands!r}")
    values = finite_values(likelihood, "likelihood")
    sizes = _whole(likelihood.num_units if lengths is None else lengths, "lengths", len(values))
    labels = np.full(len(values), -1, dtype=np.int64)
    for size in np.unique(sizes).tolist():
        own = np.flatnonzero(sizes == size)
        own = own[np.argsort(values[own], kind="stable")]
        each = len(own) // bands
        for band in range(bands):
            begin = band * (len(own) - each) // (bands - 1)
            labels[own[begin : begin + each]] = band
    if (labels < 0).all():
        raise InputError(f"no length has {bands} items, one for each band: give more strings, or fewer bands")
    return torch.from_numpy(labels)


@dataclass(frozen=True, slots=True)
class PairedContrast:
    """Two tasks on the same items.

    Args:
        first: accuracy on the first.
        second: accuracy on the second.
        difference: first minus second, with its interval.
        only_first: items right on the first alone.
        only_second: items right on the second alone.
        p_value: McNemar's exact two-sided test that both are equally easy.
        count: items.
    """

    first: float
    second: float
    difference: Estimate
    only_first: int
    only_second: int
    p_value: float
    count: int


def paired_contrast(first: Tensor | ArrayLike, second: Tensor | ArrayLike, *, level: float = 0.95) -> PairedContrast:
    r"""Accuracy on a common task against a rare one, on the same outputs.

    The p-value is McNemar's: of the items that only one task gets right, half should be the first's, which is a
    binomial test. The interval is Agresti and Min's: a half is added to each cell of the two-by-two table and the
    difference's normal interval is taken.

    Args:
        first: (N,) bool, or 0 and 1: whether the first task's answer is right.
        second: (N,) of the same items under the second task.
        level: confidence of the interval, in (0, 1).

    Raises:
        InputError: for unequal lengths, no items, or labels other than 0 and 1.

    Source: arXiv 2309.13638 (the contrast); McNemar 1947; Agresti and Min 2005.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    numbers, other = checked_pairs(first, second, ("first", "second"))
    _, own = checked_pairs(np.zeros(len(numbers)), numbers, ("first", "first"))
    count = len(own)
    if not count:
        raise InputError("there are no items: give at least one pair")
    b, c = int((own & ~other).sum()), int((other & ~own).sum())
    raw = (b - c) / count
    centre = (b - c) / (count + 2)
    deviation = math.sqrt((b + c + 1 - (b - c) ** 2 / (count + 2)) / (count + 2) ** 2)
    width = float(norm.ppf((1 + level) / 2)) * deviation
    low, high = max(-1.0, min(centre - width, raw)), min(1.0, max(centre + width, raw))
    p_value = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    return PairedContrast(float(own.mean()), float(other.mean()), Estimate(raw, low, high), b, c, p_value, count)


def pair_items(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Positions of the items that two tasks share: the n-th of a key in one with the n-th of it in the other.

    Args:
        first: keys of the first task's items, such as their right outputs.
        second: keys of the second task's.

    Returns:
        Positions in `first`, ascending, and those in `second` beside them; empty where nothing is shared.
    """
    places = {key: place for place, key in enumerate(_numbered(second))}
    pairs = [(place, places[key]) for place, key in enumerate(_numbered(first)) if key in places]
    return [a for a, _ in pairs], [b for _, b in pairs]


def greedy_answers(
    model: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    batch_size: int = 8,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """What a model says to each prompt, the likeliest token at each step.

    Args:
        model: gives next-token distributions, and has a tokenizer.
        prompts: to continue, as the model is to read them.
        max_tokens: tokens of an answer at most.
        batch_size: prompts per forward pass; the answers do not depend on it.
        advance: told how many prompts each batch had.

    Raises:
        InputError: for a model without next-token distributions, or options out of range.
        RowError: for a prompt that is empty or too long, or after which the model gives NaN.
    """
    chain = require(model, ChainRule, "greedy answers")  # type: ignore[type-abstract]
    if batch_size < 1 or max_tokens < 1:
        raise InputError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
    tokens = prompt_tokens(model, prompts)
    heads = [ids[real].tolist() for ids, real in zip(tokens.ids, tokens.attention_mask, strict=True)]
    require_room(model, heads, max_tokens)
    found: list[str] = []
    for begin in range(0, len(heads), batch_size):
        part = heads[begin : begin + batch_size]
        batch = TokenBatch.from_lists(part, starts=[len(head) for head in part])
        try:
            said = greedy_completions(chain, batch, max_tokens=max_tokens)
        except RowError as error:
            raise error.at(f"prompt {begin + int((error.row or 'prompt 0').split()[1])}") from None
        found += [as_text(model.tokenizer, ids) for ids in completion_ids(said)]
        if advance is not None:
            advance(len(part))
    return found


def begins_with(said: str, right: str) -> bool:
    """Whether an answer begins with the right one, quotation marks around it and differences of white space aside."""
    marks = "\"'`“”‘’"
    said, right = (" ".join(text.strip().strip(marks).split()) for text in (said, right))
    return said.startswith(right)


def finite_values(likelihood: LogLikelihood, name: str) -> Floats:
    """(N,) log-likelihoods as float64.

    Raises:
        RowError: for one that is not finite, with `name`.
    """
    bad = (~torch.isfinite(likelihood.value)).nonzero().flatten()
    if len(bad):
        raise RowError(
            f"the log-likelihood of the {name} is {float(likelihood.value[bad[0]])}: leave the item out",
            row=f"row {int(bad[0])}",
        )
    found: Floats = likelihood.value.detach().cpu().double().numpy()
    return found


def _whole(given: Any, name: str, count: int) -> Ints:
    numbers = as_numbers(given, name)
    if numbers.shape != (count,) or not (numbers == np.floor(numbers)).all():
        raise InputError(f"{name} must be {count} whole numbers, one per item, got {numbers.dtype} {numbers.shape}")
    return numbers.astype(np.int64)


def _numbered(keys: Sequence[Hashable]) -> list[tuple[Hashable, int]]:
    """Each key with how often it stood before."""
    seen: Counter[Hashable] = Counter()
    found = []
    for key in keys:
        found.append((key, seen[key]))
        seen[key] += 1
    return found
