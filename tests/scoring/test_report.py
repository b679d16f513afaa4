"""The report's numbers against direct computation, and its page against hostile text, caps and unwritable places."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loglik.errors import InputError, RowError
from loglik.scoring.report import ReportBuilder
from loglik.scoring.rows import ScoredRow

LN2 = math.log(2)


def scored(name: str, tokens: list[str], log_probs: list[float | None], **changes: Any) -> ScoredRow:
    total = sum(term for term in log_probs if term is not None)
    pairs = zip(tokens, log_probs, strict=True)
    size = sum(len(token.encode("utf-8", "surrogatepass")) for token, term in pairs if term is not None)
    fields: dict[str, Any] = {
        "log_prob": total,
        "kind": "exact",
        "num_tokens": sum(term is not None for term in log_probs),
        "num_bytes": size,
        "bits_per_byte": -total / (size * LN2) if size else None,
        "is_greedy": False,
        "boundary": "none",
        "num_windowed": 0,
        "tokens": tokens,
        "token_log_probs": log_probs,
    }
    return ScoredRow(name, **(fields | changes))


def random_rows(count: int, *, seed: int = 0, length: int = 40) -> list[ScoredRow]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = ["<s>"] + [rng.choice(["the", " cat", "\n", "é", ".\n\n", " sat"]) for _ in range(length)]
        terms: list[float | None] = [None] + [-rng.expovariate(0.2) for _ in range(length)]
        rows.append(scored(f"row {number}", tokens, terms))
    return rows


def build(rows: list[ScoredRow], path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    builder = ReportBuilder(**({"title": "A title"} | options))
    for row in rows:
        builder.add(row)
    builder.write(path)
    page = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0]), page


def cells(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(data["table"]["columns"], row, strict=True)) for row in data["table"]["rows"]]


class Elements(HTMLParser):
    """Elements and title as a browser's parser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.title = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title":
            self.title += data


# ---------------------------------------------------------------- numbers
def test_totals_are_those_of_all_rows_whatever_the_caps(tmp_path: Path) -> None:
    rows = random_rows(12)
    data, _ = build(rows, tmp_path / "r.html", max_heat_maps=2, max_tokens=50)
    nats = sum(row.log_prob or 0.0 for row in rows)
    tokens, size = sum(row.num_tokens or 0 for row in rows), sum(row.num_bytes or 0 for row in rows)
    totals = data["totals"]
    assert totals["nats"] == pytest.approx(nats, rel=1e-12)
    assert (totals["rows"], totals["tokens"], totals["bytes"]) == (12, tokens, size)
    assert totals["bits_per_byte"] == {"value": pytest.approx(-nats / LN2 / size), "kind": "exact", "stderr": None}
    assert totals["perplexity"] == {"value": pytest.approx(math.exp(-nats / tokens)), "kind": "exact", "stderr": None}


def test_histogram_counts_equal_numpy_over_all_rows(tmp_path: Path) -> None:
    rows = random_rows(30, length=100)
    data, _ = build(rows, tmp_path / "r.html", max_heat_maps=1, max_tokens=3)
    bits = np.array([-term / LN2 for row in rows for term in row.token_log_probs or () if term is not None])
    got = data["histograms"]["tokens"]
    want = np.histogram(bits, bins=[*np.arange(0, 24.25, 0.25), np.inf])[0]
    assert got["counts"] == want.tolist()
    assert got["counts"][-1] > 0  # the overflow bin was put to the test
    assert (got["width"], got["top"], got["number"], got["rows"]) == (0.25, 24.0, 3000, 30)
    assert got["mean"] == pytest.approx(bits.mean())
    per_row = data["histograms"]["rows"]
    densities = [row.bits_per_byte or 0.0 for row in rows]
    assert per_row["counts"] == np.histogram(densities, bins=[*np.arange(0, 24.0625, 0.0625), np.inf])[0].tolist()
    assert per_row["number"] == 30


@pytest.mark.parametrize(
    ("bits", "index"),
    [(0.0, 0), (0.2499, 0), (0.25, 1), (23.9, 95), (24.0, 96), (2.0**30, 96), (math.inf, 96), (-1e-7, 0)],
)
def test_bin_edges_belong_to_the_bin_above(tmp_path: Path, bits: float, index: int) -> None:
    assert bits * LN2 / LN2 == bits  # the edge itself is hit, not a neighbour of it
    data, _ = build([scored("a", ["x"], [-bits * LN2])], tmp_path / "r.html")
    assert data["histograms"]["tokens"]["counts"] == [int(i == index) for i in range(97)]


def test_table_shows_each_row_as_scored(tmp_path: Path) -> None:
    builder = ReportBuilder(title="t")
    first = scored("7", ["a", "b"], [None, -2.5], boundary="straddled", is_greedy=True, num_windowed=1, stderr=0.5)
    builder.add(first, name="heapq.py")
    builder.add(ScoredRow("8", -1.0, "lower_bound", None, 2, 4, 0.36, None, "none", 0))
    builder.write(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    one, two = cells(json.loads(text.split('id="data">')[1].split("</script>")[0]))
    assert one == {
        "name": "heapq.py",
        "id": "7",
        "bits_per_byte": first.bits_per_byte,
        "log_prob": -2.5,
        "stderr": 0.5,
        "num_tokens": 1,
        "num_bytes": 1,
        "is_greedy": True,
        "boundary": "straddled",
        "num_windowed": 1,
        "kind": "exact",
        "map": 0,
    }
    assert (two["name"], two["id"], two["map"], two["kind"], two["is_greedy"]) == ("8", None, None, "lower_bound", None)


def test_table_stops_at_2000_rows_and_totals_do_not(tmp_path: Path) -> None:
    rows = [ScoredRow(str(i), -LN2, "exact", None, 1, 1, 1.0, True, "none", 0) for i in range(2_003)]
    data, _ = build(rows, tmp_path / "r.html")
    assert [row["name"] for row in cells(data)] == [str(i) for i in range(2_000)]
    assert data["totals"]["rows"] == data["histograms"]["rows"]["number"] == 2_003
    assert data["histograms"]["rows"]["counts"][16] == 2_003
    assert data["totals"]["bits_per_byte"]["value"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kinds", "of_sum", "bits_per_byte", "perplexity"),
    [
        (("exact", "exact"), "exact", "exact", "exact"),
        (("exact", "lower_bound"), "lower_bound", "upper_bound", "upper_bound"),
        (("upper_bound", "exact"), "upper_bound", "lower_bound", "surrogate"),  # Jensen: exp of a sampled mean
        (("lower_bound", "upper_bound"), "surrogate", "surrogate", "surrogate"),
        (("estimate", "exact"), "estimate", "estimate", "estimate"),
        (("unnormalized", "exact"), "unnormalized", "unnormalized", "surrogate"),
    ],
)
def test_mixed_kinds_and_standard_errors(
    tmp_path: Path, kinds: tuple[str, str], of_sum: str, bits_per_byte: str, perplexity: str
) -> None:
    rows = [scored("a", ["abcd"], [-3.0], kind=kinds[0], stderr=0.3), scored("b", ["ef"], [-1.0], kind=kinds[1])]
    rows.append(scored("c", ["gh"], [-1.0], kind=kinds[1], stderr=0.4))
    totals = build(rows, tmp_path / "r.html")[0]["totals"]
    assert totals["kind"] == of_sum
    assert totals["stderr"] == pytest.approx(0.5)  # 3-4-5
    assert totals["bits_per_byte"] == {
        "value": pytest.approx(5 / (8 * LN2)),
        "kind": bits_per_byte,
        "stderr": pytest.approx(0.5 / (8 * LN2)),
    }
    assert totals["perplexity"]["kind"] == perplexity
    assert totals["perplexity"]["stderr"] == pytest.approx(math.exp(5 / 3) * 0.5 / 3)
    assert sum(totals["kinds"].values()) == 3


def test_impossible_text_is_infinitely_surprising_and_stays_valid_json(tmp_path: Path) -> None:
    data, page = build([scored("a", ["ab", "c"], [-math.inf, -1.0])], tmp_path / "r.html")
    assert data["totals"]["nats"] == "-Infinity"
    assert data["totals"]["bits_per_byte"]["value"] == data["totals"]["perplexity"]["value"] == "Infinity"
    assert data["maps"][0]["log_probs"] == ["-Infinity", -1.0]
    assert float(data["lines"]["bits"][0][2]) == math.inf
    assert not re.search(r"[:,\[]-?(Infinity|NaN)", page.split('id="data">')[1].split("</script>")[0])


def test_empty_completion_has_a_defined_answer(tmp_path: Path) -> None:
    data, _ = build([scored("a", ["<s>"], [None])], tmp_path / "r.html")
    totals = data["totals"]
    assert (totals["bits_per_byte"], totals["perplexity"], totals["nats"], totals["kind"]) == (None, None, 0, "exact")
    assert data["histograms"]["tokens"]["mean"] is None
    assert data["lines"]["bits"] == []


# ---------------------------------------------------------------- tokens and lines
def test_heat_maps_give_the_text_and_its_log_probs_back(tmp_path: Path) -> None:
    rows = random_rows(3)
    data, _ = build(rows, tmp_path / "r.html")
    for row, kept in zip(rows, data["maps"], strict=True):
        assert (kept["name"], kept["tokens"], kept["num_tokens"]) == (row.id, row.tokens, 41)
        for got, want in zip(kept["log_probs"], row.token_log_probs or (), strict=True):
            assert got is None if want is None else abs(got - want) <= 0.5001e-4


def test_caps_keep_the_first_tokens_and_count_the_rest(tmp_path: Path) -> None:
    rows = random_rows(5, length=9)  # 10 tokens each
    data, _ = build(rows, tmp_path / "a.html", max_tokens=24)
    assert [(len(kept["tokens"]), kept["num_tokens"]) for kept in data["maps"]] == [(10, 10), (10, 10), (4, 10)]
    assert data["num_maps"] == 5
    assert [row["map"] for row in cells(data)] == [0, 1, 2, None, None]
    data, _ = build(rows, tmp_path / "b.html", max_heat_maps=1)
    assert (len(data["maps"]), data["num_maps"]) == (1, 5)
    data, _ = build(rows, tmp_path / "c.html", max_tokens=0)
    assert (data["maps"], data["lines"]["bits"], data["num_maps"]) == ([], [], 5)


def test_lines_are_ranked_by_the_bits_of_the_tokens_that_start_on_them(tmp_path: Path) -> None:
    tokens = ["<s>", "short", ":\n", "  a longer line of text", "\n\n", "tail é"]
    bits = [None, 4.0, 1.0, 8.0, 2.0, 7.0]
    data, _ = build([scored("doc", tokens, [b if b is None else -b * LN2 for b in bits])], tmp_path / "r.html")
    lines = data["lines"]
    assert [line[:2] for line in lines["bits"]] == [[0, 1], [0, 3], [0, 0]]
    assert [line[2] for line in lines["bits"]] == pytest.approx([10.0, 7.0, 5.0])
    assert [line[3] for line in lines["bits"]] == pytest.approx([10 / 25, 7 / 7, 5 / 7])
    assert [line[4] for line in lines["bits"]] == ["a longer line of text", "tail é", "<s>short:"]
    assert [line[:2] for line in lines["bits_per_byte"]] == [[0, 1]]  # the others are below `min_bytes`
    assert lines["min_bytes"] == 16


def test_tokens_that_continue_a_character_count_for_its_line(tmp_path: Path) -> None:
    tokens = ["a long enough line ", "é", "", "\n", "another line that is whole\n"]
    data, _ = build([scored("doc", tokens, [-1.0, -2.0, -3.0, -1.0, -1.0])], tmp_path / "r.html")
    first = data["lines"]["bits"][0]
    size = len("a long enough line é\n".encode())
    assert first[1] == 0
    assert first[2] == pytest.approx(7 / math.log(2))
    assert first[3] == pytest.approx(7 / math.log(2) / size)
    assert first[4] == "a long enough line é"


def test_lines_leave_out_prompts_and_the_torn_end_of_a_row(tmp_path: Path) -> None:
    tokens = ["a prompt\n", "scored\n", "whole line\n", "torn", " line"]
    terms = [None, -1.0, -2.0, -30.0, -1.0]
    data, _ = build([scored("doc", tokens, terms)], tmp_path / "r.html", max_tokens=4)
    assert [line[1] for line in data["lines"]["bits"]] == [2, 1]


# ---------------------------------------------------------------- rows that cannot be scored
def test_rows_with_an_error_are_listed_apart(tmp_path: Path) -> None:
    rows = random_rows(2)
    rows.insert(1, ScoredRow("q17", error="the text is longer than the context"))
    rows.append(scored("q18", ["a", "b"], [-1.0, math.nan], log_prob=math.nan))
    data, _ = build(rows, tmp_path / "r.html")
    assert data["errors"]["number"] == 2
    assert data["errors"]["rows"][0] == ["q17", "the text is longer than the context"]
    assert data["errors"]["rows"][1][0] == "q18"
    assert "not a number" in data["errors"]["rows"][1][1]
    assert data["totals"]["tokens"] == data["histograms"]["tokens"]["number"] == 80
    assert [row["name"] for row in cells(data)] == ["row 0", "row 1"]
    assert ["rows", "2 scored, 2 with an error"] in data["facts"]


def test_a_report_of_errors_alone_has_no_numbers(tmp_path: Path) -> None:
    data, _ = build([ScoredRow(str(i), error="no") for i in range(300)], tmp_path / "r.html")
    assert (data["errors"]["number"], len(data["errors"]["rows"])) == (300, 200)
    assert (data["totals"]["kind"], data["totals"]["bits_per_byte"], data["totals"]["perplexity"]) == (None, None, None)


def test_rows_that_contradict_themselves_are_refused_and_leave_no_trace(tmp_path: Path) -> None:
    builder = ReportBuilder(title="t")
    with pytest.raises(RowError, match=r"^q1: 2 tokens come with 1 log-probabilities"):
        builder.add(replace(scored("q1", ["a"], [-1.0]), tokens=["a", "b"]))
    with pytest.raises(RowError, match=r"^name: kind 'certain' is not known; use one of exact, lower_bound"):
        builder.add(scored("q2", ["a"], [-1.0], kind="certain"), name="name")
    with pytest.raises(InputError, match="no rows"):
        builder.write(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the page
HOSTILE = '</script><img src=x onerror=alert(1)><!--<script>{{data}}{{title}}\u2028\u2029"\\&amp;\x00\r\n'


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = Elements(build([scored("a", ["x"], [-1.0])], tmp_path / "plain.html", facts={"a": "b"})[1]).tags
    rows = [scored(HOSTILE, [HOSTILE, "\ud800"], [-1.0, -2.0]), ScoredRow(HOSTILE, error=HOSTILE)]
    data, page = build(rows, tmp_path / "r.html", title=HOSTILE, subtitle=HOSTILE, facts={HOSTILE: HOSTILE})
    found = Elements(page)
    assert found.tags == plain
    assert found.title.startswith("</script><img src=x onerror=alert(1)>")
    assert data["title"] == data["subtitle"] == data["maps"][0]["name"] == HOSTILE
    assert data["maps"][0]["tokens"] == [HOSTILE, "\ud800"]
    assert data["errors"]["rows"] == [[HOSTILE, HOSTILE]]
    assert data["facts"][0] == [HOSTILE, HOSTILE]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    _, page = build(random_rows(8), tmp_path / "r.html")
    for reference in ("http://", "https://", "src=", "url(", "@import", "fetch(", "import(", "XMLHttpRequest"):
        assert reference not in page, reference
    assert re.findall(r'<link[^>]*href="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page  # and the browser is told to hold the page to it


def test_facts_come_first_and_are_not_repeated(tmp_path: Path) -> None:
    rows = [scored("a", ["ab"], [-1.0])]
    data, _ = build(rows, tmp_path / "r.html", facts={"model": "m", "Tokens": "1 of 2"}, subtitle="s")
    assert data["facts"] == [["model", "m"], ["Tokens", "1 of 2"], ["rows", "1"], ["bytes", "2"]]
    assert (data["title"], data["subtitle"], data["version"]) == ("A title", "s", version("loglik"))


def test_75_000_tokens_fit_into_four_megabytes(tmp_path: Path) -> None:
    build(random_rows(15, length=5_000), tmp_path / "r.html", max_tokens=75_015)
    assert (tmp_path / "r.html").stat().st_size < 4e6


# ---------------------------------------------------------------- writing
def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows; score at least one row"):
        ReportBuilder(title="t").write(tmp_path / "r.html")


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    target.write_text("old")
    build(random_rows(1), target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    builder = ReportBuilder(title="t")
    builder.add(scored("a", ["x"], [-1.0]))
    with pytest.raises(InputError, match=r"cannot be written to .*missing.r\.html \(No such file or directory\); name"):
        builder.write(tmp_path / "missing" / "r.html")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be written to"):
        builder.write(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("option", ["max_heat_maps", "max_tokens"])
def test_negative_limits_are_refused(option: str) -> None:
    options: dict[str, Any] = {"title": "t", option: -1}
    with pytest.raises(InputError, match=f"{option} is -1; give 0 or more"):
        ReportBuilder(**options)
