"""From the prefix forest to forward passes: depth first, so that one path of keys and values is all that stays alive.

A *pack* is one forward pass over new tokens: whole subtrees that hang from the path computed so far, side by side in
one row, by best fit. A subtree larger than a pack is entered: its own tokens become part of the path (in pieces, where
they are longer than a pack), and its children are packed under the longer path. Going back up costs nothing, because
the path is one buffer whose end is forgotten. Live keys and values are thus never more than one path and one pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loglik.scoring.forest import Forest

__all__ = ["Pack", "Piece", "Plan", "make_plan"]

# Subtrees side by side attend together up to this many tokens: a mask over both costs less than a second call.
GROUP_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a node in a pack: depths ``begin`` to ``end``, from column `offset` of the pack on."""

    node: int
    begin: int
    end: int
    offset: int


@dataclass(slots=True)
class Pack:
    """One forward pass.

    Args:
        prefix: tokens of the path before it, computed by earlier packs.
        keep: its first tokens that stay as the path's continuation.
        pieces: what it computes, parents before children, each subtree in one stretch.
        groups: columns that have nothing in common but the path; the first is what is kept, if anything is.
    """

    prefix: int
    keep: int = 0
    pieces: list[Piece] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0

    def tokens(self, forest: Forest) -> NDArray[np.int64]:
        """(N,) token ids."""
        parts = [forest.tokens[forest.nodes[p.node].leaf][p.begin : p.end] for p in self.pieces]
        return np.concatenate(parts).astype(np.int64)

    def positions(self) -> NDArray[np.int64]:
        """(N,) depth of each token."""
        return np.concatenate([np.arange(p.begin, p.end) for p in self.pieces])

    def subtree_ends(self, forest: Forest) -> NDArray[np.int64]:
        """(N,) column behind the last descendant of each token: token i sees token j if ``j <= i < ends[j]``."""
        ends = np.zeros(self.size, dtype=np.int64)
        end_of: dict[int, int] = {}
        for piece in reversed(self.pieces):
            below = [end_of[child] for child in forest.nodes[piece.node].children if child in end_of]
            end_of[piece.node] = max([piece.offset + piece.end - piece.begin, *below])
            ends[piece.offset : piece.offset + piece.end - piece.begin] = end_of[piece.node]
        return ends


@dataclass(slots=True)
class Plan:
    """Packs in order, and what they amount to.

    Args:
        forest: what is computed.
        packs: in the order in which they must run.
        where: for each node, its pieces as (pack, piece), from its first token to its last.
        alone: for each leaf that runs by itself for want of cache, its pack and the depth at which it begins.
    """

    forest: Forest
    packs: list[Pack]
    where: dict[int, list[tuple[int, Piece]]]
    alone: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def computed(self) -> int:
        """Tokens of all packs: the distinct tokens, unless a small cache forces some to be computed again."""
        return sum(pack.size for pack in self.packs)

    @property
    def live_tokens(self) -> int:
        """Tokens of which keys and values exist at once, at most."""
        return max((pack.prefix + pack.size for pack in self.packs), default=0)

    def columns(self, sequence: int, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Where tokens ``begin`` to ``end`` of a sequence are computed, as (pack, column, first token, count)."""
        done = begin
        for node in self.forest.path(sequence):
            if self.forest.nodes[node].end <= done:
                continue
            for pack, piece in self.where.get(node, ()):
                low, high = max(done, piece.begin), min(end, piece.end)
                if low < high:
                    yield pack, piece.offset + low - piece.begin, low, high - low
                    done = high
        if done < end:
            pack, depth = self.alone[self.forest.host[sequence]]
            yield pack, done - depth, done, end - done


def make_plan(
    forest: Forest, *, pack_tokens: int, under_prefix: int | None = None, cache_tokens: int | None = None
) -> Plan:
    """Schedule a forest.

    Args:
        forest: of the sequences to compute.
        pack_tokens: tokens of a forward pass at most; 1 or more.
        under_prefix: the same for passes that follow a prefix; `pack_tokens` by default.
        cache_tokens: tokens the path may hold; rows below a longer one run by themselves. None: no limit.
    """
    under = pack_tokens if under_prefix is None else under_prefix
    plan = Plan(forest, [], {})
    stack: list[tuple[list[int], int]] = [(forest.roots, 0)]  # children still to be packed under a path of this length
    while stack:
        children, depth = stack.pop()
        limit = under if depth else pack_tokens
        for subtrees in _packed([child for child in children if forest.nodes[child].size <= limit], forest, limit):
            pack = Pack(depth)
            for child in subtrees:
                _append(plan, pack, child)
            _close(plan, pack)
        large = [child for child in children if forest.nodes[child].size > limit]
        for i, child in enumerate(large):
            if cache_tokens is not None and forest.nodes[child].end > cache_tokens:
                _alone(plan, child, depth)
                continue
            # Its children come next, under the longer path; then the rest of this level, under the old one.
            stack.append((large[i + 1 :], depth))
            stack.append(_enter(plan, child, depth, pack_tokens, under))
            break
    return plan


def _packed(subtrees: Sequence[int], forest: Forest, limit: int) -> list[list[int]]:
    """Subtrees in as few packs as best fit finds, largest first; each pack in the forest's order."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and number of each pack, ascending
    for child in sorted(subtrees, key=lambda c: -forest.nodes[c].size):
        size = forest.nodes[child].size
        at = bisect_left(rooms, (size, 0))
        if at == len(rooms):
            packs.append([])
            room, number = limit, len(packs) - 1
        else:
            room, number = rooms.pop(at)
        packs[number].append(child)
        insort(rooms, (room - size, number))
    order = {child: i for i, child in enumerate(subtrees)}
    return [sorted(pack, key=order.__getitem__) for pack in packs]


def _enter(plan: Plan, node: int, depth: int, pack_tokens: int, under: int) -> tuple[list[int], int]:
    """Compute a node as part of the path, in pieces; children that fit fill the last piece's pack, largest first."""
    forest = plan.forest
    entry = forest.nodes[node]
    begin = entry.begin
    while True:
        limit = under if begin else pack_tokens
        end = min(begin + limit, entry.end)
        pack = Pack(begin, keep=end - begin)
        _piece(plan, pack, node, begin, end)
        if end == entry.end:
            break
        _close(plan, pack)
        begin = end
    rest = set(entry.children)
    for child in sorted(entry.children, key=lambda c: -forest.nodes[c].size):
        if pack.size + forest.nodes[child].size <= limit:
            _append(plan, pack, child)
            rest.remove(child)
    _close(plan, pack)
    return [child for child in entry.children if child in rest], entry.end


def _alone(plan: Plan, root: int, depth: int) -> None:
    """Every leaf below a node as a pass of its own from `depth` on; nothing is kept."""
    nodes = plan.forest.nodes
    stack: list[tuple[int, tuple[int, ...]]] = [(root, ())]
    while stack:
        node, above = stack.pop()
        chain = (*above, node)
        stack.extend((child, chain) for child in reversed(nodes[node].children))
        if nodes[node].children:
            continue
        pack = Pack(depth, groups=[(0, nodes[node].end - depth)])
        for part in chain:
            pack.pieces.append(Piece(part, nodes[part].begin, nodes[part].end, pack.size))
            pack.size += nodes[part].end - nodes[part].begin
        plan.alone[nodes[node].leaf] = (len(plan.packs), depth)
        plan.packs.append(pack)


def _append(plan: Plan, pack: Pack, root: int) -> None:
    """A whole subtree, in preorder."""
    begin = pack.size
    stack = [root]
    while stack:
        node = stack.pop()
        entry = plan.forest.nodes[node]
        _piece(plan, pack, node, entry.begin, entry.end)
        stack.extend(reversed(entry.children))
    pack.groups.append((begin, pack.size))


def _piece(plan: Plan, pack: Pack, node: int, begin: int, end: int) -> None:
    piece = Piece(node, begin, end, pack.size)
    pack.pieces.append(piece)
    pack.size += end - begin
    # The pack gets its number when it is closed; packs close in the order in which they are opened.
    plan.where.setdefault(node, []).append((len(plan.packs), piece))


def _close(plan: Plan, pack: Pack) -> None:
    merged: list[tuple[int, int]] = []
    for begin, end in pack.groups:
        joins = bool(merged) and end - merged[-1][0] <= GROUP_TOKENS
        merged.append((merged.pop()[0] if joins else begin, end))
    pack.groups = [(0, pack.keep), *merged] if pack.keep else merged
    if pack.size:
        plan.packs.append(pack)
