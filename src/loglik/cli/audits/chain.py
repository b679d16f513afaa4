"""``loglik audit chain``: where between log-likelihood and accuracy does the trend with compute get lost?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loglik.cli.audits.common import Audited, RowAudit, rows_named
from loglik.errors import InputError

if TYPE_CHECKING:
    from loglik.signals.metric_chain import MetricChain
    from loglik.signals.pages import AuditPage
    from loglik.signals.score_compute import ScoreCompute

__all__ = ["AuditChain"]

Table = list[list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class AuditChain(RowAudit):
    """From likelihood to accuracy: which score of multiple-choice questions follows compute, question by question."""

    compute: tuple[float, ...]
    """FLOPs of each model (6 times parameters times tokens), rising."""
    models: tuple[str, ...] = ()
    """A model per compute, such as checkpoints; without them the rows bring the log-likelihoods."""
    question_field: str = "question"
    """Column of the prompt, as the models are to read it."""
    options_field: str = "options"
    """Column of the options: a list of texts."""
    answer_field: str = "answer"
    """Column of the right option's number, from 0."""
    scores_field: str = "log_likelihoods"
    """Column of log-likelihoods, where there are no models: for each compute a list with a number per option."""
    separator: str = " "
    """Stands between prompt and option, and is scored with the option."""
    normalise: Literal["sum", "token", "byte", "character"] = "sum"
    """What shares and choice are made of; the first two scores are those of the whole option."""
    method: Literal["spearman", "pearson", "kendall"] = "spearman"
    """Of the correlation with log compute."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the weights."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""

    def run(self) -> None:
        """Read, score with every model, correlate, write."""
        from loglik.signals.metric_chain import LINKS, chain_correlations, chain_links
        from loglik.signals.pages import AuditPage

        self._check_compute()
        audited = self.read()
        table, answers, chains = self._scored(audited) if self.models else self._given(audited)
        found = chain_correlations(chains, self.compute, method=self.method, skip_constant=True)
        rows: list[dict[str, Any]] = [
            {self.answer_field: answer, self.scores_field: own} for answer, own in zip(answers, table, strict=True)
        ]
        for name in LINKS:
            each: list[float | None] = [None] * len(rows)
            if name in found:
                for place, value in zip(np.flatnonzero(found[name].kept), found[name].values, strict=True):
                    each[int(place)] = float(value)
            for row, correlation in zip(rows, each, strict=True):
                row[f"r_{name}"] = correlation
        summary: dict[str, Any] = {
            "questions": len(rows),
            "method": self.method,
            "means": [
                {"model": name, "compute": spent, **chain.means()}
                for name, spent, chain in zip(self._names(), self.compute, chains, strict=True)
            ],
        }
        for name in LINKS:
            summary[f"r_{name}"] = (
                _told(found[name]) if name in found else "undefined: the same for all models on every question"
            )
        if len(found) > 1:
            links = chain_links(found)
            summary["links"] = [asdict(link) for link in links]
            worst = max(links, key=lambda link: link.drop)
            summary["weakest_link"] = f"{worst.before} -> {worst.after}"
        summary["mass"] = self._mass(chains)
        page = AuditPage("From likelihood to accuracy", f"{self.data} under {len(chains)} models")
        if self.report is not None:
            self._draw(page, chains, found)
        self.finish(audited, rows, summary, page)

    def _check_compute(self) -> None:
        if self.models and len(self.models) != len(self.compute):
            raise InputError(
                f"--models and --compute must pair, got {len(self.models)} and {len(self.compute)}: give each model one"
            )
        for number, spent in enumerate(self.compute):
            if not 0 < spent < float("inf"):
                raise InputError(f"--compute must be positive and finite, got {spent:g}")
            if number and spent < self.compute[number - 1]:
                raise InputError(
                    f"--compute must rise from model to model, got {spent:g} after {self.compute[number - 1]:g}: sort "
                    "the models (or the rows' scores) along with it"
                )

    def _names(self) -> list[str]:
        return list(self.models) or [f"model {i}" for i in range(len(self.compute))]

    def _scored(self, audited: Audited) -> tuple[Table, list[int], list[MetricChain]]:
        """Log-likelihoods of all options under all models and the right options, by question; the models' chains."""
        from loglik.models.load import load
        from loglik.progress import bar
        from loglik.signals.choice import score_options
        from loglik.signals.metric_chain import metric_chain

        questions, options = audited.texts(self.question_field), audited.lists(self.options_field)
        answers = self._answers(audited, [len(texts) for texts in options])
        table: Table = [[] for _ in questions]
        chains = []
        with bar("models", total=len(self.models), unit="models") as advance:
            for name in self.models:
                model = load(name, dtype=self.dtype, device=self.device)
                with rows_named(audited.names):
                    scored = score_options(model, questions, options, separator=self.separator)
                    lengths = {"byte": scored.num_bytes, "character": scored.num_characters}.get(self.normalise)
                    chain = metric_chain(
                        scored.likelihood, scored.question, answers, normalise=self.normalise, lengths=lengths
                    )
                chains.append(chain)
                values = iter(scored.likelihood.value.tolist())
                for own, texts in zip(table, options, strict=True):
                    own.append([next(values) for _ in texts])
                advance(1, name)
        return table, answers, chains

    def _given(self, audited: Audited) -> tuple[Table, list[int], list[MetricChain]]:
        """The same from log-likelihoods that the rows bring along."""
        import torch

        from loglik.kinds import Kind, Unit
        from loglik.likelihood import LogLikelihood
        from loglik.signals.metric_chain import metric_chain

        if self.normalise != "sum":
            raise InputError(f"--normalise {self.normalise} needs the options' lengths: give --models to score them")
        table: Table = []
        for name, record in audited.pairs():
            own = record.get(self.scores_field)
            if not isinstance(own, list) or len(own) != len(self.compute):
                raise InputError(
                    f"{name}: {self.scores_field} must have a list of numbers for each of the {len(self.compute)} "
                    "computes; or give --models"
                )
            sizes = {len(values) if isinstance(values, list) else 0 for values in own}
            if len(sizes) > 1 or min(sizes) < 2:
                raise InputError(f"{name}: {self.scores_field} must have as many options for each model, two at least")
            if not all(isinstance(x, int | float) and not isinstance(x, bool) and x <= 0 for v in own for x in v):
                raise InputError(f"{name}: {self.scores_field} must be log-probabilities, at most 0")
            table.append([[float(x) for x in values] for values in own])
        sizes_of = [len(own[0]) for own in table]
        answers = self._answers(audited, sizes_of)
        question = torch.arange(len(table)).repeat_interleave(torch.tensor(sizes_of))
        chains = []
        for number in range(len(self.compute)):
            value = torch.tensor([x for own in table for x in own[number]], dtype=torch.float64)
            likelihood = LogLikelihood(value, Kind.EXACT, Unit.EVENT, torch.ones(len(value), dtype=torch.long))
            with rows_named(audited.names):
                chains.append(metric_chain(likelihood, question, answers))
        return table, answers, chains

    def _answers(self, audited: Audited, sizes: list[int]) -> list[int]:
        found = audited.whole_numbers(self.answer_field)
        for name, answer, size in zip(audited.names, found, sizes, strict=True):
            if not 0 <= answer < size:
                raise InputError(
                    f"{name}: {self.answer_field} must be an option's number from 0 to {size - 1}, got {answer}"
                )
        return found

    def _mass(self, chains: list[MetricChain]) -> dict[str, float] | str:
        """What the third link brings in: the wrong options' mass and its trend."""
        from loglik.signals.metric_chain import mass_trend

        try:
            right, wrong, together = mass_trend(chains, self.compute)
        except InputError as error:
            return f"undefined: {error}"
        return {
            "slope_of_right": float(right.mean()),
            "slope_of_wrong": float(wrong.mean()),
            "rise_together": float((together > 0).mean()),
        }

    def _draw(self, page: AuditPage, chains: list[MetricChain], found: dict[str, ScoreCompute]) -> None:
        from loglik.signals.metric_chain import LINKS
        from loglik.signals.plots import plot_heat_map, plot_lines

        if found:
            at = np.linspace(-1, 1, 201)
            page.figure(
                "Correlation with compute, question by question",
                plot_lines(
                    {name: (at, own.survival(at)) for name, own in found.items()},
                    x_label=f"{self.method} correlation of a question's score with compute",
                    y_label="share of the questions above",
                ),
                "The further right a line falls, the better its score follows compute.",
            )
        means = np.array([[chain.means()[name] for name in LINKS] for chain in chains]).T
        spent = np.log10(np.array(self.compute))
        for heading, rows in (("Means", range(1, len(LINKS))), ("Mean log-likelihood", range(1))):
            if np.isfinite(means[list(rows)]).all():
                lines = {LINKS[i]: (spent, means[i]) for i in rows}
                page.figure(heading, plot_lines(lines, x_label="log10 of compute", y_label="mean over the questions"))
        low, high = means.min(1, keepdims=True), means.max(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = (means - low) / (high - low)
        scaled[~np.isfinite(scaled)] = np.nan
        if np.isfinite(scaled).any():
            drawn = plot_heat_map(
                scaled,
                rows=LINKS,
                columns=[f"{c:.3g}" for c in self.compute],
                label="from the lowest mean to the highest",
            )
            page.figure("Which metric rises when", drawn, "Means over the questions, each row in its own range.")


def _told(found: ScoreCompute) -> dict[str, float]:
    names = ("mean", "median", "area", "wasserstein", "energy", "constant")
    return {name: float(getattr(found, name)) for name in names}
