"""Windows of tokens in, nats and first choices out: what the plug-in asks of loglik."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from loglik.errors import RowError
from loglik.progress import bar
from loglik.scoring.answers import WindowScores, check_log_probs
from loglik.scoring.execute import Executor
from loglik.scoring.windows import Window

__all__ = [
    "check_continuation",
    "exact_sum",
    "make_window",
    "progress",
    "request_name",
    "score_windows",
]


def check_continuation(continuation: Sequence[int], max_length: int) -> None:
    """Refuse what has no likelihood in one window.

    Raises:
        RowError: for no tokens, or more than the context holds.
    """
    if not continuation:
        raise RowError("the continuation has no token to score: remove it from the task, or give it a text")
    if len(continuation) > max_length:
        raise RowError(
            f"the continuation has {len(continuation)} tokens and the model's context is {max_length}: "
            "shorten it, or score it with a loglikelihood_rolling task"
        )


def make_window(context: list[int], continuation: list[int], max_length: int) -> Window:
    """The tokens that fit, the last of which is a target only; the context is cut on its left."""
    ids = (context + continuation)[-(max_length + 1) :]
    start = len(ids) - len(continuation)
    return Window(
        ids=ids,
        start=start,
        scored_from=start,
        scored_to=len(ids),
        words=[-1] * len(ids),
        content_from=len(context),
        num_shortened=len(continuation) if start < len(context) else 0,
    )


def score_windows(executor: Executor, windows: Sequence[Window], *, quiet: bool = False) -> list[WindowScores]:
    """Nats and first choices of the scored tokens of each window, in order; equal beginnings are computed once.

    Args:
        executor: of the model.
        windows: token rows with what is scored in them.
        quiet: show no bar on a terminal either.
    """
    scored = sum(window.scored_to - window.scored_from for window in windows)
    with progress("log-likelihoods", scored, "tokens", quiet) as advance:
        return executor.run(windows, advance=lambda count, _: advance(count))


def exact_sum(terms: Sequence[float]) -> float:
    """Nats, summed without rounding in between; -inf is a legal log 0.

    Raises:
        RowError: if a term is no number.
    """
    check_log_probs(terms)
    return math.fsum(terms)


def progress(what: str, total: int, unit: str, quiet: bool) -> AbstractContextManager[Callable[..., None]]:
    """A bar on a terminal, nothing where quiet is asked for; yields ``advance(n=1)``."""
    return nullcontext(lambda count=1: None) if quiet else bar(what, total=total, unit=unit)


def request_name(request: Any, index: int) -> str:
    """What names a request of the harness in an error."""
    where = f" (task {request.task_name}, document {request.doc_id})" if request.task_name else ""
    return f"request {index}{where}"
