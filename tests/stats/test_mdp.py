"""Soft value iteration against sums over all sequences, and every identity of reading a policy as Q-values."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.decoding.beam import beam_search
from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.stats.mdp import (
    all_sequences,
    enumerate_conditionals,
    path_sums,
    policy_values,
    soft_value_iteration,
)
from zoo import CAUSAL, build

V, T, EOS = 4, 5, 2
Steps = list[torch.Tensor]


def world(seed: int, *, vocabulary: int = V, horizon: int = T) -> tuple[Steps, Steps]:
    """A Dirichlet(1) reference after every prefix, and normal token rewards."""
    generator = torch.Generator().manual_seed(seed)
    reference, rewards = [], []
    for t in range(horizon):
        draws = -torch.rand(vocabulary**t, vocabulary, dtype=torch.float64, generator=generator).log()
        reference.append((draws / draws.sum(1, keepdim=True)).log())
        rewards.append(torch.randn(vocabulary**t, vocabulary, dtype=torch.float64, generator=generator))
    return reference, rewards


def combined(f, *quantities):
    return [f(*step) for step in zip(*quantities, strict=True)]


def over(horizon: int = T, vocabulary: int = V, eos: int | None = EOS) -> Steps:
    """Whether a prefix has ended, found sequence by sequence."""
    prefixes = [all_sequences(vocabulary, t) for t in range(horizon)]
    return [torch.tensor([eos in prefix for prefix in level]) for level in prefixes]


def close(a, b, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


eos_or_not = pytest.mark.parametrize("eos", [None, EOS])


@eos_or_not
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_optimum_over_whole_sequences(eos, beta):
    """pi* = pi_ref exp(r / beta) / Z and V*(s_1) = beta log Z, with Z summed over every sequence there is."""
    reference, rewards = world(0)
    solution = soft_value_iteration(reference, rewards, beta=beta, eos_id=eos)
    sequences = all_sequences(V, T, eos_id=eos)
    log_ref, returns = path_sums(reference, sequences), path_sums(rewards, sequences)
    assert log_ref.exp().sum().item() == pytest.approx(1.0)
    log_z = (log_ref + returns / beta).logsumexp(0)
    close(path_sums(solution.log_policy, sequences), log_ref + returns / beta - log_z)
    close(solution.values[0], (beta * log_z).reshape(1))
    # It is the best there is: the objective at pi* is V*, and any other policy has less, by beta KL(pi || pi*).
    for policy in (solution.log_policy, reference, world(1)[0]):
        log_p = path_sums(policy, sequences)
        objective = (log_p.exp() * (returns - beta * (log_p - log_ref))).sum()
        gap = beta * (log_p.exp() * (log_p - path_sums(solution.log_policy, sequences))).sum()
        assert objective.item() == pytest.approx(float(solution.values[0] - gap), abs=1e-12)


@eos_or_not
def test_the_bellman_equations(eos):
    """V = beta log sum exp(Q / beta), pi = exp((Q - V) / beta), Q = r + beta log pi_ref + V', where nothing ended."""
    reference, rewards = world(2)
    beta = 0.5
    solution = soft_value_iteration(reference, rewards, beta=beta, eos_id=eos)
    for t, ended in enumerate(over(eos=eos)):
        live = ~ended
        q, v, after = solution.q_values[t], solution.values[t], solution.values[t + 1].reshape(-1, V)
        close(v[live], beta * (q[live] / beta).logsumexp(1))
        close(solution.log_policy[t][live], (q[live] - v[live, None]) / beta)
        close(q[live], (rewards[t] + beta * reference[t] + after)[live])
        assert (v[ended] == 0).all()
        if eos is not None:
            assert (after[:, eos] == 0).all()
    assert (solution.values[T] == 0).all()


@eos_or_not
def test_credit_per_token_telescopes_to_the_return(eos):
    """beta log(pi*/pi_ref) = r + V' - V at every step; sums of rewards are V*(s_1) plus sums of credit."""
    reference, rewards = world(3)
    beta = 0.7
    solution = soft_value_iteration(reference, rewards, beta=beta, eos_id=eos)
    ratio = combined(lambda p, q: beta * (p - q), solution.log_policy, reference)
    for t, (step, ended) in enumerate(zip(ratio, over(eos=eos), strict=True)):
        close(solution.credit[t], step)
        gain = rewards[t] + solution.values[t + 1].reshape(-1, V) - solution.values[t][:, None]
        close(step[~ended], gain[~ended])
        close(step[ended], torch.zeros_like(step[ended]))
    sequences = all_sequences(V, T, eos_id=eos)
    close(path_sums(rewards, sequences), solution.values[0] + path_sums(ratio, sequences))


@eos_or_not
def test_potentials_change_neither_policy_nor_credit(eos):
    """r + phi(s') - phi(s) with phi = 0 where a sequence has ended."""
    reference, rewards = world(4)
    potentials = [torch.randn(V**t, dtype=torch.float64, generator=torch.Generator().manual_seed(t)) for t in range(T)]
    potentials = [phi.masked_fill(ended, 0.0) for phi, ended in zip(potentials, over(eos=eos), strict=True)]
    potentials.append(torch.zeros(V**T, dtype=torch.float64))
    shaped = [r + potentials[t + 1].reshape(-1, V) - potentials[t][:, None] for t, r in enumerate(rewards)]
    plain = soft_value_iteration(reference, rewards, beta=0.4, eos_id=eos)
    other = soft_value_iteration(reference, shaped, beta=0.4, eos_id=eos)
    for t in range(T):
        close(other.log_policy[t], plain.log_policy[t])
        close(other.credit[t], plain.credit[t])
        close(other.values[t], plain.values[t] - potentials[t])
    # The credit is such a reward itself: it has the same optimum, with V* = 0.
    own = soft_value_iteration(reference, plain.credit, beta=0.4, eos_id=eos)
    for t in range(T):
        close(own.log_policy[t], plain.log_policy[t])
        close(own.values[t], torch.zeros_like(own.values[t]))


def test_search_by_likelihood_is_search_by_return_and_value():
    """For every prefix: partial sum of r + beta log pi_ref, plus V*, is V*(s_1) + beta log pi* of the prefix."""
    reference, rewards = world(5)
    beta = 0.3
    solution = soft_value_iteration(reference, rewards, beta=beta)
    paid = combined(lambda r, p: r + beta * p, rewards, reference)
    for t in range(T + 1):
        prefixes = all_sequences(V, t)
        guided = path_sums(paid, prefixes) + solution.values[t]
        close(guided, solution.values[0] + beta * path_sums(solution.log_policy, prefixes))


def test_the_mean_credit_under_the_reference_is_minus_beta_kl():
    reference, rewards = world(6)
    beta = 0.6
    for eos in (None, EOS):
        solution = soft_value_iteration(reference, rewards, beta=beta, eos_id=eos)
        sequences = all_sequences(V, T, eos_id=eos)
        log_ref, log_pi = path_sums(reference, sequences), path_sums(solution.log_policy, sequences)
        kl = (log_ref.exp() * (log_ref - log_pi)).sum()
        mean = (log_ref.exp() * path_sums(solution.credit, sequences)).sum()
        assert kl > 0.1
        assert mean.item() == pytest.approx(-beta * kl.item(), abs=1e-12)
        assert policy_values(reference, solution.credit, eos_id=eos)[0].item() == pytest.approx(mean.item(), abs=1e-12)


def test_a_large_beta_leaves_the_reference_and_its_advantages():
    """beta -> infinity: pi* -> pi_ref, and credit -> r + V_ref(s') - V_ref(s)."""
    reference, rewards = world(7)
    for eos in (None, EOS):
        solution = soft_value_iteration(reference, rewards, beta=1e6, eos_id=eos)
        values = policy_values(reference, rewards, eos_id=eos)
        for t, ended in enumerate(over(eos=eos)):
            live = ~ended
            close(solution.log_policy[t], reference[t], atol=1e-4)
            close(solution.values[t], values[t], atol=1e-4)
            advantage = rewards[t] + values[t + 1].reshape(-1, V) - values[t][:, None]
            close(solution.credit[t][live], advantage[live], atol=1e-4)


def test_a_small_beta_is_greedy_control():
    """beta -> 0: all mass on the best return, and V* is that return."""
    reference, rewards = world(8)
    for eos in (None, EOS):
        sequences = all_sequences(V, T, eos_id=eos)
        returns = path_sums(rewards, sequences)
        solution = soft_value_iteration(reference, rewards, beta=1e-4, eos_id=eos)
        assert solution.values[0].item() == pytest.approx(returns.max().item(), abs=1e-2)
        log_pi = path_sums(solution.log_policy, sequences)
        assert log_pi.argmax() == returns.argmax()
        assert log_pi.max().exp() > 0.999
        assert solution.credit[0].isfinite().all()


def test_expected_returns_by_enumeration():
    reference, rewards = world(9)
    for eos in (None, EOS):
        sequences = all_sequences(V, T, eos_id=eos)
        wanted = (path_sums(reference, sequences).exp() * path_sums(rewards, sequences)).sum()
        values = policy_values(reference, rewards, eos_id=eos)
        assert values[0].item() == pytest.approx(wanted.item(), abs=1e-12)
        # From a prefix: of the sequences that begin with it, by their conditional probabilities.
        prefix = (3, 1)
        tails = [s for s in sequences if s[:2] == prefix]
        log_p = path_sums(reference, tails) - path_sums(reference, [prefix])
        wanted = (log_p.exp() * (path_sums(rewards, tails) - path_sums(rewards, [prefix]))).sum()
        assert values[2][3 * V + 1].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_an_impossible_token_stays_impossible():
    reference, rewards = world(10, vocabulary=3, horizon=3)
    banned = [p.clone() for p in reference]
    for p in banned:
        p[:, 1] = -math.inf
    banned = [p.log_softmax(1) for p in banned]
    solution = soft_value_iteration(banned, rewards, beta=0.5)
    for t in range(3):
        assert (solution.log_policy[t][:, 1] == -math.inf).all()
        assert solution.values[t].isfinite().all()
        assert solution.credit[t].isfinite().all()
        close(solution.log_policy[t].exp().sum(1), torch.ones(3**t, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_rewards_of_ten_thousand_stay_finite(size):
    reference, rewards = world(11, vocabulary=3, horizon=3)
    solution = soft_value_iteration(reference, [size * r for r in rewards], beta=1.0)
    for quantity in (solution.values, solution.q_values, solution.log_policy, solution.credit):
        assert all(step.isfinite().all() for step in quantity)


def test_beam_search_finds_the_optimum_more_often_the_wider_it_is():
    """60 random worlds: the sequence that is best by r + beta log pi_ref; found by a beam on log pi* alone."""
    prompt, found = TokenBatch.from_lists([[0]], starts=[1]), {1: 0, 2: 0, 5: 0}
    sequences = all_sequences(V, T)
    for seed in range(60):
        reference, rewards = world(200 + seed)
        solution = soft_value_iteration(reference, rewards, beta=0.5)
        best = (path_sums(rewards, sequences) + 0.5 * path_sums(reference, sequences)).argmax()
        for width in found:
            beams = beam_search(solution, prompt, width=width, max_tokens=T)
            found[width] += tuple(beams.best()[0]) == sequences[int(best)]
            if width == 5:
                wanted = path_sums(solution.log_policy, beams.best())
                close(beams.scores[:1], wanted)
    assert found[1] < found[2] < found[5]
    assert found[5] >= 57


def test_the_conditionals_of_a_network():
    """What is enumerated is what the model gives to strings, and the solution is a model to decode."""
    model = CausalLM(build(CAUSAL["llama"], V))
    prompt = TokenBatch.from_lists([[1, 3]])
    reference = enumerate_conditionals(model, prompt, horizon=4)
    assert [tuple(step.shape) for step in reference] == [(1, 4), (4, 4), (16, 4), (64, 4)]
    sequences = all_sequences(V, 4, eos_id=EOS)
    with torch.no_grad():
        rows = [[1, 3, *s] for s in sequences]
        value = model.log_prob(TokenBatch.from_lists(rows, starts=[2] * len(rows))).value.double()
    close(path_sums(reference, sequences), value, atol=1e-4)
    solution = soft_value_iteration(reference, [torch.zeros_like(p) for p in reference], beta=1.0, eos_id=EOS)
    prefixes = TokenBatch.from_lists([[1, 3, 0, 1], [1, 3], [1, 3, 3]], starts=[2, 2, 2], padding_side="left")
    with torch.no_grad():
        close(solution.next_log_probs(prefixes), model.next_log_probs(prefixes).double(), atol=1e-5)
    with pytest.raises(InputError, match="row 1 has 4 tokens, and sequences end after 4"):
        solution.next_log_probs(TokenBatch.from_lists([[1, 3], [1, 3, 0, 0, 0, 0]], starts=[2, 2]))


def test_all_sequences():
    assert all_sequences(2, 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all_sequences(3, 2, eos_id=1) == [(1,), (0, 1), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    assert path_sums(world(12)[1], []).tolist() == []


def test_refusals():
    reference, rewards = world(13, vocabulary=3, horizon=3)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="beta must be positive and finite"):
            soft_value_iteration(reference, rewards, beta=beta)
    bad = [reference[0], reference[1] + torch.tensor([[0.0], [0.0], [0.1]]), reference[2]]
    with pytest.raises(InputError, match="the probabilities at step 1 after prefix 2 do not sum to 1"):
        soft_value_iteration(bad, rewards, beta=1.0)
    with pytest.raises(InputError, match="those of step 2 are not all finite"):
        soft_value_iteration(reference, [*rewards[:2], rewards[2] * math.nan], beta=1.0)
    with pytest.raises(InputError, match="must have the same shapes"):
        soft_value_iteration(reference, rewards[:2], beta=1.0)
    with pytest.raises(InputError, match="must have the same shapes"):
        policy_values(reference[:2], rewards)
    with pytest.raises(InputError, match=r"rewards must have shape \(3, 3\) at step 1, got \(9, 3\)"):
        soft_value_iteration(reference, [rewards[0], rewards[2]], beta=1.0)
    with pytest.raises(InputError, match="for every step"):
        soft_value_iteration([], [], beta=1.0)
    with pytest.raises(InputError, match="a sequence has 4 tokens, and there are 3 steps"):
        path_sums(rewards, [(0, 0, 0, 0)])
    model = CausalLM(build(CAUSAL["llama"], 300))
    with pytest.raises(InputError, match="300 tokens and 9 steps are too many to enumerate"):
        enumerate_conditionals(model, TokenBatch.from_lists([[1]]), horizon=9)
    with pytest.raises(InputError, match="continues one prompt by at least one token; got 2 by 1"):
        enumerate_conditionals(model, TokenBatch.from_lists([[1], [2]]), horizon=1)
    with pytest.raises(InputError, match="enumeration needs per-token conditionals"):
        enumerate_conditionals(object(), TokenBatch.from_lists([[1]]), horizon=1)
