"""P(IK) on unseen questions: the split, what it may not leak, its figures against loops, and a null."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loglik.errors import InputError
from loglik.signals.calibration import brier_score
from loglik.signals.detection import auroc
from loglik.signals.p_ik import PIKProbe, held_out_p_ik


def world(seed=0, questions=80, signal=2.0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(questions, 3))
    trials = g.integers(1, 9, size=questions)
    known = 1 / (1 + np.exp(-signal * x[:, 0] - 0.4))
    return x, g.binomial(trials, known), trials, known


def test_the_probe_is_that_of_the_training_questions():
    x, right, count, _ = world()
    found = held_out_p_ik(x, right, count, share=0.4, c=0.3, seed=3)
    assert found.trained.sum() == 32
    alone = PIKProbe(c=0.3).fit(x[found.trained], right[found.trained], count[found.trained])
    np.testing.assert_allclose(found.p_ik, alone.p_ik(x))
    assert (held_out_p_ik(x, right, count, share=0.4, seed=3).trained == found.trained).all()
    assert (held_out_p_ik(x, right, count, share=0.4, seed=4).trained != found.trained).any()


def test_outcomes_of_held_out_questions_do_not_leak():
    x, right, count, _ = world()
    found = held_out_p_ik(x, right, count)
    other = np.where(found.trained, right, count - right)
    np.testing.assert_array_equal(held_out_p_ik(x, other, count).p_ik, found.p_ik)
    moved = np.where(found.trained, count - right, right)
    assert np.abs(held_out_p_ik(x, moved, count).p_ik - found.p_ik).max() > 0.1


def test_samples_of_held_out_questions_alone():
    x, right, count, _ = world()
    found = held_out_p_ik(x, right, count)
    pairs = [(found.p_ik[q], n < right[q]) for q in range(len(x)) if not found.trained[q] for n in range(count[q])]
    known, labels = found.samples()
    assert sorted(zip(known.tolist(), labels.tolist(), strict=True)) == sorted((float(p), bool(y)) for p, y in pairs)
    rate = right[found.trained].sum() / count[found.trained].sum()
    assert found.base_rate == pytest.approx(rate)
    assert found.base_brier() == pytest.approx(brier_score(np.full(len(labels), rate), labels))


def test_what_is_known_is_found_and_what_is_not_is_not():
    x, right, count, known = world(questions=400)
    found = held_out_p_ik(x, right, count)
    assert np.abs(found.p_ik - known)[~found.trained].mean() < 0.06
    assert brier_score(*found.samples()) < found.base_brier()
    # Features that say nothing: the mean AUROC over 60 worlds is within four standard errors of a half.
    areas = []
    for seed in range(60):
        x, right, count, _ = world(seed + 1, signal=0.0)
        areas.append(auroc(*held_out_p_ik(x, right, count, seed=seed).samples()))
    assert abs(np.mean(areas) - 0.5) < 4 * np.std(areas) / math.sqrt(60)


def test_refusals():
    x, right, count, _ = world()
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="share must lie between 0 and 1"):
            held_out_p_ik(x, right, count, share=share)
    with pytest.raises(InputError, match=r"a share of 0\.5 of 1 questions puts 0 into training and 1 into the test"):
        held_out_p_ik(x[:1], right[:1], count[:1])
    with pytest.raises(InputError, match="need as many successes and trials"):
        held_out_p_ik(x, right[:5], count)
    with pytest.raises(InputError, match="need as many successes and trials"):
        held_out_p_ik(x, right, 8)
    with pytest.raises(InputError, match="give counts of samples, not shares"):
        held_out_p_ik(x, right / count, np.ones(len(x)))
    with pytest.raises(InputError, match="successes must lie between 0 and trials"):
        held_out_p_ik(x, count + 1, count)
    with pytest.raises(InputError, match="every sample is right, so that there is nothing to learn"):
        held_out_p_ik(x, count, count)
    with pytest.raises(InputError, match="the features of row 2 are not finite"):
        held_out_p_ik(np.where(np.arange(len(x))[:, None] == 2, math.nan, x), right, count)
