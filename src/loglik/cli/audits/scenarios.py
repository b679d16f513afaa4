"""``loglik audit scenarios``: does the model recall facts, follow shortcuts or guess, and where does that happen?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, check_writable, write_table
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from loglik.signals.attribution import CausalTrace
    from loglik.signals.scenarios import Fact, Prediction, Scenario

__all__ = ["AuditScenarios"]

_PROMPTS = ("templates", "neutral", "name_prompts", "objects")
_FLAGS = ("string_match", "name_bias", "prompt_bias")


@dataclass(frozen=True, kw_only=True)
class AuditScenarios(ModelAudit):
    """Label predictions about facts: exact recall, heuristics, guesswork or none; trace where they come from."""

    subject_field: str = "subject"
    """Column of the subject, as it stands in a prompt."""
    relation_field: str = "relation"
    """Column of the relation; without it all rows are of one."""
    object_field: str = "object"
    """Column of the right answer; empty for an invented subject, of which nothing is true."""
    popularity_field: str = "popularity"
    """Column of page views, or better of counts in the training data; without it every real subject counts as popular,
    and nothing as guesswork."""
    templates_field: str = "templates"
    """Column of the relation's templates, the same in all rows of a relation: texts with [X] for the subject that end
    right before the object."""
    neutral_field: str = "neutral"
    """Column of nouns that stand for the subject ("She", "The city"): a text or a list."""
    name_prompts_field: str = "name_prompts"
    """Column of prompts about a part of the name ("[X] is a common name in the country of"): a text or a list."""
    prompts: str | None = None
    """A .json file that has these instead: by relation a list of templates, or an object with templates, neutral,
    name_prompts and objects (answers that count as some object of the relation)."""
    top: int = 3
    """Predictions per prompt."""
    flag_top: int = 10
    """Among how many tokens of a shortcut prompt an answer is looked for."""
    recall_count: int = 5
    """Exact recall needs more equal answers than this."""
    guess_count: int = 2
    """A guess has fewer."""
    heuristics_count: int = 4
    """A shortcut on an invented subject counts with more."""
    popular: float = 1000.0
    """Exact recall needs a popularity above, a guess below."""
    predictions: str | None = None
    """Write every prediction here (.jsonl or .parquet): by fact, template and rank."""
    trace: int = 0
    """Trace the first choice after the first template of so many rows, from the top: a causal transformer is needed."""
    trace_kind: Literal["mlp", "attention", "residual"] = "mlp"
    """What is put back into the corrupted run."""
    window: int | None = None
    """Layers that are put back at once; 10 (1 of the residual stream) if left out."""
    noise: float = 3.0
    """Of the corruption, in standard deviations of the traced subjects' embeddings."""
    draws: int = 10
    """Of the noise."""
    seed: int = 0
    """Of the noise."""

    def run(self) -> None:
        """Read, ask, label, trace, write."""
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_bars
        from loglik.signals.scenarios import Scenario, fact_predictions, label_scenarios, scenario_shares

        audited = self.read()
        self._check(audited)
        facts, has_popularity = self._facts(audited)
        asked = self._asked(audited, facts)
        model = self.load()
        try:
            found = fact_predictions(
                model,
                facts,
                asked["templates"],
                neutral=asked["neutral"],
                name_prompts=asked["name_prompts"],
                top=self.top,
                flag_top=self.flag_top,
            )
            labels = label_scenarios(
                found,
                facts,
                candidates=asked["objects"] or None,
                recall_count=self.recall_count,
                guess_count=self.guess_count,
                heuristics_count=self.heuristics_count,
                popularity=self.popular,
            )
        except RowError as error:
            raise _named(error, audited.names) from None
        rows = _rows(facts, found, labels, has_popularity)
        shares = scenario_shares(found, labels, facts)
        first = [p.correct for p in found if p.rank == 0 and not facts[p.fact].is_synthetic]
        summary: dict[str, Any] = {"rows": len(facts), "model": self.model, "predictions": len(found)}
        if first:
            summary["first_choice_correct"] = sum(first) / len(first)
        for kind, share in shares.items():
            summary[str(kind)] = {key: value for key, value in asdict(share).items() if value is not None}
        summary["shortcuts"] = {flag: sum(getattr(p, flag) for p in found) for flag in _FLAGS}
        if not has_popularity:
            summary["popularity"] = "not given: every real subject counts as popular, and nothing as guesswork"
        page = AuditPage("Kinds of predictions", f"{self.data} under {self.model}")
        if self.report is not None:
            counts = {str(kind): float(share.count) for kind, share in shares.items()}
            page.figure("Predictions of each kind", plot_bars(counts, label="predictions"))
            right = {str(kind): share.accuracy for kind, share in shares.items() if share.accuracy is not None}
            if right:
                drawn = plot_bars(right, label="share correct, of real subjects")
                page.figure("How often each kind is right", drawn, "Accuracy alone does not tell the kinds apart.")
        if self.trace:
            kinds = [Scenario(label) for p, label in zip(found, labels, strict=True) if not p.template and not p.rank]
            self._trace(model, audited, facts, asked["templates"], kinds, rows, summary, page)
        if self.predictions is not None:
            every = [
                {"row": audited.names[p.fact], **asdict(p), "scenario": str(label)}
                for p, label in zip(found, labels, strict=True)
            ]
            write_table(self.predictions, every)
        self.finish(audited, rows, summary, page)

    def _check(self, audited: Audited) -> None:
        if self.predictions is not None:
            if not self.predictions.lower().endswith((".jsonl", ".ndjson", ".parquet")):
                raise InputError(f"the format of {self.predictions} is not known: use .jsonl or .parquet")
            check_writable(self.predictions)
        if not 0 <= self.trace <= len(audited):
            raise InputError(f"--trace must be from 0 to the number of rows, {len(audited)}, got {self.trace}")
        if self.window is not None and self.window < 1:
            raise InputError(f"--window must be at least 1 layer, got {self.window}")
        if not 0 <= self.noise < math.inf or self.draws < 1:
            raise InputError(f"--noise must be at least 0 and --draws at least 1, got {self.noise} and {self.draws}")

    def _facts(self, audited: Audited) -> tuple[list[Fact], bool]:
        """The rows' facts, and whether they have popularity."""
        from loglik.signals.scenarios import Fact

        subjects = audited.texts(self.subject_field)
        relations = audited.texts(self.relation_field) if audited.has(self.relation_field) else ["fact"] * len(audited)
        facts = []
        real = [(name, r) for name, r in audited.pairs() if r.get(self.object_field) is not None]
        part = Audited([name for name, _ in real], [record for _, record in real], [])
        objects = iter(part.texts(self.object_field)) if real else iter(())
        has_popularity = bool(real) and part.has(self.popularity_field)
        counts = iter(part.numbers(self.popularity_field)) if has_popularity else iter(())
        for (_, record), subject, relation in zip(audited.pairs(), subjects, relations, strict=True):
            if record.get(self.object_field) is None:
                facts.append(Fact(relation, subject))
            else:
                facts.append(Fact(relation, subject, next(objects), next(counts, math.inf)))
        return facts, has_popularity or not real

    def _asked(self, audited: Audited, facts: Sequence[Fact]) -> dict[str, dict[str, list[str]]]:
        """Templates, neutral nouns, name prompts and objects by relation."""
        relations = list(dict.fromkeys(fact.relation for fact in facts))
        if self.prompts is not None:
            return _from_file(self.prompts, relations)
        found: dict[str, dict[str, list[str]]] = {name: {} for name in _PROMPTS}
        columns = {
            "templates": self.templates_field,
            "neutral": self.neutral_field,
            "name_prompts": self.name_prompts_field,
        }
        for kind, column in columns.items():
            if not audited.has(column):
                if kind == "templates":
                    raise InputError(
                        f"{audited.names[0]} has no {column}: give every row its relation's templates, or --prompts"
                    )
                continue
            for (name, record), fact in zip(audited.pairs(), facts, strict=True):
                texts = _texts(record[column], f"{name}: {column}")
                if found[kind].setdefault(fact.relation, texts) != texts:
                    raise InputError(
                        f"{name}: {column} is not that of other rows of the relation {fact.relation!r}: give all the "
                        "same"
                    )
        return found

    def _trace(
        self,
        model: Any,
        audited: Audited,
        facts: Sequence[Fact],
        templates: dict[str, list[str]],
        kinds: Sequence[Scenario],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """Causal traces of the first rows: a heat map of each, and of each kind."""
        from loglik.progress import bar
        from loglik.signals.attribution import causal_trace, embedding_spread
        from loglik.signals.plots import plot_heat_map
        from loglik.signals.pooled_traces import pool_traces
        from loglik.signals.scenarios import SUBJECT
        from loglik.signals.subject_prompts import subject_prompt

        prompts = []
        for name, fact in zip(audited.names[: self.trace], facts, strict=False):
            try:
                text = templates[fact.relation][0].replace(SUBJECT, fact.subject)
                prompts.append(subject_prompt(model, text, fact.subject))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        spread = embedding_spread(model, prompts)
        traces: list[CausalTrace] = []
        with bar("traces", total=len(prompts), unit="rows") as advance:
            for prompt in prompts:
                traces.append(
                    causal_trace(
                        model,
                        prompt,
                        kind=self.trace_kind,
                        window=self.window,
                        noise=self.noise,
                        spread=spread,
                        draws=self.draws,
                        seed=self.seed,
                        batch_size=max(self.batch_size, self.draws),
                    )
                )
                advance(1)
        layers = [str(layer) for layer in range(traces[0].score.shape[1])]
        for row in rows:
            row |= {"trace_target": None, "trace_high": None, "trace_low": None, "indirect_effect": None}
        summary["trace_spread"] = spread
        for kind in dict.fromkeys(kinds[: self.trace]):
            own = [trace for trace, label in zip(traces, kinds, strict=False) if label is kind]
            pooled = pool_traces(own)
            effect = sum(trace.total_effect for trace in own) / len(own)
            peak = max(pooled.effect, key=lambda name: float(pooled.effect[name].max()))
            summary[f"trace_of_{kind}"] = {
                "rows": len(own),
                "total_effect": effect,
                "peak": str(peak),
                "layer": int(pooled.effect[peak].argmax()),
                "indirect_effect": float(pooled.effect[peak].max()),
            }
            if self.report is not None:
                drawn = plot_heat_map(
                    [values.tolist() for values in pooled.effect.values()],
                    rows=[f"{name} ({pooled.count[name]})" for name in pooled.effect],
                    columns=layers,
                    label="indirect effect on p(a)",
                    diverging=True,
                )
                page.figure(
                    f"Traces of {kind}",
                    drawn,
                    f"{self.trace_kind} put back around each layer, {len(own)} rows, mean total effect {effect:.3g}.",
                )
        for row, trace, name in zip(rows, traces, audited.names, strict=False):
            target = str(model.tokenizer.decode([trace.prompt.target]))
            row |= {
                "trace_target": target,
                "trace_high": trace.high,
                "trace_low": trace.low,
                "indirect_effect": trace.indirect_effect.tolist(),
            }
            if self.report is not None:
                begin, end = trace.prompt.span
                names = [str(model.tokenizer.decode([token])) for token in trace.prompt.ids]
                drawn = plot_heat_map(
                    trace.score,
                    rows=[f"{text}*" if begin <= i < end else text for i, text in enumerate(names)],
                    columns=layers,
                    label=f"p({target.strip()})",
                )
                page.figure(f"Trace of {name}", drawn, f"Clean {trace.high:.3g}, corrupted {trace.low:.3g}; * subject.")


def _rows(
    facts: Sequence[Fact], found: Sequence[Prediction], labels: Sequence[Scenario], has_popularity: bool
) -> list[dict[str, Any]]:
    """A row per fact: first choices, and how many predictions are of each kind."""
    from loglik.signals.scenarios import Scenario

    rows: list[dict[str, Any]] = []
    for number, fact in enumerate(facts):
        own = [(p, label) for p, label in zip(found, labels, strict=True) if p.fact == number]
        first = [p for p, _ in own if p.rank == 0]
        row: dict[str, Any] = {"subject": fact.subject, "relation": fact.relation, "object": fact.object}
        if has_popularity:
            row["popularity"] = fact.popularity
        row["first_choices"] = [p.answer for p in first]
        row["first_choices_correct"] = None if fact.is_synthetic else sum(p.correct for p in first) / len(first)
        row |= {flag: sum(getattr(p, flag) for p, _ in own) for flag in _FLAGS}
        row |= {str(kind): sum(label is kind for _, label in own) for kind in Scenario if kind is not Scenario.GENERIC}
        rows.append(row)
    return rows


def _from_file(path: str, relations: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise InputError(f"{path} cannot be read ({why}): give a .json file of templates by relation") from None
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold an object with a list of templates, or an object, by relation")
    found: dict[str, dict[str, list[str]]] = {name: {} for name in _PROMPTS}
    for relation in relations:
        entry = given.get(relation)
        parts = {"templates": entry} if isinstance(entry, list) else entry
        if not isinstance(parts, dict) or "templates" not in parts:
            raise InputError(f"{path} has no templates of the relation {relation!r}: add them")
        for name, texts in parts.items():
            if name not in found:
                raise InputError(f"{path}: {relation!r} has {name!r}, and can have {', '.join(_PROMPTS)}")
            found[name][relation] = _texts(texts, f"{path}: {name} of {relation!r}")
    return found


def _texts(value: Any, what: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{what} must be a text or a list of texts that are not empty")
    return list(texts)


def _named(error: RowError, names: Sequence[str]) -> InputError:
    """The error under the file's name of the row, where it names a fact by number."""
    kind, _, number = (error.row or "").partition(" ")
    return InputError(f"{names[int(number)]}: {error.reason}") if kind == "fact" else InputError(str(error))
