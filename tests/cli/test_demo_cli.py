"""``loglik demo``: the table says what the model says."""

from __future__ import annotations

import math
import re

import pytest

import loglik
from loglik.cli import main
from loglik.models import stdlib_text
from loglik.models.stdlib_text import Document

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
