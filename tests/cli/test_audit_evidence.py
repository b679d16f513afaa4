"""`loglik audit evidence`: choices and exact matches are those of hand-made sums over scored prompts."""

from __future__ import annotations

import json

import pytest
import torch
from audit_runner import run_audit

import loglik
from loglik.cli.audits.evidence import AuditEvidence
from loglik.signals.evidence import normalise_answer, retrieval_log_probs
from loglik.signals.intervals import mean_intervals
from loglik.signals.reading import EvidencePrompts, decode_answers

RECORDS = [
    {
        "question": "What is x?",
        "passages": ["x = 1", "x = 2\ny = 1"],
        "similarity": [0.9, 0.3],
        "candidates": ["1", "2", "The 1."],
        "answer": "1",
    },
    {
        "question": "Which module?",
        "passages": ["import os", "import sys", "import os"],
        "similarity": [0.2, 0.5, 0.3],
        "candidates": ["os", "sys"],
        "answer": ["sys", "the sys"],
    },
    {"question": "What is z?", "passages": ["z = 7"], "similarity": [1.0], "candidates": ["7", "8"], "answer": "8"},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def audited(tmp_path, records, *options):
    source = write(tmp_path / "in.jsonl", records)
    out, summary, page = (tmp_path / name for name in ("out.jsonl", "summary.json", "page.html"))
    run_audit(
        AuditEvidence,
        *(source, "-m", "tiny", "--device", "cpu", "-o", out, "--summary", summary, "--report", page),
        *options,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(summary.read_text()), page.read_text()


def by_hand(model, record, same=normalise_answer):
    """The choice of every score, by loops over passages and candidates."""
    shown = EvidencePrompts()
    q, passages, answers = record["question"], record["passages"], record["candidates"]
    similarity = torch.tensor(record.get("similarity", [1.0] * len(passages)), dtype=torch.float64)
    share = retrieval_log_probs(similarity)

    def value(prompt, text):
        return float(loglik.score(model, [(prompt, " " + text)]).value[0])

    best: dict[str, tuple[float, str]] = {}
    mass: dict[str, list[float]] = {}
    for i, e in enumerate(passages):
        for a in answers:
            direct = value(shown.direct.format(evidence=e, question=q), a)
            question = value(shown.question.format(evidence=e, answer=a), q)
            answer = value(shown.answer.format(evidence=e), a)
            evidence = value(shown.evidence.format(evidence=e), q)
            parts = {"retrieval": float(share[i]), "direct": direct, "question": question, "answer": answer}
            scores = {
                "closed": value(shown.closed.format(question=q), a),
                "direct": direct,
                "channel": question + answer - evidence,
                "product": sum(parts.values()),
            }
            if i == int(share.argmax()):
                scores["top_passage"] = direct
            for name, score in scores.items():
                if name not in best or score > best[name][0] + 1e-9:
                    best[name] = (score, same(a))
            mass.setdefault(same(a), []).append(float(share[i]) + direct)
    found = {name: text for name, (_, text) in best.items()}
    total = {text: float(torch.tensor(parts).logsumexp(0)) for text, parts in mass.items()}
    return found | {"rag": max(total, key=total.__getitem__)}


def test_choices_are_those_of_sums_by_hand(tmp_path, tiny):
    rows, told, page = audited(tmp_path, RECORDS, "--batch-size", 2)
    hits: dict[str, list[float]] = {}
    for row, record in zip(rows, RECORDS, strict=True):
        wanted = by_hand(tiny, record)
        gold = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
        for name, text in wanted.items():
            assert row[f"choice_{name}"] == text, name
            right = text in {normalise_answer(part) for part in gold}
            assert row[f"correct_{name}"] == right
            hits.setdefault(name, []).append(float(right))
    for name, found in hits.items():
        assert told[f"exact_match_{name}"] == pytest.approx(sum(found) / 3)
    order = ["closed", "top_passage", "direct", "rag", "channel", "product"]
    spans = mean_intervals(torch.tensor([hits[name] for name in order], dtype=torch.float64)).interval
    assert told["exact_match_rag_low"] == pytest.approx(float(spans[3, 0]))
    assert page.count("<svg") == 2


def test_weights_prompts_and_answers_as_they_stand(tmp_path, tiny):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"direct": "{evidence}\n# {question}\nprint("}))
    weights = {"direct": 0.5, "closed": 2.0}
    rows, told, _ = audited(
        tmp_path, RECORDS[1:2], "--prompts", prompts, "--weights", "direct=0.5,closed=2", "--verbatim"
    )
    shown = EvidencePrompts(direct="{evidence}\n# {question}\nprint(")
    record = RECORDS[1]
    scores = {
        a: max(
            0.5
            * float(
                loglik.score(tiny, [(shown.direct.format(evidence=e, question=record["question"]), " " + a)]).value[0]
            )
            for e in record["passages"]
        )
        + weights["closed"]
        * float(loglik.score(tiny, [(shown.closed.format(question=record["question"]), " " + a)]).value[0])
        for a in record["candidates"]
    }
    assert rows[0]["choice_product"] == max(scores, key=scores.__getitem__)
    assert "exact_match_rag_low" not in told  # one row has no interval


def test_without_candidates_the_model_answers(tmp_path, tiny):
    records = [{k: v for k, v in record.items() if k != "candidates"} for record in RECORDS]
    rows, _, _ = audited(tmp_path, records, "--max-tokens", 4, "--verbatim")
    decoded = decode_answers(tiny, [r["question"] for r in records], [r["passages"] for r in records], max_tokens=4)
    for row, record, answers in zip(rows, records, decoded, strict=True):
        wanted = by_hand(tiny, record | {"candidates": answers}, same=str.strip)
        assert {name: row[f"choice_{name}"] for name in wanted} == wanted


def test_fitted_weights_are_chosen_on_other_questions(tmp_path):
    rows, told, _ = audited(tmp_path, RECORDS * 2, "--folds", 2)
    assert set(told["fitted_weights"]) == {"retrieval", "direct", "question", "answer"}
    assert all("choice_fitted_product" in row for row in rows)
    assert 0 <= told["exact_match_fitted_product"] <= 1


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"passages": []}, [], "line 1"),
        ({"passages": "x = 1"}, [], "line 1: passages must be a list of texts"),
        ({"similarity": [0.5]}, [], "line 1: similarity has 1 numbers for 2 passages"),
        ({"similarity": [0.5, "a"]}, [], "line 1: similarity must be a list of finite numbers"),
        ({"similarity": [0.0, -1.0]}, [], "line 1"),
        ({"candidates": []}, [], "line 1"),
        ({"candidates": ["the", "1"]}, [], "line 1"),
        ({"answer": ""}, [], "line 1: answer must be a text"),
        ({"question": 3}, [], "line 1: question must be a text"),
        ({}, ["--weights", "direct"], "--weights must look like"),
        ({}, ["--weights", "colour=1"], "colour"),
        ({}, ["--prompts", "none.json"], "none.json cannot be read"),
        ({}, ["--folds", "9"], "folds"),
        ({}, ["--temperature", "0"], "temperature"),
        ({"passages": ["x " * 4000, "y"]}, [], "line 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, change, options, words):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", [RECORDS[0] | change, RECORDS[1]])
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditEvidence, source, "-m", "tiny", "--device", "cpu", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in " ".join(error.split())
    assert "Traceback" not in error


def test_folds_need_right_answers(tmp_path, capsys):
    records = [{k: v for k, v in record.items() if k != "answer"} for record in RECORDS]
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditEvidence, write(tmp_path / "in.jsonl", records), "-m", "tiny", "--folds", 2)
    assert stop.value.code == 2
    assert "--folds fits weights to right answers" in capsys.readouterr().err
