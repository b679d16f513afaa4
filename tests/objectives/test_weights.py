"""Token weights from spans of characters, and masks of differing tokens."""

from __future__ import annotations

import difflib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.errors import InputError
from loglik.objectives.weights import diff_mask, weights_from_spans
from zoo import byte_level_tokenizer


def test_tokens_have_the_largest_weight_they_overlap():
    offsets = [(0, 4), (4, 8), (8, 9), (9, 14), (0, 0)]
    weights = weights_from_spans(offsets, [(2, 6, 1.1), (5, 9, 1.2), (9, 10, 0.5)])
    torch.testing.assert_close(weights, torch.tensor([1.1, 1.2, 1.2, 0.5, 1.0]))


def test_touching_is_not_overlapping_and_no_characters_overlap_nothing():
    weights = weights_from_spans([(0, 3), (3, 5), (5, 7), (4, 4)], [(3, 5, 2.0)], default=0.25)
    torch.testing.assert_close(weights, torch.tensor([0.25, 2.0, 0.25, 0.25]))
    assert weights_from_spans([], [(0, 1, 2.0)]).shape == (0,)
    assert weights_from_spans([(0, 2)], []).tolist() == [1.0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda p: (p[0], p[0] + p[1])), max_size=6),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.5, 3.0])), max_size=4),
)
def test_weights_are_those_of_the_characters(offsets, spans):
    """A token's weight is the largest over its characters of the largest over the spans on that character."""
    spans = [(first, first + length, weight) for first, length, weight in spans]
    for (start, end), got in zip(offsets, weights_from_spans(offsets, spans).tolist(), strict=True):
        found = [w for at in range(start, end) for first, stop, w in spans if first <= at < stop]
        assert got == max(found, default=1.0)


def test_offsets_of_a_real_tokenizer():
    text = "The answer is 42, yes"
    encoded = byte_level_tokenizer()(text, return_offsets_mapping=True)
    first = text.index("42")
    weights = weights_from_spans(encoded["offset_mapping"], [(first, first + 2, 1.2)])
    for (start, end), weight in zip(encoded["offset_mapping"], weights.tolist(), strict=True):
        touches = any(c in "42" for c in text[start:end])
        assert weight == pytest.approx(1.2 if touches else 1.0)
    assert weights.max() > 1


@pytest.mark.parametrize(
    "span", [(3, 3, 1.0), (4, 3, 1.0), (-1, 3, 1.0), (0, 3, -1.0), (0, 3, math.nan), (0, 3, math.inf)]
)
def test_spans_that_make_no_sense_are_named(span):
    with pytest.raises(InputError, match=r"span 1 \("):
        weights_from_spans([(0, 3)], [(0, 1, 1.0), span])


def test_a_default_weight_must_be_a_weight():
    for default in (-1.0, math.nan):
        with pytest.raises(InputError, match="default must be finite and at least 0"):
            weights_from_spans([(0, 3)], [], default=default)


def test_positions_are_compared_up_to_the_shorter_length():
    chosen, rejected = diff_mask([1, 2, 3, 4, 5], [1, 9, 3])
    assert chosen.tolist() == [False, True, False, False, False]
    assert rejected.tolist() == [False, True, False]


def test_an_insertion_shifts_positions_but_not_alignments():
    left, right = [1, 2, 3, 4], [1, 7, 2, 3, 4]
    assert [m.tolist() for m in diff_mask(left, right)] == [[False, True, True, True], [False, True, True, True, False]]
    assert [m.tolist() for m in diff_mask(left, right, align=True)] == [[False] * 4, [False, True, False, False, False]]


def test_long_completions_are_aligned_without_heuristics():
    """difflib takes frequent items for junk from 200 on, unless told not to."""
    left = torch.randint(0, 20, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    right = [*left[:100], 99, *left[100:]]
    chosen, rejected = diff_mask(left, right, align=True)
    assert not chosen.any()
    assert rejected.nonzero().flatten().tolist() == [100]


@pytest.mark.parametrize("align", [False, True])
def test_tensors_empty_and_equal_completions(align):
    same = torch.tensor([4, 5, 6])
    assert [m.any().item() for m in diff_mask(same, same, align=align)] == [False, False]
    chosen, rejected = diff_mask([], [1, 2], align=align)
    assert chosen.shape == (0,)
    assert chosen.dtype == rejected.dtype == torch.bool
    assert rejected.tolist() == ([True, True] if align else [False, False])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_aligned_tokens_that_do_not_differ_are_a_common_subsequence(left, right):
    chosen, rejected = diff_mask(left, right, align=True)
    kept = [t for t, differs in zip(left, chosen.tolist(), strict=True) if not differs]
    assert kept == [t for t, differs in zip(right, rejected.tolist(), strict=True) if not differs]
    blocks = difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    assert len(kept) == sum(block.size for block in blocks)
    for one, other in (diff_mask(left, right), diff_mask(right, left)[::-1]):
        assert one.int().sum() == other.int().sum() == sum(a != b for a, b in zip(left, right, strict=False))
