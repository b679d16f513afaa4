import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loglik.errors import InputError
from loglik.scoring.read import Fields, read_rows
from loglik.scoring.rows import COLUMNS, PER_TOKEN_COLUMNS, InputRow, ScoredRow
from loglik.scoring.sink import InputDigest, Sink, open_sink

EXTENSIONS = ["jsonl", "ndjson", "csv", "parquet"]
SETTINGS = {"model": "tiny", "bos": "auto", "stride": None, "window": [1, 2]}
ROWS = [
    ScoredRow("a", -1.5, "exact", None, 3, 9, 1 / 3, True, "none", 0, None, [' "y",\n', "\r"], [None, -1e-300]),
    ScoredRow("b\rc", -math.inf, "lower_bound", 0.25, 1, 2, math.inf, False, "aligned", 7, None, ["日本"], [-math.inf]),
    ScoredRow('d,"e"\n', error="is empty: fill it"),
    ScoredRow("", -2.0, "exact", None, 0, 2**40, 1.0, False, "straddled", 1, None, [], []),
]  # fmt: skip


def start(output: Path | str, **options: object) -> Sink:
    chosen = {"settings": SETTINGS, "per_token": True, "resume": False, "overwrite": False, **options}
    return open_sink(output, **chosen)  # type: ignore[arg-type]


def write(output: Path, rows: list[ScoredRow], *, chunk: int = 2, finish: bool = True, **options: object) -> Sink:
    sink = start(output, **options)
    for begin in range(sink.done_rows, len(rows), chunk):
        sink.commit(rows[begin : begin + chunk], f"digest{min(begin + chunk, len(rows))}")
    if finish:
        sink.finish()
    return sink


def parse(output: Path, *, per_token: bool = True) -> list[ScoredRow]:
    """Read an output with other code than that which wrote it."""
    if output.suffix == ".parquet":
        return [ScoredRow(**record) for record in pq.read_table(output).to_pylist()]
    with output.open(encoding="utf-8", newline="") as handle:
        if output.suffix != ".csv":
            return [ScoredRow(**json.loads(line)) for line in handle]
        texts = {"id", "kind", "boundary", "error"}
        rows = []
        for record in csv.DictReader(handle, strict=True):
            values = {n: (c or None) if n in texts else json.loads(c or "null") for n, c in record.items()}
            rows.append(ScoredRow(**{**values, "id": record["id"]}))
        return rows


def refused(*args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        start(*args, **options)  # type: ignore[arg-type]
    return str(caught.value)


# ---------------------------------------------------------------------- what is written
@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_every_value_of_every_column_comes_back(tmp_path: Path, extension: str, chunk: int) -> None:
    output = tmp_path / f"out.{extension}"
    write(output, ROWS, chunk=chunk)
    assert parse(output) == ROWS
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("per_token", [False, True])
def test_columns_and_their_order(tmp_path: Path, per_token: bool) -> None:
    columns = list(COLUMNS + PER_TOKEN_COLUMNS if per_token else COLUMNS)
    for extension in EXTENSIONS:
        write(tmp_path / f"out.{extension}", ROWS, per_token=per_token)
    for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        assert list(json.loads(line)) == columns
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as handle:
        assert next(csv.reader(handle)) == columns
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == columns
    assert json.loads(schema.metadata[b"loglik"]) == SETTINGS


def test_parquet_types_do_not_depend_on_the_values(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", [ScoredRow("a", error="x")])
    s, d, i = pa.string(), pa.float64(), pa.int64()
    expected = [s, d, s, d, i, i, d, pa.bool_(), s, i, s, pa.list_(s), pa.list_(d)]
    assert pq.read_schema(tmp_path / "out.parquet").types == expected


def test_the_text_of_infinite_numbers(tmp_path: Path) -> None:
    write(tmp_path / "out.jsonl", ROWS)
    line = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[1]
    assert '"log_prob": -Infinity' in line
    assert '"bits_per_byte": Infinity' in line
    assert '"日本"' in line
    write(tmp_path / "out.csv", ROWS)
    assert b"-Infinity,lower_bound,0.25,1,2,Infinity,false,aligned,7,," in (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_no_rows_make_an_empty_table(tmp_path: Path, extension: str) -> None:
    write(tmp_path / f"out.{extension}", [])
    assert parse(tmp_path / f"out.{extension}") == []
    assert start(tmp_path / f"out.{extension}", resume=True).done_rows == 0


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path: Path, extension: str) -> None:
    output = tmp_path / f"out.{extension}"
    write(output, [ScoredRow("a\ud800", tokens=["\udfff"])])
    (row,) = parse(output)
    lossless = extension in ("jsonl", "ndjson")
    assert row.id == ("a\ud800" if lossless else "a\\ud800")
    assert row.tokens == (["\\udfff"] if extension == "parquet" else ["\udfff"])


@pytest.mark.parametrize("row", [ScoredRow("q", math.nan), ScoredRow("q", -1.0, token_log_probs=[None, math.nan])])
def test_nan_never_reaches_a_table(tmp_path: Path, row: ScoredRow) -> None:
    for extension in EXTENSIONS:
        with pytest.raises(ValueError, match="row 'q' has NaN in"):
            write(tmp_path / f"out.{extension}", [row])


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_read_rows_reads_what_was_written(tmp_path: Path, extension: str) -> None:
    output = tmp_path / f"out.{extension}"
    write(output, [ScoredRow("a", kind="one\rtwo"), ScoredRow("b", kind='"three",\n')])
    rows = list(read_rows(output, fields=Fields(text="kind")))
    assert [(r.id, r.completion) for r in rows] == [("a", "one\rtwo"), ("b", '"three",\n')]


def test_small_parts_become_one_row_group(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet", [ScoredRow(str(i), -float(i)) for i in range(50)], chunk=5)
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 1


def test_standard_output_is_flushed_by_chunk() -> None:
    stream = io.StringIO()
    sink = start("-", stdout=stream)
    assert (sink.done_rows, sink.resume_digest, sink.complete) == (0, None, False)
    sink.commit(ROWS[:3], "x")
    assert [ScoredRow(**json.loads(line)) for line in stream.getvalue().split("\n")[:-1]] == ROWS[:3]
    sink.commit(ROWS[3:], "y")
    sink.finish()
    assert [ScoredRow(**json.loads(line)) for line in stream.getvalue().split("\n")[:-1]] == ROWS
    raw = io.BytesIO()
    sink = start("-", stdout=io.TextIOWrapper(raw, encoding="ascii", newline=""))
    sink.commit(ROWS, "x")
    assert [ScoredRow(**json.loads(line)) for line in raw.getvalue().decode("ascii").split("\n")[:-1]] == ROWS


# ---------------------------------------------------------------------- the digest of the input
def test_digest_tells_rows_apart() -> None:
    rows = [
        InputRow("a", "w", "bc", "d"),
        InputRow("ab", "w", "c", "d"),
        InputRow("a", "w", "b", "cd"),
        InputRow("a", "w", "bc", "d", ""),
        InputRow("a", "w", "bc", "", "d"),
        InputRow("a", "w", "bc1:d", ""),
    ]
    digests = set()
    for row in rows:
        digest = InputDigest()
        digest.update(row)
        digests.add(digest.hexdigest())
    assert len(digests) == len(rows)
    first, second = InputDigest(), InputDigest()
    first.update(rows[0])
    middle = first.hexdigest()
    assert first.hexdigest() == middle  # asking changes nothing
    first.update(rows[1])
    second.update(rows[1])
    second.update(rows[0])
    assert len({first.hexdigest(), second.hexdigest(), middle}) == 3  # order counts
    again = InputDigest()
    again.update(InputRow("a", "elsewhere", "bc", "d"))
    assert again.hexdigest() == middle  # the place does not
    again.update(InputRow("\ud800", "w", "", ""))


# ---------------------------------------------------------------------- opening
def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    assert refused(tmp_path / "no" / "out.jsonl") == (
        f"the directory {tmp_path / 'no'} does not exist: create it or choose another --output"
    )
    (tmp_path / "d.csv").mkdir()
    assert refused(tmp_path / "d.csv") == f"{tmp_path / 'd.csv'} is a directory: name a file with --output"
    assert "does not exist: create it or" in refused(tmp_path / "d.csv" / "x" / "out.csv")
    assert "cannot be written (File name too long): choose another --output" in refused(tmp_path / f"{'x' * 252}.csv")
    for name in ("out.txt", "out", "out.jsonl.gz"):
        assert refused(tmp_path / name) == (
            f"the format of {tmp_path / name} is not known from its extension: use one of .jsonl, .ndjson, .parquet, "
            ".csv, or - for JSONL on standard output"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory that refuses even root")
def test_a_read_only_file_system_is_found_by_writing() -> None:
    assert "cannot be written" in refused("/proc/out.jsonl")


def test_a_full_disk_is_found_by_the_probe_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    output = tmp_path / "out.jsonl"
    assert refused(output) == f"{output} cannot be written (No space left on device): choose another --output"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "out.jsonl"
    sink = write(output, ROWS[:2], finish=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for attempt in (lambda: sink.commit(ROWS[2:], "x"), sink.finish):
            with pytest.raises(InputError) as caught:
                attempt()
            assert str(caught.value) == (
                f"{output} cannot be written (No space left on device): mend that and go on with --resume"
            )
    assert write(output, ROWS, resume=True).complete
    assert parse(output) == ROWS


def test_opening_alone_leaves_nothing_behind(tmp_path: Path) -> None:
    start(tmp_path / "out.jsonl")
    start(tmp_path / "out.jsonl", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_options_that_contradict(tmp_path: Path) -> None:
    sentence = "--resume and --overwrite contradict each other: pass one of them"
    assert refused(tmp_path / "out.csv", resume=True, overwrite=True) == sentence
    assert refused("-", resume=True) == "standard output cannot be resumed: write to a file with --output"


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_nothing_is_replaced_unasked(tmp_path: Path, extension: str) -> None:
    output = tmp_path / f"out.{extension}"
    write(output, ROWS)
    before = output.read_bytes()
    assert refused(output) == f"{output} exists; pass --overwrite to replace it or choose another --output"
    assert output.read_bytes() == before
    write(output, ROWS[:1], overwrite=True)
    assert parse(output) == ROWS[:1]
    output.unlink()
    write(output, ROWS, finish=False)
    assert refused(output) == (
        f"{output}.parts holds an unfinished run; pass --resume to continue it or --overwrite to discard it"
    )
    write(output, ROWS[1:2], overwrite=True)
    assert parse(output) == ROWS[1:2]
    assert list(tmp_path.iterdir()) == [output]


def test_overwrite_removes_both_and_only_what_is_its_own(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(output, ROWS, finish=False)
    output.write_text("old")
    note = tmp_path / "out.jsonl.parts" / "note.md"
    note.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sink = start(output, overwrite=True)
    assert sink.done_rows == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before  # it may yet fail
    sink.commit(ROWS[:1], "digest")
    assert not output.exists()
    names = {"manifest.json", "note.md", "part-00000000.json", "part-00000000.jsonl"}
    assert {path.name for path in note.parent.iterdir()} == names
    write(output, ROWS, overwrite=True)
    assert parse(output) == ROWS
    assert sorted(tmp_path.rglob("*")) == [output, note.parent, note]
    assert note.read_text() == "mine"


# ---------------------------------------------------------------------- resuming
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_resume_goes_on_after_the_committed_rows(tmp_path: Path, extension: str) -> None:
    output = tmp_path / f"out.{extension}"
    fresh = start(output, resume=True)
    assert (fresh.done_rows, fresh.resume_digest, fresh.complete) == (0, None, False)
    write(output, ROWS[:3], chunk=2, finish=False)
    sink = start(output, resume=True)
    assert (sink.done_rows, sink.resume_digest, sink.complete) == (3, "digest3", False)
    write(output, ROWS, chunk=5, resume=True)
    assert parse(output) == ROWS
    done = start(output, resume=True)
    assert (done.done_rows, done.resume_digest, done.complete) == (4, None, True)
    assert list(tmp_path.iterdir()) == [output]


def test_other_settings_are_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(output, ROWS, finish=False)
    other = {"model": "big", "bos": "auto", "window": [1, 2], "extra": 1}
    assert refused(output, resume=True, settings=other, per_token=False) == (
        f'the unfinished run in {output}.parts has other settings (extra was not set and is 1; model was "tiny" and is '
        '"big"; stride was null and is not set; per_token differs): pass the same ones to resume, or --overwrite to '
        "discard it"
    )
    # Equal after the round trip through JSON.
    same = {"window": (1, 2), "stride": None, "bos": "auto", "model": "tiny"}
    assert start(output, resume=True, settings=same).done_rows == len(ROWS)


def test_a_complete_parquet_file_remembers_its_settings(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    write(output, ROWS)
    assert 'model was "tiny" and is "big"' in refused(output, resume=True, settings={**SETTINGS, "model": "big"})
    output.write_bytes(b"other")
    assert refused(output, resume=True) == f"{output} is damaged: pass --overwrite to write it anew"


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 0}', '{"version": 1, "state": "open"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    output = tmp_path / "out.jsonl"
    write(output, ROWS, finish=False)
    manifest = tmp_path / "out.jsonl.parts" / "manifest.json"
    manifest.write_text(content)
    assert refused(output, resume=True) == (
        f"{manifest} is damaged or of another version of loglik: pass --overwrite to start anew"
    )


@pytest.mark.parametrize("harm", ["data", "record", "cut", "junk", "gap"])
def test_a_part_that_does_not_fit_its_record_is_done_again(tmp_path: Path, harm: str) -> None:
    output = tmp_path / "out.jsonl"
    write(output, ROWS, chunk=1, finish=False)
    data = tmp_path / "out.jsonl.parts" / "part-00000002.jsonl"
    record = data.with_suffix(".json")
    if harm == "data":
        data.unlink()
    elif harm == "record":
        record.unlink()
    elif harm == "cut":
        data.write_bytes(data.read_bytes()[:-5])
    elif harm == "junk":
        record.write_text("{}")
    else:
        record.write_text(record.read_text().replace('"total_rows": 3', '"total_rows": 4'))
    sink = start(output, resume=True)
    assert (sink.done_rows, sink.resume_digest) == (2, "digest2")
    assert len(list(data.parent.iterdir())) == 5  # the manifest and two parts
    write(output, ROWS, resume=True)
    assert parse(output) == ROWS


def test_an_unrelated_output_beside_parts_is_neither_lost_nor_taken(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(output, ROWS, finish=False)
    output.write_text("mine")
    assert refused(output, resume=True) == (
        f"{output} exists and is not the result of the unfinished run in {output}.parts: move it elsewhere to resume, "
        "or pass --overwrite to discard both"
    )
    assert output.read_text() == "mine"
    output.unlink()
    write(output, ROWS, resume=True)
    assert parse(output) == ROWS


def test_a_second_run_to_the_same_output_stops_at_its_first_part(tmp_path: Path) -> None:
    first, second = start(tmp_path / "out.jsonl"), start(tmp_path / "out.jsonl")
    first.commit(ROWS[:1], "x")
    with pytest.raises(InputError, match="another run has begun to write"):
        second.commit(ROWS[:1], "x")


# ---------------------------------------------------------------------- killed at every step
# One process imports the sink once and forks: each child is killed just before its n-th step, then (every third time) a
# resumed child is killed too, and a last child resumes to the end. A step is a call that changes or syncs the disk, or
# a line that runs in sink.py (which also leaves files written in part). The loop ends at the n that is past the end of
# an undisturbed run, so that no call is left out.
DRIVER = r"""
import os, random, signal, sys
from pathlib import Path
import pyarrow as pa
from loglik.scoring import sink as module
from loglik.scoring.rows import InputRow, ScoredRow

pa.array(["a"])  # imports pandas where it is installed: once here and not in every child
N = 7
CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
PURE = {"_value", "_cell", "_encodable", "_compare", "<genexpr>", "<listcomp>", "<dictcomp>"}
# Long enough that a file reaches the disk in pieces.
INPUT = [InputRow(str(i), f"line {i + 1}", "p", f"c{i}" * 3000) for i in range(N)]

def scored(row):
    return ScoredRow(row.id, -float(row.id), "exact", tokens=[row.completion], token_log_probs=[-float(row.id)])

def run(output, resume, chunk, at_least, progress):
    sink = module.open_sink(output, settings={"model": "m"}, per_token=True, resume=resume, overwrite=False)
    assert sink.done_rows >= at_least, (sink.done_rows, at_least)  # what was committed is never lost
    os.write(progress, b"%d " % sink.done_rows)
    if sink.complete:
        assert sink.done_rows == N, sink.done_rows
        return
    digest = module.InputDigest()
    for row in INPUT[: sink.done_rows]:
        digest.update(row)
    assert sink.resume_digest == (digest.hexdigest() if sink.done_rows else None)
    for begin in range(sink.done_rows, N, chunk):
        rows = INPUT[begin : begin + chunk]
        for row in rows:
            digest.update(row)
        sink.commit([scored(row) for row in rows], digest.hexdigest())
        os.write(progress, b"%d " % sink.done_rows)
    sink.finish()

def child(output, resume, chunk, kill_at, unit, at_least=0):
    '''Whether a forked run was killed, and how many rows were committed by then.'''
    reading, progress = os.pipe()
    pid = os.fork()
    if pid == 0:
        steps = 0
        def count():
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        def trace(frame, event, arg):
            # Code that only turns one value into another leaves no trace on the disk.
            if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name in PURE:
                return None
            if event == "line":
                count()
            return trace
        def audit(event, args):
            if event in CALLS and str(args[0]).startswith(str(output.parent)):
                count()
        # What a killed process has written stays in the page cache: syncing itself matters for power cuts alone.
        os.fsync = lambda descriptor: count() if unit == "calls" else None
        if kill_at and unit == "lines":
            sys.settrace(trace)
        elif kill_at:
            sys.addaudithook(audit)
        try:
            run(output, resume, chunk, at_least, progress)
        except BaseException as error:
            sys.settrace(None)
            os.write(2, f"{output}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, int(signal.SIGKILL)), (output, status)
    os.close(progress)
    with os.fdopen(reading) as pipe:
        committed = [at_least, *map(int, pipe.read().split())]
    return status != 0, committed[-1]

def survey(directory, extension, unit, step):
    assert child(directory / f"whole.{extension}", False, 3, 0, unit) == (False, N)
    draw = random.Random(0)
    kill_at, kills, states = 1, 0, set()
    while True:
        output = directory / f"{kill_at}.{extension}"
        killed, committed = child(output, False, 3, kill_at, unit)
        if not killed:
            return kills, len(states)
        kills += 1
        parts = Path(f"{output}.parts")
        states.add((output.exists(), tuple(sorted(p.name for p in parts.iterdir())) if parts.exists() else None))
        if kill_at % 3 == 0:
            again = draw.randrange(1, 200 if unit == "lines" else 40)
            committed = child(output, True, 2, again, unit, committed)[1]
        assert child(output, True, 2, 0, unit, committed) == (False, N)
        assert not parts.exists(), output
        kill_at += step

for case in sys.argv[2:]:
    extension, unit, step = case.split("-")
    directory = Path(sys.argv[1]) / case
    directory.mkdir()
    print(case, *survey(directory, extension, unit, int(step)))
"""
CASES = ["jsonl-calls-1", "csv-calls-1", "parquet-calls-1", "jsonl-lines-10"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Where the outputs of the killed and resumed runs lie, and how many kills there were in how many states."""
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", DRIVER, str(directory), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = (line.split() for line in done.stdout.splitlines())
    return directory, {case: (int(kills), int(states)) for case, kills, states in counts}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("case", CASES)
def test_killed_before_any_step_a_resumed_run_gives_the_same_file(
    killed: tuple[Path, dict[str, tuple[int, int]]], case: str
) -> None:
    directory, counts = killed[0] / case, killed[1]
    kills, states = counts[case]
    assert kills > 30
    assert states > 15  # different contents of the directory at the moment of the kill
    (whole,) = directory.glob("whole.*")
    results = [path for path in directory.iterdir() if path != whole]
    assert len(results) == kills + 1
    assert [row.id for row in parse(whole)] == [str(i) for i in range(7)]
    for path in results:
        if whole.suffix == ".parquet":
            assert pq.read_table(path).equals(pq.read_table(whole), check_metadata=True), path
        else:
            assert path.read_bytes() == whole.read_bytes(), path
