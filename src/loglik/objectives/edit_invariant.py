r"""Edit-invariant sequence loss: target n-grams are matched wherever they occur, not only where they stand.

A token-by-token loss punishes a sequence that is right but for one inserted word at every later token. Here each n-gram
of the target looks for its place among all positions of the model: a convolution over log-probabilities and a soft
choice of position (arXiv 2106.15078).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.dense import scored_logits
from loglik.objectives.base import Terms, require_positive

__all__ = ["PositionSelection", "edit_invariant", "eisl", "ngram_match_log_probs"]

PositionSelection = Literal["gumbel", "softmax", "uniform", "logsumexp"]
_METHOD = "the edit-invariant loss"


def ngram_match_log_probs(log_probs: Tensor, targets: Tensor, n: int, *, floor: float = -20.0) -> Tensor:
    r"""Log-probability of every target n-gram at every position, by a convolution along the diagonals.

    .. math:: \log g_{i'i} = \sum_{j<n} \max(\log p_{i'+j}(y^*_{i+j}),\ \text{floor})

    Exact where positions are independent of one another (non-autoregressive models, given their input); elsewhere each
    factor is conditioned on the prefix that the model was given. Then
    :math:`\sum_{i'} g_{i'i} = \mathbb{E}[C(y^*_{i:i+n}, y)]`, the expected number of occurrences in a sample.

    Args:
        log_probs: (B, T, V) normalised log-probabilities at the model's positions, nats; differentiable.
        targets: (B, S) token ids.
        n: length of the n-grams, 1 <= n <= min(T, S).
        floor: log-probabilities below it count as it and get no gradient, nats.

    Returns:
        (B, T - n + 1, S - n + 1) nats; the released code's convolution is this divided by n.

    Raises:
        InputError: for positive log-probabilities (raw logits), shapes that do not fit, or an n that does not.
    """
    return _diagonal_sums(_matches(log_probs, targets, floor), n)


def eisl(
    log_probs: Tensor,
    targets: Tensor,
    *,
    ngrams: Sequence[int] = (2, 3, 4),
    weights: Sequence[float] | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    position_selection: PositionSelection = "gumbel",
    tau: float = 1.0,
    floor: float = -20.0,
    sharpen: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Edit-invariant sequence loss (B,) of each row, nats per token (per n-gram for ``"logsumexp"``).

    .. math::

        A_{i'i} = \tfrac1n \log g_{i'i},\qquad
        L_n = -\frac{1}{S-n+1} \sum_i \sum_{i'} q_{i'i} A_{i'i},\qquad
        q_{\cdot i} = \operatorname{softmax}_{i'}\bigl((A_{i'i} + \text{noise}) / \tau\bigr),\qquad
        L = \sum_n w_n L_n

    with :math:`g` of `ngram_match_log_probs`, over S target tokens and T positions. The gradient flows through
    :math:`q` as well. With n = S = T there is one position and L is the mean token cross-entropy; with n = 1 the order
    of the target's tokens does not count at all, and beyond n tokens it hardly does: add cross-entropy where it must.

    Args:
        log_probs: (B, T, V) normalised log-probabilities, nats; differentiable.
        targets: (B, S) token ids.
        ngrams: lengths. 0 stands for the row's own target length, -k for k less; what is longer than a row's target or
            positions (or, below 0, shorter than one token) is left out of that row.
        weights: positive, one per length; equal and summing to one by default. Weights of lengths that a row leaves out
            go to its others, in proportion.
        target_mask: (B, S) bool, True where a target token is real; n-grams that touch others are left out of the mean.
        position_mask: (B, T) bool, the same for positions, which are then never chosen.
        position_selection: ``"gumbel"`` adds fresh Gumbel noise at every call (the paper's), ``"softmax"`` none (for
            evaluation), ``"uniform"`` takes the mean over positions (the plain Jensen bound, which collapses in
            training), and ``"logsumexp"`` gives :math:`-\log \mathbb{E}[C]` itself,
            :math:`-\log \sum_{i'} g_{i'i}`, exact for non-autoregressive models.
        tau: temperature of the choice.
        floor: as for `ngram_match_log_probs`; a confidently wrong model gets no signal below it: start from a model
            trained by cross-entropy.
        sharpen: choose by :math:`\log g = nA` instead of the mean per token: n times as sharp.
        generator: of the noise, on the CPU.

    Raises:
        InputError: for positive log-probabilities, shapes or masks that do not fit, bad options, or a row whose target
            is shorter than every length asked for.

    Source: arXiv 2106.15078, equations 1-8, as released (guangyliu/EISL), with masks, which the release lacks.
    """
    _check_options(ngrams, weights, position_selection, tau)
    matches = _matches(log_probs, targets, floor)
    targets_real = _mask("target_mask", target_mask, targets.shape, targets.device)
    positions_real = _mask("position_mask", position_mask, log_probs.shape[:2], log_probs.device)
    choice = _Choice(position_selection, tau, sharpen, generator)
    return _loss(matches, targets_real, positions_real, ngrams, weights, choice)


def edit_invariant(
    model: object,
    batch: TokenBatch,
    *,
    ngrams: Sequence[int] = (2, 3, 4),
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    ce_weight: float = 1.0,
    position_selection: PositionSelection = "gumbel",
    tau: float = 1.0,
    floor: float = -20.0,
    sharpen: bool = False,
    generator: torch.Generator | None = None,
) -> Terms:
    r"""`eisl` of the scored tokens, plus cross-entropy: the loss to train a model with.

    .. math:: L = \text{weight} \cdot \frac1B \sum_b L^\text{EISL}_b + \text{ce\_weight} \cdot L^\text{CE}

    This is the approximation for autoregressive models: position i' predicts after the *given* prefix of the target
    (teacher forcing), so that :math:`\log g` is not the probability that the model itself would write the n-gram there.
    The release does the same; its paper describes prefixes sampled from the model.

    Args:
        model: a causal or encoder-decoder network.
        batch: B rows; the scored tokens of each are its target, and the model's positions are theirs. N-grams across an
            unscored token are left out.
        ngrams: as for `eisl`.
        weights: as for `eisl`.
        weight: of the edit-invariant loss, a mean over sequences.
        ce_weight: of the cross-entropy, a mean over tokens; 0 leaves it out.
        position_selection: as for `eisl`.
        tau: as for `eisl`.
        floor: as for `eisl`; the cross-entropy has none.
        sharpen: as for `eisl`.
        generator: of the noise, on the CPU; the global one by default.

    Returns:
        Two means, each over its own weights; metrics `eisl` (B,) and `nats_per_unit` (B,).

    Raises:
        InputError: as for `eisl`, for another model, or a row without scored tokens.

    Source: arXiv 2106.15078.
    """
    _check_options(ngrams, weights, position_selection, tau)
    if not (0 <= ce_weight < math.inf and 0 < weight < math.inf):
        raise InputError(f"{_METHOD}: weight must be positive and ce_weight at least 0, got {weight} and {ce_weight}")
    logits = scored_logits(model, batch, method=_METHOD)
    packed, _ = batch.to(logits.device).packed_left()
    empty = (~packed.scored_mask.any(1)).nonzero().flatten()
    if len(empty):
        raise InputError(f"{_METHOD}: row {int(empty[0])} has no scored token: remove it")
    row, column = packed.scored_mask.nonzero(as_tuple=True)
    slot = column - packed.scored_mask.int().argmax(1)[row]
    width = int(slot.max()) + 1
    real = torch.zeros(len(batch), width, dtype=torch.bool, device=logits.device)
    real[row, slot] = True
    targets = packed.ids.new_zeros(len(batch), width).index_put((row, slot), packed.ids[row, column])
    # Of all logits only those of the row's own targets are kept: (N, S) in place of (N, V).
    chosen = logits.gather(1, targets[row]) - logits.logsumexp(-1, keepdim=True)
    every = chosen.new_zeros(len(batch), width, width).index_put((row, slot), chosen)
    choice = _Choice(position_selection, tau, sharpen, generator)
    edit = _loss(every.clamp(min=_checked_floor(floor)), real, real, ngrams, weights, choice)
    nll = -every.diagonal(dim1=1, dim2=2).sum(1)  # 0 where nothing is scored
    count = real.sum(1).to(nll.dtype)
    metrics = {"eisl": edit.detach(), "nats_per_unit": nll.detach() / count}
    terms = weight * Terms(edit, torch.ones_like(edit), metrics)
    return terms if ce_weight == 0 else terms + ce_weight * Terms(nll, count)


class _Choice:
    """How a target n-gram chooses among positions."""

    def __init__(
        self, selection: PositionSelection, tau: float, sharpen: bool, generator: torch.Generator | None
    ) -> None:
        self.selection, self.tau, self.sharpen, self.generator = selection, tau, sharpen, generator

    def cost(self, log_g: Tensor, n: int, usable: Tensor) -> Tensor:
        """(B, S') cost of every n-gram, from (B, T', S') log-probabilities of matches and (B, T') usable positions."""
        blocked = ~usable[..., None]
        if self.selection == "logsumexp":
            return -log_g.masked_fill(blocked, -math.inf).logsumexp(1)
        mean = log_g / n
        scores = torch.zeros_like(mean) if self.selection == "uniform" else (log_g if self.sharpen else mean) / self.tau
        if self.selection == "gumbel":
            scores = scores + self._noise(mean) / self.tau
        chosen = scores.masked_fill(blocked, -math.inf).softmax(1)
        return -(chosen * mean.masked_fill(blocked, 0.0)).sum(1)

    def _noise(self, like: Tensor) -> Tensor:
        drawn = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=self.generator)
        return -drawn.clamp(min=1e-300).log().to(like)


def _loss(
    matches: Tensor,
    targets_real: Tensor,
    positions_real: Tensor,
    ngrams: Sequence[int],
    weights: Sequence[float] | None,
    choice: _Choice,
) -> Tensor:
    """(B,) weighted sums over n, from (B, T, S) log-probabilities of target tokens at positions."""
    shares = [1.0] * len(ngrams) if weights is None else [float(w) for w in weights]
    total = matches.new_zeros(len(matches))
    used = matches.new_zeros(len(matches))
    for wanted, share in zip(ngrams, shares, strict=True):
        for n, long in _lengths(wanted, targets_real, positions_real):
            valid, usable = _runs(targets_real[long], n), _runs(positions_real[long], n)
            fits = valid.any(1) & usable.any(1)
            rows, valid, usable = long[fits], valid[fits], usable[fits]
            if not len(rows):
                continue
            cost = choice.cost(_diagonal_sums(matches[rows], n), n, usable)
            mean = cost.masked_fill(~valid, 0.0).sum(1) / valid.sum(1)
            total = total.index_add(0, rows, share * mean)
            used = used.index_add(0, rows, torch.full_like(mean, share).detach())
    short = (used == 0).nonzero().flatten()
    if len(short):
        row = int(short[0])
        tokens, positions = int(targets_real[row].sum()), int(positions_real[row].sum())
        raise InputError(
            f"{_METHOD}: row {row} has {tokens} target tokens at {positions} positions, too few for n-grams of "
            f"{', '.join(map(str, ngrams))}: add 1 to ngrams, or remove the row"
        )
    return total / used * (1.0 if weights is None else sum(shares))


def _lengths(wanted: int, targets_real: Tensor, positions_real: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every n that `wanted` stands for in some row, with those rows."""
    length = targets_real.sum(1)
    most = torch.minimum(length, positions_real.sum(1))
    resolved = torch.full_like(length, wanted) if wanted > 0 else length + wanted
    fits = (resolved >= 1) & (resolved <= most)
    for n in sorted(set(resolved[fits].tolist())):
        yield n, (fits & (resolved == n)).nonzero().flatten()


def _runs(real: Tensor, n: int) -> Tensor:
    """(B, T - n + 1) bool, True where n real columns begin."""
    return real.unfold(1, n, 1).all(-1)


def _matches(log_probs: Tensor, targets: Tensor, floor: float) -> Tensor:
    """(B, T, S) log-probability of every target token at every position, no lower than the floor."""
    if log_probs.dim() != 3 or targets.dim() != 2 or len(log_probs) != len(targets):
        raise InputError(
            f"{_METHOD} needs log_probs (B, T, V) and targets (B, S), got {tuple(log_probs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{_METHOD} needs float32 or float64 log-probabilities, got {log_probs.dtype}")
    if not log_probs.numel() or not targets.numel():
        raise InputError(f"{_METHOD} needs at least one row, position and target token")
    vocabulary = log_probs.shape[2]
    if not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise InputError(
            f"{_METHOD}: a target is no token of the vocabulary of {vocabulary}; mask padding, and fill it"
        )
    found = log_probs.gather(2, targets[:, None, :].expand(-1, log_probs.shape[1], -1))
    worst = (~(found.detach() <= 1e-4)).nonzero()
    if len(worst):
        value = float(found.detach()[tuple(worst[0])])
        raise InputError(
            f"{_METHOD}: row {int(worst[0, 0])} has a log-probability of {value:g}; give log_softmax outputs"
        )
    return found.clamp(min=_checked_floor(floor))


def _diagonal_sums(matches: Tensor, n: int) -> Tensor:
    """(B, T - n + 1, S - n + 1) sums of n entries down each diagonal."""
    height, width = matches.shape[1] - n + 1, matches.shape[2] - n + 1
    if n < 1 or height < 1 or width < 1:
        raise InputError(f"{_METHOD}: n must lie between 1 and {min(matches.shape[1:])}, got {n}")
    total = matches[:, :height, :width]
    for j in range(1, n):
        total = total + matches[:, j : j + height, j : j + width]
    return total


def _mask(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise InputError(
            f"{_METHOD}: {name} must be bool of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask.to(device)


def _checked_floor(floor: float) -> float:
    if not -math.inf < floor < 0:
        raise InputError(f"{_METHOD}: floor must be negative and finite, got {floor}")
    return floor


def _check_options(
    ngrams: Sequence[int], weights: Sequence[float] | None, selection: PositionSelection, tau: float
) -> None:
    require_positive(_METHOD, tau=tau)
    if selection not in get_args(PositionSelection):
        known = ", ".join(get_args(PositionSelection))
        raise InputError(f"{_METHOD}: position_selection must be one of {known}, got {selection!r}")
    if not ngrams or any(not isinstance(n, int) or isinstance(n, bool) for n in ngrams):
        raise InputError(f"{_METHOD}: ngrams must be whole numbers, at least one, got {ngrams!r}")
    if weights is not None and len(weights) != len(ngrams):
        raise InputError(f"{_METHOD}: {len(ngrams)} lengths of n-grams need as many weights, got {len(weights)}")
    for weight in weights or ():
        require_positive(_METHOD, weights=weight)
