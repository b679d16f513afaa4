"""Contrastive objectives on states: InfoNCE, and CLAPS with its hard negatives and hard positives.

CLAPS (arXiv 2012.07280) trains an encoder-decoder by maximum likelihood and, beside it, pulls together the pooled
states of source and target. Its hard negative is the target's states moved a little so that the target becomes
unlikely; its hard positive the same states moved far with the prediction left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.dense import Head, encoder_decoder_states, output_head
from loglik.objectives.base import Terms, require_positive
from loglik.objectives.perturbations import kl_preserving_perturbation, likelihood_adversarial, stepped

__all__ = ["Claps", "claps", "info_nce"]


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    tau: float = 0.1,
    positives: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    same: Tensor | None = None,
    cosine: bool = True,
) -> Tensor:
    r"""InfoNCE (B,): each query's cross-entropy, in nats, of picking its own key out of all keys of the batch.

    .. math::

        \ell_b = -\frac{s(q_b, k_b)}{\tau}
                 + \log \Bigl[\sum_{b'} e^{s(q_b, k_{b'})/\tau} + \sum_j e^{s(q_b, n_{bj})/\tau}\Bigr]

    Args:
        queries: (B, D), differentiable.
        keys: (B, D), the b-th the positive of the b-th query and a negative of the others.
        tau: temperature of the similarities.
        positives: (B, D) keys that take the place of a query's own as its positive; the own key is then left out.
        extra_negatives: (B, D) or (B, K, D) further negatives, each query's own.
        same: (B, B) bool, True where a key of another row is no negative of a query (two targets of one source); the
            diagonal is not looked at.
        cosine: similarities are cosines; else inner products. A vector of zeros is at a right angle to all.

    Raises:
        InputError: for a tau that is not positive, or shapes that do not fit.

    Source: arXiv 1807.03748.
    """
    require_positive("InfoNCE", tau=tau)
    if queries.dim() != 2 or not len(queries):
        raise InputError(f"InfoNCE needs queries (B, D), at least one, got {tuple(queries.shape)}")
    _same_shape("keys", keys, queries)
    left, right = _directions(queries, cosine), _directions(keys, cosine)
    logits = left @ right.T
    own = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    if positives is not None:
        _same_shape("positives", positives, queries)
        logits = torch.where(own, (left * _directions(positives, cosine)).sum(-1, keepdim=True), logits)
    if same is not None:
        if same.shape != own.shape or same.dtype != torch.bool:
            raise InputError(f"InfoNCE needs same of shape {tuple(own.shape)} and bool, got {tuple(same.shape)}")
        logits = logits.masked_fill(same & ~own, -math.inf)
    if extra_negatives is not None:
        extra = extra_negatives[:, None] if extra_negatives.dim() == 2 else extra_negatives
        if extra.dim() != 3 or (extra.shape[0], extra.shape[2]) != tuple(queries.shape):
            raise InputError(
                f"InfoNCE needs extra_negatives (B, D) or (B, K, D) for queries {tuple(queries.shape)}, got "
                f"{tuple(extra_negatives.shape)}"
            )
        logits = torch.cat([logits, (_directions(extra, cosine) @ left[..., None])[..., 0]], dim=1)
    index = torch.arange(len(queries), device=queries.device)
    return torch.nn.functional.cross_entropy(logits / tau, index, reduction="none")


def claps(
    encoder_states: Tensor,
    decoder_states: Tensor,
    head: Head,
    labels: Tensor,
    projection: Callable[[Tensor], Tensor],
    *,
    source_mask: Tensor,
    target_mask: Tensor,
    eps_neg: float = 0.3,
    eps_pos: float = 0.3,
    relative: bool = True,
    tau: float = 0.1,
    temperature_on_positive: bool = True,
    contrast_weight: float = 1.0,
    same_source: Tensor | None = None,
) -> Terms:
    r"""Maximum likelihood and two InfoNCE losses with adversarial states: one hard negative, one hard positive.

    .. math::

        L = L^\text{NLL} + \tfrac12 (L^- + L^+),\qquad
        L^- = \tfrac1B \sum_b -\log \operatorname{softmax}([S_{b\cdot}, s^-_b] / \tau)_b,\qquad
        L^+ = \tfrac1B \sum_b -\log \operatorname{softmax}(S_{b\cdot} / \tau)_b \big|_{S_{bb} = s^+_b}

    with cosines :math:`S_{bb'} = \cos(z^x_b, z^y_{b'})` of states that were projected and averaged over the tokens of
    source and target. :math:`s^-` belongs to `likelihood_adversarial` states; :math:`s^+` to states that took one step
    up the plain InfoNCE loss and a `kl_preserving_perturbation` back. The moved states are constants: through them
    gradients reach the projection and the source, and neither decoder nor head. No parameter's gradient is touched on
    the way.

    Args:
        encoder_states: (B, S, D), differentiable.
        decoder_states: (B, T, D), the states that predict `labels`; differentiable.
        head: hidden (..., D) to logits (..., V).
        labels: (B, T) token ids.
        projection: states (..., D) to (..., P), shared by both sides; the paper's is ReLU of a linear map.
        source_mask: (B, S) bool, True where a source token stands.
        target_mask: (B, T) bool, True where a label is scored.
        eps_neg: length of the step of the hard negative.
        eps_pos: length of both steps of the hard positive.
        relative: lengths are in units of the mean norm of the decoder states. The paper's 3.0 for both is absolute and
            belongs to T5-small with the factor :math:`D^{-1/2}` of its head already on the states.
        tau: temperature of the similarities.
        temperature_on_positive: divide by tau in :math:`L^+` as well, as the paper does; its released code does not.
        contrast_weight: factor on :math:`\tfrac12 (L^- + L^+)`.
        same_source: (B, B) bool, True where two rows have one source: their targets are then no negatives.

    Returns:
        The token mean of the likelihood and the mean over rows of the contrast, each over its own weights; metrics, all
        (B,): `nats_per_unit`, `contrast_negative`, `contrast_positive`, and the similarities `similarity`,
        `similarity_negative`, `similarity_positive`.

    Raises:
        InputError: for a row without source or target token, shapes that do not fit, or options that are not positive.

    Source: arXiv 2012.07280, as released (seanie12/CLAPS).
    """
    method = "CLAPS"
    require_positive(method, tau=tau, eps_neg=eps_neg, eps_pos=eps_pos, contrast_weight=contrast_weight)
    _check_states(method, encoder_states, source_mask, "source")
    _check_states(method, decoder_states, target_mask, "target")
    row = target_mask.nonzero()[:, 0]
    logits = head(decoder_states[target_mask])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = torch.nn.functional.cross_entropy(logits, labels[target_mask], reduction="none")
    count = target_mask.sum(1).to(nll.dtype)
    likelihood = Terms(nll.new_zeros(len(count)).index_add(0, row, nll), count)

    def pooled(states: Tensor, mask: Tensor) -> Tensor:
        return _mean(projection(states), mask)

    unit = 1.0
    if relative:
        unit = float(torch.linalg.vector_norm(decoder_states.detach()[target_mask].float(), dim=-1).mean())
    fixed_source, fixed_target = encoder_states.detach(), decoder_states.detach()
    imposter = likelihood_adversarial(fixed_target, head, labels, target_mask, eps=eps_neg * unit)

    def plain_contrast(states: Tensor) -> Tensor:
        with torch.no_grad():
            queries = pooled(fixed_source, source_mask)
        keys = pooled(fixed_target.masked_scatter(target_mask[..., None], states), target_mask)
        return info_nce(queries, keys, tau=tau, same=same_source).sum()

    away = stepped(fixed_target, target_mask, plain_contrast, eps_pos * unit)
    distant = kl_preserving_perturbation(fixed_target, away, head, target_mask, eps=eps_pos * unit)

    source, target = pooled(encoder_states, source_mask), pooled(decoder_states, target_mask)
    negative, positive = pooled(imposter, target_mask), pooled(distant, target_mask)
    against = info_nce(source, target, tau=tau, extra_negatives=negative, same=same_source)
    tau_positive = tau if temperature_on_positive else 1.0
    towards = info_nce(source, target, tau=tau_positive, positives=positive, same=same_source)
    metrics = {
        "nats_per_unit": likelihood.loss.detach() / count,
        "contrast_negative": against.detach(),
        "contrast_positive": towards.detach(),
        "similarity": _cosine(source, target),
        "similarity_negative": _cosine(source, negative),
        "similarity_positive": _cosine(source, positive),
    }
    contrast = 0.5 * contrast_weight * (against + towards)
    return likelihood + Terms(contrast, torch.ones_like(contrast), metrics)


class Claps(nn.Module):
    r"""`claps` with the projection it trains, ``relu(A v + a)``: an objective on an encoder-decoder.

    Its parameters have to be given to the optimizer beside the model's. They are no part of the trained model:
    inference is unchanged.

    Args:
        width: D of the states before the head.
        projected: P; D by default, as in the paper.
        eps_neg: as for `claps`, like the next five.
        eps_pos: length of both steps of the hard positive.
        relative: lengths are in units of the mean norm of the decoder states.
        tau: temperature of the similarities.
        temperature_on_positive: divide by tau in both losses.
        contrast_weight: factor on the contrast.
        drop_same_source: rows of one source are no negatives of one another.
    """

    def __init__(
        self,
        width: int,
        projected: int | None = None,
        *,
        eps_neg: float = 0.3,
        eps_pos: float = 0.3,
        relative: bool = True,
        tau: float = 0.1,
        temperature_on_positive: bool = True,
        contrast_weight: float = 1.0,
        drop_same_source: bool = True,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, projected or width)
        self.eps_neg, self.eps_pos, self.relative = eps_neg, eps_pos, relative
        self.tau, self.temperature_on_positive = tau, temperature_on_positive
        self.contrast_weight, self.drop_same_source = contrast_weight, drop_same_source

    def project(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., P), in the precision of the projection."""
        projected: Tensor = torch.relu(self.linear(states.to(self.linear.weight.dtype)))
        return projected

    def __call__(self, model: object, batch: TokenBatch) -> Terms:
        """Terms of B rows: what stands before `TokenBatch.starts` is the source, the scored tokens are the target.

        Raises:
            InputError: for anything but an encoder-decoder that can be taken apart; and as `claps`.
        """
        terms: Terms = super().__call__(model, batch)
        return terms

    def forward(self, model: object, batch: TokenBatch) -> Terms:
        """As `__call__`, without the hooks."""
        both = encoder_decoder_states(model, batch, method="CLAPS")
        device = both.decoder.device
        if self.linear.in_features != both.decoder.shape[-1]:
            raise InputError(
                f"CLAPS was made for states of width {self.linear.in_features}, and this model's have "
                f"{both.decoder.shape[-1]}: give that width"
            )
        scored = (batch.scored_mask & batch.attention_mask).to(device)
        stray = (scored & ~both.predicted).nonzero()
        if len(stray):
            raise InputError(f"CLAPS: row {int(stray[0, 0])} scores a token of its source: score what follows `starts`")
        same = None
        if self.drop_same_source:
            rows = torch.where(both.source_mask, _source_ids(batch.to(device), both.source_mask), -1)
            _, which = torch.unique(rows, dim=0, return_inverse=True)
            same = which[:, None] == which
        return claps(
            both.encoder,
            both.decoder,
            output_head(model, method="CLAPS"),
            batch.ids.to(device),
            self.project,
            source_mask=both.source_mask,
            target_mask=scored,
            eps_neg=self.eps_neg,
            eps_pos=self.eps_pos,
            relative=self.relative,
            tau=self.tau,
            temperature_on_positive=self.temperature_on_positive,
            contrast_weight=self.contrast_weight,
            same_source=same,
        )


def _source_ids(batch: TokenBatch, mask: Tensor) -> Tensor:
    """(B, S) source tokens, aligned left as the encoder's states are."""
    packed, _ = batch.packed_left()
    return packed.ids[:, : mask.shape[1]]


def _directions(vectors: Tensor, cosine: bool) -> Tensor:
    """Vectors of length one, in float32 or better; a vector of zeros stays, with a gradient that does not blow up."""
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    if not cosine:
        return wide
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / torch.where(norm > 0, norm, torch.ones_like(norm))


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """(B,) cosines row by row, detached."""
    return (_directions(left.detach(), True) * _directions(right.detach(), True)).sum(-1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, P) mean over the tokens of each row."""
    total = states.masked_fill(~mask[..., None], 0.0).sum(1)
    return total / mask.sum(1, keepdim=True).to(total.dtype)


def _same_shape(name: str, vectors: Tensor, queries: Tensor) -> None:
    if vectors.shape != queries.shape:
        raise InputError(f"InfoNCE needs {name} of shape {tuple(queries.shape)}, got {tuple(vectors.shape)}")


def _check_states(method: str, states: Tensor, mask: Tensor, side: str) -> None:
    if states.dim() != 3 or mask.shape != states.shape[:2] or mask.dtype != torch.bool:
        raise InputError(
            f"{method} needs {side} states (B, n, D) and a bool mask (B, n), got {tuple(states.shape)} and "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    empty = (~mask.any(1)).nonzero().flatten()
    if len(empty):
        raise InputError(f"{method}: row {int(empty[0])} has no {side} token: remove it")
