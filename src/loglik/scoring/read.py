"""Rows of text from JSONL, Parquet, CSV or plain lines, one at a time: the file is never held in memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow.parquet as pq

from loglik.errors import InputError, RowError
from loglik.models.encode import NOT_TEXT
from loglik.scoring.fields import DEFAULT_FIELDS, Fields, choose_fields
from loglik.scoring.records import (
    Record,
    csv_records,
    json_object,
    line_records,
    parquet_records,
    plain_text,
    read_lines,
    type_name,
    unreadable,
)
from loglik.scoring.rows import InputRow

__all__ = ["Fields", "Format", "estimate_rows", "read_rows"]

Format = Literal["auto", "jsonl", "parquet", "csv", "txt"]

_EXTENSIONS: dict[str, tuple[Literal["jsonl", "parquet", "csv", "txt"], str]] = {  # format, delimiter of CSV
    ".jsonl": ("jsonl", ""),
    ".ndjson": ("jsonl", ""),
    ".parquet": ("parquet", ""),
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".txt": ("txt", ""),
}
_ESCAPED_BYTES = range(0xDC80, 0xDD00)  # what "surrogateescape" makes of bytes that are not UTF-8


def read_rows(
    source: str | Path, *, fields: Fields = DEFAULT_FIELDS, format: Format = "auto", stdin: BinaryIO | None = None
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
    if fields.text != DEFAULT_FIELDS.text and (fields.completion, fields.prompt) != (
        DEFAULT_FIELDS.completion,
        DEFAULT_FIELDS.prompt,
    ):
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
        return _rows(parquet_records(name, fields), fields, name, escaped=True)
    lines = read_lines(str(source), stdin, name)
    if kind == "csv":
        return _rows(csv_records(lines, delimiter, fields, name), fields, name, escaped=True)
    if kind == "txt":
        # Plain lines have no field names; any name serves, as long as both sides use the same one.
        return _rows(line_records(lines, plain_text), DEFAULT_FIELDS, name, escaped=False)
    return _rows(line_records(lines, json_object), fields, name, escaped=False)


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
        raise unreadable(name, error) from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a directory: give one file")


def _rows(records: Iterator[Record], fields: Fields, name: str, *, escaped: bool) -> Iterator[InputRow]:
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
    raise RowError(f"field {field!r} must be a string or a whole number, got {type_name(value)}: mend the id")


def _texts(record: Mapping[str, object], fields: Fields, *, escaped: bool) -> tuple[str, str]:
    prompt_field, scored_field = choose_fields(record.keys(), fields)
    prompt = "" if prompt_field is None else _text(record[prompt_field], prompt_field, escaped=escaped)
    scored = _text(record[scored_field], scored_field, escaped=escaped)
    if not scored:
        raise RowError(f"field {scored_field!r} is empty, so that there is nothing to score: fill it or remove the row")
    return prompt, scored


def _text(value: object, field: str, *, escaped: bool) -> str:
    if value is None:
        raise RowError(f"field {field!r} is null: give it a text or remove the row")
    if not isinstance(value, str):
        raise RowError(f"field {field!r} must be a string, got {type_name(value)}: write it as a string")
    return _writable(value, field, escaped=escaped)


def _writable(text: str, field: str, *, escaped: bool) -> str:
    """`text`, if it is Unicode text without NUL; positions count characters from 1."""
    found = NOT_TEXT.search(text)
    if found is None:
        return text
    point, place = ord(found.group()), f"at character {found.start() + 1} of field {field!r}"
    if point == 0:
        raise RowError(f"holds a NUL character (U+0000) {place}: remove it")
    if escaped and point in _ESCAPED_BYTES:
        raise RowError(f"holds bytes that are not UTF-8 (0x{point - 0xDC00:02x} {place}): convert the file to UTF-8")
    raise RowError(f"holds half of a surrogate pair (U+{point:04X}) {place}, which is not text: remove or mend it")
