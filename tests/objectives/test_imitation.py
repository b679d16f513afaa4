"""SequenceMatch against enumeration of a small decision process, its limits, and the corruption of its data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import chisquare

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.objectives.imitation import Trajectories, _phi, insert_backspaces, sequence_match

DIVERGENCES = ["chi2", "le_cam", "kl", "js", "hellinger"]
GAMMA = 0.9

# A decision process: states "", "a", "b"; actions a, b, end; after two actions it is over. Trajectories have different
# lengths, so that policies differ in how many actions they take.
TRAJECTORIES = [[2], *([x, y] for x in (0, 1) for y in (0, 1, 2))]
ACTIONS = torch.tensor([t + [0] * (2 - len(t)) for t in TRAJECTORIES])
MASK = torch.tensor([[True] * len(t) + [False] * (2 - len(t)) for t in TRAJECTORIES])
STATES = torch.tensor([[0, 1 + t[0] if len(t) > 1 else 0] for t in TRAJECTORIES])
DATA = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.05, 0.25]], dtype=torch.float64)


def probabilities(policy):
    """(7,) of every trajectory under a policy (states, actions)."""
    return policy[STATES, ACTIONS].masked_fill(~MASK, 1.0).prod(1)


def occupancy(policy):
    """(states, actions) discounted visits, unnormalised."""
    first = policy[0]
    return torch.stack([first, GAMMA * first[0] * policy[1], GAMMA * first[1] * policy[2]])


def distance(divergence, d, m):
    """D between occupancies of data d and model m, by the usual definitions."""
    if divergence == "chi2":
        return ((d - m).square() / d).sum()
    if divergence == "le_cam":
        half = (d + m) / 2
        return 2 * ((d - half).square() / half).sum()
    if divergence == "kl":
        return (m * (m / d).log() - m + d).sum()
    if divergence == "js":
        half = (d + m) / 2
        return (d * (d / half).log() + m * (m / half).log()).sum()
    return (d.sqrt() - m.sqrt()).square().sum()


def expected(terms, on_data, on_model):
    """The loss under exact distributions over all trajectories."""
    total = (on_data * terms.loss).sum()
    return total + sum((on_model * part.loss).sum() for part in terms.also)


def loss_of(table, on_model, **options):
    trajectories = Trajectories.from_logits(table[STATES], ACTIONS, MASK)
    return expected(sequence_match(trajectories, trajectories, gamma=GAMMA, **options), probabilities(DATA), on_model)


def least(function, start):
    """The minimum of a function of a (3, 3) table, in float64."""

    def value_and_gradient(x):
        leaf = torch.tensor(x, requires_grad=True)
        value = function(leaf.view(3, 3))
        value.backward()
        return value.item(), leaf.grad.numpy()

    found = minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000})
    return torch.tensor(found.x).view(3, 3), found.fun


def direct(divergence, alpha):
    """The policy that minimises D - alpha H over tables, and the minimum."""

    def function(table):
        policy = table.softmax(-1)
        model = occupancy(policy)
        return distance(divergence, occupancy(DATA), model) + alpha * (model * policy.log()).sum()

    table, value = least(function, np.zeros(9))
    return table.softmax(-1), value


# ------------------------------------------------------------------ the enumerated process
@pytest.mark.parametrize("alpha", [0.05, 1.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_optimum_minimises_the_divergence_less_the_entropy(divergence, alpha):
    """Policy and value: the loss's minimum is minus that of D - alpha H, over alpha."""
    policy, value = direct(divergence, alpha)
    # The value terms telescope, so that any occupancy will do for the model's.
    on_model = probabilities(torch.full((3, 3), 1 / 3, dtype=torch.float64))
    start = np.random.default_rng(0).normal(size=9)
    table, loss = least(lambda t: loss_of(t, on_model, divergence=divergence, alpha=alpha), start)
    torch.testing.assert_close(table.softmax(-1), policy, atol=1e-6, rtol=0)
    assert -alpha * loss == pytest.approx(value, abs=1e-9)
    assert (policy - DATA).abs().max() > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vanishing_alpha_gives_the_conditionals_of_the_data(divergence):
    on_model = probabilities(DATA)
    table, _ = least(lambda t: loss_of(t, on_model, divergence=divergence, alpha=1e-4), np.zeros(9))
    torch.testing.assert_close(table.softmax(-1), DATA, atol=1e-4, rtol=0)


def fixed_point(alpha):
    """Of the mixture's loss: the model's occupancies are refreshed, with damping, until they stay."""
    table = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(100):
        on_model = probabilities(table.softmax(-1))
        options = {"divergence": "chi2_mixture", "alpha": alpha}
        new, _ = least(lambda t, on_model=on_model, options=options: loss_of(t, on_model, **options), table.flatten())
        moved, table = (new - table).abs().max(), (new + table) / 2
        if moved < 2e-5:
            break
    return table


@pytest.mark.parametrize(("alpha", "gap"), [(0.1, 2e-3), (1.0, 5e-2)])
def test_fixed_points_of_the_mixture(alpha, gap):
    """The reward is 2 (rho_data - rho) / (rho_data + rho); the policy is near the minimum of D - alpha H, not at it.

    The model's states are constants of the loss, and what the policy does to their penalty is lost.
    """
    table = fixed_point(alpha)
    policy = table.softmax(-1)
    data, model = occupancy(DATA), occupancy(policy)
    values = table.logsumexp(-1)
    following = torch.zeros(3, 3, dtype=torch.float64)
    following[0, :2] = values[1:]
    reward = alpha * (table - GAMMA * following)
    torch.testing.assert_close(reward, 2 * (data - model) / (data + model), atol=1e-4, rtol=0)
    best, value = direct("le_cam", alpha)
    assert gap / 10 < (policy - best).abs().max() < gap
    reached = distance("le_cam", data, model) + alpha * (model * policy.log()).sum()
    assert value < reached < value + gap


# ------------------------------------------------------------------ identities
def random_trajectories(seed=0, rows=4, width=6, actions=5, *, grad=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, actions, generator=generator, dtype=torch.float64).requires_grad_(grad)
    taken = torch.randint(actions, (rows, width), generator=generator)
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[:, 2] = True
    return logits, taken, mask


def test_values_by_loops():
    logits, taken, mask = random_trajectories()
    got = Trajectories.from_logits(logits, taken, mask)
    for b in range(4):
        steps = mask[b].nonzero().flatten().tolist()
        for i, t in enumerate(steps):
            value = math.log(sum(math.exp(x) for x in logits[b, t].tolist()))
            assert got.values[b, t].item() == pytest.approx(value)
            assert got.action_logits[b, t] == logits[b, t, taken[b, t]]
            after = got.values[b, steps[i + 1]] if i + 1 < len(steps) else 0.0
            assert got.next_values[b, t] == after
            assert got.discounts(0.8)[b, t].item() == pytest.approx(0.8**i)
    for part in (got.action_logits, got.values, got.next_values, got.discounts(0.8)):
        assert (part[~mask] == 0).all()


@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_telescoping(gamma):
    """sum_t gamma^t (V(s_t) - gamma V(s_t+1)) = V(s_0) for every trajectory."""
    logits, taken, mask = random_trajectories(1)
    found = Trajectories.from_logits(logits, taken, mask)
    total = (found.discounts(gamma) * (found.values - gamma * found.next_values)).sum(1)
    start = logits.logsumexp(-1).gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(total, start)


def discounted_nll(logits, taken, mask, gamma):
    step = mask.cumsum(1) - 1
    nll = -logits.log_softmax(-1).gather(-1, taken[..., None])[..., 0]
    return (nll * gamma**step * mask).sum(1)


@pytest.mark.parametrize("divergence", ["chi2_mixture", *DIVERGENCES])
@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_without_entropy_it_is_discounted_maximum_likelihood(divergence, gamma):
    """alpha = 0 and the value term on the data alone: values and gradients."""
    logits, taken, mask = random_trajectories(2, grad=True)
    want = discounted_nll(logits, taken, mask, gamma)
    terms = sequence_match(Trajectories.from_logits(logits, taken, mask), divergence=divergence, alpha=0.0, gamma=gamma)
    torch.testing.assert_close(terms.loss, want)
    got, reference = (torch.autograd.grad(x.sum(), logits)[0] for x in (terms.loss, want))
    torch.testing.assert_close(got, reference)
    tiny = sequence_match(
        Trajectories.from_logits(logits, taken, mask),
        divergence="chi2" if divergence == "chi2_mixture" else divergence,
        alpha=1e-9,
        gamma=gamma,
    )
    torch.testing.assert_close(tiny.loss, want, atol=1e-6, rtol=0)


def test_the_value_term_is_the_same_on_data_and_model():
    """With exact occupancies and fixed logits, both averages are E[V(s_0)]: only their variance differs."""
    table = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trajectories = Trajectories.from_logits(table[STATES], ACTIONS, MASK)
    options = {"divergence": "chi2", "alpha": 0.3, "gamma": GAMMA}
    on_data, on_model = probabilities(DATA), probabilities(table.softmax(-1))
    both = expected(sequence_match(trajectories, trajectories, **options), on_data, on_model)
    alone = expected(sequence_match(trajectories, **options), on_data, on_model)
    torch.testing.assert_close(both, alone)


def test_mixture_by_the_formula():
    """-E_D[d] + E_D[V - gamma V'] / 2 + E_M[V - gamma V'] / 2 + alpha / 4 (E_D[d^2] + E_M[d^2])."""
    data = Trajectories.from_logits(*random_trajectories(4))
    rollouts = Trajectories.from_logits(*random_trajectories(5, rows=3, width=5))
    for discounted in (True, False):

        def mean(x, of, discounted=discounted):
            return (of.discounts(0.8 if discounted else 1.0) * x).sum(1).mean()

        d, e = (t.action_logits - 0.8 * t.next_values for t in (data, rollouts))
        v, w = (t.values - 0.8 * t.next_values for t in (data, rollouts))
        want = -mean(d, data) + 0.5 * mean(v, data) + 0.5 * mean(w, rollouts)
        want = want + 0.05 * (mean(d.square(), data) + mean(e.square(), rollouts))
        got = sequence_match(data, rollouts, alpha=0.2, gamma=0.8, discount_positions=discounted)
        torch.testing.assert_close(got.mean(), want)
    torch.testing.assert_close(got.metrics["reward"], 0.2 * d.mul(data.mask).sum(1) / data.mask.sum(1))
    torch.testing.assert_close(got.metrics["rollout_reward"], 0.2 * e.mul(rollouts.mask).sum(1) / rollouts.mask.sum(1))
    nats = (data.values - data.action_logits).mul(data.mask).sum(1) / data.mask.sum(1)
    torch.testing.assert_close(got.metrics["nats_per_action"], nats)
    first = data.values.gather(1, data.mask.int().argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(got.metrics["start_value"], first)


def test_weights_and_metrics_are_detached():
    logits, taken, mask = random_trajectories(6, grad=True)
    found = Trajectories.from_logits(logits, taken, mask)
    terms = sequence_match(found, found)
    assert not any(value.requires_grad for value in terms.metrics.values())
    assert not any(part.weight.requires_grad for part in terms.parts())
    assert all(part.loss.requires_grad for part in terms.parts())


def test_a_constant_on_the_logits_changes_the_loss_but_not_the_policy():
    """J is not shift-invariant: values count."""
    logits, taken, mask = random_trajectories(7)
    shifted = logits + torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    torch.testing.assert_close(shifted.softmax(-1), logits.softmax(-1))
    for divergence in ("chi2_mixture", *DIVERGENCES):
        one, two = (
            sequence_match(t, t, divergence=divergence, alpha=0.5).mean()
            for t in (Trajectories.from_logits(x, taken, mask) for x in (logits, shifted))
        )
        assert (one - two).abs() > 1e-3


# ------------------------------------------------------------------ phi
PLAIN = {
    "chi2": lambda x: x - x * x / 4,
    "le_cam": lambda x: 4 * torch.sqrt(1 + x) - 4 - x,
    "kl": lambda x: 1 - torch.exp(-x),
    "js": lambda x: torch.log(2 - torch.exp(-x)),
    "hellinger": lambda x: x / (1 + x),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_phi(divergence):
    """Its formula, phi(0) = 0 and phi'(0) = 1, and its conjugate: sup_x phi(x) - u x is the divergence's f(u)."""
    x = torch.linspace(-0.6, 3.0, 37, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_phi(divergence, x, 100.0), PLAIN[divergence](x))
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = _phi(divergence, zero, 100.0)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), zero)[0].item() == 1
    grid = torch.linspace(-2.5, 40.0, 400001, dtype=torch.float64)
    for u in (0.3, 0.9, 1.0, 2.0):
        best = (_phi(divergence, grid, 100.0) - u * grid).max().item()
        want = distance(divergence, torch.ones(1, dtype=torch.float64), torch.full((1,), u, dtype=torch.float64))
        assert best == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("max_ratio", [3.0, 100.0])
def test_phi_goes_on_as_its_tangent(divergence, max_ratio):
    """Concave everywhere, its slope never above the limit (but for chi2), finite for arguments of 1e4."""
    x = torch.linspace(-5.0, 5.0, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_phi(divergence, x, max_ratio).sum(), x)
    assert (slope.diff() <= 1e-9).all()
    assert max_ratio == 100.0 or abs(slope.diff()).max() < 0.2
    if divergence != "chi2":
        assert slope.max() == max_ratio
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = _phi(divergence, far, max_ratio)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), far)[0].isfinite().all()


@pytest.mark.parametrize("divergence", ["chi2_mixture", *DIVERGENCES])
def test_gradients_by_finite_differences_and_extremes(divergence):
    logits, taken, mask = random_trajectories(9, rows=2, width=4, actions=3, grad=True)

    def function(z):
        found = Trajectories.from_logits(z, taken, mask)
        terms = sequence_match(found, found, divergence=divergence, alpha=0.4)
        return terms.mean()

    assert torch.autograd.gradcheck(function, [logits])
    large = (1e4 * logits.detach()).float().requires_grad_()
    value = function(large)
    assert value.isfinite()
    assert torch.autograd.grad(value, large)[0].isfinite().all()


def test_impossible_actions_that_are_not_taken_do_no_harm():
    """-inf for a backspace at the empty prefix: the value is that of the other actions, with finite gradients."""
    logits, taken, mask = random_trajectories(10, grad=True)
    taken = taken.clamp(max=3)
    blocked = logits.clone()
    blocked[:, :, 4] = -math.inf
    loss, want = (
        sequence_match(t, t).mean()
        for t in (
            Trajectories.from_logits(blocked, taken, mask),
            Trajectories.from_logits(logits[..., :4], taken, mask),
        )
    )
    torch.testing.assert_close(loss, want)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_half_precision_is_widened_and_padding_ignored():
    logits, taken, mask = random_trajectories(11)
    logits[~mask] = math.nan
    taken[~mask] = -100
    found = Trajectories.from_logits(logits.bfloat16(), taken, mask)
    assert found.values.dtype == torch.float32
    assert sequence_match(found, found).mean().isfinite()


def test_refusals():
    logits, taken, mask = random_trajectories(12)
    found = Trajectories.from_logits(logits, taken, mask)
    cases = [
        ({"divergence": "tv"}, "divergence must be one of chi2_mixture"),
        ({"alpha": -1.0}, "alpha must lie between 0"),
        ({"alpha": math.nan}, "alpha must lie between 0"),
        ({"gamma": 1.1}, "gamma must lie between 0 and 1"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"max_ratio": 1.0}, "max_ratio must lie"),
    ]
    for options, match in cases:
        with pytest.raises(InputError, match=match):
            sequence_match(found, found, **options)
    with pytest.raises(InputError, match="chi2_mixture divergence needs rollouts; give some, or take 'chi2'"):
        sequence_match(found)
    with pytest.raises(InputError, match="needs unnormalised logits"):
        Trajectories.from_logits(logits.log_softmax(-1), taken, mask)
    with pytest.raises(InputError, match=r"needs logits \(B, T, A\)"):
        Trajectories.from_logits(logits, taken[:, 1:], mask)
    with pytest.raises(InputError, match="row 1 has no action"):
        Trajectories.from_logits(logits, taken, mask & (torch.arange(4) != 1)[:, None])
    with pytest.raises(InputError, match="there is no action"):
        Trajectories.from_logits(logits[:0], taken[:0], mask[:0])
    impossible = logits.clone()
    impossible[2, 2, taken[2, 2]] = -math.inf
    with pytest.raises(InputError, match="action_logits of row 2, column 2 is -inf; leave out trajectories"):
        Trajectories.from_logits(impossible, taken, mask)
    with pytest.raises(InputError, match="tensors of one shape"):
        Trajectories(found.values, found.values, found.values[:, 1:], found.mask)


# ------------------------------------------------------------------ corruption of data
ROWS = [[5, 6, 7, 8, 2], [9, 5, 6, 2], [7, 8, 9, 5, 6, 7, 8, 2]]
STARTS = [2, 1, 3]
BACKSPACE = 30


def corrupted(rate, seed=0, side="right", rows=ROWS, starts=STARTS):
    x = TokenBatch.from_lists(rows, starts=starts, padding_side=side, pad_id=4)
    generator = torch.Generator().manual_seed(seed)
    return insert_backspaces(x, backspace_id=BACKSPACE, tokens=range(5, 15), rate=rate, generator=generator)


def unpadded(x):
    return [
        (ids[real].tolist(), scored[real].tolist())
        for ids, real, scored in zip(x.ids, x.attention_mask, x.scored_mask, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_backspaces_undo_what_was_inserted(side, rate):
    """Wrong tokens are no targets, backspaces and the data's own tokens are; the prompt stays as it is."""
    x = corrupted(rate, side=side)
    assert x.starts.tolist() == STARTS
    pairs = 0
    for (ids, scored), row, start in zip(unpadded(x), ROWS, STARTS, strict=True):
        stack, targets = [], []
        for token, is_target in zip(ids, scored, strict=True):
            if token == BACKSPACE:
                assert is_target
                assert targets.pop() is False
                wrong = stack.pop()
                pairs += 1
                assert wrong in range(5, 15)
                assert wrong != row[len(stack)], "the right token is no mistake"
                assert len(stack) >= start
            else:
                stack.append(token)
                targets.append(is_target)
        assert stack == row
        assert targets == [False] * start + [True] * (len(row) - start)
    assert pairs == {0.0: 0, 1.0: 11}.get(rate, pairs)
    assert 0.0 < rate < 1.0 or pairs in (0, 11)


def test_inserted_tokens_are_uniform_over_the_others_and_as_frequent_as_asked():
    """Chi-square and binomial tests at level 1e-4, one seed; a right token outside the choice leaves all of it."""
    rows = [[3, *([7] * 2000)], [3, *([20] * 2000)]]
    x = corrupted(0.3, seed=1, rows=rows, starts=[1, 1])
    for (ids, _), right in zip(unpadded(x), (7, 20), strict=True):
        wrong = [ids[i - 1] for i, token in enumerate(ids) if token == BACKSPACE]
        assert abs(len(wrong) - 600) < 3.9 * math.sqrt(2000 * 0.3 * 0.7)
        others = [token for token in range(5, 15) if token != right]
        counts = [wrong.count(token) for token in others]
        assert sum(counts) == len(wrong)
        assert chisquare(counts).pvalue > 1e-4


def test_corruption_repeats_with_its_generator_and_keeps_unscored_completions():
    assert corrupted(0.5, seed=3).ids.equal(corrupted(0.5, seed=3).ids)
    x = TokenBatch.from_lists(ROWS, starts=STARTS, scored_from=[4, 3, 7])
    y = insert_backspaces(x, backspace_id=BACKSPACE, tokens=[5, 6], rate=1.0)
    assert [sum(scored) for _, scored in unpadded(y)] == [2, 2, 2]
    assert y.starts.tolist() == STARTS


def test_corruption_refusals():
    for rate in (-0.1, 1.1):
        with pytest.raises(InputError, match="rate must lie between 0 and 1"):
            corrupted(rate)
    x = TokenBatch.from_lists(ROWS, starts=STARTS)
    for tokens in ([5], [5, 5], [5, 6, BACKSPACE]):
        with pytest.raises(InputError, match="at least two tokens to insert, none of them the backspace"):
            insert_backspaces(x, backspace_id=BACKSPACE, tokens=tokens, rate=0.1)
    with pytest.raises(InputError, match=r"has the backspace \(token 8\) already"):
        insert_backspaces(x, backspace_id=8, tokens=[5, 6], rate=0.1)
