"""``loglik demo``: the table says what the model says."""

from __future__ import annotations

import math
import re

import pytest

import loglik
from loglik.cli import main
from loglik.models import stdlib_text
from loglik.models.stdlib_text import Document
from zoo import SEQ2SEQ, build, t5_tokenizer

TEXTS = {
    "bisect.py": "def insort(a, x):\n    a.insert(0, x)\n",
    "tomllib/a.py": "import re\n" * 40,
    "tomllib/b.py": "x = 'ßàáâãäåæ'\n",
}


@pytest.fixture
def demo(monkeypatch, tmp_path, capsys):
    documents = [Document(name, name.split("/")[0].removesuffix(".py"), text) for name, text in TEXTS.items()]
    monkeypatch.setattr(stdlib_text, "stdlib_documents", lambda _part: iter(documents))

    def run(*args: str) -> tuple[str, str]:
        report = tmp_path / "report.html"
        main(["demo", "--report", str(report), *args])
        return capsys.readouterr().out, report.read_text(encoding="utf-8")

    return run


def test_table_totals_and_report(demo, tiny):
    out, page = demo()
    texts = list(TEXTS.values())
    ll = loglik.score(tiny, texts)
    size = sum(len(text.encode()) for text in texts)
    bits = -float(ll.value.sum()) / math.log(2) / size
    total = next(line for line in out.splitlines() if line.startswith("all"))
    assert re.split(r"\s{2,}", total.strip()) == [
        "all",
        "3",
        f"{size:,}",
        f"{int(ll.num_units.sum()):,}",
        f"{float(ll.value.sum()):,.1f}",
        f"{bits:.3f}",
        f"{math.exp(-float(ll.value.sum()) / int(ll.num_units.sum())):.1f}",
    ]
    assert next(line for line in out.splitlines() if line.startswith("tomllib")).split()[:2] == ["tomllib", "2"]
    assert "x = 'ßàáâãäåæ'" in out  # lines are shown as they stand in the file, not as pieces of characters
    assert all(name in page for name in TEXTS)


def test_a_report_that_cannot_be_written_is_one_sentence(demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo("--report", str(tmp_path / "no" / "report.html"))
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_document_that_cannot_be_scored_is_named(demo, tmp_path, capsys):
    """An encoder-decoder has no windows: the first document beyond its context stops the demo with a sentence."""
    tokenizer = t5_tokenizer()
    build(SEQ2SEQ["bart"], len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit) as stop:
        demo("--model", str(tmp_path / "m"))
    assert stop.value.code == 2
    assert "tomllib/a.py: the completion has" in capsys.readouterr().err
