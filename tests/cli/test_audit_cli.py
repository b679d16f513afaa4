"""``loglik audit preferences``: the numbers of its parts, whatever the batches, and one sentence for bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch

import loglik
from loglik.cli import main
from loglik.models.batch import TokenBatch
from loglik.signals.preference import ches_scores
from loglik.signals.preference_audit import audit_preferences
from loglik.training.monitor import PreferenceMonitor, pair_batches
from loglik.training.read import read_training_data

PAIRS = [
    {"prompt": f"# {i}\n", "chosen": f"return {i}\n", "rejected": ("raise " if i % 2 else "return not ") + f"{i}\n"}
    for i in range(7)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return path


def run(*arguments: object) -> None:
    main(["audit", "preferences", *map(str, arguments), "--model", "tiny", "--device", "cpu"])


def test_the_table_the_summary_the_plot_and_the_filtered_rows(data, tmp_path, tiny, capsys):
    out, summary, plot, kept = (tmp_path / name for name in ("out.jsonl", "sum.json", "plot.svg", "kept.jsonl"))
    run(data, "-o", out, "--summary", summary, "--plot", plot, "--keep", 0.5, "--filtered", kept, "--batch-size", 3)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == [f"line {i + 1}" for i in range(7)]
    read = read_training_data(data, tiny).rows
    ((chosen, rejected),) = pair_batches(read, 7)
    for name, normalise in (("ches", False), ("ches_normalised", True)):
        expected = ches_scores(tiny, chosen, rejected, length_normalise=normalise)
        torch.testing.assert_close(torch.tensor([row[name] for row in rows]), expected, atol=1e-3, rtol=1e-4)
    values = tiny.log_prob(chosen).value.tolist()
    assert [row["log_prob_chosen"] for row in rows] == pytest.approx(values, abs=1e-3)
    best = sorted(range(7), key=lambda i: rows[i]["ches_normalised"])[:4]
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [PAIRS[i] for i in sorted(best)]
    found = json.loads(summary.read_text())
    assert found["pairs"] == 7
    assert found["kept"] == 4
    assert found["implicit_reward_accuracy"] is None
    wins = sum(row["log_prob_chosen"] > row["log_prob_rejected"] for row in rows)
    assert found["likelihood_prefers_chosen"] == pytest.approx(wins / 7)
    assert plot.read_text().startswith("<?xml")
    assert "likelihood prefers chosen" in capsys.readouterr().out


def test_a_model_against_itself_has_no_implicit_reward(data, tmp_path):
    run(data, "--reference", "tiny", "--summary", tmp_path / "s.json", "-o", tmp_path / "o.jsonl")
    margins = [json.loads(line)["reward_margin"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert margins == pytest.approx([0.0] * 7, abs=1e-4)


def test_batches_change_nothing(data, tiny):
    rows = read_training_data(data, tiny).rows
    one, other = (audit_preferences(tiny, pair_batches(rows, size)).summary() for size in (1, 7))
    for name, value in one.items():
        if isinstance(value, float):
            assert other[name] == pytest.approx(value, rel=1e-4), name


def test_the_monitor_reads_means_over_all_pairs(data, tiny, tmp_path):
    rows = read_training_data(data, tiny).rows
    whole, parts = (PreferenceMonitor(rows, batch_size=size).measure(tiny) for size in (7, 2))
    assert parts.chosen == pytest.approx(whole.chosen, abs=1e-5)
    assert parts.entropy == pytest.approx(whole.entropy, abs=1e-5)
    record: dict[str, object] = {}
    monitor = PreferenceMonitor(rows, plot=tmp_path / "course.png")
    monitor(0, tiny, record)
    assert record["monitor_events"] == []
    by_hand = []
    for row in rows:
        batch = TokenBatch.from_lists([[*row.prompt, *row.completions[0]]], starts=[len(row.prompt)])
        found = tiny.log_prob(batch).detach()
        by_hand.append(found.mean_per_unit().value.item())
    assert record["monitor_chosen"] == pytest.approx(math.fsum(by_hand) / 7, abs=1e-4)
    assert (tmp_path / "course.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", 0.5), "go together"),
        (("--keep", 2, "--filtered", "x"), "share above 0"),
        (("--batch-size", 0), "at least 1"),
        (("--plot", "x.docx"), "end its name in one of"),
        (("-o", "/nowhere/at/all.jsonl"), "cannot be written"),
        (("--k", 0), "k must be"),
    ],
)
def test_bad_options(data, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(data, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_that_are_no_pairs(tmp_path, capsys):
    path = tmp_path / "single.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SystemExit):
        run(path)
    assert "line 1 of" in capsys.readouterr().err
    with pytest.raises(loglik.InputError, match="has none"):
        PreferenceMonitor([])
