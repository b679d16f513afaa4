"""``loglik audit choice``: which option does the model choose, and does the normalisation decide it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loglik.cli.audits.common import ModelAudit, rows_named
from loglik.errors import InputError, RowError

__all__ = ["AuditChoice"]


@dataclass(frozen=True, kw_only=True)
class AuditChoice(ModelAudit):
    """Multiple choice by likelihood under every normalisation people use: accuracy, confidence, agreement."""

    question_field: str = "question"
    """Column of the prompt, as the model is to read it."""
    options_field: str = "options"
    """Column of the options: a list of texts."""
    answer_field: str = "answer"
    """Column of the right option's number, from 0, if it is known."""
    separator: str = " "
    """Stands between prompt and option, and is scored with the option."""
    premise: str | None = None
    """What stands in place of the question in the prior (such as "Answer:"), for the PMI scores."""
    alpha: float = 1.0
    """Weight of the prior."""

    def run(self) -> None:
        """Read, score, compare, write."""
        from loglik.signals.calibration import expected_calibration_error, reliability_diagram
        from loglik.signals.choice import score_options
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_reliability
        from loglik.signals.texts import place_in_lists

        audited = self.read()
        questions, options = audited.texts(self.question_field), audited.lists(self.options_field)
        answers = (
            self._answers(audited.numbers(self.answer_field), options, audited.names)
            if audited.has(self.answer_field)
            else None
        )
        model = self.load()
        with rows_named(audited.names):
            try:
                found = score_options(model, questions, options, separator=self.separator, premise=self.premise)
            except RowError as error:
                place = str(error.row)
                if place.startswith("row "):  # of all options in one line
                    place = place_in_lists(place, [len(texts) for texts in options], head="question", item="option")
                raise error.at(place) from None
        plain = ("sum", "token", "byte", "character")
        chosen: dict[str, Any] = {}
        for way in plain:
            chosen[way] = found.choose(normalise=way, alpha=0.0)  # type: ignore[arg-type]
        if self.premise is not None:
            chosen["pmi"] = found.choose(alpha=self.alpha)
        picked = {name: part.choice.tolist() for name, part in chosen.items()}
        rows: list[dict[str, Any]] = []
        for i in range(len(questions)):
            row: dict[str, Any] = {f"choice_{name}": values[i] for name, values in picked.items()}
            row["margin"] = float(chosen["sum"].margin.value[i])
            row["confidence"] = float(chosen["sum"].log_probs[i].max().exp())
            rows.append(row)
        agreement = float(np.mean([len({values[i] for values in picked.values()}) == 1 for i in range(len(questions))]))
        first = np.mean([value == 0 for value in picked["sum"]])
        summary: dict[str, Any] = {
            "rows": len(questions),
            "model": self.model,
            "all_normalisations_agree": agreement,
            "chooses_the_first_option": float(first),
        }
        page = AuditPage("Multiple choice", f"{self.data} under {self.model}")
        if answers is not None:
            right = {name: np.array(values) == np.array(answers) for name, values in picked.items()}
            for i, row in enumerate(rows):
                row |= {"answer": answers[i], "correct": bool(right["sum"][i])}
            summary["first_option_is_right"] = float(np.mean([answer == 0 for answer in answers]))
            for name, hits in right.items():
                summary[f"accuracy_{name}"] = float(hits.mean())
            confidence = np.array([row["confidence"] for row in rows])
            bins = min(10, len(rows))
            summary["ece_sum"] = expected_calibration_error(confidence, right["sum"], bins=bins)
            if self.report is not None:
                diagram = reliability_diagram(confidence, right["sum"], bins=bins)
                page.figure("Reliability of the sum", plot_reliability(diagram))
        self.finish(audited, rows, summary, page)

    def _answers(self, numbers: list[float], options: list[list[str]], names: list[str]) -> list[int]:
        found = []
        for number, texts, name in zip(numbers, options, names, strict=True):
            if number != int(number) or not 0 <= number < len(texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be an option's number from 0 to {len(texts) - 1}, got {number:g}"
                )
            found.append(int(number))
        return found
