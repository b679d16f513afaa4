"""Objectives on sampled completions against enumeration, closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from loglik.errors import InputError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives.policy import brain, dpg, gdc_pp, nash_md_pg, ppo_clip, reinforce
from loglik.objectives.preference import ipo

DOUBLE = torch.float64


def exact(value: torch.Tensor, kind: Kind = Kind.EXACT) -> LogLikelihood:
    constant = ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None
    return LogLikelihood(value, kind, Unit.TOKEN, torch.ones(len(value), dtype=torch.long), constant=constant)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def categorical(k: int, seed: int) -> torch.Tensor:
    return (1.5 * random(k, seed=seed)).log_softmax(0)


def leaf(logits: torch.Tensor) -> torch.Tensor:
    return logits.clone().requires_grad_()


def gradient(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, at)[0]


def one_group(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long)


@pytest.fixture
def batch():
    """Eleven completions of three prompts, five, two and four of them, with everything at random."""
    groups = torch.tensor([0] * 5 + [2] * 2 + [7] * 4)
    return {
        "policy": exact(leaf(3 * random(11, seed=1) - 20)),
        "reference": exact(3 * random(11, seed=2) - 20),
        "proposal": 3 * random(11, seed=3) - 20,
        "rewards": random(11, seed=4),
        "groups": groups,
    }


SELF_NORMALISED = [brain, dpg, gdc_pp]


# ---------------------------------------------------------------------- BRAIn
def test_brain_has_the_estimators_gradient(batch):
    """Autograd of KL(alpha || beta) is -(alpha - beta) times the gradient of log q, prompt by prompt."""
    policy = batch["policy"].value
    got = gradient(brain(**batch, gamma=0.7).loss.sum(), policy)
    wanted = torch.empty_like(got)
    for group in (0, 2, 7):
        rows = batch["groups"] == group
        prior, drawn = batch["reference"].value[rows], batch["proposal"][rows]
        alpha = (prior + batch["rewards"][rows] / 0.7 - drawn).softmax(0)
        beta = (policy.detach()[rows] - drawn).softmax(0)
        wanted[rows] = -(alpha - beta)
        loss = (alpha * (alpha.log() - beta.log())).sum()
        n = [0, 2, 7].index(group)
        assert brain(**batch, gamma=0.7).loss[n].item() == pytest.approx(loss.item(), abs=1e-13)
        ess = 1 / alpha.square().sum()
        assert brain(**batch, gamma=0.7).metrics["effective_sample_size"][n].item() == pytest.approx(ess.item())
    torch.testing.assert_close(got, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("objective", SELF_NORMALISED)
def test_a_prompt_does_not_see_the_others(objective, batch):
    whole = objective(**batch)
    assert whole.loss.shape == whole.weight.shape == (3,)
    assert whole.weight.tolist() == [1.0, 1.0, 1.0]
    for n, group in enumerate((0, 2, 7)):
        rows = (batch["groups"] == group).nonzero().flatten()
        alone = objective(**{name: values[rows] for name, values in batch.items()})
        torch.testing.assert_close(alone.loss, whole.loss[n : n + 1], atol=1e-13, rtol=1e-13)
        for name, values in alone.metrics.items():
            torch.testing.assert_close(values, whole.metrics[name][n : n + 1])


def test_only_the_policy_has_a_gradient(batch):
    leaves = {name: leaf(batch[name]) for name in ("proposal", "rewards")}
    prior = leaf(batch["reference"].value)
    for objective in SELF_NORMALISED:
        terms = objective(batch["policy"], exact(prior), leaves["proposal"], leaves["rewards"], batch["groups"])
        terms.mean().backward()
        assert not any(m.requires_grad for m in (*terms.metrics.values(), terms.weight))
    for terms in (
        reinforce(batch["policy"], leaves["rewards"], batch["groups"], exact(prior), kl_weight=0.1),
        ppo_clip(batch["policy"], leaves["proposal"], leaves["rewards"], batch["groups"], exact(prior), kl_weight=0.1),
        nash_md_pg(batch["policy"], exact(prior), leaves["rewards"].sigmoid()),
    ):
        terms.mean().backward()
        assert not any(m.requires_grad for m in (*terms.metrics.values(), terms.weight))
    assert prior.grad is None
    assert leaves["proposal"].grad is None
    assert leaves["rewards"].grad is None
    assert batch["policy"].value.grad is not None


def test_brain_of_two_samples_of_the_prior_and_a_sure_winner_is_dpo_at_beta_one():
    """One-hot target, proposal = prior: -logsigmoid of the difference of log-ratios, in value and gradient."""
    prior = random(2, seed=5)
    policy = leaf(random(2, seed=6))
    loss = brain(exact(policy), exact(prior), prior, torch.tensor([1.0, 0.0]), one_group(2), gamma=1e-3).mean()
    delta = (policy[0] - prior[0]) - (policy[1] - prior[1])
    assert loss.item() == pytest.approx(-logsigmoid(delta).item(), abs=1e-14)
    torch.testing.assert_close(gradient(loss, policy), gradient(-logsigmoid(delta), policy))


def test_brain_of_two_samples_of_the_prior_is_dpo_with_soft_labels():
    prior, policy = random(2, seed=7), leaf(random(2, seed=8))
    rewards = torch.tensor([0.3, -0.4], dtype=DOUBLE)
    got = gradient(brain(exact(policy), exact(prior), prior, rewards, one_group(2), gamma=0.5).mean(), policy)
    delta, label = (policy - prior).diff().neg()[0], torch.sigmoid((rewards[0] - rewards[1]) / 0.5)
    wanted = gradient(-label * logsigmoid(delta) - (1 - label) * logsigmoid(-delta), policy)
    torch.testing.assert_close(got, wanted)


def test_brain_is_zero_at_the_posterior_for_every_set_of_samples():
    prior, rewards, drawn = random(40, seed=9), random(40, seed=10), random(40, seed=11)
    policy = leaf(prior + rewards / 0.3 - 17.0)
    loss = brain(exact(policy), exact(prior), drawn, rewards, torch.arange(8).repeat_interleave(5), gamma=0.3).loss
    torch.testing.assert_close(loss, torch.zeros(8, dtype=DOUBLE), atol=1e-13, rtol=0)
    torch.testing.assert_close(gradient(loss.sum(), policy), torch.zeros(40, dtype=DOUBLE), atol=1e-14, rtol=0)


def test_brain_over_the_whole_space_is_the_forward_kl():
    """Samples that enumerate the space once, from a uniform proposal: exact KL(posterior || policy)."""
    prior, rewards, logits = categorical(30, 12), random(30, seed=13), leaf(random(30, seed=14))
    policy = logits.log_softmax(0)
    posterior = (prior + rewards / 0.8).softmax(0)
    wanted = (posterior * (posterior.log() - policy)).sum()
    uniform = torch.full((30,), -math.log(30), dtype=DOUBLE)
    got = brain(exact(policy), exact(prior), uniform, rewards, one_group(30), gamma=0.8).mean()
    assert got.item() == pytest.approx(wanted.item(), abs=1e-13)
    torch.testing.assert_close(gradient(got, logits), policy.detach().exp() - posterior)


def test_brain_uses_differences_within_a_prompt_only(batch):
    shift = torch.tensor([3.0, -5.0, 11.0], dtype=DOUBLE)[torch.tensor([0] * 5 + [1] * 2 + [2] * 4)]
    wanted = brain(**batch)
    moved = {
        "rewards": batch["rewards"] + shift,
        "reference": exact(batch["reference"].value + shift, Kind.UNNORMALIZED),
        "proposal": batch["proposal"] + shift,
        "policy": exact(batch["policy"].value + shift, Kind.UNNORMALIZED),
    }
    for name, value in moved.items():
        got = brain(**{**batch, name: value})
        torch.testing.assert_close(got.loss, wanted.loss, atol=1e-12, rtol=0)


def test_gamma_goes_from_the_best_sample_to_the_prior(batch):
    def targets(gamma):
        """alpha - beta is minus the gradient, and beta does not depend on gamma."""
        return -gradient(brain(**batch, gamma=gamma).loss.sum(), batch["policy"].value)

    prior = targets(1e12)
    untilted = targets(1.0)
    batch["rewards"] = torch.zeros_like(batch["rewards"])
    torch.testing.assert_close(prior, targets(1.0), atol=1e-10, rtol=0)
    assert not torch.allclose(untilted, prior, atol=1e-3)
    batch["rewards"] = random(11, seed=4)
    for group in (0, 2, 7):
        rows = (batch["groups"] == group).nonzero().flatten()
        part = {name: values[rows] for name, values in batch.items()}
        assert brain(**part, gamma=1e-4).metrics["effective_sample_size"].item() == pytest.approx(1.0)
        weight = -gradient(brain(**part, gamma=1e-4).loss.sum(), batch["policy"].value)[rows]
        beta = (part["policy"].value.detach() - part["proposal"]).softmax(0)
        assert (weight + beta).argmax() == part["rewards"].argmax()


def test_on_policy_the_weights_of_the_policy_are_uniform(batch):
    batch["proposal"] = batch["policy"].value.detach()
    metrics = brain(**batch).metrics
    torch.testing.assert_close(metrics["policy_effective_sample_size"], torch.tensor([5.0, 2.0, 4.0], dtype=DOUBLE))
    torch.testing.assert_close(metrics["reward"][1], batch["rewards"][5:7].mean())


def test_repeated_completions_count_each_time():
    """A sample drawn twice has twice the weight: its gradient is that of two rows."""
    rows = torch.tensor([0, 0, 1])
    prior, rewards, policy = random(2, seed=15), random(2, seed=16), leaf(random(2, seed=17))
    loss = brain(exact(policy[rows]), exact(prior[rows]), prior[rows], rewards[rows], one_group(3)).mean()
    odds = torch.tensor([2.0, 1.0], dtype=DOUBLE)
    alpha, beta = (rewards + odds.log()).softmax(0), ((policy - prior).detach() + odds.log()).softmax(0)
    torch.testing.assert_close(gradient(loss, policy), beta - alpha)


def test_a_completion_that_the_prior_cannot_give_has_no_weight():
    prior = torch.tensor([-1.0, -math.inf, -2.0], dtype=DOUBLE)
    policy, drawn = leaf(random(3, seed=18)), random(3, seed=19)
    loss = brain(exact(policy), exact(prior), drawn, drawn, one_group(3)).mean()
    alpha, log_beta = prior.softmax(0)[[0, 2]], (policy - drawn).log_softmax(0)[[0, 2]]
    assert loss.item() == pytest.approx((alpha * (alpha.log() - log_beta)).sum().item())
    got = gradient(loss, policy)
    assert got[1].item() == pytest.approx((policy.detach() - drawn).softmax(0)[1].item())
    assert got.isfinite().all()
    with pytest.raises(InputError, match="no completion of the prompt of row 0 any probability"):
        brain(exact(policy), exact(prior - math.inf), drawn, drawn, one_group(3))


# ---------------------------------------------------------------------- DPG and GDC++
@pytest.mark.parametrize("objective", [dpg, gdc_pp])
def test_the_mean_gradient_is_that_of_the_forward_kl(objective):
    """One sample per prompt, every outcome weighted by its proposal: policy minus posterior, for any proposal."""
    prior, rewards, drawn = categorical(7, 20), random(7, seed=21), categorical(7, 22)
    logits = leaf(random(7, seed=23))
    tilted = prior + rewards / 0.6
    policy = logits.log_softmax(0)
    loss = objective(
        exact(policy), exact(prior), drawn, rewards, torch.arange(7), gamma=0.6, log_normalizer=tilted.logsumexp(0)
    ).loss
    got = gradient((drawn.exp() * loss).sum(), logits)
    torch.testing.assert_close(got, policy.detach().exp() - tilted.softmax(0), atol=1e-14, rtol=0)


def test_the_mean_over_samples_is_taken_and_normalisers_go_with_their_prompts(batch):
    log_z = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    got = gradient(dpg(**batch, log_normalizer=log_z).loss.sum(), batch["policy"].value)
    each = torch.tensor([0] * 5 + [1] * 2 + [2] * 4)
    log_weights = batch["reference"].value + batch["rewards"] - batch["proposal"] - log_z[each]
    sizes = torch.tensor([5.0, 2.0, 4.0], dtype=DOUBLE)[each]
    torch.testing.assert_close(got, -log_weights.exp() / sizes)
    with_own = gradient(gdc_pp(**batch, log_normalizer=log_z).loss.sum(), batch["policy"].value)
    own = (batch["policy"].value.detach() - batch["proposal"]).exp() / sizes
    torch.testing.assert_close(with_own, got + own)


def test_without_a_normaliser_the_weights_are_those_of_brain(batch):
    """Z is estimated by the mean importance weight: BRAIn's gradient is that of DPG plus its baseline."""
    at = batch["policy"].value
    full, bare = gradient(brain(**batch).loss.sum(), at), gradient(dpg(**batch).loss.sum(), at)
    for group in (0, 2, 7):
        rows = batch["groups"] == group
        beta = (at.detach() - batch["proposal"])[rows].softmax(0)
        torch.testing.assert_close(full[rows], bare[rows] + beta)
    estimate = torch.stack(
        [
            (batch["reference"].value + batch["rewards"] - batch["proposal"])[batch["groups"] == g].exp().mean().log()
            for g in (0, 2, 7)
        ]
    )
    torch.testing.assert_close(gradient(dpg(**batch, log_normalizer=estimate).loss.sum(), at), bare)


def gradients(mean: float, seed: int) -> dict[str, torch.Tensor]:
    """Descent in mu of a policy N(mu, 1) at 1 from n = 8 samples of N(mean, 1), posterior N(0, 1); 20,000 times."""
    replications, n = 20_000, 8
    y = mean + random(replications * n, seed=seed)
    groups = torch.arange(replications).repeat_interleave(n)
    normal = torch.distributions.Normal
    prior, drawn, flat = normal(0.0, 1.0).log_prob(y), normal(mean, 1.0).log_prob(y), torch.zeros_like(y)
    found = {}
    for objective, settings in ((brain, {}), (dpg, {"log_normalizer": 0.0}), (gdc_pp, {"log_normalizer": 0.0})):
        mu = torch.ones(replications, dtype=DOUBLE, requires_grad=True)
        policy = exact(normal(mu[groups], 1.0).log_prob(y))
        loss = objective(policy, exact(prior), drawn, flat, groups, **settings).loss.sum()
        found[objective.__name__] = -gradient(loss, mu)
    return found


def test_the_baseline_of_brain_keeps_the_variance_low():
    """The Gaussian study. Closed-form variances of the other two are met within five standard errors."""
    own = {}
    for m, seed in ((0.0, 100), (0.5, 101), (1.0, 102)):
        found = gradients(m, seed)
        # Moments of (y - 1)^2 under the Gaussians that squares and products of the ratios are proportional to.
        weight, policy = math.exp(m**2) * (1 + (1 + m) ** 2), math.exp((1 - m) ** 2) * (1 + (1 - m) ** 2)
        cross = math.exp(m**2 - m) * (1 + m**2)
        variances = {"dpg": (weight - 1) / 8, "gdc_pp": (weight - 2 * cross + policy - 1) / 8}
        for name, variance in variances.items():
            squares = (found[name] + 1).square()
            assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(len(squares))
            assert abs(found[name].mean() + 1) < 5 * math.sqrt(variance / len(squares))  # unbiased
        own[m] = float(found["brain"].var())
        assert -0.9 < found["brain"].mean() < -0.7  # biased: for the KL of n samples, not for the whole
    assert own == pytest.approx({0.0: 0.175, 0.5: 0.192, 1.0: 0.172}, rel=0.05)  # figures of an independent run
    assert max(own.values()) < 1.25 * min(own.values())
    # From the policy itself less than a third of both; from the posterior itself the baseline only adds noise.
    assert own[1.0] < min(variances.values()) / 3
    assert gradients(0.0, 103)["dpg"].var() < own[0.0]


# ---------------------------------------------------------------------- REINFORCE
def expected_reward(logits, rewards):
    return (logits.softmax(0) * rewards).sum()


def kl(logits, reference):
    return (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum()


def test_reinforce_has_the_gradient_of_the_penalised_reward():
    """Expectation over all outcomes of one sample, against autograd of E[r] - lambda KL."""
    rewards, reference, logits = random(6, seed=30), categorical(6, 31), leaf(random(6, seed=32))
    policy = logits.log_softmax(0)
    loss = reinforce(exact(policy), rewards, torch.arange(6), exact(reference), baseline="none", kl_weight=0.3).loss
    got = gradient((policy.detach().exp() * loss).sum(), logits)
    wanted = gradient(-expected_reward(logits, rewards) + 0.3 * kl(logits, reference), logits)
    torch.testing.assert_close(got, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("group", 2 / 3), ("none", 1.0)])
def test_baselines_leave_the_mean_gradient(baseline, factor):
    """Expectation over all triples of four outcomes; the mean of a group contains the sample itself: (n - 1) / n."""
    rewards, reference, logits = random(4, seed=33), categorical(4, 34), leaf(random(4, seed=35))
    triples = torch.cartesian_prod(*[torch.arange(4)] * 3)
    policy = logits.log_softmax(0)
    rows = triples.flatten()
    loss = reinforce(
        exact(policy[rows]),
        rewards[rows],
        torch.arange(64).repeat_interleave(3),
        exact(reference[rows]),
        baseline=baseline,
        kl_weight=0.2,
    ).loss
    chance = policy.detach()[triples].sum(1).exp()
    got = gradient((chance * loss.reshape(64, 3).mean(1)).sum(), logits)
    wanted = gradient(-expected_reward(logits, rewards) + 0.2 * kl(logits, reference), logits)
    torch.testing.assert_close(got, factor * wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_advantages(baseline, standardise):
    """Against each prompt's own numbers, with torch's standard deviation (as TRL's GRPO has it, but for its 1e-4)."""
    policy, rewards = leaf(random(7, seed=36)), random(7, seed=37)
    groups = torch.tensor([0, 0, 0, 3, 3, 3, 3])
    terms = reinforce(exact(policy), rewards, groups, baseline=baseline, standardise=standardise)
    got = -gradient(terms.loss.sum(), policy)
    for rows in (groups == 0, groups == 3):
        r = rewards[rows]
        others = (r.sum() - r) / (len(r) - 1)
        wanted = r - (r.mean() if baseline == "group" else others)
        torch.testing.assert_close(got[rows], wanted / (r.std() if standardise else 1.0))
    torch.testing.assert_close(terms.weight, torch.ones(7, dtype=DOUBLE))
    assert terms.mean().item() == pytest.approx((-got * policy.detach()).mean().item())


def test_equal_rewards_give_no_gradient_where_rounding_would():
    """The float32 mean of ten equal rewards differs from them in the last digit; blown up it would be of order one."""
    rewards = torch.tensor([0.1] * 10 + [0.7] * 10)
    groups = torch.tensor([0] * 10 + [1] * 10)
    policy = leaf(torch.zeros(20))
    plain = reinforce(exact(policy), rewards, groups, baseline="group").mean()
    assert gradient(plain, policy).count_nonzero() == 20
    for baseline in ("group", "leave_one_out"):
        loss = reinforce(exact(policy), rewards, groups, baseline=baseline, standardise=True).mean()
        assert gradient(loss, policy).count_nonzero() == 0


def test_kl_is_logged_and_the_reward_stays_as_it_was():
    policy, reference, rewards = leaf(random(4, seed=38)), random(4, seed=39), random(4, seed=40)
    terms = reinforce(exact(policy), rewards, one_group(4), exact(reference), kl_weight=0.5)
    torch.testing.assert_close(terms.metrics["kl"], policy.detach() - reference)
    torch.testing.assert_close(terms.metrics["reward"], rewards)
    assert "kl" not in reinforce(exact(policy), rewards, one_group(4)).metrics


def test_categorical_kl_gradients():
    """Closed forms in the logits: reverse KL by REINFORCE against p*, forward KL by DPG, both in expectation."""
    target, logits = categorical(8, 41), leaf(random(8, seed=42))
    policy = logits.log_softmax(0)
    p, q = policy.detach().exp(), target.exp()
    loss = reinforce(exact(policy), torch.zeros(8), torch.arange(8), exact(target), baseline="none", kl_weight=1.0).loss
    log_ratio = target - policy.detach()
    torch.testing.assert_close(gradient((p * loss).sum(), logits), -p * (log_ratio - (p * log_ratio).sum()))
    forward = dpg(
        exact(logits.log_softmax(0)), exact(target), target, torch.zeros(8), torch.arange(8), log_normalizer=0.0
    )
    torch.testing.assert_close(gradient((q * forward.loss).sum(), logits), p - q)


def test_the_penalised_reward_is_stationary_at_the_tilted_reference():
    """The optimum pi_ref exp(r / beta) / Z: every sample has the same penalised reward, so no advantage is left."""
    reference, rewards = categorical(9, 43), random(9, seed=44)
    policy = leaf((reference + rewards / 0.4).log_softmax(0))
    for baseline in ("group", "leave_one_out"):
        loss = reinforce(exact(policy), rewards, one_group(9), exact(reference), kl_weight=0.4, baseline=baseline)
        torch.testing.assert_close(gradient(loss.mean(), policy), torch.zeros(9, dtype=DOUBLE), atol=1e-14, rtol=0)


# ---------------------------------------------------------------------- PPO
def test_ppo_begins_as_reinforce(batch):
    batch["proposal"] = batch["policy"].value.detach()
    at = batch["policy"].value
    settings = {"kl_weight": 0.3, "standardise": True}
    got = gradient(ppo_clip(**batch, **settings).mean(), at)
    del batch["proposal"]
    torch.testing.assert_close(got, gradient(reinforce(**batch, **settings).mean(), at))


def test_ppo_clips_only_what_has_gone_too_far():
    """Gains beyond 1 + clip and losses below 1 - clip are flat; the other ways keep ratio times advantage."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], dtype=DOUBLE)
    rewards = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0], dtype=DOUBLE)
    policy = leaf(ratio.log())
    terms = ppo_clip(exact(policy), torch.zeros(6), rewards, one_group(6), baseline="none", clip=0.2)
    wanted = torch.tensor([-2.4, 3.0, -1.0, 1.6, -2.2, 1.8], dtype=DOUBLE)
    torch.testing.assert_close(terms.loss, wanted)
    assert terms.metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 0, 0]
    torch.testing.assert_close(terms.metrics["proposal_kl"], -ratio.log())
    flat = torch.tensor([0, 1, 1, 0, 1, 1], dtype=DOUBLE)
    torch.testing.assert_close(gradient(terms.loss.sum(), policy), -flat * ratio * rewards)


def test_the_penalty_of_ppo_is_that_of_the_samples_as_drawn():
    policy, drawn, reference = leaf(random(5, seed=45)), random(5, seed=46), random(5, seed=47)
    rewards = random(5, seed=48)
    got = ppo_clip(exact(policy), drawn, rewards, one_group(5), exact(reference), kl_weight=0.2, baseline="group")
    wanted = ppo_clip(exact(policy), drawn, rewards - 0.2 * (drawn - reference), one_group(5), baseline="group")
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.metrics["kl"], drawn - reference)


# ---------------------------------------------------------------------- the preference game
K = 6


def game(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A preference matrix with P + P' = 1, and a reference."""
    upper = random(K, K, seed=seed)
    return torch.sigmoid(upper - upper.T), categorical(K, seed + 1)


def mixture(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    return ((1 - beta) * policy + beta * reference).log_softmax(0)


def expected_ipo(policy, reference, wins, sampler, tau, hard=False):
    """IPO over all pairs of independent draws of a sampler, with soft labels or the mean over hard ones."""
    first, second = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
    sides = exact(policy[first]), exact(policy[second])
    others = exact(reference[first]), exact(reference[second])
    chance = (sampler[first] + sampler[second]).exp()
    p = wins[first, second]
    if not hard:
        return (chance * ipo(*sides, *others, p, tau=tau).loss).sum()
    won, lost = ipo(*sides, *others, tau=tau).loss, ipo(*sides[::-1], *others[::-1], tau=tau).loss
    return (chance * (p * won + (1 - p) * lost)).sum()


def test_online_ipo_is_self_play_times_four_over_tau():
    """By enumeration of a game of six answers: the gradient of IPO on own pairs is -4/tau that of the game."""
    wins, reference = game(50)
    tau, logits = 0.3, leaf(random(K, seed=52))
    policy = logits.log_softmax(0)
    own = policy.detach()
    online = gradient(expected_ipo(policy, reference, wins, own, tau), logits)
    value = logits.softmax(0) @ wins @ own.exp() - tau * kl(logits, reference)
    torch.testing.assert_close(online, -4 / tau * gradient(value, logits), atol=1e-12, rtol=0)
    # And Nash-MD with the policy as its own opponent has the game's gradient itself.
    nash = nash_md_pg(exact(logits.log_softmax(0)), exact(reference), wins @ own.exp(), tau=tau).loss
    torch.testing.assert_close(4 / tau * gradient((own.exp() * nash).sum(), logits), online, atol=1e-12, rtol=0)


def test_hard_labels_add_their_variance_and_no_gradient():
    wins, reference = game(53)
    tau, logits, sampler = 0.2, leaf(random(K, seed=55)), categorical(K, 56)
    soft = expected_ipo(logits.log_softmax(0), reference, wins, sampler, tau)
    hard = expected_ipo(logits.log_softmax(0), reference, wins, sampler, tau, hard=True)
    noise = (sampler.exp() @ (wins * (1 - wins)) @ sampler.exp()) / tau**2
    assert (hard - soft).item() == pytest.approx(noise.item(), abs=1e-12)
    torch.testing.assert_close(gradient(hard, logits), gradient(soft, logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.125, 1.0])
def test_nash_md_against_enumeration(beta):
    """The mean over own samples and opponents from the mixture, against autograd of the game at that opponent."""
    wins, reference = game(57)
    tau, logits = 0.25, leaf(random(K, seed=59))
    policy = logits.log_softmax(0)
    opponent = mixture(policy.detach(), reference, beta).exp()
    first, second = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
    terms = nash_md_pg(exact(policy[first]), exact(reference[first]), wins[first, second], tau=tau)
    chance = policy.detach()[first].exp() * opponent[second]
    got = gradient((chance * terms.loss).sum(), logits)
    wanted = gradient(-(logits.softmax(0) @ wins @ opponent) + tau * kl(logits, reference), logits)
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)
    assert terms.metrics["preferred"].equal(wins[first, second])


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5, 1.0])
def test_the_fixed_point_of_ipo_md(beta):
    """pi = pi_ref exp(P(. > pi_beta) / tau) / Z has no gradient under IPO-MD; the Nash equilibrium at beta = 0."""
    wins, reference = game(60)
    tau, policy = 0.5, reference
    for _ in range(2000):
        policy = 0.5 * policy + 0.5 * (reference + wins @ mixture(policy, reference, beta).exp() / tau).log_softmax(0)
    logits = leaf(policy)
    loss = expected_ipo(logits.log_softmax(0), reference, wins, mixture(policy, reference, beta), tau)
    torch.testing.assert_close(gradient(loss, logits), torch.zeros(K, dtype=DOUBLE), atol=1e-11, rtol=0)
    nash = nash_md_pg(
        exact(logits.log_softmax(0)), exact(reference), wins @ mixture(policy, reference, beta).exp(), tau=tau
    )
    got = gradient((policy.exp() * nash.loss).sum(), logits)
    torch.testing.assert_close(got, torch.zeros(K, dtype=DOUBLE), atol=1e-12, rtol=0)
    # Not stationary anywhere else.
    elsewhere = leaf(reference)
    loss = expected_ipo(elsewhere.log_softmax(0), reference, wins, mixture(policy, reference, beta), tau)
    assert gradient(loss, elsewhere).abs().max() > 1e-2


def test_nash_md_sample_by_sample():
    """The preference is centred: a sample that wins half its comparisons, at the reference, says nothing."""
    policy, reference, won = leaf(random(3, seed=66)), random(3, seed=67), torch.tensor([0.9, 0.5, 0.1]).double()
    terms = nash_md_pg(exact(policy), exact(reference), won, tau=0.2)
    wanted = -(won - 0.5 - 0.2 * (policy.detach() - reference))
    torch.testing.assert_close(gradient(terms.loss.sum(), policy), wanted)
    torch.testing.assert_close(terms.loss, wanted * policy.detach())
    torch.testing.assert_close(terms.metrics["kl"], policy.detach() - reference)
    assert terms.weight.tolist() == [1.0, 1.0, 1.0]


def test_a_large_tau_leaves_only_the_reference():
    wins, reference = game(63)
    at = leaf(random(K, seed=65))
    policy = at.log_softmax(0)
    loss = nash_md_pg(exact(policy), exact(reference), wins @ policy.detach().exp(), tau=1e9).loss
    got = gradient((policy.detach().exp() * loss).sum(), at) / 1e9
    torch.testing.assert_close(got, gradient(kl(at, reference), at), atol=1e-8, rtol=0)


# ---------------------------------------------------------------------- extremes and refusals
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_margins_of_ten_thousand_nats_stay_finite(size):
    policy = leaf(torch.tensor([size, 0.0, -size, 0.0]))
    reference, drawn = exact(torch.tensor([0.0, size, 0.0, -size])), torch.tensor([0.0, 0.0, size, -size])
    rewards, groups = torch.tensor([1.0, 1.0, -1.0, 0.5]), torch.tensor([0, 0, 1, 1])
    for terms in (
        brain(exact(policy), reference, drawn, rewards, groups, gamma=1e-4),
        dpg(exact(policy), reference, drawn, rewards, groups),
        dpg(exact(policy), reference, drawn, rewards, groups, log_normalizer=0.0),
        gdc_pp(exact(policy), reference, drawn, rewards, groups),
        gdc_pp(exact(policy), reference, drawn, rewards, groups, log_normalizer=0.0),
        reinforce(exact(policy), rewards, groups, reference, kl_weight=1.0, standardise=True),
        ppo_clip(exact(policy), drawn, rewards, groups, reference, kl_weight=1.0),
        ppo_clip(exact(policy), drawn, rewards, groups),
        nash_md_pg(exact(policy), reference, rewards.sigmoid()),
    ):
        assert terms.loss.isfinite().all()
        assert gradient(terms.mean(), policy).isfinite().all()
        assert all(values.isfinite().all() for values in terms.metrics.values())


def test_a_ratio_that_has_run_away_is_still_pulled_back():
    """Far above the proposal with a negative advantage: the value is held, the gradient keeps its sign."""
    policy = leaf(torch.tensor([100.0, 0.0]))
    loss = ppo_clip(exact(policy), torch.zeros(2), torch.tensor([-1.0, 1.0]), one_group(2)).loss.sum()
    grad = gradient(loss, policy)
    assert grad[0] > 1e10
    assert grad.isfinite().all()


@pytest.mark.parametrize("objective", [brain, dpg, gdc_pp, ppo_clip])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": torch.tensor([0, 0, 1])}, "groups of shape"),
        ({"groups": torch.tensor([0, 1, 1, 0])}, "row 3 goes back"),
        ({"groups": torch.tensor([0.0, 0.0, 1.0, 1.0])}, "groups must be integers"),
        ({"rewards": torch.tensor([0.0, math.nan, 1.0, 1.0])}, "rewards of row 1 is nan"),
        ({"rewards": torch.zeros(4, 1)}, "rewards of shape"),
        ({"proposal": torch.tensor([0.0, 0.0, -math.inf, 1.0])}, "proposal of row 2 is -inf"),
        ({"policy": exact(torch.zeros(4), Kind.UPPER_BOUND)}, "upper bound"),
        ({"reference": exact(torch.zeros(3))}, "4 and 3 rows"),
        ({"reference": exact(torch.tensor([0.0, math.nan, 0.0, 0.0]))}, "of row 1 is nan"),
    ],
)
def test_refusals(objective, change, message):
    zeros = torch.zeros(4)
    given = {"policy": exact(zeros), "reference": exact(zeros), "proposal": zeros, "rewards": zeros}
    with pytest.raises(InputError, match=message):
        objective(**{**given, "groups": torch.tensor([0, 0, 1, 1]), **change})


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_gamma_must_be_positive(gamma, batch):
    for objective in SELF_NORMALISED:
        with pytest.raises(InputError, match="gamma must be positive"):
            objective(**batch, gamma=gamma)


def test_unknown_constants_are_refused_where_they_do_not_drop_out(batch):
    rough = exact(batch["policy"].value.detach(), Kind.UNNORMALIZED)
    given = {**batch, "policy": rough}
    for objective in (dpg, gdc_pp, ppo_clip):
        with pytest.raises(InputError, match="unknown constant"):
            objective(**given)
    with pytest.raises(InputError, match="unknown constant"):
        reinforce(rough, batch["rewards"], batch["groups"], baseline="none")
    with pytest.raises(InputError, match="unknown constant"):
        nash_md_pg(rough, batch["reference"], batch["rewards"].sigmoid())
    shifted = exact(rough.value + 50.0, Kind.UNNORMALIZED)
    for a, b in (
        (brain(**given), brain(**{**given, "policy": shifted})),
        (reinforce(rough, batch["rewards"], batch["groups"]), reinforce(shifted, batch["rewards"], batch["groups"])),
    ):
        torch.testing.assert_close(a.mean(), b.mean(), atol=1e-12, rtol=0)


def test_what_policy_gradients_need():
    zeros = torch.zeros(3)
    policy, groups = exact(zeros), torch.tensor([0, 0, 1])
    with pytest.raises(InputError, match="needs two completions of a prompt, and that of row 2 has one"):
        reinforce(policy, zeros, groups)
    with pytest.raises(InputError, match="standardise also centres"):
        reinforce(policy, zeros, groups, baseline="none", standardise=True)
    with pytest.raises(InputError, match="baseline must be one of none, group, leave_one_out, got 'mean'"):
        reinforce(policy, zeros, groups, baseline="mean")
    with pytest.raises(InputError, match="kl_weight needs the log-likelihoods of a reference"):
        reinforce(policy, zeros, groups, baseline="none", kl_weight=0.1)
    with pytest.raises(InputError, match="kl_weight must be positive"):
        ppo_clip(policy, zeros, zeros, groups, policy, baseline="none", kl_weight=-0.1)
    with pytest.raises(InputError, match="of row 0 is -inf"):
        reinforce(policy, zeros, groups, exact(zeros - math.inf), baseline="none")
    for clip in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="clip must lie strictly between"):
            ppo_clip(policy, zeros, zeros, groups, baseline="none", clip=clip)
    with pytest.raises(InputError, match=r"that of row 1 is 1.5: give numbers in \[0, 1\]"):
        nash_md_pg(policy, policy, torch.tensor([0.5, 1.5, 0.0]))
    with pytest.raises(InputError, match="tau must be positive"):
        nash_md_pg(policy, policy, zeros, tau=0.0)
    for bad in (torch.zeros(3), math.nan):
        with pytest.raises(InputError, match="log_normalizer must be one finite number or 2"):
            dpg(policy, policy, zeros, zeros, groups, log_normalizer=bad)
    with pytest.raises(InputError, match="needs the prompt of every completion"):
        reinforce(exact(zeros[:0]), zeros[:0], groups[:0])
