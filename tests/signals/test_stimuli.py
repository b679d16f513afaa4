"""Answers to stimuli: greedy ones, whether they are right, and the items that two tasks share."""

from __future__ import annotations

import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.signals.stimuli import begins_with, greedy_answers, pair_items

PROMPTS = ["import os\nos.path.", "def __init__(self", "for i in ", "x", "class Foo(object):\n    def "]


def test_answers_are_the_likeliest_tokens(tiny):
    found = greedy_answers(tiny, PROMPTS, max_tokens=5)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = tiny.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer == tiny.tokenizer.decode(said, skip_special_tokens=True)


def test_answers_do_not_depend_on_the_batch(tiny):
    told = []
    one, all_at_once = (
        greedy_answers(tiny, PROMPTS, max_tokens=6, batch_size=size, advance=told.append) for size in (2, 8)
    )
    assert one == all_at_once
    assert told == [2, 2, 1, 5]


def test_answers_refuse_what_cannot_be_answered(tiny):
    with pytest.raises(InputError, match="needs per-token conditionals"):
        greedy_answers(object(), PROMPTS)
    for options in ({"max_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="must be at least 1"):
            greedy_answers(tiny, PROMPTS, **options)
    with pytest.raises(RowError, match=r"prompt 1: has .* tokens, and 4 more do not fit"):
        greedy_answers(tiny, ["a", "word " * 3000], max_tokens=4)


def test_a_prompt_after_which_nothing_is_known_is_named_by_its_own_number(tiny):
    class Broken:
        tokenizer, layout, max_length = tiny.tokenizer, tiny.layout, tiny.max_length

        def next_log_probs(self, prefix):
            table = torch.full((len(prefix), 9), -2.0)
            table[(prefix.ids == tiny.tokenizer("wug")["input_ids"][0]).any(1)] = torch.nan
            return table

    with pytest.raises(RowError, match="prompt 3: the model gives NaN after it"):
        greedy_answers(Broken(), ["x", "y", "x", "wug"], batch_size=2, max_tokens=1)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("hello there", "hello there", True),
        ('"hello there"', "hello there", True),
        ("  hello\n there, friend", "hello there", True),
        ("“hello there”", "'hello there'", True),
        ("well, hello there", "hello there", False),
        ("hello", "hello there", False),
        ("", "hello", False),
    ],
)
def test_right_answers(said, right, expected):
    assert begins_with(said, right) is expected


def test_items_are_paired_by_key_and_occurrence():
    assert pair_items(["a", "b", "a", "c"], ["a", "a", "b", "a"]) == ([0, 1, 2], [0, 2, 1])
    assert pair_items(["x"], ["y"]) == ([], [])
    assert pair_items([], ["y"]) == ([], [])
