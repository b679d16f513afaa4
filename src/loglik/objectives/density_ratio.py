"""Density-ratio objectives: the log-ratio of model and reference as a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_positive
from loglik.objectives.pairs import reference_ratio

__all__ = ["ddo"]


def ddo(
    real: LogLikelihood,
    reference_real: LogLikelihood,
    fake: LogLikelihood,
    reference_fake: LogLikelihood,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Terms:
    r"""Direct discriminative optimisation: tell data from samples of the frozen reference by the log-ratio.

    .. math:: L = -E_\text{data} \log\sigma(\beta R) - \alpha\, E_{p_\text{ref}} \log(1 - \sigma(\beta R)), \qquad
              R = \log p_\theta - \log p_\text{ref}

    With :math:`\alpha = \beta = 1` the minimiser over all distributions is the data's, for any reference that covers
    it; with other values it is not. At :math:`\theta = \text{ref}` the loss is :math:`(1 + \alpha) \log 2`.

    Two means: one over the real rows, one over the fake rows; their numbers may differ. Metrics, detached, per row of
    either: ``log_prob_real``, ``log_ratio_real``, ``accuracy_real`` (1 where the ratio is positive), and
    ``log_prob_fake``, ``log_ratio_fake``, ``accuracy_fake`` (1 where it is not).

    Args:
        real: (B,) log-likelihoods of data under the model, nats.
        reference_real: (B,) of the same under the reference; detached.
        fake: (F,) of samples of the reference under the model.
        reference_fake: (F,) of the same under the reference; detached.
        alpha: weight of the samples.
        beta: scale of the log-ratio; about 1 over its size where it would saturate the logistic function.

    Raises:
        InputError: for a missing reference, rows or lengths that do not fit, an upper bound, an unknown constant that
            does not cancel, or an option that is not positive.

    Source: arXiv 2503.01103.
    """
    require_positive("DDO", alpha=alpha, beta=beta)
    data = _side("real", real, reference_real, beta)
    samples = _side("fake", fake, reference_fake, -beta)
    return data + alpha * samples


def _side(name: str, policy: LogLikelihood, reference: LogLikelihood, beta: float) -> Terms:
    r""":math:`-\log\sigma(\beta R)` of the rows of one side; a negative beta asks for the other label."""
    ratio = reference_ratio("DDO", policy, reference, absolute=True).value
    logit = beta * ratio
    seen: Tensor = ratio.detach()
    metrics = {
        f"log_prob_{name}": policy.value.detach(),
        f"log_ratio_{name}": seen,
        f"accuracy_{name}": ((seen > 0) == (beta > 0)).to(seen.dtype),
    }
    return Terms(F.softplus(-logit), torch.ones_like(seen), metrics)
