"""``loglik audit recalibrate``: which map mends the probabilities of a classifier?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from loglik.cli.audits.common import Audited, RowAudit, check_writable, rows_named
from loglik.errors import InputError

__all__ = ["AuditRecalibrate"]

MapName = Literal["temperature", "vector", "isotonic", "h", "h_nll"]


@dataclass(frozen=True, kw_only=True)
class AuditRecalibrate(RowAudit):
    """Mend class probabilities after training: fit maps on a part of the rows, judge them on the others.

    Before and after each map: negative log-likelihood, Brier score, calibration errors (equal width, equal mass, per
    class), accuracy. The written rows carry the probabilities of one map, which can be saved and applied to new rows.
    """

    scores: Literal["logits", "log_probs", "probs"] = "logits"
    """What the class scores are: logits, log-probabilities or probabilities."""
    scores_field: str | None = None
    """Column of the class scores, a list of numbers per row; the name of what they are by default."""
    label_field: str = "label"
    """Column of the true class, from 0."""
    fit: str | None = None
    """Other rows to fit on; then all rows of DATA are judged."""
    fit_share: float = 0.5
    """Share of DATA to fit on, drawn by lot, without --fit."""
    seed: int = 0
    """Of that lot."""
    maps: tuple[MapName, ...] = ("temperature", "vector", "isotonic", "h")
    """Maps to compare: temperature, vector, isotonic, h (windowed calibration error), h_nll (its map by likelihood)."""
    use: MapName = "temperature"
    """The map whose probabilities are written, drawn and saved."""
    penalty: float = 0.0
    """Of the vector map, where classes are few or separated."""
    window: int = 201
    """Events per window of the h map, odd."""
    steps: int = 300
    """Of fitting the h maps."""
    bins: int = 15
    """Of the calibration errors and the reliability diagrams."""
    save_map: str | None = None
    """Write the fitted map here (.json)."""
    apply: str | None = None
    """Apply a saved map to DATA instead of fitting; labels are then needed only to judge it."""
    features_field: str | None = None
    """Column of a list of numbers per row, for LAME: judged rows, in the order of DATA, also learn from neighbours."""
    lame_batch: int = 64
    """Rows of a batch of LAME."""
    affinity: Literal["knn", "rbf", "linear"] = "knn"
    """Of LAME."""

    def run(self) -> None:
        """Read, fit or load, judge, write."""
        if self.apply is not None and (self.fit is not None or self.save_map is not None):
            raise InputError("--apply uses a saved map as it is: leave --fit and --save-map out")
        if self.apply is None and self.use not in self.maps:
            raise InputError(f"--use {self.use} is not among --maps: add it there")
        if self.save_map is not None:
            check_writable(self.save_map)
        audited = self.read()
        log_probs = self._log_probs(audited)
        if self.apply is not None:
            self._apply(audited, log_probs)
        else:
            self._fit(audited, log_probs)

    def _fit(self, audited: Audited, log_probs: Any) -> None:
        from loglik.signals.calibration import top_label
        from loglik.signals.map_files import save_map
        from loglik.signals.pages import AuditPage
        from loglik.signals.recalibration_audit import compare_recalibrations, make_map, split_rows

        labels = self._labels(audited, log_probs)
        told: dict[str, Any]
        if self.fit is None:
            fitting, judged = split_rows(len(audited), self.fit_share, seed=self.seed)
            data, names = (log_probs[fitting], labels[fitting]), [audited.names[i] for i in fitting]
            told = {"fitted_on": len(fitting), "judged_on": len(judged), "split_seed": self.seed}
        else:
            other = self.read(self.fit)
            judged = np.arange(len(audited))
            data, names = ((values := self._log_probs(other)), self._labels(other, values)), other.names
            told = {"fitted_on": len(other), "judged_on": len(judged), "fit": self.fit}
        with rows_named([audited.names[i] for i in judged]):
            found = compare_recalibrations(
                data,
                (log_probs[judged], labels[judged]),
                {n: make_map(n, penalty=self.penalty, window=self.window, steps=self.steps) for n in self.maps},
                bins=self.bins,
            )
        if self.use not in found.maps:
            with rows_named(names):
                raise InputError(f"--use {self.use} has no map on these rows: {found.refused[self.use]}")
        fitted, mapped = found.maps[self.use], found.maps[self.use].predict_log_proba(log_probs)
        rows = self._rows(log_probs, mapped, labels)
        for i, row in enumerate(rows):
            row["part"] = "judge"
            row["label"] = int(labels[i])
        if self.fit is None:
            for i in fitting:
                rows[i]["part"] = "fit"
        summary: dict[str, Any] = {"rows": len(audited), "classes": log_probs.shape[1], **told, "used": self.use}
        summary["before"] = asdict(found.before)
        for name, figures in found.after.items():
            summary[name] = asdict(figures)
        for name, reason in found.refused.items():
            summary[name] = f"left out: {reason}"  # the row it may name is one of those to fit on
        if self.features_field is not None:
            summary["lame"] = self._lame(audited, found.log_probs[self.use], judged, labels, rows)
        if self.save_map is not None:
            save_map(fitted, self.save_map)
        page = AuditPage("Recalibration", f"{self.data}, {len(judged):,} rows judged")
        if self.report is not None:
            before = top_label(log_probs[judged], labels[judged])
            self._draw(page, summary, before, top_label(found.log_probs[self.use], labels[judged]))
        self.finish(audited, rows, summary, page)

    def _apply(self, audited: Audited, log_probs: Any) -> None:
        from loglik.signals.calibration import top_label
        from loglik.signals.map_files import load_map
        from loglik.signals.pages import AuditPage
        from loglik.signals.recalibration import IsotonicConfidence
        from loglik.signals.recalibration_audit import class_figures

        fitted = load_map(str(self.apply))
        if isinstance(fitted, IsotonicConfidence):
            raise InputError(f"{self.apply} maps single confidences, not class scores: apply another map")
        with rows_named(audited.names):
            mapped = fitted.predict_log_proba(log_probs)
        labels = self._labels(audited, log_probs) if audited.has(self.label_field) else None
        rows = self._rows(log_probs, mapped, labels)
        summary: dict[str, Any] = {"rows": len(audited), "classes": log_probs.shape[1], "applied": self.apply}
        summary["map"] = type(fitted).__name__
        page = AuditPage("Recalibration", f"{self.data} under {self.apply}")
        if labels is not None:
            for row, label in zip(rows, labels.tolist(), strict=True):
                row["label"] = label
            with rows_named(audited.names):
                for name, values in (("before", log_probs), ("after", mapped)):
                    summary[name] = asdict(class_figures(values, labels, bins=self.bins))
        if self.features_field is not None:
            summary["lame"] = self._lame(audited, mapped, np.arange(len(audited)), labels, rows)
        if self.report is not None and labels is not None:
            self._draw(page, summary, top_label(log_probs, labels), top_label(mapped, labels))
        self.finish(audited, rows, summary, page)

    def _log_probs(self, audited: Audited) -> Any:
        from loglik.signals.class_log_probs import class_log_probs

        values = audited.vectors(self.scores if self.scores_field is None else self.scores_field)
        with rows_named(audited.names):
            return class_log_probs(values, self.scores)

    def _labels(self, audited: Audited, log_probs: Any) -> Any:
        from loglik.signals.class_log_probs import checked_log_probs

        with rows_named(audited.names):
            return checked_log_probs(log_probs, audited.whole_numbers(self.label_field))[1]

    def _rows(self, log_probs: Any, mapped: Any, labels: Any) -> list[dict[str, Any]]:
        values, before = mapped.numpy(), np.exp(log_probs.max(1))
        after, chosen = np.exp(values.max(1)), values.argmax(1)
        rows: list[dict[str, Any]] = [
            {"probs": probs, "choice": int(c), "confidence": float(a), "confidence_before": float(b)}
            for probs, c, a, b in zip(np.exp(values).tolist(), chosen, after, before, strict=True)
        ]
        for i, row in enumerate(rows):
            if labels is not None:
                row["correct"] = bool(chosen[i] == labels[i])
        return rows

    def _lame(self, audited: Audited, mapped: Any, judged: Any, labels: Any, rows: list[dict[str, Any]]) -> Any:
        """Figures of LAME on top of the used map, or how many predictions it changed where there are no labels."""
        from loglik.signals.adaptation import lame_stream
        from loglik.signals.recalibration_audit import class_figures

        features = np.array(audited.vectors(str(self.features_field)))[judged]
        with rows_named([audited.names[i] for i in judged]):
            adjusted = lame_stream(mapped, features, batch_size=self.lame_batch, affinity=self.affinity)
            told = {} if labels is None else asdict(class_figures(adjusted, labels[judged], bins=self.bins))
        changed = (adjusted.argmax(1) != mapped.argmax(1)).sum()
        for place, probs in zip(judged, adjusted.exp().tolist(), strict=True):
            rows[place]["lame_probs"] = probs
        for row in rows:
            row.setdefault("lame_probs", None)
        return told | {"changed": int(changed)}

    def _draw(self, page: Any, summary: dict[str, Any], before: Any, after: Any) -> None:
        from loglik.signals.calibration import reliability_diagram
        from loglik.signals.plots import plot_bars, plot_reliability

        for heading, pair in (("Before", before), ("After", after)):
            diagram = reliability_diagram(*pair, bins=self.bins)
            page.figure(heading, plot_reliability(diagram), "On the line, confidences are what they say.")
        judged = {name: value for name, value in summary.items() if isinstance(value, dict) and "nll" in value}
        for key, label in (("ece", "calibration error"), ("nll", "negative log-likelihood, nats")):
            page.figure(label.capitalize(), plot_bars({n: figures[key] for n, figures in judged.items()}, label=label))
