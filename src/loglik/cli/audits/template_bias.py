"""``loglik audit template-bias``: do answers depend on whose name stands in a template?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import ModelAudit, write_table
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from torch import Tensor

    from loglik.signals.choice import Choices
    from loglik.signals.pages import AuditPage
    from loglik.signals.template_bias import TemplateBias, TemplateConsistency, TemplateTable

__all__ = ["AuditTemplateBias"]

_MOST_DRAWN = 40


@dataclass(frozen=True, kw_only=True)
class AuditTemplateBias(ModelAudit):
    """Gaps between groups over templates filled with their names, against what permuted groups give."""

    template_field: str = "template"
    """Column that says which template a row fills: a text, such as the template itself."""
    name_field: str = "name"
    """Column of the name that stands in it; every template must be filled with the same names."""
    group_field: str = "group"
    """Column of the group of that name; groups must have the same number of names."""
    question_field: str = "question"
    """Column of the filled template, as the model is to read it."""
    options_field: str = "options"
    """Column of the answers to choose from: a list of texts, in the same order for all names of a template."""
    answer_field: str = "answer"
    """Column of the right option's number, from 0."""
    source_field: str = "source"
    """Column of the data set a template is from, if there are several: --drop-zero then drops whole sources too."""
    statistic: Literal["log_odds", "accuracy", "probability"] = "log_odds"
    """What is compared: log-odds of the right option, whether it is chosen, or its probability."""
    drop_zero: Literal["auto", "yes", "no"] = "auto"
    """Leave out templates in which a group is never right, as the released scorer of CALM does; auto: for accuracy."""
    normalise: Literal["sum", "token", "byte", "character"] = "sum"
    """Length that scores of options are divided by."""
    separator: str = " "
    """Stands between question and option, and is scored with the option."""
    level: float = 0.95
    """Of the interval, and of the upper end that chance reaches."""
    permutations: int = 999
    """Random permutations of the names' groups."""
    resamples: int = 2000
    """Bootstrap resamples of the templates."""
    seed: int = 0
    """Of permutations and resamples."""
    templates: str | None = None
    """Write one row per template here (.jsonl or .parquet): gap, means of the groups, consistency."""

    def run(self) -> None:
        """Read, score, compare, write."""
        import torch

        from loglik.signals.choice import score_options
        from loglik.signals.pages import AuditPage
        from loglik.signals.template_bias import gold_log_odds, template_bias, template_consistency, template_table

        audited = self.read()
        names = audited.names
        templates, groups = audited.texts(self.template_field), audited.texts(self.group_field)
        questions, options = audited.texts(self.question_field), audited.lists(self.options_field)
        gold = self._gold(audited.numbers(self.answer_field), options, names)
        sources = audited.texts(self.source_field) if audited.has(self.source_field) else None
        try:
            table = template_table(templates, audited.texts(self.name_field), groups)
        except RowError as error:
            raise InputError(f"{_name(error, names)}: {error.reason}") from None
        model = self.load()
        try:
            choices = score_options(model, questions, options, separator=self.separator).choose(
                normalise=self.normalise, alpha=0.0
            )
            odds = gold_log_odds(choices, torch.tensor(gold))
        except RowError as error:
            owners = [name for name, texts in zip(names, options, strict=True) for _ in texts]
            raise InputError(f"{_name(error, names, owners)}: {error.reason}") from None
        right = choices.choice == torch.tensor(gold)
        values = {"log_odds": odds, "accuracy": right.double(), "probability": odds.sigmoid()}[self.statistic]
        of_templates = None if sources is None else [sources[int(row[0])] for row in table.index]
        found = template_bias(
            values[table.index],
            table.groups,
            statistic=self.statistic,
            drop_zero={"auto": None, "yes": True, "no": False}[self.drop_zero],
            sources=of_templates,
            level=self.level,
            resamples=self.resamples,
            permutations=self.permutations,
            seed=self.seed,
        )
        same = template_consistency(choices.choice[table.index], table.groups)
        listed = _templates(table, found, same)
        if self.templates is not None:
            write_table(self.templates, listed)
        page = AuditPage("Template bias", f"{self.data} under {self.model}")
        if self.report is not None:
            self._draw(page, table, found, listed)
        summary = self._summary(table, found, same, float(right.double().mean()))
        self.finish(audited, _rows(choices, odds, right, table, found), summary, page)

    def _gold(self, numbers: Sequence[float], options: Sequence[Sequence[str]], names: Sequence[str]) -> list[int]:
        found = []
        for number, texts, name in zip(numbers, options, names, strict=True):
            if len(texts) < 2 or not all(text.strip() for text in texts):
                raise InputError(
                    f"{name}: {self.options_field} must be at least two texts that are not empty, got {texts}"
                )
            if number != int(number) or not 0 <= number < len(texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be an option's number from 0 to {len(texts) - 1}, got {number:g}"
                )
            found.append(int(number))
        return found

    def _summary(
        self, table: TemplateTable, found: TemplateBias, same: TemplateConsistency, accuracy: float
    ) -> dict[str, Any]:
        kin = None if same.within is None else float(same.within.mean())
        return {
            "templates": len(table.templates),
            "names": len(table.names),
            "model": self.model,
            "statistic": self.statistic,
            "score": found.score,
            "interval": list(found.interval),
            "chance": found.floor,
            "score_above_chance": found.score - found.floor,
            "chance_upper": found.null_upper,
            "p_value": found.p_value,
            "exact": found.exact,
            "groups": {str(g): float(d) for g, d in zip(found.groups, found.deviation, strict=True)},
            "kept": int(found.kept.sum()),
            "dropped": {rule: len(which) for rule, which in found.dropped.items()},
            "accuracy": accuracy,
            "same_answer": float(same.agreement.mean()),
            "same_answer_within_groups": kin,
            "same_answer_between_groups": float(same.between.mean()),
            "unanimous": same.unanimous,
        }

    def _draw(
        self, page: AuditPage, table: TemplateTable, found: TemplateBias, listed: Sequence[dict[str, Any]]
    ) -> None:
        from loglik.signals.plots import plot_bars, plot_heat_map

        order = found.gaps.argsort(descending=True, stable=True)[:_MOST_DRAWN]
        means = found.means[order]
        left = len(found.gaps) - len(order)
        page.figure(
            "Templates and groups",
            plot_heat_map(
                means - means.mean(1, keepdim=True),
                rows=[str(table.templates[int(i)]) for i in order],
                columns=[str(group) for group in found.groups],
                label=f"{self.statistic.replace('_', '-')} above the template's mean",
                diverging=True,
            ),
            "The largest gaps stand above." + (f" {left:,} templates with smaller gaps are not drawn." if left else ""),
        )
        bars = {
            "score": found.score,
            "chance": found.floor,
            f"chance reaches ({self.level:.0%})": found.null_upper,
        }
        page.figure("The score and chance", plot_bars(bars, label="mean gap", intervals={"score": found.interval}))
        page.table("Templates", listed)


def _templates(table: TemplateTable, found: TemplateBias, same: TemplateConsistency) -> list[dict[str, Any]]:
    rows = []
    for t, template in enumerate(table.templates):
        row: dict[str, Any] = {"template": template, "gap": float(found.gaps[t]), "kept": bool(found.kept[t])}
        row |= {f"mean_{group}": float(found.means[t, g]) for g, group in enumerate(found.groups)}
        row |= {"same_answer": float(same.agreement[t]), "same_answer_between_groups": float(same.between[t])}
        rows.append(row)
    return rows


def _rows(
    choices: Choices, odds: Tensor, right: Tensor, table: TemplateTable, found: TemplateBias
) -> list[dict[str, Any]]:
    places = {int(row): t for t, of_template in enumerate(table.index) for row in of_template}
    return [
        {
            "template": table.templates[places[i]],
            "choice": int(choices.choice[i]),
            "correct": bool(right[i]),
            "log_odds": float(odds[i]),
            "template_gap": float(found.gaps[places[i]]),
            "template_kept": bool(found.kept[places[i]]),
        }
        for i in range(len(odds))
    ]


def _name(error: RowError, names: Sequence[str], owners: Sequence[str] | None = None) -> str:
    """The row an error is about: ``question 3`` and ``row 3`` are numbers of rows, with `owners` of options."""
    what, number = (error.row or "row 0").rsplit(" ", 1)
    return (owners if owners is not None and what == "row" else names)[int(number)]
