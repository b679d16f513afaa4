r"""P(True): does a model find an answer true that is shown to it, its own or another's?

P(True) is the likelihood of "True" after the model has read a proposed answer (arXiv 2207.05221). Whether it is
calibrated or ranks well is measured by `loglik.signals.calibration`, `detection` and `metacognition`;
`loglik.signals.self_knowledge` says what is gained by trusting a model only above a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.score import score
from loglik.signals.choice import Choices

__all__ = ["PTrue", "PTrueTemplate", "option_pairs", "p_true"]


@dataclass(frozen=True, slots=True)
class PTrueTemplate:
    """The words of a prompt that asks whether an answer is true.

    Args:
        question: line with ``{question}``.
        ideas: lines before the answer with ``{ideas}``, one per line; left out without ideas.
        answer: line with ``{answer}``.
        ask: what stands before the two options.
        options: words for true and false.
        labels: of the first and the second option, as they are shown; what is scored is a space and the label.
        close: what stands before the label that is scored.
        true_first: whether the option "true" is shown first.

    Raises:
        InputError: for a line without its place, or two equal labels or options.
    """

    question: str = "Question: {question}\n"
    ideas: str = "Here are some brainstormed ideas:\n{ideas}\n"
    answer: str = "Proposed answer: {answer}\n"
    ask: str = "Is the proposed answer:\n"
    options: tuple[str, str] = ("True", "False")
    labels: tuple[str, str] = ("(A)", "(B)")
    close: str = "The proposed answer is:"
    true_first: bool = True

    def __post_init__(self) -> None:
        for name in ("question", "ideas", "answer"):
            if f"{{{name}}}" not in getattr(self, name):
                raise InputError(f"the template's {name} must have {{{name}}} in it, got {getattr(self, name)!r}")
        for name in ("options", "labels"):
            if len(set(getattr(self, name))) != 2 or not all(getattr(self, name)):
                raise InputError(f"the template's {name} must be two different texts, got {getattr(self, name)!r}")

    def swapped(self) -> PTrueTemplate:
        """The same with the options in the other order: what changes in the answer is due to position or label."""
        return replace(self, true_first=not self.true_first)

    def prompt(self, question: str, answer: str, ideas: Sequence[str] = ()) -> str:
        """Everything that stands before the label."""
        shown = self.options if self.true_first else self.options[::-1]
        lines = "".join(f" {label} {option}\n" for label, option in zip(self.labels, shown, strict=True))
        return (
            self.question.replace("{question}", question)
            + (self.ideas.replace("{ideas}", "\n".join(ideas)) if ideas else "")
            + self.answer.replace("{answer}", answer)
            + self.ask
            + lines
            + self.close
        )

    def continuations(self) -> tuple[str, str]:
        """The labels of true and false as they are scored."""
        true, false = self.labels if self.true_first else self.labels[::-1]
        return f" {true}", f" {false}"


@dataclass(frozen=True, slots=True)
class PTrue:
    r"""P(True) of N answers.

    Args:
        probability: (N,) :math:`p_A / (p_A + p_B)`, renormalised over the two options.
        log_odds: (N,) :math:`\log p_A - \log p_B`, nats; its sign does not depend on a temperature.
        raw: (N,) :math:`p_A`, not renormalised.
        coverage: (N,) :math:`p_A + p_B`; where it is low, the options are not what the model would say.
    """

    probability: Measurement
    log_odds: Measurement
    raw: Measurement
    coverage: Measurement


def p_true(
    model: TextModel,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    ideas: Sequence[Sequence[str]] | None = None,
    template: PTrueTemplate | None = None,
    demonstrations: Sequence[tuple[str, str, bool]] = (),
    temperature: float = 1.0,
) -> PTrue:
    r"""How likely a model finds it that an answer is true, after it has read question and answer.

    .. math:: P(\text{True}) = \frac{p_A}{p_A + p_B} = \sigma(\log p_A - \log p_B)

    with the likelihoods of " (A)" and " (B)" after the prompt of the template, sums over tokens where a label has
    several. Answers sampled at temperature 1 and greedy ones have different base rates: state which are judged.

    Args:
        model: any text model, not necessarily the one that answered.
        questions: N questions.
        answers: N proposed answers.
        ideas: for each question other answers, such as samples of the model, to be shown before the proposed one
            (brainstorming; the paper shows 5). None shows none.
        template: the words; `PTrueTemplate()` by default.
        demonstrations: (question, answer, is it true) examples that stand before every prompt, in the same words
            (the paper shows about 20).
        temperature: T, positive: the probability is :math:`\sigma(\text{log odds} / T)`. It changes calibration and
            no decision.

    Raises:
        InputError: for numbers that do not pair, no question, or a temperature out of range.
        RowError: for an empty question or answer, a prompt that cannot be scored, or two impossible options.

    Source: arXiv 2207.05221. lm-polygraph's estimator of the same name is minus the raw log-probability.
    """
    words = PTrueTemplate() if template is None else template
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    for name, texts in (("questions", questions), ("answers", answers)):
        if isinstance(texts, str):
            raise InputError(f"{name} must be several texts, not one string; give [text]")
    shown = [()] * len(questions) if ideas is None else ideas
    if not len(questions) or len(answers) != len(questions) or len(shown) != len(questions):
        raise InputError(
            f"each question needs its answer and, where ideas are given, its ideas, and there must be one: got "
            f"{len(questions)} questions, {len(answers)} answers and {len(shown)} lists of ideas"
        )
    before = ""
    for question, answer, is_true in demonstrations:
        before += words.prompt(question, answer) + words.continuations()[0 if is_true else 1] + "\n\n"
    pairs = []
    for number, (question, answer, own) in enumerate(zip(questions, answers, shown, strict=True)):
        if isinstance(own, str) or not all(isinstance(t, str) and t.strip() for t in (question, answer, *own)):
            raise RowError(
                "needs a question and an answer that are not empty, and a list of ideas that are not",
                row=f"question {number}",
            )
        pairs += [(before + words.prompt(question, answer, own), label) for label in words.continuations()]
    try:
        likelihood = score(model, pairs)
    except RowError as error:  # two rows per question
        number = int((error.row or "row 0").split()[1])
        raise error.at(f"question {number // 2}") from None
    return _p_true(likelihood[0::2], likelihood[1::2], temperature)


def _p_true(true: LogLikelihood, false: LogLikelihood, temperature: float) -> PTrue:
    both = torch.logaddexp(true.value, false.value)
    bad = (~torch.isfinite(both)).nonzero().flatten()
    if len(bad):
        raise RowError("neither option is possible under the model: smooth it", row=f"question {int(bad[0])}")
    odds = true - false
    noisy = true.stderr is not None
    # A monotone function keeps what holds for each value, not what holds on average.
    keeps = (Kind.EXACT, Kind.ESTIMATE) if noisy else tuple(kind for kind in Kind if kind is not Kind.UNNORMALIZED)
    kept, one = (kind if kind in keeps else Kind.SURROGATE for kind in (odds.kind, true.kind))
    return PTrue(
        Measurement(torch.sigmoid(odds.value / temperature), kept, "p_true"),
        Measurement(odds.value, odds.kind, "p_true_log_odds", odds.stderr),
        Measurement(true.value.exp(), one, "p_true_raw"),
        Measurement(both.exp(), one, "p_true_coverage"),
    )


def option_pairs(choices: Choices, answer: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """The probability of every option of every question, and whether it is the right one: what calibration is about.

    Args:
        choices: of Q questions, from `loglik.signals.choice.choose`.
        answer: (Q,) number of the right option of each.

    Returns:
        (P,) probabilities and (P,) bool, options of a question together.

    Raises:
        InputError: for answers that are no options.

    Source: arXiv 2207.05221, which puts all options into the calibration curve and not the chosen one alone.
    """
    right = torch.as_tensor(answer, device=choices.mask.device)
    if right.shape != choices.choice.shape or right.is_floating_point() or right.dtype == torch.bool:
        raise InputError(f"answer must be {len(choices)} whole numbers, one per question, got {tuple(right.shape)}")
    outside = ((right < 0) | (right >= choices.mask.sum(1))).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"the answer of question {int(choices.question[row])} is option {int(right[row])}, and it has "
            f"{int(choices.mask[row].sum())} options, from 0"
        )
    is_right = torch.arange(choices.mask.shape[1], device=right.device) == right[:, None]
    return choices.log_probs.exp()[choices.mask], is_right[choices.mask]
