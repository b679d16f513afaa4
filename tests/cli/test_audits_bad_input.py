"""Bad input of every kind to every audit: one sentence that names the row or the option, exit code 2, no traceback."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil

import pytest
import tyro

import loglik.cli.audits
from loglik.cli import main
from loglik.cli.audits.common import RowAudit
from loglik.errors import LoglikError
from zoo import MASKED, bert_tokenizer, build

TEXTS = ["import os\n", "for i in x:\n    pass\n", "zq qz xx", "def f(a):\n    return a\n", "wug dax", "x = 1"]
ANSWERED = {"confidence": 0.5, "correct": True}
LONG = "x = 1\n" * 2000


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["audit", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.err
    sentences = captured.err.strip().splitlines()
    assert len(sentences) == 1, captured.err
    assert sentences[0].startswith("loglik: ")
    assert "nan" not in captured.out.lower()
    return sentences[0]


def texts(**columns):
    """Six rows of text with columns of six."""
    return [{"text": text} | {name: values[i] for name, values in columns.items()} for i, text in enumerate(TEXTS)]


MODEL = ("-m", "tiny", "--device", "cpu")
# A good row of every audit of rows, and what it needs beside the rows.
GOOD: dict[str, tuple[dict, tuple]] = {
    "calibration": (ANSWERED, ()),
    "choice": ({"question": "a", "options": ["b", "c"], "answer": 0}, MODEL),
    "membership": ({"text": "a b", "member": True}, MODEL),
    "ood": ({"text": "a b", "ood": True}, (*MODEL, "--base", "tiny")),
    "provenance": ({"text": "a b", "order": 1}, MODEL),
    "uncertainty": ({"prompt": "a", "answer": "b"}, (*MODEL, "--num-samples", 0, "--max-tokens", 1)),
}
WITH_MODEL = [name for name, (_, more) in GOOD.items() if more]


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("name", GOOD)
def test_files_that_are_no_rows(tmp_path, capsys, name):
    more = GOOD[name][1]
    empty = write(tmp_path / "empty.jsonl", [])
    assert "has no rows: there is nothing to audit" in refused(capsys, name, empty, *more)
    assert "does not exist: check the path" in refused(capsys, name, tmp_path / "none.jsonl", *more)
    (tmp_path / "in.csv").write_text("text\na\n")
    assert "format of" in refused(capsys, name, tmp_path / "in.csv", *more)
    (tmp_path / "in.parquet").write_text("no parquet")
    assert "is not a complete Parquet file" in refused(capsys, name, tmp_path / "in.parquet", *more)
    (tmp_path / "folder").mkdir()
    assert "is not a data set" in refused(capsys, name, tmp_path / "folder", *more)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"\n')
    assert "line 1 of" in refused(capsys, name, tmp_path / "bad.jsonl", *more)
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    assert "line 1 of" in refused(capsys, name, tmp_path / "list.jsonl", *more)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    assert "line 1" in refused(capsys, name, tmp_path / "bytes.jsonl", *more)


@pytest.mark.parametrize("name", GOOD)
def test_outputs_that_cannot_be_written(tmp_path, capsys, name):
    """Before any work: nothing but the options is wrong here, and no model is loaded."""
    row, more = GOOD[name]
    source = write(tmp_path / "in.jsonl", [row] * 3)
    more = tuple("nowhere" if part == "tiny" else part for part in more)
    for option, file in (("-o", "out.jsonl"), ("--summary", "s.json"), ("--report", "p.html")):
        error = refused(capsys, name, source, *more, option, tmp_path / "missing" / file)
        assert f"{file} cannot be written (there is no folder" in error
    assert "use .jsonl or .parquet" in refused(capsys, name, source, *more, "-o", tmp_path / "out.txt")
    (tmp_path / "s.json").mkdir()
    assert "cannot be written" in refused(capsys, name, source, *more, "--summary", tmp_path / "s.json")


@pytest.mark.parametrize("name", WITH_MODEL)
def test_unknown_models(tmp_path, capsys, name):
    row, more = GOOD[name]
    source = write(tmp_path / "in.jsonl", [row] * 3)
    if name in ("membership", "ood"):  # else one class only is told first
        source = write(tmp_path / "in.jsonl", [row, {**row, "member": False, "ood": False}])
    (tmp_path / "empty").mkdir()
    for model in ("none", "empty"):
        error = refused(capsys, name, source, *(tmp_path / model if part == "tiny" else part for part in more))
        assert str(tmp_path / model) in error
    assert "--batch-size must be at least 1" in refused(capsys, name, source, *more, "--batch-size", 0)


# ---------------------------------------------------------------------- columns
WRONG = [
    ("calibration", "confidence", [None, "0.5", True, [0.5], math.nan, math.inf, 10**400], "must be a finite number"),
    ("calibration", "correct", [None, "yes", 2, 0.5, [True]], "must be true or false"),
    ("choice", "question", [None, "", "  ", 1], "must be a text that is not empty"),
    ("choice", "options", [None, "b", [1, 2], {"a": 1}], "must be a list of texts"),
    ("choice", "answer", ["b", 0.5, -1, 2, math.nan], "answer must be"),
    ("membership", "text", [None, "", 3, ["a"]], "must be a text that is not empty"),
    ("membership", "member", ["yes", 2, [1]], "must be true or false"),
    ("ood", "text", [None, "", 3], "must be a text that is not empty"),
    ("ood", "ood", ["yes", -1], "must be true or false"),
    ("provenance", "text", [None, " "], "must be a text that is not empty"),
    ("provenance", "order", [None, "first", math.nan, math.inf, True], "must be a finite number"),
    ("uncertainty", "prompt", [None, "", 7], "must be a text that is not empty"),
]


@pytest.mark.parametrize(("name", "column", "values", "sentence"), WRONG)
def test_missing_fields_and_wrong_types_name_the_row(tmp_path, capsys, name, column, values, sentence):
    row, more = GOOD[name]
    for value in values:
        bad = {key: item for key, item in row.items() if key != column} | ({} if value is None else {column: value})
        source = write(tmp_path / "in.jsonl", [row, bad])
        error = refused(capsys, name, source, *more)
        assert sentence in error
        assert "line 2" in error


@pytest.mark.parametrize("name", ["membership", "ood", "provenance"])
def test_texts_over_the_context_and_no_text(tmp_path, capsys, name):
    rows = texts(member=[True, False] * 3, ood=[True, False] * 3, order=range(6))
    for bad, sentence in ((LONG, "has 8,001 tokens and the model a context of 1,024"), ("a\x00b", "NUL")):
        rows[3]["text"] = bad
        error = refused(capsys, name, write(tmp_path / "in.jsonl", rows), *GOOD[name][1])
        assert "line 4" in error
        assert sentence in error


def test_long_choices_and_prompts(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"question": LONG, "options": ["b", "c"]}])
    assert "tokens" in refused(capsys, "choice", source, *MODEL)
    source = write(tmp_path / "in.jsonl", [{"prompt": LONG}])
    assert "line 1" in refused(capsys, "uncertainty", source, *GOOD["uncertainty"][1])


# ---------------------------------------------------------------------- the list of the signals
@pytest.mark.parametrize(("name", "column"), [("membership", "member"), ("ood", "ood")])
@pytest.mark.parametrize("value", [True, False])
def test_one_class_only(tmp_path, capsys, name, column, value):
    source = write(tmp_path / "in.jsonl", texts(**{column: [value] * 6}))
    error = refused(capsys, name, source, *GOOD[name][1])
    assert "AUROC is undefined with one class only" in error
    assert f"{column} is {str(value).lower()} in all 6 rows" in error


def test_one_class_only_in_summaries_that_do_not_need_two(tmp_path, capsys):
    """All right or all wrong is a result; the AUROC alone is undefined, and the summary has no NaN."""
    summary = tmp_path / "summary.json"
    source = write(tmp_path / "in.jsonl", [{"confidence": 0.5 + i / 40, "correct": True} for i in range(20)])
    main(["audit", "calibration", str(source), "--summary", str(summary)])
    assert "NaN" not in summary.read_text()
    source = write(tmp_path / "in.jsonl", [{"prompt": "import os\nimport ", "answer": "zzz"}] * 2)
    main(["audit", "uncertainty", str(source), *map(str, GOOD["uncertainty"][1]), "--summary", str(summary)])
    assert "NaN" not in summary.read_text()
    assert "undefined" in json.loads(summary.read_text())["auroc"]
    capsys.readouterr()


@pytest.mark.parametrize("value", [1.5, -0.1, 80])
def test_probabilities_out_of_range(tmp_path, capsys, value):
    source = write(tmp_path / "in.jsonl", [ANSWERED] * 4 + [{**ANSWERED, "confidence": value}])
    error = refused(capsys, "calibration", source, "--bins", 2)
    assert "[0, 1]" in error
    assert "line 5" in error


def test_fewer_samples_than_bins(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [ANSWERED] * 5)
    assert "5 rows cannot fill 15 bins: set bins to 5 or less" in refused(capsys, "calibration", source)
    assert "bins must be a whole number of at least 1" in refused(capsys, "calibration", source, "--bins", 0)


def test_labels_of_some_rows_only(tmp_path, capsys):
    for name, column in (("membership", "member"), ("ood", "ood")):
        rows = texts(**{column: [True, False] * 3})
        del rows[3][column]
        error = refused(capsys, name, write(tmp_path / "in.jsonl", rows), *GOOD[name][1])
        assert f"line 4 has no {column}, and other rows have one" in error


def test_missing_base_and_reference(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", texts(ood=[True, False] * 3, member=[True, False] * 3, order=range(6)))
    error = refused(capsys, "ood", source, *MODEL)
    assert "the ratio needs the model before fine-tuning: give base" in error
    for name, option in (("ood", "--base"), ("membership", "--reference"), ("provenance", "--reference")):
        assert "nowhere" in refused(capsys, name, source, *MODEL, option, tmp_path / "nowhere")


def test_no_sampler(tmp_path, capsys):
    """A masked model gives neither samples nor next-token distributions."""
    tokenizer = bert_tokenizer()
    build(MASKED["bert"], len(tokenizer)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    more = ("-m", tmp_path / "bert", "--device", "cpu")
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    error = refused(capsys, "uncertainty", source, *more, "--num-samples", 2, "--max-tokens", 1)
    assert "MaskedLM does not have it: use a model that does" in error
    source = write(tmp_path / "in.jsonl", texts(member=[True, False] * 3))
    error = refused(capsys, "membership", source, *more)
    assert "reading next-token distributions needs per-token conditionals" in error


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("membership", ("--k", 0), "k must be a share of the tokens above 0"),
        ("membership", ("--k", 1.5), "k must be a share of the tokens above 0"),
        ("membership", ("--bootstrap", 0), "bootstrap must be at least 1"),
        ("ood", ("--regret-steps", -1), "--regret-steps must be at least 0"),
        ("ood", ("--regret-steps", 1, "--regret-rate", 0), "learning_rate positive"),
        ("provenance", ("--permutations", 0, "--method", "monte_carlo"), "permutations must be a whole number"),
        ("provenance", ("--texts", "x.jsonl"), "--texts belongs to the partition setting"),
        ("provenance", ("--shuffled", "a", "b"), "--shuffled belongs to the reshuffle setting"),
        ("provenance", ("--setting", "partition"), "give it as --texts FILE"),
        ("provenance", ("--setting", "reshuffle", "--shuffled", "a"), "give two models or more as --shuffled"),
        ("provenance", ("--strata-field", "stage"), "stage must be a finite number, got nothing"),
        ("uncertainty", ("--num-samples", -1), "--num-samples must be at least 0"),
    ],
)
def test_bad_options(tmp_path, capsys, name, options, sentence):
    rows = texts(member=[True, False] * 3, ood=[True, False] * 3, order=range(6))
    rows = [{**row, "prompt": "a"} for row in rows]
    source = write(tmp_path / "in.jsonl", rows)
    assert sentence in refused(capsys, name, source, *GOOD[name][1], *options)


def test_thresholds_need_enough_held_out_rows(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", texts())
    error = refused(capsys, "ood", source, *GOOD["ood"][1], "--held-out", source)
    assert "6 scores cannot show a false-alarm rate of 0.05: give at least 19" in error
    error = refused(capsys, "ood", source, *GOOD["ood"][1], "--held-out", tmp_path / "none.jsonl")
    assert "none.jsonl does not exist" in error


# ---------------------------------------------------------------------- provenance
def test_orders_that_are_no_order(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", texts(order=[0, 1, 2, 2, 4, 5]))
    assert "line 3 and line 4 have the same training order 2" in refused(capsys, "provenance", source, *MODEL)
    equal = write(tmp_path / "equal.jsonl", texts(order=[1] * 6))
    error = refused(capsys, "provenance", equal, *MODEL, "--repeated", "average")
    assert "all training orders are equal" in error
    two = write(tmp_path / "two.jsonl", texts(order=range(6))[:2])
    assert "at least 3 examples, got 2" in refused(capsys, "provenance", two, *MODEL)


def test_unsorted_training_order(tmp_path, capsys):
    """The partition cuts the transcript into consecutive parts, so that it must stand in training order."""
    source = write(tmp_path / "in.jsonl", texts(order=[0, 1, 5, 3, 4, 2]))
    suspect = write(tmp_path / "text.jsonl", texts())
    options = ("--setting", "partition", "--texts", suspect)
    error = refused(capsys, "provenance", source, *MODEL, *options)
    assert "line 4 (training order 3) stands behind one of 5: sort the documents by training order" in error
    sorted_rows = write(tmp_path / "sorted.jsonl", texts(order=range(6)))
    error = refused(capsys, "provenance", sorted_rows, *MODEL, *options, "--buckets", 2)
    assert "buckets must be from 3 to the 6" in error


def test_other_tokens_than_the_base(tmp_path, capsys):
    from loglik.models.load import load

    other = load("tiny", device="cpu")
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.add_tokens(["import os"])
    other.tokenizer.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    source = write(tmp_path / "in.jsonl", texts())
    error = refused(capsys, "ood", source, *MODEL, "--base", tmp_path / "other")
    assert "line 1: the base model cuts it into other tokens" in error


# ---------------------------------------------------------------------- every audit of rows that there is
def audits() -> dict[str, type]:
    """By the name of their class; what is added is tried without being named here."""
    found = {}
    for module in pkgutil.iter_modules(loglik.cli.audits.__path__):
        for name, kind in vars(importlib.import_module(f"loglik.cli.audits.{module.name}")).items():
            if inspect.isclass(kind) and issubclass(kind, RowAudit) and name.startswith("Audit"):
                found[name] = kind
    return found


AUDITS = audits()
REQUIRED = {"data", "model"}


def parsed(kind, source, *options):
    """With a model that does not exist, so that whatever is wrong with the rows must be told before it is loaded."""
    given = [str(source), *map(str, options)]
    for field in dataclasses.fields(kind):
        if field.name not in REQUIRED and field.default is dataclasses.MISSING:
            many = ["1", "2", "3"] if "tuple" in str(field.type) else ["1"]
            given += [f"--{field.name.replace('_', '-')}", *many]
        if field.name == "model":
            given += ["--model", "no-such-folder/model"]
    return tyro.cli(kind, args=given)


def sentence_of(audit):
    with pytest.raises(LoglikError) as stop:
        audit.run()
    text = str(stop.value)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_the_audits_are_found():
    assert {"AuditCalibration", "AuditRecalibrate", "AuditTraps", "AuditOOD", "AuditChoice"} <= {*AUDITS}


@pytest.mark.parametrize("name", AUDITS)
def test_no_rows_damaged_rows_and_closed_folders(tmp_path, name):
    kind = AUDITS[name]
    assert "no-such.jsonl" in sentence_of(parsed(kind, tmp_path / "no-such.jsonl"))
    assert "empty.jsonl" in sentence_of(parsed(kind, write(tmp_path / "empty.jsonl", [])))
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    assert "line 1" in sentence_of(parsed(kind, tmp_path / "bad.jsonl"))
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    for option, file in (("--output", "o.jsonl"), ("--summary", "s.json"), ("--report", "p.html")):
        assert "cannot be written" in sentence_of(parsed(kind, source, option, tmp_path / "missing" / file))


VALUES = [None, "", " ", "a", 0, -1, 0.5, 1.5, 10**400, math.nan, math.inf, True, [], [1], [math.nan], ["a"], [[1]], {}]


@pytest.mark.parametrize("name", AUDITS)
def test_no_column_and_odd_values_in_every_column(tmp_path, name):
    """Every column takes every odd value in turn: a sentence, never another error."""
    kind = AUDITS[name]
    columns = [
        str(field.default)
        for field in dataclasses.fields(kind)
        if field.name.endswith("_field") and isinstance(field.default, str)
    ]
    source = write(tmp_path / "in.jsonl", [{"nothing": 1}] * 3)
    audit = parsed(kind, source)
    assert sentence_of(audit)
    for value in VALUES:
        write(source, [dict.fromkeys(columns, value)] * 3)
        assert sentence_of(audit)
    for column in columns:
        for value in VALUES:
            write(source, [dict.fromkeys(columns, "a b") | {column: value}] * 3)
            assert sentence_of(audit)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_rows_of_later_batches_have_their_own_name(tmp_path, capsys, monkeypatch, size):
    """What a model cannot score is named by its line, whatever the batch is."""
    from loglik.errors import RowError
    from loglik.signals import membership

    before = membership.membership_scores

    def broken(model, batch, *, texts, **more):
        if TEXTS[4] in texts:
            raise RowError("its log-likelihood is nan: leave it out", row=f"row {texts.index(TEXTS[4])}")
        return before(model, batch, texts=texts, **more)

    monkeypatch.setattr(membership, "membership_scores", broken)
    source = write(tmp_path / "in.jsonl", texts())
    error = refused(capsys, "membership", source, *MODEL, "--batch-size", size)
    assert "line 5: its log-likelihood is nan: leave it out" in error
