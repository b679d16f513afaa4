"""Build hooks of the site: the table of papers is written from the catalogue and the results, never by hand."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from loglik.papers import Paper, papers
from loglik.papers.catalogue import status, verdict

MARKER = "<!-- papers -->"
REPRODUCTIONS = Path(__file__).resolve().parents[1] / "reproductions"
_COLUMNS = ("id", "title", "month", "kind", "status", "verdict", "what it computes")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table in the place of the marker."""
    return markdown.replace(MARKER, papers_table()) if MARKER in markdown else markdown


def papers_table() -> str:
    """A sentence with the counts, and one HTML table of all papers (HTML, because titles hold Markdown's signs)."""
    states = Counter(status(paper) for paper in papers())
    found = Counter(verdict(paper, REPRODUCTIONS) for paper in papers())
    counts = ", ".join(f"{states[name]} {name}" for name in ("implemented", "partial", "planned"))
    claims = ", ".join(f"{found[name]} {name}" for name in ("reproduced", "partly", "not reproduced", "not run"))
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "\n".join(_row(paper) for paper in papers())
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f"{len(papers())} papers: {counts}. Their claims: {claims}.\n\n{table}\n"


def _row(paper: Paper) -> str:
    title = escape(paper.title)
    if paper.arxiv is not None:
        title = f'<a href="https://arxiv.org/abs/{escape(paper.arxiv)}">{title}</a>'
    plain = (paper.month, paper.kind, status(paper), verdict(paper, REPRODUCTIONS), paper.description)
    cells = [escape(paper.id), title, *(escape(text) for text in plain)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
