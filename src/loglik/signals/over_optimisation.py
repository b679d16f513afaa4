r"""When preference training goes too far: displacement, entropy that turns, mass that leaks.

Raising the likelihood of chosen completions, or their margin, does not track quality; a falling likelihood is healthy
up to a point. Two next-token statistics tell where the point is (arXiv 2410.11677). While the likelihood of the chosen
completions falls, a rising top-k entropy is a gain in diversity; an entropy that falls is probability moving onto
tokens that are not the data's (as under DPO and IPO); an entropy that rises while the top-k mass falls is probability
leaking into random tokens (as under the hinge loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.signals.uncertainty import top_k_indicators

__all__ = ["Evaluation", "Event", "EventKind", "Indicators", "LikelihoodMonitor", "indicators", "plot_monitor"]

EventKind = Literal["displacement", "entropy_turned", "mass_leaking"]


@dataclass(frozen=True, slots=True)
class Indicators:
    """One evaluation on validation pairs.

    Args:
        chosen: mean token log-likelihood of the chosen completions, nats per token, averaged over completions; of the
            policy alone, not divided by the reference.
        rejected: the same of the rejected ones.
        entropy: top-k entropy, bits, averaged over positions and then over completions.
        mass: top-k mass, averaged likewise.
    """

    chosen: float
    rejected: float
    entropy: float
    mass: float

    @property
    def margin(self) -> float:
        """`chosen` minus `rejected`, nats per token."""
        return self.chosen - self.rejected


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The `indicators` of one `step`."""

    step: int
    indicators: Indicators


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has lasted for as many evaluations as the monitor waits.

    Args:
        kind: ``displacement`` the chosen completions are less likely than at the start; ``entropy_turned`` meanwhile
            the entropy lies below its highest value; ``mass_leaking`` meanwhile the entropy rises and the mass lies
            below its first value.
        step: at which it was reported.
        since: step of the first evaluation that showed it.
        message: one sentence with the figures.
    """

    kind: EventKind
    step: int
    since: int
    message: str


class LikelihoodMonitor:
    r"""Reads a run's evaluations and reports when its likelihoods go too far.

    Every quantity is the mean of its last `window` evaluations (:math:`\bar c, \bar H, \bar M`; fewer at the start),
    compared with the first evaluation, which should come before training. An evaluation shows

    - displacement: :math:`\bar c_t < c_0 - \delta_c`;
    - an entropy that turned: displacement, and :math:`\bar H_t < \max_{s \le t} \bar H_s - \delta_H`;
    - leaking mass: displacement, :math:`\bar M_t < M_0 - \delta_M` and :math:`\bar H_t > \bar H_{t-1}`.

    An event is reported when `patience` evaluations in a row show it, once until one does not. Stop, or add likelihood
    of the chosen completions to the loss, at the first entropy or mass event; displacement alone is no reason to.

    The message says whether the entropy had risen before it fell: an entropy that falls from the first evaluation on
    also accompanies healthy sharpening. The paper gives the reading rule; window and patience are those of its
    algorithm as we read it, and the three tolerances are ours.

    Args:
        window: evaluations in a mean, at least 1.
        patience: evaluations in a row, at least 1.
        likelihood_tolerance: :math:`\delta_c`, nats per token.
        entropy_tolerance: :math:`\delta_H`, bits.
        mass_tolerance: :math:`\delta_M`.

    Raises:
        InputError: for an option out of range.

    Source: arXiv 2410.11677 (indicators), 2410.08847 (displacement).
    """

    def __init__(
        self,
        *,
        window: int = 3,
        patience: int = 3,
        likelihood_tolerance: float = 0.01,
        entropy_tolerance: float = 0.05,
        mass_tolerance: float = 0.01,
    ) -> None:
        for name, count in (("window", window), ("patience", patience)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {count}")
        tolerances = (
            ("likelihood_tolerance", likelihood_tolerance),
            ("entropy_tolerance", entropy_tolerance),
            ("mass_tolerance", mass_tolerance),
        )
        for name, value in tolerances:
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        self.window = window
        self.patience = patience
        self.likelihood_tolerance = likelihood_tolerance
        self.entropy_tolerance = entropy_tolerance
        self.mass_tolerance = mass_tolerance
        self.history: list[Evaluation] = []
        self.events: list[Event] = []
        self._smooth: list[Indicators] = []
        self._streaks: dict[EventKind, list[int]] = {"displacement": [], "entropy_turned": [], "mass_leaking": []}

    def update(self, step: int, indicators: Indicators) -> list[Event]:
        """Take in one evaluation.

        Args:
            step: of training; larger than the last one.
            indicators: of this step.

        Returns:
            The events that this evaluation completes, also kept in `events`; the evaluation is kept in `history`.

        Raises:
            InputError: for a step that does not follow, or a value that is not finite; nothing is taken in then.
        """
        if self.history and step <= self.history[-1].step:
            raise InputError(f"evaluations must come in order: step {step} follows step {self.history[-1].step}")
        for field in fields(indicators):
            value = getattr(indicators, field.name)
            if not math.isfinite(value):
                raise InputError(f"{field.name} of step {step} is {value}: the model cannot be read from it")
        self.history.append(Evaluation(step, indicators))
        self._smooth.append(self._mean(self.history[-self.window :]))
        found = []
        for kind, message in self._shown().items():
            streak = self._streaks[kind]
            if message is None:
                streak.clear()
                continue
            streak.append(step)
            if len(streak) == self.patience:
                found.append(Event(kind, step, streak[0], message))
        self.events += found
        return found

    @property
    def should_stop(self) -> bool:
        """Whether the entropy has turned or mass has leaked."""
        return any(event.kind != "displacement" for event in self.events)

    @staticmethod
    def _mean(evaluations: Sequence[Evaluation]) -> Indicators:
        own = [e.indicators for e in evaluations]
        return Indicators(*(math.fsum(getattr(i, f.name) for i in own) / len(own) for f in fields(Indicators)))

    def _shown(self) -> dict[EventKind, str | None]:
        """What the last evaluation shows, in words; None for what it does not."""
        first, now = self._smooth[0], self._smooth[-1]
        before = self._smooth[-2] if len(self._smooth) > 1 else now
        top = max(i.entropy for i in self._smooth)
        fell, dropped, leaked = first.chosen - now.chosen, top - now.entropy, first.mass - now.mass
        displaced = fell > self.likelihood_tolerance
        turned = displaced and dropped > self.entropy_tolerance
        leaking = displaced and leaked > self.mass_tolerance and now.entropy > before.entropy
        rise = top - first.entropy
        how = f"after rising by {rise:.3g}" if rise > self.entropy_tolerance else "without having risen before"
        return {
            "displacement": f"chosen completions lost {fell:.3g} nats per token since the start" if displaced else None,
            "entropy_turned": f"top-k entropy fell {dropped:.3g} bits below its maximum, {how}" if turned else None,
            "mass_leaking": f"top-k mass fell by {leaked:.3g} while the entropy rises" if leaking else None,
        }


@torch.no_grad()
def indicators(model: CausalLM, chosen: TokenBatch, rejected: TokenBatch, k: int = 10) -> Indicators:
    r"""One evaluation of a model on validation pairs, teacher-forced on their completions.

    .. math:: \frac{1}{B} \sum_b \frac{1}{|y_b|} \sum_t \log \pi(y_{b,t} \mid x_b, y_{b,<t})

    for chosen and for rejected, and the means of top-k entropy (bits, renormalised) and mass over the chosen ones'
    positions.

    Args:
        model: a causal model that can be taken apart into hidden states and head; two forward passes.
        chosen: B rows whose scored tokens are the completion.
        rejected: the same of the rejected completions.
        k: how many of the most probable tokens, from 1 to the vocabulary.

    Raises:
        InputError: for another kind of model, no rows, or a k out of range.
        RowError: for a row without scored tokens.

    Source: arXiv 2410.11677.
    """
    if not len(chosen) or not len(rejected):
        raise InputError("there are no pairs to evaluate: give at least one")
    own = top_k_indicators(model, chosen, k)
    other = top_k_indicators(model, rejected, 1)  # for its likelihood alone

    def mean(values: torch.Tensor) -> float:
        return float(values.double().mean())

    return Indicators(
        mean(own.log_likelihood.mean_per_unit().value),
        mean(other.log_likelihood.mean_per_unit().value),
        mean(own.entropy),
        mean(own.mass),
    )


def plot_monitor(history: Sequence[Evaluation], path: str | Path, *, events: Sequence[Event] = ()) -> None:
    """Draw likelihoods, entropy and mass over the steps, with a line at each event.

    Args:
        history: evaluations, such as `LikelihoodMonitor.history`.
        path: where to; the suffix is the format (png, svg, pdf).
        events: to mark, such as `LikelihoodMonitor.events`.

    Raises:
        InputError: without evaluations, for a format that cannot be written, or where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: install loglik[plots]") from None
    if not history:
        raise InputError("there is no evaluation to plot yet")
    figure = Figure(figsize=(7, 7), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in canvas.get_supported_filetypes():
        known = ", ".join(sorted(canvas.get_supported_filetypes()))
        raise InputError(f"a plot cannot be written to {str(path)!r}: end its name in one of {known}")
    steps = [e.step for e in history]
    panels = (
        ("log-likelihood (nats per token)", ("chosen", "rejected")),
        ("top-k entropy (bits)", ("entropy",)),
        ("top-k mass", ("mass",)),
    )
    for axis, (label, names) in zip(figure.subplots(len(panels), 1, sharex=True), panels, strict=True):
        for name in names:
            axis.plot(steps, [getattr(e.indicators, name) for e in history], marker=".", label=name)
        for event in events:
            axis.axvline(event.step, color="tab:red", linewidth=1, linestyle="--")
        axis.set_ylabel(label)
        if len(names) > 1:
            axis.legend()
        if axis.get_subplotspec().is_first_row():
            axis.set_title(", ".join(f"{e.kind} at {e.step}" for e in events) or "no event", fontsize="medium")
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("step")
    figure.savefig(path)
