"""Tokens of a text that is read in pieces: those of the whole text, in memory that does not grow with it.

The text is tokenised in blocks that overlap. A block may be wrong near its edges, where it does not see what stands
beyond, so it hands over to the next one inside the overlap, at a place where both have given the same tokens for a
while:

* *Start of a word*. A pre-tokenizer that has come to the start of a word goes on from there whatever stood before,
  and a word's tokens depend on the word alone. Blocks that share whole words agree from there on.
* *Any token*, under byte-pair encoding without words (SentencePiece style, white space is an ordinary symbol). Let
  two blocks share the boundaries p < q. A merge across p or q of the whole text would be the first across either; up
  to it the parts before p, between p and q and behind q have merged as they do alone. Both sides of p merged so in
  the first block and both sides of q in the second, where the merge did not happen. So neither happens in the whole.

Special tokens that are written out in the text are found before all else, so that a hand-over keeps their length away
from the edges. A block never ends in white space, because how a pre-tokenizer cuts a run of it depends on how the run
ends. Where no hand-over is found the overlap is extended, and at last the block itself: a single word of a megabyte is
held and tokenised at once, and so is a text that a Unigram or WordPiece model sees as one word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from tokenizers import models

from loglik.errors import InputError, RowError
from loglik.models.encode import NOT_TEXT, TextEncoder, _pieces

__all__ = ["BLOCK", "OVERLAP", "TokenPiece", "read_chunks", "token_stream"]

BLOCK = 16_384  # characters that are tokenised at once
OVERLAP = 1_024  # of them in the block before as well
_GROWTH = 4  # of an overlap without agreement
_ANCHORS = 4  # shared word starts (or tokens) that make an agreement
# Everything that pre-tokenizers are known to cut at.
_MANY_WORDS = "One two  three\n\nFour's \t5678,900.--(x_y) é漢字かな \u0301e АБв\r\n1st/2nd"


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """Consecutive tokens of a text.

    Args:
        ids: tokens, without special tokens around the text.
        spans: (begin, end) characters of each token, counted from the beginning of `text`.
        words: which word of the whole text each token belongs to, -1 for none.
        text: what the tokens stand for, with what no token covers; the pieces of a text spell it.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int]
    text: str

    @property
    def pieces(self) -> list[str]:
        """Text of each token; characters that tokens share stand with the first of them."""
        return _pieces(self.text, self.spans)


def read_chunks(text: Any, size: int = BLOCK) -> Iterator[str]:
    """The characters of a document in chunks of at most `size`, checked.

    Args:
        text: a string, a file opened in text mode (read by `size` characters, whatever its lines), or any iterable of
            strings, which together are one document.
        size: characters of a chunk.

    Raises:
        InputError: for anything else, or a file whose bytes are not in the encoding it was opened with.
        RowError: for NUL and lone surrogates, with their place in the document.
    """
    place = 0
    for chunk in _strings(text, size):
        found = NOT_TEXT.search(chunk)
        if found is not None:
            what = "a NUL character" if found.group() == "\0" else f"a lone surrogate (U+{ord(found.group()):04X})"
            raise RowError(f"the document has {what} at character {place + found.start()}: remove or replace it")
        place += len(chunk)
        for begin in range(0, len(chunk), size):
            yield chunk[begin : begin + size]


def token_stream(
    encoder: TextEncoder, chunks: Iterable[str], *, block: int = BLOCK, overlap: int = OVERLAP
) -> Iterator[TokenPiece]:
    """Tokens of the text that `chunks` spell, in order: those of the whole text.

    No more than two blocks and one chunk are held, unless the text has a longer stretch without a place to hand over.

    Args:
        encoder: gives tokens, character spans and words of a string.
        chunks: of the text, of any sizes.
        block: characters that are tokenised at once.
        overlap: characters of a block that stand in the one before as well.

    Raises:
        InputError: for a tokenizer without character offsets.
    """
    if encoder._backend is None:
        raise InputError(
            "the tokenizer gives no character offsets, so a text cannot be tokenised in pieces; use its fast version"
        )
    rule = _Rule(_sees_one_word(encoder._backend), _longest_added(encoder._backend))
    text = _Text(chunks)
    held = _encode(encoder, text, 0, text.settle(0, block))
    step = block
    while (end := text.settle(held.end, step)) > held.end:
        width = overlap
        while (begin := held.end - width) > held.begin:
            new = _encode(encoder, text, begin, end)
            last = _hand_over(held, new, rule)
            if last is not None:
                yield _piece(held, text, last, new.done)
                text.drop(begin)
                held, step = new, block
                break
            width *= _GROWTH
        else:
            held = _grown(held, _encode(encoder, text, held.begin, end))
            step = end - held.begin  # twice as long each time: the work stays proportional to the text
    if held.end > held.done:
        yield _piece(held, text, len(held.ids), held.end)


class _Text:
    """The part of the text that is still needed; positions are characters of the whole text."""

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._begin = 0
        self._held = ""

    def settle(self, done: int, step: int) -> int:
        """A place to end a block about `step` characters behind `done`, never after white space but at the end."""
        goal = done + step
        while True:
            is_whole = not self._read_to(goal + 1)
            if is_whole and self._begin + len(self._held) <= goal:
                return self._begin + len(self._held)
            end = self._begin + len(self._held[: goal - self._begin].rstrip())
            if end - done > step // 2:
                return end
            goal += goal - done

    def part(self, begin: int, end: int) -> str:
        """Characters from `begin` to `end`."""
        return self._held[begin - self._begin : end - self._begin]

    def drop(self, begin: int) -> None:
        """Forget what stands before `begin`."""
        self._held = self._held[begin - self._begin :]
        self._begin = begin

    def _read_to(self, end: int) -> bool:
        """Whether the text reaches `end`, after reading as far."""
        parts, reached = [self._held], self._begin + len(self._held)
        while reached < end and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            reached += len(chunk)
        self._held = "".join(parts)
        return reached >= end


@dataclass(slots=True)
class _Block:
    """Tokens of characters `begin` to `end`; those from `first` on, behind `done`, are not handed out yet."""

    begin: int
    end: int
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int]
    first: int = 0
    done: int = 0
    word_shift: int = 0


class _Rule(NamedTuple):
    """Where blocks may hand over: at any shared token or at the starts of words, `margin` away from either's edge."""

    any_token: bool
    margin: int


class _Atom(NamedTuple):
    """Tokens that share characters, with no other token's character among them; usually one token."""

    begin: int
    end: int
    ids: tuple[int, ...]
    opens_word: bool


def _encode(encoder: TextEncoder, text: _Text, begin: int, end: int) -> _Block:
    tokens = encoder._tokens(text.part(begin, end))
    return _Block(begin, end, tokens.ids, [(a + begin, b + begin) for a, b in tokens.spans], tokens.words)


def _piece(block: _Block, text: _Text, last: int, end: int) -> TokenPiece:
    """Tokens of the block up to `last`, and text up to `end`."""
    own = slice(block.first, last)
    return TokenPiece(
        block.ids[own],
        [(a - block.done, b - block.done) for a, b in block.spans[own]],
        [word + block.word_shift if word >= 0 else -1 for word in block.words[own]],
        text.part(block.done, end),
    )


def _hand_over(old: _Block, new: _Block, rule: _Rule) -> int | None:
    """How many tokens of `old` come before those that `new` goes on with; None where they do not agree."""
    start = len(old.ids) - sum(1 for _ in takewhile(lambda span: span[0] >= new.begin, reversed(old.spans)))
    # Tokens near the beginning of the old block were never confirmed: they may be wrong as well.
    left = _atoms(old, max(start, old.first), len(old.ids))
    right = _atoms(new, 0, sum(1 for _ in takewhile(lambda span: span[0] < old.end, new.spans)))
    runs: list[list[tuple[int, int]]] = []
    places = {atom.begin: number for number, (atom, _) in enumerate(left)}
    follows = -1
    for atom, index in right:
        number = places.get(atom.begin, -1)
        if number < 0 or left[number][0] != atom:
            follows = -1
            continue
        if number != follows:
            runs.append([])
        follows = number + 1
        is_seen = new.begin + rule.margin <= atom.begin <= old.end - rule.margin
        if is_seen and (rule.any_token or atom.opens_word):
            runs[-1].append((left[number][1], index))
    runs = [run for run in runs if len(run) >= _ANCHORS]
    # Blocks that agree, differ and agree again: one of them was still wrong, and it is not known which.
    if not runs or (len(runs) > 1 and not rule.any_token):
        return None
    run = max(runs, key=len)
    last, new.first = run[len(run) // 2]
    new.done = new.spans[new.first][0]
    new.word_shift = old.words[last] + old.word_shift - new.words[new.first]
    return last


def _grown(old: _Block, new: _Block) -> _Block:
    """The longer block in place of the shorter one, of the same beginning."""
    kept = slice(0, old.first)
    if new.ids[kept] != old.ids[kept] or new.spans[kept] != old.spans[kept]:
        raise InputError(
            f"the tokenizer's choices before character {old.done} depend on the text from {old.end} on, so a long text "
            "cannot be tokenised in pieces; score it whole, with overflow 'window'"
        )
    new.first, new.done, new.word_shift = old.first, old.done, old.word_shift
    return new


def _atoms(block: _Block, first: int, last: int) -> list[tuple[_Atom, int]]:
    """Tokens `first` to `last` as atoms, each with its first token."""
    starts: list[int] = []
    reach = -1
    for i in range(first, last):
        begin, end = block.spans[i]
        if not starts or (begin >= reach and begin > block.spans[i - 1][0]):
            starts.append(i)
        reach = max(reach, end)
    atoms = []
    for start, stop in pairwise([*starts, last] if starts else []):
        spans, words = block.spans[start:stop], block.words
        opens = start == 0 or words[start] != words[start - 1]
        end = max(end for _, end in spans)
        atoms.append((_Atom(spans[0][0], end, tuple(block.ids[start:stop]), opens), start))
    return atoms


def _longest_added(backend: Any) -> int:
    """Characters of the longest added token, such as ``<s>``: it is found before anything else, and only whole."""
    return max((len(token.content) for token in backend.get_added_tokens_decoder().values()), default=0)


def _sees_one_word(backend: Any) -> bool:
    """Whether the tokenizer is byte-pair encoding that takes a whole text for one word, as it does with a trial."""
    if not isinstance(backend.model, models.BPE):
        return False
    if backend.pre_tokenizer is None:
        return True
    trial = _MANY_WORDS if backend.normalizer is None else backend.normalizer.normalize_str(_MANY_WORDS)
    return len(backend.pre_tokenizer.pre_tokenize_str(trial)) == 1


def _strings(text: Any, size: int) -> Iterator[str]:
    if isinstance(text, str):
        yield text
        return
    if isinstance(text, bytes | bytearray):
        raise InputError("text must be characters, got bytes; decode them first")
    if hasattr(text, "read"):
        chunks: Iterator[Any] = iter(lambda: text.read(size), "")
    elif isinstance(text, Iterable):
        chunks = iter(text)
    else:
        kind = type(text).__name__
        raise InputError(f"text must be a string, a file opened in text mode or an iterable of strings, got {kind}")
    number = 0
    while True:
        try:
            chunk = next(chunks, chunks)
        except UnicodeDecodeError as error:
            raise InputError(
                f"the document is not {error.encoding} text ({error.reason}); open it with its own encoding"
            ) from None
        if chunk is chunks:
            return
        if not isinstance(chunk, str):
            kind = type(chunk).__name__
            raise InputError(f"chunk {number} of the document must be a string, got {kind}; open files in text mode")
        number += 1
        yield chunk
