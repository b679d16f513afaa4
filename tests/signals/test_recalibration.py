"""Recalibration against optimisers, scikit-learn and plain loops; maps that must keep the order of classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression

from loglik.errors import InputError
from loglik.signals.calibration import expected_calibration_error, negative_log_likelihood, top_label
from loglik.signals.h_calibration import HCalibration, h_calibration_loss, probability_clusters
from loglik.signals.monotone_maps import MonotoneNetwork, MonotonePiecewiseLinear, TemperatureEnsemble
from loglik.signals.recalibration import (
    IsotonicCalibration,
    IsotonicConfidence,
    TemperatureScaling,
    VectorScaling,
    binary_log_probs,
)


def world(seed: int, n: int = 1000, k: int = 5, scale: float = 1.5):
    """True log-probabilities and labels drawn from them."""
    r = np.random.default_rng(seed)
    logits = torch.from_numpy(r.normal(size=(n, k)) * scale)
    true = logits.log_softmax(1)
    gumbel = torch.from_numpy(r.gumbel(size=(n, k)))
    return true, (true + gumbel).argmax(1)


# ------------------------------------------------------------------ temperature
@pytest.mark.parametrize("seed", range(3))
def test_temperature_is_the_most_likely_one(seed):
    true, labels = world(seed, n=300)
    logits = 2.5 * true + 3.0  # a constant per row changes nothing
    found = TemperatureScaling().fit(logits, labels)

    def nll(log_t):
        return negative_log_likelihood((logits / math.exp(log_t)).log_softmax(1), labels)

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    assert math.log(found.temperature_) == pytest.approx(best.x, abs=1e-5)
    mapped = found.predict_log_proba(logits)
    torch.testing.assert_close(mapped, (logits / found.temperature_).log_softmax(1))
    # Where the likelihood is greatest the label's logit is on average the expected one.
    own, expected = logits.gather(1, labels[:, None]).mean(), (mapped.exp() * logits).sum(1).mean()
    assert float(own) == pytest.approx(float(expected), abs=1e-9)
    assert bool((mapped.argmax(1) == logits.argmax(1)).all())
    torch.testing.assert_close(found.transform(logits), mapped)


def test_temperature_undoes_a_temperature():
    true, labels = world(3, n=20_000)
    once = TemperatureScaling().fit(true, labels).temperature_
    assert once == pytest.approx(1.0, abs=0.04)
    for factor in (0.2, 3.0, 40.0):
        assert TemperatureScaling().fit(factor * true, labels).temperature_ == pytest.approx(factor * once, rel=1e-9)
    confidence, correct = top_label((3 * true).log_softmax(1), labels)
    mended = TemperatureScaling().fit(3 * true, labels).predict_log_proba(3 * true)
    assert expected_calibration_error(*top_label(mended, labels)) < 0.2 * expected_calibration_error(
        confidence, correct
    )


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose features are its probabilities."""

    def __init__(self, size: int = 2):
        self.size = size
        self.classes_ = np.arange(size)

    def fit(self, x, y):
        return self

    def predict(self, x):
        return x.argmax(1)

    def predict_proba(self, x):
        return x


@pytest.mark.parametrize("k", [2, 3, 5])
def test_isotonic_equals_scikit_learn(k):
    true, labels = world(4, n=400, k=k)
    probs = (2.0 * true).softmax(1)
    fresh = (2.0 * world(5, n=200, k=k)[0]).log_softmax(1)
    other = CalibratedClassifierCV(FrozenEstimator(Given(k)), method="isotonic").fit(probs.numpy(), labels.numpy())
    found = IsotonicCalibration(floor=0.0).fit(probs.log(), labels)
    np.testing.assert_allclose(
        found.predict_log_proba(fresh).exp(), other.predict_proba(fresh.exp().numpy()), atol=1e-10
    )
    floored = IsotonicCalibration(floor=1e-3).fit(probs.log(), labels).predict_log_proba(fresh)
    assert bool((floored > -math.inf).all())
    torch.testing.assert_close(floored.exp().sum(1), torch.ones(200, dtype=torch.float64))


def test_isotonic_row_without_any_frequency_is_uniform():
    log_probs = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]], dtype=torch.float64).log()
    found = IsotonicCalibration(floor=0.0).fit(log_probs, [0, 1, 2])
    torch.testing.assert_close(
        found.predict_log_proba([[1.0, 1.0, 1.0]]).exp(), torch.full((1, 3), 1 / 3, dtype=torch.float64)
    )


def test_isotonic_confidence_is_the_regression():
    r = np.random.default_rng(6)
    confidence = r.random(300)
    correct = r.random(300) < confidence**2
    found = IsotonicConfidence().fit(confidence, correct)
    expected = IsotonicRegression(out_of_bounds="clip").fit(confidence, correct)
    grid = np.linspace(0, 1, 50)
    np.testing.assert_allclose(found.transform(grid), expected.predict(grid), atol=1e-12)
    assert bool((found.transform(grid).diff() >= 0).all())
    with pytest.raises(InputError, match="call fit first"):
        IsotonicConfidence().transform(grid)


def test_binary_log_probs():
    torch.testing.assert_close(
        binary_log_probs([0.0, 0.25, 1.0]).exp(), torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0]]).double()
    )
    with pytest.raises(InputError, match=r"got 1\.5 in row 0"):
        binary_log_probs([1.5])


# ------------------------------------------------------------------ vector scaling
def test_vector_scaling_is_a_minimum_and_no_worse_than_temperature():
    true, labels = world(7, n=600, k=4)
    logits = (2 * true + torch.tensor([0.5, -1.0, 0.0, 0.3])).log_softmax(1)
    found = VectorScaling().fit(logits, labels)
    weight, bias = (torch.tensor(p, requires_grad=True) for p in (found.weight_, found.bias_))
    loss = torch.nn.functional.nll_loss((weight * logits + bias).log_softmax(1), labels)
    loss.backward()
    assert float(torch.stack([weight.grad, bias.grad]).abs().max()) < 1e-6
    assert float(bias.detach().mean()) == pytest.approx(0.0, abs=1e-12)
    mine = negative_log_likelihood(found.predict_log_proba(logits), labels)
    assert mine == pytest.approx(float(loss.detach()), abs=1e-12)
    plain = TemperatureScaling().fit(logits, labels).predict_log_proba(logits)
    assert mine < negative_log_likelihood(plain, labels) - 0.01


def test_vector_scaling_undoes_factors_and_offsets():
    true, labels = world(8, n=20_000, k=3)
    weight, bias = torch.tensor([0.5, 2.0, 1.0]).double(), torch.tensor([1.0, -1.0, 0.0]).double()
    logits = (true - bias) / weight  # normalising them shifts a row by a constant, which unequal factors would see
    found = VectorScaling().fit((logits - logits.logsumexp(1, keepdim=True)), labels)
    mended = found.predict_log_proba(logits)
    assert float((mended.exp() - true.exp()).abs().mean()) < 0.05
    equal = VectorScaling().fit(3 * true + bias, labels)
    np.testing.assert_allclose(equal.weight_, 1 / 3, atol=0.03)
    np.testing.assert_allclose(equal.bias_, -bias / 3, atol=0.08)


def test_vector_scaling_with_a_penalty():
    true, labels = world(9, n=300, k=4)
    none = VectorScaling(penalty=1e6).fit(3 * true, labels)
    np.testing.assert_allclose(none.weight_, 1.0, atol=1e-3)
    np.testing.assert_allclose(none.bias_, 0.0, atol=1e-3)
    few = labels.clamp(max=2)  # class 3 never occurs
    with pytest.raises(InputError, match="class 3 has no row"):
        VectorScaling().fit(true, few)
    assert np.isfinite(VectorScaling(penalty=0.01).fit(true, few).bias_).all()
    with pytest.raises(InputError, match="penalty"):
        VectorScaling(penalty=-1.0)


def test_separated_labels_have_no_best_map():
    true, _ = world(10, n=50, k=3)
    labels = true.argmax(1)
    with pytest.raises(InputError, match="each label is the most probable class"):
        TemperatureScaling().fit(true, labels)
    with pytest.raises(InputError, match="separated"):
        VectorScaling().fit(true, labels)
    with pytest.raises(InputError, match="rank the labels no better than chance"):
        TemperatureScaling().fit(true, true.argmin(1))


def test_impossible_classes_stay_impossible():
    true, labels = world(11, n=200, k=3)
    logits = torch.cat([true, torch.full((200, 1), -torch.inf)], 1)
    plain = TemperatureScaling().fit(2 * true, labels)
    for made in (TemperatureScaling(), VectorScaling(penalty=0.1)):
        mapped = made.fit(2 * logits, labels).predict_log_proba(2 * logits)
        assert bool((mapped[:, 3] == -torch.inf).all())
        torch.testing.assert_close(mapped.exp().sum(1), torch.ones(200, dtype=torch.float64))
    assert TemperatureScaling().fit(2 * logits, labels).temperature_ == pytest.approx(plain.temperature_, rel=1e-9)


# ------------------------------------------------------------------ windowed loss
def loop(probs, labels, window, epsilon=0.0, edges=None, full_ends=False):
    """The loss of all rows, event by event."""
    events = [
        (float(p), float(label == c)) for row, label in zip(probs, labels, strict=True) for c, p in enumerate(row)
    ]
    events.sort(key=lambda event: event[0])
    half, gaps = window // 2, []
    for j in range(len(events)):
        inside = events[max(j - half, 0) : j + half + 1]
        gap = abs(sum(p - o for p, o in inside)) / (len(inside) if full_ends else window)
        gaps.append(max(gap - epsilon, 0.0))
    if edges is None:
        return sum(gaps) / len(gaps)
    members = {}
    for (p, _), gap in zip(events, gaps, strict=True):
        members.setdefault(sum(p >= e for e in edges), []).append(gap)
    return sum(sum(m) / len(m) for m in members.values()) / len(members)


@pytest.mark.parametrize("full_ends", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.05])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_loss_by_hand(window, epsilon, full_ends):
    true, labels = world(12, n=15, k=3)
    probs = true.exp()
    options = {"window": window, "epsilon": epsilon, "full_ends": full_ends}
    found = h_calibration_loss(probs, labels, weighting="mean", **options)
    assert float(found) == pytest.approx(loop(probs, labels, window, epsilon, None, full_ends), abs=1e-12)
    edges = torch.tensor([0.1, 0.4, 0.7]).double()
    found = h_calibration_loss(probs, labels, clusters=edges, **options)
    assert float(found) == pytest.approx(loop(probs, labels, window, epsilon, edges.tolist(), full_ends), abs=1e-12)
    one_out = h_calibration_loss(probs, labels, clusters=edges, leave_one_class_out=True, **options)
    parts = [
        loop(probs[labels != k], labels[labels != k], window, epsilon, edges.tolist(), full_ends) for k in range(3)
    ]
    assert float(one_out) == pytest.approx(sum(parts) / 3, abs=1e-12)


def test_windows_of_one_and_of_all():
    true, labels = world(13, n=40, k=3)
    probs = true.exp()
    hot = torch.nn.functional.one_hot(labels, 3)
    single = h_calibration_loss(probs, labels, window=1, weighting="mean")
    assert float(single) == pytest.approx(float((probs - hot).abs().mean()), abs=1e-14)
    # Both sum to 1 in each row, so that nothing is wrong on the whole, whatever the probabilities are.
    assert float(h_calibration_loss(probs, labels, window=2 * 120 + 1)) < 1e-14
    assert float((probs * (1 - hot) - (1 - probs) * hot - (probs - hot)).abs().max()) < 1e-15
    assert float(h_calibration_loss(probs, labels, window=5, epsilon=1.0)) == 0.0


@pytest.mark.parametrize("one_out", [False, True])
def test_gradient_is_that_of_finite_differences(one_out):
    true, labels = world(14, n=12, k=3)
    probs = true.exp().requires_grad_()
    options = {"window": 5, "clusters": torch.tensor([0.3, 0.6]).double(), "leave_one_class_out": one_out}
    (slope,) = torch.autograd.grad(h_calibration_loss(probs, labels, **options), probs)
    step = 1e-7
    for row, column in ((0, 0), (3, 1), (7, 2), (11, 0)):
        moved = []
        for sign in (1, -1):
            other = probs.detach().clone()
            other[row, column] += sign * step
            moved.append(float(h_calibration_loss(other, labels, **options)))
        assert float(slope[row, column]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-6)


def test_order_of_rows_and_classes_changes_nothing():
    true, labels = world(15, n=60, k=4)
    found = float(h_calibration_loss(true.exp(), labels, window=11))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([2, 0, 3, 1])
    assert float(h_calibration_loss(true.exp()[rows], labels[rows], window=11)) == pytest.approx(found, abs=1e-12)
    renamed = h_calibration_loss(true.exp()[:, columns], columns.argsort()[labels], window=11)
    assert float(renamed) == pytest.approx(found, abs=1e-12)


def test_truth_costs_noise_that_falls_with_the_window():
    """Like M^(-1/2), and far less than a distortion."""
    true, labels = world(16, n=4000, k=10, scale=2.0)
    at = {m: float(h_calibration_loss(true.exp(), labels, window=m, full_ends=True)) for m in (51, 201, 801)}
    for small, large in ((51, 201), (201, 801)):
        assert at[small] / at[large] == pytest.approx(2.0, rel=0.3)
    distorted = (2.5 * true).softmax(1)
    assert float(h_calibration_loss(distorted, labels, window=201, full_ends=True)) > 4 * at[201]
    one_out = float(h_calibration_loss(true.exp(), labels, window=201, leave_one_class_out=True, full_ends=True))
    assert one_out == pytest.approx(at[201], rel=0.25)  # classes are exchangeable here


def test_clusters_are_those_of_k_means():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(500, generator=g, dtype=torch.float64) ** 3
    edges = probability_clusters(values, 6)
    assert bool((edges.diff() > 0).all())
    cluster = torch.searchsorted(edges, values, right=True)
    low, high = values.min(), values.max()
    start = (low + (high - low) * (torch.arange(6) + 0.5) / 6).numpy()[:, None]
    expected = KMeans(6, init=start, n_init=1, tol=0.0, max_iter=300).fit(values.numpy()[:, None])
    order = expected.cluster_centers_[:, 0].argsort().argsort()
    np.testing.assert_array_equal(cluster.numpy(), order[expected.labels_])
    # At rest each member is nearest to its own cluster's mean.
    centres = torch.stack([values[cluster == c].mean() for c in range(6)])
    assert bool(((values[:, None] - centres).abs().argmin(1) == cluster).all())


def test_clusters_without_members_disappear():
    assert len(probability_clusters(torch.tensor([0.1, 0.1, 0.9]).double(), 15)) == 1
    assert len(probability_clusters(torch.full((4,), 0.5), 15)) == 0
    assert len(probability_clusters(torch.rand(4), 1)) == 0


# ------------------------------------------------------------------ maps
def randomised(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = {"piecewise": MonotonePiecewiseLinear, "temperatures": TemperatureEnsemble, "network": MonotoneNetwork}[
        kind
    ]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 2)
    return module


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["piecewise", "temperatures", "network"])
def test_maps_keep_the_order_of_classes(kind, seed):
    """Whatever the parameters are, negative ones included."""
    true, _ = world(17, n=300, k=6, scale=6.0)
    with torch.no_grad():
        mapped = randomised(kind, seed)(true)
    torch.testing.assert_close(mapped.exp().sum(1), torch.ones(300, dtype=torch.float64))
    sorted_ = mapped.gather(1, true.argsort(1))
    assert bool((sorted_.diff(dim=1) >= 0).all())
    assert bool((mapped.argmax(1) == true.argmax(1)).all())


def test_identities():
    true, _ = world(18, n=100, k=6, scale=8.0)
    ensemble = TemperatureEnsemble(3)
    with torch.no_grad():
        ensemble.scale.fill_(1.0)
        network = MonotoneNetwork()
        network.height.zero_()
        for module in (MonotonePiecewiseLinear(), MonotonePiecewiseLinear(7, 3.0), ensemble, network):
            torch.testing.assert_close(module(true), true, atol=1e-12, rtol=0)


def test_piecewise_map_by_hand_and_continuous():
    """Slopes 3 below -1, 0.5 above; two classes, so that the log-odds are the difference of f."""
    module = MonotonePiecewiseLinear(2, 2.0)
    with torch.no_grad():
        module.slope.copy_(torch.tensor([3.0, -0.5]))

    def f(u):
        return 0.5 * u if u >= -1 else -0.5 + 3 * (u + 1)

    for p in (0.55, 0.7, 0.9, 0.999):
        u = torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)
        with torch.no_grad():
            mapped = module(u)[0]
        assert float(mapped[0] - mapped[1]) == pytest.approx(f(math.log(p)) - f(math.log1p(-p)), abs=1e-12)
    grid = torch.linspace(-4, -1e-3, 20_001, dtype=torch.float64)
    pairs = torch.stack([grid, torch.log1p(-grid.exp())], 1)
    with torch.no_grad():
        odds = randomised("piecewise", 1)(pairs) @ torch.tensor([1.0, -1.0]).double()
    assert float(odds.diff().abs().max()) < 1.0  # no jump: slopes of a few times steps of 2e-4, but for p near 1
    assert bool((odds.diff() > 0).all())


def test_maps_of_impossible_classes():
    u = torch.tensor([[math.log(0.4), math.log(0.6), -math.inf]], dtype=torch.float64)
    for kind in ("piecewise", "temperatures", "network"):
        with torch.no_grad():
            mapped = randomised(kind, 0)(u)
        assert float(mapped[0, 2]) == -math.inf
        assert float(mapped.exp().sum()) == pytest.approx(1.0)


# ------------------------------------------------------------------ estimator
@pytest.fixture(scope="module")
def distorted():
    """A distortion that no temperature undoes: calibration rows, test rows."""
    out = []
    for seed, n in ((19, 600), (20, 6000)):
        true, labels = world(seed, n=n, k=10, scale=2.0)
        u = -true
        out.append((-1.5 * (u + 0.35 * u**2), labels))
    return out


def top_error(log_probs, labels):
    return expected_calibration_error(*top_label(log_probs, labels))


@pytest.mark.parametrize(("mapping", "objective"), [("piecewise", "h"), ("piecewise", "nll"), ("network", "h")])
def test_windowed_loss_mends_what_a_temperature_cannot(distorted, mapping, objective):
    (logits, labels), (fresh, answers) = distorted
    options = {"window": 101, "steps": 80, "learning_rate": 0.1}
    found = HCalibration(mapping, objective=objective, **options).fit(logits, labels)
    mended = found.predict_log_proba(fresh)
    before = top_error(fresh.log_softmax(1), answers)
    temperature = top_error(TemperatureScaling().fit(logits, labels).predict_log_proba(fresh), answers)
    assert top_error(mended, answers) < 0.8 * temperature
    assert top_error(mended, answers) < 0.3 * before
    assert bool((mended.argmax(1) == fresh.argmax(1)).all())
    assert found.losses_[-1] < 0.6 * found.losses_[0]
    torch.testing.assert_close(found.transform(fresh), mended)


def test_fit_is_reproducible_and_leaves_the_random_numbers_alone(distorted):
    (logits, labels), _ = distorted
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = [HCalibration("network", window=51, steps=5).fit(logits, labels) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert made[0].losses_ == made[1].losses_
    shifted = HCalibration("network", window=51, steps=5).fit(logits + 7, labels)
    np.testing.assert_allclose(shifted.losses_, made[0].losses_, atol=1e-9)


def test_own_module_and_other_options(distorted):
    (logits, labels), _ = distorted
    module = TemperatureEnsemble(4)
    options = {"weighting": "mean", "leave_one_class_out": True, "epsilon": 1e-3}
    with torch.no_grad():  # fitting needs a gradient, whatever is set around it
        found = HCalibration(module, window=51, steps=10, **options).fit(logits, labels)
    assert found.map_ is module
    assert found.losses_[-1] < found.losses_[0]


# ------------------------------------------------------------------ bad input
HALF = np.log([[0.5, 0.5], [0.4, 0.6]])
EVERY = (TemperatureScaling, VectorScaling, IsotonicCalibration, HCalibration)


@pytest.mark.parametrize("made", EVERY)
@pytest.mark.parametrize(
    ("logits", "labels", "sentence"),
    [
        (HALF, [0], "need labels"),
        (HALF, [0, 2], "from 0 to 1, got 2 in row 1"),
        ([[0.0, math.nan], [0.0, 0.0]], [0, 1], "row 0 are no distribution"),
        ([[0.0, 0.0], [-math.inf, 0.0]], [0, 0], "probability"),
        ([0.0, 1.0], [0, 1], "shape"),
        (np.zeros((0, 2)), [], "at least one row"),
    ],
)
def test_what_cannot_be_fitted_is_refused(made, logits, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        made().fit(logits, labels)


@pytest.mark.parametrize("made", EVERY)
def test_maps_need_a_fit_and_the_same_classes(made):
    with pytest.raises(InputError, match="call fit first"):
        made().predict_log_proba(HALF)
    true, labels = world(21, n=400, k=3)
    found = (made(window=21, steps=2) if made is HCalibration else made()).fit(true, labels)
    with pytest.raises(InputError, match="fitted on 3 classes, got 2"):
        found.predict_log_proba(HALF)
    with pytest.raises(InputError, match="no distribution"):
        found.predict_log_proba([[math.nan] * 3])


PROBS, LABELS = torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TemperatureScaling().fit([[0.0], [0.0]], [0, 0]), "two classes"),
        (lambda: IsotonicCalibration(floor=1.0), "floor"),
        (lambda: HCalibration("spline"), "mapping must be"),
        (lambda: HCalibration(objective="ece"), "objective must be"),
        (lambda: HCalibration(steps=0), "steps"),
        (lambda: HCalibration(recluster=0), "recluster"),
        (lambda: HCalibration(learning_rate=0.0), "learning_rate"),
        (lambda: HCalibration(window=201).fit(HALF, [0, 1]), "more than half of the 4 events"),
        (lambda: HCalibration(window=2, steps=1).fit(PROBS.log(), LABELS), "odd"),
        (lambda: MonotonePiecewiseLinear(0), "segments"),
        (lambda: MonotonePiecewiseLinear(5, 0.0), "reach"),
        (lambda: MonotoneNetwork(0), "hidden"),
        (lambda: MonotoneNetwork(5, -1.0), "reach"),
        (lambda: TemperatureEnsemble(0), "size"),
        (lambda: probability_clusters(torch.rand(3), 0), "clusters"),
        (lambda: probability_clusters(torch.rand(0)), "no probabilities"),
        (lambda: h_calibration_loss(PROBS, LABELS[:2]), "need labels"),
        (lambda: h_calibration_loss(PROBS, LABELS.float()), "int64"),
        (lambda: h_calibration_loss(PROBS[:0], LABELS[:0]), "need labels"),
        (lambda: h_calibration_loss(PROBS * 3, LABELS), "got 1.5 in row 0"),
        (lambda: h_calibration_loss(PROBS * math.nan, LABELS), "got nan in row 0"),
        (lambda: h_calibration_loss(PROBS, LABELS + 1), "got 2 in row 1"),
        (lambda: h_calibration_loss(PROBS, LABELS, window=4), "odd"),
        (lambda: h_calibration_loss(PROBS, LABELS, window=-1), "odd"),
        (lambda: h_calibration_loss(PROBS, LABELS, epsilon=-0.1), "epsilon"),
        (lambda: h_calibration_loss(PROBS, LABELS, weighting="density"), "weighting"),
        (lambda: h_calibration_loss(PROBS, LABELS, window=3, clusters=0), "clusters"),
    ],
)
def test_options_out_of_range_are_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
