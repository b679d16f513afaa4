"""``loglik audit calibration``: are confidences what they say?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loglik.cli.audits.common import RowAudit, rows_named

__all__ = ["AuditCalibration"]


@dataclass(frozen=True, kw_only=True)
class AuditCalibration(RowAudit):
    """Judge confidences by whether the answers were right: calibration error, Brier score, risk against coverage."""

    confidence_field: str = "confidence"
    """Column of the probability that the answer is right, in [0, 1]."""
    correct_field: str = "correct"
    """Column that says whether it was: true or false, or 1 and 0."""
    bins: int = 15
    """Of the calibration error and the reliability diagram."""
    scheme: Literal["width", "mass"] = "width"
    """Bins of equal width, or with equally many rows."""
    bootstrap: int = 1000
    """Resamples of rows behind the intervals; 0 leaves the intervals out."""
    seed: int = 0
    """Of the resamples."""

    def run(self) -> None:
        """Read, judge, write."""
        from loglik.signals.calibration import (
            brier_decomposition,
            brier_score,
            expected_calibration_error,
            reliability_diagram,
        )
        from loglik.signals.metacognition import calibration_report, risk_coverage_curve, wrong_at_confidence
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_reliability, plot_risk_coverage

        audited = self.read()
        confidence = np.array(audited.numbers(self.confidence_field))
        correct = np.array(audited.flags(self.correct_field))
        with rows_named(audited.names):
            parts = brier_decomposition(confidence, correct, bins=self.bins, scheme=self.scheme)
        curve = risk_coverage_curve(confidence, correct)
        summary: dict[str, Any] = {
            "rows": len(audited),
            "accuracy": float(correct.mean()),
            "mean_confidence": float(confidence.mean()),
            "ece": expected_calibration_error(confidence, correct, bins=self.bins, scheme=self.scheme),
            "brier": brier_score(confidence, correct),
            "reliability": parts.reliability,
            "resolution": parts.resolution,
            "uncertainty": parts.uncertainty,
            "aurc": curve.aurc,
            "excess_aurc": curve.excess,
        }
        for at in wrong_at_confidence(confidence, correct):
            summary[f"wrong_at_{at.threshold:g}"] = at.rate
        if self.bootstrap:
            report = calibration_report(
                confidence, correct, bins=self.bins, scheme=self.scheme, bootstrap=self.bootstrap, seed=self.seed
            )
            summary |= {name: value for name, value in report.record().items() if name.endswith(("_low", "_high"))}
            summary |= {"level": report.level, "bootstrap": report.bootstrap}
        page = AuditPage("Calibration", f"{self.data}, {len(audited):,} rows")
        if self.report is not None:
            diagram = reliability_diagram(confidence, correct, bins=self.bins, scheme=self.scheme)
            page.figure("Reliability", plot_reliability(diagram), "On the line, confidences are what they say.")
            page.figure("Risk and coverage", plot_risk_coverage({"confidence": curve}))
        rows = [{"confidence": c, "correct": bool(y)} for c, y in zip(confidence.tolist(), correct, strict=True)]
        self.finish(audited, rows, summary, page)
