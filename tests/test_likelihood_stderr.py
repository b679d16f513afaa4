"""Monte-Carlo standard errors: against numpy on the samples, against theory, and against simulated estimators.

The simulations are seeded; each tolerance is five standard deviations of the statistic it bounds, so that a new seed
fails a correct implementation with a probability below 1e-6 (normal tails).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loglik.likelihood import DrawsKey, Kind, LogLikelihood, Unit

LAW = settings(deadline=None, max_examples=40, derandomize=True)


def sampled(samples: Tensor, draws: DrawsKey | None = None, kind: Kind = Kind.ESTIMATE) -> LogLikelihood:
    return LogLikelihood.from_samples(
        samples, kind=kind, unit=Unit.DIM, num_units=torch.full((samples.shape[1],), 2), draws=draws
    )


def exact(value: Tensor) -> LogLikelihood:
    return LogLikelihood(value, Kind.EXACT, Unit.DIM, torch.full(value.shape, 2))


def samples_of(a: LogLikelihood) -> Tensor:
    assert a.samples is not None
    return a.samples


def without_samples(a: LogLikelihood) -> LogLikelihood:
    """The same value and error with the samples gone, as after `cat`."""
    return LogLikelihood.cat([a])


def error(a: LogLikelihood) -> Tensor:
    assert a.stderr is not None
    return a.stderr


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numpy_error(samples: Tensor) -> Tensor:
    """Standard error of the mean of the rows of (S, B), by numpy."""
    return torch.from_numpy(np.std(samples.numpy(), axis=0, ddof=1) / np.sqrt(len(samples)))


X, Y = DrawsKey.of("x"), DrawsKey.of("y")
close = torch.testing.assert_close


# ---------------------------------------------------------------------- one value
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_error_of_a_mean_of_samples(rows: int) -> None:
    samples = normal(7, rows)
    a = sampled(samples, X)
    close(a.value, samples.mean(0))
    close(error(a), numpy_error(samples))
    assert a.draws == X
    assert a.samples is samples


def test_one_sample_says_nothing_about_its_error() -> None:
    a = sampled(normal(1, 3), X)
    assert error(a).tolist() == [math.inf] * 3
    assert error(a - a).tolist() == [math.inf] * 3
    assert error(a + exact(torch.zeros(3, dtype=torch.float64))).tolist() == [math.inf] * 3
    assert error(a.total()).tolist() == [math.inf]
    assert error(a.mean_per_unit()).tolist() == [math.inf] * 3


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="samples is empty; at least one draw is needed"):
        sampled(normal(0, 3))


def test_float32_stays_float32() -> None:
    a, b = sampled(normal(4, 3).float(), X), sampled(normal(4, 3, seed=1).float(), Y)
    for result in (a, a + b, a - a, a.total(), a.mean_per_unit(), 2 * a):
        assert result.value.dtype == error(result).dtype == torch.float32
    assert error(a + sampled(normal(4, 3), Y)).dtype == torch.float64


@LAW
@given(weight=st.floats(-1e3, 1e3).filter(lambda w: abs(w) > 1e-3), seed=st.integers(0, 99))
def test_scaling_scales_the_error_by_the_absolute_weight(weight: float, seed: int) -> None:
    a = sampled(normal(5, 3, seed=seed), X)
    scaled = a * weight
    close(error(scaled), abs(weight) * error(a))
    assert scaled.samples is not None
    close(error(scaled), numpy_error(scaled.samples))
    close(scaled.samples.mean(0), scaled.value)
    assert scaled.draws == X
    close(error(a / weight), error(a) / abs(weight))
    close(error(-a), error(a))


# ---------------------------------------------------------------------- two values
@pytest.mark.parametrize(("one", "two"), [(X, Y), (X, None), (None, Y), (None, None)])
def test_independent_errors_add_in_quadrature(one: DrawsKey | None, two: DrawsKey | None) -> None:
    a, b = sampled(normal(6, 4), one), sampled(normal(9, 4, seed=1), two)
    expected = np.sqrt(error(a).numpy() ** 2 + error(b).numpy() ** 2)
    for result in (a + b, a - b, b - a):
        close(error(result), torch.from_numpy(expected))
        assert result.samples is None
        assert result.draws == (one.union(two) if one is not None else two)


def test_an_exact_value_adds_no_error() -> None:
    a, b = sampled(normal(6, 4), X), exact(normal(4, seed=1))
    own = samples_of(a)
    for result, samples in ((a + b, own + b.value), (b - a, b.value - own), (a - b, own - b.value)):
        close(error(result), error(a))
        close(samples_of(result), samples)
        close(samples_of(result).mean(0), result.value)
        assert result.draws == X
    assert (b + b).stderr is None
    assert (b + b).draws is None


@LAW
@given(seed=st.integers(0, 9999), weight=st.sampled_from([-2.0, -1.0, 0.5, 3.0]), mix=st.floats(-1, 1))
def test_shared_draws_are_compared_sample_by_sample(seed: int, weight: float, mix: float) -> None:
    common, own = normal(8, 3, seed=seed), normal(8, 3, seed=seed + 1)
    first, second = common, mix * common + (1 - abs(mix)) * own
    a, b = sampled(first, X), sampled(second, X)
    for result, samples in (
        (a + b, first + second),
        (a - b, first - second),
        (a + weight * b, first + weight * second),
        ((a - b) + weight * a, first - second + weight * first),
        ((a - exact(b.value)) - b, first - b.value - second),
    ):
        assert result.samples is not None
        assert result.draws == X
        close(result.samples, samples)
        close(result.value, samples.mean(0))
        close(error(result), numpy_error(samples))
    # Cauchy-Schwarz: without the samples the error may be larger, never smaller.
    a_bare, b_bare = without_samples(a), without_samples(b)
    for bare, paired in ((a_bare + b_bare, a + b), (a_bare - b_bare, a - b)):
        close(error(bare), error(a) + error(b))
        assert (error(bare) >= error(paired) - 1e-12).all()


def test_common_random_numbers_shrink_the_error_of_a_difference() -> None:
    common = normal(50, 4)
    first, second = 3 * common + 0.1 * normal(50, 4, seed=1), 3 * common + 0.1 * normal(50, 4, seed=2)
    paired = sampled(first, X) - sampled(second, X)
    independent = sampled(first, X) - sampled(second, Y)
    close(error(paired), numpy_error(first - second))
    assert (error(paired) < 0.1 * error(independent)).all()
    assert (error(sampled(first, X) + sampled(second, X)) > 1.3 * error(independent)).all()


def test_a_value_is_its_own_twin() -> None:
    a = sampled(normal(6, 4), X)
    close(error(a - a), torch.zeros(4, dtype=torch.float64))
    close(error(a + a), 2 * error(a))
    bare = without_samples(a)
    close(error(bare + bare), 2 * error(a))


@pytest.mark.parametrize(
    ("one", "two", "count"),
    [
        (X, DrawsKey.of("x", "y"), 6),  # only some of the random numbers are common
        (X, DrawsKey.of("x", shared_by_rows=True), 6),  # the same stream was used in two ways
        (X, X, 5),  # samples cannot be paired
    ],
)
def test_errors_add_linearly_where_samples_cannot_be_paired(one: DrawsKey, two: DrawsKey, count: int) -> None:
    a, b = sampled(normal(6, 4), one), sampled(normal(count, 4, seed=1), two)
    for result in (a + b, a - b):
        close(error(result), error(a) + error(b))
        assert result.samples is None
        assert result.draws == one.union(two)


def test_one_bare_operand_is_enough_to_add_linearly() -> None:
    a, b = sampled(normal(6, 4), X), sampled(normal(6, 4, seed=1), X)
    for result in (a - without_samples(b), without_samples(a) - b):
        close(error(result), error(a) + error(b))


def test_streams_are_remembered_through_independent_sums() -> None:
    a, b = sampled(normal(6, 4), X), sampled(normal(6, 4, seed=1), Y)
    close(error((a + b) - a), torch.hypot(error(a), error(b)) + error(a))


# ---------------------------------------------------------------------- sums over rows
def test_total_of_independent_rows_is_in_quadrature() -> None:
    a = sampled(normal(6, 5), X)
    for part in (a, without_samples(a)):
        total = part.total()
        close(error(total), torch.tensor([np.sqrt((error(a).numpy() ** 2).sum())], dtype=torch.float64))
        close(total.value, a.value.sum().reshape(1))
        assert total.num_units.tolist() == [10]
        assert total.draws == X


def test_total_of_rows_with_the_same_draws() -> None:
    samples = normal(6, 1) + 0.1 * normal(6, 5, seed=1)
    a = sampled(samples, DrawsKey.of("x", shared_by_rows=True))
    total = a.total()
    close(error(total), numpy_error(samples.sum(1, keepdim=True)))
    assert total.samples is not None
    close(total.samples.mean(0), total.value)
    bare = without_samples(a).total()
    close(error(bare), error(a).sum().reshape(1))
    assert error(total) <= error(bare)
    quadrature = error(a).square().sum().sqrt()
    assert error(total).item() > 1.8 * quadrature.item()  # what rows averaging out would have claimed
    other = sampled(samples + 0.01 * normal(6, 5, seed=2), DrawsKey.of("x", shared_by_rows=True)).total()
    assert other.samples is not None
    close(error(total - other), numpy_error(total.samples - other.samples))


@pytest.mark.parametrize("shared", [False, True])
def test_total_of_no_rows_has_no_error(shared: bool) -> None:
    total = sampled(normal(6, 0), DrawsKey.of("x", shared_by_rows=shared)).total()
    assert total.value.tolist() == [0.0]
    assert error(total).tolist() == [0.0]


def test_cat_gives_zero_error_to_rows_that_were_not_sampled() -> None:
    a = sampled(normal(6, 2), X)
    fixed = LogLikelihood(normal(3, seed=1), Kind.ESTIMATE, Unit.DIM, torch.full((3,), 2))
    other = sampled(normal(6, 1, seed=2), DrawsKey.of("y", shared_by_rows=True))
    joined = LogLikelihood.cat([a, fixed, other])
    close(error(joined), torch.cat([error(a), torch.zeros(3, dtype=torch.float64), error(other)]))
    assert joined.samples is None
    assert joined.draws == DrawsKey.of("x", "y", shared_by_rows=True)


# ---------------------------------------------------------------------- what is reported against what happens
REPLICAS = 20_000
FIVE_SIGMA = 5 * math.sqrt(2 / REPLICAS) * math.sqrt(1.25)  # relative; of a variance over replicas and mean variance


def _paired(sign: float) -> Callable[[Tensor, Tensor], LogLikelihood]:
    return lambda u, v: sampled(u + 0.5 * v, X) + sign * sampled(0.7 * u, X)


ESTIMATORS: dict[str, tuple[Callable[[Tensor, Tensor], LogLikelihood], float]] = {
    "mean": (lambda u, v: sampled(u), 1.0),
    "scaled": (lambda u, v: -3 * sampled(u), 9.0),
    "independent difference": (lambda u, v: sampled(u, X) - sampled(2 * v, Y), 1.0 + 4.0),
    "paired difference": (_paired(-1.0), 0.3**2 + 0.5**2),
    "paired sum": (_paired(1.0), 1.7**2 + 0.5**2),
    "mean per unit": (lambda u, v: sampled(u).mean_per_unit(), 0.25),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_reported_variance_is_the_variance_of_the_estimator(name: str) -> None:
    """The squared error is unbiased for the variance of a mean: both agree with theory here."""
    count = 8
    estimator, variance_of_one = ESTIMATORS[name]
    result = estimator(normal(count, REPLICAS, seed=1), normal(count, REPLICAS, seed=2))
    reported = error(result).square().mean().item()
    happened = result.value.var().item()
    assert reported == pytest.approx(variance_of_one / count, rel=FIVE_SIGMA)
    assert happened == pytest.approx(reported, rel=FIVE_SIGMA)


def test_linear_errors_bound_the_variance_of_the_estimator() -> None:
    u = normal(8, REPLICAS, seed=1)
    result = without_samples(sampled(u, X)) + without_samples(sampled(2 * u, X))  # fully correlated: the bound is met
    assert error(result).square().mean().item() == pytest.approx(result.value.var().item(), rel=FIVE_SIGMA)


@pytest.mark.parametrize("shared", [False, True])
def test_reported_error_of_a_total_is_that_of_the_estimator(shared: bool) -> None:
    replicas, count, rows = 1000, 6, 5
    scale = torch.arange(1.0, rows + 1, dtype=torch.float64)
    noise = normal(replicas, count, 1 if shared else rows, seed=3) * scale
    draws = DrawsKey.of("x", shared_by_rows=shared)
    totals = [sampled(part, draws).total() for part in noise]
    reported = torch.cat([error(total) for total in totals]).square().mean().item()
    happened = torch.cat([total.value for total in totals]).var().item()
    variance = (15.0**2 if shared else 55.0) / count  # (1 + ... + 5)^2 or 1 + 4 + ... + 25
    tolerance = 5 * math.sqrt(2 / replicas)
    assert reported == pytest.approx(variance, rel=tolerance)
    assert happened == pytest.approx(variance, rel=tolerance)
