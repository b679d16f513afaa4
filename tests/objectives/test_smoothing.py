"""Label smoothing against transformers' own, closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.objectives import MaximumLikelihood
from loglik.objectives.smoothing import label_smoothed_nll
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

VOCABULARY = 30
ROWS = [[5, 9, 4, 22, 17, 3, 8], [6, 11, 29], [7, 3, 3, 14, 21]]
STARTS = [3, 1, 2]


def gradients(raw) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in raw.named_parameters() if p.grad is not None}
    raw.zero_grad()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, 1.0])
def test_token_mean_is_that_of_transformers_in_value_and_gradient(epsilon, side):
    raw = build(CAUSAL["llama"], VOCABULARY, gain=2.0)
    right = TokenBatch.from_lists(ROWS, starts=STARTS)
    labels = right.ids.masked_fill(~right.scored_mask, -100)
    smoother = LabelSmoother(epsilon=epsilon)
    want = smoother({"logits": raw(input_ids=right.ids).logits}, labels, shift_labels=True)
    want.backward()
    expected = gradients(raw)
    batch = TokenBatch.from_lists(ROWS, starts=STARTS, padding_side=side, pad_id=9)
    terms = label_smoothed_nll(CausalLM(raw), batch, epsilon=epsilon)
    got = terms.mean()
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    found = gradients(raw)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_encoder_decoder_is_that_of_transformers():
    raw = build(SEQ2SEQ["bart"], VOCABULARY, gain=2.0)
    sources, targets = [[5, 9, 4], [6, 8, 7]], [[22, 17, 3, 8], [11, 29]]
    labels = torch.tensor([targets[0], [*targets[1], -100, -100]])
    out = raw(input_ids=torch.tensor(sources), labels=labels)
    want = LabelSmoother(epsilon=0.2)(out, labels)
    rows = [s + t for s, t in zip(sources, targets, strict=True)]
    got = label_smoothed_nll(Seq2SeqLM(raw), TokenBatch.from_lists(rows, starts=[3, 3]), epsilon=0.2).mean()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_without_smoothing_it_is_maximum_likelihood(reduction):
    model, batch = CausalLM(build(CAUSAL["gpt2"], VOCABULARY)), TokenBatch.from_lists(ROWS, starts=STARTS)
    got = label_smoothed_nll(model, batch, epsilon=0.0, reduction=reduction)
    want = MaximumLikelihood(reduction)(model.log_prob(batch))
    torch.testing.assert_close(got.mean(), want.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-4, rtol=1e-5)
    assert got.weight.tolist() == want.weight.tolist()
    torch.testing.assert_close(got.metrics["nats_per_unit"], want.metrics["nats_per_unit"], atol=1e-4, rtol=1e-5)


def test_the_metric_is_free_of_the_smoothing():
    model, batch = CausalLM(build(CAUSAL["gpt2"], VOCABULARY)), TokenBatch.from_lists(ROWS, starts=STARTS)
    smooth = label_smoothed_nll(model, batch, epsilon=0.5).metrics["nats_per_unit"]
    torch.testing.assert_close(smooth, label_smoothed_nll(model, batch, epsilon=0.0).metrics["nats_per_unit"])
    assert not smooth.requires_grad


def test_full_smoothing_does_not_see_the_targets_and_is_least_for_uniform_predictions():
    raw = build(CAUSAL["llama"], VOCABULARY)
    batch = TokenBatch.from_lists([[5, 9, 4]], starts=[2])
    other = TokenBatch.from_lists([[5, 9, 22]], starts=[2])
    one, two = (label_smoothed_nll(CausalLM(raw), x, epsilon=1.0).mean() for x in (batch, other))
    torch.testing.assert_close(one, two)
    assert one > math.log(VOCABULARY)
    with torch.no_grad():
        raw.lm_head.weight.zero_()
    flat = label_smoothed_nll(CausalLM(raw), batch, epsilon=1.0).mean()
    assert flat.item() == pytest.approx(math.log(VOCABULARY), abs=1e-6)


def test_a_step_cut_in_two_has_the_same_loss():
    model, batch = CausalLM(build(CAUSAL["gpt2"], VOCABULARY)), TokenBatch.from_lists(ROWS, starts=STARTS)
    whole = label_smoothed_nll(model, batch)
    parts = [
        label_smoothed_nll(model, TokenBatch.from_lists([r], starts=[s])) for r, s in zip(ROWS, STARTS, strict=True)
    ]
    cut = sum(p.loss.sum() for p in parts) / sum(p.weight.sum() for p in parts)
    torch.testing.assert_close(cut, whole.mean(), atol=1e-5, rtol=1e-5)


def test_rows_without_scored_tokens():
    """They add nothing to a token mean, and a mean over sequences refuses them."""
    model = CausalLM(build(CAUSAL["gpt2"], VOCABULARY))
    batch = TokenBatch.from_lists([[5, 9, 4], [6, 7]], starts=[1, 2])
    alone = label_smoothed_nll(model, TokenBatch.from_lists([[5, 9, 4]], starts=[1]))
    torch.testing.assert_close(label_smoothed_nll(model, batch).mean(), alone.mean())
    for reduction in ("sequence_mean", "sum"):
        with pytest.raises(InputError, match="row 1 has no scored token"):
            label_smoothed_nll(model, batch, reduction=reduction)


def test_impossible_tokens_are_refused_in_one_sentence():
    raw = build(SEQ2SEQ["bart"], VOCABULARY)
    raw.final_logits_bias[0, 5] = -math.inf
    model, batch = Seq2SeqLM(raw), TokenBatch.from_lists([[5, 9, 4, 8]], starts=[2])
    with pytest.raises(InputError, match=r"probability 0 in row 0.*use epsilon=0"):
        label_smoothed_nll(model, batch)
    assert label_smoothed_nll(model, batch, epsilon=0.0).mean().isfinite()


def test_extreme_logits_stay_finite():
    raw = build(CAUSAL["llama"], VOCABULARY)
    with torch.no_grad():
        raw.lm_head.weight.mul_(1e4)
    loss = label_smoothed_nll(CausalLM(raw), TokenBatch.from_lists(ROWS, starts=STARTS)).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in raw.parameters())


def test_refusals():
    model, batch = CausalLM(build(CAUSAL["gpt2"], VOCABULARY)), TokenBatch.from_lists(ROWS, starts=STARTS)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match="epsilon must lie between 0 and 1"):
            label_smoothed_nll(model, batch, epsilon=wrong)
    with pytest.raises(InputError, match="reduction must be one of token_mean"):
        label_smoothed_nll(model, batch, reduction="mean")
    masked = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=1)
    with pytest.raises(InputError, match=r"label smoothing needs a logit for every token.*MaskedLM"):
        label_smoothed_nll(masked, batch)
