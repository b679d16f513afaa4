r"""LAME: correct a batch's class probabilities at test time by what its neighbours say, without touching the model.

New assignments stay near the model's and agree between rows that lie close in feature space (arXiv 2201.05718). This
helps where neighbours share labels: streams sorted by class or scene. It uses no labels and no gradient, and keeps
nothing between batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError
from loglik.signals.class_log_probs import checked_rows
from loglik.signals.detection import as_numbers

__all__ = [
    "Affinity",
    "LameResult",
    "knn_affinity",
    "lame",
    "lame_objective",
    "lame_stream",
    "linear_affinity",
    "rbf_affinity",
]

Affinity = Literal["knn", "rbf", "linear"]

# Width of the rbf kernel where all features coincide.
_NARROWEST = 1e-6


@dataclass(frozen=True, slots=True)
class LameResult:
    """Adjusted assignments and how they were found.

    Args:
        log_probs: (N, K) adjusted log-probabilities, float64, nats.
        objective: F of the model's own assignments and after each step, nats; never rises if the affinity is positive
            semi-definite (rbf, linear).
        energy: half of G of each step's assignments and the ones before; never rises for any symmetric affinity, and
            equals F where the steps come to rest.
        converged: whether the last step moved no probability by more than the tolerance.
    """

    log_probs: Tensor
    objective: tuple[float, ...]
    energy: tuple[float, ...]
    converged: bool

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.energy)


def lame(
    log_probs: Tensor | ArrayLike,
    features: Tensor | ArrayLike | None = None,
    *,
    affinity: Affinity | Tensor = "knn",
    k: int = 5,
    lam: float = 1.0,
    symmetrize: bool = True,
    max_steps: int = 100,
    tolerance: float = 1e-8,
) -> LameResult:
    r"""Laplacian-adjusted maximum likelihood of a batch's labels.

    .. math:: \min_Z F(Z) = \sum_i \mathrm{KL}(z_i \| q_i) - \frac{\lambda}{2} \sum_{ij} w_{ij} \, z_i \cdot z_j,
              \qquad Z \leftarrow \mathrm{softmax}(\log Q + \lambda W Z)

    from Z = Q, all rows at once: each step minimises F with its concave second term made linear. For a W with negative
    eigenvalues (``knn``) F may rise; what then still falls is
    :math:`G(Z, Z') = \mathrm{KL}(Z \| Q) + \mathrm{KL}(Z' \| Q) - \lambda \sum_{ij} w_{ij} z_i \cdot z'_j`
    of consecutive assignments, which a step minimises in the first argument, so that the iteration ends in a fixed
    point or in a cycle of two (`converged` is then False).

    On random streams ``knn`` costs little; ``rbf`` and ``linear`` connect every pair of rows, and with batches of many
    classes can pull all rows to one label. A batch of one row keeps its prediction (with ``knn``).

    Args:
        log_probs: (N, K) nats, the model's, rows normalised. A class of probability 0 stays there.
        features: (N, D) representations of the same rows, such as hidden states before the classifier; they are scaled
            to norm 1. Not needed if the affinity is given.
        affinity: ``knn``, ``rbf``, ``linear`` (see the functions of these names) or (N, N) numbers.
        k: neighbours, for knn and rbf; at most as many as there are.
        lam: weight of the neighbours, at least 0. For :math:`\lambda \|W\| < 1` the minimum is unique.
        symmetrize: use :math:`(W + W^\top) / 2`. The released code does not; the derivation needs it, and without it
            neither F nor G need fall.
        max_steps: at least 1.
        tolerance: largest change of a probability at which to stop.

    Raises:
        InputError: for rows that are no distribution, features that are not finite or have norm 0, unequal lengths,
            or options out of range.

    Source: arXiv 2201.05718; its code stops by the relative change of its energy instead.
    """
    if not 0 <= lam < math.inf:
        raise InputError(f"lam must be at least 0 and finite, got {lam}")
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance must be at least 0 and finite, got {tolerance}")
    _require_count(max_steps, "max_steps")
    prior = torch.from_numpy(checked_rows(log_probs)).log_softmax(1)
    weights = _weights(affinity, features, k, len(prior))
    if symmetrize:
        weights = (weights + weights.T) / 2
    current, divergence = prior, prior.new_zeros(())
    objective, energy, converged = [_objective(prior, prior, weights, lam)], [], False
    for _ in range(max_steps):
        pull = weights @ current.exp()
        new = (prior + lam * pull).log_softmax(1)
        new_divergence = _divergence(new, prior)
        energy.append(float((divergence + new_divergence - lam * (new.exp() * pull).sum()) / 2))
        moved = float((new.exp() - current.exp()).abs().max())
        current, divergence = new, new_divergence
        objective.append(_objective(current, prior, weights, lam))
        if moved <= tolerance:
            converged = True
            break
    return LameResult(current, tuple(objective), tuple(energy), converged)


def lame_stream(
    log_probs: Tensor | ArrayLike,
    features: Tensor | ArrayLike,
    *,
    batch_size: int = 64,
    affinity: Affinity = "knn",
    k: int = 5,
    lam: float = 1.0,
) -> Tensor:
    """`lame` on consecutive batches of a stream; nothing is kept between them.

    Args:
        log_probs: (N, K) nats, in the order of the stream.
        features: (N, D) of the same rows.
        batch_size: rows per batch; the last one may have fewer, and a last row alone keeps its prediction.
        affinity: as in `lame`.
        k: as there.
        lam: as there.

    Returns:
        (N, K) adjusted log-probabilities, float64, nats.

    Raises:
        InputError: as `lame`, or for a batch size below 1.

    Source: arXiv 2201.05718.
    """
    _require_count(batch_size, "batch_size")
    rows, values = checked_rows(log_probs), as_numbers(features, "features")
    if values.ndim != 2 or len(values) != len(rows):
        raise InputError(f"each of {len(rows)} rows needs its features, got {values.shape}")
    _unit(values)  # refused under the row's number in the stream, not in its batch
    parts = []
    for first in range(0, len(rows), batch_size):
        own = slice(first, first + batch_size)
        if len(rows[own]) == 1:
            parts.append(torch.from_numpy(rows[own]).log_softmax(1))
        else:
            parts.append(lame(rows[own], values[own], affinity=affinity, k=k, lam=lam).log_probs)
    return torch.cat(parts)


def lame_objective(
    assignments: Tensor | ArrayLike, log_probs: Tensor | ArrayLike, weights: Tensor, *, lam: float = 1.0
) -> float:
    """F of any assignments, nats: what `lame` minimises.

    Args:
        assignments: (N, K) log-probabilities, rows normalised.
        log_probs: (N, K) the model's.
        weights: (N, N) affinity.
        lam: weight of the neighbours.

    Returns:
        +inf where an assignment uses a class that the model gives probability 0.

    Raises:
        InputError: for rows that are no distribution, or shapes that do not fit.

    Source: arXiv 2201.05718.
    """
    prior, new = (torch.from_numpy(checked_rows(rows)).log_softmax(1) for rows in (log_probs, assignments))
    if new.shape != prior.shape:
        raise InputError(f"assignments must have the shape {tuple(prior.shape)} of log_probs, got {tuple(new.shape)}")
    return _objective(new, prior, _given(weights, len(prior)), lam)


def knn_affinity(features: Tensor | ArrayLike, k: int = 5) -> Tensor:
    r""":math:`w_{ij} = 1` if j is among the k rows nearest to i, never i itself; neither symmetric nor definite.

    Args:
        features: (N, D), scaled to norm 1 here. Of equal distances the earlier row is not sure to win.
        k: neighbours; N - 1 if there are fewer.

    Returns:
        (N, N) float64 of 0 and 1.

    Raises:
        InputError: for features that are not finite or have norm 0, or k below 1.

    Source: arXiv 2201.05718.
    """
    _require_count(k, "k")
    distances = _distances(_unit(features))
    distances.fill_diagonal_(torch.inf)  # by index: with duplicates the nearest row need not be the row itself
    near = distances.topk(min(k, len(distances) - 1), largest=False).indices
    return torch.zeros_like(distances).scatter_(1, near, 1.0)


def rbf_affinity(features: Tensor | ArrayLike, k: int = 5) -> Tensor:
    r""":math:`w_{ij} = \exp(-\|f_i - f_j\|^2 / (2 \sigma^2))`, positive definite, 1 on the diagonal.

    :math:`\sigma` is the mean distance of a row to its k-th nearest one, where the row itself is the first.

    Args:
        features: (N, D), scaled to norm 1 here.
        k: from 2; N if there are fewer rows.

    Returns:
        (N, N) float64.

    Raises:
        InputError: for features that are not finite or have norm 0, or k below 2.

    Source: arXiv 2201.05718.
    """
    _require_count(k, "k")
    if k == 1:
        raise InputError("k must be at least 2 for rbf: the first neighbour is the row itself, at distance 0")
    distances = _distances(_unit(features))
    width = distances.kthvalue(min(k, len(distances)), dim=1).values.mean().clamp(min=_NARROWEST)
    return torch.exp(-(distances**2) / (2 * width**2))


def linear_affinity(features: Tensor | ArrayLike) -> Tensor:
    r""":math:`w_{ij} = f_i \cdot f_j`, positive semi-definite; negative for features that point apart.

    Args:
        features: (N, D), scaled to norm 1 here.

    Returns:
        (N, N) float64.

    Raises:
        InputError: for features that are not finite or have norm 0.

    Source: arXiv 2201.05718.
    """
    unit = _unit(features)
    return unit @ unit.T


def _weights(affinity: Affinity | Tensor, features: Tensor | ArrayLike | None, k: int, rows: int) -> Tensor:
    if isinstance(affinity, Tensor):
        return _given(affinity, rows)
    if affinity not in ("knn", "rbf", "linear"):
        raise InputError(f"affinity must be knn, rbf, linear or an (N, N) tensor, got {affinity!r}")
    if features is None:
        raise InputError(f"the {affinity} affinity needs features (N, D) of the rows: give them, or an affinity (N, N)")
    values = as_numbers(features, "features")
    if values.shape[:1] != (rows,):
        raise InputError(f"each of {rows} rows needs its features, got {values.shape}")
    if affinity == "linear":
        return linear_affinity(values)
    return knn_affinity(values, k) if affinity == "knn" else rbf_affinity(values, k)


def _given(weights: Tensor, rows: int) -> Tensor:
    if weights.shape != (rows, rows) or not bool(torch.isfinite(weights).all()):
        raise InputError(f"an affinity must be finite and of shape {(rows, rows)}, got {tuple(weights.shape)}")
    return weights.detach().cpu().double()


def _unit(features: Tensor | ArrayLike) -> Tensor:
    """(N, D) float64, rows of norm 1."""
    values = torch.from_numpy(as_numbers(features, "features").astype("float64"))
    if values.dim() != 2 or not len(values):
        raise InputError(f"features must have shape (N, D), got {tuple(values.shape)}")
    norm = values.norm(dim=1, keepdim=True)
    bad = (~(torch.isfinite(norm) & (norm > 0))).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise InputError(f"the features of row {row} have norm {float(norm[row, 0])}, so that they have no direction")
    unit: Tensor = values / norm
    return unit


def _distances(unit: Tensor) -> Tensor:
    """(N, N) Euclidean, by differences: from inner products near ones would be lost to rounding."""
    return torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")


def _divergence(log_z: Tensor, prior: Tensor) -> Tensor:
    """() sum of KL(z || q), where 0 log 0 is 0."""
    return torch.where(log_z == -torch.inf, 0.0, log_z.exp() * (log_z - prior)).sum()


def _objective(log_z: Tensor, prior: Tensor, weights: Tensor, lam: float) -> float:
    z = log_z.exp()
    return float(_divergence(log_z, prior) - lam / 2 * (z * (weights @ z)).sum())


def _require_count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
