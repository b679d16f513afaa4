"""Rows of text from JSONL, Parquet, CSV or plain lines, one at a time: the file is never held in memory."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from loglik.errors import InputError, RowError
from loglik.scoring.rows import InputRow

__all__ = ["Fields", "Format", "estimate_rows", "read_rows"]

Format = Literal["auto", "jsonl", "parquet", "csv", "txt"]

# One row before its texts are taken from it: how an error names it, and its fields or what is wrong with all of it.
_Record = tuple[str, "Mapping[str, object] | RowError"]

_EXTENSIONS: dict[str, tuple[Literal["jsonl", "parquet", "csv", "txt"], str]] = {  # format, delimiter of CSV
    ".jsonl": ("jsonl", ""),
    ".ndjson": ("jsonl", ""),
    ".parquet": ("parquet", ""),
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".txt": ("txt", ""),
}
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
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_ESCAPED_BYTES = range(0xDC80, 0xDD00)  # what "surrogateescape" makes of bytes that are not UTF-8
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields (columns) of a row; a name other than the default counts as asked for by the user."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    id: str = "id"


_DEFAULT = Fields()


def read_rows(
    source: str | Path, *, fields: Fields = _DEFAULT, format: Format = "auto", stdin: BinaryIO | None = None
) -> Iterator[InputRow]:
    r"""Rows of `source`, in order, as they are read.

    A row is (prompt, completion) if it has the completion field or if that field was named by the user, with an empty
    prompt where there is none; otherwise, or if the text field was named by the user, it is ("", text). A row that
    cannot be used is yielded too, with `error` set to a sentence that does not repeat `where`. Blank lines are skipped;
    a byte-order mark at the start is dropped.

    Args:
        source: a file, or ``-`` for standard input.
        fields: names of the fields.
        format: ``auto`` decides by the extension (.jsonl, .ndjson, .parquet, .csv, .tsv, .txt, and all but Parquet
            also with .gz) and takes standard input for JSONL.
        stdin: what ``-`` reads; the process's own standard input if None.

    Yields:
        `InputRow`; `where` is ``line n`` (the physical line from 1 on which the record starts) or ``row n`` (from 1)
        for Parquet, with the row's own id where it has one. `id` is that id, or else the number of the row from 0.

    Raises:
        InputError: for a source that cannot be read as a whole: missing, a directory, damaged, without rows, of an
            unknown extension, or a table without the columns. A missing file and a wrong option are refused by the
            call itself, the rest while iterating.
    """
    if fields.text != _DEFAULT.text and (fields.completion, fields.prompt) != (_DEFAULT.completion, _DEFAULT.prompt):
        raise InputError(
            "--text-field names texts without a prompt: drop it, or drop --prompt-field and --completion-field"
        )
    name = "standard input" if str(source) == "-" else str(source)
    kind, delimiter = _resolve(str(source), format)
    if str(source) != "-":
        _check_file(name)
    elif kind == "parquet":
        raise InputError("Parquet cannot be read from standard input: give the file itself")
    if kind == "parquet":
        return _rows(_parquet_records(name, fields), fields, name, escaped=True)
    lines = _lines(str(source), stdin, name)
    if kind == "csv":
        return _rows(_csv_records(lines, delimiter, fields, name), fields, name, escaped=True)
    if kind == "txt":
        # Plain lines have no field names; any name serves, as long as both sides use the same one.
        return _rows(_line_records(lines, _plain_text), _DEFAULT, name, escaped=False)
    return _rows(_line_records(lines, _json_object), fields, name, escaped=False)


def estimate_rows(source: str | Path, format: Format = "auto") -> int | None:
    """About how many rows `source` has, for a progress bar: lines of text, rows of Parquet; None where unknown."""
    if str(source) == "-" or not Path(source).is_file() or str(source).lower().endswith(".gz"):
        return None
    kind, _ = _resolve(str(source), format)
    if kind == "parquet":
        return int(pq.read_metadata(str(source)).num_rows)
    with open(source, "rb") as handle:
        lines = sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 22), b""))
    return max(1, lines - (kind == "csv"))


def _resolve(source: str, format: Format) -> tuple[Literal["jsonl", "parquet", "csv", "txt"], str]:
    """The format and, for CSV, its delimiter."""
    plain = source.lower().removesuffix(".gz")
    found = _EXTENSIONS.get(Path(plain).suffix)
    if format == "auto":
        if source == "-":
            return "jsonl", ""
        if found is None or (found[0] == "parquet" and plain != source.lower()):
            raise InputError(
                f"the format of {source} is not known from its extension: use one of {', '.join(_EXTENSIONS)} "
                "(all but .parquet also with .gz) or pass --format"
            )
        return found
    if format not in ("jsonl", "parquet", "csv", "txt"):
        raise InputError(f"--format must be one of auto, jsonl, parquet, csv, txt, got {format!r}")
    return format, found[1] if found is not None and found[0] == "csv" == format else ","


def _check_file(name: str) -> None:
    """Refuse early what need not be opened to be refused; a pipe can be opened only once."""
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(name, error) from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a directory: give one file")


def _unreadable(name: str, error: Exception) -> InputError:
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
def _rows(records: Iterator[_Record], fields: Fields, name: str, *, escaped: bool) -> Iterator[InputRow]:
    number = -1
    for number, (position, record) in enumerate(records):
        row_id, where = str(number), position
        try:
            if isinstance(record, RowError):
                raise record
            own = _own_id(record.get(fields.id), fields.id, escaped=escaped)
            if own is not None:
                row_id, where = own, f"{position} (id {own})" if own else position
            prompt, completion = _texts(record, fields, escaped=escaped)
        except RowError as error:
            yield InputRow(row_id, where, "", "", error.reason)
        else:
            yield InputRow(row_id, where, prompt, completion)
    if number < 0:
        raise InputError(f"{name} holds no rows: give at least one text to score")


def _own_id(value: object, field: str, *, escaped: bool) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _writable(value, field, escaped=escaped)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"field {field!r} must be a string or a whole number, got {_type_name(value)}: mend the id")


def _texts(record: Mapping[str, object], fields: Fields, *, escaped: bool) -> tuple[str, str]:
    prompt_field, scored_field = _choose(record.keys(), fields)
    prompt = "" if prompt_field is None else _text(record[prompt_field], prompt_field, escaped=escaped)
    scored = _text(record[scored_field], scored_field, escaped=escaped)
    if not scored:
        raise RowError(f"field {scored_field!r} is empty, so that there is nothing to score: fill it or remove the row")
    return prompt, scored


def _choose(names: Collection[str], fields: Fields) -> tuple[str | None, str]:
    """Which fields hold the prompt (None: there is none) and the text that is scored."""
    if fields.prompt != _DEFAULT.prompt and fields.prompt not in names:
        raise RowError(f"has no field {fields.prompt!r} ({_listed(names)}): name the right one with --prompt-field")
    if fields.text != _DEFAULT.text:
        if fields.text not in names:
            raise RowError(f"has no field {fields.text!r} ({_listed(names)}): name the right one with --text-field")
        return None, fields.text
    if fields.completion in names:
        return fields.prompt if fields.prompt in names else None, fields.completion
    if fields.completion != _DEFAULT.completion:
        raise RowError(
            f"has no field {fields.completion!r} ({_listed(names)}): name the right one with --completion-field"
        )
    if fields.text in names and fields.prompt == _DEFAULT.prompt:
        return None, fields.text
    raise RowError(
        f"has neither a field {fields.completion!r} nor a field {fields.text!r} ({_listed(names)}): name the "
        "right ones with --completion-field and --prompt-field, or with --text-field"
    )


def _listed(names: Collection[str]) -> str:
    shown = [repr(name) for name in list(names)[:20]]  # repr escapes what could not be printed
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"its fields are {', '.join(shown)}{more}" if shown else "it has no fields"


def _text(value: object, field: str, *, escaped: bool) -> str:
    if value is None:
        raise RowError(f"field {field!r} is null: give it a text or remove the row")
    if not isinstance(value, str):
        raise RowError(f"field {field!r} must be a string, got {_type_name(value)}: write it as a string")
    return _writable(value, field, escaped=escaped)


def _writable(text: str, field: str, *, escaped: bool) -> str:
    """`text`, if it is Unicode text without NUL; positions count characters from 1."""
    found = _UNWRITABLE.search(text)
    if found is None:
        return text
    point, place = ord(found.group()), f"at character {found.start() + 1} of field {field!r}"
    if point == 0:
        raise RowError(f"holds a NUL character (U+0000) {place}: remove it")
    if escaped and point in _ESCAPED_BYTES:
        raise RowError(f"holds bytes that are not UTF-8 (0x{point - 0xDC00:02x} {place}): convert the file to UTF-8")
    raise RowError(f"holds half of a surrogate pair (U+{point:04X}) {place}, which is not text: remove or mend it")


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), f"a value of type {type(value).__name__}")


# ---------------------------------------------------------------------- formats
def _lines(source: str, stdin: BinaryIO | None, name: str) -> Iterator[bytes]:
    """Physical lines with their ends; every way a byte stream can fail becomes an `InputError`."""
    try:
        opened: Any
        if source == "-":
            opened = nullcontext(stdin if stdin is not None else sys.stdin.buffer)
        else:
            opened = gzip.open(source, "rb") if source.lower().endswith(".gz") else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise _unreadable(name, error) from None
    with opened as stream:
        first = True
        while True:
            try:
                line: bytes = stream.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(name, error) from None
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


def _line_records(lines: Iterator[bytes], parse: Callable[[bytes], Mapping[str, object]]) -> Iterator[_Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            record: Mapping[str, object] | RowError
            try:
                record = parse(line)
            except RowError as error:
                record = error
            yield f"line {number}", record


def _plain_text(line: bytes) -> Mapping[str, object]:
    return {_DEFAULT.text: _decoded(line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line)}


def _json_object(line: bytes) -> Mapping[str, object]:
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
        raise RowError(f'is JSON but {_type_name(value)} and not an object: write it as {{"text": "..."}}')
    return value


def _cut_inside_character(line: bytes) -> bool:
    """Whether the only fault of `line` is that its last character is incomplete."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(line)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])


def _csv_records(lines: Iterator[bytes], delimiter: str, fields: Fields, name: str) -> Iterator[_Record]:
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
            _check_columns(header, fields, name)
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


def _check_columns(names: list[str], fields: Fields, name: str) -> list[str]:
    """The columns that are needed; a table without them is refused once and not row by row."""
    try:
        needed = [column for column in _choose(names, fields) if column is not None]
    except RowError as error:
        raise InputError(f"{name} {error.reason}") from None
    needed += [fields.id] if fields.id in names and fields.id not in needed else []
    for column in needed:
        if names.count(column) > 1:
            raise InputError(f"{name} has {names.count(column)} columns called {column!r}: rename all but one")
    return needed


def _parquet_records(name: str, fields: Fields) -> Iterator[_Record]:
    try:
        # A buffered stream: without it, Arrow holds whole column chunks.
        with pa.OSFile(name) as handle, pq.ParquetFile(handle, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            columns = _check_columns(list(schema.names), fields, name)
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
            raise _unreadable(name, error) from None
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
