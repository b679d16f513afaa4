"""``loglik audit self-knowledge``: does the model know which answers are right, and which questions it can answer?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loglik.cli.audits.common import Audited, ModelAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.p_ik import HeldOutPIK

__all__ = ["AuditSelfKnowledge"]


@dataclass(frozen=True, kw_only=True)
class AuditSelfKnowledge(ModelAudit):
    """Ask the model whether proposed answers are true, P(True), and fit a probe of what it knows, P(IK)."""

    question_field: str = "question"
    """Column of the question."""
    answer_field: str = "answer"
    """Column of the proposed answer."""
    ideas_field: str = "ideas"
    """Column of other answers to the question, a list of texts, if there are any: P(True) is asked with and without
    showing them."""
    correct_field: str = "correct"
    """Column that says whether the proposed answer is right, if that is known."""
    num_samples: int = 0
    """Draw so many answers of the model as ideas, where the rows have none (the paper shows 5)."""
    prompt: str = "Question: {question}\nAnswer:"
    """What the model continues to draw ideas; the first line of each continuation is kept."""
    max_tokens: int = 32
    """Longest idea that is drawn."""
    swapped: bool = False
    """Also ask with the option "False" first: how much does the answer depend on the order?"""
    demonstrations: str | None = None
    """Rows of question, answer and correct that stand before every prompt, solved (the paper shows about 20)."""
    temperature: float = 1.0
    """Divides the log-odds of P(True); it changes calibration and no decision."""
    threshold: float = 0.5
    """Answers with P(True) of at least this are trusted."""
    bins: int = 10
    """Of the calibration error and the reliability diagrams, of equal width."""
    bootstrap: int = 1000
    """Resamples behind the intervals."""
    probe: bool = False
    """Fit P(IK) on hidden states of questions: needs several rows per question, with answers drawn from the model and
    their correctness."""
    probe_share: float = 0.5
    """Share of the questions that the probe is fitted on; it is judged on the others."""
    probe_c: float = 1.0
    """Inverse strength of the probe's regularisation."""
    seed: int = 0
    """Of the drawn ideas, the probe's split and the bootstrap."""

    def run(self) -> None:
        """Read, ask, probe, judge, write."""
        from loglik.signals.p_true import PTrueTemplate, p_true
        from loglik.signals.pages import AuditPage

        audited = self.read()
        questions, answers = audited.texts(self.question_field), audited.texts(self.answer_field)
        correct = audited.flags(self.correct_field) if audited.has(self.correct_field) else None
        self._check(correct, questions)
        shown = self._solved()
        model = self.load()
        ideas = self._ideas(model, audited, questions)
        asked: dict[str, tuple[Any, Any]] = {"p_true": (None, PTrueTemplate())}
        if ideas is not None:
            asked["p_true_with_ideas"] = (ideas, PTrueTemplate())
        if self.swapped:
            asked["p_true_swapped"] = (None, PTrueTemplate().swapped())
        rows: list[dict[str, Any]] = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        for name, (own, template) in asked.items():
            try:
                found = p_true(
                    model,
                    questions,
                    answers,
                    ideas=own,
                    template=template,
                    demonstrations=shown,
                    temperature=self.temperature,
                )
            except RowError as error:
                raise _named(error, audited.names) from None
            columns = {
                name: found.probability,
                f"{name}_log_odds": found.log_odds,
                f"{name}_raw": found.raw,
                f"{name}_coverage": found.coverage,
            }
            for column, measured in columns.items():
                for row, value in zip(rows, measured.value.tolist(), strict=True):
                    row[column] = value
            for row in rows:
                row["kind"] = str(found.probability.kind)
        for row, own_ideas in zip(rows, ideas if ideas is not None else [], strict=ideas is not None):
            row["ideas"] = own_ideas
        summary: dict[str, Any] = {"rows": len(rows), "model": self.model}
        for name in asked:
            summary[f"mean_{name}"] = float(np.mean([row[name] for row in rows]))
            summary[f"mean_{name}_coverage"] = float(np.mean([row[f"{name}_coverage"] for row in rows]))
        if self.swapped:
            summary["mean_change_by_order"] = float(np.mean([abs(r["p_true"] - r["p_true_swapped"]) for r in rows]))
        page = AuditPage("Self-knowledge", f"{self.data} judged by {self.model}")
        if correct is not None:
            for row, hit in zip(rows, correct, strict=True):
                row["correct"] = hit
            self._judge({name: np.array([row[name] for row in rows]) for name in asked}, correct, summary, page)
        if self.probe:
            assert correct is not None
            self._probe(model, audited.names, questions, correct, rows, summary, page)
        self.finish(audited, rows, summary, page)

    def _check(self, correct: list[bool] | None, questions: list[str]) -> None:
        """Refuse what would be refused only after the model has read everything."""
        if self.num_samples < 0 or self.max_tokens < 1:
            raise InputError("--num-samples must be at least 0 and --max-tokens at least 1")
        if "{question}" not in self.prompt:
            raise InputError(f"--prompt must have {{question}} in it, got {self.prompt!r}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold must lie in [0, 1], got {self.threshold}")
        if self.bins < 1 or self.bootstrap < 1:
            raise InputError("--bins and --bootstrap must be at least 1")
        if correct is not None and len(correct) < self.bins:
            raise InputError(f"{len(correct)} rows are fewer than --bins {self.bins}: give more rows or fewer bins")
        if self.probe:
            if correct is None:
                raise InputError(
                    f"--probe needs to know which answers are right: give every row a {self.correct_field} column"
                )
            if len(set(questions)) < 2:
                raise InputError("--probe needs at least two questions: it is fitted on some and judged on others")

    def _solved(self) -> list[tuple[str, str, bool]]:
        if self.demonstrations is None:
            return []
        read = replace(self, data=self.demonstrations, on_error="stop").read()
        columns = read.texts(self.question_field), read.texts(self.answer_field), read.flags(self.correct_field)
        return list(zip(*columns, strict=True))

    def _ideas(self, model: Any, audited: Audited, questions: list[str]) -> list[list[str]] | None:
        """Other answers to each question: from the rows, or drawn."""
        from loglik.signals.drawing import first_line, sample_texts

        if audited.has(self.ideas_field):
            if self.num_samples:
                raise InputError(
                    f"the rows have {self.ideas_field}, and --num-samples would draw others: leave one of them out"
                )
            return audited.lists(self.ideas_field)
        if not self.num_samples:
            return None
        distinct = list(dict.fromkeys(questions))
        try:
            drawn = sample_texts(
                model,
                [self.prompt.replace("{question}", question) for question in distinct],
                num_samples=self.num_samples,
                max_tokens=self.max_tokens,
                seed=self.seed,
            )
        except RowError as error:
            raise _named(error, [audited.names[questions.index(question)] for question in distinct]) from None
        lines = [[first_line(text) for text in own] for own in drawn]
        of = dict(zip(distinct, lines, strict=True))
        return [[line for line in of[question] if line] for question in questions]

    def _judge(self, scores: dict[str, Any], correct: list[bool], summary: dict[str, Any], page: Any) -> None:
        """How well each P(True) is calibrated, and tells right answers from wrong."""
        from loglik.signals.calibration import reliability_diagram
        from loglik.signals.detection import detector_report
        from loglik.signals.metacognition import calibration_report
        from loglik.signals.plots import plot_by_class, plot_lines, plot_reliability
        from loglik.signals.self_knowledge import self_knowledge_curve

        summary["accuracy"] = float(np.mean(correct))
        one_class = all(correct) or not any(correct)
        curves = {}
        for name, values in scores.items():
            report = calibration_report(values, correct, bins=self.bins, bootstrap=self.bootstrap, seed=self.seed)
            summary[f"{name}_calibration"] = report.record()
            if not one_class:
                found = detector_report(values, correct, bootstrap=self.bootstrap, seed=self.seed)
                summary[f"{name}_detection"] = found.record()
            curves[name] = self_knowledge_curve(values, correct)
            summary[f"{name}_trusted"] = asdict(curves[name].at(self.threshold))
        if one_class:
            summary["auroc"] = "undefined: all answers are " + ("right" if correct[0] else "wrong")
        if self.report is None:
            return
        for name, values in scores.items():
            diagram = reliability_diagram(values, correct, bins=self.bins)
            page.figure(f"Reliability of {name}", plot_reliability(diagram))
            drawn = plot_by_class(values, correct, names=("right", "wrong"), label=name)
            page.figure(f"{name} of right and wrong answers", drawn)
        page.figure(
            "Self-knowledge",
            plot_lines(
                {name: (curve.threshold, curve.accuracy) for name, curve in curves.items()},
                x_label="confidence of at least",
                y_label="share of these answers that is right",
            ),
            "A model that knows what it knows rises from its base accuracy on the left.",
        )

    def _probe(
        self,
        model: Any,
        names: list[str],
        questions: list[str],
        correct: list[bool],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """P(IK), fitted on some questions and judged on the samples of the others."""
        from loglik.signals.calibration import reliability_diagram
        from loglik.signals.detection import detector_report
        from loglik.signals.metacognition import calibration_report
        from loglik.signals.p_ik import held_out_p_ik, question_states, success_counts
        from loglik.signals.plots import plot_by_class, plot_reliability

        place = {question: number for number, question in enumerate(dict.fromkeys(questions))}
        number = [place[question] for question in questions]
        successes, trials = success_counts(correct, number)
        try:
            states = question_states(model, list(place), batch_size=self.batch_size)
        except RowError as error:
            raise _named(error, [names[questions.index(question)] for question in place]) from None
        found: HeldOutPIK = held_out_p_ik(
            states, successes, trials, share=self.probe_share, c=self.probe_c, seed=self.seed
        )
        for row, which in zip(rows, number, strict=True):
            row |= {"p_ik": float(found.p_ik[which]), "probe_saw_question": bool(found.trained[which])}
        known, right = found.samples()
        if len(right) < self.bins:
            raise InputError(
                f"the questions that the probe has not seen have {len(right)} rows, fewer than --bins {self.bins}: "
                "give more rows or fewer bins"
            )
        report = calibration_report(known, right, bins=self.bins, bootstrap=self.bootstrap, seed=self.seed)
        summary |= {
            "p_ik_questions_fitted": int(found.trained.sum()),
            "p_ik_questions_held_out": int((~found.trained).sum()),
            "p_ik_calibration": report.record(),
            "p_ik_brier_of_the_base_rate": found.base_brier(),
        }
        if 0 < right.sum() < len(right):
            summary["p_ik_detection"] = detector_report(known, right, bootstrap=self.bootstrap, seed=self.seed).record()
        else:
            which_class = "right" if right[0] else "wrong"
            summary["p_ik_auroc"] = f"undefined: all held-out answers are {which_class}"
        if self.report is not None:
            diagram = reliability_diagram(known, right, bins=self.bins)
            page.figure("Reliability of P(IK) on held-out questions", plot_reliability(diagram))
            drawn = plot_by_class(known, right, names=("right", "wrong"), label="P(IK)")
            page.figure("P(IK) of right and wrong answers, held out", drawn)


def _named(error: RowError, names: list[str]) -> InputError:
    """The refusal of a row that a function counts, with the name that the file gives it."""
    number = (error.row or "").rpartition(" ")[2]
    return InputError(f"{names[int(number)]}: {error.reason}" if number.isdigit() else str(error))
