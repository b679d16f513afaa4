r"""Membership inference: was this text in the training data? Scores from log-likelihoods, higher for members.

Training raises the likelihood of what was trained on. A score compares a text's likelihood with what it would be
without training on it: nothing (`loss_score`), its own compressed size (`zlib_score`), its lower-case form
(`lowercase_score`), perturbed copies or another model (`reference_score`), or its least likely tokens alone, plain
(`min_k`) or standardised by the model's own next-token distribution (`min_k_plus_plus`).

`loglik.signals.detection` measures a score on known members and non-members; they must be alike in all but membership
(length, source, date), or the AUC measures the difference in the texts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import output_head, predicted_mask, scored_logits, states_before_head
from loglik.models.protocol import ChainRule, require
from loglik.models.seq2seq import Seq2SeqLM
from loglik.models.trunk import evaluating
from loglik.signals.texts import inference_log_prob

__all__ = [
    "NextTokenMoments",
    "loss_score",
    "lowercase_score",
    "membership_scores",
    "min_k",
    "min_k_plus_plus",
    "next_token_moments",
    "reference_score",
    "zlib_score",
]

_CHUNK_VALUES = 1 << 22  # entries of next-token tables that exist at once
_CHUNK_ROWS = 256  # prefixes per call of `next_log_probs`


def loss_score(likelihood: LogLikelihood) -> Measurement:
    r"""Mean log-probability per token, :math:`\frac1N \sum_t \ell_t = -\log \mathrm{PPL}(x)`, nats.

    Args:
        likelihood: (B,) of the texts.

    Raises:
        RowError: for a row without scored tokens or with a log-likelihood that is not finite.

    Source: arXiv 2402.09363.
    """
    return _measured(_mean(likelihood, "the model"), "loss")


def reference_score(likelihood: LogLikelihood, reference: LogLikelihood) -> Measurement:
    r"""How much more likely per token than under a model that was not trained on the texts.

    .. math:: \frac1N \sum_t \ell_t - \frac{1}{N_\text{ref}} \sum_t \ell^\text{ref}_t
              = \log \frac{\mathrm{PPL}_\text{ref}(x)}{\mathrm{PPL}(x)}

    Each model counts its own tokens, so that their tokenizers may differ. (A quotient of the two mean losses, also
    called ratio, ranks differently.)

    Args:
        likelihood: (B,) under the model in question.
        reference: (B,) of the same texts under the reference.

    Returns:
        (B,) nats per token. Two exact models give an exact difference, two bounds a surrogate.

    Raises:
        InputError: for numbers of rows or units that differ. Rows are refused as by `loss_score`.

    Source: arXiv 2402.09363.
    """
    _same_rows(likelihood, reference, "the reference")
    if likelihood.unit is not reference.unit:
        units = f"the model counts per {likelihood.unit} and the reference per {reference.unit}"
        raise InputError(f"{units}: count both in one unit")
    return _measured(_mean(likelihood, "the model") - _mean(reference, "the reference"), "reference_ratio")


def zlib_score(likelihood: LogLikelihood, texts: Sequence[str]) -> Measurement:
    r"""Mean log-probability per token over the compressed size, :math:`\frac1N \sum_t \ell_t / |\text{zlib}(x)|`.

    Args:
        likelihood: (B,) of the texts.
        texts: the B texts that were scored; the size is that of ``zlib.compress`` of their UTF-8, in bytes.

    Returns:
        (B,) nats per token and byte: negative, nearer to 0 for members.

    Raises:
        InputError: for another number of texts. Rows are refused as by `loss_score`.

    Source: the quotient of log-perplexity and zlib entropy, arXiv 2012.07805.
    """
    if isinstance(texts, str) or len(texts) != len(likelihood):
        shown = "one string" if isinstance(texts, str) else f"{len(texts)} texts"
        raise InputError(f"{len(likelihood)} rows need as many texts, got {shown}")
    mean = _mean(likelihood, "the model")
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    return Measurement(mean.value / mean.value.new_tensor(sizes), mean.kind, "zlib")


def lowercase_score(likelihood: LogLikelihood, lowered: LogLikelihood) -> Measurement:
    r"""How much worse the model finds the lower-case text.

    .. math:: \log \mathrm{PPL}(\mathrm{lower}(x)) / \log \mathrm{PPL}(x)

    Args:
        likelihood: (B,) of the texts.
        lowered: (B,) of ``text.lower()`` under the same model.

    Returns:
        (B,) without unit; 1 for a text that has no capitals. A quotient of bounds is a surrogate.

    Raises:
        InputError: for another number of rows.
        RowError: as `loss_score`, or for a text that the model is certain of.

    Source: arXiv 2012.07805. For the difference, give `lowered` to `reference_score`.
    """
    _same_rows(likelihood, lowered, "the lower-case texts")
    mean, low = _mean(likelihood, "the model"), _mean(lowered, "the lower-case texts")
    certain = (mean.value == 0).nonzero().flatten()
    if len(certain):
        raise RowError("has probability 1, so that no quotient exists: leave it out", row=f"row {int(certain[0])}")
    exact = mean.kind is Kind.EXACT and low.kind is Kind.EXACT
    return Measurement(low.value / mean.value, Kind.EXACT if exact else Kind.SURROGATE, "lowercase")


def min_k(likelihood: LogLikelihood, k: float = 0.2) -> Measurement:
    r"""Min-K% Prob: mean log-probability of the least likely tokens, the lowest :math:`\max(1, \lfloor kN \rfloor)`.

    Args:
        likelihood: (B,) with a term per token; padding is not counted.
        k: share of the tokens, in (0, 1]; 1 gives `loss_score`, and no k a higher value.

    Returns:
        (B,) nats per token.

    Raises:
        InputError: for a likelihood without terms, or a k out of range. Rows are refused as by `loss_score`.

    Source: arXiv 2310.16789.
    """
    terms, mask = _terms(likelihood, "Min-K%")
    return Measurement(_lowest(terms, mask, k).to(likelihood.value.dtype), likelihood.kind, "min_k")


def min_k_plus_plus(likelihood: LogLikelihood, mean: Tensor, std: Tensor, k: float = 0.2) -> Measurement:
    r"""Min-K%++: mean of the lowest standardised log-probabilities.

    .. math:: z_t = \frac{\ell_t - \mu_t}{\sigma_t}, \qquad \mu_t = \mathbb E_{v \sim p_t} \log p_t(v), \quad
              \sigma_t^2 = \operatorname{Var}_{v \sim p_t} \log p_t(v)

    Where the distribution is flat on what it allows, :math:`\sigma_t = 0` and every token has :math:`z_t = 0`.

    Args:
        likelihood: (B,) with a term per token.
        mean: (B, T) :math:`\mu_t`, from `next_token_moments`.
        std: (B, T) :math:`\sigma_t`.
        k: share of the tokens, in (0, 1].

    Returns:
        (B,) in standard deviations.

    Raises:
        InputError: as `min_k`, or for shapes that differ.
        RowError: as `min_k`, or for moments that do not fit the terms.

    Source: arXiv 2404.02936.
    """
    terms, mask = _terms(likelihood, "Min-K%++")
    if mean.shape != terms.shape or std.shape != terms.shape:
        shapes = f"mean {tuple(mean.shape)} and std {tuple(std.shape)}"
        raise InputError(f"{shapes} must be {tuple(terms.shape)} like the terms")
    mean, std = mean.double(), std.double()
    # Rounding leaves a spread of about 1e-7 where there is none; dividing by it would make noise of it.
    size = mean.abs().clamp_min(1.0)
    flat = (std <= 1e-6 * size) & ((terms - mean).abs() <= 1e-5 * size)
    bad = (mask & ~(torch.isfinite(mean) & torch.isfinite(std) & ((std > 0) | flat))).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        at = (row, column)
        what = f"{float(terms[at]):.4g} in column {column} does not fit mean {float(mean[at]):.4g}"
        reason = f"a log-probability of {what} with deviation {float(std[at]):.4g}: give this row's own moments"
        raise RowError(reason, row=f"row {row}")
    z = ((terms - mean) / std.masked_fill(flat | ~mask, 1.0)).masked_fill(flat, 0.0)
    return Measurement(_lowest(z, mask, k).to(likelihood.value.dtype), likelihood.kind, "min_k_plus_plus")


@dataclass(frozen=True, slots=True)
class NextTokenMoments:
    r"""Log-probabilities of the scored tokens, with their mean and spread under the model's own distribution.

    Args:
        likelihood: (B,) with per-token terms (B, T), float64.
        mean: (B, T) :math:`\mu_t` (minus the entropy of the next token), 0 where not scored.
        std: (B, T) :math:`\sigma_t`, 0 where not scored.
    """

    likelihood: LogLikelihood
    mean: Tensor
    std: Tensor


@torch.no_grad()
def next_token_moments(model: Any, batch: TokenBatch) -> NextTokenMoments:
    r"""Mean and standard deviation of :math:`\log p_t(v)` over :math:`v \sim p_t`, at every scored position.

    A network runs once, and its head on a chunk of positions at a time, so that no table of all positions exists. Any
    other model is asked prefix by prefix.

    Args:
        model: gives next-token distributions; torch modules are in evaluation mode meanwhile.
        batch: B rows; padding may stand anywhere and changes nothing.

    Returns:
        float64, without gradient; a token of probability 0 counts 0 in both moments.

    Raises:
        InputError: for a model without next-token distributions.
        RowError: for a distribution that does not sum to 1, or a token that nothing predicts and is to be scored.

    Source: arXiv 2404.02936.
    """
    require(model, ChainRule, "reading next-token distributions")  # type: ignore[type-abstract]
    parts = [_moments(places, table, batch) for places, table in _tables(model, batch)]
    device = parts[0][0].device if parts else batch.ids.device
    mask = (batch.scored_mask & batch.attention_mask).to(device)
    out = torch.zeros(3, *mask.shape, dtype=torch.float64, device=device)
    for places, values in parts:
        out[:, places[:, 0], places[:, 1]] = values
    kind, unit = getattr(model, "kind", Kind.EXACT), getattr(model, "unit", Unit.TOKEN)
    return NextTokenMoments(LogLikelihood.from_per_unit(out[0], mask, kind=kind, unit=unit), out[1], out[2])


def membership_scores(
    model: Any,
    batch: TokenBatch,
    *,
    texts: Sequence[str] | None = None,
    lowered: TokenBatch | None = None,
    reference: Any = None,
    reference_batch: TokenBatch | None = None,
    k: float = 0.2,
) -> dict[str, Measurement]:
    """Every score that the inputs allow, from one reading of `batch`.

    Args:
        model: a model with next-token distributions.
        batch: B rows whose scored tokens are judged.
        texts: the B texts, for ``zlib``.
        lowered: the B lower-case texts as tokens, for ``lowercase``; one more reading.
        reference: a model that did not see the texts, for ``ratio``; one more reading, by its `log_prob`.
        reference_batch: the rows in the tokens of the reference, where its tokenizer is another one.
        k: share of the tokens of both Min-K scores.

    Returns:
        Scores (B,) by name: ``loss``, ``min_k``, ``min_k_plus_plus``, and ``zlib``, ``lowercase``, ``ratio``.

    Raises:
        InputError: as the scores raise it, or for a reference batch without a reference.
    """
    if reference is None and reference_batch is not None:
        raise InputError("reference_batch is given without a reference model: name the model that reads it")
    read = next_token_moments(model, batch)
    likelihood = read.likelihood
    out = {
        "loss": loss_score(likelihood),
        "min_k": min_k(likelihood, k),
        "min_k_plus_plus": min_k_plus_plus(likelihood, read.mean, read.std, k),
    }
    if texts is not None:
        out["zlib"] = zlib_score(likelihood, texts)
    if lowered is not None:
        out["lowercase"] = lowercase_score(likelihood, inference_log_prob(model, lowered))
    if reference is not None:
        rows = batch if reference_batch is None else reference_batch
        out["ratio"] = reference_score(likelihood, inference_log_prob(reference, rows).to(likelihood.value.device))
    return out


def _tables(model: Any, batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Places (n, 2) of scored tokens in the batch, and log-probabilities (n, V) of what could stand there."""
    if isinstance(model, CausalLM | Seq2SeqLM):
        yield from _network_tables(model, batch)
        return
    packed, origin = batch.packed_left()
    first = packed.scored_mask[:, :1].any(1).nonzero().flatten()
    if len(first):
        reason = "its first token cannot be scored, nothing stands before it: prepend BOS"
        raise RowError(reason, row=f"row {int(first[0])}")
    starts = packed.completion_starts()
    for column in packed.scored_mask.any(0).nonzero().flatten().tolist():
        for rows in torch.split(packed.scored_mask[:, column].nonzero().flatten(), _CHUNK_ROWS):
            ids = packed.ids[rows, :column]
            real = torch.ones_like(ids, dtype=torch.bool)
            prefix = TokenBatch(ids, real, torch.zeros_like(real), starts[rows].clamp_max(column))
            yield torch.stack([rows, origin[rows, column]], 1), model.next_log_probs(prefix)


def _network_tables(model: CausalLM | Seq2SeqLM, batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of a network, from one forward pass."""
    batch = batch.to(model.device)
    mask = batch.scored_mask & batch.attention_mask
    places = mask.nonzero()
    if not len(places):
        return
    lost = (mask & ~predicted_mask(model, batch)).nonzero()
    if len(lost):
        row, column = lost[0].tolist()
        raise RowError(f"the token in column {column} cannot be scored, nothing predicts it", row=f"row {row}")
    with evaluating(model.model):
        if model.trunk is None:
            yield places, scored_logits(model, batch).double().log_softmax(-1)
            return
        states = states_before_head(model, batch)[mask]
        head = output_head(model)
        size = max(1, _CHUNK_VALUES // head(states[:1]).shape[-1])
        for begin in range(0, len(states), size):
            yield places[begin : begin + size], head(states[begin : begin + size]).double().log_softmax(-1)


def _moments(places: Tensor, table: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Places with (3, n): the token's log-probability, and mean and deviation under the table's rows."""
    log_p = table.double()
    off = (log_p.logsumexp(-1).abs() > 1e-3) | torch.isnan(log_p).any(-1)
    if bool(off.any()):
        row = int(places[off][0, 0])
        raise RowError("a next-token distribution of the model does not sum to 1: mend the model", row=f"row {row}")
    p = log_p.exp()
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)  # p log p is 0 where p is
    mean = (p * finite).sum(-1)
    std = (p * (finite - mean[:, None]).square()).sum(-1).sqrt()
    targets = batch.ids.to(places.device)[places[:, 0], places[:, 1]]
    own = log_p.gather(-1, targets[:, None])[:, 0]
    return places, torch.stack([own, mean, std])


def _mean(likelihood: LogLikelihood, whose: str) -> LogLikelihood:
    """Nats per unit; every row has some, and a finite likelihood."""
    bad = (~torch.isfinite(likelihood.value)).nonzero().flatten()
    if len(bad):
        reason = f"its log-likelihood under {whose} is {float(likelihood.value[bad[0]])}: leave it out"
        raise RowError(reason, row=f"row {int(bad[0])}")
    empty = (likelihood.num_units <= 0).nonzero().flatten()
    if len(empty):
        raise RowError("has no scored token: leave it out", row=f"row {int(empty[0])}")
    return likelihood.detach().mean_per_unit()


def _measured(value: LogLikelihood, name: str) -> Measurement:
    return Measurement(value.value, value.kind, name, value.stderr)


def _terms(likelihood: LogLikelihood, method: str) -> tuple[Tensor, Tensor]:
    """(B, T) float64 terms and where they are."""
    if likelihood.per_unit is None or likelihood.mask is None:
        raise InputError(
            f"{method} needs a term per {likelihood.unit}, and this likelihood is a sum alone: use a model with a "
            "chain rule (causal, encoder-decoder or n-gram)"
        )
    _mean(likelihood, "the model")
    return likelihood.per_unit.detach().double(), likelihood.mask


def _lowest(values: Tensor, mask: Tensor, k: float) -> Tensor:
    """(B,) mean of each row's lowest share of the values under the mask."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= 1:
        raise InputError(f"k must be a share of the tokens above 0 and at most 1, got {k}")
    # A hair more, because 0.29 * 100 is a little less than 29.
    counts = [max(1, math.floor(k * n + 1e-9)) for n in mask.sum(1).tolist()]
    ordered = values.masked_fill(~mask, torch.inf).sort(1).values
    return torch.stack([row[:count].mean() for row, count in zip(ordered, counts, strict=True)])


def _same_rows(likelihood: LogLikelihood, other: LogLikelihood, whose: str) -> None:
    if len(likelihood) != len(other):
        raise InputError(f"the model has {len(likelihood)} rows and {whose} {len(other)}: give the same texts to both")
