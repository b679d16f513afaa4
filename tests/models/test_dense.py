"""Logits of all tokens and states before the head equal those of naive forward passes, wherever padding stands."""

from __future__ import annotations

import peft
import pytest
import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import (
    encoder_decoder_states,
    encoder_states,
    output_head,
    predicted_mask,
    scored_logits,
    states_before_head,
    target_logits,
)
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, MASKED, MORE_CAUSAL, SEQ2SEQ, build

VOCABULARY = 40
STARTS = [3, 1, 6, 2]
EVERY_CAUSAL = {**CAUSAL, **{name: MORE_CAUSAL[name] for name in ("cohere", "granite", "phi", "lfm2")}}
FAMILIES = [*(("causal", name) for name in EVERY_CAUSAL), *(("seq2seq", name) for name in SEQ2SEQ)]


def network(family, name):
    table = EVERY_CAUSAL if family == "causal" else SEQ2SEQ
    raw = build(table[name], VOCABULARY)
    return CausalLM(raw) if family == "causal" else Seq2SeqLM(raw)


def random_rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 2, 12, 5)]


def batches() -> dict[str, TokenBatch]:
    """One content, padded on the right, on the left, and everywhere at once."""
    rows = random_rows()
    right = TokenBatch.from_lists(rows, starts=STARTS)
    width = right.ids.shape[1]
    ids = torch.full((len(rows), 2 * width + 3), 7)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    for i, row in enumerate(rows):
        columns = torch.randperm(ids.shape[1], generator=generator)[: len(row)].sort().values
        ids[i, columns] = torch.tensor(row)
        real[i, columns] = True
    scored = real & (real.cumsum(1) > torch.tensor(STARTS)[:, None])
    starts = scored.int().argmax(1)
    return {
        "right": right,
        "left": TokenBatch.from_lists(rows, starts=STARTS, padding_side="left", pad_id=9),
        "inside": TokenBatch(ids, real, scored, starts),
    }


def naive(model, row: list[int], start: int) -> tuple[torch.Tensor, int]:
    """(n, V) logits of one row by itself, and the first token of the row that they predict."""
    if isinstance(model, CausalLM):
        return model.model(input_ids=torch.tensor([row])).logits[0, :-1], 1
    first = model.model.config.decoder_start_token_id
    shifted = torch.tensor([[first, *row[start:-1]]])
    return model.model(input_ids=torch.tensor([row[:start]]), decoder_input_ids=shifted).logits[0], start


@pytest.mark.parametrize("side", ["right", "left", "inside"])
@pytest.mark.parametrize(("family", "name"), FAMILIES)
@torch.no_grad()
def test_logits_equal_naive_ones_wherever_padding_stands(family, name, side):
    """Every real token is predicted by exactly the logits of its row alone; all other columns are zero."""
    model, x = network(family, name), batches()[side]
    got = target_logits(model, x)
    assert got.dtype == torch.float32
    predicted = predicted_mask(model, x)
    rows = zip(random_rows(), STARTS, strict=True)
    for i, (row, start) in enumerate(rows):
        want, first = naive(model, row, start)
        columns = x.attention_mask[i].nonzero().flatten()[first:]
        torch.testing.assert_close(got[i, columns], want, atol=1e-4, rtol=1e-4)
        assert predicted[i].nonzero().flatten().tolist() == columns.tolist()
    assert (got[~predicted] == 0).all()


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@torch.no_grad()
def test_logits_give_the_log_likelihood(family, name):
    """Log-softmax at the target is `log_prob` token by token; `scored_logits` are the rows at the scored tokens."""
    model, x = network(family, name), batches()["inside"]
    want = model.log_prob(x)
    logits = target_logits(model, x)
    terms = torch.log_softmax(logits, -1).gather(-1, x.ids[..., None])[..., 0]
    torch.testing.assert_close(terms[x.scored_mask], want.per_unit[x.scored_mask], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scored_logits(model, x), logits[x.scored_mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@torch.no_grad()
def test_head_of_states_gives_the_logits(family, name):
    model, x = network(family, name), batches()["inside"]
    states, predicted = states_before_head(model, x), predicted_mask(model, x)
    assert (states[~predicted] == 0).all()
    logits = output_head(model)(states)
    assert logits.shape == (*x.ids.shape, VOCABULARY)
    torch.testing.assert_close(logits[predicted], target_logits(model, x)[predicted], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("causal", "llama"), ("causal", "gemma2"), ("seq2seq", "t5")])
def test_gradients_equal_those_of_naive_passes(family, name):
    """Of a random function of all logits, with respect to every parameter."""
    model, x = network(family, name), batches()["left"]
    weights = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    predicted = predicted_mask(model, x)
    (torch.tanh(target_logits(model, x)) @ weights)[predicted].sum().backward()
    got = {key: p.grad.clone() for key, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    for row, start in zip(random_rows(), STARTS, strict=True):
        (torch.tanh(naive(model, row, start)[0]) @ weights).sum().backward()
    assert got.keys() == {key for key, p in model.model.named_parameters() if p.grad is not None}
    for key, p in model.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[key], p.grad, atol=1e-3, rtol=1e-3)


def test_states_carry_gradients_to_the_encoder():
    model, x = network("seq2seq", "bart"), batches()["right"]
    both = encoder_decoder_states(model, x)
    both.decoder.sum().backward(retain_graph=True)
    embedding = model.model.get_encoder().layers[0].fc1.weight
    assert embedding.grad is not None
    before = embedding.grad.abs().sum()
    both.encoder.square().sum().backward()
    assert embedding.grad.abs().sum() != before


@pytest.mark.parametrize("name", list(SEQ2SEQ))
@pytest.mark.parametrize("side", ["right", "left", "inside"])
@torch.no_grad()
def test_encoder_states_equal_the_encoder_on_each_row(name, side):
    model, x = network("seq2seq", name), batches()[side]
    states, mask = encoder_states(model, x)
    assert mask.sum(1).tolist() == STARTS
    for i, (row, start) in enumerate(zip(random_rows(), STARTS, strict=True)):
        want = model.model.get_encoder()(input_ids=torch.tensor([row[:start]])).last_hidden_state[0]
        torch.testing.assert_close(states[i, :start], want, atol=1e-4, rtol=1e-4)
    assert (states[~mask] == 0).all()
    both = encoder_decoder_states(model, x)
    torch.testing.assert_close(both.encoder, states)
    torch.testing.assert_close(both.decoder, states_before_head(model, x))
    assert both.predicted.equal(predicted_mask(model, x))
    assert both.source_mask.equal(mask)


def test_both_sides_come_from_one_draw_of_dropout():
    """In training mode the encoder runs once: its states are the ones that the decoder read."""
    raw = build(SEQ2SEQ["bart"], VOCABULARY).train()
    model, x = Seq2SeqLM(raw), batches()["right"]
    seen = []
    handle = raw.get_encoder().register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
    both = encoder_decoder_states(model, x)
    handle.remove()
    encoded = [states for states in seen if len(states) == len(x)]  # the trunk's own trial has one row
    assert len(encoded) == 1
    reals = {tuple(both.encoder[i, 0].tolist()) for i in range(len(x))}
    assert reals == {tuple(states[0].tolist()) for states in encoded[0]}


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"]])
@torch.no_grad()
def test_adapters_count(targets):
    """A head that is no plain matrix any more is run as the architecture's own."""
    raw = build(CAUSAL["llama"], VOCABULARY)
    adapted = peft.get_peft_model(raw, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model, x = CausalLM(adapted), batches()["right"]
    got = target_logits(model, x)
    for i, (row, start) in enumerate(zip(random_rows(), STARTS, strict=True)):
        torch.testing.assert_close(got[i, 1 : len(row)], naive(model, row, start)[0], atol=1e-4, rtol=1e-4)
    states = states_before_head(model, x)
    logits = output_head(model)(states)
    predicted = predicted_mask(model, x)
    torch.testing.assert_close(logits[predicted], got[predicted], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_bias_outside_the_head_counts():
    model, x = network("seq2seq", "bart"), batches()["right"]
    model.model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    got = target_logits(model, x)
    want, first = naive(model, random_rows()[0], STARTS[0])
    torch.testing.assert_close(got[0, first : first + len(want)], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_on_either_side_of_a_frequency_change_do_not_run_together():
    """Long-RoPE: a short row beside a long one keeps its own frequencies."""
    model, x = CausalLM(build(MORE_CAUSAL["phi3_longrope"], VOCABULARY)), batches()["right"]
    got = target_logits(model, x)
    for i, row in enumerate(random_rows()):
        # The reference leaves the last token out as well: it is a target only.
        want = model.model(input_ids=torch.tensor([row[:-1]]), use_cache=False).logits[0]
        torch.testing.assert_close(got[i, 1 : len(row)], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_network_that_cannot_be_taken_apart_has_logits_but_no_states():
    model, x = network("causal", "llama"), batches()["inside"]
    want = target_logits(model, x)
    whole = CausalLM(model.model)
    whole.__dict__["trunk"] = None
    torch.testing.assert_close(target_logits(whole, x), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="states_before_head needs the states before the head"):
        states_before_head(whole, x)
    with pytest.raises(InputError, match="LlamaForCausalLM does not say"):
        output_head(whole)
    pair = network("seq2seq", "t5")
    want = target_logits(pair, x)
    whole_pair = Seq2SeqLM(pair.model)
    whole_pair.__dict__["trunk"] = None
    torch.testing.assert_close(target_logits(whole_pair, x), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_is_widened():
    raw = build(CAUSAL["llama"], VOCABULARY).bfloat16()
    x = batches()["right"]
    assert target_logits(CausalLM(raw), x).dtype == torch.float32
    whole = CausalLM(raw)
    whole.__dict__["trunk"] = None
    assert target_logits(whole, x).dtype == torch.float32
    assert states_before_head(CausalLM(raw), x).dtype == torch.bfloat16
    assert target_logits(CausalLM(raw.double()), x).dtype == torch.float64


def test_refusals():
    masked = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=1)
    causal, x = network("causal", "llama"), batches()["right"]
    with pytest.raises(InputError, match=r"label smoothing needs a logit for every token.*MaskedLM"):
        target_logits(masked, x, method="label smoothing")
    for function in (states_before_head, predicted_mask, scored_logits):
        with pytest.raises(InputError, match="MaskedLM does not have it"):
            function(masked, x)
    with pytest.raises(InputError, match="MaskedLM does not have it"):
        output_head(masked)
    for function in (encoder_states, encoder_decoder_states):
        with pytest.raises(InputError, match=r"states of an encoder; CausalLM.*use an encoder-decoder"):
            function(causal, x)
    for empty in (TokenBatch.from_lists([[5], [7]]), TokenBatch.from_lists([])):
        with pytest.raises(InputError, match="no token of this batch is predicted"):
            target_logits(causal, empty)
    first = TokenBatch.from_lists([[5, 6, 7], [5, 6, 7]], scored_from=[1, 0])
    with pytest.raises(InputError, match="row 1: column 0 is scored, and nothing predicts it"):
        scored_logits(causal, first)
