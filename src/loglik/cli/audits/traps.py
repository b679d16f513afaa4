"""``loglik audit traps``: was a model trained on documents that traps were put into?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loglik.cli.audits.common import ModelAudit, rows_named
from loglik.errors import InputError

__all__ = ["AuditTraps"]


@dataclass(frozen=True, kw_only=True)
class AuditTraps(ModelAudit):
    """Test traps that were published against traps that never were: likelihood ratio, AUROC, AUROC by repetitions.

    Which traps were published must have been drawn by lot, as `loglik audit make-traps` does; then the p-values are
    exact for any model.
    """

    reference: str | None = None
    """A model that saw no trap, such as the one that drew them: gives the ratio, the strongest score."""
    text_field: str = "text"
    """Column of the trap."""
    repetitions_field: str = "repetitions"
    """Column that says how often it was put into a document; 0 for a trap that was never published."""
    context_field: str = "context"
    """Column of the text before the trap in its document, if that is known; it is read and not scored."""
    k: float = 0.2
    """Share of the least likely tokens in Min-K%."""
    bootstrap: int = 1000
    """Resamples behind the intervals."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Read, score, test, write."""
        import torch

        from loglik.signals.detection import detector_report
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_by_class, plot_lines, plot_roc
        from loglik.signals.trap_scores import trap_scores
        from loglik.signals.traps import repetition_curve, trap_test

        audited = self.read()
        texts, times = audited.texts(self.text_field), audited.whole_numbers(self.repetitions_field)
        self._check(audited.names, times)
        contexts = audited.texts(self.context_field) if audited.has(self.context_field) else None
        own = self._likelihood(self.model, texts, contexts, audited.names)
        other = None
        if self.reference is not None:
            other = self._likelihood(self.reference, texts, contexts, audited.names)
        with rows_named(audited.names):
            found = trap_scores(own, other, k=self.k)
        scores = {name: score.value.double() for name, score in found.items()}
        repetitions = torch.tensor(times)
        used = repetitions > 0
        main = "ratio" if other is not None else "loss"
        summary: dict[str, Any] = {
            "traps": int(used.sum()),
            "unused": int((~used).sum()),
            "model": self.model,
            "reference": self.reference,
            "score": main,
            "p_value": trap_test(scores[main][used], scores[main][~used]).p_value,
        }
        curves = {}
        for name, values in scores.items():
            summary[name] = detector_report(values, used, bootstrap=self.bootstrap, seed=self.seed).record()
            summary[name]["p_value"] = trap_test(values[used], values[~used]).p_value
            curves[name] = repetition_curve(values, repetitions, bootstrap=self.bootstrap, seed=self.seed)
        summary["auroc_by_repetitions"] = {
            name: {str(count): report.auroc.value for count, report in curve.items()} for name, curve in curves.items()
        }
        each = iter(trap_test(scores[main][used], scores[main][~used]).p_values.tolist())
        rows: list[dict[str, Any]] = []
        for i, count in enumerate(times):
            row: dict[str, Any] = {"repetitions": count}
            row |= {name: float(values[i]) for name, values in scores.items()}
            rows.append(row | {"p_value": next(each) if count else None})
        page = AuditPage("Traps", f"{self.data} under {self.model}")
        if self.report is not None:
            page.figure("ROC", plot_roc(scores, used), "How well each score tells published traps from unused ones.")
            drawn = {
                name: (list(curve), [report.auroc.value for report in curve.values()]) for name, curve in curves.items()
            }
            caption = "The loss of the reference, which saw no trap, must stay near 0.5." if other is not None else ""
            page.figure("AUROC by repetitions", plot_lines(drawn, x_label="repetitions", y_label="AUROC"), caption)
            label = f"{main} (nats per token)"
            page.figure("The score", plot_by_class(scores[main], used, names=("published", "unused"), label=label))
        self.finish(audited, rows, summary, page)

    def _check(self, names: list[str], times: list[int]) -> None:
        below = [name for name, count in zip(names, times, strict=True) if count < 0]
        if below:
            raise InputError(f"{below[0]}: {self.repetitions_field} must not be negative; 0 is a trap never published")
        if not any(times) or all(times):
            which = "published" if all(times) else "unused"
            raise InputError(
                f"AUROC is undefined with one class only, and all {len(times)} traps are {which}: give published traps "
                "and ones with 0 repetitions"
            )

    def _likelihood(self, model: str, texts: list[str], contexts: list[str] | None, names: list[str]) -> Any:
        from loglik.progress import bar
        from loglik.signals.texts import text_log_probs

        loaded = self.load(model)
        with bar("traps", total=len(texts), unit="rows") as advance:
            return text_log_probs(loaded, texts, contexts, names=names, batch_size=self.batch_size, advance=advance)
