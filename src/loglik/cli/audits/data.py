"""``loglik audit data``: how much of a data set can be learned, and how much is noise?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, RowAudit, rows_named, write_table
from loglik.errors import InputError

if TYPE_CHECKING:
    from loglik.signals.pages import AuditPage
    from loglik.training.data_codes import DataRun
    from loglik.training.data_report import DataReport

__all__ = ["AuditData"]


@dataclass(frozen=True, kw_only=True)
class AuditData(RowAudit):
    """Epiplexity and time-bounded entropy of texts, by small models trained on them: a row per model and checkpoint."""

    text_field: str = "text"
    """Column of the text."""
    tokenizer: str = "bytes"
    """bytes, tiny, or a folder that holds a tokenizer."""
    estimator: Literal["both", "prequential", "requential"] = "both"
    """The area of the loss curve, the divergence of a student from its teacher (several times the work), or both."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Of the models, multiples of 16."""
    layers: int = 2
    """Of each model."""
    seeds: int = 1
    """Models per width; with more the summary has the range."""
    window: int = 64
    """Tokens that a model sees at once."""
    batch_size: int = 16
    """Windows per step."""
    learning_rate: float = 2e-3
    """Constant after the warm-up."""
    warmup_steps: int = 10
    """Of linear warm-up."""
    max_tokens: int | None = 300_000
    """Tokens that are read at most, held-out ones included."""
    held_out: float = 0.05
    """Share of the windows that gives the final losses."""
    checkpoints: int = 6
    """Points per run, at numbers of steps that double."""
    max_kl: float = 0.5
    """Nats per token above which a teacher waits for its student."""
    overhead: bool = False
    """Count what coding each sampled batch costs beside its divergence: requential bits become an upper bound."""
    data_tokens: float | None = None
    """Tokens of the data set that the codes are about; those of DATA by default."""
    budget: float | None = None
    """FLOPs of training and one reading; what the best point of the grid takes by default."""
    keep: str | None = None
    """Folder of finished runs: an interrupted audit goes on from there."""
    device: str = "cpu"
    """Of the models."""

    def run(self) -> None:
        """Read, train, code, write."""
        from loglik.signals.pages import AuditPage
        from loglik.training.data_codes import CodeGrid, data_code_runs
        from loglik.training.data_report import data_report
        from loglik.training.token_data import read_tokenizer, token_data

        grid = CodeGrid(
            widths=self.widths,
            layers=self.layers,
            seeds=self.seeds,
            methods=("prequential", "requential") if self.estimator == "both" else (self.estimator,),
            window=self.window,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            max_tokens=self.max_tokens,
            held_out=self.held_out,
            checkpoints=self.checkpoints,
            max_kl=self.max_kl,
        )
        for name in ("budget", "data_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
        audited = self.read()
        texts = audited.texts(self.text_field)
        with rows_named(audited.names):
            data = token_data(texts, read_tokenizer(self.tokenizer))
        runs: list[DataRun] = []
        for run in data_code_runs(data, grid, device=self.device, keep=self.keep):
            runs.append(run)
            found = data_report(runs, data, data_tokens=self.data_tokens, overhead=self.overhead)
            if self.output is not None:  # what is computed is kept, whatever happens to the next run
                write_table(self.output, [{"row": row["point"], **_numbers(row)} for row in found.rows])
        budget = float("inf") if self.budget is None else self.budget
        found = data_report(runs, data, data_tokens=self.data_tokens, budget=budget, overhead=self.overhead)
        summary = {
            "texts": len(texts),
            "tokenizer": self.tokenizer,
            "tokens": len(data.ids),
            "bytes": data.num_bytes,
            "data_tokens": self.data_tokens or float(len(data.ids)),
            "budget": self.budget,
            **found.summary,
        }
        page = AuditPage("Structure and noise", f"{self.data} as {self.tokenizer}")
        if self.report is not None:
            _draw(page, runs, found)
        points = Audited([row["point"] for row in found.rows], [{}] * len(found.rows), audited.left_out)
        self.finish(points, [_numbers(row) for row in found.rows], summary, page)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A point without its name, which the table has as its row."""
    return {name: value for name, value in row.items() if name != "point"}


def _draw(page: AuditPage, runs: list[DataRun], found: DataReport) -> None:
    from loglik.signals.code_plots import plot_code_areas, plot_code_frontiers

    words = {
        "prequential": (
            "bits per token",
            "The loss before each update. The shaded area above the final loss is structure; what is below is noise.",
        ),
        "requential": (
            "KL in bits per token",
            "Divergence of the student from its teacher before each update. The whole area is structure.",
        ),
    }
    for method, (label, caption) in words.items():
        curves = {f"width {run.width}": run.area() for run in runs if run.method == method and run.seed == 0}
        if curves:
            page.figure(f"Structure as an area ({method})", plot_code_areas(curves, label=label), caption)
    caption = "Every model at every checkpoint, and the hull that a budget chooses from."
    page.figure("Bits against compute", plot_code_frontiers(found.points), caption)
