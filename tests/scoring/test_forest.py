"""The prefix forest holds every distinct (prefix, token) once."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from loglik.scoring.forest import Forest
from strategies import nested_texts

# Few tokens, so that beginnings are shared; 1 and 256 differ in another byte than 1 and 2.
TOKENS = st.sampled_from([1, 2, 256, 2**31])
TEXTS = st.lists(st.lists(TOKENS, max_size=9), min_size=1, max_size=14)


def check(texts):
    forest = Forest(texts)
    prefixes = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
    assert forest.distinct == len(prefixes)
    assert forest.total == sum(map(len, texts))
    # Every node is reached once, from a root, and spells its own tokens.
    spelled: dict[int, tuple[int, ...]] = {}
    stack = [(root, (), -1) for root in forest.roots]
    while stack:
        node, above, parent = stack.pop()
        entry = forest.nodes[node]
        assert node not in spelled
        assert entry.parent == parent
        assert entry.begin == len(above) < entry.end
        spelled[node] = (*above, *map(int, forest.node_tokens(node)))
        assert len(spelled[node]) == entry.end
        assert tuple(texts[entry.leaf][: entry.end]) == spelled[node]
        stack += [(child, spelled[node], node) for child in entry.children]
    assert len(spelled) == len(forest.nodes)
    # A node branches or ends, and no two branches begin with the same token.
    for entry in forest.nodes:
        assert len(entry.children) != 1
        firsts = [int(forest.node_tokens(child)[0]) for child in entry.children]
        assert len(set(firsts)) == len(firsts)
        assert entry.size == entry.end - entry.begin + sum(forest.nodes[child].size for child in entry.children)
        assert entry.leaves == (sum(forest.nodes[child].leaves for child in entry.children) or 1)
    firsts = [int(forest.node_tokens(root)[0]) for root in forest.roots]
    assert len(set(firsts)) == len(firsts)
    # Every text has its path, from a root, through nodes that hold its tokens and no further.
    ends = set()
    for i, text in enumerate(texts):
        path = forest.path(i)
        assert [forest.nodes[node].parent for node in path] == [-1, *path][: len(path)]
        if not text:
            assert path == []
            continue
        assert spelled[path[-1]][: len(text)] == tuple(text)
        assert forest.nodes[path[-1]].begin < len(text)
        host = texts[forest.host[i]]
        assert host[: len(text)] == text
        assert forest.host[forest.host[i]] == forest.host[i]
        ends.add(tuple(host))
    maximal = {t for t in map(tuple, texts) if t and not any(tuple(u[: len(t)]) == t and tuple(u) != t for u in texts)}
    assert ends == maximal
    assert sum(forest.nodes[root].leaves for root in forest.roots) == len(maximal)


@given(TEXTS)
@settings(max_examples=300, deadline=None, derandomize=True)
@example([[]])
@example([[], [1], [], [1]])
@example([[1, 2], [1], [1, 2, 3], [1, 2]])
def test_any_texts(texts):
    """Empty, equal, one the beginning of another."""
    check(texts)


@given(nested_texts(TOKENS, longest=6, times=10, more=4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_nested_texts(texts):
    check(texts)


def test_by_hand():
    forest = Forest([[5, 6, 7], [5, 6], [5, 6, 8, 9], [4], [5, 6, 7]])
    assert (forest.distinct, forest.total) == (6, 13)
    assert [forest.node_tokens(root).tolist() for root in forest.roots] == [[4], [5, 6]]
    trunk = forest.roots[1]
    assert [forest.node_tokens(child).tolist() for child in forest.nodes[trunk].children] == [[7], [8, 9]]
    assert forest.path(1) == [trunk]
    assert forest.path(0) == forest.path(4) == [trunk, forest.nodes[trunk].children[0]]
    assert (forest.nodes[trunk].size, forest.nodes[trunk].leaves) == (5, 2)


def test_two_thousand_levels():
    """Texts that each add a token to the one before: nothing recurses."""
    texts = [[7] * depth + [8] for depth in range(2000)]
    forest = Forest(texts)
    assert forest.distinct == 1999 + 2000
    assert len(forest.path(1999)) == 1999
    assert forest.nodes[forest.roots[0]].leaves + 1 == 2000
    chain = Forest([[7] * depth for depth in range(2001)])
    assert (chain.distinct, len(chain.nodes)) == (2000, 1)
    assert all(chain.host[i] == 2000 for i in range(2001))


def test_order_of_the_texts_does_not_matter():
    texts = [[5, 6, 7], [5, 6], [5, 6, 8, 9], [4], [5, 6, 7], []]
    one, two = Forest(texts), Forest(texts[::-1])

    def shape(forest, node):
        entry = forest.nodes[node]
        return (forest.node_tokens(node).tolist(), [shape(forest, child) for child in entry.children])

    assert [shape(one, root) for root in one.roots] == [shape(two, root) for root in two.roots]


def test_token_ids_of_four_bytes_keep_their_order():
    """Ids are compared as numbers, not byte by byte from the wrong end."""
    forest = Forest([[256], [1], [2**32 - 1], [65536]])
    assert [int(forest.node_tokens(root)[0]) for root in forest.roots] == [1, 256, 65536, 2**32 - 1]


def test_no_texts():
    forest = Forest([])
    assert (forest.distinct, forest.total, forest.roots) == (0, 0, [])
