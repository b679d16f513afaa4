"""What it would have cost to stop a reasoning trace early: tokens saved, and whether the answer stays the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loglik.errors import InputError, RowError
from loglik.signals.entropy_curve import EntropyCurve, StopAdvice

__all__ = ["StopOutcome", "StopTradeOff", "stop_outcome", "stop_summary", "stop_trade_off"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StopOutcome:
    """A trace of K steps that is stopped where the advice says so.

    Args:
        step: steps that are taken; K where the advice is to continue.
        reason: of the advice.
        steps: K.
        tokens: of the K steps.
        tokens_saved: of the steps that are not taken.
        same_answer: whether the answer after `step` steps is that after all; None where answers are not known.
        right: whether the answer after `step` steps is right; None where that is not known.
        right_in_the_end: whether the answer after all steps is.
    """

    step: int
    reason: str
    steps: int
    tokens: int
    tokens_saved: int
    same_answer: bool | None = None
    right: bool | None = None
    right_in_the_end: bool | None = None

    def record(self) -> dict[str, Any]:
        """Plain values for JSON and tables."""
        return {
            "stop_step": self.step,
            "stop_reason": self.reason,
            "tokens": self.tokens,
            "tokens_saved": self.tokens_saved,
            "same_answer": self.same_answer,
            "right_at_stop": self.right,
            "right_in_the_end": self.right_in_the_end,
        }


def stop_outcome(
    advice: StopAdvice,
    tokens: Sequence[int],
    *,
    answers: Sequence[Hashable] | None = None,
    right: Sequence[bool] | None = None,
) -> StopOutcome:
    """Follow the advice on a trace whose end is known.

    Args:
        advice: from `EntropyCurve.early_stop`, of the whole trace or of its first steps.
        tokens: (K,) of each step, from `loglik.signals.trace_entropy.step_tokens`.
        answers: (K + 1,) the answer after each number of steps, from 0: an option's number, a class of meaning.
        right: (K + 1,) whether each of them is right.

    Raises:
        InputError: for advice beyond the last step, negative tokens, or numbers that do not fit.
    """
    steps = len(tokens)
    if any(count < 0 for count in tokens):
        raise InputError(f"the tokens of a step are a number of at least 0, got {min(tokens)}")
    for name, given in (("answers", answers), ("right", right)):
        if given is not None and len(given) != steps + 1:
            raise InputError(
                f"{name} must have a value for each of the {steps + 1} states of a trace of {steps} steps, "
                f"got {len(given)}"
            )
    step = steps if advice.step is None else advice.step
    if not 0 <= step <= steps:
        raise InputError(f"the advice is to stop after {step} steps, and the trace has {steps}: give that of the trace")
    return StopOutcome(
        step,
        advice.reason,
        steps,
        sum(tokens),
        sum(tokens[step:]),
        None if answers is None else answers[step] == answers[-1],
        None if right is None else bool(right[step]),
        None if right is None else bool(right[-1]),
    )


def stop_summary(outcomes: Sequence[StopOutcome]) -> dict[str, Any]:
    """Figures of N traces: how many were stopped, what that saved, and what it did to the answers.

    Args:
        outcomes: of all traces.

    Returns:
        ``stopped`` the share that stops before its end, ``steps_saved`` and ``tokens_saved`` shares of all steps and
        tokens (None where there are none), ``same_answer`` the share of traces with an unchanged answer and
        ``same_answer_of_stopped`` that among the stopped ones, ``accuracy_at_stop`` and ``accuracy_in_the_end``; None
        for what is not known of every trace.

    Raises:
        InputError: for no outcomes.
    """
    if not len(outcomes):
        raise InputError("there is no trace: give at least one")
    stopped = [outcome for outcome in outcomes if outcome.step < outcome.steps]
    steps, tokens = sum(o.steps for o in outcomes), sum(o.tokens for o in outcomes)
    return {
        "stopped": len(stopped) / len(outcomes),
        "steps_saved": sum(o.steps - o.step for o in outcomes) / steps if steps else None,
        "tokens_saved": sum(o.tokens_saved for o in outcomes) / tokens if tokens else None,
        "same_answer": _share([o.same_answer for o in outcomes]),
        "same_answer_of_stopped": _share([o.same_answer for o in stopped]),
        "accuracy_at_stop": _share([o.right for o in outcomes]),
        "accuracy_in_the_end": _share([o.right_in_the_end for o in outcomes]),
    }


@dataclass(frozen=True, slots=True)
class StopTradeOff:
    """What every threshold saves and changes.

    Args:
        threshold: (M,) nats, rising.
        tokens_saved: (M,) share of all tokens.
        same_answer: (M,) share of the traces whose answer stays.
    """

    threshold: Floats
    tokens_saved: Floats
    same_answer: Floats


def stop_trade_off(
    curves: Sequence[EntropyCurve],
    tokens: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Hashable]],
    *,
    thresholds: Sequence[float] | None = None,
    patience: int = 1,
    stall: int | None = None,
    min_fall: float = 0.0,
) -> StopTradeOff:
    """Tokens saved against answers kept, for every threshold: choose it here, on traces that are not evaluated.

    Args:
        curves: N curves, of whole traces or of their first steps.
        tokens: N lists of the tokens of each step.
        answers: N lists of the answer after each number of steps, from 0.
        thresholds: of `EntropyCurve.early_stop`; by default 51 from 0 to the highest entropy.
        patience: of `EntropyCurve.early_stop`.
        stall: of `EntropyCurve.early_stop`.
        min_fall: of `EntropyCurve.early_stop`.

    Raises:
        InputError: for unequal numbers of traces, no tokens at all, or options out of range.
        RowError: naming a trace whose numbers do not fit.
    """
    if not len(curves) or len(tokens) != len(curves) or len(answers) != len(curves):
        raise InputError(
            f"each curve needs its tokens and its answers, and there must be one: got {len(curves)} curves, "
            f"{len(tokens)} and {len(answers)} lists"
        )
    total = sum(map(sum, tokens))
    if total < 1:
        raise InputError("no trace has a token that could be saved: give traces with steps")
    if thresholds is None:
        highest = max(float(curve.entropy.value.max()) for curve in curves)
        thresholds = np.linspace(0.0, highest, 51).tolist()
    levels = sorted(float(level) for level in thresholds)
    if not levels:
        raise InputError("thresholds must be one number or more")
    saved, same = np.zeros(len(levels)), np.zeros(len(levels))
    for row, (curve, own, said) in enumerate(zip(curves, tokens, answers, strict=True)):
        for place, level in enumerate(levels):
            advice = curve.early_stop(level, patience=patience, stall=stall, min_fall=min_fall)
            try:
                outcome = stop_outcome(advice, own, answers=said)
            except InputError as error:
                raise RowError(str(error), row=f"trace {row}") from None
            saved[place] += outcome.tokens_saved
            same[place] += bool(outcome.same_answer)
    return StopTradeOff(np.array(levels), saved / total, same / len(curves))


def _share(flags: Sequence[bool | None]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known and len(known) == len(flags) else None
