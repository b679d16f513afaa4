r"""How unsure a model is of the text it generates: the likelihood of one decode, entropies of strings and of meanings.

With the zero-one score in place of the log score, uncertainty is one minus the probability of the likeliest output,
and its ranking is that of :math:`-\log p(\hat y \mid x)`: one greedy decode, no samples (arXiv 2412.15176). Entropies
take samples. These are functions of labelled likelihoods; `loglik.signals.uncertainty_table` decodes, samples and
scores. Results per question are in ascending order of the questions' numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement

__all__ = [
    "SemanticForm",
    "discrete_semantic_entropy",
    "greedy_nll",
    "length_normalised_log_prob",
    "maximum_sequence_probability",
    "mode_nll",
    "num_semantic_sets",
    "predictive_entropy",
    "semantic_entropy",
]

SemanticForm = Literal["normalised", "sample_mean", "class_mean"]
Rows = Tensor | Sequence[int]

# Log-likelihoods of one sequence that differ by more (relative to 1 nat or their size) are not of one sequence.
_SAME = 1e-3


# ------------------------------------------------------------------------------------------------------- one decode
def greedy_nll(likelihood: LogLikelihood) -> Measurement:
    r"""G-NLL, the surprisal of the greedy decode: higher where the model is less sure.

    .. math:: -\log p(\hat y \mid x) = -\sum_t \log \max_v p(v \mid x, \hat y_{<t})

    A sum over all tokens and the EOS, without length normalisation. Where greedy decoding finds the likeliest output,
    1 - exp(-G-NLL) is the probability that a calibrated model is wrong. It is at least M-NLL; see `mode_nll`.

    Args:
        likelihood: (B,) of greedy completions at temperature 1. Those of a beam search give B-NLL.

    Returns:
        (B,) nats; exact for exact likelihoods, as the surprisal of that output.

    Raises:
        RowError: for a value that is no finite log-likelihood.

    Source: arXiv 2412.15176.
    """
    _require_finite(likelihood)
    nll = -likelihood
    return Measurement(nll.value, nll.kind, "g_nll", nll.stderr)


def mode_nll(likelihood: LogLikelihood, question: Rows) -> Measurement:
    r"""The least surprisal among candidates: an upper bound on M-NLL, :math:`-\max_y \log p(y \mid x)`.

    Args:
        likelihood: (N,) of all candidates (greedy decodes, beams, samples) of all questions.
        question: (N,) the question of each, in any order.

    Returns:
        (Q,) nats. UPPER_BOUND for exact likelihoods and for lower bounds without random draws; else SURROGATE, because
        a minimum of noisy values is too small.

    Raises:
        InputError: for questions that do not fit, or no row.
        RowError: for a value that is no finite log-likelihood.

    Source: arXiv 2412.15176.
    """
    _require_finite(likelihood)
    which, count = _questions(question, len(likelihood), likelihood.value)
    best = likelihood.value.new_full((len(count),), -torch.inf).scatter_reduce(0, which, likelihood.value, "amax")
    kind = Kind.SURROGATE if _is_noisy(likelihood) else -likelihood.kind + Kind.UPPER_BOUND
    return Measurement(-best, kind, "mode_nll")


def maximum_sequence_probability(likelihood: LogLikelihood) -> Measurement:
    r"""Probability of each output, :math:`p(\hat y \mid x)`; of greedy decodes what is called MSP.

    Args:
        likelihood: (B,) of the outputs.

    Returns:
        (B,) of the likelihood's kind. SURROGATE for a noisy lower bound, whose exponential bounds nothing, and for an
        unnormalised value, which leaves an unknown factor.

    Raises:
        RowError: for a value that is no finite log-likelihood.
    """
    _require_finite(likelihood)
    noisy = likelihood.kind is Kind.LOWER_BOUND and _is_noisy(likelihood)
    kind = Kind.SURROGATE if noisy or likelihood.kind is Kind.UNNORMALIZED else likelihood.kind
    value = likelihood.value.exp()
    stderr = None if likelihood.stderr is None else value * likelihood.stderr  # delta method
    return Measurement(value, kind, "sequence_probability", stderr)


def length_normalised_log_prob(likelihood: LogLikelihood) -> LogLikelihood:
    r"""Nats per token, :math:`\frac1T \log p(y \mid x)`: comparable over lengths, no longer a log-probability.

    Raises:
        RowError: for an output without scored units, or a value that is no finite log-likelihood.
    """
    _require_finite(likelihood)
    empty = (likelihood.num_units <= 0).nonzero().flatten()
    if len(empty):
        raise RowError(f"has no scored {likelihood.unit} to divide by: remove it", row=f"row {int(empty[0])}")
    return likelihood.mean_per_unit()


# ---------------------------------------------------------------------------------------------- entropies of samples
def predictive_entropy(likelihood: LogLikelihood, question: Rows, *, length_normalised: bool = False) -> Measurement:
    r"""Entropy of the outputs to each question from samples, unbiased.

    .. math:: \hat H = -\frac1N \sum_n \log p(y^n \mid x), \qquad y^n \sim p(\cdot \mid x)

    Args:
        likelihood: (N,) of independent samples at temperature 1, repeated ones repeated, of all questions.
        question: (N,) the question of each, in any order.
        length_normalised: divide each log-likelihood by its tokens first (LN-PE), which is the entropy of nothing.

    Returns:
        (Q,) nats (per token), with the standard error over samples, infinite for one. ESTIMATE for exact likelihoods;
        an UPPER_BOUND in expectation for lower bounds on them, and the other way round.

    Raises:
        InputError: for questions that do not fit, or no row.
        RowError: for a value that is no finite log-likelihood, or a sample without tokens where they are counted.

    Source: arXiv 2302.09664, 2412.15176.
    """
    _require_finite(likelihood)
    scored = length_normalised_log_prob(likelihood) if length_normalised else likelihood
    which, count = _questions(question, len(scored), scored.value)
    nll = -scored.value.detach().double()
    mean = _sums(nll, which, len(count)) / count
    square = _sums((nll - mean[which]) ** 2, which, len(count))
    spread = torch.where(count > 1, (square / (count * (count - 1).clamp_min(1))).sqrt(), torch.inf)
    if scored.stderr is not None and scored.draws is not None and scored.draws.shared_by_rows:
        # An error that all samples share does not show in their spread.
        spread = spread + _sums(scored.stderr.double(), which, len(count)) / count
    kind = {Kind.EXACT: Kind.ESTIMATE, Kind.UNNORMALIZED: Kind.SURROGATE}.get(scored.kind, -scored.kind)
    name = "length_normalised_entropy" if length_normalised else "predictive_entropy"
    return Measurement(mean, kind, name, spread)


def semantic_entropy(
    likelihood: LogLikelihood,
    question: Rows,
    meaning: Rows,
    sequence: Rows,
    *,
    form: SemanticForm = "normalised",
    length_normalised: bool = False,
) -> Measurement:
    r"""Entropy of the meanings of the outputs, their probabilities summed from likelihoods (Rao-Blackwellised).

    .. math:: \tilde p(c) = \sum_{y \in c,\ \text{found}} p(y \mid x), \qquad
              \hat p(c) = \tilde p(c) \Big/ \sum_{c'} \tilde p(c')

    The probability of a sequence that was drawn twice is counted once.

    =============== ================================================ =============================================
    form            value                                            kind for exact likelihoods
    =============== ================================================ =============================================
    ``normalised``  :math:`-\sum_c \hat p(c) \log \hat p(c)`         ESTIMATE
    ``sample_mean`` :math:`-\frac1N \sum_n \log \tilde p(c(y^n))`    UPPER_BOUND, since :math:`\tilde p \le p`
    ``class_mean``  :math:`-\frac{1}{|C|} \sum_c \log \tilde p(c)`   SURROGATE: all classes weigh the same
    =============== ================================================ =============================================

    Args:
        likelihood: (N,) of independent samples at temperature 1, of all questions.
        question: (N,) the question of each, in any order.
        meaning: (N,) whole numbers; samples of one question with one number mean the same.
        sequence: (N,) whole numbers; samples of one question with one number are the same tokens.
        form: of the estimate.
        length_normalised: use :math:`p^{1/T}` (LN-SE), a SURROGATE in every form.

    Returns:
        (Q,) nats.

    Raises:
        InputError: for an unknown form, numbers that do not fit, or no row.
        RowError: for one sequence with two meanings or likelihoods, or a value that is no finite log-likelihood.

    Source: arXiv 2302.09664 (its released code has ``class_mean``); Farquhar et al., Nature 2024 (``normalised``);
    lm-polygraph (``sample_mean``). The first two sum over repeated samples too; the last one by default.
    """
    if form not in ("normalised", "sample_mean", "class_mean"):
        raise InputError(f"form must be one of normalised, sample_mean, class_mean, got {form!r}")
    _require_finite(likelihood)
    scored = length_normalised_log_prob(likelihood) if length_normalised else likelihood
    which, count = _questions(question, len(scored), scored.value)
    means, texts = _whole("meaning", meaning, which), _whole("sequence", sequence, which)
    value = scored.value.detach().double()
    _, same = torch.unique(torch.stack([which, texts], 1), dim=0, return_inverse=True)
    rows = torch.arange(len(value), device=value.device)
    first = rows.new_full((int(same.max()) + 1,), len(value)).scatter_reduce(0, same, rows, "amin")
    odd = means != means[first[same]]
    if not _is_noisy(scored):
        odd |= (value - value[first[same]]).abs() > _SAME * (1 + value.abs())
    if bool(odd.any()):
        row = int(odd.nonzero()[0])
        raise RowError(
            f"has the sequence of row {int(first[same][row])} and another meaning or log-likelihood: number sequences "
            "apart",
            row=f"row {row}",
        )
    classes, member = torch.unique(torch.stack([which, means], 1), dim=0, return_inverse=True)
    owner = classes[:, 0]
    mass = _log_sums(value[first], member[first], len(classes))
    promised: Mapping[Kind, Kind] = {}
    if form == "normalised":  # what is unknown about unnormalised likelihoods cancels
        promised = dict.fromkeys((Kind.EXACT, Kind.ESTIMATE, Kind.UNNORMALIZED), Kind.ESTIMATE)
        share = mass - _log_sums(mass, owner, len(count))[owner]
        entropy = _sums(-share.exp() * share, owner, len(count)).clamp_min(0)
    elif form == "sample_mean":
        promised = {Kind.EXACT: Kind.UPPER_BOUND}
        entropy = _sums(-mass[member], which, len(count)) / count
    else:
        entropy = _sums(-mass, owner, len(count)) / torch.bincount(owner, minlength=len(count))
    kind = Kind.SURROGATE if length_normalised else promised.get(scored.kind, Kind.SURROGATE)
    return Measurement(entropy, kind, "semantic_entropy")


def discrete_semantic_entropy(question: Rows, meaning: Rows) -> Measurement:
    r"""Entropy of the meanings of the outputs from counts alone, :math:`-\sum_c \frac{n_c}{N} \log \frac{n_c}{N}`.

    Too small on average (Jensen), by about :math:`(|C| - 1) / 2N`, and at most :math:`\log N`.

    Args:
        question: (N,) the question of each sample, in any order.
        meaning: (N,) whole numbers; samples of one question with one number mean the same.

    Returns:
        (Q,) nats, a LOWER_BOUND in expectation.

    Raises:
        InputError: for numbers that do not fit, or no row.

    Source: Farquhar et al., Nature 2024; arXiv 2412.15176.
    """
    owner, sizes, count = _classes(question, meaning)
    share = sizes / count[owner].double()
    entropy = _sums(-share * share.log(), owner, len(count)).clamp_min(0)
    return Measurement(entropy, Kind.LOWER_BOUND, "discrete_semantic_entropy")


def num_semantic_sets(question: Rows, meaning: Rows) -> Tensor:
    """(Q,) long, how many meanings the samples of each question have; arguments as `discrete_semantic_entropy`.

    Source: arXiv 2302.09664.
    """
    owner, _, count = _classes(question, meaning)
    return torch.bincount(owner, minlength=len(count))


# --------------------------------------------------------------------------------------------------------- helpers
def _require_finite(likelihood: LogLikelihood) -> None:
    bad = (~torch.isfinite(likelihood.value)).nonzero().flatten()
    if len(bad):
        raise RowError(
            f"its log-likelihood is {float(likelihood.value[bad[0]])}, and an output of a model has a finite one: "
            "score it with the model that gave it",
            row=f"row {int(bad[0])}",
        )


def _is_noisy(likelihood: LogLikelihood) -> bool:
    return likelihood.stderr is not None or likelihood.draws is not None


def _whole(name: str, numbers: Rows, like: Tensor) -> Tensor:
    """(N,) whole numbers, one for each row of `like`."""
    given = torch.as_tensor(numbers, device=like.device)
    if not len(like):
        raise InputError("there is no sample: give at least one")
    if given.shape != like.shape[:1] or given.is_floating_point() or given.dtype == torch.bool:
        raise InputError(
            f"{name} must be {len(like)} whole numbers, one per row, got {given.dtype} {tuple(given.shape)}"
        )
    return given.long()


def _questions(question: Rows, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) the question of each row, numbered from 0, and (Q,) the rows of each."""
    numbers = _whole("question", question, like[:count])
    _, which, rows = torch.unique(numbers, return_inverse=True, return_counts=True)
    return which, rows


def _classes(question: Rows, meaning: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) the question of each class, (C,) its samples, and (Q,) the samples of each question."""
    given = torch.as_tensor(question)
    which, count = _questions(given, given.shape[0] if given.dim() else 0, given.reshape(-1))
    means = _whole("meaning", meaning, which)
    classes, sizes = torch.unique(torch.stack([which, means], 1), dim=0, return_counts=True)
    return classes[:, 0], sizes, count


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, index, values)


def _log_sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Log-sum-exp of finite values by index."""
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, index, values, "amax")
    return top + _sums((values - top[index]).exp(), index, count).log()
