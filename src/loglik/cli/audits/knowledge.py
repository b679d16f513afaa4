"""``loglik audit knowledge``: does the model not know an answer, or know it and say something else?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loglik.cli.audits.common import Audited, ModelAudit
from loglik.errors import InputError, RowError

if TYPE_CHECKING:
    from torch import Tensor

    from loglik.models.batch import TokenBatch
    from loglik.signals.knows_but_wrong import Knowledge

__all__ = ["AuditKnowledge"]


@dataclass(frozen=True, kw_only=True)
class AuditKnowledge(ModelAudit):
    """Label questions: unknown (HK-), known but wrong under a perturbing prompt (HK+), or factual."""

    question_field: str = "question"
    """Column of the question."""
    answer_field: str = "answer"
    """Column of the right answer: a text, or a list of aliases."""
    wrong_field: str = "wrong"
    """Column of a wrong answer, of another model for example: with --probe it makes the generic set."""
    bad_prefix_field: str = "bad_prefix"
    """Column of what stands before the question in the perturbing prompt, if it differs from row to row."""
    shots: str | None = None
    """Rows of question, answer and wrong: examples before each question, with right answers in the truthful prompt and
    (unless there is a prefix) wrong ones in the perturbing prompt."""
    num_shots: int = 3
    """Examples that are drawn for each question."""
    good_prefix: str = ""
    """Stands before everything in the truthful prompt."""
    bad_prefix: str | None = None
    """Stands before the question in the perturbing prompt, in place of wrong examples."""
    template: str = "question: {question}\nanswer:"
    """Of questions and examples."""
    labels: Literal["samples", "likelihoods", "both"] = "both"
    """Label by drawn answers, by likelihoods alone (no sampling), or both; the column label is that of the samples."""
    num_samples: int = 5
    """Samples per question, beside the greedy answer."""
    temperature: float = 0.5
    """Of the samples."""
    max_tokens: int = 5
    """Longest answer."""
    probe: bool = False
    """Fit probes of the kinds on hidden states of every block under the perturbing prompt."""
    component: Literal["residual", "mlp", "attention"] = "residual"
    """Which states of a block the probes read."""
    seed: int = 0
    """Of the examples, the samples and the probes' splits."""

    def run(self) -> None:
        """Read, ask, label, probe, write."""
        from loglik.signals.pages import AuditPage

        audited = self.read()
        questions, answers = audited.texts(self.question_field), self._answers(audited)
        self._check()
        good, bad = self._prompts(audited, questions)
        model = self.load()
        rows: list[dict[str, Any]] = [
            {"question": q, "answer": a, "good_prompt": g, "bad_prompt": b}
            for q, a, g, b in zip(questions, answers, good, bad, strict=True)
        ]
        summary: dict[str, Any] = {"rows": len(rows), "model": self.model}
        page = AuditPage("What the model knows", f"{self.data} under {self.model}")
        kinds: Sequence[Knowledge] | None = None
        try:
            if self.labels != "samples":
                kinds = self._likelihoods(model, good, bad, answers, rows, summary, page)
            if self.labels != "likelihoods":
                kinds = self._samples(model, good, bad, answers, rows, summary, page)
            assert kinds is not None
            if self.probe:
                self._probe(model, audited, good, bad, answers, rows, kinds, summary, page)
        except RowError as error:
            raise _named(error, audited.names) from None
        self.finish(audited, rows, summary, page)

    def _check(self) -> None:
        if self.num_shots < 0 or self.num_samples < 0 or self.max_tokens < 1:
            raise InputError("--num-shots and --num-samples must be at least 0, and --max-tokens at least 1")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature must be positive, got {self.temperature}")
        if "{question}" not in self.template:
            raise InputError(f"--template must have {{question}} in it, got {self.template!r}")

    def _answers(self, audited: Audited) -> list[str | list[str]]:
        found: list[str | list[str]] = []
        for name, record in audited.pairs():
            value = record.get(self.answer_field)
            aliases: list[Any] = list(value) if isinstance(value, list) else [value]
            if not aliases or not all(isinstance(text, str) and text.strip() for text in aliases):
                raise InputError(f"{name}: {self.answer_field} must be a text or a list of texts that are not empty")
            found.append(value if isinstance(value, str) else aliases)
        return found

    def _prompts(self, audited: Audited, questions: list[str]) -> tuple[list[str], list[str]]:
        """Each question after truthful examples, and under the perturbing prompt."""
        from loglik.signals.knows_but_wrong import shot_prompts

        right: list[tuple[str, str]] = []
        wrong: list[tuple[str, str]] = []
        own = audited.texts(self.bad_prefix_field) if audited.has(self.bad_prefix_field) else None
        has_prefix = own is not None or self.bad_prefix is not None
        if own is not None and self.bad_prefix is not None:
            raise InputError(f"the rows have {self.bad_prefix_field}, and --bad-prefix is another: leave one out")
        if self.shots is not None:
            read = replace(self, on_error="stop").read(self.shots)
            examples = read.texts(self.question_field)
            right = list(zip(examples, read.texts(self.answer_field), strict=True))
            wrong = right if has_prefix else list(zip(examples, read.texts(self.wrong_field), strict=True))
        elif not has_prefix:
            raise InputError(
                f"the perturbing prompt is missing: give --shots with wrong answers, --bad-prefix, or every row a "
                f"{self.bad_prefix_field}"
            )
        number = self.num_shots if self.shots is not None else 0
        options: dict[str, Any] = {"template": self.template, "seed": self.seed}
        good = list(shot_prompts(questions, right, number=number, prefix=self.good_prefix, **options))
        if not has_prefix:
            return good, list(shot_prompts(questions, wrong, number=number, prefix=self.good_prefix, **options))
        bare = shot_prompts(questions, [], number=0, **options)
        prefixes = own if own is not None else [str(self.bad_prefix)] * len(questions)
        return good, [prefix + prompt for prefix, prompt in zip(prefixes, bare, strict=True)]

    def _samples(
        self,
        model: Any,
        good: list[str],
        bad: list[str],
        answers: list[str | list[str]],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> Sequence[Knowledge]:
        """Labels by one greedy answer and samples, and by the greedy answer under the perturbing prompt."""
        import torch

        from loglik.signals.knows_but_wrong import knowledge_labels
        from loglik.signals.plots import plot_bars

        found = knowledge_labels(
            model,
            good,
            bad,
            answers,
            samples=self.num_samples,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for i, row in enumerate(rows):
            row |= {
                "label": str(found.labels[i]),
                "right_of_attempts": int(found.count[i]),
                "greedy": found.greedy[i],
                "perturbed": found.perturbed[i],
            }
        counts = _counts(found.labels)
        is_known = counts["HK+"] + counts["factual"] > 0
        summary |= {
            "attempts": found.attempts,
            "labels": counts,
            "wrong_among_known": found.error_rate if is_known else "undefined: no question is known",
        }
        if self.report is not None:
            drawn = plot_bars({name: float(count) for name, count in counts.items()}, label="questions")
            page.figure("Labels", drawn, "HK-: never right; HK+: known, and wrong when perturbed; partial: set aside.")
            times = np.bincount(found.count.numpy(), minlength=found.attempts + 1)
            drawn = plot_bars({f"{k} right": float(n) for k, n in enumerate(times)}, label="questions")
            page.figure(f"Right answers among {found.attempts} after truthful examples", drawn)
        return found.labels

    def _likelihoods(
        self,
        model: Any,
        good: list[str],
        bad: list[str],
        answers: list[str | list[str]],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> Sequence[Knowledge]:
        """The same from the probability that the answer is written, without sampling."""
        from loglik.signals.answer_likelihoods import answer_likelihoods, known_probability
        from loglik.signals.knows_but_wrong import likely_knowledge
        from loglik.signals.plots import plot_bars, plot_by_class

        spaced: list[str | list[str]] = [f" {a}" if isinstance(a, str) else [f" {b}" for b in a] for a in answers]
        after, under = (answer_likelihoods(model, p, spaced, temperature=self.temperature) for p in (good, bad))
        known, unknown = known_probability(after.tempered, after.greedy, samples=self.num_samples)
        labels = likely_knowledge(after, under, samples=self.num_samples)
        drop = after.likelihood - under.likelihood
        for i, row in enumerate(rows):
            row |= {
                "likely_label": str(labels[i]),
                "log_p_good": float(after.likelihood.value[i]),
                "log_p_bad": float(under.likelihood.value[i]),
                "knowledge_drop": float(drop.value[i]),
                "p_known": float(known[i]),
                "p_unknown": float(unknown[i]),
            }
        counts = _counts(labels)
        summary |= {
            "likely_labels": counts,
            "expected_known": float(known.sum()),
            "expected_unknown": float(unknown.sum()),
            "mean_knowledge_drop": float(drop.value.mean()),
        }
        if self.report is not None:
            drawn = plot_bars({name: float(count) for name, count in counts.items()}, label="questions")
            page.figure("Labels by likelihoods", drawn)
            wrong = np.array([str(label) == "HK+" for label in labels])
            kept = np.array([str(label) in ("HK+", "factual") for label in labels])
            if len(set(wrong[kept])) == 2:
                drawn = plot_by_class(
                    drop.value.numpy()[kept],
                    wrong[kept],
                    names=("HK+", "factual"),
                    label="what the perturbing prompt takes from log p (nats)",
                )
                page.figure("Knowledge drop", drawn)
        return labels

    def _probe(
        self,
        model: Any,
        audited: Audited,
        good: list[str],
        bad: list[str],
        answers: list[str | list[str]],
        rows: list[dict[str, Any]],
        kinds: Sequence[Knowledge],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """Accuracy of linear probes by layer, before the answer; and of generic ones, behind it."""
        from loglik.signals.plots import plot_lines
        from loglik.signals.probes import probe_accuracy, probe_transfer

        names = [str(kind) for kind in kinds]
        asked = self._states(model, bad)
        curves: dict[str, list[float]] = {}
        for classes in (("HK+", "HK-"), ("HK+", "factual"), ("HK+", "HK-", "factual")):
            title = "probe " + " / ".join(classes)
            kept = [i for i, name in enumerate(names) if name in classes]
            if min(names.count(c) for c in classes) < 2:
                summary[title] = "undefined: it needs two questions of each kind"
                continue
            scored = [probe_accuracy(layer[kept], [names[i] for i in kept], seed=self.seed) for layer in asked]
            best = max(range(len(scored)), key=lambda i, s=scored: s[i].accuracy)  # type: ignore[misc]
            summary[title] = {
                "best_layer": best,
                "accuracy": scored[best].accuracy,
                "last_layer": scored[-1].accuracy,
                "chance": scored[best].chance,
                "questions_per_class": scored[best].per_class,
            }
            curves[title] = [one.accuracy for one in scored]
        title = "probe of a generic set"
        known = [i for i, name in enumerate(names) if name in ("HK+", "factual")]
        if audited.has(self.wrong_field):
            if min(names.count(c) for c in ("HK+", "factual")) < 2:
                summary[title] = "undefined: it needs two questions of each kind"
            else:
                # Behind the answer: what the model said when perturbed, and any question's right and wrong answer.
                texts = audited.texts(self.wrong_field)
                right = [a if isinstance(a, str) else a[0] for a in answers]
                given = [right[i] if names[i] == "factual" else self._perturbed(rows[i], texts[i]) for i in known]
                own = self._states(model, [f"{bad[i]} {a}" for i, a in zip(known, given, strict=True)])
                pairs = [(f"{bad[i]} {a}", i) for each in (right, texts) for i, a in enumerate(each)]
                other = self._states(model, [text for text, _ in pairs])
                labels = ["factual"] * len(right) + ["HK+"] * len(texts)
                found = [
                    probe_transfer(
                        layer[0], [names[i] for i in known], layer[1], labels, known, [i for _, i in pairs],
                        seed=self.seed,
                    )
                    for layer in zip(own, other, strict=True)
                ]  # fmt: skip
                last = found[-1]
                summary[title] = {"specific": last.specific.accuracy, "generic": last.generic.accuracy}
                curves["specific, behind the answer"] = [one.specific.accuracy for one in found]
                curves["generic, behind the answer"] = [one.generic.accuracy for one in found]
        if self.report is not None and curves:
            layers = list(range(len(asked)))
            drawn = plot_lines(
                {name: (layers, values) for name, values in curves.items()},
                x_label=f"block ({self.component})",
                y_label="accuracy on held-out questions, balanced",
            )
            page.figure("Probes", drawn)

    def _perturbed(self, row: dict[str, Any], wrong: str) -> str:
        """What the model said under the perturbing prompt, or the wrong answer of the row where nothing was drawn."""
        text = str(row.get("perturbed", "")).strip().split("\n")[0]
        return text or wrong

    def _states(self, model: Any, texts: Sequence[str]) -> Tensor:
        """(L, N, D) states of every block at the last token of each text."""
        import torch

        from loglik.models.batch import TokenBatch
        from loglik.signals.probes import component_states
        from loglik.signals.scenarios import prompt_tokens

        tokens = prompt_tokens(model, texts)
        batches: list[TokenBatch] = [
            TokenBatch.from_lists(tokens[i : i + self.batch_size]) for i in range(0, len(tokens), self.batch_size)
        ]
        return torch.cat([component_states(model, batch, self.component).float().cpu() for batch in batches], 1)


def _counts(labels: Sequence[Knowledge]) -> dict[str, int]:
    from loglik.signals.knows_but_wrong import Knowledge

    return {str(kind): sum(label is kind for label in labels) for kind in Knowledge}


def _named(error: RowError, names: Sequence[str]) -> InputError:
    """The error under the file's name of the row, where it names a question by number."""
    kind, _, number = (error.row or "").partition(" ")
    return InputError(f"{names[int(number)]}: {error.reason}") if kind == "question" else InputError(str(error))
