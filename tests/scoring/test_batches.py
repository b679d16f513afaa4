"""Padded batches compute every sequence behind the right context, within their limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.scoring import batches
from loglik.scoring.batches import make_batches
from loglik.scoring.forest import Forest
from strategies import nested_texts

TOKENS = st.integers(1, 3)


@pytest.fixture(autouse=True, scope="module")
def _short_beginnings_are_worth_it():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MIN_SHARED", 2)
        yield


def contexts(plan):
    """What each real column of each batch sees, by running the batches in order; caches must exist when used."""
    caches: dict[int, tuple[int, ...]] = {}
    seen, live = {}, 0
    for number, batch in enumerate(plan.packs):
        before = caches[batch.prefix] if batch.prefix >= 0 else ()
        tokens = batch.tokens(plan.forest)
        assert tokens.shape == (len(batch.rows), batch.width)
        assert batch.size == tokens.size
        for row, (leaf, begin, end) in enumerate(batch.rows):
            assert begin == len(before)
            assert plan.forest.tokens[leaf][:begin].tolist() == list(before)
            assert not tokens[row, end - begin :].any()
            for column in range(end - begin):
                seen[number, row * batch.width + column] = (*before, *map(int, tokens[row, : column + 1]))
        live = max(live, sum(map(len, caches.values())) + len(batch.rows) * (len(before) + batch.width))
        if batch.keep >= 0:
            assert len(batch.rows) == 1
            assert batch.keep not in caches
            caches[batch.keep] = (*before, *map(int, tokens[0]))
        for node in batch.frees:
            del caches[node]
    assert not caches, "a cache is never freed"
    assert plan.live_tokens == live
    return seen


def check(texts, plan, spans):
    seen = contexts(plan)
    prefixes = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
    assert set(seen.values()) == prefixes
    assert plan.computed == len(seen)
    for i, (begin, end) in enumerate(spans):
        found = []
        for number, column, first, count in plan.columns(i, begin, end):
            assert count > 0 or begin == end
            for k in range(count):
                assert seen[number, column + k] == tuple(texts[i][: first + k + 1])
                found.append(first + k)
        assert found == list(range(begin, end))


def maximal(texts):
    return {t for t in map(tuple, texts) if t and not any(tuple(u[: len(t)]) == t and tuple(u) != t for u in texts)}


@given(
    nested_texts(TOKENS, longest=18, times=12, more=7),
    st.integers(1, 40),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_token_behind_its_own_context_with_caches(texts, batch_tokens, cache_tokens, rng):
    plan = make_batches(Forest(texts), batch_tokens=batch_tokens, cache_tokens=cache_tokens)
    check(texts, plan, [(low := rng.randint(0, len(t)), rng.randint(low, len(t))) for t in texts])
    alive = 0
    for batch in plan.packs:
        depth = plan.forest.nodes[batch.prefix].end if batch.prefix >= 0 else 0
        assert len(batch.rows) == 1 or batch.size <= batch_tokens
        # A prefix that is repeated over the rows of a batch is memory too.
        assert len(batch.rows) == 1 or alive + len(batch.rows) * depth <= cache_tokens
        alive += plan.forest.nodes[batch.keep].end if batch.keep >= 0 else 0
        assert alive <= cache_tokens
        alive -= sum(plan.forest.nodes[node].end for node in batch.frees)


@given(nested_texts(TOKENS, longest=18, times=12, more=7), st.integers(1, 60), st.lists(st.integers(1, 20), max_size=2))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whole_rows_without_caches(texts, batch_tokens, limits):
    """Every sequence once, longest first, and no batch on both sides of a limit."""
    plan = make_batches(Forest(texts), batch_tokens=batch_tokens, cache_tokens=None, limits=tuple(limits))
    check(texts, plan, [(0, len(t)) for t in texts])
    assert plan.computed == sum(map(len, maximal(texts)))
    lengths = [[end for _, _, end in batch.rows] for batch in plan.packs]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in plan.packs:
        assert (batch.prefix, batch.keep, batch.frees) == (-1, -1, [])
        assert len(batch.rows) == 1 or batch.size <= batch_tokens
    for limit in limits:
        assert all(len({length > limit for length in batch}) == 1 for batch in lengths)


def test_batches_are_filled():
    texts = [[i, 1, 2, 3] for i in range(4, 24)]
    plan = make_batches(Forest(texts), batch_tokens=16, cache_tokens=None)
    assert [len(batch.rows) for batch in plan.packs] == [4] * 5


def test_a_limit_falls_between_its_length_and_the_next():
    """Rows of 8 and 9 tokens with the limit 8: apart; of 9 and 10, or 7 and 8: together."""

    def batch_count(*lengths):
        texts = [[i] * length for i, length in enumerate(lengths)]
        return len(make_batches(Forest(texts), batch_tokens=1000, cache_tokens=None, limits=(8,)).packs)

    assert [batch_count(8, 9), batch_count(9, 10), batch_count(7, 8), batch_count(7, 8, 9, 10)] == [2, 1, 1, 2]


def test_a_shared_beginning_runs_once(monkeypatch):
    """One beginning of 40 tokens, 10 branches: its own pass, then the branches over its cache, freed after."""
    monkeypatch.setattr(batches, "MIN_SHARED", 16)
    beginning = list(range(1, 41))
    forest = Forest([[*beginning, 50 + i, 1] for i in range(10)])
    plan = make_batches(forest, batch_tokens=100, cache_tokens=1000)
    root = forest.roots[0]
    assert [(b.prefix, len(b.rows), b.keep, b.frees) for b in plan.packs] == [(-1, 1, root, []), (root, 10, -1, [root])]
    assert plan.computed == 60
    assert plan.live_tokens == 40 + 10 * 42
    small = make_batches(forest, batch_tokens=100, cache_tokens=39)
    assert small.computed == 420
    short = Forest([[*beginning[:15], 50 + i] for i in range(10)])
    assert make_batches(short, batch_tokens=100, cache_tokens=1000).computed == 160


def test_two_thousand_levels():
    texts = [[7] * depth + [8] for depth in range(2, 2000, 2)]
    plan = make_batches(Forest(texts), batch_tokens=64, cache_tokens=3000)
    assert sum(count for *_, count in plan.columns(500, 0, len(texts[500]))) == len(texts[500])
    whole = make_batches(Forest(texts), batch_tokens=64, cache_tokens=None)
    assert whole.computed == sum(map(len, texts))


def test_nothing_to_compute():
    for texts in ([[]], [[], []]):
        for cache_tokens in (None, 10):
            plan = make_batches(Forest(texts), batch_tokens=3, cache_tokens=cache_tokens)
            assert (plan.packs, plan.computed, plan.live_tokens) == ([], 0, 0)
