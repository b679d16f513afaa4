"""``loglik audit label-bias``: does a model say yes more often than it should?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from loglik.cli.audits.common import ModelAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.binary_decisions import BinaryProbability
    from loglik.signals.label_bias import LabelBias
    from loglik.signals.pages import AuditPage

__all__ = ["AuditLabelBias"]


@dataclass(frozen=True, kw_only=True)
class AuditLabelBias(ModelAudit):
    """Forced yes/no answers without sampling: shares before and after calibration, and against the right answers."""

    prompt_field: str = "prompt"
    """Column of the prompt, such as "Question: ...? Answer:"."""
    answer_field: str = "answer"
    """Column that says whether yes is right, if that is known: true or false."""
    yes: tuple[str, ...] = ("yes", "Yes", "YES")
    """All forms of yes; none may begin with another."""
    no: tuple[str, ...] = ("no", "No", "NO")
    """All forms of no."""
    separator: str = " "
    """Stands between prompt and answer, and is scored with the answer."""
    content_free: tuple[str, ...] = ()
    """Prompts without content, such as "Question: N/A? Answer:", to calibrate by; without them by the mean over all
    prompts, which assumes that yes is right for half of them."""
    temperature: float = 1.0
    """Of the forced choice."""

    def run(self) -> None:
        """Read, score, calibrate, write."""
        from loglik.signals.label_bias import label_bias
        from loglik.signals.pages import AuditPage

        audited = self.read()
        prompts = audited.texts(self.prompt_field)
        gold = audited.flags(self.answer_field) if audited.has(self.answer_field) else None
        model = self.load()
        found = self._answers(model, prompts, audited.names)
        free = None
        if self.content_free:
            free = self._answers(
                model, self.content_free, [f"--content-free {i + 1}" for i in range(len(self.content_free))]
            )
        report = label_bias(found, gold, content_free=free)
        rows: list[dict[str, Any]] = []
        for i in range(len(prompts)):
            p, calibrated = float(report.raw.probability[i]), float(report.calibrated.probability[i])
            row: dict[str, Any] = {
                "p_yes": p,
                "log_odds": _finite(found.logit[i]),
                "coverage": float(found.coverage[i]),
            }
            row |= {"p_yes_calibrated": calibrated, "says_yes": p > 0.5, "says_yes_calibrated": calibrated > 0.5}
            if gold is not None:
                row |= {"answer": gold[i], "correct": (p > 0.5) == gold[i]}
            rows.append(row)
        page = AuditPage("Label bias", f"{self.data} under {self.model}")
        if self.report is not None:
            _draw(page, report, gold)
        self.finish(audited, rows, {"rows": len(rows), "model": self.model} | _summary(report), page)

    def _answers(self, model: Any, prompts: Sequence[str], names: Sequence[str]) -> BinaryProbability:
        from loglik.signals.binary_decisions import binary_answers, score_forms

        sides = [True] * len(self.yes) + [False] * len(self.no)
        try:
            scores = score_forms(model, prompts, self.yes, self.no, separator=self.separator)
            return binary_answers(scores, sides, temperature=self.temperature)
        except RowError as error:
            raise InputError(f"{names[int((error.row or 'prompt 0').split()[1])]}: {error.reason}") from None


def _finite(odds: Any) -> float | None:
    """Log-odds; nothing where an answer has probability 0."""
    return float(odds) if abs(float(odds)) < float("inf") else None


def _summary(report: LabelBias) -> dict[str, Any]:
    found: dict[str, Any] = {"gold_share": report.gold_share}
    for name, part in (("", report.raw), ("calibrated_", report.calibrated)):
        for field in fields(part):
            if field.name != "probability":
                found[name + {"share": "yes_share", "mean": "mean_p_yes"}.get(field.name, field.name)] = getattr(
                    part, field.name
                )
    found["calibration"] = report.calibration
    found["prior"] = report.prior
    found["auroc"] = report.auroc
    if report.gold_share in (0.0, 1.0):
        found["auroc"] = "undefined: the right answer is always " + ("yes" if report.gold_share else "no")
    found |= {"coverage": report.coverage, "low_coverage": report.low_coverage, "kind": str(report.kind)}
    return {name: value for name, value in found.items() if value is not None}


def _draw(page: AuditPage, report: LabelBias, gold: Sequence[bool] | None) -> None:
    from loglik.signals.answer_plots import plot_probabilities
    from loglik.signals.plots import plot_bars, plot_by_class

    shown = {"as answered": report.raw.probability, f"calibrated ({report.calibration})": report.calibrated.probability}
    page.figure("Probability of yes", plot_probabilities(shown, label="probability of yes"))
    shares = {"says yes": report.raw.share, "says yes, calibrated": report.calibrated.share}
    if report.gold_share is not None:
        shares["yes is right"] = report.gold_share
    page.figure("Share of yes", plot_bars(shares, label="share of rows"))
    if gold is not None and report.auroc is not None:
        drawn = plot_by_class(
            report.raw.probability, gold, names=("yes is right", "no is right"), label="probability of yes"
        )
        page.figure("By the right answer", drawn, "Both classes right of 1/2: the model can tell them, and says yes.")
