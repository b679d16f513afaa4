"""Distinct n-grams and their adjustment."""

from __future__ import annotations

import numpy as np
import pytest

from loglik import InputError
from loglik.signals.diversity import distinct_n_grams, expectation_adjusted_distinct, mean_diversity


def test_n_grams_are_counted_within_texts():
    texts = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct_n_grams(texts, 1) == (3, 7)
    assert distinct_n_grams(texts, 2) == (2, 4)
    assert distinct_n_grams(texts, 5) == (0, 0)
    assert distinct_n_grams([["a", "b"]], 2) == (1, 1)


def test_uniform_draws_score_one_whatever_their_number():
    rng = np.random.default_rng(0)
    for length in (50, 500, 5000):
        scores = [
            expectation_adjusted_distinct([rng.integers(200, size=length).tolist()], 1, vocabulary_size=200)
            for _ in range(40)
        ]
        assert np.mean(scores) == pytest.approx(1.0, abs=4 * np.std(scores) / 40**0.5 + 1e-3)
        plain = distinct_n_grams([rng.integers(200, size=length).tolist()], 1)
        assert (plain[0] / plain[1] < 0.2) == (length == 5000)  # the plain ratio falls with length


def test_limits():
    text = list(range(20))
    assert expectation_adjusted_distinct([text], 1, vocabulary_size=10**9) == pytest.approx(1.0, abs=1e-6)
    assert expectation_adjusted_distinct([[7] * 10_000], 1, vocabulary_size=50) == pytest.approx(1 / 50)
    assert expectation_adjusted_distinct([[7, 7]], 1, vocabulary_size=1) == 1.0
    parts = [expectation_adjusted_distinct([text], n, vocabulary_size=100) for n in (1, 2, 3)]
    assert mean_diversity([text], vocabulary_size=100, longest=3) == pytest.approx(sum(parts) / 3)


def test_refusals():
    with pytest.raises(InputError, match="n must be at least 1"):
        distinct_n_grams([[1]], 0)
    with pytest.raises(InputError, match="no 3-gram"):
        expectation_adjusted_distinct([[1, 2]], 3, vocabulary_size=10)
    with pytest.raises(InputError, match="vocabulary_size"):
        expectation_adjusted_distinct([[1, 2]], 1, vocabulary_size=0)
    with pytest.raises(InputError, match="longest"):
        mean_diversity([[1, 2]], vocabulary_size=5, longest=0)
