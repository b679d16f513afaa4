"""Training on preferences: equal to a loop by hand, however it is cut up, whatever gives the reference."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from loglik.errors import InputError, LoglikError
from loglik.models.causal import CausalLM
from loglik.models.reward import RewardModel
from loglik.objectives import registry
from loglik.objectives.base import Terms
from loglik.objectives.preference import dpo
from loglik.objectives.reference_free import orpo
from loglik.objectives.token_preference import tab_po
from loglik.objectives.unpaired import kto
from loglik.training import Online, Row, TrainConfig, evaluate, fit
from loglik.training.data import Numbered, StepSampler
from loglik.training.inputs import needs_of
from loglik.training.lora import LoraSettings, with_lora
from loglik.training.reference import AdapterOff, ModelReference, stored, weights_digest
from training.preference_rows import labelled, pairs, policy, weights_of


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"steps": 5, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1, "log_every": 1, **changes}
    )


def losses(path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def log_prob(network, row: Row, which: int) -> torch.Tensor:
    """A completion's log-probability from the network's own logits."""
    ids = [*row.prompt, *row.completions[which]]
    logits = network(input_ids=torch.tensor([ids])).logits[0, len(row.prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[len(row.prompt) :])[:, None]).sum()


def test_dpo_equals_a_loop_by_hand(tmp_path):
    """AdamW on -log sigma(beta Delta), prompts not shared, the reference a copy; the first loss is log 2."""
    rows, settings = pairs(), config(max_grad_norm=0.5)
    model = policy()
    fit(model, partial(dpo, beta=0.3), rows, settings, output=tmp_path)
    network = policy().model
    frozen = copy.deepcopy(network)
    matrices = {"params": [p for p in network.parameters() if p.dim() >= 2], "weight_decay": 0.0}
    vectors = {"params": [p for p in network.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=1e-2, betas=(0.9, 0.95))
    by_hand = []
    batches = StepSampler(len(rows), batch_size=4, micro_batch_size=4, first=0, last=5, seed=0)
    for step, batch in enumerate(batches):
        terms = []
        for index in batch:
            with torch.no_grad():
                before = log_prob(frozen, rows[index], 0) - log_prob(frozen, rows[index], 1)
            gap = log_prob(network, rows[index], 0) - log_prob(network, rows[index], 1) - before
            terms.append(-F.logsigmoid(0.3 * gap))
        loss = torch.stack(terms).mean()
        by_hand.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path) == pytest.approx(by_hand, abs=1e-5)
    for name, p in network.named_parameters():
        torch.testing.assert_close(dict(model.model.named_parameters())[name], p, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (dpo, pairs()),
        (partial(dpo, nll_weight=0.5), pairs()),  # a mean over pairs and one over tokens
        (orpo, pairs()),
        (tab_po, pairs()),
        (kto, labelled()),  # its KL estimate is one of the whole step
    ],
    ids=["dpo", "dpo+nll", "orpo", "tab_po", "kto"],
)
def test_micro_batches_change_nothing(tmp_path, objective, rows):
    one, other = policy(), policy()
    fit(one, objective, rows, config(), output=tmp_path / "a", validation=rows[:3])
    fit(other, objective, rows, config(micro_batch_size=1), output=tmp_path / "b", validation=rows[:3])
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], value, atol=1e-4, rtol=0)
    last = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in "ab"]
    assert set(last[0]) == set(last[1])
    for name, value in last[0].items():
        if name != "seconds":
            assert last[1][name] == pytest.approx(value, abs=2e-4), name


def test_an_objective_on_the_model_itself_is_exact_too(tmp_path):
    """Weights are known only after the forward pass: the gradient is mended once they are."""

    def mean_log_prob(model, batch, *, power=1.0) -> Terms:
        found = model.log_prob(batch)
        return Terms(-found.value * power, found.num_units.float())

    def reduced(policy, *, power=1.0) -> Terms:
        return Terms(-policy.value * power, policy.num_units.float())

    runs = {}
    for name, objective, micro in (("a", mean_log_prob, 1), ("b", mean_log_prob, 4), ("c", reduced, 2)):
        model = policy()
        fit(model, objective, labelled(), config(micro_batch_size=micro), output=tmp_path / name)
        runs[name] = weights_of(model)
    for name, value in runs["a"].items():
        torch.testing.assert_close(runs["b"][name], value, atol=1e-4, rtol=0)
        torch.testing.assert_close(runs["c"][name], value, atol=1e-4, rtol=0)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "c"), abs=1e-5)


def test_whatever_gives_the_reference_the_run_is_the_same(tmp_path):
    """The policy as it was, another copy, numbers in the rows, a function: one trajectory."""
    rows = pairs()
    sums = [ModelReference(policy())(Numbered([row]).batch([0])).value.tolist() for row in rows]
    with_numbers = [
        Row(row.prompt, row.completions, values={"reference": tuple(s)}, name=row.name)
        for row, s in zip(rows, sums, strict=True)
    ]
    runs = {
        "auto": (rows, {}),
        "model": (rows, {"reference": policy()}),
        "function": (rows, {"reference": ModelReference(policy())}),
        "rows": (with_numbers, {}),
    }
    curves = {}
    for name, (data, options) in runs.items():
        fit(policy(), dpo, data, config(), output=tmp_path / name, **options)
        curves[name] = losses(tmp_path / name)
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["auto"], abs=1e-5), name


def test_an_adapter_is_its_own_reference(tmp_path):
    """Switching the adapter off gives the curve of a copy of the base model; the base does not move."""
    rows, base, twin = pairs(), policy(), policy()
    before = weights_of(base)
    torch.manual_seed(0)
    adapted = with_lora(base, LoraSettings(rank=2, alpha=4.0))
    fit(adapted, dpo, rows, config(), output=tmp_path / "off")
    torch.manual_seed(0)
    other = with_lora(twin, LoraSettings(rank=2, alpha=4.0))
    fit(other, dpo, rows, config(), output=tmp_path / "copy", reference=policy())
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "copy"), abs=1e-6)
    assert losses(tmp_path / "off")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path / "off")[-1] < math.log(2)
    for name, value in before.items():
        owned = dict(adapted.model.get_base_model().named_parameters())
        kept = owned.get(name, owned.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, value), name
    with pytest.raises(InputError, match="no adapter to switch off"):
        AdapterOff(policy())


def test_the_reference_is_computed_once_for_weights_and_rows(tmp_path, monkeypatch):
    rows, calls = Numbered(pairs()), []
    model = policy()
    run = CausalLM.log_prob
    monkeypatch.setattr(CausalLM, "log_prob", lambda self, x: (calls.append(len(x)), run(self, x))[1])

    def once(data: Numbered, key: str):
        return stored(ModelReference(model), data, batch_size=5, cache=tmp_path, key=key)

    first = once(rows, weights_digest(model.model))
    assert sum(calls) == 24
    again = once(rows, weights_digest(model.model))
    assert sum(calls) == 24
    batch = rows.batch([3, 0, 7])
    torch.testing.assert_close(again(batch).per_unit, first(batch).per_unit, atol=0, rtol=0)
    torch.testing.assert_close(first(batch).value, ModelReference(model)(batch).value, atol=1e-5, rtol=0)
    once(Numbered(pairs(seed=1)), weights_digest(model.model))
    assert sum(calls) == 24 + 6 + 24  # other rows
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] += 1
    once(rows, weights_digest(model.model))
    assert sum(calls) == 24 + 6 + 24 + 24  # other weights
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        once(rows, weights_digest(model.model))


def test_resumed_preference_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    settings, rows = config(save_every=2, eval_every=2), pairs()
    straight = policy()
    fit(straight, dpo, rows, settings, output=tmp_path / "a", validation=rows[:4])
    broken = policy()
    run, calls = broken.log_prob, []

    def dies(x):
        calls.append(1)
        if len([1 for c in calls if c]) == 12:
            raise KeyboardInterrupt
        return run(x)

    broken.log_prob = dies
    with pytest.raises(KeyboardInterrupt):
        fit(broken, dpo, rows, settings, output=tmp_path / "b", validation=rows[:4])
    resumed = policy()
    fit(resumed, dpo, rows, settings, output=tmp_path / "b", validation=rows[:4], resume=True)
    for name, value in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], value), name
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(InputError, match="objective"):
        fit(policy(), partial(dpo, beta=0.2), rows, settings, output=tmp_path / "b", resume=True)


def test_the_best_weights_are_kept(tmp_path):
    """With a learning rate that overshoots, the best evaluation is not the last."""
    rows = pairs()
    result = fit(
        policy(), "mle", labelled(4), config(steps=12, learning_rate=0.05, eval_every=2, schedule="constant"),
        output=tmp_path, validation=rows[6:9],
    )  # fmt: skip
    curve = {
        r["step"]: r["validation"]
        for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if "validation" in r
    }
    assert sorted(curve) == [0, 2, 4, 6, 8, 10, 12]
    assert result.best_step == min(curve, key=curve.get)
    from transformers import AutoModelForCausalLM

    best = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path / "best").eval())
    at = evaluate(best, registry.objective("mle"), rows[6:9], batch_size=2)
    assert at.loss == pytest.approx(min(curve.values()), abs=1e-5)


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    rows = pairs()
    fit(policy(), dpo, rows, config(steps=2, save_every=1), output=tmp_path)
    bad = [
        Row(row.prompt, row.completions, values={"reference": (0.0, math.nan if i == 7 else 0.0)}, name=row.name)
        for i, row in enumerate(rows)
    ]
    with pytest.raises(LoglikError, match=r"line 8.*checkpoint is kept"):
        fit(policy(), dpo, bad, config(steps=6, batch_size=12), output=tmp_path / "other")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000001", "checkpoint-00000002"]


def test_needs_are_read_off_the_signature():
    assert needs_of(dpo).pairs
    assert needs_of(dpo).reference
    assert not needs_of(orpo).reference
    assert needs_of(kto).kl
    assert needs_of(tab_po).optional == ("chosen_weights", "rejected_weights")
    assert needs_of(partial(dpo, beta=0.1)) == needs_of(dpo)
    trained = [name for name in registry.OBJECTIVES if needs_of(registry.objective(name)).reward_model]
    assert sorted(trained) == ["binary_feedback", "bradley_terry"]

    def asks(policy, teacher):
        return policy

    with pytest.raises(InputError, match="'teacher'"):
        needs_of(asks)


def test_rows_that_do_not_fit_the_objective_are_refused_before_training(tmp_path):
    single = [Row([3], ([4, 5],), name="line 1")]
    with pytest.raises(InputError, match=r"two completions.*line 1 has 1"):
        fit(policy(), dpo, single, config(), output=tmp_path / "a")
    with pytest.raises(InputError, match="'labels'"):
        fit(policy(), kto, single, config(), output=tmp_path / "b")
    with pytest.raises(InputError, match="needs a frozen reference"):
        fit(policy(), dpo, pairs(), config(), output=tmp_path / "c", reference=None)
    with pytest.raises(InputError, match="empty completion"):
        fit(policy(), "mle", [Row([3], ([],), name="x")], config(), output=tmp_path / "d")
    with pytest.raises(InputError, match="did you mean 'dpo'"):
        fit(policy(), "dop", pairs(), config(), output=tmp_path / "e")
    with pytest.raises(InputError, match="did you mean 'beta'"):
        registry.objective("dpo", betta=1.0)
    with pytest.raises(InputError, match="must be a number"):
        registry.objective("dpo", beta="x")


def test_every_named_objective_trains(tmp_path):
    """One step each on rows that have everything; the loss is finite and a gradient arrives."""
    many = [
        Row(
            row.prompt,
            row.completions,
            values={"rewards": (1.0, 0.0), "proposal": (-3.0, -4.0), "labels": (1.0, 0.0)},
            weights=row.weights,
            name=row.name,
        )
        for row in pairs(4)
    ]
    for name in registry.OBJECTIVES:
        rewards = name in ("bradley_terry", "binary_feedback")
        model = RewardModel.from_causal(policy()) if rewards else policy()
        before = weights_of(model)
        rows = labelled(4) if name in ("mle", "kto", "implicit_reward_ce", "binary_feedback") else many
        if name == "edit_invariant":  # n-grams of up to four tokens
            rows = [Row(r.prompt, ([*r.completions[0], 3, 4, 5, 6],)) for r in many]
        data = Online(lambda *_, rows=rows: rows) if name in ("bgpo", "gdpo") else rows
        fit(model, name, data, config(steps=1, warmup_steps=0), output=tmp_path / name)
        moved = max(float((weights_of(model)[key] - value).abs().max()) for key, value in before.items())
        assert moved > 0, name


def test_steps_are_counted_over_epochs():
    sampler = StepSampler(5, batch_size=2, micro_batch_size=2, first=0, last=5, seed=3)
    seen = [i for batch in sampler for i in batch]
    assert all(sorted(part) == list(range(5)) for part in (seen[:5], seen[5:]))
    assert any(a != b for a, b in pairwise((seen[:5], seen[5:])))
