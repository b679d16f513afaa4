"""The prefix forest: token sequences as a radix tree, so that every distinct (prefix, token) stands in it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

__all__ = ["Forest", "Node"]


@dataclass(slots=True)
class Node:
    """Tokens ``begin`` to ``end`` of every sequence that passes through it.

    Args:
        begin: depth of its first token.
        end: depth behind its last.
        leaf: index of one sequence that passes through it.
        parent: index of the node it continues, -1 for a root.
        children: indices of the nodes that continue it, in order.
        size: tokens of its whole subtree.
        leaves: sequences that pass through it (those that are a beginning of another do not count).
    """

    begin: int
    end: int
    leaf: int
    parent: int
    children: list[int] = field(default_factory=list)
    size: int = 0
    leaves: int = 0


class Forest:
    """A radix tree over token sequences.

    Sequences are sorted; neighbours share their longest common beginning. A sequence that is the beginning of another
    needs no node of its own: its `host` passes through all of its tokens.

    Args:
        sequences: token ids; duplicates and empty sequences are allowed.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        # Big-endian bytes sort like the numbers they hold.
        arrays = [np.asarray(sequence, dtype=">u4") for sequence in sequences]
        keys = [array.tobytes() for array in arrays]
        order = sorted(range(len(arrays)), key=keys.__getitem__)
        self.tokens: list[NDArray[np.uint32]] = arrays
        self.host: list[int] = list(range(len(arrays)))
        self.total = sum(len(array) for array in arrays)
        self.nodes: list[Node] = []
        self.roots: list[int] = []
        leaves: list[int] = []
        common: list[int] = []  # with the leaf before
        for index, following in zip_longest(order, order[1:]):
            if following is not None and keys[following].startswith(keys[index]):
                self.host[index] = following
            elif len(arrays[index]):
                common.append(_common(arrays[leaves[-1]], arrays[index]) if leaves else 0)
                leaves.append(index)
        # Hosts come later in the order, so that going backwards meets each host before the sequences it stands for.
        for index in reversed(order):
            self.host[index] = self.host[self.host[index]]
        self._path_end: dict[int, int] = {}
        self._build(leaves, common)
        self.distinct = sum(self.nodes[root].size for root in self.roots)

    def path(self, sequence: int) -> list[int]:
        """Nodes from the root through all tokens of a sequence (the last may reach beyond it)."""
        found: list[int] = []
        node = self._path_end.get(self.host[sequence], -1)
        while node >= 0:
            if self.nodes[node].begin < len(self.tokens[sequence]):
                found.append(node)
            node = self.nodes[node].parent
        return found[::-1]

    def node_tokens(self, node: int) -> NDArray[np.uint32]:
        """Tokens of one node."""
        entry = self.nodes[node]
        return self.tokens[entry.leaf][entry.begin : entry.end]

    def _build(self, leaves: list[int], common: list[int]) -> None:
        """Nodes by one pass over the sorted leaves: the open path is cut where the next leaf leaves it."""
        path: list[int] = []
        for leaf, shared in zip(leaves, common, strict=True):
            while path and self.nodes[path[-1]].begin >= shared:
                path.pop()
            if path and self.nodes[path[-1]].end > shared:
                self._split(path, shared)
            parent = path[-1] if path else -1
            node = self._add(Node(shared, len(self.tokens[leaf]), leaf, parent))
            (self.nodes[parent].children if path else self.roots).append(node)
            path.append(node)
            self._path_end[leaf] = node
        for node in reversed(self._preorder()):
            entry = self.nodes[node]
            entry.size = entry.end - entry.begin + sum(self.nodes[child].size for child in entry.children)
            entry.leaves = sum(self.nodes[child].leaves for child in entry.children) or 1

    def _split(self, path: list[int], depth: int) -> None:
        """Cut the last node of the path at `depth`: its front becomes the parent of its rest."""
        rest = path[-1]
        entry = self.nodes[rest]
        front = self._add(Node(entry.begin, depth, entry.leaf, entry.parent, [rest]))
        siblings = self.nodes[entry.parent].children if entry.parent >= 0 else self.roots
        siblings[-1] = front  # sorted leaves: the open path is the rightmost
        entry.begin, entry.parent = depth, front
        path[-1] = front

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _preorder(self) -> list[int]:
        found: list[int] = []
        stack = self.roots[::-1]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(reversed(self.nodes[node].children))
        return found


def _common(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> int:
    """Length of the longest common beginning."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    return int(differ.argmax()) if differ.any() else length
