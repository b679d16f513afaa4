"""``loglik audit randomness``: are repeated yes/no answers like coin flips?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from loglik.cli.audits.common import Audited, RowAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.pages import AuditPage
    from loglik.signals.randomness import RandomnessReport

__all__ = ["AuditRandomness"]

_Lists = list[list[int]]
_FIGURES = ("yes_rate", "switch_rate", "runs_z")
_LEAST_SEEN = 5  # a share of fewer switches than that is not drawn


@dataclass(frozen=True, kw_only=True)
class AuditRandomness(RowAudit):
    """Tests of repeated yes/no answers: uniformity, independence, memory of two answers, too many switches."""

    answers_field: str = "answers"
    """Column of one list of answers per row: 1 or true for yes, 0 or false for no."""
    group_field: str = "group"
    """Column that says which rows belong together, such as the model that was asked; every group is tested alone."""
    skip: int = 0
    """First answers of each list to leave out: they are often far from the rest."""
    permutations: int = 1999
    """For small counts."""
    power_at: float = 0.6
    """Switch rate that the power is reported for; about 0.6 is what people do, 0.5 is independence."""
    power_repeats: int = 200
    """Simulations behind the power; 0 leaves it out."""
    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """Draw the answers from this model instead (tiny, a directory, or a name on the model hub): rows are prompts that
    ask for a list, and every prompt is a group."""
    prompt_field: str = "prompt"
    """Column of the prompt, with --model."""
    yes: tuple[str, ...] = ("yes", "Yes", "YES")
    """Forms of yes, with --model; the first is written."""
    no: tuple[str, ...] = ("no", "No", "NO")
    """Forms of no, with --model."""
    separator: str = " "
    """Between the prompt and the first answer, with --model."""
    between: str = ", "
    """Between two answers, with --model."""
    lists: int = 50
    """Lists per prompt, with --model."""
    length: int = 20
    """Answers per list, with --model."""
    temperature: float = 1.0
    """Of the draws, with --model."""
    seed: int = 0
    """Of draws and permutations."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the model's weights."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""

    def run(self) -> None:
        """Read or draw, test, write."""
        from loglik.signals.pages import AuditPage
        from loglik.signals.randomness import randomness_power, randomness_report

        audited = self.read()
        lists = self._given(audited) if self.model is None else self._drawn(audited)
        owners = self._owners(audited)
        reports: dict[str, RandomnessReport] = {}
        pooled: dict[str, _Lists] = {}
        told: dict[str, dict[str, Any]] = {}
        for own, group in zip(lists, owners, strict=True):
            pooled.setdefault(group, []).extend(own)
        for group, members in pooled.items():
            report = randomness_report(members, skip=self.skip, permutations=self.permutations, seed=self.seed)
            reports[group], told[group] = report, _record(report)
            if self.power_repeats:
                lengths = [len(answers) - self.skip for answers in members]
                told[group][f"power_at_{self.power_at:g}"] = randomness_power(
                    lengths, self.power_at, repeats=self.power_repeats, seed=self.seed
                )
        rows = []
        for own, group in zip(lists, owners, strict=True):
            alone = randomness_report(own, skip=self.skip, permutations=1, seed=self.seed)
            row: dict[str, Any] = {"group": group, "answers": own[0] if self.model is None else own}
            rows.append(row | {name: getattr(alone, name) for name in _FIGURES})
        summary: dict[str, Any] = {"rows": len(rows)}
        if self.model is not None:
            summary |= {"model": self.model, "temperature": self.temperature}
        summary |= next(iter(told.values())) if len(told) == 1 else {"groups": told}
        page = AuditPage("Randomness", f"answers of {self.data}" + (f" by {self.model}" if self.model else ""))
        if self.report is not None:
            for group, report in reports.items():
                self._draw(page, "" if len(reports) == 1 else f", {group}", pooled[group], report)
        self.finish(audited, rows, summary, page)

    def _given(self, audited: Audited) -> list[_Lists]:
        """One list per row."""
        found: list[_Lists] = []
        for name, record in audited.pairs():
            value = record.get(self.answers_field)
            if not isinstance(value, list) or not all(answer in (0, 1) for answer in value):
                raise InputError(
                    f"{name}: {self.answers_field} must be a list of 0 and 1 or of true and false; leave refusals out"
                )
            if len(value) - self.skip < 2:
                raise InputError(
                    f"{name}: {self.answers_field} has {len(value)} answers, and two must be left after --skip "
                    f"{self.skip}: leave the row out"
                )
            found.append([[int(answer) for answer in value]])
        return found

    def _drawn(self, audited: Audited) -> list[_Lists]:
        """Lists of each prompt."""
        from loglik.models.load import load
        from loglik.progress import bar
        from loglik.signals.binary_decisions import draw_answer_lists

        prompts = audited.texts(self.prompt_field)
        if self.length - self.skip < 2:
            raise InputError(f"--length must be at least 2 above --skip, got {self.length} and {self.skip}")
        model = load(str(self.model), dtype=self.dtype, device=self.device)
        found: list[_Lists] = []
        with bar("prompts", total=len(prompts), unit="rows") as advance:
            for name, prompt in zip(audited.names, prompts, strict=True):
                try:
                    drawn = draw_answer_lists(
                        model,
                        prompt,
                        self.yes,
                        self.no,
                        num_lists=self.lists,
                        length=self.length,
                        separator=self.separator,
                        between=self.between,
                        temperature=self.temperature,
                        seed=self.seed,
                    )
                except RowError as error:
                    raise InputError(f"{name}: {error.reason}") from None
                found.append(drawn.tolist())
                advance(1)
        return found

    def _owners(self, audited: Audited) -> list[str]:
        """The group of each row."""
        if self.model is not None:
            return list(audited.names)
        return audited.texts(self.group_field) if audited.has(self.group_field) else ["all" for _ in audited.names]

    def _draw(self, page: AuditPage, of: str, lists: _Lists, report: RandomnessReport) -> None:
        from loglik.signals.answer_plots import plot_run_lengths
        from loglik.signals.plots import plot_lines
        from loglik.signals.randomness import run_lengths

        page.figure(
            f"Lengths of runs{of}",
            plot_run_lengths(run_lengths(lists, skip=self.skip)),
            "Too few long runs are negative recency: the answer changes too often.",
        )
        after = {run: rate for run, (rate, count) in report.switch_after_run.items() if count >= _LEAST_SEEN}
        if after:
            runs = list(after)
            curves = {
                "seen": (runs, list(after.values())),
                "independent answers": (runs, [report.expected_switch_rate for _ in runs]),
            }
            page.figure(
                f"Switches after a run{of}",
                plot_lines(curves, x_label="length of the run so far", y_label="share of switches"),
            )
        places = range(self.skip + 1, self.skip + 1 + len(report.position_rates))
        page.figure(
            f"Yes by position{of}",
            plot_lines({"share of yes": (list(places), report.position_rates)}, x_label="position", y_label="share"),
        )


def _record(report: RandomnessReport) -> dict[str, Any]:
    """Figures of a group for the summary."""
    found: dict[str, Any] = {"lists": report.num_lists, "num_answers": report.num_answers}
    found |= {name: getattr(report, name) for name in _FIGURES}
    found["expected_switch_rate"] = report.expected_switch_rate
    for test in report.tests:
        figures: dict[str, Any] = {"p_value": test.p_value, "adjusted": test.adjusted, "method": test.method}
        found[test.name.replace(" ", "_")] = figures | ({"undefined": test.undefined} if test.undefined else {})
    found["switch_after_run"] = {str(run): rate for run, (rate, _) in report.switch_after_run.items()}
    return found
