r"""How unsure a model is of the text it generates: the likelihood of one decode, entropies of strings and of meanings.

With the zero-one score in place of the log score, uncertainty is one minus the probability of the likeliest output,
and its ranking is that of :math:`-\log p(\hat y \mid x)`: one greedy decode, no samples (arXiv 2412.15176). Entropies
take samples. Functions of labelled likelihoods come first, then `sequence_uncertainty`, which decodes, samples and
scores. Results per question are in ascending order of the questions' numbers.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.encode import TextEncoder, check_text
from loglik.models.protocol import ChainRule, Model, Sampler, require
from loglik.models.sampling import ancestral_samples

__all__ = [
    "Equivalence",
    "SemanticForm",
    "UncertaintyTable",
    "by_embedding",
    "by_judge",
    "discrete_semantic_entropy",
    "exact_match",
    "greedy_completions",
    "greedy_nll",
    "length_normalised_log_prob",
    "maximum_sequence_probability",
    "mode_nll",
    "num_semantic_sets",
    "predictive_entropy",
    "prompt_tokens",
    "semantic_entropy",
    "sequence_uncertainty",
]

SemanticForm = Literal["normalised", "sample_mean", "class_mean"]
Decode = Literal["greedy", "search", "sample"]
# From a prompt and distinct answers to it to a class of meaning for each answer.
Equivalence = Callable[[str, Sequence[str]], Sequence[int]]
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


# ----------------------------------------------------------------------------------------------------- equivalence
def exact_match(prompt: str, texts: Sequence[str]) -> list[int]:
    """Texts mean the same if they are equal but for case, white space, articles and punctuation around words.

    Signs, decimal points and units stay, so that -5 is not 5 and 3.5 is not 35.
    """
    found: dict[str, int] = {}
    return [found.setdefault(_plain(text), len(found)) for text in texts]


def by_judge(judge: Callable[[str, str, str], bool], *, both_ways: bool = True) -> Equivalence:
    """Meanings from a judge of pairs, such as an entailment model.

    A text joins the first class with whose first text it agrees; where the judge is not transitive, the order counts.

    Args:
        judge: whether the second text follows from the first: ``judge(prompt, first, second)``.
        both_ways: join texts only if each follows from the other.

    Source: arXiv 2302.09664.
    """

    def classes(prompt: str, texts: Sequence[str]) -> list[int]:
        def agree(i: int, j: int) -> bool:
            return judge(prompt, texts[i], texts[j]) and (not both_ways or judge(prompt, texts[j], texts[i]))

        return _agglomerate(len(texts), agree)

    return classes


def by_embedding(embed: Callable[[Sequence[str]], Any], *, threshold: float = 0.9) -> Equivalence:
    """Meanings from embeddings: a text joins the first class whose first text has a cosine of at least `threshold`.

    Args:
        embed: from M texts to (M, D) numbers.
        threshold: in [-1, 1]; `loglik.signals.metacognition.fit_threshold` fits it on labelled pairs.

    Raises:
        InputError: for a threshold out of range; when used, for embeddings of another shape, 0 or not finite.
    """
    if not -1 <= threshold <= 1:
        raise InputError(f"threshold must lie in [-1, 1], got {threshold}")

    def classes(prompt: str, texts: Sequence[str]) -> list[int]:
        vectors = torch.as_tensor(embed(texts)).detach().double()
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise InputError(f"embed must give ({len(texts)}, D) numbers for as many texts, got {tuple(vectors.shape)}")
        norms = vectors.norm(dim=1, keepdim=True)
        bad = (~(torch.isfinite(norms) & (norms > 0))).flatten().nonzero()
        if len(bad):
            raise InputError(f"the embedding of {texts[int(bad[0])]!r} is 0 or not finite: give another embed")
        near = ((vectors / norms) @ (vectors / norms).T >= threshold - 1e-9).tolist()
        return _agglomerate(len(texts), lambda i, j: bool(near[i][j]))

    return classes


# ---------------------------------------------------------------------------------------------------------- driver
@dataclass(frozen=True, slots=True)
class UncertaintyTable:
    """Uncertainty about the outputs to Q prompts.

    Args:
        prompts: as text.
        outputs: the outputs that are judged, as text.
        decode: where they come from: ``greedy``, ``search``, or the likeliest ``sample`` of a model that gives no
            next-token probabilities.
        ended: (Q,) bool, whether the output ends with EOS and not at the limit. What is cut counts as an outcome of
            the model cut there.
        likelihood: (Q,) of the outputs.
        measures: by name, (Q,) each: ``g_nll``, ``sequence_probability``, ``mode_nll`` (of output and samples) and,
            with samples, ``predictive_entropy``, ``length_normalised_entropy``, ``semantic_entropy`` and
            ``discrete_semantic_entropy``.
        samples: N texts per prompt.
        sample_likelihood: (Q N,) of the samples, those of a prompt together; None without samples.
        sample_ended: Q shares of samples that end with EOS.
        num_semantic_sets: Q numbers of meanings.
    """

    prompts: tuple[str, ...]
    outputs: tuple[str, ...]
    decode: Decode
    ended: Tensor
    likelihood: LogLikelihood
    measures: Mapping[str, Measurement]
    samples: tuple[tuple[str, ...], ...] = ()
    sample_likelihood: LogLikelihood | None = None
    sample_ended: tuple[float, ...] = ()
    num_semantic_sets: tuple[int, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row of plain values per prompt, for JSON and tables; None stands for what has no value."""
        columns: dict[str, Sequence[Any]] = {
            "prompt": self.prompts,
            "output": self.outputs,
            "decode": [self.decode] * len(self.outputs),
            "ended": self.ended.tolist(),
            "num_tokens": self.likelihood.num_units.tolist(),
            "log_prob": self.likelihood.value.tolist(),
            "log_prob_per_token": length_normalised_log_prob(self.likelihood).value.tolist(),
            "kind": [str(self.likelihood.kind)] * len(self.outputs),
        }
        for name, measured in self.measures.items():
            columns[name] = measured.value.tolist()
            if measured.stderr is not None:
                columns[f"{name}_stderr"] = [s if math.isfinite(s) else None for s in measured.stderr.tolist()]
        if self.samples:
            columns |= {
                "num_semantic_sets": self.num_semantic_sets,
                "sample_ended": self.sample_ended,
                "samples": [list(texts) for texts in self.samples],
            }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()
def sequence_uncertainty(
    model: Any,
    prompts: Sequence[str] | TokenBatch,
    *,
    num_samples: int = 10,
    max_tokens: int = 64,
    equivalence: Equivalence = exact_match,
    search: Callable[[TokenBatch], Sequence[Sequence[int]]] | None = None,
    seed: int = 0,
) -> UncertaintyTable:
    """Decode and sample answers to prompts, and measure how unsure the model is of each.

    Args:
        model: anything with `log_prob` and `next_log_probs` (decoded greedily) or `sample`; its tokenizer names EOS.
        prompts: Q texts, or rows of tokens.
        num_samples: N per prompt, at temperature 1; 0 measures the decode alone.
        max_tokens: tokens of an output at most, EOS included.
        equivalence: which answers mean the same.
        search: from the Q prompts to the Q completions (token ids with their EOS) to judge in place of the greedy
            ones, such as ``lambda prompt: beam_search(model, prompt, width=4, max_tokens=64).best()``.
        seed: of the samples; those of a prompt depend on it and on the prompt alone.

    Raises:
        InputError: for options out of range, or a model that can neither be decoded nor sampled.
        RowError: for a prompt that is empty or too long, or after which the model gives NaN.

    Source: arXiv 2412.15176, 2302.09664.
    """
    require(model, Model, "sequence uncertainty")  # type: ignore[type-abstract]
    if num_samples < 0 or max_tokens < 1:
        raise InputError(f"num_samples must be at least 0 and max_tokens at least 1, got {num_samples}, {max_tokens}")
    batch = prompts if isinstance(prompts, TokenBatch) else prompt_tokens(model, prompts)
    heads = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    _require_room(model, heads, max_tokens)
    tokenizer = getattr(model, "tokenizer", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    drawn = [_drawn(model, head, num_samples, max_tokens, seed) for head in heads] if num_samples else []
    scored = [model.log_prob(rows).detach() for rows in drawn]
    found = [_completions(rows) for rows in drawn]
    decode: Decode = "search" if search is not None else "greedy" if isinstance(model, ChainRule) else "sample"
    if search is not None:
        chosen = [list(ids) for ids in search(batch)]
        if len(chosen) != len(heads) or not all(chosen):
            raise InputError(f"search must give a completion that is not empty for each of the {len(heads)} prompts")
    elif decode == "greedy":
        chosen = _completions(greedy_completions(model, batch, max_tokens=max_tokens))
    elif drawn:
        chosen = [own[int(values.value.argmax())] for own, values in zip(found, scored, strict=True)]
    else:
        raise InputError(f"{type(model).__name__} cannot be decoded greedily: set num_samples above 0, or give search")
    best = model.log_prob(
        TokenBatch.from_lists([a + b for a, b in zip(heads, chosen, strict=True)], starts=[len(a) for a in heads])
    ).detach()
    shown = [_text(tokenizer, head) for head in heads] if isinstance(prompts, TokenBatch) else list(prompts)
    question = torch.arange(len(heads))
    measures = {"g_nll": greedy_nll(best), "sequence_probability": maximum_sequence_probability(best)}
    extra: dict[str, Any] = {}
    everything, owners = best, question
    if drawn:
        likelihood, owner = LogLikelihood.cat(scored), question.repeat_interleave(num_samples)
        everything, owners = LogLikelihood.cat([best, likelihood]), torch.cat([question, owner])
        answers = [[_text(tokenizer, ids) for ids in own] for own in found]
        meaning = [m for text, own in zip(shown, answers, strict=True) for m in _meanings(equivalence, text, own)]
        sequence = [number for own in found for number in _numbered([tuple(ids) for ids in own])]
        for normalised in (False, True):
            entropy = predictive_entropy(likelihood, owner, length_normalised=normalised)
            measures[entropy.name] = entropy
        measures["semantic_entropy"] = semantic_entropy(likelihood, owner, meaning, sequence)
        measures["discrete_semantic_entropy"] = discrete_semantic_entropy(owner, meaning)
        extra = {
            "samples": tuple(map(tuple, answers)),
            "sample_likelihood": likelihood,
            "sample_ended": tuple(sum(ids[-1] == eos for ids in own) / num_samples for own in found),
            "num_semantic_sets": tuple(num_semantic_sets(owner, meaning).tolist()),
        }
    measures["mode_nll"] = mode_nll(everything, owners)
    return UncertaintyTable(
        tuple(shown),
        tuple(_text(tokenizer, ids) for ids in chosen),
        decode,
        torch.tensor([ids[-1] == eos for ids in chosen]),
        best,
        measures,
        **extra,
    )


@torch.no_grad()
def greedy_completions(model: ChainRule, prompt: TokenBatch, *, max_tokens: int = 64) -> TokenBatch:
    """The likeliest token at each step until EOS or `max_tokens`; the completion (EOS included) is scored.

    Args:
        model: gives the next-token distributions; its tokenizer names EOS.
        prompt: B rows to continue.
        max_tokens: tokens of a completion at most.

    Raises:
        RowError: for a prompt after which the model gives NaN.
    """
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    rows = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True)]
    starts = [len(row) for row in rows]
    live = list(range(len(rows)))
    for _ in range(max_tokens):
        if not live:
            break
        seen = TokenBatch.from_lists([rows[i] for i in live], starts=[starts[i] for i in live])
        best = model.next_log_probs(seen).max(1)
        broken = best.values.isnan().nonzero().flatten()
        if len(broken):
            raise RowError("the model gives NaN after it: mend the weights", row=f"prompt {live[int(broken[0])]}")
        tokens = best.indices.tolist()
        for i, token in zip(live, tokens, strict=True):
            rows[i].append(token)
        live = [i for i, token in zip(live, tokens, strict=True) if token != eos]
    return TokenBatch.from_lists(rows, starts=starts)


def prompt_tokens(model: Any, prompts: Sequence[str]) -> TokenBatch:
    """Prompts as rows of tokens to continue, with the special tokens that the tokenizer puts before a text.

    Raises:
        InputError: for no prompts, one string, or a model without a tokenizer.
        RowError: for a prompt that is no Unicode, or an empty one where the tokenizer has no BOS.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts must be several texts, at least one, and not one string; give [prompt]")
    tokenizer = getattr(model, "tokenizer", None)
    encoder = TextEncoder(tokenizer, layout=model.layout if tokenizer is not None else "causal")
    assert tokenizer is not None  # the encoder has refused it
    rows = []
    for number, text in enumerate(prompts):
        try:
            check_text(text, "prompt")
        except RowError as error:
            raise error.at(f"prompt {number}") from None
        whole: list[int] = tokenizer(text, add_special_tokens=model.layout == "seq2seq")["input_ids"]
        if model.layout != "seq2seq" and (encoder.adds_bos or not whole):
            bos = tokenizer.bos_token_id
            if bos is None:
                raise RowError("is empty and the tokenizer has no BOS: give a text", row=f"prompt {number}")
            whole = whole if whole[:1] == [bos] else [bos, *whole]
        rows.append(whole)
    return TokenBatch.from_lists(rows, starts=[len(row) for row in rows])


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


def _numbered(items: Sequence[Hashable]) -> list[int]:
    """Equal items get equal numbers, in the order in which they appear."""
    found: dict[Hashable, int] = {}
    return [found.setdefault(item, len(found)) for item in items]


def _meanings(equivalence: Equivalence, prompt: str, texts: Sequence[str]) -> list[int]:
    """Class of each text; `equivalence` sees each distinct text once."""
    distinct = list(dict.fromkeys(texts))
    classes = [int(number) for number in equivalence(prompt, distinct)]
    if len(classes) != len(distinct):
        raise InputError(f"equivalence must give a class for each of {len(distinct)} texts, got {len(classes)}")
    of = dict(zip(distinct, classes, strict=True))
    return [of[text] for text in texts]


def _agglomerate(count: int, agree: Callable[[int, int], bool]) -> list[int]:
    """Each item joins the first class with whose first item it agrees, or begins one."""
    heads: list[int] = []
    out = []
    for row in range(count):
        number = next((n for n, head in enumerate(heads) if agree(head, row)), len(heads))
        if number == len(heads):
            heads.append(row)
        out.append(number)
    return out


def _plain(text: str) -> str:
    """What `exact_match` compares."""
    folded = unicodedata.normalize("NFKC", text).casefold().split()
    words = [word.lstrip("\"'([{").rstrip("\"')]}.,;:!?") for word in folded]
    kept = [word for word in words if word and word not in ("a", "an", "the")]
    return " ".join(kept) if kept else " ".join(folded)  # "A" and "?" are answers too


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text; as numbers where there is nothing to decode them."""
    if hasattr(tokenizer, "decode"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return " ".join(map(str, ids))


def _completions(batch: TokenBatch) -> list[list[int]]:
    scored = batch.scored_mask & batch.attention_mask
    return [ids[own].tolist() for ids, own in zip(batch.ids, scored, strict=True)]


def _drawn(model: Any, head: list[int], count: int, max_tokens: int, seed: int) -> TokenBatch:
    """Samples of one prompt, from random numbers that belong to it."""
    name = hashlib.sha256(repr((seed, head)).encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(name, "big") >> 1)
    prompt = TokenBatch.from_lists([head], starts=[len(head)])
    if isinstance(model, Sampler):
        return model.sample(count, prompt=prompt, generator=generator, max_tokens=max_tokens)
    require(model, ChainRule, "sampling without a sampler")  # type: ignore[type-abstract]
    return ancestral_samples(model, count, prompt=prompt, generator=generator, max_tokens=max_tokens)


def _require_room(model: Any, heads: Sequence[Sequence[int]], max_tokens: int) -> None:
    if not len(heads):
        raise InputError("there is no prompt: give at least one")
    for number, head in enumerate(heads):
        if not head:
            raise RowError("is empty: give BOS or a text", row=f"prompt {number}")
    limit = getattr(model, "max_length", None)
    if limit is None or getattr(model, "layout", None) == "seq2seq":
        return
    longest = max(range(len(heads)), key=lambda i: len(heads[i]))
    if len(heads[longest]) + max_tokens > limit:
        raise RowError(
            f"has {len(heads[longest])} tokens, and {max_tokens} more do not fit into the model's context of {limit}: "
            "shorten it or lower max_tokens",
            row=f"prompt {longest}",
        )
