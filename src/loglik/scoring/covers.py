r"""The probability of bytes given bytes: every tokenisation of prompt and completion that straddles the boundary.

A *cover* of a byte string x is a token sequence :math:`t_1 \dots t_n` whose bytes start with x while those of
:math:`t_1 \dots t_{n-1}` do not yet spell all of x. It is *canonical* if it is the beginning of the tokenizer's own
encoding of some text (`loglik.models.canonical`). The prefix mass

.. math:: M(x) = \sum_{t \in \mathrm{covers}(x)} p(t_1 \dots t_n), \qquad M(\text{empty}) = 1

sums over canonical covers, and

.. math:: \log p(b \mid a) = \log M(ab) - \log M(a) \qquad \text{for prompt } a \text{ and completion } b.

So the chain rule holds over bytes: however a string is cut into prompts and completions, the values add up to the same
(under one decision about BOS). Kinds: of the model restricted to canonical tokenisations, not renormalised, the value
is exact. Of the sum over all tokenisations M(x) is a lower bound, and the difference of two such bounds promises
nothing. Covers: arXiv 2410.09303, 2412.03719; their small number under BPE: arXiv 2506.14123.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from loglik.errors import RowError
from loglik.kinds import Kind
from loglik.models.canonical import BpeView, split_utf8
from loglik.models.encode import BosPolicy, TextEncoder, check_text
from loglik.scoring.windows import Window

__all__ = ["CoverEncoder", "CoverPlan", "Fan", "Located", "Tail", "Tokenisations", "common_prefix", "kind_of"]

Tokenisations = Literal["canonical", "all"]
_Kind = tuple[tuple[int, ...], int, str]


@dataclass(frozen=True, slots=True)
class Fan:
    """Covers that differ in their last token only.

    Args:
        path: their common tokens.
        cut: surface bytes that these spell; fewer than the covered string has.
        tokens: the last tokens, of which each makes a cover.
    """

    path: tuple[int, ...]
    cut: int
    tokens: list[int]


class Tail:
    """Canonical covers of one byte string, found from its end.

    Every text that goes on from the string is cut into pieces by the pre-tokeniser; a *past* is where pieces end in the
    string, and few pasts are possible. Given a past and a place m in its last piece, the tokens before m are settled:
    the merges of the bytes before m. What is left is to find the tokens that begin with the bytes behind m.

    Args:
        view: the tokenizer.
        data: surface bytes, which may end inside a character.
        bare: whether they are nothing but the space in front of the text, so that a text has to follow.
    """

    def __init__(self, view: BpeView, data: bytes, *, bare: bool = False) -> None:
        parts = split_utf8(data)
        assert parts is not None  # `BpeView.surface` has refused what is not UTF-8
        self.view = view
        self.text, self.rest = parts
        self.data = data
        self.bare = bare
        self._at_once: dict[_Kind, bytes | None] = {}
        self._later: dict[_Kind, list[bytes]] = {}
        self._find_pasts()

    def _find_pasts(self) -> None:
        """All that can be known about the pieces: the settled ones, and the possible pasts of the bytes after them."""
        ends = (0, *self.view.ends(self.text))
        for pieces in (4, 16, len(ends)):
            origin = ends[max(0, len(ends) - pieces)] if len(ends) > pieces else 0
            text = self.text.encode()[origin:].decode()
            if origin and tuple(end - origin for end in ends if end > origin) != self.view.ends(text):
                continue  # what stands further left matters
            size = len(self.data) - origin
            within: set[tuple[int, ...]] = set()
            beyond: set[tuple[int, ...]] = set()
            for future in self._futures():
                whole = text + future
                if self.view.unchanged(whole):
                    past = tuple(end for end in self.view.ends(whole) if end <= size)
                    within.add(tuple(end for end in past if end < size))
                    beyond.add(past)
            if not origin or (all(within) and len({past[0] for past in within}) == 1):
                break
        self.origin, self._near = origin, text
        self._within, self._beyond = within, beyond  # pasts that end inside the string, or at its end as well
        self.settled = self._pieces(self.data, [end for end in ends if end <= origin])

    def _futures(self) -> list[str]:
        if self.rest:
            return [char + future for char in self.view.completions(self.rest) for future in self.view.few_futures]
        return self.view.futures

    def covers(self) -> list[Fan]:
        """The canonical covers; never none, since the string is the beginning of a text."""
        size = len(self.data) - self.origin
        found: dict[tuple[int, ...], Fan] = {}
        for past in self._within:
            begin = past[-1] if past else 0
            for cut in range(max(begin, size - self.view.longest), size):
                self._extend(past, cut, self.view.starting_with(self.data[self.origin + cut :]), found)
        return list(found.values())

    def extensions(self) -> list[Fan]:
        """Covers of the string that spell it exactly, with each token that can follow them."""
        size = len(self.data) - self.origin
        found: dict[tuple[int, ...], Fan] = {}
        behind = self.data[self.origin :]
        groups: dict[bytes, list[int]] = {}
        for token in self.view.starting_with(b""):
            groups.setdefault(self.view.first_kind(token, behind=behind), []).append(token)
        for first, tokens in groups.items():
            for past in self._beyond if self.rest else self._beyond & self._pasts_before(first):
                self._extend(past, size, tokens, found)
        return list(found.values())

    def _pasts_before(self, first: bytes) -> set[tuple[int, ...]]:
        """The pasts of texts whose next character begins with the bytes `first`."""
        size = len(self.data) - self.origin
        parts = split_utf8(self._near.encode() + first)
        if parts is None:
            return set()
        futures = self._completed(parts[1]) if parts[1] else self.view.short_futures
        found: set[tuple[int, ...]] = set()
        for future in futures:
            found.add(tuple(end for end in self.view.ends(parts[0] + future) if end <= size))
            if found >= self._beyond:
                break
        return found

    def _completed(self, rest: bytes) -> list[str]:
        """Characters that begin with the bytes `rest`, and some of them with something behind."""
        chars, few = self.view.completions(rest), self.view.few_futures[1:]
        return [*chars, *(char + future for char in chars[:16] for future in few)]

    def whole(self) -> tuple[int, ...] | None:
        """The encoding of the string as a whole text; None if it ends inside a character."""
        if self.rest:
            return None
        if self.bare:
            return ()
        return self.settled + self._pieces(self.data[self.origin :], (0, *self.view.ends(self._near)))

    def _pieces(self, data: bytes, ends: Sequence[int]) -> tuple[int, ...]:
        return tuple(chain.from_iterable(self.view.piece(data[begin:end]) for begin, end in pairwise(ends)))

    def _extend(self, past: tuple[int, ...], cut: int, tokens: list[int], found: dict[tuple[int, ...], Fan]) -> None:
        """Add the `tokens` that can stand at byte `cut`, inside the piece that begins where `past` ends."""
        if not tokens:
            return
        near, begin = self.data[self.origin :], past[-1] if past else 0
        inner = self.view.merged(near[begin:cut])
        fits = [token for token in tokens if self._fits(past, begin, cut, inner, token)]
        if fits:
            path = self.settled + self._pieces(near, (0, *past)) + inner
            fan = found.setdefault(path, Fan(path, self.origin + cut, []))
            fan.tokens.extend(sorted(set(fits) - set(fan.tokens)))

    def _fits(self, past: tuple[int, ...], begin: int, cut: int, inner: tuple[int, ...], token: int) -> bool:
        """Whether some text has the pieces of `past` and then a piece whose tokens begin with ``inner + token``."""
        view = self.view
        if not (view.adjacent(inner[-1], token) if inner else view.alone(token)):
            return False
        before = self.data[self.origin : self.origin + cut]
        spelled = before + view.spelling[token]
        parts = split_utf8(spelled)
        if parts is None:
            return False
        text, rest = parts
        # A piece that ends with the token asks nothing more of the merges: its neighbour has been asked above.
        settled = not (view.ignores_merges or view.is_byte(token))
        piece = spelled[begin:]
        if rest:
            return any(view.writes(piece + more, inner, token) for more in self._completing(past, text, rest))
        kind = (past, cut, view.kind(token, behind=before))
        if kind not in self._at_once:
            self._at_once[kind] = self._goes_on(past, text, "", len(spelled))
        if self._at_once[kind] is not None and (settled or view.writes(piece, inner, token)):
            return True
        if kind not in self._later:
            found = (self._goes_on(past, text, future, len(spelled)) for future in view.futures[1:])
            self._later[kind] = list(dict.fromkeys(more for more in found if more is not None))
        return any((settled and not more) or view.writes(piece + more, inner, token) for more in self._later[kind])

    def _goes_on(self, past: tuple[int, ...], text: str, future: str, end: int) -> bytes | None:
        """What `future` adds to the piece that holds byte ``end - 1`` of `text`; None if pieces do not fit `past`."""
        whole = text + future
        ends = self.view.ends(whole)
        if tuple(e for e in ends if e < end) != past:
            return None
        if not self.view.unchanged(whole) or (self.bare and not self.view.can_open(whole)):
            return None
        return whole.encode()[end : ends[len(past)]]

    def _completing(self, past: tuple[int, ...], text: str, rest: bytes) -> Iterator[bytes]:
        """What can stand behind a token that ends with the bytes `rest` of a character, in the same piece."""
        end = len(text.encode()) + len(rest)
        for future in self._completed(rest):
            more = self._goes_on(past, text, future, end)
            if more is not None:
                yield more


class Located(NamedTuple):
    """A text as tokens that stand fast (`head`) and surface bytes behind them (`data`); `bare` if no text is there."""

    head: tuple[int, ...]
    data: bytes
    bare: bool


def kind_of(model: Kind, tokenisations: Tokenisations, *, prompt: bool) -> Kind:
    """What log p(completion | prompt) promises about canonical tokenisations, or about the sum over all of them.

    `model` is the kind of the model's own values; without a `prompt` the denominator is exactly 1.
    """
    mass = model if tokenisations == "canonical" else model + Kind.LOWER_BOUND
    return mass - mass if prompt else mass


@dataclass(frozen=True)
class CoverPlan:
    """What has to be scored for one row.

    Args:
        prefix: BOS, or nothing.
        shared: tokens that all covers of both sides begin with; their probability cancels, and is not asked for.
        upper: covers of prompt and completion, as fans.
        lower: covers of the prompt; none where M is 1 or all that they have is shared.
        num_upper: how many covers prompt and completion have.
        num_lower: how many the prompt has; 0 for an empty prompt.
        num_bytes: UTF-8 bytes of the completion.
    """

    prefix: list[int]
    shared: int
    upper: list[Fan]
    lower: list[Fan]
    num_upper: int
    num_lower: int
    num_bytes: int

    @cached_property
    def windows(self) -> list[Window]:
        """One window per fan, `upper` before `lower`; the fan's last tokens are its branches."""
        first = len(self.prefix) + self.shared
        out = []
        for fan in (*self.upper, *self.lower):
            ids = [*self.prefix, *fan.path]
            rest = ([-1] * len(ids), self.shared, 0, (), tuple(fan.tokens))
            out.append(Window(ids, first, first, len(ids), *rest))
        return out

    def combine(self, numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> float:
        """Log p(completion | prompt), from the nats of the scored tokens of each cover of both sides.

        Raises:
            RowError: if the prompt has probability 0.
        """
        below = _log_sum(denominator)
        if below == -np.inf:
            raise RowError("the model gives the prompt probability 0, so nothing can be conditioned on it")
        return _log_sum(numerator) - below


def _log_sum(scores: Sequence[Sequence[float]]) -> float:
    """Log of the sum of exp of the covers' sums, in float64; 0 for no covers: all of them has cancelled."""
    return float(np.logaddexp.reduce([np.sum(s, dtype=np.float64) for s in scores])) if scores else 0.0


class CoverEncoder:
    """Turns (prompt, completion) into the token sequences whose probabilities make log p(completion | prompt).

    BOS: ``always`` and ``never`` do as they say; ``auto`` prepends it if the tokenizer adds one itself, or if nothing
    else would stand before the first token that is scored, as in the other boundary policies. The chain rule over bytes
    holds among rows that agree about BOS.

    Args:
        tokenizer: a transformers tokenizer.
        bos: when BOS is prepended.
        max_length: the model's context in tokens; None for no limit.

    Raises:
        InputError: if the tokenizer is no reversible BPE, or BOS is asked for and there is none.
    """

    def __init__(self, tokenizer: Any, *, bos: BosPolicy = "auto", max_length: int | None = None) -> None:
        self.text_encoder = TextEncoder(tokenizer, layout="causal", boundary="joint", bos=bos)
        self.view = BpeView(tokenizer)
        self.bos = bos
        self.max_length = max_length
        names = sorted(self.view.added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names))) if names else None

    def plan(self, prompt: str, completion: str) -> CoverPlan:
        """The covers of one row.

        Raises:
            RowError: for an empty completion, text that is not Unicode or that the tokenizer does not give back, an
                added token in the completion, a row longer than the context, or nothing to condition on.
        """
        if not completion:
            raise RowError("the completion is empty: there is nothing to score")
        for name, part in (("prompt", prompt), ("completion", completion)):
            check_text(part, name)
        upper = self._covers(prompt + completion, cut=len(prompt))
        lower = self._covers(prompt) if prompt else []
        fans = [*upper, *lower]
        paths = [(*fan.path, *fan.tokens) if len(fan.tokens) == 1 else fan.path for fan in fans]
        common = common_prefix(paths) if prompt else ()
        shared = len(common)
        num_upper, num_lower = (sum(len(fan.tokens) for fan in side) for side in (upper, lower))
        upper, lower = _beyond(upper, shared), _beyond(lower, shared)
        prefix = self.bos_prefix(common, needed=bool(upper or lower))
        longest = len(prefix) + max(len(fan.path) + 1 for fan in fans)
        if self.max_length is not None and longest > self.max_length + 1:  # the last token is only ever a target
            problem = f"has {longest} tokens and the model's context is {self.max_length}"
            raise RowError(f"{problem}: shorten it, since boundary 'exact' has no windows")
        return CoverPlan(prefix, shared, upper, lower, num_upper, num_lower, len(completion.encode()))

    def locate(self, text: str, rest: bytes = b"", *, cut: int | None = None) -> Located:
        """The tokens of a text that stand fast, and the bytes behind them.

        Added tokens that the text spells are tokens, as everywhere, and covers are looked for behind the last of them.
        At its end the text may have some bytes (`rest`) of one more character; the completion begins at `cut`, if any.

        Raises:
            RowError: if an added token reaches into the completion, or the tokenizer does not give the text back.
        """
        matches = list(self._added.finditer(text)) if self._added is not None else []
        begin = matches[-1].end() if matches else 0
        for found in matches:
            entry = self.view.added[found.group()]
            if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
                raise RowError(f"the text has {found.group()!r}, which takes white space with it: use boundary 'joint'")
            if cut is not None and found.end() > cut:
                raise RowError(f"the completion has {found.group()!r}, a token and not text: use boundary 'joint'")
        head = tuple(self.view.encode(text[:begin])) if begin else ()
        data = text[begin:].encode() + rest
        return Located(head, self.view.surface(data, at_start=not begin), not data)

    def _covers(self, text: str, cut: int | None = None) -> list[Fan]:
        """The covers of a text that is not empty, with the tokens that stand fast in front."""
        located = self.locate(text, cut=cut)
        head = located.head
        if located.bare:
            return [Fan(head[:-1], 0, [head[-1]])]
        tail = Tail(self.view, located.data)
        # The prompt is the same text, shorter: its encoding need not be compared as well.
        if cut is not None and [*head, *(tail.whole() or ())] != self.view.encode(text):
            raise RowError("the tokenizer's encoding of the text does not follow from its bytes: use boundary 'joint'")
        return [Fan(head + fan.path, fan.cut, fan.tokens) for fan in tail.covers()]

    def bos_prefix(self, tokens: Sequence[int], *, needed: bool) -> list[int]:
        """BOS, if it is to stand before `tokens`; a `RowError` if a scored token follows and nothing stands there."""
        bos_id: int | None = self.text_encoder.tokenizer.bos_token_id
        wanted = self.bos == "always" or (self.bos == "auto" and (self.text_encoder.adds_bos or not tokens))
        if wanted and bos_id is not None and tuple(tokens[:1]) != (bos_id,):
            return [bos_id]
        if needed and not tokens:
            raise RowError("its first token has nothing before it: give BOS, or a longer prompt")
        return []


def common_prefix(paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all begin with."""
    low, high = min(paths), max(paths)  # all others lie between them
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:same]


def _beyond(fans: list[Fan], shared: int) -> list[Fan]:
    """What is left to score: nothing, where the one cover is all shared."""
    return [fan for fan in fans if len(fan.path) >= shared]
