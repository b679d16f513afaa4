r"""Does a model know what it knows? P(True) of an answer that is shown to it, P(IK) of a question alone.

P(True) is the likelihood of "True" after the model has read a proposed answer, its own or another's. P(IK), "I know",
comes from a probe on the hidden state of the question, fitted to how often the model's own samples were right
(arXiv 2207.05221). Whether either is calibrated or ranks well is measured by `loglik.signals.calibration`, `detection`
and `metacognition`; `self_knowledge_curve` says what is gained by trusting a model only above a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.protocol import HiddenStates, TextModel, require
from loglik.scoring.score import score
from loglik.signals.calibration import checked_confidence
from loglik.signals.choice import Choices
from loglik.signals.detection import as_numbers, checked_pairs, proportion_interval
from loglik.signals.sequence_uncertainty import prompt_tokens

__all__ = [
    "PIKProbe",
    "PTrue",
    "PTrueTemplate",
    "Selection",
    "SelfKnowledgeCurve",
    "binomial_cross_entropy",
    "option_pairs",
    "p_true",
    "question_states",
    "self_knowledge_curve",
    "success_counts",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Largest entry of the gradient at which a probe counts as fitted, relative to the weight of the data.
_CONVERGED = 1e-5


# --------------------------------------------------------------------------------------------------------- P(True)
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
    likelihood = score(model, pairs)
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


# ----------------------------------------------------------------------------------------------------------- P(IK)
def success_counts(correct: Tensor | ArrayLike, question: Tensor | ArrayLike) -> tuple[Ints, Ints]:
    """How many samples of each question are right, and how many there are: the targets of P(IK).

    Args:
        correct: (N,) bool, or 0 and 1, of all samples.
        question: (N,) whole numbers, in any order.

    Returns:
        (Q,) right ones and (Q,) all, in ascending order of the questions' numbers.

    Raises:
        InputError: for other labels, unequal lengths or no rows.

    Source: arXiv 2207.05221 (30 samples at temperature 1). The share has the variance p (1 - p) / M.
    """
    numbers, right = checked_pairs(question, correct, ("question", "correct"))
    if not len(right):
        raise InputError("there is no sample: give at least one")
    _, which, trials = np.unique(numbers, return_inverse=True, return_counts=True)
    return np.bincount(which, weights=right).astype(np.int64), trials.astype(np.int64)


def binomial_cross_entropy(log_odds: Tensor, successes: Tensor, trials: Tensor) -> Tensor:
    r"""Loss of a head that predicts how often samples are right, for training it with the network.

    .. math:: -\frac{\sum_q K_q \log \sigma(z_q) + (M_q - K_q) \log \sigma(-z_q)}{\sum_q M_q}

    Equal to the mean binary cross-entropy over all samples, in value and gradient.

    Args:
        log_odds: (Q,) z of P(IK).
        successes: (Q,) K.
        trials: (Q,) M.

    Returns:
        () nats per sample, differentiable.

    Raises:
        InputError: for shapes that do not fit, or counts out of range.

    Source: arXiv 2207.05221.
    """
    if log_odds.dim() != 1 or successes.shape != log_odds.shape or trials.shape != log_odds.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (log_odds, successes, trials))
        raise InputError(f"log_odds, successes and trials must have one shape (Q,), got {shapes}")
    _checked_counts(as_numbers(successes, "successes"), as_numbers(trials, "trials"))
    right, count = successes.to(log_odds), trials.to(log_odds)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(right * log_sigmoid(log_odds) + (count - right) * log_sigmoid(-log_odds)).sum() / count.sum()


class PIKProbe:
    r"""P(IK): a logistic probe from the features of a question to the share of samples that the model gets right.

    .. math:: P(\text{IK} \mid q) = \sigma(w \cdot h(q) + b), \qquad \min_{w, b}\ \tfrac12 \lVert w \rVert^2
              + C \sum_q \frac{M_q}{\bar M} \mathrm{BCE}\bigl(K_q / M_q,\ P(\text{IK} \mid q)\bigr)

    The convention of scikit-learn's ``LogisticRegression``, with soft labels. C weighs questions, so that its meaning
    does not change with the number of samples. Questions must be split into training and test, never samples.

    Args:
        c: inverse strength of the regularisation, positive; the bias is not regularised.
        standardise: subtract the mean of each feature and divide by its standard deviation (of the training data).
        max_iter: steps of L-BFGS at most.

    Attributes:
        coef_: (D,) weights of the features as they are given.
        intercept_: bias.
        n_features_in_: D.

    Raises:
        InputError: for options out of range.

    Source: arXiv 2207.05221, where the whole network is trained with the head; this is the cheap variant.
    """

    coef_: Floats
    intercept_: float
    n_features_in_: int

    def __init__(self, *, c: float = 1.0, standardise: bool = True, max_iter: int = 1000) -> None:
        if not 0 < c < math.inf or max_iter < 1:
            raise InputError(f"c must be positive and finite and max_iter at least 1, got {c} and {max_iter}")
        self.c = c
        self.standardise = standardise
        self.max_iter = max_iter

    def fit(
        self, features: Tensor | ArrayLike, successes: Tensor | ArrayLike, trials: Tensor | ArrayLike | int = 1
    ) -> Self:
        """Fit the probe.

        Args:
            features: (Q, D), such as `question_states`; D may be 0, which leaves the bias.
            successes: (Q,) right samples of each question, whole numbers or shares of `trials`.
            trials: (Q,) samples of each question, or one number for all.

        Raises:
            InputError: for values that do not fit, samples that are all right or all wrong, or no convergence.
        """
        x = _features(features)
        right = as_numbers(successes, "successes").astype(np.float64)
        count = as_numbers(trials, "trials").astype(np.float64)
        if right.shape != x.shape[:1] or not len(right) or count.shape not in ((), right.shape):
            raise InputError(
                f"features {x.shape} need successes ({len(x)},), at least one row, and as many trials or one number: "
                f"got {right.shape} and {count.shape}"
            )
        count = np.broadcast_to(count, right.shape)
        _checked_counts(right, count)
        if right.sum() == 0 or right.sum() == count.sum():
            which = "wrong" if right.sum() == 0 else "right"
            raise InputError(f"every sample is {which}, so that there is nothing to learn: add other questions")
        shift = x.mean(0) if self.standardise else np.zeros(x.shape[1])
        scale = x.std(0) if self.standardise else np.ones(x.shape[1])
        scale = np.where(scale > 0, scale, 1.0)
        z, share, weight = (x - shift) / scale, right / count, self.c * count / count.mean()

        def loss(theta: Floats) -> tuple[float, Floats]:
            odds = z @ theta[:-1] + theta[-1]
            # -log sigma(z) = log(1 + e^-z); the two terms of the cross-entropy share it.
            value = 0.5 * float(theta[:-1] @ theta[:-1]) + float(weight @ (np.logaddexp(0, odds) - share * odds))
            slope = weight * (expit(odds) - share)
            return value, np.append(z.T @ slope + theta[:-1], slope.sum())

        start = np.append(np.zeros(z.shape[1]), np.log(right.sum() / (count - right).sum()))
        options = {"maxiter": self.max_iter, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        if np.abs(loss(found.x)[1]).max() > _CONVERGED * weight.sum():
            raise InputError(f"the probe did not converge in {found.nit} steps: raise max_iter or lower c")
        self.coef_ = found.x[:-1] / scale
        self.intercept_ = float(found.x[-1] - self.coef_ @ shift)
        self.n_features_in_ = x.shape[1]
        return self

    def log_odds(self, features: Tensor | ArrayLike) -> Floats:
        """(Q,) log-odds of P(IK).

        Raises:
            InputError: before `fit`, or for features of another width.
        """
        if not hasattr(self, "coef_"):
            raise InputError("the probe has not been fitted: call fit first")
        x = _features(features)
        if x.shape[1] != self.n_features_in_:
            raise InputError(f"features must have {self.n_features_in_} columns as in fit, got {x.shape[1]}")
        return np.asarray(x @ self.coef_ + self.intercept_, dtype=np.float64)

    def p_ik(self, features: Tensor | ArrayLike) -> Floats:
        """(Q,) P(IK); errors as `log_odds`."""
        return np.asarray(expit(self.log_odds(features)), dtype=np.float64)

    def predict_proba(self, features: Tensor | ArrayLike) -> Floats:
        """(Q, 2) probabilities of a wrong and of a right sample, in scikit-learn's order; errors as `log_odds`."""
        known = self.p_ik(features)
        return np.stack([1 - known, known], axis=1)


@torch.no_grad()
def question_states(model: Any, questions: Sequence[str] | TokenBatch, *, batch_size: int = 16) -> Tensor:
    """The hidden state at the last token of each question, for `PIKProbe`.

    Args:
        model: has `hidden_states`; for texts also a tokenizer.
        questions: N texts, or rows of tokens.
        batch_size: rows per forward pass; the states do not depend on it.

    Returns:
        (N, D) float32 or better.

    Raises:
        InputError: for a model without hidden states, no questions, or a batch size below 1.
        RowError: for a question without tokens.

    Source: arXiv 2207.05221.
    """
    states = require(model, HiddenStates, "P(IK)")  # type: ignore[type-abstract]
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    batch = questions if isinstance(questions, TokenBatch) else prompt_tokens(model, questions)
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    if not rows:
        raise InputError("there is no question: give at least one")
    empty = next((number for number, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise RowError("has no token: give BOS or a text", row=f"question {empty}")
    out = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        found = states.hidden_states(TokenBatch.from_lists(part, starts=[len(row) for row in part]))
        last = torch.tensor([len(row) - 1 for row in part], device=found.device)
        picked = found[torch.arange(len(part), device=found.device), last]
        out.append(picked if picked.dtype == torch.float64 else picked.float())
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------------------- curves
@dataclass(frozen=True, slots=True)
class Selection:
    """What is answered at one threshold.

    Args:
        threshold: answers of at least this confidence are given.
        count: how many.
        share: of all.
        accuracy: of them; None (not 0) if there are none.
        low: lower end of the accuracy's exact binomial interval, 0 without answers.
        high: upper end, 1 without answers.
    """

    threshold: float
    count: int
    share: float
    accuracy: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SelfKnowledgeCurve:
    """Accuracy of the answers that a model is sure of, at every threshold that occurs, in rising order.

    Args:
        threshold: (M,) the different confidences.
        count: (M,) answers of at least this confidence.
        share: (M,) of all; falls from 1.
        accuracy: (M,) of them; the first entry is the base accuracy.
        low: (M,) lower ends of exact binomial intervals.
        high: (M,) upper ends.
        level: confidence of each interval (not of all at once).
    """

    threshold: NDArray[np.floating[Any]]
    count: Ints
    share: Floats
    accuracy: Floats
    low: Floats
    high: Floats
    level: float

    @property
    def base(self) -> float:
        """Accuracy of all answers."""
        return float(self.accuracy[0])

    def at(self, threshold: float) -> Selection:
        """The answers of at least this confidence; any threshold will do.

        Raises:
            InputError: for a threshold outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must lie in [0, 1], got {threshold}")
        # In the confidences' dtype, so that a float32 0.9 is at least 0.9.
        place = int(np.searchsorted(self.threshold, self.threshold.dtype.type(threshold)))
        if place == len(self.threshold):
            return Selection(threshold, 0, 0.0, None, 0.0, 1.0)
        values = (float(part[place]) for part in (self.share, self.accuracy, self.low, self.high))
        return Selection(threshold, int(self.count[place]), *values)


def self_knowledge_curve(
    confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike, *, level: float = 0.95
) -> SelfKnowledgeCurve:
    r"""Accuracy above a threshold of confidence, for every threshold: :math:`P(y = 1 \mid c \ge t)`.

    A model that knows what it knows is more accurate above P(True) = 0.5 than overall: compare ``curve.at(0.5)`` with
    ``curve.base``. By the share of answers instead of the threshold it is `metacognition.risk_coverage_curve`.

    Args:
        confidence: (N,) P(True), P(IK) or another probability that the rows are correct.
        correct: (N,) bool, or 0 and 1.
        level: confidence of the binomial intervals, in (0, 1).

    Raises:
        InputError: for probabilities outside [0, 1] or NaN (with the row), unequal lengths, no rows, or a level out of
            range.

    Source: arXiv 2207.05221.
    """
    values, right = checked_confidence(confidence, correct)
    distinct, which = np.unique(values, return_inverse=True)
    count = np.bincount(which)[::-1].cumsum()[::-1].astype(np.int64)
    hits = np.bincount(which[right], minlength=len(distinct))[::-1].cumsum()[::-1].astype(np.int64)
    low, high = proportion_interval(hits, count, level)
    return SelfKnowledgeCurve(distinct, count, count / len(right), hits / count, low, high, level)


# --------------------------------------------------------------------------------------------------------- helpers
def _features(features: Tensor | ArrayLike) -> Floats:
    x = as_numbers(features, "features").astype(np.float64)
    if x.ndim != 2:
        raise InputError(f"features must have shape (Q, D), got {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise InputError(f"the features of row {int(bad[0])} are not finite: remove the row")
    return x


def _checked_counts(successes: NDArray[Any], trials: NDArray[Any]) -> None:
    # What is NaN fails every comparison.
    bad = np.flatnonzero(~((successes >= 0) & (successes <= trials) & (trials > 0) & (trials < np.inf)))
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"successes must lie between 0 and trials, which are positive: got {successes[row]} of {trials[row]} in "
            f"row {row}"
        )
