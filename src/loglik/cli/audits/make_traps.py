"""``loglik audit make-traps``: sequences to publish, by which a model can be asked later what it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loglik.cli.audits.common import Audited, ModelOptions, Outputs, check_writable, read_rows, write_table
from loglik.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["AuditMakeTraps"]


@dataclass(frozen=True, kw_only=True)
class AuditMakeTraps(ModelOptions, Outputs):
    """Draw trap texts of a chosen perplexity from a reference model, and a lot that says how often to publish each.

    Those with 0 repetitions stay unused and secret: `loglik audit traps` holds the others against them.
    """

    length: int = 50
    """Tokens of each trap."""
    edges: tuple[float, ...] = (10.0, 100.0)
    """Rising perplexities, between which the ranges lie: 10 50 100 for two."""
    per_range: int = 20
    """Traps per range of perplexity, used and unused together."""
    repetitions: tuple[int, ...] = (0, 1, 10, 100)
    """How often traps are put into their document: the lot gives each number to as many of a range; 0 is one."""
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    """Of the draws, in turn; higher ones give higher perplexities."""
    max_similarity: float = 0.2
    """A trap that shares a larger part of its tokens with another is dropped."""
    max_draws: int = 20_000
    """Draws after which to give up."""
    seed: int = 0
    """Of the draws, the lot and the places."""
    documents: str | None = None
    """Rows of documents to put the traps into, one trap each, in their order; needs --injected."""
    document_field: str = "text"
    """Column of the document."""
    injected: str | None = None
    """Write the documents with their traps here (.jsonl or .parquet)."""

    def run(self) -> None:
        """Draw, assign, inject, write."""
        import torch

        from loglik.signals.pages import AuditPage
        from loglik.signals.plots import plot_lines
        from loglik.signals.trap_scores import survives_decoding
        from loglik.signals.traps import assign_repetitions, generate_traps

        self._check()
        documents = None if self.documents is None else read_rows(self.documents)
        model = self.load()
        generator = torch.Generator().manual_seed(self.seed)
        traps = generate_traps(
            model,
            self.length,
            per_bucket=self.per_range,
            edges=self.edges,
            temperatures=self.temperatures,
            max_similarity=self.max_similarity,
            accept=survives_decoding(getattr(model, "tokenizer", None)),
            generator=generator,
            batch_size=self.batch_size,
            max_draws=self.max_draws,
        )
        planned = assign_repetitions(traps.bucket, self.repetitions, generator=generator).tolist()
        names = [f"trap {number}" for number in range(len(traps))]
        rows: list[dict[str, Any]] = []
        for i, ids in enumerate(traps.ids):
            bucket = int(traps.bucket[i])
            rows.append(
                {
                    "id": names[i],
                    "text": model.tokenizer.decode(ids),
                    "repetitions": planned[i],
                    "perplexity": float(traps.perplexity[i]),
                    "perplexity_from": traps.edges[bucket],
                    "perplexity_to": traps.edges[bucket + 1],
                    "temperature": float(traps.temperature[i]),
                }
            )
        summary: dict[str, Any] = {
            "traps": len(traps),
            "tokens": self.length,
            "model": self.model,
            "seed": self.seed,
            "drawn": traps.drawn,
            "least_perplexity": float(traps.perplexity.min()),
            "greatest_perplexity": float(traps.perplexity.max()),
        }
        for times in self.repetitions:
            summary[f"repeated_{times}"] = planned.count(times)
        if documents is not None:
            summary["documents_with_a_trap"] = self._inject(documents, rows, generator)
        page = AuditPage("Traps", f"drawn from {self.model}")
        if self.report is not None:
            sorted_values = traps.perplexity.sort().values
            drawn = plot_lines(
                {"traps": (torch.arange(1, len(traps) + 1), sorted_values)}, x_label="trap", y_label="perplexity"
            )
            page.figure("Perplexities, sorted", drawn)
        self.finish(Audited(names, [*rows], []), rows, summary, page)

    def _check(self) -> None:
        if (self.documents is None) != (self.injected is None):
            raise InputError("--documents and --injected go together: what to put traps into, and where to write it")
        if self.output is None:
            raise InputError("--output is missing: the traps must be kept to be tested later")
        numbers = self.repetitions
        if 0 not in numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0 or len(numbers) < 2:
            raise InputError(f"--repetitions must be different, not negative, and 0 one of several, got {numbers}")
        if self.per_range % len(numbers):
            raise InputError(
                f"--per-range {self.per_range} cannot be divided among {len(numbers)} numbers of repetitions: use a "
                f"multiple of {len(numbers)}"
            )
        self.check_outputs()
        if self.injected is not None:
            check_writable(self.injected)

    def _inject(self, documents: Audited, rows: list[dict[str, Any]], generator: torch.Generator) -> int:
        """Write the documents, and note in the traps' rows where they went."""
        from loglik.signals.traps import inject

        used = [row for row in rows if row["repetitions"]]
        texts = documents.texts(self.document_field)
        if len(texts) < len(used):
            raise InputError(
                f"{len(used)} traps are to be used and there are {len(texts)} documents: give one for each"
            )
        out = [dict(record) for record in documents.records]
        for row in rows:
            row["document"] = None
        for i, row in enumerate(used):
            try:
                new, starts = inject(texts[i], row["text"], row["repetitions"], generator=generator)
            except InputError as error:
                raise InputError(f"{documents.names[i]} of {self.documents}: {error}") from None
            out[i] |= {self.document_field: new, "trap": row["id"], "trap_starts": starts}
            row["document"] = documents.names[i]
        for record in out[len(used) :]:
            record |= {"trap": None, "trap_starts": []}
        write_table(str(self.injected), out)
        return len(used)
