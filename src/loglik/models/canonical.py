r"""What a BPE tokenizer can write: its vocabulary as bytes, its merges, and where its pre-tokeniser may cut.

A token sequence is *canonical* if it is the beginning of the tokenizer's own encoding of some text (with added tokens
switched off, and of texts that the tokenizer's Unicode normalisation leaves as they are). Under BPE this is a question
about neighbours: inside one piece of the pre-tokeniser a sequence is canonical exactly if every two adjacent tokens are
the encoding of what the two spell (arXiv 2506.07956). Merges and pre-tokenisation are run by `tokenizers`; whether a
text exists that makes the pre-tokeniser cut at given places is decided by trying continuations of every kind that its
patterns can tell apart.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import product
from typing import Any

from tokenizers import Tokenizer

from loglik.errors import InputError, RowError

__all__ = ["BpeView", "split_utf8"]

_SPACE = "▁"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# One character or more of every kind that pre-tokenisers tell apart: case, script, digits, white space, line ends,
# punctuation, marks, symbols, private use. Several of one kind begin with different bytes, since merges see bytes.
_KINDS = (
    *"aZéßЖก漢ひ한𐌰ʰǅ1٣²Ⅷ \n\r\t\u00a0\u2028\u3000!.,/-_('’+€^😀",
    *"\u0301\u093f\u200d\x01\U000f0000\U00100000",
)
_CONTRACTED = "strevmldSTREVMLD"  # letters that patterns name behind an apostrophe
_PAIRED = ("a", "Z", "1", " ", "\n", "!", "'", "漢", "\u0301")
_FEW = ("", *_PAIRED)


class BpeView:
    """A BPE tokenizer seen as bytes.

    *Surface* bytes are the bytes the tokens spell: the text's own, behind the one space that some tokenizers put in
    front of every text.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend: byte-level BPE (GPT-2, Llama-3, Qwen) or BPE
            over characters with byte fallback (Llama-2).

    Raises:
        InputError: for any other tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise _refusal("has no 'tokenizers' backend")
        state = json.loads(backend.to_str())
        model = state["model"]
        if model["type"] != "BPE":
            raise _refusal(f"is of type {model['type']}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise _refusal(f"uses the BPE option {option}")
        steps = _flat(state["pre_tokenizer"])
        self.byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._read_lead(_flat(state["normalizer"]), steps)
        if not self.byte_level and not model.get("byte_fallback"):
            raise _refusal("has neither a byte-level alphabet nor byte fallback")
        self.added = {entry["content"]: entry for entry in state["added_tokens"]}
        state["post_processor"] = state["truncation"] = state["padding"] = None
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.ignores_merges = bool(model.get("ignore_merges"))
        self._whole_model = self._merge_model = self.backend.model
        if self.ignores_merges:
            state["model"]["ignore_merges"] = False
            self._merge_model = Tokenizer.from_str(json.dumps(state)).model
        nothing = {**state, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        self._splitter = Tokenizer.from_str(json.dumps({**nothing, "pre_tokenizer": _splitting(steps)})).pre_tokenizer
        self._read_vocabulary(model["vocab"])
        pattern = "|".join(text for step in steps for text in (step.get("pattern") or {}).values())
        self._names = bool(re.search("[A-Za-z0-9]", _UNNAMED.sub("", pattern)))
        self.futures = self._make_futures(pattern)
        self.short_futures = [future for future in self.futures if len(set(future)) < 2]
        self.few_futures = [future for future in _FEW if self.spells(future.encode())]
        self.adjacent = lru_cache(maxsize=2**18)(self._adjacent)
        self.alone = lru_cache(maxsize=2**18)(self._alone)
        self.merged = lru_cache(maxsize=2**14)(self._merged)
        self.piece = lru_cache(maxsize=2**14)(self._piece)
        self._kind_of = lru_cache(maxsize=2**18)(self._kind)
        self.completions = lru_cache(maxsize=2**10)(self._completions)

    def _read_lead(self, normalizers: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
        """Which space stands in front of a text, and how a space is written."""
        self._lead: str = "none"
        self._spaced = False
        self._forms: list[str] = []
        for step in normalizers:
            if step == {"type": "Prepend", "prepend": _SPACE}:
                self._lead = "always"
            elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
                self._spaced = True
            elif step["type"] in _FORMS:
                self._forms.append(step["type"])
            else:
                raise _refusal(f"normalises text with {step['type']}")
        for step in steps:
            if step["type"] == "Metaspace":
                self._spaced = step.get("replacement", _SPACE) == _SPACE
                scheme = step.get("prepend_scheme", "always")
                self._lead = {"always": "missing", "first": "missing at start"}.get(scheme, self._lead)
            elif step["type"] == "ByteLevel" and step.get("add_prefix_space"):
                self._lead = "missing"
        if self._lead == "always" and not self._spaced:
            raise _refusal("puts a mark in front of text and keeps its spaces")

    def _read_vocabulary(self, vocabulary: dict[str, int]) -> None:
        table = _byte_letters()
        self._letter = {byte: letter for letter, byte in table.items()}
        self._fallback: dict[int, int] = {}  # byte: token
        spelled: list[tuple[bytes, int]] = []
        for token, index in vocabulary.items():
            fallback = None if self.byte_level else _BYTE.fullmatch(token)
            if fallback is not None:
                byte = int(fallback.group(1), 16)
                self._fallback[byte] = index
                spelled.append((bytes([byte]), index))
            elif token in self.added or not token:
                continue
            elif not self.byte_level:
                spelled.append(((token.replace(_SPACE, " ") if self._spaced else token).encode(), index))
            elif all(letter in table for letter in token):
                spelled.append((bytes(table[letter] for letter in token), index))
        if not self.byte_level and len(self._fallback) < 256:
            raise _refusal("has byte fallback without a token for every byte")
        if self._spaced and _SPACE not in vocabulary:
            raise _refusal("has no token for a space")
        self._in_vocabulary = vocabulary.keys()
        self._byte_tokens = frozenset(self._fallback.values())
        self._alphabet = {byte for byte, letter in self._letter.items() if letter in vocabulary}
        spelled.sort()
        self._keys = [key for key, _ in spelled]
        self._tokens = [index for _, index in spelled]
        self.spelling = {index: key for key, index in spelled}
        self.longest = max(map(len, self._keys), default=0)

    def _make_futures(self, pattern: str) -> list[str]:
        """Continuations to try; letters that a pattern names (such as those of contractions) are kinds of their own."""
        named = sorted({c for c in pattern if c.isalpha()} | {c.swapcase() for c in pattern if c.isalpha()})
        kinds = dict.fromkeys((*_KINDS, *_CONTRACTED, *named))
        small = [chr(byte) for byte in sorted(self._alphabet) if byte < 128] if self.byte_level else []
        paired = (*_PAIRED, *small) if len(small) <= 12 else _PAIRED
        kinds |= dict.fromkeys(small if len(small) <= 12 else ())
        found = dict.fromkeys(("", *kinds, *map("".join, product(paired, repeat=2))))
        return [future for future in found if self.spells(future.encode())]

    def spells(self, data: bytes) -> bool:
        """Whether the vocabulary has a token for every byte."""
        return not self.byte_level or self._alphabet.issuperset(data)

    def surface(self, data: bytes, *, at_start: bool = True) -> bytes:
        """The bytes that the tokens of a text spell; it may end inside a character, or stand behind an added token.

        Raises:
            RowError: for text that the tokenizer does not give back.
        """
        if not self.spells(data):
            raise RowError("the text has a character that the vocabulary cannot spell: remove it")
        if self._spaced and _SPACE.encode() in data:
            raise RowError("the text has a U+2581, which this tokenizer reads as a space: replace it")
        if not self.unchanged(_decoded(data)[0]):
            raise RowError(f"the tokenizer changes the text ({', '.join(self._forms)}): normalise it first")
        lead = self._lead in ("always", "missing") or (at_start and self._lead == "missing at start")
        if lead and self._lead != "always" and data.startswith(b" "):
            raise RowError("the tokenizer does not tell text that begins with a space from text without: remove it")
        return b" " + data if lead else data

    def can_open(self, surface: str) -> bool:
        """Whether a surface text that begins with the space in front can come from a text: see `surface`."""
        return self._lead == "always" or not surface.startswith("  ")

    def unchanged(self, text: str) -> bool:
        """Whether the tokenizer's Unicode normalisation leaves a text as it is."""
        return text.isascii() or all(unicodedata.is_normalized(form, text) for form in self._forms)  # type: ignore[arg-type]

    def starting_with(self, prefix: bytes) -> list[int]:
        """Tokens whose bytes start with `prefix`."""
        low = bisect_left(self._keys, prefix)
        return self._tokens[low : bisect_right(self._keys, prefix + b"\xff" * self.longest)]

    def ends(self, text: str) -> tuple[int, ...]:
        """Byte offsets at which the pre-tokeniser's pieces end.

        Raises:
            InputError: if the pieces leave out a part of the text.
        """
        if not text:
            return ()
        if self._splitter is None:
            return (len(text.encode()),)
        written = text.replace(" ", _SPACE) if self._spaced else text
        out, begin, size = [], 0, 0
        for _, (first, last) in self._splitter.pre_tokenize_str(written):
            if first != begin:
                break
            size += len(text[first:last].encode())
            out.append(size)
            begin = last
        if begin != len(text):
            raise _refusal("leaves white space or other text out of its tokens")
        return tuple(out)

    def _written(self, data: bytes) -> str:
        if self.byte_level:
            return "".join(self._letter[byte] for byte in data)
        return data.decode().replace(" ", _SPACE) if self._spaced else data.decode()

    def _run(self, model: Any, data: bytes) -> tuple[int, ...]:
        rest = b""
        if not self.byte_level:
            text, rest = _decoded(data)
            data = text.encode()
        ids = [token.id for token in model.tokenize(self._written(data))] if data else []
        return (*ids, *(self._fallback[byte] for byte in rest))

    def _merged(self, data: bytes) -> tuple[int, ...]:
        """Tokens that the merges make of bytes inside one piece; a cut character stands in byte-fallback tokens."""
        return self._run(self._merge_model, data)

    def _piece(self, data: bytes) -> tuple[int, ...]:
        """Tokens of a whole piece: one token where the tokenizer prefers that to its merges."""
        return self._run(self._whole_model, data)

    def is_byte(self, token: int) -> bool:
        """Whether it is a byte-fallback token, which stands only where a character has no token of its own."""
        return token in self._byte_tokens

    def _alone(self, token: int) -> bool:
        """Whether the token can open a piece."""
        data = self.spelling[token]
        return self.is_byte(token) or self._tokenized(data) == [token] or (self.ignores_merges and self._is_text(data))

    def _adjacent(self, left: int, right: int) -> bool:
        """Whether two tokens can stand side by side in one piece, as far as merges go."""
        if self.is_byte(left) or self.is_byte(right):
            return self.alone(right)
        return self._tokenized(self.spelling[left] + self.spelling[right]) == [left, right]

    def _tokenized(self, data: bytes) -> list[int]:
        return [token.id for token in self._merge_model.tokenize(self._written(data))]

    @staticmethod
    def _is_text(data: bytes) -> bool:
        parts = split_utf8(data)
        return parts is not None and not parts[1]

    def kind(self, token: int, *, behind: bytes) -> str:
        """Tokens of one kind are the same to the pre-tokeniser; patterns may name letters behind an apostrophe."""
        named = self.spelling[token][:3].hex() if _APOSTROPHE.search(behind[-4:]) else ""
        return named + self._kind_of(token)

    def first_kind(self, token: int, *, behind: bytes) -> bytes:
        """The first character of a token, or what it has of it, up to what the pre-tokeniser can tell apart."""
        data = self.spelling[token]
        first = data[: 1 if data[0] < 0xC0 else 2 if data[0] < 0xE0 else 3 if data[0] < 0xF0 else 4]
        if first.isalpha() and not self._names and not _APOSTROPHE.search(behind[-4:]):
            return b"a" if first.islower() else b"A"
        return first

    def _kind(self, token: int) -> str:
        """ASCII letters count by case, and a run of four is like one of three; digits count by their number.

        Where a pattern names single letters or digits, every one counts.
        """
        data = self.spelling[token]
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return data.decode("latin-1")
        if self._names or not text.isascii() or "'" in text:
            return text
        return _RUNS.sub(r"\1\1\1", text.translate(_CLASSES))

    def writes(self, piece: bytes, inner: tuple[int, ...], token: int) -> bool:
        """Whether the encoding of `piece` begins with ``inner + token``, where `inner` is known to be canonical."""
        first, skipped = 0, 0
        if not self.ignores_merges and len(inner) > 8:  # merges are local: what is further left is settled
            first = len(inner) - 8
            skipped = sum(len(self.spelling[i]) for i in inner[:first])
            while first and piece[skipped] & 0xC0 == 0x80:
                first -= 1
                skipped -= len(self.spelling[inner[first]])
        wanted = (*inner[first:], token)
        return self.piece(piece[skipped:])[: len(wanted)] == wanted

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own encoding, added tokens included, without the tokens it puts around a text."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def _completions(self, rest: bytes) -> list[str]:
        """Characters that begin with the bytes `rest`: of each general category and each next byte one or two.

        Those without a token of their own come first, then those that have one.
        """
        lone, known = [], []
        for group in _characters(rest).values():
            usable = [char for char in group if self.spells(char.encode()) and not (self._spaced and char == _SPACE)]
            lone += [char for char in usable if char not in self._in_vocabulary][:1]
            known += [char for char in usable if char in self._in_vocabulary][:1]
        return lone + known


@lru_cache(maxsize=4096)
def _characters(rest: bytes) -> dict[tuple[str, int], list[str]]:
    """Characters that begin with the bytes `rest` by general category and next byte; every 16th of very many."""
    points = _points(rest)
    groups: dict[tuple[str, int], list[str]] = {}
    for char in map(chr, points if len(points) <= 4096 else points[::16]):
        groups.setdefault((unicodedata.category(char), char.encode()[len(rest)]), []).append(char)
    return dict(sorted(groups.items()))


def split_utf8(data: bytes) -> tuple[str, bytes] | None:
    """The whole characters and the bytes of a character cut at the end; None if it is not the beginning of UTF-8."""
    try:
        text, used = codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return None
    rest = data[used:]
    return (text, rest) if not rest or len(_points(rest)) else None


def _decoded(data: bytes) -> tuple[str, bytes]:
    parts = split_utf8(data)
    if parts is None:
        raise RowError("the text is not the beginning of a UTF-8 string: give whole text or a cut of one")
    return parts


@lru_cache(maxsize=4096)
def _points(rest: bytes) -> range:
    """Code points whose UTF-8 begins with the bytes `rest` of one cut character."""
    lead = rest[0]
    size, bits = (2, 0x1F) if lead < 0xE0 else (3, 0x0F) if lead < 0xF0 else (4, 0x07)
    missing = size - len(rest)
    value = lead & bits
    for byte in rest[1:]:
        value = value << 6 | byte & 0x3F
    low, high = value << 6 * missing, ((value + 1) << 6 * missing) - 1
    low = max(low, (0x80, 0x800, 0x10000)[size - 2])
    if lead == 0xED:
        high = min(high, 0xD7FF)
    return range(low, min(high, 0x10FFFF) + 1)


_CLASSES = {code: "0" if chr(code).isdigit() else "A" if chr(code).isupper() else "a"
            for code in range(128) if chr(code).isalnum()}  # fmt: skip
# What a pattern can hold without telling single ASCII letters or digits apart, but for letters behind an apostrophe.
_UNNAMED = re.compile(
    r"""\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\u[0-9a-fA-F]{4}|\\.|\{[\d,]*\}|['’](?:\(\?i?:[^()]*\)|\w+)|\(\?[a-z]*:|a-z|A-Z|0-9"""
)
_APOSTROPHE = re.compile("'|’".encode())
_RUNS = re.compile(r"([aA])\1{3,}")


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None or step["type"] != "Sequence":
        return [] if step is None else [step]
    return [inner for child in step.get("pretokenizers", step.get("normalizers", ())) for inner in _flat(child)]


def _splitting(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The pre-tokeniser reduced to what cuts text: no space is put in front, and no bytes are rewritten for nothing."""
    kept = []
    for step in steps:
        if step["type"] == "ByteLevel":
            if step.get("use_regex", True):
                kept.append({**step, "add_prefix_space": False})
        elif step["type"] == "Metaspace":
            if step.get("split", True):
                kept.append({**step, "prepend_scheme": "never"})
        else:
            kept.append(step)
    return {"type": "Sequence", "pretokenizers": kept} if kept else None


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _refusal(why: str) -> InputError:
    return InputError(f"boundary 'exact' needs a reversible BPE tokenizer, and this one {why}: use boundary 'joint'")
