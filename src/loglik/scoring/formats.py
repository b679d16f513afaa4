"""File formats of scored rows: parts are written one by one, merged into the final file, and read back."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from loglik.scoring.rows import ScoredRow

__all__ = ["FORMATS", "Jsonl"]

_PARQUET_TYPES = {
    "id": pa.string(),
    "log_prob": pa.float64(),
    "kind": pa.string(),
    "stderr": pa.float64(),
    "num_tokens": pa.int64(),
    "num_bytes": pa.int64(),
    "bits_per_byte": pa.float64(),
    "is_greedy": pa.bool_(),
    "boundary": pa.string(),
    "num_windowed": pa.int64(),
    "error": pa.string(),
    "tokens": pa.list_(pa.string()),
    "token_log_probs": pa.list_(pa.float64()),
    "words": pa.list_(pa.string()),
    "word_log_probs": pa.list_(pa.float64()),
}
_MERGE_ROWS, _MERGE_BYTES = 1 << 16, 1 << 25  # a row group of the merged Parquet file is closed at either


class Jsonl:
    """One JSON object per line."""

    def __init__(self, columns: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.columns, self.settings = columns, settings

    def write(self, rows: Iterable[ScoredRow], handle: BinaryIO) -> None:
        """Write one part."""
        for row in rows:
            line = json.dumps({c: _value(row, c) for c in self.columns}, ensure_ascii=False)
            handle.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def merge(self, parts: Iterable[Path], handle: BinaryIO) -> None:
        """Write the final file from its parts."""
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, handle)

    def read(self, path: Path, *, part: bool) -> Iterator[ScoredRow]:
        """The rows of a part or of a final file, as they were written."""
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                yield ScoredRow(**json.loads(line))

    def stored(self, path: Path) -> tuple[int, dict[str, Any] | None]:
        """Rows of a final file, and what it says about itself in the form of a manifest, where it does."""
        with path.open("rb") as handle:
            return sum(1 for _ in handle), None


class _Csv(Jsonl):
    """A header and one record per row, as RFC 4180 has it."""

    def write(self, rows: Iterable[ScoredRow], handle: BinaryIO) -> None:
        for row in rows:
            handle.write(self._record([_cell(_value(row, c)) for c in self.columns]))

    def merge(self, parts: Iterable[Path], handle: BinaryIO) -> None:
        handle.write(self._record(self.columns))
        super().merge(parts, handle)

    def read(self, path: Path, *, part: bool) -> Iterator[ScoredRow]:
        with path.open(encoding="utf-8", newline="") as handle:
            records = csv.reader(handle)
            if not part:
                next(records, None)
            for cells in records:
                named = dict(zip(self.columns, cells, strict=True))
                yield ScoredRow(**{name: _parsed(name, cell) for name, cell in named.items()})

    def stored(self, path: Path) -> tuple[int, dict[str, Any] | None]:
        quotes = records = 0
        with path.open("rb") as handle:
            for line in handle:  # a line ends a record where all quotes are closed
                quotes += line.count(b'"')
                records += quotes % 2 == 0
        return max(records - 1, 0), None

    @staticmethod
    def _record(cells: Sequence[str]) -> bytes:
        line = io.StringIO()
        # With \r\n as line end the writer also quotes cells with a lone \r, which Python < 3.13 omits otherwise.
        csv.writer(line, lineterminator="\r\n").writerow(cells)
        return line.getvalue().encode("utf-8", "backslashreplace")


class _Parquet(Jsonl):
    """Typed columns; parts become row groups, small ones together."""

    def __init__(self, columns: Sequence[str], settings: Mapping[str, Any]) -> None:
        super().__init__(columns, settings)
        metadata = {b"loglik": json.dumps(settings).encode()}
        self.schema = pa.schema([(c, _PARQUET_TYPES[c]) for c in columns], metadata=metadata)

    def write(self, rows: Iterable[ScoredRow], handle: BinaryIO) -> None:
        columns: dict[str, list[Any]] = {c: [] for c in self.columns}
        for row in rows:
            for column, values in columns.items():
                values.append(_encodable(_value(row, column)))
        arrays = [pa.array(values, type=_PARQUET_TYPES[column]) for column, values in columns.items()]
        pq.write_table(pa.table(arrays, schema=self.schema), handle)

    def merge(self, parts: Iterable[Path], handle: BinaryIO) -> None:
        with pq.ParquetWriter(handle, self.schema) as writer:
            waiting: list[Any] = []
            for path in parts:
                with path.open("rb") as part, pq.ParquetFile(part) as file:
                    waiting.append(file.read(use_threads=False))
                if sum(t.num_rows for t in waiting) >= _MERGE_ROWS or sum(t.nbytes for t in waiting) >= _MERGE_BYTES:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    def read(self, path: Path, *, part: bool) -> Iterator[ScoredRow]:
        with path.open("rb") as handle, pq.ParquetFile(handle) as file:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for record in batch.to_pylist():
                    yield ScoredRow(**record)

    def stored(self, path: Path) -> tuple[int, dict[str, Any] | None]:
        with path.open("rb") as handle, pq.ParquetFile(handle) as file:
            schema = file.schema_arrow
            settings = json.loads((schema.metadata or {}).get(b"loglik", b"{}"))
            return file.metadata.num_rows, {"columns": list(schema.names), "settings": settings}


_TEXT_COLUMNS = ("id", "kind", "boundary", "error")
FORMATS: dict[str, type[Jsonl]] = {".jsonl": Jsonl, ".ndjson": Jsonl, ".parquet": _Parquet, ".csv": _Csv}


def _value(row: ScoredRow, column: str) -> Any:
    value = getattr(row, column)
    numbers = value if column in ("token_log_probs", "word_log_probs") and value is not None else (value,)
    if any(isinstance(number, float) and math.isnan(number) for number in numbers):
        raise ValueError(f"row {row.id!r} has NaN in {column}: a row without a number carries an error instead")
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parsed(column: str, cell: str) -> Any:
    """What `_cell` wrote; only an id may be an empty text."""
    if cell == "":
        return "" if column == "id" else None
    return cell if column in _TEXT_COLUMNS else json.loads(cell)


def _encodable(value: Any) -> Any:
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
