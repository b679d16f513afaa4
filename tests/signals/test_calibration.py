"""Calibration metrics against hand-written enumeration, scikit-learn, closed forms and known nulls."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from loglik.errors import InputError
from loglik.signals.calibration import (
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    multiclass_brier_score,
    negative_log_likelihood,
    reliability_diagram,
    top_label,
)
from loglik.signals.metacognition import (
    calibration_report,
    compare_calibration,
    fit_threshold,
    risk_coverage_curve,
    wrong_at_confidence,
)


def drawn(seed: int, n: int = 400, digits: int | None = None, distort: float = 1.7):
    """Over-confident confidences."""
    r = np.random.default_rng(seed)
    true = r.beta(2, 1, n)
    confidence = true**distort / (true**distort + (1 - true) ** distort)
    return (confidence if digits is None else confidence.round(digits)), r.random(n) < true


def classes(seed: int, n: int = 200, k: int = 4):
    r = np.random.default_rng(seed)
    logits = torch.from_numpy(r.normal(size=(n, k)) * 2)
    log_probs = logits.log_softmax(1)
    labels = torch.from_numpy(np.array([r.choice(k, p=p) for p in (logits * 0.6).softmax(1).numpy()]))
    return log_probs, labels


def by_hand(confidence, correct, bins, norm="l1"):
    """One row at a time, one bin at a time: [b/B, (b+1)/B), the last with 1."""
    gaps = []
    for b in range(bins):
        inside = [
            (c, y)
            for c, y in zip(confidence.tolist(), correct.tolist(), strict=True)
            if b / bins <= c < (b + 1) / bins or (b == bins - 1 and c == 1)
        ]
        if inside:
            gaps.append((len(inside) / len(confidence), abs(sum(c - y for c, y in inside) / len(inside))))
    if norm == "max":
        return max(g for _, g in gaps)
    power = {"l1": 1, "l2": 2}[norm]
    return sum(w * g**power for w, g in gaps) ** (1 / power)


# ------------------------------------------------------------------ calibration error
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("digits", [None, 2, 1])
@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_equal_to_the_definition(bins, digits, norm):
    confidence, correct = drawn(bins, digits=digits)
    expected = by_hand(confidence, correct, bins, norm)
    assert expected_calibration_error(confidence, correct, bins=bins, norm=norm) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_equal_to_the_form_of_torchmetrics(norm):
    """Buckets closed on the left, their sums by index_add; a confidence of 1 would have a bucket of its own there."""
    confidence, correct = (torch.from_numpy(x) for x in drawn(3))
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    bucket = torch.bucketize(confidence, edges, right=True) - 1
    count, conf, acc = (
        torch.zeros(16, dtype=torch.float64).index_add_(0, bucket, w)
        for w in (torch.ones_like(confidence), confidence, correct.double())
    )
    gap = ((conf - acc) / count).nan_to_num().abs()
    share = count / count.sum()
    expected = {"l1": (gap * share).sum(), "l2": (gap**2 * share).sum().sqrt(), "max": gap.max()}[norm]
    found = expected_calibration_error(confidence, correct, bins=15, norm=norm)
    assert found == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_bins_are_those_of_scikit_learn(scheme):
    """For confidences that are all different and no edge."""
    confidence, correct = drawn(4, n=150)
    strategy = {"width": "uniform", "mass": "quantile"}[scheme]
    rate, mean = calibration_curve(correct, confidence, n_bins=15, strategy=strategy)
    found = reliability_diagram(confidence, correct, bins=15, scheme=scheme)
    np.testing.assert_allclose(found.accuracy, rate, atol=1e-12)
    np.testing.assert_allclose(found.confidence, mean, atol=1e-12)
    if scheme == "mass":
        assert found.count.tolist() == [10] * 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_edges_belong_to_the_bin_above(dtype):
    """0.1 ... 0.9 as users write them, in either precision: ten bins of one row each, and 1 joins the last."""
    confidence = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    found = reliability_diagram(confidence, torch.ones(11), bins=10)
    assert found.count.tolist() == [1] * 9 + [2]


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_order_of_rows_changes_nothing(scheme):
    """Many ties: bins by mass that split them would depend on the order."""
    confidence, correct = drawn(5, digits=1)
    values = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(correct))
        values.add(round(expected_calibration_error(confidence[order], correct[order], bins=9, scheme=scheme), 14))
    assert len(values) == 1


def test_mass_bins_keep_ties_together():
    found = reliability_diagram([0.2] * 6 + [0.4, 0.6], [1, 0, 0, 0, 0, 0, 1, 1], bins=4, scheme="mass")
    assert found.count.tolist() == [6, 2]
    np.testing.assert_allclose(found.accuracy, [1 / 6, 1.0])
    # The middle of a tie decides: four of ranks 3 to 6 of 8 belong to the upper half.
    assert reliability_diagram([0.2] * 3 + [0.4] * 4 + [0.6], [1] * 8, bins=2, scheme="mass").count.tolist() == [3, 5]


def test_uniform_confidences_that_come_true():
    """c ~ U(0, 1), y ~ Bernoulli(c): ECE 0, Brier 1/6, wrong at t (1 - t)/2, AURC 1/4."""
    r = np.random.default_rng(11)
    confidence = r.random(400_000)
    correct = r.random(400_000) < confidence
    assert expected_calibration_error(confidence, correct, bins=10) < 0.004
    assert brier_score(confidence, correct) == pytest.approx(1 / 6, abs=0.001)
    assert negative_log_likelihood(np.log([[0.25, 0.75]] * 4), [1, 1, 1, 0]) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    for at in wrong_at_confidence(confidence, correct):
        assert at.rate == pytest.approx((1 - at.threshold) / 2, abs=0.005)
        assert at.low < at.rate < at.high
    assert risk_coverage_curve(confidence, correct).aurc == pytest.approx(0.25, abs=0.004)


def test_constant_confidence():
    correct = np.arange(10) < 6
    confidence = np.full(10, 0.9)
    for norm in ("l1", "l2", "max"):
        assert expected_calibration_error(confidence, correct, bins=5, norm=norm) == pytest.approx(0.3)
    assert brier_score(confidence, correct) == pytest.approx(0.09 + 0.24)
    assert risk_coverage_curve(confidence, correct).aurc == pytest.approx(0.4)


def test_l1_is_at_most_l2_is_at_most_max():
    for seed in range(5):
        l1, l2, largest = (expected_calibration_error(*drawn(seed), norm=norm) for norm in ("l1", "l2", "max"))
        assert l1 <= l2 <= largest


# ------------------------------------------------------------------ debiasing
def test_debiased_square_is_unbiased():
    """All outcomes of five rows: the mean of the squared error is that of the true probability, not more.

    Another bin with gap 1 keeps the sum positive, so that nothing is cut off at 0.
    """
    p, stated = 0.3, 0.45
    confidence = np.array([stated] * 5 + [1.0] * 2)
    plain = debiased = 0.0
    for outcomes in product((0, 1), repeat=5):
        weight = math.prod(p if y else 1 - p for y in outcomes)
        correct = np.array([*outcomes, 0, 0])
        for debias in (False, True):
            square = expected_calibration_error(confidence, correct, bins=2, norm="l2", debias=debias) ** 2
            plain, debiased = (plain, debiased + weight * square) if debias else (plain + weight * square, debiased)
    truth = 5 / 7 * (stated - p) ** 2 + 2 / 7
    assert debiased == pytest.approx(truth, abs=1e-12)
    assert plain == pytest.approx(truth + 5 / 7 * p * (1 - p) / 5, abs=1e-12)


def test_debiased_l1_is_the_mean_over_normal_resamples():
    confidence, correct = drawn(6, n=300)
    found = reliability_diagram(confidence, correct, bins=10)
    weight = found.count / found.count.sum()
    spread = np.sqrt(found.accuracy * (1 - found.accuracy) / found.count)
    r = np.random.default_rng(0)
    labels = found.accuracy + spread * r.normal(size=(200_000, len(weight)))
    plain = expected_calibration_error(confidence, correct, bins=10)
    expected = 2 * plain - (np.abs(labels - found.confidence) @ weight).mean()
    assert expected_calibration_error(confidence, correct, bins=10, debias=True) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_debiasing_where_nothing_is_wrong(norm):
    """40 data sets with true confidences: the plug-in value is all bias.

    Of a normal gap g with mean 0 and deviation s, l1 keeps E[2|g| - E|N(g, s)|] / E|g| = 2 - sqrt 2.
    """
    plain, debiased = [], []
    for seed in range(40):
        r = np.random.default_rng(seed)
        confidence = r.random(300)
        correct = r.random(300) < confidence
        plain.append(expected_calibration_error(confidence, correct, bins=10, norm=norm))
        debiased.append(expected_calibration_error(confidence, correct, bins=10, norm=norm, debias=True))
    left = np.mean(debiased) / np.mean(plain)
    assert left < 0.5 if norm == "l2" else left == pytest.approx(2 - math.sqrt(2), abs=0.06)


def test_debiasing_leaves_certain_bins():
    """A bin without variance has no bias: gap 0.25 and 0.1, both certain."""
    found = expected_calibration_error([0.25, 0.25, 0.9, 0.9], [0, 0, 1, 1], bins=2, debias=True)
    assert found == pytest.approx(0.175)


# ------------------------------------------------------------------ classes
def test_top_label_and_classwise_error_by_hand():
    log_probs, labels = classes(0)
    probs = log_probs.exp()
    confidence, correct = top_label(log_probs, labels)
    np.testing.assert_allclose(confidence, probs.amax(1), atol=1e-15)
    assert correct.tolist() == (probs.argmax(1) == labels).tolist()
    mean = np.mean([by_hand(probs[:, k], (labels == k).long(), 10) for k in range(4)])
    assert classwise_calibration_error(log_probs, labels, bins=10) == pytest.approx(mean, abs=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    renamed = classwise_calibration_error(log_probs[:, order], order.argsort()[labels], bins=10)
    assert renamed == pytest.approx(mean, abs=1e-12)
    adaptive = classwise_calibration_error(log_probs, labels, bins=10, scheme="mass")
    each = []
    for k in range(4):  # 200 different values: bins of 20 by rank
        rank = probs[:, k].argsort()
        gaps = (probs[:, k][rank] - (labels == k).double()[rank]).reshape(10, 20).mean(1)
        each.append(float(gaps.abs().mean()))
    assert adaptive == pytest.approx(np.mean(each), abs=1e-12)


def test_scores_equal_scikit_learn():
    log_probs, labels = classes(1)
    probs = log_probs.exp().numpy()
    assert negative_log_likelihood(log_probs, labels) == pytest.approx(log_loss(labels, probs), abs=1e-12)
    expected = brier_score_loss(labels, probs, scale_by_half=False)
    assert multiclass_brier_score(log_probs, labels) == pytest.approx(expected, abs=1e-12)
    confidence, correct = drawn(7)
    assert brier_score(confidence, correct) == pytest.approx(brier_score_loss(correct, confidence), abs=1e-12)
    pair = np.log(np.stack([1 - confidence, confidence], 1))
    assert multiclass_brier_score(pair, correct) == pytest.approx(2 * brier_score(confidence, correct), abs=1e-12)


# ------------------------------------------------------------------ Brier parts
def test_decomposition_is_exact_for_equal_confidences():
    confidence, correct = drawn(8, digits=1)
    found = brier_decomposition(confidence, correct)
    assert found.within == 0.0
    parts = found.reliability - found.resolution + found.uncertainty
    assert parts == pytest.approx(brier_score(confidence, correct), abs=1e-14)
    assert found.score == pytest.approx(parts, abs=1e-14)
    groups = [(confidence == c) for c in np.unique(confidence)]
    rates = [correct[g].mean() for g in groups]
    weights = [g.mean() for g in groups]
    expected = sum(w * (c - y) ** 2 for w, c, y in zip(weights, np.unique(confidence), rates, strict=True))
    assert found.reliability == pytest.approx(expected, abs=1e-14)
    assert found.resolution == pytest.approx(
        sum(w * (y - correct.mean()) ** 2 for w, y in zip(weights, rates, strict=True)), abs=1e-14
    )
    assert found.uncertainty == pytest.approx(correct.var(), abs=1e-14)


def test_within_is_variance_less_covariance_inside_bins():
    confidence, correct = drawn(9)
    found = brier_decomposition(confidence, correct, bins=10)
    expected = 0.0
    for b in range(10):
        inside = (confidence * 10).astype(int).clip(max=9) == b
        if inside.any():
            spread, agreement = confidence[inside], correct[inside]
            covariance = ((spread - spread.mean()) * (agreement - agreement.mean())).mean()
            expected += inside.mean() * (spread.var() - 2 * covariance)
    assert found.within == pytest.approx(expected, abs=1e-12)
    assert found.reliability == pytest.approx(
        expected_calibration_error(confidence, correct, bins=10, norm="l2") ** 2, abs=1e-12
    )


# ------------------------------------------------------------------ risk and coverage
def test_ties_are_the_mean_over_all_orders():
    confidence = np.array([0.9, 0.9, 0.9, 0.5, 0.5, 0.2])
    correct = np.array([1, 0, 1, 0, 1, 0])
    curves = []
    for order in permutations(range(6)):
        rows = sorted(order, key=lambda i: -confidence[i])  # stable: ties stay in the order of the permutation
        curves.append(np.cumsum(1 - correct[rows]) / np.arange(1, 7))
    found = risk_coverage_curve(confidence, correct)
    np.testing.assert_allclose(found.risk, np.mean(curves, 0), atol=1e-12)
    assert found.aurc == pytest.approx(np.mean(curves), abs=1e-12)
    np.testing.assert_allclose(found.coverage, np.arange(1, 7) / 6)


def test_perfect_ranking_is_the_least_area_and_reversed_the_largest():
    correct = np.array([1, 1, 1, 1, 0, 0])
    areas = {risk_coverage_curve(np.array(order), correct).aurc for order in permutations(range(6))}
    perfect, reversed_ = (risk_coverage_curve(c, correct) for c in (-np.arange(6), np.arange(6)))
    assert perfect.aurc == perfect.optimal == pytest.approx(min(areas), abs=1e-15)
    assert perfect.excess == 0.0
    assert reversed_.aurc == pytest.approx(max(areas), abs=1e-15)
    assert reversed_.optimal == perfect.optimal


@pytest.mark.parametrize("wrong", [0.1, 0.5, 0.9])
def test_least_area_has_its_closed_form(wrong):
    correct = np.arange(20_000) >= wrong * 20_000
    found = risk_coverage_curve(correct, correct)
    assert found.aurc == pytest.approx(wrong + (1 - wrong) * math.log(1 - wrong), abs=1e-3)


def test_only_the_order_counts():
    confidence, correct = drawn(10, digits=2)
    found, mapped = risk_coverage_curve(confidence, correct), risk_coverage_curve(np.exp(9 * confidence), correct)
    np.testing.assert_array_equal(found.risk, mapped.risk)
    assert expected_calibration_error(confidence, correct) != expected_calibration_error(confidence**3, correct)


def test_risk_at_a_coverage():
    found = risk_coverage_curve(np.arange(100.0, 0, -1), np.arange(100) < 7)
    assert found.at(0.07) == 0.0  # 0.07 * 100 is 7 answers, not 8, whatever floating point makes of it
    assert found.at(0.071) == pytest.approx(1 / 8)
    assert found.at(1.0) == pytest.approx(0.93)
    for coverage in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match="coverage"):
            found.at(coverage)


def test_no_errors_and_only_errors():
    assert risk_coverage_curve([0.1, 0.2], [1, 1]).aurc == 0.0
    found = risk_coverage_curve([0.1, 0.2], [0, 0])
    assert (found.aurc, found.optimal) == (1.0, 1.0)


# ------------------------------------------------------------------ wrong at high confidence, intervals, threshold
def test_wrong_at_confidence_counts_and_intervals():
    confidence = torch.tensor([0.95, 0.9, 0.9, 0.85, 0.5])  # float32, whose 0.9 is below 9/10
    found = wrong_at_confidence(confidence, [1, 0, 1, 0, 0], (0.8, 0.9, 0.99))
    assert [(at.count, at.wrong) for at in found] == [(4, 2), (3, 1), (0, 0)]
    assert [at.rate for at in found] == [0.5, pytest.approx(1 / 3), None]
    for at in found[:2]:
        exact = stats.binomtest(at.wrong, at.count).proportion_ci(0.95, method="exact")
        assert (at.low, at.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert (found[2].low, found[2].high) == (0.0, 1.0)


def test_reliability_intervals_are_clopper_pearson():
    confidence, correct = drawn(11, n=60)
    found = reliability_diagram(confidence, correct, bins=12, level=0.9)
    for low, high, rate, count in zip(found.low, found.high, found.accuracy, found.count, strict=True):
        exact = stats.binomtest(round(rate * count), int(count)).proportion_ci(0.9, method="exact")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.count.sum() == 60


def test_threshold_is_the_best_of_the_grid():
    r = np.random.default_rng(3)
    similarity = r.random(80).round(2)
    human = r.random(80) < similarity
    found = fit_threshold(similarity, human)
    grid = [f1_score(human, similarity >= t / 100, zero_division=0) for t in range(101)]
    assert found.f1 == pytest.approx(max(grid), abs=1e-12)
    assert found.threshold == int(np.argmax(grid)) / 100  # the smallest of equal ones
    chosen = similarity >= found.threshold
    assert found.precision == pytest.approx(human[chosen].mean())
    assert found.recall == pytest.approx(chosen[human].mean())
    flat = fit_threshold([0.2, 0.2, 0.61, 0.61], [0, 0, 1, 1])
    assert (flat.threshold, flat.f1) == (0.21, 1.0)
    single = fit_threshold(torch.tensor([0.2, 0.61]), [0, 1])
    assert single.threshold == 0.21


# ------------------------------------------------------------------ report
def test_report_agrees_with_the_functions():
    confidence, correct = drawn(12, n=120)
    found = calibration_report(confidence, correct, bootstrap=30)
    assert found.accuracy.value == correct.mean()
    assert found.confidence.value == pytest.approx(confidence.mean())
    assert found.ece.value == expected_calibration_error(confidence, correct, bins=10)
    assert found.brier.value == brier_score(confidence, correct)
    curve = risk_coverage_curve(confidence, correct)
    assert (found.aurc.value, found.excess_aurc.value) == (curve.aurc, curve.excess)
    assert found.wrong_at == wrong_at_confidence(confidence, correct)
    assert found == calibration_report(confidence, correct, bootstrap=30)
    record = found.record()
    assert record["wrong_at_0.9"] == found.wrong_at[1].rate
    assert record["ece_low"] <= record["ece_high"]


def test_bootstrap_of_items_is_the_binomial_one():
    """Resampled accuracy is binomial: quantiles of many resamples are its quantiles."""
    correct = np.arange(50) < 30
    found = calibration_report(np.full(50, 0.6), correct, bins=1, bootstrap=1500, level=0.9).accuracy
    expected = stats.binom(50, 0.6).ppf([0.05, 0.95]) / 50
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.021)


def test_paired_differences():
    confidence, correct = drawn(13, n=120)
    other = confidence**2
    same = compare_calibration((confidence, correct), (confidence, correct), bootstrap=20)
    assert all((e.value, e.low, e.high) == (0.0, 0.0, 0.0) for e in same.values())
    found = compare_calibration((other, correct), (confidence, correct), bootstrap=200)
    reports = [calibration_report(c, correct, bootstrap=200) for c in (other, confidence)]
    for name, estimate in found.items():
        mine, theirs = (getattr(report, name) for report in reports)
        assert estimate.value == pytest.approx(mine.value - theirs.value, abs=1e-12)
    # The same order and the same answers: no difference in any resample, which unpaired ones would not give.
    for name in ("accuracy", "aurc", "excess_aurc"):
        assert (found[name].low, found[name].high) == (0.0, 0.0)
    assert found["confidence"].high < 0


# ------------------------------------------------------------------ bad input
PAIRED = (expected_calibration_error, reliability_diagram, brier_score, brier_decomposition, calibration_report)


@pytest.mark.parametrize("f", PAIRED)
@pytest.mark.parametrize(
    ("confidence", "correct", "sentence"),
    [
        ([0.5, 80.0], [1, 0], r"must lie in \[0, 1\], got 80.0 in row 1"),
        ([-0.1, 0.5], [1, 0], r"must lie in \[0, 1\], got -0.1 in row 0"),
        ([0.5, math.nan], [1, 0], r"NaN in row 1"),
        ([0.5, math.inf], [1, 0], r"got inf in row 1"),
        ([0.5, 0.5], [1], r"of one length, got 2 and 1"),
        ([0.5, 0.5], [1, 3], r"correct must be 0 or 1.*got 3 in row 1"),
        ([], [], r"no rows"),
        ([[0.5]], [1], r"shape \(N,\)"),
        (["a"], [1], r"must be numbers"),
    ],
)
def test_what_has_no_answer_is_refused(f, confidence, correct, sentence):
    with pytest.raises(InputError, match=sentence):
        f(confidence, correct)


@pytest.mark.parametrize("scheme", ["width", "mass"])
@pytest.mark.parametrize(
    "f", [expected_calibration_error, reliability_diagram, calibration_report, brier_decomposition]
)
def test_fewer_rows_than_bins(f, scheme):
    with pytest.raises(InputError, match="3 rows cannot fill 10 bins: set bins to 3 or less"):
        f([0.1, 0.5, 0.9], [0, 1, 1], bins=10, scheme=scheme)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: expected_calibration_error([0.5], [1], bins=0), "bins"),
        (lambda: expected_calibration_error([0.5], [1], bins=1.0), "bins"),
        (lambda: expected_calibration_error([0.5], [1], bins=1, scheme="equal"), "scheme must be one of"),
        (lambda: expected_calibration_error([0.5], [1], bins=1, norm="l3"), "norm must be one of"),
        (lambda: expected_calibration_error([0.5], [1], bins=1, norm="max", debias=True), "no estimate"),
        (lambda: expected_calibration_error([0.5], [1], bins=1, debias=True), "two rows in each bin"),
        (lambda: reliability_diagram([0.5], [1], bins=1, level=1.0), "level"),
        (lambda: wrong_at_confidence([0.5], [1], (90,)), "threshold must lie"),
        (lambda: wrong_at_confidence([0.5], [1], level=0.0), "level"),
        (lambda: risk_coverage_curve([math.nan], [1]), "NaN in row 0"),
        (lambda: risk_coverage_curve([], []), "no rows"),
        (lambda: calibration_report([0.5], [1], bins=1, bootstrap=0), "bootstrap"),
        (lambda: calibration_report([0.5], [1], bins=1, level=2.0), "level"),
        (lambda: compare_calibration(([0.5], [1]), ([0.5, 0.5], [1, 0]), bins=1), "the same items, got 1 and 2"),
        (lambda: compare_calibration(([0.5], [1]), ([0.5], [1]), bins=1, level=2.0), "level"),
        (lambda: fit_threshold([0.5, 0.6], [0, 0]), "no human label is positive"),
        (lambda: fit_threshold([0.5], [1], steps=0), "steps"),
        (lambda: fit_threshold([1.5], [1]), r"similarity must lie in \[0, 1\], got 1.5 in row 0"),
        (lambda: negative_log_likelihood([[1.0, 2.0]], [0]), "sum to 10.11 and not to 1"),
        (lambda: negative_log_likelihood([[math.nan, 0.0]], [0]), "row 0 are no distribution"),
        (lambda: negative_log_likelihood([[-math.inf, -math.inf]], [0]), "row 0 are no distribution"),
        (lambda: negative_log_likelihood([[-math.inf, 0.0]], [0]), "row 0 gives its label probability 0"),
        (lambda: negative_log_likelihood(np.log([[0.5, 0.5]]), [2]), "from 0 to 1, got 2 in row 0"),
        (lambda: negative_log_likelihood(np.log([[0.5, 0.5]]), [0.5]), "whole numbers"),
        (lambda: negative_log_likelihood(np.log([[0.5, 0.5]]), [0, 1]), "need labels"),
        (lambda: negative_log_likelihood(np.zeros((0, 2)), []), "at least one row"),
        (lambda: top_label([0.0], [0]), "shape"),
        (lambda: classwise_calibration_error(np.log([[0.5, 0.5]]), [0], bins=2), "1 rows cannot fill 2 bins"),
    ],
)
def test_options_out_of_range_are_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
