r"""Ignorance or error: does a model not know an answer (HK-), or know it and still say something else (HK+)?

Both look the same in an evaluation and need different cures. A question is known if a model is right in every attempt
after truthful examples, and unknown if it never is. A known question that it answers wrongly after a perturbing prompt
is HK+. Labels belong to one model and one pair of prompts. `knowledge_labels` samples; `likely_knowledge` reads the
same from likelihoods (`loglik.signals.answer_likelihoods`) without sampling. How far a right answer is ahead of other
candidates is the margin of `loglik.signals.choice`. `loglik.signals.probes` compares what models know, and asks whether
hidden states tell the kinds apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import ChainRule, require
from loglik.signals.answer_likelihoods import AnswerLikelihoods, check_questions, known_probability
from loglik.signals.detection import checked_pairs
from loglik.signals.scenarios import prompt_tokens

__all__ = [
    "Knowledge",
    "KnowledgeLabels",
    "contains_answer",
    "knowledge_labels",
    "label_knowledge",
    "likely_knowledge",
    "shot_prompts",
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


def shot_prompts(
    questions: Sequence[str],
    shots: Sequence[tuple[str, str]],
    *,
    number: int = 3,
    prefix: str = "",
    template: str = "question: {question}\nanswer:",
    seed: int = 0,
) -> tuple[str, ...]:
    """Prompts with solved examples before each question.

    One seed draws the same examples, whatever their answers: call it with the right answers for truthful prompts, and
    with wrong ones for those that perturb.

    Args:
        questions: N questions.
        shots: question and answer of each example; one that is asked itself is not shown.
        number: examples per question, drawn anew for each; 0 for none.
        prefix: stands before everything, such as a story.
        template: of question and examples, which have their answer behind it.
        seed: of the draws.

    Raises:
        InputError: for a template without ``{question}``, or fewer examples than are shown.

    Source: arXiv 2410.22071.
    """
    if "{question}" not in template or number < 0:
        raise InputError(f"a template needs {{question}} and number must be at least 0, got {template!r} and {number}")
    made = []
    for place, question in enumerate(questions):
        others = [shot for shot in shots if shot[0] != question]
        if len(others) < number:
            raise InputError(f"{number} examples are to be shown before {question!r}, and there are {len(others)}")
        order = np.random.default_rng([seed, place]).permutation(len(others))[:number]
        shown = [template.replace("{question}", others[i][0]) + f" {others[i][1]}\n" for i in order]
        made.append(prefix + "".join(shown) + template.replace("{question}", question))
    return tuple(made)


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
    check_questions(answers, good=good, bad=bad)
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


def likely_knowledge(good: AnswerLikelihoods, bad: AnswerLikelihoods, *, samples: int = 5) -> tuple[Knowledge, ...]:
    """The label that sampling would give most often, without samples.

    Known, unknown or neither, whichever is most probable (`known_probability`); a known question is HK+ if greedy
    decoding under the perturbing prompt does not write the answer.

    Args:
        good: of the answers after truthful examples, at the samples' temperature.
        bad: of the same answers under the perturbing prompt.
        samples: S.

    Raises:
        InputError: for unequal lengths, or as `known_probability`.

    Source: the likelihood form of arXiv 2410.22071.
    """
    if len(good.greedy) != len(bad.greedy):
        raise InputError(f"there are {len(good.greedy)} answers and {len(bad.greedy)} under the perturbing prompt")
    known, unknown = known_probability(good.tempered, good.greedy, samples=samples)
    found = []
    for k, u, right in zip(known.tolist(), unknown.tolist(), bad.greedy.tolist(), strict=True):
        rest = 1 - k - u
        kind = Knowledge.FACTUAL if right else Knowledge.WRONG
        found.append(kind if k >= max(u, rest) else Knowledge.UNKNOWN if u >= rest else Knowledge.PARTIAL)
    return tuple(found)


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
