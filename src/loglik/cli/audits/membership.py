"""``loglik audit membership``: was this text in the training data?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loglik.cli.audits.common import ModelAudit, rows_named

if TYPE_CHECKING:
    import torch

__all__ = ["AuditMembership"]


@dataclass(frozen=True, kw_only=True)
class AuditMembership(ModelAudit):
    """Membership scores of texts (loss, zlib, Min-K%, Min-K%++, reference ratio), and how well they tell members.

    Every score is higher for members. Where it is known which texts were trained on, the summary has AUROC, average
    precision, the false-positive rate at 95 % of the members found, with bootstrap intervals.
    """

    reference: str | None = None
    """A model that did not see the texts, for the ratio."""
    text_field: str = "text"
    """Column of the text."""
    member_field: str = "member"
    """Column that says which texts were in the training data, if that is known: true or false."""
    k: float = 0.2
    """Share of the least likely tokens in Min-K% and Min-K%++."""
    lowercase: bool = False
    """Also compare with the text in lower case: one more reading of each text."""
    bootstrap: int = 1000
    """Resamples behind the intervals."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Read, score, judge, write."""
        import torch

        from loglik.progress import bar
        from loglik.signals.detection import detector_report
        from loglik.signals.membership import membership_scores
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_bars, plot_by_class, plot_roc
        from loglik.signals.texts import text_batches

        audited = self.read()
        texts = audited.texts(self.text_field)
        known = audited.contrast(self.member_field) if audited.has(self.member_field) else None
        model = self.load()
        reference = self.load(self.reference) if self.reference is not None else None
        batches = list(text_batches(model, texts, names=audited.names, batch_size=self.batch_size))
        other: list[Any] = [None] * len(batches)
        if reference is not None:
            other = list(text_batches(reference, texts, names=audited.names, batch_size=self.batch_size))
        lowered: list[Any] = [None] * len(batches)
        if self.lowercase:
            small = [text.lower() for text in texts]
            lowered = list(text_batches(model, small, names=audited.names, batch_size=self.batch_size))
        parts: dict[str, list[torch.Tensor]] = {}
        done = 0
        with bar("texts", total=len(texts), unit="rows") as advance:
            for batch, reference_batch, lower in zip(batches, other, lowered, strict=True):
                with rows_named(audited.names, done):
                    found = membership_scores(
                        model,
                        batch,
                        texts=texts[done : done + len(batch)],
                        lowered=lower,
                        reference=reference,
                        reference_batch=reference_batch,
                        k=self.k,
                    )
                for name, measured in found.items():
                    parts.setdefault(name, []).append(measured.value.cpu())
                done += len(batch)
                advance(len(batch))
        scores = {name: torch.cat(values).double() for name, values in parts.items()}
        rows: list[dict[str, Any]] = [
            {name: float(values[i]) for name, values in scores.items()} for i in range(len(texts))
        ]
        summary: dict[str, Any] = {"rows": len(texts), "model": self.model, "reference": self.reference}
        page = AuditPage("Membership", f"{self.data} under {self.model}")
        if known is not None:
            for row, member in zip(rows, known, strict=True):
                row["member"] = member
            for name, values in scores.items():
                summary[name] = detector_report(values, known, bootstrap=self.bootstrap, seed=self.seed).record()
            if self.report is not None:
                page.figure("ROC", plot_roc(scores, known), "How well each score tells members from others.")
                areas = {name: float(summary[name]["auroc"]) for name in scores}
                spans = {name: (summary[name]["auroc_low"], summary[name]["auroc_high"]) for name in scores}
                page.figure("AUROC", plot_bars(areas, label="AUROC", intervals=spans), "0.5 is chance.")
                best = max(scores, key=lambda name: float(summary[name]["auroc"]))
                drawn = plot_by_class(scores[best], known, names=("members", "others"), label=best.replace("_", " "))
                page.figure("The best score", drawn)
        self.finish(audited, rows, summary, page)
