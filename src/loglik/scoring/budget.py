"""How much one forward pass may hold: found from the device and the model unless it is set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from loglik.errors import InputError
from loglik.models.protocol import TextModel

__all__ = ["Budget", "cache_bytes_per_token"]

# Tokens whose activations stay in a CPU's caches while its matrix products still run at full speed.
_CPU_TOKENS = 1024
_GPU_TOKENS = 8192
# Part of the free memory that keys and values may take.
_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of the engine.

    Args:
        max_batch_tokens: tokens of a forward pass, padding included where there is any; by device if None.
        max_cache_bytes: bytes of keys and values alive at once; a quarter of the free memory if None.
        pack_tokens: `max_batch_tokens` after `resolved`.
        cache_tokens: `max_cache_bytes` in tokens of the model after `resolved`; None if the model keeps no keys.
    """

    max_batch_tokens: int | None = None
    max_cache_bytes: int | None = None
    pack_tokens: int = _CPU_TOKENS
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")

    def resolved(self, model: TextModel) -> Budget:
        """The same with what was left open filled in for a model where it is."""
        device = torch.device(getattr(model, "device", "cpu"))
        tokens = self.max_batch_tokens or (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS)
        per_token = cache_bytes_per_token(model)
        if per_token is None:
            return replace(self, pack_tokens=tokens)
        space = self.max_cache_bytes if self.max_cache_bytes is not None else int(_SHARE * _free_bytes(device))
        return replace(self, pack_tokens=tokens, cache_tokens=space // per_token)


def cache_bytes_per_token(model: Any) -> int | None:
    """Bytes of keys and values that one token takes in all layers, from the configuration; None if it says nothing."""
    network = getattr(model, "model", None)
    config = getattr(network, "config", None)
    if network is None or config is None:
        return None
    text = config.get_text_config()
    layers, heads = getattr(text, "num_hidden_layers", None), _most(text, "num_attention_heads")
    if not layers or not heads:
        return None
    head = _most(text, "head_dim") or text.hidden_size // heads
    groups = _most(text, "num_key_value_heads") or heads
    return 2 * int(layers) * int(groups) * int(head) * int(network.dtype.itemsize)


def _most(config: Any, name: str) -> int | None:
    """A number of the configuration; the largest of them where it differs by layer."""
    try:
        value: int | None = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one number for all layers
        layers = range(config.num_hidden_layers)
        return max(int(getattr(config.per_layer_config[i], name, None) or 0) for i in layers) or None
    return value


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
