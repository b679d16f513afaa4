r"""Probabilities of words in context, with the beginning-of-word correction.

In most vocabularies the white space before a word is part of the word's first token, so nothing in a word's own tokens
says that it ends there: their product is the probability that the text goes on with *something that starts with* these
letters, and the white space behind the word is charged to the next one. Such products sum to more than one over all
words. With the set :math:`S` of tokens that begin with white space or end the text, and
:math:`m(c) = \sum_{v \in S} p(v \mid c)`, the probability of word :math:`w = (x_1, \dots, x_n)` after :math:`c` is

.. math:: \log p(w \mid c) = \sum_{t=1}^{n} \log p(x_t \mid c, x_{<t}) + \log m(c, w) - \log m(c)

(Pimentel & Meister 2024, arXiv 2406.14561; Oh & Schuler 2024, arXiv 2406.10851): the next token ends the word, and
that the word before has ended is known. Over all words, and the end of the text, these probabilities sum to 1; over the
words of a text the corrections telescope.

**Words.** A word is a maximal run of characters that are not white space: punctuation belongs to the word it touches.
Its tokens are those whose text starts in it or in the white space before it; tokens of white space alone are counted
with the word they lead up to, and white space behind the last word with none. What is white space is decided token by
token: a character that the vocabulary spells in bytes (such as a no-break space) separates nothing, and a token that
spans two words makes one of them. Where the vocabulary writes no white space (WordPiece, or BPE that marks ends of
words), its own marks divide the words.

**What enters** depends on what the model has seen before a boundary. It is open where the last token ends in a letter
or a mark: then :math:`m` is added for the word that ends and subtracted for the next. It is closed at the start of the
text, behind a special token, and behind a token that ends in white space or in an end-of-word mark: then nothing is
left to account for. So the first word of a text has no denominator (a text that starts with white space instead is one
of the other outcomes), and a vocabulary that marks ends of words needs no correction. A word cut by the start of
the completion is a piece: what is known of its beginning stands in the prompt, and only its end is accounted for.
The last word ends, by definition, with the text.

**What the number promises.** The text distribution is the model's own distribution over strings of tokens, and the
event is that the next word is spelled by these tokens: for a model with exact next-token probabilities the value is
`Kind.EXACT`, just as the likelihood of a row is, of which it is a part. For the word as a string of characters, given
the same tokens before it, the value is a lower bound: the model also gives probability to other ways to cut the word
into tokens, and these are not summed. A word with the unknown token, and a word whose end is not accounted for (a
special token other than EOS follows), carry an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.models.encode import EncodedText

__all__ = [
    "WordScore",
    "WordSpan",
    "WordVocabulary",
    "beginning_of_word",
    "probes_for",
    "word_scores",
    "word_spans",
]


@dataclass(frozen=True, slots=True, eq=False)
class WordVocabulary:
    """What the tokens of one vocabulary say about the borders of words.

    Args:
        subset: (V,) bool, the tokens that end the word before them: they begin with white space or end the text.
        leading: tokens whose text begins with white space.
        blank: tokens of white space alone.
        closing: tokens that end in white space or in an end-of-word mark.
        special: tokens that are not text (BOS, EOS, padding, turns of a chat).
        unknown: the unknown token, which is text, but not which.
    """

    subset: Tensor
    leading: frozenset[int]
    blank: frozenset[int]
    closing: frozenset[int]
    special: frozenset[int]
    unknown: int | None

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> WordVocabulary:
        """The borders that `tokenizer` draws, for a model with `vocabulary` outputs.

        Each token is decoded behind a letter or digit, so that no decoder takes its white space for the start of a
        text; this holds for byte-level, metaspace, byte-fallback and WordPiece vocabularies alike.

        Raises:
            InputError: if the tokenizer gives no character offsets, or no token of it spells a letter or a digit.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError("the tokenizer gives no character offsets, so words are unknown; score tokens instead")
        names = {i: name for name, i in tokenizer.get_vocab().items()}
        texts = _token_texts(backend, names)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        unknown: int | None = tokenizer.unk_token_id if tokenizer.unk_token_id not in ends else None
        # Byte tokens may be registered as special, too; a token that is not text decodes to its own name.
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = {*tokenizer.all_special_ids, *(i for i in marked if texts.get(i) == names.get(i))} - {unknown}
        text = {i: text for i, text in texts.items() if text and i < vocabulary and i not in special}
        leading = {i for i, text in text.items() if text[0].isspace()}
        suffix = _end_of_word_suffix(backend)
        marks_end = {i for i in text if suffix and names[i].endswith(suffix)}
        subset = torch.zeros(vocabulary, dtype=torch.bool)
        subset[sorted(leading)] = True
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < vocabulary:
            subset[tokenizer.eos_token_id] = True
        return cls(
            subset=subset,
            leading=frozenset(leading),
            blank=frozenset(i for i in leading if text[i].isspace()),
            closing=frozenset(marks_end.union(i for i, text in text.items() if text[-1].isspace())),
            special=frozenset(special),
            unknown=unknown,
        )

    def is_open(self, text: EncodedText, index: int) -> bool:
        """Whether a word may still go on behind ``content[index]``; -1 is the start of the text."""
        return index >= 0 and text.content[index] not in self.special and text.content[index] not in self.closing


def beginning_of_word(tokenizer: Any, vocabulary: int) -> Tensor:
    """(V,) bool: which tokens begin with white space or end the text, and so end the word before them.

    Special tokens other than EOS, and ids without a token (padded embeddings), are False.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: V, the number of the model's outputs.
    """
    return WordVocabulary.of(tokenizer, vocabulary).subset


@dataclass(frozen=True, slots=True)
class WordSpan:
    """The tokens of one word and where the mass of ``WordVocabulary.subset`` enters.

    Args:
        text: the word, without the white space before it.
        begin: its first token in the row's `content`, white space before it included.
        end: behind its last token.
        opened: the mass predicted after this token is divided by; None where nothing is to be removed.
        closed: the mass predicted after this token is multiplied by; None where the word's end needs no mass.
        whole: whether the word begins here; False for the rest of a word that began in the prompt.
        ended: whether what follows (white space, the end of the text) ends the word.
    """

    text: str
    begin: int
    end: int
    opened: int | None
    closed: int | None
    whole: bool
    ended: bool


@dataclass(frozen=True, slots=True)
class WordScore:
    """One word of a completion.

    Args:
        text: the word, punctuation attached.
        log_prob: nats; None if one of its tokens was not scored.
        kind: what `log_prob` promises about the word as these tokens spell it.
        num_tokens: its tokens, those of the white space before it included.
        whole: False for the rest of a word that began in the prompt: a piece, given its beginning.
        corrected: whether `log_prob` accounts for the word's end, and for nothing of the end of the word before.
    """

    text: str
    log_prob: float | None
    kind: Kind
    num_tokens: int
    whole: bool
    corrected: bool

    @property
    def surprisal(self) -> float | None:
        """Bits: ``-log_prob / ln 2``."""
        return None if self.log_prob is None else -self.log_prob / math.log(2)


def word_spans(text: EncodedText, vocabulary: WordVocabulary) -> list[WordSpan]:
    """The words of the completion ``content[start:]``, in order; white space and special tokens are none."""
    spans: list[WordSpan] = []
    count = len(text.content)
    begin, has_text = text.start, False
    for i in range(text.start, count + 1):
        token = text.content[i] if i < count else None
        stops = token is None or token in vocabulary.special
        # With text of a word in hand there is a token before this one.
        if has_text and (stops or token in vocabulary.leading or text.content[i - 1] in vocabulary.closing):
            spans.append(_span(text, vocabulary, begin, i))
            begin, has_text = i, False
        if stops:
            begin, has_text = i + 1, False
        elif token not in vocabulary.blank:
            has_text = True
    return spans


def probes_for(text: EncodedText, vocabulary: WordVocabulary) -> tuple[int, ...]:
    """Indices i of `content`, ascending: `word_scores` needs the mass of the subset in the prediction after token i.

    The last one may be the row's last token, which nothing else needs the model to read.
    """
    spans = [span for span in word_spans(text, vocabulary) if span.begin >= text.scored_from]
    return tuple(sorted({i for span in spans for i in (span.opened, span.closed) if i is not None}))


def word_scores(
    text: EncodedText,
    vocabulary: WordVocabulary,
    terms: Sequence[float],
    masses: Sequence[float],
) -> list[WordScore]:
    r"""The words of the completion with :math:`\log p(w \mid c)` in nats; the module has the formula.

    One score per word of the completion, in order, so that they align with ``completion.split()`` where no word is cut
    or joined by a token. A value may exceed 0 by rounding only.

    Args:
        text: the row.
        vocabulary: of the model.
        terms: nats per content token, as `TokenScores.terms`.
        masses: log-mass of ``vocabulary.subset`` in the prediction after each token of `probes_for`, nats.

    Raises:
        ValueError: for terms or masses that do not fit the row.
    """
    probes = probes_for(text, vocabulary)
    if len(terms) != len(text.content) or len(masses) != len(probes):
        raise ValueError(
            f"expected {len(text.content)} terms and {len(probes)} masses, got {len(terms)} and {len(masses)}"
        )
    mass: dict[int | None, float] = {None: 0.0, **dict(zip(probes, masses, strict=True))}
    out = []
    for span in word_spans(text, vocabulary):
        tokens = text.content[span.begin : span.end]
        log_prob = None
        if span.begin >= text.scored_from:
            joint = math.fsum([*terms[span.begin : span.end], mass[span.closed]])
            # Where the word has probability 0 the condition may have it, too; the word stays impossible.
            log_prob = joint if joint == -math.inf else joint - mass[span.opened]
        is_bound = not span.ended or vocabulary.unknown in tokens
        kind = Kind.UPPER_BOUND if is_bound else Kind.EXACT
        corrected = span.ended and log_prob is not None
        out.append(WordScore(span.text, log_prob, kind, len(tokens), span.whole, corrected))
    return out


def _span(text: EncodedText, vocabulary: WordVocabulary, begin: int, end: int) -> WordSpan:
    """The word ``content[begin:end]``."""
    new = text.content[begin] in vocabulary.leading
    open_before, open_after = vocabulary.is_open(text, begin - 1), vocabulary.is_open(text, end - 1)
    ended = not open_after or end == len(text.content) or bool(vocabulary.subset[text.content[end]])
    return WordSpan(
        text="".join(text.pieces[begin:end]).strip(),
        begin=begin,
        end=end,
        opened=begin - 1 if open_before and new else None,
        closed=end - 1 if open_after and ended else None,
        whole=new or not open_before,
        ended=ended,
    )


def _end_of_word_suffix(backend: Tokenizer) -> str | None:
    """What the vocabulary writes behind a word's last token, if it marks ends (``</w>``)."""
    return getattr(backend.model, "end_of_word_suffix", None) or None


def _token_texts(backend: Tokenizer, names: dict[int, str]) -> dict[int, str]:
    """Text of each token as it stands behind a letter or digit; empty where it cannot be told apart."""
    suffix = _end_of_word_suffix(backend)
    for anchor in sorted(names):
        if suffix and names[anchor].endswith(suffix):
            continue  # it would put a space before the token
        head = backend.decode([anchor], skip_special_tokens=False)
        if head[-1:].isalnum():
            break
    else:
        raise InputError(
            "no token of the tokenizer spells a letter or a digit, so its words are unknown; score tokens instead"
        )
    ids = sorted(names)
    texts = backend.decode_batch([[anchor, i] for i in ids], skip_special_tokens=False)
    return {i: text[len(head) :] if text.startswith(head) else "" for i, text in zip(ids, texts, strict=True)}
