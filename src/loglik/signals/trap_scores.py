"""Which sequences can be published as traps, and the scores that ask a model for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.signals.membership import loss_score, min_k, reference_score

__all__ = ["survives_decoding", "trap_scores"]


def survives_decoding(tokenizer: Any) -> Callable[[list[int]], bool]:
    """Whether tokens come back when decoded and encoded: for `generate_traps`, as traps are published as text.

    A sequence with special tokens, or one that begins or ends in white space, does not: documents lose both easily.

    Args:
        tokenizer: a transformers tokenizer.

    Raises:
        InputError: for no tokenizer.
    """
    if tokenizer is None:
        raise InputError("traps become text by a tokenizer, and the model has none: save one beside its weights")

    special = set(tokenizer.all_special_ids)

    def survives(ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        if not special.isdisjoint(ids) or text != text.strip():
            return False
        return list(tokenizer.encode(text, add_special_tokens=False)) == list(ids)

    return survives


def trap_scores(
    likelihood: LogLikelihood, reference: LogLikelihood | None = None, *, k: float = 0.2
) -> dict[str, Measurement]:
    """The scores that traps are tested by, higher for those that the model was trained on.

    Args:
        likelihood: (B,) of traps and unused traps under the model in question.
        reference: (B,) of the same under a model that saw none of them.
        k: share of the tokens in Min-K%.

    Returns:
        ``loss``; ``min_k`` where the likelihood has a term per token; with a reference ``ratio``, the strongest, and
        ``reference_loss``, which must tell nothing: if it does, traps and unused ones differ in more than membership.

    Raises:
        InputError: as the scores raise it.

    Source: arXiv 2402.09363.
    """
    out = {"loss": loss_score(likelihood)}
    if likelihood.per_unit is not None:
        out["min_k"] = min_k(likelihood, k)
    if reference is not None:
        out["ratio"] = reference_score(likelihood, reference)
        out["reference_loss"] = loss_score(reference)
    return out
