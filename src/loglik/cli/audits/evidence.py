"""``loglik audit evidence``: which answer over several passages, by each way to combine probabilities?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, rows_named
from loglik.errors import InputError

if TYPE_CHECKING:
    from loglik.signals.reading import EvidencePrompts

__all__ = ["AuditEvidence"]


@dataclass(frozen=True, kw_only=True)
class AuditEvidence(ModelAudit):
    """Answer questions over passages: without them, by the best, by the RAG sum, noisy channel, product of experts."""

    question_field: str = "question"
    """Column of the question."""
    passages_field: str = "passages"
    """Column of the passages: a list of texts."""
    similarity_field: str = "similarity"
    """Column of the passages' similarities to the question: a list of numbers; equal where there is none."""
    candidates_field: str = "candidates"
    """Column of candidate answers: a list of texts; the greedy answer to each passage where there is none."""
    answer_field: str = "answer"
    """Column of the right answer, or of a list of right answers, if that is known."""
    temperature: float | None = None
    """Of a softmax over similarities; their shares by default."""
    prompts: str | None = None
    """A .json file with texts for direct, question, answer, evidence, closed: what stands before what is scored."""
    weights: str | None = None
    """Weights of the product, such as "direct=1,question=0.5,retrieval=1,answer=0"."""
    folds: int = 0
    """Fit the weights too, and choose for each of so many parts by weights fitted on the others; 0: do not."""
    verbatim: bool = False
    """Compare answers as they stand, not without case, punctuation and articles."""
    max_tokens: int = 32
    """Longest greedy answer."""
    overflow: Literal["error", "window"] = "error"
    """A prompt longer than the context is refused, or read in windows."""
    bootstrap: int = 2000
    """Resamples of the questions behind each interval."""
    seed: int = 0
    """Of the folds and the resampling."""

    def run(self) -> None:
        """Read, score, choose, compare, write."""
        from loglik.progress import bar
        from loglik.signals.evidence import normalise_answer
        from loglik.signals.evidence_choice import agreement, choose_answers, cross_fit_product, join
        from loglik.signals.pages import AuditPage
        from loglik.signals.reading import decode_answers, score_evidence

        prompts, weights = self._prompts(), self._weights()
        audited = self.read()
        questions, passages = audited.texts(self.question_field), audited.lists(self.passages_field)
        for name, texts in zip(audited.names, passages, strict=True):
            if not texts:
                raise InputError(f"{name}: {self.passages_field} must have at least one text")
        similarity = self._similarity(audited, passages) if audited.has(self.similarity_field) else None
        given = audited.lists(self.candidates_field) if audited.has(self.candidates_field) else None
        gold = self._gold(audited) if audited.has(self.answer_field) else None
        if self.folds and gold is None:
            raise InputError(f"--folds fits weights to right answers: give a column {self.answer_field}")
        model = self.load()
        same: Callable[[str], str] = str.strip if self.verbatim else normalise_answer
        tables = []
        with bar("questions", total=len(questions), unit="rows") as advance:
            for first in range(0, len(questions), self.batch_size):
                part = slice(first, first + self.batch_size)
                with rows_named(audited.names[part]):
                    answers = (
                        decode_answers(
                            model, questions[part], passages[part], prompts=prompts, max_tokens=self.max_tokens
                        )
                        if given is None
                        else given[part]
                    )
                    tables.append(
                        score_evidence(
                            model,
                            questions[part],
                            passages[part],
                            answers,
                            similarity=None if similarity is None else similarity[part],
                            temperature=self.temperature,
                            prompts=prompts,
                            overflow=self.overflow,
                        )
                    )
                advance(len(questions[part]))
        table = join(tables)
        summary: dict[str, Any] = {"rows": len(questions), "model": self.model}
        with rows_named(audited.names):
            chosen = choose_answers(table, weights=weights, normalise=same)
            if self.folds and gold is not None:
                fitted = cross_fit_product(table, gold, folds=self.folds, normalise=same, seed=self.seed)
                chosen["fitted_product"] = fitted.answers
                summary["fitted_weights"] = fitted.weights
        rows: list[dict[str, Any]] = [
            {f"choice_{name}": answers[i] for name, answers in chosen.items()} for i in range(len(questions))
        ]
        page = AuditPage("Answers over evidence", f"{self.data} under {self.model}")
        if gold is not None:
            self._judge(chosen, [{same(text) for text in texts} for texts in gold], rows, summary, page)
        if self.report is not None:
            from loglik.signals.plots import plot_heat_map

            names = list(chosen)
            drawn = plot_heat_map(agreement(chosen), rows=names, columns=names, label="share of questions")
            page.figure("Agreement", drawn, "How often two scores choose the same answer.")
        self.finish(audited, rows, summary, page)

    def _judge(
        self,
        chosen: dict[str, tuple[str, ...]],
        right: list[set[str]],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """Exact match of each score, into the rows, the summary and the page."""
        from loglik.cli.audits.shares import add_shares

        hits = {
            name: [answer in good for answer, good in zip(answers, right, strict=True)]
            for name, answers in chosen.items()
        }
        for i, row in enumerate(rows):
            row |= {f"correct_{name}": found[i] for name, found in hits.items()}
        shown = None if self.report is None else page
        add_shares(hits, summary, shown, name="exact_match", resamples=self.bootstrap, seed=self.seed)

    def _similarity(self, audited: Audited, passages: Sequence[Sequence[str]]) -> list[list[float]]:
        found = []
        for (name, record), texts in zip(audited.pairs(), passages, strict=True):
            values = record[self.similarity_field]
            fits = isinstance(values, list) and all(
                isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
            )
            if not fits:
                raise InputError(f"{name}: {self.similarity_field} must be a list of finite numbers, got {values!r}")
            if len(values) != len(texts):
                raise InputError(f"{name}: {self.similarity_field} has {len(values)} numbers for {len(texts)} passages")
            found.append([float(v) for v in values])
        return found

    def _gold(self, audited: Audited) -> list[list[str]]:
        found = []
        for name, record in audited.pairs():
            value = record[self.answer_field]
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be a text, or a list of texts, that is not empty, got {value!r}"
                )
            found.append(texts)
        return found

    def _prompts(self) -> EvidencePrompts:
        from loglik.signals.reading import EvidencePrompts

        if self.prompts is None:
            return EvidencePrompts()
        try:
            given = json.loads(Path(self.prompts).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"--prompts {self.prompts} cannot be read as JSON: check the path and the file") from None
        names = EvidencePrompts.__slots__
        if not isinstance(given, dict) or not set(given) <= set(names):
            raise InputError(f"--prompts {self.prompts} must be an object with some of {', '.join(names)}")
        return EvidencePrompts(**given)

    def _weights(self) -> dict[str, float] | None:
        if self.weights is None:
            return None
        found = {}
        for part in self.weights.split(","):
            name, _, number = part.partition("=")
            try:
                found[name.strip()] = float(number)
            except ValueError:
                raise InputError(f"--weights must look like direct=1,question=0.5, got {self.weights!r}") from None
        return found
