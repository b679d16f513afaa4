"""``loglik audit effects``: is a model right more often where the answer, or the question, is probable?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, rows_named
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.pages import AuditPage
    from loglik.signals.probability_effects import ProbabilityEffects
    from loglik.signals.stimuli import Band

__all__ = ["AuditEffects"]


@dataclass(frozen=True, kw_only=True)
class AuditEffects(ModelAudit):
    """Effect of the probability of inputs and outputs, under MODEL, on being right: regression, accuracy by band."""

    input_field: str = "input"
    """Column of the task's input."""
    output_field: str = "output"
    """Column of the right output."""
    correct_field: str = "correct"
    """Column that says whether the answer was right: true or false. Without it ANSWERER answers."""
    task_field: str = "task"
    """Column of the task's name, if there are several: accuracy by task, and tasks compared on the same outputs."""
    answerer: str | None = None
    """The model that answers (greedily), where the rows do not say what was right; MODEL by default."""
    template: str = "{input}"
    """What the answerer reads; {input} is replaced. An answer is right that begins with the right output."""
    max_tokens: int = 64
    """Longest answer."""
    covariates: tuple[str, ...] = ()
    """Columns of numbers that are predictors too."""
    lengths: bool = True
    """Whether the tokens of inputs and outputs are predictors."""
    prior: Literal["firth", "ridge", "none"] = "firth"
    """Keeps coefficients finite where the predictors separate right from wrong."""
    strength: float = 1.0
    """Of ridge."""
    bands: int = 3
    """Bands of the output's probability."""
    matched: bool = False
    """Choose items so that all bands have the same numbers of tokens; others are in no band."""
    level: float = 0.95
    """Confidence of the intervals."""

    def run(self) -> None:
        """Read, score, answer, regress, write."""
        from loglik.progress import bar
        from loglik.signals.pages import AuditPage
        from loglik.signals.probability_effects import probability_effects
        from loglik.signals.stimuli import accuracy_by_band, begins_with, matched_bands
        from loglik.signals.texts import text_log_probs

        if "{input}" not in self.template:
            raise InputError("--template must have {input} in it, where the input comes")
        audited = self.read()
        inputs, outputs = audited.texts(self.input_field), audited.texts(self.output_field)
        tasks = audited.texts(self.task_field) if audited.has(self.task_field) else None
        extra = {name: audited.numbers(name) for name in self.covariates}
        given = audited.flags(self.correct_field) if audited.has(self.correct_field) else None
        if not 1 <= self.bands <= len(audited):
            raise InputError(f"--bands must be from 1 to the number of rows, {len(audited)}, got {self.bands}")
        model = self.load()
        with rows_named(audited.names), bar("texts", total=2 * len(audited), unit="rows") as advance:
            scored = [
                text_log_probs(model, texts, batch_size=self.batch_size, advance=advance) for texts in (inputs, outputs)
            ]
        source, target = scored
        said = None if given is not None else self._said(model, inputs, audited)
        correct = given or [begins_with(answer, right) for answer, right in zip(said or [], outputs, strict=True)]
        with rows_named(audited.names):
            labels = matched_bands(target, self.bands) if self.matched and self.bands > 1 else self.bands
            bands = accuracy_by_band(correct, target, labels, level=self.level)
            effects: ProbabilityEffects | None = None
            if 0 < sum(correct) < len(correct):
                effects = probability_effects(
                    correct,
                    target,
                    source,
                    extra,
                    lengths=self.lengths,
                    prior=self.prior,
                    strength=self.strength,
                    level=self.level,
                )
        rows: list[dict[str, Any]] = [{} if tasks is None else {"task": task} for task in tasks or correct]
        for i, row in enumerate(rows):
            for name, likelihood in (("input", source), ("output", target)):
                row[f"{name}_log_prob"] = float(likelihood.value[i])
                row[f"{name}_tokens"] = int(likelihood.num_units[i])
            row.update({"correct": correct[i]} if said is None else {"answer": said[i], "correct": correct[i]})
        summary: dict[str, Any] = {
            "rows": len(rows),
            "model": self.model,
            "answerer": None if said is None else self.answerer or self.model,
            "accuracy": sum(correct) / len(correct),
            "effects": "undefined: all answers are " + ("right" if correct[0] else "wrong"),
        }
        if effects is not None:
            summary |= {"auroc_of_output": effects.auroc, "prior": effects.prior, "dropped": list(effects.dropped)}
            summary["effects"] = {str(row.pop("name")): row for row in effects.record()}
        summary["bands"] = [_told(band) for band in bands]
        page = AuditPage("Effects of probability", f"{self.data} under {self.model}")
        by_task: dict[str, Band] = {}
        if tasks is not None:
            names = list(dict.fromkeys(tasks))
            own = accuracy_by_band(correct, target, [names.index(task) for task in tasks], level=self.level)
            by_task = {names[band.label]: band for band in own}
            summary["tasks"] = {name: _told(band) for name, band in by_task.items()}
            summary["contrasts"] = self._contrasts(names, tasks, outputs, correct)
        if self.report is not None:
            _draw(page, bands, effects, by_task)
        self.finish(audited, rows, summary, page)

    def _said(self, model: Any, inputs: list[str], audited: Audited) -> list[str]:
        from loglik.progress import bar
        from loglik.signals.stimuli import greedy_answers

        if self.max_tokens < 1:
            raise InputError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        answerer = model if self.answerer is None else self.load(self.answerer)
        prompts = [self.template.replace("{input}", text) for text in inputs]
        with bar("answers", total=len(prompts), unit="rows") as advance:
            try:
                return greedy_answers(
                    answerer, prompts, max_tokens=self.max_tokens, batch_size=self.batch_size, advance=advance
                )
            except RowError as error:
                name = audited.names[int((error.row or "prompt 0").split()[1])]
                raise InputError(f"{name}: {error.reason}") from None

    def _contrasts(
        self, names: list[str], tasks: list[str], outputs: list[str], correct: list[bool]
    ) -> list[dict[str, Any]]:
        """Each two tasks that have outputs in common, on those."""
        from loglik.signals.stimuli import pair_items, paired_contrast

        places = {name: [i for i, task in enumerate(tasks) if task == name] for name in names}
        found = []
        for first, second in combinations(names, 2):
            own, other = (places[name] for name in (first, second))
            a, b = pair_items([outputs[i] for i in own], [outputs[i] for i in other])
            if not a:
                continue
            contrast = paired_contrast([correct[own[i]] for i in a], [correct[other[i]] for i in b], level=self.level)
            found.append(
                {
                    "first": first,
                    "second": second,
                    "items": contrast.count,
                    "difference": contrast.difference.value,
                    "low": contrast.difference.low,
                    "high": contrast.difference.high,
                    "p_value": contrast.p_value,
                }
            )
        return found


def _told(band: Band) -> dict[str, float]:
    return {
        "items": band.count,
        "accuracy": band.accuracy.value,
        "low": band.accuracy.low,
        "high": band.accuracy.high,
        "mean_log_prob": band.log_prob,
        "mean_tokens": band.num_units,
    }


def _draw(
    page: AuditPage, bands: Sequence[Band], effects: ProbabilityEffects | None, by_task: Mapping[str, Band]
) -> None:
    from loglik.signals.plots import plot_bars

    by_band = {f"{band.label}: mean log p {band.log_prob:.1f}": band for band in bands}
    for heading, own in (("Accuracy by band of the output's probability", by_band), ("Accuracy by task", by_task)):
        if own:
            drawn = plot_bars(
                {name: band.accuracy.value for name, band in own.items()},
                label="accuracy with its exact interval",
                intervals={name: (band.accuracy.low, band.accuracy.high) for name, band in own.items()},
            )
            page.figure(heading, drawn)
    if effects is not None:
        drawn = plot_bars(
            {effect.name: effect.estimate for effect in effects.effects},
            label=f"logits per standard deviation, with {effects.level:.0%} intervals",
            intervals={effect.name: (effect.low, effect.high) for effect in effects.effects},
        )
        page.figure("Coefficients", drawn, "Right of 0: more of it goes with being right.")
