r"""Fact recall, heuristics, guesswork or plain language modelling: what kind of prediction is this?

Predictions of equal accuracy and confidence come about in different ways, and findings about one kind do not hold for
another. Behaviour tells the kind: does the answer survive paraphrases, does the prompt without its subject or a part of
the name alone give it, and could the subject have been learned at all? `fact_predictions` asks a model all of
that, `label_scenarios` applies the rules.

`loglik.signals.swaps` tells the kinds by likelihoods alone, and `loglik.signals.attribution` looks where in the network
each comes from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.encode import TextEncoder
from loglik.models.protocol import ChainRule, require

__all__ = [
    "SUBJECT",
    "Fact",
    "Prediction",
    "Scenario",
    "ScenarioShare",
    "fact_predictions",
    "is_generic_prompt",
    "label_scenarios",
    "prompt_tokens",
    "scenario_shares",
]

SUBJECT = "[X]"  # where a template has its subject
_ROWS = 64  # prompts per call of `next_log_probs`
_SHORTEST = 3  # characters from which on the beginning of an object counts as the object


class Scenario(StrEnum):
    """Kinds of predictions."""

    EXACT_RECALL = "exact fact recall"
    HEURISTICS = "heuristics recall"
    GUESSWORK = "guesswork"
    GENERIC = "generic language modelling"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject and what is asked about it.

    Args:
        relation: name of the relation, which has templates.
        subject: the subject as it stands in a prompt.
        object: the right answer; None for an invented subject, of which nothing is true.
        popularity: how much the subject is written about, such as monthly page views or, better, how often the
            training data mention it; needed for real subjects.
    """

    relation: str
    subject: str
    object: str | None = None
    popularity: float | None = None

    @property
    def is_synthetic(self) -> bool:
        """Whether the subject is invented."""
        return self.object is None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One of a model's most probable next tokens after a template about a fact, with its flags.

    Args:
        fact: number of the fact.
        template: number of the template among those of its relation.
        rank: 0 for the most probable.
        token: id of the predicted token.
        answer: its text, without white space around it.
        log_prob: nats.
        correct: whether the object begins with the answer, which has at least three characters.
        string_match: whether the answer is part of the subject.
        name_bias: whether a part of the subject alone gives the token, by a prompt about names.
        prompt_bias: whether the template gives the token with a neutral noun for the subject.
    """

    fact: int
    template: int
    rank: int
    token: int
    answer: str
    log_prob: float
    correct: bool
    string_match: bool
    name_bias: bool
    prompt_bias: bool

    @property
    def surface(self) -> bool:
        """Whether any shortcut explains it."""
        return self.string_match or self.name_bias or self.prompt_bias


@torch.no_grad()
def fact_predictions(
    model: Any,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    *,
    neutral: Mapping[str, Sequence[str]] | None = None,
    name_prompts: Mapping[str, Sequence[str]] | None = None,
    top: int = 3,
    flag_top: int = 10,
) -> tuple[Prediction, ...]:
    """Ask a model every template about every fact, and check each answer for shortcuts.

    Prompts are as many as templates times facts, plus one per neutral noun and template and one per name part and name
    prompt; none is asked twice.

    Args:
        model: gives next-token distributions, and has a tokenizer.
        facts: what is asked.
        templates: by relation, texts with `SUBJECT` in them that end right before the object.
        neutral: by relation, nouns that stand for the subject ("She", "The city"); a relation without any has no prompt
            bias.
        name_prompts: by relation, texts with `SUBJECT` in them that ask about a name ("[X] is a common name in the
            following country:"), in which each part of the subject stands in turn; none: no name bias.
        top: predictions per prompt.
        flag_top: among how many tokens of a shortcut prompt an answer is looked for.

    Returns:
        A prediction per fact, template and rank, in that order.

    Raises:
        InputError: for a model without next-token distributions or tokenizer, a relation without templates, a template
            without the subject's place, or counts out of range.
        RowError: for a fact without a subject.

    Source: arXiv 2410.14405.
    """
    chain = require(model, ChainRule, "labelling predictions")  # type: ignore[type-abstract]
    for name, count in (("top", top), ("flag_top", flag_top)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{name} must be at least 1 token, got {count!r}")
    neutral, name_prompts = neutral or {}, name_prompts or {}
    _check_facts(facts, templates, name_prompts)
    asked = {t.replace(SUBJECT, f.subject) for f in facts for t in templates[f.relation]}
    without = {
        (relation, number): [t.replace(SUBJECT, noun) for noun in neutral.get(relation, ())]
        for relation in {f.relation for f in facts}
        for number, t in enumerate(templates[relation])
    }
    parts = {
        (f.relation, part): [t.replace(SUBJECT, part) for t in name_prompts.get(f.relation, ())]
        for f in facts
        for part in f.subject.split()
    }
    shortcuts = {text for texts in (*without.values(), *parts.values()) for text in texts}
    tables = _top_tokens(chain, model, sorted(asked | shortcuts), max(top, flag_top if shortcuts else top))
    found = []
    for number, fact in enumerate(facts):
        named = {
            token
            for part in fact.subject.split()
            for text in parts[fact.relation, part]
            for token, _ in tables[text][:flag_top]
        }
        for place, template in enumerate(templates[fact.relation]):
            usual = {token for text in without[fact.relation, place] for token, _ in tables[text][:flag_top]}
            for rank, (token, log_prob) in enumerate(tables[template.replace(SUBJECT, fact.subject)][:top]):
                answer = str(model.tokenizer.decode([token])).strip()
                found.append(
                    Prediction(
                        number,
                        place,
                        rank,
                        token,
                        answer,
                        log_prob,
                        correct=_is_correct(answer, fact.object),
                        string_match=bool(answer) and answer.lower() in fact.subject.lower(),
                        name_bias=token in named,
                        prompt_bias=token in usual,
                    )
                )
    return tuple(found)


def label_scenarios(
    predictions: Sequence[Prediction],
    facts: Sequence[Fact],
    *,
    candidates: Mapping[str, Collection[str]] | None = None,
    recall_count: int = 5,
    guess_count: int = 2,
    heuristics_count: int = 4,
    popularity: float = 1000.0,
) -> tuple[Scenario, ...]:
    r"""The kind of each prediction about facts.

    A prediction's count c is the number of predictions about the same fact with the same answer and surface flag, over
    templates and ranks.

    - *exact fact recall*: correct, c > 5, no shortcut, popular subject;
    - *guesswork*: c < 2, some object of the relation (right or not), unpopular subject;
    - *heuristics recall*: an invented subject, c > 4, and a shortcut explains the answer;
    - *none*: everything else, such as popular subjects whose answer a shortcut explains.

    The counts depend on the number of templates: with six or fewer, only an answer that all of them share can be exact
    recall. Consistency alone is no sign of knowledge, since a model can guess the same thing each time.

    Args:
        predictions: from `fact_predictions`.
        facts: the same facts.
        candidates: by relation, answers that are some object of it; the facts' own objects if None, of which a
            beginning of at least three characters counts.
        recall_count: exact recall needs more.
        guess_count: a guess has fewer.
        heuristics_count: a shortcut on an invented subject counts from more on.
        popularity: exact recall needs more, a guess has less.

    Returns:
        A scenario per prediction.

    Raises:
        InputError: for a prediction about no fact, or a fact given twice.
        RowError: for a real subject without popularity.

    Source: arXiv 2410.14405.
    """
    for number, fact in enumerate(facts):
        if not fact.is_synthetic and (fact.popularity is None or math.isnan(fact.popularity)):
            raise RowError(
                "a real subject needs its popularity, which decides whether it can have been learned: give page views "
                "or training counts",
                row=f"fact {number}",
            )
    known = Counter((fact.relation, fact.subject, fact.object) for fact in facts)
    twice = next((name for name, times in known.items() if times > 1), None)
    if twice is not None:
        raise InputError(f"the fact {twice} is given twice, so that its answers would count twice: give it once")
    outside = next((p.fact for p in predictions if not 0 <= p.fact < len(facts)), None)
    if outside is not None:
        raise InputError(f"a prediction is about fact {outside}, and there are {len(facts)} facts")

    def key(p: Prediction) -> tuple[str, str, str | None, str, bool]:
        fact = facts[p.fact]
        return fact.relation, fact.subject, fact.object, p.answer, p.surface

    counts = Counter(key(p) for p in predictions)
    objects: dict[str, set[str]] = {}
    for fact in facts:
        if fact.object is not None:
            objects.setdefault(fact.relation, set()).add(fact.object)

    def is_candidate(p: Prediction) -> bool:
        relation = facts[p.fact].relation
        if candidates is not None:
            return p.answer in candidates.get(relation, ())
        return any(_is_correct(p.answer, name) for name in objects.get(relation, ()))

    def label(p: Prediction) -> Scenario:
        fact, count = facts[p.fact], counts[key(p)]
        if fact.is_synthetic:
            return Scenario.HEURISTICS if p.surface and count > heuristics_count else Scenario.NONE
        assert fact.popularity is not None
        if p.correct and count > recall_count and not p.surface and fact.popularity > popularity:
            return Scenario.EXACT_RECALL
        if count < guess_count and fact.popularity < popularity and is_candidate(p):
            return Scenario.GUESSWORK
        return Scenario.NONE

    return tuple(label(p) for p in predictions)


@dataclass(frozen=True, slots=True)
class ScenarioShare:
    """Predictions of one kind.

    Args:
        count: how many.
        share: of all predictions.
        accuracy: share of them that are correct, of those about real subjects; None where there are none.
        probability: their mean p(a).
    """

    count: int
    share: float
    accuracy: float | None
    probability: float


def scenario_shares(
    predictions: Sequence[Prediction], labels: Sequence[Scenario], facts: Sequence[Fact]
) -> dict[Scenario, ScenarioShare]:
    """How many predictions are of each kind that occurs, and how often they are right.

    Args:
        predictions: from `fact_predictions`.
        labels: from `label_scenarios`.
        facts: the same facts.

    Raises:
        InputError: for no predictions, or unequal lengths.
    """
    if not predictions or len(predictions) != len(labels):
        raise InputError(f"{len(predictions)} predictions need as many labels and at least one, got {len(labels)}")
    found = {}
    for kind in Scenario:
        own = [p for p, label in zip(predictions, labels, strict=True) if label is kind]
        real = [p.correct for p in own if not facts[p.fact].is_synthetic]
        if own:
            mean = sum(math.exp(p.log_prob) for p in own) / len(own)
            accuracy = sum(real) / len(real) if real else None
            found[kind] = ScenarioShare(len(own), len(own) / len(predictions), accuracy, mean)
    return found


def is_generic_prompt(prompt: str, next_word: str, *, title: str, longest: int = 10, capitals: int = 4) -> bool:
    """Whether a sentence's beginning asks for language alone: *generic language modelling*.

    Args:
        prompt: the beginning, up to `longest` words.
        next_word: what follows in the text; generic if it is in lower case.
        title: of the article; the sentence must begin with one of its words.
        longest: words at most.
        capitals: capital letters must be fewer than this.

    Raises:
        InputError: for an empty prompt or next word.

    Source: arXiv 2410.14405.
    """
    words = prompt.split()
    if not words or not next_word.strip():
        raise InputError("a prompt and the word that follows it must not be empty")
    few = len(words) <= longest and sum(c.isupper() for c in prompt) < capitals
    return few and next_word.strip().islower() and words[0].lower() in title.lower().split()


def _is_correct(answer: str, known: str | None) -> bool:
    return known is not None and len(answer) >= _SHORTEST and known.startswith(answer)


def _check_facts(
    facts: Sequence[Fact], templates: Mapping[str, Sequence[str]], name_prompts: Mapping[str, Sequence[str]]
) -> None:
    for number, fact in enumerate(facts):
        if not fact.subject.strip():
            raise RowError("has no subject: remove it", row=f"fact {number}")
        if not templates.get(fact.relation):
            raise InputError(f"relation {fact.relation!r} of fact {number} has no template: give at least one")
    for texts in (*templates.values(), *name_prompts.values()):
        for text in [texts] if isinstance(texts, str) else texts:
            if isinstance(texts, str) or SUBJECT not in text:
                raise InputError(f"templates must be lists of texts with {SUBJECT} in them, got {text!r}")


def prompt_tokens(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, after BOS where the tokenizer adds it.

    Raises:
        InputError: for a model without a tokenizer.
        RowError: for a prompt without tokens.
    """
    encoder = TextEncoder(getattr(model, "tokenizer", None), layout=getattr(model, "layout", "causal"))
    lead = [encoder.tokenizer.bos_token_id] if encoder.adds_bos else []
    rows = [lead + list(encoder.tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts]
    for number, row in enumerate(rows):
        if not row:
            raise RowError("has no token under this tokenizer: give a longer one", row=f"prompt {number}")
    return rows


def _top_tokens(chain: ChainRule, model: Any, prompts: Sequence[str], count: int) -> dict[str, list[tuple[int, float]]]:
    """The `count` most probable next tokens of each prompt, with their log-probabilities."""
    rows = prompt_tokens(model, prompts)
    found: dict[str, list[tuple[int, float]]] = {}
    for begin in range(0, len(prompts), _ROWS):
        part = rows[begin : begin + _ROWS]
        table = chain.next_log_probs(TokenBatch.from_lists(part, starts=[len(row) for row in part]))
        if count > table.shape[1]:
            raise InputError(f"the vocabulary has {table.shape[1]} tokens, fewer than the {count} that are asked for")
        top = table.topk(count, dim=1)
        for prompt, tokens, values in zip(prompts[begin:], top.indices.tolist(), top.values.tolist(), strict=False):
            found[prompt] = list(zip(tokens, values, strict=True))
    return found
