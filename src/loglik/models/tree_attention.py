"""Tree attention: one row in which every token sees its own ancestors and nothing else.

Registered with transformers as an attention implementation of its own, it cuts the row into groups that share nothing,
puts the kept keys and values of the common path before them, builds the mask that is a group's tree, and calls the
implementation the model was loaded with. Sliding windows are masks by position, so they hold in a tree too. The rest
of the model runs on the packed row without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loglik.models.trunk import Trunk

__all__ = ["IMPLEMENTATION", "KeyValuePath", "TreeRow", "tree_attention", "tree_hidden"]

IMPLEMENTATION = "loglik_tree"


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
    attend: Callable[..., Any] | None = None
    needs_mask: bool = False
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, begin: int, end: int, seen: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(1, 1, n, seen + n) additive mask of a group behind `seen` tokens; None where it is plain causal."""
        key = (begin, end, seen, window)
        if key not in self._masks:
            self._masks[key] = self._mask(begin, end, seen, window, dtype)
        return self._masks[key]

    def _mask(self, begin: int, end: int, seen: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        ends, positions = self.ends[begin:end], self.positions[begin:end]
        is_chain = bool((ends >= end).all())
        if is_chain and not seen and not self.needs_mask and (window is None or end - begin <= window):
            return None
        columns = torch.arange(begin, end, device=ends.device)
        visible = (columns[None, :] <= columns[:, None]) & (columns[:, None] < ends[None, :])
        before = torch.arange(seen, device=ends.device)
        visible = torch.cat([visible.new_ones(end - begin, seen), visible], dim=1)
        if window is not None:
            visible &= positions[:, None] - torch.cat([before, positions])[None, :] < window
        mask = torch.zeros(visible.shape, dtype=dtype, device=ends.device)
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
    if tree is None or tree.attend is None or query.shape[0] != 1 or query.shape[2] != len(tree.positions):
        raise RuntimeError(f"{type(module).__name__} does not pass the tree of a packed row to its attention")
    if attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} has a mask of its own, which a tree would lose")
    window = kwargs.get("sliding_window")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    tree.windows[layer] = window
    outputs = []
    seen = tree.prefix
    for begin, end in tree.groups:
        keys, values = key[:, :, begin:end], value[:, :, begin:end]
        if tree.path is not None:
            # Behind the path there is room for one group at a time: the next one writes over it.
            keys, values = tree.path.extended(layer, seen, keys, values)
        mask = tree.mask(begin, end, seen, window, query.dtype)
        outputs.append(tree.attend(module, query[:, :, begin:end], keys, values, mask, **kwargs)[0])
        seen = tree.prefix + tree.keep
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


AttentionInterface.register(IMPLEMENTATION, tree_attention)


def tree_hidden(trunk: Trunk, ids: Tensor, row: TreeRow) -> Tensor:
    """(N, D) last hidden states of a packed row of token ids (N,); differentiable where no path is kept.

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
        hidden = trunk.hidden(input_ids=ids[None], position_ids=row.positions[None], use_cache=False, loglik_tree=row)
    finally:
        config._attn_implementation = own
    if not row.windows or hidden.shape[:2] != (1, len(ids)):
        raise RuntimeError(f"{type(inner).__name__} does not attend through transformers' attention interface")
    return hidden[0]


def _own_function(name: str | None, module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function a layer would call under the implementation of this name."""
    if name in (None, "eager"):
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    # Kernels that take no mask cannot attend in a tree; PyTorch's own picks a kernel that can.
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return found
