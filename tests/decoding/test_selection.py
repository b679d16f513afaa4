"""Best of n and weighted majority against plain loops, and their ties."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loglik.decoding.selection import best_of_n, weighted_majority
from loglik.errors import InputError


def test_best_of_n_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 4, 2, 7, 3]
    groups = torch.repeat_interleave(torch.tensor([0, 1, 5, 6, 9]), torch.tensor(sizes))
    for _ in range(20):
        scores = torch.randn(sum(sizes), generator=generator)
        wanted = [max((groups == g).nonzero().flatten().tolist(), key=lambda i: scores[i]) for g in (0, 1, 5, 6, 9)]
        assert best_of_n(scores, groups).tolist() == wanted


def test_of_equal_scores_the_first_is_best():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 0.0, -math.inf, -math.inf])
    assert best_of_n(scores, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])).tolist() == [1, 4, 6]
    assert best_of_n(torch.zeros(1000), torch.zeros(1000, dtype=torch.long)).tolist() == [0]
    assert best_of_n(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_best_of_n_refusals():
    with pytest.raises(InputError, match="score of row 1 is NaN"):
        best_of_n(torch.tensor([0.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(InputError, match="row 2 goes back"):
        best_of_n(torch.zeros(3), torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match="scores and groups must both be"):
        best_of_n(torch.zeros(3), torch.tensor([0, 1]))


def test_the_answer_with_the_largest_total_wins():
    answers = ["4", "5", "4", "6", "5"]
    assert weighted_majority(answers, [0.1, 0.2, 0.1, 0.35, 0.2]) == "5"
    assert weighted_majority(answers, torch.tensor([0.1, 0.2, 0.1, 0.5, 0.2])) == "6"
    assert weighted_majority([*answers, "4"]) == "4"


def test_of_equal_totals_the_first_given_wins():
    assert weighted_majority(["b", "a", "a", "b"]) == "b"
    assert weighted_majority(["a", "b"], [0.0, 0.0]) == "a"
    # Ten times 0.1 is 1 when sums are rounded once: the order of the votes does not break the tie.
    answers, scores = ["one"] + ["many"] * 10, [1.0] + [0.1] * 10
    assert weighted_majority(answers, scores) == "one"
    assert weighted_majority(answers[::-1], scores[::-1]) == "many"


def test_the_order_of_votes_matters_for_ties_only():
    shuffle = random.Random(0)
    votes = [(shuffle.choice("abcd"), shuffle.random()) for _ in range(60)]
    winner = weighted_majority(*map(list, zip(*votes, strict=True)))
    for _ in range(20):
        shuffle.shuffle(votes)
        assert weighted_majority(*map(list, zip(*votes, strict=True))) == winner


def test_completions_without_an_answer_do_not_vote():
    assert weighted_majority([None, 7, None, None], [5.0, 0.1, 5.0, 5.0]) == 7
    with pytest.raises(InputError, match="no completion has an answer"):
        weighted_majority([None, None])
    with pytest.raises(InputError, match="no completion has an answer"):
        weighted_majority([])


def test_negative_scores_count_against():
    """As documented: three completions at -1 lose to one at -2."""
    assert weighted_majority(["a", "a", "a", "b"], [-1.0, -1.0, -1.0, -2.0]) == "b"


@pytest.mark.parametrize("scores", [[1.0], [[1.0, 2.0]], 1.0])
def test_scores_that_do_not_fit(scores):
    with pytest.raises(InputError, match="one score per answer"):
        weighted_majority(["a", "b"], torch.tensor(scores))


def test_scores_that_are_no_numbers():
    with pytest.raises(InputError, match="score of row 1 is nan"):
        weighted_majority(["a", "b"], [1.0, math.nan])
