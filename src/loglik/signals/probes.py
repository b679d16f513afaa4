r"""What two models share, and what hidden states tell: overlaps of sets of questions, and linear probes.

`set_overlap` compares what two models know, or get wrong, with chance. `probe_accuracy` asks whether hidden states tell
kinds of questions apart, and `probe_transfer` whether a probe needs labels of this very model for it. States are those
of `answer_states` or, for every block and each of its parts, of `component_states`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.blocks import BlockPart, changed, find_blocks
from loglik.models.protocol import HiddenStates, require
from loglik.signals.detection import as_numbers, checked_pairs

__all__ = [
    "ProbeAccuracy",
    "ProbeTransfer",
    "SetOverlap",
    "answer_states",
    "component_states",
    "probe_accuracy",
    "probe_transfer",
    "set_overlap",
]


@dataclass(frozen=True, slots=True)
class SetOverlap:
    """Overlap of two sets.

    Args:
        jaccard: members of both over members of either.
        chance: its value for independent sets of these sizes, in a large universe.
    """

    jaccard: float
    chance: float


def set_overlap(first: Tensor | ArrayLike, second: Tensor | ArrayLike) -> SetOverlap:
    r"""Do two models (or prompts) share what they know, or what they get wrong, more than by chance?

    .. math:: J = \frac{|A \cap B|}{|A \cup B|}, \qquad J_0 = \frac{p_A p_B}{p_A + p_B - p_A p_B}

    Errors are compared over the questions that both know.

    Args:
        first: (N,) bool over the universe.
        second: (N,) likewise.

    Raises:
        InputError: for unequal lengths, flags that are not 0 or 1, or two empty sets.

    Source: arXiv 2410.22071.
    """
    numbers, b = checked_pairs(first, second, ("first", "second"))
    _, a = checked_pairs(np.zeros(len(numbers)), numbers, ("first", "first"))
    union = int((a | b).sum())
    if not union:
        raise InputError("both sets are empty, so that their overlap is undefined")
    p, q = float(a.mean()), float(b.mean())
    return SetOverlap(int((a & b).sum()) / union, p * q / (p + q - p * q))


def answer_states(model: Any, batch: TokenBatch) -> Tensor:
    """(B, D) hidden states at the last token of each row: the prompt's before an answer, or the answer's after it.

    Raises:
        InputError: for a model without hidden states.
        RowError: for a row without tokens.
    """
    states = require(model, HiddenStates, "a probe").hidden_states(batch)  # type: ignore[type-abstract]
    real = batch.attention_mask.to(states.device)
    _require_tokens(real)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


@torch.no_grad()
def component_states(model: Any, batch: TokenBatch, kind: BlockPart = "residual") -> Tensor:
    """(L, B, D) what each block has at the last token of each row: its MLP's output, its attention's, or its own.

    Args:
        model: a causal language model of transformers.
        batch: prompts before an answer, or with the answer appended.
        kind: output of ``mlp`` or ``attention``, or the ``residual`` stream behind the block.

    Raises:
        InputError: for a model without blocks, or whose blocks do not have this part by themselves.
        RowError: for a row without tokens.

    Source: arXiv 2410.22071.
    """
    blocks = find_blocks(model, "a probe of components")
    modules = blocks.parts(kind)
    packed, _ = batch.to(next(blocks.embedding.parameters()).device).packed_left()
    _require_tokens(batch.attention_mask)
    rows, last = torch.arange(len(packed)), packed.attention_mask.sum(1) - 1
    found: list[Tensor] = []

    def note(_: int, states: Tensor) -> Tensor:
        found.append(states[rows.to(states.device), last.to(states.device)])
        return states

    # Padding stands on the right, where causal attention cannot see it.
    blocks.last_log_probs(packed.ids, changed(modules, note, length=packed.ids.shape[1]))
    return torch.stack(found)


@dataclass(frozen=True, slots=True)
class ProbeAccuracy:
    """Accuracy of probes on held-out questions.

    Args:
        accuracy: mean over splits.
        per_split: of each split.
        chance: 1 / classes: they are balanced.
        per_class: questions of each class.
    """

    accuracy: float
    per_split: tuple[float, ...]
    chance: float
    per_class: int


def probe_accuracy(
    states: Tensor | ArrayLike,
    labels: Sequence[str],
    questions: Tensor | ArrayLike | None = None,
    *,
    splits: int = 3,
    train: float = 0.7,
    seed: int = 0,
) -> ProbeAccuracy:
    """Do hidden states tell the kinds apart, on questions that the probe has not seen?

    A linear support-vector machine (C = 1) reads states divided by their length. Each split draws as many questions of
    every class and trains on a share of each. All rows of a question stand on one side, else a probe recognises the
    question. Compare classes within one prompt setting, or it reads the prompt.

    Args:
        states: (N, D) hidden states of one layer and position.
        labels: N names of classes.
        questions: (N,) whole numbers; each row is a question of its own if None.
        splits: how many random splits.
        train: share of the questions that train, in (0, 1).
        seed: of the splits.

    Raises:
        InputError: for unequal lengths, states of length 0 or not finite, fewer than two classes of two questions, a
            question with two labels, or options out of range.

    Source: arXiv 2410.22071; by scikit-learn's `LinearSVC`.
    """
    values, names, own, classes, members = _checked_rows(states, labels, questions)
    _check_splits(splits, train)
    found = []
    for split in range(splits):
        seen, held = _split(own, members, train, np.random.default_rng([seed, split]))
        found.append(_score(values[seen], names[seen], values[held], names[held]))
    each = min(len(m) for m in members)
    return ProbeAccuracy(float(np.mean(found)), tuple(found), 1 / len(classes), each)


@dataclass(frozen=True, slots=True)
class ProbeTransfer:
    """Two probes on the same held-out questions.

    Args:
        specific: trained on labels of the tested model.
        generic: trained on right and wrong answers whatever the model knows, as many as the specific one had.
    """

    specific: ProbeAccuracy
    generic: ProbeAccuracy


def probe_transfer(
    states: Tensor | ArrayLike,
    labels: Sequence[str],
    generic_states: Tensor | ArrayLike,
    generic_labels: Sequence[str],
    questions: Tensor | ArrayLike | None = None,
    generic_questions: Tensor | ArrayLike | None = None,
    *,
    splits: int = 3,
    train: float = 0.7,
    seed: int = 0,
) -> ProbeTransfer:
    """Does a probe need labels of what this model knows, or do right and wrong answers of anyone do?

    Each split is that of `probe_accuracy`. The generic probe is trained on as many rows of each class, none of them of
    a question that is held out, and tested on the same rows. In the generic set a question may have a row of each
    class: the right answer appended, and a wrong one.

    Args:
        states: (N, D) states of known questions.
        labels: N names of classes, such as HK+ and factual.
        generic_states: (M, D) states of the same layer and position, of the generic set.
        generic_labels: M names of the same classes: what the right answers and the wrong ones stand for.
        questions: (N,) whole numbers; each row is a question of its own if None.
        generic_questions: (M,) in the same numbers; questions that `questions` does not have if None.
        splits: how many random splits.
        train: share of the questions that train, in (0, 1).
        seed: of the splits.

    Raises:
        InputError: as `probe_accuracy`; or for other classes or another width in the generic set, or fewer generic rows
            of a class than the specific probe is trained on.

    Source: arXiv 2410.22071.
    """
    values, names, own, classes, members = _checked_rows(states, labels, questions)
    _check_splits(splits, train)
    other, titles = np.asarray(_unit_length(generic_states)), np.array([str(label) for label in generic_labels])
    theirs = -1 - np.arange(len(other)) if generic_questions is None else as_numbers(generic_questions, "questions")
    if len(titles) != len(other) or theirs.shape != titles.shape or other.shape[1] != values.shape[1]:
        raise InputError(
            f"the generic set must have states of width {values.shape[1]} with as many labels and questions, got "
            f"{other.shape}, {len(titles)} and {theirs.shape}"
        )
    if sorted(set(titles.tolist())) != classes:
        raise InputError(f"the generic set must have the classes {classes}, got {sorted(set(titles.tolist()))}")
    specific, generic = [], []
    for split in range(splits):
        generator = np.random.default_rng([seed, split])
        seen, held = _split(own, members, train, generator)
        free = ~np.isin(theirs, own[held])
        taken = []
        for c in classes:
            places, needed = np.flatnonzero(free & (titles == c)), int((names[seen] == c).sum())
            if len(places) < needed:
                raise InputError(
                    f"the generic set has {len(places)} rows of {c} without held-out questions, and the specific probe "
                    f"is trained on {needed}: give more"
                )
            taken.append(generator.permutation(places)[:needed])
        chosen = np.concatenate(taken)
        specific.append(_score(values[seen], names[seen], values[held], names[held]))
        generic.append(_score(other[chosen], titles[chosen], values[held], names[held]))
    each = min(len(m) for m in members)
    return ProbeTransfer(
        *(ProbeAccuracy(float(np.mean(f)), tuple(f), 1 / len(classes), each) for f in (specific, generic))
    )


def _split(
    own: NDArray[Any], members: Sequence[NDArray[Any]], train: float, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows train and which are held out: as many questions of every class."""
    each = min(len(m) for m in members)
    cut = min(max(1, round(train * each)), each - 1)
    drawn = [generator.permutation(m)[:each] for m in members]
    return np.isin(own, np.concatenate([d[:cut] for d in drawn])), np.isin(
        own, np.concatenate([d[cut:] for d in drawn])
    )


def _score(seen: NDArray[Any], labels: NDArray[Any], held: NDArray[Any], truth: NDArray[Any]) -> float:
    """Accuracy on held-out rows of a linear machine."""
    try:
        from sklearn.svm import LinearSVC  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("probes need scikit-learn: pip install 'loglik[stats]'") from None
    return float(LinearSVC(C=1.0, max_iter=100_000, random_state=0).fit(seen, labels).score(held, truth))


def _checked_rows(
    states: Tensor | ArrayLike, labels: Sequence[str], questions: Tensor | ArrayLike | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], list[str], list[NDArray[Any]]]:
    """States of length 1, names, questions, classes, and the questions of each class."""
    values, names = np.asarray(_unit_length(states)), np.array([str(label) for label in labels])
    own = np.arange(len(values)) if questions is None else as_numbers(questions, "questions")
    if len(names) != len(values) or own.shape != names.shape:
        raise InputError(f"{len(values)} states need as many labels and questions, got {len(names)} and {own.shape}")
    classes = sorted(set(names.tolist()))
    members = [np.unique(own[names == c]) for c in classes]
    shared, times = np.unique(np.concatenate(members), return_counts=True)
    if (times > 1).any():
        raise InputError(f"question {shared[times > 1][0]} has two labels: label it once per setting")
    each = min(len(m) for m in members)
    if len(classes) < 2 or each < 2:
        raise InputError(f"a probe needs two classes with two questions each, got {classes} with at least {each}")
    return values, names, own, classes, members


def _check_splits(splits: int, train: float) -> None:
    if splits < 1 or not 0 < train < 1:
        raise InputError(f"splits must be at least 1 and train between 0 and 1, got {splits} and {train}")


def _require_tokens(real: Tensor) -> None:
    empty = (~real.any(1)).nonzero().flatten()
    if len(empty):
        raise RowError("has no token: remove it", row=f"row {int(empty[0])}")


def _unit_length(states: Tensor | ArrayLike) -> NDArray[np.float64]:
    values = as_numbers(states, "states").astype(np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"states must have shape (N, D), got {values.shape}")
    size = np.linalg.norm(values, axis=1, keepdims=True)
    bad = np.flatnonzero(~((size[:, 0] > 0) & np.isfinite(size[:, 0])))
    if len(bad):
        raise InputError(f"the state of row {int(bad[0])} has length {size[bad[0], 0]}: remove the row")
    return np.asarray(values / size)
