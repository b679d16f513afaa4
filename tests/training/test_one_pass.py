"""One pass over fresh data: losses before the update, codes that identities hold for, students that can be rebuilt."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from loglik.errors import InputError, LoglikError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.training.config import TrainConfig
from loglik.training.data_codes import draw_windows, small_language_model
from loglik.training.one_pass import prequential_run, requential_run

LN2 = math.log(2)
STEPS, BATCH, LENGTH, SYMBOLS = 6, 4, 5, 3
CONFIG = TrainConfig(STEPS, batch_size=BATCH, learning_rate=1e-2, schedule="constant", warmup_steps=2, seed=0)


def model(seed=0) -> CausalLM:
    return small_language_model(SYMBOLS + 1, width=16, layers=1, window=LENGTH, seed=seed)


def batch_of(rows) -> TokenBatch:
    led = torch.cat([torch.full((len(rows), 1), SYMBOLS), rows], 1)
    scored = torch.ones_like(led, dtype=torch.bool)
    scored[:, 0] = False
    return TokenBatch(led, torch.ones_like(scored), scored)


def batches(count=STEPS, seed=1) -> list[TokenBatch]:
    g = torch.Generator().manual_seed(seed)
    return [batch_of(torch.randint(SYMBOLS, (BATCH, LENGTH), generator=g)) for _ in range(count)]


def weights(m: CausalLM) -> list[torch.Tensor]:
    return [p.detach().clone() for p in m.model.parameters()]


def sampler(teacher: CausalLM, seed=0, seen=None):
    g = torch.Generator().manual_seed(seed)

    def sample() -> TokenBatch:
        drawn = draw_windows(teacher, SYMBOLS, count=BATCH, length=LENGTH, generator=g)
        if seen is not None:
            seen.append(drawn)
        return drawn

    return sample


# ------------------------------------------------------------------ prequential
def test_losses_are_those_before_the_update():
    """Against a loop of plain torch that reads each batch, and only then learns from it."""
    data, held_out = batches(), batches(2, seed=2)
    found = prequential_run(model(), data, CONFIG, held_out=held_out, checkpoints=[3])
    plain = model()
    network = plain.model
    groups = [
        {"params": [p for p in network.parameters() if p.dim() >= 2]},
        {"params": [p for p in network.parameters() if p.dim() < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=CONFIG.betas, weight_decay=0.0)
    losses, finals = [], {}

    def loss(batch):
        logits = network(input_ids=batch.ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten())

    for step, batch in enumerate(data):
        value = loss(batch)
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CONFIG.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * min(1.0, (step + 1) / 2)
        optimizer.step()
        with torch.no_grad():
            finals[step + 1] = sum(float(loss(b)) for b in held_out) / len(held_out)
    assert (-found.curve.mean_per_unit().value).tolist() == pytest.approx(losses, abs=1e-5)
    assert found.curve.num_units.tolist() == [BATCH * LENGTH] * STEPS
    assert sorted(found.finals) == [3, STEPS]
    for step, rows in found.finals.items():
        assert len(rows) == 2 * BATCH
        assert -float(rows.total().mean_per_unit().value) == pytest.approx(finals[step], abs=1e-5)


def test_code_of_a_run_obeys_the_identity_of_the_stream():
    """K(X) = K(M) + D loss / ln 2, at every checkpoint, over the tokens up to it."""
    found = prequential_run(model(), batches(), CONFIG, held_out=batches(1, seed=2), checkpoints=[2, 4])
    for step in (2, 4, STEPS):
        code = found.code(step)
        assert code.tokens == step * BATCH * LENGTH
        assert code.stream.item() == pytest.approx(-float(found.curve.value[:step].double().sum()) / LN2)
        assert code.stream.item() == pytest.approx(code.model.item() + code.tokens * code.bits_per_token, abs=1e-6)
        assert code.model.stderr is not None


def test_a_checkpoint_is_a_shorter_run():
    whole = prequential_run(model(), batches(), CONFIG, held_out=batches(1, seed=2), checkpoints=[3])
    short = prequential_run(model(), batches(), replace(CONFIG, steps=3), held_out=batches(1, seed=2))
    assert torch.equal(whole.finals[3].value, short.finals[3].value)
    assert whole.code(3).model.item() == short.code(3).model.item()


def test_any_model_with_weights_can_be_coded():
    """A coin with one weight: the code of its flips is its regret, and learning brings the loss near the entropy."""

    class Coin:
        kind, unit = Kind.EXACT, Unit.EVENT

        def __init__(self) -> None:
            self.model = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.zeros_(self.model.weight)

        def log_prob(self, x, *, draws=None):
            logit = self.model.weight[0, 0]
            value = torch.where(x > 0, torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit))
            return LogLikelihood(value, self.kind, self.unit, torch.ones(len(x), dtype=torch.long))

    g = torch.Generator().manual_seed(0)
    flips = [(torch.rand(200, generator=g) < 0.9).float() for _ in range(80)]
    config = TrainConfig(60, batch_size=200, learning_rate=0.1, schedule="constant", max_grad_norm=0)
    found = prequential_run(Coin(), flips[:60], config, held_out=flips[60:])
    rate = float(torch.cat(flips[60:]).mean())
    entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate))  # no coin does better on these flips
    code = found.code(60)
    assert entropy <= code.bits_per_token < entropy + 0.02
    assert found.curve.unit is Unit.EVENT
    assert float(found.curve.mean_per_unit().value[0]) == pytest.approx(-LN2)
    assert 200 * (1 - entropy) < code.model.item() < 60 * 200 * (1 - entropy)


# ------------------------------------------------------------------ requential
def test_divergences_are_those_of_direct_enumeration():
    """Each step's number against a sum over all three symbols (and the separator) at every sampled prefix."""
    teacher, student, moments = model(), model(), []
    draw = sampler(teacher)

    def sample() -> TokenBatch:
        drawn = draw()
        moments.append((drawn, CausalLM(copy.deepcopy(teacher.model)), CausalLM(copy.deepcopy(student.model))))
        return drawn

    found = requential_run(teacher, student, batches(), sample, CONFIG, held_out=batches(1, seed=2))
    assert len(moments) == STEPS
    for step, (drawn, guide, learner) in enumerate(moments):
        total = 0.0
        for row in drawn.ids.tolist():
            for place in range(1, LENGTH + 1):
                ways = TokenBatch.from_lists(
                    [[*row[:place], v] for v in range(SYMBOLS + 1)], scored_from=[place] * (SYMBOLS + 1)
                )
                p, q = (m.log_prob(ways).value.detach().double() for m in (guide, learner))
                assert float(p.exp().sum()) == pytest.approx(1, abs=1e-5)
                total += float((p.exp() * (p - q)).sum())
        assert float(found.divergences[step]) == pytest.approx(total, abs=1e-4)
    assert found.tokens.tolist() == [BATCH * LENGTH] * STEPS
    assert float(found.divergences.sum()) > 0
    assert found.code(STEPS).model.item() == pytest.approx(float(found.divergences.sum()) / LN2)


def test_the_student_can_be_rebuilt_from_the_samples_alone():
    """What a decoder does: from the same first weights, learn from the same samples. The data do not enter."""
    seen: list[TokenBatch] = []
    teacher, student = model(), model()
    held_out = batches(1, seed=2)
    found = requential_run(
        teacher, student, batches(), sampler(teacher, seen=seen), CONFIG, held_out=held_out, checkpoints=[2]
    )
    decoded = model()
    again = prequential_run(decoded, seen, CONFIG, held_out=held_out, checkpoints=[2])
    assert all(torch.equal(a, b) for a, b in zip(weights(student), weights(decoded), strict=True))
    assert torch.equal(found.finals[2].value, again.finals[2].value)
    assert not all(torch.equal(a, b) for a, b in zip(weights(student), weights(teacher), strict=True))


def test_the_teacher_learns_from_the_data_alone_and_each_batch_once():
    teacher, student = model(), model()
    found = requential_run(
        teacher, student, iter(batches()), sampler(teacher), CONFIG, held_out=batches(1, seed=2), max_kl=math.inf
    )
    alone = model()
    prequential_run(alone, batches(), CONFIG, held_out=batches(1, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(weights(teacher), weights(alone), strict=True))
    assert found.teacher_steps == STEPS


def test_the_teacher_waits_for_its_student():
    runs = {}
    for gate in (1e-9, math.inf):
        teacher, student = model(), model()
        runs[gate] = requential_run(
            teacher, student, batches(), sampler(teacher), CONFIG, held_out=batches(1, seed=2), max_kl=gate
        )
    assert runs[1e-9].teacher_steps < STEPS == runs[math.inf].teacher_steps
    assert len(runs[1e-9].divergences) == STEPS


def test_a_teacher_that_never_changes_costs_nothing():
    config = replace(CONFIG, learning_rate=1e-30)
    teacher, student = model(), model()
    found = requential_run(teacher, student, batches(), sampler(teacher), config, held_out=batches(1, seed=2))
    assert found.code(STEPS).model.item() == pytest.approx(0, abs=1e-9)
    bound = found.code(STEPS, overhead=True)
    assert bound.model.kind is Kind.UPPER_BOUND
    assert bound.model.item() == pytest.approx(4 * STEPS, abs=1e-6)


# ------------------------------------------------------------------ refusals
def test_runs_refuse_what_gives_no_code():
    held_out = batches(1, seed=2)
    for options, message in (
        ({"config": replace(CONFIG, schedule="cosine")}, "set schedule to constant, not cosine"),
        ({"held_out": []}, "no held-out data"),
        ({"checkpoints": [STEPS + 1]}, "checkpoints must be from 1 to the number of steps, 6, got 7"),
        ({"batches": batches(4)}, "the data have 4 batches for 6 steps"),
    ):
        given = {"batches": batches(), "config": CONFIG, "held_out": held_out, **options}
        first, config = given.pop("batches"), given.pop("config")
        with pytest.raises(InputError, match=message):
            prequential_run(model(), first, config, **given)
        teacher = model()
        with pytest.raises(InputError, match=message):
            requential_run(teacher, model(), first, sampler(teacher), config, max_kl=math.inf, **given)
    with pytest.raises(InputError, match="no weights"):
        prequential_run(object(), batches(), CONFIG, held_out=held_out)
    for gate in (0.0, math.nan):
        with pytest.raises(InputError, match="max_kl must be positive"):
            requential_run(model(), model(), batches(), list, CONFIG, held_out=held_out, max_kl=gate)
    one = model()
    with pytest.raises(InputError, match="share weights"):
        requential_run(one, one, batches(), sampler(one), CONFIG, held_out=held_out)
    with pytest.raises(InputError, match="begin with other weights"):
        requential_run(model(0), model(1), batches(), sampler(one), CONFIG, held_out=held_out)


def test_a_loss_that_is_not_finite_names_its_step():
    broken = model()
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[0] = math.nan
    with pytest.raises(LoglikError, match=r"the loss of step 1 is nan: lower the learning rate"):
        prequential_run(broken, batches(), CONFIG, held_out=batches(1, seed=2))
