"""Rows on their way: the windows that each needs, and the numbers that come back put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loglik.kinds import Kind
from loglik.models.encode import EncodedText
from loglik.scoring.answers import WindowScores, check_log_probs
from loglik.scoring.covers import CoverPlan
from loglik.scoring.windows import Window
from loglik.scoring.words import WordScore, WordVocabulary, probes_for, word_scores

__all__ = ["ByteScores", "TokenScores", "with_probes"]


@dataclass(slots=True)
class TokenScores:
    """Scores of one row of tokens.

    Args:
        text: the row's tokens.
        kind: what the sum promises.
        windows: the forward passes it needs.
        vocabulary: borders of words, where words are scored.
        terms: nats per content token, 0 where not scored.
        scored: whether each content token was scored.
        is_greedy: every scored token is the model's first choice; None where that has no meaning.
        num_windowed: scored tokens that saw a shortened context.
        words: scores of the completion's words, where they are asked for.
        totals: nats of each window, where the model gives no terms.
        stderr: Monte-Carlo standard error of the sum, nats; None where nothing was sampled.
    """

    text: EncodedText
    kind: Kind
    windows: list[Window]
    vocabulary: WordVocabulary | None = None
    terms: list[float] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    is_greedy: bool | None = True
    num_windowed: int = 0
    words: list[WordScore] | None = None
    totals: list[float] = field(default_factory=list)
    stderr: float | None = None

    @property
    def log_prob(self) -> float:
        """Nats, summed exactly."""
        return math.fsum(self.totals or self.terms)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return self.text.num_bytes

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return sum(self.scored)

    @property
    def boundary(self) -> str:
        """Where prompt and completion meet."""
        return self.text.boundary

    def finish(self, scores: Sequence[WindowScores]) -> None:
        """Put the numbers of all windows in their places.

        Raises:
            RowError: if one of them is not a log-probability.
        """
        count = len(self.text.content)
        self.terms, self.scored = [0.0] * count, [False] * count
        masses: list[float] = []
        for window, own in zip(self.windows, scores, strict=True):
            number = window.scored_to - window.scored_from
            content = slice(window.content_from, window.content_from + number)
            self.scored[content] = [True] * number
            self.num_windowed += window.num_shortened
            if own.total is not None:
                self.totals.append(own.total)
                if own.stderr is not None:  # windows draw their own random numbers
                    self.stderr = math.hypot(self.stderr or 0.0, own.stderr)
                self.is_greedy = None
                continue
            if len(own.terms) != number or len(own.masses) != len(window.probes):
                raise AssertionError(f"{len(own.terms)} numbers came back for {number} scored tokens")
            self.terms[content] = own.terms
            self.is_greedy = (all(own.greedy) and bool(self.is_greedy)) if own.greedy else None
            masses += own.masses
        check_log_probs([*self.terms, *self.totals])
        if self.vocabulary is not None:
            check_log_probs(masses)
            self.words = word_scores(self.text, self.vocabulary, self.terms, masses)


@dataclass(slots=True)
class ByteScores:
    """Score of one row of bytes, over all tokenisations that straddle its boundary.

    Args:
        plan: the covers.
        kind: what the value promises.
        log_prob: nats.
    """

    plan: CoverPlan
    kind: Kind
    log_prob: float = math.nan

    @property
    def windows(self) -> list[Window]:
        """The forward passes it needs."""
        return self.plan.windows

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the completion."""
        return self.plan.num_bytes

    def finish(self, scores: Sequence[WindowScores]) -> None:
        """Combine the covers.

        Raises:
            RowError: if a number is not a log-probability, or the prompt has probability 0.
        """
        for own in scores:
            check_log_probs([*own.terms, *own.branches])
        cut = len(self.plan.upper)
        upper, lower = (
            [[*own.terms, last] for own in side for last in own.branches] for side in (scores[:cut], scores[cut:])
        )
        self.log_prob = self.plan.combine(upper, lower)


def with_probes(text: EncodedText, windows: Sequence[Window], vocabulary: WordVocabulary) -> list[Window]:
    """The windows of a row, each with the probes that its words need.

    The mass after a token comes from the window that scores the next one, so that what ends one word and begins the
    next is one number; what stands behind the row's last token comes from the last window.
    """
    probes = probes_for(text, vocabulary)
    out = []
    for window in windows:
        begin, count = window.content_from, window.scored_to - window.scored_from
        end = begin + count if window is not windows[-1] else len(text.content) + 1
        own = [i for i in probes if begin <= i + 1 < end]
        at = tuple(window.scored_from + i - begin for i in own)
        out.append(replace(window, probes=at))
    return out
