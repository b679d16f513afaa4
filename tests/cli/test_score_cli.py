"""``loglik score`` from outside: good input gives rows, bad input one sentence and exit code 2."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from loglik.cli import main
from loglik.scoring.rows import COLUMNS
from zoo import CAUSAL, MASKED, SEQ2SEQ, bert_tokenizer, build, byte_level_tokenizer, t5_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A small GPT-2 with its tokenizer, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    tokenizer = byte_level_tokenizer()
    build(CAUSAL["gpt2"], len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def cli(capsys, monkeypatch, model_dir):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*args: object, stdin: bytes | None = None, model: object = model_dir) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main(["score", *map(str, args), "--model", str(model)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(err: str) -> str:
    """The one line of an error."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("loglik: ")
    assert "Traceback" not in err
    return lines[0].removeprefix("loglik: ")


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


GOOD = {"prompt": "The", "completion": " answer is 42"}


# ------------------------------------------------------------------ what it does
def test_rows_on_standard_output(cli, tmp_path):
    code, out, err = cli(write(tmp_path / "in.jsonl", GOOD, {"text": "hello", "id": "q"}))
    assert code == 0
    first, second = rows_of(out)
    assert tuple(first) == COLUMNS
    assert (first["id"], second["id"]) == ("0", "q")
    assert first["kind"] == "exact"
    assert first["boundary"] == "aligned"
    assert second["boundary"] == "none"
    assert first["num_bytes"] == len(" answer is 42")
    assert first["bits_per_byte"] == pytest.approx(-first["log_prob"] / math.log(2) / first["num_bytes"])
    assert "bits per byte" in err
    assert "BOS" in err


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv"])
def test_every_output_format_has_the_same_rows(cli, tmp_path, extension):
    source = write(tmp_path / "in.jsonl", GOOD, {"text": 'hello, "world"\n'})
    assert cli(source, "--output", tmp_path / "a.jsonl", "--per-token")[0] == 0
    assert cli(source, "--output", tmp_path / f"b.{extension}", "--per-token")[0] == 0
    expected = rows_of((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    if extension == "parquet":
        got = pq.read_table(tmp_path / "b.parquet").to_pylist()
    elif extension == "csv":
        import csv

        with (tmp_path / "b.csv").open(encoding="utf-8", newline="") as handle:
            got = list(csv.DictReader(handle))
        for row, want in zip(got, expected, strict=True):
            assert float(row["log_prob"]) == want["log_prob"]
            assert json.loads(row["token_log_probs"]) == want["token_log_probs"]
        return
    else:
        got = rows_of((tmp_path / "b.jsonl").read_text(encoding="utf-8"))
    assert got == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.txt", "hello world\nthe answer\n"),
        ("in.csv", "text,id\nhello world,0\nthe answer,1\n"),
        ("in.jsonl", '{"text": "hello world"}\n\n{"text": "the answer"}\n'),
    ],
)
def test_every_input_format_gives_the_same_numbers(cli, tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    code, out, _ = cli(path)
    assert code == 0
    reference = rows_of(cli("-", stdin=b'{"text": "hello world"}\n{"text": "the answer"}\n')[1])
    assert rows_of(out) == reference


def test_unconditional_text_without_bos_is_no_error(cli, tmp_path):
    tokenizer = byte_level_tokenizer(bos=False)
    build(CAUSAL["llama"], len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    code, out, err = cli("-", "--per-token", stdin=b'{"text": "hello world"}\n', model=tmp_path / "m")
    assert code == 0
    row = rows_of(out)[0]
    assert row["error"] is None
    assert row["token_log_probs"][0] is None
    assert row["num_tokens"] == len(row["tokens"]) - 1
    assert row["num_bytes"] == len("hello world") - len(row["tokens"][0])
    assert "the tokenizer has no BOS token" in err


@pytest.mark.parametrize(
    ("make", "tokenizer", "kind"),
    [
        (SEQ2SEQ["t5"], t5_tokenizer(), "exact"),
        (SEQ2SEQ["bart"], t5_tokenizer(), "exact"),
        (MASKED["bert"], bert_tokenizer(), "surrogate"),
    ],
    ids=["t5", "bart", "bert"],
)
def test_families_are_recognised(cli, tmp_path, make, tokenizer, kind):
    build(make, len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    code, out, _ = cli("-", stdin=b'{"prompt": "hello", "completion": " the answer"}\n', model=tmp_path / "m")
    assert code == 0
    assert rows_of(out)[0]["kind"] == kind


def test_report_is_written(cli, tmp_path):
    code, _, _ = cli(write(tmp_path / "in.jsonl", GOOD), "-o", tmp_path / "o.jsonl", "--report", tmp_path / "r.html")
    assert code == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "answer" in page
    assert "tokens" not in rows_of((tmp_path / "o.jsonl").read_text(encoding="utf-8"))[0]


def test_report_after_resume_covers_every_row(cli, tmp_path):
    source, output, report = tmp_path / "in.jsonl", tmp_path / "o.jsonl", tmp_path / "r.html"
    write(source, {"id": "first", **GOOD}, {"text": 3})
    assert cli(source, "-o", output)[0] == 2
    write(source, {"id": "first", **GOOD}, {"id": "second", **GOOD})
    assert cli(source, "-o", output, "--resume", "--report", report)[0] == 0
    assert all(name in report.read_text(encoding="utf-8") for name in ("first", "second"))
    report.unlink()
    assert cli(source, "-o", output, "--resume", "--report", report)[0] == 0  # finished already
    assert all(name in report.read_text(encoding="utf-8") for name in ("first", "second"))


def test_half_precision_runs(cli, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD)
    wide, half = (rows_of(cli(source, "--dtype", d)[1])[0]["log_prob"] for d in ("float32", "bfloat16"))
    assert half == pytest.approx(wide, rel=0.05)


# ------------------------------------------------------------------ bad rows
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": ', "line 2: .*"),
        (b'{"prompt": "a" "completion": "b"}', "line 2: .*not valid JSON.*"),
        (b'{"prompt": "a"}', "line 2: .*(completion|text).*"),
        (b'{"prompt": "a", "completion": null}', "line 2: .*completion.*null.*"),
        (b'{"prompt": "a", "completion": 3}', "line 2: .*completion.*"),
        (b'{"prompt": ["a"], "completion": "b"}', "line 2: .*prompt.*"),
        (b'{"prompt": "a", "completion": ""}', "line 2: .*empty.*"),
        (b'{"prompt": "a", "completion": "b\\ud800"}', r"line 2: .*surrogate.*U\+D800.*"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', "line 2: .*NUL.*"),
        (b'["a", "b"]', "line 2: .*object.*"),
        (b'{"prompt": "\xff", "completion": "b"}', "line 2: .*UTF-8.*"),
        (json.dumps({"prompt": "a", "completion": " the" * 80}).encode(), "line 2: .*81.*context is 64.*overflow.*"),
    ],
)
def test_a_bad_row_stops_the_run_and_loses_nothing(cli, tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    code, out, err = cli(path)
    assert code == 2
    assert re.fullmatch(message, sentence(err)), err
    assert len(rows_of(out)) == 1  # the row before it was scored and written

    output = tmp_path / "out.jsonl"
    code, _, err = cli(path, "-o", output)
    assert code == 2
    assert "--resume" in sentence(err)
    path.write_bytes(good + b"\n" + good + b"\n" + good + b"\n")  # mended
    assert cli(path, "-o", output, "--resume")[0] == 0
    assert [row["id"] for row in rows_of(output.read_text(encoding="utf-8"))] == ["0", "1", "2"]

    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    code, out, _ = cli(path, "--on-error", "row")
    assert code == 0
    assert [row["error"] is None for row in rows_of(out)] == [True, False, True]
    assert rows_of(out)[1]["log_prob"] is None


def test_interrupted_standard_input(cli):
    """A writer that died in the middle of a line."""
    good = json.dumps(GOOD).encode() + b"\n"
    code, out, err = cli("-", stdin=good + good[: len(good) // 2])
    assert code == 2
    assert sentence(err).startswith("line 2: ")
    assert "interrupted" in sentence(err)
    assert len(rows_of(out)) == 1


def test_skip_leaves_long_rows_out_and_goes_on(cli, tmp_path):
    source = write(tmp_path / "in.jsonl", {"text": " the" * 99}, GOOD)
    code, out, _ = cli(source, "--overflow", "skip")
    assert code == 0
    assert rows_of(out)[0]["error"].startswith("skipped: ")
    assert rows_of(out)[1]["error"] is None
    code, out, _ = cli(source, "--overflow", "window", "--stride", "16")
    assert code == 0
    assert rows_of(out)[0]["num_windowed"] == 99 - 64


# ------------------------------------------------------------------ bad files, options and models
def test_bad_input_files(cli, tmp_path):
    assert "absent.jsonl" in sentence(cli(tmp_path / "absent.jsonl")[2])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    code, _, err = cli(empty)
    assert code == 2
    assert "empty" in sentence(err) or "no rows" in sentence(err)
    other = tmp_path / "in.xml"
    other.write_text("<a/>")
    assert "--format" in sentence(cli(other)[2])
    assert cli(tmp_path)[0] == 2


def test_unknown_field_names_are_explained(cli, tmp_path):
    source = write(tmp_path / "in.jsonl", {"question": "a", "answer": "b"})
    code, _, err = cli(source)
    assert code == 2
    assert "question" in sentence(err)
    assert "--completion-field" in sentence(err)
    assert cli(source, "--prompt-field", "question", "--completion-field", "answer")[0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--stride", "0"), "stride must be at least 1, got 0"),
        (("--stride", "-3"), "stride must be at least 1, got -3"),
        (("--stride", "65"), "stride must not exceed the model's context of 64 tokens, got 65"),
        (("--max-batch-tokens", "0"), "max_batch_tokens must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(cli, tmp_path, option, message):
    code, _, err = cli(write(tmp_path / "in.jsonl", GOOD), *option)
    assert code == 2
    assert sentence(err) == message


def test_unknown_choice_is_refused_by_the_parser(cli, tmp_path):
    code, _, err = cli(write(tmp_path / "in.jsonl", GOOD), "--overflow", "cut")
    assert code == 2
    assert "Traceback" not in err


def test_outputs_that_cannot_be_written(cli, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD)
    for output in (tmp_path / "no" / "dir" / "out.jsonl", tmp_path, tmp_path / "out.xml"):
        code, _, err = cli(source, "-o", output)
        assert code == 2
        assert sentence(err)
    output = tmp_path / "out.jsonl"
    assert cli(source, "-o", output)[0] == 0
    before = output.read_bytes()
    code, _, err = cli(source, "-o", output)
    assert code == 2
    assert "--overwrite" in sentence(err)
    assert output.read_bytes() == before
    assert cli(source, "-o", output, "--overwrite", model="nobody/has-this-model")[0] == 2
    assert output.read_bytes() == before  # a run that cannot start discards nothing
    assert cli(source, "-o", output, "--overwrite")[0] == 0
    assert output.read_bytes() == before
    code, _, err = cli(source, "-o", output, "--overwrite", "--report", tmp_path / "no" / "r.html")
    assert code == 2
    assert "the report cannot be written" in sentence(err)
    assert output.read_bytes() == before


def test_unknown_model_name_without_network(cli, tmp_path):
    code, _, err = cli(write(tmp_path / "in.jsonl", GOOD), model="nobody/has-this-model")
    assert code == 2
    assert "'nobody/has-this-model'" in sentence(err)
    assert "network" in sentence(err)


def test_models_that_cannot_be_loaded(cli, tmp_path, model_dir):
    source = write(tmp_path / "in.jsonl", GOOD)

    def copy(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in model_dir.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    nothing = tmp_path / "nothing"
    nothing.mkdir()
    weightless = copy("weightless")
    (weightless / "model.safetensors").unlink()
    truncated = copy("truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    partial = copy("partial")
    from safetensors.torch import save_file

    weights = load_file(partial / "model.safetensors")
    weights.pop("transformer.h.0.attn.c_attn.weight")
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    headless = copy("headless")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2Model"]}))
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    silent = copy("silent")
    for file in silent.glob("tokenizer*"):
        file.unlink()
    expected = {
        nothing: "has no config.json",
        weightless: "has no weights",
        truncated: "damaged or truncated",
        pickled: "pickled",
        partial: "1 tensors missing",
        headless: "GPT2Model",
        broken: "configuration",
        silent: "no tokenizer",
        model_dir / "config.json": "is a file",
    }
    for model, message in expected.items():
        code, _, err = cli(source, model=model)
        assert code == 2, model
        assert message in sentence(err)


# ------------------------------------------------------------------ interruptions
def test_killed_runs_finish_with_the_rows_of_an_uninterrupted_one(tmp_path, model_dir):
    """SIGKILL at several moments, then --resume: the same bytes, none twice, none lost."""
    source = write(tmp_path / "in.jsonl", *({"id": i, "text": f"hello the answer is {i} so " * 3} for i in range(1500)))
    base = [sys.executable, "-m", "loglik", "score", str(source), "--model", str(model_dir), "--output"]
    whole = tmp_path / "whole.jsonl"
    subprocess.run([*base, str(whole)], check=True, capture_output=True)
    output = tmp_path / "killed.jsonl"
    parts = tmp_path / "killed.jsonl.parts"
    killed = 0
    for wanted in (1, 2, 4):  # kill once so many parts are there, or the moment after
        process = subprocess.Popen(
            [*base, str(output), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(parts.glob("part-*"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert not output.exists()
    subprocess.run([*base, str(output), "--resume"], check=True, capture_output=True)
    assert output.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    again = subprocess.run([*base, str(output), "--resume"], check=True, capture_output=True, text=True)
    assert output.read_bytes() == whole.read_bytes()
    assert "1,500 done before" in again.stderr


def test_resume_refuses_another_input_or_other_settings(cli, tmp_path):
    source = write(tmp_path / "in.jsonl", GOOD, {"text": 3})
    output = tmp_path / "out.jsonl"
    assert cli(source, "-o", output)[0] == 2
    code, _, err = cli(source, "-o", output, "--resume", "--boundary", "separate")
    assert code == 2
    assert "boundary" in sentence(err)
    write(source, {"text": "another"}, GOOD)
    code, _, err = cli(source, "-o", output, "--resume")
    assert code == 2
    assert "first 1 row" in sentence(err)


def test_values_do_not_depend_on_chunks(cli, tmp_path):
    """Rows beyond one chunk are scored as they would be alone."""
    texts = [{"text": f"hello {i} the answer"} for i in range(300)]
    rows = rows_of(cli(write(tmp_path / "in.jsonl", *texts))[1])
    assert [row["id"] for row in rows] == [str(i) for i in range(300)]
    for i in (0, 255, 256, 299):
        alone = rows_of(cli(write(tmp_path / "one.jsonl", texts[i]))[1])[0]
        assert rows[i]["log_prob"] == pytest.approx(alone["log_prob"], abs=1e-4)


def test_equivalent_settings_give_one_set_of_numbers(cli, tmp_path):
    """Batch budget and order of the rows: equal values, and residuals without a side."""
    texts = [
        {"id": str(i), "prompt": "The" * (i % 3), "text": "", "completion": " answer" * (1 + i % 17)} for i in range(40)
    ]
    source = write(tmp_path / "in.jsonl", *texts)
    reference = {row["id"]: row["log_prob"] for row in rows_of(cli(source)[1])}
    backwards = write(tmp_path / "back.jsonl", *reversed(texts))
    residuals = []
    for path, budget in [(source, 1), (source, 100), (backwards, 100), (backwards, 10_000)]:
        for row in rows_of(cli(path, "--max-batch-tokens", budget)[1]):
            residuals.append(row["log_prob"] - reference[row["id"]])
            assert abs(residuals[-1]) < 1e-4
    assert abs(sum(residuals)) / len(residuals) < 1e-6


def test_torch_is_not_imported_for_help():
    """Commands without tensors start at once."""
    code = "import sys, loglik.cli, loglik.papers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.get_num_threads() >= 1
