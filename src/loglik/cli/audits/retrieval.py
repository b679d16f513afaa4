"""``loglik audit retrieval``: which candidate belongs to a query, or which sentence caused it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from loglik.cli.audits.common import Audited, ModelAudit, rows_named
from loglik.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from loglik.signals.pages import AuditPage
    from loglik.signals.retrieval import RetrievalMetrics

__all__ = ["AuditRetrieval"]

_MOST_QUERIES = 30  # of the heat map


@dataclass(frozen=True, kw_only=True)
class AuditRetrieval(ModelAudit):
    """Rank candidates by likelihood of the query, of the candidate, of both; or find the sentence behind a query."""

    query_field: str = "query"
    """Column of the query."""
    candidates_field: str = "candidates"
    """Column of the candidates: a list of texts; with --backtrace the sentences of the document in order."""
    relevant_field: str = "relevant"
    """Column of the right candidate's number, from 0, or of a list of numbers, if that is known."""
    backtrace: bool = False
    """Candidates are sentences of one document: score each by what it does for the likelihood of the query."""
    separator: str = "\n"
    """Stands between query and candidate, and is not scored."""
    joiner: str = " "
    """Stands between the sentences of a document."""
    query_label: str = ""
    """Stands before the query, such as "Question: "."""
    candidate_label: str = ""
    """Stands before the candidate or the document, such as "Text: "."""
    premise: str | None = None
    """What the candidate's prior is conditioned on; the prompt without its query by default."""
    alpha: float = 1.0
    """Weight of the candidate's prior. Choose it on rows that you do not report."""
    weight: float = 0.5
    """Share of the query's likelihood in the bidirectional score, from 0 to 1. Choose it likewise."""
    normalise: Literal["token", "sum"] = "token"
    """Likelihoods per token (as published), or of whole texts."""
    k: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K ...")] = (1, 3, 10)
    """How many of the best candidates accuracy, recall and nDCG look at."""
    overflow: Literal["error", "window"] = "error"
    """A prompt longer than the context is refused, or read in windows."""
    bootstrap: int = 2000
    """Resamples of the queries behind each interval."""
    seed: int = 0
    """Of the resampling."""

    def run(self) -> None:
        """Read, score, rank, write."""
        from loglik.signals.pages import AuditPage
        from loglik.signals.reranking import agreement

        if not self.k or min(self.k) < 1:
            raise InputError(f"--k must be whole numbers of at least 1, got {list(self.k)}")
        audited = self.read()
        queries, candidates = audited.texts(self.query_field), audited.lists(self.candidates_field)
        for name, texts in zip(audited.names, candidates, strict=True):
            if len(texts) < 2:
                raise InputError(
                    f"{name}: {self.candidates_field} must have at least two texts to rank, got {len(texts)}"
                )
        relevant = self._relevant(audited, candidates) if audited.has(self.relevant_field) else None
        scores, kinds = self._scores(audited, queries, candidates)
        rows = _rows(scores)
        summary: dict[str, Any] = {"rows": len(queries), "model": self.model, "kinds": kinds}
        page = AuditPage("Backtracing" if self.backtrace else "Retrieval", f"{self.data} under {self.model}")
        if relevant is not None:
            self._judge(scores, relevant, rows, summary, page)
        if self.report is not None:
            from loglik.signals.plots import plot_heat_map

            if self.backtrace:
                self._map(queries, candidates, scores, page)
            names = list(scores)
            page.figure(
                "Agreement",
                plot_heat_map(agreement(scores), rows=names, columns=names, label="share of queries"),
                "How often two scores put the same candidate first.",
            )
        self.finish(audited, rows, summary, page)

    def _scores(
        self, audited: Audited, queries: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
        """For each scorer and query (C,) scores, and what kind they are."""
        from loglik.progress import bar
        from loglik.signals.reranking import score_pairs, score_segments, word_likelihood

        model = self.load()
        scores: dict[str, list[Tensor]] = {}
        kinds: dict[str, str] = {}
        with rows_named(audited.names):
            words = word_likelihood(queries, candidates)
        with bar("queries", total=len(queries), unit="rows") as advance:
            for first in range(0, len(queries), self.batch_size):
                part = slice(first, first + self.batch_size)
                with rows_named(audited.names[part]):
                    if self.backtrace:
                        traced = score_segments(
                            model,
                            queries[part],
                            candidates[part],
                            separator=self.separator,
                            joiner=self.joiner,
                            query_label=self.query_label,
                            segment_label=self.candidate_label,
                            overflow=self.overflow,
                        )
                        found = {name: [one.value for one in each] for name, each in traced.items()}
                        kinds |= {name: str(each[0].kind) for name, each in traced.items()}
                    else:
                        pairs = score_pairs(
                            model,
                            queries[part],
                            candidates[part],
                            separator=self.separator,
                            query_label=self.query_label,
                            candidate_label=self.candidate_label,
                            premise=self.premise,
                            overflow=self.overflow,
                        )
                        ranked = pairs.scores(alpha=self.alpha, weight=self.weight, normalise=self.normalise)
                        found = {name: pairs.by_query(one.value) for name, one in ranked.items()}
                        kinds |= {name: str(one.kind) for name, one in ranked.items()}
                for name, values in found.items():
                    scores.setdefault(name, []).extend(values)
                advance(len(queries[part]))
        # The collection is that of all rows, whatever the batches are. What others are compared with stands first.
        return {"words": [one.value for one in words]} | {n: v for n, v in scores.items() if n != "words"}, kinds

    def _judge(
        self,
        scores: Mapping[str, list[Tensor]],
        relevant: list[Tensor],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: AuditPage,
    ) -> None:
        """Metrics of each scorer, into the rows, the summary and the page."""
        from loglik.signals.plots import plot_bars
        from loglik.signals.reranking import compare_rankers
        from loglik.signals.retrieval import backtracing_distance, retrieval_metrics

        metrics: dict[str, RetrievalMetrics] = {
            name: retrieval_metrics(values, relevant, k=self.k) for name, values in scores.items()
        }
        compared: dict[str, dict[str, float]] = compare_rankers(metrics, resamples=self.bootstrap, seed=self.seed)
        for i, row in enumerate(rows):
            row["relevant"] = relevant[i].nonzero().flatten().tolist()
            row |= {f"rank_{name}": float(found.rank[i]) for name, found in metrics.items()}
        main = ("mrr", f"accuracy_at_{self.k[0]}")  # the figures that are given with intervals and gains
        for name, found in compared.items():
            kept = {key: value for key, value in found.items() if key in metrics[name].per_query()}
            spread = {key: value for key, value in found.items() if key not in kept and key.startswith(main)}
            summary[name] = kept | {"mean_rank": float(metrics[name].rank.mean())} | spread
        if self.backtrace:
            for name, values in scores.items():
                distances = backtracing_distance(values, relevant, k=self.k)
                summary[name] |= {f"distance_at_{k}": float(found.mean()) for k, found in distances.items()}
        if self.report is not None:
            for figure in ("mrr", f"accuracy_at_{self.k[0]}", f"ndcg_at_{self.k[-1]}"):
                spans = {
                    name: (found[f"{figure}_low"], found[f"{figure}_high"])
                    for name, found in compared.items()
                    if f"{figure}_low" in found
                }
                bars = {name: found[figure] for name, found in compared.items()}
                page.figure(
                    figure.replace("_", " "), plot_bars(bars, label=figure, intervals=spans), "With 95 % intervals."
                )

    def _map(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
        scores: Mapping[str, list[Tensor]],
        page: AuditPage,
    ) -> None:
        """Queries of the first document against its sentences."""
        import torch

        from loglik.signals.plots import plot_heat_map

        same = [i for i, segments in enumerate(documents) if segments == documents[0]][:_MOST_QUERIES]
        for name in ("single", "leave_one_out"):
            table = torch.stack([scores[name][i] for i in same])
            if not bool(torch.isfinite(table).any()):
                continue
            drawn = plot_heat_map(
                table.masked_fill(torch.isinf(table), torch.nan),  # an empty cell
                rows=[queries[i] for i in same],
                columns=[f"{t}: {text}" for t, text in enumerate(documents[0])],
                label="nats per token",
                diverging=name == "leave_one_out",
            )
            page.figure(f"Queries and sentences, {name.replace('_', ' ')}", drawn, "The first document.")

    def _relevant(self, audited: Audited, candidates: Sequence[Sequence[str]]) -> list[Tensor]:
        """(C,) bool of each row."""
        import torch

        found = []
        for (name, record), texts in zip(audited.pairs(), candidates, strict=True):
            given = record[self.relevant_field]
            numbers = given if isinstance(given, list) else [given]
            whole = all(
                isinstance(n, int | float) and not isinstance(n, bool) and float(n).is_integer() for n in numbers
            )
            if not numbers or not whole or not all(0 <= n < len(texts) for n in numbers):
                raise InputError(
                    f"{name}: {self.relevant_field} must be a candidate's number from 0 to {len(texts) - 1}, or a list "
                    f"of such numbers that is not empty, got {given!r}"
                )
            mask = torch.zeros(len(texts), dtype=torch.bool)
            mask[[int(n) for n in numbers]] = True
            found.append(mask)
        return found


def _rows(scores: Mapping[str, list[Tensor]]) -> list[dict[str, Any]]:
    """The best candidate and all scores of each query."""
    count = len(next(iter(scores.values())))
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {f"best_{name}": int(values[i].argmax()) for name, values in scores.items()}
        rows.append(row | {f"scores_{name}": values[i].tolist() for name, values in scores.items()})
    return rows
