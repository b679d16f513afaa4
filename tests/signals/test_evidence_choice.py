"""Answers over evidence: Bayes' rule on an enumerated joint, the marginal, and fitted weights out of their fold."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.evidence_choice import EvidenceTable, agreement, choose_answers, cross_fit_product, join
from loglik.signals.reading import EvidencePrompts, decode_answers, score_evidence
from loglik.signals.thinksum import fit_weights


def exact(values) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(len(value), dtype=torch.long))


def table_of(joint: torch.Tensor) -> EvidenceTable:
    """Q questions about the joint log p(q, e, a), every passage and answer for each."""
    questions, passages, answers = joint.shape
    p_qe, p_ea, p_e, p_q = (joint.logsumexp(d) for d in (2, 0, (0, 2), (1, 2)))
    triples = list(product(range(questions), range(passages), range(answers)))

    def factor(value):
        return exact([float(value(q, e, a)) for q, e, a in triples])

    factors = {
        "direct": factor(lambda q, e, a: joint[q, e, a] - p_qe[q, e]),
        "question": factor(lambda q, e, a: joint[q, e, a] - p_ea[e, a]),
        "answer": factor(lambda q, e, a: p_ea[e, a] - p_e[e]),
        "evidence": factor(lambda q, e, a: p_qe[q, e] - p_e[e]),
        "closed": factor(lambda q, e, a: joint.logsumexp(1)[q, a] - p_q[q]),
        "retrieval": factor(lambda q, e, a: p_qe[q, e] - p_q[q]),
    }
    question, passage = (torch.tensor([t[i] for t in triples]) for i in (0, 1))
    retrieval = tuple(p_qe[q] - p_q[q] for q in range(questions))
    return EvidenceTable(factors, question, passage, tuple(f"w{a}" for _, _, a in triples), retrieval)


def joint_of(seed: int) -> torch.Tensor:
    table = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5
    return table - table.logsumexp((0, 1, 2))


@pytest.mark.parametrize("seed", range(5))
def test_choices_on_a_joint(seed):
    joint = joint_of(seed)
    found = choose_answers(table_of(joint))
    conditional = joint - joint.logsumexp(2, keepdim=True)  # log p(a | q, e)
    for q in range(4):
        best = conditional[q].amax(0).argmax()
        assert found["direct"][q] == found["channel"][q] == f"w{best}"  # Bayes' rule
        truth = joint[q].logsumexp(0).argmax()  # p(a | q)
        assert found["rag"][q] == found["closed"][q] == f"w{truth}"
        passage = joint[q].logsumexp(1).argmax()
        assert found["top_passage"][q] == f"w{conditional[q, passage].argmax()}"
    only = choose_answers(table_of(joint), weights={"direct": 1.0})
    assert only["product"] == found["direct"]
    both = choose_answers(table_of(joint), weights={"direct": 1.0, "retrieval": 1.0})["product"]
    assert both == tuple(f"w{joint[q].amax(0).argmax()}" for q in range(4))  # the likeliest pair given the question


def test_one_passage_makes_the_ways_one():
    joint = joint_of(1)[:, :1]
    joint = joint - joint.logsumexp((0, 1, 2))
    found = choose_answers(table_of(joint))
    assert found["direct"] == found["rag"] == found["top_passage"] == found["channel"]


def test_spellings_are_one_answer():
    """Two spellings of .3 each beat one answer of .4 by the sum, not by the maximum."""
    values = torch.tensor([0.3, 0.3, 0.4]).double().log()
    factors = {name: exact(values) for name in ("direct", "question", "answer", "evidence", "closed")}
    factors["retrieval"] = exact(torch.zeros(3))
    zero = torch.zeros(3, dtype=torch.long)
    table = EvidenceTable(factors, zero, zero, ("The Seine", "seine.", "Rhine"), (torch.zeros(1).double(),))
    found = choose_answers(table)
    assert found["rag"] == ("seine",)
    assert found["direct"] == ("rhine",)
    assert choose_answers(table, normalise=str.strip)["rag"] == ("Rhine",)


def test_joined_tables_choose_as_one_by_one():
    parts = [table_of(joint_of(seed)) for seed in (2, 3)]
    whole = choose_answers(join(parts))
    for name, answers in whole.items():
        assert answers == tuple(a for part in parts for a in choose_answers(part)[name])
    assert len(join(parts)) == 8
    table = agreement(whole)
    names = list(whole)
    torch.testing.assert_close(table.diagonal(), torch.ones(len(names)).double())
    i, j = names.index("direct"), names.index("closed")
    share = sum(a == b for a, b in zip(whole["direct"], whole["closed"], strict=True)) / 8
    assert table[i, j].item() == table[j, i].item() == pytest.approx(share)


def fitting_table(count: int, seed: int) -> tuple[EvidenceTable, list[list[str]]]:
    """Two answers per question; factor ``question`` tells the right one, ``direct`` says the opposite half as loud."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (count,), generator=generator)
    sign = torch.where(torch.arange(2)[None] == right[:, None], 1.0, -1.0).double()
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator) * 0.7
    signal = (sign + noise).flatten()
    flat = {name: exact(torch.full((2 * count,), -1.0)) for name in ("answer", "evidence", "closed", "retrieval")}
    factors = flat | {"question": exact(signal - 5), "direct": exact(-1.5 * sign.flatten() - 5)}
    question = torch.arange(count).repeat_interleave(2)
    table = EvidenceTable(
        factors,
        question,
        torch.zeros(2 * count, dtype=torch.long),
        ("w0", "w1") * count,
        tuple(torch.zeros(1).double() for _ in range(count)),
    )
    return table, [[f"w{int(r)}"] for r in right]


def test_weights_come_from_the_other_folds():
    table, gold = fitting_table(30, 0)
    given = choose_answers(table)["product"]
    found = cross_fit_product(table, gold, folds=5, l2=0.01)
    assert sum(a == g[0] for a, g in zip(given, gold, strict=True)) < 12  # unit weights follow the wrong expert
    assert sum(a == g[0] for a, g in zip(found.answers, gold, strict=True)) == 30  # a negative weight turns it round
    assert found.weights["direct"] < 0 < found.weights["question"]
    names = list(found.weights)
    columns = torch.stack([table.factors[name].value for name in names], 1)
    good = torch.tensor([a == gold[n][0] for n, a in zip(table.question.tolist(), table.answers, strict=True)])
    whole = fit_weights(columns, table.question, good, l2=0.01)
    assert list(found.weights.values()) == pytest.approx(whole.tolist())
    # a question's own label does not reach its choice: turning one round changes no choice but by the others' weights
    turned = [["w1" if gold[0] == ["w0"] else "w0"], *gold[1:]]
    assert cross_fit_product(table, turned, folds=30, l2=0.01).answers[0] == gold[0][0]


def test_noise_gives_no_gain_out_of_fold():
    """Labels that nothing predicts: fitted in the sample they would look right more often than half of the time."""
    table, gold = fitting_table(200, 3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = [gold[i] for i in order]
    found = cross_fit_product(table, shuffled, folds=10)
    hits = sum(a == g[0] for a, g in zip(found.answers, shuffled, strict=True))
    assert 70 <= hits <= 130  # 4 standard deviations and a half


# ------------------------------------------------------------------------------------------------------------- scoring
QUESTIONS = ["what is x?", "print"]
PASSAGES = [["x = 1", "y = 2", "z"], ["for i in x:"]]
ANSWERS = [["1", "2"], ["i", "x"]]


def test_factors_are_those_of_the_prompts(tiny):
    similarity = [[0.5, 0.25, 0.25], [2.0]]
    prompts = EvidencePrompts(direct="# {evidence}\n# {question}\n{{}}")
    table = score_evidence(tiny, QUESTIONS, PASSAGES, ANSWERS, similarity=similarity, prompts=prompts)
    triples = [(n, i, e, a) for n in range(2) for i, e in enumerate(PASSAGES[n]) for a in ANSWERS[n]]
    assert table.question.tolist() == [n for n, _, _, _ in triples]
    assert table.passage.tolist() == [i for _, i, _, _ in triples]
    q = QUESTIONS
    wanted = {
        "direct": [(f"# {e}\n# {q[n]}\n{{}}", f" {a}") for n, _, e, a in triples],
        "question": [(f"Evidence: {e}\nAnswer: {a}\nQuestion:", f" {q[n]}") for n, _, e, a in triples],
        "answer": [(f"Evidence: {e}\nAnswer:", f" {a}") for _, _, e, a in triples],
        "evidence": [(f"Evidence: {e}\nQuestion:", f" {q[n]}") for n, _, e, _ in triples],
        "closed": [(f"Question: {q[n]}\nAnswer:", f" {a}") for n, _, _, a in triples],
    }
    for name, pairs in wanted.items():
        torch.testing.assert_close(table.factors[name].value, loglik.score(tiny, pairs).value, atol=1e-4, rtol=0)
    share = [similarity[n][i] / sum(similarity[n]) for n, i, _, _ in triples]
    torch.testing.assert_close(table.factors["retrieval"].value.exp(), torch.tensor(share).double(), atol=1e-8, rtol=0)
    equal = score_evidence(tiny, QUESTIONS, PASSAGES, ANSWERS)
    torch.testing.assert_close(equal.retrieval[0].exp(), torch.full((3,), 1 / 3).double())


def test_decoded_answers_are_greedy_lines(tiny):
    prompts = EvidencePrompts(direct="{evidence}\n{question}")
    found = decode_answers(tiny, ["for i in range("], [["import os", "import sys"]], prompts=prompts, max_tokens=5)
    assert 1 <= len(found[0]) <= 2
    prompt = "import os\nfor i in range("
    text = prompt
    for _ in range(5):
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = loglik.TokenBatch.from_lists([[tiny.tokenizer.bos_token_id, *ids]], starts=[len(ids) + 1])
        text = tiny.tokenizer.decode([*ids, int(tiny.next_log_probs(batch).argmax())])
    assert text[len(prompt) :].strip().split("\n")[0].strip() == found[0][0]


# ------------------------------------------------------------------------------------------------------------ refusals
def small() -> EvidenceTable:
    return table_of(joint_of(0))


REFUSED = [
    (lambda: EvidencePrompts(direct="{evidence}"), "the prompt 'direct' must name {evidence} and {question}"),
    (lambda: EvidencePrompts(answer="{evidence} {answer}"), "the prompt 'answer' must name {evidence} and nothing"),
    (lambda: EvidencePrompts(closed="{question"), "the prompt 'closed' is no text with"),
    (lambda: EvidencePrompts(closed=3), "the prompt 'closed' is no text with"),
    (lambda: score_evidence(None, ["q"], [[]], [["a"]]), "question 0: has no passages"),
    (lambda: score_evidence(None, ["q"], [["e"]], [[]]), "question 0: has no answers"),
    (lambda: score_evidence(None, ["q"], [["e"]], [[" "]]), "question 0: answer 0 must be a text that is not empty"),
    (lambda: score_evidence(None, ["q"], [["e"]], []), "questions and lists of answers must pair: got 1 and 0"),
    (lambda: score_evidence(None, [""], [["e"]], [["a"]]), "question 0: is empty"),
    (
        lambda: score_evidence(None, ["q"], [["e"]], [["a"]], similarity=[[1.0, 2.0]]),
        "question 0: has 1 passages and 2 similarities",
    ),
    (
        lambda: score_evidence(None, ["q"], [["e"]], [["a"]], similarity=[[float("nan")]]),
        "question 0: similarity must be a row of finite numbers",
    ),
    (lambda: decode_answers(None, ["q"], [["e"]], max_tokens=0), "max_tokens must be at least 1"),
    (lambda: decode_answers(object(), ["q"], [["e"]]), "decoding answers needs per-token conditionals"),
    (lambda: join([]), "there are no tables to join"),
    (lambda: choose_answers(small(), weights={"other": 1.0}), "weights name 'other', which is no factor"),
    (lambda: choose_answers(small(), weights={}), "at least one factor with a weight other than 0"),
    (
        lambda: choose_answers(small(), normalise=lambda text: ""),
        "question 0: normalising leaves nothing of the answer",
    ),
    (lambda: agreement({"a": ["x"], "b": []}), "the same questions for each score"),
    (lambda: agreement({}), "the same questions for each score"),
    (lambda: cross_fit_product(small(), [["w0"]]), "the right answers of each question: got 1 for 4"),
    (lambda: cross_fit_product(small(), [["w0"]] * 4, folds=5), "folds must be from 2 to the number of questions, 4"),
    (lambda: cross_fit_product(small(), [["w0"]] * 4, folds=1), "folds must be from 2"),
    (lambda: cross_fit_product(small(), [["w0"]] * 4, folds=2, experts=["no"]), "experts must be some of"),
    (lambda: cross_fit_product(small(), [["none"]] * 4, folds=2), "weights need questions with a right candidate"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError)) as refused:
        call()
    assert message in str(refused.value)


def test_impossible_answers():
    table = small()
    factors = dict(table.factors)
    value = factors["direct"].value.clone()
    value[table.question == 2] = -torch.inf
    factors["direct"] = exact(value)
    broken = EvidenceTable(factors, table.question, table.passage, table.answers, table.retrieval)
    with pytest.raises(RowError, match="question 2: no answer has a probability above 0"):
        choose_answers(broken)
