"""``loglik audit option-order``: does the answer depend on the order in which options are shown?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.order_sensitivity import OrderedAnswer, OrderReport
    from loglik.signals.pages import AuditPage

__all__ = ["AuditOptionOrder"]


@dataclass(frozen=True, kw_only=True)
class AuditOptionOrder(ModelAudit):
    """Ask questions with lettered options in several orders: answers before and after averaging, and position bias."""

    question_field: str = "question"
    """Column of the question; options and "Answer:" are put below it."""
    options_field: str = "options"
    """Column of the options: a list of texts."""
    answer_field: str = "answer"
    """Column of the right option's number, from 0, if it is known."""
    labels_field: str = "labels"
    """Column of the labels of a row's options: a list of texts. Without it, --labels are used."""
    labels: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Labels of the options: one character each, or texts between spaces."""
    orders: Literal["all", "cyclic"] | int = "cyclic"
    """All K! orders of K options (K up to 6), the K rotations, or a number of random orders."""
    move_labels: bool = False
    """Ask every order with each rotation of the labels too, so that labels can be told from positions."""
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """How probabilities are averaged over orders; geometric is free of any additive bias."""
    effects: bool = True
    """Decompose log-probabilities into options, positions and labels; needs cyclic or all orders, or enough of them."""
    separator: str = " "
    """Stands between "Answer:" and the label, and is scored with the label."""
    subgroups_field: str = "subgroups"
    """Column of people's answers, if there are any: group names with lists of probabilities of the options."""
    seed: int = 0
    """Of random orders."""

    def run(self) -> None:
        """Read, ask, average, write."""
        from loglik.progress import bar
        from loglik.signals.order_sensitivity import ask_in_orders, order_report
        from loglik.signals.pages import AuditPage

        audited = self.read()
        questions, options = audited.texts(self.question_field), audited.lists(self.options_field)
        for name, texts in zip(audited.names, options, strict=True):
            if len(texts) < 2:
                raise InputError(f"{name}: {self.options_field} must have at least two texts, got {len(texts)}")
        labels = self._labels(audited, options)
        gold = self._gold(audited, options) if audited.has(self.answer_field) else None
        groups = self._subgroups(audited, options) if audited.has(self.subgroups_field) else None
        model = self.load()
        answers: list[OrderedAnswer] = []
        with bar("questions", total=len(questions), unit="rows") as advance:
            for name, question, texts, marks in zip(audited.names, questions, options, labels, strict=True):
                try:
                    answers.append(
                        ask_in_orders(
                            model,
                            question,
                            texts,
                            self.orders,
                            labels=marks,
                            move_labels=self.move_labels,
                            mean=self.mean,
                            effects=self.effects,
                            separator=self.separator,
                            seed=self.seed,
                        )
                    )
                except (InputError, RowError) as error:
                    raise InputError(f"{name}: {error}") from None
                advance(1)
        report = order_report(answers, gold)
        rows = [_row(answer) for answer in answers]
        if gold is not None:
            for row, right in zip(rows, gold, strict=True):
                row |= {
                    "answer": right,
                    "correct_naive": row["choice_naive"] == right,
                    "correct": row["choice"] == right,
                }
        summary = {"model": self.model, "orders": self.orders, "mean": self.mean} | _summary(report)
        page = AuditPage("Option order", f"{self.data} under {self.model}, {self.orders} orders")
        if groups is not None:
            summary |= self._alignment(answers, groups, audited.names, page)
        if self.report is not None:
            _draw(page, report)
        self.finish(audited, rows, summary, page)

    def _labels(self, audited: Audited, options: Sequence[Sequence[str]]) -> list[list[str]]:
        if audited.has(self.labels_field):
            found, of = audited.lists(self.labels_field), self.labels_field
        else:
            shared = self.labels.split() if " " in self.labels.strip() else list(self.labels.strip())
            found, of = [shared for _ in options], "--labels"
        for name, texts, marks in zip(audited.names, options, found, strict=True):
            used = marks[: len(texts)]
            if len(set(used)) < len(texts) or not all(mark.strip() for mark in used):
                raise InputError(f"{name}: {of} must have {len(texts)} different labels that are not empty, got {used}")
        return found

    def _gold(self, audited: Audited, options: Sequence[Sequence[str]]) -> list[int]:
        found = []
        for name, number, texts in zip(audited.names, audited.numbers(self.answer_field), options, strict=True):
            if number != int(number) or not 0 <= number < len(texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be an option's number from 0 to {len(texts) - 1}, got {number:g}"
                )
            found.append(int(number))
        return found

    def _subgroups(self, audited: Audited, options: Sequence[Sequence[str]]) -> dict[str, list[list[float]]]:
        """Probabilities of the options by group and row."""
        found: dict[str, list[list[float]]] = {}
        for (name, record), texts in zip(audited.pairs(), options, strict=True):
            value = record[self.subgroups_field]
            if not isinstance(value, dict) or (found and value.keys() != found.keys()):
                raise InputError(f"{name}: {self.subgroups_field} must be an object with the same groups in every row")
            for group, shares in value.items():
                numbers = isinstance(shares, list) and all(isinstance(share, int | float) for share in shares)
                fits = numbers and len(shares) == len(texts) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-4
                if not fits:
                    raise InputError(
                        f"{name}: {self.subgroups_field} of {group} must be {len(texts)} probabilities, one per "
                        f"option, that sum to 1: got {shares}"
                    )
                found.setdefault(group, []).append(shares)
        return found

    def _alignment(
        self,
        answers: Sequence[OrderedAnswer],
        groups: dict[str, list[list[float]]],
        names: Sequence[str],
        page: AuditPage,
    ) -> dict[str, Any]:
        import torch

        from loglik.signals.option_order import alignment_entropy

        shares = [torch.tensor(part, dtype=torch.float64) for part in zip(*groups.values(), strict=True)]
        try:
            found = alignment_entropy([answer.adjusted.probs.double().cpu() for answer in answers], shares)
        except RowError as error:
            raise InputError(f"{names[int((error.row or 'question 0').split()[1])]}: {error.reason}") from None
        except InputError as error:
            raise InputError(f"{self.subgroups_field}: {error}") from None
        page.table(
            "Subgroups",
            [
                {"subgroup": name, "divergence": float(far), "entropy": float(even)}
                for name, far, even in zip(groups, found.divergence, found.entropy, strict=True)
            ],
        )
        return {"alignment_correlation": found.correlation, "alignment_slope": found.slope}


def _row(answer: OrderedAnswer) -> dict[str, Any]:
    adjusted, sensitivity, effects = answer.adjusted, answer.sensitivity, answer.effects
    row: dict[str, Any] = {
        "choice_naive": answer.naive_choice,
        "choice": answer.choice,
        "depends_on_order": len(set(sensitivity.choices.tolist())) > 1,
        "agreement": sensitivity.agreement,
        "information": sensitivity.information,
        "probs_naive": adjusted.naive.tolist(),
        "probs": adjusted.probs.tolist(),
        "position_probs": adjusted.position.tolist(),
        "first_bias": adjusted.first_bias,
        "coverage": adjusted.coverage,
    }
    if effects is not None:
        row |= {"position_effects": effects.position.tolist(), "residual_share": effects.residual_share}
        if effects.label is not None:
            row["label_effects"] = effects.label.tolist()
    return row


def _summary(report: OrderReport) -> dict[str, Any]:
    names = (
        "questions",
        "accuracy_naive",
        "accuracy",
        "p_value",
        "accuracy_single",
        "right_always",
        "right_ever",
        "flips",
        "changed",
        "agreement",
        "information",
        "first_bias",
        "first_interval",
        "coverage",
        "entropy_naive",
        "entropy",
    )
    found: dict[str, Any] = {name: getattr(report, name) for name in names if getattr(report, name) is not None}
    found["kind"] = str(report.kind)
    for size in report.sizes:
        named = {"position_probs": size.probability, "position_choices": size.chosen, "recall": size.recall}
        named |= {"position_effects": size.position_effects, "label_effects": size.label_effects}
        for name, values in named.items():
            if values is not None:
                found[f"{name}_of_{size.options}"] = values.tolist()
    return found


def _draw(page: AuditPage, report: OrderReport) -> None:
    from loglik.signals.plots import plot_bars, plot_heat_map

    if report.accuracy_naive is not None:
        names = {
            "order given": report.accuracy_naive,
            "averaged over orders": report.accuracy,
            "one order, on average": report.accuracy_single,
            "right in every order": report.right_always,
            "right in some order": report.right_ever,
        }
        shown = {name: value for name, value in names.items() if value is not None}
        page.figure("Accuracy", plot_bars(shown, label="share of questions"))
    for size in report.sizes:
        places = [f"position {place + 1}" for place in range(size.options)]
        lines = {"mean probability": size.probability, "share of choices": size.chosen}
        if size.recall is not None:
            lines["right when right option is here"] = size.recall
        page.figure(
            f"Positions, {size.options} options",
            plot_heat_map(
                [values.tolist() for values in lines.values()], rows=list(lines), columns=places, label="share"
            ),
            f"{size.questions:,} questions. Without bias, both shares are {1 / size.options:.3f} everywhere.",
        )
        if size.confusion is not None:
            counts = size.confusion.double()
            page.figure(
                f"Choice by the position of the right option, {size.options} options",
                plot_heat_map(
                    counts / counts.sum(1, keepdim=True),  # a position that never had the right option stays empty
                    rows=[f"right: {place}" for place in places],
                    columns=[f"chosen: {place}" for place in places],
                    label="share of the row",
                ),
                "The diagonal is right. A column that is bright throughout is a position the model prefers.",
            )
        for what, effects in (("position", size.position_effects), ("label", size.label_effects)):
            if effects is not None:
                bars = {f"{what} {place + 1}": float(value) for place, value in enumerate(effects)}
                page.figure(f"Effects of {what}s, {size.options} options", plot_bars(bars, label="nats"))
