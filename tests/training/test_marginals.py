"""Training of any-order marginals on distributions that are known exactly."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "reproductions"))

from worlds.enumerable import kl
from worlds.ising import PartialStates, tabular

from loglik.errors import InputError, LoglikError
from loglik.models.any_order import AnyOrderMarginals
from loglik.training.marginals import EnergyConfig, MarginalsConfig, fit_energy, fit_marginals

SPACE = PartialStates(3, 2)
ALL = SPACE.x[SPACE.complete]
# Every vector this often; the frequencies are the distribution.
COUNTS = torch.tensor([7, 3, 5, 9, 12, 4, 6, 18])
DATA = ALL.repeat_interleave(COUNTS, 0)
LOG_P = (COUNTS / COUNTS.sum()).double().log()
F = LOG_P + 1.5


def fresh(seed: int = 0) -> AnyOrderMarginals:
    return AnyOrderMarginals(3, 2, layers=2, width=32, seed=seed)


def flat() -> AnyOrderMarginals:
    """A table that starts uniform."""
    return tabular(SPACE, torch.full((8,), -math.log(8), dtype=torch.float64))


def log_density(x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    return F[(x * torch.tensor([4, 2, 1])).sum(1)] + shift


@torch.no_grad()
def errors(model: AnyOrderMarginals) -> tuple[float, float]:
    """The largest error of a marginal, and the mean divergence of the chain rules."""
    gap = model.marginal(SPACE.x, SPACE.known).value - SPACE.log_marginals(LOG_P)
    log_c = model.log_conditionals(SPACE.x, SPACE.known).double()
    return gap.abs().max().item(), SPACE.mean_order_kl(log_c, LOG_P).item()


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


# ------------------------------------------------------------------ maximum likelihood
def test_two_stages_learn_the_data():
    model = fresh()
    config = MarginalsConfig(600, 600, batch_size=256, learning_rate=5e-3, model_samples=4096)
    before = errors(model)
    fit = fit_marginals(model, DATA, config)
    worst, divergence = errors(model)
    assert before[0] > 0.5
    assert worst < 0.06
    assert divergence < 3e-3
    assert abs(model.log_normalizer().item()) < 0.02
    assert {name: len(curve) for name, curve in fit.curves.items()} == dict.fromkeys(
        ("conditional", "marginal", "residual"), 600
    )
    entropy = -float((LOG_P.exp() * LOG_P).sum())
    assert sum(fit.curves["conditional"][-100:]) / 100 == pytest.approx(entropy, abs=0.05)
    assert fit.curves["residual"][-1] < 0.1 * fit.curves["residual"][0]
    assert fit.log_normalizer is None
    assert fit.seconds > 0


def test_the_second_stage_leaves_the_conditionals_alone():
    one, two, none = fresh(), fresh(), fresh()
    fit_marginals(one, DATA, MarginalsConfig(20, 1, 32, model_samples=64))
    fit_marginals(two, DATA, MarginalsConfig(20, 20, 32, model_samples=64))
    assert same(weights(one.conditional_network), weights(two.conditional_network))
    assert not same(weights(one.conditional_network), weights(fresh().conditional_network))
    assert not same(weights(one.marginal_network), weights(two.marginal_network))
    fit = fit_marginals(none, DATA, MarginalsConfig(20, 0, 32))
    assert same(weights(none.marginal_network), weights(fresh().marginal_network))
    assert list(fit.curves) == ["conditional"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_second_stage_trains_on(share):
    """Data of one vector, a model of another one: the states of either are trained as the share says."""
    model = tabular(SPACE, torch.tensor([-40.0] * 7 + [0.0], dtype=torch.float64).log_softmax(0))
    with torch.no_grad():
        model.marginal_network.entries.fill_(1.0)
    fit_marginals(model, ALL[:1].repeat(10, 1), MarginalsConfig(0, 60, 64, model_share=share, model_samples=256))
    moved = model.marginal_network.entries.detach() != 1
    of_data, of_model = SPACE.index(torch.tensor([1, 1, 1])), SPACE.index(torch.tensor([2, 2, 2]))
    assert bool(moved[of_data]) == (share < 1)
    assert bool(moved[of_model]) == (share > 0)


def test_a_seed_repeats_the_run():
    config = MarginalsConfig(15, 15, 32, model_samples=64, seed=3)
    state = torch.get_rng_state()
    fits, models = [], []
    for chosen in (config, config, MarginalsConfig(15, 15, 32, model_samples=64, seed=4)):
        models.append(fresh())
        fits.append(fit_marginals(models[-1], DATA, chosen))
    assert fits[0].curves == fits[1].curves
    assert same(weights(models[0]), weights(models[1]))
    assert fits[0].curves["conditional"] != fits[2].curves["conditional"]
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------ energy-based
def test_reinforce_learns_the_distribution():
    model = fresh()
    fit = fit_energy(model, log_density, EnergyConfig(steps=800, learning_rate=5e-3, block=2))
    worst, divergence = errors(model)
    assert worst < 0.15
    assert divergence < 5e-3
    assert abs(model.log_normalizer().item()) < 0.05  # whatever log Z is
    assert fit.log_normalizer is None
    assert {name: len(curve) for name, curve in fit.curves.items()} == {"loss": 800, "residual": 800}


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_flow_matching_learns_log_z_wherever_it_is(shift):
    model = flat()
    config = EnergyConfig("flow_matching", steps=1500, learning_rate=5e-2, block=3)
    fit = fit_energy(model, lambda x: log_density(x, shift), config)
    assert model.log_normalizer().item() == pytest.approx(1.5 + shift, abs=0.01)
    assert fit.log_normalizer == pytest.approx(1.5 + shift, abs=0.02)
    worst, divergence = errors(model)
    assert worst < 0.02
    assert divergence < 1e-4


def test_without_self_consistency_conditionals_stay():
    model = fresh()
    before = weights(model.conditional_network), weights(model.marginal_network)
    fit = fit_energy(model, log_density, EnergyConfig(steps=5, batch_size=16, alpha=0.0, block=1))
    assert same(weights(model.conditional_network), before[0])
    assert not same(weights(model.marginal_network), before[1])
    assert list(fit.curves) == ["loss"]
    trained = fresh()
    fit_energy(trained, log_density, EnergyConfig(steps=5, batch_size=16, block=1))
    assert not same(weights(trained.conditional_network), before[0])


@pytest.mark.parametrize("objective", ["kl", "flow_matching"])
def test_no_gradient_goes_through_the_log_density(objective):
    scale = torch.ones((), requires_grad=True)
    fit_energy(fresh(), lambda x: scale * log_density(x), EnergyConfig(objective, steps=2, batch_size=8, block=1))
    assert scale.grad is None


def test_samples_persist_and_move_by_blocks():
    """What the log-density is asked about: successive batches differ in at most `block` entries of a row."""
    seen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return log_density(x)

    fit_energy(fresh(), watched, EnergyConfig(steps=30, batch_size=64, block=1))
    moves = torch.stack([(a != b).sum(1) for a, b in itertools.pairwise(seen)])
    assert len(seen) == 30
    assert moves.max() == 1
    assert 0.2 < moves.double().mean() < 0.8


def test_the_learning_rate_falls_along_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    config = EnergyConfig(steps=4, batch_size=8, learning_rate=0.1, final_lr_ratio=0.2, block=1)
    fit_energy(fresh(), log_density, config)
    expected = [0.1 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 4))) for k in range(4)]
    assert rates == pytest.approx(expected)


# ------------------------------------------------------------------ refusals
def broken() -> AnyOrderMarginals:
    model = fresh()
    with torch.no_grad():
        model.marginal_network.last.bias.fill_(math.nan)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_marginals(broken(), DATA, MarginalsConfig(0, 5, 8, model_samples=8)),
            "any-order marginals: the loss is nan at step 1: lower learning_rate, which is 0.0005, or set",
        ),
        (
            lambda: fit_energy(broken(), log_density, EnergyConfig("flow_matching", 5, 8, block=1)),
            r"energy-based \(flow_matching\): the loss is nan at step 1: lower learning_rate",
        ),
        (
            lambda: fit_energy(flat(), log_density, EnergyConfig("flow_matching", 9, 8, learning_rate=1e200, block=1)),
            r"energy-based \(flow_matching\): the (loss|gradient norm) is (nan|inf) at step \d: lower learning_rate",
        ),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(call, message):
    with pytest.raises(LoglikError, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_marginals(fresh(), DATA[:0]), "there is nothing to train on: data has no rows"),
        (lambda: fit_marginals(fresh(), DATA + 1), "row 7: entry 2 is 2, and values go from 0 to 1"),
        (lambda: fit_marginals(fresh(), DATA[:, :2]), r"x must be long of shape \(B, 3\)"),
        (lambda: fit_energy(fresh(), log_density), "block is 4, and vectors have 3 entries: lower it"),
        (
            lambda: fit_energy(fresh(), lambda x: log_density(x) - math.inf, EnergyConfig(block=1)),
            "kl_reinforce: row 0 has log-density -inf",
        ),
        (
            lambda: fit_energy(fresh(), log_density, EnergyConfig(batch_size=1, block=1)),
            "kl_reinforce compares samples with each other: give at least 2 rows, got 1",
        ),
        (lambda: EnergyConfig("reverse"), "objective must be 'kl' or 'flow_matching', got 'reverse'"),
        (lambda: EnergyConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: EnergyConfig(block=0), "block must be at least 1, got 0"),
        (lambda: EnergyConfig(alpha=-1.0), "alpha must be at least 0 and finite, got -1.0"),
        (lambda: EnergyConfig(learning_rate=math.inf), "learning_rate must be positive and finite, got inf"),
        (lambda: MarginalsConfig(conditional_steps=-1), "conditional_steps must not be negative, got -1"),
        (lambda: MarginalsConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: MarginalsConfig(learning_rate=0.0), "learning_rate must be positive and finite, got 0.0"),
        (lambda: MarginalsConfig(final_lr_ratio=1.5), "final_lr_ratio must lie between 0 and 1, got 1.5"),
        (lambda: MarginalsConfig(max_grad_norm=-1.0), "max_grad_norm must be at least 0, got -1.0"),
        (lambda: MarginalsConfig(model_share=1.1), "model_share must lie between 0 and 1, got 1.1"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError, match=f"^({message})") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_gradient_is_clipped():
    """With plain steps of Adam a clip changes nothing but the size that it sees: compare the first moments."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        seen.append((float(norm), float(after)))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
        for limit in (0.0, 1e-3):
            fit_energy(fresh(), log_density, EnergyConfig(steps=1, batch_size=8, block=1, max_grad_norm=limit))
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-5)
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-5)
    assert seen[1][1] == pytest.approx(1e-3, rel=1e-2)


def test_divergence_of_the_data_is_zero():
    """The yardstick itself."""
    exact = tabular(SPACE, LOG_P)
    assert errors(exact) == pytest.approx((0, 0), abs=1e-12)
    assert kl(LOG_P, LOG_P).item() == 0
