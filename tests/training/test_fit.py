"""The training loop: exact steps, exact resumption, nothing lost when something breaks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loglik.errors import InputError, LoglikError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.objectives import MaximumLikelihood, Terms
from loglik.training import Example, TokenBlocks, TrainConfig, evaluate, fit
from loglik.training.checkpoint import latest_checkpoint
from loglik.training.data import StepSampler, collate
from zoo import CAUSAL, build, byte_level_tokenizer


class Rows(torch.utils.data.Dataset):
    """Rows of uneven length with prompts of uneven length."""

    def __init__(self, count: int = 11) -> None:
        rng = np.random.default_rng(0)
        self.rows = [
            Example(rng.integers(0, 20, size=int(rng.integers(4, 9))).tolist(), int(rng.integers(1, 3)))
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


def llama() -> CausalLM:
    return CausalLM(build(CAUSAL["llama"], 20))


def weights(model: CausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, **changes}
    )


def test_equals_a_plain_torch_loop(tmp_path):
    """AdamW on the token-mean loss, by hand, on the same batches."""
    settings, data = config(max_grad_norm=0.5), Rows()
    model = llama()
    fit(model, MaximumLikelihood(), data, settings, output=tmp_path)
    other = llama().model
    groups = [
        {"params": [p for p in other.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    batches = iter(StepSampler(len(data), batch_size=4, micro_batch_size=4, first=0, last=6, seed=0))
    other.train()
    for step, batch in enumerate(batches):
        total = tokens = 0
        for index in batch:
            row = data[index]
            logits = other(input_ids=torch.tensor([row.ids])).logits[0, row.scored_from - 1 : -1]
            target = torch.tensor(row.ids[row.scored_from :])
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            tokens += len(target)
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in other.named_parameters():
        torch.testing.assert_close(weights(model)[name], p.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_is_exact_for_token_means(tmp_path, micro):
    """However a step is cut into micro-batches of uneven token counts, the weights come out the same."""
    whole, cut = llama(), llama()
    fit(whole, MaximumLikelihood(), Rows(), config(), output=tmp_path / "whole")
    fit(cut, MaximumLikelihood(), Rows(), config(micro_batch_size=micro), output=tmp_path / "cut")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, atol=2e-5, rtol=1e-4)


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    settings = config(save_every=2, log_every=1)

    def dropping() -> CausalLM:
        model = llama()
        model.model.config.attention_dropout = 0.1
        for layer in model.model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # so that random numbers matter
        return model

    straight = dropping()
    fit(straight, MaximumLikelihood(), Rows(), settings, output=tmp_path / "a", validation=Rows(3))
    calls = 0

    broken = dropping()
    log_prob = broken.log_prob

    def dies(x):
        nonlocal calls
        calls += 1
        if calls == 6:  # in the middle of step 6; step 4 was saved
            raise KeyboardInterrupt
        return log_prob(x)

    broken.log_prob = dies
    with pytest.raises(KeyboardInterrupt):
        fit(broken, MaximumLikelihood(), Rows(), settings, output=tmp_path / "b")
    resumed = dropping()
    result = fit(resumed, MaximumLikelihood(), Rows(), settings, output=tmp_path / "b", validation=Rows(3), resume=True)
    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert result.step == 6
    again = fit(dropping(), MaximumLikelihood(), Rows(), settings, output=tmp_path / "b", resume=True)
    assert again.loss == result.loss  # nothing was left to do
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in "ab"]
    timeless = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[1]] == [1, 2, 3, 4, 5, 6]


def test_output_loads_with_transformers(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = CausalLM(build(CAUSAL["gpt2"], len(tokenizer)), tokenizer)
    data = Rows()
    before = evaluate(model, MaximumLikelihood(), data, batch_size=3).loss
    result = fit(model, MaximumLikelihood(), data, config(steps=20), output=tmp_path, validation=data)
    assert result.validation is not None
    assert result.validation < before
    again = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert evaluate(again, MaximumLikelihood(), data, batch_size=3).loss == pytest.approx(result.validation, abs=1e-6)
    assert (tmp_path / "tokenizer.json").is_file()


def test_evaluation_is_the_mean_over_all_tokens_for_any_batch_size():
    model, data = llama(), Rows()
    nats = tokens = 0.0
    with torch.no_grad():
        for i in range(len(data)):
            ll = model.log_prob(collate([(i, data[i])]).tokens)
            nats, tokens = nats - float(ll.value), tokens + int(ll.num_units)
    for size in (1, 4, 11):
        assert evaluate(model, MaximumLikelihood(), data, batch_size=size).loss == pytest.approx(
            nats / tokens, abs=1e-5
        )


# ------------------------------------------------------------------ data
def test_every_token_but_the_first_is_predicted_once():
    stream = np.arange(100, dtype=np.int32)
    blocks = TokenBlocks(stream, 10)
    predicted = [token for i in range(len(blocks)) for token in list(blocks[i].ids)[1:]]
    assert predicted == list(range(1, 100))
    assert len(blocks) == 11
    with pytest.raises(ValueError, match="fewer than one block"):
        TokenBlocks(stream[:5], 10)


def test_batches_are_functions_of_seed_and_step():
    def make(first: int, seed: int = 0) -> list[list[int]]:
        return list(StepSampler(7, batch_size=4, micro_batch_size=2, first=first, last=14, seed=seed))

    every = make(0)
    assert make(5) == every[10:]
    assert make(0, seed=1) != every
    flat = [i for batch in every for i in batch]
    assert [sorted(flat[n : n + 7]) for n in range(0, 56, 7)] == [list(range(7))] * 8
    assert flat[:7] != flat[7:14]


def test_collate_pads_on_the_right_and_scores_from_the_mark():
    batch = collate([(0, Example([1, 2, 3], 2)), (1, Example([4, 5, 6, 7], 1))]).tokens
    assert isinstance(batch, TokenBatch)
    assert batch.scored_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.attention_mask.sum().item() == 7


def test_learning_rates():
    linear = TrainConfig(steps=12, learning_rate=1.0, schedule="linear", warmup_steps=2)
    assert [linear.learning_rate_at(s) for s in (0, 1, 2, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    cosine = TrainConfig(steps=10, learning_rate=2.0, schedule="cosine", final_lr_ratio=0.1)
    assert cosine.learning_rate_at(0) == pytest.approx(2.0)
    assert cosine.learning_rate_at(5) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert cosine.learning_rate_at(10) == pytest.approx(0.2)
    assert TrainConfig(steps=10, schedule="constant").learning_rate_at(9) == 1e-3


# ------------------------------------------------------------------ what goes wrong
def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    calls = 0

    def poisoned(policy):
        nonlocal calls
        calls += 1
        return MaximumLikelihood()(policy if calls < 4 else policy * 1e300)  # beyond float32

    with pytest.raises(LoglikError, match=r"the loss of step 4 is -?(inf|nan)"):
        fit(llama(), poisoned, Rows(), config(save_every=2), output=tmp_path)
    kept = latest_checkpoint(tmp_path)
    assert kept is not None
    assert kept.name == "checkpoint-00000002"


def test_another_run_is_not_overwritten(tmp_path):
    fit(llama(), MaximumLikelihood(), Rows(), config(steps=1), output=tmp_path)
    with pytest.raises(InputError, match="holds a run already"):
        fit(llama(), MaximumLikelihood(), Rows(), config(steps=1), output=tmp_path)
    with pytest.raises(InputError, match="other settings \\(learning_rate\\)"):
        fit(llama(), MaximumLikelihood(), Rows(), config(steps=1, learning_rate=1.0), output=tmp_path, resume=True)
    other = CausalLM(build(CAUSAL["gpt2"], 20))
    with pytest.raises(InputError, match="another architecture"):
        fit(other, MaximumLikelihood(), Rows(), config(steps=1), output=tmp_path, resume=True)


def test_damaged_checkpoint_is_named(tmp_path):
    fit(llama(), MaximumLikelihood(), Rows(), config(steps=1), output=tmp_path)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        fit(llama(), MaximumLikelihood(), Rows(), config(steps=1), output=tmp_path, resume=True)


def test_half_written_checkpoints_do_not_count(tmp_path):
    (tmp_path / "checkpoint-00000009").mkdir()
    (tmp_path / ".partial-00000010").mkdir()
    assert latest_checkpoint(Path(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide batch_size 4, got 3"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


class Scaled(torch.nn.Module):
    """An objective with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, policy: LogLikelihood) -> Terms:
        loss = -policy.value * self.log_scale.exp() - policy.num_units * self.log_scale
        return Terms(loss, policy.num_units.float())


def test_an_objective_with_weights_is_trained_and_kept(tmp_path):
    """The mean loss exp(s) * nll - s has its minimum at s = -log nll; a resumed run has the same weight."""
    settings = config(steps=60, learning_rate=0.1, schedule="linear", save_every=20)
    whole, half, rest = Scaled(), Scaled(), Scaled()
    data = Rows()

    def frozen() -> CausalLM:
        model = llama()
        model.model.requires_grad_(False)
        return model

    model = frozen()
    fit(model, whole, data, settings, output=tmp_path / "a")
    nats = evaluate(model, MaximumLikelihood(), data, batch_size=4).loss
    assert float(whole.log_scale.detach()) == pytest.approx(-math.log(nats), abs=0.05)
    first = frozen()
    log_prob, calls = first.log_prob, []

    def dies(x):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return log_prob(x)

    first.log_prob = dies
    with pytest.raises(KeyboardInterrupt):
        fit(first, half, data, settings, output=tmp_path / "b")
    fit(frozen(), rest, data, settings, output=tmp_path / "b", resume=True)
    assert torch.equal(rest.log_scale, whole.log_scale)
