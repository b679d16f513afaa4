"""The blocks of a causal transformer from outside: what each writes, and changing it on its way.

The stack is found by a forward pass, not by names: its blocks are called once each, and each reads what the one before
it wrote. The two parts of a block (attention, MLP) go by the names that architectures give them, and are used only if a
block without both hands its input on unchanged, so that nothing else writes to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loglik.errors import InputError
from loglik.models.tokens import widened
from loglik.models.trunk import evaluating, relative_difference

__all__ = ["BlockPart", "Blocks", "changed", "find_blocks"]

BlockPart = Literal["mlp", "attention", "residual"]
_NAMES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "fc2"),
}
_UNCHANGED = 1e-3  # relative difference up to which a block without its parts hands its input on


@dataclass(frozen=True)
class Blocks:
    """The blocks of a network.

    Args:
        model: with next-token distributions.
        network: its transformers model.
        layers: the blocks, in the order in which they are called.
    """

    model: Any
    network: Any
    layers: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def embedding(self) -> nn.Module:
        """What turns ids into embeddings."""
        module: nn.Module = self.network.get_input_embeddings()
        return module

    def parts(self, part: BlockPart) -> tuple[nn.Module, ...]:
        """The modules whose outputs are this part: the block itself for the residual stream behind it.

        Raises:
            InputError: for an unknown part, or blocks that do not have it by itself.
        """
        if part == "residual":
            return self.layers
        if part not in _NAMES:
            raise InputError(f"kind must be mlp, attention or residual, got {part!r}")
        found = self._named(part)
        written = [_child(layer, names) for names in _NAMES.values() for layer in self.layers]
        if not self._is_sum_of([module for module in written if module is not None]):
            raise InputError(
                f"blocks of {type(self.network).__name__} do not just add their attention and MLP to what they read: "
                "use the residual stream"
            )
        return found

    @torch.no_grad()
    def last_log_probs(self, ids: Tensor, *within: AbstractContextManager[Any]) -> Tensor:
        """(B, V) log-probabilities of the token after rows (B, T) of equal length, float32 or better, nats.

        Args:
            ids: (B, T).
            within: contexts of the forward pass, such as `changed`. The head runs outside of them.
        """
        trunk = getattr(self.model, "trunk", None)
        with evaluating(self.network):
            with ExitStack() as stack:
                for context in within:
                    stack.enter_context(context)
                if trunk is None:
                    logits = self.network(input_ids=ids, use_cache=False).logits[:, -1]
                else:
                    last = trunk.hidden(input_ids=ids, use_cache=False)[:, -1]
            if trunk is not None:
                logits = trunk.logits(last)
        return torch.log_softmax(widened(logits), -1)

    @contextmanager
    def cut(self, blocked: Tensor, layers: Tensor) -> Iterator[None]:
        """Within it, the last token's attention does not see some tokens, in some layers.

        Args:
            blocked: (T,) bool, the tokens that it does not see; one must be left.
            layers: (B, L) bool, where, for each row of the batch.

        Raises:
            InputError: for blocks without attention, or one that takes no mask of its own.
        """
        refusal = (
            f"the attention of {type(self.network).__name__} does not take a mask per layer: load it with eager or "
            "sdpa attention"
        )

        def hook(number: int) -> Callable[..., Any]:
            def mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if not bool(layers[:, number].any()):
                    return None
                states = next(v for v in [*args, kwargs.get("hidden_states")] if isinstance(v, Tensor))
                if "attention_mask" not in kwargs:
                    raise InputError(refusal)
                return args, kwargs | {
                    "attention_mask": _cut_mask(kwargs["attention_mask"], states, blocked, layers[:, number], refusal)
                }

            return mask

        modules = self._named("attention")
        handles = [module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def require_cuts(self) -> None:
        """Refuse a network whose attention pays no regard to `cut`: two texts with one last token must then be one.

        Raises:
            InputError: saying so.
        """
        ids = _probe(self.network).repeat(2, 1)
        ids[1, :-1] = ids[0, :-1].flip(0)
        earlier = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - 1
        everywhere = torch.ones(2, len(self), dtype=torch.bool, device=ids.device)
        one, other = self.last_log_probs(ids, self.cut(earlier, everywhere))
        if relative_difference(one, other) > _UNCHANGED:
            raise InputError(
                f"the last token of {type(self.network).__name__} sees others in more ways than by masked attention, "
                "so that it cannot be cut off: use another model"
            )

    def _named(self, part: Literal["mlp", "attention"]) -> tuple[nn.Module, ...]:
        found = []
        for number, layer in enumerate(self.layers):
            module = _child(layer, _NAMES[part])
            if module is None:
                raise InputError(
                    f"block {number} of {type(self.network).__name__} has no {part} that can be reached by itself: use "
                    "the residual stream, or another model"
                )
            found.append(module)
        return tuple(found)

    def _is_sum_of(self, written: Sequence[nn.Module]) -> bool:
        """Whether blocks hand on what they read once these modules write nothing."""
        ids = _probe(self.network)
        with evaluating(self.network), torch.no_grad(), ExitStack() as stack:
            stack.enter_context(changed(written, lambda _, states: torch.zeros_like(states)))
            read, wrote = stack.enter_context(_noted(self.layers))
            self.network(input_ids=ids, use_cache=False)
        return all(relative_difference(wrote[i][0], read[i][0]) < _UNCHANGED for i in range(len(self)))


def find_blocks(model: Any, method: str) -> Blocks:
    """The blocks of a causal language model of transformers.

    Args:
        model: with its network as `model.model`, as `CausalLM` has it.
        method: what needs them, for the error.

    Raises:
        InputError: for a model without blocks, or whose blocks are not a stack.
    """
    network: Any = getattr(model, "model", None)
    known = isinstance(network, nn.Module) and hasattr(network, "get_input_embeddings") and hasattr(network, "config")
    if not known or getattr(model, "layout", None) != "causal":
        raise InputError(
            f"{method} needs the blocks of a causal language model of transformers; {type(model).__name__} does not "
            "have them: use a model that does"
        )
    count = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    stacks = [tuple(m) for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    with evaluating(network), torch.no_grad():
        found = [layers for layers in stacks if _is_stack(network, layers)]
    if len(found) != 1:
        raise InputError(
            f"{method} needs blocks that follow each other, and {type(network).__name__} has no such stack"
        )
    return Blocks(model, network, found[0])


@contextmanager
def changed(
    modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor], *, length: int = 0
) -> Iterator[None]:
    """Within it, `change(number, states)` stands in for what each module writes.

    Args:
        modules: any; an output that is a tuple is changed in its first part.
        change: gets the module's number and (B, T, D) states.
        length: T, for modules that write (B * T, D); 0 takes states as they come.
    """

    def hook(number: int) -> Callable[..., Any]:
        def replace(_: nn.Module, __: Any, output: Any) -> Any:
            states = _states(output)
            seen = states.reshape(-1, length, states.shape[-1]) if length else states
            new = change(number, seen).reshape(states.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return replace

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noted(layers: Sequence[nn.Module]) -> Iterator[tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]]:
    """What each layer reads and writes in the forward passes within."""
    read: dict[int, list[Tensor]] = {i: [] for i in range(len(layers))}
    wrote: dict[int, list[Tensor]] = {i: [] for i in range(len(layers))}

    def hook(number: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
            read[number] += [value for value in given if isinstance(value, Tensor)][:1]
            if isinstance(output, Tensor) or (isinstance(output, tuple) and isinstance(output[0], Tensor)):
                wrote[number].append(_states(output))

        return note

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield read, wrote
    finally:
        for handle in handles:
            handle.remove()


def _is_stack(network: Any, layers: tuple[nn.Module, ...]) -> bool:
    """Whether each layer is called once, and reads what the one before it wrote."""
    ids = _probe(network)
    with _noted(layers) as (read, wrote):
        network(input_ids=ids, use_cache=False)
    if any(len(wrote[i]) != 1 or len(read[i]) != 1 or wrote[i][0].shape[:2] != ids.shape for i in range(len(layers))):
        return False
    return all(torch.equal(wrote[i][0], read[i + 1][0]) for i in range(len(layers) - 1))


def _cut_mask(mask: Tensor | None, states: Tensor, blocked: Tensor, rows: Tensor, refusal: str) -> Tensor:
    """(B, 1 or H, T, T) an attention mask, in the form in which it came, without the last token's blocked edges."""
    size, length = states.shape[:2]
    least = torch.finfo(states.dtype).min
    if mask is None:  # plain causal attention needs none
        later = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        mask = torch.zeros(1, 1, length, length, dtype=states.dtype, device=states.device).masked_fill(later, least)
    if mask.dim() != 4 or mask.shape[-2:] != (length, length):
        raise InputError(refusal)
    edges = torch.zeros(size, 1, length, length, dtype=torch.bool, device=states.device)
    edges[rows, 0, -1] = blocked
    return mask & ~edges if mask.dtype == torch.bool else torch.where(edges, torch.finfo(mask.dtype).min, mask)


def _probe(network: Any) -> Tensor:
    """(1, 5) ids of a short forward pass."""
    device = next(network.parameters()).device
    ids: Tensor = torch.arange(3, 8, device=device)[None] % network.config.get_text_config().vocab_size
    return ids


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _child(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((children[name] for name in names if name in children), None)
