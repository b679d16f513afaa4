"""Token credit and process rewards against enumeration of small decision processes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.signals.reasoning import implicit_process_reward, score_steps, token_credit
from zoo import CAUSAL, build

V, T = 3, 4
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))
PREFIXES = [p for n in range(T) for p in product(range(V), repeat=n)]


def table(seed: int, scale: float = 1.5) -> dict[tuple[int, ...], torch.Tensor]:
    """A random distribution over the next token after every prefix, float64 log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    return {p: torch.log_softmax(scale * torch.randn(V, generator=g, dtype=torch.float64), 0) for p in PREFIXES}


def likelihood(model: dict[tuple[int, ...], torch.Tensor], rows=SEQUENCES) -> LogLikelihood:
    """Of whole sequences, with their chain-rule terms."""
    terms = torch.stack([torch.stack([model[tuple(r[:t])][r[t]] for t in range(T)]) for r in rows.tolist()])
    return LogLikelihood.from_per_unit(terms, torch.ones(len(rows), T, dtype=torch.bool))


def optimal(reference, rewards, beta):
    """Backward induction of the soft-optimal policy: its log-probabilities and the values V* of all prefixes.

    V*(s) = beta log sum_a exp(Q*(s, a) / beta), Q*(s, a) = r(s, a) + beta log pi_ref(a | s) + V*(s').
    """
    value = {p: torch.tensor(0.0, dtype=torch.float64) for p in product(range(V), repeat=T)}
    policy = {}
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        after = torch.stack([value[(*prefix, a)] for a in range(V)])
        q = rewards[prefix] + beta * reference[prefix] + after
        value[prefix] = beta * torch.logsumexp(q / beta, 0)
        policy[prefix] = (q - value[prefix]) / beta
    return policy, value


def random_rewards(seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {p: torch.randn(V, generator=g, dtype=torch.float64) for p in PREFIXES}


def along(quantity, rows=SEQUENCES) -> torch.Tensor:
    """(N, T) r(s_t, a_t) of every sequence."""
    return torch.stack([torch.stack([quantity[tuple(r[:t])][r[t]] for t in range(T)]) for r in rows.tolist()])


def values_along(value, rows=SEQUENCES) -> torch.Tensor:
    """(N, T + 1) V*(s_t) of every sequence, from the empty prefix to the terminal state."""
    return torch.stack([torch.stack([value[tuple(r[:t])] for t in range(T + 1)]) for r in rows.tolist()])


# -------------------------------------------------------------------------------------------------- token credit
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_credit_is_the_soft_advantage_of_the_optimal_policy(beta):
    """c_t = r_t + V*(s_{t+1}) - V*(s_t) by backward induction; the sum telescopes to the return minus V*(s_1)."""
    reference, rewards = table(0), random_rewards(1)
    policy, value = optimal(reference, rewards, beta)
    credit = token_credit(likelihood(policy), likelihood(reference), beta=beta)
    r, v = along(rewards), values_along(value)
    torch.testing.assert_close(credit.per_unit, r + v[:, 1:] - v[:, :-1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(credit.value, r.sum(1) - value[()], atol=1e-12, rtol=1e-12)
    # On whole sequences the recursion's policy is pi_ref exp(r / beta) / Z, with V*(s_1) = beta log Z.
    log_z = torch.logsumexp(likelihood(reference).value + r.sum(1) / beta, 0)
    torch.testing.assert_close(value[()], beta * log_z, atol=1e-12, rtol=1e-12)
    tilted = likelihood(reference).value + r.sum(1) / beta - log_z
    torch.testing.assert_close(likelihood(policy).value, tilted, atol=1e-12, rtol=1e-12)


def test_a_potential_changes_no_credit_sum():
    """Shaping r by phi(s') - phi(s), phi(terminal) = 0, leaves the policy and shifts all returns by -phi(s_1)."""
    reference, rewards, beta = table(0), random_rewards(1), 0.5
    g = torch.Generator().manual_seed(2)
    phi = {p: torch.randn((), generator=g, dtype=torch.float64) for p in PREFIXES}
    phi |= {p: torch.tensor(0.0, dtype=torch.float64) for p in product(range(V), repeat=T)}
    shaped = {p: rewards[p] + torch.stack([phi[(*p, a)] for a in range(V)]) - phi[p] for p in PREFIXES}
    plain, _ = optimal(reference, rewards, beta)
    other, _ = optimal(reference, shaped, beta)
    first, second = (token_credit(likelihood(m), likelihood(reference), beta=beta) for m in (plain, other))
    torch.testing.assert_close(first.per_unit, second.per_unit, atol=1e-12, rtol=1e-12)


def test_expected_credit_under_the_reference_is_minus_the_divergence():
    """E_ref[sum c_t] = -beta KL(ref || policy): why implicit rewards of what the reference was fitted to decline."""
    policy, reference, beta = table(3), table(4), 0.7
    log_p, log_ref = likelihood(policy).value, likelihood(reference).value
    divergence = (log_ref.exp() * (log_ref - log_p)).sum()
    credit = token_credit(likelihood(policy), likelihood(reference), beta=beta)
    assert float((log_ref.exp() * credit.value).sum()) == pytest.approx(-beta * float(divergence), abs=1e-12)


def test_large_beta_gives_the_advantage_of_the_reference():
    reference, rewards, beta = table(0), random_rewards(1), 1e6
    policy, _ = optimal(reference, rewards, beta)
    value = {p: torch.tensor(0.0, dtype=torch.float64) for p in product(range(V), repeat=T)}
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        after = torch.stack([value[(*prefix, a)] for a in range(V)])
        value[prefix] = (reference[prefix].exp() * (rewards[prefix] + after)).sum()
    v = values_along(value)
    credit = token_credit(likelihood(policy), likelihood(reference), beta=beta)
    torch.testing.assert_close(credit.per_unit, along(rewards) + v[:, 1:] - v[:, :-1], atol=1e-4, rtol=0)


def test_equal_models_give_no_credit():
    same = likelihood(table(0))
    assert bool((token_credit(same, same, beta=0.1).per_unit == 0).all())


def test_gradient_reaches_the_policy_alone():
    mask = torch.ones(2, 3, dtype=torch.bool)
    policy, reference = (torch.full((2, 3), -1.0, requires_grad=True) for _ in range(2))
    credit = token_credit(
        LogLikelihood.from_per_unit(policy, mask), LogLikelihood.from_per_unit(reference, mask), beta=0.25
    )
    credit.per_unit.sum().backward()
    assert reference.grad is None
    assert bool((policy.grad == 0.25).all())
    assert credit.kind is Kind.EXACT


def test_credit_of_a_model_stands_at_its_tokens():
    models = [CausalLM(build(CAUSAL["llama"], 20, seed=s)) for s in (0, 1)]
    batch = TokenBatch.from_lists([[1, 5, 9, 2], [1, 7, 8, 4, 4]], starts=[2, 1], padding_side="left")
    policy, reference = (model.log_prob(batch).detach() for model in models)
    credit = token_credit(policy, reference, beta=0.1)
    assert credit.mask.equal(batch.scored_mask)
    torch.testing.assert_close(credit.per_unit, 0.1 * (policy.per_unit - reference.per_unit))
    assert credit.num_units.tolist() == [2, 4]


def test_credit_refuses_what_has_no_terms_or_other_tokens():
    mask = torch.ones(1, 2, dtype=torch.bool)
    terms = LogLikelihood.from_per_unit(torch.tensor([[-1.0, -2.0]]), mask)
    total = LogLikelihood(torch.tensor([-3.0]), Kind.LOWER_BOUND, Unit.TOKEN, torch.tensor([2]))
    with pytest.raises(InputError, match="the reference gives a sum alone"):
        token_credit(terms, total, beta=1.0)
    with pytest.raises(InputError, match="the policy gives a sum alone"):
        token_credit(total, terms, beta=1.0)
    fewer = LogLikelihood.from_per_unit(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    with pytest.raises(InputError, match="compares the same tokens"):
        token_credit(terms, fewer, beta=1.0)
    wider = LogLikelihood.from_per_unit(torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="compares the same tokens"):
        token_credit(terms, wider, beta=1.0)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="beta must be positive"):
            token_credit(terms, terms, beta=beta)
    zero = LogLikelihood.from_per_unit(torch.tensor([[-1.0, -math.inf]]), mask)
    with pytest.raises(RowError, match="row 0: the reference's log-probability in column 1 is -inf"):
        token_credit(terms, zero, beta=1.0)


# -------------------------------------------------------------------------------------------------- process rewards
@pytest.mark.parametrize(("seed", "beta"), [(0, 0.05), (1, 0.5), (2, 2.0)])
def test_running_reward_is_the_soft_expectation_of_the_outcome(seed, beta):
    """q_t = beta log E_ref[exp(r(y) / beta) | y_<=t] by enumeration, to 1e-12, for an arbitrary policy."""
    policy, reference = likelihood(table(seed)), likelihood(table(seed + 10))
    every = torch.ones(len(SEQUENCES), T, dtype=torch.bool)
    rewards = implicit_process_reward(policy, reference, beta=beta, boundaries=every)
    outcome = beta * (policy.value - reference.value)
    for t in range(1, T + 1):
        for i, sequence in enumerate(SEQUENCES):
            same = (SEQUENCES[:, :t] == sequence[:t]).all(1)
            ahead = reference.per_unit[same, t:].sum(1)
            expected = beta * torch.logsumexp(ahead + outcome[same] / beta, 0)
            assert float(rewards.cumulative[i, t - 1]) == pytest.approx(float(expected), abs=1e-12)


def grouped(boundaries):
    policy, reference = likelihood(table(0)), likelihood(table(1))
    marked = torch.zeros(len(SEQUENCES), T, dtype=torch.bool)
    marked[:, boundaries] = True
    return implicit_process_reward(policy, reference, beta=0.3, boundaries=marked), policy, reference


def test_steps_sum_to_the_outcome_reward_however_they_are_cut():
    for cut in ([], [3], [0, 3], [1], [0, 1, 2, 3]):
        rewards, policy, reference = grouped(cut)
        outcome = 0.3 * (policy.value - reference.value)
        torch.testing.assert_close(rewards.single.sum(1), outcome, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(rewards.cumulative[:, -1], outcome, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(score_steps(rewards.single, rewards.mask, "sum"), outcome, atol=1e-12, rtol=1e-12)
        assert rewards.mask.all()
        assert rewards.ends[0].tolist() == sorted({*cut, 3})


def test_regrouping_changes_single_rewards_but_not_the_running_ones():
    fine, _, _ = grouped([0, 1, 2])
    coarse, _, _ = grouped([1])
    torch.testing.assert_close(coarse.cumulative, fine.cumulative[:, [1, 3]], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(coarse.single[:, 0], fine.single[:, :2].sum(1), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(coarse.single[:, 0], fine.single[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_and_numbers_of_steps(side):
    """Prompt and padding count nothing; the last token ends a step that nobody marked."""
    texts, starts, steps = [[9, 9, 1, 2, 3, 4], [9, 1, 2], [9, 9, 1]], [2, 1, 2], [[3], [], [2]]
    batch = TokenBatch.from_lists(texts, starts=starts, padding_side=side)
    shift = [6 - len(t) if side == "left" else 0 for t in texts]
    marks = torch.zeros_like(batch.scored_mask)
    for i, own in enumerate(steps):
        marks[i, [s + shift[i] for s in own]] = True
    g = torch.Generator().manual_seed(0)
    raw = [[torch.randn(len(t) - s, generator=g).tolist() for t, s in zip(texts, starts, strict=True)] for _ in "pr"]
    sides = []
    for terms in raw:
        per_unit = torch.zeros(batch.ids.shape)
        per_unit[batch.scored_mask] = torch.tensor([x for row in terms for x in row])
        sides.append(LogLikelihood.from_per_unit(per_unit, batch.scored_mask))
    got = implicit_process_reward(*sides, beta=2.0, boundaries=marks)
    credit = [[2 * (a - b) for a, b in zip(p, r, strict=True)] for p, r in zip(*raw, strict=True)]
    expected = [[sum(credit[0][:2]), sum(credit[0][2:])], [sum(credit[1]), 0.0], [credit[2][0], 0.0]]
    torch.testing.assert_close(got.single, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    running = [[sum(credit[0][:2]), sum(credit[0])], [sum(credit[1]), 0.0], [credit[2][0], 0.0]]
    torch.testing.assert_close(got.cumulative, torch.tensor(running), atol=1e-6, rtol=1e-6)
    assert got.mask.tolist() == [[True, True], [True, False], [True, False]]
    ends = [[3, 5], [2, 0], [2, 0]]
    assert got.ends.tolist() == [
        [e + s if real else 0 for e, real in zip(row, keep, strict=True)]
        for row, s, keep in zip(ends, shift, got.mask.tolist(), strict=True)
    ]


def test_where_there_is_no_step_everything_is_zero():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    policy, reference = (LogLikelihood.from_per_unit(torch.full((2, 3), x), mask) for x in (-1.0, -3.0))
    marks = torch.tensor([[False] * 3, [True, False, False]])
    got = implicit_process_reward(policy, reference, beta=1.0, boundaries=marks)
    assert got.single.tolist() == [[2.0, 0.0], [2.0, 4.0]]
    assert got.cumulative.tolist() == [[2.0, 0.0], [2.0, 6.0]]
    assert got.ends.tolist() == [[0, 0], [0, 2]]


def test_process_rewards_keep_gradient_and_dtype():
    mask = torch.ones(1, 3, dtype=torch.bool)
    terms = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    policy, reference = LogLikelihood.from_per_unit(terms, mask), LogLikelihood.from_per_unit(terms.detach(), mask)
    marks = torch.tensor([[False, True, False]])
    got = implicit_process_reward(policy, reference, beta=0.5, boundaries=marks)
    assert got.single.dtype == torch.float32
    assert got.kind is Kind.EXACT
    assert got.single.tolist() == [[0.0, 0.0]]  # policy = reference
    (grad,) = torch.autograd.grad(got.single[0, 1], terms)
    assert grad.tolist() == [[0.0, 0.0, 0.5]]


def test_long_responses_are_summed_in_double():
    """A small step after two thousand large tokens: float32 running sums would lose it in their rounding."""
    count = 2001
    terms = torch.full((1, count), -1000.1)
    terms[0, -1] = -1e-3
    mask = torch.ones(1, count, dtype=torch.bool)
    marks = torch.zeros_like(mask)
    marks[0, -2] = True
    policy = LogLikelihood.from_per_unit(terms, mask)
    reference = LogLikelihood.from_per_unit(torch.zeros(1, count), mask)
    got = implicit_process_reward(policy, reference, beta=1.0, boundaries=marks)
    assert got.single[0, 1].item() == pytest.approx(-1e-3, rel=1e-6)


def test_boundaries_that_do_not_fit_are_refused():
    mask = torch.tensor([[False, True, True]])
    terms = LogLikelihood.from_per_unit(torch.full((1, 3), -1.0), mask)
    with pytest.raises(RowError, match="row 0: a step ends in column 0, whose token is not scored"):
        implicit_process_reward(terms, terms, beta=1.0, boundaries=torch.tensor([[True, False, True]]))
    for wrong in (mask[:, :2], mask.int()):
        with pytest.raises(InputError, match="boundaries must be bool of shape"):
            implicit_process_reward(terms, terms, beta=1.0, boundaries=wrong)
    nothing = LogLikelihood.from_per_unit(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(RowError, match="row 0: has no scored token"):
        implicit_process_reward(nothing, nothing, beta=1.0, boundaries=torch.zeros(1, 2, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------- scores of responses
STEPS = torch.tensor([[1.0, -2.0, 9.0], [0.5, 0.25, math.nan], [-1.0, math.inf, 0.0]])
REAL = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("min", [-2.0, 0.25, -1.0]), ("sum", [8.0, 0.75, -1.0]), ("mean", [8 / 3, 0.375, -1.0])]
)
def test_aggregates_over_the_steps_that_are(aggregate, expected):
    torch.testing.assert_close(score_steps(STEPS, REAL, aggregate), torch.tensor(expected))
    assert score_steps(STEPS, REAL).equal(score_steps(STEPS, REAL, "min"))


def test_ranking_by_min_and_sum_does_not_depend_on_beta():
    policy, reference = likelihood(table(5)), likelihood(table(6))
    marks = torch.zeros(len(SEQUENCES), T, dtype=torch.bool)
    marks[:, [0, 2]] = True
    for aggregate in ("min", "sum"):
        order = [
            score_steps(r.single, r.mask, aggregate).argsort(stable=True).tolist()
            for beta in (1e-3, 0.05, 4.0)
            if (r := implicit_process_reward(policy, reference, beta=beta, boundaries=marks))
        ]
        assert order[0] == order[1] == order[2]


def test_scores_refuse_what_is_no_step():
    with pytest.raises(InputError, match="aggregate must be one of min, sum, mean, got 'max'"):
        score_steps(STEPS, REAL, "max")
    with pytest.raises(InputError, match="bool mask of their shape"):
        score_steps(STEPS, REAL[:, :2])
    with pytest.raises(RowError, match="row 2: has no step"):
        score_steps(STEPS, REAL & torch.tensor([[True], [True], [False]]))
    with pytest.raises(RowError, match="row 1: the reward of step 2 is nan"):
        score_steps(STEPS, REAL | torch.tensor([[False], [True], [False]]))
