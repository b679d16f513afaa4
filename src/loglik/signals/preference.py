r"""Signals about preference pairs: hidden-state similarity before training, likelihood displacement after it.

Preference training can lower the likelihood of the *chosen* completion. It does so where chosen and rejected are alike
in hidden states, which the CHES score measures from one forward pass of each (arXiv 2410.08847).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.paths import scaled_rope_start
from loglik.models.tokens import widened
from loglik.models.trunk import Trunk, evaluating

__all__ = [
    "Displacement",
    "causal_trunk",
    "ches_score",
    "ches_scores",
    "edit_similarity",
    "filter_by_ches",
    "last_state_similarities",
    "last_state_similarity",
    "likelihood_displacement",
    "predicting_states",
]

# Tokens per forward pass: the hidden states of all of them exist at once.
_PASS_TOKENS = 1 << 14


def ches_score(
    chosen_states: Tensor,
    chosen_mask: Tensor,
    rejected_states: Tensor,
    rejected_mask: Tensor,
    *,
    length_normalise: bool = False,
) -> Tensor:
    r"""Centred hidden-embedding similarity of preference pairs; the larger, the more displacement.

    .. math:: \mathrm{CHES} = \langle S^+, S^- \rangle - \lVert S^+ \rVert^2, \quad S = \sum_{k=1}^{|y|} h_{x, y_{<k}}

    With `length_normalise` the sums are means, :math:`\langle m^+, m^- \rangle - \lVert m^+ \rVert^2`. The plain score
    grows with the square of the length: compare it, or set a threshold, among pairs of one length only.

    Args:
        chosen_states: (B, T, D) states as the head receives them (after the final norm), any floating dtype.
        chosen_mask: (B, T) bool, True at the |y| states that *predict* the completion's tokens, from the last token
            of the prompt to the last but one of the completion. What stands elsewhere is ignored.
        rejected_states: (B, T', D).
        rejected_mask: (B, T') bool.
        length_normalise: divide each sum by its number of states.

    Returns:
        (B,) float32 or better, summed in float64; 0 where both completions have the same states.

    Raises:
        InputError: for shapes that do not fit.
        RowError: for a row without states.

    Source: arXiv 2410.08847.
    """
    chosen, count = _sums(chosen_states, chosen_mask, "chosen")
    rejected, rejected_count = _sums(rejected_states, rejected_mask, "rejected")
    _same_shape(chosen, rejected)
    if length_normalise:
        chosen, rejected = chosen / count[:, None], rejected / rejected_count[:, None]
    # One product of a difference: two products of like size would cancel.
    return (chosen * (rejected - chosen)).sum(-1).to(widened(chosen_states[:0]).dtype)


def last_state_similarity(
    chosen_states: Tensor, chosen_mask: Tensor, rejected_states: Tensor, rejected_mask: Tensor
) -> Tensor:
    r"""Inner product of the last states, a baseline for `ches_score`.

    .. math:: \langle h_{x, y^+}, h_{x, y^-} \rangle

    Args:
        chosen_states: (B, T, D).
        chosen_mask: (B, T) bool; the last column that is True names the state, for the paper's baseline that of the
            completion's last token.
        rejected_states: (B, T', D).
        rejected_mask: (B, T') bool.

    Returns:
        (B,) float32 or better.

    Raises:
        InputError: for shapes that do not fit.
        RowError: for a row without states.

    Source: arXiv 2410.08847.
    """
    chosen = _sums(chosen_states, _last_only(chosen_mask), "chosen")[0]
    rejected = _sums(rejected_states, _last_only(rejected_mask), "rejected")[0]
    _same_shape(chosen, rejected)
    return (chosen * rejected).sum(-1).to(widened(chosen_states[:0]).dtype)


def edit_similarity(chosen_ids: Sequence[Sequence[int]], rejected_ids: Sequence[Sequence[int]]) -> Tensor:
    r"""Minus the normalised Levenshtein distance of completions, a baseline for `ches_score`.

    .. math:: -\,\mathrm{lev}(y^+, y^-) / \max(|y^+|, |y^-|) \in [-1, 0]

    Args:
        chosen_ids: B completions as token ids.
        rejected_ids: B completions as token ids.

    Returns:
        (B,) float64; 0 for equal completions.

    Raises:
        InputError: if the numbers of rows differ.
        RowError: for a pair without any token.

    Source: arXiv 2410.08847.
    """
    if len(chosen_ids) != len(rejected_ids):
        raise InputError(f"edit similarity compares row by row: got {len(chosen_ids)} and {len(rejected_ids)} rows")
    out = []
    for row, (chosen, rejected) in enumerate(zip(chosen_ids, rejected_ids, strict=True)):
        longest = max(len(chosen), len(rejected))
        if longest == 0:
            raise RowError("both completions are empty: remove the pair", row=f"row {row}")
        out.append(-_levenshtein(chosen, rejected) / longest)
    return torch.tensor(out, dtype=torch.float64)


@torch.no_grad()
def predicting_states(model: CausalLM, batch: TokenBatch, *, method: str = "this signal") -> tuple[Tensor, Tensor]:
    """The hidden state that predicts each scored token, as the head receives it; no logits are computed.

    Args:
        model: a causal model; its modules are in evaluation mode meanwhile.
        batch: rows whose scored tokens are asked for; padding changes nothing.
        method: name for the refusal.

    Returns:
        (N, D) states of the N scored tokens in the model's dtype, row by row in the order of the tokens, and (B, T)
        bool where those tokens stand in `batch`. No gradient.

    Raises:
        InputError: for a model that is not causal, or that cannot be taken apart into hidden states and head.
        ValueError: if the first token of a row is to be scored: nothing stands before it.
    """
    trunk = causal_trunk(model, method)
    packed, _ = batch.to(model.device).packed_left()
    packed.require_context()
    lengths = (packed.attention_mask.sum(1) - 1).clamp_min(0).tolist()  # the last token is only ever a target
    wanted = packed.scored_mask[:, 1:]
    found = []
    with evaluating(model.model):
        for rows, width in _passes(lengths, scaled_rope_start(model.model.config)):
            if bool(wanted[rows].any()):
                hidden = trunk.hidden(input_ids=packed.ids[rows, :width], use_cache=False)
                found.append(hidden[wanted[rows, :width]])
    states = torch.cat(found) if found else torch.empty(0, 0, device=model.device)
    return states, (batch.scored_mask & batch.attention_mask).to(model.device)


def ches_scores(model: CausalLM, chosen: TokenBatch, rejected: TokenBatch, *, length_normalise: bool = False) -> Tensor:
    """`ches_score` of pairs of prompt and completion, with the states that `model` gives them.

    Args:
        model: a causal model that can be taken apart into hidden states and head; two forward passes, no logits.
        chosen: B rows; the scored tokens are the completion.
        rejected: B rows with the same prompts.
        length_normalise: divide each sum by its number of states; what `filter_by_ches` wants.

    Returns:
        (B,) float32 or better; does not depend on padding or on the other rows.

    Raises:
        InputError: for a model without separate hidden states, or rows that do not pair.
        RowError: for a row without scored tokens.

    Source: arXiv 2410.08847.
    """
    _same_rows(chosen, rejected)
    sides = (_in_place(*predicting_states(model, batch, method="CHES")) for batch in (chosen, rejected))
    (chosen_states, chosen_mask), (rejected_states, rejected_mask) = sides
    return ches_score(chosen_states, chosen_mask, rejected_states, rejected_mask, length_normalise=length_normalise)


def last_state_similarities(model: CausalLM, chosen: TokenBatch, rejected: TokenBatch) -> Tensor:
    """`last_state_similarity` of pairs, with the states that `model` gives after each row's last token.

    Args:
        model: a causal model that can be taken apart into hidden states and head.
        chosen: B rows of prompt and completion.
        rejected: B rows with the same prompts.

    Returns:
        (B,) float32 or better.

    Raises:
        InputError: for a model without separate hidden states, or rows that do not pair.
        RowError: for a row without tokens.

    Source: arXiv 2410.08847.
    """
    _same_rows(chosen, rejected)
    last = []
    for name, batch in (("chosen", chosen), ("rejected", rejected)):
        packed, _ = batch.packed_left()
        _require_any(packed.attention_mask, name)
        # One more token makes the last one of the row a token that predicts.
        ids = torch.nn.functional.pad(packed.ids, (0, 1))
        real = torch.nn.functional.pad(packed.attention_mask, (1, 0), value=True)
        probe = TokenBatch(ids, real, _last_only(real))
        last.append(_in_place(*predicting_states(model, probe, method="last-state similarity")))
    return last_state_similarity(*last[0], *last[1])


def filter_by_ches(scores: Tensor, keep: float) -> Tensor:
    """The pairs to train on: those with the lowest scores.

    Args:
        scores: (N,) length-normalised CHES.
        keep: how many, as a share in (0, 1] (a float; rounded to whole pairs, at least one) or as a number (an int).

    Returns:
        (n,) row numbers in ascending order; of equal scores the first are kept.

    Raises:
        InputError: for a share or number that cannot be kept.
        RowError: for a score that is not finite.

    Source: arXiv 2410.08847 (its released command keeps about 5 %).
    """
    if scores.dim() != 1 or len(scores) == 0:
        raise InputError(f"scores must have shape (N,) with N > 0, got {tuple(scores.shape)}")
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise RowError(f"the score is {float(scores[bad[0]])}: remove the pair", row=f"row {int(bad[0])}")
    share = isinstance(keep, float) and 0 < keep <= 1
    count = max(1, round(keep * len(scores))) if share else keep
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(scores):
        raise InputError(f"keep must be a share in (0, 1] or a number from 1 to {len(scores)}, got {keep!r}")
    return scores.argsort(stable=True)[:count].sort().values


@dataclass(frozen=True, slots=True)
class Displacement:
    r"""What training did to the likelihood of the chosen completions.

    Args:
        change: per pair :math:`\log \pi_\text{after}(y^+ \mid x) - \log \pi_\text{before}(y^+ \mid x)`, nats; negative
            means displaced.
        mean: of `change` over the pairs, with their standard error (the spread over pairs) from two pairs on.
        share_decreased: of the pairs whose chosen completion became less likely.
    """

    change: LogLikelihood
    mean: Measurement
    share_decreased: float


def likelihood_displacement(before: LogLikelihood, after: LogLikelihood) -> Displacement:
    r"""Change in the likelihood of chosen completions from before training to after it.

    .. math:: \Delta_b = \log \pi_\text{after}(y^+_b \mid x_b) - \log \pi_\text{before}(y^+_b \mid x_b)

    Args:
        before: (B,) log-likelihoods of the chosen completions, token sums in nats.
        after: (B,) of the same completions. Both are detached.

    Returns:
        The change per pair, labelled; its mean; the share of pairs with a decrease.

    Raises:
        InputError: for no rows, rows that do not pair, or sums over different numbers of units.
        RowError: for a change that is not a number.

    Source: arXiv 2410.08847.
    """
    if len(before) != len(after) or len(before) == 0:
        raise InputError(f"displacement compares the same rows, at least one: got {len(before)} and {len(after)}")
    differ = (before.num_units != after.num_units).nonzero().flatten()
    if before.unit is not after.unit or len(differ):
        row = int(differ[0]) if len(differ) else 0
        raise InputError(
            f"displacement compares the same completions, and row {row} has {int(before.num_units[row])} "
            f"{before.unit}s before and {int(after.num_units[row])} {after.unit}s after: score the same data"
        )
    change = after.detach() - before.detach()
    bad = torch.isnan(change.value).nonzero().flatten()
    if len(bad):
        raise RowError("its likelihoods have no difference (NaN, or both 0): remove the pair", row=f"row {int(bad[0])}")
    values = change.value.double()
    finite = len(values) > 1 and bool(torch.isfinite(values).all())
    stderr = (values.std() / math.sqrt(len(values))).reshape(1) if finite else None
    mean = Measurement(values.mean().reshape(1), change.kind, "displacement", stderr)
    return Displacement(change, mean, float((values < 0).double().mean()))


def causal_trunk(model: object, method: str) -> Trunk:
    """Hidden states and head of a causal model.

    Raises:
        InputError: naming the method, for any other model.
    """
    trunk = model.trunk if isinstance(model, CausalLM) else None
    if trunk is None:
        name = type(model.model).__name__ if isinstance(model, CausalLM) else type(model).__name__
        raise InputError(
            f"{method} needs a causal model that can be taken apart into hidden states and head, which {name} cannot: "
            "use another architecture"
        )
    return trunk


def _passes(lengths: Sequence[int], rope_start: int | None) -> Iterator[tuple[slice, int]]:
    """Consecutive rows of one forward pass, and how many columns it reads.

    Rows on either side of a length from which rotary frequencies change do not run together.
    """
    begin, width = 0, 0
    for row, length in enumerate(lengths):
        wider = max(width, length)
        crosses = rope_start is not None and (length > rope_start) != (lengths[begin] > rope_start)
        if row > begin and (crosses or wider * (row - begin + 1) > _PASS_TOKENS):
            yield slice(begin, row), width
            begin, wider = row, length
        width = wider
    if begin < len(lengths):
        yield slice(begin, len(lengths)), width


def _in_place(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) states of an (N, D) list at the N columns of `mask`, zero elsewhere; and the mask."""
    out = states.new_zeros(*mask.shape, states.shape[-1])
    out[mask] = states
    return out, mask


def _sums(states: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Float64 sums (B, D) of the masked states, and their number (B,)."""
    if states.dim() != 3 or mask.shape != states.shape[:2] or mask.dtype != torch.bool:
        raise InputError(
            f"{name} needs states (B, T, D) with a bool mask (B, T), got {tuple(states.shape)} with {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    _require_any(mask, name)
    return states.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float64), mask.sum(1)


def _require_any(mask: Tensor, name: str) -> None:
    empty = (~mask.any(1)).nonzero().flatten()
    if len(empty):
        raise RowError(f"the {name} completion has no token: remove the pair", row=f"row {int(empty[0])}")


def _same_shape(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape:
        raise InputError(
            f"chosen and rejected need as many rows and dimensions, got {tuple(chosen.shape)} and "
            f"{tuple(rejected.shape)}"
        )


def _same_rows(chosen: TokenBatch, rejected: TokenBatch) -> None:
    if len(chosen) != len(rejected):
        raise InputError(f"chosen and rejected need as many rows, got {len(chosen)} and {len(rejected)}")


def _last_only(mask: Tensor) -> Tensor:
    """The last True of each row alone."""
    later = mask.flip(1).int().cumsum(1).flip(1)
    return mask & (later == 1)


def _levenshtein(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from one to the other; a row of the table at a time."""
    other, columns = np.asarray(b, dtype=np.int64), np.arange(len(b) + 1)
    row = columns.copy()
    for i, token in enumerate(a, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        # Insertions run along the row: cost j - i' from the cheapest column i' before j.
        row = np.minimum.accumulate(np.concatenate(([i], best)) - columns) + columns
    return int(row[-1])
