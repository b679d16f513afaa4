r"""Multiple choice by likelihood: which option a model finds likeliest, under every normalisation in use.

The sum favours short options, a mean per token or byte does not, and options that are likely anywhere are corrected for
by their likelihood without the question. All are one formula, `normalised_score`, followed by a softmax over the
options of each question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.engine import ScoreBoundary
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy

__all__ = [
    "Choices",
    "Normalise",
    "OptionScores",
    "choose",
    "contextual_calibration",
    "normalised_score",
    "score_options",
]

Normalise = Literal["sum", "token", "byte", "character"]
_NORMALISE = ("sum", "token", "byte", "character")


def normalised_score(
    likelihood: LogLikelihood,
    *,
    normalise: Normalise = "sum",
    lengths: Tensor | None = None,
    prior: LogLikelihood | None = None,
    alpha: float = 1.0,
) -> LogLikelihood:
    r"""Score of each option, corrected for its length and its prior.

    .. math:: s(q, c) = \frac{\log p(c \mid q) - \alpha \log p(c)}{|c|}

    ====================================== ===========================================================================
    what the field calls it                options
    ====================================== ===========================================================================
    sum, ``acc``                           none
    length-normalised, ``acc_norm``        ``normalise="token"``, or ``"character"`` or ``"byte"`` with `lengths`
    unconditional normalisation, PMI       `prior` scored without the question
    domain-conditional PMI                 `prior` scored after a premise such as ``Answer:`` (arXiv 2104.08315)
    candidate-prior normalisation (CPN)    ``normalise="token"``, `prior` and `alpha` (arXiv 2507.23284)
    ====================================== ===========================================================================

    With ``alpha=1`` and sums this is :math:`\log p(q \mid c) - \log p(q)`, so that the best option is the one under
    which the question is likeliest. Means per token do not obey Bayes' rule: options of different length weigh
    differently.

    Args:
        likelihood: (N,) of the options given their question.
        normalise: what |c| counts; ``sum`` divides by nothing.
        lengths: (N,) of each option in bytes or characters; not needed for ``byte`` where the likelihood is counted
            per byte.
        prior: (N,) of the same options, of the same tokens, without their question.
        alpha: weight of the prior, finite; 0 leaves it out.

    Returns:
        (N,) labelled scores in nats, or nats per unit. An option of probability 0 keeps minus infinity.

    Raises:
        InputError: for options out of range or unknown, missing lengths, or a prior of other units.
        RowError: for a value that is no log-likelihood, a prior of probability 0, or lengths that do not fit.

    Source: arXiv 2507.23284 (its released code leaves tokens of probability 1 out of the mean; they count here).
    """
    if normalise not in _NORMALISE:
        raise InputError(f"normalise must be one of {', '.join(_NORMALISE)}, got {normalise!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"alpha must be a finite number, got {alpha!r}")
    _require_values("likelihood", likelihood)
    if prior is None or alpha == 0:
        return _per_length(likelihood, normalise, lengths)
    _require_values("prior", prior)
    if len(prior) != len(likelihood) or prior.unit is not likelihood.unit:
        raise InputError(
            f"the prior must have a row per option and its unit: got {len(prior)} rows per {prior.unit} for "
            f"{len(likelihood)} options per {likelihood.unit}"
        )
    differs = (prior.num_units != likelihood.num_units).nonzero().flatten()
    if len(differs):
        row = int(differs[0])
        raise RowError(
            f"the prior scores {int(prior.num_units[row])} {prior.unit}s of the option and the likelihood "
            f"{int(likelihood.num_units[row])}: score the same tokens, after a premise if the model has no BOS",
            row=f"row {row}",
        )
    impossible = torch.isinf(prior.value).nonzero().flatten()
    if len(impossible):
        raise RowError(
            "the prior of the option is 0, so nothing can be divided by it: smooth the model or use another premise",
            row=f"row {int(impossible[0])}",
        )
    both = _per_length(likelihood, normalise, lengths), _per_length(prior, normalise, lengths)
    return both[0] - both[1] * float(alpha)


@dataclass(frozen=True, slots=True)
class Choices:
    """Q multiple-choice questions of up to K options.

    Args:
        question: (Q,) numbers of the questions, ascending.
        log_probs: (Q, K) log-probability of each option among those of its question; minus infinity where there is
            no option.
        scores: (Q, K) the scores they were made of, likewise.
        mask: (Q, K) bool, True where an option is; options stand on the left, in the order of their rows.
        rows: (Q, K) long, the row of each option; 0 where there is none.
        choice: (Q,) long, the best option of each question; of equal scores the first.
        margin: (Q,) score of the best option minus that of the second, labelled; 0 for a tie.
        kind: what scores promise in comparison with each other.
    """

    question: Tensor
    log_probs: Tensor
    scores: Tensor
    mask: Tensor
    rows: Tensor
    choice: Tensor
    margin: Measurement
    kind: Kind

    def __len__(self) -> int:
        return len(self.question)


def choose(
    likelihood: LogLikelihood,
    question: Tensor | Sequence[int],
    *,
    normalise: Normalise = "sum",
    lengths: Tensor | None = None,
    prior: LogLikelihood | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> Choices:
    r"""Choose an option for each question by its normalised likelihood.

    .. math:: \log P(c \mid q) = \log\text{-softmax}_{c} \bigl( s(q, c) / T \bigr), \qquad
              \text{margin} = s_{(1)} - s_{(2)}

    The scores are those of `normalised_score`, whose table says which options give which of the field's scores.

    Args:
        likelihood: (N,) of all options of all questions.
        question: (N,) the question each option belongs to, in any order.
        normalise: ``sum``, ``token``, ``byte`` or ``character``.
        lengths: (N,) of each option, where bytes or characters are counted.
        prior: (N,) of the options without their question.
        alpha: weight of the prior.
        temperature: T, positive; it changes the log-probabilities, not the choice.

    Raises:
        InputError: for options out of range, or no row at all.
        RowError: for a question with one option or with none that is possible, or a row that cannot be scored.

    Source: arXiv 2507.23284, 2104.08315.

    Example:
        >>> import torch
        >>> from loglik import Kind, LogLikelihood
        >>> scored = torch.tensor([[True, False], [True, True]])
        >>> ll = LogLikelihood.from_per_unit(torch.tensor([[-3.0, 0.0], [-2.0, -2.0]]), scored)
        >>> choose(ll, [0, 0]).choice.tolist(), choose(ll, [0, 0], normalise="token").choice.tolist()
        ([0], [1])
    """
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    found = normalised_score(likelihood, normalise=normalise, lengths=lengths, prior=prior, alpha=alpha)
    numbers = torch.as_tensor(question, device=found.value.device)
    if numbers.shape != found.value.shape or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise InputError(f"question must be {len(found)} whole numbers, one per option, got {tuple(numbers.shape)}")
    if not len(found):
        raise InputError("there is nothing to choose: give at least two options")
    numbers, which, count = torch.unique(numbers, return_inverse=True, return_counts=True)
    alone = (count < 2).nonzero().flatten()
    if len(alone):
        raise RowError("has one option, so there is nothing to choose", row=f"question {int(numbers[alone[0]])}")
    order = which.argsort(stable=True)
    place = torch.arange(len(found), device=order.device) - (count.cumsum(0) - count)[which[order]]
    shape = len(numbers), int(count.max())
    rows = torch.zeros(shape, dtype=torch.long, device=order.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=order.device)
    rows[which[order], place] = order
    mask[which[order], place] = True
    table = found.value[rows].masked_fill(~mask, -torch.inf)
    impossible = torch.isinf(table.amax(1)).nonzero().flatten()
    if len(impossible):
        raise RowError(
            "gives every option probability 0, so none can be chosen: smooth the model or remove it",
            row=f"question {int(numbers[impossible[0]])}",
        )
    # A stable sort leaves equal scores in the order of their rows.
    best = table.detach().argsort(dim=1, descending=True, stable=True)[:, :2]
    first, second = rows.gather(1, best).unbind(1)
    margin = found[first] - found[second]
    return Choices(
        numbers,
        (table / temperature).log_softmax(1),
        table,
        mask,
        rows,
        best[:, 0],
        Measurement(margin.value, margin.kind, "margin", margin.stderr),
        margin.kind,
    )


@dataclass(frozen=True, slots=True)
class OptionScores:
    """Options of several questions with their likelihoods, a row each, ready for `choose`.

    Args:
        likelihood: (N,) of the options given their question.
        question: (N,) long, the question of each row, from 0.
        num_bytes: (N,) UTF-8 bytes of each option, without the separator.
        num_characters: (N,) characters of each option, without the separator.
        prior: (N,) of the options after the premise instead of the question; None if there was no premise.
    """

    likelihood: LogLikelihood
    question: Tensor
    num_bytes: Tensor
    num_characters: Tensor
    prior: LogLikelihood | None = None

    def choose(self, *, normalise: Normalise = "sum", alpha: float = 1.0, temperature: float = 1.0) -> Choices:
        """`choose` with the lengths and the prior that these options have."""
        lengths = {"byte": self.num_bytes, "character": self.num_characters}.get(normalise)
        return choose(
            self.likelihood,
            self.question,
            normalise=normalise,
            lengths=lengths,
            prior=self.prior,
            alpha=alpha,
            temperature=temperature,
        )


def score_options(
    model: TextModel,
    questions: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    separator: str = " ",
    premise: str | Sequence[str] | None = None,
    boundary: ScoreBoundary = "joint",
    overflow: OverflowPolicy = "error",
) -> OptionScores:
    r"""Score every option of every question with any text model.

    The prompt is the question, the completion is `separator` and the option. A question is encoded once for all its
    options.

    Args:
        model: from `loglik.load`, or any text model.
        questions: Q prompts, such as ``Question: ...\nAnswer:``.
        options: the options of each question, at least two, none empty.
        separator: stands between prompt and option, and is scored with the option.
        premise: what stands in place of the question in the prior: one text, or one per question (the prompt without
            its question, for example ``Answer:``). An empty text scores the options without any context, which needs
            a BOS. None: no prior.
        boundary: how prompt and option are tokenised, see `loglik.score`.
        overflow: a prompt longer than the context is an error, or is read in windows.

    Raises:
        InputError: for numbers that do not pair, or a model without a tokenizer.
        RowError: for a question with fewer than two options, an empty option, or a row that cannot be scored.

    Source: arXiv 2104.08315, 2507.23284.
    """
    if isinstance(questions, str) or isinstance(options, str) or len(questions) != len(options) or not len(questions):
        raise InputError(
            f"questions and options must be sequences that pair, one list of options for each question: got "
            f"{len(questions)} and {len(options)}"
        )
    for number, texts in enumerate(options):
        if isinstance(texts, str) or len(texts) < 2:
            raise RowError("needs a list of at least two options", row=f"question {number}")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise RowError(
                    f"option {place} must be a text that is not empty, got {text!r}", row=f"question {number}"
                )
    premises = [premise] * len(questions) if isinstance(premise, str) else premise
    if premises is not None and len(premises) != len(questions):
        raise InputError(f"premise must be one text or one per question: got {len(premises)} for {len(questions)}")

    def scored(prompts: Sequence[str]) -> LogLikelihood:
        pairs = [(p, separator + text) for p, texts in zip(prompts, options, strict=True) for text in texts]
        unit = Unit.BYTE if boundary == "exact" else Unit.TOKEN
        return score(model, pairs, unit=unit, boundary=boundary, overflow=overflow)

    flat = [text for texts in options for text in texts]
    return OptionScores(
        scored(questions),
        torch.tensor([number for number, texts in enumerate(options) for _ in texts]),
        torch.tensor([len(text.encode()) for text in flat]),
        torch.tensor([len(text) for text in flat]),
        None if premises is None else scored(premises),
    )


def contextual_calibration(log_probs: Tensor, content_free: Tensor) -> Tensor:
    r"""Divide label probabilities by what a model says to no content at all.

    .. math:: \hat p(k \mid q) \propto \frac{p(k \mid q)}{\frac{1}{C} \sum_c p(k \mid \text{content-free}_c)}

    With one content-free input this is the softmax of PMI with ``alpha=1``. Given the questions themselves as
    `content_free` it is batch calibration (arXiv 2309.17249), which assumes that labels are balanced.

    Args:
        log_probs: (Q, K) of K labels, up to a constant in each row, such as `Choices.log_probs`.
        content_free: (C, K) of the same labels given inputs such as ``N/A``, likewise.

    Returns:
        (Q, K) calibrated log-probabilities.

    Raises:
        InputError: for shapes that do not fit, values that are no log-probabilities, or a label that every
            content-free input gives probability 0.

    Source: arXiv 2102.09690.
    """
    if log_probs.dim() != 2 or content_free.dim() != 2 or log_probs.shape[1] != content_free.shape[1]:
        raise InputError(
            f"log_probs (Q, K) and content_free (C, K) must have the same labels, got {tuple(log_probs.shape)} and "
            f"{tuple(content_free.shape)}"
        )
    for name, table in (("log_probs", log_probs), ("content_free", content_free)):
        # amax of a row with NaN is NaN, which is not finite either
        if not table.numel() or not bool(torch.isfinite(table.amax(1)).all()):
            raise InputError(f"{name} must have rows of log-probabilities, each with a label that is possible")
    free = content_free.log_softmax(1).logsumexp(0) - math.log(len(content_free))
    impossible = torch.isinf(free).nonzero().flatten()
    if len(impossible):
        raise InputError(f"label {int(impossible[0])} has probability 0 under every content-free input: remove it")
    return (log_probs.log_softmax(1) - free).log_softmax(1)


def _require_values(name: str, likelihood: LogLikelihood) -> None:
    bad = likelihood.non_finite_rows()
    if bad:
        raise RowError(
            f"the {name} is {float(likelihood.value[bad[0]])}, which is no log-likelihood", row=f"row {bad[0]}"
        )


def _per_length(likelihood: LogLikelihood, normalise: Normalise, lengths: Tensor | None) -> LogLikelihood:
    """The likelihood by its length; terms per unit are dropped, since they would no longer add up."""
    bare = replace(likelihood, per_unit=None, mask=None)
    if normalise == "sum":
        return bare
    if normalise in ("byte", "character") and (
        lengths is not None or normalise == "character" or bare.unit is not Unit.BYTE
    ):
        if lengths is None:
            raise InputError(
                f"normalise={normalise} needs lengths, the {normalise}s of each option: the likelihood is counted per "
                f"{bare.unit}"
            )
        if lengths.shape != bare.value.shape:
            raise InputError(f"lengths must have shape ({len(bare)},), got {tuple(lengths.shape)}")
        bare = bare.per(Unit.BYTE if normalise == "byte" else Unit.EVENT, lengths)
    if normalise == "token" and bare.unit is not Unit.TOKEN:
        raise InputError(f"normalise=token needs a likelihood counted per token, and this one is per {bare.unit}")
    empty = (~(bare.num_units > 0)).nonzero().flatten()
    if len(empty):
        raise RowError(
            f"the option has no scored {normalise}, so a value per {normalise} is undefined", row=f"row {int(empty[0])}"
        )
    return bare.mean_per_unit()
