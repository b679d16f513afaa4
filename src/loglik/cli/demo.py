"""``loglik demo``: real text, a real model, a table and a report."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loglik.errors import RowError
from loglik.progress import bar

if TYPE_CHECKING:
    from loglik.models.stdlib_text import Document
    from loglik.scoring.rows import ScoredRow

__all__ = ["Demo"]

_LINE_WIDTH = 48


@dataclass(frozen=True)
class Demo:
    """Score the standard-library modules that the embedded model has not seen, and write report.html."""

    report: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """Where the HTML report goes."""
    model: str = "tiny"
    """Embedded model, directory or hub name."""
    lines: int = 8
    """How many of the most surprising lines to print."""

    def run(self) -> None:
        """Score, print, write the report."""
        from loglik.models.load import load
        from loglik.models.stdlib_text import HELD_OUT, stdlib_documents
        from loglik.scoring.engine import ScoreOptions, Scorer
        from loglik.scoring.report import ReportBuilder
        from loglik.scoring.rows import InputRow

        model = load(self.model)
        scorer = Scorer(model, ScoreOptions(overflow="window"))
        documents = list(stdlib_documents("held_out"))
        builder = ReportBuilder(
            title="Held-out standard library",
            subtitle=f"{len(documents)} files of {len(HELD_OUT)} modules that {self.model!r} was not trained on",
            facts={
                "model": f"{self.model} ({model!r})",
                "kind": str(model.kind),
                "BOS": scorer.encoder.describe_bos(),
                "overflow": f"windows, stride {model.max_length // 2}"
                if model.max_length
                else "none: no context limit",
            },
            max_tokens=120_000,
        )
        rows = []
        with bar("scoring", total=len(documents), unit="files") as advance:
            for document in documents:
                source = InputRow(document.name, document.name, "", document.text)
                row = scorer.score_rows([source], per_token=True)[0]
                if row.error is not None:
                    raise RowError(row.error, row=document.name)
                builder.add(row)
                rows.append((document, row))
                advance(1)
        console = Console()
        console.print(_modules(rows))
        console.print(_surprises(rows, self.lines))
        builder.write(self.report)
        console.print(f"Token by token, with every value: [bold]{self.report}[/bold]")


def _modules(rows: list[tuple[Document, ScoredRow]]) -> Table:
    """Bits per byte of each module, hardest first, and of all together."""
    table = Table(title="Bits per byte of each held-out module", title_justify="left", box=None, pad_edge=False)
    table.add_column("module")
    for name in ("files", "bytes", "tokens", "log-prob (nats)", "bits/byte", "perplexity/token"):
        table.add_column(name, justify="right")
    groups: dict[str, list[ScoredRow]] = {}
    for document, row in rows:
        groups.setdefault(document.module, []).append(row)
    lines = sorted(((name, *_sums(group)) for name, group in groups.items()), key=lambda line: line[4] / line[2])
    for name, files, size, tokens, nats in lines:
        table.add_row(name, *_cells(files, size, tokens, nats))
    table.add_section()
    table.add_row("all", *_cells(*_sums([row for _, row in rows])), style="bold")
    return table


def _sums(rows: list[ScoredRow]) -> tuple[int, int, int, float]:
    sizes = sum(row.num_bytes or 0 for row in rows)
    return len(rows), sizes, sum(row.num_tokens or 0 for row in rows), math.fsum(row.log_prob or 0.0 for row in rows)


def _cells(files: int, size: int, tokens: int, nats: float) -> list[str]:
    bits = -nats / math.log(2) / size
    return [f"{files}", f"{size:,}", f"{tokens:,}", f"{nats:,.1f}", f"{bits:.3f}", f"{math.exp(-nats / tokens):.1f}"]


def _surprises(rows: list[tuple[Document, ScoredRow]], count: int) -> Table:
    """The lines that cost the most bits, as they stand in the files."""
    from loglik.scoring.lines import scored_lines

    every = (
        (line, document) for document, row in rows for line in scored_lines(row.tokens or [], row.token_log_probs or [])
    )
    table = Table(title="Most surprising lines", title_justify="left", box=None, pad_edge=False)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("line", no_wrap=True, overflow="ellipsis")
    for line, document in heapq.nlargest(count, every, key=lambda pair: pair[0].bits):
        text = document.text.split("\n")[line.number - 1].strip()
        # A terminal may be narrow: the numbers must not give way to a long line.
        table.add_row(f"{line.bits:.0f}", f"{document.name}:{line.number}", Text(text[:_LINE_WIDTH]))
    return table
