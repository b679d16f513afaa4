r"""The probabilities of the options of a question after each step of a reasoning trace.

With options the entropy of the answer is that of a distribution over what it may be: no true answer is conditioned on,
and any model that scores text will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.signals.choice import Normalise, score_options
from loglik.signals.entropy_curve import EntropyCurve
from loglik.signals.trace_entropy import trace_contexts

__all__ = ["OptionCurve", "option_entropy_curve"]


@dataclass(frozen=True, slots=True)
class OptionCurve:
    """What a model thinks of C options after 0, 1, ..., K steps.

    Args:
        curve: entropy of the distribution over the options, at most log C; with the right option given, its
            log-probability among the options is the curve's likelihood, of one event.
        log_probs: (K + 1, C) of the options, among themselves.
        choice: (K + 1,) long, the likeliest option; of equal ones the first.
    """

    curve: EntropyCurve
    log_probs: Tensor
    choice: Tensor


def option_entropy_curve(
    model: TextModel,
    question: str,
    steps: Sequence[str],
    options: Sequence[str],
    *,
    right: int | None = None,
    separator: str = "\n",
    cue: str = "\nAnswer:",
    space: str = " ",
    normalise: Normalise = "sum",
) -> OptionCurve:
    r"""Entropy of the answer among given options, after each step of a trace.

    .. math:: H_k = -\sum_c P_k(c) \log P_k(c), \qquad P_k(c) = \text{softmax}_c\, s(c \mid x, z_{\le k})

    The model reads ``question + separator + steps[0] + ... + cue``, then ``space`` and the option. Where the
    :math:`P_k` are conditionals of one distribution, the mean of :math:`H_{k-1} - H_k` over steps drawn from it is the
    information that step k gives about the answer, at least 0. (Those of a language model nearly are: the cue is put in
    between.)

    Args:
        model: any text model.
        question: the text that the trace starts from.
        steps: K steps in order, without the conclusion where that states the answer; may be empty.
        options: C texts, at least two.
        right: number of the right option, for the information gain; the entropies do not depend on it.
        separator: stands before each step.
        cue: stands before the answer, always the same.
        space: stands between cue and option, and is scored with it.
        normalise: of the options' scores s, see `loglik.signals.choice.normalised_score`.

    Raises:
        InputError: for a right option that is none, an unknown `normalise`, or a model without a tokenizer.
        RowError: for a step or option that is empty, fewer than two options, a text that does not fit into the
            context, or a right option of probability 0.

    Source: after arXiv 2508.20395, whose entropy is that of the tokens of the true answer.
    """
    if right is not None and (isinstance(right, bool) or not 0 <= right < len(options)):
        raise InputError(f"right must be an option's number from 0 to {len(options) - 1}, got {right}")
    contexts = trace_contexts(question, steps, separator, cue)
    try:
        found = score_options(model, contexts, [options] * len(contexts), separator=space)
        choices = found.choose(normalise=normalise, alpha=0.0)
    except RowError as error:
        raise _named(error, len(options)) from None
    log_p = choices.log_probs
    # p log p is 0 where p is, and 0 minus the sum because minus a sum of zeros is -0.
    values = 0.0 - torch.where(torch.isinf(log_p), 0.0, log_p.exp() * log_p).sum(1)
    kind = Kind.EXACT if choices.kind is Kind.EXACT else Kind.SURROGATE
    likelihood = None
    if right is not None:
        own = log_p[:, right]
        impossible = torch.isinf(own).nonzero().flatten()
        if len(impossible):
            raise RowError(
                "the right option has probability 0, so that no information gain is defined: smooth the model",
                row=f"after {int(impossible[0])} steps",
            )
        likelihood = LogLikelihood(own, kind, Unit.EVENT, torch.ones(len(own), device=own.device))
    return OptionCurve(
        EntropyCurve(Measurement(values, kind, "option_entropy"), values[:, None], likelihood), log_p, choices.choice
    )


def _named(error: RowError, count: int) -> RowError:
    """The state that a refusal is about; without one for what is wrong with all of them."""
    kind, _, number = (error.row or "").partition(" ")
    if kind == "question" and number.isdigit() and int(number):
        return RowError(error.reason, row=f"after {number} steps")
    if kind == "row" and number.isdigit():
        state, option = divmod(int(number), count)
        return RowError(error.reason, row=f"after {state} steps, option {option}")
    return RowError(error.reason, row="the options")
