"""Choices against Bayes' rule on enumerated joints, hand computations, and scores of texts by transformers."""

from __future__ import annotations

import math

import pytest
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.choice import choose, contextual_calibration, normalised_score, score_options


def exact(values, units=None, *, kind=Kind.EXACT, unit=Unit.TOKEN, **more) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    counts = torch.ones(len(value), dtype=torch.long) if units is None else torch.as_tensor(units)
    return LogLikelihood(value, kind, unit, counts, **more)


def joint(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """log p(q, c) of a random table."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * 1.5
    return table - table.logsumexp((0, 1))


def paired(table: torch.Tensor):
    """log p(c | q), log p(c) and the question of every cell, flat."""
    conditional = table - table.logsumexp(1, keepdim=True)
    prior = table.logsumexp(0).expand_as(table)
    question = torch.arange(len(table)).repeat_interleave(table.shape[1])
    return exact(conditional.flatten()), exact(prior.flatten()), question


# ---------------------------------------------------------------------------------------------------- exact relations
@pytest.mark.parametrize("seed", range(5))
def test_the_prior_turns_the_likelihood_of_the_option_into_that_of_the_question(seed):
    """log p(c|q) - log p(c) = log p(q|c) - log p(q): the choice is the option under which the question is likeliest."""
    table = joint(6, 4, seed)
    likelihood, prior, question = paired(table)
    found = normalised_score(likelihood, prior=prior).value.reshape(6, 4)
    query = table - table.logsumexp(0)  # log p(q | c)
    torch.testing.assert_close(found, query - table.logsumexp(1, keepdim=True), atol=1e-12, rtol=0)
    got = choose(likelihood, question, prior=prior)
    assert got.choice.equal(query.argmax(1))
    assert choose(likelihood, question).choice.equal(table.argmax(1))  # without it: the posterior


def test_alpha_goes_from_the_likelihood_to_pointwise_mutual_information():
    likelihood, prior, question = paired(joint(5, 3))
    assert choose(likelihood, question, prior=prior, alpha=0.0).scores.equal(choose(likelihood, question).scores)
    half = normalised_score(likelihood, prior=prior, alpha=0.5).value
    torch.testing.assert_close(half, likelihood.value - 0.5 * prior.value, atol=1e-15, rtol=0)
    moved = exact(prior.value + 3.0)  # the same for all candidates: no choice may change
    torch.testing.assert_close(
        choose(likelihood, question, prior=moved).log_probs, choose(likelihood, question, prior=prior).log_probs
    )


def test_normalisations_by_hand():
    """The four normalisations give three different winners on one question."""
    likelihood = exact([-3.0, -4.0, -6.0], [1, 4, 3])
    lengths = {"byte": torch.tensor([4, 4, 24]), "character": torch.tensor([2, 3, 6])}
    question = torch.zeros(3, dtype=torch.long)
    wanted = {
        "sum": [-3.0, -4.0, -6.0],
        "token": [-3.0, -1.0, -2.0],
        "byte": [-0.75, -1.0, -0.25],
        "character": [-1.5, -4 / 3, -1.0],
    }
    for name, scores in wanted.items():
        got = choose(likelihood, question, normalise=name, lengths=lengths.get(name))
        expected = torch.tensor(scores, dtype=torch.float64)
        torch.testing.assert_close(got.scores[0], expected)
        torch.testing.assert_close(got.log_probs[0], expected.log_softmax(0))
        assert got.choice.item() == int(expected.argmax())
        top = sorted(scores)
        assert got.margin.item() == pytest.approx(top[-1] - top[-2])
    by_bytes = exact([-3.0, -4.0], [4, 16], unit=Unit.BYTE)
    torch.testing.assert_close(
        normalised_score(by_bytes, normalise="byte").value, torch.tensor([-0.75, -0.25]).double()
    )
    with_prior = normalised_score(
        likelihood, normalise="token", prior=exact([-1.0, -2.0, -4.5], [1, 4, 3]), alpha=0.5
    ).value
    torch.testing.assert_close(with_prior, torch.tensor([-2.5, -0.75, -1.25]).double())
    lengthened = normalised_score(
        likelihood, normalise="character", lengths=lengths["character"], prior=exact([-1.0, -1.0, 0.0], [1, 4, 3])
    ).value
    torch.testing.assert_close(lengthened, torch.tensor([-1.0, -1.0, -1.0]).double())


def test_questions_of_different_sizes_in_any_order():
    """Rows may be shuffled: choices do not change, and options keep the order of their rows."""
    values, question = [-1.0, -2.0, -3.0, -0.5, -0.1, -4.0, -5.0], torch.tensor([7, 7, 3, 3, 3, 9, 9])
    got = choose(exact(values), question)
    assert got.question.tolist() == [3, 7, 9]
    assert got.mask.tolist() == [[True, True, True], [True, True, False], [True, True, False]]
    assert got.rows.tolist() == [[2, 3, 4], [0, 1, 0], [5, 6, 0]]
    assert got.choice.tolist() == [2, 0, 0]
    torch.testing.assert_close(got.log_probs.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert bool(torch.isneginf(got.log_probs[~got.mask]).all())
    torch.testing.assert_close(got.margin.value, torch.tensor([0.4, 1.0, 1.0]).double())
    shuffled = torch.tensor([4, 0, 2, 6, 1, 3, 5])
    other = choose(exact([values[i] for i in shuffled]), question[shuffled])
    assert [shuffled[other.rows[q, k]].item() for q, k in enumerate(other.choice)] == [4, 0, 5]
    torch.testing.assert_close(other.margin.value, got.margin.value)
    assert len(got) == 3


def test_ties_go_to_the_first_option_and_say_so():
    got = choose(exact([-2.0, -1.0, -1.0]), [0, 0, 0])
    assert got.choice.tolist() == [1]
    assert got.margin.item() == 0.0


def test_an_impossible_option_is_never_chosen_and_gives_no_nan():
    got = choose(exact([-math.inf, -1.0, -math.inf]), [0, 0, 0])
    assert got.log_probs.tolist() == [[-math.inf, 0.0, -math.inf]]
    assert got.margin.item() == math.inf
    with_prior = choose(exact([-math.inf, -1.0, -2.0]), [0, 0, 0], prior=exact([-1.0, -1.0, -3.0]))
    assert with_prior.choice.tolist() == [2]


def test_temperature_sharpens_and_keeps_the_choice():
    values = [-1.0, -2.0, -1.5]
    got = choose(exact(values), [0, 0, 0], temperature=0.5)
    torch.testing.assert_close(got.log_probs[0], (torch.tensor(values).double() / 0.5).log_softmax(0))
    assert got.scores[0].tolist() == values


# ------------------------------------------------------------------------------------------------------------- labels
def test_kinds_of_the_margin():
    question = [0, 0]
    assert choose(exact([-1.0, -2.0]), question).kind is Kind.EXACT
    assert choose(exact([-1.0, -2.0], kind=Kind.LOWER_BOUND), question).kind is Kind.SURROGATE
    assert choose(exact([-1.0, -2.0], kind=Kind.ESTIMATE), question).margin.kind is Kind.ESTIMATE
    energy = exact([-1.0, -2.0], kind=Kind.UNNORMALIZED, constant=ConstantKey.of("Z"))
    assert choose(energy, question).kind is Kind.EXACT  # the constant cancels between options
    uneven = exact([-1.0, -2.0], [1, 2], kind=Kind.UNNORMALIZED, constant=ConstantKey.of("Z"))
    assert choose(uneven, question, normalise="token").kind is Kind.SURROGATE


def test_standard_errors_of_the_margin_follow_the_draws():
    """Independent rows add in quadrature; rows that share their draws are compared draw by draw."""
    apart = exact([-1.0, -2.0], kind=Kind.ESTIMATE, stderr=torch.tensor([0.3, 0.4]).double())
    assert choose(apart, [0, 0]).margin.stderr.item() == pytest.approx(0.5)
    samples = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = LogLikelihood.from_samples(
        samples,
        kind=Kind.ESTIMATE,
        unit=Unit.TOKEN,
        num_units=torch.ones(2),
        draws=DrawsKey.of("a", shared_by_rows=True),
    )
    got = choose(shared, [0, 0]).margin.stderr.item()
    assert got == pytest.approx((samples[:, 0] - samples[:, 1]).std().item() / math.sqrt(50))


def test_gradients_reach_the_options():
    value = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.5], dtype=torch.float64, requires_grad=True)
    got = choose(LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(5)), [0, 0, 0, 1, 1])
    got.log_probs[0, 0].backward()
    p = torch.tensor([-1.0, -2.0, -3.0]).double().softmax(0)
    wanted = torch.cat([torch.tensor([1.0, 0.0, 0.0]).double() - p, torch.zeros(2).double()])
    torch.testing.assert_close(value.grad, wanted)


# ---------------------------------------------------------------------------------------------- contextual calibration
def test_contextual_calibration_divides_by_the_content_free_answer():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]).double()
    free = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]).double()
    weighed = p / free.mean(0)
    got = contextual_calibration(p.log() + torch.tensor([[2.0], [-5.0]]), free.log() + 1.0)
    torch.testing.assert_close(got.exp(), weighed / weighed.sum(1, keepdim=True))
    one = contextual_calibration(p.log(), free[:1].log())
    flat = exact(p.log().flatten())
    same = choose(flat, [0, 0, 0, 1, 1, 1], prior=exact(free[0].log().repeat(2)))
    torch.testing.assert_close(one, same.log_probs)
    torch.testing.assert_close(
        contextual_calibration(p[:1].log(), p[:1].log()).exp(), torch.full((1, 3), 1 / 3).double()
    )


# -------------------------------------------------------------------------------------------------------------- texts
@pytest.fixture(scope="module")
def tiny():
    return loglik.load("tiny")


QUESTIONS = ["def add(a, b):\n    return", "for line in"]
OPTIONS = [["a + b", "None", "banana é"], ["file:", "range(10):"]]


def test_options_of_texts_equal_hand_scored_pairs(tiny):
    """Sums and means by transformers' own logits, one pair at a time."""
    rows = score_options(tiny, QUESTIONS, OPTIONS, premise="#")

    def by_hand(prompt: str, text: str) -> list[float]:
        before, full = (tiny.tokenizer(t)["input_ids"] for t in (prompt, prompt + " " + text))
        assert full[: len(before)] == before
        ids = full  # a prompt stands before them, so BOS is not needed
        with torch.no_grad():
            log_p = tiny.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [log_p[t - 1, ids[t]].item() for t in range(len(before), len(ids))]

    flat = [(q, o) for q, texts in zip(QUESTIONS, OPTIONS, strict=True) for o in texts]
    terms = [by_hand(q, o) for q, o in flat]
    prior = [by_hand("#", o) for _, o in flat]
    sums = torch.tensor([sum(t) for t in terms], dtype=torch.float64)
    torch.testing.assert_close(rows.likelihood.value, sums, atol=1e-4, rtol=0)
    assert rows.question.tolist() == [0, 0, 0, 1, 1]
    assert rows.num_bytes.tolist() == [5, 4, 9, 5, 10]
    assert rows.num_characters.tolist() == [5, 4, 8, 5, 10]
    got = rows.choose(normalise="token", alpha=0.7)
    wanted = torch.tensor([(sum(t) - 0.7 * sum(b)) / len(t) for t, b in zip(terms, prior, strict=True)])
    torch.testing.assert_close(got.scores[got.mask], wanted.double(), atol=1e-4, rtol=0)
    by_byte = rows.choose(normalise="byte", alpha=0.0)
    torch.testing.assert_close(by_byte.scores[by_byte.mask], sums / rows.num_bytes, atol=1e-4, rtol=0)
    assert rows.choose(alpha=0).choice[0].item() == 0  # a + b


def test_the_prior_does_not_see_the_question(tiny):
    one = score_options(tiny, QUESTIONS, OPTIONS, premise="")
    two = score_options(tiny, ["print(", "while"], OPTIONS, premise="")
    assert one.prior.value.equal(two.prior.value)
    each = score_options(tiny, QUESTIONS, OPTIONS, premise=["#", "#"])
    assert each.prior.value.equal(score_options(tiny, QUESTIONS, OPTIONS, premise="#").prior.value)
    assert score_options(tiny, QUESTIONS, OPTIONS).prior is None


def test_exact_boundaries_are_counted_per_byte(tiny):
    rows = score_options(tiny, QUESTIONS[:1], [["a", "b"]], boundary="exact")
    assert rows.likelihood.unit is Unit.BYTE
    got = rows.choose(normalise="byte")
    torch.testing.assert_close(got.scores[0], rows.likelihood.value / rows.num_bytes)


# ------------------------------------------------------------------------------------------------------------ refusals
LL = exact([-1.0, -2.0], [2, 2])
REFUSED = [
    (lambda: choose(LL, [0, 0], normalise="words"), "normalise must be one of sum, token, byte, character"),
    (lambda: choose(LL, [0, 0], prior=LL, alpha=math.nan), "alpha must be a finite number, got nan"),
    (lambda: choose(LL, [0, 0], alpha=True), "alpha must be a finite number"),
    (lambda: choose(LL, [0, 0], temperature=0), "temperature must be positive and finite, got 0"),
    (lambda: choose(LL, [0, 1]), "question 0: has one option"),
    (lambda: choose(LL, [0]), r"question must be 2 whole numbers, one per option, got \(1,\)"),
    (lambda: choose(LL, torch.zeros(2)), "question must be 2 whole numbers"),
    (lambda: choose(LL[[]], torch.zeros(0, dtype=torch.long)), "there is nothing to choose"),
    (lambda: choose(exact([math.nan, -1.0]), [0, 0]), "row 0: the likelihood is nan"),
    (lambda: choose(exact([-1.0, math.inf]), [0, 0]), "row 1: the likelihood is inf"),
    (lambda: choose(LL, [0, 0], prior=exact([-1.0, math.nan], [2, 2])), "row 1: the prior is nan"),
    (lambda: choose(LL, [0, 0], prior=exact([-1.0, -math.inf], [2, 2])), "row 1: the prior of the option is 0"),
    (lambda: choose(LL, [0, 0], prior=exact([-1.0], [2])), "a row per option and its unit: got 1 rows per token for 2"),
    (lambda: choose(LL, [0, 0], prior=exact([-1.0, -1.0], [2, 2], unit=Unit.BYTE)), "got 2 rows per byte for 2"),
    (lambda: choose(LL, [0, 0], prior=exact([-1.0, -1.0], [2, 1])), "row 1: the prior scores 1 tokens .* likelihood 2"),
    (lambda: choose(exact([-math.inf, -math.inf]), [4, 4]), "question 4: gives every option probability 0"),
    (lambda: choose(LL, [0, 0], normalise="byte"), "normalise=byte needs lengths"),
    (lambda: choose(exact([-1.0, -2.0], unit=Unit.BYTE), [0, 0], normalise="character"), "normalise=character needs"),
    (
        lambda: choose(exact([-1.0, -2.0], unit=Unit.BYTE), [0, 0], normalise="token"),
        "counted per token, and this one is",
    ),
    (
        lambda: choose(LL, [0, 0], normalise="byte", lengths=torch.ones(3)),
        r"lengths must have shape \(2,\), got \(3,\)",
    ),
    (
        lambda: choose(LL, [0, 0], normalise="byte", lengths=torch.tensor([1, 0])),
        "row 1: the option has no scored byte",
    ),
    (lambda: choose(exact([-1.0, 0.0], [1, 0]), [0, 0], normalise="token"), "row 1: the option has no scored token"),
    (lambda: contextual_calibration(torch.zeros(2, 3), torch.zeros(1, 2)), "must have the same labels"),
    (lambda: contextual_calibration(torch.zeros(2, 3), torch.zeros(0, 3)), "content_free must have rows"),
    (lambda: contextual_calibration(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2)), "log_probs must have rows"),
    (
        lambda: contextual_calibration(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])),
        "label 1 has probability 0 under every content-free input",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()


@pytest.mark.parametrize(
    ("questions", "options", "more", "message"),
    [
        ("one", [["a", "b"]], {}, "must be sequences that pair"),
        (["q"], [["a", "b"], ["c", "d"]], {}, "got 1 and 2"),
        ([], [], {}, "got 0 and 0"),
        (["q"], [["a"]], {}, "question 0: needs a list of at least two options"),
        (["q"], ["ab"], {}, "question 0: needs a list of at least two options"),
        (["q"], [["a", " "]], {}, "question 0: option 1 must be a text that is not empty, got ' '"),
        (["q"], [["a", None]], {}, "option 1 must be a text that is not empty, got None"),
        (["q"], [["a", "b"]], {"premise": ["x", "y"]}, "premise must be one text or one per question: got 2 for 1"),
    ],
)
def test_bad_texts_are_refused(tiny, questions, options, more, message):
    with pytest.raises((InputError, RowError), match=message):
        score_options(tiny, questions, options, **more)
