"""Maximum likelihood against closed forms and torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch

from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.objectives import MaximumLikelihood
from zoo import CAUSAL, build


def likelihood(kind: Kind = Kind.EXACT) -> LogLikelihood:
    per_unit = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return LogLikelihood.from_per_unit(per_unit, mask, kind=kind)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("token_mean", 15 / 5), ("sequence_mean", (3 / 2 + 12 / 3) / 2), ("sum", 15 / 2)],
)
def test_reductions(reduction, expected):
    terms = MaximumLikelihood(reduction)(likelihood())
    assert terms.mean().item() == pytest.approx(expected)
    torch.testing.assert_close(terms.metrics["nats_per_unit"], torch.tensor([1.5, 4.0]))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_a_step_cut_in_two_has_the_same_loss(reduction):
    """Sums of loss and of weight over micro-batches give the loss of the whole, of uneven lengths too."""
    objective, whole = MaximumLikelihood(reduction), likelihood()
    parts = [objective(whole[0]), objective(whole[1])]
    cut = sum(p.loss.sum() for p in parts) / sum(p.weight.sum() for p in parts)
    torch.testing.assert_close(cut, objective(whole).mean())


def test_token_mean_is_cross_entropy_in_value_and_gradient():
    raw = build(CAUSAL["llama"], 20)
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    loss = MaximumLikelihood()(CausalLM(raw).log_prob(TokenBatch.from_lists(ids.tolist()))).mean()
    loss.backward()
    got = {name: p.grad.clone() for name, p in raw.named_parameters()}
    raw.zero_grad()
    expected = raw(input_ids=ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, p in raw.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4)


def test_bounds_are_trained_on_from_the_right_side_only():
    assert MaximumLikelihood()(likelihood(Kind.LOWER_BOUND)).mean().item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="upper bound"):
        MaximumLikelihood()(likelihood(Kind.UPPER_BOUND))


def test_weights_and_metrics_are_detached():
    per_unit = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    value = LogLikelihood.from_per_unit(per_unit, torch.ones(1, 2, dtype=torch.bool), unit=Unit.TOKEN)
    terms = MaximumLikelihood()(value)
    assert terms.loss.requires_grad
    assert not terms.weight.requires_grad
    assert not terms.metrics["nats_per_unit"].requires_grad
