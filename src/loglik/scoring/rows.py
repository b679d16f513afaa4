"""The two row types of a scoring run: what was read and what was computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COLUMNS", "PER_TOKEN_COLUMNS", "PER_WORD_COLUMNS", "InputRow", "ScoredRow"]

COLUMNS = (
    "id",
    "log_prob",
    "kind",
    "stderr",
    "num_tokens",
    "num_bytes",
    "bits_per_byte",
    "is_greedy",
    "boundary",
    "num_windowed",
    "error",
)
PER_TOKEN_COLUMNS = ("tokens", "token_log_probs")
PER_WORD_COLUMNS = ("words", "word_log_probs")


@dataclass(frozen=True, slots=True)
class InputRow:
    """One text to score: `completion` given `prompt` (empty for unconditional text).

    Args:
        id: the row's own id, or its number from 0.
        where: how an error names it, such as ``"line 3 (id q17)"``.
        prompt: text that is conditioned on.
        completion: text that is scored.
        error: why the row cannot be scored, as found while reading; then the texts are empty.
    """

    id: str
    where: str
    prompt: str
    completion: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One line of output; every number is None if `error` is set.

    `stderr` is None also where nothing was sampled, `num_tokens` and `is_greedy` where bytes were scored.

    Args:
        id: as read.
        log_prob: nats.
        kind: what `log_prob` promises.
        stderr: Monte-Carlo standard error, nats.
        num_tokens: tokens that were scored.
        num_bytes: UTF-8 bytes of the text that was scored.
        bits_per_byte: ``-log_prob / (num_bytes ln 2)``.
        is_greedy: every scored token was the model's first choice.
        boundary: ``none`` (no prompt), ``aligned``, ``straddled`` (a token spans prompt and completion and was scored
            with the completion), ``separate``, or ``exact`` (bytes over all tokenisations of the boundary).
        num_windowed: scored tokens that saw a shortened context.
        error: one sentence, or None.
        tokens: text of every token of the row, unscored ones included; empty for a token that only continues a
            character.
        token_log_probs: nats per token, None where not scored.
        words: the completion's words.
        word_log_probs: nats per word, with the beginning-of-word correction; None where a token of it is not scored.
        skipped: the row was left out by the overflow policy, as asked; not a column, its `error` says so.
    """

    id: str
    log_prob: float | None = None
    kind: str | None = None
    stderr: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    bits_per_byte: float | None = None
    is_greedy: bool | None = None
    boundary: str | None = None
    num_windowed: int | None = None
    error: str | None = None
    tokens: list[str] | None = None
    token_log_probs: list[float | None] | None = None
    words: list[str] | None = None
    word_log_probs: list[float | None] | None = None
    skipped: bool = False
