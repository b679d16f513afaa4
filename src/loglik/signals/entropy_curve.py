r"""The uncertainty about an answer after each step of a reasoning trace: what the steps do, and when to stop.

Where the entropy falls from step to step, the trace leads somewhere; traces of wrong answers stay flat or rise
(arXiv 2508.20395). `loglik.signals.trace_entropy` makes such curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement

__all__ = ["EntropyCurve", "StopAdvice", "trace_scores"]


@dataclass(frozen=True, slots=True)
class StopAdvice:
    """When to stop reasoning.

    Args:
        step: number of steps after which to stop; None: not yet.
        reason: ``sure`` the entropy is low enough, ``stalled`` it has not fallen any more, ``continue``.
        saved: steps of the trace that come after `step`; 0 without one.
    """

    step: int | None
    reason: Literal["sure", "stalled", "continue"]
    saved: int


@dataclass(frozen=True, slots=True)
class EntropyCurve:
    r"""Entropy of the answer after 0, 1, ..., K steps of a trace.

    Compare descriptors between traces of different length with care: wrong traces are longer. Where the last step
    states the answer, entropy collapses for right and wrong ones alike: `until` leaves it out.

    Args:
        entropy: (K + 1,) mean over the answer's tokens, nats.
        per_token: (K + 1, T) of each token of the answer.
        log_likelihood: (K + 1,) of the true answer; None where no answer was given.
    """

    entropy: Measurement
    per_token: Tensor
    log_likelihood: LogLikelihood | None = None

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.entropy.value) - 1

    @property
    def utility(self) -> Tensor:
        r"""(K,) :math:`\Delta_k = H_{k-1} - H_k` of each step; single ones may be negative."""
        return -self.entropy.value.diff()

    @property
    def first_token(self) -> Tensor:
        """(K + 1,) entropy of the answer's first token, for which no answer is conditioned on."""
        return self.per_token[:, 0]

    @property
    def information_gain(self) -> Tensor:
        r"""(K,) fall of the mean negative log-likelihood of the true answer with each step, nats per token.

        Raises:
            InputError: without an answer, or for one that is impossible after some steps.
        """
        if self.log_likelihood is None:
            raise InputError("the information gain needs the likelihood of an answer: use answer_entropy_curve")
        impossible = (~torch.isfinite(self.log_likelihood.value)).nonzero().flatten()
        if len(impossible):
            raise InputError(
                f"the answer has probability 0 after {int(impossible[0])} steps, so that no information gain is "
                "defined: smooth the model"
            )
        return self.log_likelihood.mean_per_unit().value.diff()

    def drop(self) -> float:
        r""":math:`H_0 - H_K`, what the whole trace does; negative if the model is less sure than before."""
        return float(self.entropy.value[0] - self.entropy.value[-1])

    def slope(self) -> float:
        """Least-squares slope of the entropy on the number of steps, nats per step; negative where it falls.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("a slope")
        steps = torch.arange(self.num_steps + 1, dtype=torch.float64)
        centred = steps - steps.mean()
        return float(centred @ self.entropy.value.double().cpu() / (centred @ centred))

    def share_rising(self) -> float:
        """Share of the steps after which the entropy is higher than before.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("the share of rising steps")
        return float((self.utility < 0).double().mean())

    def monotonicity(self) -> float:
        r"""Kendall's :math:`\tau_a` of entropy and steps: -1 falls at every step, 1 rises at every step; ties count 0.

        Raises:
            InputError: for a trace without steps.
        """
        self._require_steps("monotonicity")
        values = self.entropy.value.double().cpu()
        rises = (values[None, :] - values[:, None]).sign().triu(1)  # later minus earlier
        count = self.num_steps * (self.num_steps + 1) // 2
        return float(rises.sum() / count)

    def until(self, step: int) -> EntropyCurve:
        """The curve of the first `step` steps; a negative number leaves as many out at the end.

        Raises:
            InputError: for more steps than there are.
        """
        wanted = step if step >= 0 else self.num_steps + step
        if not 0 <= wanted <= self.num_steps:
            raise InputError(f"the trace has {self.num_steps} steps, so that there is no curve until step {step}")
        likelihood = None if self.log_likelihood is None else self.log_likelihood[: wanted + 1]
        cut = replace(self.entropy, value=self.entropy.value[: wanted + 1])
        return EntropyCurve(cut, self.per_token[: wanted + 1], likelihood)

    def early_stop(
        self, threshold: float, *, patience: int = 1, stall: int | None = None, min_fall: float = 0.0
    ) -> StopAdvice:
        """Advice that looks at no later step than the one it stops after.

        Stop as soon as the entropy has been at most `threshold` after `patience` states in a row; or, with `stall`,
        as soon as that many steps in a row have not brought it more than `min_fall` below where it last fell to.

        Args:
            threshold: nats per token, at least 0; choose it on traces of known outcome.
            patience: states in a row, at least 1.
            stall: steps without a fall that count as leading nowhere; None: never.
            min_fall: nats that count as a fall, at least 0.

        Raises:
            InputError: for options out of range.

        Source: arXiv 2508.20395 proposes to stop early and states no rule; this one is ours.
        """
        if not (0 <= threshold < math.inf and 0 <= min_fall < math.inf):
            raise InputError(f"threshold and min_fall must be at least 0 and finite, got {threshold} and {min_fall}")
        if patience < 1 or (stall is not None and stall < 1):
            raise InputError(f"patience and stall must be at least 1, got {patience} and {stall}")
        low, since, least = 0, 0, math.inf
        for step, value in enumerate(self.entropy.value.tolist()):
            low = low + 1 if value <= threshold else 0
            if low >= patience:
                return StopAdvice(step, "sure", self.num_steps - step)
            fell = value < least - min_fall
            since, least = (0, value) if fell else (since + 1, least)
            if stall is not None and since >= stall:
                return StopAdvice(step, "stalled", self.num_steps - step)
        return StopAdvice(None, "continue", 0)

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON and tables; None where a trace has no steps, or an answer no likelihood above 0."""
        has_steps = self.num_steps > 0
        terms = None if self.log_likelihood is None else self.log_likelihood.value.tolist()
        possible = terms is not None and all(map(math.isfinite, terms))
        return {
            "steps": self.num_steps,
            "entropy": self.entropy.value.tolist(),
            "utility": self.utility.tolist(),
            "first_token_entropy": self.first_token.tolist(),
            "log_prob": None if terms is None else [term if math.isfinite(term) else None for term in terms],
            "information_gain": self.information_gain.tolist() if possible else None,
            "kind": str(self.entropy.kind),
            "final": float(self.entropy.value[-1]),
            "drop": self.drop(),
            "slope": self.slope() if has_steps else None,
            "share_rising": self.share_rising() if has_steps else None,
            "monotonicity": self.monotonicity() if has_steps else None,
        }

    def _require_steps(self, what: str) -> None:
        if self.num_steps < 1:
            raise InputError(f"{what} needs at least one step, and the trace has none")


def trace_scores(curves: Sequence[EntropyCurve]) -> dict[str, NDArray[np.float64]]:
    r"""What speaks for a trace, (N,) by name; the higher, the more it looks like the trace of a right answer.

    ================= ====================================== ==========================================================
    name              value                                  it says
    ================= ====================================== ==========================================================
    ``drop``          :math:`H_0 - H_K`                      the trace made the model surer
    ``falling``       minus the slope                        per step
    ``seldom_rising`` minus the share of rising steps        no step led back
    ``monotone``      minus Kendall's :math:`\tau_a`         the order of the entropies alone
    ``sure``          :math:`-H_K`                           the model is sure in the end
    ``short``         :math:`-K`                             nothing but length: what the others have to beat
    ================= ====================================== ==========================================================

    Args:
        curves: N curves of at least one step, of one kind of answer.

    Raises:
        InputError: for no curves.
        RowError: for a curve without steps.

    Source: arXiv 2508.20395.
    """
    if not len(curves):
        raise InputError("there is no curve: give at least one")
    bare = next((row for row, curve in enumerate(curves) if curve.num_steps < 1), None)
    if bare is not None:
        raise RowError("its trace has no steps, so that it has no slope: leave it out", row=f"trace {bare}")
    columns: dict[str, list[float]] = {
        "drop": [curve.drop() for curve in curves],
        "falling": [-curve.slope() for curve in curves],
        "seldom_rising": [-curve.share_rising() for curve in curves],
        "monotone": [-curve.monotonicity() for curve in curves],
        "sure": [-float(curve.entropy.value[-1]) for curve in curves],
        "short": [-float(curve.num_steps) for curve in curves],
    }
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
