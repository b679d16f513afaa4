"""Likelihoods under the frozen reference: a model, the policy without its adapter, or numbers computed before.

Whatever gives them, they are computed in evaluation mode, without gradients, and by the same forward pass as the
policy's, so that a policy that equals its reference has log-ratios of exactly 0 (dropout off).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.protocol import is_sampled
from loglik.models.trunk import evaluating
from loglik.progress import bar
from loglik.training.data import Numbered, Row, RowBatch

__all__ = [
    "AdapterOff",
    "ModelReference",
    "Reference",
    "References",
    "RowReference",
    "StoredReference",
    "has_adapter",
    "stored",
]


class Reference(Protocol):
    """Gives the log-likelihoods (N,) of the completions of a batch under the frozen reference."""

    def __call__(self, batch: RowBatch) -> LogLikelihood:
        """Detached, aligned with `batch.tokens`."""


class ModelReference:
    """Another model, evaluated at every step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: RowBatch) -> LogLikelihood:
        """Log-likelihoods under the model."""
        with evaluating(self.model.model):
            return batch.likelihood(self.model).detach()


class AdapterOff:
    """The policy itself with its adapter disabled: no second copy of the weights.

    Raises:
        InputError: if the policy has no adapter.
    """

    def __init__(self, model: Any) -> None:
        if not has_adapter(model):
            raise InputError("the policy has no adapter to switch off: give a reference model, or train with LoRA")
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: RowBatch) -> LogLikelihood:
        """Log-likelihoods under the base model."""
        with evaluating(self.model.model), self.model.model.disable_adapter():
            return batch.likelihood(self.model).detach()


class RowReference:
    """Sums that the rows brought along (``ref_chosen_logps`` and ``ref_rejected_logps``)."""

    def __init__(self, model: Any) -> None:
        self.kind, self.unit = model.kind, model.unit

    def __call__(self, batch: RowBatch) -> LogLikelihood:
        """Log-likelihoods as they stand in the rows."""
        if "reference" not in batch.values:
            raise InputError(f"{batch.names[0]} or a later row brings no reference log-probabilities along")
        counted = (batch.tokens.scored_mask & batch.tokens.attention_mask).sum(1)
        return LogLikelihood(batch.values["reference"], self.kind, self.unit, counted)


class StoredReference:
    """Log-likelihoods of every row of some data, computed once.

    Args:
        terms: (S,) log-probabilities of all scored tokens, row by row; or (N,) sums where there are no terms.
        offsets: (R + 1,) where each row's numbers begin.
        kind: of the sums.
        unit: of the model.
        per_token: whether `terms` are tokens' or sums.
    """

    def __init__(self, terms: Tensor, offsets: Tensor, *, kind: Kind, unit: Unit, per_token: bool) -> None:
        self.terms, self.offsets = terms, offsets
        self.kind, self.unit, self.per_token = kind, unit, per_token

    def __call__(self, batch: RowBatch) -> LogLikelihood:
        """Log-likelihoods of the batch's rows, found by their numbers."""
        rows = batch.index.tolist()
        found = torch.cat([self.terms[self.offsets[i] : self.offsets[i + 1]] for i in rows])
        mask = batch.tokens.scored_mask & batch.tokens.attention_mask
        found = found.to(mask.device)
        if not self.per_token:
            return LogLikelihood(found, self.kind, self.unit, mask.sum(1))
        if len(found) != int(mask.sum()):
            raise InputError("the stored reference belongs to other rows: remove it, or give the data it was made from")
        terms = torch.zeros(mask.shape, dtype=found.dtype, device=mask.device).masked_scatter(mask, found)
        return LogLikelihood.from_per_unit(terms, mask, kind=self.kind, unit=self.unit)

    def save(self, path: Path) -> None:
        """Write to `path`, complete or not at all."""
        metadata = {"kind": self.kind.value, "unit": self.unit.value, "per_token": str(self.per_token)}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"terms": self.terms, "offsets": self.offsets}, partial, metadata=metadata)
        os.replace(partial, path)

    @classmethod
    def open(cls, path: Path) -> StoredReference:
        """Read what `save` wrote.

        Raises:
            InputError: for a damaged file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                terms, offsets = file.get_tensor("terms"), file.get_tensor("offsets")
            kind, unit, per_token = Kind(about["kind"]), Unit(about["unit"]), about["per_token"] == "True"
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the stored reference {path} cannot be read ({error}); remove it") from None
        return cls(terms, offsets, kind=kind, unit=unit, per_token=per_token)


class References:
    """Where the reference's log-likelihoods come from in one run; made while the policy is still as it was given.

    Args:
        method: the objective's name, for the refusal.
        policy: the model that will be trained.
        given: ``auto`` or ``initial`` (the policy as it is), a model, or a `Reference`.
        batch_size: rows per forward pass.
        cache: directory of log-likelihoods computed once.

    Raises:
        InputError: if there is none.
    """

    def __init__(self, method: str, policy: Any, given: Any, *, batch_size: int, cache: Path) -> None:
        self.policy, self.batch_size, self.cache = policy, batch_size, cache
        self.identified: torch.nn.Module | None = None  # whose weights tell stored numbers apart
        self.live: Reference
        if given is None:
            raise InputError(
                f"{method} needs a frozen reference: pass reference='auto' for the policy as it is before training, or "
                "a model"
            )
        if isinstance(given, str):
            if given not in ("auto", "initial"):
                raise InputError(f"reference must be 'auto', 'initial', a model or a function, got {given!r}")
            if has_adapter(policy):
                self.live = AdapterOff(policy)
            else:
                self.live, self.identified = ModelReference(policy), policy.model
        elif hasattr(given, "log_prob"):
            self.live = ModelReference(given)
            self.identified = given.model if isinstance(given.model, torch.nn.Module) else None
        else:
            self.live = given

    def of(self, rows: Numbered) -> Reference:
        """For rows that stay: numbers they bring along, log-likelihoods computed once and kept on disk, or live.

        An adapter is switched off at every step: that needs neither a copy of the weights nor a pass in advance.
        """
        if not rows.rolled and len(rows) and "reference" in rows[0][1].values:
            return RowReference(self.policy)
        if self._is_sampled():
            self.freeze()  # random numbers change from step to step, so nothing can be computed in advance
            return self.live
        if self.identified is None:
            return self.live
        key = weights_digest(self.identified)
        return stored(self.live, rows, batch_size=self.batch_size, cache=self.cache, key=key)

    def of_fresh(self, rows: Numbered) -> Reference:
        """For rows drawn while training: computed once, not kept on disk."""
        if self._is_sampled():
            return self.live
        return stored(self.live, rows, batch_size=self.batch_size)

    def _is_sampled(self) -> bool:
        """Whether the reference's likelihoods depend on random numbers, which it must share with the policy."""
        return isinstance(self.live, ModelReference | AdapterOff) and is_sampled(self.live.model)

    def freeze(self) -> None:
        """Copy the policy if it is its own reference: rows to come will ask for it when it has changed."""
        if isinstance(self.live, ModelReference) and self.live.model is self.policy:
            # The copy shares the tokenizer: it does not change.
            copied = copy.deepcopy(self.policy, {id(self.policy.tokenizer): self.policy.tokenizer})
            copied.model.requires_grad_(False)
            self.live = ModelReference(copied)


def stored(
    reference: Reference, data: Numbered, *, batch_size: int, cache: Path | None = None, key: str = ""
) -> StoredReference:
    """Log-likelihoods of all rows under `reference`, read from `cache` where they were computed before.

    Args:
        reference: what gives them.
        data: the rows.
        batch_size: rows per forward pass.
        cache: directory of earlier ones; None keeps them in memory.
        key: what identifies the reference, such as `weights_digest`.
    """
    path = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"reference-{_digest(data, key)}.safetensors"
        if path.is_file():
            return StoredReference.open(path)
    parts: dict[int, Tensor] = {}
    kind, unit, per_token = Kind.EXACT, Unit.TOKEN, True
    with bar("reference", total=len(data), unit="rows") as advance:
        for indices in _by_length(data, batch_size):
            batch = data.batch(indices)
            found = reference(batch)
            kind, unit, per_token = found.kind, found.unit, found.per_unit is not None
            parts |= zip(indices, _row_by_row(found, batch), strict=True)
            advance(len(indices))
    ordered = [parts[i] for i in range(len(data))]
    offsets = torch.tensor([0, *map(len, ordered)]).cumsum(0)
    made = StoredReference(torch.cat(ordered), offsets, kind=kind, unit=unit, per_token=per_token)
    if path is not None:
        made.save(path)
    return made


def weights_digest(module: torch.nn.Module) -> str:
    """Identity of a network: its class and every weight."""
    found = hashlib.blake2b(type(module).__name__.encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def has_adapter(model: Any) -> bool:
    """Whether the network carries a PEFT adapter."""
    return hasattr(model.model, "disable_adapter") and hasattr(model.model, "peft_config")


def _row_by_row(found: LogLikelihood, batch: RowBatch) -> list[Tensor]:
    """Log-probabilities of the scored tokens of each row, all its completions in a row; or their sums."""
    flat, sizes = found.value, batch.counts.tolist()
    if found.per_unit is not None and found.mask is not None:
        flat = found.per_unit[found.mask]
        sizes = [int(part.sum()) for part in torch.split(found.mask.sum(1), sizes)]
    return list(torch.split(flat.cpu(), sizes))


def _digest(data: Numbered, key: str) -> str:
    found = hashlib.blake2b(key.encode(), digest_size=16)
    for i in range(len(data)):
        found.update(_spelled(data[i][1]).encode())
    return found.hexdigest()


def _spelled(row: Row) -> str:
    prompt = [int(token) for token in row.prompt]
    return json.dumps([prompt, [[int(t) for t in c] for c in row.completions], list(row.unscored)])


def _by_length(data: Numbered, batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, so that little is padded."""
    sizes = [len(row.prompt) + sum(map(len, row.completions)) for _, row in (data[i] for i in range(len(data)))]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]
