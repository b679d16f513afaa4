"""Weights, gradients and optimizer state cut up over the processes of a run (torch's `fully_shard`, FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from loglik.errors import InputError
from loglik.models.causal import CausalLM
from loglik.models.paths import scaled_rope_start
from loglik.models.trunk import evaluating
from loglik.training.config import TrainConfig

__all__ = ["full", "full_state", "is_sharded", "like", "release", "shard", "wants_sharding", "whole"]


def wants_sharding(accelerator: Accelerator, config: TrainConfig) -> bool:
    """Whether this run shards: by its own setting, or because the launch asks for FSDP.

    Raises:
        InputError: for launches that cut weights up in another way.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"training does not run under {kind.value}: to shard weights, launch plain processes with shard=True "
            "(--shard), or FSDP version 2"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    asked = kind == DistributedType.FSDP
    if asked and getattr(plugin, "fsdp_version", 2) != 2:
        raise InputError("training shards by FSDP version 2: set fsdp_version: 2 in the launch configuration")
    return (asked or config.shard) and accelerator.num_processes > 1


def shard(model: Any, objective: Any, accelerator: Accelerator, config: TrainConfig) -> None:
    """Cut up the weights of the network of `model` in place: one group per transformer block, one for the rest.

    The arithmetic stays that of one process: a group is gathered in its own dtype before it runs and its gradients
    are averaged in that dtype.

    Raises:
        InputError: for models and objectives that can only be trained with whole weights.
    """
    if not isinstance(model, CausalLM):
        # Others run parts of their network by themselves, or more passes for one batch than for another: processes
        # would wait for each other for ever.
        raise InputError(f"only causal language models can be sharded, not {type(model).__name__}: leave shard out")
    if scaled_rope_start(model.model.config) is not None:
        raise InputError(
            "this model's rotary frequencies change with length, which takes another number of passes for long rows "
            "than for short ones: leave shard out"
        )
    if isinstance(objective, nn.Module):
        raise InputError(f"{type(objective).__name__} has weights of its own, which are not sharded: leave shard out")
    if config.precision == "fp16":
        raise InputError("sharded training runs in fp32 or bf16, not in fp16: choose precision='bf16'")
    if model.trunk is not None:  # what is found by trying is tried with whole weights, by every process alike
        model.forward_path()
    network = model.model
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": getattr(plugin, "cpu_offload", None) or OffloadPolicy(),
    }
    for block in _blocks(network):
        fully_shard(block, **settings)
    fully_shard(network, **settings)
    with evaluating(network), torch.no_grad():  # the first forward pass settles which module is the outermost
        ids = torch.ones(1, 2, dtype=torch.long, device=accelerator.device)
        network(input_ids=ids, attention_mask=ids, use_cache=False)
    release(network)


def is_sharded(network: Any) -> bool:
    """Whether `shard` has cut this network up."""
    return isinstance(network, FSDPModule)


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Every process holds all weights meanwhile, so that one of them can run the network by itself."""
    units = [unit for unit in network.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not network, recurse=False)
            unit.reshard()


def release(network: nn.Module) -> None:
    """Let go of what an evaluation has left gathered, so that the parameters are the optimizer's again."""
    for unit in network.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` cut up as `parameter` is, and on its device."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded network with whole tensors on the CPU, shared ones once in memory; every process asks."""
    found: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            found[id(tensor)] = full(tensor.detach()).cpu()
        state[name] = found[id(tensor)]
    return state


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts: what the architecture names as not to be split, else the members of its module lists."""
    named = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = [module for module in network.modules() if type(module).__name__ in named]
    if not blocks:
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = [member for found in lists for member in found]
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if id(block) not in inner and any(True for _ in block.parameters())]
