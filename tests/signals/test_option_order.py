"""Order adjustment against planted biases over all and over cyclic orders; entropy and divergence against scipy."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import scipy.stats
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.option_order import (
    alignment_entropy,
    average_orders,
    lettered_prompt,
    normalised_entropy,
    option_orders,
    order_effects,
    score_orders,
)


def labelled(table: torch.Tensor, kind: Kind = Kind.EXACT, **more) -> LogLikelihood:
    values = table.double().flatten()
    return LogLikelihood(values, kind, Unit.TOKEN, torch.ones(len(values)), **more)


def planted(pi: torch.Tensor, bias: torch.Tensor, orders: torch.Tensor, labels=None, mark=None) -> LogLikelihood:
    """log softmax of log pi(option) + b(position) [+ d(label)]: what a model with additive bias says."""
    logits = pi.log()[orders] + bias
    if labels is not None:
        logits = logits + mark[labels]
    return labelled(logits.log_softmax(1))


def population(options: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(options, dtype=torch.float64, generator=generator).mul(1.3).softmax(0)


def biases(options: int, seed: int = 1) -> torch.Tensor:
    return 1.5 * torch.randn(options, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------------- orders
def test_orders():
    assert option_orders(3).tolist() == [list(p) for p in permutations(range(3))]
    assert option_orders(3, "cyclic").tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    drawn = option_orders(4, 4000, seed=3)
    assert drawn.equal(option_orders(4, 4000, seed=3))
    counts = torch.unique(drawn, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert len(option_orders(6)) == 720


# -------------------------------------------------------------------------------------------------- planted pi and bias
@pytest.mark.parametrize("orders", ["all", "cyclic"])
@pytest.mark.parametrize("options", [2, 3, 4, 5])
def test_the_geometric_mean_recovers_the_population_exactly(options, orders):
    pi, bias, shown = population(options), biases(options), option_orders(options, orders)
    got = average_orders(planted(pi, bias, shown), shown, mean="geometric")
    torch.testing.assert_close(got.probs, pi, atol=1e-12, rtol=0)
    arithmetic = average_orders(planted(pi, bias, shown), shown).probs
    assert (arithmetic - pi).abs().max() > 1e-3
    if orders == "all":  # drawn towards uniform
        assert normalised_entropy(arithmetic) > normalised_entropy(pi)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_without_bias_every_order_gives_the_population(mean):
    pi, shown = population(4), option_orders(4)
    got = average_orders(planted(pi, torch.zeros(4), shown), shown, mean=mean)
    torch.testing.assert_close(got.probs, pi, atol=1e-12, rtol=0)
    assert got.first_bias == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(got.naive, pi)
    assert got.coverage == pytest.approx(1)


def test_the_inverse_permutation_is_used():
    """A cycle of three is no involution: indexing with the order itself gives another answer."""
    pi = torch.tensor([0.7, 0.2, 0.1]).double()
    shown = torch.tensor([[1, 2, 0]])
    got = average_orders(planted(pi, torch.zeros(3), shown), shown)
    torch.testing.assert_close(got.probs, pi)
    all_orders = option_orders(3)
    by_position = planted(pi, torch.zeros(3), all_orders).value.reshape(6, 3).exp()
    released = by_position.gather(1, all_orders).mean(0)  # the released loader's indexing
    torch.testing.assert_close(released, torch.tensor([0.517, 0.267, 0.217]).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("orders", ["all", "cyclic"])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_uniform_population_stays_uniform_under_any_bias(orders, mean):
    shown = option_orders(4, orders)
    got = average_orders(planted(torch.full((4,), 0.25).double(), biases(4), shown), shown, mean=mean)
    torch.testing.assert_close(got.probs, torch.full((4,), 0.25).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.position, biases(4).softmax(0))


def test_one_that_always_says_the_first_letter():
    shown = option_orders(4)
    always = torch.full((24, 4), -math.inf)
    always[:, 0] = math.log(0.5)  # half of its mass on A, none on other labels
    got = average_orders(labelled(always), shown)
    torch.testing.assert_close(got.probs, torch.full((4,), 0.25).double())
    assert got.first_bias == pytest.approx(0.75)
    assert got.naive.tolist() == [1, 0, 0, 0]
    assert got.coverage == pytest.approx(0.5)
    with pytest.raises(RowError, match="order 0: gives a label probability 0"):
        average_orders(labelled(always), shown, mean="geometric")


def test_marginals_sum_to_one_and_labels_are_renormalised():
    shown = option_orders(3, 7, seed=2)
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double() - 3
    got = average_orders(labelled(table), shown)
    assert got.probs.sum().item() == pytest.approx(1)
    assert got.position.sum().item() == pytest.approx(1)
    assert got.coverage == pytest.approx(table.exp().sum(1).mean().item())
    moved = average_orders(labelled(table - torch.arange(7.0)[:, None]), shown)
    torch.testing.assert_close(moved.probs, got.probs)


def test_sampled_orders_err_as_one_over_the_root_of_their_number():
    pi, bias = population(4), biases(4)
    truth = average_orders(planted(pi, bias, option_orders(4)), option_orders(4)).probs

    def error(count: int) -> float:
        squares = []
        for seed in range(60):
            shown = option_orders(4, count, seed=seed)
            squares.append((average_orders(planted(pi, bias, shown), shown).probs - truth).square().sum())
        return math.sqrt(torch.stack(squares).mean())

    assert error(25) / error(400) == pytest.approx(4, rel=0.25)


def test_kinds():
    shown = option_orders(2)
    table = torch.tensor([[-1.0, -2.0], [-2.0, -1.0]])
    assert average_orders(labelled(table), shown).kind is Kind.EXACT
    assert average_orders(labelled(table, Kind.LOWER_BOUND), shown).kind is Kind.SURROGATE
    energy = average_orders(labelled(table, Kind.UNNORMALIZED, constant=ConstantKey.of("Z")), shown)
    assert energy.kind is Kind.EXACT
    assert energy.coverage is None


# ------------------------------------------------------------------------------------------------------- decomposition
@pytest.mark.parametrize("orders", ["all", "cyclic", 30])
def test_planted_effects_are_found(orders):
    pi, bias, shown = population(4), biases(4), option_orders(4, orders)
    got = order_effects(planted(pi, bias, shown), shown)
    torch.testing.assert_close(got.option, pi.log() - pi.log().mean(), atol=1e-10, rtol=0)
    torch.testing.assert_close(got.position, bias - bias.mean(), atol=1e-10, rtol=0)
    assert got.label is None
    assert got.residual_share == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(got.option.softmax(0), pi)


def test_labels_and_positions_are_told_apart_when_both_move():
    pi, bias, mark = population(3), biases(3), torch.tensor([2.0, 0.0, -1.0]).double()
    every = option_orders(3)
    shown, marks = every.repeat_interleave(6, 0), every.repeat(6, 1)
    got = order_effects(planted(pi, bias, shown, marks, mark), shown, label_orders=marks)
    torch.testing.assert_close(got.option, pi.log() - pi.log().mean(), atol=1e-10, rtol=0)
    torch.testing.assert_close(got.position, bias - bias.mean(), atol=1e-10, rtol=0)
    torch.testing.assert_close(got.label, mark - mark.mean(), atol=1e-10, rtol=0)
    with pytest.raises(InputError, match="6 orders cannot tell options, positions and labels apart"):
        order_effects(planted(pi, bias, every), every, label_orders=every)


def test_the_residual_share_is_what_additive_effects_leave():
    """An interaction that is orthogonal to both effects, of known size."""
    shown = option_orders(2, "all")
    additive = planted(population(2), biases(2), shown).value.reshape(2, 2)
    got = order_effects(labelled(additive), shown)
    assert got.residual_share == pytest.approx(0, abs=1e-12)
    square = option_orders(3, "cyclic")
    interaction = torch.zeros(3, 3).double()
    interaction[torch.arange(3), square.argsort(1)[:, 0]] += 1.0  # option 0, whatever its position
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    centred = noise - noise.mean(1, keepdim=True)
    fit = order_effects(labelled(noise), square)
    fitted = fit.option[square] + fit.position
    left = (centred - fitted).square().sum() / centred.square().sum()
    assert fit.residual_share == pytest.approx(left.item())
    assert 0 < fit.residual_share < 1
    # least squares on a Latin square: the option's effect is its mean over the rows
    rows = torch.stack([centred.gather(1, square.argsort(1))[:, k].mean() for k in range(3)])
    torch.testing.assert_close(fit.option, rows)
    assert order_effects(labelled(torch.zeros(3, 3)), square).residual_share == 0.0


# --------------------------------------------------------------------------------------------------------------- texts
def test_labels_of_texts_are_scored_in_every_order():
    tiny = loglik.load("tiny")
    options, shown = ["a list", "a number", "a file"], option_orders(3, "cyclic")
    found = score_orders(tiny, "What is 3?", options, shown)
    prompt = "Question: What is 3?\nA. a number\nB. a file\nC. a list\nAnswer:"
    assert lettered_prompt("What is 3?", ["a number", "a file", "a list"], ["A", "B", "C"]) == prompt
    alone = loglik.score(tiny, [(prompt, " A"), (prompt, " B"), (prompt, " C")]).value
    torch.testing.assert_close(found.value.reshape(3, 3)[1], alone, atol=1e-4, rtol=0)
    got = average_orders(found, shown, mean="geometric")
    assert got.probs.sum().item() == pytest.approx(1)
    assert 0 < got.coverage < 1
    moved = score_orders(tiny, "What is 3?", options, shown, labels="XYZ", label_orders=shown.flip(0), separator="")
    prompt = "Question: What is 3?\nZ. a list\nX. a number\nY. a file\nAnswer:"
    alone = loglik.score(tiny, [(prompt, "Z"), (prompt, "X"), (prompt, "Y")]).value
    torch.testing.assert_close(moved.value.reshape(3, 3)[0], alone, atol=1e-4, rtol=0)
    for call, message in [
        (lambda: score_orders(tiny, "q", ["a", " "], option_orders(2)), "options must be a list of texts"),
        (lambda: score_orders(tiny, "q", "ab", option_orders(2)), "options must be a list of texts"),
        (
            lambda: score_orders(tiny, "q", ["a", "b"], option_orders(3)),
            r"orders must be whole numbers of shape \(S, 2\)",
        ),
        (lambda: score_orders(tiny, "q", ["a", "b"], option_orders(2), labels="AA"), "need as many different labels"),
        (
            lambda: score_orders(tiny, "q", ["a", "b"], option_orders(2), label_orders=option_orders(2)[:1]),
            "a row for each order: got 1 for 2",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()


# ------------------------------------------------------------------------------------------------- entropy, divergence
def test_entropy_is_scipys():
    p = torch.stack([population(4, s) for s in range(5)])
    wanted = scipy.stats.entropy(p.numpy(), axis=1) / math.log(4)
    torch.testing.assert_close(normalised_entropy(p), torch.from_numpy(wanted))
    assert normalised_entropy(torch.tensor([1.0, 0.0])) == 0
    assert normalised_entropy(torch.full((3,), 1 / 3).double()).item() == pytest.approx(1)


def test_divergence_and_regression_are_scipys():
    responses = [population(3, 5), population(4, 6)]
    groups = [torch.stack([population(k, 10 * k + g) for g in range(6)]) for k in (3, 4)]
    got = alignment_entropy(responses, groups)
    kl = [
        sum(scipy.stats.entropy(r.numpy(), g[i].numpy()) for r, g in zip(responses, groups, strict=True)) / 2
        for i in range(6)
    ]
    torch.testing.assert_close(got.divergence, torch.tensor(kl).double())
    assert got.correlation == pytest.approx(scipy.stats.pearsonr(got.entropy, got.divergence).statistic)
    assert got.slope == pytest.approx(scipy.stats.linregress(got.entropy, got.divergence).slope)
    uniform = alignment_entropy([torch.full((3,), 1 / 3).double(), torch.full((4,), 0.25).double()], groups)
    assert uniform.correlation < -0.8  # closeness to uniform is all that a uniform model can share


# ------------------------------------------------------------------------------------------------------------ refusals
PAIR = labelled(torch.tensor([[-1.0, -2.0], [-2.0, -1.0]]))
BOTH = torch.tensor([[0, 1], [1, 0]])
THREE = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]])
REFUSED = [
    (lambda: option_orders(1), "options must be a whole number of at least 2, got 1"),
    (lambda: option_orders(7), "7 options have 5040 orders: set orders to cyclic or a number"),
    (lambda: option_orders(3, 0), "orders must be all, cyclic or a positive number, got 0"),
    (lambda: option_orders(3, "random"), "orders must be all, cyclic or a positive number, got 'random'"),
    (lambda: average_orders(PAIR, BOTH, mean="median"), "mean must be arithmetic or geometric, got 'median'"),
    (lambda: average_orders(PAIR, BOTH[:1]), r"\(1, 2\) orders need 2 log-likelihoods, got 4"),
    (lambda: average_orders(PAIR, torch.tensor([[0, 1], [1, 1]])), r"orders 1: \[1, 1\] is no order of 0..1"),
    (lambda: average_orders(PAIR, torch.tensor([0, 1])), r"orders must be whole numbers of shape"),
    (lambda: average_orders(PAIR, BOTH.double()), "orders must be whole numbers"),
    (lambda: average_orders(labelled(torch.full((2, 2), -math.inf)), BOTH), "order 0: gives no label a probability"),
    (lambda: average_orders(labelled(torch.tensor([[0.0, -1], [math.nan, 0]])), BOTH), "order 1: gives no label"),
    (lambda: order_effects(labelled(torch.tensor([[0.0, -1], [math.nan, 0]])), BOTH), "order 1: .* no number"),
    (lambda: order_effects(PAIR[:2], BOTH[:1]), "1 orders cannot tell options, positions and labels apart"),
    (lambda: order_effects(PAIR, BOTH, label_orders=BOTH[:1]), "a row for each order: got 1 for 2"),
    (lambda: normalised_entropy(torch.tensor([0.5, 0.6])), "probs must be probabilities"),
    (lambda: normalised_entropy(torch.tensor([math.nan, 1.0])), "probs must be probabilities"),
    (lambda: normalised_entropy(torch.tensor([1.0])), "at least two options"),
    (lambda: alignment_entropy([], []), "must pair by question: got 0 and 0"),
    (lambda: alignment_entropy([THREE[0]], [THREE[:2]]), "at least three"),
    (lambda: alignment_entropy([THREE[0]], [THREE[0]]), "question 0: needs a response"),
    (lambda: alignment_entropy([THREE[0] * 2], [THREE]), "the response to question 0 must be probabilities"),
    (lambda: alignment_entropy([THREE[0]], [THREE * 2]), "the subgroups' answers to question 0 must be"),
    (
        lambda: alignment_entropy([THREE[0]], [torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])]),
        "question 0: subgroup 1 never gives an answer that the model gives",
    ),
    (lambda: alignment_entropy([THREE[0]], [THREE[:1].expand(3, 2)]), "nothing to regress"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((InputError, RowError), match=message):
        call()
