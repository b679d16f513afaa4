"""Objectives of any-order marginals against enumeration over all orders, steps and vectors."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "reproductions"))

from worlds.enumerable import entropy, kl
from worlds.ising import PartialStates, tabular

from loglik.errors import InputError
from loglik.models.any_order import AnyOrderMarginals
from loglik.objectives.any_order import (
    Steps,
    draw_steps,
    flow_matching,
    kl_reinforce,
    marginal_self_consistency,
    order_agnostic_nll,
    self_consistency_residual,
)

SPACE = PartialStates(3, 3)
ALL = SPACE.x[SPACE.complete]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_log_p(space: PartialStates = SPACE, seed: int = 0) -> torch.Tensor:
    logits = 1.5 * torch.randn(len(space.complete), generator=seeded(seed), dtype=torch.float64)
    return logits.log_softmax(0)


def random_model(dims: int = 3, values: int = 3, *, seed: int = 0) -> AnyOrderMarginals:
    model = AnyOrderMarginals(dims, values, layers=1, width=12, dtype=torch.float64, seed=seed)
    with torch.no_grad():
        for network in (model.marginal_network, model.conditional_network):
            for parameter in (network.first.weight, network.last.weight):
                parameter.mul_(4.0)
    return model


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def every_step(x: torch.Tensor) -> tuple[torch.Tensor, Steps]:
    """Each row with each of the D! orders and D steps, rows outermost."""
    dims = x.shape[1]
    cases = list(itertools.product(itertools.permutations(range(dims)), range(1, dims + 1)))
    ranks = torch.tensor([ranks for ranks, _ in cases]).repeat(len(x), 1)
    step = torch.tensor([step for _, step in cases]).repeat(len(x))
    return x.repeat_interleave(len(cases), 0), Steps(ranks, step)


def grads(model: AnyOrderMarginals) -> list[torch.Tensor | None]:
    return [p.grad for p in model.parameters()]


# ------------------------------------------------------------------ orders and steps
def test_steps_cut_a_vector_in_three():
    """Step d of a row: the d - 1 entries of lowest rank, the next one, the rest; step D completes it."""
    order = torch.tensor([2, 0, 3, 1])  # no involution: ranks are not the order
    ranks = order.argsort()
    assert ranks.tolist() == [1, 3, 0, 2]
    steps = Steps(ranks.expand(4, 4), torch.arange(1, 5))
    for d in range(1, 5):
        assert set(steps.previous[d - 1].nonzero().flatten().tolist()) == set(order[: d - 1].tolist())
        assert steps.target[d - 1].nonzero().flatten().tolist() == [int(order[d - 1])]
        assert set(steps.current[d - 1].nonzero().flatten().tolist()) == set(order[:d].tolist())
    assert not steps.previous[0].any()
    assert steps.current[3].all()


def test_drawn_steps_are_uniform_over_orders_and_steps():
    """Chi-square over all 3! * 3 cases at level 1e-3."""
    steps = draw_steps(36_000, 3, generator=seeded())
    assert torch.equal(steps.ranks.sort(1).values, torch.arange(3).expand(36_000, 3))
    case = (steps.ranks * torch.tensor([9, 3, 1])).sum(1) * 3 + steps.step - 1
    counts = case.bincount()
    counts = counts[counts > 0]
    assert len(counts) == 18
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    again = draw_steps(36_000, 3, generator=seeded())
    assert torch.equal(again.ranks, steps.ranks)
    assert torch.equal(again.step, steps.step)


# ------------------------------------------------------------------ order-agnostic likelihood
@pytest.mark.parametrize(("dims", "values"), [(1, 2), (2, 3), (4, 2)])
def test_the_mean_over_all_draws_is_the_mean_over_all_orders(dims, values):
    """Values and gradients, row by row, with one forward pass instead of D."""
    model = random_model(dims, values)
    space = PartialStates(dims, values)
    x = space.x[space.complete]
    rows, steps = every_step(x)
    terms = order_agnostic_nll(model, rows, steps=steps)
    assert torch.equal(terms.weight, torch.ones(len(rows), dtype=torch.float64))
    found = terms.loss.reshape(len(x), -1).mean(1)
    orders = [torch.tensor(order) for order in itertools.permutations(range(dims))]
    expected = -torch.stack([model.order_log_prob(x, order).value for order in orders]).mean(0)
    close(found, expected)
    weights = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    parameters = list(model.conditional_network.parameters())
    for one, other in zip(
        torch.autograd.grad((weights * found).sum(), parameters),
        torch.autograd.grad((weights * expected).sum(), parameters),
        strict=True,
    ):
        close(one, other, 1e-11)
    if dims > 1:
        assert terms.loss.reshape(len(x), -1).std(1).min() > 1e-3  # single draws differ


def test_one_draw_by_hand():
    """D = 3, step 2 of the order (2, 0, 1): entries 0 and 1 are unknown, so the factor is 3 / 2."""
    model = random_model()
    x = torch.tensor([[1, 0, 2]])
    steps = Steps(torch.tensor([[1, 2, 0]]), torch.tensor([2]))
    log_p = model.log_conditionals(x, torch.tensor([False, False, True]))[0]
    close(order_agnostic_nll(model, x, steps=steps).loss, -1.5 * (log_p[0, 1] + log_p[1, 0]).reshape(1))


def test_random_draws_average_to_the_mean_over_orders():
    """Within four standard errors."""
    model = random_model()
    x = ALL[11].expand(20_000, 3)
    with torch.no_grad():
        loss = order_agnostic_nll(model, x, seeded()).loss
        orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
        expected = -sum(model.order_log_prob(ALL[11:12], order).value for order in orders) / 6
    assert abs(loss.mean() - expected).item() < 4 * loss.std().item() / math.sqrt(20_000)


def test_exact_conditionals_score_the_entropy_and_are_the_minimum():
    log_p = random_log_p()
    model = tabular(SPACE, log_p)
    rows, steps = every_step(ALL)
    weights = log_p.exp().repeat_interleave(18) / 18
    loss = (weights * order_agnostic_nll(model, rows, steps=steps).loss).sum()
    assert loss.item() == pytest.approx(entropy(log_p).item(), abs=1e-12)
    loss.backward()
    close(model.conditional_network.entries.grad, torch.zeros(64, 3, 3, dtype=torch.float64))


# ------------------------------------------------------------------ self-consistency
def test_exact_tables_have_no_residual():
    """Every vector, order and step; the anchor is where log Z is."""
    for shift in (0.0, 3.0):
        model = tabular(SPACE, random_log_p() + shift)
        rows, steps = every_step(ALL)
        terms = marginal_self_consistency(model, rows, steps=steps, freeze_conditionals=False, log_normalizer=shift)
        assert terms.metrics["residual"].max() < 1e-12
        assert terms.metrics["anchor"].item() < 1e-12
        assert terms.mean().item() < 1e-20
        terms.mean().backward()
        for gradient in grads(model):
            assert gradient.abs().max() < 1e-10
        away = marginal_self_consistency(model, rows, steps=steps, freeze_conditionals=False, log_normalizer=shift - 2)
        assert away.mean().item() == pytest.approx(4, abs=1e-10)


def test_no_residual_means_that_marginals_sum():
    """Any normalised conditionals in one order: the l that follows from r = 0 sums to l(empty) at every state."""
    model = random_model(2, 3)
    space = PartialStates(2, 3)
    log_c = model.log_conditionals(space.x, space.known).detach()
    for top in (0.0, 1.7):
        l_first = top + log_c[0, 0]  # r = 0 at the first step of the order (0, 1)
        residual = self_consistency_residual(torch.full((3,), top, dtype=torch.float64), log_c[0, 0], l_first)
        close(residual, torch.zeros(3, dtype=torch.float64))
        assert l_first.logsumexp(0).item() == pytest.approx(top, abs=1e-12)
        second = log_c[space.index(torch.tensor([[1, 0], [2, 0], [3, 0]])), 1]
        l_full = l_first[:, None] + second
        assert l_full.logsumexp((0, 1)).item() == pytest.approx(top, abs=1e-12)
        close(l_full.logsumexp(1), l_first)


def test_the_residual_by_hand_and_its_gradient():
    parts = [torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(3)]
    residual = self_consistency_residual(*parts)
    assert residual.tolist() == [1.0, 2.0]
    residual.square().sum().backward()
    assert [part.grad.tolist() for part in parts] == [[2, 4], [2, 4], [-2, -4]]
    first = self_consistency_residual(torch.tensor([-1.0]), torch.tensor([-0.5]), torch.tensor([-2.0]))
    assert first.tolist() == [0.5]


def test_the_loss_is_the_mean_over_all_steps():
    """Against marginals and conditionals looked up state by state."""
    model = random_model()
    rows, steps = every_step(ALL)
    terms = marginal_self_consistency(model, rows, steps=steps, freeze_conditionals=False, log_normalizer=0.3)
    table = {tuple(s): v for s, v in zip(SPACE.states.tolist(), model.log_marginal(SPACE.x, SPACE.known), strict=True)}
    log_c = dict(zip(table, model.log_conditionals(SPACE.x, SPACE.known), strict=True))
    squares = []
    for x in ALL.tolist():
        for order in itertools.permutations(range(3)):
            state = [0, 0, 0]
            for entry in order:
                before = tuple(state)
                state[entry] = x[entry] + 1
                squares.append((table[before] + log_c[before][entry, x[entry]] - table[tuple(state)]) ** 2)
    expected = 3 * torch.stack(squares).mean() + (table[0, 0, 0] - 0.3) ** 2
    assert terms.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert expected.item() > 0.1
    parameters = list(model.parameters())
    found = torch.autograd.grad(terms.mean(), parameters)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        close(one, other, 1e-10)


def test_one_draw_reads_the_states_of_its_step():
    model = random_model()
    x = torch.tensor([[1, 0, 2]])
    steps = Steps(torch.tensor([[1, 2, 0]]), torch.tensor([2]))  # entry 2 known, entry 0 next
    terms = marginal_self_consistency(model, x, steps=steps, freeze_conditionals=True)
    before, after = torch.tensor([False, False, True]), torch.tensor([True, False, True])
    expected = model.log_marginal(x, before) + model.log_conditionals(x, before)[:, 0, 1] - model.log_marginal(x, after)
    close(terms.metrics["residual"], expected.detach().abs())
    close(terms.loss, 3 * expected.square())
    assert terms.metrics["anchor"].item() == pytest.approx(abs(model.log_normalizer().item()), abs=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_which_networks_get_a_gradient(frozen):
    model = random_model()
    marginal_self_consistency(model, ALL, seeded(), freeze_conditionals=frozen).mean().backward()
    assert all(p.grad is not None for p in model.marginal_network.parameters())
    assert all((p.grad is None) == frozen for p in model.conditional_network.parameters())
    free = random_model()
    marginal_self_consistency(free, ALL, seeded(), freeze_conditionals=False).mean().backward()
    for one, other in zip(model.marginal_network.parameters(), free.marginal_network.parameters(), strict=True):
        close(one.grad, other.grad)  # freezing changes nothing for the marginals
    other = random_model()
    order_agnostic_nll(other, ALL, seeded()).mean().backward()
    assert all(p.grad is None for p in other.marginal_network.parameters())
    assert all(p.grad is not None for p in other.conditional_network.parameters())


def test_no_gradient_where_none_is_wanted():
    model = random_model()
    with torch.no_grad():
        terms = marginal_self_consistency(model, ALL, seeded(), freeze_conditionals=False)
    assert not terms.mean().requires_grad
    assert torch.is_grad_enabled()


def test_a_learned_log_normalizer_gets_its_gradient():
    model = random_model()
    log_z = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    marginal_self_consistency(model, ALL, seeded(), freeze_conditionals=False, log_normalizer=log_z).mean().backward()
    assert log_z.grad.item() == pytest.approx(-2 * (model.log_normalizer().item() - 0.7), abs=1e-12)


def test_one_entry_agrees_exactly_if_the_softmax_is_the_ratio():
    """K = 2, D = 1: r = 0 for both values iff softmax = e^l / sum e^l and l(empty) = log sum e^l."""
    space = PartialStates(1, 2)
    x = torch.tensor([[0], [1]])
    levels = torch.tensor([0.4, -1.3], dtype=torch.float64)
    model = tabular(space, levels)

    def loss() -> float:
        steps = draw_steps(2, 1, generator=seeded())
        assert steps.step.tolist() == [1, 1]
        return (
            marginal_self_consistency(
                model, x, steps=steps, freeze_conditionals=False, log_normalizer=model.log_normalizer().detach()
            )
            .mean()
            .item()
        )

    assert loss() == pytest.approx(0, abs=1e-24)
    close(model.log_conditionals(x, torch.tensor([False]))[0, 0], levels - levels.logsumexp(0))
    for table, place in (("conditional_network", (0, 0, 0)), ("marginal_network", (0,)), ("marginal_network", (2,))):
        with torch.no_grad():
            getattr(model, table).entries[place] += 0.1
        assert loss() > 1e-4
        with torch.no_grad():
            getattr(model, table).entries[place] -= 0.1


# ------------------------------------------------------------------ energy-based terms
def test_reinforce_is_the_gradient_of_the_divergence():
    """Rows in proportion to p_theta: the loss has the gradient of KL(p_theta || p), over the spread of the ratios."""
    counts = torch.tensor([5, 1, 8, 2, 4])
    logits = (counts / counts.sum()).double().log().requires_grad_()
    f = torch.randn(5, generator=seeded(), dtype=torch.float64)
    log_q = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(kl(log_q, f.log_softmax(0)), logits, retain_graph=True)
    rows = torch.repeat_interleave(torch.arange(5), counts)
    ratios = (log_q - f).detach()[rows]
    for shift_l, shift_f in ((0.0, 0.0), (3.0, 0.0), (0.0, -5.0)):
        terms = kl_reinforce(log_q[rows] + shift_l, f[rows] + shift_f)
        (found,) = torch.autograd.grad(terms.mean(), logits, retain_graph=True)
        close(found * ratios.std(), exact, 1e-7)
        close(terms.metrics["log_ratio"], ratios + shift_l - shift_f)
    assert exact.abs().max() > 0.05


def test_the_advantage_is_standardised_and_detached():
    """d loss / d l_b is A_b / B: nothing flows through the ratio or the target."""
    l_x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([-1.0, 0.0, -1.0, 4.0], dtype=torch.float64)
    advantage = (ratio - 0.5) / ((ratio - 0.5).square().sum() / 3).sqrt()
    kl_reinforce(l_x, f).mean().backward()
    close(l_x.grad, advantage / 4, 1e-7)
    assert f.grad is None
    flat = kl_reinforce(torch.zeros(3, requires_grad=True), torch.ones(3))
    assert flat.loss.tolist() == [0, 0, 0]  # no spread, no advantage
    wide = kl_reinforce(l_x, f, eps=float(ratio.std()))
    close(torch.autograd.grad(wide.mean(), l_x)[0], advantage / 8, 1e-12)


def test_flow_matching_by_hand():
    l_x = torch.tensor([1.0, -2.0], requires_grad=True)
    f = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    terms = flow_matching(l_x, f)
    assert terms.loss.tolist() == [0.125, 8.0]
    assert terms.mean().item() == pytest.approx(8.125 / 2)
    terms.mean().backward()
    assert l_x.grad.tolist() == [0.25, -2.0]
    assert f.grad is None
    assert terms.loss.dtype == torch.float32


@pytest.mark.parametrize("c", [-4.0, 9.0])
def test_adding_a_constant_to_the_log_density(c):
    """f + c with l + c and log Z + c: the same losses and gradients, so the conditionals train as before."""
    model, moved = random_model(), random_model()
    with torch.no_grad():
        moved.marginal_network.last.bias += c
    f = torch.randn(27, generator=seeded(3), dtype=torch.float64)
    losses, log_zs = [], []
    everything = torch.ones(3, dtype=torch.bool)
    for each, shift in ((model, 0.0), (moved, c)):
        log_z = torch.tensor(0.2 + shift, dtype=torch.float64, requires_grad=True)
        terms = flow_matching(each.log_marginal(ALL, everything), f + shift)
        agreement = marginal_self_consistency(each, ALL, seeded(4), freeze_conditionals=False, log_normalizer=log_z)
        loss = terms.mean() + 4 * agreement.mean()
        loss.backward()
        losses.append(loss.item())
        log_zs.append(log_z.grad.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert log_zs[0] == pytest.approx(log_zs[1], rel=1e-10)
    for one, other in zip(grads(model), grads(moved), strict=True):
        close(one, other, 1e-9)
    assert moved.log_normalizer().item() - model.log_normalizer().item() == pytest.approx(c, abs=1e-10)


def test_the_target_is_the_stationary_point_of_both_variants():
    """Exact unnormalised tables: every loss and gradient is zero, and l(empty) is log Z."""
    f = torch.randn(27, generator=seeded(6), dtype=torch.float64)
    model = tabular(SPACE, f)
    assert model.log_normalizer().item() == pytest.approx(f.logsumexp(0).item(), abs=1e-12)
    l_x = model.log_marginal(ALL, torch.ones(3, dtype=torch.bool))
    agreement = marginal_self_consistency(
        model, ALL, seeded(), freeze_conditionals=False, log_normalizer=f.logsumexp(0)
    )
    (flow_matching(l_x, f).mean() + 4 * agreement.mean()).backward()
    for gradient in grads(model):
        assert gradient.abs().max() < 1e-10
    terms = kl_reinforce(model.log_marginal(ALL, torch.ones(3, dtype=torch.bool)), f, eps=1e-3)
    assert terms.mean().abs().item() < 1e-10


# ------------------------------------------------------------------ refusals
ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: self_consistency_residual(ONES, ONES, torch.ones(3)),
            r"the three terms of a residual must have one shape, got \(2,\), \(2,\), \(3,\)",
        ),
        (
            lambda: self_consistency_residual(ONES[:, None], ONES, ONES),
            r"the three terms of a residual must have one shape, got \(2, 1\), \(2,\), \(2,\)",
        ),
        (lambda: kl_reinforce(ONES[:1], ONES[:1]), "kl_reinforce compares samples with each other: give at least 2"),
        (lambda: kl_reinforce(ONES, ONES, eps=0.0), "kl_reinforce: eps must be positive and finite, got 0.0"),
        (lambda: kl_reinforce(ONES, torch.ones(3)), r"kl_reinforce compares \(B,\) marginals with \(B,\) values"),
        (
            lambda: kl_reinforce(ONES, torch.tensor([0.0, -math.inf])),
            "kl_reinforce: row 1 has log-density -inf; every vector needs a finite one",
        ),
        (
            lambda: flow_matching(ONES, torch.tensor([math.nan, 0.0])),
            "flow_matching: row 0 has log-density nan; every vector needs a finite one",
        ),
        (lambda: flow_matching(ONES[:, None], ONES), r"flow_matching compares \(B,\) marginals"),
        (lambda: flow_matching(ONES[:0], ONES[:0]), "flow_matching is a mean over rows: give at least one"),
        (
            lambda: order_agnostic_nll(random_model(), ALL[:0]),
            "order_agnostic_nll is a mean over rows: give at least one",
        ),
        (lambda: order_agnostic_nll(random_model(), ALL - 1), "row 0: entry 0 is -1, and values go from 0 to 2"),
        (
            lambda: marginal_self_consistency(random_model(), ALL + 1, freeze_conditionals=True),
            "row 0: entry 0 is 1|row 2: entry 2 is 3",
        ),
        (
            lambda: marginal_self_consistency(
                random_model(), ALL, freeze_conditionals=True, steps=draw_steps(3, 3, generator=seeded())
            ),
            r"marginal_self_consistency: ranks and steps must have shapes \(27, 3\) and \(27,\), got \(3, 3\) and",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError, match=f"^({message})") as caught:
        call()
    assert "\n" not in str(caught.value)
