"""Tree attention: one row in which every token sees its own ancestors and nothing else.

Registered with transformers as an attention implementation of its own, it cuts the row into groups that share nothing,
puts the kept keys and values of the common path before them, builds the mask that is a group's tree, and calls the
implementation the model was loaded with. Sliding windows are masks by position, so they hold in a tree too. The rest
of the model runs on the packed row without padding.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loglik.models.last_layer import KeysAreKept, find_last_layer, reading
from loglik.models.trunk import Trunk

__all__ = ["IMPLEMENTATION", "KeyValuePath", "TreeRow", "tree_attention", "tree_hidden"]

IMPLEMENTATION = "loglik_tree"

# A CPU's attention kernel computes most of what is hidden: queries go in blocks, each over the keys up to its last one.
# From some length on the kernel is faster by itself, if no mask is needed to say who sees whom.
_CPU_QUERIES = 192
_CPU_CAUSAL = 768


class KeyValuePath:
    """Keys and values of one path from a root, layer by layer, in buffers that grow and whose end can be forgotten.

    Args:
        capacity: tokens to make room for at first.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self.capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extended(self, layer: int, prefix: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The first `prefix` tokens of the path and, written behind them, the new keys and values (1, H, N, D)."""
        end = prefix + key.shape[2]
        keys, values = self._room(layer, prefix, end, key, value)
        keys[:, :, prefix:end] = key
        values[:, :, prefix:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _room(self, layer: int, prefix: int, end: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        old = self._layers.get(layer)
        if old is not None and old[0].shape[2] >= end:
            return old
        # Layers ask for the same room one after the other: the first of them decides how much.
        self.capacity = max(self.capacity, end if old is None else max(end, 2 * old[0].shape[2]))
        new = (
            key.new_empty(1, key.shape[1], self.capacity, key.shape[3]),
            value.new_empty(1, value.shape[1], self.capacity, value.shape[3]),
        )
        if old is not None:
            new[0][:, :, :prefix] = old[0][:, :, :prefix]
            new[1][:, :, :prefix] = old[1][:, :, :prefix]
        self._layers[layer] = new
        return new


@dataclass(slots=True)
class TreeRow:
    """What tree attention has to know about one packed row of N tokens.

    Args:
        positions: (N,) depth of each token, the prefix counted.
        ends: (N,) column behind the last descendant of each token.
        groups: stretches of columns, in order, that see nothing of one another but the path.
        prefix: tokens of `path` that every token of the row sees.
        path: keys and values of the prefix; new ones are written behind them. None: no prefix, nothing is kept.
        keep: the first group's tokens that become part of the path: that group is they, and the others see them.
        read: (S,) columns, ascending, whose hidden states are wanted; layer `last` computes no others. None: all.
        last: index of the last layer, where some columns are not read.
        attend: the attention function of the model's own implementation.
        needs_mask: it is not causal of itself.
        windows: what each layer said of its sliding window.
    """

    positions: Tensor
    ends: Tensor
    groups: list[tuple[int, int]]
    prefix: int = 0
    path: KeyValuePath | None = None
    keep: int = 0
    read: Tensor | None = None
    last: int | None = None
    attend: Callable[..., Any] | None = None
    needs_mask: bool = False
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int, int | None], Tensor] = field(default_factory=dict)
    _chains: dict[tuple[int, int], bool] = field(default_factory=dict)
    _kept: tuple[Tensor, Tensor] | None = None

    @property
    def expected(self) -> int:
        """Queries of the next call: all columns, or in the last layer's second round those that are read."""
        return len(self.positions) if self._kept is None or self.read is None else len(self.read)

    def mask(self, begin: int, end: int, seen: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, n, seen + n) additive mask of a group behind `seen` tokens."""
        key = (begin, end, seen, window)
        if key not in self._masks:
            rows = torch.arange(begin, end, device=self.ends.device)
            self._masks[key] = self.mask_of(rows, begin, end, seen, window, dtype)
        return self._masks[key]

    def is_causal(self, begin: int, end: int, seen: int, window: int | None) -> bool:
        """Whether every token of a group sees all tokens before it, and the implementation needs no mask for that."""
        if (begin, end) not in self._chains:
            self._chains[begin, end] = bool((self.ends[begin:end] >= end).all())
        return self._chains[begin, end] and not self.needs_mask and (window is None or seen + end - begin <= window)

    def mask_of(self, rows: Tensor, begin: int, end: int, seen: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, s, seen + n) additive mask of some columns (s,) of a group."""
        device = rows.device
        columns = torch.arange(begin, end, device=device)
        visible = (columns[None, :] <= rows[:, None]) & (rows[:, None] < self.ends[None, begin:end])
        visible = torch.cat([visible.new_ones(len(rows), seen), visible], dim=1)
        if window is not None:
            before = torch.cat([torch.arange(seen, device=device), self.positions[begin:end]])
            visible &= self.positions[rows, None] - before[None, :] < window
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    loglik_tree: TreeRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row: query (1, H, N, D), key and value (1, H', N, D) to (1, N, H, D).

    Raises:
        RuntimeError: if the model did not hand the row's tree on to its layers.
    """
    tree = loglik_tree
    if tree is None or tree.attend is None or query.shape[0] != 1 or query.shape[2] != tree.expected:
        raise RuntimeError(f"{type(module).__name__} does not pass the tree of a packed row to its attention")
    if attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} has a mask of its own, which a tree would lose")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    tree.windows[layer] = kwargs.get("sliding_window")
    rows: Sequence[int] = range(len(tree.positions))
    if tree.read is not None and layer == tree.last:
        if tree._kept is None:
            tree._kept = (key, value)
            raise KeysAreKept
        key, value = tree._kept
        rows = tree.read.tolist()
    outputs = []
    seen, last = tree.prefix, 0
    for begin, end in tree.groups:
        keys, values = key[:, :, begin:end], value[:, :, begin:end]
        if tree.path is not None:
            # Behind the path there is room for one group at a time: the next one writes over it.
            keys, values = tree.path.extended(layer, seen, keys, values)
        first, last = last, bisect_left(rows, end)
        if last > first:
            group = (begin, end, seen)
            outputs += _attended(tree, module, query[:, :, first:last], keys, values, rows[first:last], group, kwargs)
        seen = tree.prefix + tree.keep
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _attended(
    tree: TreeRow,
    module: torch.nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[int],
    group: tuple[int, int, int],
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """What columns `rows` of a group (begin, end, tokens seen before it) attend to, (1, s, H, D) each."""
    begin, end, seen = group
    window, dtype = kwargs.get("sliding_window"), query.dtype
    count, on_cpu = len(rows), query.device.type == "cpu"
    assert tree.attend is not None
    if count == end - begin:
        long = count >= _CPU_CAUSAL or count <= _CPU_QUERIES if on_cpu else True
        if long and 8 * seen <= count and tree.is_causal(begin, end, seen, window):
            # The few tokens before the group ask too, and are not heard: so it takes no mask.
            padded = query if not seen else torch.nn.functional.pad(query, (0, 0, seen, 0))
            return [tree.attend(module, padded, keys, values, None, **kwargs)[0][:, seen:]]
        mask = tree.mask(begin, end, seen, window, dtype)
    else:
        mask = tree.mask_of(torch.as_tensor(rows, device=query.device), begin, end, seen, window, dtype)
    outputs = []
    height = _CPU_QUERIES if on_cpu else count
    for low in range(0, count, height):
        block = slice(low, low + height)
        stop = seen + rows[block][-1] + 1 - begin
        part = mask[:, :, block, :stop]
        outputs.append(
            tree.attend(module, query[:, :, block], keys[:, :, :stop], values[:, :, :stop], part, **kwargs)[0]
        )
    return outputs


AttentionInterface.register(IMPLEMENTATION, tree_attention)


def tree_hidden(trunk: Trunk, ids: Tensor, row: TreeRow) -> Tensor:
    """(N, D) last hidden states of a packed row of token ids (N,); differentiable where no path is kept.

    Where `row.read` leaves columns out, their states are NaN (0 while gradients are recorded).

    Raises:
        RuntimeError: if the architecture cannot: it takes no positions, or does not reach `tree_attention`.
    """
    inner = trunk.inner
    config = inner.config.get_text_config()
    own = config._attn_implementation
    row.needs_mask = own in (None, "eager")
    row.attend = lambda module, *args, **kwargs: _own_function(own, module)(module, *args, **kwargs)
    row.windows.clear()
    config._attn_implementation = IMPLEMENTATION
    try:
        with _narrowed(trunk, ids, row):
            hidden = trunk.hidden(
                input_ids=ids[None], position_ids=row.positions[None], use_cache=False, loglik_tree=row
            )
    finally:
        config._attn_implementation = own
    if not row.windows or hidden.shape[:2] != (1, len(ids)):
        raise RuntimeError(f"{type(inner).__name__} does not attend through transformers' attention interface")
    return hidden[0]


def _narrowed(trunk: Trunk, ids: Tensor, row: TreeRow) -> AbstractContextManager[None]:
    """The last layer restricted to what is read of a row, if anything is left out."""
    row.last = row._kept = None
    if row.read is None or len(row.read) == len(ids):
        return nullcontext()
    if len(row.read) == 0:  # keys and values are still wanted; no kernel likes to attend from nowhere
        row.read = row.positions.new_zeros(1)
    row.last = int(trunk.inner.config.get_text_config().num_hidden_layers) - 1
    layer = find_last_layer(trunk.inner, row.last + 1)
    if layer is None:
        raise RuntimeError(f"{type(trunk.inner).__name__} does not say which layer is its last")
    return reading(layer, len(ids), row.read)


def _own_function(name: str | None, module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function a layer would call under the implementation of this name."""
    if name in (None, "eager"):
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    # Kernels that take no mask cannot attend in a tree; PyTorch's own picks a kernel that can.
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return found
