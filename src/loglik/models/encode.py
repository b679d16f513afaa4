"""The text front: prompt and completion become tokens, with the boundary found from character offsets.

Policies are explicit. *Boundary*: ``joint`` tokenises prompt and completion together and scores a token that
straddles them with the completion; ``separate`` tokenises each alone. *BOS*: ``auto`` prepends it if the tokenizer adds
one itself or if nothing else would stand before the first scored token; ``always`` and ``never`` do as they say. BOS is
never doubled.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from loglik.errors import InputError, RowError

__all__ = ["NOT_TEXT", "BosPolicy", "Boundary", "BoundaryPolicy", "EncodedText", "Layout", "TextEncoder"]

NOT_TEXT = re.compile("[\x00\ud800-\udfff]")  # NUL, and halves of surrogate pairs

Layout = Literal["causal", "seq2seq", "masked", "diffusion"]
BoundaryPolicy = Literal["joint", "separate"]
BosPolicy = Literal["auto", "always", "never"]
Boundary = Literal["none", "aligned", "straddled", "separate"]


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One row as tokens: ``prefix + content + suffix``, of which ``content[scored_from:]`` is scored.

    Args:
        prefix: special tokens in front (BOS, CLS); repeated in every window.
        content: tokens of the text; for an encoder-decoder the source and then the target.
        suffix: special tokens behind (SEP).
        start: first completion token in `content`; an encoder-decoder decodes from here.
        scored_from: first scored token in `content`; `start`, or one more if nothing stands before the first token.
        boundary: how prompt and completion met.
        num_bytes: UTF-8 bytes of the text that `content[scored_from:]` stands for.
        pieces: text of each content token, which together spell the text; a character cut into several tokens stands
            with the first of them, and the others are empty.
        words: which word of the text each content token belongs to, -1 for none.
        has_unknown: whether a scored token is the unknown token, which stands for more than the text.
    """

    prefix: list[int]
    content: list[int]
    suffix: list[int]
    start: int
    scored_from: int
    boundary: Boundary
    num_bytes: int
    pieces: list[str]
    words: list[int]
    has_unknown: bool

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.prefix) + len(self.content) + len(self.suffix)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of one string with (begin, end) character spans that include the white space a token carries."""

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int]


class TextEncoder:
    """Turns (prompt, completion) into `EncodedText` for one tokenizer and model layout.

    Args:
        tokenizer: a transformers tokenizer.
        layout: ``causal``, ``masked`` (special tokens around one text), ``seq2seq`` (source and target apart) or
            ``diffusion`` (special tokens as for ``masked``; where the tokenizer adds none, BOS as for ``causal``).
        boundary: how prompt and completion are tokenised; an encoder-decoder always keeps them apart.
        bos: when BOS is prepended (causal and diffusion models only).

    Raises:
        InputError: if there is no tokenizer, or BOS is asked for and the tokenizer has none.
    """

    def __init__(
        self, tokenizer: Any, *, layout: Layout, boundary: BoundaryPolicy = "joint", bos: BosPolicy = "auto"
    ) -> None:
        if tokenizer is None:
            raise InputError("the model has no tokenizer, so it cannot score text; save one beside its weights")
        self.tokenizer = tokenizer
        self.layout = layout
        self.boundary = boundary
        self.bos = bos
        self._backend = _without_post_processor(tokenizer)
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._bos_id: int | None = tokenizer.bos_token_id
        # A row of these models may begin with BOS; the others bring the tokenizer's own special tokens.
        self._has_bos = layout == "causal" or (layout == "diffusion" and not self._suffix)
        if self._has_bos and bos == "always" and self._bos_id is None:
            raise InputError("the tokenizer has no BOS token; use bos 'auto' or 'never'")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer prepends BOS by itself."""
        return self._bos_id is not None and self._bos_id in self._prefix[:1]

    def describe_bos(self) -> str:
        """The BOS policy in words, for the output."""
        if not self._has_bos:
            return "the tokenizer's own special tokens"
        if self._bos_id is None:
            return "none: the tokenizer has no BOS token"
        token = self.tokenizer.convert_ids_to_tokens(self._bos_id)
        when = {
            "always": "always",
            "never": "never",
            "auto": "always (the tokenizer adds it)" if self.adds_bos else "where no prompt stands before the text",
        }[self.bos]
        return f"{token} {when}"

    def encode_all(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedText | RowError]:
        """What `encode` gives for each row, or the error it raises; joint texts are tokenised in parallel."""
        texts = [prompt + completion for prompt, completion in pairs]
        ready: list[_Tokens | None] = [None] * len(texts)
        if self._backend is not None and self.layout != "seq2seq" and self.boundary == "joint":
            good = [i for i, text in enumerate(texts) if NOT_TEXT.search(text) is None]
            found = self._backend.encode_batch([texts[i] for i in good], add_special_tokens=False)
            for i, encoding in zip(good, found, strict=True):
                ready[i] = _tokens_of(encoding)
        out: list[EncodedText | RowError] = []
        for (prompt, completion), tokens in zip(pairs, ready, strict=True):
            try:
                out.append(self.encode(prompt, completion, tokens))
            except RowError as error:
                out.append(error)
        return out

    def encode(self, prompt: str, completion: str, tokens: _Tokens | None = None) -> EncodedText:
        """Tokens of one row.

        Args:
            prompt: what is conditioned on; may be empty.
            completion: what is scored.
            tokens: of both together, if they are known already.

        Raises:
            RowError: for an empty completion, text that is not Unicode, a completion without tokens, or one whose only
                token has nothing to condition on.
        """
        if not completion:
            raise RowError("the completion is empty: there is nothing to score")
        for name, text in (("prompt", prompt), ("completion", completion)):
            check_text(text, name)
        if self.layout == "seq2seq":
            return self._encode_pair(prompt, completion)
        if self.boundary == "separate" and prompt:
            left, right = self._tokens(prompt), self._tokens(completion)
            shift = len(prompt)
            last_word = max(left.words, default=-1) + 1
            joined = _Tokens(
                left.ids + right.ids,
                left.spans + [(a + shift, b + shift) for a, b in right.spans],
                left.words + [w + last_word if w >= 0 else -1 for w in right.words],
            )
            return self._finish(prompt + completion, joined, len(left.ids), "separate", shift)
        text = prompt + completion
        tokens = self._tokens(text) if tokens is None else tokens
        if not prompt:
            return self._finish(text, tokens, 0, "none", 0)
        if self._backend is None:
            raise InputError("the tokenizer gives no character offsets, so the boundary is unknown; use 'separate'")
        cut = len(prompt)
        start = bisect_right(tokens.spans, cut, key=itemgetter(1))  # the first token that ends behind the prompt
        straddled = start < len(tokens.ids) and tokens.spans[start][0] < cut
        from_char = tokens.spans[start][0] if straddled else cut
        return self._finish(text, tokens, start, "straddled" if straddled else "aligned", from_char)

    def _finish(self, text: str, tokens: _Tokens, start: int, boundary: Boundary, from_char: int) -> EncodedText:
        if start >= len(tokens.ids):
            raise RowError("the completion has no token under this tokenizer: nothing can be scored")
        prefix, suffix = self._prefix, self._suffix
        scored_from = start
        if self._has_bos:
            suffix = []
            wanted = self.bos == "always" or (self.bos == "auto" and (self.adds_bos or start == 0))
            has_one = tokens.ids[0] == self._bos_id and start > 0
            prefix = [self._bos_id] if wanted and self._bos_id is not None and not has_one else []
            if not prefix and start == 0 and self.layout == "causal":
                scored_from = 1
                if len(tokens.ids) == 1:
                    raise RowError("its only token has nothing before it (no BOS, no prompt), so it cannot be scored")
        skipped = _bytes_of_first_token(self.tokenizer, text, tokens) if scored_from > start else 0
        scored = tokens.ids[scored_from:]
        return EncodedText(
            prefix=list(prefix),
            content=tokens.ids,
            suffix=list(suffix),
            start=start,
            scored_from=scored_from,
            boundary=boundary,
            num_bytes=len(text[from_char:].encode("utf-8")) - skipped,
            pieces=_pieces(text, tokens.spans),
            words=tokens.words,
            has_unknown=self.tokenizer.unk_token_id in scored and self.tokenizer.unk_token_id != self._bos_id,
        )

    def _encode_pair(self, prompt: str, completion: str) -> EncodedText:
        """Source and target of an encoder-decoder, each with the special tokens the model was trained with."""
        source = self._tokens(prompt) if prompt else _Tokens([], [], [])
        target = self._tokens(completion)
        if not target.ids:
            raise RowError("the completion has no token under this tokenizer: nothing can be scored")
        source_ids = [*self._prefix, *source.ids, *self._suffix]
        target_ids = [*self._prefix, *target.ids, *self._suffix]
        names = self.tokenizer.convert_ids_to_tokens
        head, tail = names(self._prefix), names(self._suffix)
        around = ([-1] * len(head), [-1] * len(tail))
        return EncodedText(
            prefix=[],
            content=source_ids + target_ids,
            suffix=[],
            start=len(source_ids),
            scored_from=len(source_ids),
            boundary="separate" if prompt else "none",
            num_bytes=len(completion.encode("utf-8")),
            pieces=[*head, *_pieces(prompt, source.spans), *tail, *head, *_pieces(completion, target.spans), *tail],
            words=[*around[0], *source.words, *around[1], *around[0], *target.words, *around[1]],
            has_unknown=self.tokenizer.unk_token_id in target.ids,
        )

    def _tokens(self, text: str) -> _Tokens:
        if self._backend is None:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return _Tokens(ids, [(0, len(text))] * len(ids), [-1] * len(ids))
        return _tokens_of(self._backend.encode(text, add_special_tokens=False))


def _tokens_of(encoding: Encoding) -> _Tokens:
    words = [-1 if w is None else w for w in encoding.word_ids]
    return _Tokens(encoding.ids, encoding.offsets, words)


def check_text(text: str, name: str) -> None:
    """Refuse what no tokenizer can represent: lone surrogates and NUL."""
    found = NOT_TEXT.search(text)
    if found is not None:
        what = "a NUL character" if found.group() == "\0" else f"a lone surrogate (U+{ord(found.group()):04X})"
        raise RowError(f"the {name} has {what} at character {found.start()}: remove or replace it")


def _without_post_processor(tokenizer: Any) -> Tokenizer | None:
    """A private copy of the fast tokenizer whose offsets cover the white space that tokens carry.

    Byte-level post-processors trim spaces off the offsets, which would hide that a token straddles the boundary.
    Truncation and padding are dropped too: a text is encoded whole or not at all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    state = json.loads(backend.to_str())
    state["post_processor"] = state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens the tokenizer puts before and after one text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    return [], []


def _pieces(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Text of each token; what several tokens share, such as one character's bytes, stands with the first of them."""
    pieces, covered = [], 0
    for begin, end in spans:
        # Without calls of max: this runs for every token that is read.
        pieces.append(text[begin if begin > covered else covered : end])
        if end > covered:  # noqa: PLR1730
            covered = end
    return pieces


def _bytes_of_first_token(tokenizer: Any, text: str, tokens: _Tokens) -> int:
    """UTF-8 bytes the first token stands for, when it is left unscored."""
    begin, end = tokens.spans[0]
    if len(tokens.spans) > 1 and tokens.spans[1] == (begin, end) and not text[begin:end].isascii():
        # Part of one character: in a byte-level vocabulary every symbol of the token is one byte.
        return min(len(tokenizer.convert_ids_to_tokens(tokens.ids[0])), len(text[begin:end].encode("utf-8")) - 1)
    return len(text[:end].encode("utf-8"))
