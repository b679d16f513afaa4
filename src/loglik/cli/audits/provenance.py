"""``loglik audit provenance``: does a model, or a text, derive from a training run?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, rows_named
from loglik.errors import InputError

if TYPE_CHECKING:
    from loglik.likelihood import LogLikelihood

__all__ = ["AuditProvenance"]


@dataclass(frozen=True, kw_only=True)
class AuditProvenance(ModelAudit):
    """Test whether a model, or a text, derives from a training run: dependence on the order of its data, exact p-value.

    The query setting asks MODEL for its likelihoods of the training texts. The observational settings have a text
    alone: partition counts in which part of the training texts its n-grams stand, reshuffle compares its likelihood
    under the run in the true order with that under runs in random orders.
    """

    setting: Literal["query", "partition", "reshuffle"] = "query"
    """What there is: the suspect model; much of its text; some of its text and retrained models."""
    reference: str | None = None
    """Query: an independent model, whose likelihoods remove how hard each text is."""
    texts: str | None = None
    """Partition: rows of the suspect's text. DATA are the training texts in their order; MODEL cuts both to tokens."""
    shuffled: tuple[str, ...] = ()
    """Reshuffle: models from the same checkpoint, trained in random orders. DATA are the suspect's texts, MODEL is the
    run in the true order."""
    text_field: str = "text"
    """Column of the text."""
    prompt_field: str = "prompt"
    """Reshuffle: column of what stands before the text and is not scored, if there is one."""
    order_field: str = "order"
    """Query, partition: column of the place in the training order; larger is later."""
    strata_field: str | None = None
    """Query: column of the stage; orders are permuted within a stage only."""
    repeated: Literal["refuse", "average"] = "refuse"
    """Query: equal places; refuse them, or average their ranks (texts of one batch)."""
    max_n: int = 8
    """Partition: longest n-gram."""
    buckets: int | None = None
    """Partition: parts of consecutive training texts; one text each by default."""
    method: Literal["auto", "exact", "monte_carlo", "asymptotic"] = "auto"
    """Compare with all orders, with random ones, or with Student's t."""
    permutations: int = 9999
    """Random orders."""
    seed: int = 0
    """Of the random orders."""

    def run(self) -> None:
        """Read, score, test, write."""
        self._check()
        audited = self.read()
        {"query": self._query, "partition": self._partition, "reshuffle": self._reshuffle}[self.setting](audited)

    def _check(self) -> None:
        if self.setting == "partition" and self.texts is None:
            raise InputError("the partition setting counts n-grams of the suspect's text: give it as --texts FILE")
        if self.setting == "reshuffle" and len(self.shuffled) < 2:
            raise InputError(
                "the reshuffle setting compares with runs in random orders: give two models or more as --shuffled"
            )
        options: dict[str, tuple[str, Any]] = {
            "--reference": ("query", self.reference),
            "--texts": ("partition", self.texts),
        }
        options |= {"--shuffled": ("reshuffle", self.shuffled or None), "--strata-field": ("query", self.strata_field)}
        for name, (setting, value) in options.items():
            if value is not None and setting != self.setting:
                raise InputError(f"{name} belongs to the {setting} setting: leave it out, or set --setting {setting}")

    def _query(self, audited: Audited) -> None:
        import torch

        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_order
        from loglik.signals.provenance import query_test

        texts, order = audited.texts(self.text_field), audited.numbers(self.order_field)
        strata = None if self.strata_field is None else audited.numbers(self.strata_field)
        own = self._likelihood(self.load(), texts, audited)
        other = None
        if self.reference is not None:
            other = self._likelihood(self.load(self.reference), texts, audited)
        with rows_named(audited.names):
            found = query_test(
                own,
                torch.tensor(order, dtype=torch.float64),
                reference=other,
                repeated=self.repeated,
                strata=strata,
                method=self.method,
                permutations=self.permutations,
                seed=self.seed,
            )
        score = own.mean_per_unit().value.double()
        if other is not None:
            score = score - other.mean_per_unit().value.double()
        rows: list[dict[str, Any]] = [
            {"order": place, "log_prob": float(total), "score": float(value)}
            for place, total, value in zip(order, own.value, score, strict=True)
        ]
        page = AuditPage("Provenance", f"{self.model} against the training order of {self.data}")
        if self.report is not None:
            label = "nats per token" + (" more than the reference" if other is not None else "")
            caption = "Later data are likelier under a model that derives from the run; red: means of equal parts."
            page.figure("Likelihood and order", plot_order(torch.tensor(order), score, label=label), caption)
        summary = {"rows": len(texts), "model": self.model, "reference": self.reference, **_told(found)}
        self.finish(audited, rows, summary, page)

    def _partition(self, audited: Audited) -> None:
        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_order
        from loglik.signals.provenance import partition_counts, partition_test
        from loglik.signals.texts import text_tokens

        documents, order = audited.texts(self.text_field), audited.numbers(self.order_field)
        suspect = self.read(self.texts)
        model = self.load()
        transcript = text_tokens(model, documents, names=audited.names)
        texts = text_tokens(model, suspect.texts(self.text_field), names=suspect.names)
        with rows_named(audited.names):
            counts = partition_counts(transcript, texts, order=order, max_n=self.max_n)
            found = partition_test(
                counts, buckets=self.buckets, method=self.method, permutations=self.permutations, seed=self.seed
            )
        rows: list[dict[str, Any]] = [
            {"order": place, "n_grams": int(count)} for place, count in zip(order, counts, strict=True)
        ]
        page = AuditPage("Provenance", f"{self.texts} against the training order of {self.data}")
        if self.report is not None:
            caption = "A text that derives from the run has more of the late data in it; red: means of equal parts."
            drawn = plot_order(order, counts.double(), label="longest n-grams of the text")
            page.figure("N-grams and order", drawn, caption)
        summary = {
            "rows": len(documents),
            "texts": len(texts),
            "tokens": sum(map(len, texts)),
            "buckets": found.n,
            **_told(found),
        }
        self.finish(audited, rows, summary, page)

    def _reshuffle(self, audited: Audited) -> None:
        import torch

        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_bars
        from loglik.signals.provenance import reshuffle_test

        texts = audited.texts(self.text_field)
        prompts = audited.texts(self.prompt_field) if audited.has(self.prompt_field) else None
        runs = [self._likelihood(self.load(name), texts, audited, prompts) for name in (self.model, *self.shuffled)]
        with rows_named(audited.names):
            found = reshuffle_test(runs[0], runs[1:])
        values = torch.stack([run.value.double() for run in runs])
        rows: list[dict[str, Any]] = [
            {"log_prob": float(true), "mean_log_prob_of_random_orders": float(other)}
            for true, other in zip(values[0], values[1:].mean(0), strict=True)
        ]
        means = values.mean(1).tolist()
        page = AuditPage("Provenance", f"{self.data} under the true order and {found.n} random ones")
        if self.report is not None:
            names = ["true order", *(f"{number}: {Path(name).name}" for number, name in enumerate(self.shuffled, 1))]
            gains = {name: mean - means[0] for name, mean in zip(names, means, strict=True)}
            caption = "All below the true order: the text derives from a run in that order."
            drawn = plot_bars(gains, label="mean log-likelihood of the texts, less that of the true order (nats)")
            page.figure("Orders", drawn, caption)
        summary = {
            "rows": len(texts),
            "model": self.model,
            "random_orders": found.n,
            "deviations_above_the_random_orders": found.statistic,
            "p_value": found.p_value,
            "p_student": found.p_student,
        }
        self.finish(audited, rows, summary, page)

    def _likelihood(
        self, model: Any, texts: list[str], audited: Audited, prompts: list[str] | None = None
    ) -> LogLikelihood:
        from loglik.progress import bar
        from loglik.signals.texts import text_log_probs

        with bar("texts", total=len(texts), unit="rows") as advance:
            return text_log_probs(
                model, texts, prompts, names=audited.names, batch_size=self.batch_size, advance=advance
            )


def _told(found: Any) -> dict[str, Any]:
    return {
        "rank_correlation": found.statistic,
        "p_value": found.p_value,
        "method": found.method,
        "orders": found.orders,
    }
