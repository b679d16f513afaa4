"""Records of each input format, one at a time: lines, JSON objects, CSV and Parquet rows."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from loglik.errors import InputError, RowError
from loglik.scoring.fields import DEFAULT_FIELDS, Fields, check_columns

__all__ = [
    "Record",
    "csv_records",
    "json_object",
    "line_records",
    "parquet_records",
    "plain_text",
    "read_lines",
    "type_name",
    "unreadable",
]

# One row before its texts are taken from it: how an error names it, and its fields or what is wrong with all of it.
Record = tuple[str, "Mapping[str, object] | RowError"]

_TYPES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    str: "a string",
    bytes: "binary data",
    type(None): "null",
}
_LONGEST_CELL = 2**31 - 1


def unreadable(name: str, error: Exception) -> InputError:
    """The sentence for a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{name} does not exist: check the path")
    if isinstance(error, PermissionError):
        return InputError(f"{name} may not be read by this user: change its permissions or copy it")
    if isinstance(error, EOFError):
        return InputError(f"{name} ends in the middle of its compressed data: copy or write it again")
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return InputError(f"{name} is damaged or not gzip: write it again, or rename it if it is not compressed")
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{name} cannot be read ({reason}): check the path and the disk")


# ---------------------------------------------------------------------- rows


def read_lines(source: str, stdin: BinaryIO | None, name: str) -> Iterator[bytes]:
    """Physical lines with their ends; every way a byte stream can fail becomes an `InputError`."""
    try:
        opened: Any
        if source == "-":
            opened = nullcontext(stdin if stdin is not None else sys.stdin.buffer)
        else:
            opened = gzip.open(source, "rb") if source.lower().endswith(".gz") else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(name, error) from None
    with opened as stream:
        first = True
        while True:
            try:
                line: bytes = stream.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise unreadable(name, error) from None
            if not line:
                return
            if first:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InputError(f"{name} is UTF-16 or UTF-32: convert it to UTF-8")
                line, first = line.removeprefix(codecs.BOM_UTF8), False
            yield line


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"holds bytes that are not UTF-8 (0x{line[error.start]:02x} at byte {error.start + 1} of the line): "
            "convert the file to UTF-8"
        ) from None


def line_records(lines: Iterator[bytes], parse: Callable[[bytes], Mapping[str, object]]) -> Iterator[Record]:
    """One record per line that is not blank, as `parse` reads it."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            record: Mapping[str, object] | RowError
            try:
                record = parse(line)
            except RowError as error:
                record = error
            yield f"line {number}", record


def plain_text(line: bytes) -> Mapping[str, object]:
    """A line without its end, as the only field."""
    return {DEFAULT_FIELDS.text: _decoded(line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line)}


def json_object(line: bytes) -> Mapping[str, object]:
    """The object of a line of JSONL, or a `RowError` that says what is wrong with it."""
    # Only the last line of a file can lack its newline; an object that is cut there was being written.
    open_end = not line.endswith(b"\n") and line.lstrip().startswith(b"{")
    cut = RowError(
        "the input ends in the middle of this line, it was probably interrupted: complete the line or remove it"
    )
    try:
        text = _decoded(line).rstrip()
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        in_string = error.msg.startswith("Unterminated string")
        if open_end and (in_string or error.pos >= len(text) or not text.endswith("}")):
            raise cut from None
        message = error.msg.removesuffix(" at")
        raise RowError(f"is not valid JSON ({message} at column {error.colno}): mend the line") from None
    except RowError:
        if open_end and _cut_inside_character(line):
            raise cut from None
        raise
    except RecursionError:
        raise RowError("is JSON that is nested too deeply to be read: flatten it") from None
    except ValueError:  # more digits than Python converts
        raise RowError("is JSON with a number of too many digits: shorten it or write it as a string") from None
    if not isinstance(value, dict):
        raise RowError(f'is JSON but {type_name(value)} and not an object: write it as {{"text": "..."}}')
    return value


def _cut_inside_character(line: bytes) -> bool:
    """Whether the only fault of `line` is that its last character is incomplete."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(line)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])


def csv_records(lines: Iterator[bytes], delimiter: str, fields: Fields, name: str) -> Iterator[Record]:
    """Records of CSV under its header; the columns that are needed must be there."""
    # Not strictly decoded: a stray byte should cost its row, not the file.
    decoded = (line.decode("utf-8", "surrogateescape") for line in lines)
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        position = f"line {reader.line_num + 1}"
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            reason = _csv_reason(error)
            if not header:
                raise InputError(f"the header of {name} {reason}") from None
            yield position, RowError(reason)
            continue
        if cells is None:
            return
        if not cells or (not header and not "".join(cells).strip()):  # a blank line
            continue
        if not header:
            header = cells
            check_columns(header, fields, name)
        elif len(cells) != len(header):
            yield position, RowError(f"has {len(cells)} cells where the header has {len(header)}: mend the row")
        else:
            # An empty cell is how CSV writes that there is no id.
            yield position, {n: c for n, c in zip(header, cells, strict=True) if c or n != fields.id}


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record whatever the length of its cells; None at the end."""
    # The csv module has one limit for the process: it is raised for this record alone.
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _csv_reason(error: csv.Error) -> str:
    if str(error).startswith("unexpected end"):
        return "opens a quote that is never closed: close it, or double the quotes inside a cell"
    if str(error).startswith("new-line"):
        return "holds a carriage return outside quotes: put the cell in quotes, or end lines with a newline"
    return f"is not valid CSV ({error}): double the quotes inside a cell"


def parquet_records(name: str, fields: Fields) -> Iterator[Record]:
    """Rows of a Parquet file, of which only the needed columns are read."""
    try:
        # A buffered stream: without it, Arrow holds whole column chunks.
        with pa.OSFile(name) as handle, pq.ParquetFile(handle, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            columns = check_columns(list(schema.names), fields, name)
            for column in columns:
                _check_type(schema.field(column).type, column, column == fields.id, name)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                parts = {c: batch.column(batch.schema.get_field_index(c)) for c in columns}
                decoded = {c: a.dictionary_decode() if pa.types.is_dictionary(a.type) else a for c, a in parts.items()}
                for index in range(batch.num_rows):
                    number += 1
                    yield f"row {number}", {c: _value(array[index]) for c, array in decoded.items()}
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise unreadable(name, error) from None
        raise InputError(f"{name} is not a complete Parquet file: write it again") from None


def _check_type(type_: Any, column: str, is_id: bool, name: str) -> None:
    value = type_.value_type if pa.types.is_dictionary(type_) else type_
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if any(check(value) for check in checks) or (is_id and pa.types.is_integer(value)):
        return
    wanted = "strings or whole numbers" if is_id else "strings"
    raise InputError(f"column {column!r} of {name} must hold {wanted}, got {type_}: convert it or name another column")


def _value(scalar: Any) -> object:
    try:
        return cast(object, scalar.as_py())
    except UnicodeDecodeError:
        return cast(bytes, scalar.as_buffer().to_pybytes()).decode("utf-8", "surrogateescape")


def type_name(value: object) -> str:
    """What a value is, in words."""
    return _TYPES.get(type(value), f"a value of type {type(value).__name__}")


# ---------------------------------------------------------------------- formats
