"""``loglik audit reasoning``: does each step of a trace lead to the answer, and where could one have stopped?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loglik.cli.audits.common import Audited, ModelAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.entropy_curve import EntropyCurve

__all__ = ["AuditReasoning"]

_MOST_ROWS = 100  # of the heat map


@dataclass(frozen=True, kw_only=True)
class AuditReasoning(ModelAudit):
    """Follow the entropy of the answer along reasoning traces: which steps help, and where one could have stopped."""

    question_field: str = "question"
    """Column of the question."""
    trace_field: str = "trace"
    """Column of the trace: a text, or a list of steps."""
    steps: Literal["lines", "sentences"] = "lines"
    """What a step is, where the trace is a text."""
    options_field: str = "options"
    """Column of the options, a list of texts, if there are any: the entropy is then that of the options."""
    answer_field: str = "answer"
    """Column of the true answer, if it is known: a text, or with options the right option's number, from 0. Without
    options and answer the entropy is that of the first token after the cue."""
    correct_field: str = "correct"
    """Column that says whether the trace's own answer is right, if that is known; else the model's own answer after the
    whole trace is compared with the true one."""
    separator: str = "\n"
    """Stands before each step."""
    cue: str = "\nAnswer:"
    """Stands before the answer."""
    answer_space: str = " "
    """Stands between cue and answer, and is scored with it."""
    conclusion: Literal["keep", "drop"] = "keep"
    """drop leaves the last step out of the curves: where it states the answer, the entropy collapses for right and
    wrong answers alike."""
    normalise: Literal["sum", "token", "byte", "character"] = "sum"
    """Of the options' scores."""
    threshold: float = 0.1
    """Stop where the entropy is at most this, in nats (per token of the answer)."""
    patience: int = 1
    """For so many states in a row."""
    stall: int | None = None
    """Also stop where so many steps have not lowered the entropy."""
    min_fall: float = 0.0
    """Nats that count as lower."""
    max_tokens: int = 16
    """Longest answer that the model gives after each step, where there are no options; 0 asks for none."""
    bootstrap: int = 1000
    """Resamples behind the intervals."""

    def run(self) -> None:
        """Read, follow, stop, compare, write."""
        from loglik.progress import bar
        from loglik.signals.early_stopping import stop_outcome, stop_summary
        from loglik.signals.pages import AuditPage
        from loglik.signals.trace_entropy import step_tokens

        if self.max_tokens < 0 or self.bootstrap < 1:
            raise InputError("--max-tokens must be at least 0 and --bootstrap at least 1")
        audited = self.read()
        questions, traces = audited.texts(self.question_field), self._traces(audited)
        options = audited.lists(self.options_field) if audited.has(self.options_field) else None
        truths = self._truths(audited, options)
        correct = audited.flags(self.correct_field) if audited.has(self.correct_field) else None
        model = self.load()
        curves: list[EntropyCurve] = []
        rows: list[dict[str, Any]] = []
        tokens, answers, outcomes = [], [], []
        with bar("traces", total=len(traces), unit="rows") as advance:
            for number, (name, question, steps) in enumerate(zip(audited.names, questions, traces, strict=True)):
                own_options = None if options is None else options[number]
                truth = None if truths is None else truths[number]
                try:
                    whole, said, right, told = self._follow(model, question, steps, own_options, truth)
                    curve = whole.until(-1) if self.conclusion == "drop" and whole.num_steps else whole
                    advice = curve.early_stop(
                        self.threshold, patience=self.patience, stall=self.stall, min_fall=self.min_fall
                    )
                    own_tokens = step_tokens(model, question, steps, separator=self.separator)
                    outcome = stop_outcome(advice, own_tokens, answers=said, right=right)
                except (InputError, RowError) as error:
                    raise InputError(f"{name}: {error}") from None
                curves.append(curve)
                tokens.append(own_tokens)
                answers.append(said)
                outcomes.append(outcome)
                rows.append({"question": question, **curve.record(), **outcome.record(), **told})
                advance(1)
        summary: dict[str, Any] = {
            "rows": len(rows),
            "model": self.model,
            "entropy_of": "options" if options is not None else "first token" if truths is None else "answer",
        }
        for key in ("steps", "final", "drop"):
            summary[f"mean_{key}"] = float(np.mean([row[key] for row in rows]))
        summary |= stop_summary(outcomes)
        hits = correct
        if correct is not None:
            summary["correct_is"] = f"the column {self.correct_field}"
        elif all(outcome.right_in_the_end is not None for outcome in outcomes):
            hits = [bool(outcome.right_in_the_end) for outcome in outcomes]
            summary["correct_is"] = "the model's answer after the whole trace"
        page = AuditPage("Reasoning traces", f"{self.data} followed by {self.model}")
        if hits is not None:
            for row, hit in zip(rows, hits, strict=True):
                row["correct"] = hit
            summary["accuracy"] = float(np.mean(hits))
        self._judge(curves, hits, summary, page)
        self._draw(audited, curves, hits, tokens, answers, page)
        self.finish(audited, rows, summary, page)

    def _traces(self, audited: Audited) -> list[list[str]]:
        from loglik.signals.trace_entropy import split_steps

        if all(isinstance(record.get(self.trace_field), list) for _, record in audited.pairs()):
            traces = audited.lists(self.trace_field)
            for name, steps in zip(audited.names, traces, strict=True):
                empty = next((place for place, step in enumerate(steps) if not step.strip()), None)
                if empty is not None:
                    raise InputError(f"{name}: step {empty} of {self.trace_field} is empty: remove it")
            return traces
        return [split_steps(text, self.steps) for text in audited.texts(self.trace_field)]

    def _truths(self, audited: Audited, options: list[list[str]] | None) -> list[Any] | None:
        """The true answers: texts, or with options numbers."""
        if not audited.has(self.answer_field):
            return None
        if options is None:
            return audited.texts(self.answer_field)
        numbers = audited.numbers(self.answer_field)
        for name, number, texts in zip(audited.names, numbers, options, strict=True):
            if number != int(number) or not 0 <= number < len(texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be an option's number from 0 to {len(texts) - 1}, got {number:g}"
                )
        return [int(number) for number in numbers]

    def _follow(
        self, model: Any, question: str, steps: Sequence[str], options: list[str] | None, truth: Any
    ) -> tuple[EntropyCurve, list[int] | None, list[bool] | None, dict[str, Any]]:
        """The curve of the whole trace, the answer at each state, whether it is right, and more columns."""
        from loglik.signals.equivalence import exact_match, meanings
        from loglik.signals.option_curve import option_entropy_curve
        from loglik.signals.trace_entropy import answer_entropy_curve, open_entropy_curve, trace_answers

        where = {"separator": self.separator, "cue": self.cue}
        if options is not None:
            found = option_entropy_curve(
                model,
                question,
                steps,
                options,
                right=truth,
                space=self.answer_space,
                normalise=self.normalise,
                **where,
            )
            choice = found.choice.tolist()
            right = None if truth is None else [number == truth for number in choice]
            return found.curve, choice, right, {"choices": choice, "answer": truth}
        curve = (
            open_entropy_curve(model, question, steps, **where)
            if truth is None
            else answer_entropy_curve(
                model, question, steps, self.answer_space + truth, batch_size=self.batch_size, **where
            )
        )
        if not self.max_tokens:
            return curve, None, None, {"answer": truth}
        texts = trace_answers(model, question, steps, max_tokens=self.max_tokens, **where)
        numbers = meanings(exact_match, question, [*texts, *([] if truth is None else [truth])])
        said = numbers[: len(texts)]
        right = None if truth is None else [number == numbers[-1] for number in said]
        return curve, said, right, {"answers": list(texts), "answer": truth}

    def _judge(self, curves: list[EntropyCurve], hits: list[bool] | None, summary: dict[str, Any], page: Any) -> None:
        """Do the curves' figures tell right traces from wrong ones?"""
        from loglik.signals.detection import detector_report
        from loglik.signals.entropy_curve import trace_scores
        from loglik.signals.plots import plot_roc

        kept = [number for number, curve in enumerate(curves) if curve.num_steps]
        if len(kept) < len(curves):
            summary["traces_without_steps"] = len(curves) - len(kept)
        if hits is None or not kept:
            return
        right = np.array([hits[number] for number in kept])
        if not 0 < right.sum() < len(right):
            summary["auroc"] = "undefined: all traces are " + ("right" if right[0] else "wrong")
            return
        scores = trace_scores([curves[number] for number in kept])
        for name, values in scores.items():
            summary[name] = detector_report(values, right, bootstrap=self.bootstrap).record()
        if self.report is not None:
            page.figure("ROC", plot_roc(scores, right), "How well the curves tell right traces from wrong ones.")

    def _draw(
        self,
        audited: Audited,
        curves: list[EntropyCurve],
        hits: list[bool] | None,
        tokens: list[list[int]],
        answers: list[Any],
        page: Any,
    ) -> None:
        from loglik.signals.early_stopping import stop_trade_off
        from loglik.signals.plots import plot_heat_map, plot_lines
        from loglik.signals.trace_plots import curve_matrix, plot_entropy_curves

        if self.report is None:
            return
        page.figure("Entropy along the trace", plot_entropy_curves(curves, hits))
        matrix = curve_matrix(curves[:_MOST_ROWS])
        page.figure(
            "Every trace",
            plot_heat_map(
                matrix,
                rows=audited.names[:_MOST_ROWS],
                columns=[str(step) for step in range(matrix.shape[1])],
                label="entropy of the answer, nats",
            ),
            "Columns are the steps read." + (f" The first {_MOST_ROWS} rows." if len(curves) > _MOST_ROWS else ""),
        )
        if all(said is not None for said in answers) and any(map(sum, tokens)):
            found = stop_trade_off(
                curves, tokens, answers, patience=self.patience, stall=self.stall, min_fall=self.min_fall
            )
            page.figure(
                "What a threshold saves and changes",
                plot_lines(
                    {
                        "share of the tokens saved": (found.threshold, found.tokens_saved),
                        "share of the answers that stay": (found.threshold, found.same_answer),
                    },
                    x_label="stop where the entropy is at most, nats",
                    y_label="share",
                ),
            )
