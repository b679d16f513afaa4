"""Detection statistics against scikit-learn, against enumeration of pairs, and under simulated nulls."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from loglik.errors import InputError
from loglik.signals.detection import auprc, auroc, auroc_stderr, detector_report, fpr_at_tpr, roc_curve

EVERY = (auroc, auprc, fpr_at_tpr, auroc_stderr, roc_curve, detector_report)


def drawn(seed: int, n: int = 300, digits: int | None = 1, share: float = 0.3):
    """Scores with (many) ties, somewhat higher for positives."""
    r = np.random.default_rng(seed)
    positive = r.random(n) < share
    scores = r.normal(size=n) + 0.8 * positive
    return (scores if digits is None else scores.round(digits)), positive


# ------------------------------------------------------------------ values
@pytest.mark.parametrize("digits", [None, 2, 1, 0])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed, digits):
    scores, positive = drawn(seed, digits=digits)
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
    assert auprc(scores, positive) == pytest.approx(metrics.average_precision_score(positive, scores), abs=1e-12)
    curve = roc_curve(scores, positive)
    fpr, tpr, thresholds = metrics.roc_curve(positive, scores, drop_intermediate=False)
    for mine, other in ((curve.fpr, fpr), (curve.tpr, tpr), (curve.thresholds, thresholds)):
        np.testing.assert_allclose(mine, other, atol=1e-12, rtol=0)
    precision, recall, at = metrics.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(curve.precision[1:], precision[:-1][::-1], atol=1e-12, rtol=0)
    np.testing.assert_allclose(curve.tpr[1:], recall[:-1][::-1], atol=1e-12, rtol=0)
    np.testing.assert_allclose(curve.thresholds[1:], at[::-1], atol=0, rtol=0)
    for rate in (0.05, 0.5, 0.8, 0.95, 1.0):
        assert fpr_at_tpr(scores, positive, tpr=rate) == fpr[tpr >= rate - 1e-12].min()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_equal_to_the_enumeration_of_pairs(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    if positive.all() or not positive.any():
        return
    own, other = scores[positive], scores[~positive]
    wins = [(a > b) + 0.5 * (a == b) for a, b in product(own, other)]
    assert auroc(scores, positive) == pytest.approx(float(np.mean(wins)), abs=1e-14)
    if min(len(own), len(other)) > 1:
        placed = np.array(wins).reshape(len(own), len(other))
        variance = placed.mean(1).var(ddof=1) / len(own) + placed.mean(0).var(ddof=1) / len(other)
        assert auroc_stderr(scores, positive) == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_perfect_reversed_and_constant_scores():
    positive = np.array([1, 1, 0, 0, 0])
    perfect = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert (auroc(perfect, positive), auprc(perfect, positive), fpr_at_tpr(perfect, positive)) == (1.0, 1.0, 0.0)
    assert (auroc(-perfect, positive), fpr_at_tpr(-perfect, positive)) == (0.0, 1.0)
    constant = np.zeros(5)
    assert auroc(constant, positive) == 0.5
    assert auprc(constant, positive) == pytest.approx(0.4)
    assert fpr_at_tpr(constant, positive, tpr=0.01) == 1.0
    assert auroc_stderr(constant, positive) == 0.0


def test_hit_rate_is_reached_at_whole_numbers():
    """0.95 of 20 positives is 19 of them, though 0.95 * 20 in floating point need not be."""
    for n in (20, 40, 60, 100, 140, 180):
        scores = np.concatenate([np.arange(n, 0, -1.0), np.arange(n, 0, -1.0) - 0.5])  # one negative under each
        positive = np.arange(2 * n) < n
        assert fpr_at_tpr(scores, positive, tpr=0.95) == pytest.approx((round(0.95 * n) - 1) / n, abs=1e-12)


def test_invariances():
    scores, positive = drawn(0)
    every = (auroc, auprc, fpr_at_tpr, auroc_stderr)
    values = [f(scores, positive) for f in every]
    order = np.random.default_rng(1).permutation(len(scores))
    np.testing.assert_allclose([f(scores[order], positive[order]) for f in every], values, atol=1e-14)
    np.testing.assert_allclose([f(np.exp(3 * scores), positive) for f in every], values, atol=1e-14)
    # The other class with the other sign is the same detector.
    assert auroc(-scores, ~positive) == pytest.approx(values[0], abs=1e-14)
    assert auroc(-scores, positive) == pytest.approx(1 - values[0], abs=1e-14)
    twice = [f(np.tile(scores, 2), np.tile(positive, 2)) for f in (auroc, auprc, fpr_at_tpr)]
    np.testing.assert_allclose(twice, values[:3], atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.long])
def test_tensors_lists_and_arrays_agree(dtype):
    scores, positive = drawn(2, digits=0)
    expected = auroc(scores, positive)
    kept = torch.from_numpy(scores).to(dtype)
    assert auroc(kept, torch.from_numpy(positive)) == expected
    assert auroc(scores.tolist(), positive.astype(int).tolist()) == expected
    assert auroc(kept.float().requires_grad_(), torch.from_numpy(positive).float()) == expected


def test_infinite_scores_are_ends_of_the_order():
    assert auroc([math.inf, 0.0, -math.inf, -math.inf], [1, 0, 0, 1]) == pytest.approx((2 + 0 + 0.5) / 4)


def test_neighbouring_doubles_are_told_apart():
    assert auroc([1.0, np.nextafter(1.0, 2.0)], [0, 1]) == 1.0


# ------------------------------------------------------------------ errors of estimates
def test_delong_under_the_null_and_the_binormal_alternative():
    """AUROC is Phi(d / sqrt 2); 400 data sets: the standard error is right, and the standardised error normal."""
    r = np.random.default_rng(11)
    for shift in (0.0, 1.0):
        truth = stats.norm.cdf(shift / math.sqrt(2))
        z, errors, areas = [], [], []
        for _ in range(400):
            scores = np.concatenate([r.normal(shift, 1, 80), r.normal(0, 1, 120)])
            positive = np.arange(200) < 80
            areas.append(auroc(scores, positive))
            errors.append(auroc_stderr(scores, positive))
            z.append((areas[-1] - truth) / errors[-1])
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(areas), rel=0.12)  # 3.4 of its own errors
        assert stats.kstest(z, "norm").pvalue > 0.001


def test_null_distribution_is_that_of_mann_whitney():
    """All 20 ways to choose 3 of 6 as positives: mean 1/2, variance (n+ + n- + 1) / (12 n+ n-)."""
    areas = [
        auroc(np.arange(6.0), np.isin(np.arange(6), own))
        for own in product(range(6), repeat=3)
        if own[0] < own[1] < own[2]
    ]
    assert len(areas) == 20
    assert np.mean(areas) == pytest.approx(0.5, abs=1e-14)
    assert np.var(areas) == pytest.approx(7 / (12 * 9), abs=1e-14)


def test_bootstrap_intervals_cover():
    """Nominal 90 % over 120 data sets: between 82 and 98 % (3 standard errors)."""
    truth, covered = stats.norm.cdf(1 / math.sqrt(2)), 0
    r = np.random.default_rng(12)
    for seed in range(120):
        scores = np.concatenate([r.normal(1, 1, 60), r.normal(0, 1, 60)])
        found = detector_report(scores, np.arange(120) < 60, bootstrap=150, level=0.9, seed=seed).auroc
        covered += found.low <= truth <= found.high
    assert 98 <= covered <= 118


def test_bootstrap_is_the_exact_distribution_on_a_small_case():
    """Two of each class: all 16 resamples have known areas; quantiles of many draws are those of the 16."""
    scores, positive = np.array([4.0, 2.0, 3.0, 1.0]), np.array([1, 1, 0, 0])
    areas = [
        auroc([a, b, c, d], [1, 1, 0, 0]) for a, b in product((4, 2), repeat=2) for c, d in product((3, 1), repeat=2)
    ]
    found = detector_report(scores, positive, bootstrap=4000, level=0.8)
    assert found.auroc.value == 0.75
    expected = np.quantile(areas, [0.1, 0.9], method="inverted_cdf")
    np.testing.assert_allclose([found.auroc.low, found.auroc.high], expected, atol=1e-12)


def test_report_agrees_with_the_functions():
    scores, positive = drawn(3)
    found = detector_report(scores, positive, bootstrap=50, tpr=0.8)
    assert found.auroc.value == auroc(scores, positive)
    assert found.auprc.value == auprc(scores, positive)
    assert found.fpr_at_tpr.value == fpr_at_tpr(scores, positive, tpr=0.8)
    assert found.auroc_stderr == auroc_stderr(scores, positive)
    assert found.prevalence == pytest.approx(positive.mean())
    assert found == detector_report(torch.from_numpy(scores), torch.from_numpy(positive), bootstrap=50, tpr=0.8)
    assert found != detector_report(scores, positive, bootstrap=50, tpr=0.8, seed=1)
    wide = detector_report(scores, positive, bootstrap=50, tpr=0.8, level=0.99)
    for name in ("auroc", "auprc", "fpr_at_tpr"):
        mine, other = getattr(found, name), getattr(wide, name)
        assert other.low <= mine.low <= mine.value <= mine.high <= other.high
    record = found.record()
    assert record["fpr_at_0.8"] == found.fpr_at_tpr.value
    assert (record["positives"], record["negatives"]) == (positive.sum(), (~positive).sum())


def test_one_member_of_a_class_has_no_standard_error():
    found = detector_report([3.0, 2.0, 1.0], [1, 0, 0], bootstrap=20)
    assert found.auroc_stderr is None
    assert (found.auroc.low, found.auroc.high) == (1.0, 1.0)
    with pytest.raises(InputError, match="two of each class, and there is one positive row"):
        auroc_stderr([3.0, 2.0, 1.0], [1, 0, 0])


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("f", EVERY)
@pytest.mark.parametrize(
    ("scores", "positive", "sentence"),
    [
        ([1.0, 2.0], [1, 1], r"undefined with one class only.*all 2 rows are positive"),
        ([1.0, 2.0], [0, 0], r"undefined with one class only.*all 2 rows are negative"),
        ([], [], r"undefined with one class only.*there are no rows"),
        ([1.0, math.nan, 2.0, math.nan], [1, 0, 1, 0], r"NaN in row 1, 3"),
        ([math.nan] * 9, [1, 0, 1] * 3, r"NaN in row 0, 1, 2, 3, 4 and 4 more"),
        ([1.0, 2.0], [1, 0, 1], r"of one length, got 2 and 3"),
        ([1.0, 2.0], [1, 2], r"must be 0 or 1.*got 2 in row 1"),
        ([1.0, 2.0], [1, math.nan], r"got nan in row 1"),
        ([1.0, 2.0], [1, -1], r"got -1 in row 1"),
        ([[1.0], [2.0]], [1, 0], r"scores must have shape \(N,\), got \(2, 1\)"),
        ([1.0, 2.0], ["yes", "no"], r"positive must be numbers"),
        ([[1.0], [2.0, 3.0]], [1, 0], r"numbers"),
    ],
)
def test_what_has_no_answer_is_refused(f, scores, positive, sentence):
    with pytest.raises(InputError, match=sentence):
        f(scores, positive)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tpr": 0.0}, "tpr"),
        ({"tpr": 1.1}, "tpr"),
        ({"tpr": math.nan}, "tpr"),
        ({"level": 0.0}, "level"),
        ({"level": 1.0}, "level"),
        ({"bootstrap": 0}, "bootstrap"),
        ({"bootstrap": 2.5}, "bootstrap"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        detector_report([1.0, 2.0], [0, 1], **options)
