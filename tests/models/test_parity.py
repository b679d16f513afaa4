"""Log-probabilities of every architecture equal a naive transformers loop, whatever the padding and the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

NATS = 1e-4  # per sequence, float32
VOCABULARY = 50


def random_rows(seed: int = 1, *, low: int = 3) -> list[list[int]]:
    """Rows of different lengths, one of them as short as a scored row can be."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 2, 17, 5, 12]
    return [torch.randint(low, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def naive_causal(model, row: list[int], start: int) -> float:
    """One sequence, one forward pass, one token at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0]
    return sum(float(torch.log_softmax(logits[t - 1].float(), -1)[row[t]]) for t in range(start, len(row)))


def naive_seq2seq(model, source: list[int], target: list[int]) -> float:
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *target[:-1]]]))
    logits = out.logits[0].float()
    return sum(float(torch.log_softmax(logits[t], -1)[token]) for t, token in enumerate(target))


def naive_masked(model, row: list[int], scored: range, mask_id: int, together) -> float:
    total = 0.0
    for t in scored:
        hidden = list(row)
        for u in together(t):
            hidden[u] = mask_id
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([hidden])).logits[0, t].float()
        total += float(torch.log_softmax(logits, -1)[row[t]])
    return total


def with_padding_inside(rows: list[list[int]], starts: list[int]) -> TokenBatch:
    """Padding in the middle of the prompt's right neighbour: left, right and in between at once."""
    batch = TokenBatch.from_lists(rows, starts=starts)
    width = batch.ids.shape[1]
    ids = torch.full((len(rows), 2 * width + 3), 7)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    ids[:, 2 : 2 + 2 * width : 2] = batch.ids
    real[:, 2 : 2 + 2 * width : 2] = batch.attention_mask
    scored[:, 2 : 2 + 2 * width : 2] = batch.scored_mask
    assert batch.starts is not None
    return TokenBatch(ids, real, scored, 2 + 2 * batch.starts)


def batches(rows: list[list[int]], starts: list[int]) -> dict[str, TokenBatch]:
    order = [3, 0, 4, 2, 1]
    assert sorted(order) == list(range(len(rows)))
    return {
        "right": TokenBatch.from_lists(rows, starts=starts, pad_id=0),
        "left": TokenBatch.from_lists(rows, starts=starts, padding_side="left", pad_id=2),
        "inside": with_padding_inside(rows, starts),
    }


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_equals_naive_loop(name):
    raw = build(CAUSAL[name], VOCABULARY)
    model = CausalLM(raw)
    rows, starts = random_rows(), [1, 1, 6, 4, 11]
    expected = torch.tensor([naive_causal(raw, row, start) for row, start in zip(rows, starts, strict=True)])
    assert expected.std() > 0.1
    for padding, batch in batches(rows, starts).items():
        with torch.no_grad():
            got = model.log_prob(batch)
        assert got.kind is Kind.EXACT
        torch.testing.assert_close(got.value, expected, atol=NATS, rtol=0, msg=lambda m, p=padding: f"{p}: {m}")
        assert got.num_units.tolist() == [len(r) - s for r, s in zip(rows, starts, strict=True)]
        assert got.per_unit is not None
        assert not got.per_unit[~batch.scored_mask].any()


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_does_not_depend_on_the_batch(name):
    model = CausalLM(build(CAUSAL[name], VOCABULARY))
    rows, starts = random_rows(), [1, 1, 6, 4, 11]
    with torch.no_grad():
        alone = [
            model.log_prob(TokenBatch.from_lists([r], starts=[s])).value for r, s in zip(rows, starts, strict=True)
        ]
        for order in ([4, 3, 2, 1, 0], [1, 1, 2], [0, 2]):
            batch = TokenBatch.from_lists([rows[i] for i in order], starts=[starts[i] for i in order])
            got = model.log_prob(batch).value
            torch.testing.assert_close(got, torch.cat([alone[i] for i in order]), atol=NATS, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_gradients_equal_naive_loss(name):
    """The gradient of the labelled sum is that of transformers' own cross-entropy."""
    raw = build(CAUSAL[name], VOCABULARY)
    row = random_rows()[2]
    CausalLM(raw).log_prob(TokenBatch.from_lists([row], padding_side="left")).value.sum().backward()
    got = {n: p.grad.clone() for n, p in raw.named_parameters() if p.grad is not None}
    raw.zero_grad()
    ids = torch.tensor([row])
    (-(len(row) - 1) * raw(input_ids=ids, labels=ids).loss).backward()
    for n, p in raw.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[n], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_equals_naive_loop(name):
    raw = build(SEQ2SEQ[name], VOCABULARY)
    model = Seq2SeqLM(raw)
    rows, starts = random_rows(), [1, 1, 6, 4, 11]
    expected = torch.tensor(
        [naive_seq2seq(raw, row[:start], row[start:]) for row, start in zip(rows, starts, strict=True)]
    )
    for padding, batch in batches(rows, starts).items():
        with torch.no_grad():
            got = model.log_prob(batch)
        assert got.kind is Kind.EXACT
        torch.testing.assert_close(got.value, expected, atol=NATS, rtol=0, msg=lambda m, p=padding: f"{p}: {m}")
    with torch.no_grad():
        for i in range(len(rows)):
            alone = model.log_prob(TokenBatch.from_lists([rows[i]], starts=[starts[i]]))
            torch.testing.assert_close(alone.value, expected[i : i + 1], atol=NATS, rtol=0)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_scores_the_first_target_token_as_transformers_does(name):
    """transformers' own loss with labels: the decoder start token stands before the first label."""
    raw = build(SEQ2SEQ[name], VOCABULARY)
    source, target = [5, 6, 7], [8, 9, 10, 11]
    with torch.no_grad():
        loss = raw(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss
        got = Seq2SeqLM(raw).log_prob(TokenBatch.from_lists([source + target], starts=[len(source)]))
    torch.testing.assert_close(got.value[0], -loss * len(target), atol=NATS, rtol=0)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("variant", ["original", "within_word_l2r"])
def test_masked_equals_naive_loop(name, variant):
    raw = build(MASKED[name], VOCABULARY)
    mask_id = 4
    model = MaskedLM(raw, variant=variant, mask_token_id=mask_id, max_batch_tokens=40)
    rows, starts = random_rows(low=5), [1, 1, 6, 4, 11]
    words = [[t // 3 for t in range(len(row))] for row in rows]

    def together(t: int, length: int):
        last = t if variant == "original" else min(length - 1, 3 * (t // 3) + 2)
        return range(t, last + 1)

    expected = torch.tensor(
        [
            naive_masked(raw, row, range(start, len(row)), mask_id, partial(together, length=len(row)))
            for row, start in zip(rows, starts, strict=True)
        ]
    )
    for side in ("left", "right"):
        batch = TokenBatch.from_lists(rows, starts=starts, words=words, padding_side=side, pad_id=2)
        with torch.no_grad():
            got = model.log_prob(batch)
        assert got.kind is Kind.SURROGATE
        torch.testing.assert_close(got.value, expected, atol=NATS, rtol=0)


def test_masked_variants_differ_only_inside_words():
    raw = build(MASKED["bert"], VOCABULARY)
    batch = TokenBatch.from_lists([[5, 6, 7, 8]], scored_from=[0], words=[[0, 1, 1, 2]])
    with torch.no_grad():
        plain = MaskedLM(raw, mask_token_id=4).log_prob(batch).per_unit
        inside = MaskedLM(raw, mask_token_id=4, variant="within_word_l2r").log_prob(batch).per_unit
    assert (plain == inside).tolist() == [[True, False, True, True]]


def test_first_token_without_context_is_refused():
    model = CausalLM(build(CAUSAL["gpt2"]))
    with pytest.raises(ValueError, match="row 1: the first token cannot be scored"):
        model.log_prob(TokenBatch.from_lists([[5, 6], [7, 8]], scored_from=[1, 0]))


def test_source_tokens_are_refused_by_encoder_decoders():
    model = Seq2SeqLM(build(SEQ2SEQ["t5"]))
    with pytest.raises(ValueError, match="a source token is to be scored"):
        model.log_prob(TokenBatch.from_lists([[5, 6, 7]], starts=[2], scored_from=[1]))
    with pytest.raises(ValueError, match="row 0: the source is empty"):
        model.log_prob(TokenBatch.from_lists([[5, 6, 7]], starts=[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reductions_are_float32_in_half_precision(dtype):
    """Half-precision weights: log-softmax of the half-precision logits, but in float32, and never above zero."""
    raw = build(CAUSAL["llama"], VOCABULARY).to(dtype)
    row = random_rows()[2]
    with torch.no_grad():
        got = CausalLM(raw).log_prob(TokenBatch.from_lists([row]))
        logits = raw(input_ids=torch.tensor([row[:-1]])).logits[0]
    assert logits.dtype == dtype
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(len(row) - 1), row[1:]]
    assert got.value.dtype == torch.float32
    assert got.per_unit is not None
    torch.testing.assert_close(got.per_unit[0, 1:].double(), expected, atol=1e-5, rtol=0)
    assert (got.per_unit <= 0).all()


def test_greedy_match_names_the_first_choice():
    raw = build(CAUSAL["llama"], VOCABULARY)
    row = [5]
    with torch.no_grad():
        for _ in range(6):
            row.append(int(raw(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        row[4] = (row[4] + 1) % VOCABULARY
        _, greedy = CausalLM(raw).score_tokens(TokenBatch.from_lists([row], padding_side="left"))
    assert greedy[0, 1:4].all()
    assert not greedy[0, 4]
