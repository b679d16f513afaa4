"""The label algebra against a table derived by hand from the definitions of the kinds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit

LAW = settings(deadline=None, max_examples=80, derandomize=True)
KINDS = list(Kind)
LETTERS = {
    "E": Kind.EXACT,
    "L": Kind.LOWER_BOUND,
    "U": Kind.UPPER_BOUND,
    "M": Kind.ESTIMATE,  # Monte Carlo
    "N": Kind.UNNORMALIZED,
    "S": Kind.SURROGATE,
}

# Rows: kind of a; columns: kind of b; constants of two UNNORMALIZED operands do not cancel.
SUM = """
    E L U M N S
E   E L U M N S
L   L L S S S S
U   U S U S S S
M   M S S M S S
N   N S S S N S
S   S S S S S S
"""
DIFFERENCE = """
    E L U M N S
E   E U L M N S
L   L S L S S S
U   U U S S S S
M   M S S M S S
N   N S S S N S
S   S S S S S S
"""
NEGATION = {"E": "E", "L": "U", "U": "L", "M": "M", "N": "N", "S": "S"}


def _cells(table: str) -> list[tuple[Kind, Kind, Kind]]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return [
        (LETTERS[first], LETTERS[second], LETTERS[result])
        for first, *results in rows
        for second, result in zip(header, results, strict=True)
    ]


def test_tables_name_every_ordered_pair_once() -> None:
    for table in (SUM, DIFFERENCE):
        pairs = [(a, b) for a, b, _ in _cells(table)]
        assert len(pairs) == len(set(pairs)) == len(KINDS) ** 2


@pytest.mark.parametrize(("a", "b", "expected"), _cells(SUM), ids=str)
def test_kind_of_a_sum(a: Kind, b: Kind, expected: Kind) -> None:
    assert a + b is expected


@pytest.mark.parametrize(("a", "b", "expected"), _cells(DIFFERENCE), ids=str)
def test_kind_of_a_difference(a: Kind, b: Kind, expected: Kind) -> None:
    assert a - b is expected


@pytest.mark.parametrize(("letter", "expected"), NEGATION.items())
def test_kind_of_a_negation(letter: str, expected: str) -> None:
    assert -LETTERS[letter] is LETTERS[expected]


@pytest.mark.parametrize(("a", "b", "c"), list(itertools.product(KINDS, repeat=3)), ids=str)
def test_kinds_are_a_commutative_monoid_with_an_involution(a: Kind, b: Kind, c: Kind) -> None:
    assert a + b is b + a
    assert (a + b) + c is a + (b + c)
    assert a + Kind.EXACT is a
    assert Kind.EXACT + a is a
    assert a.__neg__().__neg__() is a
    assert -(a + b) is (-a) + (-b)
    assert a - b is a + (-b)
    assert -(a - b) is b - a


def test_names_are_readable() -> None:
    assert [str(kind) for kind in KINDS] == [
        "exact",
        "lower_bound",
        "upper_bound",
        "estimate",
        "unnormalized",
        "surrogate",
    ]
    assert [str(unit) for unit in Unit] == ["token", "byte", "dim", "event"]
    assert Kind("lower_bound") is Kind.LOWER_BOUND
    assert Unit("byte") is Unit.BYTE


# ---------------------------------------------------------------------- unknown constants
weights = st.integers(-64, 64).filter(bool).map(lambda k: k / 8)  # dyadic: sums of them are exact
formal_sums = st.dictionaries(st.sampled_from("xyz"), weights, min_size=1).map(
    lambda terms: ConstantKey(frozenset(terms.items()))
)
maybe_sums = st.none() | formal_sums


def _plus(a: ConstantKey | None, b: ConstantKey | None) -> ConstantKey | None:
    return b if a is None else a.plus(b)


def _worth(key: ConstantKey | None, constants: dict[str, float]) -> float:
    return 0.0 if key is None else sum(weight * constants[name] for name, weight in key.terms)


@LAW
@given(a=maybe_sums, b=maybe_sums, c=maybe_sums)
def test_formal_sums_form_an_abelian_group(a: ConstantKey | None, b: ConstantKey | None, c: ConstantKey | None) -> None:
    assert _plus(a, b) == _plus(b, a)
    assert _plus(_plus(a, b), c) == _plus(a, _plus(b, c))
    assert _plus(a, None) == a
    if a is not None:
        assert a.plus(a.scaled(-1.0)) is None
        assert a.scaled(-1.0).scaled(-1.0) == a


@LAW
@given(a=formal_sums, b=formal_sums, weight=weights, x=st.integers(-99, 99), y=st.integers(-99, 99))
def test_formal_sums_stand_for_numbers(a: ConstantKey, b: ConstantKey, weight: float, x: int, y: int) -> None:
    constants = {"x": float(x), "y": float(y), "z": 7.0}
    assert _worth(a.plus(b), constants) == _worth(a, constants) + _worth(b, constants)
    assert _worth(a.scaled(weight), constants) == weight * _worth(a, constants)


def test_constant_of_a_name_has_weight_one() -> None:
    assert ConstantKey.of("z").terms == frozenset({("z", 1.0)})
    assert ConstantKey.of("z") == ConstantKey.of("z")
    assert ConstantKey.of("z") != ConstantKey.of("y")
    assert hash(ConstantKey.of("z")) == hash(ConstantKey.of("z"))


def test_only_the_part_that_cancels_vanishes() -> None:
    z, y = ConstantKey.of("z"), ConstantKey.of("y")
    both = z.plus(y)
    assert both is not None
    assert both.plus(z.scaled(-1.0)) == y
    assert z.plus(z) == z.scaled(2.0)


def test_rounding_of_weights_does_not_leave_a_constant() -> None:
    z = ConstantKey.of("z")
    tenths = z.scaled(0.1).plus(z.scaled(0.2))
    assert tenths is not None
    assert 0.1 + 0.2 - 0.3 != 0
    assert tenths.plus(z.scaled(-0.3)) is None
    assert 1 / 49 * 49 != 1
    assert z.scaled(1 / 49).scaled(49.0).plus(z.scaled(-1.0)) is None
    assert z.plus(z.scaled(-1 + 1e-9)) is not None  # a difference that no rounding explains


def test_constants_read_as_sums() -> None:
    z, y = ConstantKey.of("z"), ConstantKey.of("y")
    assert str(z) == "z"
    assert str(z.scaled(2.0)) == "2*z"
    assert str(z.plus(y.scaled(-0.5))) == "-0.5*y+z"


# ---------------------------------------------------------------------- draws
def test_draws_share_where_a_stream_is_common() -> None:
    ab, bc, cd = DrawsKey.of("a", "b"), DrawsKey.of("b", "c"), DrawsKey.of("c", "d")
    assert ab.shares(bc)
    assert bc.shares(ab)
    assert not ab.shares(cd)
    assert not ab.shares(None)
    assert not DrawsKey.of().shares(DrawsKey.of())


def test_union_of_draws() -> None:
    a, b = DrawsKey.of("a"), DrawsKey.of("b", shared_by_rows=True)
    assert a.union(None) == a
    assert a.union(a) == a
    assert a.union(b) == b.union(a) == DrawsKey(frozenset({"a", "b"}), shared_by_rows=True)
    assert not a.union(DrawsKey.of("c")).shared_by_rows
