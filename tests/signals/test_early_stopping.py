"""What stopping early saves and changes: by hand, against loops, and at its limits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import Measurement
from loglik.signals.early_stopping import stop_outcome, stop_summary, stop_trade_off
from loglik.signals.entropy_curve import EntropyCurve


def curve(*values) -> EntropyCurve:
    entropy = torch.tensor(values, dtype=torch.float64)
    return EntropyCurve(Measurement(entropy, Kind.EXACT, "answer_entropy"), entropy[:, None])


def test_an_outcome_by_hand():
    advice = curve(2.0, 1.0, 0.4, 0.3).early_stop(0.5)
    got = stop_outcome(advice, [5, 7, 11], answers=["b", "a", "a", "a"], right=[False, True, True, True])
    assert (got.step, got.reason, got.steps, got.tokens, got.tokens_saved) == (2, "sure", 3, 23, 11)
    assert (got.same_answer, got.right, got.right_in_the_end) == (True, True, True)
    early = stop_outcome(curve(0.1, 1.0, 1.0, 1.0).early_stop(0.5), [5, 7, 11], answers="baca")
    assert (early.step, early.tokens_saved, early.same_answer, early.right) == (0, 23, False, None)
    never = stop_outcome(curve(1.0, 1.0, 1.0, 1.0).early_stop(0.5), [5, 7, 11], answers="baca")
    assert (never.step, never.reason, never.tokens_saved, never.same_answer) == (3, "continue", 0, True)
    json.dumps(never.record(), allow_nan=False)


def test_advice_of_a_curve_without_its_conclusion_saves_the_conclusion_too():
    whole = curve(2.0, 0.4, 0.3, 0.0)
    got = stop_outcome(whole.until(-1).early_stop(0.35), [5, 7, 11], answers="abbb")
    assert (got.step, got.tokens_saved) == (2, 11)
    none = stop_outcome(whole.until(-1).early_stop(0.1), [5, 7, 11], answers="abbb")
    assert (none.step, none.tokens_saved) == (3, 0)


def test_a_summary_by_hand():
    tokens = [10, 10]
    outcomes = [
        stop_outcome(curve(2.0, 0.1, 0.1).early_stop(0.5), tokens, answers=[0, 1, 1], right=[False, True, True]),
        stop_outcome(curve(0.2, 2.0, 0.1).early_stop(0.5), tokens, answers=[0, 1, 1], right=[False, True, True]),
        stop_outcome(curve(2.0, 2.0, 2.0).early_stop(0.5), tokens, answers=[0, 1, 2], right=[True, False, False]),
        stop_outcome(curve(2.0, 2.0, 0.1).early_stop(0.5), tokens, answers=[0, 1, 2], right=[True, False, False]),
    ]
    assert stop_summary(outcomes) == {
        "stopped": 0.5,
        "steps_saved": 3 / 8,
        "tokens_saved": 30 / 80,
        "same_answer": 0.75,
        "same_answer_of_stopped": 0.5,
        "accuracy_at_stop": 0.25,
        "accuracy_in_the_end": 0.5,
    }
    unknown = stop_summary([*outcomes, stop_outcome(curve(1.0, 1.0).early_stop(0.5), [4])])
    assert unknown["same_answer"] is None
    assert unknown["accuracy_at_stop"] is None
    nothing = stop_summary([stop_outcome(curve(1.0).early_stop(0.5), [], answers=["a"])])
    assert nothing["tokens_saved"] is None
    assert nothing["stopped"] == 0.0
    with pytest.raises(InputError, match="there is no trace"):
        stop_summary([])


def traces(seed=0, count=40):
    g = np.random.default_rng(seed)
    curves, tokens, answers = [], [], []
    for _ in range(count):
        steps = int(g.integers(1, 7))
        curves.append(curve(*(g.exponential(size=steps + 1) + 0.01)))
        tokens.append(g.integers(1, 30, size=steps).tolist())
        answers.append(g.integers(3, size=steps + 1).tolist())
    return curves, tokens, answers


@pytest.mark.parametrize("options", [{}, {"patience": 2}, {"stall": 2, "min_fall": 0.1}])
def test_the_trade_off_is_that_of_every_threshold_by_itself(options):
    curves, tokens, answers = traces()
    got = stop_trade_off(curves, tokens, answers, thresholds=[0.9, 0.3, 0.05], **options)
    assert got.threshold.tolist() == [0.05, 0.3, 0.9]
    for place, level in enumerate(got.threshold):
        each = [
            stop_outcome(c.early_stop(level, **options), t, answers=a)
            for c, t, a in zip(curves, tokens, answers, strict=True)
        ]
        told = stop_summary(each)
        assert got.tokens_saved[place] == pytest.approx(told["tokens_saved"])
        assert got.same_answer[place] == pytest.approx(told["same_answer"])


def test_limits_of_the_trade_off():
    curves, tokens, answers = traces(1)
    got = stop_trade_off(curves, tokens, answers)
    assert len(got.threshold) == 51
    assert (np.diff(got.tokens_saved) >= 0).all()
    assert (got.tokens_saved[0], got.same_answer[0]) == (0.0, 1.0)  # no entropy is 0
    assert got.tokens_saved[-1] == 1.0
    assert got.same_answer[-1] == pytest.approx(np.mean([a[0] == a[-1] for a in answers]))


def test_refusals():
    advice = curve(1.0, 0.1).early_stop(0.5)
    with pytest.raises(InputError, match="answers must have a value for each of the 2 states of a trace of 1 steps"):
        stop_outcome(advice, [3], answers=["a"])
    with pytest.raises(InputError, match="right must have a value for each of the 2 states"):
        stop_outcome(advice, [3], right=[True] * 3)
    with pytest.raises(InputError, match="the advice is to stop after 1 steps, and the trace has 0"):
        stop_outcome(advice, [])
    with pytest.raises(InputError, match="the tokens of a step are a number of at least 0, got -3"):
        stop_outcome(advice, [-3])
    curves, tokens, answers = traces(2, 3)
    with pytest.raises(InputError, match=r"each curve needs its tokens and its answers.* 3 curves, 2 and 3 lists"):
        stop_trade_off(curves, tokens[:2], answers)
    with pytest.raises(InputError, match="there must be one: got 0 curves"):
        stop_trade_off([], [], [])
    with pytest.raises(InputError, match="no trace has a token that could be saved"):
        stop_trade_off([curve(1.0)], [[]], [["a"]])
    with pytest.raises(RowError, match="trace 2: answers must have a value for each of the"):
        stop_trade_off(curves, tokens, [*answers[:2], answers[2][:-1]])
    with pytest.raises(InputError, match="thresholds must be one number or more"):
        stop_trade_off(curves, tokens, answers, thresholds=[])
    with pytest.raises(InputError, match="threshold and min_fall must be at least 0 and finite"):
        stop_trade_off(curves, tokens, answers, thresholds=[float("nan")])
