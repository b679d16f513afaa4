"""Mixed rewards: weighted sums, calibration, constraints."""

from __future__ import annotations

import math

import pytest
import torch

from loglik import InputError
from loglik.objectives.reward_mixing import MixedReward, mix_rewards

LOVE = torch.tensor([0.1, 0.9, 0.5, 0.5], dtype=torch.float64)
HELP = torch.tensor([10.0, -10.0, 0.0, 20.0], dtype=torch.float64)


def test_a_weighted_sum():
    mixed = mix_rewards({"love": LOVE, "help": HELP}, {"love": 2.0, "help": 0.1})
    assert mixed.tolist() == pytest.approx([1.2, 0.8, 1.0, 3.0])
    assert torch.equal(mix_rewards({"love": LOVE}, {"love": 1.0}), LOVE)


def test_calibration_removes_the_scale():
    weights = {"love": 1.0, "help": 1.0}
    for how in ("standardise", "rank"):
        once = mix_rewards({"love": LOVE, "help": HELP}, weights, normalise=how)
        scaled = mix_rewards({"love": 7 * LOVE + 3, "help": HELP}, weights, normalise=how)
        assert torch.allclose(once, scaled)
    standard = mix_rewards({"love": LOVE}, {"love": 1.0}, normalise="standardise")
    assert float(standard.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(standard.std()) == pytest.approx(1.0)
    ranks = mix_rewards({"love": LOVE}, {"love": 1.0}, normalise="rank")
    assert ranks.tolist() == pytest.approx([0.25, 1.0, 0.625, 0.625])
    flat = mix_rewards({"love": torch.full((3,), 0.1)}, {"love": 1.0}, normalise="standardise")
    assert flat.tolist() == [0.0, 0.0, 0.0]


def test_more_weight_means_more_of_that_reward():
    """For pi proportional to exp(R / beta), d E_pi[r] / dw is Var_pi(r) / beta, never negative."""
    beta = 0.5

    def policy(weight: float) -> torch.Tensor:
        mixed = mix_rewards({"love": LOVE, "help": HELP / 10}, {"love": weight, "help": 1.0})
        return torch.softmax(mixed / beta, 0)

    for weight in (0.0, 0.3, 2.0):
        step = 1e-5
        slope = float((policy(weight + step) - policy(weight - step)) @ LOVE) / (2 * step)
        pi = policy(weight)
        variance = float(pi @ LOVE**2 - (pi @ LOVE) ** 2)
        assert slope == pytest.approx(variance / beta, rel=1e-6)


def test_violations_rank_below_what_is_allowed():
    allowed = torch.tensor([True, True, True, False])
    mixed = mix_rewards({"help": HELP}, {"help": 1.0}, allowed=allowed)
    assert float(mixed[3]) < float(mixed[:3].min())
    assert torch.equal(mixed[:3], HELP[:3])
    assert float(mix_rewards({"help": HELP}, {"help": 1.0}, allowed=allowed, penalty=3.0)[3]) == 17.0


def test_as_a_function_of_completions():
    reward = MixedReward(
        {"length": lambda prompt, cs: [len(c) for c in cs], "first": lambda prompt, cs: [float(c[0]) for c in cs]},
        {"length": 1.0, "first": 10.0},
        constraints=[lambda prompt, c: 9 not in c],
    )
    found = reward([1], [[0, 1, 2], [3], [9, 9, 9, 9]])
    assert found[:2] == [3.0, 31.0]
    assert found[2] < min(found[:2])


def test_refusals():
    with pytest.raises(InputError, match="weights must name the rewards"):
        mix_rewards({"love": LOVE}, {"help": 1.0})
    with pytest.raises(InputError, match="help has shape"):
        mix_rewards({"love": LOVE, "help": HELP[:2]}, {"love": 1.0, "help": 1.0})
    with pytest.raises(InputError, match="love of row 1 is nan"):
        mix_rewards({"love": torch.tensor([0.0, math.nan])}, {"love": 1.0})
    with pytest.raises(InputError, match="normalise must be"):
        mix_rewards({"love": LOVE}, {"love": 1.0}, normalise="softmax")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="weight of love must be finite"):
        mix_rewards({"love": LOVE}, {"love": math.inf})
    with pytest.raises(InputError, match="allowed must be bool"):
        mix_rewards({"love": LOVE}, {"love": 1.0}, allowed=torch.ones(4))
    with pytest.raises(InputError, match="penalty must be"):
        mix_rewards({"love": LOVE}, {"love": 1.0}, penalty=-1.0)
    with pytest.raises(InputError, match="gave 1 numbers for 2"):
        MixedReward({"one": lambda p, cs: [1.0]}, {"one": 1.0})([0], [[1], [2]])
