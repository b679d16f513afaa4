"""The catalogue: complete, well-formed, ranked, and honest about what is implemented."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

import loglik
from loglik.cli import main
from loglik.errors import InputError
from loglik.papers.catalogue import Paper, papers, search, status, verdict

KINDS = {"objective", "signal", "decoding", "density", "estimator", "evaluation", "theory", "survey"}
AREAS = ("objectives", "signals", "decoding", "density", "stats", "models")


def test_all_128_papers_once():
    assert [p.id for p in papers()] == [f"P{n:03d}" for n in range(1, 129)]
    assert len({p.title for p in papers()}) == 128


def test_entries_are_well_formed():
    for p in papers():
        assert p.kind in KINDS, p.id
        assert re.fullmatch(r"\d{4}\.\d{4,5}", p.arxiv or "0000.00000"), p.id
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", p.month), p.id
        assert p.arxiv is not None
        assert p.description
        assert "\n" not in p.description
        assert p.claim.endswith((".", ")")), p.id
        assert p.surface
        for name in p.surface:
            assert re.fullmatch(rf"loglik\.({'|'.join(AREAS)})\.[a-z0-9_]+\.[A-Za-z0-9_]+", name), (p.id, name)


def test_catalogue_agrees_with_the_sheets(shared_data):
    """Title, arXiv id and month stand in each sheet's first line."""
    for p in papers():
        sheet = next((shared_data.parent / "papers").glob(f"{p.id}-*.md"))
        heading = sheet.read_text(encoding="utf-8").splitlines()[0]
        assert p.arxiv in heading, p.id
        assert p.month[:4] in heading, p.id


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("singular mle instance noise", "P025"),
        ("nested sampling", "P034"),
        ("diverse beam search", "P120"),
        ("suffix decoding", "P121"),
        ("radd absorbing diffusion", "P068"),
        ("copyright traps", "P127"),
        ("2404.14367", "P002"),
        ("P093", "P093"),
    ],
)
def test_search_puts_the_obvious_paper_first(query, first):
    ranked = search(query)
    assert ranked[0][0].id == first
    values = [value for _, value in ranked]
    assert values == sorted(values, reverse=True)
    assert min(values) > 0


def test_search_scores_follow_bm25():
    """A rare word weighs more than a common one; a longer text with the same word weighs less."""

    def entry(name: str, description: str) -> Paper:
        return Paper(name, name, None, "2024-01", "signal", description, "x", (), ())

    pool = [entry("B", "zebra"), entry("A", "zebra " + "filler " * 40), entry("C", "common"), entry("D", "common")]
    ranked = search("zebra", pool)
    assert [p.id for p, _ in ranked] == ["B", "A"]
    both = {p.id: v for p, v in search("zebra common", [*pool, entry("E", "common")])}
    assert both["B"] > both["C"]
    assert search("absent", pool) == []


def test_status_is_read_off_the_code(monkeypatch):
    def entry(*surface: str) -> Paper:
        return Paper("P999", "t", None, "2024-01", "signal", "d", "c", surface, ())

    here, gone = "loglik.objectives.supervised.MaximumLikelihood", "loglik.objectives.supervised.NotThere"
    assert status(entry(here)) == "implemented"
    assert status(entry(gone)) == "planned"
    assert status(entry(here, gone)) == "partial"
    assert status(entry("loglik.no_such_area.module.name")) == "planned"
    for p in papers():
        imported = []
        for name in p.surface:
            module, attribute = name.rsplit(".", 1)
            try:
                loaded = __import__(module, fromlist=[attribute])
            except ModuleNotFoundError:
                imported.append(False)
            else:
                assert isinstance(sys.modules[module], types.ModuleType)
                imported.append(hasattr(loaded, attribute))
        expected = "implemented" if all(imported) else "partial" if any(imported) else "planned"
        assert status(p) == expected, p.id
    assert loglik.__name__ == "loglik"


def test_verdicts_come_from_results(tmp_path):
    p = papers()[22]
    assert verdict(p, tmp_path) == "not run"
    folder = tmp_path / f"{p.id}_ches"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"verdict": "partly"}))
    assert verdict(p, tmp_path) == "partly"
    (folder / "results.json").write_text("[")
    with pytest.raises(InputError, match="no readable verdict"):
        verdict(p, tmp_path)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"loglik {loglik.__version__}\n"


def test_command_line(capsys):
    main(["papers", "--search", "diverse beam search", "--limit", "1", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["id"] == "P120"
    assert set(record) >= {"title", "arxiv", "month", "kind", "surface", "claim", "status", "verdict"}
    main(["papers", "--kind", "survey"])
    out = capsys.readouterr().out
    assert "P062" in out
    assert "of 128 papers" in out
    for bad, message in [(["--search", "zzzz"], "no paper matches"), (["--limit", "0"], "--limit must be at least 1")]:
        with pytest.raises(SystemExit) as stop:
            main(["papers", *bad])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
