"""``loglik audit provenance``: does a model derive from a training run?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, text_batches

if TYPE_CHECKING:
    from loglik.likelihood import LogLikelihood

__all__ = ["AuditProvenance"]


@dataclass(frozen=True, kw_only=True)
class AuditProvenance(ModelAudit):
    """Test whether a model derives from the run that saw DATA in this order: rank correlation, exact p-value."""

    reference: str | None = None
    """An independent model, whose likelihoods remove how hard each text is."""
    text_field: str = "text"
    """Column of the text."""
    order_field: str = "order"
    """Column of the place in the training order; larger is later."""
    repeated: Literal["refuse", "average"] = "refuse"
    """Equal places: refuse them, or average their ranks (texts of one batch)."""
    method: Literal["auto", "exact", "monte_carlo", "asymptotic"] = "auto"
    """Compare with all orders, with random ones, or with Student's t."""
    permutations: int = 9999
    """Random orders."""
    seed: int = 0
    """Of the random orders."""

    def run(self) -> None:
        """Read, score, test, write."""
        import torch

        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_order
        from loglik.signals.provenance import query_test

        audited = self.read()
        texts, order = audited.texts(self.text_field), audited.numbers(self.order_field)
        own = self._likelihood(self.load(), texts, audited)
        other = None
        if self.reference is not None:
            other = self._likelihood(self.load(self.reference), texts, audited)
        found = query_test(
            own,
            torch.tensor(order, dtype=torch.float64),
            reference=other,
            repeated=self.repeated,
            method=self.method,
            permutations=self.permutations,
            seed=self.seed,
        )
        score = own.mean_per_unit().value.double()
        if other is not None:
            score = score - other.mean_per_unit().value.double()
        rows: list[dict[str, Any]] = [
            {"order": place, "log_prob": float(total), "score": float(value)}
            for place, total, value in zip(order, own.value, score, strict=True)
        ]
        summary: dict[str, Any] = {
            "rows": len(texts),
            "model": self.model,
            "reference": self.reference,
            "rank_correlation": found.statistic,
            "p_value": found.p_value,
            "method": found.method,
            "orders": found.orders,
        }
        page = AuditPage("Provenance", f"{self.model} against the training order of {self.data}")
        if self.report is not None:
            label = "nats per token" + (" more than the reference" if other is not None else "")
            caption = "Later data are likelier under a model that derives from the run; red: means of equal parts."
            page.figure("Likelihood and order", plot_order(torch.tensor(order), score, label=label), caption)
        self.finish(audited, rows, summary, page)

    def _likelihood(self, model: Any, texts: list[str], audited: Audited) -> LogLikelihood:
        import torch

        from loglik.likelihood import LogLikelihood
        from loglik.progress import bar

        values, counts = [], []
        with bar("texts", total=len(texts), unit="rows") as advance, torch.no_grad():
            for batch in text_batches(model, texts, audited.names, self.batch_size):
                found = model.log_prob(batch)
                values.append(found.value.cpu())
                counts.append(found.num_units.cpu())
                advance(len(batch))
        return LogLikelihood(torch.cat(values), model.kind, model.unit, torch.cat(counts))
