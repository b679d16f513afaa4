"""Whole texts as rows: what is scored, in which order, and under which names errors come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import loglik
from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.signals.membership import membership_scores
from loglik.signals.texts import (
    inference_log_prob,
    require_same_tokens,
    text_batches,
    text_log_probs,
    text_rows,
    text_tokens,
)

TEXTS = ["import os\n", "x = 1", "def add(a, b):\n    return a + b\n", "for i in y:\n    pass\n", "zig"]


def test_context_is_read_and_not_scored(tiny):
    trap, before = "def zig(zag):", "import os\n"
    alone, within = text_rows(tiny, [trap]), text_rows(tiny, [trap], [before])
    assert int(alone.scored_mask.sum()) == int(within.scored_mask.sum())
    assert alone.ids[0, 0] == tiny.tokenizer.bos_token_id
    for batch in (alone, within):  # a decoder would begin where the first scored token is
        assert batch.starts.tolist() == batch.scored_mask.int().argmax(1).tolist()
    with torch.no_grad():
        terms = tiny.log_prob(TokenBatch.from_lists([within.ids[0].tolist()])).per_unit[0]
    got = membership_scores(tiny, within)["loss"].item()
    assert got == pytest.approx(terms[within.scored_mask[0]].mean().item(), abs=1e-4)
    assert got != pytest.approx(membership_scores(tiny, alone)["loss"].item(), abs=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_are_the_rows_in_their_order(tiny, size):
    batches = list(text_batches(tiny, TEXTS, batch_size=size))
    assert [len(batch) for batch in batches] == [min(size, 5 - first) for first in range(0, 5, size)]
    together = text_rows(tiny, TEXTS)
    rows = [(ids[real].tolist(), scored[real].tolist()) for b in batches for ids, real, scored in _parts(b)]
    assert rows == [(ids[real].tolist(), scored[real].tolist()) for ids, real, scored in _parts(together)]


def _parts(batch):
    return zip(batch.ids, batch.attention_mask, batch.scored_mask, strict=True)


def test_log_probs_are_those_of_score_whatever_the_batch_size(tiny):
    wanted = loglik.score(tiny, TEXTS)
    seen = []
    for size in (2, 5):
        found = text_log_probs(tiny, TEXTS, batch_size=size, advance=seen.append)
        assert found.value.tolist() == pytest.approx(wanted.value.tolist(), abs=1e-4)
        assert found.num_units.tolist() == wanted.num_units.tolist()
        assert (found.kind, found.unit) == (wanted.kind, wanted.unit)
        assert not found.value.requires_grad
    assert seen == [2, 2, 1, 5]
    pairs = loglik.score(tiny, [("import os\n", text) for text in TEXTS])
    assert text_log_probs(tiny, TEXTS, ["import os\n"] * 5).value.tolist() == pytest.approx(
        pairs.value.tolist(), abs=1e-4
    )


def test_inference_leaves_the_mode_as_it_was(tiny):
    tiny.model.train()
    try:
        found = inference_log_prob(tiny, text_rows(tiny, TEXTS))
        assert tiny.model.training
        assert not found.value.requires_grad
    finally:
        tiny.model.eval()


def test_tokens_spell_the_text_without_special_ones_and_may_be_long(tiny):
    long = "x = 1\n" * 2000
    short, tokens = text_tokens(tiny, ["import os\n", long])
    assert tiny.tokenizer.decode(short) == "import os\n"
    assert tiny.tokenizer.decode(tokens) == long
    assert not {*short} & {*tiny.tokenizer.all_special_ids}


def test_models_that_cut_alike_pass_and_others_are_told(tiny):
    require_same_tokens(tiny, tiny, TEXTS)
    letters = NGramLM.train(TEXTS, order=2)
    with pytest.raises(RowError, match="line 7: the base model cuts it into other tokens"):
        require_same_tokens(tiny, letters, TEXTS[:1], names=["line 7"], whose="base")
    with pytest.raises(RowError, match="row 0: the other model cuts"):
        require_same_tokens(letters, tiny, TEXTS)


def test_refusals_of_rows(tiny):
    for texts in ([], "one"):
        with pytest.raises(InputError, match="texts must be a sequence"):
            text_rows(tiny, texts)
    with pytest.raises(InputError, match="2 texts need as many contexts, got 1"):
        text_rows(tiny, ["a", "b"], ["c"])
    with pytest.raises(InputError, match="2 texts need as many names, got 1"):
        text_rows(tiny, ["a", "b"], names=["c"])
    with pytest.raises(RowError, match="row 1: the completion is empty"):
        text_rows(tiny, ["a", ""])
    with pytest.raises(RowError, match="line 9: the completion is empty"):
        text_rows(tiny, ["a", ""], names=["line 8", "line 9"])
    with pytest.raises(
        RowError, match=r"row 0: has [\d,]+ tokens and the model a context of 1,024: cut it into pieces"
    ):
        text_rows(tiny, ["x = 1\n" * 2000])
    with pytest.raises(InputError, match="batch_size must be a whole number of at least 1, got 0"):
        text_batches(tiny, TEXTS, batch_size=0)
    with pytest.raises(RowError):  # before the first batch comes out
        text_batches(tiny, ["a", ""], batch_size=1)
    with pytest.raises(InputError, match="no tokenizer"):
        text_rows(SimpleNamespace(tokenizer=None, layout="causal", max_length=None), ["a"])
