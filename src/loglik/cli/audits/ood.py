"""``loglik audit ood``: which texts lie outside what a model was fine-tuned on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import ModelAudit, rows_named
from loglik.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["AuditOOD"]


@dataclass(frozen=True, kw_only=True)
class AuditOOD(ModelAudit):
    """Out-of-distribution scores of texts: fine-tuned against base, likelihood, perplexity, typicality, regret.

    Every score is higher for what is further out. Where it is known which texts are, the summary has AUROC, average
    precision and the false-positive rate at 95 % of them found, with bootstrap intervals.
    """

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
    regret_steps: int = 0
    """Gradient steps per text for the likelihood regret; 0 leaves it out."""
    regret_rate: float = 1e-3
    """Learning rate of those steps."""
    bootstrap: int = 1000
    """Resamples behind the intervals."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Read, score, judge, write."""
        from loglik.signals.detection import detector_report
        from loglik.signals.ood import ood_threshold
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_bars, plot_by_class, plot_roc
        from loglik.signals.texts import require_same_tokens, text_log_probs

        if self.regret_steps < 0:
            raise InputError(f"--regret-steps must be at least 0, got {self.regret_steps}")
        audited = self.read()
        texts = audited.texts(self.text_field)
        known = audited.contrast(self.ood_field) if audited.has(self.ood_field) else None
        inside = None
        if self.held_out is not None:
            kept = self.read(self.held_out)
            inside = (kept.texts(self.text_field), kept.names)
        model = self.load()
        base = self.load(self.base) if self.base is not None else None
        if base is not None:
            require_same_tokens(model, base, texts, names=audited.names, whose="base")
        held_out = None
        if inside is not None:
            held_out = text_log_probs(model, inside[0], names=inside[1], batch_size=self.batch_size)
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
                summary[name] = detector_report(values, known, bootstrap=self.bootstrap, seed=self.seed).record()
            if self.report is not None:
                page.figure("ROC", plot_roc(scores, known), "How well each score tells texts from outside.")
                areas = {name: float(summary[name]["auroc"]) for name in scores}
                spans = {name: (summary[name]["auroc_low"], summary[name]["auroc_high"]) for name in scores}
                page.figure("AUROC", plot_bars(areas, label="AUROC", intervals=spans), "0.5 is chance.")
                best = max(scores, key=lambda name: float(summary[name]["auroc"]))
                label = best.replace("_", " ")
                page.figure("The best score", plot_by_class(scores[best], known, names=("out", "in"), label=label))
        self.finish(audited, rows, summary, page)

    def _scores(
        self, model: Any, base: Any, held_out: Any, texts: list[str], names: list[str]
    ) -> dict[str, torch.Tensor]:
        import torch

        from loglik.progress import bar
        from loglik.signals.ood import likelihood_regret, ood_scores
        from loglik.signals.texts import text_batches

        parts: dict[str, list[torch.Tensor]] = {}
        done = 0
        with bar("texts", total=len(texts), unit="rows") as advance:
            for batch in text_batches(model, texts, names=names, batch_size=self.batch_size):
                with rows_named(names, done):
                    found = ood_scores(model, batch, base=base, held_out=held_out, normalise=self.normalise)
                    if self.regret_steps:
                        found["likelihood_regret"] = likelihood_regret(
                            model,
                            batch,
                            steps=self.regret_steps,
                            learning_rate=self.regret_rate,
                            normalise=self.normalise,
                        )
                for name, scores in found.items():
                    parts.setdefault(name, []).append(scores.value.cpu())
                done += len(batch)
                advance(len(batch))
        return {name: torch.cat(values).double() for name, values in parts.items()}
