r"""`LogLikelihood`: a value in nats that says what it is.

Every number `loglik` hands out is labelled with its `Kind` (exact, a bound, an estimate, ...), its unit, how many units
were scored and its Monte-Carlo standard error. Arithmetic keeps the label honest: :math:`\log p(x) - \log q(x)` of two
exact values is exact, the difference of two lower bounds is no bound at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit

__all__ = ["ConstantKey", "DrawsKey", "Kind", "LogLikelihood", "Measurement", "Unit"]


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """A labelled quantity derived from log-likelihoods, such as bits per byte: `value` (B,), `kind`, `stderr` (B,)."""

    value: Tensor
    kind: Kind
    name: str
    stderr: Tensor | None = None

    def item(self) -> float:
        """The value of the only row, as a Python float."""
        return float(self.value.item())

    def __repr__(self) -> str:
        return f"Measurement({self.name}={_show(self.value, self.stderr)}, {self.kind})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LogLikelihood:
    r"""Log-likelihoods of B sequences in nats, labelled.

    Args:
        value: (B,) nats, float32 or float64.
        kind: what the value promises.
        unit: what `num_units` counts.
        num_units: (B,) how many units were scored; 0 where the value has no reading per unit.
        per_unit: (B, T) chain-rule terms, 0 where not scored; they sum to `value`.
        mask: (B, T) bool, True where scored; given together with `per_unit`.
        stderr: (B,) Monte-Carlo standard error of `value`, nats; None where nothing was sampled.
        draws: which random numbers were used.
        constant: identity of the unknown constant; given exactly if `kind` is UNNORMALIZED.
        samples: (S, B) independent draws whose mean is `value`; with shared draws they make the standard error of a
            difference exact.

    Raises:
        ValueError: for shapes that do not fit, half precision, or a label that contradicts itself.
    """

    value: Tensor
    kind: Kind
    unit: Unit
    num_units: Tensor
    per_unit: Tensor | None = None
    mask: Tensor | None = None
    stderr: Tensor | None = None
    draws: DrawsKey | None = None
    constant: ConstantKey | None = None
    samples: Tensor | None = None

    __array_ufunc__ = None  # else numpy scalars would iterate over the rows instead of asking `__rmul__`

    def __post_init__(self) -> None:
        if self.value.dim() != 1:
            raise ValueError(f"value must have shape (B,), got {tuple(self.value.shape)}")
        if self.value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"value must be float32 or float64, got {self.value.dtype}; convert before summing")
        rows = self.value.shape[0]
        for name in ("num_units", "stderr"):
            field = getattr(self, name)
            if field is not None and tuple(field.shape) != (rows,):
                raise ValueError(f"{name} must have shape ({rows},) like value, got {tuple(field.shape)}")
        if (self.per_unit is None) != (self.mask is None):
            raise ValueError("per_unit and mask go together: give both or neither")
        if self.per_unit is not None and self.mask is not None:
            if self.per_unit.dim() != 2 or self.per_unit.shape != self.mask.shape or len(self.per_unit) != rows:
                raise ValueError(
                    f"per_unit and mask must have shape ({rows}, T), got {tuple(self.per_unit.shape)} and "
                    f"{tuple(self.mask.shape)}"
                )
            if self.mask.dtype != torch.bool:
                raise ValueError(f"mask must be bool, got {self.mask.dtype}")
        if (self.constant is not None) != (self.kind is Kind.UNNORMALIZED):
            raise ValueError(f"a constant belongs to UNNORMALIZED values and to no other; kind is {self.kind}")
        if self.samples is not None and (
            self.samples.dim() != 2 or self.samples.shape[1] != rows or self.samples.shape[0] == 0
        ):
            raise ValueError(f"samples must have shape (S, {rows}) with S > 0, got {tuple(self.samples.shape)}")

    # ------------------------------------------------------------------ construction
    @classmethod
    def from_per_unit(
        cls, per_unit: Tensor, mask: Tensor, *, kind: Kind = Kind.EXACT, unit: Unit = Unit.TOKEN
    ) -> LogLikelihood:
        """The sum of chain-rule terms (B, T) over `mask` (B, T), accumulated in float64 and kept in their dtype."""
        terms = per_unit.masked_fill(~mask, 0.0)
        value = terms.sum(-1, dtype=torch.float64).to(terms.dtype)
        return cls(value, kind, unit, mask.sum(-1), per_unit=terms, mask=mask)

    @classmethod
    def from_samples(
        cls, samples: Tensor, *, kind: Kind, unit: Unit, num_units: Tensor, draws: DrawsKey | None = None
    ) -> LogLikelihood:
        r"""The mean of S independent draws (S, B); standard error :math:`s / \sqrt{S}` (ddof 1; inf for S = 1)."""
        count = samples.shape[0]
        if count == 0:
            raise ValueError("samples is empty; at least one draw is needed")
        return cls(
            samples.mean(0),
            kind,
            unit,
            num_units,
            stderr=_stderr_of_mean(samples),
            draws=draws,
            samples=samples,
        )

    @classmethod
    def cat(cls, parts: Sequence[LogLikelihood]) -> LogLikelihood:
        """Concatenate rows of one kind, unit and constant; per-unit terms are padded on the right to a common T.

        Samples are dropped; per-unit terms are kept only where every part has them. If any part has standard errors,
        those of a part without (nothing was sampled) are 0.

        Raises:
            ValueError: for no parts at all, or parts with different labels.
        """
        if not parts:
            raise ValueError("nothing to concatenate: give at least one LogLikelihood")
        first = parts[0]
        for part in parts[1:]:
            if (part.kind, part.unit, part.constant) != (first.kind, first.unit, first.constant):
                raise ValueError(f"cannot concatenate {first._label()} with {part._label()}: one label per object")
        per_unit = mask = stderr = draws = None
        terms = [(p.per_unit, p.mask) for p in parts if p.per_unit is not None and p.mask is not None]
        if len(terms) == len(parts):
            width = max(t.shape[1] for t, _ in terms)
            per_unit = torch.cat([_pad_right(t, width) for t, _ in terms])
            mask = torch.cat([_pad_right(m, width) for _, m in terms])
        if any(p.stderr is not None for p in parts):
            stderr = torch.cat([p.stderr if p.stderr is not None else torch.zeros_like(p.value) for p in parts])
        for part in parts:
            draws = part.draws.union(draws) if part.draws is not None else draws
        return cls(
            torch.cat([p.value for p in parts]),
            first.kind,
            first.unit,
            torch.cat([p.num_units for p in parts]),
            per_unit=per_unit,
            mask=mask,
            stderr=stderr,
            draws=draws,
            constant=first.constant,
        )

    # ------------------------------------------------------------------ arithmetic
    def __neg__(self) -> LogLikelihood:
        return self * -1.0

    def __mul__(self, weight: float) -> LogLikelihood:
        """Scale by a finite number (a temperature, a beta); a negative one swaps the bounds."""
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        if weight == 0:
            raise ValueError("scaling a log-likelihood by 0 leaves nothing to label")
        if not math.isfinite(weight):
            raise ValueError(f"a log-likelihood can be scaled by a finite number only, got {weight}")
        return replace(
            self,
            value=self.value * weight,
            kind=self.kind if weight > 0 else -self.kind,
            per_unit=None if self.per_unit is None else self.per_unit * weight,
            stderr=None if self.stderr is None else self.stderr * abs(weight),
            constant=None if self.constant is None else self.constant.scaled(weight),
            samples=None if self.samples is None else self.samples * weight,
        )

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> LogLikelihood:
        """Divide by a finite number other than 0."""
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        if weight == 0 or not math.isfinite(weight):
            raise ValueError(f"a log-likelihood can be divided by a finite number other than 0 only, got {weight}")
        return self * (1.0 / weight)

    def __sub__(self, other: LogLikelihood) -> LogLikelihood:
        """``a + (-b)``."""
        if not isinstance(other, LogLikelihood):
            return NotImplemented
        return self + (-other)

    def __add__(self, other: LogLikelihood) -> LogLikelihood:
        """Add row by row.

        Per-unit terms of equal width are added position by position over the union of both masks; terms of different
        widths are dropped. `num_units` counts that union; without masks it is kept where both agree and 0 elsewhere.
        Standard errors add in quadrature; with shared draws they come from the paired samples where both carry them,
        and otherwise add linearly (the Cauchy-Schwarz bound).
        """
        if not isinstance(other, LogLikelihood):
            return NotImplemented
        if len(self) != len(other):
            raise ValueError(f"cannot combine {len(self)} rows with {len(other)} rows")
        if self.unit is not other.unit:
            raise ValueError(f"cannot combine a value per {self.unit} with one per {other.unit}; convert with per(...)")
        constant = self.constant.plus(other.constant) if self.constant is not None else other.constant
        kind = self.kind + other.kind
        if kind is Kind.UNNORMALIZED and constant is None:
            kind = Kind.EXACT
        if kind is not Kind.UNNORMALIZED:
            constant = None
        num_units = torch.where(self.num_units == other.num_units, self.num_units, 0)
        per_unit = mask = None
        if self.per_unit is not None and other.per_unit is not None and self.per_unit.shape == other.per_unit.shape:
            assert self.mask is not None
            assert other.mask is not None
            per_unit, mask = self.per_unit + other.per_unit, self.mask | other.mask
            num_units = mask.sum(-1)
        stderr, samples = _combine_errors(self, other)
        draws = self.draws.union(other.draws) if self.draws is not None else other.draws
        return LogLikelihood(
            self.value + other.value,
            kind,
            self.unit,
            num_units,
            per_unit=per_unit,
            mask=mask,
            stderr=stderr,
            draws=draws,
            constant=constant,
            samples=samples,
        )

    # ------------------------------------------------------------------ derived quantities
    def total(self) -> LogLikelihood:
        """The sum over rows, as one row: the log-likelihood of independent sequences together.

        An unknown constant enters once per row. Standard errors add in quadrature; where rows shared their draws they
        come from the samples, and without samples they add linearly. `num_units` is 0 if it is 0 for a row whose value
        is not: such a row has no reading per unit, so the sum has none.
        """
        stderr = samples = None
        if self.samples is not None and self.draws is not None and self.draws.shared_by_rows:
            samples = self.samples.sum(1, keepdim=True)
            stderr = _stderr_of_mean(samples)
        elif self.stderr is not None:
            linear = self.draws is not None and self.draws.shared_by_rows
            stderr = (self.stderr.sum() if linear else self.stderr.square().sum().sqrt()).reshape(1)
        no_reading = ((self.num_units == 0) & (self.value != 0)).any()
        constant = self.constant.scaled(float(len(self))) if self.constant is not None and len(self) else None
        nothing_unknown = self.kind is Kind.UNNORMALIZED and constant is None  # the sum over no rows is 0
        return LogLikelihood(
            self.value.sum(dtype=torch.float64).to(self.value.dtype).reshape(1),
            Kind.EXACT if nothing_unknown else self.kind,
            self.unit,
            torch.where(no_reading, 0, self.num_units.sum()).reshape(1),
            stderr=stderr,
            draws=self.draws,
            constant=constant,
            samples=samples,
        )

    def mean_per_unit(self) -> LogLikelihood:
        """Nats per unit, row by row (`num_units` becomes 1); an unknown constant survives only equal lengths.

        Raises:
            ValueError: for a row without scored units.
        """
        self._require_units(self.num_units, str(self.unit))
        kind, constant = self.kind, self.constant
        if constant is not None:
            same_length = bool((self.num_units == self.num_units[:1]).all())
            constant = constant.scaled(1.0 / int(self.num_units[0])) if same_length and len(self) else None
            kind = kind if constant is not None else Kind.SURROGATE
        count = self.num_units.to(self.value.dtype)
        return LogLikelihood(
            self.value / count,
            kind,
            self.unit,
            torch.ones_like(self.num_units),
            stderr=None if self.stderr is None else self.stderr / count,
            draws=self.draws,
            constant=constant,
            samples=None if self.samples is None else self.samples / count,
        )

    def per(self, unit: Unit, num_units: Tensor) -> LogLikelihood:
        """The same value counted in another unit, with (B,) `num_units`; chain-rule terms are dropped."""
        return replace(self, unit=unit, num_units=num_units.to(self.value.device), per_unit=None, mask=None)

    def bits_per_byte(self, num_bytes: Tensor | None = None) -> Measurement:
        r""":math:`-\log_2 p(x) / \text{bytes}`, row by row; a lower bound on the likelihood is an upper bound here.

        Args:
            num_bytes: (B,) UTF-8 bytes of the text that was scored; may be left out if `unit` is BYTE.
        """
        if num_bytes is None and self.unit is not Unit.BYTE:
            raise ValueError(f"bits per byte needs num_bytes: the value is counted per {self.unit}")
        counted = self if num_bytes is None else self.per(Unit.BYTE, num_bytes)
        mean = counted.mean_per_unit() / -math.log(2)
        return Measurement(mean.value, mean.kind, "bits_per_byte", mean.stderr)

    def perplexity(self) -> Measurement:
        r""":math:`\exp(-\log p(x) / \text{units})`, row by row, with a delta-method standard error.

        A lower bound gives an upper bound, in expectation too (Jensen). A sampled upper bound gives no bound.
        """
        mean = -self.mean_per_unit()
        kind = mean.kind
        if kind is Kind.UNNORMALIZED:  # a constant factor, not a constant term, is unknown
            kind = Kind.SURROGATE
        if kind is Kind.LOWER_BOUND and (self.stderr is not None or self.draws is not None):
            kind = Kind.SURROGATE
        value = mean.value.exp()
        return Measurement(value, kind, "perplexity", None if mean.stderr is None else value * mean.stderr)

    # ------------------------------------------------------------------ rows, devices, gradients
    def __len__(self) -> int:
        return self.value.shape[0]

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> LogLikelihood:
        """Rows by number, slice, index tensor or bool mask; one number gives an object of one row."""
        if not isinstance(index, int | slice):
            index = torch.as_tensor(index, device=self.value.device)
            if index.dim() == 0:
                index = operator.index(index)
            elif index.numel() == 0 and index.dtype != torch.bool:  # an empty list becomes a float tensor
                index = index.long()
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            index = slice(index, index + 1 or None)

        def pick(field: Tensor | None) -> Tensor | None:
            return None if field is None else field[index]

        return replace(
            self,
            value=self.value[index],
            num_units=self.num_units[index],
            per_unit=pick(self.per_unit),
            mask=pick(self.mask),
            stderr=pick(self.stderr),
            samples=None if self.samples is None else self.samples[:, index],
        )

    def to(self, device: torch.device | str) -> LogLikelihood:
        """The same on another device."""
        return self._map(lambda field: field.to(device))

    def detach(self) -> LogLikelihood:
        """The same without its autograd graph."""
        return self._map(lambda field: field.detach())

    def non_finite_rows(self) -> list[int]:
        """Rows whose value is NaN or +inf (never a log-likelihood of a discrete model); -inf is a legal log 0."""
        bad = torch.isnan(self.value) | torch.isposinf(self.value)
        return [int(i) for i in bad.nonzero().flatten()]

    def __repr__(self) -> str:
        extras = "" if self.constant is None else f", constant={self.constant}"
        units = _brief([str(int(n)) for n in self.num_units[:_SHOWN]], len(self))
        return f"LogLikelihood({_show(self.value, self.stderr)} nats, {self.kind}, {self.unit}s={units}{extras})"

    def _label(self) -> str:
        return f"{self.kind}/{self.unit}" + ("" if self.constant is None else f" (constant {self.constant})")

    def _map(self, move: Callable[[Tensor], Tensor]) -> LogLikelihood:
        names = ("value", "num_units", "per_unit", "mask", "stderr", "samples")
        moved: dict[str, Any] = {name: move(field) for name in names if (field := getattr(self, name)) is not None}
        return replace(self, **moved)

    def _require_units(self, count: Tensor, name: str) -> None:
        empty = (count <= 0).nonzero().flatten()
        if len(empty):
            raise ValueError(f"row {int(empty[0])} has no scored {name}, so a value per {name} is undefined")


_SHOWN = 4


def _stderr_of_mean(samples: Tensor) -> Tensor:
    if samples.shape[1] == 0:  # torch warns about the spread of nothing
        return torch.zeros_like(samples[0])
    if samples.shape[0] == 1:
        return torch.full_like(samples[0], math.inf)
    return samples.detach().std(0, correction=1) / math.sqrt(samples.shape[0])


def _combine_errors(a: LogLikelihood, b: LogLikelihood) -> tuple[Tensor | None, Tensor | None]:
    """Standard error and paired samples of ``a + b``."""
    if a.stderr is None or b.stderr is None:
        one, other = (a, b) if a.stderr is not None else (b, a)
        samples = None if one.samples is None else one.samples + other.value
        return one.stderr, samples
    if a.draws is not None and a.draws.shares(b.draws):
        paired = a.draws == b.draws and a.samples is not None and b.samples is not None
        if paired and a.samples is not None and b.samples is not None and a.samples.shape == b.samples.shape:
            samples = a.samples + b.samples
            return _stderr_of_mean(samples), samples
        return a.stderr + b.stderr, None
    return torch.hypot(a.stderr, b.stderr), None


def _pad_right(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _brief(shown: list[str], count: int) -> str:
    body = ", ".join(shown) + (", ..." if count > _SHOWN else "")
    return body if count == 1 else f"[{body}]"


def _show(value: Tensor, stderr: Tensor | None) -> str:
    parts = [f"{float(v):.4f}" for v in value[:_SHOWN].detach()]
    if stderr is not None:
        parts = [f"{p} ± {float(s):.2g}" for p, s in zip(parts, stderr[:_SHOWN].detach(), strict=True)]
    return _brief(parts, len(value))
