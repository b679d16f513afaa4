"""The likelihood of one document of any length, in memory that does not grow with it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TextIO

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.causal import CausalLM
from loglik.models.encode import BosPolicy, TextEncoder, _Tokens
from loglik.models.ngram import NGramLM
from loglik.models.paths import _tolerance, cached_hidden
from loglik.models.protocol import TextModel
from loglik.models.token_stream import TokenPiece, read_chunks, token_stream
from loglik.models.trunk import Trunk, evaluating, relative_difference
from loglik.scoring.answers import check_log_probs
from loglik.scoring.budget import Budget
from loglik.scoring.engine import ScoreOptions
from loglik.scoring.execute import EnginePath, Executor
from loglik.scoring.windows import Window, check_stride

__all__ = ["CONTEXT_WITHOUT_LIMIT", "TextScore", "TokenBlock", "score_text"]

CONTEXT_WITHOUT_LIMIT = 2048  # tokens of a window where the model states no limit and no state can be carried on
_PASSES = 4  # windows for about as many full forward passes are collected before they run


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Consecutive tokens of the document with their numbers.

    Args:
        first: place of the block's first token among the document's tokens.
        ids: tokens.
        pieces: text of each, as in `EncodedText`.
        nats: log-probability of each; None for a first token that has nothing before it.
    """

    first: int
    ids: list[int]
    pieces: list[str]
    nats: list[float | None]


@dataclass(frozen=True, slots=True, eq=False)
class TextScore:
    """The likelihood of one document.

    Args:
        likelihood: one row, counted in tokens.
        num_bytes: UTF-8 bytes of the text that was scored.
        num_windowed: scored tokens that saw less than all that stands before them.
        num_windows: windows the document was cut into; 1 where every token saw all that stands before it.
        context: most tokens of a window; None where no window was needed at any length.
        stride: scored tokens per window after the first; None like `context`.
        bos: the BOS policy in words.
    """

    likelihood: LogLikelihood
    num_bytes: int
    num_windowed: int
    num_windows: int
    context: int | None
    stride: int | None
    bos: str

    @property
    def num_tokens(self) -> int:
        """Tokens that were scored."""
        return int(self.likelihood.num_units)

    def bits_per_byte(self) -> Measurement:
        r""":math:`-\log_2 p(x) / \text{bytes}` over the UTF-8 bytes that were scored."""
        return self.likelihood.bits_per_byte(torch.tensor([self.num_bytes]))


def score_text(
    model: TextModel,
    text: str | TextIO | Iterable[str],
    *,
    bos: BosPolicy = "auto",
    stride: int | None = None,
    max_batch_tokens: int | None = None,
    path: EnginePath = "auto",
    callback: Callable[[TokenBlock], None] | None = None,
) -> TextScore:
    r"""Score one document that may be longer than the memory: it is read, tokenised and scored piece by piece.

    .. math:: \log p(x) = \sum_t \log p(x_t \mid x_{c(t):t})

    where :math:`c(t)` is where the window of token t begins. Tokens, windows and numbers are those of the whole text
    scored at once with ``overflow="window"``: the first window is a full context, each of the others ends `stride`
    scored tokens after the one before it and reaches back as far as the context allows, and BOS stands in all of them.
    Windows share no computation: a token's keys and values have seen everything before it in its own window, some of
    which the next window must not see, under other positions; so every window is computed anew.

    A model without a context limit needs no windows where a bounded state can be carried on: a state-space network
    that continues from its state with the numbers of a plain pass (tried on a few tokens; token by token, which is
    slower, if only that works), or an n-gram model. Any other such model, whose keys and values would grow with the
    document, gets windows of `CONTEXT_WITHOUT_LIMIT` tokens: one, if the document fits.

    Neither text, tokens nor numbers are kept. What is held: two blocks of text (`loglik.models.token_stream`; more
    while a single word is longer than that), and the windows of a few forward passes.

    Args:
        model: a causal, masked or n-gram model; the value of a masked model is a pseudo-log-likelihood.
        text: the document: a string, a file opened in text mode, or strings of any sizes that together are it.
        bos: when BOS is prepended.
        stride: scored tokens per window; half the context if None.
        max_batch_tokens: tokens per forward pass; by device if None.
        path: how forward passes run, as in `ScoreOptions`; a state is carried on under ``auto`` and ``cached``.
        callback: gets the tokens with their numbers, in order, each once.

    Returns:
        Value in nats (float64, compensated summation), kind, tokens, bytes and windows.

    Raises:
        InputError: for options the model cannot honour, an encoder-decoder, a tokenizer without character offsets, or
            text that is no string.
        RowError: for an empty document, one without tokens, NUL or lone surrogates, or logits that are not finite.
    """
    options = ScoreOptions(bos=bos, overflow="window", stride=stride, max_batch_tokens=max_batch_tokens, path=path)
    check_stride(stride, model.max_length)
    if model.layout == "seq2seq":
        raise InputError("an encoder-decoder reads its source whole and has no windows; use a causal or masked model")
    encoder = TextEncoder(model.tokenizer, layout=model.layout, bos=bos)
    budget = Budget(max_batch_tokens)
    carry = _find_carry(model, budget.resolved(model).pack_tokens) if path in ("auto", "cached") else None
    executor = Executor(model, path=path, budget=budget) if carry is None else None
    opening, pieces = _opened(encoder, token_stream(encoder, read_chunks(text)))
    tally = _Tally(model, opening, callback)
    read = tally.reading(pieces)
    if carry is not None:
        carry.run(opening, read, tally)
    if executor is None:
        return tally.result(encoder, None)
    cut = _Cut.of(model, opening, options)
    per_run = max(2, _PASSES * executor.budget.pack_tokens // max(1, cut.room))
    windows = cut.windows(opening, read)
    while group := list(islice(windows, per_run)):
        for window, scores in zip(group, executor.run(group), strict=True):
            tally.add(window.ids[window.scored_from : window.scored_to], scores.terms, window.num_shortened)
    return tally.result(encoder, cut)


@dataclass(frozen=True, slots=True)
class _Opening:
    """How the document begins; see `EncodedText`."""

    prefix: list[int]
    suffix: list[int]
    scored_from: int
    skipped_bytes: int


def _opened(encoder: TextEncoder, stream: Iterator[TokenPiece]) -> tuple[_Opening, Iterator[TokenPiece]]:
    """What the text front decides from the first two tokens, and all pieces."""
    first: list[TokenPiece] = []
    for piece in stream:
        first.append(piece)
        if sum(len(part.ids) for part in first) > 1:
            break
    text = "".join(piece.text for piece in first)
    if not text:
        raise RowError("the document is empty: there is nothing to score")
    ids, spans, words, shift = [], [], [], 0
    for piece in first:
        ids += piece.ids
        spans += [(begin + shift, end + shift) for begin, end in piece.spans]
        words += piece.words
        shift += len(piece.text)
    if not ids:
        raise RowError("the document has no token under this tokenizer: nothing can be scored")
    row = encoder._finish(text, _Tokens(ids, spans, words), 0, "none", 0)
    skipped = len(text.encode("utf-8")) - row.num_bytes
    return _Opening(row.prefix, row.suffix, row.scored_from, skipped), chain(first, stream)


class _Tally:
    """Sums over the tokens that were scored so far; tokens wait here only for the callback."""

    def __init__(self, model: TextModel, opening: _Opening, callback: Callable[[TokenBlock], None] | None) -> None:
        self._kind = model.kind
        unknown = model.tokenizer.unk_token_id
        self._unknown = None if unknown == model.tokenizer.bos_token_id else unknown
        self._callback = callback
        self._unscored = opening.scored_from
        self._waiting: deque[tuple[int, str]] = deque()
        self._first = 0
        self._sum = self._lost = 0.0
        self._tokens = self._windowed = self._windows = 0
        self._bytes = -opening.skipped_bytes

    def reading(self, pieces: Iterable[TokenPiece]) -> Iterator[TokenPiece]:
        """The same pieces, counted as they are read."""
        for piece in pieces:
            self._bytes += len(piece.text.encode("utf-8"))
            if self._callback is not None:
                self._waiting.extend(zip(piece.ids, piece.pieces, strict=True))
            yield piece

    def add(self, ids: list[int], nats: list[float], num_shortened: int) -> None:
        """Numbers of the next tokens."""
        check_log_probs(nats)
        self._tokens += len(nats)
        self._windowed += num_shortened
        self._windows += 1
        if self._kind is Kind.EXACT and self._unknown in ids:
            self._kind = Kind.UPPER_BOUND  # the unknown token stands for this text and for others
        # Neumaier's sum: what a rounded addition loses is kept apart. -inf, a legal log 0, has nothing to lose.
        value = math.fsum(nats)
        total = self._sum + value
        if math.isfinite(total):
            large, small = (self._sum, value) if abs(self._sum) >= abs(value) else (value, self._sum)
            self._lost += (large - total) + small
        self._sum = total
        if self._callback is not None:
            count = self._unscored + len(ids)
            own = [self._waiting.popleft() for _ in range(count)]
            texts = [piece for _, piece in own]
            self._callback(TokenBlock(self._first, [i for i, _ in own], texts, [None] * self._unscored + list(nats)))
            self._first += count
            self._unscored = 0

    def result(self, encoder: TextEncoder, cut: _Cut | None) -> TextScore:
        """The sums, labelled."""
        value = torch.tensor([self._sum + self._lost], dtype=torch.float64)
        windowed = cut is not None and cut.shortens
        return TextScore(
            LogLikelihood(value, self._kind, Unit.TOKEN, torch.tensor([self._tokens])),
            num_bytes=self._bytes,
            num_windowed=self._windowed,
            num_windows=self._windows if windowed else 1,
            context=cut.context if cut is not None and windowed else None,
            stride=cut.step if cut is not None and windowed else None,
            bos=encoder.describe_bos(),
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """Windows of a document, as `loglik.scoring.windows` cuts a row.

    Args:
        context: tokens that the model sees.
        room: tokens of the document in a window, the last one only a target.
        step: scored tokens per window after the first.
        shortens: whether a token of a later window misses anything that the model would have used.
    """

    context: int
    room: int
    step: int
    shortens: bool = True

    @classmethod
    def of(cls, model: TextModel, opening: _Opening, options: ScoreOptions) -> _Cut:
        if isinstance(model, NGramLM):
            # Windows that overlap by all that a prediction depends on: their BOS is out of its sight.
            seen = max(1, model.order - 1)
            return cls(seen, seen + CONTEXT_WITHOUT_LIMIT, CONTEXT_WITHOUT_LIMIT, shortens=False)
        context = model.max_length if model.max_length is not None else CONTEXT_WITHOUT_LIMIT
        check_stride(options.stride, context)
        room = context + (model.layout == "causal") - len(opening.prefix) - len(opening.suffix)
        wanted = options.stride if options.stride is not None else max(1, context // 2)
        return cls(context, room, min(wanted, room - 1))

    def windows(self, opening: _Opening, pieces: Iterable[TokenPiece]) -> Iterator[Window]:
        """The windows of the tokens as they come in; no more of them are held than the next window needs."""
        ids: list[int] = []
        words: list[int] = []
        dropped = 0  # tokens of the document before those in `ids`
        begin, end = opening.scored_from, self.room

        def window(last: int) -> Window:
            left = max(0, last - self.room)
            head, tail = len(opening.prefix), len(opening.suffix)
            own = slice(left - dropped, last - dropped)
            return Window(
                ids=[*opening.prefix, *ids[own], *opening.suffix],
                start=head,
                scored_from=begin - left + head,
                scored_to=last - left + head,
                words=[*[-1] * head, *words[own], *[-1] * tail],
                content_from=begin,
                num_shortened=last - begin if left > 0 and self.shortens else 0,
            )

        for piece in pieces:
            ids += piece.ids
            words += piece.words
            if self.room < 2 and dropped + len(ids) > self.room:
                raise RowError(f"the model's context of {self.context} tokens is too short for windows")
            while dropped + len(ids) >= end and begin < end:
                yield window(end)
                begin, end = end, end + self.step
                # The last window may end before `end`, and then begins earlier.
                spare = max(0, begin - self.room) - dropped
                if spare > 0:
                    del ids[:spare], words[:spare]
                    dropped += spare
        if begin < dropped + len(ids):
            yield window(dropped + len(ids))


@dataclass(slots=True)
class _Carry:
    """One pass over a document with the network's state carried on.

    Args:
        trunk: of the model.
        per_pass: tokens that go through the network at once.
        block: tokens that go through the head at once.
    """

    trunk: Trunk
    per_pass: int
    block: int
    _state: Any = field(init=False, default=None)
    _last: Tensor | None = field(init=False, default=None)

    @torch.inference_mode()
    def run(self, opening: _Opening, pieces: Iterable[TokenPiece], tally: _Tally) -> None:
        """Score all tokens but the first of the row, which is BOS or has nothing before it."""
        tokens = chain(opening.prefix, chain.from_iterable(piece.ids for piece in pieces))
        while ids := list(islice(tokens, self.block)):
            hidden = self.hidden(ids)
            if self._last is None:
                before, targets = hidden[:-1], ids[1:]
            else:
                before, targets = torch.cat([self._last, hidden[:-1]]), ids
            self._last = hidden[-1:].clone()
            if targets:
                chosen = self.trunk.log_probs(before, torch.tensor(targets, device=hidden.device)).log_probs
                tally.add(targets, chosen.double().tolist(), 0)

    def hidden(self, ids: list[int]) -> Tensor:
        """(T, D) hidden states of the next tokens."""
        found = []
        for begin in range(0, len(ids), self.per_pass):
            part = torch.tensor([ids[begin : begin + self.per_pass]], device=self.trunk.model.device)
            states, self._state = cached_hidden(self.trunk, part, self._state)
            found.append(states[0])
        return torch.cat(found)


_TRIAL = [3, 5, 4, 6, 7, 8, 3, 4, 9, 9, 5, 8]
_TRIAL_CUTS = (5, 2, 1, 4)


@torch.no_grad()
def _find_carry(model: TextModel, pack_tokens: int) -> _Carry | None:
    """How the network's state can be carried on: by many tokens at once, by one, or (None) not at all.

    Each way is tried on a few tokens and compared with a plain forward pass, like the paths of `loglik.models.paths`;
    a state that grows with the tokens is refused, since it would grow with the document.
    """
    if not isinstance(model, CausalLM) or model.max_length is not None or model.trunk is None:
        return None
    trunk = model.trunk
    with evaluating(trunk.model):
        expected = trunk.hidden(input_ids=torch.tensor([_TRIAL], device=model.device), use_cache=False)[0]
        for per_pass in (pack_tokens, 1):
            trial = _Carry(trunk, per_pass, pack_tokens)
            try:
                found, sizes, begin = [], [], 0
                for count in _TRIAL_CUTS:
                    found.append(trial.hidden(_TRIAL[begin : begin + count]))
                    sizes.append(_count(trial._state, set()))
                    begin += count
            except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
                continue  # the architecture has no such state
            is_equal = relative_difference(torch.cat(found), expected) <= _tolerance(expected.dtype)
            if is_equal and 0 < sizes[0] == sizes[-1]:
                return _Carry(trunk, per_pass, pack_tokens)
    return None


def _count(value: Any, seen: set[int]) -> int:
    """Numbers in all tensors of a cache."""
    if isinstance(value, Tensor):
        return value.numel()
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, list | tuple | dict):
        return sum(_count(part, seen) for part in (value.values() if isinstance(value, dict) else value))
    return _count(vars(value), seen) if hasattr(value, "__dict__") else 0
