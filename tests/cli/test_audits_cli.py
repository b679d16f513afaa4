"""The audits of the command line: their numbers are those of the functions, and bad input is one sentence."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import loglik
from loglik.cli import main
from loglik.signals.calibration import brier_score, expected_calibration_error
from loglik.signals.detection import auroc
from loglik.signals.membership import membership_scores
from loglik.signals.metacognition import calibration_report, risk_coverage_curve
from loglik.signals.ood import likelihood_regret, ood_threshold, typicality
from loglik.signals.provenance import partition_counts, partition_test, reshuffle_test
from loglik.signals.texts import text_rows, text_tokens

TEXTS = [
    "import os\nimport sys\n",
    "for i in range(10):\n    print(i)\n",
    "zq qz xx yy zz\n",
    "def add(a, b):\n    return a + b\n",
    "wug blicket dax\n",
    "class Point:\n    pass\n",
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object) -> None:
    main(["audit", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def outputs(tmp_path):
    found = [tmp_path / name for name in ("out.jsonl", "summary.json", "page.html")]
    return found, ["-o", found[0], "--summary", found[1], "--report", found[2]]


# ---------------------------------------------------------------------- calibration
def test_calibration_gives_the_functions_numbers(tmp_path, capsys):
    random = np.random.default_rng(0)
    confidence = random.uniform(0.01, 0.99, 200)
    correct = random.uniform(size=200) < confidence**2
    source = write(
        tmp_path / "in.jsonl",
        [{"confidence": float(c), "correct": bool(y)} for c, y in zip(confidence, correct, strict=True)],
    )
    (out, summary, page), options = outputs(tmp_path)
    run("calibration", source, *options, "--bins", 10, "--bootstrap", 50)
    told = json.loads(summary.read_text())
    report = calibration_report(confidence, correct, bins=10, bootstrap=50).record()
    assert {"ece_low", "ece_high", "brier_low", "aurc_high", "accuracy_low", "wrong_at_0.9_high"} <= {*told}
    for name in {*told} & {*report} - {"wrong_at_0.9"}:
        assert told[name] == pytest.approx(report[name])
    assert told["ece"] == pytest.approx(expected_calibration_error(confidence, correct, bins=10))
    assert told["brier"] == pytest.approx(brier_score(confidence, correct))
    assert told["aurc"] == pytest.approx(risk_coverage_curve(confidence, correct).aurc)
    parts = told["reliability"] - told["resolution"] + told["uncertainty"]
    assert parts == pytest.approx(told["brier"], abs=0.01)  # bins of width 0.1
    assert len(read(out)) == 200
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert "ece" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"confidence": 1.2, "correct": True}] * 20, "1.2"),
        ([{"confidence": "high", "correct": True}], "line 1: confidence must be a finite number"),
        ([{"confidence": 0.5, "correct": "yes"}], "line 1: correct must be true or false"),
        ([{"correct": True}], "line 1: confidence must be a finite number, got nothing"),
        ([{"confidence": 0.5, "correct": True}] * 3, "bins"),
        ([], "has no rows"),
    ],
)
def test_bad_calibration_input(tmp_path, capsys, records, sentence):
    assert sentence in refused(capsys, "calibration", write(tmp_path / "in.jsonl", records))


def test_damaged_rows_stop_or_are_left_out(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    good = "".join(json.dumps({"confidence": 0.5, "correct": i % 2 == 0}) + "\n" for i in range(20))
    source.write_text("{broken\n" + good)
    assert "line 1 of" in refused(capsys, "calibration", source, "--bins", 2)
    run("calibration", source, "--bins", 2, "--on-error", "skip")
    assert "left out: line 1" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------- membership, distribution, provenance
def test_membership_gives_the_functions_numbers(tmp_path, tiny):
    members = [True, True, False, True, False, True]
    source = write(tmp_path / "in.jsonl", [{"text": t, "member": m} for t, m in zip(TEXTS, members, strict=True)])
    (out, summary, page), options = outputs(tmp_path)
    run("membership", source, "-m", "tiny", "--device", "cpu", "--batch-size", 4, *options)
    rows, told = read(out), json.loads(summary.read_text())
    means = loglik.score(tiny, TEXTS).mean_per_unit().value
    assert [row["loss"] for row in rows] == pytest.approx(means.tolist(), abs=1e-4)
    alone = membership_scores(tiny, loglik.TokenBatch.from_lists([[0, 5, 9, 12]]), k=0.5)  # the function itself runs
    assert {*alone} == {"loss", "min_k", "min_k_plus_plus"}
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        assert told[name]["auroc"] == pytest.approx(auroc([row[name] for row in rows], members))
    assert page.read_text().count("<svg") == 3  # ROC, AUROC, the best score


def test_ood_compares_with_the_base(tmp_path, tiny):
    base = tmp_path / "base"
    other = loglik.load("tiny", device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    other.model.save_pretrained(base)
    other.tokenizer.save_pretrained(base)
    source = write(tmp_path / "in.jsonl", [{"text": t, "ood": i in (2, 4)} for i, t in enumerate(TEXTS)])
    (out, summary, _), options = outputs(tmp_path)
    run("ood", source, "-m", "tiny", "--base", base, "--device", "cpu", "--normalise", "token", *options)
    own, reference = (loglik.score(m, TEXTS).mean_per_unit().value for m in (tiny, loglik.load(base, device="cpu")))
    ratio = next(name for name in read(out)[0] if "ratio" in name)
    assert [row[ratio] for row in read(out)] == pytest.approx((reference - own).tolist(), abs=1e-4)
    assert 0 <= json.loads(summary.read_text())[ratio]["auroc"] <= 1


def test_provenance_finds_an_order_that_the_likelihoods_have(tmp_path, tiny):
    """Rows sorted by their likelihood per token: the correlation is 1 and the p-value 1 / 6!."""
    means = loglik.score(tiny, TEXTS).mean_per_unit().value
    ranks = means.argsort().argsort().tolist()
    source = write(tmp_path / "in.jsonl", [{"text": t, "order": r} for t, r in zip(TEXTS, ranks, strict=True)])
    (_, summary, page), options = outputs(tmp_path)
    run("provenance", source, "-m", "tiny", "--device", "cpu", *options)
    told = json.loads(summary.read_text())
    assert told["rank_correlation"] == pytest.approx(1.0)
    assert told["p_value"] == pytest.approx(1 / math.factorial(6))
    assert "<svg" in page.read_text()


def test_more_scores_on_demand(tmp_path, tiny):
    """Lower case, typicality with a threshold, and regret are those of the functions."""
    members = [True, True, False, True, False, True]
    source = write(
        tmp_path / "in.jsonl", [{"text": t, "member": m, "ood": m} for t, m in zip(TEXTS, members, strict=True)]
    )
    (out, summary, page), options = outputs(tmp_path)
    run("membership", source, "-m", "tiny", "--device", "cpu", "--lowercase", "--k", 0.5, *options)
    rows = text_rows(tiny, TEXTS)
    wanted = membership_scores(tiny, rows, texts=TEXTS, lowered=text_rows(tiny, [t.lower() for t in TEXTS]), k=0.5)
    for name, score in wanted.items():
        assert [row[name] for row in read(out)] == pytest.approx(score.value.tolist(), abs=1e-4)
    inside = [f"value_{i} = {i}\n" for i in range(19)]
    held = write(tmp_path / "held.jsonl", [{"text": text} for text in inside])
    more = ["--base", "tiny", "--held-out", held, "--regret-steps", 1, "--bootstrap", 50, "--normalise", "token"]
    run("ood", source, "-m", "tiny", "--device", "cpu", *more, *options)
    told, found = json.loads(summary.read_text()), read(out)
    usual = tiny.log_prob(text_rows(tiny, inside))
    own = tiny.log_prob(rows)
    assert [row["typicality"] for row in found] == pytest.approx(typicality(own, usual).value.tolist(), abs=1e-4)
    regret = likelihood_regret(tiny, rows, steps=1, normalise="token").value
    assert [row["likelihood_regret"] for row in found] == pytest.approx(regret.tolist(), abs=1e-4)
    assert [row["likelihood_ratio"] for row in found] == pytest.approx([0.0] * 6, abs=1e-4)
    limit = ood_threshold(typicality(usual, usual).value, rate=0.05)
    assert told["threshold_typicality"] == pytest.approx(limit, abs=1e-4)
    assert [row["typicality_is_out"] for row in found] == [
        row["typicality"] > told["threshold_typicality"] for row in found
    ]
    for name in ("likelihood", "perplexity", "typicality", "likelihood_regret"):
        area = auroc([row[name] for row in found], members)
        assert told[name]["auroc"] == pytest.approx(area)
        assert told[name]["auroc_low"] <= area <= told[name]["auroc_high"]
        assert {"auprc", "fpr_at_0.95"} <= {*told[name]}
    assert page.read_text().count("<svg") == 3


def test_provenance_of_a_text_by_its_n_grams(tmp_path, tiny):
    """The text is made of the late half of the transcript."""
    letters = "abcdefghijklmnop"
    transcript = [f"{a} = {b} + {i}" for i, (a, b) in enumerate(zip(letters, reversed(letters), strict=True))]
    source = write(tmp_path / "in.jsonl", [{"text": t, "order": 10 * i} for i, t in enumerate(transcript)])
    suspect = write(tmp_path / "text.jsonl", [{"text": t} for t in transcript[10:]])
    (out, summary, page), options = outputs(tmp_path)
    setting = ["--setting", "partition", "--texts", suspect, "--buckets", 8, "--max-n", 5, "--permutations", 199]
    run("provenance", source, "-m", "tiny", "--device", "cpu", *setting, *options)
    told = json.loads(summary.read_text())
    documents, texts = text_tokens(tiny, transcript), text_tokens(tiny, transcript[10:])
    counts = partition_counts(documents, texts, max_n=5)
    found = partition_test(counts, buckets=8, permutations=199)
    assert [row["n_grams"] for row in read(out)] == counts.tolist()
    assert (told["rank_correlation"], told["p_value"]) == (found.statistic, found.p_value)
    assert told["p_value"] < 0.05
    assert (told["buckets"], told["tokens"]) == (8, sum(map(len, texts)))
    assert "<svg" in page.read_text()


def test_provenance_of_a_text_by_retraining(tmp_path, tiny):
    other = loglik.load("tiny", device="cpu")
    generator, runs = torch.Generator().manual_seed(0), []
    for number in range(3):
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.add_(0.005 * torch.randn(parameter.shape, generator=generator))
        runs.append(tmp_path / f"run{number}")
        other.model.save_pretrained(runs[-1])
        other.tokenizer.save_pretrained(runs[-1])
    records = [{"text": t, "prompt": "import os\n"} for t in TEXTS[1:4]]
    source = write(tmp_path / "in.jsonl", records)
    (out, summary, page), options = outputs(tmp_path)
    run("provenance", source, "-m", "tiny", "--device", "cpu", "--setting", "reshuffle", "--shuffled", *runs, *options)
    pairs = [(record["prompt"], record["text"]) for record in records]
    scored = [loglik.score(model, pairs) for model in (tiny, *(loglik.load(r, device="cpu") for r in runs))]
    found = reshuffle_test(scored[0], scored[1:])
    told = json.loads(summary.read_text())
    assert told["p_value"] == found.p_value == 0.25  # tiny is the best of four
    assert told["deviations_above_the_random_orders"] == pytest.approx(found.statistic, rel=1e-3)
    assert told["p_student"] == pytest.approx(found.p_student, rel=1e-2)
    assert [row["log_prob"] for row in read(out)] == pytest.approx(scored[0].value.tolist(), abs=1e-3)
    assert "<svg" in page.read_text()


def test_bad_text_input(tmp_path, capsys):
    one_class = write(tmp_path / "one.jsonl", [{"text": t, "member": True} for t in TEXTS])
    assert "one class only" in refused(capsys, "membership", one_class, "-m", "tiny", "--device", "cpu")
    some = write(tmp_path / "some.jsonl", [{"text": TEXTS[0], "member": True}, {"text": TEXTS[1]}])
    assert "line 2 has no member" in refused(capsys, "membership", some, "-m", "tiny", "--device", "cpu")
    empty = write(tmp_path / "empty.jsonl", [{"text": " "}])
    assert "line 1: text must be a text that is not empty" in refused(capsys, "membership", empty, "-m", "tiny")
    twice = write(tmp_path / "twice.jsonl", [{"text": t, "order": i // 2} for i, t in enumerate(TEXTS)])
    assert "same training order" in refused(capsys, "provenance", twice, "-m", "tiny", "--device", "cpu")
    missing = refused(capsys, "ood", one_class, "-m", tmp_path / "nowhere")
    assert "nowhere" in missing


# ---------------------------------------------------------------------- choice, uncertainty
def test_choice_is_that_of_scores(tmp_path, tiny):
    questions = ["for i in ", "import os\nimport "]
    options = [["range(10):", "banana"], ["(((", "sys"]]
    records = [{"question": q, "options": o, "answer": a} for q, o, a in zip(questions, options, (0, 1), strict=True)]
    source = write(tmp_path / "in.jsonl", records)
    (out, summary, _), wanted = outputs(tmp_path)
    run("choice", source, "-m", "tiny", "--device", "cpu", "--separator", "", "--premise", "#", *wanted)
    rows, told = read(out), json.loads(summary.read_text())
    pairs = [(q, text) for q, texts in zip(questions, options, strict=True) for text in texts]
    scores = loglik.score(tiny, pairs).value.view(2, 2)
    assert [row["choice_sum"] for row in rows] == scores.argmax(1).tolist() == [0, 1]
    assert rows[0]["margin"] == pytest.approx(float(scores[0, 0] - scores[0, 1]), abs=1e-4)
    assert told["accuracy_sum"] == 1.0
    assert {"choice_token", "choice_byte", "choice_character", "choice_pmi"} <= {*rows[0]}


def test_bad_choices(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"question": "a", "options": ["b", "c"], "answer": 2}])
    assert "line 1: answer must be an option's number from 0 to 1, got 2" in refused(
        capsys, "choice", source, "-m", "tiny"
    )
    source = write(tmp_path / "in.jsonl", [{"question": "a", "options": "b"}])
    assert "line 1: options must be a list of texts" in refused(capsys, "choice", source, "-m", "tiny")


def test_uncertainty_of_greedy_answers(tmp_path, tiny):
    prompts = ["import os\nimport ", "for i in range("]
    records = [{"prompt": p, "answer": a} for p, a in zip(prompts, ("sys", "zzz"), strict=True)]
    source = write(tmp_path / "in.jsonl", records)
    (out, summary, page), options = outputs(tmp_path)
    arguments = ["-m", "tiny", "--device", "cpu", "--num-samples", 3, "--max-tokens", 4]
    run("uncertainty", source, *arguments, *options)
    rows, told = read(out), json.loads(summary.read_text())
    for row in rows:
        assert row["g_nll"] == pytest.approx(-row["log_prob"])
        assert row["mode_nll"] <= row["g_nll"] + 1e-6
        assert len(row["samples"]) == 3
    assert told["accuracy"] in (0.0, 0.5, 1.0)
    assert "<svg" in page.read_text()


def test_an_option_that_cannot_be_scored_is_named_with_its_line(tmp_path, capsys):
    records = [
        {"question": "x =", "options": ["1", "2"]},
        {"question": "y =", "options": ["1", "2", "3 " * 3000]},
    ]
    error = refused(capsys, "choice", write(tmp_path / "in.jsonl", records), "-m", "tiny")
    assert "line 2, option 2: " in error
    records[1]["options"] = ["1"]
    error = refused(capsys, "choice", write(tmp_path / "in.jsonl", records), "-m", "tiny")
    assert "line 2: needs a list of at least two options" in error
