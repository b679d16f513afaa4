"""Forced yes/no answers: sums over forms, temperature, equality of texts and tokens, and bias reports by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.signals.binary_decisions import (
    BinaryProbability,
    binary_answers,
    binary_probability,
    draw_answer_lists,
    score_forms,
)
from loglik.signals.choice import contextual_calibration
from loglik.signals.detection import auroc
from loglik.signals.label_bias import label_bias


class Table:
    """Next-token log-probabilities that do not depend on the prefix."""

    def __init__(self, rows) -> None:
        self.rows = torch.as_tensor(rows, dtype=torch.float64).log_softmax(-1)

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        return self.rows[: len(prefix)]


PREFIX = TokenBatch.from_lists([[0], [0]])


def test_binary_probability_sums_over_forms():
    p = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0.05, 0.05, 0.8, 0.1]])
    got = binary_probability(Table(p.log()), PREFIX, yes=[0, 1, 1], no=[2])
    torch.testing.assert_close(got.probability, torch.tensor([0.5, 1 / 9]).double())
    torch.testing.assert_close(got.coverage, torch.tensor([0.6, 0.9]).double())
    torch.testing.assert_close(got.logit, (got.probability / (1 - got.probability)).log())
    wanted = [scipy.stats.entropy([q, 1 - q], [0.5, 0.5]) for q in got.probability.tolist()]
    torch.testing.assert_close(got.divergence, torch.tensor(wanted).double())


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 8.0])
def test_the_logit_times_the_temperature_is_constant_for_two_tokens(temperature):
    model = Table(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    cold, one = (binary_probability(model, PREFIX, [1], [3], temperature=t) for t in (temperature, 1.0))
    torch.testing.assert_close(cold.logit * temperature, one.logit, atol=1e-6, rtol=0)


def test_certain_answers_have_no_nan():
    got = binary_probability(Table([[0.0, -math.inf, 0.0]]), PREFIX, [0], [1])
    assert got.probability.tolist() == [1.0]
    assert got.divergence.item() == pytest.approx(math.log(2))


# ---------------------------------------------------------------------------------------------------------- whole words
def labelled(values, kind: Kind = Kind.EXACT, **more) -> LogLikelihood:
    flat = torch.as_tensor(values, dtype=torch.float64).flatten()
    return LogLikelihood(flat, kind, Unit.TOKEN, torch.ones(len(flat)), **more)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forms_of_one_token_are_the_next_token(temperature):
    model = Table(torch.randn(2, 7, generator=torch.Generator().manual_seed(0)))
    token = binary_probability(model, PREFIX, [1, 4], [3], temperature=temperature)
    forms = labelled(model.rows[:, [1, 4, 3]])
    words = binary_answers(forms, [True, True, False], temperature=temperature)
    torch.testing.assert_close(words.probability, token.probability)
    torch.testing.assert_close(words.logit, token.logit)
    torch.testing.assert_close(words.divergence, token.divergence)
    one = binary_probability(model, PREFIX, [1, 4], [3])
    torch.testing.assert_close(words.coverage, one.coverage)
    mixed = binary_answers(labelled(model.rows[:, [3, 1, 4]]), [False, True, True], temperature=temperature)
    torch.testing.assert_close(mixed.probability, token.probability)
    assert words.kind is Kind.EXACT
    assert binary_answers(labelled([-1.0, -2.0], Kind.LOWER_BOUND), [True, False]).kind is Kind.SURROGATE


def test_forms_are_scored_after_each_prompt(tiny):
    prompts = ["x = 1 == 1\nx is", "y = 1 == 2\ny is"]
    found = score_forms(tiny, prompts, ["True", "true"], ["False"])
    wanted = loglik.score(tiny, [(p, " " + form) for p in prompts for form in ("True", "true", "False")])
    torch.testing.assert_close(found.value, wanted.value)
    got = binary_answers(found, [True, True, False])
    p = wanted.value.reshape(2, 3).exp()
    torch.testing.assert_close(got.probability, (p[:, 0] + p[:, 1]) / p.sum(1))
    torch.testing.assert_close(got.coverage, p.sum(1))


def test_drawn_lists_have_the_exact_joint_distribution(tiny):
    """Two answers, 4000 lists: each of the four lists as often as the product of its conditionals says."""
    options = {"yes": ["True"], "no": ["False"], "separator": " ", "between": ", "}
    lists = draw_answer_lists(tiny, "flags =", num_lists=4000, length=2, seed=1, **options)
    forms = {1: "True", 0: "False"}

    def chance(prompt: str, separator: str) -> float:
        found = score_forms(tiny, [prompt], ["True"], ["False"], separator=separator)
        return float(binary_answers(found, [True, False]).probability)

    first = chance("flags =", " ")
    total = 0.0
    for a, b in itertools.product((0, 1), repeat=2):
        second = chance(f"flags = {forms[a]}", ", ")
        joint = (first if a else 1 - first) * (second if b else 1 - second)
        seen = float(((lists[:, 0] == a) & (lists[:, 1] == b)).double().mean())
        assert abs(seen - joint) < 4 * math.sqrt(joint * (1 - joint) / 4000)
        total += joint
    assert total == pytest.approx(1)
    assert lists.equal(draw_answer_lists(tiny, "flags =", num_lists=4000, length=2, seed=1, **options))
    cold = draw_answer_lists(tiny, "flags =", num_lists=50, length=1, temperature=1e-3, **options)
    assert set(cold.flatten().tolist()) == {int(first > 0.5)}


def test_answers_are_written_after_each_other(monkeypatch):
    seen = []

    def even(model, pairs):
        seen.append(sorted(pairs))
        return labelled([-0.7] * len(pairs))

    monkeypatch.setattr("loglik.signals.binary_decisions.score", even)
    lists = draw_answer_lists(None, "List:", ["Y", "y"], ["N"], num_lists=40, length=3, separator=" ", between="; ")
    assert seen[0] == sorted(("List:", f" {form}") for form in "YyN")
    assert seen[1] == sorted((f"List: {a}", f"; {form}") for a in "YN" for form in "YyN")
    assert seen[2] == sorted((f"List: {a}; {b}", f"; {form}") for a in "YN" for b in "YN" for form in "YyN")
    assert lists.shape == (40, 3)
    assert abs(float(lists.double().mean()) - 2 / 3) < 4 * math.sqrt(2 / 9 / 120)


# ----------------------------------------------------------------------------------------------------------- label bias
def answers(logit) -> BinaryProbability:
    odds = torch.as_tensor(logit, dtype=torch.float64)
    return BinaryProbability(odds.sigmoid(), odds, torch.full_like(odds, 0.95), torch.zeros_like(odds))


def test_the_report_counts_by_hand():
    gold = [True, True, False, False, False]
    got = label_bias(answers([3.0, 1.0, 2.0, 0.5, -1.0]), gold)
    assert got.raw.share == 0.8
    assert got.raw.imbalance == pytest.approx(0.8 - 0.4)
    assert got.raw.accuracy == pytest.approx(0.6)
    assert (got.raw.right_yes, got.raw.right_no) == (1.0, pytest.approx(1 / 3))
    assert got.raw.p_value == pytest.approx(scipy.stats.binomtest(2, 2).pvalue)
    assert got.raw.mean == pytest.approx(np.mean(1 / (1 + np.exp(-np.array([3.0, 1.0, 2.0, 0.5, -1.0])))))
    assert got.auroc == pytest.approx(auroc([3.0, 1.0, 2.0, 0.5, -1.0], gold))
    assert (got.coverage, got.low_coverage, got.gold_share) == (pytest.approx(0.95), 0.0, 0.4)


def test_calibration_is_that_of_choices():
    odds = torch.tensor([2.0, 1.0, 3.0, 0.2]).double()
    two = torch.nn.functional.logsigmoid(torch.stack([-odds, odds], 1))
    batch = label_bias(answers(odds))
    assert batch.calibration == "batch"
    torch.testing.assert_close(batch.calibrated.probability, contextual_calibration(two, two)[:, 1].exp())
    assert batch.prior == pytest.approx(float(odds.sigmoid().mean()))
    free = label_bias(answers(odds), content_free=answers([1.5]))
    assert free.calibration == "content-free"
    torch.testing.assert_close(free.calibrated.probability, (odds - 1.5).sigmoid())  # of one: a shift of the log-odds
    assert free.calibrated.share == 0.5


def test_a_planted_shift_is_found_and_taken_out():
    """Log-odds shifted by 2 nats: too many wrong yes; a content-free prompt with that shift mends it."""
    generator = np.random.default_rng(0)
    gold = generator.random(400) < 0.5
    odds = np.where(gold, 1.0, -1.0) + generator.normal(size=400)
    got = label_bias(answers(odds + 2), gold.tolist(), content_free=answers([2.0]))
    assert got.raw.imbalance > 0.25
    assert got.raw.p_value < 1e-20
    assert got.calibrated.p_value > 0.01
    assert abs(got.calibrated.imbalance) < 0.06
    assert got.calibrated.accuracy > got.raw.accuracy + 0.1
    assert got.auroc == pytest.approx(auroc(odds, gold))


def test_batch_calibration_adds_a_bias_where_yes_is_rarely_right():
    generator = np.random.default_rng(0)
    gold = generator.random(1000) < 0.1
    odds = np.where(gold, 1.5, -1.5) + 0.5 * generator.normal(size=1000)
    got = label_bias(answers(odds), gold.tolist())
    assert abs(got.raw.imbalance) < 0.02
    assert got.calibrated.imbalance > 0.03


def test_answers_of_one_class_leave_undefined_what_is():
    got = label_bias(answers([1.0, -1.0, 2.0]), [True, True, True])
    assert got.auroc is None
    assert got.raw.right_no is None
    assert got.raw.right_yes == pytest.approx(2 / 3)
    assert got.raw.imbalance == pytest.approx(-1 / 3)
    unknown = label_bias(answers([1.0, -1.0, 2.0]))
    assert [unknown.gold_share, unknown.auroc, unknown.raw.accuracy, unknown.raw.imbalance] == [None] * 4
    perfect = label_bias(answers([1.0, -1.0]), [True, False])
    assert (perfect.raw.p_value, perfect.raw.imbalance) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------- refusals
TWO = labelled([-1.0, -2.0])
REFUSED = [
    (lambda: score_forms(object(), [], ["yes"], ["no"]), "prompts must be a list of at least one text"),
    (lambda: score_forms(object(), ["a", " "], ["yes"], ["no"]), "prompt 1: must be a text that is not empty"),
    (lambda: score_forms(object(), ["a"], [], ["no"]), "lists of at least one text each"),
    (lambda: score_forms(object(), ["a"], "yes", ["no"]), "lists of at least one text each"),
    (lambda: score_forms(object(), ["a"], ["yes", ""], ["no"]), "must be texts that are not empty"),
    (lambda: score_forms(object(), ["a"], ["yes"], ["yes"]), "'yes' begins with the form 'yes' and would count twice"),
    (lambda: score_forms(object(), ["a"], ["yes"], ["no", "not"]), "'not' begins with the form 'no'"),
    (
        lambda: binary_answers(TWO, [True, True]),
        "a true entry for each form of yes and a false one for each form of no",
    ),
    (lambda: binary_answers(TWO, [True, False, False]), "3 forms need as many likelihoods for each prompt: got 2"),
    (lambda: binary_answers(TWO, [True, False], temperature=-1), "temperature must be positive"),
    (lambda: binary_answers(labelled([-1.0, -2.0, math.nan, -1.0]), [True, False]), "prompt 1: form 0 has nan"),
    (lambda: binary_answers(labelled([-math.inf, -math.inf]), [True, False]), "prompt 0: gives neither answer"),
    (
        lambda: binary_answers(labelled([1.0, 2.0], Kind.UNNORMALIZED, constant=ConstantKey.of("Z")), [True, False]),
        "unnormalised likelihood does not tell",
    ),
    (lambda: draw_answer_lists(object(), "a", ["yes"], ["no"], length=0), "num_lists and length must be at least 1"),
    (lambda: label_bias(answers([1.0, 2.0]), [True]), "gold must have an entry per prompt: got 1 for 2"),
    (lambda: label_bias(answers([1.0, 2.0]), [True, "yes"]), "that of prompt 1 is 'yes'"),
    (lambda: label_bias(answers([1.0])), "batch calibration needs at least two prompts"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [0]), "none in common"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [], [0]), "at least one token each"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [2]), "token 2 is not in the vocabulary of 2"),
    (lambda: binary_probability(Table([[0.0, 0.0]]), PREFIX, [0], [1], temperature=0), "temperature must be positive"),
    (
        lambda: binary_probability(Table([[0.0, -math.inf, -math.inf]]), PREFIX, [1], [2]),
        "prompt 0: gives neither answer a probability",
    ),
    (lambda: binary_probability(object(), PREFIX, [0], [1]), "binary probability needs per-token conditionals"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_binary_question_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
