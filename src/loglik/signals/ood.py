r"""Out-of-distribution scores from log-likelihoods, higher for what is further out.

A likelihood alone says how typical a text is of text in general: a simple text that the model was never meant for can
be likelier than everything it was trained on. The ratio to the model before fine-tuning takes that part out
(`likelihood_ratio`): where the pretrained model covers everything, it is the optimal test by Neyman and Pearson.

Beside it the baselines: `likelihood_score`, `perplexity_score`, `typicality` (is the likelihood what it usually is?)
and `likelihood_regret` (how much could the model gain by learning this one row?). `loglik.signals.detection` measures
a score where out-of-distribution rows are known; `ood_threshold` needs in-distribution rows only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.trunk import evaluating
from loglik.signals.texts import inference_log_prob

__all__ = [
    "likelihood_ratio",
    "likelihood_regret",
    "likelihood_score",
    "ood_scores",
    "ood_threshold",
    "perplexity_score",
    "question_answer_ratios",
    "typicality",
    "typicality_test",
]

Normalise = Literal["sum", "token"]


def likelihood_ratio(finetuned: LogLikelihood, base: LogLikelihood, *, normalise: Normalise = "sum") -> Measurement:
    r"""Log-likelihood under the base model minus that under the fine-tuned one.

    .. math:: s(x) = \log p_{\theta_0}(x) - \log p_{\theta_1}(x) \qquad \text{or} \qquad s(x) / N

    With two fine-tuned models it is a generative classifier: `finetuned` for the class that is inside, `base` for the
    other.

    Args:
        finetuned: (B,) under the model of the distribution.
        base: (B,) under the model before fine-tuning, of the same tokens: same BOS, same scored positions.
        normalise: ``sum`` grows with the length, ``token`` divides by the number of scored tokens.

    Returns:
        (B,) nats (per token), higher for what is further out. Exact for exact models; for two lower bounds a surrogate.

    Raises:
        InputError: for numbers of rows or units that differ, or an unknown `normalise`.
        RowError: for tokens that differ, a row without scored tokens, or a log-likelihood that is not finite.

    Source: arXiv 2404.08679.
    """
    if len(finetuned) != len(base) or finetuned.unit is not base.unit:
        sides = f"{len(finetuned)} rows per {finetuned.unit} against {len(base)} rows per {base.unit}"
        raise InputError(f"{sides} give no ratio: score the same rows with both models")
    differ = finetuned.num_units.to(base.num_units.device) != base.num_units
    if finetuned.mask is not None and base.mask is not None and finetuned.mask.shape == base.mask.shape:
        differ = differ | (finetuned.mask.to(base.mask.device) != base.mask).any(1)
    if bool(differ.any()):
        reason = f"its scored {base.unit}s differ between the models: score the same ones, or whole texts per byte"
        raise RowError(reason, row=f"row {int(differ.nonzero()[0])}")
    inside, outside = _checked(finetuned, "the fine-tuned model"), _checked(base, "the base model")
    return _measured(outside - inside.to(outside.value.device), normalise, "likelihood_ratio")


def likelihood_score(likelihood: LogLikelihood, *, normalise: Normalise = "sum") -> Measurement:
    r"""Minus the log-likelihood, :math:`-\log p(x)`, or per token the usual loss; nats, higher for what is unlikely.

    Raises:
        InputError: for an unknown `normalise`.
        RowError: for a row without scored tokens, or a log-likelihood that is not finite.
    """
    return _measured(-_checked(likelihood, "the model"), normalise, "likelihood")


def perplexity_score(likelihood: LogLikelihood) -> Measurement:
    """Perplexity (B,); ranks as `likelihood_score` per token does.

    Raises:
        RowError: as `likelihood_score`.
    """
    return _checked(likelihood, "the model").perplexity()


def question_answer_ratios(
    finetuned: LogLikelihood, base: LogLikelihood, answer: Tensor, *, normalise: Normalise = "sum"
) -> dict[str, Measurement]:
    r"""Ratios of questions with answers that the fine-tuned model gave, from one reading of each pair.

    .. math:: s(q \oplus a) = s(q) + s(a \mid q)

    Args:
        finetuned: (B,) with a term per token, of question and answer in one row.
        base: (B,) of the same rows.
        answer: (B, T) bool, which tokens are the answer's; the other scored ones are the question's.
        normalise: as in `likelihood_ratio`; each score by its own tokens.

    Returns:
        ``qa``, ``q`` and ``a|q``. (The answer's ratio alone needs a reading without the question.)

    Raises:
        InputError: as `likelihood_ratio`, for likelihoods without terms, or an answer mask of another shape.
        RowError: as `likelihood_ratio`, or for a row without scored question or answer.

    Source: arXiv 2404.08679.
    """
    whole = likelihood_ratio(finetuned, base, normalise=normalise)
    for name, given in (("fine-tuned", finetuned), ("base", base)):
        if given.mask is None:
            raise InputError(
                f"telling question from answer needs a term per {given.unit}, and the {name} model gives a sum alone: "
                "use models with a chain rule (causal or encoder-decoder)"
            )
        if answer.dtype != torch.bool or answer.shape != given.mask.shape:
            shapes = f"{tuple(given.mask.shape)}, got {answer.dtype} {tuple(answer.shape)}"
            raise InputError(f"answer must be bool of shape {shapes}")
    return {
        "qa": whole,
        "q": likelihood_ratio(_part(finetuned, ~answer), _part(base, ~answer), normalise=normalise),
        "a|q": likelihood_ratio(_part(finetuned, answer), _part(base, answer), normalise=normalise),
    }


def typicality(likelihood: LogLikelihood, held_out: LogLikelihood, *, normalise: Normalise = "token") -> Measurement:
    r"""Distance of each row's negative log-likelihood from what it usually is.

    .. math:: \Bigl| -\tfrac1N \log p(x) - \hat H \Bigr|, \qquad
              \hat H = -\frac{\sum_i \log p(x_i)}{\sum_i N_i} \text{ of in-distribution rows}

    Unlike the likelihood, it calls rows that are too likely out of distribution as well.

    Args:
        likelihood: (B,) of the rows.
        held_out: (M,) of in-distribution rows that were not trained on, under the same model.
        normalise: ``token`` compares entropy rates; ``sum`` total log-likelihoods, for rows of one length.

    Returns:
        (B,) nats (per token): an estimate for exact models, since the entropy is one.

    Raises:
        InputError: for no held-out rows, units that differ, or an unknown `normalise`.
        RowError: for a row without scored tokens, or a log-likelihood that is not finite.

    Source: the statistic of arXiv 1906.02994.
    """
    values, usual = _rates(likelihood, held_out, normalise)
    total = -held_out.value.detach().double().sum()
    entropy = total / held_out.num_units.sum() if normalise == "token" else usual.mean()
    kind = Kind.ESTIMATE if likelihood.kind is held_out.kind is Kind.EXACT else Kind.SURROGATE
    return Measurement((values - entropy).abs(), kind, "typicality")


def typicality_test(
    group: LogLikelihood,
    held_out: LogLikelihood,
    *,
    normalise: Normalise = "token",
    permutations: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Entropy-rate test of a group of rows: is its mean negative log-likelihood that of held-out rows?

    .. math:: p = \frac{1 + \#\{j : |\bar s_j - \bar h_j| \ge |\bar s - \bar h|\}}{1 + m}

    over m random ways to call that many of all rows the group: exact for any number of rows.

    Args:
        group: (B,) of the rows in question.
        held_out: (M,) of in-distribution rows that were not trained on, under the same model.
        normalise: each row by its tokens, or its sum.
        permutations: m.
        seed: of the permutations.

    Returns:
        The distance of the means, nats (per token), and p: small where the group is too likely or too unlikely.

    Raises:
        InputError: as `typicality`, or for less than one permutation.

    Source: the statistic of arXiv 1906.02994, with a permutation in the place of its bootstrap.
    """
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 1:
        raise InputError(f"permutations must be a whole number, at least 1, got {permutations}")
    values, usual = _rates(group, held_out, normalise)
    every, count = torch.cat([values, usual]).numpy(), len(values)
    rest, total = len(every) - count, every.sum()

    def distance(sums: Any) -> Any:
        return np.abs(sums / count - (total - sums) / rest)

    observed = float(distance(every[:count].sum()))
    random, hits = np.random.default_rng(seed), 0
    for _ in range(permutations):
        hits += int(distance(random.permutation(every)[:count].sum()) >= observed - 1e-12 * max(1.0, observed))
    return observed, (1 + hits) / (1 + permutations)


def likelihood_regret(
    model: Any,
    batch: TokenBatch,
    *,
    steps: int = 10,
    learning_rate: float = 1e-3,
    parameters: Sequence[nn.Parameter] | None = None,
    normalise: Normalise = "sum",
) -> Measurement:
    r"""How much more likely a row could be: :math:`\max_{\theta \in \Theta_x} \log p_\theta(x) - \log p_{\theta_0}(x)`.

    :math:`\Theta_x` are the weights that Adam passes through from :math:`\theta_0` on this row alone, in evaluation
    mode. Every row starts from the same weights, and they are put back.

    Args:
        model: a model with a differentiable `log_prob` and its network in ``model``.
        batch: B rows.
        steps: gradient steps per row; the regret grows with them.
        learning_rate: of Adam.
        parameters: what is adapted; all weights of the network by default.
        normalise: nats per row or per token.

    Returns:
        (B,), not negative: for an exact model a lower bound of the regret over all weights.

    Raises:
        InputError: for a model without a network, no parameters, or options out of range.
        RowError: for a row without scored tokens, or a likelihood that is or becomes not finite.

    Source: arXiv 2003.02977, which adapts the encoder of a variational autoencoder.
    """
    network = getattr(model, "model", model)
    if not isinstance(network, nn.Module):
        name = type(model).__name__
        raise InputError(f"likelihood regret adapts weights, and {name} has no network: use a model of torch")
    _known(normalise)
    if not (isinstance(steps, int) and steps >= 1 and 0 < learning_rate < math.inf):
        raise InputError(f"steps must be at least 1 and learning_rate positive, got {steps} and {learning_rate}")
    chosen = list(network.parameters()) if parameters is None else list(parameters)
    if not chosen:
        raise InputError("there are no parameters to adapt: give some, or none to adapt all")
    kept = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in chosen]
    gains, kind = [], Kind.LOWER_BOUND
    with evaluating(network), torch.enable_grad():
        try:
            for number in range(len(batch)):
                for p, value, _, _ in kept:
                    p.data.copy_(value)
                    p.requires_grad_(True)
                part = slice(number, number + 1)
                starts = None if batch.starts is None else batch.starts[part]
                row = TokenBatch(batch.ids[part], batch.attention_mask[part], batch.scored_mask[part], starts)
                gain, first = _gain(model, row, chosen, steps, learning_rate, number)
                kind = kind if first.kind is Kind.EXACT else Kind.SURROGATE
                gains.append(gain / (int(first.num_units[0]) if normalise == "token" else 1))
        finally:
            for p, value, needed, gradient in kept:
                p.data.copy_(value)
                p.requires_grad_(needed)
                p.grad = gradient
    return Measurement(torch.tensor(gains, dtype=torch.float64), kind, "likelihood_regret")


def ood_threshold(scores: Tensor, *, rate: float = 0.05) -> float:
    r"""The threshold above which a share of at most `rate` of in-distribution rows lies.

    It is the :math:`\lceil (n + 1)(1 - \text{rate}) \rceil`-th smallest score, so that a new in-distribution row scores
    above it with probability at most `rate`, for any distribution.

    Args:
        scores: (n,) of held-out in-distribution rows.
        rate: of false alarms, in (0, 1).

    Raises:
        InputError: for scores that are not finite, a rate out of range, or too few scores for it.
    """
    if scores.dim() != 1 or not bool(torch.isfinite(scores).all()):
        raise InputError(f"scores must be finite numbers (n,), got shape {tuple(scores.shape)}")
    if not 0 < rate < 1:
        raise InputError(f"rate must lie between 0 and 1, got {rate}")
    rank = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    if rank > len(scores):
        least = math.ceil(1 / rate - 1e-9) - 1
        raise InputError(f"{len(scores)} scores cannot show a false-alarm rate of {rate}: give at least {least}")
    return float(scores.double().sort().values[rank - 1])


def ood_scores(
    model: Any,
    batch: TokenBatch,
    *,
    base: Any = None,
    held_out: LogLikelihood | None = None,
    normalise: Normalise = "sum",
) -> dict[str, Measurement]:
    """Every score that needs no gradient, from one reading by each model.

    Args:
        model: the fine-tuned model.
        batch: B rows.
        base: the model before fine-tuning; where `model` has an adapter, that is the model without it.
        held_out: in-distribution log-likelihoods under `model`, for ``typicality``.
        normalise: of the ratio and the likelihood.

    Returns:
        ``likelihood_ratio``, ``likelihood``, ``perplexity``, and ``typicality`` where `held_out` is given.

    Raises:
        InputError: for a missing base model, or as the scores raise it.

    Source: arXiv 2404.08679.
    """
    found = inference_log_prob(model, batch)
    adapted: Any = getattr(model, "model", None)
    if base is None and not hasattr(adapted, "disable_adapter"):
        raise InputError("the ratio needs the model before fine-tuning: give base, or a model with an adapter")
    with nullcontext() if base is not None else adapted.disable_adapter():
        before = inference_log_prob(model if base is None else base, batch)
    out = {
        "likelihood_ratio": likelihood_ratio(found, before, normalise=normalise),
        "likelihood": likelihood_score(found, normalise=normalise),
        "perplexity": perplexity_score(found),
    }
    if held_out is not None:
        out["typicality"] = typicality(found, held_out)
    return out


def _gain(
    model: Any, row: TokenBatch, parameters: list[nn.Parameter], steps: int, rate: float, number: int
) -> tuple[float, LogLikelihood]:
    """What `steps` of Adam on one row gain at best, nats, and a likelihood of the row."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    seen: list[float] = []
    for step in range(steps + 1):
        found: LogLikelihood = model.log_prob(row)
        seen.append(float(found.value.detach()[0]))
        if not math.isfinite(seen[-1]):
            reason = f"its log-likelihood is {seen[-1]} after {step} steps: lower the learning rate"
            raise RowError(reason, row=f"row {number}")
        if int(found.num_units[0]) <= 0:
            raise RowError("has no scored token: leave it out", row=f"row {number}")
        if step < steps:
            optimizer.zero_grad()
            # Per token, so that a learning rate means the same for short rows and long ones.
            (-found.value[0] / int(found.num_units[0])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return max(seen) - seen[0], found


def _part(likelihood: LogLikelihood, where: Tensor) -> LogLikelihood:
    """The terms at some positions only."""
    assert likelihood.per_unit is not None
    assert likelihood.mask is not None
    mask = likelihood.mask & where.to(likelihood.mask.device)
    return LogLikelihood.from_per_unit(likelihood.per_unit, mask, kind=likelihood.kind, unit=likelihood.unit)


def _checked(likelihood: LogLikelihood, whose: str) -> LogLikelihood:
    bad = (~torch.isfinite(likelihood.value)).nonzero().flatten()
    if len(bad):
        reason = f"its log-likelihood under {whose} is {float(likelihood.value[bad[0]])}: leave it out"
        raise RowError(reason, row=f"row {int(bad[0])}")
    empty = (likelihood.num_units <= 0).nonzero().flatten()
    if len(empty):
        raise RowError(f"has no scored {likelihood.unit} of this kind: leave it out", row=f"row {int(empty[0])}")
    return likelihood.detach()


def _measured(value: LogLikelihood, normalise: str, name: str) -> Measurement:
    _known(normalise)
    value = value.mean_per_unit() if normalise == "token" else value
    return Measurement(value.value, value.kind, name, value.stderr)


def _rates(likelihood: LogLikelihood, held_out: LogLikelihood, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of both, float64 on the CPU."""
    if not len(held_out) or not len(likelihood):
        raise InputError("typicality needs rows and in-distribution rows to compare them with: give both")
    if likelihood.unit is not held_out.unit:
        raise InputError(f"rows per {likelihood.unit} cannot be held against rows per {held_out.unit}: use one unit")
    first, second = (likelihood_score(x, normalise=normalise).value for x in (likelihood, held_out))
    return first.double().cpu(), second.double().cpu()


def _known(normalise: str) -> None:
    if normalise not in ("sum", "token"):
        raise InputError(f"normalise must be sum or token, got {normalise!r}")
