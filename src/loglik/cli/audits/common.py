"""What the audits share: their options, reading rows, and writing a table, a summary and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from loglik.errors import InputError, RowError
from loglik.progress import stderr_console
from loglik.signals.pages import AuditPage, shown

if TYPE_CHECKING:  # torch is imported by what runs, not by --help
    from loglik.models.batch import TokenBatch

__all__ = ["Audited", "ModelAudit", "RowAudit", "print_summary", "text_batches", "write_table", "write_text"]


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
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name}: {column} must be a finite number, got {_short(value)}")
        return [float(record[column]) for record in self.records]

    def flags(self, column: str) -> list[bool]:
        """Truth values of a column: true and false, or 1 and 0.

        Raises:
            InputError: naming the first row with anything else.
        """
        for name, record in self.pairs():
            if record.get(column) not in (True, False):
                raise InputError(f"{name}: {column} must be true or false, got {_short(record.get(column))}")
        return [bool(record[column]) for record in self.records]

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
class RowAudit:
    """Options of an audit of rows."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A .jsonl(.gz) or .parquet file, or a directory of datasets.save_to_disk."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the rows with what was measured here (.jsonl or .parquet)."""
    summary: str | None = None
    """Write the summary here (.json)."""
    report: str | None = None
    """Write a self-contained HTML page with the plots here."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a row that cannot be read, or leave it out and say so."""

    def read(self) -> Audited:
        """All rows.

        Raises:
            InputError: for a file that cannot be read, a damaged row, or no rows.
        """
        from loglik.training.records import training_records

        names, records, left_out = [], [], []
        for name, record in training_records(self.data):
            if isinstance(record, RowError):
                if self.on_error == "stop":
                    raise InputError(f"{name} of {self.data} {record.reason}")
                left_out.append(f"{name} {record.reason}")
                continue
            names.append(name)
            records.append(record)
        if not records:
            raise InputError(f"{self.data} has no rows: there is nothing to audit")
        return Audited(names, records, left_out)

    def finish(
        self, audited: Audited, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], page: AuditPage
    ) -> None:
        """Write what was asked for, and print the summary.

        Args:
            audited: what was read.
            rows: what was measured, one mapping per row.
            summary: figures of all rows.
            page: with its figures in it; facts and rows are added here.
        """
        table = [{"row": name, **row} for name, row in zip(audited.names, rows, strict=True)]
        told = dict(summary) | ({"left_out": len(audited.left_out)} if audited.left_out else {})
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
class ModelAudit(RowAudit):
    """Options of an audit that needs a model."""

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


def text_batches(model: Any, texts: Sequence[str], names: Sequence[str], batch_size: int) -> Iterator[TokenBatch]:
    """Whole texts as rows of tokens, in their order; what stands first is scored where the model has a BOS.

    Raises:
        InputError: naming a text that cannot be encoded, or is longer than the context.
    """
    from loglik.models.batch import TokenBatch
    from loglik.models.encode import TextEncoder

    encoder = TextEncoder(model.tokenizer, layout=model.layout)
    rows = encoder.encode_all([("", text) for text in texts])
    longest = model.max_length
    for name, row in zip(names, rows, strict=True):
        if isinstance(row, RowError):
            raise InputError(f"{name} {row.reason}")
        if longest is not None and row.length > longest:
            raise InputError(f"{name} has {row.length:,} tokens and the model a context of {longest:,}: shorten it")
    good = [row for row in rows if not isinstance(row, RowError)]
    for first in range(0, len(good), batch_size):
        part = good[first : first + batch_size]
        yield TokenBatch.from_lists(
            [row.prefix + row.content + row.suffix for row in part],
            starts=[len(row.prefix) + row.start for row in part],
            scored_from=[len(row.prefix) + row.scored_from for row in part],
        )


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
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another path") from None
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
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another path") from None


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
