"""Pairs judged by follow-ups: intervals against scipy, categories against one at a time, files and refusals."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.signals.feedback import follow_up_likelihood
from loglik.signals.follow_up_preferences import (
    category_rewards,
    pairwise_accuracy,
    rating_correlation,
    response_likelihood,
)
from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS, FollowUps, read_follow_ups

PHRASES = {
    "right": FollowUps(("Yes, right.", "Correct."), ("No, wrong.",)),
    "style": FollowUps(("Nice.",), ("Dull.", "Boring.", "Too long.")),
}


# --------------------------------------------------------------------------------------------------------------- pairs
def test_the_interval_is_the_exact_binomial_one():
    chosen = torch.tensor([1.0] * 14 + [0.0] * 6)
    got = pairwise_accuracy(chosen, torch.full((20,), 0.5))
    peer = scipy.stats.binomtest(14, 20).proportion_ci(0.95, method="exact")
    assert (got.accuracy, got.wins, got.ties, got.count) == (0.7, 14, 0, 20)
    assert (got.low, got.high) == pytest.approx((peer.low, peer.high))
    ends = [pairwise_accuracy(torch.full((5,), v), torch.zeros(5)) for v in (1.0, -1.0)]
    assert (ends[0].accuracy, ends[0].high, ends[1].accuracy, ends[1].low) == (1.0, 1.0, 0.0, 0.0)


def test_ties_count_half_and_widen_the_interval():
    got = pairwise_accuracy(torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.full((4,), 0.5), level=0.8)
    assert (got.accuracy, got.wins, got.ties) == (0.5, 1, 2)
    low, high = (scipy.stats.binomtest(k, 4).proportion_ci(0.8, method="exact") for k in (1, 3))
    assert (got.low, got.high) == pytest.approx((low.low, high.high))
    assert got.record()["accuracy"] == 0.5
    assert got.outcomes.tolist() == [1.0, 0.0, 0.5, 0.5]
    near = torch.tensor([1e-7, 1e-3]).double()
    assert pairwise_accuracy(near, torch.zeros(2).double()).outcomes.tolist() == [0.5, 1.0]
    assert pairwise_accuracy(near, torch.zeros(2).double(), tolerance=0).outcomes.tolist() == [1.0, 1.0]
    swapped = pairwise_accuracy(torch.full((4,), 0.5), torch.tensor([1.0, 0.0, 0.5, 0.5]), level=0.8)
    assert (swapped.low, swapped.high) == pytest.approx((1 - got.high, 1 - got.low))


def test_the_interval_covers():
    """1000 samples of 30 pairs at .7: an exact 90 % interval misses in at most 10 % (plus 4 standard deviations)."""
    generator = torch.Generator().manual_seed(11)
    hits = torch.rand(1000, 30, generator=generator) < 0.7
    found = [pairwise_accuracy(row.double(), torch.full((30,), 0.5).double(), level=0.9) for row in hits]
    missed = sum(not one.low <= 0.7 <= one.high for one in found)
    assert missed <= 100 + 4 * math.sqrt(90)


def test_correlation_with_ratings_is_scipys():
    scores = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratings = [float(i % 5) for i in range(20)]
    peer = scipy.stats.spearmanr(scores.numpy(), ratings)
    got = rating_correlation(scores, ratings)
    assert got == {"rank_correlation": pytest.approx(peer.statistic), "p_value": pytest.approx(peer.pvalue)}
    assert rating_correlation(scores, [1.0] * 20) is None
    assert rating_correlation(torch.arange(4.0), [1, 2, 3, 9])["rank_correlation"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------- follow-ups
def test_categories_are_rewards_of_their_own(tiny):
    prompts, responses = ["x?", "y?"], ["it is 3", "no idea"]
    sides = [[text for each in PHRASES.values() for text in getattr(each, side)] for side in ("positive", "negative")]
    scores = follow_up_likelihood(tiny, prompts, responses, positive=sides[0], negative=sides[1])
    got = category_rewards(scores, PHRASES)
    for name, each in PHRASES.items():
        alone = follow_up_likelihood(tiny, prompts, responses, positive=each.positive, negative=each.negative)
        torch.testing.assert_close(got[name], alone.reward.value, atol=1e-4, rtol=0)
    only = {name: FollowUps(each.positive, ()) for name, each in PHRASES.items()}
    happy = follow_up_likelihood(tiny, prompts, responses, positive=sides[0], negative=())
    torch.testing.assert_close(category_rewards(happy, only)["style"], happy.positive[:, 2])


def test_the_own_likelihood_of_responses(tiny):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "x?"},
    ]
    got = response_likelihood(tiny, ["x?", talk], ["it is 3", "no"])
    wanted = loglik.score(
        tiny, [("User: x?\nAssistant:", " it is 3"), ("User: hi\nAssistant: hello\nUser: x?\nAssistant:", " no")]
    )
    torch.testing.assert_close(got.value, wanted.value, atol=1e-4, rtol=0)
    with pytest.raises(RowError, match="response 1: has"):
        response_likelihood(tiny, ["a", "word " * 2000], ["b", "c"])


def test_files_of_follow_ups(tmp_path):
    path = tmp_path / "follow.json"
    path.write_text(json.dumps({"positive": ["Yes."], "negative": ["No."]}))
    assert read_follow_ups(path) == {"all": FollowUps(("Yes.",), ("No.",))}
    whole = {n: {"positive": list(e.positive), "negative": list(e.negative)} for n, e in DEFAULT_FOLLOW_UPS.items()}
    path.write_text(json.dumps(whole))
    assert read_follow_ups(path) == dict(DEFAULT_FOLLOW_UPS)
    path.write_text(json.dumps({"negative": ["No."]}))
    assert read_follow_ups(path) == {"all": FollowUps((), ("No.",))}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object with positive and negative, or such objects by category"),
        ("{}", "must be an object with positive and negative, or such objects by category"),
        ('{"positive": "Yes."}', "positive must be a list of texts that are not empty"),
        ('{"positive": [" "]}', "positive must be a list of texts that are not empty"),
        ('{"positive": []}', "has no follow-ups: give positive or negative ones"),
        ('{"positive": ["a", "a"]}', "positive has the same text twice"),
        ('{"a": {"positive": ["b"], "other": []}}', "'a' of"),
        ('{"a": 3}', "must be an object with positive and negative, each a list"),
        (
            '{"a": {"positive": ["b"]}, "c": {"positive": ["d"], "negative": ["e"]}}',
            "has no negative follow-ups, and other categories have some",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, text, sentence):
    path = tmp_path / "follow.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_follow_ups(path)
    assert sentence in str(refused.value)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_follow_ups(tmp_path / "nowhere.json")


TWO, NAN = torch.zeros(2), torch.tensor([0.0, math.nan])
REFUSED = [
    (lambda: pairwise_accuracy(TWO, torch.zeros(3)), "must both have shape"),
    (lambda: pairwise_accuracy(torch.zeros(0), torch.zeros(0)), "at least one pair"),
    (lambda: pairwise_accuracy(NAN, TWO), "row 1: the score of the chosen response is nan"),
    (lambda: pairwise_accuracy(TWO, NAN), "row 1: the score of the rejected response is nan"),
    (lambda: pairwise_accuracy(TWO, TWO, level=0), "level must lie between 0 and 1"),
    (lambda: pairwise_accuracy(TWO, TWO, tolerance=-1), "tolerance must be at least 0 and finite"),
    (lambda: rating_correlation(TWO, [1, 2]), "a correlation needs at least three"),
    (lambda: rating_correlation(torch.zeros(3), [1, 2]), "scores and ratings must pair"),
    (lambda: rating_correlation(torch.arange(3.0), [1, math.inf, 2]), "row 1: the rating is inf"),
    (lambda: response_likelihood(None, "text", ["a"]), "each response needs its own prompt"),
    (lambda: response_likelihood(None, ["a"], []), "each response needs its own prompt: got 1 and 0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError)) as refused:
        call()
    assert message in str(refused.value)


def test_categories_that_were_not_scored(tiny):
    scores = follow_up_likelihood(tiny, ["x?"], ["3"], positive=["Yes."], negative=["No."])
    with pytest.raises(InputError, match="the categories have 3 positive and 4 negative follow-ups, and 1 and 1 were"):
        category_rewards(scores, PHRASES)
