"""The last layer only where its states are read.

Of the last layer, tokens that nobody reads need their keys and values and nothing else. The layer is therefore entered
twice: over all tokens as far as its attention, which keeps keys and values, and over the tokens that are read for the
rest. Its output is put back into a row of all tokens, so that what stands behind it sees the shape it expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KeysAreKept", "find_last_layer", "reading"]


class KeysAreKept(Exception):  # noqa: N818 - a signal, caught where it is expected
    """Raised by the attention of a layer that has nothing more to do than to keep keys and values."""


def find_last_layer(transformer: nn.Module, num_layers: int) -> nn.Module | None:
    """The last of a stack of layers with attention; None where no stack, or more than one, looks like that."""
    found = [
        stack[-1]
        for stack in transformer.modules()
        if isinstance(stack, nn.ModuleList)
        and len(stack) == num_layers
        and any(getattr(module, "layer_idx", None) == num_layers - 1 for module in stack[-1].modules())
    ]
    return found[0] if len(found) == 1 else None


@contextmanager
def reading(layer: nn.Module, size: int, read: Tensor) -> Iterator[None]:
    """Within it, the layer computes `read` (S,) of the `size` tokens of a packed row (1, size, D).

    Its other outputs are NaN, which no reader takes for a number; where gradients flow they are 0, because NaN would
    reach them.
    """

    def narrowed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            module.forward(*args, **kwargs)
        except KeysAreKept:
            return _pick(args, size, read), {name: _pick(value, size, read) for name, value in kwargs.items()}
        raise RuntimeError(f"{type(module).__name__} does not reach its attention")

    def widened(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_put(output[0], size, read), *output[1:])
        return _put(output, size, read)

    handles = (
        layer.register_forward_pre_hook(narrowed, with_kwargs=True),
        layer.register_forward_hook(widened, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pick(value: Any, size: int, read: Tensor) -> Any:
    """Rows of a tensor with one row per token, within a batch of one or without; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_pick(part, size, read) for part in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape[0] == size:
        return value[read]
    return value[:, read] if value.ndim > 1 and value.shape[:2] == (1, size) else value


def _put(states: Tensor, size: int, read: Tensor) -> Tensor:
    """(1, S, D) states in a row of `size`."""
    if states.shape[:2] != (1, len(read)):
        raise RuntimeError("the last layer gave other tokens than were asked for")
    fill = 0.0 if torch.is_grad_enabled() else torch.nan
    return states.new_full((1, size, states.shape[2]), fill).index_copy(1, read, states)
