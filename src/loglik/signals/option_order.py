r"""Answers without the bias of option order: averages over orders, and what positions and labels contribute.

A model that answers by option letters prefers positions and letters whatever stands there. Averaging over the orders of
the options removes that (arXiv 2306.07951).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import scipy.stats
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.models.protocol import TextModel
from loglik.scoring.score import score

__all__ = [
    "AlignmentEntropy",
    "OrderAdjusted",
    "OrderEffects",
    "alignment_entropy",
    "average_orders",
    "lettered_prompt",
    "normalised_entropy",
    "option_orders",
    "order_effects",
    "score_orders",
]

_MOST_ORDERS = 5000


def option_orders(options: int, orders: Literal["all", "cyclic"] | int = "all", *, seed: int = 0) -> Tensor:
    """Orders of K options: (S, K) long, where column j holds the option that is shown at position j.

    Args:
        options: K, at least 2.
        orders: ``all`` K! of them, at most 5000 (K up to 6), ``cyclic`` K rotations, in which each option stands once
            at each position, or a number of random orders.
        seed: of the random orders.

    Raises:
        InputError: for options out of range, or too many orders.

    Source: arXiv 2306.07951.
    """
    if isinstance(options, bool) or not isinstance(options, int) or options < 2:
        raise InputError(f"options must be a whole number of at least 2, got {options!r}")
    if orders == "all":
        if math.factorial(options) > _MOST_ORDERS:
            raise InputError(
                f"{options} options have {math.factorial(options)} orders: set orders to cyclic or a number"
            )
        return torch.tensor(list(permutations(range(options))))
    if orders == "cyclic":
        places = torch.arange(options)
        return (places + places[:, None]) % options
    if isinstance(orders, bool) or not isinstance(orders, int) or orders < 1:
        raise InputError(f"orders must be all, cyclic or a positive number, got {orders!r}")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(orders, options, generator=generator).argsort(1)


def lettered_prompt(question: str, options: Sequence[str], labels: Sequence[str]) -> str:
    """The question, an option per line behind its label, and ``Answer:``; arXiv 2306.07951."""
    lines = [f"{label}. {text}\n" for label, text in zip(labels, options, strict=True)]
    return f"Question: {question}\n{''.join(lines)}Answer:"


def score_orders(
    model: TextModel,
    question: str,
    options: Sequence[str],
    orders: Tensor,
    *,
    labels: Sequence[str] = string.ascii_uppercase,
    label_orders: Tensor | None = None,
    separator: str = " ",
    template: Callable[[str, Sequence[str], Sequence[str]], str] = lettered_prompt,
) -> LogLikelihood:
    r"""Log-likelihood of each label as the answer, the options shown in each order.

    Args:
        model: any text model.
        question: its text.
        options: K texts.
        orders: (S, K) from `option_orders`.
        labels: at least K different labels; the first K are used.
        label_orders: (S, K), the label that stands at each position; by default labels keep their places, and what is
            due to a label cannot be told from what is due to its position.
        separator: stands between prompt and label, and is scored with it.
        template: makes the prompt from question, options and labels in the order shown.

    Returns:
        (S K,) nats, positions of an order together; what `average_orders` and `order_effects` take.

    Raises:
        InputError: for orders or labels that do not fit.
        RowError: for a prompt that cannot be scored.

    Source: arXiv 2306.07951.
    """
    if isinstance(options, str) or not all(isinstance(text, str) and text.strip() for text in options):
        raise InputError("options must be a list of texts that are not empty")
    shown = _require_orders("orders", orders, len(options))
    used = list(labels)[: len(options)]
    if len(set(used)) < len(options):
        raise InputError(f"{len(options)} options need as many different labels, got {used}")
    marks = torch.arange(len(options)).expand_as(shown)
    if label_orders is not None:
        marks = _require_orders("label_orders", label_orders, len(options))
        if len(marks) != len(shown):
            raise InputError(f"label_orders must have a row for each order: got {len(marks)} for {len(shown)}")
    pairs: list[tuple[str, str]] = []
    for order, mark in zip(shown.tolist(), marks.tolist(), strict=True):
        names = [used[label] for label in mark]
        prompt = template(question, [options[option] for option in order], names)
        pairs.extend((prompt, separator + name) for name in names)
    try:
        return score(model, pairs)
    except RowError as error:  # rows of the score are labels in orders
        number = int(error.row.split()[1]) if error.row else 0
        raise RowError(error.reason, row=f"order {number // len(options)}") from None


@dataclass(frozen=True, slots=True)
class OrderAdjusted:
    """An answer with and without the bias of order.

    Args:
        probs: (K,) of the options, averaged over orders.
        naive: (K,) of the options in the first order.
        position: (K,) mean probability of each position, whatever stands there; uniform without bias.
        first_bias: `position` of the first place minus 1/K ("A-bias"), from -1/K to 1 - 1/K.
        coverage: mean total probability of the labels before they were renormalised; None for an unnormalised model.
            Where it is low, the labels are not what the model would say.
        kind: what the probabilities promise.
    """

    probs: Tensor
    naive: Tensor
    position: Tensor
    first_bias: float
    coverage: float | None
    kind: Kind


def average_orders(
    likelihood: LogLikelihood, orders: Tensor, *, mean: Literal["arithmetic", "geometric"] = "arithmetic"
) -> OrderAdjusted:
    r"""Average an answer over orders of its options.

    .. math:: r(k) = \frac{1}{S} \sum_\sigma P_\sigma(\sigma^{-1}(k)), \qquad
              g(k) \propto \exp\Bigl( \frac{1}{S} \sum_\sigma \log P_\sigma(\sigma^{-1}(k)) \Bigr)

    with :math:`P_\sigma(j)` the probability of the label at position j, renormalised over labels. If
    :math:`\log P_\sigma(j) = \log \pi(\sigma(j)) + b_j - \log Z_\sigma`, the geometric mean over all or over cyclic
    orders is :math:`\pi` exactly; the arithmetic mean is drawn towards the uniform distribution.

    Args:
        likelihood: (S K,) of the labels, positions of an order together (`score_orders`).
        orders: (S, K), the option at each position.
        mean: ``arithmetic`` (the paper's) or ``geometric``.

    Raises:
        InputError: for numbers that do not fit, or an unknown mean.
        RowError: for an order that gives every label probability 0, or, for the geometric mean, any label.

    Source: arXiv 2306.07951. Its released loader takes the order where its inverse belongs, which shrinks answers of
    three and more options towards uniform; the inverse is used here.
    """
    if mean not in ("arithmetic", "geometric"):
        raise InputError(f"mean must be arithmetic or geometric, got {mean!r}")
    table, shown = _table(likelihood, orders, zeros=mean == "arithmetic")
    log_p = table.log_softmax(1)
    by_option = log_p.gather(1, shown.argsort(1))  # argsort inverts a permutation
    probs = by_option.exp().mean(0) if mean == "arithmetic" else by_option.mean(0).softmax(0)
    position = log_p.exp().mean(0)
    kind = likelihood.kind - likelihood.kind
    unnormalised = likelihood.kind is Kind.UNNORMALIZED
    return OrderAdjusted(
        probs,
        by_option[0].exp(),
        position,
        float(position[0]) - 1 / len(position),
        None if unnormalised else float(table.exp().sum(1).mean()),
        Kind.EXACT if unnormalised else kind,
    )


@dataclass(frozen=True, slots=True)
class OrderEffects:
    """What log-probabilities of labels owe to the option, its position and its label; effects sum to 0, in nats.

    Args:
        option: (K,) what speaks for each option.
        position: (K,) bias of each position (and of its label, where labels keep their places).
        label: (K,) bias of each label; None where labels keep their places.
        residual_share: share of the variance within orders that is none of these, in [0, 1].
    """

    option: Tensor
    position: Tensor
    label: Tensor | None
    residual_share: float


def order_effects(likelihood: LogLikelihood, orders: Tensor, *, label_orders: Tensor | None = None) -> OrderEffects:
    r"""Decompose log-probabilities of labels by least squares.

    .. math:: \log P_\sigma(j) = \alpha_{\sigma(j)} + b_j \; [+\, d_{\lambda(j)}] + c_\sigma + \varepsilon_{\sigma j}

    Args:
        likelihood: (S K,) of the labels, positions of an order together (`score_orders`).
        orders: (S, K), the option at each position.
        label_orders: (S, K), the label at each position, if labels were moved too.

    Raises:
        InputError: for numbers that do not fit, or orders that cannot tell the effects apart.
        RowError: for a label of probability 0.

    Source: arXiv 2306.07951; the decomposition is ours.
    """
    table, shown = _table(likelihood, orders, zeros=False)
    options = table.shape[1]
    factors = [shown, torch.arange(options).expand_as(shown)]
    if label_orders is not None:
        marks = _require_orders("label_orders", label_orders, options)
        if marks.shape != shown.shape:
            raise InputError(f"label_orders must have a row for each order: got {len(marks)} for {len(shown)}")
        factors.append(marks)
    # Within an order every indicator has mean 1/K: taking it away leaves c out of the fit.
    design = torch.cat([torch.nn.functional.one_hot(f, options).double() - 1 / options for f in factors], -1)
    design, centred = design.flatten(0, 1), (table - table.mean(1, keepdim=True)).double().flatten()
    if int(torch.linalg.matrix_rank(design)) < len(factors) * (options - 1):
        raise InputError(
            f"{len(shown)} orders cannot tell options, positions and labels apart: use cyclic or all orders, and move "
            "labels independently of options"
        )
    effects = torch.linalg.pinv(design) @ centred  # of all solutions the smallest: each effect sums to 0
    total = float(centred.square().sum())
    residual = float((centred - design @ effects).square().sum())
    parts = effects.reshape(len(factors), options)
    share = residual / total if total > 0 else 0.0
    return OrderEffects(parts[0], parts[1], parts[2] if len(factors) > 2 else None, min(1.0, share))


def _require_orders(name: str, orders: Tensor, options: int) -> Tensor:
    if orders.dim() != 2 or not len(orders) or orders.shape[1] != options or orders.is_floating_point():
        raise InputError(f"{name} must be whole numbers of shape (S, {options}), got {tuple(orders.shape)}")
    bad = (orders.sort(1).values != torch.arange(options, device=orders.device)).any(1).nonzero().flatten()
    if len(bad):
        raise RowError(f"{orders[bad[0]].tolist()} is no order of 0..{options - 1}", row=f"{name} {int(bad[0])}")
    return orders.long()


def _table(likelihood: LogLikelihood, orders: Tensor, *, zeros: bool) -> tuple[Tensor, Tensor]:
    """(S, K) log-likelihoods of labels by position, and the orders."""
    shown = _require_orders("orders", orders, orders.shape[1] if orders.dim() == 2 else 0)
    if len(likelihood) != shown.numel():
        raise InputError(f"{tuple(shown.shape)} orders need {shown.numel()} log-likelihoods, got {len(likelihood)}")
    table = likelihood.value.detach().reshape(shown.shape)
    lost = ~torch.isfinite(table.amax(1)) if zeros else ~torch.isfinite(table).all(1)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        what = "gives no label a probability" if zeros else "gives a label probability 0, or no number"
        raise RowError(f"{what}: {table[row].tolist()}", row=f"order {row}")
    return table, shown.to(table.device)


def normalised_entropy(probs: Tensor) -> Tensor:
    r"""Entropy of answers as a share of its maximum, :math:`H(p) / \log K \in [0, 1]`, over the last dimension.

    Args:
        probs: (..., K) probabilities of K options, at least 2, that sum to 1.

    Raises:
        InputError: for values that are no distribution.

    Source: arXiv 2306.07951.
    """
    _require_distributions("probs", probs)
    nats: Tensor = torch.special.entr(probs).sum(-1)
    return (nats / math.log(probs.shape[-1])).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class AlignmentEntropy:
    """How a model's divergence from G subgroups depends on how close these are to uniform.

    Args:
        divergence: (G,) mean over questions of KL(model || subgroup), nats.
        entropy: (G,) mean over questions of the subgroup's normalised entropy.
        correlation: Pearson's, of the two. Strongly negative: the model seems aligned with whoever is close to uniform.
        slope: nats of divergence per unit of normalised entropy.
    """

    divergence: Tensor
    entropy: Tensor
    correlation: float
    slope: float


def alignment_entropy(responses: Sequence[Tensor], subgroups: Sequence[Tensor]) -> AlignmentEntropy:
    r"""Regress the divergence between a model and subgroups of a population on the subgroups' entropy.

    .. math:: \frac{1}{Q} \sum_q \mathrm{KL}(r_q \,\|\, p_{gq}) \sim \frac{1}{Q} \sum_q H(p_{gq}) / \log K_q

    A model whose answers are close to uniform gives a negative slope, whatever it was trained on.

    Args:
        responses: for each of Q questions (K_q,) probabilities of the options (`average_orders`).
        subgroups: for each question (G, K_q) those of the subgroups, positive wherever the response is.

    Raises:
        InputError: for numbers that do not pair, fewer than three subgroups, or subgroups or divergences that are all
            alike.
        RowError: for a question whose values are no distributions, or a subgroup without an answer that the model
            gives: the divergence is infinite, leave the question out.

    Source: arXiv 2306.07951.
    """
    if len(responses) != len(subgroups) or not len(responses):
        raise InputError(f"responses and subgroups must pair by question: got {len(responses)} and {len(subgroups)}")
    divergence, entropy = [], []
    for number, (response, groups) in enumerate(zip(responses, subgroups, strict=True)):
        if response.dim() != 1 or groups.dim() != 2 or groups.shape[1:] != response.shape:
            shapes = f"{tuple(response.shape)} and {tuple(groups.shape)}"
            raise RowError(f"needs a response (K,) and subgroups (G, K), got {shapes}", row=f"question {number}")
        _require_distributions(f"the response to question {number}", response)
        _require_distributions(f"the subgroups' answers to question {number}", groups)
        lacking = ((groups == 0) & (response > 0)).any(1).nonzero().flatten()
        if len(lacking):
            raise RowError(
                f"subgroup {int(lacking[0])} never gives an answer that the model gives: the divergence is infinite, "
                "so leave the question out",
                row=f"question {number}",
            )
        log_ratio = torch.where(response > 0, response.log() - groups.log(), 0.0)
        divergence.append((response * log_ratio).sum(1).double())
        entropy.append(normalised_entropy(groups).double())
    if len({len(groups) for groups in subgroups}) > 1 or len(subgroups[0]) < 3:
        raise InputError("a regression needs the same subgroups in every question, at least three of them")
    x, y = torch.stack(entropy).mean(0), torch.stack(divergence).mean(0)
    if float(x.std()) < 1e-12 or float(y.std()) < 1e-12:
        raise InputError("the subgroups have all the same entropy or divergence, so there is nothing to regress")
    fit = scipy.stats.linregress(x.cpu().numpy(), y.cpu().numpy())
    return AlignmentEntropy(y, x, float(fit.rvalue), float(fit.slope))


def _require_distributions(name: str, probs: Tensor) -> None:
    fits = probs.dim() > 0 and probs.shape[-1] > 1 and bool((probs >= 0).all())
    if not fits or bool(((probs.sum(-1) - 1).abs() > 1e-4).any()):
        raise InputError(f"{name} must be probabilities of at least two options that sum to 1")
