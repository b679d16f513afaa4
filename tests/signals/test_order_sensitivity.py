"""Order sensitivity and reports: planted answers, counting by hand, McNemar and tied choices; one call per question."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.option_order import average_orders, option_orders, order_effects, score_orders
from loglik.signals.order_sensitivity import OrderedAnswer, ask_in_orders, order_report, order_sensitivity


def labelled(table: torch.Tensor, kind: Kind = Kind.EXACT, **more) -> LogLikelihood:
    values = table.double().flatten()
    return LogLikelihood(values, kind, Unit.TOKEN, torch.ones(len(values)), **more)


def answer(pi: list[float], bias: list[float], orders: torch.Tensor | None = None) -> OrderedAnswer:
    """What a model with additive bias of positions says."""
    shown = option_orders(len(pi)) if orders is None else orders
    logits = torch.tensor(pi).double().log()[shown] + torch.tensor(bias).double()
    found = labelled(logits.log_softmax(1))
    return OrderedAnswer(average_orders(found, shown), order_sensitivity(found, shown), None)


# --------------------------------------------------------------------------------------------------------- one question
def test_choices_and_positions_by_hand():
    shown = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 1, 0]])
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    got = order_sensitivity(labelled(p.log()), shown)
    assert got.choices.tolist() == [0, 0, 2]
    assert got.positions.tolist() == [0, 2, 0]
    assert got.agreement == pytest.approx(2 / 3)
    aligned = np.array([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2], [0.1, 0.3, 0.6]])
    wanted = scipy.stats.entropy(aligned.mean(0)) - np.mean([scipy.stats.entropy(row) for row in aligned])
    assert got.information == pytest.approx(wanted)
    moved = order_sensitivity(labelled(p.log() - torch.tensor([[1.0], [2.0], [3.0]])), shown)
    assert moved.information == pytest.approx(wanted)  # labels are renormalised


@pytest.mark.parametrize("options", [2, 3, 4])
def test_without_bias_nothing_depends_on_the_order(options):
    pi = torch.randn(options, generator=torch.Generator().manual_seed(options)).softmax(0).tolist()
    got = answer(pi, [0.0] * options).sensitivity
    assert set(got.choices.tolist()) == {int(np.argmax(pi))}
    assert (got.agreement, got.information) == (1.0, pytest.approx(0, abs=1e-12))
    # an option stands at each position equally often
    assert torch.bincount(got.positions).tolist() == [math.factorial(options - 1)] * options


def test_the_information_of_an_answer_by_position_alone_is_log_k():
    always = torch.full((24, 4), -math.inf)
    always[:, 1] = 0.0
    shown = option_orders(4)
    got = order_sensitivity(labelled(always), shown)
    assert got.information == pytest.approx(math.log(4))
    assert got.agreement == 0.25
    assert got.choices.equal(shown[:, 1])
    assert set(got.positions.tolist()) == {1}


def test_ties_go_to_the_option_and_not_to_the_position():
    shown = option_orders(3)
    got = order_sensitivity(labelled(torch.zeros(6, 3)), shown)
    assert got.choices.tolist() == [0] * 6
    assert torch.bincount(got.positions).tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------------------------- many questions
def test_the_report_counts_by_hand():
    """Three questions of two options: one answered by content, two by position."""
    strong, first, last = answer([0.99, 0.01], [1, 0]), answer([0.4, 0.6], [2, 0]), answer([0.6, 0.4], [0, 3])
    got = order_report([strong, first, last], [0, 1, 0], resamples=50)
    assert (strong.naive_choice, first.naive_choice, last.naive_choice) == (0, 0, 1)
    assert (strong.choice, first.choice, last.choice) == (0, 1, 0)
    assert got.accuracy_naive == pytest.approx(1 / 3)
    assert got.accuracy == 1.0
    assert got.accuracy_single == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (got.right_always, got.right_ever) == (pytest.approx(1 / 3), 1.0)
    assert (got.flips, got.changed) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert got.agreement == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert got.p_value == pytest.approx(scipy.stats.binomtest(2, 2).pvalue)
    (size,) = got.sizes
    assert (size.options, size.questions) == (2, 3)
    # choices by position: 0 and 1; 0 and 0; 1 and 1
    assert size.chosen.tolist() == pytest.approx([0.5, 0.5])
    # right option at 0, then at 1
    assert size.confusion.tolist() == [[2, 1], [1, 2]]
    assert size.recall.tolist() == pytest.approx([2 / 3, 2 / 3])
    wanted = torch.stack([a.adjusted.position for a in (strong, first, last)]).mean(0)
    torch.testing.assert_close(size.probability, wanted)
    assert got.first_bias == pytest.approx(float(wanted[0]) - 0.5)
    assert got.coverage == pytest.approx(1)
    assert got.kind is Kind.EXACT


def test_a_bias_of_the_first_position_is_found_and_averaged_away():
    """Gold never first: the naive choice is pulled to the first option, the average is right."""
    generator = torch.Generator().manual_seed(0)
    answers, gold = [], []
    for _ in range(40):
        right = int(torch.randint(1, 4, (1,), generator=generator))
        pi = torch.full((4,), 0.15)
        pi[right] = 0.55
        answers.append(answer(pi.tolist(), [2.0, 0, 0, 0]))
        gold.append(right)
    got = order_report(answers, gold)
    assert (got.accuracy_naive, got.accuracy) == (0.0, 1.0)
    assert got.p_value == pytest.approx(2**-39)
    (size,) = got.sizes
    assert size.chosen.tolist() == pytest.approx([1, 0, 0, 0])
    assert size.confusion.tolist() == [[240, 0, 0, 0]] * 4  # 24 orders of 40 questions, always the first
    assert size.recall.tolist() == [1, 0, 0, 0]  # right only where the right option stands first
    assert got.first_interval[0] > 0.2
    assert bool((size.interval[0, 0] > 0.25) & (size.interval[1:, 1] < 0.25).all())
    assert got.entropy > got.entropy_naive  # the arithmetic mean is drawn towards uniform


def test_intervals_cover_the_mean_of_the_population():
    """Bootstrap over questions: 95 % intervals of the first position's probability cover 85 to 100 % of the time."""

    def first(seed: int, count: int) -> list[OrderedAnswer]:
        draws = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shown = option_orders(2)
        found = []
        for content, bias in draws.tolist():
            table = labelled(torch.tensor([[content + bias, 0.0], [bias, content]]).log_softmax(1))
            found.append(OrderedAnswer(average_orders(table, shown), order_sensitivity(table, shown), None))
        return found

    hits = 0
    for seed in range(60):
        low, high = order_report(first(seed, 30), resamples=200).first_interval
        hits += low <= 0 <= high  # the bias is symmetric around 0
    assert 51 <= hits <= 60


def test_questions_of_several_sizes_are_kept_apart():
    got = order_report([answer([0.6, 0.4], [1, 0]), answer([0.5, 0.3, 0.2], [0, 0, 1])], [0, 0])
    assert [(size.options, size.questions) for size in got.sizes] == [(2, 1), (3, 1)]
    assert [size.probability.sum().item() for size in got.sizes] == pytest.approx([1, 1])
    assert [size.interval for size in got.sizes] == [None, None]
    alone = order_report([answer([0.6, 0.4], [0, 0])])
    assert alone.first_interval is None
    assert [alone.accuracy, alone.accuracy_naive, alone.p_value, alone.sizes[0].confusion] == [None] * 4


def test_a_position_without_the_right_option_has_no_recall():
    shown = torch.tensor([[0, 1, 2], [0, 2, 1]])
    got = order_report([answer([0.5, 0.3, 0.2], [0, 0, 0], shown)], [0])
    assert got.sizes[0].recall is None
    assert got.sizes[0].confusion.tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_an_unnormalised_model_has_no_coverage():
    shown = option_orders(2)
    table = labelled(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), Kind.UNNORMALIZED, constant=ConstantKey.of("Z"))
    got = order_report([OrderedAnswer(average_orders(table, shown), order_sensitivity(table, shown), None)])
    assert got.coverage is None


# --------------------------------------------------------------------------------------------------------- from a model
OPTIONS = ["a list", "a number", "a file"]


def test_one_call_is_the_parts(tiny):
    got = ask_in_orders(tiny, "What is 3?", OPTIONS, "cyclic", mean="geometric")
    shown = option_orders(3, "cyclic")
    found = score_orders(tiny, "What is 3?", OPTIONS, shown)
    wanted = average_orders(found, shown, mean="geometric")
    torch.testing.assert_close(got.adjusted.probs, wanted.probs)
    torch.testing.assert_close(got.adjusted.naive, wanted.naive)
    torch.testing.assert_close(got.effects.position, order_effects(found, shown).position)
    assert got.sensitivity.choices.tolist() == order_sensitivity(found, shown).choices.tolist()
    assert got.choice == int(wanted.probs.argmax())
    assert ask_in_orders(tiny, "What is 3?", OPTIONS, "cyclic", effects=False).effects is None


def test_random_orders_do_not_average_the_order_given(tiny):
    got = ask_in_orders(tiny, "What is 3?", OPTIONS, 4, seed=2, effects=False)
    shown = option_orders(3, 4, seed=2)
    torch.testing.assert_close(
        got.adjusted.probs,
        average_orders(score_orders(tiny, "What is 3?", OPTIONS, shown), shown).probs,
        atol=1e-5,
        rtol=0,
    )
    own = torch.arange(3)[None]
    torch.testing.assert_close(
        got.adjusted.naive, average_orders(score_orders(tiny, "What is 3?", OPTIONS, own), own).naive, atol=1e-5, rtol=0
    )
    assert got.sensitivity.orders.equal(shown)


def test_moved_labels_tell_labels_from_positions(tiny):
    got = ask_in_orders(tiny, "What is 3?", OPTIONS, "cyclic", labels=["X", "Y", "Z"], move_labels=True)
    assert len(got.sensitivity.choices) == 9
    assert got.effects.label.shape == (3,)
    assert float(got.effects.label.sum()) == pytest.approx(0, abs=1e-9)
    still = ask_in_orders(tiny, "What is 3?", OPTIONS, "cyclic", labels=["X", "Y", "Z"])
    torch.testing.assert_close(got.adjusted.naive, still.adjusted.naive, atol=1e-5, rtol=0)
    orders = torch.tensor(list(permutations(range(3))))
    every = ask_in_orders(tiny, "What is 3?", OPTIONS, "all", labels=["X", "Y", "Z"], move_labels=True)
    assert every.sensitivity.orders.equal(orders.repeat_interleave(3, 0))


# ------------------------------------------------------------------------------------------------------------- refusals
PAIR = answer([0.6, 0.4], [0, 0])
REFUSED = [
    (lambda: order_report([]), "there are no questions"),
    (lambda: order_report([PAIR], [0, 1]), "gold must have an option's number per question: got 2 for 1"),
    (lambda: order_report([PAIR], [2]), "question 0: has 2 options, and gold is 2"),
    (lambda: order_report([PAIR], [True]), "question 0: has 2 options, and gold is True"),
    (lambda: order_report([PAIR], level=1.0), "level must lie between 0 and 1"),
    (lambda: order_report([PAIR], resamples=0), "resamples be at least 1"),
    (lambda: order_sensitivity(labelled(torch.zeros(2, 2)), option_orders(3)), "need 18 log-likelihoods, got 4"),
    (lambda: order_sensitivity(labelled(torch.full((2, 2), math.nan)), option_orders(2)), "order 0: gives no label"),
    (lambda: ask_in_orders(object(), "q", ["a"]), "options must be a whole number of at least 2, got 1"),
    (lambda: ask_in_orders(object(), "q", ["a"] * 7), "7 options have 5040 orders"),
    (lambda: ask_in_orders(object(), "q", ["a", "b"], labels=["A", "A"]), "need as many different labels"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_orders_are_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
