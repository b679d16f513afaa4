"""``loglik audit scenarios``: its numbers are those of the functions; bad input is one sentence."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from cli.audit_runner import run_audit
from loglik.cli.audits.scenarios import AuditScenarios
from loglik.models.ngram import NGramLM
from loglik.signals.attribution import causal_trace, embedding_spread
from loglik.signals.scenarios import Fact, Scenario, fact_predictions, label_scenarios, scenario_shares
from loglik.signals.subject_prompts import subject_prompt

ON = ["-m", "tiny", "--device", "cpu"]
TEMPLATES = {"opens": ["with [X]", "    [X]", "return [X]"], "from": ["import [X]\nx = [X].", "from [X] import "]}
RECORDS = [
    {"subject": "open", "relation": "opens", "object": "(", "popularity": 5000},
    {"subject": "qzx", "relation": "opens", "object": "(", "popularity": 1},
    {"subject": "os path", "relation": "from", "object": "join", "popularity": 9000},
    {"subject": "zorb wug", "relation": "from", "object": None, "popularity": None},
]
NEUTRAL, NAMES = {"opens": ["x"], "from": ["a", "b"]}, {"from": ["[X] is a"]}
LOW = ["--recall-count", 1, "--heuristics-count", 0]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_columns():
    return [
        {
            **record,
            "templates": TEMPLATES[record["relation"]],
            "neutral": NEUTRAL[record["relation"]],
            "name_prompts": "[X] is a",
        }
        for record in RECORDS
    ]


def facts(popularity=True):
    return [
        Fact(r["relation"], r["subject"], r["object"], r["popularity"] if popularity else float("inf")) for r in RECORDS
    ]


def prompts_file(tmp_path, **more):
    path = tmp_path / "prompts.json"
    given = {
        "opens": {"templates": TEMPLATES["opens"], "neutral": NEUTRAL["opens"]},
        "from": {"templates": TEMPLATES["from"], "neutral": NEUTRAL["from"], "name_prompts": NAMES["from"]},
    }
    path.write_text(json.dumps(given | more))
    return path


def test_the_numbers_are_those_of_the_functions(tmp_path, tiny, capsys):
    out, summary, page, every = (tmp_path / n for n in ("out.jsonl", "summary.json", "page.html", "every.jsonl"))
    source = write(tmp_path / "in.jsonl", RECORDS)
    run_audit(
        AuditScenarios, source, *ON, *LOW, "--prompts", prompts_file(tmp_path), "--top", 2, "-o", out,
        "--summary", summary, "--report", page, "--predictions", every,
    )  # fmt: skip
    found = fact_predictions(tiny, facts(), TEMPLATES, neutral=NEUTRAL, name_prompts=NAMES, top=2)
    labels = label_scenarios(found, facts(), recall_count=1, heuristics_count=0)
    told, rows, predictions = json.loads(summary.read_text()), read(out), read(every)
    assert [p["scenario"] for p in predictions] == [str(label) for label in labels]
    assert [(p["fact"], p["template"], p["rank"], p["token"]) for p in predictions] == [
        (p.fact, p.template, p.rank, p.token) for p in found
    ]
    assert [p["row"] for p in predictions[:3]] == ["line 1"] * 3
    for flag in ("correct", "string_match", "name_bias", "prompt_bias"):
        assert [p[flag] for p in predictions] == [getattr(p, flag) for p in found]
    shares = scenario_shares(found, labels, facts())
    assert told["predictions"] == len(found) == 20
    for kind in Scenario:
        assert (str(kind) in told) == (kind in shares)
        if kind in shares:
            assert told[str(kind)]["count"] == shares[kind].count
            assert told[str(kind)]["probability"] == pytest.approx(shares[kind].probability)
            assert told[str(kind)].get("accuracy") == shares[kind].accuracy
    assert len(shares) > 1
    real = [p for p in found if p.fact != 3 and p.rank == 0]
    assert told["first_choice_correct"] == sum(p.correct for p in real) / len(real)
    assert [row["subject"] for row in rows] == [r["subject"] for r in RECORDS]
    assert rows[0]["first_choices"] == [p.answer for p in found if p.fact == 0 and p.rank == 0]
    assert rows[3]["first_choices_correct"] is None
    for number, row in enumerate(rows):
        own = [label for p, label in zip(found, labels, strict=True) if p.fact == number]
        assert {str(k): own.count(k) for k in Scenario if k is not Scenario.GENERIC} == {
            str(k): row[str(k)] for k in Scenario if k is not Scenario.GENERIC
        }
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "<script" not in text
    assert "predictions" in capsys.readouterr().out


def test_columns_say_the_same_as_the_file(tmp_path):
    one, two, table = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "p.parquet"
    plain = write(tmp_path / "in.jsonl", RECORDS)
    full = [r | {"name_prompts": "[X] is a"} for r in with_columns()]
    file = prompts_file(
        tmp_path, opens={"templates": TEMPLATES["opens"], "neutral": ["x"], "name_prompts": ["[X] is a"]}
    )
    run_audit(AuditScenarios, plain, *ON, *LOW, "--prompts", file, "--summary", one)
    source = write(tmp_path / "full.jsonl", full)
    run_audit(AuditScenarios, source, *ON, *LOW, "--summary", two, "--predictions", table)
    assert json.loads(one.read_text()) == json.loads(two.read_text())
    assert pq.read_table(table).num_rows == json.loads(two.read_text())["predictions"]


def test_objects_of_the_file_are_the_candidates(tmp_path, tiny):
    out = tmp_path / "s.json"
    rare = [RECORDS[1] | {"relation": "opens"}]
    named = {p.answer for p in fact_predictions(tiny, facts()[1:2], TEMPLATES)}
    file = prompts_file(tmp_path, opens={"templates": TEMPLATES["opens"], "objects": sorted(named)})
    run_audit(AuditScenarios, write(tmp_path / "in.jsonl", rare), *ON, "--prompts", file, "--summary", out)
    found = fact_predictions(tiny, facts()[1:2], TEMPLATES)
    labels = label_scenarios(found, facts()[1:2], candidates={"opens": named})
    assert Scenario.GUESSWORK in labels
    assert json.loads(out.read_text())["guesswork"]["count"] == labels.count(Scenario.GUESSWORK)


def test_without_popularity_nothing_is_a_guess(tmp_path, tiny):
    out = tmp_path / "s.json"
    bare = [{k: v for k, v in r.items() if k != "popularity"} for r in RECORDS]
    run_audit(
        AuditScenarios, write(tmp_path / "in.jsonl", bare), *ON, *LOW, "--prompts", prompts_file(tmp_path),
        "--summary", out,
    )  # fmt: skip
    told = json.loads(out.read_text())
    assert "nothing as guesswork" in told["popularity"]
    assert "guesswork" not in told
    found = fact_predictions(tiny, facts(False), TEMPLATES, neutral=NEUTRAL, name_prompts=NAMES)
    labels = label_scenarios(found, facts(False), recall_count=1, heuristics_count=0)
    assert told.get("exact fact recall", {"count": 0})["count"] == labels.count(Scenario.EXACT_RECALL)


def test_traces_are_those_of_the_function(tmp_path, tiny):
    out, summary, page = (tmp_path / n for n in ("out.jsonl", "summary.json", "page.html"))
    run_audit(
        AuditScenarios, write(tmp_path / "in.jsonl", RECORDS), *ON, "--prompts", prompts_file(tmp_path), "--trace", 2,
        "--trace-kind", "residual", "--draws", 3, "--seed", 4, "-o", out, "--summary", summary, "--report", page,
    )  # fmt: skip
    prompts = [subject_prompt(tiny, TEMPLATES["opens"][0].replace("[X]", s), s) for s in ("open", "qzx")]
    spread = embedding_spread(tiny, prompts)
    told, rows = json.loads(summary.read_text()), read(out)
    assert told["trace_spread"] == pytest.approx(spread)
    found = fact_predictions(tiny, facts(), TEMPLATES, neutral=NEUTRAL, name_prompts=NAMES)
    first = [p for p in found if p.template == 0 and p.rank == 0]
    for i, prompt in enumerate(prompts):
        want = causal_trace(tiny, prompt, kind="residual", spread=spread, draws=3, seed=4)
        assert prompt.target == first[i].token
        assert rows[i]["trace_high"] == pytest.approx(want.high, abs=1e-6)
        assert rows[i]["trace_low"] == pytest.approx(want.low, abs=1e-6)
        for got, expected in zip(rows[i]["indirect_effect"], want.indirect_effect.tolist(), strict=True):
            assert got == pytest.approx(expected, abs=1e-6)
    assert rows[2]["trace_high"] is None
    labels = label_scenarios(found, facts())
    kinds = {str(labels[found.index(p)]) for p in first[:2]}
    assert {name for name in told if name.startswith("trace_of_")} == {f"trace_of_{kind}" for kind in kinds}
    assert sum(told[f"trace_of_{kind}"]["rows"] for kind in kinds) == 2
    assert page.read_text().count("<svg") == 2 + 2 + len(kinds)  # bars, rows, kinds


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"subject": " "}, [], "line 2: subject must be a text that is not empty"),
        ({"relation": None}, [], "line 2 has no relation, and other rows have one"),
        ({"object": 3}, [], "line 2: object must be a text"),
        ({"popularity": "many"}, [], "line 2: popularity must be a finite number"),
        ({"popularity": None}, [], "line 2 has no popularity, and other rows have one"),
        ({"templates": None}, [], "line 2 has no templates, and other rows have one"),
        ({"templates": ["with [X] as"]}, [], "line 2: templates is not that of other rows of the relation 'opens'"),
        ({"templates": []}, [], "line 2: templates must be a text or a list of texts"),
        ({"subject": "open"}, [], "is given twice"),
        ({}, ["--top", 0], "top must be at least 1 token"),
        ({}, ["--trace", 9], "--trace must be from 0 to the number of rows, 4"),
        ({}, ["--window", 0], "--window must be at least 1 layer"),
        ({}, ["--draws", 0], "--draws at least 1"),
        ({}, ["--noise", "nan"], "--noise must be at least 0"),
        ({}, ["--predictions", "p.txt"], "the format of p.txt is not known"),
        ({}, ["--prompts", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_bad_input(tmp_path, capsys, change, options, sentence):
    records = with_columns()
    records[1] |= change
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditScenarios, write(tmp_path / "in.jsonl", records), *ON, *options)
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no json", "it is no JSON"),
        ("[1]", "must hold an object"),
        ('{"opens": ["with [X]"]}', "has no templates of the relation 'from'"),
        ('{"opens": ["with"], "from": ["[X]"]}', "texts with [X] in them, got 'with'"),
        ('{"opens": {"templates": ["[X]"], "nouns": ["x"]}, "from": ["[X]"]}', "'opens' has 'nouns', and can have"),
        ('{"opens": {"neutral": ["x"]}, "from": ["[X]"]}', "has no templates of the relation 'opens'"),
        ('{"opens": [3], "from": ["[X]"]}', "templates of 'opens' must be a text or a list of texts"),
    ],
)
def test_bad_files_of_prompts(tmp_path, capsys, content, sentence):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditScenarios, write(tmp_path / "in.jsonl", RECORDS), *ON, "--prompts", path)
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_model_without_blocks_labels_and_does_not_trace(tmp_path, capsys):
    NGramLM.train(["with open(x)", "import os"] * 3, order=3).save_pretrained(tmp_path / "ngram")
    source, out = write(tmp_path / "in.jsonl", RECORDS), tmp_path / "s.json"
    options = ["-m", tmp_path / "ngram", "--prompts", prompts_file(tmp_path), "--flag-top", 3]
    run_audit(AuditScenarios, source, *options, "--summary", out)
    assert json.loads(out.read_text())["rows"] == 4
    with pytest.raises(SystemExit):
        run_audit(AuditScenarios, source, *options, "--trace", 1)
    assert "needs the blocks of a causal language model" in " ".join(capsys.readouterr().err.split())
