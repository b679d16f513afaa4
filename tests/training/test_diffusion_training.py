"""The same objectives on a diffusion language model: bounds with common random numbers."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import pytest
import torch

from diffusion_beds import random_network, whole
from loglik import InputError, load
from loglik.kinds import DrawsKey
from loglik.models.diffusion import MaskedDiffusionLM, SubsetTable
from loglik.objectives import MaximumLikelihood
from loglik.objectives.density_ratio import ddo
from loglik.objectives.diffusion_policy import bgpo, gdpo
from loglik.objectives.preference import dpo, ipo
from loglik.objectives.token_preference import tab_po
from loglik.training import DrawGroups, Online, Row, TrainConfig, evaluate, fit
from loglik.training.lora import LoraSettings, with_lora
from training import preference_rows

PAIRS = [Row([0], ([1, 2, 3], [3, 1, 0, 0])), Row([1], ([2, 2], [0, 3, 1])), Row([2], ([3, 3, 3], [1, 1, 1]))]


def policy(**options) -> MaskedDiffusionLM:
    return MaskedDiffusionLM(random_network(scale=0.5).float(), **{"num_samples": 1, **options})


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "schedule": "constant", "log_every": 1, **changes}
    )


def losses(path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines()]


def exact(lm: MaskedDiffusionLM, which: int) -> torch.Tensor:
    """The bound itself of every row's completion."""
    rows = [[*row.prompt, *row.completions[which]] for row in PAIRS]
    with torch.no_grad():
        return torch.stack([table.elbo() for table in SubsetTable.of(lm, whole(rows, prompt=1))])


def test_maximum_likelihood_raises_the_exact_bound(tmp_path):
    lm = policy()
    before = exact(lm, 0)
    rows = [Row(row.prompt, row.completions[:1]) for row in PAIRS]
    fit(lm, MaximumLikelihood(), rows, config(steps=60), output=tmp_path)
    assert float((exact(lm, 0) - before).min()) > 0.5
    loaded = load(tmp_path, device="cpu")
    assert isinstance(loaded, MaskedDiffusionLM)
    assert torch.allclose(exact(loaded, 0), exact(lm, 0), atol=1e-5)


@pytest.mark.parametrize("objective", [partial(dpo, beta=0.2), partial(ipo, tau=0.2), ddo], ids=["dpo", "ipo", "ddo"])
def test_preferences_move_the_exact_bounds_apart(tmp_path, objective):
    lm = policy(num_samples=4)
    before = exact(lm, 0) - exact(lm, 1)
    fit(lm, objective, PAIRS, config(steps=40), output=tmp_path)
    assert float((exact(lm, 0) - exact(lm, 1) - before).min()) > 0.5


def test_policy_and_reference_share_their_masks(tmp_path):
    """At the first step they are equal draw by draw: the loss is log 2, not a noisy number around it."""
    fit(policy(), partial(dpo, beta=0.5), PAIRS, config(steps=2), output=tmp_path)
    found = losses(tmp_path)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(found[1] - math.log(2)) > 1e-4
    assert not (tmp_path / "reference").exists()  # nothing to store: masks change


def test_evaluation_gives_both_the_same_masks_too():
    """Whatever seeds the two models were made with."""
    found = evaluate(policy(), partial(dpo, beta=0.5), PAIRS, batch_size=2, reference=policy(seed=5))
    assert found.loss == pytest.approx(math.log(2), abs=1e-6)
    assert found.metrics["margin"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_is_its_own_reference(tmp_path):
    lm = with_lora(policy(), LoraSettings(rank=2), base=None)
    assert isinstance(lm, MaskedDiffusionLM)
    fit(lm, partial(dpo, beta=0.5), PAIRS, config(steps=1), output=tmp_path)
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_steps_draws_are_averaged(tmp_path):
    rows = [Row(row.prompt, row.completions[:1]) for row in PAIRS]
    fit(policy(), MaximumLikelihood(), rows, config(steps=1, draws_per_step=3), output=tmp_path)
    lm = policy()
    x = whole([[*row.prompt, *row.completions[0]] for row in rows], prompt=1)
    with torch.no_grad():
        values = [lm.log_prob(x, draws=DrawsKey.of(f"seed 0 step 0 draw {i}")).value.sum() for i in range(3)]
    assert losses(tmp_path)[0] == pytest.approx(-float(torch.stack(values).mean()) / 8, rel=1e-5)


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    whole_run, cut = policy(), policy()
    fit(whole_run, partial(dpo, beta=0.2), PAIRS, config(), output=tmp_path / "a")
    fit(cut, partial(dpo, beta=0.2), PAIRS, config(steps=4, save_every=2), output=tmp_path / "b")
    again = policy()
    (tmp_path / "b" / "log.jsonl").write_text(
        "\n".join((tmp_path / "b" / "log.jsonl").read_text().splitlines()[:2]) + "\n"
    )
    shutil.rmtree(next(p for p in (tmp_path / "b").glob("checkpoint-*") if p.name.endswith("4")))
    fit(again, partial(dpo, beta=0.2), PAIRS, config(steps=4, save_every=2), output=tmp_path / "b", resume=True)
    for a, b in zip(whole_run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("objective", [bgpo, gdpo], ids=["bgpo", "gdpo"])
def test_policy_gradients_on_bounds_raise_the_reward(tmp_path, objective):
    lm = policy(num_samples=2)

    def reward(prompt, completions):
        return [sum(token == 2 for token in completion) for completion in completions]

    collect = DrawGroups([[0], [1]], reward, prompts_per_collection=2, n=8, max_tokens=3)
    generator = torch.Generator().manual_seed(5)

    def mean_reward() -> float:
        drawn = lm.sample(200, prompt=whole([[0]], prompt=1), generator=generator, max_tokens=3)
        return float((drawn.ids[:, 1:] == 2).sum(1).double().mean())

    before = mean_reward()
    settings = config(steps=25, batch_size=2, draws_per_step=2)
    fit(lm, partial(objective, standardise=True), Online(collect, every=1), settings, output=tmp_path)
    assert mean_reward() > before + 0.7


def test_what_a_bound_has_not_is_refused(tmp_path):
    weighted = [Row(r.prompt, r.completions, weights=tuple([1.0] * len(c) for c in r.completions)) for r in PAIRS]
    with pytest.raises(InputError, match="needs a term per token"):
        fit(policy(), tab_po, weighted, config(), output=tmp_path / "a")
    with pytest.raises(InputError, match="on policy"):
        fit(policy(), bgpo, PAIRS, config(), output=tmp_path / "b")
    with pytest.raises(InputError, match="draws_per_step"):
        fit(preference_rows.policy(), "dpo", preference_rows.pairs(), config(draws_per_step=2), output=tmp_path / "c")


def test_an_order_makes_token_objectives_possible(tmp_path):
    lm = policy(estimator="left_to_right")
    weighted = [Row(r.prompt, r.completions, weights=tuple([1.0] * len(c) for c in r.completions)) for r in PAIRS]
    fit(lm, tab_po, weighted, config(steps=2), output=tmp_path)
    assert all(math.isfinite(value) for value in losses(tmp_path))
