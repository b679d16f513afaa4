"""``loglik audit knowledge``: its numbers are those of the functions; bad input is one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from cli.audit_runner import run_audit
from loglik.cli.audits.knowledge import AuditKnowledge
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.signals.answer_likelihoods import answer_likelihoods, known_probability
from loglik.signals.knows_but_wrong import knowledge_labels, likely_knowledge, shot_prompts
from loglik.signals.probes import component_states, probe_accuracy, probe_transfer
from loglik.signals.scenarios import prompt_tokens

ON = ["-m", "tiny", "--device", "cpu"]
TEMPLATE = "{question}"
STORY = "zq wug"
COLD = ["--temperature", 0.05]
STARTS = [
    "import os\nos.", "for i in", "def __init__(self", "class Point", "if x is not", "return self", "try:\n    x",
    "import sys\nsys.", "while True", "print(", "with open(", "from os import", "x = [", "elif x", "raise Value",
]  # fmt: skip


@pytest.fixture(scope="module")
def records(tiny):
    """Right answers are what the model says, so that they are known; every third is what it never says."""
    good, bad = STARTS, [STORY + start for start in STARTS]
    with torch.no_grad():
        said = [
            [tiny.tokenizer.decode([int(t)]) for t in tiny.next_log_probs(TokenBatch.from_lists(rows)).argmax(1)]
            for rows in (prompt_tokens(tiny, good), prompt_tokens(tiny, bad))
        ]
    made = []
    for i, start in enumerate(STARTS):
        answer = "blicket" if i % 3 == 0 or not said[0][i].strip() else said[0][i].strip()
        made.append({"question": start, "answer": answer, "wrong": "dax" if i % 2 else "toma"})
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_numbers_are_those_of_the_functions(tmp_path, tiny, records, capsys):
    out, summary, page = (tmp_path / n for n in ("out.jsonl", "summary.json", "page.html"))
    source = write(tmp_path / "in.jsonl", records)
    run_audit(
        AuditKnowledge, source, *ON, "--template", TEMPLATE, "--bad-prefix", STORY, "--seed", 3, "-o", out,
        "--summary", summary, "--report", page,
    )  # fmt: skip
    good, bad = [r["question"] for r in records], [STORY + r["question"] for r in records]
    answers = [r["answer"] for r in records]
    want = knowledge_labels(tiny, good, bad, answers, generator=torch.Generator().manual_seed(3))
    rows, told = read(out), json.loads(summary.read_text())
    assert [row["label"] for row in rows] == [str(label) for label in want.labels]
    assert [row["right_of_attempts"] for row in rows] == want.count.tolist()
    assert [row["greedy"] for row in rows] == list(want.greedy)
    assert [row["perturbed"] for row in rows] == list(want.perturbed)
    assert [(row["good_prompt"], row["bad_prompt"]) for row in rows] == list(zip(good, bad, strict=True))
    assert sum(told["labels"].values()) == len(records)
    assert told["labels"] == {kind: [row["label"] for row in rows].count(kind) for kind in told["labels"]}
    assert told["wrong_among_known"] == want.error_rate
    after, under = (answer_likelihoods(tiny, prompts, [f" {a}" for a in answers]) for prompts in (good, bad))
    known, unknown = known_probability(after.tempered, after.greedy)
    assert [row["p_known"] for row in rows] == pytest.approx(known.tolist(), abs=1e-6)
    assert [row["p_unknown"] for row in rows] == pytest.approx(unknown.tolist(), abs=1e-6)
    drop = after.likelihood - under.likelihood
    assert [row["knowledge_drop"] for row in rows] == pytest.approx(drop.value.tolist(), abs=1e-4)
    assert [row["log_p_bad"] for row in rows] == pytest.approx(under.likelihood.value.tolist(), abs=1e-4)
    labels = likely_knowledge(after, under)
    assert [row["likely_label"] for row in rows] == [str(label) for label in labels]
    assert told["expected_known"] == pytest.approx(float(known.sum()))
    text = page.read_text()
    assert text.count("<svg") >= 3
    assert "<script" not in text
    assert "labels" in capsys.readouterr().out
    # The written rows are a data set: they can be audited again.
    run_audit(AuditKnowledge, out, *ON, "--template", TEMPLATE, "--bad-prefix", STORY, "--seed", 3, "--summary", page)
    assert json.loads(page.read_text()) == told


def test_wrong_examples_perturb(tmp_path, records):
    out = tmp_path / "out.jsonl"
    shots = [{"question": f"q{i}", "answer": f"a{i}", "wrong": f"w{i}"} for i in range(4)]
    given = write(tmp_path / "shots.jsonl", shots)
    run_audit(
        AuditKnowledge, write(tmp_path / "in.jsonl", records[:2]), *ON, "--shots", given, "--num-shots", 2,
        "--good-prefix", "Quiz\n", "--labels", "likelihoods", "-o", out,
    )  # fmt: skip
    questions = [r["question"] for r in records[:2]]
    good, bad = (
        shot_prompts(questions, [(s["question"], s[kind]) for s in shots], number=2, prefix="Quiz\n")
        for kind in ("answer", "wrong")
    )
    rows = read(out)
    assert [row["good_prompt"] for row in rows] == list(good)
    assert [row["bad_prompt"] for row in rows] == list(bad)
    assert "label" not in rows[0]
    prefixed = write(tmp_path / "own.jsonl", [r | {"bad_prefix": f"{i}: "} for i, r in enumerate(records[:2])])
    run_audit(
        AuditKnowledge, prefixed, *ON, "--shots", given, "--labels", "samples", "--num-samples", 0, "-o", out,
    )  # fmt: skip
    rows = read(out)
    assert [row["bad_prompt"] for row in rows] == [f"{i}: question: {q}\nanswer:" for i, q in enumerate(questions)]
    assert rows[0]["good_prompt"].count("question:") == 4
    assert "p_known" not in rows[0]


def test_probes_are_those_of_the_functions(tmp_path, tiny, records):
    out, summary, page = (tmp_path / n for n in ("out.jsonl", "summary.json", "page.html"))
    run_audit(
        AuditKnowledge, write(tmp_path / "in.jsonl", records), *ON, *COLD, "--template", TEMPLATE,
        "--bad-prefix", STORY, "--probe", "--seed", 1, "--labels", "samples", "-o", out, "--summary", summary,
        "--report", page,
    )  # fmt: skip
    rows, told = read(out), json.loads(summary.read_text())
    labels = [row["label"] for row in rows]
    assert min(labels.count(kind) for kind in ("HK+", "HK-", "factual")) >= 2
    states = component_states(tiny, TokenBatch.from_lists(prompt_tokens(tiny, [r["bad_prompt"] for r in rows])))
    for classes in (("HK+", "HK-"), ("HK+", "factual"), ("HK+", "HK-", "factual")):
        kept = [i for i, label in enumerate(labels) if label in classes]
        want = [probe_accuracy(layer[kept], [labels[i] for i in kept], seed=1) for layer in states]
        found = told["probe " + " / ".join(classes)]
        assert found["last_layer"] == want[-1].accuracy
        assert found["accuracy"] == max(w.accuracy for w in want)
        assert found["chance"] == 1 / len(classes)
    known = [i for i, label in enumerate(labels) if label in ("HK+", "factual")]
    behind = [
        rows[i]["answer"] if labels[i] == "factual" else rows[i]["perturbed"].strip().split("\n")[0] for i in known
    ]

    def last(texts):
        return component_states(tiny, TokenBatch.from_lists(prompt_tokens(tiny, texts)))[-1]

    n, both = len(rows), list(zip(rows, records, strict=True))
    want = probe_transfer(
        last([f"{rows[i]['bad_prompt']} {a}" for i, a in zip(known, behind, strict=True)]),
        [labels[i] for i in known],
        last([f"{row['bad_prompt']} {each[kind]}" for kind in ("answer", "wrong") for row, each in both]),
        ["factual"] * n + ["HK+"] * n,
        known,
        [*range(n), *range(n)],
        seed=1,
    )
    assert told["probe of a generic set"] == {"specific": want.specific.accuracy, "generic": want.generic.accuracy}
    assert page.read_text().count("<svg") == 3


def test_what_cannot_be_probed_is_said(tmp_path, records):
    out = tmp_path / "s.json"
    never = [r | {"answer": "blicket"} for r in records[:4]]
    run_audit(
        AuditKnowledge, write(tmp_path / "in.jsonl", never), *ON, *COLD, "--template", TEMPLATE, "--bad-prefix", STORY,
        "--probe", "--summary", out,
    )  # fmt: skip
    told = json.loads(out.read_text())
    assert told["wrong_among_known"] == "undefined: no question is known"
    assert told["probe HK+ / HK-"] == "undefined: it needs two questions of each kind"
    assert told["probe of a generic set"] == "undefined: it needs two questions of each kind"


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, [], "the perturbing prompt is missing: give --shots"),
        ({"question": ""}, ["--bad-prefix", "x"], "line 2: question must be a text that is not empty"),
        ({"answer": None}, ["--bad-prefix", "x"], "line 2: answer must be a text or a list of texts"),
        ({"answer": ["a", " "]}, ["--bad-prefix", "x"], "line 2: answer must be a text or a list of texts"),
        ({"answer": []}, ["--bad-prefix", "x"], "line 2: answer must be a text or a list of texts"),
        ({"bad_prefix": "y"}, ["--bad-prefix", "x"], "line 1 has no bad_prefix, and other rows have one"),
        ({}, ["--bad-prefix", "x", "--temperature", 0], "--temperature must be positive"),
        ({}, ["--bad-prefix", "x", "--num-samples", -1], "--num-samples must be at least 0"),
        ({}, ["--bad-prefix", "x", "--max-tokens", 0], "--max-tokens at least 1"),
        ({}, ["--bad-prefix", "x", "--template", "none"], "--template must have {question} in it"),
        ({}, ["--shots", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_bad_input(tmp_path, capsys, records, change, options, sentence):
    rows = [dict(row) for row in records[:3]]
    rows[1] |= change
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditKnowledge, write(tmp_path / "in.jsonl", rows), *ON, *options)
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_bad_examples_and_models(tmp_path, capsys, records):
    source = write(tmp_path / "in.jsonl", records[:3])

    def refused(*options):
        with pytest.raises(SystemExit) as stop:
            run_audit(AuditKnowledge, source, *options)
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    few = write(tmp_path / "few.jsonl", [{"question": "q", "answer": "a", "wrong": "w"}])
    assert "3 examples are to be shown before" in refused(*ON, "--shots", few)
    blank = write(tmp_path / "blank.jsonl", [{"question": "q", "answer": "a"}])
    assert "line 1: wrong must be a text" in refused(*ON, "--shots", blank)
    two = write(tmp_path / "two.jsonl", [r | {"bad_prefix": "y"} for r in records[:3]])
    with pytest.raises(SystemExit):
        run_audit(AuditKnowledge, two, *ON, "--bad-prefix", "x")
    assert "the rows have bad_prefix, and --bad-prefix is another" in " ".join(capsys.readouterr().err.split())
    NGramLM.train(["for i in range(3)", "import os"] * 3, order=3).save_pretrained(tmp_path / "ngram")
    options = ["-m", tmp_path / "ngram", "--bad-prefix", "x"]
    run_audit(AuditKnowledge, source, *options)  # labels need next tokens only
    capsys.readouterr()
    assert "a probe of components needs the blocks" in refused(*options, "--probe")
