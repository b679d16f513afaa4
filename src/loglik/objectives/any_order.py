r"""Objectives of any-order marginals (MaM): order-agnostic likelihood, self-consistency, and two energy-based terms.

A random order :math:`\sigma` of the D entries and a step d in 1 to D cut a vector in three: the d - 1 entries before
the step, the entry of the step, and the rest. `Steps` holds orders as ranks, not as permutations: the entries before
step d are those of rank below d - 1, the entry of the step has rank d - 1, and step D completes the vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.any_order import AnyOrderMarginals, random_orders
from loglik.objectives.base import Terms, require_positive

__all__ = [
    "Steps",
    "draw_steps",
    "flow_matching",
    "kl_reinforce",
    "marginal_self_consistency",
    "order_agnostic_nll",
    "self_consistency_residual",
]


class Steps(NamedTuple):
    """A random order and a step of it for every row.

    Attributes:
        ranks: (B, D) long, the place 0 to D - 1 of each entry in its row's order (the order's inverse).
        step: (B,) long, 1 to D.
    """

    ranks: Tensor
    step: Tensor

    @property
    def previous(self) -> Tensor:
        """(B, D) bool, the step - 1 entries known before the step."""
        return self.ranks < self.step[:, None] - 1

    @property
    def target(self) -> Tensor:
        """(B, D) bool, the one entry of the step."""
        return self.ranks == self.step[:, None] - 1

    @property
    def current(self) -> Tensor:
        """(B, D) bool, the entries known after the step: all of them at step D."""
        return self.ranks < self.step[:, None]


def draw_steps(
    n: int, dims: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Steps:
    """Uniform orders and uniform steps, independent of each other and of other rows.

    Args:
        n: rows.
        dims: D.
        generator: of all random numbers.
        device: of the result.
    """
    # Ranks are the inverse of a permutation, and the inverse of a uniform one is uniform too.
    ranks = random_orders(n, dims, generator=generator, device=device).argsort(-1)
    home = device if generator is None else generator.device
    step = torch.randint(1, dims + 1, (n,), generator=generator, device=home).to(device)
    return Steps(ranks, step)


def order_agnostic_nll(
    model: AnyOrderMarginals, x: Tensor, generator: torch.Generator | None = None, *, steps: Steps | None = None
) -> Terms:
    r"""Negative log-likelihood of the conditional network, averaged over all orders in expectation: one pass.

    .. math:: L(x; \sigma, d) = -\frac{D}{D - d + 1} \sum_{i: \text{rank}(i) \ge d - 1}
              \log p_\phi(x_i \mid x_{\sigma(<d)}), \qquad
              E_{\sigma, d} L = -E_\sigma \sum_t \log p_\phi(x_{\sigma_t} \mid x_{\sigma_{<t}})

    Every entry that is still unknown could be the next one of the order, so all of them are scored in one pass. Only
    the conditional network gets a gradient.

    Args:
        model: whose conditional network is trained.
        x: (B, D) long, data.
        generator: of the orders and steps.
        steps: orders and steps instead of random ones.

    Returns:
        A mean over rows, nats per vector.

    Raises:
        InputError: for no rows, a shape that does not fit, or an entry that is no value.

    Source: arXiv 2310.12920, stage 1; the estimator is that of order-agnostic autoregressive models (2110.02037).
    """
    steps = _steps("order_agnostic_nll", model, x, generator, steps)
    log_p = model.log_conditionals(x, steps.previous).gather(-1, x[..., None]).squeeze(-1)
    unknown = log_p.masked_fill(steps.previous, 0.0).sum(-1)
    share = (model.dims - steps.step + 1).to(unknown.dtype) / model.dims
    loss = -unknown / share
    return Terms(loss, torch.ones_like(loss.detach()))


def self_consistency_residual(l_prev: Tensor, log_p_cond: Tensor, l_curr: Tensor) -> Tensor:
    r"""(B,) how far one step is from adding up, nats: 0 everywhere exactly if marginals and conditionals agree.

    .. math:: r = l(x_{\sigma(<d)}) + \log p_\phi(x_{\sigma(d)} \mid x_{\sigma(<d)}) - l(x_{\sigma(\le d)})

    With r = 0 for every value of the entry, :math:`l(x_S) = \log \sum_k e^{l(x_S, x_d = k)}`.

    Args:
        l_prev: (B,) marginals before the step.
        log_p_cond: (B,) log-probability of the entry of the step.
        l_curr: (B,) marginals after it.

    Raises:
        InputError: for shapes that differ.

    Source: arXiv 2310.12920.
    """
    if not l_prev.shape == log_p_cond.shape == l_curr.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (l_prev, log_p_cond, l_curr))
        raise InputError(f"the three terms of a residual must have one shape, got {shapes}")
    return l_prev + log_p_cond - l_curr


def marginal_self_consistency(
    model: AnyOrderMarginals,
    x: Tensor,
    generator: torch.Generator | None = None,
    *,
    freeze_conditionals: bool,
    log_normalizer: Tensor | float = 0.0,
    steps: Steps | None = None,
) -> Terms:
    r"""Squared residual of one random step per row, with an anchor at the empty set.

    .. math:: L = D\, E_{x, \sigma, d}\, r(x, \sigma, d)^2 + \bigl(l(\emptyset) - c\bigr)^2

    The rows decide where the networks agree: partial states that they never visit are not trained.

    Metrics, detached: ``residual`` (B,), the size of r, and ``anchor`` (1,), that of :math:`l(\emptyset) - c`.

    Args:
        model: both networks.
        x: (B, D) long, data, samples, or a mixture of both.
        generator: of the orders and steps.
        freeze_conditionals: the gradient reaches the marginal network alone (stage 2 of maximum likelihood); otherwise
            both (energy-based training).
        log_normalizer: c, nats; 0 for a normalised model. A tensor gets its gradient.
        steps: orders and steps instead of random ones.

    Returns:
        Two means that are added: over rows, and over the one anchor.

    Raises:
        InputError: for no rows, a shape that does not fit, or an entry that is no value.

    Source: arXiv 2310.12920.
    """
    steps = _steps("marginal_self_consistency", model, x, generator, steps)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_conditionals):
        log_p = model.log_conditionals(x, steps.previous).gather(-1, x[..., None]).squeeze(-1)
        log_p_cond = log_p.masked_fill(~steps.target, 0.0).sum(-1)
    both = model.log_marginal(torch.cat([x, x]), torch.cat([steps.previous, steps.current]))
    l_prev, l_curr = both[: len(x)], both[len(x) :]
    residual = self_consistency_residual(l_prev, log_p_cond, l_curr)
    gap = (model.log_normalizer() - log_normalizer).reshape(1)
    seen = {"residual": residual.detach().abs(), "anchor": gap.detach().abs()}
    agreement = Terms(model.dims * residual.square(), torch.ones_like(seen["residual"]), seen)
    return agreement + Terms(gap.square(), torch.ones_like(seen["anchor"]))


def kl_reinforce(l_x: Tensor, log_density: Tensor, *, eps: float = 1e-8) -> Terms:
    r"""Gradient of :math:`\text{KL}(p_\theta \,\|\, p)` to a target :math:`p \propto e^f` from the model's own samples.

    .. math:: L = \frac{1}{B} \sum_b A_b\, l_\theta(x_b), \qquad
              A = \frac{a - \text{mean}(a)}{\text{std}(a) + \epsilon}, \qquad a_b = \text{sg}[l_\theta(x_b)] - f(x_b)

    REINFORCE with the batch mean as its baseline: the constant of f and that of l drop out. The value of the loss means
    nothing, its gradient does; dividing by the batch's spread (ddof 1) keeps that of one size wherever the model is, so
    the learning rate has to fall towards the end.

    Metrics, detached: ``log_ratio`` (B,), a.

    Args:
        l_x: (B,) log-marginals of whole vectors that the model drew, nats.
        log_density: (B,) f(x), minus the energy; detached.
        eps: nats, keeps the division finite where all a are equal.

    Raises:
        InputError: for less than two rows, shapes that differ, values of f that are not finite, or an eps that is not
            positive.

    Source: arXiv 2310.12920.
    """
    require_positive("kl_reinforce", eps=eps)
    target = _target("kl_reinforce", l_x, log_density)
    if len(l_x) < 2:
        raise InputError(f"kl_reinforce compares samples with each other: give at least 2 rows, got {len(l_x)}")
    ratio = l_x.detach() - target
    advantage = (ratio - ratio.mean()) / (ratio.std() + eps)
    return Terms(advantage * l_x, torch.ones_like(ratio), {"log_ratio": ratio})


def flow_matching(l_x: Tensor, log_density: Tensor) -> Terms:
    r"""Regression of the log-marginals of whole vectors on an unnormalised log-density, on rows from anywhere.

    .. math:: L = \frac{1}{2B} \sum_b \bigl(l_\theta(x_b) - f(x_b)\bigr)^2

    With self-consistency this makes :math:`l(x_S)` the unnormalised log-marginal and :math:`l(\emptyset)` the
    :math:`\log Z` of :math:`e^f`: adding c to f adds c to both and leaves the conditionals alone.

    Metrics, detached: ``log_ratio`` (B,), :math:`l - f`.

    Args:
        l_x: (B,) log-marginals of whole vectors, nats.
        log_density: (B,) f(x), minus the energy; detached.

    Raises:
        InputError: for shapes that differ, no rows, or values of f that are not finite.

    Source: arXiv 2310.12920.
    """
    target = _target("flow_matching", l_x, log_density)
    gap = l_x - target
    return Terms(0.5 * gap.square(), torch.ones_like(target), {"log_ratio": gap.detach()})


def _steps(
    method: str, model: AnyOrderMarginals, x: Tensor, generator: torch.Generator | None, steps: Steps | None
) -> Steps:
    """The steps that are given, or new ones; after a check of the rows."""
    model.require_complete(x)
    if not len(x):
        raise InputError(f"{method} is a mean over rows: give at least one")
    if steps is None:
        return draw_steps(len(x), model.dims, generator=generator, device=x.device)
    if steps.ranks.shape != x.shape or steps.step.shape != x.shape[:1]:
        raise InputError(
            f"{method}: ranks and steps must have shapes {tuple(x.shape)} and ({len(x)},), got "
            f"{tuple(steps.ranks.shape)} and {tuple(steps.step.shape)}"
        )
    return steps


def _target(method: str, l_x: Tensor, log_density: Tensor) -> Tensor:
    """The log-density in the dtype of the marginals, without its graph."""
    if l_x.dim() != 1 or l_x.shape != log_density.shape:
        raise InputError(
            f"{method} compares (B,) marginals with (B,) values of the log-density, got shapes {tuple(l_x.shape)} and "
            f"{tuple(log_density.shape)}"
        )
    if not len(l_x):
        raise InputError(f"{method} is a mean over rows: give at least one")
    target = log_density.detach().to(l_x.dtype)
    wrong = (~target.isfinite()).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{method}: row {row} has log-density {float(target[row])}; every vector needs a finite one")
    return target
