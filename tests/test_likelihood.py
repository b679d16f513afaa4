"""`LogLikelihood` as a container: rows, chain-rule terms, gradients and devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loglik.likelihood import ConstantKey, DrawsKey, Kind, LogLikelihood, Unit

LAW = settings(deadline=None, max_examples=60, derandomize=True)
KINDS = list(Kind)
TENSORS = ("value", "num_units", "per_unit", "mask", "stderr", "samples")
close = torch.testing.assert_close


def make(rows: int, width: int | None = 4, *, kind: Kind = Kind.LOWER_BOUND, seed: int = 0) -> LogLikelihood:
    """An object with every field set (chain-rule terms where a width is given), float64."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(3, rows, dtype=torch.float64, generator=generator)
    per_unit = mask = None
    num_units = torch.randint(1, 6, (rows,), generator=generator)
    if width is not None:
        mask = torch.rand(rows, width, generator=generator) < 0.7
        # the first scored term absorbs the rest, so that the terms sum to the mean of the samples
        mask[:, :1] = True
        per_unit = torch.randn(rows, width, dtype=torch.float64, generator=generator).masked_fill(~mask, 0.0)
        if width:
            per_unit[:, 0] += samples.mean(0) - per_unit.sum(1)
        num_units = mask.sum(1)
    a = LogLikelihood.from_samples(
        samples,
        kind=Kind.EXACT if kind is Kind.UNNORMALIZED else kind,
        unit=Unit.TOKEN,
        num_units=num_units,
        draws=DrawsKey.of("x"),
    )
    constant = ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None
    return dataclasses.replace(a, kind=kind, per_unit=per_unit, mask=mask, constant=constant)


def assert_same(a: LogLikelihood, b: LogLikelihood, *, samples: bool = True) -> None:
    """Equal labels, and tensors equal up to the rounding of float64 sums."""
    assert (a.kind, a.unit, a.draws, a.constant) == (b.kind, b.unit, b.draws, b.constant)
    for name in TENSORS if samples else TENSORS[:-1]:
        one, two = getattr(a, name), getattr(b, name)
        if one is None or two is None:
            assert one is two is None, name
        else:
            close(one, two, rtol=1e-12, atol=1e-12)


def from_terms(terms: list[list[float]], mask: list[list[int]], *, dtype: torch.dtype = torch.float64) -> LogLikelihood:
    width = len(terms[0]) if terms else 0
    return LogLikelihood.from_per_unit(
        torch.tensor(terms, dtype=dtype).reshape(len(terms), width),
        torch.tensor(mask, dtype=torch.bool).reshape(len(terms), width),
    )


# ---------------------------------------------------------------------- rows
@st.composite
def objects_and_rows(draw: st.DrawFn) -> tuple[int, int | None, Any]:
    """Number of rows, width, and an index of any accepted type."""
    rows = draw(st.integers(0, 5))
    numbers = st.lists(st.integers(-rows, rows - 1), max_size=6) if rows else st.just([])
    masks = st.lists(st.booleans(), min_size=rows, max_size=rows)
    forwards = st.slices(rows).filter(lambda s: s.step is None or s.step > 0)
    options: list[st.SearchStrategy[Any]] = [
        forwards,
        numbers,
        numbers.map(lambda x: torch.tensor(x, dtype=torch.long)),
        numbers.map(lambda x: np.array(x, dtype=np.int64)),
        masks.map(lambda x: torch.tensor(x, dtype=torch.bool)),
        masks,
    ]
    if rows:
        number = st.integers(-rows, rows - 1)
        options += [number, number.map(np.int64), number.map(torch.tensor)]
    return rows, draw(st.sampled_from([None, 0, 1, 4])), draw(st.one_of(options))


def numpy_rows(rows: int, index: Any) -> list[int]:
    """The rows that numpy picks from 0 .. rows-1, one row for a number."""
    if not isinstance(index, slice):
        index = np.asarray(index)
        index = index.astype(np.int64) if index.size == 0 else index
    return [int(i) for i in np.atleast_1d(np.arange(rows)[index])]


OPERATIONS: dict[str, Callable[[LogLikelihood, LogLikelihood], LogLikelihood]] = {
    "identity": lambda a, b: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "neg": lambda a, b: -a,
    "mul": lambda a, b: -2.5 * a,
    "truediv": lambda a, b: a / 4,
    "mean_per_unit": lambda a, b: dataclasses.replace(a, num_units=a.num_units.clamp(min=1)).mean_per_unit(),
    "detach": lambda a, b: a.detach(),
    "per": lambda a, b: a.per(Unit.BYTE, a.num_units),
}


@LAW
@given(case=objects_and_rows(), kind=st.sampled_from(KINDS))
def test_picking_rows_agrees_with_numpy_and_commutes(case: tuple[int, int | None, Any], kind: Kind) -> None:
    rows, width, index = case
    a, b = make(rows, width, kind=kind), make(rows, width, kind=Kind.EXACT, seed=1)
    kept = numpy_rows(rows, index)
    picked = a[index]
    assert len(picked) == len(kept)
    for name in TENSORS:
        field = getattr(a, name)
        if field is not None:
            expected = field.numpy()[:, kept] if name == "samples" else field.numpy()[kept]
            np.testing.assert_array_equal(getattr(picked, name).numpy(), expected)
    for name, operation in OPERATIONS.items():
        if name == "mean_per_unit" and kind is Kind.UNNORMALIZED:
            continue  # its label depends on whether the rows are of equal length
        assert_same(operation(a, b)[index], operation(picked, b[index]))


def test_rows_of_unnormalized_means_commute_for_equal_lengths() -> None:
    a = dataclasses.replace(make(4, None, kind=Kind.UNNORMALIZED), num_units=torch.full((4,), 3))
    assert_same(a.mean_per_unit()[1:3], a[1:3].mean_per_unit())


def test_iteration_gives_objects_of_one_row() -> None:
    a = make(3)
    assert [len(row) for row in a] == [1, 1, 1]  # type: ignore[attr-defined]
    assert_same(LogLikelihood.cat(list(a)), a, samples=False)  # type: ignore[call-overload]


@pytest.mark.parametrize("index", [3, -4, 100])
def test_a_row_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=rf"^row {index} of 3$"):
        make(3)[index]
    with pytest.raises(IndexError, match=rf"^row {index} of 3$"):
        make(3)[torch.tensor(index)]


@pytest.mark.parametrize("index", [torch.tensor([5]), [0, 7], torch.tensor([True])])
def test_indices_that_do_not_fit(index: Any) -> None:
    with pytest.raises(IndexError):
        make(3)[index]


def test_rows_may_be_repeated_and_reordered() -> None:
    a = from_terms([[-1.0], [-2.0], [-3.0]], [[1], [1], [1]])
    assert a[[2, 0, 0]].value.tolist() == [-3.0, -1.0, -1.0]


# ---------------------------------------------------------------------- cat
@LAW
@given(
    widths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
)
def test_cat_and_slices_are_inverse(widths: list[tuple[int, int]], kind: Kind) -> None:
    parts = [make(rows, width, kind=kind, seed=i) for i, (rows, width) in enumerate(widths)]
    joined = LogLikelihood.cat(parts)
    widest = max(width for _, width in widths)
    assert joined.per_unit is not None
    assert joined.mask is not None
    assert joined.per_unit.shape == joined.mask.shape == (sum(rows for rows, _ in widths), widest)
    assert joined.samples is None
    start = 0
    for part, (rows, width) in zip(parts, widths, strict=True):
        back = joined[start : start + rows]
        assert back.per_unit is not None
        assert back.mask is not None
        assert not back.mask[:, width:].any()
        assert not back.per_unit[:, width:].any()
        narrow = dataclasses.replace(back, per_unit=back.per_unit[:, :width], mask=back.mask[:, :width])
        assert_same(narrow, part, samples=False)
        start += rows
    assert_same(LogLikelihood.cat([joined[:start], joined[start:]]), joined)


@LAW
@given(rows=st.integers(0, 5), data=st.data())
def test_slices_and_cat_are_inverse(rows: int, data: st.DataObject) -> None:
    a = make(rows, data.draw(st.sampled_from([None, 0, 3])))
    cut = data.draw(st.integers(0, rows))
    assert_same(LogLikelihood.cat([a[:cut], a[cut:]]), a, samples=False)


def test_cat_drops_terms_that_one_part_lacks() -> None:
    joined = LogLikelihood.cat([make(2, 3), make(1, None)])
    assert joined.per_unit is joined.mask is None
    assert len(joined) == 3


def test_cat_of_different_labels_is_refused() -> None:
    exact, lower = make(1, kind=Kind.EXACT), make(1)
    with pytest.raises(ValueError, match=r"^cannot concatenate exact/token with lower_bound/token: one label per obj"):
        LogLikelihood.cat([exact, exact, lower])
    with pytest.raises(ValueError, match=r"^cannot concatenate exact/token with exact/byte: one label per object$"):
        LogLikelihood.cat([exact, exact.per(Unit.BYTE, torch.tensor([1]))])
    free = make(1, kind=Kind.UNNORMALIZED)
    message = r"^cannot concatenate unnormalized/token \(constant z\) with unnormalized/token \(constant 2\*z\): one"
    with pytest.raises(ValueError, match=message):
        LogLikelihood.cat([free, 2 * free])
    with pytest.raises(ValueError, match=r"^nothing to concatenate: give at least one LogLikelihood$"):
        LogLikelihood.cat([])


# ---------------------------------------------------------------------- no rows, one row
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("width", [None, 0, 1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_everything_works_on_no_row_and_on_one(rows: int, width: int | None, kind: Kind) -> None:
    a = make(rows, width, kind=kind)
    b = make(rows, width, kind=Kind.EXACT, seed=1)
    for result in (
        a + b,
        a - b,
        b - a,
        -a,
        2 * a,
        a / 3,
        a.detach(),
        a.to("cpu"),
        a[:],
        LogLikelihood.cat([a, a])[:rows],
    ):
        assert len(result) == rows
        assert result.kind in (kind, -kind)
        assert repr(result).startswith("LogLikelihood(")
    total = a.total()
    assert len(total) == 1
    close(total.value, a.value.sum().reshape(1))
    assert total.kind is (Kind.EXACT if kind is Kind.UNNORMALIZED and rows == 0 else kind)
    assert a.non_finite_rows() == []


def test_total_over_no_rows_is_exactly_zero() -> None:
    total = make(0, kind=Kind.UNNORMALIZED).total()
    assert (total.value.tolist(), total.num_units.tolist(), total.kind, total.constant) == (
        [0.0],
        [0],
        Kind.EXACT,
        None,
    )


# ---------------------------------------------------------------------- chain-rule terms
@LAW
@given(case=st.tuples(st.integers(0, 4), st.integers(0, 6)), seed=st.integers(0, 99))
def test_terms_sum_to_the_value(case: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(*case, generator=generator, dtype=torch.float64)
    masks = [torch.rand(*case, generator=generator) < 0.5 for _ in range(2)]
    a, b = (LogLikelihood.from_per_unit(terms, mask) for mask in masks)
    expected = np.where(masks[0].numpy(), terms.numpy(), 0.0)
    np.testing.assert_array_equal(a.per_unit, expected)
    np.testing.assert_allclose(a.value, expected.sum(1), atol=1e-12)
    assert a.num_units.tolist() == masks[0].sum(1).tolist()
    for result in (a, a + b, a - b, -a, 3 * a, a / 7, a[1:], LogLikelihood.cat([a, b]), a + b - a):
        assert result.per_unit is not None
        assert result.mask is not None
        close(result.per_unit.sum(1), result.value)
        assert result.num_units.tolist() == result.mask.sum(1).tolist()
        assert not result.per_unit[~result.mask].any()
    both = a - b
    assert both.mask is not None
    assert torch.equal(both.mask, masks[0] | masks[1])
    assert both.per_unit is not None
    np.testing.assert_allclose(both.per_unit, expected - np.where(masks[1].numpy(), terms.numpy(), 0.0))


def test_unscored_terms_do_not_reach_the_value() -> None:
    a = from_terms([[-1.0, math.nan, -math.inf]], [[1, 0, 0]])
    assert a.value.tolist() == [-1.0]
    assert a.per_unit is not None
    assert a.per_unit.tolist() == [[-1.0, 0.0, 0.0]]


def test_terms_are_summed_in_float64() -> None:
    """2^24 + 1 is no float32: one by one the ones would be lost."""
    terms = torch.ones(1, 4097, dtype=torch.float32)
    terms[0, 0] = 2.0**24
    a = LogLikelihood.from_per_unit(-terms, torch.ones_like(terms, dtype=torch.bool))
    assert a.value.dtype == torch.float32
    assert a.value.item() == -(2.0**24 + 4096)


def test_totals_are_summed_in_float64() -> None:
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(4096)])
    total = LogLikelihood(values, Kind.EXACT, Unit.TOKEN, torch.ones(4097, dtype=torch.long)).total()
    assert total.value.dtype == torch.float32
    assert total.value.item() == 2.0**24 + 4096


def test_terms_of_different_widths_are_dropped() -> None:
    a, b = from_terms([[-1.0, -2.0], [-3.0, -4.0]], [[1, 1], [1, 0]]), from_terms([[-5.0], [-6.0]], [[1], [1]])
    for result in (a + b, a - b):
        assert result.per_unit is result.mask is None
        assert result.num_units.tolist() == [0, 1]  # kept where both agree
    assert (a + b).value.tolist() == [-8.0, -9.0]


def test_terms_are_dropped_where_one_side_has_none() -> None:
    a = from_terms([[-1.0, -2.0], [-3.0, -4.0]], [[1, 1], [1, 0]])
    b = LogLikelihood(torch.zeros(2, dtype=torch.float64), Kind.EXACT, Unit.TOKEN, torch.tensor([2, 2]))
    for result in (a + b, b - a):
        assert result.per_unit is result.mask is None
        assert result.num_units.tolist() == [2, 0]


def test_union_of_masks_counts_a_position_once() -> None:
    a, b = from_terms([[-1.0, -2.0, -3.0]], [[1, 1, 0]]), from_terms([[-1.0, -2.0, -3.0]], [[0, 1, 1]])
    result = a - b
    assert result.num_units.tolist() == [3]
    assert result.per_unit is not None
    assert result.per_unit.tolist() == [[-1.0, 0.0, 3.0]]


@pytest.mark.parametrize(("one", "two", "expected"), [([2, 3], [2, 3], [2, 3]), ([2, 3], [2, 4], [2, 0])])
def test_number_of_units_without_masks(one: list[int], two: list[int], expected: list[int]) -> None:
    a, b = (LogLikelihood(torch.ones(2), Kind.EXACT, Unit.DIM, torch.tensor(units)) for units in (one, two))
    assert (a + b).num_units.tolist() == (a - b).num_units.tolist() == expected
    assert (3 * a).num_units.tolist() == (-a).num_units.tolist() == one
    assert a.total().num_units.tolist() == [sum(one)]


def test_a_total_has_a_reading_per_unit_only_if_every_row_has_one() -> None:
    def total(values: list[float], units: list[int]) -> LogLikelihood:
        return LogLikelihood(torch.tensor(values), Kind.EXACT, Unit.TOKEN, torch.tensor(units)).total()

    assert total([-1.0, 0.0], [3, 0]).num_units.tolist() == [3]  # a row of which nothing was scored
    unread = total([-1.0, -5.0], [3, 0])  # a sum of rows of different lengths: -5 nats over an unknown number of units
    assert unread.value.tolist() == [-6.0]
    assert unread.num_units.tolist() == [0]
    with pytest.raises(ValueError, match="row 0 has no scored token"):
        unread.mean_per_unit()


# ---------------------------------------------------------------------- gradients and devices
MASK = torch.tensor([[True, True, False], [True, True, True]])


def _differentiable(terms: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
    a = LogLikelihood.from_per_unit(terms, MASK)
    b = LogLikelihood.from_samples(
        samples, kind=Kind.ESTIMATE, unit=Unit.TOKEN, num_units=torch.tensor([2, 3]), draws=DrawsKey.of("x")
    )
    joined = LogLikelihood.cat([a[1], -a[[0]], 2.5 * a]) / 3
    assert joined.per_unit is not None
    paired = b - a - 0.5 * b
    assert paired.samples is not None
    perplexity = b.perplexity()
    assert perplexity.stderr is not None
    return (
        (a - b).value,
        joined.value,
        joined.per_unit,
        a.total().value,
        a.mean_per_unit().value,
        a.bits_per_byte(torch.tensor([5, 6])).value,
        a.perplexity().value,
        paired.samples,
        (b + a).total().mean_per_unit().value,
        perplexity.value,
    )


def test_gradients_flow() -> None:
    terms = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    samples = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(_differentiable, (terms, samples))


def test_closed_form_gradients() -> None:
    terms = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    a = LogLikelihood.from_per_unit(terms, MASK)
    (gradient,) = torch.autograd.grad((a.detach() - 2 * a).total().value.sum(), terms)
    assert gradient.tolist() == [[-2.0, -2.0, 0.0], [-2.0, -2.0, -2.0]]  # none through detach, none where not scored
    mean = LogLikelihood.from_per_unit(terms, MASK).mean_per_unit()
    (gradient,) = torch.autograd.grad(mean.value.sum(), terms)
    close(gradient, MASK / torch.tensor([[2.0], [3.0]], dtype=torch.float64))


def test_detach_cuts_every_tensor() -> None:
    samples = torch.ones(3, 2, requires_grad=True)
    a = dataclasses.replace(
        LogLikelihood.from_samples(samples, kind=Kind.ESTIMATE, unit=Unit.TOKEN, num_units=torch.tensor([2, 3])),
        per_unit=torch.zeros(2, 3, requires_grad=True),
        mask=MASK,
        stderr=torch.ones(2, requires_grad=True),
    )
    assert a.value.requires_grad
    cut = a.detach()
    assert_same(cut, a.detach())
    for name in TENSORS:
        assert not getattr(cut, name).requires_grad
        assert torch.equal(getattr(cut, name), getattr(a, name))
    assert a.value.requires_grad
    reported = LogLikelihood.from_samples(samples, kind=Kind.ESTIMATE, unit=Unit.TOKEN, num_units=torch.tensor([2, 3]))
    assert reported.stderr is not None
    assert not reported.stderr.requires_grad  # an error report is no objective


def test_to_moves_every_tensor() -> None:
    a = make(3)
    for device in ("meta", torch.device("meta")):
        moved = a.to(device)
        assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
        assert (moved.kind, moved.unit, moved.draws) == (a.kind, a.unit, a.draws)
    assert_same(a.to("cpu"), a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_arithmetic_on_a_gpu_agrees() -> None:
    a, b = make(3), make(3, kind=Kind.EXACT, seed=1)

    def combine(x: LogLikelihood, y: LogLikelihood) -> list[LogLikelihood]:
        joined = LogLikelihood.cat([(x - y)[[0, 2]], x[torch.tensor([True, False, True])]])
        return [x - y, joined, joined.total(), x.mean_per_unit(), x.per(Unit.BYTE, torch.tensor([4, 5, 6]))]

    for there, here in zip(combine(a.to("cuda"), b.to("cuda")), combine(a, b), strict=True):
        assert there.value.device.type == "cuda"
        assert_same(there.to("cpu"), here)
    num_bytes = torch.tensor([4, 5, 6])
    close(a.to("cuda").bits_per_byte(num_bytes).value.cpu(), a.bits_per_byte(num_bytes).value)
