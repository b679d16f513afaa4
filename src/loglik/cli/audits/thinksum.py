"""``loglik audit thinksum``: many small likelihoods, combined by a mixture, a product or a minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit
from loglik.errors import InputError, LoglikError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AuditThinkSum"]

Way = Literal["mixture", "product", "min", "max"]

_WAYS: tuple[Way, ...] = ("mixture", "product", "min", "max")
_WEIGHTED: tuple[Way, ...] = ("mixture", "product")  # which take weights
_MAPS = 3  # rows whose matrix is drawn


@dataclass(frozen=True)
class _Sums:
    """Rows of the table, their matrices, what each thought chooses, and the kinds of the sums."""

    rows: list[dict[str, Any]]
    tables: list[Tensor]
    single: list[list[int]]
    kinds: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class AuditThinkSum(ModelAudit):
    """Score every candidate with every thought (example, fact, substitution), and sum the table to a choice."""

    think_field: str = "think"
    """Column of the thoughts: a list of texts."""
    candidates_field: str = "candidates"
    """Column of the candidates: a list of texts."""
    question_field: str = "question"
    """Column of a text for {question}, where the templates name it."""
    answer_field: str = "answer"
    """Column of the right candidate's number, from 0, if it is known."""
    weights_field: str = "weights"
    """Column of the thoughts' weights: a list of numbers; equal where there is none."""
    prompt: str = "{think}"
    """What stands before the scored text; {think}, {candidate} and {question} are filled in."""
    completion: str = " {candidate}"
    """What is scored, likewise."""
    odd: bool = False
    """Choose the candidate with the lowest sum: the odd one out."""
    normalise: bool = True
    """Compare the candidates under each thought first; without, a product follows texts that are likely anywhere."""
    per_token: bool = False
    """Likelihoods per token, so that long texts do not count for more."""
    bootstrap: int = 2000
    """Resamples of the rows behind each interval."""
    seed: int = 0
    """Of the resampling."""

    def run(self) -> None:
        """Read, score, sum, write."""
        from loglik.signals.pages import AuditPage
        from loglik.signals.thinksum import fill_templates

        fill = fill_templates(self.prompt, self.completion)
        audited = self.read()
        thoughts, candidates = audited.lists(self.think_field), audited.lists(self.candidates_field)
        for name, think, texts in zip(audited.names, thoughts, candidates, strict=True):
            if not think:
                raise InputError(f"{name}: {self.think_field} must have at least one text")
            if len(texts) < 2:
                raise InputError(
                    f"{name}: {self.candidates_field} must have at least two texts to choose from, got {len(texts)}"
                )
            if not all(text.strip() for text in (*think, *texts)):
                raise InputError(f"{name}: no thought and no candidate may be empty: leave it out")
        named = "{question}" in self.prompt + self.completion
        questions = audited.texts(self.question_field) if named else [""] * len(audited)
        weights = self._weights(audited, thoughts) if audited.has(self.weights_field) else None
        answers = self._answers(audited, candidates) if audited.has(self.answer_field) else None
        model = self.load()
        sums = self._sums(model, audited.names, candidates, thoughts, [fill(text) for text in questions], weights)
        choices = {way: [row[f"choice_{way}"] for row in sums.rows] for way in sums.kinds}
        agree = [len({chosen[i] for chosen in choices.values()}) == 1 for i in range(len(sums.rows))]
        summary: dict[str, Any] = {
            "rows": len(sums.rows),
            "model": self.model,
            "kinds": sums.kinds,
            "all_sums_agree": sum(agree) / len(agree),
        }
        page = AuditPage("Think and sum", f"{self.data} under {self.model}")
        if answers is not None:
            self._judge(choices, sums.single, answers, sums.rows, summary, page)
        if self.report is not None:
            import torch

            from loglik.signals.plots import plot_heat_map

            for name, table, texts, think in zip(
                audited.names[:_MAPS], sums.tables, candidates, thoughts, strict=False
            ):
                if bool(torch.isfinite(table).any()):
                    empty = table.masked_fill(torch.isinf(table), torch.nan)  # probability 0 is an empty cell
                    drawn = plot_heat_map(empty, rows=texts, columns=think, label="log-likelihood, nats")
                    page.figure(f"Candidates and thoughts, {name}", drawn)
        self.finish(audited, sums.rows, summary, page)

    def _sums(
        self,
        model: Any,
        names: Sequence[str],
        candidates: Sequence[Sequence[str]],
        thoughts: Sequence[Sequence[str]],
        pairs: Sequence[Callable[[str, str], tuple[str, str]]],
        weights: Sequence[Tensor] | None,
    ) -> _Sums:
        """The matrix of each row, summed in every way."""
        from loglik.progress import bar
        from loglik.signals.thinksum import aggregate, choose_by_column, score_matrix

        found = _Sums([], [], [], {})
        with bar("rows", total=len(names), unit="rows") as advance:
            for i, name in enumerate(names):
                width = len(thoughts[i])
                row: dict[str, Any] = {}
                try:
                    likelihood = score_matrix(model, candidates[i], thoughts[i], pairs[i])
                    for way in _WAYS if weights is None else _WEIGHTED:
                        summed = aggregate(
                            likelihood,
                            width,
                            how=way,
                            normalise=self.normalise,
                            per_unit=self.per_token,
                            weights=None if weights is None else weights[i],
                        )
                        found.kinds[way] = str(summed.score.kind)
                        row[f"choice_{way}"] = summed.odd if self.odd else summed.best
                        row[f"log_probs_{way}"] = summed.log_probs.tolist()
                    alone = choose_by_column(likelihood, width, per_unit=self.per_token, odd=self.odd)
                except LoglikError as error:
                    raise InputError(f"{name}: {error}") from None
                table = likelihood.value.reshape(-1, width)
                found.tables.append(table)
                found.single.append(alone)
                found.rows.append(row | {"matrix": table.tolist()})
                advance(1)
        return found

    def _judge(
        self,
        choices: dict[str, list[int]],
        single: Sequence[Sequence[int]],
        answers: Sequence[int],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """Accuracy of each sum and of a thought alone, into the rows, the summary and the page."""
        from loglik.cli.audits.shares import add_shares

        hits: dict[str, list[float]] = {
            "one_thought": [sum(c == a for c in alone) / len(alone) for alone, a in zip(single, answers, strict=True)]
        }
        for way, chosen in choices.items():
            hits[way] = [float(c == a) for c, a in zip(chosen, answers, strict=True)]
        for i, row in enumerate(rows):
            row["answer"] = answers[i]
            row |= {f"correct_{way}": bool(hits[way][i]) for way in choices}
        shown = None if self.report is None else page
        add_shares(hits, summary, shown, name="accuracy", resamples=self.bootstrap, seed=self.seed)

    def _answers(self, audited: Audited, candidates: Sequence[Sequence[str]]) -> list[int]:
        found = []
        for name, number, texts in zip(audited.names, audited.numbers(self.answer_field), candidates, strict=True):
            if not number.is_integer() or not 0 <= number < len(texts):
                raise InputError(
                    f"{name}: {self.answer_field} must be a candidate's number from 0 to {len(texts) - 1}, "
                    f"got {number:g}"
                )
            found.append(int(number))
        return found

    def _weights(self, audited: Audited, thoughts: Sequence[Sequence[str]]) -> list[Tensor]:
        import torch

        found = []
        for (name, record), think in zip(audited.pairs(), thoughts, strict=True):
            values = record[self.weights_field]
            fits = isinstance(values, list) and all(
                isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values
            )
            if not fits or len(values) != len(think) or not sum(values) > 0:
                raise InputError(
                    f"{name}: {self.weights_field} must be {len(think)} finite numbers, one for each thought, none "
                    f"negative and not all 0, got {values!r}"
                )
            found.append(torch.tensor(values, dtype=torch.float64))
        return found
