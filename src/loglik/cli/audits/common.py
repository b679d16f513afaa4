"""What the audits share: their options, reading rows, and writing a table, a summary and a page."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import tyro
from rich.console import Console
from rich.table import Table

from loglik.errors import InputError, LoglikError, RowError
from loglik.progress import stderr_console
from loglik.signals.pages import AuditPage, shown

__all__ = [
    "Audited",
    "ModelAudit",
    "ModelOptions",
    "Outputs",
    "RowAudit",
    "check_writable",
    "print_summary",
    "read_rows",
    "rows_named",
    "write_table",
    "write_text",
]

_ROW = re.compile(r"\b(?:row|query|question|response) (\d+)\b")  # what the signals call a row


@dataclass(frozen=True)
class Audited:
    """Rows that were read.

    Args:
        names: how errors name them.
        records: their columns.
        left_out: a sentence for each row that was skipped.
    """

    names: list[str]
    records: list[Mapping[str, Any]]
    left_out: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def has(self, column: str) -> bool:
        """Whether every row has a value in this column.

        Raises:
            InputError: if some rows have one and others do not, naming the first without.
        """
        missing = [name for name, record in self.pairs() if record.get(column) is None]
        if missing and len(missing) < len(self):
            raise InputError(f"{missing[0]} has no {column}, and other rows have one: give it to all or to none")
        return not missing

    def texts(self, column: str) -> list[str]:
        """Strings of a column that are not empty.

        Raises:
            InputError: naming the first row with anything else.
        """
        for name, record in self.pairs():
            value = record.get(column)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name}: {column} must be a text that is not empty, got {_short(value)}")
        return [record[column] for record in self.records]

    def numbers(self, column: str) -> list[float]:
        """Numbers of a column.

        Raises:
            InputError: naming the first row with anything else.
        """
        for name, record in self.pairs():
            value = record.get(column)
            if not _is_number(value) or not math.isfinite(value):
                raise InputError(f"{name}: {column} must be a finite number, got {_short(value)}")
        return [float(record[column]) for record in self.records]

    def vectors(self, column: str) -> list[list[float]]:
        """Lists of numbers of a column, all of one length; -inf, the log of probability 0, passes.

        Raises:
            InputError: naming the first row with anything else.
        """
        size: int | None = None
        for name, record in self.pairs():
            value = record.get(column)
            if not isinstance(value, list) or not value or not all(map(_is_number, value)):
                raise InputError(f"{name}: {column} must be a list of numbers, got {_short(value)}")
            if any(math.isnan(item) or item == math.inf for item in value):
                raise InputError(f"{name}: {column} holds NaN or +inf: mend the row or leave it out")
            size = len(value) if size is None else size
            if len(value) != size:
                raise InputError(
                    f"{name}: {column} has {len(value)} numbers, and {self.names[0]} has {size}: give each row as many"
                )
        return [[float(item) for item in record[column]] for record in self.records]

    def whole_numbers(self, column: str) -> list[int]:
        """Whole numbers of a column.

        Raises:
            InputError: naming the first row with anything else.
        """
        found = self.numbers(column)
        for name, number in zip(self.names, found, strict=True):
            if number != math.floor(number):
                raise InputError(f"{name}: {column} must be a whole number, got {number:g}")
        return [int(number) for number in found]

    def flags(self, column: str) -> list[bool]:
        """Truth values of a column: true and false, or 1 and 0.

        Raises:
            InputError: naming the first row with anything else.
        """
        for name, record in self.pairs():
            if not isinstance(record.get(column), bool | int | float) or record[column] not in (True, False):
                raise InputError(f"{name}: {column} must be true or false, got {_short(record.get(column))}")
        return [bool(record[column]) for record in self.records]

    def contrast(self, column: str) -> list[bool]:
        """Truth values of a column in which both occur, as what tells them apart needs.

        Raises:
            InputError: as `flags`, or where all are alike.
        """
        found = self.flags(column)
        if len(set(found)) == 1:
            every = f"{column} is {str(found[0]).lower()} in all {len(found)} rows"
            raise InputError(f"AUROC is undefined with one class only, and {every}: add rows of the other class")
        return found

    def lists(self, column: str) -> list[list[str]]:
        """Lists of texts of a column.

        Raises:
            InputError: naming the first row with anything else.
        """
        for name, record in self.pairs():
            value = record.get(column)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{name}: {column} must be a list of texts, got {_short(value)}")
        return [list(record[column]) for record in self.records]

    def pairs(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Names with records."""
        return zip(self.names, self.records, strict=True)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where an audit writes to."""

    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the rows with what was measured here (.jsonl or .parquet)."""
    summary: str | None = None
    """Write the summary here (.json)."""
    report: str | None = None
    """Write a self-contained HTML page with the plots here."""

    def check_outputs(self) -> None:
        """Refuse what could not be written later, before any work.

        Raises:
            InputError: for an output of another format, or a folder that is missing or may not be written to.
        """
        if self.output is not None and not self.output.lower().endswith((".jsonl", ".ndjson", ".parquet")):
            raise InputError(f"the format of {self.output} is not known from its extension: use .jsonl or .parquet")
        for path in (self.output, self.summary, self.report):
            if path is not None:
                check_writable(path)

    def finish(
        self, audited: Audited, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], page: AuditPage
    ) -> None:
        """Write what was asked for, and print the summary. In the table a number that is not finite is left empty.

        Args:
            audited: what was read.
            rows: what was measured, one mapping per row.
            summary: figures of all rows.
            page: with its figures in it; facts and rows are added here.

        Raises:
            InputError: for a path that cannot be written, or a summary with a number that is not finite.
        """
        table = [{"row": name, **_finite(row)} for name, row in zip(audited.names, rows, strict=True)]
        told = dict(summary) | ({"left_out": len(audited.left_out)} if audited.left_out else {})
        for name, value in told.items():
            if not _is_finite(value):
                raise InputError(f"{name.replace('_', ' ')} is not finite on these rows: look for rows out of range")
        if self.output is not None:
            write_table(self.output, table)
        if self.summary is not None:
            write_text(self.summary, json.dumps(told, indent=1) + "\n")
        if self.report is not None:
            page.facts("Summary", told)
            page.table("Rows", table)
            page.write(self.report)
        for sentence in audited.left_out[:20]:
            stderr_console().print(f"left out: {sentence}", soft_wrap=True, markup=False)
        print_summary(told)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the rows stand; a class of its own, so that it comes first in --help."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A .jsonl(.gz) or .parquet file, or a directory of datasets.save_to_disk."""


@dataclass(frozen=True, kw_only=True)
class RowAudit(Outputs, _Source):
    """Options of an audit of rows."""

    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a row that cannot be read, or leave it out and say so."""

    def read(self, source: str | None = None) -> Audited:
        """All rows of DATA, or of another source.

        Raises:
            InputError: as `read_rows`, or for outputs that cannot be written.
        """
        self.check_outputs()
        return read_rows(self.data if source is None else source, on_error=self.on_error)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """tiny, a directory written by save_pretrained, or a name on the model hub."""
    batch_size: int = 8
    """Rows per forward pass; the numbers do not depend on it."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the weights."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""

    def load(self, name: str | None = None) -> Any:
        """The model, or another one with the same settings.

        Raises:
            InputError: as `loglik.load`, or for a batch size below 1.
        """
        from loglik.models.load import load

        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}")
        return load(self.model if name is None else name, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class ModelAudit(ModelOptions, RowAudit):
    """Options of an audit of rows that needs a model."""


def read_rows(source: str, *, on_error: Literal["stop", "skip"] = "stop") -> Audited:
    """All rows of a file or a data set.

    Raises:
        InputError: for a file that cannot be read, a damaged row, or no rows.
    """
    from loglik.training.records import training_records

    names, records, left_out = [], [], []
    for name, record in training_records(source):
        if isinstance(record, RowError):
            if on_error == "stop":
                raise InputError(f"{name} of {source} {record.reason}")
            left_out.append(f"{name} {record.reason}")
            continue
        names.append(name)
        records.append(record)
    if not records:
        raise InputError(f"{source} has no rows: there is nothing to audit")
    return Audited(names, records, left_out)


@contextmanager
def rows_named(names: Sequence[str], first: int = 0) -> Iterator[None]:
    """Errors under the names of the file: ``row 2`` of what begins at `first` becomes ``names[first + 2]``."""
    try:
        yield
    except LoglikError as error:

        def name(found: re.Match[str]) -> str:
            place = first + int(found[1])
            return names[place] if place < len(names) else found[0]

        raise InputError(_ROW.sub(name, str(error))) from None


def write_table(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines or Parquet, by the extension.

    Raises:
        InputError: for another extension, or a path that cannot be written.
    """
    if path.lower().endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        except OSError as error:
            raise _unwritable(path, error) from None
        except pa.ArrowException:
            raise InputError(f"the rows are too uneven for Parquet: give {path} the extension .jsonl") from None
        return
    if not path.lower().endswith((".jsonl", ".ndjson")):
        raise InputError(f"the format of {path} is not known from its extension: use .jsonl or .parquet")
    write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def print_summary(summary: Mapping[str, Any]) -> None:
    """Two columns on standard output."""
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), "-" if value is None else shown(value))
    Console(markup=False, highlight=False).print(table)


def write_text(path: str, text: str) -> None:
    """A whole file.

    Raises:
        InputError: for a path that cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _unwritable(path, error) from None


def check_writable(path: str) -> None:
    """Refuse a path that could not be written later.

    Raises:
        InputError: for a folder that is missing or may not be written to, or a path that is a folder.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written (there is no folder {folder}): choose another path")
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written (it is a folder, or in one that is protected): choose another path")


def _unwritable(path: str, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({error.strerror or error}): choose another path")


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or -(2**1023) < value < 2**1023  # what no float holds is none here


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
