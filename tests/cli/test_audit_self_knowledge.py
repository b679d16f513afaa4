"""`loglik audit self-knowledge`: its numbers are those of the functions, and bad input is one sentence."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from audit_runner import run_audit

from loglik.cli.audits.self_knowledge import AuditSelfKnowledge
from loglik.models.ngram import NGramLM
from loglik.signals.calibration import brier_score, expected_calibration_error
from loglik.signals.detection import auroc
from loglik.signals.drawing import first_line, sample_texts
from loglik.signals.metacognition import risk_coverage_curve
from loglik.signals.p_ik import held_out_p_ik, question_states, success_counts
from loglik.signals.p_true import PTrueTemplate, p_true
from loglik.signals.self_knowledge import self_knowledge_curve

QUESTIONS = [f"What does {name} do?" for name in ("print", "len", "range", "import", "return", "class", "for", "def")]
ANSWERS = ["It prints.", "It counts.", "numbers", "nothing", "a value", "x = 1", "loops", "banana"]
CORRECT = [True, True, False, False, True, False, True, False]
CHEAP = ["-m", "tiny", "--device", "cpu", "--bins", 4, "--bootstrap", 20]


@pytest.fixture(autouse=True)
def loaded_once(tiny, monkeypatch):
    """`-m tiny` is read once for all tests."""
    monkeypatch.setattr(sys.modules["loglik.models.load"], "load", lambda name, **options: tiny)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def source(tmp_path, name="in.jsonl", **columns):
    given = {"question": QUESTIONS, "answer": ANSWERS, "correct": CORRECT} | columns
    given = {key: values for key, values in given.items() if values is not None}
    return write(tmp_path / name, [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)])


def run(tmp_path, *arguments):
    paths = [tmp_path / name for name in ("out.jsonl", "summary.json", "page.html")]
    run_audit(AuditSelfKnowledge, *arguments, "-o", paths[0], "--summary", paths[1], "--report", paths[2])
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    return rows, json.loads(paths[1].read_text()), paths[2].read_text()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditSelfKnowledge, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def assert_self_contained(text, plots):
    assert text.count("<svg") == plots
    for known in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org", "https://matplotlib.org"):
        text = text.replace(known, "")
    assert "http" not in text
    assert "<script" not in text


def test_numbers_are_those_of_the_functions(tmp_path, tiny):
    ideas = [["a", "b"], ["yes"], [], ["no", "no"], ["c"], ["d"], ["e"], ["f"]]
    given = source(tmp_path, ideas=ideas)
    rows, told, page = run(tmp_path, given, *CHEAP, "--swapped", "--threshold", 0.45, "--temperature", 2)
    asked = {
        "p_true": p_true(tiny, QUESTIONS, ANSWERS, temperature=2),
        "p_true_with_ideas": p_true(tiny, QUESTIONS, ANSWERS, ideas=ideas, temperature=2),
        "p_true_swapped": p_true(tiny, QUESTIONS, ANSWERS, template=PTrueTemplate().swapped(), temperature=2),
    }
    assert len(rows) == 8
    for name, expected in asked.items():
        values = expected.probability.value.numpy()
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), abs=1e-5)
        assert [row[f"{name}_log_odds"] for row in rows] == pytest.approx(expected.log_odds.value.tolist(), abs=1e-4)
        assert [row[f"{name}_coverage"] for row in rows] == pytest.approx(expected.coverage.value.tolist(), rel=1e-3)
        own = np.array([row[name] for row in rows])
        told_of = told[f"{name}_calibration"]
        assert told_of["brier"] == pytest.approx(brier_score(own, CORRECT))
        assert told_of["ece"] == pytest.approx(expected_calibration_error(own, CORRECT, bins=4))
        assert told_of["aurc"] == pytest.approx(risk_coverage_curve(own, CORRECT).aurc)
        assert told[f"{name}_detection"]["auroc"] == pytest.approx(auroc(own, CORRECT))
        at = self_knowledge_curve(own, CORRECT).at(0.45)
        assert told[f"{name}_trusted"]["accuracy"] == at.accuracy
        assert told[f"{name}_trusted"]["count"] == at.count
    assert told["accuracy"] == 0.5
    change = np.mean([abs(row["p_true"] - row["p_true_swapped"]) for row in rows])
    assert told["mean_change_by_order"] == pytest.approx(change)
    assert {row["kind"] for row in rows} == {"exact"}
    assert_self_contained(page, 7)  # reliability and histogram of each, and one curve


def test_ideas_are_drawn_from_the_model(tmp_path, tiny):
    given = source(tmp_path, correct=None)
    draw = ["--num-samples", 3, "--max-tokens", 4, "--seed", 5, "--prompt", "{question} #"]
    rows, told, page = run(tmp_path, given, *CHEAP, *draw)
    drawn = sample_texts(tiny, [f"{q} #" for q in QUESTIONS], num_samples=3, max_tokens=4, seed=5)
    lines = [[line for line in map(first_line, own) if line] for own in drawn]
    assert [row["ideas"] for row in rows] == lines
    expected = p_true(tiny, QUESTIONS, ANSWERS, ideas=lines).probability.value.tolist()
    assert [row["p_true_with_ideas"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert "accuracy" not in told
    assert "<svg" not in page


def test_demonstrations_stand_before_every_prompt(tmp_path, tiny):
    solved = source(tmp_path, "solved.jsonl")
    given = source(tmp_path, correct=None)
    rows, _, _ = run(tmp_path, given, *CHEAP, "--demonstrations", solved)
    shown = list(zip(QUESTIONS, ANSWERS, CORRECT, strict=True))
    expected = p_true(tiny, QUESTIONS, ANSWERS, demonstrations=shown).log_odds.value.tolist()
    assert [row["p_true_log_odds"] for row in rows] == pytest.approx(expected, abs=1e-4)


def test_the_probe_is_judged_on_questions_it_has_not_seen(tmp_path, tiny):
    random = np.random.default_rng(0)
    questions = [q for q in QUESTIONS for _ in range(3)]
    answers = [f"answer {i}" for i in range(24)]
    correct = (random.random(24) < 0.5).tolist()
    order = random.permutation(24)
    given = source(
        tmp_path,
        question=[questions[i] for i in order],
        answer=[answers[i] for i in order],
        correct=[correct[i] for i in order],
    )
    rows, told, page = run(tmp_path, given, *CHEAP, "--probe", "--probe-share", 0.6, "--probe-c", 0.1, "--seed", 2)
    names = list(dict.fromkeys(row["question"] for row in rows))
    number = [names.index(row["question"]) for row in rows]
    successes, trials = success_counts([row["correct"] for row in rows], number)
    assert trials.tolist() == [3] * 8
    found = held_out_p_ik(question_states(tiny, names), successes, trials, share=0.6, c=0.1, seed=2)
    assert [row["p_ik"] for row in rows] == pytest.approx([found.p_ik[n] for n in number], abs=1e-3)
    assert [row["probe_saw_question"] for row in rows] == [bool(found.trained[n]) for n in number]
    unseen = [row for row in rows if not row["probe_saw_question"]]
    known, right = np.array([r["p_ik"] for r in unseen]), np.array([r["correct"] for r in unseen])
    assert (told["p_ik_questions_fitted"], told["p_ik_questions_held_out"]) == (5, 3)
    assert told["p_ik_calibration"]["brier"] == pytest.approx(brier_score(known, right))
    assert told["p_ik_calibration"]["rows"] == len(unseen) == 9
    assert told["p_ik_detection"]["auroc"] == pytest.approx(auroc(known, right))
    assert told["p_ik_brier_of_the_base_rate"] == pytest.approx(found.base_brier())
    assert_self_contained(page, 5)


def test_one_class_is_said(tmp_path):
    rows, told, _ = run(tmp_path, source(tmp_path, correct=[True] * 8), *CHEAP)
    assert told["auroc"] == "undefined: all answers are right"
    assert "p_true_detection" not in told
    assert told["p_true_calibration"]["accuracy"] == 1.0
    assert all(np.isfinite(row["p_true"]) for row in rows)


def test_bad_rows_are_refused_with_a_sentence(tmp_path, capsys):
    def sentence(**columns):
        return refused(capsys, source(tmp_path, **columns), *CHEAP)

    assert "line 2: question must be a text that is not empty, got ' '" in sentence(question=["a", " ", *QUESTIONS[2:]])
    assert "line 1: answer must be a text that is not empty, got nothing" in sentence(answer=None)
    assert "line 3: correct must be true or false, got 'yes'" in sentence(correct=[True, False, "yes", *CORRECT[3:]])
    assert "line 4: correct must be true or false, got nan" in sentence(
        correct=[*CORRECT[:3], float("nan"), *CORRECT[4:]]
    )
    assert "line 2 has no correct, and other rows have one" in sentence(correct=[True, None, *CORRECT[2:]])
    assert "line 1: ideas must be a list of texts, got 'a'" in sentence(ideas=["a"] * 8)
    assert "line 5: needs a question and an answer that are not empty, and a list of ideas" in sentence(
        ideas=[["a"]] * 4 + [[""]] * 4
    )
    assert "line 7: " in sentence(question=[*QUESTIONS[:6], "zq " * 2000, "a"])
    assert "has no rows" in refused(capsys, write(tmp_path / "empty.jsonl", []), *CHEAP)


def test_bad_options_are_refused_with_a_sentence(tmp_path, capsys, monkeypatch):
    given = source(tmp_path)
    cases = [
        (["--bins", 9], "8 rows are fewer than --bins 9"),
        (["--bins", 0], "--bins and --bootstrap must be at least 1"),
        (["--threshold", 1.5], r"--threshold must lie in [0, 1], got 1.5"),
        (["--temperature", 0], "temperature must be positive and finite, got 0"),
        (["--num-samples", -1], "--num-samples must be at least 0"),
        (["--prompt", "Q:"], "--prompt must have {question} in it, got 'Q:'"),
        (["--probe", "--probe-share", 1], "share must lie between 0 and 1"),
        (["--probe", "--probe-c", 0], "c must be positive"),
        (["--probe", "--bins", 7], "the questions that the probe has not seen have 4 rows, fewer than --bins 7"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
        (["--demonstrations", tmp_path / "nowhere.jsonl"], "nowhere.jsonl"),
    ]
    for options, sentence in cases:
        assert sentence in refused(capsys, given, *CHEAP, *options), options
    with_ideas = source(tmp_path, "ideas.jsonl", ideas=[["a"]] * 8)
    assert "--num-samples would draw others: leave one" in refused(capsys, with_ideas, *CHEAP, "--num-samples", 2)
    unknown = source(tmp_path, "unknown.jsonl", correct=None)
    assert "--probe needs to know which answers are right" in refused(capsys, unknown, *CHEAP, "--probe")
    one = source(tmp_path, "one.jsonl", question=["a"] * 8)
    assert "--probe needs at least two questions" in refused(capsys, one, *CHEAP, "--probe")
    right = source(tmp_path, "right.jsonl", correct=[True] * 8)
    assert "every sample is right, so that there is nothing to learn" in refused(capsys, right, *CHEAP, "--probe")

    grams = NGramLM.train(["a (A) (B)"], order=1)
    monkeypatch.setattr(AuditSelfKnowledge, "load", lambda self: grams)
    assert "P(IK) needs hidden states" in refused(capsys, given, *CHEAP, "--probe")

    class Mute:
        """Scores, and can neither be sampled nor continued."""

        def __init__(self, inner):
            self.tokenizer, self.layout, self.max_length = inner.tokenizer, inner.layout, None

    monkeypatch.setattr(AuditSelfKnowledge, "load", lambda self: Mute(grams))
    assert "sampling without a sampler needs per-token conditionals" in refused(
        capsys, given, *CHEAP, "--num-samples", 2
    )
