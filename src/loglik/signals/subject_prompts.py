"""Prompts with a subject, in tokens: what causal tracing and attention knockout look at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.encode import TextEncoder
from loglik.models.protocol import ChainRule, require
from loglik.signals.scenarios import prompt_tokens

__all__ = ["SubjectPosition", "SubjectPrompt", "subject_prompt"]


class SubjectPosition(StrEnum):
    """Classes of tokens from the subject on. A subject of one token is its last, one token behind it is the last."""

    FIRST_SUBJECT = "first subject token"
    MIDDLE_SUBJECT = "middle subject tokens"
    LAST_SUBJECT = "last subject token"
    FIRST_LATER = "first later token"
    FURTHER_LATER = "further later tokens"
    LAST = "last token"


@dataclass(frozen=True, slots=True)
class SubjectPrompt:
    """A prompt in tokens, with its subject and the predicted token.

    Args:
        ids: T token ids, BOS included.
        span: first token of the subject, and the one behind its last.
        target: token whose probability is looked at.

    Raises:
        InputError: for no tokens, or a span outside of them.
    """

    ids: tuple[int, ...]
    span: tuple[int, int]
    target: int

    def __post_init__(self) -> None:
        begin, end = self.span
        if not 0 <= begin < end <= len(self.ids):
            raise InputError(
                f"the subject must be tokens of the prompt, from 0 to {len(self.ids)}, got {begin} to {end}"
            )
        if min((*self.ids, self.target)) < 0:
            raise InputError("token ids must not be negative")

    def positions(self) -> dict[SubjectPosition, list[int]]:
        """Tokens of each class; classes without any are left out."""
        (begin, end), last = self.span, len(self.ids) - 1
        found = {
            SubjectPosition.FIRST_SUBJECT: range(begin, min(begin + 1, end - 1)),
            SubjectPosition.MIDDLE_SUBJECT: range(begin + 1, end - 1),
            SubjectPosition.LAST_SUBJECT: range(end - 1, end),
            SubjectPosition.FIRST_LATER: range(end, min(end + 1, last)),
            SubjectPosition.FURTHER_LATER: range(end + 1, last),
            SubjectPosition.LAST: range(max(last, end), last + 1),
        }
        return {name: list(places) for name, places in found.items() if len(places)}


def subject_prompt(model: Any, prompt: str, subject: str, answer: str | None = None) -> SubjectPrompt:
    """Tokens of a prompt, those that the subject touches, and the token that is predicted.

    Args:
        model: with a tokenizer.
        prompt: text that ends right before the answer.
        subject: a part of it; its last occurrence counts.
        answer: what follows, with its leading space, tokenised together with the prompt; its first token is looked at.
            The model's first choice if None.

    Raises:
        InputError: for a model without tokenizer, a subject that is not in the prompt or shares a token with the
            answer, or (without an answer) a model without next-token distributions.
        RowError: for a prompt that cannot be tokenised.

    Source: arXiv 2410.14405.
    """
    begin = prompt.rfind(subject) if subject.strip() else -1
    if begin < 0:
        raise InputError(f"the subject {subject!r} is not in the prompt {prompt!r}: give it as it stands there")
    begin, end = begin + len(subject) - len(subject.lstrip()), begin + len(subject.rstrip())
    encoder = TextEncoder(getattr(model, "tokenizer", None), layout=getattr(model, "layout", "causal"))
    if answer is None:
        ids = prompt_tokens(model, [prompt])[0]
        lead = ids[: int(encoder.adds_bos)]
        content = ids[len(lead) :]
        pieces = encoder.encode("", prompt).pieces if len(content) > 1 else [prompt]
    else:
        whole = encoder.encode(prompt, answer)
        lead, content = list(whole.prefix), whole.content[: whole.scored_from]
        pieces = whole.pieces[: whole.scored_from]
    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    inside = [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < end and b > begin]
    if not inside or ends[-1] < end:
        raise InputError(
            f"the subject {subject!r} shares its last token with the answer under this tokenizer: put a word between"
        )
    last = inside[-1] + 1
    # A character of several tokens stands with the first of them, and the others have no text.
    while last < len(pieces) and not pieces[last]:
        last += 1
    span = (len(lead) + inside[0], len(lead) + last)
    if answer is not None:
        return SubjectPrompt((*lead, *content), span, whole.content[whole.scored_from])
    chain = require(model, ChainRule, "a prompt without its answer")  # type: ignore[type-abstract]
    with torch.no_grad():
        table = chain.next_log_probs(TokenBatch.from_lists([ids], starts=[len(ids)]))
    return SubjectPrompt((*lead, *content), span, int(table[0].argmax()))
