"""A plan computes every token behind the right context, within its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.scoring.forest import Forest
from loglik.scoring.plan import make_plan
from strategies import nested_texts

TOKENS = st.integers(0, 2)


def contexts(plan):
    """What each column of each pack sees, by running the packs in order as attention would."""
    seen, path = {}, []
    for number, pack in enumerate(plan.packs):
        tokens = pack.tokens(plan.forest).tolist()
        positions = pack.positions().tolist()
        ends = pack.subtree_ends(plan.forest).tolist()
        assert len(tokens) == len(positions) == len(ends) == pack.size > 0
        assert pack.prefix <= len(path)
        before = path[: pack.prefix]
        assert pack.groups[0][0] == 0
        assert pack.groups[-1][1] == pack.size
        assert all(left[1] == right[0] for left, right in zip(pack.groups, pack.groups[1:], strict=False))
        if pack.keep:
            assert pack.groups[0] == (0, pack.keep)
        for i in range(pack.size):
            begin, end = next(group for group in pack.groups if group[0] <= i < group[1])
            visible = [j for j in range(pack.size) if j <= i < ends[j]]
            assert all(begin <= j < end or j < pack.keep for j in visible), "a group is cut"
            context = (*before, *(tokens[j] for j in visible))
            assert positions[i] == len(context) - 1
            seen[number, i] = context
        path = before + tokens[: pack.keep]
    return seen


def check(texts, plan, spans):
    seen = contexts(plan)
    prefixes = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
    assert set(seen.values()) == prefixes
    for i, (begin, end) in enumerate(spans):
        found = []
        for number, column, first, count in plan.columns(i, begin, end):
            assert count > 0
            for k in range(count):
                assert seen[number, column + k] == tuple(texts[i][: first + k + 1])
                found.append(first + k)
        assert found == list(range(begin, end))
    return seen


@given(
    nested_texts(TOKENS, longest=18, times=12, more=7),
    st.integers(1, 30),
    st.none() | st.integers(1, 30),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_token_once_behind_its_own_context(texts, pack_tokens, under_prefix, rng):
    plan = make_plan(Forest(texts), pack_tokens=pack_tokens, under_prefix=under_prefix)
    spans = [(low := rng.randint(0, len(t)), rng.randint(low, len(t))) for t in texts]
    seen = check(texts, plan, spans)
    assert plan.computed == plan.forest.distinct == len(seen)
    assert not plan.alone
    under = pack_tokens if under_prefix is None else under_prefix
    depth = max(map(len, texts))
    for pack in plan.packs:
        # Children that fill up the last piece of a long beginning count against the limit of that piece.
        assert pack.size <= (under if pack.prefix else pack_tokens)
        assert pack.prefix + pack.keep <= depth
    assert plan.live_tokens <= depth + max(pack_tokens, under)
    assert plan.live_tokens == max((pack.prefix + pack.size for pack in plan.packs), default=0)


@given(nested_texts(TOKENS, longest=18, times=12, more=7), st.integers(1, 30), st.integers(0, 20))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_small_cache_is_honoured(texts, pack_tokens, cache_tokens):
    """No path grows longer than the cache; what would need one runs by itself, and some tokens twice."""
    plan = make_plan(Forest(texts), pack_tokens=pack_tokens, cache_tokens=cache_tokens)
    check(texts, plan, [(0, len(t)) for t in texts])
    assert plan.computed >= plan.forest.distinct
    for pack in plan.packs:
        assert pack.prefix + pack.keep <= cache_tokens
        assert pack.size <= pack_tokens or not pack.keep
    unlimited = make_plan(Forest(texts), pack_tokens=pack_tokens, cache_tokens=10**6)
    assert not unlimited.alone
    alone = {number for number, _ in plan.alone.values()}
    assert all(pack.size <= pack_tokens for number, pack in enumerate(plan.packs) if number not in alone)


def test_a_forest_that_fits_is_one_pack():
    texts = [[5, 6, 7], [5, 6, 8], [9, 9]]
    plan = make_plan(Forest(texts), pack_tokens=6)
    assert len(plan.packs) == 1
    assert plan.packs[0].groups == [(0, 6)]  # small subtrees attend together, behind a mask
    assert (plan.packs[0].prefix, plan.packs[0].keep) == (0, 0)
    assert len(make_plan(Forest(texts), pack_tokens=5).packs) == 2


def test_packs_are_filled():
    """Subtrees share a pack up to the limit: one hundred rows of ten tokens in ten packs of a hundred."""
    texts = [[i] + [1] * 9 for i in range(100)]
    plan = make_plan(Forest(texts), pack_tokens=100)
    assert [pack.size for pack in plan.packs] == [100] * 10
    assert all(pack.groups == [(0, 100)] for pack in plan.packs)
    longer = make_plan(Forest([[i] + [1] * 99 for i in range(4)]), pack_tokens=400)
    assert longer.packs[0].groups == [(0, 100), (100, 200), (200, 300), (300, 400)]


def test_a_long_beginning_comes_in_pieces_and_its_children_under_it():
    """25 tokens in packs of 10, then 40 branches of one token: 10 + 10 + (5 + 5 branches) + 35 branches in fours."""
    beginning = list(range(25))
    plan = make_plan(Forest([[*beginning, 100 + i] for i in range(40)]), pack_tokens=10)
    assert [(p.prefix, p.keep, p.size) for p in plan.packs[:3]] == [(0, 10, 10), (10, 10, 10), (20, 5, 10)]
    assert [(p.prefix, p.keep, p.size) for p in plan.packs[3:]] == [(25, 0, 10)] * 3 + [(25, 0, 5)]


def test_shared_beginnings_are_computed_once():
    """The point of it: 1,000 branches of 3 tokens on one beginning of 500 are 3,500 tokens and not 503,000."""
    beginning = list(range(500))
    forest = Forest([[*beginning, 1000 + i, 1, 2] for i in range(1000)])
    assert forest.total == 503_000
    assert make_plan(forest, pack_tokens=1024).computed == 3500


@pytest.mark.parametrize("pack_tokens", [1, 7, 5000])
def test_two_thousand_levels(pack_tokens):
    """Nothing recurses, whether the tree is entered or packed whole."""
    texts = [[7] * depth + [8] for depth in range(2000)]
    plan = make_plan(Forest(texts), pack_tokens=pack_tokens)
    assert plan.computed == plan.forest.distinct == 3999
    assert sum(pack.subtree_ends(plan.forest).size for pack in plan.packs) == 3999
    assert plan.live_tokens <= 2000 + pack_tokens
    for i in (0, 1, 1000, 1999):
        assert sum(count for *_, count in plan.columns(i, 0, i + 1)) == i + 1


def test_two_thousand_levels_without_a_cache():
    texts = [[7] * depth + [8] for depth in range(0, 2000, 10)]
    plan = make_plan(Forest(texts), pack_tokens=5, cache_tokens=0)
    assert len(plan.alone) == 199  # all but the text of one token
    assert plan.computed == sum(map(len, texts))


def test_nothing_to_compute():
    for texts in ([[]], [[], []]):
        plan = make_plan(Forest(texts), pack_tokens=3)
        assert (plan.packs, plan.computed, plan.live_tokens) == ([], 0, 0)
        for i in range(len(texts)):
            assert list(plan.columns(i, 0, 0)) == []


def test_subtrees_fill_packs_by_best_fit():
    """Six unrelated rows of 6, 3, 7, 5, 4 and 5 tokens need three packs of ten; in their own order they need four."""
    rows = [[10 * (i + 1) + k for k in range(size)] for i, size in enumerate((6, 3, 7, 5, 4, 5))]
    plan = make_plan(Forest(rows), pack_tokens=10)
    assert [pack.size for pack in plan.packs] == [10, 10, 10]
    # Behind a path, too: the pack that ends the path takes what fits, largest first, and the rest follows.
    plan = make_plan(Forest([[1, 2, 3, *row] for row in rows]), pack_tokens=10)
    assert [(pack.prefix, pack.keep, pack.size) for pack in plan.packs] == [(0, 3, 10), *[(3, 0, 10)] * 2, (3, 0, 3)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_two_packs_of_unrelated_rows_fit_into_one(sizes):
    plan = make_plan(Forest([[100 * (i + 1)] * size for i, size in enumerate(sizes)]), pack_tokens=30)
    filled = sorted(pack.size for pack in plan.packs)
    assert len(filled) == 1 or filled[0] + filled[1] > 30
