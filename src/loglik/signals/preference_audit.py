"""What a model makes of preference pairs before it is trained on them, pair by pair and as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.trunk import evaluating
from loglik.signals.preference import (
    ches_score,
    edit_similarity,
    last_state_similarities,
    predicting_states,
)
from loglik.signals.uncertainty import top_k_indicators

__all__ = ["PairAudit", "PreferenceAudit", "audit_preferences", "plot_audit"]


@dataclass(frozen=True, slots=True)
class PairAudit:
    """One pair.

    Args:
        ches: of the pair; grows with the square of the length.
        ches_normalised: what pairs are filtered by; larger means that training displaces more.
        edit_similarity: minus the normalised edit distance of the completions' tokens.
        last_state_similarity: inner product of the states after the last tokens.
        log_prob_chosen: nats, summed over tokens.
        log_prob_rejected: likewise.
        tokens_chosen: how many tokens were scored.
        tokens_rejected: likewise.
        entropy: top-k entropy over the chosen completion's positions, bits.
        mass: top-k mass, likewise.
        reward_margin: implicit reward of the chosen completion minus the rejected one's, nats (beta = 1); None without
            a reference.
    """

    ches: float
    ches_normalised: float
    edit_similarity: float
    last_state_similarity: float
    log_prob_chosen: float
    log_prob_rejected: float
    tokens_chosen: int
    tokens_rejected: int
    entropy: float
    mass: float
    reward_margin: float | None = None


@dataclass(slots=True)
class PreferenceAudit:
    """All pairs."""

    pairs: list[PairAudit] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One number of every pair."""
        return [getattr(pair, name) for pair in self.pairs]

    def summary(self) -> dict[str, Any]:
        """Means, accuracies and correlations over the pairs; None where there is nothing to say."""
        gaps = [p.log_prob_chosen - p.log_prob_rejected for p in self.pairs]
        per_token = [p.log_prob_chosen / p.tokens_chosen - p.log_prob_rejected / p.tokens_rejected for p in self.pairs]
        margins = [p.reward_margin for p in self.pairs if p.reward_margin is not None]
        ches = self.column("ches_normalised")
        lengths = [float(p.tokens_chosen - p.tokens_rejected) for p in self.pairs]
        return {
            "pairs": len(self.pairs),
            "likelihood_prefers_chosen": _share(gaps),
            "likelihood_per_token_prefers_chosen": _share(per_token),
            "implicit_reward_accuracy": _share(margins) if margins else None,
            "mean_reward_margin": _mean(margins) if margins else None,
            "mean_log_prob_per_token_chosen": _mean([p.log_prob_chosen / p.tokens_chosen for p in self.pairs]),
            "mean_log_prob_per_token_rejected": _mean([p.log_prob_rejected / p.tokens_rejected for p in self.pairs]),
            "mean_tokens_chosen": _mean([float(p.tokens_chosen) for p in self.pairs]),
            "mean_tokens_rejected": _mean([float(p.tokens_rejected) for p in self.pairs]),
            "top_k_entropy": _mean(self.column("entropy")),
            "top_k_mass": _mean(self.column("mass")),
            "ches_normalised_quantiles": {
                name: _quantile(ches, q) for name, q in (("5%", 0.05), ("50%", 0.5), ("95%", 0.95))
            },
            "ches_with_edit_similarity": _rank_correlation(ches, self.column("edit_similarity")),
            "longer_is_chosen": _share(lengths),
        }


@torch.no_grad()
def audit_preferences(
    model: CausalLM,
    batches: Iterable[tuple[TokenBatch, TokenBatch]],
    *,
    reference: CausalLM | None = None,
    k: int = 10,
) -> PreferenceAudit:
    """Scores of preference pairs: similarity (CHES), likelihoods, indicators, and the implicit reward's margin.

    Args:
        model: a causal model that can be taken apart into hidden states and head.
        batches: chosen and rejected completions, some pairs at a time; results do not depend on how they are cut.
        reference: the frozen reference of the implicit reward, where `model` has been trained.
        k: of the top-k indicators; the whole vocabulary where that is smaller.

    Raises:
        InputError: for another kind of model, or no pairs.
    """
    found = PreferenceAudit()
    k = min(k, model.model.config.get_text_config().vocab_size)
    with evaluating(model.model):
        for chosen, rejected in batches:
            states = [predicting_states(model, batch, method="CHES") for batch in (chosen, rejected)]
            (own, own_mask), (other, other_mask) = ((_placed(flat, mask), mask) for flat, mask in states)
            raw = ches_score(own, own_mask, other, other_mask)
            normalised = ches_score(own, own_mask, other, other_mask, length_normalise=True)
            edits = edit_similarity(_completions(chosen), _completions(rejected))
            last = last_state_similarities(model, chosen, rejected)
            first, second = top_k_indicators(model, chosen, k), top_k_indicators(model, rejected, 1)
            margins = _margins(first.log_likelihood.value, second.log_likelihood.value, chosen, rejected, reference)
            columns = {
                "ches": raw,
                "ches_normalised": normalised,
                "edit_similarity": edits,
                "last_state_similarity": last,
                "log_prob_chosen": first.log_likelihood.value,
                "log_prob_rejected": second.log_likelihood.value,
                "tokens_chosen": first.log_likelihood.num_units,
                "tokens_rejected": second.log_likelihood.num_units,
                "entropy": first.entropy,
                "mass": first.mass,
            }
            for row, margin in enumerate(margins):
                numbers: dict[str, Any] = {name: column[row].item() for name, column in columns.items()}
                found.pairs.append(PairAudit(**numbers, reward_margin=margin))
    if not found.pairs:
        raise InputError("there are no pairs to audit: give at least one")
    return found


def plot_audit(audit: PreferenceAudit, path: str | Path, *, keep: float | None = None) -> None:
    """Two panels: the distribution of CHES with the pairs that a filter keeps, and CHES against the likelihood gap.

    Raises:
        InputError: where matplotlib is not installed, or for a format that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: install loglik[plots]") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in canvas.get_supported_filetypes():
        known = ", ".join(sorted(canvas.get_supported_filetypes()))
        raise InputError(f"a plot cannot be written to {str(path)!r}: end its name in one of {known}")
    ches = audit.column("ches_normalised")
    left, right = figure.subplots(1, 2)
    left.hist(ches, bins=min(40, max(5, len(ches) // 5)), color="tab:blue")
    if keep is not None:
        edge = _quantile(ches, keep)
        left.axvline(edge, color="tab:red", linestyle="--", label=f"{keep:.0%} kept, left of here")
        left.legend()
    left.set_xlabel("length-normalised CHES (higher: more displacement)")
    left.set_ylabel("pairs")
    gaps = [p.log_prob_chosen - p.log_prob_rejected for p in audit.pairs]
    right.scatter(ches, gaps, s=10, c=audit.column("edit_similarity"), cmap="viridis")
    right.axhline(0, color="grey", linewidth=1)
    right.set_xlabel("length-normalised CHES")
    right.set_ylabel("log p(chosen) - log p(rejected), nats")
    figure.savefig(path)


def _placed(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, D) states of the scored tokens at their places (B, T, D); 0 elsewhere."""
    out = flat.new_zeros(*mask.shape, flat.shape[-1])
    out[mask] = flat
    return out


def _completions(batch: TokenBatch) -> list[list[int]]:
    scored = batch.scored_mask & batch.attention_mask
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, scored, strict=True)]


def _margins(
    chosen_value: torch.Tensor,
    rejected_value: torch.Tensor,
    chosen: TokenBatch,
    rejected: TokenBatch,
    reference: CausalLM | None,
) -> Sequence[float | None]:
    if reference is None:
        return [None] * len(chosen)
    with evaluating(reference.model):
        gap = chosen_value - reference.log_prob(chosen).value.to(chosen_value)
        found: list[float | None] = (gap - (rejected_value - reference.log_prob(rejected).value.to(gap))).tolist()
    return found


def _share(values: Sequence[float]) -> float | None:
    """Share of values above 0; ties count one half."""
    return _mean([1.0 if v > 0 else 0.5 if v == 0 else 0.0 for v in values])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(stats.spearmanr(a, b).statistic)
