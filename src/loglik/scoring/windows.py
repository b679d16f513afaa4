"""Text longer than the context: an error, a skip, or windows whose stride is stated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loglik.errors import InputError, RowError
from loglik.models.encode import EncodedText, Layout

__all__ = ["OverflowPolicy", "Window", "check_stride", "too_long", "windows"]

OverflowPolicy = Literal["error", "window", "skip"]


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass over part of a row.

    Args:
        ids: tokens, special tokens included.
        start: first completion token in `ids`.
        scored_from: first scored token in `ids`.
        scored_to: behind the last scored token in `ids`.
        words: word of each token.
        content_from: first scored token in the row's `content`.
        num_shortened: scored tokens that see less context than the row has before them.
        probes: tokens in `ids` after which the log-mass of a subset of the vocabulary is asked for.
        branches: token ids whose log-probability after the last of `ids` is asked for, each by itself.
    """

    ids: list[int]
    start: int
    scored_from: int
    scored_to: int
    words: list[int]
    content_from: int
    num_shortened: int
    probes: tuple[int, ...] = ()
    branches: tuple[int, ...] = ()

    @property
    def inputs(self) -> list[int]:
        """Tokens that a causal model has to read: the last is only a target, unless what follows it is asked for."""
        return self.ids if self.branches or len(self.ids) - 1 in self.probes else self.ids[:-1]


def check_stride(stride: int | None, max_length: int | None) -> None:
    """Refuse a stride that scores nothing or more than a context.

    Raises:
        InputError: for a stride below 1 or above the context.
    """
    if stride is not None and stride < 1:
        raise InputError(f"stride must be at least 1, got {stride}")
    if stride is not None and max_length is not None and stride > max_length:
        raise InputError(f"stride must not exceed the model's context of {max_length} tokens, got {stride}")


def windows(
    text: EncodedText,
    *,
    layout: Layout,
    max_length: int | None,
    overflow: OverflowPolicy,
    stride: int | None = None,
    reads_last: bool = False,
) -> Iterator[Window]:
    r"""The forward passes that score one row, each scored token in exactly one of them.

    A row that fits is one window. Otherwise every window but the first ends `stride` scored tokens after the one
    before it and reaches back as far as the context allows, so that each token sees at least ``context - stride``
    tokens. BOS and other special tokens stand in every window.

    Args:
        text: the row.
        layout: of the model; a causal model's last token is only a target and takes no place in the context.
        max_length: the model's context in tokens; None for no limit.
        overflow: what happens to a row that does not fit.
        stride: scored tokens per window; half the context by default.
        reads_last: a causal model has to read the last token too, because what follows it is asked for.

    Raises:
        RowError: if the row does not fit and `overflow` is not ``window``, or windows are impossible.
    """
    if layout == "seq2seq":
        yield _whole_pair(text, max_length, overflow)
        return
    fixed = len(text.prefix) + len(text.suffix)
    count = len(text.content)
    room = count if max_length is None else max_length + (layout == "causal" and not reads_last) - fixed
    if count <= room:
        yield _window(text, 0, text.scored_from, count)
        return
    if overflow != "window":
        problem = f"has {text.length} tokens and the model's context is {max_length}"
        raise too_long(problem, overflow, "'window' to score it in windows, or ")
    if room < 2:
        raise RowError(f"the model's context of {max_length} tokens is too short for windows")
    step = min(stride if stride is not None else max(1, (max_length or room) // 2), room - 1)
    begin = text.scored_from
    end = room if begin < room else begin + step
    while begin < count:
        end = min(end, count)
        yield _window(text, max(0, end - room), begin, end)
        begin, end = end, end + step


def _window(text: EncodedText, left: int, begin: int, end: int) -> Window:
    """Score ``content[begin:end]`` with context from ``content[left]`` on."""
    shift = len(text.prefix) - left
    special = ([-1] * len(text.prefix), [-1] * len(text.suffix))
    return Window(
        ids=[*text.prefix, *text.content[left:end], *text.suffix],
        start=max(text.start, left) + shift,
        scored_from=begin + shift,
        scored_to=end + shift,
        words=[*special[0], *text.words[left:end], *special[1]],
        content_from=begin,
        num_shortened=end - begin if left > 0 else 0,
    )


def _whole_pair(text: EncodedText, max_length: int | None, overflow: OverflowPolicy) -> Window:
    """Source and target in one pass; each side has the context to itself, and there are no windows."""
    for name, count in (("prompt", text.start), ("completion", len(text.content) - text.start)):
        if max_length is not None and count > max_length:
            problem = f"the {name} has {count} tokens and this encoder-decoder's context is {max_length}"
            raise too_long(problem, overflow, "")
    return Window(text.content, text.start, text.scored_from, len(text.content), text.words, text.scored_from, 0)


def too_long(problem: str, overflow: OverflowPolicy, windows_help: str) -> RowError:
    """The error of a row that exceeds the context; marked as skipped where that is the policy."""
    if overflow == "skip":
        return RowError(f"skipped: {problem}", skipped=True)
    return RowError(f"{problem}: shorten it, or set overflow to {windows_help}'skip' to leave such rows out")
