import csv
import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loglik.errors import InputError
from loglik.scoring.read import Fields, estimate_rows, read_rows
from loglik.scoring.rows import InputRow

TEXTS = ["plain", 'quote " comma , tab \t', "two\nlines", "three\r\nlines", "naïve 日本語 🎉", " ", "\u2028\x85sep"]
PAIRS = [(f"p{i} {TEXTS[-i]}", text) for i, text in enumerate(TEXTS)]


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, content: bytes | str, **options: object) -> list[InputRow]:
    return list(read_rows(put(path, content), **options))


def errors_of(content: bytes | str, tmp_path: Path, name: str = "in.jsonl", **options: object) -> list[str | None]:
    return [row.error for row in rows_of(tmp_path / name, content, **options)]


def write_pairs(path: Path) -> Path:
    records = [{"id": f"q{i}", "prompt": p, "completion": c} for i, (p, c) in enumerate(PAIRS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    else:
        put(path, "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(records)))
    return path


# ---------------------------------------------------------------------- what is read
@pytest.mark.parametrize("extension", ["jsonl", "ndjson", "parquet", "csv", "tsv"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, extension: str) -> None:
    rows = list(read_rows(write_pairs(tmp_path / f"in.{extension}")))
    assert [(r.prompt, r.completion) for r in rows] == PAIRS
    assert [r.id for r in rows] == [f"q{i}" for i in range(len(PAIRS))]
    assert all(r.error is None for r in rows)


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "txt"])
def test_gzip_and_byte_order_mark_change_nothing(tmp_path: Path, extension: str) -> None:
    source = put(tmp_path / "in.txt", "one\ntwo\n") if extension == "txt" else write_pairs(tmp_path / f"in.{extension}")
    plain = list(read_rows(source))
    packed = put(tmp_path / f"packed.{extension}.gz", gzip.compress(b"\xef\xbb\xbf" + source.read_bytes()))
    assert list(read_rows(packed)) == plain
    assert list(read_rows(str(packed), format="csv" if extension == "csv" else "auto")) == plain


def test_plain_lines_keep_everything_but_their_end(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "in.txt", b" a \r\n\n  \t\nb\x0cc\n\xe2\x80\xa8d\re\nlast")
    assert [(r.id, r.where, r.completion) for r in rows] == [
        ("0", "line 1", " a "),
        ("1", "line 4", "b\x0cc"),
        ("2", "line 5", "\u2028d\re"),
        ("3", "line 6", "last"),
    ]
    assert {r.prompt for r in rows} == {""}


def test_where_is_the_physical_line_and_ids_fall_back_to_row_numbers(tmp_path: Path) -> None:
    content = '{"text":"a"}\n\n{"text":"b","id":"q17"}\n   \nbad\n{"text":"c","id":5}\r\n{"text":"d","id":null}'
    rows = rows_of(tmp_path / "in.jsonl", content)
    assert [(r.id, r.where) for r in rows] == [
        ("0", "line 1"),
        ("q17", "line 3 (id q17)"),
        ("2", "line 5"),
        ("5", "line 6 (id 5)"),
        ("4", "line 7"),
    ]
    assert [r.completion for r in rows] == ["a", "b", "", "c", "d"]


def test_csv_where_is_the_line_the_record_starts_on(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "in.csv", 'id,text\n1,"a\nb\nc"\n\n,d\nx,e,f\n"q",g\n')
    assert [(r.id, r.where, r.completion) for r in rows] == [
        ("1", "line 2 (id 1)", "a\nb\nc"),
        ("1", "line 6", "d"),
        ("2", "line 7", ""),
        ("q", "line 8 (id q)", "g"),
    ]
    assert rows[2].error == "has 3 cells where the header has 2: mend the row"


def test_parquet_where_counts_rows_over_row_groups_and_batches(tmp_path: Path) -> None:
    table = pa.table({"text": [f"t{i}" for i in range(1000)], "id": pa.array([None, *range(1, 1000)], pa.int32())})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=300)
    rows = list(read_rows(tmp_path / "in.parquet"))
    assert [r.completion for r in rows] == [f"t{i}" for i in range(1000)]
    assert (rows[0].id, rows[0].where) == ("0", "row 1")
    assert (rows[999].id, rows[999].where) == ("999", "row 1000 (id 999)")


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_strings_of_every_encoding(tmp_path: Path, type_: pa.DataType) -> None:
    values = pa.array(["a", None, "b"]).cast(type_) if type_ != pa.string_view() else pa.array(["a", None, "b"], type_)
    pq.write_table(pa.table({"text": values}), tmp_path / "in.parquet")
    assert [(r.completion, r.error is None) for r in read_rows(tmp_path / "in.parquet")] == [
        ("a", True),
        ("", False),
        ("b", True),
    ]


def test_duplicate_and_empty_ids_are_kept(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "in.jsonl", '{"id":"a","text":"x"}\n{"id":"a","text":"y"}\n{"id":"","text":"z"}\n')
    assert [(r.id, r.where) for r in rows] == [("a", "line 1 (id a)"), ("a", "line 2 (id a)"), ("", "line 3")]


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ({"prompt": "p", "completion": "c", "text": "t"}, Fields(), ("p", "c")),
        ({"completion": "c"}, Fields(), ("", "c")),
        ({"prompt": "", "completion": "c"}, Fields(), ("", "c")),
        ({"text": "t", "prompt": "p"}, Fields(), ("", "t")),
        ({"q": "p", "a": "c", "text": "t"}, Fields(prompt="q", completion="a"), ("p", "c")),
        ({"body": "t"}, Fields(text="body"), ("", "t")),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv"])
def test_which_fields_make_a_row(
    tmp_path: Path, extension: str, record: dict[str, str], fields: Fields, expected: tuple[str, str]
) -> None:
    path = tmp_path / f"in.{extension}"
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        put(path, json.dumps(record) if extension == "jsonl" else f"{','.join(record)}\n{','.join(record.values())}\n")
    (row,) = read_rows(path, fields=fields)
    assert (row.prompt, row.completion, row.error) == (*expected, None)


MISSING = [
    (Fields(), "has neither a field 'completion' nor a field 'text' (its fields are 'x', 'y'): name the right ones "
     "with --completion-field and --prompt-field, or with --text-field"),
    (Fields(completion="a"), "has no field 'a' (its fields are 'x', 'y'): name the right one with --completion-field"),
    (Fields(prompt="q"), "has no field 'q' (its fields are 'x', 'y'): name the right one with --prompt-field"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sentence"), MISSING)
def test_missing_fields_cost_a_json_row_and_refuse_a_table(tmp_path: Path, fields: Fields, sentence: str) -> None:
    assert errors_of('{"x":"1","y":"2"}\n', tmp_path, fields=fields) == [sentence]
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path / "in.csv", "x,y\n1,2\n", fields=fields)
    assert str(caught.value) == f"{tmp_path / 'in.csv'} {sentence}"
    pq.write_table(pa.table({"x": ["1"], "y": ["2"]}), tmp_path / "in.parquet")
    with pytest.raises(InputError) as caught:
        list(read_rows(tmp_path / "in.parquet", fields=fields))
    assert str(caught.value) == f"{tmp_path / 'in.parquet'} {sentence}"


# ---------------------------------------------------------------------- one row is wrong
CUT = "the input ends in the middle of this line, it was probably interrupted: complete the line or remove it"
ROW_ERRORS = [
    (b'{"text": }', "is not valid JSON (Expecting value at column 10): mend the line"),
    (b'{"text": "a\tb"}', "is not valid JSON (Invalid control character at column 12): mend the line"),
    (b'{"text" 1}', "is not valid JSON (Expecting ':' delimiter at column 9): mend the line"),
    (b'["a"]', 'is JSON but a list and not an object: write it as {"text": "..."}'),
    (b'"a"', 'is JSON but a string and not an object: write it as {"text": "..."}'),
    (b"null", 'is JSON but null and not an object: write it as {"text": "..."}'),
    (b"{}", "has neither a field 'completion' nor a field 'text' (it has no fields): name the right ones with "
     "--completion-field and --prompt-field, or with --text-field"),
    (b'{"text": null}', "field 'text' is null: give it a text or remove the row"),
    (b'{"completion": null, "text": "t"}', "field 'completion' is null: give it a text or remove the row"),
    (b'{"prompt": null, "completion": "c"}', "field 'prompt' is null: give it a text or remove the row"),
    (b'{"text": 3}', "field 'text' must be a string, got a number: write it as a string"),
    (b'{"text": true}', "field 'text' must be a string, got true or false: write it as a string"),
    (b'{"text": ["a"]}', "field 'text' must be a string, got a list: write it as a string"),
    (b'{"prompt": {}, "completion": "c"}', "field 'prompt' must be a string, got an object: write it as a string"),
    (b'{"text": ""}', "field 'text' is empty, so that there is nothing to score: fill it or remove the row"),
    (b'{"prompt": "p", "completion": ""}', "field 'completion' is empty, so that there is nothing to score: fill it or "
     "remove the row"),
    (b'{"text": "ab\\ud83dc"}', "holds half of a surrogate pair (U+D83D) at character 3 of field 'text', which is not "
     "text: remove or mend it"),
    (b'{"text": "\\udc80"}', "holds half of a surrogate pair (U+DC80) at character 1 of field 'text', which is not "
     "text: remove or mend it"),
    (b'{"prompt": "a\\u0000", "completion": "c"}', "holds a NUL character (U+0000) at character 2 of field 'prompt': "
     "remove it"),
    (b'{"text": "a\xffb"}', "holds bytes that are not UTF-8 (0xff at byte 12 of the line): convert the file to UTF-8"),
    (b'{"text": "t", "id": 1.5}', "field 'id' must be a string or a whole number, got a number: mend the id"),
    (b'{"text": "t", "id": true}', "field 'id' must be a string or a whole number, got true or false: mend the id"),
    (b'{"text": "t", "id": "\\ud800"}', "holds half of a surrogate pair (U+D800) at character 1 of field 'id', which "
     "is not text: remove or mend it"),
    (b"[" * 100_000, "is JSON that is nested too deeply to be read: flatten it"),
    (b'{"text": "t", "n": ' + b"9" * 5000 + b"}", "is JSON with a number of too many digits: shorten it or write it as "
     "a string"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), ROW_ERRORS, ids=range(len(ROW_ERRORS)))
def test_a_bad_json_line_is_a_sentence_and_the_next_row_is_read(tmp_path: Path, line: bytes, sentence: str) -> None:
    bad, good = rows_of(tmp_path / "in.jsonl", line + b'\n{"text": "good"}\n')
    assert bad == InputRow("0", "line 1", "", "", sentence)
    assert good == InputRow("1", "line 2", "", "good")


def test_a_row_with_an_error_keeps_its_own_id(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "in.jsonl", '{"id": "q", "text": 3}\n')
    assert (row.id, row.where) == ("q", "line 1 (id q)")


def test_an_object_cut_anywhere_is_named_as_interrupted(tmp_path: Path) -> None:
    line = '{"id": "é\\u00e9", "text": "a } b", "n": {"m": [1, true, -2.5e3]}}'.encode()
    for end in range(1, len(line)):
        assert errors_of(b'{"text":"a"}\n' + line[:end], tmp_path) == [None, CUT], line[:end]
        assert errors_of(line[:end] + b"\n", tmp_path) != [CUT]
    assert errors_of(b'{"text":"a"}\n{"text":"b"}', tmp_path) == [None, None]
    assert errors_of(b'{"text": b}', tmp_path) == ["is not valid JSON (Expecting value at column 10): mend the line"]
    assert errors_of(b'{"text": "\xff"}', tmp_path) == [
        "holds bytes that are not UTF-8 (0xff at byte 11 of the line): convert the file to UTF-8"
    ]


def test_bad_csv_records_cost_only_themselves(tmp_path: Path) -> None:
    content = b'text,id\n"a"x,1\na\xffb,2\nc\x00,3\nd\re,4\n,5\nf\ng,6\n"open,7\nh,8\n'
    rows = rows_of(tmp_path / "in.csv", content)
    assert [(r.where, r.error) for r in rows] == [
        ("line 2", "is not valid CSV (',' expected after '\"'): double the quotes inside a cell"),
        (
            "line 3 (id 2)",
            "holds bytes that are not UTF-8 (0xff at character 2 of field 'text'): convert the file to UTF-8",
        ),
        ("line 4 (id 3)", "holds a NUL character (U+0000) at character 2 of field 'text': remove it"),
        ("line 5", "holds a carriage return outside quotes: put the cell in quotes, or end lines with a newline"),
        ("line 6 (id 5)", "field 'text' is empty, so that there is nothing to score: fill it or remove the row"),
        ("line 7", "has 1 cells where the header has 2: mend the row"),
        ("line 8 (id 6)", None),
        ("line 9", "opens a quote that is never closed: close it, or double the quotes inside a cell"),
    ]


def test_a_cell_may_be_long_and_the_process_wide_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        rows = read_rows(put(tmp_path / "in.csv", f"text\n{'x' * 300_000}\nb\n"))
        assert len(next(rows).completion) == 300_000
        assert csv.field_size_limit() == 1000
        assert next(rows).completion == "b"
    finally:
        csv.field_size_limit(before)


def test_parquet_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b\xff", b"\xed\xa0\x80", b"c"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
    assert [(r.completion, r.error) for r in read_rows(tmp_path / "in.parquet")] == [
        ("a", None),
        ("", "holds bytes that are not UTF-8 (0xff at character 2 of field 'text'): convert the file to UTF-8"),
        ("", "holds bytes that are not UTF-8 (0xed at character 1 of field 'text'): convert the file to UTF-8"),
        ("c", None),
    ]


# ---------------------------------------------------------------------- the whole source is wrong
def refused(source: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(source, **options))
    return str(caught.value)


def test_sources_that_cannot_be_opened_are_refused_by_the_call(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist: check the path"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match=r"d\.jsonl is a directory: give one file"):
        read_rows(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match=r"use one of \.jsonl, \.ndjson, \.parquet, \.csv, \.tsv, \.txt .* --format"):
        read_rows(put(tmp_path / "in.json", "{}"))
    with pytest.raises(InputError, match="extension"):
        read_rows(put(tmp_path / "in.parquet.gz", ""))
    with pytest.raises(InputError, match="--format must be one of auto, jsonl, parquet, csv, txt, got 'xml'"):
        read_rows(tmp_path / "in.json", format="xml")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows("a\0b.jsonl")


def test_permission_is_refused_with_its_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = put(tmp_path / "in.jsonl", "")
    monkeypatch.setattr(os, "stat", deny)
    assert refused(path) == f"{path} may not be read by this user: change its permissions or copy it"


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_source_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    for name in ("in.jsonl", "in.txt", "in.csv"):
        path = put(tmp_path / name, content)
        assert refused(path) == f"{path} holds no rows: give at least one text to score"
    assert "holds no rows" in refused(put(tmp_path / "head.csv", "id,text\n"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in.parquet")
    assert "holds no rows" in refused(tmp_path / "in.parquet")


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(2000)).encode())
    cut = put(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    assert refused(cut) == f"{cut} ends in the middle of its compressed data: copy or write it again"
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 50] = b"\xff" * 50
    for path in (put(tmp_path / "broken.jsonl.gz", bytes(broken)), put(tmp_path / "not.jsonl.gz", '{"text":"a"}\n')):
        expected = f"{path} is damaged or not gzip: write it again, or rename it if it is not compressed"
        assert refused(path) == expected


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = write_pairs(tmp_path / "in.parquet").read_bytes()
    for name, content in (
        ("cut", whole[:-20]),
        ("empty", b""),
        ("other", b"x" * 500),
        ("hole", b"\xff" * 60 + whole[60:]),
    ):
        path = put(tmp_path / f"{name}.parquet", content)
        assert refused(path) == f"{path} is not a complete Parquet file: write it again"


def test_tables_with_unusable_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert refused(path) == f"column 'text' of {path} must hold strings, got int64: convert it or name another column"
    pq.write_table(pa.table({"text": ["a"], "id": [1.5]}), path)
    assert "column 'id'" in refused(path)
    assert "strings or whole numbers, got double" in refused(path)
    double = put(tmp_path / "in.csv", "text,text\na,b\n")
    assert refused(double) == f"{double} has 2 columns called 'text': rename all but one"
    assert "the header of" in refused(put(tmp_path / "head.csv", '"a"b\n'))


def test_utf16_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "in.txt", "text".encode("utf-16"))
    assert refused(path) == f"{path} is UTF-16 or UTF-32: convert it to UTF-8"


# ---------------------------------------------------------------------- standard input, streaming
def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO(b'{"text": "a"}\n')
    assert [r.completion for r in read_rows("-", stdin=stream)] == ["a"]
    assert not stream.closed
    assert [r.completion for r in read_rows("-", stdin=io.BytesIO(b"text\nb\n"), format="csv")] == ["b"]
    assert [r.completion for r in read_rows(Path("-"), stdin=io.BytesIO(b"c\n"), format="txt")] == ["c"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "d"}\n')))
    assert [r.completion for r in read_rows("-")] == ["d"]
    assert refused("-", stdin=io.BytesIO()) == "standard input holds no rows: give at least one text to score"
    with pytest.raises(InputError, match="Parquet cannot be read from standard input: give the file itself"):
        read_rows("-", format="parquet", stdin=io.BytesIO())


def test_rows_come_before_the_source_ends() -> None:
    class Pipe(io.RawIOBase):
        lines = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.lines += 1
            return b'{"text": "a"}\n'

    pipe = Pipe()
    rows = read_rows("-", stdin=pipe)
    for _ in range(3):
        next(rows)
    assert pipe.lines == 3


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_a_large_input_is_never_held(tmp_path: Path, extension: str) -> None:
    path, count = tmp_path / f"in.{extension}", 15_000
    text = "some text of the usual kind " * 80
    if extension == "parquet":
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
            for start in range(0, count, 5_000):
                batch = [f"{i} {text}" for i in range(start, start + 5_000)]
                writer.write_table(pa.table({"text": batch}))
    else:
        with path.open("w") as handle:
            handle.write("text\n" if extension == "csv" else "")
            for i in range(count):
                handle.write(f"{i} {text}\n" if extension == "csv" else f'{{"text": "{i} {text}"}}\n')
    assert path.stat().st_size > 30e6 or extension == "parquet"  # Parquet compresses the repeated words
    arrow_before = pa.total_allocated_bytes()
    arrow_peak = 0
    tracemalloc.start()
    try:
        seen = 0
        for row in read_rows(path):
            assert row.error is None
            seen += 1
            if seen % 1000 == 0:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == count
    assert peak < 1e6
    assert arrow_peak < 10e6


def test_a_text_field_that_was_named_is_used(tmp_path: Path) -> None:
    content = '{"prompt": "p", "completion": "c", "body": "b"}\n'
    row = rows_of(tmp_path / "in.jsonl", content, fields=Fields(text="body"))[0]
    assert (row.prompt, row.completion) == ("", "b")
    missing = errors_of(content, tmp_path, fields=Fields(text="words"))[0]
    assert missing is not None
    assert "has no field 'words'" in missing
    assert "--text-field" in missing
    with pytest.raises(InputError, match="--text-field names texts without a prompt"):
        read_rows(tmp_path / "in.jsonl", fields=Fields(text="body", prompt="question"))


def test_a_prompt_field_that_was_named_is_not_ignored(tmp_path: Path) -> None:
    error = errors_of('{"question": "q", "text": "t"}\n', tmp_path, fields=Fields(prompt="question"))[0]
    assert error is not None
    assert "--completion-field" in error


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv"])
def test_estimated_rows(tmp_path: Path, extension: str) -> None:
    rows = estimate_rows(write_pairs(tmp_path / f"in.{extension}"))
    if extension == "csv":  # line breaks inside cells are counted, too
        assert rows is not None
        assert rows >= len(PAIRS)
    else:
        assert rows == len(PAIRS)
    assert estimate_rows("-") is None
    assert estimate_rows(tmp_path / "absent.jsonl") is None
    assert estimate_rows(put(tmp_path / "x.txt.gz", gzip.compress(b"a\n"))) is None
