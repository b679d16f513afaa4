"""Completions of one prompt in one packed row: what they share is computed once, forward and backward.

The rows of a group (`TokenBatch.groups`) become one tree: their longest common beginning, then a branch for the rest
of each. A state that several rows read carries the sum of their gradients, as it would if each had computed it.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from loglik.models.batch import TokenBatch
from loglik.models.tree_attention import TreeRow, tree_hidden
from loglik.models.trunk import Trunk

__all__ = ["shared_scores"]


def shared_scores(trunk: Trunk, x: TokenBatch, *, narrows: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and greedy match (N,) of the scored tokens of left-aligned rows, row by row.

    Args:
        trunk: of a model whose forward path is ``packed``.
        x: left-aligned rows with `groups`; the first token of none is scored.
        narrows: the model's last layer may be computed only where it is read.
    """
    tokens, ends, positions, bounds, predictors = _forest(x)
    device = x.ids.device
    row, column = x.scored_mask.nonzero(as_tuple=True)
    targets = x.ids[row, column]
    rows, order = predictors.to(device)[row, column].sort(stable=True)
    read = torch.unique_consecutive(rows)
    tree = TreeRow(torch.tensor(positions, device=device), torch.tensor(ends, device=device), bounds)
    tree.read = read if narrows else None
    hidden = tree_hidden(trunk, torch.tensor(tokens, device=device), tree)
    scores = trunk.log_probs(hidden[read], targets[order], rows=torch.searchsorted(read, rows))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=device)
    return scores.log_probs[back], scores.greedy[back]


def _forest(x: TokenBatch) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], Tensor]:
    """Groups as trees, one behind the other.

    Returns:
        The packed tokens, the column behind each one's last descendant, their depths, each tree's columns, and (B, T)
        the packed column that predicts each token.
    """
    assert x.groups is not None
    lengths = x.attention_mask.sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(x.ids.tolist(), lengths, strict=True)]
    groups = x.groups.tolist()
    tokens: list[int] = []
    ends: list[int] = []
    positions: list[int] = []
    bounds: list[tuple[int, int]] = []
    predictors = torch.zeros(x.ids.shape, dtype=torch.long)
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and groups[last] == groups[first]:
            last += 1
        members, begin = rows[first:last], len(tokens)
        # The last token is only ever a target, so that a row that is all prefix leaves one to be predicted.
        shared = min(_common(members), *(max(len(row) - 1, 0) for row in members))
        branches = [row[shared:-1] for row in members]
        end = begin + shared + sum(map(len, branches))
        tokens += chain(members[0][:shared], *branches)
        ends += [end] * shared
        positions += range(shared)
        at = begin + shared
        for number, branch in enumerate(branches, first):
            predictors[number, 1 : shared + 1] = torch.arange(begin, begin + shared)
            predictors[number, shared + 1 : shared + 1 + len(branch)] = torch.arange(at, at + len(branch))
            at += len(branch)
            ends += [at] * len(branch)
            positions += range(shared, shared + len(branch))
        if end > begin:
            bounds.append((begin, end))
        first = last
    return tokens, ends, positions, bounds, predictors


def _common(rows: list[list[int]]) -> int:
    """Length of the longest common beginning."""
    low, high = min(rows), max(rows)  # what the first and the last in lexical order share, all share
    count = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        count += 1
    return count
