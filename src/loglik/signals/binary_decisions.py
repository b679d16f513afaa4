r"""Forced yes/no answers: how likely a model says yes, without sampling (arXiv 2501.16356).

`binary_probability` reads one token of a model with a chain rule; `score_forms` and `binary_answers` read whole words
of any text model. `draw_answer_lists` lets a model answer many times in one text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, TextModel, require
from loglik.scoring.score import score

__all__ = ["BinaryProbability", "binary_answers", "binary_probability", "draw_answer_lists", "score_forms"]


@dataclass(frozen=True, slots=True)
class BinaryProbability:
    """A forced yes/no answer after B prompts.

    Args:
        probability: (B,) of yes, among yes and no.
        logit: (B,) bias in nats, log P(yes) - log P(no).
        coverage: (B,) P(yes) + P(no) before renormalising; below about 0.9 the forced reading is doubtful.
        divergence: (B,) KL divergence from a fair coin in nats, 0 to log 2.
        kind: what the probabilities promise.
    """

    probability: Tensor
    logit: Tensor
    coverage: Tensor
    divergence: Tensor
    kind: Kind = Kind.EXACT


def binary_probability(
    model: ChainRule, prefix: TokenBatch, yes: Sequence[int], no: Sequence[int], *, temperature: float = 1.0
) -> BinaryProbability:
    r"""Probability of a yes/no answer from the next token, without sampling.

    .. math:: p = \frac{P_Y}{P_Y + P_N}, \qquad P_Y = \sum_{v \in Y} p_T(v \mid \text{prompt}), \qquad
              p_T = \text{softmax}(\log p / T)

    Args:
        model: gives next-token log-probabilities.
        prefix: B prompts.
        yes: token ids of all forms of yes (``yes``, `` Yes``, ...).
        no: token ids of all forms of no.
        temperature: T, positive.

    Raises:
        InputError: for a model without per-token conditionals, or options out of range.
        RowError: for a prompt after which both answers have probability 0.

    Source: arXiv 2501.16356.
    """
    _check_temperature(temperature)
    if not yes or not no or set(yes) & set(no):
        raise InputError("yes and no need at least one token each, and none in common")
    chain = require(model, ChainRule, "binary probability")  # type: ignore[type-abstract]
    log_p = (chain.next_log_probs(prefix) / temperature).log_softmax(-1)
    size = log_p.shape[-1]
    outside = [token for token in [*yes, *no] if not 0 <= token < size]
    if outside:
        raise InputError(f"token {outside[0]} is not in the vocabulary of {size}")
    of_yes, of_no = (log_p[:, sorted(set(side))].logsumexp(-1) for side in (yes, no))
    return _forced(of_yes, of_no, torch.logaddexp(of_yes, of_no).exp(), Kind.EXACT)


def score_forms(
    model: TextModel, prompts: Sequence[str], yes: Sequence[str], no: Sequence[str], *, separator: str = " "
) -> LogLikelihood:
    """Log-likelihoods of all forms of yes and then of no after each prompt, such as ``yes``, ``Yes``, ``no``, ``No``.

    Args:
        model: any text model.
        prompts: B texts, none empty.
        yes: forms of yes; forms may have several tokens.
        no: forms of no.
        separator: stands between prompt and form, and is scored with it.

    Returns:
        (B F,) nats, forms of a prompt together; what `binary_answers` takes.

    Raises:
        InputError: for no prompts, forms that are empty, or one that begins with another: it would count twice.
        RowError: for a prompt that is empty or cannot be scored.

    Source: arXiv 2501.16356.
    """
    forms = _checked_forms(yes, no)
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts must be a list of at least one text")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError(f"must be a text that is not empty, got {prompt!r}", row=f"prompt {number}")
    try:
        return score(model, [(prompt, separator + form) for prompt in prompts for form in forms])
    except RowError as error:  # rows of the score are forms of prompts
        number = int(error.row.split()[1]) if error.row else 0
        raise RowError(error.reason, row=f"prompt {number // len(forms)}") from None


def binary_answers(likelihood: LogLikelihood, yes: Sequence[bool], *, temperature: float = 1.0) -> BinaryProbability:
    r"""Probability of a yes/no answer from the likelihoods of its forms.

    .. math:: p = \frac{P_Y}{P_Y + P_N}, \qquad P_Y = \sum_{f \in Y} p(f \mid \text{prompt})^{1 / T}

    For forms of one token this is `binary_probability` at every temperature, except that coverage is that of T = 1.

    Args:
        likelihood: (B F,) of F forms, those of a prompt together (`score_forms`).
        yes: (F,) whether each form means yes; the others mean no.
        temperature: T, positive.

    Raises:
        InputError: for numbers that do not fit, a side without forms, or an unnormalised likelihood: without its
            constant, coverage is unknown.
        RowError: for a prompt after which both answers have probability 0, or a value that is no log-likelihood.

    Source: arXiv 2501.16356.
    """
    _check_temperature(temperature)
    sides = torch.tensor([bool(side) for side in yes])
    if len(sides) < 2 or bool(sides.all()) or not bool(sides.any()):
        raise InputError("yes must have a true entry for each form of yes and a false one for each form of no")
    if not len(likelihood) or len(likelihood) % len(sides):
        raise InputError(f"{len(sides)} forms need as many likelihoods for each prompt: got {len(likelihood)} in all")
    if likelihood.kind is Kind.UNNORMALIZED:
        raise InputError("an unnormalised likelihood does not tell how much probability the answers cover")
    table = likelihood.value.detach().double().cpu().reshape(-1, len(sides))
    bad = (table.isnan() | (table == torch.inf)).nonzero()
    if len(bad):
        prompt, form = bad[0].tolist()
        raise RowError(f"form {form} has {float(table[prompt, form])}, no log-likelihood", row=f"prompt {prompt}")
    scaled = table / temperature
    of_yes, of_no = (scaled[:, mask].logsumexp(1) for mask in (sides, ~sides))
    return _forced(of_yes, of_no, table.logsumexp(1).exp(), likelihood.kind - likelihood.kind)


def draw_answer_lists(
    model: TextModel,
    prompt: str,
    yes: Sequence[str],
    no: Sequence[str],
    *,
    num_lists: int = 50,
    length: int = 20,
    separator: str = " ",
    between: str = ", ",
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Let a model answer yes or no many times in one text, each answer after those before it.

    Every answer is drawn from its forced probability (`binary_answers`); the first form of its side is written.

    Args:
        model: any text model.
        prompt: that asks for a list.
        yes: forms of yes.
        no: forms of no.
        num_lists: M lists.
        length: answers of each, at least 1.
        separator: between the prompt and the first answer.
        between: between two answers.
        temperature: of the forced choice, positive.
        seed: of the draws.

    Returns:
        (M, length) long, 1 is yes; what `randomness_report` takes.

    Raises:
        InputError: for options out of range, as `score_forms`.
        RowError: for a text that cannot be scored, such as one longer than the context.

    Source: arXiv 2501.16356.
    """
    if num_lists < 1 or length < 1:
        raise InputError(f"num_lists and length must be at least 1, got {num_lists} and {length}")
    forms = _checked_forms(yes, no)
    sides = [number < len(yes) for number in range(len(forms))]
    generator = torch.Generator().manual_seed(seed)
    lists = torch.zeros(num_lists, 0, dtype=torch.long)
    for step in range(length):
        # Lists that are still the same are asked once.
        written, which = torch.unique(lists, dim=0, return_inverse=True) if step else (lists[:1], lists.new_zeros(1))
        texts = [prompt + _written(row, yes[0], no[0], separator, between) for row in written.tolist()]
        found = score_forms(model, texts, yes, no, separator=between if step else separator)
        chance = binary_answers(found, sides, temperature=temperature).probability
        each = chance[which].expand(num_lists)
        drawn = torch.rand(num_lists, generator=generator, dtype=torch.float64) < each
        lists = torch.cat([lists, drawn.long()[:, None]], 1)
    return lists


def _written(answers: Sequence[int], yes: str, no: str, separator: str, between: str) -> str:
    return "".join((between if place else separator) + (yes if answer else no) for place, answer in enumerate(answers))


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature must be positive and finite, got {temperature}")


def _checked_forms(yes: Sequence[str], no: Sequence[str]) -> list[str]:
    """Those of yes and then those of no."""
    if isinstance(yes, str) or isinstance(no, str) or not len(yes) or not len(no):
        raise InputError("yes and no must be lists of at least one text each")
    forms = [*yes, *no]
    if not all(isinstance(form, str) and form.strip() for form in forms):
        raise InputError(f"forms of yes and no must be texts that are not empty, got {forms}")
    for place, form in enumerate(forms):
        for other, longer in enumerate(forms):
            if place != other and longer.startswith(form):
                raise InputError(f"the form {longer!r} begins with the form {form!r} and would count twice: remove it")
    return forms


def _forced(yes: Tensor, no: Tensor, coverage: Tensor, kind: Kind) -> BinaryProbability:
    """Of the log-probabilities of both sides."""
    both = torch.logaddexp(yes, no)
    lost = (~torch.isfinite(both)).nonzero().flatten()
    if len(lost):
        raise RowError(
            "gives neither answer a probability: check the tokens of yes and no", row=f"prompt {int(lost[0])}"
        )
    probability = (yes - both).exp()
    entropy = torch.special.entr(probability) + torch.special.entr((no - both).exp())
    return BinaryProbability(probability, yes - no, coverage, (math.log(2) - entropy).clamp(min=0), kind)
