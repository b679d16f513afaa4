"""Score a file: read, score in chunks, commit each chunk, so that a long run survives whatever stops it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from loglik.errors import InputError, RowError
from loglik.models.protocol import TextModel
from loglik.progress import bar
from loglik.scoring.dry_run import DryRun, dry_run
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.ray_engine import LostChunkError, RayCluster, RayScorer, ray_scorer
from loglik.scoring.read import Fields, Format, estimate_rows, read_rows
from loglik.scoring.report import ReportBuilder
from loglik.scoring.rows import InputRow, ScoredRow
from loglik.scoring.sink import InputDigest, Sink, open_sink

__all__ = ["RunSummary", "ScoreJob", "plan_file", "score_file"]

# A chunk is scored and committed together. Its bounds depend on the input alone, so that a resumed run repeats the
# batches, and with them the last bits, of an uninterrupted one.
# Prefixes are shared within a chunk, so that it should be large; what is lost to an interruption is at most one chunk.
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 2_000_000


@dataclass(slots=True)
class RunSummary:
    """What a run amounted to: counts over the rows scored by this process, and rows found done already."""

    rows: int = 0
    resumed: int = 0
    errors: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    straddled: int = 0
    windowed: int = 0
    bos: str = ""
    path: str = ""
    kinds: set[str] = field(default_factory=set)

    def add(self, row: ScoredRow) -> None:
        """Count one row."""
        self.rows += 1
        if row.error is not None or row.log_prob is None:
            self.errors += 1
            return
        self.tokens += row.num_tokens or 0
        self.bytes += row.num_bytes or 0
        self.nats += row.log_prob
        self.straddled += row.boundary == "straddled"
        self.windowed += row.num_windowed or 0
        self.kinds.add(str(row.kind))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits over bytes of all rows together, or None where nothing was scored."""
        return -self.nats / math.log(2) / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """What to score and where to put it.

    Args:
        source: input path, or ``-`` for standard input.
        output: output path, or ``-`` for JSONL on standard output.
        options: how text is scored.
        fields: names of the input's columns.
        format: of the input; by extension if ``auto``.
        per_token: write `tokens` and `token_log_probs` too.
        on_error: ``stop`` at the first row that cannot be scored (what was scored is kept), or write its error in the
            `error` column and go on (``row``).
        resume: continue an interrupted run.
        overwrite: replace an existing output.
        report: path of an HTML report.
        cluster: score on the workers of a Ray cluster; None: in this process. A run may be resumed either way.
        settings: what else decides the numbers (model, dtype); a resumed run must agree with them.
    """

    source: str
    output: str = "-"
    options: ScoreOptions = field(default_factory=ScoreOptions)
    fields: Fields = field(default_factory=Fields)
    format: Format = "auto"
    per_token: bool = False
    on_error: Literal["stop", "row"] = "stop"
    resume: bool = False
    overwrite: bool = False
    report: str | None = None
    cluster: RayCluster | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def score_file(
    job: ScoreJob,
    model: TextModel | Callable[[], TextModel],
    *,
    stdin: BinaryIO | None = None,
    stdout: TextIO | None = None,
) -> RunSummary:
    """Run a `ScoreJob`: input, output and options are checked before a model given as a function is loaded.

    Raises:
        InputError: for input, output or options that cannot be used.
        RowError: under ``on_error="stop"``, at the first row that cannot be scored, after the rows before it were
            committed.
    """
    rows = read_rows(job.source, fields=job.fields, format=job.format, stdin=stdin)
    first = next(rows)  # a missing or empty input shows here, before anything is loaded or written
    builder = _report(job, job.report) if job.report is not None else None
    sink = open_sink(
        job.output,
        settings=_settings(job),
        per_token=job.per_token,
        resume=job.resume,
        overwrite=job.overwrite,
        per_word=job.options.level == "word",
        stdout=stdout,
    )
    summary = RunSummary(resumed=sink.done_rows)
    if builder is not None:
        for done in sink.committed():
            builder.add(done)
    if sink.complete:
        if builder is not None and job.report is not None:
            builder.write(job.report)
        return summary
    digest = InputDigest()
    rest = _skip_done(chain([first], rows), sink, digest)
    total = partial(estimate_rows, job.source, job.format)
    with _engine(job, model, summary) as engine, bar("scoring", total=total, unit="rows") as advance:
        summary.bos, summary.path = engine.bos, engine.path
        advance(sink.done_rows)
        per_token = job.per_token or builder is not None
        for chunk, scored, shown in engine.score(_chunks(rest), per_token=per_token, advance=advance):
            stop = _first_error(scored) if job.on_error == "stop" else None
            kept = scored[:stop]
            for read in chunk[:stop]:
                digest.update(read)
            if kept:
                sink.commit([row if job.per_token else _brief(row) for row in kept], digest.hexdigest())
            for row in kept:
                summary.add(row)
                if builder is not None:
                    builder.add(row)
            advance(len(kept) - shown)
            if stop is not None:
                raise _stopped(chunk[stop], scored[stop], summary, job)
    sink.finish()
    if builder is not None and job.report is not None:
        builder.write(job.report)
    return summary


class _Local:
    """Scores in this process what `RayScorer` scores on a cluster."""

    def __init__(self, scorer: Scorer) -> None:
        self.bos = scorer.encoder.describe_bos()
        self.path = scorer.executor.describe()
        self._scorer = scorer

    def score(
        self, chunks: Iterator[list[InputRow]], *, per_token: bool, advance: Callable[..., None]
    ) -> Iterator[tuple[list[InputRow], list[ScoredRow], int]]:
        """Each chunk with its scored rows, in order, and how many of them the bar has been told of already."""
        for chunk in chunks:
            shown = _Shown(len(chunk), advance)
            yield chunk, self._scorer.score_rows(chunk, per_token=per_token, advance=shown.add), shown.rows


class _Remote:
    """The same on a cluster, whose chunks arrive whole."""

    def __init__(self, scorer: RayScorer) -> None:
        self.bos, self.path = scorer.bos, scorer.path
        self._scorer = scorer

    def score(
        self, chunks: Iterator[list[InputRow]], *, per_token: bool, advance: Callable[..., None]
    ) -> Iterator[tuple[list[InputRow], list[ScoredRow], int]]:
        """Each chunk with its scored rows, in order."""
        for chunk, scored in self._scorer.score(chunks, per_token=per_token):
            yield chunk, scored, 0


class _Shown:
    """Turns scored tokens into rows of a chunk for the bar, so that it moves while a long chunk is scored."""

    def __init__(self, rows: int, advance: Callable[..., None]) -> None:
        self.rows = 0
        self._most, self._advance = rows - 1, advance
        self._tokens = 0

    def add(self, tokens: int, total: int) -> None:
        """So many more of the chunk's scored tokens are done."""
        self._tokens += tokens
        rows = self._most * self._tokens // max(1, total)
        self._advance(rows - self.rows)
        self.rows = rows


@contextmanager
def _engine(
    job: ScoreJob, model: TextModel | Callable[[], TextModel], summary: RunSummary
) -> Iterator[_Local | _Remote]:
    if job.cluster is None:
        yield _Local(Scorer(model() if callable(model) else model, job.options))
        return
    with ray_scorer(model, job.options, job.cluster) as engine:
        try:
            yield _Remote(engine)
        except LostChunkError as error:
            raise InputError(f"{error}{_kept(summary, job)}") from None


def plan_file(job: ScoreJob, model: TextModel | Callable[[], TextModel], *, stdin: BinaryIO | None = None) -> DryRun:
    """What `score_file` would do with a job on this machine: nothing is scored and nothing is written.

    Raises:
        InputError: for input or options that cannot be used.
    """
    rows = read_rows(job.source, fields=job.fields, format=job.format, stdin=stdin)
    first = next(rows)
    scorer = Scorer(model() if callable(model) else model, job.options)
    with bar("planning", total=partial(estimate_rows, job.source, job.format), unit="rows") as advance:
        return dry_run(_chunks(chain([first], rows)), scorer, advance=advance)


def _chunks(rows: Iterator[InputRow]) -> Iterator[list[InputRow]]:
    chunk: list[InputRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.prompt) + len(row.completion)
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _skip_done(rows: Iterator[InputRow], sink: Sink, digest: InputDigest) -> Iterator[InputRow]:
    """The rows after those already committed, which must still be what they were."""
    done = 0
    for row in islice(rows, sink.done_rows):
        digest.update(row)
        done += 1
    if done < sink.done_rows or (done and digest.hexdigest() != sink.resume_digest):
        raise InputError(
            f"the first {sink.done_rows} rows of the input are not those of the interrupted run; restore them, or pass "
            "--overwrite to start anew"
        )
    return rows


def _first_error(scored: list[ScoredRow]) -> int | None:
    return next((i for i, row in enumerate(scored) if row.error is not None and not row.skipped), None)


def _stopped(row: InputRow, scored: ScoredRow, summary: RunSummary, job: ScoreJob) -> RowError:
    return RowError(f"{scored.error}{_kept(summary, job)}", row=row.where)


def _kept(summary: RunSummary, job: ScoreJob) -> str:
    kept = summary.resumed + summary.rows
    return "" if job.output == "-" or not kept else f" ({kept} rows before it are kept: mend it and pass --resume)"


def _brief(row: ScoredRow) -> ScoredRow:
    """The row without its tokens, which only the report asked for."""
    return replace(row, tokens=None, token_log_probs=None)


def _settings(job: ScoreJob) -> dict[str, Any]:
    options = job.options
    return {
        **job.settings,
        "boundary": options.boundary,
        "bos": options.bos,
        "overflow": options.overflow,
        "stride": options.stride,
        "max_batch_tokens": options.max_batch_tokens,
        "max_cache_bytes": options.max_cache_bytes,
        "path": options.path,
        "level": options.level,
        "tokenisations": options.tokenisations,
        "on_error": job.on_error,
    }


def _report(job: ScoreJob, path: str) -> ReportBuilder:
    """An empty report; a path that cannot take it is refused now and not after the work."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise InputError(f"the report cannot be written to {path}: name a file in a folder that exists")
    facts = {"input": job.source, **{k: str(v) for k, v in _settings(job).items() if v is not None}}
    return ReportBuilder(title="Log-likelihood report", subtitle=job.source, facts=facts)
