r"""P(IK), "I know": from the question alone, how likely is the model to answer it correctly?

A probe on the hidden state of the question is fitted to how often the model's own samples were right
(arXiv 2207.05221).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import HiddenStates, require
from loglik.signals.detection import as_numbers, checked_pairs
from loglik.signals.drawing import prompt_tokens

__all__ = ["HeldOutPIK", "PIKProbe", "binomial_cross_entropy", "held_out_p_ik", "question_states", "success_counts"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Largest entry of the gradient at which a probe counts as fitted, relative to the weight of the data.
_CONVERGED = 1e-5


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


@dataclass(frozen=True, slots=True)
class HeldOutPIK:
    """P(IK) of Q questions, some of which the probe was fitted on.

    Args:
        probe: as fitted.
        p_ik: (Q,) of all questions.
        trained: (Q,) bool, whether the probe saw the question's outcomes; judge it on the others alone.
        successes: (Q,) right samples.
        trials: (Q,) samples.
    """

    probe: PIKProbe
    p_ik: Floats
    trained: Bools
    successes: Ints
    trials: Ints

    @property
    def base_rate(self) -> float:
        """Share of right samples of the questions that the probe was fitted on: what a constant would predict."""
        return float(self.successes[self.trained].sum() / self.trials[self.trained].sum())

    def samples(self) -> tuple[Floats, Bools]:
        """(N,) P(IK) of the question of each held-out sample, and (N,) whether the sample is right.

        For `calibration_report`, `detector_report` and `self_knowledge_curve`: the label is each sample's correctness.
        """
        right, count = self.successes[~self.trained], self.trials[~self.trained]
        labels: Bools = np.concatenate([np.arange(m) < k for k, m in zip(right, count, strict=True)])
        return self.p_ik[~self.trained].repeat(count), labels

    def base_brier(self) -> float:
        """Brier score of `base_rate` on the held-out samples; a probe that has learned something is below it."""
        _, right = self.samples()
        return float(((self.base_rate - right) ** 2).mean())


def held_out_p_ik(
    features: Tensor | ArrayLike,
    successes: Tensor | ArrayLike,
    trials: Tensor | ArrayLike,
    *,
    share: float = 0.5,
    c: float = 1.0,
    seed: int = 0,
) -> HeldOutPIK:
    """Fit a probe on a share of the questions, and predict the others: what the probe knows about unseen questions.

    Args:
        features: (Q, D), such as `question_states`.
        successes: (Q,) right samples of each question, whole numbers.
        trials: (Q,) samples of each question, whole numbers.
        share: of the questions that the probe is fitted on, drawn at random, in (0, 1).
        c: of `PIKProbe`.
        seed: of the split.

    Raises:
        InputError: for values that do not fit, a share that leaves a side without a question, or training samples that
            are all right or all wrong.

    Source: arXiv 2207.05221.
    """
    x = _features(features)
    right, count = as_numbers(successes, "successes"), as_numbers(trials, "trials")
    if right.shape != x.shape[:1] or count.shape != right.shape:
        raise InputError(f"features {x.shape} need as many successes and trials: got {right.shape} and {count.shape}")
    _checked_counts(right, count)
    if (right != np.floor(right)).any() or (count != np.floor(count)).any():
        raise InputError("successes and trials must be whole numbers: give counts of samples, not shares")
    if not 0 < share < 1:
        raise InputError(f"share must lie between 0 and 1, got {share}")
    number = round(share * len(x))
    if not 0 < number < len(x):
        raise InputError(
            f"a share of {share:g} of {len(x)} questions puts {number} into training and {len(x) - number} into the "
            "test, and both need one: give more questions or another share"
        )
    trained = np.zeros(len(x), dtype=bool)
    trained[np.random.default_rng(seed).permutation(len(x))[:number]] = True
    probe = PIKProbe(c=c).fit(x[trained], right[trained], count[trained])
    return HeldOutPIK(probe, probe.p_ik(x), trained, right.astype(np.int64), count.astype(np.int64))


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
        RowError: for a question without tokens, or one that does not fit into the context.

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
    limit = getattr(model, "max_length", None)
    for number, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            raise RowError(
                f"has {len(row)} tokens and the model's context is {limit}: shorten it", row=f"question {number}"
            )
    out = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        found = states.hidden_states(TokenBatch.from_lists(part, starts=[len(row) for row in part]))
        last = torch.tensor([len(row) - 1 for row in part], device=found.device)
        picked = found[torch.arange(len(part), device=found.device), last]
        out.append(picked if picked.dtype == torch.float64 else picked.float())
    return torch.cat(out)


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
