"""Whole texts as rows of tokens and as labelled log-likelihoods: what the signals on texts start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import EncodedText, TextEncoder
from loglik.models.protocol import TextModel
from loglik.models.trunk import evaluating

__all__ = [
    "inference_log_prob",
    "place_in_lists",
    "require_same_tokens",
    "require_text_lists",
    "text_batches",
    "text_log_probs",
    "text_rows",
    "text_tokens",
]


def text_rows(
    model: TextModel,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> TokenBatch:
    """Texts as rows of tokens, of which the text's own are scored, not those of the context before it.

    Where nothing stands before a text, BOS does (if there is one). With its true context a text is tokenised as it
    stands in the document.

    Args:
        model: a text model.
        texts: N texts.
        contexts: N texts that stand before them; none by default.
        names: what errors call the rows; ``row 0``, ``row 1``, ... by default.

    Raises:
        InputError: for no texts, one string instead of several, unequal numbers, or a model without a tokenizer.
        RowError: for a text that is empty, not Unicode, or longer than the model's context.
    """
    return _batch(_encoded(model, texts, contexts, names))


def text_batches(
    model: TextModel,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Iterator[TokenBatch]:
    """The rows of `text_rows` in their order, `batch_size` at a time; all are encoded before the first comes out.

    Args:
        model: as there.
        texts: as there.
        contexts: as there.
        names: as there.
        batch_size: rows per batch; the last one may have fewer.

    Raises:
        InputError: as there, or for a batch size below 1.
        RowError: as there.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    rows = _encoded(model, texts, contexts, names)
    return (_batch(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size))


def text_log_probs(
    model: Any,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 8,
    advance: Callable[[int], object] | None = None,
) -> LogLikelihood:
    """Log-likelihoods (N,) of whole texts under a model, read in batches, without gradient, on the CPU.

    Args:
        model: a text model.
        texts: as in `text_rows`.
        contexts: as there.
        names: as there.
        batch_size: rows per forward pass; the numbers do not depend on it.
        advance: told how many rows each batch had.

    Raises:
        InputError: as `text_batches`.
        RowError: as `text_rows`.
    """
    parts = []
    for batch in text_batches(model, texts, contexts, names=names, batch_size=batch_size):
        parts.append(inference_log_prob(model, batch).detach().to("cpu"))
        if advance is not None:
            advance(len(batch))
    return LogLikelihood.cat(parts)


def text_tokens(model: TextModel, texts: Sequence[str], *, names: Sequence[str] | None = None) -> list[list[int]]:
    """Tokens of texts of any length, without special ones: what n-grams are counted in.

    Args:
        model: whose tokenizer cuts the texts.
        texts: as in `text_rows`.
        names: as there.

    Raises:
        InputError: as there.
        RowError: for a text that is empty or not Unicode.
    """
    return [row.content for row in _encoded(model, texts, None, names, whole=False)]


def require_same_tokens(
    model: TextModel,
    other: TextModel,
    texts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    whose: str = "other",
) -> None:
    """Make sure that two models read the texts as the same tokens, as a difference of log-likelihoods per token needs.

    Raises:
        RowError: naming the first text that they cut differently.
    """
    first, second = (_encoded(each, texts, None, names) for each in (model, other))
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        if [*one.prefix, *one.content, *one.suffix] != [*two.prefix, *two.content, *two.suffix]:
            reason = f"the {whose} model cuts it into other tokens than the model: give one with the same tokenizer"
            raise RowError(reason, row=f"row {number}" if names is None else names[number])


def inference_log_prob(model: Any, batch: TokenBatch) -> LogLikelihood:
    """`log_prob` without gradient, and with the network (if there is one) in evaluation mode."""
    network = getattr(model, "model", None)
    with torch.no_grad(), evaluating(network) if isinstance(network, torch.nn.Module) else nullcontext():
        found: LogLikelihood = model.log_prob(batch)
    return found


def _encoded(
    model: TextModel,
    texts: Sequence[str],
    contexts: Sequence[str] | None,
    names: Sequence[str] | None,
    *,
    whole: bool = True,
) -> list[EncodedText]:
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts must be a sequence of one or more texts; give [text] for one")
    before = [""] * len(texts) if contexts is None else list(contexts)
    if len(before) != len(texts):
        raise InputError(f"{len(texts)} texts need as many contexts, got {len(before)}")
    if names is not None and len(names) != len(texts):
        raise InputError(f"{len(texts)} texts need as many names, got {len(names)}")
    encoder = TextEncoder(model.tokenizer, layout=model.layout)
    rows = []
    for number, row in enumerate(encoder.encode_all(list(zip(before, texts, strict=True)))):
        name = f"row {number}" if names is None else names[number]
        if isinstance(row, RowError):
            raise row.at(name)
        if whole and model.max_length is not None and row.length > model.max_length:
            reason = f"has {row.length:,} tokens and the model a context of {model.max_length:,}: cut it into pieces"
            raise RowError(reason, row=name)
        rows.append(row)
    return rows


def _batch(rows: Sequence[EncodedText]) -> TokenBatch:
    return TokenBatch.from_lists(
        [[*row.prefix, *row.content, *row.suffix] for row in rows],
        starts=[len(row.prefix) + row.start for row in rows],
        scored_from=[len(row.prefix) + row.scored_from for row in rows],
    )


def require_text_lists(heads: Sequence[str], lists: Sequence[Sequence[str]], *, head: str, item: str) -> None:
    """Refuse anything but N texts with a list of texts each, none of them empty.

    Args:
        heads: N texts, such as queries.
        lists: of each, such as its candidates.
        head: what a text is called, such as ``query``.
        item: what a text of its list is called.

    Raises:
        InputError: for numbers that do not pair.
        RowError: naming the text that is empty, has no list, or has an empty one in it.
    """
    if isinstance(heads, str) or isinstance(lists, str) or len(heads) != len(lists) or not len(heads):
        several = {"query": "queries"}.get(head, f"{head}s")
        raise InputError(f"{several} and lists of {item}s must pair: got {len(heads)} and {len(lists)}")
    for number, (text, found) in enumerate(zip(heads, lists, strict=True)):
        row = f"{head} {number}"
        if not isinstance(text, str) or not text.strip():
            raise RowError("is empty: fill it or leave it out", row=row)
        if isinstance(found, str) or not len(found):
            raise RowError(f"has no {item}s: give a list of at least one text", row=row)
        for place, one in enumerate(found):
            if not isinstance(one, str) or not one.strip():
                raise RowError(f"{item} {place} must be a text that is not empty, got {one!r}", row=row)


def place_in_lists(row: str | None, counts: Sequence[int], *, head: str, item: str) -> str:
    """What ``row 7`` of lists in one line is: ``query 2, candidate 1``.

    Args:
        row: as an error names it.
        counts: how long each list is.
        head: what a list belongs to.
        item: what is in it.
    """
    left = int((row or "row 0").split()[-1])
    for number, count in enumerate(counts):
        if left < count:
            return f"{head} {number}, {item} {left}"
        left -= count
    return str(row)
