"""Token weights from what is known about the text: spans that matter, and places where two completions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["diff_mask", "weights_from_spans"]


def weights_from_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, float]], *, default: float = 1.0
) -> Tensor:
    """Weights (T,) of tokens by the spans of characters that they overlap, float32.

    A token that overlaps several spans has the largest of their weights; one that overlaps none, or stands for no
    characters (a special token), has `default`.

    Args:
        offsets: first character of each of T tokens, and one past its last, as tokenizers give them.
        spans: first character, one past the last, and weight.
        default: weight of the other tokens.

    Raises:
        InputError: naming a span that is empty or whose weight is negative or not finite.
    """
    if not 0 <= default < math.inf:
        raise InputError(f"weights_from_spans: default must be finite and at least 0, got {default}")
    for number, (first, end, weight) in enumerate(spans):
        if not (0 <= first < end and 0 <= weight < math.inf):
            raise InputError(
                f"weights_from_spans: span {number} ({first}, {end}, {weight}) must be (first, end, weight) with "
                "0 <= first < end and a finite weight of at least 0"
            )
    return torch.tensor(
        [
            max((w for first, end, w in spans if start < stop and start < end and first < stop), default=default)
            for start, stop in offsets
        ],
        dtype=torch.float32,
    )


def diff_mask(
    chosen_ids: Sequence[int] | Tensor, rejected_ids: Sequence[int] | Tensor, *, align: bool = False
) -> tuple[Tensor, Tensor]:
    """Which tokens of two completions differ: bool (T,) for the chosen one and (T',) for the rejected one.

    Args:
        chosen_ids: (T,) tokens of the chosen completion, without its prompt.
        rejected_ids: (T',) tokens of the rejected completion.
        align: False compares position by position up to the shorter length, as TAB-PO does: after an insertion
            everything counts as different, and what only the longer one has does not. True aligns both first and marks
            every token that has no equal on the other side.
    """
    left, right = ([int(token) for token in ids] for ids in (chosen_ids, rejected_ids))
    masks = torch.zeros(len(left), dtype=torch.bool), torch.zeros(len(right), dtype=torch.bool)
    if align:
        for tag, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
            masks[0][a:b], masks[1][c:d] = tag != "equal", tag != "equal"
        return masks
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        masks[0][position] = masks[1][position] = one != other
    return masks
