"""Causal traces of many prompts as one: effects by class of token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.attribution import CausalTrace
from loglik.signals.subject_prompts import SubjectPosition

__all__ = ["PooledTraces", "pool_traces"]


@dataclass(frozen=True, slots=True)
class PooledTraces:
    """Mean effects of traces by class of token.

    Args:
        effect: (L,) of each class that occurs: mean over traces of the mean over their tokens of the class.
        count: traces that have the class.
        clipped: values outside [-1, 1] before clipping; None of effects that are not normalised.
    """

    effect: dict[SubjectPosition, Tensor]
    count: dict[SubjectPosition, int]
    clipped: int | None


def pool_traces(traces: Sequence[CausalTrace], *, normalise: bool = False, clip: bool = True) -> PooledTraces:
    """Indirect effects of prompts of different lengths, pooled into six classes of tokens.

    Args:
        traces: of one model, kind and window. Do not pool kinds of predictions.
        normalise: each trace by its own total effect.
        clip: normalised effects to [-1, 1].

    Raises:
        InputError: for no traces, traces of several settings, or a trace without total effect (where normalised).

    Source: arXiv 2410.14405.
    """
    settings = {(trace.kind, trace.window, trace.score.shape[1]) for trace in traces}
    if len(settings) != 1:
        raise InputError(f"traces to pool must be of one kind, window and model, got {len(settings)} settings")
    found: dict[SubjectPosition, list[Tensor]] = {}
    clipped = 0
    for trace in traces:
        values, outside = trace.normalised(clip=clip) if normalise else (trace.indirect_effect, 0)
        clipped += outside
        for name, places in trace.prompt.positions().items():
            found.setdefault(name, []).append(values[places].mean(0))
    ordered = {name: found[name] for name in SubjectPosition if name in found}
    return PooledTraces(
        {name: torch.stack(parts).mean(0) for name, parts in ordered.items()},
        {name: len(parts) for name, parts in ordered.items()},
        clipped if normalise else None,
    )
