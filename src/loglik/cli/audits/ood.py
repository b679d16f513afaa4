"""``loglik audit ood``: which texts lie outside what a model was fine-tuned on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import ModelAudit, text_batches
from loglik.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["AuditOOD"]


@dataclass(frozen=True, kw_only=True)
class AuditOOD(ModelAudit):
    """Out-of-distribution scores of texts: fine-tuned against base likelihood, likelihood, perplexity, typicality."""

    base: str | None = None
    """The model before fine-tuning; where MODEL has an adapter, the model without it by default."""
    held_out: str | None = None
    """In-distribution rows that were not trained on: for typicality, and for the threshold."""
    rate: float = 0.05
    """False alarms that the threshold allows on rows like those of --held-out."""
    text_field: str = "text"
    """Column of the text."""
    ood_field: str = "ood"
    """Column that says which texts are out of distribution, if that is known: true or false."""
    normalise: Literal["sum", "token"] = "sum"
    """Scores of the whole text, or per token."""

    def run(self) -> None:
        """Read, score, judge, write."""
        from dataclasses import replace

        from loglik.signals.detection import detector_report
        from loglik.signals.ood import ood_threshold
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_by_class, plot_roc

        audited = self.read()
        texts = audited.texts(self.text_field)
        known = audited.flags(self.ood_field) if audited.has(self.ood_field) else None
        model = self.load()
        base = self.load(self.base) if self.base is not None else None
        inside = None
        if self.held_out is not None:
            kept = replace(self, data=self.held_out).read()
            inside = (kept.texts(self.text_field), kept.names)
        held_out = None if inside is None else self._likelihood(model, *inside)
        scores = self._scores(model, base, held_out, texts, audited.names)
        rows: list[dict[str, Any]] = [
            {name: float(values[i]) for name, values in scores.items()} for i in range(len(texts))
        ]
        summary: dict[str, Any] = {"rows": len(texts), "model": self.model, "base": self.base}
        if inside is not None:
            for name, values in self._scores(model, base, held_out, *inside).items():
                limit = ood_threshold(values, rate=self.rate)
                summary[f"threshold_{name}"] = limit
                for row, value in zip(rows, scores[name].tolist(), strict=True):
                    row[f"{name}_is_out"] = value > limit
        page = AuditPage("Out of distribution", f"{self.data} under {self.model}")
        if known is not None:
            for row, out in zip(rows, known, strict=True):
                row["ood"] = out
            for name, values in scores.items():
                summary[name] = detector_report(values, known).record()
            if self.report is not None:
                page.figure("ROC", plot_roc(scores, known), "How well each score tells texts from outside.")
                best = max(scores, key=lambda name: float(summary[name]["auroc"]))
                label = best.replace("_", " ")
                page.figure("The best score", plot_by_class(scores[best], known, names=("out", "in"), label=label))
        self.finish(audited, rows, summary, page)

    def _likelihood(self, model: Any, texts: list[str], names: list[str]) -> Any:
        import torch

        from loglik.likelihood import LogLikelihood

        with torch.no_grad():
            parts = [model.log_prob(batch) for batch in text_batches(model, texts, names, self.batch_size)]
        value = torch.cat([part.value.cpu() for part in parts])
        return LogLikelihood(value, model.kind, model.unit, torch.cat([part.num_units.cpu() for part in parts]))

    def _scores(
        self, model: Any, base: Any, held_out: Any, texts: list[str], names: list[str]
    ) -> dict[str, torch.Tensor]:
        import torch

        from loglik.progress import bar
        from loglik.signals.ood import ood_scores

        parts: dict[str, list[torch.Tensor]] = {}
        done = 0
        with bar("texts", total=len(texts), unit="rows") as advance:
            for batch in text_batches(model, texts, names, self.batch_size):
                try:
                    found = ood_scores(model, batch, base=base, held_out=held_out, normalise=self.normalise)
                except InputError as error:
                    raise InputError(f"in {names[done]} or one of the rows after it: {error}") from None
                for name, scores in found.items():
                    parts.setdefault(name, []).append(scores.value.cpu())
                done += len(batch)
                advance(len(batch))
        return {name: torch.cat(values).double() for name, values in parts.items()}
