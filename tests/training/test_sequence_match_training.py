"""SequenceMatch through `fit`: the loss is `sequence_match` on the model's own logits."""

from __future__ import annotations

import pytest
import torch

from loglik import InputError, TokenBatch
from loglik.models.dense import target_logits
from loglik.objectives.imitation import Trajectories, sequence_match
from loglik.objectives.registry import objective
from loglik.objectives.sequence_match import SequenceMatch
from loglik.training import DrawRollouts, Online, Row, TrainConfig, fit
from training.preference_rows import policy

DEMONSTRATIONS = [Row([3, 4], ([5, 6, 7],)), Row([8], ([9, 10],))]


def test_the_objective_is_sequence_match_on_the_models_logits():
    model = policy()
    batch = TokenBatch.from_lists(
        [[3, 4, 5, 6, 7], [3, 4, 11], [8, 9, 10], [8, 12, 13]], starts=[2, 2, 1, 1], groups=[0, 0, 1, 1]
    )
    got = SequenceMatch(alpha=0.3)(model, batch, batch.groups)
    logits = target_logits(model, batch)
    scored = batch.scored_mask

    def part(rows: list[int]) -> Trajectories:
        return Trajectories.from_logits(logits[rows], batch.ids[rows], scored[rows])

    want = sequence_match(part([0, 2]), part([1, 3]), alpha=0.3)
    assert torch.allclose(got.mean(), want.mean())
    alone = SequenceMatch("chi2", alpha=0.3)(model, batch, torch.arange(4))
    assert torch.allclose(alone.mean(), sequence_match(part([0, 1, 2, 3]), divergence="chi2", alpha=0.3).mean())
    with pytest.raises(InputError, match="the row of every completion"):
        SequenceMatch()(model, batch, torch.arange(3))


def test_fit_raises_the_demonstrations(tmp_path):
    model = policy()
    batch = TokenBatch.from_lists([[3, 4, 5, 6, 7], [8, 9, 10]], starts=[2, 1])
    with torch.no_grad():
        before = model.log_prob(batch).value
    collect = DrawRollouts(DEMONSTRATIONS, rows_per_collection=4, max_tokens=4)
    settings = TrainConfig(steps=40, batch_size=4, learning_rate=1e-2, schedule="constant")
    fit(model, objective("sequence_match", alpha=0.1), Online(collect), settings, output=tmp_path)
    with torch.no_grad():
        after = model.log_prob(batch).value
    assert float((after - before).min()) > 2.0


def test_rollouts_stand_beside_their_demonstration():
    collect = DrawRollouts(DEMONSTRATIONS, rows_per_collection=5, n=2, max_tokens=3)
    rows = list(collect(policy(), None, torch.Generator().manual_seed(0)))
    assert len(rows) == 5
    for row in rows:
        assert list(row.completions[0]) in [[5, 6, 7], [9, 10]]
        assert len(row.completions) == 3
    with pytest.raises(InputError, match="no demonstration"):
        list(DrawRollouts([], 1)(policy(), None, torch.Generator()))
