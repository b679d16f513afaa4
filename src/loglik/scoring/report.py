r"""A self-contained HTML page of scored text: totals, histograms, rows, surprising lines and token heat maps.

The page is one file without any reference to the outside. Everything that was read or computed enters it as JSON, and
the page's script shows it as text only, so that no token can become markup.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import nlargest
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.scoring.lines import scored_lines
from loglik.scoring.rows import ScoredRow

__all__ = ["ReportBuilder"]

_MAX_TABLE_ROWS = 2_000
_MAX_ERRORS = 200
_MAX_LINES = 50
_MIN_LINE_BYTES = 16  # shorter lines are not ranked by bits per byte: a lone bracket would lead every list
_MAX_LINE_CHARS = 240
_TABLE_COLUMNS = (
    "name",
    "id",
    "bits_per_byte",
    "log_prob",
    "stderr",
    "num_tokens",
    "num_bytes",
    "is_greedy",
    "boundary",
    "num_windowed",
    "kind",
    "map",
)


@dataclass(slots=True)
class _Histogram:
    """Counts in bins ``[i * width, (i + 1) * width)`` from 0 to `top`; the last count is everything from `top` up.

    Widths are powers of two, so that the bin of a value is found without rounding. Values below 0 (rounding of a
    probability of one, an upper bound) are counted in the first bin.
    """

    width: float
    top: float
    counts: list[int] = field(init=False)
    total: float = 0.0
    number: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * (round(self.top / self.width) + 1)

    def add(self, value: float) -> None:
        last = len(self.counts) - 1
        index = last if value >= self.top else max(0, int(value / self.width))
        self.counts[index] += 1
        self.total += value
        self.number += 1

    def encode(self) -> dict[str, Any]:
        mean = _number(self.total / self.number) if self.number else None
        return {"width": self.width, "top": self.top, "counts": self.counts, "number": self.number, "mean": mean}


@dataclass(frozen=True, slots=True)
class _HeatMap:
    """The tokens kept of one row; `num_tokens` counts those of the whole row."""

    name: str
    bits_per_byte: float | None
    num_tokens: int
    tokens: list[str]
    log_probs: list[float | None]


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a heat map's text: the scored tokens that start on it."""

    map: int
    number: int
    bits: float
    num_bytes: int
    text: str

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.num_bytes if self.num_bytes else -math.inf

    def encode(self) -> list[Any]:
        return [self.map, self.number, _number(self.bits), _number(self.bits_per_byte), self.text]


class ReportBuilder:
    r"""Collects scored rows, one at a time, and writes them as one HTML page.

    Totals and histograms are over all rows added: bits per byte is :math:`-\sum \log p / (\ln 2 \cdot \text{bytes})`,
    perplexity :math:`\exp(-\sum \log p / \text{tokens})`, both with the kind that follows from the rows' kinds.
    Standard errors of rows add in quadrature, that is as of independent draws. Tokens are kept for the heat maps only,
    up to the two limits; the table keeps 2,000 rows. The page says what it leaves out.

    Args:
        title: heading of the page.
        subtitle: one line below it.
        facts: how the rows were scored (model, dtype, BOS policy, ...), shown in this order before the computed
            numbers of rows, tokens and bytes.
        max_heat_maps: rows whose tokens are kept.
        max_tokens: tokens kept over all heat maps; the row that reaches it is shown in part.
    """

    def __init__(
        self,
        *,
        title: str,
        subtitle: str = "",
        facts: Mapping[str, str] | None = None,
        max_heat_maps: int = 200,
        max_tokens: int = 60_000,
    ) -> None:
        for option, limit in (("max_heat_maps", max_heat_maps), ("max_tokens", max_tokens)):
            if limit < 0:
                raise InputError(f"{option} is {limit}; give 0 or more")
        self._title = title
        self._subtitle = subtitle
        self._facts = dict(facts or {})
        self._max_heat_maps = max_heat_maps
        self._tokens_left = max_tokens
        self._kinds: Counter[Kind] = Counter()
        self._kind: Kind | None = None
        self._nats = 0.0
        self._variance: float | None = None
        self._tokens = self._bytes = self._rows_with_terms = 0
        self._token_bits = _Histogram(0.25, 24.0)
        self._row_bits = _Histogram(0.0625, 24.0)
        self._table: list[list[Any]] = []
        self._maps: list[_HeatMap] = []
        self._num_maps = self._num_errors = 0
        self._errors: list[list[str]] = []

    def add(self, row: ScoredRow, *, name: str | None = None) -> None:
        """Add one row, called `name` on the page (its id by default).

        A row with an error, or with a log-probability that is NaN or infinitely high, is listed apart with a sentence.

        Raises:
            RowError: if the row has not one log-probability per token, or a kind that does not exist.
        """
        shown = row.id if name is None else name
        terms = row.token_log_probs
        if terms is not None and row.tokens is not None and len(terms) != len(row.tokens):
            reason = f"{len(row.tokens)} tokens come with {len(terms)} log-probabilities; give one per token"
            raise RowError(reason, row=shown)
        error = row.error if row.error is not None else _unusable(row)
        if error is not None or row.log_prob is None:
            self._num_errors += 1
            if len(self._errors) < _MAX_ERRORS:
                self._errors.append([shown, error or ""])
            return
        self._add_totals(row, shown)
        if terms is not None:
            self._rows_with_terms += 1
            for term in terms:
                if term is not None:
                    self._token_bits.add(-term / math.log(2))
        map_number = self._keep_tokens(row, shown)
        if len(self._table) < _MAX_TABLE_ROWS:
            cells = {name: getattr(row, name, None) for name in _TABLE_COLUMNS}
            cells |= {"name": shown, "id": row.id if row.id != shown else None, "map": map_number}
            self._table.append([_number(v) if isinstance(v, float) else v for v in cells.values()])

    def write(self, path: str | Path) -> None:
        """Write the page; the file appears, or is replaced, only once it is complete.

        Raises:
            InputError: if no row was added, or if the file cannot be written.
        """
        if not self._kinds and not self._num_errors:
            raise InputError("the report has no rows; score at least one row before writing it")
        template = files("loglik.scoring").joinpath("report_template.html").read_text(encoding="utf-8")
        head, _, rest = template.partition("{{title}}")
        middle, _, tail = rest.partition("{{data}}")
        page = "".join((head, html.escape(self._title), middle, _embed(self._encode()), tail))
        target = Path(path)
        partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        try:
            partial.write_bytes(page.encode("utf-8", "replace"))
            os.replace(partial, target)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"the report cannot be written to {target} ({reason}); name a file in a folder that can be written to"
            ) from None
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    # ------------------------------------------------------------------ collecting
    def _add_totals(self, row: ScoredRow, shown: str) -> None:
        try:
            kind = Kind(row.kind)
        except ValueError:
            known = ", ".join(k.value for k in Kind)
            raise RowError(f"kind {row.kind!r} is not known; use one of {known}", row=shown) from None
        self._kinds[kind] += 1
        self._kind = kind if self._kind is None else self._kind + kind
        self._nats += row.log_prob or 0.0
        if row.stderr is not None:
            self._variance = (self._variance or 0.0) + row.stderr**2
        self._tokens += row.num_tokens or 0
        self._bytes += row.num_bytes or 0
        if row.bits_per_byte is not None and not math.isnan(row.bits_per_byte):
            self._row_bits.add(row.bits_per_byte)

    def _keep_tokens(self, row: ScoredRow, shown: str) -> int | None:
        """Keep the row's tokens as far as the limits allow; returns the number of its heat map."""
        if not row.tokens or row.token_log_probs is None:
            return None
        self._num_maps += 1
        if len(self._maps) >= self._max_heat_maps or self._tokens_left == 0:
            return None
        kept = slice(self._tokens_left)
        tokens, terms = list(row.tokens[kept]), list(row.token_log_probs[kept])
        self._tokens_left -= len(tokens)
        self._maps.append(_HeatMap(shown, row.bits_per_byte, len(row.tokens), tokens, terms))
        return len(self._maps) - 1

    # ------------------------------------------------------------------ encoding
    def _encode(self) -> dict[str, Any]:
        lines = [line for number, kept in enumerate(self._maps) for line in _lines(number, kept)]
        dense = [line for line in lines if line.num_bytes >= _MIN_LINE_BYTES]
        return {
            "title": self._title,
            "subtitle": self._subtitle,
            "version": version("loglik"),
            "facts": self._all_facts(),
            "totals": self._encode_totals(),
            "histograms": {
                "tokens": self._token_bits.encode() | {"rows": self._rows_with_terms},
                "rows": self._row_bits.encode(),
            },
            "table": {"columns": _TABLE_COLUMNS, "rows": self._table},
            "errors": {"number": self._num_errors, "rows": self._errors},
            "lines": {
                "min_bytes": _MIN_LINE_BYTES,
                "bits": [line.encode() for line in nlargest(_MAX_LINES, lines, key=lambda line: line.bits)],
                "bits_per_byte": [
                    line.encode() for line in nlargest(_MAX_LINES, dense, key=lambda line: line.bits_per_byte)
                ],
            },
            "maps": [
                {
                    "name": kept.name,
                    "bits_per_byte": _number(kept.bits_per_byte),
                    "num_tokens": kept.num_tokens,
                    "tokens": kept.tokens,
                    "log_probs": [_number(term, 4) for term in kept.log_probs],
                }
                for kept in self._maps
            ],
            "num_maps": self._num_maps,
        }

    def _all_facts(self) -> list[list[str]]:
        scored = self._kinds.total()
        rows = f"{scored:,}" if not self._num_errors else f"{scored:,} scored, {self._num_errors:,} with an error"
        computed = {"rows": rows, "tokens": f"{self._tokens:,}", "bytes": f"{self._bytes:,}"}
        given = {name.casefold() for name in self._facts}
        new = {name: value for name, value in computed.items() if name not in given}
        return [[name, str(value)] for name, value in (self._facts | new).items()]

    def _encode_totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = {
            "rows": self._kinds.total(),
            "tokens": self._tokens,
            "bytes": self._bytes,
            "nats": _number(self._nats),
            "stderr": None if self._variance is None else _number(math.sqrt(self._variance)),
            "kind": None if self._kind is None else self._kind.value,
            "kinds": {kind.value: count for kind, count in self._kinds.most_common()},
            "bits_per_byte": None,
            "perplexity": None,
        }
        if self._kind is None:
            return totals
        constant = ConstantKey.of("report") if self._kind is Kind.UNNORMALIZED else None
        stderr = None if self._variance is None else torch.tensor([math.sqrt(self._variance)], dtype=torch.float64)
        total = LogLikelihood(
            torch.tensor([self._nats], dtype=torch.float64),
            self._kind,
            Unit.TOKEN,
            torch.tensor([self._tokens]),
            stderr=stderr,
            constant=constant,
        )
        if self._bytes:
            totals["bits_per_byte"] = _encode_measurement(total.bits_per_byte(torch.tensor([self._bytes])))
        if self._tokens:
            totals["perplexity"] = _encode_measurement(total.perplexity())
        return totals


def _unusable(row: ScoredRow) -> str | None:
    """Why a row without an error cannot enter a total."""
    numbers: Sequence[float | None] = (row.log_prob, *(row.token_log_probs or ()))
    if row.log_prob is None:
        return "it has no log-probability; score the row again"
    if any(v is not None and (math.isnan(v) or v == math.inf) for v in numbers):
        return "its log-probability is not a number; check the model's weights and dtype, and score the row again"
    return None


def _lines(number: int, kept: _HeatMap) -> Iterator[_Line]:
    """Lines with scored tokens; the last line of a row shown in part is not whole and left out."""
    whole = len(kept.tokens) == kept.num_tokens
    last = "".join(kept.tokens).count("\n") + 1
    for line in scored_lines(kept.tokens, kept.log_probs):
        if line.num_tokens and (whole or line.number < last):
            text = line.text.strip()[:_MAX_LINE_CHARS]
            yield _Line(number, line.number - 1, line.bits, line.num_bytes, text)


def _encode_measurement(measured: Measurement) -> dict[str, Any]:
    stderr = None if measured.stderr is None else _number(float(measured.stderr.item()))
    return {"value": _number(measured.item()), "kind": measured.kind.value, "stderr": stderr}


def _number(value: float | None, digits: int | None = None) -> float | str | None:
    """A number as JSON can hold it: infinity as the word that JavaScript and Python both read, NaN as nothing."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value if digits is None else round(value, digits) + 0.0  # + 0.0: no minus sign before a rounded zero


_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


def _embed(data: Mapping[str, Any]) -> str:
    """JSON that cannot end its script element, breaks no line of script and holds no half of a surrogate pair."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
