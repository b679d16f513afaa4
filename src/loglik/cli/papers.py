"""``loglik papers``: the catalogue."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from loglik.errors import InputError
from loglik.papers.catalogue import Paper, papers, search, status, verdict

__all__ = ["Papers"]


@dataclass(frozen=True)
class Papers:
    """The papers behind loglik: what each computes, what implements it here, what was reproduced."""

    search: str | None = None
    """Words to rank the catalogue by."""
    status: Literal["implemented", "partial", "planned"] | None = None
    """Only papers whose public names can all, partly or not yet be imported."""
    kind: (
        Literal["objective", "signal", "decoding", "density", "estimator", "evaluation", "theory", "survey"] | None
    ) = None
    """Only this kind of contribution."""
    limit: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """At most this many."""
    json: bool = False
    """One JSON object per line instead of text."""
    reproductions: Path = Path("reproductions")
    """Where the reproductions' results lie."""

    def run(self) -> None:
        """Print the chosen entries, or raise if there are none."""
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be at least 1, got {self.limit}")
        ranked = [paper for paper, _ in search(self.search)] if self.search is not None else list(papers())
        chosen = [p for p in ranked if self.kind in (None, p.kind)]
        chosen = [p for p in chosen if self.status in (None, status(p))][: self.limit]
        if not chosen:
            raise InputError("no paper matches; try other words or drop --status and --kind")
        if self.json:
            self._print_json(chosen)
        else:
            self._print_blocks(chosen)

    def _print_json(self, chosen: list[Paper]) -> None:
        console = Console(soft_wrap=True, markup=False, highlight=False)
        for paper in chosen:
            record = asdict(paper) | {"status": status(paper), "verdict": verdict(paper, self.reproductions)}
            console.print(json.dumps(record, ensure_ascii=False))

    def _print_blocks(self, chosen: list[Paper]) -> None:
        console = Console(markup=False, highlight=False)
        for paper in chosen:
            facts = [f"arXiv {paper.arxiv}", paper.month, paper.kind, status(paper), verdict(paper, self.reproductions)]
            console.print(Text(f"{paper.id}  {paper.title}", style="bold"))
            details = [
                " · ".join(facts),
                paper.description,
                f"claim: {paper.claim}",
                f"here: {', '.join(paper.surface)}",
            ]
            for line in details:
                console.print(Padding(line, (0, 0, 0, 6)))
        states = [status(p) for p in papers()]
        console.print(
            f"{len(chosen)} of {len(states)} papers; of all, {states.count('implemented')} implemented, "
            f"{states.count('partial')} in part, {states.count('planned')} planned"
        )
