"""`LogLikelihood`: its texts, what it refuses and in which words, and that it is frozen."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import loglik
from loglik.likelihood import ConstantKey, DrawsKey, Kind, LogLikelihood, Unit

MASK = torch.tensor([[True, True, False], [True, True, True]])


# ---------------------------------------------------------------------- texts
def _value(values: list[float], kind: Kind = Kind.EXACT, **fields: Any) -> LogLikelihood:
    units = torch.arange(1, len(values) + 1)
    return LogLikelihood(torch.tensor(values), kind, fields.pop("unit", Unit.TOKEN), units, **fields)


def _full() -> LogLikelihood:
    """An object of two rows with every field set, but for the constant."""
    samples = torch.tensor([[-2.0, -3.0], [-4.0, -7.0]])
    a = LogLikelihood.from_samples(
        samples, kind=Kind.ESTIMATE, unit=Unit.TOKEN, num_units=MASK.sum(1), draws=DrawsKey.of("x")
    )
    return dataclasses.replace(a, per_unit=torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -2.0, -2.0]]), mask=MASK)


def test_repr() -> None:
    z, y = ConstantKey.of("z"), ConstantKey.of("y")
    cases = [
        (_value([-1.5]), "LogLikelihood(-1.5000 nats, exact, tokens=1)"),
        (_value([-1.5, 2.0]), "LogLikelihood([-1.5000, 2.0000] nats, exact, tokens=[1, 2])"),
        (_value([]), "LogLikelihood([] nats, exact, tokens=[])"),
        (
            _value([-1.0] * 6, Kind.UPPER_BOUND, unit=Unit.BYTE),
            "LogLikelihood([-1.0000, -1.0000, -1.0000, -1.0000, ...] nats, upper_bound, bytes=[1, 2, 3, 4, ...])",
        ),
        (
            _value([-1.0], Kind.LOWER_BOUND, unit=Unit.DIM, stderr=torch.tensor([0.125])),
            "LogLikelihood(-1.0000 ± 0.12 nats, lower_bound, dims=1)",
        ),
        (
            _value([-1.0, -2.0], Kind.ESTIMATE, stderr=torch.tensor([math.inf, 1e-5])),
            "LogLikelihood([-1.0000 ± inf, -2.0000 ± 1e-05] nats, estimate, tokens=[1, 2])",
        ),
        (
            _value([-1.0], Kind.UNNORMALIZED, unit=Unit.EVENT, constant=z),
            "LogLikelihood(-1.0000 nats, unnormalized, events=1, constant=z)",
        ),
        (
            _value([-1.0], Kind.UNNORMALIZED, constant=z.scaled(2.0).plus(y.scaled(-1.0))),
            "LogLikelihood(-1.0000 nats, unnormalized, tokens=1, constant=-1*y+2*z)",
        ),
        (_value([-math.inf], Kind.SURROGATE), "LogLikelihood(-inf nats, surrogate, tokens=1)"),
    ]
    for a, text in cases:
        assert repr(a) == text
    with_graph = LogLikelihood.from_per_unit(torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1, dtype=torch.bool))
    assert repr(with_graph) == "LogLikelihood(0.0000 nats, exact, tokens=1)"


def test_non_finite_rows() -> None:
    a = _value([-1.0, math.nan, -math.inf, math.inf, 3.0])
    assert a.non_finite_rows() == [1, 3]
    assert a[[0, 2]].non_finite_rows() == []
    assert (a - a).non_finite_rows() == [1, 2, 3]  # log 0 - log 0 has no value


# ---------------------------------------------------------------------- refusals
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"value": torch.tensor(1.0)}, r"^value must have shape \(B,\), got \(\)$"),
    ({"value": torch.zeros(2, 1)}, r"^value must have shape \(B,\), got \(2, 1\)$"),
    (
        {"value": torch.zeros(2).half()},
        r"^value must be float32 or float64, got torch.float16; convert before summing$",
    ),
    ({"value": torch.zeros(2).bfloat16()}, r"^value must be float32 or float64, got torch.bfloat16; convert before"),
    ({"value": torch.tensor([1, 2])}, r"^value must be float32 or float64, got torch.int64; convert before summing$"),
    ({"num_units": torch.tensor([1])}, r"^num_units must have shape \(2,\) like value, got \(1,\)$"),
    ({"num_units": torch.tensor(1)}, r"^num_units must have shape \(2,\) like value, got \(\)$"),
    ({"stderr": torch.zeros(3)}, r"^stderr must have shape \(2,\) like value, got \(3,\)$"),
    ({"per_unit": torch.zeros(2, 3)}, r"^per_unit and mask go together: give both or neither$"),
    ({"mask": MASK}, r"^per_unit and mask go together: give both or neither$"),
    (
        {"per_unit": torch.zeros(2, 4), "mask": MASK},
        r"^per_unit and mask must have shape \(2, T\), got \(2, 4\) and \(2, 3\)$",
    ),
    (
        {"per_unit": torch.zeros(1, 3), "mask": MASK[:1]},
        r"^per_unit and mask must have shape \(2, T\), got \(1, 3\) and \(1, 3\)$",
    ),
    (
        {"per_unit": torch.zeros(2), "mask": torch.ones(2, dtype=torch.bool)},
        r"^per_unit and mask must have shape \(2, T\), got \(2,\) and \(2,\)$",
    ),
    ({"per_unit": torch.zeros(2, 3), "mask": MASK.long()}, r"^mask must be bool, got torch.int64$"),
    (
        {"constant": ConstantKey.of("z")},
        r"^a constant belongs to UNNORMALIZED values and to no other; kind is exact$",
    ),
    (
        {"kind": Kind.UNNORMALIZED},
        r"^a constant belongs to UNNORMALIZED values and to no other; kind is unnormalized$",
    ),
    ({"samples": torch.zeros(4, 3)}, r"^samples must have shape \(S, 2\) with S > 0, got \(4, 3\)$"),
    ({"samples": torch.zeros(2)}, r"^samples must have shape \(S, 2\) with S > 0, got \(2,\)$"),
    ({"samples": torch.zeros(0, 2)}, r"^samples must have shape \(S, 2\) with S > 0, got \(0, 2\)$"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "value": torch.zeros(2),
        "kind": Kind.EXACT,
        "unit": Unit.TOKEN,
        "num_units": torch.tensor([1, 2]),
    }
    assert len(LogLikelihood(**good)) == 2
    with pytest.raises(ValueError, match=message):
        LogLikelihood(**(good | fields))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_every_constructor(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="convert before summing"):
        LogLikelihood.from_per_unit(torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="convert before summing"):
        LogLikelihood.from_samples(
            torch.zeros(3, 1, dtype=dtype), kind=Kind.ESTIMATE, unit=Unit.DIM, num_units=torch.tensor([1])
        )


@pytest.mark.parametrize("operation", [lambda a, b: a + b, lambda a, b: a - b])
def test_operands_that_do_not_fit(operation: Callable[[Any, Any], Any]) -> None:
    a = _value([-1.0, -2.0])
    with pytest.raises(ValueError, match=r"^cannot combine 2 rows with 1 rows$"):
        operation(a, a[:1])
    message = r"^cannot combine a value per token with one per byte; convert with per\(\.\.\.\)$"
    with pytest.raises(ValueError, match=message):
        operation(a, a.per(Unit.BYTE, torch.tensor([1, 1])))
    for other in (1.0, torch.zeros(2), None, "a"):
        with pytest.raises(TypeError):
            operation(a, other)
        with pytest.raises(TypeError):
            operation(other, a)


def test_weights_that_are_refused() -> None:
    a = _value([-1.0, -2.0])
    for zero in (0, 0.0, -0.0):
        with pytest.raises(ValueError, match=r"^scaling a log-likelihood by 0 leaves nothing to label$"):
            zero * a
        with pytest.raises(
            ValueError, match=r"^a log-likelihood can be divided by a finite number other than 0 only, "
        ):
            a / zero
    for weight in (math.inf, -math.inf, math.nan):
        with pytest.raises(
            ValueError, match=rf"^a log-likelihood can be scaled by a finite number only, got {weight}$"
        ):
            a * weight
        with pytest.raises(
            ValueError, match=rf"^a log-likelihood can be divided by .* other than 0 only, got {weight}$"
        ):
            a / weight
    for other in (True, False, "2", None, torch.tensor(2.0), a):
        with pytest.raises(TypeError):
            a * other  # type: ignore[operator]
        with pytest.raises(TypeError):
            a / other  # type: ignore[operator]


def test_numbers_of_numpy_scale_from_both_sides() -> None:
    a = _value([-1.0, -2.0], Kind.LOWER_BOUND)
    for scaled in (np.float64(-2) * a, a * np.float64(-2), a / np.float64(-0.5)):
        assert isinstance(scaled, LogLikelihood)
        assert scaled.value.tolist() == [2.0, 4.0]
        assert scaled.kind is Kind.UPPER_BOUND


def test_objects_are_frozen() -> None:
    a = _full()
    for field in dataclasses.fields(a):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(a, field.name, getattr(a, field.name))
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(a, field.name)
    assert not hasattr(a, "__dict__")


def test_arithmetic_leaves_its_operands_alone() -> None:
    a, b = _full(), _full()
    names = ("value", "num_units", "per_unit", "mask", "stderr", "samples")
    before = [getattr(x, name).clone() for x in (a, b) for name in names]
    for result in (a + b, a - b, -a, 3 * a, a.total(), a.mean_per_unit(), LogLikelihood.cat([a, b]), a[0]):
        assert result is not a
    after = [getattr(x, name) for x in (a, b) for name in names]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_equality_is_identity() -> None:
    a = _full()
    assert a == a
    assert a != _full()
    assert len({a, a}) == 1


def test_public_names() -> None:
    assert loglik.LogLikelihood is LogLikelihood
    assert loglik.Kind is Kind
    assert loglik.Unit is Unit
    assert [field.name for field in dataclasses.fields(LogLikelihood)] == list(
        inspect.signature(LogLikelihood).parameters
    )
