"""Labels: what a value promises (`Kind`), what it counts (`Unit`), which draws and constants went into it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

__all__ = ["ConstantKey", "DrawsKey", "Kind", "Unit"]


class Kind(Enum):
    r"""What a value promises about :math:`\log p(x)`."""

    EXACT = "exact"  # log p(x) to floating-point accuracy
    LOWER_BOUND = "lower_bound"  # expectation <= log p(x)
    UPPER_BOUND = "upper_bound"  # expectation >= log p(x)
    ESTIMATE = "estimate"  # consistent, neither side guaranteed
    UNNORMALIZED = "unnormalized"  # log p(x) + c, c the same for all x
    SURROGATE = "surrogate"  # correlates with log p(x), promises nothing

    def __str__(self) -> str:
        return self.value

    def __neg__(self) -> Kind:
        """The kind of ``-a``: the bounds swap sides."""
        return _NEGATED.get(self, self)

    def __add__(self, other: Kind) -> Kind:
        """The kind of ``a + b``; UNNORMALIZED + UNNORMALIZED assumes that the constants do not cancel."""
        kinds = {self, other}
        if Kind.EXACT in kinds:
            return other if self is Kind.EXACT else self
        same_is_closed = self is other and self is not Kind.SURROGATE
        return self if same_is_closed else Kind.SURROGATE

    def __sub__(self, other: Kind) -> Kind:
        """The kind of ``a - b``, that is of ``a + (-b)``."""
        return self + (-other)


_NEGATED = {Kind.LOWER_BOUND: Kind.UPPER_BOUND, Kind.UPPER_BOUND: Kind.LOWER_BOUND}


class Unit(StrEnum):
    """What `LogLikelihood.num_units` counts."""

    TOKEN = "token"
    BYTE = "byte"
    DIM = "dim"
    EVENT = "event"


@dataclass(frozen=True, slots=True)
class DrawsKey:
    """Which random numbers a value was computed with.

    Args:
        ids: names of the streams of random numbers that went into the value.
        shared_by_rows: whether every row used the same numbers (then errors of rows do not average out).
    """

    ids: frozenset[str]
    shared_by_rows: bool = False

    @classmethod
    def of(cls, *ids: str, shared_by_rows: bool = False) -> DrawsKey:
        """The key of the named streams."""
        return cls(frozenset(ids), shared_by_rows)

    def shares(self, other: DrawsKey | None) -> bool:
        """Whether any random number is common to both."""
        return other is not None and bool(self.ids & other.ids)

    def union(self, other: DrawsKey | None) -> DrawsKey:
        """The streams of either."""
        if other is None:
            return self
        return DrawsKey(self.ids | other.ids, self.shared_by_rows or other.shared_by_rows)


@dataclass(frozen=True, slots=True)
class ConstantKey:
    r"""Identity of the unknown constant of an UNNORMALIZED value: a formal sum :math:`\sum_i w_i c_i`.

    Two values whose formal sums cancel in a difference have no unknown constant left, and the difference is exact.
    Weights cancel if they agree to 13 digits: what the rounding of the weights leaves of a constant is of the size of
    the rounding of the value, which contains that constant.
    """

    terms: frozenset[tuple[str, float]]

    @classmethod
    def of(cls, name: str) -> ConstantKey:
        """The constant called `name`, with weight one."""
        return cls(frozenset({(name, 1.0)}))

    def scaled(self, weight: float) -> ConstantKey:
        """The constant times `weight`."""
        return ConstantKey(frozenset((name, weight * w) for name, w in self.terms if weight * w != 0))

    def plus(self, other: ConstantKey | None) -> ConstantKey | None:
        """The sum of both, or None where nothing unknown is left."""
        weights = dict(self.terms)
        for name, weight in other.terms if other is not None else ():
            before = weights.get(name, 0.0)
            after = before + weight
            weights[name] = after if abs(after) > 1e-13 * max(abs(before), abs(weight)) else 0.0
        left = frozenset((name, weight) for name, weight in weights.items() if weight != 0)
        return ConstantKey(left) if left else None

    def __str__(self) -> str:
        return "+".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in sorted(self.terms))
