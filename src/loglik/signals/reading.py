"""Reading evidence with a text model: candidate answers, and their likelihoods in all directions (arXiv 2203.05115)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.likelihood import LogLikelihood
from loglik.models.protocol import ChainRule, TextModel, require
from loglik.scoring.score import score
from loglik.scoring.windows import OverflowPolicy
from loglik.signals.drawing import as_text, greedy_completions, prompt_tokens
from loglik.signals.evidence import retrieval_log_probs
from loglik.signals.evidence_choice import EvidenceTable
from loglik.signals.texts import require_text_lists

__all__ = ["EvidencePrompts", "decode_answers", "score_evidence"]


@dataclass(frozen=True, slots=True)
class EvidencePrompts:
    """What stands before the text that is scored; ``{evidence}``, ``{question}`` and ``{answer}`` are filled in.

    Few-shot examples go in front of each. What is scored follows after a blank.

    Args:
        direct: before the answer, of p(answer | question, evidence).
        question: before the question, of p(question | answer, evidence).
        answer: before the answer, of p(answer | evidence).
        evidence: before the question, of p(question | evidence).
        closed: before the answer, without evidence.

    Raises:
        InputError: for a text that names anything else, or names what it scores.
    """

    direct: str = "Evidence: {evidence}\nQuestion: {question}\nAnswer:"
    question: str = "Evidence: {evidence}\nAnswer: {answer}\nQuestion:"
    answer: str = "Evidence: {evidence}\nAnswer:"
    evidence: str = "Evidence: {evidence}\nQuestion:"
    closed: str = "Question: {question}\nAnswer:"

    def __post_init__(self) -> None:
        known = {
            "direct": {"evidence", "question"},
            "question": {"evidence", "answer"},
            "answer": {"evidence"},
            "evidence": {"evidence"},
            "closed": {"question"},
        }
        for field in fields(self):
            text, allowed = getattr(self, field.name), known[field.name]
            try:
                named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            except (ValueError, TypeError):
                raise InputError(
                    f"the prompt {field.name!r} is no text with {{names}}: double its other braces"
                ) from None
            if named != allowed:
                wanted = " and ".join(f"{{{name}}}" for name in sorted(allowed))
                raise InputError(f"the prompt {field.name!r} must name {wanted} and nothing else, got {text!r}")


def score_evidence(
    model: TextModel,
    questions: Sequence[str],
    passages: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    *,
    similarity: Sequence[Sequence[float]] | None = None,
    temperature: float | None = None,
    prompts: EvidencePrompts | None = None,
    overflow: OverflowPolicy = "error",
) -> EvidenceTable:
    """Score every candidate answer with every passage of its question, in all directions.

    Args:
        model: from `loglik.load`, or any text model.
        questions: Q texts.
        passages: of each question, at least one.
        answers: the candidates of each question, at least one.
        similarity: of each passage to its question, such as TF-IDF cosines; equal by default.
        temperature: of `retrieval_log_probs`.
        prompts: what stands before each scored text.
        overflow: a prompt longer than the context is an error, or is read in windows.

    Raises:
        InputError: for numbers that do not pair, or a model without a tokenizer.
        RowError: naming the question with something empty, with similarities that give no distribution, or with a
            text that cannot be scored.

    Source: arXiv 2203.05115.
    """
    require_text_lists(questions, passages, head="question", item="passage")
    require_text_lists(questions, answers, head="question", item="answer")
    shown = prompts or EvidencePrompts()
    retrieval = []
    for number, texts in enumerate(passages):
        given = [1.0] * len(texts) if similarity is None else similarity[number]
        if len(given) != len(texts):
            raise RowError(f"has {len(texts)} passages and {len(given)} similarities", row=f"question {number}")
        try:
            retrieval.append(retrieval_log_probs(torch.tensor(given, dtype=torch.float64), temperature=temperature))
        except InputError as error:
            raise RowError(str(error), row=f"question {number}") from None
    triples = [(n, i, e, a) for n in range(len(questions)) for i, e in enumerate(passages[n]) for a in answers[n]]

    def scored(template: str, what: str) -> LogLikelihood:
        pairs = []
        for n, _, e, a in triples:
            target = questions[n] if what == "question" else a
            names = {"evidence": e, "question": questions[n], "answer": a}
            pairs.append((template.format(**names), " " + target))
        try:
            return score(model, pairs, overflow=overflow)
        except RowError as error:
            n, i, _, a = triples[int((error.row or "row 0").split()[-1])]
            raise error.at(f"question {n}, passage {i}, answer {a!r}") from None

    factors = {
        "direct": scored(shown.direct, "answer"),
        "question": scored(shown.question, "question"),
        "answer": scored(shown.answer, "answer"),
        "evidence": scored(shown.evidence, "question"),
        "closed": scored(shown.closed, "answer"),
    }
    share = torch.stack([retrieval[n][i] for n, i, _, _ in triples])
    factors["retrieval"] = LogLikelihood(share, Kind.EXACT, factors["direct"].unit, torch.ones_like(share).long())
    return EvidenceTable(
        factors,
        torch.tensor([n for n, _, _, _ in triples]),
        torch.tensor([i for _, i, _, _ in triples]),
        tuple(a for _, _, _, a in triples),
        tuple(retrieval),
    )


def decode_answers(
    model: TextModel,
    questions: Sequence[str],
    passages: Sequence[Sequence[str]],
    *,
    prompts: EvidencePrompts | None = None,
    max_tokens: int = 32,
) -> list[list[str]]:
    """Candidate answers of each question: the greedy answer to each passage up to its first line break, each once.

    Args:
        model: with next-token probabilities.
        questions: Q texts.
        passages: of each question, at least one.
        prompts: `EvidencePrompts.direct` is what the answer follows.
        max_tokens: of an answer.

    Raises:
        InputError: for a model that cannot be decoded, or numbers that do not pair.
        RowError: for a question to which every answer is empty.

    Source: arXiv 2203.05115.
    """
    require_text_lists(questions, passages, head="question", item="passage")
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    chain = require(model, ChainRule, "decoding answers")  # type: ignore[type-abstract]
    template = (prompts or EvidencePrompts()).direct
    found = []
    for number, (question, texts) in enumerate(zip(questions, passages, strict=True)):
        read = prompt_tokens(model, [template.format(evidence=text, question=question) for text in texts])
        if model.max_length is not None and read.ids.shape[1] + max_tokens > model.max_length:
            raise RowError(
                f"its longest prompt and {max_tokens} tokens exceed the context of {model.max_length}: shorten it",
                row=f"question {number}",
            )
        done = greedy_completions(chain, read, max_tokens=max_tokens)
        scored = done.scored_mask & done.attention_mask
        decoded = [as_text(model.tokenizer, ids[mask].tolist()) for ids, mask in zip(done.ids, scored, strict=True)]
        lines = [text.strip().split("\n")[0].strip() for text in decoded]
        answers = list(dict.fromkeys(line for line in lines if line))
        if not answers:
            raise RowError("the model answers with nothing: give candidate answers", row=f"question {number}")
        found.append(answers)
    return found
