r"""How much choices owe to the order of the options: per question, and over many questions.

A choice that changes with the order of the options is no choice of an option. One question is asked in all, in cyclic
or in random orders (`ask_in_orders`); many of them give accuracies before and after averaging and the bias of each
position (`order_report`). Source: arXiv 2306.07951.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.models.protocol import TextModel
from loglik.signals.option_order import (
    OrderAdjusted,
    OrderEffects,
    average_orders,
    lettered_prompt,
    normalised_entropy,
    option_orders,
    order_effects,
    score_orders,
)

__all__ = [
    "OrderReport",
    "OrderSensitivity",
    "OrderedAnswer",
    "PositionBias",
    "ask_in_orders",
    "order_report",
    "order_sensitivity",
]


@dataclass(frozen=True, slots=True)
class OrderSensitivity:
    r"""Choices of one question of K options in S orders.

    Args:
        choices: (S,) long, the option chosen in each order; of equally likely ones that of the lowest number.
        positions: (S,) long, where it stood.
        orders: (S, K) long, the option at each position.
        agreement: share of the orders that choose the option chosen most often, from 1/K to 1.
        information: nats that the order and the answer share, :math:`H(\bar p) - \overline{H(p_\sigma)}`; 0 where
            every order gives the same probabilities.
    """

    choices: Tensor
    positions: Tensor
    orders: Tensor
    agreement: float
    information: float


def order_sensitivity(likelihood: LogLikelihood, orders: Tensor) -> OrderSensitivity:
    r"""What a question's answer owes to the order in which its options are shown.

    .. math:: I = H\Bigl( \frac{1}{S} \sum_\sigma p_\sigma \Bigr) - \frac{1}{S} \sum_\sigma H(p_\sigma), \qquad
              p_\sigma(k) = P_\sigma(\sigma^{-1}(k))

    Args:
        likelihood: (S K,) of the labels, positions of an order together (`score_orders`).
        orders: (S, K), the option at each position.

    Raises:
        InputError: for numbers that do not fit.
        RowError: for an order that gives every label probability 0.

    Source: arXiv 2306.07951; the information is ours.
    """
    average_orders(likelihood, orders)  # refuses what does not fit
    inverse = orders.long().cpu().argsort(1)
    log_p = likelihood.value.detach().reshape(orders.shape).double().cpu().log_softmax(1)
    by_option = log_p.gather(1, inverse)
    choices = by_option.argmax(1)
    shares = torch.bincount(choices, minlength=orders.shape[1]).double() / len(orders)
    probs = by_option.exp()
    entropies = torch.special.entr(probs.mean(0)).sum() - torch.special.entr(probs).sum(1).mean()
    return OrderSensitivity(
        choices,
        inverse.gather(1, choices[:, None])[:, 0],
        orders.long().cpu(),
        float(shares.max()),
        max(0.0, float(entropies)),
    )


@dataclass(frozen=True, slots=True)
class OrderedAnswer:
    """One question, asked in several orders.

    Args:
        adjusted: averaged over the orders; its `naive` is the answer to the options as they were given.
        sensitivity: how the choice depends on the order.
        effects: of options, positions and labels in nats; None where they were not asked for.
    """

    adjusted: OrderAdjusted
    sensitivity: OrderSensitivity
    effects: OrderEffects | None

    @property
    def naive_choice(self) -> int:
        """The option chosen in the order given."""
        return int(self.adjusted.naive.argmax())

    @property
    def choice(self) -> int:
        """The option chosen by the average."""
        return int(self.adjusted.probs.argmax())


def ask_in_orders(
    model: TextModel,
    question: str,
    options: Sequence[str],
    orders: Literal["all", "cyclic"] | int = "all",
    *,
    labels: Sequence[str] = string.ascii_uppercase,
    move_labels: bool = False,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    effects: bool = True,
    separator: str = " ",
    template: Callable[[str, Sequence[str], Sequence[str]], str] = lettered_prompt,
    seed: int = 0,
) -> OrderedAnswer:
    """Ask one question in several orders of its options, and average.

    Args:
        model: any text model.
        question: its text.
        options: K texts.
        orders: as `option_orders`. Random orders do not hold the order given: it is asked besides, and not averaged.
        labels: at least K different ones; the first K are used.
        move_labels: ask every order with each rotation of the labels too, K times as many prompts, so that the bias of
            a label can be told from that of its position.
        mean: as `average_orders`.
        effects: decompose log-probabilities too (`order_effects`).
        separator: stands between prompt and label, and is scored with it.
        template: makes the prompt.
        seed: of random orders.

    Raises:
        InputError: for options, labels or orders that do not fit.
        RowError: for a prompt that cannot be scored, or labels of probability 0.

    Source: arXiv 2306.07951.
    """
    count = len(options)
    own = torch.arange(count)[None]
    shown = option_orders(count, orders, seed=seed)
    marks = own.expand_as(shown)
    if move_labels:
        turned = option_orders(count, "cyclic")
        marks = turned.repeat(len(shown), 1)
        shown = shown.repeat_interleave(count, 0)
    extra = not (torch.equal(shown[:1], own) and torch.equal(marks[:1], own))
    asked, named = (torch.cat([own, shown]), torch.cat([own, marks])) if extra else (shown, marks)
    found = score_orders(
        model, question, options, asked, labels=labels, label_orders=named, separator=separator, template=template
    )
    rest = found[count:] if extra else found
    adjusted = average_orders(rest, shown, mean=mean)
    if extra:
        adjusted = replace(adjusted, naive=average_orders(found[:count], own).naive)
    parts = order_effects(rest, shown, label_orders=marks if move_labels else None) if effects else None
    return OrderedAnswer(adjusted, order_sensitivity(rest, shown), parts)


@dataclass(frozen=True, slots=True)
class PositionBias:
    """Positions of the questions that have K options.

    Args:
        options: K.
        questions: how many there are.
        probability: (K,) mean probability of each position; 1/K without bias.
        interval: (K, 2) of it, by a bootstrap over questions; None for one question.
        chosen: (K,) share of the orders in which the choice stood at each position.
        confusion: (K, K) long, orders in which the right option stood at the row's position and the choice at the
            column's; None without right answers.
        recall: (K,) share of right choices by the position of the right option; None without right answers, or if it
            never stood at one of them.
        position_effects: (K,) mean of `OrderEffects.position`, nats; None if a question has none.
        label_effects: (K,) mean of `OrderEffects.label`, nats, by place in the list of labels; None likewise.
    """

    options: int
    questions: int
    probability: Tensor
    interval: Tensor | None
    chosen: Tensor
    confusion: Tensor | None
    recall: Tensor | None
    position_effects: Tensor | None
    label_effects: Tensor | None


@dataclass(frozen=True, slots=True)
class OrderReport:
    """Choices over many questions, before and after averaging over orders.

    Args:
        questions: Q.
        flips: share of questions whose choice is not the same in all orders.
        changed: share of questions whose choice averaging changes.
        agreement: mean of `OrderSensitivity.agreement`.
        information: mean of `OrderSensitivity.information`, nats.
        first_bias: mean of `OrderAdjusted.first_bias`.
        first_interval: of it, by a bootstrap over questions; None for one question.
        coverage: mean; None for an unnormalised model.
        entropy_naive: mean normalised entropy of the answers in the order given, in [0, 1].
        entropy: the same after averaging.
        accuracy_naive: share right in the order given; None without right answers, as all below.
        accuracy: share right after averaging.
        accuracy_single: share right in one of the orders, averaged over them.
        right_always: share of questions right in every order.
        right_ever: share of questions right in some order.
        p_value: exact McNemar test of `accuracy` against `accuracy_naive`.
        sizes: one `PositionBias` for each number of options, ascending.
        kind: what the probabilities promise.
    """

    questions: int
    flips: float
    changed: float
    agreement: float
    information: float
    first_bias: float
    first_interval: tuple[float, float] | None
    coverage: float | None
    entropy_naive: float
    entropy: float
    accuracy_naive: float | None
    accuracy: float | None
    accuracy_single: float | None
    right_always: float | None
    right_ever: float | None
    p_value: float | None
    sizes: tuple[PositionBias, ...]
    kind: Kind


def order_report(
    answers: Sequence[OrderedAnswer],
    gold: Sequence[int] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> OrderReport:
    """Summarise questions that were asked in several orders.

    Args:
        answers: of Q questions (`ask_in_orders`); their numbers of options may differ.
        gold: (Q,) the right option of each, from 0.
        level: of the intervals.
        resamples: of the bootstrap over questions.
        seed: of the bootstrap.

    Raises:
        InputError: for no questions, a gold of another length, or options out of range.
        RowError: for a question without that option.

    Source: arXiv 2306.07951.
    """
    if not answers:
        raise InputError("there are no questions: give at least one")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level must lie between 0 and 1, and resamples be at least 1: got {level} and {resamples}")
    if gold is not None:
        _check_gold(answers, gold)
    generator = np.random.default_rng(seed)
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(values: np.ndarray) -> np.ndarray | None:
        """(..., 2) ends, of the mean over the first dimension."""
        if len(values) < 2:
            return None
        drawn = values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
        return np.asarray(np.quantile(drawn, tails, axis=0)).T

    first = np.array([answer.adjusted.first_bias for answer in answers])
    ends = interval(first)
    covered = [answer.adjusted.coverage for answer in answers if answer.adjusted.coverage is not None]
    accuracies: dict[str, float | None] = dict.fromkeys(
        ("accuracy_naive", "accuracy", "accuracy_single", "right_always", "right_ever", "p_value")
    )
    if gold is not None:
        pairs = list(zip(answers, gold, strict=True))
        before = np.array([answer.naive_choice == right for answer, right in pairs])
        after = np.array([answer.choice == right for answer, right in pairs])
        single = [float((answer.sensitivity.choices == right).double().mean()) for answer, right in pairs]
        worse, better = int((before & ~after).sum()), int((~before & after).sum())
        accuracies = {
            "accuracy_naive": float(before.mean()),
            "accuracy": float(after.mean()),
            "accuracy_single": float(np.mean(single)),
            "right_always": float(np.mean([share == 1 for share in single])),
            "right_ever": float(np.mean([share > 0 for share in single])),
            "p_value": float(scipy.stats.binomtest(better, worse + better).pvalue) if worse + better else 1.0,
        }
    sizes = []
    for size in sorted({answer.adjusted.probs.numel() for answer in answers}):
        which = [i for i, answer in enumerate(answers) if answer.adjusted.probs.numel() == size]
        part = [answers[i] for i in which]
        table = torch.stack([answer.adjusted.position.double().cpu() for answer in part])
        spread = interval(table.numpy())
        shares = [
            torch.bincount(a.sensitivity.positions, minlength=size).double() / len(a.sensitivity.positions)
            for a in part
        ]
        confusion = None if gold is None else _confusion(part, [gold[i] for i in which], size)
        sizes.append(
            PositionBias(
                size,
                len(part),
                table.mean(0),
                None if spread is None else torch.from_numpy(spread),
                torch.stack(shares).mean(0),
                confusion,
                None if confusion is None or bool((confusion.sum(1) == 0).any()) else _recall(confusion),
                _mean([a.effects.position if a.effects is not None else None for a in part]),
                _mean([a.effects.label if a.effects is not None else None for a in part]),
            )
        )
    return OrderReport(
        len(answers),
        float(np.mean([len(set(answer.sensitivity.choices.tolist())) > 1 for answer in answers])),
        float(np.mean([answer.choice != answer.naive_choice for answer in answers])),
        float(np.mean([answer.sensitivity.agreement for answer in answers])),
        float(np.mean([answer.sensitivity.information for answer in answers])),
        float(first.mean()),
        None if ends is None else (float(ends[0]), float(ends[1])),
        float(np.mean(covered)) if len(covered) == len(answers) else None,
        float(np.mean([float(normalised_entropy(answer.adjusted.naive)) for answer in answers])),
        float(np.mean([float(normalised_entropy(answer.adjusted.probs)) for answer in answers])),
        sizes=tuple(sizes),
        kind=answers[0].adjusted.kind,
        **accuracies,
    )


def _check_gold(answers: Sequence[OrderedAnswer], gold: Sequence[int]) -> None:
    if len(gold) != len(answers):
        raise InputError(f"gold must have an option's number per question: got {len(gold)} for {len(answers)}")
    for number, (answer, right) in enumerate(zip(answers, gold, strict=True)):
        size = answer.adjusted.probs.numel()
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < size:
            raise RowError(f"has {size} options, and gold is {right!r}", row=f"question {number}")


def _confusion(answers: Sequence[OrderedAnswer], gold: Sequence[int], size: int) -> Tensor:
    """(K, K) long, position of the right option by position of the choice."""
    counts = torch.zeros(size * size, dtype=torch.long)
    for answer, right in zip(answers, gold, strict=True):
        found = answer.sensitivity
        place = (found.orders == right).long().argmax(1)
        counts += torch.bincount(place * size + found.positions, minlength=size * size)
    return counts.reshape(size, size)


def _mean(effects: Sequence[Tensor | None]) -> Tensor | None:
    given = [effect for effect in effects if effect is not None]
    return torch.stack(given).mean(0).cpu() if len(given) == len(effects) else None


def _recall(confusion: Tensor) -> Tensor:
    return confusion.diagonal().double() / confusion.sum(1)
