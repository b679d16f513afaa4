"""`TokenBatch`: token sequences with what is real, what is scored and where the completion starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["TokenBatch"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """B token sequences, prompt and completion in one row; padding may stand anywhere.

    Args:
        ids: (B, T) token ids; the value under padding is ignored.
        attention_mask: (B, T) bool, True where a token is real. A token that is not real does not exist: models see
            each row without it, so the side and the amount of padding change nothing.
        scored_mask: (B, T) bool, True where the token's log-probability is asked for.
        starts: (B,) column of the first completion token; an encoder-decoder encodes what stands before it and
            decodes the rest. None: the first scored column.
        words: (B, T) which word of its text each token belongs to, -1 for none; only methods about words ask for it.
        groups: (B,) ascending numbers; neighbours of one group begin with the same tokens (completions of one prompt),
            which a model may compute once. Values do not depend on it.
    """

    ids: Tensor
    attention_mask: Tensor
    scored_mask: Tensor
    starts: Tensor | None = None
    words: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2:
            raise ValueError(f"ids must have shape (B, T), got {tuple(self.ids.shape)}")
        for name in ("attention_mask", "scored_mask"):
            mask = getattr(self, name)
            if mask.shape != self.ids.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"{name} must be bool of shape {tuple(self.ids.shape)}, got {mask.dtype} {tuple(mask.shape)}"
                )
        for name in ("starts", "groups"):
            rows = getattr(self, name)
            if rows is not None and rows.shape != self.ids.shape[:1]:
                raise ValueError(f"{name} must have shape ({self.ids.shape[0]},), got {tuple(rows.shape)}")
        if self.words is not None and self.words.shape != self.ids.shape:
            raise ValueError(f"words must have shape {tuple(self.ids.shape)}, got {tuple(self.words.shape)}")

    @classmethod
    def from_lists(
        cls,
        rows: Sequence[Sequence[int]],
        *,
        starts: Sequence[int] | None = None,
        scored_from: Sequence[int] | None = None,
        words: Sequence[Sequence[int]] | None = None,
        groups: Sequence[int] | None = None,
        padding_side: Literal["left", "right"] = "right",
        pad_id: int = 0,
    ) -> TokenBatch:
        """Rows of token ids; `starts` is where each completion begins, and scoring begins at `scored_from`.

        Both count from the row's first token. Without `scored_from` the completion is scored from its start; without
        either, everything but the first token is.
        """
        starts_ = list(starts) if starts is not None else [0] * len(rows)
        default = starts_ if starts is not None else [1] * len(rows)
        scored_ = list(scored_from) if scored_from is not None else default
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        scored = torch.zeros_like(real)
        shifts = [width - len(row) if padding_side == "left" else 0 for row in rows]
        for i, (row, shift) in enumerate(zip(rows, shifts, strict=True)):
            end = shift + len(row)
            ids[i, shift:end] = torch.as_tensor(row, dtype=torch.long)
            real[i, shift:end] = True
            scored[i, shift + scored_[i] : end] = True
        spans = torch.full_like(ids, -1) if words is not None else None
        if spans is not None and words is not None:
            for i, (row, shift) in enumerate(zip(words, shifts, strict=True)):
                spans[i, shift : shift + len(row)] = torch.as_tensor(row, dtype=torch.long)
        columns = torch.tensor([s + shift for s, shift in zip(starts_, shifts, strict=True)], dtype=torch.long)
        owners = None if groups is None else torch.as_tensor(groups, dtype=torch.long)
        return cls(ids, real, scored, columns, spans, owners)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same on another device."""
        moved = (None if part is None else part.to(device) for part in (self.starts, self.words, self.groups))
        return TokenBatch(self.ids.to(device), self.attention_mask.to(device), self.scored_mask.to(device), *moved)

    def completion_starts(self) -> Tensor:
        """(B,) column of the first completion token: `starts`, or else the first scored column (T if none)."""
        if self.starts is not None:
            return self.starts
        width = self.ids.shape[1]
        return torch.where(self.scored_mask.any(1), self.scored_mask.int().argmax(1), width)

    def require_context(self) -> None:
        """Refuse left-aligned rows whose first token is scored: nothing stands before it.

        Raises:
            ValueError: naming the first such row.
        """
        if bool(self.scored_mask[:, :1].any()):
            row = int(self.scored_mask[:, 0].nonzero()[0])
            raise ValueError(f"row {row}: the first token cannot be scored, nothing stands before it; prepend BOS")

    def prefix_lengths(self) -> Tensor:
        """(B,) real tokens of each row, none of which may be empty.

        Raises:
            ValueError: if a row has no token to condition on.
        """
        lengths = self.attention_mask.sum(1)
        if bool((lengths == 0).any()):
            raise ValueError("a prefix is empty; give BOS or a prompt to condition on")
        return lengths

    def packed_left(self) -> tuple[TokenBatch, Tensor]:
        """The rows without their padding, aligned left, and (B, T') the column each token came from.

        Columns after a row's last token are padding; their origin is 0 and their masks are False.
        """
        lengths = self.attention_mask.sum(1)
        width = int(lengths.max()) if len(self) else 0
        # A stable sort brings the real tokens to the front and keeps their order.
        origin = (~self.attention_mask).int().argsort(dim=1, stable=True)[:, :width]
        real = torch.arange(width, device=self.ids.device) < lengths[:, None]
        origin = origin.masked_fill(~real, 0)
        starts = self.completion_starts()
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        moved = (self.attention_mask & (columns < starts[:, None])).sum(1)
        packed = TokenBatch(
            self.ids.gather(1, origin).masked_fill(~real, 0),
            real,
            self.scored_mask.gather(1, origin) & real,
            moved,
            None if self.words is None else self.words.gather(1, origin).masked_fill(~real, -1),
            self.groups,
        )
        return packed, origin

    def unpack(self, values: Tensor, origin: Tensor, packed: TokenBatch) -> Tensor:
        """Scatter (B, T') values of `packed` back to this batch's (B, T) columns; 0 elsewhere."""
        out = torch.zeros(self.ids.shape, dtype=values.dtype, device=values.device)
        # Padding columns all point at column 0: adding zeros there leaves its own value alone.
        return out.scatter_add(1, origin, values.masked_fill(~packed.attention_mask, 0.0))
