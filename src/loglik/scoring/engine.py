"""From rows of text to labelled numbers: encode, cut into windows, batch by length, score, reassemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.encode import BosPolicy, BoundaryPolicy, EncodedText, TextEncoder
from loglik.models.protocol import TextModel
from loglik.scoring.budget import Budget
from loglik.scoring.execute import EnginePath, Executor, WindowScores
from loglik.scoring.rows import InputRow, ScoredRow
from loglik.scoring.windows import OverflowPolicy, Window, check_stride, windows

__all__ = ["ScoreOptions", "Scorer", "TokenScores"]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How text is scored.

    Args:
        boundary: ``joint`` or ``separate`` tokenisation of prompt and completion.
        bos: when BOS is prepended.
        overflow: what happens to a row that exceeds the context.
        stride: scored tokens per window; half the context if None.
        max_batch_tokens: tokens per forward pass; by device if None.
        max_cache_bytes: bytes of keys and values that shared prefixes may hold; a quarter of the free memory if None.
        path: how a causal model's forward passes run (`loglik.models.paths`); the fastest it can run if ``auto``.
    """

    boundary: BoundaryPolicy = "joint"
    bos: BosPolicy = "auto"
    overflow: OverflowPolicy = "error"
    stride: int | None = None
    max_batch_tokens: int | None = None
    max_cache_bytes: int | None = None
    path: EnginePath = "auto"

    def __post_init__(self) -> None:
        choices = {
            "boundary": ("joint", "separate"),
            "bos": ("auto", "always", "never"),
            "overflow": ("error", "window", "skip"),
            "path": ("auto", "packed", "cached", "padded"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_stride(self.stride, None)
        Budget(self.max_batch_tokens, self.max_cache_bytes)


@dataclass(slots=True)
class TokenScores:
    """Scores of one row while its windows come in.

    Args:
        text: the row's tokens.
        kind: what the sum promises.
        terms: nats per content token, 0 where not scored.
        scored: whether each content token was scored.
        is_greedy: every scored token so far was the model's first choice.
        num_windowed: scored tokens that saw a shortened context.
    """

    text: EncodedText
    kind: Kind
    terms: list[float]
    scored: list[bool]
    is_greedy: bool = True
    num_windowed: int = 0

    @property
    def log_prob(self) -> float:
        """Nats, summed exactly."""
        return math.fsum(self.terms)

    def add(self, window: Window, scores: WindowScores) -> None:
        """Put a window's numbers in their place."""
        count = window.scored_to - window.scored_from
        if len(scores.terms) != count:
            raise AssertionError(f"{len(scores.terms)} numbers came back for {count} scored tokens")
        content = slice(window.content_from, window.content_from + count)
        self.terms[content] = scores.terms
        self.scored[content] = [True] * count
        self.is_greedy = self.is_greedy and all(scores.greedy)
        self.num_windowed += window.num_shortened


class Scorer:
    """Scores rows of text with one model and one set of options.

    Raises:
        InputError: for options the model or its tokenizer cannot honour.
    """

    def __init__(self, model: TextModel, options: ScoreOptions | None = None) -> None:
        self.model = model
        self.options = options if options is not None else ScoreOptions()
        check_stride(self.options.stride, model.max_length)
        self.encoder = TextEncoder(
            model.tokenizer, layout=model.layout, boundary=self.options.boundary, bos=self.options.bos
        )
        budget = Budget(self.options.max_batch_tokens, self.options.max_cache_bytes)
        self.executor = Executor(model, path=self.options.path, budget=budget)

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenScores | RowError]:
        """Scores of (prompt, completion) pairs, in order; a row that cannot be scored gives its error.

        A result does not depend on the other rows: batches hold rows of similar length, and padding is stripped.
        """
        results: list[TokenScores | RowError] = []
        jobs: list[tuple[int, Window]] = []
        for index, (prompt, completion) in enumerate(pairs):
            try:
                text = self.encoder.encode(prompt, completion)
                cut = list(
                    windows(
                        text,
                        layout=self.model.layout,
                        max_length=self.model.max_length,
                        overflow=self.options.overflow,
                        stride=self.options.stride,
                    )
                )
            except RowError as error:
                results.append(error)
                continue
            kind = self.model.kind
            if kind is Kind.EXACT and text.has_unknown:
                kind = Kind.UPPER_BOUND  # the unknown token stands for this text and for others
            count = len(text.content)
            results.append(TokenScores(text, kind, [0.0] * count, [False] * count))
            jobs.extend((index, window) for window in cut)
        for (index, window), scores in zip(jobs, self.executor.run([w for _, w in jobs]), strict=True):
            row = results[index]
            assert isinstance(row, TokenScores)
            row.add(window, scores)
        return [_checked(result) for result in results]

    def score_rows(self, rows: Sequence[InputRow], *, per_token: bool = False) -> list[ScoredRow]:
        """One `ScoredRow` per input row, in order; rows that cannot be scored carry their error."""
        good = [row for row in rows if row.error is None]
        scores = iter(self.score_pairs([(row.prompt, row.completion) for row in good]))
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

    def _row(self, name: str, scores: TokenScores, *, per_token: bool) -> ScoredRow:
        text, log_prob = scores.text, scores.log_prob
        row = ScoredRow(
            id=name,
            log_prob=log_prob,
            kind=str(scores.kind),
            num_tokens=sum(scores.scored),
            num_bytes=text.num_bytes,
            bits_per_byte=-log_prob / (math.log(2) * text.num_bytes),
            is_greedy=scores.is_greedy,
            boundary=text.boundary,
            num_windowed=scores.num_windowed,
        )
        if not per_token:
            return row
        special = self.model.tokenizer.convert_ids_to_tokens
        terms = [term if scored else None for term, scored in zip(scores.terms, scores.scored, strict=True)]
        head, tail = special(text.prefix), special(text.suffix)
        return replace(
            row,
            tokens=[*head, *text.pieces, *tail],
            token_log_probs=[*([None] * len(head)), *terms, *([None] * len(tail))],
        )


def _checked(result: TokenScores | RowError) -> TokenScores | RowError:
    """A row whose terms are numbers, or the error that they are not. -inf is a legal log 0."""
    if isinstance(result, TokenScores) and any(math.isnan(term) or term == math.inf for term in result.terms):
        return RowError("the model returned logits that are not finite (NaN): check its weights and dtype")
    return result
