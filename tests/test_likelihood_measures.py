"""Nats per unit, bits per byte and perplexity: closed forms, labels, and Jensen's inequality by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.likelihood import ConstantKey, DrawsKey, Kind, LogLikelihood, Measurement, Unit

LAW = settings(deadline=None, max_examples=50, derandomize=True)
close = torch.testing.assert_close
KINDS = list(Kind)


def make(
    values: list[float],
    units: list[int],
    kind: Kind = Kind.EXACT,
    unit: Unit = Unit.TOKEN,
    *,
    stderr: list[float] | None = None,
    draws: DrawsKey | None = None,
) -> LogLikelihood:
    return LogLikelihood(
        torch.tensor(values, dtype=torch.float64),
        kind,
        unit,
        torch.tensor(units, dtype=torch.long),
        stderr=None if stderr is None else torch.tensor(stderr, dtype=torch.float64),
        draws=draws,
        constant=ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None,
    )


def error(a: LogLikelihood | Measurement) -> torch.Tensor:
    assert a.stderr is not None
    return a.stderr


rows_of_text = st.lists(st.tuples(st.floats(-200, 0), st.integers(1, 50), st.integers(1, 300)), max_size=5)


# ---------------------------------------------------------------------- closed forms
@LAW
@given(rows=rows_of_text)
def test_closed_forms(rows: list[tuple[float, int, int]]) -> None:
    values, tokens, num_bytes = ([row[i] for row in rows] for i in range(3))
    a = make(values, tokens)  # type: ignore[arg-type]
    nats, count, size = (np.asarray(x, dtype=np.float64) for x in (values, tokens, num_bytes))
    mean = a.mean_per_unit()
    np.testing.assert_allclose(mean.value, nats / count)
    assert mean.num_units.tolist() == [1] * len(rows)
    np.testing.assert_allclose(a.perplexity().value, np.exp(-nats / count))
    bits = a.bits_per_byte(torch.tensor(num_bytes, dtype=torch.long))
    np.testing.assert_allclose(bits.value, -nats / np.log(2) / size)
    np.testing.assert_allclose(
        a.per(Unit.BYTE, torch.tensor(num_bytes, dtype=torch.long)).bits_per_byte().value, bits.value
    )


def test_uniform_bytes_cost_eight_bits() -> None:
    a = make([5 * math.log(1 / 256)], [5], unit=Unit.BYTE)
    assert a.bits_per_byte().item() == pytest.approx(8.0)
    assert a.perplexity().item() == pytest.approx(256.0)
    assert a.bits_per_byte(torch.tensor([10])).item() == pytest.approx(4.0)


def test_corpus_perplexity_weighs_rows_by_length() -> None:
    a = make([-2.0, -9.0], [1, 5])
    assert a.total().perplexity().item() == pytest.approx(math.exp(11 / 6))


def test_log_zero_has_infinite_perplexity() -> None:
    a = make([-math.inf], [3], unit=Unit.BYTE)
    assert a.perplexity().item() == math.inf
    assert a.bits_per_byte().item() == math.inf


# ---------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    ("kind", "bits", "perplexity", "sampled_perplexity"),
    [
        (Kind.EXACT, Kind.EXACT, Kind.EXACT, Kind.EXACT),
        (Kind.LOWER_BOUND, Kind.UPPER_BOUND, Kind.UPPER_BOUND, Kind.UPPER_BOUND),
        (Kind.UPPER_BOUND, Kind.LOWER_BOUND, Kind.LOWER_BOUND, Kind.SURROGATE),
        (Kind.ESTIMATE, Kind.ESTIMATE, Kind.ESTIMATE, Kind.ESTIMATE),
        (Kind.UNNORMALIZED, Kind.UNNORMALIZED, Kind.SURROGATE, Kind.SURROGATE),
        (Kind.SURROGATE, Kind.SURROGATE, Kind.SURROGATE, Kind.SURROGATE),
    ],
)
def test_kinds_of_measurements(kind: Kind, bits: Kind, perplexity: Kind, sampled_perplexity: Kind) -> None:
    fixed = make([-4.0, -6.0], [2, 2], kind, Unit.BYTE)
    noisy = make([-4.0, -6.0], [2, 2], kind, Unit.BYTE, stderr=[0.1, 0.2])
    unknown_error = make([-4.0, -6.0], [2, 2], kind, Unit.BYTE, draws=DrawsKey.of("x"))
    assert fixed.bits_per_byte().kind is noisy.bits_per_byte().kind is bits
    assert fixed.perplexity().kind is perplexity
    assert noisy.perplexity().kind is sampled_perplexity
    assert unknown_error.perplexity().kind is sampled_perplexity
    assert fixed.mean_per_unit().kind is kind


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_mean_per_unit_of_equal_lengths_keeps_every_label(kind: Kind, rows: int) -> None:
    mean = make([-4.0, -6.0][:rows], [4, 4][:rows], kind).mean_per_unit()
    assert mean.kind is kind
    assert mean.constant == (ConstantKey.of("z").scaled(0.25) if kind is Kind.UNNORMALIZED else None)


def test_unknown_constant_survives_equal_lengths_only() -> None:
    ragged = make([-4.0, -6.0], [2, 3], Kind.UNNORMALIZED)
    mean = ragged.mean_per_unit()
    assert mean.kind is Kind.SURROGATE
    assert mean.constant is None
    assert ragged.bits_per_byte(torch.tensor([7, 7])).kind is Kind.UNNORMALIZED
    assert ragged.bits_per_byte(torch.tensor([7, 8])).kind is Kind.SURROGATE
    # log Z / 2 and log Z / 3 are two constants: the differences of rows are no longer those of the truth
    true_values, log_z = ragged.value + 5.0, 5.0
    error = (true_values - log_z) / ragged.num_units - true_values / ragged.num_units
    assert error[0] != error[1]


def test_unknown_constant_cancels_before_and_after_dividing() -> None:
    a, b = make([-4.0, -6.0], [3, 3], Kind.UNNORMALIZED), make([-1.0, -2.0], [3, 3], Kind.UNNORMALIZED)
    for difference in ((a - b).mean_per_unit(), a.mean_per_unit() - b.mean_per_unit()):
        assert difference.kind is Kind.EXACT
        close(difference.value, torch.tensor([-1.0, -4.0 / 3], dtype=torch.float64))
    for length in range(1, 200):  # 1 / length * length is not always 1 in floating point
        one = make([-4.0], [length], Kind.UNNORMALIZED)
        assert (one.mean_per_unit() * length - one).kind is Kind.EXACT


def test_no_rows() -> None:
    for kind in KINDS:
        empty = make([], [], kind, Unit.BYTE)
        assert len(empty.mean_per_unit()) == 0
        assert empty.perplexity().value.shape == empty.bits_per_byte().value.shape == (0,)
        assert (empty.mean_per_unit().constant is None) == (empty.mean_per_unit().kind is not Kind.UNNORMALIZED)


# ---------------------------------------------------------------------- standard errors
def test_delta_method() -> None:
    a = make([-4.0, -6.0], [2, 3], unit=Unit.BYTE, stderr=[0.1, 0.3], draws=DrawsKey.of("x"))
    perplexity, bits, mean = a.perplexity(), a.bits_per_byte(), a.mean_per_unit()
    np.testing.assert_allclose(error(mean), [0.05, 0.1])
    np.testing.assert_allclose(error(perplexity), [math.exp(2) * 0.05, math.exp(2) * 0.1])
    np.testing.assert_allclose(error(bits), [0.05 / math.log(2), 0.1 / math.log(2)])
    assert mean.draws == DrawsKey.of("x")
    exact = make([-4.0], [2], unit=Unit.BYTE)
    assert exact.perplexity().stderr is exact.bits_per_byte().stderr is exact.mean_per_unit().stderr is None


def test_delta_method_is_the_spread_of_the_perplexity() -> None:
    """20 000 seeded replicas; 5 standard deviations (2.5 % + 0.5 % per error) and 0.5 % for the curvature of exp."""
    replicas, count, units = 20_000, 40, 4
    samples = torch.randn(count, replicas, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 6.0
    a = LogLikelihood.from_samples(
        samples, kind=Kind.ESTIMATE, unit=Unit.TOKEN, num_units=torch.full((replicas,), units)
    )
    perplexity = a.perplexity()
    assert error(perplexity).mean().item() == pytest.approx(perplexity.value.std().item(), rel=0.035)
    mean = a.mean_per_unit()
    assert mean.samples is not None
    close(mean.samples, samples / units)


def _sampled(kind: Kind, gap: float, *, sd: float) -> tuple[float, float, float]:
    """Mean value, mean perplexity and the standard error of both means (the larger), over 200 000 noisy values.

    Per row: one unit, log p = -1, value = -1 + gap + noise, so that its expectation is log p + gap.
    """
    noise = torch.randn(2, 100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.cat([noise, -noise], 1) * sd * math.sqrt(2)  # two draws per value; antithetic: the mean is exact
    num_units = torch.ones(noise.shape[1], dtype=torch.long)
    a = LogLikelihood.from_samples(noise - 1.0 + gap, kind=kind, unit=Unit.TOKEN, num_units=num_units)
    perplexity = a.perplexity().value
    spread = max(a.value.std().item(), perplexity.std().item()) / math.sqrt(noise.shape[1] / 2)
    return a.value.mean().item(), perplexity.mean().item(), spread


def test_jensen_keeps_a_sampled_lower_bound_on_its_side() -> None:
    for gap in (0.0, -0.05, -0.5):
        value, perplexity, spread = _sampled(Kind.LOWER_BOUND, gap, sd=0.5)
        assert value <= -1 + 5 * spread
        assert perplexity > math.e + 5 * spread
        assert perplexity == pytest.approx(math.exp(1 - gap + 0.5**2 / 2), abs=5 * spread)


def test_jensen_leaves_a_sampled_upper_bound_without_a_side() -> None:
    tight, loose = (_sampled(Kind.UPPER_BOUND, gap, sd=0.5) for gap in (0.05, 0.5))
    for value, _, spread in (tight, loose):
        assert value > -1 + 5 * spread  # both are upper bounds on log p in expectation
    assert tight[1] > math.e + 5 * tight[2]  # one perplexity lies above the truth,
    assert loose[1] < math.e - 5 * loose[2]  # the other below


# ---------------------------------------------------------------------- refusals and shapes
@pytest.mark.parametrize("units", [[2, 0, 3], [1, 0, 0]])
def test_a_row_without_units_is_named(units: list[int]) -> None:
    a = make([-1.0, 0.0, -1.0], units)
    for measure in (a.mean_per_unit, a.perplexity):
        with pytest.raises(ValueError, match=r"^row 1 has no scored token, so a value per token is undefined$"):
            measure()
    with pytest.raises(ValueError, match=r"^row 1 has no scored byte, so a value per byte is undefined$"):
        a.bits_per_byte(torch.tensor(units))
    with pytest.raises(ValueError, match=r"^row 0 has no scored dim, so"):
        make([0.0], [0], unit=Unit.DIM).mean_per_unit()


@pytest.mark.parametrize("unit", [Unit.TOKEN, Unit.DIM, Unit.EVENT])
def test_bits_per_byte_asks_for_the_bytes(unit: Unit) -> None:
    with pytest.raises(ValueError, match=rf"^bits per byte needs num_bytes: the value is counted per {unit}$"):
        make([-1.0], [2], unit=unit).bits_per_byte()


def test_bytes_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match=r"num_units must have shape \(1,\) like value, got \(2,\)"):
        make([-1.0], [2]).bits_per_byte(torch.tensor([1, 2]))


def test_per_changes_the_count_and_nothing_else() -> None:
    a = LogLikelihood.from_per_unit(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]))
    b = a.per(Unit.BYTE, torch.tensor([9]))
    assert b.unit is Unit.BYTE
    assert b.num_units.tolist() == [9]
    assert b.per_unit is b.mask is None
    assert b.value is a.value
    assert b.kind is a.kind


def test_measurement() -> None:
    a = make([-2 * math.log(3)], [2], unit=Unit.BYTE, stderr=[0.1])
    assert repr(a.perplexity()) == "Measurement(perplexity=3.0000 ± 0.15, exact)"
    assert repr(make([-2 * math.log(2)] * 5, [1] * 5, unit=Unit.BYTE).bits_per_byte()) == (
        "Measurement(bits_per_byte=[2.0000, 2.0000, 2.0000, 2.0000, ...], exact)"
    )
    value = torch.zeros(2)
    first, second = Measurement(value, Kind.EXACT, "x"), Measurement(value, Kind.EXACT, "x")
    assert first == first
    assert first != second  # identity, as for LogLikelihood: tensors have no single truth value
    with pytest.raises(AttributeError):
        first.kind = Kind.SURROGATE  # type: ignore[misc]
