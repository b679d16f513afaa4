"""From rows of text to labelled numbers: encode, cut into windows, execute, reassemble."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.causal import CausalLM
from loglik.models.encode import BosPolicy, BoundaryPolicy, EncodedText, TextEncoder
from loglik.models.protocol import TextModel
from loglik.scoring.budget import Budget
from loglik.scoring.covers import CoverEncoder, Tokenisations, kind_of
from loglik.scoring.execute import EnginePath, Executor
from loglik.scoring.pending import ByteScores, TokenScores, with_probes
from loglik.scoring.rows import InputRow, ScoredRow
from loglik.scoring.windows import OverflowPolicy, Window, check_stride, too_long, windows
from loglik.scoring.words import WordVocabulary

__all__ = ["Level", "ScoreBoundary", "ScoreOptions", "Scorer"]

ScoreBoundary = Literal["joint", "separate", "exact"]
Level = Literal["token", "word"]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How text is scored.

    Args:
        boundary: ``joint`` or ``separate`` tokenisation of prompt and completion, or ``exact``: the probability of the
            completion's bytes given the prompt's, over all tokenisations of their boundary (`loglik.scoring.covers`).
        bos: when BOS is prepended.
        overflow: what happens to a row that exceeds the context.
        stride: scored tokens per window; half the context if None.
        max_batch_tokens: tokens per forward pass; by device if None.
        max_cache_bytes: bytes of keys and values that shared prefixes may hold; a quarter of the free memory if None.
        path: how a causal model's forward passes run (`loglik.models.paths`); the fastest it can run if ``auto``.
        level: ``word`` adds the probabilities of the completion's words (`loglik.scoring.words`).
        tokenisations: what ``exact`` is a probability of: the model restricted to ``canonical`` tokenisations, or the
            sum over ``all`` of them, which it only bounds. The number is the same, its kind is not.
    """

    boundary: ScoreBoundary = "joint"
    bos: BosPolicy = "auto"
    overflow: OverflowPolicy = "error"
    stride: int | None = None
    max_batch_tokens: int | None = None
    max_cache_bytes: int | None = None
    path: EnginePath = "auto"
    level: Level = "token"
    tokenisations: Tokenisations = "canonical"

    def __post_init__(self) -> None:
        choices = {
            "boundary": ("joint", "separate", "exact"),
            "bos": ("auto", "always", "never"),
            "overflow": ("error", "window", "skip"),
            "path": ("auto", "packed", "cached", "padded"),
            "level": ("token", "word"),
            "tokenisations": ("canonical", "all"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_stride(self.stride, None)
        Budget(self.max_batch_tokens, self.max_cache_bytes)
        if self.boundary == "exact" and self.level == "word":
            raise InputError("boundary exact scores bytes and level word scores words: choose one of them")
        if self.boundary == "exact" and self.overflow == "window":
            raise InputError("boundary exact has no windows: set overflow to error or skip")


class Scorer:
    """Scores rows of text with one model and one set of options.

    Raises:
        InputError: for options the model or its tokenizer cannot honour.
    """

    def __init__(self, model: TextModel, options: ScoreOptions | None = None) -> None:
        self.model = model
        self.options = options if options is not None else ScoreOptions()
        check_stride(self.options.stride, model.max_length)
        policy: BoundaryPolicy = "separate" if self.options.boundary == "separate" else "joint"
        self.encoder = TextEncoder(model.tokenizer, layout=model.layout, boundary=policy, bos=self.options.bos)
        self.vocabulary: WordVocabulary | None = None
        self.covers: CoverEncoder | None = None
        needs_causal = {"exact": "boundary exact", "word": "level word"}
        for value in (self.options.boundary, self.options.level):
            if value in needs_causal and not (isinstance(model, CausalLM) and model.trunk is not None):
                raise InputError(
                    f"{needs_causal[value]} needs a causal model of transformers: use one, or leave it out"
                )
        if self.options.level == "word":
            assert isinstance(model, CausalLM)
            self.vocabulary = WordVocabulary.of(model.tokenizer, model.model.config.get_text_config().vocab_size)
        if self.options.boundary == "exact":
            self.covers = CoverEncoder(model.tokenizer, bos=self.options.bos)
        budget = Budget(self.options.max_batch_tokens, self.options.max_cache_bytes)
        self.executor = Executor(model, path=self.options.path, budget=budget)

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> list[TokenScores | ByteScores | RowError]:
        """The rows with the windows that they need; a row that cannot be scored gives its error."""
        out: list[TokenScores | ByteScores | RowError] = []
        texts = self.encoder.encode_all(pairs) if self.covers is None else [None] * len(pairs)
        for (prompt, completion), text in zip(pairs, texts, strict=True):
            try:
                if isinstance(text, RowError):
                    raise text
                out.append(self._bytes(prompt, completion) if text is None else self._tokens(text))
            except RowError as error:
                out.append(error)
        return out

    def score_pairs(
        self, pairs: Sequence[tuple[str, str]], *, advance: Callable[[int, int], None] | None = None
    ) -> list[TokenScores | ByteScores | RowError]:
        """Scores of (prompt, completion) pairs, in order; a row that cannot be scored gives its error.

        A result does not depend on the other rows: they share forward passes, never values.

        Args:
            pairs: any number; equal beginnings are computed once.
            advance: called with a number of scored tokens as they are done, and with their total.
        """
        rows = self.prepare(pairs)
        jobs = [window for row in rows if not isinstance(row, RowError) for window in row.windows]
        subset = None if self.vocabulary is None else self.vocabulary.subset
        scores = iter(self.executor.run(jobs, subset=subset, advance=advance))
        for i, row in enumerate(rows):
            if isinstance(row, RowError):
                continue
            own = [next(scores) for _ in row.windows]
            try:
                row.finish(own)
            except RowError as error:
                rows[i] = error
        return rows

    def score_rows(
        self, rows: Sequence[InputRow], *, per_token: bool = False, advance: Callable[[int, int], None] | None = None
    ) -> list[ScoredRow]:
        """One `ScoredRow` per input row, in order; rows that cannot be scored carry their error."""
        good = [row for row in rows if row.error is None]
        scores = iter(self.score_pairs([(row.prompt, row.completion) for row in good], advance=advance))
        out = []
        for row in rows:
            if row.error is not None:
                out.append(ScoredRow(id=row.id, error=row.error))
                continue
            result = next(scores)
            if isinstance(result, RowError):
                out.append(ScoredRow(id=row.id, error=result.reason, skipped=result.skipped))
            else:
                out.append(self._row(row.id, result, per_token=per_token))
        return out

    def _tokens(self, text: EncodedText) -> TokenScores:
        reads_last = self.vocabulary is not None  # what follows the last token is asked for, so it needs a place
        cut: list[Window] = list(
            windows(
                text,
                layout=self.model.layout,
                max_length=self.model.max_length,
                overflow=self.options.overflow,
                stride=self.options.stride,
                reads_last=reads_last,
            )
        )
        if self.vocabulary is not None:
            cut = with_probes(text, cut, self.vocabulary)
        kind = self.model.kind
        if kind is Kind.EXACT and text.has_unknown:
            kind = Kind.UPPER_BOUND  # the unknown token stands for this text and for others
        return TokenScores(text, kind, cut, self.vocabulary)

    def _bytes(self, prompt: str, completion: str) -> ByteScores:
        assert self.covers is not None
        plan = self.covers.plan(prompt, completion)
        longest, limit = max((len(window.inputs) for window in plan.windows), default=0), self.model.max_length
        if limit is not None and longest > limit:
            raise too_long(f"has {longest} tokens and the model's context is {limit}", self.options.overflow, "")
        kind = kind_of(self.model.kind, self.options.tokenisations, prompt=bool(prompt))
        return ByteScores(plan, kind)

    def _row(self, name: str, scores: TokenScores | ByteScores, *, per_token: bool) -> ScoredRow:
        log_prob = scores.log_prob
        row = ScoredRow(
            id=name,
            log_prob=log_prob,
            kind=str(scores.kind),
            num_bytes=scores.num_bytes,
            bits_per_byte=-log_prob / (math.log(2) * scores.num_bytes),
            boundary="exact",
            num_windowed=0,
        )
        if isinstance(scores, ByteScores):
            return row
        row = replace(
            row,
            num_tokens=scores.num_tokens,
            stderr=scores.stderr,
            is_greedy=scores.is_greedy,
            boundary=scores.boundary,
            num_windowed=scores.num_windowed,
        )
        if scores.words is not None:
            row = replace(
                row,
                words=[word.text for word in scores.words],
                word_log_probs=[word.log_prob for word in scores.words],
            )
        if not per_token:
            return row
        text = scores.text
        special = self.model.tokenizer.convert_ids_to_tokens
        has_terms = not scores.totals
        terms = [t if scored and has_terms else None for t, scored in zip(scores.terms, scores.scored, strict=True)]
        head, tail = special(text.prefix), special(text.suffix)
        return replace(
            row,
            tokens=[*head, *text.pieces, *tail],
            token_log_probs=[*([None] * len(head)), *terms, *([None] * len(tail))],
        )
