"""What a run would do, before it does it: rows, tokens, what sharing saves, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from loglik.errors import RowError
from loglik.models.causal import CausalLM
from loglik.scoring.budget import cache_bytes_per_token
from loglik.scoring.engine import Scorer
from loglik.scoring.rows import InputRow
from loglik.scoring.windows import Window

__all__ = ["DryRun", "dry_run"]

# The trial that the time is estimated from; more tokens than this change the estimate little.
_TRIAL_TOKENS = 4096


@dataclass(slots=True)
class DryRun:
    """The plan of a run.

    Args:
        path: how forward passes will run.
        rows: rows read.
        errors: rows that cannot be scored.
        first_error: the first of them and why.
        passes: forward passes.
        total_tokens: tokens that row-by-row scoring would compute.
        distinct_tokens: distinct (prefix, token) pairs within what is planned together.
        computed_tokens: tokens that will be computed, padding left out.
        scored_tokens: log-probabilities asked for.
        weight_bytes: of the model.
        cache_bytes: keys and values alive at once, at most.
        pass_bytes: activations and logits of one pass, estimated from the configuration.
        seconds: estimated from a timed trial on this machine; None if there is nothing to time.
    """

    path: str
    rows: int = 0
    errors: int = 0
    first_error: str | None = None
    passes: int = 0
    total_tokens: int = 0
    distinct_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    pass_bytes: int = 0
    seconds: float | None = None

    @property
    def saving(self) -> float:
        """Row-by-row tokens over computed tokens."""
        return self.total_tokens / max(1, self.computed_tokens)


def dry_run(
    chunks: Iterable[list[InputRow]], scorer: Scorer, *, advance: Callable[[int], None] | None = None
) -> DryRun:
    """Plan every chunk of a run and time a trial of it; nothing is scored.

    Args:
        chunks: the input's rows in the chunks in which a run would score them.
        scorer: the model and options.
        advance: called with the number of rows planned each time.
    """
    executor = scorer.executor
    found = DryRun(executor.describe())
    per_token = cache_bytes_per_token(scorer.model) or 0
    trial: list[Window] = []
    live = 0
    for chunk in chunks:
        found.rows += len(chunk)
        good = [row for row in chunk if row.error is None]
        prepared = scorer.prepare([(row.prompt, row.completion) for row in good])
        for read, row in zip(good, prepared, strict=True):
            if isinstance(row, RowError):
                found.first_error = found.first_error or f"{read.where}: {row.reason}"
        bad = next((row for row in chunk if row.error is not None), None)
        if bad is not None:
            found.first_error = found.first_error or f"{bad.where}: {bad.error}"
        rows = [row for row in prepared if not isinstance(row, RowError)]
        found.errors += len(chunk) - len(rows)
        windows = [window for row in rows for window in row.windows]
        found.scored_tokens += sum(w.scored_to - w.scored_from + len(w.branches) for w in windows)
        if executor.shares_prefixes and windows:
            plan = executor.plan(windows)
            found.total_tokens += plan.forest.total
            found.distinct_tokens += plan.forest.distinct
            found.computed_tokens += plan.computed
            found.passes += len(plan.packs)
            live = max(live, plan.live_tokens)
        else:
            tokens = sum(len(window.ids) for window in windows)
            found.total_tokens += tokens
            found.distinct_tokens += tokens
            found.computed_tokens += tokens
            found.passes += len(executor.batches(windows))
        if not trial:
            trial = _some(windows)
        if advance is not None:
            advance(len(chunk))
    found.cache_bytes = live * per_token
    found.weight_bytes, found.pass_bytes = _model_bytes(scorer)
    if trial:
        found.seconds = _seconds(scorer, trial) * found.computed_tokens
    return found


def _some(windows: list[Window]) -> list[Window]:
    """The first windows, up to the size of a trial."""
    chosen: list[Window] = []
    for window in windows:
        if chosen and sum(len(w.ids) for w in chosen) + len(window.ids) > _TRIAL_TOKENS:
            break
        chosen.append(window)
    return chosen


def _seconds(scorer: Scorer, trial: list[Window]) -> float:
    """Seconds per computed token, head included, on the second of two runs over the trial."""
    executor = scorer.executor
    vocabulary = scorer.vocabulary
    subset = None if vocabulary is None else vocabulary.subset
    tokens = executor.plan(trial).computed if executor.shares_prefixes else sum(len(w.ids) for w in trial)
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        executor.run(trial, subset=subset)
        seconds = time.perf_counter() - begun
    return seconds / max(1, tokens)


def _model_bytes(scorer: Scorer) -> tuple[int, int]:
    """Weights, and what a pass over the token budget holds: the states around a layer's widest part, and a tile."""
    network: Any = getattr(scorer.model, "model", None)
    if network is None:
        return 0, 0
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    config = network.config.get_text_config()
    hidden = int(getattr(config, "hidden_size", 0))
    wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    itemsize = network.dtype.itemsize if isinstance(scorer.model, CausalLM) else 4
    tokens = scorer.executor.budget.pack_tokens
    return weights, tokens * (6 * hidden + 3 * wide) * itemsize + 4 * 1024 * 1024
