r"""Ignorance or error: does a model not know an answer (HK-), or know it and still say something else (HK+)?

Both look the same in an evaluation and need different cures. A question is known if a model is right in every attempt
after truthful examples, and unknown if it never is. A known question that it answers wrongly after a perturbing prompt
is HK+. Labels belong to one model and one pair of prompts. `knowledge_labels` samples, `answer_likelihoods` with
`known_probability` gives the same in expectation without sampling (how far a right answer is ahead of other candidates
is the margin of `loglik.signals.choice`), and `probe_accuracy` asks whether hidden states tell the kinds apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import EncodedText, TextEncoder
from loglik.models.protocol import ChainRule, HiddenStates, require
from loglik.signals.detection import as_numbers, checked_pairs
from loglik.signals.scenarios import prompt_tokens

__all__ = [
    "AnswerLikelihoods",
    "Knowledge",
    "KnowledgeLabels",
    "ProbeAccuracy",
    "SetOverlap",
    "answer_likelihoods",
    "answer_states",
    "contains_answer",
    "knowledge_labels",
    "known_probability",
    "label_knowledge",
    "probe_accuracy",
    "set_overlap",
]

_ROWS = 64  # prompts per call of `next_log_probs`


class Knowledge(StrEnum):
    """What a model does with a question."""

    UNKNOWN = "HK-"  # never right, even after truthful examples
    WRONG = "HK+"  # known, and wrong under the perturbing prompt
    FACTUAL = "factual"  # known, and right there too
    PARTIAL = "partial"  # right in some attempts: set aside


def label_knowledge(
    count: Tensor | ArrayLike, right_perturbed: Tensor | ArrayLike, *, attempts: int = 6
) -> tuple[Knowledge, ...]:
    """Labels from counts of right answers.

    Args:
        count: (N,) right answers among `attempts` after truthful examples.
        right_perturbed: (N,) bool: whether the greedy answer under the perturbing prompt is right.
        attempts: how many there were (one greedy and five samples in the source).

    Raises:
        InputError: for counts outside 0 to `attempts`, unequal lengths, or flags that are not 0 or 1.

    Source: arXiv 2410.22071.
    """
    numbers, right = checked_pairs(count, right_perturbed, ("count", "right_perturbed"))
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise InputError(f"attempts must be at least 1, got {attempts!r}")
    wrong = np.flatnonzero(~((numbers >= 0) & (numbers <= attempts) & (numbers == np.floor(numbers))))
    if len(wrong):
        raise InputError(f"a count must be from 0 to {attempts}, got {numbers[wrong[0]]} in row {int(wrong[0])}")
    kinds = {0: Knowledge.UNKNOWN, attempts: Knowledge.FACTUAL}
    found = [kinds.get(int(k), Knowledge.PARTIAL) for k in numbers]
    return tuple(
        Knowledge.WRONG if kind is Knowledge.FACTUAL and not ok else kind for kind, ok in zip(found, right, strict=True)
    )


def contains_answer(text: str, answers: str | Sequence[str]) -> bool:
    """Whether a text holds an answer (or one of its aliases), in any case of letters.

    A short answer such as "7" is found anywhere, and another right wording is not: what counts is the string.
    """
    aliases = [answers] if isinstance(answers, str) else answers
    return any(alias.lower() in text.lower() for alias in aliases)


@dataclass(frozen=True, slots=True)
class KnowledgeLabels:
    """Labels of N questions with the answers they come from.

    Args:
        labels: of each question.
        count: (N,) long, right answers among the attempts.
        attempts: per question.
        greedy: greedy answers after truthful examples.
        perturbed: greedy answers under the perturbing prompt.
    """

    labels: tuple[Knowledge, ...]
    count: Tensor
    attempts: int
    greedy: tuple[str, ...]
    perturbed: tuple[str, ...]

    @property
    def error_rate(self) -> float:
        """Share of HK+ among the known questions.

        Raises:
            InputError: if none is known.
        """
        known = sum(label in (Knowledge.WRONG, Knowledge.FACTUAL) for label in self.labels)
        if not known:
            raise InputError("no question is known, so that none can be known and answered wrongly: ask easier ones")
        return sum(label is Knowledge.WRONG for label in self.labels) / known


@torch.no_grad()
def knowledge_labels(
    model: Any,
    good: Sequence[str],
    bad: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    *,
    samples: int = 5,
    temperature: float = 0.5,
    max_tokens: int = 5,
    generator: torch.Generator | None = None,
) -> KnowledgeLabels:
    """Label questions by one greedy answer and samples after truthful examples, and a greedy one when perturbed.

    Args:
        model: gives next-token distributions, and has a tokenizer.
        good: N prompts with truthful examples, each ending where the answer begins.
        bad: the same questions under the perturbing prompt.
        answers: the right answer of each, or its aliases; `contains_answer` decides.
        samples: drawn per question, each independently.
        temperature: of the samples.
        max_tokens: of an answer.
        generator: of the random numbers, on the CPU.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, numbers that do not pair, or options out
            of range.
        RowError: for an empty prompt or answer.

    Source: arXiv 2410.22071. (Its released code samples by beams, which are nearly alike; these are independent.)
    """
    chain = require(model, ChainRule, "asking questions")  # type: ignore[type-abstract]
    _check_questions(answers, good=good, bad=bad)
    if samples < 0 or max_tokens < 1 or not 0 < temperature < math.inf:
        given = f"{samples}, {max_tokens} and {temperature}"
        raise InputError(f"samples must be at least 0, max_tokens at least 1, temperature positive; got {given}")
    end = getattr(model.tokenizer, "eos_token_id", None)

    def texts(prompts: Sequence[str], scale: float | None) -> list[str]:
        rows = _continued(chain, prompt_tokens(model, prompts), max_tokens, scale, generator, end)
        return [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    greedy, perturbed = texts(good, None), texts(bad, None)
    drawn = texts([p for p in good for _ in range(samples)], temperature) if samples else []
    right = [
        [contains_answer(text, answer) for text in (greedy[i], *drawn[i * samples : (i + 1) * samples])]
        for i, answer in enumerate(answers)
    ]
    count = torch.tensor([sum(row) for row in right])
    kept = [contains_answer(text, answer) for text, answer in zip(perturbed, answers, strict=True)]
    labels = label_knowledge(count, kept, attempts=samples + 1)
    return KnowledgeLabels(labels, count, samples + 1, tuple(greedy), tuple(perturbed))


# ---------------------------------------------------------------------- likelihoods instead of samples
@dataclass(frozen=True, slots=True)
class AnswerLikelihoods:
    """Right answers of N questions under one prompt each.

    Args:
        likelihood: (N,) log p of the answer's tokens. What a perturbing prompt takes away is a difference of two.
        tempered: (N,) the same of sampling at a temperature, token by token.
        greedy: (N,) bool, whether greedy decoding writes the answer (ties count).
    """

    likelihood: LogLikelihood
    tempered: LogLikelihood
    greedy: Tensor


@torch.no_grad()
def answer_likelihoods(
    model: Any, prompts: Sequence[str], answers: Sequence[str], *, temperature: float = 0.5
) -> AnswerLikelihoods:
    r"""Log-probability that a model's answer begins with the right one, as it is and at a temperature.

    .. math:: a_T = \sum_t \Bigl( \frac{z_{y_t}}{T} - \log \sum_v e^{z_v / T} \Bigr)

    Args:
        model: gives next-token distributions, and has a tokenizer.
        prompts: N prompts.
        answers: what follows each, with its leading space; tokenised together with the prompt.
        temperature: T.

    Returns:
        float64 terms per token, exact for a model with a chain rule.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, numbers that do not pair, or a
            temperature out of range.
        RowError: for an empty prompt or answer, or one that cannot be tokenised.

    Source: the likelihood form of arXiv 2410.22071.
    """
    chain = require(model, ChainRule, "scoring answers")  # type: ignore[type-abstract]
    _check_questions(answers, prompts=prompts)
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    encoder = TextEncoder(getattr(model, "tokenizer", None), layout=getattr(model, "layout", "causal"))
    rows, starts = [], []
    for number, found in enumerate(encoder.encode_all(list(zip(prompts, answers, strict=True)))):
        if not isinstance(found, EncodedText):
            raise found.at(f"question {number}")
        rows.append(found.prefix + found.content)
        starts.append(len(found.prefix) + found.scored_from)
    places = [(i, t) for i, (row, start) in enumerate(zip(rows, starts, strict=True)) for t in range(start, len(row))]
    width = max(len(row) for row in rows)
    terms, cooled = torch.zeros(2, len(rows), width, dtype=torch.float64)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    first = torch.ones(len(rows), dtype=torch.bool)
    for begin in range(0, len(places), _ROWS):
        part = places[begin : begin + _ROWS]
        batch = TokenBatch.from_lists([rows[i][:t] for i, t in part], starts=[starts[i] for i, _ in part])
        table = chain.next_log_probs(batch).double().cpu()
        for (i, t), plain, cold in zip(part, table, (table / temperature).log_softmax(-1), strict=True):
            token = rows[i][t]
            terms[i, t], cooled[i, t], scored[i, t] = plain[token], cold[token], True
            first[i] &= bool(plain[token] >= plain.max())
    kind, unit = getattr(model, "kind", Kind.EXACT), getattr(model, "unit", Unit.TOKEN)
    made = [LogLikelihood.from_per_unit(values, scored, kind=kind, unit=unit) for values in (terms, cooled)]
    return AnswerLikelihoods(made[0], made[1], first)


def known_probability(
    tempered: LogLikelihood, greedy: Tensor | ArrayLike, *, samples: int = 5
) -> tuple[Tensor, Tensor]:
    r"""Probability of the labels known and unknown, over the samples that `knowledge_labels` would draw.

    .. math:: P(\text{known}) = g\, p_T^S, \qquad P(\text{unknown}) = (1 - g)(1 - p_T)^S

    where g is whether the greedy answer is right and :math:`p_T` the probability of a right sample.

    Args:
        tempered: (N,) log-probability of the right answer at the sampling temperature; of aliases, the logsumexp.
        greedy: (N,) bool.
        samples: S.

    Returns:
        (N,) and (N,), float64 in [0, 1].

    Raises:
        InputError: for unequal lengths, flags that are not 0 or 1, or a number of samples below 0.
        RowError: for a value that is no log-probability.

    Source: the likelihood form of arXiv 2410.22071. Exact for the string of the answer; containment counts more.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise InputError(f"samples must be at least 0, got {samples!r}")
    value = tempered.value.detach().double()
    bad = (~(value <= 1e-6)).nonzero().flatten()
    if len(bad):
        raise RowError(f"{float(value[bad[0]])} is no log-probability", row=f"row {int(bad[0])}")
    _, flags = checked_pairs(value, greedy, ("tempered", "greedy"))
    p, g = value.exp().clamp_max(1.0).cpu(), torch.from_numpy(flags).double()
    return g * p**samples, (1 - g) * (1 - p) ** samples


# ---------------------------------------------------------------------- sets and probes
@dataclass(frozen=True, slots=True)
class SetOverlap:
    """Overlap of two sets.

    Args:
        jaccard: members of both over members of either.
        chance: its value for independent sets of these sizes, in a large universe.
    """

    jaccard: float
    chance: float


def set_overlap(first: Tensor | ArrayLike, second: Tensor | ArrayLike) -> SetOverlap:
    r"""Do two models (or prompts) share what they know, or what they get wrong, more than by chance?

    .. math:: J = \frac{|A \cap B|}{|A \cup B|}, \qquad J_0 = \frac{p_A p_B}{p_A + p_B - p_A p_B}

    Errors are compared over the questions that both know.

    Args:
        first: (N,) bool over the universe.
        second: (N,) likewise.

    Raises:
        InputError: for unequal lengths, flags that are not 0 or 1, or two empty sets.

    Source: arXiv 2410.22071.
    """
    numbers, b = checked_pairs(first, second, ("first", "second"))
    _, a = checked_pairs(np.zeros(len(numbers)), numbers, ("first", "first"))
    union = int((a | b).sum())
    if not union:
        raise InputError("both sets are empty, so that their overlap is undefined")
    p, q = float(a.mean()), float(b.mean())
    return SetOverlap(int((a & b).sum()) / union, p * q / (p + q - p * q))


def answer_states(model: Any, batch: TokenBatch) -> Tensor:
    """(B, D) hidden states at the last token of each row: the prompt's before an answer, or the answer's after it.

    Raises:
        InputError: for a model without hidden states.
        RowError: for a row without tokens.
    """
    states = require(model, HiddenStates, "a probe").hidden_states(batch)  # type: ignore[type-abstract]
    real = batch.attention_mask.to(states.device)
    empty = (~real.any(1)).nonzero().flatten()
    if len(empty):
        raise RowError("has no token: remove it", row=f"row {int(empty[0])}")
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


@dataclass(frozen=True, slots=True)
class ProbeAccuracy:
    """Accuracy of probes on held-out questions.

    Args:
        accuracy: mean over splits.
        per_split: of each split.
        chance: 1 / classes: they are balanced.
        per_class: questions of each class.
    """

    accuracy: float
    per_split: tuple[float, ...]
    chance: float
    per_class: int


def probe_accuracy(
    states: Tensor | ArrayLike,
    labels: Sequence[str],
    questions: Tensor | ArrayLike | None = None,
    *,
    splits: int = 3,
    train: float = 0.7,
    seed: int = 0,
) -> ProbeAccuracy:
    """Do hidden states tell the kinds apart, on questions that the probe has not seen?

    A linear support-vector machine (C = 1) reads states divided by their length. Each split draws as many questions of
    every class and trains on a share of each. All rows of a question stand on one side, else a probe recognises the
    question. Compare classes within one prompt setting, or it reads the prompt.

    Args:
        states: (N, D) hidden states of one layer and position.
        labels: N names of classes.
        questions: (N,) whole numbers; each row is a question of its own if None.
        splits: how many random splits.
        train: share of the questions that train, in (0, 1).
        seed: of the splits.

    Raises:
        InputError: for unequal lengths, states of length 0 or not finite, fewer than two classes of two questions, a
            question with two labels, or options out of range.

    Source: arXiv 2410.22071; by scikit-learn's `LinearSVC`.
    """
    from sklearn.svm import LinearSVC  # type: ignore[import-untyped]

    values, names = np.asarray(_unit_length(states)), np.array([str(label) for label in labels])
    own = np.arange(len(values)) if questions is None else as_numbers(questions, "questions")
    if len(names) != len(values) or own.shape != names.shape:
        raise InputError(f"{len(values)} states need as many labels and questions, got {len(names)} and {own.shape}")
    if splits < 1 or not 0 < train < 1:
        raise InputError(f"splits must be at least 1 and train between 0 and 1, got {splits} and {train}")
    classes = sorted(set(names.tolist()))
    members = [np.unique(own[names == c]) for c in classes]
    shared, times = np.unique(np.concatenate(members), return_counts=True)
    if (times > 1).any():
        raise InputError(f"question {shared[times > 1][0]} has two labels: label it once per setting")
    each = min(len(m) for m in members)
    if len(classes) < 2 or each < 2:
        raise InputError(f"a probe needs two classes with two questions each, got {classes} with at least {each}")
    cut = min(max(1, round(train * each)), each - 1)
    found = []
    for split in range(splits):
        generator = np.random.default_rng([seed, split])
        drawn = [generator.permutation(m)[:each] for m in members]
        seen = np.isin(own, np.concatenate([d[:cut] for d in drawn]))
        held = np.isin(own, np.concatenate([d[cut:] for d in drawn]))
        probe = LinearSVC(C=1.0, max_iter=100_000, random_state=0).fit(values[seen], names[seen])
        found.append(float(probe.score(values[held], names[held])))
    return ProbeAccuracy(float(np.mean(found)), tuple(found), 1 / len(classes), each)


def _unit_length(states: Tensor | ArrayLike) -> NDArray[np.float64]:
    values = as_numbers(states, "states").astype(np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"states must have shape (N, D), got {values.shape}")
    size = np.linalg.norm(values, axis=1, keepdims=True)
    bad = np.flatnonzero(~((size[:, 0] > 0) & np.isfinite(size[:, 0])))
    if len(bad):
        raise InputError(f"the state of row {int(bad[0])} has length {size[bad[0], 0]}: remove the row")
    return np.asarray(values / size)


def _check_questions(answers: Sequence[Any], **prompts: Sequence[str]) -> None:
    for name, texts in prompts.items():
        if isinstance(texts, str) or len(texts) != len(answers) or not len(answers):
            raise InputError(f"{name} must be as many prompts as there are answers, {len(answers)}, and at least one")
        for number, text in enumerate(texts):
            if not text:
                raise RowError(f"its prompt in {name} is empty", row=f"question {number}")
    for number, answer in enumerate(answers):
        aliases = [answer] if isinstance(answer, str) else list(answer)
        if not aliases or not all(alias.strip() for alias in aliases):
            raise RowError("its answer is empty: every text would contain it", row=f"question {number}")


def _continued(
    chain: ChainRule,
    rows: list[list[int]],
    tokens: int,
    temperature: float | None,
    generator: torch.Generator | None,
    end: int | None,
) -> list[list[int]]:
    """Up to `tokens` tokens after each row: the likeliest ones, or samples at a temperature; EOS ends."""
    written: list[list[int]] = [[] for _ in rows]
    for begin in range(0, len(rows), _ROWS):
        live = list(range(begin, min(begin + _ROWS, len(rows))))
        for _ in range(tokens):
            if not live:
                break
            batch = TokenBatch.from_lists([rows[i] + written[i] for i in live], starts=[len(rows[i]) for i in live])
            table = chain.next_log_probs(batch).double().cpu()
            if temperature is None:
                chosen = table.argmax(-1)
            else:
                chosen = torch.multinomial((table / temperature).softmax(-1), 1, generator=generator)[:, 0]
            for i, token in zip(live, chosen.tolist(), strict=True):
                written[i].append(token)
            live = [i for i, token in zip(live, chosen.tolist(), strict=True) if token != end]
    return written
