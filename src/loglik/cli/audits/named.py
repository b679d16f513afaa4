"""Errors of the signals name rows by their number; here they get the name that the file gives them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loglik.errors import InputError, RowError

__all__ = ["finite_or_none", "named_rows"]


@contextmanager
def named_rows(names: Sequence[str]) -> Iterator[None]:
    """Turn ``query 3, candidate 1`` of a `RowError` into the name of the fourth row, and the rest.

    Args:
        names: of the rows that the call is given, in their order.

    Raises:
        InputError: in place of the `RowError`.
    """
    try:
        yield
    except RowError as error:
        found = re.match(r"(?:query|question|response|row) (\d+)(.*)", error.row or "", flags=re.DOTALL)
        known = found is not None and int(found[1]) < len(names)
        named = error.at(names[int(found[1])] + found[2]) if found is not None and known else error
        raise InputError(str(named)) from None


def finite_or_none(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON, which knows no infinite ones: None stands for a probability of 0."""
    return [value if math.isfinite(value) else None for value in values]
