r"""h-calibration: monotone maps of probabilities, fitted so that every window of similar ones comes true.

Each pair of row and class is an event with a probability and an outcome. Events are sorted by probability; in each
window of neighbours the summed probability is compared with the number of outcomes (arXiv 2506.17968). Unlike the
likelihood this asks for calibration alone: a map that contains the truth is fitted as well, and more precisely, by its
likelihood (``objective="nll"``), because the likelihood is a proper score. Compare both on held-out rows.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from loglik.errors import InputError
from loglik.signals.class_log_probs import checked_log_probs, checked_rows
from loglik.signals.monotone_maps import (
    MonotoneNetwork,
    MonotonePiecewiseLinear,
    TemperatureEnsemble,
    require_size,
)

__all__ = [
    "HCalibration",
    "h_calibration_loss",
    "probability_clusters",
]

Weighting = Literal["cluster", "mean"]


def h_calibration_loss(
    probs: Tensor,
    labels: Tensor,
    *,
    window: int = 201,
    epsilon: float = 0.0,
    weighting: Weighting = "cluster",
    clusters: int | Tensor = 15,
    leave_one_class_out: bool = False,
    full_ends: bool = False,
) -> Tensor:
    r"""Mean gap between probability and frequency over sliding windows of similar probabilities.

    .. math:: T_j = \frac1M \sum_{|k - j| \le (M-1)/2} \bigl( p_{(k)} - o_{(k)} \bigr), \qquad
              e_j = \max(|T_j| - \varepsilon, 0)

    over the events :math:`(p_{ic}, 1[y_i = c])` sorted by p. The loss is the mean of :math:`e_j` within each cluster of
    similar p, averaged over clusters: small probabilities are many and would else decide alone. The order and the
    clusters carry no gradient. Of equal probabilities the earlier row and class comes first.

    At the true probabilities the loss is not 0 but noise of the order of :math:`M^{-1/2}`. Windows of fewer than about
    50 events chase that noise; a window of all events is always balanced, whatever the map. Probabilities are added, so
    that it does not matter here whether one is 1e-4 or 1e-12: labels that were thought nearly impossible can cost many
    nats after such a fit.

    Args:
        probs: (N, C) probabilities, rows summing to 1; differentiable.
        labels: (N,) long, true classes.
        window: M, odd. At the ends what is missing counts as 0 with the divisor M.
        epsilon: gap that costs nothing.
        weighting: ``cluster`` as above, or ``mean`` over all windows.
        clusters: how many, found by `probability_clusters`, or their edges as it gives them, to keep them between
            steps (a loss whose clusters change jumps).
        leave_one_class_out: average over classes k of the loss on the rows that have another label. It conditions on
            outcomes, so that with unequal class frequencies it is not least at the truth.
        full_ends: divide by the number of events in the window instead of M, which else weighs the smallest and the
            largest probabilities less.

    Returns:
        () in the dtype of `probs`, at least 0.

    Raises:
        InputError: for shapes that do not fit, probabilities outside [0, 1], labels out of range, or options out of
            range.

    Source: arXiv 2506.17968, whose code forms the same difference as :math:`p (1 - o) - (1 - p) o` and multiplies the
    loss by 1e5.
    """
    _check_loss(probs, labels, window, epsilon, weighting)
    if not leave_one_class_out:
        return _windowed(probs, labels, window, epsilon, weighting, clusters, full_ends=full_ends)
    kept = [labels != k for k in range(probs.shape[1])]
    parts = [
        _windowed(probs[keep], labels[keep], window, epsilon, weighting, clusters, full_ends=full_ends)
        for keep in kept
        if bool(keep.any())
    ]
    return torch.stack(parts).mean()


def probability_clusters(probs: Tensor, clusters: int = 15, *, steps: int = 100) -> Tensor:
    """Edges between clusters of similar probabilities: k-means in one dimension, started from equal widths.

    Args:
        probs: any shape; detached here.
        clusters: at least 1. Clusters that lose all members disappear.
        steps: of Lloyd's iteration, at most.

    Returns:
        (C - 1,) rising edges for C <= `clusters` clusters, in the dtype of `probs`.

    Raises:
        InputError: for clusters below 1 or no probabilities.
    """
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
        raise InputError(f"clusters must be a whole number of at least 1, got {clusters!r}")
    values = probs.detach().flatten().sort().values
    if not len(values):
        raise InputError("there are no probabilities to cluster")
    wide = values.double()
    total = torch.cat([wide.new_zeros(1), wide.cumsum(0)])
    low, high = float(wide[0]), float(wide[-1])
    centres = low + (high - low) * (torch.arange(clusters, dtype=wide.dtype, device=wide.device) + 0.5) / clusters
    for _ in range(steps):
        # In one dimension a cluster is an interval, so that its members are found by their ends.
        inner = torch.searchsorted(wide, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(wide))])
        count = ends.diff()
        new = (total[ends].diff() / count)[count > 0]
        if new.shape == centres.shape and bool(torch.equal(new, centres)):
            break
        centres = new
    return ((centres[1:] + centres[:-1]) / 2).to(values.dtype)


class HCalibration:
    """Fits a monotone map of log-probabilities by the windowed calibration error, or by the likelihood.

    Full-batch Adam in float64 with a learning rate that falls to 0 along a cosine. Clusters are found anew every
    `recluster` steps. Accuracy does not change: the maps keep the order of classes.

    Args:
        mapping: ``piecewise`` (20 segments), ``temperatures`` (16), ``network`` (16 units), or a module from (N, C)
            float64 log-probabilities to such; it is trained in place.
        objective: ``h`` for `h_calibration_loss`, ``nll`` for the likelihood of the labels.
        window: as there; at most half of the N x C events.
        epsilon: as there.
        weighting: as there.
        clusters: as there.
        leave_one_class_out: as there.
        steps: of Adam.
        learning_rate: its first one.
        recluster: steps between clusterings.

    Attributes:
        map_: the fitted module.
        losses_: the objective before each step.
        num_classes_: C.

    Raises:
        InputError: for options out of range.

    Source: arXiv 2506.17968.
    """

    map_: nn.Module
    losses_: list[float]
    num_classes_: int

    def __init__(
        self,
        mapping: Literal["piecewise", "temperatures", "network"] | nn.Module = "piecewise",
        *,
        objective: Literal["h", "nll"] = "h",
        window: int = 201,
        epsilon: float = 0.0,
        weighting: Weighting = "cluster",
        clusters: int = 15,
        leave_one_class_out: bool = False,
        steps: int = 300,
        learning_rate: float = 0.05,
        recluster: int = 10,
    ) -> None:
        if not isinstance(mapping, nn.Module) and mapping not in ("piecewise", "temperatures", "network"):
            raise InputError(f"mapping must be piecewise, temperatures, network or a module, got {mapping!r}")
        if objective not in ("h", "nll"):
            raise InputError(f"objective must be h or nll, got {objective!r}")
        require_size(steps, "steps")
        require_size(recluster, "recluster")
        _require_window(window)
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, got {learning_rate}")
        self.mapping = mapping
        self.objective = objective
        self.window = window
        self.epsilon = epsilon
        self.weighting: Weighting = weighting
        self.clusters = clusters
        self.leave_one_class_out = leave_one_class_out
        self.steps = steps
        self.learning_rate = learning_rate
        self.recluster = recluster

    def fit(self, logits: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> Self:
        """Fit the map on held-out rows.

        Args:
            logits: (N, C) logits or log-probabilities, all finite.
            labels: (N,) true classes, whole numbers from 0.

        Raises:
            InputError: for rows that are no distribution or have probabilities of 0, labels out of range, unequal
                lengths, a window of more than half of the events, or a map whose loss is no number.
        """
        values, classes = checked_log_probs(logits, labels, normalised=False)
        gone = np.flatnonzero(~np.isfinite(values).all(1))
        if len(gone):
            raise InputError(f"row {int(gone[0])} has a probability of 0: smooth it, or leave the class out")
        if self.objective == "h" and 2 * self.window > values.size:
            raise InputError(
                f"a window of {self.window} is more than half of the {values.size} events, where every map looks "
                "calibrated: use more rows or a smaller window"
            )
        log_probs, target = torch.from_numpy(values).log_softmax(1), torch.from_numpy(classes)
        made = {"piecewise": MonotonePiecewiseLinear, "temperatures": TemperatureEnsemble, "network": MonotoneNetwork}
        module = self.mapping if isinstance(self.mapping, nn.Module) else made[self.mapping]()
        optimizer = torch.optim.Adam(module.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        losses, edges = [], torch.zeros(0)
        for step in range(self.steps):
            with torch.enable_grad():
                mapped = module(log_probs)
                if self.objective == "nll":
                    loss = torch.nn.functional.nll_loss(mapped, target)
                else:
                    probs = mapped.exp()
                    if step % self.recluster == 0 and self.weighting == "cluster":
                        edges = probability_clusters(probs, self.clusters)
                    loss = h_calibration_loss(
                        probs.clamp(max=1.0),
                        target,
                        window=self.window,
                        epsilon=self.epsilon,
                        weighting=self.weighting,
                        clusters=edges,
                        leave_one_class_out=self.leave_one_class_out,
                    )
                if not bool(torch.isfinite(loss)):
                    raise InputError(
                        f"the loss is {float(loss)} at step {step}: lower learning_rate or use another map"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        self.map_, self.losses_ = module, losses
        self.num_classes_ = values.shape[1]
        return self

    @torch.no_grad()
    def predict_log_proba(self, logits: Tensor | ArrayLike) -> Tensor:
        """Recalibrated log-probabilities (M, C), float64, of (M, C) logits or log-probabilities.

        Raises:
            InputError: before `fit`, for rows that are no distribution, or another number of classes.
        """
        if not hasattr(self, "map_"):
            raise InputError("HCalibration has no map yet: call fit first")
        values = checked_rows(logits, normalised=False)
        if values.shape[1] != self.num_classes_:
            raise InputError(f"the map was fitted on {self.num_classes_} classes, got {values.shape[1]}")
        mapped: Tensor = self.map_(torch.from_numpy(values).log_softmax(1))
        return mapped

    def transform(self, logits: Tensor | ArrayLike) -> Tensor:
        """The same as `predict_log_proba`."""
        return self.predict_log_proba(logits)


def _windowed(
    probs: Tensor,
    labels: Tensor,
    window: int,
    epsilon: float,
    weighting: Weighting,
    clusters: int | Tensor,
    *,
    full_ends: bool,
) -> Tensor:
    """The loss on all rows."""
    outcomes = torch.nn.functional.one_hot(labels, probs.shape[1])
    flat, order = probs.flatten(), probs.detach().flatten().argsort(stable=True)
    residual = (flat - outcomes.flatten())[order]
    # Sums of windows are differences of running sums: in float64, where a few of 1e6 terms lose nothing.
    running = torch.nn.functional.pad(residual.double().cumsum(0), (1, 0))
    place = torch.arange(len(residual), device=probs.device)
    low, high = (place - window // 2).clamp(min=0), (place + window // 2 + 1).clamp(max=len(residual))
    divisor = (high - low) if full_ends else window
    gap = (((running[high] - running[low]) / divisor).abs() - epsilon).relu()
    if weighting == "mean":
        return gap.mean().to(probs.dtype)
    edges = probability_clusters(flat, clusters) if isinstance(clusters, int) else clusters.to(probs)
    cluster = torch.searchsorted(edges, flat.detach()[order], right=True)
    size = len(edges) + 1
    total = gap.new_zeros(size).index_add_(0, cluster, gap)
    count = torch.bincount(cluster, minlength=size)
    return (total[count > 0] / count[count > 0]).mean().to(probs.dtype)


def _require_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise InputError(f"window must be an odd whole number, so that it has a middle, got {window!r}")


def _check_loss(probs: Tensor, labels: Tensor, window: int, epsilon: float, weighting: str) -> None:
    if probs.dim() != 2 or not probs.numel() or labels.shape != probs.shape[:1] or labels.dtype != torch.long:
        raise InputError(
            f"probabilities (N, C) need labels (N,) of int64, got {tuple(probs.shape)} and {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    bad = (~((probs >= 0) & (probs <= 1 + 1e-6))).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise InputError(f"probabilities must lie in [0, 1], got {float(probs[row, column])} in row {row}")
    off = ((labels < 0) | (labels >= probs.shape[1])).nonzero()
    if len(off):
        raise InputError(
            f"labels must be from 0 to {probs.shape[1] - 1}, got {int(labels[off[0]])} in row {int(off[0])}"
        )
    _require_window(window)
    if not 0 <= epsilon < math.inf:
        raise InputError(f"epsilon must be at least 0 and finite, got {epsilon}")
    if weighting not in ("cluster", "mean"):
        raise InputError(f"weighting must be cluster or mean, got {weighting!r}")
