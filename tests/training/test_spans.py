"""Weights of tokens from marked spans of text."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from loglik.errors import RowError
from loglik.objectives.token_preference import tab_po
from loglik.training import TrainConfig, fit
from loglik.training.data import collate
from loglik.training.read import read_training_data
from loglik.training.spans import token_weights

PAIR = {"prompt": "def f():\n    pass\n", "chosen": "return x + 1\n", "rejected": "return None\n"}


def span(start: int, end: int, weight: float) -> dict[str, float]:
    return {"start": start, "end": end, "weight": weight}


def test_a_token_has_the_weight_of_the_heaviest_span_it_overlaps():
    pieces = ["ab", "cd", "", "e"]  # the third continues a character of the second
    spans = [span(1, 3, 2.0), span(2, 3, 5.0), span(4, 5, 0.0)]
    assert token_weights(pieces, spans, column="c", text="abcde") == [2.0, 5.0, 0.0, 0.0]
    assert token_weights(pieces, [], column="c", text="abcde") == [1.0] * 4


def test_spans_of_a_pair_become_weights_of_its_tokens(tiny):
    record = PAIR | {"chosen_spans": [span(7, 8, 4.0)]}  # the x
    (row,) = read_training_data([record], tiny).rows
    chosen, rejected = row.completions
    heavy = [tiny.tokenizer.decode([t]) for t, w in zip(chosen, row.weights[0], strict=True) if w == 4.0]
    assert "".join(heavy).strip() == "x"
    assert sorted(set(row.weights[0])) == [1.0, 4.0]
    assert row.weights[1] == [1.0] * len(rejected)
    batch = collate([(0, row)])
    assert batch.weights is not None
    assert float(batch.weights[0].sum()) == len(chosen) + 3.0


def test_a_straddling_token_counts_what_it_holds_of_the_completion(tiny):
    record = {"prompt": "    re", "chosen": "turn x", "rejected": "(x", "chosen_spans": [span(0, 1, 3.0)]}
    (row,) = read_training_data([record], tiny, eos=False).rows
    weights = row.weights[0]
    assert [w for w in weights if w != 1.0] == [3.0]
    assert "return" in tiny.tokenizer.decode([row.completions[0][weights.index(3.0)]])


def test_rows_without_spans_have_no_weights(tiny):
    (row,) = read_training_data([PAIR], tiny).rows
    assert row.weights is None
    (single,) = read_training_data(
        [{"prompt": "a = ", "completion": "1\n", "completion_spans": [span(0, 1, 2.0)]}], tiny
    ).rows
    assert single.weights[0][0] == 2.0


def test_tab_po_trains_on_them(tiny, tmp_path):
    import copy

    model = type(tiny)(copy.deepcopy(tiny.model), tiny.tokenizer)
    rows = read_training_data(
        [PAIR | {"chosen_spans": [span(7, 8, 4.0)], "rejected_spans": [span(7, 11, 2.0)]}], tiny
    ).rows
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-4)
    weighted = fit(model, partial(tab_po, beta=0.5), rows, config, output=tmp_path)
    assert torch.isfinite(torch.tensor(weighted.loss))


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ("x", "must be a list of spans"),
        ([{"start": 0}], "needs the numbers"),
        ([span(0, 99, 1.0)], "not inside a text of 13 characters"),
        ([span(3, 3, 1.0)], "not inside"),
        ([span(0, 1, -1.0)], "at least 0"),
    ],
)
def test_bad_spans_are_refused(tiny, spans, match):
    with pytest.raises(RowError, match=match):
        read_training_data([PAIR | {"chosen_spans": spans}], tiny)


def test_a_conversation_has_no_characters_to_mark(tiny):
    import copy

    model = type(tiny)(tiny.model, copy.deepcopy(tiny.tokenizer))
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ho"}],
        "completion_spans": [span(0, 1, 2.0)],
    }
    with pytest.raises(RowError, match="this is a conversation"):
        read_training_data([record], model)
