"""Training data in the formats of trainers: tokens, boundaries, and one sentence for each thing that can be wrong."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loglik.errors import InputError, RowError
from loglik.training.data import collate
from loglik.training.read import read_training_data

PAIR = {"prompt": "def f():\n    pass\n", "chosen": "f(1)\n", "rejected": "g(None)\n"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text_of(model, ids) -> str:
    return model.tokenizer.decode(ids)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_a_pair_shares_its_prompt_and_ends_with_eos(tiny):
    (row,) = read_training_data([PAIR], tiny).rows
    eos = tiny.tokenizer.eos_token
    assert text_of(tiny, row.prompt).endswith("def f():\n    pass\n")
    assert [text_of(tiny, c) for c in row.completions] == ["f(1)\n" + eos, "g(None)\n" + eos]
    assert row.unscored == (0, 0)
    batch = collate([(0, row)]).tokens
    assert batch.groups.tolist() == [0, 0]
    assert batch.scored_mask.sum(1).tolist() == [len(c) for c in row.completions]


def test_a_token_that_straddles_the_prompt_is_trained_on(tiny):
    """``re`` + ``turn`` is one token: the completion that straddles is scored from there, the other from its start."""
    (row,) = read_training_data([{"prompt": "    re", "chosen": "turn x", "rejected": "(x"}], tiny, eos=False).rows
    first, second = row.completions
    assert text_of(tiny, [*row.prompt, *first]).endswith("    return x")
    assert text_of(tiny, [*row.prompt, *second]).endswith("    re(x")
    assert text_of(tiny, second[row.unscored[1] :]) == "(x"
    assert text_of(tiny, first[row.unscored[0] :]).strip().startswith("return")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", "saved", "memory"])
def test_every_source_gives_the_same_rows(tiny, tmp_path, suffix):
    records = [PAIR, {**PAIR, "chosen": "f(2)\n"}]
    path = tmp_path / f"data{suffix}"
    source: object = path
    if suffix == ".jsonl":
        write(path, records)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == "saved":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        source = datasets.Dataset.from_list(records)
    rows = read_training_data(source, tiny).rows
    expected = read_training_data(records, tiny).rows
    assert [(list(r.prompt), [list(c) for c in r.completions]) for r in rows] == [
        (list(r.prompt), [list(c) for c in r.completions]) for r in expected
    ]


def test_conversations_go_through_the_chat_template(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", CHAT)
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "x?"), ("assistant", "1"), ("assistant", "2")))
    (row,) = read_training_data([{"prompt": [ask], "chosen": [good], "rejected": [bad]}], tiny).rows
    bos = tiny.tokenizer.bos_token
    assert text_of(tiny, row.prompt) == f"{bos}<user>x?\n<assistant>"  # one BOS, the template's own
    assert [text_of(tiny, c) for c in row.completions] == ["1\n", "2\n"]  # the template ends the turn
    (implicit,) = read_training_data([{"chosen": [ask, good], "rejected": [ask, bad]}], tiny).rows
    assert implicit == row
    (whole,) = read_training_data([{"messages": [ask, good]}], tiny).rows
    assert text_of(tiny, [*whole.prompt, *whole.completions[0]]) == f"{bos}<user>x?\n<assistant>1\n"
    assert len(whole.prompt) == 1


def test_the_prompt_of_texts_is_what_both_begin_with(tiny):
    chosen, rejected = "Human: hi\nBot: good day", "Human: hi\nBot: go away"
    (row,) = read_training_data([{"chosen": chosen, "rejected": rejected}], tiny, eos=False).rows
    assert [text_of(tiny, [*row.prompt, *c]) for c in row.completions] == [chosen, rejected]


def test_numbers_come_along(tiny):
    rows = read_training_data(
        [
            {"prompt": "a\n", "completion": "b", "label": True},
            {"prompt": "a\n", "completions": ["b", "c"], "rewards": [1, 0.5], "proposal_logps": [-1.0, -2.0]},
            {**PAIR, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0, "preference": 0.75},
        ],
        tiny,
    ).rows
    assert rows[0].values == {"labels": (1.0,)}
    assert rows[1].values == {"rewards": (1.0, 0.5), "proposal": (-1.0, -2.0)}
    assert rows[2].values == {"preferences": (0.75,), "reference": (-3.0, -4.0)}


def test_plain_text_is_conditioned_on_bos(tiny):
    (row,) = read_training_data([{"text": "x = 1\n"}], tiny).rows
    assert list(row.prompt) == [tiny.tokenizer.bos_token_id]
    assert text_of(tiny, row.completions[0]) == "x = 1\n" + tiny.tokenizer.eos_token


def test_long_prompts_are_refused_or_cut_and_named(tiny):
    record = {**PAIR, "prompt": "x = 1\n" * 30}
    with pytest.raises(RowError, match=r"row 0: has \d+ tokens, more than the context of 40"):
        read_training_data([record], tiny, max_length=40)
    found = read_training_data([record], tiny, max_length=40, overflow="truncate")
    (row,) = found.rows
    assert found.truncated == ["row 0"]
    assert len(row.prompt) + max(map(len, row.completions)) == 41  # the last token is only a target
    (whole,) = read_training_data([record], tiny).rows
    assert row.completions == whole.completions
    begin = int(row.prompt[0] == tiny.tokenizer.bos_token_id)
    assert list(row.prompt)[begin:] == list(whole.prompt)[-(len(row.prompt) - begin) :]
    with pytest.raises(RowError, match="completion longer than the context"):
        read_training_data([{**PAIR, "chosen": "x = 1\n" * 30}], tiny, max_length=20, overflow="truncate")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**PAIR, "rejected": PAIR["chosen"]}, "identical"),
        ({**PAIR, "chosen": ""}, "empty"),
        ({"prompt": "a", "completion": ""}, "empty"),
        ({"question": "a", "answer": "b"}, "columns 'answer', 'question'"),
        ({"prompt": "a", "completion": 3}, "must be a text or a list of messages, got int"),
        ({"prompt": "a", "completions": []}, "at least one completion"),
        ({"prompt": "a", "completions": ["b"], "rewards": [1.0, 2.0]}, "2 numbers for 1 completions"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "finite numbers, got 'yes'"),
        ({**PAIR, "preference": float("nan")}, "finite numbers, got nan"),
        ({"chosen": "a", "rejected": [{"role": "user", "content": "b"}]}, "both be texts or both be lists"),
    ],
)
def test_rows_that_cannot_be_used(tiny, record, message):
    with pytest.raises(RowError, match=f"row 1: .*{message}"):
        read_training_data([PAIR, record], tiny)
    found = read_training_data([PAIR, record], tiny, on_error="skip")
    assert len(found.rows) == 1
    assert found.skipped[0].startswith("row 1: ")


def test_sources_that_cannot_be_read(tiny, tmp_path):
    for source, message in [
        (tmp_path / "none.jsonl", "does not exist"),
        (write(tmp_path / "data.csv", [PAIR]), "format of"),
        (write(tmp_path / "empty.jsonl", []), "no rows to train on"),
        (write(tmp_path / "torn.parquet", [PAIR]), "not a complete Parquet file"),
        (tmp_path, "save_to_disk"),
    ]:
        with pytest.raises(InputError, match=message):
            read_training_data(source, tiny)
    (tmp_path / "bad.jsonl").write_text(json.dumps(PAIR) + "\n{not json\n")
    with pytest.raises(RowError, match="line 2: is not valid JSON"):
        read_training_data(tmp_path / "bad.jsonl", tiny)
    chat = [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}]
    with pytest.raises(InputError, match="no chat template"):
        read_training_data(chat, tiny)
