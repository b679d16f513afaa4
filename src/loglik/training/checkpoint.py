"""Checkpoints without pickle: weights and optimizer state as safetensors, the rest as JSON, complete or absent.

Of a network with frozen weights (an adapter's base), only what is trained is written.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from loglik.errors import InputError
from loglik.training.sharding import full, like

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_STATE = "state.json"


def save_checkpoint(
    directory: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    write: bool = True,
) -> Path:
    """Write ``checkpoint-<step>`` under `directory`, visible only once complete; remove all but the `keep` newest.

    Sharded tensors are gathered, for which every process must call; `write` says which of them writes.
    """
    final = directory / f"checkpoint-{state['step']:08d}"
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in _trained(module).items()}
    weights = {name: _stored(parameter) for parameter, name in names.items()}
    weights |= {f"buffer:{name}": buffer.contiguous() for name, buffer in module.named_buffers()}
    slots: dict[str, torch.Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for slot, value in entries.items():
            slots[f"{names[parameter]}:{slot}"] = _stored(torch.as_tensor(value))
    if not write:
        return final
    partial = directory / f".partial-{state['step']:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights, partial / "weights.safetensors")
    save_file(slots, partial / "optimizer.safetensors")
    (partial / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in partial.iterdir():  # on disk before the name appears
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in sorted(directory.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = [path for path in sorted(directory.glob("checkpoint-*")) if (path / _STATE).is_file()]
    return complete[-1] if complete else None


def load_checkpoint(path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimizer in place; returns the saved state.

    Raises:
        InputError: for a damaged checkpoint, or one of another architecture.
    """
    try:
        weights = load_file(path / "weights.safetensors")
        slots = load_file(path / "optimizer.safetensors")
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); remove it to resume from an older one") from None
    parameters = _trained(module)
    wanted = set(parameters) | {f"buffer:{name}" for name, _ in module.named_buffers()}
    shapes_differ = any(n in weights and weights[n].shape != p.shape for n, p in parameters.items())
    if set(weights) != wanted or shapes_differ:
        raise InputError(f"checkpoint {path} belongs to another architecture; give its own model or another output")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(weights[name], parameter))
        for name, buffer in module.named_buffers():
            buffer.copy_(weights[f"buffer:{name}"])
    for key, value in slots.items():
        name, slot = key.rsplit(":", 1)
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value if slot == "step" else like(value, parameter)
    return state


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    found = full(tensor.detach())
    return (found.cpu() if found is not tensor else found).contiguous()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
