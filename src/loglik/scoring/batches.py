"""From the prefix forest to padded batches, for models that cannot attend in a tree.

A shared beginning that is long enough runs once, by itself, and leaves a cache; everything below it runs as whole rows
of one batch over that cache. Without caches every sequence runs whole. Padding stands on the right of rows of similar
length, where causal attention cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loglik.scoring.forest import Forest

__all__ = ["Batch", "BatchPlan", "make_batches"]

# A beginning shorter than this is cheaper to compute again in every row than to run and keep by itself.
MIN_SHARED = 16


@dataclass(slots=True)
class Batch:
    """One forward pass over B rows.

    Args:
        prefix: node whose cache stands before all rows, -1 for none.
        rows: (leaf, first token, behind the last) of each row.
        keep: node whose cache this pass leaves, -1 for none; it has one row then.
        frees: nodes whose caches nothing after this pass needs.
    """

    prefix: int
    rows: list[tuple[int, int, int]]
    keep: int = -1
    frees: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(end - begin for _, begin, end in self.rows)

    @property
    def size(self) -> int:
        """Columns of the flattened batch, padding included."""
        return len(self.rows) * self.width

    def tokens(self, forest: Forest) -> NDArray[np.int64]:
        """(B, T) token ids, 0 under padding."""
        ids = np.zeros((len(self.rows), self.width), dtype=np.int64)
        for row, (leaf, begin, end) in zip(ids, self.rows, strict=True):
            row[: end - begin] = forest.tokens[leaf][begin:end]
        return ids


@dataclass(slots=True)
class BatchPlan:
    """Batches in order.

    Args:
        forest: what is computed.
        packs: the batches; each knows which caches it needs and which can go.
        shared: batch that computes a node by itself.
        row_of: batch, row in it and first token, of each leaf's own tokens.
    """

    forest: Forest
    packs: list[Batch] = field(default_factory=list)
    shared: dict[int, int] = field(default_factory=dict)
    row_of: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def computed(self) -> int:
        """Tokens of all batches without padding."""
        return sum(end - begin for batch in self.packs for _, begin, end in batch.rows)

    @property
    def live_tokens(self) -> int:
        """Tokens of which keys and values exist at once, at most: a prefix is repeated for every row of a batch."""
        nodes, live, most = self.forest.nodes, 0, 0
        for batch in self.packs:
            depth = nodes[batch.prefix].end if batch.prefix >= 0 else 0
            most = max(most, live + len(batch.rows) * (depth + batch.width))
            live += nodes[batch.keep].end if batch.keep >= 0 else 0
            live -= sum(nodes[node].end for node in batch.frees)
        return most

    def columns(self, sequence: int, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Where tokens ``begin`` to ``end`` of a sequence are computed, as (batch, column, first token, count)."""
        done = begin
        for node in self.forest.path(sequence):
            entry = self.forest.nodes[node]
            if node in self.shared and entry.begin < end and entry.end > done:
                high = min(end, entry.end)
                yield self.shared[node], done - entry.begin, done, high - done
                done = high
        if done < end:
            number, row, first = self.row_of[self.forest.host[sequence]]
            yield number, row * self.packs[number].width + done - first, done, end - done


def make_batches(
    forest: Forest, *, batch_tokens: int, cache_tokens: int | None, limits: tuple[int, ...] = ()
) -> BatchPlan:
    """Schedule a forest for padded batches.

    Args:
        forest: of the sequences to compute.
        batch_tokens: tokens of a forward pass with padding; a longer row goes alone.
        cache_tokens: tokens that caches may hold at once; None runs every sequence whole, without any.
        limits: lengths that must not be crossed within one batch: rows on either side of one do not mix.
    """
    plan = BatchPlan(forest)
    if cache_tokens is None:
        _rows(plan, forest.roots, -1, batch_tokens, None, limits)
        return plan
    _visit(plan, batch_tokens, cache_tokens)
    return plan


def _visit(plan: BatchPlan, batch_tokens: int, cache_tokens: int) -> None:
    """Shared nodes depth first; below each, first the rows that share nothing further worth keeping."""
    nodes = plan.forest.nodes
    # (node, cache it hangs from, tokens alive in caches above it); a negative node frees that cache.
    stack: list[tuple[int, int, int]] = []

    def descend(children: list[int], prefix: int, live: int) -> None:
        depth = nodes[prefix].end if prefix >= 0 else 0
        deeper: list[int] = []
        plain: list[int] = []
        for child in children:
            entry = nodes[child]
            is_worth_it = entry.leaves > 1 and entry.end - entry.begin >= MIN_SHARED
            (deeper if is_worth_it and live + entry.end <= cache_tokens else plain).append(child)
        # A repeated prefix is memory too: as many rows at a time as there is room for.
        most = max(1, (cache_tokens - live) // depth) if depth else None
        _rows(plan, plain, prefix, batch_tokens, most, ())
        stack.extend((child, prefix, live) for child in reversed(deeper))

    descend(plan.forest.roots, -1, 0)
    while stack:
        node, prefix, live = stack.pop()
        if node < 0:
            plan.packs[-1].frees.append(-1 - node)
            continue
        entry = nodes[node]
        plan.shared[node] = len(plan.packs)
        plan.packs.append(Batch(prefix, [(entry.leaf, entry.begin, entry.end)], keep=node))
        stack.append((-1 - node, -1, 0))
        descend(entry.children, node, live + entry.end)


def _rows(
    plan: BatchPlan,
    roots: list[int],
    prefix: int,
    batch_tokens: int,
    most_rows: int | None,
    limits: tuple[int, ...],
) -> None:
    """Every leaf below `roots` as a row behind the prefix, in batches of similar length, longest first."""
    depth = plan.forest.nodes[prefix].end if prefix >= 0 else 0
    leaves = []
    stack = list(roots)
    while stack:
        entry = plan.forest.nodes[stack.pop()]
        stack.extend(entry.children)
        if not entry.children:
            leaves.append((entry.end, entry.leaf))
    leaves.sort(reverse=True)
    batch: Batch | None = None
    for end, leaf in leaves:
        width = end - depth
        if batch is not None:
            longest = batch.rows[0][2]
            full = batch.width * (len(batch.rows) + 1) > batch_tokens or len(batch.rows) == most_rows
            if full or any(end <= limit < longest for limit in limits):
                batch = None
        if batch is None:
            batch = Batch(prefix, [])
            plan.packs.append(batch)
        batch.rows.append((leaf, depth, depth + width))
        plan.row_of[leaf] = (len(plan.packs) - 1, len(batch.rows) - 1, depth)
