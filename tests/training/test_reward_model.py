"""Reward models: padding changes nothing, losses are those of TRL and torch, and they learn what pairs say."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from loglik.cli import main
from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.reward import RewardModel
from loglik.training import Row, TrainConfig, evaluate, fit
from training.preference_rows import labelled, pairs, policy
from zoo import CAUSAL, build, byte_level_tokenizer

ROWS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]


def reward_model() -> RewardModel:
    return RewardModel.from_causal(policy())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_padding_and_company_change_nothing(name):
    model = RewardModel.from_causal(CausalLM(build(CAUSAL[name], 20)))
    alone = torch.cat([model.rewards(TokenBatch.from_lists([row])) for row in ROWS])
    for side in ("left", "right"):
        together = model.rewards(TokenBatch.from_lists(ROWS, padding_side=side))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    own = torch.cat([model.model(input_ids=torch.tensor([row])).logits[:, 0] for row in ROWS])
    torch.testing.assert_close(alone, own, atol=1e-5, rtol=0)


def test_the_network_keeps_the_language_models_weights():
    base = policy()
    model = RewardModel.from_causal(base)
    for (name, mine), (_, theirs) in zip(
        model.model.base_model.named_parameters(), base.model.base_model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    again = RewardModel.from_causal(base)
    assert torch.equal(again.model.score.weight, model.model.score.weight)


def test_bradley_terry_step_is_that_of_plain_torch(tmp_path):
    rows, model, other = pairs(4), reward_model(), reward_model().model
    fit(model, "bradley_terry", rows, TrainConfig(steps=1, batch_size=4, micro_batch_size=2, learning_rate=1e-2,
        max_grad_norm=0, log_every=1), output=tmp_path)  # fmt: skip
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    sides = [
        torch.cat([other(input_ids=torch.tensor([[*r.prompt, *r.completions[i]]])).logits[:, 0] for r in rows])
        for i in (0, 1)
    ]
    loss = -F.logsigmoid(sides[0] - sides[1]).mean()
    assert logged["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    optimizer.step()
    for name, p in other.named_parameters():
        mine = dict(model.model.named_parameters())[name]
        torch.testing.assert_close(mine, p, atol=2e-5, rtol=0, msg=name)


def test_it_learns_which_token_is_preferred_and_is_read_back(tmp_path):
    rows = [Row(r.prompt, ([*r.completions[0], 5], [*r.completions[0], 6])) for r in pairs(40)]
    model = reward_model()
    settings = TrainConfig(steps=30, batch_size=8, learning_rate=1e-2)
    fit(model, "bradley_terry", rows[:30], settings, output=tmp_path)
    held = evaluate(model, pytest.importorskip("loglik.objectives.preference").bradley_terry, rows[30:], batch_size=4)
    assert held.metrics["accuracy"] == 1.0
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = TokenBatch.from_lists(ROWS)
    torch.testing.assert_close(RewardModel(network).rewards(batch), model.rewards(batch), atol=1e-5, rtol=0)


def test_binary_feedback_trains_on_labels(tmp_path):
    rows = [
        Row(r.prompt, ([*r.completions[0], 5 + i % 2],), values={"labels": (float(i % 2),)})
        for i, r in enumerate(labelled(40))
    ]
    model = reward_model()
    fit(model, "binary_feedback", rows, TrainConfig(steps=30, batch_size=8, learning_rate=1e-2), output=tmp_path)
    from loglik.objectives.rewards import binary_feedback

    assert evaluate(model, binary_feedback, rows, batch_size=8).metrics["accuracy"] == 1.0


def test_refusals(tmp_path):
    settings = TrainConfig(steps=1)
    with pytest.raises(InputError, match="a reward model has none"):
        fit(reward_model(), "dpo", pairs(), settings, output=tmp_path / "a")
    with pytest.raises(InputError, match="trains a RewardModel"):
        fit(policy(), "bradley_terry", pairs(), settings, output=tmp_path / "b")
    with pytest.raises(InputError, match="is no reward model"):
        RewardModel(policy().model)
    with pytest.raises(InputError, match="cannot be read as a reward model"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


def test_on_the_command_line_a_language_model_becomes_a_reward_model(tmp_path):
    tokenizer = byte_level_tokenizer()
    build(CAUSAL["llama"], len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"prompt": f"{i}? ", "chosen": "yes", "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = ("--data", str(tmp_path / "pairs.jsonl"), "--device", "cpu", "--lr", "1e-2")
    for source, output in (("model", "one"), ("one", "two")):
        places = ("-m", str(tmp_path / source), "-o", str(tmp_path / output))
        main(["train", "--objective", "bradley_terry", *places, *data, "--steps", "10", "--log-every", "1"])
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert log[0]["accuracy"] == 1.0  # what the first run has learnt
    RewardModel.from_pretrained(tmp_path / "two")
