"""``loglik score``: log-likelihoods of the texts in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from loglik.errors import InputError
from loglik.progress import stderr_console

if TYPE_CHECKING:
    from loglik.scoring.dry_run import DryRun
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
    boundary: Literal["joint", "separate", "exact"] = "joint"
    """Tokenise prompt and completion together (a token that straddles them is scored) or apart, or score bytes given
    bytes over all tokenisations of their boundary."""
    tokenisations: Literal["canonical", "all"] = "canonical"
    """What exact is a probability of: the model restricted to canonical tokenisations, or all (then it is a bound)."""
    level: Literal["token", "word"] = "token"
    """Add the columns words and word_log_probs, with the beginning-of-word correction."""
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
    family: Literal["causal", "seq2seq", "masked", "diffusion"] | None = None
    """Kind of model; read from its configuration by default. A masked language model can be read as diffusion."""
    pll: Literal["original", "within_word_l2r"] = "original"
    """Which pseudo-log-likelihood a masked language model gives."""
    estimator: str | None = None
    """Of a diffusion model's bound: count, bernoulli, time, order, canonical, quadrature, left_to_right, ..."""
    points: int | None = None
    """Network evaluations that one draw of the estimator spreads."""
    num_samples: int | None = None
    """Independent draws per row; 16 by default."""
    target_stderr: float | None = None
    """Draw on until a row's standard error is at most this many nats."""
    mask_token_id: int | None = None
    """Mask token of a diffusion model whose files do not name it."""
    max_batch_tokens: int | None = None
    """Tokens per forward pass; chosen from the device by default."""
    max_cache_bytes: int | None = None
    """Bytes of keys and values that shared prefixes may hold; a quarter of the free memory by default."""
    path: Literal["auto", "packed", "cached", "padded"] = "auto"
    """How forward passes of a causal model run; the fastest that gives the model's own numbers by default."""
    dry_run: bool = False
    """Print the plan (rows, tokens, what sharing saves, memory, time) and score nothing."""
    engine: Literal["local", "ray"] = "local"
    """Score in this process, or on the workers of a Ray cluster (needs loglik[scale])."""
    workers: int | None = None
    """Replicas of the model on Ray; by default one per GPU, or one per machine where there are none."""
    ray_address: str | None = None
    """A running Ray cluster (auto, host:6379, ...); by default RAY_ADDRESS, or a new one on this machine."""
    on_error: Literal["stop", "row"] = "stop"
    """Stop at a row that cannot be scored, or write its error in the row and go on."""
    resume: bool = False
    """Continue an interrupted run: finished rows are kept."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Score the file and print a summary on standard error."""
        from functools import partial

        from loglik.models.load import load
        from loglik.scoring.engine import ScoreOptions
        from loglik.scoring.ray_engine import RayCluster
        from loglik.scoring.read import Fields
        from loglik.scoring.run import ScoreJob, plan_file, score_file

        if self.engine != "ray" and (self.workers is not None or self.ray_address is not None):
            raise InputError("--workers and --ray-address are options of --engine ray: pass it too or drop them")
        options = ScoreOptions(
            boundary=self.boundary,
            bos=self.bos,
            overflow=self.overflow,
            stride=self.stride,
            max_batch_tokens=self.max_batch_tokens,
            max_cache_bytes=self.max_cache_bytes,
            path=self.path,
            level=self.level,
            tokenisations=self.tokenisations,
        )
        given = {
            "estimator": self.estimator,
            "points": self.points,
            "num_samples": self.num_samples,
            "target_stderr": self.target_stderr,
            "mask_token_id": self.mask_token_id,
        }
        diffusion: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
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
            cluster=RayCluster(self.workers, self.ray_address) if self.engine == "ray" else None,
            settings={"model": self.model, "dtype": self.dtype, "family": self.family, "pll": self.pll} | diffusion,
        )
        model = partial(
            load, self.model, dtype=self.dtype, device=self.device, family=self.family, pll=self.pll, **diffusion
        )
        if self.dry_run:
            self._print_plan(plan_file(job, model))
            return
        kept = "" if self.output == "-" else f"; finished rows are kept, pass --resume to continue {self.output}"
        try:
            summary = score_file(job, model)
        except KeyboardInterrupt:
            raise InputError(f"interrupted{kept}") from None
        self._print(summary)

    def _print_plan(self, plan: DryRun) -> None:
        facts = {
            "rows": f"{plan.rows:,}",
            "errors": f"{plan.errors:,} rows cannot be scored, first {plan.first_error}" if plan.errors else "",
            "path": plan.path,
            "tokens row by row": f"{plan.total_tokens:,}",
            "distinct tokens": f"{plan.distinct_tokens:,}",
            "tokens computed": f"{plan.computed_tokens:,} in {plan.passes:,} passes",
            "saving": f"{plan.saving:.1f} times fewer tokens than row by row",
            "log-probabilities": f"{plan.scored_tokens:,}",
            "memory": f"{_size(plan.weight_bytes)} weights, {_size(plan.cache_bytes)} keys and values, "
            f"about {_size(plan.pass_bytes)} for a pass",
            "time": f"about {_duration(plan.seconds)}" if plan.seconds is not None else "",
        }
        Console().print(_two_columns(facts))

    def _print(self, summary: RunSummary) -> None:
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
            "path": summary.path,
            "output": self.output if self.output != "-" else "",
            "report": self.report or "",
        }
        stderr_console().print(_two_columns(facts))


def _two_columns(facts: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
