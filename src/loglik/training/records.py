"""Rows of training data as they stand in a file or a data set: mappings with their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loglik.errors import InputError, RowError
from loglik.scoring.records import Record, json_object, line_records, read_lines, unreadable

__all__ = ["training_records"]


def training_records(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Named records of JSONL (also .gz), Parquet, a directory of `datasets.save_to_disk`, or a data set in memory.

    Raises:
        InputError: for a source that cannot be read as a whole.
    """
    if not isinstance(source, str | Path):
        return ((f"row {i}", record) for i, record in enumerate(source))
    path, name = Path(source), str(source)
    if path.is_dir():
        return _saved(path)
    if not path.is_file():
        raise InputError(f"{name} does not exist: check the path")
    if path.suffix.lower() == ".parquet":
        return _parquet(name)
    if path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return line_records(read_lines(name, None, name), json_object)
    raise InputError(f"the format of {name} is not known from its extension: use .jsonl, .jsonl.gz or .parquet")


def _parquet(name: str) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise unreadable(name, error) from None
        raise InputError(f"{name} is not a complete Parquet file: write it again") from None


def _saved(path: Path) -> Iterator[Record]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a data set written by save_to_disk ({_first(error)})") from None
    if isinstance(found, DatasetDict):
        raise InputError(f"{path} holds several splits ({', '.join(found)}): give the directory of one")
    for i, record in enumerate(found):
        yield f"row {i}", record if isinstance(record, Mapping) else RowError("is no mapping of columns")


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
