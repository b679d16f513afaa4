"""A data set of texts as one stream of tokens, under a tokenizer or as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loglik.errors import InputError, RowError
from loglik.models.encode import check_text
from loglik.models.load import EMBEDDED, embedded_directory, load_tokenizer

__all__ = ["TokenData", "read_tokenizer", "token_data"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """A data set as one stream of tokens.

    Args:
        ids: (N,) tokens; each text ends with the separator.
        vocabulary: number of tokens that there are, the separator included.
        separator: the token behind each text, which also stands before each window.
        num_bytes: UTF-8 bytes of the texts, without separators.
    """

    ids: NDArray[np.int64]
    vocabulary: int
    separator: int
    num_bytes: int


def token_data(texts: Sequence[str], tokenizer: Any = None, *, names: Sequence[str] | None = None) -> TokenData:
    """Texts as one stream of tokens.

    Args:
        texts: in their order.
        tokenizer: of transformers; None for the bytes of UTF-8.
        names: what errors call the texts; ``row 0``, ``row 1``, ... by default.

    Raises:
        InputError: for no texts.
        RowError: for a text that is empty or not Unicode.
    """
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts must be several texts, at least one, and not one string")
    separator = 256 if tokenizer is None else len(tokenizer)
    parts: list[list[int]] = []
    for number, text in enumerate(texts):
        name = f"row {number}" if names is None else names[number]
        if not text:
            raise RowError("the text is empty: leave it out", row=name)
        try:
            check_text(text, "text")
        except RowError as error:
            raise error.at(name) from None
        ids = list(text.encode()) if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
        parts.append([*ids, separator])
    stream = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    return TokenData(stream, separator + 1, separator, sum(len(text.encode()) for text in texts))


def read_tokenizer(name: str) -> Any:
    """The tokenizer of an embedded model or of a folder; None for ``bytes``.

    Raises:
        InputError: for a folder without one.
    """
    if name == "bytes":
        return None
    where = embedded_directory(name) if name in EMBEDDED else Path(name)
    found = load_tokenizer(str(where), is_local=True, revision=None)
    if found is None:
        raise InputError(f"there is no tokenizer in {name}: give bytes, tiny, or a folder that holds one")
    return found
