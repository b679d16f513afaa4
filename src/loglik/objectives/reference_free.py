r"""Preference objectives without a reference: losses of B pairs under the policy alone.

Arguments of every function, (B,) each, in nats, summed over the scored tokens: ``chosen`` and ``rejected``, of the two
completions under the policy; gradients flow through both. In the formulas :math:`l_w` and :math:`l_l` are these sums
and :math:`\bar l = l / |y|` their means per token. Every loss is one term per pair, averaged over pairs;
:math:`\text{NLL}(y_w)` is a mean over the tokens of all chosen completions.

Metrics (B,), detached: ``rewards_chosen`` and ``rewards_rejected`` (the scale times what the loss compares),
``margin`` (their difference), ``accuracy`` (1 where the margin is positive), ``log_prob_chosen`` and
``log_prob_rejected`` (sums).

Every function raises `InputError` for rows that do not fit, an upper bound, an unknown constant that does not cancel,
rows without tokens where a mean per token is taken, or an option out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.objectives.base import Terms, require_positive
from loglik.objectives.pairs import (
    hinge_terms,
    logistic_terms,
    require_non_negative,
    with_likelihood,
    without_reference,
)

__all__ = ["cpo", "hinge", "orpo", "simpo", "slic"]


def hinge(chosen: LogLikelihood, rejected: LogLikelihood, *, gamma: float = 0.05) -> Terms:
    r"""RSO's hinge loss without a reference: :math:`L = \max(0,\, 1 - \gamma (l_w - l_l))`.

    It is :math:`\gamma` times `slic` with :math:`\delta = 1/\gamma`.

    Source: arXiv 2309.06657.
    """
    require_positive("hinge", gamma=gamma)
    return hinge_terms(without_reference("hinge", chosen, rejected), slope=gamma, margin=1.0)


def slic(chosen: LogLikelihood, rejected: LogLikelihood, *, delta: float = 1.0, nll_weight: float = 0.0) -> Terms:
    r"""Sequence likelihood calibration from feedback (SLiC-HF).

    .. math:: L = \max(0,\, \delta - l_w + l_l) + \lambda\, \text{NLL}(y_w)

    `delta` is a margin in nats, `nll_weight` :math:`\lambda \ge 0`. The paper's regulariser is a sum over the tokens of
    the supervised target; here it is the mean over the tokens of the chosen completion.

    Source: arXiv 2305.10425.
    """
    require_positive("SLiC", delta=delta)
    terms = hinge_terms(without_reference("SLiC", chosen, rejected), slope=1.0, margin=delta)
    return with_likelihood("SLiC", terms, chosen, nll_weight)


def simpo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Terms:
    r"""Simple preference optimisation: rewards per token and a target margin.

    .. math:: L = -\log\sigma\!\left(\beta (\bar l_w - \bar l_l) - \gamma\right)

    `gamma` :math:`\ge 0` is the margin that the rewards should differ by; `label_smoothing` in [0, 1/2] as in DPO. The
    metric ``margin`` is :math:`\beta (\bar l_w - \bar l_l)`, before gamma.

    Source: arXiv 2405.14734.
    """
    require_non_negative("SimPO", gamma=gamma)
    scores = without_reference("SimPO", chosen, rejected, per_unit=True)
    return logistic_terms("SimPO", scores, beta=beta, label_smoothing=label_smoothing, margin=gamma)


def cpo(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Terms:
    r"""Contrastive preference optimisation: DPO under a uniform reference, plus likelihood.

    .. math:: L = -\log\sigma(\beta (l_w - l_l)) + \lambda\, \text{NLL}(y_w)

    `nll_weight` :math:`\lambda \ge 0`; `label_smoothing` in [0, 1/2] as in DPO.

    Source: arXiv 2401.08417.
    """
    scores = without_reference("CPO", chosen, rejected)
    terms = logistic_terms("CPO", scores, beta=beta, label_smoothing=label_smoothing)
    return with_likelihood("CPO", terms, chosen, nll_weight)


def orpo(chosen: LogLikelihood, rejected: LogLikelihood, *, beta: float = 0.1) -> Terms:
    r"""Odds-ratio preference optimisation: likelihood plus a penalty on the odds of the rejected completion.

    .. math:: L = \text{NLL}(y_w) - \beta \log\sigma\!\left(\log\frac{\text{odds}_w}{\text{odds}_l}\right), \qquad
              \log\text{odds} = \bar l - \log(1 - e^{\bar l})

    Rewards are :math:`\beta \bar l`, as TRL logs them; the metric ``log_odds_ratio`` is what the loss sees. TRL's
    likelihood covers the prompt as well, this one the scored tokens.

    Raises:
        InputError: also for a positive mean, which no probability has.

    Source: arXiv 2403.07691.
    """
    require_positive("ORPO", beta=beta)
    scores = without_reference("ORPO", chosen, rejected, per_unit=True)
    ratio = _log_odds(scores.chosen) - _log_odds(scores.rejected)
    terms = scores.terms(-beta * F.logsigmoid(ratio), scale=beta)
    terms.metrics["log_odds_ratio"] = ratio.detach()
    return with_likelihood("ORPO", terms, chosen, 1.0)


_ROUNDING = 1e-4  # nats per token that a log-probability of 0 may exceed it by


def _log_odds(mean: Tensor) -> Tensor:
    r""":math:`\log p - \log(1 - p)` of log-probabilities (B,)."""
    above = (mean > _ROUNDING).nonzero().flatten()
    if len(above):
        raise InputError(
            f"ORPO needs probabilities, and row {int(above[0])} has a mean log-probability of "
            f"{float(mean[above[0]]):g} > 0: densities have no odds"
        )
    # A certain token has infinite odds. No gradient is lost: that of log p is 1 - p = 0 there.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).tiny)
    return mean - torch.log(-torch.expm1(mean))  # expm1 keeps 1 - p where p is nearly 1
