"""Rows on their way: the windows that each needs, and the numbers that come back put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from loglik.errors import RowError
from loglik.kinds import Kind
from loglik.models.encode import EncodedText
from loglik.scoring.covers import CoverPlan
from loglik.scoring.execute import WindowScores
from loglik.scoring.windows import Window
from loglik.scoring.words import WordScore, WordVocabulary, probes_for, word_scores

__all__ = ["ByteScores", "TokenScores", "cover_windows", "with_probes"]


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
        is_greedy: every scored token is the model's first choice.
        num_windowed: scored tokens that saw a shortened context.
        words: scores of the completion's words, where they are asked for.
    """

    text: EncodedText
    kind: Kind
    windows: list[Window]
    vocabulary: WordVocabulary | None = None
    terms: list[float] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    is_greedy: bool = True
    num_windowed: int = 0
    words: list[WordScore] | None = None

    @property
    def log_prob(self) -> float:
        """Nats, summed exactly."""
        return math.fsum(self.terms)

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
            if len(own.terms) != number or len(own.masses) != len(window.probes):
                raise AssertionError(f"{len(own.terms)} numbers came back for {number} scored tokens")
            content = slice(window.content_from, window.content_from + number)
            self.terms[content] = own.terms
            self.scored[content] = [True] * number
            self.is_greedy = self.is_greedy and all(own.greedy)
            self.num_windowed += window.num_shortened
            masses += own.masses
        _check(self.terms)
        if self.vocabulary is not None:
            _check(masses)
            self.words = word_scores(self.text, self.vocabulary, self.terms, masses)


@dataclass(slots=True)
class ByteScores:
    """Score of one row of bytes, over all tokenisations that straddle its boundary.

    Args:
        plan: the covers.
        kind: what the value promises.
        windows: the forward passes it needs, numerator first.
        log_prob: nats.
    """

    plan: CoverPlan
    kind: Kind
    windows: list[Window]
    log_prob: float = math.nan

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
            _check([*own.terms, *own.branches])
        cut = len(self.plan.upper)
        below = _log_mass(scores[cut:])
        if below == -math.inf:
            raise RowError("the model gives the prompt probability 0, so nothing can be conditioned on it")
        self.log_prob = _log_mass(scores[:cut]) - below


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
        out.append(
            Window(
                window.ids,
                window.start,
                window.scored_from,
                window.scored_to,
                window.words,
                window.content_from,
                window.num_shortened,
                at,
            )
        )
    return out


def cover_windows(plan: CoverPlan) -> list[Window]:
    """One window per fan of covers, those of prompt and completion first; the fan's last tokens are its branches."""
    out = []
    first = len(plan.prefix) + plan.shared
    for fan in (*plan.upper, *plan.lower):
        ids = [*plan.prefix, *fan.path]
        out.append(Window(ids, first, first, len(ids), [-1] * len(ids), plan.shared, 0, (), tuple(fan.tokens)))
    return out


def _log_mass(scores: Sequence[WindowScores]) -> float:
    """Log of the sum over all covers; 0 for none: they have all cancelled."""
    if not scores:
        return 0.0
    return float(np.logaddexp.reduce([math.fsum(own.terms) + last for own in scores for last in own.branches]))


def _check(values: Sequence[float]) -> None:
    """-inf is a legal log 0; NaN and +inf are not numbers of a model that works."""
    if any(math.isnan(value) or value == math.inf for value in values):
        raise RowError("the model returned logits that are not finite (NaN): check its weights and dtype")
