r"""The distribution of the next byte, from the distribution of the next token and the covers of the text so far.

.. math:: p(b \mid x) = M(xb) / M(x), \qquad p(\text{end} \mid x) = p(\tau(x), \text{EOS}) / M(x)

with the prefix mass M of `loglik.scoring.covers` and the tokenizer's own encoding :math:`\tau(x)`. Covers that reach
beyond x say the next byte themselves; a cover that spells x exactly is followed by a token that does, by EOS, or by a
token after which the sequence is not canonical. The mass of the last is the *leak*: bytes, end and leak sum to 1
(arXiv 2410.09303, 2412.03719, 2506.14123).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.canonical import split_utf8
from loglik.models.encode import BosPolicy, check_text
from loglik.models.protocol import ChainRule, require
from loglik.scoring.covers import CoverEncoder, Fan, Tail, common_prefix

__all__ = ["NextBytes", "next_byte_distributions", "next_bytes"]

_END = 256
_TOKENS = 1024  # tokens in one forward pass
_NEVER = torch.tensor(-torch.inf, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class NextBytes:
    """What comes after one text.

    Args:
        log_probs: (257,) float64, nats: the next byte, or at index 256 that the text ends.
        log_leak: () float64, nats: the mass that leaves the canonical tokenisations; with `log_probs` it sums to 1.
        num_covers: canonical covers of the text.
    """

    log_probs: Tensor
    log_leak: Tensor
    num_covers: int


def next_bytes(
    model: Any, text: str | bytes, *, bos: BosPolicy = "auto", encoder: CoverEncoder | None = None
) -> Tensor:
    r"""(257,) log-probabilities in float64 of the next byte given the bytes so far; at index 256 that the text ends.

    .. math:: \log p(b \mid x) = \log M(xb) - \log M(x)

    What is missing from 1 is the leak: see `next_byte_distributions`.

    Args:
        model: a causal language model with a BPE tokenizer.
        text: the text so far; bytes may end inside a character.
        bos: when BOS is prepended; ``auto`` as in scoring.
        encoder: of an earlier call for the same model and `bos`, which makes the next ones faster; made if None.

    Raises:
        InputError: if the model has no next-token distribution, or its tokenizer is no reversible BPE.
        RowError: for text that cannot be the beginning of one, or that the tokenizer does not give back.
    """
    return next_byte_distributions(model, [text], bos=bos, encoder=encoder)[0].log_probs


def next_byte_distributions(
    model: Any, texts: Sequence[str | bytes], *, bos: BosPolicy = "auto", encoder: CoverEncoder | None = None
) -> list[NextBytes]:
    """The next byte after each of several texts, with what leaks; arguments and errors as for `next_bytes`."""
    chain = require(model, ChainRule, "next_bytes")  # type: ignore[type-abstract]
    if getattr(model, "layout", None) != "causal":
        raise InputError("next_bytes needs a causal language model: use one")
    if encoder is None:
        encoder = CoverEncoder(model.tokenizer, bos=bos, max_length=model.max_length)
    return [_after(chain, encoder, text) for text in texts]


def _after(model: ChainRule, encoder: CoverEncoder, text: str | bytes) -> NextBytes:
    if isinstance(text, str):
        check_text(text, "text")
    parts = split_utf8(text.encode() if isinstance(text, str) else text)
    if parts is None:
        raise RowError("the text is not the beginning of a UTF-8 string: give whole text or a cut of one")
    check_text(parts[0], "text")
    located = encoder.locate(*parts)
    tail = Tail(encoder.view, located.data, bare=located.bare)
    size = len(located.data)
    covers, nexts, whole = (tail.covers() if size else []), tail.extensions(), tail.whole()
    spelling = encoder.view.spelling
    exact = [(*f.path, t) for f in covers for t in f.tokens if f.cut + len(spelling[t]) == size]
    paths = [fan.path for fan in [*covers, *nexts]] + exact + ([whole] if whole is not None else [])
    shared = common_prefix(paths)
    head = (*located.head, *shared)
    scores = _Scores(model, [*encoder.bos_prefix(head, needed=True), *head], encoder.max_length)
    scores.compute([path[len(shared) :] for path in paths])

    def of(fan: Fan) -> Tensor:
        """Log-probabilities of the covers of a fan, behind what all have in common."""
        path = fan.path[len(shared) :]
        return scores.total(path) + scores.after(path)[torch.tensor(fan.tokens)]

    found: list[list[Tensor]] = [[] for _ in range(_END + 1)]
    for fan in [*covers, *nexts]:
        for value, token in zip(of(fan), fan.tokens, strict=True):
            if fan.cut + len(spelling[token]) > size:
                found[spelling[token][size - fan.cut]].append(value)
    # Where a sequence can go on canonically from each place at which something can leak: tokens that it may take.
    stays: dict[tuple[int, ...], list[int]] = {path: [] for path in exact}
    if located.bare:
        stays[()] = [token for fan in covers for token in fan.tokens]  # of the space in front of the text
    for fan in nexts:
        stays.setdefault(fan.path, []).extend(fan.tokens)
    eos: int | None = encoder.text_encoder.tokenizer.eos_token_id
    if whole is not None and eos is not None:
        path = whole[len(shared) :]
        found[_END].append(scores.total(path) + scores.after(path)[eos])
        stays.setdefault(whole, []).append(eos)
    # Without text M is 1 (nothing is shared then); else it is the sum over the covers.
    mass = torch.zeros((), dtype=torch.float64) if located.bare else _log_sum([v for fan in covers for v in of(fan)])
    leaks = [scores.total(p[len(shared) :]) + scores.without(p[len(shared) :], tokens) for p, tokens in stays.items()]
    log_probs = torch.stack([_log_sum(values) for values in found]) - mass
    return NextBytes(log_probs, _log_sum(leaks) - mass, sum(len(fan.tokens) for fan in covers) or 1)


class _Scores:
    """Next-token distributions behind one start, in float64."""

    def __init__(self, model: ChainRule, start: Sequence[int], max_length: int | None) -> None:
        self.model = model
        self.start = list(start)
        self.max_length = max_length
        self._after: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def compute(self, paths: Sequence[tuple[int, ...]]) -> None:
        """The distributions along and behind `paths`, which go on from the start."""
        contexts = sorted({path[:i] for path in paths for i in range(len(path) + 1)}, key=len)
        longest = len(self.start) + len(contexts[-1])
        if self.max_length is not None and longest > self.max_length:
            raise RowError(f"has {longest} tokens and the model's context is {self.max_length}: shorten it")
        rows = max(1, _TOKENS // longest)
        for begin in range(0, len(contexts), rows):
            chunk = contexts[begin : begin + rows]
            batch = TokenBatch.from_lists([[*self.start, *context] for context in chunk])
            self._after.update(zip(chunk, self.model.next_log_probs(batch).cpu().double(), strict=True))

    def after(self, path: tuple[int, ...]) -> Tensor:
        """(V,) log-probabilities of the token behind `path`."""
        return self._after[path]

    def total(self, path: tuple[int, ...]) -> Tensor:
        """() log-probability of `path` behind the start."""
        terms = [self._after[path[:i]][token] for i, token in enumerate(path)]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    def without(self, path: tuple[int, ...], tokens: Sequence[int]) -> Tensor:
        """() log-probability that none of `tokens` stands behind `path`."""
        left = torch.ones(len(self._after[path]), dtype=torch.bool)
        left[torch.tensor(tokens, dtype=torch.long)] = False
        return torch.logsumexp(self._after[path][left], dim=0) if bool(left.any()) else _NEVER


def _log_sum(values: Sequence[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(list(values)), dim=0) if values else _NEVER
