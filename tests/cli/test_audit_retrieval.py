"""`loglik audit retrieval`: the numbers of the functions, the plots, and one sentence for bad input."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from audit_runner import run_audit

import loglik
from loglik.cli.audits.retrieval import AuditRetrieval
from loglik.signals.retrieval import (
    backtracing_distance,
    backtracing_scores,
    bidirectional_score,
    query_likelihood,
    retrieval_metrics,
    unigram_likelihood,
)

RECORDS = [
    {"query": "print(total)", "candidates": ["total = sum(x)", "import os", "while True:"], "relevant": 0},
    {"query": "os.getcwd()", "candidates": ["name = 3", "import os"], "relevant": [1]},
    {"query": "return a + b", "candidates": ["def f(a, b):", "import re", "x = {}", "a = b"], "relevant": [0, 3]},
]
DOCUMENT = ["import os", "path = os.getcwd()", "x = [1, 2, 3]", "for i in x:"]
TRACED = [
    {"query": "print(path)", "candidates": DOCUMENT, "relevant": 1},
    {"query": "    print(i)", "candidates": DOCUMENT, "relevant": [2, 3]},
    {"query": "y = 2", "candidates": ["y = 1", "z = 0"], "relevant": 0},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def audited(tmp_path, records, *options):
    source = write(tmp_path / "in.jsonl", records)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    arguments = [source, "-m", "tiny", "--device", "cpu", "-o", out, "--summary", summary, "--report", page, *options]
    run_audit(AuditRetrieval, *arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(summary.read_text()), page.read_text()


def self_contained(page: str) -> bool:
    for known in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org", "https://matplotlib.org"):
        page = page.replace(known, "")
    return "http" not in page and "<script" not in page


def masks(records):
    found = []
    for record in records:
        mask = torch.zeros(len(record["candidates"]), dtype=torch.bool)
        mask[record["relevant"]] = True
        found.append(mask)
    return found


def test_ranks_are_those_of_the_functions(tmp_path, tiny):
    options = ["--alpha", 0.5, "--weight", 0.25, "--k", 1, 2, "--batch-size", 2]
    labels = ["--query-label", "# ", "--candidate-label", "> "]
    rows, told, page = audited(tmp_path, RECORDS, *options, *labels)
    counts = {}
    for text in dict.fromkeys(t for r in RECORDS for t in r["candidates"]):
        for word in "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split():
            counts[word] = counts.get(word, 0) + 1
    expected = {"words": [], "query": [], "candidate": [], "candidate_prior": [], "bidirectional": []}
    for record in RECORDS:
        q, texts = record["query"], record["candidates"]
        given = loglik.score(tiny, [(f"# {q}\n> ", c) for c in texts])
        back = loglik.score(tiny, [(f"> {c}\n# ", q) for c in texts])
        prior = loglik.score(tiny, [("\n> ", c) for c in texts])
        expected["query"].append(back.mean_per_unit().value)
        expected["candidate"].append(given.mean_per_unit().value)
        expected["candidate_prior"].append(given.mean_per_unit().value - 0.5 * prior.mean_per_unit().value)
        both = bidirectional_score(given, back, prior=prior, alpha=0.5, weight=0.25)
        expected["bidirectional"].append(both.value)
        split = ["".join(c if c.isalnum() or c == "_" else " " for c in t.lower()).split() for t in (q, *texts)]
        expected["words"].append(unigram_likelihood(split[0], split[1:], counts).value)
    for name, wanted in expected.items():
        for row, values in zip(rows, wanted, strict=True):
            assert row[f"scores_{name}"] == pytest.approx(values.tolist(), abs=1e-4)
            assert row[f"best_{name}"] == int(values.argmax())
        found = retrieval_metrics(wanted, masks(RECORDS), k=(1, 2))
        assert told[name]["mrr"] == pytest.approx(found.mrr)
        assert told[name]["accuracy_at_2"] == pytest.approx(found.accuracy[2])
        assert told[name]["recall_at_2"] == pytest.approx(found.recall[2].mean().item())
        assert told[name]["ndcg_at_1"] == pytest.approx(found.ndcg[1].mean().item())
        assert [row[f"rank_{name}"] for row in rows] == pytest.approx(found.rank.tolist())
        assert told[name]["mrr_low"] <= told[name]["mrr"] <= told[name]["mrr_high"]
        assert told["kinds"][name] == "exact"
        if name != "words":
            assert told[name]["mrr_gain"] == pytest.approx(told[name]["mrr"] - told["words"]["mrr"])
    assert rows[2]["relevant"] == [0, 3]
    assert page.count("<svg") == 4
    assert self_contained(page)


def test_batches_and_the_sum(tmp_path, tiny):
    rows, _, _ = audited(tmp_path, RECORDS, "--batch-size", 1, "--normalise", "sum", "--premise", "#")
    again, _, _ = audited(tmp_path, RECORDS, "--batch-size", 8, "--normalise", "sum", "--premise", "#")
    for row, other, record in zip(rows, again, RECORDS, strict=True):
        assert row["scores_bidirectional"] == pytest.approx(other["scores_bidirectional"], abs=1e-4)
        assert row["scores_words"] == other["scores_words"]  # the collection is that of all rows
        prior = loglik.score(tiny, [("#", c) for c in record["candidates"]]).value
        difference = torch.tensor(row["scores_candidate"]) - torch.tensor(row["scores_candidate_prior"])
        torch.testing.assert_close(difference, prior.float(), atol=1e-3, rtol=0)


def test_backtracing_is_that_of_the_functions(tmp_path, tiny):
    rows, told, page = audited(tmp_path, TRACED, "--backtrace", "--k", 1, "--joiner", "\n")
    for how in ("single", "autoregressive", "leave_one_out"):
        wanted = [
            backtracing_scores(partial(query_likelihood, tiny, r["query"]), r["candidates"], how=how, joiner="\n").value
            for r in TRACED
        ]
        for row, values in zip(rows, wanted, strict=True):
            assert row[f"scores_{how}"] == pytest.approx(values.tolist(), abs=1e-4)
        found = retrieval_metrics(wanted, masks(TRACED), k=(1,))
        assert told[how]["mrr"] == pytest.approx(found.mrr)
        distance = backtracing_distance(wanted, masks(TRACED), k=(1,))[1].mean().item()
        assert told[how]["distance_at_1"] == pytest.approx(distance)
    assert page.count("<svg") == 6  # two heat maps of the first document, three bars, the agreement
    assert "print(path)" in page
    assert self_contained(page)


def test_without_targets_the_scores_are_compared_with_each_other(tmp_path):
    bare = [{k: v for k, v in record.items() if k != "relevant"} for record in RECORDS]
    rows, told, page = audited(tmp_path, bare)
    assert set(told) == {"rows", "model", "kinds"}
    assert "rank_query" not in rows[0]
    assert page.count("<svg") == 1


def test_one_query_has_no_interval(tmp_path):
    _, told, _ = audited(tmp_path, RECORDS[:1])
    assert "mrr_low" not in told["query"]
    assert 0 < told["query"]["mrr"] <= 1


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"candidates": []}, [], "line 2: candidates must have at least two texts to rank, got 0"),
        ({"candidates": ["one"]}, [], "line 2: candidates must have at least two texts to rank, got 1"),
        ({"candidates": "one"}, [], "line 2: candidates must be a list of texts, got 'one'"),
        ({"candidates": ["a", 3]}, [], "line 2: candidates must be a list of texts"),
        ({"candidates": ["a", " "]}, [], "line 2: candidate 1 must be a text that is not empty, got ' '"),
        ({"candidates": None}, [], "line 2: candidates must be a list of texts, got nothing"),
        ({"query": None}, [], "line 2: query must be a text that is not empty, got nothing"),
        ({"query": " "}, [], "line 2: query must be a text that is not empty, got ' '"),
        ({"relevant": 2}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": -1}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": []}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": 0.5}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": float("nan")}, [], "line 2: relevant must be a candidate's number from 0 to 1"),
        ({"relevant": "first"}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": True}, [], "line 2: relevant must be a candidate's number from 0 to 1, or a list"),
        ({"relevant": None}, [], "line 2 has no relevant, and other rows have one"),
        ({}, ["--k", 0], "--k must be whole numbers of at least 1, got [0]"),
        ({}, ["--weight", 2], "weight must lie in [0, 1], got 2.0"),
        ({}, ["--alpha", "nan"], "alpha must be a finite number, got nan"),
        ({}, ["--bootstrap", 0], "resamples must be at least 1, got 0"),
        ({}, ["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        ({"query": "word " * 2000}, [], "line 2, candidate 0"),
        ({"query": "word " * 2000}, ["--backtrace"], "line 2"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, change, options, sentence):
    records = [RECORDS[0], RECORDS[1] | change]
    source = write(tmp_path / "in.jsonl", records)
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditRetrieval, source, "-m", "tiny", "--device", "cpu", *options)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert "Traceback" not in error
