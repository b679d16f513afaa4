"""``loglik score``: log-likelihoods of the texts in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table

from loglik.errors import InputError
from loglik.progress import stderr_console

if TYPE_CHECKING:
    from loglik.scoring.run import RunSummary

__all__ = ["Score"]


@dataclass(frozen=True)
class Score:
    """Score texts, or completions given prompts: one labelled log-likelihood per row."""

    input: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A .jsonl, .parquet, .csv or .txt file (one text per line), or - for JSONL on standard input."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """tiny, a directory written by save_pretrained, or a name on the model hub."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "-"
    """A .jsonl, .parquet or .csv file; - writes JSONL to standard output."""
    per_token: bool = False
    """Add the columns tokens and token_log_probs."""
    report: str | None = None
    """Write a self-contained HTML report here."""
    prompt_field: str = "prompt"
    """Column of the text that is conditioned on."""
    completion_field: str = "completion"
    """Column of the text that is scored."""
    text_field: str = "text"
    """Column of unconditional text, where there is no completion."""
    id_field: str = "id"
    """Column that names the row; the row's number where absent."""
    format: Literal["auto", "jsonl", "parquet", "csv", "txt"] = "auto"
    """Format of the input; auto goes by its extension."""
    boundary: Literal["joint", "separate"] = "joint"
    """Tokenise prompt and completion together (a token that straddles them is scored) or apart."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Prepend BOS: where the tokenizer does or nothing stands before the text, always, or never."""
    overflow: Literal["error", "window", "skip"] = "error"
    """What happens to a row longer than the context."""
    stride: int | None = None
    """Scored tokens per window; half the context by default."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the weights; sums and log-softmax are float32 or better in any case."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU if there is one."""
    family: Literal["causal", "seq2seq", "masked"] | None = None
    """Kind of model; read from its configuration by default."""
    pll: Literal["original", "within_word_l2r"] = "original"
    """Which pseudo-log-likelihood a masked language model gives."""
    max_batch_tokens: int | None = None
    """Tokens per forward pass, padding included; chosen from device and vocabulary by default."""
    on_error: Literal["stop", "row"] = "stop"
    """Stop at a row that cannot be scored, or write its error in the row and go on."""
    resume: bool = False
    """Continue an interrupted run: finished rows are kept."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Score the file and print a summary on standard error."""
        from loglik.models.load import load
        from loglik.scoring.engine import ScoreOptions
        from loglik.scoring.read import Fields
        from loglik.scoring.run import ScoreJob, score_file

        options = ScoreOptions(self.boundary, self.bos, self.overflow, self.stride, self.max_batch_tokens)
        job = ScoreJob(
            source=self.input,
            output=self.output,
            options=options,
            fields=Fields(self.prompt_field, self.completion_field, self.text_field, self.id_field),
            format=self.format,
            per_token=self.per_token,
            on_error=self.on_error,
            resume=self.resume,
            overwrite=self.overwrite,
            report=self.report,
            settings={"model": self.model, "dtype": self.dtype, "family": self.family, "pll": self.pll},
        )
        kept = "" if self.output == "-" else f"; finished rows are kept, pass --resume to continue {self.output}"
        try:
            summary = score_file(
                job,
                lambda: load(self.model, dtype=self.dtype, device=self.device, family=self.family, pll=self.pll),
            )
        except KeyboardInterrupt:
            raise InputError(f"interrupted{kept}") from None
        self._print(summary)

    def _print(self, summary: RunSummary) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        bpb = summary.bits_per_byte
        kinds = ", ".join(sorted(summary.kinds))
        facts = {
            "rows": f"{summary.rows:,}" + (f" (and {summary.resumed:,} done before)" if summary.resumed else ""),
            "errors": f"{summary.errors:,}" if summary.errors else "",
            "tokens": f"{summary.tokens:,}",
            "bytes": f"{summary.bytes:,}",
            "log-prob": f"{summary.nats:,.3f} nats ({kinds})" if kinds else "",
            "bits per byte": f"{bpb:.4f}" if bpb is not None else "",
            "straddled": f"{summary.straddled:,} rows" if summary.straddled else "",
            "shortened context": f"{summary.windowed:,} tokens" if summary.windowed else "",
            "BOS": summary.bos,
            "output": self.output if self.output != "-" else "",
            "report": self.report or "",
        }
        for name, value in facts.items():
            if value:
                table.add_row(name, value)
        stderr_console().print(table)
