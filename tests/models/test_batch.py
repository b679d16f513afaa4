"""Token batches: what padding is, and what stripping it leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

rows_strategy = st.lists(st.lists(st.booleans(), min_size=4, max_size=9), min_size=1, max_size=4)


@given(pattern=rows_strategy)
@settings(max_examples=100, deadline=None)
def test_packing_left_keeps_real_tokens_in_order_and_unpacking_puts_them_back(pattern):
    width = max(map(len, pattern))
    real = torch.tensor([row + [False] * (width - len(row)) for row in pattern])
    ids = torch.arange(1, real.numel() + 1).reshape(real.shape)
    scored = real & (ids % 2 == 0)
    batch = TokenBatch(ids, real, scored, torch.full((len(ids),), 2), words=ids // 3)
    packed, origin = batch.packed_left()
    assert packed.words is not None
    for i in range(len(ids)):
        count = int(real[i].sum())
        assert packed.ids[i, :count].tolist() == ids[i][real[i]].tolist()
        assert packed.attention_mask[i].tolist() == [t < count for t in range(packed.ids.shape[1])]
        assert packed.scored_mask[i, :count].tolist() == scored[i][real[i]].tolist()
        assert packed.words[i, :count].tolist() == (ids[i] // 3)[real[i]].tolist()
        assert origin[i, count:].tolist() == packed.ids[i, count:].tolist() == [0] * (packed.ids.shape[1] - count)
        assert int(packed.completion_starts()[i]) == int(real[i, :2].sum())
    back = batch.unpack(packed.ids, origin, packed)
    assert torch.equal(back, ids * real)


def test_completion_starts_default_to_the_first_scored_column():
    batch = TokenBatch.from_lists([[1, 2, 3], [4, 5]], scored_from=[2, 2], padding_side="left")
    plain = TokenBatch(batch.ids, batch.attention_mask, batch.scored_mask)
    assert plain.completion_starts().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.long)}, "ids must have shape"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask must be bool"),
        ({"scored_mask": torch.ones(1, 3, dtype=torch.bool)}, "scored_mask must be bool of shape"),
        ({"starts": torch.zeros(2)}, "starts must have shape"),
        ({"words": torch.zeros(2, 2)}, "words must have shape"),
    ],
)
def test_shapes_that_do_not_fit(fields, message):
    good = {
        "ids": torch.zeros(1, 2, dtype=torch.long),
        "attention_mask": torch.ones(1, 2, dtype=torch.bool),
        "scored_mask": torch.ones(1, 2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        TokenBatch(**(good | fields))


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ, *MASKED])
def test_context_lengths(name):
    """What the architecture can take, and one more is refused by the architecture itself or has no end."""
    if name in CAUSAL:
        model = CausalLM(build(CAUSAL[name]))
    elif name in SEQ2SEQ:
        model = Seq2SeqLM(build(SEQ2SEQ[name]))
    else:
        model = MaskedLM(build(MASKED[name]), mask_token_id=4)
    assert model.max_length == (None if name in ("mamba", "t5") else 64)
    if name in ("roberta", "bert"):  # a row of the whole context runs
        with torch.no_grad():
            model.log_prob(TokenBatch.from_lists([[5] * 64], scored_from=[63]))
        with pytest.raises((IndexError, RuntimeError)):
            model.log_prob(TokenBatch.from_lists([[5] * 65], scored_from=[63]))


def test_hidden_states_stand_in_their_columns():
    raw = build(CAUSAL["llama"])
    row = [5, 6, 7, 8]
    batch = TokenBatch.from_lists([row, [9, 10]], padding_side="left")
    with torch.no_grad():
        got = CausalLM(raw).hidden_states(batch)
        alone = raw(input_ids=torch.tensor([[9, 10]]), output_hidden_states=True).hidden_states[-1]
    assert got.shape == (2, 4, 16)
    assert not got[1, :2].any()
    torch.testing.assert_close(got[1, 2:], alone[0], atol=1e-5, rtol=0)
