"""``loglik audit uncertainty``: how unsure is a model of its answers, and does that tell when they are wrong?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loglik.cli.audits.common import ModelAudit
from loglik.errors import InputError, RowError

__all__ = ["AuditUncertainty"]

# Measures of which a lower value means that the model is surer.
_FALLING = (
    "g_nll",
    "mode_nll",
    "predictive_entropy",
    "length_normalised_entropy",
    "semantic_entropy",
    "discrete_semantic_entropy",
)


@dataclass(frozen=True, kw_only=True)
class AuditUncertainty(ModelAudit):
    """Answer prompts greedily, sample more answers, and measure uncertainty: G-NLL, entropies, semantic entropy."""

    prompt_field: str = "prompt"
    """Column of the prompt."""
    answer_field: str = "answer"
    """Column of the right answer, if it is known; an output is right that begins with it, white space aside."""
    num_samples: int = 10
    """Samples per prompt; 0 for the greedy decode alone."""
    max_tokens: int = 64
    """Longest answer."""
    equivalence: Literal["exact", "embedding"] = "exact"
    """Which answers mean the same: equal ones but for case, articles and punctuation, or those with near embeddings."""
    embedder: str | None = None
    """Directory of a sentence-transformers model for the embeddings; by default they are the mean hidden states of the
    model itself, less those of the prompts."""
    threshold: float = 0.9
    """Least cosine of embeddings that mean the same."""
    seed: int = 0
    """Of the samples."""

    def run(self) -> None:
        """Read, decode, sample, measure, write."""
        from loglik.signals.detection import detector_report
        from loglik.signals.metacognition import risk_coverage_curve
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_risk_coverage, plot_roc

        if self.num_samples < 0 or self.max_tokens < 1:
            raise InputError("--num-samples must be at least 0 and --max-tokens at least 1")
        audited = self.read()
        prompts = audited.texts(self.prompt_field)
        answers = audited.texts(self.answer_field) if audited.has(self.answer_field) else None
        model = self.load()
        rows = self._measure(model, audited.names, prompts)
        measures = [name for name in _FALLING if name in rows[0]]
        summary: dict[str, Any] = {"rows": len(rows), "model": self.model}
        if self.num_samples:
            summary["equivalence"] = self.equivalence
            summary["mean_num_semantic_sets"] = float(np.mean([row["num_semantic_sets"] for row in rows]))
        for name in measures:
            summary[f"mean_{name}"] = float(np.mean([row[name] for row in rows]))
        page = AuditPage("Uncertainty", f"{self.data} answered by {self.model}")
        if answers is not None:
            right = np.array([_same(row["output"], answer) for row, answer in zip(rows, answers, strict=True)])
            for row, answer, hit in zip(rows, answers, right, strict=True):
                row |= {"answer": answer, "correct": bool(hit)}
            summary["accuracy"] = float(right.mean())
            scores = {name: -np.array([row[name] for row in rows]) for name in measures}
            scores["log_prob_per_token"] = np.array([row["log_prob_per_token"] for row in rows])
            if 0 < right.sum() < len(right):
                for name, values in scores.items():
                    summary[name] = detector_report(values, right).record()
            else:
                summary["auroc"] = "undefined: all answers are " + ("right" if right.all() else "wrong")
            if self.report is not None:
                if 0 < right.sum() < len(right):
                    page.figure("ROC", plot_roc(scores, right), "How well each measure tells right answers from wrong.")
                curves = {name: risk_coverage_curve(values, right) for name, values in scores.items()}
                page.figure("Risk and coverage", plot_risk_coverage(curves))
        for row in rows:
            row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        self.finish(audited, rows, summary, page)

    def _measure(self, model: Any, names: list[str], prompts: list[str]) -> list[dict[str, Any]]:
        """The rows of the tables of all batches."""
        from loglik.progress import bar
        from loglik.signals.uncertainty_table import sequence_uncertainty

        equivalence = self._equivalence(model, prompts)
        rows: list[dict[str, Any]] = []
        with bar("prompts", total=len(prompts), unit="rows") as advance:
            for first in range(0, len(prompts), self.batch_size):
                part = prompts[first : first + self.batch_size]
                try:
                    found = sequence_uncertainty(
                        model,
                        part,
                        num_samples=self.num_samples,
                        max_tokens=self.max_tokens,
                        equivalence=equivalence,
                        seed=self.seed,
                    )
                except RowError as error:
                    number = (error.row or "").rpartition(" ")[2]
                    where = names[first + int(number)] if number.isdigit() else names[first]
                    raise InputError(f"{where}: {error.reason}") from None
                except InputError as error:
                    raise InputError(f"in {names[first]} or one of the rows after it: {error}") from None
                rows += found.rows()
                advance(len(part))
        return rows

    def _equivalence(self, model: Any, prompts: list[str]) -> Any:
        """Which answers mean the same."""
        from loglik.signals.equivalence import by_embedding, by_hidden_states, exact_match, sentence_embedder

        if self.equivalence == "exact":
            if self.embedder is not None:
                raise InputError("--embedder is for --equivalence embedding: give both or none")
            return exact_match
        if self.embedder is not None:
            return by_embedding(sentence_embedder(self.embedder), threshold=self.threshold)
        try:
            return by_hidden_states(model, threshold=self.threshold, centre=prompts)
        except RowError as error:
            raise InputError(f"a prompt, read for the embeddings ({error.row}): {error.reason}") from None


def _same(output: str, answer: str) -> bool:
    return " ".join(output.split()).startswith(" ".join(answer.split()))
