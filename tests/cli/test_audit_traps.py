"""`audit make-traps` and `audit traps`: what is drawn is published by lot, and found again in a model trained on it."""

from __future__ import annotations

import json

import pytest
import torch
import tyro

from loglik.cli.audits.make_traps import AuditMakeTraps
from loglik.cli.audits.traps import AuditTraps
from loglik.errors import LoglikError
from loglik.signals.detection import auroc
from loglik.signals.membership import loss_score, reference_score
from loglik.signals.texts import text_log_probs
from loglik.signals.traps import trap_test


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_audit(audit, *arguments):
    tyro.cli(audit, args=[str(part) for part in arguments]).run()


def refused(capsys, audit, *arguments):
    """The one sentence that the command line prints of such an error."""
    with pytest.raises(LoglikError) as stop:
        run_audit(audit, *arguments)
    return str(stop.value)


SMALL = ["--length", 8, "--edges", 20, 200, 4000, "--per-range", 4, "--repetitions", 0, 2, "--batch-size", 32]
SMALL += ["--max-similarity", 0.9, "--device", "cpu", "-m", "tiny"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    documents = [{"text": f"document {i} " + "with many a word in it " * 5, "name": i} for i in range(6)]
    paths = {name: folder / name for name in ("traps.jsonl", "out.jsonl", "summary.json", "page.html")}
    source = write(folder / "documents.jsonl", documents)
    run_audit(
        AuditMakeTraps,
        *SMALL,
        "-o",
        paths["traps.jsonl"],
        "--documents",
        source,
        "--injected",
        paths["out.jsonl"],
        "--summary",
        paths["summary.json"],
        "--report",
        paths["page.html"],
    )
    return paths, documents


def test_traps_have_the_perplexity_and_length_that_they_say(made, tiny):
    paths, _ = made
    traps, told = read(paths["traps.jsonl"]), json.loads(paths["summary.json"].read_text())
    assert len(traps) == 8 == told["traps"]
    found = text_log_probs(tiny, [trap["text"] for trap in traps])
    assert found.num_units.tolist() == [8] * 8  # the text has the tokens that were drawn
    assert found.perplexity().value.tolist() == pytest.approx([trap["perplexity"] for trap in traps], rel=1e-3)
    for trap in traps:
        assert trap["perplexity_from"] < trap["perplexity"] <= trap["perplexity_to"]
    assert [trap["id"] for trap in traps] == [f"trap {i}" for i in range(8)]
    assert (told["repeated_0"], told["repeated_2"]) == (4, 4)
    for low in (20.0, 200.0):  # the lot is drawn within each range
        assert sorted(t["repetitions"] for t in traps if t["perplexity_from"] == low) == [0, 0, 2, 2]
    assert "<svg" in paths["page.html"].read_text()


def test_each_used_trap_stands_in_one_document_as_often_as_planned(made):
    paths, documents = made
    traps, out = read(paths["traps.jsonl"]), read(paths["out.jsonl"])
    by_id = {trap["id"]: trap for trap in traps}
    used = [row for row in out if row["trap"] is not None]
    assert len(used) == 4
    for row, document in zip(out, documents, strict=True):
        assert row["name"] == document["name"]
        if row["trap"] is None:
            assert row["text"] == document["text"]
            continue
        trap = by_id[row["trap"]]
        assert len(row["trap_starts"]) == trap["repetitions"] == 2
        text = row["text"]
        for start in reversed(row["trap_starts"]):
            assert text[start : start + len(trap["text"])] == trap["text"]
            text = text[:start] + text[start + len(trap["text"]) + 1 :]
        assert text == document["text"]
        assert trap["document"] == f"line {document['name'] + 1}"
    for trap in traps:
        assert (trap["document"] is None) == (trap["repetitions"] == 0)
        assert sum(trap["text"] in row["text"] for row in out) == (trap["repetitions"] > 0)


def test_seed_decides(tmp_path):
    small = [*SMALL, "--per-range", 2]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_audit(AuditMakeTraps, *small, "--seed", seed, "-o", tmp_path / f"{name}.jsonl")
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repetitions", 1, 2], "--repetitions must be different, not negative, and 0 one of several"),
        (["--per-range", 5], "--per-range 5 cannot be divided among 2 numbers of repetitions: use a multiple of 2"),
        (["--edges", 5], "edges must be two or more rising perplexities"),
        (["--edges", 5, 2], "edges must be two or more rising perplexities"),
        (["--length", 0], "length must be a whole number, at least 1"),
        (["--temperatures", 0], "temperatures must be positive"),
        (["--max-draws", 64, "--edges", 1, 1.0001], "allow more draws"),
        (["--documents", "x.jsonl"], "--documents and --injected go together"),
        (["--documents", "nowhere.jsonl", "--injected", "x.jsonl"], "nowhere.jsonl does not exist"),
        (["-m", "nowhere/nothing"], "nowhere/nothing"),
        (["-o", "missing-folder/traps.jsonl"], "there is no folder missing-folder"),
        (["-o", "traps.txt"], "use .jsonl or .parquet"),
    ],
)
def test_bad_options(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, AuditMakeTraps, *SMALL, "-o", tmp_path / "out.jsonl", *arguments)


def test_too_few_or_too_short_documents(tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", [{"text": "a b c d"}])
    options = [*SMALL, "--per-range", 2, "-o", tmp_path / "t.jsonl", "--injected", tmp_path / "o.jsonl", "--documents"]
    assert "2 traps are to be used and there are 1 documents" in refused(capsys, AuditMakeTraps, *options, few)
    short = write(tmp_path / "short.jsonl", [{"text": "a b c d"}, {"text": "ab"}])
    assert "line 2 of" in (error := refused(capsys, AuditMakeTraps, *options, short))
    assert "times must be from 1 to the 0 spaces" in error
    assert "--output is missing" in refused(capsys, AuditMakeTraps, *SMALL)


# ---------------------------------------------------------------------- testing
WORDS = ["zig zag", "wug dax", "blick toma", "fep lorp", "import os", "def f(x):", "return 1", "x = y", "a + b", "pass"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny):
    """A model that saw the first five, the last of them most, and the one before."""
    import copy

    folder = tmp_path_factory.mktemp("models")
    tiny.model.save_pretrained(folder / "before")
    tiny.tokenizer.save_pretrained(folder / "before")
    model = copy.deepcopy(tiny.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = [tiny.tokenizer.encode(text, return_tensors="pt") for text in WORDS]
    for _ in range(3):
        for number in (0, 1, 2, 3, 4, 3, 4):
            model(ids[number], labels=ids[number]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder / "after")
    tiny.tokenizer.save_pretrained(folder / "after")
    return folder


TIMES = [1, 1, 1, 2, 2, 0, 0, 0, 0, 0]


def test_traps_gives_the_functions_numbers(tmp_path, models):
    import loglik

    source = write(tmp_path / "in.jsonl", [{"text": t, "repetitions": n} for t, n in zip(WORDS, TIMES, strict=True)])
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    options = ["-o", out, "--summary", summary, "--report", page, "--device", "cpu", "--batch-size", 3]
    run_audit(AuditTraps, source, "-m", models / "after", "--reference", models / "before", *options)
    rows, told = read(out), json.loads(summary.read_text())
    own, other = (text_log_probs(loglik.load(models / name, device="cpu"), WORDS) for name in ("after", "before"))
    ratio = reference_score(own, other).value
    assert [row["ratio"] for row in rows] == pytest.approx(ratio.tolist(), abs=1e-4)
    assert [row["reference_loss"] for row in rows] == pytest.approx(loss_score(other).value.tolist(), abs=1e-4)
    scores = torch.tensor([row["ratio"] for row in rows], dtype=torch.float64)
    used = torch.tensor(TIMES) > 0
    test = trap_test(scores[used], scores[~used])
    assert told["score"] == "ratio"
    assert told["p_value"] == told["ratio"]["p_value"] == test.p_value
    assert [row["p_value"] for row in rows] == [*test.p_values.tolist(), *[None] * 5]
    for name in ("loss", "min_k", "ratio", "reference_loss"):
        values = [row[name] for row in rows]
        assert told[name]["auroc"] == pytest.approx(auroc(values, used))
        assert told[name]["auroc_low"] <= told[name]["auroc"] <= told[name]["auroc_high"]
        for times in (1, 2):
            kept = [i for i, n in enumerate(TIMES) if n in (0, times)]
            wanted = auroc([values[i] for i in kept], [TIMES[i] > 0 for i in kept])
            assert told["auroc_by_repetitions"][name][str(times)] == pytest.approx(wanted)
    assert told["ratio"]["auroc"] > 0.8  # it was trained on them
    assert page.read_text().count("<svg") == 3


def test_without_a_reference_the_loss_decides_and_contexts_are_read(tmp_path, models):
    records = [{"text": t, "repetitions": n, "context": "import os\n"} for t, n in zip(WORDS, TIMES, strict=True)]
    summary, out = tmp_path / "summary.json", tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", records)
    run_audit(AuditTraps, source, "-m", "tiny", "--device", "cpu", "--summary", summary, "-o", out)
    told = json.loads(summary.read_text())
    assert told["score"] == "loss"
    assert told["reference"] is None
    assert "ratio" not in told
    import loglik

    pairs = loglik.score(loglik.load("tiny", device="cpu"), [("import os\n", text) for text in WORDS])
    assert [row["loss"] for row in read(out)] == pytest.approx(pairs.mean_per_unit().value.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"text": "a", "repetitions": 1}] * 3, "one class only, and all 3 traps are published"),
        ([{"text": "a", "repetitions": 0}] * 3, "one class only, and all 3 traps are unused"),
        ([{"text": "a", "repetitions": -1}], "line 1: repetitions must not be negative"),
        ([{"text": "a", "repetitions": 1.5}], "line 1: repetitions must be a whole number, got 1.5"),
        ([{"text": "a", "repetitions": True}], "line 1: repetitions must be a finite number"),
        ([{"text": "a"}], "line 1: repetitions must be a finite number, got nothing"),
        ([{"repetitions": 1}], "line 1: text must be a text"),
        ([{"text": "a b", "repetitions": 1}, {"text": "x = 1\n" * 999, "repetitions": 0}], "line 2: has 3,997 tokens"),
        (
            [{"text": "a", "repetitions": 1, "context": "b"}, {"text": "a", "repetitions": 0}],
            "line 2 has no context, and other rows have one",
        ),
    ],
)
def test_bad_traps(tmp_path, capsys, records, sentence):
    error = refused(capsys, AuditTraps, write(tmp_path / "in.jsonl", records), "-m", "tiny", "--device", "cpu")
    assert sentence in error


def test_missing_reference(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"text": "a b", "repetitions": n} for n in (0, 1)])
    error = refused(capsys, AuditTraps, source, "-m", "tiny", "--device", "cpu", "--reference", tmp_path / "nowhere")
    assert "nowhere" in error
