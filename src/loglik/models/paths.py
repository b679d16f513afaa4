"""Which forward passes a causal model can do: each is tried on a small tree and compared with plain forward passes.

`packed`: tree attention in one unpadded row. `cached`: keys and values (or states) of shared beginnings are kept and
repeated over the continuations of a padded batch. `padded`: every sequence whole, in batches of similar length. A path
that gives other numbers than the plain forward, or none, is not taken, and the reason is kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, chain, pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from loglik.models.tree_attention import KeyValuePath, TreeRow, tree_hidden
from loglik.models.trunk import Trunk, evaluating, relative_difference

__all__ = ["ForwardPath", "PathReport", "cached_hidden", "find_path", "scaled_rope_start"]

ForwardPath = Literal["packed", "cached", "padded"]

# A prefix of three tokens with two branches, the first of which branches again.
_PREFIX = [3, 5, 4]
_BRANCHES = [[6, 7, 8, 3], [6, 7, 4], [8, 5, 9, 9, 3]]
_LONGEST = len(_PREFIX) + max(map(len, _BRANCHES))


@dataclass(frozen=True, slots=True)
class PathReport:
    """The path that was chosen, and what spoke against the faster ones.

    Args:
        path: of the forward passes.
        difference: from plain forward passes on the trial, relative to the largest hidden value.
        refused: reason for each faster path that was not taken.
        narrows: a packed row's last layer may be computed only where it is read.
    """

    path: ForwardPath
    difference: float
    refused: dict[str, str]
    narrows: bool = False

    def describe(self) -> str:
        """One phrase for a summary."""
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.path} (checked against plain forward passes)" + (f"; {why}" if why else "")


def cached_hidden(trunk: Trunk, ids: Tensor, cache: Any, *, repeat: int = 1) -> tuple[Tensor, Any]:
    """(B, T, D) hidden states of `ids` (B, T) behind a cache of one row, which is left alone; and the longer cache.

    Args:
        trunk: of the model.
        ids: continuations; padding stands on the right, and only a batch of one without padding gives a usable cache.
        cache: of the tokens before them, from an earlier call; None at the beginning.
        repeat: rows to repeat the cache over; B.
    """
    if cache is None:
        cache = DynamicCache(config=trunk.inner.config)
    else:
        cache = copy.deepcopy(cache)
        if repeat > 1:
            cache.batch_repeat_interleave(repeat)
    # State-space models have a name of their own for it.
    name = "cache_params" if "cache_params" in signature(trunk.inner.forward).parameters else "past_key_values"
    return trunk.hidden(input_ids=ids, use_cache=True, **{name: cache}), cache


@torch.no_grad()
def find_path(trunk: Trunk, wanted: ForwardPath | None = None) -> PathReport:
    """The fastest path that gives this model's own numbers, or whether the wanted one does.

    Raises:
        ValueError: if the wanted path is not possible, with the reason; or if the network is not causal.
    """
    refused: dict[str, str] = {}
    config = trunk.inner.config.get_text_config()
    if (getattr(config, "max_position_embeddings", None) or _LONGEST) < _LONGEST:
        if wanted in ("packed", "cached"):
            raise ValueError(f"this model cannot run {wanted} passes: its context is too short to try them")
        return PathReport("padded", 0.0, {"packed": "its context is too short to try it"})
    with evaluating(trunk.model):
        expected = _plain(trunk)
        for path, attempt in (("packed", _packed), ("cached", _cached)):
            if wanted not in (None, path):
                continue
            reason = _objection(trunk, path)
            difference = 0.0
            if reason is None:
                try:
                    difference = max(map(relative_difference, attempt(trunk), expected))
                    if difference > _tolerance(expected[0].dtype):
                        reason = f"its values differ by {difference:.1e}"
                except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError) as error:
                    reason = f"the architecture refuses it ({_first_line(error)})"
            if reason is None:
                if path == "packed":
                    return PathReport("packed", difference, refused, _narrows(trunk, expected))
                return PathReport("cached", difference, refused)
            refused[path] = reason
    if wanted in ("packed", "cached"):
        raise ValueError(f"this model cannot run {wanted} passes: {refused[wanted]}")
    return PathReport("padded", 0.0, refused)


def scaled_rope_start(config: Any) -> int | None:
    """Length from which rotary frequencies depend on the length of the whole row; None if they never do."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parameters = getattr(text, "rope_parameters", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for group in groups:
        if group.get("rope_type") in ("dynamic", "longrope"):
            known = group.get("original_max_position_embeddings")
            return int(known or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings)
    return None


def _objection(trunk: Trunk, path: str) -> str | None:
    """What is known to break a path where a short trial would not show it."""
    config = trunk.inner.config.get_text_config()
    start = scaled_rope_start(config)
    if start is not None and start < (getattr(config, "max_position_embeddings", None) or start):
        return "its rotary frequencies depend on the length of the whole row"
    if path == "packed" and getattr(config, "attention_chunk_size", None):
        return "its attention is cut into chunks by absolute position"
    return None


def _plain(trunk: Trunk) -> list[Tensor]:
    """Hidden states of each branch after the prefix, one whole sequence per forward pass.

    Raises:
        ValueError: if those of the prefix depend on what follows it.
    """
    depth = len(_PREFIX)
    found = [trunk.hidden(input_ids=_ids(trunk, [_PREFIX + b]), use_cache=False)[0, depth:] for b in _BRANCHES]
    first = _BRANCHES[0]
    one, other = (
        trunk.hidden(input_ids=_ids(trunk, [_PREFIX + branch]), use_cache=False)[0, :depth]
        for branch in (first, [token + 1 for token in first])
    )
    # Weights that are not finite are the scored row's error, not this one's.
    if bool(torch.isfinite(one).all()) and relative_difference(other, one) > _leak(trunk, one.dtype):
        raise ValueError("the predictions of this network depend on later tokens: it is no causal language model")
    return found


def _leak(trunk: Trunk, dtype: torch.dtype) -> float:
    """How much states may move when only tokens change that they must not see, in passes of the same shape.

    Not at all, in any precision: unless experts share out the tokens, so that the shapes of their products change.
    """
    config = trunk.inner.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return _tolerance(dtype) if any(getattr(config, name, None) for name in names) else 1e-5


def _ids(trunk: Trunk, ids: list[Any]) -> Tensor:
    """Token ids of the trial, folded into a vocabulary that is smaller."""
    vocabulary = trunk.inner.config.get_text_config().vocab_size
    folded: Tensor = torch.tensor(ids, device=trunk.model.device) % vocabulary
    return folded


_TREE = [*_BRANCHES[0], _BRANCHES[1][2], *_BRANCHES[2]]


def _under(trunk: Trunk, read: list[int] | None = None) -> TreeRow:
    """The branches as one tree behind the prefix, which is computed and kept; `read` columns of both."""
    device = trunk.model.device
    depth = len(_PREFIX)
    path = KeyValuePath()
    root = TreeRow(torch.arange(depth, device=device), torch.full((depth,), depth, device=device), [(0, depth)])
    root.path, root.keep = path, depth
    root.read = None if read is None else torch.tensor(read[:0], dtype=torch.long, device=device)
    tree_hidden(trunk, _ids(trunk, _PREFIX), root)
    path.length = depth
    positions = torch.tensor([3, 4, 5, 6, 5, 3, 4, 5, 6, 7], device=device)
    ends = torch.tensor([5, 5, 4, 4, 5, 10, 10, 10, 10, 10], device=device)
    row = TreeRow(positions, ends, [(0, 5), (5, 10)] if read else [(0, 10)], depth, path)
    row.read = None if read is None else torch.tensor(read, device=device)
    return row


def _apart(trunk: Trunk) -> tuple[TreeRow, list[int]]:
    """The branches, prefix and all, as unrelated groups of one row; and its token ids."""
    device = trunk.model.device
    whole = [_PREFIX + branch for branch in _BRANCHES]
    lengths = [len(sequence) for sequence in whole]
    edges = [0, *accumulate(lengths)]
    row = TreeRow(
        torch.cat([torch.arange(n, device=device) for n in lengths]),
        torch.cat([torch.full((n,), end, device=device) for n, end in zip(lengths, edges[1:], strict=True)]),
        list(pairwise(edges)),
    )
    return row, list(chain.from_iterable(whole))


def _packed(trunk: Trunk) -> list[Tensor]:
    """The same through a kept prefix and one packed row; and once more as unrelated groups of one row."""
    row = _under(trunk)
    under = tree_hidden(trunk, _ids(trunk, _TREE), row)
    _check_windows(trunk, row)
    for begin, end, rest in ((4, 5, slice(0, 4)), (5, 10, slice(0, 5)), (0, 5, slice(5, 10))):
        changed = [token + (begin <= i < end) for i, token in enumerate(_TREE)]
        again = tree_hidden(trunk, _ids(trunk, changed), row)
        if relative_difference(again[rest], under[rest]) > _leak(trunk, under.dtype):
            raise RuntimeError("tokens see others that are not their ancestors")
    alone, together = _apart(trunk)
    first = alone.groups[0][1]
    apart = tree_hidden(trunk, _ids(trunk, together), alone)
    changed = [token + (i < first) for i, token in enumerate(together)]
    again = tree_hidden(trunk, _ids(trunk, changed), alone)
    if relative_difference(again[first:], apart[first:]) > _leak(trunk, apart.dtype):
        raise RuntimeError("tokens see others of the same row")
    tree = [under[:4], under[[0, 1, 4]], under[5:]]
    # The worse of the two ways counts: both are compared by the caller's maximum.
    split = [apart[begin + len(_PREFIX) : end] for begin, end in alone.groups]
    plain = _plain(trunk)
    return [
        a if relative_difference(a, p) >= relative_difference(b, p) else b
        for a, b, p in zip(tree, split, plain, strict=True)
    ]


def _narrows(trunk: Trunk, expected: list[Tensor]) -> bool:
    """Whether the last layer gives the same where it computes only some tokens of a row."""
    try:
        under = tree_hidden(trunk, _ids(trunk, _TREE), _under(trunk, [1, 3, 4, 8]))
        alone, together = _apart(trunk)
        alone.read = torch.tensor([5, *range(*alone.groups[2])], device=trunk.model.device)
        apart = tree_hidden(trunk, _ids(trunk, together), alone)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return False
    got = torch.stack([under[1], under[3], under[4], under[8], apart[5], *apart[alone.groups[2][0] + len(_PREFIX) :]])
    one, two, three = expected
    want = torch.stack([one[1], one[3], two[2], three[3], one[2], *three])
    return relative_difference(got, want) <= _tolerance(want.dtype)


def _check_windows(trunk: Trunk, row: TreeRow) -> None:
    """A configuration with a sliding window must have told the attention of it: a short trial would not show."""
    config = trunk.inner.config.get_text_config()
    if len(row.windows) != config.num_hidden_layers:
        raise RuntimeError("some of its layers mix tokens in other ways than by attention")
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return
    kinds = getattr(config, "layer_types", None)
    for layer, told in row.windows.items():
        slides = kinds[layer] == "sliding_attention" if kinds else True
        if (told is not None) != slides:
            raise RuntimeError(f"layer {layer} does not say whether its window slides")


def _cached(trunk: Trunk) -> list[Tensor]:
    half = len(_PREFIX) - 1
    _, cache = cached_hidden(trunk, _ids(trunk, [_PREFIX[:half]]), None)
    _, cache = cached_hidden(trunk, _ids(trunk, [_PREFIX[half:]]), cache)
    width = max(map(len, _BRANCHES))
    rows = [branch + [0] * (width - len(branch)) for branch in _BRANCHES]
    for _ in range(2):  # the second time shows a cache that the first has spoilt
        hidden, _ = cached_hidden(trunk, _ids(trunk, rows), cache, repeat=len(rows))
    return [states[: len(branch)] for states, branch in zip(hidden, _BRANCHES, strict=True)]


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 4e-2)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
