"""Every label that arithmetic hands out is a true statement, and no weaker than it has to be.

True values, slacks, constants and noise lie on the grid of multiples of 1/64 and the weights are dyadic, so that every
sum in float64 is exact and the promises can be checked with ``==`` and ``<=``, without a tolerance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loglik.likelihood import ConstantKey, Kind, LogLikelihood, Unit

LAW = settings(deadline=None, max_examples=150, derandomize=True)
ROWS = 3
KINDS = list(Kind)
PAIRS = list(itertools.product(KINDS, KINDS))
GRID = 64.0
NAMES = ("y", "z")


def grid(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64) / GRID


def label(value: Tensor, kind: Kind, name: str | None) -> LogLikelihood:
    """`value` as an object of `kind`, with the constant called `name` where the kind has one."""
    constant = ConstantKey.of(name or "z") if kind is Kind.UNNORMALIZED else None
    return LogLikelihood(value, kind, Unit.DIM, torch.full(value.shape, 4), constant=constant)


@dataclass(frozen=True)
class Pair:
    """A true log-likelihood beside what a program sees of it; `limit` is what it sees without Monte-Carlo noise."""

    truth: Tensor
    seen: LogLikelihood
    limit: LogLikelihood

    def map(self, function: Any) -> Pair:
        """The same function of the truth (on values) and of the labelled objects."""
        return Pair(function(self.truth), function(self.seen), function(self.limit))


def observe(kind: Kind, truth: Tensor, deviation: Tensor, name: str, constants: dict[str, float]) -> Pair:
    """A value of `kind`, consistent with its promise about `truth`; `deviation` (B,) is arbitrary."""
    zero = torch.zeros_like(truth)
    error = {
        Kind.EXACT: zero,
        Kind.LOWER_BOUND: -deviation.abs(),
        Kind.UPPER_BOUND: deviation.abs(),
        Kind.ESTIMATE: deviation,
        Kind.UNNORMALIZED: zero + constants[name],
        Kind.SURROGATE: deviation,
    }[kind]
    limit = zero if kind is Kind.ESTIMATE else error
    return Pair(truth, label(truth + error, kind, name), label(truth + limit, kind, name))


def assert_promise_holds(result: Pair, constants: dict[str, float]) -> None:
    """What the label of `result.seen` says about the truth is so."""
    seen, truth = result.seen, result.truth
    assert (seen.constant is not None) == (seen.kind is Kind.UNNORMALIZED)
    assert result.limit.kind is seen.kind
    if seen.kind is Kind.EXACT:
        assert torch.equal(seen.value, truth)
    elif seen.kind is Kind.LOWER_BOUND:
        assert (seen.value <= truth).all()
    elif seen.kind is Kind.UPPER_BOUND:
        assert (seen.value >= truth).all()
    elif seen.kind is Kind.ESTIMATE:
        assert torch.equal(result.limit.value, truth)
    elif seen.kind is Kind.UNNORMALIZED:
        assert seen.constant is not None
        offset = sum(weight * constants[name] for name, weight in seen.constant.terms)
        assert torch.equal(seen.value - truth, torch.full_like(truth, offset))


# ---------------------------------------------------------------------- the promise, on random expressions
numbers = st.lists(st.integers(-5000, 5000), min_size=ROWS, max_size=ROWS)
leaves = st.tuples(st.just("leaf"), st.sampled_from(KINDS), st.sampled_from(NAMES), numbers, numbers)
scales = st.sampled_from([-4.0, -1.0, -0.5, 0.25, 2, 3])


def _grow(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub"]), children, children),
        st.tuples(st.just("neg"), children),
        st.tuples(st.just("mul"), scales, children),
    )


expressions = st.recursive(leaves, _grow, max_leaves=5)
worlds = st.fixed_dictionaries({name: st.integers(-900, 900).map(lambda k: k / GRID) for name in NAMES})


def evaluate(expression: Any, constants: dict[str, float]) -> Pair:
    match expression:
        case ("leaf", kind, name, truth, deviation):
            return observe(kind, grid(truth), grid(deviation), name, constants)
        case ("add", a, b):
            one, two = evaluate(a, constants), evaluate(b, constants)
            return Pair(one.truth + two.truth, one.seen + two.seen, one.limit + two.limit)
        case ("sub", a, b):
            one, two = evaluate(a, constants), evaluate(b, constants)
            return Pair(one.truth - two.truth, one.seen - two.seen, one.limit - two.limit)
        case ("neg", a):
            return evaluate(a, constants).map(lambda x: -x)
        case ("mul", weight, a):
            return evaluate(a, constants).map(lambda x: weight * x)
    raise AssertionError(expression)


@LAW
@given(expression=expressions, constants=worlds)
def test_labels_of_random_expressions_are_true(expression: Any, constants: dict[str, float]) -> None:
    result = evaluate(expression, constants)
    assert_promise_holds(result, constants)
    assert_promise_holds(result.map(lambda x: x / 2), constants)
    assert_promise_holds(result.map(lambda x: x / -0.5), constants)


@LAW
@given(expression=expressions, constants=worlds)
def test_labels_of_totals_and_means_are_true(expression: Any, constants: dict[str, float]) -> None:
    result = evaluate(expression, constants)
    rows = slice(0, 2)  # two rows, so that their mean is on the grid too
    total = Pair(result.truth.sum().reshape(1), result.seen.total(), result.limit.total())
    mean = Pair(result.truth / 4, result.seen.mean_per_unit(), result.limit.mean_per_unit())
    part = result.map(lambda x: x[rows])
    for derived in (total, mean, part):
        assert derived.seen.kind is result.seen.kind
        assert_promise_holds(derived, constants)


@LAW
@given(truth=numbers, deviation=numbers, constants=worlds)
def test_total_per_unit_is_true_for_ragged_rows(
    truth: list[int], deviation: list[int], constants: dict[str, float]
) -> None:
    """The unknown constant enters a total once per row, and its mean over 2^k units divides it by their number."""
    lengths = torch.tensor([1, 5, 10])
    for kind in KINDS:
        pair = observe(kind, grid(truth), grid(deviation), "z", constants)
        seen, limit = (x.per(Unit.TOKEN, lengths).total().mean_per_unit() for x in (pair.seen, pair.limit))
        assert seen.kind is kind
        assert_promise_holds(Pair(pair.truth.sum().reshape(1) / 16, seen, limit), constants)


# ---------------------------------------------------------------------- the labels are not needlessly weak
def _strongest_promise(worlds_seen: list[Pair]) -> Kind:
    """The strongest kind that no world contradicts, from the numbers alone."""
    errors = [pair.seen.value - pair.truth for pair in worlds_seen]
    limits = [pair.limit.value - pair.truth for pair in worlds_seen]
    if all((error == 0).all() for error in errors):
        return Kind.EXACT
    if all((error <= 0).all() for error in errors):
        return Kind.LOWER_BOUND
    if all((error >= 0).all() for error in errors):
        return Kind.UPPER_BOUND
    if all((error == error[0]).all() for error in errors):
        return Kind.UNNORMALIZED
    if all((limit == 0).all() for limit in limits):
        return Kind.ESTIMATE
    return Kind.SURROGATE


def _worlds(a: Kind, b: Kind, sign: float, names: tuple[str, str]) -> list[Pair]:
    """`a + sign * b` in twelve worlds, with deviations of both sizes and signs."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randint(-4000, 4000, (8,), generator=generator, dtype=torch.float64) / GRID

    results = []
    for c, d in itertools.product((-7.0, 0.5, 3.0), (-2.0, 1.0, 4.0, 7.0)):
        constants = {"y": c, "z": d}
        one, two = (observe(kind, draw(), draw(), name, constants) for kind, name in zip((a, b), names, strict=True))
        results.append(Pair(one.truth + sign * two.truth, one.seen + sign * two.seen, one.limit + sign * two.limit))
        if sign == -1:
            assert (one.seen - two.seen).kind is results[-1].seen.kind
    return results


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=str)
def test_label_of_every_pair_is_the_strongest_true_one(a: Kind, b: Kind, sign: float) -> None:
    results = _worlds(a, b, sign, ("y", "z"))
    assert {pair.seen.kind for pair in results} == {_strongest_promise(results)}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_surrogates_break_both_bounds_and_do_not_converge(sign: float) -> None:
    surrogates = 0
    for a, b in PAIRS:
        results = _worlds(a, b, sign, ("y", "z"))
        if results[0].seen.kind is Kind.SURROGATE:
            surrogates += 1
            errors = torch.cat([pair.seen.value - pair.truth for pair in results])
            assert errors.min() < 0 < errors.max()
            assert any((pair.seen.value - pair.truth).std() > 0 for pair in results)
            assert any((pair.limit.value != pair.truth).any() for pair in results)
    assert surrogates == 23  # of 36 ordered pairs


def test_same_constant_cancels_in_a_difference_and_doubles_in_a_sum() -> None:
    difference = _worlds(Kind.UNNORMALIZED, Kind.UNNORMALIZED, -1.0, ("z", "z"))
    assert {pair.seen.kind for pair in difference} == {_strongest_promise(difference)} == {Kind.EXACT}
    assert all(pair.seen.constant is None for pair in difference)
    double = _worlds(Kind.UNNORMALIZED, Kind.UNNORMALIZED, 1.0, ("z", "z"))
    assert {pair.seen.kind for pair in double} == {_strongest_promise(double)} == {Kind.UNNORMALIZED}
    assert double[0].seen.constant == ConstantKey.of("z").scaled(2.0)


# ---------------------------------------------------------------------- algebra of the labels, with constants
def _same(a: LogLikelihood, b: LogLikelihood) -> bool:
    return a.kind is b.kind and a.constant == b.constant and torch.equal(a.value, b.value)


normalized_or_not = st.tuples(
    st.just("leaf"), st.sampled_from([Kind.EXACT, Kind.UNNORMALIZED]), st.sampled_from(NAMES), numbers, numbers
)
sums_with_constants = st.recursive(normalized_or_not, _grow, max_leaves=4)


@LAW
@given(e=sums_with_constants, f=sums_with_constants, g=sums_with_constants, constants=worlds)
def test_exact_and_unnormalized_values_form_a_group(e: Any, f: Any, g: Any, constants: dict[str, float]) -> None:
    a, b, c = (evaluate(x, constants).seen for x in (e, f, g))
    assert _same(a + b, b + a)
    assert _same((a + b) + c, a + (b + c))
    assert _same((-a) * -1, a)
    assert _same(-(a - b), b - a)
    assert _same((a - b) + b, a)
    assert (a - a).kind is Kind.EXACT
    assert _same(3 * (a + b), 3 * a + 3 * b)


@LAW
@given(e=expressions, f=expressions, g=expressions, constants=worlds)
def test_order_of_a_sum_changes_no_value_and_at_most_weakens_the_label(
    e: Any, f: Any, g: Any, constants: dict[str, float]
) -> None:
    a, b, c = (evaluate(x, constants).seen for x in (e, f, g))
    assert _same(a + b, b + a)
    assert _same((-a) * -1, a)
    assert _same(-(a + b), (-a) + (-b))
    left, right = (a + b) + c, a + (b + c)
    assert torch.equal(left.value, right.value)
    # A constant that meets a bound before it meets its opposite leaves no promise: weaker, never wrong.
    assert _same(left, right) or Kind.SURROGATE in (left.kind, right.kind)
    if Kind.UNNORMALIZED not in (a.kind, b.kind, c.kind):
        assert _same(left, right)


def test_a_constant_must_cancel_before_a_bound_is_added() -> None:
    constants = {"y": 1.0, "z": 2.0}
    one, two, bound = (
        observe(kind, grid([1, 2, 3]), grid([4, 5, 6]), "z", constants).seen
        for kind in (Kind.UNNORMALIZED, Kind.UNNORMALIZED, Kind.LOWER_BOUND)
    )
    assert ((one - two) + bound).kind is Kind.LOWER_BOUND
    assert (one + (bound - two)).kind is Kind.SURROGATE


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exact_zero_is_neutral(kind: Kind) -> None:
    a = observe(kind, grid([10, 20, 30]), grid([1, -2, 3]), "z", {"y": 0.0, "z": 5.0}).seen
    zero = label(torch.zeros(3, dtype=torch.float64), Kind.EXACT, None)
    assert _same(a + zero, a)
    assert _same(zero + a, a)
    assert _same(a - zero, a)
    assert _same(zero - a, -a)
