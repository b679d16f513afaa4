r"""Small moves of hidden states with a known effect on the prediction: against the likelihood, or leaving it alone.

A move is one step of a given length along a gradient that goes through the head only. The gradients are taken at
detached copies, so that neither the network's parameters nor their gradients are touched, and what comes back is a
constant (arXiv 2012.07280).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from loglik.errors import InputError

__all__ = ["kl_preserving_perturbation", "likelihood_adversarial", "stepped"]

Head = Callable[[Tensor], Tensor]

_TINY = 1e-12  # a gradient of zero has no direction: it moves nothing


def likelihood_adversarial(hidden: Tensor, head: Head, labels: Tensor, mask: Tensor, *, eps: float | Tensor) -> Tensor:
    r"""States moved so that their labels become less likely: one step up the negative log-likelihood, per token.

    .. math:: \tilde h_t = h_t + \epsilon\, g_t / (\lVert g_t \rVert_2 + 10^{-12}),\qquad
        g_t = \nabla_{h_t} \bigl[-\log \operatorname{softmax}(\text{head}(h_t))_{y_t}\bigr]

    To first order the negative log-likelihood of a token rises by :math:`\epsilon \lVert g_t \rVert`.

    Args:
        hidden: (B, T, D) states before the head.
        head: hidden (N, D) to logits (N, V).
        labels: (B, T) token ids; what stands where the mask is False is not looked at.
        mask: (B, T) bool, True where a state predicts its label; others stay where they are.
        eps: Euclidean length of the step; negative steps make the labels more likely.

    Returns:
        (B, T, D) detached, in the dtype of `hidden`.

    Raises:
        InputError: for shapes that do not fit, or an eps that is not finite.

    Source: arXiv 2012.07280, equation 5.
    """
    _check("the adversarial perturbation", hidden, mask, eps)
    if labels.shape != mask.shape:
        raise InputError(f"labels must have shape {tuple(mask.shape)} like the mask, got {tuple(labels.shape)}")

    def negative_log_likelihood(states: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(_wide(head(states)), labels[mask], reduction="sum")

    return stepped(hidden, mask, negative_log_likelihood, eps)


def kl_preserving_perturbation(
    hidden: Tensor, moved: Tensor, head: Head, mask: Tensor, *, eps: float | Tensor
) -> Tensor:
    r"""States `moved` away from `hidden`, taken a step back towards the predictions of `hidden`, per token.

    .. math:: \hat h_t = h'_t - \epsilon\, k_t / (\lVert k_t \rVert_2 + 10^{-12}),\qquad
        k_t = \nabla_{h'_t} \mathrm{KL}\bigl(\operatorname{softmax}(\text{head}(h_t)) \,\|\,
        \operatorname{softmax}(\text{head}(h'_t))\bigr)

    Where nothing was moved the gradient is zero, and nothing moves.

    Args:
        hidden: (B, T, D) states before the head, whose predictions are to be kept.
        moved: (B, T, D) where they were moved to.
        head: hidden (N, D) to logits (N, V).
        mask: (B, T) bool, True where states predict; others stay at `moved`.
        eps: Euclidean length of the step.

    Returns:
        (B, T, D) detached, in the dtype of `moved`.

    Raises:
        InputError: for shapes that do not fit, or an eps that is not finite.

    Source: arXiv 2012.07280, equations 7-8.
    """
    method = "the KL-preserving perturbation"
    _check(method, hidden, mask, eps)
    if moved.shape != hidden.shape:
        raise InputError(f"{method} needs two sets of states of shape {tuple(hidden.shape)}, got {tuple(moved.shape)}")

    def divergence(states: Tensor) -> Tensor:
        with torch.no_grad():
            kept = _wide(head(hidden[mask])).log_softmax(-1)
        now = _wide(head(states)).log_softmax(-1)
        return torch.nn.functional.kl_div(now, kept, reduction="sum", log_target=True)

    return stepped(moved, mask, divergence, -eps, at_rest=hidden)


def stepped(
    start: Tensor,
    mask: Tensor,
    function: Callable[[Tensor], Tensor],
    eps: float | Tensor,
    *,
    at_rest: Tensor | None = None,
) -> Tensor:
    r"""One step of length `eps` up the gradient of a function of states, direction by direction of each token.

    Args:
        start: (B, T, D) where the step starts; detached.
        mask: (B, T) bool, True where states move.
        function: of the N masked states (N, D), in row-major order, to a number.
        eps: length of the step; negative steps go down.
        at_rest: (B, T, D) where the gradient is known to be zero: states that start there stay there, where rounding
            would have given them a direction.

    Returns:
        (B, T, D) detached.
    """
    # Gradients are recorded whoever calls: evaluation asks for perturbations too.
    with torch.inference_mode(False), torch.enable_grad():
        begin = start.detach()[mask].clone()
        leaf = begin.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
    if at_rest is not None:
        still = (begin == at_rest.detach()[mask]).all(-1, keepdim=True)
        gradient = gradient.masked_fill(still, 0.0)
    wide = _wide(gradient)
    direction = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + _TINY)
    return start.detach().masked_scatter(mask[..., None], begin + (eps * direction).to(begin.dtype))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check(method: str, hidden: Tensor, mask: Tensor, eps: float | Tensor) -> None:
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2] or mask.dtype != torch.bool:
        raise InputError(
            f"{method} needs states (B, T, D) and a bool mask (B, T), got {tuple(hidden.shape)} and {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    size = float(eps)
    if not math.isfinite(size):
        raise InputError(f"{method}: eps must be finite, got {size}")
